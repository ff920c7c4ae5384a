"""Thousands of altered requests to the server, and a hundred altered replies to the client: each
gets an HTTP answer, or costs one reply; seeded, so that a failure comes again."""

import asyncio
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import build_data as D
import generate as G

import pytest
from fake_openai import completion
from scripted import listening
from test_client import jobs, options
from test_server import ask, idle, models, port_of, post, start  # noqa: F401 (a fixture)

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\x00\x1b[2J\r\n",
    "\ud800",
    "黄" * 3000,
    "<script>",
    [],
    [[]],
    [None],
    [1, 2, 3],
    ["a", 1],
    {},
    {"type": "text"},
    {"type": "text", "text": "你好"},
    {"role": "user", "content": "你好"},
    [{"role": "user", "content": "你好"}],
    {"a": {"b": [1]}},
]
NAMES = (
    *G.FIELDS,
    *G.PLAIN,
    *G.INERT,
    *("prompt", "tools", "functions", "logit_bias", "suffix", "audio", "stream", "__proto__"),
)


def alter(dice, value, depth=0):
    """A JSON value with one thing in it changed."""
    if depth < 4 and isinstance(value, dict) and value and dice.random() < 0.8:
        name = dice.choice([*value])
        changed = {**value, name: alter(dice, value[name], depth + 1)}
        if dice.random() < 0.15:
            del changed[name]
        return changed
    if depth < 4 and isinstance(value, list) and value and dice.random() < 0.8:
        i = dice.randrange(len(value))
        return [*value[:i], alter(dice, value[i], depth + 1), *value[i + dice.randrange(2) :]]
    return dice.choice(ODD)


def spoil(dice, data):
    """Bytes with some changed, left out, doubled or added."""
    for _ in range(dice.randrange(1, 4)):
        i, j = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        j = min(j, i + dice.choice((1, 2, 30)))
        bits = (
            b"",
            data[i:j] * 2,
            bytes([dice.randrange(256)]),
            b"\r",
            b"\n",
            b"\0",
            b"\r\n",
            b":",
        )
        data = data[:i] + dice.choice(bits) + data[j:]
    return data


def altered_request(seed):
    """One request: a good one of several kinds, its object, its bytes or its head altered."""
    dice = random.Random(seed)
    chat = dice.random() < 0.6
    body = ask() if chat else {"prompt": ["黄芪", "甘草"], "max_tokens": 2, "logprobs": 1}
    for _ in range(dice.randrange(4)):
        body[dice.choice(NAMES)] = dice.choice(ODD)
    if dice.random() < 0.5:
        body = alter(dice, body)
    if isinstance(body, dict) and dice.random() < 0.9:
        body["max_tokens"] = 2  # or an answer takes long
    path = "/v1/chat/completions" if chat else "/v1/completions"
    more = {}
    if dice.random() < 0.3:
        names = ("Content-Length", "Transfer-Encoding", "Host", "Origin", "Expect", "Cookie", "a")
        values = ("chunked", "5", "-5", "1e3", "gzip", "evil", "null", "", "\xff", "x" * 20000)
        more = {dice.choice(names): dice.choice(values) for _ in range(2)}
    request = post(body, path, **more)
    if dice.random() < 0.4:
        request = spoil(dice, request)
    if dice.random() < 0.1:
        request = request[: dice.randrange(len(request))]
    return request


def send(port, data):
    """(what came back, seconds)."""
    started, got = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                got += piece
        except ConnectionError:
            pass
    return got, time.monotonic() - started


