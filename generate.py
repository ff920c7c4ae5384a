"""Text in, text out: how a model answers, and four ways to ask it.

  python generate.py "偏头痛有哪些症状？"                one question
  python generate.py                                   a chat
  python generate.py --instruct_dir questions.json     a file, JSON array or lines; - is stdin
  python generate.py --serve                           OpenAI's API and a page, on localhost:8000

What this file teaches, in this order:

  tokenizer   Tokenizer: text to ids and back
  prompt      render_prompt: a conversation as training saw it
  sampling    Decoding, penalise, sample: from logits to the next id
  batch       Request, Row, Batch: many answers, an id each a step, in one KV cache
  one answer  generate_ids: the ids that follow a prompt

Below the lesson stand beams, log-probabilities, rows of the base, the compiled step, texts as they
grow, tokenizers of other bases, templates, records, models, answers to a file, chat, server, and
the commands.

Letters: B rows of the batch, V vocabulary size, n beams. Logits, and all that is made of them, are
float32. Answers go to stdout, everything else to stderr.
"""

import asyncio
import csv
import hmac
import json
import os
import re
import socket
import sys
import time
import traceback
import unicodedata
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from hashlib import sha256
from heapq import heappop, heappush
from http import HTTPStatus
from io import StringIO
from itertools import count, cycle
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

from lora import adapter_base, load_adapter, lora_linears, merge, quantize, share_rows
from model import (
    DATA,
    DTYPES,
    SMALL,
    TOKENIZERS,
    Checkpoint,
    Parser,
    check_content,
    check_own,
    check_settings,
    find_base,
    find_tokenizer,
    hold,
    load_model,
    log_if_read,
    printable,
    read_json_file,
    run,
    setting,
    stop_signals,
    to_json,
    write_hashes,
    write_json,
)

import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

PREFILL_CHUNK = 512  # tokens of a prompt in one forward

# --------------------------------------------------------------------------------------------------
# Tokenizer and prompt


class Tokenizer:
    """SentencePiece with LLaMA's special ids, which come from tokenizer.model and nowhere else.
    special: {name: id} of tokens that are no text; a text that spells one is only a text. Raises
    RuntimeError for a file that is no such model. Other kinds stand below the lesson."""

    unsettled = "\ufffd"  # what the end of a growing text may be that the next id changes
    leading = ""  # what an answer begins with and nobody wants to see
    bos_id = property(lambda self: next(iter(self.opening), None))  # opening: ids before a prompt

    def __init__(self, path, more=b""):
        model = Path(path).read_bytes() + more
        self.pieces = SentencePieceProcessor(model_proto=model)
        self.answer_pieces = SentencePieceProcessor(model_proto=model + NO_SPACE_IN_FRONT)
        self.vocab_size = len(self.pieces)
        ids = range(self.vocab_size)
        self.special = {self.pieces.id_to_piece(i): i for i in ids if self.pieces.is_control(i)}
        self.texts = {*ids} - {*self.special.values()}
        self.opening, self.eos_id = [self.pieces.bos_id()], self.pieces.eos_id()

    def encode(self, text, bos=False, eos=False):
        """Ids of a text. Raises ValueError for half a character, which is no Unicode text."""
        text.encode()  # Python's own sentence names the character
        return self.opening * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def encode_answer(self, text):
        """Ids of a text behind a prompt: without the space that SentencePiece puts in front."""
        text.encode()
        return self.answer_pieces.encode(text)

    def decode(self, ids):
        """The text of ids: U+FFFD for half a character, none for special ids and unknown ones."""
        return self.pieces.decode([i for i in ids if i in self.texts])


def render_prompt(tokenizer, template, messages, several=False):
    """Ids of the prompt that asks for the next answer in a conversation, [{role, content}, ...].
    Asking, chatting and serving make it here, and training makes the same of the same parts."""
    prompt, _ = render(template, asked(messages), several)
    return encode_rendered(tokenizer, prompt)[0]


