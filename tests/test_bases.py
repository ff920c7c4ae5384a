"""Bases besides LLaMA: Qwen2, Qwen3, Llama-3.1, Mistral, GLM against transformers, ChatGLM2 and 3
against NumPy; adapters, exports, storage of 8 and 4 bits; what is another network is refused by the
name of what it has."""

import json
import re
import shutil

import generate as G
import lora as L
import model as M
import train as T

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as H
from conftest import run_command
from numpy_glm import CHATGLM3, chatglm3, random_chatglm3, write_bins
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_decoding import answer_all, theirs
from test_export import command
from test_speed import measured_bytes, small_run

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 304,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
WIDE = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
BASES = {
    "qwen2": (H.Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 tied": (H.Qwen2Config, {"tie_word_embeddings": True, "sliding_window": 4096}),
    "qwen3": (H.Qwen3Config, {}),
    "qwen3 head_dim": (H.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "llama-3.1": (H.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-3.2": (H.LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": (H.MistralConfig, {"sliding_window": None}),
    "glm": (H.GlmConfig, {"head_dim": 16, "num_key_value_heads": 1}),
    "glm-4-9b": (H.GlmConfig, {"head_dim": 16, "rope_parameters": WIDE}),
}
ONE_EACH = ["qwen2", "qwen3 head_dim", "mistral", "glm-4-9b"]
IDS = torch.arange(2 * 90).view(2, 90) * 37 % 300 + 3  # no padding: its row has no gradient


def transformers_model(name, seed=0):
    """Random, and large enough that a wrong row, bias or angle is seen in the logits."""
    config, more = BASES[name]
    torch.manual_seed(seed)
    hf = H.AutoModelForCausalLM.from_config(config(**{**SHAPE, **more})).eval()
    for key, p in hf.named_parameters():
        p.data.normal_("norm" in key, 0.1 if p.dim() > 1 else 0.4)
    return hf


def difference(model, hf, ids=IDS):
    """The greatest between the logits of our model and transformers'."""
    with torch.no_grad():
        ours, wanted = model(ids), hf(ids).logits
    assert wanted.abs().max() > 2
    return (ours - wanted).abs().max().item()


def edit(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def older(config):
    """In the words of transformers 4: rope_theta and rope_scaling, torch_dtype."""
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config.pop("layer_types", None)


@pytest.mark.parametrize("name", BASES)
def test_logits_are_transformers(tmp_path, name):
    """From one file, from shards, and with a config.json of transformers 4; a tied head may stand
    in the file too."""
    hf = transformers_model(name)
    hf.save_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    shutil.copytree(tmp_path / "one", tmp_path / "old")
    edit(tmp_path / "old", older)
    state = load_file(tmp_path / "old" / "model.safetensors")
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    save_file({**state, "lm_head.weight": head.clone()}, tmp_path / "old" / "model.safetensors")
    for folder in sorted(tmp_path.iterdir()):
        model = M.load_model(folder)
        assert difference(model, hf) < 1e-5
        tied = model.lm_head.weight is model.embed_tokens.weight
        assert tied == hf.config.tie_word_embeddings


def test_qwen3_without_a_head_dim_has_transformers(tmp_path):
    """Qwen3Config's own default is 128, whatever the width and the number of heads."""
    hf = transformers_model("qwen3")
    assert hf.config.head_dim == 128
    hf.save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.pop("head_dim"))
    assert difference(M.load_model(tmp_path), hf) < 1e-5


def test_norms_in_float32_beside_float16(tmp_path):
    """All is cast to the embedding's dtype, the norms of queries and keys too."""
    hf = transformers_model("qwen3 head_dim")
    for p in hf.parameters():
        p.data = p.data.half().float()  # not hf.half(): that would round its angles
    hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({k: t if "norm" in k else t.half() for k, t in state.items()}, file)
    assert {p.dtype for p in M.load_model(tmp_path).parameters()} == {torch.float16}
    assert difference(M.load_model(tmp_path, dtype=torch.float32), hf) < 1e-5


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("beams", [1, 4])
def test_tokens_are_transformers(tmp_path, name, beams):
    """Greedy and of four beams, unequal prompts in one batch."""
    hf = transformers_model(name)
    hf.save_pretrained(tmp_path)
    prompts = [IDS[0, :n].tolist() for n in (1, 7, 23)]
    asked = [G.Request(ids, G.Decoding(12, num_beams=beams)) for ids in prompts]
    answer_all(M.load_model(tmp_path), asked, rows=2 * beams)
    for request in asked:
        wanted = theirs(hf, request.prompt_ids, request.decoding)
        assert (request.ids, request.finish_reason) == wanted


# --------------------------------------------------------------------------------------------------
# ChatGLM2 and ChatGLM3


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory):
    """A folder as published, fused and sharded, and its weights."""
    folder, state = tmp_path_factory.mktemp("chatglm") / "base", random_chatglm3(CHATGLM3)
    write_bins(folder, CHATGLM3, state, 3)
    return folder, state


def test_chatglm_equals_numpy(chatglm):
    """In one pass, and cached in pieces."""
    folder, state = chatglm
    model = M.load_model(folder)
    ids = IDS[:, :40]
    wanted = np.stack([chatglm3(state, CHATGLM3, row.numpy()) for row in ids])
    assert np.abs(wanted).max() > 2
    with torch.no_grad():
        assert np.abs(model(ids).double().numpy() - wanted).max() < 1e-5
        cache = model.new_cache(2, 40)
        parts = torch.cat([model(part, cache) for part in ids.split([7, 1, 1, 31], 1)], 1)
    assert np.abs(parts.double().numpy() - wanted).max() < 1e-5


def test_glm4_turns_by_its_own_base(tmp_path):
    """GLM-4-9B as published: more rows, and rope_ratio 500."""
    config = {**CHATGLM3, "padded_vocab_size": 320, "rope_ratio": 500, "vocab_size": 320}
    state = random_chatglm3(config)
    write_bins(tmp_path / "base", config, state, 2)
    with torch.no_grad():
        ours = M.load_model(tmp_path / "base")(IDS[:1])[0].double().numpy()
    assert np.abs(ours - chatglm3(state, config, IDS[0].numpy())).max() < 1e-5


def test_chatglm_with_float32_norms_in_float16(tmp_path):
    state = random_chatglm3(CHATGLM3, dtype=torch.float16)
    write_bins(tmp_path / "base", CHATGLM3, state, 2)
    model = M.load_model(tmp_path / "base")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    wide = M.load_model(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        ours = wide(IDS[:1])[0].double().numpy()
    assert np.abs(ours - chatglm3(state, CHATGLM3, IDS[0].numpy())).max() < 1e-5


def test_weights_of_a_fused_tensor_do_not_share_memory(chatglm):
    """Inductor's constant folding gave wrong answers, silently, with views of one tensor."""
    model = M.load_model(chatglm[0])
    memory = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(memory)) == len(memory)


def test_compiled_decoding_of_a_fused_checkpoint(tmp_path):
    config = {**CHATGLM3, "num_layers": 1}
    write_bins(tmp_path / "base", config, random_chatglm3(config), 2)
    model = M.load_model(tmp_path / "base")
    prompts = [IDS[0, :n].tolist() for n in (3, 9, 14)]
    answers = []
    for compile in (False, True):
        asked = [G.Request(ids, G.Decoding(8)) for ids in prompts]
        answer_all(model, asked, rows=3, positions=32, compile=compile)
        answers.append([request.ids for request in asked])
    assert answers[0] == answers[1] and len({*map(tuple, answers[0])}) == 3


def drop(key):
    return lambda config, state: state.pop(key)


QKV = "transformer.encoder.layers.1.self_attention.query_key_value"
DAMAGES = {
    "a bias is missing": (drop(f"{QKV}.bias"), f"{QKV}.bias"),
    "a row too many": (
        lambda config, state: state.update({f"{QKV}.weight": torch.ones(129, 64)}),
        f"{QKV}.weight",
    ),
    "a tensor too many": (
        lambda config, state: state.update({"transformer.extra.weight": torch.ones(2)}),
        "transformer.extra.weight",
    ),
    "other groups": (lambda config, state: config.update(multi_query_group_num=1), "(96,)"),
    "no layers": (lambda config, state: config.pop("num_layers"), "num_hidden_layers"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_chatglm_is_refused_by_key(tmp_path, name):
    change, word = DAMAGES[name]
    config, state = dict(CHATGLM3), random_chatglm3(CHATGLM3)
    change(config, state)
    write_bins(tmp_path / "base", config, state, 2)
    with pytest.raises(ValueError) as error:
        M.load_model(tmp_path / "base")
    assert word in str(error.value) and str(tmp_path / "base") in str(error.value)


# --------------------------------------------------------------------------------------------------
# Folders that we write


def same_weights(ours, hf):
    state = hf.state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", BASES)
def test_written_folders_open_in_transformers(tmp_path, name, monkeypatch, capsys):
    """Converted, and exported in shards: its class, its weights, what else its config says."""
    hf = transformers_model(name)
    hf.save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", lambda config: config.update(note="本草", eos_token_id=[2, 7]))
    M.convert(tmp_path / "base", tmp_path / "converted")
    arguments = ("--base_model", tmp_path / "base", "--output_dir", tmp_path / "exported")
    command(monkeypatch, capsys, L, "export", *arguments, "--max_shard_gb", 60_000 / 2**30)
    for folder in ("converted", "exported"):
        again = H.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert type(again) is type(hf) and same_weights(again, hf)
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert written["note"] == "本草" and written["eos_token_id"] == [2, 7]
        assert M.load_model(tmp_path / folder).config == M.load_model(tmp_path / "base").config


def difference_to_numpy(hf, state):
    with torch.no_grad():
        logits = hf(IDS[:1]).logits[0].double().numpy()
    return np.abs(logits - chatglm3(state, CHATGLM3, IDS[0].numpy())).max()


def test_chatglm_is_written_as_transformers_glm(tmp_path, chatglm):
    """transformers has no ChatGLM of its own, but the same network under the name GLM."""
    folder, state = chatglm
    M.convert(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "glm" and "auto_map" not in config
    assert config["eos_token_id"] == 2 and config["seq_length"] == 8192
    hf = H.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(hf) is H.GlmForCausalLM and difference_to_numpy(hf, state) < 1e-5
    ours, again = M.load_model(folder), M.load_model(tmp_path / "out")
    assert ours.config == again.config
    for (name, a), b in zip(ours.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name
    assert M.describe_model(folder)[-1] == M.describe_model(tmp_path / "out")[-1]


def test_full_tuning_saves_a_folder_of_its_network(tmp_path, chatglm):
    """As `train.py --full` does: from a model in memory, with the base's other values."""
    model = M.load_model(chatglm[0])
    for p in model.parameters():
        p.data.mul_(0.9)
    M.save_model(model, tmp_path, chatglm[0])
    assert difference(model, H.AutoModelForCausalLM.from_pretrained(tmp_path).eval()) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "glm"])
def test_metas_layout_cannot_say_them(tmp_path, name, monkeypatch, capsys):
    transformers_model(name).save_pretrained(tmp_path / "base")
    arguments = ("--base_model", tmp_path / "base", "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=f"{name}.*export as hf"):
        command(monkeypatch, capsys, L, "export", *arguments, "--layout", "meta")
    assert not (tmp_path / "out").exists()


META = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024}
META |= {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256}
SCALED = {  # what params.json says besides META: the factor, the feed-forward's width
    "Llama-3.1-8B": ({}, 8.0, 14336),
    "Llama-3.2-1B": ({"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256}, 32.0, 8192),
    "Llama-3.2-3B": ({"dim": 3072, "ffn_dim_multiplier": 1.0, "n_heads": 24}, 32.0, 8192),
}


@pytest.mark.parametrize("name", SCALED)
def test_metas_use_scaled_rope(tmp_path, name):
    """Hugging Face's config.json of the same models has the numbers; Meta's code has them."""
    more, factor, width = SCALED[name]
    file = tmp_path / "params.json"
    file.write_text(json.dumps({**META, **more, "use_scaled_rope": True}))
    config = M.read_config(file)
    assert config.intermediate_size == width
    wanted = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    wanted |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert config.rope_scaling == wanted
    file.write_text(json.dumps({**META, **more, "use_scaled_rope": False}))
    assert M.read_config(file).rope_scaling is None


# --------------------------------------------------------------------------------------------------
# Adapters


def peft_adapter(folder, hf, targets, **settings):
    """peft's adapter with random A and B in a folder; returns its model."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(hf, LoraConfig(target_modules=targets, **settings)).eval()
    torch.manual_seed(1)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("name", ONE_EACH)
def test_adapters_go_both_ways(tmp_path, name, monkeypatch, capsys):
    """peft's gives peft's logits here; ours gives ours in peft; merged, transformers has them."""
    hf = transformers_model(name)
    hf.save_pretrained(tmp_path / "base")
    peft_model = peft_adapter(tmp_path / "theirs", hf, [*ATTENTION, "down_proj"])
    model = M.load_model(tmp_path / "base")
    L.load_adapter(model, tmp_path / "theirs")
    assert len(L.lora_linears(model)) == 10
    assert difference(model, peft_model) < 1e-5
    for _, module in L.lora_linears(model):
        module.lora_b.data.mul_(-1)
    L.save_adapter(model, tmp_path / "ours", trained=True)
    base = H.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert difference(model, again) < 1e-5
    arguments = ("--base_model", tmp_path / "base", "--lora_weights", tmp_path / "ours")
    command(monkeypatch, capsys, L, "merge", *arguments, "--output_dir", tmp_path / "merged")
    merged = H.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is type(base) and difference(model, merged) < 1e-5


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "q_proj"], "all-linear"])
def test_an_adapter_of_glms_fused_linear_is_cut(tmp_path, targets):
    hf = transformers_model("glm")
    hf.save_pretrained(tmp_path / "base")
    peft_model = peft_adapter(tmp_path / "theirs", hf, targets)
    model = M.load_model(tmp_path / "base")
    L.load_adapter(model, tmp_path / "theirs")
    assert difference(model, peft_model) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets", [("gate_proj", "up_proj"), ("gate_proj", "q_proj", "down_proj"), "all"], ids=str
)
def test_our_adapter_of_glms_two_halves_is_pefts(tmp_path, targets, rslora):
    """gate_up_proj is one linear there, so the rank doubles; for us too it is the same adapter."""
    hf = transformers_model("glm")
    hf.save_pretrained(tmp_path / "base")
    model = M.load_model(tmp_path / "base")
    L.add_lora(model, L.LoRAConfig(4, 8.0, 0.0, targets, rslora))
    torch.manual_seed(2)
    for _, module in L.lora_linears(model):
        module.lora_b.data.normal_(0, 0.1)
    L.save_adapter(model, tmp_path / "ours", trained=True)
    theirs = PeftModel.from_pretrained(hf, tmp_path / "ours").eval()
    assert difference(model, theirs) < 1e-5
    again = M.load_model(tmp_path / "base")
    L.load_adapter(again, tmp_path / "ours")
    with torch.no_grad():
        assert (model(IDS) - again(IDS)).abs().max() < 1e-5


FUSED = {
    "query_key_value": (128, 64),
    "dense": (64, 64),
    "dense_h_to_4h": (192, 64),
    "dense_4h_to_h": (64, 96),
}


def chatglm_adapter(folder, leaves, rows=0, r=4):
    """An adapter as peft writes it for the published code; returns {key: B A 2}."""
    folder.mkdir()
    generator, state, updates = torch.Generator().manual_seed(3), {}, {}
    for layer in range(2):
        for leaf in leaves:
            key = f"encoder.layers.{layer}.{'mlp' if '4h' in leaf else 'self_attention'}.{leaf}"
            rows_out, width = FUSED[leaf]
            a = torch.randn(r, width, generator=generator) * 0.1
            b = torch.randn(rows_out + rows, r, generator=generator) * 0.1
            state[f"base_model.model.transformer.{key}.lora_A.weight"] = a
            state[f"base_model.model.transformer.{key}.lora_B.weight"] = b
            updates[f"transformer.{key}.weight"] = 2 * b @ a
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return updates


@pytest.mark.parametrize("leaves", [["query_key_value"], [*FUSED]], ids=len)
def test_chatglms_adapters_are_cut_exactly(tmp_path, chatglm, leaves):
    """W + B A of the fused weights, in NumPy; what we save of it peft reads over GLM."""
    folder, state = chatglm
    updates = chatglm_adapter(tmp_path / "theirs", leaves)
    tuned = {key: tensor + updates.get(key, 0) for key, tensor in state.items()}
    model = M.load_model(folder)
    L.load_adapter(model, tmp_path / "theirs")
    wanted = chatglm3(tuned, CHATGLM3, IDS[0].numpy())
    with torch.no_grad():
        assert np.abs(model(IDS[:1])[0].double().numpy() - wanted).max() < 2e-5
    L.save_adapter(model, tmp_path / "ours", trained=True)
    again = M.load_model(folder)
    L.load_adapter(again, tmp_path / "ours")
    with torch.no_grad():
        assert (again(IDS) - model(IDS)).abs().max() < 1e-5
    L.merge(model)
    M.save_model(model, tmp_path / "merged", folder)
    hf = H.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert difference_to_numpy(hf, tuned) < 2e-5
    M.convert(folder, tmp_path / "glm")
    base = H.AutoModelForCausalLM.from_pretrained(tmp_path / "glm")
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert difference_to_numpy(theirs, tuned) < 2e-5


def test_a_fused_adapter_of_another_width_is_refused(tmp_path, chatglm):
    chatglm_adapter(tmp_path / "theirs", ["query_key_value"], rows=16)
    with pytest.raises(ValueError, match="adapter_model.*self_attn.*another base"):
        L.load_adapter(M.load_model(chatglm[0]), tmp_path / "theirs")


# --------------------------------------------------------------------------------------------------
# Training

ROWS = [  # of unequal length, with a common opening; the targets follow it
    T.Row(IDS[0, :9].tolist() + IDS[1, :n].tolist(), [False] * 9 + [True] * n) for n in (4, 17, 30)
]


def gradients(model, rows):
    """{name: gradient} of the summed loss of packed rows."""
    T.loss_sum(model, *T.collate(rows, "cpu"), scale=1.0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(hf, rows):
    """The same, a row at a time."""
    total = 0.0
    for row in rows:
        logits = hf(torch.tensor([row.ids[:-1]])).logits[0]
        at = [i for i, target in enumerate(row.mask[1:]) if target]
        labels = torch.tensor(row.ids[1:])[at]
        total = total + F.cross_entropy(logits[at], labels, reduction="sum")
    return total


@pytest.mark.parametrize("name", ["qwen2", "qwen3 head_dim", "mistral"])
def test_full_gradients_are_transformers(tmp_path, name):
    """Packed rows with a shared opening, biases and norms of queries and keys too."""
    hf = transformers_model(name)
    hf.save_pretrained(tmp_path)
    model = M.load_model(tmp_path).train().requires_grad_(True)
    ours = gradients(model, ROWS)
    plain_loss(hf, ROWS).backward()
    wanted = {key.removeprefix("model."): p.grad for key, p in hf.named_parameters()}
    assert ours.keys() == wanted.keys()
    for key, grad in wanted.items():
        assert (ours[key] - grad).abs().max() < 1e-4 * grad.abs().max() + 1e-5, key


@pytest.mark.parametrize("name", ["qwen2", "qwen3 head_dim"])
def test_lora_gradients_are_pefts(tmp_path, name):
    hf = transformers_model(name)
    hf.save_pretrained(tmp_path / "base")
    peft_model = peft_adapter(tmp_path / "adapter", hf, ATTENTION)
    model = M.load_model(tmp_path / "base")
    L.load_adapter(model, tmp_path / "adapter")
    for _, module in L.lora_linears(model):
        module.lora_a.requires_grad_(True), module.lora_b.requires_grad_(True)
    ours = gradients(model, ROWS)
    for key, p in peft_model.named_parameters():
        p.requires_grad_("lora_" in key)
    plain_loss(peft_model, ROWS).backward()
    assert len(ours) == 16
    for key, grad in ours.items():
        name, half = key.rsplit(".", 1)
        letter = half[-1].upper()
        parameter = f"base_model.model.model.{name}.lora_{letter}.default.weight"
        wanted = peft_model.get_parameter(parameter).grad
        assert (grad - wanted).abs().max() < 1e-4 * wanted.abs().max() + 1e-5, key


# --------------------------------------------------------------------------------------------------
# Storage, memory, weight differences


@pytest.mark.parametrize("kind", L.QUANTISED)
@pytest.mark.parametrize("name", ["qwen2", "qwen3 head_dim"])
def test_biases_and_norms_beside_a_quantised_base(tmp_path, name, kind):
    """The logits of transformers' model whose weights are the dequantised ones, biases and norms as
    they are; for one token, for many, and with a gradient."""
    hf = transformers_model(name)
    hf.save_pretrained(tmp_path)
    model = L.quantize(M.load_model(tmp_path), kind)
    for layer, linear in L.linears(model).items():
        store = [getattr(linear, name) for name in linear.names]
        hf.get_parameter(f"model.{layer}.weight").data = linear.matrix(torch.float32, *store)
    assert difference(model, hf) < 1e-5 and difference(model, hf, IDS[:, :1]) < 1e-5
    assert (model(IDS) - hf(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen3 head_dim", "glm-4-9b"])
@pytest.mark.parametrize("settings", [{}, {"full": True}, {"base_dtype": "int8"}], ids=str)
def test_memory_of_their_training_is_planned(tmp_path, name, settings):
    """Estimate against the bytes alive at the peak, as test_speed.py does for LLaMA."""
    config, more = BASES[name]
    large = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    config(**{**SHAPE, **more, **large}).save_pretrained(tmp_path)
    shape = M.read_config(tmp_path / "config.json")
    n, length = 4, 96
    rows, config = small_run(n, length, 300, memory_gb=1.0, **settings)
    wanted = measured_bytes(shape, config, torch.float32, rows, 0)
    tokens = n * (length + 1)
    plan = T.plan_memory(shape, config, rows, torch.float32, torch.device("cpu"), tokens)
    assert plan.recomputed == 0 and abs(plan.bytes - wanted) < 0.1 * wanted


def test_recover_knows_biases(tmp_path):
    """tuned = base + difference, biases too, and of another layout than the base's."""
    base, tuned = transformers_model("qwen2"), transformers_model("qwen2", seed=1)
    base.save_pretrained(tmp_path / "base")
    wanted = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    for key, tensor in tuned.state_dict().items():
        tensor.sub_(base.state_dict()[key])
    tuned.save_pretrained(tmp_path / "difference")
    L.recover(tmp_path / "base", tmp_path / "difference", tmp_path / "out")
    again = H.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(base)
    for key, tensor in again.state_dict().items():
        assert torch.allclose(tensor, wanted[key], atol=1e-6), key


def test_fresh_weights_have_no_bias(tmp_path):
    """`model.py init` from another base's config.json: transformers opens it."""
    config, more = BASES["qwen2"]
    config(**{**SHAPE, **more}).save_pretrained(tmp_path / "shape")
    model = M.LLaMA(M.read_config(tmp_path / "shape" / "config.json"))
    M.init_weights(model, 0)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 6 and not any(bias.any() for bias in biases)
    M.save_model(model, tmp_path / "new")
    hf = H.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert type(hf) is H.Qwen2ForCausalLM
    with torch.no_grad():
        assert (model(IDS) - hf(IDS).logits).abs().max() < 1e-5


# --------------------------------------------------------------------------------------------------
# Other networks

LLAMA = {**SHAPE, "model_type": "llama", "hidden_act": "silu", "rope_theta": 10000.0}
QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "attention_bias": False}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": None}


def scaled(kind, **more):
    return {**QWEN2, "rope_scaling": {"type": kind, "factor": 4.0, **more}}


def quantised(method, **more):
    return {**QWEN2, "quantization_config": {"quant_method": method, **more}}


REFUSED = {  # name: (config.json, what the line must name)
    "Mixtral": (
        MISTRAL | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
        "num_local_experts.*mixture of experts",
    ),
    "Qwen1.5-MoE": (
        QWEN2 | {"model_type": "qwen2_moe", "num_experts": 60, "moe_intermediate_size": 1408},
        "num_experts.*mixture of experts",
    ),
    "Qwen3-30B-A3B": (
        QWEN3 | {"model_type": "qwen3_moe", "num_experts": 128, "norm_topk_prob": True},
        "num_experts.*mixture of experts",
    ),
    "Qwen3-Next": (
        QWEN3 | {"model_type": "qwen3_next", "num_experts": 512, "linear_num_key_heads": 16},
        "mixture of experts",
    ),
    "Qwen3.5, its text alone": (
        QWEN3
        | {
            "model_type": "qwen3_5_text",
            "linear_conv_kernel_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "linear attention",
    ),
    "linear attention in some layers": (
        QWEN3 | {"layer_types": ["full_attention", "linear_attention"]},
        "layer_types.*linear attention",
    ),
    "Qwen3.5": (
        {"model_type": "qwen3_5", "text_config": {"hidden_size": 64}, "vision_config": {}},
        "text_config.*images",
    ),
    "DeepSeek-V2": (
        LLAMA | {"model_type": "deepseek_v2", "n_routed_experts": 64, "kv_lora_rank": 512},
        "n_routed_experts.*mixture of experts",
    ),
    "DeepSeek-V3": (
        LLAMA
        | {
            "model_type": "deepseek_v3",
            "n_routed_experts": 256,
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        },
        "n_routed_experts.*mixture of experts",
    ),
    "MiniCPM3": (LLAMA | {"model_type": "minicpm3", "kv_lora_rank": 256}, "latent attention"),
    "Gemma-2": (
        LLAMA
        | {
            "model_type": "gemma2",
            "hidden_act": "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0,
            "sliding_window": None,
        },
        "attn_logit_softcapping.*capped logits",
    ),
    "Gemma": (LLAMA | {"model_type": "gemma", "hidden_act": "gelu"}, "hidden_act.*silu"),
    "Phi-3": (LLAMA | {"model_type": "phi3", "sliding_window": 2047}, "sliding window"),
    "Phi-4-mini": (
        LLAMA | {"model_type": "phi3", "partial_rotary_factor": 0.75},
        "partial_rotary_factor",
    ),
    "Falcon-7B": (LLAMA | {"model_type": "falcon", "alibi": False, "parallel_attn": True}, "paral"),
    "Falcon-RW": (LLAMA | {"model_type": "falcon", "alibi": True}, "ALiBi"),
    "Bloom": ({"model_type": "bloom", "n_embed": 64, "n_layer": 2}, "model_type is 'bloom'"),
    "Baichuan-13B": (
        {**LLAMA, "model_type": "baichuan", "model_max_length": 4096},
        "model_type is 'baichuan'",
    ),
    "InternLM": (LLAMA | {"model_type": "internlm", "bias": True}, "bias is True.*biases"),
    "InternLM2": (
        LLAMA | {"model_type": "internlm2", "bias": False, "attn_implementation": "eager"},
        "model_type is 'internlm2'",
    ),
    "GPTQ": (quantised("gptq", bits=4, group_size=128), "quantization_config.*gptq.*quantised"),
    "AWQ": (quantised("awq", bits=4, version="gemm"), "quantization_config.*awq.*quantised"),
    "FP8": (quantised("fp8", activation_scheme="dynamic"), "quantization_config.*fp8"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "bitsandbytes.*quantised"),
    "ChatGLM2-6B-int4": (CHATGLM3 | {"quantization_bit": 4}, "quantization_bit is 4.*quantised"),
    "compressed-tensors": (
        QWEN3 | {"quantization_config": {"quant_method": "compressed-tensors", "format": "int"}},
        "quantization_config.*compressed-tensors.*quantised",
    ),
    "Qwen3-8B-FP8": (
        QWEN3 | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "quantization_config.*fp8.*quantised",
    ),
    "yarn as transformers 5 says it": (
        QWEN3 | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        "yarn",
    ),
    "a real window of Qwen3's": (
        QWEN3 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1},
        "sliding window",
    ),
    "yarn": (scaled("yarn", original_max_position_embeddings=32768), "yarn"),
    "dynamic": (scaled("dynamic"), "dynamic"),
    "longrope": (LLAMA | {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    "Mistral-7B-v0.1": (MISTRAL | {"sliding_window": 4096}, "4096.*sliding window"),
    "a real window of Qwen2's": (QWEN2 | {"use_sliding_window": True}, "sliding window"),
    "windows in some layers": (
        QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types.*sliding window",
    ),
    "ChatGLM-6B by P-tuning": (
        {
            "model_type": "chatglm",
            "hidden_size": 64,
            "inner_hidden_size": 256,
            "num_layers": 2,
            "num_attention_heads": 4,
            "layernorm_epsilon": 1e-5,
            "position_encoding_2d": True,
            "vocab_size": 130528,
            "quantization_bit": 0,
            "pre_seq_len": 128,
        },
        "pre_seq_len.*P-tuning",
    ),
    "ChatGLM2-6B-32k": (
        CHATGLM3 | {"padded_vocab_size": 65024, "rope_ratio": 50},
        "rope_ratio is 50",
    ),
    "GLM-4-9B-0414": (
        LLAMA | {"model_type": "glm4", "attention_bias": True, "partial_rotary_factor": 0.5},
        "model_type is 'glm4'.*norms behind",
    ),
    "GLM-4-32B-0414": (
        LLAMA | {"model_type": "glm4", "attention_bias": False, "partial_rotary_factor": 0.5},
        "model_type is 'glm4'.*norms behind",
    ),
    "GLM-4.5-Air": (
        LLAMA
        | {
            "model_type": "glm4_moe",
            "n_routed_experts": 128,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": False,
        },
        "n_routed_experts.*mixture of experts",
    ),
    "GLM-4V-9B": (
        CHATGLM3 | {"vision_config": {"hidden_size": 1792, "patch_size": 14}},
        "vision_config.*images",
    ),
    "DeepSeek-V2-Lite": (
        LLAMA
        | {
            "model_type": "deepseek_v2",
            "n_routed_experts": 64,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "rope_scaling": {"type": "yarn", "factor": 40},
        },
        "n_routed_experts.*mixture of experts",
    ),
    "DeepSeek-V3.2": (
        LLAMA | {"model_type": "deepseek_v32", "n_routed_experts": 256, "index_topk": 2048},
        "n_routed_experts.*mixture of experts",
    ),
    "Kimi-K2": (
        LLAMA | {"model_type": "kimi_k2", "n_routed_experts": 384, "kv_lora_rank": 512},
        "n_routed_experts.*mixture of experts",
    ),
    "MiniMax-M2": (
        LLAMA | {"model_type": "minimax_m2", "num_local_experts": 256, "use_qk_norm": True},
        "num_local_experts.*mixture of experts",
    ),
    "gpt-oss-20b": (
        LLAMA
        | {
            "model_type": "gpt_oss",
            "num_local_experts": 32,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "quantization_config": {"quant_method": "mxfp4"},
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "truncate": False},
        },
        "num_local_experts.*mixture of experts",
    ),
    "Qwen3.5-35B-A3B": (
        {"model_type": "qwen3_5_moe", "text_config": {"num_experts": 256}, "vision_config": {}},
        "text_config.*images",
    ),
    "Qwen2.5-VL": (
        QWEN2
        | {
            "model_type": "qwen2_5_vl",
            "vision_config": {"depth": 32},
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config.*images",
    ),
    "Gemma-3-4B and MedGemma": (
        {"model_type": "gemma3", "text_config": {"hidden_size": 2560}, "vision_config": {}},
        "text_config.*images",
    ),
    "Gemma-3-1B": (
        LLAMA
        | {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "sliding_window": 512,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
        "sliding_window.*a sliding window",
    ),
    "Phi-4": (
        LLAMA
        | {
            "model_type": "phi3",
            "sliding_window": None,
            "original_max_position_embeddings": 16384,
            "attention_bias": False,
        },
        "model_type is 'phi3'",
    ),
    "Llama-4": (
        {"model_type": "llama4", "text_config": {"num_local_experts": 16}, "vision_config": {}},
        "text_config.*images",
    ),
    "Mistral-Small-3.1": (
        {"model_type": "mistral3", "text_config": {"hidden_size": 5120}, "vision_config": {}},
        "text_config.*images",
    ),
    "Ministral-8B": (MISTRAL | {"sliding_window": 32768}, "sliding_window is 32768"),
    "InternLM3": (
        LLAMA
        | {
            "model_type": "internlm3",
            "bias": False,
            "qkv_bias": False,
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        },
        "model_type is 'internlm3'",
    ),
    "MiniCPM4": (
        LLAMA
        | {
            "model_type": "minicpm",
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]},
        },
        "scale_emb.*scaled",
    ),
    "Baichuan2-7B": (
        LLAMA | {"model_type": "baichuan", "z_loss_weight": 0, "model_max_length": 4096},
        "model_type is 'baichuan'",
    ),
    "Qwen-7B": (
        LLAMA | {"model_type": "qwen", "no_bias": True, "kv_channels": 128, "seq_length": 8192},
        "model_type is 'qwen'",
    ),
    "SmolLM3": (
        LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]},
        "model_type is 'smollm3'",
    ),
    "Hunyuan-7B": (
        LLAMA
        | {
            "model_type": "hunyuan_v1_dense",
            "use_qk_norm": True,
            "rope_scaling": {"type": "dynamic", "alpha": 1000.0},
        },
        "model_type is 'hunyuan_v1_dense'",
    ),
    "BitNet": (
        LLAMA | {"model_type": "bitnet", "hidden_act": "relu2"},
        "hidden_act.*other than silu",
    ),
    "MiniCPM": (LLAMA | {"model_type": "minicpm", "scale_emb": 12}, "scale_emb.*scaled"),
    "biases everywhere": (LLAMA | {"attention_bias": True}, "attention_bias.*biases"),
    "biases of Qwen3's": (QWEN3 | {"attention_bias": True}, "attention_bias.*biases"),
    "biases of the feed-forward": (LLAMA | {"mlp_bias": True}, "mlp_bias.*biases"),
    "residuals behind norms": (
        CHATGLM3 | {"apply_residual_connection_post_layernorm": True},
        "residuals behind norms",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_network_is_refused_by_what_it_has(tmp_path, name, capsys):
    """In one line that names config.json, before anything about files: there are none here."""
    config, word = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (M.load_model, lambda folder: G.load_base(folder, "cpu", torch.float32)):
        with pytest.raises(ValueError, match=rf"config\.json: .*{word}") as error:
            load(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert run_command(G.main, "问", "--base_model", tmp_path) == 2
    assert re.fullmatch(rf"error: .*config\.json: .*{word}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, MISTRAL, CHATGLM3], ids=range(5))
def test_the_configs_that_those_differ_from_are_read(tmp_path, config):
    """So it is the named key for which the others are refused."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert M.read_config(file).num_hidden_layers == 2
    with pytest.raises(ValueError, match="weights not found"):
        M.load_model(tmp_path)


PUBLISHED = {  # config.json as published: parameters, by the model cards and indices
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "vocab_size": 152064,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32768,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        7_248_023_552,
    ),
    "Yi-1.5-6B": (
        LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 64000,
            "rope_theta": 5e6,
            "pretraining_tp": 1,
        },
        6_061_035_520,
    ),
    "HuatuoGPT-o1-8B, of Llama-3.1": (
        LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "mlp_bias": False,
        },
        8_030_261_248,
    ),
    "Qwen2.5-0.5B": (
        QWEN2
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "max_window_layers": 21,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        QWEN3
        | {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        596_049_920,
    ),
    "Mistral-Nemo": (
        MISTRAL
        | {
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
        },
        12_247_782_400,
    ),
    "GLM-4-9B in transformers": (
        LLAMA
        | {
            "model_type": "glm",
            "attention_bias": True,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "vocab_size": 151552,
            "partial_rotary_factor": 0.5,
        },
        9_399_951_360,
    ),
    "ChatGLM3-6B": (
        CHATGLM3
        | {
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "kv_channels": 128,
            "num_attention_heads": 32,
            "num_layers": 28,
            "padded_vocab_size": 65024,
        },
        6_243_584_000,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(tmp_path, name):
    values, count = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = M.LLaMA(M.read_config(tmp_path / "config.json"))
    assert sum(p.numel() for p in model.parameters()) == count


def test_large_angles_and_llama_31s_context_are_read(tmp_path):
    """Mistral-Small-24B-2501 turns RoPE by 1e8, its successors by 1e9; and the context of
    Llama-3.1, which Meta's files do not say, is above that of its first training."""
    (tmp_path / "config.json").write_text(json.dumps({**MISTRAL, "rope_theta": 1e9}))
    assert M.read_config(tmp_path / "config.json").rope_theta == 1e9
    (tmp_path / "params.json").write_text(json.dumps({**META, "use_scaled_rope": True}))
    config = M.read_config(tmp_path / "params.json")
    first = config.rope_scaling["original_max_position_embeddings"]
    assert config.max_position_embeddings > first == 8192
