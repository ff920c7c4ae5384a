"""Interrupted and gone on with equals uninterrupted, bit for bit: by kill, signal, full disk; and
what is refused."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import generate as G
import lora as L
import model as M
import train as T

import pytest
import torch
from conftest import RECORDS


def start(base, out, full=False, dtype=torch.float32, **settings):
    """(config, fresh model, data) of a run of 12 steps with dropout: 8 rows, 2 a step, 3 epochs."""
    config = T.TrainConfig(
        **{
            "base_model": str(base),
            "output_dir": str(out),
            "full": full,
            "batch_size": 2,
            "num_epochs": 3,
            "micro_batch_size": 1,
            "save_steps": 7,
            "eval_steps": 5,
            "learning_rate": 1e-2,
            "lora_dropout": 0.2,
            **settings,
        }
    )
    model, tokenizer = G.load_base(base, "cpu", torch.float32 if full else dtype)
    torch.manual_seed(config.seed)
    if full:
        model.requires_grad_(True)
        model.compute_dtype = dtype
    else:
        L.add_lora(model, L.LoRAConfig(4, 8, config.lora_dropout, ("all",)))
    rows = [
        T.encode_example(tokenizer, G.load_template("med_template"), r, config) for r in RECORDS
    ]
    return config, model, (rows, rows[:3])


def train(config, model, data):
    """T.train; in fp16 from a scale that is too much at first."""
    run = T.Run(config)
    if not run.start:
        run.limits.loss_scale = 2.0**40
    return T.train(config, model, data, run)


def outcome(out):
    """What a finished run leaves, as far as it must not depend on interruptions."""
    weights = next(
        p for p in (out / "adapter_model.safetensors", out / "model.safetensors") if p.is_file()
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return weights.read_bytes(), [
        (r["step"], r["loss"], r["lr"], r["grad_norm"], r.get("val_loss")) for r in log
    ]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An uninterrupted run, once for all tests."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(*start(base, out))
    return out


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_12_is_7_and_5(base, tmp_path, full, dtype):
    """Weights, losses, validation and log, with dropout on; the checkpoint also serves from another
    folder. In fp16 the first step overflows, and is done again at half the scale with the next
    dropout masks."""
    train(*start(base, tmp_path / "whole", full, dtype))
    want = outcome(tmp_path / "whole")
    assert [step for step, *_ in want[1]] == list(range(1, 13))
    assert [bool(r[4]) for r in want[1]].count(True) == 3
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for path in ("run.json", "checkpoint-5", "checkpoint-10"):
        if (tmp_path / "part" / path).is_dir():
            shutil.rmtree(tmp_path / "part" / path)
    (tmp_path / "part/run.json").unlink()  # as if killed after step 12, before the end
    for resume, out in (("auto", "part"), (tmp_path / "whole/checkpoint-7", "other")):
        history = train(
            *start(base, tmp_path / out, full, dtype, resume_from_checkpoint=str(resume))
        )
        assert outcome(tmp_path / out) == want and len(history) == 12


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    base, whole, tmp_path, monkeypatch, capsys, number, code
):
    handler, step_gradient, calls = signal.getsignal(number), T.step_gradient, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return step_gradient(*args)

    monkeypatch.setattr(T, "step_gradient", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(*start(base, tmp_path))
    assert stop.value.code == code and signal.getsignal(number) == handler
    assert (
        list(T.checkpoints(tmp_path)) == [4]
        and "--resume_from_checkpoint auto" in capsys.readouterr().out
    )
    train(*start(base, tmp_path, resume_from_checkpoint="auto"))
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("full", [False, True])
def test_a_full_disk_stops_with_the_step_named_and_the_last_checkpoint_whole(
    base, whole, tmp_path, monkeypatch, full
):
    """From the save at step 10 on no file may grow beyond 10 kB; with space again the run goes on,
    as if never stopped."""
    save, limits = T.Run.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_little_space(run, *rest):
        if run.step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        save(run, *rest)

    monkeypatch.setattr(T.Run, "save", save_with_little_space)
    try:
        with pytest.raises(
            ValueError, match=r"step 10: .*cannot be written.*saved is .*checkpoint-9"
        ):
            train(*start(base, tmp_path, full, save_steps=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert list(T.checkpoints(tmp_path)) == [5, 6, 9] and not list(tmp_path.glob(".*"))
    train(*start(base, tmp_path, full, resume_from_checkpoint="auto"))
    if not full:
        assert outcome(tmp_path) == outcome(whole)


def test_a_loss_that_is_not_finite_names_step_and_rows(base, tmp_path):
    """A token that only one row holds has a NaN in its embedding."""
    config, model, (rows, _) = start(base, tmp_path, save_steps=1)
    row = replace(rows[7], record={"record": "data.json:8"})  # the longest, 附子's
    token = next(i for i in row.ids if not any(i in other.ids for other in rows[:7]))
    model.embed_tokens.weight.data[token] = torch.nan
    step = next(s for s in range(4) if 7 in T.epoch_order(rows, config, 0)[2 * s : 2 * s + 2]) + 1
    with pytest.raises(
        ValueError, match=rf"step {step}: loss nan.* from rows data.json:8;"
    ) as error:
        T.train(config, model, ([*rows[:7], row], []))
    assert (
        "\n" not in str(error.value)
        and list(T.checkpoints(tmp_path))[-1:] == [step - 1][: step - 1]
    )


def test_what_differs_is_refused_in_one_line(base, whole, tmp_path):
    """Settings, base, data and template, the first that differs; what changes no weight may
    change."""
    copy, data = tmp_path / "base", tmp_path / "data.json"
    shutil.copytree(base, copy)
    data.write_text(json.dumps(RECORDS[0]))
    start_at = whole / "checkpoint-7"

    def resumed(**changes):
        given = {"resume_from_checkpoint": str(start_at), "output_dir": str(tmp_path / "out")}
        return T.Run(start(base, whole, **{**given, **changes})[0])

    free = {"save_steps": 3, "eval_steps": 0, "num_answers": 0, "base_model": str(copy)}
    assert resumed(**free, memory_gb=1.5, recompute="full", device="cpu").start == start_at
    template = M.read_json_file(G.DATA / "templates" / "med_template.json")
    (tmp_path / "t.json").write_text(json.dumps({**template, "prompt_no_input": "{instruction}。"}))
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1  # one bit of the base
    weights.write_bytes(raw)
    shape = tmp_path / "shape"
    shutil.copytree(base, shape)
    settings = json.loads((base / "config.json").read_text())
    (shape / "config.json").write_text(json.dumps({**settings, "rope_theta": 500.0}))
    changed = {
        "learning_rate 0.01, not 0.02;": {"learning_rate": 2e-2, "seed": 1},
        "lora_target_modules ['q_proj', 'v_proj'], not ['all'];": {"lora_target_modules": ("all",)},
        "full False, not True;": {"full": True},
        "base [": {"base_model": str(copy)},
        "base ['": {"base_model": str(shape)},
        "data [], not [[1.0, ": {"data_path": (str(data),)},
        "template {": {"prompt_template_name": str(tmp_path / "t.json")},
        "validation None, not '": {"val_path": str(data)},
    }
    for words, changes in changed.items():
        with pytest.raises(ValueError) as error:
            resumed(**changes)
        assert f"{start_at} was made with {words}" in str(error.value)
        assert "\n" not in str(error.value)
    # what auto was there counts, and not its name
    auto = "bf16" if G.has_bf16(torch.device("cpu")) else "fp32"
    config = start(base, whole, resume_from_checkpoint=str(start_at))[0]
    assert T.Run(replace(config, dtype=auto)).start == start_at
    with pytest.raises(ValueError, match="dtype of the activations 'torch"):
        T.Run(replace(config, dtype={"fp32": "bf16", "bf16": "fp32"}[auto]))
    for folder in (base, tmp_path / "none", whole / "checkpoint-6"):
        with pytest.raises(ValueError, match=f"{folder}.* not found"):
            resumed(resume_from_checkpoint=str(folder))


def test_finished_and_unfinished_runs(base, whole, tmp_path, capsys):
    """auto: a finished run stays as it is, an unfinished one goes on, nothing begins at step 1;
    alpaca-lora's spellings. Without it a run, finished or not, is begun anew only if asked."""
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    for word in ("auto", "True", str(whole)):
        config, model, data = start(base, whole, resume_from_checkpoint=word)
        assert T.Run(config).start == whole and len(T.train(config, model, data)) == 12
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before
    for word in ("", "False", "None"):
        with pytest.raises(ValueError, match=f"{whole} holds a run"):
            T.Run(start(base, whole, resume_from_checkpoint=word)[0])
        config = start(base, whole, resume_from_checkpoint=word, overwrite=True)[0]
        assert T.Run(config).start is None
    assert T.Run(start(base, tmp_path / "new", resume_from_checkpoint="auto")[0]).start is None
    assert "beginning with step 1" in capsys.readouterr().out
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out/run.json").unlink()
    assert (
        T.Run(start(base, tmp_path / "out", resume_from_checkpoint="True")[0]).start.name
        == "checkpoint-10"
    )
    with pytest.raises(ValueError, match="holds a run; go on with --resume_from_checkpoint auto"):
        train(*start(base, tmp_path / "out"))
    # What `save_adapter` leaves where a kill comes before the rest of the last save.
    (tmp_path / "out/run.json").write_text("{}")
    going_on = start(base, tmp_path / "out", resume_from_checkpoint="auto")[0]
    assert T.Run(going_on).start.name == "checkpoint-10"


