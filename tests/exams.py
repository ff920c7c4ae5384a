"""Multiple-choice exams: every public form of a question, each order of its options, the letters
that an answer chooses, and the questions that a knowledge base covers. tests/evaluate.py asks them.

  file                         options                             answer
  ours, MTCMB's ED-A, MedQA    {"A": "…"}                          "B", or answer_idx
  CMB                          "option": {"A": "…"}                "ACD"; of the test set in another
                                                                   file, [{id, answer}]
  CMExam                       [{"key": "A", "value": "…"}], or    "B"
                               in CSV one text, a line each
  MTCMB's ED-B                 ["A.…", "B.…"]                      "C"
  MTCMB's SE-B                 "A. … B. … C. … D. …"               "B"
  TCMBench                     at the end of the question          ["B"]
  C-Eval, CMMLU, TCMChat       columns A, B, C, D, perhaps E       "D"
  SeaEval's CMMLU              "choices": ["(A) …", "(B) …"]       "(B) …"

JSON arrays, JSON lines and CSV are told apart by what stands in them. A row without an answer is
left out and counted: test sets are published without."""

import csv
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from generate import read_records  # noqa: E402
from model import read_json_file  # noqa: E402
from train import terms_in  # noqa: E402

LETTERS = "ABCDEFGH"
# What the fields are called, in lower case.
QUESTION = ("question", "题目", "问题", "题干")
OPTIONS = ("options", "option", "choices", "选项")
ANSWER = ("answer_idx", "answer", "答案", "正确答案")
SUBJECT = ("subject", "exam_subject", "knowledge_point", "exam_class", "domain", "category")
FORMS = (
    "a question, an answer, and options as an object, a list, one text (A. … B. …), columns A, B, "
    "C… or the last lines of the question"
)

# --------------------------------------------------------------------------------------------------
# Files to questions


def read_exams(paths):
    """The questions of files, as `make_question` makes them, those without an answer left out. A
    file of answers alone, [{id, answer}], belongs to the questions of the file before it.

    Raises ValueError naming the file and the question whose form is unknown, or a file without a
    single answer."""
    exams = []  # [(path, rows), ...]
    for path in map(Path, paths):
        rows = read_rows(path)
        if exams and all(first(row, QUESTION) is None and "id" in row for row in rows):
            # CMB publishes the answers to its test set apart from it.
            answers = {str(row["id"]): first(row, ANSWER) for row in rows}
            for row in exams[-1][1]:
                row["answer"] = answers.get(str(row.get("id")))
        else:
            exams.append((path, rows))
    return [question for path, rows in exams for question in make_questions(path, rows)]


def read_rows(path):
    """What stands for a question each in a file: objects with keys in lower case."""
    if path.suffix == ".csv":
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read ({error}); wanted CSV in UTF-8") from None
        if not rows:
            raise ValueError(
                f"{path} is empty; wanted a line of names and a line for each question"
            )
    else:
        try:
            rows = read_json_file(path)["example"]  # TCMBench
            rows = rows if isinstance(rows, list) else [rows]
        except (OSError, ValueError, KeyError):
            rows = [row for _, row in read_records(path)]
    # CMExam and CMMLU write Question where the others write question.
    lowered = []
    for row in rows:
        pairs = row.items() if isinstance(row, dict) else ()
        lowered.append({key.strip().lower(): v for key, v in pairs if isinstance(key, str)})
    return lowered


def first(row, names):
    """The first value that a row has under one of names; None without any."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def make_questions(path, rows):
    """The questions of a file's rows that have an answer."""
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            questions.append(make_question(row, path.stem))
        except ValueError as error:
            raise ValueError(f"{path} question {number}: {error}") from None
    answered = [question for question in questions if question["answer"]]
    if not answered:
        raise ValueError(
            f"{path}: none of {len(rows)} questions has an answer; wanted the file with answers "
            "(MTCMB: evaluate/standard_answer), or behind it one of {id, answer} (CMB)"
        )
    if left_out := len(questions) - len(answered):
        print(f"{path}: {left_out} of {len(rows)} questions have no answer", file=sys.stderr)
    return answered


