"""What tests/evaluate.py shows: an SVG of bars, pages in the frame of data/compare.html, and tables
in Markdown and CSV."""

import csv
import html
import io
import json
import re
import sys
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from generate import DATA  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Scores

HEADLINES = {  # the README's picture: what it says, and the score that it shows
    "facts recalled": "facts recalled",
    "chosen letter": "choice by answer",
    "statements judged": "statements judged",
    "outside questions declined": "outside questions declined",
}
FAMILIES = {  # scores of one scale share a chart
    "facts": ["facts recalled", "facts contradicted"],
    "overlap with the reference": ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU-4"],
    "form": ["stopped", "repetition", "distinct-2", "empty", "U+FFFD"],
    "choices": [
        "choice by likelihood",
        "choice by answer",
        "choice over rotations",
        "choice right in every order",
        "choice not answered",
    ],
    "statements": ["true statements", "false statements", "right one of a pair"],
    "declined": ["outside questions declined", "refused"],
}
PLAIN = ("bits per character", "answer length")  # the other scores are shares of 1
LESS_IS_BETTER = {
    "bits per character",
    "facts contradicted",
    "repetition",
    "empty",
    "refused",
    "U+FFFD",
    "choice not answered",
}


def verdict(cell, name):
    """Is a model better or worse than the first one? "before" is the first itself; "same": the
    interval of the difference holds 0."""
    if "difference" not in cell:
        return "before"
    low, high = cell["difference_interval"]
    if low <= 0 <= high:
        return "same"
    return "better" if (low > 0) != (name in LESS_IS_BETTER) else "worse"


def percent(share):
    return f"{100 * share:.1f} %"


def shown(cell, name):
    """A cell of the table as text: value [interval], difference in brackets."""
    if cell is None:
        return ""
    plain = name in PLAIN
    form = "{:.2f}".format if plain else percent
    text = f"{form(cell['value'])} [{', '.join(map(form, cell['interval']))}]"
    if not cell.get("difference_interval"):
        return text
    difference = f"{cell['difference']:+.2f}" if plain else f"{100 * cell['difference']:+.1f}"
    return f"{text} ({difference}{'' if verdict(cell, name) == 'same' else ' *'})"


# --------------------------------------------------------------------------------------------------
# Bars

WIDTH, LEFT, SCALE = 600, 12, 400  # of the picture; where a bar starts; the length of 100 %
COLOURS = {  # of bars, by `verdict`: on white, on black
    "before": ("#98a2b3", "#7d8797"),
    "better": ("#2f8f5b", "#43b077"),
    "same": ("#c29a3a", "#d1ab50"),
    "worse": ("#c8442f", "#e2654f"),
}
SIGNS = {"better": " ▲", "worse": " ▼"}
MEANING = {"better": "better", "same": "no clear change", "worse": "worse"}


def chart(table, models, rows, title):
    """An SVG of horizontal bars, one a model for each of rows {label: score} that the table has;
    values are shares of 1. Colours say better or worse than the first model, a dashed line the
    share that blind choice would reach."""
    y, parts, texts, used = 52, [], [], []
    for words, name in rows.items():
        cells = table.get(name, {})
        if not cells:
            continue
        texts.append(label(LEFT, y, words, weight=600))
        top = y + 6
        for model, cell in cells.items():
            state = verdict(cell, name)
            parts.append(bar(y + 8, cell, state))
            texts.append(bar_text(y + 20, cell, model, state))
            used.append(state)
            y += 19
        if chance := next(iter(cells.values())).get("chance"):
            x = LEFT + SCALE * chance
            parts.append(f'<path class="chance" d="M{x:.1f} {top}V{y + 8}"/>')
            used.append("chance")
        y += 34
    # The scale goes behind the bars, the legend below them.
    marks = [LEFT + SCALE * share / 4 for share in range(5)]
    grid = "".join(f"M{x:.0f} 34V{y - 20}" for x in marks)
    scale = "".join(label(x, y - 6, f"{25 * i} %", at="middle") for i, x in enumerate(marks) if i)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bars" viewBox="0 0 {WIDTH} {y + 26}" '
        f'font-family="system-ui,sans-serif" font-size="13">{style()}'
        f'<rect class="back" width="{WIDTH}" height="{y + 26}"/>{label(LEFT, 22, title, size=15)}'
        f'<path class="grid" d="{grid}"/>{"".join(parts + texts)}{scale}'
        f"{legend(y + 16, models[0], used)}</svg>\n"
    )


