"""The knowledge base against what stands outside it: the Pharmacopoeia's poisonous herbs, the
eighteen clashes and nineteen fears of herbs, the formulas that its own diseases name."""

import re
from collections import Counter
from itertools import groupby, product

from build_data import PAIRED, read_knowledge

import pytest
from conftest import ROOT

ENTITIES = read_knowledge(ROOT / "data" / "knowledge.jsonl")
HERBS, FORMULAS, DISEASES = (
    {e["中心词"]: e for e in ENTITIES if e["类型"] == kind} for kind in ("中药", "方剂", "疾病")
)
# What formulas hold beside herbs with an entity: food, parts of herbs that have one, rare herbs.
OTHERS = """
粳米 小麦 饴糖 蜂蜜 冰糖 白酒 黄酒 牛乳 藕汁 姜汁 竹沥 猪蹄 猪脊髓 鸡子黄 梨皮 荷梗 西瓜翠衣
荆芥穗 瓜蒌仁 茯苓皮 生姜皮 半夏曲 胆南星 龟甲胶 炮姜 姜炭 扁豆花 莲须 苇茎 鹿角 鹿角霜 槐角
白前 白芥子 冰片 冬瓜子 王不留行 马勃 牛黄 天葵子 五倍子 芡实 花椒 椒目 龙齿 龙眼肉 生铁落
沙苑子 狗骨 青黛 枇杷叶 草果 胡麻仁 秦皮 姜黄 海粉 海带 海螵蛸 珍珠 野菊花 麻黄根 淡豆豉 萹蓄
萆薢 葱白 蛇床子 琥珀 棕榈炭 韭菜子 锁阳 赤小豆 楮实子 漏芦 獭肝 瞿麦 藕节 穿山甲 皂角刺
灯心草 首乌藤
"""
# 《中国药典》 2020, part one (藜芦: 《中药学》): how poisonous, and what it says of pregnancy.
TOXIC = {
    "有大毒": {"川乌": "禁用", "草乌": "禁用", "巴豆霜": "禁用"},
    "有毒": {
        **dict.fromkeys(["附子", "天南星", "白附子", "硫黄"], "慎用"),
        **dict.fromkeys(["甘遂", "京大戟", "芫花", "商陆", "牵牛子"], "禁用"),
        **dict.fromkeys(["朱砂", "雄黄", "罂粟壳", "全蝎"], "禁用"),
        **dict.fromkeys(["半夏", "仙茅", "苍耳子", "山豆根", "白果"]),
        "藜芦": "忌用",
    },
    "有小毒": {
        **dict.fromkeys(["苦杏仁", "川楝子", "艾叶", "蒺藜"]),
        "吴茱萸": "慎用",
    },
}
# 十八反 as the Pharmacopoeia extends them, and those of the 十九畏 that are herbs still in use.
CLASHES = {
    "川乌 草乌 附子": "半夏 瓜蒌 天花粉 川贝母 浙贝母 白蔹 白及",
    "甘草": "甘遂 京大戟 海藻 芫花",
    "藜芦": "人参 西洋参 党参 南沙参 北沙参 丹参 玄参 苦参 细辛 白芍 赤芍",
    "硫黄": "芒硝",
    "巴豆霜": "牵牛子",
    "丁香": "郁金",
    "三棱": "芒硝",
    "肉桂": "赤石脂",
    "人参": "五灵脂",
}
PAIRS = {
    frozenset(pair)
    for left, right in CLASHES.items()
    for pair in product(left.split(), right.split())
}


def texts(entity):
    """(relation, value) of all values of an entity."""
    return [(key, v) for key, values in entity.items() if isinstance(values, list) for v in values]


def notes(entity):
    return entity.get("使用注意", [])


def test_form():
    """At least 600 entities, the kinds in blocks, no value twice, a formula for every pattern."""
    assert len(ENTITIES) >= 600
    blocks = [kind for kind, _ in groupby(e["类型"] for e in ENTITIES)]
    assert len(blocks) == len(set(blocks))
    for e in ENTITIES:
        assert len(texts(e)) == len(set(texts(e))), e["中心词"]
        assert len({len(e.get(relation, [])) for relation in PAIRED}) == 1, e["中心词"]


