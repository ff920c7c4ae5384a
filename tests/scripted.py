"""A server whose model says what a test wants, at once."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import generate as G


class Scripted:
    """A batch and a tokenizer in one. Ids are characters, a prompt is its messages as JSON, and the
    answer is what `reply(messages, adapted)` returns, one character a step."""

    unsettled, leading, special = "\ufffd", "", {}
    size = 8

    def __init__(self, reply, positions, pause, clip):
        self.reply, self.pause, self.clip = reply, pause, clip
        self.cache = SimpleNamespace(positions=positions)
        self.waiting, self.rows, self.texts = [], [], {}

    def encode(self, messages):
        return [*map(ord, json.dumps(messages, ensure_ascii=False))]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def submit(self, request):
        room = self.cache.positions - len(request.prompt_ids)
        if room < 1 or not self.clip and request.decoding.max_new_tokens > room:
            raise G.Refused("too long", code="context_length_exceeded")
        length = min(room, request.decoding.max_new_tokens)
        request.decoding = replace(request.decoding, max_new_tokens=length)
        messages = json.loads(self.decode(request.prompt_ids))
        self.texts[id(request)] = self.reply(messages, request.adapted)
        self.waiting.append(request)

    def step(self):
        time.sleep(self.pause)
        self.release()
        self.rows, self.waiting = self.rows + self.waiting, []
        for request in self.rows:
            text = self.texts[id(request)]
            if len(request.ids) < len(text):
                request.ids.append(ord(text[len(request.ids)]))
            if len(request.ids) == request.decoding.max_new_tokens:
                request.finish_reason = "length"
            elif len(request.ids) == len(text):
                request.finish_reason = "stop"

    def release(self):
        def keep(requests):
            return [r for r in requests if not r.finish_reason and not r.cancelled]

        self.rows, self.waiting = keep(self.rows), keep(self.waiting)


@contextmanager
def scripted(reply, positions=4000, length=3000, pause=0.0, clip=False, **options):
    """The address of a server of a "tuned" and a "base" model that answer what reply says, in so
    many positions. clip: an answer for which there is no room is shortened, not refused."""
    model = Scripted(reply, positions, pause, clip)
    options = G.Options(max_new_tokens=length, port=0, **options)
    server = G.Server(model, model, ["tuned", "base"], model.encode, options)
    server.about = "data/tiny with tuned on cpu, torch.bfloat16; a template"
    with serving(server) as address:
        yield address


@contextmanager
def serving(server):
    """The address of a generate.Server, in a thread."""
    threading.Thread(target=asyncio.run, args=(server.run(),), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/"
    finally:
        server.stopping = True


@contextmanager
def listening(made):
    """The address of the asyncio server that a coroutine makes, in a loop in a thread."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    port = loop.run_until_complete(made).sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
