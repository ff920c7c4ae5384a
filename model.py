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
  logits               float32
"""
import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LLaMAConfig:
    """The shape of a model, read from Meta's params.json. Raises ValueError for a shape that cannot be built."""
    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    norm_eps: float                           # 1e-6 in LLaMA-1, 1e-5 in LLaMA-2: always read, never assumed
    n_kv_heads: int | None = None             # None: one per query head (LLaMA-1)
    multiple_of: int = 256                    # ffn_dim is rounded up to a multiple of it
    ffn_dim_multiplier: float | None = None   # LLaMA-2 70B: 1.3
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, wanted a whole number above 0")
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise ValueError(f"{name} is {value!r}, wanted a number above 0")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} over n_heads {self.n_heads} is no even head width (RoPE turns pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def ffn_dim(self):
        """Two thirds of 4 C, so that SwiGLU's three matrices weigh as much as the usual two (Shazeer 2020)."""
        width = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @classmethod
    def from_params(cls, path):
        """Read Meta's params.json. Raises ValueError naming the file and the key that is missing or unknown."""
        try:
            params = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} not found; --base_model wants a folder with params.json, model.safetensors "
                             "and tokenizer.model") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(params, dict):
            raise ValueError(f"{path} holds a {type(params).__name__}, wanted an object with dim, n_layers, ...")
        if unknown := sorted(params.keys() - cls.__dataclass_fields__.keys()):
            raise ValueError(f"{path} has unknown keys {', '.join(unknown)}; this model would ignore them")
        try:
            return cls(**params)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {str(error).replace('LLaMAConfig.__init__() ', '')}") from None


class Linear(nn.Linear):
    """y = W x, W (O, I), no bias. W is cast to the dtype of x, so float32 weights can train under bf16 activations."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):                                         # (..., I) -> (..., O)
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """y = g * x / sqrt(mean(x^2) + eps), in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):                                         # (..., C) -> (..., C)
        y = F.rms_norm(x.float(), (x.size(-1),), self.weight.float(), self.eps)
        return y.to(x.dtype)


def rope_table(positions, head_dim, theta):
    """Cosines and sines, float32, of position m times theta^(-2i/D) (Su et al. 2021, eq. 15), for positions (T,) shared
    by all rows or (B, T): (T, D/2) or (B, 1, T, D/2) each, so that they broadcast over (B, heads, T, D/2).

    Made in each forward rather than kept: a buffer built on `meta` stays empty, and one cast to bf16 is off by up
    to 2.0 in the cosine at high positions."""
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float().unsqueeze(-1) * theta ** (-pair / head_dim)                  # (..., T, D/2)
    if positions.dim() == 2:
        angle = angle.unsqueeze(1)
    return angle.cos(), angle.sin()


def apply_rope(x, rope):
    """Turn each adjacent pair (x[2i], x[2i+1]) of x (B, heads, T, D) by its angle (Su et al. 2021, eq. 34).

    Adjacent pairs are Meta's layout. Hugging Face pairs i with i + D/2 and permutes the rows of wq and wk to suit."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)                               # (B, heads, T, D/2) each
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D) + causal mask) v: q (B, H, T, D) are the last T of the S positions of k, v (B, K, S, D),
    K dividing H (Ainslie et al. 2023). Returns (B, H, T, D)."""
    T, S = q.size(2), k.size(2)
    mask = None
    if 1 < T < S:          # a chunk behind earlier positions; is_causal=True would align its mask top-left, not here
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < T == S, enable_gqa=q.size(1) != k.size(1))


