"""LoRA (Hu et al. 2021): a frozen linear W0 gains a trained update of rank r,
h = W0 x + (alpha / r) B A x.

What this file teaches, in this order:

  LoRALinear   the update beside a frozen linear
  add_lora     which linears of a loaded base are wrapped; the base knows nothing of LoRA
  merge        the update folded into the weight, and what rounding loses of it

Below the lesson stand bases of 8 and 4 bits, adapters on disk, and the commands.

Letters: I inputs and O outputs of a linear, r the rank. W0 stays in the dtype of the base; A and B
are trained in float32 and cast to the activations' dtype where they are used.

Adapters are kept in PEFT's folder format, so that peft, vLLM and llama.cpp's converter read them:

  adapter_config.json         r, lora_alpha, lora_dropout, target_modules, ...
  adapter_model.safetensors   base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight (r, I),
                              lora_B (O, r), ...
  run.json                    ours: what it was trained on, with which template and settings
"""

import math
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from model import (
    AMX,
    DATA,
    DTYPES,
    PUBLISHED,
    SAVE,
    SHARD_BYTES,
    TIED,
    Checkpoint,
    Linear,
    Parser,
    check_settings,
    few_rows,
    file_hash,
    find_base,
    find_tokenizer,
    full_tensor,
    load_model,
    new_folder,
    one_row,
    open_weights,
    processes,
    read_json_file,
    run,
    setting,
    stored_name,
    stored_rows,
    weight_files,
    write_atomically,
    write_chat_template,
    write_json,
)

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# --------------------------------------------------------------------------------------------------
# The update


@dataclass
class LoRAConfig:
    """What to adapt and how strongly. Raises ValueError for a value that makes no adapter."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = setting(0.05, 0, 0.99)  # on the update's input, while training
    targets: tuple = ("q_proj", "v_proj")  # some of TARGETS, or "all"
    rslora: bool = False  # scale by alpha / sqrt(r) (Kalajdzievski 2023)

    def __post_init__(self):
        names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        self.targets = TARGETS if "all" in names else names
        check_settings(self)
        if not names or not {*self.targets} <= {*TARGETS}:
            raise ValueError(f"LoRA targets are {names}, wanted some of {' '.join(TARGETS)} or all")

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoRALinear(nn.Module):
    """h = W0 x + (alpha / r) B A x (Hu et al. 2021, eq. 3).

    W0 (O, I) is frozen, as the base stores it. A (r, I) and B (O, r) are trained, in float32. B
    starts at zero, so h starts at W0 x. `share` scales the update once more, with a tensor
    (rows, 1, 1) row by row: a row whose share is 0 is the base's."""

    def __init__(self, base, config):
        super().__init__()
        new = partial(torch.empty, device=base.weight.device, dtype=torch.float32)
        self.base, self.config, self.share = base, config, 1.0
        self.lora_a = nn.Parameter(new(config.r, base.in_features))
        self.lora_b = nn.Parameter(new(base.out_features, config.r).zero_())
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)  # in +-1/sqrt(I), as in loralib and PEFT
        self.train(base.training)  # a loaded base is in eval: no dropout while asking

    def forward(self, x):  # (..., I) -> (..., O)
        # Down to r numbers a token, and up again; scaled where they are few.
        h = dropout(x, self.config.dropout * self.training)
        h = F.linear(h, self.lora_a.to(x.dtype)) * (self.config.scale * self.share)  # (..., r)
        return self.base(x) + F.linear(h.to(x.dtype), self.lora_b.to(x.dtype))


def linears(model):
    """{name: linear} of all blocks."""
    modules = model.layers.named_modules(prefix="layers")
    return {name: module for name, module in modules if isinstance(module, Linear)}


def lora_linears(model):
    """[(name, LoRALinear), ...] of the wrapped linears, in the order of the layers."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def add_lora(model, config):
    """Freeze the model and wrap the target linears of every block; return how many. Only A and B
    are trainable afterwards. Raises ValueError if the model has an adapter already, or no linear of
    these names."""
    refuse_adapter(model)
    model.requires_grad_(False)
    for name, linear in linears(model).items():
        if name.rpartition(".")[2] not in config.targets:
            continue
        if config.r > min(linear.in_features, linear.out_features):
            raise ValueError(f"r {config.r} is above the smaller side of {name}: lower it")
        model.set_submodule(name, LoRALinear(linear, config))
    if not (count := len(lora_linears(model))):
        raise ValueError(f"no linear of this base is one of the targets {config.targets}")
    return count


def refuse_adapter(model):
    if lora_linears(model):
        raise ValueError("the model has an adapter already; merge it or load the base again")


def remove_adapter(model):
    """Take the wrappers off again; the base's weights are as before."""
    for name, module in lora_linears(model):
        model.set_submodule(name, module.base)


