"""The HTML report, one self-contained file: of a training, or of explained pairs of images."""

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jinja2 import Environment, FileSystemLoader, StrictUndefined  # torch needs it too
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from apinet_head import APINet, explain_pair
from workbench.heat import about_map, map_size, overlay
from workbench.images import ImageDataset, unnormalized
from workbench.metrics import confusions, ranked_pairs
from workbench.model_folder import Model

THEMES = {"light": "default", "dark": "dark_background"}
METHODS = {
    "": "API-Net",
    "balanced": "plain cross-entropy on balanced batches, a baseline of API-Net",
    "shuffled": "plain cross-entropy on shuffled images, a baseline of API-Net",
}
COLOURS = {"light": "Blues", "dark": "inferno"}  # zero is the page's background
NAMED = 60  # classes whose names fit beside an image of the confusion matrix
AS_TABLE = 30  # up to so many classes, the confusion matrix is a table of counts
LISTED = 15  # confused pairs of classes
PAIRS = 6  # of these with pictures
CANDIDATES = 32  # training images of a class, of which the most similar is shown
CHANNELS = 5  # whose heat maps are averaged


class Picture(NamedTuple):
    """An image [3,H,W] in [0, 1], and its heat map [H,W] if there is one."""

    pixels: Tensor
    heat: Tensor | None
    file: str
    caption: str


class Confused(NamedTuple):
    """Two classes: how many images of the first were taken for the second, and the other way round."""

    true: str
    predicted: str
    there: int
    back: int
    pictures: list[Picture]


class ConfusedPairs(NamedTuple):
    """All confused pairs, pictures for the first `PAIRS`, and a note on the heat maps."""

    pairs: list[Confused]
    note: str


def write(file: Path, metrics: dict[str, Any], confused: ConfusedPairs) -> None:
    """The report of a training; the names of classes and files may hold any characters."""
    classes = metrics["classes"]
    render(
        file,
        title=f"{metrics['data']['name']}: training report",
        metrics=metrics,
        method=METHODS[metrics["settings"]["baseline"]],
        curves=draw_curves(metrics["history"]),
        matrix=draw_matrix(torch.tensor(metrics["confusion"]), classes) if len(classes) > AS_TABLE else None,
        confused=confused.pairs,
        listed=LISTED,
        note=confused.note,
    )


