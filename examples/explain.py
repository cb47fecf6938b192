"""Pictures of what the gates see: for pairs of images, the channels with the largest gates, as heat maps.

Without --pair, the hardest pairs of a run of train_cub.py: the test images whose probability of a wrong class exceeds
that of the true one the most, each with the nearest test image (by features) of that wrong class. Of images confused
between the same two classes, only the worst is taken as long as there are others. With --pair, any two files and any
model folder. Writes a PNG per pair, and report.html with all of them.

python examples/explain.py runs/birds-api-resnet10t-seed0/best
python examples/explain.py own-model --pair one.jpg other.jpg
"""

import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from apinet_head import PairExplanation, explain_pair
from workbench import DEVICE, Command, counted, model_folder, number, shown, writing
from workbench.compared import BirdMarks, Outcome, Place, nearest, run_tests
from workbench.datasets.lists import Image
from workbench.guard import check_device
from workbench.heat import about_map, map_size, overlay
from workbench.image_files import BadImageError, load_image
from workbench.images import eval_transform, unnormalized
from workbench.model_folder import Model
from workbench.report import render, uri

GATED, PLAIN = "#c2410c", "#475569"


class Side(NamedTuple):
    """One image of a pair."""

    file: str
    true: str  # class, empty if unknown
    predicted: str
    probability: float
    marks: list[Place]  # where the two are known to differ


class Pair(NamedTuple):
    """Two images, and the net's outputs for them."""

    pixels: Tensor  # [2,3,H,W] in [0, 1]
    sides: list[Side]
    seen: PairExplanation
    activations: Tensor  # [2,k], of the plain channels
    map_size: tuple[int, int]
    note: str


def readable(class_name: str) -> str:
    """ "001.Black_footed_Albatross" as "Black footed Albatross"."""
    return re.sub(r"^\d+\.", "", class_name).replace("_", " ")


def hardest_pairs(outcome: Outcome, count: int) -> list[tuple[int, int]]:
    """Indices of test images, (hard one, its nearest of the class it is taken for), hardest first."""
    probabilities, labels = outcome.logits.softmax(1), outcome.labels
    true = probabilities.gather(1, labels[:, None])[:, 0]
    rival = probabilities.scatter(1, labels[:, None], -1).max(1)
    order = (rival.values - true).argsort(descending=True, stable=True)
    # The first of each pair of classes, then the rest: pictures of six confusions tell more than six of one.
    first: dict[frozenset[int], int] = {}
    for index in order.tolist():
        first.setdefault(frozenset((int(labels[index]), int(rival.indices[index]))), index)
    chosen = torch.tensor(list(dict.fromkeys([*first.values(), *order.tolist()])), dtype=torch.long)
    partner = nearest(outcome.features, chosen, labels == rival.indices[chosen, None])
    pairs = zip(chosen.tolist(), partner.tolist(), strict=True)
    return [(one, other) for one, other in pairs if other >= 0][:count]


def find_image(path: Path, classes: list[str], known: dict[Path, Image]) -> Image:
    """The data set's image with this path; for other files, the folder may be the class, else the label is -1."""
    if not path.is_file():
        raise SystemExit(f"--pair: {shown(str(path))} is not a file")
    folder = path.resolve().parent.name
    label = classes.index(folder) if folder in classes else -1
    return known.get(path.resolve(), Image(path, label, ""))


@torch.no_grad()
def make_pair(
    model: Model, pair: tuple[Image, Image], top_k: int, families: list[str], marks: BirdMarks | None
) -> Pair:
    """The net's outputs for two images."""
    net, classes, transform = model
    prepare = eval_transform(transform)
    images = torch.stack([prepare(load_image(image.path)) for image in pair]).to(next(net.parameters()).device)
    size = map_size(net, images)
    seen = explain_pair(net, images, top_k=top_k)
    features = net.backbone(images)
    top = net.head(features).float().softmax(1).max(1)
    known = "" not in (pair[0].image_id, pair[1].image_id)
    rows = zip(pair, pair[::-1], top.indices.tolist(), top.values.tolist(), strict=True)
    sides = [
        Side(
            file=shown(image.path.name),
            true=readable(classes[image.label]) if image.label >= 0 else "",
            predicted=readable(classes[index]),
            probability=probability,
            marks=marks.differing(image, other) if marks and known else [],
        )
        for image, other, index, probability in rows
    ]
    note = f"Cosine of the two features: {float(seen.similarity):.3f}."
    labels = {image.label for image in pair}
    if families and len(labels) == 2 and -1 not in labels and len({families[label] for label in labels}) == 1:
        note += f" Two species of one family: {families[pair[0].label]}."
    activations = features.gather(1, seen.plain_channels)
    return Pair(unnormalized(images, transform), sides, seen, activations, size, note)


