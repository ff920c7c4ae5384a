"""Adapters that peft writes give peft's logits here, ours give them in peft; what we cannot hold is
refused by name."""

import json
import os
import shutil

import lora as L
import model as M

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoints import IDS, hugging_face, write_meta

QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """transformers' model in its own folder and in Meta's."""
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


def as_bin(folder):
    """The same tensors in adapter_model.bin, as peft wrote it until 0.5."""
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


ONE_LAYER = r"model\.layers\.1\..*(q_proj|down_proj)"
SETTINGS = {
    "qv": {},
    "all": {"target_modules": ALL},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "regex": {"target_modules": r".*\.self_attn\.(q|o)_proj"},
    "bin": {"bin": True},
    "bias": {"bias": "all"},  # LLaMA has none
    "a module by its layer": {"target_modules": ["layers.1.self_attn.q_proj", "mlp.down_proj"]},
    "a module by its whole name": {"target_modules": ["model.layers.0.self_attn.k_proj"]},
    "a regex of one layer": {"target_modules": ONE_LAYER},
    "some layers": {"layers_to_transform": [1]},
    "the first layer": {"layers_to_transform": 0},
    "all but some": {"target_modules": ALL, "exclude_modules": ["layers.0.mlp.up_proj"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_we_read_peft_and_peft_reads_us(tmp_path, base, settings):
    """From a Hugging Face base and from a Meta base, and back: what we write of it, peft reads.
    Which linears an adapter has is said by its tensors."""
    settings = dict(settings)
    old = settings.pop("bin", False)
    wanted = peft_adapter(tmp_path / "theirs", **settings)
    pairs = len(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) // 2
    if old:
        as_bin(tmp_path / "theirs")
    for layout in ("hf", "meta"):
        model = M.load_model(base / layout)
        with torch.no_grad():
            assert (model(IDS) - wanted).abs().max() > 1e-2
            L.load_adapter(model, tmp_path / "theirs")
            assert len(L.lora_linears(model)) == pairs
            assert (model(IDS) - wanted).abs().max() < 1e-4
            L.save_adapter(model, tmp_path / layout, trained=True)
            again = PeftModel.from_pretrained(
                hugging_face(num_key_value_heads=2), tmp_path / layout
            ).eval()
            assert (again(IDS).logits - wanted).abs().max() < 1e-4
            ours = M.load_model(base / layout)
            L.load_adapter(ours, tmp_path / layout)
            assert torch.equal(ours(IDS), model(IDS))
            L.merge(model)
            assert (model(IDS) - wanted).abs().max() < 1e-4
            # merging touched no file
            assert not M.load_model(base / layout)(IDS).sub(wanted).abs().max() < 1e-2


def test_bentsaos_published_config_loads(tmp_path, base, capsys):
    """adapter_config.json and adapter_model.bin as peft 0.3 wrote them for BenTsao
    (lora-llama-med)."""
    wanted = peft_adapter(tmp_path, r=8, lora_alpha=16)
    as_bin(tmp_path)
    published = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": QV,
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(published))
    model = M.load_model(base / "hf")
    L.load_adapter(model, tmp_path)
    # dropout 0.05 would act while asking
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert (model(IDS) - wanted).abs().max() < 1e-4
    assert capsys.readouterr().err == ""


def test_names_of_live_modules_and_keys_that_say_nothing(tmp_path, base):
    """torch.save(model.state_dict()) under torch.compile; a key of tomorrow's peft that is not set
    changes nothing."""
    wanted = peft_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {
        key.replace(".model.layers", "._orig_mod.model.layers").replace(
            ".weight", ".default.weight"
        ): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(state, file)
    change_config(new_in_2030=False, also_new=None, newer=[], newest={})(tmp_path)
    model = M.load_model(base / "hf")
    L.load_adapter(model, tmp_path)
    with torch.no_grad():
        assert (model(IDS) - wanted).abs().max() < 1e-4


def test_no_dropout_in_the_config_is_none(tmp_path, base):
    """peft's default is 0, ours for training is not."""
    peft_adapter(tmp_path)
    change_config(lora_dropout="gone")(tmp_path)
    model = M.load_model(base / "hf")
    L.load_adapter(model, tmp_path)
    assert all(module.config.dropout == 0 for _, module in L.lora_linears(model))


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


NAME = "layers.1.self_attn.v_proj"
KEY = f"base_model.model.model.{NAME}.lora_B.weight"
BIAS = f"base_model.model.model.{NAME}.bias"
CONFIG, STATE = "adapter_config.json", "adapter_model.safetensors"
CONFIGS = {  # name: (what is done, what the line must name besides the file)
    "dora": (change_config(use_dora=True), "use_dora"),
    "saved modules": (change_config(modules_to_save=["embed_tokens"]), "modules_to_save"),
    "a trained bias": (change_config(lora_bias=True), "lora_bias"),
    "enable_lora": (change_config(enable_lora=[True, False, True]), "enable_lora"),
    "transposed": (change_config(fan_in_fan_out=True), "fan_in_fan_out"),
    "ranks of some": (change_config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    "alphas of some": (change_config(alpha_pattern={"q_proj": 32}), "alpha_pattern"),
    "layers repeated": (change_config(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "single parameters": (change_config(target_parameters=["weight"]), "target_parameters"),
    "a key of tomorrow": (change_config(new_in_2030=7), "new_in_2030"),
    "pissa": (change_config(init_lora_weights="pissa_niter_4"), "pissa"),
    "olora": (change_config(init_lora_weights="OLoRA"), "OLoRA"),
    "not lora": (change_config(peft_type="IA3"), "IA3"),
    "no rank": (change_config(r="gone"), "lacks 'r'"),
    "a rank of 0": (change_config(r=0), "r"),
    "a text for a rank": (change_config(r="4"), "'4'"),
    "no alpha": (change_config(lora_alpha="gone"), "lacks 'lora_alpha'"),
    "a text for alpha": (change_config(lora_alpha="8"), "'8'"),
    "all dropped": (change_config(lora_dropout=1.0), "dropout"),
    "no targets": (change_config(target_modules=None), "target_modules"),
    "no config": (lambda f: (f / CONFIG).unlink(), "not found"),
    "broken config": (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "list"),
}
STATES = {
    "another rank": (change_config(r=8), "layers.0.self_attn"),
    "more targets": (change_config(target_modules=ALL), "has no tensors"),
    "no weights": (lambda f: (f / STATE).unlink(), "not found"),
    "truncated": (lambda f: os.truncate(f / STATE, 1500), "damaged"),
    "empty": (change_state(dict.clear), "q_proj"),
    "missing key": (change_state(lambda s: s.pop(KEY)), NAME),
    "missing pair": (
        change_state(lambda s: [s.pop(k) for k in (KEY, KEY.replace("lora_B", "lora_A"))]),
        NAME,
    ),
    "extra layer": (
        change_state(lambda s: s.update({KEY.replace("layers.1", "layers.7"): s[KEY].clone()})),
        "layers.7",
    ),
    "extra key": (change_state(lambda s: s.update({BIAS: torch.ones(16)})), BIAS[23:]),
    "an embedding's": (
        change_state(lambda s: s.update({f"{KEY[:-14]}lora_embedding_A": torch.ones(4, 16)})),
        NAME,
    ),
    "another shape": (change_state(lambda s: s.update({KEY: s[KEY][:4].clone()})), NAME),
    "NaN": (change_state(lambda s: s[KEY].fill_(float("nan"))), NAME),
    "infinity": (change_state(lambda s: s[KEY].view(-1)[3:4].fill_(float("inf"))), NAME),
}
DAMAGES = {
    **{name: (change, CONFIG, word) for name, (change, word) in CONFIGS.items()},
    **{name: (change, STATE, word) for name, (change, word) in STATES.items()},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_adapters_are_refused_by_name(tmp_path, base, name):
    """File and key in one line; the base is as it was, so that another adapter can be loaded."""
    wanted = peft_adapter(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "good")
    change, file, word = DAMAGES[name]
    change(tmp_path / "a")
    model = M.load_model(base / "hf")
    with pytest.raises(ValueError) as error:
        L.load_adapter(model, tmp_path / "a")
    line = str(error.value)
    assert str(tmp_path / "a" / file) in line and word in line and "\n" not in line, line
    L.load_adapter(model, tmp_path / "good")
    with torch.no_grad():
        assert (model(IDS) - wanted).abs().max() < 1e-4


def test_a_target_that_the_model_has_not_is_refused(tmp_path, base):
    """c_attn is GPT-2's: an adapter whose target_modules name nothing here belongs elsewhere."""
    peft_adapter(tmp_path)
    change_config(target_modules=["c_attn"])(tmp_path)
    with pytest.raises(ValueError, match="c_attn"):
        L.load_adapter(M.load_model(base / "hf"), tmp_path)


def test_an_adapter_of_another_base_is_refused(tmp_path, base):
    hf = hugging_face(hidden_size=128, num_key_value_heads=2)
    peft_adapter(tmp_path, hf=hf)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.*another base"):
        L.load_adapter(M.load_model(base / "hf"), tmp_path)


def test_a_second_adapter_is_refused(tmp_path, base):
    peft_adapter(tmp_path)
    model = M.load_model(base / "hf")
    L.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has an adapter already"):
        L.load_adapter(model, tmp_path)


def test_what_a_killed_save_left_is_no_adapter(tmp_path, base):
    peft_adapter(tmp_path / "a")
    for name in ("safetensors.tmp1000", "safetensors.index.json", "bin.part"):
        (tmp_path / f"a/adapter_model.{name}").write_bytes(b"half")
    file = tmp_path / "a/adapter_model.safetensors"
    L.load_adapter(M.load_model(base / "hf"), tmp_path / "a")
    file.rename(tmp_path / "a/kept")
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        L.load_adapter(M.load_model(base / "hf"), tmp_path / "a")


def test_a_save_is_read_back_before_it_replaces(tmp_path, base, monkeypatch):
    """Zero B everywhere: fine before training, an error after it. What is not finite and a write
    that loses a tensor are errors. Then the older adapter stays."""
    peft_adapter(tmp_path / "a")
    model = M.load_model(base / "hf")
    L.add_lora(model, L.LoRAConfig())
    L.save_adapter(model, tmp_path / "zero")
    L.load_adapter(M.load_model(base / "hf"), tmp_path / "zero")
    with monkeypatch.context() as patch:
        # another process than the first: it may come late, and makes nothing
        patch.setattr(L, "processes", lambda: (1, 2))
        L.save_adapter(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="every lora_B is zero"):
        L.save_adapter(model, tmp_path / "b", trained=True)
    for _, module in L.lora_linears(model)[1:]:
        module.lora_b.data.fill_(1)
    L.save_adapter(model, tmp_path / "one", trained=True)  # one linear behind zeros may stay so
    module.lora_b.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="v_proj.lora_B.weight holds NaN or infinity"):
        L.save_adapter(model, tmp_path / "b", trained=True)
    module.lora_b.data.fill_(1)

    def losing(state, *args, **kwargs):
        save_file(dict(list(state.items())[1:]), *args, **kwargs)

    monkeypatch.setattr(L, "save_file", losing)
    with pytest.raises(ValueError, match="is not what was saved"):
        L.save_adapter(model, tmp_path / "b")
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b


def test_a_crash_while_saving_leaves_the_older_adapter(tmp_path, base, monkeypatch):
    """What interrupts the write of a file leaves neither half a file nor a temporary one."""
    peft_adapter(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    model = M.load_model(base / "hf")
    L.add_lora(model, L.LoRAConfig())

    def interrupted(state, file, *args, **kwargs):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(L, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        L.save_adapter(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
