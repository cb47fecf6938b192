"""Do the gates point at what makes two species differ? Measured on the embedded birds, whose differences are known.

Every test image is compared with its nearest test image (by features) of another species of its family. A channel hits
if the peak of its heat map is near a visible part in which the two species differ. Channels are picked by the gates of
the pair, by the largest activations (without gates), or at random; a gate scales a whole map, so that it decides which
channels are picked, not where a channel's peak is. Chance is a peak anywhere in the bird's box, or in the image. For
several models of one method, hits are averaged image by image.

python examples/pointing_game.py RUN/last [RUN/last ...]
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from apinet_head import APINet, explain_pair
from apinet_head.explain import features_and_maps, heat_maps
from workbench import DEVICE, Command, counted, writing
from workbench.compared import BirdMarks, Outcome, Place, nearest, run_tests
from workbench.guard import check_device
from workbench.heat import map_size
from workbench.images import ImageDataset, eval_transform
from workbench.metrics import scores
from workbench.run_folder import write_text
from workbench.settings import Settings, parse
from workbench.tables import machine, markdown

PICKS = {"gates": "gates", "plain": "activations, no gates", "random": "channels at random"}
CHANCES = {"box": "chance: anywhere in the box", "image": "chance: anywhere in the image"}
MEASURES = {"first": "first channel hits", "any": "any of {k} hits", "share": "share of {k} that hit"}
RESAMPLES = 10_000
Values = dict[str, dict[str, np.ndarray]]  # by pick or chance and by measure, of all images


def peaks(maps: Tensor) -> Tensor:
    """The place (x, y) [...,2] of the largest value of each map [...,H,W], in pixels; NaN for a map all of one value.

    Pixel i reaches from i to i + 1, and its middle is its place. The peak of several equal pixels is their centroid:
    an enlarged map is flat at the border, where the first of equal pixels would always be that nearest the corner.
    """
    top = maps == maps.amax((-2, -1), keepdim=True)
    weight = top.to(maps.dtype).where(~top.all(-1).all(-1)[..., None, None], torch.nan)
    along_x, along_y = (torch.arange(n, dtype=maps.dtype) + 0.5 for n in (maps.shape[-1], maps.shape[-2]))
    places = torch.stack([(weight.sum(-2) * along_x).sum(-1), (weight.sum(-1) * along_y).sum(-1)], -1)
    return places / weight.sum((-2, -1))[..., None]


def hits(places: Tensor, targets: Sequence[Place], radius: float) -> Tensor:
    """Whether each of `places` [...,2] is within `radius` of any target (x, y); bool [...]."""
    distances = torch.linalg.vector_norm(places[..., None, :] - torch.tensor(targets, dtype=places.dtype), dim=-1)
    return (distances <= radius).any(-1)


def chance(targets: Sequence[Place], radius: float, region: tuple[float, float, float, float]) -> float:
    """The share of a region (left, top, right, bottom) that is within `radius` of any target, by area."""
    left, top, right, bottom = region
    steps = (torch.arange(256) + 0.5) / 256
    y, x = torch.meshgrid(top + steps * (bottom - top), left + steps * (right - left), indexing="ij")
    return hits(torch.stack([x, y], -1), targets, radius).float().mean().item()


def measures(hit: Tensor) -> dict[str, float]:
    """First, any and share of the hits [k] of one image."""
    return {"first": float(hit[0]), "any": float(hit.any()), "share": hit.float().mean().item()}


def partners(outcome: Outcome) -> Tensor:
    """[N], for each test image the nearest of another species of its family; -1 if there is none."""
    names = sorted(set(outcome.data.families))
    labels = outcome.labels
    family = torch.tensor([names.index(name) for name in outcome.data.families])[labels]
    allowed = (family[:, None] == family) & (labels[:, None] != labels)
    return nearest(outcome.features, torch.arange(len(labels)), allowed)


@torch.no_grad()
def picked_maps(net: APINet, images: Tensor, top_k: int, generator: torch.Generator) -> tuple[dict[str, Tensor], float]:
    """Heat maps [k,H,W] of the first of two images by each pick; and the share of the gates' picks that plain has."""
    seen = explain_pair(net, images, top_k=top_k)
    maps = features_and_maps(net.backbone, images[:1])[1]
    drawn = torch.randperm(maps.shape[1], generator=generator)[None, :top_k].to(images.device)
    at_random = heat_maps(maps, drawn, images.shape[-2:])[0]
    both = torch.isin(seen.channels[0], seen.plain_channels[0]).float().mean().item()
    return {"gates": seen.heatmaps[0], "plain": seen.plain_heatmaps[0], "random": at_random}, both


