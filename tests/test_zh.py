"""What data/README.zh.md promises: its commands parse and the small ones run, its records are read,
its tables are those of the code.

  python tests/test_zh.py

prints its table of memory and time: minutes of building models without weights."""

import ast
import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import generate as G
import model as M
import train as T

import pytest
import torch
from conftest import ROOT

TEXT = (ROOT / "data" / "README.zh.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(.*)\n([\s\S]*?)^```$", TEXT, re.M)  # (info, text)
SHELL = "".join(text for info, text in BLOCKS if info.startswith("bash"))
RUN = "".join(text for info, text in BLOCKS if info == "bash run")


def table(heading):
    """The rows of the first table under a heading, each a list of its cells; without its head."""
    lines = TEXT.partition(f" {heading}\n")[2].split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])


def quoted(cell):
    return re.findall("`(.+?)`", cell)


# --------------------------------------------------------------------------------------------------
# Commands

COMMAND = re.compile(r"^(?:torchrun .*?|python) ?\b((?:tests/)?\w+\.py)(.*)$", re.M)


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", sorted({m[1] + m[2] for m in COMMAND.finditer(SHELL)}))
def test_each_command_is_understood(command, monkeypatch):
    """Its own parser takes every command that the text shows, and its settings every value."""
    script, *given = shlex.split(command, comments=True)
    add, parse, settings = M.Parser.add_settings, M.Parser.parse_args, []

    def added(self, *classes, **plain):
        settings.extend(classes)
        add(self, *classes, **plain)

    def understood(self, *arguments):
        found = vars(parse(self, *arguments))
        for cls in settings:
            if {*found} & {f.name for f in dataclasses.fields(cls)}:
                M.check_settings(make(cls, found))
        raise Parsed

    def make(cls, found):
        """The settings of a class without its own checks, which ask for more than one value."""
        new = object.__new__(cls)
        for f in dataclasses.fields(cls):
            value = found.get(f.name, f.default)
            object.__setattr__(new, f.name, tuple(value) if isinstance(value, list) else value)
        return new

    module = importlib.import_module(script.removeprefix("tests/").removesuffix(".py"))
    monkeypatch.setattr(M.Parser, "add_settings", added)
    monkeypatch.setattr(M.Parser, "parse_args", understood)
    monkeypatch.setattr(sys, "argv", [script, *given])
    with pytest.raises(Parsed):
        module.main()


def test_there_are_commands_of_every_script():
    named = {match[1] for match in COMMAND.finditer(SHELL)}
    own = {"model", "lora", "generate", "train", "build_data", "tests/evaluate", "tests/judge"}
    own |= {"tests/audit"}
    assert {f"{name}.py" for name in own} <= named and RUN


def bash(text, folder):
    """Run lines of the text in a folder that has data/ as the repository has, with this Python and
    this repository's scripts; what they printed on stdout."""
    (folder / "data").symlink_to(ROOT / "data")
    # a function, so that `python` in every place of a line is this one
    python = f'python() {{ {shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/"$@"; }}\n'
    done = subprocess.run(
        ["bash", "-e", "-c", python + text],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OPENAI_API_KEY": "", "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_small_commands_run_in_their_order(tmp_path):
    printed = bash(RUN, tmp_path)
    records = json.loads((tmp_path / "my.json").read_text(encoding="utf-8"))
    # --show prints a row of each record but the validation's, its answer and EOS as targets
    shown = re.findall(r"^my\.json:(\d): .*\n([\s\S]*?\[</s>\])", printed, re.M)
    assert len(shown) == 2
    for number, row in shown:
        targets = "".join(re.findall(r"\[(.*?)\]", row))
        assert targets == records[int(number) - 1]["output"] + "</s>"
    answers = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    questions = json.loads((tmp_path / "questions.json").read_text(encoding="utf-8"))
    assert [json.loads(a)["instruction"] for a in answers] == [q["instruction"] for q in questions]
    assert (tmp_path / "merged-try" / "model.safetensors").is_file()
    for name in ("train", "heldout"):
        made = (tmp_path / "my-data" / f"{name}.jsonl").read_bytes()
        assert made == (ROOT / "data" / f"{name}.jsonl").read_bytes()


def test_the_clients_get_the_models_answer(tmp_path):
    """The `openai` client's lines and curl's, word for word but for the port, against a server of
    the small base whose adapter stands in lora-tcm: what `generate.py` answers to the question."""
    asked = 'python generate.py "真武汤由哪些药物组成？"\n'
    assert asked in SHELL
    train = "python train.py --max_steps 3 --num_answers 0 --eval_steps 0 --val_set_size 2 >&2\n"
    wanted = bash(train + asked, tmp_path).strip()
    command = [sys.executable, ROOT / "generate.py", "--serve", "--port", "0"]
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stderr if line.startswith("http"))
        port = re.match(r"http://127.0.0.1:(\d+)/", line)[1]
        client = next(text for _, text in BLOCKS if "import OpenAI" in text)
        curl = next(text for _, text in BLOCKS if text.startswith("curl "))
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60)
        told = run([sys.executable, "-c", client.replace("8000", port)])
        assert told.returncode == 0 and told.stdout.strip() == wanted, told.stderr[-1000:]
        if shutil.which("curl"):
            told = run(["bash", "-c", curl.replace("8000", port)])
            message = json.loads(told.stdout)["choices"][0]["message"]
            assert message["content"].strip() == wanted
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_python_examples_are_python():
    for info, text in BLOCKS:
        if info == "python":
            ast.parse(text)


