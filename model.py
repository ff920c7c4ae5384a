"""LLaMA, written out: token ids in, logits out.

Sources: Touvron et al. 2023 (LLaMA), Zhang & Sennrich 2019 (RMSNorm), Su et al. 2021 (RoPE), Shazeer 2020 (SwiGLU),
Ainslie et al. 2023 (grouped-query attention). Parameter names are those of Meta's release.

Letters used for dimensions:
  B rows in the batch   T new positions   S all positions (cached + new)   V vocabulary
  C model width (dim)   H query heads     K key/value heads (K divides H)  D head width (C / H)   F feed-forward width

Where each dtype stands ("compute" is bf16, fp16 or fp32; there is no autocast, each cast below is a line of code):
  weights              as loaded; `Linear` casts them to compute (nothing to do when they are stored so)
  residual stream      compute, from the embedding on
  RMSNorm, RoPE        float32 inside, compute outside
  attention scores     inside scaled_dot_product_attention, which accumulates in float32
  products             compute, accumulated in float32; on a CPU without bf16 instructions float32 inside (`goes_wide`)
  logits               float32
"""
import argparse
import gc
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
from copy import copy
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ONEDNN = torch.backends.mkldnn.is_available()
HF_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",     # ours, Meta's: theirs
            "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
            "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ROPE_SCALING = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                  "original_max_position_embeddings")}


def read_json_file(path):
    """The object in a JSON file; ValueError in one line if it is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} not found") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, wanted an object")
    return value


@dataclass(frozen=True)
class LLaMAConfig:
    """The shape of a model, from Meta's params.json or Hugging Face's config.json. Raises ValueError for a shape that
    cannot be built. The last three fields are not Meta's; our params.json holds them where they are needed."""
    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    norm_eps: float                           # 1e-6 in LLaMA-1, 1e-5 in LLaMA-2: always read, never assumed
    n_kv_heads: int | None = None             # None: one per query head (LLaMA-1)
    multiple_of: int = 256                    # ffn_dim is rounded up to a multiple of it
    ffn_dim_multiplier: float | None = None   # LLaMA-2 70B: 1.3
    rope_theta: float = 10000.0
    head_dim: int | None = None               # None: dim / n_heads
    tie_embeddings: bool = False              # output.weight is tok_embeddings.weight
    rope_scaling: dict | None = None          # {"rope_type": "linear" | "llama3", "factor": ...}, see rope_table

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        rope, optional = self.rope_scaling or {}, ("ffn_dim_multiplier", "head_dim")
        if rope and not (isinstance(rope, dict) and set(ROPE_SCALING.get(str(rope.get("rope_type")), (None,))) <= rope.keys()):
            raise ValueError(f"rope_scaling is {rope}; built are "
                             + " and ".join(f"{kind} with {' '.join(keys)}" for kind, keys in ROPE_SCALING.items()))
        values = {name: v for name, v in vars(self).items() if v is not None or name not in optional} | rope
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "head_dim"):
            if type(value := values.get(name, 1)) is not int or not 0 < value < 2**24:
                raise ValueError(f"{name} is {value!r}, wanted a whole number above 0 and below 2^24")
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier", *ROPE_SCALING["llama3"]):
            if type(value := values.get(name, 1)) not in (int, float) or not 0 < value < 2**64:
                raise ValueError(f"{name} is {value!r}, wanted a number above 0 and below 2^64")
        if self.head_dim is None and self.dim % self.n_heads == 0:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.head_dim is None or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} over n_heads {self.n_heads} is no even head width (RoPE turns pairs)")
        if max(self.n_heads * self.head_dim, self.ffn_dim) >= 2**24:
            raise ValueError(f"dim {self.dim} makes layers of {max(self.n_heads * self.head_dim, self.ffn_dim):.3g}, wanted less than 2^24")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")

    @property
    def ffn_dim(self):
        """Two thirds of 4 C, so that SwiGLU's three matrices weigh as much as the usual two (Shazeer 2020)."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    def params(self):
        """What params.json says of this shape: the keys that differ from their defaults, Meta's in Meta's form."""
        plain = {"head_dim": self.dim / self.n_heads, "tie_embeddings": False}
        return {k: v for k, v in asdict(self).items() if v is not None and plain.get(k) != v}

    @classmethod
    def from_params(cls, path, vocab_size=None):
        """Read Meta's params.json; vocab_size stands in for the -1 that Meta writes there. Raises ValueError naming the
        file and the key that is missing or unknown."""
        if not Path(path).is_file():
            raise ValueError(f"{path} not found; --base_model wants a folder with params.json (Meta's, ours) or config.json "
                             "(Hugging Face's), the weights and tokenizer.model")
        params = {k: v for k, v in read_json_file(path).items() if k not in ("max_seq_len", "max_batch_size")}
        if params.get("vocab_size") == -1:
            params["vocab_size"] = vocab_size
        if unknown := sorted(params.keys() - cls.__dataclass_fields__.keys()):
            raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; this model would ignore them")
        try:
            return cls(**params)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {str(error).replace('LLaMAConfig.__init__() ', '')}") from None

    @classmethod
    def from_hf(cls, path):
        """Read Hugging Face's config.json. Its bos, eos and pad ids are not read: tokenizer.model has them. Raises
        ValueError naming the file and the key that is missing, or that asks for what this network does not have."""
        hf = read_json_file(path)
        for key, plain in (("model_type", "llama"), ("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False),
                           ("quantization_config", None)):
            if (hf.get(key) or plain) != plain:
                raise ValueError(f"{path}: {key} is {hf[key]!r}, this network knows {plain!r} only")
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps", "intermediate_size")
        if missing := [key for key in names if hf.get(key) is None]:
            raise ValueError(f"{path} lacks {missing[0]}")
        *shape, width = (hf[key] for key in names)
        old, new = (hf.get(key) or {} for key in ("rope_scaling", "rope_parameters"))      # before, since transformers 5
        if not isinstance(old, dict) or not isinstance(new, dict):
            raise ValueError(f"{path}: rope_scaling or rope_parameters is {old or new!r}, wanted an object")
        rope = {**old, **new}
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        scaling = {"rope_type": kind, **{key: rope[key] for key in ROPE_SCALING.get(kind, ()) if key in rope}}
        try:
            config = cls(*shape, hf.get("num_key_value_heads"), head_dim=hf.get("head_dim"),
                         rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 10000.0,
                         rope_scaling=scaling if kind != "default" else None,
                         tie_embeddings=bool(hf.get("tie_word_embeddings")))
            if config.ffn_dim != width:                           # Meta's two numbers that round to this width
                config = replace(config, multiple_of=width, ffn_dim_multiplier=width / int(8 * config.dim / 3))
            return config
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def has_bf16_products():
    """Has this CPU instructions for bf16 products that torch uses? AVX512-BF16, AMX or Arm's; _is_mkldnn_bf16_supported alone
    is also true of x86 processors where oneDNN makes them of float32's."""
    return ONEDNN and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
                       or not torch.cpu._is_avx2_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


