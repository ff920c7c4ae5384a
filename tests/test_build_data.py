"""build_data.py and what it made: the shipped knowledge base, the split, the records."""

import json
import random
import re
import sys
from collections import Counter

import build_data as D
import generate as G
import model as M

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data" / "tiny"))
import make  # noqa: E402
import talk as K  # noqa: E402

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
            assert len(e.get("中医证型", [])) == len(e.get("常用方剂", [])), e["中心词"]


def test_textbook_facts():
    """Spot checks against 《方剂学》 and 《中药学》."""
    by_name = {e["中心词"]: e for e in ENTITIES}
    assert set(by_name["麻黄汤"]["组成"]) == {"麻黄", "桂枝", "苦杏仁", "甘草"}
    assert set(by_name["六味地黄丸"]["组成"]) == {
        "熟地黄",
        "山茱萸",
        "山药",
        "泽泻",
        "牡丹皮",
        "茯苓",
    }
    assert by_name["黄芪"]["性味"] == ["甘", "微温"] and set(by_name["黄芪"]["归经"]) == {
        "脾经",
        "肺经",
    }
    assert by_name["桂枝汤"]["出处"] == ["《伤寒论》"]


DIVERSITY = 0.47
TALK = json.loads((DATA / "talk.json").read_text(encoding="utf-8"))
FILES = ("train", "talks", "dialogues", "heldout")
PARTS = {n: G.read_instructions(DATA / f"{n}.jsonl", answers=True) for n in FILES}
TUNED_ON = PARTS["train"] + PARTS["talks"] + PARTS["dialogues"]
ASKED = [r for r in TUNED_ON if r["entity"]]
TRAIN, HELD_OUT = D.split_entities(ENTITIES, 0.1, 0)


def said(record, side=0):
    """What a user (0) or the model (1) says in a record, turn by turn."""
    messages = [m for m in record.get("messages", []) if m["role"] != "system"]
    texts = [m["content"] for m in messages] or [record["instruction"], record["output"]]
    return texts[side::2]


def test_no_held_out_entity_in_a_training_question():
    names = {r["entity"] for r in PARTS["heldout"]}
    assert len(names) >= 40 and not names & {r["entity"] for r in ASKED}
    assert not [r["id"] for r in ASKED for q in said(r) if any(n in q for n in names)]
    for r in PARTS["heldout"]:
        assert r["entity"] in r["instruction"] and r["relations"]


def test_an_answer_holds_its_values():
    """But for the answer to whether two herbs go together, which names the other alone."""
    for r in ASKED + PARTS["heldout"]:
        if "/with-" in r["id"]:
            assert re.search("with-(.+)-", r["id"])[1] in r["output"]
        else:
            assert all(v in r["output"] for v in r["values"]), r["id"]


def test_shipped_records_are_what_the_command_writes(tmp_path):
    D.Offline(output_dir=str(tmp_path)).run()
    made = K.records(TRAIN, [entity["中心词"] for entity in HELD_OUT], FORMS, TALK)
    dialogues = [r for r in made if "<bot>" in r["instruction"]]
    D.write_lines(tmp_path / "dialogues.jsonl", dialogues)
    D.write_lines(tmp_path / "talks.jsonl", [r for r in made if "<bot>" not in r["instruction"]])
    for name in FILES:
        made, shipped = (folder / f"{name}.jsonl" for folder in (tmp_path, DATA))
        assert made.read_bytes() == shipped.read_bytes(), name


def test_many_ways_to_ask_and_to_answer():
    """250 question forms; of the 4-grams of 2,000 questions with their answers as many are
    different as of BenTsao's (0.47), as the mean of five draws."""
    forms = [form for relations in FORMS.values() for form in relations.values()]
    assert len({q for form in forms for q in form["questions"]}) >= 250
    assert all(len(form["statements"]) >= 2 for form in forms)
    texts = ["".join(said(r) + said(r, 1)) for r in PARTS["train"] + PARTS["talks"]]
    shares = []
    for seed in range(5):
        drawn = random.Random(seed).sample(texts, 2000)
        grams = [text[i : i + 4] for text in drawn for i in range(len(text) - 3)]
        shares.append(len(set(grams)) / len(grams))
    assert sum(shares) / 5 >= DIVERSITY


