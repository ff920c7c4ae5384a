"""LLaMA in plain PyTorch: token ids in, logits out.

What this file teaches, in this order:

  config       LLaMAConfig: the few numbers that give a model its shape
  norm         RMSNorm                                    Zhang & Sennrich 2019
  positions    rope_table, apply_rope                     Su et al. 2021
  attention    attention, Attention                       Vaswani et al. 2017, Ainslie et al. 2023
  feed-forward FeedForward                                Shazeer 2020
  network      Block, LLaMA                               Touvron et al. 2023
  context      Context, KVCache: where a token stands and what it sees besides itself

Below the lesson stand rows packed for training, kernels for few rows, weights from and to disk,
settings, and the commands.

Letters for dimensions:
  B rows of a batch   T new positions   S all positions (cached and new)   V vocabulary
  C hidden size       H query heads     K key/value heads (K divides H)    D head width
  F feed-forward width

Where each dtype stands (there is no autocast; each cast is a line of code):
  weights              as loaded, cast to the activations' dtype where they are used
  activations          `LLaMA.dtype`, from the embedding on
  RMSNorm, RoPE        float32 inside
  products, attention  accumulate in float32
  logits               float32

Names and layout are those of Hugging Face's checkpoints. Meta's are translated at the door.
"""

import argparse
import gc
import hashlib
import inspect
import json
import math
import os
import re
import select
import shutil
import signal
import sys
import zipfile
from collections import Counter, defaultdict, namedtuple
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

# Before what may be missing. Help needs no torch, whose import takes a second: a stand-in does.
if {"-h", "--help"} & {*sys.argv} and Path(sys.argv[0]).resolve().parent == Path(__file__).parent:
    from unittest.mock import MagicMock

    for name in ("", ".distributed", ".nn", ".nn.functional", ".nn.utils", ".utils.checkpoint"):
        sys.modules[f"torch{name}"] = MagicMock()
    sys.modules["safetensors.torch"] = MagicMock()
