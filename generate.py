"""Text in, text out: how a model answers, and four ways to ask it.

  python generate.py "偏头痛有哪些症状？"                one question
  python generate.py                                   a chat
  python generate.py --instruct_dir questions.json     a file, JSON array or lines; - is stdin
  python generate.py --serve                           OpenAI's API and a page, on localhost:8000

What this file teaches, in this order:

  tokenizer   Tokenizer: text to ids and back
  prompt      render_prompt: a question as training saw it
  sampling    Decoding, penalise, sample: from logits to the next id
  batch       Request, Row, Batch: many answers, an id each a step, in one KV cache
  one answer  generate_ids: the ids that follow a prompt

Below the lesson stand beams, rows of the base, the compiled step, texts as they grow, templates and
records, models, answers to a file, chat, server, and the commands.

Letters: B rows of the batch, V vocabulary size, n beams. Logits, and all that is made of them, are
float32. Answers go to stdout, everything else to stderr.
"""

import hmac
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from lora import load_adapter, lora_linears, merge, quantize, share_rows
from model import (
    DTYPES,
    Checkpoint,
    Parser,
    check_settings,
    find_base,
    find_tokenizer,
    load_model,
    read_json_file,
    run,
    setting,
    to_json,
    write_hashes,
    write_json,
)

DATA = Path(__file__).parent / "data"
PREFILL_CHUNK = 512  # tokens of a prompt in one forward

# --------------------------------------------------------------------------------------------------
# Tokenizer and prompt


class Tokenizer:
    """SentencePiece with LLaMA's special ids, which come from tokenizer.model and nowhere else.
    Raises ValueError for a file that is no such model."""

    def __init__(self, path):
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is no SentencePiece model ({error})") from None
        self.vocab_size = len(self.pieces)
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no BOS or EOS piece; LLaMA wants both")
        self.newline = self.pieces.piece_to_id("<0x0A>")

    def encode(self, text, bos=False, eos=False):
        """Ids of a text. Raises ValueError for half a character, which is no Unicode text."""
        text.encode()  # Python's own sentence names the character
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def encode_answer(self, text):
        """Ids of a text behind a prompt that ends with a newline, as encoding both together gives
        them: without the space that SentencePiece puts before a text."""
        ids = self.encode("\n" + text)
        return ids[ids.index(self.newline) + 1 :]

    def byte_ends(self, ids, text):
        """Where each of the ids of a text ends in it, in bytes (0 or less: before it begins)."""
        ends, end = [], 0
        for i in ids:
            piece = "" if self.pieces.is_control(i) else self.pieces.id_to_piece(i)
            end += 1 if self.pieces.is_byte(i) else len(piece.replace("\u2581", " ").encode())
            ends.append(end)
        # counted from the end: the space that may stand in front is none of the text
        return [e - end + len(text.encode()) for e in ends]

    def decode(self, ids):
        """The text of ids: U+FFFD for half a character, none for ids of added_tokens.json."""
        return self.pieces.decode([i for i in ids if i < self.vocab_size])


def render_prompt(template, instruction, input=""):
    """The prompt for one instruction: training, asking and chatting all make it here."""
    key = "prompt_input" if input else "prompt_no_input"
    return template[key].format(instruction=instruction, input=input)


# --------------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen, by the command line or a client. Names and meanings are
    transformers'; greedy by default, as BenTsao's beams in effect are. Raises ValueError."""

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
        seeds = [None] * self.n if self.seed is None else range(self.seed, self.seed + self.n)
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

    eos_id ends an answer, decode(ids) -> text finds stop texts. Raises ValueError if memory cannot
    hold the cache."""

    def __init__(self, model, size, positions, eos_id=None, decode=None, compile=False):
        self.model, self.size = model, size
        self.eos_id, self.decode = eos_id, decode
        self.waiting = []  # Requests
        self.rows = []  # the Rows in use: rows[i] is row i of the cache
        self.adapted = None  # as the adapter is scaled now
        try:
            self.cache = model.new_cache(size, positions)
        except RuntimeError:
            text = f"{size} rows of {positions} tokens do not fit into memory"
            raise ValueError(f"{text}; lower batch_size or max_new_tokens") from None
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
        scale_adapter(self, [row.request for row in self.rows])
        ids = [row.ids[-1] for row in self.rows]
        lengths = [len(row.ids) - 1 for row in self.rows]
        fed = torch.tensor([ids, lengths], device=self.model.device)
        logits = self.forward(fed, max(lengths))  # (B, V)
        # One choice for all; beams then choose among themselves.
        chosen = self.choose(logits)
        for request in {row.request for row in self.rows}:
            at = [i for i, row in enumerate(self.rows) if row.request is request]
            if len(at) > 1:
                step_beams(self, at, logits[at])
            else:
                ids = self.rows[at[0]].ids
                ids.append(chosen[at[0]])
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
                    self.cache.copy_rows([len(self.rows)], [i], 0, len(last.ids) - 1)
                    self.rows[i] = last

    def admit(self, request):
        """Give a request rows: run its prompt but for the last id, which the next step feeds."""
        n, seed = request.decoding.num_beams, request.decoding.seed
        device, first = self.model.device, len(self.rows)
        if seed is not None:
            request.generator = torch.Generator(device).manual_seed(seed)
        scale_adapter(self, [request])
        # In chunks, which bound the memory of the activations.
        cache = self.cache.rows(first, [0])
        ids = request.prompt_ids[:-1]
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            self.model.hidden_states(torch.tensor([chunk], device=device), cache)
        # All beams begin with the prompt; the first alone may be chosen from, so that they part.
        self.cache.copy_rows([first] * (n - 1), range(first + 1, first + n), 0, len(ids))
        self.rows += [Row(request, request.prompt_ids[:], -1e9 * (i > 0)) for i in range(n)]

    def logits(self, fed, longest):
        """Logits (B, V) of fed (2, B): each row's id, and how many stand before it (<= longest)."""
        ids, lengths = fed
        return self.model(ids[:, None], self.cache.rows(0, lengths, longest))[:, -1]

    def choose(self, logits):
        """The next id of each row, B of them, from logits (B, V)."""
        chosen = logits.argmax(-1)
        for i, row in enumerate(self.rows):
            # Only rows that sample, or whose logits change, need a look of their own.
            d = row.request.decoding
            if d.temperature or d.repetition_penalty != 1 or d.no_repeat_ngram_size:
                scores = penalise(logits[i], row.ids, d)
                chosen[i] = sample(scores, d, row.request.generator)
        return chosen.tolist()  # the one wait for the device

    def outcome(self, request, ids):
        """(answer, finish_reason or None) of ids: a prompt, an answer, and perhaps EOS."""
        answer = ids[len(request.prompt_ids) :]
        if ids[-1] == self.eos_id:
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


