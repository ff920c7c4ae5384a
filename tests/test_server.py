"""The server of generate.py: the openai client on loopback, against offline answers; what is
refused, and how."""

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import build_data as D
import generate as G
import lora as L

import openai
import pytest
import torch
from conftest import ROOT, plain_prompt
from test_client import options as client_options

QUESTIONS = [
    "黄芪有什么功效？",
    "偏头痛有哪些症状？",
    "你好",
    "甘草和大黄的区别是什么，各用于哪些情况？",
]


@pytest.fixture(scope="module")
def models(base):
    """(tokenizer, template, base model, the same with an adapter), weights so large that answers
    vary and no two ids tie."""
    plain, tokenizer = G.load_base(base, "cpu", torch.float32)
    for p in plain.parameters():
        p.data.mul_(20 if p.dim() > 1 else 1)
    tuned, _ = G.load_base(base, "cpu", torch.float32)
    tuned.load_state_dict(plain.state_dict())
    L.add_lora(tuned, L.LoRAConfig(4, 8.0, 0.0, ("all",)))
    for i, (_, module) in enumerate(L.lora_linears(tuned)):
        for p in (module.lora_a, module.lora_b):
            p.data.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return tokenizer, G.load_template("med_template"), plain, tuned.requires_grad_(False)


def start(models, rows=3, positions=160, limit=64, **more):
    tokenizer, template, _, tuned = models
    batch = G.Batch(tuned, rows, positions, tokenizer.eos_id, tokenizer.decode)

    def prompt_of(messages):
        return G.render_prompt(tokenizer, template, messages)

    options = G.Options(max_new_tokens=24, port=0, **more)
    server = G.Server(batch, tokenizer, ["tuned", "base"], prompt_of, options)
    server.seconds, server.limit = 1.0, limit
    thread = threading.Thread(target=asyncio.run, args=(server.run(),), daemon=True)
    thread.start()

    def stop():
        server.stopping = True
        thread.join(20)
        assert not thread.is_alive()

    return server, stop


def port_of(server):
    return server.socket.getsockname()[1]


def answer_alone(model, tokenizer, prompt, new):
    """The answer to a prompt with no server near it."""
    ids = tokenizer.encode(prompt, bos=True)
    return G.visible(tokenizer.decode(list(G.generate_ids(model, ids, new, tokenizer.eos_id))))


@pytest.fixture(scope="module")
def offline(models):
    """{(question, name): greedy answer}, by the base without an adapter or by base and adapter."""
    tokenizer, template, plain, tuned = models
    return {
        (q, name): answer_alone(model, tokenizer, plain_prompt(template, q), 24)
        for q in QUESTIONS
        for name, model in (("base", plain), ("tuned", tuned))
    }


@pytest.fixture(scope="module")
def server(models, offline):
    server, stop = start(models)
    yield server
    stop()


def client_of(server, key="none"):
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{port_of(server)}/v1", api_key=key, max_retries=0, timeout=60
    )


def chat(client, text, model="tuned", **more):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **more
    )


def idle(server):
    """Whether soon no answer is under way."""
    for _ in range(200):
        if not server.batch.waiting and not server.batch.rows:
            return True
        time.sleep(0.05)


