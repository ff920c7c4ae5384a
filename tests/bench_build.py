"""Figures of build_data.py against the loopback server.

python tests/bench_build.py [faults kills rate grounding rouge]

faults     1,000 items at concurrency 32 with 429, 500, dropped and hung connections, broken and
           empty replies
kills      the same killed with SIGKILL at ten random moments, compared with an unbroken run
rate       20,000 items from a server that answers in 50 ms, concurrency 64, beside the openai
           client in an empty loop and a bare client of sockets; fewer from servers that take 100
           and 200 ms, and at concurrency 256
grounding  1,000 right replies and 200 with a wrong herb, formula or drug planted
rouge      the filter of self-instruct at 50,000 kept instructions
"""

import asyncio
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OPENAI_API_KEY"] = "sk-bench"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import build_data as D  # noqa: E402
import model as M  # noqa: E402

from fake_openai import Running  # noqa: E402

FAULTS = '{"429": 0.1, "500": 0.05, "drop": 0.02, "hang": 0.02, "broken": 0.05, "empty": 0.02}'


def command(url, output, *more):
    """Run `build_data.py knowledge` in this process, its bar and report into files beside the
    output."""
    sys.argv = [
        "build_data.py",
        "knowledge",
        "--model",
        "fake",
        "--base_url",
        url,
        "--output",
        str(output),
        *more,
    ]
    with (
        open(f"{output}.err", "a", encoding="utf-8") as err,
        open(f"{output}.out", "a", encoding="utf-8") as out,
    ):
        sys.stderr, sys.stdout = err, out
        try:
            M.run(D.main)
        finally:
            sys.stderr, sys.stdout = sys.__stderr__, sys.__stdout__


def ids(folder):
    """(ids kept, ids rejected, prompts that ended in either)."""
    kept, rejected = (
        [json.loads(line)["id"] for line in (folder / f"x{end}.jsonl").open(encoding="utf-8")]
        for end in ("", ".rejected")
    )
    return (
        kept,
        rejected,
        {id if id.count("/") == 2 else id.rsplit("/", 1)[0] for id in kept + rejected},
    )


def faults(n=1000):
    with tempfile.TemporaryDirectory() as folder, Running("--faults", FAULTS) as server:
        folder, start = Path(folder), time.time()
        command(
            server.url,
            folder / "x.jsonl",
            "--count",
            str(n),
            "--concurrency",
            "32",
            "--timeout",
            "3",
        )
        kept, rejected, prompts = ids(folder)
        seen = server.stats()
        reasons = Counter(
            json.loads(line)["reason"].split(":")[0]
            for line in (folder / "x.rejected.jsonl").open(encoding="utf-8")
        )
        needed = n + sum(
            seen["count"][f] for f in ("429", "500", "drop", "hang", "broken", "empty")
        )
        return {
            "items": n,
            "ended": len(prompts),
            "records_doubled": len(kept + rejected) - len({*kept, *rejected}),
            "kept": len(kept),
            "rejected": dict(reasons),
            "faults": seen["count"],
            "requests": seen["requests"],
            "requests_needed": needed,
            "answered_twice": sum(c > 1 for c in seen["answered"].values()),
            "seconds": round(time.time() - start, 1),
        }