# --------------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen, by the command line or a client. Names and meanings are
    transformers', those of n, seed and stop OpenAI's; greedy by default, as BenTsao's beams in
    effect are. Raises ValueError."""

    # how an answer is chosen

    max_new_tokens: int = 256  # tokens of an answer at most
    temperature: float = setting(0.0, 0, 1e6)  # 0 takes the likeliest token, above 0 samples
    top_k: int = setting(40, 0)  # sample among the k likeliest (0: all)
    top_p: float = setting(0.75, high=1)  # sample among the likeliest that hold this mass
    min_p: float = setting(0.0, 0, 1)  # sample among those with this share of the likeliest's
    repetition_penalty: float = setting(1.0, 1e-6, 1e6)  # above 1: less of what is there
    no_repeat_ngram_size: int = 0  # no run of so many tokens twice (0: any)
    num_beams: int = 1  # beam search of this width, which does not sample
    length_penalty: float = setting(1.0, -20, 20)  # of beams: score = sum / length ** this
    n: int = 1  # answers to each question
    seed: int = setting(None, -(2**63), 2**63 - 1)  # of samples; the next answer's is seed + 1
    stop: tuple = ()  # texts that end an answer and are no part of it

    def __post_init__(self):
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop is {stop!r:.100}, wanted texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))
        check_settings(self)
        if 0 < self.temperature < 1e-6:
            raise ValueError(f"temperature is {self.temperature}, wanted 0 or 1e-6 and more")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("num_beams with temperature: beam search does not sample; drop one")

    def each(self):
        """The Decoding of each of n answers."""
        last = 2**63 - 1  # no seed is greater
        seeds = [
            self.seed if self.seed is None else min(self.seed + i, last) for i in range(self.n)
        ]
        return [replace(self, n=1, seed=seed) for seed in seeds]


def penalise(logits, ids, decoding):
    """logits (V,) with the ids (prompt and answer so far) made less likely: by repetition_penalty
    (Keskar et al. 2019, 4.1), and -inf for each id that would repeat an n-gram of
    no_repeat_ngram_size (Paulus et al. 2018, 2.5)."""
    penalty, n = decoding.repetition_penalty, decoding.no_repeat_ngram_size
    # A negative score is multiplied, or it would become likelier.
    if penalty != 1:
        seen = torch.tensor(ids, device=logits.device)
        score = logits[seen]
        score = torch.where(score < 0, score * penalty, score / penalty)
        logits = logits.scatter(0, seen, score)
    # Which ids followed, wherever the last n - 1 ids stood before?
    if n:
        last = ids[len(ids) - n + 1 :]
        banned = [ids[i] for i in range(n - 1, len(ids)) if ids[i - n + 1 : i] == last]
        banned = torch.tensor(banned, dtype=torch.long, device=logits.device)
        logits = logits.index_fill(0, banned, -torch.inf)
    return logits


def sample(logits, decoding, generator=None):
    """One id, a tensor (), from logits (V,): the greatest at temperature 0; else drawn from
    softmax(logits / temperature), of the top_k greatest, then of the fewest that hold top_p of the
    mass (Holtzman et al. 2020), then of those of min_p times the greatest probability and more
    (Nguyen et al. 2024), in transformers' order."""
    if decoding.temperature == 0:
        return logits.argmax()
    logits = logits / decoding.temperature
    # Each filter sets what it excludes to -inf, so that the next one does not see it.
    if 0 < decoding.top_k < logits.numel():
        least = logits.topk(decoding.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if decoding.top_p < 1:
        # ascending, so that the small ones are summed first
        ordered, order = logits.sort()
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - decoding.top_p
        outside[-1] = False
        logits = logits.masked_fill(outside.scatter(0, order, outside), -torch.inf)
    probs = logits.softmax(-1)
    probs = probs.masked_fill(probs < decoding.min_p * probs.max(), 0.0)
    # argmax of p / Exp(1) draws from p (the exponential race), without multinomial's wait for a GPU
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax()


# --------------------------------------------------------------------------------------------------
# Batch


@dataclass(eq=False)
class Request:
    """A prompt, how to answer it, and the answer so far. A beam search has its ids at the end."""

    prompt_ids: list
    decoding: Decoding
    adapted: bool = True  # False: the base answers, without the adapter
    ids: list = field(default_factory=list)  # of the answer, without EOS
    finish_reason: str = None  # when it has ended: "stop" (EOS or a stop text) or "length"
    cancelled: bool = False  # nobody waits for it any more
    generator: torch.Generator = None
    ranked: list = field(default_factory=list)  # beams that ended, best first
    logprobs: list = None  # where it is a list, `note_logprobs` fills it

    @property
    def positions(self):
        return len(self.prompt_ids) + self.decoding.max_new_tokens  # at most


@dataclass(eq=False)
class Row:
    """A row of the cache: it holds keys and values of all ids but the last."""

    request: Request
    ids: list  # prompt and answer so far
    score: float = 0.0  # of a beam: sum of log-probabilities
    parent: int = 0  # of a beam: the row that holds its keys and values


class Batch:
    """Requests decoded together in one KV cache of `size` rows. They wait until num_beams rows are
    free. Rows stand at their own lengths, so that each answer is what it would be alone.

    eos_id, an id or several, ends an answer; decode(ids) -> text finds stop texts. Raises
    ValueError if memory cannot hold the cache."""

    def __init__(self, model, size, positions, eos_id=None, decode=None, compile=False):
        self.model, self.size = model, size
        self.eos_ids = [eos_id] if isinstance(eos_id, int) else eos_id or []
        self.decode = decode
        self.waiting = []  # Requests
        self.rows = []  # the Rows in use: rows[i] is row i of the cache
        self.adapted = None  # as the adapter is scaled now
        try:
            self.cache = model.new_cache(size, positions)
        except RuntimeError:
            text = f"{size} rows of {positions} tokens do not fit into memory"
            raise ValueError(f"{text}; lower batch_size, context or max_new_tokens") from None
        self.forward = compile_step(self) if compile else self.logits

    def submit(self, request):
        """Let a request wait for rows. Raises Refused if it can never have them."""
        length, beams = len(request.prompt_ids), request.decoding.num_beams
        if not length or request.positions > self.cache.positions or beams > self.size:
            raise Refused(
                f"a prompt of {length} tokens, {request.positions} with its answer, by {beams} "
                f"beams, does not fit into {self.size} rows of {self.cache.positions}",
                code="context_length_exceeded",
            )
        self.waiting.append(request)

    @torch.inference_mode()
    def step(self):
        """Make one id more for each request that has rows."""
        # Those that ended leave their rows, those that wait take them.
        self.release()
        while self.waiting and len(self.rows) + self.waiting[0].decoding.num_beams <= self.size:
            self.admit(self.waiting[0])
            self.waiting.pop(0)  # not before: after an error it still waits
        if not self.rows:
            return
        # One forward for all: the last id of each row, behind so many positions.
        scale_adapter(self, [row.request.adapted for row in self.rows])
        fed = [[r.ids[-1], len(r.ids) - 1, len(r.request.prompt_ids) - 1] for r in self.rows]
        longest = max(length for _, length, _ in fed)
        logits = self.forward(torch.tensor(fed, device=self.model.device), longest)  # (B, V)
        # One choice for all; beams then choose among themselves.
        chosen = self.choose(logits)
        for request in {row.request for row in self.rows}:
            i, *others = at = [i for i, row in enumerate(self.rows) if row.request is request]
            if others:
                step_beams(self, request, at, logits[at])
            else:
                ids = self.rows[i].ids
                ids.append(chosen[i])
                note_logprobs(request, logits[i, None], ids[-1:])
                request.ids, request.finish_reason = self.outcome(request, ids)

    def release(self):
        """Free the rows of requests that ended or were cancelled; the last rows fill the gaps."""
        for request in self.waiting[:]:
            if request.cancelled:
                self.waiting.remove(request)
        # From the end: the last row is then one that stays, and may fill the gap.
        for i in reversed(range(len(self.rows))):
            request = self.rows[i].request
            if request.finish_reason or request.cancelled:
                last = self.rows.pop()
                if i < len(self.rows):
                    self.cache.copy_rows([(len(self.rows), i)], 0, len(last.ids) - 1)
                    self.rows[i] = last

    def admit(self, request):
        """Give a request rows: run its prompt but for the last id, which the next step feeds."""
        n, seed = request.decoding.num_beams, request.decoding.seed
        device, first = self.model.device, len(self.rows)
        if seed is not None:
            request.generator = torch.Generator(device).manual_seed(seed)
        scale_adapter(self, [request.adapted])
        # In chunks, which bound the memory of the activations; a prefix that sees itself in one.
        (*ids, _) = prompt = request.prompt_ids
        prefix = len(ids) * self.model.config.prefix_lm
        cache, size = self.cache.rows(first, [0], prefix=prefix), prefix or PREFILL_CHUNK
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            hidden = self.model.hidden_states(torch.tensor([chunk], device=device), cache)
            if request.logprobs:  # begins with the prompt's
                note_logprobs(request, self.model.lm_head(hidden)[0], prompt[start + 1 :])
        # All beams begin with the prompt; the first alone may be chosen from, so that they part.
        self.cache.copy_rows([(first, first + i) for i in range(1, n)], 0, len(ids))
        self.rows += [Row(request, prompt[:], -1e9 * (i > 0)) for i in range(n)]

    def logits(self, fed, longest):
        """Logits (B, V) of fed (B, 3): each row's id, how many stand before it (<= longest), and
        how many stood before its prompt's last: the prefix, in a network that has one."""
        ids, lengths, prefix = fed.split(1, dim=1)
        cache = self.cache.rows(0, lengths[:, 0], longest, prefix)
        return self.model(ids, cache)[:, -1]

    def choose(self, logits):
        """The next id of each row, B of them, from logits (B, V)."""
        chosen = logits.argmax(-1)
        for i, row in enumerate(self.rows):
            # Only rows that sample, or whose logits change, need a look of their own; beams choose
            # for themselves.
            d = row.request.decoding
            changed = d.temperature or d.repetition_penalty != 1 or d.no_repeat_ngram_size
            if changed and d.num_beams == 1:
                chosen[i] = sample(penalise(logits[i], row.ids, d), d, row.request.generator)
        return chosen.tolist()  # the one wait for the device

    def outcome(self, request, ids):
        """(answer, finish_reason or None) of ids: a prompt, an answer, and perhaps EOS."""
        answer = ids[len(request.prompt_ids) :]
        if ids[-1] in self.eos_ids:
            return answer[:-1], "stop"
        for text in request.decoding.stop:
            # an id is a byte at least, so that the text lies within so many
            if text in self.decode(answer[-len(text.encode()) - 4 :]):
                return answer, "stop"
        return answer, "length" if len(ids) == request.positions else None


# --------------------------------------------------------------------------------------------------
# One answer


def generate_ids(model, prompt_ids, max_new_tokens, eos_id=None, **decoding):
    """Yield the ids that follow prompt_ids, at most max_new_tokens, up to eos_id; with beams, those
    of the best answer when it is found. The rest is as in `Decoding`, but for stop texts."""
    request = Request(prompt_ids, Decoding(max_new_tokens, **decoding))
    batch = Batch(model, request.decoding.num_beams, request.positions, eos_id)
    batch.submit(request)
    count = 0
    while not request.finish_reason:
        batch.step()
        yield from request.ids[count:]
        count = len(request.ids)


# ==================================================================================================
# Beams


def step_beams(batch, request, at, logits):
    """One step of beam search over the n rows `at` of a request with logits (n, V), as
    transformers does it with early_stopping False: of the 2n best candidates by sum of
    log-probabilities (more with several ids of EOS, so that n of them do not end), those among the
    first n that end are ranked, by sum / length ** length_penalty, and the best n that do not end
    go on. It is over when n are ranked and the best that goes on, ending now, would beat none."""
    beams = [batch.rows[i] for i in at]
    n = len(at)
    # Each candidate is a beam and one id more: n V of them, of which a few are looked at.
    scores = [
        penalise(logprobs, beam.ids, request.decoding) + beam.score
        for logprobs, beam in zip(logits.log_softmax(-1), beams)
    ]
    best = torch.cat(scores).topk(max(2, 1 + len(batch.eos_ids)) * n)
    first = len(request.prompt_ids) - 1
    length = len(beams[0].ids)
    scale = (length - first) ** request.decoding.length_penalty

    # Candidates that end are ranked, the others go on; both best first.
    going = []
    for rank, (score, index) in enumerate(zip(*map(torch.Tensor.tolist, best))):
        parent, token = divmod(index, logits.size(1))
        beam = Row(request, beams[parent].ids + [token], score, at[parent])
        if not batch.outcome(request, beam.ids)[1]:
            going.append(beam)
        elif rank < n:
            request.ranked.append(replace(beam, score=score / scale))
    request.ranked = sorted(request.ranked, key=lambda beam: -beam.score)[:n]

    # Over, if the best that goes on cannot get past the worst of those ranked.
    full = len(request.ranked) == n
    if not going or full and going[0].score / scale <= request.ranked[-1].score:
        request.ids, request.finish_reason = batch.outcome(request, request.ranked[0].ids)
        return
    # Where stop texts end so many that rows are left over, these go on without a chance.
    going += [replace(going[0], score=-1e9)] * n
    # Each beam's row takes over the keys and values of its parent's; in the prompt all are equal.
    moves = [(beam.parent, i) for i, beam in zip(at, going) if beam.parent != i]
    batch.cache.copy_rows(moves, first, length)
    for i, beam in zip(at, going):
        batch.rows[i] = beam


# ==================================================================================================
# Log-probabilities


def note_logprobs(request, logits, ids):
    """Note on a request that wants it, of each id behind its row of logits (T, V): (id,
    log-probability), and then the same of the 20 likeliest ids."""
    if request.logprobs is not None:
        for id, row in zip(ids, logits.float().log_softmax(-1)):
            some = [id, *row.topk(20).indices.tolist()]
            request.logprobs.append([*zip(some, row[some].tolist())])


def show_logprobs(tokenizer, request, top, chat):
    """OpenAI's `logprobs` of an answer, in a chat or not, with the `top` likeliest of each id."""

    def token(id, logprob):
        text = tokenizer.answer_pieces.decode([id] * (id in tokenizer.texts))
        # A byte of a character that several tokens spell is no text.
        spelt = None if "\ufffd" in text else [*text.encode()]
        return {"token": text, "logprob": logprob, "bytes": spelt}

    if top is None:
        return None
    content = [
        token(*own) | {"top_logprobs": [token(*each) for each in best[:top]]}
        for own, *best in request.logprobs
    ]
    if chat:
        return {"content": content}
    return {
        "tokens": [each["token"] for each in content],
        "token_logprobs": [each["logprob"] for each in content],
        # Of two likely ids with one text the likelier one stays.
        "top_logprobs": [
            {t["token"]: t["logprob"] for t in reversed(each["top_logprobs"])} for each in content
        ],
    }


# ==================================================================================================
# Rows that ask the base


def scale_adapter(batch, adapted):
    """Scale the adapter's update in each of the rows that run next: by 0 for the base alone, where
    adapted is False."""
    # Rows change seldom; most steps have nothing to do here.
    if adapted != batch.adapted:
        share = torch.tensor(adapted, device=batch.model.device)[:, None, None]
        share_rows(batch.model, 1.0 if all(adapted) else share)
        batch.adapted = adapted


# ==================================================================================================
# The compiled step


@torch.inference_mode()
def compile_step(batch):
    """`Batch.logits`, compiled: for all rows, in use or not, and all positions.

    On a GPU it is a CUDA graph of kernels tuned to their shapes, since Python needs longer to
    launch a kernel than most of them run; on a CPU loops over the weights as stored for one row,
    for more over weights packed for products of few rows, which doubles their memory."""
    import torch._inductor.config

    device = batch.model.device
    on_cpu = device.type == "cpu"
    packed = on_cpu and batch.size > 1
    torch._inductor.config.freezing = packed  # read while tracing too, where `options` do not reach
    # values of more than 11 operations are stored: each row of the product that reads SwiGLU or a
    # norm would make them again
    options = {
        "realize_opcount_threshold": 11,
        "freezing": packed,
        "max_autotune": packed,
        "max_autotune_gemm_backends": "CPP,ATEN",
        "cpp_wrapper": on_cpu,
        "coordinate_descent_tuning": not on_cpu,
    }
    # The one shape: all rows, whether in use or not, and as many positions as there are.
    compiled = torch.compile(batch.logits, fullgraph=True, dynamic=False, options=options)
    fed = torch.zeros(batch.size, 3, dtype=torch.long, device=device)

    def run():
        return compiled(fed, batch.cache.positions - 1)

    replay = run if on_cpu else record_graph(run)

    def call(given, longest):
        # What stands in rows not in use is overwritten by the next prompt.
        rows = len(given)
        fed[:rows] = given
        return replay()[:rows]

    return call


def record_graph(call):
    """call() as a CUDA graph; it returns the same memory each time."""
    call()  # compiles: a graph would record that too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call()

    def replay():
        graph.replay()
        return logits

    return replay


# ==================================================================================================
# The text of an answer while it grows


def visible(text, stop=(), ended=True):
    """What may be shown of an answer's text: nothing from a stop text on; no half character, which
    is U+FFFD (most Chinese ones are three byte tokens in LLaMA's vocabulary); and, unless it has
    ended, not the last characters, which may begin a stop text."""
    starts = [text.index(s) for s in stop if s in text]
    if starts:
        return text[: min(starts)]
    text = text.rstrip("\ufffd")
    held = 0 if ended else max(map(len, stop), default=1) - 1
    return text[: -held or None]


def stream(tokenizer, request, step=lambda: None):
    """Yield a request's text in pieces as it grows; step() makes one id more. The whole text at
    once if it has ended."""
    shown, ended = 0, None
    while not ended:
        if not request.finish_reason:
            step()
        ended = request.finish_reason  # read before the ids, which another thread may add to
        text = tokenizer.decode(request.ids)
        text = text if ended else text.rstrip(tokenizer.unsettled)
        text = visible(text, request.decoding.stop, ended).lstrip(tokenizer.leading)
        yield text[shown:]
        shown = len(text)


# ==================================================================================================
# Tokenizers of other bases

# SentencePiece's file is a protobuf message, in which what comes later counts: normalizer_spec
# {add_dummy_prefix: false}
NO_SPACE_IN_FRONT = b"\x1a\x02\x18\x00"


# The letter that stands for each byte in a tokenizer.json: itself where Latin-1 prints it, for the
# others those from U+0100 on, in order (Radford et al. 2019).
SPARE = count(256)
LETTERS = {
    byte: chr(byte if chr(byte).isprintable() and byte != ord(" ") else next(SPARE))
    for byte in range(256)
}
BYTES = {ord(letter): byte for byte, letter in LETTERS.items()}


def spell(data):
    """Bytes in LETTERS."""
    return data.decode("latin-1").translate(LETTERS)


@cache
def kinds_of_characters():
    """A letter for each character: of its Unicode category the first, s for blanks. Those that
    Python alone calls blanks are none."""
    return "".join(
        "s" if c.isspace() and c not in "\x1c\x1d\x1e\x1f" else unicodedata.category(c)[0]
        for c in map(chr, range(sys.maxunicode + 1))
    )


def expand(match):
    """A class of a pattern with ranges for its \\p{L}, \\s and the like, which `re` has not, or
    understands in its own way. A capital stands for all other characters."""

    def ranges(escape):
        kind = f"[{'^' * escape[0][1].isupper()}{escape[1] or 's'}]+"
        runs = re.finditer(kind, kinds_of_characters())
        return "".join(f"\\U{run.start():08x}-\\U{run.end() - 1:08x}" for run in runs)

    return "[" + re.sub(r"\\(?:[sS]|[pP]\{(\w)\})", ranges, match[1] or match[2]) + "]"


END = "\0"  # no letter


@dataclass(eq=False)
class BytePairs:
    """Byte-level BPE (Sennrich et al. 2016; over bytes: Radford et al. 2019, 2.2). A text is cut
    into words, a word into its bytes; of the neighbours, those that training merged first are
    merged, again and again. Raises ValueError for what does not fit together."""

    ids: dict  # {piece: id}, pieces in LETTERS
    ranks: dict  # {a + between + b: rank} of the neighbours a, b that merge, lowest first
    between: str
    pattern: str  # what a word is
    whole: set  # the pieces that a word is, if it can, without merging
    nfc: bool = False  # the text is brought to Unicode's form C first

    def __post_init__(self):
        self.texts = {id: piece for piece, id in self.ids.items()}
        self.merged = lru_cache(1 << 16)(self.merge)
        # In a group, so that split() keeps what it finds.
        escapes = r"\[((?:\\.|[^]])+)\]|(\\(?:[sS]|[pP]\{\w\}))"
        self.words = re.compile(f"({re.sub(escapes, expand, self.pattern)})")
        made = {pair.replace(self.between, "") for pair in self.ranks}.union(LETTERS.values())
        if self.words.groups > 1 or made - self.ids.keys():
            raise ValueError("a pattern with groups, or pieces that are not in the vocabulary")

    def encode(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        ids = []
        for word in filter(None, self.words.split(text)):
            # A long word is hardly met again, and would fill the memory.
            ids += self.merged(word) if len(word) < 100 else self.merge(word)
        return ids

    def decode(self, ids):
        letters = "".join(self.texts[id] for id in ids)
        return letters.translate(BYTES).encode("latin-1").decode("utf-8", "replace")

    def merge(self, word):
        """Ids of a word. A queue, since a word may be as long as a client wants: n log n steps."""
        letters = spell(word.encode())
        if letters in self.whole:
            return [self.ids[letters]]
        # The parts form a ring with END, which merges with none, and so do those used up.
        parts, n = [*letters, END], len(letters)
        after, before = [*range(1, n + 1), 0], [*range(-1, n)]
        queue = []

        def offer(i):
            pair = parts[i] + self.between + parts[after[i]]
            if pair in self.ranks:
                heappush(queue, (self.ranks[pair], i, pair))

        for i in range(n):
            offer(i)
        while queue:
            _, i, pair = heappop(queue)
            j = after[i]
            if parts[i] + self.between + parts[j] == pair:  # neither has changed meanwhile
                parts[i], parts[j] = parts[i] + parts[j], END
                after[i], before[after[j]] = after[j], i
                offer(before[i])
                offer(i)
        return [self.ids[part] for part in parts if part != END]


class ByteTokenizer(Tokenizer):
    """BytePairs behind the interface of Tokenizer. special, {name: id}, are all tokens that were
    added to the pieces, opening the names of those in front of a prompt, end the name of EOS; the
    ids in `shown` are shown where a model writes them. Raises ValueError."""

    def __init__(self, pieces, special, opening, end, shown=()):
        if end not in special:
            raise ValueError(f"eos_token in tokenizer_config.json is {end!r}, no special token")
        self.pieces = self.answer_pieces = pieces
        self.special = special
        pieces.texts |= {id: spell(name.encode()) for name, id in special.items()}
        self.texts = pieces.texts.keys() - special.values() | {*shown}
        self.opening, self.eos_id = [special[name] for name in opening], special[end]
        self.vocab_size = max(pieces.texts) + 1


def read_tokenizer_json(path, settings):
    """The ByteTokenizer of Hugging Face's tokenizer.json, with what tokenizer_config.json says.
    Raises ValueError for other kinds."""
    spec = read_json_file(path)
    match spec:
        case {
            "normalizer": None | {"type": "NFC"} as nfc,
            "pre_tokenizer": {
                "pretokenizers": [
                    {"pattern": {"Regex": pattern}, "behavior": "Isolated"},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ]
            },
            "model": {"vocab": ids, "merges": merges} as model,
            "added_tokens": added,
        }:
            pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in merges)
            ranks = {pair: rank for rank, pair in enumerate(pairs)}
            special = {token["content"]: token["id"] for token in added}
            shown = [token["id"] for token in added if not token["special"]]
            whole = ids.keys() - special.keys() if model.get("ignore_merges") else ()
            pieces = BytePairs(ids, ranks, " ", pattern, whole, nfc)
            # What the post-processor puts in front of a text; a BOS that settings name is none.
            front = str(spec.get("post_processor")).split("'Sequence':")[0]
            opening = re.findall(r"'SpecialToken': {'id': '(.+?)'", front)
            end = settings.get("eos_token")
            end = end["content"] if isinstance(end, dict) else end
            return ByteTokenizer(pieces, special, opening, end, shown)
    raise ValueError("wanted byte-level BPE as Qwen and Llama-3 have it, or a tokenizer.model")


# What a word is to Llama-3 and GLM-4 (OpenAI's cl100k_base)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By config.json's model_type: the tokens behind the pieces of tiktoken's file, which holds none.
BEHIND = {
    "chatglm": "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> "
    "<|assistant|> <|observation|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> "
    "<|end_of_video|>",
    "llama": "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> "
    "<|reserved_special_token_1|> <|finetune_right_pad_id|> <|reserved_special_token_2|> "
    "<|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|> "
    + " ".join(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
}


def read_tiktoken(path, kind):
    """The ByteTokenizer of a file of pieces in base64, each with its rank, which is its id."""
    lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
    ids = {spell(b64decode(piece)): int(rank) for piece, rank in lines}
    names = BEHIND[kind].split()
    special = dict(zip(names, count(len(ids))))
    opening = re.findall(r"<\|begin_of_text\|>|\[gMASK\]|<sop>", BEHIND[kind])
    end = names[names[0] in opening]  # the first, but for BOS
    return ByteTokenizer(BytePairs(ids, ids, "", WORDS, ids), special, opening, end)


class ChatGLMTokenizer(Tokenizer):
    """ChatGLM2's and ChatGLM3's: tokens in no file behind the pieces, and a space in front of a
    text wherever it stands."""

    leading = " \n"  # ChatGLM3's answers begin with a line end

    def __init__(self, path):
        super().__init__(path)
        self.answer_pieces = self.pieces
        names = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"
        self.special |= zip(names.split(), count(self.vocab_size))
        self.vocab_size += len(names.split())
        self.opening = [self.special["[gMASK]"], self.special["sop"]]


def old_pieces():
    """What ChatGLM-6B's code added in memory to the text pieces of its first ice_text.model, as
    fields of SentencePiece's protobuf: tokens, tabs and blanks, bytes, and byte_fallback."""
    kinds = {
        3: "[MASK] [gMASK] [sMASK] <unused_0> <sop> <eop> <ENC> <dBLOCK>".split(),
        4: ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))],
        6: [f"<0x{byte:02X}>" for byte in range(256)],
    }
    more = b""
    for kind, texts in kinds.items():
        for text in texts:
            piece = b"\n%c%b\x15\0\0\0\0\x18%c" % (len(text), text.encode(), kind)
            more += b"\n%c%b" % (len(piece), piece)
    return more + b"\x12\x03\x98\x02\x01"