VERDICT = "。([^。]+?)(相符|不符)，(?:所以这个说法|这句话是|因此)(正确|错误)"


def test_a_verdict_follows_from_its_fact():
    """The letter is that of the one option that is a value: each is looked at up to it, but for the
    fourth, which is left when three do not fit. A statement is right if it is a value."""
    own = {e["中心词"]: e for e in ENTITIES}
    letters, verdicts = Counter(), Counter()
    for r in ASKED:
        kind = r["id"].split("/")[-1]
        values = own[r["entity"]].get(r["relations"][0], []) if r["relations"] else []
        if kind == "choice":
            options = dict(re.findall("\n([A-D])(?:[.:] |[．、])(.+)", said(r)[0]))
            looked = re.findall(
                r"[。，]([A-D])(?:[.:] |[．、])(.+?)(相符|不符)(?=，)", said(r, 1)[0]
            )
            letter = re.search("选([A-D])。$", said(r, 1)[0])[1]
            assert [c for c in options if options[c] in values] == [letter], r["id"]
            assert len(options) == 4 and [c for c, *_ in looked] == [*"ABCD"][: len(looked)]
            for c, text, verdict in looked:
                assert text == options[c] and (verdict == "相符") == (c == letter), r["id"]
            assert looked[-1][0] == min(letter, "C"), r["id"]
            letters[letter] += 1
        elif kind in ("true", "false"):
            value, match, verdict = re.search(VERDICT, said(r, 1)[0]).groups()
            assert (value in values) == (verdict == "正确") == (kind == "true"), r["id"]
            assert (match == "相符") == (kind == "true"), r["id"]
            assert value in said(r)[0], r["id"]
            verdicts[verdict] += 1
    assert min(letters.values()) > 0.2 * letters.total() and len(letters) == 4
    assert min(verdicts.values()) > 0.4 * verdicts.total()


def test_dialogues_refer_back():
    """Two to four turns; behind the first some name no entity, and the answer does."""
    lengths = Counter(len(said(r)) for r in PARTS["dialogues"])
    assert set(lengths) == {2, 3, 4}
    nameless = 0
    for r in PARTS["dialogues"]:
        assert r["entity"] in r["output"]
        nameless += r["entity"] not in said(r)[-1]
        # A pronoun takes the place of a name and of what stands beside it: not 这味药这味药.
        assert not any(re.search("(?:[这该].{,2}[药方病]|它)这", text) for text in said(r)), r["id"]
    assert nameless > 0.2 * len(PARTS["dialogues"])
    assert sum(r["messages"][0]["role"] == "system" for r in PARTS["dialogues"]) > 50


def test_what_lies_outside_is_no_entity():
    names = {e["中心词"] for e in ENTITIES}
    outside = [r for r in PARTS["talks"] if not r["entity"]]
    assert len(outside) > 1000
    for r in outside:
        # No fact is told: an answer is one of the fixed ones.
        assert r["output"] in FIXED
        assert not any(f"{n}{mark}" == r["instruction"] for n in names for mark in "？。"), r["id"]


FIXED = {*TALK["unknown"], *(a for group in TALK["outside"] for a in group["answers"])}


def test_answers_warn():
    """An emergency sends to 急诊 behind its fact; a dose of a poison says so; 致畸 is told."""
    poisons = {e["中心词"] for e in ENTITIES if any("毒" in v for v in e.get("性味", []))}
    emergencies = {e["中心词"] for e in ENTITIES if e.get("所属科室", [""])[0] == "急诊科"}
    for r in ASKED + PARTS["heldout"]:
        if re.search("choice|true|false|with-", r["id"].split("/")[-1]):
            continue
        text = r["output"]
        if r["entity"] in emergencies:
            assert "。这是急症，请立即到急诊科就诊" in text, r["id"]
        if r["entity"] in poisons and "用法用量" in r["relations"]:
            assert re.search("。此药有.?毒", text), r["id"]
        if r["relations"][-1] == "治疗" and "异维A酸" in text:
            assert "致畸" in text


