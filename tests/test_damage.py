"""Damaged checkpoints: `model.py convert` answers each with one line that names file and key, exit code 2, nothing written."""
import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import hugging_face, write_bin, write_meta

import generate as G
import model as M

KEY, META_KEY = "model.layers.1.mlp.up_proj.weight", "layers.1.feed_forward.w3.weight"
INDEX, FIRST, LAST = "model.safetensors.index.json", "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One model in every layout, bf16: hf (sharded), single, bin, bins, meta (two shards), ours."""
    folder, hf = tmp_path_factory.mktemp("good"), hugging_face().bfloat16()
    hf.save_pretrained(folder / "hf", max_shard_size="60KB")
    hf.save_pretrained(folder / "single")
    write_bin(folder / "bin", hf)
    write_bin(folder / "bins", hf, 2)
    write_meta(folder / "meta", hf, 2)
    M.save_model(M.load_model(folder / "single"), folder / "ours")
    return folder


def edit_json(name, **values):
    """Set values in a JSON file; None removes the key."""
    def edit(folder):
        value = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
    return edit


def place(key, file):
    """Let the index place a key in another file."""
    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][key] = file
        (folder / INDEX).write_text(json.dumps(index))
    return edit


def state(name, change):
    """Change the tensors of a file; what change returns, if anything, takes their place."""
    def edit(folder):
        file = folder / name
        old = load_file(file) if name.endswith("safetensors") else torch.load(file, weights_only=True)
        new = change(old) or old
        save_file(new, file) if name.endswith("safetensors") else torch.save(new, file)
    return edit


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def remove(name):
    return lambda folder: (folder / name).unlink()


def swap(a, b):
    def edit(folder):
        (folder / a).rename(folder / "x")
        (folder / b).rename(folder / a)
        (folder / "x").rename(folder / b)
    return edit