def test_a_run_that_goes_on_from_elsewhere_replaces_none(base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    given = {"resume_from_checkpoint": str(whole / "checkpoint-7")}
    with pytest.raises(ValueError, match=f"{tmp_path}/out holds a run"):
        T.Run(start(base, tmp_path / "out", **given)[0])
    assert T.Run(start(base, tmp_path / "out", overwrite=True, **given)[0]).start
    assert T.Run(start(base, whole, **given)[0]).start


def test_checkpoints_of_a_replaced_run_go(base, whole, tmp_path):
    """Another learning rate's checkpoint-3 beside this one's would be taken for its own."""
    shutil.copytree(whole, tmp_path / "out")
    train(*start(base, tmp_path / "out", overwrite=True, learning_rate=1e-3, save_steps=12))
    kept = [M.read_json_file(f / "run.json") for f in T.checkpoints(tmp_path / "out").values()]
    assert kept and {made["config"]["learning_rate"] for made in kept} == {1e-3}


def test_a_finished_run_is_replaced_stopped_and_gone_on_with(base, whole, tmp_path, monkeypatch):
    """Over a run of 12 steps one of 20 begins: stopped, it is an unfinished run like any other."""
    shutil.copytree(whole, tmp_path / "out")
    step_gradient = T.step_gradient
    monkeypatch.setattr(
        T, "step_gradient", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or step_gradient(*a)
    )
    with pytest.raises(SystemExit):
        train(*start(base, tmp_path / "out", num_epochs=5, overwrite=True))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="checkpoint-1 holds a run"):
        T.Run(start(base, tmp_path / "out", num_epochs=5)[0])
    longer = {"num_epochs": 5, "resume_from_checkpoint": "auto"}
    assert T.Run(start(base, tmp_path / "out", **longer)[0]).start.name == "checkpoint-1"
    assert len(train(*start(base, tmp_path / "out", **longer))) == 20
    assert T.Run(start(base, tmp_path / "out", **longer)[0]).finished