def share_rows(model, share):
    """Scale all updates by share: 1.0, or a tensor (B, 1, 1), row by row."""
    for _, module in lora_linears(model):
        module.share = share


@torch.no_grad()
def merge(model):
    """Fold each update into its weight, W = W0 + (alpha / r) B A, summed in float32 and stored in
    the weight's dtype; the wrappers go. Return {name: relative error of the stored update}.

    An error of 0.06 is usual in bf16; 0.5 means that rounding takes half of the update, and the
    adapter is better kept apart. Raises ValueError without an adapter, and on a quantised base."""
    errors = {}
    for name, module in lora_linears(model):
        if isinstance(module.base, QuantisedLinear):
            raise ValueError(
                "a quantised base would round the adapter away; use it unmerged, or merge it into "
                "the base as it was before (--base_dtype bf16)"
            )
        # Sum in float32, round once, and see what rounding left of the update.
        weight, delta = module.base.weight, module.config.scale * (module.lora_b @ module.lora_a)
        merged = (weight.float() + delta).to(weight.dtype)
        stored = merged.float() - weight.float()
        errors[name] = ((stored - delta).norm() / delta.norm().clamp_min(1e-30)).item()
        weight.copy_(merged)  # in place: mapped pages become ours, the file stays as it is
    if not errors:
        raise ValueError("the model has no adapter to merge")
    remove_adapter(model)
    return errors


# ==================================================================================================
# Dropout on a CPU


def dropout(x, p):
    """x with each number at random 0, with probability p, or over 1 - p (Srivastava et al. 2014).

    On a CPU, where random numbers cost more than the product, 64 random bits serve four numbers, so
    p is a multiple of 2^-16."""
    if x.is_cuda or p == 0:
        return F.dropout(x, p)
    bits = x.new_empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * kept / (1 - p)


# ==================================================================================================
# Bases of 8 and 4 bits


class FrozenProduct(torch.autograd.Function):
    """y = W x with W = matrix(dtype, *store), made again for the gradient of x: autograd keeps the
    store, never W."""

    @staticmethod
    def forward(ctx, x, matrix, *store):
        ctx.matrix = matrix
        ctx.save_for_backward(*store)
        return F.linear(x, matrix(x.dtype, *store))

    @staticmethod
    def backward(ctx, grad):
        store = ctx.saved_tensors  # once: recomputation hands them out a single time
        return grad @ ctx.matrix(grad.dtype, *store), None, *(None for _ in store)


class QuantisedLinear(Linear):
    """A frozen W (O, I) kept as a store of tensors, beside the bias if there is one. Subclasses say
    how it is made (`quantise`) and what W is (`matrix`)."""

    def __init__(self, weight, *bias):
        nn.Module.__init__(self)
        self.bias = None
        self.out_features, self.in_features = weight.shape
        # Codes and scales are parameters, so that they move with the model.
        store = self.quantise(weight.float())
        self.names = tuple(store)
        for name, tensor in zip((*store, "bias"), (*store.values(), *bias)):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def multiply(self, x):  # (R, I) -> (R, O)
        return FrozenProduct.apply(x, self.matrix, *(getattr(self, name) for name in self.names))


class Int8Linear(QuantisedLinear):
    """One scale a row, scale = max |row| / 127 in bf16; codes = round(row / scale) in -127..127, so
    that a weight is off by half a scale at most."""

    @staticmethod
    def quantise(weight):
        scale = (weight.abs().amax(1) / 127).clamp_min(1e-30).bfloat16()
        return {"weight": (weight / scale.float()[:, None]).round().to(torch.int8), "scale": scale}

    @staticmethod
    def matrix(dtype, codes, scale):
        return codes.to(dtype).mul_(scale.to(dtype)[:, None])

    def multiply(self, x):
        rows = few_rows(x)
        if rows == 1 and torch.compiler.is_compiling():
            return (one_row(x, self.weight) * self.scale.float()).to(x.dtype)
        # Of a width that 16 does not divide, torch's product of int8 reads beyond the end.
        if not rows or not x.is_cpu or x.dtype != torch.bfloat16 or self.in_features % 16:
            return super().multiply(x)
        # Few rows: reading the codes takes the time, so they are read as they are.
        multiply = torch.ops.aten._weight_int8pack_mm
        if AMX and rows > 4:
            multiply = integer_product
        return multiply(x, self.weight, self.scale)


