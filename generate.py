"""Questions in, answers out: prompt templates, the tokenizer, decoding with the KV cache, streaming, chat, files, a server.

  python generate.py "偏头痛有哪些症状？"                one question
  python generate.py                                   a chat
  python generate.py --instruct_dir questions.json     a file, array or lines of {"instruction", "input"}; - is stdin
  python generate.py --compare base=DIR tuned=DIR+ADAPTER --instruct_dir questions.json --output table
  python generate.py --serve                           OpenAI's API and a page on http://127.0.0.1:8000/

The only place where text and token ids meet, so that training and asking render every prompt with the same code.
The answer goes to stdout, everything else to stderr.
"""
import csv
import difflib
import hmac
import html
import io
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from base64 import b64encode
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import zip_longest
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import unquote
from uuid import uuid4

import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from lora import QUANTISED, load_adapter, lora_linears, merge, quantize, remove_adapter
from model import (BF16_PRODUCTS, DTYPES, Parser, RaggedStep, find_base, find_tokenizer, load_model, open_checkpoint, read_json_file,
                   run, weight_files, write_atomically, write_json)

DATA = Path(__file__).parent / "data"
TEMPLATES = DATA / "templates"
LOCAL = ("127.0.0.1", "localhost")                               # names of this machine that no other one reaches
DISCLAIMER = "Answers come from a language model and are no medical advice. 回答由语言模型生成，不构成医疗建议。"


def load_template(name):
    """The prompt template of a bare name in data/templates or of a path: {prompt_no_input, prompt_input,
    response_split}. A missing prompt_input is prompt_no_input, as BenTsao's literature template has it."""
    path = Path(name) if str(name).endswith(".json") else TEMPLATES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.json")))
        raise ValueError(f"template {name!r} unknown; choose from {known}, or give the path of a .json file")
    template = {"description": "", "response_split": "", **read_json_file(path)}
    template.setdefault("prompt_input", template.get("prompt_no_input"))
    for key in ("prompt_no_input", "prompt_input"):
        text = template.get(key)
        braces = re.findall(r"\{\{|\}\}|\{[^{}]*\}?|\}", text if isinstance(text, str) else "")
        others = [brace for brace in braces if brace not in ("{instruction}", "{input}", "{{", "}}")]
        if others or "{instruction}" not in braces:
            raise ValueError(f"{path}: {key} has {' '.join(others) or 'no {instruction}'}, wanted a text with {{instruction}}; braces "
                             "other than of it and {input} are doubled")
    return template


def render_prompt(template, instruction, input=""):
    """The prompt for one instruction. The only renderer: training, asking and chatting all call it."""
    return template["prompt_input" if input else "prompt_no_input"].format(instruction=instruction, input=input)


def render_turns(turns):
    """Turns [(user, bot), ...], the last bot None, in the form of BenTsao's literature rows: the conversation that
    goes into {instruction}. The leading space is theirs, and changes the first token."""
    return "".join(f" <user>: {user}" + ("" if bot is None else f" <bot>: {bot}") for user, bot in turns)


def bot_spans(instruction):
    """[(start, end), ...] in characters: where the bot's answers stand in an instruction made by `render_turns`."""
    return [m.span(1) for m in re.finditer(r" <bot>: (.*?)(?= <user>: )", instruction, re.DOTALL)]


class Tokenizer:
    """SentencePiece with LLaMA's special ids; bos, eos and size come from tokenizer.model and nowhere else."""

    def __init__(self, path):
        if not Path(path).is_file():
            raise ValueError(f"{path} not found; the folder of the base wants a tokenizer.model")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is no SentencePiece model ({error})") from None
        self.vocab_size, self.bos_id, self.eos_id = len(self.pieces), self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no BOS or EOS piece; LLaMA wants both")
        self.newline = self.pieces.piece_to_id("<0x0A>")

    def encode(self, text, bos=False, eos=False):
        """Text to token ids. Raises ValueError for half a character, which is no Unicode text."""
        if half := re.search("[\ud800-\udfff]", text):           # of a JSON "\\ud800", or a byte that was no UTF-8
            raise ValueError(f"a text has half a character, at the end of {text[:half.end()][-20:]!r}; wanted whole ones, in UTF-8")
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def encode_answer(self, text):
        """Ids of a text that follows a prompt, without the space that SentencePiece puts before a text. Behind a
        newline, where the templates end, this is what encoding both together gives."""
        ids = self.encode("\n" + text)
        return ids[ids.index(self.newline) + 1:]

    def byte_ends(self, ids, text):
        """Where each of the ids that `encode` made of text ends in it, in bytes of UTF-8 (0 or less: before it begins)."""
        ends, end = [], 0
        for i in ids:
            piece = "" if self.pieces.is_control(i) else self.pieces.id_to_piece(i).replace("\u2581", " ")
            end += 1 if self.pieces.is_byte(i) else len(piece.encode())
            ends.append(end)
        return [e - end + len(text.encode()) for e in ends]       # the space SentencePiece may put in front is no text

    def decode(self, ids):
        """Token ids to text. Bytes that make no character become U+FFFD; ids of added_tokens.json have no text."""
        return self.pieces.decode([i for i in ids if i < self.vocab_size])


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen; names and meanings are transformers'. Raises ValueError for a value out of range."""
    max_new_tokens: int = 256
    temperature: float = 0.0              # 0: the likeliest token, whatever the four filters say
    top_k: int = 0                        # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0       # 1: none; over prompt and answer, as in transformers
    no_repeat_ngram_size: int = 0         # 0: any may repeat; over prompt and answer
    num_beams: int = 1
    length_penalty: float = 1.0           # beams only: scores are divided by length ** length_penalty
    stop: tuple = ()                      # texts that end the answer and are not part of it
    seed: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, kind, fits, wanted in (
                ("max_new_tokens", int, lambda x: x >= 1, "a whole number from 1"),
                ("temperature", (int, float), lambda x: x == 0 or 1e-6 <= x <= 1e6, "0 or a number from 1e-6 to 1e6"),
                ("top_k", int, lambda x: x >= 0, "a whole number from 0"),
                ("top_p", (int, float), lambda x: 0 < x <= 1, "a number above 0, up to 1"),
                ("min_p", (int, float), lambda x: 0 <= x <= 1, "a number from 0 to 1"),
                ("repetition_penalty", (int, float), lambda x: 1e-6 <= x <= 1e6, "a number from 1e-6 to 1e6"),
                ("no_repeat_ngram_size", int, lambda x: x >= 0, "a whole number from 0"),
                ("num_beams", int, lambda x: x >= 1, "a whole number from 1"),
                ("length_penalty", (int, float), lambda x: -20 <= x <= 20, "a number from -20 to 20"),
                ("seed", (int, type(None)), lambda x: x is None or -2**63 <= x < 2**63, "a whole number")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{name} is {value!r}, wanted {wanted}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}, wanted texts that are not empty")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(f"num_beams {self.num_beams} with temperature {self.temperature}: beam search does not sample; "
                             "set temperature 0 or num_beams 1")


def penalise(logits, ids, decoding):
    """logits (V,) with the ids (prompt and answer so far) made less likely: by repetition_penalty (Keskar et al. 2019,
    4.1), and -inf for each id that would repeat an n-gram of no_repeat_ngram_size (Paulus et al. 2018, 2.5)."""
    if decoding.repetition_penalty != 1:
        seen = torch.tensor(ids, device=logits.device)
        score = logits[seen]
        logits = logits.index_put((seen,), torch.where(score < 0, score * decoding.repetition_penalty,
                                                       score / decoding.repetition_penalty))
    n = decoding.no_repeat_ngram_size
    if 0 < n <= len(ids):
        last = ids[len(ids) - n + 1:]
        banned = [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i:i + n - 1] == last]
        logits = logits.index_fill(0, torch.tensor(banned, dtype=torch.long, device=logits.device), -torch.inf)
    return logits


