"""The server's page in a real Chromium, if there is one and playwright (pip install playwright)
beside it, on a desktop and on a phone: first in front of a model that says what a test wants, then
in front of data/tiny. Screenshots go into the tests' own folder."""

import json
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import generate as G
import lora as L

import pytest
import torch
from browser import CHROMIUM, PATIENCE, SIZES, ask, chromium, done, mode, opened, send
from conftest import ROOT, plain_prompt
from scripted import scripted
from soak_server import QUESTIONS, make_adapter, start

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine")
slow = pytest.mark.slow
HTML = (
    "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>**粗** & "
    "\u201c引\u201d"
)
MARKDOWN = """# 归脾汤

**组成**：白术、当归、`茯苓`
换行

1. 第一
   - 内一
   - 内二
2. 第二

| 药 | 功效 |
|---|---|
| 黄芪 | **补气** |
| 当归 | 补血 |

```
代码 **不粗**
```

* 完"""
ENDLESS = "说个没完"


class Model:
    """Answers "tuned 1: question", counting; what `says` holds, word for word; and without end."""

    def __init__(self):
        self.asked = []  # (name, [text, ...] of the messages)
        self.says = {}

    def __call__(self, messages, adapted):
        name, question = ("tuned" if adapted else "base"), messages[-1]["content"]
        self.asked.append((name, [message["content"] for message in messages]))
        if question == ENDLESS:
            return "没完" * 1000
        return self.says.get(question, f"{name} {len(self.asked)}: {question}")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def visit(browser, model, tmp_path, request):
    """visit(size="desktop", positions=..., ratings=..., ...) opens the page in front of model."""

    @contextmanager
    def visit(size="desktop", server=(), **context):
        with (
            scripted(model, **dict(server)) as address,
            opened(browser, address, size, tmp_path, request.node.name, **context) as page,
        ):
            yield page

    return visit


sizes = pytest.mark.parametrize("size", SIZES)


def texts(page, selector):
    return page.locator(selector).all_text_contents()


def press(page, selector):
    page.locator(selector).last.click()


# --------------------------------------------------------------------------------------------------
# Markdown


def test_a_chat_with_all_that_is_in_it(visit, model, tmp_path):
    """One walk through the page: Markdown, versions, an edited question, a kept conversation,
    ratings, Esc."""
    model.says["归脾汤"] = MARKDOWN
    ratings = tmp_path / "ratings.jsonl"
    with visit(server={"ratings": str(ratings), "pause": 0.001}) as page:
        ask(page, "归脾汤")
        shown = page.locator(".text")
        heads = texts(page, ".text h3, .text th, .text li li")
        assert heads == ["归脾汤", "内一", "内二", "药", "功效"]
        assert texts(page, ".text strong") == ["组成", "补气"] and shown.locator("pre").count() == 1
        # A second version of a second answer, and back.
        assert ask(page, "黄芪") == ["tuned 2: 黄芪"]
        press(page, ".again")
        assert done(page) == ["tuned 3: 黄芪"]
        press(page, ".answer .previous")
        assert done(page) == ["tuned 2: 黄芪"] and texts(page, ".foot .previous + span") == ["1/2"]
        # One thumb down, the other version's up: a pair.
        press(page, ".down")
        press(page, ".answer .following")
        press(page, ".up")
        page.wait_for_selector(".up[aria-pressed=true]")
        lines = [json.loads(line) for line in ratings.read_text("utf-8").splitlines()]
        prompt = [{"role": "user", "content": "黄芪"}]
        said = [[{"role": "assistant", "content": f"tuned {n}: 黄芪"}] for n in (2, 3)]
        assert [line["prompt"] for line in lines] == [prompt] * 2
        assert [line["chosen"] for line in lines] == [[], said[1]]
        assert [line["rejected"] for line in lines] == [said[0], said[0]]
        # Another question in place of the second; the old one is a step back.
        press(page, ".edit")
        page.fill(".editor textarea", "当归")
        page.press(".editor textarea", "Enter")
        assert done(page) == ["tuned 4: 当归"] and texts(page, ".question") == ["归脾汤", "当归"]
        press(page, ".asked .previous")
        assert texts(page, ".question") == ["归脾汤", "黄芪"]
        # Esc stops, and what came stays.
        send(page, ENDLESS)
        page.wait_for_function("() => [...document.querySelectorAll('.text')].at(-1).textContent")
        page.keyboard.press("Escape")
        assert "没" in done(page)[0] and "已停止" in texts(page, ".foot")[-1]
        # All of it is there after the page is loaded anew.
        page.reload()
        page.click("#chats button")
        assert texts(page, ".question") == ["归脾汤", "黄芪", ENDLESS]
        assert texts(page, ".text h3") == ["归脾汤"]