def kills(n=1000, times=10):
    with (
        tempfile.TemporaryDirectory() as folder,
        Running("--faults", FAULTS) as unbroken,
        Running("--faults", FAULTS, "--latency", "0.05") as server,
    ):
        broken, whole = Path(folder) / "broken", Path(folder) / "whole"
        broken.mkdir()
        whole.mkdir()
        options = ("--count", str(n), "--concurrency", "32", "--timeout", "3")
        rng, killed, lost = random.Random(0), 0, 0
        while killed < times:
            child = multiprocessing.get_context("fork").Process(
                target=command, args=(server.url, broken / "x.jsonl", *options)
            )
            child.start()
            goal = min(
                n - 40,
                sum(server.stats()["answered"].values()) + rng.randint(20, 2 * n // times - 20),
            )
            while child.is_alive() and sum(server.stats()["answered"].values()) < goal:
                time.sleep(0.02)
            time.sleep(rng.random() * 0.1)
            if not child.is_alive():
                break
            child.kill()
            child.join()
            killed += 1
            text = (broken / "x.replies.jsonl").read_bytes()
            lost = sum(server.stats()["answered"].values()) - text.count(b"\n")
        command(server.url, broken / "x.jsonl", *options)
        command(unbroken.url, whole / "x.jsonl", *options)
        rows = [
            [
                {k: v for k, v in json.loads(line).items() if k != "time"}
                for line in (f / "x.jsonl").open(encoding="utf-8")
            ]
            for f in (broken, whole)
        ]
        answered = server.stats()["answered"]
        return {
            "items": n,
            "killed": killed,
            "records": len(rows[0]),
            "records_equal_an_unbroken_run": rows[0] == rows[1],
            "answers_beyond_the_unbroken_run": sum(answered.values())
            - sum(unbroken.stats()["answered"].values()),
            "at_most_in_flight": 32 * killed,
            "answered_before_last_kill_but_not_on_file": lost,
        }


async def bare(url, n, concurrency, body):
    """Requests per second of a client that is nothing but sockets: what the server allows."""
    host, port = url.split("//")[1].split("/")[0].split(":")
    request = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )
    left = iter(range(n))

    async def work():
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in left:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()

    start = time.time()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return n / (time.time() - start)


async def empty(url, n, concurrency, body):
    """Requests per second of the openai client alone, and its milliseconds of CPU for each: the
    floor under `Client`."""
    from openai import AsyncOpenAI

    left, start, cpu = iter(range(n)), time.time(), time.process_time()
    async with AsyncOpenAI(base_url=url, max_retries=0) as client:

        async def work():
            for _ in left:
                await client.post("/chat/completions", cast_to=object, body=body)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return round(n / (time.time() - start)), round((time.process_time() - cpu) / n * 1e3, 3)


def rate():
    """The server of the promise, and slower ones, which still answer faster than any LLM does."""
    figures = {}
    for n, latency, concurrency in (
        (20000, 0.05, 64),
        (8000, 0.1, 64),
        (4000, 0.2, 64),
        (8000, 0.2, 256),
    ):
        title = f"{latency} s, concurrency {concurrency}"
        figures[title] = rate_at(n, latency, concurrency)
    return figures


