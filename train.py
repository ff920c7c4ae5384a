"""Instruction tuning of a LLaMA, with the loss on the answer alone: by LoRA, or of all weights.

  python train.py                                          the base in data/tiny, settings of TINY
  python train.py --base_model DIR --data_path FILE ...    yours, with alpaca-lora's defaults
  torchrun --nproc_per_node N train.py ...                 the same on N GPUs, or N CPU processes

What this file teaches, in this order:

  targets   encode_example: a record becomes token ids and a mask of those to predict
  packing   collate: rows of unequal length end to end, without padding
  loss      loss_sum: cross-entropy summed over the targets, a chunk of logits at a time
  step      step_gradient: (summed loss) / (number of targets), however rows are cut into batches
  loop      train: gradient, AdamW, validation, record, checkpoint

Below the lesson stand the folder of a run and exact resumption, memory, many processes, reading
data, answers before and after, settings, and the command.

Letters: T tokens of a row, N tokens of a packed stream, M targets, C hidden size, V vocabulary.

Where each dtype stands: activations are in --dtype, a frozen base is stored in --base_dtype; what
is trained, its gradient, AdamW's two moments, logits and loss are float32.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from generate import (
    DATA,
    Decoding,
    answer_batch,
    bot_spans,
    load_base,
    load_template,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_instructions,
    render_prompt,
)
from lora import QUANTISED, LoRAConfig, add_lora, place, quantize, save_adapter
from model import (
    DTYPES,
    Checkpoint,
    LLaMA,
    PackedRows,
    Parser,
    check_settings,
    find_base,
    find_tokenizer,
    fsync,
    full_tensor,
    open_weights,
    out_of_memory,
    processes,
    read_json_file,
    run,
    save_model,
    setting,
    weight_files,
    write_atomically,
    write_json,
)

# --------------------------------------------------------------------------------------------------
# Targets: which tokens the model is to predict


class Row(NamedTuple):
    """A record as token ids; mask[t] is True where token t is a target."""

    ids: list
    mask: list
    name: str = ""  # of its record: file:number


def encode_example(tokenizer, template, record, config):
    """The Row of a record: BOS, prompt, answer, EOS. None if cutoff_len leaves no room for one
    token of the answer.

    The answer and EOS are targets. EOS is one even where the answer is cut: it is how a model
    learns to stop."""
    text = render_prompt(template, record["instruction"], record["input"])
    prompt = tokenizer.encode(text, bos=True)
    room = config.cutoff_len - len(prompt) - 1
    answer = cut_answer(tokenizer, tokenizer.encode_answer(record["output"]), room)
    if not answer:
        return None
    mask = [config.train_on_inputs] * len(prompt)
    mask[0] = False  # nothing predicts BOS
    if config.train_on == "all":
        mark_earlier_answers(mask, tokenizer, prompt, text, record["instruction"])
    mask += [True] * (len(answer) + 1)
    return Row(prompt + answer + [tokenizer.eos_id], mask, record.get("record", ""))


def cut_answer(tokenizer, answer, room):
    """At most `room` of an answer's tokens, never ending inside a character: three byte tokens may
    make one."""
    if len(answer) <= room:
        return answer
    answer = answer[: max(room, 0)]
    while answer and tokenizer.decode(answer).endswith("\ufffd"):
        answer.pop()
    return answer


def mark_earlier_answers(mask, tokenizer, prompt, text, instruction):
    """Make the earlier answers of a conversation targets, where they stand in the prompt. What ends
    one there is the next " <user>:", which is no target: a model that learnt it would write the
    user's next question."""
    ends = tokenizer.byte_ends(prompt, text)  # where each token ends, in bytes
    offset = text.index(instruction)
    for start, stop in bot_spans(instruction):  # in characters of the instruction
        first, last = (len(text[: offset + at].encode()) for at in (start, stop))
        for t in range(1, len(prompt)):
            if ends[t] > first and ends[t - 1] < last:
                mask[t] = True


def target_count(rows):
    return sum(sum(row.mask) for row in rows)


# --------------------------------------------------------------------------------------------------
# Packing: the rows of a step, and how they are computed together


