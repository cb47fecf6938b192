"""Draws what a net sees in a pair of images, and puts all pairs into one HTML page that needs no other file."""

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from apinet_head.explain import PairExplanation
from workbench.compared import Place
from workbench.images import MEAN, STD

GATED, PLAIN = "#c2410c", "#475569"


@dataclass
class Side:
    """One image of a pair: its true class (empty: unknown), what it is taken for, where the two are known to differ."""

    file: str
    true: str
    predicted: str
    probability: float
    marks: list[Place] = field(default_factory=list)

    @property
    def caption(self) -> str:
        return f"{self.true or 'class unknown'}\ntaken for {self.predicted} ({100 * self.probability:.0f} %)"


@dataclass
class Page:
    """A pair, ready to be drawn."""

    images: Tensor  # [2,3,H,W], as the net sees them
    sides: tuple[Side, Side]
    seen: PairExplanation
    activations: Tensor  # [2,k], of the plain channels
    note: str = ""

    @property
    def title(self) -> str:
        first, second = (side.true or Path(side.file).name for side in self.sides)
        return f"{first} and {second}"


def readable(class_name: str) -> str:
    """ "001.Black_footed_Albatross" as "Black footed Albatross"."""
    number, dot, name = class_name.partition(".")
    return (name if dot and number.isdigit() else class_name).replace("_", " ")


def draw(page: Page) -> plt.Figure:
    """Each image beside two rows of heat maps over it: the channels picked by the gates, and below those without."""
    k = page.seen.channels.shape[1]
    figure = plt.figure(figsize=(2.9 + 1.35 * k, 6.6), facecolor="white")
    halves: Any = figure.subfigures(2, 1, hspace=0.02)
    pixels = (page.images.cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)
    for half, side, index in zip(halves, page.sides, range(2), strict=True):
        grid = half.add_gridspec(
            2,
            k + 2,
            width_ratios=[2.25, 0.08, *[1] * k],  # the second for the names of the rows
            left=0.01,
            right=0.99,
            top=0.88,
            bottom=0.02,
            wspace=0.1,
            hspace=0.3,
        )
        picture = pixels[index].permute(1, 2, 0).numpy()
        big = half.add_subplot(grid[:, 0])
        big.imshow(picture, interpolation="bilinear")
        big.set_title(side.caption, fontsize=8.5, color="#15803d" if side.true == side.predicted else "#b91c1c")
        _mark(big, side.marks, picture.shape[1], 1.4)
        for column in range(k):
            _channel(half.add_subplot(grid[0, column + 2]), page, index, column, picture, gated=True)
            _channel(half.add_subplot(grid[1, column + 2]), page, index, column, picture, gated=False)
        for axes in half.axes:
            axes.set_axis_off()
    return figure


def _channel(axes: Any, page: Page, index: int, column: int, picture: Any, *, gated: bool) -> None:
    seen = page.seen
    channels, others = (seen.channels, seen.plain_channels) if gated else (seen.plain_channels, seen.channels)
    channel = int(channels[index, column])
    heat = (seen.heatmaps if gated else seen.plain_heatmaps)[index, column].cpu().numpy()
    grey = picture.mean(2, keepdims=True).repeat(3, 2) * 0.75 + 0.2  # the heat has all the colour
    axes.imshow(grey, vmin=0, vmax=1, interpolation="bilinear")
    axes.imshow(heat, cmap="turbo", vmin=0, vmax=1, alpha=0.15 + 0.6 * heat, interpolation="bilinear")
    _mark(axes, page.sides[index].marks, picture.shape[1], 0.9)
    value = (
        f"gate {float(seen.gates[index, channel]):.3f}"
        if gated
        else f"act. {float(page.activations[index, column]):.2f}"
    )
    both = "*" if channel in others[index].tolist() else ""
    if column == 0:
        label = "by the gates" if gated else "without gates"
        axes.text(-0.05, 0.5, label, transform=axes.transAxes, rotation=90, ha="right", va="center", fontsize=8.5,
                  color=GATED if gated else PLAIN)  # fmt: skip
    axes.set_title(f"ch {channel}{both}\n{value}", fontsize=7.5, color=GATED if gated else PLAIN, pad=3)


def _mark(axes: Any, marks: list[Place], side: int, width: float) -> None:
    for x, y in marks:
        for colour, line in (("black", 2.2 * width), ("white", width)):  # seen on light and on dark
            axes.add_patch(plt.Circle((x - 0.5, y - 0.5), 0.07 * side, fill=False, color=colour, linewidth=line))


def save_png(page: Page, file: Path) -> str:
    """Writes the picture of a page, and returns a smaller JPEG of it as text for HTML."""
    figure = draw(page)
    figure.savefig(file, dpi=130)
    small = io.BytesIO()
    figure.savefig(small, format="jpeg", dpi=130, pil_kwargs={"quality": 88})
    plt.close(figure)
    return base64.b64encode(small.getvalue()).decode()


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1e293b;
  background: #fff; }
h2 { margin: 2.5rem 0 .5rem; border-top: 1px solid #cbd5e1; padding-top: 1.5rem; font-size: 1.2rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; }
.wrong { color: #b91c1c; } .right { color: #15803d; } .gated { color: #c2410c; } .plain { color: #475569; }
"""


def report(title: str, pages: list[Page], pictures: list[str], marked: bool) -> str:
    """The HTML of all pairs; nothing in it is loaded from elsewhere."""
    k = pages[0].seen.channels.shape[1]
    intro = (
        f'Beside each image, <b class="gated">upper row</b>: the {k} channels that its gates open most, given the '
        f'other image of the pair. <b class="plain">Lower row</b>: the {k} channels of the same net that are most '
        "active, without gates. Red is where in the image a channel is active, each scaled by itself. A gate is one "
        "number per channel: it decides which channels are looked at, not where they are active. * marks a channel in "
        "both rows."
    )
    if marked:
        intro += " Circles: the visible parts in which the two species truly differ."
    parts = [
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>\n<p>{intro}</p>",
    ]
    for number, (page, picture) in enumerate(zip(pages, pictures, strict=True), 1):
        parts.append(f"<h2>{number}. {html.escape(page.title)}</h2>")
        parts.append("<table><tr><th>image</th><th>true</th><th>predicted</th><th>probability</th></tr>")
        for side in page.sides:
            kind = "right" if side.true == side.predicted else "wrong"
            cells = (side.file, side.true or "unknown", side.predicted, f"{100 * side.probability:.1f} %")
            one, two, three, four = map(html.escape, cells)
            parts.append(f"<tr><td>{one}</td><td>{two}</td><td class='{kind}'>{three}</td><td>{four}</td></tr>")
        note = f" {html.escape(page.note)}" if page.note else ""
        parts.append(f"</table><p>Cosine of the two features: {float(page.seen.similarity):.3f}.{note}</p>")
        parts.append(f"<img alt='heat maps: {html.escape(page.title)}' src='data:image/jpeg;base64,{picture}'>")
    return "\n".join([*parts, "</body></html>\n"])
