"""Chat templates against the published Jinja texts, rendered by transformers: the same ids, the
right targets, and no special token out of what somebody wrote."""

import json
import random
import re
import shutil
import sys

import generate as G
import lora as L
import model as M
import train as T

import openai
import peft
import pytest
import sentencepiece
import test_tokenizers
import tokenizers
import torch
import transformers
from conftest import ROOT
from scripted import serving

PUBLISHED = json.loads((ROOT / "tests/published_templates.json").read_text(encoding="utf-8"))
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA += ["<|eom_id|>", "<|eot_id|>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM4 = ["<|endoftext|>", "[gMASK]", "<sop>", *ROLES]
SAMPLE = (
    "黄芪有什么功效？补气升阳，固表止汗。The patient's BP is 120/80 mmHg.\n\n  1. 头痛；2. 发热\n"
    * 4
)


# --------------------------------------------------------------------------------------------------
# Tokenizers


def byte_level(folder, special, bos=None):
    """A small byte-level BPE with special tokens, as Qwen and Llama-3 have it, and files beside it
    that transformers reads."""
    pattern = G.WORDS.replace("{1,3}", "") if bos is None else G.WORDS
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, initial_alphabet=letters)
    made.train_from_iterator([SAMPLE], trainer)
    shown = [name for name in special if "think" in name]
    made.add_special_tokens([name for name in special if name not in shown])
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in shown])
    if bos:
        parts = [(bos, made.token_to_id(bos))]
        made.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A", None, parts)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[0]}
    settings |= {"bos_token": bos, "eos_token": "<|end_of_text|>"} if bos else {}
    settings |= {"eos_token": "<|im_end|>"} if "<|im_end|>" in special else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def sentence_pieces(folder, control=(), config=None):
    """A small SentencePiece model as LLaMA, Mistral and ChatGLM have it."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=list(control),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def ice_text(folder):
    """ChatGLM-6B's kind of file, with its tokens among the pieces."""
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    sentence_pieces(folder, names)
    (folder / "tokenizer.model").rename(folder / "ice_text.model")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("tokenizers")
    return {
        "qwen": byte_level(top / "qwen", QWEN),
        "llama3": byte_level(top / "llama3", LLAMA, "<|begin_of_text|>"),
        "glm4": byte_level(top / "glm4", GLM4),
        "mistral": sentence_pieces(top / "mistral", ["[INST]", "[/INST]"]),
        "glm": sentence_pieces(top / "glm", config={"model_type": "chatglm"}),
        "ice": ice_text(top / "ice"),
        "llama": sentence_pieces(top / "llama"),
    }


# template: (tokenizer, published text, arguments of it, the difference behind an answer: what it
# has more there, or, of ChatGLM's, less)
CASES = {
    "chatml": ("qwen", "qwen2_5", {}, "\n"),
    "qwen3": ("qwen", "qwen3", {"enable_thinking": False}, "\n"),
    "qwen3 thinking": ("qwen", "qwen3", {"enable_thinking": True}, "\n"),
    "llama3": ("llama3", "llama3", {}, ""),
    "llama3_1": ("llama3", "llama3_2", {"date_string": "26 Jul 2024"}, ""),
    "mistral": ("mistral", "mistral", {}, ""),
    "chatglm3": ("glm", "chatglm3", {}, "</s>"),
    "glm4": ("glm4", "glm4", {}, "<|endoftext|>"),
}


def load(case, folders):
    """(template, our tokenizer, what text pieces become by another library, special ids)."""
    kind, *_ = CASES[case]
    name, thinking, _ = f"{case} ".partition(" thinking")
    template = G.load_template(name.strip()) | {"thinking": bool(thinking)}
    ours = G.load_tokenizer(folders[kind])
    if kind in ("qwen", "llama3", "glm4"):
        # No added token: then nothing in a text is special.
        plain = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
        spec = json.loads(plain.to_str()) | {"added_tokens": [], "post_processor": None}
        special = {t["content"]: t["id"] for t in json.loads(plain.to_str())["added_tokens"]}
        plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
        return template, ours, lambda text: plain.encode(text).ids, special
    pieces = sentencepiece.SentencePieceProcessor(str(folders[kind] / "tokenizer.model"))
    if kind == "mistral":
        # mistral-common's way: texts by themselves, with SentencePiece's own blank before each
        special = {name: pieces.piece_to_id(name) for name in ("<s>", "</s>", "[INST]", "[/INST]")}
        return template, ours, lambda text: pieces.encode(text.removeprefix(" ")), special
    # THUDM's way: role, line end and text by themselves
    n = len(pieces)
    special = {"[gMASK]": n + 1, "sop": n + 3, "</s>": 2}
    special |= {name: n + 5 + i for i, name in enumerate(ROLES)}
    return (
        template,
        ours,
        lambda text: pieces.encode("\n") + pieces.encode(text.removeprefix("\n ")),
        special,
    )


