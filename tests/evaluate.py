"""What did tuning change? Scores with intervals and a report, or a table of answers side by side.

  python tests/evaluate.py base=data/tiny tuned=data/tiny+lora-tcm --output_dir report
  python tests/evaluate.py base=data/tiny tuned=data/tiny+lora-tcm --output_dir exam \
      --exams CMB-val-merge.json TCM-SE-B.jsonl clinical_medicine_val.csv
  python tests/evaluate.py base=data/tiny tuned=data/tiny+lora-tcm --output_dir table \
      --instruct_dir questions.json

A model is NAME=BASE or NAME=BASE+ADAPTER; the first one is what the others are compared with. The
models may stand on one base or on several. Each folder gets answers-NAME.jsonl, records that
tests/judge.py reads. The same inputs give the same bytes, so that a report can be checked by
running it again; a run that was interrupted goes on.

The report scores answers to records that hold a reference, choices in exams (exams.py says in which
forms), judgements of statements, and what is declined: scores.json, exams.json, scores.svg,
report.html and run.json (hashes of weights, data and templates, decoding, versions). The table
(模型效果对比) asks any questions in a form that generate.py reads: compare.md, compare.csv and
compare.html. In the pages wrong and missing values are marked where a record names its values,
elsewhere what the first model's answer does not have (report.py).

Characters are those of the text without white space. Each score is a mean over records, or a ratio
or BLEU of sums over records; its 95 % interval is the percentile bootstrap (Efron & Tibshirani
1993). What is drawn are whole entities with all their records (Davison & Hinkley 1997, section
3.8), since records of one entity resemble each other; a record without `entity` is drawn alone. All
models have the same resamples, so that the difference of two is a paired one. A proportion of
records has Wilson's interval (1927), entities being the trials.

  bits per character   -log2 p(reference and EOS | prompt) / characters of the reference:
                       comparable across tokenizers
  facts recalled       share of a record's values (those of the knowledge base) that the answer
                       names by themselves, not inside the entity's name or a longer value of the
                       same relation, and does not deny
  facts contradicted   of the values of the asked relations that the answer names, the share that
                       is another entity's
  ROUGE-1/2/L          F1 over characters (Lin 2004)
  BLEU-4               over characters, corpus level (Papineni et al. 2002), exponential smoothing
  distinct-2           different character bigrams / bigrams of an answer (Li et al. 2016)
  repetition           1 - different 4-grams / 4-grams of an answer (seq-rep-4, Welleck et al. 2020)
  stopped, empty, refused, U+FFFD   share of the answers that end by EOS, have no text, decline,
                       show half a character
  choice by likelihood the likeliest option per character is the right one
  choice by answer     the answer names the right letters, as the file orders the options;
       over rotations  mean over the orders that rotation gives; in every order: right in all of
                       them (CircularEval, Liu et al. 2023)
  true, false statements   正确 is likelier than 错误, or less likely; statements judged: the answer
                       says so, mean over both kinds
"""

import argparse
import gc
import hashlib
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from build_data import Fact, read_knowledge, rouge_l  # noqa: E402
from generate import (  # noqa: E402
    DATA,
    Decoding,
    Tokenizer,
    answer_file,
    conversation,
    default_template,
    encode_rendered,
    load_base,
    load_template,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_instructions,
    read_records,
    render,
    render_prompt,
)
from lora import load_adapter, remove_adapter  # noqa: E402
from model import (  # noqa: E402
    LLaMA,
    Parser,
    find_base,
    find_tokenizer,
    read_json_file,
    run,
    setting,
    write_atomically,
    write_json,
)

from audit import Facts  # noqa: E402
from exams import (  # noqa: E402
    CHOSEN,
    Coverage,
    ask_choice,
    chance,
    extract_choice,
    is_right,
    read_exams,
    rotations,
    wilson,
)
from report import (  # noqa: E402
    HEADLINES,
    Judged,
    chart,
    compare_page,
    csv_table,
    markdown_table,
    report_page,
    shown,
)

# --------------------------------------------------------------------------------------------------
# Texts against references


def characters(text):
    return [c for c in text if not c.isspace()]