def sample(logits, decoding, generator=None):
    """One id, a tensor (), from logits (V,): the greatest at temperature 0; else drawn from softmax(logits / temperature)
    kept to the top_k greatest, then to the fewest that hold top_p of the mass (Holtzman et al. 2020), then to those of
    at least min_p times the greatest probability (Nguyen et al. 2024), in transformers' order."""
    if decoding.temperature == 0:
        return logits.argmax()
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(decoding.top_k).values[-1], -torch.inf)
    if decoding.top_p < 1:
        ordered, order = logits.sort()                            # ascending, as the sums of the small come first
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - decoding.top_p
        outside[-1] = False
        logits = logits.masked_fill(outside.scatter(0, order, outside), -torch.inf)
    probs = logits.softmax(-1)
    if decoding.min_p > 0:
        probs = probs.masked_fill(probs < decoding.min_p * probs.max(), 0.0)
    # argmax of p / Exp(1) draws from p (the exponential race), without the wait for the device that multinomial has
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax()


class Request:
    """A prompt, how to answer it, and the answer so far: `ids` without EOS, `finish_reason` None while it runs, then
    "stop" (EOS or a stop text) or "length". With beams, ids come at the end, and `ranked` has all num_beams of them,
    best first, as (score, ids, finish_reason)."""

    def __init__(self, prompt_ids, decoding):
        if not prompt_ids:
            raise ValueError("the prompt is empty; give at least the BOS id")
        self.prompt_ids, self.decoding = list(prompt_ids), decoding
        self.ids, self.finish_reason, self.generator = [], None, None
        self.beams = [(0.0 if i == 0 else -1e9, []) for i in range(decoding.num_beams)]    # (sum of log-probabilities, ids)
        self.rows, self.ranked = [], []                           # rows[i] of the batch is where beam i stands


@torch.inference_mode()
def compile_step(step, cache):
    """step(ids (B, 1), at (B,)) for all rows B of the cache, compiled; takes both as lists. On a GPU it becomes kernels tuned
    to their shapes, recorded as one CUDA graph, since Python needs longer to launch a kernel than most of them run; on a CPU
    loops over the weights as they are stored for one row, for more with the weights packed for products of few rows, which
    doubles their memory."""
    import torch._inductor.config
    rows, device = len(cache.k[0]), cache.k[0].device
    # values of more than 11 operations are stored: SwiGLU and norms, which else each row of the product that reads them would
    # make again
    stored = {"realize_opcount_threshold": 11}
    if device.type == "cuda":
        compiled = torch.compile(step, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True, **stored})
        given = torch.zeros(2, rows, dtype=torch.long, device=device)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):                           # compiled before: a graph records all that runs
            compiled(given[0][:, None], given[1])
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = compiled(given[0][:, None], given[1])

        def replay(ids, at):
            given.copy_(torch.tensor([ids, at]))
            graph.replay()
            return logits                                         # the same memory each time
        return replay
    packed = rows > 1
    torch._inductor.config.freezing = packed                      # read while tracing too, where `options` do not reach
    compiled = torch.compile(step, fullgraph=True, dynamic=False, options={
        "freezing": packed, "max_autotune": packed, "max_autotune_gemm_backends": "CPP,ATEN", "cpp_wrapper": True, **stored})
    return lambda ids, at: compiled(torch.tensor(ids)[:, None], torch.tensor(at))


class Batch:
    """Requests decoded together, one token each a step, in one KV cache of `rows` rows and max_len positions; a request
    takes num_beams rows. Rows stand at their own lengths, so each answer is what it would be alone; the rows of one
    that ends go to the next. Rows in use are always the first ones. Raises ValueError if memory cannot hold the cache."""

    def __init__(self, model, tokenizer, rows, max_len, eos_id=None, prefill_chunk=512, compile=False):
        self.model, self.tokenizer, self.eos_id = model, tokenizer, tokenizer.eos_id if eos_id is None else eos_id
        self.free, self.prefill_chunk = rows, prefill_chunk
        try:
            self.cache = model.new_cache(rows, max_len)
        except (RuntimeError, TypeError):                         # TypeError: torch has no integer so large
            raise ValueError(f"{rows} rows of {max_len} tokens do not fit into memory; lower batch_size or max_new_tokens")
        self.owner, self.tokens, self.lengths = [], [], []        # per row in use: request, token to feed, positions filled
        self.compiled = compile and compile_step(lambda ids, at: self.ragged_logits(ids, at, max_len), self.cache)

    @torch.inference_mode()
    def add(self, request):
        """Run the prompt but for its last token, which the first step feeds. Raises ValueError if it cannot fit."""
        prompt, n, max_len = request.prompt_ids, request.decoding.num_beams, self.cache.max_len
        if len(prompt) + request.decoding.max_new_tokens > max_len:
            raise ValueError(f"prompt of {len(prompt)} tokens and {request.decoding.max_new_tokens} new ones do not fit "
                             f"into {max_len} positions; shorten the prompt or max_new_tokens")
        if n > self.free:
            raise ValueError(f"{n} rows wanted, {self.free} free; let requests end, or make a larger batch")
        if request.decoding.seed is not None:
            request.generator = torch.Generator(self.model.device).manual_seed(request.decoding.seed)
        row = len(self.owner)
        cache = self.cache.rows(row, row + 1, 0)
        for start in range(0, len(prompt) - 1, self.prefill_chunk):
            chunk = prompt[start:min(start + self.prefill_chunk, len(prompt) - 1)]
            self.model.hidden(torch.tensor([chunk], device=self.model.device), cache)
        if n > 1:
            self.cache.copy_rows([row] * (n - 1), list(range(row + 1, row + n)), 0, cache.length)
        self.free -= n
        request.rows = list(range(row, row + n))
        self.owner += [request] * n
        self.tokens += [prompt[-1]] * n
        self.lengths += [cache.length] * n

    def remove(self, request):
        """Free the places of a request; the last rows move into the gap."""
        for row in sorted(request.rows, reverse=True):
            last = len(self.owner) - 1
            if row != last:
                self.cache.copy_rows([last], [row], 0, self.lengths[last])
                moved = self.owner[last].rows
                moved[moved.index(last)] = row
            for column in (self.owner, self.tokens, self.lengths):
                column[row] = column[last]
                column.pop()
            self.free += 1
        request.rows = []

    def ragged_logits(self, ids, at, span):
        """Logits (B, V) behind ids (B, 1), each at its position at[b], none seeing more than `span` positions."""
        return self.model.output(self.model.hidden(ids, RaggedStep(self.cache, at, span))[:, -1]).float()

    def next_logits(self):
        """Logits (B, V) of the rows in use. Compiled, all rows are run in one fixed shape, whether in use or not."""
        if self.compiled:
            idle = [0] * self.free
            return self.compiled(self.tokens + idle, self.lengths + idle)[:len(self.owner)]
        ids = torch.tensor(self.tokens, device=self.model.device)[:, None]                 # (B, 1)
        if len(set(self.lengths)) > 1:
            return self.ragged_logits(ids, torch.tensor(self.lengths, device=self.model.device), max(self.lengths) + 1)
        cache = self.cache.rows(0, len(ids), self.lengths[0])     # all stand level: slices do, without a mask
        return self.model.output(self.model.hidden(ids, cache)[:, -1]).float()

    @torch.inference_mode()
    def step(self):
        """One token more for every row: [(request, its new id, or None where there is none to show), ...]. A request
        that ended has its finish_reason, and its places are free."""
        if not self.owner:
            return []
        logits = self.next_logits()                                                        # (B, V)
        self.lengths = [n + 1 for n in self.lengths]
        chosen = logits.argmax(-1)
        requests = list(dict.fromkeys(self.owner))
        for request in requests:
            how, row = request.decoding, request.rows[0]
            if how.num_beams == 1 and (how.temperature or how.repetition_penalty != 1 or how.no_repeat_ngram_size):
                chosen[row] = sample(penalise(logits[row], request.prompt_ids + request.ids, how), how, request.generator)
        chosen, news = chosen.tolist(), []                        # the one wait for the device
        for request in requests:
            token, row = None, request.rows[0]
            if request.decoding.num_beams > 1:
                self.step_beams(request, logits[request.rows])
            else:
                token = self.tokens[row] = chosen[row]
                request.finish_reason = self.ended(request, request.ids + [token])
                if token == self.eos_id:
                    token = None
                else:
                    request.ids.append(token)
            news.append((request, token))
        for request, _ in news:
            if request.finish_reason:
                self.remove(request)
        return news

    def ended(self, request, ids):
        """Why an answer of these ids, EOS included, ends here; None if it goes on."""
        if ids[-1] == self.eos_id:
            return "stop"
        for text in request.decoding.stop:                        # an id is a byte at least: so many hold the text
            if text in self.tokenizer.decode(ids[-len(text.encode()) - 4:]):
                return "stop"
        return "length" if len(ids) >= request.decoding.max_new_tokens else None

    def step_beams(self, request, logits):
        """One step of beam search over the request's n rows with logits (n, V), as transformers' _beam_search does it with
        early_stopping False: 2n candidates by sum of log-probabilities; those that end among the best n join the
        finished, scored by sum / length ** length_penalty; the best n that do not end go on. It is over when n have
        finished and the best that runs, were it to end now, would not beat the worst of them."""
        own, n, decoding = request.rows, len(request.rows), request.decoding
        scores = torch.stack([penalise(row, request.prompt_ids + ids, decoding) + score for row, (score, ids)
                              in zip(logits.log_softmax(-1), request.beams)])              # (n, V)
        values, flat = (t.tolist() for t in scores.flatten().topk(2 * n))
        going, gone, length = [], [], len(request.beams[0][1]) + 1
        for rank, (score, i) in enumerate(zip(values, flat)):
            beam, token = divmod(i, logits.size(1))
            ids = request.beams[beam][1] + [token]
            if reason := self.ended(request, ids):
                if rank < n:
                    request.ranked.append((score / length ** decoding.length_penalty, ids[:len(ids) - (token == self.eos_id)],
                                           reason))
                gone.append((score - 1e9, ids, beam))
            elif len(going) < n:
                going.append((score, ids, beam))
        request.ranked = sorted(request.ranked, key=lambda r: -r[0])[:n]
        if not going or (len(request.ranked) == n
                         and going[0][0] / length ** decoding.length_penalty <= request.ranked[-1][0]):
            _, request.ids, request.finish_reason = request.ranked[0]
            return
        going += gone[:n - len(going)]                            # where stop texts end more than n: so that each row has a beam
        request.beams = [(score, ids) for score, ids, _ in going]
        dead, sources, targets, request.rows = [row for i, row in enumerate(own) if all(i != g[2] for g in going)], [], [], []
        for _, ids, beam in going:                                # a beam's first successor keeps its row, others get a copy
            row = own[beam]
            if row in request.rows:
                sources.append(row)
                targets.append(row := dead.pop())
            request.rows.append(row)
            self.tokens[row] = ids[-1]
        if sources:                                               # the prompt's positions are the same in all rows
            self.cache.copy_rows(sources, targets, len(request.prompt_ids) - 1, self.lengths[own[0]])


