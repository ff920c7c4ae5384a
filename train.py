"""Instruction tuning of a LLaMA, with the loss on the answer alone: by LoRA, or of all weights.

  python train.py                                          the base in data/tiny, settings of TINY
  python train.py --base_model DIR --data_path FILE ...    yours, with BenTsao's defaults
  torchrun --nproc_per_node N train.py ...                 the same on N GPUs, or N CPU processes

What this file teaches, in this order:

  targets   encode_example: a record becomes token ids, and a mask of those to predict
  packing   collate: rows of unequal length end to end, without padding
  loss      loss_sum: cross-entropy summed over the targets, a chunk of logits at a time
  step      step_gradient: (summed loss) / (number of targets), however rows are cut into batches
  loop      train: gradient, AdamW, validation, record, checkpoint

Below the lesson stand the folder of a run and exact resumption, memory, many processes, reading
data, answers before and after, settings, and the command.

Letters: N tokens of a packed stream, M targets, C hidden size, V vocabulary.

Activations are in --dtype, a frozen base is stored in --base_dtype. What is trained, its gradient,
AdamW's two moments, logits and loss are float32.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from bisect import bisect
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path

from generate import (
    DATA,
    Decoding,
    Request,
    answer_batch,
    conversation,
    default_template,
    encode_rendered,
    load_base,
    load_template,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_instructions,
    read_records,
    render,
    render_prompt,
)
from lora import (
    QUANTISED,
    LoRAConfig,
    add_lora,
    load_adapter,
    move_model,
    quantize,
    remove_adapter,
    save_adapter,
)
from model import (
    DTYPES,
    Checkpoint,
    Lasting,
    LLaMA,
    PackedRows,
    Parser,
    check_content,
    check_like,
    check_own,
    check_settings,
    discard,
    file_hash,
    find_base,
    find_tokenizer,
    fsync,
    full_tensor,
    new_folder,
    open_weights,
    out_of_memory,
    own_folder,
    printable,
    processes,
    read_json_file,
    run,
    save_model,
    setting,
    stop_signals,
    weight_files,
    write_atomically,
    write_chat_template,
    write_json,
    write_json_lines,
    write_text,
)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Targets: which tokens the model is to predict


@dataclass
class Row:
    """A record as token ids; mask[t] is True where token t is a target."""

    ids: list
    mask: list
    record: dict = field(default_factory=dict)  # made from it; its `record` says file and number

    def __len__(self):
        return len(self.ids)


def encode_example(tokenizer, template, record, config):
    """The Row of a record: the prompt as it is asked, the answer, and the token that ends it. None
    if cutoff_len leaves no room for one token of the answer.

    Answer and end are targets. The end is one even of a cut answer: so a model learns to stop."""
    asked, said = render(template, *conversation(record))
    prompt, earlier = encode_rendered(tokenizer, asked)
    (*answer, end), _ = encode_rendered(tokenizer, said, first=False)
    cut = answer[: max(config.cutoff_len - len(prompt) - 1, 0)]
    # Never inside a character: three byte tokens may make one.
    while 0 < len(cut) < len(answer) and tokenizer.decode(cut).endswith("\ufffd"):
        cut.pop()
    if not cut:
        return None
    # The prompt is context: it predicts, and is not predicted, unless train_on_inputs asks for it,
    # or train_on for the earlier answers of a conversation.
    every, answers = config.train_on_inputs, config.train_on == "all"
    mask = [every or answers and is_answer for is_answer in earlier] + [True] * (len(cut) + 1)
    mask[0] = False  # nothing predicts the first token
    return Row(prompt + cut + [end], mask, record)


# --------------------------------------------------------------------------------------------------
# Packing: the rows of a step, and how they are computed together


def epoch_order(rows, config, epoch):
    """Row numbers in an epoch's order, by seed and epoch alone: resuming needs no history."""
    order = shuffled(len(rows), config.seed + epoch)
    if not config.group_by_length:
        return order
    # Like lengths share a step, but only within 50 steps: the order stays nearly random.
    span, grouped = 50 * config.batch_size, []
    for start in range(0, len(order), span):
        grouped += sorted(order[start : start + span], key=lambda i: -len(rows[i]))
    return grouped