def make_question(row, subject):
    """{question, options {letter: text}, answer letters ("": none is given), subject, entity} of a
    row in any form; subject: what it is without one of its own. Raises ValueError naming the keys
    or values that are none of the forms."""
    question, options = find_question(row)
    texts = [question, *options.values()]
    if len(texts) < 3 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"wanted {FORMS}; got the keys {', '.join(row) or 'of no object'}")
    answer = read_answer(first(row, ANSWER), options)
    if not set(answer) <= set(options):
        given = first(row, ANSWER)
        raise ValueError(f"wanted an answer among {''.join(options)}, got {given!r:.80}")
    return {
        "question": question.strip(),
        "options": options,
        "answer": answer,
        "subject": str(first(row, SUBJECT) or subject),
        "entity": row.get("entity"),
    }


def find_question(row):
    """(question, {letter: text}) of a row, wherever it has its options."""
    question, options = first(row, QUESTION), first(row, OPTIONS)
    if options is None:  # columns, or the last lines of the question
        options = {key: row[key] for key in row if key in [*LETTERS.lower()]}
    if not options and isinstance(question, str):
        question, *options = re.split(r"\n(?=\s*A[．.、])", question, maxsplit=1)
        options = "".join(options)
    return question, read_options(options)


def read_options(options):
    """{letter: text} of options as a row has them, empty ones left out; {} in an unknown form."""
    kinds = {type(option) for option in options} if isinstance(options, list) else set()
    if isinstance(options, str):
        options = split_options(options)
    elif kinds == {dict}:
        options = {str(option.get("key")): option.get("value") for option in options}
    elif kinds == {str}:
        options = name_options(options)
    if not isinstance(options, dict):
        return {}
    given = {key.strip().upper(): text for key, text in options.items()}
    return {letter: given[letter] for letter in LETTERS if given.get(letter)}


def name_options(texts):
    """{letter: text} of a list: by the letters before the texts (A.胸中). Without such, or where
    one stands twice (a slip in MTCMB's ED-B), the place in the list gives the letter."""
    labelled = [re.fullmatch(r"\s*[(（]?([A-H])[)）.．、:：\s]\s*(.*?)\s*", t, re.S) for t in texts]
    if not all(labelled):
        return dict(zip(LETTERS, texts))
    letters = [match[1] for match in labelled]
    # The answer to such a question counts the places, not the letters.
    letters = letters if len(set(letters)) == len(letters) else LETTERS
    return {letter: match[2] for letter, match in zip(letters, labelled)}


def split_options(text):
    """{letter: text} of "A. x B. y", on one line or several. A letter counts only behind the one
    before it and, inside a line, with a mark after it: 维生素 B and CA125 are no labels."""
    # A space before the letter first; A.甲B.乙 has none to go by.
    for before in (r"\s", r"[^A-Za-z]"):
        starts, end = [], 0
        for letter in LETTERS:
            label = rf"^\s*[(（]?{letter}[)）.．、:：\s]|(?<={before})[(（]?{letter}[)）.．、:：]"
            if match := re.compile(label, re.M).search(text, end):
                starts.append((letter, match.start(), match.end()))
                end = match.end()
        if len(starts) > 1:
            break
    ends = [start for _, start, _ in starts[1:]] + [len(text)]
    return {letter: text[begin:end].strip() for (letter, _, begin), end in zip(starts, ends)}


def read_answer(answer, options):
    """The letters of an answer, in order: ["A", "C"], "AC", "A、C", "(B) 土地", or an option's
    whole text; "" where none is given, "?" for anything else, which is among no options."""
    if isinstance(answer, list):
        answer = "".join(map(str, answer))
    if not isinstance(answer, str | None):
        return "?"
    if not answer or not answer.strip():
        return ""
    # Letters first: of the 血型 B, A, O, AB the answer "A" is the letter.
    if re.fullmatch(r"(\W*[A-H])+\W*|\W*[a-h]\W*", answer):
        letters = sorted(set(re.findall("[A-H]", answer.upper())))
    elif answer.strip() in options.values():
        letters = [letter for letter, text in options.items() if text == answer.strip()]
    else:
        labelled = re.match(r"\s*[(（]?([A-H])[)）.．、:：]", answer)
        letters = labelled[1] if labelled else "?"
    return "".join(letters)


# --------------------------------------------------------------------------------------------------
# Asking, in each order of the options

# Options that point at others keep their order: 以上都是, 均不对, A和C.
POINTING = re.compile(r"以上|上述|前述|[都均皆][是不非对错]|[A-H]\s*[和与及、,，+＋]\s*[A-H]")


