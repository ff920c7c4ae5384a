"""generate.py --compare: several models on one base, the seed's questions, and a table that says what they said."""
import csv
import io
import json
import re
import subprocess
import sys
import time

import torch
from conftest import ROOT

import generate as G
import lora as L

SEED = [  # the three questions of BenTsao's README, in the form of its infer.json
    {"instruction": "小张最近出现了反酸、肚子痛的症状，可能患有什么疾病？需要做哪些检查？", "input": "", "output": ""},
    {"instruction": "一位年轻女性出现了宫缩和剧痛，可能的原因是什么？|<b>\r\n<img src=x>\\|\r", "input": "", "output": ""},
    {"instruction": "可卡因中毒后会有哪些表现？", "input": "一名28岁男性。\n急诊。", "output": "x"}]


def adapter(base, folder, seed):
    model, _ = G.load_base(base, "cpu", torch.float32)
    torch.manual_seed(seed)                                       # of A
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    for i, (_, module) in enumerate(L.lora_linears(model)):
        module.lora_b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed + i))
    L.save_adapter(model, folder, run_info={"config": {"prompt_template_name": "alpaca"}} if seed else {})
    return folder


def greedy(base, folder, template, row):
    """One model's answer with no other model near it."""
    model, tokenizer = G.load_base(base, "cpu", torch.float32)
    if folder:
        L.load_adapter(model, folder)
    return "".join(G.ask(model, tokenizer, G.render_prompt(G.load_template(template), row["instruction"], row["input"]), 8))


def test_table_of_three_models(base, tmp_path):
    a, b = adapter(base, tmp_path / "a", 0), adapter(base, tmp_path / "b", 50)
    (a / "run.json").write_text('{"config": null}')
    questions = tmp_path / "infer.json"
    questions.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in SEED), encoding="utf-8")

    def call(*models):
        return subprocess.run([sys.executable, ROOT / "generate.py", "--compare", *models, "--instruct_dir", questions, "--output",
                               tmp_path / "table", "--max_new_tokens", "8", "--dtype", "fp32"],
                              capture_output=True, text=True, timeout=240)
    done = call(f"base={base}", f"alpaca={base}+{b}", f"tuned={base}+{a}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "table/compare.csv").read_text(encoding="utf-8-sig")
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    assert head == ["问题", "base", "alpaca", "tuned"] and len(rows) == 3
    for row, asked in zip(rows, SEED):                            # each with its own template and no trace of the one before
        assert row[1:] == [greedy(base, None, "med_template", asked), greedy(base, b, "alpaca", asked),
                           greedy(base, a, "med_template", asked)]
    assert len({tuple(row[1:]) for row in rows}) == 3 and rows[0][1] != rows[0][3]
    markdown = (tmp_path / "table/compare.md").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(markdown) == 5 and all(re.sub(r"\\.", "", line).count("|") == 5 for line in markdown)
    assert "\r" not in "".join(markdown) and not re.search(r"<(?!br>)", "".join(markdown))
    page = (tmp_path / "table/compare.html").read_text(encoding="utf-8")
    assert "<b>" not in page and page.count("<tr>") == 4 and "<mark>" in page
    for more in (["--base_dtype", "int8"], ["--load_8bit"], ["--base_dtype", "bf16"]):          # its answers are not those of other weights
        bad = call(f"base={base}", *more)
        assert bad.returncode == 2 and "something else" in bad.stderr, bad.stderr
    for models, word in ((["base"], "NAME=BASE"), ([f"x={base}", f"x={base}"], "once"), ([f"x={base}+{tmp_path}"], "adapter_config")):
        bad = call(*models)
        assert bad.returncode == 2 and word in bad.stderr and bad.stderr.count("\n") == 1, bad.stderr


def test_marks_are_what_the_first_has_not_and_take_no_minutes():
    assert G.marked("黄芪补气<b>", "黄芪<b>不补气") == "黄芪<mark>&lt;b&gt;不</mark>补气" or G.marked("a", "a") == "a"
    assert G.marked("补气", "补血&气") == "补<mark>血&amp;</mark>气" and G.marked("<", "<") == "&lt;"
    started = time.monotonic()                                    # answers that loop, as a base's do
    for first, text in (("的药" * 1000, "药物的" * 700), ("的" * 2000, "的" * 1000 + "药" + "的" * 1000), ("的" * 2000, "的" * 2000)):
        assert re.sub("</?mark>", "", G.marked(first, text)) == text
    assert time.monotonic() - started < 10
