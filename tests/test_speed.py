"""The fast paths of training compute what plain code computes: gradients against a padded float64 model written here,
padding, the memory estimate against what is allocated."""
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from bench_train import Allocated, build, build_theirs, simulated_rows
from conftest import ROOT, formula_weights, make_config

import generate as G
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


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("recomputed", [1, 2])
def test_recomputed_gradient_is_the_same(full, recomputed):
    """Blocks recomputed, dropout on: the masks are drawn again alike, so the gradient is equal bit for bit."""
    grads = []
    for k in (0, recomputed):
        model, rows = prepared(full), uneven_rows()
        for _, module in L.lora_linears(model):
            module.dropout = 0.2
        model.recomputed = k
        torch.manual_seed(3)
        T.step_gradient(model, rows, T.TrainConfig(output_dir="", micro_batch_tokens=200))
        grads.append(gradient(model))
    assert torch.equal(*grads)


@pytest.mark.parametrize("full, recomputed", [(False, 0), (True, 0), (False, 2)])
@pytest.mark.parametrize("native", [False, True])
def test_half_precision_gradients(native, full, recomputed, monkeypatch):
    """fp16 and bf16 against float64, with products in float32 and in themselves: within 0.006 and 0.04 of the norm. fp16
    from a scale that overflows ends finite."""
    monkeypatch.setattr(M, "BF16_PRODUCTS", native)
    rows, wanted = uneven_rows(), prepared(full)
    (plain_loss(wanted, rows) / T.target_count(rows)).backward()
    for dtype, bound in ((torch.bfloat16, 0.04), (torch.float16, 0.006)):
        model = prepared(full, torch.float32 if full else dtype)
        model.compute_dtype, model.recomputed, model.loss_scale = dtype, recomputed, 2.0**40
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        T.step_gradient(model, rows, T.TrainConfig(output_dir=""))
        assert (gradient(model) - gradient(wanted)).norm() < bound * gradient(wanted).norm()
        assert model.loss_scale < 2.0**30 or dtype != torch.float16


def heads_first(x):
    return x.view(1, len(x), 4, -1).transpose(1, 2)               # (N, 4 D) -> (1, 4, N, D)


WIDE = {"product": lambda x, w: M.product(x, w), "quantised": lambda x, w: L.FrozenProduct.apply(x, lambda dtype, w: w, w),
        "attention": lambda x, w: M.causal_attention(*(heads_first(t) for t in (x, x * 0.5, x + 1)))}


@pytest.mark.parametrize("name", WIDE)
def test_wide_products_are_at_least_as_exact_and_keep_no_more(name, monkeypatch):
    """bf16 through float32 products against float64: result and gradients at most as far off as bf16's own products (to 2 %,
    for sums whose rounding is luck), and no more bytes alive between forward and gradient."""
    torch.manual_seed(0)
    x, w = torch.randn(96, 640).bfloat16().requires_grad_(), torch.randn(2100, 640).bfloat16().requires_grad_(name == "product")
    inputs = [t for t in (x, w) if t.requires_grad]
    dy = torch.randn_like(WIDE[name](x, w)).bfloat16()

    def computed(dtype):
        a, b = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (x, w))
        with Allocated() as allocated:
            y = WIDE[name](a, b)
        kept = allocated.now
        return [y.detach(), *torch.autograd.grad(y, [t for t in (a, b) if t.requires_grad], dy.to(dtype))], kept

    wanted, _ = computed(torch.float64)
    errors, kept = {}, {}
    for native in (False, True):
        monkeypatch.setattr(M, "BF16_PRODUCTS", native)
        got, kept[native] = computed(torch.bfloat16)
        assert all(t.dtype == torch.bfloat16 for t in got) and len(got) == 1 + len(inputs)
        errors[native] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, wanted)]
    assert all(wide < 0.005 and wide <= 1.02 * plain for wide, plain in zip(errors[False], errors[True])), errors
    assert kept[False] <= kept[True]


