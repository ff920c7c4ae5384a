"""tests/evaluate.py: each metric against another implementation or a worked example; likelihoods against transformers
and NumPy; the whole report twice, byte for byte."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

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
import train as T

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


def test_names_stand_outside_longer_ones():
    terms = {"四逆汤", "当归四逆汤", "当归", "甘草"}
    assert E.named("当归四逆汤加甘草", terms) == {"当归四逆汤", "甘草"} and E.named("当归四逆汤、四逆汤", terms) == {"当归四逆汤", "四逆汤"}
    assert E.named("发汗解表散寒", {"发汗解表", "解表散寒", "解表"}) == {"发汗解表", "解表散寒"} and E.named("无", set()) == set()


def test_facts_recalled_and_contradicted_by_hand():
    kb = [{"中心词": "甲汤", "类型": "方剂", "组成": ["麻黄", "桂枝", "甘草"]}, {"中心词": "乙汤", "类型": "方剂", "组成": ["大黄", "芒硝"]}]
    record = {"entity": "甲汤", "kind": "方剂", "relations": ["组成"], "values": ["麻黄", "桂枝", "甘草"], "output": "x"}
    scores = E.score([record], [{"answer": "甲汤有麻黄、甘草、大黄。", "finish_reason": "stop"}], [3.0], kb)
    assert E.value(*scores["facts recalled"]) == pytest.approx(2 / 3)
    assert E.value(*scores["facts contradicted"]) == pytest.approx(1 / 3)
    assert E.value(*scores["bits per character"]) == 3.0 and E.value(*scores["stopped"]) == 1.0


def test_no_credit_for_a_value_inside_a_longer_one():
    """四逆汤 is not recalled by 当归四逆汤, nor 寒 by 微寒, nor 甘草 by the name 炙甘草汤; train.py's share follows the same rule."""
    kb = [{"中心词": "病甲", "类型": "疾病", "常用方剂": ["四逆汤"]}, {"中心词": "病乙", "类型": "疾病", "常用方剂": ["当归四逆汤"]},
          {"中心词": "炙甘草汤", "类型": "方剂", "组成": ["甘草"]}]
    records = [{"entity": name, "kind": kind, "relations": [relation], "values": values, "output": "x"}
               for (_, name), (_, kind), (relation, values) in map(dict.items, kb)]
    for answers, shares in [(["常用方剂有当归四逆汤。"] * 2 + ["炙甘草汤的组成有人参。"], [0, 1, 0]),
                            (["当归四逆汤、四逆汤"] * 2 + ["炙甘草汤的组成有甘草"], [1, 1, 1])]:
        rows = [{"answer": a, "finish_reason": "stop"} for a in answers]
        recalled, asked = E.score(records, rows, [1.0] * 3, kb)["facts recalled"]
        assert recalled.tolist() == shares and asked.tolist() == [1, 1, 1]
        assert T.facts_recalled(records, answers) == sum(shares) / 3
    tastes = [{"relations": ["性味"], "values": [v]} for v in ("寒", "微寒")]
    assert T.facts_recalled(tastes, ["苦、微寒。"] * 2) == 0.5 and T.facts_recalled([{}], ["x"]) is None
    held = G.read_instructions(ROOT / "data/heldout.jsonl")
    assert T.facts_recalled(held, [r["output"] for r in held]) == 1.0


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
    options = {"A": "血常规", "B": "胸部CT", "C": "尿常规", "D": "腹部超声", "E": "CEA"}
    for answer, wanted in [
            ("B超检查最合适，即腹部超声。", "D"), ("C反应蛋白升高，应查血常规。", "A"), ("CEA", "E"), ("B 超", None), ("D-二聚体", None),
            ("CA125", None), ("A型流感", None), ("E. coli", None), ("AFP", None), ("DNA检测", None), ("E/CO2", None), ("A patient", None),
            ("A B超", None), ("A或B", None), ("A 或 B", None), ("A、B或C", None), ("A，或B", None), ("A. B", None), ("A；B", None),
            ("A/B", None), ("A和B都对", None), ("不选A", None), ("选A不选B", None), ("选项有误，是D", None), ("答案：B不对，是D", None),
            ("A是错的", None), ("A错误", None), ("A正确率", None), ("ABF", None),
            ("A、C", "AC"), ("A，C。", "AC"), ("C和A", "AC"), ("A, B, D", "ABD"), ("答案为A、B、C、D。", "ABCD"), ("选A、C项", "AC"),
            ("B. 胸部CT", "B"), ("B、胸部CT", "B"), ("A. B超", "A"), ("（C）", "C"), ("**D**", "D"), ("选“B”。", "B"), ("A项。", "A"),
            ("【答案】B\n【解析】血常规", "B"), ("B是正确的。", "B"), ("故选B，不选A", "B"), ("本题应选择D。", "D"), ("C\n\n因为", "C"),
            ("正确选项为C：尿常规", "C"), ("E 腹部超声", "D")]:
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


def test_damaged_questions_are_told_by_file(tmp_path):
    good, wanted = {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "A"}, "question 1: wanted"
    odd = [{"options": {"A": 1, "B": 2}}, {"options": 5}, {"options": [{"key": [], "value": "x"}]}, {"answer": 1}, {"answer": [1]}, {"answer": ""}]
    for i, (text, said) in enumerate([
            *((json.dumps([good | change]), wanted) for change in odd), ('[["a"]]', "list"), ('{"example": 5}', wanted),
            ('{"example": [["a"]]}', wanted), ("", "empty"), ("题".encode("gbk"), "UTF-8"), ("Question\n问题\n".encode("gbk"), "UTF-8"),
            ('Question\n"' + "x" * 200_000, "field larger than field limit")]):
        path = tmp_path / f"{i}.{'csv' if b'Question' in (text if isinstance(text, bytes) else text.encode()) else 'json'}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=f"{path.name}.*{said}"):
            E.read_choices(path)