# --------------------------------------------------------------------------------------------------
# Conversations

TEXTS = [
    "黄芪",
    "有什么功效？",
    "头痛3天",
    " ",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "it's",
    "BP 120/80",
    "👋",
    "é",
]
LOOK_ALIKES = [*QWEN, *LLAMA, *GLM4, "sop", "[INST]", "[/INST]", "<s>", "</s>", "{user}", "{{ x }}"]


def words(draw, more=()):
    """A text that is not blank."""
    text = "".join(draw.choices([*TEXTS, *more], k=draw.randint(1, 6)))
    return text if text.strip() else text + "气"


def conversations(count, think=False, typed=LOOK_ALIKES, seed=0):
    """[(messages that end with a question, the answer to it), ...]. think: some earlier answers
    have <think> in their texts; typed: what user and system may write besides."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        messages = []
        if draw.random() < 0.4:
            messages.append({"role": "system", "content": words(draw, typed)})
        for _ in range(draw.randint(0, 3)):
            messages.append({"role": "user", "content": words(draw, typed)})
            answer = {"role": "assistant", "content": words(draw)}
            if think and draw.random() < 0.2:
                answer["reasoning_content"] = words(draw)
                answer["content"] = answer["content"].lstrip("\n") or "气"
            elif think and draw.random() < 0.2:
                answer["content"] = f"<think>\n{words(draw)}\n</think>\n\n{answer['content']}"
            messages.append(answer)
        messages.append({"role": "user", "content": words(draw, typed)})
        answer = {"role": "assistant", "content": words(draw)}
        if think and draw.random() < 0.4:
            answer["reasoning_content"] = words(draw).strip("\n")
        made.append((messages, answer))
    return made


MASKED = str.maketrans({"<": "\ue000", "[": "\ue001", "s": "\ue002"})
UNMASKED = str.maketrans({"\ue000": "<", "\ue001": "[", "\ue002": "s"})


def by_jinja(case, messages, encode, special, ask=True):
    """(text, ids) by the published text. What system and user wrote is masked while it is rendered,
    and put back when the text has been cut at the special tokens: so none of those is theirs."""
    _, key, arguments, _ = CASES[case]
    masked = [
        m if m["role"] == "assistant" else m | {"content": m["content"].translate(MASKED)}
        for m in messages
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>"} if "<s>" in special else {}
    if case.startswith("llama3"):
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (text,), _ = transformers.utils.chat_template_utils.render_jinja_template(
        [masked],
        chat_template=PUBLISHED[key]["chat_template"],
        add_generation_prompt=ask,
        **names,
        **arguments,
    )
    ids = []
    for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, special))})", text)):
        if i % 2:
            ids.append(special[part])
        elif part:
            ids += encode(part.translate(UNMASKED))
    return text.translate(UNMASKED), ids


def shown(text, special):
    """A rendered text without our marks, as the published templates make it."""
    bos = next((name for name in ("<|begin_of_text|>", "<s>") if name in special), "")
    text = text.replace("\ud800bos\ud800", bos).replace("\ud800eos\ud800", "</s>")
    return re.sub("[\ud800-\ud802]", "", text)


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_the_published_templates(folders, case):
    """1,000 random conversations: system text or none, 1 to 4 turns, Chinese, blanks, line ends,
    thoughts, special tokens typed by user and system. 0 of them differ, in text or ids."""
    template, ours, encode, special = load(case, folders)
    for messages, _ in conversations(1000, "thoughts" in template):
        text, ids = by_jinja(case, messages, encode, special)
        messages = G.read_chat(messages) if "thoughts" in template else messages
        prompt, answer = G.render(template, messages)
        assert shown(prompt, special) == text and answer == ""
        assert G.render_prompt(ours, template, messages) == ids


@pytest.mark.parametrize("case", [case for case in CASES if case != "qwen3 thinking"])
def test_rows_are_the_published_templates(folders, case):
    """The same with an answer, thoughts in some of Qwen3's. Ids are compared where the answer
    begins with no blank: another would join the line end before it, which is not asked so."""
    template, ours, encode, special = load(case, folders)
    *_, difference = CASES[case]
    compared = 0
    for messages, answer in conversations(400, "thoughts" in template):
        if case == "mistral" and messages[0]["role"] == "system":
            continue  # the published text drops it where no question is last
        text, ids = by_jinja(case, [*messages, answer], encode, special, ask=False)
        asked, answered = G.render(template, G.read_chat([*messages, answer]))
        (prompt, _), (said, _) = (
            G.encode_rendered(ours, part, first)
            for part, first in ((asked, True), (answered, False))
        )
        if difference == "\n":
            text, ids = text.removesuffix("\n"), ids[: -len(encode("\n"))]
        elif difference:
            assert said.pop() == ours.eos_id and answered.endswith("\ud800eos\ud800")
            answered = answered.removesuffix("\ud800eos\ud800")
        assert shown(asked + answered, special) == text
        if not answer["content"][0].isspace():
            compared += 1
            assert prompt + said == ids
    assert compared > 100


@pytest.mark.parametrize("case", ["chatml", "qwen3", "llama3", "llama3_1", "glm4"])
def test_transformers_encodes_the_same(folders, case):
    """The ids of apply_chat_template itself, where nobody types special tokens."""
    kind, key, arguments, _ = CASES[case]
    template, ours = G.load_template(case), G.load_tokenizer(folders[kind])
    hf = transformers.AutoTokenizer.from_pretrained(folders[kind])
    hf.chat_template = PUBLISHED[key]["chat_template"]
    for messages, _ in conversations(200, "thoughts" in template, ["<", "im_end", "|>"]):
        ids = hf.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **arguments
        )
        assert G.render_prompt(ours, template, messages) == ids


def test_what_somebody_types_is_no_special_token(folders):
    """Not in a prompt, not in an answer that is trained on."""
    for name, kind in TRAINED.items():
        ours, template = G.load_tokenizer(folders[kind]), G.load_template(name)
        plain = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]
        typed = "".join(LOOK_ALIKES).replace("</think>", "")
        messages = [{"role": role, "content": typed} for role in ("user", "assistant")]

        def count(messages, ours=ours, template=template):
            ids = [G.encode_rendered(ours, part)[0] for part in G.render(template, messages * 2)]
            return sum(id in ours.special.values() for id in sum(ids, []))

        assert count(messages) == count(plain) > 0, name


def test_our_own_marks_are_refused(folders):
    """A text with the halves of characters that stand around a special token's name would make
    one."""
    ours, template = G.load_tokenizer(folders["qwen"]), G.load_template("chatml")
    typed = "\ud800<|im_end|>\ud800"
    for message in (
        {"role": "user", "content": f"甲{typed}"},
        {"role": "user", "content": "甲", "input": typed},
        {"role": "user", "content": "\ud801"},
    ):
        with pytest.raises(ValueError, match=r"surrogates"):
            G.render_prompt(ours, template, [message])


# --------------------------------------------------------------------------------------------------
# Rows

# each template with a tokenizer that it is for
TRAINED = {
    "chatml": "qwen",
    "qwen3": "qwen",
    "llama3": "llama3",
    "llama3_1": "llama3",
    "mistral": "mistral",
    "chatglm": "ice",
    "med_chatglm": "ice",
    "chatglm2": "glm",
    "chatglm3": "glm",
    "glm4": "glm4",
    "med_template": "llama",
    "literature_template": "llama",
    "alpaca": "qwen",
    "bare": "llama3",
    "bloom_deploy": "glm",
}
# their targets in a conversation of two turns, the end of the first one's answer and of the second
ENDS = {
    "chatml": ("<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "llama3_1": ("<|eot_id|>", "<|eot_id|>"),
    "mistral": ("</s>", "</s>"),
    "chatglm": ("", "<eop>"),
    "med_chatglm": ("", "<eop>"),
    "chatglm2": ("", "</s>"),
    "chatglm3": ("", "</s>"),
    "glm4": ("", "<|endoftext|>"),
    "med_template": ("", "</s>"),
    "literature_template": ("", "</s>"),
    "alpaca": ("", "<|im_end|>"),
    "bare": ("", "<|end_of_text|>"),
    "bloom_deploy": ("", "</s>"),
}
TALK = [
    {"role": "system", "content": "简短"},
    {"role": "user", "content": "黄芪有什么功效？"},
    {"role": "assistant", "content": "补气升阳。"},
    {"role": "user", "content": "头痛呢？"},
    {"role": "assistant", "content": "请就医。"},
]


def target_runs(tokenizer, row):
    """The runs of targets of a row as texts, special tokens by name."""
    names, runs, before = {id: n for n, id in tokenizer.special.items()}, [], False
    for id, target in zip(row.ids, row.mask):
        if target:
            runs += [[]] * (not before)
            runs[-1] = [*runs[-1], id]
        before = target

    def text(run):
        ends = [i for i, id in enumerate(run) if id in names and id not in tokenizer.texts]
        stop = ends[0] if ends else len(run)
        return tokenizer.decode(run[:stop]) + "".join(names[id] for id in run[stop:])

    return [text(run) for run in runs]


def read(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return G.read_instructions(path, answers=True)


@pytest.mark.parametrize("name", TRAINED)
def test_the_prompt_that_trains_is_the_prompt_that_asks(folders, name, tmp_path):
    """Id for id, for rows in all forms: up to the first target, what is asked. And the targets:
    the last answer and what ends it, or each answer and what ends it."""
    ours, template = G.load_tokenizer(folders[TRAINED[name]]), G.load_template(name)
    rows = [
        {"messages": TALK},
        {"messages": TALK[1:]},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in TALK[1:]]},
        {
            "instruction": "头痛呢？",
            "output": "请就医。",
            "history": [["黄芪有什么功效？", "补气升阳。"]],
        },
        {
            "instruction": " <user>: 黄芪有什么功效？ <bot>: 补气升阳。 <user>: 头痛呢？",
            "output": "请就医。",
        },
    ]
    plain = "special" not in template
    for asked, record in zip((TALK[:4], *[TALK[1:4]] * 4), read(tmp_path / "a", *rows)):
        row = T.encode_example(ours, template, record, T.TrainConfig(cutoff_len=999))
        first = row.mask.index(True)
        assert row.ids[:first] == G.render_prompt(ours, template, asked)
        assert row.ids[:first] == G.render_prompt(ours, template, *G.conversation(record))
        lead = "\n " if name == "chatglm3" else ""
        assert target_runs(ours, row) == [f"{lead}请就医。{ENDS[name][1]}"]
        config = T.TrainConfig(cutoff_len=999, train_on="all")
        every = T.encode_example(ours, template, record, config)
        assert every.ids == row.ids
        runs = [f"{lead}{text}{end}" for text, end in zip(("补气升阳。", "请就医。"), ENDS[name])]
        assert [
            run.replace(" 补", "补") if plain else run for run in target_runs(ours, every)
        ] == runs
    # One turn, with a context and without.
    for more in {}, {"input": "男，30岁"}:
        (record,) = read(tmp_path / "b", {"instruction": "头痛呢？", "output": "请就医。", **more})
        row = T.encode_example(ours, template, record, T.TrainConfig())
        asked = [{"role": "user", "content": "头痛呢？", **more}]
        assert row.ids[: row.mask.index(True)] == G.render_prompt(ours, template, asked)
        if not plain and more:
            joined = [{"role": "user", "content": "头痛呢？\n男，30岁"}]
            assert G.render_prompt(ours, template, asked) == G.render_prompt(ours, template, joined)


def test_a_system_text_opens_the_first_question_of_a_plain_template():
    wanted = (
        "下面是一个问题，运用医学知识来正确回答提问.\n### 问题:\n <user>: 简短\n"
        "黄芪有什么功效？ <bot>: 补气升阳。 <user>: 头痛呢？\n### 回答:\n"
    )
    prompt, answer = G.render(G.load_template("med_template"), TALK)
    assert (
        re.sub("\ud800bos\ud800|[\ud801\ud802]", "", prompt) == wanted
        and answer == "请就医。\ud800eos\ud800"
    )


class Pairs:
    """A tokenizer of two letters a token."""

    special, opening, eos_id = {"<e>": 1}, [], 0

    def encode(self, text):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    encode_answer = encode


def test_a_token_that_reaches_across_a_mark_is_a_target():
    def targets(text):
        ids, mask = G.encode_rendered(Pairs(), text)
        return [id for id, target in zip(ids, mask) if target]

    assert targets("abc\ud801def\ud802gh") == ["cd", "ef"]
    assert targets("ab\ud801c\ud802def") == ["cd"]
    assert targets("ab\ud801cd\ud800<e>\ud800\ud802ef\ud801gh\ud802") == ["cd", 1, "gh"]
    assert targets("abcd") == []


def test_thoughts(folders, tmp_path):
    """Rows with and without thoughts in one file. The empty block of one without belongs to the
    prompt; thoughts are learnt, from a field or from the text; those of earlier turns are gone."""
    ours, template = G.load_tokenizer(folders["qwen"]), G.load_template("qwen3")
    question = {"role": "user", "content": "头痛呢？"}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "请就医。"}]},
        {"instruction": "头痛呢？", "output": "<think>\n想一想\n</think>\n\n请就医。"},
        {"messages": [question, {**TALK[-1], "reasoning_content": "\n想一想\n"}]},
        {"messages": [question, {**TALK[-1], "reasoning_content": "旧"}, *TALK[3:]]},
    ]
    every = T.TrainConfig(train_on="all")
    records = [read(tmp_path / f"{i}", row)[0] for i, row in enumerate(rows)]
    without, *within, history = (T.encode_example(ours, template, r, every) for r in records)
    off = [ours.special["<think>"], *ours.encode("\n\n"), ours.special["</think>"]]
    off += ours.encode("\n\n")
    prompt = G.render_prompt(ours, template, [question])
    assert prompt[-len(off) :] == off and without.ids[: len(prompt)] == prompt
    assert not any(without.mask[: len(prompt)])
    assert target_runs(ours, without) == ["请就医。<|im_end|>"]
    thinking = G.render_prompt(ours, template | {"thinking": True}, [question])
    assert thinking == prompt[: -len(off)]
    for row in within:
        assert row.ids[: row.mask.index(True)] == thinking
        assert target_runs(ours, row) == ["<think>\n想一想\n</think>\n\n请就医。<|im_end|>"]
    assert target_runs(ours, history) == ["请就医。<|im_end|>"] * 2


def test_a_cut_answer_keeps_its_end(folders):
    ours, template = G.load_tokenizer(folders["qwen"]), G.load_template("chatml")
    record = {"instruction": "甲", "output": "头痛；" * 50}
    whole = T.encode_example(ours, template, record, T.TrainConfig())
    cut = T.encode_example(ours, template, record, T.TrainConfig(cutoff_len=len(whole) - 20))
    assert cut.ids[-1] == ours.special["<|im_end|>"] and cut.mask[-1]
    assert record["output"].startswith(ours.decode(cut.ids[cut.mask.index(True) : -1]))


def test_an_answer_of_chatglm3_is_shown_without_its_line_end(folders):
    ours = G.load_tokenizer(folders["glm"])
    request = G.Request([1], G.Decoding(), ids=ours.encode("\n 请就医。"), finish_reason="stop")
    assert "".join(G.stream(ours, request)) == "请就医。"
    assert {ours.special["<|user|>"], ours.special["<|observation|>"], 2} == {*G.eos_ids(ours)}


def test_the_default_is_the_bases_own(folders):
    wanted = {"qwen": "qwen3", "llama3": "llama3_1", "mistral": "mistral", "glm4": "glm4"}
    wanted |= {"glm": "chatglm3", "ice": "chatglm", "llama": "med_template"}
    found = {kind: G.default_template(G.load_tokenizer(folders[kind])) for kind in wanted}
    assert found == wanted


@pytest.mark.parametrize(
    "template",
    [
        {"prompt": "{turns}"},
        {"prompt": "{user} {foo}"},
        {"prompt": "{user}"},
        {"prompt": "{system}{turns}{user}", "turn": "{answer}"},
        {"prompt": "{system}{turns}{user}", "answer": "x"},
        {"prompt": "{system}{turns}{user}", "last": "{user}"},
        {"prompt": "{system}{turns}{user} {"},
        {"prompt": "{system}{turns}{user}", "system": "x"},
        {"prompt": 3},
    ],
)
def test_a_chat_template_that_cannot_be_filled_is_refused(tmp_path, template):
    (tmp_path / "a.json").write_text(json.dumps(template))
    with pytest.raises(ValueError, match=r"a\.json: .*\{turns\}"):
        G.load_template(tmp_path / "a.json")


def test_a_template_of_another_base_is_refused(folders):
    with pytest.raises(ValueError, match=r"<\|start_header_id\|>"):
        G.render_prompt(G.load_tokenizer(folders["qwen"]), G.load_template("llama3"), TALK[:2])


# --------------------------------------------------------------------------------------------------
# From a record to an answer, on random small bases

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.4,
}
BASES = {
    "qwen": (transformers.Qwen3Config, "qwen3"),
    "llama3": (transformers.LlamaConfig, "llama3_1"),
}


@pytest.fixture(scope="module", params=BASES)
def trained(request, folders, tmp_path_factory):
    """(kind, folder of a random base, folder of an adapter after two steps on conversations)."""
    kind, top = request.param, tmp_path_factory.mktemp("trained")
    base, out = top / "base", top / "out"
    config, _ = BASES[kind]
    torch.manual_seed(0)
    size = G.load_tokenizer(folders[kind]).vocab_size
    config = config(vocab_size=size + 3, **SHAPE)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folders[kind] / name, base / name)
    rows = [{"messages": TALK}, {"instruction": "头痛呢？", "output": "请就医。"}] * 4
    (top / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(T, "--base_model", base, "--data_path", top / "rows.jsonl", "--output_dir", out, *TWO_STEPS)
    return kind, base, out


TWO_STEPS = ["--max_steps", 2, "--batch_size", 4, "--val_set_size", 2, "--num_answers", 1]
TWO_STEPS += ["--lora_r", 4, "--lora_target_modules", "all", "--lora_dropout", 0]
TWO_STEPS += ["--learning_rate", 0.01, "--dtype", "fp32"]


def run(script, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        for name in ("stdout", "stderr"):  # which main wraps
            patch.setattr(sys, name, getattr(sys, name))
        script.main()


def answer_of_peft(base, adapter, ids, ends, new=24):
    """The greedy answer by transformers and peft."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    hf = peft.PeftModel.from_pretrained(hf, adapter).eval()
    made = hf.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    answer = made[0, len(ids) :].tolist()
    return answer[:-1] if answer[-1] in ends else answer


