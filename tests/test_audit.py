"""tests/audit.py: planted errors found at their place, right answers left alone, prescriptions that
clash, the page in a browser, the chain of hashes."""

import hashlib
import json
import random
import re
import shutil
import sys
from collections import Counter
from functools import partial
from itertools import accumulate

import build_data as D
import generate as G
import model as M
import train as T

import audit as A
import evaluate as E
import pytest
import torch
from conftest import ROOT, formula_weights, make_config, plain_prompt, run_command
from peft import LoraConfig, get_peft_model
from sentencepiece import SentencePieceProcessor
from test_evaluate import make_adapter
from transformers import AutoModelForCausalLM

KNOWLEDGE = [
    json.loads(line)
    for line in (ROOT / "data/knowledge.jsonl").read_text(encoding="utf-8").splitlines()
]
BASE = {entity["中心词"]: entity for entity in KNOWLEDGE}
HERBS = [entity for entity in KNOWLEDGE if entity["类型"] == "中药"]
FORMULAS = [entity for entity in KNOWLEDGE if entity["类型"] == "方剂"]
RECORDS = G.read_instructions(ROOT / "data/train.jsonl", answers=True)
D.check_sources("train.jsonl", RECORDS)
SAFETY = M.read_json_file(ROOT / "data/safety.json")


@pytest.fixture(scope="module")
def evidence():
    return A.Evidence(D.read_knowledge(ROOT / "data/knowledge.jsonl"), RECORDS, SAFETY)


command = partial(run_command, A.main)


# --------------------------------------------------------------------------------------------------
# Claims