def epoch_order(rows, config, epoch):
    """Row numbers in the order of an epoch. A function of seed and epoch alone, so that a resumed
    run needs no history."""
    generator = torch.Generator().manual_seed(config.seed + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    if not config.group_by_length:
        return order
    span, grouped = 50 * config.batch_size, []
    for start in range(0, len(order), span):
        grouped += sorted(order[start : start + span], key=lambda i: -len(rows[i].ids))
    return grouped


def steps(rows, config, first):
    """Yield (step, epoch, its rows) from step `first` to the last, counted from 0."""
    per_epoch = math.ceil(len(rows) / config.batch_size)
    for step in range(first, total_steps(rows, config)):
        epoch, position = divmod(step, per_epoch)
        if step == first or position == 0:
            order = epoch_order(rows, config, epoch)
        start = position * config.batch_size
        batch = [rows[i] for i in order[start : start + config.batch_size]]
        yield step, round((step + 1) / per_epoch, 4), batch


def total_steps(rows, config):
    count = config.num_epochs * math.ceil(len(rows) / config.batch_size)
    return min(count, config.max_steps or count)


def micro_batches(rows, size, budget):
    """Rows sorted by length and cut into micro-batches of at most `size` rows (0: any number) and
    of `budget` tokens as attention pads them, unless one row alone is longer. The sum over a step
    is the same however it is cut; rows of like length pad little."""
    batches = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        last = batches[-1] if batches else []
        if not last or len(last) == size or (len(last) + 1) * len(row.ids) > budget:
            last = []
            batches.append(last)
        last.append(row)
    return batches


def shared_opening(rows):
    """How many tokens all rows begin with that predict no target: the template's text, as a rule.
    Computed once, they save 38 of a row's 210 in BenTsao's data."""
    common = len(os.path.commonprefix([row.ids for row in rows]))
    return min(common, min(row.mask.index(True) for row in rows) - 1)


def collate(rows, device, share=True):
    """Rows end to end in one stream: ids (1, N), labels (1, N), and the PackedRows that keeps
    attention inside each row. ids[t] predicts labels[t], which is -100 where that is no target:
    by position, never by id. With share, the common opening stands there once.

    Two rows, a b c D E and a b x Y, whose targets are the capitals:

      ids       a     b     c     D     x
      labels   -100  -100   D     E     Y

    A row's last token predicts nothing and is left out."""
    shared = shared_opening(rows) if share else 0
    ids, labels = rows[0].ids[:shared], [-100] * shared
    for row in rows:
        ids = ids + row.ids[shared:-1]
        pairs = zip(row.ids[shared + 1 :], row.mask[shared + 1 :])
        labels += [token if is_target else -100 for token, is_target in pairs]
    packed = PackedRows([len(row.ids) - 1 for row in rows], shared, device)
    idle = packed.back.numel() - len(ids)
    ids = torch.tensor([ids + [0] * idle], device=device)
    return ids, torch.tensor([labels + [-100] * idle], device=device), packed


# --------------------------------------------------------------------------------------------------
# Loss

CHUNK = 2**23  # logits made at once: 32 MB


def loss_sum(model, ids, labels, packed, scale=None):
    """Cross-entropy summed over the M targets, float32. With a scale, the gradient of scale * loss
    is added to .grad.

    The logits (M, V) of all targets would be the largest tensor of a step. They are made a chunk at
    a time, and each chunk is differentiated down to its hidden states before the next is made."""
    labels = labels.flatten()
    targets = (labels != -100).nonzero().squeeze(1)
    h = model.hidden_states(ids, packed, keep=targets)  # (M, C)
    top = h.detach().requires_grad_(scale is not None)
    size = max(64, CHUNK // model.config.vocab_size)
    total = torch.zeros((), device=h.device)
    for part, label in zip(top.split(size), labels[targets].split(size)):
        loss = F.cross_entropy(model.lm_head(part).float(), label, reduction="sum")
        total += loss.detach()
        if scale is not None:
            (loss * scale).backward()
    if scale is not None:
        h.backward(top.grad)  # from the hidden states down through the network
    return total


# --------------------------------------------------------------------------------------------------
# Step: the gradient of all its rows


@dataclass
class Limits:
    """What a step may turn out to exceed: the limit is halved then, and the step made again."""

    tokens_at_once: int = 0  # in a micro-batch, by memory; 0: not planned
    loss_scale: float = 2.0**16  # by the greatest number of fp16, 65,504


def step_gradient(model, rows, config, limits=None):
    """Add up, in .grad, the gradient of the loss per target token of all rows of an optimizer step;
    return that loss.

    Each micro-batch's summed loss is divided by the targets of the whole step. So every token
    weighs the same, and the gradient does not depend on how rows are cut into micro-batches or
    spread over processes. In fp16 the loss is scaled, lest small gradients vanish."""
    limits = limits or Limits(config.micro_batch_tokens)
    count, losses = target_count(rows), []
    scale = limits.loss_scale if model.dtype == torch.float16 else 1.0
    for micro, weight in own_batches(rows, config, limits):
        batch = collate(micro, model.device, config.share_opening)
        loss = loss_sum(model, *batch, weight * scale * gradient_factor(config) / count)
        losses.append(loss * weight)  # asking for the number here would stop a GPU's queue
    loss = sum_over_processes(sum(losses).item() / count, model.device)
    gradients = add_over_processes(model, config)
    if scale != 1:
        for gradient in gradients:
            gradient.div_(scale)
        if math.isfinite(loss) and not full_tensor(get_total_norm(gradients)).isfinite():
            limits.loss_scale /= 2
            model.zero_grad()
            return step_gradient(model, rows, config, limits)
    return loss


@torch.no_grad()
def evaluate(model, rows, config, limits=None):
    """Loss per target token over rows, without dropout; no weight changes."""
    limits = limits or Limits(config.micro_batch_tokens)
    training, losses = model.training, []
    model.eval()
    for micro, weight in own_batches(rows, config, limits):
        batch = collate(micro, model.device, config.share_opening)
        losses.append(loss_sum(model, *batch).item() * weight)
    model.train(training)
    if config.shard:
        model.reshard()  # which FSDP2 does by itself in a backward alone
    return sum_over_processes(sum(losses), model.device) / target_count(rows)


# --------------------------------------------------------------------------------------------------
# Loop


def lr_at(step, total, config):
    """Learning rate of step 0, 1, ...: linear warm-up to the peak, then linear to 0 at `total`."""
    warmup = min(config.warmup_steps, total // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total - step) / max(1, total - warmup)


def train(config, model, data, run=None):
    """Train what requires a gradient on data = (training rows, validation rows). Return one record
    per step: step, epoch, loss (per target token), lr, grad_norm, tokens, seconds,
    tokens_per_second, and val_loss where it was measured.

    With output_dir, log, checkpoints and result land there (`Run`). Raises ValueError naming the
    step for a loss that is not finite, memory that ran out or a file that cannot be written; and
    SystemExit with 128 + its number, as shells count, for SIGTERM or Ctrl-C, once the step is made
    and saved."""
    check_config(config)
    run = run or Run(config)
    if run.finished:
        return run.history
    rows, val_rows = data
    total = total_steps(rows, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)
    first = run.begin(model, optimizer)
    model.train()
    with stop_signals() as caught, run.errors_named(), progress_bar(first, total) as bar:
        for step, epoch, batch in steps(rows, config, first):
            run.step, started = step + 1, time.time()
            seed_dropout(step, config)

            # Forward and backward of all rows, then one step of AdamW.
            loss = gradient_that_fits(model, batch, config, run.limits)
            norm = full_tensor(clip_grad_norm_(parameters, config.max_grad_norm)).item()
            check_finite(model, batch, loss, norm, config)
            lr = optimizer.param_groups[0]["lr"] = lr_at(step, total, config)
            optimizer.step()
            optimizer.zero_grad()

            # What is known of the step; a validation and a checkpoint where they are due.
            record = {"step": step + 1, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm}
            record |= speed(batch, started)
            if val_rows and (step + 1 == total or is_multiple(step + 1, config.eval_steps)):
                record["val_loss"] = evaluate(model, val_rows, config, run.limits)
            run.log(record)
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{record['tokens_per_second']:,.0f}")
            bar.update()
            stopping = sum_over_processes(len(caught), model.device)  # all at the same step
            if step + 1 < total and (stopping or run.is_due(record)):
                run.save(model, optimizer)
            if stopping:
                break
        model.eval()
        run.finish(model, total)
    if run.step < total:
        print(f"stopped after step {run.step} of {total}; go on with --resume_from_checkpoint auto")
        raise SystemExit(128 + (caught or [signal.SIGTERM])[0])
    return run.history


def seed_dropout(step, config):
    """Dropout's masks follow from the seed, the step and the process: there is no state to save."""
    rank, n = processes()
    torch.manual_seed((config.seed * 1_000_003 + step * n + rank) % 2**63)


def check_finite(model, batch, loss, norm, config):
    """Raise ValueError naming the rows whose own loss is not finite, or else all of the batch."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    bad = [row for row in batch if not math.isfinite(evaluate(model, [row], config))] or batch
    names = ", ".join(row.name for row in bad[:9]) + " ..." * (len(bad) > 9)
    raise ValueError(
        f"loss {loss}, gradient norm {norm}, from rows {names}; look at them, lower "
        "--learning_rate or use --dtype fp32"
    )


def speed(batch, started):
    tokens, seconds = sum(len(row.ids) for row in batch), time.time() - started
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def is_multiple(step, every):
    return every > 0 and step % every == 0


def progress_bar(first, total):
    rank, _ = processes()
    return tqdm(initial=first, total=total, unit="step", dynamic_ncols=True, disable=rank > 0)


# ==================================================================================================
# The folder of a run, and exact resumption

# Settings that may differ when a run goes on: they change no weight beyond the last bits, or their
# file's content is compared and not its name.
NOT_COMPARED = {
    *("base_model", "data_path", "val_path", "prompt_template_name", "output_dir"),
    *("micro_batch_tokens", "recompute", "device", "memory_gb"),
    *("eval_steps", "save_steps", "save_total_limit", "num_answers"),
    *("resume_from_checkpoint", "wandb_project", "wandb_run_name"),
}


class Run:
    """The folder of a run.

      log.jsonl           one record per step
      checkpoint-STEP/    the adapter (or model), and state.safetensors: to go on from bit for bit
      adapter or model    the result
      run.json            settings, versions, SHA-256 of base and data; written last, it says that
                          what stands beside it is whole

    Each checkpoint is written aside and renamed when it is whole, so a kill at any moment leaves
    what was whole before. Of many processes the first writes."""

    def __init__(self, config):
        """Find where to start: at the beginning, at a checkpoint, or not at all (`finished`).
        Raises ValueError naming what differs from the run that is gone on with."""
        self.config, self.info = config, describe_run(config)
        self.folder = Path(config.output_dir) if config.output_dir else None
        self.limits = Limits(config.micro_batch_tokens)
        self.step, self.history, self.wandb = 0, [], None
        self.start = self.find_start()
        self.finished = self.start is not None and self.start == self.folder
        if self.start:
            self.go_on_from(self.start)

    @property
    def writes(self):
        return self.folder is not None and processes()[0] == 0

    def find_start(self):
        """The folder to go on from: a checkpoint; the run's own if it is finished; else None."""
        last = last_checkpoint(self.folder)
        latest, result = read_info(last or self.folder), read_info(self.folder)
        # A result older than the last checkpoint is that of a run which this one replaces.
        finished = bool(latest) and latest.get("started") == result.get("started")
        wanted = self.config.resume_from_checkpoint
        if wanted.lower() in ("", "false", "none"):
            if last and not finished:
                raise ValueError(
                    f"{last} is of a run that did not finish; go on with --resume_from_checkpoint "
                    "auto, or give another --output_dir"
                )
            return None
        if wanted.lower() in ("auto", "true"):
            start = self.folder if finished else last
            if not start:
                print(f"no checkpoint in {self.folder} yet; beginning with step 1")
            return start
        start = Path(wanted)
        if not is_checkpoint(start) and not (finished and start == self.folder):
            raise ValueError(
                f"{start} is no checkpoint (it has no state.safetensors); give a checkpoint-STEP "
                "folder, or auto"
            )
        return start

    def go_on_from(self, start):
        """Take over the history and the limits of a run with the same settings."""
        made = read_json_file(start / "run.json")
        compare_runs(start, made, self.info)
        self.info["started"] = made["started"]
        # The same tokens at once add gradients up in the same order, unless others are asked for.
        if self.config.micro_batch_tokens in (0, made["config"]["micro_batch_tokens"]):
            self.limits.tokens_at_once = made["tokens_at_once"]
        self.limits.loss_scale = made["loss_scale"]
        log = (start if self.finished else start.parent) / "log.jsonl"
        self.history = [record for record in read_log(log) if record["step"] <= made["step"]]

    def begin(self, model, optimizer):
        """Restore model and optimizer, cut the log back to where they stand; return the first
        step."""
        first = restore(model, optimizer, self.start) if self.start else 0
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_lines(self.folder / "log.jsonl", self.history)
        if self.config.wandb_project and processes()[0] == 0:
            import wandb

            self.wandb = wandb.init(
                project=self.config.wandb_project,
                name=self.config.wandb_run_name or None,
                config=asdict(self.config),
            )
        return first

    def log(self, record):
        self.history.append(record)
        if self.writes:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["step"])

    def is_due(self, record):
        """A checkpoint every save_steps, and at each new best validation loss."""
        every = self.config.save_steps
        best = min((r["val_loss"] for r in self.history[:-1] if "val_loss" in r), default=math.inf)
        is_best = record.get("val_loss", math.inf) < best
        return every > 0 and (is_best or record["step"] % every == 0)

    def save(self, model, optimizer):
        """Write checkpoint-STEP. All processes call it: a sharded model's tensors are gathered."""
        if not self.folder:
            return
        step = self.history[-1]["step"]
        final, aside = (self.folder / f"checkpoint-{step}{end}" for end in ("", ".new"))
        if self.writes:
            for leftover in self.folder.glob("checkpoint-*.[no][el][wd]"):
                shutil.rmtree(leftover)
        try:
            self.save_weights(model, aside, step)
            state = training_state(model, optimizer)
            if not self.writes:
                return
            write_atomically(aside / "state.safetensors", lambda path: save_file(state, path))
        except OSError:  # a full disk
            shutil.rmtree(aside, ignore_errors=True)
            raise
        fsync(self.folder / "log.jsonl")  # it has all steps so far
        discard(final)
        aside.rename(final)
        fsync(self.folder)
        self.discard_old_checkpoints(step)

    def save_weights(self, model, folder, step):
        """Write what was trained, the adapter in PEFT's form or with --full a base's folder, and
        then run.json, which says how it came about."""
        info = self.info | asdict(self.limits) | {"step": step}
        if not self.config.full:
            save_adapter(model, folder, self.config.base_model, info, trained=True)
            return
        save_model(model, folder, find_base(self.config.base_model))
        if self.writes:
            write_json(folder / "run.json", info)

    def discard_old_checkpoints(self, step):
        """Keep the best and the last save_total_limit. Those ahead of `step` go: the run has gone
        back to an earlier one."""
        validated = [record for record in self.history if "val_loss" in record]
        saved = checkpoints(self.folder)
        kept = [s for s in saved if s <= step][-self.config.save_total_limit :]  # [-0:] is all
        if validated:
            kept.append(min(validated, key=lambda record: record["val_loss"])["step"])
        for past in saved.keys() - set(kept):
            discard(saved[past])

    def finish(self, model, total):
        """Draw the loss curve and, if all steps are made, write the result."""
        if self.writes and self.history:
            draw_curve(self.history, self.folder / "loss.svg")
        if self.folder and self.step == total:
            self.save_weights(model, self.folder, total)

    @contextmanager
    def errors_named(self):
        """Make one line of an error that the user can mend: step, reason, last checkpoint."""
        try:
            yield
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            reason = str(error)
            if out_of_memory(error):
                reason = f"{out_of_memory(error)}; lower --micro_batch_tokens or --memory_gb"
            elif isinstance(error, RuntimeError):
                raise  # a bug: with its traceback
            last = last_checkpoint(self.folder)
            advice = "Nothing was saved before it"
            if last:
                advice = f"{last} is whole: --resume_from_checkpoint auto"
            raise ValueError(f"step {self.step}: {reason}. {advice}") from None
        finally:
            if self.wandb:
                self.wandb.finish()


def describe_run(config):
    """What run.json says of a run: settings, versions, and SHA-256 of all that it is made from."""

    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    base_files = []
    if config.base_model:
        base = find_base(config.base_model)
        shapes = [base / f"{name}.json" for name in ("config", "params", "added_tokens")]
        base_files = [*weight_files(base), find_tokenizer(base), *filter(Path.is_file, shapes)]
    template = json.dumps(load_template(config.prompt_template_name), sort_keys=True)
    dtype = pick_dtype(config.dtype, pick_device(config.device))  # what auto means here
    dtype_name = next(name for name in DTYPES if DTYPES[name] == dtype)
    return {
        "config": asdict(config) | {"dtype": dtype_name},
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "torch": torch.__version__,
        "started": time.time(),
        "sha256": {
            "base": [digest(file) for file in base_files],
            "data": [[w, digest(path)] for path, w in map(split_weight, config.data_path)],
            "validation": digest(config.val_path) if config.val_path else None,
            "template": hashlib.sha256(template.encode()).hexdigest(),
        },
    }


def compare_runs(folder, made, wanted):
    """Raise ValueError naming the first setting, or file by its SHA-256, that weights depend on and
    that differs between two run.json."""

    def compared(info):
        settings = {k: v for k, v in info["config"].items() if k not in NOT_COMPARED}
        return info["sha256"] | {"processes": info["processes"]} | settings

    old, new = compared(made), compared(json.loads(json.dumps(wanted)))  # tuples are lists there
    for name, value in new.items():
        if old.get(name, value) != value:
            raise ValueError(
                f"{folder} was made with {name} {old[name]!r:.60}, not {value!r:.60}; give what it "
                "was made with, or begin anew in another --output_dir"
            )


def read_info(folder):
    """The run.json of a folder, {} without."""
    file = folder / "run.json" if folder else None
    return read_json_file(file) if file and file.is_file() else {}


def is_checkpoint(folder):
    return (folder / "state.safetensors").is_file()


def checkpoints(folder):
    """{step: folder} of a run's checkpoints, in order. transformers makes folders of that name too,
    without our state."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and is_checkpoint(path):
            found[int(step)] = path
    return dict(sorted(found.items()))


def last_checkpoint(folder):
    return ([None, *checkpoints(folder).values()] if folder else [None])[-1]


def discard(folder):
    """Delete a checkpoint under another name: a half deleted one is never there to go on from."""
    if folder.is_dir():
        shutil.rmtree(folder.rename(f"{folder}.old"))


def training_state(model, optimizer):
    """{name: tensor} of what an exact continuation needs: each trained parameter in float32, and
    AdamW's two moments. The order of the data and dropout's masks follow from seed and step."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            values = {"value": p.detach(), **optimizer.state[p]}
            for key in ("value", "exp_avg", "exp_avg_sq"):
                state[f"{name}/{key}"] = full_tensor(values[key]).contiguous().cpu()
    return state


@torch.no_grad()
def restore(model, optimizer, folder):
    """Put a checkpoint's parameters and moments back; return its step."""
    step = read_json_file(folder / "run.json")["step"]
    state = open_weights(folder / "state.safetensors")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if f"{name}/value" not in state or state[f"{name}/value"].shape != p.shape:
            raise ValueError(f"{folder} has no {name} of {tuple(p.shape)}: it is another model's")
        p.copy_(own_part(state[f"{name}/value"], p))
        moments = {key: own_part(state[f"{name}/{key}"], p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    return step


def read_log(path):
    """The records of log.jsonl, without a last line that a kill cut short."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; put it right, or move it away") from None


def write_lines(path, records):
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, lambda p: p.write_text(lines, encoding="utf-8"))


@contextmanager
def stop_signals():
    """Within it SIGTERM and Ctrl-C only put their number into the list that it yields, so that the
    step and its saving end first; a second one ends the process at once."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_curve(history, path):
    """The loss curve as an SVG, which any browser opens: training in grey, validation in red."""
    last = history[-1]["step"]
    losses = {
        key: [(r["step"], r[key]) for r in history if key in r] for key in ("loss", "val_loss")
    }
    top = 1.05 * max(y for points in losses.values() for _, y in points) or 1.0
    svg, legend = '<rect width="800" height="400" fill="#fff"/>', "loss per target token"
    for i in range(6):
        y = 360 - 66 * i
        svg += f'<path d="M60 {y}H780" stroke="#eee"/><text x="10" y="{y}">{top * i / 5:.2f}</text>'
    for (key, points), color in zip(losses.items(), ("grey", "red")):
        places = [(60 + 720 * (x - 1) / max(1, last - 1), 360 - 330 * y / top) for x, y in points]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        svg += f'<polyline points="{corners}" fill="none" stroke="{color}"/>'
        svg += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color}"/>' for x, y in places
        )
        if points:
            legend += f", {key} {points[-1][1]:.3f} ({color})"
    svg += f'<text x="60" y="380">step 1</text><text x="720" y="380">step {last}</text>'
    svg += f'<text x="300" y="20">{legend}</text>'
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 400" font-size="12">'
    write_atomically(path, lambda p: p.write_text(f"{head}{svg}</svg>\n", encoding="utf-8"))


# ==================================================================================================
# Memory: how many tokens at once, and how many blocks to compute again for the gradient


class Plan(NamedTuple):
    tokens_at_once: int
    recomputed: int  # blocks
    bytes: float


def plan_memory(shape, config, rows, dtype, device, tokens=0):
    """The Plan by which a model of this shape, a LLaMAConfig, is trained, with so many tokens at
    once if they are given. Nothing is loaded yet: the model is built on `meta`, where tensors have
    shapes and no memory. Raises ValueError if nothing fits."""
    storage = storage_dtype(config, dtype)
    with torch.device("meta"):
        model = LLaMA(shape).to(storage)
    if config.base_dtype in QUANTISED:
        quantize(model, config.base_dtype, "meta", storage)
    make_trainable(model, config)
    model.compute_dtype = dtype
    most, total = 2048, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        most, total = 8192, torch.cuda.get_device_properties(device).total_memory
    room = config.memory_gb * 2**30 or 0.92 * total  # the rest: CUDA's own, the interpreter's
    sizes = [tokens] if tokens else [most, most // 2, most // 4, 0]
    for plan in plans(model, rows, config, sizes):
        if plan.bytes <= room:
            return plan
    raise ValueError(
        f"training needs {plan.bytes / 2**30:.2f} GB, and {room / 2**30:.2f} GB of memory are "
        "planned for; try --recompute auto, a lower --micro_batch_tokens or --cutoff_len, or "
        "--base_dtype int8 or nf4"
    )


def plans(model, rows, config, sizes):
    """Yield a Plan for each number of blocks to recompute and of tokens at once, the best first,
    for a model of the right shapes on `meta`. The estimate: weights; gradient and two moments of
    what is trained; activations as autograd keeps them; and a chunk of logits, or the gradients
    inside a feed-forward, whichever is more."""
    c, L, s = model.config, len(model.layers), model.dtype.itemsize
    targets = target_count(rows) / sum(len(row.ids) for row in rows)
    few, many = (kept_bytes(model, tokens, round(tokens * targets)) for tokens in (8, 16))
    of_token, of_block = (many - few) / 8 / L, (2 * few - many) / L  # the latter: weights, cast
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = sum(p.nbytes for p in model.parameters()) + 12 * trained
    longest = max(len(row.ids) for row in rows)
    most = longest * (config.micro_batch_size or math.inf)
    for recomputed in {"none": [0], "full": [L]}.get(config.recompute, range(L + 1)):
        for tokens in (min(max(size, longest), most) for size in sizes):
            kept = max(1, L - recomputed) * (tokens * of_token + of_block)
            inputs = recomputed * tokens * c.hidden_size * s
            logits = 12 * min(CHUNK, tokens * targets * c.vocab_size)
            working = tokens * s * (3 * c.intermediate_size + 2 * c.hidden_size)
            yield Plan(tokens, recomputed, fixed + kept + inputs + max(logits, working))


def kept_bytes(model, tokens, targets):
    """Bytes that autograd keeps from the forward of one row to its gradient, weights apart."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # with its graph it would keep itself alive

    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    packed = PackedRows([tokens], 0, model.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        h = model.hidden_states(ids, packed, keep=torch.arange(targets, device=model.device))
    for p in model.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    del h  # until here it held what is kept, so that no storage took another's place
    return sum(kept.values())


def gradient_that_fits(model, rows, config, limits):
    """`step_gradient`; where memory runs out all the same, again with half the tokens at once."""
    longest = max(len(row.ids) for row in rows)
    while True:
        try:
            return step_gradient(model, rows, config, limits)
        except (RuntimeError, MemoryError) as error:
            # Other processes wait for this one's gradient; and one row alone cannot be halved.
            is_last = processes()[1] > 1 or limits.tokens_at_once <= longest
            if is_last or not out_of_memory(error):
                raise
        limits.tokens_at_once //= 2
        print(f"out of memory: the step is made again, {limits.tokens_at_once:,} tokens at once")
        model.zero_grad()
        torch.cuda.empty_cache()


# ==================================================================================================
# Many processes: each computes its share of a step's rows, and their gradients are summed


def join_processes(device):
    """Join the processes that torchrun started, if it did: NCCL, a GPU each by LOCAL_RANK, or gloo
    on CPUs. Only the first prints. Return this process's device. Raises ValueError if there is no
    GPU for it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        number, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= found:
            raise ValueError(
                f"process {number + 1} of this machine wants a GPU of its own, and it has {found}; "
                f"start --nproc_per_node {found}"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return device


def own_batches(rows, config, limits):
    """This process's micro-batches as (rows, 1): every Nth row by length, so that all have as much
    to do. Where another process has more, (one row, 0) fills up: it counts for nothing, but a
    sharded model is computed by all processes in step."""
    rank, n = processes()
    rows = sorted(rows, key=lambda row: len(row.ids))
    size, budget = config.micro_batch_size, limits.tokens_at_once or 2048
    shares = [micro_batches(rows[i::n], size, budget) for i in range(n)]
    missing = max(map(len, shares)) - len(shares[rank])
    return [(micro, 1) for micro in shares[rank]] + [(rows[:1], 0)] * missing


def sum_over_processes(number, device):
    if not dist.is_initialized():
        return number
    total = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def add_over_processes(model, config):
    """Sum the gradients over the processes, which FSDP2 has done on the way; return them."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if dist.is_initialized() and not config.shard:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return gradients


def gradient_factor(config):
    """FSDP2 takes the mean of the processes' gradients, and we want the sum."""
    return processes()[1] if config.shard else 1


def shard(model, device, dtype):
    """FSDP2 (--shard): cut each block's weights over the processes, then those of the rest; they
    are gathered for their products and freed again. Moved to device and cast to dtype a block at a
    time, since the base may be mapped, and exceed the device. Raises ValueError where torch cannot
    cut a quantised base."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(device.type, (processes()[1],))
    for part in (*model.layers, model):
        place(part, device, dtype)
        try:
            fully_shard(part, mesh=mesh)
        except RuntimeError as error:  # torch 2.11 cuts floating-point parameters alone
            raise ValueError(
                f"torch {torch.__version__} cannot shard this base ({error}); int8 and nf4 want "
                "torch 2.13, or take --base_dtype bf16"
            ) from None
    register_fsdp_forward_method(model, "hidden_states")


def own_part(tensor, parameter):
    """A copy of a whole tensor, or of this process's part where its parameter is cut."""
    tensor = tensor.to(parameter.device, copy=True)
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


# ==================================================================================================
# Reading data


def split_weight(argument):
    """("a.json", 0.5) of "a.json:0.5", and ("a.json", 1.0) of "a.json"."""
    match = re.fullmatch(r"(.+):(\d*\.?\d+)", argument)
    if not match or Path(argument).is_file():
        return argument, 1.0
    if not float(match[2]) > 0:
        raise ValueError(f"data_path {argument}: weight {match[2]}, wanted a number above 0")
    return match[1], float(match[2])


def read_data(config):
    """(training records, validation records). Validation is val_path, else val_set_size records
    drawn by seed from all files of data_path. Of what is left, a file given as FILE:WEIGHT is taken
    WEIGHT times, a fraction drawn by the same seed. Each record gains `record`: file and number."""
    if not config.data_path:
        raise ValueError("no --data_path; give a file of records {instruction, input, output}")
    records, files = [], []
    for path, weight in map(split_weight, config.data_path):
        first = len(records)
        for number, record in enumerate(read_instructions(path, answers=True), 1):
            records.append({**record, "record": f"{Path(path).name}:{number}"})
        files.append((range(first, len(records)), weight))
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(records), generator=generator).tolist()
    held_out = 0 if config.val_path else config.val_set_size
    if held_out >= len(records):
        raise ValueError(f"val_set_size {held_out} leaves none of {len(records)} records to train")
    taken = []
    for numbers, weight in files:
        own = [i for i in order[held_out:] if i in numbers]  # in drawn order: any part is fair
        taken += sorted((own * math.ceil(weight))[: round(weight * len(own))])
    if not taken:
        raise ValueError(f"data_path {config.data_path}: the weights leave no record; raise them")
    validation = [records[i] for i in order[:held_out]]
    if config.val_path:
        validation = read_instructions(config.val_path, answers=True)
    return [records[i] for i in taken], validation


def encode_records(tokenizer, template, records, config):
    """(rows, their records) of the records that fit; prints how many were cut or left out. Raises
    ValueError if none fits."""
    rows = [encode_example(tokenizer, template, record, config) for record in records]
    kept = [(row, record) for row, record in zip(rows, records) if row]
    if records and not kept:
        raise ValueError(f"no record fits into cutoff_len {config.cutoff_len}; raise it")
    lengths = [len(row.ids) for row, _ in kept]
    # a cut ends up to three byte tokens early, before half a character
    cut = sum(length > config.cutoff_len - 4 for length in lengths)
    print(
        f"{len(kept):,} records, {sum(lengths):,} tokens; at cutoff_len {config.cutoff_len} at "
        f"most {cut:,} answers cut (EOS kept), {len(rows) - len(kept):,} records left out (no room)"
    )
    return [row for row, _ in kept], [record for _, record in kept]


# ==================================================================================================
# Answers before and after


def answer_all(model, tokenizer, template, records, label):
    """Greedy answers to the records' questions. Each process answers its share."""
    rank, n = processes()
    prompts = [
        tokenizer.encode(render_prompt(template, r["instruction"], r["input"]), bos=True)
        for r in records[rank::n]
    ]
    label = "" if rank else label
    own = answer_batch(model, tokenizer, prompts, Decoding(max_new_tokens=128), 32, label)
    shares = [own] * n
    if n > 1:
        dist.all_gather_object(shares, own)
    return [shares[i % n][i // n] for i in range(len(records))]


def terms_in(text, terms):
    """The terms that stand in a text somewhere not inside a longer one (四逆汤 is not named by
    当归四逆汤)."""
    spans = []
    for term in filter(None, terms):
        for match in re.finditer(f"(?={re.escape(term)})", text):
            spans.append((match.start(), match.start() + len(term), term))

    def is_inside_another(start, stop):
        return any(a <= start and stop <= b and b - a > stop - start for a, b, _ in spans)

    return {term for start, stop, term in spans if not is_inside_another(start, stop)}


def facts_recalled(records, answers):
    """Share of the knowledge base's values that the answers name, over records that carry `values`;
    None without any. A value counts where it stands by itself, not inside its entity's name or a
    longer value of records that ask for the same relations."""
    values_of, hits = {}, []
    for record in records:
        values_of.setdefault(str(record.get("relations")), set()).update(record.get("values", []))
    for record, answer in zip(records, answers):
        found = terms_in(answer, {*values_of[str(record.get("relations"))], record.get("entity")})
        hits += [value in found for value in record.get("values", [])]
    return sum(hits) / len(hits) if hits else None


def print_report(config, history, questions, before, after):
    """Three questions with their answers before and after, and the run in a few lines."""
    triples = list(zip(questions, before, after))
    for record, old, new in triples[:: max(1, len(triples) // 3)][:3]:
        print(f"\n问题 {record['instruction']}\n  参考 {record['output']}")
        print(f"  调前 {old!r:.120}\n  调后 {new}")
    tokens, seconds = (sum(record[key] for record in history) for key in ("tokens", "seconds"))
    loss = history[-1].get("val_loss")
    validation = f", validation {loss:.3f}" if loss is not None else ""
    print(
        f"\n{len(history)} steps, {tokens:,} real tokens in {seconds:.0f} s "
        f"({tokens / seconds:,.0f} tokens/s), loss {history[0]['loss']:.3f} -> "
        f"{history[-1]['loss']:.3f}{validation}"
    )
    share = facts_recalled(questions, after)
    if share is not None:
        print(
            f"facts recalled on {len(questions)} held-out questions: base "
            f"{facts_recalled(questions, before):.1%}, tuned {share:.1%}"
        )
    result = "model" if config.full else "adapter"
    print(f"saved in {config.output_dir}: {result}, log.jsonl, loss.svg, answers.jsonl")


# ==================================================================================================
# Settings


@dataclass(frozen=True)
class TrainConfig:
    """Settings under alpaca-lora's names, with its defaults (BenTsao's where they differ) but for
    three: cutoff_len 512, since at 256 22.9 % of BenTsao's records lose their EOS and the model
    never learns to stop; warm-up at most a tenth of the steps, so that short runs learn too; and
    bf16 instead of an 8-bit base."""

    base_model: str = setting("", "folder of the base (empty: data/tiny, with TINY's settings)")
    data_path: tuple = setting(
        (),
        "training records, one file or several, in any form that read_instructions knows; "
        "FILE:WEIGHT takes its records WEIGHT times (0.5: half of them, drawn by seed)",
    )
    val_path: str = setting("", "file of validation records (else val_set_size of data_path)")
    output_dir: str = setting("lora-tcm", "folder for result, log.jsonl, loss.svg, checkpoints")
    full: bool = setting(False, "train all weights instead of an adapter")
    shard: bool = setting(
        False, "under torchrun: cut weights, gradients and moments over the processes (FSDP2)"
    )
    batch_size: int = setting(128, "rows of one optimizer step")
    micro_batch_size: int = setting(
        0, "rows computed at once, at most (0: as many as micro_batch_tokens allows)", 0
    )
    micro_batch_tokens: int = setting(
        0,
        "tokens computed at once, at most, unless one row alone is longer (0: 8,192 on a GPU, "
        "2,048 on a CPU, fewer where memory asks for it)",
        0,
    )
    recompute: str = setting(
        "auto",
        "forget the activations inside of no block, of all, or of as many as memory asks for, and "
        "compute them again for the gradient",
        choices=("none", "full", "auto"),
    )
    memory_gb: float = setting(
        0.0, "memory to plan for, in GB of 2^30 bytes (0: 92 % of the device's)", 0
    )
    compile: bool = setting(False, "torch.compile each block: pays on a GPU after a minute or two")
    share_opening: bool = setting(
        True,
        "compute the tokens that all rows of a micro-batch begin with once (exact but for "
        "dropout, whose mask they then share)",
    )
    num_epochs: int = setting(10, "passes over the data")
    max_steps: int = setting(0, "optimizer steps at most (0: no limit but num_epochs)", 0)
    learning_rate: float = setting(3e-4, "peak of AdamW's, after warm-up; falls linearly to 0")
    warmup_steps: int = setting(100, "steps of linear warm-up, at most a tenth of all", 0)
    weight_decay: float = setting(0.0, "AdamW's", 0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    cutoff_len: int = setting(512, "tokens of a row at most; a longer answer is cut, its EOS stays")
    val_set_size: int = setting(500, "rows taken from data_path for validation, by seed", 0)
    eval_steps: int = setting(200, "steps between validations (0: only at the end)", 0)
    save_steps: int = setting(200, "steps between checkpoints (0: none)", 0)
    save_total_limit: int = setting(3, "last checkpoints kept, besides the best (0: all)", 0)
    lora_r: int = setting(8, "rank of the update")
    lora_alpha: float = setting(16.0, "the update is scaled by alpha / r")
    lora_dropout: float = setting(0.05, "on the adapter's input", 0, 0.99)
    lora_target_modules: tuple = setting(
        ("q_proj", "v_proj"),
        "linears to adapt: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or all; also "
        "as '[q_proj,v_proj]'",
    )
    train_on: str = setting(
        "last",
        "targets in a conversation: the last answer, or the earlier ones too",
        choices=("last", "all"),
    )
    train_on_inputs: bool = setting(False, "make the prompt's tokens targets too")
    group_by_length: bool = setting(False, "rows of similar length in a step (less padding)")
    prompt_template_name: str = setting("med_template", "name in data/templates or path")
    resume_from_checkpoint: str = setting(
        "",
        "checkpoint-STEP folder to go on from, bit for bit; auto (or True): the last in "
        "output_dir, or from the beginning if there is none",
    )
    num_answers: int = setting(3, "validation questions answered before and after", 0)
    seed: int = setting(42, "of split, order, A's first values and dropout", -(2**62), 2**62)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1")
    dtype: str = setting("auto", "of the activations", choices=("auto", *DTYPES))
    base_dtype: str = setting(
        "auto",
        "of the frozen base as stored (auto: as dtype)",
        choices=("auto", *DTYPES, *QUANTISED),
    )
    wandb_project: str = setting("", "log to this Weights & Biases project (needs wandb)")
    wandb_run_name: str = setting("", "name of the run, there and in run.json")


# `python train.py` alone: a base of 5 million weights wants a far larger step than 7 billion do,
# and all its linears; in float32, so that it learns the same everywhere.
TINY = {
    "base_model": str(DATA / "tiny"),
    "data_path": (str(DATA / "train.jsonl"),),
    "val_path": str(DATA / "heldout.jsonl"),
    "batch_size": 64,
    "micro_batch_size": 32,
    "num_epochs": 4,
    "learning_rate": 5e-3,
    "warmup_steps": 10,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": ("all",),
    "eval_steps": 50,
    "num_answers": 1000,
    "dtype": "fp32",
}


def check_config(config):
    """Raise ValueError for a setting that is out of range, does not go with another, or asks for
    what is not there."""
    check_settings(config)
    if Path(config.output_dir).is_file():
        raise ValueError(f"output_dir {config.output_dir} is a file, wanted a folder")
    if config.wandb_project and not find_spec("wandb"):
        raise ValueError("wandb_project asks for the package wandb: pip install wandb")
    # on an H200 compiled fp16 was 3 % off, where eager fp16 is 0.3 %
    if config.compile and config.dtype == "fp16":
        raise ValueError(
            "compile gives wrong gradients in fp16 on GPUs; drop --compile, or use --dtype bf16 or "
            "fp32"
        )
    if config.full and config.base_dtype not in ("auto", "fp32"):
        raise ValueError(
            f"base_dtype {config.base_dtype} is for a frozen base, and --full trains the weights "
            "in fp32; drop one of the two"
        )
    if config.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ValueError(
            "shard cuts the weights over processes, and there is one; start torchrun "
            "--nproc_per_node N train.py"
        )


# ==================================================================================================
# Command


def parse_config():
    """The TrainConfig of the command line: each field is an option."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_settings(TrainConfig)
    given = vars(parser.parse_args())
    if "data_path" in given:
        given["data_path"] = tuple(given["data_path"])
    if "lora_target_modules" in given:  # q_proj v_proj, or '["q_proj","v_proj"]'
        names = re.findall(r"\w+", " ".join(given["lora_target_modules"]))
        given["lora_target_modules"] = tuple(names)
    if given.get("base_model"):
        return TrainConfig(**given)
    given["base_model"] = TINY["base_model"]
    if "val_set_size" in given:
        given.setdefault("val_path", "")
    return TrainConfig(**TINY | given)


def make_trainable(model, config):
    """Freeze the base behind a fresh adapter, or with --full train all of it."""
    if config.full:
        model.requires_grad_(True)
        return
    torch.manual_seed(config.seed)
    targets = config.lora_target_modules
    add_lora(model, LoRAConfig(config.lora_r, config.lora_alpha, config.lora_dropout, targets))


def storage_dtype(config, dtype):
    return torch.float32 if config.full else DTYPES.get(config.base_dtype, dtype)


def load_trainable(config, device, dtype):
    """The base as it is to be trained, ready on the device or cut over the processes."""
    storage = storage_dtype(config, dtype)
    if config.shard:  # mapped, as stored; `shard` moves and casts a block at a time
        kind = config.base_dtype if config.base_dtype in QUANTISED else "auto"
        model, _ = load_base(config.base_model, "cpu", None, kind)
    else:
        model, _ = load_base(config.base_model, device, storage, config.base_dtype)
    model.compute_dtype = dtype
    size = sum(p.nbytes for p in model.parameters())
    make_trainable(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "all weights" if config.full else f"LoRA r {config.lora_r}, alpha {config.lora_alpha:g}"
    print(
        f"base {config.base_model}: {size / 2**20:,.1f} MiB of weights on {device}, computing in "
        f"{dtype}; {what}: {trained:,} trained"
    )
    if config.compile:
        compile_blocks(model)
    if config.shard:
        shard(model, device, storage)
    return model


def compile_blocks(model):
    """torch.compile each block, in place. The blocks share one code, which has more variants than
    dynamo keeps by itself: the first by number, the last, for validation, for recomputation."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.layers:
        block.compile(dynamic=True)


def main():
    config = parse_config()
    check_config(config)
    if not config.output_dir:
        raise ValueError("output_dir is empty; give a folder for the result")

    # The data first: what is wrong with it is said before anything large is loaded.
    template = load_template(config.prompt_template_name)
    records, val_records = read_data(config)
    tokenizer = load_tokenizer(config.base_model)
    run = Run(config)
    if run.finished:
        print(f"the run in {config.output_dir} is finished, {len(run.history)} steps")
        return
    device = join_processes(pick_device(config.device))
    rows, _ = encode_records(tokenizer, template, records, config)
    val_rows, val_records = encode_records(tokenizer, template, val_records, config)

    # Then the model, as memory allows.
    dtype = pick_dtype(config.dtype, device)
    shape = Checkpoint(find_base(config.base_model)).config
    tokens = run.limits.tokens_at_once
    plan = plan_memory(shape, config, rows + val_rows, dtype, device, tokens)
    run.limits.tokens_at_once = plan.tokens_at_once
    print(
        f"memory: {plan.bytes / 2**30:.2f} GB by the estimate, {plan.tokens_at_once:,} tokens at "
        f"once, {plan.recomputed} blocks recomputed"
    )
    model = load_trainable(config, device, dtype)
    model.recomputed = plan.recomputed

    # Training, and answers to some of the validation questions before and after.
    print(
        f"{config.num_epochs} epochs of {len(rows):,} rows, {config.batch_size} rows a step, "
        f"learning rate {config.learning_rate:g}"
    )
    count = 0 if config.shard else config.num_answers  # token by token, gathering is too slow
    every = max(1, len(val_records) // max(1, count))
    questions = val_records[::every][:count]
    before = answer_all(model, tokenizer, template, questions, "answers before")
    history = train(config, model, (rows, val_rows), run)
    after = answer_all(model, tokenizer, template, questions, "answers after")
    if processes()[0] == 0:
        triples = zip(questions, before, after)
        answers = [{**record, "before": old, "after": new} for record, old, new in triples]
        write_lines(Path(config.output_dir) / "answers.jsonl", answers)
        print_report(config, history, questions, before, after)


if __name__ == "__main__":
    run(main)
