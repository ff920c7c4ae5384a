"""What did tuning change? Scores with intervals and a report, or a table of answers side by side.

  python tests/evaluate.py base=data/tiny tuned=data/tiny+lora-tcm --output_dir report
  python tests/evaluate.py base=data/tiny tuned=data/tiny+lora-tcm --output_dir table \
      --instruct_dir questions.json

A model is NAME=BASE or NAME=BASE+ADAPTER; the first one is what the others are compared with. The
models may stand on one base or on several. Either folder gets answers-NAME.jsonl, records that
tests/judge.py reads. The same inputs give the same bytes, so that a report can be checked by
running it again; a run that was interrupted goes on.

The report scores answers to records that hold a reference: choices-NAME.jsonl, scores.json,
scores.svg, report.html and run.json (hashes of weights, data and templates, decoding, versions).
The table (模型效果对比) asks any questions in a form that generate.py reads: compare.md,
compare.csv and compare.html, where what the first model's answer does not have is marked.

Characters are those of the text without white space. Each score is a mean over records, or a ratio
or BLEU of sums over records; its 95 % interval is the percentile bootstrap (Efron & Tibshirani
1993). What is drawn are whole entities with all their records (Davison & Hinkley 1997, section
3.8), since records of one entity resemble each other; a record without `entity` is drawn alone. All
models have the same resamples, so that the difference of two is a paired one.

  bits per character   -log2 p(reference and EOS | prompt) / characters of the reference:
                       comparable across tokenizers
  facts recalled       share of a record's values (those of the knowledge base) that the answer
                       names by themselves, not inside the entity's name or a longer value of the
                       same relation
  facts contradicted   of the values of the asked relations that the answer names, the share that
                       is another entity's
  ROUGE-1/2/L          F1 over characters (Lin 2004)
  BLEU-4               over characters, corpus level (Papineni et al. 2002), exponential smoothing
  distinct-2           different character bigrams / bigrams of an answer (Li et al. 2016)
  repetition           1 - different 4-grams / 4-grams of an answer (seq-rep-4, Welleck et al. 2020)
  stopped, empty, refused, U+FFFD   share of the answers that end by EOS, have no text, decline,
                       show half a character
"""

import argparse
import csv
import difflib
import gc
import hashlib
import html
import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from build_data import read_knowledge, rouge_l  # noqa: E402
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
from train import terms_in  # noqa: E402

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


class Facts:
    """A knowledge base as sets: of_entity {entity: its values}, of_relation {(kind, relation): the
    values of every entity}."""

    def __init__(self, entities):
        self.of_entity, self.of_relation = {}, {}
        for entity in entities:
            own = self.of_entity.setdefault(entity["中心词"], set())
            for relation, values in entity.items():
                if isinstance(values, list):
                    own.update(values)
                    key = entity["类型"], relation
                    self.of_relation.setdefault(key, set()).update(values)

    def count(self, record, answer):
        """The FactCounts of an answer to a record."""
        values, entity = record.get("values", []), record.get("entity") or ""
        own = {entity, *values}
        keys = [(record.get("kind"), relation) for relation in record.get("relations", [])]
        terms = set().union(*(self.of_relation.get(key, set()) for key in keys))
        said = terms_in(answer, terms | own)
        known = own | self.of_entity.get(entity, set())
        foreign = [v for v in said & terms if all(v not in k for k in known)]
        recalled = [v for v in values if v in said]
        return FactCounts(len(recalled), len(values), len(foreign), len(said & terms))


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
    B, n, width = len(continuations), len(prompt), max(map(len, continuations))
    cache = model.new_cache(B, n + width - 1)
    # The prompt in the first row, and from there in all.
    ids = torch.tensor([prompt], device=model.device)
    last = model.hidden_states(ids, cache.rows(0, [0]))[:, -1:]  # (1, 1, C)
    cache.copy_rows([0] * (B - 1), range(1, B), 0, n)
    # The continuations behind it; token i is predicted where token i - 1 stands.
    padded = [c + [0] * (width - len(c)) for c in continuations]
    ids = torch.tensor(padded, device=model.device)  # (B, T)
    hidden = last.expand(B, -1, -1)
    if width > 1:
        others = model.hidden_states(ids[:, :-1], cache.rows(0, [n] * B))
        hidden = torch.cat((hidden, others), dim=1)  # (B, T, C)
    logprobs = model.lm_head(hidden).float().log_softmax(-1)
    logprobs = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (B, T)
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
# Multiple choice, and statements that are right or wrong