BF16_PRODUCTS = has_bf16_products()


def goes_wide(x):
    """Are products of x better made in float32? On a CPU without instructions for bf16 its products run at a ninth of
    float32's rate (AVX2; 1,504 rows of 512), fp16's are no faster."""
    return x.is_cpu and x.dtype.itemsize < 4 and not BF16_PRODUCTS and not torch.compiler.is_compiling()


def product(x, weight):
    """y = W x of x (..., I) and W (O, I), in the dtype of x: `F.linear`, but that on a CPU the kernel is chosen: where x
    `goes_wide`, `WideProduct`; without gradients, oneDNN's float32 product, which takes half the time of the one that
    F.linear picks (1 to 16 rows, 2816 x 1024, on AMD's Zen 3) and a tenth more for many rows; with bf16 instructions (AMX) a
    matrix times a vector, in bf16 also W times few columns, at 1.4 times F.linear's rate."""
    weight, rows = weight.to(x.dtype), x.numel() // x.size(-1)
    # one row, compiled: a loop over W as stored; of a W wider than tall cuBLAS reads more (3.5 TB/s to 3.1 on an H200)
    if rows == 1 and torch.compiler.is_compiling() and not torch.is_grad_enabled() and (x.is_cpu or weight.size(0) >= weight.size(1)):
        parts = weight.chunk(8 if x.is_cpu else 1)                # eight rows at a time: one sum waits for its own additions
        return torch.cat([(part.float() * x.float()).sum(-1) for part in parts], -1).to(x.dtype).view(*x.shape[:-1], -1)
    if goes_wide(x) and rows > 5:                                 # fewer: the casts take longer than the products
        return WideProduct.apply(x, weight)
    if x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if BF16_PRODUCTS and rows == 1:
            return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
        if BF16_PRODUCTS and x.dtype == torch.bfloat16 and rows <= 16:
            return (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
        if ONEDNN and x.dtype == torch.float32 and rows < 256:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def product_gradient(grad, weight):
    """dx (..., I) = W^T dy of dy (..., O) and W (O, I), in the dtype of dy; in float32 where dy `goes_wide`."""
    if not goes_wide(grad):
        return grad @ weight
    dx = grad.new_zeros(grad.numel() // len(weight), weight.size(1), dtype=torch.float32)
    for part, rows in zip(grad.flatten(0, -2).split(1024, -1), weight.split(1024)):
        dx.addmm_(part.float(), rows.float())
    return dx.to(grad.dtype).view(*grad.shape[:-1], -1)


class WideProduct(torch.autograd.Function):
    """y = W x and its gradients as float32 products, each rounded once to the dtype of x. W is cast 1,024 rows at a time, which
    stay in the processor's cache. Kept is what F.linear keeps: W and, if W is trained, x, both as they are."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        y, wide = x.new_empty(*x.shape[:-1], len(weight)), x.float()
        for part, rows in zip(y.split(1024, -1), weight.split(1024)):
            part.copy_(product(wide, rows.float()))
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dw = None if x is None else (grad.flatten(0, -2).T.float() @ x.flatten(0, -2).float()).to(x.dtype)
        return None if weight is None else product_gradient(grad, weight), dw


class Linear(nn.Linear):
    """y = W x, W (O, I), no bias. W is cast to the dtype of x, so float32 weights can train under bf16 activations."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):                                         # (..., I) -> (..., O)
        return product(x, self.weight)


class Normalise(torch.autograd.Function):
    """RMSNorm with its gradient written out: autograd would keep a float32 copy of x, this keeps x and one number per
    token. With n = x / rms(x) and u = dy * g, dx = (u - n * mean(u * n)) / rms(x) and dg = sum of dy * n."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)                 # (..., 1), 1 / rms(x)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        n, u = x.float() * scale, grad.float() * weight.float()
        dx = torch.addcmul(u, n, (u * n).mean(-1, keepdim=True), value=-1) * scale
        dg = (grad.float() * n).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), dg, None


class SwiGLU(torch.autograd.Function):
    """silu(a) * b, keeping a and b alone for the gradient: silu(a) is made again there, a third of the memory saved."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), F.silu(a).mul_(grad)


class RMSNorm(nn.Module):
    """y = g * x / sqrt(mean(x^2) + eps), in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):                                         # (..., C) -> (..., C)
        if x.is_cuda or not torch.is_grad_enabled():              # fewer operations, float32 inside
            return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)
        return Normalise.apply(x, self.weight, self.eps)


def rope_table(positions, head_dim, theta, scaling=None):
    """(cos, sin) of the angle m theta^(-2i/D) for position m and pair i (Su et al. 2021, eq. 15), float32, for positions
    (T,) shared by all rows or (B, T): (T, D/2, 2) or (B, 1, T, D/2, 2), which broadcast over (B, heads, T, D/2, 2).

    Made in each forward rather than kept: a buffer built on `meta` stays empty, and one cast to bf16 is off by up
    to 2.0 in the cosine at high positions.

    scaling stretches a trained context by its factor: "linear" slows every pair (Chen et al. 2023), "llama3" only those
    that turn few times within the original context, with a linear transition (Llama 3.1's apply_scaling)."""
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    speed = theta ** (-pair / head_dim)                                                    # (D/2), radians per position
    if scaling:
        kept = 0.0                                                                         # share of the speed left as it is
        if scaling["rope_type"] == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = speed * (scaling["original_max_position_embeddings"] / (2 * math.pi))
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        speed = speed * (kept + (1 - kept) / scaling["factor"])
    angle = positions.float().unsqueeze(-1) * speed                                        # (..., T, D/2)
    if positions.dim() == 2:
        angle = angle.unsqueeze(1)
    return torch.stack((angle.cos(), angle.sin()), -1)


def apply_rope(x, rope):
    """Turn each adjacent pair (x[2i], x[2i+1]) of x (B, heads, T, D), taken as a complex number, by its angle
    (Su et al. 2021, eq. 34). One complex product is a tenth of the time that the four real ones take on a CPU; compiled,
    they are real, for inductor makes no code of complex ones.

    Adjacent pairs are Meta's layout. Hugging Face pairs i with i + D/2 and permutes the rows of wq and wk to suit."""
    pairs = x.float().unflatten(-1, (-1, 2))                                               # (B, heads, T, D/2, 2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


def causal_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D) + causal mask) v: q (B, H, T, D) are the last T of the S positions of k, v (B, K, S, D),
    K dividing H (Ainslie et al. 2023). A mask (B, 1, T, S), True where q sees k, takes the place of the causal one.
    Returns (B, H, T, D)."""
    T, S = q.size(2), k.size(2)
    if goes_wide(q) or q.is_cpu and T == 1 and q.dtype != torch.float32 and not BF16_PRODUCTS:   # the kernel's own casts are slow
        def attend(q, k, v):
            return causal_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
        if torch.is_grad_enabled():                               # keep q, k, v as they are; their casts are made again
            return checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
        return attend(q, k, v)
    if mask is None and 1 < T < S:      # a chunk behind earlier positions; is_causal=True would align its mask top-left, not here
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    causal = True if mask is None and T > 1 else False            # where T is a symbol, compiled, T > 1 is no bool
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


class KVCache:
    """Keys and values of the positions seen so far, (B, K, S, D) a layer, allocated once.

    It is an argument of `forward`, so the model holds no state and one model can serve many conversations. What the
    model asks of such an argument is three calls: where the new tokens stand, what they attend to, and that they are
    in: `positions`, `attend`, `advance`."""

    def __init__(self, config, batch_size, max_len, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.n_kv_heads, max_len, config.head_dim)
        # not empty: a masked position weighs 0, and 0 x NaN is NaN. A tensor a layer: a compiled step writes it in place
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)] for _ in "kv")
        self.max_len, self.length = max_len, 0                    # positions there are, and filled: the same in every layer

    def rows(self, start, stop, length):
        """Rows start to stop as a cache of its own, `length` positions filled, in the same memory."""
        view = copy(self)
        view.k, view.v, view.length = [k[start:stop] for k in self.k], [v[start:stop] for v in self.v], length
        return view

    def copy_rows(self, source, target, start, stop):
        """Copy positions start to stop of each of the rows `source`, a list, to that of `target`, one after the other."""
        for kv in (*self.k, *self.v):
            for a, b in zip(source, target):                      # slices: a list of rows would be brought to the device each time
                kv[b, :, start:stop] = kv[a, :, start:stop]

    def positions(self, T):
        """Positions (T,) of the next T tokens."""
        return torch.arange(self.length, self.length + T, device=self.k[0].device)

    def attend(self, layer, q, k, v):
        """Write k, v (B, K, T, D) behind the positions filled so far; attention of q (B, H, T, D) over all of them.
        Raises ValueError if they do not fit."""
        end = self.length + k.size(2)
        if end > self.max_len:
            raise ValueError(f"the KV cache holds {self.max_len} positions, {end} asked for; allocate prompt + max_new_tokens")
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return causal_attention(q, self.k[layer][:, :, :end], self.v[layer][:, :, :end])

    def advance(self, T):
        """T positions were written in every layer."""
        self.length += T


class RaggedStep:
    """One token more for each of the first B rows of a KVCache, row b standing at its own position at[b] of at (B,);
    none sees more than `span` positions."""

    def __init__(self, cache, at, span):
        self.cache, self.at, self.span = cache, at, span
        self.row = torch.arange(len(at), device=at.device)
        self.mask = (torch.arange(span, device=at.device) <= at[:, None])[:, None, None]   # (B, 1, 1, S)

    def positions(self, T):
        return self.at[:, None]

    def attend(self, layer, q, k, v):
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.row, :, self.at] = k[:, :, 0]
        values[self.row, :, self.at] = v[:, :, 0]
        B = len(self.at)
        return causal_attention(q, keys[:B, :, :self.span], values[:B, :, :self.span], self.mask)

    def advance(self, T):
        """The caller keeps the lengths."""


class Gathered(torch.autograd.Function):
    """Tokens of a stream x (N, ...) as rows (B S, ...), by `place`. The gradient is gathered too, where autograd's adds up
    one element at a time: a token's own is at `back`, the opening's first `shared` tokens sum theirs over the rows."""

    @staticmethod
    def forward(ctx, x, place, back, shared, real):
        ctx.save_for_backward(place, back)
        ctx.shared, ctx.real = shared, real
        return x.index_select(0, place.flatten())

    @staticmethod
    def backward(ctx, grad):
        place, back = ctx.saved_tensors
        dx = grad.index_select(0, back)
        dx[ctx.real:] = 0                                         # idle tokens
        if ctx.shared:
            dx[:ctx.shared] = grad.unflatten(0, place.shape)[:, :ctx.shared].sum(0)
        return dx, None, None, None, None


class Streamed(torch.autograd.Function):
    """The inverse: rows y (B S, ...) as the stream (N, ...), by `back`. What is not taken has no gradient."""

    @staticmethod
    def forward(ctx, y, back, real):
        ctx.save_for_backward(back)
        ctx.real, ctx.shape = real, y.shape
        return y.index_select(0, back)

    @staticmethod
    def backward(ctx, grad):
        back, = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, back[:ctx.real], grad[:ctx.real]), None, None


class PackedRows:
    """Training rows of unequal length, given to `forward` in the place of a KVCache: B rows end to end in one stream of
    N tokens, so that no product computes padding, behind an opening of `shared` tokens that all of them begin with.
    Causal attention makes the opening's activations equal in all rows: they are computed once, and autograd sums its
    gradient over the rows. For attention alone the rows are gathered into (B, S), each with the opening in front.

    lengths counts each row's tokens with the opening, and must be above `shared`."""

    def __init__(self, lengths, shared=0, device="cpu"):
        length = torch.tensor(lengths).unsqueeze(1)                                        # (B, 1)
        own = length - shared
        step = torch.arange(max(lengths))                                                  # (S,)
        place = torch.where(step < shared, step, own.cumsum(0) - own + step)               # (B, S), of the stream
        place = place.where(step < length, 0)                     # no real position attends to padding behind it
        first = (step >= shared) | (torch.arange(len(lengths)).unsqueeze(1) == 0)          # the opening: of row 0
        back = (first & (step < length)).flatten().nonzero().squeeze(1)                    # (N,), of the gathered rows
        fill = back.new_zeros(-len(back) % 8)                     # products of odd height are slow: up to 7 idle tokens
        self.back, self.shared, self.real = torch.cat((back, fill)).to(device), shared, len(back)
        self.place, self.step = place.to(device), (self.back % len(step))

    def positions(self, T):
        """Positions (T,) of the stream's tokens, each in its own row."""
        return self.step

    def attend(self, layer, q, k, v):
        """Attention of each row's q (1, H, N, D) over the same row's k, v (1, K, N, D)."""
        B, S = self.place.shape
        q, k, v = (Gathered.apply(x[0].transpose(0, 1), self.place, self.back, self.shared, self.real)
                   .unflatten(0, (B, S)).transpose(1, 2) for x in (q, k, v))               # (B, heads, S, D)
        y = causal_attention(q, k, v).transpose(1, 2).flatten(0, 1)                        # (B S, H, D)
        return Streamed.apply(y, self.back, self.real).transpose(0, 1).unsqueeze(0)        # (1, H, N, D)

    def advance(self, T):
        """Nothing follows a training row."""


class Attention(nn.Module):
    """Queries, keys and values of x, turned by RoPE, into `causal_attention`; H/K query heads share a key/value head."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x, rope, cache, layer):                     # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)            # (B, H, T, D)
        k = self.wk(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)         # (B, K, T, D)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)         # (B, K, T, D)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        y = causal_attention(q, k, v) if cache is None else cache.attend(layer, q, k, v)  # (B, H, T, D)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: W2 (silu(W1 x) * W3 x) (Shazeer 2020, eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x):                                         # (B, T, C) -> (B, T, C)
        return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, rope, cache, layer, keep=None):          # (B, T, C) -> (B, T, C), or (M, C) with keep (M,)
        x = x + self.attention(self.attention_norm(x), rope, cache, layer)
        if keep is not None:
            x = x.flatten(0, 1).index_select(0, keep)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    """The network. `compute_dtype` is the dtype of the activations: that of the embedding unless set."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.compute_dtype = None
        self.recomputed = 0               # so many blocks forget their activations and make them again for the gradient
        self.loss_scale = 2.0**16         # of fp16 training, halved when gradients overflow

    @property
    def dtype(self):
        return self.compute_dtype or self.tok_embeddings.weight.dtype

    @property
    def device(self):
        return self.tok_embeddings.weight.device

    def new_cache(self, batch_size, max_len):
        """An empty KVCache for batch_size rows of at most max_len positions, where and as this model computes."""
        return KVCache(self.config, batch_size, max_len, self.device, self.dtype)

    def hidden(self, ids, cache=None, keep=None):
        """The last layer's normed output (B, T, C) for ids (B, T): what the logits are made of. With a cache, ids
        follow the positions that it holds, and it is advanced by T. With keep (M,), indices into B T, only their outputs
        (M, C) are made: the other tokens end as keys and values of the last layer."""
        x = self.tok_embeddings(ids).to(self.dtype)                                        # (B, T, C)
        T = ids.size(1)
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T)
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        for layer, block in enumerate(self.layers):
            rest = rope, cache, layer, keep if layer == self.config.n_layers - 1 else None
            again = layer < self.recomputed and torch.is_grad_enabled()
            x = checkpoint(block, x, *rest, use_reentrant=False) if again else block(x, *rest)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V), float32. Callers who need few positions take `hidden` and `output`."""
        return self.output(self.hidden(ids, cache)).float()


@torch.no_grad()
def init_weights(model, seed):
    """Fresh weights for training from nothing: normal with std 0.02, the two projections that write into the
    residual stream scaled by 1/sqrt(2 L) so that its variance does not grow with depth (Radford et al. 2019, 2.3)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.fill_(1.0)
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            p.normal_(0.0, 0.02 / math.sqrt(2 * model.config.n_layers) if residual else 0.02, generator=generator)