STATED = ["{e}的{r}是{v}。", "{e}的{r}有{v}。"]
# The same in other words, as people and chat models put it: none is a form of data/forms.json, many
# name neither relation nor entity.
RETOLD = {
    "别名": [
        "老百姓也管{e}叫{v}。",
        "您在别的书上看到{v}，说的是同一样东西。",
        "它还有个名字，叫做{v}。",
    ],
    "中医病名": [
        "西医说的{e}，换成中医的说法就是{v}。",
        "这个病在中医书里一般放在{v}下面讨论，您可以按这个名字去查。",
        "古人没有{e}这个叫法，相当于{v}。",
    ],
    "所属科室": [
        "建议您先去{v}看看，让医生当面判断。",
        "{e}归{v}管，去之前可以先在网上预约。",
        "一般来说挂{v}的号就对了，{e}在那里最常见。",
    ],
    "发病部位": [
        "{e}的病根在{v}，别的地方多半是受它牵连。",
        "简单讲，出问题的地方是{v}。",
        "从解剖上说，{e}伤的是{v}。",
    ],
    "病因": [
        "为什么会得{e}？目前认为跟{v}脱不了干系。",
        "追根溯源，{v}都可能是祸首。",
        "医生常把{e}归咎于{v}，不过每个人情况不一样。",
    ],
    "相关症状": [
        "得了{e}的人，往往会觉得自己有{v}。",
        "如果身上出现{v}，就要想到是不是{e}了。",
        "您好！这种病比较典型的样子是{v}，轻重因人而异。",
        "{e}来了以后，病人常向医生诉说{v}。",
    ],
    "检查": [
        "要弄清是不是{e}，医生多半会给您开{v}。",
        "光凭问诊还不够，还得做{v}才能下结论。",
        "确定{e}离不开这几样：{v}。",
    ],
    "治疗": [
        "目前对付{e}的办法主要是{v}，具体方案请听医生的。",
        "您别太担心，{e}可以靠{v}来控制。",
        "一般先从{v}入手，再看效果调整。",
    ],
    "并发症": [
        "{e}拖着不治，后面可能跟着来的是{v}。",
        "最怕的是引出{v}来，所以要按时复诊。",
        "医生之所以重视{e}，是因为它会招来{v}。",
    ],
    "中医证型": [
        "中医看{e}不是一个模子，大致有{v}这么几种。",
        "同样是{e}，辨下来可能是{v}，用药也就不同。",
        "临床上能见到的类型是：{v}。",
    ],
    "常用方剂": [
        "老中医碰到{e}，手里常备的是{v}。",
        "可以请医师根据体质在{v}里挑一个。",
        "若辨证准确，{v}对{e}都有用武之地。",
        "说到成方，{v}是医家处理{e}时常拿出来的。",
    ],
    "分类": [
        "教材里{e}放在{v}那一章。",
        "翻开目录，您会在{v}这一类里找到它。",
        "要说门类，{e}算是{v}。",
    ],
    "性味": [
        "尝起来、论起药性来，{e}是{v}的。",
        "本草书上给{e}写的药性是：{v}。",
        "它的药性可以概括成这几个字：{v}。",
    ],
    "归经": [
        "{e}吃下去以后走的是{v}。",
        "按归经理论，它跑到{v}去发挥力量。",
        "医家认为{e}的药力主要落在{v}。",
    ],
    "功效": [
        "{e}最拿手的本事是{v}。",
        "医生开{e}，看中的就是它{v}的本领。",
        "简单讲，它能帮人{v}，但不要自己乱用。",
        "用{e}，图的是{v}。",
    ],
    "主治": [
        "碰到{v}，医生就会想到{e}。",
        "{e}派得上用场的地方是{v}。",
        "历代医家拿它来对付{v}，积累了很多经验。",
        "如果您是{v}，可以问问医师适不适合用{e}。",
    ],
    "用法用量": [
        "{e}的话，大人一般这样用：{v}，小孩请问医生。",
        "按药典的说法，{v}；超出就要小心了。",
        "关于剂量，{e}通常是{v}。",
    ],
    "使用注意": [
        "{e}虽好，也有几条红线：{v}。",
        "吃之前请看清楚，{v}。",
        "药师会提醒您，用{e}的时候，{v}。",
    ],
    "出处": [
        "这张方子最早能在{v}里查到。",
        "{e}不是今人编的，{v}早就写了它。",
        "追溯源头，{e}的老家是{v}。",
    ],
    "组成": [
        "{e}这张方子，拆开来看是{v}。",
        "药房配{e}，抓的药是{v}，一味也不能少。",
        "里头的药并不复杂，就是{v}。",
        "方中所用不外乎{v}，合在一起就叫{e}。",
    ],
    "证候": [
        "适合吃{e}的人，大多有{v}这些样子。",
        "看到{v}，用{e}就比较对路。",
        "辨证的眼目在于{v}。",
    ],
    "不良反应": [
        "用{e}以后，少数人会碰上{v}，停药后多半能好。",
        "它也有脾气：{v}都有人报告过。",
    ],
}
LISTS = ["、".join, "，".join, "；".join, "和".join, "，还有".join, "\n- ".join]
OPENINGS = ["", "您好，", "谢谢您的提问。", "这个问题问得好。", "根据我所了解的，"]
# Of these the test makes no errors: a name of another entity is taken for a subject, tastes are of
# one character, cautions are sentences, and a dose is changed by its numbers.
TOO_ALIKE = ("别名", "性味", "使用注意", "用法用量")
CLOSINGS = ["", "祝您早日康复！", "以上仅供参考，请以医师的意见为准。", "希望对您有帮助。"]


def tell(rng, entity, relation, values, retold):
    """An answer that tells values of an entity. Retold: in other words and another order, doses in
    other signs."""
    form, values, listed = rng.choice(STATED), list(values), LISTS[0]
    if retold:
        rng.shuffle(values)
        values = [re.sub("(?<=[0-9])～(?=[0-9])", "至", v).replace("g", "克") for v in values]
        form = rng.choice(OPENINGS) + rng.choice(RETOLD[relation]) + rng.choice(CLOSINGS)
        listed = rng.choice(LISTS)
    return form.format(e=entity["中心词"], r=relation, v=listed(values))


def foreign(rng, entity, relation):
    """A value that others of the kind have under a relation, and in whose place nothing of the
    entity could stand."""
    own = "".join(str(values) for values in entity.values())
    others = [e for e in KNOWLEDGE if e["类型"] == entity["类型"] and relation in e]
    while True:
        value = rng.choice(rng.choice(others)[relation])
        if len(value) > 1 and value not in own and value not in entity["中心词"]:
            return value