MARKDOWNS = [
    MARKDOWN,
    "# 一\n## 二\n### 三",
    "一段\n\n二段 **粗** 和 `code **不**`",
    "- 甲\n- 乙\n\n1. 丙\n2. 丁\n3. 戊",
    "7. 七\n8. 八",
    "- 甲\n  - 乙\n    - 丙\n- 丁",
    "文字\n- 项",
    "文字\n# 题\n文字",
    "```python\nif a < b:\n    print('**')\n```\n后",
    "```\n没有结束",
    "| a | b | c |\n|:--|:-:|--:|\n| 1 | 2 | **3** |\n\n后",
    "a | b\n--|--\n1 | 2",
    "一个 | 竖线",
    "2 * 3 * 4，**没有结束",
    "1、黄芪\n2、当归",
    "#没有空格",
    "**多\n行**",
    "-没有空格\n1.没有空格",
    "",
    "\n\n",
]


@slow
def test_markdown_is_what_another_renderer_makes_of_it(visit):
    """Kinds of nodes and their texts, against markdown-it, where both know the form."""
    oracle = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    outline = """root => { const walk = node => node.nodeType === 3 ? node.data : [node.nodeName,
        node.start > 1 ? node.start : "", ...[...node.childNodes].map(walk)]; return walk(root) }"""

    def flat(node, heads):
        """[(path of names, text), ...] without blank texts and names that only group."""
        if isinstance(node, str):
            return [("", " ".join(node.split()))] if node.strip() else []
        name, number, *inside = node
        name = "" if name in ("DIV", "THEAD", "TBODY", "P") else f"{heads.get(name, name)}{number} "
        return [(name + path, text) for part in inside for path, text in flat(part, heads)]

    with visit() as page:
        for text in MARKDOWNS:
            box = f"(n => (n.append(...markdown({json.dumps(text)})), n))(make('div'))"
            html = re.sub(' style="[^"]*"', "", f"<div>{oracle.render(text)}</div>")
            parsed = (
                f"new DOMParser().parseFromString({json.dumps(html)}, 'text/html').body.firstChild"
            )
            ours, theirs = (page.evaluate(f"({outline})({root})") for root in (box, parsed))
            # The page has a heading of its own.
            heads = {"H1": "H3", "H2": "H4", "H3": "H5"}
            assert flat(ours, {}) == flat(theirs, heads), text


@slow
def test_what_a_model_writes_is_text(visit, model):
    """Tags and scripts in an answer and in a question are shown, wherever they stand, and nothing
    of them is made or run."""
    table = f"| {HTML} | b |\n|---|---|\n| {HTML} | `{HTML}` |"
    everywhere = f"# {HTML}\n\n- {HTML}\n\n{table}\n\n```\n{HTML}\n```"
    model.says = {HTML: HTML, "全": everywhere, "链接": "[x](javascript:alert(1)) ![y](z.png)"}
    with visit() as page:
        title = page.title()
        assert ask(page, HTML) == [HTML.replace("**", "")]
        assert page.locator(".question").text_content() == HTML
        assert ask(page, "全")[0].count("<script>") == 6
        assert ask(page, "链接") == ["[x](javascript:alert(1)) ![y](z.png)"]
        assert page.locator("#turns :is(img, script, a)").count() == 0 and page.title() == title
        assert page.locator("#chats :is(img, script, a)").count() == 0


