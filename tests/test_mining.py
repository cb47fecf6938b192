"""`mine_pairs` and `random_pairs` against brute force."""

import sys
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import candidates, check_partners
from strategies import DENORMAL, DTYPES, KINDS, batches, make_batch

from apinet_head import Pairs, mine_pairs, mining, random_pairs
from apinet_head.mining import BACKENDS, choose, dense, rows, tiled
from apinet_head.mining.draw import draw
from apinet_head.mining.rows import finite_rows


def unseen(module, mine):
    """A backend as it is on devices where nobody waits for a number."""
    never = mock.Mock(return_value=False)
    return mock.patch.object(rows, "may_look", never)(mock.patch.object(module, "may_look", never)(mine))


# Tiles so small that the tests' batches have many, whole ones and parts.
BACKENDS["tiled by 16"] = partial(tiled.mine, tile=16)
BACKENDS["dense, unseen"] = unseen(dense, dense.mine)
BACKENDS["tiled by 16, unseen"] = unseen(tiled, partial(tiled.mine, tile=16))
# "triton" has tests of its own, because it needs a GPU, or a process of its own.
each_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
HOWS = ("similar", "dissimilar", "random")


def check(features, labels, *, intra="similar", inter="similar", **keys):
    """Mine, and compare both halves with brute force."""
    pairs = mine_pairs(features, labels, intra=intra, inter=inter, **keys)
    size = len(features)
    reference = {
        "keys": keys.get("keys"), "key_labels": keys.get("key_labels"), "offset": keys.get("key_offset"),
    }  # fmt: skip
    for row, how, same in ((0, intra, True), (size, inter, False)):
        half = Pairs(*(field[row : row + size] for field in pairs))
        assert half.anchor.tolist() == list(range(size))
        assert half.same_class.tolist() == [same] * size
        check_partners(half.partner, half.valid, features, labels, how=how, same_class=same, **reference)
    return pairs


@each_backend
@settings(max_examples=80, deadline=None)
@given(batch=batches(), intra=st.sampled_from(HOWS), inter=st.sampled_from(HOWS))
def test_any_batch(backend, batch, intra, inter):
    check(*batch, intra=intra, inter=inter, backend=backend)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, DENORMAL])
def test_adversarial(kind, dtype, backend):
    features, labels = make_batch(seed=1, size=120, dim=64, classes=30, dtype=dtype, kind=kind)
    check(features, labels, backend=backend)
    check(features, labels, intra="dissimilar", inter="dissimilar", backend=backend)


def test_a_sample_of_the_rows_does_not_speak_for_all():
    # Those that are asked first are near the origin. The others, far from it, need the mean taken away.
    features, labels = make_batch(seed=4, size=96, dim=64, classes=24, dtype=torch.float32, kind="normal")
    far = torch.arange(96) % (96 // dense.SAMPLE) != 0
    features[far] += 1000
    pairs = mine_pairs(features, labels, backend="dense")
    distance = torch.cdist(features.double(), features.double()).square()
    same = labels[:, None] == labels
    for allowed, partner in zip((same & ~torch.eye(96).bool(), ~same), pairs.partner.view(2, -1), strict=True):
        nearest = distance.masked_fill(~allowed, torch.inf).amin(1)
        found = distance.gather(1, partner[:, None])[:, 0]
        assert (found - nearest)[far & allowed.any(1)].max() < 1  # of about 128; with the mean left in, up to 48 off


@each_backend
@settings(max_examples=60, deadline=None)
@given(batch=batches(max_size=60, max_dim=40), data=st.data())
def test_keys_elsewhere(backend, batch, data):
    keys, key_labels = batch
    size = data.draw(st.integers(1, len(keys)))
    offset = data.draw(st.none() | st.integers(0, len(keys) - size))
    start = offset or 0
    features, labels = keys[start : start + size], key_labels[start : start + size]
    check(features, labels, backend=backend, keys=keys, key_labels=key_labels, key_offset=offset,
          intra=data.draw(st.sampled_from(HOWS)), inter=data.draw(st.sampled_from(HOWS)))  # fmt: skip


def test_keys_with_offset_zero_are_the_batch_itself():
    features, labels = make_batch(seed=2, size=50, dim=16, classes=7, dtype=torch.float32, kind="normal")
    alone = mine_pairs(features, labels)
    among = mine_pairs(features, labels, keys=features, key_labels=labels, key_offset=0)
    for field, other in zip(alone, among, strict=True):
        assert torch.equal(field, other)


@each_backend
def test_backends_agree_on_a_larger_batch(backend):
    features, labels = make_batch(seed=8, size=2500, dim=24, classes=300, dtype=torch.float64, kind="normal")
    for how in ("similar", "dissimilar"):
        found = mine_pairs(features, labels, intra=how, inter=how, backend=backend)
        expected = mine_pairs(features, labels, intra=how, inter=how, backend="dense")
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_auto_takes_tiles_for_large_batches_and_never_for_a_graph():
    assert [choose("cpu", size, size) for size in (120, 8192)] == ["dense", "tiled"]
    assert choose("cpu", 120, 65536) == "tiled"
    assert [choose("cuda", size, size) for size in (120, 65536)] == ["dense", "tiled"]
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert choose("cpu", 65536, 65536) == "dense"


@each_backend
def test_ties_go_to_the_lowest_index_among_many(backend):
    # Small integers of mean 0: equal distances are equal in floating point too, and there are many of them.
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-1, 2, (60, 3), generator=generator).double()
    features, labels = torch.cat([half, -half]), torch.randint(4, (120,), generator=generator)
    for how in ("similar", "dissimilar"):
        pairs = mine_pairs(features, labels, intra=how, inter=how, backend=backend)
        distance = torch.cdist(features, features).square().round() * (1 if how == "similar" else -1)
        same = labels[:, None] == labels
        for allowed, partner in zip((same & ~torch.eye(120).bool(), ~same), pairs.partner.view(2, -1), strict=True):
            assert partner.tolist() == distance.masked_fill(~allowed, torch.inf).argmin(1).tolist()