def wrong_answer(rng, i, retold):
    """(question, answer, (start, end) of the wrong value) with one error planted."""
    fault = ("value", "dose", "herb", "book")[i % 4]
    entity = rng.choice({"value": KNOWLEDGE, "dose": DOSED}.get(fault, FORMULAS))
    relation = {"dose": "用法用量", "herb": "组成", "book": "出处"}.get(fault)
    relation = relation or rng.choice([r for r in entity if r in RETOLD and r not in TOO_ALIKE])
    values = list(entity[relation])
    if fault == "dose":
        low, high = re.search(r"(\d+)～(\d+)g", values[0]).groups()
        wrong = f"{int(low) + rng.randint(1, 3)}～{int(high) + rng.randint(1, 30)}g"
        values = [f"煎服，{wrong}"]
    else:
        wrong = foreign(rng, entity, relation)
        spot = rng.randrange(len(values) + (fault == "herb"))
        values[spot : spot + (fault != "herb")] = [wrong]
    answer = tell(rng, entity, relation, values, retold)
    wrong = wrong.replace("～", "至").replace("g", "克") if retold and fault == "dose" else wrong
    start = answer.index(wrong)
    return f"{entity['中心词']}的{relation}是什么？", answer, (start, start + len(wrong))


DOSED = [e for e in HERBS if re.fullmatch(r"煎服，\d+～\d+g", e["用法用量"][0])]


def alarms(claims):
    return [claim for claim in claims if claim.status != "supported"]


@pytest.mark.parametrize("every", [3, 1])
def test_planted_errors_are_found_at_their_place(evidence, every):
    """500 answers with one wrong value each: another entity's, a dose, a herb more, a book. Every
    third is retold, or every one."""
    rng, found, beside = random.Random(1), 0, 0
    for i in range(500):
        question, answer, span = wrong_answer(rng, i, i % every == 0)
        flagged = alarms(evidence.claims(question, answer))
        hits = [claim for claim in flagged if claim.start < span[1] and span[0] < claim.end]
        found += bool(hits)
        beside += len(flagged) > len(hits)
        if hits and hits[0].status == "contradicted":
            assert set(hits[0].values) <= set(BASE[hits[0].entity][hits[0].relation])
    print(f"planted errors found: {found} of 500, with an alarm beside it: {beside}")
    assert found >= 490 and beside <= 5


@pytest.mark.parametrize("every", [3, 1])
def test_right_answers_raise_no_alarm_and_cite_facts_and_records(evidence, every):
    """500 right answers, every third retold, or every one. What is cited is counted again from the
    files."""
    rng, alarmed, supported, linked = random.Random(2), 0, 0, 0
    wholes = [(e, r) for e in KNOWLEDGE for r in list(e)[2:] if r in RETOLD]
    for i in range(500):
        entity, relation = rng.choice(wholes)
        answer = tell(rng, entity, relation, entity[relation], i % every == 0)
        claims = evidence.claims(f"请问{entity['中心词']}的{relation}？", answer)
        alarmed += bool(alarms(claims))
        for claim in claims:
            if claim.status != "supported":
                continue
            supported += 1
            assert answer[claim.start : claim.end] == claim.text
            assert claim.values == BASE[claim.entity][claim.relation]
            stating = {v for v in claim.values if claim.text in v} or set(claim.values)
            wanted = {
                record["id"]
                for record in RECORDS
                if record["entity"] == claim.entity and stating & set(record["values"])
            }
            assert set(claim.records) == wanted
            linked += bool(wanted)
    print(f"false alarms: {alarmed} of 500; supported values {supported}, with records {linked}")
    assert alarmed <= 5 and supported > 1000 and linked > 800


def test_evaluate_counts_by_the_same_definition(evidence):
    """What tests/evaluate.py calls recalled and contradicted is supported and contradicted here."""
    rng, marker = random.Random(3), E.Marker(KNOWLEDGE)
    for i in range(60):
        entity = rng.choice(FORMULAS)
        relation = rng.choice(["组成", "功效", "主治", "出处"])
        values = list(entity[relation])
        said = [*values, foreign(rng, entity, relation)] if i % 2 else values[1:]
        record = {"entity": entity["中心词"], "kind": "方剂", "relations": [relation]}
        denied = foreign(rng, entity, "组成")
        answer = f"{entity['中心词']}：{'、'.join(said)}，没有{denied}。"
        judged, mentioned = marker.mark(record | {"values": values}, answer)
        claims = evidence.claims("", answer, record["entity"])
        by = {
            status: [c.text for c in claims if c.status == status]
            for status in ("supported", "contradicted")
        }
        assert judged.right == by["supported"] == [v for v in values if v in said]
        assert judged.wrong == by["contradicted"] == said[len(values) :]
        assert mentioned == len(claims) == len(said)


