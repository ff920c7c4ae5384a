"""A loopback HTTP server that speaks enough of OpenAI's protocol for the real client, with faults.

  python tests/fake_openai.py --faults '{"429": 0.1, "500": 0.05, "drop": 0.02, "broken": 0.05}'

It prints its address. What it saw is at /stats: requests, faults by name, and how often each prompt
was answered. Faults of transport (429, 500, drop, hang) are drawn for each request. Replies that
are "broken" or "empty" hang on the prompt alone, so that a run that is killed and started again
meets the same ones; a prompt that ends in an answer of the model and a complaint about it (a
repair) always gets a good reply.
"""

import argparse
import asyncio
import hashlib
import http.server
import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter

TRANSPORT = ("429", "500", "drop", "hang")
TASKS = [
    a + b
    for a in (
        "夜间",
        "清晨",
        "餐后",
        "运动后",
        "久坐时",
        "受凉后",
        "情绪激动时",
        "换季时",
        "值夜班后",
        "出差途中",
    )
    for b in (
        "反复头晕该怎样自我观察",
        "小腿抽筋可能与哪些因素有关",
        "怎样安排一周的清淡饮食",
        "测得血压偏高应当如何记录",
        "给老人写一份防跌倒提醒",
        "把这段病史改写成三句话的摘要",
        "哪些情形必须立刻去急诊",
        "向孩子解释为什么要打疫苗",
        "列出需要告诉医生的五件事",
        "比较热敷与冷敷各自的适用时机",
    )
]


def reply_to(messages):
    """The content of a good reply: for a prompt with facts ("- X的R：v、v"), five items that tell
    them; for the others, dialogues about the conclusion or new tasks."""
    prompt = "\n".join(m["content"] for m in messages)
    draw = random.Random(hashlib.sha256(prompt.encode()).digest())
    if "user" in prompt and "bot" in prompt:
        conclusion = re.search(r"结论：(.+)", prompt).group(1)
        parts = [p for p in re.split(r"[，。；]", conclusion) if p]
        turns = int(re.search(r"(\d) 轮", prompt).group(1))
        return {
            "items": [
                {
                    "user": f"第{i + 1}个问题，关于{parts[i % len(parts)][:6]}，研究怎么说？",
                    "bot": f"研究指出，{parts[i % len(parts)]}，具体情况仍要由医生判断。",
                }
                for i in range(turns)
            ]
        }
    found = re.findall(r"^- (.+?)的([^的：]+)：(.+)$", prompt, re.M)
    if found:
        items = []
        for i in range(5):
            entity, relation, values = found[i % len(found)]
            ask = draw.choice(["请问", "想了解一下，", "我想问，", "医生您好，", "考试复习："])
            items.append(
                {
                    "instruction": f"{ask}{entity}的{relation}是什么？（{i + 1}）"
                    if i >= len(found)
                    else f"{ask}{entity}的{relation}是什么？",
                    "output": f"{entity}的{relation}是{values}。"
                    "以上内容供学习，具体情况请由医生当面判断。",
                }
            )
        return {"items": items}
    return {
        "items": [
            {
                "instruction": f"{draw.choice(TASKS)}？情形{draw.randrange(10**6)}",
                "input": "",
                "output": "可以先记录发生的时间、持续多久和伴随的不适，"
                "再带着记录去门诊请医生判断。",
            }
            for _ in range(5)
        ]
    }


def verdict_to(messages, taste):
    """What a judge replies, None if the prompt is none for a judge: word for word what stands
    between ⟦ and ⟧, if anything does; of two answers the first (taste "first") or the longer one;
    in each dimension 2, or 3 for an answer of 20 characters."""
    system, user = messages[0]["content"], messages[-1]["content"]
    if "评审专家" not in system:
        return None
    if script := re.search("⟦(.*)⟧", user, re.S):
        return script[1]
    answers = [text.strip() for text in re.split("【回答[AB]?】", user)[1:]]
    if len(answers) == 1:
        return system.splitlines()[-1].replace(": 整数", f": {3 if len(answers[0]) >= 20 else 2}")
    a, b = map(len, answers)
    return json.dumps(
        {
            "理由": "一句话",
            "verdict": "A" if taste == "first" or a > b else "B" if b > a else "tie",
        },
        ensure_ascii=False,
    )


