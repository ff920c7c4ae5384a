"""tests/evaluate.py: each metric against another implementation or a worked example; likelihoods against transformers
and NumPy; the whole report twice, byte for byte."""
import json
import math
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, formula_weights, make_config
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from test_model import numpy_llama, to_transformers

import evaluate as E
import generate as G
import lora as L
import model as M

PAIRS = [("麻黄汤由麻黄、桂枝、苦杏仁、甘草组成。", "麻黄汤的组成有麻黄、桂枝、杏仁、甘草。"), ("补气升阳", "补气升阳"), ("清热", "温里散寒"),
         ("发汗 解表", "发汗解表，宣肺平喘，宣肺平喘"), ("a b c d e", "abcde"), ("黄芪", ""), ("癫痫发作", "癫"), ("头痛、眩晕、失眠", "失眠、头痛")]


class Characters:
    """rouge-score's tokenizer interface, over characters."""

    def tokenize(self, text):
        return E.characters(text)


def test_rouge_equals_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Characters())
    for reference, answer in PAIRS:
        theirs = scorer.score(reference, answer)
        assert np.allclose(E.rouge(reference, answer), [theirs[k].fmeasure for k in ("rouge1", "rouge2", "rougeL")], atol=1e-6)


@pytest.mark.parametrize("chosen", [range(8), (0,), (1, 2), (2,), (5,), (6, 7), (0, 3, 4)])
def test_bleu_equals_sacrebleu(chosen):
    pairs = [PAIRS[i] for i in chosen]
    theirs = BLEU(tokenize="char").corpus_score([a for _, a in pairs], [[r for r, _ in pairs]]).score / 100
    assert abs(E.bleu(sum(E.bleu_counts(r, a) for r, a in pairs)) - theirs) < 1e-6


def test_distinct_and_repetition_by_hand():
    assert E.distinct("咳嗽咳嗽", 2) == 2 / 3                      # 咳嗽, 嗽咳, 咳嗽
    assert 1 - E.distinct("甲乙丙丁" * 3, 4) == pytest.approx(1 - 4 / 9)
    assert E.distinct("好", 2) == 1.0


def test_names_are_the_longest_ones():
    assert E.named("当归四逆汤加甘草", {"四逆汤", "当归四逆汤", "当归", "甘草"}) == {"当归四逆汤", "甘草"}
    assert E.named("无", set()) == set()


def test_facts_recalled_and_contradicted_by_hand():
    kb = [{"中心词": "甲汤", "类型": "方剂", "组成": ["麻黄", "桂枝", "甘草"]}, {"中心词": "乙汤", "类型": "方剂", "组成": ["大黄", "芒硝"]}]
    record = {"entity": "甲汤", "kind": "方剂", "relations": ["组成"], "values": ["麻黄", "桂枝", "甘草"], "output": "x"}
    scores = E.score([record], [{"answer": "甲汤有麻黄、甘草、大黄。", "finish_reason": "stop"}], [3.0], kb)
    assert E.value(*scores["facts recalled"]) == pytest.approx(2 / 3)
    assert E.value(*scores["facts contradicted"]) == pytest.approx(1 / 3)
    assert E.value(*scores["bits per character"]) == 3.0 and E.value(*scores["stopped"]) == 1.0


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_likelihoods_equal_transformers_and_numpy(n_kv_heads):
    """Four continuations of one prompt, of unequal length: to 1e-4 of transformers, 1e-5 of float64, and one by one."""
    model = formula_weights(M.LLaMA(make_config(n_kv_heads)))
    prompt, continuations = [1, 5, 80, 7], [[9, 8, 7], [4], [100, 200, 250, 3, 2], [9, 8]]
    ours = E.continuation_logprobs(model, prompt, continuations)
    hf = to_transformers(model)
    for got, c in zip(ours, continuations):
        ids = prompt + c
        with torch.no_grad():
            theirs = hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert abs(got - sum(theirs[len(prompt) - 1 + i, t].item() for i, t in enumerate(c))) < 1e-4
        logits = numpy_llama(model.state_dict(), model.config, np.array(ids))[len(prompt) - 1:-1]
        exact = sum(row[t] - row.max() - math.log(np.exp(row - row.max()).sum()) for row, t in zip(logits, c))
        assert abs(got - exact) < 1e-5
        assert abs(got - E.continuation_logprobs(model, prompt, [c])[0]) < 1e-5


