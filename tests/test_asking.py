"""The command line of generate.py: a file that survives kills, one question several times, a chat in a terminal."""
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import generate as G
import model as M


@pytest.fixture(scope="module")
def lively(base, tmp_path_factory):
    """The base with weights so large that answers differ and no two ids tie."""
    folder = tmp_path_factory.mktemp("lively")
    model, _ = G.load_base(base, "cpu", torch.float32)
    for p in model.parameters():
        p.data.mul_(20 if p.dim() > 1 else 1)
    M.save_model(model, folder)
    (folder / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    return folder


def command(base, *args):
    return [sys.executable, ROOT / "generate.py", "--base_model", base, "--use_lora=False", "--max_new_tokens", "16", "--dtype", "fp32",
            *args]


def call(base, *args, stdin=""):
    return subprocess.run(command(base, *args), input=stdin, capture_output=True, text=True, timeout=300)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tasks_of(base, count, **decoding):
    model, tokenizer = G.load_base(base, "cpu", torch.float32)
    records = [{"instruction": f"黄芪有什么功效？{'好' * (i % 7)}{i}", "input": "", "id": i} for i in range(count)]
    ids = [tokenizer.encode(r["instruction"], bos=True) for r in records]
    return model, tokenizer, [(r, p, G.Decoding(**{"max_new_tokens": 8, **decoding})) for r, p in zip(records, ids)]


def test_file_is_answered_as_one_by_one(lively, tmp_path):
    model, tokenizer, tasks = tasks_of(lively, 20)
    G.answer_file(model, tokenizer, tasks, str(tmp_path / "a.jsonl"), 4, "w")
    rows = read(tmp_path / "a.jsonl")
    assert [r["index"] for r in rows] == list(range(20)) and [r["id"] for r in rows] == list(range(20))
    assert [r["answer"] for r in rows] == ["".join(G.ask(model, tokenizer, r["instruction"], 8)) for r in rows]
    assert len({r["answer"] for r in rows}) > 5


def test_stopped_file_goes_on(lively, tmp_path, monkeypatch):
    """Stopped anywhere, also within a line, it gives every answer once; finished, it does nothing more."""
    model, tokenizer, tasks = tasks_of(lively, 12)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    G.answer_file(model, tokenizer, tasks, str(whole), 4, "w")
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in (0, len(lines[5]), len(lines[5]) + 1, len(lines[5]) + len(lines[9]) // 2, len(lines[5]) + len(lines[9])):
        part.write_bytes((lines[5] + lines[9])[:cut])
        G.answer_file(model, tokenizer, tasks, str(part), 4, "w")
        assert part.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(G.Batch, "step", lambda self: pytest.fail("nothing is left to decode"))
    G.answer_file(model, tokenizer, tasks, str(whole), 4, "w")


@pytest.mark.parametrize("other", ["settings", "weights", "questions", "text", "half a text", "objects"])
def test_file_of_something_else_is_left_alone(lively, tmp_path, other):
    """Answers by other settings, weights or to other questions are not mixed; a file that is none of ours stays."""
    model, tokenizer, tasks = tasks_of(lively, 3)
    path = tmp_path / "a.jsonl"
    if other in ("text", "half a text", "objects"):
        path.write_text({"text": "a diary\n", "half a text": "a diary", "objects": '{"instruction": "a"}\n'}[other])
    else:
        G.answer_file(model, tokenizer, tasks, str(path), 2, "w")
    before = path.read_bytes()
    if other == "settings":
        tasks = tasks_of(lively, 3, repetition_penalty=1.5)[2]
    with pytest.raises(ValueError, match="name another --output"):
        G.answer_file(model, tokenizer, tasks[::-1] if other == "questions" else tasks, str(path), 2, "v" if other == "weights" else "w")
    assert path.read_bytes() == before


@pytest.mark.slow
def test_kill_in_the_middle_of_500_prompts(lively, tmp_path):
    """kill -9 twice, then to the end: 500 answers, none twice, in order, equal to an undisturbed run."""
    questions, out, calm = (tmp_path / name for name in ("q.json", "a.jsonl", "calm.jsonl"))
    questions.write_text(json.dumps([{"instruction": f"第{i}味药有什么功效？"} for i in range(500)], ensure_ascii=False))
    arguments = ("--instruct_dir", questions, "--output", out)
    for share in (0.2, 0.6):
        process = subprocess.Popen(command(lively, *arguments), stderr=subprocess.DEVNULL)
        while not out.is_file() or out.read_bytes().count(b"\n") < 500 * share:
            time.sleep(0.02)
            assert process.poll() is None
        process.kill()
        process.wait()
        assert 500 * share <= out.read_bytes().count(b"\n") < 500
    assert call(lively, *arguments).returncode == 0
    rows = read(out)
    assert [r["index"] for r in rows] == list(range(500)) and len({r["instruction"] for r in rows}) == 500
    assert call(lively, "--instruct_dir", questions, "--output", calm).returncode == 0
    assert read(calm) == rows


def test_standard_input_and_several_answers(lively):
    """- is standard input; BenTsao's infer.json lines; --n answers each with a seed of its own; answers go to stdout."""
    lines = "".join(json.dumps({"instruction": q, "input": "", "output": ""}, ensure_ascii=False) + "\n" for q in ("黄芪？", "柴胡？"))
    done = call(lively, "--instruct_dir", "-", "--n", "2", "--seed", "3", "--temperature", "1", "--top_k", "0", "--top_p", "1", stdin=lines)
    rows = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda r: r["index"])
    assert done.returncode == 0 and [r["instruction"] for r in rows] == ["黄芪？"] * 2 + ["柴胡？"] * 2
    assert rows[0]["answer"] != rows[1]["answer"]
    again = call(lively, "黄芪？", "--n", "2", "--seed", "3", "--temperature", "1", "--top_k", "0", "--top_p", "1").stdout
    assert again == f"{rows[0]['answer']}\n{rows[1]['answer']}\n"


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, base, *args):
        self.seen, (self.main, side) = b"", pty.openpty()
        self.process = subprocess.Popen(command(base, *args), stdin=side, stdout=side, stderr=side, start_new_session=True,
                                        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0))
        os.close(side)

    def until(self, text, seconds=60):
        """Wait until the text appears behind what was waited for before."""
        end = time.time() + seconds
        while text.encode() not in self.seen:
            assert time.time() < end, self.seen.decode(errors="replace")
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 4096)
        self.seen = self.seen.partition(text.encode())[2]

    def type(self, text):
        os.write(self.main, text.encode())


