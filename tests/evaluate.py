"""What did tuning change? Answers, scores with intervals, and one report page, for models on one base or several.

  python tests/evaluate.py base=data/tiny tuned=data/tiny+lora-tcm --output_dir report

A model is NAME=BASE or NAME=BASE+ADAPTER; the first one is what the others are compared with. The folder gets
answers-NAME.jsonl, choices-NAME.jsonl, scores.json, scores.svg, report.html and run.json (hashes of weights, data and
templates, decoding settings, versions). The same inputs give the same bytes, so a report can be checked by running it
again; an interrupted one goes on.

Characters are those of the text without white space. Each score is a mean over records, or a ratio or BLEU of sums
over records; its 95 % interval is the percentile bootstrap (Efron & Tibshirani 1993). What is drawn are whole entities
with all their records (Davison & Hinkley 1997, section 3.8), since records of one entity resemble each other; a record
without `entity` is drawn alone. All models have the same resamples, so that the difference of two is a paired one.

  bits per character   -log2 p(reference and EOS | prompt) / characters of the reference: comparable across tokenizers
  facts recalled       share of a record's values (those of the knowledge base) that the answer names by themselves, not
                       inside the entity's name or a longer value of the same relation
  facts contradicted   of the values of the asked relations that the answer names, the share that is another entity's
  ROUGE-1/2/L          F1 over characters (Lin 2004)       BLEU-4   over characters, corpus level (Papineni et al. 2002),
  distinct-2           different character bigrams / bigrams of an answer (Li et al. 2016)         exponential smoothing
  repetition           1 - different 4-grams / 4-grams of an answer (seq-rep-4, Welleck et al. 2020)
  stopped, empty, refused, U+FFFD   share of the answers that end by EOS, have no text, decline, show half a character
"""
import csv
import hashlib
import html
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from build_data import read_knowledge, rouge_l  # noqa: E402
from generate import DATA, Decoding, answer_file, each_model, pick_device, pick_dtype, read_instructions, read_records, render_prompt  # noqa: E402
from model import Parser, find_tokenizer, read_json_file, run, write_atomically, write_json  # noqa: E402
from train import named  # noqa: E402

REFUSAL = re.compile("抱歉|对不起|无法(回答|提供)|不能(回答|提供)|作为(一个|一名)?(人工智能|AI|语言模型)|I'm sorry|As an AI")
LETTER = re.compile(r"[\W本题的正确答案故应该选择项是为]*([A-H](?:[\s、,，和与及]*[A-H])*+)项?(?:是?正确的?)?"        # *+: of A、B或C, not A
                    r"(?= *(?:$|[\n.．、:：,，。;；!！)）\]】\"”」*]))(?!\W*(?:或|还是|[A-H]\b|[a-z]))")
FAMILIES = {  # scores of one scale share a chart
    "facts": ["facts recalled", "facts contradicted"], "overlap with the reference": ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU-4"],
    "form": ["stopped", "repetition", "distinct-2", "empty", "refused", "U+FFFD"],
    "choices": ["choice by likelihood", "choice by answer", "choice not answered", "true statements", "false statements",
                "right one of a pair"]}


def characters(text):
    return [c for c in text if not c.isspace()]


def ngrams(sequence, n):
    return Counter(tuple(sequence[i:i + n]) for i in range(len(sequence) - n + 1))


def f1(matches, reference, answer):
    """Harmonic mean of recall (of reference) and precision (of answer)."""
    return 2 * matches / (reference + answer) if reference and answer and matches else 0.0


def rouge(reference, answer):
    """(ROUGE-1, ROUGE-2, ROUGE-L) F1 of two texts over characters."""
    r, a = characters(reference), characters(answer)
    by_n = [f1(sum((ngrams(r, n) & ngrams(a, n)).values()), max(0, len(r) - n + 1), max(0, len(a) - n + 1)) for n in (1, 2)]
    return (*by_n, rouge_l(r, a))


def bleu_counts(reference, answer):
    """What BLEU-4 needs of a pair, to be summed over pairs: matches and n-grams for n = 1 to 4, both lengths (10,)."""
    r, a = characters(reference), characters(answer)
    return np.array([sum((ngrams(r, n) & ngrams(a, n)).values()) for n in range(1, 5)]
                    + [max(0, len(a) - n + 1) for n in range(1, 5)] + [len(a), len(r)], dtype=float)