def test_from_a_record_to_an_answer(trained, capsys):
    """train.py takes the template that the base's tokens ask for; generate.py and the server answer
    as transformers and peft do to the published template's ids, a system text in its place."""
    kind, base, out = trained
    template = BASES[kind][1]
    made = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert made["config"]["prompt_template_name"] == template
    _, key, arguments, _ = CASES[template]
    hf = transformers.AutoTokenizer.from_pretrained(base)
    hf.chat_template = PUBLISHED[key]["chat_template"]
    ours = G.load_tokenizer(base)
    ends = [
        ours.special[n] for n in ("<|im_end|>", "<|endoftext|>", "<|eot_id|>") if n in ours.special
    ]
    ends += [ours.special[n] for n in ("<|eom_id|>", "<|end_of_text|>") if n in ours.special]
    answers = {}
    for messages in (TALK[1:2], TALK[:2], TALK[:4]):
        ids = hf.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **arguments
        )
        text = ours.decode(answer_of_peft(base, out, ids, ends))
        answers[len(messages), messages[0]["role"]] = G.visible(text)
    common = ["--lora_weights", out, "--max_new_tokens", 24, "--dtype", "fp32"]
    capsys.readouterr()
    run(G, TALK[1]["content"], *common)
    assert capsys.readouterr().out == G.printable(answers[1, "user"]) + "\n"
    run(G, TALK[1]["content"], "--system", TALK[0]["content"], *common)
    assert capsys.readouterr().out == G.printable(answers[2, "system"]) + "\n"

    asked = (TALK[1:2], TALK[:2], TALK[:4])
    wanted = [answers[len(messages), messages[0]["role"]] for messages in asked]
    assert [*served(out, asked, 24)] == wanted