def style():
    """The colours of a chart, for light and for dark."""

    def rules(dark):
        plain = {"back": ("#fff", "#16191f"), "grid": ("#e4e7ec", "#2c323b")}
        lines = {"chance": ("#475467", "#d0d5dd"), "interval": ("#1f2430", "#eef1f5")}
        fills = {**plain, **COLOURS}
        css = [f".bars .{name}{{fill:{pair[dark]}}}" for name, pair in fills.items()]
        css += [f".bars .{k}{{fill:none;stroke:{pair[dark]}}}" for k, pair in lines.items()]
        css.append(f".bars .grid{{stroke:{plain['grid'][dark]}}}")
        ink, paper = ("#1f2430", "#dfe3ea")[dark], plain["back"][dark]
        css.append(f".bars text{{fill:{ink};stroke:{paper};stroke-width:3;paint-order:stroke}}")
        return "".join(css)

    dashes = ".bars .chance{stroke-dasharray:4 3;stroke-width:1.5}"
    return f"<style>{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}{dashes}</style>"


def label(x, y, content, weight=400, size=13, at="start"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" font-size="{size}" '
        f'text-anchor="{at}">{html.escape(content)}</text>'
    )


def bar(y, cell, state):
    """A cell's value as a bar at height y, and its interval as a line."""
    value, low, high = (LEFT + SCALE * x for x in (cell["value"], *cell["interval"]))
    return (
        f'<rect class="{state}" x="{LEFT}" y="{y}" width="{max(1, value - LEFT):.1f}" height="15"/>'
        f'<path class="interval" d="M{low:.1f} {y + 7.5}H{high:.1f}M{low:.1f} {y + 4}v7'
        f'M{high:.1f} {y + 4}v7"/>'
    )


def bar_text(y, cell, model, state):
    """What stands behind a bar."""
    model = model if len(model) < 16 else f"{model[:14]}…"
    x = LEFT + SCALE * max(cell["value"], cell["interval"][1]) + 6
    return label(x, y, f"{percent(cell['value'])} {model}{SIGNS.get(state, '')}")


def legend(y, first, used):
    """What the colours in use mean, first the model that the others are compared with."""
    x, parts = LEFT, []
    for state, words in {"before": first, **MEANING, "chance": "chance"}.items():
        if state in used:
            sample = f'<rect class="{state}" x="{x}" y="{y - 10}" width="11" height="11"/>'
            line = f'<path class="chance" d="M{x + 5} {y - 12}v14"/>'
            parts += [line if state == "chance" else sample, label(x + 16, y, words)]
            x += 30 + 8 * len(words)
    return "".join(parts)


# --------------------------------------------------------------------------------------------------
# Answers side by side


class Judged(NamedTuple):
    """Of an answer whose right values are known: the right and the wrong values that it names,
    those that it leaves out, and other terms, whose parts are no values (the entity's name)."""

    right: list
    wrong: list
    missing: list
    others: list = ()


def new_characters(first, said):
    """For each character of `said`, "new" if the first answer does not have it there."""
    # Answers that loop have more pairs of equal characters than can be tried.
    loops = sum(map(first.count, said)) > 50000
    kinds = ["new"] * len(said)
    for _, start, size in SequenceMatcher(None, first, said, autojunk=loops).get_matching_blocks():
        kinds[start : start + size] = [""] * size
    return kinds