elif missing := [x for x in ("torch", "safetensors", "sentencepiece", "tqdm") if not find_spec(x)]:
    print(f"error: no {', '.join(missing)}; pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# The network


@dataclass
class LLaMAConfig:
    """The shape of a model, under the names of Hugging Face's config.json.

    Raises ValueError for a shape that cannot be built."""

    hidden_size: int  # C
    num_hidden_layers: int = field(metadata={"high": 1000})
    num_attention_heads: int  # H
    vocab_size: int  # V
    rms_norm_eps: float  # 1e-6 in LLaMA-1, 1e-5 in LLaMA-2: always read, never assumed
    intermediate_size: int  # F, about 8/3 C, so that SwiGLU's three matrices weigh what two did
    num_key_value_heads: int = None  # K; by default H, as in LLaMA-1
    head_dim: int = None  # D; by default C / H
    rope_theta: float = field(default=10000.0, metadata={"high": 1e12})
    rope_scaling: dict = None  # {"rope_type": "linear" or "llama3", "factor": ...}
    tie_word_embeddings: bool = False  # the head's weight is the embedding's
    max_position_embeddings: int = 2048  # of its training, where files say; not enforced
    model_type: str = "llama"  # a key of NETWORKS; by it files name weights
    qkv_bias: bool = False  # queries, keys and values have a bias (Qwen2, GLM)
    qk_norm: bool = False  # each head's query and key is normed (Qwen3)
    partial_rotary_factor: float = 1.0  # the part of a head that RoPE turns (GLM: half)
    prefix_lm: bool = False  # the prompt sees itself, in `GLMBlock` (ChatGLM-6B)

    def __post_init__(self):
        check_settings(self)
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.head_dim = self.head_dim or self.hidden_size // heads
        odd = heads % self.num_key_value_heads or self.head_dim * self.partial_rotary_factor % 2
        if odd or heads * self.head_dim > 2**24:
            raise ValueError(
                f"{heads} heads of {self.head_dim} over {self.num_key_value_heads} of keys and "
                "values: wanted a multiple, and an even width"
            )
        # a scaling that is not known, or lacks a number, fails here
        rope_table(torch.zeros(1), self)


class Linear(nn.Linear):
    """y = W x, W (O, I); y = W x + b with a bias."""

    def forward(self, x):  # (..., I) -> (..., O)
        y = self.multiply(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def multiply(self, x):  # (R, I) -> (R, O)
        return product(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """y = g * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, eq. 4)."""

    def forward(self, x):  # (..., C) -> (..., C)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rope_table(positions, config):
    """(cos, sin) of the angle m theta^(-2i/D) for position m and pair i (Su et al. 2021, eq. 15).

    Both are float32, (..., T, 1, D) for positions (..., T): the same for all heads, for both halves
    of a head, the sine negative in the first. Made anew in each forward: a buffer on `meta` stays
    empty, and in bf16 a cosine is off by up to 2.0. Scaling stretches a trained context by its
    factor: "linear" slows every pair (Chen et al. 2023); "llama3" slows those that turn few times
    within the original context, with a smooth passage (Llama 3.1). Where a head turns in part, the
    pairs beyond stand."""
    D, scaling = config.head_dim, config.rope_scaling
    pair = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32)
    turned = D * config.partial_rotary_factor
    # The first pair turns by one radian a position, the last by 1 / theta.
    speed = config.rope_theta ** (-pair / turned) * (pair < turned)  # (D/2), radians
    if scaling:
        kind, keep = scaling.get("rope_type"), 0.0  # keep: the share of the speed left as it is
        if kind not in ("linear", "llama3"):
            raise ValueError(f"rope_type is {kind!r}, wanted linear or llama3")
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = speed * (scaling["original_max_position_embeddings"] / (2 * math.pi))
            keep = ((turns - low) / (high - low)).clamp(0, 1)
        speed = speed * (keep + (1 - keep) / scaling["factor"])
    return rotation(positions.float().unsqueeze(-1) * speed)


def rotation(angle):
    """(cos, sin) of angles (..., T, D/2), as `apply_rope` takes them: (..., T, 1, D)."""
    # A cosine is even and a sine odd: the minus turns the sign of the first half's sine alone.
    both = torch.cat((-angle, angle), -1).unsqueeze(-2)
    return both.cos(), both.sin()


def apply_rope(x, rope):
    """Turn each pair (a, b) = (x[i], x[i + D/2]) of x (B, T, heads, D) by its angle, to
    (a cos - b sin, b cos + a sin) (Su et al. 2021, eq. 34), in float32.

    The paper and Meta pair neighbours, (x[2i], x[2i + 1]). That is the same up to the order of the
    rows of W_q and W_k, which `Checkpoint` changes when it reads Meta's weights."""
    cos, sin = rope
    wide = x.float()
    swapped = wide.roll(x.size(-1) // 2, -1)  # (b, a)
    return (wide * cos + swapped * sin).to(x.dtype)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D) + mask) v (Vaswani et al. 2017, eq. 1), H/K query heads to a
    key/value head (Ainslie et al. 2023).

    q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D). mask (B, 1, T, S) is True where q sees k;
    without one attention is causal, and T = S."""
    # On a CPU a gradient goes through float32: torch's bf16 kernel takes five times as long for it.
    kind = torch.float32 if q.is_cpu and q.requires_grad else q.dtype
    wide = (x.transpose(1, 2).to(kind) for x in (q, k, v))  # (B, heads, T or S, D)
    y = F.scaled_dot_product_attention(
        *wide, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(2) != k.size(2)
    )
    return y.transpose(1, 2).to(q.dtype)


class Attention(nn.Module):
    """Queries, keys and values of x, turned by RoPE; the context says what they attend to."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        C, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(C, H * self.head_dim, config.qkv_bias)
        self.k_proj = Linear(C, K * self.head_dim, config.qkv_bias)
        self.v_proj = Linear(C, K * self.head_dim, config.qkv_bias)
        self.o_proj = Linear(H * self.head_dim, C, config.prefix_lm)
        new_norm = partial(RMSNorm, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = new_norm(self.head_dim), new_norm(self.head_dim)

    def forward(self, x, rope, context):  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        # Positions enter here and nowhere else; values are not turned.
        q, k = apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope)
        y = context.attend(self.layer, q, k, v)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x) (Shazeer 2020, eq. 6)."""

    def __init__(self, config):
        super().__init__()
        # In this order (w1, w2, w3) Meta's code makes them, and random first values are drawn.
        C, width = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, width, bias=False)
        self.down_proj = Linear(width, C, bias=False)
        self.up_proj = Linear(C, width, bias=False)

    def forward(self, x):  # (..., C) -> (..., C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    Norm, FeedForward = RMSNorm, FeedForward

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = self.Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = self.Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = self.FeedForward(config)

    def forward(self, x, rope, context, keep=None):  # (B, T, C) -> (B, T, C), or (M, C) with keep
        x = x + self.self_attn(self.input_layernorm(x), rope, context)
        # Each token by itself from here: in the last block those alone that need logits.
        if keep is not None:
            x = x.flatten(0, 1)[keep]
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """The network (Touvron et al. 2023). It holds no state: what a call has seen before is an
    argument.

    compute_dtype  dtype of the activations; None: that of the embedding
    recomputed     so many blocks drop their activations and make them again for the gradient"""

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype, self.recomputed = config, None, 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        block = GLMBlock if config.prefix_lm else Block
        self.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.norm = block.Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def dtype(self):
        return self.compute_dtype or self.embed_tokens.weight.dtype

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def new_cache(self, rows, positions):
        """An empty KVCache of so many rows and positions, on this model's device."""
        c = self.config
        shape = 2, rows, c.num_key_value_heads, positions, c.head_dim
        # zeros, not empty: a masked position weighs 0, and 0 x NaN is NaN
        kv = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers]
        return KVCache(kv, torch.zeros(rows, dtype=torch.long, device=self.device))

    def hidden_states(self, ids, context=None, keep=None):
        """The normed output of the last layer, (B, T, C) for ids (B, T).

        With a context, ids stand where it says and see what it says. With keep (M,), indices into
        the B T tokens, only theirs (M, C): the others end as keys and values of the last layer."""
        c, context = self.config, context or Context()
        # Where the tokens stand, and the angles that go with it: the same in all layers.
        at = context.extend(ids)
        rope = glm_rope(at, context.prefix, c) if c.prefix_lm else rope_table(at, c)
        x = self.embed_tokens(ids).to(self.dtype)  # (B, T, C)
        for i, block in enumerate(self.layers):
            # Dropped activations are made again by a second forward of the block.
            again = i < self.recomputed
            call = partial(checkpoint, block, use_reentrant=False) if again else block
            x = call(x, rope, context, keep if i + 1 == len(self.layers) else None)
        return self.norm(x)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V), float32."""
        return self.lm_head(self.hidden_states(ids, cache)).float()


# --------------------------------------------------------------------------------------------------
# Context: what a forward sees besides its ids


class Context:
    """Where new tokens stand, and what they attend to. This one is the plain case: rows that begin
    at position 0, each token attending to its own row up to itself."""

    def extend(self, ids):
        """Positions (T,) or (B, T) of ids (B, T). Called once a forward, before the layers."""
        return torch.arange(ids.size(1), device=ids.device)

    def attend(self, layer, q, k, v):
        """Attention (B, T, H, D) of q in a layer with new keys and values k, v (B, T, K, D)."""
        return attention(q, k, v)


class KVCache(Context):
    """Keys and values of the positions seen so far, (2, B, K, positions, D) a layer, allocated once
    (`LLaMA.new_cache`).

    Row b holds lengths[b] of them. `longest` bounds lengths without asking the device for them.
    The first `prefix` see each other: a number, or (B, 1) where no row is empty."""

    def __init__(self, kv, lengths, longest=0, prefix=0):
        self.kv, self.lengths, self.longest, self.prefix = kv, lengths, longest, prefix
        self.positions = kv[0].size(3)

    def rows(self, first, lengths, longest=None, prefix=0):
        """Rows first, first + 1, ... as a cache of its own in the same memory, each holding as many
        positions as lengths says: a list, or a tensor and a bound on it."""
        kv = [layer[:, first : first + len(lengths)] for layer in self.kv]
        longest = max(lengths) if longest is None else longest
        return KVCache(kv, torch.as_tensor(lengths, device=kv[0].device), longest, prefix)

    def copy_rows(self, moves, start, stop):
        """Copy positions start to stop of row a to row b, for each (a, b) of moves, all at once."""
        for kv in self.kv:
            # row by row: a list as index would be brought to the device each time
            copies = [(b, kv[:, a, :, start:stop].clone()) for a, b in moves]
            for b, copy in copies:
                kv[:, b, :, start:stop] = copy

    def extend(self, ids):
        """Positions (B, T) of tokens behind those of their rows. Raises ValueError without room."""
        T, device = ids.size(1), ids.device
        was_empty, self.longest = self.longest == 0, self.longest + T
        if self.longest > self.positions:
            raise ValueError(
                f"the KV cache holds {self.positions} positions, {self.longest} asked for; "
                "allocate prompt + max_new_tokens"
            )
        # Row b's new tokens stand behind its own, wherever the others end.
        self.at = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        self.lengths = self.lengths + T
        self.row = torch.arange(len(self.at), device=device)[:, None]
        # A mask keeps rows of unequal length apart. Fresh rows need none: causal attention does it.
        self.mask = None
        if not was_empty or torch.is_tensor(self.prefix) or self.prefix:
            self.mask = prefix_mask(self.at, self.longest, self.prefix)
        return self.at

    def attend(self, layer, q, k, v):
        """Write k and v behind what their rows hold; attention of q over all of it."""
        kv = self.kv[layer]
        # Of a slice between two index tensors theirs come first: (B, T, 2, K, D).
        kv[:, self.row, :, self.at] = torch.stack((k, v), 2)
        return attention(q, *kv[:, :, :, : self.longest].transpose(2, 3), self.mask)


# ==================================================================================================
# Rows packed for training


class PackedRows(Context):
    """Training rows of unequal length, end to end in one stream of N tokens: no product computes
    padding. Behind an opening of `shared` tokens, equal in all rows, each row adds its own. Causal
    attention makes the opening's activations equal too, so it is computed once; autograd sums its
    gradient over the rows. Attention alone gathers the rows into (B, S).

    Two rows, a b c d and a b x, lengths (4, 3), shared 2:

      stream   a b c d x          position of each in its row   0 1 2 3 2
      index    0 1 2 3            of row 1 in the stream
               0 1 4 0            of row 2; nothing sees the padding behind it
      back     0 1 2 3 6          where each of the stream stands in the rows, padded to 4 each

    With prefixes, a number for each row, these see themselves (a GLM); nothing is shared then."""

    def __init__(self, lengths, shared=0, device="cpu", prefixes=None):
        S, index, back = max(lengths), [], list(range(shared))
        for row, length in enumerate(lengths):
            own = range(len(back), len(back) + length - shared)
            index.append([*range(shared), *own, *[0] * (S - length)])
            back += range(row * S + shared, row * S + length)
        back += [0] * (-len(back) % 8)  # up to 7 idle tokens: products of odd height are slow
        self.index = torch.tensor(index, device=device)  # (B, S), into the stream
        self.back = torch.tensor(back, device=device)  # (N,), into B S
        self.position, self.prefix, self.mask = self.back % S, 0, None
        if prefixes:
            prefix = torch.tensor(prefixes, device=device)[:, None]  # (B, 1)
            self.prefix = prefix[self.back // S, 0]  # (N,), that of each token's row
            self.mask = prefix_mask(torch.arange(S, device=device), S, prefix)

    def extend(self, ids):
        return self.position

    def attend(self, layer, q, k, v):
        """Attention of each row of q (1, N, H, D) over its own k, v (1, N, K, D)."""
        rows = (gather(x[0], self.index) for x in (q, k, v))
        y = attention(*rows, self.mask)  # (B, S, H, D)
        return gather(y.flatten(0, 1), self.back)[None]  # (1, N, H, D)


def gather(x, index):
    """x[index] of x (N, heads, D). Written as an embedding: that has the fastest gradient."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])


