"""The server under many clients that ask, leave, cancel and send rubbish:  python
tests/soak_server.py --seconds 300

Every answer that comes whole is compared with the offline greedy one. At the end no place may be
taken and memory must not have grown. Then the server is killed and started again by the same
command: it must offer the same models, answer the same, and stop on SIGTERM. The last line is one
JSON object; exit code 1 if anything was wrong."""

import argparse
import collections
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import openai
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import generate as G  # noqa: E402
import lora as L  # noqa: E402

NAMES = (
    "黄芪",
    "柴胡",
    "当归",
    "甘草",
    "偏头痛",
    "四君子汤",
    "防己黄芪汤",
    "桂枝汤",
    "感冒",
    "高血压",
    "大黄",
    "附子",
)
QUESTIONS = [
    name + form for name in NAMES for form in ("的功效是", "的")
]  # the base goes on with these, and answers nothing
BODY = {"model": "tuned", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}
RUBBISH = [
    (400, b"{"),
    (400, b"\xff\xfe"),
    (400, b"[]"),
    (400, json.dumps({**BODY, "temperature": -1}).encode()),
    (400, json.dumps({**BODY, "tools": [1]}).encode()),
    (400, json.dumps({**BODY, "max_tokens": 10**9}).encode()),
    (404, json.dumps({**BODY, "model": "none"}).encode()),
    (413, b" " * 400000),
    (400, json.dumps({**BODY, "messages": [{"role": "user", "content": "黄" * 9000}]}).encode()),
]


def make_adapter(folder):
    """An adapter with a seeded B, so that tuned and base answers differ without a training run, and
    a template that adds nothing to the question."""
    model, _ = G.load_base(ROOT / "data" / "tiny", "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, 8.0, 0.0, ("all",)))
    for i, (_, module) in enumerate(L.lora_linears(model)):
        module.lora_b.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(i))
    folder.mkdir(exist_ok=True)
    template = folder / "template.json"
    template.write_text('{"prompt_no_input": "{instruction}"}')
    made = {"made_in": {"template": G.load_template(template)}}
    L.save_adapter(model, folder, ROOT / "data" / "tiny", made)


def offline(folder, tokens):
    """{(question, name): answer}, by the base without an adapter, and with it."""
    answers, template = {}, G.load_template(folder / "template.json")
    for name in ("base", "tuned"):
        model, tokenizer = G.load_base(ROOT / "data" / "tiny", "cpu", torch.float32)
        if name == "tuned":
            L.load_adapter(model, folder)
        for question in QUESTIONS:
            ids = G.render_prompt(tokenizer, template, [{"role": "user", "content": question}])
            new = list(G.generate_ids(model, ids, tokens, tokenizer.eos_id))
            answers[question, name] = G.visible(tokenizer.decode(new))
    return answers


def start(log, *options, port=0):
    """(server, its port): `generate.py --serve` on a port (0: a free one), its messages appended to
    the file log."""
    begun = Path(log.name).read_text().count("http://")
    server = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", "--serve", "--port", str(port), *options], stderr=log
    )
    while (
        len(found := re.findall(r"http://127\.0\.0\.1:(\d+)/", Path(log.name).read_text())) == begun
    ):
        assert server.poll() is None, Path(log.name).read_text()
        time.sleep(0.1)
    return server, int(found[-1])


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:1\r\nContent-Length: %d\r\n\r\n%b"


