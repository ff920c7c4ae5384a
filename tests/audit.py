"""Why does the model say that, and is it safe? Answers traced back to facts and training records.

  python tests/audit.py answers answers.jsonl --output audit      -> audit.jsonl, audit.html
      --lora_weights lora-tcm                                     and what tuning made likelier
  python tests/audit.py trace lora-tcm answers.jsonl audit.jsonl  the chain of hashes behind them

An answer's claims are the values of the knowledge base that it names, and the doses in it:

  supported      an entity that question or answer names has the value; the claim holds the fact and
                 the training records that state it
  contradicted   none has it, but one has other values under a relation where others have this one;
                 the claim holds the right values
  unknown        the knowledge base has nothing to hold it against

Names that are no value of another are what is spoken of, and no claims. What an answer denies is no
claim either. The knowledge base counts as complete: a true value that it lacks is contradicted. A
value that one entity has and the answer gives to another it names is not found out.

With the adapter that gave the answers each claim has a gain: ln of how much likelier its words are
with the adapter than without, behind the question and the words before. The first word of an answer
that only tuning brings to the point gains most; what the base would have said too gains nothing.

Warnings follow data/safety.json: herbs that clash (十八反, 十九畏), doses above the base's,
cautions that the question touches and the answer does not tell, emergencies without 急诊. They call
for a look; no warning does not make an answer safe. The answers are records with an `answer`, as
generate.py --output writes them.
"""

import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from string import Template

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from build_data import (  # noqa: E402
    DENIED,
    UNPAIRED,
    Fact,
    Names,
    check_sources,
    read_knowledge,
    unique,
    write_lines,
)
from generate import (  # noqa: E402
    DATA,
    Options,
    conversation,
    load,
    read_instructions,
    render_prompt,
)
from lora import remove_adapter  # noqa: E402
from model import (  # noqa: E402
    Parser,
    file_hash,
    read_json_file,
    run,
    to_json,
    write_text,
)
from train import (  # noqa: E402
    Row,
    TrainConfig,
    collate,
    describe_run,
    find_terms,
    split_weight,
)

# --------------------------------------------------------------------------------------------------
# Claims

NUMBER = r"\d+(?:\.\d+)?"
CAUTIONS = ("使用注意", "药物相互作用")


@dataclass
class Claim:
    """What an answer says between two characters of it, and what the knowledge base has on that."""

    start: int
    end: int
    text: str
    status: str  # supported, contradicted or unknown
    entity: str = ""  # the fact that supports or contradicts it
    relation: str = ""
    values: tuple = ()
    records: tuple = ()  # ids of the training records that state the fact
    gain: float = None  # how much likelier tuning made it: ln p(text | adapter) - ln p(text | base)


@dataclass
class Dose:
    """A weight in a text, in grams from low to high."""

    start: int
    end: int
    text: str
    low: float
    high: float

    def fits(self, other):
        """Whether another dose allows this one: the same range, or one weight within it."""
        same = (self.low, self.high) == (other.low, other.high)
        return same or self.low == self.high and other.low <= self.low <= other.high


class Facts:
    """A knowledge base to hold answers against; tests/evaluate.py counts by the same rules."""

    def __init__(self, entities):
        self.names = Names(entities)
        # {entity: its facts}, {(kind, relation): {value: how many entities have it there}}
        self.facts, self.values = {}, defaultdict(Counter)
        for entity in entities:
            name, kind = entity["中心词"], entity["类型"]
            own = self.facts.setdefault(name, [])
            for relation, values in entity.items():
                if relation != UNPAIRED and isinstance(values, list):
                    own.append(Fact(name, kind, relation, "、".join(values), values))
                    self.values[kind, relation].update(values)

    def find(self, text, terms):
        """[(start, term), ...] of the terms that stand in a text by themselves: of one character
        (温), only an entity's name counts within a word."""
        return [
            (start, term)
            for start, term in find_terms(text, terms)
            if len(term) > 1 or term in self.facts or not re.match(r"\w", text[start + 1 :])
        ]

    def said(self, text, terms):
        """Those that the text does not deny."""
        found = self.find(text, terms)
        return [(i, term) for i, term in found if not re.search(f"{DENIED}$", text[:i])]

    def judge(self, term, own):
        """(status, Fact or None) of the claim that an entity has a term, whose facts are its own:
        supported by the first that has it, contradicted by the one in whose place others have it,
        or unknown."""
        for fact in own:
            # 温 is not 微温. What a caution names is not thereby advised.
            apart = len(term) == 1 or fact.relation in CAUTIONS and term in self.names.entities
            if term in (fact.values if apart else fact.text):
                return "supported", fact
        # Many a value stands under two relations: 腹痛 is a symptom first.
        often = max(own, key=lambda fact: self.values[fact.kind, fact.relation][term], default=None)
        if often and self.values[often.kind, often.relation][term]:
            return "contradicted", often
        return "unknown", None


