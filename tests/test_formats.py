"""Records as users have them: every form gives the same prompt, the right targets, the known
figures; a bad one is named."""

import json

import generate as G
import train as T

import pytest
from conftest import plain_prompt
from test_train import BENTSAO

TURNS = [("肝癌怎么治？", "手术为主。"), ("有副作用吗？", "有，疼痛。"), ("怎么办？", "请就医。")]
MESSAGES = [
    {"role": role, "content": text}
    for turn in TURNS
    for role, text in zip(("user", "assistant"), turn)
]
LITERATURE = {
    "instruction": " <user>: 肝癌怎么治？ <bot>: 手术为主。 <user>: 有副作用吗？ <bot>: "
    "有，疼痛。 <user>: 怎么办？",
    "output": "请就医。",
    "input": "",
    "id": 7,
}
SEVERAL = {
    "literature": LITERATURE,
    "literature without its space": {**LITERATURE, "instruction": LITERATURE["instruction"][1:]},
    "messages": {"messages": MESSAGES},
    "conversations": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in MESSAGES
        ]
    },
    "history": {
        "instruction": "怎么办？",
        "input": "",
        "output": "请就医。",
        "history": [list(t) for t in TURNS[:2]],
    },
}
ONE = {
    "alpaca": {"instruction": "黄芪有什么功效？", "input": "", "output": "补气。"},
    "alpaca without input": {"instruction": "黄芪有什么功效？", "output": "补气。"},
    "messages": {
        "messages": [
            {"role": "user", "content": "黄芪有什么功效？"},
            {"role": "assistant", "content": "补气。"},
        ]
    },
    "conversations": {
        "conversations": [
            {"from": "human", "value": "黄芪有什么功效？"},
            {"from": "gpt", "value": "补气。"},
        ]
    },
    "history": {"instruction": "黄芪有什么功效？", "output": "补气。", "history": []},
    "med-chatglm": {"context": "问题：黄芪有什么功效？\n回答: ", "target": "补气。"},
}


def read(path, rows, lines, **kwargs):
    text = (
        "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        if lines
        else json.dumps(rows, ensure_ascii=False, indent=1)
    )
    path.write_text(text, encoding="utf-8")
    return G.read_instructions(path, **kwargs)


@pytest.mark.parametrize(
    "lines, name", [(True, "a.json"), (False, "a.jsonl"), (True, "a.txt"), (False, "a")]
)
def test_every_form_is_the_same_record(tmp_path, lines, name):
    for form, row in SEVERAL.items():
        (record,) = read(tmp_path / name, [row], lines, answers=True)
        assert (record["instruction"], record["input"], record["output"]) == (
            LITERATURE["instruction"],
            "",
            "请就医。",
        ), form
        asked = G.render_turns(TURNS[:2], TURNS[2][0])
        assert record["instruction"] == asked  # as a chat renders it
    for form, row in ONE.items():
        (record,) = read(tmp_path / name, [row], lines, answers=True)
        assert (record["instruction"], record["input"], record["output"]) == (
            "黄芪有什么功效？",
            "",
            "补气。",
        ), form
    assert read(tmp_path / name, [LITERATURE], lines)[0]["id"] == 7  # what else stood there stays


def test_a_file_has_one_form(tmp_path):
    """One record of several turns makes its file one of conversations, so that a chat's first
    prompt was trained too."""
    first, second = read(tmp_path / "a", [ONE["messages"], SEVERAL["messages"]], True)
    assert (
        first["instruction"] == " <user>: 黄芪有什么功效？"
        and second["instruction"] == LITERATURE["instruction"]
    )
    system = {
        "messages": [{"role": "system", "content": "你是中医。"}, *ONE["messages"]["messages"]]
    }
    assert read(tmp_path / "a", [system], True)[0]["instruction"] == "你是中医。\n黄芪有什么功效？"
    (question,) = read(
        tmp_path / "a", [{"messages": MESSAGES[:5]}], True
    )  # to be asked: no answer yet
    assert question["instruction"] == LITERATURE["instruction"] and "output" not in question
    (given,) = read(
        tmp_path / "a",
        [{"instruction": "问", "input": "背景", "output": "答", "history": [["甲", "乙"]]}],
        True,
    )
    assert given["instruction"] == " <user>: 甲 <bot>: 乙 <user>: 问\n背景" and given["input"] == ""