class ChatGLM6BTokenizer(Tokenizer):
    """ChatGLM-6B's: line ends, tabs and runs of blanks are pieces, and Chinese marks, which its
    pieces have as Latin ones, become Chinese again beside a Chinese character."""

    unsettled = "\ufffd,!:;?"

    def __init__(self, path):
        super().__init__(path, b"" if b"[gMASK]" in Path(path).read_bytes() else old_pieces())
        self.eos_id, self.opening = self.special["<eop>"], []

    def encode(self, text, bos=False, eos=False):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return super().encode(text, bos, eos)

    encode_answer = encode

    def decode(self, ids):
        text = super().decode(ids).replace("<n>", "\n").replace("<|tab|>", "\t")
        text = re.sub(r"<\|blank_(\d+)\|>", lambda blank: " " * int(blank[1]), text)
        marks = "(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])"
        return re.sub(marks, lambda mark: chr(ord(mark[0]) + 0xFEE0), text)


def load_tokenizer(folder):
    """The tokenizer of a base's folder, of the kind that its file is. Raises ValueError."""
    file = find_tokenizer(folder)
    if not file.is_file():
        raise ValueError(f"no tokenizer in {folder}; wanted one of {' '.join(TOKENIZERS)}")
    check_content(file, SMALL)
    names = ("config.json", "tokenizer_config.json", "added_tokens.json")
    config, settings, added = (read_json_file(Path(folder, name), {}) for name in names)
    kind = config.get("model_type", "llama")
    try:
        if file.suffix == ".json":
            tokenizer = read_tokenizer_json(file, settings)
        elif re.match(rb"[\w+/=]+ \d+\s", file.read_bytes()):
            tokenizer = read_tiktoken(file, kind)
        elif file.name == "ice_text.model":
            tokenizer, added = ChatGLM6BTokenizer(file), {}  # those of an older vocabulary
        else:
            tokenizer = ChatGLMTokenizer(file) if kind == "chatglm" else Tokenizer(file)
        # Tokens added since, such as Alpaca's [PAD].
        for name, id in added.items():
            if name not in tokenizer.special:
                tokenizer.special[name] = id
                tokenizer.texts.discard(id)
                tokenizer.vocab_size = max(tokenizer.vocab_size, id + 1)
    except Exception as error:  # a damaged file makes its reader raise nearly all there are
        raise ValueError(f"{file} is no tokenizer that is known here ({error!r:.300})") from None
    if -1 in (tokenizer.bos_id, tokenizer.eos_id):
        raise ValueError(f"{file} has no BOS or EOS")
    return tokenizer


