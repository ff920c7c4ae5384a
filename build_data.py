"""Knowledge in, training text out: written from forms without a network, or by an LLM behind an OpenAI-compatible API.

  python build_data.py offline                               data/knowledge.jsonl -> data/train.jsonl, data/heldout.jsonl
  python build_data.py knowledge --model M --output x.jsonl        facts of entities -> instruction records
  python build_data.py literature --model M --output x.jsonl       conclusions of papers -> dialogues of 2 to 6 turns
  python build_data.py self-instruct --model M --output x.jsonl    seed tasks -> new tasks (Wang et al. 2022)
  python build_data.py stats x.jsonl                               what a file of records holds
  python build_data.py judge answers.jsonl --rubric data/rubrics/sus.json --model M --output scores.jsonl

An entity is one object in CMeKG's form: {"中心词": name, "类型": kind, relation: [value, ...], ...}. The Chinese around
it (questions, statements) stands in data/forms.json, by kind and relation; a relation without a form is passed over.
Prompts stand in data/prompts. A record is an alpaca record that says where it comes from: {id, instruction, input,
output, entity, kind, relations, values}, and if an LLM wrote it {form, prompt_hash, model, params, usage, time, score}.
The offline split is by entity: one held out never appears in a training question.

Beside x.jsonl stand x.replies.jsonl, every reply that was paid for, and x.rejected.jsonl, what was not kept and why.
Both files of records follow from the replies alone: they are written anew at the end of each run.
"""
import asyncio
import fcntl
import hashlib
import json
import os
import random
import re
import signal
import time
import unicodedata
from array import array
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from importlib.util import find_spec
from itertools import permutations, zip_longest
from pathlib import Path
from string import Template

import numpy as np
from tqdm import tqdm

from generate import DATA, Tokenizer, load_template, read_instructions, read_records, render_prompt, render_turns
from model import Parser, read_json_file, run, write_atomically, write_json


def read_knowledge(path):
    """Entities of a knowledge base: objects in CMeKG's form, or triples {head, relation, tail} as JSON or between tabs.
    CMeKG's names of relations become ours and a missing 类型 is told by the relations (data/relations.json). Raises
    ValueError naming the line of a nameless, doubled or misshaped entity."""
    rules, entities, triples = read_json_file(DATA / "relations.json"), {}, {}
    first = Path(path).open("rb").readline().lstrip(b"\xef\xbb\xbf") if Path(path).is_file() else b""
    if b"\t" in first and first[:1] not in b"{[":
        try:
            lines = enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); convert it, for instance with iconv -f GBK -t UTF-8") from None
        rows = [(f"line {n}", dict(zip(("head", "relation", "tail"), line.split("\t")))) for n, line in lines if line.strip()]
    else:
        rows = read_records(path)
    for place, row in rows:
        if "head" in row:
            head, relation, tail = triple = [row.get(key) for key in ("head", "relation", "tail")]
            if not all(isinstance(text, str) and text.strip() for text in triple) or relation == "中心词":
                raise ValueError(f"{path} {place}: {triple}, wanted texts for head, relation (no 中心词) and tail")
            entity = triples.setdefault(head, (place, {"中心词": head}))[1]
            if relation == "类型":
                entity["类型"] = tail
            else:
                entity.setdefault(relation, []).append(tail)
    for place, row in [*((place, row) for place, row in rows if "head" not in row), *triples.values()]:
        name = row.get("中心词")
        kind = row.get("类型", next(k for k, marks in rules["kinds"].items() if not marks or set(marks) & set(row)))
        if not isinstance(name, str) or not name.strip() or not isinstance(kind, str):
            raise ValueError(f"{path} {place}: 中心词 and 类型 want a text each, got {name!r} and {kind!r}")
        if name in entities:
            raise ValueError(f"{path} {place}: entity {name} stands there twice")
        entity = entities[name] = {"中心词": name, "类型": kind}
        for relation, values in row.items():
            if relation not in ("中心词", "类型"):
                if not (isinstance(values, list) and values and all(isinstance(v, str) and v.strip() for v in values)):
                    raise ValueError(f"{path} {place}: {relation} of {name} is {values!r}, wanted a list of texts")
                name_here = rules["relations"].get(relation, relation)
                found = [*entity.get(name_here, []), *values]     # of pattern and formula, two patterns may share one formula
                entity[name_here] = found if name_here in ("中医证型", "常用方剂") else list(dict.fromkeys(found))
        if 0 < (n := len(entity.get("中医证型", []))) != (m := len(entity.get("常用方剂", []))) > 0:
            raise ValueError(f"{path} {place}: {name} has {n} 中医证型 and {m} 常用方剂, wanted a formula for each pattern")
    return list(entities.values())


def read_forms(path):
    """The forms in a file like data/forms.json, {kind: {relation: {questions, statements}}}. Raises ValueError for others."""
    forms = read_json_file(path)
    try:
        for form in (form for kind in forms.values() for form in kind.values()):
            [text.format(e="") for text in (form["questions"][0], *form["questions"])]
            [text.format(e="", v="") for text in (form["statements"][0], *form["statements"])]
    except (LookupError, AttributeError, TypeError, ValueError):
        raise ValueError(f"{path} holds no forms; wanted questions of {{e}}, statements of {{e}} and {{v}}, as data/forms.json") from None
    return forms


def facts(entity, forms):
    """[(relation, its forms, the values as one text, the values), ...] of an entity, in the order of data/forms.json.
    辨证论治 is made of two relations: the i-th formula is the one for the i-th pattern."""
    found = []
    for relation, form in forms.get(entity["类型"], {}).items():
        values = list(dict.fromkeys(entity.get(relation, [])))
        text = "、".join(values)
        if relation == "辨证论治":
            pairs = dict.fromkeys(zip(entity.get("中医证型", []), entity.get("常用方剂", [])))
            text, values = "，".join(f"{p}用{f}" for p, f in pairs), list(dict.fromkeys(v for pair in pairs for v in pair))
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


def read_prompts(folder):
    """{name: form} of the prompts in a folder: {description, prompt: lines with $facts, $entity, ...} and, if it asks for
    facts, {weight, kinds, relations: that must be there, facts: how many, share: relations in which a second entity has
    the same value, follow: relations that are told of values which are entities themselves}."""
    forms = {path.stem: read_json_file(path) for path in sorted(Path(folder).glob("*.json"))}
    for name, form in forms.items():
        lines, weight, number = form.get("prompt"), form.get("weight", 0), form.get("facts", 0)
        if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines) and isinstance(weight, (int, float))
                and isinstance(number, int) and ("weight" not in form or {"kinds", "relations", "facts"} <= set(form))):
            raise ValueError(f"{folder}/{name}.json wants prompt: [lines] and, beside a weight, kinds, relations and facts (a number)")
    if not forms:
        raise ValueError(f"{folder} holds no prompts; wanted .json files as in data/prompts")
    return forms


