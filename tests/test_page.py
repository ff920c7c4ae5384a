"""The server's page in a real Chromium, if there is one and playwright (pip install playwright)
beside it: a question typed, streamed, stopped, regenerated, compared, on a desktop and on a phone.
Screenshots go into the test's own folder."""

import shutil
import time

import pytest
import torch
from conftest import ROOT, plain_prompt
from soak_server import QUESTIONS, make_adapter, start

import generate as G
import lora as L

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
api = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright, to try the page in a browser"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine"),
]
HTML = (
    "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>**粗** & "
    "\u201c引\u201d"
)


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
        texts = G.answer_batch(model, tokenizer, prompts, decoding, 24)
        answers |= {(question, name): text for question, text in zip(QUESTIONS, texts)}
    requests = [
        G.Request(ids, G.Decoding(max_new_tokens=600, repetition_penalty=1.1)) for ids in prompts
    ]
    ended = G.finish(model, tokenizer, requests, 24)
    long = max((len(request.ids), question) for request, question in zip(ended, QUESTIONS))[1]
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


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(request, served):
    """The page at a size. Nothing is fetched from elsewhere, nothing goes wrong in its script,
    nothing scrolls sideways."""
    address, _, _, folder = served
    width, height = request.param
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": width, "height": height}, locale="zh-CN", has_touch=width < 500
        )
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.goto(address)
        page.wait_for_selector("#modes button")
        yield page
        page.screenshot(path=folder / f"{request.node.name}.png")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert asked and all(url.startswith(address) for url in asked) and not wrong
        browser.close()


def mode(page, name):
    page.click(f"#modes button:text-is('{name}')")


def send(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def done(page):
    page.wait_for_function(
        "() => document.querySelectorAll('.answer').length && !document.querySelector('.running')"
    )
    return page.locator(".answers").last.locator(".text").all_text_contents()


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


def test_what_a_model_writes_is_text(page):
    """Tags and scripts in an answer and in a question are shown, and nothing of them is made or
    run."""
    event = '{"choices": [{"index": 0, "delta": {"content": %s}, "finish_reason": %s}]}'
    text = G.json.dumps(HTML)
    body = "".join(
        f"data: {line}\n\n" for line in (event % (text, "null"), event % ('""', '"stop"'), "[DONE]")
    )
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )
    title = page.title()
    send(page, HTML)
    assert done(page) == [HTML] and page.locator(".question").text_content() == HTML
    assert (
        page.title() == title and page.locator("#turns img, #turns script, #turns b").count() == 0
    )