# ==================================================================================================
# ChatGLM-6B: a row is context, sop, answer, and the context, which is the prefix, sees itself
# (Du et al. 2022, "GLM"; Zeng et al. 2022, "GLM-130B")


def prefix_mask(at, S, prefix):
    """(B, 1, T, S), True where a token at position at (B, T) sees position s: s <= at, or s lies
    within the prefix, a number or (B, 1) (Du et al. 2022, 2.1.1)."""
    last = at.clamp(min=prefix - 1)[..., None]
    return (torch.arange(S, device=at.device) <= last).unsqueeze(1)


def glm_rope(positions, prefix, config):
    """The rotary table, for `apply_rope`, of a head whose halves turn by two positions (Du et al.
    2022, 2.2.1): pairs i < D/4 by the place in the prefix, which stands still at its end; the
    others by the place behind it, which is 0 within and 1 for sop.

    The release made its speeds in fp16, and learnt with them."""
    pair = torch.arange(0, config.head_dim, 4, device=positions.device)
    speed = (config.rope_theta ** (-pair / config.head_dim)).half().float()  # (D/4), radians
    place = positions.clamp(max=prefix - 1)
    both = torch.stack((place, positions - place), -1)  # (..., T, 2)
    return rotation((both.unsqueeze(-1) * speed).flatten(-2))


class LayerNorm(nn.LayerNorm):
    """y = g (x - mean(x)) / sqrt(var(x) + eps) + b (Ba et al. 2016, eq. 4)."""

    def forward(self, x):  # (..., C) -> (..., C)
        g, b = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, g, b, self.eps)


class GLMFeedForward(nn.Module):
    """W_down gelu(W_up x + b_up) + b_down, gelu by tanh (Hendrycks & Gimpel 2016)."""

    def __init__(self, config):
        super().__init__()
        C, width = config.hidden_size, config.intermediate_size
        self.up_proj, self.down_proj = Linear(C, width), Linear(width, C)

    def forward(self, x):  # (..., C) -> (..., C)
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class GLMBlock(Block):
    """DeepNorm, norm(alpha x + f(x)) with alpha = sqrt(2 L) (GLM-130B, 2.1), f the attention, then
    the feed-forward. Each norm stands at the beginning of the next part: what f's output is added
    to is normed."""

    Norm, FeedForward = LayerNorm, GLMFeedForward
    alpha = math.sqrt(2 * 28)  # L of the release, which its code takes for any number of layers

    def forward(self, x, rope, context, keep=None):  # as of `Block`
        n = self.input_layernorm(x)
        x = self.alpha * n + self.self_attn(n, rope, context)
        n = self.post_attention_layernorm(x if keep is None else x.flatten(0, 1)[keep])
        return self.alpha * n + self.mlp(n)


# ==================================================================================================
# Kernels for few rows: reading the weight takes the time. The plain version of all is F.linear

AMX = torch.cpu._is_amx_tile_supported()  # Intel's matrix unit; figures in tests/BENCHMARKS.md


def few_rows(x):
    """How many rows x (R, I) has; 0 if they are more than 16, or a gradient is asked for."""
    return 0 if len(x) > 16 or torch.is_grad_enabled() else len(x)


def product(x, weight):
    """x W^T of x (R, I) and W (O, I): F.linear, but for few rows without a gradient."""
    rows, compiling = few_rows(x), torch.compiler.is_compiling()
    # A W wider than tall is read faster by cuBLAS than by the loop that inductor makes.
    if compiling and rows == 1 and (x.is_cpu or weight.size(0) >= weight.size(1)):
        return one_row(x, weight).to(x.dtype)
    if rows and AMX and x.is_cpu and x.dtype == torch.bfloat16 and not compiling:
        return torch.mv(weight, x[0])[None] if rows == 1 else (weight @ x.T).T.contiguous()
    return F.linear(x, weight)


def one_row(x, weight):
    """W x of one row (1, I) in float32, as sums that inductor turns into vector loops over W as it
    is stored. On a CPU W is cut in eight, for one sum would wait for its own additions."""
    parts = weight.chunk(8 if x.is_cpu else 1)
    sums = [(part.float() * x.float()).sum(-1) for part in parts]
    return torch.cat(sums)[None]


# ==================================================================================================
# Weights: names and layouts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How files name weights: {layout: {pattern in our names: what files have there}}. Two of ours that
# become one are one tensor there, one behind the other.
NAMES = {
    "hf": {"^(?!lm_head)": "model."},
    "meta": {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.([qkvo])_proj": r"attention.w\1",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    "glm": {"^(?!lm_head)": "model.", "gate_proj|up_proj": "gate_up_proj"},
    "chatglm": {  # 2 and 3, and GLM-4 as it was published
        "^(layers|norm)": r"encoder.\1",
        "encoder.norm": "encoder.final_layernorm",
        "embed_tokens": "embedding.word_embeddings",
        "lm_head": "output_layer",
        "self_attn.[qkv]_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "gate_proj|up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
        "^": "transformer.",
    },
    "chatglm6b": {  # the first, as it was published; we write it with the names of "hf"
        "^norm": "final_layernorm",
        "embed_tokens": "word_embeddings",
        "self_attn.[qkv]_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
        "^(?!lm_head)": "transformer.",
    },
}
TIED = ("embed_tokens.weight", "lm_head.weight")
# The layout of a network's first files, where we and transformers write another
PUBLISHED = {"glm": "chatglm", "chatglm1": "chatglm6b"}
# How the rows of a head of q and k stand, where it is not (2, D/2), in rotary pairs i and i + D/2:
# in neighbours 2i and 2i + 1, or i and i + D/4 of each of two halves
PAIRS = {"meta": (-1, 2), "glm": (-1, 2), "chatglm": (-1, 2), "chatglm6b": (2, 2, -1)}
IMAGES = 20000  # rows for images before all others in ChatGLM-6B's first files; no text has them
# Meta's names of a shape: ours
META_SHAPE = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}


def stored_name(name, layout="hf"):
    """The name that a weight of ours has in files of a layout."""
    for pattern, theirs in NAMES.get(layout, NAMES["hf"]).items():
        name = re.sub(pattern, theirs, name)
    return name