class Code:
    """A pickle of it runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch code_was_run",)


def poison(value):
    return lambda s: s[KEY if KEY in s else META_KEY].view(-1)[5:6].fill_(value) and None


def drop(key):
    return lambda s: {k: t for k, t in s.items() if k != key}


def resize(s):
    key = KEY if KEY in s else META_KEY
    s[key] = s[key][:-1].clone()


META0, META1 = "consolidated.00.pth", "consolidated.01.pth"
DAMAGES = {  # name: (layout, what is done, what the line must name)
    "no folder": ("hf", lambda f: shutil.rmtree(f), ["not found"]),
    "empty folder": ("hf", lambda f: [p.unlink() for p in f.iterdir()], ["model.safetensors"]),
    "hf missing shard": ("hf", remove(LAST), [LAST, "not found"]),
    "hf swapped shards": ("hf", swap(FIRST, LAST), [FIRST, "weight"]),
    "hf truncated shard": ("hf", cut(LAST, 700), [LAST, "damaged"]),
    "hf missing key": ("single", state("model.safetensors", drop(KEY)), ["model.safetensors", KEY]),
    "hf extra key": ("single", state("model.safetensors", lambda s: s.update({"model.extra.weight": torch.ones(2)})),
                     ["model.safetensors", "model.extra.weight"]),
    "hf one layer more": ("single", edit_json("config.json", num_hidden_layers=3), ["model.layers.2"]),
    "hf one layer less": ("single", edit_json("config.json", num_hidden_layers=1), ["model.layers.1"]),
    "hf wrong shape": ("single", state("model.safetensors", resize), ["model.safetensors", KEY]),
    "hf NaN": ("single", state("model.safetensors", poison(float("nan"))), ["model.safetensors", KEY, "NaN"]),
    "hf infinity": ("single", state("model.safetensors", poison(float("-inf"))), ["model.safetensors", KEY]),
    "hf mixed dtypes": ("single", state("model.safetensors", lambda s: s.update({KEY: s[KEY].half()})),
                        ["model.safetensors", KEY, "float16"]),
    "hf integer weights": ("single", state("model.safetensors", lambda s: s.update({KEY: s[KEY].char()})), [KEY, "int8"]),
    "hf tensor of another rank": ("single", state("model.safetensors", lambda s: s.update({KEY: s[KEY].flatten()})), [KEY]),
    "index is no JSON": ("hf", write(INDEX, b"{"), [INDEX, "JSON"]),
    "index without map": ("hf", edit_json(INDEX, weight_map=None), [INDEX, "weight_map"]),
    "index leaves the folder": ("hf", place(KEY, "../single/model.safetensors"), [INDEX, KEY, "../single"]),
    "index with an absolute path": ("hf", place(KEY, "/etc/passwd"), [INDEX, KEY, "/etc/passwd"]),
    "index with a backslash": ("hf", place(KEY, "..\\model.safetensors"), [INDEX, KEY]),
    "index with a number": ("hf", place(KEY, 7), [INDEX, KEY]),
    "index places a key elsewhere": ("hf", place(KEY, FIRST), [KEY]),
    "index with a key that is nowhere": ("hf", place("model.ghost.weight", FIRST), [FIRST, "model.ghost.weight"]),
    "no config": ("hf", remove("config.json"), ["config.json"]),
    "config is no JSON": ("hf", write("config.json", b"not json"), ["config.json"]),
    "config is a list": ("hf", write("config.json", b"[]"), ["config.json"]),
    "config is not UTF-8": ("hf", write("config.json", b"\xff\xfe"), ["config.json"]),
    **{f"config without {key}": ("single", edit_json("config.json", **{key: None}), ["config.json", key]) for key in
       ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "vocab_size")},
    "config with a text for a number": ("single", edit_json("config.json", hidden_size="64"), ["config.json", "64"]),
    "another architecture": ("single", edit_json("config.json", model_type="qwen2"), ["config.json", "qwen2"]),
    "biases": ("single", edit_json("config.json", attention_bias=True), ["attention_bias"]),
    "another activation": ("single", edit_json("config.json", hidden_act="gelu"), ["hidden_act", "gelu"]),
    "quantised": ("single", edit_json("config.json", quantization_config={"bits": 4}), ["quantization_config"]),
    "rope scaling unknown": ("single", edit_json("config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0}), ["yarn"]),
    "rope scaling without factor": ("single", edit_json("config.json", rope_parameters={"rope_type": "linear"}), ["factor"]),
    "rope scaling is a text": ("single", edit_json("config.json", rope_parameters="linear"), ["config.json", "linear"]),
    "rope type is a list": ("single", edit_json("config.json", rope_parameters={"rope_type": ["linear"]}), ["config.json", "linear"]),
    "config of brackets": ("single", write("config.json", b"[" * 100_000), ["config.json", "JSON"]),
    **{f"{key} {value:.3g}": (layout, edit_json(file, **{key: value}), [file, wanted]) for layout, file, key, value, wanted in (
        ("single", "config.json", "hidden_size", 2**40, "2^24"), ("single", "config.json", "vocab_size", 10**30, "2^24"),
        ("ours", "params.json", "ffn_dim_multiplier", 1e300, "2^64"), ("ours", "params.json", "ffn_dim_multiplier", 1e9, "2^24"))},
    "heads that do not divide": ("single", edit_json("config.json", num_key_value_heads=3), ["config.json", "3"]),
    "fewer key heads than held": ("single", edit_json("config.json", num_key_value_heads=4), ["k_proj"]),
    "wrong vocabulary": ("single", edit_json("config.json", vocab_size=49954), ["lm_head", "49954"]),
    "tied but different": ("single", edit_json("config.json", tie_word_embeddings=True), ["tied"]),
    "pickle that runs code": ("bin", lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps({KEY: Code()}, 2)),
                              ["pytorch_model.bin", "system"]),
    "zipped pickle that runs code": ("bin", lambda f: torch.save({KEY: Code()}, f / "pytorch_model.bin"),
                                     ["pytorch_model.bin", "system"]),
    "bin truncated": ("bin", lambda f: os.truncate(f / "pytorch_model.bin", 90_000), ["pytorch_model.bin", "damaged"]),
    "bin empty": ("bin", write("pytorch_model.bin", b""), ["pytorch_model.bin", "damaged"]),
    "bin is a page": ("bin", write("pytorch_model.bin", b"<html>404</html>"), ["pytorch_model.bin", "damaged"]),
    "bin is a pointer of git-lfs": ("bin", write("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n"),
                                    ["pytorch_model.bin"]),
    "bin holds a list": ("bin", lambda f: torch.save([torch.ones(2)], f / "pytorch_model.bin"), ["pytorch_model.bin", "list"]),
    "bin holds text": ("bin", state("pytorch_model.bin", lambda s: s.update({KEY: "weights"})), ["pytorch_model.bin", KEY]),
    "bin holds a sparse tensor": ("bin", state("pytorch_model.bin", lambda s: s.update({KEY: s[KEY].to_sparse()})), [KEY]),
    "bin holds a tensor without data": ("bin", state("pytorch_model.bin", lambda s: s.update({KEY: s[KEY].to("meta")})), [KEY]),
    "bin has a number for a key": ("bin", state("pytorch_model.bin", lambda s: s.update({7: s[KEY]})), ["pytorch_model.bin", "7"]),
    "bins, a shard missing": ("bins", remove("pytorch_model-00002-of-00002.bin"), ["pytorch_model-00002-of-00002.bin"]),
    "safetensors is a page": ("single", write("model.safetensors", b"<html>404 not found</html>"), ["model.safetensors"]),
    "safetensors header too long": ("single", write("model.safetensors", b"\xff" * 64), ["model.safetensors"]),
    "meta missing last shard": ("meta", remove(META1), [META0, "tok_embeddings", "is one missing?"]),
    "meta missing first shard": ("meta", remove(META0), [META0, "not found"]),
    "meta swapped shards": ("meta", swap(META0, META1), [META0, "consolidated.01"]),
    "meta truncated": ("meta", cut(META1, 60_000), [META1, "damaged"]),
    "meta missing key": ("meta", state(META1, drop(META_KEY)), [META1, META_KEY]),
    "meta missing key in both": ("meta", lambda f: [state(n, drop(META_KEY))(f) for n in (META0, META1)],
                                 [META0, META_KEY]),
    "meta extra key": ("meta", state(META1, lambda s: s.update({"extra": torch.ones(2)})), [META1, "extra"]),
    "meta wrong shape": ("meta", state(META1, resize), [META1, META_KEY]),
    "meta NaN": ("meta", state(META1, poison(float("nan"))), ["consolidated", META_KEY, "NaN"]),
    "meta mixed dtypes": ("meta", state(META1, lambda s: s.update({META_KEY: s[META_KEY].float()})), [META1, META_KEY]),
    "meta shards of two models": ("meta", state(META1, lambda s: s.update({"norm.weight": s["norm.weight"] + 1})),
                                  [META0, "norm.weight"]),
    "meta pickle that runs code": ("meta", lambda f: torch.save({META_KEY: Code()}, f / META1), [META1, "system"]),
    "no params": ("meta", remove("params.json"), ["params.json"]),
    "params without a field": ("meta", edit_json("params.json", norm_eps=None), ["params.json", "norm_eps"]),
    "params with an unknown field": ("meta", edit_json("params.json", use_scaled_rope=True), ["params.json", "use_scaled_rope"]),
    "params with a list of scaling": ("ours", edit_json("params.json", rope_scaling=["linear"]), ["params.json", "linear"]),
    "params of another model": ("meta", edit_json("params.json", dim=128), [META0]),
    "ours truncated": ("ours", cut("model.safetensors", 9_000), ["model.safetensors", "damaged"]),
    "ours NaN": ("ours", state("model.safetensors", poison(float("nan"))), ["model.safetensors", META_KEY]),
}


def test_there_are_enough():
    assert len(DAMAGES) >= 40


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folder_is_refused_in_one_line(tmp_path, good, name, monkeypatch, capsys):
    layout, damage, words = DAMAGES[name]
    source = tmp_path / "source"
    shutil.copytree(good / layout, source)
    damage(source)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["model.py", "convert", str(source), str(tmp_path / "out" / "deep")])
    with pytest.raises(SystemExit) as end:
        M.run(M.main)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and line.startswith("error: ") and len(line) < 500, line
    for word in (*words, str(source)):
        assert word in line, line
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before       # nor did the pickle touch a file
    with pytest.raises(ValueError, match=re.escape(line[7:60].strip())):                    # the same in every script
        M.load_model(source)


def test_an_old_pickle_with_any_byte_changed_loads_or_is_refused(tmp_path, good):
    """Files of torch before 1.6: what their reader stumbles over has many kinds of error."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({KEY: torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    whole, refused = file.read_bytes(), 0
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1:])
        try:
            M.describe(file)
        except ValueError:
            refused += 1
    assert refused > len(whole) // 4


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path, good, monkeypatch, capsys):
    shutil.copytree(good / "single", tmp_path / "m")
    state("model.safetensors", poison(1e5))(tmp_path / "m")
    monkeypatch.setattr(sys, "argv", ["model.py", "convert", str(tmp_path / "m"), str(tmp_path / "out"), "--dtype", "fp16"])
    with pytest.raises(SystemExit):
        M.run(M.main)
    line = capsys.readouterr().err
    assert KEY in line and "65504" in line and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="65504"):
        M.load_model(tmp_path / "m", dtype=torch.float16)
    M.load_model(tmp_path / "m", dtype=torch.float32)