def test_answers_equal_the_offline_ones(server, offline):
    """Streaming or not, base and tuned mixed, more at once than there are places."""
    client, got = client_of(server), {}

    def one(question, name, stream):
        answer = chat(client, question, name, stream=stream)
        got[question, name, stream] = (
            "".join(c.choices[0].delta.content for c in answer)
            if stream
            else answer.choices[0].message.content
        )

    cases = [(*case, stream) for case in offline for stream in (False, True)]
    threads = [threading.Thread(target=one, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {case: offline[case[:2]] for case in cases}
    assert len(set(offline.values())) == 8 and idle(server)


def test_stream_has_openais_form(server, models, offline):
    client, tokenizer, template = client_of(server), *models[:2]
    chunks = list(chat(client, QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    assert (
        chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    )
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == len(
        tokenizer.encode(plain_prompt(template, QUESTIONS[0]), bos=True)
    )
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {
        "chat.completion.chunk"
    }
    plain = list(client.completions.create(model="base", prompt="黄芪", max_tokens=5, stream=True))
    assert plain[-1].choices[0].finish_reason == "length" and plain[0].object == "text_completion"


def test_fields_have_their_effect(server, models, offline):
    client, (tokenizer, _, plain, _) = client_of(server), models
    whole = offline[QUESTIONS[0], "tuned"]
    assert whole.startswith(chat(client, QUESTIONS[0], max_tokens=7).choices[0].message.content)
    assert chat(client, QUESTIONS[0], max_completion_tokens=7).usage.completion_tokens == 7
    text = whole[8:11]
    for stop in (text, ["never", text]):
        choice = chat(client, QUESTIONS[0], stop=stop).choices[0]
        assert (
            choice.message.content == whole[: whole.index(text)] and choice.finish_reason == "stop"
        )
    draws = [
        [
            c.message.content
            for c in chat(client, QUESTIONS[0], n=3, seed=seed, temperature=1.0).choices
        ]
        for seed in (5, 5, 6)
    ]
    assert (
        draws[0] == draws[1] and len(set(draws[0])) == 3 and draws[0][1:] == draws[2][:2]
    )  # seed, seed + 1, ...
    raw = client.completions.create(model="base", prompt="黄芪", max_tokens=9)
    assert (
        raw.choices[0].text == answer_alone(plain, tokenizer, "黄芪", 9)
        and raw.usage.total_tokens == raw.usage.prompt_tokens + 9
    )
    assert [m.id for m in client.models.list()] == ["tuned", "base"]


def test_conversation_is_rendered_as_in_training(server, models):
    tokenizer, template, plain, _ = models
    parts = [{"type": "text", "text": "丙"}, {"type": "text", "text": "丁"}]
    for system, last, shown in (("system", "丙", "丙"), ("developer", parts, "丙\n丁")):
        messages = [
            {"role": system, "content": "简短"},
            {"role": "user", "content": "甲", "name": "bob"},
            {"role": "assistant", "content": "乙"},
            {"role": "user", "content": last},
        ]
        got = client_of(server).chat.completions.create(model="base", messages=messages)
        prompt = plain_prompt(template, f" <user>: 简短\n甲 <bot>: 乙 <user>: {shown}")
        assert got.choices[0].message.content == answer_alone(plain, tokenizer, prompt, 24)


def raw(server, data, wait=10, close=False):
    """Send bytes as they are; (status, headers, body) of what comes back."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=wait) as connection:
        for part in data if isinstance(data, list) else [data]:
            if isinstance(part, float):
                time.sleep(part)
            else:
                try:
                    connection.sendall(part)
                except ConnectionError:
                    break
        if close:
            connection.shutdown(socket.SHUT_WR)
        got = b""
        while piece := connection.recv(65536):
            got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode("latin-1"), body


def post(body, path="/v1/chat/completions", length=None, host="127.0.0.1:1", **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    head = "".join(
        f"{k.replace('_', '-')}: {v}\r\n"
        for k, v in {"Host": host, "Content-Length": length, **headers}.items()
        if v != ""
    )
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def ask(**more):
    """A good body, changed."""
    body = {
        "model": "tuned",
        "messages": [{"role": "user", "content": "你好"}],
        "max_tokens": 2,
        **more,
    }
    return {k: v for k, v in body.items() if v != "left out"}


def message(**more):
    return ask(messages=[{"role": "user", "content": "你好", **more}])


GET = "GET {} HTTP/1.1\r\nHost: localhost:1\r\n\r\n"
BAD = {
    "no JSON": (400, post(b"{'a': 1}")),
    "empty body": (400, post(b"")),
    "half an object": (400, post(b'{"model": "tuned"')),
    "two objects": (400, post(b"{} {}")),
    "an array": (400, post([])),
    "a number": (400, post(3)),
    "null": (400, post(b"null")),
    "bad UTF-8": (400, post(b'{"model": "\xff\xfe"}')),
    "UTF-16": (400, post('{"model": "tuned"}'.encode("utf-16"))),
    "deep": (400, post(b"[" * 100000)),
    "deep object": (400, post(b'{"a":' * 20000)),
    "long number": (400, post(b'{"seed": ' + b"9" * 5000 + b"}")),
    "lone surrogate": (400, post(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')),
    "surrogate name": (400, post(b'{"\\udfff": 1}')),
    "no messages": (400, post(ask(messages="left out"))),
    "empty messages": (400, post(ask(messages=[]))),
    "messages a text": (400, post(ask(messages="你好"))),
    "messages of texts": (400, post(ask(messages=["你好"]))),
    "messages of null": (400, post(ask(messages=[None]))),
    "no role": (400, post(ask(messages=[{"content": "你好"}]))),
    "role a number": (400, post(message(role=1))),
    "role unknown": (400, post(message(role="doctor"))),
    "role a list": (400, post(message(role=["user"]))),
    "content null": (400, post(message(content=None))),
    "content a number": (400, post(message(content=1))),
    "content a picture": (
        400,
        post(message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])),
    ),
    "tool calls": (400, post(message(tool_calls=[{"id": "1"}]))),
    "assistant last": (400, post(message(role="assistant"))),
    "two users": (400, post(ask(messages=[{"role": "user", "content": "a"}] * 2))),
    "system alone": (400, post(message(role="system"))),
    "prompt in a chat": (400, post(ask(prompt="a"))),
    "messages in a completion": (400, post(ask(prompt="a"), "/v1/completions")),
    "prompts none": (400, post({"prompt": []}, "/v1/completions")),
    "prompts empty lists": (400, post({"prompt": [[], []]}, "/v1/completions")),
    "prompts of null": (400, post({"prompt": [None]}, "/v1/completions")),
    "prompts mixed": (400, post({"prompt": ["a", 1]}, "/v1/completions")),
    "prompts an object": (400, post({"prompt": {"a": 1}}, "/v1/completions")),
    "prompts 65": (400, post({"prompt": ["a"] * 65}, "/v1/completions")),
    "prompts 9 of 8 answers": (400, post({"prompt": ["a"] * 9, "n": 8}, "/v1/completions")),
    "prompts deep": (400, post(b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "/v1/completions")),
    "ids negative": (400, post({"prompt": [-1]}, "/v1/completions")),
    "ids beyond": (400, post({"prompt": [10**9]}, "/v1/completions")),
    "ids true": (400, post({"prompt": [True, 5]}, "/v1/completions")),
    "ids floats": (400, post({"prompt": [1.0, 5.0]}, "/v1/completions")),
    "echo a number": (400, post({"prompt": "a", "echo": 2}, "/v1/completions")),
    "prompt missing": (400, post({}, "/v1/completions")),
    "prompt a number": (400, post({"prompt": 1}, "/v1/completions")),
    "model unknown": (404, post(ask(model="gpt-4o"))),
    "model a list": (400, post(ask(model=["tuned"]))),
    "model a path": (404, post(ask(model="../tuned"))),
    "temperature negative": (400, post(ask(temperature=-0.1))),
    "temperature a text": (400, post(ask(temperature="1"))),
    "temperature NaN": (
        400,
        post(b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}'),
    ),
    "temperature 1e999": (
        400,
        post(b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}'),
    ),
    "temperature true": (400, post(ask(temperature=True))),
    "top_p 0": (400, post(ask(top_p=0))),
    "top_p 2": (400, post(ask(top_p=2))),
    "top_k negative": (400, post(ask(top_k=-1))),
    "top_k 1.5": (400, post(ask(top_k=1.5))),
    "min_p -1": (400, post(ask(min_p=-1))),
    "repetition_penalty 0": (400, post(ask(repetition_penalty=0))),
    "no_repeat_ngram_size -1": (400, post(ask(no_repeat_ngram_size=-1))),
    "max_tokens 0": (400, post(ask(max_tokens=0))),
    "max_tokens negative": (400, post(ask(max_tokens=-5))),
    "max_tokens a float": (400, post(ask(max_tokens=2.5))),
    "max_tokens true": (400, post(ask(max_tokens=True))),
    "max_tokens huge": (400, post(ask(max_tokens=10**12))),
    "max_completion_tokens 0": (400, post(ask(max_completion_tokens=0))),
    "long question": (400, post(message(content="黄" * 1000))),
    "n 0": (400, post(ask(n=0))),
    "n -1": (400, post(ask(n=-1))),
    "n 1000": (400, post(ask(n=1000))),
    "n a text": (400, post(ask(n="2"))),
    "seed a float": (400, post(ask(seed=0.5))),
    "seed huge": (400, post(ask(seed=2**63))),
    "stop a number": (400, post(ask(stop=1))),
    "stop of numbers": (400, post(ask(stop=[1]))),
    "stop an empty text": (400, post(ask(stop=[""]))),
    "stop of 1000": (400, post(ask(stop=["a"] * 1000))),
    "stream a text": (400, post(ask(stream="yes"))),
    "stream a number": (400, post(ask(stream=1))),
    "stream_options a list": (400, post(ask(stream=True, stream_options=[1]))),
    "stream_options unknown": (
        400,
        post(ask(stream=True, stream_options={"include_obfuscation": True})),
    ),
    "tools": (400, post(ask(tools=[{"type": "function"}]))),
    "response_format": (400, post(ask(response_format={"type": "json_object"}))),
    "logprobs 21": (400, post({"prompt": "a", "logprobs": 21}, "/v1/completions")),
    "logprobs a text": (400, post(ask(logprobs="yes"))),
    "top_logprobs 21": (400, post(ask(logprobs=True, top_logprobs=21))),
    "top_logprobs alone": (400, post(ask(top_logprobs=2))),
    "logit_bias": (400, post(ask(logit_bias={"5": 100}))),
    "frequency_penalty": (400, post(ask(frequency_penalty=0.5))),
    "num_beams": (400, post(ask(num_beams=1))),
    "best_of": (400, post({"prompt": "a", "best_of": 4}, "/v1/completions")),
    "dunder": (400, post(ask(__class__="x"))),
    "temperature 10**20": (400, post(ask(temperature=10**20))),
    "temperature 1e-40": (400, post(ask(temperature=1e-40))),
    "repetition_penalty 10**20": (400, post(ask(repetition_penalty=10**20))),
    "repetition_penalty 1e-300": (400, post(ask(repetition_penalty=1e-300))),
    "stop of 401 characters": (400, post(ask(stop="药" * 401))),
    "tool_choice": (400, post(ask(tool_choice="required"))),
    "model a path of models": (404, GET.format("/v1/models/../tuned").encode()),
    "model of models unknown": (404, GET.format("/v1/models/gpt-4o").encode()),
    "no model of models": (404, GET.format("/v1/models/").encode()),
    "POST to a model": (405, post({}, "/v1/models/tuned")),
    "text part a number": (400, post(message(content=[{"type": "text", "text": 1}]))),
    "no parts": (400, post(message(content=[]))),
    "part of another type": (
        400,
        post(message(content=[{"type": "image_url", "image_url": {}, "text": "a"}])),
    ),
    "parts of texts": (400, post(message(content=["a"]))),
    "developer late": (
        400,
        post(
            ask(messages=[{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}])
        ),
    ),
    "huge body": (413, post(b"x" * 300000)),
    "huge body promised": (413, post(b"{}", length=10**12)),
    "length of 5000 digits": (413, post(b"{}", length="9" * 5000)),
    "length negative": (411, post(b"{}", length=-1)),
    "length a word": (411, post(b"{}", length="ten")),
    "length in other digits": (411, post(b"{}", length="\xb2")),
    "no length": (411, post(b"", length="")),
    "chunked with a length": (400, post(b"{}", Transfer_Encoding="chunked")),
    "chunks without a size": (400, post(b"x\r\n{}", Transfer_Encoding="chunked", length="")),
    "chunk negative": (400, post(b"-2\r\n{}", Transfer_Encoding="chunked", length="")),
    "chunk with 1_0": (400, post(b"1_0\r\n{}", Transfer_Encoding="chunked", length="")),
    "chunk huge": (413, post(b"ffffffff\r\n", Transfer_Encoding="chunked", length="")),
    "chunks huge": (
        413,
        post(b"8000\r\n" + b"x" * 0x8000 + b"\r\n", length="", Transfer_Encoding="chunked")
        + (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 8,
    ),
    "gzip coding": (411, post(b"{}", Transfer_Encoding="gzip", length="")),
    "length doubled": (400, post(b"{}", Content_length="2")),
    "lengths that differ": (400, post(b"{}", content_length="20")),
    "bare CR": (400, b"GET /health HTTP/1.1\r\nHost: localhost\r\na: b\rc\r\n\r\n"),
    "folded line": (400, b"GET /health HTTP/1.1\r\nHost: localhost\r\n a: b\r\n\r\n"),
    "space before colon": (400, b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n"),
    "header without colon": (400, b"GET /health HTTP/1.1\r\nHost\r\n\r\n"),
    "body short": (408, post(b"{}", length=50)),
    "body slow": (408, [post(b"", length=50)] + [b" ", 0.1] * 30),
    "path unknown": (404, post({}, "/v1/embeddings")),
    "path up": (404, GET.format("/../../../etc/passwd").encode()),
    "path up encoded": (404, GET.format("/%2e%2e/%2e%2e/etc/passwd").encode()),
    "path doubled": (404, GET.format("//v1//models").encode()),
    "path of a file": (404, GET.format("/data/page.html").encode()),
    "path absolute": (404, GET.format("http://localhost/v1/models").encode()),
    "path of 70,000": (431, GET.format("/" + "a" * 70000).encode()),
    "path with NUL": (404, GET.format("/\0").encode()),
    "POST to models": (405, post({}, "/v1/models")),
    "GET of chat": (405, GET.format("/v1/chat/completions").encode()),
    "DELETE": (405, GET.format("/v1/models").replace("GET", "DELETE").encode()),
    "BREW": (405, GET.format("/v1/models").replace("GET", "BREW").encode()),
    "no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    "HTTP/9": (400, b"GET / HTTP/9.9\r\n\r\n"),
    "3000 headers": (431, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 3000 + b"\r\n"),
    "header of 70,000": (431, b"GET / HTTP/1.1\r\na: " + b"b" * 70000 + b"\r\n\r\n"),
    "other site's page": (403, post(ask(), Origin="https://evil.example")),
    "opaque origin": (403, post(ask(), Origin="null")),
    "other name for localhost": (403, post(ask(), host="evil.example:8000")),
    "no host": (403, post(ask(), host="")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_refused_in_openais_form(server, name):
    status, data = BAD[name]
    got, head, body = raw(server, data)
    error = json.loads(body)["error"]
    assert got == status, error
    assert (
        set(error) == {"message", "type", "param", "code"}
        and error["message"]
        and "Traceback" not in error["message"]
    )
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert (
        "application/json" in head
        and "Server: TCM-LLM" in head
        and "Python" not in head
        and "<class" not in error["message"]
    )
    assert (status == 405) == ("\r\nAllow: " in head)


def test_refusals_name_the_field(server):
    client = client_of(server)
    for field, value in (
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("temperature", -1),
        ("n", 0),
        ("max_tokens", 0),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, "你好", **{field: value})
        assert field in caught.value.body["message"] and caught.value.body["param"] == field
    with pytest.raises(openai.NotFoundError, match="tuned base"):
        chat(client, "你好", "gpt-4o")


@pytest.mark.parametrize(
    "fields",
    [
        {
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logprobs": False,
            "tools": [],
            "user": "a",
            "n": 1,
            "stream": False,
        },
        {"response_format": {"type": "text"}, "tool_choice": "none"},
        {"best_of": 1, "prompt": "a", "messages": "left out"},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"parallel_tool_calls": True, "logprobs": False, "top_logprobs": 0},
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"max_new_tokens": False, "length_penalty": 0, "eos_id": ""},
    ],
)
def test_what_asks_for_nothing_is_let_pass(server, fields):
    """OpenAI's defaults, given; also under the names of settings that clients have no say in."""
    got, _, body = raw(
        server,
        post(ask(**fields), "/v1/completions" if "prompt" in fields else "/v1/chat/completions"),
    )
    assert got == 200 and json.loads(body)["usage"]["completion_tokens"] == 2, body


def test_head_allow_host_and_models(server):
    """HEAD is GET without its body; a 405 says what is allowed; a host's name has no case; one
    model by its name."""
    for path in ("/", "/health", "/v1/models", "/nowhere"):
        got, want = (
            raw(server, GET.format(path).replace("GET", method).encode())
            for method in ("HEAD", "GET")
        )

        def size(head):
            return re.search(r"Content-Length: (\d+)", head)[1]

        assert got[0] == want[0] and got[2] == b"" and size(got[1]) == size(want[1])
    for data, allowed in (
        (post({}, "/v1/models"), "GET, HEAD, OPTIONS"),
        (GET.format("/v1/completions").encode(), "POST, OPTIONS"),
        (GET.format("/v1/completions").replace("GET", "HEAD").encode(), "POST, OPTIONS"),
    ):
        status, head, _ = raw(server, data)
        assert status == 405 and f"Allow: {allowed}\r\n" in head
    for host, origin, status in (
        ("LOCALHOST:8101", "", 200),
        ("LocalHost", "http://LOCALHOST", 200),
        ("LOCALHOST", "http://evil", 403),
    ):
        more = f"Host: {host}\r\n" + (origin and f"Origin: {origin}\r\n")
        assert raw(server, f"GET /v1/models HTTP/1.1\r\n{more}\r\n".encode())[0] == status
    card = client_of(server).models.retrieve("tuned")
    assert (
        card.id == "tuned"
        and card.defaults["max_new_tokens"] == 24
        and card.defaults["top_p"] == 0.75
    )
    with pytest.raises(openai.NotFoundError, match="tuned base"):
        client_of(server).models.retrieve("tune")


def test_client_that_ends_early_is_told(server):
    assert raw(server, post(b"{", length=50), close=True)[0] == 400


def test_slow_headers_are_cut_off(server):
    """A byte now and then: the answer comes at the deadline, not behind the last byte."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        connection.setblocking(False)
        got = b""
        while not got and time.monotonic() - started < 30:
            time.sleep(0.1)
            connection.send(b"a")
            with contextlib.suppress(BlockingIOError):
                got = connection.recv(100)
    assert got.startswith(b"HTTP/1.1 408 ") and time.monotonic() - started > 0.9


def test_the_command_line_allows_sites(monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate.py", "--serve", "--allow_origin", "https://a", "b"])
    assert G.parse_options()[2].allow_origin == ("https://a", "b")


@pytest.mark.parametrize(
    "data, status",
    [
        (b"G /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 405),  # a part of GET
        (b"S /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 405),  # of OPTIONS
    ],
)
def test_a_part_of_a_method_is_none(server, data, status):
    assert raw(server, data)[0] == status


def test_the_last_seeds_are_answered_or_refused(server):
    for seed in (2**63 - 1, 2**63 - 64, -(2**63)):
        assert raw(server, post(ask(seed=seed, n=2, temperature=1)))[0] in (200, 400)


def test_settings_that_no_client_could_send_are_refused_at_the_start(models):
    with pytest.raises(ValueError, match="4 texts"):
        start(models, stop=tuple("abcde"))


def test_a_byte_of_a_character_has_no_bytes_of_its_own(models):
    """Joined, they would be another text's."""
    tokenizer = models[0]
    ids = tokenizer.encode("鱻")[-3:]
    assert tokenizer.decode(ids) == "鱻"
    request = G.Request(ids, G.Decoding(), logprobs=[[(id, -1.0)] for id in ids])
    content = G.show_logprobs(tokenizer, request, 0, True)["content"]
    assert [each["bytes"] for each in content] == [None] * 3


def test_connections_without_a_request_take_no_place(models, offline):
    """40 that drip where 20 are waited for: the oldest are told that others want their places, an
    honest client is answered, and headers are not kept beyond 16 KiB."""
    server, stop = start(models)
    server.patience, server.seconds = 20, 60
    address = ("127.0.0.1", port_of(server))
    try:
        drips = [socket.create_connection(address, timeout=60) for _ in range(40)]
        for drip in drips:
            drip.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n")
        answer = chat(client_of(server), QUESTIONS[0])
        assert answer.choices[0].message.content == offline[QUESTIONS[0], "tuned"]
        head, body = drips[0].recv(65536).split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in head
        assert json.loads(body)["error"]["type"] == "server_error"
        # The newest one goes on, with a header too many.
        drips[-1].sendall(b"a: " + b"b" * 20000)
        assert drips[-1].recv(65536).startswith(b"HTTP/1.1 431 ")
    finally:
        for drip in drips:
            drip.close()
        stop()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_under_way_is_no_connection_that_waits(models, offline, stream):
    """40 others come while it is made, where 20 are waited for: it comes whole."""
    server, stop = start(models)
    server.patience, server.seconds = 20, 60
    address, step, others = ("127.0.0.1", port_of(server)), server.batch.step, []

    def step_when_they_have_come():
        while len(others) < 40:
            others.append(socket.create_connection(address, timeout=60))
        step()

    server.batch.step = step_when_they_have_come
    try:
        got = chat(client_of(server), QUESTIONS[0], stream=stream)
        parts = [c.choices[0].delta for c in got] if stream else [got.choices[0].message]
        assert "".join(part.content for part in parts) == offline[QUESTIONS[0], "tuned"]
    finally:
        for other in others:
            other.close()
        stop()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_sends_no_more_gets_its_answer(server, offline, stream):
    """`nc -N` and old HTTP/1.0 clients close their sending side behind the request."""
    body = ask(messages=[{"role": "user", "content": QUESTIONS[0]}], max_tokens=24, stream=stream)
    status, head, got = raw(server, post(body), close=True)
    assert status == 200 and head.count("HTTP/1.1") == 1
    if stream:
        events = [json.loads(e[6:]) for e in got.decode().split("\n\n")[:-2]]
        text = "".join(e["choices"][0]["delta"]["content"] for e in events)
    else:
        text = json.loads(got)["choices"][0]["message"]["content"]
    assert text == offline[QUESTIONS[0], "tuned"]


def test_chunked_bodies_are_read(server):
    data = json.dumps({"prompt": "黄芪", "max_tokens": 3}).encode()
    chunks = [b"%x;name=value\r\n%b\r\n" % (len(part), part) for part in (data[:7], data[7:])]
    end = b"0\r\nTrailer: x\r\n\r\n"
    for parts in (chunks + [end], [chunks[0], 0.2, chunks[1][:9], 0.2, chunks[1][9:], end]):
        first = post(b"", "/v1/completions", length="", Transfer_Encoding="chunked")
        status, _, body = raw(server, [first, *parts])
        assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 3


def test_an_answer_is_as_long_as_the_room_behind_its_prompt(server):
    """Clients ask for 2,048 tokens or more as a matter of course (build_data.py does)."""
    answer = chat(client_of(server), QUESTIONS[0], max_tokens=100_000)
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 160


def test_build_data_asks_this_server_with_its_defaults(server, tmp_path, monkeypatch):
    """It wants JSON, which is refused by name and left out, and 2,048 tokens."""
    monkeypatch.setenv("OPENAI_API_KEY", "any text")
    url = f"http://127.0.0.1:{port_of(server)}/v1"
    client = D.Client(tmp_path / "r.jsonl", client_options(url, "--model", "tuned"))
    client.ask({"a": [{"role": "user", "content": QUESTIONS[0]}]})
    client.end()
    assert client.replies["a"]["finish_reason"] == "length"
    assert client.params.keys() == {"temperature", "max_completion_tokens", "model"}


def test_large_bodies_are_read_between_steps(models):
    """While an answer is made, or waits for its first step, one ends between any two bodies of
    numbers."""
    server, stop = start(models, positions=4000)
    events = []

    step, loads = server.batch.step, json.loads

    def slow_at_first():
        time.sleep(0.5 * (not events))
        step()
        events.append("step")

    patch = pytest.MonkeyPatch()
    patch.setattr(server.batch, "step", slow_at_first)
    patch.setattr(
        G.json, "loads", lambda t: (len(t) > 16384 and events.append("body"), loads(t))[1]
    )
    numbers = post(b'{"messages": [' + b"1," * 50000 + b"1]}")
    try:
        stream = client_of(server).completions.create(
            model="base", prompt="黄芪", max_tokens=3900, stream=True
        )
        next(stream)
        threads = [threading.Thread(target=raw, args=(server, numbers, 60)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert events.count("body") == 12
        assert not re.search("body (body )", " ".join(events) + " ")
        stream.close()
    finally:
        patch.undo()
        stop()


def test_other_sites_may_ask_where_they_are_allowed(models):
    """A browser asks first, without the key, then asks with it; all responses name the site."""
    server, stop = start(models, allow_origin=("https://Chat.example",), api_key="secret-key")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    try:
        for origin, wanted in (("https://chat.example", 200), ("https://evil.example", 403)):
            first = post(b"", Origin=origin, **asked).replace(b"POST", b"OPTIONS", 1)
            status, head, body = raw(server, first)
            assert status == wanted
            allowed = f"Access-Control-Allow-Origin: {origin}\r\n" in head
            assert allowed == (wanted == 200) and ("Vary: Origin" in head) == allowed
            if allowed:
                names = re.search(r"Access-Control-Allow-Headers: (.*)\r\n", head)[1].split(", ")
                assert {"*", "Authorization"} <= {*names} and body == b""
        for key, wanted in (("secret-key", 200), ("wrong", 401)):
            good = post(ask(), Origin="https://chat.example", Authorization=f"Bearer {key}")
            status, head, _ = raw(server, good)
            assert status == wanted and "Access-Control-Allow-Origin: https://chat" in head
    finally:
        stop()


def test_all_sites_may_ask_where_all_are_allowed(models):
    """--allow_origin *, as --help has it; to be asked under another name needs a key still."""
    server, stop = start(models, allow_origin=("*",))
    try:
        for data, wanted in (
            (post(ask(), Origin="https://any.example"), 200),
            (post(ask()), 200),
            (post(ask(), Origin="https://any.example", host="any.example"), 403),
        ):
            status, head, _ = raw(server, data)
            assert status == wanted
            named = "Access-Control-Allow-Origin: https://any.example\r\n" in head
            assert named == (wanted == 200 and b"Origin" in data)
    finally:
        stop()


@pytest.mark.parametrize(
    "data, words",
    [
        (post(ask(), host="evil.example:8000"), ["evil.example", "--api_key"]),
        (post(ask(), Origin="https://chat.example"), ["https://chat.example", "--allow_origin"]),
        (
            post(message(content=[{"type": "image_url", "image_url": {"url": "data:"}}])),
            ["image_url", "text"],
        ),
        (post(ask(response_format={"type": "json_object"})), ["response_format", "json_object"]),
        (
            post(ask(response_format={"type": "json_schema", "json_schema": {}})),
            ["response_format", "json_schema"],
        ),
    ],
)
def test_a_refusal_says_what_to_do(server, data, words):
    _, _, body = raw(server, data)
    assert all(word in json.loads(body)["error"]["message"] for word in words), body


def logprobs_alone(model, ids):
    """(T, V) log-probabilities of what follows each of ids, by one plain forward."""
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].double().log_softmax(-1)


def test_logprobs_are_those_of_a_plain_forward(server, models):
    """Prompts as texts and as ids in one request, echoed: each id's log-probability and the
    likeliest ids'; the same of an answer alone, and of a chat."""
    client, (tokenizer, template, plain, _) = client_of(server), models
    texts = ["黄芪有", "的功效是"]
    ids = [tokenizer.encode(text, bos=True) for text in texts]
    for prompts in (texts, ids):
        got = client.completions.create(
            model="base", prompt=prompts, max_tokens=3, echo=True, logprobs=3
        )
        assert [c.index for c in got.choices] == [0, 1]
        assert got.usage.prompt_tokens == sum(map(len, ids))
        for choice, prompt in zip(got.choices, ids):
            answer = list(G.generate_ids(plain, prompt, 3))
            wanted = logprobs_alone(plain, prompt + answer)
            noted = choice.logprobs
            assert noted.token_logprobs[0] is None and not noted.top_logprobs[0]
            own = [wanted[t, id].item() for t, id in enumerate((prompt + answer)[1:])]
            assert noted.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
            for t, top in enumerate(noted.top_logprobs[1:]):
                best = wanted[t].topk(3).values.tolist()
                assert max(top.values()) == pytest.approx(best[0], abs=1e-4)
                assert min(best) - 1e-4 < min(top.values())
            assert choice.text == tokenizer.decode(prompt) + G.visible(tokenizer.decode(answer))
    alone = client.completions.create(model="base", prompt=ids[0], max_tokens=3, logprobs=0)
    noted = got.choices[0].logprobs.token_logprobs[-3:]
    assert alone.choices[0].logprobs.token_logprobs == pytest.approx(noted, abs=1e-4)

    prompt = tokenizer.encode(plain_prompt(template, "你好"), bos=True)
    answer = list(G.generate_ids(plain, prompt, 4))
    wanted = logprobs_alone(plain, prompt + answer)[len(prompt) - 1 :]
    for stream in (False, True):
        got = chat(
            client, "你好", "base", max_tokens=4, logprobs=True, top_logprobs=2, stream=stream
        )
        choices = [c.choices[0] for c in got] if stream else got.choices
        [content] = [c.logprobs.content for c in choices if c.logprobs]
        assert len(content) == 4
        for noted, id, row in zip(content, answer, wanted):
            assert noted.logprob == pytest.approx(row[id].item(), abs=1e-4)
            best = [each.logprob for each in noted.top_logprobs]
            assert best == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
            assert "\ufffd" in noted.token or bytes(noted.bytes).decode() == noted.token


def test_a_server_with_many_open_files_answers(server):
    """Numbers above 1,023, which select() has no place for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1300:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with open(os.devnull) as null:
        copies = [os.dup(null.fileno()) for _ in range(1100)]
        try:
            assert raw(server, post(ask()))[0] == 200
        finally:
            for copy in copies:
                os.close(copy)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_full_line_is_a_429_and_leaving_frees_places(models):
    """Three rows and four that wait: what does not fit is sent away, and clients that leave make
    room for others."""
    server, stop = start(models, limit=4, positions=4000)
    endless = json.dumps({**ask(), "max_tokens": 3900, "stream": True}).encode()
    connections = []
    try:
        for _ in range(7):
            connections.append(socket.create_connection(("127.0.0.1", port_of(server))))
            connections[-1].sendall(post(endless))
            time.sleep(0.2)  # so that the first three are in their places
        status, head, body = raw(server, post(ask()))
        assert (
            status == 429
            and "Retry-After" in head
            and json.loads(body)["error"]["type"] == "rate_limit_error"
        )
        assert len(server.batch.rows) == 3 and len(server.batch.waiting) == 4
        for connection in connections:  # streaming or waiting, they leave without a word
            connection.close()
        for _ in range(50):  # one that waits is missed within a second
            if (status := raw(server, post(ask()))[0]) == 200:
                break
            time.sleep(0.1)
        assert status == 200 and idle(server)
    finally:
        stop()


@pytest.mark.parametrize("extra", [b"", b"\r\n", b"x" * 70000])
def test_a_client_that_leaves_is_missed(models, extra):
    """Also one that sent more than its body."""
    server, stop = start(models, positions=8000)
    try:
        with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
            connection.sendall(post({**ask(), "max_tokens": 7900}))
            while not server.batch.rows:
                time.sleep(0.01)
            connection.sendall(extra)
        for _ in range(40):
            if not server.batch.rows:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("ids are made for nobody")
    finally:
        stop()


def test_a_refused_body_is_read_until_the_deadline(server):
    """A client that goes on sending what was refused keeps its thread no longer than one that is
    slow."""
    started = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) as connection,
        pytest.raises(OSError),
    ):
        connection.sendall(post(b"", length=999999999))
        while time.monotonic() - started < 6:
            connection.sendall(b"x" * 65536)
    assert time.monotonic() - started < 4


def test_waiting_requests_nobody_waits_for_are_not_begun(models, monkeypatch):
    begun, admit = [], G.Batch.admit
    monkeypatch.setattr(G.Batch, "admit", lambda self, r: (begun.append(r), admit(self, r)))
    server, stop = start(models, rows=1)
    stop()
    server.stopping = False
    requests = [G.Request([1, 5, 6], G.Decoding(max_new_tokens=2)) for _ in range(9)]
    for request in requests:
        server.submit([request])
    for request in requests[1:]:
        request.cancelled = True
    while not requests[0].finish_reason:
        asyncio.run(server.step())
    assert begun == requests[:1] and not server.batch.waiting


def test_who_has_left_the_line_takes_no_place_in_it(models):
    """Nor does who asks while rows are free: of so many clients that ask at once none is refused,
    until as many wait as may beside those that have rows."""
    server, stop = start(models, rows=8)
    stop()
    server.stopping = False
    many = server.batch.size + server.limit
    requests = [G.Request([1, 5, 6], G.Decoding(max_new_tokens=2)) for _ in range(many + 1)]
    server.submit(requests[:-1])
    with pytest.raises(G.Refused):
        server.submit(requests[-1:])
    server.cancel(requests[3:4])
    server.submit(requests[-1:])


def test_key_is_wanted_where_it_is_set(models):
    server, stop = start(models, api_key="secret 钥匙")
    try:
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer "},
        ):
            status, _, body = raw(server, post(ask(), **given))
            assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
        assert (
            raw(server, b"GET /v1/models HTTP/1.1\r\n\r\n")[0] == 401
            and raw(server, b"GET /health HTTP/1.1\r\n\r\n")[0] == 200
        )
        head = post(ask()).replace(
            b"\r\n\r\n", "\r\nAuthorization: Bearer secret 钥匙\r\n\r\n".encode(), 1
        )
        assert raw(server, head)[0] == 200
    finally:
        stop()


def test_model_that_fails_is_told_and_the_server_goes_on(models, offline):
    server, stop = start(models)
    try:
        for name in ("admit", "logits"):  # no memory for a prompt, no memory for a step
            patch = pytest.MonkeyPatch()
            patch.setattr(
                server.batch, "forward" if name == "logits" else name, lambda *more: 1 / 0
            )
            with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
                chat(client_of(server), QUESTIONS[0])
            with pytest.raises(openai.APIError, match="ZeroDivisionError"):
                list(chat(client_of(server), QUESTIONS[0], stream=True))
            patch.undo()
        assert (
            chat(client_of(server), QUESTIONS[0]).choices[0].message.content
            == offline[QUESTIONS[0], "tuned"]
        )
    finally:
        stop()


def test_page_comes_with_a_policy_that_fits_it(server):
    """The page is one file that loads nothing, and its policy holds the hash of each of its two
    blocks; what a page cannot say of itself is a header."""
    status, head, body = raw(server, GET.format("/").encode())
    page = body.decode()
    assert status == 200 and body == (ROOT / "data" / "page.html").read_bytes()
    assert "frame-ancestors 'none'" in head
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page, re.S)
    assert page.index(policy[0]) < page.index("<style") and page.count("http-equiv") == 1
    assert "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for tag in ("style", "script"):
        text = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1] and page.count(f"<{tag}") == 1
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|https?://|style=|"
        r" on\w+=",
        page,
    )
    assert "不构成医疗建议" in page and "no medical advice" in page


def serve(base, *args, **environment):
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "generate.py",
            "--base_model",
            base,
            "--use_lora=False",
            "--serve",
            "--port",
            "0",
            "--dtype",
            "fp32",
            *args,
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    line = process.stderr.readline()
    found = re.match(r"http://127\.0\.0\.1:(\d+)/", line)
    assert found, line
    return process, int(found[1])


def test_sigterm_lets_answers_finish(base):
    """The command itself: the answer under way comes whole, a new request is refused, the process
    ends with 0."""
    process, port = serve(
        base, "--max_new_tokens", "1500"
    )  # a second of work, also on a fast machine
    try:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=60
        ) as client:
            stream = client.completions.create(model="base", prompt="黄芪", stream=True)
            next(stream)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            with pytest.raises(openai.InternalServerError, match="stopping"):
                client.completions.create(model="base", prompt="黄芪", max_tokens=1)
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(15) == 0
    finally:
        process.kill()


def test_a_log_that_nobody_reads_stops_nothing(base):
    """Its pipe fills up, then its reader is gone: answers come."""
    process, port = serve(base)
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    health = GET.format("/health?" + "a" * 150).encode()
    try:
        for closed in (False, True):
            if closed:
                process.stderr.close()
            for _ in range(40):
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    connection.sendall(health)
                    assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_log_on_a_full_disk_stops_nothing(base, tmp_path):
    """A limit on the size of files takes the part of the disk."""
    health, size = GET.format("/health?" + "a" * 150).encode(), 3000
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "generate.py", "--base_model", base, "--use_lora=False"]
            + ["--serve", "--port", "0", "--dtype", "fp32"],
            stderr=log,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )
    try:
        while not (found := re.search(r"127\.0\.0\.1:(\d+)/", (tmp_path / "log").read_text())):
            assert process.poll() is None
            time.sleep(0.1)
        for _ in range(40):
            with socket.create_connection(("127.0.0.1", int(found[1])), timeout=60) as connection:
                connection.sendall(health)
                assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        assert (tmp_path / "log").stat().st_size == size
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_open_host_without_a_key_is_refused(base):
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", "--base_model", base, "--use_lora=False", "--serve"],
        env={**os.environ, "API_HOST": "0.0.0.0", "API_KEY": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "api_key" in done.stderr and len(done.stderr.splitlines()) == 1
