"""Questions in, answers out: prompt templates, the tokenizer, decoding with the KV cache, streaming, chat, files.

  python generate.py "偏头痛有哪些症状？"                one question
  python generate.py                                   a chat
  python generate.py --instruct_dir questions.json     a file, array or lines of {"instruction", "input"}

The only place where text and token ids meet, so that training and asking render every prompt with the same code.
The answer goes to stdout, everything else to stderr.
"""
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

from lora import QUANTISED, load_adapter, quantize, read_json_file
from model import DTYPES, Parser, RaggedStep, find_tokenizer, load_model, open_checkpoint, run, write_atomically

DATA = Path(__file__).parent / "data"
TEMPLATES = DATA / "templates"
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
        if not isinstance(template[key], str) or "{instruction}" not in template[key]:
            raise ValueError(f"{path}: {key} wants a text with {{instruction}}")
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
        """Text to token ids."""
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def encode_answer(self, text):
        """Ids of a text that follows a prompt, without the space that SentencePiece puts before a text. Behind a
        newline, where the templates end, this is what encoding both together gives."""
        ids = self.pieces.encode("\n" + text)
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
                ("temperature", (int, float), lambda x: 0 <= x < math.inf, "a number from 0"),
                ("top_k", int, lambda x: x >= 0, "a whole number from 0"),
                ("top_p", (int, float), lambda x: 0 < x <= 1, "a number above 0, up to 1"),
                ("min_p", (int, float), lambda x: 0 <= x <= 1, "a number from 0 to 1"),
                ("repetition_penalty", (int, float), lambda x: 0 < x < math.inf, "a number above 0"),
                ("no_repeat_ngram_size", int, lambda x: x >= 0, "a whole number from 0"),
                ("num_beams", int, lambda x: x >= 1, "a whole number from 1"),
                ("length_penalty", (int, float), math.isfinite, "a number"),
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
        self.beams = [(0.0 if i == 0 else -1e9, []) for i in range(decoding.num_beams)]    # (score, ids), one a row
        self.ranked = []