def step_beams(batch, at, logits):
    """One step of beam search over the n rows `at` of one request with logits (n, V), as
    transformers does it with early_stopping False: of the 2n best candidates by sum of
    log-probabilities, those among the first n that end are ranked, by sum / length **
    length_penalty, and the best n that do not end go on. It is over when n are ranked and the best
    that goes on, ending now, would beat none."""
    beams = [batch.rows[i] for i in at]
    request = beams[0].request
    n = len(at)
    # Each candidate is a beam and one id more: n V of them, of which 2n are looked at.
    scores = [
        penalise(logprobs, beam.ids, request.decoding) + beam.score
        for logprobs, beam in zip(logits.log_softmax(-1), beams)
    ]
    best = torch.stack(scores).flatten().topk(2 * n)
    first = len(request.prompt_ids) - 1
    length = len(beams[0].ids)
    scale = (length - first) ** request.decoding.length_penalty

    # Candidates that end are ranked, the others go on; both best first.
    going = []
    for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
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
    place_beams(batch, at, going[:n], first, length)


def place_beams(batch, at, beams, start, stop):
    """Put each of beams into a row of `at` that holds its parent's keys and values: the first of a
    parent keeps its row, others get a copy of positions start to stop (before, all are equal)."""
    parents = [beam.parent for beam in beams]
    # Rows whose beam has no successor.
    free = [i for i in at if i not in parents]
    for beam in beams:
        row = beam.parent
        if batch.rows[row] in beams:
            row = free.pop()
            batch.cache.copy_rows([beam.parent], [row], start, stop)
        batch.rows[row] = beam


# ==================================================================================================
# Rows that ask the base


def scale_adapter(batch, requests):
    """Scale the adapter's update in each of the rows that run next: by 0 for the base alone."""
    adapted = [request.adapted for request in requests]
    # Rows change seldom; most steps have nothing to do here.
    if adapted != batch.adapted:
        share = torch.tensor(adapted, device=batch.model.device).view(-1, 1, 1)
        share_rows(batch.model, None if all(adapted) else share)
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
    fed = torch.zeros(2, batch.size, dtype=torch.long, device=device)

    def run():
        return compiled(fed, batch.cache.positions - 1)

    replay = run if on_cpu else record_graph(run)

    def call(given, longest):
        # What stands in rows not in use is overwritten by the next prompt.
        rows = given.size(1)
        fed[:, :rows] = given
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
    return text[: max(0, len(text) - held)]


def stream(tokenizer, request, step=None):
    """Yield a request's text in pieces as it grows; step() makes, or awaits, one id more. The whole
    text at once if it has ended."""
    shown = 0
    ended = False
    while not ended:
        if not request.finish_reason:
            step()
        ended = request.finish_reason  # read before the ids, which another thread may add to
        text = visible(tokenizer.decode(request.ids), request.decoding.stop, ended)
        yield text[shown:]
        shown = len(text)


# ==================================================================================================
# Templates and records in all their forms


def load_template(name):
    """The prompt template of a bare name in data/templates, or of a path: {prompt_no_input,
    prompt_input}, the second by default the first. Raises ValueError for one without places."""
    path = Path(name) if str(name).endswith(".json") else DATA / "templates" / f"{name}.json"
    template = read_json_file(path)
    template.setdefault("prompt_input", template.get("prompt_no_input"))
    some = r"(?:[^{}]|\{\{|\}\}|\{input\}|\{instruction\})*"
    for key in ("prompt_no_input", "prompt_input"):
        text = str(template.get(key))
        if not re.fullmatch(some + r"\{instruction\}" + some, text):
            raise ValueError(
                f"{path}: {key} is {text!r:.200}, wanted a text with {{instruction}}; braces other "
                "than of it and {input} are doubled"
            )
    return template