def test_a_run_that_ends_elsewhere_or_lost_its_log_is_not_gone_on_with(base, whole, tmp_path):
    """A checkpoint at or behind the run's last step; one whose log holds rubbish; a folder of
    transformers' Trainer."""
    shutil.copytree(whole / "checkpoint-10", tmp_path / "alone" / "checkpoint-10")
    alone = {"resume_from_checkpoint": str(tmp_path / "alone" / "checkpoint-10")}
    for steps in (5, 10):
        with pytest.raises(ValueError, match=f"checkpoint-10 was .* max_steps 0, not {steps};"):
            train(*start(base, tmp_path / "new", max_steps=steps, **alone))
    (tmp_path / "alone" / "checkpoint-10" / "log.jsonl").write_text("{}\nrubbish\n")
    with pytest.raises(ValueError, match="log.jsonl"):
        train(*start(base, tmp_path / "new", **alone))
    shutil.copytree(whole, tmp_path / "out")
    for folder in T.checkpoints(tmp_path / "out").values():
        shutil.rmtree(folder)
    (tmp_path / "out" / "checkpoint-200").mkdir()  # transformers' Trainer leaves such ones
    run = T.Run(start(base, tmp_path / "out", resume_from_checkpoint="auto")[0])
    assert run.start == tmp_path / "out"  # the finished one: that folder is none of ours


def test_tokens_at_once_stay_unless_others_are_asked_for(base, whole, tmp_path):
    """So that gradients are added up in the same order."""
    shutil.copytree(whole, tmp_path / "out")
    checkpoint = tmp_path / "out/checkpoint-7"
    info = M.read_json_file(checkpoint / "run.json")
    for given, asked, wanted in ((0, 0, 300), (0, 77, 77), (512, 0, 300), (512, 512, 300)):
        info["config"]["micro_batch_tokens"], info["tokens_at_once"] = given, 300
        M.write_json(checkpoint / "run.json", info)
        settings = {"micro_batch_tokens": asked, "resume_from_checkpoint": str(checkpoint)}
        run = T.Run(start(base, tmp_path / "out", **settings)[0])
        assert run.limits.tokens_at_once == wanted