def generate_ids(model, prompt_ids, max_new_tokens, eos_id=2, tokenizer=None, **decoding):
    """Yield the ids that follow prompt_ids, at most max_new_tokens, up to EOS (which is not yielded); with beams, those
    of the best answer when it is found. The rest as in `Decoding`; stop texts want the tokenizer."""
    request = Request(prompt_ids, Decoding(max_new_tokens, **decoding))
    batch, shown = Batch(model, tokenizer, request.decoding.num_beams, len(prompt_ids) + max_new_tokens, eos_id), 0
    batch.add(request)
    while not request.finish_reason:
        batch.step()
        yield from request.ids[shown:]
        shown = len(request.ids)


class TextStream:
    """The text of ids as it grows: whole characters only, never a stop text nor what may become one.

    Most Chinese characters are three byte tokens in LLaMA's vocabulary: what decodes to U+FFFD at the end is held back
    until its last byte has come."""

    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.stop, self.ids, self.held, self.stopped = tokenizer, stop, [], "", False
        self.known = self.whole = 0                               # text up to id `whole` is out; decoded from id `known` on

    def push(self, *token):
        """The text that one id more allows to show, often empty. Without an id: what is left at the end; bytes still
        incomplete are dropped."""
        self.ids += token
        text = self.tokenizer.decode(self.ids[self.known:])
        if self.stopped or token and text.endswith("\ufffd"):
            return ""
        shown = self.tokenizer.decode(self.ids[self.known:self.whole])     # from the same id: the same first space is cut
        text = self.held + text.rstrip("\ufffd")[len(shown):]
        self.known, self.whole = self.whole, len(self.ids)
        if ends := [text.index(stop) for stop in self.stop if stop in text]:
            self.stopped = True
            return text[:min(ends)]
        held = max((n for s in self.stop for n in range(min(len(s), len(text) + 1)) if token and text.endswith(s[:n])), default=0)
        self.held = text[len(text) - held:]
        return text[:len(text) - held]


def stream_text(tokenizer, ids, stop=()):
    """Yield the text of ids as it grows, as `TextStream` shows it."""
    stream = TextStream(tokenizer, stop)
    for token in ids:
        yield from filter(None, [stream.push(token)])
    yield from filter(None, [stream.push()])


def ask(model, tokenizer, prompt, max_new_tokens=256, stop=(), **decoding):
    """Yield the answer to a rendered prompt as text pieces; decoding as in `generate_ids`."""
    return stream_text(tokenizer, generate_ids(model, tokenizer.encode(prompt, bos=True), max_new_tokens, stop=stop,
                                               eos_id=tokenizer.eos_id, tokenizer=tokenizer, **decoding), stop)