def test_herbs_and_formulas_have_all_their_relations():
    herb = {"分类", "性味", "归经", "功效", "主治", "用法用量"}
    formula = {"分类", "出处", "组成", "功效", "主治", "证候"}
    for wanted, entities in ((herb, HERBS), (formula, FORMULAS)):
        assert not [name for name, e in entities.items() if wanted - set(e)]
    assert not [e for e in HERBS.values() if not re.search(r"\dg", e["用法用量"][0])]
    assert not [e for e in FORMULAS.values() if not re.fullmatch("《.+》", e["出处"][0])]


def test_one_value_is_one_thing():
    """No value is a list in itself, and none but the name of a formula names two herbs."""
    # The longest name first: 川牛膝 is one herb.
    names = "|".join(sorted(HERBS, key=len, reverse=True))
    for e in ENTITIES:
        for relation, value in texts(e):
            crammed = len(re.findall(names, value)) > 1 and relation != "常用方剂"
            assert "、" not in value and crammed == ("十八反" in value), (e["中心词"], value)


def test_herbs_of_formulas_are_known():
    uses = Counter(herb for e in FORMULAS.values() for herb in e["组成"])
    assert uses.keys() - HERBS.keys() == set(OTHERS.split())
    assert {herb for herb, n in uses.items() if n >= 6} - HERBS.keys() == {"粳米"}


def test_formulas_that_diseases_name_are_explained():
    uses = [f for e in DISEASES.values() for f in e.get("常用方剂", [])]
    assert sum(f in FORMULAS for f in uses) >= 0.8 * len(uses)


def test_poisonous_herbs_say_so():
    degrees = {herb: [degree] for degree, herbs in TOXIC.items() for herb in herbs}
    for name, e in HERBS.items():
        assert [v for v in e["性味"] if "毒" in v] == degrees.get(name, []), name
    for degree, herbs in TOXIC.items():
        for name, pregnancy in herbs.items():
            told = "".join(notes(HERBS[name]) + HERBS[name]["用法用量"])
            assert not pregnancy or f"孕妇{pregnancy}" in notes(HERBS[name]), name
            # How the harm is kept small: processing, boiling, or a bound on dose, time or persons.
            how = "制|生品|先煎|过大|过量|久|慎用|忌用"
            assert degree == "有小毒" or re.search(how, told), name


def test_formulas_warn_of_their_poisonous_herbs():
    for name, e in FORMULAS.items():
        for degree, herbs in TOXIC.items():
            for herb in herbs.keys() & set(e["组成"]):
                assert any(v.startswith(f"{herb}{degree}") for v in notes(e)), (name, herb)
                if herbs[herb] and degree != "有小毒":
                    assert any(v.startswith("孕妇") for v in notes(e)), (name, herb)
        # 忌用 and 禁用 are one thing in two books.
        if any("孕妇禁用" in notes(HERBS.get(herb, {})) for herb in e["组成"]):
            assert {"孕妇禁用", "孕妇忌用"} & set(notes(e)), name


@pytest.mark.parametrize("pair", sorted(map(sorted, PAIRS)), ids="-".join)
def test_pair_is_told_both_ways(pair):
    left, right = pair
    assert f"不宜与{right}同用" in notes(HERBS[left]), pair
    assert f"不宜与{left}同用" in notes(HERBS[right]), pair


def test_no_pair_beside_them():
    """Whatever is not to be taken together is told in one wording, of one herb, from both sides.
    莱菔子 with 人参 is neither a clash nor a fear, but the textbooks warn of it."""
    told = set()
    for name, e in HERBS.items():
        for value in notes(e):
            if "同用" in value:
                told.add((name, re.fullmatch("不宜与(.+)同用", value)[1]))
    assert {frozenset(pair) for pair in told} == PAIRS | {frozenset(["人参", "莱菔子"])}
    assert told == {(b, a) for a, b in told}


def test_a_formula_that_holds_a_pair_says_so():
    """One does by its book: 海藻 and 甘草 in 海藻玉壶汤."""
    for name, e in FORMULAS.items():
        clash = any(pair <= set(e["组成"]) for pair in PAIRS)
        assert clash == (name == "海藻玉壶汤") == any("十八反" in v for v in notes(e)), name