def served(out, asked, length):
    """The answers of the server to lists of messages, by OpenAI's client, whole and streamed, by an
    adapter and of so many tokens at most."""
    options = G.Options(max_new_tokens=length, port=0, dtype="fp32", lora_weights=str(out))
    model, tokenizer, template, _ = G.load(options, str(out))
    batch = G.Batch(model, 2, 400, G.eos_ids(tokenizer), tokenizer.decode)

    def prompt_of(messages):
        return G.render_prompt(tokenizer, template, messages)

    with serving(G.Server(batch, tokenizer, ["out", "base"], prompt_of, options)) as address:
        client = openai.OpenAI(base_url=f"{address}v1", api_key="x")
        for messages in asked:
            got = client.chat.completions.create(model="out", messages=messages)
            pieces = client.chat.completions.create(model="out", messages=messages, stream=True)
            text = got.choices[0].message.content
            assert "".join(p.choices[0].delta.content or "" for p in pieces) == text
            yield text


def test_show(trained, capsys, tmp_path):
    """Tokens one by one, the targets marked, and no training."""
    kind, base, out = trained
    data = out.parent / "rows.jsonl"
    more = ["--base_model", base, "--data_path", data, "--output_dir", tmp_path / "none"]
    run(T, *more, *TWO_STEPS, "--show", 3)
    shown = capsys.readouterr().out
    end = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>"}[kind]
    rows = re.findall(r"^rows.jsonl:\d+: (\d+) tokens, (\d+) of them targets$", shown, re.M)
    assert len(rows) == 3 and not (tmp_path / "none").exists()
    texts = shown.split(" of them targets\n")[1:]
    for (tokens, targets), text in zip(rows, texts):
        assert text.count(f"[{end}]|") == 1 and text.count("]|") == int(targets)
        assert f"{end}|" in text.replace(f"[{end}]|", "") and int(tokens) > int(targets)