def read_records(path):
    """[("line 3" or, in an array, "record 3", object), ...] of a JSON array or JSON lines, whatever the extension; a BOM is
    skipped; "-" is standard input. Raises ValueError naming the file and the place."""
    path = Path("/dev/stdin" if str(path) == "-" else path)
    if not path.exists() or path.is_dir():
        raise ValueError(f"{path} not found or not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, for instance with iconv -f GBK -t UTF-8") from None
    rows, place = [], "starts as a JSON array but"
    try:
        if text.lstrip().startswith("["):
            rows = [(f"record {number}", row) for number, row in enumerate(json.loads(text), 1)]
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((place := f"line {number}", json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {place} is not JSON: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty; wanted a JSON array or one JSON object a line")
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path} {place} holds a {type(row).__name__}, wanted an object")
    return rows


def message_turns(messages):
    """Turns [(user, bot), ...] of OpenAI's messages [{role, content}] or ShareGPT's [{from, value}], the last bot None if a
    question comes last. A system text opens the first question, on a line of its own: templates have no place for it."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"messages are {messages!r:.60}, wanted a list of {{role, content}}")
    sides = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "bot", "gpt": "bot"}
    said = [(sides.get(str(m.get("role", m.get("from")))), m.get("content", m.get("value"))) for m in messages]
    for i, (side, parts) in enumerate(said):                      # OpenAI's other form of a text: [{"type": "text", "text": ...}]
        if parts and isinstance(parts, list) and all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
            said[i] = side, "\n".join(p["text"] for p in parts)
    first = int(said[0][0] == "system" and len(said) > 1)
    for i, (side, text) in enumerate(said):
        if not isinstance(text, str) or side != ("system" if i < first else ("user", "bot")[(i - first) % 2]):
            raise ValueError(f"message {i + 1} is {messages[i]!r:.60}; wanted texts of user and assistant (human and gpt) "
                             "in turn, before them one of system or none")
    texts = [text for _, text in said]
    return list(zip_longest(["\n".join(texts[:first + 1]), *texts[first + 2::2]], texts[first + 1::2]))


def read_turns(row):
    """Turns [(user, bot), ...] of a record in any of the forms of `read_instructions`; the last bot None if missing."""
    if messages := row.get("messages") or row.get("conversations"):
        return message_turns(messages)
    keys = ("context", "target") if "context" in row and "instruction" not in row else ("instruction", "output")
    pairs = [*(past if isinstance(past := row.get("history") or [], list) else [past]),
             [row.get(keys[0]), "" if row.get(keys[1]) is None else row[keys[1]]]]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{' and '.join(keys)} (or a pair of history) are {pair!r:.80}, wanted two texts")
    question = pairs.pop()[0]                                     # Med-ChatGLM's own labels go, the template brings others
    question = question.removeprefix("问题：").removesuffix("\n回答: ") if keys[0] == "context" else question
    question = " " * question.startswith("<user>: ") + question   # BenTsao's infer_literature.py leaves the space out
    return [*map(tuple, pairs), (question, row.get(keys[1]))]


def read_instructions(path, answers=False):
    """Records {instruction, input, output, and what else they hold} of a file: alpaca, with LLaMA-Factory's `history` of
    [question, answer] pairs or without; OpenAI's `messages`; ShareGPT's `conversations`; Med-ChatGLM's {context, target};
    BenTsao's literature rows. If one record of the file has several turns, all are put in the form of those rows
    (`render_turns`), as a chat of several turns is; else the question is the instruction. With answers, each record must
    end in one. Raises ValueError naming the line or record."""
    records, rows = [], read_records(path)
    for place, row in rows:
        try:
            json.dumps(row, ensure_ascii=False).encode()          # half a character would be met where its answer is written
            turns, input = read_turns(row), row.get("input") or ""
            if not isinstance(input, str):
                raise ValueError(f"input is {input!r}, wanted a text")
            if answers and not (turns[-1][1] or "").strip():
                raise ValueError("the answer (output, target, an assistant's message) is empty or missing; a record without "
                                 "one teaches nothing")
        except ValueError as error:
            raise ValueError(f"{path} {place}: {error}") from None
        records.append((row, turns, input))
    several = any(len(turns) > 1 for _, turns, _ in records)
    for i, (row, turns, input) in enumerate(records):
        question, answer = turns[-1]
        if several and not question.startswith(" <user>: "):
            question, input = render_turns([*turns[:-1], ("\n".join([question, input]) if input else question, None)]), ""
        records[i] = {**row, "instruction": question, "input": input} | ({} if answer is None else {"output": answer})
    return records


def pick_device(name):
    """The torch device of an option: "auto" is the first GPU, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()                      # meta holds nothing, and fails here too
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name, device):
    """The torch dtype of an option: "auto" is bf16 on a GPU or CPU that has instructions for it, else fp32."""
    if name == "auto":
        native = BF16_PRODUCTS if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if native else "fp32"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} unknown; choose from auto {' '.join(DTYPES)}")
    return DTYPES[name]


def load_base(path, device, dtype, base_dtype="auto"):
    """(model, tokenizer) of a base's folder in any of the three layouts, computing in dtype, its weights stored in
    base_dtype ("auto": in dtype too). Raises ValueError for an unknown base_dtype, or if the embedding has not one row per
    piece (added_tokens.json, such as Alpaca's [PAD], counts). Special ids come from tokenizer.model; a config.json with
    others, as decapoda-research/llama-7b-hf has them, is told of and not followed."""
    if base_dtype not in ("auto", *DTYPES, *QUANTISED):
        raise ValueError(f"base_dtype {base_dtype!r} unknown; choose from auto {' '.join([*DTYPES, *QUANTISED])}")
    path = find_base(path)
    tokenizer, config = Tokenizer(find_tokenizer(path)), open_checkpoint(path)[0]
    added, theirs = ((read_json_file(path / name) if (path / name).is_file() else {})
                     for name in ("added_tokens.json", "config.json"))
    if tokenizer.vocab_size + len(added) != config.vocab_size:
        raise ValueError(f"{path}: tokenizer.model has {tokenizer.vocab_size + len(added)} pieces, the model "
                         f"{config.vocab_size} embedding rows; they belong to different models")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if wrong := [f"{key} {theirs[key]}, tokenizer.model {i}" for key, i in ids.items() if theirs.get(key, i) not in (i, None)]:
        print(f"warning: {path}/config.json has {', '.join(wrong)}; tokenizer.model is followed", file=sys.stderr)
    if base_dtype in QUANTISED:
        model = quantize(load_model(path), base_dtype, device, dtype)
    else:
        model = load_model(path, device, DTYPES.get(base_dtype, dtype))
    model.compute_dtype = dtype
    return model, tokenizer


def made_with(adapter):
    """The texts among the settings that an adapter's run.json says it was trained with; {} without either."""
    made = read_json_file(info).get("config") if adapter and (info := Path(adapter) / "run.json").is_file() else {}
    return {key: value for key, value in made.items() if isinstance(value, str)} if isinstance(made, dict) else {}


def each_model(specs, template, device, dtype, base_dtype="auto"):
    """Yield (name, model, tokenizer, template, folders) for each of specs, NAME=BASE or NAME=BASE+ADAPTER. One base is in
    memory at a time; adapters on the same base are switched. template: a name for all ("": each adapter's own, med_template
    for a base). Raises ValueError for a spec that is none, before anything is loaded."""
    loaded, models = None, []
    for spec in specs:
        name, _, place = spec.partition("=")
        base, _, adapter = place.partition("+")
        if not re.fullmatch(r"[\w.-]+", name) or not base or name in [m[0] for m in models]:
            raise ValueError(f"model {spec!r}: wanted NAME=BASE or NAME=BASE+ADAPTER, each name once")
        if adapter and not (Path(adapter) / "adapter_config.json").is_file():
            raise ValueError(f"model {spec!r}: no adapter_config.json in {adapter}")
        models.append((name, find_base(base), adapter))
    for name, base, adapter in models:
        if base != loaded:
            model, tokenizer = load_base(base, device, dtype, base_dtype)
            loaded = base
        remove_adapter(model)
        if adapter:
            load_adapter(model, adapter)
        yield (name, model, tokenizer, load_template(template or made_with(adapter).get("prompt_template_name") or "med_template"),
               [base, adapter] if adapter else [base])


