"""model.py against a NumPy float64 LLaMA that shares no line with it, and against transformers."""

import model as M

import numpy as np
import pytest
import torch
from conftest import formula_weights, make_config
from transformers import LlamaConfig, LlamaForCausalLM


def numpy_llama(state, config, ids):
    """Logits (T, V) of one row, float64: complex rotation, explicit loops over heads, positions."""
    w = {k: v.double().numpy() for k, v in state.items()}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    T, D, group = len(ids), config.head_dim, heads // kv_heads
    turn = np.exp(1j * np.outer(np.arange(T), 1 / config.rope_theta ** (np.arange(0, D, 2) / D)))

    def norm(x, g):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * g

    def rotate(x):
        z = (x[:, : D // 2] + 1j * x[:, D // 2 :]) * turn
        return np.concatenate([z.real, z.imag], 1)

    x = w["embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        p = f"layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (h @ w[p + f"self_attn.{c}_proj.weight"].T for c in "qkv")
        out = np.zeros_like(q)
        for head in range(heads):
            own, kv = slice(head * D, (head + 1) * D), head // group
            shared = slice(kv * D, (kv + 1) * D)
            qh, kh = rotate(q[:, own]), rotate(k[:, shared])
            for t in range(T):
                score = kh[: t + 1] @ qh[t] / np.sqrt(D)
                weight = np.exp(score - score.max())
                out[t, own] = weight / weight.sum() @ v[: t + 1, shared]
        x = x + out @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate, up = (h @ w[p + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def to_transformers(model):
    """The same weights in LlamaForCausalLM, whose names ours are but for a word in front."""
    c = model.config
    config = LlamaConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=False,
        max_position_embeddings=512,
    )
    hf = LlamaForCausalLM(config).eval()
    state = {
        name if name == "lm_head.weight" else f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    hf.load_state_dict(state, strict=True)
    return hf


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_logits_equal_the_oracles(n_kv_heads):
    model = formula_weights(M.LLaMA(make_config(n_kv_heads)))
    ids = torch.tensor([[1, 5, 299, 17, 17, 0, 42, 3, 88]])
    with torch.no_grad():
        ours = model(ids)
        assert ours.dtype == torch.float32
        exact = numpy_llama(model.state_dict(), model.config, ids[0].numpy())
        assert np.abs(ours[0].double().numpy() - exact).max() < 1e-5
        assert (ours - to_transformers(model)(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("chunks", [(17,), (1,) * 17, (5, 12), (5, 1, 1, 10)])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_cache_equals_one_pass(chunks, n_kv_heads):
    """Prompt and decode in any chunking give the logits of a single forward."""
    model = formula_weights(M.LLaMA(make_config(n_kv_heads)))
    ids = torch.arange(34).view(2, 17) * 7 % 300
    cache = model.new_cache(2, 17)
    with torch.no_grad():
        parts = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
        assert (parts - model(ids)).abs().max() < 1e-5
        with pytest.raises(ValueError, match="holds 17 positions, 18 asked"):
            model(ids[:, :1], cache)


@pytest.mark.parametrize("bound", [None, 12])
def test_rows_of_unequal_length_keep_apart(bound):
    """Rows prefilled one by one in a cache of four go on together, in any order and with a row
    copied, each with the logits that it has alone; `longest` may be a bound above the truth."""
    model = formula_weights(M.LLaMA(make_config()))
    rows = [[1, 5, 9, 2, 6], [3, 1], [1, 5, 9, 7, 7, 7, 7]]
    cache = model.new_cache(4, 16)
    with torch.no_grad():
        for i, row in enumerate(rows):
            model(torch.tensor([row]), cache.rows(i, [0]))
        # the opening that a fourth row has in common with the first
        cache.copy_rows([(0, 3)], 0, 3)
        model(torch.tensor([[8, 8]]), cache.rows(3, [3]))
        rows.append([*rows[0][:3], 8, 8])
        lengths = [len(row) for row in rows]
        if bound:
            lengths = torch.tensor(lengths)
        batch = cache.rows(0, lengths, bound)
        for step in range(3):
            new = torch.tensor([[11 + step], [20], [33], [40 - step]])
            together = model(new, batch)
            for row, token in zip(rows, new.tolist()):
                row += token
            for row, logits in zip(rows, together):
                assert (logits[-1] - model(torch.tensor([row]))[0, -1]).abs().max() < 1e-5


def test_packed_rows_are_those_of_the_example():
    """The figure in the docstring of PackedRows: a b c d and a b x, of which a b is shared."""
    packed = M.PackedRows((4, 3), shared=2)
    assert packed.index.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0]]
    assert packed.back.tolist() == [0, 1, 2, 3, 6, 0, 0, 0]  # three idle tokens: eight in all
    assert packed.position.tolist()[:5] == [0, 1, 2, 3, 2]
    model = formula_weights(M.LLaMA(make_config()))
    a, b, c, d, x = 5, 17, 99, 3, 42
    with torch.no_grad():
        states = model.hidden_states(torch.tensor([[a, b, c, d, x, 0, 0, 0]]), packed)[0]
        first, second = (
            model.hidden_states(torch.tensor([r]))[0] for r in ([a, b, c, d], [a, b, x])
        )
    assert (states[:4] - first).abs().max() < 1e-5 and (states[4] - second[2]).abs().max() < 1e-5


def test_kept_tokens_equal_those_of_all():
    """With keep, the last feed-forward runs for the tokens named alone, and gives what it gave."""
    model = formula_weights(M.LLaMA(make_config()))
    ids, keep = torch.arange(12).view(2, 6), torch.tensor([3, 5, 11])
    with torch.no_grad():
        all_states = model.hidden_states(ids).flatten(0, 1)
        assert (model.hidden_states(ids, keep=keep) - all_states[keep]).abs().max() < 1e-5


def test_rope_keeps_its_angles_at_high_positions():
    """Position 2,000 against float64: in bf16 the cosine would be off by up to 2."""
    cos, sin = M.rope_table(torch.arange(2000, 2003), make_config(head_dim=128))
    angle = np.outer(np.arange(2000, 2003), 10000.0 ** (-np.arange(0, 128, 2) / 128))
    exact = np.exp(1j * np.concatenate([-angle, angle], 1))  # the sine of a first half is negative
    assert cos.shape == sin.shape == (3, 1, 128)  # one for all heads
    assert np.abs(cos[:, 0].numpy() + 1j * sin[:, 0].numpy() - exact).max() < 1e-3


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_products_of_few_rows_equal_the_plain_one(rows):
    """Whichever way a large weight is read, timed or chosen: F.linear's result to rounding."""
    weight = torch.randn(640, 512, generator=torch.Generator().manual_seed(0))
    x = torch.randn(rows, 1, 512, generator=torch.Generator().manual_seed(1))
    exact, linear = x.double() @ weight.double().T, M.Linear(512, 640, False)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        with torch.no_grad():
            for _ in range(20):
                linear.weight.data = weight.to(dtype)
                y = linear(x.to(dtype))
                assert y.dtype == dtype and y.shape == (rows, 1, 640)
                assert (y.double() - exact).abs().max() < bound * exact.abs().max()


def test_save_and_load_are_exact(tmp_path):
    model = formula_weights(M.LLaMA(make_config()))
    M.save_model(model, tmp_path)
    loaded = M.load_model(tmp_path)
    assert loaded.config == model.config
    a, b = model.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert M.load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_bf16_activations_over_float32_weights_stay_close():
    """The cast table of model.py: bf16 compute, logits float32, an error of bf16's 2^-8."""
    model = formula_weights(M.LLaMA(make_config()))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        exact = model(ids)
        model.compute_dtype = torch.bfloat16
        rough = model(ids)
    assert rough.dtype == torch.float32 and 0 < ((rough - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    "values, cause",
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"n_kv_heads": 3}, "4 heads of 8 over 3"),
        ({"head_dim": 7}, "4 heads of 7"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(values, cause):
    with pytest.raises(ValueError, match=cause):
        make_config(**values)
