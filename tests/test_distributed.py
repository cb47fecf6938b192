"""Many ranks against one process with the concatenated batch, in float64: the same pairs, loss and gradients."""

import copy
from functools import partial
from unittest import mock

import pytest
import reference
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from apinet_head import APIHead, APINet, api_loss, api_loss_terms, gather_features, mine_pairs

SIZE, DIM, CLASSES = 12, 16, 30  # SIZE images on each rank
WORLDS = (2, 3)


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


def gathered():
    features, labels = make_batch(world())
    mine = own(features).clone().requires_grad_()
    all_features, all_labels, offset = gather_features(mine, own(labels).to(torch.int32))
    # Every rank weighs the rows in its own way, so that the gradient is a sum of different numbers.
    (all_features.square() * (1 + dist.get_rank())).sum().backward()
    return {"features": all_features.detach(), "labels": all_labels, "offset": offset, "gradient": mine.grad}


def gathered_as_on_gpus():
    """The gradient by reduce_scatter, which other groups than gloo use."""
    with mock.patch.object(dist, "get_backend", return_value="nccl"):
        return gathered()


def message_for_unequal_batches():
    size = 4 + 2 * dist.get_rank()
    try:
        make_head(gather=True)(torch.randn(size, DIM, dtype=torch.float64), torch.zeros(size, dtype=torch.long))
    except ValueError as error:
        return str(error)
    return "no error"


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


NETS = [("batch", SIZE), ("batch", 4), ("batch", 5), ("group", None), ("group", 4)]
CASES = {
    "usual": partial(step_of_head, lonely=False),
    "lonely": partial(step_of_head, lonely=True),
    "without pairs": step_without_pairs,
    "without gradient": loss_without_gradient,
    "given pairs": loss_of_given_pairs,
    "gathered": gathered,
    "gathered as on GPUs": gathered_as_on_gpus,
    "unequal": message_for_unequal_batches,
    "accumulated": accumulated_gradients,
    **{f"{norm} {chunk_size}": partial(steps_of_net, norm, chunk_size) for norm, chunk_size in NETS},
}


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    """What every rank found in every case."""
    return on_ranks(request.param, CASES, tmp_path_factory.mktemp("ranks"))


def of(ranks, case):
    found = [rank[case] for rank in ranks]
    for rank in found:
        assert not isinstance(rank, str) or "Traceback" not in rank, rank
    return found


def assert_close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", ["usual", "lonely"])
def test_head_on_ranks_is_the_head_on_the_whole_batch(ranks, case):
    found = of(ranks, case)
    features, labels = make_batch(len(ranks), case == "lonely")
    alone = mine_pairs(features, labels)
    size = len(labels)
    halves = {
        name: torch.cat([rank["pairs"][name].view(2, SIZE) for rank in found], dim=1).flatten()
        for name in alone._fields
    }
    for name, values in alone._asdict().items():
        assert torch.equal(halves[name], values), name
    assert alone.valid.all() == (case == "usual")

    # The loss from the formulas, by autograd; invalid pairs left out by hand.
    features.requires_grad_()
    head = make_head()
    weights = {"map1": head.mutual.fc1, "map2": head.mutual.fc2, "fc": head.classifier}
    weights = {f"{key}_{name}": value for key, layer in weights.items() for name, value in layer.named_parameters()}
    expected = reference.head(features, labels, list(alone.partner.view(2, size)), weights, valid=alone.valid)
    expected["loss"].backward()
    for name, ours in (("loss", "total"), ("cross_entropy", "cross_entropy"), ("ranking", "ranking")):
        assert_close(torch.stack([rank[ours] for rank in found]).mean(), expected[name].detach(), 1e-12)
    for rank in found:
        assert_close(rank["head"], gradients(head))
    # DDP would divide the backbone's gradient by the number of ranks.
    assert_close(torch.cat([rank["features"] for rank in found]) / len(ranks), features.grad)


def test_no_pair_on_any_rank_is_a_loss_of_zero(ranks):
    for rank in of(ranks, "without pairs"):
        assert all((value == 0).all() for value in rank.values())


