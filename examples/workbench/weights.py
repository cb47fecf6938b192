"""Loads weights from a local file into a timm backbone, all or none: for machines that cannot reach the Hub."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import timm.models
from torch import Tensor, nn

from workbench import listed

COUNTER = "num_batches_tracked"  # not a weight; missing in files of torch 0.4 and before
CLASSIFIER = 2  # tensors that may follow those of the backbone


def named(file: Path) -> str:
    """A file of weights as it is called in the settings: its name and hash, not its path."""
    file = _inside(file)
    return f"{file.name}, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def load_weights(backbone: nn.Module, file: Path) -> str:
    """Load the weights of a .pth or .safetensors file, or of a folder as on the Hub; returns how they were matched.

    The file may be of timm or torchvision, or a .pth of another implementation whose modules come in the same order,
    with or without a classifier; a checkpoint with the weights as `state_dict`, `model` or an average of it
    (`..._ema`); with prefixes of DDP and torch.compile; or the model.safetensors of an `APINet`. If the weights don't
    fit, the backbone is left unchanged.
    """
    file = _inside(file)
    found, wanted = _read(file), {name: value for name, value in backbone.state_dict().items() if COUNTER not in name}
    for how, tensors in (
        ("by name", found),
        ("by timm's conversion", _converted(found, backbone)),
        # safetensors sorts tensors by their names.
        ("by their order", {} if file.suffix == ".safetensors" else _in_order(found, wanted)),
    ):
        if all(name in tensors and tensors[name].shape == value.shape for name, value in wanted.items()):
            backbone.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
            return f"all {len(wanted)} tensors of the backbone are those of {file.name}, found {how}"
    missing = [name for name in wanted if name not in found]
    other = {name: value for name, value in wanted.items() if name in found and found[name].shape != value.shape}
    reshaped = [f"{name} {list(found[name].shape)} instead of {list(value.shape)}" for name, value in other.items()]
    faults = {"missing": missing, "of another shape": reshaped}
    about = "; ".join(f"{fault}: {listed(names, 3)}" for fault, names in faults.items() if names)
    fit = f"{len(wanted) - len(missing) - len(reshaped)} of the backbone's {len(wanted)} tensors by name"
    raise SystemExit(f"{file} fits {fit}, nor do they match in order; {about}; is it a file for this --backbone?")


def _inside(file: Path) -> Path:
    """The file itself, or that of a folder."""
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((file / name for name in names if (file / name).is_file()), file)
    if not file.is_file():
        raise SystemExit(f"{file}: no such file of weights")
    return file


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by names without prefixes."""
    try:
        content = timm.models.load_state_dict(str(file), weights_only=True)
        found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:  # pickle, zipfile and safetensors raise many types for damaged files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SystemExit(f"{file} cannot be read as weights: {reason[0]}") from None
    own = "backbone."  # of an APINet
    return {name.removeprefix(own): value for name, value in found.items() if name.startswith(own)} or found


def _converted(found: Mapping[str, Tensor], backbone: nn.Module) -> Mapping[str, Tensor]:
    """The tensors by timm's names, converted by the model's own function for its authors' checkpoints."""
    try:
        return sys.modules[type(backbone).__module__].checkpoint_filter_fn(dict(found), backbone)
    except Exception:  # there is no such function, or it does not know the names of this file
        return {}


def _in_order(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors by the backbone's names, if they have the same kinds in the same order."""
    rows = [(name, value) for name, value in found.items() if COUNTER not in name]
    if not 0 <= len(rows) - len(wanted) <= CLASSIFIER:
        return {}
    pairs = list(zip(wanted, rows[: len(wanted)], strict=True))
    if any(name.rpartition(".")[2] != other.rpartition(".")[2] for name, (other, _) in pairs):  # weight, bias, ...
        return {}
    return {name: value for name, (_, value) in pairs}
