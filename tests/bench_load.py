"""Peak memory while loading and converting a sharded checkpoint of at least 2 GB:
python tests/bench_load.py

Writes Hugging Face's layout (safetensors, then .bin) and Meta's (8 model-parallel shards) of one
random bf16 LLaMA and runs load, cast, convert and export in fresh processes. Each reports its own
peak RSS (Linux's VmHWM) above that of the imports; the limit is the model plus the largest shard.
The last line is JSON."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model as M  # noqa: E402

MEASURE = """
import re, sys, time
sys.path.insert(0, {root!r})
import torch, model as M, lora as L

def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

idle, started = peak(), time.process_time()
{code}
print(peak() - idle, time.process_time() - started)
"""


def measure(code):
    """(peak RSS in bytes above the imports, CPU seconds) of code in a process of its own."""
    code = MEASURE.format(root=str(ROOT), code=code)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak, seconds = done.stdout.split()[-2:]
    return int(peak), float(seconds)


def weight_sizes(folder):
    """The sizes of a folder's files of weights."""
    kinds = (".safetensors", ".bin", ".pth")
    return [file.stat().st_size for file in folder.iterdir() if file.suffix in kinds]


def write_layouts(folder, config, shard_bytes):
    """Write one random bf16 model into hf, bin and meta; return its weights and bytes."""
    for name in ("hf", "bin", "meta"):
        (folder / name).mkdir()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in M.LLaMA(config).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
        for name, shape in shapes.items()
    }
    base = ROOT / "data" / "tiny"
    M.save_hf(config, state.items(), folder / "hf", torch.bfloat16, base, shard_bytes)
    index = json.loads((folder / "hf" / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        weights = M.open_weights(folder / "hf" / file)
        torch.save(weights, folder / "bin" / file.replace(".safetensors", ".bin"))
    places = {k: v.replace(".safetensors", ".bin") for k, v in index["weight_map"].items()}
    index = json.dumps({**index, "weight_map": places})
    (folder / "bin" / "pytorch_model.bin.index.json").write_text(index)
    shutil.copyfile(folder / "hf" / "config.json", folder / "bin" / "config.json")
    for n in range(8):  # as fairscale's parallel layers split them
        parts = {}
        for name, tensor in state.items():
            inputs = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight")
            axis = 1 if name.endswith(inputs) else 0
            cut = tensor if "norm" in name else tensor.chunk(8, axis)[n]
            parts[M.stored_name(name, "meta")] = cut.clone()
        torch.save(parts, folder / "meta" / f"consolidated.{n:02}.pth")
    M.write_json(folder / "meta" / "params.json", M.config_to_meta(config) | {"vocab_size": -1})
    return sum(t.numel() for t in state.values()), sum(t.nbytes for t in state.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--layers", type=int, default=22, help="22: TinyLlama's 2.2 GB")
    parser.add_argument(
        "--shard_gb", type=float, default=0.3, help="GiB of a safetensors or .bin shard"
    )
    parser.add_argument(
        "--folder", default=None, help="where to write about three times the model's size"
    )
    args = parser.parse_args()
    config = M.LLaMAConfig(
        hidden_size=2048,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        intermediate_size=5632,
    )
    shard_bytes = int(args.shard_gb * 2**30)
    result = {"parameters": 0, "runs": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        result["parameters"], size = write_layouts(folder, config, shard_bytes)
        print(f"{result['parameters']:,} parameters, {size / 1e9:.2f} GB as bf16")
        for layout in ("hf", "bin", "meta"):
            path, ours = str(folder / layout), str(folder / f"{layout}-ours")
            files = weight_sizes(folder / layout)
            load = f"m = M.load_model({path!r}); s = [p.aminmax() for p in m.parameters()]"
            wide = f"m = M.load_model({path!r}, dtype=torch.float32)"
            runs = {
                "load": (load, size),
                "load as float32": (wide, 2 * size),
                "convert": (f"M.convert({path!r}, {ours!r})", size),
            }
            for name, (code, model_bytes) in runs.items():
                peak, seconds = measure(code)
                limit = model_bytes + max(files)
                result["runs"][f"{layout} {name}"] = {
                    "peak_bytes": peak,
                    "limit_bytes": limit,
                    "seconds": round(seconds, 1),
                    "shards": len(files),
                    "largest_shard_bytes": max(files),
                }
                print(
                    f"{layout:5}{name:16} {len(files)} shards of at most {max(files) / 1e9:.2f} "
                    f"GB: peak {peak / 1e9:.2f} GB, model {model_bytes / 1e9:.2f}, limit "
                    f"{limit / 1e9:.2f}; {seconds:.0f} s" + " OVER" * (peak > limit),
                    flush=True,
                )
            shutil.rmtree(ours)
        peak, seconds = measure(
            f"L.export({str(folder / 'hf')!r}, L.Options(output_dir={str(folder / 'exported')!r}, "
            f"max_shard_gb={shard_bytes / 2**30}))"
        )
        result["runs"]["hf export"] = {
            "peak_bytes": peak,
            "limit_bytes": size + max(weight_sizes(folder / "hf")),
            "seconds": round(seconds, 1),
        }
        print(f"hf   export: peak {peak / 1e9:.2f} GB (model {size / 1e9:.2f}), {seconds:.0f} s")
    result["model_bytes"] = size
    runs = result["runs"].values()
    result["within_limit"] = all(run["peak_bytes"] <= run["limit_bytes"] for run in runs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
