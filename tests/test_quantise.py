"""Int8 and NF4 bases against their definitions, written out in NumPy, against bitsandbytes, and
against plain float32 code over the dequantised weights."""

import copy
import sys

import generate as G
import lora as L
import model as M
import train as T

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import formula_weights, make_config

KINDS = list(L.QUANTISED)
PAPER = np.array(  # QLoRA, appendix E
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022833234,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


def weight(shape=(96, 704), dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def matrix(linear, dtype=torch.float32):
    """The W that a quantised linear multiplies by: its product with the unit vectors."""
    return linear(torch.eye(linear.in_features, dtype=dtype)).T


def dequantised(model):
    """The same model with plain float32 linears that hold the dequantised weights."""
    plain = copy.deepcopy(model)
    for name, linear in L.linears(plain).items():
        new = M.Linear(linear.in_features, linear.out_features, False)
        new.weight = torch.nn.Parameter(matrix(linear), requires_grad=False)
        plain.set_submodule(name, new)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_equals_its_definition(dtype):
    w = weight(dtype=dtype)
    w[3] = 0
    x = w.double().numpy()
    step = np.abs(x).max(1).astype(np.float32) / np.float32(127)
    step = torch.from_numpy(np.maximum(step, np.float32(1e-30))).bfloat16().float().numpy()
    codes = np.rint(w.float().numpy() / step[:, None])
    assert np.abs(codes).max() == 127
    linear = L.Int8Linear(w)
    assert np.array_equal(matrix(linear).numpy(), codes.astype(np.float32) * step[:, None])
    assert (np.abs(matrix(linear).double().numpy() - x) <= step[:, None] * 0.5001).all()
    assert torch.equal(matrix(linear, torch.float16), matrix(linear).half())


@pytest.mark.parametrize("shape", [(96, 704), (33, 64), (256, 256)])
def test_nf4_equals_its_definition(shape):
    """Every code is the nearest entry (by brute force over the table), packing and arithmetic are
    those of the paper, in float32, exactly; a block of zeros stays zero."""
    w = weight(shape)
    w.view(-1, 64)[1] = 0
    blocks = w.numpy().reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    scaled = blocks * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    # argmin takes the lower of two equally near
    codes = np.abs(scaled[..., None] - PAPER).argmin(-1)
    linear = L.NF4Linear(w)
    flat = codes.reshape(-1)
    assert np.array_equal(linear.weight.numpy().reshape(-1), flat[::2] * 16 + flat[1::2])
    assert np.array_equal(linear.absmax.numpy().reshape(-1), absmax)
    expected = (PAPER[codes] * absmax[:, None]).reshape(shape)
    assert (
        np.array_equal(matrix(linear).numpy(), expected) and not expected.reshape(-1, 64)[1].any()
    )
    assert torch.equal(matrix(linear, torch.bfloat16), torch.from_numpy(expected).bfloat16())
    # the widest gap between two values is that of -1 and -0.696
    assert (np.abs(expected - w.numpy()).reshape(-1, 64) <= 0.152 * absmax[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes(dtype):
    """Its table, its codes and scales; and its dequantisation of our store gives our weights, bit
    for bit."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weight((256, 704), dtype)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = L.NF4Linear(w)
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), torch.tensor(L.NF4))
    assert torch.equal(theirs.view(ours.weight.shape), ours.weight)
    assert not state.nested and torch.equal(state.absmax, ours.absmax.flatten())
    for to in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = to
        assert torch.equal(bnb.dequantize_4bit(ours.weight.data, state), matrix(ours, to))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_gradient_equals_plain_code(kind):
    """LoRA over the quantised base and over plain float32 linears with the dequantised weights: the
    same products."""
    quantised = L.quantize(formula_weights(M.LLaMA(make_config())), kind)
    plain = dequantised(quantised)
    assert all(type(m) is not M.Linear for m in quantised.layers.modules())
    ids = torch.arange(48).view(2, 24)
    grads = []
    for model in (quantised, plain):
        L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
        for i, (_, module) in enumerate(L.lora_linears(model)):
            torch.manual_seed(i)
            module.lora_a.data.normal_()
            module.lora_b.data.normal_(0, 0.05)
        logits = model(ids[:, :-1]).flatten(0, 1)
        F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert grads[0].norm() > 1 and (grads[0] - grads[1]).norm() < 1e-6 * grads[1].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_keeps_the_codes_alone(kind):
    linear = L.QUANTISED[kind](weight())
    saved = []
    x = torch.ones(3, 704, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = linear(x)
    own = {t.data_ptr() for t in [*linear.parameters(), *linear.buffers()]}
    assert saved and all(t.data_ptr() in own for t in saved)
    y.sum().backward()
    torch.testing.assert_close(x.grad, matrix(linear).detach().sum(0).expand(3, -1))


@pytest.mark.parametrize("width", [704, 688, 172, 11])
@pytest.mark.parametrize("rows", [1, 4, 8, 9, 16, 17])
def test_int8_decoding_path(rows, width):
    """Few bf16 rows go through a product that reads int8 as it is: within bf16's rounding of the
    float64 product, for widths that no vector divides, too."""
    linear = L.Int8Linear(weight((64, width)))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 1, width, generator=draw).bfloat16()
    exact = x.double() @ matrix(linear).double().T
    with torch.inference_mode():
        y = linear(x)
    assert y.dtype == torch.bfloat16 and y.shape == (rows, 1, 64)
    assert (y.double() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_int8_compiled_row():
    """The form that --compile takes: every code from -127 to 127 in any place, to the rounding
    of float32 of the float64 product; a bf16 row as well, to that of its result."""
    w = torch.arange(-127, 128).repeat(4, 4)[:, : 256 * 3].float().mul_(0.01)
    linear = L.Int8Linear(w)
    assert torch.equal(linear.weight.float().mul(0.01), w)
    compiled = torch.compile(lambda x: linear(x), fullgraph=True, backend="eager")
    x = torch.randn(1, 1, 768, generator=torch.Generator().manual_seed(1))
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        exact = x.to(dtype).double() @ matrix(linear).double().T
        with torch.no_grad():
            y = compiled(x.to(dtype))
        assert y.dtype == dtype and y.shape == (1, 1, 4)
        assert (y.double() - exact).abs().max() < bound * exact.abs().max()


@pytest.mark.parametrize("rows", [1, 8])
def test_int8_integer_product(rows):
    """Against float64: x is held to half of its greatest value / 127 / 254, so y to that times the
    sum of |W|; also where one value is a thousand times the others, in a row of zeros, and for
    codes of +-127 throughout, which int32 must hold."""
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 11008, generator=draw).bfloat16().float()
    x[0, 5], x[-1, 7:] = 1000, 0
    for w in (torch.randn(24, 11008, generator=draw), torch.ones(24, 11008)):
        linear = L.Int8Linear(w)
        exact = x.double() @ matrix(linear).double().T
        step = x.double().abs().amax(1, keepdim=True) / 127 / 254
        bound = 0.51 * step * matrix(linear).double().abs().sum(1) + 1e-6 * exact.abs()
        y = L.integer_product(x, linear.weight, linear.scale)
        assert ((y.double() - exact).abs() <= bound).all()
    zeros = torch.zeros(2, 11008).bfloat16()
    assert not L.integer_product(zeros, linear.weight, linear.scale).any()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_a_break(kind):
    linear = L.QUANTISED[kind](weight((64, 128)))
    x = torch.randn(9, 128, requires_grad=True)
    compiled = torch.compile(
        lambda x: linear(x).square().sum(), fullgraph=True, backend="aot_eager"
    )
    ours, plain = (
        torch.autograd.grad(f(x), x)[0] for f in (compiled, lambda x: linear(x).square().sum())
    )
    # the compiled graph may take another product kernel
    assert (ours - plain).abs().max() < 1e-6 * plain.abs().max()


TABLES = 2 * 256 * 4  # bytes that each NF4 linear has besides: the values of a byte of codes


@pytest.mark.parametrize(
    "kind, bits, tables", [("int8", 8 + 16 / 352, 0), ("nf4", 4 + 32 / 64, TABLES)]
)
def test_load_holds_what_was_predicted(tmp_path, kind, bits, tables):
    """Storage of the seven linears in bits a weight; the embedding, norms and head in the
    activations' dtype."""
    config = make_config(hidden_size=256, intermediate_size=704, num_attention_heads=8)
    M.save_model(formula_weights(M.LLaMA(config)), tmp_path)
    plain = M.load_model(tmp_path)
    model = L.quantize(M.load_model(tmp_path), kind, "cpu", torch.bfloat16)
    before, after = L.linears(plain).values(), L.linears(model).values()
    inner = [p for linear in after for p in linear.parameters()]
    count = sum(linear.weight.numel() for linear in before)
    held = sum(p.nbytes for p in inner) - tables * len(after)
    assert len(after) == 14 and abs(held * 8 / count - bits) < 0.05
    rest = {id(p) for p in model.parameters()} - {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) in rest]
    assert len(outer) == 7 and all(p.dtype == torch.bfloat16 for p in outer)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight.bfloat16())
    assert not any(p.requires_grad for p in model.parameters())


def test_refused_in_words(base):
    model = M.load_model(base)
    with pytest.raises(ValueError, match="'int3'.* fp32 .*int8 .*nf4"):
        G.load_base(base, "cpu", torch.float32, "int3")
    with pytest.raises(ValueError, match="base_dtype is 'bf16'"):
        L.quantize(model, "bf16")
    with pytest.raises(
        ValueError, match=r"\(3, 5\) is no multiple of NF4's blocks of 64 or of odd"
    ):
        L.NF4Linear(torch.ones(3, 5))
    with pytest.raises(ValueError, match="odd"):
        L.NF4Linear(torch.ones(64, 171))
    L.add_lora(L.quantize(model, "nf4"), L.LoRAConfig())
    with pytest.raises(ValueError, match="merge it into the base as it was before"):
        L.merge(model)
    with pytest.raises(ValueError, match="has an adapter already"):
        L.quantize(model, "int8")


@pytest.mark.parametrize("base_dtype, bound", [("bf16", 0.02), ("fp16", 0.003), ("fp32", 0.0)])
def test_storage_apart_from_activations(base, base_dtype, bound):
    exact, _ = G.load_base(base, "cpu", torch.float32)
    model, _ = G.load_base(base, "cpu", torch.float32, base_dtype)
    ids = torch.arange(20)[None]
    assert model.lm_head.weight.dtype == M.DTYPES[base_dtype] and model.dtype == torch.float32
    error = (model(ids) - exact(ids)).abs().max() / exact(ids).abs().max()
    assert error <= bound and (error > 0) == (bound > 0)


def test_tune_and_ask_on_a_quantised_base(base, records, tmp_path, monkeypatch, capsys):
    settings = {
        "base_model": base,
        "data_path": records,
        "val_set_size": 2,
        "output_dir": tmp_path / "out",
        "cutoff_len": 128,
        "num_epochs": 1,
        "batch_size": 4,
        "num_answers": 1,
        "base_dtype": "nf4",
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    T.main()
    made = []

    def load(*args, load_base=G.load_base):
        made.append(load_base(*args))
        return made[-1]

    monkeypatch.setattr(G, "load_base", load)
    ask = [
        "generate.py",
        "黄芪？",
        "--lora_weights",
        str(tmp_path / "out"),
        "--max_new_tokens",
        "4",
    ]
    for option, kind in (
        (["--base_dtype", "nf4"], L.NF4Linear),
        (["--load_8bit"], L.Int8Linear),
        (["--load_8bit", "True", "--dtype", "bf16"], L.Int8Linear),
        (["--load_8bit=False"], M.Linear),
    ):
        monkeypatch.setattr(sys, "argv", [*ask, *option])
        G.main()
        assert type(made[-1][0].layers[0].self_attn.q_proj.base) is kind
        assert "tokens/s" in capsys.readouterr().err


@pytest.mark.slow
def test_lora_on_nf4_follows_the_loss_of_lora_on_the_base():
    """QLoRA's claim (Dettmers et al. 2023, section 4) on the small base: 150 steps of LoRA on all
    linears over NF4 and int8 reach the losses that the unquantised base reaches, within 0.02 nats
    a token, 2 % of its perplexity."""
    own = {"max_steps": 150, "eval_steps": 0, "save_steps": 0, "output_dir": "", "seed": 7}
    config = T.TrainConfig(**{**T.TINY, **own})
    template = G.load_template(config.prompt_template_name)
    adapter = L.LoRAConfig(config.lora_r, config.lora_alpha, 0.0, config.lora_target_modules)
    losses = {}
    for kind in ("fp32", *KINDS):
        model, tokenizer = G.load_base(config.base_model, torch.device("cpu"), torch.float32, kind)
        data = [
            T.encode_records(tokenizer, template, records, config)
            for records in T.read_data(config)
        ]
        torch.manual_seed(config.seed)
        before = T.evaluate(model, data[1], config)
        L.add_lora(model, adapter)
        history = T.train(config, model, tuple(data))
        last = sum(step["loss"] for step in history[-20:]) / 20
        losses[kind] = (before, history[-1]["val_loss"], last)
    print(losses)
    assert losses["fp32"][1] < 0.8 * losses["fp32"][0]
    for kind in KINDS:
        assert losses[kind][1] < losses["fp32"][1] + 0.02
        assert losses[kind][2] < losses["fp32"][2] + 0.02


@pytest.mark.parametrize("kind", ["int8", "nf4", "auto"])
def test_the_plan_counts_the_bytes_that_are_loaded(kind):
    """By dtype: what the plan takes a model to hold, before it is loaded, is what it then holds."""
    config = T.TrainConfig(base_model=str(G.DATA / "tiny"), base_dtype=kind)
    loaded = T.load_trainable(config, torch.device("cpu"), torch.bfloat16)
    planned = T.trial_model(loaded.config, config, torch.bfloat16)
    sizes = [{}, {}]
    for size, model in zip(sizes, (loaded, planned)):
        for p in model.parameters():
            size[p.dtype] = size.get(p.dtype, 0) + p.nbytes
    assert sizes[0] == sizes[1]