def test_bootstrap_interval_covers_and_pairs():
    """Coverage of the true mean near 95 % over 200 samples; the paired difference of two correlated models is narrower
    than the distance of their own intervals would say."""
    rng, hits, one = np.random.default_rng(1), 0, np.ones(60)
    for seed in range(200):
        sample = (rng.random(60) < 0.3).astype(float)
        low, high = E.summarise({"m": {"s": (sample, one)}}, {"s": np.arange(60)}, 300, seed)["s"]["m"]["interval"]
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99
    easy = rng.random(60)
    cell = E.summarise({"a": {"s": (easy, one)}, "b": {"s": (easy + 0.05, one)}}, {"s": np.arange(60)}, 300, 0)["s"]["b"]
    assert cell["difference"] == pytest.approx(0.05, abs=1e-5) and np.ptp(cell["difference_interval"]) < 1e-5 < np.ptp(cell["interval"])


def test_bootstrap_draws_entities():
    """40 entities of 9 records that share most of their score: coverage near 95 % if entities are drawn (60 % if records
    are), and the same draws as from sums over entities."""
    rng, hits, entities = np.random.default_rng(1), np.zeros(2), [{"entity": i // 9} for i in range(360)]
    for seed in range(100):
        sample = np.repeat(rng.normal(size=40), 9) + 0.5 * rng.normal(size=360)
        for i, clusters in enumerate((E.clusters_of(entities), E.clusters_of([{}] * 360))):
            cell = E.summarise({"m": {"s": (sample, np.ones(360))}}, {"s": clusters}, 200, seed)["s"]["m"]
            hits[i] += cell["interval"][0] <= 0 <= cell["interval"][1]
            assert (cell["records"], cell["resampled"]) == (360, (40, 360)[i])
    assert hits[0] >= 88 and hits[1] <= 70, hits
    sums, clusters = (sample.reshape(40, 9).sum(1), np.full(40, 9.0)), E.clusters_of(entities)
    by_sums, by_records = (E.summarise({"m": {"s": nd}}, {"s": ids}, 200, 5)["s"]["m"]["interval"]
                           for nd, ids in ((sums, np.arange(40)), ((sample, np.ones(360)), clusters)))
    assert np.allclose(by_sums, by_records, atol=1e-6)
    assert E.clusters_of([{"entity": "甲"}, {}, {"entity": "甲"}, {"entity": None}]).tolist() == [0, 1, 0, 2]


def test_report_runs_and_repeats_its_bytes(base, tmp_path):
    """Two models on one base, end to end by the command line, twice."""
    model, _ = G.load_base(base, "cpu", torch.float32)
    L.add_lora(model, L.LoRAConfig(4, 8, 0.0, ("all",)))
    for i, (_, module) in enumerate(L.lora_linears(model)):
        module.lora_b.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    L.save_adapter(model, tmp_path / "adapter")
    lines = (ROOT / "data/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:2] + lines[-3:]), encoding="utf-8")
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
    assert table["ROUGE-L"]["base"]["records"] == 5 and table["ROUGE-L"]["base"]["resampled"] == 2
    line = "50 resamples of whole entities: 2 with 5 held-out questions, 2 with 4 multiple-choice questions"
    assert line in seen[0]["stdout"] and line in seen[0]["report.html"].decode() and line in seen[0]["run.json"].decode()


def test_answers_and_hashes_tell_dtype_path_and_tokenizer(base, tmp_path, monkeypatch):
    """Meta's layout, the tokenizer one level up, and two files of one name: each has its hash, and answers in float32 are
    not taken for bf16's."""
    shutil.copytree(base, tmp_path / "meta/7B")
    (tmp_path / "meta/7B/tokenizer.model").rename(tmp_path / "meta/tokenizer.model")
    lines = {path: (ROOT / f"data/{path}.jsonl").read_text(encoding="utf-8").splitlines() for path in ("heldout", "choice")}
    for name, line in [("few", lines["heldout"][0]), ("x/test", lines["choice"][0]), ("y/test", lines["choice"][1])]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(line, encoding="utf-8")

    monkeypatch.chdir(tmp_path)

    def evaluate(*options):
        monkeypatch.setattr(sys, "argv", "evaluate.py m=meta/7B --output_dir out --data_path few.jsonl --choices x/test.jsonl y/test.jsonl "
                                         "--statements= --max_new_tokens 2 --resamples 40".split() + list(options))
        E.main()
        return json.loads(Path("out/run.json").read_text(encoding="utf-8"))

    info = evaluate("--dtype", "fp32")
    assert [name for name, _ in info["data"]] == ["few.jsonl", "test.jsonl", "test.jsonl", "knowledge.jsonl"]
    assert dict(map(reversed, info["data"])).keys() >= {E.file_hash(tmp_path / f"{xy}/test.jsonl") for xy in "xy"}
    assert info["models"]["m"]["weights"][0]["tokenizer.model"] == E.file_hash(tmp_path / "meta/tokenizer.model")
    with pytest.raises(ValueError, match="something else than answers"):
        evaluate("--dtype", "bf16")
    with pytest.raises(ValueError, match="resamples is 0, wanted 40 or more"):
        evaluate("--resamples", "0")