def rotations(question, at_most=8):
    """A question with its options moved round, the file's own order first (CircularEval, Liu et al.
    2023, MMBench): n options have n orders, in which each text stands once under each letter."""
    letters, texts = list(question["options"]), list(question["options"].values())
    n = 1 if any(map(POINTING.match, texts)) else min(at_most, len(texts))
    orders = []
    for k in range(n):
        options = dict(zip(letters, texts[k:] + texts[:k]))
        # What stood at place i stands at place i - k now.
        answer = sorted(letters[letters.index(letter) - k] for letter in question["answer"])
        orders.append(question | {"options": options, "answer": "".join(answer)})
    return orders


def ask_choice(question):
    """The question with its options, as it is put to a model."""
    options = "\n".join(f"{letter}. {text}" for letter, text in sorted(question["options"].items()))
    return {"instruction": f"{question['question']}\n{options}", "input": ""}


LISTED = r"([A-H](?:[\s、,，和与及]*[A-H])*+)项?"  # *+: of A、B或C, not A
CHOSEN = re.compile(
    rf"[\W本题的正确答案故应该选择项是为]*{LISTED}(?:是?正确的?)?"
    r"(?= *(?:$|[\n.．、:：,，。;；!！)）\]】\"”」*]))"
    r"(?!\W*(?:或|还是|[A-H]\b|[a-z]))"
)
CONCLUDED = re.compile(rf"(?:所以|因此|故|答案|(?<!不)应)[应该选择是为:： ]*{LISTED}[。.！!\s]*$")


def extract_choice(text, options):
    """The letters that an answer chooses, or None. Strict: letters at its start (答案是 and the
    like may stand before them, punctuation must follow: B超 is no B) or concluded at its end
    (所以选B), several if it lists them (A、C), else the one option whose text it names; an answer
    that wavers (A或B), names two texts or none chooses nothing."""
    match = CHOSEN.match(text) or CONCLUDED.search(text)
    letters = set(re.findall("[A-H]", match[1])) if match else set()
    # an answer that is an option's whole text is that option: CEA may be one
    if letters and letters <= set(options) and text.strip() not in options.values():
        return "".join(sorted(letters))
    found = terms_in(text, options.values())
    letters = [letter for letter, option in options.items() if option in found]
    return letters[0] if len(letters) == 1 else None


def is_right(question, letters):
    """Do letters (None: no choice) name the right texts, all of them and no other? By the text: in
    TCMChat's files the right one may stand under two letters."""
    options = question["options"]
    return {options.get(c) for c in letters or ""} == {options[c] for c in question["answer"]}


def chance(question):
    """The probability that as many options as are right, drawn blindly, are the right ones."""
    return 1 / math.comb(len(question["options"]), len(question["answer"]))


# --------------------------------------------------------------------------------------------------
# What a knowledge base covers, and intervals


class Coverage:
    """Which questions a knowledge base (entities as `read_knowledge` gives them) can answer."""

    def __init__(self, entities):
        self.values = {}  # of each name
        for entity in entities:
            lists = [value for value in entity.values() if isinstance(value, list)]
            own = {value for values in lists for value in values}
            for name in [entity["中心词"], *entity.get("别名", [])]:
                self.values.setdefault(name, set()).update(own)

    def holds(self, question):
        """Does the base hold the right option as a fact about the question? Either an entity that
        the question names has the option among its values, or all its parts (甘，平), or the option
        is an entity and the question names one of its values (of two characters or more)."""
        named = terms_in(question["question"], self.values)
        return all(self.links(named, question, letter) for letter in question["answer"])

    def links(self, named, question, letter):
        text = question["options"][letter]
        parts = set(filter(None, re.split(r"[、，,；;。\s]+", text)))
        held = [self.values[name] for name in named]
        if any(text in values or parts <= values for values in held if parts):
            return True
        values = {value for value in self.values.get(text, ()) if len(value) > 1}
        return bool(terms_in(question["question"], values))


def wilson(k, n, z=1.959964):
    """The 95 % score interval (low, high) of k in n (Wilson 1927); unlike a bootstrap's it has a
    width where k is 0 or n. k may be a fraction: a mean of shares varies less than of 0 and 1."""
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))