# --------------------------------------------------------------------------------------------------
# Conversations


@slow
@sizes
def test_conversations_are_listed_renamed_deleted(visit, size):
    def side(page):
        if size == "phone" and not page.locator("#side").is_visible():
            page.click("#menu")

    with visit(size) as page:
        ask(page, "黄芪")
        page.click("#clear")
        assert page.locator("#empty").is_visible() and not texts(page, ".question")
        ask(page, "当归")
        side(page)
        assert texts(page, "#chats .open") == ["当归", "黄芪"]
        page.click("#chats li:nth-child(2) .open")
        assert texts(page, ".question") == ["黄芪"]
        assert page.locator("#side").is_visible() == (size == "desktop")  # a drawer closes itself
        side(page)
        press(page, "#chats [aria-current] .rename")
        page.keyboard.type("我的")
        page.keyboard.press("Enter")
        assert "我的" in texts(page, "#chats .open")
        page.reload()
        side(page)
        assert sorted(texts(page, "#chats .open")) == ["当归", "我的"]
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#chats li:first-child .open")
        side(page)
        press(page, "#chats [aria-current] .remove")
        assert page.locator("#chats li").count() == 1 and not texts(page, ".question")
        page.reload()
        side(page)
        assert page.locator("#chats li").count() == 1
        if size == "phone":
            page.mouse.click(380, 400)  # beside the drawer
            assert not page.locator("#side").is_visible()
            assert page.input_value("#question") == ""


@slow
def test_conversations_go_out_and_come_in(visit, tmp_path):
    """What is exported can be trained on, and comes back as it was; so does the file of the
    terminal's chat. Nothing that is there is replaced; another file says what it is not."""
    with visit() as page:
        ask(page, "黄芪")
        press(page, ".again")
        done(page)
        ask(page, "当归")
        with page.expect_download() as download:
            page.click("#export")
        out = tmp_path / "chats.json"
        download.value.save_as(out)
        before = page.locator("#turns").inner_text()
        (record,) = G.read_instructions(out)
        said = [message["content"] for message in G.read_messages(record)]
        assert said == ["黄芪", "tuned 2: 黄芪", "当归", "tuned 3: 当归"]
    saved = tmp_path / "saved.json"
    opening = [{"role": "system", "content": "医生"}]
    G.obey(f"/save {saved}", opening, G.read_messages(record), "", set())
    broken = tmp_path / "broken.json"
    with visit() as page:
        page.set_input_files("#file", out)
        page.wait_for_function("() => document.querySelectorAll('#chats li').length === 1")
        page.click("#chats .open")
        assert page.locator("#turns").inner_text() == before
        assert texts(page, ".previous + span") == ["2/2"]
        for file, count in ((out, 2), (saved, 3)):
            page.set_input_files("#file", file)
            page.wait_for_function(
                f"() => document.querySelectorAll('#chats li').length === {count}"
            )
        page.locator("#chats .open").first.click()
        assert texts(page, ".text") == ["tuned 2: 黄芪", "tuned 3: 当归"]
        assert ask(page, "又") == ["tuned 4: 又"]
        # The file is anything.
        odd = json.loads(out.read_text("utf-8"))
        odd[0]["next"][0]["answers"][0]["versions"] = []
        for text in ("", "[]", "{}", "[1]", '[{"messages": [1]}]', json.dumps(odd)):
            page.evaluate("say('')")
            broken.write_text(text, "utf-8")
            page.set_input_files("#file", broken)
            page.wait_for_function("() => document.getElementById('said').textContent")
            assert page.locator("#chats li").count() == 3
        page.evaluate("localStorage.setItem('chat:1', '{\"next\": [7]}')")
        page.reload()
        assert page.locator("#chats li").count() == 3