def render(file: Path, **content: Any) -> None:
    """Fill in the template: with `metrics` it is the report of a training, else that of `pairs` with their figures."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "setting": setting, "picture": picture}
    text = environment.get_template("report.html.jinja").render(**{"metrics": None} | content)
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def setting(value: Any) -> str:
    """A setting as text: 3e-05, not 2.9999999999999997e-05."""
    if value is None or value == "":
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def picture(shown: Picture, heated: bool = False) -> str:
    """The picture as a URI, with or without its heat map."""
    drawn = overlay(shown.pixels, shown.heat if heated else None)
    image = PIL.Image.fromarray((255 * np.clip(drawn, 0, 1)).round().astype(np.uint8))
    image = image.resize((224, round(224 * image.height / image.width)), PIL.Image.Resampling.BICUBIC)
    image.save(buffer := io.BytesIO(), "JPEG", quality=88)
    return uri(buffer.getvalue(), "jpeg")


def uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def draw_curves(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """Loss, and accuracy in training and on the test images, over the epochs."""

    def draw(figure: Any, theme: str) -> None:
        left, right = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in history]
        mark = "." if len(history) < 30 else ""
        left.plot(epochs, [row["loss"] for row in history], marker=mark, color="tab:orange")
        left.set(xlabel="epoch", ylabel="training loss", ylim=(0, 1.05 * max(row["loss"] for row in history)))
        right.plot(epochs, [100 * row["train_accuracy"] for row in history], color="tab:gray", label="training batches")
        tested = [(row["epoch"], 100 * row["test_accuracy"]) for row in history if "test_accuracy" in row]
        right.plot(*zip(*tested, strict=True), "o-", markersize=4, color="tab:blue", label="test images")
        right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102))
        right.legend(loc="best", frameon=False)
        for axes in (left, right):
            axes.grid(alpha=0.2)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _themed(draw, (9, 3.2))


def draw_matrix(confusion: Tensor, classes: list[str]) -> dict[str, str]:
    """[C,C] as an image, each row in shares of its class."""
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    size = 5.5 + 4.5 * min(len(classes), NAMED) / NAMED

    def draw(figure: Any, theme: str) -> None:
        axes = figure.subplots()
        drawn = axes.imshow(shares, vmin=0, vmax=1, cmap=COLOURS[theme], interpolation="nearest")
        figure.colorbar(drawn, ax=axes, label="share of the true class", fraction=0.045, pad=0.02)
        numbered = ", numbered from 0 by name"
        if len(classes) <= NAMED:
            # parse_math=False: a name may contain dollar signs.
            names, numbered = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes], ""
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
        axes.set(xlabel=f"predicted class{numbered}", ylabel=f"true class{numbered}")

    return _themed(draw, (size + 1, size))


def _themed(draw: Callable[[Any, str], None], size: tuple[float, float]) -> dict[str, str]:
    """URIs of a figure for a light page and of one for a dark page; the browser picks one."""
    uris = {}
    for theme, style in THEMES.items():
        with matplotlib.style.context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font lacks
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, theme)
            figure.savefig(buffer := io.BytesIO(), format="png", dpi=110, transparent=True, bbox_inches="tight")
        uris[theme] = uri(buffer.getvalue(), "png")
    return uris


def show_pairs(
    model: Model, train: ImageDataset, test: ImageDataset, likely: Tensor, *, baseline: bool
) -> ConfusedPairs:
    """The most confused pairs of classes, each with a wrong image, and what the net looks at when it compares it.

    Both sets of images are prepared for testing; `likely` [N,C] are the probabilities of the test images.
    """
    net, classes, transform = model
    labels, predicted = torch.tensor(test.labels), likely.argmax(1)
    example = test[0][0][None]
    if baseline:
        which = f"the {CHANNELS} most active channels, as the gates of the baseline are not trained"
    else:
        which = (
            f"the {CHANNELS} channels with the largest gates: the training images compared with the wrong one, and "
            "the wrong one with that of the class it was taken for"
        )
    note = f"The colours, from blue to red, show where in an image its features are active, as the mean over {which}."
    try:
        note, heated = f"{note} {about_map(map_size(net, example), example)}", True
    except ValueError as error:  # the map is too coarse, or its channels are not those of the gates
        note, heated = f"There are no heat maps: {error}.", False
    found = []
    for a, b, there, back in ranked_pairs(confusions(test.labels, predicted.tolist(), len(classes))):
        pictures: list[Picture] = []
        if len(found) < PAIRS:
            row = int((likely[:, b] * ((labels == a) & (predicted == b))).argmax())  # the surest
            image = test[row][0]
            alike = [_most_alike(net, train, image, label) for label in (b, a)]
            images = torch.stack([image, *(train[index][0] for index in alike)])
            heats = _heats(net, images, baseline) if heated else [None] * 3
            files = [test.images[row].path.name, *(train.images[index].path.name for index in alike)]
            captions = [f"{classes[a]}, taken for {classes[b]} ({likely[row, b]:.0%})"]
            captions += [f"{classes[label]}, in training" for label in (b, a)]
            pictures = list(map(Picture, unnormalized(images, transform), heats, files, captions))
        found.append(Confused(classes[a], classes[b], there, back, pictures))
    return ConfusedPairs(found, note)


def _heats(net: APINet, images: Tensor, baseline: bool) -> list[Tensor | None]:
    """Of the first of three images, compared with the second, and of the others, compared with the first; in [0, 1]."""
    seen = [explain_pair(net, images[[0, other]], top_k=min(CHANNELS, net.dim)) for other in (1, 2)]
    means = [(each.plain_heatmaps if baseline else each.heatmaps).mean(1) for each in seen]
    heats = [means[0][0], means[0][1], means[1][1]]
    return [(heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6) for heat in heats]


@torch.no_grad()
def _most_alike(net: APINet, train: ImageDataset, image: Tensor, label: int) -> int:
    """By the cosine of the features, among the first images of the class."""
    rows = [row for row, other in enumerate(train.labels) if other == label][:CANDIDATES]
    features = net.backbone(torch.stack([image, *(train[row][0] for row in rows)]))
    return rows[int(F.cosine_similarity(features[:1], features[1:]).argmax())]
