"""model.py against a NumPy float64 LLaMA that shares no line with it, and against transformers."""

import numpy as np
import pytest
import torch
from conftest import formula_weights, make_config
from transformers import LlamaConfig, LlamaForCausalLM

import model as M


def numpy_llama(state, config, ids):
    """Logits (T, V) of one row, float64: complex rotation, explicit loops over heads and positions."""
    w = {k: v.double().numpy() for k, v in state.items()}
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * g
    T, D, group = len(ids), config.head_dim, config.n_heads // config.n_kv_heads
    turn = np.exp(1j * np.outer(np.arange(T), 1 / config.rope_theta ** (np.arange(0, D, 2) / D)))

    def rotate(x):
        z = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
        y = np.empty_like(x)
        y[:, 0::2], y[:, 1::2] = z.real, z.imag
        return y

    x = w["tok_embeddings.weight"][ids]
    for i in range(config.n_layers):
        p = f"layers.{i}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (h @ w[p + f"attention.w{c}.weight"].T for c in "qkv")
        out = np.zeros_like(q)
        for head in range(config.n_heads):
            kv = head // group
            qh, kh = rotate(q[:, head * D : (head + 1) * D]), rotate(k[:, kv * D : (kv + 1) * D])
            for t in range(T):
                score = kh[: t + 1] @ qh[t] / np.sqrt(D)
                weight = np.exp(score - score.max())
                out[t, head * D : (head + 1) * D] = (
                    weight / weight.sum() @ v[: t + 1, kv * D : (kv + 1) * D]
                )
        x = x + out @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        a = h @ w[p + "feed_forward.w1.weight"].T
        x = (
            x
            + (a / (1 + np.exp(-a)) * (h @ w[p + "feed_forward.w3.weight"].T))
            @ w[p + "feed_forward.w2.weight"].T
        )
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def to_transformers(model):
    """The same weights in LlamaForCausalLM; q and k rows reordered here by an index, not by lora.py's function."""
    c = model.config
    hf = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=c.dim,
            intermediate_size=c.ffn_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            vocab_size=c.vocab_size,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=False,
            max_position_embeddings=512,
        )
    ).eval()
    rows = lambda w: w[
        [
            h * c.head_dim + i
            for h in range(w.shape[0] // c.head_dim)
            for i in [*range(0, c.head_dim, 2), *range(1, c.head_dim, 2)]
        ]
    ]
    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output.weight,
    }
    for i, b in enumerate(model.layers):
        state |= {
            f"model.layers.{i}.{name}.weight": w
            for name, w in {
                "self_attn.q_proj": rows(b.attention.wq.weight),
                "self_attn.k_proj": rows(b.attention.wk.weight),
                "self_attn.v_proj": b.attention.wv.weight,
                "self_attn.o_proj": b.attention.wo.weight,
                "mlp.gate_proj": b.feed_forward.w1.weight,
                "mlp.down_proj": b.feed_forward.w2.weight,
                "mlp.up_proj": b.feed_forward.w3.weight,
                "input_layernorm": b.attention_norm.weight,
                "post_attention_layernorm": b.ffn_norm.weight,
            }.items()
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
        assert (
            np.abs(
                ours[0].double().numpy()
                - numpy_llama(model.state_dict(), model.config, ids[0].numpy())
            ).max()
            < 1e-5
        )
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


def test_rope_keeps_its_angles_at_high_positions():
    """Position 2,000 against float64: in bf16 the cosine would be off by up to 2."""
    cos, sin = M.rope_table(torch.arange(2000, 2003), 128, 10000.0).unbind(-1)
    angle = np.outer(np.arange(2000, 2003), 10000.0 ** (-np.arange(0, 128, 2) / 128))
    assert np.abs(cos.numpy() + 1j * sin.numpy() - np.exp(1j * angle)).max() < 1e-3


def test_save_and_load_are_exact(tmp_path):
    model = formula_weights(M.LLaMA(make_config()))
    M.save_model(model, tmp_path)
    loaded = M.load_model(tmp_path)
    assert loaded.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values())
    )
    assert M.load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_bf16_activations_over_float32_weights_stay_close():
    """The cast table of model.py: bf16 compute, logits float32, error of the order of bf16's 2^-8."""
    model = formula_weights(M.LLaMA(make_config()))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        exact = model(ids)
        model.compute_dtype = torch.bfloat16
        rough = model(ids)
    assert rough.dtype == torch.float32 and 0 < ((rough - exact).norm() / exact.norm()) < 0.05