@pytest.mark.parametrize("machine, avx2, avx512_bf16, amx, onednn, wanted", [
    ("Zen 3", True, False, False, False, False), ("Skylake-X, which emulates", True, False, False, True, False),
    ("Zen 4", True, True, False, True, True), ("Sapphire Rapids", True, True, True, True, True),
    ("Graviton 3", False, False, False, True, True), ("Raspberry Pi 4", False, False, False, False, False)])
def test_auto_is_bf16_where_its_products_are_native(machine, avx2, avx512_bf16, amx, onednn, wanted, monkeypatch):
    for name, there in (("avx2", avx2), ("avx512_bf16", avx512_bf16), ("amx_tile", amx)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda there=there: there)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert M.has_bf16_products() == wanted
    monkeypatch.setattr(G, "BF16_PRODUCTS", M.has_bf16_products())
    cpu = torch.device("cpu")
    assert G.pick_dtype("auto", cpu) == (torch.bfloat16 if wanted else torch.float32)
    assert G.pick_dtype("fp32", cpu) == torch.float32 and G.pick_dtype("bf16", cpu) == torch.bfloat16
    assert G.pick_dtype("auto", torch.device("meta")) == torch.float32
    assert T.TINY["dtype"] == "fp32"                              # the README's figures, on any CPU


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [0, 2])
def test_compiled_blocks(recomputed):
    """torch.compile per block: the gradient to 1e-5, micro-batches of several shapes."""
    rows, wanted, model = uneven_rows(), prepared(False), prepared(False)
    (plain_loss(wanted, rows) / T.target_count(rows)).backward()
    model.recomputed = recomputed
    for block in model.layers:
        block.compile(dynamic=True, fullgraph=True)
    T.step_gradient(model, rows, T.TrainConfig(output_dir="", micro_batch_tokens=100))
    assert (gradient(model) - gradient(wanted)).norm() < 1e-5 * gradient(wanted).norm()


@pytest.mark.slow
def test_benchmark_at_7b_on_meta():
    """The shapes that `bench_train.py --size 7b` builds: peft's names take our weights, and a step's gradient has a place."""
    ours = build("7b", torch.device("meta"), torch.bfloat16)
    theirs = build_theirs(ours, 0.05)
    assert sum(p.numel() for p in theirs.parameters() if not p.requires_grad) == 6_738_415_616
    L.add_lora(ours, L.LoRAConfig())
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad) == 4_194_304
    rows = simulated_rows(8, 512)
    packed = M.PackedRows([len(row.ids) - 1 for row in rows], 38, "meta")
    ours.train().hidden(torch.zeros(1, len(packed.back), dtype=torch.long, device="meta"), packed).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)


@pytest.mark.slow
def test_benchmark_runs_without_the_projects_data():
    """Tiny, simulated rows: the last line is one JSON object, and both sides have the same first loss."""
    done = subprocess.run([sys.executable, ROOT / "tests/bench_train.py", "--size", "tiny", "--rows", "8", "--rounds", "1", "--cutoff",
                           "256", "--simulated"], capture_output=True, text=True, timeout=300)
    figures = json.loads(done.stdout.splitlines()[-1])
    sides = figures["tables"][0]["sides"]
    assert figures["speedup"] > 1 and figures["rows"] == "simulated"
    assert abs(sides["ours"]["losses"][0] - sides["peft random"]["losses"][0]) < 0.01


LITERATURE = [24, 260, 420, 640, 1500]                             # a row of 1 to 6 turns: least, quartiles, greatest


@pytest.mark.parametrize("kind", ["256", "512", "literature"])
@pytest.mark.parametrize("size", [0, 8])
def test_padding(kind, size):
    """Tokens computed beyond the real ones: at most 3 % at BenTsao's cut-offs and on rows as long as the literature's."""
    if kind == "literature":
        rng = torch.Generator().manual_seed(0)
        at = torch.rand(1000, generator=rng) * 4
        lengths = [int(LITERATURE[int(i)] + (i - int(i)) * (LITERATURE[int(i) + 1] - LITERATURE[int(i)])) for i in at.tolist()]
        rows = [T.Row([1] + torch.randint(3, 300, (n - 1,), generator=rng).tolist(), [False] * 12 + [True] * (n - 12)) for n in lengths]
    else:
        rows = simulated_rows(1000, int(kind))
    computed = real = 0
    for at in range(0, len(rows), 128):
        for micro in T.micro_batches(rows[at:at + 128], size, 2048):
            ids, _, packed = T.collate(micro, "cpu")
            real += sum(len(row.ids) - 1 for row in micro) - (len(micro) - 1) * T.shared_opening(micro)
            computed += ids.numel()
            assert ids.numel() == len(packed.back) == len(packed.positions(0))
    assert real <= computed <= 1.03 * real