def flag(text):
    """A yes-or-no option as Fire users write it: --x, --x True, --x=False."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def several(decoding, n):
    """decoding n times, each with a seed of its own if it has one: seed, seed + 1, ..."""
    return [replace(decoding, seed=None if decoding.seed is None else decoding.seed + i) for i in range(n)]


def chat(answer, render, tokenizer, multi, room, about):
    """Read questions until end of input. With multi each sees the turns before it, as many as fit into room tokens.
    answer(prompt) yields text and prints it. Raises BrokenPipeError if nobody reads the answers."""
    try:
        import readline  # noqa: F401  (gives input() its line editing; Windows has none)
    except ImportError:
        pass
    print(f"{DISCLAIMER}\n/reset starts again, /save FILE keeps the conversation, /model says what answers, "
          "Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    turns = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
            command, _, path = line.partition(" ")
            if command == "/reset":
                turns = []
            elif command == "/model":
                print(about, file=sys.stderr)
            elif command == "/save":
                write_json(path.strip() or "chat.json", [{"messages": [
                    {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]}])
            elif line:
                asked = [*turns, (line, None)] if multi else [(line, None)]
                while (length := len(tokenizer.encode(render(asked), bos=True))) > room:
                    if len(asked) == 1:
                        raise ValueError(f"a question of {length} tokens, {room} fit beside its answer; shorten it, or give "
                                         "more --context")
                    asked.pop(0)
                if multi and len(asked) <= len(turns):
                    print(f"[left out, no room: the oldest {len(turns) + 1 - len(asked)} turns]", file=sys.stderr)
                turns.append([line, ""])
                for text in answer(render(asked)):
                    turns[-1][1] += text
        except KeyboardInterrupt:                                 # ends the answer or the line, not the chat
            print(file=sys.stderr)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:                    # what cannot be asked or saved
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            return


def weights_key(dtypes, base, adapter=""):
    """What tells answers of one model from those of another: the dtypes (as for `load_base`), the base's folder with size and
    time of its files, and what is in the adapter's."""
    base, (dtype, base_dtype) = find_base(base).resolve(), dtypes
    files = [file for file in (*sum(weight_files(base)[0], []), base / "params.json", base / "config.json") if file.is_file()]
    return [str(dtype), str(dtype if base_dtype == "auto" else DTYPES.get(base_dtype, base_dtype)), str(base),
            [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            *(sha256(file.read_bytes()).hexdigest() for file in (sorted(Path(adapter).glob("adapter_*.*")) if adapter else ()))]


def answer_batch(model, tokenizer, tasks, rows, compile=False):
    """Yield (number of the task, its Request, the text) of tasks [(prompt ids, Decoding), ...] as their answers end, rows
    of them at a time and of similar length: the longest prompts first, so that the memory they take is known at once."""
    if not tasks:
        return
    left, beams, running = sorted(range(len(tasks)), key=lambda i: len(tasks[i][0])), tasks[0][1].num_beams, {}
    batch = Batch(model, tokenizer, beams * max(1, min(rows, len(left))),
                  max(len(ids) + decoding.max_new_tokens for ids, decoding in tasks), compile=compile)
    while left or running:
        while left and batch.free >= beams:
            batch.add(request := Request(*tasks[left[-1]]))
            running[request] = left.pop()
        for request, _ in batch.step():
            if request.finish_reason:
                yield running.pop(request), request, "".join(stream_text(tokenizer, request.ids, request.decoding.stop))


def answer_file(model, tokenizer, tasks, output, rows, weights, compile=False):
    """Answer tasks [(record, prompt ids, Decoding), ...], rows at a time and of similar length, and append each answer
    to the file output ("": stdout) as it comes: the record with answer, finish_reason, index, and a key that stands for
    prompt, decoding and weights (what tells them apart). Started again it goes on; at the end the file is in the order
    of the tasks. Raises ValueError, and leaves it as it is, for a file with other answers."""
    keys, done = [sha256(json.dumps([i, ids, asdict(decoding), weights]).encode()).hexdigest()[:16]
                  for i, (_, ids, decoding) in enumerate(tasks)], {}
    if output and Path(output).is_file():
        *lines, torn = Path(output).read_bytes().split(b"\n")     # a kill may have cut the last line short
        try:
            done = {row["key"]: row for row in map(json.loads, lines)}
        except (ValueError, TypeError, KeyError):
            torn = b"?"
        if torn[:1] not in (b"", b"{") or not done.keys() <= set(keys):
            raise ValueError(f"{output} holds something else than answers to these questions by these weights and settings; "
                             "name another --output or delete it")
        os.truncate(output, os.path.getsize(output) - len(torn))
    left = [i for i, key in enumerate(keys) if key not in done]
    with open(output, "a", encoding="utf-8") if output else nullcontext(sys.stdout) as file, \
            tqdm(total=len(tasks), initial=len(done), unit="answer", dynamic_ncols=True) as bar:
        for at, request, text in answer_batch(model, tokenizer, [tasks[i][1:] for i in left], rows, compile):
            i = left[at]
            done[keys[i]] = {**tasks[i][0], "answer": text, "finish_reason": request.finish_reason, "index": i, "key": keys[i]}
            print(json.dumps(done[keys[i]], ensure_ascii=False), file=file, flush=True)
            bar.update()
    if Path(output).is_file():                                    # a pipe or a device stays one, a link goes on leading there
        rows = "".join(json.dumps(done[key], ensure_ascii=False) + "\n" for key in keys)
        write_atomically(os.path.realpath(output), lambda p: p.write_text(rows, encoding="utf-8"))


def marked(first, text):
    """text as HTML, what first does not have marked."""
    loops = sum(map(first.count, text)) > 50000                   # pairs of equal characters: too many to try them all
    pieces = difflib.SequenceMatcher(None, first, text, autojunk=loops).get_opcodes()
    return "".join(html.escape(text[c:d]) if tag == "equal" else f"<mark>{html.escape(text[c:d])}</mark>"
                   for tag, _, _, c, d in pieces if d > c)


def compare(models, dtypes, records, decoding, rows, folder):
    """Answer records by each of `each_model`'s models, of these dtypes, and write the table (模型效果对比) into folder, as
    compare.md, compare.csv and compare.html, where what an answer does not share with the first model's is marked."""
    folder, answers = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, model, tokenizer, template, folders in models:
        prompts = [tokenizer.encode(render_prompt(template, r["instruction"], r["input"]), bos=True) for r in records]
        path = folder / f"answers-{name}.jsonl"
        answer_file(model, tokenizer, [(r, ids, decoding) for r, ids in zip(records, prompts)], str(path), rows,
                    weights_key(dtypes, *folders))
        answers[name] = [row["answer"] for _, row in read_records(path)]
    questions = ["\n".join(filter(None, (r["instruction"], r["input"]))) for r in records]
    head, table = ["问题", *answers], list(zip(questions, *answers.values()))

    def lines(rows, line):
        return "".join(line.format("".join(row)) for row in rows)

    cell = lambda text: " " + "<br>".join(re.sub(r"([|\\])", r"\\\1", html.escape(text, quote=False)).splitlines()) + " |"
    markdown = lines([map(cell, head), ["---|"] * len(head), *(map(cell, row) for row in table)], "|{}\n")
    body = lines([[f"<th>{html.escape(h)}</th>" for h in head]] + [
        [f"<td>{html.escape(row[0])}</td>", *(f"<td>{marked(row[1], text)}</td>" for text in row[1:])]
        for row in table], "<tr>{}</tr>\n")
    page = (DATA / "compare.html").read_text(encoding="utf-8").replace("{rows}", body)
    sheet = io.StringIO(newline="")
    csv.writer(sheet).writerows([head, *table])
    for name, text in (("compare.md", markdown), ("compare.csv", "\ufeff" + sheet.getvalue()), ("compare.html", page)):
        write_atomically(folder / name, lambda p: p.write_bytes(text.encode()))
    print(f"{folder}: compare.md, compare.csv, compare.html, {len(table)} questions by {', '.join(answers)}", file=sys.stderr)


class Refused(Exception):
    """What a client gets instead of an answer: an HTTP status and the parts of OpenAI's error object."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(status, message, None, param, code)      # in the order of `send_error`


class Job(Request):
    """A client's request. `news` gets finish_reason after each step, or the model's error; `left`: nobody waits any more."""

    def __init__(self, prompt_ids, decoding):
        super().__init__(prompt_ids, decoding)
        self.news, self.left = SimpleQueue(), False


class Server(ThreadingHTTPServer):
    """OpenAI's completions API and a page. Each connection has a thread that reads, checks and waits; `run_model`, in one
    more, has the model to itself. Each name on offer is a line of waiting jobs, a batch, and a scale of the adapter (0
    for "base"): one set of weights, switched between steps. render(turns) makes a prompt; decoding is what a client
    leaves open; rows answers of max_len positions run at once, `line` more wait."""
    daemon_threads, request_queue_size = False, 128               # server_close waits for answers under way

    def __init__(self, address, model, tokenizer, adapter, render, decoding, rows, max_len, api_key="", line=64,
                 read_seconds=10):
        self.model, self.tokenizer, self.render, self.decoding = model, tokenizer, render, decoding
        self.rows, self.max_len, self.api_key, self.line, self.read_seconds = rows, max_len, api_key, line, read_seconds
        self.waiting, self.running = ({name: [] for name in (adapter, "base") if name} for _ in range(2))
        self.scales = [(module, module.scale) for _, module in lora_linears(model)]
        self.lock, self.wake, self.stopping = threading.Lock(), threading.Event(), False
        self.page = (DATA / "page.html").read_bytes()
        style, script = (b64encode(sha256(text).digest()).decode()
                         for text in re.findall(rb"<(?:style|script)>(.*?)</(?:style|script)>", self.page, re.S))
        self.policy = (f"default-src 'none'; connect-src 'self'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
                       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        super().__init__(address, Handler)

    def verify_request(self, request, client_address):
        return threading.active_count() < 4 * self.line           # a connection is a thread

    def busy(self):
        """How many jobs wait and run; under the lock, so that none slips in behind the last look."""
        with self.lock:
            return sum(map(len, (*self.waiting.values(), *self.running.values())))

    def submit(self, name, jobs):
        """Put jobs into the line. Raises Refused if it is full or the server stops."""
        with self.lock:
            for line in self.waiting.values():
                line[:] = [job for job in line if not job.left]
            if self.stopping:
                raise Refused(503, "the server is stopping")
            if sum(map(len, self.waiting.values())) + len(jobs) > self.line:
                raise Refused(429, f"{self.line} answers are waited for already; try again later", None, "rate_limit_exceeded")
            self.waiting[name] += jobs
        self.wake.set()

    def run_model(self):
        """Decode until `stopping` is set and every job has its answer."""
        batches = {}
        while not self.stopping or self.busy():
            self.wake.wait(0.5)                                   # not for ever: a signal handler only sets `stopping`
            self.wake.clear()
            for name in [name for name in self.waiting if self.waiting[name] or self.running[name]]:
                running = self.running[name]
                for module, scale in self.scales:
                    module.scale = 0.0 if name == "base" else scale
                try:
                    batch = batches.get(name)
                    with self.lock:
                        line, free = [job for job in self.waiting[name] if not job.left], batch.free if batch else self.rows
                        running += (joining := line[:free])
                        self.waiting[name][:] = line[free:]       # before a batch is made: who waits is told if none can be
                    batch = batches[name] = batch or Batch(self.model, self.tokenizer, self.rows, self.max_len)
                    for job in joining:
                        batch.add(job)
                    for job in [job for job in running if job.left]:
                        batch.remove(job)
                        running.remove(job)
                    for job, _ in batch.step():
                        if job.finish_reason:
                            running.remove(job)
                        job.news.put(job.finish_reason)
                except Exception as error:                        # out of memory, say: tell those it hit, start a new batch
                    traceback.print_exc()
                    batches.pop(name, None)
                    while running:
                        running.pop().news.put(error)
                self.wake.set()


class TimedReader(io.RawIOBase):
    """The bytes of a socket until a deadline: a client that sends one now and then does not keep its thread."""

    def __init__(self, connection, seconds):
        self.connection, self.deadline = connection, time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """The one request of a connection."""
    protocol_version, server_version, sys_version, max_body, streaming = "HTTP/1.1", "TCM-LLM", "", 1 << 18, False
    methods = {"/": "GET", "/health": "GET", "/v1/models": "GET", "/v1/chat/completions": "POST", "/v1/completions": "POST"}
    fields = {"model": str, "messages": list, "prompt": str, "stream": bool, "stream_options": dict, "stop": (str, list),
              "user": str, **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (int, float)), **dict.
              fromkeys(("n", "seed", "max_tokens", "max_completion_tokens", "top_k", "no_repeat_ngram_size"), int)}
    nothing = {"response_format": {"type": "text"}, "tool_choice": "none", "best_of": 1}        # the others' defaults, if given

    def handle(self):
        self.rfile = io.BufferedReader(TimedReader(self.connection, self.server.read_seconds))
        with suppress(OSError):                                   # the client has left, or does not read
            super().handle()

    def send(self, status, body, kind="application/json", **headers):
        """Status, headers and body: bytes, or what becomes JSON, or None for one that follows."""
        self.connection.settimeout(10)
        self.send_response(status)
        if body is not None:
            body = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
            headers["Content-Length"] = str(len(body))
        headers |= {"Content-Type": kind, "Connection": "close", "X-Content-Type-Options": "nosniff"}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body or b"")

    def send_error(self, status, message=None, explain=None, param=None, code=None):
        """An error, http.server's own too, as OpenAI's object. What the client still sends is read, or closing would
        reset the connection before it has read this."""
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        error = {"error": {"message": message or self.responses[status][0], "type": kind, "param": param, "code": code}}
        if self.streaming:
            return self.event(error)
        self.request_version = "HTTP/1.1"
        self.send(status, error, **({"Retry_After": "1"} if status in (429, 503) else
                                    {"Allow": self.methods[self.route].replace("GET", "GET, HEAD")} if status == 405 else {}))
        self.connection.shutdown(socket.SHUT_WR)
        while time.monotonic() < self.rfile.raw.deadline and self.rfile.read1(65536):
            pass

    def event(self, value):
        self.wfile.write(f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n".encode())

    def do_GET(self):
        server, path, jobs = self.server, self.path.partition("?")[0], []
        one = unquote(path.partition("/v1/models/")[2]) if path.startswith("/v1/models/") else ""           # a model's name
        self.route = path = "/v1/models" if one else path
        try:
            self.admit(path)
            if path == "/":
                self.send(200, server.page, "text/html; charset=utf-8", Content_Security_Policy=server.policy)
            elif path == "/health":
                waiting, running = (sum(map(len, lines.values())) for lines in (server.waiting, server.running))
                self.send(200, {"status": "stopping" if server.stopping else "ok", "places": server.rows,
                                "waiting": waiting, "running": running})
            elif path == "/v1/models":
                card = {"object": "model", "created": 0, "owned_by": "local", "defaults": {
                    **asdict(server.decoding), "max_tokens": server.decoding.max_new_tokens}}
                self.send(200, {"id": self.known(one), **card} if one else {"object": "list", "data": [
                    {"id": name, **card} for name in server.waiting]})
            else:
                self.complete(self.read_json(), path.startswith("/v1/chat"), jobs)
        except Refused as error:
            self.send_error(*error.args)
        finally:
            for job in jobs:
                job.left = True

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def known(self, name):
        if name not in self.server.waiting:
            raise Refused(404, f"no model {name:.100}; there are {' '.join(self.server.waiting)}", "model", "model_not_found")
        return name

    def admit(self, path):
        """Raise Refused for an unknown path or method, a wrong key, or a page of another site: a browser lets any page
        send to localhost and, under a name that leads there (DNS rebinding), read the answer."""
        key, host, origin = (self.server.api_key, *(self.headers.get(name, "").lower() for name in ("Host", "Origin")))
        given = self.headers.get("Authorization", "").encode("latin-1")
        for wrong, *refusal in (
                (path not in self.methods, 404, f"no such path; there are {' '.join(self.methods)}"),
                (self.methods.get(path) != self.command.replace("HEAD", "GET"), 405, f"{path} takes {self.methods.get(path)}"),
                (origin and origin.partition("://")[2] != host or not key and host.partition(":")[0] not in LOCAL,
                 403, "requests from other sites' pages are not answered"),
                (key and path.startswith("/v1/") and not hmac.compare_digest(given, f"Bearer {key}".encode()),
                 401, "no API key or a wrong one; send Authorization: Bearer KEY", None, "invalid_api_key")):
            if wrong:
                raise Refused(*refusal)

    def read_json(self):
        """The object in the body, its fields checked for their types; nulls are left out."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refused(411, "a Content-Length is wanted")
        if len(length) > 9 or int(length) > self.max_body:
            raise Refused(413, f"the body is larger than {self.max_body} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)).decode())
            json.dumps(body, ensure_ascii=False).encode()         # lone surrogates are no text
        except TimeoutError:
            raise Refused(408, f"the body did not come within {self.server.read_seconds} seconds") from None
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON in UTF-8 ({str(error)[:100]})") from None
        if not isinstance(body, dict):
            raise Refused(400, f"the body is a {type(body).__name__}, wanted an object")
        for name, value in body.items():
            kind = self.fields.get(name)
            if kind is None and value and self.nothing.get(name) != value:             # null, false, 0, "" and [] ask for nothing
                raise Refused(400, f"{name:.100} is not supported", name, "unsupported_parameter")
            if kind and value is not None and (not isinstance(value, kind) or isinstance(value, bool) and kind is not bool):
                wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else [kind]))
                raise Refused(400, f"{name} is a {type(value).__name__}, wanted {wanted}", name)
        return {name: value for name, value in body.items() if value is not None and name in self.fields}

    def complete(self, body, chat, jobs):
        """Put the jobs that a body asks for into the line (and into jobs) and send their answers."""
        server, (wanted, other) = self.server, ("messages", "prompt") if chat else ("prompt", "messages")
        name, n, options = body.get("model", next(iter(server.waiting))), body.get("n", 1), body.get("stream_options", {})
        tokens, stops = body.get("max_completion_tokens", body.get("max_tokens")), body.get("stop", [])
        more = [key for m in body.get("messages", []) if isinstance(m, dict)
                for key in m if m[key] and key not in ("role", "content", "name")]
        for wrong, *refusal in (
                (not body.get(wanted) or other in body, 400, f"{wanted} is wanted, and no {other}", wanted),
                (more, 400, f"messages: {''.join(more[:1]):.100} is not supported", "messages", "unsupported_parameter"),
                (not 1 <= n <= server.rows, 400, f"n is {n}, wanted 1 to {server.rows}", "n"),
                (len(stops) > (400 if isinstance(stops, str) else 4) or any(len(str(text)) > 400 for text in stops), 400,
                 "stop has more than 4 texts, or one of more than 400 characters", "stop"),
                (set(options) - {"include_usage"}, 400, "stream_options has include_usage alone", "stream_options",
                 "unsupported_parameter")):
            if wrong:
                raise Refused(*refusal)
        self.known(name)
        try:
            turns = message_turns(body["messages"]) if chat else []
            if chat and turns[-1][1] is not None:
                raise ValueError("messages end with an answer, wanted a question")
            ids = server.tokenizer.encode(server.render(turns) if chat else body["prompt"], bos=True)
            room = server.max_len - len(ids)
            if room < (tokens or 1):
                raise Refused(400, f"{len(ids)} tokens of prompt and {tokens or 1} new ones, {server.max_len} fit", wanted,
                              "context_length_exceeded")
            decoding = replace(server.decoding, **{k: v for k, v in body.items() if k in Decoding.__dataclass_fields__},
                               max_new_tokens=min(room, server.decoding.max_new_tokens) if tokens is None else tokens)
            jobs += [Job(ids, one) for one in several(decoding, n)]
        except ValueError as error:
            message = str(error).replace("max_new_tokens", "max_tokens")
            param = message.split()[0]
            raise Refused(400, message, param if param in self.fields else wanted) from None
        server.submit(name, jobs)
        stream = body.get("stream", False)
        kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
        head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}", "object": kind, "created": int(time.time()),
                "model": name}

        def choice(i, text, reason=None, **role):
            content = {"delta" if stream else "message": {**role, "content": text}} if chat else {"text": text}
            return {"index": i, **content, "logprobs": None, "finish_reason": reason}

        if stream:
            self.send(200, None, "text/event-stream")
            self.streaming = True
            for i, job in enumerate(jobs):
                self.event({**head, "choices": [choice(i, "", role="assistant")]})
                for text in filter(None, self.texts(job)):
                    self.event({**head, "choices": [choice(i, text)]})
                self.event({**head, "choices": [choice(i, "", job.finish_reason)]})
        else:
            head["choices"] = [choice(i, "".join(self.texts(job)), job.finish_reason, role="assistant")
                               for i, job in enumerate(jobs)]
        made = sum(len(job.ids) for job in jobs)
        usage = {"prompt_tokens": len(ids), "completion_tokens": made, "total_tokens": len(ids) + made}
        if not stream:
            self.send(200, {**head, "usage": usage})
        else:
            if options.get("include_usage"):
                self.event({**head, "choices": [], "usage": usage})
            self.event("[DONE]")

    def texts(self, job):
        """Yield a job's answer as it grows. Raises OSError when the client has left, Refused when the model failed."""
        stream, shown, reason = TextStream(self.server.tokenizer, job.decoding.stop), 0, None
        while reason is None:
            with suppress(Empty):
                reason = job.news.get(timeout=1)
            if isinstance(reason, Exception):
                raise Refused(500, f"the model failed: {type(reason).__name__}")
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1 << 20):        # more than a body
                raise ConnectionAbortedError
            ids = job.ids[shown:]
            shown += len(ids)
            yield "".join(map(stream.push, ids))
        yield stream.push()


