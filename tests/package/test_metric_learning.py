"""Pairs to and from pytorch-metric-learning, against brute force and the formulas."""

import importlib
import sys

import pytest
import reference
import torch
from pytorch_metric_learning import losses, miners

from apinet_head import APIHead, Pairs, api_loss_terms
from apinet_head.metric_learning import APIMiner, pairs_from_tuple

SIZE, DIM, CLASSES = 15, 10, 4
X = torch.randn(SIZE, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3])  # the last is alone in its class
OTHERS, LABELS = X.flip(0) + 0.1, Y.flip(0)
AMONG_OTHERS = {"keys": OTHERS, "key_labels": LABELS, "own": None}
MINERS = [
    miners.AngularMiner(), miners.BatchEasyHardMiner("easy", "hard"), miners.BatchEasyHardMiner("all", "easy"),
    miners.BatchHardMiner(), miners.DistanceWeightedMiner(), miners.HDCMiner(), miners.MultiSimilarityMiner(),
    miners.PairMarginMiner(), miners.TripletMarginMiner(), miners.UniformHistogramMiner(),
]  # fmt: skip


def make_head():
    torch.manual_seed(1)
    return APIHead(DIM, CLASSES, hidden_dim=6, dropout=0.0, dtype=torch.float64)


@pytest.mark.parametrize("miner", MINERS, ids=lambda miner: type(miner).__name__)
@pytest.mark.parametrize("given", [{}, {"keys": OTHERS, "key_labels": LABELS}], ids=["batch", "keys"])
def test_head_trains_on_what_any_miner_finds(miner, given):
    torch.manual_seed(0)
    mined = miner(X, Y, *given.values())
    a1, p, a2, n = mined if len(mined) == 4 else (*mined[:2], *mined[::2])
    assert len(p)
    assert len(n)
    pairs, (keys, key_labels) = pairs_from_tuple(mined), tuple(given.values()) or (X, Y)
    assert torch.equal(torch.stack(pairs[:2]), torch.stack([torch.cat([a1, a2]), torch.cat([p, n])]))
    assert torch.equal(pairs.same_class, Y[pairs.anchor] == key_labels[pairs.partner])
    assert pairs.valid.all()
    head, size = make_head(), len(pairs.anchor)
    output = head(X, Y, pairs=pairs, **given)
    images = torch.cat([X[pairs.anchor], keys[pairs.partner]])  # set side by side for the reference
    beside = torch.arange(size) + size
    torch.testing.assert_close(
        head.gates(X, pairs, keys=given.get("keys")), head.gates(images, Pairs(beside - size, beside, *pairs[2:]))
    )
    expected = reference.head(head, images, output.labels, [beside])
    torch.testing.assert_close([*api_loss_terms(output)[1:]], [expected["cross_entropy"], expected["ranking"]])
    assert torch.equal(output.labels, torch.cat([Y[pairs.anchor], key_labels[pairs.partner]]))


ROWS, ORDER = torch.arange(3), torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pairs_from_tuple((ROWS, ROWS)), ValueError, r"anchor, positive, negative\), got 2 items"),
        (lambda: pairs_from_tuple((ROWS, ROWS, ROWS.float())), ValueError, r"negative must be .* got float32 \[3\]"),
        (lambda: pairs_from_tuple((ROWS, ROWS[:2], ROWS)), ValueError, "each positive .* 3 anchors and 2 positives"),
        (lambda: pairs_from_tuple((ROWS,) * 3 + (ROWS[:1],)), ValueError, "each negative .* 3 anchors and 1 negatives"),
        (lambda: pairs_from_tuple(([0], [1], [2])), TypeError, "must be a tensor"),
        (lambda: APIMiner(intra="hard"), ValueError, "intra must be one of"),
        (lambda: APIMiner(None, None), ValueError, "both None"),
        (lambda: APIMiner()(X, Y, X[ORDER], Y[ORDER]), ValueError, r"float64 \[15, 10\] on cpu .* not in their order"),
    ],
)
def test_what_does_not_fit_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


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
        (APIMiner(), [OTHERS, LABELS], nearest(True, **AMONG_OTHERS) + nearest(False, **AMONG_OTHERS)),
    ],
)
def test_miner_returns_the_nearest_as_a_tuple(miner, refs, expected):
    assert [rows.tolist() for rows in miner(X, Y, *refs)] == expected
    assert f"intra={miner.intra!r}, inter={miner.inter!r}" in repr(miner)


def watched_memory(size):
    """A CrossBatchMemory with our miner, and what its loss is called with."""
    memory, seen = losses.CrossBatchMemory(losses.ContrastiveLoss(), DIM, size, miner=APIMiner()), []
    memory.embedding_memory = memory.embedding_memory.double()
    memory.loss.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    return memory, seen


@pytest.mark.parametrize("memory_size", [30, 33, 64, 15])  # batches in line, across the end, never full, one alone
@pytest.mark.parametrize("change", [None, "one twice", "NaN"])
def test_no_embedding_is_its_own_partner_in_a_cross_batch_memory(memory_size, change):
    torch.manual_seed(3)
    memory, seen = watched_memory(memory_size)
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
    memory, seen = watched_memory(60)
    both, labels = torch.cat([X, X + 0.01]), torch.cat([Y, Y])  # a momentum encoder's copies are almost the queries
    memory(both, labels, enqueue_mask=torch.arange(2 * SIZE) >= SIZE)
    assert seen[0][2][1].tolist() == seen[0][2][0].tolist() == list(range(SIZE))


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "apinet_head.metric_learning")
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.miners", None)
    with pytest.raises(ImportError, match="pip install pytorch-metric-learning"):
        importlib.import_module("apinet_head.metric_learning")