def play(outcome: Outcome, *, top_k: int, tolerance: float, seed: int) -> dict[str, Any]:
    """One net's game: for each pick and chance the measures [N] of all images, NaN where there is nothing to hit."""
    net, _, transform = outcome.model
    marks, generator = BirdMarks.of(outcome.data, transform), torch.Generator().manual_seed(seed)
    if marks is None:
        raise SystemExit(f"{outcome.data.name}: only the embedded birds have annotations of where species differ")
    device, test = next(net.parameters()).device, outcome.data.test
    images = ImageDataset(test, eval_transform(transform))
    try:
        resolution = map_size(net, images[0][0][None].to(device))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if not 1 <= top_k <= net.dim:
        raise SystemExit(f"--top-k must be from 1 to the {net.dim} channels of the features, got {top_k}")
    nothing = {name: dict.fromkeys(MEASURES, math.nan) for name in (*PICKS, *CHANCES)}
    rows, shared = [], []
    for index, partner in enumerate(tqdm(partners(outcome).tolist(), desc="pointing game", leave=False)):
        targets = marks.differing(test[index], test[partner]) if partner >= 0 else []
        if not targets:
            rows.append(nothing)
            continue
        pair = torch.stack([images[index][0], images[partner][0]]).to(device)
        heat, both = picked_maps(net, pair, top_k, generator)
        left, top, right, bottom = marks.box(test[index])
        radius = tolerance * max(right - left, bottom - top)
        row = {name: measures(hits(peaks(maps.cpu()), targets, radius)) for name, maps in heat.items()}
        # Peaks at random in the visible part of the bird's box, or anywhere.
        visible = (max(left, 0.0), max(top, 0.0), min(right, marks.crop), min(bottom, marks.crop))
        for name, region in {"box": visible, "image": (0.0, 0.0, marks.crop, marks.crop)}.items():
            p = chance(targets, radius, region)
            row[name] = {"first": p, "any": 1 - (1 - p) ** top_k, "share": p}
        rows.append(row)
        shared.append(both)
    if not shared:
        raise SystemExit("no test image has another species of its family to be compared with, and a visible mark")
    return {
        "values": {name: {m: np.array([row[name][m] for row in rows]) for m in MEASURES} for name in nothing},
        "map": list(resolution),
        "images": len(shared),
        "left_out": len(rows) - len(shared),
        "picked_by_both": float(np.mean(shared)),
        **scores(outcome.logits, outcome.labels),
    }


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of [N] in percent, and its 95 % interval from resampling the images."""
    rng, count = np.random.default_rng(seed), len(values)
    # How often each image is drawn is all that a mean needs.
    means = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) @ values / count
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": 100 * float(values.mean()), "low": 100 * float(low), "high": 100 * float(high)}


def summary(runs: list[Values]) -> dict[str, dict[str, dict[str, float]]]:
    """For each pick and chance, and for what the gates gain on others, the measures over the runs of one method."""

    def over_runs(name: str, measure: str) -> np.ndarray:
        values = np.stack([run[name][measure] for run in runs])
        counted = ~np.isnan(values).all(0)  # in one run at least had the partner a visible difference
        return np.nanmean(values[:, counted], 0)

    rows = {name: {m: interval(over_runs(name, m)) for m in MEASURES} for name in (*PICKS, *CHANCES)}
    for other in ("plain", "random", "box"):
        rows[f"gates - {other}"] = {m: interval(over_runs("gates", m) - over_runs(other, m)) for m in MEASURES}
    return rows


def train_command(settings: Settings) -> str:
    preset = asdict(parse(["--preset", "demo"])) | {"epochs": None}  # always named, in case the preset changes
    command = ["python", "examples/train_cub.py", "--preset", "demo"]
    for name, value in asdict(settings).items():
        if value != preset[name] and name not in ("output", "device", "data"):
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            command += [flag] if isinstance(value, bool) else [flag, str(value)]
    return shlex.join(command)


def as_table(found: dict[str, Any]) -> str:
    k, names = found["settings"]["top_k"], PICKS | CHANCES
    parts = [
        f"A hit: the peak of a channel's heat map is within {found['settings']['tolerance']} of the larger side of the "
        "bird's box of a visible part in which the two species differ. In %, with 95 % intervals from resampling the "
        "test images."
    ]
    for method, group in found["methods"].items():
        rows = []
        for name, row in group["summary"].items():
            sign, title = ("+", name.replace(" - ", " less ")) if " - " in name else ("", names[name])
            form = f"{{mean:{sign}.1f}} ({{low:{sign}.1f}} to {{high:{sign}.1f}})"
            rows.append([title, *(form.format(**row[m]) for m in MEASURES)])
        columns = ["picked by", *(title.format(k=k) for title in MEASURES.values())]
        parts += [heading(method, group["runs"], k), markdown(columns, rows)]
    commands = [run["command"] for group in found["methods"].values() for run in group["runs"]]
    parts += [f"Measured on {found['machine']}. The runs:", "\n".join(["```sh", *commands, "```"])]
    return "\n\n".join(parts)


def heading(method: str, runs: list[dict[str, Any]], k: int) -> str:
    """What there is to know of the runs of one method before their figures."""

    def each(name: str, form: str = "") -> str:
        return ", ".join(format(run[name], form) for run in runs)

    both = 100 * np.mean([run["picked_by_both"] for run in runs])
    return (
        f"**{'API-Net' if method == 'api' else 'Baseline, whose gates were never trained'}**, "
        f"{counted(len(runs), 'run')} (top-1 {each('test_top1', '.1f')} %), feature map "
        f"{' x '.join(map(str, runs[0]['map']))}, {each('images')} images ({each('left_out')} left out: no visible "
        f"difference); {both:.0f} % of the {k} channels picked by the gates are also among the {k} without."
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = Command(__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="model folders of runs on the embedded birds, as RUN/last")
    parser.add_argument("--data", help="folder of the same birds (default: the data of the training)")
    parser.add_argument("--top-k", type=int, default=5, help="channels an image")
    about = "radius of a hit, as a share of the larger side of the bird's box"
    parser.add_argument("--tolerance", type=float, default=0.15, help=about)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random channels")
    parser.add_argument("--device", **DEVICE)
    about = "default: pointing_game.json in the run's folder; the table goes beside it, as .md"
    parser.add_argument("--output", type=Path, metavar="FILE.json", help=about)
    options = parser.parse_args(arguments)

    device = check_device(options.device)
    methods: dict[str, dict[str, Any]] = {}
    for model in options.models:
        outcome = run_tests(model, options.data, device)
        game = play(outcome, top_k=options.top_k, tolerance=options.tolerance, seed=options.seed)
        run = {"model": f"{model.parent.name}/{model.name}", "command": train_command(outcome.settings), **game}
        methods.setdefault(outcome.settings.method, {"runs": []})["runs"].append(run)
    for group in methods.values():
        group["summary"] = summary([run.pop("values") for run in group["runs"]])
    found = {
        "machine": machine(str(device)),
        "settings": {name: getattr(options, name) for name in ("top_k", "tolerance", "seed")},
        "resamples": RESAMPLES,
        "methods": methods,
    }
    output = options.output or options.models[0].parent / "pointing_game.json"
    with writing("--output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(found, indent=2) + "\n")
        write_text(output.with_suffix(".md"), as_table(found) + "\n")
    print(as_table(found))
    return found


if __name__ == "__main__":
    main()