def hf_name(name):
    """Hugging Face's name of our linear, norm or embedding: layers.3.attention.wq -> model.layers.3.self_attn.q_proj."""
    if name.startswith("layers."):
        _, layer, part = name.split(".", 2)
        return f"model.layers.{layer}.{HF_NAMES[part]}"
    return HF_NAMES[name]


def meta_to_hf_rows(matrix, n_heads):
    """Reorder the rows of a q or k matrix (heads * D, ...) from adjacent rotary pairs to Hugging Face's half-split."""
    return matrix.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def hf_to_meta_rows(matrix, n_heads, out=None):
    """The inverse of `meta_to_hf_rows`, written into out where that is given, in its dtype and on its device."""
    out = torch.empty_like(matrix) if out is None else out
    out.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).copy_(matrix.unflatten(0, (n_heads, 2, -1)))
    return out


def rotary_heads(name, config):
    """Heads of our q or k linear, whose rows the two rotary layouts order differently; None for any other name."""
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.removesuffix(".weight").rpartition(".")[2])


def open_weights(file):
    """{key: tensor} of a .safetensors, .pth or .bin file, mapped: nothing is read before a tensor is used, and nothing
    in a pickle is run. (Files of torch before 1.6 cannot be mapped and are read whole.) Raises ValueError in one line."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} not found")
    try:
        if ".safetensors" in file.name:
            with safe_open(str(file), framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}
        archive = zipfile.ZipFile(file).namelist()[0] if zipfile.is_zipfile(file) else ""
        if (made := re.match(r"consolidated\.\d+", archive)) and not file.name.startswith(made[0]):
            raise ValueError(f"{file} was written as {made[0]}.pth; the shards are swapped or misnamed")
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=bool(archive))
    except pickle.UnpicklingError as error:
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{file} is refused: loading it would run {called[1]}, and weights are only data") from None
        raise ValueError(f"{file} is damaged or no file of weights; copy or download it again") from None
    except Exception as error:                                    # a damaged file makes its reader raise nearly all there are
        reason = (str(error).splitlines() or ["it ends early"])[0].partition(". ")[0]
        raise ValueError(f"{file} is damaged or no file of weights ({reason}); copy or download it again") from None
    if not isinstance(weights, dict):
        raise ValueError(f"{file} holds a {type(weights).__name__}, wanted a dict of tensors")
    return {str(key): t.detach() if isinstance(t, torch.Tensor) else t for key, t in weights.items()}    # parameters, too


def weight_files(path):
    """The files that hold a folder's weights, as groups whose tensors join, and an index's {key: file name} or None:
    [[model.safetensors]], [[model-00001-of-00002.safetensors], [...]], or Meta's [[consolidated.00.pth, ...]]."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [[path / name]], None
        index = path / f"{name}.index.json"
        if index.is_file():
            names = read_json_file(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise ValueError(f"{index} has no weight_map of keys and files")
            for key, file in names.items():
                if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]*", file):  # by its letters: caches hold links
                    raise ValueError(f"{index} places {key} in {file!r}, which is no plain file name in this folder")
            return [[path / file] for file in sorted(set(names.values()))], names
    shards = sorted(path.glob("consolidated.*.pth"))
    for number, file in enumerate(shards):
        if file.name != f"consolidated.{number:02}.pth":
            raise ValueError(f"{path / f'consolidated.{number:02}.pth'} not found, but {file.name} is there")
    if not shards:
        raise ValueError(f"weights not found in {path}: no model.safetensors, pytorch_model.bin (or index.json of these) "
                         "and no consolidated.00.pth; --base_model wants the folder of a LLaMA")
    return [shards], None