def rate_at(n, latency, concurrency):
    parser = M.Parser()
    parser.add_settings(D.Api)
    with tempfile.TemporaryDirectory() as folder, Running("--latency", str(latency)) as server:
        options = ["--model", "fake", "--output", "o", "--base_url", server.url]
        given = parser.parse_args([*options, "--concurrency", str(concurrency)])
        args = D.Api(**vars(given))
        text = "- 黄芪的功效：补气升阳、固表止汗"
        jobs = {f"item {i}": [{"role": "user", "content": f"{text}{i}"}] for i in range(n)}
        body = json.dumps({"model": "fake", "messages": jobs["item 0"]}).encode()
        allowed = asyncio.run(bare(server.url, n // 4, concurrency, body))
        client, memory = D.Client(Path(folder) / "r.jsonl", args), []
        start, cpu = time.time(), time.process_time()
        store = client.store

        def watch(*reply):
            store(*reply)
            if len(client.replies) % (n // 10) == 0:
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)

        client.store = watch
        client.ask(jobs)
        seconds, cpu = time.time() - start, time.process_time() - cpu
        allowed = (allowed + asyncio.run(bare(server.url, n // 4, concurrency, body))) / 2
        alone, alone_cpu = asyncio.run(empty(server.url, n // 4, concurrency, json.loads(body)))
        return {
            "items": len(client.replies),
            "openai_client_alone": alone,
            "its_cpu_ms_per_item": alone_cpu,
            "per_second": round(n / seconds),
            "server_allows_in_theory": round(concurrency / latency),
            "bare_client": round(allowed),
            "share_of_theory": round(n / seconds / concurrency * latency, 3),
            "share_of_bare_client": round(n / seconds / allowed, 3),
            "client_cpu_ms_per_item": round(cpu / n * 1e3, 3),
            "memory_mib": [round(m, 1) for m in memory],
        }


DRUGS = (
    "二甲双胍 阿司匹林 氨氯地平 美托洛尔 硝酸甘油 华法林 胺碘酮 呋塞米 螺内酯 "
    "布洛芬 秋水仙碱 别嘌醇 甲氨蝶呤 来氟米特 羟氯喹 泼尼松 环磷酰胺 左甲状腺素 "
    "甲巯咪唑 奥司他韦 阿奇霉素 左氧氟沙星 异烟肼 利福平 沙丁胺醇 孟鲁司特 氨溴索 "
    "恩替卡韦 熊去氧胆酸 乳果糖 美沙拉秦 蒙脱石散 多潘立酮 莫沙必利 甲硝唑 卡马西平 "
    "丙戊酸钠 左乙拉西坦 多奈哌齐 美金刚 普拉克索 舍曲林 氟西汀 地西泮 唑吡坦 "
    "氯雷他定 西替利嗪 阿昔洛韦 非那雄胺 坦索罗辛 阿仑膦酸钠 硫酸亚铁 叶酸 甲钴胺 "
    "来曲唑 黄体酮 胰岛素 阿托伐他汀 氯吡格雷 舒马普坦"
)
OPENINGS = (
    "您好，",
    "",
    "从中西医的角度看，",
    "这个问题很常见。",
    "简单来说，",
    "一般认为，",
    "临床上，",
    "根据教科书，",
)
TELLING = (
    "{e}的{r}主要是{v}。",
    "关于{e}的{r}，通常包括{v}。",
    "{e}在{r}方面以{v}为主。",
    "说到{r}，{e}可归纳为：{v}。",
    "{v}，这些就是{e}的{r}。",
    "{e}：{r}为{v}，需要记牢。",
)
CLOSINGS = (
    "平时注意休息，饮食清淡，戒烟限酒，多喝温水。",
    "如果出现发热、胸闷或者疼痛加重，应尽快到医院就诊。",
    "具体用药和剂量须由医生当面评估后决定。",
    "每个人体质不同，不要自行购药或随意停药。",
    "孕妇、儿童和老年人更要谨慎。",
    "保持心情舒畅，适当运动，规律作息，有助于恢复。",
    "必要时可以做血常规、超声等检查进一步明确。",
    "中医讲究辨证，同一种病在不同的人身上表现并不一样。",
    "若伴有恶心、呕吐、头晕、乏力，也请告诉医生。",
    "治疗期间定期复查，按时服药，避免劳累和受凉。",
    "理解这些内容，有助于与医生沟通，也便于记忆和复习。",
    "这一点在考试中经常出现，可以结合病机来理解。",
    "注意保暖，避免熬夜，少吃辛辣、油腻和生冷的食物。",
    "病情较重时可能需要住院治疗或手术治疗，请听从专科医生的安排。",
)


def grounding(right=1000, wrong=200):
    """Right replies tell facts of their prompt in varied words, with sentences of general advice
    around them; wrong ones are right ones in which one herb, formula or drug is exchanged for, or
    joined by, one of another entity."""
    entities, prompts, rng = (
        D.read_knowledge(D.DATA / "knowledge.jsonl"),
        D.read_prompts(D.DATA / "prompts"),
        random.Random(0),
    )
    args = type(
        "Options",
        (),
        dict(count=right + wrong, seed=1, model="m", prompts=str(D.DATA / "prompts"), knowledge=""),
    )
    jobs, names = (
        list(D.knowledge_jobs(args, entities, D.read_json_file(D.DATA / "forms.json"), prompts)),
        D.Names(entities),
    )
    pools = {
        "herb": [v for e in entities for v in e.get("组成", [])],
        "formula": [v for e in entities for v in e.get("常用方剂", [])],
        "drug": DRUGS.split(),
    }
    outcomes, planted = Counter(), Counter()
    for i, job in enumerate(jobs):
        facts = rng.sample(job.facts, rng.randint(1, len(job.facts)))
        told = "".join(
            rng.choice(TELLING).format(e=fact.entity, r=fact.relation, v=fact.text)
            for fact in facts
        )
        answer = rng.choice(OPENINGS) + told + "".join(rng.sample(CLOSINGS, rng.randint(1, 3)))
        given, kind = job.messages[1]["content"], "right"
        if i >= right:
            kind = rng.choice(list(pools))
            stranger = rng.choice([value for value in pools[kind] if value not in given])
            known = {*pools["herb"], *pools["formula"], *pools["drug"]}
            told = [value for fact in facts for value in fact.values]
            values = [value for value in told if value in answer and value in known]
            if values and rng.random() < 0.7:
                answer = answer.replace(rng.choice(values), stranger)
            else:
                answer += rng.choice(
                    ("也可配合{v}使用。", "部分患者加用{v}效果更好。", "还可以选用{v}。")
                ).format(v=stranger)
        record = {
            "id": str(i),
            "entity": job.facts[0].entity,
            "instruction": f"请介绍{job.facts[0].entity}。",
            "input": "",
            "output": answer,
        }
        reason = D.Sieve(names=names).reason(record, job)
        outcomes["right" if i < right else "wrong", bool(reason)] += 1
        if kind != "right":
            planted[kind, bool(reason)] += 1
        elif reason and outcomes["right", True] <= 5:
            print(f"  right one rejected: {reason} {record.get('strangers')} {answer[:60]}")
    return {
        "right": right,
        "right_rejected": outcomes["right", True],
        "wrong": wrong,
        "wrong_caught": outcomes["wrong", True],
        "caught": {
            kind: f"{planted[kind, True]} of {planted[kind, True] + planted[kind, False]}"
            for kind in pools
        },
    }


def rouge(n=50000, new=500):
    """Instructions of 10 to 40 characters: the questions of data/train.jsonl cut and joined at
    random, so that their characters are as frequent as in real ones. Filled without the filter,
    which would refuse many of them."""
    rng = random.Random(0)
    rows = D.read_instructions(D.DATA / "train.jsonl", answers=True) + D.read_instructions(
        D.DATA / "seed_tasks.jsonl", answers=True
    )
    texts = [row["instruction"] + row["output"] for row in rows]

    def draw():
        a, b = rng.choice(texts), rng.choice(texts)
        i, j = rng.randrange(len(a)), rng.randrange(len(b))
        return (a[i : i + rng.randint(5, 20)] + b[j : j + rng.randint(5, 20)]) or a

    kept = D.TokenIndex()
    for _ in range(n):
        text = draw()
        words, bag = D.split_words(text)
        kept.add(bag, (words, text))
    size, start, dropped = len(kept.texts), time.process_time(), 0
    for _ in range(new):
        dropped += bool(D.most_like(kept, draw())[1])
    return {
        "kept": size,
        "new": new,
        "dropped": dropped,
        "new_per_cpu_second": round(new / (time.process_time() - start)),
    }


if __name__ == "__main__":
    figures = {}
    for name in sys.argv[1:] or ("faults", "kills", "rate", "grounding", "rouge"):
        figures[name] = globals()[name]()
        print(name, json.dumps(figures[name], ensure_ascii=False), flush=True)
    print(json.dumps(figures, ensure_ascii=False))
