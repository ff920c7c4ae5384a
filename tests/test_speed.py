"""The fast paths of training compute what plain code computes: gradients against a padded float64 model written here,
padding, the memory estimate against what is allocated."""
import math

import pytest
import torch
import torch.nn.functional as F
from bench_train import Allocated, simulated_rows
from conftest import formula_weights, make_config

import lora as L
import model as M
import train as T


def plain_loss(model, rows):
    """Summed loss of rows padded on the right, by plain differentiable float64 code that shares no line with model.py: no
    fused gradient, no packing, no shared opening, logits everywhere."""
    w, c = {n: p.double() for n, p in model.named_parameters()}, model.config
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([row.mask + [False] * (width - len(row.ids)) for row in rows])
    angle = torch.arange(width).double()[:, None] * c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def linear(x, name):
        if f"{name}.lora_a" not in w:
            return x @ w[f"{name}.weight"].T
        return x @ (w[f"{name}.base.weight"] + model.get_submodule(name).scale * w[f"{name}.lora_b"] @ w[f"{name}.lora_a"]).T

    def rope(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    for i in range(c.n_layers):
        at = f"layers.{i}."
        h = norm(x, at + "attention_norm.weight")
        q, k, v = (linear(h, at + f"attention.{n}").unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for n in ("wq", "wk", "wv"))
        k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for t in (rope(k), v))
        scores = rope(q) @ k.transpose(-1, -2) / math.sqrt(c.head_dim)
        scores = scores.masked_fill(torch.ones(width, width, dtype=torch.bool).triu(1), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2), at + "attention.wo")
        h = norm(x, at + "ffn_norm.weight")
        x = x + linear(F.silu(linear(h, at + "feed_forward.w1")) * linear(h, at + "feed_forward.w3"), at + "feed_forward.w2")
    logits = norm(x, "norm.weight") @ w["output.weight"].T
    return F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]], reduction="sum")


def uneven_rows(seed=0):
    """Nine rows of 12 to 60 tokens that open with the same 7, one of them with two answers (targets, context, targets)."""
    rng = torch.Generator().manual_seed(seed)
    opening, rows = torch.randint(3, 300, (7,), generator=rng).tolist(), []
    for n in (12, 60, 33, 34, 35, 20, 50, 41, 17):
        ids = opening + torch.randint(3, 300, (n - 7,), generator=rng).tolist()
        rows.append(T.Row(ids, [False] * 10 + [True] * (n - 10)))
    rows[1] = T.Row(rows[1].ids, [False] * 10 + [True] * 10 + [False] * 10 + [True] * 30)
    return rows


def prepared(full, dtype=torch.float32):
    """The model of the tests with every linear adapted (or all weights trained), and no update at zero."""
    model = formula_weights(M.LLaMA(make_config())).to(dtype)
    if not full:
        L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
        for i, (_, module) in enumerate(L.lora_linears(model)):
            n = torch.arange(module.lora_b.numel(), dtype=torch.float32).view_as(module.lora_b)
            module.lora_a.data.copy_(torch.cos(torch.arange(module.lora_a.numel()) * 0.3 + i).view_as(module.lora_a) * 0.1)
            module.lora_b.data.copy_(torch.sin(n * 0.7 + i) * 0.1)
    return model.train()


def gradient(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


PATHS = {"micro-batches of 4": {"micro_batch_size": 4}, "one row at a time": {"micro_batch_size": 1},
         "token budget": {"micro_batch_tokens": 100}, "all at once": {},
         "opening not shared": {"share_opening": False}}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_gradient_equals_plain_padded_code(path, full):
    """Packed rows, shared opening, answers only, chunked loss, written-out gradients: to float32 rounding, 1e-5."""
    rows, model = uneven_rows(), prepared(full)
    loss = plain_loss(model, rows) / T.target_count(rows)
    loss.backward()
    wanted = gradient(model)
    model.zero_grad()
    got = T.step_gradient(model, rows, T.TrainConfig(output_dir="", **PATHS[path]))
    assert abs(got - loss.item()) < 1e-5 * loss.item()
    assert (gradient(model) - wanted).norm() < 1e-5 * wanted.norm()


def test_chunked_loss_equals_cross_entropy(monkeypatch):
    """Chunks of 5 of 23 targets, logits as far apart as 200: loss and both gradients against float64."""
    torch.manual_seed(0)
    h, labels = torch.randn(23, 16) * 8, torch.randint(0, 50, (23,))
    head = M.Linear(16, 50)
    exact = [t.double().detach().requires_grad_() for t in (h, head.weight)]
    F.cross_entropy(exact[0] @ exact[1].T * 4, labels, reduction="sum").backward()
    h.requires_grad_()
    head.weight.data.mul_(4)
    T.ChunkedLoss.apply(h, labels, head, 5, head.weight).mul(1).backward()
    assert (h.grad - exact[0].grad).norm() < 1e-5 * exact[0].grad.norm()
    assert (head.weight.grad - exact[1].grad / 4).norm() < 1e-5 * exact[1].grad.norm()


@pytest.mark.parametrize("shape", [(3, 8), (5, 32)])
def test_written_out_gradients(shape):
    """Normalise and SwiGLU: gradcheck in float64 where they stay in it, else against autograd of the formula."""
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(M.SwiGLU.apply, (a, b))
    x, g, dy = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True), torch.randn(shape)
    wanted = torch.autograd.grad(g.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(), (x, g), dy.double())
    got = torch.autograd.grad(M.Normalise.apply(x, g, 1e-5), (x, g), dy)
    assert all((i - j).norm() < 1e-6 * j.norm() for i, j in zip(got, wanted))