class Server:
    """State of one server; `options` as on the command line."""

    def __init__(self, options):
        self.o, self.faults = options, json.loads(options.faults)
        self.requests, self.count, self.answered = 0, Counter(), Counter()
        self.draw, self.files, self.batches = random.Random(options.seed), {}, {}

    def error(self, status, message, code=None, param=None):
        return status, {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": param,
                "code": code,
            }
        }

    def completion(self, body, count=True):
        """(status, object) for the body of a chat completion."""
        if body.get("model") != self.o.model:
            return self.error(
                404, f"The model `{body.get('model')}` does not exist", "model_not_found"
            )
        for name in self.o.refuse:
            if name in body:
                return self.error(
                    400,
                    f"Unsupported parameter: '{name}' is not supported with this model.",
                    "unsupported_parameter",
                    name,
                )
        messages = body["messages"]
        key = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()
        self.answered[key] += 1
        content, luck = verdict_to(messages, self.o.judge), int(key[:8], 16) / 2**32
        if content is None:
            content = json.dumps(reply_to(messages), ensure_ascii=False)
        if messages[-2:-1] and messages[-2]["role"] == "assistant":
            self.count["repair"] += 1
        elif luck < self.faults.get("broken", 0):
            self.count["broken"] += 1
            content = content[: len(content) // 2]
        elif luck < self.faults.get("broken", 0) + self.faults.get("empty", 0):
            self.count["empty"] += 1
            content = ""
        return 200, {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": self.o.model + "-2026",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content},
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": sum(len(m["content"]) for m in messages),
                "completion_tokens": 300,
            },
        }

    def batch(self, id):
        """A batch as it stands now: completed `delay` seconds after its creation."""
        batch = self.batches[id]
        if (
            batch["status"] == "in_progress"
            and time.time() > batch["created_at"] + self.o.batch_delay
        ):
            lines, errors = [], []
            for line in self.files[batch["input_file_id"]].decode().splitlines():
                row = json.loads(line)
                key = hashlib.sha256(row["custom_id"].encode()).digest()[0] / 256
                if key < self.faults.get("batch_error", 0):
                    errors.append(
                        {
                            "custom_id": row["custom_id"],
                            "response": None,
                            "error": {"code": "batch_expired", "message": "expired"},
                        }
                    )
                else:
                    status, body = self.completion(row["body"])
                    (lines if status == 200 else errors).append(
                        {
                            "custom_id": row["custom_id"],
                            "response": {"status_code": status, "body": body},
                            "error": None,
                        }
                    )
            for name, rows in (("output_file_id", lines), ("error_file_id", errors)):
                if rows:
                    random.Random(0).shuffle(rows)  # OpenAI promises no order
                    batch[name] = f"file-{id}-{name}"
                    self.files[batch[name]] = "".join(
                        json.dumps(r, ensure_ascii=False) + "\n" for r in rows
                    ).encode()
            batch["status"] = "completed"
        return batch

    def handle(self, method, path, headers, data):
        """(status, object or bytes, further headers, seconds to wait), or a fault of transport by
        its name."""
        path = path.split("?")[0]
        if path == "/stats":
            return (
                200,
                {
                    "requests": self.requests,
                    "count": self.count,
                    "answered": self.answered,
                    "batches": len(self.batches),
                },
                b"",
                0,
            )
        self.requests += 1
        if self.o.key and headers.get(b"authorization") != b"Bearer " + self.o.key.encode():
            said = headers.get(b"authorization", b"").decode()[7:]
            return (
                *self.error(401, f"Incorrect API key provided: {said}.", "invalid_api_key"),
                b"",
                0,
            )
        if path == "/v1/chat/completions":
            luck = self.draw.random()
            for fault in TRANSPORT:
                luck -= self.faults.get(fault, 0)
                if luck < 0:
                    self.count[fault] += 1
                    if fault == "429":
                        return (
                            *self.error(429, "Rate limit reached", "rate_limit_exceeded"),
                            b"retry-after: 1\r\n",
                            0,
                        )
                    return (
                        (*self.error(500, "The server had an error"), b"", 0)
                        if fault == "500"
                        else fault
                    )
            return *self.completion(json.loads(data)), b"", self.o.latency
        if path == "/v1/files":
            content = re.search(rb'name="file".*?\r\n\r\n(.*?)\r\n--', data, re.S).group(1)
            id = f"file-{len(self.files)}"
            self.files[id] = content
            return (
                200,
                {
                    "id": id,
                    "object": "file",
                    "bytes": len(content),
                    "created_at": 1,
                    "filename": "f",
                    "purpose": "batch",
                    "status": "processed",
                },
                b"",
                0,
            )
        if file := re.fullmatch(r"/v1/files/(.+)/content", path):
            return 200, self.files[file.group(1)], b"", 0
        if path == "/v1/batches" and method == "POST":
            id = f"batch_{len(self.batches)}"
            batch = {
                "id": id,
                "object": "batch",
                "status": "in_progress",
                "created_at": time.time(),
                **json.loads(data),
            }
            if f'"model": "{self.o.model}"'.encode() not in self.files[batch["input_file_id"]]:
                batch |= {
                    "status": "failed",
                    "errors": {
                        "object": "list",
                        "data": [
                            {
                                "code": "model_not_found",
                                "message": "The provided model `fake` does not exist",
                                "line": 1,
                            }
                        ],
                    },
                }
            self.batches[id] = batch
            if self.o.lose_batch and len(self.batches) == 1:
                return "drop"
            return 200, self.batches[id], b"", 0
        if path == "/v1/batches":
            return (
                200,
                {
                    "object": "list",
                    "data": [self.batch(id) for id in self.batches],
                    "has_more": False,
                },
                b"",
                0,
            )
        if (id := path.rsplit("/", 1)[1]) not in self.batches:
            return *self.error(404, f"No batch found with id '{id}'."), b"", 0
        return 200, self.batch(id), b"", 0


