"""tests/evaluate.py --instruct_dir: several models, the questions of BenTsao's README, and a table
that says what they said."""

import csv
import io
import json
import random
import re
import subprocess
import sys
import time

import generate as G
import lora as L
import model as M
import train as T

import evaluate as E
import pytest
import report as R
import torch
from conftest import ROOT, plain_prompt

SEED = [  # three questions in the form of BenTsao's infer.json
    {
        "instruction": "小张最近出现了反酸、肚子痛的症状，可能患有什么疾病？需要做哪些检查？",
        "input": "",
        "output": "",
    },
    {
        "instruction": "一位年轻女性出现了宫缩和剧痛，可能的原因是什么？|<b>\r\n<img src=x>\\|\r",
        "input": "",
        "output": "",
    },
    {
        "instruction": "可卡因中毒后会有哪些表现？",
        "input": "一名28岁男性。\n急诊。",
        "output": "x",
    },
]


def make_adapter(base, folder, seed):
    model, _ = G.load_base(base, "cpu", torch.float32)
    torch.manual_seed(seed)  # of A
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    for i, (_, module) in enumerate(L.lora_linears(model)):
        module.lora_b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed + i))
    info = {"config": {"prompt_template_name": "alpaca"}} if seed else {}
    L.save_adapter(model, folder, run_info=info)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two on one base: one with the default template, and one with its own."""
    at = tmp_path_factory.mktemp("adapters")
    a, b = make_adapter(base, at / "a", 0), make_adapter(base, at / "b", 50)
    (a / "run.json").write_text('{"config": null}')
    return a, b


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "infer.json"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in SEED]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def alone(base, folder, template, row, max_new_tokens=8, **decoding):
    """One model's answer with no other model near it."""
    model, tokenizer = G.load_base(base, "cpu", torch.float32)
    if folder:
        L.load_adapter(model, folder)
    prompt = plain_prompt(G.load_template(template), row["instruction"], row["input"])
    ids = tokenizer.encode(prompt, bos=True)
    made = G.generate_ids(model, ids, max_new_tokens, tokenizer.eos_id, **decoding)
    return G.visible(tokenizer.decode(list(made)))


def read_table(folder):
    """(head, rows) of compare.csv."""
    text = (folder / "compare.csv").read_bytes().decode("utf-8-sig")
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    return head, rows