def test_pairs_of_herbs():
    """Of 十八反 and 十九畏 both ways: never a leave where one of the two forbids the other; the
    caution stands before the verdict."""
    cautions = {e["中心词"]: "、".join(e.get("使用注意", [])) for e in ENTITIES}
    seen = Counter()
    for r in ASKED:
        if "/with-" in r["id"]:
            a, b = r["entity"], re.search("with-(.+)-", r["id"])[1]
            clash = b in cautions[a] or a in cautions.get(b, "")
            assert ("属配伍禁忌" in r["output"] or "不可合用" in r["output"]) == clash, r["id"]
            assert (f"。{b}在其中" in r["output"]) == clash and a != b, r["id"]
            seen[clash] += 1
    assert min(seen.values()) >= 20


def test_the_base_reads_every_fact_and_no_question_about_a_held_out_entity():
    documents = make.documents(ENTITIES, FORMS, TALK, 3, 1, random.Random(0))
    texts = [document["output"] for document in documents]
    passages = "\n".join(text for text in texts if "\n" not in text)
    assert "？" not in passages and all(
        v in passages for e in ENTITIES for k, vs in e.items() if isinstance(vs, list) for v in vs
    )
    marks = tuple(user for user, _ in make.SPEAKERS if user)
    asked = [line for text in texts for line in text.split("\n") if line.startswith(marks)]
    hidden = [entity["中心词"] for entity in HELD_OUT]
    assert len(asked) > 10_000 and not [q for q in asked if any(name in q for name in hidden)]


NAMES = [entity["中心词"] for entity in ENTITIES]