def make_job(args, prompts, form, item, fields, facts=(), **texts):
    """What to ask under which key, and what is needed to judge the reply. facts: [(entity, relation, text, values)]."""
    lines = "\n".join(f"- {entity}的{relation}：{text}" for entity, relation, text, _ in facts)
    messages = [{"role": "system", "content": (Path(args.prompts) / "system.txt").read_text(encoding="utf-8")},
                {"role": "user", "content": Template("\n".join(prompts[form]["prompt"])).safe_substitute(texts, facts=lines)}]
    return {"key": f"{item}/{form}/{args.model}", "form": form, "fields": fields, "facts": facts, "messages": messages, **texts}


def knowledge_jobs(args, entities, forms, prompts):
    """args.count jobs: forms of prompt drawn by weight, the entities of each in turn, their facts drawn by seed. A greater
    count adds jobs and changes none."""
    kinds = {e["中心词"]: e["类型"] for e in entities}
    own = {e["中心词"]: facts(e, forms) for e in entities}
    holders, pools, rng, drawn, jobs = defaultdict(list), {}, random.Random(args.seed), Counter(), []
    for name, known in own.items():
        for relation, _, _, values in known:
            for value in values:
                holders[kinds[name], relation, value].append(name)

    def partners(name, share):
        """Entities of the same kind that have a value in common in one of the relations."""
        keys = [(kinds[name], relation, v) for relation, _, _, values in own[name] if relation in share for v in values]
        return sorted({other for key in keys for other in holders[key]} - {name})

    for title, form in prompts.items():
        pool = [name for name in own if form["weight"] and kinds[name] in form["kinds"] and own[name]
                and set(form["relations"]) <= {fact[0] for fact in own[name]}
                and ("share" not in form or partners(name, form["share"]))]
        if pool:
            rng.shuffle(pool)
            pools[title] = pool
    if not pools:
        raise ValueError(f"{args.knowledge}: no form in {args.prompts} finds an entity of its kinds with its relations")
    for title in rng.choices(list(pools), [prompts[title]["weight"] for title in pools], k=args.count):
        form, (turn, place) = prompts[title], divmod(drawn[title], len(pools[title]))
        drawn[title] += 1
        name, chosen = pools[title][place], []
        draw = random.Random(f"{args.seed}/{title}/{name}/{turn}")
        other = draw.choice(partners(name, form["share"])) if "share" in form else name
        for n in dict.fromkeys((name, other)):
            must = [fact for fact in own[n] if fact[0] in form["relations"]]
            rest = [fact for fact in own[n] if fact[0] not in form["relations"]]
            chosen += [(n, *fact) for fact in must + draw.sample(rest, max(0, min(form["facts"] - len(must), len(rest))))]
        inner = [value for fact in chosen for value in fact[4] if "follow" in form and value in own]
        chosen += [(value, *fact) for value in dict.fromkeys(inner) for fact in own[value] if fact[0] in form["follow"]]
        jobs.append(make_job(args, prompts, title, f"{name}#{turn}", ("instruction", "output"),
                             [(n, relation, text, values) for n, relation, _, text, values in chosen],
                             entity=name, other=other, kind=kinds[name]))
    return jobs


def literature_jobs(args, prompts):
    """args.count jobs: a dialogue of 2 to 6 turns about each conclusion in turn."""
    rows, jobs, same = read_records(args.literature), [], Counter()
    for place, row in rows:
        if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("标题", "疾病", "结论")):
            raise ValueError(f"{args.literature} {place}: wanted texts for 标题, 疾病 and 结论")
    for i in range(args.count):
        row, turn = rows[i % len(rows)][1], i // len(rows)
        title, disease, conclusion = row["标题"], row["疾病"], row["结论"]
        parts = [part for part in re.split("[，。；]", conclusion) if len(part) > 3] or [conclusion]
        again = f"{turn}.{same[title, turn]}" if same[title, turn] else turn                  # of several rows of one title
        same[title, turn] += 1
        jobs.append(make_job(args, prompts, "literature", f"{title}#{again}", ("user", "bot"), [(title, "结论", conclusion, parts)],
                             entity=title, title=title, disease=disease, conclusion=conclusion,
                             turns=random.Random(f"{args.seed}/{title}/{turn}").randint(2, 6)))
    return jobs


def self_instruct_jobs(args, prompts, seeds):
    """args.count jobs, each with three seed tasks as examples (Stanford Alpaca too draws them from the seeds alone)."""
    jobs = []
    for i in range(args.count):
        drawn = random.Random(f"{args.seed}/{i}").sample(seeds, min(3, len(seeds)))
        lines = [json.dumps({key: task[key] for key in ("instruction", "input", "output")}, ensure_ascii=False) for task in drawn]
        jobs.append(make_job(args, prompts, "self_instruct", f"tasks#{i}", ("instruction", "output"), examples="\n".join(lines)))
    return jobs


def plain(text):
    """A text as it is compared: full width made half, small letters, nothing but letters and digits; between digits a point
    (0.5) and one sign for all that stands there else (3～10, 3至10), or 15 would pass for 1.5."""
    text = re.sub(r"(?<=\d)(?!\.\d)[\W_至到]+(?=\d)", "~", unicodedata.normalize("NFKC", text).lower())
    return re.sub(r"(?!(?<=\d)[.~]\d)[\W_]", "", text)


def says(text, value):
    """Whether a plain text states a value: word for word, or if it is long by most of its pairs of characters; and in
    either case each of its numbers as a whole."""
    value = plain(value)
    pairs = [value[i:i + 2] for i in range(len(value) - 1)]
    own, there = ({*re.findall(r"\d+(?:\.\d+)?", part)} for part in (value, text))
    return value > "" and own <= there and (value in text or len(value) > 6 and sum(pair in text for pair in pairs) >= 0.7 * len(pairs))


class Names:
    """The names of diseases, herbs, drugs and formulas in a knowledge base, found in a text by longest match, so that
    四逆汤 in 当归四逆汤 is none. data/relations.json says which relations hold names, and which of their values are none."""

    def __init__(self, entities):
        rules = read_json_file(DATA / "relations.json")
        self.kind, self.starts = {e["中心词"]: e["类型"] for e in entities}, defaultdict(list)
        self.same = {name: {name} for name in self.kind}          # a name's entities: two may share an alias
        for e in entities:
            for alias in e.get("别名", []):
                self.same.setdefault(alias, set()).add(e["中心词"])
            for relation, kind in {"别名": e["类型"], **rules["names"]}.items():
                for value in e.get(relation, []):
                    if not re.search(rules["no_names"], value):
                        self.kind.setdefault(value, kind)
        for name in sorted(self.kind, key=len, reverse=True):
            if len(name) > 1:
                self.starts[name[0]].append(name)

    def find(self, text):
        """The set of names in a text."""
        found, i = {""}, 0
        while i < len(text):
            name = next((name for name in self.starts.get(text[i], ()) if text.startswith(name, i)), "")
            found.add(name)
            i += len(name) or 1
        return found - {""}

    def strangers(self, text, given):
        """Names in a text that the given one does not hold, under this or another name. A disease or drug is also held
        by a longer word (贫血 by 缺铁性贫血), a herb or formula is not."""
        held = set().union(*(self.same.get(name, {name}) for name in self.find(given)))
        return sorted(name for name in self.find(text) if held.isdisjoint(self.same.get(name, {name}))
                      and (self.kind[name] in ("中药", "方剂") or name not in given))


