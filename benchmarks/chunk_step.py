"""What a training step in chunks costs over the whole batch at once, by how many chunks are kept.

    python benchmarks/chunk_step.py --output benchmarks/results

The ways take turns, and ratios are taken within a round. Beside them stands the way of GradCache and of the cached
losses of sentence-transformers, written from their description: all features without gradients, the loss's gradient for
the features, then every chunk once more with that gradient. "On paper" a backward pass takes twice the time of a
forward pass, and running chunks again is all that chunks cost. Memory is what a step takes beyond parameters, their
gradients and the images: of PyTorch's allocations on a GPU, of a fresh process's resident set on a CPU.

Writes DEVICE-DATE-chunks.json, and a Markdown table of the same name.
"""

import argparse
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from footprint import can_measure_growth, growth_of_process, in_fresh_process, peak_on_device
from machine import default_device, origin, write_json
from tables import origin_line
from torch import Tensor, nn
from tqdm import tqdm
from turns import ratio, reason, release, summarise, take_turns

from apinet_head import APIHead, ChunkedBackbone, api_loss

WHOLE, CACHED = "the whole batch at once", "cache all, run all again"
CLASSES = 200  # as in CUB-200-2011


class Case(NamedTuple):
    backbone: str
    pixels: int
    batch: int
    chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.batch // self.chunk)

    def kept(self) -> dict[str, int]:
        """For each way in chunks how many are kept."""
        counts = {"none": 0, "one": 1, "half": self.chunks // 2, "all but one": self.chunks - 1, "all": self.chunks}
        return {f"{name} kept": count for name, count in counts.items()}

    def on_paper(self, way: str) -> float:
        """Time of a step over that of the whole batch, where a forward pass is a third of it."""
        again = {WHOLE: 0, CACHED: self.chunks} | {name: self.chunks - count for name, count in self.kept().items()}
        return 1 + again[way] / self.chunks / 3


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [Case("resnet50", 96, 32, 4), Case("convnext_tiny", 96, 32, 4)]
    large = [Case(name, 224, 120, 15) for name in ("resnet50", "convnext_tiny", "vit_base_patch16_224")]
    return [*large, Case("resnet101", 448, 120, 15)]


class Training:
    """Backbone and head with SGD and momentum, in the midst of their training, on one batch of random images."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.backbone: Any = timm.create_model(case.backbone, pretrained=False, num_classes=0).to(device)
        self.head = APIHead(self.backbone.num_features, CLASSES, device=device)
        self.images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
        self.labels = (torch.arange(case.batch, device=device) // 4) % CLASSES
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def ways(self) -> dict[str, Callable[[], None]]:
        """A step in each way."""
        case = self.case
        chunked = {name: ChunkedBackbone(self.backbone, case.chunk, keep=count) for name, count in case.kept().items()}
        steps = {name: partial(self.step, run) for name, run in [(WHOLE, self.backbone), *chunked.items()]}
        return {**steps, CACHED: self.cached_step}

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, run: nn.Module) -> None:
        with self.autocast():
            loss = api_loss(self.head(run(self.images), self.labels))
        self._zero()
        loss.backward()
        self.optimizer.step()

    def cached_step(self) -> None:
        chunks, states = self.images.split(self.case.chunk), []
        with torch.no_grad(), self.autocast():
            parts = []
            for chunk in chunks:
                states.append(self._random_state())
                parts.append(self.backbone(chunk))
        features = torch.cat(parts).requires_grad_()
        with self.autocast():
            loss = api_loss(self.head(features, self.labels))
        self._zero()
        loss.backward()
        gradient: Any = features.grad
        after = self._random_state()
        for chunk, state, part in zip(chunks, states, gradient.split(self.case.chunk), strict=True):
            self._random_state(state)
            with self.autocast():
                again = self.backbone(chunk)
            again.backward(part)
        self._random_state(after)
        self.optimizer.step()

    def _zero(self) -> None:
        for group in self.optimizer.param_groups:
            torch._foreach_zero_([parameter.grad for parameter in group["params"]])  # so that memory stays comparable

    def _random_state(self, state: list[Tensor] | None = None) -> list[Tensor]:
        """The state of torch's random numbers, which is set to `state` first."""
        cuda = self.device.type == "cuda"
        if state is not None:
            torch.set_rng_state(state[0])
            if cuda:
                torch.cuda.set_rng_state(state[1], self.device)
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if cuda else [])]


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time and memory of each way; of those that failed the reason."""
    ways = Training(case, device).ways()
    for step in ways.values():
        with suppress(Exception):  # which comes again in the turns
            step()  # loads kernels: the first turn, from which follows how many there are, is as long as the others
    turns = take_turns(ways, device, seconds)
    found = summarise(turns, WHOLE)
    for way in turns.seconds:
        if "all kept" in turns.seconds:
            found[way]["over all kept"] = ratio(turns, way, "all kept")
        found[way] |= memory(way, ways[way], case, device)
    return {**case._asdict(), "dtype": "bfloat16" if device.type == "cuda" else "float32", "ways": found}


def memory(way: str, step: Callable[[], None], case: Case, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        try:
            return {"memory": peak_on_device(step, device)}
        except torch.cuda.OutOfMemoryError as error:
            return {"memory absent": reason(error)}
    if not can_measure_growth():
        return {}
    grown, failure = in_fresh_process(grow, way, case, seconds=120)
    return {"memory": grown} if failure is None else {"memory absent": failure}


def grow(way: str, case: Case) -> int:
    """Bytes by which this process grows in a step; a tiny one has loaded what is loaded at first use."""
    device = torch.device("cpu")
    Training(case._replace(batch=8, chunk=4, pixels=32), device).ways()[way]()
    training = Training(case, device)
    training.optimizer.step()  # makes its momentum
    return growth_of_process(training.ways()[way])


def make_report(found: Mapping[str, Any]) -> str:
    parts = ["# A training step in chunks", origin_line(found["origin"])]
    for point in found["points"]:
        case = Case(*(point[name] for name in Case._fields))
        parts.append(f"## {case.backbone}, {case.batch} x {case.pixels}², chunks of {case.chunk}, {point['dtype']}")
        parts.append(table(case, point["ways"]))
    parts += [f"**{name} failed**: {error}" for name, error in found["errors"].items()]
    return "\n\n".join(parts)


def table(case: Case, ways: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| way | ms | over the whole batch [quartiles] | on paper | over all chunks kept | memory, GiB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for way, side in ways.items():
        if "absent" in side:
            lines.append(f"| {way} | {side['absent']} | | {case.on_paper(way):.2f} | | |")
            continue
        whole, kept = (_spread(side.get(name)) for name in ("ratio", "over all kept"))
        peak = f"{side['memory'] / 2**30:.2f}" if "memory" in side else side.get("memory absent", "—")
        milliseconds = f"{1000 * side['seconds']['median']:.1f}"
        lines.append(f"| {way} | {milliseconds} | {whole} | {case.on_paper(way):.2f} | {kept} | {peak} |")
    return "\n".join(lines)


def _spread(values: Mapping[str, float] | None) -> str:
    return "—" if values is None else f"{values['median']:.2f} [{values['low']:.2f}, {values['high']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=4, action="append", metavar=("BACKBONE", "PIXELS", "BATCH", "CHUNK"))
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument(
        "--seconds", type=float, default=36, help="of timed steps, for all cases (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="folder for the JSON and the table")
    options = parser.parse_args()
    chosen = [Case(name, *map(int, sizes)) for name, *sizes in options.case or []] or cases(options.device)
    found: dict[str, Any] = {"origin": origin(options.device), "points": [], "errors": {}}
    for case in tqdm(chosen, desc="steps in chunks"):
        try:
            found["points"].append(measure(case, options.device, options.seconds / len(chosen)))
        except Exception:  # the other cases are worth their time nevertheless
            found["errors"][" ".join(map(str, case))] = traceback.format_exc(limit=-1).strip().split("\n")[-1]
            traceback.print_exc()
        release(options.device)
    print(make_report(found))
    if options.output:
        write_json(options.output, found, "-chunks").with_suffix(".md").write_text(make_report(found) + "\n")


if __name__ == "__main__":
    main()
