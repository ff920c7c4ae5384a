"""tests/exams.py: files in every published form, written here as they are published; the letters
that an answer chooses; orders, coverage and intervals against figures worked out by hand."""

import json
import math

import evaluate as E
import exams as X
import numpy as np
import pytest
from conftest import ROOT

OPTIONS = {"A": "甲", "B": "乙", "C": "丙", "D": "丁"}


def to_json(value, **how):
    return json.dumps(value, ensure_ascii=False, **how)


def written(folder, name, content):
    """The path of a file that holds a text, or objects: an array in .json, lines in .jsonl."""
    if not isinstance(content, str):
        lines = "".join(f"{to_json(row)}\n" for row in content)
        content = lines if name.endswith("l") else to_json(content, indent=2)
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


# --------------------------------------------------------------------------------------------------
# Forms

FORMS = {  # each asks the same: 问 with 甲 乙 丙 丁, of which B is right
    # github.com/Wayyuanyuan/MTCMB: data/*.jsonl, evaluate/standard_answer/*.jsonl
    "TCM-ED-A.jsonl": [{"id": 0, "question": "问", "options": OPTIONS, "answer": "B"}],
    "TCM-ED-B.jsonl": [
        {
            "id": 0,
            "question": "问",
            "options": ["A.甲", "B.乙", "C.丙", "D.丁"],
            "answer": "B",
            "source": "全国中医执业医师考试题库",
        }
    ],
    "TCM-SE-B.jsonl": [
        {
            "id": 49,
            "question": "问",
            "options": "A. 甲 B. 乙  C.丙 D. 丁",
            "answer": "B",
            "source": "《中华人民共和国药典》（2020年版）",
        }
    ],
    # github.com/ZJUFanLab/TCMChat: evaluation/resources
    "choice_herb_500.csv": "question,A,B,C,D,E,answer,parse\n问,甲,乙,丙,丁,,B,该中药功效为乙\n",
    "tcm-herb_dev.csv": "sub_id,domain,chapter,question,A,B,C,D,E,answer,type,explanation\n"
    "1,方剂学,泻下药,问,甲,乙,丙,丁,,B,1,\n\n",
    # C-Eval's val, CMMLU's dev and test, and the latter as SeaEval has it
    "clinical_medicine_val.csv": "id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,B\n",
    "anatomy.csv": "\ufeff,Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,B\n",
    "cmmlu.json": [
        {
            "id": "test_1",
            "question": "问",
            "choices": ["(A) 甲", "(B) 乙", "(C) 丙", "(D) 丁"],
            "answer": "(B) 乙",
        }
    ],
    # github.com/FreedomIntelligence/CMB
    "CMB-val-merge.json": [
        {
            "exam_type": "医师考试",
            "exam_class": "中医",
            "exam_subject": "方剂学",
            "question": "问",
            "answer": "B",
            "question_type": "单项选择题",
            "option": {**OPTIONS, "E": ""},
            "explanation": "因为",
        }
    ],
    # github.com/williamliujl/CMExam: CSV, and the JSON made of it
    "test_with_annotations.csv": "\ufeffQuestion,Options,Answer,Explanation,Medical Discipline\n"
    '问,"A 甲\nB 乙\nC 丙\nD 丁",B,因为,中医学\n',
    "cmexam.json": [
        {
            "Question": "问",
            "Options": [{"key": key, "value": value} for key, value in OPTIONS.items()],
            "Answer": "B",
        }
    ],
    # TCMBench, MedQA's mainland part, ours
    "tcmbench.json": '{"type": "FKU", "example": [{"question": '
    '"问\\nA．甲\\nB．乙\\nC．丙\\nD．丁", "answer": ["B"], "index": 1}]}',
    "medqa.jsonl": [{"question": "问", "options": OPTIONS, "answer": "乙", "answer_idx": "B"}],
    "one.jsonl": [{"question": "问", "options": OPTIONS, "answer": "乙"}],
}
SUBJECTS = {"CMB-val-merge.json": "方剂学", "tcm-herb_dev.csv": "方剂学"}


@pytest.mark.parametrize("name", FORMS)
def test_published_forms_are_one_question(name, tmp_path):
    (question,) = X.read_exams([written(tmp_path, name, FORMS[name])])
    assert question == {
        "question": "问",
        "options": OPTIONS,
        "answer": "B",
        "subject": SUBJECTS.get(name, name.rsplit(".")[0]),
        "entity": None,
    }


def test_ours_and_lines_that_only_json_ends(tmp_path):
    assert len(X.read_exams([ROOT / "data/choice.jsonl"])) == 200
    # U+2028 ends a line for str.splitlines.
    row = {"question": "问\u2028题", "options": OPTIONS, "answer": "A"}
    questions = X.read_exams([written(tmp_path, "lines.jsonl", [row, row])])
    assert [q["question"] for q in questions] == ["问\u2028题"] * 2


