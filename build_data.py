"""Knowledge in, training text out, without a network. (Records written by an LLM API come as further subcommands.)

  python build_data.py offline      data/knowledge.jsonl -> data/train.jsonl, data/heldout.jsonl
  python build_data.py sentences    data/knowledge.jsonl -> plain sentences, what a base is trained on
  python build_data.py tokenizer    data/knowledge.jsonl -> a SentencePiece model for a small base

An entity is one object in CMeKG's form: {"中心词": name, "类型": kind, relation: [value, ...], ...}. The Chinese around
it (questions, statements) stands in data/forms.json, by kind and relation; a relation without a form is passed over.
A record is an alpaca record that says where it comes from: {id, instruction, input, output, entity, kind, relations,
values}. The split is by entity: one held out never appears in a training question.
"""
import asyncio
import email.utils
import fcntl
import hashlib
import json
import os
import random
import signal
import sys
import time
from io import BytesIO
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tqdm import tqdm

from generate import DATA, TEMPLATES, load_template, read_records
from lora import read_json_file
from model import Parser, run, write_atomically, write_json


def read_knowledge(path):
    """Entities of a knowledge base. Raises ValueError naming the line of a nameless, doubled or misshaped one."""
    entities, names = [], set()
    for number, entity in read_records(path):
        name, kind = entity.get("中心词"), entity.get("类型")
        if not isinstance(name, str) or not name.strip() or not isinstance(kind, str):
            raise ValueError(f"{path} line {number}: 中心词 and 类型 want a text each, got {name!r} and {kind!r}")
        if name in names:
            raise ValueError(f"{path} line {number}: entity {name} stands there twice")
        names.add(name)
        for relation, values in entity.items():
            if relation not in ("中心词", "类型") and not (isinstance(values, list) and values and
                                                       all(isinstance(v, str) and v.strip() for v in values)):
                raise ValueError(f"{path} line {number}: {relation} of {name} is {values!r}, wanted a list of texts")
        entities.append(entity)
    return entities


def facts(entity, forms):
    """[(relation, its forms, the values as one text, the values), ...] of an entity, in the order of data/forms.json.
    辨证论治 is made of two relations: the i-th formula is the one for the i-th pattern."""
    found = []
    for relation, form in forms.get(entity["类型"], {}).items():
        values = entity.get(relation, [])
        text = "、".join(values)
        if relation == "辨证论治":
            pairs = list(zip(entity.get("中医证型", []), entity.get("常用方剂", [])))
            text, values = "，".join(f"{p}用{f}" for p, f in pairs), [v for pair in pairs for v in pair]
        if values:
            found.append((relation, form, text, values))
    return found


def split_entities(entities, share, seed):
    """(training entities, held-out ones): the given share of every kind, drawn by seed. A name that is part of
    another one (四逆汤 in 当归四逆汤) is never held out, since it would appear in a question about the other."""
    rng, heldout = random.Random(seed), set()
    names = [e["中心词"] for e in entities]
    for kind in dict.fromkeys(e["类型"] for e in entities):
        own = [e["中心词"] for e in entities if e["类型"] == kind]
        free = [n for n in own if not any(n in other and n != other for other in names)]
        heldout.update(rng.sample(free, min(len(free), round(share * len(own)))))
    return [e for e in entities if e["中心词"] not in heldout], [e for e in entities if e["中心词"] in heldout]


def write_records(entities, forms, questions, rng):
    """At most `questions` records per fact of each entity, with different question forms, plus one per entity that
    asks for two relations at once."""
    records = []

    def add(entity, relations, form, question, output, values):
        name = entity["中心词"]
        records.append({"id": f"{name}/{'+'.join(relations)}/{form}", "instruction": question, "input": "", "output": output,
                        "entity": name, "kind": entity["类型"], "relations": relations, "values": values})

    for entity in entities:
        name, own = entity["中心词"], facts(entity, forms)
        for relation, form, text, values in own:
            for i in rng.sample(range(len(form["questions"])), min(questions, len(form["questions"]))):
                add(entity, [relation], i, form["questions"][i].format(e=name), form["statements"][0].format(e=name, v=text),
                    values)
        if len(own) > 1:
            (r1, f1, t1, v1), (r2, f2, t2, v2) = rng.sample(own, 2)
            add(entity, [r1, r2], "pair", f"请介绍{name}的{r1}和{r2}。",
                f1["statements"][0].format(e=name, v=t1) + f2["statements"][0].format(e=name, v=t2), v1 + v2)
    return records