def draw(pair: Pair) -> Figure:
    """Each image beside two rows of heat maps: channels picked by the gates, and below them by activations alone."""
    seen, k = pair.seen, pair.seen.channels.shape[1]
    gates, activations = seen.gates.gather(1, seen.channels), pair.activations
    rows = (
        ("by the gates", GATED, seen.channels, seen.plain_channels, seen.heatmaps, "gate {:.3f}", gates),
        ("without gates", PLAIN, seen.plain_channels, seen.channels, seen.plain_heatmaps, "act. {:.2f}", activations),
    )
    figure = Figure(figsize=(2.9 + 1.35 * k, 6.6), facecolor="white")
    margins = {"left": 0.01, "right": 0.99, "top": 0.88, "bottom": 0.02, "wspace": 0.1, "hspace": 0.3}
    halves: Any = figure.subfigures(2, 1, hspace=0.02)
    for index, (half, side) in enumerate(zip(halves, pair.sides, strict=True)):
        # The second column holds the names of the rows.
        grid = half.add_gridspec(2, k + 2, width_ratios=[2.25, 0.08, *[1] * k], **margins)
        caption = f"{side.true or 'class unknown'}\ntaken for {side.predicted} ({100 * side.probability:.0f} %)"
        colour = "#15803d" if side.true == side.predicted else "#b91c1c"
        _tile(half.add_subplot(grid[:, 0]), overlay(pair.pixels[index], None), side.marks, caption, colour)
        for row, (name, colour, channels, others, heats, form, values) in enumerate(rows):
            for column, channel in enumerate(channels[index].tolist()):
                axes = half.add_subplot(grid[row, column + 2])
                both = "*" if channel in others[index].tolist() else ""
                title = f"ch {channel}{both}\n{form.format(float(values[index, column]))}"
                _tile(axes, overlay(pair.pixels[index], heats[index, column]), side.marks, title, colour)
                if column == 0:
                    place = {"transform": axes.transAxes, "ha": "right", "va": "center", "rotation": 90}
                    axes.text(-0.05, 0.5, name, fontsize=8.5, color=colour, **place)
    return figure


def _tile(axes: Any, image: Any, marks: list[Place], title: str, colour: str) -> None:
    axes.imshow(image.clip(0, 1), interpolation="bilinear")
    axes.set_title(title, fontsize=7.5, color=colour, pad=3, parse_math=False)
    axes.set_axis_off()
    for x, y in marks:
        for edge, line in (("black", 2.2), ("white", 1)):  # visible on light and dark
            circle = Circle((x - 0.5, y - 0.5), 0.07 * image.shape[1], fill=False, color=edge, linewidth=line)
            axes.add_patch(circle)


def write(folder: Path, title: str, pairs: list[Pair]) -> None:
    """A PNG per pair, and report.html with all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = []
    for place, pair in enumerate(pairs, 1):
        figure = draw(pair)
        figure.savefig(folder / f"pair{place:02d}.png", dpi=130)
        figure.savefig(small := io.BytesIO(), format="jpeg", dpi=130, pil_kwargs={"quality": 88})
        pair_title = " and ".join(side.true or side.file for side in pair.sides)
        content.append(pair._asdict() | {"title": pair_title, "figure": uri(small.getvalue(), "jpeg")})
    k = pairs[0].seen.channels.shape[1]
    note = (
        f"Beside each image, upper row: the {k} channels with the largest gates, given the other image of the pair. "
        f"Lower row: the {k} most active channels of the same net, without gates. Red is where in the image a channel "
        "is active; each map has its own scale. A gate is one number per channel: it decides which channels count, "
        "not where they are active. * marks a channel in both rows. "
        f"{about_map(pairs[0].map_size, pairs[0].pixels)}"
    )
    if any(side.marks for pair in pairs for side in pair.sides):
        note += " Circles: the visible parts in which the two species differ."
    render(folder / "report.html", title=title, note=note, pairs=content)


def main(arguments: list[str] | None = None) -> Path:
    parser = Command(__doc__)
    parser.add_argument("model", type=Path, help="model folder, such as RUN/best or RUN/last")
    parser.add_argument("--pair", type=Path, nargs=2, action="append", metavar="IMAGE", help="two files; repeatable")
    parser.add_argument("--pairs", type=number(int, 1), default=6, metavar="N", help="how many of the hardest")
    parser.add_argument("--top-k", type=number(int, 1), default=5, help="channels an image")
    parser.add_argument("--data", help="folder of the same data set (default: the data of the training)")
    parser.add_argument("--device", **DEVICE)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: explain/ beside the model folder")
    options = parser.parse_args(arguments)
    device = check_device(options.device)

    families, marks, known = [], None, {}
    if not (options.model / "run.json").exists():  # of train_own.py
        model = model_folder.load(options.model)
        model.net.to(device)
        if not options.pair:
            advice = "its report.html has the most confused pairs, and --pair takes any two images"
            raise SystemExit(f"{options.model} is not from train_cub.py, so its test images are unknown: {advice}")
    else:
        outcome = run_tests(options.model, options.data, device)
        model, families, test = outcome.model, outcome.data.families, outcome.data.test
        known = {image.path.resolve(): image for image in (*test, *outcome.data.train)}
        marks = BirdMarks.of(outcome.data, model.transform)
    if options.pair:
        pairs = [tuple(find_image(path, model.classes, known) for path in pair) for pair in options.pair]
    else:
        pairs = [(test[one], test[other]) for one, other in hardest_pairs(outcome, options.pairs)]
    if options.top_k > model.net.dim:
        raise SystemExit(f"--top-k must be from 1 to the {model.net.dim} channels of the features, got {options.top_k}")
    if not pairs:
        raise SystemExit("no class has a test image to compare another with")
    try:
        explained = [make_pair(model, pair, options.top_k, families, marks) for pair in pairs]
    except (ValueError, BadImageError) as error:
        raise SystemExit(shown(str(error))) from None
    output = options.output or options.model.parent / "explain"
    with writing("--output", output):
        write(output, f"What the gates see: {options.model.resolve().parent.name}/{options.model.name}", explained)
    print(f"{counted(len(explained), 'pair')}: {output / 'report.html'}")
    return output


if __name__ == "__main__":
    main()
