"""Damaged and hostile files by the hundred, from a seed: each command ends well or with one line
and code 2, within 10 seconds and 1 GiB, and what others wrote is as it was. By default a slice of
it; all with  -m slow -s, which prints the table."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from copy import deepcopy

import build_data as D
import generate as G
import lora as L
import model as M
import train as T

import pytest
import torch
from conftest import RECORDS, run_command
from safetensors.torch import load_file, save_file
from test_checkpoints import hugging_face, write_bin, write_meta

SIZES = {"checkpoints": 500, "adapters": 300, "resume": 200, "records": 200, "outputs": 100}
ODD = [None, True, -1, 0, 3, 2**31, 10**30, 1e308, -0.5, "", "x", "\x1b[2J\x9b", [], [[1]], {}]
ODD += [{"a": {"b": []}}, ["x"] * 9, "7", "../../etc/passwd", "黄芪", float("nan"), float("inf")]


# --------------------------------------------------------------------------------------------------
# Damages


def damage_bytes(rng, file):
    data = bytearray(file.read_bytes())
    at = rng.randrange(max(1, min(len(data), rng.choice([64, 1000, 10**9]))))
    way = rng.choice(["flip", "cut", "zeros", "double", "random", "empty"])
    if way == "flip":
        for _ in range(rng.choice([1, 1, 5, 50])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del data[at:]
    elif way == "zeros":
        data[at : at + 64] = bytes(64)
    elif way == "double":
        data += data[:at]
    elif way == "random":
        data[at : at + 16] = rng.randbytes(16)
    else:
        data.clear()
    file.write_bytes(data)


def damage_value(rng, value):
    """Set, add or delete something, somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice([*value])
        way = rng.random()
        if way < 0.15:
            del value[key]
        elif way < 0.25:
            value[rng.choice(["\x1b]0;x\x07", "x" * 1000, "", "values", "entity"])] = value[key]
        elif way < 0.6:
            value[key] = damage_value(rng, value[key])
        else:
            value[key] = deepcopy(rng.choice(ODD))
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        value[i] = damage_value(rng, value[i])
        return value
    return deepcopy(rng.choice(ODD))


def damage_json(rng, file):
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        values, lines = [json.loads(text)], False
    except ValueError:
        try:
            values, lines = [json.loads(line) for line in text.splitlines()], True
        except ValueError:
            values = []
    if not values:  # it is damaged already
        return damage_bytes(rng, file)
    i = rng.randrange(len(values))
    for _ in range(rng.choice([1, 1, 1, 3])):
        values[i] = damage_value(rng, values[i])
    ends = "\n" if lines else ""
    file.write_text("".join(json.dumps(value) + ends for value in values), encoding="utf-8")


def damage_tensor(rng, tensor):
    some = [
        lambda t: torch.tensor(1.0),
        lambda t: t.flatten()[:1].clone(),
        lambda t: t.T.contiguous() if t.dim() == 2 else t[None].contiguous(),
        lambda t: torch.full_like(t, float("nan")),
        lambda t: t.to(rng.choice([torch.int64, torch.bool, torch.float64, torch.bfloat16])),
        lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
        lambda t: t[:0].clone() if t.dim() else t,
        lambda t: t * 1e38,
    ]
    return rng.choice(some)(tensor)


def damage_tensors(rng, file):
    is_pickle = file.suffix != ".safetensors"
    state = torch.load(file, weights_only=True) if is_pickle else load_file(file)
    key = rng.choice([*state])
    way = rng.random()
    if way < 0.15:
        del state[key]
    elif way < 0.3:
        state[rng.choice(["ghost", f"{key}\x1b[2J", "x" * 5000, ""])] = state[key].clone()
    elif is_pickle and way < 0.6:
        odd = [state[key].to_sparse(), state[key].to("meta"), [1], "x", None, 5]
        odd += [torch.ones(1).expand(2**20, 2**20), state[key].to(torch.complex64), {"a": state}]
        odd += [torch.quantize_per_tensor(state[key].float(), 0.1, 0, torch.qint8)]
        state[key] = rng.choice(odd)
    else:
        state[key] = damage_tensor(rng, state[key])
    torch.save(state, file) if is_pickle else save_file(state, file)


def damage_kind(rng, file):
    """Something else than a file, or a far larger one."""
    file.unlink()
    way = rng.choice(["pipe", "folder", "zero", "broken", "loop", "large", "gone", "private"])
    if way == "pipe":
        os.mkfifo(file)
    elif way == "folder":
        file.mkdir()
    elif way == "large":
        with open(file, "wb") as opened:
            opened.truncate(2**27)
    elif way != "gone":
        private = file.parent.with_name("private")
        private.write_text("mine")
        file.symlink_to({"zero": "/dev/zero", "loop": file, "broken": "nowhere"}.get(way, private))


