"""Weights of the published code, for `APINet("resnet101", num_classes)`."""

import re
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from apinet_head._checks import describe

# The published backbone is nn.Sequential(*list(torchvision.models.resnet101().children())[:-2]).
STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
HEAD = {"map1": "head.mutual.fc1", "map2": "head.mutual.fc2", "fc": "head.classifier"}
COUNTER = ".num_batches_tracked"


def load_official_checkpoint(source: str | PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint of https://github.com/PeiqinZhuang/API-Net as a state dict for `APINet("resnet101", num_classes)`.

    Files are read with `weights_only=True`, so that loading runs no code from them.

    Args:
        source: path of a checkpoint, or its content: a dict with a "state_dict", or that state dict itself, with keys
            `conv.module.N...` (from DataParallel) or `conv.N...`, `map1`, `map2` and `fc`.

    Returns:
        Tensors on the CPU; the number of classes is `len(state["head.classifier.bias"])`.

    Raises:
        ValueError: keys are missing, unknown, no tensors or of another shape; or the file cannot be read.
        TypeError: source is neither a path nor a dict.

    Examples:
        >>> state = load_official_checkpoint("model_best.pth.tar")  # doctest: +SKIP
        >>> APINet("resnet101", num_classes=200).load_state_dict(state)  # doctest: +SKIP
    """
    if not isinstance(source, (str, PathLike, Mapping)):
        raise TypeError(f"source must be a path or a dict, got {type(source).__name__}")
    checkpoint = source if isinstance(source, Mapping) else _read(source)
    published = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(published, Mapping):
        raise ValueError(f"a checkpoint is a dict, or has one as state_dict, got {type(published).__name__}")
    _refuse("not keys of the published API-Net", [str(key) for key in published if not _rename(key)])
    _refuse("not tensors", [f"{key} is {describe(v)}" for key, v in published.items() if not isinstance(v, Tensor)])
    keys = {_rename(key): key for key in published}
    _refuse("given twice, with and without 'module.'", published.keys() - keys.values())

    state = {name: published[key] for name, key in keys.items()}
    expected = _expected_shapes(state)
    # Stored since torch 0.4.1.
    state |= {name: torch.tensor(0) for name in expected.keys() - state.keys() if name.endswith(COUNTER)}
    _refuse("missing for the published ResNet-101", expected.keys() - state.keys())
    _refuse("not expected in the published ResNet-101", [keys[name] for name in state.keys() - expected.keys()])
    reshaped = [name for name, shape in expected.items() if state[name].shape != shape]
    _refuse(
        "of another shape than in the published ResNet-101",
        [f"{keys[name]} is {list(state[name].shape)} instead of {list(expected[name])}" for name in reshaped],
    )
    return state


def _read(path: str | PathLike[str]) -> Any:
    with open(path, "rb") as file:  # outside of try: a wrong path is another error
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # torch.load of a damaged file may raise anything
            raise ValueError(
                f"{fspath(path)} cannot be read as a checkpoint: it is damaged, or holds more than tensors and plain "
                "values. Download it again; if you trust it, pass torch.load(path, weights_only=False) instead"
            ) from error


def _rename(key: Any) -> str:
    """The name in `APINet` of a published key, "" if there is none."""
    key = key.removeprefix("module.") if isinstance(key, str) else ""
    head, _, rest = key.partition(".")
    if head in HEAD:
        return f"{HEAD[head]}.{rest}"
    found = re.fullmatch(r"conv\.(?:module\.)?(\d+)\.(.+)", key)
    return f"backbone.{STAGES[found[1]]}.{found[2]}" if found and found[1] in STAGES else ""


def _expected_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    from apinet_head.model import APINet

    bias = state.get("head.classifier.bias")
    if bias is None or bias.ndim != 1:
        raise ValueError("not a checkpoint of the published API-Net: it has no fc.bias [C]")
    with torch.device("meta"):
        net = APINet("resnet101", num_classes=len(bias))
    return {name: value.shape for name, value in net.state_dict().items()}


def _refuse(problem: str, names: Any) -> None:
    """Raise ValueError with the first names, if there are any."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{problem}: {', '.join(sorted(names)[:5])}{more}")