def write_sentences(entities, forms, passes, rng):
    """Plain documents: for every entity and pass, all its facts in a random order and phrasing, broken at random
    into documents of one to six statements. Every statement names the entity, so that each fact is stored under the
    name and can be asked for alone (Allen-Zhu & Li 2023, Physics of Language Models 3.1: augmentation)."""
    documents = []
    for _ in range(passes):
        for entity in entities:
            own = facts(entity, forms)
            statements = [rng.choice(form["statements"]).format(e=entity["中心词"], v=text) for _, form, text, _ in own]
            rng.shuffle(statements)
            while statements:
                n = rng.randint(1, 6)
                documents.append({"instruction": "", "input": "", "output": "".join(statements[:n])})
                statements = statements[n:]
    rng.shuffle(documents)
    return documents


def train_tokenizer(entities, forms, vocab_size):
    """The bytes of a SentencePiece BPE with byte fallback and LLaMA's special ids (0 unknown, 1 BOS, 2 EOS), trained on
    the names, values and forms each for itself, so that no piece crosses the border of a term."""
    texts = []
    for entity in entities:
        for _, form, _, values in facts(entity, forms):
            texts += [entity["中心词"], *values]
            for text in form["questions"] + form["statements"]:
                texts += [part for part in text.replace("{v}", "{e}").split("{e}") if part]
    for path in sorted(TEMPLATES.glob("*.json")):
        template = load_template(path)
        texts += [line for line in template["prompt_no_input"].replace("{instruction}", "").split("\n") if line.strip()]
    model = BytesIO()
    try:
        SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                                   byte_fallback=True, character_coverage=1.0, split_digits=True, add_dummy_prefix=False, minloglevel=2,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1)
    except RuntimeError as error:
        raise ValueError(f"SentencePiece cannot make {vocab_size} pieces of this text: {error}") from None
    return model.getvalue()


def add_api_options(command):
    """The options of every subcommand that asks an API, through `Asker`."""
    command.add_argument("--model", required=True, help="name of the model at the endpoint")
    command.add_argument("--dry_run", action="store_true", help="show prompts, number of requests, tokens and cost; ask nothing")
    command.add_argument("--batch", action="store_true", help="through the Batch API: half the price, within 24 hours")
    for name, default, help in (
            ("base_url", "", "an OpenAI-compatible endpoint (empty: OPENAI_BASE_URL, else OpenAI's)"),
            ("temperature", 1.0, "of the sampling; left out where the model refuses it"), ("max_tokens", 2048, "tokens of a reply at most"),
            ("concurrency", 16, "requests in flight"), ("rpm", 0, "requests per minute at most (0: no limit)"),
            ("tpm", 0, "tokens per minute at most, prompt and max_tokens counted (0: no limit)"),
            ("timeout", 120.0, "seconds without a byte until a request is given up"), ("retries", 6, "further tries of a request"),
            ("max_requests", 0, "stop after so many requests of this run (0: no limit)"),
            ("max_cost", 0.0, "dollars for all replies of the output; none is asked that could exceed it (0: no limit)"),
            ("price_in", 0.0, "dollars for a million prompt tokens"), ("price_out", 0.0, "dollars for a million reply tokens"),
            ("poll", 30.0, "seconds between two looks at a batch")):
        command.add_argument(f"--{name}", type=type(default), default=default, help=help)


def retry_after(error):
    """Seconds that a refusal's Retry-After header asks to wait (a number or a date), 0 without one."""
    text = error.response.headers.get("retry-after", "") if hasattr(error, "response") else ""
    try:
        date = email.utils.parsedate_to_datetime(text).timestamp() if ":" in text else 0.0
        return min(3600.0, max(0.0, date - time.time() if date else float(text)))
    except ValueError:
        return 0.0


