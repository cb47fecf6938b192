"""Peak memory of a training step: the whole batch, gradient checkpointing, and chunks of several sizes.

    python benchmarks/memory.py --output benchmarks/results

Three kinds of figures, which the table and the plot keep apart: estimates (fake tensors, nothing is run) for ResNet-101
at 448 x 448 pixels; the same measured, where there is a CUDA device; and a smaller problem measured on the CPU, each
point in a process of its own. Step times are measured in turn, round after round, and ratios taken within a round.
Writes DEVICE-DATE-memory.json, and a Markdown table and a plot of the same name, which memory_report.py makes anew.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from machine import default_device, origin, write_json
from memory_report import make_report, write_report
from memory_step import DTYPES, Training, Way, make_net
from tqdm import tqdm

from apinet_head import APINet
from apinet_head.step_memory import pick_chunk_size, step_memory

CHUNKS = (30, 15, 8, 4)
LARGE = {
    "backbone": "resnet101", "image_size": 448, "batches": [30, 60, 120, 240, 480],
    "gpus": [8, 11, 16, 24, 40, 80], "gpu_batch": 120, "given": 15,
}  # fmt: skip
SMALL = {"backbone": "resnet50", "image_size": 96, "batches": [15, 30, 60, 120]}
TIMED = {"backbone": "resnet50", "image_size": 224, "batches": [30]}
QUICK = {"batches": [16], "gpus": [8], "gpu_batch": 16, "given": 4}


def ways(batch: int, amp: str) -> Iterator[Way]:
    yield Way(amp=amp)
    yield Way(amp=amp, checkpointing=True)
    yield from (Way(amp=amp, chunk_size=size) for size in CHUNKS if size < batch)


def estimate(problem: dict[str, Any], batch: int, way: Way) -> int:
    net = net_of_shapes(problem["backbone"], way._replace(chunk_size=None, amp="fp32"))
    size = problem["image_size"]
    return step_memory(net, batch, size, chunk_size=way.chunk_size, amp=DTYPES[way.amp]).total


@cache
def net_of_shapes(backbone: str, way: Way) -> APINet:
    with torch.device("meta"):
        return make_net(backbone, way)


def measure_resident(problem: dict[str, Any], batch: int, way: Way) -> int:
    """By how much a step raises the resident set of a fresh process."""
    script = str(Path(__file__).with_name("memory_step.py"))
    arguments = [problem["backbone"], str(problem["image_size"]), str(batch), json.dumps(way._asdict())]
    # glibc would keep many freed tensors on its heap; told so, it gives all larger ones back.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    found = subprocess.run(
        [sys.executable, script, *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    memory: dict[str, int] = json.loads(found.stdout)
    return memory["peak"] - memory["before"]


def measure_cuda(device: torch.device, problem: dict[str, Any], batch: int, way: Way) -> dict[str, Any] | None:
    """Bytes allocated and reserved at most, and seconds of a step; None if it doesn't fit."""
    try:
        training = Training(problem["backbone"], problem["image_size"], batch, way, device)
        training.step()
        torch.cuda.reset_peak_memory_stats(device)
        seconds = [training.step()[0] for _ in range(5)]
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "seconds": statistics.median(seconds),
    }


def measure_times(problem: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Seconds of a step of every way, in each round; one more comes first, to warm up."""
    (batch,) = problem["batches"]
    cpu = torch.device("cpu")
    trainings = [
        (way, Training(problem["backbone"], problem["image_size"], batch, way, cpu)) for way in ways(batch, "fp32")
    ]
    turns = [[training.step() for _, training in trainings] for _ in tqdm(range(rounds + 1), desc="rounds of steps")]
    return [
        {**way._asdict(), "batch": batch, "seconds": [turn[place][0] for turn in turns[1:]],
         "processor_seconds": [turn[place][1] for turn in turns[1:]]}
        for place, (way, _) in enumerate(trainings)
    ]  # fmt: skip


def choices(problem: dict[str, Any]) -> list[dict[str, Any]]:
    """Chunk size and kept chunks for each precision and GPU, which has so many GiB; of any size, and of a given one."""
    net = net_of_shapes(problem["backbone"], Way())
    batch, size = problem["gpu_batch"], problem["image_size"]
    found = []
    points = [(given, amp, gpu) for given in (None, problem["given"]) for amp in DTYPES for gpu in problem["gpus"]]
    for given, amp, gpu in tqdm(points, desc="chunk sizes for GPUs"):
        row = {"given": given, "amp": amp, "gpu": gpu}
        try:
            choice = pick_chunk_size(net, batch, size, chunk_size=given, amp=DTYPES[amp], memory=gpu * 2**30)
        except ValueError:  # it does not fit
            found.append(row)
            continue
        chosen = choice.chunk_size, choice.keep_chunks
        row |= {"needed": choice.needed[chosen], "recomputed": choice.recomputed, "time": choice.time}
        found.append(row | dict(zip(("chunk_size", "keep_chunks"), chosen, strict=True)))
    return found


def collect(title: str, measure: Callable[..., Any], problem: dict[str, Any], amps: list[str]) -> list[dict[str, Any]]:
    """What `measure` finds for every way of every batch size."""
    points = [(batch, way) for amp in amps for batch in problem["batches"] for way in ways(batch, amp)]
    return [
        {**way._asdict(), "batch": batch, "found": measure(problem, batch, way)}
        for batch, way in tqdm(points, desc=title)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of timed steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--quick", action="store_true", help="small batches alone, one round: a minute")
    parser.add_argument("--output", type=Path, help="folder for the JSON, the table and the plot")
    parser.add_argument("--choices", type=Path, metavar="JSON", help="make only the chunk sizes in this file anew")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    large, small, timed = (problem | (QUICK if options.quick else {}) for problem in (LARGE, SMALL, TIMED))
    device = default_device()
    if options.choices:
        result = json.loads(options.choices.read_text()) | {"large": large, "choices": choices(large)}
        options.choices.write_text(json.dumps(result, indent=1) + "\n")
        write_report(options.choices)
        return
    result = {
        "origin": origin(device),
        "large": large,
        "small": small,
        "estimated": collect("estimates", estimate, large, list(DTYPES)),
        "choices": choices(large),
        "small_estimated": collect("estimates, small", estimate, small, ["fp32"]),
        "timed": timed,
        "cuda": None,
        "resident": collect("processes", measure_resident, small, ["fp32"]),
        "times": measure_times(timed, 1 if options.quick else options.rounds),
    }
    if device.type == "cuda":
        result["cuda"] = collect("steps on the GPU", partial(measure_cuda, device), large, list(DTYPES))
    print(make_report(result))
    if options.output:
        write_report(write_json(options.output, result, "-memory"))


if __name__ == "__main__":
    main()
