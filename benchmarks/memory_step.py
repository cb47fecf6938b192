"""A training step in one of the ways that memory.py compares; as a script, measured in a process of its own.

python benchmarks/memory_step.py resnet50 128 60 '{"chunk_size": 15}'
"""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from apinet_head import APINet, api_loss

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class Way(NamedTuple):
    """How the backbone runs on a batch."""

    chunk_size: int | None = None
    checkpointing: bool = False
    amp: str = "fp32"

    @property
    def name(self) -> str:
        if self.checkpointing:
            return "gradient checkpointing"
        return "whole batch" if self.chunk_size is None else f"chunks of {self.chunk_size}"


def make_net(backbone: str, way: Way) -> APINet:
    """For 200 classes, as in CUB-200-2011."""
    net = APINet(backbone, 200, chunk_size=way.chunk_size)
    net.backbone.set_grad_checkpointing(way.checkpointing)
    return net


class Training:
    """A net with SGD and momentum, on random images, as it is in the midst of its training."""

    def __init__(self, backbone: str, image_size: int, batch_size: int, way: Way, device: torch.device) -> None:
        torch.manual_seed(0)
        self.dtype, self.device = DTYPES[way.amp], device
        self.shape = (batch_size, 3, image_size, image_size)
        self.net = make_net(backbone, way).to(device)
        self.optimizer = torch.optim.SGD(self.net.parameter_groups(0.001), momentum=0.9)
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def step(self) -> tuple[float, float]:
        """Seconds of a step: those that passed, and those of the processor, which other work leaves alone."""
        images = torch.randn(self.shape, device=self.device)
        labels = torch.arange(len(images), device=self.device) // 4
        self._wait()
        start = time.perf_counter(), time.process_time()
        with torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            loss = api_loss(self.net(images, labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resident(line: str) -> int:
    """Bytes of this process in memory, from Linux: VmRSS is now, VmHWM the most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[line].split()[0])


def main() -> None:
    backbone, image_size, batch_size, way = sys.argv[1:]
    cpu = torch.device("cpu")
    Training("test_resnet", 32, 8, Way(), cpu).step()  # loads what is loaded at first use
    before = resident("VmRSS")
    Training(backbone, int(image_size), int(batch_size), Way(**json.loads(way)), cpu).step()
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main()