def integer_product(x, codes, scale):
    """Few rows x (R, I) times int8 codes (O, I), in integers: each row is high + low / 254 of its
    greatest value / 127, two int8 numbers: to 1/64,000 of that value; sums in int32 are exact."""
    unit = x.abs().amax(1, keepdim=True).float().clamp_min(1e-30) / 127  # (R, 1)
    scaled = x.float() / unit
    high = scaled.round()
    pair = torch.cat((high, ((scaled - high) * 254).round())).to(torch.int8)  # (2R, I)
    high, low = torch._int_mm(codes, pair.T).T.float().chunk(2)  # (R, O)
    return ((high + low / 254) * (unit * scale.float())).to(x.dtype)


# The 16 values of NF4 (Dettmers et al. 2023, QLoRA, appendix E): quantiles of a normal distribution
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
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
)


class NF4Linear(QuantisedLinear):
    """4.5 bits a weight (QLoRA, section 3, as bitsandbytes stores it): blocks of 64 weights share
    their greatest magnitude, absmax; each weight is the nearest of NF4's values times it, the lower
    one in the middle; two codes stand in a byte, the first in its upper half. Raises ValueError if
    64 does not divide O I, or 2 not I."""

    @staticmethod
    def quantise(weight):
        if weight.numel() % 64 or weight.size(1) % 2:
            raise ValueError(
                f"a weight of {tuple(weight.shape)} is no multiple of NF4's blocks of 64 or of odd "
                "width; use int8"
            )
        table, blocks = torch.tensor(NF4, device=weight.device), weight.view(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        scaled = blocks * (1 / absmax.clamp_min(1e-38))
        # The nearest value: between which two midpoints it falls.
        codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True)
        codes = codes.to(torch.uint8).view(len(weight), -1)
        return {
            "weight": codes[:, ::2] << 4 | codes[:, 1::2],  # (O, I / 2)
            "absmax": absmax,
            "pairs": torch.cartesian_prod(table, table),  # (256, 2): what a byte of codes holds
        }

    @staticmethod
    def matrix(dtype, codes, absmax, pairs):
        blocks = F.embedding(codes.int(), pairs).view(-1, 64)
        return blocks.mul_(absmax).to(dtype).view(len(codes), -1)


QUANTISED = {"int8": Int8Linear, "nf4": NF4Linear}


def move_model(model, device, dtype):
    """Move a model's weights to device, cast to dtype (float32 what is trained); what quantised
    linears store is as it was."""
    for module in model.modules():
        if not isinstance(module, QuantisedLinear):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(device, torch.float32 if p.requires_grad else dtype)


@torch.no_grad()
def quantize(model, kind, device=None, dtype=None):
    """Quantise the linears of every block (kind "int8" or "nf4"), one at a time on device, then
    move the other weights there, cast to dtype: the device never holds more than the quantised
    model and the work on one weight. Raises ValueError for another kind or a model with an
    adapter."""
    if kind not in QUANTISED:
        raise ValueError(f"base_dtype is {kind!r}, wanted {' or '.join([*DTYPES, *QUANTISED])}")
    refuse_adapter(model)
    for name, linear in linears(model).items():
        model.set_submodule(name, QUANTISED[kind](*(p.to(device) for p in linear.parameters())))
    move_model(model, device, dtype)
    return model


# ==================================================================================================
# Adapters on disk

PREFIX = "base_model.model."  # of PEFT's keys
SOME = {"layers_to_transform", "layers_pattern", "exclude_modules"}  # in some layers only
# Patterns of "key value" that adapter_config.json may set: what is read here, what the tensors
# show, what changes nothing; no way to begin an adapter that changes the base.
KNOWN = (
    "peft_type LORA",
    "init_lora_weights (?!(?i:pissa|olora|corda|loftq|lora_ga))",
    *SOME,
    "r|lora_alpha|lora_dropout|use_rslora|bias|target_modules|task_type|base_model_name_or_path",
    "revision|inference_mode|auto_mapping|peft_version|merge_weights|megatron_core",
    "qalora_group_size",
)