@pytest.mark.parametrize(
    "seeds",
    [range(120), pytest.param(range(120, 3000), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_altered_requests_are_answered(models, monkeypatch, seeds):  # noqa: F811
    """Every one gets a response of HTTP; what is refused is the client's fault, and says so."""
    logged = []
    monkeypatch.setattr(G, "log_if_read", logged.append)
    server, stop = start(models, rows=8)
    counts = {}
    try:
        with ThreadPoolExecutor(24) as pool:
            sent = pool.map(lambda seed: send(port_of(server), altered_request(seed)), seeds)
            for seed, (got, seconds) in zip(seeds, sent):
                head, _, body = got.partition(b"\r\n\r\n")
                status = int(head.split(b" ")[1])
                counts[status] = counts.get(status, 0) + 1
                assert status in (200, 400, 401, 403, 404, 405, 408, 411, 413, 429, 431, 503), seed
                # Of an unreadable request it is not known that it was a HEAD.
                if status != 200 and body:
                    error = json.loads(body)["error"]
                    assert error["message"] and "Traceback" not in error["message"], seed
                assert seconds < 30, seed
        assert idle(server)
        good = send(port_of(server), post(ask()))[0]
        assert good.startswith(b"HTTP/1.1 200") and counts[200] and counts[400]
    finally:
        stop()
    assert not [text for text in logged if "Traceback" in text]


HEAD = b"Connection: close\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n"
OK = b"HTTP/1.1 %d Some words\r\n" + HEAD


def altered_reply(seed):
    """Bytes of a response: a completion or an error, its object, its bytes or its head altered."""
    dice = random.Random(seed)
    status = dice.choice((200, 200, 200, 400, 409, 422, 429, 500, 503, 204, 302, 999))
    value = completion('{"items": []}')
    if status != 200:
        value = {"error": {"message": "no", "type": "a", "param": None, "code": "b"}}
    for _ in range(dice.randrange(1, 4)):
        value = alter(dice, value)
    body = json.dumps(value).encode()
    body = dice.choice(
        (body, body, body, spoil(dice, body), b"[" * 100000, b"", b"\xff\xfe", b"9" * 5000)
    )
    kinds = (b"application/json", b"text/html", b"application/json; charset=utf-7", b"", b"x/\xff")
    more = dice.choice(
        (
            b"",
            b"Retry-After: nan\r\n",
            b"Retry-After: -5\r\n",
            b"Content-Encoding: gzip\r\n",
            b"Content-Encoding: br, zstd, x\r\n",
            b"Location: http://127.0.0.1:9/\r\n",
            b"Location: ://\r\n",
            b"a: " + b"b" * 50000 + b"\r\n",
        )
    )
    data = OK % (status, dice.choice(kinds), len(body), more) + body
    return spoil(dice, data) if dice.random() < 0.2 else data


def endpoint(reply):
    """`listening` to the prompt "...补气N": it answers with reply(N), and hangs up."""

    async def answer(reader, writer):
        data = b""
        while b'"model"' not in data:
            data += await reader.read(65536)
        number = int(data.decode("utf-8", "replace").split("补气")[1].split('"')[0])
        writer.write(reply(number))
        await writer.drain()
        writer.close()

    return listening(asyncio.start_server(answer, "127.0.0.1", 0))


@pytest.mark.parametrize(
    "seeds",
    [range(24), pytest.param(range(24, 124), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_altered_replies_cost_one_reply_each(tmp_path, monkeypatch, seeds):
    """Every second reply is altered: the others are kept, and the file can be read again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-4711")
    good = json.dumps(completion("{}")).encode()

    def reply(number):
        if number % 2:
            return altered_reply(seeds[number // 2])
        return OK % (200, b"application/json", len(good), b"") + good

    with endpoint(reply) as url:
        prices = ("--price_in", "1", "--price_out", "2", "--max_cost", "100")
        more = ("--retries", "0", "--timeout", "5", "--concurrency", "2", *prices)
        client = D.Client(tmp_path / "r.jsonl", options(url, *more))
        client.ask(jobs(2 * len(seeds)))
    assert client.stop is None
    assert {f"item {2 * i}" for i in range(len(seeds))} <= client.replies.keys()
    assert len(client.replies) + len(client.failed) == 2 * len(seeds)
    json.dumps(dict(client.replies), ensure_ascii=False).encode()
    assert client.spent >= 0 and client.spent + client.reserved <= 100
    kept = dict(client.replies)
    client.replies.file.close()
    again = D.Replies(tmp_path / "r.jsonl", read_only=True)
    assert again.keys() == kept.keys()
