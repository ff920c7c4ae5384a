"""Checkpoints in the layouts that people have, written by transformers or by index here, against
transformers' logits."""

import json
import shutil
from dataclasses import asdict, replace

import generate as G
import model as M

import pytest
import torch
from conftest import make_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PIECES = {
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
    "up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
}
IDS = torch.tensor([[1, 5, 99, 17, 17, 0, 42, 3, 88, 250]])


def hugging_face(seed=0, **more):
    """transformers' LLaMA with weights large enough that a wrong row is seen in the logits."""
    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 304,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **more})).eval()
    for p in model.parameters():
        p.data.normal_(1 if p.dim() == 1 else 0, 0.1)
    return model


def meta_state(hf):
    """Meta's names and row order, made here by an index: row 2i + j of a head is Hugging Face's
    row i + j D/2."""
    D, state = hf.config.head_dim, {}
    for key, tensor in hf.state_dict().items():
        parts = key.removeprefix("model.").split(".")
        name = PIECES[parts[-2]] + ".weight"
        if parts[-2] in ("q_proj", "k_proj"):
            heads, pairs = range(tensor.size(0) // D), range(D // 2)
            tensor = tensor[[h * D + i + j * D // 2 for h in heads for i in pairs for j in (0, 1)]]
        state[f"layers.{parts[1]}.{name}" if parts[0] == "layers" else name] = tensor.clone()
    return state


def write_meta(folder, hf, shards, **params):
    """Meta's folder, split as fairscale's parallel layers hold them: outputs, inputs, or the
    embedding's width."""
    folder.mkdir(parents=True)
    c = hf.config
    for n in range(shards):
        part = {"rope.freqs": torch.zeros(c.head_dim // 2)}
        for name, tensor in meta_state(hf).items():
            axis = {"wo": 1, "w2": 1, "tok_embeddings": 1}.get(name.split(".")[-2], 0)
            cut = tensor if "norm" in name else tensor.chunk(shards, axis)[n]
            part[name] = cut.clone()
        torch.save(part, folder / f"consolidated.{n:02}.pth")
    values = {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "vocab_size": -1,
        "norm_eps": c.rms_norm_eps,
        "n_kv_heads": c.num_key_value_heads,
        "multiple_of": 32,
        "ffn_dim_multiplier": 0.5,
    }
    (folder / "params.json").write_text(json.dumps({**values, **params}))


def write_bin(folder, hf, files=1):
    """pytorch_model.bin as old transformers wrote it, rotary_emb.inv_freq included."""
    folder.mkdir(parents=True)
    hf.config.save_pretrained(folder)
    state = {**hf.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if files == 1:
        return torch.save(state, folder / "pytorch_model.bin")
    names = {
        key: f"pytorch_model-{i % files + 1:05}-of-{files:05}.bin" for i, key in enumerate(state)
    }
    for name in set(names.values()):
        part = {k: v.clone() for k, v in state.items() if names[k] == name}
        torch.save(part, folder / name)
    index = {"metadata": {}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def equal(a, b):
    """Whether two modules, or states, hold the same tensors, bit for bit, under the same names."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    same = (torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a if k in b)
    return a.keys() == b.keys() and all(same)


def our_names(hf):
    """transformers' weights under the names that they have here."""
    return {key.removeprefix("model."): tensor for key, tensor in hf.state_dict().items()}


SHAPES = {
    "mha": {},
    "gqa tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "head_dim": {"num_key_value_heads": 4, "head_dim": 16},
    "49954": {"num_key_value_heads": 2, "vocab_size": 49954},
}


@pytest.mark.parametrize("more", SHAPES.values(), ids=SHAPES)
def test_every_layout_gives_transformers_logits(tmp_path, more):
    hf = hugging_face(**more)
    hf.save_pretrained(tmp_path / "single")
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    write_bin(tmp_path / "bin", hf)
    write_bin(tmp_path / "bins", hf, 3)
    shards = () if "head_dim" in more else (1, 2) if "vocab_size" in more else (1, 2, 8)
    for n in shards:  # params.json has no head_dim
        write_meta(tmp_path / f"meta{n}", hf, n)
    first = M.load_model(tmp_path / "single")
    M.save_model(first, tmp_path / "ours")
    with torch.no_grad():
        wanted = hf(IDS).logits
        assert (first(IDS) - wanted).abs().max() < 1e-4 < wanted.abs().max()
    assert equal(first, our_names(hf))
    for folder in sorted(tmp_path.iterdir()):
        model = M.load_model(folder)
        assert equal(model, first), folder.name
        tied = "tie_word_embeddings" in more and not folder.name.startswith("meta")
        assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), hf)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_tied_head_may_stand_in_the_file_too(tmp_path, layout):
    """Old transformers wrote it twice; equal it is one parameter, otherwise the folder is refused
    (see test_damage.py)."""
    hf = hugging_face()
    hf.lm_head.weight.data.copy_(hf.model.embed_tokens.weight)
    hf.save_pretrained(tmp_path, max_shard_size="60KB" if layout == "sharded" else "5GB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = M.load_model(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight and equal(model, our_names(hf))


def test_mixed_dtypes_become_the_embeddings(tmp_path):
    """Norms in float32 beside bf16, as some folders have them: all is cast to the embedding's."""
    hf = hugging_face().bfloat16()
    wide = {k: t.float() if "norm" in k else t for k, t in hf.state_dict().items()}
    write_bin(tmp_path / "mixed", hf)
    torch.save(wide, tmp_path / "mixed" / "pytorch_model.bin")
    assert equal(M.load_model(tmp_path / "mixed"), our_names(hf))
    assert equal(M.load_model(tmp_path / "mixed", dtype=torch.float32), our_names(hf.float()))


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "theta": {"rope_type": "default"},
}


@pytest.mark.parametrize("kind", ROPE)
def test_rope_of_both_config_forms(tmp_path, kind):
    """transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling; both give its
    logits, and it gives them with what we write."""
    rope = {**ROPE[kind], "rope_theta": 500.0}
    hf = hugging_face(rope_parameters=rope, num_key_value_heads=2, head_dim=16)
    hf.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    assert rope["rope_theta"] == 500.0 and rope["rope_type"] == ROPE[kind]["rope_type"]
    old = {k: v for k, v in rope.items() if k != "rope_theta"}
    if kind == "linear":
        old["type"] = old.pop("rope_type")
    config |= {"rope_theta": 500.0, "rope_scaling": None if kind == "theta" else old}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    ids = torch.arange(200)[None]
    with torch.no_grad():
        wanted = hf(ids).logits
        for name in ("new", "old"):
            model = M.load_model(tmp_path / name)
            assert (model(ids) - wanted).abs().max() < 1e-4
            M.save_model(model, tmp_path / f"ours-{name}", tmp_path / name)
            again = M.load_model(tmp_path / f"ours-{name}")
            assert again.config == model.config and torch.equal(again(ids), model(ids))
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"ours-{name}")
            assert (theirs(ids).logits - wanted).abs().max() < 1e-4


def test_llama3_shards_the_embedding_by_rows(tmp_path):
    hf = hugging_face(num_key_value_heads=2)
    write_meta(tmp_path / "meta", hf, 2, vocab_size=304)
    for n in (0, 1):
        file = tmp_path / "meta" / f"consolidated.{n:02}.pth"
        part = torch.load(file, weights_only=True)
        rows = meta_state(hf)["tok_embeddings.weight"].chunk(2, 0)[n]
        torch.save({**part, "tok_embeddings.weight": rows.clone()}, file)
    with torch.no_grad():
        assert (M.load_model(tmp_path / "meta")(IDS) - hf(IDS).logits).abs().max() < 1e-4


def test_old_pickles_that_cannot_be_mapped_load(tmp_path):
    hf = hugging_face()
    write_bin(tmp_path / "a", hf)
    file = tmp_path / "a" / "pytorch_model.bin"
    torch.save(hf.state_dict(), file, _use_new_zipfile_serialization=False)
    assert equal(M.load_model(tmp_path / "a"), our_names(hf))


def test_a_bin_of_parameters_loads(tmp_path):
    """As torch.save(dict(model.named_parameters())) writes it: tensors that ask for a gradient."""
    hf = hugging_face()
    write_bin(tmp_path / "a", hf)
    torch.save(dict(hf.named_parameters()), tmp_path / "a" / "pytorch_model.bin")
    M.convert(tmp_path / "a", tmp_path / "b")
    assert equal(M.load_model(tmp_path / "b"), our_names(hf))


def test_wrong_ids_in_the_config_are_told_and_not_followed(tmp_path, base, capsys):
    """decapoda-research/llama-7b-hf: bos 0, eos 1 and pad -1 in config.json, 1 and 2 in
    tokenizer.model."""
    hf = hugging_face(vocab_size=G.load_tokenizer(base).vocab_size)
    folder = tmp_path / "llama" / "7b-hf"
    write_bin(folder, hf)
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": -1,
        "max_sequence_length": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    above = tmp_path / "llama" / "tokenizer.model"  # one level up, as Meta has it
    shutil.copyfile(base / "tokenizer.model", above)
    model, tokenizer = G.load_base(folder, "cpu", torch.float32)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    warning = capsys.readouterr().err
    assert str(folder / "config.json") in warning and "pad_token_id" not in warning
    assert "bos_token_id 0, tokenizer.model 1" in warning
    assert "eos_token_id 1, tokenizer.model 2" in warning
    right = config | {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(right))
    G.load_base(folder, "cpu", torch.float32)
    assert capsys.readouterr().err == ""


def test_added_tokens_count_as_pieces(tmp_path, base):
    """Alpaca's [PAD] is an embedding row and no piece of tokenizer.model; without its row
    added_tokens.json is another base's."""
    size = G.load_tokenizer(base).vocab_size
    M.save_model(M.LLaMA(make_config(vocab_size=size + 1)), tmp_path, base)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size, "[SEP]": size + 1}))
    with pytest.raises(ValueError, match=f"{size + 2} pieces, the model {size + 1} embedding rows"):
        G.load_base(tmp_path, "cpu", torch.float32)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    _, tokenizer = G.load_base(tmp_path, "cpu", torch.float32)
    assert tokenizer.decode([*tokenizer.encode("偏头痛"), size]) == "偏头痛"


ONE = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-6,
    "vocab_size": -1,
}
TWO = {"multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8, "norm_eps": 1e-5}
HF7 = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
    "model_type": "llama",
}
HF70 = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SMALL = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
}
DEEP = {"dim": 8192, "n_heads": 64, "n_layers": 80}
PUBLISHED = {  # params.json or config.json as published: parameters
    "LLaMA 7B": (ONE, 6_738_415_616),
    "LLaMA 13B": (ONE | {"dim": 5120, "n_heads": 40, "n_layers": 40}, 13_015_864_320),
    "LLaMA 30B": (ONE | {"dim": 6656, "n_heads": 52, "n_layers": 60}, 32_528_943_616),
    "LLaMA 65B": (ONE | DEEP | {"norm_eps": 1e-5}, 65_285_660_672),
    "LLaMA-2 70B": (ONE | TWO | DEEP, 68_976_648_192),
    "LLaMA-2 70B, HF": (HF7 | HF70, 68_976_648_192),
    "TinyLlama": (HF7 | SMALL, 1_100_048_384),
    "Chinese-LLaMA 7B": (HF7 | {"vocab_size": 49953}, 6_885_486_592),
    "Chinese-Alpaca 7B": (HF7 | {"vocab_size": 49954}, 6_885_494_784),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(tmp_path, name):
    """Built on meta. Counts as their model cards give them; Chinese-LLaMA's is 7B's plus 17,953
    rows of 4,096, twice. What we write of a shape in either layout is read as that shape."""
    params, count = PUBLISHED[name]
    file = tmp_path / ("config.json" if "hidden_size" in params else "params.json")
    file.write_text(json.dumps(params))
    config = M.read_config(file, 32000)
    with torch.device("meta"):
        assert sum(p.numel() for p in M.LLaMA(config).parameters()) == count
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    (tmp_path / "params.json").write_text(json.dumps(M.config_to_meta(config)))
    assert M.read_config(tmp_path / "config.json") == config
    trained = config.max_position_embeddings  # which params.json does not say
    assert (
        replace(M.read_config(tmp_path / "params.json"), max_position_embeddings=trained) == config
    )


def test_transformers_reads_its_own_folder_after_us(tmp_path):
    """Nothing in a source folder is touched by loading it, and merging into mapped weights leaves
    the file as it is."""
    hf = hugging_face()
    hf.save_pretrained(tmp_path)
    model = M.load_model(tmp_path)
    model.layers[0].self_attn.v_proj.weight.data.add_(1)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(IDS).logits, hf(IDS).logits)
