"""What the program did not write it keeps; one process writes a folder; what is read back is
compared; nothing large, endless or live is let in. Each case is one that once went wrong."""

import json
import os
import shutil
import signal
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path

import build_data as D
import generate as G
import lora as L
import model as M
import train as T

import pytest
import torch
from conftest import RECORDS, ROOT, run_command
from safetensors.torch import load_file, save_file

ESCAPE = "\x1b]0;owned\x07\x9b31m"  # sets a terminal's title, and its colour


@pytest.fixture
def options(base, records, tmp_path):
    """A command line that trains two steps."""
    given = {
        "base_model": base,
        "data_path": records,
        "output_dir": tmp_path / "out",
        "val_set_size": 2,
        "num_answers": 1,
        "batch_size": 2,
        "num_epochs": 1,
        "cutoff_len": 128,
        "dtype": "fp32",
        "save_steps": 2,
    }
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def refused(capsys, main, *argv):
    """The one line with which a command ends."""
    capsys.readouterr()
    assert run_command(main, *argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and not M.re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", line)
    return line


# --------------------------------------------------------------------------------------------------
# What the program did not write


@pytest.mark.parametrize("name", sorted(T.RESULTS))
def test_training_replaces_nothing_of_another_program(options, tmp_path, capsys, name):
    name = name.replace("*[0-9]", "200")  # as transformers saves one
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    for more in ((), ("--overwrite",), ("--resume_from_checkpoint", "auto")):
        line = refused(capsys, T.main, *options, *more)
        assert str(tmp_path / "out") in line and name in line
    assert contents(tmp_path / "out") == {tmp_path / "out" / name: b"{}"}


def test_a_log_of_another_program_stays(options, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.jsonl").write_text('{"event": "mine"}\n')
    assert "log.jsonl" in refused(capsys, T.main, *options)
    assert (tmp_path / "out/log.jsonl").read_text() == '{"event": "mine"}\n'


def test_training_does_not_replace_its_base(options, base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    before = contents(tmp_path / "base")
    same = ["--full", "--base_model", tmp_path / "base", "--output_dir", tmp_path / "base"]
    assert str(tmp_path / "base") in refused(capsys, T.main, *options, *same)
    assert contents(tmp_path / "base") == before


def test_a_checkpoint_set_aside_stays(options, tmp_path):
    """And another program's checkpoint of the same step; only what a save left behind goes."""
    aside = tmp_path / "out/checkpoint-2.old"
    left = tmp_path / "out/.checkpoint-2.unfinished"
    for folder in (aside, left):
        folder.mkdir(parents=True)
        (folder / "state.safetensors").write_bytes(b"mine")
    assert run_command(T.main, *options) == 0
    assert (aside / "state.safetensors").read_bytes() == b"mine" and not left.exists()
    assert (tmp_path / "out/checkpoint-2/state.safetensors").stat().st_size > 4


def test_a_page_replaces_a_page_alone(records, tmp_path, capsys):
    """A file may be called as markup: on the page that is text."""
    live = tmp_path / "<img onerror=alert(1) src=x>.jsonl"
    shutil.copyfile(records, live)
    page = tmp_path / "page.html"
    for _ in range(2):  # the second takes the place of the first
        assert run_command(D.main, "stats", live, "--html", page) == 0
    assert "<img" not in page.read_text() and "&lt;img onerror" in page.read_text()
    for name, text in (("mine.html", "<title>Mine</title>"), ("notes", "a b\n"), ("bin", "\ud7ff")):
        (tmp_path / name).write_text(text)
        assert name in refused(capsys, D.main, "stats", live, "--html", tmp_path / name)
        assert (tmp_path / name).read_text() == text


def test_a_chat_replaces_what_it_saved_itself(base, tmp_path, monkeypatch, capsys):
    mine, new = tmp_path / "mine.json", tmp_path / "new.json"
    mine.write_text('[{"messages": []}]')
    said = ["黄芪？", f"/save {mine}", f"/save {new}", "柴胡？", f"/save {new}"]
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO("\n".join(said).encode())))
    assert run_command(G.main, "--base_model", base, "--max_new_tokens", 2) == 0
    assert mine.read_text() == '[{"messages": []}]'
    assert str(mine) in capsys.readouterr().err
    assert len(json.loads(new.read_text())[0]["messages"]) == 4


def asked(base, records, output):
    return ["--base_model", base, "--instruct_dir", records, "--output", output] + [
        "--max_new_tokens",
        "2",
    ]


@pytest.mark.parametrize("linked", [False, True])
def test_answers_go_to_no_file_of_others(base, records, tmp_path, capsys, linked):
    """One object without a line end is no torn line of ours, not even the question itself."""
    file = tmp_path / "mine.json"
    if linked:
        (tmp_path / "link").symlink_to(file)
    for text in (json.dumps(RECORDS[0], ensure_ascii=False), "{", '{"a": 1}', "notes\n"):
        file.write_text(text)
        output = tmp_path / "link" if linked else file
        if text == "{":  # as a line of ours begins
            assert run_command(G.main, *asked(base, records, output)) == 0
        else:
            assert str(output) in refused(capsys, G.main, *asked(base, records, output))
            assert file.read_text() == text


def test_answers_go_on_where_they_were_cut(base, records, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert run_command(G.main, *asked(base, records, out)) == 0
    whole = out.read_bytes()
    for size in (1, 20, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:size])
        assert run_command(G.main, *asked(base, records, out)) == 0
        assert out.read_bytes() == whole


def test_records_replace_records_alone(tmp_path, capsys):
    out, known = tmp_path / "out", tmp_path / "knowledge.jsonl"
    entities = (ROOT / "data/knowledge.jsonl").read_text(encoding="utf-8").split("\n")
    known.write_text("\n".join(entities[:9]), encoding="utf-8")
    offline = ["offline", "--output_dir", out, "--knowledge", known]
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / name).write_text('{"instruction": "mine"}\n')
        assert name in refused(capsys, D.main, *offline)
        assert (out / name).read_text() == '{"instruction": "mine"}\n'
    (out / name).unlink()
    for _ in range(2):
        assert run_command(D.main, *offline) == 0
    mine, texts = tmp_path / "mine.jsonl", tmp_path / "texts.jsonl"
    texts.write_text('{"text": "黄芪补气。", "spo_list": []}\n')
    mine.write_text('{"instruction": "mine"}\n')
    extract = ["extract", "--records", "--texts", texts, "--output"]
    assert str(mine) in refused(capsys, D.main, *extract, mine)
    assert mine.read_text() == '{"instruction": "mine"}\n'
    for _ in range(2):
        assert run_command(D.main, *extract, tmp_path / "new.jsonl") == 0
    assert '"entity": ' in (out / "train.jsonl").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# One writer a folder


