"""As users meet it: an adapter on its own base, files as people have them, hubs' caches, the
command line, the chat's commands, a build that says what happened, and the first mistakes."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_data as D
import generate as G
import lora as L
import model as M
import train as T

import pytest
import torch
from conftest import RECORDS, ROOT, make_config, run_command
from fake_openai import Scripted
from mistakes import MISTAKES, folder_of_files, make

QUESTION = ("--max_new_tokens", 2, "--dtype", "fp32", "黄芪有什么功效？")


# --------------------------------------------------------------------------------------------------
# An adapter and its base


def make_adapter(base, folder, noted=None, hashes=True, **more):
    """An adapter of a base, with the run.json that training would write."""
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(r=2))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    info = {"sha256": {"base": [M.file_hash(f) for f in M.weight_files(base)]}} if hashes else {}
    L.save_adapter(model, folder, noted or base, {**info, **more})
    return folder


@pytest.fixture(scope="module")
def bases(base, tmp_path_factory):
    """A base, a copy of it, and another of the same shape."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("own", "copy", "other"):
        shutil.copytree(base, folder / name)
    model = M.load_model(base)
    model.lm_head.weight.data *= 2
    M.save_model(model, folder / "other", base)
    return folder


@pytest.mark.parametrize("made", [{"sha256": "x"}, {"sha256": {"base": 3}}, {"made_in": [1]}])
def test_the_run_json_of_another_project_is_no_traceback(bases, tmp_path, capsys, made):
    """Parts of other kinds say nothing; a hash that is none is not the base's."""
    adapter = make_adapter(bases / "own", tmp_path / "adapter")
    (adapter / "run.json").write_text(json.dumps(made))
    other = isinstance(made.get("sha256"), dict)
    ended = run_command(G.main, "--lora_weights", adapter, *QUESTION)
    assert ended == (2 if other else 0)
    assert not other or "another base" in capsys.readouterr().err


def test_an_adapter_finds_its_base_and_refuses_another(bases, tmp_path, capsys):
    """Another base of the same shape, which would answer nonsense, is known by the hash of its
    weights; a copy under another name is not another."""
    adapter = ("--lora_weights", make_adapter(bases / "own", tmp_path / "adapter"))
    assert run_command(G.main, *adapter, *QUESTION) == 0
    assert run_command(G.main, *adapter, "--base_model", bases / "copy", *QUESTION) == 0
    capsys.readouterr()

    other = ("--base_model", bases / "other")
    assert run_command(G.main, *adapter, *other, *QUESTION) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert f"{bases}/own" in said and f"{bases}/other" in said and "--anyway" in said
    assert run_command(G.main, *adapter, *other, "--anyway", *QUESTION) == 0
    warned = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: adapter")]
    assert len(warned) == 1 and f"{bases}/own" in warned[0] and f"{bases}/other" in warned[0]

    merge = ("merge", *adapter, "--output_dir", tmp_path / "merged")
    assert run_command(L.main, *merge, *other) == 2 and not (tmp_path / "merged").exists()
    assert run_command(L.main, *merge) == 0  # the base that it names
    assert (tmp_path / "merged/config.json").is_file()