def render_turns(turns):
    """Turns [(user, bot), ..., (user, None)] as one instruction, in the form of BenTsao's
    literature rows. The leading space is theirs, and changes ids."""
    *earlier, (question, _) = turns
    said = [f" <user>: {user} <bot>: {bot}" for user, bot in earlier]
    return "".join(said) + f" <user>: {question}"


def read_records(path):
    """[("line 3" or, in an array, "record 3", object), ...] of a JSON array or JSON lines, whatever
    the extension; a BOM is skipped; "-" is standard input. Raises ValueError naming the file and
    the place."""
    # `where` says how far reading has come, for the errors below.
    path = Path("/dev/stdin" if str(path) == "-" else path)
    where = "as an array"
    rows = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            rows = {f"record {i}": row for i, row in enumerate(json.loads(text), 1)}
        else:
            for i, line in enumerate(text.split("\n"), 1):
                where = f"line {i}"
                if line.strip():
                    rows[where] = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); try iconv -f GBK -t UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {where} is not JSON: {error}") from None
    for where, row in (rows or {"(empty)": None}).items():
        if not isinstance(row, dict):
            raise ValueError(f"{path} {where} holds a {type(row).__name__}, wanted an object")
    return [*rows.items()]


# s: system, u: user, a: assistant, so that one pattern says whose turn it is
SIDES = {"system": "s", "developer": "s", "user": "u", "human": "u", "assistant": "a", "gpt": "a"}


def message_texts(messages):
    """[question, answer, question, ...] of OpenAI's messages [{role, content}] or ShareGPT's
    [{from, value}]. A system text opens the first question, on a line of its own: templates have
    no place for it."""
    sides = "".join(SIDES[m.get("role", m.get("from"))] for m in messages)
    # An assistant's text may end it, or a question that waits for one.
    if not re.fullmatch("s?u(au)*a?", sides):
        raise ValueError("wanted user and assistant in turn, before them one system text or none")
    texts = [plain_text(m.get("content", m.get("value"))) for m in messages]
    return ["\n".join(texts[:2]), *texts[2:]] if sides[0] == "s" else texts


def plain_text(content):
    """A message's text. OpenAI's other form of it is a list of parts."""
    if not content or not isinstance(content, list):
        return content
    if any(part["type"] != "text" for part in content):
        raise ValueError("a message has parts that are no text")
    return "\n".join(part["text"] for part in content)


def read_turns(row):
    """Turns [(user, bot), ...] of a record in any form of `read_instructions`, the last bot None
    where a question waits for its answer. Raises ValueError for a record in none of them."""
    messages = row.get("messages") or row.get("conversations")
    try:
        if messages:
            texts = message_texts(messages)
        elif "context" in row and "instruction" not in row:
            # Med-ChatGLM's own labels go: the template brings others
            question = row["context"].removeprefix("问题：").removesuffix("\n回答: ")
            texts = [question, row.get("target")]
        else:
            texts = [text for user, bot in row.get("history") or () for text in (user, bot)]
            texts += [row["instruction"], row.get("output")]
        # A question without an answer gets None.
        texts += [None] * (len(texts) % 2)
        # Raises for what is no text.
        "".join([*texts[:-1], texts[-1] or "", row.get("input") or ""])
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            "wanted texts as instruction and output (and input), or messages of user and assistant "
            f"in turn ({type(error).__name__}: {error})"
        ) from None
    return list(zip(texts[::2], texts[1::2]))


def read_instructions(path, answers=False):
    """Records {instruction, input, output, and what else they hold} of a file: alpaca, with
    LLaMA-Factory's `history` of [question, answer] pairs or without; OpenAI's `messages`;
    ShareGPT's `conversations`; Med-ChatGLM's {context, target}; BenTsao's literature rows. If one
    has several turns, all are put in the form of those rows (`render_turns`), as a chat of several
    turns is. With answers, each must end in one. Raises ValueError naming the line or record."""
    records = []
    for where, row in read_records(path):
        try:
            to_json(row).encode()  # half a character would be met when the answer is written
            turns = read_turns(row)
            if answers and not (turns[-1][1] or "").strip():
                raise ValueError("the answer is empty or missing, and teaches nothing")
        except ValueError as error:
            raise ValueError(f"{path} {where}: {error}") from None
        records.append((row, turns))
    # One conversation makes the whole file one of conversations.
    conversations = any(len(turns) > 1 for _, turns in records)
    return [make_instruction(row, turns, conversations) for row, turns in records]


def make_instruction(row, turns, conversations):
    """A record as instruction, input and output; conversations: in the form of BenTsao's literature
    rows."""
    *earlier, (question, answer) = turns
    input = row.get("input") or ""
    if question.startswith("<user>: "):  # BenTsao's infer_literature.py leaves the space out
        question = " " + question
    if conversations and not question.startswith(" <user>: "):
        question = "\n".join(filter(None, (question, input)))
        question = render_turns([*earlier, (question, None)])
        input = ""
    output = {} if answer is None else {"output": answer}
    return {**row, "instruction": question, "input": input, **output}