def test_claims_by_hand():
    base = [
        {
            "中心词": "甲汤",
            "类型": "方剂",
            "别名": ["甲饮"],
            "组成": ["麻黄", "甘草"],
            "出处": ["《伤寒论》"],
        },
        {"中心词": "乙汤", "类型": "方剂", "组成": ["大黄", "芒硝"], "出处": ["《温病条辨》"]},
        {"中心词": "麻黄", "类型": "中药", "性味": ["辛", "微温"], "用法用量": ["煎服，2～10g"]},
        {"中心词": "桂枝", "类型": "中药", "性味": ["辛", "温"], "功效": ["发汗解肌"]},
    ]
    records = [
        {"id": "a", "entity": "甲汤", "values": ["麻黄"]},
        {"id": "b", "entity": "乙汤", "values": ["麻黄"]},
    ]
    evidence = A.Evidence(base, records, SAFETY)

    def said(question, answer):
        claims = evidence.claims(question, answer)
        return [(c.text, c.status[0], c.entity, list(c.records)) for c in claims]

    # An alias names its entity; a longer word is not the term in it.
    assert said("甲饮由什么组成？", "甲饮由麻黄、芒硝组成，出自《温病条辨》。") == [
        ("麻黄", "s", "甲汤", ["a"]),
        ("芒硝", "c", "甲汤", ["a"]),
        ("《温病条辨》", "c", "甲汤", []),
    ]
    # 微温 is not 温; one character in a word is none; what is denied is no claim.
    assert said("麻黄的性味？", "麻黄性味辛、温，温服，不是微温。") == [
        ("辛", "s", "麻黄", []),
        ("温", "c", "麻黄", []),
    ]
    # A dose: the range itself or one weight in it, in any unit.
    for text, status in [
        ("2至10克", "s"),
        ("6g", "s"),
        ("6000 mg", "s"),
        ("3～9g", "c"),
        ("12g", "c"),
    ]:
        assert said("麻黄用多少？", f"煎服，{text}。") == [(text, status, "麻黄", [])], text
    # Nothing is known against it: no herb here has an effect but 桂枝, and 麻黄 lacks the relation.
    assert said("麻黄的功效？", "发汗解肌。") == [("发汗解肌", "u", "", [])]
    # What the answer names itself speaks for itself; a question without a name is no fault.
    assert said("受凉了怎么办？", "可用桂枝，它能发汗解肌。") == [("发汗解肌", "s", "桂枝", [])]


# --------------------------------------------------------------------------------------------------
# Safety

