"""Chat templates against the published Jinja texts, rendered by transformers: the same ids, the
right targets, and no special token out of what somebody wrote."""

import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from conftest import RECORDS, ROOT, plain_prompt
from test_train import command

import generate as G
import model as M
import train as T

PUBLISHED = json.loads((ROOT / "tests/published_templates.json").read_text(encoding="utf-8"))
QWEN = "<|endoftext|> <|im_start|> <|im_end|> <think> </think>".split()
LLAMA = (
    "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>"
).split()
GLM = "[gMASK] sop <|system|> <|user|> <|assistant|> <|observation|>".split()
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("tokenizers")
    return {
        "qwen": byte_level(top / "qwen", QWEN),
        "llama3": byte_level(top / "llama3", LLAMA, "<|begin_of_text|>"),
        "mistral": sentence_pieces(top / "mistral", ["[INST]", "[/INST]"]),
        "glm": sentence_pieces(top / "glm", config={"model_type": "chatglm"}),
        "llama": sentence_pieces(top / "llama"),
    }


# template: (tokenizer, published text, arguments of it, what it has behind a conversation)
CASES = {
    "chatml": ("qwen", "qwen2_5", {}, "\n"),
    "qwen3": ("qwen", "qwen3", {"enable_thinking": False}, "\n"),
    "qwen3 thinking": ("qwen", "qwen3", {"enable_thinking": True}, "\n"),
    "llama3": ("llama3", "llama3", {}, ""),
    "llama3_1": ("llama3", "llama3_2", {"date_string": "26 Jul 2024"}, ""),
    "mistral": ("mistral", "mistral", {}, ""),
    "chatglm3": ("glm", "chatglm3", {}, ""),
}


def load(case, folders):
    """(template, our tokenizer, what text pieces become by another library, special ids)."""
    kind, *_ = CASES[case]
    name, thinking, _ = f"{case} ".partition(" thinking")
    template = G.load_template(name.strip()) | {"thinking": bool(thinking)}
    ours = G.load_tokenizer(folders[kind])
    if kind in ("qwen", "llama3"):
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
    special |= {name: n + 5 + i for i, name in enumerate(GLM[2:])}
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
LOOK_ALIKES = [*QWEN, *LLAMA, *GLM, "[INST]", "[/INST]", "<s>", "</s>", "{user}", "{{ x }}", "<n>"]


def words(draw, more=()):
    """A text that is not blank."""
    text = "".join(draw.choices([*TEXTS, *more], k=draw.randint(1, 6)))
    return text if text.strip() else text + "气"


def conversations(count, think, seed=0):
    """[(messages that end with a question, the answer to it), ...]; think: some earlier answers
    have <think> in their texts."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        messages = []
        if draw.random() < 0.4:
            messages.append({"role": "system", "content": words(draw, LOOK_ALIKES)})
        for _ in range(draw.randint(0, 3)):
            messages.append({"role": "user", "content": words(draw, LOOK_ALIKES)})
            answer = {"role": "assistant", "content": words(draw)}
            if draw.random() < 0.2:
                answer["reasoning_content"] = words(draw)
            elif think and draw.random() < 0.2:
                answer["content"] = f"<think>\n{words(draw)}\n</think>\n\n{answer['content']}"
            messages.append(answer)
        messages.append({"role": "user", "content": words(draw, LOOK_ALIKES)})
        answer = {"role": "assistant", "content": words(draw)}
        if draw.random() < 0.4:
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


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_the_published_templates(folders, case):
    """1,000 random conversations: system text or none, 1 to 4 turns, Chinese, blanks, line ends,
    thoughts, special tokens typed by user and system. 0 of them differ, in text or ids."""
    template, ours, encode, special = load(case, folders)
    for messages, _ in conversations(1000, "thoughts" in template):
        text, ids = by_jinja(case, messages, encode, special)
        prompt, answer = G.render(template, messages)
        names = {"bos": next(iter(special))} if case.startswith("llama3") else {"bos": "<s>"}
        names["eos"] = "</s>"
        assert "".join(names.get(s.text, s.text) if s.special else s.text for s in prompt) == text
        assert G.render_prompt(ours, template, messages) == ids and answer == []
