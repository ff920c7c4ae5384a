"""Which client libraries work with `generate.py --serve`?

  python -m venv /tmp/clients && python tests/clients.py --venv /tmp/clients --install

Starts the server with the small base, runs each library's own few lines in the other environment,
and prints a Markdown table: the version, and what works. What a library gives must be the text that
a plain HTTP request gets. A library that does not install from the index is named and left out."""

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from soak_server import start

# {name of the package: {what is tried: code}}. The code finds URL, KEY, MODEL, ASK (a question),
# TEXT (a prompt), and leaves what it got in `got`.
CLIENTS = {
    "openai": {
        "chat": """
from openai import OpenAI
c = OpenAI(base_url=URL, api_key=KEY)
r = c.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": ASK}])
got = r.choices[0].message.content""",
        "stream": """
from openai import OpenAI
c = OpenAI(base_url=URL, api_key=KEY)
m = [{"role": "user", "content": ASK}]
with c.chat.completions.stream(model=MODEL, messages=m) as s:
    got = "".join(e.delta for e in s if e.type == "content.delta")
    assert s.get_final_completion().choices[0].message.content == got""",
        "completions": """
from openai import OpenAI
c = OpenAI(base_url=URL, api_key=KEY)
r = c.completions.create(model=MODEL, prompt=[TEXT, TEXT], max_tokens=8, logprobs=1)
assert r.choices[0].text == r.choices[1].text and r.choices[1].logprobs.tokens
got = r.choices[0].text""",
        "logprobs": """
from openai import OpenAI
c = OpenAI(base_url=URL, api_key=KEY)
m = [{"role": "user", "content": ASK}]
r = c.chat.completions.create(model=MODEL, messages=m, logprobs=True, top_logprobs=2, store=False,
                              metadata={"a": "b"}, parallel_tool_calls=True)
assert len(r.choices[0].logprobs.content[0].top_logprobs) == 2
got = r.choices[0].message.content""",
    },
    "httpx": {
        "chat": """
import httpx
body = {"model": MODEL, "messages": [{"role": "user", "content": ASK}]}
r = httpx.post(URL + "/chat/completions", json=body)
got = r.json()["choices"][0]["message"]["content"]""",
        "chunked": """
import httpx, json
body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": ASK}]}).encode()
parts = iter([body[:9], body[9:]])
r = httpx.post(URL + "/chat/completions", content=parts)
got = r.json()["choices"][0]["message"]["content"]""",
    },
    "requests": {
        "chat": """
import requests
body = {"model": MODEL, "messages": [{"role": "user", "content": ASK}]}
r = requests.post(URL + "/chat/completions", json=body)
got = r.json()["choices"][0]["message"]["content"]""",
    },
    "aiohttp": {
        "stream": """
import aiohttp, asyncio, json
async def main():
    body = {"model": MODEL, "messages": [{"role": "user", "content": ASK}], "stream": True}
    async with aiohttp.ClientSession() as s, s.post(URL + "/chat/completions", json=body) as r:
        lines = [line async for line in r.content]
    events = [json.loads(x[6:]) for x in lines if x.startswith(b"data: {")]
    return "".join(e["choices"][0]["delta"]["content"] for e in events)
got = asyncio.run(main())""",
    },
    "langchain-openai": {
        "chat": """
from langchain_openai import ChatOpenAI
got = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL).invoke(ASK).content""",
        "stream": """
from langchain_openai import ChatOpenAI
chunks = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL).stream(ASK)
got = "".join(c.content for c in chunks)""",
        "completions": """
from langchain_openai import OpenAI
c = OpenAI(base_url=URL, api_key=KEY, model=MODEL, max_tokens=8, temperature=0)
got, again = (g[0].text for g in c.generate([TEXT, TEXT]).generations)
assert got == again""",
        "logprobs": """
from langchain_openai import ChatOpenAI
c = ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, logprobs=True, top_logprobs=2)
r = c.invoke(ASK)
assert r.response_metadata["logprobs"]["content"][0]["top_logprobs"]
got = r.content""",
    },
    "litellm": {
        "chat": """
import litellm
m = [{"role": "user", "content": ASK}]
r = litellm.completion(model="openai/" + MODEL, api_base=URL, api_key=KEY, messages=m)
got = r.choices[0].message.content""",
        "stream": """
import litellm
m = [{"role": "user", "content": ASK}]
r = litellm.completion(model="openai/" + MODEL, api_base=URL, api_key=KEY, messages=m, stream=True)
got = "".join(c.choices[0].delta.content or "" for c in r)""",
    },
    "llm": {
        "chat": """
import llm
from llm.default_plugins.openai_models import Chat
model = Chat(MODEL, model_name=MODEL, api_base=URL)
model.key = KEY
got = model.prompt(ASK, stream=False).text()""",
        "stream": """
import llm
from llm.default_plugins.openai_models import Chat
model = Chat(MODEL, model_name=MODEL, api_base=URL)
model.key = KEY
got = "".join(model.prompt(ASK))""",
    },
    "pydantic-ai-slim[openai]": {
        "chat": """
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
got = Agent(model).run_sync(ASK).output""",
    },
    "openai-agents": {
        "chat": """
from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
set_tracing_disabled(True)
model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=URL, api_key=KEY))
got = Runner.run_sync(Agent(name="a", model=model), ASK).final_output""",
    },
    "instructor": {
        "chat": """
import instructor
from openai import OpenAI
c = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY), mode=instructor.Mode.MD_JSON)
m = [{"role": "user", "content": ASK}]
r = c.chat.completions.create(model=MODEL, messages=m, response_model=None)
got = r.choices[0].message.content""",
    },
    "llama-index-llms-openai-like": {
        "chat": """
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
c = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True, max_tokens=24)
got = c.chat([ChatMessage(role="user", content=ASK)]).message.content""",
        "completions": """
from llama_index.llms.openai_like import OpenAILike
c = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=False, max_tokens=8)
got = c.complete(TEXT).text""",
    },
    "haystack-ai": {
        "chat": """
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
c = OpenAIChatGenerator(api_key=Secret.from_token(KEY), model=MODEL, api_base_url=URL)
got = c.run([ChatMessage.from_user(ASK)])["replies"][0].text""",
    },
    "dspy": {
        "chat": """
import dspy
c = dspy.LM("openai/" + MODEL, api_base=URL, api_key=KEY, cache=False, temperature=0)
got = c(ASK)[0]""",
    },
}
ASK, TEXT = "归脾汤由哪些药物组成？", "黄芪的功效是"


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]