class Kept:
    """Texts kept so far as sets of tokens. One pass over the postings of a new text's tokens counts what it shares with
    each of them, so that only the few that could be like it are compared in full."""

    def __init__(self):
        self.postings, self.sizes, self.texts = defaultdict(lambda: array("i")), array("i"), []

    def add(self, tokens, text):
        for token in tokens:
            self.postings[token].append(len(self.texts))
        self.sizes.append(len(tokens))
        self.texts.append(text)

    def shared(self, tokens):
        """(tokens shared with each text kept, its own number of tokens): two arrays (N,)."""
        counts = np.zeros(len(self.texts), np.int32)
        for token in tokens:
            if token in self.postings:
                counts[np.frombuffer(self.postings[token], np.int32)] += 1
        return counts, np.array(self.sizes, np.int32)


def rouge_l(a, b):
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of two lists of tokens, found with the bits of one
    integer (Hyyrö 2004): a bit falls to zero where the subsequence grows."""
    places, full = defaultdict(int), (1 << len(a)) - 1
    for i, token in enumerate(a):
        places[token] |= 1 << i
    row = full
    for token in b:
        match = row & places.get(token, 0)
        row = (row + match | row - match) & full
    return 2 * (len(a) - row.bit_count()) / max(1, len(a) + len(b))


def split_words(text):
    """(tokens of a text for ROUGE, Chinese characters and words of other letters; the same, each with its how-manieth)."""
    words, seen = re.findall(r"[a-z0-9]+|\w", text.lower()), Counter()
    return words, [(word, seen.update([word]) or seen[word]) for word in words]


def most_like(kept, text, threshold=0.7):
    """(ROUGE-L, text) of the kept text most like a new one if that reaches the threshold; else (0, "") and it is kept.
    A common subsequence is no longer than the number of common tokens: most texts are ruled out by that."""
    words, bag = split_words(text)
    shared, sizes = kept.shared(bag)
    close = np.flatnonzero(2 * shared >= threshold * (sizes + len(bag)))
    score, like = max(((rouge_l(words, kept.texts[i][0]), kept.texts[i][1]) for i in close), default=(0.0, ""))
    if score >= threshold:
        return round(score, 3), like
    kept.add(bag, (words, text))
    return 0.0, ""


def near(kept, record, threshold=0.7):
    """(Whether a kept record about the same entity has mostly the same 4-grams (Jaccard), the record's own: to be kept if not)."""
    text = plain(record["instruction"] + record["output"])
    grams = {text[i:i + 4] for i in range(len(text) - 3)}
    shared, sizes = kept.shared(grams)
    close = np.flatnonzero(shared >= threshold * (sizes + len(grams) - shared))
    return any(kept.texts[i] == record.get("entity") for i in close), grams


def parse_items(content, fields):
    """The items of a reply, [{field: text}, ...], with an input, "" if there is none, and without what else they hold. Raises
    ValueError unless it is {"items": [...]} with texts, and only a code fence or a reasoning model's thoughts around it."""
    text = re.sub(r"(?s)^<think>.*?</think>", "", content.strip()).strip()
    text = re.sub(r"(?s)^```(?:json)?\n(.*)\n```$", r"\1", text)
    try:
        items = [{**{field: item[field].strip() for field in fields}, "input": (item.get("input") or "").strip()}
                 for item in json.loads(text)["items"]]
    except (ValueError, RecursionError) as error:                 # the latter: brackets nested without end
        raise ValueError(f"no JSON: {error}" if text else "empty") from None
    except (LookupError, TypeError, AttributeError):
        raise ValueError('wanted {"items": [{' + ", ".join(f'"{field}": text' for field in fields) + "}, ...]}") from None
    if not items:
        raise ValueError("no items")
    return items


FAULTS = {                                                        # reason: what in a record gives it away
    "refusal": r"抱歉|对不起|作为.{0,6}(AI|人工智能|语言模型)|我(无法|不能)(提供|回答|给出|判断)|无法回答|"
               r"(?i:as an ai|i'm sorry|i can ?not|i can't)",
    "speaks of its prompt": r"((上述|以上|给定|所给)的?|(给出|提供)的)(知识|材料|信息|结论|资料|文本)|根据(知识|材料)|JSON",
}


class Sieve:
    """Tells why a record is not kept, by what it says and by what was kept before. names: the `Names` that no record may
    use without its facts; seeds: instructions that new ones must differ from (self-instruct)."""

    def __init__(self, names=None, seeds=()):
        self.names, self.exact, self.grams, self.tasks = names, set(), Kept(), Kept()
        for seed in seeds:
            words, bag = split_words(seed)
            self.tasks.add(bag, (words, seed))

    def reason(self, record, questions, answers, job):
        """The reason to reject a record, "" to keep it. Puts what it tells of the job's facts on the record."""
        told, whole = plain(answers), f"{questions}\n{record['input']}\n{answers}"
        for reason, pattern in FAULTS.items():
            if re.search(pattern, whole):
                return reason
        if len(told) < 10 or len(questions) < 4:
            return "too short"
        if len(re.findall("[\u4e00-\u9fff]", told)) < 0.5 * len(told):
            return "not Chinese"
        if job["facts"]:
            used = [(relation, v) for _, relation, _, values in job["facts"] for v in dict.fromkeys(values) if says(told, v)]
            record["relations"], record["values"] = (list(dict.fromkeys(column)) for column in zip(*used or [((), ())]))
            record["score"] = round(len(record["values"]) / len({v for fact in job["facts"] for v in fact[3]}), 3)
            record["strangers"] = self.names.strangers(whole, job["messages"][-1]["content"])
            if record["strangers"] or not used:
                return "names what its facts do not" if used else "names no value of its facts"
        text = plain(record["instruction"] + record["input"] + record["output"])
        close, grams = near(self.grams, record)
        if text in self.exact or close:
            return "near duplicate" if text not in self.exact else "duplicate"
        if job["form"] == "self_instruct":
            record["rouge_l"], record["like"] = most_like(self.tasks, record["instruction"])
            if record["like"]:
                return "like a task kept before"
        self.exact.add(text)
        self.grams.add(grams, record.get("entity"))
        return ""


def beside(output, ending, mark=""):
    """The file beside an output: x.jsonl, ".replies.jsonl" -> x.replies.jsonl. Raises ValueError if the output is there without
    it, or if mark, which each record of this command holds, is not in its first one: it is another's."""
    path = Path(re.sub(r"\.jsonl?$", "", str(output)) + ending)
    if mark and Path(output).exists():
        with open(output, "rb") as file:
            first = file.readline()
        if not path.exists() or first and f'"{mark}": '.encode() not in first:
            raise ValueError(f"{output} stands there without {path.name} or {mark}: it is not this command's; give another --output")
    return path


def build(args, jobs, sieve):
    """Ask the jobs, ask once more where a reply cannot be parsed, write the records kept and, with the reason, the rest."""
    asker, kept, rejected = Asker(beside(args.output, ".replies.jsonl", "prompt_hash"), args), [], []

    def outcome(job):
        """(reply, items, reason): the latest reply to a job, its items, or else why there are none."""
        reply = asker.reply(job["key"] + "/repair") or asker.reply(job["key"])
        try:
            return reply, parse_items(reply["content"], job["fields"]), ""
        except (TypeError, ValueError) as error:
            return reply, [], str(error) if reply else f"no reply: {asker.failed.get(job['key'], asker.stop)}"

    asker.ask([(job["key"], job["messages"]) for job in jobs])
    if args.dry_run:
        print("--- on top of that, a reply that cannot be parsed is asked once more, with the reply in its prompt")
        return asker.end()
    repair = Template((Path(args.prompts) / "repair.txt").read_text(encoding="utf-8"))
    asker.ask([(job["key"] + "/repair", [*job["messages"], {"role": "assistant", "content": reply["content"] or "（空）"},
                                         {"role": "user", "content": repair.safe_substitute(reason=reason)}])
               for job in jobs for reply, _, reason in [outcome(job)] if reply and reason and not reply["key"].endswith("/repair")])
    for job in jobs:
        reply, items, reason = outcome(job)
        source = {"entity": job.get("entity"), "kind": job.get("kind"), "form": job["form"]}
        source.update({key: reply[key] for key in ("prompt_hash", "model", "params", "usage", "time")} if reply else {})
        if job["form"] == "literature" and items and not (2 <= len(items) <= 6 and all(i["user"] and i["bot"] for i in items)):
            items, reason = [], f"turns: {len(items)}, wanted 2 to 6 and none of them empty"
        if reason:
            rejected.append({"id": job["key"], **source, "reason": reason, "content": reply and reply["content"]})
            continue
        said = [tuple(item[field] for field in job["fields"]) for item in items]
        if job["form"] == "literature":                           # one record of all turns, as BenTsao wrote its rows
            messages = [{"role": role, "content": text} for turn in said for role, text in zip(("user", "assistant"), turn)]
            question = render_turns([*said[:-1], (said[-1][0], None)])
            items = [{"instruction": question, "input": "", "output": said[-1][1], "messages": messages}]
            said = [("\n".join(column) for column in zip(*said))]
        for number, (item, (questions, answers)) in enumerate(zip(items, said)):
            record = {"id": f"{job['key']}/{number}", **dict.fromkeys(("instruction", "input")), **item, **source}      # in this order
            reason = sieve.reason(record, questions, answers, job)
            (rejected if reason else kept).append({**record, "reason": reason} if reason else record)
    write_lines(args.output, kept)
    write_lines(beside(args.output, ".rejected.jsonl"), rejected)
    if kept:
        report(args.output, args.knowledge, html=beside(args.output, ".html"))
    asker.end()


def add_options(commands, *options):
    """Options (name, default, help) of several subcommands; the type is the default's."""
    for command in commands:
        for name, default, help in options:
            command.add_argument(f"--{name}", type=type(default), default=default, help=help)


def add_api_options(command):
    """The options of every subcommand that asks an API, through `Asker`."""
    command.add_argument("--model", required=True, help="name of the model at the endpoint")
    command.add_argument("--dry_run", action="store_true", help="show prompts, number of requests, tokens and cost; ask nothing")
    command.add_argument("--batch", action="store_true", help="through the Batch API: half the price, within 24 hours")
    command.add_argument("--aiohttp", action="store_true", help="hundreds of requests a second: the openai client sends through "
                         "aiohttp, for half the CPU (pip install 'openai[aiohttp]')")
    add_options(
        [command], ("base_url", "", "an OpenAI-compatible endpoint (empty: OPENAI_BASE_URL, else OpenAI's)"),
        ("temperature", 1.0, "of the sampling; left out where the model refuses it"), ("max_tokens", 2048, "tokens of a reply at most"),
        ("concurrency", 16, "requests in flight"), ("rpm", 0, "requests per minute at most (0: no limit)"),
        ("tpm", 0, "tokens per minute at most, prompt and max_tokens counted (0: no limit)"),
        ("timeout", 120.0, "seconds without a byte until a request is given up"), ("retries", 6, "further tries of a request"),
        ("max_requests", 0, "stop after so many requests of this run, those that timed out counted (0: no limit)"),
        ("max_cost", 0.0, "dollars for all replies of the output, and for requests of this run that timed out or broke off; "
                          "none is asked that could exceed it (0: no limit)"),
        ("price_in", 0.0, "dollars for a million prompt tokens"), ("price_out", 0.0, "dollars for a million reply tokens"),
        ("poll", 30.0, "seconds between two looks at a batch"))


class Asker:
    """Asks an OpenAI-compatible endpoint every (key, messages) not answered yet and appends each reply to a file as one
    line: {key, content, finish_reason, prompt_hash, model, params, usage, batch, time}. What stands in the file is paid: no
    later run asks it again. What is asked and how a reply is judged is the caller's business. Raises ValueError if
    another process holds the file; `end` raises what no further request can mend (a wrong key, an unknown model)."""

    def __init__(self, path, args):
        numbers = [value for name, value in vars(args).items() if isinstance(value, (int, float)) and name != "seed"]
        if not (all(number >= 0 for number in numbers) and args.concurrency and args.max_tokens and args.timeout):
            raise ValueError("options of the API: no number below 0; concurrency, max_tokens and timeout above it")
        if args.max_cost and not (args.price_in and args.price_out):
            raise ValueError("max_cost wants the prices of the model: --price_in and --price_out, dollars for a million tokens")
        if args.aiohttp and not find_spec("aiohttp"):
            raise ValueError("aiohttp is not installed: pip install 'openai[aiohttp]', or leave --aiohttp out")
        if not args.dry_run and not os.environ.get("OPENAI_API_KEY"):
            raise ValueError("OPENAI_API_KEY is not set; export it (any text for a local server), or look first with --dry_run")
        self.path, self.args, self.places, self.failed = Path(path), args, {}, {}
        self.params = {"temperature": args.temperature, "max_completion_tokens": args.max_tokens,
                       "response_format": {"type": "json_object"}}
        self.requests, self.size, self.spent, self.reserved, self.turn, self.dead, self.stop = 0, 0, 0.0, 0.0, 0.0, 0, None
        try:
            if not args.dry_run:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path if self.path.exists() or not args.dry_run else os.devnull, "rb" if args.dry_run else "ab+", buffering=0)
            fcntl.flock(self.file, (fcntl.LOCK_SH if args.dry_run else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process; wait for it or give another --output") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}; give another --output") from None
        with open(self.file.name, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    reply = json.loads(line)
                    self.places[reply["key"]] = self.size, len(line)
                    self.spent += self.cost(tokens_used(reply), reply.get("batch", False))
                except (ValueError, TypeError, LookupError, AttributeError):
                    if not line.endswith(b"\n"):                  # a last line cut off by a crash: it goes
                        break
                    raise ValueError(f"{path} line {number} is no reply of an API; delete that line") from None
                self.size += len(line)
        if not args.dry_run:
            self.file.truncate(self.size)
            if self.size and os.pread(self.file.fileno(), 1, self.size - 1) != b"\n":
                self.size += self.file.write(b"\n")

    def cost(self, usage, batch=None):
        """Dollars for a usage {prompt_tokens, completion_tokens}; by a batch (None: as this run asks) it costs half."""
        price = self.args.price_in * usage["prompt_tokens"] + self.args.price_out * usage["completion_tokens"]
        return price * (0.5 if (self.args.batch if batch is None else batch) else 1.0) / 1e6

    def most(self, messages):
        """The usage a request may come to: a token for each byte, which no tokenizer exceeds, and max_tokens."""
        return {"prompt_tokens": sum(len(message["content"].encode()) + 8 for message in messages),
                "completion_tokens": self.args.max_tokens}

    def take(self, key, prompt_hash, body, params):
        """Append the reply in the body of a chat completion to the file. Raises ValueError if there is none, when its cost
        is counted all the same."""
        usage = tokens_used(body)
        self.spent += self.cost(usage)
        try:
            content = (choice := body["choices"][0])["message"].get("content") or ""      # a text, or texts among thoughts
            content = "".join(part.get("text") or "" for part in content) if isinstance(content, list) else "" + content
            reply = {"key": key, "content": content, "finish_reason": choice.get("finish_reason"),
                     "prompt_hash": prompt_hash, "model": body.get("model"), "params": {"model": self.args.model, **params},
                     "usage": usage, "batch": self.args.batch, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
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
        if self.spent:                                            # without prices there is none to show
            self.bar.set_postfix_str(f"${self.spent:.4f}", refresh=False)
        self.bar.update()

    async def wait(self, seconds):
        """Sleep, but not beyond the moment at which the run is stopped."""
        end = time.monotonic() + seconds
        while not self.stop and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    async def send(self, client, key, messages):
        """One request until it is answered, refused for good (then self.failed holds the reason) or the run is stopped."""
        from openai import APIConnectionError, APIStatusError, OpenAIError
        args, most, attempt = self.args, self.most(messages), 0
        cost = self.cost(most)
        while attempt <= args.retries:
            if args.rpm or args.tpm:                              # requests leave evenly spaced
                self.turn, seconds = max(self.turn, time.monotonic()), self.turn - time.monotonic()
                self.turn += max(60 / args.rpm if args.rpm else 0, 60 * sum(most.values()) / args.tpm if args.tpm else 0)
                await self.wait(seconds)
            if args.max_requests and self.requests >= args.max_requests:
                self.stop = self.stop or f"max_requests {args.max_requests} reached"
            if args.max_cost and self.spent + self.reserved + cost > args.max_cost:
                self.stop = self.stop or f"max_cost {args.max_cost} would be passed, {self.spent:.4f} dollars spent"
            if self.stop:
                return
            self.requests += 1
            self.reserved += cost
            params, body = dict(self.params), None
            try:
                body = await client.post("/chat/completions", cast_to=object, body={"model": args.model, "messages": messages, **params})
                self.take(key, prompt_hash(messages), body, params)
                self.dead = 0
                return
            except APIStatusError as error:
                text, code = self.clean(error), error.status_code
                if code in (400, 422) and self.give_up(error.param or text, params):
                    continue                                      # which is no try
                if code in (401, 402, 403, 404) or error.code == "insufficient_quota":
                    raise ValueError(f"{client.base_url} refuses model {args.model}: {text}") from None
                self.failed[key], header = text, error.response.headers.get("retry-after", "")
                seconds = min(3600, float(header)) if re.fullmatch(r"\d+(\.\d+)?", header) else 0
                if code < 500 and code not in (408, 409, 429):    # this prompt is refused: the endpoint is there
                    self.dead = 0
                    return
            except (OpenAIError, ValueError, RecursionError) as error:
                self.failed[key], seconds = self.clean(error), 0.0
                if not (type(error.__cause__).__name__.startswith("Connect") or any(tokens_used(body).values())):
                    self.reserved += cost                         # what was sent may be billed: its cost stays reserved
                if not isinstance(error, APIConnectionError):     # an answer, paid perhaps, that is no chat completion
                    break
            finally:
                self.reserved -= cost
            await self.wait((seconds or min(30, 0.5 * 2 ** attempt)) + random.random() * min(1 + attempt, 5))
            attempt += 1
        self.dead += 1
        if self.dead >= 2 * args.concurrency:
            raise ValueError(f"{client.base_url}: {self.dead} requests in a row without an answer, the last one: {self.failed[key]}")

    def give_up(self, text, sent):
        """Leave out, from here on, the first of the parameters sent that an error's text names; whether it is one to leave out."""
        name = next((name for name in ("messages", *sent) if name in text), None)
        if name not in ("temperature", "response_format", "max_completion_tokens"):
            return False
        self.params.pop(name, None)
        if name == "max_completion_tokens":                       # as it was called before, and still is by many servers
            self.params["max_tokens"] = self.args.max_tokens
        return True

    def clean(self, error):
        """An error's text in one line without the key, which a server may have put there (a short one is no secret)."""
        key = os.environ["OPENAI_API_KEY"]
        return " ".join((str(error).replace(key, "***") if len(key) > 7 else str(error)).split())[:300]

    async def online(self, clients, todo):
        """Send the jobs, `concurrency` at a time. What stops one stops all, after the replies in flight have come in.
        For each request a client looks through all its connections, so that many share them among several clients."""
        jobs = iter(todo)

        async def work(client):
            while not self.stop and (job := next(jobs, None)):
                try:
                    await self.send(client, *job)
                except Exception as error:
                    self.stop = error
        await asyncio.gather(*(work(clients[i // 16]) for i in range(min(self.args.concurrency, len(todo)))))

    async def batched(self, client, todo):
        """The same through files and batches. Their ids are noted before anything waits, so that a run killed at any
        moment finds its batches again; a batch made but not noted is known by its file."""
        from openai import NotFoundError
        note = self.path.with_suffix(".batches.json")
        pending = read_json_file(note) if note.is_file() else {}                           # {id of a file: id of its batch}
        asked, sent = None, pending.pop("params", dict(self.params))
        while pending or asked != self.params:                    # first what an earlier run left, then the rest, and what was
            if not pending:                                       # refused once more without the parameter that is to blame
                asked = sent = dict(self.params)
                todo = [job for job in todo if job[0] not in self.places]
                self.failed.clear()
                for chunk in (todo[i:i + 20000] for i in range(0, len(todo), 20000)):
                    lines = [{"custom_id": f"{prompt_hash(messages)} {key}", "method": "POST", "url": "/v1/chat/completions",
                              "body": {"model": self.args.model, "messages": messages, **self.params}} for key, messages in chunk]
                    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                    pending[(await client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")).id] = None
                    write_json(note, {**pending, "params": sent})
            for file in [file for file, batch in pending.items() if not batch]:
                made = {batch.input_file_id: batch.id async for batch in client.batches.list(limit=100)}
                pending[file] = made.get(file) or (await client.with_options(max_retries=0).batches.create(     # sent twice, it
                    input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h")).id           # would be paid twice
                write_json(note, {**pending, "params": sent})
            for file, id in list(pending.items()):
                try:
                    while (batch := await client.batches.retrieve(id)).status not in ("completed", "failed", "expired", "cancelled"):
                        self.bar.set_description(f"{id} {batch.status}")
                        await self.wait(self.args.poll)
                        if self.stop:
                            return
                except NotFoundError:
                    raise ValueError(f'{note}: the endpoint has no batch {id}; delete the line of "{file}", and it is asked anew') from None
                for result in filter(None, (batch.output_file_id, batch.error_file_id)):
                    for line in filter(None, (await client.files.content(result)).text.split("\n")):
                        row = json.loads(line)
                        hash, key = row["custom_id"].split(" ", 1)
                        body = (row.get("response") or {}).get("body")
                        try:
                            if key not in self.places:
                                self.take(key, hash, body, sent)
                        except ValueError as error:
                            refusal = body.get("error") if isinstance(body, dict) else None
                            self.failed[key] = self.clean(refusal or row.get("error") or error)
                            self.give_up(self.failed[key] if refusal else "", sent)
                why = "".join(f": {error.message}" for error in batch.errors and batch.errors.data or ())
                for key, _ in todo:
                    if key not in self.places:
                        self.failed.setdefault(key, f"{id} {batch.status}{self.clean(why)}")
                del pending[file]
                write_json(note, {**pending, "params": sent})

    async def run(self, todo):
        from openai import AsyncOpenAI, OpenAIError
        if self.args.aiohttp:
            from openai import DefaultAioHttpClient

        def interrupt(number):
            self.stop = "interrupted"                             # a second one does not wait for the replies in flight
            loop.remove_signal_handler(number)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt, number)
        try:
            with tqdm(total=len(todo), unit="reply", mininterval=1) as self.bar:
                async with AsyncExitStack() as stack:
                    clients = [await stack.enter_async_context(AsyncOpenAI(
                        base_url=self.args.base_url or None, timeout=self.args.timeout,
                        http_client=DefaultAioHttpClient() if self.args.aiohttp else None,
                        max_retries=self.args.retries if self.args.batch else 0)) for _ in range(0, self.args.concurrency, 16)]
                    await (self.batched(clients[0], todo) if self.args.batch else self.online(clients, todo))
        except (OpenAIError, ValueError) as error:
            self.stop = error if isinstance(error, ValueError) else ValueError(
                f"{clients[0].base_url}: {self.clean(error)}; run the same command to go on")
        if isinstance(self.stop, OSError):                        # a full disk has no place for records either
            raise self.stop

    def ask(self, jobs):
        """Ask the jobs [(key, messages), ...] that have no reply yet; `reply` then tells them, and `end` what stopped it. A
        dry run shows the first prompts and the bill instead."""
        if changed := [key for key, messages in jobs if key in self.places and self.reply(key)["prompt_hash"] != prompt_hash(messages)]:
            raise ValueError(f"{self.path}: {len(changed):,} replies answer other prompts (first: {changed[0]}); the seed, the data or "
                             "a form has changed: give another --output, or delete those lines")
        todo = [job for job in jobs if job[0] not in self.places]
        tokens = {name: sum(self.most(messages)[name] for _, messages in todo) for name in ("prompt_tokens", "completion_tokens")}
        if self.args.batch and 0 < self.args.max_requests < len(todo):
            self.stop = ValueError(f"max_requests {self.args.max_requests}, and a batch of {len(todo):,} is left to ask; lower --count")
        if self.args.batch and self.args.max_cost and self.spent + self.cost(tokens) > self.args.max_cost:
            self.stop = ValueError(f"max_cost {self.args.max_cost}: {self.spent:.4f} dollars spent, and the batch may cost "
                                   f"{self.cost(tokens):.4f}; lower --count or --max_tokens")
        if self.args.dry_run:
            for key, messages in todo[:3]:
                print(f"--- {key}", *(message["content"] for message in messages), sep="\n")
            dollars = f"{self.cost(tokens):.2f} dollars at most; {self.spent:.4f} spent so far"
            print(f"--- {len(jobs):,} prompts, {len(todo):,} to ask: at most {tokens['prompt_tokens']:,} tokens in and "
                  f"{tokens['completion_tokens']:,} out, {dollars if self.args.price_out else 'dollars with --price_in and --price_out'}")
        elif todo and not self.stop:
            asyncio.run(self.run(todo))

    def end(self):
        """Raise what no further request can mend, once the caller has written what was paid; print what else stopped the run."""
        if isinstance(self.stop, Exception):
            raise self.stop
        if self.stop:
            print(f"stopped: {self.stop}; the same command goes on")

    def reply(self, key):
        """The reply to a key as its line holds it, None if there is none."""
        return json.loads(os.pread(self.file.fileno(), *reversed(self.places[key]))) if key in self.places else None


def tokens_used(body):
    """The usage {prompt_tokens, completion_tokens} in a reply, 0 where its endpoint tells no number."""
    usage = isinstance(body, dict) and isinstance(body.get("usage"), dict) and body["usage"] or {}
    return {name: int(re.match(r"\d{0,12}", str(usage.get(name)))[0] or 0) for name in ("prompt_tokens", "completion_tokens")}


def prompt_hash(messages):
    """What tells two prompts apart: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]


def report(path, knowledge, tokenizer="", template="med_template", html=""):
    """Print what a file of records holds, and draw it on a page if html names one: counts by form, kind, relation and
    department, reasons of rejection, lengths, rows that a cut-off would cut, the knowledge base covered, duplicates."""
    records, rejected = read_instructions(path, answers=True), beside(path, ".rejected.jsonl")
    for number, r in enumerate(records, 1):
        r |= {key: r.get(key) or [] for key in ("relations", "values")}
        if not (all(isinstance(r.get(key) or "", str) for key in ("entity", "kind", "form")) and isinstance(r["relations"], list)
                and isinstance(r["values"], list) and all(isinstance(text, str) for text in r["relations"] + r["values"])):
            raise ValueError(f"{path} record {number}: wanted texts for entity, kind and form, lists of texts for relations and values")
    rows = read_records(rejected) if rejected.is_file() and rejected.stat().st_size else []
    reasons = [str(row.get("reason")).split(":")[0] for _, row in rows]
    entities = {e["中心词"]: e for e in read_knowledge(knowledge)}
    values = {(name, v) for name, e in entities.items() for r in e if r not in ("中心词", "类型") for v in e[r]}
    told = {(r["entity"], v) for r in records if r.get("entity") for v in r["values"]}
    texts, kept = Counter(plain(r["instruction"] + r["input"] + r["output"]) for r in records), Kept()
    departments = [d for r in records for d in entities.get(r.get("entity"), {}).get("所属科室", [])]
    repeats = 0
    for r in records:
        close, grams = near(kept, r)
        repeats += close
        if not close:
            kept.add(grams, r.get("entity"))

    def spread(numbers, width):
        bins = Counter(number // width * width for number in numbers)
        return {f"{low} to {low + width - 1}": bins[low] for low in sorted(bins)}
    sections = {
        "records": {"kept": len(records), "rejected": len(reasons)}, "reasons of rejection": reasons,
        "forms": [r["form"] for r in records if r.get("form")], "kinds": [r["kind"] for r in records if r.get("kind")],
        "relations": [name for r in records for name in r["relations"]], "departments": departments,
        "characters of an answer": spread([len(r["output"]) for r in records], 50),
        "knowledge base": {"entities": len(entities), "entities asked about": len({r.get("entity") for r in records} & set(entities)),
                           "values": len(values), "values told": len(values & told)},
        "duplicates": {"exact": len(records) - len(texts), "near (4-grams)": repeats}}
    if tokenizer:
        pieces, form = Tokenizer(tokenizer), load_template(template)
        tokens = [len(pieces.encode(render_prompt(form, r["instruction"], r["input"]) + r["output"], bos=True, eos=True)) for r in records]
        sections["tokens of a row"] = spread(tokens, 64)
        sections["rows cut at"] = {f"{limit} tokens": sum(n > limit for n in tokens) for limit in (256, 320, 384, 512, 768, 1024)}
    for title, counts in sections.items():
        sections[title] = counts = dict(Counter(counts).most_common()) if isinstance(counts, list) else counts
        if counts:
            print(f"{title}: " + ", ".join(f"{label} {number:,}" for label, number in counts.items()))
    if html:
        page = Template((DATA / "stats.html").read_text(encoding="utf-8"))
        text = page.safe_substitute(title=Path(path).name, data=json.dumps(sections, ensure_ascii=False).replace("<", "\\u003c"))
        write_atomically(html, lambda p: p.write_text(text, encoding="utf-8"))
        print(f"{html}: the same as a page")


def write_lines(path, records):
    """Write records as JSON lines, replacing the file at once, and say so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lambda p: p.write_text(lines, encoding="utf-8"))
    print(f"{path}: {len(records):,} records")


def read_rubric(path):
    """A rubric in the form of data/rubrics, with the `places` of answers in its user text, the `keys` of a reply and the
    values `allowed` there: those of its scale, or its verdicts [the first is better, the second is, a tie]."""
    rubric = read_json_file(path)
    try:
        pair = "verdicts" in rubric
        places = ["answer_a", "answer_b"] if pair else ["answer"]
        keys = ["verdict"] if pair else [dimension["key"] for dimension in rubric["dimensions"]]
        allowed = rubric["verdicts"] if pair else [*range(rubric["scale"][0], rubric["scale"][1] + 1)]
        if not ({*re.findall(r"\{(\w+)\}", rubric["user"])} - {"reference"} == {"question", *places} and rubric["name"]
                and rubric["system"] and len({*keys}) == len(keys) > 0 and len({*allowed}) == len(allowed) and (len(allowed) == 3 if pair else len(allowed) > 1)):
            raise LookupError
    except (LookupError, TypeError):
        raise ValueError(f"{path} is no rubric; wanted the fields of those in data/rubrics, and their {{places}} in user") from None
    return {**rubric, "places": places, "keys": keys, "allowed": allowed}


def parse_verdict(content, rubric):
    """The scores {dimension: whole number}, or {"verdict": text}, in a judge's reply. Nothing is mended: raises ValueError
    unless it is one JSON object with the rubric's keys, each once, beside 理由 or not, and values that are allowed."""
    try:
        said = json.loads(content, object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else pairs)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}" if content else "empty") from None
    if not isinstance(said, dict) or said.keys() - {"理由"} != {*rubric["keys"]}:
        raise ValueError(f"other keys: {said!r:.80}, wanted {' '.join(rubric['keys'])}")
    if not all(type(said[key]) in (int, str) and said[key] in rubric["allowed"] for key in rubric["keys"]):
        raise ValueError(f"off the scale: {said!r:.80}, wanted {rubric['allowed']}")
    return {key: said[key] for key in rubric["keys"]}


def judge(args):
    """Have answers scored, or two files of answers to the same questions compared, each pair in both orders: a judge who
    prefers a place and not an answer makes ties (Zheng et al. 2023). A line a question, the last one is the summary."""
    rubric, files, rows, prompts = read_rubric(args.rubric), args.answers, [], {}
    replies, places = beside(args.output, ".replies.jsonl", "rubric_sha256"), rubric["places"]
    if len(files) != len(places):
        raise ValueError(f"{args.rubric} wants {len(places)} file(s) of answers, got {len(files)}")
    hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (args.rubric, *files)]
    source = {"model": args.model, "rubric": rubric["name"], "rubric_sha256": hashes[0], "answers_sha256": hashes[1:]}
    for number, same in enumerate(zip_longest(*map(read_instructions, files), fillvalue={}), 1):
        asked = ["\n".join(filter(None, (row.get("instruction"), row.get("input")))) for row in same]
        answers, reference, keys = [row.get("answer") for row in same], same[0].get("output"), []
        if not (asked[0] == asked[-1] and all(isinstance(a, str) for a in answers) and (reference or "{reference}" not in rubric["user"])):
            raise ValueError(f"record {number} of {' and '.join(files)}: {[q[:40] for q in asked]}; wanted one question, an answer as "
                             "generate.py --output writes it, and an output if the rubric shows a reference")
        for order in permutations(answers):
            texts = {"question": asked[0], "reference": reference, **dict(zip(places, order))}
            user = re.sub(r"\{(\w+)\}", lambda place: texts[place[1]], rubric["user"])
            messages = [{"role": "system", "content": rubric["system"]}, {"role": "user", "content": user}]
            keys.append(f"{prompt_hash(messages)}/{rubric['name']}/{args.model}")
            prompts[keys[-1]] = messages                          # what stands there twice is asked once
        rows.append({"keys": keys, "question": asked[0], **source})
    asker = Asker(replies, args)
    asker.ask(list(prompts.items()))
    if args.dry_run:
        return asker.end()
    for row in rows:
        try:
            if lost := [key for key in row["keys"] if not asker.reply(key)]:
                raise ValueError(f"no reply: {asker.failed.get(lost[0], asker.stop)}")
            got = [asker.reply(key) for key in row["keys"]]
            row["model"] = got[0]["model"]                        # as the endpoint calls it
            said = [parse_verdict(reply["content"], rubric) for reply in got]
            if len(places) == 2:
                (a, b, tie), verdicts = rubric["verdicts"], [each["verdict"] for each in said]
                agreed = verdicts[1] == {a: b, b: a, tie: tie}[verdicts[0]]
                row |= {"verdict": verdicts[0] if agreed else tie, "verdicts": verdicts}
            else:
                row["scores"] = said[0]
        except ValueError as error:
            row["rejected"] = str(error)
    kept = [row for row in rows if "rejected" not in row]
    summary = {**source, "asked": len(rows), "rejected": Counter(row["rejected"].split(":")[0] for row in rows if "rejected" in row)}
    if len(places) == 2:
        found = Counter(row["verdict"] for row in kept)
        summary |= {name: found[verdict] for name, verdict in zip(("wins", "losses", "ties"), rubric["verdicts"])}
    elif kept:
        summary |= {key: {"mean": round(np.mean([row["scores"][key] for row in kept]), 4), "n": len(kept)} for key in rubric["keys"]}
    write_lines(args.output, [*rows, {"summary": summary}])
    asker.end()
    print(json.dumps({"summary": summary}, ensure_ascii=False))


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    offline = commands.add_parser("offline", help="instruction records from forms, split by entity")
    knowledge = commands.add_parser("knowledge", help="an LLM writes instruction records from facts")
    literature = commands.add_parser("literature", help="an LLM writes dialogues about conclusions of papers")
    tasks = commands.add_parser("self-instruct", help="an LLM writes new tasks after seed tasks")
    stats = commands.add_parser("stats", help="what a file of records holds")
    stats.add_argument("file", help="alpaca records or dialogues, array or lines; x.rejected.jsonl beside it is counted too")
    add_options([stats], ("tokenizer", "", "a tokenizer.model: lengths in tokens, rows that a cut-off would cut"),
                ("prompt_template_name", "med_template", "template of the prompts whose tokens are counted"),
                ("html", "", "file for the report as a page"))
    add_options([offline], ("output_dir", str(DATA), "folder for train.jsonl and heldout.jsonl"),
                ("heldout", 0.1, "share of the entities held out"), ("questions", 2, "question forms per fact (held out: 1)"))
    add_options([literature], ("literature", str(DATA / "literature.jsonl"), "lines of 标题, 疾病, 结论"))
    add_options([tasks], ("seed_tasks", str(DATA / "seed_tasks.jsonl"), "alpaca records"))
    add_options([offline, knowledge, literature, tasks, stats],
                ("knowledge", str(DATA / "knowledge.jsonl"), "knowledge base: CMeKG's form or triples"))
    add_options([offline, knowledge], ("forms", str(DATA / "forms.json"), "questions and statements by relation"))
    add_options([offline, knowledge, literature, tasks], ("seed", 0, "of every random choice"))
    add_options([knowledge, literature, tasks], ("count", 100, "prompts; a greater count goes on where a smaller one ended"),
                ("prompts", str(DATA / "prompts"), "folder of prompt forms"))
    add_options([knowledge], ("mix", "", "weights of the forms, as single=3,vignette=1 (empty: their own)"))
    for command in (knowledge, literature, tasks):
        command.add_argument("--output", required=True, help="file of records; replies and rejected ones stand beside it")
        add_api_options(command)
    judging = commands.add_parser("judge", help="an LLM scores answers, or says which of two is better")
    judging.add_argument("answers", nargs="+", help="file of records with an answer, as generate.py --output writes it; two to compare")
    judging.add_argument("--rubric", required=True, help="what is judged, a file as in data/rubrics")
    judging.add_argument("--output", required=True, help="file of scores; the replies stand beside it")
    add_api_options(judging)
    judging.set_defaults(temperature=0.0)
    args = parser.parse_args()
    if args.command == "judge":
        return judge(args)
    if args.command == "offline":
        entities, forms = read_knowledge(args.knowledge), read_forms(args.forms)
        if not 0 < args.heldout < 1 or args.questions < 1:
            raise ValueError(f"heldout {args.heldout}, questions {args.questions}: wanted 0 < heldout < 1 and at least 1")
        train, heldout = split_entities(entities, args.heldout, args.seed)
        write_lines(Path(args.output_dir) / "train.jsonl", write_records(train, forms, args.questions, random.Random(args.seed)))
        return write_lines(Path(args.output_dir) / "heldout.jsonl", write_records(heldout, forms, 1, random.Random(args.seed)))
    if args.command == "stats":
        return report(args.file, args.knowledge, args.tokenizer, args.prompt_template_name, args.html)
    if args.count < 1:
        raise ValueError(f"count {args.count}, wanted at least 1")
    prompts = read_prompts(args.prompts)
    if args.command == "self-instruct":
        seeds = read_instructions(args.seed_tasks, answers=True)
        return build(args, self_instruct_jobs(args, prompts, seeds), Sieve(seeds=[seed["instruction"] for seed in seeds]))
    entities = read_knowledge(args.knowledge)
    if args.command == "literature":
        jobs = literature_jobs(args, prompts)
    else:
        mix = dict(part.partition("=")[::2] for part in args.mix.split(",") if part)
        if not all("kinds" in prompts.get(name, {}) and weight.isdecimal() for name, weight in mix.items()):
            raise ValueError(f"mix {args.mix!r}, wanted name=weight,... of {' '.join(prompts)}")
        for name, form in prompts.items():
            form["weight"] = int(mix.get(name, 0)) if mix else form.get("weight", 0)
        jobs = knowledge_jobs(args, entities, read_forms(args.forms), prompts)
    build(args, jobs, Sieve(Names(entities)))


if __name__ == "__main__":
    run(main)
