"""tests/evaluate.py: each metric against another implementation or a worked example; likelihoods
against transformers and NumPy; the whole report twice, byte for byte."""

import gc
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import generate as G
import lora as L
import model as M
import train as T

import evaluate as E
import numpy as np
import pytest
import torch
from conftest import ROOT, formula_weights, make_config
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from test_model import numpy_llama, to_transformers

# --------------------------------------------------------------------------------------------------
# Texts against references

PAIRS = [
    ("麻黄汤由麻黄、桂枝、苦杏仁、甘草组成。", "麻黄汤的组成有麻黄、桂枝、杏仁、甘草。"),
    ("补气升阳", "补气升阳"),
    ("清热", "温里散寒"),
    ("发汗 解表", "发汗解表，宣肺平喘，宣肺平喘"),
    ("a b c d e", "abcde"),
    ("黄芪", ""),
    ("癫痫发作", "癫"),
    ("头痛、眩晕、失眠", "失眠、头痛"),
]


class Characters:
    """rouge-score's tokenizer interface, over characters."""

    def tokenize(self, text):
        return E.characters(text)


def test_rouge_equals_rouge_score():
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=Characters())
    for reference, answer in PAIRS:
        theirs = scorer.score(reference, answer)
        theirs = [theirs[name].fmeasure for name in names]
        assert np.allclose(E.rouge(reference, answer), theirs, atol=1e-6)


@pytest.mark.parametrize("chosen", [range(8), (0,), (1, 2), (2,), (5,), (6, 7), (0, 3, 4)])
def test_bleu_equals_sacrebleu(chosen):
    references, answers = zip(*(PAIRS[i] for i in chosen))
    theirs = BLEU(tokenize="char").corpus_score(answers, [references]).score / 100
    ours = E.bleu(sum(E.bleu_counts(r, a) for r, a in zip(references, answers)))
    assert abs(ours - theirs) < 1e-6


def test_distinct_and_repetition_by_hand():
    assert E.distinct("咳嗽咳嗽", 2) == 2 / 3  # 咳嗽, 嗽咳, 咳嗽
    assert 1 - E.distinct("甲乙丙丁" * 3, 4) == pytest.approx(1 - 4 / 9)
    assert E.distinct("好", 2) == 1.0


def test_names_stand_outside_longer_ones():
    terms = {"四逆汤", "当归四逆汤", "当归", "甘草"}
    assert T.terms_in("当归四逆汤加甘草", terms) == {"当归四逆汤", "甘草"}
    assert T.terms_in("当归四逆汤、四逆汤", terms) == {"当归四逆汤", "四逆汤"}
    terms = {"发汗解表", "解表散寒", "解表"}
    assert T.terms_in("发汗解表散寒", terms) == {"发汗解表", "解表散寒"}
    assert T.terms_in("无", set()) == set()


def test_facts_recalled_and_contradicted_by_hand():
    kb = [
        {"中心词": "甲汤", "类型": "方剂", "组成": ["麻黄", "桂枝", "甘草"]},
        {"中心词": "乙汤", "类型": "方剂", "组成": ["大黄", "芒硝"]},
    ]
    record = {
        "entity": "甲汤",
        "kind": "方剂",
        "relations": ["组成"],
        "values": ["麻黄", "桂枝", "甘草"],
        "output": "x",
    }
    answer = {"answer": "甲汤有麻黄、甘草、大黄。", "finish_reason": "stop"}
    scores = E.score_answers([record], [answer], [3.0], kb)
    assert scores["facts recalled"].value() == pytest.approx(2 / 3)
    assert scores["facts contradicted"].value() == pytest.approx(1 / 3)
    assert scores["bits per character"].value() == 3.0
    assert scores["stopped"].value() == 1.0