LETTER = re.compile(
    r"[\W本题的正确答案故应该选择项是为]*"
    r"([A-H](?:[\s、,，和与及]*[A-H])*+)项?(?:是?正确的?)?"  # *+: of A、B或C, not A
    r"(?= *(?:$|[\n.．、:：,，。;；!！)）\]】\"”」*]))"
    r"(?!\W*(?:或|还是|[A-H]\b|[a-z]))"
)


def read_choices(path):
    """Multiple-choice questions, [{question, options {letter: text}, answer letters, subject,
    entity}], of ours, CMB (JSON with option), CMExam (CSV with Question, Options, Answer) or
    TCMBench (JSON with example). Raises ValueError naming the file and the question that is
    none."""
    questions = []
    for number, row in enumerate(read_choice_rows(Path(path)), 1):
        try:
            questions.append(make_choice(row))
        except ValueError as error:
            raise ValueError(f"{path} question {number}: {error}") from None
    return questions


def read_choice_rows(path):
    """What stands for a question each in a file of any of the forms."""
    if path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); wanted CSV in UTF-8 with Question, Options, "
                "Answer"
            ) from None
    try:
        rows = read_json_file(path)["example"]
    except (OSError, ValueError, KeyError):
        return [row for _, row in read_records(path)]
    return rows if isinstance(rows, list) else [rows]


def make_choice(row):
    """The question {question, options, answer, subject, entity} of a row in any of the forms.
    Raises ValueError for a row that is none."""
    pairs = row.items() if isinstance(row, dict) else ()
    row = {key.lower(): value for key, value in pairs if isinstance(key, str)}
    question, options = read_options(row.get("question"), row.get("options", row.get("option")))
    correct = row.get("answer")
    if isinstance(correct, list):
        correct = "".join(map(str, correct))
    fits = isinstance(question, str) and isinstance(correct, str) and correct and len(options) > 1
    fits = fits and all(isinstance(text, str) for text in options.values())
    if not fits or not set(correct) <= set(options):
        raise ValueError(
            "wanted a question, two options or more, all texts, and an answer among their "
            f"letters, got {options!r:.80} and {correct!r}"
        )
    keys = ("subject", "exam_subject", "knowledge_point", "exam_class")
    subject = next((str(row[key]) for key in keys if row.get(key)), "all")
    letters = "".join(sorted(correct))
    return {
        "question": question.strip(),
        "options": options,
        "answer": letters,
        "subject": subject,
        "entity": row.get("entity"),
    }


def read_options(question, options):
    """(question, {letter: text}) of both as a file has them, in any of the forms."""
    if options is None and isinstance(question, str):
        # TCMBench: the options end the question
        question, *lines = re.split(r"\n(?=[A-H][．.、])", question)
        options = "\n".join(lines)
    if isinstance(options, str):
        options = dict(re.findall(r"^([A-H])[．.、:：\s]+(.+?)\s*$", options, re.M))
    elif isinstance(options, list):  # [{"key": "A", "value": text}]
        pairs = [(o.get("key"), o.get("value")) for o in options if isinstance(o, dict)]
        options = {key: value for key, value in pairs if isinstance(key, str)}
    if not isinstance(options, dict):
        return question, {}
    return question, {letter: text for letter, text in options.items() if text}


def choose(candidate, question):
    """The option, as a letter, whose text is the likeliest answer per character. (Questions with
    several right answers take as many of the likeliest as there are right ones.)"""
    letters = sorted(question["options"])
    texts = [question["options"][letter] for letter in letters]
    scores = likelihoods(candidate, candidate.prompt(question["question"]), texts)
    order = sorted(range(len(letters)), key=lambda i: -scores[i] / len(texts[i]))
    return "".join(sorted(letters[i] for i in order[: len(question["answer"])]))


def ask_choice(question):
    """The question with its options, as it is put to a model."""
    options = "\n".join(f"{letter}. {text}" for letter, text in sorted(question["options"].items()))
    return {"instruction": f"{question['question']}\n{options}", "input": ""}