def describe(file):
    """{key: (shape, dtype)} of a file of weights, without the rotary tables that old files hold."""
    def plain(t):
        return isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta
    return {key: (tuple(t.shape), t.dtype) if plain(t) else ((), getattr(t, "layout", type(t).__name__))
            for key, t in open_weights(file).items() if key != "rope.freqs" and not key.endswith("rotary_emb.inv_freq")}


def join_axis(name, shape, config):
    """The axis on which Meta's model-parallel shards of this shape join, None if each holds the whole: fairscale splits
    the outputs of wq wk wv w1 w3 output, the inputs of wo w2, and the embedding's width (LLaMA-3: its rows)."""
    if "norm" in name:
        return None
    if name == "tok_embeddings.weight":
        return int(shape[-1:] != (config.dim,))
    return int(name.endswith(("wo.weight", "w2.weight")))


def open_checkpoint(path, mixed=False):
    """Look into a folder, Meta's, Hugging Face's or ours by what it holds, without reading a tensor. Returns (config,
    dtype, [(files, {key: our name}), ...]) where the tensors of one group's files join. Raises ValueError naming file and
    key: missing, surplus, misshaped, not floating-point, or (unless mixed) of another dtype than the rest."""
    path = Path(path)
    files, index = weight_files(path)
    groups = [[(file, describe(file)) for file in group] for group in files]
    theirs = any(key.startswith(("model.", "lm_head.")) for key in groups[0][0][1])
    config = LLaMAConfig.from_hf(path / "config.json") if theirs else LLaMAConfig.from_params(
        path / "params.json", sum(keys["output.weight"][0][0] for _, keys in groups[0] if "output.weight" in keys))
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LLaMA(config).state_dict().items()}
    ours = {hf_name(name.removesuffix(".weight")) + ".weight" if theirs else name: name for name in shapes}
    dtype, placed = None, {}
    for group in groups:
        for file, keys in group:
            if odd := sorted(group[0][1].keys() ^ keys.keys()):
                raise ValueError(f"{file} and {group[0][0].name} do not hold the same keys, for instance {odd[0]}")
            for key, (shape, kind) in keys.items():
                if key not in ours:
                    raise ValueError(f"{file} has {key}, which this model does not have")
                if kind not in DTYPES.values():
                    raise ValueError(f"{file}: {key} is {kind}, wanted a tensor of {' '.join(DTYPES)}")
                dtype = dtype or kind
                if kind != dtype and not mixed:
                    raise ValueError(f"{file}: {key} is {kind}, the tensors before it {dtype}; if that is meant, "
                                     "python model.py convert --dtype makes them one")
                wanted, axis = list(shapes[ours[key]]), join_axis(ours[key], shape, config)
                if axis is not None:
                    wanted[axis] /= len(group)
                if list(shape) != wanted:
                    shards = f" in {len(group)} shards; is one missing?" if file.suffix == ".pth" else ""
                    raise ValueError(f"{file}: {key} is {shape}, {'config' if theirs else 'params'}.json makes it "
                                     f"{shapes[ours[key]]}{shards}")
                if index is not None and index.get(key) != file.name:
                    raise ValueError(f"{file} has {key}, which the index places in {index.get(key)}")
                placed[key] = file
    missing = [key for key in [*ours, *(index or ())] if key not in placed and not key.endswith("rotary_emb.inv_freq")
               and not (config.tie_embeddings and ours.get(key) == "output.weight")]
    if missing:
        where = path / (index or {}).get(missing[0], "") if len(groups) > 1 else groups[0][0][0]
        raise ValueError(f"{where} lacks {missing[0]} ({len(missing)} tensors missing)")
    return config, dtype, [(paths, {key: ours[key] for key in group[0][1]}) for paths, group in zip(files, groups)]