def bleu(counts):
    """BLEU-4 in [0, 1] of summed counts; the k-th order without a match counts as 1 / 2^k matches (Chen & Cherry 2014)."""
    matches, totals, (answer, reference) = counts[:4], counts[4:8], counts[8:]
    if not matches.any() or not totals.all():
        return 0.0
    smooth, logs = 1.0, 0.0
    for m, t in zip(matches, totals):
        smooth = smooth * 2 if m == 0 else smooth
        logs += math.log(m / t if m else 1 / (smooth * t))
    return math.exp(logs / 4 + min(0.0, 1 - reference / answer))


def distinct(text, n):
    """Different n-grams of characters over n-grams; 1 for a text too short to have any."""
    counts = ngrams(characters(text), n)
    return len(counts) / sum(counts.values()) if counts else 1.0


@torch.inference_mode()
def continuation_logprobs(model, prompt, continuations):
    """log p(continuation | prompt), natural, summed over its tokens, for each list of ids behind the ids of one prompt.
    The prompt runs once; the continuations are one batch, padded on the right where causality hides the padding."""
    B, n, width = len(continuations), len(prompt), max(map(len, continuations))
    cache = model.new_cache(B, n + width - 1)
    last = model.hidden(torch.tensor([prompt], device=model.device), cache.rows(0, 1, 0))[:, -1:]       # (1, 1, C)
    cache.copy_rows([0] * B, list(range(B)), 0, n)
    cache.length = n
    ids = torch.tensor([c + [0] * (width - len(c)) for c in continuations], device=model.device)        # (B, T)
    hidden = last.expand(B, -1, -1)
    if width > 1:
        hidden = torch.cat((hidden, model.hidden(ids[:, :-1], cache)), dim=1)
    logprobs = model.output(hidden).float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)   # (B, T)
    return [row[:len(c)].double().sum().item() for row, c in zip(logprobs, continuations)]


def bits(model, tokenizer, template, record):
    """-log2 p(reference, EOS | prompt) of a record."""
    prompt = tokenizer.encode(render_prompt(template, record["instruction"], record["input"]), bos=True)
    answer = tokenizer.encode_answer(record["output"]) + [tokenizer.eos_id]
    return -continuation_logprobs(model, prompt, [answer])[0] / math.log(2)


def read_choices(path):
    """Multiple-choice questions, [{question, options {letter: text}, answer letters, subject, entity}], of ours, CMB (JSON
    with option), CMExam (CSV with Question, Options, Answer) or TCMBench (JSON with example). Raises ValueError naming the
    file and the question that is none."""
    path = Path(path)
    if path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read ({error}); wanted CSV in UTF-8 with Question, Options, Answer") from None
    else:
        try:
            rows = read_json_file(path)["example"]
        except (OSError, ValueError, KeyError):
            rows = [row for _, row in read_records(path)]
    questions = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        row = {key.lower(): value for key, value in row.items() if isinstance(key, str)} if isinstance(row, dict) else {}
        question, options, answer = row.get("question"), row.get("options", row.get("option")), row.get("answer")
        if options is None and isinstance(question, str):                         # TCMBench: the options end the question
            question, *lines = re.split(r"\n(?=[A-H][．.、])", question)
            options = "\n".join(lines)
        if isinstance(options, str):
            options = dict(re.findall(r"^([A-H])[．.、:：\s]+(.+?)\s*$", options, re.M))
        elif isinstance(options, list):                                           # [{"key": "A", "value": text}]
            options = {o["key"]: o.get("value") for o in options if isinstance(o, dict) and isinstance(o.get("key"), str)}
        options = {k: v for k, v in options.items() if v} if isinstance(options, dict) else {}
        answer = "".join(map(str, answer)) if isinstance(answer, list) else answer
        if not (isinstance(question, str) and len(options) > 1 and all(isinstance(v, str) for v in options.values())
                and isinstance(answer, str) and answer and set(answer) <= set(options)):
            raise ValueError(f"{path} question {number}: wanted a question, two options or more, all texts, and an answer among "
                             f"their letters, got {options!r:.80} and {answer!r}")
        subject = row.get("subject") or row.get("exam_subject") or row.get("knowledge_point") or row.get("exam_class") or "all"
        questions.append({"question": question.strip(), "options": options, "answer": "".join(sorted(answer)),
                          "subject": str(subject), "entity": row.get("entity")})
    return questions