def test_a_folder_has_one_writer(options, base, records, tmp_path, capsys):
    """A lock counts for each opened file, so that this process can stand for another."""
    out, file, known = (tmp_path / name for name in ("out", "answers.jsonl", "known.jsonl"))
    entities = (ROOT / "data/knowledge.jsonl").read_text(encoding="utf-8").split("\n")
    known.write_text("\n".join(entities[:9]), encoding="utf-8")
    for folder, main, argv in (
        (out, T.main, options),
        (tmp_path / "d", D.main, ["offline", "--knowledge", known, "--output_dir", tmp_path / "d"]),
        (M.unfinished(tmp_path / "hf"), M.main, ["convert", base, tmp_path / "hf"]),
        (
            M.unfinished(tmp_path / "ex"),
            L.main,
            ["export", "--base_model", base, "--output_dir", tmp_path / "ex"],
        ),
    ):
        with M.own_folder(folder):
            assert str(folder) in refused(capsys, main, *argv)
        assert run_command(main, *argv) == 0
    with open(file, "a") as held:
        M.hold(held, file)
        assert str(file) in refused(capsys, G.main, *asked(base, records, file))
    assert run_command(G.main, *asked(base, records, file)) == 0


def test_what_a_killed_convert_left_goes(base, tmp_path):
    left, mine = M.unfinished(tmp_path / "new"), tmp_path / "new.tmp"
    for folder in (left / "deep", mine):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    assert run_command(M.main, "convert", base, tmp_path / "new") == 0
    assert not left.exists() and (mine / "model.safetensors").read_bytes() == b"half"
    assert sorted(os.listdir(tmp_path)) == ["new", "new.tmp"]
    assert "half" not in str(sorted(contents(tmp_path / "new")))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "generate", "build_data", "convert"])