def test_thoughts_without_a_text_are_thoughts_alone(tmp_path):
    thought = {"role": "assistant", "content": None, "reasoning_content": "想"}
    [row] = read(tmp_path / "a", [{"messages": [MESSAGES[0], thought]}], True, answers=True)
    assert row["output"].strip() == "<think>\n想\n</think>"


@pytest.mark.parametrize("form", ["alpaca", "conversations", "history", "messages"])
def test_llama_factorys_system_text_is_no_less_than_a_message(tmp_path, form):
    row = {**ONE[form], "system": "你是中医。"}
    [record] = read(tmp_path / "a", [row], True, answers=True)
    messages = [{"role": "system", "content": "你是中医。"}, *ONE["messages"]["messages"]]
    assert G.read_messages(record) == messages
    assert record["instruction"] == "你是中医。\n黄芪有什么功效？"


@pytest.mark.parametrize(
    "name, text, place",
    [
        ("a.csv", 'instruction,output\na,b\nc,"d"e\n', "line 3"),
        ("a.csv", "instruction,output\na,b\n\nc,d,e\n", "line 4"),
    ],
)
def test_a_bad_table_is_named_by_its_line(tmp_path, name, text, place):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=place):
        G.read_records(tmp_path / name)


def test_a_text_that_opens_with_a_bracket_is_no_array(tmp_path):
    (tmp_path / "a.txt").write_text("[1] 头痛怎么办？\n[2] 咳嗽呢？\n", encoding="utf-8")
    rows = [row["instruction"] for _, row in G.read_records(tmp_path / "a.txt")]
    assert rows == ["[1] 头痛怎么办？", "[2] 咳嗽呢？"]


