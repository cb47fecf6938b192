"""What test_fsdp.py has every rank do: steps of a net in chunks whose blocks are sharded over the ranks.

torchrun --nnodes 2 --nproc-per-node 1 ... fsdp_cases.py FOLDER
"""

import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apinet_head import APINet, ChunkedBackbone, api_loss

SIZE, CLASSES, DIM, BLOCKS = 8, 4, 5, 3  # images of a rank
WAYS = [(None, 1), (4, 0), (4, 1), (2, 0), (2, 1), (2, 2), (2, 4)]  # chunk size, chunks kept


def make_net(chunk_size, keep, gather=True):
    torch.manual_seed(0)
    channels = [3, *BLOCKS * [DIM]]
    blocks = [nn.Sequential(nn.Conv2d(before, DIM, 3), nn.GroupNorm(1, DIM), nn.Tanh()) for before in channels[:BLOCKS]]
    backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chunks = {"chunk_size": chunk_size, "keep_chunks": keep}
    return APINet(backbone, CLASSES, dim=DIM, dropout=0.0, gather=gather, **chunks).double()


def make_batch(ranks):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ranks * SIZE, 3, 12, 12, dtype=torch.float64, generator=generator)
    return images, torch.arange(ranks * SIZE) % CLASSES


def step(chunk_size, keep, reshard):
    """Loss, gradients, and how many all-gathers of weights the second of two steps has taken."""
    net = make_net(chunk_size, keep)
    for block in net.backbone[:BLOCKS]:
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(net)
    rows = slice(dist.get_rank() * SIZE, (dist.get_rank() + 1) * SIZE)
    images, labels = (whole[rows] for whole in make_batch(dist.get_world_size()))
    for _ in range(2):
        net.zero_grad()
        with Gathers() as gathers:
            loss = api_loss(net(images, labels))
            loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in net.named_parameters()}
    return {"loss": loss.detach(), "gathers": gathers.count, "gradients": gradients}


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


class Gathers(TorchDispatchMode):
    """Counts all-gathers into one tensor, as FSDP makes them of its weights."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.c10d._allgather_base_.default
        return function(*args, **(kwargs or {}))


def gradients_of_distributed_tensors():
    """Gradients of a backbone whose parameters and buffers are DTensors, by how many chunks are kept."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    images = distribute_tensor(make_batch(1)[0], mesh, [Replicate()])
    found = {}
    for keep in (0, 2):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, DIM, 3), nn.BatchNorm2d(DIM), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(DIM, DIM)]
        backbone = distribute_module(nn.Sequential(*layers).double(), mesh)
        ChunkedBackbone(backbone, 4, keep=keep)(images).square().sum().backward()
        found[keep] = [whole(parameter.grad) for parameter in backbone.parameters()]
    return found


CASES = {
    "distributed tensors": gradients_of_distributed_tensors,
    **{
        f"{chunk_size} {keep} {reshard}": partial(step, chunk_size, keep, reshard)
        for chunk_size, keep in WAYS
        for reshard in (True, False)
    },
}


def main():
    """One step, whose findings go into a file of the rank's."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    torch.save({**step(4, 1, True), "nodes": nodes}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