class Batch:
    """Requests decoded together, one token each a step, in one KV cache of `rows` rows and max_len positions; a request
    takes num_beams rows. Rows stand at their own lengths, so each answer is what it would be alone; the rows of one
    that ends go to the next. Rows in use are always the first ones."""

    def __init__(self, model, tokenizer, rows, max_len, eos_id=None, prefill_chunk=512):
        self.model, self.tokenizer, self.eos_id = model, tokenizer, tokenizer.eos_id if eos_id is None else eos_id
        self.cache, self.prefill_chunk = model.new_cache(rows, max_len), prefill_chunk
        self.owner, self.tokens, self.lengths = [], [], []        # per row in use: request, token to feed, positions filled

    @property
    def free(self):
        """Rows not in use."""
        return self.cache.k.size(1) - len(self.owner)

    @torch.inference_mode()
    def add(self, request):
        """Run the prompt but for its last token, which the first step feeds. Raises ValueError if it cannot fit."""
        prompt, n, max_len = request.prompt_ids, request.decoding.num_beams, self.cache.k.size(3)
        if len(prompt) + request.decoding.max_new_tokens > max_len:
            raise ValueError(f"prompt of {len(prompt)} tokens and {request.decoding.max_new_tokens} new ones do not fit "
                             f"into {max_len} positions; shorten the prompt or max_new_tokens")
        if n > self.free:
            raise ValueError(f"{n} beams wanted, {self.free} places free; let requests end, or make a larger batch")
        if request.decoding.seed is not None:
            request.generator = torch.Generator(self.model.device).manual_seed(request.decoding.seed)
        row = len(self.owner)
        cache = self.cache.rows(row, row + 1, 0)
        for start in range(0, len(prompt) - 1, self.prefill_chunk):
            chunk = prompt[start:min(start + self.prefill_chunk, len(prompt) - 1)]
            self.model.hidden(torch.tensor([chunk], device=self.model.device), cache)
        for i in range(1, n):
            self.copy_row(row, row + i, 0, cache.length)
        self.owner += [request] * n
        self.tokens += [prompt[-1]] * n
        self.lengths += [cache.length] * n

    def copy_row(self, source, target, start, stop):
        for kv in (self.cache.k, self.cache.v):
            kv[:, target, :, start:stop] = kv[:, source, :, start:stop]

    def remove(self, request):
        """Free the places of a request; the last rows move into the gap."""
        for row in [i for i, owner in enumerate(self.owner) if owner is request][::-1]:
            last = len(self.owner) - 1
            if row != last:
                self.copy_row(last, row, 0, self.lengths[last])
            for column in (self.owner, self.tokens, self.lengths):
                column[row] = column[last]
                column.pop()

    @torch.inference_mode()
    def step(self):
        """One token more for every row: [(request, its new id, or None where there is none to show), ...]. A request
        that ended has its finish_reason, and its places are free."""
        if not self.owner:
            return []
        ids = torch.tensor(self.tokens, device=self.model.device)[:, None]                 # (B, 1)
        level = len(set(self.lengths)) == 1                       # then slices do, without a mask
        cache = self.cache.rows(0, len(ids), self.lengths[0]) if level else RaggedStep(self.cache, self.lengths)
        logits = self.model.output(self.model.hidden(ids, cache)[:, -1]).float()           # (B, V)
        self.lengths = [n + 1 for n in self.lengths]
        rows = {}                                                 # request -> its rows, in the order of its beams
        for row, request in enumerate(self.owner):
            rows.setdefault(request, []).append(row)
        chosen = logits.argmax(-1)
        for request, (row, *more) in rows.items():
            if not more and (request.decoding.temperature or request.decoding.repetition_penalty != 1
                             or request.decoding.no_repeat_ngram_size):
                chosen[row] = sample(penalise(logits[row], request.prompt_ids + request.ids, request.decoding),
                                     request.decoding, request.generator)
        chosen, news = chosen.tolist(), []                        # the one wait for the device
        for request, own in rows.items():
            token = None
            if len(own) > 1:
                self.step_beams(request, own, logits[own])
            else:
                token = self.tokens[own[0]] = chosen[own[0]]
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

    def step_beams(self, request, own, logits):
        """One step of beam search over the rows `own` with logits (n, V), as transformers' _beam_search does it with
        early_stopping False: 2n candidates by sum of log-probabilities; those that end among the best n join the
        finished, scored by sum / length ** length_penalty; the best n that do not end go on. It is over when n have
        finished and the best that runs, were it to end now, would not beat the worst of them."""
        n, decoding = len(own), request.decoding
        scores = torch.stack([penalise(row, request.prompt_ids + ids, decoding) + score for row, (score, ids)
                              in zip(logits.log_softmax(-1), request.beams)])              # (n, V)
        values, flat = (t.tolist() for t in scores.flatten().topk(2 * n))
        going, length = [], len(request.beams[0][1]) + 1
        for rank, (score, i) in enumerate(zip(values, flat)):
            beam, token = divmod(i, logits.size(1))
            ids = request.beams[beam][1] + [token]
            if reason := self.ended(request, ids):
                if rank < n:
                    request.ranked.append((score / length ** decoding.length_penalty, ids[:len(ids) - (token == self.eos_id)],
                                           reason))
            elif len(going) < n:
                going.append((score, ids, beam))
        request.ranked = sorted(request.ranked, key=lambda r: -r[0])[:n]
        if not going or (len(request.ranked) == n
                         and going[0][0] / length ** decoding.length_penalty <= request.ranked[-1][0]):
            _, request.ids, request.finish_reason = request.ranked[0]
            return
        start, stop = len(request.prompt_ids) - 1, self.lengths[own[0]]       # before it, the rows are the same
        parents = [own[beam] for _, _, beam in going]
        if parents != own:
            for kv in (self.cache.k, self.cache.v):
                kv[:, own, :, start:stop] = kv[:, parents, :, start:stop]
        request.beams = [(score, ids) for score, ids, _ in going]
        for row, (_, ids, _) in zip(own, going):
            self.tokens[row] = ids[-1]