def test_plan():
    """LLaMA-7B at 8 x 512: bf16 in 22 GB, NF4 in 9 GB; what does not fit names a setting that does."""
    shape = M.LLaMAConfig(4096, 32, 32, 32000, 1e-6)
    rows, cpu = [T.Row([1] * 512, [False] * 256 + [True] * 256)], torch.device("cpu")

    def planned(**settings):
        return T.plan(shape, T.TrainConfig(base_model="base", **{"micro_batch_size": 8, **settings}), torch.bfloat16, rows, cpu)

    tokens, recomputed, need = planned(memory_gb=22)
    assert tokens == 2048 and need < 22 * 2**30                   # a CPU's default; a GPU's allows 8 x 512:
    tokens, recomputed, need = planned(memory_gb=22, micro_batch_tokens=8192)
    assert tokens == 4096 and 0 < recomputed < 32 and need < 22 * 2**30
    assert planned(memory_gb=9, micro_batch_tokens=8192, base_dtype="nf4")[2] < 9 * 2**30
    assert planned(memory_gb=80, micro_batch_tokens=8192)[:2] == (4096, 0)
    with pytest.raises(ValueError, match=r"--base_dtype int8 fits, with \d"):
        planned(memory_gb=10, recompute="auto", micro_batch_size=1)
    with pytest.raises(ValueError, match="--recompute auto fits"):
        planned(memory_gb=22, recompute="none", micro_batch_tokens=8192)
    with pytest.raises(ValueError, match="no setting"):
        planned(memory_gb=2)


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
            model.compute_dtype = dtype
            L.add_lora(model if config.base_dtype in L.QUANTISED else model.to(M.DTYPES.get(config.base_dtype, dtype)), L.LoRAConfig(
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
    "full bf16": ({"full": True}, "bf16", 0, 2, 128), "tied": ({}, "fp32", 0, 2, 128), "tied, full": ({"full": True}, "fp32", 0, 2, 128),
    "fp32 for fp16": ({"base_dtype": "fp16"}, "fp32", 0, 2, 128), "fp32 for bf16, recompute 3": ({"base_dtype": "bf16"}, "fp32", 3, 2, 128)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if MEMORY[n][1] == "bf16" or "8" in n or "f4" in n else ())
                                  for n in MEMORY])
def test_memory_needed_is_what_training_allocates(name):
    """The estimate against the bytes alive at the peak, within 10 %."""
    settings, dtype, recomputed, n, length = MEMORY[name]
    shape = M.LLaMAConfig(256, 4, 4, 1000 if "tied" not in name else 8000, 1e-6, tie_embeddings="tied" in name)
    rows = [T.Row([(i * j + 1) % 1000 for j in range(length + 1)], [False] * (length // 2) + [True] * (length + 1 - length // 2))
            for i in range(1, 2 * n + 1)]
    config = T.TrainConfig(output_dir="", batch_size=2 * n, micro_batch_tokens=n * (length + 1), max_steps=2,
                           share_opening=False, save_steps=0, **settings)
    wanted = measured_bytes(shape, config, M.DTYPES[dtype], rows, recomputed)
    got = T.memory_needed(shape, config, M.DTYPES[dtype], n * length, n * (length + 1 - length // 2), recomputed,
                          M.goes_wide(torch.empty(0, dtype=M.DTYPES[dtype])))
    assert abs(got - wanted) < 0.1 * wanted, f"estimate {got / 2**20:.1f} MiB, allocated {wanted / 2**20:.1f}"