def test_no_credit_for_a_value_inside_a_longer_one():
    """四逆汤 is not recalled by 当归四逆汤, nor 寒 by 微寒, nor 甘草 by the name 炙甘草汤; the
    share that train.py prints follows the same rule."""
    kb = [
        {"中心词": "病甲", "类型": "疾病", "常用方剂": ["四逆汤"]},
        {"中心词": "病乙", "类型": "疾病", "常用方剂": ["当归四逆汤"]},
        {"中心词": "炙甘草汤", "类型": "方剂", "组成": ["甘草"]},
    ]
    records = []
    for (_, name), (_, kind), (relation, values) in map(dict.items, kb):
        record = {"entity": name, "kind": kind, "relations": [relation], "values": values}
        records.append({**record, "output": "x"})
    for answers, shares in [
        (["常用方剂有当归四逆汤。"] * 2 + ["炙甘草汤的组成有人参。"], [0, 1, 0]),
        (["当归四逆汤、四逆汤"] * 2 + ["炙甘草汤的组成有甘草"], [1, 1, 1]),
    ]:
        rows = [{"answer": a, "finish_reason": "stop"} for a in answers]
        score = E.score_answers(records, rows, [1.0] * 3, kb)["facts recalled"]
        assert score.numerators.tolist() == shares
        assert score.denominators.tolist() == [1, 1, 1]
        assert T.facts_recalled(records, answers) == sum(shares) / 3
    tastes = [{"relations": ["性味"], "values": [v]} for v in ("寒", "微寒")]
    assert T.facts_recalled(tastes, ["苦、微寒。"] * 2) == 0.5
    assert T.facts_recalled([{}], ["x"]) is None
    held = G.read_instructions(ROOT / "data/heldout.jsonl")
    assert T.facts_recalled(held, [r["output"] for r in held]) == 1.0


# --------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_likelihoods_equal_transformers_and_numpy(n_kv_heads):
    """Four continuations of one prompt, of unequal length: to 1e-4 of transformers, 1e-5 of
    float64, and one by one."""
    model = formula_weights(M.LLaMA(make_config(n_kv_heads)))
    prompt, continuations = [1, 5, 80, 7], [[9, 8, 7], [4], [100, 200, 250, 3, 2], [9, 8]]
    ours = E.continuation_logprobs(model, prompt, continuations)
    hf = to_transformers(model)
    for got, c in zip(ours, continuations):
        ids, start = prompt + c, len(prompt) - 1
        with torch.no_grad():
            theirs = hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert abs(got - sum(theirs[start + i, t].item() for i, t in enumerate(c))) < 1e-4
        logits = numpy_llama(model.state_dict(), model.config, np.array(ids))[start:-1]
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert abs(got - sum(row[t] for row, t in zip(logprobs, c))) < 1e-5
        assert abs(got - E.continuation_logprobs(model, prompt, [c])[0]) < 1e-5


def make_adapter(base, folder, std=0.05):
    """A folder with an adapter of all linears, drawn by seed."""
    model, _ = G.load_base(base, "cpu", torch.float32)
    torch.manual_seed(0)  # of A
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    for i, (_, module) in enumerate(L.lora_linears(model)):
        module.lora_b.data.normal_(0, std, generator=torch.Generator().manual_seed(i))
    L.save_adapter(model, folder)
    return folder


def test_one_base_is_in_memory_at_a_time(base, tmp_path, monkeypatch):
    """A base is loaded once for the models on it, and has gone when the next one is read, though it
    has answered."""
    shutil.copytree(base, tmp_path / "other")
    adapter = make_adapter(base, tmp_path / "adapter")
    loaded = []

    def load(path, *settings):
        gc.disable()  # what lies in a cycle may stay for long
        assert not any(model() for model in loaded)
        model, tokenizer = G.load_base(path, *settings)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(E, "load_base", load)
    specs = [f"a={base}+{adapter}", f"b={base}", f"c={tmp_path / 'other'}", f"d={base}"]
    question, seen = [{"instruction": "问", "input": ""}], {}
    try:
        models = E.each_model(E.parse_models(specs), torch.device("cpu"), torch.float32)
        for candidate in models:
            path = tmp_path / f"{candidate.name}.jsonl"
            (row,) = E.answer(candidate, question, G.Decoding(max_new_tokens=4), path, 1)
            seen[candidate.name] = row["key"], E.likelihoods(candidate, [1, 2], ["问"])
    finally:
        gc.enable()
    assert len(loaded) == 3
    assert seen["b"] == seen["c"] == seen["d"] and seen["a"][0] != seen["b"][0]
    assert abs(seen["a"][1][0] - seen["b"][1][0]) > 1e-4


