"""Draws method.png, the README's figure: one pair of images on its way through API-Net.

The birds are two species of one family of the embedded set.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from birds.dataset import catalogue
from birds.draw import draw_bird

BLUE, ORANGE, GREY = "#2a6f97", "#c8553d", "#6c757d"
TOP, BOTTOM, MIDDLE = 3.1, 0.9, 2.0  # heights of the two images' lanes and of what they share


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.0, height: float = 0.62) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height,
        boxstyle="round,pad=0.02,rounding_size=0.1", facecolor=colour + "22", edgecolor=colour, linewidth=1.4,
    )  # fmt: skip
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY, bend: float = 0
) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.3, connectionstyle=style
        )
    )


def bird(axes: Axes, index: int, seed: int, x: float, y: float, caption: str) -> None:
    picture = draw_bird(catalogue(20)[index], np.random.default_rng(seed), 224).picture
    axes.imshow(picture, extent=(x - 0.65, x + 0.65, y - 0.65, y + 0.65), zorder=2)
    axes.text(x, y - 0.72, caption, ha="center", va="top", fontsize=8.5, color=GREY)


def main() -> None:
    figure, axes = plt.subplots(figsize=(12, 4.1))
    bird(axes, 14, 8, 0.7, TOP, "Double Barred Warbler")
    bird(axes, 11, 12, 0.7, BOTTOM, "Ashmoor Warbler: its nearest of another class")
    for y, colour, name in ((TOP, BLUE, "a"), (BOTTOM, ORANGE, "b")):
        other = "b" if name == "a" else "a"
        arrow(axes, (1.4, y), (1.83, y), colour)
        box(axes, 2.4, y, "backbone", GREY)
        arrow(axes, (2.95, y), (3.33, y), colour)
        box(axes, 3.75, y, f"$x_{name}$", colour, 0.7)
        arrow(axes, (4.1, y + (0.1 if y < MIDDLE else -0.1)), (4.72, MIDDLE + (-0.25 if y < MIDDLE else 0.25)), colour)
        arrow(axes, (6.28, MIDDLE + (-0.25 if y < MIDDLE else 0.25)), (6.9, y + (0.2 if y < MIDDLE else -0.2)), GREY)
        arrow(axes, (4.15, y), (6.2, y), colour)
        box(axes, 7.2, y, rf"gate $g_{name}=\sigma(m\,x_{name})$", colour, 1.9)
        arrow(axes, (8.2, y), (8.72, y), colour)
        box(axes, 9.75, y + 0.38, rf"$x_{name}^{{self}}=x_{name}+x_{name}\,g_{name}$", colour, 1.95, 0.5)
        box(axes, 9.75, y - 0.38, rf"$x_{name}^{{other}}=x_{name}+x_{name}\,g_{other}$", colour, 1.95, 0.5)
        arrow(axes, (10.8, y), (11.35, MIDDLE + (-0.3 if y < MIDDLE else 0.3)), colour)
    arrow(axes, (8.2, TOP - 0.2), (8.72, BOTTOM - 0.25), BLUE)
    arrow(axes, (8.2, BOTTOM + 0.2), (8.72, TOP - 0.25), ORANGE)
    box(axes, 5.5, MIDDLE, "mutual vector\n$m=\\mathrm{mlp}([x_a,x_b])$", "#5b8e7d", 1.75, 0.95)
    box(axes, 12.1, MIDDLE, "classifier\non all four", GREY, 1.4, 0.9)
    axes.text(
        12.1, MIDDLE - 0.62, "cross-entropy, and\n$p^{self}$ above $p^{other}$\nby a margin", ha="center", va="top",
        fontsize=9, color=GREY,
    )  # fmt: skip
    axes.text(
        6.4, -0.4, "In training, every image is paired with its nearest of the same class and of another class. "
        "At test time only backbone and classifier run.", ha="center", va="center", fontsize=10.5,
    )  # fmt: skip
    axes.set(xlim=(-0.3, 12.95), ylim=(-0.6, 4.0), aspect="equal")
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