def read_checkpoint(checkpoint, device="cpu", dtype=None):
    """Yield (our name, tensor in our layout, on device, cast to dtype unless None) of what `open_checkpoint` found. Raises
    ValueError for NaN, infinity and what dtype cannot hold.

    A tensor that can be used as it lies is a view of the mapped file. Joined shards and Hugging Face's q and k, whose rows
    are put into Meta's order, are written where they will stay, with no copy between. Files are mapped anew when a quarter
    of a file's size was read, and for each q and k, so that the pages of what was copied do not stay in memory."""
    config, _, groups = checkpoint
    tied = {}
    for files, keys in groups:
        maps, used = [open_weights(file) for file in files], 0
        mapped = all(".safetensors" in file.name or zipfile.is_zipfile(file) for file in files)
        for key, name in keys.items():
            heads = rotary_heads(name, config) if key != name else None
            parts = [weights[key] for weights in ([open_weights(files[0])] if heads and mapped else maps)]
            axis = join_axis(name, parts[0].shape, config)
            if axis is None and not all(torch.equal(parts[0], part) for part in parts[1:]):
                raise ValueError(f"{files[0]} and the shards beside it differ in {key}, which they share; they belong to "
                                 "different models")
            most = torch.finfo(dtype or parts[0].dtype).max
            if not all(-most <= end <= most for part in parts for end in part.aminmax()):
                raise ValueError(f"{files[0]}: {key} holds NaN, infinity or more than {most:g}, the most that {dtype or parts[0].dtype} "
                                 "holds; take another dtype, or copy or download it again")
            if heads or len(parts) > 1:
                shape = [n * len(parts) if i == axis else n for i, n in enumerate(parts[0].shape)]
                tensor = torch.empty(shape, device=device, dtype=dtype or parts[0].dtype)
                for place, part in zip([tensor] if axis is None else tensor.chunk(len(parts), axis), parts):
                    hf_to_meta_rows(part, heads, place) if heads else place.copy_(part)
            else:
                tensor = parts[0].to(device, dtype)
            used += sum(part.nbytes for part in parts)
            if used > max(2**24, files[0].stat().st_size // 4) and mapped:
                maps = parts = part = None
                gc.collect()                                      # torch.load leaves its map in a reference cycle
                maps, used = [open_weights(file) for file in files], 0
            if config.tie_embeddings and name in ("tok_embeddings.weight", "output.weight"):
                tied[name] = tensor
            if not config.tie_embeddings or name != "output.weight":
                yield name, tensor
    if len(tied) == 2 and not torch.equal(*tied.values()):
        raise ValueError(f"{groups[0][0][0].parent} says that output and embedding are tied, but holds two different ones")


def load_model(path, device="cpu", dtype=None):
    """Build the LLaMA of a folder (see `open_checkpoint`) on `meta` and assign it the weights, one tensor at a time, cast
    to dtype (None: as stored). Raises ValueError naming the file and the first bad key."""
    checkpoint = open_checkpoint(path)
    config, stored, _ = checkpoint
    with torch.device("meta"):
        model = LLaMA(config)
    state = dict(read_checkpoint(checkpoint, device, dtype or stored))
    if config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight         # one parameter again, as LLaMA makes it
    return model.requires_grad_(False).eval()


def find_base(name):
    """The folder of a base: name itself, or the snapshot of the hub's owner/name in Hugging Face's cache (HF_HUB_CACHE,
    HF_HOME). Nothing is downloaded. Raises ValueError if there is neither."""
    if Path(name).is_dir():
        return Path(name)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    repo = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{str(name).replace('/', '--')}"
    if (ref := repo / "refs" / "main").is_file() and (folder := repo / "snapshots" / ref.read_text().strip()).is_dir():
        return folder
    raise ValueError(f"base {str(name)!r} is neither a folder nor in Hugging Face's cache ({repo.parent}), and nothing is "
                     "downloaded here; download it and give its folder with --base_model")


def find_tokenizer(path):
    """tokenizer.model of a base: in its folder, or one level up as in Meta's download. Where neither is: the first."""
    path = Path(path).resolve()
    above = path.parent / "tokenizer.model"
    return above if not (path / "tokenizer.model").is_file() and above.is_file() else path / "tokenizer.model"


def sync(path):
    """Bring a file, or a folder's list of names, from the system's memory to the disk."""
    if os.name == "posix" or Path(path).is_file():                # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path, write):
    """Call write(temporary path), bring it to the disk and rename it to path, so that a reader, a crash or a power cut
    never meets half a file. Raises OSError if it cannot be written."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(Path(path).parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"))


def processes():
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def whole(tensor):
    """A tensor, gathered if it is cut over the processes (a DTensor), which must all ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_safetensors(path, layout, tensors):
    """Stream (name, tensor) pairs, in any order, into one safetensors file, {name: (shape, dtype)} being known before:
    one tensor is in memory at a time, where the library's save_file wants all."""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)                        # mapped tensors then start where vector loads like it
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            tensor = tensor.detach().to("cpu", layout[name][1]).contiguous()
            file.write(tensor.view(torch.uint8).numpy())          # as bytes, since NumPy has no bf16