# ==================================================================================================
# Templates: a conversation as texts and special tokens

# tokens that end an answer besides EOS, in the vocabularies that have them
ENDS = (
    "<|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <|user|> <|observation|>"
).split()
# The texts of a template that has none of its own: BenTsao's, with several turns in one
# instruction.
FORMS = {
    "prompt_no_input": "{instruction}",
    "prompt_input": "{instruction}",
    "system": "{system}\n",
    "turn": " <user>: {opening}{user} <bot>: {answer}",
    "question": " <user>: {opening}{user}",
    "lone": "{opening}{user}",
    "answer": "{assistant}",
    "last": "{assistant}{eos}",
    "thoughts": "",
    "special": (),
}


def eos_ids(tokenizer):
    """The ids that end an answer."""
    ends = {id for name, id in tokenizer.special.items() if name in ENDS}
    return sorted(ends | {tokenizer.eos_id})


def load_template(name):
    """The template of a bare name in data/templates, or of a path. It has BenTsao's prompt_no_input
    and prompt_input (by default the same), with {instruction} and {input}, or a chat's texts:

      prompt          up to the answer: {system}, {turns}, and {user}, the last question
      turn            an earlier {user} and its {answer}; {n} counts them from 1, {i} from 0
      answer, last    around {assistant}: an earlier answer, and the last one
      system          around {system}; where prompt has no place for it, it is the {opening} of the
                      first question. default_system: the text if none is given
      thoughts        around {thoughts}, before an answer; empty they tell a model not to think
      special         the special tokens in these texts, which the tokenizer must have
      trim            the roles whose texts lose the blanks around them
      chat_template   the same in Jinja, for other programs

    {instruction} is {turns} and `question`, or `lone` if there is one turn; {bos} and {eos} are the
    tokenizer's. Raises ValueError as `check_template` does."""
    path = Path(name) if str(name).endswith(".json") else DATA / "templates" / f"{name}.json"
    return check_template(path, read_json_file(path))


def check_template(path, template):
    """The template with what it leaves open. Raises ValueError for one that loses a part of a
    conversation."""
    roles = "system user assistant user assistant".split()
    trial = [{"role": role, "content": f"{role.upper()} {i}"} for i, role in enumerate(roles)]
    try:
        if "prompt" not in template:
            template.setdefault("prompt_input", template["prompt_no_input"])
        for trial[3]["input"] in "", "?":
            text = "".join(render(template, trial))
            if any(message["content"] not in text for message in trial):
                raise ValueError(f"a conversation becomes {text!r}")
    except Exception as error:  # values of other kinds make Python raise nearly all there are
        raise ValueError(
            f"{path}: {error!r:.200}; wanted prompt_no_input with {{instruction}}, or prompt with "
            "{system}, {turns} and {user}; other braces are doubled"
        ) from None
    return template


def default_template(tokenizer):
    """The name of the template whose special tokens a tokenizer has, of several the one with most;
    med_template if there is none."""
    counts = {"med_template": 0}
    for path in (DATA / "templates").glob("*.json"):
        special = read_json_file(path).get("special", ())
        if tokenizer.special.keys() >= {*special}:
            counts[path.stem] = len(special)
    return max(counts, key=counts.get)


# In a rendered text these stand around the name of a special token, before what is a target of
# training, and behind it. They are halves of characters, which no text has.
SPECIAL, TARGET, CONTEXT = "\ud800", "\ud801", "\ud802"


def render(template, messages, several=False):
    """(prompt, answer) of a conversation as texts with the marks above; the answer is empty where
    the last message is a question. several: in the form of several turns, even if there is one.
    Raises ValueError for half a character."""
    forms, question = FORMS | template, asked(messages)[-1]
    input, answered = question.get("input", ""), question is not messages[-1]
    forms.setdefault("prompt", "{bos}" + forms["prompt_input" if input else "prompt_no_input"])
    special = "|".join(map(re.escape, forms["special"])) or "(?!)"
    system, *texts = message_texts(template, messages)
    fields = {
        "bos": f"{SPECIAL}bos{SPECIAL}",
        "eos": f"{SPECIAL}eos{SPECIAL}",
        "system": system,
        "turns": "",
        "input": input,
    }

    def fill(name):
        # Special tokens are looked for in the template's own text, not in what somebody wrote.
        return re.sub(special, rf"{SPECIAL}\g<0>{SPECIAL}", forms[name]).format(**fields)

    # One question after the other: the one before goes to the turns, without its thoughts.
    fields["system"] = fields["opening"] = "" if system is None else fill("system")
    for i, (user, text) in enumerate(zip(texts[::2], [*texts[1::2], ""])):
        if i:
            fields["answer"] = TARGET + fill("answer") + CONTEXT
            fields["turns"] += fill("turn")
            fields["opening"] = ""
        thoughts, text = split_thoughts(forms, text)
        fields |= {"user": user, "thoughts": thoughts, "assistant": text, "i": i, "n": i + 1}
    last = fill("question" if several or fields["turns"] else "lone")
    fields["instruction"] = fields["turns"] + last
    prompt, block = fill("prompt"), fill("thoughts")

    # Thoughts are a target. An empty block, which says that there are none, is part of the prompt.
    if block:
        fields["assistant"] = text.lstrip("\n")
    answer = fill("last") * answered
    if thoughts:
        answer = block + answer
    elif answered or not forms.get("thinking"):
        prompt += block
    return prompt, answer


def asked(messages):
    """The messages up to the last question."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def message_texts(template, messages):
    """The system text or None, and the other texts of messages. Raises ValueError for half a
    character, which may be one of our marks."""
    to_json(messages).encode()
    texts = [template.get("default_system")] * (messages[0]["role"] != "system")
    for m in messages:
        text = m["content"].strip() if m["role"] in template.get("trim", ()) else m["content"]
        # A chat has no other place for an input than its question.
        input = "prompt" in template and m.get("input")
        texts.append(f"{text}\n{input}" if input else text)
    return texts


def split_thoughts(forms, text):
    """(thoughts, answer) of an answer with <think>thoughts</think> before it, where a template has
    a place for them."""
    thoughts, mark, answer = text.rpartition("</think>")
    if not (mark and forms["thoughts"]):
        return "", text
    return thoughts.rpartition("<think>")[2].strip("\n"), answer.lstrip("\n")


def encode_rendered(tokenizer, text, first=True):
    """(ids, mask) of a rendered text; mask[t] is True where token t, or a part of it, is a target.
    Texts are encoded from one special token to the next. first: nothing stands before them. Raises
    ValueError for a special token that the tokenizer lacks."""
    ids, mask, is_target = [], [], False
    ends = {"bos": tokenizer.opening, "eos": [tokenizer.eos_id]}

    def special(name):
        return ends.get(name, [tokenizer.special.get(name)])

    for i, part in enumerate(text.split(SPECIAL)):
        at_start = first and ids in ([], tokenizer.opening)
        encode = tokenizer.encode if at_start else tokenizer.encode_answer
        encode = special if i % 2 else encode
        texts, before, start = re.split(f"[{TARGET}{CONTEXT}]", part), "", 0
        new = encode("".join(texts))
        if new == [None]:
            raise ValueError(
                f"the template wants {part}, which the base's tokenizer does not have; choose "
                "another template"
            )
        targets = [False] * len(new)
        for j, piece in enumerate(texts):
            is_target ^= j > 0
            # What the text up to a mark has in common with all of it ends there, or before a token
            # that reaches across.
            before += piece
            within = encode(before)
            common = len(os.path.commonprefix([new, within]))
            stop = common + (common < len(within))
            if is_target:
                targets[start:stop] = [True] * (stop - start)
            start = common
        ids, mask = ids + new, mask + targets
    return ids, mask


# ==================================================================================================
# Records in all their forms


def render_turns(earlier, question):
    """Turns [(user, bot), ...] and a question as one instruction, in the form of BenTsao's
    literature rows. The leading space is theirs, and changes ids."""
    said = [f" <user>: {user} <bot>: {bot}" for user, bot in earlier]
    return "".join(said) + f" <user>: {question}"


def split_turns(instruction):
    """[user, bot, ..., user], the texts of an instruction in that form; else [instruction]."""
    # BenTsao's infer_literature.py leaves the first space out.
    start, *parts = re.split("(?:^| )<(user|bot)>: ", instruction)
    # A mark that stands where none belongs is text.
    in_turn = not start and re.fullmatch("(userbot)*user", "".join(parts[::2]))
    return parts[1::2] if in_turn else [instruction]


# What people call our keys, the likeliest first.
KEYS = {
    "instruction": "question questions query prompt ask Question 问题 input context",
    "output": "answer answers response completion target Response 答案 回答",
    "input": "context",
    "head": "subject 头实体",
    "relation": "predicate 关系",
    "tail": "object 尾实体",
}
# What a file that is no UTF-8 is, by its first bytes.
KINDS = {
    b"PK": "an Excel workbook (or a zip); save it as CSV in UTF-8",
    b"\xd0\xcf": "an old Excel workbook; save it as CSV in UTF-8",
    b"\xff\xfe": "UTF-16; try iconv -f UTF-16 -t UTF-8",
    b"PA": "Parquet; save it as JSON lines",
}


def our_keys(row):
    """A row under our names of its keys. Of Huatuo-26M's wordings of a question, a list or lists in
    one, the first is taken."""
    row = dict(row)
    for ours, names in KEYS.items():
        for name in names.split():
            if name in row and ours not in row:
                row[ours] = row.pop(name)
                while name.endswith("s") and isinstance(row[ours], list):
                    row[ours] = next(iter(row[ours]), None)
    return row


def read_records(path, names=()):
    """[("line 3" or, in an array, "record 3", object), ...] of a file: a JSON array, or an object
    whose `data` is one; JSON lines; a table with a header (.csv, .tsv); lines of text, each an
    instruction. With names a text that is not JSON is a table, and they are its header if it has
    none. A BOM is skipped; "-" is standard input. Raises ValueError naming the file and place."""
    path = Path("/dev/stdin" if str(path) == "-" else path)
    if not str(path).startswith("/dev/"):  # as a shell's <(...) is
        check_content(path)
    try:
        rows = dict(rows_of(path, path.read_text(encoding="utf-8-sig"), names))
    except UnicodeDecodeError as error:
        kind = KINDS.get(path.read_bytes()[:2], f"not UTF-8 ({error}); try iconv -f GBK -t UTF-8")
        raise ValueError(f"{path} is {kind}") from None
    for where, row in (rows or {"is empty and": None}).items():
        if isinstance(row, str):
            rows[where] = {"instruction": row}
        elif not isinstance(row, dict):
            raise ValueError(f"{path} {where} holds a {type(row).__name__}, wanted an object")
    return [*rows.items()]


def rows_of(path, text, names):
    """Yield (place, row) of a file's text. Raises ValueError naming the place."""
    in_array = re.match(r'\s*(\[(?!\d+\]\s*\S)|\{[^{}]*"data"\s*:\s*\[\s*\{)', text)
    is_json = text.lstrip()[:1] in ("", "{")
    # `where` says how far reading has come, for the error below.
    where = "as an array"
    try:
        if in_array:
            array = json.loads(text)
            for i, row in enumerate(array if in_array[1] == "[" else array["data"], 1):
                yield f"record {i}", row
        elif not is_json and (names or path.suffix in (".csv", ".tsv")):
            where = "as a table"
            yield from table_rows(text, names)
        else:
            read = json.loads if is_json or path.suffix in (".json", ".jsonl") else str.strip
            for i, line in enumerate(text.split("\n"), 1):
                where = f"line {i}"
                if line.strip():
                    yield where, read(line)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} {where} is not JSON or CSV: {error}") from None