class Evidence(Facts):
    """A knowledge base and training records, to hold answers against. safety: data/safety.json."""

    def __init__(self, entities, records, safety):
        super().__init__(entities)
        self.safety, self.asked = safety, {record["entity"] for record in records}
        self.telling = defaultdict(list)  # {(entity, value): ids of training records}
        for number, record in enumerate(records, 1):
            for value in record["values"]:
                self.telling[record["entity"], value].append(record.get("id", f"record {number}"))
        herbs = chain(*(one + other for _, one, other in safety["clashes"]))
        # A dose is read as a number, not as a text.
        values = chain(*(vs for (_, relation), vs in self.values.items() if relation != "用法用量"))
        self.terms = {*values, *self.names.entities, *herbs}
        units = "|".join(map(re.escape, safety["units"]))
        to = r"\s*[～~至到—–-]+\s*"
        self.dose = rf"(?i)({NUMBER})(?:{to}({NUMBER}))?\s*({units})(?![a-z])"

    def entities_of(self, name):
        """The entities of the knowledge base that have a name."""
        return sorted(self.names.entities.get(name, set()) & self.facts.keys())

    def named(self, text):
        """The entities that a text names, in its order."""
        return unique(chain(*(self.entities_of(term) for _, term in self.find(text, self.terms))))

    def doses(self, text):
        """The Doses in a text, in its order."""
        for match in re.finditer(self.dose, text):
            low, high, unit = match.groups()
            gram = self.safety["units"][unit.lower()]
            # Rounded, since 3 * 0.001 is not 0.003.
            low, high = (round(float(number) * gram, 9) for number in (low, high or low))
            yield Dose(*match.span(), match[0], low, high)

    def claims(self, question, answer, entity=""):
        """The Claims of an answer, in its order. entity: what it is about, if that is known."""
        asked = unique([entity, *self.named(question)])
        subjects = unique([*asked, *self.named(answer)])
        own = list(chain(*(self.facts.get(name, ()) for name in subjects)))
        claims = []
        for dose, fact, allowed in self.dosed(answer, subjects):
            status = "supported" if any(map(dose.fits, allowed)) else "contradicted"
            claims.append(self.cite(dose.start, dose.text, status, fact))
        for start, term in self.said(answer, self.terms):
            if not {term, *self.entities_of(term)} & {*asked}:
                status, fact = self.judge(term, own)
                # A name that nobody has as a value is a subject.
                if fact or term not in self.names.entities:
                    claims.append(self.cite(start, term, status, fact))
        return sorted(claims, key=lambda claim: claim.start)

    def cite(self, start, text, status, fact):
        """The Claim with the fact that supports or contradicts it, and the records that state the
        fact."""
        end = start + len(text)
        if not fact:
            return Claim(start, end, text, status)
        values = [value for value in fact.values if text in value] or fact.values
        records = unique(chain(*(self.telling[fact.entity, value] for value in values)))
        source = fact.entity, fact.relation, fact.values, records
        return Claim(start, end, text, status, *source)

    def dosed(self, answer, subjects):
        """Yield (dose, the fact on it, Doses there) of the doses of an answer: each belongs to the
        last name before it that has a dose."""
        dosages = {}
        for fact in chain(*(self.facts.get(name, ()) for name in subjects)):
            allowed = list(self.doses(fact.text)) if fact.relation == "用法用量" else []
            if allowed:
                dosages[fact.entity] = fact, allowed
        places = [
            (i, name)
            for i, term in self.find(answer, self.terms)
            for name in self.entities_of(term)
        ]
        for dose in self.doses(answer):
            before = [name for i, name in places if i < dose.start and name in dosages]
            for name in [*before[-1:], *dosages][:1]:
                yield dose, *dosages[name]

    # ----------------------------------------------------------------------------------------------
    # Safety

    def warnings(self, question, answer):
        """[{rule, text}, ...] of what a prescription or a piece of advice needs a look for."""
        subjects = unique([*self.named(question), *self.named(answer)])
        found = []
        said = {term for _, term in self.find(f"{question}\n{answer}", self.terms)}
        clashes = [] if re.search(self.safety["warned"], answer) else self.safety["clashes"]
        for rule, *sides in clashes:
            one, other = ([herb for herb in side if herb in said] for side in sides)
            if one and other:
                found.append((rule, f"{'、'.join(one)} + {'、'.join(other)}"))
        for dose, fact, allowed in self.dosed(answer, subjects):
            if dose.high > max(one.high for one in allowed):
                found.append(("超量", f"{fact.entity} {dose.text}（{fact.text}）"))
        for rule in self.safety["rules"]:
            if not re.search(rule["question"], question) or re.search(rule["answer"], answer):
                continue
            # An emergency that an answer names as a complication is none.
            names = self.named(question) if rule["relation"] == "所属科室" else subjects
            facts = chain(*(self.facts[name] for name in names))
            values = [
                (f.entity, v) for f in facts if f.relation == rule["relation"] for v in f.values
            ]
            touched = [f"{name}：{v}" for name, v in values if re.search(rule["fact"], v)]
            if touched or not rule["relation"]:
                found.append(
                    (rule["name"], "；".join(touched) or re.search(rule["question"], question)[0])
                )
        return [{"rule": rule, "text": text} for rule, text in unique(found)]


