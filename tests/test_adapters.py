"""Adapters that peft writes give peft's logits here, ours give them in peft; what we cannot hold is refused by name."""
import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoints import IDS, hugging_face, write_meta

import lora as L
import model as M

QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """transformers' model, its folder, and Meta's folder of it."""
    folder = tmp_path_factory.mktemp("peft")
    hf = hugging_face(num_key_value_heads=2)
    hf.save_pretrained(folder / "hf")
    write_meta(folder / "meta", hf, 2)
    return folder


def peft_adapter(folder, hf=None, **settings):
    """peft's model with random B, saved in folder; returns its logits."""
    hf = hf or hugging_face(num_key_value_heads=2)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": QV, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(hf, LoraConfig(**settings))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


SETTINGS = {"qv": {}, "all": {"target_modules": ALL}, "rslora": {"target_modules": "all-linear", "use_rslora": True},
            "patterns": {"target_modules": ALL, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "k_proj": 3},
                         "alpha_pattern": {r"layers\.1\..*v_proj": 32, "down_proj": 5}},
            "regex": {"target_modules": r".*\.self_attn\.(q|o)_proj"}, "bin": {"bin": True}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_we_read_peft_and_peft_reads_us(tmp_path, base, settings):
    """From a Hugging Face base and from a Meta base, and back: what we write of it, peft reads."""
    settings = dict(settings)
    old = settings.pop("bin", False)
    wanted = peft_adapter(tmp_path / "theirs", **settings)
    if old:
        torch.save(load_file(tmp_path / "theirs" / "adapter_model.safetensors"), tmp_path / "theirs" / "adapter_model.bin")
        (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
    for layout in ("hf", "meta"):
        model = M.load_model(base / layout)
        with torch.no_grad():
            assert (model(IDS) - wanted).abs().max() > 1e-2
            L.load_adapter(model, tmp_path / "theirs")
            assert (model(IDS) - wanted).abs().max() < 1e-4
            L.save_adapter(model, tmp_path / layout, trained=True)
            again = PeftModel.from_pretrained(hugging_face(num_key_value_heads=2), tmp_path / layout).eval()
            assert (again(IDS).logits - wanted).abs().max() < 1e-4
            L.merge(model)
            assert (model(IDS) - wanted).abs().max() < 1e-4
            assert not M.load_model(base / layout)(IDS).sub(wanted).abs().max() < 1e-2      # merging touched no file


def test_bentsaos_published_config_loads(tmp_path, base, capsys):
    """adapter_config.json and adapter_model.bin as peft 0.3 wrote them for BenTsao (lora-llama-med)."""
    wanted = peft_adapter(tmp_path, r=8, lora_alpha=16)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
        "peft_type": "LORA", "r": 8, "target_modules": QV, "task_type": "CAUSAL_LM"}))
    model = M.load_model(base / "hf")
    L.load_adapter(model, tmp_path)
    assert not any(module.training for module in model.modules())                   # dropout 0.05 would act while asking
    with torch.no_grad():
        assert (model(IDS) - wanted).abs().max() < 1e-4
    assert capsys.readouterr().err == ""


def test_names_of_live_modules_and_unknown_keys(tmp_path, base, capsys):
    """torch.save(model.state_dict()) under torch.compile; a key of tomorrow's peft is told of and ignored."""
    wanted = peft_adapter(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k.replace(".model.layers", "._orig_mod.model.layers").replace(".weight", ".default.weight"): v
               for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"new_in_2030": 7, "also_new": None}))
    model = M.load_model(base / "hf")
    L.load_adapter(model, tmp_path)
    with torch.no_grad():
        assert (model(IDS) - wanted).abs().max() < 1e-4
    assert "new_in_2030" in (note := capsys.readouterr().err) and "also_new" not in note


