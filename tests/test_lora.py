"""lora.py against peft: the same adapter, data and order give the same logits and the same loss curve."""
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import formula_weights, make_config
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from test_model import to_transformers

import lora as L
import model as M
import train as T


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
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all",), ("wk", "w2")])
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
    """Twenty LoRA steps, float32, dropout 0, token-weighted loss: each loss equals peft's to 1e-4."""
    base = M.LLaMA(make_config())
    M.init_weights(base, 0)
    for p in base.parameters():                                   # std 0.1: a base whose blocks have something to say
        p.data.mul_(5 if p.dim() > 1 else 1)
    model = copy.deepcopy(base)
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    L.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(to_transformers(base), tmp_path, is_trainable=True)
    g = torch.Generator().manual_seed(0)
    rows = [T.Row([3 + i % 40 for i in range(int(a), int(a + n))], [False] * 3 + [True] * (int(n) - 3))     # counting
            for a, n in zip(torch.randint(0, 40, (160,), generator=g), torch.randint(6, 24, (160,), generator=g))]
    config = T.TrainConfig(output_dir="", batch_size=8, micro_batch_size=2, num_epochs=1, learning_rate=1e-2, seed=7,
                           lora_dropout=0.0, warmup_steps=2, save_steps=0)
    ours = [r["loss"] for r in T.train(config, model, (rows, []))]
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    order, losses = T.epoch_order(rows, config, 0), []
    for step in range(20):
        batch = [rows[i] for i in order[step * 8:step * 8 + 8]]
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
        assert (model(ids) - apart).abs().max() < 1e-4 and max(errors.values()) < 1e-3 and len(errors) == 14
    _, rough = with_adapter(targets=("all",), b=1e-4)
    rough.to(torch.bfloat16)
    assert min(L.merge(rough).values()) > 0.05      # updates far below bf16's step are mostly lost, and it says so


def test_run_json_and_config_explain_the_adapter(tmp_path):
    _, model = with_adapter()
    L.save_adapter(model, tmp_path, "some/base", {"config": {"seed": 1}})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert PeftConfig(**{k: v for k, v in settings.items() if k != "peft_type"}).target_modules == {"q_proj", "v_proj"}
    assert settings["base_model_name_or_path"] == "some/base"
    assert L.load_adapter(formula_weights(M.LLaMA(make_config())), tmp_path) == {"config": {"seed": 1}}