def extract_choice(text, options):
    """The letters that an answer chooses, or None. Strict: letters at its start (答案是 and the
    like may stand before them, punctuation must follow: B超 is no B), several if it lists them
    (A、C), else the one option whose text it names; an answer that wavers (A或B), names two texts
    or none chooses nothing."""
    match = LETTER.match(text)
    letters = set(re.findall("[A-H]", match[1])) if match else set()
    # an answer that is an option's whole text is that option: CEA may be one
    if letters and letters <= set(options) and text.strip() not in options.values():
        return "".join(sorted(letters))
    found = terms_in(text, options.values())
    letters = [letter for letter, option in options.items() if option in found]
    return letters[0] if len(letters) == 1 else None


def read_pairs(path):
    """[{consistent, inconsistent}, ...] of a file. Raises ValueError naming the line or record."""
    rows = read_records(path)
    for place, row in rows:
        for key in ("consistent", "inconsistent"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise ValueError(f"{path} {place}: {key} is {row.get(key)!r:.80}, wanted a text")
    return [row for _, row in rows]


def believes(candidate, statement):
    """True if 正确 is a likelier answer than 错误 to whether the statement holds."""
    prompt = candidate.prompt(f"下面的说法正确还是错误？\n{statement}")
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
    "抱歉|对不起|无法(回答|提供)|不能(回答|提供)|作为(一个|一名)?(人工智能|AI|语言模型)"
    "|I'm sorry|As an AI"
)
FAMILIES = {  # scores of one scale share a chart
    "facts": ["facts recalled", "facts contradicted"],
    "overlap with the reference": ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU-4"],
    "form": ["stopped", "repetition", "distinct-2", "empty", "refused", "U+FFFD"],
    "choices": [
        "choice by likelihood",
        "choice by answer",
        "choice not answered",
        "true statements",
        "false statements",
        "right one of a pair",
    ],
}
PLAIN = ("bits per character", "answer length")  # the other scores are shares of 1


class Score:
    """A score of a model over N records: the ratio of the sums of two arrays (N,), the mean without
    the second; BLEU-4 where the first holds `bleu_counts` (N, 10). clusters (N,) has the number of
    each record's entity."""

    def __init__(self, numerators, clusters, denominators=None):
        self.numerators, self.clusters = np.asarray(numerators, dtype=float), clusters
        ones = np.ones(len(clusters))
        self.denominators = ones if denominators is None else np.asarray(denominators, dtype=float)

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
    facts = Facts(knowledge)
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
        **describe_form(answers, texts),
    }
    scores = {name: Score(above, clusters, below) for name, (above, below) in ratios.items()}
    return scores | {name: Score(values, clusters) for name, values in means.items()}


def describe_form(answers, texts):
    """{score: its value of each answer} of what is seen without a reference."""
    return {
        "distinct-2": [distinct(text, 2) for text in texts],
        "repetition": [1 - distinct(text, 4) for text in texts],
        "stopped": [row["finish_reason"] == "stop" for row in answers],
        "empty": [not text.strip() for text in texts],
        "refused": [bool(REFUSAL.search(text)) for text in texts],
        "U+FFFD": ["\ufffd" in text for text in texts],
        "answer length": [len(characters(text)) for text in texts],
    }


def score_choices(candidate, questions, answers):
    """{name: Score} of a model's choices; answers are those to `ask_choice`."""
    likely = [choose(candidate, q) == q["answer"] for q in questions]
    given = [extract_choice(row["answer"], q["options"]) for q, row in zip(questions, answers)]
    shares = {
        "choice by likelihood": likely,
        "choice by answer": [letters == q["answer"] for letters, q in zip(given, questions)],
        "choice not answered": [letters is None for letters in given],
    }
    clusters = clusters_of(questions)
    return {name: Score(values, clusters) for name, values in shares.items()}


def score_pairs(candidate, pairs):
    """{name: Score} of a model's judgement of statements, once right and once wrong."""
    shares = {
        "true statements": [believes(candidate, pair["consistent"]) for pair in pairs],
        "false statements": [not believes(candidate, pair["inconsistent"]) for pair in pairs],
        "right one of a pair": [is_likelier_right(candidate, pair) for pair in pairs],
    }
    clusters = clusters_of(pairs)
    return {name: Score(values, clusters) for name, values in shares.items()}


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
            cell = {"value": round(value, 6), "interval": interval(draws)}
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


