"""Which client libraries work with `generate.py --serve`?

  python tests/clients.py --folder /tmp/clients          installs them there, and prints a table

Starts the server with the small base and runs each library's own few lines, in Python or JavaScript
(npm), in an environment of its own: they want each other's versions. What a library gives must be
the text that a plain HTTP request gets. A library that does not install from its index is named."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from soak_server import start

# {index and what is installed: {what is tried: code}}. The code finds URL, KEY, MODEL, ASK (a
# question), TEXT (a prompt), and leaves what it got in `got`.
CLIENTS = {
    "tool curl": {
        "chat": """
import json, subprocess
body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": ASK}]})
command = ["curl", "-sf", URL + "/chat/completions", "-H", "Content-Type: application/json"]
r = subprocess.run([*command, "-d", body], capture_output=True, check=True)
got = json.loads(r.stdout)["choices"][0]["message"]["content"]""",
        "stream": """
import json, subprocess
body = {"model": MODEL, "messages": [{"role": "user", "content": ASK}], "stream": True}
command = ["curl", "-sfN", URL + "/chat/completions", "-d", json.dumps(body)]
lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
events = [json.loads(x[6:]) for x in lines if x.startswith(b"data: {")]
got = "".join(e["choices"][0]["delta"]["content"] for e in events)""",
    },
    "pip openai": {
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
    "pip httpx": {
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
    "pip requests": {
        "chat": """
import requests
body = {"model": MODEL, "messages": [{"role": "user", "content": ASK}]}
r = requests.post(URL + "/chat/completions", json=body)
got = r.json()["choices"][0]["message"]["content"]""",
    },
    "pip aiohttp": {
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
    "pip langchain-openai": {
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
    "pip litellm": {
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
    "pip llm": {
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
    "pip pydantic-ai-slim[openai]": {
        "chat": """
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
got = Agent(model).run_sync(ASK).output""",
    },
    "pip openai-agents": {
        "chat": """
from agents import Agent, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
set_tracing_disabled(True)
model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=URL, api_key=KEY))
got = Runner.run_sync(Agent(name="a", model=model), ASK).final_output""",
    },
    "pip instructor": {
        "chat": """
import instructor
from openai import OpenAI
c = instructor.from_openai(OpenAI(base_url=URL, api_key=KEY), mode=instructor.Mode.MD_JSON)
m = [{"role": "user", "content": ASK}]
r = c.chat.completions.create(model=MODEL, messages=m, response_model=None)
got = r.choices[0].message.content""",
    },
    "pip llama-index-llms-openai-like": {
        "chat": """
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
# Its own default, a temperature of 0.1, samples.
options = {"is_chat_model": True, "max_tokens": 256, "temperature": 0}
c = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, **options)
got = c.chat([ChatMessage(role="user", content=ASK)]).message.content""",
        "completions": """
from llama_index.llms.openai_like import OpenAILike
c = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=False, max_tokens=8)
got = c.complete(TEXT).text""",
    },
    "pip haystack-ai": {
        "chat": """
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
c = OpenAIChatGenerator(api_key=Secret.from_token(KEY), model=MODEL, api_base_url=URL)
got = c.run([ChatMessage.from_user(ASK)])["replies"][0].text""",
    },
    "pip dspy": {
        "chat": """
import dspy
c = dspy.LM("openai/" + MODEL, api_base=URL, api_key=KEY, cache=False, temperature=0)
got = c(ASK)[0]""",
    },
    "pip autogen-ext[openai] autogen-agentchat": {
        "chat": """
import asyncio
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
can = dict.fromkeys(("vision", "function_calling", "json_output", "structured_output"), False)
info = {"family": "unknown", **can}
c = OpenAIChatCompletionClient(model=MODEL, base_url=URL, api_key=KEY, model_info=info)
r = asyncio.run(AssistantAgent("a", c, system_message=None).run(task=ASK))
got = r.messages[-1].content""",
    },
    "pip smolagents[openai]": {
        "chat": """
