"""What test_distributed.py has every rank do, and the batches, heads and nets that it compares with."""

from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from apinet_head import APIHead, APILoss, APINet, api_loss, api_loss_terms, gather_features, mine_pairs

SIZE, DIM, CLASSES = 12, 16, 30  # SIZE images on each rank
WEIGHTED = {"label_smoothing": 0.1, "class_weight": torch.arange(1.0, CLASSES + 1, dtype=torch.float64)}


def world():
    return dist.get_world_size()


def own(rows):
    return rows[dist.get_rank() * SIZE : (dist.get_rank() + 1) * SIZE]


def make_batch(world, lonely=False):
    """Features and labels of all ranks; `lonely`: on the last of them, each image is the only one of its class."""
    generator = torch.Generator().manual_seed(world)
    features = torch.randn(world * SIZE, DIM, generator=generator, dtype=torch.float64)
    labels = (torch.randperm(world * SIZE, generator=generator) // 2) % (CLASSES - SIZE)
    if lonely:
        labels[-SIZE:] = CLASSES - SIZE + torch.arange(SIZE)
    return features, labels


def make_images(world):
    return torch.randn(world * SIZE, 3, 8, 8, generator=torch.Generator().manual_seed(world), dtype=torch.float64)


def make_head(**arguments):
    torch.manual_seed(0)
    return APIHead(DIM, CLASSES, hidden_dim=8, dropout=0.0, dtype=torch.float64, **arguments)


def make_net(norm, chunk_size, gather):
    torch.manual_seed(0)
    between = nn.BatchNorm2d(6) if norm == "batch" else nn.GroupNorm(2, 6)
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 3), between, nn.ReLU(), nn.Conv2d(6, DIM, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return APINet(backbone, CLASSES, dim=DIM, dropout=0.0, chunk_size=chunk_size, gather=gather).double()


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


# What runs on every rank.


def step_of_head(lonely):
    features, labels = (own(rows).clone() for rows in make_batch(world(), lonely))
    head = make_head(gather=True)
    model = DistributedDataParallel(head)
    output = model(features.requires_grad_(), labels)
    terms = api_loss_terms(output)
    terms.total.backward()
    pairs = output.pairs._replace(anchor=output.pairs.anchor + dist.get_rank() * SIZE)
    terms = {name: term.detach() for name, term in terms._asdict().items()}
    return {"pairs": pairs._asdict(), **terms, "head": gradients(head), "features": features.grad}


def step_without_pairs():
    head = make_head(gather=True, intra=None)
    loss = api_loss(head(own(make_batch(world())[0]), torch.zeros(SIZE, dtype=torch.long)))
    loss.backward()
    return {"loss": loss.detach(), **gradients(head)}


def loss_without_gradient():
    with torch.no_grad():
        return api_loss(make_head(gather=True)(*map(own, make_batch(world()))))


def loss_of_given_pairs():
    features, labels = make_batch(world())
    anchor = torch.arange(SIZE)
    partner = anchor.flip(0) + SIZE * (world() - 1)  # all from the last rank
    pairs = mine_pairs(own(features), own(labels))._replace(anchor=anchor, partner=partner)
    pairs = pairs._replace(same_class=own(labels) == labels[partner], valid=partner != anchor + dist.get_rank() * SIZE)
    return api_loss(make_head(gather=True)(own(features), own(labels), pairs=pairs)).detach()


def gathered(group=None):
    features, labels = make_batch(world())
    mine = own(features).clone().requires_grad_()
    all_features, all_labels, offset = gather_features(mine, own(labels).to(torch.int32), group=group)
    # Every rank weighs the rows in its own way, so that the gradient is a sum of different numbers.
    (all_features.square() * (1 + dist.get_rank())).sum().backward()
    return {"features": all_features.detach(), "labels": all_labels, "offset": offset, "gradient": mine.grad}


def gathered_as_on_gpus():
    """The gradient by reduce_scatter, which other groups than gloo use."""
    with mock.patch.object(dist, "get_backend_config", return_value="cpu:nccl"):
        return gathered()


def gathered_as_on_gpus_and_cpus():
    """Over a group with a backend for each device, as of `init_process_group()`, where gloo has no reduce_scatter."""
    group = dist.new_group(backend="cpu:gloo")
    with mock.patch.object(dist, "reduce_scatter", side_effect=NotImplementedError):
        return gathered(group)


def message_for_unequal_batches():
    size = 4 + 2 * dist.get_rank()
    try:
        make_head(gather=True)(torch.randn(size, DIM, dtype=torch.float64), torch.zeros(size, dtype=torch.long))
    except ValueError as error:
        return str(error)
    return "no error"


def messages_for_other_dtypes():
    """Of rank 0 with other labels, another precision, and no gradient, than the others."""
    first, (features, labels) = dist.get_rank() == 0, map(own, make_batch(world()))
    different = [
        (features, labels.int() if first else labels),
        (features.to(torch.bfloat16 if first else torch.float32), labels),
        (features.clone().requires_grad_(not first), labels),
    ]
    messages = []
    for arguments in different:
        try:
            gather_features(*arguments)
        except ValueError as error:
            messages.append(str(error))
    return messages


def steps_of_net(norm, chunk_size):
    """Two steps of SGD, the gradient of the second, and how often DDP reduced each bucket in one step."""
    net = make_net(norm, chunk_size, gather=True)
    model = DistributedDataParallel(net)
    reduced = []

    def hook(group, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, hook)
    labels = make_batch(world())[1]
    losses = two_steps(net, model, own(make_images(world())), own(labels), before_second=reduced.clear)
    return {"losses": losses, "net": gradients(net), "reduced": reduced}


def two_steps(net, model, images, labels, before_second=lambda: None):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        if step:
            before_second()
        optimizer.zero_grad()
        loss = api_loss(model(images, labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def accumulated_gradients():
    """Three chunked passes, of which DDP is to reduce the last alone."""
    net = make_net("group", 4, gather=True)
    model = DistributedDataParallel(net)
    images, labels = own(make_images(world())), own(make_batch(world())[1])
    with model.no_sync():
        for _ in range(2):
            api_loss(model(images, labels)).backward()
    api_loss(model(images, labels)).backward()
    return gradients(net)


def steps_with_class_weights():
    """Loss and gradients with all logits at once (0), and with a few rows of them."""
    features, labels = map(own, make_batch(world()))
    found = {}
    for rows in (0, 6):
        head = make_head(gather=True)
        model = DistributedDataParallel(head)
        if rows:
            loss = model(features, labels, criterion=APILoss(rows=rows, **WEIGHTED)).total
        else:
            loss = api_loss(model(features, labels), **WEIGHTED)
        loss.backward()
        found[rows] = {"loss": loss.detach(), "head": gradients(head)}
    return found


def mined_by_the_wrapper():
    """Partners by pytorch-metric-learning's own search over all ranks: its keys are own rows, then those of others."""
    from pytorch_metric_learning.utils.distributed import DistributedMinerWrapper  # takes seconds in every process

    from apinet_head.metric_learning import APIMiner

    mined = DistributedMinerWrapper(APIMiner(), efficient=True)(*map(own, make_batch(world())))
    return [rows.tolist() for rows in mined]


NETS = [("batch", SIZE), ("batch", 4), ("batch", 5), ("group", None), ("group", 4)]
CASES = {
    "usual": partial(step_of_head, lonely=False),
    "lonely": partial(step_of_head, lonely=True),
    "without pairs": step_without_pairs,
    "without gradient": loss_without_gradient,
    "given pairs": loss_of_given_pairs,
    "gathered": gathered,
    "gathered as on GPUs": gathered_as_on_gpus,
    "gathered as on GPUs and CPUs": gathered_as_on_gpus_and_cpus,
    "unequal": message_for_unequal_batches,
    "accumulated": accumulated_gradients,
    "other dtypes": messages_for_other_dtypes,
    **{f"{norm} {chunk_size}": partial(steps_of_net, norm, chunk_size) for norm, chunk_size in NETS},
}
CASES_OF_TWO = {"class weights": steps_with_class_weights, "miner": mined_by_the_wrapper}