def shown(cell, name):
    """A cell of the table as text: value [interval], difference in brackets."""
    if cell is None:
        return ""
    plain = name in PLAIN
    form = "{:.2f}".format if plain else lambda x: f"{100 * x:.1f} %"
    text = f"{form(cell['value'])} [{', '.join(map(form, cell['interval']))}]"
    if not cell.get("difference_interval"):
        return text
    low, high = cell["difference_interval"]
    difference = f"{cell['difference']:+.2f}" if plain else f"{100 * cell['difference']:+.1f}"
    return f"{text} ({difference}{'' if low <= 0 <= high else ' *'})"


COLOURS = ["#8a94a6", "#c0392b", "#2c6fbb", "#3d8b56", "#b07d2b"]


def bar(y, cell, label, colour):
    """SVG at height y: a cell's value as a bar, its interval as a line, both as text."""
    value, low, high = (200 + 420 * x for x in (cell["value"], *cell["interval"]))
    width, text = max(1, value - 200), f"{100 * cell['value']:.1f} % {html.escape(label)}"
    ends = f"M{low:.1f} {y + 3}v8M{high:.1f} {y + 3}v8"
    return (
        f'<rect x="200" y="{y}" width="{width:.1f}" height="14" fill="{colour}"/>'
        f'<path d="M{low:.1f} {y + 7}H{high:.1f}{ends}" stroke="#222"/>'
        f'<text x="{max(value, high) + 6:.1f}" y="{y + 12}">{text}</text>'
    )


def chart(table, models, names, title):
    """An SVG of horizontal bars, one a model for each of the names; values are shares of 1."""
    y, parts = 34, []
    for name in [n for n in names if n in table]:
        parts.append(f'<text x="8" y="{y + 13}" font-weight="600">{html.escape(name)}</text>')
        for i, model in enumerate(models):
            if model in table[name]:
                parts.append(bar(y, table[name][model], model, COLOURS[i % len(COLOURS)]))
                y += 18
        y += 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {y + 4}" '
        f'font-family="sans-serif" font-size="12"><rect width="760" height="{y + 4}" '
        f'fill="#fff"/><text x="8" y="20" font-size="15">{html.escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )


def html_row(cells, tag="td"):
    cells = [f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells]
    return f"<tr>{''.join(cells)}</tr>"


def report(table, subjects, models, examples, info):
    """The page: charts, the table, accuracy by subject, examples side by side, and what is needed
    to make it again."""
    families = [(title, names) for title, names in FAMILIES.items() if {*names} & {*table}]
    charts = [chart(table, models, names, title) for title, names in families]
    scores = [html_row(["score", *models], "th")]
    for name, cells in table.items():
        scores.append(html_row([name, *(shown(cells.get(model), name) for model in models)]))
    by_subjects = [html_row(["subject", "questions", *models], "th")]
    for subject, count, shares in subjects:
        by_subjects.append(html_row([subject, count, *(f"{100 * x:.1f} %" for x in shares)]))
    side_by_side = [html_row(["question", "reference", *models], "th")]
    for record, texts in examples:
        side_by_side.append(html_row([record["instruction"], record["output"], *texts]))
    return f"""<!doctype html>
<html lang="zh"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(" / ".join(models))}</title>
<style>
body {{ font: 15px/1.6 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
  color: #222 }}
svg {{ max-width: 760px; display: block; margin: 1em 0; border: 1px solid #ddd }}
table {{ border-collapse: collapse; width: 100%; margin: 1em 0 }}
td, th {{ border: 1px solid #ddd; padding: .4em .6em; text-align: left; vertical-align: top }}
th {{ background: #f4f4f4 }}
pre {{ background: #f4f4f4; padding: 1em; overflow: auto }}
</style>
<h1>模型效果对比 Model comparison</h1>
<p>{html.escape(models[0])} is what the others are compared with. Square brackets: 95 % bootstrap
interval, {info["interval"]}; round ones: paired difference, * where its interval leaves out 0.
No medical advice. 本页内容由模型生成，不构成医疗建议。</p>
{"".join(charts)}
<table>{"".join(scores)}</table>
<h2>Choices by subject, by likelihood</h2><table>{"".join(by_subjects)}</table>
<h2>Answers side by side</h2><table>{"".join(side_by_side)}</table>
<h2>How to make it again</h2>
<pre>{html.escape(json.dumps(info, ensure_ascii=False, indent=1))}</pre></html>
"""