def generate_ids(model, prompt_ids, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, eos_id=2, tokenizer=None, **more):
    """Yield the ids that follow prompt_ids, at most max_new_tokens, up to EOS (which is not yielded); with beams, those
    of the best answer when it is found. The rest as in `Decoding`; stop texts want the tokenizer."""
    request = Request(prompt_ids, Decoding(max_new_tokens, temperature, top_k, top_p, **more))
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
        held = max((n for stop in self.stop for n in range(1, len(stop)) if token and text.endswith(stop[:n])), default=0)
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
    """[(line number, object), ...] of a JSON array or JSON lines, whatever the extension; a BOM is skipped. Raises
    ValueError naming the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} not found or not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, for instance with iconv -f GBK -t UTF-8") from None
    rows = []
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ValueError(f"{path} starts as a JSON array but is none: {error}") from None
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path} line {number} is not JSON: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty; wanted a JSON array or one JSON object a line")
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} holds a {type(row).__name__}, wanted an object")
    return rows


def message_turns(messages):
    """Turns [(user, bot), ...] of OpenAI's messages [{role, content}] or ShareGPT's [{from, value}], the last bot None if a
    question comes last. A system text opens the first question, on a line of its own: templates have no place for it."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"messages are {messages!r:.60}, wanted a list of {{role, content}}")
    sides = {"system": "system", "user": "user", "human": "user", "assistant": "bot", "gpt": "bot"}
    said = [(sides.get(m.get("role", m.get("from"))), m.get("content", m.get("value"))) for m in messages]
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
    pairs = [*(row.get("history") or []), [row.get(keys[0]), "" if row.get(keys[1]) is None else row[keys[1]]]]
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
    end in one. Raises ValueError naming the line."""
    records, rows = [], read_records(path)
    for number, row in rows:
        try:
            turns, input = read_turns(row), row.get("input") or ""
            if not isinstance(input, str):
                raise ValueError(f"input is {input!r}, wanted a text")
            if answers and not (turns[-1][1] or "").strip():
                raise ValueError("the answer (output, target, an assistant's message) is empty or missing; a record without "
                                 "one teaches nothing")
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        records.append((row, turns, input))
    several = any(len(turns) > 1 for _, turns, _ in records)
    for i, (row, turns, input) in enumerate(records):
        question, answer = turns[-1]
        if several and not question.startswith(" <user>: "):
            question, input = render_turns([*turns[:-1], ("\n".join([question, input]) if input else question, None)]), ""
        records[i] = {**row, "instruction": question, "input": input} | ({} if answer is None else {"output": answer})
    return records


def find_base(name):
    """The folder of a base: name itself, or the snapshot of the hub's owner/name in Hugging Face's cache (HF_HUB_CACHE,
    HF_HOME). Nothing is downloaded. Raises ValueError if there is neither."""
    if Path(name).is_dir():
        return Path(name)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    repo = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{str(name).replace('/', '--')}"
    if (ref := repo / "refs" / "main").is_file() and (folder := repo / "snapshots" / ref.read_text().strip()).is_dir():
        return folder
    raise ValueError(f"base {str(name)!r} is neither a folder nor in Hugging Face's cache ({repo.parent}), and nothing is "
                     "downloaded here; download it and give its folder with --base_model")


def pick_device(name):
    """The torch device of an option: "auto" is the first GPU, else the CPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name, device):
    """The torch dtype of an option: "auto" is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
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
    path = Path(find_base(path))
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


def flag(text):
    """A yes-or-no option as Fire users write it: --x, --x True, --x=False."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def chat(answer, turns_kept):
    """Read questions until end of input; each sees the turns before it when turns_kept is set. /reset starts again."""
    print(f"{DISCLAIMER}\n/reset starts again, Ctrl-D ends.", file=sys.stderr)
    turns = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline()
        if not question:
            return
        question = question.strip()
        if question == "/reset":
            turns = []
        elif question:
            instruction = render_turns([*turns, (question, None)]) if turns_kept else question
            try:
                text = answer(instruction, "")
                turns.append((question, text))
            except KeyboardInterrupt:                             # stops the answer, not the chat
                print()


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", help="one question; without it and --instruct_dir, a chat")
    parser.add_argument("--input", default="", help="context of the question (the template's {input})")
    parser.add_argument("--base_model", default="", help="folder of the base (empty: the one the adapter was trained on)")
    parser.add_argument("--lora_weights", default="lora-tcm", help="folder of the adapter")
    parser.add_argument("--use_lora", type=flag, nargs="?", const=True, default=True, help="False asks the base alone")
    parser.add_argument("--instruct_dir", default="", help="a file of questions, JSON array or lines")
    parser.add_argument("--output", default="", help="file for the answers to --instruct_dir, as JSON lines")
    parser.add_argument("--prompt_template", default="", help="name in data/templates or path (empty: the adapter's own)")
    parser.add_argument("--single_or_multi", choices=("single", "multi"), default="single",
                        help="multi: a chat shows the model the turns before, in BenTsao's <user>: <bot>: form")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens of an answer at most")
    # BenTsao passes temperature 0.1 but decodes by beams without sampling, so it has no effect there: greedy is ours
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--top_k", type=int, default=40, help="sample among the k likeliest (0: all)")
    parser.add_argument("--top_p", type=float, default=0.75, help="sample among the likeliest that hold this mass")
    parser.add_argument("--seed", type=int, default=None, help="makes sampled answers repeatable")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", help="of the activations: auto, bf16, fp16, fp32")
    parser.add_argument("--base_dtype", default="auto", help="of the base as stored: auto (--dtype), bf16, fp16, fp32, int8, nf4")
    parser.add_argument("--load_8bit", type=flag, nargs="?", const=True, default=False, help="the same as --base_dtype int8")
    args = parser.parse_args()

    made = {}                                                     # what the adapter's run.json says of itself
    if args.use_lora:
        info = Path(args.lora_weights) / "run.json"
        if not Path(args.lora_weights).is_dir():
            raise ValueError(f"no adapter at {args.lora_weights}; run python train.py first, name one with "
                             "--lora_weights, or ask the base alone with --use_lora False")
        made = read_json_file(info).get("config", {}) if info.is_file() else {}
    base = args.base_model or made.get("base_model") or str(DATA / "tiny")
    template = load_template(args.prompt_template or made.get("prompt_template_name") or "med_template")
    questions = read_instructions(args.instruct_dir) if args.instruct_dir else []
    device = pick_device(args.device)
    model, tokenizer = load_base(base, device, pick_dtype(args.dtype, device),
                                 "int8" if args.load_8bit else args.base_dtype)
    if args.use_lora:
        load_adapter(model, args.lora_weights)

    def answer(instruction, input):
        """Stream one answer to stdout, its speed to stderr; return its text."""
        started, text = time.time(), ""
        for piece in ask(model, tokenizer, render_prompt(template, instruction, input), args.max_new_tokens,
                         temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed):
            print(piece, end="", flush=True)
            text += piece
        print(flush=True)
        seconds, count = time.time() - started, len(tokenizer.encode_answer(text))
        print(f"[{count} tokens, {count / seconds:.0f} tokens/s]", file=sys.stderr)
        return text

    if args.instruct_dir:
        answers = []
        for row in questions:
            print(f"Instruction: {row['instruction']}\nResponse: ", end="")
            answers.append({**row, "answer": answer(row["instruction"], row["input"])})
        if args.output:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
            write_atomically(args.output, lambda p: p.write_text(lines, encoding="utf-8"))
    elif args.prompt:
        answer(args.prompt, args.input)
        print(DISCLAIMER, file=sys.stderr)
    else:
        chat(answer, args.single_or_multi == "multi")


if __name__ == "__main__":
    run(main)