@each_backend
def test_ties_go_to_the_lowest_index(backend):
    # The mean is 0 and all numbers are small integers, so that equal distances are equal in floating point too.
    features = torch.tensor([[0.0], [2.0], [-2.0], [2.0], [-2.0], [0.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    similar = mine_pairs(features, labels, backend=backend)
    assert similar.partner.tolist() == [1, 0, 0, 5, 5, 3] + [5, 3, 4, 1, 2, 0]
    dissimilar = mine_pairs(features, labels, intra="dissimilar", inter="dissimilar", backend=backend)
    assert dissimilar.partner.tolist() == [1, 2, 1, 4, 3, 3] + [3, 4, 3, 2, 1, 1]


def test_leaving_one_kind_out():
    features, labels = make_batch(seed=3, size=20, dim=8, classes=4, dtype=torch.float32, kind="normal")
    both = mine_pairs(features, labels)
    intra, inter = mine_pairs(features, labels, inter=None), mine_pairs(features, labels, intra=None)
    for field, first, second in zip(both, intra, inter, strict=True):
        assert torch.equal(field, torch.cat([first, second]))


def test_non_finite_rows_are_never_chosen_but_keep_their_pairs():
    features = torch.tensor([[0.0], [float("nan")], [3.0], [1.0], [float("inf")], [4.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = mine_pairs(features, labels)
    assert pairs.valid.all()
    assert not set(pairs.partner.tolist()) & {1, 4}
    lonely = mine_pairs(torch.tensor([[0.0], [float("nan")], [3.0]]), torch.tensor([0, 0, 1]))
    assert lonely.valid.tolist() == [False, True, False, True, True, True]


def test_distances_are_of_detached_features():
    features, labels = make_batch(seed=4, size=20, dim=8, classes=4, dtype=torch.float32, kind="normal")
    before = features.clone()
    with_gradient = mine_pairs(features.requires_grad_(), labels)
    assert torch.equal(with_gradient.partner, mine_pairs(before, labels).partner)
    assert torch.equal(features.detach(), before), "mining changed its input"


@each_backend
def test_autocast_does_not_reach_the_distances(backend):
    features, labels = make_batch(seed=5, size=150, dim=300, classes=10, dtype=torch.float32, kind="normal")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mine_pairs(features, labels, backend=backend)
    assert torch.equal(inside.partner, mine_pairs(features, labels).partner)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_label_dtypes(label_dtype):
    features, labels = make_batch(seed=6, size=30, dim=8, classes=5, dtype=torch.float32, kind="normal")
    pairs = mine_pairs(features, labels.to(label_dtype))
    assert torch.equal(pairs.partner, mine_pairs(features, labels).partner)
    assert [field.dtype for field in pairs] == [torch.int64, torch.int64, torch.bool, torch.bool]


@each_backend
def test_labels_of_keys_may_have_another_dtype(backend):
    features, labels = make_batch(seed=6, size=30, dim=8, classes=5, dtype=torch.float32, kind="normal")
    keys = {"keys": features, "key_labels": labels.int(), "key_offset": 0, "backend": backend}
    assert torch.equal(mine_pairs(features, labels, **keys).partner, mine_pairs(features, labels).partner)
    check(features, labels, intra="random", inter="random", **keys)


def test_empty_batch_has_no_pairs():
    pairs = mine_pairs(torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    assert [len(field) for field in pairs] == [0] * 4


def test_non_contiguous_features():
    features, labels = make_batch(seed=7, size=30, dim=8, classes=5, dtype=torch.float32, kind="normal")
    assert torch.equal(mine_pairs(features.T.contiguous().T, labels).partner, mine_pairs(features, labels).partner)


def test_random_partners_are_uniform_and_follow_the_generator():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    features = torch.zeros(6, 1)

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return mine_pairs(features, labels, intra="random", inter="random", generator=generator).partner.tolist()

    assert draw(0) == draw(0)
    draws = torch.tensor([draw(seed) for seed in range(600)])
    counts = torch.bincount(draws[:, 0], minlength=6)
    assert counts[[0, 4, 5]].sum() == 0
    assert (counts[[1, 2, 3]] - 200).abs().max() < 60  # five standard deviations
    assert (torch.bincount(draws[:, 6], minlength=6)[[4, 5]] - 300).abs().max() < 62


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 200), st.integers(0, 1000))
def test_random_pairs(size, num_pairs, seed):
    labels = torch.arange(size) % 3
    pairs = random_pairs(labels, num_pairs, generator=torch.Generator().manual_seed(seed))
    assert [len(field) for field in pairs] == [num_pairs] * 4
    assert torch.equal(pairs.valid, pairs.anchor != pairs.partner)
    assert pairs.valid.all() == (size > 1 or num_pairs == 0)
    assert torch.equal(pairs.same_class, labels[pairs.anchor] == labels[pairs.partner])


def test_random_pairs_cover_all_ordered_pairs():
    pairs = random_pairs(torch.arange(4), 12 * 400, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(pairs.anchor * 4 + pairs.partner, minlength=16).view(4, 4)
    assert counts.diagonal().sum() == 0
    assert (counts[~torch.eye(4, dtype=torch.bool)] - 400).abs().max() < 100


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mine_pairs(torch.zeros(4, 3, 2, 2), Y), r"float32 \[4, 3, 2, 2\].*pool it first"),
        (lambda: mine_pairs(X.long(), Y), r"features.*floating point.*int64 \[4, 3\]"),
        (lambda: mine_pairs(torch.zeros(4, 0), Y), r"at least one channel.*\[4, 0\]"),
        (lambda: mine_pairs(X, Y.float()), r"labels.*integer.*float32 \[4\]"),
        (lambda: mine_pairs(X, Y.bool()), r"labels.*integer.*bool \[4\]"),
        (lambda: mine_pairs(X, Y[:, None]), r"\[B\].*\[4, 1\].*squeeze"),
        (lambda: mine_pairs(X, Y[:3]), r"one entry per row.*\[3\].*\[4, 3\]"),
        (lambda: mine_pairs(X, Y.to("meta")), r"one device.*cpu.*meta|one device.*meta.*cpu"),
        (lambda: mine_pairs(X, Y, intra="nearest"), r"'similar', 'dissimilar', 'random' or None, got 'nearest'"),
        (lambda: mine_pairs(X, Y, intra=None, inter=None), r"both None"),
        (lambda: mine_pairs(X, Y, backend="faiss"), r"'auto', 'dense'.*got 'faiss'"),
        (
            lambda: mine_pairs(X, Y, backend="triton"),
            r"'triton' needs (features on a CUDA device.*on cpu|Triton).*'auto'",
        ),
        (lambda: mine_pairs(X, Y, key_labels=Y), r"need keys"),
        (lambda: mine_pairs(X, Y, keys=X), r"need key_labels"),
        (lambda: mine_pairs(X, Y, keys=X[:, :2], key_labels=Y), r"keys must be \[B, 3\].*\[4, 2\]"),
        (lambda: mine_pairs(X, Y, keys=X[:0], key_labels=Y[:0]), r"at least one row"),
        (lambda: mine_pairs(X, Y, keys=X, key_labels=Y, key_offset=1), r"\[0, 0\], got 1"),
        (lambda: random_pairs(Y[:0], 3), r"got 0 labels"),
        (lambda: random_pairs(Y, -1), r"num_pairs=-1"),
    ],
)
def test_errors_show_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_triton_may_be_missing(monkeypatch):
    # As on macOS, on Windows, or with PyTorch for CPUs.
    for name in [name for name in sys.modules if name.startswith("apinet_head.mining.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(mining, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"needs Triton, which cannot be imported.*backend='auto'"):
        mine_pairs(X, Y, backend="triton")


@pytest.mark.parametrize("offset", [None, 0, 7])
@pytest.mark.parametrize("same_class", [True, False])
def test_drawn_partners_are_uniform_among_the_candidates(same_class, offset):
    keys, key_labels = make_batch(seed=3, size=40, dim=5, classes=6, dtype=torch.float32, kind="non-finite")
    labels = key_labels[(offset or 0) :][:20]
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(20, 40)
    for _ in range(2000):
        partner, valid = draw(finite_rows(keys), labels, key_labels, offset, same_class, generator)
        counts[torch.arange(20)[valid], partner[valid]] += 1
    finite = keys.isfinite().all(1).numpy()
    allowed = torch.from_numpy(candidates(labels.numpy(), key_labels.numpy(), finite, same_class, offset))
    expected = 2000 / allowed.sum(1, keepdim=True)
    assert torch.equal(valid, allowed.any(1))
    assert counts[~allowed].sum() == 0
    assert ((counts - expected).abs()[allowed] <= (5 * expected.sqrt()).expand_as(counts)[allowed]).all()