def weight_shapes(config):
    """{name: shape} of a network's weights, where a tied head is the embedding."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in LLaMA(config).named_parameters()}


def stored_rows(config, layout):
    """{a layout's name: {our name: which of the rows there are ours, in our order}}. What has one
    name there stands one behind the other; in ChatGLM-6B q, k, v of the first head, of the second,
    ..."""
    stored, D = {}, config.head_dim
    for name, (height, *_) in weight_shapes(config).items():
        key = stored_name(name, layout)
        parts = stored.setdefault(key, {})
        rows = torch.arange(height) + sum(map(len, parts.values()))
        if ".attention.query_key_value" in key:
            rows = torch.arange(3 * height).view(-1, 3, D)[:, len(parts)]
        if layout in PAIRS and re.search(r"\b[qk]_proj\b", name):
            rows = rows.view(-1, D).unflatten(1, PAIRS[layout]).transpose(1, 2)
        parts[name] = rows.flatten()
    return stored


SMALL = 2**25  # bytes of what is read at once: settings, prompts, a tokenizer (GLM-4's has 20 MB)


def take_rows(tensor, rows):
    """tensor[rows]; the tensor itself, which may be a view of a file, if that is all in order."""
    return tensor if torch.equal(rows, torch.arange(len(tensor))) else tensor[rows]


def read_json_file(path, missing=None):
    """The object in a JSON file, or `missing`, if one is given, where there is no file. ValueError
    in one line if there must be one, or if it is broken or above SMALL."""
    if missing is not None and not Path(path).exists():
        return missing
    check_content(path, SMALL)
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, wanted an object")
    return value


def read_config(path, vocab_size=None):
    """The LLaMAConfig that Hugging Face's config.json or Meta's params.json describes; vocab_size
    stands in for the -1 that Meta writes. Raises ValueError naming the file and what is wrong."""
    values = read_json_file(path)
    try:
        if Path(path).name == "params.json":
            return config_from_meta(values, vocab_size)
        return config_from_hf(values)
    except Exception as error:  # values of other kinds make Python raise nearly all there are
        # Python's own words name the key that is missing, or unknown
        raise ValueError(f"{path}: {str(error).replace('LLaMAConfig.__init__() ', '')}") from None


# {model_type: what its config.json means where it says nothing}: our fields, and keys of REFUSED
NETWORKS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"qkv_bias": True, "use_sliding_window": False},
    "qwen3": {"qk_norm": True, "head_dim": 128, "use_sliding_window": False},
    "glm": {"qkv_bias": True, "attention_bias": True, "partial_rotary_factor": 0.5},
    "chatglm": {"qkv_bias": True, "partial_rotary_factor": 0.5},
    "chatglm1": {"qkv_bias": True, "prefix_lm": True, "tie_word_embeddings": True},  # ChatGLM-6B
}
# ChatGLM's names of a shape, where they differ: ours
CHATGLM_SHAPE = {
    "num_layers": "num_hidden_layers",
    "inner_hidden_size": "intermediate_size",  # ChatGLM-6B's
    "max_sequence_length": "max_position_embeddings",  # the same
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
}
# Patterns of "key value" by which config.json asks for another network, and what is missing here
REFUSED = {
    "num_experts|num_local_experts|n_routed_experts": "a mixture of experts",
    "quantization_config|quantization_bit": "quantised weights",
    "linear_.*|layer_types .*linear_attention|attn_type_list": "linear attention",
    "(use_)?sliding_window|layer_types .*sliding_attention": "a sliding window",
    "kv_lora_rank": "latent attention",
    "alibi": "ALiBi",
    "parallel_attn": "attention beside the feed-forward",
    ".*logit_softcapping": "capped logits",
    "scale_emb|scale_depth": "scaled embeddings and residuals",
    "model_type glm4": "norms behind attention and feed-forward",  # no key of GLM-4-0414 says it
    "attention_bias|mlp_bias|bias|add_bias_linear": "biases, but those of q, k and v",
    "hidden_act": "an activation other than silu",
    "partial_rotary_factor": "heads of which another part turns",
    "text_config|vision_config": "images",
    "pre_seq_len": "a prefix trained by P-tuning",
    "apply_residual_connection_post_layernorm": "residuals behind norms",
    # GLM-4's ratios raise RoPE's base. The 32k versions' configs are alike, but ChatGLM2 divides
    # positions by it, ChatGLM3 raises the base.
    r"rope_ratio (?!(1|500|10000)\b)": "the positions of the 32k versions",
}


def config_from_hf(hf):
    """The fields of config.json that we have. Raises ValueError naming what else it asks for."""
    # rope_scaling was before, rope_parameters is since transformers 5
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    scaling = rope.pop("rope_type", rope.pop("type", "default"))
    # ChatGLM-6B has the model_type of its successors, and its first files have rows for images.
    if "inner_hidden_size" in hf:
        pieces = hf["vocab_size"] - IMAGES * (hf["vocab_size"] == 150528)
        hf = hf | {"model_type": "chatglm1", "vocab_size": pieces}
    kind = hf.get("model_type", "llama")
    own = {"hidden_act": "silu", "partial_rotary_factor": 1.0, **NETWORKS.get(kind, {})}
    hf = own | {CHATGLM_SHAPE.get(key, key): value for key, value in hf.items()} | rope
    refuse(hf, own)
    if kind not in NETWORKS:
        raise ValueError(f"model_type is {kind!r}, wanted one of {' '.join(NETWORKS)}")
    hf.setdefault("rope_theta", 10000.0 * hf.get("rope_ratio", 1))  # as GLM-4 has it
    known = LLaMAConfig.__annotations__
    values = {name: hf[name] for name in known if hf.get(name) is not None}
    rope = {key: value for key, value in rope.items() if key not in values}
    values["rope_scaling"] = None if scaling == "default" else {"rope_type": scaling, **rope}
    values["model_type"] = {"chatglm": "glm"}.get(kind, kind)  # transformers' name of that network
    return LLaMAConfig(**values)


def refuse(hf, own):
    """Raise ValueError if config.json asks for one of REFUSED by a value that is not its
    model_type's own."""
    asked = {key: value for key, value in hf.items() if value and value != own.get(key)}
    if not hf.get("use_sliding_window", True):  # Qwen2 says how wide it would be
        asked.pop("sliding_window", None)
    for pattern, feature in REFUSED.items():
        for key, value in asked.items():
            if re.match(rf"({pattern})\b", f"{key} {value}"):
                raise ValueError(f"{key} is {value!r:.60}: this network does not have {feature}")


def config_from_meta(params, vocab_size):
    """Meta's params.json says the feed-forward width by what 8/3 C is rounded to."""
    limits = ("max_seq_len", "max_batch_size")
    values = {META_SHAPE.get(k, k): v for k, v in params.items() if k not in limits}
    multiple, factor = values.pop("multiple_of", 256), values.pop("ffn_dim_multiplier", None) or 1
    # From Llama-3.1 on; the factor is 32 in the 1B and 3B of 3.2. These numbers stand in no file.
    if values.pop("use_scaled_rope", False):
        values["max_position_embeddings"] = 131072
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 32.0 if params["dim"] in (2048, 3072) else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    width = int(factor * int(8 * params["dim"] / 3))
    if values.get("vocab_size", -1) == -1:
        values["vocab_size"] = vocab_size
    return LLaMAConfig(intermediate_size=-(-width // multiple) * multiple, **values)


def config_to_meta(config):
    """The inverse of `config_from_meta`. Raises ValueError for what params.json cannot say."""
    width = config.num_attention_heads * config.head_dim
    unlike = config.model_type not in ("llama", "mistral")
    if config.rope_scaling or width != config.hidden_size or unlike:
        raise ValueError(
            f"Meta's params.json has no rope_scaling, no head_dim and no {config.model_type}; "
            "export as hf"
        )
    return {
        **{meta: getattr(config, ours) for meta, ours in META_SHAPE.items()},
        "multiple_of": config.intermediate_size,  # which the product rounds to
        "ffn_dim_multiplier": config.intermediate_size / int(8 * config.hidden_size / 3),
    }


# ==================================================================================================
# Weights from disk


def open_weights(file):
    """{key: tensor} of a .safetensors, .pth or .bin file, mapped: nothing is read before a tensor
    is used, and nothing in a pickle is run. Raises ValueError in one line."""
    file = Path(file)
    check_content(file)
    try:
        # so it is named also while it is being written
        weights = load_file(file) if ".safetensors" in file.name else open_pickle(file)
        # Rotary tables, which old files hold, are made here.
        tables = ("rope.freqs", ".inv_freq")
        return {key: tensor for key, tensor in weights.items() if not key.endswith(tables)}
    except Exception as error:  # a damaged file makes its reader raise nearly all there are
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = re.split(r"\n|\. ", str(error))[0] or "it ends early"
        if code:
            reason = f"it would run {code[1]}, and weights are only data"
        raise ValueError(f"{file} is damaged, or refused ({reason}); download it again") from None


def open_pickle(file):
    """`open_weights` of torch's own format. Files of torch before 1.6 cannot be mapped and are read
    whole."""
    is_zip = zipfile.is_zipfile(file)
    archive = zipfile.ZipFile(file).namelist()[0] if is_zip else ""
    made = re.match(r"consolidated\.\d+", archive)
    if made and not file.name.startswith(made[0]):
        raise ValueError(f"it was written as {made[0]}: the shards are swapped")
    weights = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    for key, tensor in weights.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        # One whose strides repeat its data has fewer bytes than it says.
        if not plain or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{key} is no tensor with its data")
    return {str(key): tensor.detach() for key, tensor in weights.items()}


def weight_files(folder):
    """The files that hold a folder's weights: Hugging Face's, alone or named by an index, or
    Meta's shards. Raises ValueError if there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            # Sharded: the index names the files.
            names = read_json_file(index).get("weight_map") or None
            files = {*map(str, names.values() if isinstance(names, dict) else [names])}
            for file in files:
                # by its letters: caches hold links to files elsewhere
                if not re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", file):
                    raise ValueError(f"{index}: weight_map names {file!r}, wanted plain files")
            return [folder / file for file in sorted(files)]
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise ValueError(
            f"weights not found in {folder}: no model.safetensors, pytorch_model.bin (or index of "
            "these) and no consolidated.00.pth"
        )
    return [folder / f"consolidated.{number:02}.pth" for number in range(len(shards))]


# One file's part of a weight: all of it, or a slice along one axis
Part = namedtuple("Part", "file key shape dtype")


class Checkpoint:
    """The weights in a folder, in any layout of NAMES. Opening it reads no tensor; it checks that
    they are those of the model that config.json or params.json describes. Raises ValueError.

    Each of Hugging Face's files holds some of the weights, each of Meta's a slice of every weight.

    config   LLaMAConfig
    dtype    the embedding's
    slices   into how many a weight is cut
    shapes   {name: shape} that the model wants
    found    {name: ([Part, ...], axis, rows)}: slices along an axis in order, or (axis None) copies
             that must be equal; and which rows of the whole the weight is"""

    def __init__(self, folder):
        config, found = Path(folder, "config.json"), defaultdict(list)
        if config.is_file():  # first, for who asks for another network need not hear of files
            read_config(config)
        self.files = weight_files(config.parent)
        is_meta = self.files[0].suffix == ".pth"
        self.slices = len(self.files) if is_meta else 1
        # What there is: every tensor by its key, with its shape and dtype alone.
        for file in self.files:
            for key, tensor in open_weights(file).items():
                found[key].append(Part(file, key, tuple(tensor.shape), tensor.dtype))
        # Meta writes -1 for the number of pieces; the head tells it.
        rows = sum(sum(part.shape[:1]) for part in found.get("output.weight", ()))
        self.config = read_config(config.with_name("params.json") if is_meta else config, rows)
        self.shapes = weight_shapes(self.config)
        # Before rows take memory: each has a byte at least, or the shapes are none of this folder.
        size = sum(file.stat().st_size for file in self.files)
        if sum(height for height, *_ in self.shapes.values()) > size:
            raise ValueError(f"{folder} describes a model that {size:,} bytes cannot hold")
        layout = "meta" if is_meta else self.config.model_type
        published = PUBLISHED.get(layout, layout)
        if stored_name("embed_tokens.weight", published) in found:
            layout = published
        self.place(found, layout)
        self.dtype = self.found["embed_tokens.weight"][0][0].dtype

    def place(self, found, layout):
        """Give each weight the tensors of the files that are it, or hold it. Raises ValueError for
        one too many, or as `check` does."""
        stored, self.found = stored_rows(self.config, layout), {}
        if self.config.tie_word_embeddings:
            embedding, head = (stored_name(name, layout) for name in TIED)
            found[embedding] += found.pop(head, [])
        # One comparison does for every damage. In the order of the files, then what they lack.
        for key in {**found, **stored}:
            parts, names = found[key], stored.get(key, {})
            if not names:
                raise ValueError(f"{parts[0].file} has {key}, which this model does not have")
            height = sum(map(len, names.values()))
            images = any(part.shape[:1] == (IMAGES + height,) for part in parts)
            skipped = IMAGES * (images and layout == "chatglm6b")
            axis = self.check(key, parts, (skipped + height, *self.shapes[[*names][0]][1:]))
            self.found |= {name: (parts, axis, skipped + rows) for name, rows in names.items()}

    def check(self, key, parts, shape):
        """The axis along which a weight of this shape is cut. Raises ValueError for one that is
        missing, of another shape, or no floating-point numbers."""
        n, wanted = self.slices, f"{shape} in {self.slices} file(s)"
        # {shape of a part: axis}; a size that n does not divide is no part's. Whole comes last,
        # since it is the one that counts where n is 1.
        axes = {(*shape[:i], size / n, *shape[i + 1 :]): i for i, size in enumerate(shape)}
        axes[shape] = None
        for part in parts:
            same = part.shape in axes and part.shape == parts[0].shape
            if not same or part.dtype not in DTYPES.values():
                found = f"{key} is {part.shape} of {part.dtype}"
                raise ValueError(f"{part.file}: {found}, wanted {wanted}; is one missing?")
        if not parts or len(parts) % n:
            lacking = sorted({*self.files} - {part.file for part in parts})
            raise ValueError(f"{lacking[0]} lacks {key}, wanted {wanted}")
        return axes[parts[0].shape]

    def read(self, device="cpu", dtype=None):
        """Yield (name, tensor on device), cast to dtype (None: the embedding's). What stands in a
        file as it is wanted is a view of it. Raises ValueError for NaN, infinity, what dtype cannot
        hold, and copies that differ."""
        dtype, opened, used = dtype or self.dtype, cache(open_weights), 0
        for name, (parts, axis, rows) in self.found.items():
            # Files are mapped anew now and then: the pages of what was copied leave the memory.
            if used > 2**27:
                opened.cache_clear()
                gc.collect()  # torch.load leaves its map in a reference cycle
                used = 0
            tensors = [opened(part.file)[part.key] for part in parts]
            whole = tensors[0] if axis is None else torch.cat(tensors, axis)
            if axis is None and not all(torch.equal(copy, whole) for copy in tensors[1:]):
                raise ValueError(
                    f"{parts[0].file}: {parts[0].key} is shared or tied, and differs from "
                    f"{parts[-1].key} in {parts[-1].file}"
                )
            tensor = take_rows(whole, rows).to(device, dtype)
            if not all(end.isfinite() for end in tensor.aminmax()):
                raise ValueError(
                    f"{parts[0].file}: {parts[0].key} holds NaN, infinity or more than the "
                    f"{torch.finfo(dtype).max:g} of {dtype}; take another dtype, or copy again"
                )
            used += tensor.nbytes
            yield name, tensor


def load_model(folder, device="cpu", dtype=None):
    """The LLaMA of a folder, frozen: built on `meta` and given its weights one at a time, cast to
    dtype (None: the embedding's). Raises ValueError naming the file and the first bad key."""
    weights = Checkpoint(folder)
    with torch.device("meta"):
        model = LLaMA(weights.config)
    tied = weights.config.tie_word_embeddings
    model.load_state_dict(dict(weights.read(device, dtype)), strict=not tied, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def find_base(name, advice="give its folder"):
    """The folder of a base (or an adapter): name itself, or what the caches of Hugging Face and
    ModelScope hold of owner/name. Nothing is downloaded. Raises ValueError if there is neither."""
    home, name = os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"), str(name)
    hub = Path(os.environ.get("HF_HUB_CACHE", Path(home, "hub")))
    scope = Path(os.environ.get("MODELSCOPE_CACHE", Path.home() / ".cache/modelscope"))
    repo, id = hub / f"models--{name.replace('/', '--')}", name.replace(".", "___")
    ref = repo / "refs/main"
    snapshot = repo / "snapshots" / (ref.read_text().strip() if ref.is_file() else "main")
    # ModelScope's, of all its versions.
    theirs = [scope / part / id for part in ("hub/models", "hub", "models", "")]
    theirs += (scope / "models" / name.replace("/", "--") / "snapshots").glob("*")
    for folder in (Path(name), snapshot, *theirs):
        if folder.is_dir():
            return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        advice += f", or run hf download {name} or modelscope download --model {name}"
    raise ValueError(f"{name!r} is neither a folder nor in {hub} or {scope}; {advice}")


# names of a tokenizer's file, the best first
TOKENIZERS = ("tokenizer.model", "ice_text.model", "tokenizer.json")


def find_tokenizer(folder):
    """The file of a base's tokenizer: in its folder, or one level up as in Meta's download. Where
    neither is: tokenizer.model in the folder. Raises ValueError for a link to another place."""
    folder = Path(folder).resolve()
    files = [folder / name for name in TOKENIZERS] + [folder.parent / "tokenizer.model"]
    return check_link(next(filter(Path.is_file, files), files[0]))


def check_link(file):
    """The file, if it is no link out of its folder, but for those of the hub's cache. A folder that
    comes from elsewhere could else have any file read, or copied into what is published."""
    real, home = file.resolve(), file.parent.resolve()
    if real.is_relative_to(home) or real.match("models--*/blobs/*"):
        return file
    raise ValueError(f"{file} is a link out of its folder, to {real}; put the file itself there")


def check_content(file, most=math.inf):
    """Raise ValueError for a file that is missing, of more bytes than `most`, no regular one (a
    pipe or a device may never end), or Git LFS's word for it."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} {'is no regular file' if file.exists() else 'not found'}")
    if file.stat().st_size > most:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, wanted at most {most:,}")
    with open(file, "rb") as opened:
        if opened.read(99).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the file; run git lfs pull")


@torch.no_grad()
def init_weights(model, seed):
    """Fresh weights: normal with std 0.02; the two projections that write into the residual stream
    times 1/sqrt(2 L), lest its variance grow with depth (Radford et al. 2019, 2.3)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * len(model.layers)) if residual else 0.02
        if "norm" not in name:  # those are ones already; biases begin at 0
            p.normal_(0.0, std * (p.dim() > 1), generator=generator)


# ==================================================================================================
# Weights to disk


def fsync(path):
    """Bring a file, or a folder's list of names, from the system's memory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(handle, path):
    """Lock an open file or folder until it is closed, so that one process writes it. Raises
    ValueError if another holds it."""
    with suppress(ImportError, OSError):  # Windows has no locks, nor have some network disks
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} belongs to another process; wait for it") from None


@contextmanager
def own_folder(path):
    """Within it a folder, made if there is none, is this process's alone. Raises ValueError as
    `hold` does."""
    Path(path).mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        hold(handle, path)
        yield
    finally:
        os.close(handle)


def check_own(path, mark="\ud800"):
    """Raise ValueError unless the file at path, if there is one, is ours to replace: it holds mark
    (by default half a character, which no text holds) or ends within it, or is empty."""
    if path and Path(path).exists():
        check_content(path)
        with open(path, encoding="utf-8", errors="replace") as file:
            kept = file.read(SMALL)
        if mark not in kept and not mark.startswith(kept):
            raise ValueError(f"{path} is not of this command's making; name another file")


def check_like(name, found, wanted):
    """Raise ValueError naming the first key of wanted that an object which was read lacks, or has
    of another kind."""
    for key, value in wanted.items():
        if kind_of(found.get(key)) != kind_of(value):
            raise ValueError(f"{name}: {key} is {found.get(key)!r:.60}, wanted {kind_of(value)}")


def kind_of(value):
    """What values of one kind share: a number is not below 0 and finite, of a tensor dtype and
    shape count, of anything else the type."""
    if isinstance(value, (int, float)) and 0 <= value < 1e300:
        return "a number"
    return getattr(value, "dtype", type(value)), getattr(value, "shape", ())


def write_atomically(path, write):
    """Call write(temporary path), bring the file to the disk and rename it to path, so that a
    reader, a crash or a power cut never meets half a file. Raises OSError if it cannot be
    written."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        # Who may read the folder may read it: safetensors makes files for their owner alone.
        temporary.chmod(temporary.parent.stat().st_mode & 0o644)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(Path(path).parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # as torch says it of a full disk
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def to_json(value, **options):
    return json.dumps(value, ensure_ascii=False, **options)


def write_json(path, value):
    write_text(path, to_json(value, indent=2) + "\n")


def write_json_lines(path, values):
    write_text(path, "".join(to_json(value) + "\n" for value in values))


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashes(path, files):
    """Note, as {file: SHA-256}, what was made and from what."""
    write_json(path, {str(file): file_hash(file) for file in files})


@contextmanager
def new_folder(path):
    """A folder to write into that gets its name when all is written; after an error nothing is
    there. What a killed process left aside goes. Raises ValueError if path holds something, or
    another process writes it."""
    path = Path(path).resolve()
    aside = unfinished(path)
    with own_folder(aside):
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ValueError(f"{path} exists and is not empty; name a new folder")
            for left in aside.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield aside
            os.replace(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def unfinished(path):
    """Where a folder stands until it is written, and while it is deleted."""
    return path.with_name(f".{path.name}.unfinished")


def discard(folder):
    """Delete a checkpoint of ours under another name: half of one is never taken for whole."""
    if (folder / "run.json").is_file():
        shutil.rmtree(folder.rename(unfinished(folder)))


def processes():
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def full_tensor(tensor):
    """A tensor, gathered if it is cut over the processes, which must all ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


SHARD_BYTES = 2**30  # of a safetensors file; one file's tensors are in memory at a time


def split_into_shards(tensors, max_bytes):
    """Cut a stream of (name, tensor) into dicts of at most max_bytes (or one tensor)."""
    shard, size = {}, 0
    # A shard is full when the next tensor would exceed it.
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def to_layout(config, tensors, layout, dtype):
    """A stream of (name, tensor) as a layout's files have it, on the CPU and cast to dtype. The
    parts of what has one name there wait for the last of them."""
    stored, waiting = stored_rows(config, layout), {}
    for name, tensor in tensors:
        key = stored_name(name, layout)
        parts = waiting.setdefault(key, [])
        parts.append(tensor.detach().to("cpu", dtype))
        if len(parts) == len(stored[key]):
            rows = torch.cat([*stored[key].values()]).argsort()
            yield key, take_rows(torch.cat(parts) if parts[1:] else parts[0], rows)
            del waiting[key]


def save_hf(config, tensors, folder, dtype, base=None, max_bytes=SHARD_BYTES):
    """Write a stream of (name, tensor) as Hugging Face's folder: safetensors, with an index if
    there are several; config.json, with what the folder `base` says besides; its tokenizer."""
    folder, index = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    # The weights, a file at a time.
    stream = to_layout(config, tensors, config.model_type, dtype)
    for number, shard in enumerate(split_into_shards(stream, max_bytes), 1):
        file = f"model-{number:05}.safetensors"
        write_atomically(folder / file, partial(save_file, shard, metadata={"format": "pt"}))
        index |= dict.fromkeys(shard, file)
        shard.clear()  # or it would stay while the next is filled
    if number == 1:
        os.replace(folder / file, folder / "model.safetensors")
    else:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    # Then what describes them; a reader who finds it finds all.
    values = read_json_file(check_link(Path(base or folder) / "config.json"), {}) | asdict(config)
    # what transformers 5 calls torch_dtype and rope_scaling, and what names code
    for key in ("dtype", "rope_parameters", "auto_map"):
        values.pop(key, None)
    network = f"{config.model_type.capitalize()}ForCausalLM"  # transformers' class
    values |= {"architectures": [network], "hidden_act": "silu"}
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", values)
    if base:
        copy_tokenizer(base, folder)


def save_meta(config, tensors, folder, dtype, base=None, max_bytes=None):
    """Write a stream of (name, tensor) as Meta's folder, in one shard whatever its size:
    params.json and consolidated.00.pth. Raises ValueError for what params.json cannot say."""
    write_json(Path(folder) / "params.json", config_to_meta(config))
    state = dict(to_layout(config, tensors, "meta", dtype))
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    write_atomically(Path(folder) / "consolidated.00.pth", partial(torch.save, state))
    if base:
        copy_tokenizer(base, folder)


SAVE = {"hf": save_hf, "meta": save_meta}


def save_model(model, folder, base=None):
    """Write a model as Hugging Face's folder, in the embedding's dtype. All processes call it,
    since a sharded model is gathered tensor by tensor; the first writes."""
    tensors = ((name, full_tensor(p)) for name, p in model.named_parameters())
    if processes()[0]:
        return [name for name, _ in tensors]
    save_hf(model.config, tensors, folder, model.embed_tokens.weight.dtype, base)


def copy_tokenizer(base, folder):
    """Copy a base's tokenizer, in all its files, its chat template, and how it is asked, into a
    folder."""
    names = "tokenizer*.json vocab.json merges.txt special_tokens_map.json added_tokens.json "
    names += "chat_template* generation_config.json"
    files = [file for name in names.split() for file in Path(base).glob(name)]
    for file in filter(Path.is_file, [*files, find_tokenizer(base)]):
        shutil.copyfile(check_link(file), Path(folder) / file.name)
    if (Path(folder) / "tokenizer.model").is_file():
        tell_transformers(Path(folder))


def tell_transformers(folder):
    """Have tokenizer_config.json say what transformers and llama.cpp must know of a SentencePiece
    model: that it is LLaMA's, unless there are settings, and if it puts no space in front. And have
    config.json say what ends an answer: to transformers 5 nothing does by default."""
    from sentencepiece import SentencePieceProcessor  # here alone: a network needs no text

    settings = folder / "tokenizer_config.json"
    theirs = read_json_file(settings, {})
    wanted = theirs or {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    with suppress(RuntimeError):  # tiktoken's file
        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        if pieces.normalize("a") == "a":
            wanted = wanted | {"add_prefix_space": False}
        if wanted != theirs:
            write_json(settings, wanted)
        for config in folder.glob("config.json"):  # none in Meta's layout
            write_json(config, {"eos_token_id": pieces.eos_id()} | read_json_file(config))


# A plain prompt in Jinja, between what stands before and behind the instruction: what
# `generate.render` makes of it.
PLAIN_CHAT = """\
{% set opening = '' %}{% if messages[0].role == 'system' %}\
{% set opening = messages[0].content + '\\n' %}{% set messages = messages[1:] %}{% endif %}\
{{ (bos_token or '') + BEFORE }}{% for message in messages %}{% if message.role == 'user' %}\
{{ (' <user>: ' if messages|length > 2 else '') + (opening if loop.first else '') }}\
{{ message.content + (BEHIND if loop.index0 + 2 >= messages|length else ' <bot>: ') }}\
{% else %}{{ message.content + ((eos_token or '') if loop.last else '') }}{% endif %}{% endfor %}"""


def write_chat_template(folder, template):
    """Give the tokenizer_config.json of a folder a prompt template in Jinja, as transformers, vLLM
    and llama.cpp read it. A base's own stays, unless the model was tuned with a plain prompt. And
    have generation_config.json name the token that the template ends an answer with, if it is not
    EOS: that of Qwen's and Llama's bases ends no conversation."""
    folder = Path(folder)
    with suppress(AttributeError, LookupError, TypeError):  # of kinds that are no tokenizer's
        for token in read_json_file(folder / "tokenizer.json", {}).get("added_tokens", ()):
            if template.get("last", "").endswith(token["content"]):
                config = folder / "generation_config.json"
                write_json(config, read_json_file(config, {}) | {"eos_token_id": token["id"]})
    file, others = folder / "tokenizer_config.json", [*folder.glob("chat_template*")]
    settings = read_json_file(file, {})
    match template:
        case {"prompt_no_input": str(plain)}:
            plain = plain.replace("{input}", "").replace("{{", "{").replace("}}", "}")
            before, _, behind = map(to_json, plain.partition("{instruction}"))
            text = PLAIN_CHAT.replace("BEFORE", before).replace("BEHIND", behind)
        case {"chat_template": str(text)} if text and not (others or "chat_template" in settings):
            pass
        case _:
            return
    for other in others:
        other.unlink()
    write_json(file, settings | {"chat_template": text})


# ==================================================================================================
# Settings: a dataclass says name, type, default and range once; options and checks follow, and the
# comment beside a field or above it is the option's help


def setting(default, low=None, high=None, choices=None):
    """A field of a settings dataclass with its least and greatest value, or its choices."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


def check_settings(settings):
    """Raise ValueError naming the first field of a dataclass whose value is neither its default nor
    of its annotated type and within its range. A number without a range is above 0, or 0 where
    that is its default."""
    for f in fields(settings):
        value, choices = getattr(settings, f.name), f.metadata.get("choices")
        wanted, fits = f.type.__name__, type(value) is f.type
        if choices:
            wanted, fits = " or ".join(choices), value in choices
        elif f.type in (int, float):
            low, high = f.metadata.get("low"), f.metadata.get("high") or 2**24
            if low is None:
                low = 0 if f.default == 0 else f.type is int or 1e-30
            wanted += f" from {low:g} to {high:g}"
            fits = type(value) in (int, f.type) and low <= value <= high
        if not fits and repr(value) != repr(f.default):  # True is 1, and no number
            raise ValueError(f"{f.name} is {value!r}, wanted {wanted}")


def boolean(text):
    """True or False of an option's text, as `--x`, `--x True` and `--x=false` write it."""
    value = ConfigParser.BOOLEAN_STATES.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted True or False")
    return value


DATA = Path(__file__).parent / "data"


def shown(value):
    """A default as --help shows it, without the marks of a tuple and the project's folder."""
    return re.sub(rf"[(),']|{re.escape(str(DATA.parent))}/", "", str(value)) or "none"


# To find a class inspect parses its whole file. Once is enough; and in Python 3.11 that may fail
# while another thread prints a traceback, which parses too.
source_of = cache(inspect.getsource)


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error; --like-this may stand for --like_this. The description
    is shown as it is written, and its examples are the usage."""

    def __init__(self, **kwargs):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(usage="%(prog)s", formatter_class=as_written, allow_abbrev=False, **kwargs)

    def add_settings(self, *classes, **plain):
        """An option for each field of settings dataclasses, in groups under the comments that stand
        alone there. What is not given does not appear among the arguments: the dataclass has the
        default. plain: the defaults of the script alone, where they are others."""
        # `--x` alone is True; a tuple takes several words.
        kinds = {bool: {"nargs": "?", "const": True, "type": boolean}, tuple: {"nargs": "+"}}
        # A comment before an empty line is a heading. A field's own stand above and beside it.
        pattern = r"(?m)^    # (.*)\n\n|((?:^    #.*\n)*)^    (\w+): .*?(?:  #(.*))?$"
        source = "".join(source_of(c) for cls in classes for c in cls.__mro__[:-1])
        missing = {f.name: f for cls in classes for f in fields(cls)}
        group = self
        for title, above, name, beside in re.findall(pattern, source):
            group = self.add_argument_group(title) if title else group
            if f := missing.pop(name, None):
                text = re.sub(r"\s*# ", " ", above) + beside
                defaults = map(shown, dict.fromkeys((f.default, plain.get(name, f.default))))
                text += f" (default: {'; plain run: '.join(defaults)})"
                kind = kinds.get(f.type, {"type": f.type, "choices": f.metadata.get("choices")})
                option = group.add_argument(
                    f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind
                )
                self._option_string_actions[f"--{name.replace('_', '-')}"] = option

    def parse_known_args(self, *given):
        found, unknown = super().parse_known_args(*given)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = get_close_matches(word, self._option_string_actions) or ["a text in quotes"]
            self.error(f"unknown {' '.join(unknown)}, did you mean {near[0]}?")
        several = {name: tuple(v) for name, v in vars(found).items() if isinstance(v, list)}
        vars(found).update(several)
        return found, unknown

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def out_of_memory(error):
    """The first line of an error of memory that ran out; "" for any other error."""
    text = str(error).partition("\n")[0] or "out of memory"
    of_torch = isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", text)
    return text if of_torch or isinstance(error, MemoryError) else ""


def printable(text):
    """A text that others wrote, for a terminal: control characters, but line ends and tabs, could
    move its cursor, set its title or more, and stand as their codes."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)


def log_if_read(text):
    """To stderr, but never wait for who reads it, and never fail: a disk may be full."""
    with suppress(OSError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode("utf-8", "replace")[-4096:])  # what one page holds


class Lasting:
    """A stream of output whose reader may leave, or None, as one that was closed from the start is:
    what is written then is lost, and nothing else. So the end of `| tee log`, or of a terminal, is
    not the end of a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


@contextmanager
def stop_signals(stop=lambda number: None):
    """Within it SIGTERM, Ctrl-C and a closed terminal (SIGHUP) only put their number into the list
    that it yields, and call stop with it, so that what is under way ends first; a second one ends
    the process at once. One that is ignored, as nohup does it, stays so."""
    caught = []

    def note(number, frame):
        caught.append(number)
        stop(number)
        signal.signal(number, signal.SIG_DFL)
        # Ctrl-C has ended `tee` too, or the terminal is gone.
        log_if_read("\nstopping when this is done; once more to stop at once\n")

    with ExitStack() as handlers:
        with suppress(ValueError):  # in another thread than the main one there are none
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    handlers.callback(signal.signal, number, signal.signal(number, note))
        yield caught


# What to do about an error that Python words: {pattern of its text: advice}.
ADVICE = {
    r"No module named '(\w+)": r"pip install \1",
    "Address already in use": "give another --port (0: a free one)",
}


def run(main):
    """Run a script's main(): what the user can mend is one line on stderr and exit code 2."""
    sys.stderr = Lasting(sys.stderr)
    try:
        main()
    except (ValueError, OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        text = out_of_memory(error) or " ".join(str(error).split())
        for pattern, advice in ADVICE.items():
            text = re.sub(f".*{pattern}.*", rf"\g<0>; {advice}", text)
        print(f"error: {printable(text)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ==================================================================================================
# Commands


def convert(source, folder, dtype=None):
    """Write a checkpoint of either layout as Hugging Face's, into a new folder; return its config.
    Raises ValueError as `Checkpoint` and `new_folder` do."""
    weights = Checkpoint(source)
    with new_folder(folder) as new:
        stream = weights.read(dtype=dtype)
        save_hf(weights.config, stream, new, dtype or weights.dtype, source)
    return weights.config


def describe_model(folder):
    """The lines of `model.py info`, among them a fingerprint that is the same for the same weights
    in either layout: SHA-256 over name, dtype, shape and SHA-256 of each tensor, sorted by name."""
    weights, sums = Checkpoint(folder), {}
    # A hash of each tensor, then one of all.
    for name, tensor in weights.read():
        digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        sums[name] = f"{weights.dtype} {tuple(tensor.shape)} {digest}"
    if weights.config.tie_word_embeddings:  # as an untied copy has it
        sums["lm_head.weight"] = sums["embed_tokens.weight"]
    c, size = weights.config, weights.dtype.itemsize
    kinds = Counter(f"{re.sub(r'[0-9]+', '*', n):44} {s}" for n, s in weights.shapes.items())
    n = sum(map(math.prod, weights.shapes.values()))
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size
    return [
        *(f"{kind:64} x {count}" for kind, count in kinds.items()),
        f"{n:,} parameters in {weights.dtype}, {n * size / 2**30:.2f} GiB",
        f"inference: {position / 2**20:.3f} MiB a position for keys and values; "
        f"{(n * size + 2048 * position) / 2**30:.2f} GiB with 2,048 positions",
        f"fingerprint {hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()}",
    ]


EXAMPLES = """Convert, look into, or make anew the weights of a LLaMA.

  python model.py info data/tiny                    shapes, memory, a fingerprint
  python model.py convert llama-meta models/llama   Meta's folder as Hugging Face's
  python model.py init data/tiny/config.json new    fresh weights, for train.py --full"""


def parse_arguments():
    parser = Parser(description=EXAMPLES)
    add = parser.add_subparsers(dest="command", required=True, parser_class=Parser).add_parser
    info = add("info", help="shapes, memory, and a fingerprint to compare by")
    to_hf = add("convert", help="write either layout as Hugging Face's")
    init = add("init", help="fresh weights, for `train.py --full`")
    for command in (info, to_hf, init):
        command.add_argument("source", help="folder of a base; init: its config or params file")
        if command is not info:
            command.add_argument("output_dir", help="new folder to write")
    to_hf.add_argument("--dtype", choices=DTYPES, help="cast to it (default: as stored)")
    init.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.command == "convert":
        config = convert(args.source, args.output_dir, DTYPES.get(args.dtype))
        print(f"{args.output_dir}: {config}")
        if not find_tokenizer(args.output_dir).is_file():
            print("no tokenizer.model was found to go with it")
    elif args.command == "info":
        print("\n".join(describe_model(args.source)))
    else:
        model = LLaMA(read_config(args.source))
        init_weights(model, args.seed)
        with new_folder(args.output_dir) as folder:
            save_model(model, folder)
        n = sum(p.numel() for p in model.parameters())
        print(f"{args.output_dir}: {n:,} weights, {n * 4 / 2**20:.1f} MiB as float32")


if __name__ == "__main__":
    run(main)
