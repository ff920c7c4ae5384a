"""lora.py against peft: the same adapter, data and order give the same logits and loss curve."""

import copy
import json

import lora as L
import model as M
import train as T

import pytest
import torch
import torch.nn.functional as F
from conftest import formula_weights, make_config
from peft import LoraConfig as PeftConfig
from peft import PeftModel
from test_model import to_transformers


def with_adapter(n_kv_heads=2, targets=("q_proj", "v_proj"), b=0.02):
    model = formula_weights(M.LLaMA(make_config(n_kv_heads)))
    base = copy.deepcopy(model)
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, targets))
    for i, (_, module) in enumerate(L.lora_linears(model)):
        torch.manual_seed(i)
        module.lora_b.data.normal_(0, b)
    return base, model


def test_zero_adapter_changes_nothing():
    base, model = with_adapter(b=0.0)
    ids = torch.arange(20)[None]
    assert torch.equal(base(ids), model(ids))
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all",), ("k_proj", "down_proj")])
def test_peft_reads_ours_and_we_read_peft(tmp_path, targets, n_kv_heads):
    base, model = with_adapter(n_kv_heads, targets)
    L.save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(to_transformers(base), tmp_path / "ours")
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert (theirs(ids).logits - base(ids)).abs().max() > 1e-2
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
        theirs.save_pretrained(tmp_path / "theirs")
        again = copy.deepcopy(base)
        L.load_adapter(again, tmp_path / "theirs")
        assert torch.equal(again(ids), model(ids))


def test_twenty_steps_give_pefts_loss_curve(tmp_path):
    """Twenty LoRA steps, float32, no dropout, token-weighted loss: each loss is peft's to 1e-4."""
    base = M.LLaMA(make_config())
    M.init_weights(base, 0)
    for p in base.parameters():  # std 0.1: a base whose blocks have something to say
        p.data.mul_(5 if p.dim() > 1 else 1)
    model = copy.deepcopy(base)
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    L.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(to_transformers(base), tmp_path, is_trainable=True)
    g = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 40, (160,), generator=g).tolist()
    lengths = torch.randint(6, 24, (160,), generator=g).tolist()
    rows = [  # counting
        T.Row([3 + i % 40 for i in range(a, a + n)], [False] * 3 + [True] * (n - 3))
        for a, n in zip(starts, lengths)
    ]
    config = T.TrainConfig(
        output_dir="",
        batch_size=8,
        micro_batch_size=2,
        num_epochs=1,
        learning_rate=1e-2,
        seed=7,
        lora_dropout=0.0,
        warmup_steps=2,
        save_steps=0,
    )
    ours = [r["loss"] for r in T.train(config, model, (rows, []))]
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    order, losses = T.epoch_order(rows, config, 0), []
    for step in range(20):
        batch = [rows[i] for i in order[step * 8 : step * 8 + 8]]
        total = 0
        for row in batch:
            logits = theirs(torch.tensor([row.ids])).logits[0, 2:-1]
            total = total + F.cross_entropy(logits, torch.tensor(row.ids[3:]), reduction="sum")
        loss = total / sum(len(r.ids) - 3 for r in batch)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else (20 - step) / 18)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    assert max(abs(a - b) for a, b in zip(ours, losses)) < 1e-4


def test_merge_equals_unmerged_and_reports_its_loss():
    base, model = with_adapter(targets=("all",))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        apart = model(ids)
        errors = L.merge(model)
        assert (model(ids) - apart).abs().max() < 1e-4
        assert max(errors.values()) < 1e-3 and len(errors) == 14
    _, rough = with_adapter(targets=("all",), b=1e-4)
    rough.to(torch.bfloat16)
    # updates far below bf16's step are mostly lost, and it says so
    assert min(L.merge(rough).values()) > 0.05
    with pytest.raises(ValueError, match="no adapter to merge"):
        L.merge(rough)


