"""The command line of generate.py: a file that survives kills, one question several times, a chat
in a terminal."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import threading
import time

import generate as G
import lora as L
import model as M

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def lively(base, tmp_path_factory):
    """The base with weights so large that answers differ and no two ids tie."""
    folder = tmp_path_factory.mktemp("lively")
    model, _ = G.load_base(base, "cpu", torch.float32)
    for p in model.parameters():
        p.data.mul_(20 if p.dim() > 1 else 1)
    M.save_model(model, folder, base)
    return folder


def command(base, *args):
    script = [sys.executable, ROOT / "generate.py", "--base_model", base, "--use_lora=False"]
    return [*script, "--max_new_tokens", "16", "--dtype", "fp32", *args]


def call(base, *args, stdin=""):
    return subprocess.run(
        command(base, *args), input=stdin, capture_output=True, text=True, timeout=300
    )


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TEMPLATE = {"prompt_no_input": "{instruction}", "prompt_input": "{instruction}{input}"}


def answer(base, output, count, rows=4, backwards=False, change=None, **decoding):
    """Answer so many questions to a file; what `fingerprint` sees may be changed."""
    model, tokenizer = G.load_base(base, "cpu", torch.float32)
    questions = [
        {"instruction": f"黄芪有什么功效？{'好' * (i % 7)}{i}", "input": "", "id": i}
        for i in range(count)
    ]
    questions = questions[::-1] if backwards else questions
    if change:
        change(model)
    settings = G.Decoding(**{"max_new_tokens": 8, **decoding})
    G.answer_file(model, tokenizer, TEMPLATE, questions, settings, str(output), rows)
    return model, tokenizer


def alone(model, tokenizer, prompt, new):
    """The answer to one prompt with no other near it."""
    ids = tokenizer.encode(prompt, bos=True)
    return G.visible(tokenizer.decode(list(G.generate_ids(model, ids, new, tokenizer.eos_id))))


def test_file_is_answered_as_one_by_one(lively, tmp_path):
    model, tokenizer = answer(lively, tmp_path / "a.jsonl", 20)
    rows = read(tmp_path / "a.jsonl")
    assert [r["index"] for r in rows] == list(range(20))
    assert [r["id"] for r in rows] == list(range(20))
    assert [r["answer"] for r in rows] == [
        alone(model, tokenizer, r["instruction"], 8) for r in rows
    ]
    assert len({r["answer"] for r in rows}) > 5
    prompts = [tokenizer.encode(r["instruction"], bos=True) for r in rows]
    requests = [G.Request(ids, G.Decoding(8)) for ids in prompts]
    texts = G.answer_batch(model, tokenizer, requests, 3, desc="before")
    assert [*texts] == [r["answer"] for r in rows]
    assert [*G.answer_batch(model, tokenizer, [], 3)] == []


def test_stopped_file_goes_on(lively, tmp_path, monkeypatch):
    """Stopped anywhere, also within a line, it gives every answer once; finished, it does nothing
    more."""
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    answer(lively, whole, 12)
    lines = whole.read_bytes().splitlines(keepends=True)
    first = len(lines[0] + lines[1])
    for cut in (0, len(lines[0]), first, first + 1, first + len(lines[2]) // 2, first - 1):
        part.write_bytes(whole.read_bytes()[:cut])
        answer(lively, part, 12)
        assert part.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(G.Batch, "step", lambda self: pytest.fail("nothing is left to decode"))
    answer(lively, whole, 12)


@pytest.mark.parametrize(
    "other", ["settings", "weights", "dtype", "questions", "more", "text", "half a text", "objects"]
)
def test_file_of_something_else_is_left_alone(lively, tmp_path, other):
    """Answers by other settings, weights or to other questions are not mixed; a file that is none
    of ours stays."""
    path = tmp_path / "a.jsonl"
    texts = {"text": "a diary\n", "half a text": "a diary", "objects": '{"instruction": "a"}\n'}
    if other in texts:
        path.write_text(texts[other])
    else:
        answer(lively, path, 4)
    before, more = path.read_bytes(), {}
    if other == "settings":
        more = {"repetition_penalty": 1.5}
    elif other == "weights":
        more = {"change": lambda model: model.lm_head.weight.data.mul_(2)}
    elif other == "dtype":
        more = {"change": lambda model: setattr(model, "compute_dtype", torch.bfloat16)}
    elif other == "questions":
        more = {"backwards": True}
    with pytest.raises(ValueError, match="a.jsonl.*another --output"):
        answer(lively, path, 3 if other == "more" else 4, **more)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_kill_in_the_middle_of_500_prompts(lively, tmp_path):
    """kill -9 twice, then to the end: 500 answers, none twice, in order, equal to an undisturbed
    run."""
    questions, out, calm = (tmp_path / name for name in ("q.json", "a.jsonl", "calm.jsonl"))
    questions.write_text(
        json.dumps(
            [{"instruction": f"第{i}味药有什么功效？"} for i in range(500)], ensure_ascii=False
        )
    )
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
    assert [r["index"] for r in rows] == list(range(500)) and len(
        {r["instruction"] for r in rows}
    ) == 500
    assert call(lively, "--instruct_dir", questions, "--output", calm).returncode == 0
    assert read(calm) == rows


def test_standard_input_and_several_answers(lively):
    """- is standard input; BenTsao's infer.json lines; --n answers each with a seed of its own;
    answers go to stdout."""

    def ask(questions, *args):
        return call(
            lively,
            *("--instruct_dir", "-", "--temperature", "1", "--top_k", "0", "--top_p", "1", *args),
            stdin="".join(json.dumps({"instruction": q, "output": ""}) + "\n" for q in questions),
        )

    done = ask(["黄芪？", "柴胡？"], "--n", "2", "--seed", "3")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [r["instruction"] for r in rows] == ["黄芪？"] * 2 + ["柴胡？"] * 2
    assert [r["index"] for r in rows] == [0, 1, 2, 3] and rows[0]["answer"] != rows[1]["answer"]
    sampled = ("--temperature", "1", "--top_k", "0", "--top_p", "1")
    again = call(lively, "黄芪？", "--n", "2", "--seed", "3", *sampled).stdout
    # On a terminal control characters stand as their codes.
    assert again == M.printable(f"{rows[0]['answer']}\n{rows[1]['answer']}\n")


def test_answers_are_printed_in_the_order_of_questions(lively):
    """Whatever their lengths: the longest prompt came first."""
    questions = [f"黄芪{'好' * n}？" for n in (1, 30, 3, 20, 2)]
    lines = "".join(json.dumps({"instruction": q}) + "\n" for q in questions)
    done = call(lively, "--instruct_dir", "-", "--batch_size", "2", stdin=lines)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["instruction"] for r in rows] == questions


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, base, *args):
        self.seen, (self.main, side) = b"", pty.openpty()
        self.process = subprocess.Popen(
            command(base, *args),
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(side)

    def until(self, text, seconds=60):
        """Wait until the text appears behind what was waited for before; return it with what stands
        between."""
        end = time.time() + seconds
        while text.encode() not in self.seen:
            assert time.time() < end, self.seen.decode(errors="replace")
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 4096)
        before, mark, self.seen = self.seen.partition(text.encode())
        return before + mark

    def type(self, text):
        os.write(self.main, text.encode())


def test_chat_in_a_terminal(lively, tmp_path):
    """Ctrl-C stops an answer and not the chat, lines are edited, /save keeps what was said, Ctrl-D
    ends."""
    terminal = Terminal(lively, "--single_or_multi", "multi", "--max_new_tokens", "1500")
    terminal.until("> ")
    terminal.type("黄芪x\x7f\n")  # the x is taken back
    terminal.until("\n")  # the answer begins
    time.sleep(0.2)
    terminal.type("\x03")
    terminal.until("tokens/s]")
    terminal.until("> ")
    time.sleep(1)  # had it ended before, the signal would take away what is typed next
    terminal.type("/model\n")
    terminal.until("torch.float32")
    terminal.until("> ")
    terminal.type(f"/save {tmp_path / 'chat.json'}\n")
    terminal.until("> ")
    terminal.type("half a question")
    terminal.until("question")
    time.sleep(0.3)  # readline misses a signal between its check and its select
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
    (record,) = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"] and record["messages"][
        0
    ]["content"] == "黄芪"
    assert (
        G.read_instructions(tmp_path / "chat.json", answers=True)
        or not record["messages"][1]["content"]
    )


def test_chat_keeps_the_turns_that_fit(lively):
    """The prompts that a chat asks: BenTsao's form with multi, the question alone without; the
    oldest turns go first."""
    tokenizer, asked = G.Tokenizer(lively / "tokenizer.model"), []
    template = G.load_template("bare")

    def answer(prompt):
        asked.append(tokenizer.decode(prompt))
        yield "答"

    def talk(multi, room, lines):
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            given = iter(lines)
            patch.setattr(
                "builtins.input",
                lambda prompt: next(given, None) or (_ for _ in ()).throw(EOFError),
            )
            G.chat(
                answer,
                lambda messages: G.render_prompt(tokenizer, template, messages, multi),
                multi,
                room,
                "",
            )
        return list(asked)

    assert talk(True, 1000, ["甲", "乙", "/reset", "丙"]) == [
        " <user>: 甲",
        " <user>: 甲 <bot>: 答 <user>: 乙",
        " <user>: 丙",
    ]
    assert talk(False, 1000, ["甲", "乙"]) == ["甲", "乙"]
    room = len(tokenizer.encode(" <user>: 乙 <bot>: 答 <user>: 丙", bos=True)) + 1
    assert talk(True, room, ["甲", "乙", "丙"])[-1] == " <user>: 乙 <bot>: 答 <user>: 丙"
    assert talk(True, 2, ["甲", "乙"]) == []  # not one question fits
    assert talk(False, room, ["甲" * 99, "甲\udcff", "乙"]) == ["乙"] and talk(
        True, room, ["甲\udcff", "乙"]
    ) == [" <user>: 乙"]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--context", "16"], "context 16"),
        (["--n", "0", "a"], "n is 0"),
        (["--batch_size", "0", "a"], "batch_size is 0"),
        (["--top_p", "2", "a"], "top_p is 2"),
        (["--serve", "--num_beams", "2"], "num_beams"),
        (["--serve", "--port", "99999"], "port is 99999"),
        (["--serve", "--port", "-1"], "port is -1"),
        (["--device", "meta", "a"], "meta"),
        (["a\udcff"], "surrogates"),
        (["a", "--input", "\udcff", "--prompt_template", "alpaca"], "surrogates"),
        (["--max_new_tokens", "100000000000000", "a"], "max_new_tokens"),
        (["--max_new_tokens", "16000000", "--num_beams", "999999", "a"], "batch_size"),
        (["--base_dtype", "int3", "a"], "int3"),
        (["a", "--compile"], "--compile"),
        (["--serve", "--merge"], "--merge"),
        ([""], "empty"),
        (["--n", "2"], "--n"),
        (["--n", "2", "--serve"], "--n"),
        (["--input", "x"], "--input"),
        (["--input", "x", "--instruct_dir", "FILE"], "--input"),
        (["a", "--instruct_dir", "FILE"], "one of"),
        (["--serve", "--instruct_dir", "FILE"], "one of"),
        (["a", "--serve"], "one of"),
        (["a", "--output", "x"], "--output"),
    ],
)
def test_bad_options_are_one_line(lively, records, args, said, capsys, monkeypatch):
    args = [str(records) if a == "FILE" else a for a in args]
    monkeypatch.setattr(sys, "argv", [str(a) for a in command(lively, *args)[1:]])
    with pytest.raises(SystemExit) as caught:
        M.run(G.main)
    # before it may stand how far an answer came
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and said in last and sum("rror" in line for line in lines) == 1


def test_what_a_mode_does_not_use_does_not_stop_it(lively):
    """--context bounds chats and servers; an environment variable that is empty is none."""
    done = subprocess.run(
        command(lively, "--context", "16", "黄芪？"),
        env={**os.environ, "API_PORT": "", "API_HOST": ""},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_chat_goes_on_after_what_it_cannot_ask_and_ends_with_its_reader(lively):
    """Bytes that are no text and a question that does not fit are one line each; without a terminal
    it is a filter."""
    given = b"\xff\xfe\n" + "黄芪".encode() * 200 + "\n黄芪？\n".encode()
    done = subprocess.run(
        command(lively, "--context", "120"),
        input=given,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert (
        done.returncode == 0
        and len(errors) == 2
        and "surrogates" in errors[0]
        and "--context" in errors[1]
    ), done.stderr
    assert done.stdout.decode().count("\n") >= 1 and b"[16 tokens" in done.stderr
    closed = subprocess.run(
        command(lively), preexec_fn=lambda: os.close(0), capture_output=True, text=True, timeout=120
    )
    assert (
        closed.returncode == 2
        and "standard input" in closed.stderr
        and closed.stderr.count("\n") == 1
    ), closed.stderr
    with subprocess.Popen(
        command(lively), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.write("黄芪？\n".encode() * 30)
        process.stdin.close()
        said = process.stderr.read().decode()
        process.wait(60)
    assert "not saved" not in said and "Traceback" not in said and said.count("tokens/s]") <= 1, (
        said
    )


def test_output_that_is_no_plain_file_stays_what_it_is(lively, tmp_path):
    """A link is followed, a pipe is written to: neither is replaced by a file."""
    link, pipe, got = tmp_path / "link", tmp_path / "pipe", []
    link.symlink_to(tmp_path / "real")
    os.mkfifo(pipe)
    reader = threading.Thread(
        target=lambda: got.extend(pipe.read_text(encoding="utf-8").splitlines())
    )
    reader.start()
    for path in (link, link, pipe):
        answer(lively, path, 3)
    reader.join(20)
    assert link.is_symlink() and pipe.is_fifo()
    assert read(tmp_path / "real") == list(map(json.loads, got)) and len(got) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "real"]


def test_key_tells_weights_apart(lively, records, tmp_path, monkeypatch):
    """What the weights are counts, not how they are named or when they were written: dtypes,
    --load_8bit, a folder's path, what lies in base and adapter."""
    base, tuned, seen = tmp_path / "base", tmp_path / "tuned", []
    shutil.copytree(lively, base)
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(r=2))
    L.save_adapter(model, tuned, base)
    monkeypatch.setattr(G, "answer_file", lambda model, *more: seen.append(G.fingerprint(model)))
    monkeypatch.chdir(tmp_path)

    def key(*args, base=base):
        argv = ["generate.py", "--base_model", str(base), "--instruct_dir", str(records), *args]
        monkeypatch.setattr(sys, "argv", argv)
        G.main()
        return seen.pop()

    alone, single = ("--use_lora", "False"), ("--dtype", "fp32")
    is_bf16 = G.pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    kinds = [
        key(*alone, *single),
        key(*alone, "--dtype", "bf16"),
        key(*alone, *single, "--load_8bit"),
        key("--lora_weights", "tuned", *single),
        key("--lora_weights", "tuned", *single, "--merge"),
        key(*alone, *single, "--base_dtype", "bf16"),
    ]
    # this adapter's B is zero: merged, its weights are the base's, and so are its answers
    assert len(set(kinds)) == 5 and kinds[4] == kinds[0]
    assert kinds[2] == key(*alone, *single, "--base_dtype", "int8")
    assert kinds[is_bf16] == key(*alone)
    assert kinds[0] == key(*alone, *single, "--base_dtype", "fp32", base="base")
    shutil.copytree(base, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # of another time
    assert kinds[0] == key(*alone, *single, base="./elsewhere/")
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    assert key("--lora_weights", "tuned", *single) != kinds[3]
    model.lm_head.weight.data *= 2
    L.remove_adapter(model)
    M.save_model(model, base)
    assert key(*alone, *single) != kinds[0]


def test_an_adapter_that_lies_there_by_chance_is_not_applied(base, tmp_path):
    """merge, then ask the merged folder: the adapter beside it would be applied twice. Who names a
    base gets that base, and reads which."""
    (tmp_path / "lora-tcm").mkdir()  # no adapter in it: applying it would be an error
    script = [sys.executable, ROOT / "generate.py", "--max_new_tokens", "3"]
    options = {"cwd": tmp_path, "input": "问\n", "capture_output": True, "text": True}
    named = subprocess.run([*script, "--base_model", base], **options)
    assert named.returncode == 0 and f"{base} with no adapter" in named.stderr, named.stderr
    unnamed = subprocess.run(script, **options)
    assert unnamed.returncode == 2 and "lora-tcm" in unnamed.stderr
