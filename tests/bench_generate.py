"""Decoding speed against transformers' generate: same random weights, one run, in alternation,
medians.

  python tests/bench_generate.py --size mid                  width 1024, 16 layers, 32,000 pieces
  python tests/bench_generate.py --size 7b --device cuda     LLaMA-7B's shape, made on the card
  python tests/bench_generate.py --cases bf16_1 int8_1

A case is PRECISION_BATCH or PRECISION_beamsN, with _compiled behind it for our --compile, or
PRECISION_serverN. Both sides answer the same random prompts greedily (or by beams), EOS ignored,
--new tokens each, the prompt included in the time; transformers runs its dynamic cache (--static:
its static cache, compiled), in bf16 for int8 and nf4, since it has no such weights of its own.
Decode figures subtract the time to the first token, measured apart. The share of the bandwidth,
which is that of summing 1 GiB, counts the weights alone. Compilation is timed apart. serverN is
ours alone: N clients, each with the openai package in a thread of its own, ask `generate.py
--serve` (8 places) one streamed question after another, for --seconds. The last line is one JSON
object."""

import argparse
import gc
import json
import random
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import openai
import torch
import transformers
from soak_server import start
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
import generate as G  # noqa: E402
import model as M  # noqa: E402
from lora import quantize  # noqa: E402

SHAPES = {  # C, layers, heads, F
    "tiny": (256, 4, 4, 768),
    "small": (512, 8, 8, 1536),
    "mid": (1024, 16, 16, 2816),
    "7b": (4096, 32, 32, 11008),
}
PIECES = 32000


def make_config(size, pieces):
    width, layers, heads, feed_forward = SHAPES[size]
    return M.LLaMAConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        vocab_size=pieces,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
    )


def make_pair(size, dtype, device):
    """Our model and transformers' over the same tensors in the same memory."""
    config = make_config(size, PIECES)
    theirs = {key: value for key, value in asdict(config).items() if value is not None}
    with torch.device("meta"):
        ours, hf = M.LLaMA(config), LlamaForCausalLM(LlamaConfig(**theirs))
    draw = torch.Generator(device).manual_seed(0)
    state = {}
    for name, p in ours.named_parameters():
        state[name] = torch.ones_like(p, device=device, dtype=dtype)
        if "norm" not in name:
            state[name].normal_(0, 0.02, generator=draw)
    ours.load_state_dict(state, assign=True)
    hf.load_state_dict({M.stored_name(name): tensor for name, tensor in state.items()}, assign=True)
    # its buffers were on meta
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config).to(device)
    return ours.requires_grad_(False).eval(), hf.requires_grad_(False).eval()


def weight_bytes(model):
    """Bytes of weights that a decoding step reads: all but the embedding table."""
    return sum(
        t.numel() * t.element_size()
        for name, t in model.state_dict().items()
        if "embed" not in name
    )


