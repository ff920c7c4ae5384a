"""Peak memory while loading and converting a sharded checkpoint of at least 2 GB: python tests/bench_load.py

Writes Hugging Face's layout (safetensors, then .bin) and Meta's (8 model-parallel shards) of one random bf16 LLaMA and runs
load, cast, convert and export in fresh processes. Each reports its own peak RSS (Linux's VmHWM) above that of the imports;
the limit is the model plus the largest shard. The last line is JSON."""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import lora as L  # noqa: E402
import model as M  # noqa: E402

MEASURE = """
import re, sys, time
sys.path.insert(0, {root!r})
import torch, model as M, lora as L

def peak():                                                       # not ru_maxrss, which a child inherits from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

idle, started = peak(), time.process_time()
{code}
print(peak() - idle, time.process_time() - started)
"""


def measure(code):
    """(peak RSS in bytes above the imports, CPU seconds) of code in a process of its own."""
    code = MEASURE.format(root=str(ROOT), code=code)
    out = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    peak, seconds = out.split()[-2:]
    return int(peak), float(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22, help="22: TinyLlama's 2.2 GB")
    parser.add_argument("--shard_gb", type=float, default=0.3, help="GiB of a safetensors or .bin shard")
    parser.add_argument("--folder", default=None, help="where to write about three times the model's size")
    args = parser.parse_args()
    config = M.LLaMAConfig(dim=2048, n_layers=args.layers, n_heads=32, n_kv_heads=32, vocab_size=32000, norm_eps=1e-5)
    result = {"parameters": 0, "runs": {}}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        for name in ("hf", "bin", "meta"):
            (folder / name).mkdir()
        with torch.device("meta"):
            model = M.LLaMA(config)
        generator = torch.Generator().manual_seed(0)
        state = {k: torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                 for k, p in model.named_parameters()}
        model.load_state_dict(state, assign=True)
        L.save_hf(model, folder / "hf", ROOT / "data" / "tiny" / "tokenizer.model", 2048, int(args.shard_gb * 2**30))
        index = json.loads((folder / "hf" / "model.safetensors.index.json").read_text())
        for file in sorted(set(index["weight_map"].values())):
            torch.save(dict(M.open_weights(folder / "hf" / file)), folder / "bin" / file.replace(".safetensors", ".bin"))
        index["weight_map"] = {k: v.replace(".safetensors", ".bin") for k, v in index["weight_map"].items()}
        (folder / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        shutil.copyfile(folder / "hf" / "config.json", folder / "bin" / "config.json")
        for n in range(8):                                        # as fairscale's parallel layers split them
            parts = {}
            for k, t in state.items():
                axis = 1 if k.endswith(("wo.weight", "w2.weight")) or k == "tok_embeddings.weight" else 0
                parts[k] = t.clone() if "norm" in k else t.chunk(8, axis)[n].clone()
            torch.save(parts, folder / "meta" / f"consolidated.{n:02}.pth")
        M.write_json(folder / "meta" / "params.json", config.params() | {"vocab_size": -1})
        result["parameters"] = sum(t.numel() for t in state.values())
        size = sum(t.nbytes for t in state.values())
        del state, model
        print(f"{result['parameters']:,} parameters, {size / 1e9:.2f} GB as bf16")
        for layout in ("hf", "bin", "meta"):
            path, ours = str(folder / layout), str(folder / f"{layout}-ours")
            files = [f.stat().st_size for f in (folder / layout).iterdir() if f.suffix in (".safetensors", ".bin", ".pth")]
            runs = {"load": (f"m = M.load_model({path!r}); s = [p.aminmax() for p in m.parameters()]", size),
                    "load as float32": (f"m = M.load_model({path!r}, dtype=torch.float32)", 2 * size),
                    "convert": (f"M.convert({path!r}, {ours!r})", size)}
            for name, (code, model_bytes) in runs.items():
                peak, seconds = measure(code)
                limit = model_bytes + max(files)
                result["runs"][f"{layout} {name}"] = {"peak_bytes": peak, "limit_bytes": limit, "seconds": round(seconds, 1),
                                                      "shards": len(files), "largest_shard_bytes": max(files)}
                print(f"{layout:5}{name:16} {len(files)} shards of at most {max(files) / 1e9:.2f} GB: peak {peak / 1e9:.2f} GB, "
                      f"model {model_bytes / 1e9:.2f}, limit {limit / 1e9:.2f}; {seconds:.0f} s" + " OVER" * (peak > limit),
                      flush=True)
            shutil.rmtree(ours)
        peak, seconds = measure(f"m = M.load_model({str(folder / 'hf')!r}); L.save_hf(m, M.Path({str(folder)!r}), "
                                f"{str(ROOT / 'data' / 'tiny' / 'tokenizer.model')!r}, 2048, {int(args.shard_gb * 2**30)})")
        result["runs"]["hf export"] = {"peak_bytes": peak, "limit_bytes": size + max(files), "seconds": round(seconds, 1)}
        print(f"hf   export: peak {peak / 1e9:.2f} GB (model {size / 1e9:.2f}), {seconds:.0f} s")
    result["model_bytes"] = size
    result["within_limit"] = all(r["peak_bytes"] <= r["limit_bytes"] for r in result["runs"].values())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