def save_tensors(config, tensors, path, dtype):
    """Write (name, tensor) pairs, all of this shape and in any order, as our folder: params.json and model.safetensors."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        layout = {name: (tuple(p.shape), dtype) for name, p in LLaMA(config).named_parameters()}   # a tied one once
    write_atomically(path / "model.safetensors", lambda p: write_safetensors(p, layout, tensors))
    write_json(path / "params.json", config.params())


def save_model(model, path, dtype=None):
    """Write params.json and model.safetensors (cast to dtype, None: that of the embedding) into the folder path. All
    processes call it, since a sharded model is gathered tensor by tensor; the first writes."""
    tensors = ((name, whole(p)) for name, p in model.named_parameters())
    if processes()[0]:
        return sum(0 for _ in tensors)
    save_tensors(model.config, tensors, path, dtype or model.tok_embeddings.weight.dtype)


@contextmanager
def new_folder(path):
    """A folder to write into that gets its name when all is written; after an error nothing is there. Raises ValueError if
    path holds something already."""
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; name a new folder")
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_tokenizer(base, path):
    """Copy a base's tokenizer.model, and the added_tokens.json beside it if there is one, into the folder path."""
    for file in (find_tokenizer(base), Path(base) / "added_tokens.json"):
        if file.is_file():
            shutil.copyfile(file, Path(path) / file.name)


