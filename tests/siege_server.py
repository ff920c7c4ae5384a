"""Do honest clients notice an attack?  python tests/siege_server.py --seconds 180

64 clients ask and compare each answer with the offline greedy one: first alone, then for as long
beside sockets that send a byte of a header a second, streams that nobody reads, and refused bodies
of 100,000 numbers. The last line is one JSON object: seconds to the first token, both times; what
the attackers got; memory. Exit code 1 if an answer was wrong, an attacker got no HTTP answer, or
the first token came more than 3 times as late."""

import argparse
import contextlib
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import openai
from soak_server import BODY, POST, Clients, make_adapter, memory, offline, start


class Honest(Clients):
    """Clients that only ask."""

    def run(self, seed):
        dice = random.Random(seed)
        url = f"http://127.0.0.1:{self.port}/v1"
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=300) as client:
            while not self.done.is_set():
                (question, name), whole = dice.choice(list(self.answers.items()))
                try:
                    self.stream(client, dice, question, name, whole)
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__} {error}"[:300])


class Attack:
    """Sockets that hold what they can, in one thread for each kind."""

    def __init__(self, port):
        self.port, self.done, self.got = port, threading.Event(), Counter()

    def connect(self, first):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(first)
        connection.setblocking(False)
        return connection

    def hold(self, number, first, drip, read=True):
        """Keep so many connections that begin with `first` and send `drip` each second; count the
        statuses of what comes back, and open others where they end."""
        connections = [self.connect(first) for _ in range(number)]
        looked = time.monotonic()
        while not self.done.wait(1):
            # A response that is not read within 10 seconds is taken back.
            slow, looked = time.monotonic() - looked > 9, time.monotonic()
            for i, connection in enumerate(connections):
                try:
                    # A response may lie there although no more can be sent.
                    with contextlib.suppress(*[ConnectionError] * read):
                        connection.send(drip)
                    got = connection.recv(200) if read else None
                except BlockingIOError:
                    continue
                except OSError:  # who does not read is cut off behind a response that has begun
                    got = b"cut off" if slow or not read else b"reset"
                if got is not None:
                    self.got[got[:12].decode("latin-1") or "closed"] += 1
                    connection.close()
                    connections[i] = self.connect(first)
        for connection in connections:
            connection.close()

    def numbers(self):
        """Send refused bodies, one after the other."""
        body = b'{"messages": [' + b"1," * 100000 + b"1]}"
        while not self.done.wait(0.05):
            with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
                connection.sendall(POST % (len(body), body))
                self.got["numbers " + connection.recv(12).decode()] += 1

    def threads(self, drips, unread):
        line = b"POST /v1/chat/completions HTTP/1.1\r\n"
        body = json.dumps({**BODY, "max_tokens": 900, "stream": True}).encode()
        yield threading.Thread(target=self.hold, args=(drips, line, b"a"))
        yield threading.Thread(
            target=self.hold, args=(unread, POST % (len(body), body), b"", False)
        )
        yield from (threading.Thread(target=self.numbers) for _ in range(4))


def ask(port, answers, tokens, clients, seconds, pid):
    """(Honest after so many seconds, MiB of the server every second)."""
    honest, used = Honest(port, answers, tokens), []
    threads = [threading.Thread(target=honest.run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    ends = time.time() + seconds
    while time.time() < ends:
        time.sleep(1)
        used.append(memory(pid))
    honest.done.set()
    for thread in threads:
        thread.join()
    return honest, used


def percentiles(numbers):
    ordered = sorted(numbers)
    return {p: round(ordered[len(ordered) * p // 100], 3) for p in (50, 90, 99)} if ordered else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--drips", type=int, default=280)
    parser.add_argument("--unread", type=int, default=24)
    parser.add_argument("--max_tokens", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        adapter = Path(folder) / "tuned"
        make_adapter(adapter)
        answers = offline(adapter, args.max_tokens)
        more = ("--batch_size", "32", "--context", "1024")
        server, port = start(log, "--lora_weights", adapter, "--dtype", "fp32", *more)
        try:
            common = (port, answers, args.max_tokens, args.clients, args.seconds, server.pid)
            alone, before = ask(*common)
            attack = Attack(port)
            threads = [*attack.threads(args.drips, args.unread)]
            for thread in threads:
                thread.start()
            beside, after = ask(*common)
            attack.done.set()
            for thread in threads:
                thread.join()
        finally:
            server.kill()
        tracebacks = Path(log.name).read_text().count("Traceback")
    wrong = alone.wrong + beside.wrong
    print(*wrong[:10], sep="\n")
    result = {
        "seconds": args.seconds,
        "answers": [alone.seen["streamed"], beside.seen["streamed"]],
        "first_token_s": [percentiles(alone.first), percentiles(beside.first)],
        "wrong": len(wrong),
        "attackers_got": attack.got,
        # alone at its most; beside the attackers in the middle of each quarter
        "rss_mib": [max(before), *(after[len(after) * i // 8] for i in (1, 3, 5, 7))],
        "tracebacks": tracebacks,
    }
    print(json.dumps(result))
    quiet, loud = (each.get(50, 1e9) for each in result["first_token_s"])
    unanswered = attack.got["closed"] + attack.got["reset"]
    sys.exit(bool(wrong or unanswered or tracebacks or loud > 3 * quiet))


if __name__ == "__main__":
    main()
