"""Damaged checkpoints: `model.py convert` answers each with one line that names file and key, exit
code 2, nothing written. What only looks damaged converts."""

import json
import os
import pickle
import re
import shutil
import sys

import generate as G
import model as M

import pytest
import torch
from conftest import make_config
from safetensors.torch import load_file, save_file
from test_checkpoints import equal, hugging_face, meta_state, our_names, write_bin, write_meta

KEY, META_KEY = "model.layers.1.mlp.up_proj.weight", "layers.1.feed_forward.w3.weight"
WO = "layers.1.attention.wo.weight"
INDEX = "model.safetensors.index.json"
FIRST, LAST = (f"model-{n:05}-of-00004.safetensors" for n in (1, 4))
BIN, SINGLE, CONFIG, PARAMS = "pytorch_model.bin", "model.safetensors", "config.json", "params.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One model in every layout, bf16: hf (sharded), single, bin, bins, meta (two shards), ours,
    and old: what this project once wrote, Meta's names in one model.safetensors."""
    folder, hf = tmp_path_factory.mktemp("good"), hugging_face().bfloat16()
    hf.save_pretrained(folder / "hf", max_shard_size="60KB")
    hf.save_pretrained(folder / "single")
    write_bin(folder / "bin", hf)
    write_bin(folder / "bins", hf, 2)
    write_meta(folder / "meta", hf, 2)
    M.save_model(M.load_model(folder / "single"), folder / "ours")
    shutil.copytree(folder / "meta", folder / "old", ignore=shutil.ignore_patterns("*.pth"))
    save_file(meta_state(hf), folder / "old" / "model.safetensors")
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
        if name.endswith("safetensors"):
            old = load_file(file)
            save_file(change(old) or old, file)
        else:
            old = torch.load(file, weights_only=True)
            torch.save(change(old) or old, file)

    return edit


def put(key, tensor):
    """For `state`: set a key, to what a function makes of the old tensor if it is one."""
    return lambda s: s.update({key: tensor(s[key]) if callable(tensor) else tensor})


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
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "vocab_size",
)
YARN = {"rope_type": "yarn", "factor": 2.0}
POINTER = b"version https://git-lfs.github.com/spec/v1\n"