class Asker:
    """Asks an OpenAI-compatible endpoint every (key, messages) not answered yet and appends each reply to a file as one
    line: {key, content, finish_reason, prompt_hash, model, params, usage, time}. What stands in the file is paid: no
    later run asks it again. What is asked and how a reply is judged is the caller's business. Raises ValueError if
    another process holds the file, and for what no further request can mend (a wrong key, an unknown model)."""

    def __init__(self, path, args):
        numbers = [value for value in vars(args).values() if isinstance(value, (int, float))]
        if min(numbers) < 0 or not (args.concurrency and args.max_tokens and args.timeout):
            raise ValueError("options of the API: no number below 0; concurrency, max_tokens and timeout above it")
        if args.max_cost and not args.price_out:
            raise ValueError("max_cost wants the prices of the model: --price_in and --price_out, dollars for a million tokens")
        if not args.dry_run and not os.environ.get("OPENAI_API_KEY"):
            raise ValueError("OPENAI_API_KEY is not set; export it (any text for a local server), or look first with --dry_run")
        self.path, self.args, self.places, self.failed = Path(path), args, {}, {}
        self.params = {"temperature": args.temperature, "max_completion_tokens": args.max_tokens,
                       "response_format": {"type": "json_object"}}
        self.requests, self.size, self.spent, self.reserved, self.turn, self.dead, self.stop = 0, 0, 0.0, 0.0, 0.0, 0, None
        if not args.dry_run:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path if self.path.exists() or not args.dry_run else os.devnull, "rb" if args.dry_run else "ab+", buffering=0)
        try:
            fcntl.flock(self.file, (fcntl.LOCK_SH if args.dry_run else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process; wait for it or give another --output") from None
        with open(self.file.name, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):                          # else a last line cut off by a crash: it goes
                    try:
                        reply = json.loads(line)
                        self.places[reply["key"]] = self.size, len(line)
                        self.spent += self.cost(reply["usage"])
                    except (ValueError, TypeError, LookupError, AttributeError):
                        raise ValueError(f"{path} line {number} is no reply of an API; delete that line") from None
                    self.size += len(line)
        if not args.dry_run:
            self.file.truncate(self.size)

    def cost(self, usage):
        """Dollars for a usage {prompt_tokens, completion_tokens}; a batch costs half."""
        price = self.args.price_in * usage.get("prompt_tokens", 0) + self.args.price_out * usage.get("completion_tokens", 0)
        return price * (0.5 if self.args.batch else 1.0) / 1e6

    def most(self, messages):
        """The usage a request may come to: 1.5 tokens for a Chinese character (3 bytes), and max_tokens."""
        return {"prompt_tokens": sum(len(message["content"].encode()) // 2 + 4 for message in messages),
                "completion_tokens": self.args.max_tokens}

    def take(self, key, prompt_hash, body):
        """Append the reply in the body of a chat completion to the file. Raises ValueError if there is none."""
        try:
            choice, usage = body["choices"][0], body.get("usage") or {}
            reply = {"key": key, "content": choice["message"].get("content") or "", "finish_reason": choice.get("finish_reason"),
                     "prompt_hash": prompt_hash, "model": body.get("model"), "params": {"model": self.args.model, **self.params},
                     "usage": {k: usage.get(k) or 0 for k in ("prompt_tokens", "completion_tokens")},
                     "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"no chat completion: {str(body)[:80]!r}") from None
        line = (json.dumps(reply, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            if self.file.write(line) < len(line):
                raise OSError("disk full")
        except OSError as error:
            self.file.truncate(self.size)                         # no half line stays
            raise OSError(f"{self.path}: {error.strerror or error}; {len(self.places):,} replies are safe, run again to go on") from None
        self.places[key] = self.size, len(line)
        self.size += len(line)
        self.failed.pop(key, None)
        self.spent += self.cost(reply["usage"])
        self.bar.set_postfix_str(f"${self.spent:.4f}", refresh=False)
        self.bar.update()

    async def wait(self, seconds):
        """Sleep, but not beyond the moment at which the run is stopped."""
        end = time.monotonic() + seconds
        while not self.stop and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    async def send(self, client, key, messages):
        """One request until it is answered, refused for good (then self.failed holds the reason) or the run is stopped."""
        from openai import APIConnectionError, APIStatusError
        args, most = self.args, self.most(messages)
        for attempt in range(args.retries + 1):
            if args.rpm or args.tpm:                              # requests leave evenly spaced
                self.turn, seconds = max(self.turn, time.monotonic()), self.turn - time.monotonic()
                self.turn += max(60 / args.rpm if args.rpm else 0, 60 * sum(most.values()) / args.tpm if args.tpm else 0)
                await self.wait(seconds)
            if args.max_requests and self.requests >= args.max_requests:
                self.stop = self.stop or f"max_requests {args.max_requests} reached"
            if args.max_cost and self.spent + self.reserved + self.cost(most) > args.max_cost:
                self.stop = self.stop or f"max_cost {args.max_cost} would be passed, {self.spent:.4f} dollars spent"
            if self.stop:
                return
            self.requests += 1
            self.reserved += self.cost(most)
            sent = {"model": args.model, "messages": messages, **self.params}
            try:
                self.take(key, prompt_hash(messages), await client.post("/chat/completions", cast_to=object, body=sent))
                self.dead = 0
                return
            except APIStatusError as error:
                text, code = self.clean(error), error.status_code
                refused = next((name for name in sent if name != "model" and name in (error.param or text)), None)
                if code in (400, 422) and refused in ("temperature", "response_format", "max_completion_tokens"):
                    if self.params.pop(refused, None) == args.max_tokens:
                        self.params["max_tokens"] = args.max_tokens
                    continue
                if code in (401, 403, 404) or error.code == "insufficient_quota":
                    raise ValueError(f"{client.base_url} refuses model {args.model}: {text}") from None
                self.failed[key], seconds = text, retry_after(error)
                if code < 500 and code not in (408, 409, 429):
                    break
            except (APIConnectionError, ValueError) as error:     # ValueError: an answer that is no chat completion
                self.failed[key], seconds = self.clean(error), 0.0
            finally:
                self.reserved -= self.cost(most)
            await self.wait((seconds or min(30, 0.5 * 2 ** attempt)) + random.random() * min(1 + attempt, 5))
        self.dead += 1
        if self.dead >= 2 * args.concurrency:
            raise ValueError(f"{self.dead} requests in a row without an answer, the last one: {self.failed[key]}")

    def clean(self, error):
        """An error's text in one line without the key, which a server may have put there."""
        return " ".join(str(error).replace(os.environ["OPENAI_API_KEY"], "***").split())[:300]

    async def online(self, client, todo):
        """Send the jobs, `concurrency` at a time. What stops one stops all, after the replies in flight have come in."""
        jobs = iter(todo)

        async def work():
            for job in jobs:
                try:
                    await self.send(client, *job)
                except (ValueError, OSError) as error:
                    self.stop = error
                if self.stop:
                    return
        await asyncio.gather(*(work() for _ in range(min(self.args.concurrency, len(todo)))))

    async def batched(self, client, todo):
        """The same through files and batches. Their ids are noted before anything waits, so that a run killed at any
        moment finds its batches again; a batch made but not noted is known by its file."""
        note = self.path.with_suffix(".batches.json")
        pending = read_json_file(note) if note.is_file() else {}                           # {id of a file: id of its batch}
        for new in (False, True):                                 # first what an earlier run left, then the rest
            if new:
                todo = [job for job in todo if job[0] not in self.places]
                for chunk in (todo[i:i + 20000] for i in range(0, len(todo), 20000)):
                    lines = [{"custom_id": f"{prompt_hash(messages)} {key}", "method": "POST", "url": "/v1/chat/completions",
                              "body": {"model": self.args.model, "messages": messages, **self.params}} for key, messages in chunk]
                    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                    pending[(await client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")).id] = None
                    write_json(note, pending)
            for file in [file for file, batch in pending.items() if not batch]:
                made = {batch.input_file_id: batch.id async for batch in client.batches.list(limit=100)}
                pending[file] = made.get(file) or (await client.batches.create(
                    input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h")).id
                write_json(note, pending)
            for file, id in list(pending.items()):
                while (batch := await client.batches.retrieve(id)).status not in ("completed", "failed", "expired", "cancelled"):
                    self.bar.set_description(f"{id} {batch.status}")
                    await self.wait(self.args.poll)
                    if self.stop:
                        return
                for result in filter(None, (batch.output_file_id, batch.error_file_id)):
                    for line in (await client.files.content(result)).text.splitlines():
                        row = json.loads(line)
                        hash, key = row["custom_id"].split(" ", 1)
                        try:
                            if key not in self.places:
                                self.take(key, hash, (row.get("response") or {}).get("body"))
                        except ValueError as error:
                            self.failed[key] = self.clean(row.get("error") or error)
                del pending[file]
                write_json(note, pending)

    async def run(self, todo):
        from openai import AsyncOpenAI, OpenAIError

        def interrupt():
            self.stop = "interrupted"                             # a second Ctrl-C does not wait for the replies in flight
            loop.remove_signal_handler(signal.SIGINT)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            with tqdm(total=len(todo), unit="reply", mininterval=1) as self.bar:
                async with AsyncOpenAI(base_url=self.args.base_url or None, timeout=self.args.timeout,
                                       max_retries=self.args.retries if self.args.batch else 0) as client:
                    await (self.batched if self.args.batch else self.online)(client, todo)
        except OpenAIError as error:
            raise ValueError(f"{client.base_url}: {self.clean(error)}; run the same command to go on") from None
        if isinstance(self.stop, Exception):
            raise self.stop

    def ask(self, jobs):
        """Ask the jobs [(key, messages), ...] that have no reply yet; `reply` then tells them. A dry run shows the first
        prompts and the bill instead."""
        if changed := [key for key, messages in jobs if key in self.places and self.reply(key)["prompt_hash"] != prompt_hash(messages)]:
            raise ValueError(f"{self.path}: {len(changed):,} replies answer other prompts (first: {changed[0]}); the seed, the data or "
                             "a form has changed: give another --output, or delete those lines")
        todo = [job for job in jobs if job[0] not in self.places]
        if self.args.dry_run:
            for key, messages in todo[:3]:
                print(f"--- {key}", *(message["content"] for message in messages), sep="\n")
            tokens = {name: sum(self.most(messages)[name] for _, messages in todo) for name in ("prompt_tokens", "completion_tokens")}
            print(f"--- {len(jobs):,} prompts, {len(todo):,} to ask: about {tokens['prompt_tokens']:,} tokens in and at most "
                  f"{tokens['completion_tokens']:,} out, {self.cost(tokens):.2f} dollars at most; {self.spent:.4f} spent so far")
        elif todo and not self.stop:
            asyncio.run(self.run(todo))

    def reply(self, key):
        """The reply to a key as its line holds it, None if there is none."""
        return json.loads(os.pread(self.file.fileno(), *reversed(self.places[key]))) if key in self.places else None


def prompt_hash(messages):
    """What tells two prompts apart: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]


def write_lines(path, records):
    """Write records as JSON lines, replacing the file at once, and say so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lambda p: p.write_text(lines, encoding="utf-8"))
    print(f"{path}: {len(records):,} records")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    offline = commands.add_parser("offline", help="instruction records from forms, split by entity")
    offline.add_argument("--output_dir", default=str(DATA), help="folder for train.jsonl and heldout.jsonl")
    offline.add_argument("--heldout", type=float, default=0.1, help="share of the entities that is held out")
    offline.add_argument("--questions", type=int, default=2, help="question forms per fact in train.jsonl (held out: 1)")
    sentences = commands.add_parser("sentences", help="plain sentences to train a base on")
    sentences.add_argument("--output", required=True, help="file to write")
    sentences.add_argument("--passes", type=int, default=30, help="how often each fact is told")
    tokenizer = commands.add_parser("tokenizer", help="a SentencePiece model for a small base")
    tokenizer.add_argument("--output", required=True, help="file to write")
    tokenizer.add_argument("--vocab_size", type=int, default=4096, help="pieces, the 256 bytes included")
    for command in (offline, sentences, tokenizer):
        command.add_argument("--knowledge", default=str(DATA / "knowledge.jsonl"), help="knowledge base")
        command.add_argument("--forms", default=str(DATA / "forms.json"), help="questions and statements by relation")
        command.add_argument("--seed", type=int, default=0, help="of every random choice")
    args = parser.parse_args()
    entities, forms = read_knowledge(args.knowledge), read_json_file(args.forms)
    if args.command == "offline":
        if not 0 < args.heldout < 1 or args.questions < 1:
            raise ValueError(f"heldout {args.heldout}, questions {args.questions}: wanted 0 < heldout < 1 and at least 1")
        train, heldout = split_entities(entities, args.heldout, args.seed)
        write_lines(Path(args.output_dir) / "train.jsonl", write_records(train, forms, args.questions, random.Random(args.seed)))
        write_lines(Path(args.output_dir) / "heldout.jsonl", write_records(heldout, forms, 1, random.Random(args.seed)))
    elif args.command == "sentences":
        write_lines(args.output, write_sentences(entities, forms, args.passes, random.Random(args.seed)))
    else:
        model = train_tokenizer(entities, forms, args.vocab_size)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, lambda p: p.write_bytes(model))
        print(f"{args.output}: {args.vocab_size:,} pieces")


if __name__ == "__main__":
    run(main)
