"""Weights out: round trips bit for bit, folders that transformers opens, merging, weight differences, the commands."""
import copy
import json
import re
import resource
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_adapters import peft_adapter
from test_checkpoints import IDS, equal, hugging_face, meta_state, write_meta
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate as G
import lora as L
import model as M


def command(monkeypatch, capsys, script, *args):
    """Run `python script.py args` in this process; what it printed."""
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, args)])
    script.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module", params=[{}, {"num_key_value_heads": 2, "tie_word_embeddings": True},
                                        {"num_key_value_heads": 4, "intermediate_size": 200}], ids=["mha", "tied", "wide"])
def base(request, tmp_path_factory, base):
    """transformers' model in bf16 with the tests' tokenizer, its folder (sharded), and Meta's folder."""
    folder = tmp_path_factory.mktemp("out")
    size = G.Tokenizer(base / "tokenizer.model").vocab_size
    hf = hugging_face(vocab_size=size, max_position_embeddings=777, **request.param).bfloat16()
    hf.save_pretrained(folder / "hf", max_shard_size="60KB")
    if hf.config.intermediate_size == 96:
        write_meta(folder / "meta", hf, 1)
    for path in folder.iterdir():
        shutil.copyfile(base / "tokenizer.model", path / "tokenizer.model")
    return folder, hf


def same(model, hf):
    a, b = model.state_dict(), hf.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_round_trips_are_exact(tmp_path, base, monkeypatch, capsys):
    """HF -> ours -> HF and Meta -> ours -> Meta: every tensor bit-equal; transformers opens each; one fingerprint."""
    folder, hf = base
    prints = set()
    for start in sorted(folder.iterdir()):
        ours, out, meta = (tmp_path / f"{start.name}-{name}" for name in ("ours", "hf", "meta"))
        command(monkeypatch, capsys, M, "convert", start, ours)
        command(monkeypatch, capsys, L, "export", "--base_model", ours, "--output_dir", out, "--max-shard-gb", 60 / 2**20)
        command(monkeypatch, capsys, L, "export", "--base_model", ours, "--output_dir", meta, "--layout", "meta")
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        if start.name == "hf" or not hf.config.tie_word_embeddings:                          # Meta's layout knows no tie
            assert same(theirs, hf)
        assert len(list(out.glob("model-*.safetensors"))) > 2
        state = torch.load(meta / "consolidated.00.pth", weights_only=True)
        assert state.keys() == meta_state(hf).keys() and all(torch.equal(t, state[k]) for k, t in meta_state(hf).items())
        assert (meta / "consolidated.00.pth").stat().st_size < 1.5 * sum(t.nbytes for t in state.values()) + 50_000
        for path in (start, ours, out, meta):
            assert equal(M.load_model(path), M.load_model(start))
            prints.add(command(monkeypatch, capsys, M, "info", path).splitlines()[-1])
            assert (path / "tokenizer.model").is_file()
    assert len(prints) == 1 and next(iter(prints)).startswith("fingerprint ")
    other = M.load_model(start)
    other.norm.weight.data[3] += 1
    M.save_model(other, tmp_path / "other")
    assert command(monkeypatch, capsys, M, "info", tmp_path / "other").splitlines()[-1] not in prints


def test_exported_folder_opens_in_transformers(tmp_path, base, monkeypatch, capsys):
    """Same logits and, by AutoTokenizer, the same ids; special ids and trained length in config.json."""
    folder, hf = base
    command(monkeypatch, capsys, L, "export", "--base_model", folder / "hf", "--output_dir", tmp_path / "out", "--dtype", "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert theirs.dtype == torch.float32 and theirs.config.max_position_embeddings == 777
    ours, tokenizer = G.load_base(folder / "hf", "cpu", torch.float32)
    with torch.no_grad():
        assert (theirs(IDS).logits - ours(IDS)).abs().max() < 1e-4
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    text = "下面是一个问题，有什么功效？\n### 回答:\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == tokenizer.encode(text, bos=True)


def test_merge_and_export_with_an_adapter(tmp_path, base, monkeypatch, capsys):
    """Merged in float32: peft's logits. In bf16 the relative error of the stored updates is printed."""
    folder, hf = base
    size = hf.config.num_key_value_heads
    if hf.config.tie_word_embeddings or hf.config.intermediate_size != 96:
        pytest.skip("one base is enough here")
    peft_adapter(tmp_path / "adapter", target_modules=["q_proj", "k_proj", "down_proj"], hf=copy.deepcopy(hf).float())
    adapter = ("--base_model", folder / "hf", "--lora_weights", tmp_path / "adapter", "--output_dir")
    out = command(monkeypatch, capsys, L, "merge", *adapter, tmp_path / "merged", "--dtype", "fp32")
    assert "lose 0.0% on average" in out and size == 8
    command(monkeypatch, capsys, L, "export", *adapter, tmp_path / "hf", "--dtype", "fp32")
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32),
                                       tmp_path / "adapter").eval()(IDS).logits
    assert (M.load_model(tmp_path / "merged")(IDS) - wanted).abs().max() < 1e-4
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(IDS).logits - wanted).abs().max() < 1e-4
    out = command(monkeypatch, capsys, L, "merge", *adapter, tmp_path / "rough")
    average = float(out.split("lose ")[1].split("%")[0])
    assert 0.05 < average < 5 and "bfloat16" in out
    with pytest.raises(ValueError, match="exists and is not empty"):
        command(monkeypatch, capsys, L, "merge", *adapter, tmp_path / "rough")