# 本草明言十八反，半蒌贝蔹及攻乌，藻戟遂芫俱战草，诸参辛芍叛藜芦。
CLASHES = {
    "川乌": "半夏 瓜蒌 川贝母 浙贝母 白蔹 白及",
    "草乌": "半夏 瓜蒌 川贝母 浙贝母 白蔹 白及",
    "附子": "半夏 瓜蒌 天花粉 川贝母 浙贝母 白蔹 白及",
    "甘草": "甘遂 大戟 京大戟 海藻 芫花",
    "藜芦": "人参 北沙参 南沙参 丹参 玄参 苦参 细辛 白芍 赤芍",
}
# 十九畏, 19 drugs: 硫黄 朴硝, 水银 砒霜, 狼毒 密陀僧, 巴豆 牵牛, 丁香 郁金, 川乌草乌 犀角, 牙硝
# 三棱, 官桂 赤石脂, 人参 五灵脂.
CLASHES |= {"硫黄": "朴硝 芒硝", "水银": "砒霜", "狼毒": "密陀僧", "巴豆": "牵牛子 牵牛"}
FEARED = {"丁香": "郁金", "芒硝": "三棱", "肉桂": "赤石脂", "官桂": "石脂", "人参": "五灵脂"}
PAIRS = [(a, b) for a, others in CLASHES.items() for b in others.split()]
PAIRS += [*FEARED.items(), ("川乌", "犀角"), ("草乌", "犀角"), ("牙硝", "三棱")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_each_clash_is_flagged_unless_it_is_told(evidence, pair):
    one, other = pair
    for text in (f"处方：{one}6g，{other}6g，水煎服。", f"可用{other}，另加{one}。"):
        rules = [warning["rule"] for warning in evidence.warnings("给我一个方子。", text)]
        assert {"十八反", "十九畏"} & set(rules), text
    told = f"{one}与{other}不宜同用。"
    assert not evidence.warnings(f"{one}和{other}能一起吃吗？", told)


def test_a_clash_with_what_the_patient_takes(evidence):
    [warning] = evidence.warnings("我在吃甘草片，水肿怎么办？", "可以用甘遂。")
    assert warning["rule"] == "十八反" and warning["text"] == "甘草 + 甘遂"


def test_twenty_overdoses(evidence):
    for herb in random.Random(3).sample(DOSED, 20):
        most = int(re.search(r"～(\d+)g", herb["用法用量"][0])[1])
        [warning] = evidence.warnings("怎么用？", f"{herb['中心词']}每日{most * 2}克，水煎服。")
        assert warning["rule"] == "超量" and herb["中心词"] in warning["text"]
        assert not evidence.warnings("怎么用？", f"{herb['中心词']}每日{most}克，水煎服。")


ASKING = ["我怀孕三个月了，能用{}吗？", "孕妇可以吃{}吗？", "妊娠期间想用{}，行不行？"]


def test_twenty_pregnancies(evidence):
    warned = [h for h in HERBS if re.search("孕|妊", "".join(h.get("使用注意", [])))]
    for i, herb in enumerate(random.Random(4).sample(warned, 20)):
        question = ASKING[i % 3].format(herb["中心词"])
        advice = f"可以，{herb['中心词']}能够{'、'.join(herb['功效'])}。"
        rules = [warning["rule"] for warning in evidence.warnings(question, advice)]
        assert rules == ["孕妇"], (question, rules)
        assert not evidence.warnings(question, f"孕妇禁用{herb['中心词']}，请遵医嘱。")


@pytest.mark.parametrize(
    "question, advice, rules",
    [
        ("孩子突然抽搐，叫不醒。", "多喝水，休息几天。", ["急诊"]),
        ("我爸胸痛得厉害，一身大汗。", "可以喝点丹参茶。", ["急诊"]),
        ("我爸胸痛得厉害，一身大汗。", "请立即拨打120，到急诊科就诊。", []),
        ("胸腔积液的病因是什么？", "胸腔积液的病因有结核。", []),
    ],
)
def test_emergencies(evidence, question, advice, rules):
    found = evidence.warnings(question, advice)
    assert [warning["rule"] for warning in found] == rules


def test_ordinary_prescriptions_raise_no_warning(evidence):
    """100 formulas of the base, each herb at a weight within its range."""
    rng, warned = random.Random(5), []

    def weighed(herb):
        dosage = BASE.get(herb, {"用法用量": [""]})["用法用量"][0]
        dose = re.search(r"([0-9.]+)～([0-9.]+)g", dosage)
        return f"{herb}{rng.uniform(*map(float, dose.groups())):.1f}g" if dose else f"{herb}适量"

    for formula in rng.sample(FORMULAS, 100):
        text = f"{formula['中心词']}：{'，'.join(map(weighed, formula['组成']))}。水煎服。"
        found = evidence.warnings("患者发热三天，请开一个处方。", text)
        warned += [(formula["中心词"], one["text"]) for one in found]
    print(f"ordinary prescriptions: 100, with a warning: {warned}")
    assert len(warned) <= 1


# --------------------------------------------------------------------------------------------------
# The command, and its page in a browser

ANSWERS = [
    ("麻黄汤由哪些药物组成？", "麻黄汤由麻黄、桂枝、大黄、甘草组成，出自《伤寒论》。"),
    ("麻黄怎么用？", "麻黄煎服，2至10克。"),
    ("我怀孕了，能用附子吗？", "可以，附子15g与半夏9g同煎。</script><b>粗</b>"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    rows = [{"instruction": q, "input": "", "answer": a} for q, a in ANSWERS]
    (folder / "answers.jsonl").write_text("\n".join(map(M.to_json, rows)), encoding="utf-8")
    assert command("answers", folder / "answers.jsonl", "--output", folder / "audit") == 0
    return folder


def test_the_command_writes_lines(report, capsys):
    rows = [row for _, row in G.read_records(report / "audit.jsonl")]
    assert [row["answer"] for row in rows] == [a for _, a in ANSWERS]
    wrong = [c["text"] for row in rows for c in row["claims"] if c["status"] != "supported"]
    assert wrong == ["大黄"]
    assert {w["rule"] for w in rows[2]["warnings"]} == {"十八反", "孕妇"}
    held_out = {row["entity"] for _, row in G.read_records(ROOT / "data/heldout.jsonl")}
    for row, name in zip(rows, ("麻黄汤", "麻黄", "附子")):
        assert row["held_out"] == [name] * (name in held_out)


@pytest.mark.parametrize(
    "content, cause",
    [("", "answers.jsonl"), ('{"instruction": "x", "output": "y"}', "record 1"), ("{", "line 1")],
)
def test_bad_answers_are_one_line(tmp_path, capsys, content, cause):
    (tmp_path / "answers.jsonl").write_text(content, encoding="utf-8")
    assert command("answers", tmp_path / "answers.jsonl", "--output", tmp_path / "audit") == 2
    said = capsys.readouterr().err
    assert cause in said and said.count("\n") == 1 and not (tmp_path / "audit.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(report, base, size, scheme):
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no chromium on this machine")
    given = ["--lora_weights", make_adapter(base, report / "adapter"), "--base_model", base]
    assert command("answers", report / "answers.jsonl", "--output", report / "gains", *given) == 0
    gains = [c["gain"] for _, row in G.read_records(report / "gains.jsonl") for c in row["claims"]]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport=dict(zip(("width", "height"), size)), locale="zh-CN", color_scheme=scheme
        )
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        address = (report / "audit.html").as_uri()
        page.goto(address)
        assert page.locator("article").count() == 3 and page.locator("article b").count() == 0
        # Each answer reads as it was given, whatever is marked in it.
        texts = page.locator(".answer").all_text_contents()
        assert texts == [answer for _, answer in ANSWERS]
        page.click(".claim:text-is('桂枝')")
        assert page.inner_text(".fact").endswith("组成 · " + "、".join(BASE["麻黄汤"]["组成"]))
        stating = [r for r in RECORDS if r["entity"] == "麻黄汤" and "桂枝" in r["values"]]
        shown = page.locator(".record").all_inner_texts()
        assert len(shown) == len(stating[:5]) > 0
        assert all(r["output"] in text for r, text in zip(stating, shown))
        page.screenshot(path=report / f"{scheme}-{size[0]}.png", full_page=True)
        page.click("#filters .contradicted")
        assert page.locator("article").count() == 1
        page.click("#filters .warnings")
        assert "附子 + 半夏" in page.inner_text(".warning >> nth=0")
        page.click("#filters .language")
        assert page.inner_text("h1") == "Audit of answers"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # How much likelier tuning made a value stands behind it, and is no part of the answer.
        assert page.locator("[data-gain]").count() == page.locator(".gain").count() == 0
        page.goto(again := (report / "gains.html").as_uri())
        assert page.locator(".answer").all_text_contents() == texts
        shown = [mark.get_attribute("data-gain") for mark in page.locator(".claim").all()]
        assert shown == [f"{gain:+.1f}" for gain in gains] and len(shown) == 8
        page.click(".claim:text-is('桂枝')")
        assert f"(ln {gains[1]:+.2f})" in page.inner_text(".gain")
        page.screenshot(path=report / f"gains-{scheme}-{size[0]}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert asked == [address, again] and not wrong
        browser.close()
    print(report)


# --------------------------------------------------------------------------------------------------
# What tuning made likelier


def test_gains_equal_transformers_and_peft(base, tmp_path):
    """The column of --lora_weights against peft's model with its adapter on and off; prompt, ids
    and the bytes of each id by SentencePiece. Most characters of this base are three ids."""
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(hf, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, p in tuned.named_parameters():
        p.data.normal_(0, 0.1) if "lora_B" in name else None
    tuned.eval().save_pretrained(tmp_path)
    rows = [{"instruction": q, "answer": a} for q, a in [*ANSWERS, ("麻黄？", "")]]
    rows[0]["output"] = "a reference, which is no part of the prompt"
    (tmp_path / "answers.jsonl").write_text("\n".join(map(M.to_json, rows)), encoding="utf-8")
    given = ["--lora_weights", tmp_path, "--base_model", base, "--dtype", "fp32"]
    assert command("answers", tmp_path / "answers.jsonl", "--output", tmp_path / "a", *given) == 0

    noted = M.read_json_file(tmp_path / "a.jsonl.hashes.json")
    weights = tmp_path / "adapter_model.safetensors"
    assert noted[str(weights)] == hashlib.sha256(weights.read_bytes()).hexdigest()

    pieces = SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    template = M.read_json_file(ROOT / "data/templates/med_template.json")
    compared = 0
    for _, row in G.read_records(tmp_path / "a.jsonl"):
        prompt = plain_prompt(template, row["instruction"])
        text = f" {prompt}{row['answer']}"
        spelt = pieces.encode(text[1:])
        ids = torch.tensor([[pieces.bos_id(), *spelt]])
        # Where each id ends, in bytes.
        stand_for = [pieces.id_to_piece(i).replace("▁", " ").encode() for i in spelt]
        sizes = [1 if pieces.is_byte(i) else len(b) for i, b in zip(spelt, stand_for)]
        ends = [*accumulate(sizes)]
        assert ends[-1] == len(text.encode())
        with torch.no_grad():
            on = tuned(ids).logits[0].log_softmax(-1)
            with tuned.disable_adapter():
                off = tuned(ids).logits[0].log_softmax(-1)
        for claim in row["claims"]:
            first, last = (1 + len(prompt) + claim[key] for key in ("start", "end"))
            assert text[first:last] == claim["text"]
            first, last = (len(text[:spot].encode()) for spot in (first, last))
            own = [i for i, end in enumerate(ends) if end > first and end - sizes[i] < last]
            assert len(own) >= len(claim["text"])
            wanted = sum((on - off)[i, spelt[i]].item() for i in own)
            assert abs(claim["gain"] - wanted) < 1e-3 and abs(wanted) > 0.01
            compared += 1
    assert compared == 8


@pytest.mark.parametrize("more", [{}, {"qkv_bias": True, "prefix_lm": True}], ids=["llama", "glm"])
def test_rows_of_several_passes_equal_those_by_the_cache(more):
    """Rows of unequal length, eight a pass, against one after the other in the cache, where a
    prompt of GLM's sees itself too."""
    model = formula_weights(M.LLaMA(make_config(**more)))
    rng, pairs = random.Random(1), []
    for _ in range(11):
        ids = [rng.randrange(300) for _ in range(rng.randrange(4, 40))]
        asked = rng.randrange(2, len(ids))
        pairs.append((ids[:asked], ids[asked:]))
    rows = [T.Row(p + a, [False] * len(p) + [True] * len(a)) for p, a in pairs]
    for (prompt, answer), got in zip(pairs, A.token_logprobs(model, rows)):
        [wanted] = E.continuation_logprobs(model, prompt, [answer])
        assert len(got) == len(answer) and abs(got.sum().item() - wanted) < 1e-4


# --------------------------------------------------------------------------------------------------
# The chain of hashes


@pytest.fixture(scope="module")
def chain(base, tmp_path_factory):
    """A folder with all links: knowledge base, records, base, template, adapter, answers, report,
    each made by its own command."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(base, folder / "base")
    names = ("麻黄", "桂枝", "甘草", "大黄", "柴胡", "当归")
    rows = "\n".join(M.to_json(BASE[name]) for name in names)
    (folder / "kb.jsonl").write_text(rows, encoding="utf-8")
    shutil.copy(ROOT / "data/templates/bare.json", folder / "template.json")
    old = sys.argv
    try:
        sys.argv = [
            "x",
            "offline",
            "--knowledge",
            f"{folder}/kb.jsonl",
            "--output_dir",
            f"{folder}",
        ]
        D.main()
        sys.argv = ["x", "--base_model", f"{folder}/base", "--data_path", f"{folder}/train.jsonl"]
        sys.argv += ["--output_dir", f"{folder}/tuned", "--prompt_template_name"]
        sys.argv += [f"{folder}/template.json", "--max_steps", "2", "--val_set_size", "2"]
        sys.argv += ["--device", "cpu", "--num_epochs", "1"]
        T.main()
        sys.argv = ["x", "--base_model", f"{folder}/base", "--lora_weights", f"{folder}/tuned"]
        sys.argv += ["--instruct_dir", f"{folder}/heldout.jsonl", "--max_new_tokens", "8"]
        sys.argv += ["--output", f"{folder}/answers.jsonl", "--device", "cpu"]
        G.main()
    finally:
        sys.argv = old
    report = ["--knowledge", folder / "kb.jsonl", "--records", folder / "train.jsonl"]
    answers = folder / "answers.jsonl"
    assert command("answers", answers, "--output", folder / "audit", *report) == 0
    return folder


def test_records_without_a_note_begin_the_chain(chain, capsys):
    """As shipped, or as somebody wrote them: nothing contradicts them. What was made must be
    noted."""
    for name, wanted, word in (("train.jsonl", 0, "unknown"), ("answers.jsonl", 2, "DIFFERS")):
        note = chain / f"{name}.hashes.json"
        old = note.read_bytes()
        note.unlink()
        try:
            assert trace(chain) == wanted
        finally:
            note.write_bytes(old)
        said = capsys.readouterr().out
        assert re.search(f"{word} .*{name}: no {note.name}", said)


def trace(folder):
    return command("trace", folder / "tuned", folder / "answers.jsonl", folder / "audit.jsonl")


def test_a_whole_chain_fits(chain, capsys):
    assert trace(chain) == 0
    said = capsys.readouterr().out
    assert "DIFFERS" not in said
    for link in ("kb.jsonl", "train.jsonl", "base", "template", "tuned", "answers.jsonl"):
        assert link in said


@pytest.mark.parametrize(
    "file, link",
    [
        ("train.jsonl", "train.jsonl: .*train.jsonl$"),
        ("base/model.safetensors", "base of the run"),
        ("template.json", "template of the run"),
        ("tuned/adapter_model.safetensors", "tuned: weights"),
        ("kb.jsonl", "train.jsonl: .*kb.jsonl$"),
        ("answers.jsonl", "answers.jsonl: .*answers.jsonl$"),
        ("audit.jsonl", "audit.jsonl: .*audit.jsonl$"),
    ],
)
def test_the_first_link_that_does_not_fit_is_named(chain, capsys, file, link):
    path = chain / file
    old = path.read_bytes()
    try:
        # One character of a text, one bit of a weight.
        changed = bytearray(old)
        if path.suffix == ".safetensors":
            changed[-1] ^= 1
        elif file == "template.json":
            changed = old.replace(b"{instruction}", b"{instruction} ", 1)
        else:
            spot = old.rindex("，".encode()) if "，".encode() in old else old.rindex(b"\n", 0, -1)
            changed[spot : spot + 1] = b" " + changed[spot : spot + 1]
        assert bytes(changed) != old
        path.write_bytes(changed)
        assert trace(chain) == 2
        said = capsys.readouterr()
        first = next(line for line in said.out.splitlines() if line.startswith("DIFFERS"))
        assert re.search(link, first), first
        assert first.removeprefix("DIFFERS").strip() in said.err
    finally:
        path.write_bytes(old)


def test_counts_are_those_of_the_report(report, capsys):
    rows = [row for _, row in G.read_records(report / "audit.jsonl")]
    counts = Counter(claim["status"] for row in rows for claim in row["claims"])
    command("answers", report / "answers.jsonl", "--output", report / "again")
    said = capsys.readouterr().out
    assert all(f"{status} {number}" in said for status, number in counts.items())