def test_table_of_three_models(base, adapters, questions, tmp_path):
    """Each answers with its own template and no trace of the one before; the three forms hold the
    same table, whatever stands in a text."""
    a, b = adapters
    table = tmp_path / "table"

    command = [sys.executable, ROOT / "tests/evaluate.py"]
    command += [f"base={base}", f"alpaca={base}+{b}", f"tuned={base}+{a}"]
    command += ["--instruct_dir", questions, "--output_dir", table]
    command += ["--max_new_tokens", "8", "--dtype", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    head, rows = read_table(table)
    assert head == ["问题", "参考", "base", "alpaca", "tuned"] and len(rows) == 3
    for row, asked in zip(rows, SEED):
        models = [(None, "med_template"), (b, "alpaca"), (a, "med_template")]
        assert row[1:] == [asked["output"], *(alone(base, *model, asked) for model in models)]
    assert len({tuple(row[2:]) for row in rows}) == 3 and rows[0][2] != rows[0][4]
    assert [row[0] for row in rows[:2]] == [row["instruction"] for row in SEED[:2]]
    assert rows[2][0] == f"{SEED[2]['instruction']}\n{SEED[2]['input']}"
    # Markdown: five lines, each of five cells.
    markdown = (table / "compare.md").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(markdown) == 5
    assert all(re.sub(r"\\.", "", line).count("|") == 6 for line in markdown)
    assert "\r" not in "".join(markdown) and not re.search(r"<(?!br>)", "".join(markdown))
    # HTML: nothing of a text is a tag.
    page = (table / "compare.html").read_text(encoding="utf-8")
    assert "<b>" not in page and page.count("<tr>") == 4 and "<mark>" in page


def test_refusals_are_one_line(base, questions, tmp_path, monkeypatch, capsys):
    """Exit code 2 for specs that are none, and for a folder whose answers are of other weights."""

    def call(*arguments):
        command = ["evaluate.py", *arguments, "--instruct_dir", str(questions)]
        command += ["--output_dir", str(tmp_path), "--max_new_tokens", "8", "--dtype", "fp32"]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        M.run(E.main)

    call(f"base={base}")
    for arguments, word in (
        ([f"base={base}", "--base_dtype", "int8"], "something else"),
        ([f"base={base}", "--load_8bit"], "something else"),
        ([f"base={base}", "--base_dtype", "bf16"], "something else"),
        ([f"base={base}", "--seed", "1", "--temperature", "1"], "something else"),
        (["base"], "NAME=BASE"),
        ([f"x={base}", f"x={base}"], "once"),
        ([f"x={base}+{tmp_path}"], "adapter_config"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(*arguments)
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and word in told, told
        assert told.count("\n") == 1


@pytest.mark.parametrize(
    "decoding",
    [
        {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.5},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5},
    ],
    ids=" ".join,
)
def test_decoding_options_are_honoured(base, adapters, questions, tmp_path, monkeypatch, decoding):
    """The answers are those of generate.py's own decoding, in bytes that a second run repeats; a
    run that was stopped goes on."""
    command = ["evaluate.py", f"base={base}", f"tuned={base}+{adapters[0]}", "--dtype", "fp32"]
    command += ["--instruct_dir", str(questions), "--output_dir", str(tmp_path)]
    command += ["--batch_size", "2", "--max_new_tokens", "8", "--prompt_template", "bare"]
    for name, value in decoding.items():
        command += [f"--{name}", str(value)]
    monkeypatch.setattr(sys, "argv", command)
    E.main()
    _, rows = read_table(tmp_path)
    for row, asked in zip(rows, SEED):
        wanted = [alone(base, folder, "bare", asked, **decoding) for folder in (None, adapters[0])]
        assert row[2:] == wanted
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 5
    for path in tmp_path.glob("compare.*"):
        path.unlink()
    (tmp_path / "answers-base.jsonl").write_bytes(files[tmp_path / "answers-base.jsonl"][:-20])
    E.main()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_stop_texts_and_length(base, questions, tmp_path, monkeypatch):
    """256 new tokens unless said otherwise, as generate.py has it; a stop text ends an answer."""
    command = ["evaluate.py", f"base={base}", "--dtype", "fp32"]
    command += ["--instruct_dir", str(questions)]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / "long")])
    E.main()
    _, rows = read_table(tmp_path / "long")
    texts = [row[2] for row in rows]
    assert texts == [alone(base, None, "med_template", asked, 256) for asked in SEED]
    stop = max(texts[0], key=texts[0].index)  # the character that comes up last
    command += ["--output_dir", str(tmp_path / "short"), "--stop", stop]
    monkeypatch.setattr(sys, "argv", command)
    E.main()
    _, rows = read_table(tmp_path / "short")
    assert [row[2] for row in rows] == [text.partition(stop)[0] for text in texts]