def test_several_ids_of_eos_as_in_transformers(trained):
    """Greedy and 4 beams, with three tokens that may end an answer."""
    _, base, _ = trained
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model, _ = G.load_base(base, "cpu", torch.float32)
    for seed in range(6):
        ids = random.Random(seed).choices(range(300), k=9)
        with torch.no_grad():
            likely = hf(torch.tensor([ids])).logits[0, -1].topk(40).indices.tolist()
        ends = likely[3::13]
        for beams in 1, 4:
            made = hf.generate(
                torch.tensor([ids]),
                max_new_tokens=12,
                num_beams=beams,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=0,
                early_stopping=False,
            )[0, len(ids) :].tolist()
            stop = next((i for i, id in enumerate(made) if id in ends), len(made))
            assert list(G.generate_ids(model, ids, 12, ends, num_beams=beams)) == made[:stop]


def test_merged_folders_carry_the_template(trained, tmp_path):
    """transformers renders and encodes as we do: by our template in Jinja where the base has none;
    the base's own text stays as it is."""
    kind, base, out = trained
    template, ours = G.load_template(BASES[kind][1]), G.load_tokenizer(base)
    run(L, "merge", "--base_model", base, "--lora_weights", out, "--output_dir", tmp_path / "new")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    for messages, _ in conversations(100, False, ["im_end"]):
        ids = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == G.render_prompt(ours, template, messages)
    own = tmp_path / "own"
    shutil.copytree(base, own)
    (own / "chat_template.jinja").write_text("{{ 'own' }}")
    run(L, "merge", "--base_model", own, "--lora_weights", out, "--output_dir", tmp_path / "kept")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert hf.apply_chat_template(TALK, tokenize=False) == "own"