def test_bad_options_cost_no_loading(tmp_path, base, monkeypatch, capsys):
    """A folder that is there already and a size that is none are refused before anything is read; a full disk in one line."""
    hf = ["--base_model", base[0] / "hf"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    monkeypatch.setattr(L, "load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="not empty"):
        command(monkeypatch, capsys, L, "export", *hf, "--output_dir", tmp_path / "there")
    for size in ("0", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match="max_shard_gb"):
            command(monkeypatch, capsys, L, "export", *hf, "--output_dir", tmp_path / "new", f"--max_shard_gb={size}")
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match="consolidated.00.pth cannot be written"):
            command(monkeypatch, capsys, L, "export", *hf, "--layout", "meta", "--output_dir", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "new").exists()


def test_a_hubs_name_is_found_in_its_cache(tmp_path, base, monkeypatch, capsys):
    cache = tmp_path / "models--me--b"
    shutil.copytree(base[0] / "hf", cache / "snapshots" / "5f98ee")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("5f98ee")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    command(monkeypatch, capsys, L, "export", "--base_model", "me/b", "--output_dir", tmp_path / "out")
    assert equal(M.load_model(tmp_path / "out"), M.load_model(base[0] / "hf"))


def test_recover_applies_a_weight_difference(tmp_path, base, monkeypatch, capsys):
    """As weight_diff.py: tuned - raw, [PAD] being a new row; raw's new row is the mean of its rows."""
    folder, hf = base
    if hf.config.tie_word_embeddings or hf.config.intermediate_size != 96:
        pytest.skip("one base is enough here")
    raw = copy.deepcopy(hf).float()
    tuned = hugging_face(seed=1, vocab_size=raw.config.vocab_size + 1)
    difference = hugging_face(seed=1, vocab_size=raw.config.vocab_size + 1)
    for (key, d), r in zip(difference.state_dict().items(), raw.state_dict().values()):
        d.sub_(torch.cat([r, r.mean(0, keepdim=True)]) if len(r) != len(d) else r)
    difference.save_pretrained(tmp_path / "diff")
    shutil.copyfile(folder / "hf" / "tokenizer.model", tmp_path / "diff" / "tokenizer.model")
    (tmp_path / "diff" / "added_tokens.json").write_text(json.dumps({"[PAD]": raw.config.vocab_size}))
    out = command(monkeypatch, capsys, L, "recover", "--base_model", folder / "hf", "--weight_diff", tmp_path / "diff",
                  "--output_dir", tmp_path / "tuned")
    ours, _ = G.load_base(tmp_path / "tuned", "cpu", torch.float32)
    wanted = meta_state(tuned)
    assert all((p - wanted[name]).abs().max() < 1e-6 for name, p in ours.named_parameters())
    total = sum(p.sum().item() for p in tuned.parameters())
    tables = 2 * tuned.model.rotary_emb.inv_freq.sum().item()     # of two layers
    assert all(abs(float(words.split()[0].strip(",")) - wanted) < 1e-2 for words, wanted in zip(re.split("to ", out)[-2:], (total + tables, total)))
    with pytest.raises(ValueError, match="is \\(.*\\), \\(.*\\) in"):
        L.recover(tmp_path / "tuned", folder / "hf", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_saved_files_are_what_the_library_writes(tmp_path):
    """Our streaming writer against safetensors' own reader, and data that begins on 64 bytes."""
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.randn(7), "c": torch.randn(2, 3, 4).half()}
    M.write_safetensors(tmp_path / "x.safetensors", {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()},
                        reversed(tensors.items()))
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], t) for k, t in tensors.items())
    assert (8 + int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")) % 64 == 0
