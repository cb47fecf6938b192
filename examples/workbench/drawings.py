"""Pictures as text for HTML: heat maps over images, training curves, confusions of many classes."""

import base64
import io
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from matplotlib.ticker import MaxNLocator
from torch import Tensor

THEMES = {"light": "default", "dark": "dark_background"}
COLOURS = {"light": "Blues", "dark": "inferno"}  # where there is nothing, the page shows
NAMED = 60  # classes whose names fit beside a heat map


def picture(pixels: Tensor, heat: Tensor | None, alt: str) -> str:
    """An image [3,H,W] in [0, 1], and with `heat` [H,W] in [0, 1] in grey under its colours, as an <img>."""
    image = pixels.permute(1, 2, 0).numpy()
    if heat is not None:
        share = 0.7 * heat.numpy()[..., None]  # of the colours: none where there is no heat
        grey = image.mean(2, keepdims=True) * 0.75 + 0.2
        image = (1 - share) * grey + share * matplotlib.colormaps["turbo"](heat.numpy())[..., :3]
    drawn = PIL.Image.fromarray((255 * np.clip(image, 0, 1)).round().astype(np.uint8))
    buffer = io.BytesIO()
    drawn.resize((224, round(224 * drawn.height / drawn.width)), PIL.Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=88
    )
    return f'<img alt="{escape(alt)}" src="{_uri(buffer, "image/jpeg")}">'


def curves(history: list[dict[str, float]]) -> str:
    """Loss, and accuracy in training and on the test images, over the epochs."""

    def draw(figure: Any, theme: str) -> None:
        left, right = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in history]
        mark = "." if len(history) < 30 else ""
        left.plot(epochs, [row["loss"] for row in history], marker=mark, color="tab:orange")
        left.set(xlabel="epoch", ylabel="training loss", ylim=(0, 1.05 * max(row["loss"] for row in history)))
        tested = [row for row in history if "test_accuracy" in row]
        right.plot(epochs, [100 * row["train_accuracy"] for row in history], color="tab:gray", label="training batches")
        right.plot(
            [row["epoch"] for row in tested], [100 * row["test_accuracy"] for row in tested], "o-", markersize=4,
            color="tab:blue", label="test images",
        )  # fmt: skip
        right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102))
        right.legend(loc="best", frameon=False)
        for axes in (left, right):
            axes.grid(alpha=0.2)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _themed(draw, (9, 3.2), "training loss and accuracy over the epochs")


def matrix(confusion: Tensor, classes: list[str]) -> str:
    """[C,C] as an image, each row in shares of its class."""
    counts = confusion.double()
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    size = 5.5 + 4.5 * min(len(classes), NAMED) / NAMED

    def draw(figure: Any, theme: str) -> None:
        axes = figure.subplots()
        drawn = axes.imshow(shares, vmin=0, vmax=1, cmap=COLOURS[theme], interpolation="nearest")
        figure.colorbar(drawn, ax=axes, label="share of the true class", fraction=0.045, pad=0.02)
        if len(classes) <= NAMED:
            # No mathematics: a name may have dollars in it.
            names = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
        numbered = "" if len(classes) <= NAMED else ", numbered from 0 by name"
        axes.set(xlabel=f"predicted class{numbered}", ylabel=f"true class{numbered}")

    return _themed(draw, (size + 1, size), "confusions: true classes in rows, predicted ones in columns")


def _themed(draw: Callable[[Any, str], None], size: tuple[float, float], alt: str) -> str:
    """A figure for a light page and one for a dark page, of which the browser shows the fitting one."""
    uris = {}
    for theme, style in THEMES.items():
        with plt.style.context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font lacks
            figure = plt.figure(figsize=size, layout="constrained")
            draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110, transparent=True, bbox_inches="tight")
            plt.close(figure)
        uris[theme] = _uri(buffer, "image/png")
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{uris["dark"]}">'
        f'<img class="figure" alt="{escape(alt)}" src="{uris["light"]}"></picture>'
    )


def _uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
