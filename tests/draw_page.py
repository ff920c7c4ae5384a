"""Draw data/page.png, chat.png and report.png: the page of `python generate.py --serve`, a chat in
a terminal, and the page that `python tests/evaluate.py` writes into the folder REPORT, as they are:

  python tests/draw_page.py REPORT [--lora_weights lora-tcm ...]     options of generate.py

A quiet machine draws the speed that it has."""

import sys
import tempfile
from html import escape
from pathlib import Path

from browser import ask, chromium
from soak_server import ROOT, start
from test_asking import Terminal

DATA = ROOT / "data"
TERMINAL = "font: 15px/1.6 monospace; white-space: pre-wrap; padding: 20px; background: #fff"


def draw(page, path):
    """Three questions in two chats, and a thumb up."""
    page.wait_for_selector("#modes button")
    ask(page, "黄芪的功效是什么？")
    page.click("#clear")
    ask(page, "归脾汤由哪些药物组成？")
    page.click(".up")
    page.wait_for_selector(".up[aria-pressed=true]")
    ask(page, "偏头痛有哪些症状？")
    page.evaluate("say('')")
    page.screenshot(path=path)


def chat(options):
    """What a terminal shows of a chat of three questions."""
    terminal, text = (
        Terminal(DATA / "tiny", "--use_lora=True", "--max_new_tokens", "160", *options),
        b"",
    )
    for line in ("生脉散由哪些药物组成？", "归脾汤出自哪本书？", "/model", "/exit"):
        text += terminal.until("> ") + line.encode() + b"\n"
        terminal.type(f"{line}\n")
        terminal.until("\n")
    terminal.process.wait()
    return text.decode().replace(f"{ROOT}/", "")


def main():
    report, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        server, port = start(log, "--ratings", Path(folder, "ratings.jsonl"), *options)
        try:
            with chromium() as browser:
                page = browser.new_page(viewport={"width": 900, "height": 560}, locale="en-US")
                page.goto(f"http://127.0.0.1:{port}/")
                draw(page, DATA / "page.png")
                page.goto(Path(report, "report.html").resolve().as_uri())
                page.screenshot(path=DATA / "report.png")
                page.set_content(f'<div style="{TERMINAL}">{escape(chat(options))}</div>')
                page.screenshot(path=DATA / "chat.png")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
