"""A run outlives what it writes to: `| tee log` that Ctrl-C ends with it, a terminal that closes, a
reader that leaves. Each run is a process of its own, stopped in the middle."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager

import train as T

import pytest
from conftest import ROOT

FOREVER, SHORT = "1000000", "40"


def command(base, records, out, steps, *more):
    options = {
        "base_model": base,
        "data_path": records,
        "output_dir": out,
        "val_set_size": 0,
        "num_answers": 0,
        "batch_size": 4,
        "num_epochs": FOREVER,
        "max_steps": steps,
        "save_steps": 10_000,
        "cutoff_len": 128,
        "dtype": "fp32",
    }
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "train.py"), *pairs, *more]


def steps_in(out):
    log = out / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for_steps(process, out, count=5):
    ends = time.time() + 120
    while len(steps_in(out)) < count:
        assert process.poll() is None and time.time() < ends, process.poll()
        time.sleep(0.02)


@contextmanager
def endless(base, records, out, prepare=lambda: None, **streams):
    """A run that only a signal ends, as a shell's foreground has it: there Ctrl-C is not ignored,
    whoever runs the tests."""

    def begin():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        prepare()

    run = subprocess.Popen(command(base, records, out, FOREVER), preexec_fn=begin, **streams)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def leave_tee(base, records, out):
    """2>&1 | tee log, and Ctrl-C: the terminal sends it to both, and tee is gone at once."""
    tee = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    with endless(base, records, out, stdout=tee.stdin, stderr=subprocess.STDOUT) as run:
        tee.stdin.close()
        wait_for_steps(run, out)
        tee.kill()
        tee.wait()
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 128 + signal.SIGINT


def hang_up(base, records, out):
    """A dropped connection: SIGHUP, and nobody reads what is written."""
    reader, writer = os.pipe()
    with endless(base, records, out, stdout=writer, stderr=writer) as run:
        os.close(writer)
        wait_for_steps(run, out)
        os.close(reader)
        run.send_signal(signal.SIGHUP)
        assert run.wait(60) == 128 + signal.SIGHUP


def close_terminal(base, records, out):
    """The window is closed: the kernel sends SIGHUP, and each write fails."""
    ours, theirs = pty.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with endless(base, records, out, own_terminal, **streams) as run:
        os.close(theirs)
        os.set_blocking(ours, False)
        ends = time.time() + 120
        while len(steps_in(out)) < 5:
            assert run.poll() is None and time.time() < ends
            try:  # a terminal that nobody empties would stop the run
                os.read(ours, 1 << 16)
            except (BlockingIOError, OSError):
                time.sleep(0.02)
        os.close(ours)
        assert run.wait(60) == 128 + signal.SIGHUP


WAYS = [leave_tee, hang_up, close_terminal]


@pytest.mark.parametrize("way", WAYS)
def test_the_step_is_finished_and_saved(base, records, tmp_path, way):
    """The last checkpoint is of the last step in the log: nothing is lost."""
    way(base, records, tmp_path / "out")
    done = steps_in(tmp_path / "out")
    assert [*T.checkpoints(tmp_path / "out")][-1] == done[-1] == len(done)


def test_nobody_reads_from_the_start(base, records, tmp_path):
    """`python train.py --show 1 >&-`: Python has no sys.stdout then."""
    asked = [*command(base, records, tmp_path / "out", 1, "--show", "1")]
    done = subprocess.run(asked, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_twenty_times(base, records, tmp_path, way):
    for i in range(20):
        way(base, records, tmp_path / str(i))
        done = steps_in(tmp_path / str(i))
        assert [*T.checkpoints(tmp_path / str(i))][-1] == done[-1] == len(done)


def test_a_run_whose_reader_leaves_ends_as_if_it_had_stayed(base, records, tmp_path):
    reader, writer = os.pipe()
    run = subprocess.Popen(
        command(base, records, tmp_path / "out", SHORT), stdout=writer, stderr=writer
    )
    os.close(writer)
    os.close(reader)
    assert run.wait(120) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert len(steps_in(tmp_path / "out")) == int(SHORT)


def test_nohup_is_heeded(base, records, tmp_path):
    """What was told to ignore SIGHUP trains to its end."""
    run = subprocess.Popen(
        ["nohup", *command(base, records, tmp_path / "out", "400")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_steps(run, tmp_path / "out", 3)
    run.send_signal(signal.SIGHUP)
    assert run.wait(120) == 0
    assert len(steps_in(tmp_path / "out")) == 400


def test_a_run_is_not_begun_anew_by_mistake(base, records, tmp_path):
    out = tmp_path / "out"
    first = subprocess.run(command(base, records, out, SHORT), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # Who may read the folder may read each file in it.
    modes = {path.name: path.stat().st_mode & 0o777 for path in before}
    assert {*modes.values()} == {out.stat().st_mode & 0o666}, modes
    again = subprocess.run(command(base, records, out, SHORT), capture_output=True, text=True)
    assert again.returncode == 2 and str(out) in again.stderr and "--overwrite" in again.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    anew = subprocess.run(
        command(base, records, out, "7", "--overwrite"), capture_output=True, text=True
    )
    assert anew.returncode == 0 and steps_in(out) == [*range(1, 8)], anew.stderr