class KVCache:
    """Keys and values of the positions seen so far, (L, B, K, S, D) each, allocated once.

    It is an argument of `forward`, so the model holds no state and one model can serve many conversations. What the
    model asks of such an argument is three calls: where the new tokens stand, what they attend to, and that they are
    in: `positions`, `attend`, `advance`."""

    def __init__(self, config, batch_size, max_len, device="cpu", dtype=torch.float32):
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0                                           # positions filled, the same in every layer

    def positions(self, T):
        """Positions (T,) of the next T tokens."""
        return torch.arange(self.length, self.length + T, device=self.k.device)

    def attend(self, layer, q, k, v):
        """Write k, v (B, K, T, D) behind the positions filled so far; attention of q (B, H, T, D) over all of them.
        Raises ValueError if they do not fit."""
        end = self.length + k.size(2)
        if end > self.k.size(3):
            raise ValueError(f"the KV cache holds {self.k.size(3)} positions, {end} asked for; "
                             "allocate prompt + max_new_tokens")
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return causal_attention(q, self.k[layer, :, :, :end], self.v[layer, :, :, :end])

    def advance(self, T):
        """T positions were written in every layer."""
        self.length += T


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
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, rope, cache, layer):                     # (B, T, C) -> (B, T, C)
        x = x + self.attention(self.attention_norm(x), rope, cache, layer)
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
        self.compute_dtype = None

    @property
    def dtype(self):
        return self.compute_dtype or self.tok_embeddings.weight.dtype

    @property
    def device(self):
        return self.tok_embeddings.weight.device

    def new_cache(self, batch_size, max_len):
        """An empty KVCache for batch_size rows of at most max_len positions, where and as this model computes."""
        return KVCache(self.config, batch_size, max_len, self.device, self.dtype)

    def hidden(self, ids, cache=None):
        """The last layer's normed output (B, T, C) for ids (B, T): what the logits are made of. With a cache, ids
        follow the positions that it holds, and it is advanced by T."""
        x = self.tok_embeddings(ids).to(self.dtype)                                        # (B, T, C)
        T = ids.size(1)
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions(T)
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        for layer, block in enumerate(self.layers):
            x = block(x, rope, cache, layer)
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


def read_safetensors(path, device="cpu"):
    """Yield (name, tensor) from a safetensors file, mapped, one at a time. Raises ValueError for a damaged file."""
    if not Path(path).is_file():
        raise ValueError(f"{path} not found")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy or download it again") from None


def load_model(path, device="cpu", dtype=None):
    """Build the LLaMA of a folder (params.json, model.safetensors) on `meta` and assign it the mapped weights, one
    tensor at a time, cast to dtype (None: as stored). Raises ValueError naming the file and the first bad key."""
    path = Path(path)
    config = LLaMAConfig.from_params(path / "params.json")
    with torch.device("meta"):
        model = LLaMA(config)
    file = path / "model.safetensors"
    wanted, state = model.state_dict(), {}
    for name, tensor in read_safetensors(file, device):
        if name not in wanted:
            raise ValueError(f"{file} has {name}, which this model does not have")
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{file}: {name} is {tuple(tensor.shape)}, params.json makes it {tuple(wanted[name].shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} is {tensor.dtype}, wanted a floating-point tensor")
        state[name] = tensor if dtype is None else tensor.to(dtype)
    if missing := [name for name in wanted if name not in state]:
        raise ValueError(f"{file} lacks {missing[0]} ({len(missing)} tensors missing)")
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def write_atomically(path, write):
    """Call write(temporary path) and rename the result to path, so that a reader or a crash never meets half a file."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda p: p.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"))


def save_model(model, path, dtype=None):
    """Write params.json and model.safetensors (cast to dtype, None: as they are) into the folder path."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to(dtype or t.dtype).contiguous() for name, t in model.state_dict().items()}
    write_atomically(path / "model.safetensors", lambda p: save_file(state, p, metadata={"format": "pt"}))
    write_json(path / "params.json", {k: v for k, v in asdict(model.config).items() if v is not None})


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


def run(main):
    """Run a script's main(): what the user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = Parser(description="Write a LLaMA with fresh weights, to be trained by `train.py --full`.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    init = commands.add_parser("init", help="fresh weights in the shape of a params.json")
    init.add_argument("params", help="Meta's params.json")
    init.add_argument("output_dir", help="folder to write params.json and model.safetensors into")
    init.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    model = LLaMA(LLaMAConfig.from_params(args.params))
    init_weights(model, args.seed)
    save_model(model, args.output_dir)
    n = sum(p.numel() for p in model.parameters())
    print(f"{args.output_dir}: {n:,} weights, {n * 2 / 2**20:.1f} MiB as bf16")


if __name__ == "__main__":
    run(main)
