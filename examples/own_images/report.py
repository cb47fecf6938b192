"""One HTML file of a training: accuracy by class, confusions, and where the gates look."""

import base64
import io
from html import escape
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from apinet_head import APINet, explain_pair

STYLE = """:root{color-scheme:light dark} body{font:16px sans-serif;margin:2em;max-width:60em}
td,th{padding:.3em .6em;text-align:right} img{width:160px;margin:.2em}"""


def write(file: Path, classes: list[str], confusion: torch.Tensor, history: list[float], figures: list[str]) -> None:
    """confusion [C,C]: images of the row's class that were taken for the column's."""
    names = [escape(name) for name in classes]
    rows = []
    for index, name in enumerate(names):
        total = max(1, int(confusion[index].sum()))
        cells = "".join(
            f'<td style="background:rgb(220 90 0/{count / total:.2f})">{count}</td>'
            for count in confusion[index].tolist()
        )
        rows.append(f"<tr><th>{name}</th><td>{confusion[index, index].item() / total:.1%}</td>{cells}</tr>")
    top = max([*history, 1e-9])
    points = " ".join(
        f"{20 + 360 * i / max(1, len(history) - 1):.1f},{110 - 100 * v / top:.1f}" for i, v in enumerate(history)
    )
    accuracy = confusion.diagonal().sum().item() / max(1, int(confusion.sum()))
    file.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Training report</title><style>{STYLE}</style>'
        f"<h1>Test accuracy {accuracy:.1%}</h1><h2>By class, true class a row, predicted a column</h2><table>"
        f"<tr><th></th><th>right</th>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table>"
        f'<h2>Training loss, from 0 to {top:.2f}</h2><svg viewBox="0 0 400 120" width="400">'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
        f"<h2>Taken for another class</h2>{''.join(figures) or '<p>None was.</p>'}</html>",
        encoding="utf-8",
    )


def pair_figure(net: APINet, images: torch.Tensor, caption: str, mean: list[float], std: list[float]) -> str:
    """Two images [2,3,H,W] and where the channels that their gates open most are active."""
    maps = explain_pair(net, images, top_k=min(5, net.dim)).heatmaps.mean(1)
    pictures = (images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    shown = [pictures[0], maps[0][None].expand(3, -1, -1), pictures[1], maps[1][None].expand(3, -1, -1)]
    return f"<p>{escape(caption)}<br>{''.join(_data_uri(image) for image in shown)}</p>"


def _data_uri(image: torch.Tensor) -> str:
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