def ngrams(sequence, n):
    return Counter(tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def matches(a, b, n):
    """How many n-grams two sequences share, each as often as it stands in both."""
    return sum((ngrams(a, n) & ngrams(b, n)).values())


def f1(shared, reference, answer):
    """Harmonic mean of recall (of reference) and precision (of answer)."""
    return 2 * shared / (reference + answer) if shared else 0.0


def rouge(reference, answer):
    """(ROUGE-1, ROUGE-2, ROUGE-L) F1 of two texts over characters."""
    r, a = characters(reference), characters(answer)
    by_n = [f1(matches(r, a, n), len(r) - n + 1, len(a) - n + 1) for n in (1, 2)]
    return (*by_n, rouge_l(r, a))


def bleu_counts(reference, answer):
    """What BLEU-4 needs of a pair, to be summed over pairs: matches and n-grams for n = 1 to 4,
    both lengths (10,)."""
    r, a = characters(reference), characters(answer)
    found = [matches(r, a, n) for n in range(1, 5)]
    there = [max(0, len(a) - n + 1) for n in range(1, 5)]
    return np.array([*found, *there, len(a), len(r)], dtype=float)


def bleu(counts):
    """BLEU-4 in [0, 1] of summed counts; the k-th order without a match counts as 1 / 2^k matches
    (Chen & Cherry 2014)."""
    found, there, (answer, reference) = counts[:4], counts[4:8], counts[8:]
    if not found.any() or not there.all():
        return 0.0
    smooth, logs = 1.0, 0.0
    for m, t in zip(found, there):
        smooth = smooth * 2 if m == 0 else smooth
        logs += math.log(m / t if m else 1 / (smooth * t))
    return math.exp(logs / 4 + min(0.0, 1 - reference / answer))


def distinct(text, n):
    """Different n-grams of characters over n-grams; 1 for a text too short to have any."""
    counts = ngrams(characters(text), n)
    return len(counts) / sum(counts.values()) if counts else 1.0


class FactCounts(NamedTuple):
    """Of one answer."""

    recalled: int  # of the record's values
    asked: int
    foreign: int  # values of other entities, among
    mentioned: int  # the values of the asked relations, any entity's


class Marker(Facts):
    """Marks the answers to records whose values are known; what an answer says, and whether the
    knowledge base bears it out, is decided as in tests/audit.py."""

    def count(self, record, answer):
        """The FactCounts of an answer to a record."""
        judged, mentioned = self.mark(record, answer)
        asked = len(judged.right) + len(judged.missing)
        return FactCounts(len(judged.right), asked, len(judged.wrong), mentioned)

    def mark(self, record, answer):
        """(Judged, number of values of the asked relations that it names) of an answer to a
        record."""
        name, kind = record.get("entity") or "", record.get("kind")
        values, relations = record.get("values", []), record.get("relations", [])
        # The entity has what the record says, its facts, and what its name holds.
        asked = [Fact(name, kind, relation, "、".join(values), values) for relation in relations]
        own = [*asked, *self.facts.get(name, ()), Fact(name, kind, "", name, [name])]
        terms = {*chain(*(self.values[kind, fact.relation] for fact in asked))}
        said = {term for _, term in self.said(answer, {name, *terms, *values})}
        wrong = sorted(v for v in said & terms if self.judge(v, own)[0] == "contradicted")
        right = [value for value in values if value in said]
        missing = [value for value in values if value not in said]
        return Judged(right, wrong, missing, sorted(said - {*right, *wrong})), len(said & terms)

    def judge_known(self, record, answer):
        """The Judged of an answer; None to a record whose values are not known."""
        return self.mark(record, answer)[0] if record.get("values") else None


# --------------------------------------------------------------------------------------------------
# Models


@dataclass
class Candidate:
    """A model to evaluate: a base, alone or with an adapter. The base is in memory only while it is
    this model's turn."""

    name: str
    base: Path
    adapter: str  # "": none
    template: dict
    model: LLaMA = None
    tokenizer: Tokenizer = None

    def prompt(self, instruction, input=""):
        """Ids of a question as this model was trained to see it."""
        record = {"instruction": instruction, "input": input}
        return render_prompt(self.tokenizer, self.template, *conversation(record))

    def hashes(self):
        """SHA-256 of each file of weights, settings or tokens: [{file: hash}] of the base, and of
        the adapter."""
        endings = (".safetensors", ".bin", ".pth", ".json", ".model")
        folders = [self.base, *filter(None, [self.adapter])]
        found = []
        for folder in folders:
            names = sorted(p for p in Path(folder).iterdir() if p.suffix in endings)
            found.append({p.name: file_hash(p) for p in names})
        # it may lie one level up
        found[0]["tokenizer.model"] = file_hash(find_tokenizer(self.base))
        return found


def parse_models(specs, template=""):
    """The Candidates of specs, NAME=BASE or NAME=BASE+ADAPTER. template: a name for all ("": each
    adapter's own, else the base's). Raises ValueError for a spec that is none, before
    anything is loaded."""
    candidates = {}
    for spec in specs:
        name, _, folders = spec.partition("=")
        base, _, adapter = folders.partition("+")
        if not re.fullmatch(r"[\w.-]+", name) or not base or name in candidates:
            raise ValueError(f"model {spec!r}: wanted NAME=BASE or NAME=BASE+ADAPTER, names once")
        if adapter and not (Path(adapter) / "adapter_config.json").is_file():
            raise ValueError(f"model {spec!r}: no adapter_config.json in {adapter}")
        folder, made_with = find_base(base), template or own_template(adapter)
        rendered_by = load_template(made_with or default_template(load_tokenizer(folder)))
        candidates[name] = Candidate(name, folder, adapter, rendered_by)
    return list(candidates.values())


def own_template(adapter):
    """The name of the template that an adapter was trained with, if its run.json says so."""
    file = Path(adapter, "run.json")
    made = read_json_file(file).get("config") if adapter and file.is_file() else {}
    return made.get("prompt_template_name") if isinstance(made, dict) else None


def each_model(candidates, device, dtype, base_dtype="auto"):
    """Yield each of candidates with its model in memory. One base is there at a time, and loaded
    once for candidates on it that follow each other: their adapters are switched."""
    base = None
    for candidate in candidates:
        if candidate.base != base:
            model = tokenizer = None
            gc.collect()  # what answered holds the model in a cycle
            model, tokenizer = load_base(candidate.base, device, dtype, base_dtype)
            base = candidate.base
        remove_adapter(model)
        if candidate.adapter:
            load_adapter(model, candidate.adapter)
        candidate.model, candidate.tokenizer = model, tokenizer
        yield candidate
        candidate.model = None


def answer(candidate, questions, decoding, path, batch_size):
    """A model's answers to questions (records): the lines of the file path, which is written, or
    completed after a run that was stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer, template = candidate.model, candidate.tokenizer, candidate.template
    answer_file(model, tokenizer, template, questions, decoding, str(path), batch_size)
    return [row for _, row in read_records(path)]


@torch.inference_mode()
def continuation_logprobs(model, prompt, continuations):
    """log p(continuation | prompt), natural, summed over its tokens, for each list of ids behind
    the ids of one prompt. The prompt runs once; the continuations are one batch, padded on the
    right where causality hides the padding."""
    B, n, width = len(continuations), len(prompt) - 1, max(map(len, continuations))
    cache, prefix = model.new_cache(B, n + width), n * model.config.prefix_lm
    # The prompt but for its last id in the first row, and from there in all.
    if n:
        ids = torch.tensor([prompt[:-1]], device=model.device)
        model.hidden_states(ids, cache.rows(0, [0], prefix=prefix))
        cache.copy_rows([(0, row) for row in range(1, B)], 0, n)
    # That id and the continuations behind it; token i is predicted where token i - 1 stands.
    padded = [prompt[-1:] + c + [0] * (width - len(c)) for c in continuations]
    ids = torch.tensor(padded, device=model.device)  # (B, 1 + T)
    hidden = model.hidden_states(ids[:, :-1], cache.rows(0, [n] * B, prefix=prefix))
    logprobs = model.lm_head(hidden).float().log_softmax(-1)
    logprobs = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T)
    return [row[: len(c)].double().sum().item() for row, c in zip(logprobs, continuations)]


def bits(candidate, record):
    """-log2 p(reference, EOS | prompt) of a record."""
    prompt, answer = render(candidate.template, *conversation(record))
    prompt, _ = encode_rendered(candidate.tokenizer, prompt)
    reference, _ = encode_rendered(candidate.tokenizer, answer, first=False)
    return -continuation_logprobs(candidate.model, prompt, [reference])[0] / math.log(2)


def likelihoods(candidate, prompt, texts):
    """log p(text | prompt) of each text behind the ids of a prompt."""
    encode = candidate.tokenizer.encode_answer
    return continuation_logprobs(candidate.model, prompt, [encode(text) for text in texts])


# --------------------------------------------------------------------------------------------------
# Multiple choice (exams.py has the rest), and statements that are right or wrong


def choose(candidate, question):
    """The option, as a letter, whose text is the likeliest answer per character. (Questions with
    several right answers take as many of the likeliest as there are right ones.)"""
    letters = sorted(question["options"])
    texts = [question["options"][letter] for letter in letters]
    scores = likelihoods(candidate, candidate.prompt(question["question"]), texts)
    order = sorted(range(len(letters)), key=lambda i: -scores[i] / len(texts[i]))
    return "".join(sorted(letters[i] for i in order[: len(question["answer"])]))


def read_pairs(path):
    """[{consistent, inconsistent}, ...] of a file. Raises ValueError naming the line or record."""
    rows = read_records(path)
    for place, row in rows:
        for key in ("consistent", "inconsistent"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise ValueError(f"{path} {place}: {key} is {row.get(key)!r:.80}, wanted a text")
    return [row for _, row in rows]


def ask_statement(statement):
    """The question whether a statement holds."""
    return {"instruction": f"下面的说法正确还是错误？\n{statement}", "input": ""}


def told(text):
    """What an answer says of a statement: True, False, or None. The last word counts: a reason may
    stand before it (归脾汤出自《济生方》，所以这个说法错误)."""
    found = re.findall("不正确|不对|有误|错误|正确|对的", text)
    return found[-1] in ("正确", "对的") if found else None


def believes(candidate, statement):
    """True if 正确 is a likelier answer than 错误 to whether the statement holds."""
    prompt = candidate.prompt(**ask_statement(statement))
    right, wrong = likelihoods(candidate, prompt, ("正确", "错误"))
    return right > wrong


def is_likelier_right(candidate, pair):
    """True if the right statement of a pair is the likelier text, without a question."""
    texts = (pair["consistent"], pair["inconsistent"])
    right, wrong = likelihoods(candidate, [candidate.tokenizer.bos_id], texts)
    return right > wrong


# --------------------------------------------------------------------------------------------------
# Scores and their intervals

REFUSAL = re.compile(
    "抱歉|对不起|答不了|(无法|不能)(回答|提供|判断|告诉)|作为(一个|一名)?(人工智能|AI|语言模型)"
    "|我(并|还|也)?不(知道|了解)|(没有|未)收录|(没有|未见)[^，。]{0,12}(资料|记载)"
    "|(超出|不在)[^，。]{0,8}(我|回答|知识|能力)[^，。]{0,8}范围|I'm sorry|As an AI"
)


class Score:
    """A score of a model over N records: the ratio of the sums of two arrays (N,), the mean without
    the second; BLEU-4 where the first holds `bleu_counts` (N, 10). clusters (N,) has the number of
    each record's entity; chance is what blind choice would reach."""

    def __init__(self, numerators, clusters, denominators=None, chance=None):
        self.numerators, self.clusters = np.asarray(numerators, dtype=float), clusters
        ones = np.ones(len(clusters))
        self.denominators = ones if denominators is None else np.asarray(denominators, dtype=float)
        self.chance = chance

    def value(self, weights=None):
        """The score of records that count weights (N,) times; None where nothing was asked."""
        weights = np.ones(len(self.clusters)) if weights is None else weights
        if self.numerators.ndim == 2:
            return bleu(weights @ self.numerators)
        total = weights @ self.denominators
        return float(weights @ self.numerators / total) if total else None

    def draws(self, resamples, seed):
        """The score of so many resamples of the entities."""
        size = int(self.clusters.max()) + 1
        # How often each entity is drawn; all records of it count as often.
        rng = np.random.default_rng(seed % 2**64)
        drawn = rng.multinomial(size, np.full(size, 1 / size), resamples)
        return [self.value(weights) for weights in drawn[:, self.clusters].astype(float)]

    def interval(self, draws):
        return interval(draws)


class Proportion(Score):
    """A mean of N values of 0 or 1, or of shares. Its interval is Wilson's for as many trials as
    there are entities: records of one resemble each other, and at 0 or 100 % the bootstrap's would
    have no width."""

    def interval(self, draws=None, weights=None):
        weights = np.ones(len(self.clusters)) if weights is None else weights
        trials = len(set(self.clusters[weights > 0]))
        return [round(x, 6) for x in wilson(self.value(weights) * trials, trials)]


def clusters_of(rows):
    """The number (N,) of each row's entity, from 0 on; a row without one has a number of its
    own."""
    entities = [row.get("entity") for row in rows]
    keys = [i if e in (None, "") else str(e) for i, e in enumerate(entities)]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def score_answers(records, answers, bit_counts, knowledge):
    """{name: Score} of a model's answers, rows of `answer`, to records with references; bit_counts
    are `bits`, knowledge the entities of a knowledge base."""
    texts, clusters = [row["answer"] for row in answers], clusters_of(records)
    pairs = [(record["output"], text) for record, text in zip(records, texts)]
    facts = Marker(knowledge)
    counts = [facts.count(record, text) for record, text in zip(records, texts)]
    recalled, asked, foreign, mentioned = np.array(counts).T
    overlap = np.array([rouge(*pair) for pair in pairs])
    ratios = {
        "bits per character": (bit_counts, [len(characters(reference)) for reference, _ in pairs]),
        "facts recalled": (recalled, asked),
        "facts contradicted": (foreign, mentioned),
    }
    means = {
        "BLEU-4": [bleu_counts(*pair) for pair in pairs],
        "ROUGE-1": overlap[:, 0],
        "ROUGE-2": overlap[:, 1],
        "ROUGE-L": overlap[:, 2],
    }
    scores = {name: Score(above, clusters, below) for name, (above, below) in ratios.items()}
    scores |= {name: Score(values, clusters) for name, values in means.items()}
    return scores | score_form(answers, texts, clusters)


def score_form(answers, texts, clusters):
    """{name: Score} of what is seen without a reference."""
    means = {
        "distinct-2": [distinct(text, 2) for text in texts],
        "repetition": [1 - distinct(text, 4) for text in texts],
        "answer length": [len(characters(text)) for text in texts],
    }
    shares = {
        "stopped": [row["finish_reason"] == "stop" for row in answers],
        "empty": [not text.strip() for text in texts],
        "refused": [declines(text) for text in texts],
        "U+FFFD": ["\ufffd" in text for text in texts],
    }
    scores = {name: Score(values, clusters) for name, values in means.items()}
    return scores | {name: Proportion(values, clusters) for name, values in shares.items()}


def declines(text):
    return bool(REFUSAL.search(text))


def score_outside(questions, answers):
    """{name: Score} of a model's answers to questions outside what it was taught."""
    declined = [declines(row["answer"]) for row in answers]
    return {"outside questions declined": Proportion(declined, clusters_of(questions))}


class Choice(NamedTuple):
    """Of one question and one model."""

    letters: list  # chosen in each order of the options; None: no choice
    right: list  # in each order
    likely: bool  # is the likeliest text right?


def choices_of(candidate, questions, orders, answers):
    """The Choice of each question; orders are its `rotations`, answers those to `ask_choice` of
    each, one after the other."""
    choices, answers = [], iter(answers)
    for question, turned in zip(questions, orders):
        letters = [extract_choice(next(answers)["answer"], q["options"]) for q in turned]
        right = [is_right(q, chosen) for q, chosen in zip(turned, letters)]
        choices.append(Choice(letters, right, is_right(question, choose(candidate, question))))
    return choices


def score_choices(questions, choices):
    """{name: Score} of a model's choices."""
    clusters, blind = clusters_of(questions), float(np.mean([chance(q) for q in questions]))
    shares = {
        "choice by likelihood": [choice.likely for choice in choices],
        "choice by answer": [choice.right[0] for choice in choices],
        "choice over rotations": [np.mean(choice.right) for choice in choices],
    }
    others = {
        "choice right in every order": [all(choice.right) for choice in choices],
        "choice not answered": [choice.letters[0] is None for choice in choices],
    }
    scores = {name: Proportion(values, clusters, chance=blind) for name, values in shares.items()}
    return scores | {name: Proportion(values, clusters) for name, values in others.items()}


def score_pairs(candidate, pairs, answers):
    """{name: Score} of a model's judgement of statements, once right and once wrong; answers are
    those to `ask_statement` of each pair's two, one after the other."""
    verdicts = [told(row["answer"]) for row in answers]
    both = [(a is True) + (b is False) for a, b in zip(verdicts[::2], verdicts[1::2])]
    shares = {
        "true statements": [believes(candidate, pair["consistent"]) for pair in pairs],
        "false statements": [not believes(candidate, pair["inconsistent"]) for pair in pairs],
        "statements judged": np.array(both) / 2,  # 50 % for one who always says the same
        "right one of a pair": [is_likelier_right(candidate, pair) for pair in pairs],
    }
    clusters = clusters_of(pairs)
    return {name: Proportion(values, clusters, chance=0.5) for name, values in shares.items()}


def interval(draws):
    """The central 95 % of bootstrap draws, None left out."""
    draws = [d for d in draws if d is not None]
    return [round(float(x), 6) for x in np.percentile(draws, [2.5, 97.5])] if draws else None


def summarise(scored, resamples, seed):
    """{score: {model: {value, interval, records, resampled, difference, difference_interval}}} of
    {model: {score: Score}}: of `resampled` entities with their records; differences are to the
    first model."""
    first, table = next(iter(scored)), {}
    for name in scored[first]:
        cells, base_draws = {}, scored[first][name].draws(resamples, seed)
        for model, scores in scored.items():
            score = scores[name]
            draws = base_draws if model == first else score.draws(resamples, seed)
            if (value := score.value()) is None:
                continue
            cell = {"value": round(value, 6), "interval": score.interval(draws)}
            cell |= {} if score.chance is None else {"chance": round(score.chance, 6)}
            cell |= {"records": len(score.clusters), "resampled": int(score.clusters.max()) + 1}
            if model != first and first in cells:
                pairs = [pair for pair in zip(base_draws, draws) if None not in pair]
                cell["difference"] = round(value - cells[first]["value"], 6)
                cell["difference_interval"] = interval([b - a for a, b in pairs])
            cells[model] = cell
        if cells:
            table[name] = cells
    return table


# --------------------------------------------------------------------------------------------------
# The report


def write_text(path, text):
    write_atomically(path, lambda p: p.write_bytes(text.encode()))


@dataclass
class Data:
    """What the models are scored on."""

    records: list
    questions: list
    pairs: list
    outside: list
    knowledge: list
    files: list  # [(name, SHA-256), ...]: two may share a name

    def describe(self):
        """How many entities are drawn with how many records, of each kind."""
        kinds = {
            "held-out questions": self.records,
            "multiple-choice questions": self.questions,
            "pairs of statements": self.pairs,
            "outside questions": self.outside,
        }
        return ", ".join(
            f"{clusters_of(rows).max() + 1} with {len(rows)} {kind}"
            for kind, rows in kinds.items()
            if rows
        )


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_outside(path):
    """Questions that are to be declined, of records {question} or as generate.py reads them."""
    rows = [row for _, row in read_records(path)]
    if all(isinstance(row.get("question"), str) for row in rows):
        return [{"instruction": row["question"], "input": ""} for row in rows]
    return read_instructions(path)


def read_data(options, choices):
    """The Data that the options name; choices: files of multiple-choice questions."""
    records, outside = options.data_path, options.outside
    files = [records, *choices, options.knowledge, options.statements, outside]
    return Data(
        records=read_instructions(records, answers=True) if records else [],
        questions=read_exams(choices),
        pairs=read_pairs(options.statements) if options.statements else [],
        outside=read_outside(outside) if outside else [],
        knowledge=read_knowledge(options.knowledge),
        files=[(Path(path).name, file_hash(path)) for path in files if path],
    )


@dataclass
class Results:
    """Of each model, by its name."""

    scores: dict  # {score: Score}
    answers: dict  # texts, one for each record
    choices: dict  # a Choice for each question


def score_models(models, data, options, folder):
    """The Results of `each_model`; the answers go into folder."""

    def ask(candidate, questions, kind):
        path = folder / f"{kind}-{candidate.name}.jsonl"
        return answer(candidate, questions, options.decoding, path, options.batch_size)

    results = Results({}, {}, {})
    orders = [rotations(question, options.rotations) for question in data.questions]
    in_turn = [ask_choice(question) for turned in orders for question in turned]
    kinds = ("consistent", "inconsistent")
    statements = [ask_statement(pair[kind]) for pair in data.pairs for kind in kinds]
    for candidate in models:
        name = candidate.name
        scores = results.scores[name] = {}
        if data.records:
            answers = ask(candidate, data.records, "answers")
            results.answers[name] = [row["answer"] for row in answers]
            counts = [bits(candidate, record) for record in data.records]
            scores |= score_answers(data.records, answers, counts, data.knowledge)
        if data.questions:
            answers = ask(candidate, in_turn, "choices")
            choices = choices_of(candidate, data.questions, orders, answers)
            results.choices[name] = choices
            scores |= score_choices(data.questions, choices)
        if data.pairs:
            answers = ask(candidate, statements, "statements")
            scores |= score_pairs(candidate, data.pairs, answers)
        if data.outside:
            answers = ask(candidate, data.outside, "outside")
            scores |= score_outside(data.outside, answers)
    return results


EXAM_SCORES = (
    "choice by likelihood",
    "choice by answer",
    "choice over rotations",
    "choice right in every order",
    "choice not answered",
)


def question_groups(questions, knowledge):
    """{name: which questions (N,)}: all, those whose right option the knowledge base holds and the
    rest, and each subject if there are several. Empty ones are left out."""
    coverage = Coverage(knowledge)
    held = np.array([coverage.holds(question) for question in questions])
    groups = {"all": held | True, "right option in the knowledge base": held, "not in it": ~held}
    subjects = [question["subject"] for question in questions]
    if len(set(subjects)) > 1:
        for subject in dict.fromkeys(subjects):
            groups[subject] = np.array([subject == other for other in subjects])
    return {name: own for name, own in groups.items() if own.any()}


def break_down(scores, groups):
    """[{group, questions, model, score: {value, interval}, ...}, ...] of {model: {score:
    Proportion}}, a row for each group and model."""
    rows = []
    for group, own in groups.items():
        for model in scores:
            row = {"group": group, "questions": int(own.sum()), "model": model}
            for name in EXAM_SCORES:
                score = scores[model][name]
                value, ends = score.value(own.astype(float)), score.interval(weights=own)
                row[name] = {"value": round(value, 6), "interval": ends}
            rows.append(row)
    return rows


def exam_table(rows):
    """The rows of `break_down` as texts, below their head."""
    head = ["group", "questions", "model", *EXAM_SCORES]
    cells = [[*list(row.values())[:3], *(shown(row[n], n) for n in EXAM_SCORES)] for row in rows]
    return [head, *cells] if rows else []


def spread(rows, at_most=400):
    """At most so many rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // at_most))]


def side_by_side(results, data):
    """{title: rows for `answers_table`}: answers to records, judged by their values, and letters
    chosen in exams."""
    facts, sides, rows = Marker(data.knowledge), {}, []
    for record, *said in zip(data.records, *results.answers.values()):
        judged = [facts.judge_known(record, text) for text in said]
        rows.append((record["instruction"], record["output"], said, judged))
    sides["Answers side by side"] = spread(rows)
    rows = []
    for question, *choices in zip(data.questions, *results.choices.values()):
        said = [choice.letters[0] or "无选择 none" for choice in choices]
        judged = []
        for text, choice in zip(said, choices):
            found = ([text], []) if choice.right[0] else ([], [text])
            judged.append(Judged(*found, missing=[]))
        rows.append((ask_choice(question)["instruction"], question["answer"], said, judged))
    sides["Letters chosen"] = spread(rows)
    return {title: rows for title, rows in sides.items() if rows}


def write_report(results, data, info, folder):
    """Write scores.json, exams.json, run.json, scores.svg and report.html, and print the tables."""
    scores = results.scores
    models, table = list(scores), summarise(scores, info["resamples"], info["seed"])
    groups = question_groups(data.questions, data.knowledge) if data.questions else {}
    exams = break_down(scores, groups)
    write_json(folder / "scores.json", table)
    write_json(folder / "exams.json", exams)
    write_json(folder / "run.json", info)
    sides = side_by_side(results, data)
    write_text(folder / "report.html", report_page(table, models, exam_table(exams), sides, info))
    title = "before and after tuning" if len(models) == 2 else "models side by side"
    write_text(folder / "scores.svg", chart(table, models, HEADLINES, title))
    rows = [[name, *(shown(cells.get(m), name) for m in models)] for name, cells in table.items()]
    print(markdown_table(["score", *models], rows))
    if exams:
        head, *rows = exam_table(exams)
        print(markdown_table(head, [list(map(str, row)) for row in rows]))
    print(f"95 % intervals: {info['interval']}")


# --------------------------------------------------------------------------------------------------
# The table of answers


def compare(models, questions, options, folder):
    """Ask questions (records) of `each_model`, and write the table of answers into folder: beside
    them the references, where there are any, and what a knowledge base says is wrong or missing,
    where the questions say which values they ask for."""
    answers = {}
    for candidate in models:
        path = folder / f"answers-{candidate.name}.jsonl"
        rows = answer(candidate, questions, options.decoding, path, options.batch_size)
        answers[candidate.name] = [row["answer"] for row in rows]
    asked = ["\n".join(filter(None, (q["instruction"], q["input"]))) for q in questions]
    references = [q.get("output") or "" for q in questions]
    known = any(q.get("values") for q in questions)
    facts = Marker(read_knowledge(options.knowledge) if known else [])
    columns = {"问题": asked} | ({"参考": references} if any(references) else {}) | answers
    head, rows = list(columns), list(zip(*columns.values()))
    write_text(folder / "compare.md", markdown_table(head, rows))
    write_text(folder / "compare.csv", csv_table(head, rows))
    rows = []
    for question, reference, record, *said in zip(asked, references, questions, *answers.values()):
        judged = [facts.judge_known(record, text) for text in said]
        rows.append((question, reference, said, judged))
    write_text(folder / "compare.html", compare_page(list(answers), rows))


# --------------------------------------------------------------------------------------------------
# Command


@dataclass(frozen=True)
class Options(Decoding):
    """The options of the command line, decoding's among them."""

    max_new_tokens: int = 128  # tokens of an answer at most; with --instruct_dir 256
    seed: int = setting(0, -(2**63), 2**63 - 1)  # of the resamples, and of answers that are sampled
    instruct_dir: str = ""  # a file of questions for the table; - is stdin
    data_path: str = str(DATA / "heldout.jsonl")  # records with references (empty: none)
    # pairs of a right and a wrong statement (empty: none)
    statements: str = str(DATA / "calla.jsonl")
    outside: str = ""  # questions that a model should decline (empty: none)
    # knowledge base: what is contradicted, and which exam questions are covered
    knowledge: str = str(DATA / "knowledge.jsonl")
    rotations: int = setting(8, 1, 8)  # orders of a question's options, at most (1: the file's own)
    prompt_template: str = ""  # name or path (empty: each adapter's own, else the base's)
    batch_size: int = 16  # answers decoded together
    resamples: int = setting(1000, 40)  # of the bootstrap; 2.5 % of fewer than 40 is none
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: str = "auto"  # of the activations: auto, bf16, fp16, fp32
    base_dtype: str = "auto"  # of the bases as stored: as --dtype, or int8, nf4
    load_8bit: bool = False  # the same as --base_dtype int8

    @property
    def decoding(self):
        """The Decoding of each answer. Greedy ones have no seed: another one for the resamples
        leaves them as they are."""
        given = {f.name: getattr(self, f.name) for f in fields(Decoding)}
        return Decoding(**given | {"n": 1, "seed": self.seed if self.temperature else None})


def parse_options():
    """(Candidates, files of multiple-choice questions, folder, Options) of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    text = "NAME=BASE or NAME=BASE+ADAPTER; the first is compared with"
    parser.add_argument("models", nargs="+", help=text)
    parser.add_argument("--output_dir", required=True, help="folder of the report or the table")
    text = "multiple-choice files (CMB, CMExam, C-Eval, MTCMB, ... see tests/exams.py)"
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--choices", nargs="*", default=argparse.SUPPRESS, help=text)
    text = "such files alone, without records, statements and questions outside"
    either.add_argument("--exams", nargs="+", default=argparse.SUPPRESS, help=text)
    text = "the same as --batch_size"
    parser.add_argument("--rows", type=int, dest="batch_size", default=argparse.SUPPRESS, help=text)
    parser.add_settings(Options)
    given = vars(parser.parse_args())
    of_report = {"choices", "exams", "data_path", "statements", "outside", "rotations", "resamples"}
    unused = given.keys() & of_report
    if given.get("instruct_dir") and unused:
        raise ValueError(f"--instruct_dir makes a table without scores; leave out --{min(unused)}")
    if exams := given.pop("exams", None):
        given = {"data_path": "", "statements": "", "choices": exams} | given
    if given.get("instruct_dir"):
        given.setdefault("max_new_tokens", Decoding.max_new_tokens)
    specs, folder = given.pop("models"), Path(given.pop("output_dir"))
    choices = given.pop("choices", [str(DATA / "choice.jsonl")])
    options = Options(**given)
    if options.n > 1:
        raise ValueError(f"n is {options.n}, wanted 1: each model is asked once")
    return parse_models(specs, options.prompt_template), choices, folder, options


def describe_run(candidates, data, options, dtype, base_dtype):
    """What is needed to make a report again, as run.json has it."""
    return {
        "models": {c.name: {"weights": c.hashes(), "template": c.template} for c in candidates},
        "data": data.files,
        "decoding": asdict(options.decoding),
        "resamples": options.resamples,
        "seed": options.seed,
        "interval": f"Wilson's of a proportion, else {options.resamples} resamples of whole "
        f"entities: {data.describe()}",
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
        "dtype": str(dtype),
        "base_dtype": base_dtype,
        "choice rule": CHOSEN.pattern,
        "refusal rule": REFUSAL.pattern,
    }


def main():
    candidates, choices, folder, options = parse_options()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    base_dtype = "int8" if options.load_8bit else options.base_dtype
    models = each_model(candidates, device, dtype, base_dtype)  # loads when it is asked for one
    if options.instruct_dir:
        compare(models, read_instructions(options.instruct_dir), options, folder)
        print(f"{folder}: compare.md, compare.csv, compare.html, answers of each model")
    else:
        data = read_data(options, choices)
        info = describe_run(candidates, data, options, dtype, base_dtype)
        write_report(score_models(models, data, options, folder), data, info, folder)
        print(f"{folder}: report.html, scores.json, exams.json, scores.svg, run.json, all answers")


if __name__ == "__main__":
    run(main)
