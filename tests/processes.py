"""What test_processes.py runs under torchrun, and by itself for comparison: small runs of
train.train, one a case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import generate as G  # noqa: E402
import lora as L  # noqa: E402
import train as T  # noqa: E402

import torch  # noqa: E402
from conftest import RECORDS  # noqa: E402

CASES = {
    "lora": {},
    "full": {"full": True},
    "nf4": {"base_dtype": "nf4"},
    "recompute": {"recompute": "full"},
}

# torch 2.11 cuts floating-point weights alone
SHARDS_CODES = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 11)


def run_case(base, out, case, shard=False, **settings):
    """Three epochs of eight rows in steps of 7 and 1 (so that of two processes one has no row),
    validated on three."""
    config = T.TrainConfig(
        **{
            "base_model": str(base),
            "output_dir": str(out),
            "batch_size": 7,
            "micro_batch_size": 2,
            "num_epochs": 3,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "eval_steps": 2,
            "save_steps": 3,
            "lora_dropout": 0.0,
            "shard": shard,
            **CASES[case],
            **settings,
        }
    )
    model, tokenizer = G.load_base(base, torch.device("cpu"), torch.float32, config.base_dtype)
    model.recomputed = len(model.layers) * (config.recompute == "full")
    torch.manual_seed(0)
    if config.full:
        model.requires_grad_(True)
    else:
        L.add_lora(model, L.LoRAConfig(8, 16, config.lora_dropout, ("all",)))
    if shard:
        held = sum(p.nbytes for p in model.parameters())
        T.shard(model, torch.device("cpu"), torch.float32)
        kept = sum(p.to_local().nbytes for p in model.parameters())
        assert kept < 0.52 * held, (kept, held)  # offsets and odd sizes: a little over the half
    rows = [
        T.encode_example(tokenizer, G.load_template("med_template"), r, config) for r in RECORDS
    ]
    return T.train(config, model, (rows, rows[:3]))


if __name__ == "__main__":
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    T.join_processes(torch.device("cpu"))
    for case in CASES:
        for shard in (False, True):
            name = f"{case}-{'shard' if shard else 'copies'}"
            if name == "nf4-shard" and not SHARDS_CODES:
                continue
            run_case(base, out / name, case, shard)
            if case in ("lora", "full"):
                run_case(base, out / f"{name}-dropout", case, shard, lora_dropout=0.3)
                run_case(
                    base,
                    out / f"{name}-resumed",
                    case,
                    shard,
                    lora_dropout=0.3,
                    resume_from_checkpoint=str(out / f"{name}-dropout" / "checkpoint-3"),
                )
    sys.argv = [
        "train.py",
        "--base_model",
        str(base),
        "--data_path",
        sys.argv[3],
        "--val_set_size",
        "3",
        "--output_dir",
        str(out / "main"),
        "--cutoff_len",
        "128",
        "--num_epochs",
        "1",
        "--batch_size",
        "4",
        "--lora_dropout",
        "0",
    ]
    T.main()
