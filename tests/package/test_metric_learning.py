"""Pairs to and from pytorch-metric-learning, against brute force and the formulas."""

import importlib
import sys

import pytest
import reference
import torch
from pytorch_metric_learning import losses, miners

from apinet_head import APIHead, api_loss, api_loss_terms, mine_pairs
from apinet_head.metric_learning import APIMiner, pairs_from_tuple

SIZE, DIM, CLASSES = 15, 10, 4
X = torch.randn(SIZE, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3])  # the last is alone in its class
OTHERS = X.flip(0) + 0.1
AMONG_OTHERS = {"keys": OTHERS, "key_labels": Y.flip(0), "own": None}
MINERS = [
    miners.AngularMiner(), miners.BatchEasyHardMiner("easy", "hard"), miners.BatchEasyHardMiner("all", "easy"),
    miners.BatchHardMiner(), miners.DistanceWeightedMiner(), miners.HDCMiner(), miners.MultiSimilarityMiner(),
    miners.PairMarginMiner(), miners.TripletMarginMiner(), miners.UniformHistogramMiner(),
]  # fmt: skip


def make_head():
    torch.manual_seed(1)
    return APIHead(DIM, CLASSES, hidden_dim=6, dropout=0.0, dtype=torch.float64)


def loss_pair_by_pair(head, pairs):
    """The reference's loss of a list of (anchor, partner), on images set side by side for it."""
    rows = [anchor for anchor, _ in pairs] + [partner for _, partner in pairs]
    return reference.head(head, X[rows], Y[rows], [torch.arange(len(pairs)) + len(pairs)])


@pytest.mark.parametrize("miner", MINERS, ids=lambda miner: type(miner).__name__)
def test_head_trains_on_what_any_miner_finds(miner):
    torch.manual_seed(0)
    mined = miner(X, Y)
    a1, p, a2, n = [rows.tolist() for rows in (mined if len(mined) == 4 else (*mined[:2], *mined[::2]))]
    positive, negative = list(zip(a1, p, strict=True)), list(zip(a2, n, strict=True))
    assert positive
    assert negative

    pairs = pairs_from_tuple(mined)
    assert list(zip(pairs.anchor.tolist(), pairs.partner.tolist(), strict=True)) == positive + negative
    assert torch.equal(pairs.same_class, Y[pairs.anchor] == Y[pairs.partner])
    assert pairs.valid.all()
    head = make_head()
    terms, expected = api_loss_terms(head(X, Y, pairs=pairs)), loss_pair_by_pair(head, positive + negative)
    torch.testing.assert_close(terms.cross_entropy, expected["cross_entropy"])
    torch.testing.assert_close(terms.ranking, expected["ranking"])


def test_pairs_of_a_miner_may_point_to_keys():
    keys, key_labels = OTHERS, Y.flip(0)
    pairs = pairs_from_tuple(miners.MultiSimilarityMiner()(X, Y, keys, key_labels))
    assert torch.equal(pairs.same_class, Y[pairs.anchor] == key_labels[pairs.partner])
    output = make_head()(X, Y, pairs=pairs, keys=keys, key_labels=key_labels)
    assert torch.equal(output.labels, torch.cat([Y[pairs.anchor], key_labels[pairs.partner]]))


@pytest.mark.parametrize("length", [3, 4])
def test_no_pairs_give_a_loss_of_zero(length):
    head = make_head()
    features = X.clone().requires_grad_()
    loss = api_loss(head(features, Y, pairs=pairs_from_tuple([torch.empty(0, dtype=torch.long)] * length)))
    loss.backward()
    assert loss.item() == 0
    assert all(not value.grad.any() for value in (features, *head.parameters()) if value.grad is not None)


ROWS = torch.arange(3)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ((ROWS, ROWS), ValueError, r"anchor, positive, negative\), got 2 items"),
        ((ROWS, ROWS, ROWS.float()), ValueError, r"the miner's negative must be .* got float32 \[3\]"),
        ((ROWS, ROWS[:2], ROWS), ValueError, "each positive needs its anchor, got 3 anchors and 2 positives"),
        ((ROWS, ROWS, ROWS, ROWS[:1]), ValueError, "each negative needs its anchor, got 3 anchors and 1 negatives"),
        (([0], [1], [2]), TypeError, "must be a tensor"),
    ],
)
def test_tuples_that_do_not_fit_are_an_error(wrong, error, message):
    with pytest.raises(error, match=message):
        pairs_from_tuple(wrong)