FILES = {  # name: (layout, what is done, what the line must name)
    "no folder": ("hf", lambda f: shutil.rmtree(f), ["not found"]),
    "empty folder": ("hf", lambda f: [p.unlink() for p in f.iterdir()], [SINGLE]),
    "hf missing shard": ("hf", remove(LAST), [LAST, "not found"]),
    "hf truncated shard": ("hf", cut(LAST, 700), [LAST, "damaged"]),
    "safetensors is a page": ("single", write(SINGLE, b"<html>404 not found</html>"), [SINGLE]),
    "safetensors header too long": ("single", write(SINGLE, b"\xff" * 64), [SINGLE]),
    "index is no JSON": ("hf", write(INDEX, b"{"), [INDEX, "JSON"]),
    "index without map": ("hf", edit_json(INDEX, weight_map=None), [INDEX, "weight_map"]),
    "index whose map is a list": ("hf", edit_json(INDEX, weight_map=[LAST]), [INDEX, LAST]),
    "index with an empty map": ("hf", edit_json(INDEX, weight_map={}), [INDEX, "weight_map"]),
    "index leaves the folder": ("hf", place(KEY, "../single/model.safetensors"), [INDEX, "../sin"]),
    "index with an absolute path": ("hf", place(KEY, "/etc/passwd"), [INDEX, "/etc/passwd"]),
    "index with a backslash": ("hf", place(KEY, "..\\model.safetensors"), [INDEX, "model.safet"]),
    "index with a number": ("hf", place(KEY, 7), [INDEX, "7"]),
    "pickle that runs code": (
        "bin",
        lambda f: (f / BIN).write_bytes(pickle.dumps({KEY: Code()}, 2)),
        [BIN, "system"],
    ),
    "zipped pickle that runs code": (
        "bin",
        lambda f: torch.save({KEY: Code()}, f / BIN),
        [BIN, "system"],
    ),
    "bin truncated": ("bin", cut(BIN, 90_000), [BIN, "damaged"]),
    "bin empty": ("bin", write(BIN, b""), [BIN, "damaged"]),
    "bin is a page": ("bin", write(BIN, b"<html>404</html>"), [BIN, "damaged"]),
    "bin is a pointer of git-lfs": ("bin", write(BIN, POINTER), [BIN]),
    "bin holds a list": ("bin", lambda f: torch.save([torch.ones(2)], f / BIN), [BIN, "list"]),
    "bins, a shard missing": (
        "bins",
        remove("pytorch_model-00002-of-00002.bin"),
        ["pytorch_model-00002-of-00002.bin"],
    ),
    "meta missing last shard": ("meta", remove(META1), [META0, "tok_embeddings", "missing?"]),
    "meta missing first shard": ("meta", remove(META0), [META0, "not found"]),
    "meta swapped shards": ("meta", swap(META0, META1), [META0, "consolidated.01"]),
    "meta truncated": ("meta", cut(META1, 60_000), [META1, "damaged"]),
    "meta pickle that runs code": (
        "meta",
        lambda f: torch.save({META_KEY: Code()}, f / META1),
        [META1, "system"],
    ),
}
TENSORS = {
    "hf missing key": ("single", state(SINGLE, drop(KEY)), [SINGLE, KEY]),
    "hf extra key": (
        "single",
        state(SINGLE, put("model.extra.weight", torch.ones(2))),
        [SINGLE, "model.extra.weight"],
    ),
    "hf wrong shape": ("single", state(SINGLE, resize), [SINGLE, KEY]),
    "hf NaN": ("single", state(SINGLE, poison(float("nan"))), [SINGLE, KEY, "NaN"]),
    "hf infinity": ("single", state(SINGLE, poison(float("-inf"))), [SINGLE, KEY]),
    "hf integer weights": ("single", state(SINGLE, put(KEY, torch.Tensor.char)), [KEY, "int8"]),
    "hf tensor of another rank": ("single", state(SINGLE, put(KEY, torch.Tensor.flatten)), [KEY]),
    "hf a number for the head": (
        "single",
        state(SINGLE, put("lm_head.weight", torch.tensor(1.0))),
        [SINGLE, "lm_head.weight"],
    ),
    "hf one layer more": ("single", edit_json(CONFIG, num_hidden_layers=3), ["model.layers.2"]),
    "hf one layer less": ("single", edit_json(CONFIG, num_hidden_layers=1), ["model.layers.1"]),
    "fewer key heads than held": ("single", edit_json(CONFIG, num_key_value_heads=4), ["k_proj"]),
    "wrong vocabulary": ("single", edit_json(CONFIG, vocab_size=49954), ["lm_head", "49954"]),
    "tied but different": (
        "single",
        edit_json(CONFIG, tie_word_embeddings=True),
        [SINGLE, "model.embed_tokens.weight", "lm_head.weight", "tied"],
    ),
    "tied but different, in shards": (
        "hf",
        edit_json(CONFIG, tie_word_embeddings=True),
        ["model.embed_tokens.weight", "lm_head.weight", "tied"],
    ),
    "Meta's names under Hugging Face's config": (  # whose rotary pairs stand otherwise
        "single",
        lambda f: shutil.copyfile(f.parent / "meta-named", f / SINGLE),
        [SINGLE, "layers.0.attention.w"],
    ),
    "Hugging Face's names under Meta's params": (
        "meta",
        lambda f: (
            [state(n, drop(WO))(f) for n in (META0, META1)]
            and [
                state(n, put("model.layers.1.self_attn.o_proj.weight", torch.ones(64, 32)))(f)
                for n in (META0, META1)
            ]
        ),
        ["model.layers.1.self_attn.o_proj.weight"],
    ),
    "bin holds text": ("bin", state(BIN, put(KEY, "weights")), [BIN, KEY]),
    "bin holds a sparse tensor": ("bin", state(BIN, put(KEY, torch.Tensor.to_sparse)), [BIN, KEY]),
    "bin holds a tensor without data": (
        "bin",
        state(BIN, put(KEY, lambda t: t.to("meta"))),
        [BIN, KEY],
    ),
    "bin has a number for a key": ("bin", state(BIN, put(7, torch.ones(2))), [BIN, "7"]),
    "meta missing key": ("meta", state(META1, drop(META_KEY)), [META1, META_KEY]),
    "meta missing key in both": (
        "meta",
        lambda f: [state(n, drop(META_KEY))(f) for n in (META0, META1)],
        [META0, META_KEY],
    ),
    "meta extra key": ("meta", state(META1, put("extra", torch.ones(2))), [META1, "extra"]),
    "meta one weight under two names": (
        "meta",
        state(META0, lambda s: s.update({"model.norm.weight": s["norm.weight"].clone()})),
        [META0, "norm.weight"],
    ),
    "meta wrong shape": ("meta", state(META1, resize), [META1, META_KEY]),
    "meta NaN": ("meta", state(META1, poison(float("nan"))), ["consolidated", META_KEY, "NaN"]),
    "meta shards of two models": (
        "meta",
        state(META1, put("norm.weight", lambda t: t + 1)),
        [META0, "norm.weight"],
    ),
    "meta shards cut along two axes": (
        "meta",
        state(META1, put(WO, lambda t: t.T.contiguous())),
        ["consolidated", WO],
    ),
    "meta a norm cut in one shard": (
        "meta",
        state(META0, put("norm.weight", lambda t: t[:32].clone())),
        ["consolidated", "norm.weight"],
    ),
    "ours truncated": ("ours", cut(SINGLE, 9_000), [SINGLE, "damaged"]),
    "ours NaN": ("ours", state(SINGLE, poison(float("nan"))), [SINGLE, KEY]),
    "what this project once wrote": ("old", lambda f: None, [CONFIG, "not found"]),
}
CONFIGS = {
    "no config": ("hf", remove(CONFIG), [CONFIG]),
    "config is no JSON": ("hf", write(CONFIG, b"not json"), [CONFIG]),
    "config is a list": ("hf", write(CONFIG, b"[]"), [CONFIG]),
    "config is not UTF-8": ("hf", write(CONFIG, b"\xff\xfe"), [CONFIG]),
    "config of brackets": ("single", write(CONFIG, b"[" * 100_000), [CONFIG, "JSON"]),
    "no params": ("meta", remove(PARAMS), [PARAMS]),
    "params without a field": ("meta", edit_json(PARAMS, norm_eps=None), [PARAMS, "norm_eps"]),
    "params of another model": ("meta", edit_json(PARAMS, dim=128), [META0]),
    "params that round to a multiple of 0": ("meta", edit_json(PARAMS, multiple_of=0), [PARAMS]),
}
VALUES = [  # layout, file, what is set in it, what the line must name besides the file
    *[("single", CONFIG, {key: None}, key) for key in FIELDS],
    ("single", CONFIG, {"hidden_size": "64"}, "64"),
    ("single", CONFIG, {"hidden_size": 64.0}, "64.0"),
    ("single", CONFIG, {"num_hidden_layers": True}, "num_hidden_layers"),
    ("single", CONFIG, {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ("single", CONFIG, {"model_type": "mixtral"}, "mixtral"),
    ("single", CONFIG, {"attention_bias": True}, "attention_bias"),
    ("single", CONFIG, {"mlp_bias": True}, "mlp_bias"),
    ("single", CONFIG, {"hidden_act": "gelu"}, "hidden_act"),
    ("single", CONFIG, {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("single", CONFIG, {"rope_parameters": YARN}, "yarn"),
    ("single", CONFIG, {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("single", CONFIG, {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "zero"),
    ("single", CONFIG, {"rope_parameters": {"rope_type": ["linear"]}}, "linear"),
    ("single", CONFIG, {"rope_parameters": "linear"}, "mapping"),
    ("single", CONFIG, {"num_key_value_heads": 3}, "3"),
    ("single", CONFIG, {"hidden_size": 2**40}, "hidden_size"),
    ("single", CONFIG, {"hidden_size": 2**31, "intermediate_size": 2**31}, "hidden_size"),
    ("single", CONFIG, {"vocab_size": 10**30}, "vocab_size"),
    ("meta", PARAMS, {"ffn_dim_multiplier": 1e300}, "intermediate_size"),
    ("meta", PARAMS, {"ffn_dim_multiplier": 1e9}, "intermediate_size"),
    ("meta", PARAMS, {"ffn_dim_multiplier": "2"}, "int"),
    ("meta", PARAMS, {"quantization_args": {}}, "quantization_args"),
    ("meta", PARAMS, {"rope_scaling": ["linear"]}, "linear"),
]
for layout, file, values, word in VALUES:
    CONFIGS[f"{file} {json.dumps(values):.40}"] = (layout, edit_json(file, **values), [file, word])
DAMAGES = {**FILES, **TENSORS, **CONFIGS}


def test_there_are_enough():
    assert len(DAMAGES) >= 80


def convert(monkeypatch, *args):
    """The exit code of `model.py convert`, 0 where it does not exit."""
    monkeypatch.setattr(sys, "argv", ["model.py", "convert", *map(str, args)])
    try:
        M.run(M.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folder_is_refused_in_one_line(tmp_path, good, name, monkeypatch, capsys):
    layout, damage, words = DAMAGES[name]
    source = tmp_path / "source"
    shutil.copytree(good / layout, source)
    shutil.copyfile(good / "old" / SINGLE, tmp_path / "meta-named")
    damage(source)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.chdir(tmp_path)
    assert convert(monkeypatch, source, tmp_path / "out" / "deep") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("error: ") and len(line) < 500, line
    for word in (*words, str(source)):
        assert word in line, line
    # nothing is left behind, nor did the pickle touch a file
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    with pytest.raises(ValueError, match=re.escape(line[7:60].strip())):  # the same in every script
        M.load_model(source)


HARMLESS = {  # what does not tell which tensor is which
    "nothing": ("hf", lambda f: None),
    "swapped shards": ("hf", swap(FIRST, LAST)),
    "index places a key elsewhere": ("hf", place(KEY, FIRST)),
    "index with a key that is nowhere": ("hf", place("model.ghost.weight", FIRST)),
    "one weight in float32": ("single", state(SINGLE, put(KEY, torch.Tensor.float))),
    "one weight in float32, Meta's": (
        "meta",
        lambda f: [state(n, put(META_KEY, torch.Tensor.float))(f) for n in (META0, META1)],
    ),
    "one shard of a weight in float32": ("meta", state(META1, put(META_KEY, torch.Tensor.float))),
    "a weight twice": ("hf", lambda f: copy_key(f, KEY)),
    "a shard that was written under another name": ("meta", lambda f: rewrite(f / META0)),
}


def copy_key(folder, key):
    """Put a shard's tensor into the first shard, too."""
    shards = sorted(folder.glob("*.safetensors"))
    tensor = next(load_file(file)[key] for file in shards if key in load_file(file))
    state(shards[0].name, put(key, tensor.clone()))(folder)


def rewrite(file):
    """Save a shard beside its place and rename it: the name in its archive is then the first."""
    weights = torch.load(file, weights_only=True)
    torch.save(weights, file.with_suffix(".part.pth"))
    file.with_suffix(".part.pth").replace(file)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_damaged_converts(tmp_path, good, name, monkeypatch):
    """Weights are found by their keys, cast to the embedding's dtype."""
    layout, change = HARMLESS[name]
    shutil.copytree(good / layout, tmp_path / "source")
    change(tmp_path / "source")
    assert convert(monkeypatch, tmp_path / "source", tmp_path / "out") == 0
    assert equal(M.load_model(tmp_path / "out"), our_names(hugging_face().bfloat16()))


def test_copies_that_differ_are_refused(tmp_path, good, monkeypatch, capsys):
    shutil.copytree(good / "hf", tmp_path / "source")
    copy_key(tmp_path / "source", KEY)
    state(FIRST, put(KEY, lambda t: t + 1))(tmp_path / "source")
    assert convert(monkeypatch, tmp_path / "source", tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert FIRST in line and line.count(KEY) == 2 and not (tmp_path / "out").exists()


def test_an_old_pickle_with_any_byte_changed_loads_or_is_refused(tmp_path):
    """Files of torch before 1.6: what their reader stumbles over has many kinds of error."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({KEY: torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    data, refused = file.read_bytes(), 0
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        try:
            M.open_weights(file)
        except ValueError:
            refused += 1
    assert refused > len(data) // 4


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path, good, monkeypatch, capsys):
    shutil.copytree(good / "single", tmp_path / "m")
    state("model.safetensors", poison(1e5))(tmp_path / "m")
    assert convert(monkeypatch, tmp_path / "m", tmp_path / "out", "--dtype", "fp16") == 2
    line = capsys.readouterr().err
    assert KEY in line and "65504" in line and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="65504"):
        M.load_model(tmp_path / "m", dtype=torch.float16)
    M.load_model(tmp_path / "m", dtype=torch.float32)


@pytest.mark.parametrize("shape", ["config.json", "params.json"])
def test_init_does_not_write_over_weights(tmp_path, good, shape, monkeypatch, capsys):
    """Fresh weights in the shape of either file, in a new folder, the same for the same seed."""
    edit_json("params.json", vocab_size=304)(good / "meta")
    source = good / ("ours" if shape == "config.json" else "meta") / shape
    for seed, name in enumerate(("new", "other")):
        args = [str(source), str(tmp_path / name), "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", ["model.py", "init", *args])
        M.run(M.main)
    data = (tmp_path / "new" / "model.safetensors").read_bytes()
    assert data != (tmp_path / "other" / "model.safetensors").read_bytes()
    assert f"{len(data) / 2**20:.1f} MiB" in capsys.readouterr().out
    fresh = M.load_model(tmp_path / "new")
    assert fresh.dtype == torch.float32 and fresh.config.intermediate_size == 96
    again = M.LLaMA(fresh.config)
    M.init_weights(again, 0)
    assert equal(fresh, again)
    with pytest.raises(SystemExit):
        M.run(M.main)
    assert "not empty" in capsys.readouterr().err


def test_init_wants_a_vocabulary(tmp_path, good, monkeypatch, capsys):
    """Meta's params.json says -1 and leaves the size to the tokenizer."""
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    monkeypatch.setattr(sys, "argv", ["model.py", "init", str(tmp_path / "params.json"), "new"])
    with pytest.raises(SystemExit):
        M.run(M.main)
    line = capsys.readouterr().err
    assert "params.json" in line and "vocab_size" in line and line.count("\n") == 1


@pytest.mark.parametrize("layout", ["hf", "single", "bin", "bins", "meta", "ours"])
def test_the_undamaged_folders_convert(tmp_path, good, layout, monkeypatch, capsys):
    assert convert(monkeypatch, good / layout, tmp_path / "out") == 0
    assert "no tokenizer.model was found" in capsys.readouterr().out
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert {*written} - {"generation_config.json"} == {"config.json", "model.safetensors"}
    assert equal(M.load_model(tmp_path / "out"), our_names(hugging_face().bfloat16()))
    assert convert(monkeypatch, good / layout, tmp_path / "out") == 2  # never over something


def test_mixed_dtypes_are_cast_to_the_one_named(tmp_path, good, monkeypatch):
    shutil.copytree(good / "single", tmp_path / "mixed")
    state(SINGLE, put("model.embed_tokens.weight", torch.Tensor.float))(tmp_path / "mixed")
    assert convert(monkeypatch, tmp_path / "mixed", tmp_path / "wide") == 0
    assert convert(monkeypatch, tmp_path / "mixed", tmp_path / "out", "--dtype", "bf16") == 0
    assert equal(M.load_model(tmp_path / "out"), our_names(hugging_face().bfloat16()))
    assert M.load_model(tmp_path / "wide").dtype == torch.float32


def test_a_tokenizer_of_another_size_is_named_with_both_sizes(tmp_path, good, base):
    """Fewer rows than pieces, or thousands more: Chinese-LLaMA's weights beside LLaMA's tokenizer.
    A few more are padding."""
    size = G.load_tokenizer(base).vocab_size
    for rows in (size - 1, size + 5000):
        folder = tmp_path / str(rows)
        M.save_model(M.LLaMA(make_config(vocab_size=rows)), folder, base)
        with pytest.raises(ValueError, match=f"{size} pieces, the model {rows} embedding rows"):
            G.load_base(folder, "cpu", torch.float32)
    shutil.copytree(good / "single", tmp_path / "m")
    shutil.copyfile(base / "tokenizer.model", tmp_path / "m" / "tokenizer.model")
    model, tokenizer = G.load_base(tmp_path / "m", "cpu", torch.float32)
    assert model.config.vocab_size == 304 > tokenizer.vocab_size