def write_text(path, text):
    write_atomically(path, lambda p: p.write_bytes(text.encode()))


@dataclass
class Data:
    """What the models are scored on."""

    records: list
    questions: list
    pairs: list
    knowledge: list
    files: list  # [(name, SHA-256), ...]: two may share a name

    def describe(self):
        """How many entities are drawn with how many records, of each kind."""
        kinds = {
            "held-out questions": self.records,
            "multiple-choice questions": self.questions,
            "pairs of statements": self.pairs,
        }
        return ", ".join(
            f"{clusters_of(rows).max() + 1} with {len(rows)} {kind}"
            for kind, rows in kinds.items()
            if rows
        )


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_data(options, choices):
    """The Data that the options name; choices: files of multiple-choice questions."""
    files = [options.data_path, *choices, options.knowledge, options.statements]
    return Data(
        records=read_instructions(options.data_path, answers=True),
        questions=[question for path in choices for question in read_choices(path)],
        pairs=read_pairs(options.statements) if options.statements else [],
        knowledge=read_knowledge(options.knowledge),
        files=[(Path(path).name, file_hash(path)) for path in files if path],
    )


def score_models(models, data, decoding, folder, batch_size):
    """({model: {score: Score}}, {model: its answers to the records}) of `each_model`; the answers
    go into folder."""
    scored, texts = {}, {}
    for candidate in models:
        name = candidate.name
        path = folder / f"answers-{name}.jsonl"
        answers = answer(candidate, data.records, decoding, path, batch_size)
        texts[name] = [row["answer"] for row in answers]
        counts = [bits(candidate, record) for record in data.records]
        scored[name] = score_answers(data.records, answers, counts, data.knowledge)
        if data.questions:
            asked = [ask_choice(question) for question in data.questions]
            path = folder / f"choices-{name}.jsonl"
            answers = answer(candidate, asked, decoding, path, batch_size)
            scored[name] |= score_choices(candidate, data.questions, answers)
        if data.pairs:
            scored[name] |= score_pairs(candidate, data.pairs)
    return scored, texts


def by_subject(scored, questions):
    """[(subject, number of questions, [share right of each model]), ...] by likelihood."""
    rows = []
    for subject in dict.fromkeys(question["subject"] for question in questions):
        own = np.array([float(question["subject"] == subject) for question in questions])
        shares = [scores["choice by likelihood"].value(own) for scores in scored.values()]
        rows.append((subject, int(own.sum()), shares))
    return rows


