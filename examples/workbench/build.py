"""What the settings ask for: the net of either method, and accelerate's part in a run."""

import json
from pathlib import Path

from accelerate import Accelerator

from apinet_head import APINet
from workbench.settings import Settings


def make_accelerator(settings: Settings, folder: Path) -> Accelerator:
    """Device, mixed precision and logging by accelerate."""
    accelerator = Accelerator(
        cpu=settings.device == "cpu", mixed_precision=settings.amp, log_with="tensorboard", project_dir=folder
    )
    if settings.device not in ("auto", accelerator.device.type):
        raise SystemExit(f"--device {settings.device} is not to be had here: torch finds {accelerator.device.type}")
    return accelerator


def make_net(settings: Settings, num_classes: int) -> APINet:
    """The net of either method: the baseline is the same one, trained without pairs."""
    return APINet(
        settings.backbone,
        num_classes,
        pretrained=settings.pretrained,
        chunk_size=settings.chunk_size or None,
        backbone_args=json.loads(settings.backbone_args),
        hidden_dim=settings.hidden_dim,
        dropout=settings.dropout,
        mutual=settings.mutual,
        gate=settings.gate,
        intra=None if settings.intra == "none" else settings.intra,
        inter=None if settings.inter == "none" else settings.inter,
        gather=settings.pairs == "mined",  # random pairs are drawn among each process's own images
    )
