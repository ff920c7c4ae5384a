"""An LLM as a judge: it scores answers by a rubric, or says which of two is better.

  python tests/judge.py a.jsonl --rubric data/rubrics/sus.json --model M --output scores.jsonl
  python tests/judge.py a.jsonl b.jsonl --rubric data/rubrics/pairwise.json --model M \\
      --output verdicts.jsonl

Answers are records with an `answer`, as generate.py --output writes them. A pair is judged in both
orders, and wins only if both say so: a judge who prefers a place and not an answer makes ties
(Zheng et al. 2023). The output has a line for each question, the last one is the summary. Beside
scores.jsonl stands scores.replies.jsonl, every reply that was paid for: no later run asks it again.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import permutations, zip_longest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from build_data import Api, Client, prompt_hash, replies_beside, write_lines  # noqa: E402
from generate import read_instructions, read_records  # noqa: E402
from model import Parser, read_json_file, run  # noqa: E402


@dataclass
class Rubric:
    """What is judged: a file in the form of data/rubrics."""

    name: str
    system: str
    user: str  # with {question}, {answer} or {answer_a} and {answer_b}, perhaps {reference}
    places: list  # where in `user` the answers stand: one, or two of a pair
    keys: list  # of the JSON object that the judge replies
    allowed: list  # values there: of a scale, or [the first is better, the second is, a tie]

    @property
    def pairs(self):
        return len(self.places) == 2


def read_rubric(path):
    """The Rubric in a file. Raises ValueError for one whose parts do not fit together."""
    form = read_json_file(path)
    try:
        if "verdicts" in form:
            places, keys, allowed = ["answer_a", "answer_b"], ["verdict"], form["verdicts"]
            fits = len(allowed) == 3
        else:
            low, high = form["scale"]
            allowed = list(range(low, high + 1))
            places, keys = ["answer"], [dimension["key"] for dimension in form["dimensions"]]
            fits = len(allowed) > 1 and len(keys) > 0
        rubric = Rubric(form["name"], form["system"], form["user"], places, keys, allowed)
        shown = set(re.findall(r"\{(\w+)\}", rubric.user)) - {"reference"}
        fits = fits and shown == {"question", *places} and rubric.name and rubric.system
        fits = fits and len(set(keys)) == len(keys) and len(set(allowed)) == len(allowed)
    except (LookupError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"{path} is no rubric; wanted the fields of those in data/rubrics, and their "
            "{places} in user"
        )
    return rubric


def parse_verdict(content, rubric):
    """The scores {dimension: whole number}, or {"verdict": text}, in a judge's reply.

    Nothing is mended: raises ValueError unless it is one JSON object with the rubric's keys, each
    once, beside 理由 or not, and values that are allowed."""

    def each_key_once(pairs):
        return dict(pairs) if len(dict(pairs)) == len(pairs) else pairs

    if not content:
        raise ValueError("empty")
    try:
        said = json.loads(content, object_pairs_hook=each_key_once)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(said, dict) or said.keys() - {"理由"} != set(rubric.keys):
        raise ValueError(f"other keys: {said!r:.80}, wanted {' '.join(rubric.keys)}")
    verdict = {key: said[key] for key in rubric.keys}
    for value in verdict.values():
        if type(value) not in (int, str) or value not in rubric.allowed:  # True is no 1
            raise ValueError(f"off the scale: {said!r:.80}, wanted {rubric.allowed}")
    return verdict


def read_questions(files, rubric):
    """[(question, answers, reference), ...] of a file of answers, or of two to the same questions.
    Raises ValueError naming the record that lacks an answer or asks something else."""
    questions = []
    rows = zip_longest(*map(read_instructions, files), fillvalue={})
    # Read as it is written: under our keys an answer without a reference would be its own.
    references = [row.get("output") for _, row in read_records(files[0])]
    for number, (same, reference) in enumerate(zip_longest(rows, references), 1):
        asked = ["\n".join(filter(None, (r.get("instruction"), r.get("input")))) for r in same]
        answers = [record.get("answer") for record in same]
        complete = all(isinstance(answer, str) for answer in answers)
        referred = reference or "{reference}" not in rubric.user
        if asked[0] != asked[-1] or not complete or not referred:
            raise ValueError(
                f"record {number} of {' and '.join(files)}: {[text[:40] for text in asked]}; "
                "wanted one question, an answer as generate.py --output writes it, and an "
                "output if the rubric shows a reference"
            )
        questions.append((asked[0], answers, reference))
    return questions


def write_prompts(rubric, question, answers, reference):
    """The prompts of a question: the answers in each order in the places of the rubric. What looks
    like a place in a text stays a text."""
    prompts = []
    for order in permutations(answers):
        texts = {"question": question, "reference": reference, **dict(zip(rubric.places, order))}
        user = re.sub(r"\{(\w+)\}", lambda place, texts=texts: texts[place[1]], rubric.user)
        system = {"role": "system", "content": rubric.system}
        prompts.append([system, {"role": "user", "content": user}])
    return prompts


def outcome(row, rubric, client):
    """What a line of the output says beside its question: scores, a verdict, or why neither."""
    for key in row["keys"]:
        if key not in client.replies:
            return {"rejected": f"no reply: {client.failed.get(key, client.stop)}"}
    replies = [client.replies[key] for key in row["keys"]]
    found = {"model": replies[0]["model"]}  # as the endpoint calls it
    try:
        said = [parse_verdict(reply["content"], rubric) for reply in replies]
    except ValueError as error:
        return found | {"rejected": str(error)}
    if not rubric.pairs:
        return found | {"scores": said[0]}
    first, second, tie = rubric.allowed
    verdicts = [each["verdict"] for each in said]
    # The second prompt shows the answers the other way round.
    agreed = verdicts[1] == {first: second, second: first, tie: tie}[verdicts[0]]
    return found | {"verdict": verdicts[0] if agreed else tie, "verdicts": verdicts}


def summarise(rows, rubric):
    """Counts over all lines: rejected ones by reason; wins, losses and ties, or means."""
    reasons = [row["rejected"].split(":")[0] for row in rows if "rejected" in row]
    kept = [row for row in rows if "rejected" not in row]
    summary = {"asked": len(rows), "rejected": Counter(reasons)}
    if rubric.pairs:
        found = Counter(row["verdict"] for row in kept)
        for name, verdict in zip(("wins", "losses", "ties"), rubric.allowed):
            summary[name] = found[verdict]
    elif kept:
        for key in rubric.keys:
            mean = np.mean([row["scores"][key] for row in kept])
            summary[key] = {"mean": round(mean, 4), "n": len(kept)}
    return summary


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", nargs="+", help="records with an answer; two files are compared")
    parser.add_argument("--rubric", required=True, help="what is judged, a file as in data/rubrics")
    parser.add_settings(Api)
    parser.set_defaults(temperature=0.0)
    given = vars(parser.parse_args())
    files, rubric_file = given.pop("answers"), given.pop("rubric")
    args = Api(**given)
    rubric = read_rubric(rubric_file)
    replies = replies_beside(args.output, "rubric_sha256")
    if len(files) != len(rubric.places):
        raise ValueError(
            f"{rubric_file} wants {len(rubric.places)} file(s) of answers, got {len(files)}"
        )
    hashes = []
    for path in (rubric_file, *files):
        hashes.append(hashlib.sha256(Path(path).read_bytes()).hexdigest())
    source = {"model": args.model, "rubric": rubric.name}
    source |= {"rubric_sha256": hashes[0], "answers_sha256": hashes[1:]}

    prompts, rows = {}, []
    for question, answers, reference in read_questions(files, rubric):
        keys = []
        for messages in write_prompts(rubric, question, answers, reference):
            # The key follows from the prompt: what stands there twice is asked once.
            keys.append(f"{prompt_hash(messages)}/{rubric.name}/{args.model}")
            prompts[keys[-1]] = messages
        rows.append({"keys": keys, "question": question, **source})

    client = Client(replies, args)
    if args.dry_run:
        print(*(said["content"] for said in next(iter(prompts.values()))), sep="\n")
        return client.ask(prompts)
    client.ask(prompts)
    for row in rows:
        row |= outcome(row, rubric, client)
    summary = {**source, **summarise(rows, rubric)}
    write_lines(args.output, [*rows, {"summary": summary}])
    client.end()
    print(json.dumps({"summary": summary}, ensure_ascii=False))


if __name__ == "__main__":
    run(main)