def convert(source, path, dtype=None):
    """Write a checkpoint of any layout as ours into a new folder, one tensor in memory at a time; return its config. With a
    dtype, mixed ones are accepted and cast. Raises ValueError as `open_checkpoint` and `new_folder` do."""
    checkpoint = open_checkpoint(source, mixed=dtype is not None)
    with new_folder(path) as folder:
        save_tensors(checkpoint[0], read_checkpoint(checkpoint, dtype=dtype), folder, dtype or checkpoint[1])
        copy_tokenizer(source, folder)
    return checkpoint[0]


def describe_model(path):
    """The lines of `model.py info`, among them a fingerprint that is the same for the same weights in any layout: SHA-256
    over name, dtype, shape and SHA-256 of each tensor in our layout, sorted by name."""
    checkpoint = open_checkpoint(path)
    config, dtype, _ = checkpoint
    sums, shapes, size = {}, {}, dtype.itemsize
    for name, tensor in read_checkpoint(checkpoint):
        digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        sums[name] = f"{name} {dtype} {tuple(tensor.shape)} {digest}"
        shapes.setdefault(re.sub(r"\d+", "*", name, count=1) if "layers" in name else name, []).append(tuple(tensor.shape))
    n = sum(math.prod(shape) for rows in shapes.values() for shape in rows)
    if config.tie_embeddings:                                     # as a layout that writes it twice has it
        sums["output.weight"] = sums["tok_embeddings.weight"].replace("tok_embeddings", "output")
    L, C, q, kv = config.n_layers, config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    cache, adapter, gib = 2 * L * kv * size, L * 8 * (2 * C + q + kv), 2**30
    return [*(f"{name:32} {str(rows[0]):16} x {len(rows)}" for name, rows in shapes.items()),
            f"{n:,} parameters in {dtype}, {n * size / gib:.2f} GiB",
            f"inference: {n * size / gib:.2f} GiB and {cache / 2**20:.3f} MiB a position for keys and values; "
            f"{(n * size + cache * 2048) / gib:.2f} GiB with 2,048 positions",
            f"LoRA training, r 8 on q_proj v_proj: {(n * size + 16 * adapter) / gib:.2f} GiB and a micro-batch's activations "
            f"({adapter:,} parameters of 16 bytes: float32, gradient, AdamW's two moments)",
            f"fingerprint {hashlib.sha256(chr(10).join(sorted(sums.values())).encode()).hexdigest()}"]


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and options that may be spelt --like_this or --like-this."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        names = [a.partition("=") if a.startswith("--") else (a, "", "") for a in args]
        return super().parse_args(["--" + a[2:].replace("-", "_") + eq + value if a.startswith("--") else a
                                   for a, eq, value in names], namespace)

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists the options\n")