class Connection(asyncio.Protocol):
    def __init__(self, server):
        self.server, self.data = server, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        while b"\r\n\r\n" in self.data:
            head, rest = self.data.split(b"\r\n\r\n", 1)
            first, *lines = head.split(b"\r\n")
            headers = {k.lower(): v.strip() for k, v in (line.split(b":", 1) for line in lines)}
            length = int(headers.get(b"content-length", 0))
            if len(rest) < length:
                return
            self.data = rest[length:]
            method, path, _ = first.decode().split(" ")
            result = self.server.handle(method, path, headers, rest[:length])
            if result == "drop":
                self.transport.abort()
            elif result != "hang":
                status, body, more, seconds = result
                body = (
                    body
                    if isinstance(body, bytes)
                    else json.dumps(body, ensure_ascii=False).encode()
                )
                head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n" % status
                text = head + b"content-length: %d\r\n%b\r\n%b" % (len(body), more, body)
                asyncio.get_running_loop().call_later(seconds, self.transport.write, text)


class Scripted:
    """A server in a thread of this process: `reply(prompt, body, number of the request)` returns
    the content of a reply, a (status, object), or None to hang up; `bodies` holds what was
    asked."""

    def __init__(self, reply):
        self.bodies, lock = [], threading.Lock()
        bodies = self.bodies

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    bodies.append(body)
                    number = len(bodies)
                said = reply(body["messages"][-1]["content"], body, number)
                if said is None:
                    return self.connection.close()
                status, said = said if isinstance(said, tuple) else (200, completion(said))
                data = (
                    said
                    if isinstance(said, bytes)
                    else json.dumps(said, ensure_ascii=False).encode()
                )
                self.send_response(status)
                for name, value in (
                    ("content-type", "application/json"),
                    ("content-length", str(len(data))),
                ):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


USED = {"prompt_tokens": 100, "completion_tokens": 300}


def completion(content, usage=USED):
    return {
        "model": "fake-2026",
        "choices": [
            {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        ],
        "usage": usage,
    }


class Running:
    """A server in a process of its own: `with Running("--latency", "0.05") as server: server.url,
    server.stats()`."""

    def __init__(self, *options):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stats(self):
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/stats") as response:
            return json.load(response)


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="fake")
    parser.add_argument("--key", default="", help="the key that is asked for; empty: none")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--batch_delay", type=float, default=1.0)
    parser.add_argument(
        "--lose_batch",
        action="store_true",
        help="hang up instead of telling of the first batch made",
    )
    parser.add_argument("--faults", default="{}")
    parser.add_argument("--refuse", nargs="*", default=[], help="parameters that answer 400")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--judge",
        choices=("longer", "first"),
        default="longer",
        help="which of two answers it prefers",
    )
    server = Server(parser.parse_args())
    listening = await asyncio.get_running_loop().create_server(
        lambda: Connection(server), "127.0.0.1", 0
    )
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