def choose(model, tokenizer, template, question):
    """The option, as a letter, whose text is the likeliest answer per character. (Questions with several right answers
    take as many of the likeliest as there are right ones.)"""
    prompt = tokenizer.encode(render_prompt(template, question["question"]), bos=True)
    letters = sorted(question["options"])
    texts = [question["options"][letter] for letter in letters]
    scores = continuation_logprobs(model, prompt, [tokenizer.encode_answer(text) for text in texts])
    order = sorted(range(len(letters)), key=lambda i: -scores[i] / len(texts[i]))
    return "".join(sorted(letters[i] for i in order[:len(question["answer"])]))


def ask_choice(question):
    """The question with its options, as it is put to a model."""
    options = "\n".join(f"{letter}. {text}" for letter, text in sorted(question["options"].items()))
    return f"{question['question']}\n{options}"


def extract_choice(answer, options):
    """The letters that an answer chooses, or None. Strict: letters at its start (答案是 and the like may stand before
    them, punctuation must follow: B超 is no B), several if it lists them (A、C), else the one option whose text it names; an
    answer that wavers (A或B), names two texts or none chooses nothing."""
    if answer.strip() not in options.values() and (match := LETTER.match(answer)):                # CEA may be a text
        if (letters := set(re.findall("[A-H]", match[1]))) <= set(options):
            return "".join(sorted(letters))
    found = named(answer, options.values())
    letters = [letter for letter, text in options.items() if text in found]
    return letters[0] if len(letters) == 1 else None


def believes(model, tokenizer, template, statement):
    """True if 正确 is a likelier answer than 错误 to whether the statement holds."""
    prompt = tokenizer.encode(render_prompt(template, f"下面的说法正确还是错误？\n{statement}"), bos=True)
    right, wrong = continuation_logprobs(model, prompt, [tokenizer.encode_answer(word) for word in ("正确", "错误")])
    return right > wrong


def fact_counts(record, answer, facts, vocabulary):
    """(values named, values asked, foreign values named, values of the asked relations named) of one answer. facts:
    {entity: {relation: values}}, vocabulary: {(kind, relation): every entity's values}."""
    values, entity = record.get("values", []), record.get("entity") or ""
    known = {v for vs in facts.get(entity, {}).values() for v in vs} | {entity, *values}
    terms = set().union(*(vocabulary.get((record.get("kind"), r), set()) for r in record.get("relations", [])))
    said = named(answer, terms | {entity, *values})
    foreign = [v for v in said & terms if all(v not in k for k in known)]
    return sum(v in said for v in values), len(values), len(foreign), len(said & terms)


def score(records, answers, bit_counts, knowledge):
    """{score: (numerators, denominators)} over records, arrays (N,) whose sums' ratio is the score; BLEU-4's numerators
    are counts (N, 10). answers: rows of answer_file."""
    texts = [row["answer"] for row in answers]
    facts = {e["中心词"]: {r: v for r, v in e.items() if isinstance(v, list)} for e in knowledge}
    vocabulary = {}
    for e in knowledge:
        for relation, values in facts[e["中心词"]].items():
            vocabulary.setdefault((e["类型"], relation), set()).update(values)
    counts = np.array([fact_counts(r, t, facts, vocabulary) for r, t in zip(records, texts)], dtype=float)
    overlap, one = np.array([rouge(r["output"], t) for r, t in zip(records, texts)]), np.ones(len(records))
    means = {"ROUGE-1": overlap[:, 0], "ROUGE-2": overlap[:, 1], "ROUGE-L": overlap[:, 2],
             "distinct-2": [distinct(t, 2) for t in texts], "repetition": [1 - distinct(t, 4) for t in texts],
             "stopped": [row["finish_reason"] == "stop" for row in answers], "empty": [not t.strip() for t in texts],
             "refused": [bool(REFUSAL.search(t)) for t in texts], "U+FFFD": ["\ufffd" in t for t in texts],
             "answer length": [len(characters(t)) for t in texts]}
    return {"bits per character": (np.array(bit_counts), np.array([len(characters(r["output"])) for r in records], dtype=float)),
            "facts recalled": (counts[:, 0], counts[:, 1]), "facts contradicted": (counts[:, 2], counts[:, 3]),
            "BLEU-4": (np.stack([bleu_counts(r["output"], t) for r, t in zip(records, texts)]), one),
            **{name: (np.array(values, dtype=float), one) for name, values in means.items()}}