def change_config(**values):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        config = {k: v for k, v in {**config, **values}.items() if v != "gone"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return change


def change_state(change):
    def write(folder):
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")
    return write


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
DAMAGES = {
    "dora": (change_config(use_dora=True), "use_dora"),
    "bias": (change_config(bias="all"), "bias"),
    "saved modules": (change_config(modules_to_save=["embed_tokens"]), "modules_to_save"),
    "some layers": (change_config(layers_to_transform=[0]), "layers_to_transform"),
    "enable_lora": (change_config(enable_lora=[True, False, True]), "enable_lora"),
    "pissa": (change_config(init_lora_weights="pissa_niter_4"), "pissa"),
    "not lora": (change_config(peft_type="IA3"), "IA3"),
    "olora": (change_config(init_lora_weights="OLoRA"), "OLoRA"),
    "the first layer": (change_config(layers_to_transform=0), "layers_to_transform"),
    "one layer's name": (change_config(target_modules=["model.layers.1.self_attn.q_proj", "v_proj"]), "single layers"),
    "a pattern of one layer": (change_config(target_modules=r"model\.layers\.1\..*q_proj"), "single layers"),
    "a pattern that is none": (change_config(target_modules="*.q_proj"), "*.q_proj"),
    "a rank's pattern that is none": (change_config(rank_pattern={"*.q_proj": 4}), "*.q_proj"),
    "no rank": (change_config(r="gone"), "lacks r"),
    "no alpha": (change_config(lora_alpha="gone"), "lacks lora_alpha"),
    "another rank": (change_config(r=8), "lora_A"),
    "another target": (change_config(target_modules=["c_attn"]), "c_attn"),
    "more targets": (change_config(target_modules=ALL), "lacks"),
    "fewer targets": (change_config(target_modules=["v_proj"]), "q_proj"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "not found"),
    "truncated": (lambda f: os.truncate(f / "adapter_model.safetensors", 1500), "damaged"),
    "missing key": (change_state(lambda s: s.pop(KEY)), KEY),
    "extra key": (change_state(lambda s: s.update({KEY.replace("layers.1", "layers.7"): s[KEY].clone()})), "layers.7"),
    "another shape": (change_state(lambda s: s.update({KEY: s[KEY][:4].clone()})), KEY),
    "nan": (change_state(lambda s: s[KEY].fill_(float("nan"))), KEY),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapters_are_refused_by_name(tmp_path, base, name):
    peft_adapter(tmp_path / "a")
    change, word = DAMAGES[name]
    change(tmp_path / "a")
    with pytest.raises(ValueError) as error:
        L.load_adapter(M.load_model(base / "hf"), tmp_path / "a")
    assert word in str(error.value) and str(tmp_path / "a") in str(error.value)


def test_a_save_is_read_back_before_it_replaces(tmp_path, base, monkeypatch, capsys):
    """Zero B everywhere: fine before training and told of when loaded, an error after it; in one linear (behind a wo of
    zeros) it is told of. What is not finite and a write that loses a tensor are errors. Then the older adapter stays."""
    peft_adapter(tmp_path / "a")
    model = M.load_model(base / "hf")
    L.add_lora(model, L.LoRAConfig())
    L.save_adapter(model, tmp_path / "zero")
    L.load_adapter(M.load_model(base / "hf"), tmp_path / "zero")
    assert "changes nothing" in capsys.readouterr().err
    with monkeypatch.context() as patch:                          # another process than the first: it may come late, and makes nothing
        patch.setattr(L, "processes", lambda: (1, 2))
        L.save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="every lora_B is zero after training"):
        L.save_adapter(model, tmp_path / "b", trained=True)
    for _, module in L.lora_linears(model)[1:]:
        module.lora_b.data.fill_(1)
    L.save_adapter(model, tmp_path / "one", trained=True)
    assert "layers.0.self_attn.q_proj.lora_B.weight is zero after training" in capsys.readouterr().err
    module.lora_b.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="v_proj.lora_B.weight holds NaN or infinity"):
        L.save_adapter(model, tmp_path / "b", trained=True)
    module.lora_b.data.fill_(1)
    monkeypatch.setattr(L, "save_file", lambda state, *a, **k: save_file(dict(list(state.items())[1:]), *a, **k))
    with pytest.raises(ValueError, match="is not what was saved"):
        L.save_adapter(model, tmp_path / "b")
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b
