"""Knowledge in, training text out: from forms, or by an LLM behind an OpenAI-compatible API.

  python build_data.py offline                                   facts -> train.jsonl, heldout.jsonl
  python build_data.py knowledge --model M --output x.jsonl      facts -> instruction records
  python build_data.py literature --model M --output x.jsonl     conclusions of papers -> dialogues
  python build_data.py self-instruct --model M --output x.jsonl  seed tasks -> new tasks
  python build_data.py extract --texts t.txt --model M --output kb.jsonl    texts -> facts
  python build_data.py stats x.jsonl                             what a file of records holds

What this file teaches: how a base of facts becomes records to tune a model with.

  entity     {"中心词": name, "类型": kind, relation: [value, ...]}, an object of a knowledge base
             in the form of CMeKG (Byambasuren et al. 2019)
  fact       what an entity has under one relation: 麻黄, 功效, [发汗解表, 宣肺平喘, 利水消肿]
  record     {instruction, input, output}, alpaca's form (Taori et al. 2023), with its source:
             {id, entity, kind, relations, values}
  split      by entity, so that no question about a held-out entity is seen in training
  offline    a fact, a question form and a statement form (data/forms.json) make a record
  by an LLM  facts and a prompt (data/prompts) make a job; the LLM writes several records; a record
             is kept if it states its facts, names no other entity and repeats no other record

A record that an LLM wrote also holds {form, prompt_hash, model, params, usage, time}, and how it
was judged: {score, strangers} by its facts, {rouge_l, like} beside other tasks. Beside x.jsonl
stand x.replies.jsonl, every reply that was paid for, and x.rejected.jsonl, the records that were
not kept, with the reason. Both files of records follow from the replies alone and are written
anew at the end of each run, so a run that was stopped goes on where it ended.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from html import escape
from itertools import chain, count, cycle, islice
from pathlib import Path
from string import Template

from generate import (
    DATA,
    conversation,
    encode_rendered,
    load_template,
    load_tokenizer,
    our_keys,
    read_instructions,
    read_records,
    render,
    render_turns,
)
from model import (
    SMALL,
    Lasting,
    Parser,
    check_content,
    check_own,
    check_settings,
    hold,
    own_folder,
    read_json_file,
    run,
    setting,
    stop_signals,
    to_json,
    write_hashes,
    write_json,
    write_json_lines,
    write_text,
)

from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Facts: what is known of an entity


@dataclass
class Fact:
    """What an entity has under one relation, and how to ask for it and tell it in Chinese."""

    entity: str
    kind: str
    relation: str
    text: str  # the values as one text
    values: list
    form: dict = None  # as `read_forms` has it

    def statement(self, rng):
        return rng.choice(self.form["statements"]).format(e=self.entity, v=self.text)


def facts_of(entity, forms):
    """{relation: fact} of an entity where there is a form, in the order of data/forms.json."""
    kind, own = entity["类型"], {}
    for relation, form in forms.get(kind, {}).items():
        text, values = values_of(entity, relation)
        if values:
            own[relation] = Fact(entity["中心词"], kind, relation, text, values, form)
    return own


# The patterns of a disease, and the formula for each.
PAIRED = ("中医证型", "常用方剂")
UNPAIRED = "未配对"  # what an entity has whose lists of these are not in one order


def values_of(entity, relation):
    """The values of a relation as one text and as a list."""
    if relation != "辨证论治":
        values = unique(entity.get(relation, []))
        return "、".join(values), values
    # Treatment by pattern is made of two relations: the i-th formula treats the i-th pattern.
    lists = [entity.get(relation, []) for relation in PAIRED if UNPAIRED not in entity]
    pairs = unique(zip(*lists))
    text = "，".join(f"{pattern}用{formula}" for pattern, formula in pairs)
    return text, unique(chain(*pairs))


def values_in(facts):
    return [value for fact in facts for value in fact.values]


def unique(items):
    """The items in their order, each once."""
    return list(dict.fromkeys(items))


# --------------------------------------------------------------------------------------------------
# Offline: a question form and a statement form make a record


def split_entities(entities, share, seed):
    """Training entities and held-out ones: the given share of every kind, drawn by seed."""
    rng = random.Random(seed)
    kinds = kinds_of(entities)
    # A name stands once in all names: in itself. One that is part of another (四逆汤, 当归四逆汤)
    # is not held out: training would see it in the questions about that other one.
    names = "\n".join(kinds)
    free = [name for name in kinds if names.count(name) == 1]
    held_out = set()
    for kind, number in Counter(kinds.values()).items():
        own = [name for name in free if kinds[name] == kind]
        held_out.update(rng.sample(own, min(len(own), round(share * number))))
    parts = [], []
    for entity in entities:
        parts[entity["中心词"] in held_out].append(entity)
    return parts


def single_questions(entities, forms, ways, rng):
    """Yield (form, turns, facts) of records that tell all facts: each is asked for in at most so
    many ways, and as often two facts of each entity at once."""
    for own in (facts_of(entity, forms) for entity in entities):
        for fact in own.values():
            questions = list(enumerate(fact.form["questions"]))
            for i, question in rng.sample(questions, min(ways, len(questions))):
                turn = question.format(e=fact.entity), answer([fact], own, rng)
                yield i, [turn], [fact]
        for i in range(ways if len(own) > 1 else 0):
            pair = rng.sample([*own.values()], 2)
            both = "和".join(fact.relation for fact in pair)
            yield f"pair{i}", [(f"请介绍{pair[0].entity}的{both}。", answer(pair, own, rng))], pair


def offline_record(form, turns, answered, system=""):
    """The record of turns [(question, answer), ...], whose last answer tells some facts."""
    relations = [fact.relation for fact in answered]
    first = answered[0] if answered else Fact("", "", "", "", [])
    return {
        "id": f"{first.entity}/{'+'.join(relations)}/{form}",
        **record_of_turns(turns, system),
        "entity": first.entity,
        "kind": first.kind,
        "relations": relations,
        "values": values_in(answered),
    }


# ==================================================================================================
# Offline: what an answer says beside its facts


def answer(asked, own, rng):
    """What is said of some facts of an entity, `own` being all it has: their statements, then what
    warns (of an emergency, of a poison where a dose is asked for), and what a form says goes with
    them (a dose's cautions)."""
    about, said = {fact.relation for fact in asked}, []
    for fact in asked:
        said.append(fact.statement(rng))
        said += [text for mark, text in fact.form.get("notes", {}).items() if mark in fact.text]
    said += [text for fact in own.values() for text in alerts(fact, about)]
    for relation, texts in asked[-1].form.get("then", {}).items():
        if relation in own and relation not in about:
            said.append(rng.choice(texts).format(e=fact.entity, v=own[relation].text))
    return "".join(said)


def alerts(fact, about):
    """The warnings that a fact brings about answers on some relations."""
    return [
        rule["text"].format(e=fact.entity)
        for rule in fact.form.get("alerts", [])
        if about & {*rule.get("about", about)} and re.search(rule["mark"], fact.text)
    ]


# ==================================================================================================
# By an LLM: jobs are asked, replies are parsed, records are kept or rejected

# What reading an object that others wrote may raise if it has another shape. Brackets nested
# without end are a RecursionError.
MISSHAPED = (LookupError, TypeError, AttributeError, ValueError, RecursionError)
# What a record keeps of its reply.
PAID = ("prompt_hash", "model", "params", "usage", "time")


def build(args, jobs, sieve):
    """Ask the jobs, write the records that the sieve keeps and, with the reason, the others, and
    say how many. Raises ValueError if none is kept."""
    jobs = list(jobs)[: args.sample or None]
    client = Client(replies_beside(args.output, sieve.mark), args)
    sys.stdout = Lasting(sys.stdout)  # who has left must not keep the records from being written
    if args.dry_run:
        return show_jobs(jobs, client)
    # The sieve compares each record with those kept before it: the order of the jobs counts.
    kept, rejected = [], []
    read = read_replies(args, jobs, client)
    for job, record in read:
        reason = record.get("reason") or sieve.reason(record, job)
        if reason:
            record["reason"] = reason
        (rejected if reason else kept).append(record)
        if args.sample:
            print(to_json(record, indent=1))
    # Only when the records are written may an error of the endpoint end the command.
    write_lines(beside(args.output, ".rejected.jsonl"), rejected)
    sieve.write(args, kept)
    reasons = counted(record["reason"].split(":")[0] for record in rejected)
    print(f"kept {len(kept)} of {len(read)} records; rejected: {reasons or 'none'}")
    client.end()
    if rejected and not kept:
        raise ValueError(
            f"nothing was kept; {args.output} has no records, *.rejected.jsonl says why"
        )


def show_jobs(jobs, client):
    """Print the first prompt of each form, and the bill."""
    for job in {job.form: job for job in reversed(jobs)}.values():
        print(f"--- {job.key}", *(said["content"] for said in job.messages), sep="\n")
    client.ask({job.key: job.messages for job in jobs})
    print("--- on top of that, a reply that cannot be parsed is asked once more")


def read_replies(args, jobs, client):
    """[(job, record), ...] of the replies to jobs, which are asked."""
    # A dozen first: where these fail alike, so would the others. A batch is made as a whole.
    read, n = [], 0 if args.batch else 12
    for part in (jobs[:n], jobs[n:]):
        # Ask, and where a reply cannot be parsed, ask once more. What is on the file is not asked.
        client.ask({job.key: job.messages for job in part})
        client.ask(dict(repairs(args, part, client.replies)))
        read += [(job, record) for job in part for record in read_reply(job, client)]
        faults = {record.get("reason") for _, record in read}
        if len(faults) == 1 and None not in faults and len(read) == len(part):
            break
    return read


def read_reply(job, client):
    """The records in the latest reply to a job, or one with a `reason` if there are none."""
    reply = client.replies.get(f"{job.key}/repair") or client.replies.get(job.key, {})
    # Where it comes from: the entity of its first fact (a new task has none), and the reply.
    source = {"entity": None, "kind": None, "form": job.form}
    for fact in job.facts[:1]:
        source |= {"entity": fact.entity, "kind": fact.kind}
    source |= {name: reply[name] for name in PAID if reply}
    try:
        if not reply:
            raise ValueError(f"no reply: {client.failed.get(job.key, client.stop)}")
        records = parse_items(reply["content"], job.fields)
        if job.fields == TURN:
            records = [dialogue(records)]
        return [{"id": f"{job.key}/{i}", **r, **source} for i, r in enumerate(records)]
    except ValueError as error:
        return [{"id": job.key, **source, "reason": str(error), "content": reply.get("content")}]


def dialogue(items):
    """The record of which each item is a turn."""
    turns = [tuple(item.values()) for item in items]
    if not 2 <= len(turns) <= 6 or not all(map(all, turns)):
        raise ValueError(f"turns: {len(turns)}, wanted 2 to 6 and none of them empty")
    return record_of_turns(turns)


def record_of_turns(turns, system=""):
    """What a record has of turns [(question, answer), ...]. As BenTsao wrote its rows: all turns
    but the last answer are the instruction."""
    messages = [message("system", system)] if system else []
    for question, answer in turns:
        messages += [message("user", question), message("assistant", answer)]
    if len(turns) > 1:
        question = render_turns(turns[:-1], question)
    record = {"instruction": question, "input": "", "output": answer}
    return record | {"messages": messages} if len(messages) > 2 else record


# ==================================================================================================
# How a reply is judged

# The fields of an item of a reply: a task, one turn of a dialogue, a fact of a text.
TASK = ("instruction", "input", "output")
TURN = ("user", "bot")
# A fact with the words of a text that state it.
STATED = ("head", "relation", "tail", "evidence")

# What in a record gives it away: {reason: pattern}.
FAULTS = {
    "refusal": r"抱歉|对不起|作为.{0,6}(AI|人工智能|语言模型)|无法回答|"
    r"我(无法|不能)(提供|回答|给出|判断)|(?i:as an ai|i'm sorry|i can ?not|i can't)",
    "speaks of its prompt": r"((上述|以上|给定|所给)的?|(给出|提供)的)"
    r"(知识|材料|信息|结论|资料|文本)|根据(知识|材料)|JSON",
}


def parse_items(content, fields):
    """The items of a reply, [{field: text}, ...], without what else they hold. Raises ValueError
    unless it is {"items": [...]} with texts. A code fence or a reasoning model's thoughts around it
    are cut off; a missing input is empty."""
    # Some models put thoughts before the JSON or a fence around it, though told not to.
    thoughts, fence = r"(?:.*?</think>)?", r"(?:```(?:json)?\n)?(.*?)(?:\n```)?"
    text = re.fullmatch(rf"(?s)\s*{thoughts}\s*{fence}\s*", content)[1]
    if not text:
        raise ValueError("empty")
    items = []
    try:
        for item in json.loads(text)["items"]:
            item["input"] = item.get("input") or ""
            items.append({field: item[field].strip() for field in fields})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    except MISSHAPED:
        raise ValueError(f"wanted items, each with texts for {', '.join(fields)}") from None
    # A text may state no fact.
    if not items and fields != STATED:
        raise ValueError("no items")
    return items


class Sieve:
    """Finds the reason to reject a record, in its text and in what was kept before.

    sources: the files that records are made from. names: the `Names` that a record may use only
    where its prompt holds them. seeds: instructions that new ones must differ from
    (self-instruct)."""

    mark = "prompt_hash"  # what each line that it writes holds

    def __init__(self, *sources, names=None, seeds=()):
        self.sources, self.names = sources, names
        self.exact = set()
        self.grams, self.tasks = TokenIndex(), TokenIndex()
        for seed in seeds:
            words, bag = split_words(seed)
            self.tasks.add(bag, (words, seed))

    def reason(self, record, job):
        """The reason to reject a record, "" to keep it. Notes on the record which values of the
        job's facts it states."""
        # What its text alone gives away. In a dialogue every second message is a reply.
        replies = [said["content"] for said in record.get("messages", [])[1::2]]
        told = "\n".join(replies or [record["output"]])
        text = f"{record['instruction']}\n{record['input']}\n{told}"
        answers = plain(told)
        for reason, pattern in FAULTS.items():
            if re.search(pattern, text):
                return reason
        if len(answers) < 10 or len(record["instruction"]) < 4:
            return "too short"
        if len(re.findall("[\u4e00-\u9fff]", answers)) < 0.5 * len(answers):
            return "not Chinese"
        return self.not_grounded(record, text, answers, job) or self.repeated(record) or ""

    def not_grounded(self, record, text, answers, job):
        """A record must state a value of its facts, and name no disease, herb, drug or formula that
        its prompt does not hold."""
        if not job.facts:
            return
        # Which values it states, and the share of the values that it was given. A name that the
        # prompt does not hold is knowledge of the LLM's own, true or not.
        given = unique(values_in(job.facts))
        stated = [value for value in given if says(answers, value)]
        relations = (fact.relation for fact in job.facts if set(stated) & set(fact.values))
        strangers = self.names.strangers(text, job.messages[-1]["content"])
        record |= {
            "relations": unique(relations),
            "values": stated,
            "score": round(len(stated) / len(given), 3),
            "strangers": strangers,
        }
        if not stated:
            return "names no value of its facts"
        if strangers:
            return "names what its facts do not"

    def repeated(self, record):
        """How it is like a record kept before, if it is: the same text; about the same entity, with
        mostly the same 4-grams; a task of mostly the same words. If not, it counts as kept."""
        text, entity = text_of(record), record.get("entity")
        # The 4-grams, each with the entity: records of two entities have none in common.
        grams = {(entity, text[i : i + 4]) for i in range(len(text) - 3)}
        # The cheap comparison first.
        if text in self.exact:
            return "duplicate"
        # Jaccard similarity of 0.7: common / (total - common) >= 0.7, solved for common.
        if self.grams.like(grams, 0.7 / 1.7):
            return "near duplicate"
        if self.tasks.texts:
            record["rouge_l"], record["like"] = most_like(self.tasks, record["instruction"])
            if record["like"]:
                return "like a task kept before"
        # What is rejected must not be remembered, or a good record would fall with it.
        self.exact.add(text)
        self.grams.add(grams, text)

    def write(self, args, kept):
        write_lines(args.output, kept, *self.sources)
        if kept:
            Stats(args.knowledge, html=beside(args.output, ".html")).run(args.output)


def plain(text):
    """A text as it is compared: NFKC (full width made half), lower case, letters and digits only.
    Between digits a point stays (or 15 would pass for 1.5), and "~" stands for any other sign
    (3～10, 3至10)."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d)(?!\.\d)[\W_至到]+(?=\d)", "~", text)
    return re.sub(r"(?!(?<=\d)[.~]\d)[\W_]", "", text)


def says(text, value):
    """Whether a plain text states a value: word for word, or if it is long by most of its pairs of
    characters. In either case each number of the value stands there whole."""
    value = plain(value)
    numbers, known = (set(re.findall(r"\d+(?:\.\d+)?", part)) for part in (value, text))
    pairs = [value[i : i + 2] for i in range(len(value) - 1)]
    shared = sum(pair in text for pair in pairs)
    alike = value in text or (len(value) > 6 and shared >= 0.7 * len(pairs))
    return value > "" and numbers <= known and alike


class Names:
    """The names of diseases, herbs, drugs and formulas in a knowledge base. data/relations.json
    says which relations hold names, and which of their values are no names."""

    def __init__(self, entities):
        rules = read_json_file(f"{DATA}/relations.json")
        self.kinds = kinds_of(entities)
        # {name: names of the same}: two entities may share an alias.
        self.entities = defaultdict(set)
        for entity in entities:
            # The values of some relations are names too: a formula's 组成 names herbs.
            for relation, kind in {"别名": entity["类型"], **rules["names"]}.items():
                for value in entity.get(relation, []):
                    if relation == "别名":
                        self.entities[value].add(entity["中心词"])
                    if not re.search(rules["no_names"], value):
                        self.kinds.setdefault(value, kind)
        for name in self.kinds:
            self.entities[name].add(name)
        # By longest match: 四逆汤 in 当归四逆汤 is none.
        names = sorted(self.kinds, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)))

    def find(self, text):
        """The set of names in a text."""
        # One character is inside too many words.
        return {name for name in self.pattern.findall(text) if len(name) > 1}

    def strangers(self, text, given):
        """Names in a text that the given text does not hold, under this or another name."""
        held = set().union(*map(self.entities.get, self.find(given)))
        strange = [name for name in self.find(text) if not held & self.entities[name]]
        # A longer word may hold a disease or drug (缺铁性贫血: 贫血), but no herb and no formula.
        return sorted(n for n in strange if self.kinds[n] in ("中药", "方剂") or n not in given)


class TokenIndex:
    """Texts as sets of tokens, with an inverted index: {token: numbers of the texts that hold it}.
    Counting over the lists of a new text's tokens tells what it shares with every text, so that
    only the few that could be like it are compared in full."""

    def __init__(self):
        self.postings = defaultdict(list)
        # [(number of tokens, text), ...]
        self.texts = []

    def add(self, tokens, text):
        for token in tokens:
            self.postings[token].append(len(self.texts))
        self.texts.append((len(tokens), text))

    def like(self, tokens, share):
        """The texts that have enough tokens in common with a new one: at least a share of the sum
        of both numbers, so that equal texts share 0.5."""
        common = Counter(chain(*(self.postings.get(token, ()) for token in tokens)))
        found = ((shared, *self.texts[i]) for i, shared in common.items())
        # 1e-9: what rounding may have added to the bound.
        return [text for n, size, text in found if n >= share * (size + len(tokens)) - 1e-9]


def text_of(record):
    """All that a record says, as it is compared."""
    return plain(f"{record['instruction']}{record['input']}{record['output']}")


def most_like(index, text):
    """ROUGE-L and the text in the index that is most like a new one, if that is 0.7 or more; else 0
    and "", and the new text enters the index."""
    words, bag = split_words(text)
    # A common subsequence has no more tokens than both texts have in common, which rules most out.
    scores = [(rouge_l(words, other), like) for other, like in index.like(bag, 0.7 / 2)]
    score, like = max(scores, default=(0.0, ""))
    if score >= 0.7:
        return round(score, 3), like
    index.add(bag, (words, text))
    return 0.0, ""


def split_words(text):
    """The tokens of a text for ROUGE (Chinese characters, words of other letters), and the same as
    a set in which the n-th occurrence of a word is (word, n)."""
    words = re.findall(r"[a-z0-9]+|\w", text.lower())
    return words, [(word, i) for word, n in Counter(words).items() for i in range(n)]


def rouge_l(a, b):
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of two lists of tokens.

    Bit i of one integer stands for a[i], and falls to zero where the subsequence grows (Hyyrö
    2004), so that a row of the textbook's table is one addition."""
    places = defaultdict(int)
    for i, token in enumerate(a):
        places[token] |= 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        # The sum carries each lowest match of a run of ones up to the end of that run.
        match = row & places[token]
        row = (row + match | row - match) & full
    return 2 * (len(a) - row.bit_count()) / max(1, len(a) + len(b))


# ==================================================================================================
# Jobs: what an LLM is asked


@dataclass
class Job:
    """A prompt for the LLM, the key of its reply, and what the reply is judged by."""

    key: str
    form: str  # name of the prompt in data/prompts
    messages: list
    facts: list  # what the reply may state; empty: anything
    fields: tuple = TASK  # of each item of the reply


def read_prompts(folder):
    """{name: form} of the prompts in a folder. A form holds the lines of its `prompt`, in which
    $facts, $entity and the like stand for texts. One that asks for facts of an entity also holds

      weight     how often it is drawn
      kinds      of the entities that it suits
      relations  facts that must be there
      facts      how many facts of an entity are shown
      share      if there: relations under which a second entity must have the same value
      follow     if there: relations shown of those values that are entities themselves

    Raises ValueError naming the file whose form is another."""
    prompts = {path.stem: read_json_file(path) for path in sorted(Path(folder).glob("*.json"))}
    for name, form in prompts.items():
        try:
            form["prompt"] = "\n".join([] + form["prompt"])
            # Each access fails, as it should, where something is missing or of another type.
            if form.setdefault("weight", 0) > 0:
                form["kinds"], form["relations"], range(form["facts"])
        except MISSHAPED as error:
            raise ValueError(
                f"{folder}/{name}.json: {error}; wanted prompt: [lines] and, beside a weight, "
                "kinds, relations and facts (a number)"
            ) from None
    if not prompts:
        raise ValueError(f"{folder} holds no prompts; wanted .json files as in data/prompts")
    return prompts


def set_weights(prompts, mix):
    """Give the prompts the weights of --mix, as single=3,vignette=1; those not in it get 0."""
    for form in prompts.values():
        form["weight"] = 0
    for part in mix.split(","):
        name, _, weight = part.partition("=")
        known = [name for name in prompts if "kinds" in prompts[name]]
        if name not in known or not weight.isdecimal():
            raise ValueError(f"mix {mix!r}, wanted name=weight,... of {' '.join(known)}")
        prompts[name]["weight"] = int(weight)


def make_job(args, prompts, form, item, facts=(), **texts):
    """The job that asks for an item by a form, with facts and other texts in their places."""
    if form not in prompts:
        raise ValueError(f"{args.prompts} has no form {form}; there are {' '.join(prompts)}")
    listed = "\n".join(f"- {fact.entity}的{fact.relation}：{fact.text}" for fact in facts)
    user = Template(prompts[form]["prompt"]).safe_substitute(texts, facts=listed)
    system = message("system", read_text(f"{args.prompts}/system.txt"))
    messages = [system, message("user", user)]
    fields = {"literature": TURN, "extract": STATED}.get(form, TASK)
    return Job(f"{item}/{form}/{args.model}", form, messages, facts, fields)


def read_text(path):
    check_content(path, SMALL)
    return Path(path).read_text(encoding="utf-8")


def message(role, content):
    return {"role": role, "content": content}


class FactSampler:
    """Draws the facts of entities for prompts."""

    def __init__(self, entities, forms):
        self.facts = {entity["中心词"]: facts_of(entity, forms) for entity in entities}
        # {(kind, relation, value): names of the entities that have it}
        self.holders = defaultdict(set)
        for fact in chain(*map(dict.values, self.facts.values())):
            for value in fact.values:
                self.holders[fact.kind, fact.relation, value].add(fact.entity)

    def under(self, name, relations):
        """The facts of an entity under some relations."""
        own = self.facts.get(name, {})
        return [own[relation] for relation in own if relation in relations]

    def partners(self, name, relations):
        """Entities of the same kind that have a value in common under one of the relations."""
        found = set()
        for fact in self.under(name, relations):
            for value in fact.values:
                found |= self.holders[fact.kind, fact.relation, value]
        return sorted(found - {name})

    def choose(self, rng, form, name):
        """A partner's name (or the entity's own) and the facts for a job about an entity."""
        other = rng.choice(self.partners(name, form["share"])) if "share" in form else name
        # Of each entity the facts that the prompt cannot do without, then some of the others.
        chosen = []
        for entity in unique([name, other]):
            must = self.under(entity, form["relations"])
            rest = [fact for fact in self.facts[entity].values() if fact not in must]
            more = max(0, form["facts"] - len(must))
            chosen += must + rng.sample(rest, min(more, len(rest)))
        # A formula's herbs are entities themselves: what the prompt needs to know of those.
        for value in unique(values_in(chosen)):
            chosen += self.under(value, form.get("follow", ()))
        return other, chosen


def knowledge_jobs(args, entities, forms, prompts):
    """args.count jobs: prompts drawn by weight, the entities of each in turn, their facts by seed.
    A greater count adds jobs and changes none. Raises ValueError if no prompt suits an entity."""
    rng = random.Random(args.seed)
    sampler = FactSampler(entities, forms)
    # Which entities each prompt suits, in an order of its own.
    pools = {}
    for title, form in prompts.items():
        pool = [
            name
            for name, own in sampler.facts.items()
            if form["weight"] > 0
            and any(fact.kind in form["kinds"] for fact in own.values())
            and own.keys() >= {*form["relations"]}
            and ("share" not in form or sampler.partners(name, form["share"]))
        ]
        if pool:
            rng.shuffle(pool)
            pools[title] = cycle(pool)
    if not pools:
        raise ValueError(f"{args.knowledge}: no form in {args.prompts} suits an entity there")
    # A job's facts hang on its own key alone, not on the jobs drawn before it.
    seen = defaultdict(count)
    weights = [prompts[title]["weight"] for title in pools]
    for title in rng.choices([*pools], weights, k=args.count):
        name = next(pools[title])
        number = next(seen[title, name])
        item_rng = random.Random(f"{args.seed}/{title}/{name}/{number}")
        other, chosen = sampler.choose(item_rng, prompts[title], name)
        item = f"{name}#{number}"
        yield make_job(args, prompts, title, item, chosen, entity=name, other=other)


def literature_jobs(args, prompts):
    """args.count jobs: a dialogue of 2 to 6 turns about each conclusion in turn."""
    papers = read_records(args.literature)
    # Several papers may have one title: the number tells them apart.
    seen = defaultdict(count)
    for where, paper in islice(cycle(papers), args.count):
        title, disease, conclusion = texts = [paper.get(key) for key in ("标题", "疾病", "结论")]
        if not are_texts(*texts):
            raise ValueError(f"{args.literature} {where}: wanted texts for 标题, 疾病 and 结论")
        # The values are the clauses, less those of three characters and fewer.
        values = re.findall("[^，。；]{4,}", conclusion) or [conclusion]
        facts = [Fact(title, None, "结论", conclusion, values)]
        number = next(seen[title])
        turns = random.Random(f"{args.seed}/{title}/{number}").randint(2, 6)
        yield make_job(
            args,
            prompts,
            "literature",
            f"{title}#{number}",
            facts,
            title=title,
            disease=disease,
            conclusion=conclusion,
            turns=turns,
        )


def self_instruct_jobs(args, prompts, seeds):
    """args.count jobs, each with three seed tasks as examples (Wang et al. 2022; from the seeds
    alone, as Stanford Alpaca draws them)."""
    for i in range(args.count):
        drawn = random.Random(f"{args.seed}/{i}").sample(seeds, min(3, len(seeds)))
        examples = "\n".join(to_json({field: task[field] for field in TASK}) for task in drawn)
        yield make_job(args, prompts, "self_instruct", f"tasks#{i}", examples=examples)


def repairs(args, jobs, replies):
    """Yield (key, messages) of prompts that show the LLM a reply that cannot be parsed and the
    reason: each job once."""
    form = Template(read_text(f"{args.prompts}/repair.txt"))
    for job in jobs:
        key = f"{job.key}/repair"
        if job.key not in replies or key in replies:
            continue
        said = replies[job.key]["content"]
        try:
            parse_items(said, job.fields)
        except ValueError as error:
            asked = form.safe_substitute(reason=error)
            said = message("assistant", said or "（空）")
            yield key, [*job.messages, said, message("user", asked)]


# ==================================================================================================
# Facts out of texts


def read_texts(path):
    """The pieces of texts, at most 500 characters each and cut behind sentences, as Facts: the
    subject is the entity, the place is the relation, labelled triples are the values. The file is
    plain text, a paragraph a line, or holds records with a text; spo_list is read in CMeKG's form
    and in CMeIE's (Guan et al. 2020). Raises ValueError naming the place of what is neither."""
    for where, row in read_records(path):
        try:
            text, *_ = [row[k] for k in ("text", "结论", "output", "instruction") if k in row]
            labelled = [labelled_triple(item) for item in row.get("spo_list", [])]
            # A sentence that is longer is cut where it must be.
            pieces = re.findall(r"(?s).{1,500}(?:(?<=[。！？；\n])|$)|.{1,500}", text)
        except MISSHAPED:
            raise ValueError(
                f"{path} {where}: wanted text, 结论 or output, and spo_list, if there, in CMeIE's "
                "form or CMeKG's"
            ) from None
        for piece in pieces:
            yield Fact(str(row.get("疾病") or ""), None, where, piece, labelled)


def labelled_triple(item):
    if isinstance(item, dict):
        item = item["subject"], item["predicate"], item["object"]["@value"]
    head, relation, tail = item
    return "" + head, "" + relation, "" + tail


def extract_jobs(args, texts, schema):
    """For each piece of texts a job for each kind of entity: an LLM that is asked for all kinds
    at once overlooks more."""
    prompts = read_prompts(args.prompts)
    examples = list(read_texts(args.examples))[:3] if args.examples else []
    for i, text in enumerate(texts):
        for kind, relations in schema.items():
            shown = "\n".join(f"文本：{one.text}\n{to_items(one, relations)}" for one in examples)
            yield make_job(
                args,
                prompts,
                "extract",
                f"{text.relation}#{i}/{kind}",
                [replace(text, kind=kind)],
                kind=kind,
                relations="、".join(relations),
                examples=shown,
                subject=text.entity,
                text=text.text,
            )


def to_items(text, relations):
    """The reply that gives the labelled facts of a text under some relations."""
    items = []
    for head, relation, tail in text.values:
        evidence = re.search(f"[^。！？；\n]*{re.escape(tail)}[^。！？；\n]*", text.text)
        if evidence and relation in relations:
            items.append(dict(zip(STATED, (head, relation, tail, evidence[0]))))
    return to_json({"items": items})


# What denies the value behind it; some words reach over a list.
DENIED = "(?:(?:否认|未见|未发现|排除|不伴|没有|并非|不是)[^，。；！？]{0,20}|[无未](?:明显|出现)?)"


@dataclass
class TripleSieve:
    """Finds the reason to reject a triple that its text does not state, and joins the others to a
    knowledge base. schema: {kind: relations}. labelled: {(place, head, relation, tail), ...}, what
    is there to be found."""

    schema: dict
    labelled: set
    mark = "head"  # what each line that it writes holds

    def reason(self, record, job):
        [asked] = job.facts
        head, relation, tail, evidence = map(record.get, STATED)
        record["source"] = asked.relation
        affirmed = re.sub(DENIED + re.escape(tail), "", evidence)
        fits = {
            "relation not asked for": relation in self.schema[asked.kind],
            "no name": plain(head) and plain(tail) and len(head + tail) < 60,
            "evidence not in the text": plain(evidence) in plain(asked.text),
            "value not in its evidence": plain(tail) in plain(evidence),
            "head not in the text": plain(head) in plain(asked.entity + asked.text),
            "denied": plain(tail) in plain(affirmed),
        }
        return next((reason for reason, fit in fits.items() if not fit), "")

    def write(self, args, kept):
        """Write each triple once, with all its evidence, and those that cannot all be true; print
        how they agree with the labelled ones."""
        triples = defaultdict(list)
        for record in kept:
            head, relation, tail = map(record.get, TRIPLE)
            said = {"source": record["source"], "text": record["evidence"]}
            triples[head, relation, tail].append(said)
            triples[head, "类型", record["kind"]] = []
            # Which formula is for which pattern, two lists of a text do not tell.
            if relation in PAIRED:
                triples[head, UNPAIRED, "是"] = []
        rows = [dict(zip(STATED, (*triple, said))) for triple, said in triples.items()]
        write_lines(args.output, rows, args.texts)
        doubts = conflicts(triples)
        write_lines(beside(args.output, ".conflicts.jsonl"), doubts)
        for doubt in doubts:
            print(doubt)
        found = {tuple(map(record.get, ("source", *TRIPLE))) for record in kept}
        print_scores(found, self.labelled)


def conflicts(triples):
    """[{"conflict": triples that cannot all be true}, ...]: two kinds of one entity, two
    complications of each other, an indication that is contraindicated."""
    sides = defaultdict(dict)
    for triple in triples:
        head, relation, tail = triple
        tail = re.split("(?:患?者)?(?:[禁忌慎]|不宜)", tail)[0]
        side = {"类型": tail, "并发症": head, "主治": 1, "治疗": 1, "使用注意": 0}.get(relation)
        about = frozenset((head, relation if relation == "类型" else tail))
        if side is not None:
            sides[about][side] = triple
    return [{"conflict": [*side.values()]} for side in sides.values() if len(side) > 1]


def print_scores(found, labelled):
    """Precision, recall and F1 of (place, head, relation, tail) found, strict, in all and by
    relation."""
    some = found, labelled, found & labelled
    found, labelled, right = (Counter(chain(*(("all", t[2]) for t in each))) for each in some)
    for relation, n in labelled.items():
        k, m = right[relation], found[relation]
        print(
            f"{relation}: precision {k / max(1, m):.4f}, recall {k / n:.4f}, "
            f"F1 {2 * k / (m + n):.4f}"
        )


# ==================================================================================================
# Replies: the file of all that was paid for


class Replies(dict):
    """{key: reply} of x.replies.jsonl, a line for each reply. The file is locked while it is open;
    a last line that a crash cut off goes. read_only (a dry run) changes nothing on the disk.
    Raises ValueError if another process holds the file, and for a line that is no reply."""

    def __init__(self, path, read_only=False):
        self.path = path
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Open until `Client.end`: closing it releases the lock.
            self.file = open(path, "ab+", buffering=0)  # noqa: SIM115
            hold(self.file, path)
        data = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                reply = json.loads(line)
                self[reply["key"]] = reply
            except MISSHAPED:
                # Only the last line may be one that a crash cut off.
                if line.endswith(b"\n"):
                    raise ValueError(f"{path} line {number} is no reply; delete it") from None
                data = data.removesuffix(line)
        if not read_only:
            # What a crash cut off goes; a complete reply without its end of line gets one.
            self.file.truncate(len(data))
            if data and not data.endswith(b"\n"):
                self.file.write(b"\n")

    def append(self, reply):
        """Bring a reply to the disk. Raises OSError if that is full; no half line is left."""
        # What stands here is what counts: half a character is no text, and the key no one's.
        line = f"{blank(to_json(reply))}\n".encode("utf-8", "replace")
        size = self.path.stat().st_size
        try:
            if self.file.write(line) < len(line):
                raise OSError("disk full")
            os.fsync(self.file)
        except OSError as error:
            self.file.truncate(size)
            safe = f"{len(self):,} replies are safe, run again to go on"
            raise OSError(f"{self.path}: {error.strerror or error}; {safe}") from None
        self[reply["key"]] = json.loads(line)


def replies_beside(output, mark):
    """The file of the replies to an output. Raises ValueError if the output is another command's:
    it stands there without replies, or its records do not hold mark, as ours all do."""
    # Where there are replies records may stand there, else nothing may.
    path = beside(output, ".replies.jsonl")
    check_own(output, *[f'"{mark}": '] * path.exists())
    return path


def beside(output, ending):
    """The file beside an output: x.jsonl, ".html" -> x.html."""
    return Path(re.sub(r"\.jsonl?$", "", str(output)) + ending)


# ==================================================================================================
# The client: asks an API


MAX_REPLY = 8 << 20  # bytes of a response


class Stopped(Exception):
    """Why a run ends early, where the same command goes on later: a cap, a signal."""


class Client:
    """Asks an OpenAI-compatible endpoint the prompts {key: messages} that have no reply yet.

    Each reply is brought to the file before it is used: {key, content, finish_reason, prompt_hash,
    model, params, usage, batch, time}. What stands there is paid: no later run asks it again. What
    is asked and how a reply is judged is the caller's business."""

    def __init__(self, path, args):
        # Its options: self.model, self.timeout, self.max_cost and the like.
        vars(self).update(vars(args))
        self.replies = Replies(path, read_only=self.dry_run)
        self.note = path.with_suffix(".batches.json")
        self.params = {
            "temperature": self.temperature,
            "max_completion_tokens": self.max_tokens,
            "response_format": {"type": "json_object"},
            "model": self.model,
        }
        # {key: why it has no reply}, and the exception that ended the run.
        self.failed, self.stop = {}, None
        # Tries in this run, and prompts in a row that got no answer.
        self.requests = self.unanswered = 0
        # Dollars of requests whose cost is not known, and of all answers.
        self.reserved = 0.0
        self.spent = sum(self.cost(tokens_used(r), r.get("batch")) for r in self.replies.values())

    def cost(self, usage, batch):
        """Dollars for {prompt_tokens, completion_tokens}; a batch costs half."""
        dollars = self.price_in * usage["prompt_tokens"]
        dollars += self.price_out * usage["completion_tokens"]
        return dollars / (2e6 if batch else 1e6)

    def bound(self, prompts):
        """The most tokens that requests may come to: one for each byte of the prompts [messages,
        ...] as JSON, which no tokenizer exceeds, and max_tokens for each reply."""
        size = len(to_json(list(prompts)).encode())
        return {"prompt_tokens": size, "completion_tokens": self.max_tokens * len(prompts)}

    def ask(self, prompts):
        """Ask the prompts {key: messages} that have no reply yet. `replies` holds them then, and
        `end` tells what stopped it. A dry run shows the bill instead."""
        todo = {}
        for key, messages in prompts.items():
            if key not in self.replies:
                todo[key] = messages
            elif self.replies[key].get("prompt_hash") != prompt_hash(messages):
                raise ValueError(
                    f"{self.replies.path}: the reply to {key} answers another prompt (other seed, "
                    "data or forms); give another --output"
                )
        if self.dry_run:
            total = self.bound(todo.values())
            tokens = f"{total['prompt_tokens']:,} tokens in and {total['completion_tokens']:,} out"
            dollars = "dollars with --price_in and --price_out"
            if self.price_out:
                cost = self.cost(total, self.batch)
                dollars = f"{cost:.2f} dollars at most; {self.spent:.4f} spent so far"
            print(
                f"--- {len(prompts):,} prompts, {len(todo):,} to ask: at most {tokens}, {dollars}"
            )
        elif todo and not self.stop:
            asyncio.run(self.run(todo))

    def end(self):
        """Let go of the replies, once the caller has written what was paid, and tell what stopped
        the run: raise what no further request can mend, print the rest."""
        self.replies.file.close()  # what stopped the run may hold this object, and so the lock
        if isinstance(self.stop, Stopped):
            print(f"stopped: {self.stop}; the same command goes on")
        elif self.stop:
            raise self.stop

    async def run(self, todo):
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

        def interrupt(number):
            self.stop = Stopped("interrupted")

        ask_all = self.batched if self.batch else self.online
        try:
            api = AsyncOpenAI(
                base_url=self.base_url or None,
                timeout=self.timeout,
                # Online each further try is made and counted by `send`.
                max_retries=self.retries if self.batch else 0,
                default_headers={"Accept-Encoding": "identity"},
                http_client=DefaultAsyncHttpxClient(event_hooks={"response": [self.bound_size]}),
            )
        except Exception as error:  # an address or a proxy that is none raises all kinds
            raise ValueError(f"--base_url, or a proxy in the environment: {error}") from None
        try:
            with stop_signals(interrupt), tqdm(total=len(todo), unit="reply") as self.bar:
                async with api as self.api:
                    await ask_all(todo)
        except (OpenAIError, LookupError, TypeError, AttributeError) as error:
            # `send` sees to its own: this one comes from the Batch API, or what it was given by it.
            self.stop = ValueError(
                f"{self.api.base_url}: {without_key(error)}; run the same command to go on, or "
                f"delete {self.note.name} if the endpoint has lost its batch"
            )
        finally:
            self.api = None  # it holds this object, and so the lock on the replies
        # A full disk has no place for the records either.
        if isinstance(self.stop, OSError):
            raise self.stop

    async def bound_size(self, response):
        """Let an httpx response end in an error behind MAX_REPLY bytes, for each reply in it. What
        is packed without being asked for stays packed: a small one could become any size."""
        read, limit = response.aiter_raw, MAX_REPLY * (self.bar.total if self.batch else 1)

        async def aiter_raw(chunk_size=None):
            size = 0
            async for piece in read(chunk_size):
                size += len(piece)
                if size > limit:
                    raise ValueError(f"a reply of more than {limit} bytes")
                yield piece

        response.aiter_raw = aiter_raw
        response.headers.pop("content-encoding", None)

    async def online(self, todo):
        """Send the prompts, `concurrency` at a time. What stops one stops all, after the replies in
        flight have come in."""
        # All workers draw from one iterator.
        prompts = iter(todo.items())

        async def work():
            for key, messages in prompts:
                try:
                    await self.send(key, messages)
                except Exception as error:
                    self.stop = error

        await asyncio.gather(*(work() for _ in range(self.concurrency)))

    async def send(self, key, messages):
        """Ask one prompt until it is answered or refused, `retries` more times at most. The loop is
        ours and not the openai client's, since a try that timed out may be billed: max_cost is a
        bound only if each try counts. Raises what ends the run."""
        from openai import OpenAIError

        cost = self.cost(self.bound([messages]), self.batch)
        for attempt in range(self.retries + 1):
            if self.stop:
                return
            self.check_caps(1, cost)
            # What a try may cost is reserved before it leaves.
            self.requests += 1
            self.reserved += cost
            answer, status, params = None, 200, dict(self.params)
            body = {"messages": messages, **params}
            try:
                async with asyncio.timeout(self.timeout):
                    answer = await self.api.post("/chat/completions", cast_to=object, body=body)
                self.store(key, prompt_hash(messages), answer, params)
            except (OpenAIError, ValueError, RecursionError, TimeoutError) as error:
                self.failed[key] = without_key(error)
                status, seconds = outcome_of(error, attempt)
            # It stays reserved unless the endpoint tells the cost or refused: what failed there, or
            # on the way, may be billed all the same.
            if any(tokens_used(answer).values()) or status in UNPAID:
                self.reserved -= cost
            # A wrong key, no money left, an unknown model: it is the same for every prompt.
            if status in (401, 402, 403, 404):
                raise ValueError(f"{self.api.base_url}, {self.model}: {self.failed[key]}")
            if status not in RETRY:
                break
            await self.pause(seconds)

        # The same prompt without a parameter is no further try.
        if self.leave_out(key, params):
            return await self.send(key, messages)
        # A refusal, too, shows that the endpoint is there.
        self.unanswered += 1
        if key in self.replies or status not in (200, *RETRY):
            self.unanswered = 0
        if self.unanswered >= 12:
            raise ValueError(
                f"{self.api.base_url}: {self.unanswered} in a row without an answer, the last: "
                f"{self.failed[key]}"
            )

    async def pause(self, seconds):
        """Sleep, but hardly beyond the moment at which the run is stopped."""
        while seconds > 0 and not self.stop:
            await asyncio.sleep(min(seconds, 0.5))
            seconds -= 0.5

    def check_caps(self, requests, cost):
        """Raise Stopped if so many more requests, at so many dollars, must not leave."""
        if 0 < self.max_requests < self.requests + requests:
            raise Stopped(f"max_requests {self.max_requests} reached")
        if 0 < self.max_cost < self.spent + self.reserved + cost:
            raise Stopped(f"max_cost {self.max_cost} reached ({self.spent:.4f} spent)")

    def store(self, key, hash, answer, params):
        """Bring the reply in a chat completion to the file, or note that it is none; what it cost
        is counted in either case."""
        usage = tokens_used(answer)
        self.spent += self.cost(usage, self.batch)
        try:
            choice = answer["choices"][0]
            content = choice["message"].get("content") or ""
            # Some endpoints give a list of parts, texts among thoughts.
            if isinstance(content, list):
                content = "".join(part.get("text") or "" for part in content)
            reply = {
                "key": key,
                "content": "" + content,
                "finish_reason": choice.get("finish_reason"),
                "prompt_hash": hash,
                "model": answer.get("model"),
                "params": params,
                "usage": usage,
                "batch": self.batch,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        except MISSHAPED:
            self.failed[key] = without_key(f"no chat completion: {answer}")
            return
        self.replies.append(reply)
        self.failed.pop(key, None)
        # Without prices there is nothing to show.
        if self.spent:
            self.bar.set_postfix_str(f"${self.spent:.4f}", refresh=False)
        self.bar.update()

    def leave_out(self, key, sent):
        """Whether a prompt was refused for a parameter sent that an endpoint may do without, or for
        a reply too long for its context. No later request sends it, or asks for so much."""
        error = self.failed.get(key, "")
        size = next(name for name in sent if name.endswith("_tokens"))
        if re.search("context|does not fit", error) and sent[size] > 99:
            self.params[size] = sent[size] // 2
            return True
        # Of several the first is at fault. Messages stand here, since they are never left out.
        named = re.search("messages|temperature|response_format|max_completion_tokens", error)
        if named and named[0] in sent:
            self.params.pop(named[0], None)
            # Many servers know it by its older name.
            if named[0] == "max_completion_tokens":
                self.params["max_tokens"] = self.max_tokens
            return True

    # The Batch API: half the price, within 24 hours. The note {file, batch, params} is written
    # before anything waits, with batch null until it is made: a run killed at any moment finds its
    # batch again.

    async def batched(self, todo):
        """Collect what an earlier run left, then send the rest in one batch, and once more what was
        refused for a parameter that can be left out."""
        asked = None
        while not self.stop:
            rest = {key: todo[key] for key in todo if key not in self.replies}
            if self.note.is_file():
                await self.collect()
            # Each refusal leaves a parameter out; without one this is a single pass.
            elif rest and asked != self.params:
                asked = dict(self.params)
                await self.submit(rest)
            else:
                return

    async def submit(self, prompts):
        """Upload a file of requests and note it. A batch is made as a whole: none if with it a cap
        could be passed."""
        try:
            self.check_caps(len(prompts), self.cost(self.bound(prompts.values()), self.batch))
        except Stopped as cap:
            self.stop = ValueError(f"{cap} by the batch, which is sent whole")
            return
        requests = (
            {
                "custom_id": f"{prompt_hash(messages)} {key}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"messages": messages, **self.params},
            }
            for key, messages in prompts.items()
        )
        content = "\n".join(map(to_json, requests)).encode()
        file = await self.api.files.create(file=("requests.jsonl", content), purpose="batch")
        write_json(self.note, {"file": file.id, "batch": None, "params": self.params})
        self.requests += len(prompts)

    async def collect(self):
        """Look once at the batch of the file noted, which is made if there is none: store its
        replies if it has ended, else wait."""
        noted = read_json_file(self.note)
        if noted.keys() != {"file", "batch", "params"}:
            raise ValueError(
                f"{self.note} is no note of a batch: wanted file, batch and params; finish it with "
                "the version that wrote it, or delete it"
            )
        batch = await self.find_batch(**noted)
        write_json(self.note, noted | {"batch": batch.id})
        # Within 24 hours; a run that is stopped here finds the note again.
        if batch.status not in ("completed", "failed", "expired", "cancelled"):
            self.bar.set_description(f"{batch.id} {batch.status}")
            return await self.pause(self.poll)
        # Its replies, also if it failed or expired half-way.
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            content = await self.api.files.content(file)
            for line in content.read().splitlines():
                self.store_line(line, noted["params"])
        self.note.unlink()
        if batch.status != "completed":
            self.stop = ValueError(f"{batch.id} {batch.status}: {without_key(batch.errors)}")

    def store_line(self, line, params):
        """Store the reply in a line of a batch's results; what is none is told and left out."""
        try:
            result = json.loads(line)
            answer = (result.get("response") or {}).get("body", result.get("error"))
            prompt, key = result["custom_id"].split(" ", 1)
        except MISSHAPED:
            print(f"no result: {without_key(line)}")
            return
        if key not in self.replies:
            self.store(key, prompt, answer, params)
            self.leave_out(key, params)

    async def find_batch(self, file, batch, params):
        """The batch noted; else that of its file, which a run made and could not note, or a new
        one."""
        if batch:
            return await self.api.batches.retrieve(batch)
        async for made in self.api.batches.list():
            if made.input_file_id == file:
                return made
        # A batch made twice is paid twice: no second try.
        return await self.api.with_options(max_retries=0).batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )


# The statuses after which a request is tried again.
RETRY = {408, 409, 429, *range(500, 600)}
# Those of a request that was refused.
UNPAID = {*range(400, 500)} - {408}


def outcome_of(error, attempt):
    """The HTTP status of an error, and the seconds to wait before another try: what the endpoint
    asks for, else twice as long each time, with some chance in it, lest all workers come back at
    once. Without a status: 429 if no connection was made, 408 if no answer came, 200 if it could
    not be read. 402 for an exhausted quota, which comes as 429."""
    from openai import APIConnectionError

    status = getattr(error, "status_code", 200)
    if isinstance(error, APIConnectionError | TimeoutError):
        cause = type(error.__cause__).__name__
        status = 429 if cause.startswith("Connect") else 200 if cause == "ValueError" else 408
    if getattr(error, "code", None) == "insufficient_quota":
        status = 402
    try:
        seconds = min(float(error.response.headers["retry-after"]), 3600)  # NaN: no wait
    except (AttributeError, LookupError, ValueError):
        seconds = min(30, 0.5 * 2**attempt)
    return status, seconds + random.random()


def tokens_used(answer):
    """The usage {prompt_tokens, completion_tokens} in an answer; 0 and 0 if it tells none."""
    names = ("prompt_tokens", "completion_tokens")
    try:
        return {name: min(max(0, int(answer["usage"][name])), 10**12) for name in names}
    except (*MISSHAPED, OverflowError):
        return dict.fromkeys(names, 0)


def prompt_hash(messages):
    """16 hexadecimal digits that tell a prompt from every other."""
    return hashlib.sha256(to_json(messages).encode()).hexdigest()[:16]


def blank(text):
    """A text without the API key, which a server may have put there (a short one is no secret)."""
    key = os.environ["OPENAI_API_KEY"]
    return text.replace(key, "***") if len(key) > 7 else text


def without_key(error):
    """An error's text in one line, without the API key; a timeout's is empty."""
    return " ".join(blank(str(error) or "no whole reply in time").split())[:300]


# ==================================================================================================
# The knowledge base in


def read_knowledge(path):
    """Entities of a knowledge base: objects in CMeKG's form, or triples {head, relation, tail} as
    JSON or between tabs or commas, with a header or without. CMeKG's names of relations become
    ours. Raises ValueError naming the line of what is wrong."""
    rules = read_json_file(f"{DATA}/relations.json")
    entities = {}
    for where, row in join_triples(path, read_records(path, TRIPLE)):
        try:
            entity = read_entity(row, rules)
            if entities.setdefault(entity["中心词"], entity) is not entity:
                raise ValueError(f"entity {entity['中心词']} stands there twice")
        except ValueError as error:
            raise ValueError(f"{path} {where}: {error}") from None
    return list(entities.values())


TRIPLE = ("head", "relation", "tail")


def join_triples(path, rows):
    """The rows, with all triples of one head joined to an entity."""
    joined = {}
    for where, row in rows:
        row = our_keys(row)
        if "head" not in row:
            joined[where] = where, row
            continue
        head, relation, tail = triple = [row.get(key) for key in TRIPLE]
        if not are_texts(*triple) or relation == "中心词":
            raise ValueError(f"{path} {where}: {row}, wanted texts for {TRIPLE} (no 中心词)")
        _, entity = joined.setdefault(("head", head), (where, {"中心词": head}))
        entity[relation] = tail if relation == "类型" else [*entity.get(relation, []), tail]
    return joined.values()


def read_entity(row, rules):
    """An entity under our names of relations, each value once. A missing 类型 follows from the
    relations. Raises ValueError for a nameless or misshaped one."""
    # The first kind that has one of its marks among the relations; the last has none, and fits all.
    kinds = rules["kinds"].items()
    likely = next(kind for kind, marks in kinds if not marks or set(marks) & set(row))
    name, kind = row.pop("中心词", None), row.pop("类型", likely)
    if not are_texts(name) or not isinstance(kind, str):
        raise ValueError(f"中心词 and 类型 want a text each, got {name!r} and {kind!r}")
    # CMeKG has several names for one of our relations: their values come together.
    entity = {"中心词": name, "类型": kind}
    for relation, values in row.items():
        if not isinstance(values, list) or not values or not are_texts(*values):
            raise ValueError(f"{relation} of {name} is {values!r}, wanted a list of texts")
        relation = rules["relations"].get(relation, relation)
        values = entity.get(relation, []) + values
        # Two patterns may share one formula.
        entity[relation] = values if relation in PAIRED else unique(values)
    patterns, formulas = (len(entity.get(relation, [])) for relation in PAIRED)
    if 0 < patterns != formulas > 0 and UNPAIRED not in entity:
        raise ValueError(f"{name} has {patterns} 中医证型 and {formulas} 常用方剂, wanted pairs")
    return entity


def kinds_of(entities):
    return {entity["中心词"]: entity["类型"] for entity in entities}


def are_texts(*values):
    return all(isinstance(value, str) and value.strip() for value in values)


def read_forms(path):
    """The forms in a file like data/forms.json, {kind: {relation: form}}. A form has

      questions   texts with {e}, the entity
      statements  texts with {e} and {v}, the values
      notes       if there: {mark: what is said besides where the values hold it}
      then        if there: {relation: statements of the entity's values of that, said behind}
      alerts      if there: [{mark, text, about}]: what is said of such an entity where `about`, or
                  anything, is asked for

    Raises ValueError for others."""
    forms = read_json_file(path)
    try:
        for relations in forms.values():
            for form in relations.values():
                # Each access fails, as it should, where something is of another type or missing.
                "".join([] + form["questions"]).format(e="")
                "".join([form["statements"][0], *form["statements"]]).format(e="", v="")
                "".join(text for pair in form.get("notes", {}).items() for text in pair)
                "".join(rule["mark"] + rule["text"] for rule in form.get("alerts", []))
    except MISSHAPED:
        raise ValueError(f"{path} holds no forms; wanted them as in data/forms.json") from None
    return forms


def write_lines(path, records, *sources):
    """Write records as JSON lines, replacing the file at once, and say so; note the hashes of the
    files that they were made from."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, records)
    if sources:
        # Standard input, say, is no file.
        write_hashes(f"{path}.hashes.json", [path, *filter(os.path.isfile, sources)])
    print(f"{path}: {len(records):,} records")


# ==================================================================================================
# Records out: what a file of them holds


# What a record says of its source, and what it says if it does not.
SOURCE = {"entity": "", "kind": "", "form": "", "relations": [], "values": []}


def report(args, path):
    """Print what a file of records holds, and draw it on a page if args, `Stats`, names one: counts
    by form, kind, relation and department, reasons of rejection, lengths, the knowledge base
    covered, duplicates; with a tokenizer also tokens, and rows that a cut-off would cut."""
    records = read_instructions(path, answers=True)
    check_sources(path, records)
    rejected = beside(path, ".rejected.jsonl")
    rows = read_records(rejected) if rejected.is_file() and rejected.stat().st_size else []
    entities = {entity["中心词"]: entity for entity in read_knowledge(args.knowledge)}
    names = column(records, "entity")
    departments = (entities.get(name, {}).get("所属科室", []) for name in names)
    sections = {
        "records": {"kept": len(records), "rejected": len(rows)},
        "reasons of rejection": counted(str(row.get("reason")).split(":")[0] for _, row in rows),
        "forms": counted(column(records, "form")),
        "kinds": counted(column(records, "kind")),
        "relations": counted(chain(*column(records, "relations"))),
        "departments": counted(chain(*departments)),
        "characters of an answer": spread(map(len, column(records, "output")), 50),
        "knowledge base": coverage(records, entities),
        "duplicates": duplicates(records),
    }
    if args.tokenizer:
        sections |= token_sections(args, records)
    for title, counts in sections.items():
        listed = (f"{label} {number:,}" for label, number in counts.items())
        if counts:
            print(f"{title}: {', '.join(listed)}")
    if args.html:
        page = Template(read_text(f"{DATA}/stats.html"))
        # "<" is escaped, lest a text of the records ends the script that it stands in.
        data = to_json(sections).replace("<", "\\u003c")
        text = page.safe_substitute(title=escape(Path(path).name), data=data)
        check_own(args.html, "<title>Records</title>")
        write_text(args.html, text)
        print(f"{args.html}: the same as a page")


def check_sources(path, records):
    """Raises ValueError if what a record says of its source is not of the types that are counted;
    what it does not say is empty."""
    for number, record in enumerate(records, 1):
        for key, empty in SOURCE.items():
            value = record[key] = record.get(key) or empty
            try:
                "".join(empty + value)
            except TypeError:
                wanted = "a list of texts for relations and values, a text for the others"
                raise ValueError(f"{path} record {number}: {key} is {value!r}, {wanted}") from None


def counted(texts):
    return dict(Counter(filter(None, texts)).most_common())


def column(records, key):
    return [record[key] for record in records]


def spread(numbers, width):
    """{"0 to 49": how many of the numbers, ...} in bins of a width."""
    bins = Counter(number // width * width for number in numbers)
    return {f"{low} to {low + width - 1}": count for low, count in sorted(bins.items())}


def duplicates(records):
    """Records whose text another one has, and those that the sieve finds like an earlier one."""
    sieve = Sieve()
    repeats = sum(bool(sieve.repeated(record)) for record in records)
    exact = len(records) - len(set(map(text_of, records)))
    return {"exact": exact, "near (4-grams)": repeats}


def coverage(records, entities):
    """How much of the knowledge base the records ask about and state."""
    known = set()
    # Behind name and kind stand the relations.
    for name, _, *lists in map(dict.values, entities.values()):
        known.update((name, value) for value in chain(*lists))
    told = {(record["entity"], value) for record in records for value in record["values"]}
    return {
        "entities": len(entities),
        "entities asked about": len(entities.keys() & column(records, "entity")),
        "values": len(known),
        "values told": len(known & told),
    }


def token_sections(args, records):
    """Tokens of the rows as training makes them (BOS, prompt, answer, EOS), and what each cut-off
    would cut: a row longer than it loses the end of its answer, and a row whose prompt leaves no
    room for one token of it and EOS is left out."""
    tokenizer = load_tokenizer(args.tokenizer)
    template = load_template(args.prompt_template_name)
    prompts, rows, answers = [], [], Counter()
    for record in records:
        prompt, answer = render(template, *conversation(record))
        ids, _ = encode_rendered(tokenizer, answer, first=False)
        prompts.append(len(encode_rendered(tokenizer, prompt)[0]))
        rows.append(prompts[-1] + len(ids))
        answers.update(ids)
    # A character outside the vocabulary becomes several tokens, its bytes.
    parts = sum(n for id, n in answers.items() if "\ufffd" in tokenizer.decode([id]))
    characters = sum(map(len, column(records, "output")))
    answer = answers.total()
    return {
        "tokens": {
            "all": sum(rows),
            "a prompt": round(sum(prompts) / len(rows)),
            "an answer": round(answer / len(rows)),
            "a character": round(answer / characters, 2),
            "% parts of characters": round(100 * parts / answer, 1),
        },
        "tokens of a row": spread(rows, 64),
        "rows cut at": above_limits(rows),
        "left out at": above_limits([length + 2 for length in prompts]),
    }


def above_limits(lengths):
    found = {}
    for limit in (256, 320, 384, 512, 768, 1024):
        number = sum(length > limit for length in lengths)
        found[f"{limit} tokens ({number / len(lengths):.1%})"] = number
    return found


# ==================================================================================================
# Commands: for each a class with its options and what it does


@dataclass
class Api:
    """How an LLM is asked, and where its replies go."""

    # who is asked, and where the replies go

    # name of the model at the endpoint (must be given, but for a dry run)
    model: str = ""
    output: str = ""  # file of the results; the replies stand beside it (must be given, too)
    base_url: str = ""  # an OpenAI-compatible endpoint (empty: OPENAI_BASE_URL, or OpenAI)

    # how much is asked, and what it may cost

    dry_run: bool = False  # show prompts, number of requests, tokens, cost; ask nothing
    batch: bool = False  # through the Batch API: half the price, within 24 hours
    temperature: float = setting(1.0, 0)  # of the sampling; left out where the model refuses it
    max_tokens: int = 2048  # tokens of a reply at most
    concurrency: int = 16  # requests in flight
    timeout: float = 120.0  # seconds until a request is given up whose reply is not whole
    retries: int = setting(6, 0)  # further tries of a request
    max_requests: int = 0  # stop after so many, each try counted (0: no limit)
    max_cost: float = 0.0  # dollars for replies and what may be billed (0: no limit)
    price_in: float = 0.0  # dollars for a million prompt tokens
    price_out: float = 0.0  # dollars for a million reply tokens
    poll: float = setting(30.0, 0)  # seconds between two looks at a batch

    def __post_init__(self):
        check_settings(self)
        if not (self.model and self.output or self.dry_run):
            raise ValueError("--model and --output must be given")
        if self.max_cost and not (self.price_in and self.price_out):
            raise ValueError("max_cost wants the prices of the model: --price_in and --price_out")
        if self.output.endswith("/"):
            raise ValueError(f"output {self.output} is a folder, wanted a file")
        key = os.environ.get("OPENAI_API_KEY")
        if not self.dry_run and not (key and key.isascii()):
            raise ValueError(
                "OPENAI_API_KEY is not set, or no key; export it (for a local server any text)"
            )


@dataclass
class Source:
    """What records are made from."""

    # facts

    knowledge: str = f"{DATA}/knowledge.jsonl"  # knowledge base: CMeKG's form or triples
    seed: int = setting(0, -1e18, 1e18)  # of every random choice

    __post_init__ = check_settings


@dataclass
class Offline(Source):
    """Instruction records from forms, split by entity."""

    forms: str = f"{DATA}/forms.json"  # questions and statements by relation
    output_dir: str = str(DATA)  # folder for train.jsonl and heldout.jsonl
    heldout: float = setting(0.1, 0, 0.99)  # share of the entities held out
    questions: int = 2  # question forms per fact (held out: 1)

    def run(self):
        forms = read_forms(self.forms)
        parts = split_entities(read_knowledge(self.knowledge), self.heldout, self.seed)
        with own_folder(self.output_dir):
            for name, part, ways in zip(("train", "heldout"), parts, (self.questions, 1)):
                asked = single_questions(part, forms, ways, random.Random(self.seed))
                records = [offline_record(*one) for one in asked]
                path = f"{self.output_dir}/{name}.jsonl"
                check_own(path, '"entity": ')
                write_lines(path, records, self.knowledge, self.forms)


@dataclass
class Asked(Api, Source):
    """What the commands share that ask an LLM for records."""

    # prompts

    prompts: str = f"{DATA}/prompts"  # folder of prompt forms
    count: int = 100  # prompts; a greater count goes on where a smaller one ended
    sample: int = 0  # ask so many first prompts and show the records; then go on without it


@dataclass
class Knowledge(Asked):
    """An LLM writes instruction records from facts."""

    forms: str = f"{DATA}/forms.json"  # questions and statements by relation
    mix: str = ""  # weights of the forms, as single=3,vignette=1 (empty: their own)

    def run(self):
        prompts = read_prompts(self.prompts)
        if self.mix:
            set_weights(prompts, self.mix)
        entities = read_knowledge(self.knowledge)
        jobs = knowledge_jobs(self, entities, read_forms(self.forms), prompts)
        build(self, jobs, Sieve(self.knowledge, names=Names(entities)))


@dataclass
class Literature(Asked):
    """An LLM writes dialogues about conclusions of papers."""

    literature: str = f"{DATA}/literature.jsonl"  # lines of 标题, 疾病, 结论

    def run(self):
        jobs = literature_jobs(self, read_prompts(self.prompts))
        names = Names(read_knowledge(self.knowledge))
        build(self, jobs, Sieve(self.literature, self.knowledge, names=names))


@dataclass
class SelfInstruct(Asked):
    """An LLM writes new tasks after seed tasks."""

    seed_tasks: str = f"{DATA}/seed_tasks.jsonl"  # alpaca records

    def run(self):
        seeds = read_instructions(self.seed_tasks, answers=True)
        jobs = self_instruct_jobs(self, read_prompts(self.prompts), seeds)
        texts = [seed["instruction"] for seed in seeds]
        build(self, jobs, Sieve(self.seed_tasks, seeds=texts))


@dataclass
class Extract(Api):
    """An LLM finds the facts of texts: triples with the words that state them."""

    texts: str = ""  # plain text, or records with a text (must be given)
    schema: str = f"{DATA}/forms.json"  # kinds and the relations of each
    prompts: str = f"{DATA}/prompts/extract"  # folder of the prompt
    examples: str = ""  # labelled texts; the prompt shows the first three
    sample: int = 0  # ask so many first prompts and show the triples; then go on without it
    records: bool = False  # ask nothing: make labelled texts records that train an extractor
    temperature: float = setting(0.0, 0)  # of the sampling

    def __post_init__(self):
        if self.records:
            self.dry_run = True
        if not self.texts or self.records and not self.output:
            raise ValueError("--texts must be given, with --records also --output")
        super().__post_init__()

    def run(self):
        schema, texts = read_json_file(self.schema), list(read_texts(self.texts))
        if not all(isinstance(r, list | dict) and r and are_texts(*r) for r in schema.values()):
            raise ValueError(f"{self.schema} wants the names of relations for each kind")
        jobs = extract_jobs(self, texts, schema)
        if not self.records:
            labelled = {(text.relation, *triple) for text in texts for triple in text.values}
            return build(self, jobs, TripleSieve(schema, labelled))
        rows = []
        for job in jobs:
            said = to_items(job.facts[0], schema[job.facts[0].kind])
            rows.append({"messages": [*job.messages, message("assistant", said)]})
        check_own(self.output, '"messages": ')
        write_lines(self.output, rows, self.texts)


@dataclass
class Stats:
    """What a file of records holds."""

    knowledge: str = Source.knowledge  # the one that the records were made from
    tokenizer: str = ""  # folder of a base with its tokenizer: also lengths in tokens
    prompt_template_name: str = "med_template"  # template of the prompts then counted
    html: str = ""  # file for the report as a page

    run = report


def main():
    parser = Parser(description=__doc__.partition("\n\nWhat this")[0])
    commands = parser.add_subparsers(required=True, parser_class=Parser)
    for name, options in {
        "offline": Offline,
        "knowledge": Knowledge,
        "literature": Literature,
        "self-instruct": SelfInstruct,
        "extract": Extract,
        "stats": Stats,
    }.items():
        command = commands.add_parser(name, help=options.__doc__, description=options.__doc__)
        command.add_settings(options)
        command.set_defaults(command=options)
    text = "records; x.rejected.jsonl beside it counts too"
    command.add_argument("files", nargs=1, metavar="file", help=text)
    given = vars(parser.parse_args())
    options, files = given.pop("command"), given.pop("files", [])
    options(**given).run(*files)


if __name__ == "__main__":
    run(main)
