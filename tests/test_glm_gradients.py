"""Gradients of ChatGLM2, ChatGLM3 and GLM, whose q, k, v and whose gate and up are one tensor in
files, against autograd in float64 of plain code over the published layout, rows padded behind."""

import lora as L
import model as M
import train as T

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy_glm import CHATGLM3, chatglm3, random_chatglm3, trained, write_bins
from test_bases import BASES, IDS, transformers_model

LAYERS, HEADS, D = 2, 4, 16
# name: (key and value heads, RoPE's base, eps) as config.json has them
CASES = {"chatglm": (2, 10000.0, 1e-5), "glm": (1, 10000.0, 1e-6), "glm-4-9b": (2, 5e6, 1e-6)}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(name, model) of a random folder, in float32."""
    name = request.param
    if name == "chatglm":
        write_bins(tmp_path / "base", CHATGLM3, random_chatglm3(CHATGLM3), 3)
    else:
        config, _ = BASES[name]
        assert config.model_type == "glm"
        transformers_model(name).save_pretrained(tmp_path / "base")
    return name, M.load_model(tmp_path / "base")


# --------------------------------------------------------------------------------------------------
# The oracle


def published_rows(height):
    """Our row of q or k for each of the published: within a head RoPE's pairs are neighbours there,
    and lie half a head apart here."""
    place = torch.tensor([r // 2 + r % 2 * (D // 2) for r in range(D)])
    return torch.cat([head * D + place for head in range(height // D)])


def as_published(model):
    """{key: float64} of ChatGLM3's layout with updates merged; differentiable."""
    (named, matrix, bias), w = trained(model), {}
    for i in range(LAYERS):
        ours, theirs = f"layers.{i}.", f"encoder.layers.{i}."
        for make, kind in ((matrix, "weight"), (bias, "bias")):
            q, k, v = (make(f"{ours}self_attn.{n}_proj") for n in "qkv")
            q, k = (part[published_rows(len(part))] for part in (q, k))
            w[f"{theirs}self_attention.query_key_value.{kind}"] = torch.cat((q, k, v))
        w[f"{theirs}self_attention.dense.weight"] = matrix(f"{ours}self_attn.o_proj")
        up = [matrix(f"{ours}mlp.{n}_proj") for n in ("gate", "up")]
        w[f"{theirs}mlp.dense_h_to_4h.weight"] = torch.cat(up)
        w[f"{theirs}mlp.dense_4h_to_h.weight"] = matrix(f"{ours}mlp.down_proj")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            w[f"{theirs}{norm}.weight"] = named[f"{ours}{norm}.weight"].double()
    w["embedding.word_embeddings.weight"] = named["embed_tokens.weight"].double()
    w["encoder.final_layernorm.weight"] = named["norm.weight"].double()
    w["output_layer.weight"] = named["lm_head.weight"].double()
    return w


def plain_logits(w, ids, groups, base, eps):
    """Logits (B, T, V) of rows padded behind: half of each head turned, in pairs of neighbours, and
    a mask, in which nothing is packed, shared or left out."""
    B, S = ids.shape
    speed = base ** (-torch.arange(0, D // 2, 2).double() / (D // 2))
    turn = torch.polar(torch.ones(S, D // 4).double(), torch.arange(S).double()[:, None] * speed)
    unseen = torch.ones(S, S, dtype=torch.bool).triu(1)

    def norm(x, g):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * g

    def heads(x, repeated):  # (B, T, heads D) -> (B, HEADS, T, D)
        return x.view(B, S, -1, D).transpose(1, 2).repeat_interleave(repeated, 1)

    def turned(x):
        pairs = torch.view_as_complex(x[..., : D // 2].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), x[..., D // 2 :]), -1)

    x = w["embedding.word_embeddings.weight"][ids]
    for i in range(LAYERS):
        at = {key.removeprefix(f"encoder.layers.{i}."): t for key, t in w.items()}
        h = norm(x, at["input_layernorm.weight"])
        fused = h @ at["self_attention.query_key_value.weight"].T
        fused = fused + at["self_attention.query_key_value.bias"]
        q, k, v = fused.split([HEADS * D, groups * D, groups * D], -1)
        q, k, v = heads(q, 1), heads(k, HEADS // groups), heads(v, HEADS // groups)
        scores = turned(q) @ turned(k).mT / D**0.5
        seen = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v
        x = x + seen.transpose(1, 2).flatten(2) @ at["self_attention.dense.weight"].T
        h = norm(x, at["post_attention_layernorm.weight"])
        gate, up = (h @ at["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ at["mlp.dense_4h_to_h.weight"].T
    return norm(x, w["encoder.final_layernorm.weight"]) @ w["output_layer.weight"].T


def test_the_plain_code_is_numpys():
    """Of the published weights, which no code of ours has touched."""
    state = random_chatglm3(CHATGLM3)
    w = {key.removeprefix("transformer."): t.double() for key, t in state.items()}
    for row, plain in zip(IDS, plain_logits(w, IDS, *CASES["chatglm"])):
        assert np.abs(plain.numpy() - chatglm3(state, CHATGLM3, row.numpy())).max() < 1e-9


# --------------------------------------------------------------------------------------------------
# Gradients

# Prompt and answer of each row; the first three begin alike.
OPENING = [7, 64, 190, 33]
ROWS = [
    T.Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))
    for prompt, answer in [
        ([*OPENING, 5, 9, 77], [3, 110, 42, 8, 6, 33, 101, 2]),
        ([*OPENING, 17], [90, 2]),
        ([*OPENING, 64, 64, 11, 29, 7, 50, 98, 31, 12, 45, 71], [3, 2]),
        ([99, 1], [4, 250, 6, 2]),
    ]
]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("rows", [ROWS[:3], ROWS], ids=["shared opening", "none shared"])
@pytest.mark.parametrize("size", [0, 2], ids=["at once", "by twos"])
def test_gradients_are_those_of_plain_code(case, full, rows, size):
    """Of rows with unequal prompts, packed, in one micro-batch and in several; nothing but what is
    trained has a gradient."""
    name, model = case
    if full:
        model.requires_grad_(True)
    else:
        L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
        torch.manual_seed(0)
        for _, module in L.lora_linears(model):
            torch.nn.init.normal_(module.lora_b, std=0.1)
    *_, packed = T.collate(rows, "cpu")
    assert packed.back.numel() < sum(map(len, rows)) + 8
    assert T.shared_opening(rows) == (len(OPENING) if len(rows) == 3 else 0)
    loss = T.step_gradient(model.train(), rows, T.TrainConfig(full=full, micro_batch_size=size))

    width = max(map(len, rows))
    ids = torch.tensor([row.ids + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([row.mask + [False] * (width - len(row)) for row in rows])[:, 1:]
    logits = plain_logits(as_published(model), ids, *CASES[name])[:, :-1]
    exact = F.cross_entropy(logits[mask], ids[:, 1:][mask])
    assert abs(loss - exact.item()) < 1e-5
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    # A and B of 7 linears a layer, or 7 weights, 3 biases and 2 norms, and what is no layer's
    assert len(trained) == (12 * LAYERS + 3 if full else 14 * LAYERS)
    for (key, p), plain in zip(trained.items(), torch.autograd.grad(exact, trained.values())):
        assert plain.any(), key
        worst = (p.grad - plain).abs().max()
        assert worst < 1e-5 * max(1, plain.abs().max()), (key, worst)