def out_of_memory(error):
    """The first line of torch's or Python's error of memory that ran out; "" for any other error."""
    text = (str(error).splitlines() or ["out of memory"])[0]
    found = isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", text)
    return text if found or isinstance(error, MemoryError) else ""


def run(main):
    """Run a script's main(): what the user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        print(f"error: {out_of_memory(error) or ' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = Parser(description="Weights of a LLaMA in Meta's, Hugging Face's or our layout: convert, look into, make anew.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    command = commands.add_parser("convert", help="write any layout as one mapped model.safetensors")
    command.add_argument("source", help="folder of the weights")
    command.add_argument("output_dir", help="new folder for params.json, model.safetensors and tokenizer.model")
    command.add_argument("--dtype", choices=DTYPES, help="cast to it (default: as stored)")
    command = commands.add_parser("info", help="shapes, parameters, memory, and a fingerprint by which two people compare")
    command.add_argument("source", help="folder of the weights")
    command = commands.add_parser("init", help="fresh weights in the shape of a params.json, for `train.py --full`")
    command.add_argument("params", help="Meta's params.json")
    command.add_argument("output_dir", help="new folder for params.json and model.safetensors")
    command.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    if args.command == "convert":
        config = convert(args.source, args.output_dir, DTYPES.get(args.dtype))
        copied = (Path(args.output_dir) / "tokenizer.model").is_file()
        print(f"{args.output_dir}: {config.n_layers} layers of {config.dim}, {config.vocab_size:,} pieces"
              + ("" if copied else "; no tokenizer.model was found to go with them"))
    elif args.command == "info":
        print("\n".join(describe_model(args.source)))
    else:
        model = LLaMA(LLaMAConfig.from_params(args.params))
        init_weights(model, args.seed)
        with new_folder(args.output_dir) as folder:
            save_model(model, folder)
        n = sum(p.numel() for p in model.parameters())
        print(f"{args.output_dir}: {n:,} weights, {n * 4 / 2**20:.1f} MiB as float32")


if __name__ == "__main__":
    run(main)
