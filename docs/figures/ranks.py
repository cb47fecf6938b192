"""What mining over all ranks costs on paper: draws ranks.png, and writes the table of docs/ranks.md.

All of it is arithmetic from the numbers below; nothing here was measured.
"""

import math
import re
from pathlib import Path

import matplotlib
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
IMAGES, CHANNELS, BYTES = 15, 2048, 2  # a rank's share of the paper's batch; features of ResNet-101, bfloat16
# NVIDIA's data sheet of the H100 SXM, and one 400 Gb/s network card for each GPU.
BFLOAT16, WIDE, MEMORY, NETWORK = 989e12, 67e12, 3.35e12, 50e9  # FLOP/s (WIDE: float32 and float64), bytes/s
# What part of it is taken to be reached: by a ResNet in training, by one large product, by long copies, on the network.
TRAINING, PRODUCT, COPY, WIRE = 0.25, 0.6, 0.8, 0.8
PASSES = 22  # over all features, each a read or a write, by mining/rows.py and the product
NARROW_PASSES = 6  # the same of features as they come
SMALL = 2**27  # multiplications, up to which mining/plain.py computes in float64
RANKS = [2**power for power in range(1, 15)]


def forward_flops(name: str, size: int) -> int:
    """FLOPs of one image's forward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model(name, num_classes=0).eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def costs(ranks: int) -> dict[str, float]:
    """Bytes, FLOPs and seconds of one rank in one step."""
    features = ranks * IMAGES * CHANNELS
    width = 8 if IMAGES * features <= SMALL else 4
    traffic = 2 * (ranks - 1) * IMAGES * CHANNELS * BYTES
    flops = 2 * IMAGES * features
    return {
        "traffic": traffic,
        "flops": flops,
        "mining": flops / (PRODUCT * WIDE) + (PASSES * width + NARROW_PASSES * BYTES) * features / (COPY * MEMORY),
        "gathering": traffic / (WIRE * NETWORK),
    }


def step_seconds() -> float:
    """A step of the backbone: forward, and twice as much backward."""
    return 3 * IMAGES * forward_flops("resnet101", 448) / (TRAINING * BFLOAT16)


def crossing(name: str, step: float, share: float = 0.05) -> int:
    """The number of ranks from which on a cost is more than that share of the step."""
    ranks = RANKS[-1]
    while costs(ranks - 1)[name] >= share * step:
        ranks -= 1
    return ranks


def make_table(step: float) -> str:
    lines = [
        "| ranks | batch | gathered and returned | mining, GFLOP | mining, share of the step | gathering, share |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ranks in (2, 8, 32, 128, 512, 1024):
        cost = costs(ranks)
        lines.append(
            f"| {ranks} | {ranks * IMAGES} | {cost['traffic'] / 1e6:,.1f} MB | {cost['flops'] / 1e9:.3f} | "
            f"{cost['mining'] / step:.2%} | {cost['gathering'] / step:.2%} |"
        )
    lines.append(
        f"\nWith these numbers a step takes {1000 * step:.1f} ms. Mining takes more than 5 % of it from "
        f"{crossing('mining', step):,} ranks on, gathering from {crossing('gathering', step):,}."
    )
    return "\n".join(lines)


def draw(step: float, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, colour in (("gathering", "tab:orange"), ("mining", "tab:blue")):
        share = [costs(ranks)[name] / step for ranks in RANKS]
        axes.plot(RANKS, share, "o-", color=colour, markersize=4)
        axes.annotate(f" {name}", (RANKS[-1], share[-1]), color=colour, va="center")
    axes.axhline(0.05, color="grey", linewidth=1, linestyle="--")
    axes.annotate("5 % of the step", (RANKS[0], 0.055), color="grey")
    axes.set(xscale="log", yscale="log", xlabel="ranks (GPUs), 15 images each", ylabel="share of a ResNet-101 step")
    axes.set_xticks(RANKS[::2], [f"{ranks:,}" for ranks in RANKS[::2]])
    axes.minorticks_off()
    axes.set_xlim(RANKS[0] / 1.3, RANKS[-1] * 4)
    lowest = math.floor(math.log10(min(costs(2)[name] / step for name in ("mining", "gathering"))))
    ticks = [10.0**power for power in range(lowest, 2)]
    axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Mining over all ranks, on paper: H100, bfloat16 features", loc="left", fontsize=10)
    figure.savefig(file, dpi=130)


def main() -> None:
    step = step_seconds()
    draw(step, HERE / "ranks.png")
    page = HERE.parent / "ranks.md"
    marked = r"(<!-- table: docs/figures/ranks.py -->\n).*?(<!-- end of table -->)"
    text = re.sub(marked, lambda found: f"{found[1]}{make_table(step)}\n{found[2]}", page.read_text(), flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    main()
