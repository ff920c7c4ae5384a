"""Each base from records to answers: train.py, generate.py and the server on a random folder with a
tokenizer of its form, against a network that is not ours, over weights dequantised by NumPy."""

import json
import re

import generate as G
import train as T

import numpy as np
import pytest
import sentencepiece
import small_bases
import test_chatglm6b
import torch
import transformers
from numpy_glm import CHATGLM3, chatglm3
from peft import PeftModel
from safetensors.torch import load_file
from test_templates import CASES, TALK, TWO_STEPS, by_jinja, load, run, served

# name: (base, template, tokens that end an answer)
NAMES = {
    "qwen2": ("qwen2", "chatml", ["<|im_end|>", "<|endoftext|>"]),
    "qwen3": ("qwen3", "qwen3", ["<|im_end|>", "<|endoftext|>"]),
    "llama3": ("llama3", "llama3_1", ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]),
    "mistral": ("mistral", "mistral", ["</s>"]),
    "glm4": ("glm4", "glm4", ["<|endoftext|>", "<|user|>", "<|observation|>"]),
    "chatglm2": ("chatglm3", "chatglm2", ["</s>", "<|user|>", "<|observation|>"]),
    "chatglm3": ("chatglm3", "chatglm3", ["</s>", "<|user|>", "<|observation|>"]),
    "chatglm6b": ("chatglm6b", "chatglm", ["<eop>"]),
    "a plain prompt on qwen3": ("qwen3", "med_template", ["<|im_end|>", "<|endoftext|>"]),
}
MED = "下面是一个问题，运用医学知识来正确回答提问.\n### 问题:\n{}\n### 回答:\n"
LINEAR = re.compile(r"layers\.\d+\..*(proj|dense\w*|query_key_value)\.weight")
SYSTEMS = ["简短", "Answer in English.", "说明原因。", "3", "你是医生，\n请详细回答。", "气"]
NEW = 12  # tokens of an answer at most


# --------------------------------------------------------------------------------------------------
# The oracle: prompts by the published texts, logits by transformers, peft and NumPy