def attempt(python, code, names, wanted):
    """ "yes", or why not, in a few words."""
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    program = "\n".join([*lines, code, "import json; print('\\n' + json.dumps(got))"])
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "no (300 s)"
    if done.returncode:
        return f"no ({(done.stderr.strip().splitlines() or ['?'])[-1][:120]})"
    got = json.loads(done.stdout.splitlines()[-1])
    # Some strip what they get.
    return "yes" if got.strip() == wanted.strip() else f"no (got {got!r:.60})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", required=True, help="an environment with pip, of its own")
    parser.add_argument("--install", action="store_true", help="install what is missing there")
    parser.add_argument("--only", nargs="*", help="these packages alone")
    args = parser.parse_args()
    python = str(Path(args.venv, "bin", "python"))
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        options = ("--use_lora=False", "--dtype", "fp32", "--max_new_tokens", "24")
        server, port = start(log, *options)
        url = f"http://127.0.0.1:{port}/v1"
        names = {"URL": url, "KEY": "none", "MODEL": "base", "ASK": ASK, "TEXT": TEXT}
        chat = {"model": "base", "messages": [{"role": "user", "content": ASK}]}
        text = {"model": "base", "prompt": TEXT, "max_tokens": 8}
        wanted = {"completions": post(url, "/completions", text)["text"]}
        whole = post(url, "/chat/completions", chat)["message"]["content"]
        print(
            "| library | version | chat | stream | completions | more |\n|---|---|---|---|---|---|"
        )
        try:
            for package, tries in CLIENTS.items():
                if args.only and package not in args.only:
                    continue
                if args.install:
                    subprocess.run([python, "-m", "pip", "install", "-q", package], check=False)
                name = package.partition("[")[0]
                ask = f"import importlib.metadata as m; print(m.version({name!r}))"
                found = subprocess.run([python, "-c", ask], capture_output=True, text=True)
                if found.returncode:
                    print(f"| {name} | does not install | | | | |", flush=True)
                    continue
                said = {
                    what: attempt(python, code, names, wanted.get(what, whole))
                    for what, code in tries.items()
                }
                columns = [said.pop(what, "") for what in ("chat", "stream", "completions")]
                more = ", ".join(f"{what} {result}" for what, result in said.items())
                row = [name, found.stdout.strip(), *columns, more]
                print(f"| {' | '.join(row)} |", flush=True)
        finally:
            server.kill()
        sys.exit("Traceback" in Path(log.name).read_text())


if __name__ == "__main__":
    main()
