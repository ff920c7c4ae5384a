"""LoRA (Hu et al. 2021): a frozen linear W0 gains a trained update of rank r, h = W0 x + (alpha / r) B A x.

The base is loaded first and knows nothing of LoRA; `add_lora` wraps the linears it is told to. Adapters are kept in
PEFT's folder format, so that peft, vLLM and llama.cpp's converter read them:

  adapter_config.json         r, lora_alpha, lora_dropout, target_modules, base_model_name_or_path
  adapter_model.safetensors   base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight (r, I), lora_B (O, r), ...
  run.json                    ours: what it was trained on, with which prompt template and settings

PEFT's names are Hugging Face's, whose rotary layout differs from Meta's: the rows of lora_B of q_proj and k_proj are
permuted on the way out and back on the way in. Nothing fails if that is forgotten; the answers are just worse.
"""
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import nn

from model import (DTYPES, Linear, Parser, copy_tokenizer, find_base, find_tokenizer, hf_name, hf_to_meta_rows, load_model,
                   meta_to_hf_rows, new_folder, open_checkpoint, open_weights, processes, product, product_gradient,
                   read_checkpoint, read_json_file, rotary_heads, run, save_model, save_tensors, whole, write_atomically,
                   write_json, write_safetensors)

HF_TO_META = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
              "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