def save_adapter(model, folder, base_model="", run_info=None, trained=False):
    """Write the adapter into a folder as PEFT's two files and run.json. All processes call it,
    since a sharded adapter is gathered; the first writes. Tensors are read back before they take
    the place of older ones. Raises ValueError naming a tensor that is not finite or came back
    otherwise and, once trained, if every B is zero."""
    folder, pairs = Path(folder), file_pairs(model)
    state = {
        f"{PREFIX}{name}.lora_{half}.weight": tensor
        for name, pair in pairs.items()
        for half, tensor in pair.items()
    }
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{folder}: {key} holds NaN or infinity, and nothing was saved; lower "
                "--learning_rate"
            )
    # An adapter that changes nothing is a mistake that would be found too late.
    if trained and not any(pair["B"].any() for pair in pairs.values()):
        raise ValueError(f"{folder}: every lora_B is zero, so nothing was trained or saved")
    if processes()[0]:
        return

    def write(file):
        save_file(state, file, {"format": "pt"})
        saved = open_weights(file)
        for key, tensor in state.items():
            if not torch.equal(saved.get(key, torch.empty(0)), tensor):
                raise ValueError(f"{file}: {key} is not what was saved; is the disk failing?")

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", write)
    # What PEFT reads: names of linears, in full where not all layers have them.
    config, leaves = lora_linears(model)[0][1].config, {name.rpartition(".")[2] for name in pairs}
    everywhere = len(pairs) == len(leaves) * len(model.layers)
    rank = len(next(iter(state.values())))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": rank,
        "lora_alpha": config.alpha * (config.scale / replace(config, r=rank).scale),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": sorted(leaves) if everywhere else [*pairs],
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", settings)
    write_json(folder / "run.json", run_info or {})  # last: who finds it finds the rest


def file_pairs(model):
    """{a linear's name in files: {"A": tensor, "B": tensor}} of an adapter, gathered, B's rows in
    the base's order. Two linears that are one in files (GLM's gate_up_proj) stand there in blocks,
    with twice the rank, and all others are filled up with zeros to that rank: exact."""
    pairs, layout = {}, model.config.model_type
    stored = stored_rows(model.config, layout)
    for name, module in lora_linears(model):
        a, b = (full_tensor(p.detach()).cpu() for p in (module.lora_a, module.lora_b))
        key = stored_name(name, layout)
        parts = stored[f"{key}.weight"]
        tall = b.new_zeros(sum(map(len, parts.values())), b.size(1))
        tall[parts[f"{name}.weight"]] = b
        above, left = pairs.get(key, (a[:0], tall[:, :0]))
        pairs[key] = torch.cat((above, a)), torch.cat((left, tall), 1)
    rank = max(len(a) for a, _ in pairs.values())
    return {
        key: {"A": F.pad(a, (0, 0, 0, rank - len(a))), "B": F.pad(b, (0, rank - len(a)))}
        for key, (a, b) in pairs.items()
    }


def read_adapter_config(file):
    """(LoRAConfig, target_modules) of an adapter_config.json, no targets where they are a pattern
    or some layers are left out. Raises ValueError naming a key that is missing or asks for what
    this LoRA does not have."""
    settings = {k: v for k, v in read_json_file(file).items() if v or type(v) is int}
    for key, value in settings.items():
        if not re.match(rf"({'|'.join(KNOWN)})\b", f"{key} {value}"):
            raise ValueError(f"{file} sets {key} to {value!r}, which this LoRA does not have")
    try:
        r, alpha, targets = (settings[key] for key in ("r", "lora_alpha", "target_modules"))
        dropout, rslora = settings.get("lora_dropout", 0.0), settings.get("use_rslora", False)
        some = not isinstance(targets, list) or settings.keys() & SOME
        return LoRAConfig(r, alpha, dropout, rslora=rslora), [] if some else [*map(str, targets)]
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_adapter(model, folder):
    """Wrap the linears for which a folder's adapter_model.safetensors or .bin has tensors, and load
    them. Raises ValueError naming a linear whose tensors do not fit, are missing or are not finite,
    and for what PEFT has besides LoRA."""
    folder = Path(folder)
    files = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    file = next(filter(Path.is_file, files), files[0])
    if not file.is_file():
        raise ValueError(
            f"{file} (or .bin) not found; train an adapter first (python train.py) or give "
            "--lora_weights its folder"
        )
    config, targets = read_adapter_config(folder / "adapter_config.json")
    refuse_adapter(model)
    found, kind = linears(model), model.config.model_type
    known = stored_rows(model.config, kind)
    known |= stored_rows(model.config, PUBLISHED.get(kind, kind))
    pairs = read_pairs(file, known)
    # The linears of the file must be those that the settings name, and all be in the model.
    names = [] if targets else [*pairs]
    for target in targets:
        means = [
            name.removesuffix(".weight")
            for key, parts in known.items()
            if f".{key}".endswith(f".{target}.weight")
            for name in parts
        ]
        names += means or [target]
    for name in sorted({*names, *pairs}):
        linear = found.get(name) if name in names else None
        check_pair(f"{file}: {name}", linear, pairs.get(name, {}), config.r)
    # All fits: wrap and fill, one linear at a time.
    for name, pair in pairs.items():
        module = LoRALinear(found[name], config)
        module.lora_a.data.copy_(pair["A"])
        module.lora_b.data.copy_(pair["B"])
        model.set_submodule(name, module.requires_grad_(False))