def test_a_base_that_changed_under_its_name_is_noticed(bases, tmp_path, capsys):
    shutil.copytree(bases / "own", tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    shutil.copy(bases / "other/model.safetensors", tmp_path / "base")
    assert run_command(G.main, "--lora_weights", adapter, *QUESTION) == 2
    assert "another base" in capsys.readouterr().err


def test_an_adapter_moves_to_another_machine(tmp_path, capsys, monkeypatch):
    """The folder in which the project lay there is not here; the base is, by name and hash. So is
    the template, which was a file there."""
    template = {"prompt_no_input": "甲{instruction}乙", "prompt_input": "{instruction}{input}"}
    there = "/nowhere/project/data/tiny"
    made_in = {"template": template}
    config = {"base_model": there, "prompt_template_name": "/nowhere/mine.json"}
    adapter = make_adapter(
        ROOT / "data/tiny", tmp_path / "a", there, made_in=made_in, config=config
    )
    asked = []
    monkeypatch.setattr(G, "print_answers", lambda m, tokenizer, _, ids: asked.append(ids) or [])
    assert run_command(G.main, "--lora_weights", adapter, *QUESTION) == 0
    text = G.load_tokenizer(ROOT / "data/tiny").decode(asked[0])
    assert text.strip() == "甲黄芪有什么功效？乙"
    assert "warning" not in capsys.readouterr().err
    # Of another base there is none of that hash here.
    M.write_json(tmp_path / "a/run.json", {"sha256": {"base": ["0" * 64]}})
    assert run_command(G.main, "--lora_weights", adapter, *QUESTION) == 2
    assert there in capsys.readouterr().err


@pytest.mark.parametrize(
    "noted, code", [("owner/own", 0), ("owner/other", 2), ("own", 0), ("own-7b-hf", 2)]
)
def test_a_foreign_adapter_tells_its_base_by_name(bases, tmp_path, noted, code, capsys):
    adapter = make_adapter(bases / "own", tmp_path / "a", noted, hashes=False)
    options = ("--lora_weights", adapter, "--base_model", bases / "own")
    assert run_command(G.main, *options, *QUESTION) == code
    assert (f"{noted}," in capsys.readouterr().err) == (code == 2)


def test_a_template_other_than_the_adapters_is_said(bases, tmp_path, capsys):
    made_in = {"template": G.load_template("alpaca")}
    adapter = make_adapter(bases / "own", tmp_path / "a", made_in=made_in)
    for name, warned in (("alpaca", False), ("bare", True)):
        options = ("--lora_weights", adapter, "--prompt_template", name)
        assert run_command(G.main, *options, *QUESTION) == 0
        assert ("another template than bare" in capsys.readouterr().err) == warned


# --------------------------------------------------------------------------------------------------
# Hubs' caches


@pytest.mark.parametrize(
    "place",
    [
        "hf/models--Qwen--Qwen2.5-7B/snapshots/main",
        "scope/hub/models/Qwen/Qwen2___5-7B",
        "scope/hub/Qwen/Qwen2___5-7B",
        "scope/models/Qwen/Qwen2___5-7B",
        "scope/models/Qwen--Qwen2.5-7B/snapshots/master",
        "scope/Qwen/Qwen2___5-7B",
    ],
)
def test_a_name_is_found_in_the_caches(tmp_path, monkeypatch, place):
    """The layouts of huggingface_hub, and of modelscope 1.9 to 1.40 (its
    hub/utils/utils.py:find_reusable_legacy_repo_dir lists them)."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
    with pytest.raises(ValueError) as caught:
        M.find_base("Qwen/Qwen2.5-7B")
    for told in ("hf download Qwen/Qwen2.5-7B", "modelscope download --model Qwen/Qwen2.5-7B"):
        assert told in str(caught.value)
    (tmp_path / place).mkdir(parents=True)
    assert M.find_base("Qwen/Qwen2.5-7B") == tmp_path / place


def test_an_adapter_by_its_name_on_a_hub(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    make_adapter(bases / "own", tmp_path / "models/someone/lora-med")
    assert run_command(G.main, "--lora_weights", "someone/lora-med", *QUESTION) == 0
    merge = ("merge", "--lora_weights", "someone/lora-med", "--output_dir", tmp_path / "merged")
    assert run_command(L.main, *merge) == 0


# --------------------------------------------------------------------------------------------------
# Their files

FILES = {
    "excel.csv": "\ufeffquestion,answer\r\n黄芪有什么功效？,补气升阳\r\n",
    "chinese.csv": "问题,答案\n黄芪有什么功效？,补气升阳\n",
    "tabs.tsv": "query\tresponse\n黄芪有什么功效？\t补气升阳\n",
    "quoted.csv": 'id,instruction,output\n7,"黄芪有什么功效？","补气升阳"\n',
    "dialogue.csv": "department,title,ask,answer\n内科,黄芪,黄芪有什么功效？,补气升阳\n",
    "qa.json": [{"question": "黄芪有什么功效？", "answer": "补气升阳"}],
    "swift.jsonl": [{"query": "黄芪有什么功效？", "response": "补气升阳"}],
    "openai.jsonl": [{"prompt": "黄芪有什么功效？", "completion": "补气升阳"}],
    "chinese.json": [{"问题": "黄芪有什么功效？", "答案": "补气升阳"}],
    "huatuo.jsonl": [{"questions": ["黄芪有什么功效？", "黄芪治什么？"], "answers": ["补气升阳"]}],
    "huatuo_encyclopedia.jsonl": [{"questions": [["黄芪有什么功效？"]], "answers": ["补气升阳"]}],
    "data.json": {"version": 1, "data": [{"input": "黄芪有什么功效？", "output": "补气升阳"}]},
}


def write(path, content):
    if not isinstance(content, str | bytes):
        is_lines = path.suffix == ".jsonl"
        rows = content if is_lines else [content]
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_files_as_people_have_them_are_the_same_record(tmp_path, name):
    """What training and asking read of a file in any form is what they read of alpaca's."""
    [record] = G.read_instructions(write(tmp_path / name, FILES[name]), answers=True)
    assert G.conversation(record) == (
        [
            {"role": "user", "content": "黄芪有什么功效？"},
            {"role": "assistant", "content": "补气升阳"},
        ],
        False,
    )
    assert (record["instruction"], record["output"]) == ("黄芪有什么功效？", "补气升阳")


def test_cells_with_commas_lines_and_quotes(tmp_path):
    """As Python's csv writes them, which is as Excel does."""
    import csv

    texts = ['补气，"升阳",', "一\n二\n三", "a\tb", "plain"]
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["question", "answer"], *(["问", text] for text in texts)])
    records = G.read_instructions(tmp_path / "a.csv", answers=True)
    assert [record["output"] for record in records] == texts