def test_options_of_the_report_are_none_of_the_table(base, questions, tmp_path, monkeypatch):
    command = ["evaluate.py", f"x={base}", "--instruct_dir", str(questions)]
    command += ["--output_dir", str(tmp_path / "out")]
    for more, word in (
        (["--data_path", str(questions)], "data_path"),
        (["--choices"], "choices"),
        (["--statements="], "statements"),
        (["--resamples", "50"], "resamples"),
        (["--n", "2"], "n is 2"),
        (["--num_beams", "2", "--temperature", "1"], "num_beams with temperature"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(ValueError, match=word):
            E.main()
    assert not (tmp_path / "out").exists()


def marked(first, said):
    return R.marked(said, R.new_characters(first, said))


def test_marks_are_what_the_first_has_not_and_take_no_minutes():
    assert marked("黄芪补气<b>", "黄芪<b>不补气") == "黄芪&lt;b&gt;<mark>不补气</mark>"
    assert marked("黄芪补气", "黄芪<b>不补气") == "黄芪<mark>&lt;b&gt;不</mark>补气"
    assert marked("a", "a") == "a"
    assert marked("补气", "补血&气") == "补<mark>血&amp;</mark>气" and marked("<", "<") == "&lt;"
    started = time.monotonic()  # answers that loop, as a base's do
    for first, text in (
        ("的药" * 1000, "药物的" * 700),
        ("的" * 2000, "的" * 1000 + "药" + "的" * 1000),
        ("的" * 2000, "的" * 2000),
    ):
        assert re.sub("</?mark>", "", marked(first, text)) == text
    assert time.monotonic() - started < 10


def test_what_is_not_marked_stands_in_the_first():
    """Of random texts: without marks the text is whole, and what is not marked is a part of the
    first answer, in order."""
    rng = random.Random(0)
    for _ in range(300):
        first, text = ("".join(rng.choices("甲乙丙丁", k=rng.randrange(9))) for _ in range(2))
        page = marked(first, text)
        assert re.sub("</?mark>", "", page) == text
        characters = iter(first)
        assert all(c in characters for c in re.sub("<mark>.*?</mark>", "", page))


def test_right_wrong_and_missing_values_are_marked():
    """By hand, and on random texts: what is marked are the values that `terms_in` finds."""
    judged = R.Judged(["当归", "甘草"], ["大黄"], ["麻黄<"])
    cell = R.answer_cell("有甘草、大黄和当归", "", judged)
    assert cell == (
        '有<mark class="right">甘草</mark>、<mark class="wrong">大黄</mark>和'
        '<mark class="right">当归</mark><span class="missing">缺 麻黄&lt;</span>'
    )
    # The entity's name holds a value, and names none.
    judged = R.Judged(["心肌"], [], [], ["病毒性心肌炎"])
    cell = R.answer_cell("病毒性心肌炎的发病部位是心肌。", "", judged)
    assert cell == '病毒性心肌炎的发病部位是<mark class="right">心肌</mark>。'
    rng = random.Random(1)
    for _ in range(300):
        said = "".join(rng.choices("甲乙丙", k=rng.randrange(12)))
        values = list({"".join(rng.choices("甲乙丙", k=rng.randrange(1, 4))) for _ in range(6)})
        right, wrong = values[:3], values[3:]
        kinds = R.value_characters(R.Judged(right, wrong, []), said)
        found = T.terms_in(said, values)
        assert any(kinds) == bool(found)
        for value in found:  # a value that begins inside it may take over its end
            at = [kinds[i] for i in range(len(said)) if said.startswith(value, i)]
            assert ("right" if value in right else "wrong") in at


def test_only_wrong_rows_can_be_shown():
    """A row errs if a model other than the first names a wrong value or leaves one out."""
    fine, errs = R.Judged(["甲"], [], []), R.Judged([], ["乙"], ["甲"])
    rows = [("问一", "", ["乙", "甲"], [errs, fine]), ("问二", "参", ["甲", "乙"], [fine, errs])]
    page = R.compare_page(["base", "tuned"], rows)
    assert page.count("<tr class=errs>") == 1
    assert page.index("问一") < page.index("<tr class=errs>") < page.index("问二")
    assert "only-wrong" in page.split("</style>")[1] and "(1 / 2)" in page
    assert 'data-column="tuned"' in page and '<span class="reference">参</span>' in page
    # Without values nothing is judged, and there is nothing to filter.
    page = R.compare_page(["base"], [("问", "", ["甲"], [None])]).split("</style>")[1]
    assert "only-wrong" not in page and "参考" not in page.split("<table")[1]


def test_a_formula_is_a_text_in_a_spreadsheet():
    live = ["=HYPERLINK(A1)", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1"]
    plain = ["a=1", "", "补气-升阳"]
    text = R.csv_table(live, [plain + ["x"] * 3]).removeprefix("\ufeff")
    assert [*csv.reader(io.StringIO(text, newline=""))] == [
        [f"'{said}" for said in live],
        plain + ["x"] * 3,
    ]