@pytest.mark.parametrize("name", TRAINED)
def test_templates_in_jinja(folders, tmp_path, name):
    """What an exported tokenizer_config.json makes of conversations is what we make: text and, but
    for ChatGLM's tokenizers, which transformers lacks, ids."""
    kind, template = TRAINED[name], G.load_template(name)
    shutil.copytree(folders[kind], tmp_path / "base")
    if "special" not in template:
        # The base's own text is of another prompt than the model was tuned with.
        (tmp_path / "base" / "chat_template.jinja").write_text("{{ 'own' }}")
    (tmp_path / "new").mkdir()
    M.copy_tokenizer(tmp_path / "base", tmp_path / "new")
    M.write_chat_template(tmp_path / "new", template)
    file = tmp_path / "new" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    if name in ("chatglm", "chatglm2", "med_chatglm"):
        assert "chat_template" not in settings  # nothing opens these bases and reads it
        return
    assert "\\u" not in settings["chat_template"]  # llama.cpp's Jinja has no such escape
    ours = G.load_tokenizer(folders[kind])
    hf = transformers.AutoTokenizer
    hf = None if kind == "glm" else hf.from_pretrained(tmp_path / "new")
    for messages, _ in conversations(150, "thoughts" in template, ["im_end"]):
        text = G.read_chat(messages)
        if hf:
            ids = hf.apply_chat_template(text, add_generation_prompt=True, return_dict=False)
            assert ids == G.render_prompt(ours, template, text)
        else:
            (made,), _ = transformers.utils.chat_template_utils.render_jinja_template(
                [text], chat_template=settings["chat_template"], add_generation_prompt=True
            )
            assert made == re.sub(
                "\ud800bos\ud800|[\ud800-\ud802]", "", G.render(template, text)[0]
            )


