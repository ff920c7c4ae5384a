"""tests/judge.py: the real openai client asks a loopback server that replies as it is told to."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter

import judge as J
import pytest
from conftest import ROOT
from fake_openai import Running, Scripted

RUBRICS = ROOT / "data" / "rubrics"
KEYS = ["安全性", "可用性", "流畅性"]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")


def judge_files(url, *files, rubric=RUBRICS / "sus.json", output=None, more=()):
    """Run the command in this process; the lines with scores or a verdict, the summary, the lines
    that were rejected."""
    output = output or files[0].parent / "scores.jsonl"
    argv, sys.argv = (
        sys.argv,
        [
            "judge.py",
            *map(str, files),
            "--rubric",
            str(rubric),
            "--model",
            "fake",
            "--base_url",
            url,
            "--output",
            str(output),
            *more,
        ],
    )
    try:
        J.main()
    finally:
        sys.argv = argv
    *rows, last = lines(output)
    assert last["summary"]["asked"] == len(rows)
    return (
        [row for row in rows if "rejected" not in row],
        last["summary"],
        [row for row in rows if "rejected" in row],
    )


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, answers, **more):
    """A file of answers as generate.py writes it."""
    rows = [
        {
            "instruction": f"第{i}问：心悸怎么办？",
            "input": "",
            "answer": answer,
            "finish_reason": "stop",
            "index": i,
            **more,
        }
        for i, answer in enumerate(answers)
    ]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def script(*scores, **more):
    """An answer that has the judge reply these scores."""
    return (
        "⟦"
        + json.dumps({"理由": "一句话", **dict(zip(KEYS, scores)), **more}, ensure_ascii=False)
        + "⟧"
    )


def test_scores_and_their_means(tmp_path, capsys):
    """Three answers by hand: each score as the judge gave it, means of the columns, and what is
    needed to check them."""
    answers = write(tmp_path / "a.jsonl", [script(1, 2, 3), script(3, 3, 3), script(1, 1, 2)])
    with Running() as server:
        scores, summary, rejected = judge_files(server.url, answers)
    assert [list(row["scores"].values()) for row in scores] == [
        [1, 2, 3],
        [3, 3, 3],
        [1, 1, 2],
    ] and not rejected
    assert {key: summary[key] for key in KEYS} == {
        "安全性": {"mean": 1.6667, "n": 3},
        "可用性": {"mean": 2.0, "n": 3},
        "流畅性": {"mean": 2.6667, "n": 3},
    }
    assert summary["asked"] == 3 and summary["rejected"] == {}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"summary": summary}
    replies = {row["key"]: row for row in lines(tmp_path / "scores.replies.jsonl")}
    for i, row in enumerate(scores):
        assert (
            row["question"] == f"第{i}问：心悸怎么办？"
            and row["model"] == "fake-2026"
            and row["rubric"] == "SUS"
        )
        assert (
            row["rubric_sha256"] == hashlib.sha256((RUBRICS / "sus.json").read_bytes()).hexdigest()
        )
        assert row["answers_sha256"] == [hashlib.sha256(answers.read_bytes()).hexdigest()]
        assert json.loads(replies[row["keys"][0]]["content"])["理由"] == "一句话"
        assert replies[row["keys"][0]]["params"]["temperature"] == 0.0


GOOD = dict(zip(KEYS, (1, 2, 3)))


@pytest.mark.parametrize(
    "content, reason",
    [
        (json.dumps(GOOD), None),
        (json.dumps({**GOOD, "理由": "好"}), None),
        (f"\n{json.dumps(GOOD)} ", None),
        (json.dumps({**GOOD, "安全性": 0}), "off the scale"),
        (json.dumps({**GOOD, "安全性": 4}), "off the scale"),
        (json.dumps({**GOOD, "安全性": 2.0}), "off the scale"),
        (json.dumps({**GOOD, "安全性": "2"}), "off the scale"),
        (json.dumps({**GOOD, "安全性": True}), "off the scale"),
        (json.dumps({**GOOD, "安全性": [2]}), "off the scale"),
        (json.dumps({**GOOD, "安全性": None}), "off the scale"),
        ('{"安全性": NaN, "可用性": 1, "流畅性": 1}', "off the scale"),
        (json.dumps({"安全性": 1, "可用性": 2}), "other keys"),
        (json.dumps({**GOOD, "总分": 6}), "other keys"),
        ('{"安全性": 1, "安全性": 3, "可用性": 2, "流畅性": 3}', "other keys"),
        (json.dumps([*GOOD.items()]), "other keys"),
        ("3", "other keys"),
        ("null", "other keys"),
        ("这个回答很好，安全性3分。", "no JSON"),
        (f"评分如下：{json.dumps(GOOD)}", "no JSON"),
        (f"```json\n{json.dumps(GOOD)}\n```", "no JSON"),
        (json.dumps(GOOD) * 2, "no JSON"),
        (json.dumps(GOOD)[:-1], "no JSON"),
        ("[" * 100000, "no JSON"),
        ('{"安全性": ' + "1" * 5000 + "}", "no JSON"),
        ([{"type": "text"}], "no JSON"),
        ("", "empty"),
        ('{"安全性": 9, "可用性": "\\ud800", "流畅性": 3}', "off the scale"),
    ],
)
def test_a_reply_is_taken_as_it_is_or_not_at_all(content, reason):
    rubric = J.read_rubric(RUBRICS / "sus.json")
    if reason is None:
        assert J.parse_verdict(content, rubric) == GOOD
    else:
        with pytest.raises(ValueError, match=f"^{reason}") as caught:
            J.parse_verdict(content, rubric)
        assert "\n" not in str(caught.value) and str(caught.value).encode()


def test_what_is_off_the_scale_is_rejected_and_counted(tmp_path):
    """Rejected replies count in no mean; nothing is asked again to mend them."""
    answers = write(
        tmp_path / "a.jsonl",
        [
            script(1, 1, 1),
            script(9, 1, 1),
            script(1, 1),
            "⟦安全。⟧",
            script(3, 3, 3) + "好⟧",
            script(2, 2, 2, 总分=6),
            "⟦⟧",
            script(3, 2, 1),
            script(0, 1, 1),
        ],
    )
    with Running() as server:
        scores, summary, rejected = judge_files(server.url, answers)
        assert server.stats()["requests"] == 9
    assert [row["question"][1] for row in scores] == ["0", "7"] and summary["安全性"] == {
        "mean": 2.0,
        "n": 2,
    }
    assert (
        summary["rejected"]
        == {"off the scale": 2, "other keys": 2, "no JSON": 2, "empty": 1}
        == dict(Counter(row["rejected"].split(":")[0] for row in rejected))
    )
    replies = {row["key"]: row["content"] for row in lines(tmp_path / "scores.replies.jsonl")}
    assert [replies[row["keys"][0]] for row in rejected if row["rejected"].startswith("off")] == [
        script(9, 1, 1)[1:-1],
        script(0, 1, 1)[1:-1],
    ]


def test_a_judge_who_prefers_the_first_place_makes_ties(tmp_path):
    a, b = (
        write(tmp_path / "a.jsonl", ["短", "更长的回答"] * 10),
        write(tmp_path / "b.jsonl", ["很长很长的回答", "长"] * 10),
    )
    with Running("--judge", "first") as server:
        scores, summary, rejected = judge_files(server.url, a, b, rubric=RUBRICS / "pairwise.json")
        assert server.stats()["requests"] == 40
    assert (summary["wins"], summary["ties"], summary["losses"]) == (0, 20, 0) and not rejected
    assert all(row["verdict"] == "tie" and row["verdicts"] == ["A", "A"] for row in scores)


def test_a_judge_who_knows_what_it_prefers(tmp_path):
    """The longer answer wins in either order; turned round, the same files give the same, told from
    the other side."""
    a = write(tmp_path / "a.jsonl", ["短", "更长的回答", "一样", "长长长", "同一个回答"])
    b = write(tmp_path / "b.jsonl", ["很长很长的回答", "长", "两样", "长", "同一个回答"])
    with Running() as server:
        scores, summary, rejected = judge_files(server.url, a, b, rubric=RUBRICS / "pairwise.json")
        assert [row["verdict"] for row in scores] == ["B", "A", "tie", "A", "tie"] and not rejected
        assert [row["verdicts"] for row in scores] == [
            ["B", "A"],
            ["A", "B"],
            ["tie", "tie"],
            ["A", "B"],
            ["tie", "tie"],
        ]
        assert (summary["wins"], summary["ties"], summary["losses"]) == (2, 2, 1)
        assert server.stats()["requests"] == 9  # one pair is the same text twice: one prompt
        _, summary, _ = judge_files(server.url, b, a, rubric=RUBRICS / "pairwise.json")
        assert (summary["wins"], summary["ties"], summary["losses"]) == (
            1,
            2,
            2,
        ) and server.stats()["requests"] == 9


def test_a_pair_wants_both_verdicts(tmp_path):
    """One broken order rejects the pair; a tie in one order alone is no win."""
    rubric = json.loads((RUBRICS / "pairwise.json").read_text(encoding="utf-8"))
    replies = {("甲", "乙"): "A", ("乙", "甲"): "tie", ("丙", "丁"): "A", ("丁", "丙"): "C"}
    path = tmp_path / "scores.replies.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for (first, second), verdict in replies.items():
            user = rubric["user"].format(
                question=f"第{int(first in '丙丁')}问：心悸怎么办？",
                answer_a=first,
                answer_b=second,
            )
            messages = [
                {"role": "system", "content": rubric["system"]},
                {"role": "user", "content": user},
            ]
            print(
                json.dumps(
                    {
                        "key": f"{J.prompt_hash(messages)}/pairwise/fake",
                        "content": json.dumps({"verdict": verdict}),
                        "usage": {},
                        "prompt_hash": J.prompt_hash(messages),
                        "model": "m",
                    }
                ),
                file=file,
            )
    a, b = write(tmp_path / "a.jsonl", "甲丙"), write(tmp_path / "b.jsonl", "乙丁")
    scores, summary, rejected = judge_files(
        "http://127.0.0.1:9/v1", a, b, rubric=RUBRICS / "pairwise.json"
    )  # all is paid: nothing is asked
    assert [row["verdict"] for row in scores] == ["tie"] and scores[0]["verdicts"] == ["A", "tie"]
    assert (
        len(rejected) == 1
        and rejected[0]["rejected"].startswith("off the scale")
        and summary["rejected"] == {"off the scale": 1}
    )


def test_the_prompt_is_the_rubric_with_texts_in_its_places(tmp_path):
    """What looks like a place in a text stays a text; input belongs to the question; a reference is
    shown."""
    rows = [
        {
            "instruction": "病例{answer}",
            "input": "既往史",
            "answer": "答{reference}{question}",
            "output": "参考",
        }
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    with Running() as server:
        rubric = RUBRICS / "cmb_clin.json"
        scores, summary, _ = judge_files(server.url, tmp_path / "a.json", rubric=rubric)
        text = json.loads(rubric.read_text(encoding="utf-8"))
        user = (
            "【问题】\n病例{answer}\n既往史\n\n"
            "【参考答案】\n参考\n\n【回答】\n答{reference}{question}"
        )
        messages = [
            {"role": "system", "content": text["system"]},
            {"role": "user", "content": user},
        ]
        sent = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()
        assert server.stats()["answered"] == {sent: 1} and scores[0]["keys"] == [
            f"{sent[:16]}/CMB-Clin/fake"
        ]
    assert summary["医学专业性"] == {"mean": 3.0, "n": 1}


def test_killed_and_resumed_nothing_is_paid_twice(tmp_path):
    """SIGKILL in the middle of two orders of 60 pairs: no prompt whose reply was on the file is
    asked again."""
    a, b = (
        write(tmp_path / "a.jsonl", ["回答" * (i % 7) for i in range(60)]),
        write(tmp_path / "b.jsonl", ["回答" * (i % 5) for i in range(60)]),
    )
    output, path = tmp_path / "scores.jsonl", tmp_path / "scores.replies.jsonl"
    with Running("--latency", "0.05") as server:
        process = multiprocessing.get_context("fork").Process(
            target=judge_files,
            args=(server.url, a, b),
            kwargs={"rubric": RUBRICS / "pairwise.json", "more": ["--concurrency", "4"]},
        )
        process.start()
        while not path.exists() or path.read_bytes().count(b"\n") < 20:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        paid = {json.loads(line)["prompt_hash"] for line in path.read_bytes().split(b"\n")[:-1]}
        assert 20 <= len(paid) < 110 and not output.exists()
        scores, summary, rejected = judge_files(server.url, a, b, rubric=RUBRICS / "pairwise.json")
        answered = server.stats()["answered"]
        assert {hash[:16] for hash in answered} > paid and all(
            n == 1 for hash, n in answered.items() if hash[:16] in paid
        )
        assert sum(answered.values()) <= len(answered) + 4  # those in flight at the kill
        keys = [row["key"] for row in lines(path)]
        assert len(keys) == len(set(keys)) == len(answered)
        before = output.read_bytes()
        judge_files(server.url, a, b, rubric=RUBRICS / "pairwise.json")
        assert server.stats()["answered"] == answered and output.read_bytes() == before
    lengths = [(i % 7, i % 5) for i in range(60)]
    assert summary["wins"] == sum(m > n for m, n in lengths) and summary["losses"] == sum(
        m < n for m, n in lengths
    )
    assert summary["ties"] == sum(m == n for m, n in lengths) and len(scores) == 60


def test_stopped_and_failed_ones_are_counted_and_asked_later(tmp_path, capsys):
    answers = write(tmp_path / "a.jsonl", ["回答" * i for i in range(10)])
    with Running() as server:
        scores, summary, _ = judge_files(
            server.url, answers, more=["--max_requests", "4", "--concurrency", "1"]
        )
        assert (
            len(scores) == 4
            and summary["rejected"] == {"no reply": 6}
            and "max_requests 4 reached" in capsys.readouterr().out
        )
        scores, summary, _ = judge_files(server.url, answers)
        assert len(scores) == 10 and server.stats()["requests"] == 10


def test_scores_that_were_paid_are_written_before_the_error(tmp_path, capsys):
    """The endpoint's credit ends: the scores until then are in the file, the command ends in the
    error."""
    answers = write(tmp_path / "a.jsonl", ["回答" * i for i in range(9)])
    with (
        Scripted(
            lambda prompt, body, number: (
                json.dumps(GOOD)
                if number <= 5
                else (402, {"error": {"message": "Insufficient Balance"}})
            )
        ) as server,
        pytest.raises(ValueError, match="Insufficient Balance"),
    ):
        judge_files(server.url, answers, more=["--concurrency", "1"])
    *rows, last = lines(tmp_path / "scores.jsonl")
    assert last["summary"]["安全性"] == {"mean": 1.0, "n": 5} and last["summary"]["rejected"] == {
        "no reply": 4
    }


def test_an_answer_may_equal_its_reference(tmp_path):
    a = write(tmp_path / "a.jsonl", ["好"], output="好")
    rubric = J.read_rubric(RUBRICS / "cmb_clin.json")
    assert J.read_questions([str(a)], rubric) == [("第0问：心悸怎么办？", ["好"], "好")]


def test_dry_run(tmp_path, capsys, monkeypatch):
    """The bill without a key; no file is left."""
    monkeypatch.delenv("OPENAI_API_KEY")
    answers = write(tmp_path / "a.jsonl", ["好"] * 3)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "judge.py",
            str(answers),
            "--rubric",
            str(RUBRICS / "sus.json"),
            "--model",
            "fake",
            "--output",
            str(tmp_path / "scores.jsonl"),
            "--dry-run",
        ],
    )
    J.main()
    out = capsys.readouterr().out
    assert "3 prompts, 3 to ask" in out and "第0问" in out and os.listdir(tmp_path) == ["a.jsonl"]


def wrong(tmp_path, name):
    """The arguments of a command that must be refused, and what its one line says."""
    a = write(tmp_path / "a.jsonl", ["好"] * 3)
    sus, pairwise = str(RUBRICS / "sus.json"), str(RUBRICS / "pairwise.json")

    def broken(rubric=sus, **change):
        form = J.read_json_file(rubric) | change
        path = tmp_path / "rubric.json"
        path.write_text(json.dumps({k: v for k, v in form.items() if v is not None}))
        return [a, "--rubric", path], "is no rubric"

    if name == "other question":
        b = write(tmp_path / "b.jsonl", ["好"] * 3)
        b.write_text(b.read_text(encoding="utf-8").replace("第1问", "第7问"), encoding="utf-8")
        return [a, b, "--rubric", pairwise], "record 2 of"
    if name == "shorter file":
        return [a, write(tmp_path / "b.jsonl", ["好"] * 2), "--rubric", pairwise], "record 3 of"
    if name == "output of another":
        (tmp_path / "scores.jsonl").write_text("{}")
        return [a, "--rubric", sus], "scores.jsonl"
    if name == "output of knowledge":
        (tmp_path / "scores.jsonl").write_text(
            '{"id": "x", "instruction": "q", "prompt_hash": "0"}'
        )
        (tmp_path / "scores.replies.jsonl").write_text(
            '{"key": "x", "content": "{}", "usage": {}}\n'
        )
        return [a, "--rubric", sus], "scores.jsonl"
    return {
        "one file of two": lambda: ([a, "--rubric", pairwise], "2 file(s)"),
        "two files": lambda: ([a, a, "--rubric", sus], "1 file(s)"),
        "unknown rubric": lambda: ([a, "--rubric", "sus2.json"], "sus2.json not found"),
        "no answers": lambda: ([tmp_path / "b.jsonl", "--rubric", sus], "b.jsonl"),
        "no answer": lambda: (
            [write(tmp_path / "b.jsonl", ["好", None]), "--rubric", sus],
            "record 2 of",
        ),
        "no reference": lambda: ([a, "--rubric", RUBRICS / "cmb_clin.json"], "reference"),
        "no scale": lambda: broken(scale=None),
        "scale of one": lambda: broken(scale=[3, 3]),
        "scale of texts": lambda: broken(scale=["1", "3"]),
        "no dimensions": lambda: broken(dimensions=[]),
        "a dimension twice": lambda: broken(dimensions=[{"key": "安全性"}] * 2),
        "no place": lambda: broken(user="【问题】{question}"),
        "other place": lambda: broken(user="{question}{answer_a}{answer_b}"),
        "a misspelt place": lambda: broken(user="{question}{answer}{refrence}"),
        "user is no text": lambda: broken(user=["{question}"]),
        "no name": lambda: broken(name=""),
        "no system": lambda: broken(system=None),
        "two verdicts": lambda: broken(pairwise, verdicts=["A", "B"]),
        "a verdict twice": lambda: broken(pairwise, verdicts=["A", "B", "A"]),
        "four verdicts": lambda: broken(pairwise, verdicts=[*"ABCD"]),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "other question",
        "shorter file",
        "output of another",
        "output of knowledge",
        "one file of two",
        "two files",
        "unknown rubric",
        "no answers",
        "no answer",
        "no reference",
        "no scale",
        "scale of one",
        "scale of texts",
        "no dimensions",
        "a dimension twice",
        "no place",
        "other place",
        "a misspelt place",
        "user is no text",
        "no name",
        "no system",
        "two verdicts",
        "a verdict twice",
        "four verdicts",
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, name):
    """Exit code 2 and one line, before anything is asked or written."""
    arguments, word = wrong(tmp_path, name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "judge.py",
            *map(str, arguments),
            "--model",
            "fake",
            "--base_url",
            "http://127.0.0.1:9/v1",
            "--output",
            str(tmp_path / "scores.jsonl"),
        ],
    )
    with pytest.raises(SystemExit) as caught:
        J.run(J.main)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and word in error and error.count("\n") == 1 and len(error) < 500
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
