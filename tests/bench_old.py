"""What the rebuilding did to speed: an old checkout (ad4fed1) and this one, steps in alternation.

  git worktree add ../old ad4fed1
  python tests/bench_old.py ../old [--cases decode_bf16_1 ...]

Each checkout runs in a process of its own, one thread, on the same random weights (Meta's folder,
which both read). They take turns, a few steps each, so that other load on the machine meets both.
Times are CPU seconds of a step; the ratio is the median over the turns, below 1 where this one is
faster.

decode_DTYPE_ROWS[_compiled]  a decode step, 1024 x 16, behind prompts of 200 tokens
prefill_DTYPE                 a prompt of 512 tokens
train_DTYPE                   the gradient of 8 rows at cut-off 512, 512 x 8, r 8 on q and v
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
DTYPES = ("bf16", "fp32", "int8")
CASES = [f"decode_{dtype}_{rows}" for dtype in DTYPES for rows in (1, 8)]
CASES += [f"decode_{dtype}_{rows}_compiled" for dtype in ("bf16", "int8") for rows in (1, 8)]
CASES += [f"{what}_{dtype}" for what in ("prefill", "train") for dtype in ("bf16", "fp32")]


def write_base(folder, hidden, layers, heads):
    """A random base in Meta's layout."""
    import model as M

    import torch

    config = M.LLaMAConfig(hidden, layers, heads, 32000, 1e-6, -(-8 * hidden // 3 // 256) * 256)
    model = M.LLaMA(config)
    M.init_weights(model, 0)
    folder.mkdir()
    M.save_meta(config, model.named_parameters(), folder, torch.float32)


class Worker:
    """One checkout's side of a case; it answers {case} and {steps: n} on standard input."""

    def __init__(self, bases):
        import generate
        import lora
        import model
        import train

        import bench_train
        import torch

        torch.set_num_threads(1)
        self.torch, self.bases = torch, Path(bases)
        self.M, self.L, self.G, self.T, self.B = model, lora, generate, train, bench_train
        self.is_old = hasattr(generate.Batch, "add")

    def load(self, base, dtype):
        """A model of the base, its weights in memory and not in a mapped file."""
        torch = self.torch
        dtypes = {"fp32": torch.float32}
        kind = dtypes.get(dtype, torch.bfloat16)
        model = self.M.load_model(self.bases / base, dtype=kind)
        for p in model.parameters():
            p.data = p.data.clone()
        if dtype == "int8":
            self.L.quantize(model, "int8", None, kind)
        return model

    def begin(self, case):
        what, dtype, *rest = case.split("_")
        if what == "train":
            self.torch.manual_seed(0)
            model = self.load("small", dtype)
            self.L.add_lora(model, self.L.LoRAConfig(8, 16, 0.05, ("q_proj", "v_proj")))
            return self.train_steps(model.train())
        model = self.load("mid", dtype)
        if what == "prefill":
            return self.prefill_steps(model)
        return self.decode_steps(model, int(rest[0]), rest[1:] == ["compiled"])

    def train_steps(self, model):
        config = self.T.TrainConfig(output_dir="")
        for seed in range(1000):
            rows = self.B.simulated_rows(8, 512, seed=seed)
            rows = [self.T.Row([i % 32000 for i in row.ids], row.mask) for row in rows]
            model.zero_grad()
            yield lambda rows=rows: self.T.step_gradient(model, rows, config)

    def prefill_steps(self, model):
        ids = self.torch.randint(3, 32000, (1, 512))
        while True:
            with self.torch.inference_mode():
                yield lambda: model(ids, model.new_cache(1, 512))

    def decode_steps(self, model, rows, compiled):
        new, generator = 256, self.torch.Generator().manual_seed(1)
        prompts = [self.torch.randint(3, 32000, (200,), generator=generator) for _ in range(rows)]
        decoding = self.G.Decoding(max_new_tokens=new)
        requests = [self.G.Request(prompt.tolist(), decoding) for prompt in prompts]
        if self.is_old:
            tokenizer = type("Tokenizer", (), {"eos_id": -1})
            batch = self.G.Batch(model, tokenizer, rows, 200 + new, -1, compile=compiled)
            for request in requests:
                batch.add(request)
        else:
            batch = self.G.Batch(model, rows, 200 + new, compile=compiled)
            for request in requests:
                batch.submit(request)
        batch.step()
        while True:
            yield batch.step

    def serve(self):
        steps = None
        for line in sys.stdin:
            asked = json.loads(line)
            if "case" in asked:
                steps = self.begin(asked["case"])
                next(steps)()  # compiles, and fills caches
                print(json.dumps(0), flush=True)
                continue
            seconds = 0.0
            for _ in range(asked["steps"]):
                step = next(steps)
                started = time.process_time()
                step()
                seconds += time.process_time() - started
            print(json.dumps(seconds / asked["steps"]), flush=True)


def start(root, bases):
    command = [sys.executable, str(Path(__file__).resolve()), str(root), "--worker", str(bases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root}/tests"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=root, **pipes)


def ask(worker, **what):
    worker.stdin.write(json.dumps(what) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path, help="folder of the old checkout")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        Worker(args.worker).serve()
        return
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as bases:
        write_base(Path(bases, "small"), 512, 8, 8)
        write_base(Path(bases, "mid"), 1024, 16, 16)
        for case in args.cases:
            workers = [start(args.old.resolve(), bases), start(HERE, bases)]
            for worker in workers:
                ask(worker, case=case)
            steps = 4 if case.startswith("decode") else 1
            pairs = []
            for turn in range(args.turns):
                order = workers if turn % 2 else workers[::-1]
                times = {worker: ask(worker, steps=steps) for worker in order}
                pairs.append([times[worker] for worker in workers])
            old, new = (statistics.median(column) * 1e3 for column in zip(*pairs))
            ratio = statistics.median(b / a for a, b in pairs)
            print(
                f"{case:24} old {old:8.1f} ms, new {new:8.1f} ms, new/old {ratio:.3f}", flush=True
            )
            for worker in workers:
                worker.stdin.close()
                worker.wait()


if __name__ == "__main__":
    main()