def test_options_as_they_are_found_in_the_wild():
    """MTCMB's own slips and doubtful letters: one letter twice, B and CA125 inside an option, no
    space between options."""
    doubled = ["A.正胜邪退", "B.邪去正虚", "C.邪胜正衰", "C.正虚邪恋", "E.邪正相持"]
    texts = ["正胜邪退", "邪去正虚", "邪胜正衰", "正虚邪恋", "邪正相持"]
    assert X.read_options(doubled) == dict(zip("ABCDE", texts))
    assert X.read_options(["A型", "B 超"]) == {"A": "A型", "B": "B 超"}
    wild = {
        "A. 缺乏维生素 B 者 B. 维生素 C C. CA125 D.3～9g ": "缺乏维生素 B 者|维生素 C|CA125|3～9g",
        "A.醋淬、打碎后装瓶 B.有毒，不可持续服用": "醋淬、打碎后装瓶|有毒，不可持续服用",
        "A.甲B.乙C.丙": "甲|乙|丙",
        "A. 甲 B. 乙\nC. 丙 D. 丁": "甲|乙|丙|丁",
        "（A）甲 （B）乙": "甲|乙",
    }
    for text, wanted in wild.items():
        assert list(X.read_options(text).values()) == wanted.split("|"), text


@pytest.mark.parametrize(
    "given, letters",
    [("ACD", "ACD"), ("D,A", "AD"), ("A、C", "AC"), (["C", "A"], "AC"), ("(B)", "B"), ("b", "B")],
)
def test_several_right_letters(given, letters, tmp_path):
    """CMB's 多项选择题, and other ways to list letters."""
    row = {"question": "问", "option": OPTIONS, "answer": given, "question_type": "多项选择题"}
    (question,) = X.read_exams([written(tmp_path, "cmb.json", [row])])
    assert question["answer"] == letters
    assert X.is_right(question, letters) and not X.is_right(question, None)
    others = {"".join(c for c in "ABCD" if c not in letters), letters + "E", letters[1:]}
    assert not any(X.is_right(question, other) for other in others)


def test_a_letter_of_options_that_are_letters(tmp_path):
    """Of 血型 B, A, O, AB the answer "A" is the letter, not the text under B."""
    options = {"A": "B", "B": "A", "C": "O", "D": "AB"}
    row = {"question": "问", "options": options, "answer": "A"}
    (question,) = X.read_exams([written(tmp_path, "x.json", [row])])
    assert question["answer"] == "A"


def test_the_right_text_under_two_letters():
    """As in TCMChat's herbs: both are right."""
    question = {"options": {"A": "清热药", "B": "补虚药", "C": "清热药"}, "answer": "A"}
    assert [X.is_right(question, letters) for letters in "ABC"] == [True, False, True]


def test_answers_withheld(tmp_path, capsys):
    """Rows without an answer are left out and counted; CMB's test set has its answers in a second
    file; a file without any is refused."""
    row = {"question": "问", "options": OPTIONS}
    rows = [{**row, "id": 1, "answer": "A"}, {**row, "id": 2, "answer": ""}, {**row, "id": 3}]
    path = written(tmp_path, "some.jsonl", rows)
    assert [q["answer"] for q in X.read_exams([path])] == ["A"]
    assert "2 of 3" in capsys.readouterr().err
    path = written(tmp_path, "CMB-test-choice-question-merge.json", rows[1:])
    with pytest.raises(ValueError, match="CMB-test-choice-question-merge.json.*answer"):
        X.read_exams([path])
    key = written(tmp_path, "CMB-test-choice-answer.json", [{"id": 3, "answer": "BD"}, {"id": 2}])
    assert [q["answer"] for q in X.read_exams([path, key])] == ["BD"]


def test_unknown_forms_are_told_by_file_question_and_keys(tmp_path):
    good = {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "A"}
    odd = [
        {"options": {"A": 1, "B": 2}},
        {"options": 5},
        {"options": [{"key": [], "value": "x"}]},
        {"options": {"A": "x"}},
        {"answer": 1},
        {"answer": [1]},
        {"answer": "C"},
        {"question": " "},
    ]
    files = [("json", json.dumps([good | change]), "question 1: wanted") for change in odd]
    files += [
        ("json", '[{"prompt": "q", "chosen": "x"}]', "question 1: .*keys prompt, chosen"),
        ("csv", "prompt,chosen\nq,x\n", "question 1: .*keys prompt, chosen"),
        ("csv", "", "empty"),
        ("json", '[["a"]]', "list"),
        ("json", '{"example": 5}', "question 1: wanted"),
        ("json", '{"example": [["a"]]}', "question 1: wanted"),
        ("json", "", "empty"),
        ("json", "题".encode("gbk"), "UTF-8"),
        ("csv", "Question\n问题\n".encode("gbk"), "UTF-8"),
        ("csv", 'Question\n"' + "x" * 200_000, "field larger than field limit"),
    ]
    for i, (ending, content, cause) in enumerate(files):
        path = tmp_path / f"{i}.{ending}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=f"{path.name}.*{cause}") as told:
            X.read_exams([path])
        assert "\n" not in str(told.value)