def test_models_are_refused_before_any_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(E, "load_base", None)
    for specs, template, word in [
        ([str(base)], "", "NAME=BASE"),
        ([f"x={base}", f"x={base}"], "", "once"),
        ([f"x/y={base}"], "", "x/y"),
        ([f"x={base}+{tmp_path}"], "", "adapter_config.json"),
        ([f"x={tmp_path / 'none'}"], "", "none"),
        ([f"x={base}"], "no_such_template", "no_such_template"),
    ]:
        with pytest.raises((ValueError, OSError), match=word):
            E.parse_models(specs, template)


# --------------------------------------------------------------------------------------------------
# Statements


def to_json(value, **how):
    return json.dumps(value, ensure_ascii=False, **how)


def test_damaged_pairs_are_told_by_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = {"consistent": "甲", "inconsistent": "乙"}
    for change in ({"inconsistent": ""}, {"inconsistent": 1}, {"consistent": None}):
        path.write_text(f"{to_json(good)}\n{to_json(good | change)}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"pairs.jsonl line 2: {next(iter(change))}"):
            E.read_pairs(path)


# --------------------------------------------------------------------------------------------------
# Intervals


def cells_of(resamples, seed, **scores):
    """{model: cell} of one score, by `summarise`."""
    scored = {model: {"s": score} for model, score in scores.items()}
    return E.summarise(scored, resamples, seed)["s"]


def test_bootstrap_interval_covers_and_pairs():
    """Coverage of the true mean near 95 % over 200 samples; the paired difference of two correlated
    models is narrower than the distance of their own intervals would say."""
    rng, hits, alone = np.random.default_rng(1), 0, np.arange(60)
    for seed in range(200):
        sample = E.Score(rng.random(60) < 0.3, alone)
        low, high = cells_of(300, seed, m=sample)["m"]["interval"]
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99
    easy = rng.random(60)
    cell = cells_of(300, 0, a=E.Score(easy, alone), b=E.Score(easy + 0.05, alone))["b"]
    assert cell["difference"] == pytest.approx(0.05, abs=1e-5)
    assert np.ptp(cell["difference_interval"]) < 1e-5 < np.ptp(cell["interval"])


def test_bootstrap_draws_entities():
    """40 entities of 9 records that share most of their score: coverage near 95 % if entities are
    drawn (60 % if records are), and the same draws as from sums over entities."""
    rng, hits = np.random.default_rng(1), np.zeros(2)
    by_entity = E.clusters_of([{"entity": i // 9} for i in range(360)])
    by_record = E.clusters_of([{}] * 360)
    for seed in range(100):
        sample = np.repeat(rng.normal(size=40), 9) + 0.5 * rng.normal(size=360)
        for i, (clusters, resampled) in enumerate([(by_entity, 40), (by_record, 360)]):
            cell = cells_of(200, seed, m=E.Score(sample, clusters))["m"]
            hits[i] += cell["interval"][0] <= 0 <= cell["interval"][1]
            assert (cell["records"], cell["resampled"]) == (360, resampled)
    assert hits[0] >= 88 and hits[1] <= 70, hits
    sums = E.Score(sample.reshape(40, 9).sum(1), np.arange(40), np.full(40, 9.0))
    by_sums, by_records = (
        cells_of(200, 5, m=score)["m"]["interval"] for score in (sums, E.Score(sample, by_entity))
    )
    assert np.allclose(by_sums, by_records, atol=1e-6)
    rows = [{"entity": "甲"}, {}, {"entity": "甲"}, {"entity": None}]
    assert E.clusters_of(rows).tolist() == [0, 1, 0, 2]


# --------------------------------------------------------------------------------------------------
# The whole report


def first_lines(name, path, *chosen):
    """Write chosen lines of a file in data/ to path, and return it."""
    lines = (ROOT / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines[i] for i in chosen), encoding="utf-8")
    return path


def test_report_runs_and_repeats_its_bytes(base, tmp_path):
    """Two models on one base, end to end by the command line, twice."""
    adapter = make_adapter(base, tmp_path / "adapter")
    command = [ROOT / "tests/evaluate.py", f"base={base}", f"tuned={base}+{adapter}"]
    command += ["--output_dir", tmp_path / "report", "--statements="]
    command += ["--data_path", first_lines("heldout", tmp_path / "few.jsonl", 0, 1, -3, -2, -1)]
    command += ["--choices", first_lines("choice", tmp_path / "choice.jsonl", 0, 1, 2, 3)]
    outside = tmp_path / "outside.jsonl"
    outside.write_text(to_json({"instruction": "红楼梦是谁写的？"}), encoding="utf-8")
    command += ["--outside", outside, "--max_new_tokens", "6", "--resamples", "50"]
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        seen.append({p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()})
        seen[-1]["stdout"] = done.stdout
        shutil.rmtree(tmp_path / "report")
    assert seen[0] == seen[1]
    files = {"report.html", "scores.json", "exams.json", "scores.svg", "run.json"}
    answers = {f"{kind}-base.jsonl" for kind in ("answers", "choices", "outside")}
    assert files | answers <= seen[0].keys()
    # Each of the four questions has four options, and is asked in four orders.
    assert seen[0]["choices-base.jsonl"].count(b"\n") == 16
    table, page = json.loads(seen[0]["scores.json"]), seen[0]["report.html"].decode()
    assert table["bits per character"]["tuned"]["difference"] != 0 and "<script" not in page
    assert table["ROUGE-L"]["base"]["records"] == 5 and table["ROUGE-L"]["base"]["resampled"] == 2
    line = (
        "50 resamples of whole entities: 2 with 5 held-out questions, 2 with 4 multiple-choice "
        "questions"
    )
    assert line in seen[0]["stdout"] and line in page and line in seen[0]["run.json"].decode()


def test_exams_alone(base, tmp_path, monkeypatch, capsys):
    """One command for files of several forms: no records, no statements; groups by what the
    knowledge base holds and by subject."""
    lines = [
        json.loads(row) for row in (ROOT / "data/choice.jsonl").read_text("utf-8").split("\n")[:3]
    ]
    (tmp_path / "ours.jsonl").write_text("".join(to_json(row) + "\n" for row in lines), "utf-8")
    mtcmb = {"id": 0, "question": "金星的卫星有几个？", "options": "A. 零 B. 一", "answer": "A"}
    (tmp_path / "SE-B.jsonl").write_text(to_json(mtcmb), "utf-8")
    ceval = "id,question,A,B,C,D,answer\n0,问,甲,乙,丙,以上都是,D\n"
    (tmp_path / "val.csv").write_text(ceval, "utf-8")
    files = [str(tmp_path / name) for name in ("ours.jsonl", "SE-B.jsonl", "val.csv")]
    command = ["evaluate.py", f"m={base}", "--output_dir", str(tmp_path / "exam")]
    command += ["--max_new_tokens", "2", "--resamples", "40", "--exams", *files]
    monkeypatch.setattr(sys, "argv", command)
    E.main()
    rows = json.loads((tmp_path / "exam/exams.json").read_text("utf-8"))
    assert {row["group"]: row["questions"] for row in rows} == {
        "all": 5,
        "right option in the knowledge base": 3,
        "not in it": 2,
        "中药学": 3,
        "SE-B": 1,
        "val": 1,
    }
    scores = json.loads((tmp_path / "exam/scores.json").read_text("utf-8"))
    assert scores.keys() == set(E.EXAM_SCORES)
    assert scores["choice by answer"]["m"]["chance"] == pytest.approx((4 / 4 + 1 / 2) / 5)
    answers = (tmp_path / "exam/choices-m.jsonl").read_bytes()
    assert answers.count(b"\n") == 3 * 4 + 2 + 1
    assert "SE-B" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--choices", files[0]])
    with pytest.raises(SystemExit) as stopped:
        M.run(E.main)
    assert stopped.value.code == 2


def test_what_declines(tmp_path):
    for text in (
        "抱歉，没有收录这味药。",
        "其余的答不了。",
        "我不知道，请咨询医生。",
        "这超出了我能回答的范围。",
    ):
        assert E.declines(text), text
    for text in ("胸腺大小不在正常范围内。", "你好！", "边界不清楚。", "孕妇不能使用。"):
        assert not E.declines(text), text
    # No reference that gives facts is taken for a refusal.
    for name in ("heldout", "train"):
        records = G.read_instructions(ROOT / f"data/{name}.jsonl")
        assert not [r["output"] for r in records if r.get("values") and E.declines(r["output"])]
    path = tmp_path / "outside.jsonl"
    for row in ({"question": "谁写的？"}, {"instruction": "谁写的？", "output": "抱歉"}):
        path.write_text(to_json(row), encoding="utf-8")
        assert E.read_outside(path)[0].items() >= {"instruction": "谁写的？", "input": ""}.items()
    rows = [{"answer": "我不知道。"}, {"answer": "曹雪芹。"}]
    score = E.score_outside([{}, {}], rows)["outside questions declined"]
    assert score.value() == 0.5


def test_statements_are_judged_by_both_kinds(monkeypatch):
    """Who calls everything right is right half of the time, as chance is."""
    pairs = [{"consistent": "真", "inconsistent": "假"}] * 4
    monkeypatch.setattr(E, "is_likelier_right", lambda *_: True)
    monkeypatch.setattr(E, "believes", lambda *_: True)
    rows = [{"answer": "这个说法正确。"}] * 8
    scores = E.score_pairs(None, pairs, rows)
    shares = {name: score.value() for name, score in scores.items()}
    assert shares["true statements"] == 1 and shares["false statements"] == 0
    assert shares["statements judged"] == scores["statements judged"].chance == 0.5
    # One pair judged, one unanswered, one the wrong way round, one half: 3 of 8.
    said = "正确 错误 嗯 嗯 错误 正确 正确 正确".split()
    scores = E.score_pairs(None, pairs, [{"answer": text} for text in said])
    assert scores["statements judged"].value() == 3 / 8


def test_what_an_answer_says_of_a_statement():
    for wanted, texts in {
        True: ["正确", "归脾汤出自《济生方》，所以这个说法正确。", "不是错误，是正确的"],
        False: ["错误。", "不正确", "这个说法不对", "归脾汤不出自《伤寒论》，说法有误。"],
        None: ["", "不知道", "归脾汤出自《济生方》。"],
    }.items():
        for text in texts:
            assert E.told(text) is wanted, text


def test_answers_and_hashes_tell_dtype_path_and_tokenizer(base, tmp_path, monkeypatch):
    """Meta's layout, the tokenizer one level up, and two files of one name: each has its hash, and
    answers in float32 are not taken for bf16's."""
    weights = M.Checkpoint(base)
    (tmp_path / "meta/7B").mkdir(parents=True)
    M.save_meta(weights.config, weights.read(), tmp_path / "meta/7B", weights.dtype)
    shutil.copy(base / "tokenizer.model", tmp_path / "meta/tokenizer.model")
    first_lines("heldout", tmp_path / "few.jsonl", 0)
    first_lines("choice", tmp_path / "x/test.jsonl", 0)
    first_lines("choice", tmp_path / "y/test.jsonl", 1)
    monkeypatch.chdir(tmp_path)
    command = ["evaluate.py", "m=meta/7B", "--output_dir", "out", "--data_path", "few.jsonl"]
    command += ["--choices", "x/test.jsonl", "y/test.jsonl", "--statements="]
    command += ["--max_new_tokens", "2"]

    def evaluate(*options):
        monkeypatch.setattr(sys, "argv", [*command, *options])
        E.main()
        return json.loads(Path("out/run.json").read_text(encoding="utf-8"))

    info = evaluate("--dtype", "fp32", "--resamples", "40")
    files = ["few.jsonl", "test.jsonl", "test.jsonl", "knowledge.jsonl"]
    assert [name for name, _ in info["data"]] == files
    hashes = {E.file_hash(tmp_path / f"{folder}/test.jsonl") for folder in "xy"}
    assert dict(map(reversed, info["data"])).keys() >= hashes
    hashes = info["models"]["m"]["weights"][0]
    assert hashes["tokenizer.model"] == E.file_hash(tmp_path / "meta/tokenizer.model")
    # Another seed draws other resamples, and asks no model again.
    answers = Path("out/answers-m.jsonl").read_bytes()
    evaluate("--dtype", "fp32", "--resamples", "40", "--seed", "1", "--rows", "2")
    assert Path("out/answers-m.jsonl").read_bytes() == answers
    for other in (["--dtype", "bf16"], ["--dtype", "fp32", "--load_8bit"]):
        with pytest.raises(ValueError, match="something else than answers"):
            evaluate(*other, "--resamples", "40")
    for wrong in (["--resamples", "0"], ["--n", "2"]):
        with pytest.raises(ValueError, match=f"{wrong[0][2:]} is {wrong[1]}, wanted"):
            evaluate(*wrong)