def bot_spans(instruction):
    """[(start, end), ...] in characters: the bot's answers in an instruction of `render_turns`."""
    found = re.finditer(r" <bot>: (.*?)(?= <user>: )", instruction, re.DOTALL)
    return [match.span(1) for match in found]


# ==================================================================================================
# Models


def log(*texts):
    """To stderr: only answers go to stdout."""
    print(*texts, file=sys.stderr, flush=True)


def load_tokenizer(folder):
    """The Tokenizer of a base's folder."""
    return Tokenizer(find_tokenizer(folder))


def pick_device(name):
    """The torch device of an option: "auto" is the first GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # fails on meta too
    except (RuntimeError, AssertionError) as error:
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
    decapoda-research/llama-7b-hf has it, is not followed. Raises ValueError if the embedding has
    not one row for each piece (those of added_tokens.json, such as Alpaca's [PAD], count)."""
    path = find_base(path)
    tokenizer = load_tokenizer(path)
    size = Checkpoint(path).config.vocab_size
    files = (path / "added_tokens.json", path / "config.json")
    added, theirs = (read_json_file(file) if file.is_file() else {} for file in files)
    # A tokenizer of another base would give every word another one's row.
    pieces = tokenizer.vocab_size + len(added)
    if pieces != size:
        raise ValueError(
            f"{path}: tokenizer.model has {pieces} pieces, the model {size} embedding rows; they "
            "belong to different models"
        )
    # Wrong ids in config.json are common, and would end no answer.
    for key, ours in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        if theirs.get(key) not in (ours, None):
            log(
                f"warning: {path}/config.json has {key} {theirs[key]}, tokenizer.model {ours}, "
                "which is followed"
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
    batch = Batch(model, rows, positions, tokenizer.eos_id, tokenizer.decode, compile)
    for request in requests:
        batch.submit(request)
    return batch


def finish(model, tokenizer, requests, rows, compile=False, **bar):
    """Yield each of requests, in their order, once it has ended; `rows` are decoded together, and
    a bar goes to stderr."""
    batch = requests and new_batch(model, tokenizer, requests, rows, compile)
    for request in tqdm(requests, unit="answer", dynamic_ncols=True, **bar):
        while not request.finish_reason:
            batch.step()
        yield request


def answer_batch(model, tokenizer, prompts, decoding, rows, label=""):
    """The answers to prompts (lists of ids), as texts in their order; a bar goes to stderr."""
    requests = [Request(ids, decoding) for ids in prompts]
    ended = finish(model, tokenizer, requests, rows, desc=label)
    return ["".join(stream(tokenizer, request)) for request in ended]


def count_answers(path, keys):
    """How many answers, those of the first of keys, a file holds; a line that a kill cut short is
    taken off. Raises ValueError, and leaves the file as it is, if something else stands there."""
    if not Path(path).is_file():
        return 0
    *lines, torn = Path(path).read_bytes().split(b"\n")
    with suppress(ValueError, TypeError, KeyError):
        found = [json.loads(line)["key"] for line in lines]
        # A line begins with a brace; a diary does not.
        if found == keys[: len(lines)] and torn[:1] in (b"", b"{"):
            os.truncate(path, os.path.getsize(path) - len(torn))
            return len(lines)
    raise ValueError(
        f"{path} holds something else than answers to these questions by these weights and "
        "settings; name another --output or delete it"
    )


def answer_file(model, tokenizer, template, questions, decoding, output, rows, compile=False):
    """Answer questions (records) in their order, `rows` at a time, and append each answer to the
    file output ("": stdout): the record with answer, finish_reason, index, and a key that stands
    for prompt, decoding and model. Started again it goes on. Raises ValueError as `count_answers`
    does."""
    requests = []
    lines = []
    weights = fingerprint(model)
    for question in questions:
        prompt = render_prompt(template, question["instruction"], question["input"])
        for each in decoding.each():
            key = sha256(f"{prompt!r} {each} {weights}".encode()).hexdigest()[:16]
            lines.append({**question, "index": len(lines), "key": key})
            requests.append(Request(tokenizer.encode(prompt, bos=True), each))
    # What is in the file already is not asked again.
    done = count_answers(output, [line["key"] for line in lines])
    bar = {"initial": done, "total": len(lines)}
    ended = finish(model, tokenizer, requests[done:], rows, compile, **bar)
    with open(output, "a", encoding="utf-8") if output else nullcontext(sys.stdout) as file:
        for line, request in zip(lines[done:], ended):
            answer = "".join(stream(tokenizer, request))
            line |= {"answer": answer, "finish_reason": request.finish_reason}
            print(to_json(line), file=file, flush=True)


# ==================================================================================================
# Chat

DISCLAIMER = (
    "Answers come from a language model and are no medical advice. "
    "回答由语言模型生成，不构成医疗建议。"
)
COMMANDS = (
    "/reset starts again, /save FILE keeps the conversation, /model says what answers, Ctrl-C "
    "stops an answer, Ctrl-D ends."
)


def chat(answer, render, tokenizer, multi, room, about):
    """Read questions until end of input. With multi each sees the turns before it, as many as fit
    into room tokens. answer(prompt) prints an answer and yields it as it grows. Raises
    BrokenPipeError if nobody reads the answers."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() its line editing)
    log(f"{DISCLAIMER}\n{COMMANDS}")
    mark = "> " * (sys.stdin.isatty() and sys.stdout.isatty())
    turns = []
    while True:
        try:
            line = input(mark).strip()
            if line and not obey(line, turns, about):
                prompt = fitting_prompt(line, turns * multi, render, tokenizer, room)
                # What is said stands in `turns` at once, also of an answer that is stopped.
                turns.append([line, ""])
                for text in answer(prompt):
                    turns[-1][1] += text
        except KeyboardInterrupt:  # ends the answer or the line, not the chat
            log()
        except EOFError:
            return
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:  # what cannot be asked or saved
            log(f"error: {error}")


def obey(line, turns, about):
    """Carry out a line that is a command; False if it is a question."""
    command, _, path = line.partition(" ")
    if command == "/reset":
        turns.clear()
    elif command == "/model":
        log(about)
    elif command == "/save":
        # A record that can be trained on: OpenAI's messages.
        pairs = [pair for turn in turns for pair in zip(("user", "assistant"), turn)]
        messages = [{"role": role, "content": text} for role, text in pairs]
        write_json(path.strip() or "chat.json", [{"messages": messages}])
    else:
        return False
    return True


def fitting_prompt(question, turns, render, tokenizer, room):
    """The prompt for a question behind as many of the last turns as fit into room tokens with it.
    Raises ValueError if it does not fit alone."""
    for first in range(len(turns) + 1):
        prompt = render([*turns[first:], (question, None)])
        if len(tokenizer.encode(prompt, bos=True)) <= room:
            if first:
                log(f"[without the oldest {first} turns]")
            return prompt
    raise ValueError(f"the question has more than {room} tokens; give more --context")


# ==================================================================================================
# Server

LOCAL = ("127.0.0.1", "localhost")  # names of this machine that no other one reaches
MAX_BODY = 1 << 18  # bytes
# OpenAI's kinds of errors, by the status or by its first digit
ERRORS = {429: "rate_limit_error", 4: "invalid_request_error", 5: "server_error"}
HEADERS = {
    "Connection": "close",
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


class Server(ThreadingHTTPServer):
    """OpenAI's completions API and a page. Each connection has a thread that reads, checks, waits
    and writes. The steps of the one batch are made in one thread more: who waits for an answer asks
    for the next step, or gets the one that runs. The base and its adapter answer side by side, in
    rows of the same cache.

    names     the models on offer: the adapter's, and "base"
    render    makes a prompt of turns [(user, bot), ..., (user, None)]
    options   the Options: among them what clients leave open"""

    daemon_threads = False  # server_close waits for answers under way
    request_queue_size = 128
    limit = 64  # requests that may wait
    seconds = 10  # in which a request must be read
    stopping = False

    def __init__(self, batch, tokenizer, names, render, options):
        self.batch = batch
        self.tokenizer = tokenizer
        self.names = names
        self.render = render
        # What clients leave open.
        self.defaults = {f.name: getattr(options, f.name) for f in fields(Decoding)} | {"n": 1}
        self.api_key = options.api_key
        self.lock = threading.Lock()
        # Only this worker touches the model.
        self.worker = ThreadPoolExecutor(1)
        self.pending = self.worker.submit(batch.step)
        super().__init__((options.host, options.port), Handler)

    def verify_request(self, request, client_address):
        return threading.active_count() < 4 * self.limit  # a connection is a thread

    def cards(self, name):
        """The card of one model, or of all (""). Raises Refused for one that is not on offer."""
        defaults = {**self.defaults, "max_tokens": self.defaults["max_new_tokens"]}
        card = {"object": "model", "created": 0, "owned_by": "local", "defaults": defaults}
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
        # One field at a time, so that the refusal names it.
        body = Body(**self.defaults)
        for name, value in sent.items():
            try:
                if name in FIELDS:
                    body = replace(body, **{FIELDS[name]: value})
                elif value and PLAIN.get(name) != value:  # false, 0, "" and [] ask for nothing
                    raise ValueError("not supported")
            except ValueError as error:
                raise Refused(f"{name:.100}: {error}", param=name) from None
        return replace(body, model=body.model or self.names[0])

    def make_requests(self, sent, wanted):
        """(Body, a Request for each of n answers) of what a client sent, with the field that is
        wanted: "messages" or "prompt"."""
        body = self.read_body(sent)
        self.cards(body.model)
        # Before there are n of them.
        if body.n > self.batch.size:
            raise Refused(f"n is {body.n}, wanted 1 to {self.batch.size}", param="n")
        try:
            if not getattr(body, wanted) or {"messages", "prompt"} <= sent.keys():
                raise ValueError(f"{wanted} wanted, and not both messages and prompt")
            prompt = body.prompt or self.render(read_question(body.messages))
            ids = self.tokenizer.encode(prompt, bos=True)
        except ValueError as error:
            raise Refused(str(error), param=wanted) from None
        # Left open, an answer is as long as the default, or as the room that is left.
        if not {"max_tokens", "max_completion_tokens"} & sent.keys():
            room = max(1, self.batch.cache.positions - len(ids))
            body = replace(body, max_new_tokens=min(room, body.max_new_tokens))
        return body, [Request(ids, each, body.model != "base") for each in body.each()]

    def submit(self, requests):
        """Let requests wait. Raises Refused if too many do, or the server stops."""
        with self.lock:
            if self.stopping:
                raise Refused("the server is stopping", 503, Retry_After="1")
            if len(self.batch.waiting) + len(requests) > self.limit:
                raise Refused(
                    f"{self.limit} answers are waited for already; try again later",
                    429,
                    code="rate_limit_exceeded",
                    Retry_After="1",
                )
            for request in requests:
                self.batch.submit(request)

    def step(self):
        """Wait for a step of the batch: the one that runs, or the next. All who wait for it get an
        error in it."""
        with self.lock:
            if self.pending.done():
                self.pending = self.worker.submit(self.batch.step)
            pending = self.pending
        pending.result()

    def cancel(self, requests):
        """Free the rows of requests, ended or not."""
        for request in requests:
            request.cancelled = True
        self.worker.submit(self.batch.release)


@dataclass(frozen=True)
class Body(Decoding):
    """What a client may send."""

    model: str = ""
    messages: list = None
    prompt: str = None
    stream: bool = False
    stream_options: dict = None
    user: str = None

    def __post_init__(self):
        super().__post_init__()
        if len(self.stop) > 4 or max(map(len, self.stop), default=0) > 400:
            raise ValueError("more than 4 texts, or one of more than 400 characters")
        if not {*(self.stream_options or ())} <= {"include_usage"}:
            raise ValueError("include_usage is all that is supported")


# a client's names of the fields of Body; beams do not stream
FIELDS = {f.name: f.name for f in fields(Body) if f.name not in ("num_beams", "length_penalty")}
FIELDS |= {"max_tokens": FIELDS.pop("max_new_tokens"), "max_completion_tokens": "max_new_tokens"}
# what asks for nothing more than there is
PLAIN = {"response_format": {"type": "text"}, "tool_choice": "none", "best_of": 1}
METHODS = {
    "/": "GET, HEAD",
    "/health": "GET, HEAD",
    "/v1/models": "GET, HEAD",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
}


class Handler(BaseHTTPRequestHandler):
    """The one request of a connection."""

    protocol_version = default_request_version = "HTTP/1.1"
    server_version = "TCM-LLM"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = 10  # seconds until a write fails
    streaming = False  # whether events are being sent

    def handle(self):
        # A client that sends a byte now and then does not keep its thread: the reading side is shut
        # when its time is over.
        self.ends = time.monotonic() + self.server.seconds
        self.deadline = threading.Timer(
            self.server.seconds, self.connection.shutdown, [socket.SHUT_RD]
        )
        self.deadline.start()
        with suppress(OSError):  # the client has left, or does not read
            super().handle()
        self.deadline.cancel()

    def do_GET(self):
        # One model of all: /v1/models/NAME.
        path, _, name = self.path.partition("?")[0].partition("/models/")
        path += "/models" * bool(name)
        requests = []
        try:
            self.authorise(path)
            if path == "/":
                self.send((DATA / "page.html").read_bytes(), kind="text/html; charset=utf-8")
            elif path == "/health":
                batch = self.server.batch
                status = {
                    "status": "stopping" if self.server.stopping else "ok",
                    "places": batch.size,
                    "waiting": len(batch.waiting),
                    "running": len(batch.rows),
                }
                self.send(status)
            elif path == "/v1/models":
                self.send(self.server.cards(unquote(name)))
            else:
                wanted = "messages" if "chat" in path else "prompt"
                body, requests = self.server.make_requests(self.read_json(), wanted)
                self.server.submit(requests)
                self.complete(requests, body)
        except Refused as error:
            self.refuse(error)
        except OSError:
            raise
        except Exception as error:  # out of memory, say
            traceback.print_exc()
            self.refuse(Refused(f"the model failed: {type(error).__name__}", 500))
        finally:
            self.server.cancel(requests)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def authorise(self, path):
        """Raise Refused for an unknown path, another method, a wrong key, or a page of another
        site: a browser lets any page send to localhost and, under a name that leads there (DNS
        rebinding), read the answer."""
        if path not in METHODS:
            raise Refused(f"no such path; there are {' '.join(METHODS)}", 404)
        if self.command not in METHODS[path]:
            raise Refused(f"{path} takes {METHODS[path]}", 405, Allow=METHODS[path])
        # A page of another site says so in Origin; under a name of its own, in Host.
        host, origin = (self.headers.get(name, "").lower() for name in ("Host", "Origin"))
        key = self.server.api_key
        elsewhere = not key and host.partition(":")[0] not in LOCAL
        if elsewhere or origin and origin.partition("://")[2] != host:
            raise Refused("requests from other sites' pages are not answered", 403)
        # compare_digest takes as long for a wrong key as for the right one.
        given = self.headers.get("Authorization", "").encode("latin-1")
        if key and "v1" in path and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise Refused("send Authorization: Bearer KEY", 401, code="invalid_api_key")

    def begin(self, status, kind, **headers):
        """Send the status and the headers."""
        self.send_response(status)
        for name, value in {**headers, **HEADERS, "Content-Type": kind}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, body, status=200, kind="application/json", **headers):
        """Send a response: bytes, or what becomes JSON."""
        if not isinstance(body, bytes):
            body = to_json(body).encode()
        self.begin(status, kind, Content_Length=len(body), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def event(self, value):
        """Send an event of a stream."""
        self.wfile.write(f"data: {to_json(value)}\n\n".encode())

    def refuse(self, error):
        """Send a Refused as OpenAI's error object. What the client still sends is read, or closing
        would reset the connection before it has read this."""
        if self.streaming:
            return self.event(error.body)
        self.send(error.body, error.status, **error.headers)
        # Nothing more comes from here; what comes from there is thrown away.
        self.connection.shutdown(socket.SHUT_WR)
        while time.monotonic() < self.ends and self.rfile.read1(65536):
            pass

    def send_error(self, status, message=None, explain=None):
        """http.server's own refusals, in the same form."""
        self.refuse(Refused(message or self.responses[status][0], status))

    def read_json(self):
        """The object in the body; fields that are null are left out."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused("a Content-Length is wanted", 411)
        size = int(length[:9])  # Python refuses to read very long numbers
        if size > MAX_BODY:
            raise Refused(f"the body is larger than {MAX_BODY} bytes", 413)
        # Ends early where the deadline shuts the reading side.
        text = self.rfile.read(size)
        if time.monotonic() >= self.ends:
            raise Refused(f"the body did not come within {self.server.seconds} seconds", 408)
        try:
            sent = json.loads(text.decode())
            to_json(sent).encode()  # half a character is no text
            return {name: value for name, value in sent.items() if value is not None}
        except (ValueError, RecursionError, AttributeError) as error:
            raise Refused(f"the body is no JSON object in UTF-8 ({str(error)[:100]})") from None

    def complete(self, requests, body):
        """Send the answers, as they grow if the client wants a stream."""
        self.deadline.cancel()
        chat = not body.prompt
        kind, key = ("chat.completion", "message") if chat else ("text_completion", "text")
        if chat and body.stream:
            kind, key = "chat.completion.chunk", "delta"
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": body.model,
        }

        def choice(i, text, reason=None, **role):
            said = {**role, "content": text} if chat else text
            return {"index": i, key: said, "logprobs": None, "finish_reason": reason}

        def tell(*more, **role):
            self.event({**head, "choices": [choice(*more, **role)]})

        # From here on an error can only be an event.
        if body.stream:
            self.begin(200, "text/event-stream")
            self.streaming = True
        choices = []
        for i, request in enumerate(requests):
            pieces = stream(self.server.tokenizer, request, self.step)
            if body.stream:
                # Who speaks, the text in pieces, why it ended.
                tell(i, "", role="assistant")
                for piece in filter(None, pieces):
                    tell(i, piece)
                tell(i, "", request.finish_reason)
            else:
                text = "".join(pieces)
                choices.append(choice(i, text, request.finish_reason, role="assistant"))
        asked = len(requests[0].prompt_ids)
        made = sum(len(request.ids) for request in requests)
        usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
        response = {**head, "choices": choices, "usage": usage}
        if not body.stream:
            return self.send(response)
        if body.stream_options == {"include_usage": True}:
            self.event(response)
        self.wfile.write(b"data: [DONE]\n\n")

    def step(self):
        """Wait for a step of the batch. Raises OSError if the client has left."""
        self.server.step()
        if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1 << 20):
            raise ConnectionAbortedError


def read_question(messages):
    """The turns of a client's messages, which end with a question."""
    turns = read_turns({"messages": messages})
    # A field that has a value and no effect would mislead: tool_calls, say.
    unknown = {key for message in messages for key in message if message[key]}
    unknown -= {"role", "content", "name"}
    if unknown:
        raise ValueError(f"messages: {min(unknown)} is not supported")
    if turns[-1][1] is not None:
        raise ValueError("messages end with an answer, wanted a question")
    return turns


def serve(server):
    """Serve until SIGTERM or Ctrl-C, then let the answers under way finish; a second one ends at
    once."""

    def stop(number, frame):
        server.stopping = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # Connections are taken in a thread, while this one waits for a signal.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address
    log(f"http://{host}:{port}/  models: {' '.join(server.names)}")
    # until then new requests are told so
    while not server.stopping or server.batch.waiting or server.batch.rows:
        time.sleep(0.1)
    server.shutdown()
    server.server_close()


# ==================================================================================================
# Commands


@dataclass(frozen=True, repr=False)  # Decoding's repr: what the key of an answer is made of
class Options(Decoding):
    """The options of the command line."""

    input: str = ""  # context of the question (the template's {input})
    base_model: str = ""  # folder of the base (empty: the one the adapter was trained on)
    lora_weights: str = "lora-tcm"  # folder of the adapter
    use_lora: bool = True  # False asks the base alone
    instruct_dir: str = ""  # a file of questions, JSON array or lines; - is stdin
    # file for the answers to --instruct_dir, JSON lines; a run that was stopped goes on
    output: str = ""
    batch_size: int = 8  # answers decoded together; with --serve for each of its models
    prompt_template: str = ""  # name in data/templates or path (empty: the adapter's own)
    # multi: a chat shows the model the turns before, in BenTsao's <user>: <bot>: form
    single_or_multi: str = setting("single", choices=("single", "multi"))
    context: int = 2048  # tokens of question and answer at most (chat, --serve)
    serve: bool = False  # OpenAI's API and a page
    host: str = "127.0.0.1"  # address to listen on (in the environment: API_HOST)
    port: int = setting(8000, 0, 65535)  # and port, 0: a free one (API_PORT)
    api_key: str = ""  # key that clients must send (better in the environment: API_KEY)
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
    "question": "output compile",
    "file": "input",
    "chat": "input output compile n",
    "serve": "input output compile n merge num_beams",
}


