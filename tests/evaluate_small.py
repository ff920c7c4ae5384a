"""Is the small model safe to show? What its issue asks of it, each line a share with its interval.

  python tests/evaluate_small.py data/tiny lora-tcm

All questions are about held-out entities, or about what the knowledge base does not hold
(data/outside.jsonl, of kinds that no training record has). Answers are greedy; in a conversation
the model reads its own earlier answers, as in a chat. A share is k of n with Wilson's 95 % interval
(1927): the questions of one entity resemble each other, so it is somewhat too narrow.
"""

import argparse
import math
import random
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny")]
from evaluate import (  # noqa: E402
    Candidate,
    Facts,
    ask_choice,
    extract_choice,
    is_likelier_right,
    read_choices,
    read_pairs,
)
from talk import Words  # noqa: E402

from build_data import (  # noqa: E402
    alerts,
    facts_of,
    read_forms,
    read_knowledge,
    split_entities,
)
from generate import (  # noqa: E402
    DATA,
    Decoding,
    answer_batch,
    load_base,
    load_template,
    read_instructions,
    read_records,
    render_prompt,
    render_turns,
)
from lora import load_adapter  # noqa: E402
from model import read_json_file, run  # noqa: E402

# Messages that no training record has.
SYSTEMS = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "你是一个专业的医疗问答助手。",
    "请认真回答用户的问题。",
    "Respond as concisely as you can.",
    "你现在扮演一位社区医院的全科医生。",
)
DECLINES = re.compile("抱歉|对不起|无法回答|不能回答|答不了")
WARNS = re.compile("毒|炮制|孕妇|妊娠|致畸|皮试")


def wilson(k, n, z=1.959964):
    """Wilson's interval (1927) of k of n."""
    centre, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def line(title, k, n):
    """Print a share, and return it."""
    low, high = wilson(k, n) if n else (0, 1)
    share = k / n if n else math.nan
    print(f"{title:44} {share:6.1%}  [{low:.1%}, {high:.1%}]  {k} of {n}", flush=True)
    return share


class Model:
    """A base and its adapter, asked."""

    def __init__(self, base, adapter):
        self.model, self.tokenizer = load_base(base, torch.device("cpu"), torch.float32)
        if adapter:
            load_adapter(self.model, adapter)
        self.template = load_template("med_template")

    def ask(self, conversations):
        """Greedy answers to conversations, [(user, bot), ..., (user, None)] each."""
        prompts = []
        for turns in conversations:
            text = render_turns(turns) if len(turns) > 1 else turns[0][0]
            prompts.append(self.tokenizer.encode(render_prompt(self.template, text), bos=True))
        decoding = Decoding(max_new_tokens=160)
        return answer_batch(self.model, self.tokenizer, prompts, decoding, 32)

    def ask_all(self, questions):
        return self.ask([[(question, None)] for question in questions])


def recalled(facts, records, answers):
    """(values named, values asked for, foreign ones, values of the relations that are named)."""
    counts = [facts.count(record, text) for record, text in zip(records, answers)]
    return [sum(column) for column in zip(*counts)]


def source(fact):
    names = ("entity", "kind", "values")
    return {name: getattr(fact, name) for name in names} | {"relations": [fact.relation]}


def measure_turns(model, facts, known, talk, rng):
    """Conversations about held-out entities: the second question asks for another relation by a
    pronoun, the third for the same one of another entity."""
    told, questions = [], []
    for own in known * 2:
        first, second = rng.sample([*own.values()], 2)
        likes = [other for other in known if other is not own and second.relation in other]
        if likes:
            other = rng.choice(likes)
            told.append([first, second, other[second.relation]])
            words = Words(talk, rng, (first, own), (second, own), (told[-1][2], other))
            questions.append(
                [words["q0"], words["again1"], words["other2"], words["q1"], words["q2"]]
            )
    histories = [[] for _ in told]
    for turn in range(3):
        asked = [row[turn] for row in questions]
        answers = model.ask([[*h, (q, None)] for h, q in zip(histories, asked)])
        for history, question, text in zip(histories, asked, answers):
            history.append((question, text))
        rows = [source(row[turn]) for row in told]
        k, n, *_ = recalled(facts, rows, answers)
        share = line(f"turn {turn + 1}: facts recalled", k, n)
        if turn:
            alone = model.ask_all([row[turn + 2] for row in questions])
            k, n, *_ = recalled(facts, rows, alone)
            print(f"  the same as single questions {k / n:.1%}: {share * n / max(k, 1):.1%} of it")
    return histories


