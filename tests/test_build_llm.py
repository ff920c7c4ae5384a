"""build_data.py with an API: readers, prompts, checks, commands against the loopback server."""

import gc
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import build_data as D
import generate as G
import model as M
import train as T

import pytest
from conftest import ROOT, plain_prompt
from fake_openai import Running, Scripted

DATA = ROOT / "data"
REAL = ROOT.parent / "shared" / "data"
KEY = "sk-planted-4711"
FORMS = json.loads((DATA / "forms.json").read_text(encoding="utf-8"))
ENTITIES = D.read_knowledge(DATA / "knowledge.jsonl")
CMEKG = [
    "相关疾病",
    "相关症状",
    "临床表现",
    "检查",
    "用法用量",
    "贮藏",
    "性状",
    "禁忌",
    "不良反应",
    "有效期",
    "注意事项",
    "适应症",
    "成份",
    "病因",
    "治疗",
    "规格",
    "并发症",
    "药物相互作用",
    "主治",
    "入药部位",
    "功效",
    "性味",
    "功能主治",
]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def cli(monkeypatch, *argv):
    """Run the command line; its exit code."""
    monkeypatch.setattr(sys, "argv", ["build_data.py", *map(str, argv)])
    try:
        M.run(D.main)
    except SystemExit as stop:
        return stop.code
    return 0


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_knowledge_base_in_every_form(tmp_path):
    """CMeKG lines, an array, triples as JSON and between tabs (with BOM and CRLF) are the same
    entities."""
    known = [
        {
            "中心词": "麻黄",
            "性味": ["辛", "温"],
            "禁忌": ["体虚者慎用"],
            "注意事项": ["高血压者慎用"],
        },
        {"中心词": "感冒", "临床表现": ["鼻塞", "咳嗽"]},
        {"中心词": "某片", "成份": ["甲\u2028乙"], "适应症": ["感冒"]},
    ]
    triples = [(e["中心词"], r, v) for e in known for r in e if r != "中心词" for v in e[r]]
    (tmp_path / "lines").write_text(
        "\n".join(json.dumps(e, ensure_ascii=False) for e in known), encoding="utf-8"
    )
    (tmp_path / "array").write_text(json.dumps(known), encoding="utf-8")
    (tmp_path / "triples").write_text(
        "\n".join(json.dumps(dict(zip(("head", "relation", "tail"), t))) for t in triples),
        encoding="utf-8",
    )
    (tmp_path / "tabs").write_bytes(
        b"\xef\xbb\xbf" + "".join("\t".join(t) + "\r\n" for t in triples).encode()
    )
    wanted = [
        {
            "中心词": "麻黄",
            "类型": "中药",
            "性味": ["辛", "温"],
            "使用注意": ["体虚者慎用", "高血压者慎用"],
        },
        {"中心词": "感冒", "类型": "疾病", "相关症状": ["鼻塞", "咳嗽"]},
        {"中心词": "某片", "类型": "药物", "组成": ["甲\u2028乙"], "主治": ["感冒"]},
    ]
    for name in ("lines", "array", "triples", "tabs"):
        assert D.read_knowledge(tmp_path / name) == wanted, name


def test_each_relation_of_cmekg_has_a_form():
    names = json.loads((DATA / "relations.json").read_text(encoding="utf-8"))["relations"]
    assert len(CMEKG) == 23 and {names.get(r, r) for r in CMEKG} <= {
        r for forms in FORMS.values() for r in forms
    }


def job_options(count, seed=0):
    return type(
        "Options",
        (),
        {
            "count": count,
            "seed": seed,
            "model": "m",
            "prompts": str(DATA / "prompts"),
            "knowledge": "k",
        },
    )


def test_prompts_hold_facts_of_their_entities_and_a_greater_count_changes_none():
    prompts = D.read_prompts(DATA / "prompts")
    jobs = list(D.knowledge_jobs(job_options(400), ENTITIES, FORMS, prompts))
    assert (
        list(D.knowledge_jobs(job_options(90), ENTITIES, FORMS, prompts)) == jobs[:90]
        and len({j.key for j in jobs}) == 400
    )
    assert {j.form for j in jobs} == {name for name, form in prompts.items() if form["weight"]}
    by_name = {e["中心词"]: e for e in ENTITIES}
    for job in jobs:
        text = job.messages[1]["content"]
        assert "$" not in text and "JSON" in job.messages[0]["content"] and job.facts
        for fact in job.facts:
            assert f"- {fact.entity}的{fact.relation}：{fact.text}" in text
            assert fact.relation == "辨证论治" or fact.values == by_name[fact.entity][fact.relation]
        entity = job.facts[0].entity
        assert job.key.startswith(f"{entity}#")
        if job.form == "differential":
            (other,) = {fact.entity for fact in job.facts} - {entity}
            assert set(by_name[entity]["相关症状"]) & set(by_name[other]["相关症状"])
        if job.form == "interaction":
            warned = {fact.entity for fact in job.facts if fact.relation == "使用注意"}
            assert warned - {entity} <= set(by_name[entity]["组成"])