def test_rows_share_the_update_each_by_its_own_factor():
    """One batch for base and tuned: a row of share 0 has the base's logits, one of share 1 the
    adapter's, and one half way those of an adapter half as strong."""
    base, model = with_adapter(targets=("all",))
    half = copy.deepcopy(model)
    for _, module in L.lora_linears(half):
        module.lora_b.data.mul_(0.5)
    ids = torch.arange(30).view(3, 10)
    with torch.no_grad():
        tuned = model(ids)
        L.share_rows(model, torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1))
        mixed = model(ids)
        for row, alone in enumerate((base, None, half)):
            wanted = alone(ids) if alone else tuned
            assert (mixed[row] - wanted[row]).abs().max() < 1e-5
        L.share_rows(model, 1.0)
        assert torch.equal(model(ids), tuned)


def test_removing_an_adapter_leaves_the_base():
    base, model = with_adapter(targets=("all",))
    ids = torch.arange(20)[None]
    with pytest.raises(ValueError, match="has an adapter already"):
        L.add_lora(model, L.LoRAConfig())
    L.remove_adapter(model)
    assert torch.equal(model(ids), base(ids)) and not L.lora_linears(model)


def test_dropout_acts_on_the_updates_input_while_training():
    """Mean over many draws: W0 x + the update, as without dropout; in eval nothing is dropped."""
    _, model = with_adapter(b=0.5)
    _, module = L.lora_linears(model)[0]
    dropped = L.LoRALinear(module.base, L.LoRAConfig(4, 8, 0.25, ("q_proj",)))
    dropped.lora_a, dropped.lora_b = module.lora_a, module.lora_b
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        exact = module.eval()(x)
        assert torch.equal(dropped.eval()(x), exact)
        draws = torch.stack([dropped.train()(x) for _ in range(4000)])
    update = (exact - module.base(x)).abs().max()
    assert update > 0.5 and draws.std(0).max() > 0.1 * update
    assert (draws.mean(0) - exact).abs().max() < 0.05 * update


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_draws_each_number_apart(p):
    """On a CPU several numbers share a draw: their masks do not follow from each other (correlation
    of neighbours within 4 standard errors of 0), nor from their place; an odd count is whole."""
    torch.manual_seed(0)
    x = torch.full((999, 1001), 3.0)
    dropped = L.dropout(x, p)
    assert {*dropped.unique().tolist()} == {0.0, (x[:1, :1] / (1 - p)).item()}
    mask = (dropped > 0).double().flatten()
    n, std = len(mask), (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * std / n**0.5
    for step in range(1, 9):
        both = (mask[step:] - (1 - p)) * (mask[:-step] - (1 - p)) / std**2
        assert abs(both.mean()) < 4 / n**0.5
    for start in range(4):
        assert abs(mask[start::4].mean() - (1 - p)) < 4 * std / (n / 4) ** 0.5
    assert L.dropout(x, 0.0) is x


@pytest.mark.parametrize(
    "values, cause",
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ()}, "targets are"),
        ({"targets": ("c_attn",)}, "c_attn"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(values, cause):
    with pytest.raises(ValueError, match=cause):
        L.LoRAConfig(**values)


def test_run_json_and_config_explain_the_adapter(tmp_path):
    _, model = with_adapter()
    L.save_adapter(model, tmp_path, "some/base", {"config": {"seed": 1}})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = PeftConfig(**{k: v for k, v in settings.items() if k != "peft_type"})
    assert theirs.target_modules == {"q_proj", "v_proj"}
    assert settings["base_model_name_or_path"] == "some/base"
    again = formula_weights(M.LLaMA(make_config()))
    L.load_adapter(again, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text()) == {"config": {"seed": 1}}


def test_an_adapter_of_nothing_is_refused():
    config = M.LLaMAConfig(64, 1, 2, 64, 1e-5, 32, model_type="chatglm1", prefix_lm=True)
    model = M.LLaMA(config)
    with pytest.raises(ValueError, match="gate_proj"):
        L.add_lora(model, L.LoRAConfig(2, targets=("gate_proj",)))