def adapter_base(adapter, name, anyway):
    """(folder of the base named, or of the one that an adapter was trained on; the template that
    stands in its run.json, or {}). A base is known by the SHA-256 of its weights in run.json, else
    by its name in adapter_config.json. Raises ValueError naming both if it is another, unless
    `anyway`."""
    made = read_json_file(Path(adapter, "run.json"), {})
    made = {name: part for name, part in made.items() if isinstance(part, dict)}
    theirs = read_json_file(Path(adapter, "adapter_config.json"), {})
    noted = str(theirs.get("base_model_name_or_path") or name or "tiny")
    # This project's own base may have lain elsewhere.
    places = filter(Path.is_dir, (Path(noted), DATA / Path(noted).name))
    place = name or next(places, noted)
    base = find_base(place)
    known, same = made.get("sha256", {}).get("base"), Path(noted).name == Path(place).name
    if known:
        # To hash a large one takes its time: it is believed where nobody names another.
        same = all(
            file_hash(file) in str(known)
            for file in weight_files(base)
            if name or file.stat().st_size < 2**30
        )
    if not same:
        text = f"adapter {adapter} was trained on {noted}, and {base} is another base"
        if not anyway:
            raise ValueError(f"{text}; name the right one, or take this one --anyway")
        print(f"warning: {text}", file=sys.stderr)
    return base, made.get("made_in", {}).get("template", {})


def read_pairs(file, known):
    """{our name: {"A": tensor, "B": tensor}} of an adapter's file, by known = `stored_rows`. The
    update of a fused linear (GLM's gate_up_proj, ChatGLM's query_key_value) becomes those of its
    parts, exactly: A is shared, and each has its rows of B."""
    pairs = {}
    # lora_A.weight; in PEFT's live modules lora_A.default.weight; _orig_mod. is torch.compile's
    pattern = rf"(?s)(?:{PREFIX})?(.*?)(?:\.lora_([AB])\.(?:\w+\.)?weight)?"
    for key, tensor in open_weights(file).items():
        name, half = re.fullmatch(pattern, key.replace("_orig_mod.", "")).groups()
        parts = known.get(f"{name}.weight", {name: []})
        # Where the rows are too many or too few, `check_pair` says so of the whole.
        cut = half == "B" and [*tensor.shape[:1]] == [sum(map(len, parts.values()))]
        for ours, rows in parts.items():
            pair = pairs.setdefault(ours.removesuffix(".weight"), {})
            pair[half] = (tensor[rows] if cut else tensor).float()
    return pairs


def check_pair(name, linear, pair, r):
    """Raise ValueError if A (r, I) and B (O, r) are not what a linear wants."""
    shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
    if not linear or shapes != {"A": (r, linear.in_features), "B": (linear.out_features, r)}:
        raise ValueError(
            f"{name} has {shapes or 'no tensors'}, which does not fit this model and r {r}; does "
            "the adapter belong to another base?"
        )
    if not all(tensor.isfinite().all() for tensor in pair.values()):
        raise ValueError(f"{name} holds NaN or infinity")


# ==================================================================================================
# Commands