def test_dropped_product():
    """The mask keeps 1 - p of the elements, is the same in the gradient, and its draw is repeatable."""
    x, a = torch.ones(400, 64, requires_grad=True), torch.eye(64, requires_grad=True)
    for p in (0.05, 0.5):
        torch.manual_seed(1)
        h = L.DroppedProduct.apply(x, a, p)                       # with A the identity, h is the mask
        assert abs(h.mean().item() - (1 - p)) < 0.01 and set(h.detach().unique().tolist()) == {0.0, 1.0}
        dx, da = torch.autograd.grad(h, (x, a), torch.ones_like(h))
        assert torch.equal(dx, h.detach()) and torch.equal(da, h.detach().sum(0).expand(64, 64))
        torch.manual_seed(1)
        assert torch.equal(L.DroppedProduct.apply(x, a, p), h)
        per_row = h.detach().mean(0)
        assert per_row.std().item() < 3 * (p * (1 - p) / 400) ** 0.5            # no pattern along the rows


def measured_bytes(shape, config, dtype, rows, recomputed):
    """Most bytes alive while two steps train, by counting every tensor's storage; weights included."""
    with Allocated() as allocated:
        model = M.LLaMA(shape).requires_grad_(config.full)
        if config.full:
            model.compute_dtype = dtype
        else:
            if config.base_dtype in L.QUANTISED:
                L.quantize(model, config.base_dtype, "cpu", dtype)
            L.add_lora(model.to(dtype) if config.base_dtype == "auto" else model, L.LoRAConfig(
                config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules))
        model.recomputed, allocated.peak = recomputed, 0          # building it is no part of training
        T.train(config, model, (rows, []))
    return allocated.peak


MEMORY = {  # name: (settings, dtype, blocks recomputed of 4, rows, their length)
    "fp32, q v": ({}, "fp32", 0, 8, 128), "bf16, q v": ({}, "bf16", 0, 2, 128), "fp32, q v, longer": ({}, "fp32", 0, 2, 512),
    "fp32, all": ({"lora_target_modules": ("all",)}, "fp32", 0, 8, 128),
    "fp32, all, no dropout": ({"lora_target_modules": ("all",), "lora_dropout": 0.0}, "fp32", 0, 8, 128),
    "fp32, recompute 2": ({}, "fp32", 2, 8, 128), "bf16, recompute 4": ({}, "bf16", 4, 2, 128),
    "nf4": ({"base_dtype": "nf4"}, "bf16", 0, 2, 128), "nf4, recompute 4": ({"base_dtype": "nf4"}, "fp32", 4, 8, 128),
    "int8": ({"base_dtype": "int8"}, "fp32", 0, 8, 128), "full fp32": ({"full": True}, "fp32", 0, 8, 128),
    "full bf16": ({"full": True}, "bf16", 0, 2, 128)}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_needed_is_what_training_allocates(name):
    """The estimate against the bytes alive at the peak, within 10 %."""
    settings, dtype, recomputed, n, length = MEMORY[name]
    shape = M.LLaMAConfig(256, 4, 4, 1000, 1e-6)
    rows = [T.Row([(i * j + 1) % 1000 for j in range(length + 1)], [False] * (length // 2) + [True] * (length + 1 - length // 2))
            for i in range(1, 2 * n + 1)]
    config = T.TrainConfig(output_dir="", base_model="base", batch_size=2 * n, micro_batch_tokens=n * (length + 1), max_steps=2,
                           share_opening=False, save_steps=0, **settings)
    wanted = measured_bytes(shape, config, M.DTYPES[dtype], rows, recomputed)
    got = T.memory_needed(shape, config, M.DTYPES[dtype], n * length, n * (length + 1 - length // 2), recomputed)
    print(f"RATIO {name} {got / wanted:.3f}")
    assert abs(got - wanted) < 0.1 * wanted, f"estimate {got / 2**20:.1f} MiB, allocated {wanted / 2**20:.1f}"
