"""What test_distributed.py has every rank do with `APIHead(memory=)`, and the batches that it compares with."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apinet_head import APIHead, api_loss

SIZE, DIM, CLASSES, STEPS, MEMORY = 4, 8, 5, 4, 20  # SIZE images on each rank in each of STEPS batches


def batches(world):
    """Features [W*SIZE,D] and labels of all ranks, step by step; the memory is full in the third with two ranks."""
    generator = torch.Generator().manual_seed(world)
    for _ in range(STEPS):
        yield (
            torch.randn(world * SIZE, DIM, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (world * SIZE,), generator=generator),
        )


def with_past(features, labels, past, size):
    """Keys: the batch, then the last `size` rows of the past."""
    rows = [row for batch in past for row in zip(batch[0].detach(), batch[1], strict=True)][-size:]
    if not rows:
        return {"keys": features, "key_labels": labels, "key_offset": 0}
    old, old_labels = (torch.stack(part) for part in zip(*rows, strict=True))
    return {"keys": torch.cat([features, old]), "key_labels": torch.cat([labels, old_labels]), "key_offset": 0}


class Net(nn.Module):
    """A backbone that DDP has to keep alike, below a head with a memory."""

    def __init__(self, **head_args):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.head = APIHead(DIM, CLASSES, hidden_dim=6, dropout=0.0, memory=MEMORY, dtype=torch.float64, **head_args)

    def forward(self, x, labels):
        return self.head(self.backbone(x), labels)


def train(net, model, own=lambda rows: rows):
    """The loss of every step, and what is remembered after it."""
    optimizer, losses, memories = torch.optim.SGD(net.parameters(), lr=0.1), [], []
    for features, labels in batches(dist.get_world_size() if dist.is_initialized() else 2):
        optimizer.zero_grad()
        loss = api_loss(model(own(features), own(labels)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        memories.append({name: buffer.clone() for name, buffer in net.head.memory.named_buffers()})
    weights = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    return {"losses": torch.stack(losses), "memories": memories, "weights": weights}


def of_rank(rows):
    return rows[dist.get_rank() * SIZE : (dist.get_rank() + 1) * SIZE]


def on_rank(wrap, gather):
    net = Net(gather=gather)
    ways = {
        "DDP": DistributedDataParallel,
        "DDP without buffers": partial(DistributedDataParallel, broadcast_buffers=False),
        "no DDP": lambda net: net,  # every rank trains a net of its own
    }
    return train(net, ways[wrap](net), of_rank)


WRAPS = ("DDP", "DDP without buffers", "no DDP")
CASES = {f"{wrap}, gather={gather}": partial(on_rank, wrap, gather) for wrap in WRAPS for gather in (True, False)}
