"""Instruction tuning: LoRA on a frozen LLaMA, or all its weights (--full), with the loss on the answer alone.

  python train.py                                              the small base in data/tiny, with the settings of TINY
  python train.py --base_model DIR --data_path FILE ...        your base and data, with alpaca-lora's defaults
  torchrun --nproc_per_node N train.py ...                     on N GPUs (or CPU processes): the same, but for dropout's masks

Letters: B rows, T positions, V vocabulary. A row is a prompt and its answer, ending in EOS, which is always a target.
The gradient of an optimizer step is that of (sum of the losses of all target tokens) / (their number), however the
rows are cut into micro-batches. Activations are in --dtype, a frozen base is stored in --base_dtype; adapters (or, with
--full, all weights), their gradients, AdamW's state, logits and loss are float32.
"""
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from argparse import SUPPRESS
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from generate import (DATA, Decoding, Tokenizer, answer_batch, bot_spans, flag, load_base, load_template, pick_device, pick_dtype,
                      read_instructions, render_prompt)
from lora import LoRAConfig, add_lora, place, save_adapter
from model import (DTYPES, PackedRows, Parser, copy_tokenizer, find_base, find_tokenizer, goes_wide, open_checkpoint, open_weights,
                   out_of_memory, processes, read_json_file, run, save_model, sync, weight_files, whole, write_atomically, write_json)


def opt(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Settings under alpaca-lora's names, with its defaults (BenTsao's where they differ) but for three: cutoff_len
    512, since at 256 22.9 % of BenTsao's records lose their EOS and the model never learns to stop; warm-up at most a
    tenth of the steps, so that short runs learn too; and bf16 instead of an 8-bit base."""
    base_model: str = opt("", "folder of the base (empty: the small one in data/tiny, with the settings of TINY)")
    data_path: tuple = opt((), "training records, one file or several, in any form that generate.read_instructions knows; "
                           "FILE:WEIGHT takes its records WEIGHT times (0.5: half of them, drawn by seed)")
    val_path: str = opt("", "validation records in a file of their own (else val_set_size of data_path)")
    output_dir: str = opt("lora-tcm", "folder for the adapter (or model), log.jsonl, loss.svg, checkpoints")
    full: bool = opt(False, "train all weights instead of an adapter")
    shard: bool = opt(False, "under torchrun: cut weights, gradients and AdamW's state over the processes (FSDP2)")
    batch_size: int = opt(128, "rows of one optimizer step")
    micro_batch_size: int = opt(0, "rows computed at once, at most (0: as many as micro_batch_tokens allows)")
    micro_batch_tokens: int = opt(0, "tokens computed at once, at most, unless one row alone is longer (0: 8,192 on a GPU, "
                                  "2,048 on a CPU, fewer where memory asks for it)")
    recompute: str = opt("auto", "none, full, or auto: forget the activations inside of so many blocks, and make them again "
                         "for the gradient, as memory asks for")
    memory_gb: float = opt(0.0, "memory to plan for, in GB of 2^30 bytes (0: 92 % of the device's)")
    compile: bool = opt(False, "torch.compile each block: pays on a GPU after a minute or two")
    share_opening: bool = opt(True, "compute the tokens that all rows of a micro-batch begin with once (exact but for "
                              "dropout, whose mask they then share)")
    num_epochs: int = opt(10, "passes over the data")
    max_steps: int = opt(0, "optimizer steps at most (0: no limit but num_epochs)")
    learning_rate: float = opt(3e-4, "peak of AdamW's learning rate, after warm-up; falls linearly to 0")
    warmup_steps: int = opt(100, "steps of linear warm-up, at most a tenth of all")
    weight_decay: float = opt(0.0, "AdamW's")
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm")
    cutoff_len: int = opt(512, "tokens of a row at most; a longer answer is cut, its EOS stays")
    val_set_size: int = opt(500, "rows taken from data_path for validation, by seed")
    eval_steps: int = opt(200, "steps between validations (0: only at the end)")
    save_steps: int = opt(200, "steps between checkpoints (0: none)")
    save_total_limit: int = opt(3, "last checkpoints kept, besides the best (0: all)")
    lora_r: int = opt(8, "rank of the update")
    lora_alpha: float = opt(16, "the update is scaled by alpha / r")
    lora_dropout: float = opt(0.05, "on the adapter's input")
    lora_target_modules: tuple = opt(("q_proj", "v_proj"), "linears to adapt: q_proj k_proj v_proj o_proj gate_proj "
                                     "up_proj down_proj, Meta's wq ..., or all; also as '[q_proj,v_proj]'")
    train_on: str = opt("last", "targets in a conversation: the last answer and its EOS, or all: the earlier answers too")
    train_on_inputs: bool = opt(False, "make the prompt's tokens targets too")
    group_by_length: bool = opt(False, "fill each step with rows of similar length (changes the order, less padding)")
    prompt_template_name: str = opt("med_template", "name in data/templates or path")
    resume_from_checkpoint: str = opt("", "checkpoint-STEP folder to go on from, bit for bit; auto (or True): the last in "
                                      "output_dir, or from the beginning if there is none")
    resume_anyway: bool = opt(False, "go on although data, base, template or settings differ from the checkpoint's")
    stats: bool = opt(False, "print tokens and what cut-offs would cut of data_path, then end; loads no weights")
    num_answers: int = opt(3, "validation questions answered before and after")
    seed: int = opt(42, "of the split, the order, A's first values and dropout")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1")
    dtype: str = opt("auto", "auto, bf16, fp32: of the activations")
    base_dtype: str = opt("auto", "of the frozen base as stored: auto (as --dtype), bf16, fp16, fp32, int8, nf4")
    wandb_project: str = opt("", "log to this Weights & Biases project (needs wandb)")
    wandb_run_name: str = opt("", "name of the run, there and in run.json")


# `python train.py` alone: a base of 5 million weights wants a far larger step than 7 billion do, and all its linears; in
# float32, so that it learns the same everywhere
TINY = {"base_model": str(DATA / "tiny"), "data_path": (str(DATA / "train.jsonl"),), "val_path": str(DATA / "heldout.jsonl"),
        "batch_size": 64, "micro_batch_size": 32, "num_epochs": 4, "learning_rate": 5e-3, "warmup_steps": 10,
        "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": ("all",), "eval_steps": 50,
        "num_answers": 1000, "dtype": "fp32"}


class Row(NamedTuple):
    """One encoded record: token ids; mask[t] True where token t is a target (never t = 0: nothing predicts it); its name."""
    ids: list
    mask: list
    name: str = ""


def encode_example(tokenizer, template, record, config):
    """The Row of a record, or None if its prompt leaves no room for one answer token and EOS within cutoff_len. A cut
    answer keeps EOS as its end and never ends inside a character.

    With train_on "all" the earlier answers of a conversation are targets where they stand, in the instruction. What ends
    one there is the next " <user>:", which is no target: a model that learns it would write the user's next question."""
    text = render_prompt(template, record["instruction"], record["input"])
    prompt = tokenizer.encode(text, bos=True)
    answer, room = tokenizer.encode_answer(record["output"]), config.cutoff_len - len(prompt) - 1
    if room < 1:
        return None
    if len(answer) > room:
        answer = answer[:room]
        while answer and tokenizer.decode(answer).endswith("\ufffd"):
            answer.pop()
    if not answer:
        return None
    mask = [config.train_on_inputs and t > 0 for t in range(len(prompt))]
    if config.train_on == "all" and (spans := bot_spans(record["instruction"])):
        ends, offset = tokenizer.byte_ends(prompt, text), text.index(record["instruction"])
        for start, end in spans:                                  # characters of the instruction -> bytes of the prompt
            start, end = (len(text[:offset + at].encode()) for at in (start, end))
            mask = [m or t > 0 and ends[t] > start and ends[t - 1] < end for t, m in enumerate(mask)]
    return Row(prompt + answer + [tokenizer.eos_id], mask + [True] * (len(answer) + 1), record.get("record", ""))