# --------------------------------------------------------------------------------------------------
# Records

FORMS = [text for info, text in BLOCKS if info == "json"]


def test_every_form_of_a_record_is_read(tmp_path):
    """Each example alone, as an array or as lines, ends in an answer that can be trained on."""
    assert len(FORMS) >= 7
    path = tmp_path / "records.json"
    for text in FORMS:
        path.write_text(text, encoding="utf-8")
        records = G.read_instructions(path, answers=True)
        assert records and all(record["output"] for record in records)


# --------------------------------------------------------------------------------------------------
# Bases

# A config.json of each network, for what a row of the table changes in it
PLAIN = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 96,
}


def test_the_bases_are_the_networks():
    rows = table("能用的底座")
    assert {name for row in rows for name in quoted(row[1])} == set(M.NETWORKS)
    templates = {path.stem for path in (ROOT / "data" / "templates").glob("*.json")}
    assert {name for row in rows for name in quoted(row[2])} <= templates


def test_what_is_refused_is_refused():
    rows = table("会被拒绝的底座")
    asked = [json.loads(text) for row in rows for text in quoted(row[1])]
    assert len(asked) >= len(rows) >= 8
    M.config_from_hf(PLAIN)
    for more in asked:
        with pytest.raises(ValueError):
            M.config_from_hf(PLAIN | more)


# --------------------------------------------------------------------------------------------------
# Options and figures


def test_the_options_have_these_defaults():
    defaults = {f.name: f.default for f in dataclasses.fields(T.TrainConfig)}
    rows = table("最要紧的十个参数")
    assert len(rows) == 10
    for names, told, _ in rows:
        for name, value in zip(quoted(names), quoted(told)):
            given = defaults[name.removeprefix("--")]
            given = " ".join(given) if isinstance(given, tuple) else str(given)
            assert value == given or float(value) == float(given), (name, value, given)


def test_figures_of_runs_are_the_english_readmes():
    """The numbers of the first run stand in one block, line for line README.md's; the measured
    speeds stand in BENCHMARKS.md."""
    english = (ROOT / "README.md").read_text(encoding="utf-8")
    first_run = next(text for _, text in BLOCKS if "facts recalled" in text)
    assert set(first_run.splitlines()) <= set(english.splitlines())
    measured = TEXT.partition("**实测**")[2].partition("\n\n")[0]
    benchmarks = (ROOT / "tests" / "BENCHMARKS.md").read_text(encoding="utf-8")
    figures = re.findall(r"\d+[\d,.]*\d", measured)
    assert figures and all(figure in benchmarks for figure in figures)


def test_the_text_counts_the_entities():
    lines = (ROOT / "data" / "knowledge.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(re.findall(r"(\d+) 个\w*条目", TEXT)) == {str(len(lines))}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", TEXT):
        assert (ROOT / "data" / target).exists(), target


def test_places_in_the_text_exist():
    """GitHub's name of a heading: lower case, without punctuation, hyphens for blanks."""
    for name, text in {"": TEXT, "../README.md": (ROOT / "README.md").read_text("utf-8")}.items():
        heads = re.findall(r"^#+ (.*)$", text, re.M)
        places = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
        named = re.findall(rf"\]\({re.escape(name)}#(.+?)\)", TEXT)
        assert named and set(named) <= places, set(named) - places


