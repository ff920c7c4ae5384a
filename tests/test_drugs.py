"""The knowledge base's drugs and emergencies, against lists written from textbooks and labels."""

import json
import re
from itertools import chain

import build_data as D

import pytest
from conftest import ROOT

LINES = (ROOT / "data" / "knowledge.jsonl").read_text(encoding="utf-8").splitlines()
ROWS = {row["中心词"]: row for row in map(json.loads, LINES)}
KINDS = {name: row["类型"] for name, row in ROWS.items()}
DRUGS = {name: row for name, row in ROWS.items() if KINDS[name] == "药物"}
DISEASES = {name: row for name, row in ROWS.items() if KINDS[name] == "疾病"}


def words(text):
    return text.split()


# What every drug tells; 别名 and nothing else may be added.
WANTED = {"分类", "主治", "用法用量", "不良反应", "使用注意", "药物相互作用"}

EMERGENCIES = words("""
    急性心肌梗死 不稳定型心绞痛 急性左心衰竭 高血压急症 心脏骤停 主动脉夹层 肺血栓栓塞症 自发性气胸
    脑梗死 脑出血 短暂性脑缺血发作 蛛网膜下腔出血 化脓性脑膜炎 流行性乙型脑炎 热性惊厥 肝性脑病
    急性会厌炎 小儿急性喉炎 气管支气管异物 急性闭角型青光眼
    上消化道出血 消化性溃疡穿孔 急性阑尾炎 急性胆囊炎 急性胰腺炎 肠梗阻 粘连性肠梗阻 肠套叠
    异位妊娠 产后出血 子痫前期 卵巢囊肿蒂扭转 睾丸扭转
    糖尿病酮症酸中毒 低血糖症 脓毒症 过敏性休克 破伤风
    中暑 热射病 急性有机磷农药中毒 急性一氧化碳中毒 烧伤 犬咬伤
""")


def test_drugs_tell_what_a_label_tells():
    assert len(DRUGS) >= 45
    for name, drug in DRUGS.items():
        assert set(drug) - {"中心词", "类型", "别名"} == WANTED, name


@pytest.mark.parametrize("name", ["阿莫西林", "青霉素"])
def test_penicillins_want_a_skin_test(name):
    assert any("皮试" in value for value in DRUGS[name]["使用注意"])


@pytest.mark.parametrize(
    "name", ["异维A酸", "沙利度胺", "甲氨蝶呤", "丙戊酸钠", "苯妥英钠", "卡马西平"]
)
def test_teratogens_say_so(name):
    assert any("致畸" in value for value in DRUGS[name]["使用注意"])


@pytest.mark.parametrize(
    "name",
    words("缬沙坦 依那普利 阿托伐他汀 华法林 异维A酸 沙利度胺 甲氨蝶呤 丙戊酸钠 左氧氟沙星"),
)
def test_drugs_that_harm_an_unborn_child(name):
    """Contraindicated in pregnancy by the label."""
    assert "孕妇禁用" in DRUGS[name]["使用注意"]


# Largest daily dose of a label in mg, for doses written as "一次A～Bmg，一日C～D次".
@pytest.mark.parametrize(
    "name, most",
    [
        ("布洛芬", 800),
        ("对乙酰氨基酚", 2000),
        ("左氧氟沙星", 750),
        ("氨氯地平", 10),
        ("硝苯地平", 60),
        ("美托洛尔", 400),
        ("奥美拉唑", 40),
        ("氯雷他定", 10),
        ("西替利嗪", 10),
        ("多潘立酮", 30),
        ("氨茶碱", 1000),
        ("右美沙芬", 120),
        ("地高辛", 0.25),
        ("阿托伐他汀", 80),
        ("阿昔洛韦", 4000),
        ("氢氯噻嗪", 100),
        ("阿司匹林", 4000),
    ],
)
def test_daily_dose_is_within_the_label(name, most):
    doses = [d for d in map(daily_milligrams, DRUGS[name]["用法用量"]) if d]
    assert all(dose <= most for dose in doses)
    assert doses or name in ("布洛芬", "对乙酰氨基酚")  # as needed: counted in the next test


def daily_milligrams(text):
    """Dose times times a day, the larger ends of both ranges; 0 where a text has no such form."""
    parts = re.search(r"一次(?:[\d.]+～)?([\d.]+)(mg|g)，一日(?:\d～)?(\d)次", text)
    if parts is None:
        return 0
    dose, unit, times = parts.groups()
    return float(dose) * {"mg": 1, "g": 1000}[unit] * int(times)