def table_rows(text, names):
    """Yield ("line 3", {header: cell}) of cells between tabs or commas."""
    first = text.partition("\n")[0]
    mark = "\t" if "\t" in first else ","
    [header] = csv.reader([first], delimiter=mark)
    columns = None if our_keys(dict.fromkeys(header)).keys() >= {*names} else names
    table = csv.DictReader(StringIO(text), columns, delimiter=mark, strict=True)
    try:
        for row in table:
            if None in row:
                raise csv.Error("too many cells; quote what has a comma in it")
            yield f"line {table.line_num}", row
    except csv.Error as error:
        raise ValueError(f"line {table.reader.line_num}: {error}") from None


# OpenAI's roles and ShareGPT's
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def read_chat(messages):
    """OpenAI's messages [{role, content}] or ShareGPT's [{from, value}] as the former: a system
    text or none, then user and assistant in turn. Thoughts apart from a text, as
    reasoning_content, come before it in <think>. An answer that is not there yet is left out.
    Raises ValueError, or what Python raises for other types."""
    found = []
    for m in messages:
        role, text = ROLES[m.get("role", m.get("from"))], m.get("content", m.get("value"))
        # OpenAI's other form of a text is a list of parts.
        if isinstance(text, list) and text:
            for part in text:
                if part["type"] != "text":
                    raise ValueError(f"{part['type']} in a message; this model reads text alone")
            text = "\n".join(part["text"] for part in text)
        if m.get("reasoning_content"):
            text = f"<think>\n{m['reasoning_content']}\n</think>\n\n{text or ''}"
        found.append({"role": role, "content": text})
    if found[-1] == {"role": "assistant", "content": None}:
        found.pop()
    "".join(m["content"] for m in found)  # raises for what is no text
    # An assistant's text may end it, or a question that waits for one.
    if not re.fullmatch("s?u(au)*a?", "".join(m["role"][0] for m in found)):
        raise ValueError("wanted user and assistant in turn, before them one system text or none")
    return found


def read_messages(row):
    """The messages of a record in any form of `read_instructions`; the last is a user's where a
    question waits for its answer, and the last question has the record's input. Raises ValueError
    for a record in none of them."""
    try:
        ours, messages = row, row.get("messages") or row.get("conversations")
        if not messages:
            ours = our_keys(row)
            texts = [text for user, bot in ours.get("history") or () for text in (user, bot)]
            # Med-ChatGLM's own labels go: the template brings others.
            question = re.sub(r"(?s)^问题：(.*)\n回答: $", r"\1", ours["instruction"])
            texts += [*split_turns(question), ours.get("output")]
            said = zip(cycle(("user", "assistant")), texts)
            messages = [{"role": role, "content": text} for role, text in said]
        messages = read_chat(messages)
        # LLaMA-Factory's system text stands beside the turns.
        if ours.get("system") and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": "" + ours["system"]})
        if ours.get("input"):
            asked(messages)[-1]["input"] = "" + ours["input"]
    except Exception as error:  # values of other kinds make Python raise nearly all there are
        raise ValueError(
            f"keys {', '.join(row)}; wanted texts as instruction and output (and input), question "
            "and answer, 问题 and 答案 or the like, or messages or conversations of user and "
            f"assistant in turn ({type(error).__name__}: {error})"
        ) from None
    return messages


def conversation(record):
    """(messages, whether they stand in the form of several turns) of a record that was read."""
    messages = read_messages(record)
    first, mark = messages[0]["content"], " <user>: "
    return messages, record["instruction"].startswith(mark) and not first.startswith(mark)


def read_instructions(path, answers=False):
    """Records {instruction, input, output, and what else they hold} of a file: alpaca, with
    LLaMA-Factory's `history` of [question, answer] pairs or without; OpenAI's `messages`;
    ShareGPT's `conversations`; what `KEYS` names; BenTsao's literature rows. If one
    has several turns, the instructions of all are put in the form of those rows (`render_turns`),
    as a chat of several turns is. With answers, each must end in one. Raises ValueError naming the
    line or record."""
    records = []
    for where, row in read_records(path):
        try:
            to_json(row).encode()  # half a character would be met when the answer is written
            messages = read_messages(row)
            last = messages[-1]
            if answers and not (last["role"] == "assistant" and last["content"].strip()):
                raise ValueError("the answer is empty or missing, and teaches nothing")
        except ValueError as error:
            raise ValueError(f"{path} {where}: {error}") from None
        records.append((row, messages))
    # One conversation makes the whole file one of conversations.
    conversations = "assistant" in [m["role"] for _, said in records for m in said[:-1]]
    return [make_instruction(row, messages, conversations) for row, messages in records]


def make_instruction(row, messages, conversations):
    """A record as instruction, input and output; conversations: the instruction in the form of
    BenTsao's literature rows. `messages` has the turns where these do not tell them."""
    question, last = asked(messages)[-1], messages[-1]
    several = conversations and not question["content"].startswith(" <user>: ")
    if several and "input" in question:
        question["content"] += "\n" + question.pop("input")
    prompt, _ = render({}, messages, several)
    text = re.sub(f"{SPECIAL}bos{SPECIAL}|[{TARGET}{CONTEXT}]", "", prompt)
    record = {**row, "instruction": text, "input": question.get("input", "")}
    if last is not question:
        record["output"] = last["content"]
    return record if read_messages(record) == messages else record | {"messages": messages}


# ==================================================================================================
# Models


def log(text=""):
    """To stderr: only answers go to stdout."""
    print(printable(text), file=sys.stderr)


def pick_device(name):
    """The torch device of an option: "auto" is the first GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name, dtype=torch.float64).item()  # fails on meta and mps too
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {name!r} is no use: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def has_bf16(device):
    """Has a device instructions for products in bf16? On x86 mkldnn says yes also where it makes
    them of float32's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    on_x86 = torch.cpu._is_avx2_supported()
    check = torch.ops.mkldnn._is_mkldnn_bf16_supported
    check = torch.cpu._is_avx512_bf16_supported if on_x86 else check
    return device.type == "cpu" and check()


def pick_dtype(name, device):
    """The torch dtype of an option: "auto" is bf16 where there are instructions for it."""
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}, wanted auto or one of {' '.join(DTYPES)}")
    if name == "bf16" and not has_bf16(device):
        log(f"warning: {device} has no instructions for bf16; fp32 is faster")
    return DTYPES[name]


def load_base(path, device, dtype, base_dtype="auto"):
    """(model, tokenizer) of a base's folder, computing in dtype, its weights stored in base_dtype
    ("auto": in dtype too). Special ids come from tokenizer.model: a config.json with others, as
    decapoda-research/llama-7b-hf has it, is not followed. Raises ValueError if the embedding lacks
    rows for pieces (those of added_tokens.json, such as Alpaca's [PAD], count), or has far more."""
    path = find_base(path)
    file = find_tokenizer(path).name
    size = Checkpoint(path).config.vocab_size  # first, for it says what this network is not
    tokenizer = load_tokenizer(path)
    pieces = tokenizer.vocab_size
    # A tokenizer of another base would give every word another one's row.
    if not 0 <= size - pieces < 4096:  # Qwen, GLM and others fill up to a round number of rows
        raise ValueError(
            f"{path}: {file} has {pieces} pieces, the model {size} embedding "
            "rows; they belong to different models"
        )
    # Wrong ids in config.json are common, and would end no answer.
    theirs = read_json_file(path / "config.json", {})
    for key in ("bos", "eos"):
        ours, said = getattr(tokenizer, f"{key}_id"), theirs.get(f"{key}_token_id")
        if None not in (ours, said) and ours not in (said if isinstance(said, list) else [said]):
            log(
                f"warning: {path}/config.json has {key}_token_id {said}, {file} {ours}, which is "
                "followed"
            )
    if base_dtype in ("auto", *DTYPES):
        model = load_model(path, device, DTYPES.get(base_dtype, dtype))
    else:
        model = quantize(load_model(path), base_dtype, device, dtype)
    model.compute_dtype = dtype
    return model, tokenizer


