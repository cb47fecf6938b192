"""One HTML file of a training, which needs no other: accuracy by class, confusions, and where the net looks."""

from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.confused import Confused, Shown
from workbench.drawings import curves, matrix, picture

AS_TABLE = 30  # classes up to which the confusions are a table of counts, and not an image
LISTED = 15  # confused pairs

STYLE = """
:root { color-scheme: light dark; --text: #1e293b; --page: #fff; --line: #cbd5e1; --weak: #5b6778; --bar: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e2e8f0; --page: #0f172a; --line: #334155; --weak: #94a3b8; --bar: #60a5fa; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); }
h1 { margin-bottom: 0; }
h2 { margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1.5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: 1rem; }
.weak { color: var(--weak); }
.wide { overflow-x: auto; }
.long { max-height: 36rem; overflow: auto; }
.counts tbody th { white-space: normal; }
.long thead th { position: sticky; top: 0; background: var(--page); }
table { border-collapse: collapse; }
td, th { padding: .2rem .7rem; text-align: right; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; }
th { font-weight: 600; }
td.name, th.name { text-align: left; min-width: 7rem; white-space: normal; overflow-wrap: anywhere; }
h1, h3, p, li, figcaption { overflow-wrap: anywhere; }
tbody tr { border-top: 1px solid var(--line); }
.bar { min-width: 6rem; }
.bar i { display: block; height: .6rem; background: var(--bar); border-radius: 2px; }
.counts td { text-align: center; padding: .2rem .35rem; min-width: 1.6rem; }
.counts td.none { color: var(--weak); opacity: .5; }
.counts thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .5rem .2rem;
  max-height: 14rem; }
.counts tbody th { text-align: right; min-width: 7rem; }
.figure { max-width: 100%; height: auto; }
.pictures { display: grid; grid-template-columns: repeat(3, minmax(0, 224px)); gap: 1rem; }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; margin-bottom: 4px; }
figcaption { font-size: .85rem; line-height: 1.35; }
@media print { .long { max-height: none; } }
"""


def write(file: Path, metrics: dict[str, Any], shown: Shown) -> None:
    """All of it; the names of classes and files may hold any characters."""
    data, classes = metrics["data"], metrics["classes"]
    confusion = torch.tensor(metrics["confusion"])
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(data["name"])}: training report'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>",
        _head(metrics),
        "<h2>Training</h2>",
        curves(metrics["history"]),
        '<p class="weak">The figures of this report are those after the last epoch. The test images chose none.</p>',
        "<h2>Classes, worst first</h2>",
        _classes(metrics["by_class"]),
        "<h2>Confusions</h2>",
        '<p class="weak">True classes in rows, predicted ones in columns.</p>',
        _counts(confusion, classes) if len(classes) <= AS_TABLE else matrix(confusion, classes),
        "<h2>Most confused pairs</h2>",
        _pairs(shown),
        "<h2>Data and settings</h2>",
        _settings(metrics),
        "</body></html>\n",
    ]
    file.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")


def percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def _head(metrics: dict[str, Any]) -> str:
    low, high = metrics["accuracy_interval"]
    method = "the baseline, plain cross-entropy" if metrics["settings"]["baseline"] else "API-Net"
    return (
        f"<h1>{percent(metrics['accuracy'])} of the test images are right</h1>"
        f'<p class="weak">{escape(metrics["data"]["name"])}: {escape(metrics["settings"]["backbone"])}, {method}</p>'
        f"<p>That is {metrics['right']} of {metrics['test_images']} images, with a 95 % interval of {percent(low)} to "
        f"{percent(high)}. Mean of the classes' accuracies: {percent(metrics['mean_class_accuracy'])}. To name the "
        f"largest class always would make {percent(metrics['largest_class_share'])} right.</p>"
    )


def _classes(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        taken = f"{escape(row['taken_for'])} ({row['taken_for_count']})" if row["taken_for"] is not None else ""
        lines.append(
            f'<tr><td class="name">{escape(row["class"])}</td><td>{percent(row["accuracy"])}</td>'
            f'<td class="bar"><i style="width:{100 * (row["accuracy"] or 0):.1f}%"></i></td><td>{row["right"]}</td>'
            f'<td>{row["test_images"]}</td><td>{row["train_images"]}</td><td class="name">{taken}</td></tr>'
        )
    return (
        '<div class="long"><table><thead><tr><th class="name">class</th><th>accuracy</th><th></th><th>right</th>'
        '<th>test images</th><th>training images</th><th class="name">most often taken for</th></tr></thead><tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def _counts(confusion: Tensor, classes: list[str]) -> str:
    """A table of counts, on colours of their share in the row: blue for right, orange for wrong."""
    names = [escape(name) for name in classes]
    rows = []
    for row, (name, counts) in enumerate(zip(names, confusion.tolist(), strict=True)):
        total = max(1, sum(counts))
        cells = []
        for column, count in enumerate(counts):
            if not count:
                cells.append('<td class="none">0</td>')
                continue
            colour = "37 99 235" if row == column else "234 88 12"
            title = f"{name}, taken for {names[column]}: {count} of {total}"
            cells.append(
                f'<td title="{title}" style="background:rgb({colour}/{0.12 + 0.55 * count / total:.2f})">{count}</td>'
            )
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="wide"><table class="counts"><thead><tr><td></td>{head}</tr></thead><tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _pairs(shown: Shown) -> str:
    if not shown.pairs:
        return "<p>No test image was taken for another class.</p>"
    rows = [
        f'<tr><td class="name">{escape(pair.true)}</td><td class="name">{escape(pair.predicted)}</td>'
        f"<td>{pair.there}</td><td>{pair.back}</td></tr>"
        for pair in shown.pairs[:LISTED]
    ]
    left = len(shown.pairs) - len(rows)
    return (
        '<div class="wide"><table><thead><tr><th class="name">class</th><th class="name">other class</th>'
        "<th>taken for the other</th><th>the other for it</th></tr></thead><tbody>"
        + "\n".join(rows)
        + "</tbody></table></div>"
        + (f'<p class="weak">and {left} more pairs</p>' if left else "")
        + f"<p>Of each pair, the image that the net was surest about and wrong. Beside it, the training images of the "
        f"two classes that are most alike to it by their features. {escape(shown.note)}</p>"
        + "\n".join(_figures(pair) for pair in shown.pairs if pair.pictures)
    )


def _figures(pair: Confused) -> str:
    figures = []
    for each in pair.pictures:
        images = picture(each.pixels, None, each.caption)
        if each.heat is not None:
            images += picture(each.pixels, each.heat, f"{each.caption}: where the net looks")
        figures.append(
            f'<figure>{images}<figcaption>{escape(each.caption)}<br><span class="weak">{escape(each.file)}</span>'
            "</figcaption></figure>"
        )
    return f'<h3>{escape(pair.true)} and {escape(pair.predicted)}</h3><div class="pictures">{"".join(figures)}</div>'


def _settings(metrics: dict[str, Any]) -> str:
    data = metrics["data"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in data["notes"])
    rows = "".join(
        f'<tr><td class="name">{escape(name)}</td><td class="name">{escape(str(value))}</td></tr>'
        for name, value in metrics["settings"].items()
    )
    return (
        f"<p>{data['train']} training and {data['test']} test images of {len(metrics['classes'])} classes.</p>"
        f"<ul>{notes}</ul><table>{rows}</table>"
        f'<p class="weak">{metrics["minutes"]:.1f} minutes on {escape(metrics["machine"])}</p>'
    )
