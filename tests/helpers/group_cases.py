"""What test_distributed.py has every rank do: two ranks have the same data, as in tensor parallelism."""

import copy

import torch
import torch.distributed as dist
from rank_cases import DIM, SIZE, WEIGHTED, gradients, make_batch, make_head
from torch.distributed.device_mesh import init_device_mesh

from apinet_head import api_loss, gather_features
from apinet_head.distributed import group_name, world_size


def step(group, copies):
    """Forward and backward of the head over the group, on the part of the batch that this rank holds."""
    place = dist.get_rank() // copies
    features, labels = (rows[place * SIZE :][:SIZE].clone() for rows in make_batch(dist.get_world_size() // copies))
    keys, key_labels, offset = gather_features(features.requires_grad_(), labels, group=group)
    head = copy.deepcopy(make_head(gather=group))
    loss = api_loss(head(features, labels), **WEIGHTED)
    loss.backward()
    found = {"loss": loss.detach(), "keys": keys.detach(), "key_labels": key_labels, "offset": offset}
    return {**found, "size": world_size(group_name(group)), "features": features.grad, "head": gradients(head)}


def over_a_mesh():
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "copies"))
    return step(mesh["data"], copies=2)


def over_new_groups():
    ranks = range(dist.get_world_size())
    groups = [dist.new_group([rank for rank in ranks if rank % 2 == parity]) for parity in range(2)]
    return step(groups[dist.get_rank() % 2], copies=2)


def over_the_world():
    return step(dist.group.WORLD, copies=1)


def errors():
    """Messages by kind of group; what is not asked of all ranks must not wait for them."""
    first = dist.new_group([0])
    features, labels = torch.zeros(4, DIM), torch.zeros(4, dtype=torch.long)
    messages = {}
    for name, group in {"other": first, "type": "data"}.items():
        try:
            gather_features(features, labels, group=group)
        except (ValueError, TypeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


CASES = {"mesh": over_a_mesh, "groups": over_new_groups, "world": over_the_world, "errors": errors}