class Clients:
    """Threads that treat a server badly until told to stop, and what they saw."""

    def __init__(self, port, answers, tokens):
        self.port, self.answers, self.tokens, self.seen, self.wrong = (
            port,
            answers,
            tokens,
            collections.Counter(),
            [],
        )
        self.first, self.done, self.lock = [], threading.Event(), threading.Lock()

    def count(self, what):
        with self.lock:
            self.seen[what] += 1

    def run(self, seed):
        dice = random.Random(seed)
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="x", max_retries=0, timeout=300
        ) as client:
            while not self.done.is_set():
                (question, name), whole = dice.choice(list(self.answers.items()))
                act = dice.choices(
                    (self.ask, self.stream, self.cancel, self.vanish, self.rubbish),
                    (30, 30, 15, 10, 15),
                )[0]
                try:
                    act(client, dice, question, name, whole)
                except openai.RateLimitError:
                    self.count("429")
                    time.sleep(0.5)
                except Exception as error:
                    self.wrong.append(f"{act.__name__}: {type(error).__name__} {error}"[:300])

    def create(self, client, question, name, **more):
        return client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": question}],
            max_tokens=self.tokens,
            **more,
        )

    def compare(self, what, got, whole):
        self.count(what)
        if got != whole:
            self.wrong.append(f"{what}: {got!r}, wanted {whole!r}")

    def ask(self, client, dice, question, name, whole):
        self.compare("asked", self.create(client, question, name).choices[0].message.content, whole)

    def stream(self, client, dice, question, name, whole):
        started, got = time.perf_counter(), ""
        for chunk in self.create(client, question, name, stream=True):
            if not got and chunk.choices[0].delta.content:
                self.first.append(time.perf_counter() - started)
            got += chunk.choices[0].delta.content
        self.compare("streamed", got, whole)

    def cancel(self, client, dice, question, name, whole):
        """Leave a stream after a few chunks; what came must be how the answer begins."""
        stream, got = self.create(client, question, name, stream=True), ""
        for _, chunk in zip(range(dice.randrange(1, 8)), stream):
            got += chunk.choices[0].delta.content
        stream.close()
        self.compare("cancelled", got, whole[: len(got)])

    def vanish(self, client, dice, question, name, whole):
        """Close the socket somewhere between the first byte sent and the answer."""
        body = json.dumps(
            {**BODY, "model": name, "max_tokens": 500, "stream": dice.random() < 0.5}
        ).encode()
        data = POST % (len(body), body)
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data[: dice.choice((1, len(data) // 2, len(data), len(data)))])
            time.sleep(dice.random())
        self.count("vanished")

    def rubbish(self, client, dice, question, name, whole):
        status, body = dice.choice(RUBBISH)
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(POST % (len(body), body))
            got = b""
            while piece := connection.recv(65536):
                got += piece
        self.count("refused")
        head, _, text = got.partition(b"\r\n\r\n")
        if int(head.split()[1]) != status or "error" not in json.loads(text):
            self.wrong.append(f"rubbish: {head[:40]!r}, wanted {status}")


def memory(pid):
    """MiB that the process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        adapter = Path(folder) / "tuned"
        make_adapter(adapter)
        answers = offline(adapter, args.max_tokens)
        print(f"{len(answers)} offline answers, {len(set(answers.values()))} different", flush=True)
        options = "--lora_weights", adapter, "--dtype", "fp32", "--context", "1024"
        server, port = start(log, *options)
        try:
            clients = Clients(port, answers, args.max_tokens)
            threads = [threading.Thread(target=clients.run, args=(i,)) for i in range(args.clients)]
            for thread in threads:
                thread.start()
            started, rss = time.time(), []
            while time.time() - started < args.seconds:
                time.sleep(args.seconds / 20)
                rss.append(memory(server.pid))
                print(
                    f"{time.time() - started:5.0f} s  {rss[-1]:.1f} MiB  {dict(clients.seen)}  "
                    f"{len(clients.wrong)} wrong",
                    flush=True,
                )
            clients.done.set()
            for thread in threads:
                thread.join()
            with openai.OpenAI(
                base_url=f"http://127.0.0.1:{clients.port}/v1", api_key="x", timeout=60
            ) as client:
                clients.ask(client, None, QUESTIONS[0], "tuned", answers[QUESTIONS[0], "tuned"])
                for _ in range(100):
                    health = client.get("../health", cast_to=object)
                    if not health["running"] and not health["waiting"]:
                        break
                    time.sleep(0.1)
                offered = [model.id for model in client.models.list()]
                server.kill()
                server.wait()
                server, _ = start(log, *options, port=port)
                if (again := [model.id for model in client.models.list()]) != offered:
                    clients.wrong.append(f"started again it offers {again}, before {offered}")
                clients.ask(client, None, QUESTIONS[1], "tuned", answers[QUESTIONS[1], "tuned"])
            server.send_signal(signal.SIGTERM)
            code = server.wait(30)
            tracebacks = Path(log.name).read_text().count("Traceback")
        finally:
            server.kill()
    first = sorted(clients.first)
    growth = sum(rss[-5:]) / 5 - sum(rss[5:10]) / 5  # the last quarter against the second
    for line in clients.wrong[:10]:
        print(line)
    result = {
        "seconds": args.seconds,
        "clients": args.clients,
        **clients.seen,
        "wrong": len(clients.wrong),
        "first_token_s": {"p50": first[len(first) // 2], "p99": first[len(first) * 99 // 100]}
        if first
        else None,
        "rss_mib": [round(value, 1) for value in rss],
        "growth_mib": round(growth, 1),
        "places_lost": health["running"] + health["waiting"],
        "exit_code": code,
        "tracebacks": tracebacks,
    }
    print(json.dumps(result, ensure_ascii=False))
    sys.exit(bool(clients.wrong or result["places_lost"] or code or tracebacks or growth > 20))


if __name__ == "__main__":
    main()