def read_data(config):
    """(training records, validation records): validation is val_path, else val_set_size records drawn by seed from all
    files of data_path; of what is left, a file given as FILE:WEIGHT is taken WEIGHT times, a fraction drawn by the same
    seed. Each record gains `record`, its file's name and its number there."""
    if not config.data_path:
        raise ValueError("no --data_path; give a file of records such as {instruction, input, output}")
    records, spans = [], []
    for argument in config.data_path:
        path, weight = split_weight(argument)
        read = read_instructions(path, answers=True)
        spans.append((range(len(records), len(records) + len(read)), weight))
        records += [{**r, "record": f"{Path(path).name}:{i}"} for i, r in enumerate(read, 1)]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = 0 if config.val_path else config.val_set_size
    if held >= len(records):
        raise ValueError(f"val_set_size {held} leaves none of {len(records)} records to train on")
    taken = []
    for span, weight in spans:
        own = [i for i in order[held:] if i in span]              # in the drawn order: the first 0.5 n are a fair half
        taken += sorted((own * math.ceil(weight))[:round(weight * len(own))])
    if not taken:
        raise ValueError(f"data_path {' '.join(config.data_path)}: the weights leave no record of {len(records)}; raise them")
    val = read_instructions(config.val_path, answers=True) if config.val_path else [records[i] for i in order[:held]]
    return [records[i] for i in taken], val


def split_weight(argument):
    """("a.json", 0.5) of "a.json:0.5", and ("a.json", 1.0) of "a.json"."""
    match = re.fullmatch(r"(.+):(\d*\.?\d+)", argument)
    if not match or Path(argument).is_file():
        return argument, 1.0
    if not float(match[2]) > 0:
        raise ValueError(f"data_path {argument}: weight {match[2]}, wanted a number above 0")
    return match[1], float(match[2])


def print_stats(tokenizer, template, records):
    """The records in tokens, and what each cut-off would do to them: `--stats`. An answer's EOS is counted with it."""
    whole = TrainConfig(cutoff_len=10**9)
    rows = [row for r in records if (row := encode_example(tokenizer, template, r, whole))]
    prompts, lengths = [row.mask.index(True) for row in rows], [len(row.ids) for row in rows]
    answer, characters = sum(lengths) - sum(prompts), sum(len(r["output"]) for r in records)
    single = sum(tokenizer.pieces.is_byte(i) for row, n in zip(rows, prompts) for i in row.ids[n:])
    print(f"{len(rows):,} records, {sum(lengths):,} tokens: on average {sum(prompts) / len(rows):.0f} in the prompt, "
          f"{answer / len(rows):.0f} in the answer\n{answer / characters:.2f} tokens per character of the answers, "
          f"{single / answer:.1%} of them single bytes\ncutoff_len  answers cut       left out (no room for an answer)")
    for cutoff in (256, 320, 384, 512, 768, 1024):
        out = sum(n + 2 > cutoff for n in prompts)
        cut = sum(n > cutoff for n in lengths) - out
        print(f"{cutoff:>10}  {cut:>7,} ({cut / len(rows):6.1%})  {out:>6,} ({out / len(rows):6.1%})")


def encode_records(tokenizer, template, records, config):
    """(rows, their records) of the records that fit; prints how many were cut or left out."""
    pairs = [(encode_example(tokenizer, template, r, config), r) for r in records]
    kept = [(row, r) for row, r in pairs if row is not None]
    cut = sum(len(row.ids) > config.cutoff_len - 4 for row, _ in kept)                     # a cut ends before half a character
    print(f"{len(kept):,} records, {sum(len(row.ids) for row, _ in kept):,} tokens; at cutoff_len {config.cutoff_len} "
          f"at most {cut:,} answers cut (EOS kept), {len(pairs) - len(kept):,} records left out (no room)")
    if not kept:
        raise ValueError(f"no record fits into cutoff_len {config.cutoff_len}; raise it")
    return [row for row, _ in kept], [r for _, r in kept]


def shared_opening(rows):
    """Tokens that all rows begin with and that predict no target: the template's text, as a rule."""
    return min(len(os.path.commonprefix([row.ids for row in rows])), min(row.mask.index(True) for row in rows) - 1)