def recover(base, difference, folder, dtype=None, layout="hf", size=SHARD_BYTES):
    """Write tuned = base + difference into a new folder, as Stanford Alpaca's weight_diff.py does,
    summed in float32; rows that the base's vocabulary lacks ([PAD]) are the mean of those it has.
    Return the sum of all weights, and that of RoPE's tables, which checkpoints of their time held
    too: by the two together Alpaca's authors check. Raises ValueError for another shape."""
    weights, old, sums = Checkpoint(difference), load_model(base).state_dict(), []
    c = weights.config

    def tuned():
        for name, tensor in weights.read():
            start = old.get(name, torch.empty(0)).float()
            new_rows = len(tensor) - len(start)
            if new_rows > 0 and name in TIED:
                start = torch.cat([start, start.mean(0, keepdim=True).expand(new_rows, -1)])
            if start.shape != tensor.shape:
                raise ValueError(
                    f"{difference}: {name} is {tuple(tensor.shape)}, {tuple(start.shape)} in {base}"
                )
            whole = start + tensor.float()
            sums.append(whole.sum().item())
            yield name, whole

    tokenizer = difference if find_tokenizer(difference).is_file() else base
    with new_folder(folder) as new:
        SAVE[layout](c, tuned(), new, dtype or weights.dtype, tokenizer, size)
    # One table a layer: theta^(-2i/D), as old checkpoints held it.
    table = sum(c.rope_theta ** (-i / c.head_dim) for i in range(0, c.head_dim, 2))
    return sum(sums), c.num_hidden_layers * table


@dataclass
class Options:
    """What the commands write, and of what."""

    # what is written, and of what

    # folder of the base, or its name in a hub's cache (merge: by default the adapter's own)
    base_model: str = ""
    output_dir: str = ""  # new folder to write (must be given)
    lora_weights: str = ""  # folder of the adapter (merge must have one)
    anyway: bool = False  # merge into another base than the adapter's own
    weight_diff: str = ""  # folder of the difference (recover must have one)
    dtype: str = setting("", choices=tuple(DTYPES))  # to write (empty: as stored)
    layout: str = setting("hf", choices=tuple(SAVE))  # whose folder to write
    max_shard_gb: float = SHARD_BYTES / 2**30  # GiB of a safetensors file (hf)

    __post_init__ = check_settings

    @property
    def max_shard_bytes(self):
        return int(self.max_shard_gb * 2**30)


def export(base, options):
    """Write a base, with an adapter merged into it if one is named, into a new folder."""
    adapter, template = options.lora_weights, {}
    if adapter:
        adapter = find_base(adapter, "give its folder with --lora_weights")
        base, template = adapter_base(adapter, base, options.anyway)
    base = find_base(base)
    with new_folder(options.output_dir) as new:
        model = load_model(base, dtype=DTYPES.get(options.dtype))
        if adapter:
            load_adapter(model, adapter)
            errors = merge(model)
            worst = max(errors, key=errors.get)
            print(
                f"merged {len(errors)} linears; stored as {model.dtype}, the updates lose "
                f"{sum(errors.values()) / len(errors):.1%} on average, {errors[worst]:.1%} at most "
                f"({worst})"
            )
        tensors, size = model.named_parameters(), options.max_shard_bytes
        SAVE[options.layout](model.config, tensors, new, model.dtype, base, size)
        write_chat_template(new, template)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.output_dir}: {count:,} parameters as {model.dtype}")


EXAMPLES = """Fold an adapter into its base, or write a base in another form.

  python lora.py merge --lora_weights lora-tcm --output_dir merged
  python lora.py export --base_model models/llama-7b --output_dir meta --layout meta
  python lora.py recover --base_model models/llama-7b --weight_diff diff --output_dir alpaca"""
# what each command must be given
COMMANDS = {
    "merge": "output_dir lora_weights",
    "export": "base_model output_dir",
    "recover": "base_model output_dir weight_diff",
}


def main():
    parser = Parser(description=EXAMPLES)
    text = "merge: base + adapter; export: base (+ adapter); recover: base + published difference"
    parser.add_argument("command", choices=COMMANDS, help=text)
    parser.add_settings(Options)
    given = vars(parser.parse_args())
    command = given.pop("command")
    for name in COMMANDS[command].split():
        if not given.get(name):
            raise ValueError(f"{command} wants --{name}")
    options = Options(**given)
    if command != "recover":
        return export(options.base_model, options)
    base, folder = find_base(options.base_model), options.output_dir
    how = DTYPES.get(options.dtype), options.layout, options.max_shard_bytes
    total, tables = recover(base, options.weight_diff, folder, *how)
    print(
        f"{folder}: base + difference; with RoPE's tables, as old checkpoints held them, all "
        f"sums to {total + tables:.4f}, the weights alone to {total:.4f}"
    )


if __name__ == "__main__":
    run(main)