# --------------------------------------------------------------------------------------------------
# Real vocabularies

real_ones = test_tokenizers.real  # a fixture


def test_ids_of_real_vocabularies(real_ones):
    """A short conversation in Qwen's and Llama-3's own ids, and a typed end that is none."""
    ids = {}
    for kind, name in (("qwen", "chatml"), ("llama3", "llama3")):
        ours, theirs = real_ones[kind]
        asked = {"role": "user", "content": "你好<|im_end|><|eot_id|>"}
        record = {"messages": [asked, {"role": "assistant", "content": "好"}], "instruction": ""}
        row = T.encode_example(ours, G.load_template(name), record, T.TrainConfig())
        typed = theirs.encode_ordinary(asked["content"])
        first = row.ids.index(typed[0])
        assert row.ids[first : first + len(typed)] == typed and len(typed) > 10
        ids[kind] = row.ids[:first], row.ids[first + len(typed) :]
        targets = [id for id, target in zip(row.ids, row.mask) if target]
        assert targets == {"qwen": [52801, 151645], "llama3": [53901, 128009]}[kind]
    # <|im_start|>system\n, the text, <|im_end|>\n<|im_start|>user\n
    assert ids["qwen"][0][:3] == [151644, 8948, 198]
    assert ids["qwen"][0][-5:] == [151645, 198, 151644, 872, 198]
    # <|im_end|>\n<|im_start|>assistant\n好<|im_end|>
    assert ids["qwen"][1] == [151645, 198, 151644, 77091, 198, 52801, 151645]
    # <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n
    assert ids["llama3"][0] == [128000, 128006, 882, 128007, 271]
    assert ids["llama3"][1] == [128009, 128006, 78191, 128007, 271, 53901, 128009]


@pytest.mark.parametrize("kind, case", [("qwen", "chatml"), ("llama3", "llama3")])
def test_prompts_in_real_vocabularies(real_ones, folders, kind, case):
    """300 of the random conversations, encoded by tiktoken between the special tokens."""
    ours, theirs = real_ones[kind]
    template = G.load_template(case)
    for messages, _ in conversations(300):
        _, ids = by_jinja(case, messages, theirs.encode_ordinary, ours.special)
        assert G.render_prompt(ours, template, messages) == ids