@slow
@pytest.mark.parametrize("clip", [False, True])
def test_turns_go_along_where_the_model_is_used_to_them(visit, model, clip):
    """By default as the server was started, and as a person chose before all; the shown versions
    are what goes along, of the model that is asked or else of another. The oldest are left out
    where the server has no room for them, or only for a shorter answer."""
    with visit() as page:
        ask(page, "一")
        ask(page, "二")
        assert not page.is_checked("#memory") and model.asked[-1] == ("tuned", ["二"])
    model.asked.clear()
    server = {"single_or_multi": "multi", "positions": 400, "length": 200, "clip": clip}
    model.says["四"] = "长" * 150
    with visit(server=server) as page:
        assert page.is_checked("#memory")
        ask(page, "一")
        press(page, ".again")
        done(page)
        press(page, ".answer .previous")
        ask(page, "二")
        assert model.asked[-1] == ("tuned", ["一", "tuned 1: 一", "二"])
        mode(page, "底座")
        ask(page, "三")
        assert model.asked[-1] == ("base", ["一", "tuned 1: 一", "二", "tuned 3: 二", "三"])
        assert ask(page, "四") == ["长" * 150]
        assert model.asked[-1][1][0] != "一" and "未带上" in texts(page, ".foot")[-1]
        page.click("#gear")
        page.uncheck("#memory")
        page.reload()
        assert not page.is_checked("#memory")


# What a finger may miss
SMALL = """() => [...document.querySelectorAll('button, input:not([type=checkbox]), textarea')]
    .filter(node => node.checkVisibility())
    .map(node => [node.id || node.className, node.getBoundingClientRect()])
    .filter(([, box]) => box.width < 44 || box.height < 44)"""


# --------------------------------------------------------------------------------------------------
# What goes wrong, and what a person may set


ERRORS = [
    (429, "rate_limit_exceeded", "排队", "Too many"),
    (503, None, "正忙", "busy"),
    (500, None, "出错", "failed"),
    (400, "context_length_exceeded", "太长", "too long"),
    (400, None, "不接受这个请求: 原话", "not take this request: 原话"),
    (404, "model_not_found", "没有这个模型", "no such model"),
    (418, None, "出错: 原话", "Failed: 原话"),
]


@slow
def test_errors_are_said_in_the_pages_language(visit):
    with visit() as page:
        for status, code, zh, en in ERRORS:
            body = json.dumps({"error": {"message": "原话", "code": code}})
            page.route("**/chat/completions", lambda r: r.fulfill(status=status, body=body))  # noqa: B023
            ask(page, "问")
            assert zh in texts(page, ".failed .foot")[-1]
            page.click("#language")
            assert en in texts(page, ".failed .foot")[-1]
            page.click("#language")
            page.unroute("**/chat/completions")
        page.route("**/chat/completions", lambda route: route.abort())
        ask(page, "问")
        assert "连不上服务器" in texts(page, ".failed .foot")[-1]
        event = 'data: {"choices": [{"delta": {"content": "半"}}]}\n\n'
        page.unroute("**/chat/completions")
        page.route("**/chat/completions", lambda route: route.fulfill(status=200, body=event))
        assert ask(page, "问") == ["半"] and "连接中断" in texts(page, ".failed .foot")[-1]


@slow
def test_a_key_is_asked_for(browser, model):
    with scripted(model, api_key="open") as address:
        page = browser.new_page(locale="zh-CN")
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_selector("#settings:visible")
        assert "密钥" in page.locator("#said").text_content()
        page.fill("#key", "open")
        page.press("#key", "Tab")
        page.wait_for_selector("#modes button")
        assert ask(page, "问") == ["tuned 1: 问"]
        assert "open" not in page.evaluate("JSON.stringify(localStorage)")