def fingerprint(model):
    """What tells one model's answers from another's, as a hash: shape, dtypes, and about a thousand
    values of each tensor, evenly spread: what the weights are counts, not where they lie."""
    adapters = [module.config for _, module in lora_linears(model)]
    digest = sha256(f"{model.config} {model.dtype} {adapters}".encode())
    for tensor in model.state_dict().values():
        some = tensor.flatten()[:: tensor.numel() // 1000 + 1].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy())
    return digest.hexdigest()


# ==================================================================================================
# Answers to many prompts, and to a file


def new_batch(model, tokenizer, requests, rows, compile=False):
    """A Batch in which requests wait, to be answered `rows` at a time."""
    rows = min(rows, len(requests)) * max(request.decoding.num_beams for request in requests)
    positions = max(request.positions for request in requests)
    batch = Batch(model, rows, positions, eos_ids(tokenizer), tokenizer.decode, compile)
    for request in requests:
        batch.submit(request)
    return batch


def answer_batch(model, tokenizer, requests, rows, compile=False, **bar):
    """Yield the texts of requests, in their order, as they end; `rows` are decoded together, and a
    bar goes to stderr."""
    batch = requests and new_batch(model, tokenizer, requests, rows, compile)
    for request in tqdm(requests, unit="answer", dynamic_ncols=True, **bar):
        while not request.finish_reason:
            batch.step()
        yield "".join(stream(tokenizer, request))


def count_answers(path, lines):
    """How many answers, to the first of lines, a file holds; a line that a kill cut short is taken
    off. Raises ValueError, and leaves the file as it is, if something else stands there."""
    *kept, torn = Path(path).read_bytes().split(b"\n")
    with suppress(ValueError, TypeError, LookupError):
        same = all(json.loads(have)["key"] == lines[i]["key"] for i, have in enumerate(kept))
        # So the next line begins, and what a user has there does not.
        start = torn and to_json(lines[len(kept)])[:-1].encode()
        if same and torn[: len(start)] == start[: len(torn)]:
            os.truncate(path, os.path.getsize(path) - len(torn))
            return len(kept)
    raise ValueError(
        f"{path} holds something else than answers to these questions by these weights and "
        "settings; name another --output or delete it"
    )


def answer_file(model, tokenizer, template, questions, decoding, output, rows, compile=False):
    """Answer questions (records) in their order, `rows` at a time, and append each answer to the
    file output ("": stdout): the record with answer, finish_reason, index, and a key that stands
    for prompt, decoding and model. Started again it goes on. Raises ValueError as `count_answers`
    does."""
    requests, lines, done = [], [], 0
    weights = fingerprint(model)
    for question in questions:
        prompt = render_prompt(tokenizer, template, *conversation(question))
        for each in decoding.each():
            key = sha256(f"{prompt} {each} {weights}".encode()).hexdigest()[:16]
            lines.append({**question, "index": len(lines), "key": key})
            requests.append(Request(prompt, each))
    with open(output, "a", encoding="utf-8") if output else nullcontext(sys.stdout) as file:
        # What is in the file already is not asked again; a pipe holds nothing.
        if Path(output).is_file():
            hold(file, output)
            done = count_answers(output, lines)
        rest, bar = requests[done:], {"initial": done, "total": len(lines)}
        texts = answer_batch(model, tokenizer, rest, rows, compile, **bar)
        for line, request, text in zip(lines[done:], rest, texts):
            line |= {"answer": text, "finish_reason": request.finish_reason}
            print(to_json(line), file=file, flush=True)


# ==================================================================================================
# Chat

DISCLAIMER = (
    "Answers come from a language model and are no medical advice. "
    "回答由语言模型生成，不构成医疗建议。"
)
COMMANDS = (
    "/help, /reset starts again, /save FILE keeps the conversation, /model says what answers, "
    "Ctrl-C stops an answer, /exit or Ctrl-D ends."
)
# What a chat without and with --single_or_multi multi remembers.
MEMORY = (
    "Each question is asked by itself; --single_or_multi multi shows the model the turns before.",
    "The model is shown the turns before, as many as fit into --context.",
)
EXITS = "/exit /quit exit quit 退出".split()


def chat(answer, prompt_of, multi, room, about, opening=()):
    """Read questions until end of input. With multi each sees the turns before it, as many as fit
    into room tokens. prompt_of(messages) is a prompt's ids; answer(ids) prints an answer and yields
    it as it grows. opening: messages before the first question. Raises BrokenPipeError if nobody
    reads the answers."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() its line editing)
    log(f"{about}\n{DISCLAIMER}\n{COMMANDS}\n{MEMORY[multi]}")
    mark = "> " * (sys.stdin.isatty() and sys.stdout.isatty())
    said, saved = [], set()  # messages behind the opening; files
    while True:
        try:
            line = input(mark).strip()
            if line and not obey(line, opening, said, about, saved):
                question = {"role": "user", "content": line}
                prompt = fitting_prompt(opening, [*said * multi, question], prompt_of, room)
                # An answer stands there as it grows, also one that is stopped.
                said += [question, {"role": "assistant", "content": ""}]
                for text in answer(prompt):
                    said[-1]["content"] += text
        except KeyboardInterrupt:  # ends the answer or the line, not the chat
            log()
        except EOFError:
            return
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:  # what cannot be asked or saved
            log(f"error: {error}")


def obey(line, opening, said, about, saved):
    """Carry out a line that is a command; False if it is a question. said: the messages behind the
    opening; saved: the files, written here, that may be written again. Raises EOFError to end."""
    command, _, path = line.partition(" ")
    path = path.strip() or "chat.json"
    if line in EXITS:
        raise EOFError
    told = {"/model": about, "/help": COMMANDS, "/save": f"saved in {path}", "/reset": "begun anew"}
    if command == "/save":
        # A record that can be trained on: OpenAI's messages.
        if path not in saved:
            check_own(path)
        write_json(path, [{"messages": [*opening, *said]}])
        saved.add(path)
    elif command == "/reset":
        said.clear()
    elif not re.fullmatch("/[a-z]+", command):
        return False
    log(told.get(command, f"there is no {command}. {COMMANDS}"))
    return True


def fitting_prompt(opening, messages, prompt_of, room):
    """The prompt for a question, the last of messages, behind as many of the turns before it, of
    two messages each, as fit into room tokens. Raises ValueError if it does not fit alone."""
    for first in range(0, len(messages), 2):
        prompt = prompt_of([*opening, *messages[first:]])
        if len(prompt) <= room:
            if first:
                log(f"[without the oldest {first // 2} turns]")
            return prompt
    raise ValueError(f"the question has more than {room} tokens; give more --context")


# ==================================================================================================
# Server

LOCAL = ("127.0.0.1", "localhost")  # names of this machine that no other one reaches
MAX_HEAD = 1 << 14  # bytes of a request's headers
MAX_BODY = 1 << 18  # and of its body
# OpenAI's kinds of errors, by the status or by its first digit
ERRORS = {429: "rate_limit_error", 4: "invalid_request_error", 5: "server_error"}
HEADERS = {
    "Server": "TCM-LLM",
    "Connection": "close",
    "Content_Type": "application/json",  # but where another is told
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest stands in the page
}


class Refused(ValueError):
    """What cannot be answered, and why. A client of the server gets it with an HTTP status,
    headers, and OpenAI's names for the field and the kind of error."""

    def __init__(self, message, status=400, param=None, code=None, **headers):
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = ERRORS.get(status, ERRORS[status // 100])
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Server:
    """OpenAI's completions API and a page, in one event loop: a connection costs no thread, and one
    on which no whole request has come no place. The steps of the one batch are made in a thread:
    who waits for an answer asks for the next step, or gets the one that runs. The base and its
    adapter answer side by side, in rows of the same cache."""

    batch: Batch
    tokenizer: Tokenizer
    names: list  # of the models on offer: the adapter's, and "base"
    prompt_of: callable  # makes the ids of a prompt of messages
    options: Decoding  # the Options: among them what clients leave open
    about: str = ""  # which base, adapter and template answer

    limit = 64  # requests that may wait
    seconds = 10  # for a client to send a request, and to read what was sent
    patience = 512  # so many newer connections close one that has sent no whole request
    stopping = ()  # the signals that want it to end
    pending = None  # the step that runs, or ran last

    def __post_init__(self):
        options = self.options
        # What clients leave open.
        self.defaults = Body(**{f.name: getattr(options, f.name) for f in fields(Decoding)})
        # Open as long as the server is; lines are flushed as they end.
        self.ratings = options.ratings and open(options.ratings, "a", 1, "utf-8")  # noqa: SIM115
        # Only this worker touches the model.
        self.worker = ThreadPoolExecutor(1)
        self.large = asyncio.Lock()  # held while a large body is parsed
        self.latest = []  # Exchanges
        self.answering = set()  # the Exchanges with a whole request
        self.asked = set()  # the Requests that wait or have rows
        self.socket = socket.create_server((options.host, options.port), backlog=128)

    async def run(self):
        """Serve until `stopping` is set, and then until the answers under way are read."""
        await asyncio.start_server(
            lambda *streams: Exchange(self, *streams).run(), sock=self.socket, limit=MAX_HEAD
        )
        while not self.stopping or self.answering:
            await asyncio.sleep(0.1)

    def cards(self, name):
        """The card of one model, or of all (""). Raises Refused for one that is not on offer."""
        card = {
            "object": "model",
            "created": 0,
            "owned_by": "local",
            "defaults": vars(self.defaults),
            "about": self.about,
            # Is it used to turns before a question? The page then sends them, as a chat does.
            "memory": self.options.single_or_multi == "multi",
            "ratings": self.ratings != "",
        }
        models = {name: {"id": name, **card} for name in self.names}
        models[""] = {"object": "list", "data": [*models.values()]}
        if name not in models:
            raise Refused(
                f"no model {name!r:.100}; there are {' '.join(self.names)}",
                404,
                param="model",
                code="model_not_found",
            )
        return models[name]

    def read_body(self, sent):
        """The Body of what a client sent: the server's own settings, and over them the client's."""
        # A chat has two fields for what is one here.
        if isinstance(sent.get("logprobs"), bool):
            top = sent.pop("top_logprobs", 0)
            sent["logprobs"] = top if sent["logprobs"] else None
        # One field at a time, so that the refusal names it.
        body = self.defaults
        for name, value in sent.items():
            try:
                if name in FIELDS:
                    body = replace(body, **{FIELDS[name]: value})
                # false, 0, "" and [] ask for nothing
                elif value and name not in INERT and PLAIN.get(name) != value:
                    raise ValueError(f"{value!r:.100} is not supported")
            except ValueError as error:
                raise Refused(f"{name:.100}: {error}", param=name) from None
        return replace(body, model=body.model or self.names[0])

    def make_requests(self, sent, chat):
        """(Body, a Request for each of n answers to each prompt) of what a client sent: messages
        in a chat, else a prompt or several."""
        wanted = "messages" if chat else "prompt"
        given = sent.pop(wanted, None)
        body = self.read_body(sent)
        self.cards(body.model)
        try:
            prompts = [self.prompt_of(read_question(given))] if chat else self.read_prompts(given)
            if not 0 < len(prompts) * body.n <= self.limit:
                raise ValueError(f"{len(prompts)} prompts, wanted 1 to {self.limit} answers")
        except (ValueError, RecursionError) as error:
            raise Refused(str(error), param=wanted) from None
        requests = []
        for ids in prompts:
            # An answer is as long as a client wants, or as the room behind the prompt.
            room = max(1, self.batch.cache.positions - len(ids))
            for each in replace(body, max_new_tokens=min(room, body.max_new_tokens)).each():
                # The first id of a prompt follows nothing.
                first = [[(id, None)] for id in ids[:1] * body.echo]
                noted = None if body.logprobs is None else first
                requests.append(Request(ids, each, body.model != "base", logprobs=noted))
        return body, requests

    def read_prompts(self, prompt):
        """The lists of ids that a text, a list of ids, or a list of these stands for. Raises
        ValueError for what is none."""
        size = self.batch.model.config.vocab_size
        match prompt:
            case str():
                return [self.tokenizer.encode(prompt, bos=True)]
            case list() if {*map(type, prompt)} == {int}:
                if 0 <= min(prompt) <= max(prompt) < size:
                    return [prompt]
            case list():
                return [ids for part in prompt for ids in self.read_prompts(part)]
        raise ValueError(f"prompt wanted: a text, a list of ids from 0 to {size - 1}, or several")

    def submit(self, requests):
        """Let requests wait. Raises Refused if too many do, or the server stops."""
        if self.stopping:
            raise Refused("the server is stopping", 503, Retry_After="1")
        if len(self.asked) + len(requests) > self.limit + self.batch.size:
            raise Refused(
                f"{self.limit} answers are waited for already; try again later",
                429,
                code="rate_limit_exceeded",
                Retry_After="1",
            )
        for request in requests:
            self.batch.submit(request)
        self.asked.update(requests)

    def rate(self, sent):
        """Append a preference pair to the file of ratings: messages as prompt, chosen and rejected,
        as TRL wants them, and what else a client tells. Where one answer was judged alone, the
        other is []. Raises Refused if it is no pair, or cannot be kept."""
        try:
            for answer in sent["chosen"], sent["rejected"]:
                read_chat([*sent["prompt"], *answer])
            self.ratings.write(to_json(sent) + "\n")
        except Exception as error:  # other JSON raises nearly all there are; so may the file
            raise Refused(
                f"wanted prompt, chosen, rejected as messages, and --ratings FILE: {error!r:.200}"
            ) from None

    async def step(self):
        """Wait for a step of the batch: the one that runs, or the next. All who wait for it get an
        error in it."""
        if not self.pending or self.pending.done():
            self.pending = asyncio.wrap_future(self.worker.submit(self.batch.step))
        await asyncio.shield(self.pending)

    def cancel(self, requests):
        """Free the rows of requests, ended or not."""
        for request in requests:
            request.cancelled = True
        self.asked.difference_update(requests)
        self.worker.submit(self.batch.release)


@dataclass(frozen=True)
class Body(Decoding):
    """What a client may send."""

    n: int = setting(1, 1, 64)  # as many as may wait
    model: str = ""
    echo: bool = False
    logprobs: int = setting(None, 0, 20)
    stream: bool = False
    stream_options: dict = None

    def __post_init__(self):
        super().__post_init__()
        if len(self.stop) > 4 or max(map(len, self.stop), default=0) > 400:
            raise ValueError("more than 4 texts, or one of more than 400 characters")
        if not {*(self.stream_options or ())} <= {"include_usage"}:
            raise ValueError("include_usage is all that is supported")


# a client's names of the fields of Body; beams do not stream
FIELDS = {f.name: f.name for f in fields(Body) if f.name not in ("num_beams", "length_penalty")}
FIELDS |= {"max_tokens": FIELDS.pop("max_new_tokens"), "max_completion_tokens": "max_new_tokens"}
# what changes no answer, and what asks for nothing more than there is
INERT = "user metadata store service_tier parallel_tool_calls".split()
PLAIN = {"response_format": {"type": "text"}, "tool_choice": "none", "best_of": 1}
METHODS = {
    "/": "GET, HEAD, OPTIONS",
    "/health": "GET, HEAD, OPTIONS",
    "/v1/models": "GET, HEAD, OPTIONS",
    "/v1/chat/completions": "POST, OPTIONS",
    "/v1/completions": "POST, OPTIONS",
    "/v1/ratings": "POST, OPTIONS",
}
# Method, target, its path, and headers (RFC 9112). A lone CR, a folded line and the like are in
# none.
REQUEST = re.compile(
    r"([A-Z]+) (([^\s?]*)(?:\?\S*)?) HTTP/1\.[01]\r\n((?:[!-9;-~]+:[^\r\n\0]*\r\n)*)\r\n"
)
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[^\r]*)?\r\n")
# what else may come of waiting for a request
BROKEN = {
    TimeoutError: ("the request did not come in time", 408),
    asyncio.IncompleteReadError: ("the request ends in the middle", 400),
    asyncio.LimitOverrunError: (f"the headers are larger than {MAX_HEAD} bytes", 431),
}


@dataclass(eq=False)
class Exchange:
    """A connection: one request, one response."""

    server: Server
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    unsent = b"HTTP/1.1 "  # of what each response begins with
    shared = HEADERS  # of all responses
    command = path = "-"

    async def run(self):
        # Who has sent no request when so many others have come since makes room for them.
        latest = self.server.latest
        latest.append(self)
        if len(latest) > self.server.patience:
            oldest = latest.pop(0)
            if oldest not in self.server.answering:
                error = "too many connections wait; send all at once"
                oldest.reader.set_exception(Refused(error, 503, Retry_After="1"))
        # OSError: the client has left, or does not read.
        with suppress(OSError, Refused, asyncio.CancelledError):
            try:
                await self.respond()
                # Nothing more comes from here. What still comes from there is read, or closing
                # would reset the connection before the client has read this.
                self.writer.write_eof()
                async with asyncio.timeout(self.server.seconds):
                    await self.rest
            finally:
                self.server.answering.discard(self)
                self.writer.transport.abort()

    async def respond(self):
        requests = []
        try:
            path, name = await self.read()
            self.server.answering.add(self)
            if self.command == "OPTIONS":
                await self.send(b"", Allow=METHODS[path])
            elif path == "/":
                page = (DATA / "page.html").read_bytes()
                await self.send(page, Content_Type="text/html; charset=utf-8")
            elif path == "/health":
                batch = self.server.batch
                await self.send(
                    {
                        "status": "stopping" if self.server.stopping else "ok",
                        "places": batch.size,
                        "waiting": len(batch.waiting),
                        "running": len(batch.rows),
                    }
                )
            elif path == "/v1/models":
                await self.send(self.server.cards(unquote(name)))
            elif path == "/v1/ratings":
                self.server.rate(await self.read_json())
                await self.send({})
            else:
                chat = "chat" in path
                body, requests = self.server.make_requests(await self.read_json(), chat)
                self.server.submit(requests)
                await self.complete(requests, body, chat)
        except OSError:
            raise
        except Exception as error:
            if not isinstance(error, Refused):  # out of memory, say
                log_if_read(traceback.format_exc())
                error = Refused(f"the model failed: {type(error).__name__}", 500)
            # OpenAI's error object, in a stream as an event
            if self.unsent:
                await self.send(error.body, error.status, **error.headers)
            else:
                await self.event(error.body)
        finally:
            self.server.cancel(requests)

    async def read(self):
        """Read a request, its body to self.body: (path, name of one model or ""). Raises Refused
        for what is none."""
        try:
            async with asyncio.timeout(self.server.seconds):
                head = await self.reader.readuntil(b"\r\n\r\n")
                found = REQUEST.fullmatch(head.decode("latin-1"))
                if not found:
                    raise Refused("no request of HTTP/1.1")
                self.command, self.path, path, self.headers = found.groups()
                # One model of all: /v1/models/NAME.
                path, _, name = path.partition("/models/")
                path += "/models" * bool(name)
                if path not in METHODS:
                    raise Refused(f"no such path; there are {' '.join(METHODS)}", 404)
                # No body is kept of who may not ask.
                self.authorise(path)
                await self.read_body()
                return path, name
        except tuple(BROKEN) as error:
            raise Refused(*BROKEN[type(error)], Retry_After="1") from None
        finally:
            self.rest = asyncio.create_task(self.read_rest())

    def header(self, name):
        """The value of a header, "" if there is none; several are one list (RFC 9110, 5.3)."""
        return ", ".join(re.findall(rf"(?im)^{name}:(.*)\r$", self.headers)).strip(" \t")

    def authorise(self, path):
        """Raise Refused for another method, a wrong key, or a page of another site: a browser lets
        any page send to localhost and, under a name that leads there (DNS rebinding), read the
        answer."""
        if self.command not in METHODS[path].split(", "):
            raise Refused(f"{path} takes {METHODS[path]}", 405, Allow=METHODS[path])
        # A page of another site says so in Origin; under a name of its own, in Host.
        host, origin = self.header("host").lower(), self.header("origin").lower()
        options = self.server.options
        key = options.api_key
        if not key and host.partition(":")[0] not in LOCAL:
            raise Refused(
                f"Host {host:.100} is no name of this machine; to be asked under it the server "
                "wants --api_key",
                403,
            )
        if origin and {origin, "*"} & {*map(str.lower, options.allow_origin)}:
            self.shared = HEADERS | {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Headers": "*, Authorization",
                "Vary": "Origin",
            }
        elif origin and origin.partition("://")[2] != host:
            raise Refused(
                f"{origin:.100} is not answered; for pages of other sites the server wants "
                "--allow_origin",
                403,
            )
        # compare_digest takes as long for a wrong key as for the right one. A browser asks without
        # it (OPTIONS) whether its page may ask.
        given = self.header("authorization").encode("latin-1")
        right = hmac.compare_digest(given, f"Bearer {key}".encode())
        if key and "v1" in path and self.command != "OPTIONS" and not right:
            raise Refused("send Authorization: Bearer KEY", 401, code="invalid_api_key")

    async def read_body(self):
        """Read the body by the headers that tell its length. Raises Refused."""
        self.body = bytearray()
        length, coding = self.header("content-length"), self.header("transfer-encoding")

        async def take(digits, base):
            size = int(digits[:9], base)  # Python refuses to read very long numbers
            if len(self.body) + size > MAX_BODY:
                raise Refused(f"the body is larger than {MAX_BODY} bytes", 413)
            self.body += await self.reader.readexactly(size)
            return size

        if "," in length or length and coding:
            raise Refused("the body has several lengths")
        if length.isdecimal():
            await take(length, 10)
        elif coding == "chunked":
            size = 1
            while size:
                chunk = CHUNK.fullmatch(await self.reader.readuntil(b"\r\n"))
                if not chunk:
                    raise Refused("no size of a chunk")
                size = await take(chunk[1], 16)
                await self.reader.readexactly(2)  # the end of its line
        elif self.command == "POST":
            raise Refused("a Content-Length is wanted", 411)

    async def read_rest(self):
        """Throw away what comes behind a request. Where it ends the client sends no more, or has
        left. To tell, the response's first letters, which are always the same, are sent one at a
        time: a client that has left answers them with a reset."""
        with suppress(OSError, Refused):
            while await self.reader.read(MAX_HEAD):
                pass
            while self.unsent[1:] and not self.writer.is_closing():
                self.writer.write(self.unsent[:1])
                self.unsent = self.unsent[1:]
                await asyncio.sleep(0.1)

    def begin(self, status, **headers):
        """Send the status and the headers."""
        head = f"{status} {HTTPStatus(status).phrase}\r\n"
        for name, value in (self.shared | headers).items():
            head += f"{name.replace('_', '-')}: {value}\r\n"
        self.writer.write(self.unsent + f"{head}\r\n".encode("latin-1"))
        self.unsent = b""
        log_if_read(f"{time.strftime('%F %T')} {self.command} {self.path!a:.200} {status}\n")

    async def write(self, data):
        """Send bytes. Raises TimeoutError if the client does not read."""
        self.writer.write(data)
        async with asyncio.timeout(self.server.seconds):
            await self.writer.drain()

    async def send(self, body, status=200, **headers):
        """Send a response: bytes, or what becomes JSON."""
        if not isinstance(body, bytes):
            body = to_json(body).encode()
        self.begin(status, **headers, Content_Length=len(body))
        await self.write(body * (self.command != "HEAD"))

    async def event(self, value):
        """Send an event of a stream."""
        await self.write(f"data: {to_json(value)}\n\n".encode())

    async def read_json(self):
        """The object in the body; fields that are null are left out."""
        # Large ones one by one: others' answers take a step between two.
        if len(self.body) > MAX_HEAD and self.server.asked:
            async with self.server.large:
                await self.server.step()
        try:
            sent = json.loads(self.body.decode())
            to_json(sent).encode()  # half a character is no text
            return {name: value for name, value in sent.items() if value is not None}
        except (ValueError, RecursionError, AttributeError) as error:
            raise Refused(f"the body is no JSON object in UTF-8 ({error!s:.100})") from None

    async def complete(self, requests, body, chat):
        """Send the answers, as they grow if the client wants a stream."""
        tokenizer = self.server.tokenizer
        # What the text in the response is called, and the response.
        key = ("message", "delta")[body.stream] if chat else "text"
        head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": ("text_completion", f"chat.completion{'.chunk' * body.stream}")[chat],
            "created": int(time.time()),
            "model": body.model,
        }
        choices = []

        async def tell(i, said, reason=None, logprobs=None):
            said = said if chat else said["content"]
            choices.append({"index": i, key: said, "logprobs": logprobs, "finish_reason": reason})
            if body.stream:
                await self.event({**head, "choices": [choices.pop()]})

        # From here on an error can only be an event.
        if body.stream:
            self.begin(200, Content_Type="text/event-stream")
        for i, request in enumerate(requests):
            echo = tokenizer.decode(request.prompt_ids * body.echo)
            said = {"role": "assistant", "content": echo}
            for piece in stream(tokenizer, request):
                said["content"] += piece
                # A stream tells who speaks, the text in pieces, why it ended.
                if body.stream and any(said.values()):
                    await tell(i, said)
                    said = {"content": ""}
                if not request.finish_reason:
                    await self.server.step()
                await self.write(b"")  # raises OSError if the client has left
            logprobs = show_logprobs(tokenizer, request, body.logprobs, chat)
            await tell(i, said, request.finish_reason, logprobs)
        asked = sum(len(request.prompt_ids) for request in requests[:: body.n])
        made = sum(len(request.ids) for request in requests)
        usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
        response = {**head, "choices": choices, "usage": usage}
        if not body.stream:
            return await self.send(response)
        if body.stream_options == {"include_usage": True}:
            await self.event(response)
        await self.write(b"data: [DONE]\n\n")


def read_question(messages):
    """A client's messages, which end with a question, as `read_chat` gives them."""
    read = read_messages({"messages": messages})
    # A field that has a value and no effect would mislead: tool_calls, say.
    unknown = {key for m in messages for key in m if m[key]} - {"role", "content", "name"}
    if unknown:
        raise ValueError(f"messages: {min(unknown)} is not supported")
    if read[-1]["role"] != "user":
        raise ValueError("messages end with an answer, wanted a question")
    return read


def serve(server):
    """Serve until SIGTERM, Ctrl-C or the end of the terminal, then let the answers under way
    finish; a second one ends at once."""
    host, port = server.socket.getsockname()
    with stop_signals() as server.stopping:
        log(f"http://{host}:{port}/  models: {' '.join(server.names)}\n{server.about}")
        asyncio.run(server.run())


# ==================================================================================================
# Commands


@dataclass(frozen=True, repr=False)  # Decoding's repr: what the key of an answer is made of
class Options(Decoding):
    """The options of the command line."""

    # what is asked, and of whom

    input: str = ""  # context of the question (the template's {input})
    system: str = ""  # system text before the question, or before a chat
    thinking: bool = False  # let a model that can (Qwen3) think before it answers
    base_model: str = ""  # folder of the base, or its name in a hub's cache (empty: the adapter's)
    lora_weights: str = ""  # folder of the adapter (empty: lora-tcm, unless --base_model is given)
    anyway: bool = False  # take another base than the one the adapter was trained on
    use_lora: bool = True  # False asks the base alone

    # a file of questions, a chat

    instruct_dir: str = ""  # a file of questions, JSON array or lines; - is stdin
    # file for the answers to --instruct_dir, JSON lines; a run that was stopped goes on
    output: str = ""
    batch_size: int = 8  # answers decoded together; with --serve for each of its models
    # name in data/templates or path (empty: the adapter's own, else the base's)
    prompt_template: str = ""
    # multi: a chat shows the model the turns before, in the template's form
    single_or_multi: str = setting("single", choices=("single", "multi"))
    context: int = 2048  # tokens of question and answer at most (chat, --serve)

    # server

    serve: bool = False  # OpenAI's API and a page
    ratings: str = ""  # file to which the page's thumbs are appended, as preference pairs (--serve)
    host: str = "127.0.0.1"  # address to listen on (in the environment: API_HOST)
    port: int = setting(8000, 0, 65535)  # and port, 0: a free one (API_PORT)
    api_key: str = ""  # key that clients must send (better in the environment: API_KEY)
    allow_origin: tuple = ()  # sites whose pages may ask, as https://chat.example, or *

    # speed and memory

    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: str = "auto"  # of the activations: auto, bf16, fp16, fp32
    base_dtype: str = "auto"  # of the base as stored: auto (--dtype), fp32, int8, nf4, ...
    load_8bit: bool = False  # the same as --base_dtype int8
    # fold the adapter into the weights: faster by its two thin products a linear, but bf16
    # rounds a part of the update away
    merge: bool = False
    compile: bool = False  # compile the step that decodes: pays for files of questions


# options that a way to ask has no use for
USELESS = {
    "question": "output compile ratings",
    "file": "input system ratings",
    "chat": "input output compile n ratings",
    "serve": "input system output compile n merge num_beams",
}


def parse_options():
    """(question or None, the way to ask, Options) of the command line and the environment. Raises
    ValueError for options that do not go together."""
    parser = Parser(description=__doc__.partition("\n\nWhat this")[0])
    parser.add_argument(
        "prompt", nargs="?", help="one question; without it, --instruct_dir and --serve, a chat"
    )
    # argparse converts a default that is a text, as it does an option.
    parser.add_settings(Options)
    for name, variable in (("host", "API_HOST"), ("port", "API_PORT"), ("api_key", "API_KEY")):
        if text := os.environ.get(variable):
            parser.set_defaults(**{name: text})
    given = vars(parser.parse_args())
    prompt = given.pop("prompt")
    options = Options(**given)

    # Which of the four ways is it?
    ways = ["question"] * (prompt is not None) + ["file"] * bool(options.instruct_dir)
    way, *more = ways + ["serve"] * options.serve or ["chat"]
    if more or prompt == "":
        raise ValueError("wanted one of a question (not empty), --instruct_dir and --serve")
    for name in given.keys() & USELESS[way].split():
        raise ValueError(f"--{name} has no use here ({way})")
    if way in ("chat", "serve") and options.context <= options.max_new_tokens:
        raise ValueError(f"context {options.context} leaves no room beside an answer's tokens")
    if options.serve and options.host not in LOCAL and not options.api_key:
        raise ValueError(f"host {options.host} lets other machines in; give --api_key too")
    return prompt, way, options


def load(options, adapter):
    """(model, tokenizer, template, text about them) that options name: what they leave empty is
    the adapter's own, else data/tiny and the template that the base's special tokens ask for."""
    base, own = options.base_model or DATA / "tiny", {}
    if adapter:
        adapter = find_base(
            adapter,
            "train one with python train.py, name another with --lora_weights, or ask the base "
            "alone with --use_lora False",
        )
        # Its template stands in run.json as a whole, whatever has become of its file.
        base, own = adapter_base(adapter, options.base_model, options.anyway)
        if own:
            check_template(adapter / "run.json", own)
    name = options.prompt_template
    # A template that was named is read before the weights: it may be a wrong one.
    template = load_template(name) if name else own
    if own and template != own:
        log(f"warning: {adapter} was trained with another template than {name}")
    device = pick_device(options.device)
    # The activations' dtype, and that of the weights as stored.
    dtype = pick_dtype(options.dtype, device)
    stored = "int8" if options.load_8bit else options.base_dtype
    model, tokenizer = load_base(base, device, dtype, stored)
    template = template or load_template(default_template(tokenizer))
    template["thinking"] = options.thinking
    if adapter:
        load_adapter(model, adapter)
    # Faster by two thin products a linear, at a loss that is told.
    if options.merge:
        lost = merge(model).values()
        log(f"merged {len(lost)} linears; the updates lose {sum(lost) / len(lost):.1%} to {dtype}")
    knows = read_json_file(find_base(base) / "config.json", {}).get("description", "")
    about = (
        f"{base} with {adapter or 'no adapter'} on {device}, {dtype}; "
        f"{template.get('description', '')}\n{knows}"
    )
    return model, tokenizer, template, about.strip()


def print_answers(model, tokenizer, decoding, prompt):
    """Print the answers to a prompt's ids as they grow, and their speed; yield their text."""
    started = time.perf_counter()
    # All n answers are decoded together, and shown one after the other.
    requests = [Request(prompt, each) for each in decoding.each()]
    batch = new_batch(model, tokenizer, requests, len(requests))
    try:
        for request in requests:
            for text in stream(tokenizer, request, batch.step):
                print(printable(text), end="", flush=True)
                yield text
            print(flush=True)
    finally:  # also where Ctrl-C ends it
        count, seconds = sum(len(r.ids) for r in requests), time.perf_counter() - started
        log(f"[{count} tokens, {count / seconds:.0f} tokens/s]")


def main():
    prompt, way, options = parse_options()
    multi = options.single_or_multi == "multi"
    questions = read_instructions(options.instruct_dir) if way == "file" else []
    # Who names a base, a merged one say, does not get the adapter that lies here by chance.
    adapter = options.lora_weights or "lora-tcm" * (not options.base_model)
    adapter *= options.use_lora
    model, tokenizer, template, about = load(options, adapter)

    opening = [{"role": "system", "content": options.system}] * bool(options.system)
    # A lone question stands as in a record of one turn, unless a chat is of several.
    several = multi and way != "question"
    prompt_of = partial(render_prompt, tokenizer, template, several=several)
    answer = partial(print_answers, model, tokenizer, options)

    if way == "question":
        question = {"role": "user", "content": prompt, "input": options.input}
        list(answer(prompt_of([*opening, question])))
        log(DISCLAIMER)
    elif way == "file":
        more = (options.output, options.batch_size, options.compile)
        answer_file(model, tokenizer, template, questions, options, *more)
        # Answers are traced back to the adapter that gave them.
        if adapter and Path(options.output).is_file():  # a pipe has no hash
            made = [options.output, *filter(Path.is_file, find_base(adapter).iterdir())]
            write_hashes(f"{options.output}.hashes.json", made)
    elif way == "serve":
        name = Path(adapter).resolve().name
        names = ["tuned" if name == "base" else name, "base"] if adapter else ["base"]
        # As many rows for the base as for the adapter, side by side.
        rows = options.batch_size * len(names)
        batch = Batch(model, rows, options.context, eos_ids(tokenizer), tokenizer.decode)
        serve(Server(batch, tokenizer, names, prompt_of, options, about))
    else:
        if None in (sys.stdin, sys.stdout):
            raise ValueError("a chat wants standard input and output, and one is closed")
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused alone
        room = options.context - options.max_new_tokens
        chat(answer, prompt_of, multi, room, about, opening)


if __name__ == "__main__":
    run(main)