def out_of_memory(*args):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def test_memory_that_ran_out_halves_the_tokens_at_once(base, whole, tmp_path, monkeypatch, capsys):
    """The step is made again, to the gradient that smaller micro-batches have; checkpoints keep the
    number, so that a run that goes on adds up as before."""
    settings = {"micro_batch_size": 0, "micro_batch_tokens": 320, "lora_dropout": 0.0}
    train(*start(base, tmp_path / "small", **settings | {"micro_batch_tokens": 160}))
    collate = T.collate

    def collate_few(rows, *rest):
        return collate(rows, *rest) if len(rows) == 1 else out_of_memory()

    monkeypatch.setattr(T, "collate", collate_few)
    train(*start(base, tmp_path / "halved", **settings))
    weights, log = outcome(tmp_path / "small")
    assert outcome(tmp_path / "halved") == (weights, log)
    assert capsys.readouterr().out.count("tokens at once") == 1
    assert M.read_json_file(tmp_path / "halved/checkpoint-7/run.json")["tokens_at_once"] == 160
    again = {**settings, "resume_from_checkpoint": str(tmp_path / "halved/checkpoint-7")}
    train(*start(base, tmp_path / "resumed", **again))
    assert outcome(tmp_path / "resumed") == (weights, log)


def test_the_advice_after_memory_ran_out_can_be_followed(base, tmp_path, monkeypatch):
    """Where one row alone is too much, or in many processes, the run ends; it goes on with other
    tokens at once, blocks recomputed and memory."""
    monkeypatch.setattr(T, "step_gradient", out_of_memory)
    with pytest.raises(ValueError, match="step 1: CUDA.*--micro_batch_tokens.*saved is nothing"):
        train(*start(base, tmp_path))
    monkeypatch.undo()
    step_gradient, made = T.step_gradient, []

    def third_fails(*args):
        made.append(0)
        return step_gradient(*args) if len(made) < 3 else out_of_memory()

    monkeypatch.setattr(T, "step_gradient", third_fails)
    with pytest.raises(ValueError, match="step 3: CUDA.*saved is .*checkpoint-2"):
        train(*start(base, tmp_path, save_steps=2))
    monkeypatch.undo()
    changes = {"micro_batch_tokens": 64, "recompute": "full", "memory_gb": 1.0}
    changes["resume_from_checkpoint"] = "auto"
    assert len(train(*start(base, tmp_path, save_steps=2, **changes))) == 12


def test_memory_that_ran_out_names_the_checkpoint(base, tmp_path, monkeypatch):
    """As torch says it of a CPU and of a GPU; other errors of it stay what they are."""
    config, model, data = start(base, tmp_path, save_steps=2)
    step_gradient = T.step_gradient
    monkeypatch.setattr(
        T,
        "step_gradient",
        lambda *args: out_of_memory() if T.checkpoints(tmp_path) else step_gradient(*args),
    )
    with pytest.raises(
        ValueError, match=r"step 3: CUDA out of memory.*saved is .*checkpoint-2"
    ) as error:
        T.train(config, model, data)
    assert "\n" not in str(error.value)


def test_the_last_checkpoints_and_the_best_are_kept(base, tmp_path, monkeypatch):
    """Validation is best at step 2; those of an earlier run, ahead of the step, go with the first
    of the new one."""
    losses = iter([3.0, 1.0, 2.0, 1.0, 5.0, 6.0])
    monkeypatch.setattr(T, "evaluate", lambda *args: next(losses))
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-99/run.json").write_text('{"started": 1}')
    (tmp_path / "checkpoint-99/state.safetensors").write_bytes(b"")
    (tmp_path / "run.json").write_text('{"started": 1}')
    (tmp_path / ".checkpoint-12.unfinished").mkdir()
    settings = {"eval_steps": 2, "save_steps": 3, "save_total_limit": 2, "overwrite": True}
    train(*start(base, tmp_path, **settings))
    assert list(T.checkpoints(tmp_path)) == [4, 6, 9] and not list(tmp_path.glob(".*"))
    saved = M.read_json_file(tmp_path / "checkpoint-4/run.json")
    assert (
        saved["step"] == 4
        and saved["config"]["save_steps"] == 3
        and len(saved["sha256"]["base"]) == 3
    )


class Crash(BaseException):
    """A kill: no except clause of the code under test catches it."""


