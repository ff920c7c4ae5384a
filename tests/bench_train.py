"""Training, side by side with transformers + peft: real tokens/s, memory, share of the matmul peak,
loss.

  python tests/bench_train.py                  dim 512 x 8 on a CPU, one thread: about 10 minutes
  python tests/bench_train.py --size 7b        LLaMA-7B shapes, random weights, on a GPU: 10 minutes

Both sides have the same weights (one copy), adapters, rows, order and
precision; they take turns, optimizer step by optimizer step, in one process. Their side is a bare
loop around LlamaForCausalLM and peft: what Trainer adds to it is not counted. BenTsao's settings: r
8 on q and v, alpha 16, dropout 0.05, micro-batch 8; ours on a GPU takes train.py's own 8,192 tokens
at once, and steps have BenTsao's 128 rows there.

  peft random     rows in random order, padded to the longest of 8 (and to a multiple of 8), as
                  BenTsao runs
  peft grouped    the same with group_by_length
  ours            train.py's step_gradient on the rows of peft random
  ours, no prefix the same without the prompt's common opening computed once

On a CPU without bf16 instructions (AVX512-BF16, AMX) only float32 is run, since theirs in bf16
takes minutes for 8 rows there: ask for it with --dtype bf16, 8 --rows and one of their --sides, one
--measure at a time.

Tokens are real ones: no padding, and all of each row, however much of it was shared. MFU is 4 FLOP
per real token and weight (embeddings apart) over the largest product measured here. With the
project's data at hand (--data) the rows are BenTsao's; else they are random ids with the lengths of
BenTsao's, which four numbers describe."""

import argparse
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import generate as G  # noqa: E402
import lora as L  # noqa: E402
import model as M  # noqa: E402
import train as T  # noqa: E402

# hidden size, layers, heads
SIZES = {
    "tiny": (64, 2, 4),
    "small": (512, 8, 8),
    "medium": (1024, 16, 16),
    "7b": (4096, 32, 32),
}  # dim, layers, heads
SIDES = ["peft random", "peft grouped", "ours, no prefix", "ours"]
VOCAB = 32000
# BenTsao's 8,658 rows under LLaMA's tokenizer: 38 tokens of template, then question and end of
# template, and answer
# with EOS, both near lognormal and independent of each other (correlation 0.03): (median, sigma
# of the logarithm).
OPENING, QUESTION, ANSWER = 38, (75.7, 0.343), (85.7, 0.601)
DATA = ROOT.parent / "shared" / "data"


def simulated_rows(n, cutoff, seed=0, vocab=VOCAB):
    """n rows with the lengths of BenTsao's and random ids."""
    rng = torch.Generator().manual_seed(seed)
    opening = torch.randint(3, vocab, (OPENING,), generator=rng).tolist()
    rows = []
    for _ in range(n):
        question, answer = (
            max(2, int(m * math.exp(s * torch.randn((), generator=rng))))
            for m, s in (QUESTION, ANSWER)
        )
        prompt = min(OPENING + question, cutoff - 2)
        length = min(prompt + answer, cutoff)
        ids = (
            opening[:prompt]
            + torch.randint(3, vocab, (length - min(OPENING, prompt),), generator=rng).tolist()
        )
        rows.append(T.Row(ids, [False] * prompt + [True] * (length - prompt)))
    return rows


def llama_tokenizer(data):
    """LLaMA's tokenizer, which the data has under a name of its own."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(data / "llama_tokenizer.model", Path(folder) / "tokenizer.model")
        return G.load_tokenizer(folder)


def real_rows(data, cutoff):
    """BenTsao's records under its template, encoded as train.py encodes them."""
    tokenizer = llama_tokenizer(data)
    records = G.read_instructions(data / "bentsao_llama_data.json", answers=True)
    config = T.TrainConfig(cutoff_len=cutoff)
    rows = [
        T.encode_example(tokenizer, G.load_template("med_template"), r, config) for r in records
    ]
    return [row for row in rows if row is not None]


class Allocated(TorchDispatchMode):
    """Bytes of the storages made inside this mode and still alive: `now`, and at most, `peak`. The
    CPU's own allocator counts nothing; on a GPU torch.cuda.max_memory_allocated does."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def gone(self, key, size):
        self.now -= size
        del self.seen[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            id(t.untyped_storage())
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key not in self.seen and key not in given:
                    self.seen[key] = weakref.finalize(storage, self.gone, key, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out


def peak_bytes(device, work):
    """Most bytes that work() held above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Allocated() as allocated:
        work()
    return allocated.peak