def value_characters(judged, said):
    """For each character of `said`, "right" or "wrong" where it names such a value; of two values
    the longer one counts, as in `terms_in`."""
    kinds, end = [""] * len(said), 0
    values = dict.fromkeys(judged.others, "") | dict.fromkeys(judged.right, "right")
    values |= dict.fromkeys(judged.wrong, "wrong")
    longest_first = sorted(filter(None, values), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    for match in re.finditer(f"(?=({pattern}))", said):
        if match.end(1) > end:
            start, end = match.span(1)
            kinds[start:end] = [values[match[1]]] * len(match[1])
    return kinds


def marked(said, kinds):
    """A text as HTML, in marks by the kinds of its characters ("": no mark)."""
    parts = []
    for kind, run in groupby(zip(kinds, said), key=lambda pair: pair[0]):
        part = html.escape("".join(character for _, character in run))
        name = "" if kind == "new" else f' class="{kind}"'
        parts.append(f"<mark{name}>{part}</mark>" if kind else part)
    return "".join(parts)


def answer_cell(said, first, judged):
    """An answer as HTML: right and wrong values marked and missing ones named, if it is judged;
    else what the first model's answer does not have."""
    if judged is None:
        return marked(said, new_characters(first, said))
    cell = marked(said, value_characters(judged, said))
    missing = html.escape("、".join(judged.missing))
    return cell + (f'<span class="missing">缺 {missing}</span>' if missing else "")


def answers_table(models, rows):
    """A section with a table of rows [(question, reference, answers, [Judged or None of each
    answer]), ...], and a box that hides all but those where a model, other than the first, errs."""
    referred = any(reference for _, reference, *_ in rows)
    head = ["问题", *(["参考"] if referred else []), *models]
    lines, wrong = [html_row(head, "th")], 0
    for question, reference, answers, judged in rows:
        cells = [html.escape(question)]
        if referred:
            cells.append(f'<span class="reference">{html.escape(reference)}</span>')
        cells += [answer_cell(said, answers[0], j) for said, j in zip(answers, judged)]
        # On a phone a row is a card, in which each cell says its column.
        named = zip(map(html.escape, head), cells)
        tds = "".join(f'<td data-column="{name}">{cell}</td>' for name, cell in named)
        wrong += errs(judged)
        lines.append(f"<tr{' class=errs' if errs(judged) else ''}>{tds}</tr>")
    box = (
        f'<label class="filter"><input type="checkbox" class="only-wrong"> 只看有误的 only wrong '
        f"({wrong} / {len(rows)})</label>"
    )
    known = any(j for *_, judged in rows for j in judged)
    table = "\n".join(lines)
    return (
        f'<section><p class="note">{VALUE_MARKS + box if known else NEW_MARK}</p>\n'
        f'<table class="answers">\n{table}\n</table></section>'
    )


def errs(judged):
    """Does a model, other than the first of several, name a wrong value or leave one out?"""
    return any(j and (j.wrong or j.missing) for j in judged[1:] or judged)


def html_row(cells, tag="td"):
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"


def plain_table(rows):
    """A table of texts, the first row its head, that scrolls sideways where it is too wide."""
    head, *others = rows
    lines = html_row(head, "th") + "".join(map(html_row, others))
    return f'<div class="scroll"><table>{lines}</table></div>'


def page(title, body):
    """The frame data/compare.html, filled."""
    frame = (DATA / "compare.html").read_text(encoding="utf-8")
    parts = {"title": html.escape(title), "body": body}
    return re.sub(r"\{(title|body)\}", lambda match: parts[match[1]], frame)


DISCLAIMER = "回答由语言模型生成，不构成医疗建议。No medical advice."
VALUE_MARKS = (
    '<mark class="right">对 right</mark> <mark class="wrong">错 wrong</mark> '
    '<span class="missing" style="display: inline">缺 missing</span> '
)
NEW_MARK = "<mark>第一个模型的回答所没有 not in the first model's answer</mark>"


def compare_page(models, rows):
    note = f'<p class="note">{DISCLAIMER}</p>\n'
    return page("模型效果对比 Model comparison", note + answers_table(models, rows))


def report_page(table, models, exams, sides, info):
    """The report: charts, all scores, exams, answers side by side {title: rows}, and what is needed
    to make it again."""
    parts = [
        f'<p class="note">{html.escape(models[0])} is what the others are compared with. Square '
        f"brackets: 95 % interval, {info['interval']}; round ones: paired difference, * where its "
        f"interval leaves out 0. {DISCLAIMER}</p>"
    ]
    for title, names in FAMILIES.items():
        if set(names) & set(table):
            parts.append(chart(table, models, {name: name for name in names}, title))
    rows = [[name, *(shown(cells.get(m), name) for m in models)] for name, cells in table.items()]
    parts.append(plain_table([["score", *models], *rows]))
    if exams:
        parts += ["<h2>Exams</h2>", plain_table(exams)]
    for title, rows in sides.items():
        parts += [f"<h2>{html.escape(title)}</h2>", answers_table(models, rows)]
    made = html.escape(json.dumps(info, ensure_ascii=False, indent=1))
    parts.append(f"<h2>How to make it again</h2>\n<pre>{made}</pre>")
    return page("模型效果对比 Model comparison", "\n".join(parts))


# --------------------------------------------------------------------------------------------------
# The same table for other programs


def markdown_table(head, rows):
    def line(cells):
        return f"| {' | '.join(cells)} |\n"

    def cell(said):
        said = re.sub(r"([|\\])", r"\\\1", html.escape(said, quote=False))
        return "<br>".join(said.splitlines())

    ruler = f"|{'---|' * len(head)}\n"
    return line(map(cell, head)) + ruler + "".join(line(map(cell, row)) for row in rows)


def csv_table(head, rows):
    """As spreadsheets read it: in UTF-8 with a BOM. What they would take for a formula, and run,
    has an apostrophe before it, which makes it a text."""

    def cell(said):
        return re.sub(r"^(?=[=+@\t\r-])", "'", str(said))

    sheet = io.StringIO(newline="")
    csv.writer(sheet).writerows([map(cell, row) for row in (head, *rows)])
    return "\ufeff" + sheet.getvalue()
