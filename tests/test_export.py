"""Weights out: round trips bit for bit, folders that transformers opens, merging, weight
differences, the commands."""

import copy
import json
import re
import resource
import shutil
import sys

import generate as G
import lora as L
import model as M

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_adapters import peft_adapter
from test_checkpoints import IDS, equal, hugging_face, meta_state, our_names, write_meta
from transformers import AutoModelForCausalLM, AutoTokenizer

SHAPES = {
    "mha": {},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "wide": {"num_key_value_heads": 4, "intermediate_size": 200},
}


def command(monkeypatch, capsys, script, *args):
    """Run `python script.py args` in this process; what it printed."""
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, args)])
    script.main()
    return capsys.readouterr().out


def write_base(folder, tokenizer, **shape):
    """transformers' model in bf16, after writing its folder (sharded) and, where Meta's params.json
    can say its shape, Meta's folder, each with the tokenizer."""
    size = G.load_tokenizer(tokenizer.parent).vocab_size
    hf = hugging_face(vocab_size=size, max_position_embeddings=777, **shape).bfloat16()
    hf.save_pretrained(folder / "hf", max_shard_size="60KB")
    if hf.config.intermediate_size == 96:
        write_meta(folder / "meta", hf, 1)
    for path in folder.iterdir():
        shutil.copyfile(tokenizer, path / "tokenizer.model")
    return hf


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def bases(request, tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("bases")
    return folder, write_base(folder, base / "tokenizer.model", **request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("plain")
    return folder, write_base(folder, base / "tokenizer.model")


def test_round_trips_are_exact(tmp_path, bases, monkeypatch, capsys):
    """HF -> HF in shards -> Meta and Meta -> HF -> Meta: every tensor bit-equal; transformers opens
    each; one fingerprint."""
    folder, hf = bases
    meta = meta_state(hf)
    prints = set()
    for start in sorted(folder.iterdir()):
        ours, out, back = (tmp_path / f"{start.name}-{name}" for name in ("ours", "hf", "meta"))
        of_ours = ("--base_model", ours, "--output_dir")
        command(monkeypatch, capsys, M, "convert", start, ours)
        command(monkeypatch, capsys, L, "export", *of_ours, out, "--max-shard-gb", 60 / 2**20)
        command(monkeypatch, capsys, L, "export", *of_ours, back, "--layout", "meta")
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        if start.name == "hf" or not hf.config.tie_word_embeddings:  # Meta's layout knows no tie
            assert equal(theirs, hf)
        sizes = [f.stat().st_size for f in out.glob("model-*.safetensors")]
        assert len(sizes) > 2 and sorted(sizes)[-2] < 60 * 1024 + 4096  # one tensor may be larger
        state = torch.load(back / "consolidated.00.pth", weights_only=True)
        assert equal(state, meta)
        size = (back / "consolidated.00.pth").stat().st_size
        assert size < 1.5 * sum(t.nbytes for t in state.values()) + 50_000
        for path in (start, ours, out, back):
            assert equal(M.load_model(path), our_names(hf))
            prints.add(command(monkeypatch, capsys, M, "info", path).splitlines()[-1])
            assert (path / "tokenizer.model").is_file()
    assert len(prints) == 1 and next(iter(prints)).startswith("fingerprint ")
    other = M.load_model(start)
    other.norm.weight.data[3] += 1
    M.save_model(other, tmp_path / "other")
    assert (
        command(monkeypatch, capsys, M, "info", tmp_path / "other").splitlines()[-1] not in prints
    )


def test_metas_params_give_the_width_by_metas_formula(tmp_path, bases, monkeypatch, capsys):
    """model.py of facebookresearch/llama: 8/3 C times a factor, up to a multiple."""
    folder, hf = bases
    arguments = ("--base_model", folder / "hf", "--layout", "meta", "--output_dir", tmp_path / "m")
    command(monkeypatch, capsys, L, "export", *arguments)
    params = json.loads((tmp_path / "m" / "params.json").read_text())
    hidden_dim = int(2 * (4 * params["dim"]) / 3)
    hidden_dim = int(params["ffn_dim_multiplier"] * hidden_dim)
    multiple_of = params["multiple_of"]
    hidden_dim = multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)
    assert hidden_dim == hf.config.intermediate_size
    assert params["n_kv_heads"] == hf.config.num_key_value_heads
    assert params["norm_eps"] == hf.config.rms_norm_eps


def test_what_metas_params_cannot_say_is_refused(tmp_path, monkeypatch, capsys):
    hugging_face(num_key_value_heads=4, head_dim=16).save_pretrained(tmp_path / "wide")
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    hugging_face(rope_parameters=rope).save_pretrained(tmp_path / "scaled")
    for name, word in (("wide", "head_dim"), ("scaled", "rope_scaling")):
        arguments = ("--base_model", tmp_path / name, "--output_dir", tmp_path / "no")
        with pytest.raises(ValueError, match=f"{word}.*export as hf"):
            command(monkeypatch, capsys, L, "export", *arguments, "--layout", "meta")
    assert not (tmp_path / "no").exists()


def test_exported_folder_opens_in_transformers(tmp_path, bases, monkeypatch, capsys):
    """Same logits and, by AutoTokenizer, the same ids; special ids and trained length in
    config.json."""
    folder, hf = bases
    arguments = ("--base_model", folder / "hf", "--output_dir", tmp_path / "out")
    command(monkeypatch, capsys, L, "export", *arguments, "--dtype", "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert theirs.dtype == torch.float32 and theirs.config.max_position_embeddings == 777
    ours, tokenizer = G.load_base(folder / "hf", "cpu", torch.float32)
    with torch.no_grad():
        assert (theirs(IDS).logits - ours(IDS)).abs().max() < 1e-4
    ids = (theirs.config.bos_token_id, theirs.config.eos_token_id)
    assert ids == (tokenizer.bos_id, tokenizer.eos_id)
    text = "下面是一个问题，有什么功效？\n### 回答:\n"
    wanted = tokenizer.encode(text, bos=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == wanted


def test_config_and_tokenizer_of_an_export_are_the_bases_own(tmp_path, plain, monkeypatch, capsys):
    """What the base's config.json says besides the shape stays (special ids among it), and so do
    all files of its tokenizer; the shape and dtype are those of what was written."""
    shutil.copytree(plain[0] / "hf", tmp_path / "base")
    kept = {
        "bos_token_id": 5,
        "eos_token_id": [7, 8],
        "pad_token_id": 9,
        "initializer_range": 0.123,
        "note": "本草",
    }
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | kept))
    texts = {
        "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer", "chat_template": "x"}',
        "tokenizer.json": "{}",
        "special_tokens_map.json": '{"bos_token": "<s>"}',
        "added_tokens.json": "{}",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (tmp_path / "base" / name).write_text(text)
    peft_adapter(tmp_path / "adapter", hf=copy.deepcopy(plain[1]).float())
    arguments = ("--base_model", tmp_path / "base", "--lora_weights", tmp_path / "adapter")
    outputs = {name: tmp_path / name for name in ("converted", "exported", "merged")}
    command(monkeypatch, capsys, M, "convert", tmp_path / "base", outputs["converted"])
    for name in ("export", "merge"):
        folder = outputs["exported" if name == "export" else "merged"]
        more = ("--output_dir", folder, "--dtype", "fp16")
        command(monkeypatch, capsys, L, name, *arguments, *more)
    for name, folder in outputs.items():
        written = json.loads((folder / "config.json").read_text())
        assert {key: written[key] for key in kept} == kept
        dtype = "bfloat16" if name == "converted" else "float16"
        assert written["torch_dtype"] == dtype and "dtype" not in written
        assert written["hidden_size"] == 64 and written["max_position_embeddings"] == 777
        assert all((folder / name).read_text() == text for name, text in texts.items())
        assert (folder / "tokenizer.model").is_file()


def test_a_meta_base_exports_with_transformers_defaults(tmp_path, plain, monkeypatch, capsys):
    """params.json has no special ids; LLaMA's 1 and 2 are transformers' own. The tokenizer one
    level up, as Meta has it, goes along, with the settings that AutoTokenizer needs."""
    folder = tmp_path / "LLaMA" / "7B"
    shutil.copytree(plain[0] / "meta", folder)
    (folder / "tokenizer.model").rename(tmp_path / "LLaMA" / "tokenizer.model")
    arguments = ("--base_model", folder, "--output_dir", tmp_path / "out")
    command(monkeypatch, capsys, L, "export", *arguments)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    # Its generate() ends at what the file names: transformers 5 has no default here.
    assert theirs.generation_config.eos_token_id == 2
    assert equal(theirs, plain[1]) and theirs.config.max_position_embeddings == 2048
    ids = G.load_tokenizer(folder).encode("有什么功效", bos=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("有什么功效").input_ids == ids


def test_merge_and_export_with_an_adapter(tmp_path, plain, monkeypatch, capsys):
    """Merged in float32: peft's logits. In bf16 the relative error of the stored updates is
    printed."""
    folder, hf = plain
    targets = ["q_proj", "k_proj", "down_proj"]
    peft_adapter(tmp_path / "adapter", hf=copy.deepcopy(hf).float(), target_modules=targets)
    adapter = ("--base_model", folder / "hf", "--lora_weights", tmp_path / "adapter")
    adapter += ("--output_dir",)
    wide = ("--dtype", "fp32")
    out = command(monkeypatch, capsys, L, "merge", *adapter, tmp_path / "merged", *wide)
    assert "lose 0.0% on average" in out
    command(monkeypatch, capsys, L, "export", *adapter, tmp_path / "hf", *wide)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    wanted = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(IDS).logits
    assert (M.load_model(tmp_path / "merged")(IDS) - wanted).abs().max() < 1e-4
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (exported(IDS).logits - wanted).abs().max() < 1e-4
    out = command(monkeypatch, capsys, L, "merge", *adapter, tmp_path / "rough")
    average = float(out.split("lose ")[1].split("%")[0])
    assert 0.05 < average < 5 and "bfloat16" in out
    with pytest.raises(ValueError, match="exists and is not empty"):
        command(monkeypatch, capsys, L, "merge", *adapter, tmp_path / "rough")


def test_bad_options_cost_no_loading(tmp_path, plain, monkeypatch, capsys):
    """A folder that is there already and a size that is none are refused before all reading."""
    hf = ("--base_model", plain[0] / "hf")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    monkeypatch.setattr(L, "load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="not empty"):
        command(monkeypatch, capsys, L, "export", *hf, "--output_dir", tmp_path / "there")
    for size in ("0", "-1", "inf", "nan"):
        more = ("--output_dir", tmp_path / "new", f"--max_shard_gb={size}")
        with pytest.raises(ValueError, match="max_shard_gb"):
            command(monkeypatch, capsys, L, "export", *hf, *more)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "layout, file", [("meta", "consolidated.00.pth"), ("hf", "model-00001.safetensors")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path, plain, layout, file, monkeypatch, capsys
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ("--base_model", plain[0] / "hf", "--output_dir", tmp_path / "new")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=f"{file} cannot be written"):
            command(monkeypatch, capsys, L, "export", *arguments, "--layout", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_hubs_name_is_found_in_its_cache(tmp_path, plain, monkeypatch, capsys):
    cache = tmp_path / "models--me--b"
    shutil.copytree(plain[0] / "hf", cache / "snapshots" / "5f98ee")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("5f98ee")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    out = ("--output_dir", tmp_path / "out")
    command(monkeypatch, capsys, L, "export", "--base_model", "me/b", *out)
    assert equal(M.load_model(tmp_path / "out"), our_names(plain[1]))
    with pytest.raises(ValueError, match="'me/c' is neither a folder nor in .*give its folder"):
        command(monkeypatch, capsys, L, "export", "--base_model", "me/c", *out)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_recover_applies_a_weight_difference(tmp_path, plain, layout, monkeypatch, capsys):
    """As weight_diff.py: tuned - raw, [PAD] being a new row; raw's new row is the mean of its
    rows."""
    folder, hf = plain
    raw = copy.deepcopy(hf).float()
    size = raw.config.vocab_size
    tuned = hugging_face(seed=1, vocab_size=size + 1)
    difference = hugging_face(seed=1, vocab_size=size + 1)
    for (_, d), r in zip(difference.state_dict().items(), raw.state_dict().values()):
        d.sub_(torch.cat([r, r.mean(0, keepdim=True)]) if len(r) != len(d) else r)
    difference.save_pretrained(tmp_path / "diff")
    shutil.copyfile(folder / "hf" / "tokenizer.model", tmp_path / "diff" / "tokenizer.model")
    (tmp_path / "diff" / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    arguments = ("--base_model", folder / layout, "--weight_diff", tmp_path / "diff")
    out = command(monkeypatch, capsys, L, "recover", *arguments, "--output_dir", tmp_path / "tuned")
    ours, _ = G.load_base(tmp_path / "tuned", "cpu", torch.float32)
    wanted = our_names(tuned)
    assert all((p - wanted[name]).abs().max() < 1e-6 for name, p in ours.named_parameters())
    total = sum(p.sum().item() for p in tuned.parameters())
    tables = 2 * tuned.model.rotary_emb.inv_freq.sum().item()  # of two layers
    printed = [float(words.split()[0].strip(",")) for words in re.split("to ", out)[-2:]]
    assert printed == pytest.approx([total + tables, total], abs=1e-2)
    more = ("--layout", "meta", "--output_dir", tmp_path / "meta")
    command(monkeypatch, capsys, L, "recover", *arguments, *more)
    assert (tmp_path / "meta/consolidated.00.pth").is_file()
    ours, _ = G.load_base(tmp_path / "meta", "cpu", torch.float32)
    assert all((p - wanted[name]).abs().max() < 1e-6 for name, p in ours.named_parameters())
    with pytest.raises(ValueError, match="is \\(.*\\), \\(.*\\) in"):
        L.recover(tmp_path / "tuned", folder / "hf", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_tensors_are_cut_into_files_of_the_size_asked_for():
    """In their order, as full as they go; a tensor larger than a file has one alone."""
    sizes = [3, 3, 2, 9, 1, 8, 4]
    tensors = [(str(i), torch.full((size,), i, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    shards = list(M.split_into_shards(iter(tensors), 8))
    assert [[len(t) for t in shard.values()] for shard in shards] == [[3, 3, 2], [9], [1], [8], [4]]
    assert [name for shard in shards for name in shard] == [name for name, _ in tensors]


def test_saved_files_are_what_the_library_reads(tmp_path, plain):
    """Each shard, its tensors and the index that says where, by safetensors' own reader."""
    model = M.load_model(plain[0] / "hf")
    M.save_hf(model.config, model.named_parameters(), tmp_path, torch.bfloat16, max_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert index[key] == file.name and key not in found
            found[key] = tensor
    assert equal(found, plain[1].state_dict())
