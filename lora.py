"""LoRA (Hu et al. 2021): a frozen linear W0 gains a trained update of rank r, h = W0 x + (alpha / r) B A x.

The base is loaded first and knows nothing of LoRA; `add_lora` wraps the linears it is told to. Adapters are kept in
PEFT's folder format, so that peft, vLLM and llama.cpp's converter read them:

  adapter_config.json         r, lora_alpha, lora_dropout, target_modules, base_model_name_or_path
  adapter_model.safetensors   base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight (r, I), lora_B (O, r), ...
  run.json                    ours: what it was trained on, with which prompt template and settings

PEFT's names are Hugging Face's, whose rotary layout differs from Meta's: the rows of lora_B of q_proj and k_proj are
permuted on the way out and back on the way in. Nothing fails if that is forgotten; the answers are just worse.
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from model import (DTYPES, Linear, Parser, find_tokenizer, hf_name, hf_to_meta_rows, load_model, meta_to_hf_rows, open_weights,
                   read_json_file, rotary_heads, run, save_model, write_atomically, write_json)

HF_TO_META = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
              "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
META_TO_HF = {meta: hf for hf, meta in HF_TO_META.items()}


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how strongly. targets: Hugging Face's names, Meta's, or "all" (the seven linears of a block).
    Raises ValueError for a value that makes no adapter."""
    r: int = 8
    alpha: float = 16
    dropout: float = 0.05                                         # on the adapter's input only, while training
    targets: tuple = ("q_proj", "v_proj")

    def __post_init__(self):
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        names = tuple(META_TO_HF) if "all" in targets else tuple(HF_TO_META.get(t, t) for t in targets)
        if unknown := [t for t in names if t not in META_TO_HF]:
            raise ValueError(f"LoRA target {unknown[0]!r} unknown; choose from {' '.join(HF_TO_META)} or all")
        if not names:
            raise ValueError("no LoRA target given; name at least one, such as q_proj v_proj")
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"LoRA rank r is {self.r!r}, wanted a whole number above 0")
        if not self.alpha > 0:
            raise ValueError(f"lora_alpha is {self.alpha!r}, wanted a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout is {self.dropout!r}, wanted 0 <= dropout < 1")
        object.__setattr__(self, "targets", tuple(dict.fromkeys(names)))


class FrozenProduct(torch.autograd.Function):
    """y = W x (..., I) -> (..., O), W = matrix(dtype, *store) made from its quantised store, and made again for the
    gradient of x: autograd keeps the store, never W. The store has no gradient."""

    @staticmethod
    def forward(ctx, x, matrix, *store):
        ctx.matrix = matrix
        ctx.save_for_backward(*store)
        return F.linear(x, matrix(x.dtype, *store))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.matrix(grad.dtype, *ctx.saved_tensors), None, *(None for _ in ctx.saved_tensors)


def int8_matrix(dtype, codes, scale):
    """W (O, I) = scale * codes, rounded once to dtype."""
    return codes.to(dtype).mul_(scale.to(dtype)[:, None])


class Int8Linear(Linear):
    """W (O, I) as int8 with one scale a row: scale = max |row| / 127 in bf16, codes = round(row / scale) in -127..127,
    so each weight is off by at most half a scale."""

    def __init__(self, weight):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        scale = (weight.abs().amax(1).float() / 127).clamp_min(1e-30).bfloat16()
        self.weight = nn.Parameter((weight / scale.float()[:, None]).round_().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):                                         # (..., I) -> (..., O)
        if x.is_cpu and x.dtype == torch.bfloat16 and x.numel() <= 8 * self.in_features and not x.requires_grad:
            rows = x.reshape(-1, self.in_features)                # a few rows: reading W decides, so it is read as int8
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return FrozenProduct.apply(x, int8_matrix, self.weight, self.scale)


# The 16 values of NF4 (Dettmers et al. 2023, QLoRA, appendix E): quantiles of a normal distribution, zero among them
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def dynamic_map():
    """The 256 values of the dynamic 8-bit type (Dettmers 2016; Dettmers et al. 2022), float32, ascending: 0, 1 and, for
    each decade 10^-6 .. 1, twice as many fractions as for the one below it, of both signs."""
    parts = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        parts += [means, -means]
    return torch.cat(parts).sort().values