def write_report(scored, texts, data, info, folder):
    """Write scores.json, run.json, scores.svg and report.html, and print the table."""
    models, table = list(scored), summarise(scored, info["resamples"], info["seed"])
    write_json(folder / "scores.json", table)
    write_json(folder / "run.json", info)
    # Some thirty examples, evenly spread.
    answers = zip(*texts.values())
    examples = list(zip(data.records, answers))[:: max(1, len(data.records) // 30)]
    subjects = by_subject(scored, data.questions)
    write_text(folder / "report.html", report(table, subjects, models, examples, info))
    names = [name for family in FAMILIES.values() for name in family]
    names = [name for name in names if name not in ("empty", "refused", "U+FFFD")]
    title = f"{len(data.records)} held-out questions, {len(data.questions)} multiple choice"
    write_text(folder / "scores.svg", chart(table, models, names, title))
    print(f"| score | {' | '.join(models)} |\n|---|{'---|' * len(models)}")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(shown(cells.get(model), name) for model in models)} |")
    print(f"95 % intervals: {info['interval']}")


# --------------------------------------------------------------------------------------------------
# The table of answers


def marked(first, text):
    """text as HTML, what first does not have marked."""
    # Answers that loop have more pairs of equal characters than can be tried.
    loops = sum(map(first.count, text)) > 50000
    matcher = difflib.SequenceMatcher(None, first, text, autojunk=loops)
    parts = []
    for tag, _, _, start, stop in matcher.get_opcodes():
        part = html.escape(text[start:stop])
        parts.append(part if tag == "equal" or not part else f"<mark>{part}</mark>")
    return "".join(parts)


def markdown_table(head, rows):
    def line(cells):
        return f"| {' | '.join(cells)} |\n"

    def cell(text):
        text = re.sub(r"([|\\])", r"\\\1", html.escape(text, quote=False))
        return "<br>".join(text.splitlines())

    ruler = f"|{'---|' * len(head)}\n"
    return line(map(cell, head)) + ruler + "".join(line(map(cell, row)) for row in rows)


def csv_table(head, rows):
    """As spreadsheets read it: in UTF-8 with a BOM."""
    sheet = io.StringIO(newline="")
    csv.writer(sheet).writerows([head, *rows])
    return "\ufeff" + sheet.getvalue()


def html_table(head, rows):
    """The page data/compare.html, filled."""
    lines = [html_row(head, "th")]
    for question, *answers in rows:
        cells = [html.escape(question), *(marked(answers[0], text) for text in answers)]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    page = (DATA / "compare.html").read_text(encoding="utf-8")
    return page.replace("{rows}", "".join(f"{line}\n" for line in lines))


def compare(models, questions, decoding, folder, batch_size):
    """Ask questions (records) of `each_model`, and write the table of answers into folder."""
    answers = {}
    for candidate in models:
        path = folder / f"answers-{candidate.name}.jsonl"
        rows = answer(candidate, questions, decoding, path, batch_size)
        answers[candidate.name] = [row["answer"] for row in rows]
    asked = ["\n".join(filter(None, (q["instruction"], q["input"]))) for q in questions]
    head, rows = ["问题", *answers], list(zip(asked, *answers.values()))
    write_text(folder / "compare.md", markdown_table(head, rows))
    write_text(folder / "compare.csv", csv_table(head, rows))
    write_text(folder / "compare.html", html_table(head, rows))


# --------------------------------------------------------------------------------------------------
# Command


@dataclass(frozen=True)
class Options(Decoding):
    """The options of the command line, decoding's among them."""

    max_new_tokens: int = 128  # tokens of an answer at most; with --instruct_dir 256
    seed: int = setting(0, -(2**63), 2**63 - 1)  # of the resamples, and of answers that are sampled
    instruct_dir: str = ""  # a file of questions for the table; - is stdin
    data_path: str = str(DATA / "heldout.jsonl")  # records with references
    # pairs of a right and a wrong statement (empty: none)
    statements: str = str(DATA / "calla.jsonl")
    knowledge: str = str(DATA / "knowledge.jsonl")  # knowledge base, for facts contradicted
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
    text = "multiple-choice files (CMB, CMExam, TCMBench, ours)"
    parser.add_argument("--choices", nargs="*", default=argparse.SUPPRESS, help=text)
    text = "the same as --batch_size"
    parser.add_argument("--rows", type=int, dest="batch_size", default=argparse.SUPPRESS, help=text)
    parser.add_settings(Options)
    given = vars(parser.parse_args())
    unused = given.keys() & {"choices", "data_path", "statements", "knowledge", "resamples"}
    if given.get("instruct_dir") and unused:
        raise ValueError(f"--instruct_dir makes a table without scores; leave out --{min(unused)}")
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
        "interval": f"{options.resamples} resamples of whole entities: {data.describe()}",
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__,
        "dtype": str(dtype),
        "base_dtype": base_dtype,
        "choice rule": LETTER.pattern,
        "refusal rule": REFUSAL.pattern,
    }


def main():
    candidates, choices, folder, options = parse_options()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    base_dtype = "int8" if options.load_8bit else options.base_dtype
    models = each_model(candidates, device, dtype, base_dtype)  # loads when it is asked for one
    if options.instruct_dir:
        questions = read_instructions(options.instruct_dir)
        compare(models, questions, options.decoding, folder, options.batch_size)
        print(f"{folder}: compare.md, compare.csv, compare.html, answers of each model")
    else:
        data = read_data(options, choices)
        info = describe_run(candidates, data, options, dtype, base_dtype)
        scored, texts = score_models(models, data, options.decoding, folder, options.batch_size)
        write_report(scored, texts, data, info, folder)
        print(
            f"{folder}: report.html, scores.json, scores.svg, answers and choices of each model, "
            "run.json"
        )


if __name__ == "__main__":
    run(main)
