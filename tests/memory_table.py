"""Memory and time to tune LLaMAs of published sizes, as a table for README.md.

  python tests/memory_table.py

Memory is what train.py plans with (`plan_memory`, which builds the model on `meta`), for rows of
512 tokens, r 8 on q_proj and v_proj. Time is arithmetic, not measured: BenTsao's recipe of 17
million tokens at 4 operations a weight and token (forward 2, gradient of the activations 2; 6 where
blocks are recomputed), at 45 % of the card's nominal rate.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train as T  # noqa: E402
from model import LLaMA, LLaMAConfig  # noqa: E402

SIZES = {
    "LLaMA-7B": LLaMAConfig(4096, 32, 32, 32000, 1e-6, 11008),
    "LLaMA-13B": LLaMAConfig(5120, 40, 40, 32000, 1e-6, 13824),
    "LLaMA-30B": LLaMAConfig(6656, 60, 52, 32000, 1e-6, 17920),
}
CARDS = {"24 GB, 165 TFLOP/s": (24, 165e12), "80 GB, 989 TFLOP/s": (80, 989e12)}
TOKENS = 17e6


def describe(shape, stored, gigabytes, rate):
    """(GB, blocks recomputed, hours) of a base stored so on a card; None if it does not fit."""
    config = T.TrainConfig(base_dtype=stored, memory_gb=gigabytes * 0.92)
    rows = [T.Row([0] * 512, [False] * 256 + [True] * 256)] * 64
    try:
        plan = T.plan_memory(shape, config, rows, torch.bfloat16, torch.device("cpu"), 2048)
    except ValueError:
        return None
    with torch.device("meta"):
        weights = sum(p.numel() for p in LLaMA(shape).parameters())
    operations = 4 + 2 * plan.recomputed / shape.num_hidden_layers
    return plan.bytes / 2**30, plan.recomputed, operations * weights * TOKENS / (0.45 * rate) / 3600


def main():
    print("| base | stored as |", " | ".join(CARDS), "|\n|---|---|" + "---|" * len(CARDS))
    for name, shape in SIZES.items():
        for stored in ("bf16", "int8", "nf4"):
            cells = []
            for gigabytes, rate in CARDS.values():
                found = describe(shape, stored, gigabytes, rate)
                cells.append("does not fit")
                if found:
                    size, blocks, hours = found
                    note = f", {blocks} blocks recomputed" if blocks else ""
                    cells[-1] = f"{size:.1f} GB{note}, {hours:.1f} h"
            print(f"| {name} | {stored} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