# --------------------------------------------------------------------------------------------------
# Choices


def test_extraction_is_strict():
    options = {"A": "补气", "B": "活血", "C": "补气升阳", "D": "清热"}
    for wanted, answers in {
        "B": ["B"],
        "C": ["答案是 C。", "它的功效是补气升阳。"],
        "D": ["正确答案：D", "功效是清热"],
        "AC": ["选AC"],
        None: ["补气，也能活血", "不知道", "", "E", "Both"],
    }.items():
        for answer in answers:
            assert X.extract_choice(answer, options) == wanted, answer
    wavering = ["A或B", "A 或 B", "A、B或C", "A，或B", "A. B", "A；B", "A/B", "A和B都对"]
    denying = ["不选A", "选A不选B", "选项有误，是D", "答案：B不对，是D", "A是错的", "A错误"]
    words = ["B 超", "D-二聚体", "CA125", "A型流感", "E. coli", "AFP", "DNA检测", "E/CO2"]
    chosen = ["选“B”。", "B是正确的。", "故选B，不选A"]
    options = {"A": "血常规", "B": "胸部CT", "C": "尿常规", "D": "腹部超声", "E": "CEA"}
    for wanted, answers in {
        None: [*wavering, *denying, *words, "A patient", "A B超", "A正确率", "ABF"],
        "A": ["C反应蛋白升高，应查血常规。", "A. B超", "A项。"],
        "B": [*chosen, "B. 胸部CT", "B、胸部CT", "【答案】B\n【解析】血常规"],
        "C": ["（C）", "C\n\n因为", "正确选项为C：尿常规"],
        "D": ["B超检查最合适，即腹部超声。", "**D**", "本题应选择D。", "E 腹部超声"],
        "E": ["CEA"],
        "AC": ["A、C", "A，C。", "C和A", "选A、C项"],
        "ABD": ["A, B, D"],
        "ABCD": ["答案为A、B、C、D。"],
    }.items():
        for answer in answers:
            assert X.extract_choice(answer, options) == wanted, answer


def test_a_conclusion_after_the_fact_is_a_choice():
    options = {"A": "《济生方》", "B": "《伤寒论》", "C": "《金匮要略》"}
    for wanted, answers in {
        "A": [
            "归脾汤出自《济生方》，所以选A。",
            "不是《伤寒论》，而是《济生方》，答案是A",
            "因此选择A",
            "归脾汤出自《济生方》。A. 《济生方》相符，应选A。",
        ],
        "AC": ["两者都有，故选A、C。"],
        None: ["所以不选A", "它不应选A", "不是《伤寒论》，而是《济生方》", "所以选A或B"],
    }.items():
        for answer in answers:
            assert X.extract_choice(answer, options) == wanted, answer


def test_rotations_put_each_text_under_each_letter():
    question = {"question": "问", "options": {**OPTIONS, "E": "戊"}, "answer": "AC"}
    orders = X.rotations(question)
    assert orders[0] == question and len(orders) == 5
    for letter in "ABCDE":
        assert sorted(o["options"][letter] for o in orders) == sorted(question["options"].values())
    for order in orders:
        assert {order["options"][letter] for letter in order["answer"]} == {"甲", "丙"}
        assert len(set(order["options"].values())) == 5
    assert len(X.rotations(question, 2)) == 2
    for last in ("以上都是", "以上均非", "都不对", "A和B", "A、C"):
        pointing = question | {"options": OPTIONS | {"D": last}}
        assert X.rotations(pointing) == [pointing]
    assert X.chance(question) == 1 / 10  # two of five
    assert X.chance(question | {"answer": "B"}) == 1 / 5


# --------------------------------------------------------------------------------------------------
# Ten questions by hand

KNOWLEDGE = [
    {"中心词": "归脾汤", "类型": "方剂", "出处": ["《济生方》"], "功效": ["益气补血", "健脾养心"]},
    {"中心词": "甘草", "类型": "中药", "别名": ["国老"], "性味": ["甘", "平"], "归经": ["心经"]},
    {"中心词": "黄连", "类型": "中药", "功效": ["清热燥湿", "泻火解毒"]},
]