VNNI = torch.cpu._is_vnni_supported()        # a CPU that multiplies int8 four at a time
META_TO_HF = {meta: hf for hf, meta in HF_TO_META.items()}
NOT_BUILT = ("use_dora", "modules_to_save", "fan_in_fan_out", "enable_lora", "lora_bias", "layers_to_transform",
             "layer_replication", "exclude_modules", "target_parameters", "trainable_token_indices", "arrow_config",
             "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
PEFT_KEYS = {"r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
             "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights",
             "auto_mapping", "peft_version", "merge_weights", "megatron_core", "qalora_group_size"}


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how strongly. targets: Hugging Face's names, Meta's, or "all" (the seven linears of a block).
    The last three are PEFT's: rslora scales by alpha / sqrt(r) (Kalajdzievski 2023), a pattern of Hugging Face's module
    names gives some linears their own r or alpha. Raises ValueError for a value that makes no adapter."""
    r: int = 8
    alpha: float = 16
    dropout: float = 0.05                                         # on the adapter's input only, while training
    targets: tuple = ("q_proj", "v_proj")
    rslora: bool = False
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)

    def __post_init__(self):
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        names = tuple(META_TO_HF) if "all" in targets else tuple(HF_TO_META.get(t, t) for t in targets)
        if unknown := [t for t in names if t not in META_TO_HF]:
            raise ValueError(f"LoRA target {unknown[0]!r} unknown; choose from {' '.join(HF_TO_META)} or all")
        if not names:
            raise ValueError("no LoRA target given; name at least one, such as q_proj v_proj")
        for r in (self.r, *self.rank_pattern.values()):
            if type(r) is not int or r < 1:
                raise ValueError(f"LoRA rank r is {r!r}, wanted a whole number above 0")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha is {alpha!r}, wanted a number above 0")
        if not 0 <= self.dropout <= 0.99:                         # DroppedProduct draws in steps of 2^-16
            raise ValueError(f"lora_dropout is {self.dropout!r}, wanted 0 to 0.99")
        object.__setattr__(self, "targets", tuple(dict.fromkeys(names)))

    def rank_and_scale(self, name):
        """(r, factor of B A) of the linear that Hugging Face calls name. As in PEFT, a pattern stands for the end of names
        and the first that matches counts."""
        def pick(patterns, value):
            return next((own for pattern, own in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), value)
        r, alpha = pick(self.rank_pattern, self.r), pick(self.alpha_pattern, self.alpha)
        return r, alpha / (r ** 0.5 if self.rslora else r)


def frozen_product(x, matrix, *store):
    """y = W x (..., I) -> (..., O), W = matrix(dtype, *store) made from its quantised store."""
    return FrozenProduct.apply(x, matrix, *store) if torch.is_grad_enabled() else product(x, matrix(x.dtype, *store))


class FrozenProduct(torch.autograd.Function):
    """`frozen_product`, W made again for the gradient of x: autograd keeps the store, never W. The store has no gradient."""

    @staticmethod
    def forward(ctx, x, matrix, *store):
        ctx.matrix = matrix
        ctx.save_for_backward(*store)
        return product(x, matrix(x.dtype, *store))

    @staticmethod
    def backward(ctx, grad):
        stored = ctx.saved_tensors                                # once: recomputation hands them out a single time
        return product_gradient(grad, ctx.matrix(grad.dtype, *stored)), None, *(None for _ in stored)


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
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 1 and x.is_cuda and torch.compiler.is_compiling():
            return ((self.weight.float() * rows.float()).sum(-1) * self.scale.float()).to(x.dtype).view(*x.shape[:-1], -1)
        few = x.is_cpu and len(rows) <= 8 and not x.requires_grad      # reading W decides then, so it is read as int8
        if few and VNNI and x.dtype == torch.bfloat16:
            return self.integer_rows(rows).to(x.dtype).view(*x.shape[:-1], -1)
        if few and len(rows) == 1 and torch.compiler.is_compiling() and self.in_features % 4 == 0:
            return self.compiled_row(x)
        if few and x.dtype == torch.bfloat16:
            return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        return frozen_product(x, int8_matrix, self.weight, self.scale)

    def integer_rows(self, rows):
        """W x of few rows (R, I) as integers: each row as high + low / 254 of its greatest value / 127, two int8 numbers that
        hold it to 2^-16 of that value, finer than bf16 all but far below it; summed in int32, exactly."""
        unit = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-30) / 127                          # (R, 1)
        scaled = rows.float() / unit
        high = scaled.round()
        codes = torch.cat((high, ((scaled - high) * 254).round())).to(torch.int8)          # (2R, I)
        high, low = torch._int_mm(self.weight, codes.T).T.contiguous().float().chunk(2)    # (R, O)
        return (high + low / 254) * (unit * self.scale.float())

    def compiled_row(self, x):
        """W x of one row, summed in float32, in a form that inductor makes a vector loop of: its loads of int8 and int32
        are not whole vectors, so four codes at a time are read as a float32, whose bits as an int32 give them one by one."""
        codes = self.weight.view(torch.float32).view(torch.int32)                          # (O, I / 4), the first code lowest
        parts = torch.cat([x.flatten()[i::4].float() for i in range(4)]).view(4, -1)       # of x, for the codes i, i + 4, ...
        sums = sum(((codes << 24 - 8 * i) >> 24).float() * part for i, part in enumerate(parts))
        return (sums.sum(-1) * self.scale.float()).to(x.dtype).view(*x.shape[:-1], -1)


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
        return frozen_product(x, nf4_matrix, self.weight, self.absmax, self.scale, self.offset, self.pairs, self.levels)


QUANTISED = {"int8": Int8Linear, "nf4": NF4Linear}


def place(model, device, dtype):
    """Move a model's weights to device, cast to dtype (float32 what is trained), but for quantised stores."""
    for module in model.modules():
        if not isinstance(module, tuple(QUANTISED.values())):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(device, torch.float32 if p.requires_grad else dtype)


@torch.no_grad()
def quantize(model, kind, device=None, dtype=None):
    """Replace the seven linears of every block by Int8Linear or NF4Linear (kind "int8", "nf4"), one weight at a time on
    device, then move the other weights there, cast to dtype: the device never holds more than the quantised model and
    the work on one weight (for NF4 17 bytes an element). Raises ValueError for another kind or a model that has an adapter."""
    if kind not in QUANTISED:
        raise ValueError(f"base_dtype {kind!r} unknown; choose from {' '.join([*DTYPES, *QUANTISED])}")
    if lora_linears(model):
        raise ValueError("the model has an adapter; quantise the base before it is wrapped")
    for block in model.layers:
        for part in (block.attention, block.feed_forward):
            for leaf, linear in list(part.named_children()):
                setattr(part, leaf, QUANTISED[kind](linear.weight.to(device)))
    place(model, device, dtype)
    return model


class DroppedProduct(torch.autograd.Function):
    """A drop(x), x (..., I), A (r, I), without the factor 1 / (1 - p). Kept for the gradient are x itself, which the other
    adapters of the same input keep too, and one byte per element, in the place of a dropped copy for each adapter. The
    mask is drawn four elements at a time, 16 bits each: drawing was a third of the adapter's time on a CPU."""

    @staticmethod
    def forward(ctx, x, a, p):
        bits = torch.randint(-2**63, 2**63 - 1, (-(-x.numel() // 4),), device=x.device)
        keep = bits.view(torch.int16)[:x.numel()].view_as(x) >= round(p * 2**16) - 2**15
        ctx.save_for_backward(x, a, keep)
        return product(x * keep, a)

    @staticmethod
    def backward(ctx, grad):
        x, a, keep = ctx.saved_tensors
        dx = product_gradient(grad, a).mul_(keep) if ctx.needs_input_grad[0] else None
        return dx, grad.flatten(0, -2).T @ (x * keep).flatten(0, -2), None


class LoRALinear(nn.Module):
    """h = W0 x + (alpha / r) B A x (Hu et al. 2021, eq. 3). W0 (O, I) is frozen, as the base stores it; A (r, I) and
    B (O, r) are trained, float32, and cast to the activations' dtype at use. B starts at zero, so h starts at W0 x."""

    def __init__(self, base, config, name=""):
        super().__init__()
        n_out, n_in = base.out_features, base.in_features
        device = base.weight.device
        r, self.scale = config.rank_and_scale(name)
        self.base, self.dropout = base, config.dropout
        self.lora_a = nn.Parameter(torch.empty(r, n_in, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.zeros(n_out, r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=5 ** 0.5)         # uniform in +-1/sqrt(I), as in loralib and PEFT
        self.train(base.training)                                 # a loaded base is in eval: no dropout while asking

    def delta(self):
        """The update (alpha / r) B A as one matrix (O, I), float32."""
        return self.scale * (self.lora_b @ self.lora_a)

    def forward(self, x):                                         # (..., I) -> (..., O)
        a, b, p = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype), self.dropout * self.training
        h = DroppedProduct.apply(x, a, p) if p else product(x, a)                           # (..., r)
        return self.base(x) + product(h * (self.scale / (1 - p)), b)


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
        setattr(parent, leaf, LoRALinear(getattr(parent, leaf), config, hf_name(f"layers.{name}")))
    return len(names)


def remove_adapter(model):
    """Take the wrappers off again, so that another adapter can be loaded on the same base; its weights are as before."""
    for name, module in lora_linears(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.base)


@torch.no_grad()
def merge(model):
    """Fold each update into its weight, W = W0 + (alpha / r) B A, summed in float32 and stored in place in the weight's
    dtype; the wrappers go. Return {name: relative error of the stored update, ||stored - exact|| / ||exact||}: 0.06 is
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
        weight.copy_(merged)                                      # in place: mapped pages become ours, the file stays
    if not errors:
        raise ValueError("the model has no adapter to merge")
    remove_adapter(model)
    return errors


def peft_names(model):
    """[(our LoRALinear, PEFT's key prefix, heads whose lora_B rows are permuted or None)]."""
    return [(module, f"base_model.model.{hf_name(name)}", rotary_heads(name, model.config))
            for name, module in lora_linears(model)]


def save_adapter(model, path, base_model="", run_info=None, trained=False):
    """Write the adapter into the folder path as PEFT's two files and run.json, each file replaced atomically. The tensors
    are read back before they take the place of older ones. All processes call it, since a sharded adapter is gathered;
    the first writes. Raises ValueError naming a tensor that is not finite or came back otherwise or, once trained, if every
    lora_B is zero; one alone (behind a wo of zeros, say) is told of."""
    path, state = Path(path), {}
    for module, prefix, heads in peft_names(model):
        a, b = whole(module.lora_a.detach()).cpu(), whole(module.lora_b.detach()).cpu()
        state[f"{prefix}.lora_A.weight"] = a.contiguous()
        state[f"{prefix}.lora_B.weight"] = b.contiguous() if heads is None else meta_to_hf_rows(b, heads)
    if processes()[0]:
        return
    path.mkdir(parents=True, exist_ok=True)

    def write(file):
        save_file(state, file, metadata={"format": "pt"})
        saved = open_weights(file)
        for key, tensor in state.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {key} holds NaN or infinity, and nothing was saved; lower --learning_rate")
            if key not in saved or len(saved) != len(state) or not torch.equal(saved[key], tensor):
                raise ValueError(f"{file}: {key} is not what was saved; is the disk full or failing?")
        if zero := [key for key, tensor in state.items() if trained and "lora_B" in key and not tensor.any()]:
            if 2 * len(zero) == len(state):
                raise ValueError(f"{path}: every lora_B is zero after training, so nothing was trained, and nothing was saved")
            print(f"note: {zero[0]} is zero after training ({len(zero)} such), so this linear was not trained", file=sys.stderr)

    config = model.lora_config
    write_atomically(path / "adapter_model.safetensors", write)
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model), "r": config.r,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": "none", "fan_in_fan_out": False,
        "target_modules": [META_TO_HF[t] for t in config.targets], "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None, "use_rslora": config.rslora, "use_dora": False, "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern})
    write_json(path / "run.json", run_info or {})                 # last: who finds it finds the rest


def peft_config(file, n_layers):
    """The LoRAConfig of an adapter_config.json for a model of n_layers. Raises ValueError naming a missing key or a feature that
    this LoRA does not have. Keys that nobody knows are told of and ignored, as are those of old files, such as BenTsao's merge_weights."""
    settings = read_json_file(file)
    if missing := [k for k in ("r", "lora_alpha", "target_modules") if settings.get(k) is None]:
        raise ValueError(f"{file} lacks {missing[0]}")
    if settings.get("peft_type", "LORA") != "LORA" or settings.get("bias", "none") != "none":
        raise ValueError(f"{file}: peft_type {settings.get('peft_type')}, bias {settings.get('bias')}; wanted LORA and none")
    if refused := [key for key in NOT_BUILT if settings.get(key) or type(settings.get(key)) is int]:           # 0 is a layer
        raise ValueError(f"{file} sets {refused[0]} to {settings[refused[0]]!r}, which this LoRA does not have")
    if str(settings.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(f"{file}: init_lora_weights {settings['init_lora_weights']} changes the base too; save it converted")
    if unknown := [key for key, value in settings.items() if value and key not in PEFT_KEYS]:
        print(f"note: {file} sets {', '.join(unknown)}, unknown here and ignored", file=sys.stderr)
    targets = settings["target_modules"]
    try:
        named = [targets] * n_layers                              # by each layer's linears
        if isinstance(targets, str):                              # a pattern of whole names, or PEFT's word for all
            names = [hf_name(f"layers.0.{'feed_forward' if leaf[1] in '123' else 'attention'}.{leaf}") for leaf in META_TO_HF]
            named = [[name for name in names if targets == "all-linear" or re.fullmatch(targets, name.replace(".0.", f".{i}."))]
                     for i in range(n_layers)]
        elif single := [target for target in targets if re.search(r"\.\d+\.", target)]:
            named.append(single)
        if any(own != named[0] for own in named):
            raise ValueError(f"target_modules {targets} names single layers, which this LoRA does not have")
        for pattern in (*(settings.get("rank_pattern") or ()), *(settings.get("alpha_pattern") or ())):
            re.compile(pattern)
        return LoRAConfig(settings["r"], settings["lora_alpha"], settings.get("lora_dropout") or 0.0,
                          tuple(target.rpartition(".")[2] for target in named[0]), bool(settings.get("use_rslora")),
                          settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {})
    except re.error as error:
        raise ValueError(f"{file}: {error.pattern!r} is no pattern of names ({error})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def load_adapter(model, path):
    """Wrap the linears that the folder's adapter_config.json names and load adapter_model.safetensors or .bin, strictly.
    Return run.json (empty if there is none). Raises ValueError naming the file and a missing, surplus or misshaped tensor,
    one with NaN, or an unsupported feature."""
    path = Path(path)
    file = next((path / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path / 'adapter_model.safetensors'} (or .bin) not found; train an adapter first "
                         "(python train.py) or give --lora_weights its folder")
    config, state = peft_config(path / "adapter_config.json", model.config.n_layers), {}
    for key, tensor in open_weights(file).items():                # names of torch.compile and of PEFT's live modules
        state[re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", key.replace("_orig_mod.", ""))] = tensor
    add_lora(model, config)
    for module, prefix, heads in peft_names(model):
        for key, parameter in ((f"{prefix}.lora_A.weight", module.lora_a), (f"{prefix}.lora_B.weight", module.lora_b)):
            if not isinstance(state.get(key), torch.Tensor):
                raise ValueError(f"{file} lacks {key}")
            tensor = state.pop(key).float()
            if tensor.shape != parameter.shape:
                raise ValueError(f"{file}: {key} is {tuple(tensor.shape)}, this model and the adapter's config want "
                                 f"{tuple(parameter.shape)}; the adapter belongs to another base")
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {key} holds NaN or infinity")
            parameter.data.copy_(hf_to_meta_rows(tensor, heads) if heads and parameter is module.lora_b else tensor)
    if state:
        raise ValueError(f"{file} has {next(iter(state))}, which fits nowhere in this model")
    if not any(module.lora_b.any() for _, module in lora_linears(model)):
        print(f"note: every lora_B of {path} is zero; the adapter changes nothing", file=sys.stderr)
    model.requires_grad_(False)
    return read_json_file(path / "run.json") if (path / "run.json").is_file() else {}


def save_hf(model, path, tokenizer, max_positions=2048, max_shard_bytes=5 * 2**30):
    """Write the model into the folder path as Hugging Face has it: config.json, safetensors in shards with an index (one
    file without, if it fits), q and k rows in their order, the special ids of tokenizer (a path)."""
    config, path = model.config, Path(path)
    state = {f"{hf_name(name.removesuffix('.weight'))}.weight": (p, rotary_heads(name, config))
             for name, p in model.named_parameters()}
    shards, size = [{}], 0
    for key, (p, _) in state.items():
        if shards[-1] and size + p.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = (tuple(p.shape), p.dtype)
        size += p.nbytes
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": keys for i, keys in enumerate(shards, 1)}
    for file, keys in files.items() if len(shards) > 1 else [("model.safetensors", shards[0])]:
        write_safetensors(path / file, keys, ((key, state[key][0] if state[key][1] is None else meta_to_hf_rows(*state[key]))
                                              for key in keys))
    if len(shards) > 1:
        write_json(path / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(p.nbytes for p, _ in state.values())},
            "weight_map": {key: file for file, keys in files.items() for key in keys}})
    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    write_json(path / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size, "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling,
        "tie_word_embeddings": config.tie_embeddings, "max_position_embeddings": max_positions,
        "torch_dtype": str(model.dtype)[6:], "bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()})
    write_json(path / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        **{f"{name}_token": pieces.id_to_piece(i) for name, i in
           (("bos", pieces.bos_id()), ("eos", pieces.eos_id()), ("unk", pieces.unk_id()))}})


def save_meta(model, path):
    """Write the model into the folder path as Meta has it, in one shard: consolidated.00.pth, params.json. Raises
    ValueError for what Meta's params.json cannot say."""
    params = {key: value for key, value in model.config.params().items() if key != "tie_embeddings"}
    if beyond := params.keys() & {"head_dim", "rope_scaling"}:
        raise ValueError(f"Meta's params.json has no {' and '.join(sorted(beyond))}; export as hf")
    write_json(Path(path) / "params.json", params)
    file = Path(path) / "consolidated.00.pth"
    try:
        torch.save({name: tensor.detach() for name, tensor in model.state_dict().items()}, file)
    except RuntimeError as error:                                 # as torch says it of a full disk
        raise OSError(f"{file} cannot be written: {error}") from None


def recover(base, difference, path, dtype=None):
    """Write tuned = base + difference into a new folder of ours, as Stanford Alpaca's weight_diff.py does, summed in
    float32; rows that the base's vocabulary lacks ([PAD]) are the mean of those it has. Returns the sum of all weights, by which
    Alpaca's authors check, and that of RoPE's tables (238.72 for 7B), which checkpoints of their time held too. Raises
    ValueError naming a tensor of another shape."""
    checkpoint, raw, totals = open_checkpoint(difference), load_model(base).state_dict(), []

    def tuned():
        for name, tensor in read_checkpoint(checkpoint):
            old = raw[name].float() if name in raw else torch.empty(0)
            if old.dim() == 2 and len(old) < len(tensor) and name in ("tok_embeddings.weight", "output.weight"):
                old = torch.cat([old, old.mean(0, keepdim=True).expand(len(tensor) - len(old), -1)])
            if old.shape != tensor.shape:
                raise ValueError(f"{difference}: {name} is {tuple(tensor.shape)}, {tuple(old.shape)} in {base}")
            new = tensor.float() + old
            totals.append(new.sum().item())
            yield name, new

    with new_folder(path) as folder:
        save_tensors(checkpoint[0], tuned(), folder, dtype or checkpoint[1])
        copy_tokenizer(difference if find_tokenizer(difference).is_file() else base, folder)
    c = checkpoint[0]
    return sum(totals), c.n_layers * sum(c.rope_theta ** (-i / c.head_dim) for i in range(0, c.head_dim, 2))


def main():
    parser = Parser(description="Fold an adapter into its base, write a base in another layout, apply a weight difference.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    helps = {"merge": "write base + adapter as one model of ours", "recover": "write base + published weight difference",
             "export": "write base, or base + adapter, as Hugging Face's or Meta's folder"}
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--base_model", required=True, help="folder of the base, in any layout, or a hub's name in its cache")
        if name == "recover":
            command.add_argument("--weight_diff", required=True, help="folder of the difference, in any layout")
        else:
            command.add_argument("--lora_weights", required=name == "merge", help="folder of the adapter")
        if name == "export":
            command.add_argument("--layout", choices=("hf", "meta"), default="hf", help="whose folder to write")
            command.add_argument("--max_shard_gb", type=float, default=5, help="GiB of a safetensors file (hf)")
        command.add_argument("--output_dir", required=True, help="new folder to write")
        command.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as stored)")
    args = parser.parse_args()
    dtype, folder, base = DTYPES.get(args.dtype), args.output_dir, find_base(args.base_model)
    if args.command == "recover":
        total, tables = recover(base, args.weight_diff, folder, dtype)
        return print(f"{folder}: base + difference; with RoPE's tables, as old checkpoints held them, all sums to "
                     f"{total + tables:.4f}, the weights alone to {total:.4f}")
    if args.command == "export" and not 0 < args.max_shard_gb < math.inf:
        raise ValueError(f"max_shard_gb is {args.max_shard_gb}, wanted a number above 0")
    with new_folder(folder) as new:
        model = load_model(base, dtype=dtype)
        if args.lora_weights:
            load_adapter(model, args.lora_weights)
            errors = merge(model)
            worst = max(errors, key=errors.get)
            print(f"merged {len(errors)} linears; stored as {model.dtype}, the updates lose "
                  f"{sum(errors.values()) / len(errors):.1%} on average, {errors[worst]:.1%} at most ({worst})")
        if args.command == "merge":
            save_model(model, new)
        elif args.layout == "meta":
            save_meta(model, new)
        else:
            config = base / "config.json"                         # Meta's params.json does not say how long it was trained
            positions = read_json_file(config).get("max_position_embeddings", 2048) if config.is_file() else 2048
            save_hf(model, new, find_tokenizer(base), positions, int(args.max_shard_gb * 2**30))
        copy_tokenizer(base, new)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters as {model.dtype}")


if __name__ == "__main__":
    run(main)