def test_without_gradient(ranks):
    loss = api_loss(make_head()(*make_batch(len(ranks)))).detach()
    assert_close(torch.stack(of(ranks, "without gradient")).mean(), loss, 1e-12)


def test_given_pairs_have_partners_from_all_ranks(ranks):
    features, labels = make_batch(len(ranks))
    anchor = torch.arange(len(labels))
    partner = torch.arange(SIZE).flip(0).repeat(len(ranks)) + SIZE * (len(ranks) - 1)
    pairs = mine_pairs(features, labels)._replace(
        anchor=anchor, partner=partner, same_class=labels[anchor] == labels[partner], valid=anchor != partner
    )
    loss = api_loss(make_head()(features, labels, pairs=pairs)).detach()
    assert_close(torch.stack(of(ranks, "given pairs")).mean(), loss, 1e-12)


@pytest.mark.parametrize("case", ["gathered", "gathered as on GPUs"])
def test_gather_features(ranks, case):
    if "Gloo does not support reduce_scatter" in str(ranks[0][case]):
        pytest.skip("gloo of this torch has no reduce_scatter")
    features, labels = make_batch(len(ranks))
    for number, rank in enumerate(of(ranks, case)):
        assert torch.equal(rank["features"], features)
        assert torch.equal(rank["labels"], labels.int())
        assert rank["offset"] == number * SIZE
        weight = sum(range(1, len(ranks) + 1))
        assert_close(rank["gradient"], 2 * weight * features[number * SIZE : (number + 1) * SIZE])


def test_unequal_batches_are_an_error_on_every_rank(ranks):
    shapes = ", ".join(f"[{4 + 2 * rank}, {DIM}] on rank {rank}" for rank in range(len(ranks)))
    for message in of(ranks, "unequal"):
        assert f"of one shape to mine over all of them, got {shapes}" in message


@pytest.mark.parametrize(("norm", "chunk_size"), NETS)
def test_net_on_ranks_is_the_net_on_the_whole_batch(ranks, norm, chunk_size):
    found = of(ranks, f"{norm} {chunk_size}")
    alone = make_net(norm, None, gather=False)
    images, labels = make_images(len(ranks)), make_batch(len(ranks))[1]

    def chunk_by_chunk(images, labels):
        # BatchNorm looks at one chunk of one rank at a time, so one process must split the batch like that.
        parts = [part for rank in images.split(SIZE) for part in rank.split(chunk_size or SIZE)]
        return alone.head(torch.cat([alone.backbone(part) for part in parts]), labels)

    losses = two_steps(alone, chunk_by_chunk, images, labels)
    assert_close(torch.stack([rank["losses"] for rank in found]).mean(0), losses, 1e-12)
    for rank in found:
        assert_close(rank["net"], gradients(alone))
        assert len(rank["reduced"]) == len(set(rank["reduced"])) > 0, "a bucket was reduced more than once in a step"


def test_gradients_accumulate_without_reducing_in_between(ranks):
    alone = make_net("group", None, gather=False)
    (3 * api_loss(alone(make_images(len(ranks)), make_batch(len(ranks))[1]))).backward()
    for rank in of(ranks, "accumulated"):
        assert_close(rank, gradients(alone))


def test_one_process_needs_no_group():
    features, labels = make_batch(1)
    assert gather_features(features, labels) == (features, labels, 0)
    alone, gathering = make_head()(features, labels), make_head(gather=True)(features, labels)
    assert gathering.num_rows is None
    assert torch.equal(api_loss(alone), api_loss(gathering))
    copy.deepcopy(make_head(gather=True))


def test_errors_show_what_came():
    with pytest.raises(ValueError, match=r"features must be \[B, D\], got float32 \[4, 3, 2, 2\]"):
        gather_features(torch.zeros(4, 3, 2, 2), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"labels must have one entry per row"):
        gather_features(torch.zeros(4, 3), torch.zeros(5).long())