def value(numerators, denominators, weights=None):
    """A score of (weighted) sums over records; None where nothing was asked."""
    weights = np.ones(len(numerators)) if weights is None else weights
    if numerators.ndim == 2:
        return bleu(weights @ numerators)
    return float(weights @ numerators / total) if (total := weights @ denominators) else None


def interval(draws):
    """The central 95 % of bootstrap draws, None left out."""
    draws = [d for d in draws if d is not None]
    return [round(float(x), 6) for x in np.percentile(draws, [2.5, 97.5])] if draws else None


def clusters_of(rows):
    """The number (N,) of each row's entity, from 0 on; a row without one has a number of its own."""
    keys = [i if row.get("entity") in (None, "") else str(row["entity"]) for i, row in enumerate(rows)]
    return np.array(list(map({key: k for k, key in enumerate(dict.fromkeys(keys))}.get, keys)))


def summarise(scored, clusters, resamples, seed):
    """{score: {model: {value, interval, records, resampled, difference, difference_interval}}}: differences are to the
    first model. clusters: {score: numbers (N,)} of what is drawn, `resampled` of them: its records get the same weight."""
    first, table = next(iter(scored)), {}
    for name in scored[first]:
        row, draws, size = table.setdefault(name, {}), {}, int(clusters[name].max()) + 1
        drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)              # times, of each
        weights = drawn[:, clusters[name]].astype(float)
        for model, scores in scored.items():
            n, d = scores[name]
            draws[model] = [value(n, d, w) for w in weights]
            if (whole := value(n, d)) is None:
                continue
            row[model] = {"value": round(whole, 6), "interval": interval(draws[model]), "records": len(n), "resampled": size}
            if model != first and first in row:
                pairs = [None if None in pair else pair[1] - pair[0] for pair in zip(draws[first], draws[model])]
                row[model] |= {"difference": round(whole - row[first]["value"], 6), "difference_interval": interval(pairs)}
    return {name: row for name, row in table.items() if row}


def chart(table, models, names, title):
    """An SVG of horizontal bars, one a model for each of the names, with intervals; values are shares of 1."""
    colours, y, parts = ["#8a94a6", "#c0392b", "#2c6fbb", "#3d8b56", "#b07d2b"], 34, []
    for name in [n for n in names if n in table]:
        parts.append(f'<text x="8" y="{y + 13}" font-weight="600">{html.escape(name)}</text>')
        for i, model in enumerate(m for m in models if m in table[name]):
            cell, colour = table[name][model], colours[models.index(model) % len(colours)]
            low, high = cell["interval"]
            x = [200 + 420 * v for v in (cell["value"], low, high)]
            parts.append(f'<rect x="200" y="{y}" width="{max(1, x[0] - 200):.1f}" height="14" fill="{colour}"/>'
                         f'<path d="M{x[1]:.1f} {y + 7}H{x[2]:.1f}M{x[1]:.1f} {y + 3}v8M{x[2]:.1f} {y + 3}v8" stroke="#222"/>'
                         f'<text x="{max(x[0], x[2]) + 6:.1f}" y="{y + 12}">{100 * cell["value"]:.1f} % {html.escape(model)}</text>')
            y += 18
        y += 8
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {y + 4}" font-family="sans-serif" font-size="12">'
            f'<rect width="760" height="{y + 4}" fill="#fff"/><text x="8" y="20" font-size="15">{html.escape(title)}</text>'
            + "".join(parts) + "</svg>\n")


def shown(cell, name):
    """A cell of the table as text: value [interval], difference in brackets."""
    if cell is None:
        return ""
    plain = name in ("bits per character", "answer length")
    form = "{:.2f}".format if plain else lambda x: f"{100 * x:.1f} %"
    text = f"{form(cell['value'])} [{', '.join(map(form, cell['interval']))}]"
    if "difference" in cell and cell["difference_interval"]:
        low, high = cell["difference_interval"]
        text += f" ({cell['difference'] * (1 if plain else 100):+.{2 if plain else 1}f}{'' if low <= 0 <= high else ' *'})"
    return text


