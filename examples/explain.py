"""Pictures of what the gates see: for pairs of images, the channels that they open most, as heat maps.

Without --pair, the hardest pairs: the test images whose probability of a wrong class exceeds that of the true one the
most, misclassified ones first, each with the nearest test image (by features) of that wrong class. Of the images that
are mistaken between the same two classes only the worst is taken, as long as there are others. Writes a PNG per pair,
and report.html with all of them.

python examples/explain.py runs/birds-api-resnet10t-seed0/best
python examples/explain.py runs/birds-api-resnet10t-seed0/best --pair one.jpg other.jpg
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from apinet_head.explain import explain_pair
from workbench.compared import BirdMarks, Outcome, nearest, run_tests
from workbench.datasets.bad_images import shown
from workbench.explain_page import Page, Side, readable, report, save_png
from workbench.images import Image, load_image, test_transform
from workbench.run_folder import write_text


def hardest_pairs(outcome: Outcome, count: int) -> list[tuple[int, int]]:
    """Indices of test images, (hard one, its nearest of the class it is taken for), hardest first."""
    probabilities, labels = outcome.logits.softmax(1), outcome.labels
    true = probabilities.gather(1, labels[:, None])[:, 0]
    rival = probabilities.scatter(1, labels[:, None], -1).max(1)
    order = (rival.values - true).argsort(descending=True, stable=True)
    # The first of each two classes, then the rest: six pictures of one confusion tell less than of six.
    rank: dict[frozenset[int], int] = {}
    turns = []
    for index in order.tolist():
        classes = frozenset((int(labels[index]), int(rival.indices[index])))
        rank[classes] = turn = rank.get(classes, -1) + 1
        turns.append((turn > 0, index))
    chosen = torch.tensor([index for _, index in sorted(turns, key=lambda turn: turn[0])], dtype=torch.long)
    partner = nearest(outcome.features, chosen, labels == rival.indices[chosen, None])
    pairs = zip(chosen.tolist(), partner.tolist(), strict=True)
    return [(one, other) for one, other in pairs if other >= 0][:count]


def find_image(outcome: Outcome, path: Path) -> Image:
    """An image file as one of the data set's; label -1 if it's none of them and its folder isn't named as a class."""
    if not path.is_file():
        raise SystemExit(f"--pair: {path} is no file")
    known = {image.path.resolve(): image for image in (*outcome.data.test, *outcome.data.train)}
    classes = outcome.data.classes
    label = classes.index(path.resolve().parent.name) if path.resolve().parent.name in classes else -1
    return known.get(path.resolve(), Image(path, label, ""))


@torch.no_grad()
def make_page(outcome: Outcome, pair: tuple[Image, Image], marks: BirdMarks | None, top_k: int) -> Page:
    """What the net makes of two images."""
    settings, net, classes = outcome.settings, outcome.net, outcome.data.classes
    transform = test_transform(settings.resize, settings.crop)
    device = next(net.parameters()).device
    images: Tensor = torch.stack([transform(load_image(image.path)) for image in pair]).to(device)
    seen = explain_pair(net, images, top_k=top_k)
    features = net.backbone(images)
    top = net.head(features).float().softmax(1).max(1)
    sides = []
    for index, (image, other) in enumerate((pair, pair[::-1])):
        known = "" not in (image.image_id, other.image_id)
        sides.append(
            Side(
                file=shown(image.path.name),
                true=readable(classes[image.label]) if image.label >= 0 else "",
                predicted=readable(classes[int(top.indices[index])]),
                probability=float(top.values[index]),
                marks=marks.differing(image, other) if marks and known else [],
            )
        )
    note = ""
    if -1 not in (pair[0].label, pair[1].label) and outcome.data.families:
        families = [outcome.data.families[image.label] for image in pair]
        same = pair[0].label != pair[1].label and families[0] == families[1]
        note = f"Two species of one family: {families[0]}." if same else ""
    return Page(images.cpu(), (sides[0], sides[1]), seen, features.gather(1, seen.plain_channels), note)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder of a run, such as RUN/best or RUN/last")
    parser.add_argument("--pair", type=Path, nargs=2, action="append", metavar="IMAGE", help="two files; repeatable")
    parser.add_argument(
        "--pairs", type=int, default=6, metavar="N", help="how many of the hardest (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=5, help="channels an image (default: %(default)s)")
    parser.add_argument("--data", help="folder of the same data set (default: the data of the training)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: explain/ in the run's folder")
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {options.pairs}")

    outcome = run_tests(options.model, options.data, torch.device(options.device))
    test = outcome.data.test
    if options.pair:
        pairs = [(find_image(outcome, one), find_image(outcome, other)) for one, other in options.pair]
    else:
        pairs = [(test[one], test[other]) for one, other in hardest_pairs(outcome, options.pairs)]
    if not pairs:
        raise SystemExit("no class has a test image to compare another with")
    try:
        marks = BirdMarks(outcome.data, outcome.settings)
    except FileNotFoundError:
        marks = None  # photographs: nobody has written down what differs
    output = options.output or options.model.parent / "explain"
    output.mkdir(parents=True, exist_ok=True)
    pages = [make_page(outcome, pair, marks, options.top_k) for pair in pairs]
    pictures = [save_png(page, output / f"pair{number:02d}.png") for number, page in enumerate(pages, 1)]
    title = f"What the gates see: {options.model.parent.name}/{options.model.name}"
    write_text(output / "report.html", report(title, pages, pictures, marks is not None))
    print(f"{len(pages)} pairs: {output / 'report.html'}")
    return output


if __name__ == "__main__":
    main()
