"""Records as users have them: every form gives the same prompt, the right targets, the known figures; a bad one is named."""
import json
import sys

import pytest
from conftest import ROOT
from test_train import BENTSAO

import generate as G
import train as T

TURNS = [("肝癌怎么治？", "手术为主。"), ("有副作用吗？", "有，疼痛。"), ("怎么办？", "请就医。")]
MESSAGES = [{"role": role, "content": text} for turn in TURNS for role, text in zip(("user", "assistant"), turn)]
LITERATURE = {"instruction": " <user>: 肝癌怎么治？ <bot>: 手术为主。 <user>: 有副作用吗？ <bot>: 有，疼痛。 <user>: 怎么办？",
              "output": "请就医。", "input": "", "id": 7}
SEVERAL = {
    "literature": LITERATURE,
    "literature without its space": {**LITERATURE, "instruction": LITERATURE["instruction"][1:]},
    "messages": {"messages": MESSAGES},
    "conversations": {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                                        for m in MESSAGES]},
    "history": {"instruction": "怎么办？", "input": "", "output": "请就医。", "history": [list(t) for t in TURNS[:2]]}}
ONE = {
    "alpaca": {"instruction": "黄芪有什么功效？", "input": "", "output": "补气。"},
    "alpaca without input": {"instruction": "黄芪有什么功效？", "output": "补气。"},
    "messages": {"messages": [{"role": "user", "content": "黄芪有什么功效？"}, {"role": "assistant", "content": "补气。"}]},
    "conversations": {"conversations": [{"from": "human", "value": "黄芪有什么功效？"}, {"from": "gpt", "value": "补气。"}]},
    "history": {"instruction": "黄芪有什么功效？", "output": "补气。", "history": []},
    "med-chatglm": {"context": "问题：黄芪有什么功效？\n回答: ", "target": "补气。"}}


def read(path, rows, lines, **kwargs):
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) if lines else json.dumps(rows, ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8")
    return G.read_instructions(path, **kwargs)


@pytest.mark.parametrize("lines, name", [(True, "a.json"), (False, "a.jsonl"), (True, "a.txt"), (False, "a")])
def test_every_form_is_the_same_record(tmp_path, lines, name):
    for form, row in SEVERAL.items():
        record, = read(tmp_path / name, [row], lines, answers=True)
        assert (record["instruction"], record["input"], record["output"]) == (LITERATURE["instruction"], "", "请就医。"), form
        assert record["instruction"] == G.render_turns([*TURNS[:2], (TURNS[2][0], None)])         # as a chat renders it
    for form, row in ONE.items():
        record, = read(tmp_path / name, [row], lines, answers=True)
        assert (record["instruction"], record["input"], record["output"]) == ("黄芪有什么功效？", "", "补气。"), form
    assert read(tmp_path / name, [LITERATURE], lines)[0]["id"] == 7                               # what else stood there stays


def test_a_file_has_one_form(tmp_path):
    """One record of several turns makes its file one of conversations, so that a chat's first prompt was trained too."""
    first, second = read(tmp_path / "a", [ONE["messages"], SEVERAL["messages"]], True)
    assert first["instruction"] == " <user>: 黄芪有什么功效？" and second["instruction"] == LITERATURE["instruction"]
    system = {"messages": [{"role": "system", "content": "你是中医。"}, *ONE["messages"]["messages"]]}
    assert read(tmp_path / "a", [system], True)[0]["instruction"] == "你是中医。\n黄芪有什么功效？"
    question, = read(tmp_path / "a", [{"messages": MESSAGES[:5]}], True)          # to be asked: no answer yet
    assert question["instruction"] == LITERATURE["instruction"] and "output" not in question
    given, = read(tmp_path / "a", [{"instruction": "问", "input": "背景", "output": "答", "history": [["甲", "乙"]]}], True)
    assert given["instruction"] == " <user>: 甲 <bot>: 乙 <user>: 问\n背景" and given["input"] == ""


BAD = {"role": {"messages": [{"role": "tool", "content": "x"}]}, "twice": {"messages": [MESSAGES[0], MESSAGES[0]]},
       "bot first": {"messages": MESSAGES[1:]}, "no answer": {"messages": MESSAGES[:5]}, "no text": {"messages": [{"role": "user"}]},
       "late system": {"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, "empty": {"messages": []},
       "not a list": {"conversations": "x"}, "history": {**ONE["alpaca"], "history": [["q"]]}, "parts": {"messages": ["q", "a"]},
       "history text": {**ONE["alpaca"], "history": "q"}, "target": {"context": "问题：x\n回答: "}, "input": {**ONE["alpaca"], "input": 3}}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_its_line(tmp_path, name):
    with pytest.raises(ValueError, match="line 2: ") as error:
        read(tmp_path / "a", [ONE["alpaca"], BAD[name]], True, answers=True)
    assert "\n" not in str(error.value)