def prompt(name, messages, folders):
    """Ids of a prompt, and {name: id} of the special tokens, by the published text and by the
    tokenizers of others."""
    base, template, _ = NAMES[name]
    kind = small_bases.KINDS[base][1]
    *system, question = (m["content"] for m in messages)
    text = "\n".join([*system, question])
    if template in CASES or template == "med_template":
        case = template if template in CASES else "qwen3"
        _, _, encode, special = load(case, {CASES[case][0]: folders[kind]})
        if template == "med_template":
            return encode(MED.format(text)), special
        return by_jinja(case, messages, encode, special)[1], special
    file = folders[kind] / ("ice_text.model" if kind == "ice" else "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(str(file))
    if template == "chatglm2":
        n = len(pieces)
        special = {"</s>": 2, "<|user|>": n + 6, "<|observation|>": n + 8}
        return [n + 1, n + 3, *pieces.encode(f"[Round 1]\n\n问：{text}\n\n答：")], special
    special = {name: pieces.piece_to_id(name) for name in ("[gMASK]", "<sop>", "<eop>")}
    ids = pieces.encode(text.replace("\n", "<n>"))
    return [*ids, special["[gMASK]"], special["<sop>"]], special


def updates(adapter):
    """{a linear's name: B A alpha / r} of an adapter's files."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale, found = settings["lora_alpha"] / settings["r"], {}
    state = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in state if "lora_A" in key]:
        name = key.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
        found[name] = scale * state[key.replace("lora_A", "lora_B")] @ state[key]
    return found


def fused(base, found, layer):
    """{a fused weight of a layer: its update}, in the rows of the published files."""
    at = {key.rpartition(".")[2]: u for key, u in found.items() if f"layers.{layer}." in key}
    qkv = torch.cat([at[f"{n}_proj"] for n in "qkv"])
    if base == "chatglm6b":
        rows = torch.cat([test_chatglm6b.release_rows(part) for part in range(3)])
        return {
            f"transformer.layers.{layer}.attention.query_key_value.weight": qkv[rows.argsort()],
            f"transformer.layers.{layer}.attention.dense.weight": at["o_proj"],
            f"transformer.layers.{layer}.mlp.dense_h_to_4h.weight": at["up_proj"],
            f"transformer.layers.{layer}.mlp.dense_4h_to_h.weight": at["down_proj"],
        }
    top = f"transformer.encoder.layers.{layer}."
    return {
        f"{top}self_attention.query_key_value.weight": qkv,
        f"{top}self_attention.dense.weight": at["o_proj"],
        f"{top}mlp.dense_h_to_4h.weight": at["gate_up_proj"],
        f"{top}mlp.dense_4h_to_h.weight": at["down_proj"],
    }


def oracle(base, folder, state, kind, adapter=None):
    """ids -> logits (T, V) of the base, stored as `kind`, with an adapter."""
    state = {k: small_bases.stored(t, kind) if LINEAR.search(k) else t for k, t in state.items()}
    if base in small_bases.IN_TRANSFORMERS:
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        hf.load_state_dict(state)
        hf = (PeftModel.from_pretrained(hf, adapter) if adapter else hf).eval()
        return lambda ids, context: hf(torch.tensor([ids])).logits[0].detach().numpy()
    found = updates(adapter) if adapter else {}
    for layer in {int(key.split(".")[1]) for key in found}:
        for key, update in fused(base, found, layer).items():
            state[key] = state[key] + update
    if base == "chatglm6b":
        return lambda ids, context: test_chatglm6b.oracle(state, ids, context)
    config = CHATGLM3 | {"ffn_hidden_size": 128}
    return lambda ids, context: chatglm3(state, config, np.array(ids))


def greedy(logits, ids, ends):
    """The answer's ids; what stands before a prompt's last id is ChatGLM-6B's context."""
    context, answer = len(ids) - 1, []
    while len(answer) < NEW:
        answer.append(int(logits(ids + answer, context)[-1].argmax()))
        if answer[-1] in ends:
            return answer[:-1]
    return answer


# --------------------------------------------------------------------------------------------------
# From records to answers


def check(name, kind, folders, tmp_path, capsys):
    """Two steps on records, then answers by the command and by the server: those of the oracle,
    without and with a system text."""
    base, template, ends = NAMES[name]
    folder, out = tmp_path / "base", tmp_path / "out"
    state = small_bases.write_base(folder, base, folders[small_bases.KINDS[base][1]])
    rows = [{"messages": TALK}, {"instruction": "头痛呢？", "output": "请就医。"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = ["--base_model", folder, "--data_path", tmp_path / "rows.jsonl", "--output_dir", out]
    more = ["--base_dtype", kind]
    if template in ("med_template", "chatglm2"):  # the others are their bases' defaults
        more += ["--prompt_template_name", template]
    run(T, *paths, *TWO_STEPS, *more)
    made = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert made["config"]["prompt_template_name"] == template

    logits, tokenizer = oracle(base, folder, state, kind, out), G.load_tokenizer(folder)

    def expected(system=""):
        messages = [{"role": "system", "content": system}] * bool(system) + TALK[1:2]
        ids, special = prompt(name, messages, folders)
        answer = greedy(logits, ids, [special[end] for end in ends])
        return messages, ids, G.visible(tokenizer.decode(answer)).lstrip(tokenizer.leading)

    # The system text is one that changes the answer, so that a lost one is seen.
    cases = [expected()]
    cases.append(next(case for case in map(expected, SYSTEMS) if case[2] != cases[0][2]))
    for messages, ids, text in cases:  # noqa: B007 (the last case stays)
        more = ["--system", messages[0]["content"]] if len(messages) > 1 else []
        more += ["--lora_weights", out, "--max_new_tokens", NEW, "--dtype", "fp32"]
        capsys.readouterr()
        run(G, TALK[1]["content"], *more, "--base_dtype", kind)
        assert capsys.readouterr().out == G.printable(text) + "\n"

    # It is the adapter and the storage that were asked for: without them logits are others.
    options = G.Options(dtype="fp32", base_dtype=kind)
    model, *_ = G.load(options, str(out))
    context = len(ids) - 1
    cache = model.new_cache(1, context).rows(0, [0], prefix=context * model.config.prefix_lm)
    with torch.no_grad():
        first = model(torch.tensor([ids[:-1]]), cache)
    exact = logits(ids, context)[:-1]

    def difference(other):
        return np.abs(first[0].numpy() - other).max() / np.abs(exact).max()

    assert difference(exact) < 1e-4
    others = [("auto", out)] * (kind != "auto") + [(kind, None)]
    for storage, adapter in others:
        other = oracle(base, folder, state, storage, adapter)(ids, context)[:-1]
        assert difference(other) > 1e-3
    if kind == "auto":
        assert [*served(out, [case[0] for case in cases], NEW)] == [case[2] for case in cases]


@pytest.mark.parametrize("name", NAMES)
def test_from_records_to_answers(name, small, tmp_path, capsys):
    check(name, "auto", small, tmp_path, capsys)


FEW = [("qwen2", "int8"), ("chatglm6b", "int8"), ("qwen3", "nf4"), ("chatglm3", "nf4")]
REST = [(name, kind) for name in NAMES for kind in ("int8", "nf4") if (name, kind) not in FEW]


@pytest.mark.parametrize("name, kind", FEW)
def test_the_same_in_8_and_4_bits(name, kind, small, tmp_path, capsys):
    check(name, kind, small, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", REST)
def test_the_others_in_8_and_4_bits(name, kind, small, tmp_path, capsys):
    check(name, kind, small, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "int8", "nf4"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3"])
def test_with_real_vocabularies(name, kind, real, tmp_path, capsys):
    check(name, kind, real, tmp_path, capsys)