def test_of_two_processes_one_ends_with_one_line(options, base, records, tmp_path, command):
    """Ten times two at once: one writes the whole, the other says so, or comes too late."""
    entities = (ROOT / "data/knowledge.jsonl").read_text(encoding="utf-8").split("\n")
    (tmp_path / "known.jsonl").write_text("\n".join(entities[:9]), encoding="utf-8")
    offline = ["offline", "--knowledge", tmp_path / "known.jsonl"]
    for i in range(10):
        out = tmp_path / str(i)
        main, argv, result = {
            "train": (T.main, [*options, "--output_dir", out], out / "answers.jsonl"),
            "generate": (G.main, asked(base, records, out), out),
            "convert": (M.main, ["convert", base, out], out / "config.json"),
            "build_data": (D.main, [*offline, "--output_dir", out], out / "train.jsonl"),
        }[command]
        children = [fork(main, argv, tmp_path / f"{i}.{n}.err") for n in range(2)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
        assert codes in ([0, 2], [0, 0]) and result.is_file(), codes
        if command in ("train", "convert"):
            assert codes == [0, 2]
        lines = [(tmp_path / f"{i}.{n}.err").read_text() for n in range(2)]
        assert "Traceback" not in str(lines), lines
        alone = tmp_path / f"{i}-alone"
        argv = [alone if item == out else item for item in argv]
        if command != "train":
            assert run_command(main, *argv) == 0
            same = contents(alone) if alone.is_dir() else {alone: alone.read_bytes()}
            for path, data in same.items():
                other = Path(str(path).replace(str(alone), str(out)))
                assert other.read_bytes() == data or path.suffix == ".json"
        else:
            run = json.loads((out / "run.json").read_text())
            assert run["adapter"] == [M.file_hash(out / "adapter_model.safetensors")]
            assert len((out / "log.jsonl").read_text().splitlines()) == run["step"]


def fork(main, argv, errors):
    child = os.fork()
    if not child:
        code = 99
        try:
            handle = os.open(errors, os.O_CREAT | os.O_WRONLY)
            os.dup2(handle, 1), os.dup2(handle, 2)
            code = run_command(main, *argv)
        finally:
            os._exit(code)
    return child


# --------------------------------------------------------------------------------------------------
# What is read back


@pytest.fixture(scope="module")
def stopped(base, records, tmp_path_factory):
    """A run of three steps with its checkpoint of the second, and the command line of it."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    pairs = ["--base_model", base, "--data_path", records, "--val_set_size", 2, "--batch_size", 2]
    pairs += ["--num_epochs", 1, "--cutoff_len", 128, "--dtype", "fp32", "--save_steps", 2]
    pairs += ["--num_answers", 1, "--lora_dropout", 0]
    assert run_command(T.main, *pairs, "--output_dir", out) == 0
    return out, pairs


def json_edit(name, **values):
    def edit(folder):
        file = folder / name
        texts = [file.read_text()] if name == "run.json" else file.read_text().splitlines()
        lines = [json.loads(text) for text in texts]
        lines[-1] |= values
        lines[-1] = {k: v for k, v in lines[-1].items() if v is not None}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


def tensor_edit(change):
    def edit(folder):
        state = load_file(folder / "state.safetensors")
        save_file(change(state) or state, folder / "state.safetensors")

    return edit


def key_of(state, ending):
    return next(key for key in state if key.endswith(ending))


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


def set_tensor(ending, new):
    return tensor_edit(lambda s: s | {key_of(s, ending): new(s[key_of(s, ending)])})


DAMAGES = {
    "no started": (json_edit("run.json", started=None), "run.json"),
    "started is a text": (json_edit("run.json", started="x"), "run.json"),
    "no config": (json_edit("run.json", config=None), "run.json"),
    "config is a list": (json_edit("run.json", config=[1]), "run.json"),
    "sha256 is a text": (json_edit("run.json", sha256="x"), "run.json"),
    "tokens_at_once is a text": (json_edit("run.json", tokens_at_once="many"), "run.json"),
    "loss_scale is negative": (json_edit("run.json", loss_scale=-1.0), "run.json"),
    "an array": (lambda f: (f / "run.json").write_text("[]"), "run.json"),
    "a step that is none": (json_edit("log.jsonl", step=7), "log.jsonl"),
    "a loss that is a text": (json_edit("log.jsonl", loss="low"), "log.jsonl"),
    "no epoch": (json_edit("log.jsonl", epoch=None), "log.jsonl"),
    "an int beyond all": (json_edit("log.jsonl", tokens=10**400), "log.jsonl"),
    "another step": (
        lambda f: (f / "log.jsonl").write_text((f / "log.jsonl").read_text().split("\n")[0]),
        "log.jsonl",
    ),
    "a tensor is missing": (tensor_edit(lambda s: without(s, key_of(s, "exp_avg"))), "exp_avg"),
    "a tensor too many": (tensor_edit(lambda s: s | {"ghost": torch.ones(1)}), "ghost"),
    "a moment of another shape": (set_tensor("exp_avg_sq", lambda t: t[:1].clone()), "exp_avg_sq"),
    "a moment of one number": (set_tensor("exp_avg", lambda t: torch.tensor(1.0)), "exp_avg"),
    "a value in bf16": (set_tensor("value", torch.Tensor.bfloat16), "value"),
    "a step of one parameter": (set_tensor("/step", lambda t: t + 5), "state"),
    "steps of another run": (
        tensor_edit(lambda s: {k: t + k.endswith("/step") for k, t in s.items()}),
        "3 steps",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_altered_checkpoint_is_refused(stopped, tmp_path, capsys, name):
    out, pairs = stopped
    edit, word = DAMAGES[name]
    shutil.copytree(out / "checkpoint-2", tmp_path / "out/checkpoint-2")
    edit(tmp_path / "out/checkpoint-2")
    before = contents(tmp_path / "out/checkpoint-2")
    argv = [*pairs, "--output_dir", tmp_path / "out", "--resume_from_checkpoint"]
    line = refused(capsys, T.main, *argv, tmp_path / "out/checkpoint-2")
    assert word in line and "checkpoint-2" in line, line
    assert contents(tmp_path / "out/checkpoint-2") == before


@pytest.mark.parametrize("more", [[], ["--full"], ["--base_dtype", "nf4"]])
def test_missing_answers_are_made_on_resuming(options, tmp_path, more):
    """With the weights of the end, and the base as it was stored: the answers are the same."""
    assert run_command(T.main, *options, *more) == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out/answers.jsonl").unlink()
    assert run_command(T.main, *options, *more, "--resume_from_checkpoint", "auto") == 0
    assert contents(tmp_path / "out") == before


def test_rows_are_shown_beside_a_run(options, tmp_path, capsys):
    assert run_command(T.main, *options) == 0
    before = contents(tmp_path / "out")
    for more in ([], ["--resume_from_checkpoint", "auto"]):
        capsys.readouterr()
        assert run_command(T.main, *options, *more, "--show", 1) == 0
        assert "of them targets" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_an_epoch_may_have_many_steps(options, records, tmp_path):
    index = options.index("--data_path") + 1
    options[index] += ":3000"
    assert run_command(T.main, *options, "--batch_size", 1, "--max_steps", 1) == 0


def test_data_from_a_pipe_is_one_line(options, tmp_path, capsys):
    """Its hash would be that of nothing, and another pipe's."""
    os.mkfifo(tmp_path / "pipe")
    options[options.index("--data_path") + 1] = str(tmp_path / "pipe")
    assert "pipe" in refused(capsys, T.main, *options)


def test_a_signal_in_the_last_step_is_heeded(options, tmp_path, monkeypatch, capsys):
    finite, checked = T.check_finite, []

    def check(model, batch, loss, norm, config):
        checked.append(batch)
        if len(checked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        finite(model, batch, loss, norm, config)

    monkeypatch.setattr(T, "check_finite", check)
    assert run_command(T.main, *options) == 128 + signal.SIGTERM
    assert "step 3 of 3" in capsys.readouterr().out
    assert (tmp_path / "out/run.json").is_file()
    assert not (tmp_path / "out/answers.jsonl").exists()
    assert run_command(T.main, *options, "--resume_from_checkpoint", "auto") == 0
    assert (tmp_path / "out/answers.jsonl").is_file()


def test_a_clock_may_stand_still(options, base, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert run_command(T.main, *options) == 0
    assert run_command(G.main, "黄芪？", "--base_model", base, "--max_new_tokens", 2) == 0


@pytest.mark.parametrize("made", [0, 1])
def test_the_log_of_a_finished_run_stays_until_a_checkpoint(options, tmp_path, monkeypatch, made):
    """A run that begins anew and dies before its first checkpoint has taken nothing."""
    assert run_command(T.main, *options) == 0
    before = contents(tmp_path / "out")
    die_after(made, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run_command(T.main, *options, "--overwrite")
    assert contents(tmp_path / "out") == before


def die_after(steps, monkeypatch):
    left, gradient = [1] * steps, T.gradient_that_fits
    monkeypatch.setattr(
        T, "gradient_that_fits", lambda *args: gradient(*args) if left and left.pop() else 1 / 0
    )


def test_the_log_of_a_run_that_died_early_goes_with_the_next(options, tmp_path, monkeypatch):
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            die_after(1, patch)
            run_command(T.main, *options)
        [line] = (tmp_path / "out/log.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == 1


# --------------------------------------------------------------------------------------------------
# Bounds


def model_folder(folder, base, **values):
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SHAPES = {
    "layers": {"num_hidden_layers": 100_000},
    "most layers": {"num_hidden_layers": 1000},
    "wide": {"hidden_size": 2**24, "intermediate_size": 2**24, "head_dim": 8},
    "tall": {"vocab_size": 2**24, "intermediate_size": 2**24},
    "heads": {"num_attention_heads": 2**24, "hidden_size": 2**24, "head_dim": 2**24},
    "one head": {"head_dim": 2**24, "num_attention_heads": 1, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_beyond_its_file_is_refused_at_once(base, tmp_path, capsys, name):
    folder, begun = model_folder(tmp_path / "m", base, **SHAPES[name]), time.process_time()
    assert str(folder) in refused(capsys, M.main, "convert", folder, tmp_path / "new")
    assert time.process_time() - begun < 10 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "large"])
def test_what_may_never_end_is_not_opened(base, tmp_path, capsys, name, kind):
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "zero":
        (folder / name).symlink_to("/dev/zero")
    else:
        with open(folder / name, "wb") as file:
            file.truncate(M.SMALL + 1)
    if name.startswith("tokenizer"):  # convert copies what is a file, and looks at it here
        line = refused(capsys, G.main, "x", "--base_model", folder)
    else:
        line = refused(capsys, M.main, "convert", folder, tmp_path / "new")
    assert str(folder) in line and not (tmp_path / "new").exists()


def test_prompts_and_templates_are_bounded(base, tmp_path, capsys):
    with open(tmp_path / "t.json", "wb") as file:
        file.truncate(M.SMALL + 1)
    asking = ["x", "--base_model", base, "--prompt_template", tmp_path / "t.json"]
    assert "t.json" in refused(capsys, G.main, *asking)
    os.mkfifo(tmp_path / "pipe.json")
    asking[-1] = tmp_path / "pipe.json"
    assert "pipe.json" in refused(capsys, G.main, *asking)


def test_a_rank_above_the_smaller_side_is_refused(options, tmp_path, capsys):
    assert "q_proj" in refused(capsys, T.main, *options, "--lora_r", 64)


EVIL = ["(a+)+$", "(.*a){25}", "([a-z]+)*q_proj"]  # on many letters each would run for ever


@pytest.mark.parametrize("pattern", EVIL)
def test_a_pattern_of_an_adapter_is_not_run(base, tmp_path, pattern):
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, targets=("q_proj",)))
    L.save_adapter(model, tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    settings = json.loads(file.read_text()) | {"target_modules": pattern}
    file.write_text(json.dumps(settings))
    fresh, begun = G.load_base(base, "cpu", torch.float32)[0], time.process_time()
    L.load_adapter(fresh, tmp_path / "a")
    assert time.process_time() - begun < 5 and len(L.lora_linears(fresh)) == 2


TENSORS = {
    "of no dimension": lambda t: torch.tensor(1.0),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "stretched": lambda t: torch.ones(1).expand(2**20, 2**20),
    "a list": lambda t: [t],
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("half", ["A", "B"])
def test_a_tensor_without_its_data_is_one_line(base, tmp_path, capsys, name, half):
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, targets=("q_proj",)))
    L.save_adapter(model, tmp_path / "a")
    state = load_file(tmp_path / "a/adapter_model.safetensors")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    key = next(key for key in state if f"lora_{half}" in key)
    state[key] = TENSORS[name](state[key])
    torch.save(state, tmp_path / "a/adapter_model.bin")
    asking = ["x", "--base_model", base, "--lora_weights", tmp_path / "a"]
    assert "adapter_model.bin" in refused(capsys, G.main, *asking)


# --------------------------------------------------------------------------------------------------
# What others wrote is text


def test_no_control_character_reaches_a_terminal(base, records, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {f"model.{ESCAPE}": torch.ones(1)}, folder / "model.safetensors")
    assert "owned" in refused(capsys, M.main, "convert", folder, tmp_path / "new")
    monkeypatch.setattr(G, "stream", lambda *args: iter([f"气{ESCAPE}\n"]))
    assert run_command(G.main, "x", "--base_model", base, "--max_new_tokens", 2) == 0
    assert capsys.readouterr().out == "气\\x1b]0;owned\\x07\\x9b31m\n\n"
    assert run_command(G.main, *asked(base, records, "")) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[0])["answer"] == f"气{ESCAPE}\n" and "\x1b" not in out


def test_records_may_have_anything_beside_their_texts():
    odd = [5, None, "补气", {"a": 1}, [["补气"]], [5, "补气"], [None]]
    records = [{"values": value, "entity": other} for value in odd for other in odd]
    assert 0 < T.facts_recalled(records, ["补气"] * len(records)) < 1
    assert T.facts_recalled([{"values": ["补气"], "entity": ["x"]}], ["补气。"]) == 1


def test_a_foreign_run_json_is_read_or_one_line(base, tmp_path, capsys):
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, targets=("q_proj",)))
    L.save_adapter(model, tmp_path / "a")
    for i, value in enumerate(
        [
            {"made_in": 5},
            {"made_in": {"template": "x"}},
            {"made_in": {"template": {"prompt_no_input": 5}}},
            {"made_in": {"template": {"prompt_no_input": "{nothing}"}}},
            {"made_in": {"template": {"chat_template": [1]}}},
            {"config": [1]},
            {"config": {"base_model": 5, "prompt_template_name": {}}},
        ]
    ):
        (tmp_path / "a/run.json").write_text(json.dumps(value))
        merged = ["--base_model", base, "--lora_weights", tmp_path / "a"]
        out = tmp_path / f"m{i}"
        assert run_command(L.main, "merge", *merged, "--output_dir", out) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
        assert run_command(G.main, "x", *merged, "--max_new_tokens", 1) in (0, 2)