def make_question(question, right, letter, last="丁"):
    options = ["甲", "乙", "丙", last]
    options["ABCD".index(letter)] = right
    options = dict(zip("ABCD", options))
    return {"question": question, "options": options, "answer": letter, "entity": None}


TEN = [
    # The stub knows the first four, whatever the order.
    (make_question("归脾汤出自哪部书？", "《济生方》", "C"), True),
    (make_question("国老的性味是", "甘、平", "B"), True),  # an alias; all parts are held
    (make_question("能泻火解毒的是", "黄连", "D"), True),  # an entity; the question names a value
    (make_question("黄连的归经是", "胃经", "A"), False),  # the base has no such value
    # Of the next four it says "A", whatever the question.
    (make_question("归脾汤的功效是", "益气补血", "A"), True),
    (
        make_question("石膏的功效是", "清热燥湿", "A"),
        False,
    ),  # a value, of nothing that is asked about
    (make_question("甘草的性味是", "甘，平", "B"), True),
    (make_question("甘草的性味是", "甘，温", "D"), False),  # one part is not held
    # It has no answer to this one, and "A" to one whose options point at each other.
    (make_question("能泻下的是", "黄连", "B"), False),
    (make_question("黄连可以治", "甲", "A", last="以上都是") | {"answer": "D"}, False),
]


class Stub:
    """What a model whose answers are known says to each question in each order."""

    def answers(self, questions):
        for i, question in enumerate(questions):
            for order in X.rotations(question):
                known = f"答案是{order['answer']}。"
                said = known if i < 4 else "我不知道。" if i == 8 else "A"
                yield {"answer": said}


def test_coverage_by_hand():
    coverage = X.Coverage(KNOWLEDGE)
    for question, held in TEN:
        assert coverage.holds(question) == held, question
    both = make_question("归脾汤的功效是", "益气补血", "A") | {"answer": "AB"}
    assert not coverage.holds(both)  # 乙 is not held
    both["options"]["B"] = "健脾养心"
    assert coverage.holds(both)


def test_rotations_and_groups_by_hand(monkeypatch):
    """Right as the file has it: 4 known + 2 where A is right. Over the orders: 4 + 4 x 1/4. In
    every order: 4. Of the 5 that the base holds 4 are right, of the other 5 two."""
    questions = [question | {"subject": "甲科"} for question, _ in TEN]
    questions[0]["subject"] = "乙科"
    monkeypatch.setattr(E, "choose", lambda _, question: "A")
    orders = [X.rotations(question) for question in questions]
    assert [len(turned) for turned in orders] == [4] * 9 + [1]
    choices = E.choices_of(None, questions, orders, Stub().answers(questions))
    scores = E.score_choices(questions, choices)
    shares = {name: score.value() for name, score in scores.items()}
    assert shares == {
        "choice by likelihood": pytest.approx(3 / 10),  # A stands for three right ones
        "choice by answer": pytest.approx(6 / 10),
        "choice over rotations": pytest.approx(5 / 10),
        "choice right in every order": pytest.approx(4 / 10),
        "choice not answered": pytest.approx(1 / 10),
    }
    assert scores["choice by answer"].chance == 0.25
    groups = E.question_groups(questions, KNOWLEDGE)
    rows = {row["group"]: row for row in E.break_down({"stub": scores}, groups)}
    counts = {group: row["questions"] for group, row in rows.items()}
    held, rest = "right option in the knowledge base", "not in it"
    assert counts == {"all": 10, held: 5, rest: 5, "甲科": 9, "乙科": 1}
    for group, name, value, ends in [
        ("all", "choice by answer", 0.6, (0.3127, 0.8318)),
        (held, "choice by answer", 4 / 5, (0.3755, 0.9638)),
        (rest, "choice by answer", 2 / 5, (0.1176, 0.7693)),
        (held, "choice over rotations", (3 + 2 / 4) / 5, None),
        (rest, "choice over rotations", (1 + 2 / 4) / 5, None),
        (rest, "choice not answered", 1 / 5, None),
        (held, "choice not answered", 0, (0, 0.4345)),
        ("乙科", "choice right in every order", 1, None),
    ]:
        cell = rows[group][name]
        assert cell["value"] == pytest.approx(value), (group, name)
        assert ends is None or np.allclose(cell["interval"], ends, atol=1e-4), (group, name)


def test_wilson_interval_is_the_published_one():
    """Newcombe 1998, table I, method 3; and by its definition: each end is the share from which
    k / n lies 1.96 standard errors away."""
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert np.allclose(X.wilson(k, n), (low, high), atol=5e-5)
    for k, n in ((3, 7), (1.5, 4), (40, 41)):
        for end in X.wilson(k, n):
            assert abs(k / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n))
    assert X.wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)