@slow
def test_settings_have_limits(visit, model):
    with visit() as page:
        for name, value in (("temperature", "2.5"), ("top_p", "0"), ("max_tokens", "0")):
            page.evaluate("show('settings', true)")
            page.fill(f"#{name}", value)
            send(page, "问")
            assert name in page.evaluate("document.activeElement.id") and not model.asked
            said = page.locator("#said").text_content()
            low, high = (page.get_attribute(f"#{name}", end) for end in ("min", "max"))
            assert f"{low} 到 {high}" in said and page.input_value("#question") == "问"
            page.fill(f"#{name}", "")
        assert ask(page, "问") == ["tuned 1: 问"]


@slow
@sizes
def test_facts_of_model_and_answer(visit, size):
    """The card of the model, tokens a second, a box that grows with its text, places to touch."""
    with visit(size, server={"pause": 0.01}) as page:
        assert "data/tiny with tuned" in page.locator("#empty .about").text_content()
        ask(page, "说明" * 20)
        (foot,) = texts(page, ".foot span:first-child")
        count, seconds, speed = map(float, re.findall(r"[\d.]+", foot))
        assert count == 49 and speed == pytest.approx(count / seconds, rel=0.1)
        page.click("#gear")
        assert "data/tiny with tuned" in page.locator("#settings .about").text_content()
        if size == "phone":
            page.click("#menu")
            small = page.evaluate(SMALL)
            assert not small
            page.keyboard.press("Escape")
        heights = []
        for lines in (1, 4, 100):
            page.fill("#question", "\n".join("长" * lines))
            heights.append(page.locator("#question").bounding_box()["height"])
        page.fill("#question", "长" * 400)  # one line that wraps
        heights.append(page.locator("#question").bounding_box()["height"])
        assert heights[0] < 60 < heights[1] < heights[2] < 0.4 * SIZES[size][1] and heights[3] > 100


# --------------------------------------------------------------------------------------------------
# Ratings


@slow
def test_thumbs_only_where_they_are_kept(visit):
    with visit() as page:
        ask(page, "问")
        assert page.locator(".up, .down, .best").count() == 0


@slow
def test_the_better_of_two(visit, tmp_path):
    ratings = tmp_path / "ratings.jsonl"
    with visit(server={"ratings": str(ratings)}, locale="en-US") as page:
        mode(page, "Compare")
        base, tuned = ask(page, "问")
        assert page.locator(".up, .down").count() == 0
        page.locator(".best").last.click()
        page.wait_for_selector(".best[aria-pressed=true]")
        pressed = [b.get_attribute("aria-pressed") for b in page.locator(".best").all()]
        assert pressed == ["false", "true"] and page.locator("#said").text_content()
        (line,) = map(json.loads, ratings.read_text("utf-8").splitlines())
        assert line == {
            "prompt": [{"role": "user", "content": "问"}],
            "chosen": [{"role": "assistant", "content": tuned}],
            "rejected": [{"role": "assistant", "content": base}],
            "models": {"chosen": "tuned", "rejected": "base"},
        }
        # Two that were asked different things are no pair: each has thumbs.
        page.evaluate("document.getElementById('memory').checked = true")
        ask(page, "又")
        assert page.locator(".answers").last.locator(".best").count() == 0
        assert page.locator(".answers").last.locator(".up").count() == 2
        page.route("**/v1/ratings", lambda route: route.abort())
        page.locator(".up").last.click()
        page.wait_for_function(
            "() => document.getElementById('said').textContent.includes('reached')"
        )
        assert page.locator(".up[aria-pressed=true]").count() == 0


# --------------------------------------------------------------------------------------------------
# For all


def axe():
    """The source of axe-core (npm install -g axe-core), or None."""
    if shutil.which("npm"):
        root = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True).stdout.strip()
        path = Path(root, "axe-core", "axe.min.js")
        return path.read_text(encoding="utf-8") if path.is_file() else None