from smolagents import OpenAIModel
c = OpenAIModel(model_id=MODEL, api_base=URL, api_key=KEY)
got = c.generate([{"role": "user", "content": [{"type": "text", "text": ASK}]}]).content""",
        "stream": """
from smolagents import OpenAIModel
c = OpenAIModel(model_id=MODEL, api_base=URL, api_key=KEY)
m = [{"role": "user", "content": [{"type": "text", "text": ASK}]}]
got = "".join(d.content or "" for d in c.generate_stream(m))""",
    },
    "pip semantic-kernel": {
        "chat": """
import asyncio
from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion as Chat
from semantic_kernel.connectors.ai.open_ai import OpenAIChatPromptExecutionSettings as Settings
from semantic_kernel.contents import ChatHistory
c = Chat(MODEL, async_client=AsyncOpenAI(base_url=URL, api_key=KEY))
h = ChatHistory()
h.add_user_message(ASK)
got = str(asyncio.run(c.get_chat_message_content(h, Settings())))""",
    },
    "pip crewai": {
        "chat": """
from crewai import LLM
got = LLM(model="openai/" + MODEL, base_url=URL, api_key=KEY).call(ASK)""",
    },
    "pip agno openai": {
        "chat": """
from agno.agent import Agent
from agno.models.openai.like import OpenAILike
got = Agent(model=OpenAILike(id=MODEL, base_url=URL, api_key=KEY)).run(ASK).content""",
    },
    "npm openai": {
        "chat": """
import OpenAI from "openai";
const c = new OpenAI({baseURL: URL, apiKey: KEY});
const messages = [{role: "user", content: ASK}];
const r = await c.chat.completions.create({model: MODEL, messages});
got = r.choices[0].message.content;""",
        "stream": """
import OpenAI from "openai";
const c = new OpenAI({baseURL: URL, apiKey: KEY});
const messages = [{role: "user", content: ASK}];
const s = c.chat.completions.stream({model: MODEL, messages});
let whole = "";
s.on("content", (delta) => { whole += delta; });
got = await s.finalContent();
if (got !== whole) throw new Error("pieces");""",
        "completions": """
import OpenAI from "openai";
const c = new OpenAI({baseURL: URL, apiKey: KEY});
const r = await c.completions.create({model: MODEL, prompt: [TEXT, TEXT], max_tokens: 8});
if (r.choices[0].text !== r.choices[1].text) throw new Error("texts");
got = r.choices[0].text;""",
    },
    "npm ai @ai-sdk/openai-compatible": {
        "chat": """