def test_context_is_an_input_and_our_own_keys_come_first(tmp_path):
    rows = [
        {"question": "问", "context": "背景", "answer": "答"},
        {"instruction": "问", "input": "背景", "output": "答", "question": "x", "answer": "y"},
    ]
    for record in G.read_instructions(write(tmp_path / "a.json", rows), answers=True):
        assert (record["instruction"], record["input"], record["output"]) == ("问", "背景", "答")


def test_an_input_beside_messages_stays_one(tmp_path):
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    path = write(tmp_path / "a.json", [{"messages": messages, "input": "背景"}])
    [record] = G.read_instructions(path, answers=True)
    assert (record["instruction"], record["input"]) == ("问", "背景")


@pytest.mark.parametrize(
    "name, content",
    [("q.txt", "甲？\n\n乙？\n"), ("q", "甲？\n乙？"), ("q.json", ["甲？", "乙？"])],
)
def test_questions_as_texts(tmp_path, name, content):
    records = G.read_instructions(write(tmp_path / name, content))
    assert [record["instruction"] for record in records] == ["甲？", "乙？"]


@pytest.mark.parametrize(
    "name, content, place, cause",
    [
        ("a.csv", "标题,内容\n黄芪,补气\n", "line 2", "标题, 内容"),
        ("a.json", [{"text": "黄芪"}], "record 1", "keys text"),
        ("a.csv", "question,answer\n甲,乙\n甲,乙,丙\n", "line 3", "comma"),
        ("a.csv", 'question,answer\n甲,"乙\n', "table", "end of data"),
        ("a.xlsx", b"PK\x03\x04\xff\xff", "a.xlsx", "Excel"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a.xls", "Excel"),
        ("a.csv", "问题,答案\n".encode("utf-16"), "a.csv", "UTF-16"),
        ("a.csv", "问题,答案\n".encode("gbk"), "a.csv", "GBK"),
        ("a.parquet", b"PAR1\x15\xff", "a.parquet", "Parquet"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, name, content, place, cause):
    with pytest.raises(ValueError) as caught:
        G.read_instructions(write(tmp_path / name, content))
    assert place in str(caught.value) and cause in str(caught.value)


def test_a_knowledge_base_as_a_table(tmp_path):
    """Triples with commas or tabs, with a header in their or our words or without."""
    triples = [("黄芪", "功效", "补气升阳"), ("黄芪", "归经", "肺经"), ("黄芪", "类型", "中药")]
    wanted = [{"中心词": "黄芪", "类型": "中药", "功效": ["补气升阳"], "归经": ["肺经"]}]
    for mark, name in ((",", "k.csv"), ("\t", "k.tsv"), ("\t", "k")):
        for header in ("", "head relation tail", "subject predicate object", "头实体 关系 尾实体"):
            rows = [header.split()] * bool(header) + triples
            write(tmp_path / name, "\n".join(map(mark.join, rows)))
            assert D.read_knowledge(tmp_path / name) == wanted, (name, header)
    rows = [dict(zip(("subject", "predicate", "object"), triple)) for triple in triples]
    assert D.read_knowledge(write(tmp_path / "k.jsonl", rows)) == wanted


@pytest.mark.parametrize("given, held_out", [({}, 4), ({"val_set_size": 30}, 30)])
def test_a_small_file_keeps_most_of_its_records(tmp_path, given, held_out, capsys):
    """The default of 500 validation records is meant for large files."""
    path = write(tmp_path / "a.json", [RECORDS[i % 8] | {"id": i} for i in range(40)])
    config = T.TrainConfig(base_model="x", data_path=(str(path),), **given)
    rows, validation = T.read_data(config)
    assert (len(rows), len(validation)) == (40 - held_out, held_out)
    assert ("validation: 4 records" in capsys.readouterr().out) == (not given)


# --------------------------------------------------------------------------------------------------
# The command line and the chat


def help_of(main, capsys, *argv):
    assert run_command(main, *argv, "--help") == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("main", [M.main, L.main, G.main, T.main, D.main])
def test_help_shows_examples_that_run(main, capsys):
    """Three at least, and each option in them is one of the script's; no path of this machine."""
    script = main.__module__
    text = help_of(main, capsys)
    examples = re.findall(rf"^  \S+ .*?{script}\.py ?(.*)$", text, re.M)
    assert len(examples) >= 3 and str(ROOT) not in text
    options = set(re.findall(r"--(\w+)", text.partition("options:")[2]))
    if script not in ("model", "build_data"):  # whose options are those of their commands
        assert {o for line in examples for o in re.findall(r"--(\w+)", line)} <= options | {
            "nproc_per_node"
        }


def run_script(script, *argv, flags=()):
    """A script in a process of its own, as a user starts it."""
    command = [sys.executable, *flags, f"{script}.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("main", [M.main, L.main, G.main, T.main, D.main])
def test_help_needs_no_torch(main, capsys, monkeypatch):
    """And says the same as with it."""
    monkeypatch.setenv("COLUMNS", "80")
    ended = run_script(main.__module__, "--help", flags=("-X", "importtime"))
    loaded = {line.split("|")[-1].split(".")[0].strip() for line in ended.stderr.splitlines()}
    assert "argparse" in loaded and "torch" not in loaded
    assert ended.returncode == 0 and ended.stdout == help_of(main, capsys)


@pytest.mark.parametrize("script", ["model", "lora", "generate", "train", "build_data"])
def test_missing_packages_are_one_line(script):
    ended = run_script(script, flags=("-S",))  # -S: Python sees no packages but its own
    [said] = ended.stderr.splitlines()
    assert ended.returncode == 2 and "torch" in said and "requirements.txt" in said


def test_help_has_groups_choices_and_both_defaults(capsys):
    text = help_of(T.main, capsys)
    for title in ("what is trained, and on what:", "speed and memory:", "the run:"):
        assert f"\n{title}\n" in text
    plain = " ".join(text.split())
    assert "{last,all}" in plain and "(default: q_proj v_proj; plain run: all)" in plain
    assert "(default: 128; plain run: 16)" in plain and "plain run: data/tiny)" in plain
    for settings in (T.TrainConfig, G.Options, D.Knowledge, D.Stats, L.Options):
        parser = M.Parser()
        parser.add_settings(settings)
        told = re.findall(r"^  --(\w+)", parser.format_help(), re.M)
        assert sorted(told) == sorted(settings.__dataclass_fields__)
    about_api = help_of(D.main, capsys, "knowledge")
    assert "\nwho is asked, and where the replies go:\n" in about_api


def test_a_missing_package_says_what_to_install(capsys):
    def main():
        import no_such_package_at_all  # noqa: F401

    assert run_command(main) == 2
    assert capsys.readouterr().err.endswith("pip install no_such_package_at_all\n")


def chat(lines, monkeypatch, capsys, multi=False):
    """What a chat asks, and what it says on stderr, given these lines."""
    asked, given = [], iter(lines)

    def answer(prompt):
        asked.append(prompt)
        yield "答"

    def read(mark):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    G.chat(answer, lambda messages: [messages[-1]["content"]], multi, 99, "base with adapter")
    return asked, capsys.readouterr().err.splitlines()


def test_the_commands_of_a_chat(tmp_path, monkeypatch, capsys):
    lines = ["/help", "/rest", "/remember me", "甲", f"/save {tmp_path / 'c.json'}", "/min 的单位"]
    asked, said = chat(lines, monkeypatch, capsys)
    assert asked == [["甲"]]
    assert sum(G.COMMANDS in line for line in said) == 5  # at the start, and four times since
    assert any("no /rest" in line for line in said) and any("no /min" in x for x in said)
    assert f"saved in {tmp_path / 'c.json'}" in said and (tmp_path / "c.json").is_file()
    for word in ("exit", "/quit", "退出"):
        assert chat(["甲", word, "乙"], monkeypatch, capsys)[0] == [["甲"]]
    # what is longer than a word, or is none of ours, is a question
    odd = ["exit 是什么意思？", "/min是什么单位？"]
    assert chat(odd, monkeypatch, capsys)[0] == [[line] for line in odd]


def test_a_chat_says_what_it_remembers(monkeypatch, capsys):
    alone, together = (chat([], monkeypatch, capsys, multi)[1] for multi in (False, True))
    assert "--single_or_multi multi" in alone[-1] and "turns before" in together[-1]


def test_what_answers_and_what_it_knows_stands_at_the_start(base, monkeypatch, capsys):
    """Of a chat, and of the server with its page: base, adapter, template, and what the shipped
    base has read, which are as many entities as the knowledge base has."""
    entities = (ROOT / "data/knowledge.jsonl").read_text(encoding="utf-8").count("\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # and no question
    shipped = ("--use_lora", "False", "--dtype", "fp32")
    assert run_command(G.main, *shipped) == 0
    one, two, *_ = said = capsys.readouterr().err.splitlines()
    assert "data/tiny with no adapter" in one and "BenTsao's knowledge template" in one
    assert f"on {entities} diseases" in two and G.DISCLAIMER in said
    served = []
    monkeypatch.setattr(G, "serve", lambda server: served.extend((server.socket, server.about)))
    assert run_command(G.main, *shipped, "--serve", "--port", 0) == 0
    served[0].close()
    assert served[1] == f"{one}\n{two}"
    # Of another base nothing is said.
    assert "\n" not in G.load(G.Options(base_model=str(base), dtype="fp32"), "")[3]


def test_training_says_what_to_do_next(base, records, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--data_path", records, "--val_set_size", 2, "--base_model", base)
    options += ("--max_steps", 1, "--num_answers", 0, "--output_dir", "mine")
    assert run_command(T.main, *options) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    [command] = re.findall(r"python generate\.py (--lora_weights \S+)", last)
    assert run_command(G.main, *command.split(), *QUESTION) == 0


# --------------------------------------------------------------------------------------------------
# build_data.py says what happened


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-4711")


def ask(url, out, *more, command="knowledge"):
    common = ("--model", "fake", "--base_url", url, "--output", out, "--concurrency", 3)
    return run_command(D.main, command, *common, *more)


def told(prompt, *_):
    """A record that states all the facts of its prompt."""
    text = "".join(re.findall(r"^- (.*)", prompt, re.M)).replace("：", "是")
    row = {"instruction": f"请说明{text[:12]}。", "input": "", "output": f"{text}。请遵医嘱。"}
    return json.dumps({"items": [row]}, ensure_ascii=False)


def test_a_dozen_equal_failures_end_a_run(tmp_path, capsys, key):
    """Replies that are paid for and no JSON: not 200 of them. None kept is no success."""
    with Scripted(lambda *_: "好的，这是您要的记录。") as server:
        assert ask(server.url, tmp_path / "x.jsonl", "--count", 200) == 2
        assert len(server.bodies) == 24  # each asked once more
    out, err = capsys.readouterr()
    assert "kept 0 of 12 records; rejected: {'no JSON': 12}" in out
    assert "nothing was kept" in err.splitlines()[-1]
    assert len((tmp_path / "x.rejected.jsonl").read_text().splitlines()) == 12


def test_a_dozen_refusals_end_a_run(tmp_path, capsys, key):
    refused = (400, {"error": {"message": "no such thing", "type": "invalid_request_error"}})
    with Scripted(lambda *_: refused) as server:
        assert ask(server.url, tmp_path / "x.jsonl", "--count", 100) == 2
        assert len(server.bodies) == 12


def test_counts_by_reason_end_a_run(tmp_path, capsys, key):
    """One of three replies is unusable, one says nothing: the run goes on, and the counts are
    told."""

    def reply(prompt, body, number):
        return (told(prompt), "{}", "抱歉，我无法回答")[number % 3]

    with Scripted(reply) as server:
        assert ask(server.url, tmp_path / "x.jsonl", "--count", 30) == 0
    kept = len((tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines())
    rejected = (tmp_path / "x.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = [json.loads(line)["reason"].split(":")[0] for line in rejected]
    [line] = re.findall(
        r"^kept (\d+) of (\d+) records; rejected: (.*)$", capsys.readouterr().out, re.M
    )
    assert (int(line[0]), int(line[1])) == (kept, kept + len(rejected)) and kept > 3
    assert json.loads(line[2].replace("'", '"')) == {r: reasons.count(r) for r in reasons}


def test_a_sample_is_looked_at_and_then_gone_on_from(tmp_path, capsys, key):
    with Scripted(told) as server:
        assert ask(server.url, tmp_path / "x.jsonl", "--count", 20, "--sample", 5) == 0
        assert len(server.bodies) == 5
        out = capsys.readouterr().out
        assert out.count('"instruction": ') == 5 and out.count('"output": ') == 5
        assert ask(server.url, tmp_path / "x.jsonl", "--count", 20) == 0
        assert len(server.bodies) == 20


def test_a_dry_run_needs_no_model_and_shows_each_form(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert run_command(D.main, "knowledge", "--dry_run", "--count", 200) == 0
    shown = re.findall(r"^--- .*/(\w+)/$", capsys.readouterr().out, re.M)
    forms = D.read_prompts(D.DATA / "prompts")
    assert sorted(shown) == sorted(name for name, form in forms.items() if form["weight"])
    assert run_command(D.main, "knowledge", "--count", 3) == 2


def test_a_reply_fits_into_the_context_of_the_endpoint(tmp_path, capsys, key):
    """Our own server refuses what with its answer exceeds 2,048 positions, as the default of 2,048
    tokens for a reply always does."""

    fitting = G.Batch(M.LLaMA(make_config()), 4, 2048, [2], None)

    def reply(prompt, body, number):
        size = body.get("max_completion_tokens")
        if size + 700 > 2048:
            with pytest.raises(G.Refused) as refused:
                fitting.submit(G.Request([1] * 700, G.Decoding(max_new_tokens=size)))
            return 400, refused.value.body
        return told(prompt)

    with Scripted(reply) as server:
        assert ask(server.url, tmp_path / "x.jsonl", "--count", 20) == 0
        sizes = [body["max_completion_tokens"] for body in server.bodies]
    assert set(sizes) == {2048, 1024} and sizes.count(1024) == 20 and sizes.count(2048) <= 3


# --------------------------------------------------------------------------------------------------
# The first mistakes


@pytest.fixture(scope="module")
def mistaken():
    streams = sys.stdout, sys.stderr
    with folder_of_files() as port:
        yield port
    sys.stdout, sys.stderr = streams


def test_there_are_sixty_mistakes():
    assert len({line for _, line, _ in MISTAKES}) == len(MISTAKES) >= 60


@pytest.mark.parametrize("line, cause", [pytest.param(m[1], m[2], id=m[0]) for m in MISTAKES])
def test_a_first_mistake_is_one_line(mistaken, line, cause):
    if "mps" in line and torch.backends.mps.is_available():
        pytest.skip("this machine has what the mistake lacks")
    code, said = make(line, mistaken)
    assert code == 2 and "Traceback" not in said
    *_, last = lines = said.strip().splitlines()
    assert sum("rror: " in line for line in lines) == 1 and last.startswith("error: ")
    assert cause in last
    assert not [p for p in Path().iterdir() if p.name in ("m", "o.jsonl", "lora-tcm")]