def test_names_are_found_by_longest_match():
    names = D.Names(ENTITIES)
    assert names.find("四逆汤") == {"四逆汤"} and names.find("当归四逆汤治手足厥寒") == {
        "当归四逆汤"
    }
    assert names.strangers("流感可用银翘散", "流行性感冒用银翘散") == []  # another name of the same
    assert names.strangers("可用四逆汤", "当归四逆汤") == [
        "四逆汤"
    ]  # a formula in a longer one is another
    assert names.strangers("他有痛风", "缺铁性贫血") == ["痛风"]
    assert names.strangers("宜用二甲双胍，注意卧床休息、戒烟", "2型糖尿病") == [
        "二甲双胍"
    ]  # care is no drug


@pytest.mark.parametrize(
    "content, word",
    [
        ("", "empty"),
        ("好的，如下", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"items": [{"instruction": "甲", "output": "乙"}', "no JSON"),
        ("[]", "wanted"),
        ('{"items": []}', "no items"),
        ('{"items": [{"instruction": "甲"}]}', "wanted"),
        ('{"items": [{"instruction": "甲", "output": 3}]}', "wanted"),
        ('{"items": "x"}', "wanted"),
        ('{"items": null}', "wanted"),
        ("null", "wanted"),
        ('{"items": [{"instruction": "甲", "output": "乙", "input": ["丙"]}]}', "wanted"),
        ('{"items": [{"instruction": "甲", "output": "乙", "input": 3}]}', "wanted"),
    ],
)
def test_a_reply_is_parsed_strictly(content, word):
    with pytest.raises(ValueError, match=word):
        D.parse_items(content, D.TASK)


def test_fences_and_thoughts_are_let_pass():
    text = (
        '{"items": [{"instruction": " 甲 ", "output": "乙", "input": "丙", '
        '"messages": [{"role": "user", "content": "丁"}], "id": 3}]}'
    )
    thought = f"嗯\n</think>\n{text}"  # as where the template opened the thoughts
    for content in (text, f"```json\n{text}\n```", f"<think>\n{thought}", thought):
        assert D.parse_items(content, D.TASK) == [
            {"instruction": "甲", "output": "乙", "input": "丙"}
        ]


def test_sieve():
    """Each reason on a case of its own; the facts told are noted."""
    sieve = D.Sieve(names=D.Names(ENTITIES))
    effects = ["补气升阳", "固表止汗"]
    fact = D.Fact("黄芪", "中药", "功效", "、".join(effects), effects)
    job = D.Job("key", "single", [{"content": f"- 黄芪的功效：{fact.text}"}], [fact])

    def reason(question, answer):
        record = {
            "id": "1",
            "entity": "黄芪",
            "instruction": question,
            "input": "",
            "output": answer,
        }
        return sieve.reason(record, job), record

    good = ("黄芪有什么功效？", "黄芪能够补气升阳，常用来改善气虚乏力。")
    kept = reason(*good)
    assert (
        kept[0] == ""
        and kept[1]["values"] == ["补气升阳"]
        and kept[1]["relations"] == ["功效"]
        and kept[1]["score"] == 0.5
    )
    assert reason(*good)[0] == "duplicate"
    assert reason("黄芪有什么功效呢？", good[1])[0] == "near duplicate"
    assert reason(good[0], "补气升阳")[0] == "too short"
    assert (
        reason(good[0], "Astragalus is good, 补气升阳, for the whole body and the mind")[0]
        == "not Chinese"
    )
    assert reason(good[0], "抱歉，我不能提供医疗建议，黄芪补气升阳请问医生。")[0] == "refusal"
    assert (
        reason(good[0], "根据以上知识，黄芪能够补气升阳，固表止汗。")[0] == "speaks of its prompt"
    )
    assert (
        reason(good[0], "黄芪对身体有许多好处，许多人都喜欢用它。")[0]
        == "names no value of its facts"
    )
    wrong = reason(good[0], "黄芪能够补气升阳，与柴胡同用效果更佳。")
    assert wrong[0] == "names what its facts do not" and wrong[1]["strangers"] == ["柴胡"]
    for input, word in (
        ("我在服用柴胡", "names what its facts do not"),
        ("抱歉", "refusal"),
        ("", ""),
    ):
        record = {
            "id": "1",
            "entity": "黄芪",
            "instruction": "黄芪有何益处？",
            "input": input,
            "output": "黄芪的益处在于固表止汗，请遵医嘱。",
        }
        assert sieve.reason(record, job) == word


OUTPUT = (
    "感冒常见的症状包括鼻塞、流涕、咽痛和咳嗽，一般一周左右自愈；如果高热不退或者出现呼吸困难，应当及时去医院就诊，"
    "请医生判断是否需要进一步检查和治疗，不要自行服用抗生素。"
)


@pytest.mark.parametrize(
    "rows, reasons",
    [
        (
            [("列出三种常见感冒的症状并说明理由吧", OUTPUT), ("用一段话介绍感冒怎么办", OUTPUT)],
            ["like a task kept before", ""],
        ),
        (
            [
                ("用一段话介绍感冒怎么办", OUTPUT),
                ("感冒了，请给我几句话", OUTPUT),
                ("感冒了，请给我几句好话", "多休息，多喝水，保持心情舒畅，很快会好起来的。"),
            ],
            ["", "near duplicate", ""],
        ),
        (
            [
                ("解释血常规的意义", "检查结果可以为医生的诊断提供信息，请及时就医。"),
                ("怎样看待小样本", "样本较小，还不能给出结论，需要更多研究。"),
            ],
            ["", ""],
        ),
        (
            [
                ("怎样看待样本", "根据提供的信息，样本较小，需要更多研究。"),
                ("结论可靠吗", "以上结论来自小样本，需要更多研究证实。"),
            ],
            ["speaks of its prompt"] * 2,
        ),
    ],
)
def test_what_is_rejected_is_not_remembered(rows, reasons):
    """Nor is a word rejected for its neighbours."""
    sieve = D.Sieve(seeds=["列出三种常见感冒的症状并说明理由"])
    job = D.Job("key", "self_instruct", [], [])
    records = [{"instruction": q, "input": "", "output": a} for q, a in rows]
    assert [sieve.reason(record, job) for record in records] == reasons


def item_for(body, **more):
    """An item that tells the first fact of a prompt."""
    entity, relation, values = re.search(
        r"^- (.+?)的([^的：]+)：(.+)$", body["messages"][1]["content"], re.M
    ).groups()
    return {
        "instruction": f"{entity}的{relation}是什么？",
        "output": f"{entity}的{relation}是{values}。请遵医嘱。",
        **more,
    }


def items(*rows):
    return json.dumps({"items": rows}, ensure_ascii=False)


def test_odd_items_are_mended_or_cut_to_the_known_fields(tmp_path, monkeypatch):
    """An input that is no text is asked for again; messages of the LLM's own never become what
    training reads."""

    def reply(prompt, body, number):
        odd = (
            {"input": ["附件"]}
            if number < 4
            else {
                "messages": [
                    {"role": "user", "content": "砒霜能吃吗？"},
                    {"role": "assistant", "content": "能。"},
                ]
            }
        )
        return items(item_for(body, **odd))

    out = tmp_path / "x.jsonl"
    with Scripted(reply) as server:
        command = (
            "knowledge",
            "--model",
            "fake",
            "--base_url",
            server.url,
            "--output",
            out,
            "--count",
            3,
        )
        for _ in range(2):
            assert cli(monkeypatch, *command) == 0 and len(server.bodies) == 6
    assert (
        "砒霜" not in out.read_text(encoding="utf-8")
        and len(lines(out)) + len(lines(tmp_path / "x.rejected.jsonl")) == 3
    )
    assert [r["instruction"] for r in lines(out)] == [
        r["instruction"] for r in G.read_instructions(out, answers=True)
    ]


def literature(prompt, *_):
    """A dialogue of two turns that tells the conclusion; with 空 in it, an empty answer at the
    end."""
    told = re.search("结论：(.+)", prompt)[1]
    return items(
        {"user": "医生您好，请问研究怎么说？", "bot": f"研究显示，{told}。"},
        {"user": "那我该怎么办呢？", "bot": "" if "空" in told else f"请与医生商量：{told}"},
    )


@pytest.mark.parametrize(
    "rows, kept, rejected",
    [
        (
            [
                ("肝癌研究", "索拉非尼延长晚期患者的总生存期"),
                ("肝癌研究", "手术切除后复发率与肿瘤大小有关"),
                ("肝癌研究#0", "移植标准内的患者获益较大"),
            ],
            3,
            [],
        ),
        ([("甲", "有效，安全。可行")], 1, []),
        (
            [("甲", "空腹血糖与预后无关"), ("乙", "索拉非尼延长总生存期")],
            1,
            ["turns: 2, wanted 2 to 6 and none of them empty"],
        ),
    ],
)
def test_odd_literature(tmp_path, monkeypatch, rows, kept, rejected):
    """Rows of one title, conclusions of short parts, an empty answer: the second run asks nothing,
    stats can read what is kept."""
    path, out = (
        write(
            tmp_path / "l.jsonl",
            "\n".join(
                json.dumps(dict(zip(("标题", "结论", "疾病"), (*row, "肝癌")))) for row in rows
            ),
        ),
        tmp_path / "x.jsonl",
    )
    with Scripted(literature) as server:
        command = (
            "literature",
            "--model",
            "fake",
            "--base_url",
            server.url,
            "--output",
            out,
            "--literature",
            path,
            "--count",
            len(rows) + 1,
        )
        for _ in range(2):
            assert cli(monkeypatch, *command) == 0 and len(server.bodies) == len(rows) + 1
    keys = [r["key"] for r in lines(tmp_path / "x.replies.jsonl")]
    assert (
        len({*keys}) == len(rows) + 1
        and f"{rows[0][0]}#0/literature/fake" in keys
        and f"{rows[0][0]}#1/literature/fake" in keys
    )
    reasons = [
        r["reason"] for r in lines(tmp_path / "x.rejected.jsonl") if "duplicate" not in r["reason"]
    ]
    assert (
        len(lines(out)) == kept
        and [*dict.fromkeys(reasons)] == rejected
        and cli(monkeypatch, "stats", out) == 0
    )


def test_what_was_paid_becomes_records_before_the_error(tmp_path, monkeypatch, capfd):
    """The credit ends after five replies: exit code 2, and five prompts' records; another run keeps
    them."""

    def reply(prompt, body, number):
        refusal = {
            "error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}
        }
        return items(item_for(body)) if number <= 5 else (429, refusal)

    out = tmp_path / "x.jsonl"
    with Scripted(reply) as server:
        for _ in range(2):
            gc.collect()  # the error of the first run holds its file
            assert "exceeded your current quota" in one_line(
                monkeypatch,
                capfd,
                "knowledge",
                "--model",
                "fake",
                "--base_url",
                server.url,
                "--output",
                out,
                "--count",
                20,
                "--concurrency",
                1,
            )
            ended = lines(out) + lines(tmp_path / "x.rejected.jsonl")
            assert (
                len(ended) == 20
                and sum("quota" in r.get("reason", "") for r in ended) == 15
                and len(lines(out)) > 2
            )


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_a_signal_waits_for_the_replies_in_flight(tmp_path, number):
    """Ctrl-C has ended `2>&1 | tee log` before: nobody reads what is said. What is in flight is
    paid, and no later run pays it again."""

    def as_in_a_terminal():  # where Ctrl-C is not ignored, whoever runs the tests
        signal.signal(number, signal.SIG_DFL)

    with Running("--latency", "1") as server:
        command = [
            sys.executable,
            str(ROOT / "build_data.py"),
            "knowledge",
            "--model",
            "fake",
            "--base_url",
            server.url,
            "--output",
            str(tmp_path / "x.jsonl"),
            "--count",
            "12",
            "--concurrency",
            "6",
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=as_in_a_terminal,
        )
        while sum(server.stats()["answered"].values()) < 6:
            assert process.poll() is None
            time.sleep(0.05)
        if number == signal.SIGINT:
            process.stdout.close()
            process.send_signal(number)
            assert process.wait(60) == 0
        else:
            process.send_signal(number)
            assert "stopped: interrupted" in process.communicate()[0] and process.returncode == 0
        assert (
            len(lines(tmp_path / "x.replies.jsonl")) == server.stats()["requests"] == 6
            and len(lines(tmp_path / "x.jsonl")) > 6
        )
        subprocess.run(command, check=True, capture_output=True)
        assert set(server.stats()["answered"].values()) == {1}


def test_outputs_share_no_files(tmp_path, monkeypatch):
    with Running() as server:
        for name in ("run0.1", "run0.2", "a.json", "b.jsonl"):
            assert (
                cli(
                    monkeypatch,
                    "knowledge",
                    "--model",
                    "fake",
                    "--base_url",
                    server.url,
                    "--output",
                    tmp_path / name,
                    "--count",
                    1,
                )
                == 0
            )
        assert server.stats()["requests"] == 4
    assert {
        f"{name}.{end}"
        for name in ("run0.1", "run0.2", "a", "b")
        for end in ("replies.jsonl", "rejected.jsonl", "html")
    } < {p.name for p in tmp_path.iterdir()}


def test_a_dry_run_tells_of_repairs_and_takes_any_seed(tmp_path, monkeypatch, capsys):
    assert (
        cli(
            monkeypatch,
            "knowledge",
            "--model",
            "m",
            "--output",
            tmp_path / "x.jsonl",
            "--seed",
            "-1",
            "--dry_run",
        )
        == 0
    )
    assert "a reply that cannot be parsed is asked once more" in capsys.readouterr().out


def slow_rouge(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return 2 * table[-1][-1] / (len(a) + len(b))


def test_rouge_filter_equals_comparing_with_all():
    """Bit-parallel LCS against the textbook's table, the filter with its bound against comparing
    with every text."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("高血压症状abc ", k=rng.randint(1, 12))) for _ in range(150)]
    kept, plainly = D.TokenIndex(), []
    for text in texts:
        words = split(text)
        scores = [slow_rouge(words, split(other)) for other in plainly]
        score, like = D.most_like(kept, text)
        assert score == pytest.approx(max([s for s in scores if s >= 0.7], default=0), abs=1e-3)
        if not like:
            plainly.append(text)
    assert 20 < len(plainly) < 130 and [t for _, (_, t) in kept.texts] == plainly


def split(text):
    """Characters, and latin words whole: written otherwise than in build_data."""
    out, word = [], ""
    for c in text + " ":
        if c in "abcdefghijklmnopqrstuvwxyz0123456789":
            word += c
        else:
            out += [word] * bool(word) + [c] * (not c.isspace())
            word = ""
    return out


def test_knowledge_end_to_end(tmp_path, monkeypatch, capsys):
    """Broken and empty replies are repaired once; every prompt ends in a kept or a rejected line; a
    second run asks nothing and writes the same; no key anywhere; a record says where it comes
    from."""
    out = tmp_path / "x.jsonl"
    with Running("--key", KEY, "--faults", '{"broken": 0.2, "empty": 0.1}') as server:
        command = (
            "knowledge",
            "--model",
            "fake",
            "--base_url",
            server.url,
            "--output",
            out,
            "--count",
            40,
            "--concurrency",
            8,
        )
        assert cli(monkeypatch, *command) == 0
        seen = server.stats()
        assert (
            seen["requests"] == 40 + seen["count"]["broken"] + seen["count"]["empty"]
            and seen["count"]["broken"] > 2
        )
        first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert cli(monkeypatch, *command) == 0 and server.stats()["requests"] == seen["requests"]
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept, rejected = lines(out), lines(tmp_path / "x.rejected.jsonl")
    prompts = {r["id"].rsplit("/", 1)[0] for r in kept + rejected}
    assert (
        len(prompts) == 40
        and len({r["id"] for r in kept + rejected}) == len(kept + rejected) == 200
    )
    for r in kept:
        assert (
            r["model"] == "fake-2026"
            and r["params"]["temperature"] == 1.0
            and len(r["prompt_hash"]) == 16
            and r["time"]
        )
        assert (
            r["usage"]["completion_tokens"] == 300
            and r["values"]
            and r["strangers"] == []
            and 0 < r["score"] <= 1
        )
        assert any(v in r["output"] for v in r["values"])
    assert not any(KEY.encode() in data for data in first.values()) and KEY not in "".join(
        capsys.readouterr()
    )
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert (
        '"records": {"kept": ' + str(len(kept)) in page
        and "$data" not in page
        and "http" not in page.replace("http://www.w3.org", "")
    )
    G.read_instructions(out, answers=True)


def test_literature_rows_are_one_prompt_everywhere(tmp_path, monkeypatch, base):
    """The row built, the row that training reads and encodes, the prompt of a chat that has come so
    far: the same bytes."""
    out = tmp_path / "l.jsonl"
    with Running() as server:
        assert (
            cli(
                monkeypatch,
                "literature",
                "--model",
                "fake",
                "--base_url",
                server.url,
                "--output",
                out,
                "--count",
                30,
            )
            == 0
        )
    built, template = lines(out), G.load_template("literature_template")
    tokenizer = D.load_tokenizer(base)
    read = G.read_instructions(out, answers=True)
    assert len(built) >= 25 and len({len(r["messages"]) for r in built}) == 5
    for row, record in zip(built, read):
        prompt = plain_prompt(template, row["instruction"], "")
        assert (
            row["instruction"].startswith(" <user>: ")
            and row["output"] == row["messages"][-1]["content"]
        )
        encoded = T.encode_example(tokenizer, template, record, T.TrainConfig(cutoff_len=100000))
        first = encoded.mask.index(True)
        assert (
            encoded.ids[:first] == tokenizer.encode(prompt, bos=True)
            and plain_prompt(template, record["instruction"], "") == prompt
        )
        texts, asked = [m["content"] for m in row["messages"]], []
        replies = iter(texts[1::2])

        def answer(prompt, asked=asked, replies=replies):
            asked.append(prompt)
            yield next(replies)

        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts[0::2]) + "\n"))
        G.chat(
            answer,
            lambda messages: G.render_prompt(tokenizer, template, messages, True),
            True,
            10**6,
            "",
        )
        assert asked[-1] == tokenizer.encode(prompt, bos=True)


def test_self_instruct_keeps_what_is_new(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    with Running() as server:
        assert (
            cli(
                monkeypatch,
                "self-instruct",
                "--model",
                "fake",
                "--base_url",
                server.url,
                "--output",
                out,
                "--count",
                20,
            )
            == 0
        )
    seeds = [t["instruction"] for t in G.read_instructions(DATA / "seed_tasks.jsonl", answers=True)]
    kept = [r["instruction"] for r in lines(out)]
    assert 3 <= len(kept) < 100 and len(lines(tmp_path / "s.rejected.jsonl")) == 100 - len(kept)
    for i, text in enumerate(kept):
        assert max(slow_rouge(split(text), split(other)) for other in seeds + kept[:i]) < 0.7


@pytest.mark.slow
def test_stats_of_bentsaos_rows(tmp_path, monkeypatch, capsys):
    """BenTsao's own rows: the numbers that 256, 320, 384 and 512 tokens cut were measured for this
    project before."""
    if not REAL.is_dir():
        pytest.skip("real data not there")
    shutil.copy(REAL / "llama_tokenizer.model", tmp_path / "tokenizer.model")
    assert cli(monkeypatch, "stats", REAL / "bentsao_llama_data.json", "--tokenizer", tmp_path) == 0
    out = capsys.readouterr().out
    assert "kept 8,658" in out
    assert "tokens: all 1,886,221, a prompt 118, an answer 100, a character 1.74" in out
    assert "% parts of characters 62.6\n" in out
    assert numbers_at_limits(out, "rows cut") == [1985, 444, 85, 13, 0, 0]
    assert (
        numbers_at_limits(out, "left out") == [3, 0, 0, 0, 0, 0]
        and "256 tokens (22.9%) 1,985" in out
    )


def numbers_at_limits(out, title):
    line = re.search(f"^{title} at: (.*)$", out, re.M)[1]
    return [int(number.replace(",", "")) for number in re.findall(r"\) ([\d,]+?)(?=, \d|$)", line)]


def test_stats_in_tokens(tmp_path, monkeypatch, capsys, records, base):
    """By hand: what the tokenizer makes of each row, summed and compared with the limits."""
    assert cli(monkeypatch, "stats", records, "--tokenizer", base) == 0
    out, template, tokenizer = (
        capsys.readouterr().out,
        G.load_template("med_template"),
        D.load_tokenizer(base),
    )
    prompts = [
        tokenizer.encode(plain_prompt(template, r["instruction"]), bos=True) for r in lines(records)
    ]
    rows = [
        tokenizer.encode(plain_prompt(template, r["instruction"]) + r["output"], bos=True, eos=True)
        for r in lines(records)
    ]
    total, prompt = sum(map(len, rows)), sum(map(len, prompts))
    answer = total - prompt
    assert f"all {total:,}, a prompt {prompt / 8:.0f}, an answer {answer / 8:.0f}, " in out
    limits = (256, 320, 384, 512, 768, 1024)
    assert numbers_at_limits(out, "rows cut") == [
        sum(len(row) > limit for row in rows) for limit in limits
    ]
    assert numbers_at_limits(out, "left out") == [
        sum(len(ids) + 2 > limit for ids in prompts) for limit in limits
    ]


def test_stats_count(tmp_path, monkeypatch, capsys):
    rows = [
        {
            "instruction": q,
            "output": a,
            "entity": "黄芪",
            "relations": ["功效"],
            "values": v,
            "form": "single",
            "kind": "中药",
        }
        for q, a, v in [
            ("黄芪有什么功效？", "黄芪能补气升阳。", ["补气升阳"]),
            ("黄芪有什么功效？", "黄芪能补气升阳。", ["补气升阳"]),
            ("黄芪归什么经？", "黄芪归脾经和肺经。", ["脾经", "肺经"]),
        ]
    ]
    rows.append(
        {
            "instruction": "痛风看哪科？",
            "output": "痛风看风湿免疫科。" * 9,
            "entity": "痛风",
            "relations": ["所属科室"],
            "values": [],
            "form": "single",
        }
    )
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    (tmp_path / "r.rejected.jsonl").write_text(
        '{"reason": "refusal"}\n{"reason": "no JSON: x"}\n', encoding="utf-8"
    )
    assert cli(monkeypatch, "stats", path, "--html", tmp_path / "r.html") == 0
    out = capsys.readouterr().out
    for line in (
        "kept 4, rejected 2",
        "refusal 1, no JSON 1",
        "single 4",
        "功效 3",
        "exact 1, near (4-grams) 1",
        "0 to 49 3, 50 to 99 1",
        "entities asked about 2",
        "values told 3",
        "departments: 风湿免疫科 1",
    ):
        assert line in out, line
    assert "values told" in (tmp_path / "r.html").read_text(encoding="utf-8")


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


ENTITY = '{"中心词": "麻黄", "类型": "中药", "功效": ["发汗解表"]}\n'
BAD_KNOWLEDGE = [
    ("", "empty"),
    (" \n\r\n", "empty"),
    (ENTITY + "{", "line 2"),
    (ENTITY + ENTITY, "twice"),
    (ENTITY + '["麻黄"]', "line 2"),
    (ENTITY + "3", "line 2"),
    ('{"类型": "中药"}', "中心词"),
    ('{"中心词": "", "类型": "中药"}', "中心词"),
    ('{"中心词": 5}', "中心词"),
    ('{"中心词": "麻黄", "类型": 7}', "类型"),
    ('{"中心词": "麻黄", "功效": []}', "功效"),
    ('{"中心词": "麻黄", "功效": ["", "甲"]}', "功效"),
    ('{"中心词": "麻黄", "功效": "发汗"}', "功效"),
    ('{"中心词": "麻黄", "功效": null}', "功效"),
    ('{"中心词": "麻黄", "功效": [1]}', "功效"),
    (ENTITY.encode("gbk"), "not UTF-8"),
    ("麻黄\t功效\t发汗\n".encode("gbk"), "not UTF-8"),
    ("麻黄\t功效\n", "line 1"),
    ("麻黄\t功效\t发汗\n桂枝\t\t温通\n", "line 2"),
    ('{"head": "麻黄", "relation": "功效"}', "tail"),
    ('{"head": "麻黄", "relation": 3, "tail": "x"}', "line 1"),
    ('{"head": "麻黄", "relation": "中心词", "tail": "x"}', "no 中心词"),
    ('{"中心词": "甲", "临床表现": ["咳"], "相关症状": 7}', "wanted a list"),
    (
        '{"中心词": "甲", "中医证型": ["乙", "丙"], "常用方剂": ["丁"]}',
        "line 1: 甲 has 2 中医证型 and 1 常用方剂",
    ),
    ("[" + ENTITY, "array"),
    (b"\x00\x01\x02", "line 1"),
    ('{"中心词": "麻黄", "类型": "矿物", "功效": ["发汗"]}', "no form"),
]
BAD_OPTIONS = [
    (["--model", "m", "--count", "0"], "count"),
    (["--model", "m", "--mix", "unknown=3"], "mix"),
    (["--model", "m", "--mix", "single"], "mix"),
    (["--model", "m", "--concurrency", "0"], "concurrency"),
    (["--model", "m", "--timeout", "-1"], "timeout"),
    ([], "--model"),
    (["--model", "m", "--max_cost", "3"], "prices"),
    (["--model", "m", "--max_cost", "3", "--price_out", "1"], "prices"),
    (["--model", "m", "--max_cost", "nan", "--price_in", "1", "--price_out", "1"], "max_cost"),
    (["--model", "m", "--retries", "many"], "retries"),
    (["--model", "m", "--prompts", "nowhere"], "no prompts"),
    (["--model", "m", "--knowledge", "nowhere"], "nowhere"),
    (["--model", "m", "--output", "/proc/x.jsonl"], "/proc/x.replies.jsonl"),
    (["--model", "m", "--base_url", "nonsense"], "nonsense"),
    (["--modell", "m"], "--model"),
]


def one_line(monkeypatch, capfd, *argv):
    assert cli(monkeypatch, *argv) == 2
    err = capfd.readouterr().err
    said = [line for line in err.split("\n") if line and "reply/s" not in line]
    assert (
        len(said) == 1
        and said[0].startswith("error: ")
        and "Traceback" not in err
        and KEY not in err
    ), err
    return said[0]


@pytest.mark.parametrize("text, word", BAD_KNOWLEDGE)
def test_a_bad_knowledge_base_is_one_line(tmp_path, monkeypatch, capfd, text, word):
    path = write(tmp_path / "k.jsonl", text)
    assert word in one_line(
        monkeypatch,
        capfd,
        "knowledge",
        "--model",
        "m",
        "--knowledge",
        path,
        "--output",
        tmp_path / "o.jsonl",
        "--dry_run",
    )


@pytest.mark.parametrize("options, word", BAD_OPTIONS)
def test_a_bad_option_is_one_line(tmp_path, monkeypatch, capfd, options, word):
    output = [] if "--output" in options else ["--output", tmp_path / "o.jsonl"]
    assert word in one_line(
        monkeypatch, capfd, "knowledge", *output, "--retries", "0", "--concurrency", "2", *options
    )


def test_other_bad_inputs_are_one_line(tmp_path, monkeypatch, capfd):
    def knowledge(*more):
        return one_line(
            monkeypatch,
            capfd,
            "knowledge",
            "--model",
            "m",
            "--output",
            tmp_path / "o.jsonl",
            "--base_url",
            "http://127.0.0.1:9/v1",
            *more,
        )

    (tmp_path / "bad").mkdir()
    write(tmp_path / "bad" / "x.json", '{"weight": 1, "prompt": ["a"]}')
    assert "kinds" in knowledge("--prompts", tmp_path / "bad")
    write(tmp_path / "o.jsonl", "{}\n")
    assert "o.jsonl" in knowledge() and (tmp_path / "o.jsonl").read_text() == "{}\n"
    write(tmp_path / "o.replies.jsonl", "{}\n")
    assert "o.jsonl is not of this" in knowledge()  # judge's, for instance
    (tmp_path / "o.jsonl").unlink()
    assert "line 1" in knowledge()
    write(tmp_path / "l.jsonl", '{"标题": "甲", "疾病": "乙"}\n')
    assert "结论" in one_line(
        monkeypatch,
        capfd,
        "literature",
        "--model",
        "m",
        "--output",
        tmp_path / "p.jsonl",
        "--literature",
        tmp_path / "l.jsonl",
    )
    write(tmp_path / "s.jsonl", '{"instruction": "甲"}\n')
    assert "line 1" in one_line(
        monkeypatch,
        capfd,
        "self-instruct",
        "--model",
        "m",
        "--output",
        tmp_path / "q.jsonl",
        "--seed_tasks",
        tmp_path / "s.jsonl",
    )
    assert "nowhere.jsonl" in one_line(monkeypatch, capfd, "stats", tmp_path / "nowhere.jsonl")
    # A folder is refused before anything is paid for, and so is a folder without the form.
    asked = ("literature", "--model", "m")
    assert "new/" in one_line(monkeypatch, capfd, *asked, "--output", f"{tmp_path}/new/")
    write(tmp_path / "bad" / "x.json", '{"prompt": ["a"]}')
    asked += ("--output", tmp_path / "y.jsonl", "--prompts", tmp_path / "bad")
    assert "no form literature" in one_line(monkeypatch, capfd, *asked)
    monkeypatch.setenv("OPENAI_API_KEY", "换成自己的密钥")
    assert "OPENAI_API_KEY" in one_line(
        monkeypatch, capfd, "knowledge", "--model", "m", "--output", tmp_path / "z.jsonl"
    )
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY" in one_line(
        monkeypatch, capfd, "knowledge", "--model", "m", "--output", tmp_path / "z.jsonl"
    )
    assert not (tmp_path / "z.replies.jsonl").exists()


@pytest.mark.parametrize(
    "change, word",
    [
        ({"prompt": [1]}, "prompt"),
        ({"prompt": "one text"}, "prompt"),
        ({"weight": "3"}, "weight"),
        ({"facts": "1"}, "facts (a number)"),
    ],
)
def test_a_bad_prompt_is_one_line(tmp_path, monkeypatch, capfd, change, word):
    shutil.copytree(DATA / "prompts", tmp_path / "prompts")
    form = json.loads((DATA / "prompts" / "single.json").read_text(encoding="utf-8"))
    write(tmp_path / "prompts" / "single.json", json.dumps({**form, **change}))
    assert word in one_line(
        monkeypatch,
        capfd,
        "knowledge",
        "--model",
        "m",
        "--prompts",
        tmp_path / "prompts",
        "--output",
        tmp_path / "o.jsonl",
        "--dry_run",
    )


@pytest.mark.parametrize(
    "forms",
    [
        {"疾病": {"治疗": {}}},
        {"疾病": [1]},
        {"疾病": {"治疗": {"questions": ["{x}"], "statements": ["{e}{v}"]}}},
        {"疾病": {"治疗": {"questions": ["{e}"], "statements": []}}},
        {"疾病": {"治疗": {"questions": ["{e}{v}"], "statements": ["{e}"]}}},
        {"疾病": {"治疗": {"questions": "{", "statements": ["a"]}}},
        {"疾病": {"治疗": {"questions": "{e}", "statements": ["a"]}}},
        {"疾病": {"治疗": {"questions": ["a"], "statements": ["a"], "notes": ["x"]}}},
        {"疾病": {"治疗": {"questions": ["a"], "statements": ["a"], "alerts": [{"text": "x"}]}}},
    ],
)
def test_bad_forms_are_one_line(tmp_path, monkeypatch, capfd, forms):
    path = write(tmp_path / "f.json", json.dumps(forms))
    for command in (
        ("offline", "--output_dir", tmp_path),
        ("knowledge", "--model", "m", "--output", tmp_path / "o.jsonl", "--dry_run"),
    ):
        assert "f.json holds no forms" in one_line(monkeypatch, capfd, *command, "--forms", path)
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize(
    "change, code",
    [
        ({"entity": ["x"]}, 2),
        ({"kind": ["x"]}, 2),
        ({"form": ["x"]}, 2),
        ({"values": [["a"]]}, 2),
        ({"relations": 5}, 2),
        ({"values": "x"}, 2),
        ({"relations": None, "values": None, "entity": None, "form": None}, 0),
        ({"entity": "黄芪"}, 0),
    ],
)
def test_stats_of_odd_records(tmp_path, monkeypatch, capfd, change, code):
    path = write(
        tmp_path / "r.jsonl",
        json.dumps({"instruction": "问题", "output": "答"})
        + "\n"
        + json.dumps({"instruction": "问题", "output": "答", "entity": "黄芪", **change}),
    )
    write(tmp_path / "r.rejected.jsonl", '{"id": 1}\n')
    if code:
        assert "record 2" in one_line(monkeypatch, capfd, "stats", path)
    else:
        assert cli(monkeypatch, "stats", path) == 0


def test_a_full_disk_stops_in_one_line_and_loses_nothing(tmp_path, monkeypatch, capfd):
    """A limit on the size of files takes the part of the disk: half a line is taken back, the next
    run goes on."""
    with Running() as server:
        command = (
            "knowledge",
            "--model",
            "fake",
            "--base_url",
            server.url,
            "--output",
            tmp_path / "x.jsonl",
            "--count",
            40,
        )

        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
            os._exit(cli(monkeypatch, *command))

        child = multiprocessing.get_context("fork").Process(target=limited)
        child.start()
        child.join()
        said = [
            line for line in capfd.readouterr().err.split("\n") if line and "reply/s" not in line
        ]
        assert child.exitcode == 2 and len(said) == 1 and "replies are safe" in said[0]
        safe = lines(tmp_path / "x.replies.jsonl")
        assert 5 < len(safe) < 40 and (tmp_path / "x.replies.jsonl").read_bytes().endswith(b"\n")
        assert cli(monkeypatch, *command) == 0
        again = lines(tmp_path / "x.replies.jsonl")
        assert again[: len(safe)] == safe and len(again) == 40 == len({r["key"] for r in again})


def test_our_own_server_is_an_endpoint(tmp_path, monkeypatch):
    """generate.py --serve with the small base, which writes no JSON: each prompt asked, asked once
    more to mend the reply, and rejected with the reason; a second run asks nothing."""
    command = (
        "generate.py",
        "--base_model",
        DATA / "tiny",
        "--use_lora",
        "False",
        "--device",
        "cpu",
        "--serve",
        "--port",
        "0",
    )
    server = subprocess.Popen(
        [sys.executable, *map(str, command)], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        url = next(line for line in server.stderr if line.startswith("http")).split()[0] + "v1"
        command = (
            "knowledge",
            "--model",
            "base",
            "--base_url",
            url,
            "--output",
            tmp_path / "x.jsonl",
            "--count",
            3,
            "--max_tokens",
            60,
        )
        assert cli(monkeypatch, *command) == 2  # nothing is kept
        replies = lines(tmp_path / "x.replies.jsonl")
        assert cli(monkeypatch, *command) == 2 and lines(tmp_path / "x.replies.jsonl") == replies
    finally:
        server.kill()
        server.communicate()
    ended = lines(tmp_path / "x.jsonl") + lines(tmp_path / "x.rejected.jsonl")
    prompts = {"/".join(r["id"].split("/")[:3]) for r in ended}
    assert len(prompts) == 3 and all(
        r.get("reason", "kept") and not r.get("reason", "").startswith("no reply") for r in ended
    )
    assert sorted(r["key"] for r in replies) == sorted(
        prompts | {r["key"] for r in replies if r["key"].endswith("/repair")}
    )
    assert all(
        r["usage"]["completion_tokens"] <= 60
        and r["usage"]["prompt_tokens"] > 100
        and r["params"]["model"] == "base"
        for r in replies
    )