import { generateText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const c = createOpenAICompatible({name: "ours", baseURL: URL, apiKey: KEY});
got = (await generateText({model: c.chatModel(MODEL), prompt: ASK})).text;""",
        "stream": """
import { streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const c = createOpenAICompatible({name: "ours", baseURL: URL, apiKey: KEY});
got = "";
for await (const t of streamText({model: c.chatModel(MODEL), prompt: ASK}).textStream) got += t;""",
    },
    "npm @langchain/openai @langchain/core": {
        "chat": """
import { ChatOpenAI } from "@langchain/openai";
const c = new ChatOpenAI({model: MODEL, apiKey: KEY, configuration: {baseURL: URL}});
got = (await c.invoke(ASK)).content;""",
        "stream": """
import { ChatOpenAI } from "@langchain/openai";
const c = new ChatOpenAI({model: MODEL, apiKey: KEY, configuration: {baseURL: URL}});
got = "";
for await (const part of await c.stream(ASK)) got += part.content;""",
        "completions": """
import { OpenAI } from "@langchain/openai";
const configuration = {baseURL: URL};
const c = new OpenAI({model: MODEL, apiKey: KEY, maxTokens: 8, temperature: 0, configuration});
got = await c.invoke(TEXT);""",
    },
}
ASK, TEXT = "归脾汤由哪些药物组成？", "黄芪的功效是"


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]


def install(index, packages, folder):
    """(command that runs a program, version of the first package), installed into a folder unless
    it is there. Raises OSError or CalledProcessError if that fails."""

    def call(*command):
        run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
        return run.stdout.strip()

    folder.mkdir(parents=True, exist_ok=True)
    name, python = re.sub(r"\[.*", "", packages[0]), str(folder / "bin" / "python")
    if index == "tool":
        return [sys.executable, "-c"], call(name, "--version").split()[1]
    if index == "npm":
        manifest = folder / "node_modules" / name / "package.json"
        if not manifest.is_file():
            call("npm", "install", "--silent", *packages)
        node = ["node", "--input-type=module", "-e"]
        return node, json.loads(manifest.read_text())["version"]
    if not Path(python).is_file():
        call(sys.executable, "-m", "venv", folder)
        call(python, "-m", "pip", "install", "-q", *packages)
    return [python, "-c"], call(
        python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"
    )


def program(index, names, code):
    """What is run: the names, the code, and what it got as the last line."""
    if index == "npm":
        lines = [f"const {name} = {json.dumps(value)};" for name, value in names.items()]
        last = "console.log('\\n' + JSON.stringify(got)); process.exit()"
        return "\n".join([*lines, "let got;", code, last])
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    return "\n".join([*lines, code, "import json; print('\\n' + json.dumps(got))"])


def attempt(command, text, folder, wanted):
    """ "yes", or why not, in a few words."""
    try:
        done = subprocess.run(
            [*command, text], capture_output=True, text=True, timeout=300, cwd=folder
        )
    except subprocess.TimeoutExpired:
        return "no (300 s)"
    if done.returncode:
        said = [x for x in done.stderr.splitlines() if "rror" in x] or ["?"]
        return f"no ({said[-1].strip()[:120]})"
    got = json.loads(done.stdout.splitlines()[-1])
    # Some strip what they get.
    return "yes" if got.strip() == wanted.strip() else f"no (got {got!r:.60})"


def try_client(index, packages, tries, folder, names, wanted):
    """The row of a library: name, version, and what became of each try."""
    try:
        command, version = install(index, packages, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder)  # the next run tries again
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or ["?"]
        return [f"{packages[0]} ({index})", f"does not install ({said[-1][:120]})", "", "", "", ""]
    said = {
        what: attempt(command, program(index, names, code), folder, wanted.get(what, wanted[""]))
        for what, code in tries.items()
    }
    columns = [said.pop(what, "") for what in ("chat", "stream", "completions")]
    more = ", ".join(f"{what} {result}" for what, result in said.items())
    return [f"{packages[0]} ({index})", version, *columns, more]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, type=Path, help="where each is installed")
    parser.add_argument("--only", nargs="*", help="the libraries whose names hold these words")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        options = ("--use_lora=False", "--dtype", "fp32")
        server, port = start(log, *options)
        url = f"http://127.0.0.1:{port}/v1"
        names = {"URL": url, "KEY": "none", "MODEL": "base", "ASK": ASK, "TEXT": TEXT}
        chat = {"model": "base", "messages": [{"role": "user", "content": ASK}]}
        text = {"model": "base", "prompt": TEXT, "max_tokens": 8}
        wanted = {"completions": post(url, "/completions", text)["text"]}
        wanted[""] = post(url, "/chat/completions", chat)["message"]["content"]
        print("| library | version | chat | stream | completions | more |\n|" + "---|" * 6)
        try:
            for packages, tries in CLIENTS.items():
                if args.only and not any(word in packages for word in args.only):
                    continue
                index, *packages = packages.split()
                own = args.folder.resolve() / re.sub(r"\W+", "-", f"{index}-{packages[0]}")
                row = try_client(index, packages, tries, own, names, wanted)
                print(f"| {' | '.join(row)} |", flush=True)
        finally:
            server.kill()
        sys.exit("Traceback" in Path(log.name).read_text())


if __name__ == "__main__":
    main()