def damage(rng, folder):
    """Damage one file of a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    file = rng.choice(files)
    ways = [damage_bytes, damage_kind]
    if file.suffix in (".json", ".jsonl"):
        ways += [damage_json] * 6
    if file.suffix in (".safetensors", ".bin", ".pth"):
        ways += [damage_tensors] * 3
    rng.choice(ways)(rng, file)


# --------------------------------------------------------------------------------------------------
# Cases: (main, command line, files that must stay)


@pytest.fixture(scope="module")
def honest(base, records, tmp_path_factory):
    """What is damaged: checkpoints in four layouts, an adapter in both, a run, records."""
    folder, hf = tmp_path_factory.mktemp("honest"), hugging_face().bfloat16()
    hf.save_pretrained(folder / "checkpoints/sharded", max_shard_size="60KB")
    write_bin(folder / "checkpoints/bin", hf)
    write_meta(folder / "checkpoints/meta", hf, 2)
    shutil.copytree(base, folder / "checkpoints/base")
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, targets=("all",)))
    made = {"made_in": {"template": G.load_template("med_template")}, "config": {"lora_r": 4}}
    L.save_adapter(model, folder / "adapters/st", base, made)
    shutil.copytree(folder / "adapters/st", folder / "adapters/bin")
    state = load_file(folder / "adapters/bin/adapter_model.safetensors")
    (folder / "adapters/bin/adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapters/bin/adapter_model.bin")
    assert run_command(T.main, *training(base, records, folder / "run")) == 0
    (folder / "records").mkdir()
    extra = {"entity": "黄芪", "kind": "药材", "form": "single", "relations": ["功效"]}
    lines = [json.dumps({**row, **extra}, ensure_ascii=False) for row in RECORDS]
    (folder / "records/records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def training(base, records, out):
    given = {"base_model": base, "data_path": records, "output_dir": out, "val_set_size": 2}
    given |= {"num_answers": 1, "batch_size": 2, "num_epochs": 1, "cutoff_len": 128}
    given |= {"dtype": "fp32", "save_steps": 1, "lora_dropout": 0}
    return [str(text) for name, value in given.items() for text in (f"--{name}", value)]


def make_case(kind, rng, honest, base, records, work):
    """A damaged copy in `work`, and the command that meets it."""
    out = work / "out"
    if kind == "checkpoints":
        layout = rng.choice(["sharded", "bin", "meta", "base"])
        shutil.copytree(honest / kind / layout, work / "m")
        damage(rng, work / "m")
        if layout == "base" and rng.random() < 0.5:
            return G.main, ["x", "--base_model", work / "m", "--max_new_tokens", 2], work / "m"
        return M.main, rng.choice([["convert", work / "m", out], ["info", work / "m"]]), work / "m"
    if kind == "adapters":
        shutil.copytree(honest / kind / rng.choice(["st", "bin"]), work / "a")
        damage(rng, work / "a")
        given = ["--base_model", base, "--lora_weights", work / "a"]
        if rng.random() < 0.5:
            return L.main, ["merge", *given, "--output_dir", out], work / "a"
        return G.main, ["x", *given, "--max_new_tokens", 2], work / "a"
    if kind == "resume":
        shutil.copytree(honest / "run", out)
        for gone in ("run.json", "answers.jsonl"):
            (out / gone).unlink()
        damage(rng, out / "checkpoint-2" if rng.random() < 0.8 else out)
        return T.main, [*training(base, records, out), "--resume_from_checkpoint", "auto"], None
    if kind == "records":
        shutil.copytree(honest / "records", work / "r")
        for _ in range(rng.choice([1, 2])):
            if any(p.is_file() and p.stat().st_size for p in (work / "r").iterdir()):
                damage(rng, work / "r")
        file = work / "r/records.jsonl"
        asking = ["--base_model", base, "--instruct_dir", file, "--max_new_tokens", 2]
        return *rng.choice(
            [
                (T.main, training(base, file, out)),
                (G.main, [*asking, "--output", work / "answers"]),
                (D.main, ["stats", file, "--html", work / "page.html"]),
            ]
        ), work / "r"
    return make_output_case(rng, base, honest, records, work)


NAMES = """run.json config.json adapter_config.json adapter_model.safetensors answers.jsonl loss.svg
    log.jsonl notes.txt train.jsonl heldout.jsonl page.html checkpoint-2.old/state.safetensors
    checkpoint-1/pytorch_model.bin .checkpoint/x out.tmp/x tokenizer.model""".split()
TEXTS = ["", "notes\n", "{", '{"a": 1}', '{"key": "x"}\n', "[]", '[{"messages": []}]', "<html>\n"]
TEXTS += [json.dumps(RECORDS[0], ensure_ascii=False), '{"step": 1}\n', "\0\xff"]


def make_output_case(rng, base, honest, records, work):
    """A user's files stand where a command is to write."""
    out = work / "out"
    for name in rng.sample(NAMES, rng.choice([1, 2, 4])):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(rng.choice(TEXTS), encoding="utf-8")
    target = rng.choice(sorted(p for p in out.rglob("*") if p.is_file()))
    if rng.random() < 0.3:
        link = work / "link"
        link.symlink_to(target)
        target = link
    asking = ["--base_model", base, "--instruct_dir", records, "--max_new_tokens", 2]
    merge = ["merge", "--base_model", base, "--lora_weights", honest / "adapters/st"]
    again = rng.choice([[], ["--overwrite"], ["--resume_from_checkpoint", "auto"]])
    return *rng.choice(
        [
            (T.main, [*training(base, records, out), *again]),
            (T.main, [*training(base, records, out), *again, "--full"]),
            (G.main, [*asking, "--output", target]),
            (D.main, ["stats", records, "--html", target]),
            (D.main, ["offline", "--output_dir", out]),
            (M.main, ["convert", base, out]),
            (L.main, [*merge, "--output_dir", out]),
        ]
    ), work