# --------------------------------------------------------------------------------------------------
# What tuning made likelier


def add_gains(rows, model, tokenizer, template):
    """Add to each claim its gain: the log-probability (natural) of the tokens that it touches,
    behind the question and the answer before them, with the model's adapter less without. Takes the
    adapter off."""
    rows = [row for row in rows if row["answer"]]
    answers = [tokenizer.encode_answer(row["answer"]) for row in rows]
    pairs = []
    for row, answer in zip(rows, answers):
        prompt = render_prompt(tokenizer, template, *conversation(row))
        pairs.append(Row(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    tuned = token_logprobs(model, pairs)
    remove_adapter(model)
    gains = [on - off for on, off in zip(tuned, token_logprobs(model, pairs))]
    for row, answer, gain in zip(rows, answers, gains):
        # Before which character of the text each token begins; three byte tokens may make one.
        decoded = (tokenizer.decode(answer[:i]) for i in range(len(answer) + 1))
        ends = [len(text.rstrip("\ufffd")) for text in decoded]
        for claim in row["claims"]:
            touched = [
                i
                for i, start in enumerate(ends[:-1])
                if start < claim["end"] and claim["start"] < max(start + 1, ends[i + 1])
            ]
            claim["gain"] = round(gain[touched].sum().item(), 4)


@torch.inference_mode()
def token_logprobs(model, rows, size=8):
    """Of each Row the log-probabilities (T,), float64, of its T targets; `size` rows a pass."""
    found = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        ids, labels, packed = collate(batch, model.device, glm=model.config.prefix_lm)
        targets = (labels[0] != -100).nonzero().squeeze(1)
        logits = model.lm_head(model.hidden_states(ids, packed, keep=targets))
        losses = F.cross_entropy(logits.float(), labels[0, targets], reduction="none")
        found += (-losses).double().cpu().split([sum(row.mask) for row in batch])
    return found


# --------------------------------------------------------------------------------------------------
# Report


def audit(rows, evidence):
    """Add to each answer its claims, its warnings, and which of the entities asked about training
    never asks about."""
    for row in rows:
        question = f"{row['instruction']}\n{row['input']}"
        claims = evidence.claims(question, row["answer"], row.get("entity") or "")
        asked = unique([row.get("entity") or "", *evidence.named(question)])
        row["claims"] = [asdict(claim) for claim in claims]
        row["warnings"] = evidence.warnings(question, row["answer"])
        held_out = [name for name in asked if name in evidence.facts.keys() - evidence.asked]
        row["held_out"] = held_out


def read_answers(path):
    """The answers in a file of generate.py --output. Raises ValueError naming a record without."""
    rows = read_instructions(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("answer"), str):
            raise ValueError(
                f"{path} record {number} has no answer; make it by generate.py --output"
            )
    return rows


@dataclass
class Answers:
    """Hold answers against the knowledge base."""

    output: str = "audit"  # name of the report, which gets .jsonl and .html
    knowledge: str = f"{DATA}/knowledge.jsonl"  # the one that the records were made from
    records: str = f"{DATA}/train.jsonl"  # what the model was tuned on
    safety: str = f"{DATA}/safety.json"  # clashes, units and rules
    lora_weights: str = ""  # the adapter that answered: how much likelier it made each value
    base_model: str = ""  # its base (empty: the one it was trained on)
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: str = "auto"  # of the activations: auto, bf16, fp16, fp32

    def run(self, file):
        rows = read_answers(file)
        records = read_instructions(self.records, answers=True)
        check_sources(self.records, records)
        evidence = Evidence(read_knowledge(self.knowledge), records, read_json_file(self.safety))
        audit(rows, evidence)
        sources = [file, self.knowledge, self.records]
        if self.lora_weights:
            options = Options(base_model=self.base_model, device=self.device, dtype=self.dtype)
            add_gains(rows, *load(options, self.lora_weights)[:3])
            sources += Path(self.lora_weights).glob("adapter_model.*")
        write_lines(f"{self.output}.jsonl", rows, *sources)
        self.write_page(file, rows, records)
        claims = Counter(claim["status"] for row in rows for claim in row["claims"])
        warned = Counter(one["rule"] for row in rows for one in row["warnings"])
        for counts in (claims, warned):
            print(", ".join(f"{name} {number:,}" for name, number in counts.most_common()))

    def write_page(self, file, rows, records):
        cited = {id for row in rows for claim in row["claims"] for id in claim["records"]}
        shown = {}
        for number, record in enumerate(records, 1):
            id = record.get("id", f"record {number}")
            if id in cited:
                shown[id] = [record["instruction"], record["output"]]
        # "<" is escaped, lest a text ends the script that it stands in.
        data = to_json({"rows": rows, "records": shown}).replace("<", "\\u003c")
        page = Template((DATA / "audit.html").read_text(encoding="utf-8"))
        write_text(f"{self.output}.html", page.safe_substitute(data=data))
        print(f"{self.output}.html: the same as a page")


# --------------------------------------------------------------------------------------------------
# The chain of hashes


def links(adapter, files):
    """Yield (what, whether it is what the next one was made from), the oldest first; None: what the
    records were made from is not noted."""
    run_info = read_json_file(Path(adapter, "run.json"))
    made = run_info.get("config")
    if not isinstance(made, dict):
        raise ValueError(f"{adapter}/run.json is not of a run of train.py")
    made = {name: tuple(v) if isinstance(v, list) else v for name, v in made.items()}
    config = TrainConfig(**made)
    for path in config.data_path:
        yield from noted(split_weight(path)[0], None)
    wanted = describe_run(config)
    for name, hashes in wanted["sha256"].items():
        yield f"{name} of the run", to_json(run_info["sha256"].get(name)) == to_json(hashes)
    template = wanted["made_in"]["template"]
    yield "template of the run", run_info["made_in"]["template"] == template
    weights = [file_hash(file) for file in Path(adapter).glob("adapter_model.safetensors")]
    yield f"{adapter}: weights", run_info.get("adapter") == weights
    for path in files:
        yield from noted(path)


def noted(path, without=False):
    """The links that the note beside a file tells; what counts without one."""
    note = Path(f"{path}.hashes.json")
    if not note.is_file():
        yield f"{path}: no {note.name} beside it", without
        return
    # What it was made from comes before itself.
    hashes = read_json_file(note)
    for file in sorted(hashes, key=lambda file: file == str(path)):
        yield f"{path}: {file}", Path(file).is_file() and file_hash(file) == hashes[file]


@dataclass
class Trace:
    """Check the chain: knowledge base, records, base, template, adapter, answers, report."""

    def run(self, adapter, *files):
        broken = []
        for link, fits in links(adapter, files):
            print({True: "fits   ", False: "DIFFERS", None: "unknown"}[fits], link)
            broken += [link] * (fits is False)
        if broken:
            raise ValueError(f"the first link that does not fit: {broken[0]}")


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, parser_class=Parser)
    for name, options, text, number in (
        ("answers", Answers, "answers, as generate.py --output writes them", 1),
        ("trace", Trace, "an adapter, then the answers and reports made with it", "+"),
    ):
        command = commands.add_parser(name, help=options.__doc__)
        command.add_argument("files", nargs=number, metavar="file", help=text)
        command.add_settings(options)
        command.set_defaults(command=options)
    given = vars(parser.parse_args())
    options, files = given.pop("command"), given.pop("files")
    options(**given).run(*files)


if __name__ == "__main__":
    run(main)
