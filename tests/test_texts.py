"""The texts under data/ that people wrote: rubrics, conclusions, seed tasks, questions."""

import json
import string
from collections import Counter

import pytest
from conftest import ROOT

DATA = ROOT / "data"
RUBRICS = {
    "sus": (1, 3, ["安全性", "可用性", "流畅性"]),
    "cmcoqa": (0, 3, ["完整性", "深刻性", "专业性"]),
    "cmb_clin": (1, 5, ["流畅性", "相关性", "完整性", "医学专业性"]),
}


def placeholders(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("name", RUBRICS)
def test_rubric(name):
    """Scale and dimensions are the paper's; the judge is told every level; the form shown is JSON
    with a score per key."""
    low, high, keys = RUBRICS[name]
    rubric = json.loads((DATA / "rubrics" / f"{name}.json").read_text(encoding="utf-8"))
    assert rubric["scale"] == [low, high] and [d["key"] for d in rubric["dimensions"]] == keys
    for dimension in rubric["dimensions"]:
        assert list(dimension["levels"]) == [str(s) for s in range(low, high + 1)]
        assert f"【{dimension['key']}】{dimension['description']}" in rubric["system"]
        assert all(f"{s}分：{text}" in rubric["system"] for s, text in dimension["levels"].items())
    form = json.loads(rubric["system"].splitlines()[-1].replace(": 整数", f": {low}"))
    assert set(form) == {*keys, "理由"}
    assert placeholders(rubric["user"]) == {"question", "answer"} | (
        {"reference"} if name == "cmb_clin" else set()
    )


def test_pairwise_rubric():
    rubric = json.loads((DATA / "rubrics" / "pairwise.json").read_text(encoding="utf-8"))
    assert rubric["verdicts"] == ["A", "B", "tie"] and all(
        f'"{v}"' in rubric["system"] for v in rubric["verdicts"]
    )
    assert json.loads(rubric["system"].splitlines()[-1])["verdict"] in rubric["verdicts"]
    assert placeholders(rubric["user"]) == {"question", "answer_a", "answer_b"}


def read_lines(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_literature():
    """Conclusions of two to four sentences, 60 to 200 characters, each under a title of its own."""
    rows = read_lines("literature.jsonl")
    assert len(rows) >= 64 and len({row["标题"] for row in rows}) == len(
        {row["结论"] for row in rows}
    ) == len(rows)
    for row in rows:
        assert list(row) == ["标题", "疾病", "结论", "来源类型"] and all(row.values())
        assert (
            60 <= len(row["结论"]) <= 200
            and 2 <= row["结论"].count("。") <= 4
            and row["结论"].endswith("。")
        )
        assert row["来源类型"] in ("指南共识", "系统综述", "随机对照试验", "队列研究")


def test_seed_tasks():
    rows = read_lines("seed_tasks.jsonl")
    assert len(rows) >= 60 and len({(row["instruction"], row["input"]) for row in rows}) == len(
        rows
    )
    assert sum(bool(row["input"]) for row in rows) >= 15
    for row in rows:
        assert (
            list(row) == ["instruction", "input", "output"]
            and row["instruction"]
            and 40 <= len(row["output"]) <= 250
        )


def test_choice():
    """200 questions, every letter 50 times. The right option names values of the relation, no other
    option names one."""
    knowledge = {entity["中心词"]: entity for entity in read_lines("knowledge.jsonl")}
    rows = read_lines("choice.jsonl")
    assert [row["id"] for row in rows] == [f"choice-{n:03d}" for n in range(1, 201)]
    assert Counter(row["answer"] for row in rows) == dict.fromkeys("ABCD", 50)
    assert Counter(knowledge[row["entity"]]["类型"] for row in rows) == {
        "中药": 60,
        "方剂": 60,
        "疾病": 80,
    }
    assert (
        len({row["question"] for row in rows})
        == len({(row["entity"], row["relation"]) for row in rows})
        == 200
    )
    for row in rows:
        assert list(row) == ["id", "question", "options", "answer", "subject", "entity", "relation"]
        assert list(row["options"]) == list("ABCD") and len(set(row["options"].values())) == 4
        values = knowledge[row["entity"]][row["relation"]]
        for letter, option in row["options"].items():
            parts = [option] if option in values else option.split("、")
            named = [part in values for part in parts]
            assert all(named) if letter == row["answer"] else not any(named), (row["id"], letter)


def test_calla():
    """60 pairs: the consistent statement names a value of the relation, the inconsistent one (the
    name apart) names none."""
    knowledge = {entity["中心词"]: entity for entity in read_lines("knowledge.jsonl")}
    rows = read_lines("calla.jsonl")
    assert [row["id"] for row in rows] == [f"calla-{n:02d}" for n in range(1, 61)]
    assert len({row["entity"] for row in rows}) == 60
    for row in rows:
        assert list(row) == ["id", "entity", "relation", "consistent", "inconsistent"]
        values = knowledge[row["entity"]][row["relation"]]
        right, wrong = row["consistent"], row["inconsistent"]
        assert row["entity"] in right and row["entity"] in wrong, row["id"]
        assert any(value in right for value in values), row["id"]
        assert not any(value in wrong.replace(row["entity"], "") for value in values), row["id"]