@pytest.mark.parametrize("full", [False, True])
def test_a_crash_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(
    base, tmp_path, monkeypatch, full
):
    """A save is cut off at its first, second, ... operation on files: what auto then finds is
    whole, the new or the last."""
    config, model, (rows, _) = start(base, tmp_path, full, save_total_limit=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    T.step_gradient(model, rows, config)
    optimizer.step()
    operations = [
        (os, "replace"),
        (os, "fsync"),
        (Path, "rename"),
        (shutil, "rmtree"),
        (shutil, "copyfile"),
        (Path, "mkdir"),
        (T, "save_file"),
        (L, "save_file"),
        (M, "save_file"),
        (os, "unlink"),
        (os, "rmdir"),
    ]
    originals, left = {(o, n): getattr(o, n) for o, n in operations if hasattr(o, n)}, [0]

    def counted(original):
        def operation(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Crash
            return original(*args, **kwargs)

        return operation

    run = T.Run(config)
    run.begin(model, optimizer)

    def save(step):
        run.step = step
        for state in optimizer.state.values():
            state["step"].fill_(step)
        run.save(model, optimizer)

    save(1)
    for key, original in originals.items():
        monkeypatch.setattr(*key, counted(original))
    step, crashes, seen = 2, 0, set()
    while True:
        left[0] = crashes + 1
        try:
            save(step)
            break
        except Crash:
            crashes, left[0] = crashes + 1, 0
            [last] = T.restore(model, optimizer, list(T.checkpoints(tmp_path).values())[-1])
            seen.add(last - step)
            step = last + 1
    assert crashes > 12 and seen == {-1, 0} and list(T.checkpoints(tmp_path)) == [step]


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("way, times", [("kill", 20), ("term", 10), ("disk", 10)])
def test_stopped_at_random_moments(base, records, tmp_path, way, times, full):
    """train.py's main() in a process of its own, stopped at random, also inside saves (there is one
    a step), by SIGKILL, by SIGTERM or by a disk that is full, and gone on with by auto each time:
    adapter, losses and log are those of an uninterrupted run."""
    rng, moments, codes, steps = random.Random(0), [], [], 120

    def begin(out, *more, space=None):
        child = os.fork()
        if child == 0:  # what `python train.py ...` does, with torch imported already
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            options = {
                "base_model": base,
                "data_path": records,
                "output_dir": out,
                "batch_size": 2,
                "micro_batch_size": 1,
                "num_epochs": 999,
                "max_steps": steps,
                "save_steps": 1,
                "eval_steps": 3,
                "val_set_size": 2,
                "lora_dropout": 0.2,
                "num_answers": 0,
                "dtype": "bf16",
                "full": full,
            }
            pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
            sys.argv = ["train.py", *pairs, *more]
            save = T.Run.save

            def save_in_little_space(run, *rest):
                if space and run.step == space[0]:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (space[1], space[1]))
                save(run, *rest)

            T.Run.save = save_in_little_space
            try:
                M.run(T.main)
                os._exit(0)
            except SystemExit as stop:
                os._exit(stop.code)
        return child

    def end(child):
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return codes[-1]

    def logged():
        log = tmp_path / "out/log.jsonl"
        return log.read_text().count("\n") if log.is_file() else 0

    begun = time.time()
    assert end(begin(tmp_path / "whole")) == 0
    pace = (time.time() - begun) / steps
    for _ in range(times):
        saved = max(T.checkpoints(tmp_path / "out"), default=0)
        space = (saved + rng.randint(1, 6), rng.randint(1, 9000)) if way == "disk" else None
        child = begin(tmp_path / "out", "--resume_from_checkpoint", "auto", space=space)
        if way != "disk":
            time.sleep(pace)  # the log is cut back to the checkpoint's step meanwhile
            further, deadline = logged() + rng.randint(1, 3), time.time() + 100
            while logged() < min(further, steps) and time.time() < deadline:
                time.sleep(pace / 20)
            time.sleep(rng.uniform(0, 1.5 * pace))
            os.kill(child, signal.SIGKILL if way == "kill" else signal.SIGTERM)
        assert end(child) in {"kill": [-9], "term": [143, -15], "disk": [2]}[way]
        inside = sorted(p.suffix for p in (tmp_path / "out").glob(".checkpoint-*"))
        moments.append((max(T.checkpoints(tmp_path / "out"), default=0), logged(), *inside))
    assert end(begin(tmp_path / "out", "--resume_from_checkpoint", "auto")) == 0
    print(f"\n{way}: {steps} steps in {pace * steps:.1f} s; exit codes {codes}; each time (last")
    print(f"checkpoint, steps logged, inside a save): {moments}")
    assert (
        outcome(tmp_path / "out") == outcome(tmp_path / "whole")
        and len(outcome(tmp_path / "out")[1]) == steps
    )
    assert len({step for step, *_ in moments}) > times / 2
    assert way != "kill" or any(inside for _, _, *inside in moments)