@slow
@pytest.mark.skipif(not axe(), reason="npm install -g axe-core")
@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@sizes
def test_no_serious_finding_of_axe(visit, model, size, scheme, locale, tmp_path):
    """Contrast, names, roles and order, in each state of the page."""
    model.says["归脾汤"] = MARKDOWN
    source = axe()
    server = {"ratings": str(tmp_path / "ratings.jsonl"), "length": 250}
    with visit(size, server, locale=locale, color_scheme=scheme) as page:

        def check(state):
            # Without the hover of the last click.
            page.mouse.move(1, 500)
            page.screenshot(path=tmp_path / f"{state}.png")
            page.evaluate(source)
            found = page.evaluate("axe.run().then(result => result.violations)")
            serious = [
                (state, rule["id"], node["html"][:200], node.get("failureSummary", "")[:300])
                for rule in found
                for node in rule["nodes"]
                if rule["impact"] in ("serious", "critical")
            ]
            assert not serious

        check("empty")
        ask(page, "归脾汤")
        press(page, ".again")
        done(page)
        check("markdown")
        page.locator("#modes button").last.click()
        ask(page, "黄芪")
        page.locator(".best").last.click()
        page.wait_for_selector(".best[aria-pressed=true]")
        check("compared")
        page.locator(".edit").last.click()
        check("edited")
        page.keyboard.press("Escape")
        page.click("#gear")
        page.fill("#temperature", "7")
        check("settings")
        page.click("#gear")
        page.locator("#modes button").first.click()
        page.fill("#temperature", "") if page.locator(
            "#temperature"
        ).is_visible() else page.evaluate("document.getElementById('temperature').value = ''")
        send(page, ENDLESS)
        done(page)
        check("cut")
        if size == "phone":
            page.click("#menu")
        check("side")


# --------------------------------------------------------------------------------------------------
# In front of data/tiny


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, {(question, model): greedy answer}, a question that the tuned model answers at
    length, folder)."""
    folder = tmp_path_factory.mktemp("page")
    make_adapter(folder / "tuned")
    model, tokenizer = G.load_base(ROOT / "data" / "tiny", "cpu", torch.float32)
    template, answers = G.load_template(folder / "tuned" / "template.json"), {}
    prompts = [tokenizer.encode(plain_prompt(template, q), bos=True) for q in QUESTIONS]
    decoding = G.Decoding(max_new_tokens=40, repetition_penalty=1.1)
    for name in ("base", "tuned"):
        if name == "tuned":
            L.load_adapter(model, folder / "tuned")
        requests = [G.Request(ids, decoding) for ids in prompts]
        texts = G.answer_batch(model, tokenizer, requests, 24)
        answers |= {(question, name): text for question, text in zip(QUESTIONS, texts)}
    requests = [
        G.Request(ids, G.Decoding(max_new_tokens=600, repetition_penalty=1.1)) for ids in prompts
    ]
    list(G.answer_batch(model, tokenizer, requests, 24))
    long = max((len(request.ids), question) for request, question in zip(requests, QUESTIONS))[1]
    with open(folder / "log", "w+") as log:
        server, port = start(
            log,
            "--lora_weights",
            folder / "tuned",
            "--dtype",
            "fp32",
            "--max_new_tokens",
            "40",
            "--repetition_penalty",
            "1.1",
            "--seed",
            "7",
        )
        yield f"http://127.0.0.1:{port}/", answers, long, folder
        server.terminate()
        assert server.wait(30) == 0


@pytest.fixture(params=SIZES)
def page(request, browser, served):
    address, _, _, folder = served
    with opened(browser, address, request.param, folder, request.node.name) as page:
        yield page


@slow
def test_asked_streamed_and_regenerated(page, served):
    _, answers, _, folder = served
    page.screenshot(path=folder / f"empty-{page.viewport_size['width']}.png")
    mode(page, "tuned")
    page.evaluate("""() => {
        window.seen = []
        new MutationObserver(() => {
            const node = [...document.querySelectorAll('.text')].at(-1)
            if (node) seen.push(node.textContent.length)
        }).observe(document.getElementById('turns'),
                   {childList: true, subtree: true, characterData: true})
    }""")
    question = max(QUESTIONS, key=lambda q: len(answers[q, "tuned"]))
    send(page, question)
    assert done(page) == [answers[question, "tuned"]]
    assert len(set(page.evaluate("seen"))) > 4  # it grew
    page.click(".answer:last-child .again")
    assert done(page) == [answers[question, "tuned"]] and page.locator(".answer").count() == 1
    assert (
        page.locator(".question").text_content() == question
        and page.locator("#question").input_value() == ""
    )


@slow
def test_stopped(page, served):
    """What came stays, the server's place is free, and the next question is answered."""
    address, answers, long, _ = served
    mode(page, "tuned")
    page.evaluate("document.getElementById('max_tokens').value = '600'")
    send(page, long)
    page.wait_for_function("() => document.querySelector('.text')?.textContent.length > 5")
    page.click("#send")
    assert len(done(page)[0]) > 5 and "已停止" in page.locator(".foot").text_content()
    for _ in range(100):
        if page.evaluate("() => fetch('health').then(r => r.json())")["running"] == 0:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the place is still taken")
    page.evaluate("document.getElementById('max_tokens').value = ''")
    question = next(q for q in QUESTIONS if answers[q, "tuned"])
    send(page, question)
    assert done(page)[-1:] == [answers[question, "tuned"]]
    assert page.locator(".again:visible").count() == 1  # only the last turn