def test_chat_in_a_terminal(lively, tmp_path):
    """Ctrl-C stops an answer and not the chat, lines are edited, /save keeps what was said, Ctrl-D ends."""
    terminal = Terminal(lively, "--single_or_multi", "multi", "--max_new_tokens", "1500")
    terminal.until("> ")
    terminal.type("黄芪x\x7f\n")                                  # the x is taken back
    time.sleep(1)
    terminal.type("\x03")
    terminal.until("tokens/s]")
    terminal.until("> ")
    terminal.type("/model\n")
    terminal.until("torch.float32")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path / 'chat.json'}\n")
    terminal.until("> ")
    terminal.type("half a question\x03")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
    (record,) = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"] and record["messages"][0]["content"] == "黄芪"
    assert G.read_instructions(tmp_path / "chat.json", answers=True) or not record["messages"][1]["content"]


def test_chat_keeps_the_turns_that_fit(lively):
    """The prompts that a chat asks: BenTsao's form with multi, the question alone without; the oldest turns go first."""
    tokenizer, asked = G.Tokenizer(lively / "tokenizer.model"), []

    def answer(prompt):
        asked.append(prompt)
        yield "答"

    def talk(multi, room, lines):
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            given = iter(lines)
            patch.setattr("builtins.input", lambda prompt: next(given, None) or (_ for _ in ()).throw(EOFError))
            G.chat(answer, lambda turns: G.render_turns(turns) if multi or len(turns) > 1 else turns[0][0], tokenizer, multi, room, "")
        return list(asked)

    assert talk(True, 1000, ["甲", "乙", "/reset", "丙"]) == [" <user>: 甲", " <user>: 甲 <bot>: 答 <user>: 乙", " <user>: 丙"]
    assert talk(False, 1000, ["甲", "乙"]) == ["甲", "乙"]
    room = len(tokenizer.encode(" <user>: 乙 <bot>: 答 <user>: 丙", bos=True)) + 1
    assert talk(True, room, ["甲", "乙", "丙"])[-1] == " <user>: 乙 <bot>: 答 <user>: 丙"
    assert talk(True, 2, ["甲", "乙"])[-1] == " <user>: 乙"


@pytest.mark.parametrize("args, said", [
    (["--context", "16"], "context 16"), (["--n", "0", "a"], "n is 0"), (["--batch_size", "0", "a"], "batch_size is 0"),
    (["--top_p", "2", "a"], "top_p is 2"), (["--serve", "--num_beams", "2"], "num_beams")])
def test_bad_options_are_one_line(lively, args, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(a) for a in command(lively, *args)[1:]])
    with pytest.raises(SystemExit) as caught:
        M.run(G.main)
    assert caught.value.code == 2 and said in capsys.readouterr().err
