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

    Files are read with `weights_only=True`: a file that would run code is refused. BatchNorm's `num_batches_tracked`,
    which torch began to store in 0.4.1, is 0 where the checkpoint has none.

    Args:
        source: the path of a checkpoint, or what is in one: its dict with a "state_dict", or that state dict itself,
            with keys `conv.module.N...` (from DataParallel) or `conv.N...`, `map1`, `map2` and `fc`.

    Returns:
        Tensors on the CPU; the number of classes is `len(state["head.classifier.bias"])`.

    Raises:
        ValueError: keys are missing, unknown, no tensors or of another shape; the message names them. Or the file is no
            checkpoint, is damaged, or would run code; the message names it, and the cause says how reading failed.
        TypeError: source is neither a path nor a dict.

    Examples:
        >>> from apinet_head import APINet, load_official_checkpoint
        >>> state = load_official_checkpoint("model_best.pth.tar")  # doctest: +SKIP
        >>> APINet("resnet101", num_classes=200).load_state_dict(state)  # doctest: +SKIP
    """
    published = _published(source)
    renamed = {_rename(key): key for key in published}
    expected = _expected_shapes(published)
    state = {name: published[key] for name, key in renamed.items()}
    state |= {name: torch.tensor(0) for name in expected.keys() - state.keys() if name.endswith(COUNTER)}

    missing = sorted(expected.keys() - state.keys())
    further = sorted(renamed[name] for name in state.keys() - expected.keys())
    if missing or further:
        raise ValueError(
            "not a checkpoint of the published ResNet-101: "
            f"missing {_listing(missing)}; not expected {_listing(further)}"
        )
    reshaped = [
        f"{renamed[name]} is {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if state[name].shape != shape
    ]
    if reshaped:
        raise ValueError(f"tensors of another shape than the published ResNet-101's: {_listing(reshaped)}")
    return state


def _published(source: str | PathLike[str] | Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint, all of whose keys are those of the published code, and their values tensors."""
    if not isinstance(source, (str, PathLike, Mapping)):
        raise TypeError(f"source must be a path or a dict, got {type(source).__name__}")
    checkpoint = source if isinstance(source, Mapping) else _read(source)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint is a dict, got {type(checkpoint).__name__}")
    published = checkpoint.get("state_dict", checkpoint)
    if not isinstance(published, Mapping):
        raise ValueError(f"the state_dict of a checkpoint is a dict, got {type(published).__name__}")
    unknown = sorted(str(key) for key in published if not _rename(key))
    if unknown:
        raise ValueError(f"not keys of the published API-Net: {_listing(unknown)}")
    odd = sorted(f"{key} is of {describe(value)}" for key, value in published.items() if not isinstance(value, Tensor))
    if odd:
        raise ValueError(f"not all are tensors: {_listing(odd)}")
    twice = sorted(set(published) - set({_rename(key): key for key in published}.values()))
    if twice:
        raise ValueError(f"weights that are there twice, with and without 'module.': {_listing(twice)}")
    return published


def _read(path: str | PathLike[str]) -> Any:
    """What is in the file, as long as that is tensors and plain values."""
    with open(path, "rb") as file:  # outside of try: the file system says itself what is wrong with a path
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # what is no checkpoint can fail in any way
            raise ValueError(
                f"{fspath(path)} cannot be read as a checkpoint: it is empty, cut short, not of torch.save, or holds "
                "more than tensors and plain values. Download it again; if you trust it, pass what "
                "torch.load(path, weights_only=False) gives in place of the path"
            ) from error


def _rename(key: Any) -> str:
    """Our name for a published key, "" if there is none."""
    if not isinstance(key, str):
        return ""
    key = key.removeprefix("module.")
    head, _, rest = key.partition(".")
    if head in HEAD:
        return f"{HEAD[head]}.{rest}"
    found = re.fullmatch(r"conv\.(?:module\.)?(\d+)\.(.+)", key)
    return f"backbone.{STAGES[found[1]]}.{found[2]}" if found and found[1] in STAGES else ""


def _expected_shapes(published: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    from apinet_head.model import APINet

    bias = next((value for key, value in published.items() if key.removeprefix("module.") == "fc.bias"), None)
    if bias is None or bias.ndim != 1:
        raise ValueError("not a checkpoint of the published API-Net: it has no fc.bias [C]")
    with torch.device("meta"):
        net = APINet("resnet101", num_classes=len(bias))
    return {name: value.shape for name, value in net.state_dict().items()}


def _listing(items: list[str], shown: int = 5) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "") or "nothing"