def test_extraction_is_strict():
    options = {"A": "补气", "B": "活血", "C": "补气升阳", "D": "清热"}
    for answer, wanted in [("B", "B"), ("答案是 C。", "C"), ("正确答案：D", "D"), ("选AC", "AC"), ("它的功效是补气升阳。", "C"), ("补气，也能活血", None),
                           ("不知道", None), ("", None), ("E", None), ("Both", None), ("功效是清热", "D")]:
        assert E.extract_choice(answer, options) == wanted, answer


def test_published_question_formats(tmp_path):
    """CMB's, CMExam's and TCMBench's files as they are published, and ours, read as the same questions."""
    files = {
        "cmb.json": json.dumps([{"exam_type": "医师考试", "exam_class": "中医", "exam_subject": "方剂学", "question": "问", "answer": "B",
                                 "question_type": "单项选择题", "option": {"A": "甲", "B": "乙", "C": "", "D": "丁"}}], ensure_ascii=False),
        "cmexam.csv": '\ufeffQuestion,Options,Answer,Explanation\n问,"A 甲\nB 乙\nD 丁",B,因为\n',
        "tcmbench.json": json.dumps({"type": "FKU", "example": [{"question": "问\nA．甲\nB．乙\nD．丁", "answer": ["B"], "index": 1}]},
                                    ensure_ascii=False, indent=1),
        "list.json": json.dumps([{"Question": "问", "Options": [{"key": "A", "value": "甲"}, {"key": "B", "value": "乙"},
                                                               {"key": "D", "value": "丁"}], "Answer": "B"}], ensure_ascii=False)}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (question,) = E.read_choices(tmp_path / name)
        assert (question["question"], question["options"], question["answer"]) == ("问", {"A": "甲", "B": "乙", "D": "丁"}, "B"), name
    assert len(E.read_choices(ROOT / "data/choice.jsonl")) == 200
    line = json.dumps({"question": "问\u2028题", "options": {"A": "甲", "B": "乙"}, "answer": "A"}, ensure_ascii=False)
    (tmp_path / "lines.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")         # U+2028 ends a line for str.splitlines
    assert [q["question"] for q in E.read_choices(tmp_path / "lines.jsonl")] == ["问\u2028题"] * 2
    (tmp_path / "bad.json").write_text('[{"question": "问", "option": {"A": "甲", "B": "乙"}, "answer": "C"}]', encoding="utf-8")
    with pytest.raises(ValueError, match="question 1"):
        E.read_choices(tmp_path / "bad.json")


def test_bootstrap_interval_covers_and_pairs():
    """Coverage of the true mean near 95 % over 200 samples; the paired difference of two correlated models is narrower
    than the distance of their own intervals would say."""
    rng, hits, one = np.random.default_rng(1), 0, np.ones(60)
    for seed in range(200):
        sample = (rng.random(60) < 0.3).astype(float)
        low, high = E.summarise({"m": {"s": (sample, one)}}, 300, seed)["s"]["m"]["interval"]
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99
    easy = rng.random(60)
    cell = E.summarise({"a": {"s": (easy, one)}, "b": {"s": (easy + 0.05, one)}}, 300, 0)["s"]["b"]
    assert cell["difference"] == pytest.approx(0.05, abs=1e-5) and np.ptp(cell["difference_interval"]) < 1e-5 < np.ptp(cell["interval"])


def test_report_runs_and_repeats_its_bytes(base, tmp_path):
    """Two models on one base, end to end by the command line, twice."""
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    for i, (_, module) in enumerate(L.lora_linears(model)):
        module.lora_b.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    L.save_adapter(model, tmp_path / "adapter")
    rng = random.Random(0)
    lines = (ROOT / "data/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(rng.sample(lines, 5)), encoding="utf-8")
    few = (ROOT / "data/choice.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "choice.jsonl").write_text("\n".join(few), encoding="utf-8")
    seen = []
    for _ in range(2):
        done = subprocess.run([sys.executable, ROOT / "tests/evaluate.py", f"base={base}", f"tuned={base}+{tmp_path / 'adapter'}",
                               "--output_dir", tmp_path / "report", "--data_path", tmp_path / "few.jsonl", "--choices",
                               tmp_path / "choice.jsonl", "--statements=", "--max_new_tokens", "6", "--resamples", "50"],
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        seen.append({p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()} | {"stdout": done.stdout})
        shutil.rmtree(tmp_path / "report")
    assert seen[0] == seen[1] and {"report.html", "scores.json", "scores.svg", "run.json", "answers-tuned.jsonl"} <= seen[0].keys()
    table = json.loads(seen[0]["scores.json"])
    assert table["bits per character"]["tuned"]["difference"] != 0 and "<script" not in seen[0]["report.html"].decode()
