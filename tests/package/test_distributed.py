"""Many ranks against one process with the concatenated batch, in float64: the same pairs, loss and gradients."""

import copy

import group_cases
import memory_on_ranks
import pytest
import reference
import torch
import torch.distributed as dist
from rank_cases import (
    CASES,
    CASES_OF_TWO,
    DIM,
    NETS,
    SIZE,
    WEIGHTED,
    gradients,
    make_batch,
    make_head,
    make_images,
    make_net,
    two_steps,
)
from ranks import on_ranks

from apinet_head import APINet, api_loss, gather_features, mine_pairs


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What both ranks found in every case."""
    return on_ranks(
        2, CASES | group_cases.CASES | CASES_OF_TWO | memory_on_ranks.CASES, tmp_path_factory.mktemp("ranks")
    )


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, two_ranks, tmp_path_factory):
    """What every rank found in every case that is for any number of ranks."""
    return (
        two_ranks
        if request.param == 2
        else on_ranks(request.param, CASES | group_cases.CASES, tmp_path_factory.mktemp("ranks"))
    )


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


def test_loss_without_gradient_is_that_of_the_whole_batch(ranks):
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


@pytest.mark.parametrize("case", ["gathered", "gathered as on GPUs", "gathered as on GPUs and CPUs"])
def test_gathered_features_and_gradients_are_those_of_the_whole_batch(ranks, case):
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
    for message in of(ranks, "unequal"):
        assert all(f"[{4 + 2 * rank}, {DIM}] without gradient" in message for rank in range(len(ranks))), message


def test_other_dtypes_or_no_gradient_on_one_rank_are_an_error_on_every_rank(ranks):
    listings = (
        ("float64 [12, 16] without gradient and int32 labels", "float64 [12, 16] without gradient and int64 labels"),
        ("bfloat16 [12, 16] without gradient and int64 labels", "float32 [12, 16] without gradient and int64 labels"),
        ("float64 [12, 16] without gradient and int64 labels", "float64 [12, 16] with gradient and int64 labels"),
    )
    for messages in of(ranks, "other dtypes"):
        for message, (first, others) in zip(messages, listings, strict=True):
            expected = [f"{first} on rank 0", *(f"{others} on rank {rank}" for rank in range(1, len(ranks)))]
            assert f"got {', '.join(expected)}: give" in message


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


def test_class_weights_are_those_of_the_whole_batch(two_ranks):
    head, found = make_head(), of(two_ranks, "class weights")
    loss = api_loss(head(*make_batch(len(two_ranks))), **WEIGHTED)
    loss.backward()
    for rows in (0, 6):
        losses = torch.stack([rank[rows]["loss"] for rank in found])
        assert_close(losses.mean(), loss.detach(), 1e-12)
        assert losses.std() > 1e-3  # else the weights would not tell
        for rank in found:
            assert_close(rank[rows]["head"], gradients(head))


def test_the_librarys_efficient_miner_leaves_out_own_rows(two_ranks):
    features, labels = make_batch(len(two_ranks))
    for number, (a1, positive, a2, negative) in enumerate(of(two_ranks, "miner")):
        own_first = torch.arange(len(labels)).roll(-number * SIZE)  # as the library lays out its keys
        keys, key_labels = features[own_first], labels[own_first]
        pairs = mine_pairs(keys[:SIZE], key_labels[:SIZE], keys=keys, key_labels=key_labels, key_offset=0)
        assert a1 + a2 == pairs.anchor[pairs.valid].tolist()
        assert positive + negative == pairs.partner[pairs.valid].tolist()


# Over a part of the ranks.


def test_net_over_a_group_can_be_copied_and_is_saved_without_the_group(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = APINet("test_resnet", 3, gather=dist.new_group([0]))
        copy.deepcopy(net).save_pretrained(tmp_path)
        assert APINet.from_pretrained(tmp_path).head.gather is True
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("case", ["mesh", "groups", "world"])
def test_head_over_a_group_is_the_head_on_the_batch_of_that_group(ranks, case):
    copies = 1 if case == "world" else 2
    size = len(ranks) // copies
    features, labels = make_batch(size)
    head = make_head()
    loss = api_loss(head(features.requires_grad_(), labels), **WEIGHTED)
    loss.backward()
    expected = gradients(head)
    for first in range(copies):
        group = of(ranks, case)[first::copies]
        for place, rank in enumerate(group):
            assert rank["size"] == size
            assert rank["offset"] == place * SIZE
            assert torch.equal(rank["keys"], features.detach())
            assert torch.equal(rank["key_labels"], labels)
        means = {name: torch.stack([rank["head"][name] for rank in group]).mean(0) for name in expected}
        torch.testing.assert_close(means, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(torch.stack([rank["loss"] for rank in group]).mean(), loss.detach())
        found = torch.cat([rank["features"] for rank in group]) / size
        torch.testing.assert_close(found, features.grad, rtol=0, atol=1e-10)


def test_groups_that_do_not_fit_are_an_error(ranks):
    for number, messages in enumerate(of(ranks, "errors")):
        assert "TypeError: group must be a ProcessGroup or a DeviceMesh, got str" in messages["type"]
        assert ("other" in messages) == (number > 0)
        assert number == 0 or "ValueError: this process is not in the group" in messages["other"]


# With a memory.


@pytest.mark.parametrize("case", memory_on_ranks.CASES)
def test_all_ranks_remember_the_images_of_all(two_ranks, case):
    first, second = (rank[case] for rank in two_ranks)
    assert isinstance(first, dict), first
    for one, other in zip(first["memories"], second["memories"], strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)
    if case.startswith("no DDP"):
        return  # the backbones drift apart; what each made of its images is nevertheless with both
    # What is kept is what the common backbone of the time made of the images of both ranks, in their order.
    last = first["memories"][-1]
    assert int(last["num_pushed"]) == 2 * memory_on_ranks.SIZE * len(first["memories"])
    labels = torch.cat([labels for _, labels in memory_on_ranks.batches(2)])
    for turn, label in enumerate(labels.tolist()[-memory_on_ranks.MEMORY :], len(labels) - memory_on_ranks.MEMORY):
        assert last["labels"][turn % memory_on_ranks.MEMORY] == label


@pytest.mark.parametrize("wrap", ["DDP", "DDP without buffers"])
def test_with_gather_it_is_one_process_with_the_whole_batch(two_ranks, wrap):
    found = [rank[f"{wrap}, gather=True"] for rank in two_ranks]
    net = memory_on_ranks.Net()
    expected = memory_on_ranks.train(net, net)
    torch.testing.assert_close((found[0]["losses"] + found[1]["losses"]) / 2, expected["losses"], rtol=0, atol=1e-10)
    for rank in found:
        torch.testing.assert_close(rank["weights"], expected["weights"], rtol=0, atol=1e-10)
        torch.testing.assert_close(rank["memories"], expected["memories"], rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("wrap", ["DDP", "DDP without buffers"])
def test_without_gather_each_rank_searches_its_own_batch_and_what_all_had_before(two_ranks, wrap):
    found = [rank[f"{wrap}, gather=False"] for rank in two_ranks]
    net = memory_on_ranks.Net()
    net.head.memory = None
    optimizer, past = torch.optim.SGD(net.parameters(), lr=0.1), []
    for step, (images, labels) in enumerate(memory_on_ranks.batches(2)):
        features = net.backbone(images)
        losses = [
            api_loss(net.head(x, y, **memory_on_ranks.with_past(x, y, past, memory_on_ranks.MEMORY)))
            for x, y in zip(features.split(memory_on_ranks.SIZE), labels.split(memory_on_ranks.SIZE), strict=True)
        ]
        for rank, loss in zip(found, losses, strict=True):
            torch.testing.assert_close(rank["losses"][step], loss.detach(), rtol=0, atol=1e-10)
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
        past.append((features, labels))
    for rank in found:
        weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
        torch.testing.assert_close(rank["weights"], weights, rtol=0, atol=1e-10)


def test_one_process_needs_no_group():
    features, labels = make_batch(1)
    assert gather_features(features, labels) == (features, labels, 0)
    alone, gathering = make_head()(features, labels), make_head(gather=True)(features, labels)
    assert gathering.num_rows is None
    assert torch.equal(api_loss(alone), api_loss(gathering))
    copy.deepcopy(make_head(gather=True))


def test_gather_features_shows_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"features must be \[B, D\], got float32 \[4, 3, 2, 2\]"):
        gather_features(torch.zeros(4, 3, 2, 2), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"labels must have one entry per row"):
        gather_features(torch.zeros(4, 3), torch.zeros(5).long())