def parse_options():
    """(question or None, the way to ask, Options) of the command line and the environment. Raises
    ValueError for options that do not go together."""
    parser = Parser(description=__doc__.splitlines()[0])
    text = "one question; without it, --instruct_dir and --serve, a chat"
    parser.add_argument("prompt", nargs="?", help=text)
    # argparse converts a default that is a text, as it does an option.
    parser.add_settings(Options)
    for name, variable in (("host", "API_HOST"), ("port", "API_PORT"), ("api_key", "API_KEY")):
        if os.environ.get(variable):
            parser.set_defaults(**{name: os.environ[variable]})
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


def trained_with(adapter):
    """The settings that an adapter's run.json says it was trained with; {} without. Raises
    ValueError if there is no such adapter."""
    if adapter and not Path(adapter).is_dir():
        raise ValueError(
            f"no adapter at {adapter}; run python train.py first, name one with --lora_weights, or "
            "ask the base alone with --use_lora False"
        )
    file = Path(adapter, "run.json")
    made = read_json_file(file).get("config") if adapter and file.is_file() else {}
    return made if isinstance(made, dict) else {}


def load(options, adapter):
    """(model, tokenizer, template, a line about them) that options name: what they leave empty is
    the adapter's own, else data/tiny and med_template."""
    made = trained_with(adapter)
    base = options.base_model or str(made.get("base_model") or DATA / "tiny")
    name = options.prompt_template or str(made.get("prompt_template_name") or "med_template")
    template = load_template(name)
    device = pick_device(options.device)
    # The activations' dtype, and that of the weights as stored.
    dtype = pick_dtype(options.dtype, device)
    stored = "int8" if options.load_8bit else options.base_dtype
    model, tokenizer = load_base(base, device, dtype, stored)
    if adapter:
        load_adapter(model, adapter)
    # Faster by two thin products a linear, at a loss that is told.
    if options.merge:
        lost = merge(model).values()
        mean = f"{sum(lost) / len(lost):.1%} to {dtype}"
        log(f"merged {len(lost)} linears; the updates lose {mean}")
    about = f"{base} with {adapter or 'no adapter'} on {device}, {dtype}"
    return model, tokenizer, template, f"{about}; {template.get('description', '')}"