# --------------------------------------------------------------------------------------------------
# Runs


def contents(folder):
    """{file: bytes} of what a user has there; what is empty, or begins as ours, is nobody's."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size < 2**30]
    return {p: p.read_bytes() for p in files if p.stat().st_size > 1} if folder else {}


class Hang(BaseException):
    """No except clause of the code under test catches it."""


def run_cases(kind, count, seed, honest, base, records, folder, report):
    """In a process of its own: a line of the report for each case."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def late(number, frame):
        raise Hang

    signal.signal(signal.SIGALRM, late)
    for i in range(count):
        rng, work = random.Random(f"{seed} {kind} {i}"), folder / f"{kind}{i}"
        work.mkdir()
        errors = work.with_suffix(".err")
        sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115
        main, argv, kept = make_case(kind, rng, honest, base, records, work)
        before = contents(kept) if kept else {}
        signal.alarm(600)  # of a machine that has other work too
        begun = time.process_time()
        try:
            code = run_command(main, *argv)
            end = {0: "well", 2: "one line"}.get(code, f"code {code}")
        except Hang:
            end = "hang"
        except BaseException:
            end = f"traceback {traceback.format_exc()[-600:]}"
        signal.alarm(0)
        sys.stderr.flush()
        said = errors.read_text(errors="replace")
        if end == "one line":
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            # Nothing but escapes that tqdm makes itself reaches a terminal.
            clean = len(lines) == 1 and "\x1b" not in lines[0] and "\x9b" not in lines[0]
            end = end if clean else f"lines {said[-300:]!r}"
        lost = [p.name for p, data in before.items() if not p.is_file() or p.read_bytes() != data]
        row = {"i": i, "end": end, "lost": lost, "seconds": time.process_time() - begun}
        row |= {"argv": " ".join(map(str, argv))[:200], "said": said[-200:]}
        row["peak"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
        with open(report, "a") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(work)


def fuzz(kind, count, seed, honest, base, records, folder):
    """The rows of the report; a signal that ended the process is the last."""
    report, child = folder / f"{kind}.jsonl", os.fork()
    if not child:
        try:
            run_cases(kind, count, seed, honest, base, records, folder, report)
        except BaseException:
            report.with_suffix(".crash").write_text(traceback.format_exc())
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    crash = report.with_suffix(".crash")
    assert not crash.exists(), crash.read_text()
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    if os.WIFSIGNALED(status):
        rows.append({"end": f"signal {os.WTERMSIG(status)}", "lost": [], "seconds": 0, "peak": 0})
    return rows


def check(kind, rows, count):
    peak = max(row["peak"] for row in rows)
    well, line = (sum(row["end"] == end for row in rows) for end in ("well", "one line"))
    bad = [row for row in rows if row["end"] not in ("well", "one line")]
    lost = [row for row in rows if row["lost"]]
    slow = [row for row in rows if row["seconds"] > 10]
    print(
        f"\n{kind:12} {len(rows):4} cases: {well} end well, {line} in one line, {len(bad)} "
        f"otherwise, {len(slow)} above 10 s, {len(lost)} lost files, peak +{peak:.0f} MiB"
    )
    for row in [*bad, *lost, *slow]:
        print(json.dumps(row, ensure_ascii=False))
    assert len(rows) == count and not bad and not lost and not slow
    assert peak < 1024


@pytest.mark.parametrize("kind", SIZES)
def test_a_slice(honest, base, records, tmp_path, kind):
    count = max(6, SIZES[kind] // 40)
    check(kind, fuzz(kind, count, 1, honest, base, records, tmp_path), count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_all(honest, base, records, tmp_path, kind):
    count, seed = SIZES[kind], int(os.environ.get("FUZZ_SEED", 2))
    check(kind, fuzz(kind, count, seed, honest, base, records, tmp_path), count)
