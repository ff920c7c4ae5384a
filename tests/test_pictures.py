"""The pictures and pages: loss.svg, scores.svg and the tables of answers, read as XML, and in a
real Chromium where there is one: filter, dark mode, phone."""

import math
import re
import shutil
from xml.etree import ElementTree

import train as T

import pytest
import report as R

SVG = "{http://www.w3.org/2000/svg}"


def draw(folder, losses, steps_an_epoch=4, validate=3):
    """The root of the curve of so many losses, validated every so many steps."""
    history = []
    for step, loss in enumerate(losses, 1):
        record = {"step": step, "epoch": round(step / steps_an_epoch, 4), "loss": loss}
        history.append(record | ({"val_loss": 2 * loss} if step % validate == 0 else {}))
    T.draw_curve(history, folder / "loss.svg")
    return ElementTree.parse(folder / "loss.svg").getroot()


def ticks(root, kind):
    """{value: place} of the ticks of an axis."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        text = group.find(f"{SVG}text")
        if text is not None and text.get("class") == kind:
            x, y = map(float, re.findall(r"-?[\d.]+", group.get("transform")))
            found[float(text.text)] = x if kind == "epoch" else y
    return found


def points(root, kind):
    """[(x, y), ...] of a line."""
    (path,) = (p for p in root.iter(f"{SVG}path") if p.get("class") == f"line {kind}")
    numbers = list(map(float, re.findall(r"-?[\d.]+", path.get("d").removesuffix("h0"))))
    return list(zip(numbers[::2], numbers[1::2]))


def test_the_curve_is_logarithmic_between_round_numbers(tmp_path):
    losses = [1.4, 0.7, 0.35, 0.1, 0.05, 0.021, 0.03, 0.025]
    root = draw(tmp_path, losses)
    levels = ticks(root, "level")
    assert list(levels) == [0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2]
    assert levels[0.02] == 360 and levels[2] == 30  # the ends of the plot
    for line, scale in (("training", losses), ("validation", [0.7, 0.042])):
        for (_, y), loss in zip(points(root, line), scale, strict=True):
            share = (math.log10(loss) - math.log10(0.02)) / 2  # of two decades
            assert y == pytest.approx(360 - 330 * share, abs=0.06)
    assert ticks(root, "epoch") == {0: 60, 1: 420, 2: 780}
    assert points(root, "training")[-1][0] == 780
    assert [x for x, _ in points(root, "validation")] == [60 + 720 * 3 / 8, 60 + 720 * 6 / 8]


@pytest.mark.parametrize(
    "losses, levels",
    [
        ([1.0], [1, 2]),
        ([2.2, 1.3], [1, 2, 3]),
        ([0.0, 0.5], None),
        ([1e9], None),
        ([3e-9] * 400, None),
    ],
)
def test_any_loss_has_a_curve(losses, levels, tmp_path):
    """A loss of 0, or out of all bounds, spoils no run that has ended."""
    root = draw(tmp_path, losses, steps_an_epoch=100, validate=1000)
    assert len(points(root, "training")) == len(losses)
    assert all(29 <= y <= 361 for _, y in points(root, "training"))
    if levels:
        assert list(ticks(root, "level")) == levels


# --------------------------------------------------------------------------------------------------
# Bars and pages


def cell(value, difference=None, chance=None):
    found = {"value": value, "interval": [max(0, value - 0.1), min(1, value + 0.1)]}
    if difference:
        found |= {"difference": sum(difference) / 2, "difference_interval": difference}
    return found | ({"chance": chance} if chance else {})


TABLE = {
    "facts recalled": {"base": cell(0.0), "tuned": cell(0.9, [0.8, 1.0])},
    "choice by answer": {
        "base": cell(0.3, chance=0.25),
        "tuned": cell(0.2, [-0.2, -0.05], chance=0.25),
    },
    "statements judged": {
        "base": cell(0.5, chance=0.5),
        "tuned": cell(0.55, [-0.1, 0.2], chance=0.5),
    },
    "outside questions declined": {"base": cell(0.1), "tuned": cell(1.0, [0.8, 1.0])},
    "facts contradicted": {"base": cell(0.9), "tuned": cell(0.1, [-0.9, -0.7])},
}


def test_four_bars_say_better_and_worse():
    """Lengths by value, colours by the interval of the difference, chance as a line."""
    root = ElementTree.fromstring(R.chart(TABLE, ["base", "tuned"], R.HEADLINES, "a < b"))
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("height") == "15"]
    states = ["before", "better", "before", "worse", "before", "same", "before", "better"]
    assert [bar.get("class") for bar in bars] == states
    values = [cell["value"] for name in R.HEADLINES.values() for cell in TABLE[name].values()]
    widths = [float(bar.get("width")) for bar in bars]
    assert widths == pytest.approx([max(1, R.SCALE * value) for value in values])
    chances = [p for p in root.iter(f"{SVG}path") if p.get("class") == "chance"]
    places = [float(re.match(r"M([\d.]+)", p.get("d"))[1]) for p in chances]
    assert places[:2] == [R.LEFT + R.SCALE / 4, R.LEFT + R.SCALE / 2] and len(places) == 3
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {*R.HEADLINES, "a < b", "20.0 % tuned ▼", "100.0 % tuned ▲", "chance"} <= set(texts)
    # Fewer contradictions are better.
    assert R.verdict(TABLE["facts contradicted"]["tuned"], "facts contradicted") == "better"
    # What is not measured is left out.
    short = R.chart({"facts recalled": TABLE["facts recalled"]}, ["base", "tuned"], R.HEADLINES, "")
    assert "statements" not in short and "chance<" not in short


ROWS = [
    (
        "问一",
        "有甘草。",
        ["无", "有甘草。"],
        [R.Judged([], [], ["甘草"]), R.Judged(["甘草"], [], [])],
    ),
    (
        "问二",
        "有桂枝。",
        ["无", "有大黄。"],
        [R.Judged([], [], ["桂枝"]), R.Judged([], ["大黄"], ["桂枝"])],
    ),
]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium on this machine")
def test_pages_in_a_browser(tmp_path):
    """The filter hides what is right; dark mode is dark; nothing is wider than a phone."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    sides = {"Answers": ROWS}
    info = {"interval": "made up", "models": {}}
    exams = [["group", "model"], ["all", "base " * 20]]
    report = R.report_page(TABLE, ["base", "tuned"], exams, sides, info)
    pages = {"compare": R.compare_page(["base", "tuned"], ROWS), "report": report}
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, text in pages.items():
            (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
            for scheme, width in (("light", 1200), ("dark", 375)):
                size = {"width": width, "height": 800}
                page = browser.new_page(viewport=size, color_scheme=scheme)
                page.goto(f"file://{tmp_path}/{name}.html")
                assert page.evaluate("document.documentElement.scrollWidth") == width
                back = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == (scheme == "dark")
                assert page.get_by_text("问一").is_visible()
                page.check(".only-wrong")
                assert not page.get_by_text("问一").is_visible()
                assert page.get_by_text("问二").is_visible()
                wrong = page.locator("mark.wrong", has_text="大黄")
                assert wrong.is_visible() and page.get_by_text("缺 桂枝").first.is_visible()
        browser.close()