def shape(C, L, H, K, F, V, **more):
    return M.LLaMAConfig(C, L, H, V, 1e-5, F, K, **more)


QWEN2 = {"model_type": "qwen2", "qkv_bias": True}
QWEN3 = {"model_type": "qwen3", "qk_norm": True, "head_dim": 128}
GLM = {"model_type": "glm", "qkv_bias": True, "partial_rotary_factor": 0.5}
GLM1 = {"model_type": "chatglm1", "qkv_bias": True, "prefix_lm": True}
TIED = {"tie_word_embeddings": True}
# The published shapes: width, layers, heads, heads of keys, feed-forward, vocabulary
SHAPES = {
    "Qwen2.5-1.5B": shape(1536, 28, 12, 2, 8960, 151936, **QWEN2, **TIED),
    "Qwen3-4B": shape(2560, 36, 32, 8, 9728, 151936, **QWEN3, **TIED),
    "ChatGLM-6B": shape(4096, 28, 32, 32, 16384, 130528, **GLM1, **TIED),
    "ChatGLM3-6B": shape(4096, 28, 32, 2, 13696, 65024, **GLM),
    "LLaMA-7B": shape(4096, 32, 32, 32, 11008, 32000),
    "Qwen2.5-7B": shape(3584, 28, 28, 4, 18944, 152064, **QWEN2),
    "Llama-3.1-8B": shape(4096, 32, 32, 8, 14336, 128256),
    "Qwen3-8B": shape(4096, 36, 32, 8, 12288, 151936, **QWEN3),
    "GLM-4-9B": shape(4096, 40, 32, 2, 13696, 151552, **GLM),
    "LLaMA-13B": shape(5120, 40, 40, 40, 13824, 32000),
    "Qwen3-14B": shape(5120, 40, 40, 8, 17408, 151936, **QWEN3),
}
CARDS = (8, 12, 16, 24)
RATES = (71e12, 165e12)  # nominal bf16 of a 3090 and a 4090
TOKENS = 17e6
MODELS = {}  # A model without weights serves all cards.


def trial_model(shape, config, dtype, make=T.trial_model):
    key = repr(shape), config.base_dtype
    MODELS[key] = MODELS.get(key) or make(shape, config, dtype)
    return MODELS[key]


def plan(name, stored, gigabytes):
    """The Plan that train.py would make on a card of so many 2^30 bytes; None if nothing fits."""
    rows = [T.Row([0] * 512, [False] * 256 + [True] * 256)] * 64
    card = SimpleNamespace(total_memory=gigabytes * 2**30)
    config = T.TrainConfig(base_dtype=stored)
    with (
        mock.patch("torch.cuda.get_device_properties", return_value=card),
        mock.patch.object(T, "trial_model", trial_model),
    ):
        try:
            return T.plan_memory(SHAPES[name], config, rows, torch.bfloat16, torch.device("cuda"))
        except ValueError:
            return None


def memory_row(name):
    """A row of the table: for each card the least compressed form that fits, then the hours on a
    24 GB card at 45 % of its nominal rate."""
    cells = []
    for gigabytes in CARDS:
        tried = ((stored, plan(name, stored, gigabytes)) for stored in ("bf16", "int8", "nf4"))
        stored, found = next(((s, p) for s, p in tried if p), ("", None))
        cells.append("放不下")
        if found:
            note = f"，重算 {found.recomputed} 层" if found.recomputed else ""
            cells[-1] = f"{stored} {found.bytes / 2**30:.1f} GB{note}"
    with torch.device("meta"):
        weights = sum(p.numel() for p in M.LLaMA(SHAPES[name]).parameters())
    operations = 4 + 2 * found.recomputed / SHAPES[name].num_hidden_layers
    hours = [operations * weights * TOKENS / (0.45 * rate) / 3600 for rate in RATES]
    return [name, *cells, *(f"{h:.1f} 小时" for h in hours)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "LLaMA-7B")) for n in SHAPES],
)
def test_the_table_of_memory_is_the_estimate(name):
    rows = table("显存与时间")
    assert [row[0] for row in rows] == [*SHAPES]
    assert memory_row(name) in rows


if __name__ == "__main__":
    for each in SHAPES:
        print("|", " | ".join(memory_row(each)), "|", flush=True)