def nearest(same_class, batch=X, labels=Y, keys=X, key_labels=Y, own=range(SIZE), sign=1):
    """[anchors, partners] by trying all keys but `own[anchor]`, without anchors that have no candidate."""
    found = []
    for anchor in range(len(batch)):
        distance = sign * ((keys - batch[anchor]) ** 2).sum(1).nan_to_num(torch.inf)
        distance[(key_labels == labels[anchor]) != same_class] = torch.inf
        if own is not None:
            distance[own[anchor]] = torch.inf
        if distance.isfinite().any():
            found.append((anchor, int(distance.argmin())))
    return [list(rows) for rows in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("miner", "refs", "expected"),
    [
        (APIMiner(), [], nearest(True) + nearest(False)),
        (APIMiner(intra="dissimilar"), [], nearest(True, sign=-1) + nearest(False)),
        (APIMiner(intra=None), [], [[], []] + nearest(False)),
        (APIMiner(inter=None), [], nearest(True) + [[], []]),
        (APIMiner(), [X.clone(), Y.clone()], nearest(True) + nearest(False)),  # the batch once more, as itself
        (APIMiner(), [OTHERS, Y.flip(0)], nearest(True, **AMONG_OTHERS) + nearest(False, **AMONG_OTHERS)),
    ],
)
def test_miner_returns_the_nearest_as_a_tuple(miner, refs, expected):
    assert [rows.tolist() for rows in miner(X, Y, *refs)] == expected


@pytest.mark.parametrize("memory_size", [30, 33, 64, 15])  # batches in line, across the end, never full, one alone
@pytest.mark.parametrize("change", [None, "one twice", "NaN"])
def test_no_embedding_is_its_own_partner_in_a_cross_batch_memory(memory_size, change):
    torch.manual_seed(3)
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), DIM, memory_size, miner=APIMiner())
    memory.embedding_memory = memory.embedding_memory.double()
    seen = []
    memory.loss.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    for step in range(5):
        batch, labels = torch.randn(SIZE, DIM, dtype=torch.float64), torch.randint(0, 4, (SIZE,))
        if change == "one twice":
            batch[7], labels[7] = batch[0], labels[0]
        if change == "NaN":
            batch[0] = torch.nan
        memory(batch, labels)
        _, _, (a1, p, a2, n), keys, key_labels = seen[-1]
        own = (torch.arange(SIZE) + SIZE * step) % memory_size
        for same_class, anchor, partner in ((True, a1, p), (False, a2, n)):
            assert (partner != own[anchor]).all()
            finite = batch[anchor].isfinite().all(1)
            anchors, partners = nearest(same_class, batch, labels, keys, key_labels, own)
            assert anchor[finite].tolist() == anchors
            assert torch.equal(keys[partner[finite]], keys[partners])  # of two copies, either may be the nearest


def test_embeddings_that_are_queries_alone_are_searched_in_all_of_the_memory():
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), DIM, 60, miner=APIMiner())
    memory.embedding_memory = memory.embedding_memory.double()
    seen = []
    memory.loss.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    both, labels = torch.cat([X, X + 0.01]), torch.cat([Y, Y])  # a momentum encoder's copies are almost the queries
    memory(both, labels, enqueue_mask=torch.arange(2 * SIZE) >= SIZE)
    assert seen[0][2][1].tolist() == seen[0][2][0].tolist() == list(range(SIZE))


def test_embeddings_in_ref_emb_in_another_order_are_an_error():
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
    message = r"ref_emb float64 \[15, 10\] on cpu holds the embeddings .* not in their order"
    with pytest.raises(ValueError, match=message):
        APIMiner()(X, Y, X[order], Y[order])


def test_there_and_back_is_what_is_valid_of_mine_pairs():
    pairs = mine_pairs(X, Y)
    found = pairs_from_tuple(APIMiner()(X, Y))
    for field, other in zip(pairs, found, strict=True):
        assert torch.equal(field[pairs.valid], other)
    torch.testing.assert_close(api_loss(make_head()(X, Y, pairs=found)), api_loss(make_head()(X, Y)))


LOSSES = [losses.ContrastiveLoss(), losses.TripletMarginLoss(), losses.MultiSimilarityLoss(), losses.CircleLoss()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses_of_the_library_take_our_pairs(loss):
    features = X.clone().requires_grad_()
    loss(features, Y, APIMiner()(features, Y)).backward()
    assert features.grad.isfinite().all()
    assert features.grad.any()


def test_unknown_search_is_an_error():
    with pytest.raises(ValueError, match="intra must be one of"):
        APIMiner(intra="hard")
    with pytest.raises(ValueError, match="both None"):
        APIMiner(None, None)
    assert "intra='similar', inter='random'" in repr(APIMiner(inter="random"))


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "apinet_head.metric_learning")
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.miners", None)
    with pytest.raises(ImportError, match="pip install pytorch-metric-learning"):
        importlib.import_module("apinet_head.metric_learning")
