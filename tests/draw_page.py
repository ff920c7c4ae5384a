"""Draw data/page.png, the page of `python generate.py --serve` as it is:

  python tests/draw_page.py [--lora_weights lora-tcm ...]     the options of generate.py

A quiet machine draws the speed that it has."""

import sys
import tempfile
from pathlib import Path

from browser import ask, chromium
from soak_server import ROOT, start


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


def main():
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        server, port = start(log, "--ratings", Path(folder, "ratings.jsonl"), *sys.argv[1:])
        try:
            with chromium() as browser:
                page = browser.new_page(viewport={"width": 900, "height": 560}, locale="en-US")
                page.goto(f"http://127.0.0.1:{port}/")
                draw(page, ROOT / "data" / "page.png")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