def clock(device):
    """Seconds: of this process's own CPU time on one thread, which other processes do not disturb;
    else of the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (
        time.process_time()
        if device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter()
    )


def matmul_peak(device, dtype, shape=None):
    """FLOP/s of the fastest of a few plain products, the best of several tries."""
    best = 0.0
    for m, k, n in (
        [shape]
        if shape
        else [(2048, 512, 1536), (2048, 1024, 1024), (2048, 2048, 2048)]
        if device.type == "cpu"
        else [(8192, 8192, 8192), (4096, 4096, 11008)]
    ):
        a, b = (
            torch.randn(m, k, device=device).to(dtype),
            torch.randn(n, k, device=device).to(dtype),
        )
        for _ in range(6 if device.type == "cpu" else 30):
            start = clock(device)
            a @ b.T
            best = max(best, 2 * m * k * n / (clock(device) - start))
    return best


def build(size, device, dtype, seed=0):
    """Our model with fresh weights made on the device."""
    dim, layers, heads = SIZES[size]
    config = M.LLaMAConfig(dim, layers, heads, VOCAB, 1e-6, -(-dim * 8 // 3 // 256) * 256)
    with torch.device("meta"):
        model = M.LLaMA(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        p.fill_(1.0) if "norm" in name else p.normal_(0.0, 0.02)
    return model


def build_theirs(ours, dropout):
    """LlamaForCausalLM and peft's adapter over our model's weights."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        **{key: value for key, value in asdict(ours.config).items() if "rope" not in key},
        use_cache=False,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    state = {M.stored_name(name): p for name, p in ours.named_parameters()}
    theirs.load_state_dict(state, strict=True, assign=True)
    # its table was made on `meta`
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(ours.device)
    return peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj"],
        ),
    ).train()


def same_adapter(ours, theirs):
    """Copy our A into peft's (B is zero on both sides)."""
    state = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, module in L.lora_linears(ours):
            state[f"{L.PREFIX}model.{name}.lora_A.default.weight"].copy_(module.lora_a)