def micro_batches(rows, size, budget, shares=1):
    """Rows sorted by length and cut into micro-batches. A share has at most `size` rows (0: any
    number) and, unless one row alone is longer, `budget` tokens as attention pads them. Rows of
    like length pad little, and the sum over a step is the same however it is cut."""
    batches = [[]]
    for row in sorted(rows, key=len):
        # This row is the longest, the width of all; the fullest share would have one more.
        count = len(batches[-1])
        if count and (count == size * shares or (count // shares + 1) * len(row) > budget):
            batches.append([])
        batches[-1].append(row)
    return batches


def shared_opening(rows):
    """How many tokens all rows begin with that predict no target: as a rule the template's text."""
    common = len(os.path.commonprefix([row.ids for row in rows]))
    return min(common, min(row.mask.index(True) for row in rows) - 1)


def collate(rows, device, share=True, glm=False):
    """Rows end to end in one stream: ids (1, N), labels (1, N), and the PackedRows that keeps
    attention inside each row. ids[t] predicts labels[t], which is -100 where that is no target:
    by position, never by id. With share, the common opening stands there once. Of a GLM the ids
    before sop, which the first target follows, see each other; so nothing is shared.

    Two rows, a b c D E and a b x Y, whose targets are the capitals:

      ids       a     b     c     D     x
      labels   -100  -100   D     E     Y"""
    shared = shared_opening(rows) if share and not glm else 0
    stream = []
    for row in rows:
        # a row's last token predicts nothing: it is a label only
        follows = zip(row.ids, row.ids[1:], row.mask[1:])
        pairs = [(id, label if is_target else -100) for id, label, is_target in follows]
        stream += pairs[shared if stream else 0 :]
    prefixes = [row.mask.index(True) - 1 for row in rows] if glm else None
    packed = PackedRows([len(row) - 1 for row in rows], shared, device, prefixes)
    # PackedRows rounds the stream up to a multiple of 8; what fills it predicts nothing.
    stream += [(0, -100)] * (len(packed.back) - len(stream))
    ids, labels = torch.tensor(stream, device=device).T
    return ids[None], labels[None], packed


# --------------------------------------------------------------------------------------------------
# Loss

CHUNK = 2**23  # logits made at once: 32 MB


def loss_sum(model, ids, labels, packed=None, scale=1.0):
    """Cross-entropy summed over the M targets, float32. The gradient of scale * loss is added to
    .grad, unless torch.no_grad() holds.

    The logits (M, V) of all targets would be the largest tensor of a step. They are made a chunk at
    a time, and each chunk is differentiated down to its hidden states before the next is made."""
    labels = labels.flatten()
    # Only where there is a target are the last feed-forward and the logits computed.
    targets = (labels != -100).nonzero().squeeze(1)
    h = model.hidden_states(ids, packed, keep=targets)  # (M, C)
    top = h.detach().requires_grad_()  # where the two parts of the gradient meet
    size, total = max(64, CHUNK // model.config.vocab_size), 0
    for part, label in zip(top.split(size), labels[targets].split(size)):
        loss = F.cross_entropy(model.lm_head(part).float(), label, reduction="sum")
        total += loss.detach()
        if torch.is_grad_enabled():
            (loss * scale).backward()
    # From the hidden states the gradient goes down through the network, once for all chunks.
    if torch.is_grad_enabled():
        h.backward(top.grad)
    return total


# --------------------------------------------------------------------------------------------------
# Step: the gradient of all its rows


@dataclass
class Limits:
    """What a step may turn out to exceed: the limit is halved then, and the step made again."""

    tokens_at_once: int = 0  # in a micro-batch, by memory; 0: not planned
    loss_scale: float = 2.0**16  # by the greatest number of fp16, 65,504


def total_loss(model, rows, config, tokens, scale=1.0):
    """`loss_sum` over all rows. Of each micro-batch every process computes a share, of at most so
    many tokens (0: as config has it)."""
    (rank, n), total = processes(), 0
    budget = tokens or config.micro_batch_tokens or 2048
    for micro in micro_batches(rows, config.micro_batch_size, budget, n):
        # A sharded model is computed by all in step: who has no row takes one that does not count.
        own, weight = micro[rank::n] or micro[:1], rank < len(micro)
        batch = collate(own, model.device, config.share_opening, model.config.prefix_lm)
        # A tensor is kept: asking for its number would stop a GPU's queue.
        total += weight * loss_sum(model, *batch, weight * scale)
    total = total.double()
    sum_over_processes([total])
    return total.item()


def step_gradient(model, rows, config, limits=None):
    """Add up, in .grad, the gradient of the loss per target token of all rows of an optimizer step;
    return that loss.

    Each micro-batch's summed loss is divided by the targets of the whole step. So every token
    weighs the same, and the gradient does not depend on how rows are cut into micro-batches or
    spread over processes. In fp16 the loss is scaled, lest small gradients vanish."""
    limits, count = limits or Limits(), target_count(rows)
    is_fp16 = model.dtype == torch.float16
    scale = limits.loss_scale if is_fp16 else 1.0
    loss = total_loss(model, rows, config, limits.tokens_at_once, scale / count) / count
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if config.shard:
        scale /= processes()[1]  # FSDP2 has made their mean on the way, and we want the sum
    else:
        sum_over_processes(gradients)
    for gradient in gradients:
        gradient.div_(scale)
    # Numbers beyond 65,504 are infinite in fp16: once more, with a smaller loss.
    infinite = is_fp16 and not full_tensor(get_total_norm(gradients)).isfinite()
    if infinite and math.isfinite(loss) and limits.loss_scale > 1:
        limits.loss_scale /= 2
        model.zero_grad()
        return step_gradient(model, rows, config, limits)
    return loss


@torch.no_grad()
def evaluate(model, rows, config, tokens=0):
    """Loss per target token over rows, without dropout; no weight changes."""
    training = model.training
    model.eval()
    loss = total_loss(model, rows, config, tokens) / target_count(rows)
    model.train(training)
    if config.shard:
        model.reshard()  # which FSDP2 does by itself in a backward alone
    return loss


# --------------------------------------------------------------------------------------------------
# Loop


def lr_at(step, total, config):
    """Learning rate of step 0, 1, ...: linear warm-up to the peak, then linear to 0 at `total`."""
    warmup = min(config.warmup_steps, total // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total - step) / (total - warmup)


def train(config, model, data, run=None):
    """Train what requires a gradient on data = (training rows, validation rows). Return a record
    of each step: step, epoch, loss (per target token), lr, grad_norm, tokens, seconds,
    tokens_per_second, and val_loss where it was measured.

    With output_dir, log, checkpoints and result land there (`Run`). Raises ValueError naming the
    step for a loss that is not finite, memory that ran out or a file that cannot be written, and
    SystemExit after SIGTERM or Ctrl-C, once the step is made and saved."""
    check_config(config)
    run = run or Run(config)
    if run.finished:
        return run.history
    rows, val_rows = data
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)
    per_epoch = math.ceil(len(rows) / config.batch_size)
    total = min(config.num_epochs * per_epoch, config.max_steps or math.inf)
    every = config.eval_steps or total
    model.train()
    with stop_signals() as caught, run.recording(model, optimizer, total) as first:
        for step, batch in islice(enumerate(steps(rows, config)), first, total):
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
            epoch = run.step / per_epoch
            record = {"step": run.step, "epoch": epoch, "loss": loss, "lr": lr, "grad_norm": norm}
            tokens, seconds = sum(map(len, batch)), max(1e-9, time.time() - started)
            record |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
            if val_rows and min(run.step % every, total - run.step) == 0:
                record["val_loss"] = evaluate(model, val_rows, config, run.limits.tokens_at_once)
            run.log(record)
            stopping = any_stopped(caught, model.device)
            if run.is_due(total, stopping):
                run.save(model, optimizer)
            if stopping:
                break
    model.eval()
    if any_stopped(caught, model.device):
        print(f"stopped after step {run.step} of {total}; go on with --resume_from_checkpoint auto")
        raise SystemExit(128 + next(iter(caught), signal.SIGTERM))  # as shells count
    return run.history


# ==================================================================================================
# What the loop calls


def shuffled(count, seed):
    """The numbers below count in an order drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()


def target_count(rows):
    return sum(sum(row.mask) for row in rows)


def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def steps(rows, config):
    """Yield the rows of each step of all epochs."""
    for epoch in range(config.num_epochs):
        order = epoch_order(rows, config, epoch)
        for start in range(0, len(rows), config.batch_size):
            yield [rows[i] for i in order[start : start + config.batch_size]]


def seed_dropout(step, config):
    """Dropout's masks follow from the seed, the step and the process: there is no state to save."""
    rank, n = processes()
    torch.manual_seed((config.seed * 1_000_003 + step * n + rank) % 2**63)


def any_stopped(caught, device):
    """Has a process caught a signal? All ask together, so that they stop at the same step."""
    count = torch.tensor(len(caught), device=device)
    sum_over_processes([count])
    return count.item() > 0


def check_finite(model, batch, loss, norm, config):
    """Raise ValueError naming the rows whose own loss is not finite, or else all of the batch."""
    if math.isfinite(loss + norm):
        return
    bad = [row for row in batch if not math.isfinite(evaluate(model, [row], config))] or batch
    names = ", ".join(row.record.get("record", "") for row in bad[:9])
    raise ValueError(
        f"loss {loss}, gradient norm {norm}, from rows {names}; look at them, lower --learning_rate"
    )


# ==================================================================================================
# The folder of a run, and exact resumption

# Settings that may differ when a run goes on: they change no weight beyond the last bits, or their
# file's content is compared and not its name.
NOT_COMPARED = """base_model data_path val_path prompt_template_name output_dir
    resume_from_checkpoint micro_batch_tokens recompute device memory_gb dtype eval_steps save_steps
    save_total_limit num_answers show wandb_project wandb_run_name overwrite""".split()


# What a run writes into its folder, and into each record of its log
RESULTS = """run.json config.json adapter_config.json adapter_model.safetensors answers.jsonl
    loss.svg model.safetensors model.safetensors.index.json tokenizer.model tokenizer.json
    tokenizer_config.json checkpoint-*[0-9]""".split()
LOGGED = "step epoch loss lr grad_norm tokens seconds tokens_per_second val_loss".split()


class Run:
    """The folder of a run.

      log.jsonl           one record per step
      adapter or model    the result
      run.json            settings, versions, SHA-256 of base and data; written last, it says that
                          what stands beside it is whole
      checkpoint-STEP/    the same of that step, and state.safetensors: to go on from bit for bit

    Each checkpoint is written aside and renamed when it is whole, so a kill at any moment leaves
    what was whole before. Of many processes the first writes."""

    def __init__(self, config):
        """Find where to start: at the beginning, at a checkpoint, or not at all (`finished`).
        Raises ValueError naming what differs from the run that is gone on with."""
        self.config, self.info = config, describe_run(config)
        # Without an output_dir nothing is written, and nothing found.
        self.folder = Path(config.output_dir or os.devnull)
        self.writes = config.output_dir and processes()[0] == 0
        self.limits = Limits(config.micro_batch_tokens)
        # The step that is being made, counted from 1; one record for each that is done.
        self.step, self.history = 0, []
        # May the log be appended to, or is it an older run's?
        self.wandb, self.owns_log = None, False
        self.start = self.find_start()
        self.finished = self.start == self.folder
        if self.start:
            self.go_on_from(self.start)

    def find_start(self):
        """The folder to go on from: a checkpoint; the run's own if it is finished; else None."""
        given = self.config.resume_from_checkpoint
        found = self.found = newest(self.folder)
        # A folder without a run may hold what is not ours to replace. A run that was killed early
        # has left its log.
        log, theirs = self.folder / "log.jsonl", [f for n in RESULTS for f in self.folder.glob(n)]
        check_own(log, '"tokens_per_second": ')
        if theirs and not (found or log.exists()):
            raise ValueError(f"{theirs[0]} is of no run; give another --output_dir")
        match given.lower():  # True, False and None are alpaca-lora's words
            case "auto" | "true":
                if not found:
                    print(f"no checkpoint in {self.folder} yet; beginning with step 1")
                return found
            case "" | "false" | "none":
                start = None
            case _:
                start = Path(given)
        # It is replaced, too, by one that goes on from another folder.
        own = start and start.resolve().is_relative_to(self.folder.resolve())
        if found and not (own or self.config.overwrite):
            raise ValueError(
                f"{found} holds a run; go on with --resume_from_checkpoint auto, give another "
                "--output_dir, or --overwrite it"
            )
        return start

    def go_on_from(self, start):
        """Take over history and limits of a run. Raises ValueError naming the first setting, or
        file by its SHA-256, that weights depend on and that differs between the two."""
        made = read_json_file(start / "run.json")
        wanted = json.loads(json.dumps(self.info))  # where tuples are lists
        check_like(start / "run.json", made, wanted | asdict(self.limits))
        for part in ("sha256", "made_in", "config"):
            for name, value in wanted[part].items():
                old = made[part].get(name, value)
                if old != value and name not in NOT_COMPARED:
                    raise ValueError(
                        f"{start} was made with {name} {old!r:.60}, not {value!r:.60}; give what "
                        "it was made with, or begin anew in another --output_dir"
                    )
        self.info["started"] = made["started"]
        # The same tokens at once add gradients up in the same order, unless others are asked for.
        if self.config.micro_batch_tokens in (0, made["config"].get("micro_batch_tokens")):
            self.limits.tokens_at_once = min(int(made["tokens_at_once"]), 2**24)
        self.limits.loss_scale = made["loss_scale"]
        for _, record in read_records(start / "log.jsonl"):
            check_like(start / "log.jsonl", {"val_loss": 0} | record, dict.fromkeys(LOGGED, 0))
            self.history.append(record)

    def begin(self, model, optimizer):
        """Restore model and optimizer, cut the log back to their step; return it. Raises ValueError
        if the two do not fit each other, or another process has been here."""
        first, *others = restore(model, optimizer, self.start) if self.start else [0]
        if others or [record["step"] for record in self.history] != [*range(1, first + 1)]:
            raise ValueError(f"{self.start}: state and log.jsonl do not both hold {first} steps")
        if self.writes:
            if newest(self.folder) != self.found:
                raise ValueError(f"{self.folder} was written meanwhile; start again")
            self.owns_log = self.start or not self.found
            # The log may be ahead of the checkpoint: the steps between are made again. That of an
            # older run goes with the first checkpoint of this one.
            if self.owns_log:
                write_json_lines(self.folder / "log.jsonl", self.history)
            if self.config.wandb_project:
                self.wandb = import_module("wandb").init(
                    project=self.config.wandb_project,
                    name=self.config.wandb_run_name or None,
                    config=asdict(self.config),
                )
        return first

    @contextmanager
    def recording(self, model, optimizer, total):
        """Begin; yield the first step. Within it the folder is this process's, a bar shows the
        steps, and an error that the user can mend becomes one line with step, reason and last
        checkpoint. Then the loss curve is drawn and, if all steps are made, the result written."""
        with own_folder(self.folder) if self.writes else nullcontext():
            first = self.begin(model, optimizer)
            try:
                with tqdm(
                    initial=first, total=total, unit="step", disable=processes()[0] > 0
                ) as self.bar:
                    yield first
                if self.writes:
                    draw_curve(self.history, self.folder / "loss.svg")
                if self.step == total:
                    self.save_weights(model, self.folder)
            except Exception as error:
                memory = out_of_memory(error)
                if not (memory or isinstance(error, (ValueError, OSError))):
                    raise  # a bug: with its traceback
                advice = "; lower --micro_batch_tokens or --memory_gb" if memory else ""
                raise ValueError(
                    f"step {self.step}: {memory or error}{advice}; saved is "
                    f"{newest(self.folder) or 'nothing'}"
                ) from None

    def log(self, record):
        """Take down the record of a step."""
        self.history.append(record)
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss={record['loss']:.4g}, tokens_per_second={record['tokens_per_second']:.4g}"
        )
        # Opened anew for each line: what is in the file survives a kill.
        if self.owns_log:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=self.step)

    def best_step(self):
        """The first step of the lowest validation loss; None before a validation."""
        validated = [(r["val_loss"], r["step"]) for r in self.history if "val_loss" in r]
        return min(validated, default=(0, None))[1]

    def is_due(self, total, stopping):
        """A checkpoint before the last step: every save_steps, at each new best validation loss,
        and where the run stops."""
        every = self.config.save_steps
        due = every and (self.step % every == 0 or self.step == self.best_step())
        return self.step < total and (stopping or due)

    def save(self, model, optimizer):
        """Write checkpoint-STEP. All processes call it: a sharded model's tensors are gathered.

        The best and the last save_total_limit are kept. Those ahead of this step go: they are of a
        run that this one replaces, or has gone back in."""
        live = training_state(model, optimizer).items()
        state = {name: full_tensor(tensor).contiguous().cpu() for name, tensor in live}
        if not self.writes:
            return self.save_weights(model, self.folder)
        # What a save that was cut off has left.
        for leftover in self.folder.glob(".checkpoint-*.unfinished"):
            shutil.rmtree(leftover)
        final = self.folder / f"checkpoint-{self.step}"
        discard(final)
        with new_folder(final) as aside:
            self.save_weights(model, aside)
            write_atomically(aside / "state.safetensors", partial(save_file, state))
        fsync(self.folder)
        saved = checkpoints(self.folder)
        past = [step for step in saved if step <= self.step]
        kept = {self.best_step(), *past[-self.config.save_total_limit :]}  # [-0:] is all
        if not self.owns_log:  # those that stand there are of the run that this one replaces
            write_json_lines(self.folder / "log.jsonl", self.history)
            self.owns_log, kept = True, {self.step}
        for step in saved.keys() - kept:
            discard(saved[step])

    def save_weights(self, model, folder):
        """Write what was trained, the adapter in PEFT's form or with --full a base's folder; then
        the log, and run.json, which says how it came about."""
        config = self.config
        if not config.output_dir:
            return
        if self.writes:  # of an older run, these say nothing of the weights that come
            (folder / "answers.jsonl").unlink(missing_ok=True)
            (folder / "run.json").unlink(missing_ok=True)
        if config.full:
            save_model(model, folder, find_base(config.base_model))
        else:
            save_adapter(model, folder, config.base_model, trained=True)
        if self.writes:
            if config.full:
                write_chat_template(folder, self.info["made_in"]["template"])
            write_json_lines(folder / "log.jsonl", self.history)
            info = self.info | asdict(self.limits) | {"step": self.step}
            info["adapter"] = [*map(file_hash, folder.glob("adapter_model.safetensors"))]
            write_json(folder / "run.json", info)


def describe_run(config):
    """What run.json says of a run: settings, versions, and SHA-256 of the files that it is made
    from."""
    base_files = []
    if config.base_model:
        base = find_base(config.base_model)
        names = "config.json params.json added_tokens.json tokenizer_config.json".split()
        base_files = [*weight_files(base), find_tokenizer(base), *map(base.joinpath, names)]
    # what auto means here: another machine may take another dtype
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    data = [*map(split_weight, config.data_path)]
    for path in filter(None, [*(path for path, _ in data), config.val_path]):
        check_content(path)  # a pipe is read once, and has no hash
    hashes = {
        "base": [file_hash(file) for file in base_files if file.is_file()],
        "data": [[weight, file_hash(path)] for path, weight in data],
        "validation": file_hash(config.val_path) if config.val_path else None,
    }
    return {
        "config": asdict(config),
        "made_in": {
            # its content counts, not its name or the layout of its file
            "template": load_template(config.prompt_template_name),
            "dtype of the activations": str(dtype),
            "processes": processes()[1],
        },
        "sha256": hashes,
        "torch": torch.__version__,
        "started": time.time(),
    }


def checkpoints(folder):
    """{step: folder} of a run's checkpoints, in order. transformers makes folders of that name too,
    without our state."""
    found = {}
    for state in folder.glob("checkpoint-*/state.safetensors"):
        number = state.parent.name.removeprefix("checkpoint-")
        if number.isdigit():
            found[int(number)] = state.parent
    return dict(sorted(found.items()))


def newest(folder):
    """What a run left last: its folder if it is finished, else its last checkpoint; None without
    either."""

    def started(saved):
        # `save_adapter` writes an empty one; a kill may come before ours.
        made = read_json_file(saved / "run.json", {}) or {"started": 0}
        check_like(saved / "run.json", made, {"started": 0})
        return made["started"]

    # Of those that began last, the run's own folder comes before its checkpoints.
    saved = filter(started, [folder, *reversed(checkpoints(folder).values())])
    return max(saved, key=started, default=None)


def training_state(model, optimizer):
    """{name: tensor} of what an exact continuation needs: each trained parameter, AdamW's two
    moments and their step. The order of the data and dropout's masks follow from seed and step."""
    return {
        f"{name}/{key}": tensor
        for name, p in trained_parameters(model).items()
        for key, tensor in {"value": p.detach(), **optimizer.state[p]}.items()
    }


@torch.no_grad()
def restore(model, optimizer, folder):
    """Put a checkpoint's parameters and moments back; return its steps: one, if all agree. Raises
    ValueError for other tensors than this run's."""
    # AdamW makes its moments in its first step: one without a gradient, to be overwritten.
    for p in trained_parameters(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    saved, live = open_weights(folder / "state.safetensors"), training_state(model, optimizer)
    check_like(folder, saved, dict.fromkeys(saved) | live)
    for name, tensor in live.items():
        whole = saved[name]
        if hasattr(tensor, "device_mesh"):  # cut over the processes: each takes its part
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
        tensor.copy_(whole)
    return {int(tensor) for name, tensor in saved.items() if name.endswith("/step")}


# Where the ticks of a logarithmic scale may stand.
ROUND = [m * 10.0**e for e in range(-6, 8) for m in (1, 2, 3, 5)]


def draw_curve(history, path):
    """The loss curve as an SVG, which any browser opens, in the frame of data/loss.svg. The scale
    is logarithmic, between round numbers: what a loss of 0.02 does is seen beside one of 2."""
    last, keys = {"val_loss": math.nan} | history[-1], ("loss", "val_loss")
    losses = [min(max(r[key], 1e-6), 1e7) for r in history for key in keys if key in r]
    levels = ROUND[bisect(ROUND, min(losses)) - 1 : bisect(ROUND, max(losses)) + 1]
    low, *_, high = levels

    def place(epoch, loss):
        """As "x,y", in the frame's units."""
        height = math.log(min(max(loss, low), high) / low, high / low)
        return f"{60 + 720 * epoch / last['epoch']:.1f},{360 - 330 * height:.1f}"

    lines = {key: " ".join(place(r["epoch"], r[key]) for r in history if key in r) for key in keys}
    # At most ten epochs, tens or tenths of them have a mark.
    apart = 10.0 ** math.ceil(math.log10(last["epoch"] / 10))
    marks = [i * apart for i in range(int(last["epoch"] / apart) + 1)]
    tick = '<g transform="translate({1})"><use href="#{0}"/><text class="{0}">{2:g}</text></g>'
    ticks = [tick.format("level", place(0, level), level) for level in levels]
    ticks += [tick.format("epoch", place(mark, low), mark) for mark in marks]
    frame = (DATA / "loss.svg").read_text(encoding="utf-8")
    write_text(path, frame.format(last=last, ticks="\n".join(ticks), **lines))


# ==================================================================================================
# Memory: how many tokens at once, and how many blocks to compute again for the gradient


@dataclass
class Plan:
    """How a run is to fit into memory, and the bytes that it will take."""

    tokens_at_once: int
    recomputed: int  # blocks
    bytes: float


def plan_memory(shape, config, rows, dtype, device, tokens=0):
    """The Plan by which a model of this shape, a LLaMAConfig, is trained: as few blocks recomputed
    as memory allows, then as many tokens at once as pay, or those given. Nothing is loaded yet.
    Raises ValueError if nothing fits."""
    # More tokens at once pay up to here; a CPU's caches are small.
    limit, room = 2048, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        limit, room = 8192, torch.cuda.get_device_properties(device).total_memory
    room = config.memory_gb * 2**30 or 0.92 * room  # the rest: CUDA's own, the interpreter's
    sizes = [tokens] if tokens else [limit, limit // 2, limit // 4, 0]
    lengths = list(map(len, rows))
    longest, target_share = max(lengths), target_count(rows) / sum(lengths)
    model, L = trial_model(shape, config, dtype), shape.num_hidden_layers
    # Of what is trained there are a gradient and two moments besides. Cut over processes, two
    # blocks are whole at a time.
    weights = sum(p.nbytes for p in model.parameters())
    fixed = weights + 3 * sum(p.nbytes for p in trained_parameters(model).values())
    if config.shard:
        fixed = fixed / processes()[1] + 2 * weights / L
    for recomputed in {"none": [0], "full": [L]}.get(config.recompute, range(L)):
        for size in sizes:
            n = min(max(size, longest), longest * (config.micro_batch_size or math.inf))
            targets = round(n * target_share)
            # Of a recomputed block its input; and one is whole again while its gradient is made.
            hidden = n * shape.hidden_size * dtype.itemsize
            kept = max(1, L - recomputed) / L * kept_bytes(model, n, targets) + recomputed * hidden
            # At the peak there is a chunk of logits too, or the gradients inside a feed-forward.
            logits = 12 * min(CHUNK, targets * shape.vocab_size)
            inside = 2 * hidden + 3 * n * shape.intermediate_size * dtype.itemsize
            need = fixed + kept + max(logits, inside)
            if need <= room:
                return Plan(n, recomputed, need)
    raise ValueError(
        f"training needs {need / 2**30:.2f} GB, and {room / 2**30:.2f} GB of memory are planned "
        "for; try --recompute auto, a lower --micro_batch_tokens or --cutoff_len, or --base_dtype "
        "int8 or nf4"
    )


def trial_model(shape, config, dtype):
    """The model as it is to be trained, on `meta`, where tensors have shapes and no memory."""
    with torch.device("meta"):
        model = LLaMA(shape)
    if config.base_dtype in QUANTISED:
        quantize(model, config.base_dtype, "meta")
    make_trainable(model, config, dtype)
    move_model(model, "meta", DTYPES.get(config.base_dtype, dtype))
    return model


@cache
def kept_bytes(model, tokens, targets):
    """Bytes that autograd keeps of so many tokens from the forward to the gradient, weights apart.
    They stand in rows of 2: on `meta`, unlike elsewhere, attention keeps its scores too."""
    rows, sizes = PackedRows([2] * math.ceil(tokens / 2), 0, "meta"), {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()  # once for all views of one storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, note):
        model.hidden_states(rows.back[None], rows, keep=rows.back[:targets])
    for p in model.parameters():
        sizes.pop(p.untyped_storage()._cdata, None)
    return sum(sizes.values())


def gradient_that_fits(model, rows, config, limits):
    """`step_gradient`; where memory runs out all the same, again with half the tokens at once."""
    while True:
        try:
            return step_gradient(model, rows, config, limits)
        except Exception as error:
            # One row alone cannot be halved, and other processes wait for this one's gradient.
            can_halve = processes()[1] == 1 and limits.tokens_at_once > max(map(len, rows))
            if not (can_halve and out_of_memory(error)):
                raise
        # Here, and not above, for the error holds on to the activations.
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
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
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
    # Sums of gradients go through the GPUs' own network, or through TCP.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = Lasting(None)
    return device


def sum_over_processes(tensors):
    """Replace each tensor by its sum over the processes."""
    for tensor in tensors if dist.is_initialized() else []:
        dist.all_reduce(tensor)


def shard(model, device, dtype):
    """FSDP2 (--shard): cut each block's weights over the processes, then those of the rest; they
    are gathered for their products and freed again. Moved to device and cast to dtype a block at a
    time, since the base may be mapped, and exceed the device. Raises ValueError where torch cannot
    cut a quantised base."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # First the blocks, then what is left of the model: embedding, last norm and head.
    mesh = dist.init_device_mesh(device.type, (processes()[1],))
    for part in (*model.layers, model):
        move_model(part, device, dtype)
        try:
            fully_shard(part, mesh=mesh)
        except RuntimeError as error:  # torch 2.11 cuts floating-point parameters alone
            raise ValueError(
                f"torch {torch.__version__} cannot shard this base ({error}); int8 and nf4 want "
                "torch 2.13, or take --base_dtype bf16"
            ) from None
    register_fsdp_forward_method(model, "hidden_states")


# ==================================================================================================
# Reading data


def split_weight(argument):
    """("a.json", 0.5) of "a.json:0.5", and ("a.json", 1.0) of "a.json"."""
    path, weight = re.fullmatch(r"(?s)(.*?)(?::(\d*\.?\d+))?", argument).groups("1")
    if float(weight) == 0:
        raise ValueError(f"data_path {argument}: weight {weight}, wanted a number above 0")
    return path, float(weight)


def read_data(config):
    """(training records, validation records). Validation is val_path, else val_set_size records
    drawn by seed from all files of data_path. Of what is left, a file given as FILE:WEIGHT is taken
    WEIGHT times, a fraction drawn by the same seed. Each record gains `record`: file and number."""

    def read(path):
        return [
            record | {"record": f"{Path(path).name}:{number}"}
            for number, record in enumerate(read_instructions(path, answers=True), 1)
        ]

    records, files = [], []
    # All records of all files, and which numbers among them a file has.
    for path, weight in map(split_weight, config.data_path):
        first = len(records)
        records += read(path)
        files.append((range(first, len(records)), weight))
    # The first of a drawn order are the validation's.
    order = shuffled(len(records), config.seed)
    held_out = 0 if config.val_path else config.val_set_size
    # The default is for large files; what was given otherwise is meant.
    if held_out == TrainConfig.val_set_size > len(records) // 10:
        held_out = len(records) // 10
        print(f"validation: {held_out} records, a tenth of {len(records)} (--val_set_size)")
    taken = []
    for numbers, weight in files:
        # in the order drawn, so that any part of them is fair
        own = [i for i in order[held_out:] if i in numbers]
        taken += sorted((own * math.ceil(weight))[: round(weight * len(own))])
    if not taken:
        raise ValueError(
            f"--data_path {' '.join(config.data_path)!r}: val_set_size {held_out} and the weights "
            f"leave none of {len(records)} records to train on"
        )
    validation = [records[i] for i in order[:held_out]]
    if config.val_path:
        validation = read(config.val_path)
    return [records[i] for i in taken], validation


def encode_records(tokenizer, template, records, config):
    """The rows of the records that fit; prints how many were cut or left out. Raises ValueError if
    none fits."""
    rows = [encode_example(tokenizer, template, record, config) for record in records]
    rows = list(filter(None, rows))
    if records and not rows:
        raise ValueError(f"no record fits into cutoff_len {config.cutoff_len}; raise it")
    # A cut may end three byte tokens early, before half a character.
    cut = sum(len(row) > config.cutoff_len - 4 for row in rows)
    print(
        f"{len(rows):,} records, {sum(map(len, rows)):,} tokens; at cutoff_len {config.cutoff_len} "
        f"at most {cut:,} answers cut (EOS kept), {len(records) - len(rows):,} left out (no room)"
    )
    return rows


def show_rows(tokenizer, rows):
    """Print rows a token at a time: targets in green, or in brackets where nobody sees colours."""
    names = {id: name for name, id in tokenizer.special.items()}
    mark = "\033[32m{}\033[0m" if sys.stdout.isatty() else "[{}]"
    for row in rows:
        print(f"\n{row.record['record']}: {len(row)} tokens, {sum(row.mask)} of them targets")
        for id, is_target in zip(row.ids, row.mask):
            text = printable(names.get(id, tokenizer.decode([id])).replace("\n", "\\n\n"))
            print(mark.format(text) if is_target else text, end="|")
        print()


# ==================================================================================================
# Answers before and after


def answer_all(model, tokenizer, template, records, key):
    """The records with greedy answers to their questions as `key`. Each process answers a share."""
    rank, n = processes()
    prompts = [render_prompt(tokenizer, template, *conversation(r)) for r in records[rank::n]]
    requests = [Request(ids, Decoding(max_new_tokens=128)) for ids in prompts]
    answers = list(answer_batch(model, tokenizer, requests, 32, desc=key))
    # Question i was answered by process i % n.
    shares = [answers] * n
    if n > 1:
        dist.all_gather_object(shares, answers)
    return [record | {key: shares[i % n][i // n]} for i, record in enumerate(records)]


def find_terms(text, terms):
    """Yield (start, term) of the terms that stand in a text somewhere not inside a longer one
    (四逆汤 is not named by 当归四逆汤)."""
    terms, lengths, end = set(terms), {*map(len, terms)}, 0
    for start in range(len(text)):
        # The longest that begins here, unless one from further left holds it.
        term = max(terms & {text[start : start + n] for n in lengths}, key=len, default="")
        if term and start + len(term) > end:
            end = start + len(term)
            yield start, term


def terms_in(text, terms):
    return {term for _, term in find_terms(text, terms)}


def listed(record):
    """A record's values as texts: another project's may have anything there, or none."""
    values = record.get("values")
    return [*map(str, values)] if isinstance(values, list) else []


def facts_recalled(records, answers):
    """Share of the knowledge base's values that the answers name, over records that carry `values`;
    None without any. A value counts where it stands by itself, not inside its entity's name or a
    longer value of records that ask for the same relations."""
    # All values of a relation are candidates: a longer one may hold the one that is asked for.
    values_of, hits = {}, []
    for record in records:
        values_of.setdefault(str(record.get("relations")), set()).update(listed(record))
    for record, answer in zip(records, answers):
        found = terms_in(
            answer, {*values_of[str(record.get("relations"))], str(record.get("entity"))}
        )
        hits += [value in found for value in listed(record)]
    return sum(hits) / len(hits) if hits else None


def print_report(config, history, answers):
    """Three questions with their answers before and after, and the run in a few lines."""
    for record in answers[:: max(1, len(answers) // 3)][:3]:
        print(
            printable(
                f"\n问题 {record['instruction']}\n  参考 {record['output']}\n"
                f"  调前 {record['before']!r:.120}\n  调后 {record['after']}"
            )
        )
    tokens, seconds = (sum(record[key] for record in history) for key in ("tokens", "seconds"))
    last = {"val_loss": math.nan} | history[-1]
    print(
        f"\n{len(history)} steps, {tokens:,} real tokens in {seconds:.0f} s "
        f"({tokens / seconds:,.0f} tokens/s), loss {history[0]['loss']:.3f} -> {last['loss']:.3f}, "
        f"validation {last['val_loss']:.3f}"
    )
    old, new = (facts_recalled(answers, [r[key] for r in answers]) for key in ("before", "after"))
    if new is not None:
        print(f"facts recalled on {len(answers)} questions: base {old:.1%}, tuned {new:.1%}")
    result, option = ("model", "base_model") if config.full else ("adapter", "lora_weights")
    print(f"saved in {config.output_dir}: {result}, log.jsonl, loss.svg, answers.jsonl")
    print(f"next: python generate.py --{option} {config.output_dir} (with --serve: a page)")


# ==================================================================================================
# Settings


@dataclass(frozen=True)
class TrainConfig:
    """Settings under alpaca-lora's names, with BenTsao's defaults but for: cutoff_len 512, since at
    256 22.9 % of its records lose their EOS and the model never learns to stop; warm-up at most a
    tenth of the steps, so that short runs learn too; a bf16 base instead of one of 8 bits; the
    template by the base; micro-batches by memory. The result is the last step, not the best."""

    # what is trained, and on what

    base_model: str = ""  # folder of the base (empty: data/tiny, with TINY's settings)
    # training records, one file or several, in any form that read_instructions knows;
    # FILE:WEIGHT takes its records WEIGHT times (0.5: half of them, drawn by seed)
    data_path: tuple = ()
    val_path: str = ""  # file of validation records (else val_set_size of data_path)
    val_set_size: int = setting(500, 0)  # records drawn from data_path for validation, by seed
    # name in data/templates, or path (not given: by the special tokens of the base)
    prompt_template_name: str = "med_template"
    cutoff_len: int = 512  # tokens of a row at most; a longer answer is cut, its EOS stays
    # targets in a conversation: its last answer, or all answers
    train_on: str = setting("last", choices=("last", "all"))
    train_on_inputs: bool = False  # make the prompt's tokens targets too
    # fill each step with rows of similar length (another order, less padding)
    group_by_length: bool = False
    full: bool = False  # train all weights instead of an adapter
    lora_r: int = 8  # rank of the update
    lora_alpha: float = 16.0  # the update is scaled by alpha / r
    lora_dropout: float = setting(0.05, 0, 0.99)  # on the update's input
    # linears to adapt: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or all; also
    # as '[q_proj,v_proj]'
    lora_target_modules: tuple = ("q_proj", "v_proj")

    # steps

    batch_size: int = 128  # rows of one optimizer step
    num_epochs: int = 10  # passes over the data
    max_steps: int = 0  # optimizer steps at most (0: no limit but num_epochs)
    learning_rate: float = 3e-4  # peak of AdamW's, after warm-up; falls linearly to 0
    warmup_steps: int = setting(100, 0)  # steps of linear warm-up, at most a tenth of all
    weight_decay: float = 0.0  # AdamW's
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    seed: int = setting(42, -(2**62), 2**62)  # of split, order, A's first values and dropout

    # speed and memory

    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: str = setting("auto", choices=("auto", *DTYPES))  # of the activations
    # of the frozen base (auto: as dtype)
    base_dtype: str = setting("auto", choices=("auto", *DTYPES, *QUANTISED))
    # rows computed at once, at most (0: as many as micro_batch_tokens allows)
    micro_batch_size: int = 0
    # tokens computed at once, at most, unless one row alone is longer (0: 8,192 on a GPU,
    # 2,048 on a CPU, fewer where memory asks for it)
    micro_batch_tokens: int = 0
    # which blocks keep no activations, and compute them again for the gradient (auto: as many
    # as memory asks for)
    recompute: str = setting("auto", choices=("none", "full", "auto"))
    memory_gb: float = 0.0  # memory to plan for, in 2^30 bytes (0: 92 % of all)
    # compute the tokens that all rows of a micro-batch begin with once (exact but for
    # dropout, whose mask they then share)
    share_opening: bool = True
    compile: bool = False  # torch.compile each block: pays on a GPU after a minute or two
    shard: bool = False  # under torchrun: cut weights and moments over processes (FSDP2)

    # the run

    output_dir: str = "lora-tcm"  # folder for result, log.jsonl, loss.svg, checkpoints
    overwrite: bool = False  # begin anew in an output_dir that holds a run
    eval_steps: int = setting(200, 0)  # steps between validations (0: only at the end)
    save_steps: int = setting(200, 0)  # steps between checkpoints (0: none)
    save_total_limit: int = setting(3, 0)  # last checkpoints kept, besides the best (0: all)
    # checkpoint-STEP folder to go on from, bit for bit; auto (or True): the last in
    # output_dir, or from the beginning if there is none
    resume_from_checkpoint: str = ""
    num_answers: int = setting(3, 0)  # validation questions answered before and after
    show: int = 0  # print so many rows token by token, targets marked, and end
    wandb_project: str = ""  # log to this Weights & Biases project (needs wandb)
    wandb_run_name: str = ""  # name of the run, there and in run.json


# `python train.py` alone: a base of 5 million weights wants a far larger step than 7 billion do,
# and all its linears; in float32, so that it learns the same everywhere.
TINY = {
    "base_model": f"{DATA}/tiny",
    "data_path": (f"{DATA}/train.jsonl:0.6", f"{DATA}/talks.jsonl:0.5", f"{DATA}/dialogues.jsonl"),
    "train_on": "all",
    "val_path": f"{DATA}/heldout.jsonl",
    "batch_size": 16,
    "micro_batch_size": 16,
    "num_epochs": 1,
    "learning_rate": 8e-4,
    "warmup_steps": 10,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": ("all",),
    "eval_steps": 400,
    "num_answers": 400,
    "dtype": "fp32",
}


def check_config(config):
    """Raise ValueError for a setting that is out of range, does not go with another, or asks for
    what is not there."""
    check_settings(config)
    if Path(config.output_dir).is_file():
        raise ValueError(f"output_dir {config.output_dir} is a file, wanted a folder")
    if config.wandb_project:
        import_module("wandb")  # before anything is loaded
    # on an H200 compiled fp16 was 3 % off, where eager fp16 is 0.3 %
    if config.compile and config.dtype == "fp16":
        raise ValueError(
            "compile gives wrong gradients in fp16 on GPUs; drop --compile, or use --dtype bf16 or "
            "fp32"
        )
    # AdamW's steps are smaller than what bf16 can add to a weight.
    if config.full and config.base_dtype not in ("auto", "fp32"):
        raise ValueError(
            f"base_dtype {config.base_dtype} is for a frozen base, and --full trains the weights "
            "in fp32; drop one of the two"
        )
    # Only torchrun starts several.
    if config.shard and processes()[1] == 1:
        raise ValueError(
            "shard cuts the weights over processes, and there is one; start torchrun "
            "--nproc_per_node N train.py"
        )


def check_targets(shape, config):
    """Raise ValueError if a prompt that sees itself, as ChatGLM-6B's does, is to be learnt too."""
    if shape.prefix_lm and (config.train_on_inputs or config.train_on == "all"):
        raise ValueError(
            "ChatGLM-6B's prompt sees all of itself, so that nothing in it can be predicted; drop "
            "--train_on_inputs and --train_on all"
        )


# ==================================================================================================
# Command


def parse_config():
    """The TrainConfig of the command line: each field is an option."""
    parser = Parser(description=__doc__.partition("\n\nWhat this")[0])
    # Only what was given is here: the rest has the defaults of TrainConfig, or of TINY.
    parser.add_settings(TrainConfig, **TINY)
    given = vars(parser.parse_args())
    # A share of the data for validation takes the place of TINY's file.
    if "val_set_size" in given:
        given.setdefault("val_path", "")
    if given.get("base_model"):
        given.setdefault("prompt_template_name", "")  # main finds it
    else:
        given = TINY | given | {"base_model": TINY["base_model"]}
    config = TrainConfig(**given)
    # q_proj v_proj, or as Fire users write it '["q_proj","v_proj"]'
    names = re.findall(r"\w+", " ".join(config.lora_target_modules))
    return replace(config, lora_target_modules=tuple(names))


def make_trainable(model, config, dtype):
    """Freeze the base behind a fresh adapter, or with --full train all of it; compute in dtype."""
    model.compute_dtype = dtype
    torch.manual_seed(config.seed)
    if config.full:
        model.requires_grad_(True)
    else:
        c = config
        add_lora(model, LoRAConfig(c.lora_r, c.lora_alpha, c.lora_dropout, c.lora_target_modules))


def load_trainable(config, device, dtype):
    """The base as it is to be trained, on the device or cut over the processes."""
    storage = torch.float32 if config.full else DTYPES.get(config.base_dtype, dtype)
    # To be cut it is mapped as stored: `shard` moves and casts a block at a time.
    where, stored = ("cpu", None) if config.shard else (device, storage)
    kind = config.base_dtype if config.base_dtype in QUANTISED else "auto"
    model, _ = load_base(config.base_model, where, stored, kind)
    make_trainable(model, config, dtype)
    trained = sum(p.numel() for p in trained_parameters(model).values())
    print(
        f"base {config.base_model} on {device} in {dtype}; {trained:,} numbers trained: "
        f"{'all weights' if config.full else f'LoRA r {config.lora_r}'}"
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
    sys.stdout = Lasting(sys.stdout)
    config = parse_config()
    device = join_processes(pick_device(config.device))
    check_config(config)
    if not config.output_dir:
        raise ValueError("output_dir is empty; give a folder for the result")

    # The data first: what is wrong with it is said before anything large is loaded.
    base, (records, val_records) = find_base(config.base_model), read_data(config)
    shape = Checkpoint(base).config  # before files that it might lack
    check_targets(shape, config)
    tokenizer = load_tokenizer(base)
    if not config.prompt_template_name:
        config = replace(config, prompt_template_name=default_template(tokenizer))
    template = load_template(config.prompt_template_name)
    encode = partial(encode_records, tokenizer, template, config=config)
    if config.show:
        return show_rows(tokenizer, encode(records)[: config.show])
    run = Run(config)
    if run.finished and (run.folder / "answers.jsonl").is_file():
        print(f"the run in {config.output_dir} is finished, {len(run.history)} steps")
        return
    rows, val_rows = encode(records), encode(val_records)

    # Then the model, as memory allows. The plan needs no weights, only the base's shape.
    dtype, tokens = pick_dtype(config.dtype, device), run.limits.tokens_at_once
    plan = plan_memory(shape, config, rows + val_rows, dtype, device, tokens)
    print(
        f"memory: {plan.bytes / 2**30:.2f} GB by the estimate, {plan.tokens_at_once:,} tokens at "
        f"once, {plan.recomputed} blocks recomputed"
    )
    model = load_trainable(config, device, dtype)
    model.recomputed, run.limits.tokens_at_once = plan.recomputed, plan.tokens_at_once

    # Training, and answers to some of the validation questions before and after.
    count = 0 if config.shard else config.num_answers  # token by token, gathering is too slow
    every = max(1, len(val_rows) // max(1, count))
    questions = [row.record for row in val_rows[::every][:count]]
    questions = answer_all(model, tokenizer, template, questions, "before")
    history = train(config, model, (rows, val_rows), run)
    if run.finished and questions:  # only the answers are missing
        if config.full:
            model, _ = load_base(run.folder, device, dtype)
        else:
            remove_adapter(model)
            load_adapter(model, run.folder)
    answers = answer_all(model, tokenizer, template, questions, "after")
    if run.writes:
        write_json_lines(run.folder / "answers.jsonl", answers)
        print_report(config, history, answers)


if __name__ == "__main__":
    run(main)