def report(table, subjects, models, examples, info):
    """The page: charts, the table, accuracy by subject, examples side by side, and what is needed to make it again."""
    def row(cells, tag="td"):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    charts = "".join(chart(table, models, names, title) for title, names in FAMILIES.items() if any(n in table for n in names))
    scores = "".join(row([name, *(shown(cells.get(m), name) for m in models)]) for name, cells in table.items())
    by_subject = "".join(row([subject, n, *(f"{100 * x:.1f} %" for x in shares)]) for subject, n, shares in subjects)
    side = "".join(row([r["instruction"], r["output"], *texts]) for r, texts in examples)
    return f"""<!doctype html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(' / '.join(models))}</title>
<style>body{{font:15px/1.6 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}}svg{{max-width:760px;display:block;
margin:1em 0;border:1px solid #ddd}}table{{border-collapse:collapse;width:100%;margin:1em 0}}td,th{{border:1px solid #ddd;padding:.4em
.6em;text-align:left;vertical-align:top}}th{{background:#f4f4f4}}pre{{background:#f4f4f4;padding:1em;overflow:auto}}</style>
<h1>模型效果对比 Model comparison</h1>
<p>{html.escape(models[0])} is what the others are compared with. Square brackets: 95 % bootstrap interval, {info["interval"]};
round ones: paired difference, * where its interval leaves out 0. No medical advice. 本页内容由模型生成，不构成医疗建议。</p>
{charts}<table>{row(["score", *models], "th")}{scores}</table>
<h2>Choices by subject, by likelihood</h2><table>{row(["subject", "questions", *models], "th")}{by_subject}</table>
<h2>Answers side by side</h2><table>{row(["question", "reference", *models], "th")}{side}</table>
<h2>How to make it again</h2><pre>{html.escape(json.dumps(info, ensure_ascii=False, indent=1))}</pre></html>
"""


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def folder_hashes(path):
    """SHA-256 of each file of weights, settings or tokens in a base's or an adapter's folder."""
    names = sorted(p for p in Path(path).iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".json", ".model"))
    return {p.name: file_hash(p) for p in names}