def their_step(model, batches):
    """Gradient of one optimizer step, padded, the loss summed over the step's targets as Trainer
    does since 4.46."""
    count, total = sum(sum(row.mask) for rows in batches for row in rows), 0.0
    for rows in batches:
        width = -(-max(len(row.ids) for row in rows) // 8) * 8
        pad = [width - len(row.ids) for row in rows]
        ids = torch.tensor([row.ids + [0] * n for row, n in zip(rows, pad)])
        attention = torch.tensor([[1] * len(row.ids) + [0] * n for row, n in zip(rows, pad)])
        labels = ids.masked_fill(
            ~torch.tensor([row.mask + [False] * n for row, n in zip(rows, pad)]), -100
        )
        device = next(model.parameters()).device
        loss = model(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            labels=labels.to(device),
            num_items_in_batch=count,
        ).loss
        loss.backward()
        total += loss.item()
    return total


def length_grouped(rows, per_step, seed=0):
    """transformers' group_by_length: its own function, for steps of per_step rows."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    return get_length_grouped_indices(
        [len(row.ids) for row in rows], per_step, generator=torch.Generator().manual_seed(seed)
    )


def cut(rows, size):
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def tokens(rows):
    return sum(len(row.ids) for row in rows)


def measure(args, dtype, cutoff, device):
    """One table: every side at one precision and cut-off. Returns its figures."""
    pool = real_rows(args.data, cutoff) if args.data else simulated_rows(4000, cutoff)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(1)).tolist()
    steps = cut([pool[i] for i in order], args.rows)[: args.rounds]
    # grouped steps are uniform inside and differ among themselves: take micro-batches spread over
    # the whole order
    grouped = cut([pool[i] for i in length_grouped(pool, 128)], 8)[: len(pool) // 8]
    n = args.rounds * max(1, args.rows // 8)
    spread = [grouped[(2 * i + 1) * len(grouped) // (2 * n)][: args.rows] for i in range(n)]
    spread = [spread[i :: args.rounds] for i in range(args.rounds)]

    config = T.TrainConfig(
        output_dir="",
        base_model="random weights",
        batch_size=args.rows,
        cutoff_len=cutoff,
        micro_batch_size=0 if device.type == "cuda" else 8,
        recompute=args.recompute,
        memory_gb=args.memory_gb,
        micro_batch_tokens=8192,
    )
    ours = build(args.size, device, dtype)
    plan = T.plan_memory(ours.config, config, pool, dtype, device, config.micro_batch_tokens)
    ours.recomputed = plan.recomputed
    with torch.no_grad():
        theirs = (
            build_theirs(ours, config.lora_dropout)
            if any("peft" in side for side in args.sides)
            else None
        )
    T.make_trainable(ours, config, dtype)
    ours.train()
    if args.compile:
        T.compile_blocks(ours)
    apart = replace(config, share_opening=False)
    sides = {
        "ours, no prefix": (ours, lambda rows: T.step_gradient(ours, rows, apart)),
        "ours": (ours, lambda rows: T.step_gradient(ours, rows, config)),
    }
    if theirs is not None:
        same_adapter(ours, theirs)
        their_side = (theirs, lambda rows: their_step(theirs, cut(rows, 8)))
        sides = {"peft random": their_side, "peft grouped": their_side, **sides}
    sides = {name: sides[name] for name in SIDES if name in args.sides}

    # memory first: one micro-batch, the same 8 rows on both sides; it warms the kernels up as well
    memory = {}
    for name, (model, step) in sides.items():
        if "memory" in args.measure and name not in ("peft grouped", "ours, no prefix"):
            memory[name] = peak_bytes(device, partial(step, steps[0][:8]))
            model.zero_grad()
    optimizers = {
        id(m): torch.optim.AdamW(
            [p for p in m.parameters() if p.requires_grad], lr=3e-4, weight_decay=0.0
        )
        for m, _ in sides.values()
    }
    peak, seconds, real, losses = (
        0.0,
        {n: [] for n in sides},
        {n: [] for n in sides},
        {n: [] for n in sides},
    )
    for i in range(args.rounds * ("speed" in args.measure)):
        peak = max(
            peak,
            matmul_peak(device, dtype if G.has_bf16(device) else torch.float32),
        )
        for name, (model, step) in sides.items():
            rows = (
                [row for micro in spread[i] for row in micro]
                if name == "peft grouped"
                else steps[i]
            )
            start = clock(device)
            losses[name].append(step(rows))
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if name in ("peft random", "ours"):  # the others measure speed alone
                optimizers[id(model)].step()
            model.zero_grad()
            seconds[name].append(clock(device) - start)
            real[name].append(tokens(rows))
    weights = sum(
        p.numel()
        for n, p in ours.named_parameters()
        if "embed_tokens" not in n and "lora_" not in n
    )
    table = {}
    for name in sides:
        speed = statistics.median(n / s for n, s in zip(real[name], seconds[name])) if peak else 0.0
        table[name] = {
            "real_tokens_per_second": speed,
            "mfu": 4 * weights * speed / max(peak, 1.0),
            "losses": losses[name],
            "memory_mib": memory[name] / 2**20 if name in memory else None,
        }
    figures = {
        "dtype": str(dtype)[6:],
        "cutoff": cutoff,
        "matmul_gflops": peak / 1e9,
        "estimate_gib": plan.bytes / 2**30,
        "recomputed": ours.recomputed,
        "sides": table,
    }
    print(
        f"\n{figures['dtype']}, cut-off {cutoff}, {args.rounds} steps of {args.rows} rows; largest "
        f"product {peak / 1e9:,.0f} GFLOP/s"
    )
    print("| side | real tokens/s | MFU | activations of 8 rows, MiB | loss of the last step |")
    print("|---|---|---|---|---|")
    for name, t in table.items():
        last = f"{t['losses'][-1]:.4f}" if peak and name in ("peft random", "ours") else "-"
        held = f"{t['memory_mib']:,.0f}" if t["memory_mib"] else "-"
        print(f"| {name} | {t['real_tokens_per_second']:,.0f} | {t['mfu']:.1%} | {held} | {last} |")
    for key, name in (("speedup", "peft random"), ("speedup_grouped", "peft grouped")):
        if peak and {name, "ours"} <= sides.keys():
            ratios = [
                real["ours"][i] / seconds["ours"][i] / (real[name][i] / seconds[name][i])
                for i in range(args.rounds)
            ]
            figures[key] = statistics.median(ratios)
            print(f"ours / {name} {figures[key]:.2f}", flush=True)
    if {"peft random", "ours"} <= memory.keys():
        figures["memory_ratio"] = memory["ours"] / memory["peft random"]
        print(f"activation memory {figures['memory_ratio']:.2f} of theirs", flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=M.DTYPES,
        help="default: what train.py would take, then the other",
    )
    parser.add_argument("--cutoff", nargs="+", type=int, help="default: 512 256; 7b: 512")
    parser.add_argument(
        "--rows", type=int, help="rows of an optimizer step (default: 64, on a GPU 128)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="optimizer steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA if DATA.is_dir() else None,
        help="folder with BenTsao's records",
    )
    parser.add_argument(
        "--simulated",
        action="store_true",
        help="random ids of like lengths, though --data is there",
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument(
        "--measure", nargs="+", choices=("speed", "memory"), default=("speed", "memory")
    )
    parser.add_argument("--recompute", choices=("none", "auto", "full"), default="auto")
    parser.add_argument(
        "--memory_gb",
        type=float,
        default=0.0,
        help="plan for so much, and cap a GPU to it (with --sides ours)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks")
    args = parser.parse_args()
    args.data = None if args.simulated else args.data
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    args.rows = args.rows or (128 if device.type == "cuda" else 64)
    args.cutoff = args.cutoff or ([512] if args.size == "7b" else [512, 256])
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32 on both sides
        if args.memory_gb:
            torch.cuda.set_per_process_memory_fraction(
                args.memory_gb * 2**30 / torch.cuda.get_device_properties(0).total_memory
            )
    tables = []
    native = ["bf16"] if G.has_bf16(device) else []
    for dtype in args.dtype or (["bf16"] if args.size == "7b" else [*native, "fp32"]):
        for cutoff in args.cutoff:
            tables.append(measure(args, M.DTYPES[dtype], cutoff, device))
    print(
        json.dumps(
            {
                "benchmark": "train",
                "size": args.size,
                "speedup": tables[0].get("speedup"),
                "device": torch.cuda.get_device_name()
                if device.type == "cuda"
                else platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "threads": args.threads,
                "rows": "BenTsao's" if args.data else "simulated",
                "tables": tables,
            }
        )
    )


if __name__ == "__main__":
    main()