def nearest(values, table, block):
    """(codes uint8, absmax float32) of flat float32 values: each block over its absmax, the nearest entry of an
    ascending table, the lower one in the middle. The last block may be short."""
    blocks = F.pad(values, (0, -values.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp_min(1e-38))[:, None]
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.flatten()[:values.numel()], absmax


def nf4_matrix(dtype, codes, absmax, scale, offset, pairs, levels):
    """W (O, I): absmax = levels[its code] * scale + offset, one for 64 weights; W = NF4[code] * absmax in float32,
    rounded once to dtype. A byte of codes is looked up as the pair of values that it holds."""
    absmax = F.embedding(absmax.int(), levels) * scale.repeat_interleave(256)[:len(absmax), None] + offset
    return F.embedding(codes.int(), pairs).view(-1, 64).mul_(absmax).to(dtype).view(len(codes), -1)


class NF4Linear(Linear):
    """W (O, I) in 4.13 bits a weight (QLoRA, section 3, as bitsandbytes stores it): blocks of 64 weights share an absmax,
    two codes of NF4 a byte, the first in its upper half; the absmaxes, less their mean, are 8-bit codes themselves, in
    blocks of 256 (double quantisation). Raises ValueError if 64 does not divide O I."""

    def __init__(self, weight):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        if weight.numel() % 64:
            raise ValueError(f"a weight of {tuple(weight.shape)} is no multiple of NF4's blocks of 64; use int8")
        table, levels = (t.to(weight.device) for t in (torch.tensor(NF4), dynamic_map()))
        codes, absmax = nearest(weight.float().flatten(), table, 64)
        offset = absmax.mean()
        small, scale = nearest(absmax - offset, levels, 256)
        packed = (codes[::2] << 4 | codes[1::2]).view(self.out_features, -1)               # (O, I / 2)
        for name, value in (("weight", packed), ("absmax", small), ("scale", scale), ("offset", offset.view(1))):
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        self.register_buffer("pairs", torch.cartesian_prod(table, table), persistent=False)
        self.register_buffer("levels", levels[:, None], persistent=False)

    def forward(self, x):                                         # (..., I) -> (..., O)
        return FrozenProduct.apply(x, nf4_matrix, self.weight, self.absmax, self.scale, self.offset, self.pairs, self.levels)


QUANTISED = {"int8": Int8Linear, "nf4": NF4Linear}


@torch.no_grad()
def quantize(model, kind, device=None, dtype=None):
    """Replace the seven linears of every block by Int8Linear or NF4Linear (kind "int8", "nf4"), one weight at a time on
    device, then move the other weights there, cast to dtype: the device never holds more than the quantised model and
    one float32 weight. Raises ValueError for another kind or a model that has an adapter."""
    if kind not in QUANTISED:
        raise ValueError(f"base_dtype {kind!r} unknown; choose from {' '.join([*DTYPES, *QUANTISED])}")
    if lora_linears(model):
        raise ValueError("the model has an adapter; quantise the base before it is wrapped")
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for leaf, linear in list(part.named_children()):
                setattr(part, leaf, QUANTISED[kind](linear.weight.to(device)))
    for module in model.modules():
        if not isinstance(module, tuple(QUANTISED.values())):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(device, dtype)
    return model


class LoRALinear(nn.Module):
    """h = W0 x + (alpha / r) B A x (Hu et al. 2021, eq. 3). W0 (O, I) is frozen, as the base stores it; A (r, I) and
    B (O, r) are trained, float32, and cast to the activations' dtype at use. B starts at zero, so h starts at W0 x."""

    def __init__(self, base, config):
        super().__init__()
        n_out, n_in = base.out_features, base.in_features
        device = base.weight.device
        self.base, self.scale, self.dropout = base, config.alpha / config.r, config.dropout
        self.lora_a = nn.Parameter(torch.empty(config.r, n_in, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(n_out, config.r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=5 ** 0.5)         # uniform in +-1/sqrt(I), as in loralib and PEFT

    def delta(self):
        """The update (alpha / r) B A as one matrix (O, I), float32."""
        return self.scale * (self.lora_b @ self.lora_a)

    def forward(self, x):                                         # (..., I) -> (..., O)
        h = F.dropout(x, self.dropout, self.training)
        h = F.linear(h, self.lora_a.to(x.dtype))                                           # (..., r)
        return self.base(x) + F.linear(h, self.lora_b.to(x.dtype)) * self.scale


def lora_linears(model):
    """(name, LoRALinear) for each wrapped linear, in the order of the layers."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def add_lora(model, config):
    """Freeze the model and wrap the target linears of every block; return how many. Raises ValueError if it has an
    adapter already. Only lora_a and lora_b are trainable afterwards."""
    if lora_linears(model):
        raise ValueError("the model has an adapter already; merge it or load the base again")
    model.requires_grad_(False)
    model.lora_config = config
    names = [name for name, module in model.layers.named_modules()
             if isinstance(module, Linear) and name.rpartition(".")[2] in config.targets]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parent = model.layers.get_submodule(parent)
        setattr(parent, leaf, LoRALinear(getattr(parent, leaf), config))
    return len(names)


@torch.no_grad()
def merge(model):
    """Fold each update into its weight, W = W0 + (alpha / r) B A, summed in float32 and stored in the weight's dtype;
    the wrappers go. Return {name: relative error of the stored update, ||stored - exact|| / ||exact||}: 0.06 is
    usual in bf16, 0.5 means that bf16 rounds half of the update away and the adapter is better kept apart. Raises
    ValueError without an adapter, or on a quantised base, whose steps are coarser than most updates."""
    errors = {}
    for name, module in lora_linears(model):
        if isinstance(module.base, tuple(QUANTISED.values())):
            raise ValueError("a quantised base would round the adapter away; use it unmerged, or merge it into the base as "
                             "it was before (--base_dtype bf16)")
        weight, delta = module.base.weight, module.delta()
        merged = (weight.float() + delta).to(weight.dtype)
        stored = merged.float() - weight.float()
        errors[name] = ((stored - delta).norm() / delta.norm().clamp_min(1e-30)).item()
        module.base.weight = nn.Parameter(merged, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.base)
    if not errors:
        raise ValueError("the model has no adapter to merge")
    return errors


def peft_names(model):
    """[(our LoRALinear, PEFT's key prefix, heads whose lora_B rows are permuted or None)]."""
    return [(module, f"base_model.model.{hf_name(name)}", rotary_heads(name, model.config))
            for name, module in lora_linears(model)]


def save_adapter(model, path, base_model="", run_info=None):
    """Write the adapter into the folder path as PEFT's two files and run.json, each file replaced atomically."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = {}
    for module, prefix, heads in peft_names(model):
        a, b = module.lora_a.detach().cpu(), module.lora_b.detach().cpu()
        state[f"{prefix}.lora_A.weight"] = a.contiguous()
        state[f"{prefix}.lora_B.weight"] = b.contiguous() if heads is None else meta_to_hf_rows(b, heads)
    config = model.lora_config
    write_atomically(path / "adapter_model.safetensors", lambda p: save_file(state, p, metadata={"format": "pt"}))
    write_json(path / "run.json", run_info or {})
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model), "r": config.r,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none", "fan_in_fan_out": False,
        "target_modules": [META_TO_HF[t] for t in config.targets], "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None, "use_rslora": False, "use_dora": False})


def load_adapter(model, path):
    """Wrap the linears that the folder's adapter_config.json names and load its tensors, strictly. Return run.json
    (empty if there is none). Raises ValueError for a missing, surplus or misshaped tensor or an unsupported feature."""
    path = Path(path)
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file} not found; train an adapter first (python train.py) or give --lora_weights its folder")
    settings = read_json_file(path / "adapter_config.json")
    if missing := [k for k in ("r", "lora_alpha", "target_modules") if settings.get(k) is None]:
        raise ValueError(f"{path / 'adapter_config.json'} lacks {missing[0]}")
    for feature, plain in (("use_dora", False), ("use_rslora", False), ("bias", "none"), ("modules_to_save", None),
                           ("rank_pattern", {}), ("alpha_pattern", {}), ("fan_in_fan_out", False)):
        if (settings.get(feature) or plain) != plain:
            raise ValueError(f"{path / 'adapter_config.json'} sets {feature} to {settings[feature]!r}, "
                             "which this LoRA does not have")
    state = open_weights(file)
    add_lora(model, LoRAConfig(settings["r"], settings["lora_alpha"], settings.get("lora_dropout") or 0.0,
                               tuple([settings["target_modules"]] if isinstance(settings["target_modules"], str)
                                     else settings["target_modules"])))
    for module, prefix, heads in peft_names(model):
        for key, parameter in ((f"{prefix}.lora_A.weight", module.lora_a), (f"{prefix}.lora_B.weight", module.lora_b)):
            if key not in state:
                raise ValueError(f"{file} lacks {key}")
            tensor = state.pop(key).float()
            if tensor.shape != parameter.shape:
                raise ValueError(f"{file}: {key} is {tuple(tensor.shape)}, this model wants {tuple(parameter.shape)}; "
                                 "the adapter belongs to another base")
            permute = heads is not None and parameter is module.lora_b
            parameter.data.copy_(hf_to_meta_rows(tensor, heads) if permute else tensor)
    if state:
        raise ValueError(f"{file} has {next(iter(state))}, which fits nowhere in this model")
    model.requires_grad_(False)
    return read_json_file(path / "run.json") if (path / "run.json").is_file() else {}


def main():
    parser = Parser(description="Fold an adapter into its base and write the result as a base of its own.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    command = commands.add_parser("merge", help="write base + adapter as one model")
    command.add_argument("--base_model", required=True, help="folder of the base")
    command.add_argument("--lora_weights", required=True, help="folder of the adapter")
    command.add_argument("--output_dir", required=True, help="folder to write")
    args = parser.parse_args()
    model = load_model(args.base_model)
    load_adapter(model, args.lora_weights)
    errors = merge(model)
    save_model(model, args.output_dir)
    shutil.copyfile(find_tokenizer(args.base_model), Path(args.output_dir) / "tokenizer.model")
    worst = max(errors, key=errors.get)
    print(f"merged {len(errors)} linears into {args.output_dir}; stored as {model.dtype}, the updates lose "
          f"{sum(errors.values()) / len(errors):.1%} on average, {errors[worst]:.1%} at most ({worst})")


if __name__ == "__main__":
    run(main)