@pytest.mark.parametrize("name", [5, True, ["x"] * 9, {"a": 1}, "\0", "x" * 9999])
def test_a_base_of_another_kind_in_adapter_config_is_one_line(base, tmp_path, capsys, name):
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, targets=("q_proj",)))
    L.save_adapter(model, tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    asking = ["--lora_weights", tmp_path / "a", "--max_new_tokens", 1]
    for more in ([], ["--base_model", base]):
        refused(capsys, G.main, "x", *asking, *more)
        merging = ["--lora_weights", tmp_path / "a", "--output_dir", tmp_path / "m"]
        refused(capsys, L.main, "merge", *merging, *more)


def test_links_that_lead_out_are_not_copied(base, tmp_path, capsys):
    private = tmp_path / "private"
    private.write_text('{"secret": "s3cret"}')
    for name in ("tokenizer.model", "config.json", "tokenizer_config.json"):
        folder = tmp_path / name / "m"
        shutil.copytree(base, folder)
        (folder / name).unlink(missing_ok=True)
        shutil.copyfile(base / name, private) if name == "config.json" else None
        (folder / name).symlink_to(private)
        out = tmp_path / name / "new"
        assert name in refused(capsys, M.main, "convert", folder, out)
        assert not out.exists()
    # The hub's cache is made of links: those are followed.
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots/1").mkdir(parents=True)
    for file in base.iterdir():
        shutil.copyfile(file, repo / "blobs" / file.name)
        (repo / "snapshots/1" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert run_command(M.main, "convert", repo / "snapshots/1", tmp_path / "hub") == 0