@slow
def test_compared(page, served):
    """Tuned and base side by side on a desktop, one below the other on a phone; in English too."""
    _, answers, _, _ = served
    question = max(QUESTIONS, key=lambda q: len(answers[q, "base"]) * len(answers[q, "tuned"]))
    page.click("#language")
    mode(page, "Compare")
    send(page, question)
    assert sorted(done(page)) == sorted([answers[question, "tuned"], answers[question, "base"]])
    first, second = (page.locator(".answer").nth(i).bounding_box() for i in (0, 1))
    wide = page.viewport_size["width"] > 500
    assert (first["y"] == second["y"]) == wide and (first["x"] == second["x"]) != wide
    assert "no medical advice" in page.locator("#notice").text_content()
    assert all(
        page.locator(s).is_visible() for s in ("#question", "#send", "#gear", "#clear", "#modes")
    )
    assert (
        len({page.locator(s).bounding_box()["y"] for s in ("#clear", "#gear", "#language")}) == 1
    )  # on one line


@slow
def test_settings_left_empty_are_the_servers(page, served):
    """What the server was started with is shown in grey and not sent over it; what is typed is."""
    _, answers, _, folder = served
    sent = []
    page.on(
        "request",
        lambda request: request.post_data and sent.append(G.json.loads(request.post_data)),
    )
    mode(page, "tuned")
    page.click("#gear")
    fields = ("temperature", "top_p", "max_tokens", "repetition_penalty", "seed")

    def shown():
        return [page.locator(f"#{name}").get_attribute("placeholder") for name in fields]

    assert (
        shown() == ["默认：0", "默认：0.75", "默认：40", "默认：1.1", "默认：7"]
        and [page.input_value(f"#{n}") for n in fields] == [""] * 5
    )
    page.screenshot(path=folder / f"settings-{page.viewport_size['width']}.png")
    send(page, QUESTIONS[0])
    done(page)
    page.click("#language")
    assert shown() == ["default: 0", "default: 0.75", "default: 40", "default: 1.1", "default: 7"]
    page.screenshot(path=folder / f"settings-en-{page.viewport_size['width']}.png")
    page.fill("#temperature", "0.5")
    page.fill("#max_tokens", "3")
    page.check("#memory")
    send(page, QUESTIONS[1])
    done(page)
    page.fill("#max_tokens", "")
    send(page, QUESTIONS[2])
    done(page)
    assert [
        {
            k: v
            for k, v in body.items()
            if k not in ("model", "messages", "stream", "stream_options")
        }
        for body in sent
    ] == [{}, {"temperature": 0.5, "max_tokens": 3}, {"temperature": 0.5, "max_tokens": 40}]