def test_init_does_not_write_over_weights(tmp_path, good, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "init", str(good / "ours" / "params.json"), str(tmp_path / "new")])
    M.run(M.main)
    size = (tmp_path / "new" / "model.safetensors").stat().st_size
    assert f"{size / 2**20:.1f} MiB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        M.run(M.main)
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["hf", "single", "bin", "bins", "meta", "ours"])
def test_the_undamaged_folders_convert(tmp_path, good, layout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "convert", str(good / layout), str(tmp_path / "out")])
    M.run(M.main)
    assert "no tokenizer.model was found" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.safetensors", "params.json"]
    with pytest.raises(SystemExit):                                                         # never over something
        M.run(M.main)


def test_mixed_dtypes_are_joined_when_one_is_named(tmp_path, good, monkeypatch):
    shutil.copytree(good / "single", tmp_path / "mixed")
    state("model.safetensors", lambda s: s.update({KEY: s[KEY].float()}))(tmp_path / "mixed")
    monkeypatch.setattr(sys, "argv", ["model.py", "convert", str(tmp_path / "mixed"), str(tmp_path / "out"), "--dtype", "bf16"])
    M.main()
    ours, whole = M.load_model(tmp_path / "out"), M.load_model(good / "ours")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), whole.parameters()))


def test_a_tokenizer_of_another_size_is_named_with_both_sizes(tmp_path, good, base):
    shutil.copytree(good / "single", tmp_path / "m")
    shutil.copyfile(base / "tokenizer.model", tmp_path / "m" / "tokenizer.model")
    size = G.Tokenizer(base / "tokenizer.model").vocab_size
    with pytest.raises(ValueError, match=f"{size} pieces, the model 304 embedding rows"):
        G.load_base(tmp_path / "m", "cpu", torch.float32)