def read_pairs(path):
    """[{consistent, inconsistent}, ...] of a file. Raises ValueError naming the line or record."""
    rows = read_records(path)
    for place, row in rows:
        if not all(isinstance(row.get(key), str) and row[key] for key in ("consistent", "inconsistent")):
            raise ValueError(f"{path} {place}: consistent and inconsistent want a text each")
    return [row for _, row in rows]


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="NAME=BASE or NAME=BASE+ADAPTER; the first is compared with")
    parser.add_argument("--output_dir", required=True, help="folder of the report")
    parser.add_argument("--data_path", default=str(DATA / "heldout.jsonl"), help="records with references")
    parser.add_argument("--choices", nargs="*", default=[str(DATA / "choice.jsonl")], help="multiple-choice files (CMB, CMExam, TCMBench, ours)")
    parser.add_argument("--statements", default=str(DATA / "calla.jsonl"), help="pairs of a right and a wrong statement (empty: none)")
    parser.add_argument("--knowledge", default=str(DATA / "knowledge.jsonl"), help="knowledge base, for facts contradicted")
    parser.add_argument("--prompt_template", default="", help="name or path (empty: each adapter's own, med_template for a base)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--rows", type=int, default=16, help="answers decoded at once")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples, 40 or more: 2.5 %% of fewer is none")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16, fp32")
    args = parser.parse_args()
    if args.resamples < 40:
        raise ValueError(f"resamples is {args.resamples}, wanted 40 or more")
    records = read_instructions(args.data_path, answers=True)
    questions = [q for path in args.choices for q in read_choices(path)]
    pairs = read_pairs(args.statements) if args.statements else []
    knowledge = read_knowledge(args.knowledge)
    out, device = Path(args.output_dir), pick_device(args.device)
    out.mkdir(parents=True, exist_ok=True)
    scored, texts, right, files = {}, {}, {}, [args.data_path, *args.choices, args.knowledge, args.statements]
    drawn = ", ".join(f"{clusters_of(rows).max() + 1} with {len(rows)} {what}" for rows, what in [
        (records, "held-out questions"), (questions, "multiple-choice questions"), (pairs, "pairs of statements")] if rows)
    info = {"models": {}, "data": [(Path(p).name, file_hash(p)) for p in files if p],      # a list: two files may share a name
            "decoding": {"temperature": 0, "max_new_tokens": args.max_new_tokens}, "resamples": args.resamples, "seed": args.seed,
            "interval": f"{args.resamples} resamples of whole entities: {drawn}",
            "torch": torch.__version__.split("+")[0], "numpy": np.__version__, "dtype": str(pick_dtype(args.dtype, device)),
            "choice rule": LETTER.pattern, "refusal rule": REFUSAL.pattern}
    decoding = Decoding(max_new_tokens=args.max_new_tokens)
    for name, model, tokenizer, template, folders in each_model(args.models, args.prompt_template, device, pick_dtype(args.dtype, device)):
        hashes = [folder_hashes(folder) for folder in folders]
        hashes[0]["tokenizer.model"] = file_hash(find_tokenizer(folders[0]))              # it may lie one level up
        info["models"][name] = {"weights": hashes, "template": template}
        weights = hashlib.sha256(json.dumps([hashes, template, info["dtype"]]).encode()).hexdigest()

        def answers(prompts, kind):
            tasks = [({"instruction": p}, tokenizer.encode(render_prompt(template, p, i), bos=True), decoding) for p, i in prompts]
            path = out / f"{kind}-{name}.jsonl"
            answer_file(model, tokenizer, tasks, str(path), args.rows, weights)
            return [row for _, row in read_records(path)]

        rows = answers([(r["instruction"], r["input"]) for r in records], "answers")
        scores = score(records, rows, [bits(model, tokenizer, template, r) for r in records], knowledge)
        texts[name], clusters = [row["answer"] for row in rows], dict.fromkeys(scores, clusters_of(records))
        if questions:
            likely = np.array([choose(model, tokenizer, template, q) == q["answer"] for q in questions], dtype=float)
            given = [extract_choice(row["answer"], q["options"])
                     for q, row in zip(questions, answers([(ask_choice(q), "") for q in questions], "choices"))]
            one, right[name] = np.ones(len(questions)), likely
            scores |= {"choice by likelihood": (likely, one),
                       "choice by answer": (np.array([g == q["answer"] for g, q in zip(given, questions)], dtype=float), one),
                       "choice not answered": (np.array([g is None for g in given], dtype=float), one)}
            clusters = dict.fromkeys(scores, clusters_of(questions)) | clusters
        if pairs:
            held = np.array([[believes(model, tokenizer, template, p["consistent"]), not believes(model, tokenizer, template, p["inconsistent"])]
                             for p in pairs], dtype=float)
            likelier = [np.diff(continuation_logprobs(model, [tokenizer.bos_id], [tokenizer.encode_answer(p[k]) for k in
                                                                                 ("inconsistent", "consistent")]))[0] > 0 for p in pairs]
            one = np.ones(len(pairs))
            scores |= {"true statements": (held[:, 0], one), "false statements": (held[:, 1], one),
                       "right one of a pair": (np.array(likelier, dtype=float), one)}
            clusters = dict.fromkeys(scores, clusters_of(pairs)) | clusters
        scored[name] = scores
    table, models = summarise(scored, clusters, args.resamples, args.seed), list(scored)
    subjects = [(s, sum(q["subject"] == s for q in questions),
                 [np.mean([x for x, q in zip(right[m], questions) if q["subject"] == s]) for m in models])
                for s in dict.fromkeys(q["subject"] for q in questions)]
    step = max(1, len(records) // 30)
    examples = [(r, [texts[m][i] for m in models]) for i, r in enumerate(records)][::step]
    page = report(table, subjects, models, examples, info)
    write_json(out / "scores.json", table)
    write_json(out / "run.json", info)
    picture = chart(table, models, [n for names in FAMILIES.values() for n in names if n not in ("empty", "refused", "U+FFFD")],
                    f"{len(records)} held-out questions, {len(questions)} multiple choice")
    write_atomically(out / "scores.svg", lambda p: p.write_text(picture, encoding="utf-8"))
    write_atomically(out / "report.html", lambda p: p.write_text(page, encoding="utf-8"))
    print(f"| score | {' | '.join(models)} |\n|---|{'---|' * len(models)}")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(shown(cells.get(m), name) for m in models)} |")
    print(f"95 % intervals: {info['interval']}")
    print(f"{out}: report.html, scores.json, scores.svg, answers and choices of each model, run.json")


if __name__ == "__main__":
    run(main)