def collate(rows, device, share=True):
    """ids and labels (1, N) of rows end to end, and the PackedRows that keeps them apart: ids[t] predicts labels[t], -100
    where that is no target, by position and never by id. With share their common opening stands there once."""
    shared = shared_opening(rows) if share else 0
    opening = rows[0].ids[:shared]
    ids, labels = opening[:], [-100] * shared
    for row in rows:
        ids += row.ids[shared:-1]
        labels += [token if target else -100 for token, target in zip(row.ids[shared + 1:], row.mask[shared + 1:])]
    packed = PackedRows([len(row.ids) - 1 for row in rows], shared, device)
    ids, labels = (x + [fill] * (len(packed.back) - len(x)) for x, fill in ((ids, 0), (labels, -100)))
    return torch.tensor([ids], device=device), torch.tensor([labels], device=device), packed


def epoch_order(rows, config, epoch):
    """Row numbers in the order of an epoch: a function of seed and epoch alone, so a resumed run needs no history."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed + epoch)).tolist()
    if config.group_by_length:
        span = 50 * config.batch_size
        order = [i for at in range(0, len(order), span)
                 for i in sorted(order[at:at + span], key=lambda i: -len(rows[i].ids))]
    return order


def micro_batches(rows, size, budget):
    """Rows sorted by length and cut into micro-batches of at most `size` rows (0: any number) and, unless one row alone
    exceeds it, `budget` tokens as attention pads them. The sum over them is the same; rows of one length pad little."""
    cut = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if not cut or len(cut[-1]) == (size or math.inf) or (len(cut[-1]) + 1) * len(row.ids) > budget:
            cut.append([])
        cut[-1].append(row)
    return cut


def memory_needed(shape, config, dtype, tokens, targets, recomputed, wide=False):
    """Bytes that training allocates for a LLaMAConfig with `tokens` computed at once, `targets` of them predicted ones:
    weights; what is trained, float32, with its gradient and AdamW's two moments; activations kept for the gradient (of
    `recomputed` blocks the input alone); and the larger of two peaks: a chunk of logits, when every block's activations are
    there, or the gradient inside a feed-forward, when the last block's are gone; where products go wide, their casts."""
    C, F, V, L, s = shape.dim, shape.ffn_dim, shape.vocab_size, shape.n_layers, dtype.itemsize
    Q, K = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    linears = {"wq": (C, Q), "wk": (C, K), "wv": (C, K), "wo": (Q, C), "w1": (C, F), "w3": (C, F), "w2": (F, C)}   # (I, O)
    inside, outside = L * sum(i * o for i, o in linears.values()), (2 - shape.tie_embeddings) * V * C + (2 * L + 1) * C
    adapted = LoRAConfig(config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules).targets
    trained = tuple(linears) if config.full else adapted
    inputs = {group[0]: linears[group[0]][0] for group in (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",))
              if set(group) & set(trained)}                       # kept where a weight behind them is trained
    kept = s * (2 * C + 2 * Q + 2 * K + 2 * F + sum(inputs.values())) + 4 * (2 + shape.n_heads)    # a token and block
    logits = min(targets, max(64, 2**24 // V)) * V * (4 if s == 4 else 4 + 2 * s)
    if config.full:
        weights, state = 4 * (inside + outside), 12 * (inside + outside)
        logits += 8 * V * C + (s < 4) * s * inside                # the head's gradient, twice; the weights, cast
    else:
        each = {"int8": 1, "nf4": 0.516, "fp16": 2, "bf16": 2, "fp32": 4}.get(config.base_dtype, s)
        weights = each * inside + (each if each >= 2 else s) * outside
        if DTYPES.get(config.base_dtype, dtype) != dtype:         # autograd keeps what the products are given: the weights, cast
            weights += s * inside * max(L - recomputed, 1) / L
        state = 16 * L * config.lora_r * sum(sum(linears[name]) for name in adapted)
        kept += sum(s * config.lora_r + linears[name][0] * (config.lora_dropout > 0) for name in adapted)
    if config.shard:                                              # cut over the processes; two blocks gathered at a time
        weights, state = weights / processes()[1] + 2 * weights / L, state / processes()[1]
    kept -= wide * (s * Q + 4 * shape.n_heads)                    # attention made again keeps its inputs alone
    last = kept - (1 - targets / tokens) * s * (2 * F + C)        # whose feed-forward sees the targets alone
    whole = L - recomputed
    forward = tokens * (max(whole - 1, 0) * kept + (whole > 0) * last) + logits
    backward = tokens * (max(whole - 1, 1) * kept + s * (3 * F + 2 * C))
    casts = wide * 4 * F * (tokens + min(1024, C))
    return int(weights + state + tokens * recomputed * s * C + max(forward, backward) + casts)


def plan(shape, config, dtype, rows, device):
    """(micro_batch_tokens, blocks recomputed, bytes needed) with which training fits into the device's memory: as many
    tokens as pay, then as few blocks as possible. Raises ValueError naming a setting that fits, where none does as set."""
    total = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else
             os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    room = config.memory_gb * 2**30 or 0.92 * total               # the rest: CUDA's own, fragments, the interpreter
    wide = goes_wide(torch.empty(0, dtype=dtype, device=device))
    longest, share = max(len(row.ids) for row in rows), target_count(rows) / sum(len(row.ids) for row in rows)

    def first_fit(config):
        most = config.micro_batch_tokens or (8192 if device.type == "cuda" else 2048)
        sizes = [min(most, config.micro_batch_size * longest)] if config.micro_batch_size else \
            [most] if config.micro_batch_tokens else [most, most // 2, most // 4, longest]
        blocks = {"none": [0], "full": [shape.n_layers]}.get(config.recompute, range(shape.n_layers + 1))
        ways = [(max(tokens, longest), k) for some in (blocks[:1], blocks[1:]) for tokens in sizes for k in some]
        needs = [(*way, memory_needed(shape, config, dtype, way[0], math.ceil(way[0] * share), way[1], wide)) for way in ways]
        return next((n for n in needs if n[2] <= room), None), min(n[2] for n in needs)

    found, least = first_fit(config)
    if found:
        return found
    small = {"recompute": "auto", "micro_batch_size": 1}
    for change in ({"recompute": "auto"}, small, *({**small, "full": False, "base_dtype": b} for b in ("auto", "int8", "nf4"))):
        if (fits := first_fit(replace(config, **change))[0]):
            named = " ".join(f"--{k} {v}" for k, v in change.items() if v != getattr(config, k))
            raise ValueError(f"training needs {least / 2**30:.2f} GB, and {room / 2**30:.2f} GB of memory are planned for; "
                             f"{named} fits, with {fits[2] / 2**30:.2f} GB")
    raise ValueError(f"training needs {least / 2**30:.2f} GB, and {room / 2**30:.2f} GB of memory are planned for; no setting "
                     f"makes this base fit: take a smaller base, a lower --cutoff_len or another --device")


def lr_at(step, total, config):
    """Learning rate of step 0, 1, ...: linear warm-up to the peak, then linear to 0 at `total`."""
    warmup = min(config.warmup_steps, total // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total - step) / max(1, total - warmup)


class ChunkedLoss(torch.autograd.Function):
    """Cross-entropy summed over targets, from hidden states h (M, C): logits (chunk, V) are made, used and dropped a chunk
    at a time, and the gradients computed on the way: softmax(logits) - one-hot(label), back through the head."""

    @staticmethod
    def forward(ctx, h, labels, head, chunk, *parameters):
        total, grads = h.new_zeros((), dtype=torch.float32), []
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for part, label in zip(h.split(chunk), labels.unsqueeze(1).split(chunk)):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                out = head(part)
            p = out.detach().float()
            top, at = p.max(-1, keepdim=True)
            wanted = p.gather(-1, label)
            torch.softmax(p, -1, out=p)
            total += (top - wanted - p.gather(-1, at).log()).sum()                         # -log softmax(logits)[label]
            p.scatter_add_(-1, label, torch.full_like(wanted, -1.0))
            grad, *more = torch.autograd.grad(out, (part, *parameters), p.to(out.dtype))
            grads.append(grad)
            for a, b in zip(sums, more):
                a += b
        ctx.save_for_backward(torch.cat(grads), *sums)
        return total

    @staticmethod
    def backward(ctx, grad):
        h, *sums = ctx.saved_tensors
        return h * grad, None, None, None, *(a * grad for a in sums)


def loss_sum(model, ids, labels, rows=None):
    """Cross-entropy summed over the targets, float32. The last feed-forward and logits are made only where there is one,
    of the logits 16 million at a time."""
    labels = labels.flatten()
    keep = (labels != -100).nonzero().squeeze(1)
    chunk = max(64, 2**24 // model.config.vocab_size)
    h, labels = model.hidden(ids, rows, keep), labels[keep]                                # (targets, C), (targets,)
    if torch.is_grad_enabled():
        return ChunkedLoss.apply(h, labels, model.output, chunk, *(p for p in model.output.parameters() if p.requires_grad))
    return sum(F.cross_entropy(model.output(a).float(), b, reduction="sum") for a, b in zip(h.split(chunk), labels.split(chunk)))


def compile_blocks(model):
    """torch.compile each block, in place. The blocks share one code, which has more variants than dynamo keeps by itself: the
    first ones by number, the last, for validation, for recomputation."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.layers:
        block.compile(dynamic=True)


def join_processes(device):
    """Join the processes that torchrun started, if it did: NCCL, a GPU each by LOCAL_RANK, or gloo on CPUs. Only the first
    prints. Returns this process's device. Raises ValueError if there is no GPU for it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            if (at := int(os.environ["LOCAL_RANK"])) >= (found := torch.cuda.device_count()):
                raise ValueError(f"process {at + 1} of this machine wants a GPU of its own, and it has {found}; start "
                                 f"--nproc_per_node {found}")
            device = torch.device("cuda", at)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return device


def shard(model, device, dtype):
    """FSDP2: cut each block's weights over the processes, then those of the rest; they are gathered for their products
    and freed again. Moved to device and cast to dtype a block at a time: the base may be mapped, and exceed the device.
    Raises ValueError where torch cannot cut a quantised base."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = dist.init_device_mesh(device.type, (processes()[1],))
    for part in (*model.layers, model):
        place(part, device, dtype)
        try:
            fully_shard(part, mesh=mesh)
        except RuntimeError as error:                             # torch 2.11 takes floating-point parameters alone
            raise ValueError(f"torch {torch.__version__} cannot shard this base ({error}); an int8 or nf4 one wants torch 2.13, "
                             "any other version --base_dtype bf16") from None
    register_fsdp_forward_method(model, "hidden")


def part_of(tensor, parameter):
    """What of a whole tensor this process keeps where it holds a part of parameter."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def summed(number, device):
    """The sum of a number over the processes."""
    if not dist.is_initialized():
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def own_batches(rows, config):
    """This process's micro-batches as (rows, 1): every Nth row by length, so that all have as much to do. Where another
    process has more, (a row, 0) fills up: it counts for nothing, but a sharded model computes in step."""
    (rank, n), rows = processes(), sorted(rows, key=lambda row: len(row.ids))
    shares = [micro_batches(rows[at::n], config.micro_batch_size, config.micro_batch_tokens or 2048) for at in range(n)]
    fill = max(map(len, shares)) - len(shares[rank])
    return [(micro, 1) for micro in shares[rank]] + [(rows[:1], 0)] * fill


def target_count(rows):
    return sum(sum(row.mask) for row in rows)


def step_gradient(model, rows, config):
    """Backward through this process's part of one optimizer step's rows; return the loss per target token of all rows.
    Gradients add up in .grad, and then over the processes (FSDP2 does that itself, but takes the mean). In fp16 the loss
    is scaled, lest small gradients vanish, and the step is done again at half the scale if they overflow."""
    losses, count, (_, n) = [], target_count(rows), processes()
    scale = model.loss_scale if model.dtype == torch.float16 else 1.0
    for micro, counts in own_batches(rows, config):
        loss = loss_sum(model, *collate(micro, model.device, config.share_opening)) * counts / count
        (loss * (scale * n if config.shard else scale)).backward()
        losses.append(loss.detach())                              # a number asked for here would stop a GPU's queue
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if n > 1 and not config.shard:
        for grad in grads:
            dist.all_reduce(grad)
    total = summed(sum(loss.item() for loss in losses), model.device)
    if scale > 1:
        for grad in grads:
            grad.div_(scale)
        if math.isfinite(total) and not whole(torch.nn.utils.get_total_norm(grads)).isfinite():
            model.loss_scale /= 2
            model.zero_grad()
            return step_gradient(model, rows, config)
    return total


@torch.no_grad()
def evaluate(model, rows, config):
    """Loss per target token over rows, without dropout; no weight changes."""
    training = model.training
    model.eval()
    total = sum(loss_sum(model, *collate(micro, model.device, config.share_opening)).item() * counts
                for micro, counts in own_batches(rows, config))
    model.train(training)
    if config.shard:
        model.reshard()                                           # without a backward, FSDP2 keeps the outer weights whole
    return summed(total, model.device) / target_count(rows)


def draw_curve(history, path):
    """The loss curve as an SVG, which any browser opens: training loss in grey, validation in red, labelled axes."""
    points = [(r["step"], r["loss"]) for r in history]
    val = [(r["step"], r["val_loss"]) for r in history if "val_loss" in r]
    top, last = max(y for _, y in points + val) * 1.05 or 1.0, max(2, points[-1][0])
    place = [" ".join(f"{60 + 720 * (x - 1) / (last - 1):.1f},{360 - 330 * y / top:.1f}" for x, y in line)
             for line in (points, val)]
    ticks = "".join(f'<text x="52" y="{364 - 66 * i}" text-anchor="end">{top * i / 5:.2f}</text>'
                    f'<path d="M60 {360 - 66 * i}H780" stroke="#eee"/>' for i in range(6))
    dots = "".join(f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="#c00"/>' for p in place[1].split())
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 400" font-family="sans-serif" font-size="12">'
           f'<rect width="800" height="400" fill="#fff"/>{ticks}'
           f'<polyline points="{place[0]}" fill="none" stroke="#888"/><polyline points="{place[1]}" fill="none" '
           f'stroke="#c00" stroke-width="2"/>{dots}<text x="60" y="380">step 1</text><text x="780" y="380" '
           f'text-anchor="end">step {last}</text><text x="780" y="20" text-anchor="end">loss per target token: '
           f'training {points[-1][1]:.3f} (grey){f", validation {val[-1][1]:.3f} (red)" if val else ""}</text></svg>\n')
    write_atomically(path, lambda p: p.write_text(svg, encoding="utf-8"))


def save_weights(model, path, config, info):
    """Save what was trained: the adapter in PEFT's form, or with --full a base's folder. run.json, written last, says how
    it came about."""
    if config.full:
        save_model(model, path)
        if processes()[0]:
            return
        copy_tokenizer(find_base(config.base_model), path)
        write_json(Path(path) / "run.json", info)
    else:
        save_adapter(model, path, config.base_model, info, trained=True)


# settings that change no weight, or whose file's content counts and not its name
FREE = {"base_model", "data_path", "val_path", "prompt_template_name", "output_dir", "eval_steps", "save_steps", "stats",
        "save_total_limit", "memory_gb", "resume_from_checkpoint", "resume_anyway", "num_answers", "wandb_project",
        "wandb_run_name"}


def describe_run(config):
    """What run.json says of a run: settings, when it began, and SHA-256 of all that it is made from."""
    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    base = find_base(config.base_model)
    files = [*sum(weight_files(base)[0], []), find_tokenizer(base), *(base / name for name in (
        "params.json", "config.json", "added_tokens.json") if (base / name).is_file())] if config.base_model else []
    template = json.dumps(load_template(config.prompt_template_name), sort_keys=True)
    dtype = pick_dtype(config.dtype, pick_device(config.device))  # what auto is here: another machine may take another
    return {"config": asdict(config) | {"dtype": next(name for name in DTYPES if DTYPES[name] == dtype)},
            "torch": torch.__version__, "started": time.time(), "processes": int(os.environ.get("WORLD_SIZE", 1)), "sha256": {
        "base": [digest(file) for file in files],
        "data": [[weight, digest(path)] for path, weight in map(split_weight, config.data_path)],
        "validation": digest(config.val_path) if config.val_path else None,
        "template": hashlib.sha256(template.encode()).hexdigest()}}


def checkpoints(out):
    """{step: checkpoint-STEP folder} of a run, in order. transformers' Trainer has folders of that name too."""
    return dict(sorted((int(p.name[11:]), p) for p in Path(out).glob("checkpoint-*")
                       if p.name[11:].isdigit() and (p / "state.safetensors").is_file()))


def open_run(config):
    """(what run.json will say, the folder to go on from): a checkpoint, None for a new run, output_dir itself if the run
    there is finished. Raises ValueError if the checkpoint was made with other settings, base, data or template, or if a
    new run would begin beside the checkpoints of one that did not finish."""
    info, out, wanted = describe_run(config), Path(config.output_dir), config.resume_from_checkpoint
    last = next(reversed(checkpoints(out).values()), None) if config.output_dir else None
    result = read_json_file(out / "run.json") if config.output_dir and (out / "run.json").is_file() else {}
    latest = read_json_file(last / "run.json") if last else result
    folder = out if result and result.get("started") == latest.get("started") else last
    if wanted.lower() in ("", "false", "none"):
        if folder != out and last:
            raise ValueError(f"{last} is of a run that did not finish; go on with --resume_from_checkpoint auto, or give "
                             "another --output_dir")
        return info, None
    if wanted.lower() not in ("auto", "true"):
        folder = Path(wanted)
    elif not folder:
        print(f"no checkpoint in {out} yet; beginning with step 1")
        return info, None
    if folder != out and not (folder / "state.safetensors").is_file():
        raise ValueError(f"{folder} is no checkpoint (it has no state.safetensors); give a checkpoint-STEP folder, or auto")
    old, new = read_json_file(folder / "run.json"), json.loads(json.dumps(info))                  # tuples are lists there
    changed = [f"another {name}" for name, value in new["sha256"].items() if old["sha256"][name] != value]
    changed += [f"{name} {old['config'][name]!r}, not {value!r}" for name, value in new["config"].items()
                if name not in FREE and old["config"].get(name, value) != value]
    if old["processes"] != new["processes"]:
        changed.append(f"{old['processes']} processes, not {new['processes']}")
    if changed and not config.resume_anyway:
        raise ValueError(f"{folder} was made with {', '.join(changed)}; give what it was made with, or --resume_anyway")
    if changed:
        print(f"going on from {folder}, although it was made with {', '.join(changed)}")
        if not (folder := last if folder == out else folder):
            raise ValueError(f"{out} holds no checkpoint to go on from; begin anew without --resume_from_checkpoint")
    if not (changed and config.micro_batch_tokens):               # what `plan` chose stays
        config.micro_batch_tokens = old.get("tokens_at_once", config.micro_batch_tokens)
    return info | {key: old[key] for key in ("started", "step") if key == "step" or not changed}, folder   # changed: a run anew


def read_log(path):
    """The records of log.jsonl, without a last line that a kill cut short."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path}: {error}; put it right, or move it away") from None


def save_checkpoint(model, optimizer, history, config, info):
    """checkpoint-STEP/: the weights, and state.safetensors with what an exact continuation needs besides (float32
    parameters, AdamW's moments); the order of the data and dropout follow from seed and step. Written aside, brought to
    the disk, then renamed: at whatever moment a kill comes, each checkpoint-STEP is whole. Kept are the last
    save_total_limit and the best by validation loss; those ahead of STEP, left by a run that this one replaces, go. All
    processes call it; a sharded model's tensors are gathered, and the first process writes."""
    out, step, rank = Path(config.output_dir), history[-1]["step"], processes()[0]
    folder, final, state = out / f"checkpoint-{step}.new", out / f"checkpoint-{step}", {}
    for left in [*out.glob("checkpoint-*.new"), *out.glob("checkpoint-*.old")] if rank == 0 else []:
        shutil.rmtree(left)
    try:
        save_weights(model, folder, config, info | {"step": step, "loss_scale": model.loss_scale})
        for name, p in model.named_parameters():
            if p.requires_grad:
                for key, part in (("value", p.detach()), *((k, optimizer.state[p][k]) for k in ("exp_avg", "exp_avg_sq"))):
                    tensor = whole(part)
                    if rank == 0:
                        state[f"{name}/{key}"] = tensor.contiguous().cpu()
        if rank:
            return
        write_atomically(folder / "state.safetensors", lambda p: save_file(state, p))
    except OSError:                                               # a full disk
        shutil.rmtree(folder, ignore_errors=True)
        raise
    discard(final)
    folder.rename(final)
    sync(out)
    saved = checkpoints(out)
    best = min((r for r in history if "val_loss" in r), key=lambda r: r["val_loss"], default={}).get("step")
    for past in saved.keys() - {best, *[s for s in saved if s <= step][-config.save_total_limit:]}:         # [-0:] is all
        discard(saved[past])


def discard(folder):
    """Delete a checkpoint under another name: a half deleted checkpoint-STEP is never there to be gone on from."""
    if folder.is_dir():
        shutil.rmtree(folder.rename(f"{folder}.old"))


def resume(model, optimizer, folder):
    """Put a checkpoint's parameters and moments back; return its step."""
    made, state = read_json_file(folder / "run.json"), open_weights(folder / "state.safetensors")
    step, model.loss_scale = made["step"], made.get("loss_scale", model.loss_scale)
    for name, p in model.named_parameters():
        if p.requires_grad:
            if f"{name}/value" not in state or state[f"{name}/value"].shape != p.shape:
                raise ValueError(f"{folder} has no {name} of shape {tuple(p.shape)}; it belongs to another model")
            value, exp_avg, exp_avg_sq = (part_of(state[f"{name}/{key}"].to(p.device, copy=True), p)
                                          for key in ("value", "exp_avg", "exp_avg_sq"))
            with torch.no_grad():
                p.copy_(value)
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device),
                                  "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return step


@contextmanager
def signals_deferred():
    """Within it SIGTERM and Ctrl-C only put their number into the list that it yields, so that the step and its saving
    end first; a second one ends the process at once."""
    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more to stop at once\n")      # print is not made for handlers

    caught, main_thread = [], threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT) if main_thread}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_config(config):
    """Raise ValueError for a setting that cannot train."""
    for name in ("batch_size", "num_epochs", "learning_rate", "cutoff_len", "max_grad_norm"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)!r}, wanted a number above 0")
    if config.train_on not in ("last", "all"):
        raise ValueError(f"train_on is {config.train_on!r}, wanted last or all")
    if config.recompute not in ("none", "auto", "full"):
        raise ValueError(f"recompute is {config.recompute!r}, wanted none, auto or full")
    for name in ("micro_batch_size", "micro_batch_tokens", "memory_gb", "max_steps", "warmup_steps", "weight_decay",
                 "val_set_size", "eval_steps", "save_steps", "save_total_limit", "num_answers"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)!r}, wanted 0 or more")
    if Path(config.output_dir).is_file():
        raise ValueError(f"output_dir {config.output_dir} is a file, wanted a folder to make or to add to")
    if config.wandb_project and not find_spec("wandb"):
        raise ValueError("wandb_project asks for the package wandb: pip install wandb, or leave the option out")
    if config.compile and config.dtype == "fp16":                 # on an H200 3 % off where eager fp16 is 0.3 %
        raise ValueError("compile gives wrong gradients in fp16 on GPUs; drop --compile, or use --dtype bf16 or fp32")
    if config.full and config.base_dtype not in ("auto", "fp32"):
        raise ValueError(f"base_dtype {config.base_dtype} is for a frozen base, and --full trains the weights in fp32; "
                         "drop one of the two")
    if config.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ValueError("shard cuts the weights over processes, and there is one; start torchrun --nproc_per_node N train.py")


def train(config, model, data, start=None):
    """Train the parameters that require a gradient on data = (training rows, validation rows); return one record per
    step: step, epoch, loss (per target token), lr, grad_norm, tokens (real ones), seconds, tokens_per_second, and
    val_loss where it was measured. With output_dir set, logs, checkpoints and the result land there; `start` is what
    `open_run` made of config, if it was asked before. Raises ValueError naming the step when the loss is not finite (and
    the rows) or a file cannot be written; the checkpoints before it stay whole. SIGTERM and Ctrl-C end the step, save a
    checkpoint and raise SystemExit with 128 + the signal's number, as shells count: 0 is a finished run's alone."""
    check_config(config)
    rows, val_rows = data
    info, folder = start or open_run(config)
    out, (rank, n) = Path(config.output_dir) if config.output_dir else None, processes()
    if out and folder == out:                                     # finished
        return read_log(out / "log.jsonl")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    per_epoch = -(-len(rows) // config.batch_size)
    total = min(config.max_steps or math.inf, per_epoch * config.num_epochs)
    step = done = first = resume(model, optimizer, folder) if folder else 0
    if first >= total:
        raise ValueError(f"{folder} is of step {first}, and this run ends with step {total}; raise --num_epochs or --max_steps")
    history = [r for r in read_log(folder.parent / "log.jsonl") if r["step"] <= first] if folder else []
    log = tracker = None
    if out and rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in history)
        write_atomically(out / "log.jsonl", lambda p: p.write_text(lines, encoding="utf-8"))
        log = open(out / "log.jsonl", "a", encoding="utf-8")
    if config.wandb_project and rank == 0:
        import wandb
        tracker = wandb.init(project=config.wandb_project, name=config.wandb_run_name or None, config=asdict(config))
    model.train()
    bar = tqdm(range(first, total), initial=first, total=total, unit="step", dynamic_ncols=True, disable=rank > 0)
    with signals_deferred() as caught:
        try:
            for step in bar:
                started, epoch = time.time(), step // per_epoch
                if step == first or step % per_epoch == 0:
                    order = epoch_order(rows, config, epoch)
                at = step % per_epoch * config.batch_size
                chosen = order[at:at + config.batch_size]
                batch = [rows[i] for i in chosen]
                lr = optimizer.param_groups[0]["lr"] = lr_at(step, total, config)
                torch.manual_seed((config.seed * 1_000_003 + step * n + rank) % 2**63)     # of dropout: no state to save
                loss = step_gradient(model, batch, config)
                norm = whole(clip_grad_norm_(parameters, config.max_grad_norm)).item()
                if not math.isfinite(loss) or not math.isfinite(norm):
                    bad = [i for i in chosen if not math.isfinite(evaluate(model, [rows[i]], config))] or chosen
                    raise ValueError(f"loss {loss}, gradient norm {norm}, from rows "
                                     f"{', '.join(f'{i} ({rows[i].name})' for i in bad[:9])}{' ...' * (len(bad) > 9)}; "
                                     "look at them, lower --learning_rate or use --dtype fp32")
                optimizer.step()
                optimizer.zero_grad()
                done, seconds, tokens = step + 1, time.time() - started, sum(len(row.ids) for row in batch)
                record = {"step": done, "epoch": round(done / per_epoch, 4), "loss": loss, "lr": lr, "grad_norm": norm,
                          "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
                best = min((r["val_loss"] for r in history if "val_loss" in r), default=math.inf)
                if val_rows and (done == total or config.eval_steps and done % config.eval_steps == 0):
                    record["val_loss"] = evaluate(model, val_rows, config)
                history.append(record)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", tok_s=f"{tokens / seconds:,.0f}")
                if log:
                    print(json.dumps(record), file=log, flush=True)
                if tracker:
                    tracker.log(record, step=done)
                due = config.save_steps and (done % config.save_steps == 0 or record.get("val_loss", math.inf) < best)
                stopping = summed(len(caught), model.device) and done < total         # all processes at the same step
                if out and done < total and (due or stopping):
                    if log:
                        os.fsync(log.fileno())                    # it has all steps of a checkpoint
                    save_checkpoint(model, optimizer, history, config, info)
                if stopping:
                    break
            model.eval()
            if log and history:
                draw_curve(history, out / "loss.svg")
            if out and done == total:
                save_weights(model, out, config, info | {"step": total})
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if not (reason := out_of_memory(error)) and isinstance(error, RuntimeError):
                raise
            reason += "; lower --memory_gb or --micro_batch_tokens" * bool(reason)
            good = next(reversed(checkpoints(out).values()), None) if out else None
            raise ValueError(f"step {min(step + 1, total)}: {reason or error}. " + (
                f"{good} is whole: --resume_from_checkpoint auto" if good else "Nothing was saved before it")) from None
        finally:
            bar.close()
            with suppress(OSError):                               # of a full disk, which the error above has named
                if log:
                    log.close()
            if tracker:
                tracker.finish()
    if done < total:
        if rank == 0:
            print(f"stopped after step {done} of {total}" + ", saved; go on with --resume_from_checkpoint auto" * bool(out))
        raise SystemExit(128 + (caught or [signal.SIGTERM])[0])
    return history


def named(text, terms):
    """The terms that stand in text somewhere not inside a longer one (四逆汤 is not named by 当归四逆汤)."""
    spans = [(m.start(), m.start() + len(t), t) for t in terms if t and t in text for m in re.finditer(f"(?={re.escape(t)})", text)]
    return {t for a, b, t in spans if not any(c <= a and b <= d and d - c > b - a for c, d, _ in spans)}


def facts_recalled(records, answers):
    """Share of the knowledge base's values that the answers name, over the records that carry `values`: one counts where
    it stands by itself, not inside its entity's name or a longer value of records that ask for the same relations."""
    asked, hits = {}, []
    for r in records:
        asked.setdefault(str(r.get("relations")), set()).update(r.get("values", []))
    for r, answer in zip(records, answers):
        said = named(answer, {*asked[str(r.get("relations"))], r.get("entity")})
        hits += [value in said for value in r.get("values", [])]
    return sum(hits) / len(hits) if hits else None


def answer_all(model, tokenizer, template, records, label):
    """Greedy answers to the records' questions, as texts. Each process answers its share and receives the others'."""
    rank, n = processes()
    tasks = [(tokenizer.encode(render_prompt(template, r["instruction"], r["input"]), bos=True), Decoding(max_new_tokens=128))
             for r in records[rank::n]]
    own = [""] * len(tasks)
    for i, _, text in tqdm(answer_batch(model, tokenizer, tasks, 32), desc=label, total=len(tasks), unit="answer",
                           dynamic_ncols=True, disable=rank > 0):
        own[i] = text
    shares = [own] * n
    if n > 1:
        dist.all_gather_object(shares, own)
    return [shares[i % n][i // n] for i in range(len(records))]


def parse_config():
    """The TrainConfig of the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    for f in fields(TrainConfig):
        kind = {"nargs": "?", "const": True, "type": flag} if f.type is bool else \
               {"nargs": "+", "type": str} if f.type is tuple else {"type": f.type}
        default = " ".join(f.default) if f.type is tuple else f.default
        parser.add_argument(f"--{f.name}", default=SUPPRESS, help=f"{f.metadata['help']} (default: {default})".replace("%", "%%"),
                            **kind)
    args = vars(parser.parse_args())                              # only what was given
    if "lora_target_modules" in args:                             # q_proj v_proj, q_proj,v_proj, '["q_proj","v_proj"]'
        args["lora_target_modules"] = tuple(" ".join(args["lora_target_modules"]).translate(
            str.maketrans("[](),'\"", " " * 7)).split())
    if args.get("base_model"):
        return TrainConfig(**args)
    val = {"val_path": ""} if "val_set_size" in args else {}
    return TrainConfig(**TINY | val | args | {"base_model": TINY["base_model"]})


def main():
    config = parse_config()
    check_config(config)
    if not config.output_dir:
        raise ValueError("output_dir is empty; give a folder for the result")
    lora = LoRAConfig(config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    template = load_template(config.prompt_template_name)
    records, val_records = read_data(config)
    tokenizer = Tokenizer(find_tokenizer(find_base(config.base_model)))
    if config.stats:
        return print_stats(tokenizer, template, records + val_records * (not config.val_path))
    start = open_run(config)
    if start[1] == Path(config.output_dir):
        return print(f"the run in {config.output_dir} is finished, {start[0]['step']} steps; nothing is left to do")
    device = join_processes(pick_device(config.device))
    rows, _ = encode_records(tokenizer, template, records, config)
    val_rows, val_records = encode_records(tokenizer, template, val_records, config) if val_records else ([], [])
    shape, dtype = open_checkpoint(find_base(config.base_model))[0], pick_dtype(config.dtype, device)
    config.micro_batch_tokens, recomputed, need = plan(shape, config, dtype, rows + val_rows, device)
    start[0]["tokens_at_once"] = config.micro_batch_tokens
    print(f"memory: {need / 2**30:.2f} GB by the estimate, with at most {config.micro_batch_tokens:,} tokens at once and "
          f"{recomputed} of {shape.n_layers} blocks recomputed")
    storage = torch.float32 if config.full else DTYPES.get(config.base_dtype, dtype)
    if config.shard:                                              # mapped, as stored; `shard` casts a block at a time
        model, _ = load_base(config.base_model, "cpu", None, "auto" if config.base_dtype in DTYPES else config.base_dtype)
    else:
        model, _ = load_base(config.base_model, device, storage, config.base_dtype)
    model.compute_dtype = dtype
    print(f"base {config.base_model}: {sum(p.nbytes for p in model.parameters()) / 2**20:,.1f} MiB of weights on {device}, "
          f"computing in {dtype}")
    torch.manual_seed(config.seed)
    if config.full:
        model.requires_grad_(True)
    else:
        wrapped = add_lora(model, lora)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"LoRA r {lora.r}, alpha {lora.alpha:g} on {wrapped} linears ({' '.join(lora.targets)}): {trained:,} trained")
    model.recomputed = recomputed
    if config.compile:
        compile_blocks(model)
    if config.shard:
        shard(model, device, storage)
    print(f"{config.num_epochs} epochs of {len(rows):,} rows, {config.batch_size} rows a step, learning rate "
          f"{config.learning_rate:g}")
    every = max(1, len(val_records) // max(1, config.num_answers))
    questions = [] if config.shard else val_records[::every][:config.num_answers]   # token by token, gathering is too slow
    before = answer_all(model, tokenizer, template, questions, "answers before") if questions else []
    history = train(config, model, (rows, val_rows), start)
    after = answer_all(model, tokenizer, template, questions, "answers after") if questions else []
    if processes()[0]:
        return
    for record, old, new in list(zip(questions, before, after))[::max(1, len(questions) // 3)][:3]:
        print(f"\n问题 {record['instruction']}\n  参考 {record['output']}\n  调前 {old!r:.120}\n  调后 {new}")
    lines = "".join(json.dumps({**r, "before": b, "after": a}, ensure_ascii=False) + "\n"
                    for r, b, a in zip(questions, before, after))
    write_atomically(Path(config.output_dir) / "answers.jsonl", lambda p: p.write_text(lines, encoding="utf-8"))
    tokens, seconds = sum(r["tokens"] for r in history), sum(r["seconds"] for r in history)
    print(f"\n{len(history)} steps, {tokens:,} real tokens in {seconds:.0f} s ({tokens / seconds:,.0f} tokens/s), loss "
          f"{history[0]['loss']:.3f} -> {history[-1]['loss']:.3f}"
          + (f", validation {history[-1]['val_loss']:.3f}" if "val_loss" in history[-1] else ""))
    if (share := facts_recalled(questions, after)) is not None:
        print(f"facts recalled on {len(questions)} held-out questions: base {facts_recalled(questions, before):.1%}, "
              f"tuned {share:.1%}")
    print(f"saved in {config.output_dir}: {'model' if config.full else 'adapter'}, log.jsonl, loss.svg, answers.jsonl")


if __name__ == "__main__":
    run(main)