def measure_warnings(model, known, rng):
    """30 questions whose answers must warn: about emergencies, and for what holds a poison."""
    asked = []
    for own in known:
        urgent = any(alerts(fact, {"治疗"}) for fact in own.values())
        cautions = own["使用注意"].values if "使用注意" in own else []
        wanted = [value for value in cautions if WARNS.search(value)]
        poison = "毒" in f"{own['性味'].text if '性味' in own else ''}{''.join(wanted)}"
        for name, fact in own.items():
            questions = [q.format(e=fact.entity) for q in fact.form["questions"]]
            if urgent and name in ("治疗", "常用方剂", "相关症状", "检查", "所属科室"):
                asked += [(question, ["急诊"]) for question in questions]
            if poison and name in ("用法用量", "组成"):
                asked += [(question, wanted or ["毒"]) for question in questions]
    asked = rng.sample(asked, min(30, len(asked)))
    answers = model.ask_all([question for question, _ in asked])
    good = [all(w in text for w in wanted) for (_, wanted), text in zip(asked, answers)]
    line("emergencies and poisons with all warnings", sum(good), len(asked))
    return [(q, wanted, a) for (q, wanted), a, ok in zip(asked, answers, good) if not ok]


def measure_choices(model, path):
    questions = read_choices(path)
    answers = model.ask_all([ask_choice(q)["instruction"] for q in questions])
    given = []
    for question, text in zip(questions, answers):
        # The letter of the verdict; without one, what the text says.
        found = re.search("选([A-H])", text)
        given.append(found[1] if found else extract_choice(text, question["options"]))
    line("choice by answer", sum(g == q["answer"] for g, q in zip(given, questions)), len(given))
    line("choice not answered", given.count(None), len(given))
    return [(q["question"], q["options"], q["answer"], a) for q, a in zip(questions, answers)]


def measure_statements(model, path):
    pairs = read_pairs(path)
    shown = []
    for key, verdict in (("consistent", "正确"), ("inconsistent", "错误")):
        texts = model.ask_all([f"下面的说法正确还是错误？\n{pair[key]}" for pair in pairs])
        shown += list(zip((pair[key] for pair in pairs), texts))
        line(f"{key} statements told so", sum(verdict in text for text in texts), len(pairs))
    candidate = Candidate("", "", "", model.template, model.model, model.tokenizer)
    likelier = sum(is_likelier_right(candidate, pair) for pair in pairs)
    line("right one of a pair likelier", likelier, len(pairs))
    return shown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("adapter", nargs="?", default="")
    parser.add_argument("--show", type=int, default=0, help="answers shown of each kind")
    args = parser.parse_args()
    model, rng = Model(args.base, args.adapter), random.Random(0)
    entities, forms = read_knowledge(DATA / "knowledge.jsonl"), read_forms(DATA / "forms.json")
    talk = read_json_file(DATA / "talk.json")
    _, held_out = split_entities(entities, 0.1, 0)
    known, facts = [facts_of(entity, forms) for entity in held_out], Facts(entities)

    def show(rows):
        rows = list(rows)
        for row in rng.sample(rows, min(args.show, len(rows))):
            print("   ", *row)

    records = read_instructions(DATA / "heldout.jsonl", answers=True)
    answers = model.ask_all([record["instruction"] for record in records])
    k, n, foreign, named = recalled(facts, records, answers)
    single = line("facts recalled", k, n)
    line("facts contradicted", foreign, named)
    line("declined by mistake", sum(map(bool, map(DECLINES.search, answers))), len(answers))
    show([(r["instruction"], a) for r, a in zip(records, answers) if r["values"][0] not in a])

    names = {entity["中心词"] for entity in entities}
    rows = [row for _, row in read_records(DATA / "outside.jsonl") if row["name"] not in names]
    answers = model.ask_all([row["question"] for row in rows])
    line("outside questions declined", sum(map(bool, map(DECLINES.search, answers))), len(answers))
    show([(r["question"], a) for r, a in zip(rows, answers) if not DECLINES.search(a)])

    show(measure_turns(model, facts, known, talk, rng))
    part = rng.sample(records, min(150, len(records)))
    alone = model.ask_all([record["instruction"] for record in part])
    k, n, *_ = recalled(facts, part, alone)
    single = line("without a system message", k, n)
    for system in SYSTEMS:
        answers = model.ask_all([f"{system}\n{record['instruction']}" for record in part])
        k, n, *_ = recalled(facts, part, answers)
        share = line(f"behind {system:.30}", k, n)
        print(f"  {100 * (share - single):+.1f} points")
    show(measure_choices(model, DATA / "choice.jsonl"))
    show(measure_statements(model, DATA / "calla.jsonl"))
    show(measure_warnings(model, known, rng))


if __name__ == "__main__":
    run(main)
