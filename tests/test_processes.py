"""Two gloo processes under torchrun against one: the same adapter, model, losses, checkpoints at
the same global batch."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import train as T

import pytest
import torch
from conftest import ROOT
from processes import CASES, SHARDS_CODES, run_case
from safetensors.torch import load_file


def torchrun(*command, timeout=900):
    """(exit code, stdout, stderr) of `torchrun --nproc_per_node 2 command`, one thread each;
    nothing outlives it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *command,
    ]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        out, err = run.communicate(timeout=timeout)
        return run.returncode, out, err
    finally:
        run.terminate()  # torchrun ends its workers, which have their own sessions


@pytest.fixture(scope="module")
def runs(base, records, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    code, printed, errors = torchrun(
        str(ROOT / "tests" / "processes.py"), str(base), str(out), str(records)
    )
    assert code == 0, errors[-3000:]
    (out / "stdout").write_text(printed, encoding="utf-8")
    return out


@pytest.mark.parametrize("how", ["copies", "shard"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(base, runs, tmp_path, case, how):
    if case == "nf4" and how == "shard" and not SHARDS_CODES:
        pytest.skip("torch 2.11 cannot shard int8 and NF4 bases, and says so")
    one = run_case(base, tmp_path, case)
    two = [
        json.loads(line) for line in (runs / f"{case}-{how}" / "log.jsonl").read_text().splitlines()
    ]
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"] and a.keys() == b.keys()
        assert all(
            abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k]))
            for k in ("loss", "grad_norm", "val_loss")
            if k in a
        )
    for name in ("", "checkpoint-3"):
        folder = runs / f"{case}-{how}" / name
        assert sorted(p.name for p in folder.glob("*.*")) == sorted(
            p.name for p in (tmp_path / name).glob("*.*")
        )
        for file in folder.glob("*.safetensors"):
            ours, theirs = load_file(file), load_file(tmp_path / name / file.name)
            assert ours.keys() == theirs.keys()
            assert all((ours[k] - theirs[k]).abs().max() < 1e-5 for k in ours), file


@pytest.mark.parametrize("how", ["copies", "shard"])
@pytest.mark.parametrize("case", ["lora", "full"])
def test_resumed_with_two_processes_is_bit_for_bit(runs, case, how):
    """From the checkpoint of step 3 to the end, dropout on; and dropout does something."""
    name = "model.safetensors" if case == "full" else "adapter_model.safetensors"
    whole, resumed = (
        load_file(runs / f"{case}-{how}-{kind}" / name) for kind in ("dropout", "resumed")
    )
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    if case == "lora":
        plain = load_file(runs / f"{case}-{how}" / name)
        assert any(not torch.equal(whole[k], plain[k]) for k in whole)


def test_main_prints_once_and_answers_all(runs, base, records, tmp_path, monkeypatch, capsys):
    """The whole script: the questions answered by turns are those of one process, in its order;
    rank 0 alone prints."""
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--base_model",
            str(base),
            "--data_path",
            str(records),
            "--val_set_size",
            "3",
            "--output_dir",
            str(tmp_path),
            "--cutoff_len",
            "128",
            "--num_epochs",
            "1",
            "--batch_size",
            "4",
            "--lora_dropout",
            "0",
        ],
    )
    T.main()
    assert (runs / "main" / "answers.jsonl").read_text() == (tmp_path / "answers.jsonl").read_text()
    printed = (runs / "stdout").read_text()
    assert printed.count("saved in") == 1 and printed.count("LoRA r 8") == 1


def two_workers(command):
    """What torchrun starts, without it: two processes of train.py, as on two machines."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**env, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--shard"], ["--full"], ["--full", "--shard"]])
def test_killed_and_resumed_with_two_processes(base, records, tmp_path, how):
    """SIGKILL of both at random moments and SIGTERM of both in the middle, gone on with each time:
    the uninterrupted run's weights, bit for bit, dropout on."""

    def command(out, *more):
        return [
            "--base_model",
            str(base),
            "--data_path",
            str(records),
            "--val_set_size",
            "2",
            "--cutoff_len",
            "128",
            "--output_dir",
            str(tmp_path / out),
            "--num_epochs",
            "60",
            "--batch_size",
            "3",
            "--lora_dropout",
            "0.2",
            "--num_answers",
            "0",
            "--save_steps",
            "5",
            "--eval_steps",
            "20",
            *how,
            *more,
        ]

    def steps():
        log = tmp_path / "killed" / "log.jsonl"
        return log.read_text().count("\n") if log.is_file() else 0

    for worker in two_workers(command("through")):
        printed, _ = worker.communicate(timeout=900)
        assert worker.returncode == 0, printed[-2000:]
    generator, codes, ends = random.Random(0), [], [signal.SIGKILL] * 3 + [signal.SIGTERM, None]
    for end in ends:
        workers, begun = two_workers(command("killed", "--resume_from_checkpoint", "auto")), steps()
        while end and steps() < begun + 8 and all(worker.poll() is None for worker in workers):
            time.sleep(0.05)
        if end:
            time.sleep(generator.random() * 0.5)
            for worker in workers:
                worker.send_signal(end)
        printed = [worker.communicate(timeout=900)[0] for worker in workers]
        codes.append([worker.returncode for worker in workers])
        assert codes[-1][0] in (0, -9, 143), printed[0][-2000:]
    assert codes == [[-9, -9]] * 3 + [[143, 143], [0, 0]]
    name = "model.safetensors" if "--full" in how else "adapter_model.safetensors"
    whole, resumed = load_file(tmp_path / "through" / name), load_file(tmp_path / "killed" / name)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in (tmp_path / out / "log.jsonl").open()
        ]
        for out in ("through", "killed")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 120


def test_a_process_without_a_gpu_says_so(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match="process 3 of this machine .* it has 2; start --nproc_per_node 2"
    ):
        T.join_processes(torch.device("cuda"))


def test_shard_wants_processes():
    with pytest.raises(ValueError, match="start torchrun"):
        T.check_config(T.TrainConfig(shard=True))