class Clock:
    """Seconds of a call, the device's work included; with one CPU thread, those of the
    processor."""

    def __init__(self, device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.now = (
            time.process_time
            if device.type == "cpu" and torch.get_num_threads() == 1
            else time.perf_counter
        )

    def __call__(self, f):
        self.wait()
        start = self.now()
        f()
        self.wait()
        return self.now() - start


def bandwidth(clock, device):
    """GB/s of reading: the best of five sums over 1 GiB."""
    data = torch.ones(2**28, device=device)
    data.sum()
    return data.numel() * 4 / min(clock(data.sum) for _ in range(5)) / 1e9


def our_answers(batch, prompts, new, beams):
    requests = [G.Request(ids, G.Decoding(new, num_beams=beams)) for ids in prompts]
    for request in requests:
        batch.submit(request)
    while batch.waiting or batch.rows:
        batch.step()
    assert all(len(r.ids) == new for r in requests)
    return [r.ids for r in requests]


def their_answers(hf, prompts, new, beams, **more):
    ids = torch.tensor(prompts, device=hf.device)
    out = hf.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        num_beams=beams,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    return out[:, ids.size(1) :].tolist()


def share(values, part):
    """The value that so much of them are not above, in ms."""
    return round(sorted(values)[int(part * (len(values) - 1))] * 1e3, 1)


def server_load(args, precision, clients):
    """Figures of `generate.py --serve` with fresh weights under so many clients."""
    tokenizer = next(
        p
        for p in (DATA / "llama_tokenizer.model", ROOT / "data" / "tiny" / "tokenizer.model")
        if p.is_file()
    )
    pieces, text = (
        G.Tokenizer(tokenizer),
        (ROOT / "data" / "knowledge.jsonl").read_text(encoding="utf-8"),
    )
    text, first, each, made, refused, lock = (
        pieces.encode(text[:200000]),
        [],
        [],
        [],
        [],
        threading.Lock(),
    )
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        model = M.LLaMA(make_config(args.size, pieces.vocab_size))
        M.init_weights(model, 0)
        model.to(torch.float32 if precision == "fp32" else torch.bfloat16)
        M.save_model(model, folder)
        shutil.copy(tokenizer, Path(folder) / "tokenizer.model")
        server, port = start(
            log,
            "--base_model",
            folder,
            "--use_lora",
            "False",
            "--max_new_tokens",
            str(args.new),
            "--device",
            args.device,
            "--context",
            str(3 * args.prompt + args.new),
            "--dtype",
            "fp32" if precision == "fp32" else "bf16",
            "--base_dtype",
            precision,
        )

        def ask(seed):
            dice = random.Random(seed)
            with openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=600
            ) as client:
                while time.perf_counter() < end:
                    at, times = dice.randrange(len(text) - args.prompt), [time.perf_counter()]
                    try:
                        for chunk in client.completions.create(
                            model="base",
                            prompt=pieces.decode(text[at : at + args.prompt]),
                            stream=True,
                            stream_options={"include_usage": True},
                        ):
                            if chunk.choices and chunk.choices[0].text:
                                times.append(time.perf_counter())
                    except openai.RateLimitError:
                        refused.append(seed)
                        time.sleep(1)
                        continue
                    with lock:
                        made.append(chunk.usage.completion_tokens)
                        first.append(times[1] - times[0])
                        each.append((times[-1] - times[1]) / max(1, made[-1] - 1))

        started = time.perf_counter()
        end = started + args.seconds
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - started
        server.terminate()
        server.wait(60)
    return {
        "clients": clients,
        "answers": len(made),
        "refused": len(refused),
        "requests_s": round(len(made) / took, 3),
        "tokens_s": round(sum(made) / took, 1),
        "first_token_ms": {"p50": share(first, 0.5), "p99": share(first, 0.99)},
        "per_token_ms": {"p50": share(each, 0.5), "p99": share(each, 0.99)},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="mid")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[
            "bf16_1",
            "fp32_1",
            "int8_1",
            "nf4_1",
            "bf16_8",
            "fp32_8",
            "bf16_beams4",
            "bf16_server16",
            "fp32_beams4",
            "fp32_1_compiled",
            "int8_1_compiled",
            "bf16_8_compiled",
        ],
    )
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="of asking, in a server case")
    parser.add_argument(
        "--sides", nargs="+", choices=("ours", "theirs"), default=("ours", "theirs")
    )
    parser.add_argument(
        "--static",
        action="store_true",
        help="transformers with its static cache and compiled forward",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="1 also counts CPU time instead of the clock's, which is steadier on a busy machine",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clock = Clock(device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    figures = {
        "size": args.size,
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt": args.prompt,
        "new": args.new,
        "bandwidth_GB_s": round(bandwidth(clock, device), 1),
        "speedup": {},
        "cases": {},
    }
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}: reads "
        f"{figures['bandwidth_GB_s']} GB/s",
        flush=True,
    )
    draw, pair, quantised = torch.Generator().manual_seed(1), None, False
    for case in sorted(
        args.cases, key=lambda c: c.startswith("fp32")
    ):  # one pair of models at a time
        precision, shape, *compiled = case.split("_")
        if shape.startswith("server"):
            pair = None
            gc.collect()
            row = figures["cases"][case] = server_load(args, precision, int(shape[6:]))
            print(
                f"{case:16} " + "  ".join(f"{key} {value}" for key, value in row.items()),
                flush=True,
            )
            continue
        beams = int(shape[5:]) if shape.startswith("beams") else 1
        rows = 1 if beams > 1 else int(shape)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        if pair is None or pair[1].dtype != dtype or quantised or precision in ("int8", "nf4"):
            pair = None
            gc.collect()
            pair = make_pair(args.size, dtype, device)
            if quantised := precision in ("int8", "nf4"):
                quantize(pair[0], precision)
        ours, hf = pair
        prompts = torch.randint(3, PIECES, (rows, args.prompt), generator=draw).tolist()
        torch._dynamo.reset()
        positions = args.prompt + args.new
        batch = G.Batch(ours, rows * beams, positions, compile=bool(compiled))
        theirs = {}
        if args.static:
            hf.forward, theirs = (
                torch.compile(hf.forward),
                {"cache_implementation": "static", "disable_compile": True},
            )
        sides = {
            "ours": partial(our_answers, batch, prompts, beams=beams),
            "theirs": partial(their_answers, hf, prompts, beams=beams, **theirs),
        }
        sides = {side: sides[side] for side in args.sides}
        seconds = {(side, new): [] for side in sides for new in (1, args.new)}
        warm = {side: [clock(partial(answer, 2)), answer(4)] for side, answer in sides.items()}
        answers = {side: warm[side][1] for side in sides}
        for _ in range(args.repeats):
            for new in (1, args.new):
                for side, answer in sides.items():
                    seconds[side, new].append(clock(partial(answer, new)))
        row = {"same_first_tokens": answers["ours"] == answers["theirs"]} if len(sides) == 2 else {}
        size = {"ours": weight_bytes(ours), "theirs": weight_bytes(hf)}
        for side in sides:
            first, whole = (statistics.median(seconds[side, new]) for new in (1, args.new))
            step = (whole - first) / (args.new - 1)
            row[side] = {
                "seconds": round(whole, 3),
                "first_call_s": round(warm[side][0], 1),
                "first_token_s": round(first, 4),
                "tokens_s": round(rows * args.new / whole, 2),
                "decode_tokens_s": round(rows / step, 2),
                "bandwidth_share": round(size[side] / step / 1e9 / figures["bandwidth_GB_s"], 3),
            }
        row["cache_MB"] = round(sum(t.numel() * t.element_size() for t in batch.cache.kv) / 1e6, 1)
        row["weights_MB"] = round(size["ours"] / 1e6, 1)
        row["peak_MB"] = round(
            torch.cuda.max_memory_allocated() / 1e6
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        )
        figures["cases"][case] = row
        if len(sides) == 2:
            row["speedup"] = figures["speedup"][case] = round(
                row["theirs"]["seconds"] / row["ours"]["seconds"], 3
            )
            row["decode_speedup"] = round(
                row["ours"]["decode_tokens_s"] / row["theirs"]["decode_tokens_s"], 3
            )
        print(
            f"{case:16} "
            + "  ".join(
                f"{side} {row[side]['decode_tokens_s']:7.1f} tok/s "
                f"({row[side]['bandwidth_share']:.0%}), "
                f"first {row[side]['first_token_s'] * 1e3:5.0f} ms"
                for side in sides
            )
            + (
                f"  decode {row['decode_speedup']:.2f}x, all {row['speedup']:.2f}x"
                if len(sides) == 2
                else ""
            ),
            flush=True,
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
