"""A real Chromium for the tests of the page."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
api = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright, to try the page in a browser"
)
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
PATIENCE = 120_000  # ms, on a machine that does other things too


@contextmanager
def opened(browser, address, size="desktop", folder=None, name="page", **context):
    """The page at a size, in a browser that has not seen it. Nothing is fetched from elsewhere,
    nothing goes wrong in its script, nothing scrolls sideways."""
    width, height = SIZES[size]
    context = {"locale": "zh-CN", "has_touch": size == "phone"} | context
    context = browser.new_context(viewport={"width": width, "height": height}, **context)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
    page.goto(address)
    page.wait_for_selector("#modes button")
    yield page
    if folder:
        page.screenshot(path=folder / f"{name}-{size}.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The browser tells of every status that is an error, which some tests are about.
    wrong = [text for text in wrong if "Failed to load resource" not in text]
    assert all(url.startswith((address, f"blob:{address}")) for url in asked) and not wrong
    context.close()


@contextmanager
def chromium():
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )


def mode(page, name):
    page.click(f"#modes button:text-is('{name}')")


def send(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def done(page):
    """The texts of the last answers, once none grows."""
    page.wait_for_function(
        "() => document.querySelectorAll('.answer').length && !document.querySelector('.running')"
    )
    return page.locator(".answers").last.locator(".text").all_text_contents()


def ask(page, text):
    send(page, text)
    return done(page)
