"""What README, imports and options promise; how the code is laid out and how large it may be."""

import ast
import dataclasses
import importlib
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

SCRIPTS = ("model", "lora", "generate", "train", "build_data")
PACKAGES = {"torch", "sentencepiece", "numpy", "safetensors", "openai", "tqdm"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# --------------------------------------------------------------------------------------------------
# Imports and options


def imports(name, top_level=False):
    """The packages that a script imports, anywhere or at its top."""
    found = set()
    for node in TREES[name].body if top_level else ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_arrows_point_left():
    for i, name in enumerate(SCRIPTS[:4]):
        assert imports(name) & set(SCRIPTS) <= set(SCRIPTS[:i])
    assert imports("build_data") & set(SCRIPTS) <= {"model", "lora", "generate"}
    assert not any("build_data" in imports(name) for name in SCRIPTS[:4])


def test_only_the_cards_packages():
    ours = sys.stdlib_module_names | set(SCRIPTS)
    for name in SCRIPTS:
        assert imports(name, True) - ours <= PACKAGES
        assert imports(name) - ours <= PACKAGES | {"wandb"}


def test_every_setting_is_read():
    import train

    read = {n.attr for n in ast.walk(TREES["train"]) if isinstance(n, ast.Attribute)}
    read |= set(re.findall(r'"(\w+)"', SOURCES["train"]))
    assert {f.name for f in dataclasses.fields(train.TrainConfig)} <= read


# --------------------------------------------------------------------------------------------------
# README


def test_names_in_the_readme_exist():
    """The table of equations: file:function and tests/file:test."""
    names = re.findall(r"`(tests/)?(\w+)\.py:([\w.]+)`", README)
    assert len(names) >= 16
    for _, file, name in names:
        target = importlib.import_module(file)
        for part in name.split("."):
            target = getattr(target, part)


def test_readme_commands_use_real_options():
    for script, line in re.findall(r"^python (\w+)\.py (.*)$", README, re.M):
        for option in re.findall(r"--(\w+)", line):
            assert re.search(rf"\b{option}\b", SOURCES[script]), (script, line, option)


def definition(file, name):
    """The class or function of this (dotted) name in a script; None if there is none."""
    node = TREES[file]
    for part in name.split("."):
        own = [n for n in node.body if isinstance(n, (ast.ClassDef, *FUNCTIONS)) and n.name == part]
        if not own:
            return None
        node = own[0]
    return node


def reading_path():
    """[(script, name), ...] of the list in README's section on how to read the code."""
    _, _, section = README.partition("\n## How to read the code\n")
    section = section.partition("\n## ")[0]
    items = re.findall(r"^\s*(?:[-*]|\d+\.) .*$", section, re.M)
    return [found for item in items for found in re.findall(r"`(\w+)\.py:([\w.]+)`", item)]


def test_the_way_from_a_record_to_a_saved_adapter_is_short():
    """README names its definitions in the order of reading: in each file from top to bottom."""
    path = reading_path()
    assert path, "README.md has no list of `file.py:Name` under '## How to read the code'"
    assert len(path) <= 35 and len(set(path)) == len(path)
    nodes = [definition(*step) for step in path]
    assert None not in nodes, f"not found: {[p for p, node in zip(path, nodes) if node is None]}"
    lines = {}
    for (file, _), node in zip(path, nodes):
        lines.setdefault(file, []).append((node.lineno, node.end_lineno))
    for file, spans in lines.items():
        # a class and a method of it would count twice
        assert all(b[0] > a[1] for a, b in zip(spans, spans[1:])), f"{file}.py: {spans}"
    assert sum(end - start + 1 for spans in lines.values() for start, end in spans) <= 600


def test_the_lessons_can_be_read_at_one_sitting():
    """A script's lesson follows its docstring and imports. It begins at the first rule of dashes,
    which begin its sections, and ends at the first rule of equals signs."""
    lessons = {}
    for name, source in SOURCES.items():
        lines = source.split("\n")
        first, last = (
            next((i for i, line in enumerate(lines) if line.startswith(rule)), None)
            for rule in ("# -----", "# =====")
        )
        assert first is not None and last is not None, f"{name}.py has no rule around its lesson"
        assert not any(
            isinstance(node, FUNCTIONS) and node.lineno < first for node in TREES[name].body
        )
        lessons[name] = last - first
    assert sum(lessons.values()) <= 1100, lessons


# --------------------------------------------------------------------------------------------------
# Layout and size


@pytest.mark.parametrize("command", [("format", "--check"), ("check",)], ids=" ".join)
def test_ruff(command):
    """Layout and lint as .ruff.toml has them; `ruff format .` mends the first."""
    run = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


# Size is counted in tokens, which no layout hides: those of Python without comments, docstrings and
# line ends. The five scripts together may have 36,000.
TOKENS = {"model": 6000, "lora": 3200, "generate": 8600, "train": 8000, "build_data": 10000}
SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
# Scripts that do not hold the limits yet; none is to be added, and those that do come off.
KNOWN = {"model", "lora", "generate", "build_data"}


def docstring_lines(tree):
    """The numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
        if documented and ast.get_docstring(node, clean=False):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def complexity(function):
    """Cyclomatic: 1 + ifs, loops, excepts, asserts, cases, boolean operators, ternaries and
    comprehensions with their conditions, without the functions defined inside."""
    count, todo = 1, list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            continue
        branches = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While)
        if isinstance(node, (*branches, ast.ExceptHandler, ast.Assert, ast.match_case)):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        todo.extend(ast.iter_child_nodes(node))
    return count


@dataclasses.dataclass
class Measures:
    """Sums over a script: tokens and lines of code, filled and comment-only lines; its functions as
    {name: (complexity, lines)}; the numbers of its wide lines."""

    tokens: int
    code: int
    filled: int
    comments: int
    functions: dict
    wide: list


def measure(name):
    tree, text = TREES[name], SOURCES[name]
    lines, documented = text.split("\n"), docstring_lines(tree)
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SKIPPED and token.start[0] not in documented
    ]
    filled = [line for line in lines if line.strip()]
    comments = sum(line.lstrip().startswith("#") for line in filled)
    functions = {
        f"{node.name} (line {node.lineno})": (complexity(node), node.end_lineno - node.lineno + 1)
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    }
    return Measures(
        tokens=len(tokens),
        code=len(filled) - comments - sum(1 for n in documented if lines[n - 1].strip()),
        filled=len(filled),
        comments=comments,
        functions=functions,
        wide=[number for number, line in enumerate(lines, 1) if len(line) > 100],
    )


def faults(name):
    """What a script has beyond the limits of one script, one line each."""
    m = measure(name)
    found = [f"line {number} has more than 100 columns" for number in m.wide]
    for function, (branches, lines) in m.functions.items():
        if branches > 15:
            found.append(f"{function} has complexity {branches}, more than 15")
        if lines > 60:
            found.append(f"{function} has {lines} lines, more than 60")
    if m.tokens > TOKENS[name]:
        found.append(f"{m.tokens:,} tokens, more than {TOKENS[name]:,}")
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_holds_its_limits(name):
    found = faults(name)
    if name in KNOWN:
        assert found, f"{name}.py holds its limits now: take it off KNOWN"
    else:
        assert not found, f"{name}.py: " + "; ".join(found)


@pytest.mark.xfail(strict=True, reason="3,400 tokens are to go: bases, tokenizers and templates")
def test_the_scripts_together_have_41000_tokens():
    assert sum(measure(name).tokens for name in SCRIPTS) <= 41_000


def test_the_scripts_together_are_small_and_plain():
    """The means are those of code that people read with pleasure: nanoGPT, nanochat, gpt-fast."""
    measures = [measure(name) for name in SCRIPTS]
    tokens, code, filled, comments = (
        sum(getattr(m, field) for m in measures)
        for field in ("tokens", "code", "filled", "comments")
    )
    branches = [own for m in measures for own, _ in m.functions.values()]
    figures = {
        "tokens a line of code": (tokens / code, 10.0),
        "mean complexity": (sum(branches) / len(branches), 4.5),
        "lines of code to one of comment": (filled / comments, 1 / 0.06),
    }
    over = {name: f"{value:.2f}" for name, (value, most) in figures.items() if value > most}
    assert not over, over