BAD = {
    "role": {"messages": [{"role": "tool", "content": "x"}]},
    "twice": {"messages": [MESSAGES[0], MESSAGES[0]]},
    "bot first": {"messages": MESSAGES[1:]},
    "no answer": {"messages": MESSAGES[:5]},
    "no text": {"messages": [{"role": "user"}]},
    "late system": {"messages": [*MESSAGES, {"role": "system", "content": "x"}]},
    "empty": {"messages": []},
    "not a list": {"conversations": "x"},
    "history": {**ONE["alpaca"], "history": [["q"]]},
    "parts": {"messages": ["q", "a"]},
    "history text": {**ONE["alpaca"], "history": "q"},
    "target": {"context": "问题：x\n回答: "},
    "input": {**ONE["alpaca"], "input": 3},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_by_its_line(tmp_path, name):
    with pytest.raises(ValueError, match="line 2: ") as error:
        read(tmp_path / "a", [ONE["alpaca"], BAD[name]], True, answers=True)
    assert "\n" not in str(error.value)


def targets(tokenizer, row):
    """The texts of the runs of targets in a row."""
    runs, run = [], []
    for token, target in [*zip(row.ids, row.mask), (0, False)]:
        if target:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


TOKENIZERS = [
    "test",
    pytest.param(
        "llama", marks=pytest.mark.skipif(not BENTSAO.is_dir(), reason="no LLaMA tokenizer here")
    ),
]


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize("template", ["literature_template", "med_template", "bare"])
def test_every_answer_of_a_conversation_can_be_a_target(base, which, template):
    """With train_on all: each earlier answer, and nothing of the questions, the marks or the
    template; the ids stay."""
    tokenizer = G.Tokenizer(
        base / "tokenizer.model" if which == "test" else BENTSAO / "llama_tokenizer.model"
    )
    template = G.load_template(template)
    for turns in (
        TURNS,
        [("PNS 是 what", "It is PNS, 是的"), ("a\n", "x 癫痫\n\ny"), ("b", "请就医。")],
        TURNS[2:],
    ):
        record = {
            "instruction": G.render_turns(turns[:-1], turns[-1][0]),
            "input": "",
            "output": turns[-1][1],
        }
        last, every = (
            T.encode_example(tokenizer, template, record, T.TrainConfig(train_on=on))
            for on in ("last", "all")
        )
        assert (
            last.ids == every.ids
            and last.ids[-1] == tokenizer.eos_id
            and last.mask[-1]
            and every.mask[-1]
        )
        assert targets(tokenizer, last) == [turns[-1][1]]
        assert [text.lstrip(" ") for text in targets(tokenizer, every)] == [bot for _, bot in turns]
        assert last.ids[: last.mask.index(True)] == tokenizer.encode(
            plain_prompt(template, record["instruction"]), bos=True
        )


def data(tmp_path, *counts):
    paths = []
    for name, count in zip("ab", counts):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(
            "".join(
                json.dumps({"instruction": f"{name}{i}", "output": "x"}) + "\n"
                for i in range(count)
            )
        )
    return paths


def test_files_and_weights(tmp_path):
    """FILE:WEIGHT takes a file's records WEIGHT times, after validation has been drawn from all of
    them."""
    a, b = data(tmp_path, 10, 20)
    for weights, counts in (
        (("", ""), (10, 20)),
        ((":2", ":0.5"), (20, 10)),
        ((":1.5", ":0.25"), (15, 5)),
    ):
        config = T.TrainConfig(data_path=(f"{a}{weights[0]}", f"{b}{weights[1]}"), val_set_size=0)
        rows, val = T.read_data(config)
        named = [r["record"].partition(":")[0] for r in rows]
        assert (named.count("a.json"), named.count("b.json")) == counts and not val
        assert T.read_data(config) == (rows, val)  # by seed
    rows, val = T.read_data(T.TrainConfig(data_path=(f"{a}:3", str(b)), val_set_size=6, seed=1))
    held = {r["record"] for r in val}
    assert len(held) == 6 and not held & {r["record"] for r in rows}
    assert len(rows) == 3 * (10 - sum("a.json" in r for r in held)) + 20 - sum(
        "b.json" in r for r in held
    )


@pytest.mark.skipif(
    not BENTSAO.is_dir(), reason="BenTsao's records and tokenizer are not beside the project"
)
def test_known_figures_of_bentsaos_records():
    """8,658 records; 1,985 reach 256 tokens and so get no EOS from BenTsao's own rule; 13 are
    longer than 512."""
    tokenizer = G.Tokenizer(BENTSAO / "llama_tokenizer.model")
    template, lengths, prompts, characters, single = G.load_template("med_template"), [], 0, 0, 0
    for record in G.read_instructions(BENTSAO / "bentsao_llama_data.json", answers=True):
        text = plain_prompt(template, record["instruction"], record["input"])
        prompt, answer = tokenizer.encode(text, bos=True), tokenizer.encode_answer(record["output"])
        lengths.append(len(prompt) + len(answer) + 1)
        prompts += len(prompt)
        characters += len(record["output"])
        single += sum(map(tokenizer.pieces.is_byte, answer))
    answers = sum(lengths) - prompts
    assert (len(lengths), sum(lengths)) == (8658, 1886221)
    assert (round(prompts / 8658), round(answers / 8658)) == (118, 100)
    assert f"{answers / characters:.2f} {single / answers:.1%}" == "1.74 62.6%"  # with EOS
    over = {limit: sum(n > limit for n in lengths) for limit in (256, 320, 384, 512, 768)}
    assert over == {256: 1985, 320: 444, 384: 85, 512: 13, 768: 0}
