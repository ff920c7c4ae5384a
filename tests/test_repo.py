"""What README, imports and options promise."""
import ast
import dataclasses
import importlib
import re

from conftest import ROOT

SCRIPTS = ("model", "lora", "generate", "train", "build_data")
PACKAGES = {"torch", "sentencepiece", "numpy", "safetensors", "openai", "tqdm"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def imports(name, top_level=False):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    return {m.split(".")[0] for n in nodes for m in ([a.name for a in n.names] if isinstance(n, ast.Import)
                                                    else [n.module] if isinstance(n, ast.ImportFrom) else [])}


def test_arrows_point_left():
    for i, name in enumerate(SCRIPTS[:4]):
        assert imports(name) & set(SCRIPTS) <= set(SCRIPTS[:i])
    assert imports("build_data") & set(SCRIPTS) <= {"model", "lora", "generate"}
    assert not any("build_data" in imports(name) for name in SCRIPTS[:4])


def test_only_the_cards_packages():
    import sys
    for name in SCRIPTS:
        assert imports(name, True) - sys.stdlib_module_names - set(SCRIPTS) <= PACKAGES
        assert imports(name) - sys.stdlib_module_names - set(SCRIPTS) <= PACKAGES | {"wandb"}


def test_every_setting_is_read():
    import train
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    read = {n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)} | set(re.findall(r'"(\w+)"', source))
    assert {f.name for f in dataclasses.fields(train.TrainConfig)} <= read


def test_names_in_the_readme_exist():
    """The table of equations: file:function and tests/file:test."""
    names = re.findall(r"`(tests/)?(\w+)\.py:([\w.]+)`", README)
    assert len(names) >= 16
    for tests, file, name in names:
        target = importlib.import_module(file)
        for part in name.split("."):
            target = getattr(target, part)


def test_readme_commands_use_real_options():
    for line in re.findall(r"^python (\w+)\.py (.*)$", README, re.M):
        source = (ROOT / f"{line[0]}.py").read_text(encoding="utf-8")
        for option in re.findall(r"--(\w+)", line[1]):
            assert re.search(rf"\b{option}\b", source), (line, option)