def test_pain_relievers_bought_without_prescription_name_their_limit():
    for name in ("布洛芬", "对乙酰氨基酚"):
        assert "24小时内不超过4次" in DRUGS[name]["用法用量"]


# Pairs that every textbook of pharmacology names, in the entry of one of the two at least.
@pytest.mark.parametrize(
    "one, other",
    [
        ("华法林", "阿司匹林"),
        ("华法林", "甲硝唑"),
        ("氯吡格雷", "奥美拉唑"),
        ("硝酸甘油", "西地那非"),
        ("地高辛", "呋塞米"),
        ("螺内酯", "依那普利"),
        ("氟西汀", "司来吉兰"),
        ("丙戊酸钠", "美罗培南"),
        ("别嘌醇", "硫唑嘌呤"),
        ("异维A酸", "多西环素"),
        ("甲氨蝶呤", "复方磺胺甲噁唑"),
        ("异烟肼", "利福平"),
    ],
)
def test_classic_interactions_are_there(one, other):
    assert any(other in value for value in DRUGS[one]["药物相互作用"])


def test_interactions_read_alike():
    """ "与X合用..." but for what no drug causes, so that a value also reads as an option."""
    others = [
        value
        for drug in DRUGS.values()
        for value in drug["药物相互作用"]
        if not value.startswith("与")
    ]
    assert len(others) <= 3, others


def test_emergencies_have_the_emergency_department_first():
    """That place is what marks them: the list and the mark are the same set."""
    marked = {name for name, row in DISEASES.items() if row["所属科室"][0] == "急诊科"}
    assert marked == set(EMERGENCIES)


def test_common_diseases_are_there():
    aliases = set(chain.from_iterable(row.get("别名", []) for row in DISEASES.values()))
    for (
        name
    ) in words("""冠心病 乳腺癌 新型冠状病毒感染 1型糖尿病 糖尿病酮症酸中毒 小儿肺炎 异位妊娠 肺癌
        胃癌 宫颈癌 艾滋病 肺栓塞 气管异物 有机磷中毒 煤气中毒 中暑 肠梗阻 近视 蛀牙"""):
        assert name in DISEASES or name in aliases, name


def test_disputed_treatments_are_gone():
    assert "桂枝茯苓丸" not in DISEASES["先兆流产"]["常用方剂"]
    for name, value in [
        ("流行性腮腺炎", "利巴韦林"),
        ("甲状腺功能减退症", "氢化可的松"),
        ("慢性咽炎", "硝酸银烧灼"),
        ("急性扁桃体炎", "扁桃体切除术"),
    ]:
        assert value not in DISEASES[name]["治疗"], name
    assert not [name for name, row in DISEASES.items() if "全身" in row.get("发病部位", [])]


def test_values_are_short_and_single():
    """A value tells one thing, has no separator of lists, and stands once in its list."""
    for name, row in (DISEASES | DRUGS).items():
        assert len(row.get("中医证型", [])) == len(row.get("常用方剂", [])), name
        for relation, values in row.items():
            if relation in ("中心词", "类型"):
                continue
            assert len(values) == len(set(values)) or relation in D.PAIRED, (name, relation)
            for value in values:
                assert 0 < len(value) <= 40, (name, value)
                assert value == value.strip() and not set(value) & set("、；。()（）"), (
                    name,
                    value,
                )


def test_no_name_or_alias_belongs_to_two():
    """A question about a name is about one entity; a drug's alias is no disease's name."""
    names = [
        *ROWS,
        *chain.from_iterable(row.get("别名", []) for row in (DISEASES | DRUGS).values()),
    ]
    assert len(names) == len(set(names)), [n for n in set(names) if names.count(n) > 1]


def test_a_treatment_that_is_no_drug_is_told_from_one():
    """relations.json's pattern, which decides whether a value of 治疗 is the name of a drug."""
    pattern = json.loads((ROOT / "data" / "relations.json").read_text(encoding="utf-8"))["no_names"]
    for value in words("洗胃 电除颤 心肺复苏 手法复位 框架眼镜 胸腔穿刺抽气 海姆立克急救法"):
        assert re.search(pattern, value), value
    assert not [name for name in DRUGS if re.search(pattern, name)]