def serve(server):
    """Serve until SIGTERM or Ctrl-C, then let the answers under way finish; a second one ends at once."""
    def stop(number, frame):
        server.stopping = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("http://{}:{}/  models: {}".format(*server.server_address, " ".join(server.waiting)), file=sys.stderr, flush=True)
    server.run_model()
    server.shutdown()
    server.server_close()


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", help="one question; without it, --instruct_dir and --serve, a chat")
    parser.add_argument("--input", default="", help="context of the question (the template's {input})")
    parser.add_argument("--base_model", default="", help="folder of the base (empty: the one the adapter was trained on)")
    parser.add_argument("--lora_weights", default="lora-tcm", help="folder of the adapter")
    parser.add_argument("--use_lora", type=flag, nargs="?", const=True, default=True, help="False asks the base alone")
    parser.add_argument("--instruct_dir", default="", help="a file of questions, JSON array or lines; - is standard input")
    parser.add_argument("--compare", nargs="+", default=(), help="several models, NAME=BASE or NAME=BASE+ADAPTER, answer "
                        "--instruct_dir; their table goes into the folder --output")
    parser.add_argument("--output", default="", help="file for the answers to --instruct_dir, as JSON lines; a run that was "
                        "stopped goes on from it")
    parser.add_argument("--batch_size", type=int, default=8, help="answers decoded together (--instruct_dir, --serve)")
    parser.add_argument("--n", type=int, default=1, help="answers to each question")
    parser.add_argument("--prompt_template", default="", help="name in data/templates or path (empty: the adapter's own)")
    parser.add_argument("--single_or_multi", choices=("single", "multi"), default="single",
                        help="multi: a chat shows the model the turns before, in BenTsao's <user>: <bot>: form")
    parser.add_argument("--context", type=int, default=2048, help="tokens of question and answer at most (chat, --serve)")
    # BenTsao passes temperature 0.1 but decodes by beams without sampling, so it has no effect there: greedy is ours
    for name, kind, default, text in (
            ("max_new_tokens", int, 256, "tokens of an answer at most"),
            ("temperature", float, 0.0, "0 takes the likeliest token, above 0 samples"),
            ("top_k", int, 40, "sample among the k likeliest (0: all)"),
            ("top_p", float, 0.75, "sample among the likeliest that hold this mass"),
            ("min_p", float, 0.0, "sample among those with this share of the likeliest's probability"),
            ("repetition_penalty", float, 1.0, "above 1 makes what stands there already less likely"),
            ("no_repeat_ngram_size", int, 0, "no run of so many tokens twice (0: any)"),
            ("num_beams", int, 1, "beam search of this width"),
            ("length_penalty", float, 1.0, "of beams: above 1 prefers longer answers"),
            ("seed", int, None, "makes sampled answers repeatable")):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--stop", nargs="+", default=(), help="texts that end an answer")
    parser.add_argument("--serve", type=flag, nargs="?", const=True, default=False, help="OpenAI's API and a page")
    parser.add_argument("--host", default=os.environ.get("API_HOST") or "127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=os.environ.get("API_PORT") or 8000, help="and port (0: a free one)")
    parser.add_argument("--api_key", default="", help="key that clients must send (better in the environment: API_KEY)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", help="of the activations: auto, bf16, fp16, fp32")
    parser.add_argument("--base_dtype", default="auto", help="of the base as stored: auto (--dtype), bf16, fp16, fp32, int8, nf4")
    parser.add_argument("--load_8bit", type=flag, nargs="?", const=True, default=False, help="the same as --base_dtype int8")
    parser.add_argument("--merge", type=flag, nargs="?", const=True, default=False, help="fold the adapter into the weights: "
                        "faster by its two thin products a linear, but bf16 rounds a part of the update away")
    parser.add_argument("--compile", type=flag, nargs="?", const=True, default=False,
                        help="compile the step that decodes (--instruct_dir): pays for files of many questions")
    args = parser.parse_args()
    decoding = Decoding(**{name: getattr(args, name) for name in Decoding.__dataclass_fields__})
    for name in ("n", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, wanted 1 or more")
    key, asked = args.api_key or os.environ.get("API_KEY", ""), args.prompt is not None
    given = asked or args.instruct_dir
    for wrong, message in (
            (args.prompt == "", "the question is empty; leave it out for a chat"),
            (bool(args.instruct_dir) + asked + args.serve > 1, "wanted one of a question, --instruct_dir and --serve"),
            (args.input and not asked, "--input wants a question that it is the context of"),
            (args.output and not args.instruct_dir, "--output wants a file of questions (--instruct_dir)"),
            (not (given or args.serve or sys.stdin and sys.stdout),
             "a chat wants standard input and output, and one is closed; give a question, or --instruct_dir"),
            (args.n > 1 and not given, "--n wants a question or --instruct_dir"),
            (not given and args.context <= args.max_new_tokens,
             f"context {args.context} leaves no room for a question beside {args.max_new_tokens} new tokens"),
            (args.serve and args.host not in LOCAL and not key,
             f"host {args.host} opens the model to other machines; give --api_key too, or stay on 127.0.0.1"),
            (not 0 <= args.port <= 65535, f"port is {args.port}, wanted 0 to 65535"),
            (args.merge and (args.serve or not args.use_lora),
             "--merge wants an adapter that is the only model asked: leave out --serve and --use_lora False"),
            (args.compile and not args.instruct_dir,
             "--compile takes a minute that only a file of questions (--instruct_dir) gives back; leave it out"),
            (args.serve and args.num_beams > 1, "the server streams and does not search with beams; leave --num_beams out"),
            (args.compare and not (args.instruct_dir and args.output),
             "--compare wants questions (--instruct_dir FILE) and a folder for the table (--output FOLDER)"),
            (args.compare and (args.n > 1 or args.compile or args.merge or args.base_model),
             "--compare asks each of its models once, unmerged: leave out --n, --compile, --merge and --base_model")):
        if wrong:
            raise ValueError(message)

    questions = read_instructions(args.instruct_dir) if args.instruct_dir else []
    device, multi = pick_device(args.device), args.single_or_multi == "multi"
    dtypes = pick_dtype(args.dtype, device), "int8" if args.load_8bit else args.base_dtype
    if args.compare:
        return compare(each_model(args.compare, args.prompt_template, device, *dtypes), dtypes, questions, decoding,
                       args.batch_size, args.output)
    if args.use_lora and not Path(args.lora_weights).is_dir():
        raise ValueError(f"no adapter at {args.lora_weights}; run python train.py first, name one with --lora_weights, or ask "
                         "the base alone with --use_lora False")
    made = made_with(args.lora_weights if args.use_lora else "")
    base = args.base_model or made.get("base_model") or str(DATA / "tiny")
    template = load_template(args.prompt_template or made.get("prompt_template_name") or "med_template")
    model, tokenizer = load_base(base, device, *dtypes)
    if args.use_lora:
        load_adapter(model, args.lora_weights)
    if args.merge:
        errors = merge(model).values()
        print(f"merged {len(errors)} linears; the updates lose {sum(errors) / len(errors):.1%} to {model.dtype}", file=sys.stderr)
    decodings = several(decoding, args.n)

    def render(turns):
        """The prompt for the last of turns [(user, bot), ..., (user, None)]: a lone question stands as in a record of one
        turn, unless --single_or_multi multi; a conversation in BenTsao's form."""
        return render_prompt(template, render_turns(turns) if multi or len(turns) > 1 else turns[0][0])

    def answer(prompt, decoding=decodings[0]):
        """Stream one answer to stdout, its speed to stderr; yield its text."""
        started, ids = time.time(), []
        new = generate_ids(model, tokenizer.encode(prompt, bos=True), eos_id=tokenizer.eos_id, tokenizer=tokenizer,
                           **asdict(decoding))
        try:
            for text in stream_text(tokenizer, (ids.append(i) or i for i in new), decoding.stop):
                print(text, end="", flush=True)
                yield text
        finally:                                                  # also where Ctrl-C ends it
            print(flush=True)
            print(f"[{len(ids)} tokens, {len(ids) / (time.time() - started):.0f} tokens/s]", file=sys.stderr)

    if args.serve:
        name = Path(args.lora_weights).resolve().name if args.use_lora else ""
        serve(Server((args.host, args.port), model, tokenizer, "tuned" if name == "base" else name, render, decoding,
                     args.batch_size, args.context, key))
    elif args.instruct_dir:
        prompts = [tokenizer.encode(render_prompt(template, q["instruction"], q["input"]), bos=True) for q in questions]
        answer_file(model, tokenizer, [(q, ids, decoding) for q, ids in zip(questions, prompts) for decoding in decodings],
                    args.output, args.batch_size,
                    weights_key(dtypes, base, args.lora_weights if args.use_lora else "") + ["merged"] * args.merge, args.compile)
    elif args.prompt:
        for decoding in decodings:
            for _ in answer(render_prompt(template, args.prompt, args.input), decoding):
                pass
        print(DISCLAIMER, file=sys.stderr)
    else:
        sys.stdin.reconfigure(errors="surrogateescape")           # a line that is no UTF-8 is refused, and those after it read
        chat(answer, render, tokenizer, multi, args.context - args.max_new_tokens,
             f"{base}{f' with {args.lora_weights}' * args.use_lora} on {device}, {model.dtype}; {template['description']}")


if __name__ == "__main__":
    run(main)