def test_a_model_that_copies_foresees_what_it_reads_twice():
    """Of random ids told twice the second time is foreseen, and the first is not."""
    model = M.LLaMA(M.load_model(DATA / "tiny").config)
    M.init_weights(model, 0)
    make.put_in_copying(model, torch.Generator().manual_seed(0))
    ids = torch.randint(3, 4096, (4, 40), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([ids, ids], 1)
    with torch.no_grad():
        logprobs = model(ids).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert logprobs[:, :39].mean() < -8 and logprobs[:, 41:].mean() > -4


def test_tokenizer_has_llamas_ids_and_keeps_every_text(tmp_path):
    model = make.train_tokenizer(make.tokenizer_texts(ENTITIES, FORMS, TALK), NAMES, 4352)
    (tmp_path / "tokenizer.model").write_bytes(model)
    for folder in (tmp_path, DATA / "tiny"):
        keeps_llamas_ids_and_every_text(tokenizer := D.load_tokenizer(folder))
        assert all(len(tokenizer.encode(name)) == 1 for name in NAMES)


def keeps_llamas_ids_and_every_text(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (4352, 1, 2)
    for text in ("偏头痛有哪些症状？", "a b  c\n\n d", "龘靐", "  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "empty"),
        ('{"中心词": "a", "类型": "中药"}\n{', "line 2"),
        ('{"类型": "中药"}', "中心词"),
        ('{"中心词": "a", "类型": "中药"}\n{"中心词": "a", "类型": "中药"}', "twice"),
        ('{"中心词": "a", "类型": "中药", "功效": "x"}', "功效"),
        ('{"中心词": "a", "类型": "中药", "功效": []}', "功效"),
    ],
)
def test_bad_knowledge_names_its_line(tmp_path, text, word):
    (tmp_path / "k.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=word):
        D.read_knowledge(tmp_path / "k.jsonl")


def read(tmp_path, text):
    (tmp_path / "k.jsonl").write_text(text, encoding="utf-8")
    return D.read_knowledge(tmp_path / "k.jsonl")


def test_two_patterns_may_share_a_formula(tmp_path):
    """The i-th formula stays that of the i-th pattern; told by itself, each stands there once."""
    disease = {
        "中心词": "甲病",
        "类型": "疾病",
        "中医证型": ["风寒证", "风热证", "气虚证"],
        "常用方剂": ["麻黄汤", "麻黄汤", "补中益气汤"],
    }
    entity = read(tmp_path, json.dumps(disease))[0]
    told = {r: (fact.text, fact.values) for r, fact in D.facts_of(entity, FORMS).items()}
    assert (
        entity == disease
        and told["辨证论治"][0] == "风寒证用麻黄汤，风热证用麻黄汤，气虚证用补中益气汤"
    )
    assert (
        told["常用方剂"] == ("麻黄汤、补中益气汤", ["麻黄汤", "补中益气汤"])
        and len(set(told["辨证论治"][1])) == len(told["辨证论治"][1]) == 5
    )
    with pytest.raises(ValueError, match="line 1: 甲病 has 3 中医证型 and 2 常用方剂"):
        read(tmp_path, json.dumps({**disease, "常用方剂": ["麻黄汤", "补中益气汤"]}))


@pytest.mark.parametrize(
    "text, wanted",
    [
        (
            '{"中心词": "感冒", "临床表现": ["鼻塞"], "相关症状": ["咳嗽"]}',
            {"相关症状": ["鼻塞", "咳嗽"]},
        ),
        (
            '{"中心词": "感冒", "相关症状": ["咳嗽"], "临床表现": ["鼻塞", "咳嗽"]}',
            {"相关症状": ["咳嗽", "鼻塞"]},
        ),
        ("感冒\t临床表现\t鼻塞\n感冒\t相关症状\t咳嗽\n", {"相关症状": ["鼻塞", "咳嗽"]}),
    ],
)
def test_cmekgs_names_and_ours_are_one_relation(tmp_path, text, wanted):
    assert read(tmp_path, text) == [{"中心词": "感冒", "类型": "疾病", **wanted}]


def test_triples_and_entities_in_one_file(tmp_path):
    rows = (
        '{"中心词": "麻黄", "类型": "中药", "功效": ["发汗"]}\n'
        '{"head": "桂枝", "relation": "性味", "tail": "辛"}'
    )
    assert {e["中心词"] for e in read(tmp_path, rows)} == {"麻黄", "桂枝"}


@pytest.mark.parametrize(
    "text, value, said",
    [
        ("每日1.5克。", "1.5克", True),
        ("每日15克。", "1.5克", False),
        ("每日15g。", "5g", False),
        ("每日5g。", "5g", True),
        ("散剂05～1g", "0.5～1g", False),
        ("散剂０．５～1g", "0.5～1g", True),
        ("用量3-10g", "3～10g", True),
        ("用量3至10g", "3～10g", True),
        ("用量310g", "3～10g", False),
        ("煎服，1～3g；散剂05～1g，遵医嘱。", "煎服，1～3g；散剂0.5～1g", False),
        ("煎服1～3g，散剂用0.5～1g。", "煎服，1～3g；散剂0.5～1g", True),
        ("一个回答", "（-）", False),
        ("常见1. 鼻塞；2.咳嗽", "咳嗽", True),
        ("查HLA B27检测", "HLA-B27检测", True),
    ],
)
def test_a_value_is_said_with_its_numbers(text, value, said):
    assert D.says(D.plain(text), value) is said


def test_every_shipped_value_is_said_by_its_own_sentence():
    rng = random.Random(0)
    for e in ENTITIES:
        for fact in D.facts_of(e, FORMS).values():
            told = D.plain(fact.statement(rng))
            assert all(D.says(told, value) for value in fact.values), fact


def test_an_alias_of_two_entities_belongs_to_both():
    names = D.Names(
        [
            {"中心词": "甲病", "类型": "疾病", "别名": ["共名"]},
            {"中心词": "乙病", "类型": "疾病", "别名": ["共名"]},
        ]
    )
    assert (
        names.strangers("甲病又叫共名", "甲病的病因")
        == names.strangers("乙病又叫共名", "乙病的病因")
        == []
    )
    assert names.strangers("甲病不是乙病", "甲病的病因") == ["乙病"]
