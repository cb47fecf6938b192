"""Draws a run's curves from its log."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

import matplotlib.pyplot as plt


def draw_curves(history: list[dict[str, float]], file: Path) -> None:
    """Loss terms on the left, accuracy on the right, over epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in ("loss", "cross_entropy", "ranking"):
        left.plot(*_series(history, name), label=name.replace("_", "-"))
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    for name, label in (("train_top1", "training"), ("test_top1", "test top-1"), ("test_top5", "test top-5")):
        right.plot(*_series(history, name), label=label)
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _series(history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if name in row]
    return [row["epoch"] for row in rows], [row[name] for row in rows]