def print_answers(model, tokenizer, prompt, decoding):
    """Print the answers to a prompt as they grow, and their speed; yield their text."""
    started = time.time()
    # All n answers are decoded together, and shown one after the other.
    requests = [Request(tokenizer.encode(prompt, bos=True), each) for each in decoding.each()]
    batch = new_batch(model, tokenizer, requests, len(requests))
    try:
        for request in requests:
            for text in stream(tokenizer, request, batch.step):
                print(text, end="", flush=True)
                yield text
            print(flush=True)
    finally:  # also where Ctrl-C ends it
        count = sum(len(request.ids) for request in requests)
        log(f"[{count} tokens, {count / (time.time() - started):.0f} tokens/s]")


def main():
    prompt, way, options = parse_options()
    multi = options.single_or_multi == "multi"
    rows = options.batch_size
    questions = read_instructions(options.instruct_dir) if way == "file" else []
    adapter = options.lora_weights if options.use_lora else ""
    model, tokenizer, template, about = load(options, adapter)

    def render(turns):
        """The prompt for turns [(user, bot), ..., (user, None)]: a lone question stands as in a
        record of one turn, unless --single_or_multi multi; a conversation in BenTsao's form."""
        together = multi or len(turns) > 1
        return render_prompt(template, render_turns(turns) if together else turns[0][0])

    def answer(prompt):
        return print_answers(model, tokenizer, prompt, options)

    if way == "question":
        for _ in answer(render_prompt(template, prompt, options.input)):
            pass
        log(DISCLAIMER)
    elif way == "file":
        more = (options.output, rows, options.compile)
        answer_file(model, tokenizer, template, questions, options, *more)
        if adapter and options.output:
            made = [options.output, *filter(Path.is_file, Path(adapter).iterdir())]
            write_hashes(f"{options.output}.hashes.json", made)
    elif way == "serve":
        name = Path(adapter).resolve().name
        names = ["tuned" if name == "base" else name, "base"] if adapter else ["base"]
        # As many rows for the base as for the adapter, side by side.
        rows *= len(names)
        batch = Batch(model, rows, options.context, tokenizer.eos_id, tokenizer.decode)
        serve(Server(batch, tokenizer, names, render, options))
    else:
        if None in (sys.stdin, sys.stdout):
            raise ValueError("a chat wants standard input and output, and one is closed")
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused alone
        room = options.context - options.max_new_tokens
        chat(answer, render, tokenizer, multi, room, about)


if __name__ == "__main__":
    run(main)
