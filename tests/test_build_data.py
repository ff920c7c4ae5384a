"""build_data.py and what it made: the shipped knowledge base, the split, the records."""
import json
import random
import sys
from collections import Counter

import pytest
from conftest import ROOT

import build_data as D
import generate as G

sys.path.insert(0, str(ROOT / "data" / "tiny"))
import make  # noqa: E402

DATA = ROOT / "data"
FORMS = json.loads((DATA / "forms.json").read_text(encoding="utf-8"))
ENTITIES = D.read_knowledge(DATA / "knowledge.jsonl")


def test_knowledge_base_is_whole():
    """Counts the project promises, and the rules of its data card."""
    kinds = Counter(e["类型"] for e in ENTITIES)
    assert kinds["疾病"] >= 150 and kinds["中药"] >= 150 and kinds["方剂"] >= 100
    for e in ENTITIES:
        assert set(e) - {"中心词", "类型"} <= set(FORMS[e["类型"]]), e["中心词"]
        assert all(len(v) == len(set(v)) for k, v in e.items() if isinstance(v, list)), e["中心词"]
        if e["类型"] == "疾病":
            assert len(e["中医证型"]) == len(e["常用方剂"]), e["中心词"]


def test_textbook_facts():
    """Spot checks against 《方剂学》 and 《中药学》."""
    by_name = {e["中心词"]: e for e in ENTITIES}
    assert set(by_name["麻黄汤"]["组成"]) == {"麻黄", "桂枝", "苦杏仁", "甘草"}
    assert set(by_name["六味地黄丸"]["组成"]) == {"熟地黄", "山茱萸", "山药", "泽泻", "牡丹皮", "茯苓"}
    assert by_name["黄芪"]["性味"] == ["甘", "微温"] and set(by_name["黄芪"]["归经"]) == {"脾经", "肺经"}
    assert by_name["桂枝汤"]["出处"] == ["《伤寒论》"]


def test_no_held_out_entity_in_a_training_question():
    train, heldout = (G.read_instructions(DATA / f"{n}.jsonl", answers=True) for n in ("train", "heldout"))
    names = {r["entity"] for r in heldout}
    assert len(names) >= 40 and not names & {r["entity"] for r in train}
    assert not [r["id"] for r in train if any(n in r["instruction"] for n in names)]
    for r in train + heldout:
        assert all(v in r["output"] for v in r["values"]) and r["entity"] in r["instruction"] and r["relations"]
    assert len({r["id"] for r in train + heldout}) == len(train) + len(heldout)


def test_shipped_records_are_what_the_command_writes():
    train, heldout = D.split_entities(ENTITIES, 0.1, 0)
    shipped = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert D.write_records(heldout, FORMS, 1, random.Random(0)) == shipped


def test_sentences_tell_every_fact_and_ask_nothing():
    documents = [d["output"] for d in make.write_sentences(ENTITIES, FORMS, 2, random.Random(0))]
    text = "\n".join(documents)
    assert "？" not in text and all(v in text for e in ENTITIES for k, vs in e.items() if isinstance(vs, list) for v in vs)


def test_tokenizer_has_llamas_ids_and_keeps_every_text(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(make.train_tokenizer(ENTITIES, FORMS, 4096))
    for tokenizer in (G.Tokenizer(path), G.Tokenizer(DATA / "tiny" / "tokenizer.model")):
        keeps_llamas_ids_and_every_text(tokenizer)


def keeps_llamas_ids_and_every_text(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (4096, 1, 2)
    for text in ("偏头痛有哪些症状？", "a b  c\n\n d", "龘靐", "  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text, word", [
    ("", "empty"), ('{"中心词": "a", "类型": "中药"}\n{', "line 2"), ('{"类型": "中药"}', "中心词"),
    ('{"中心词": "a", "类型": "中药"}\n{"中心词": "a", "类型": "中药"}', "twice"),
    ('{"中心词": "a", "类型": "中药", "功效": "x"}', "功效"), ('{"中心词": "a", "类型": "中药", "功效": []}', "功效")])
def test_bad_knowledge_names_its_line(tmp_path, text, word):
    (tmp_path / "k.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=word):
        D.read_knowledge(tmp_path / "k.jsonl")
