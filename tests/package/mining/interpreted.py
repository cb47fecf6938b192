"""Backend "triton" of `mine_pairs` in Triton's interpreter, on a CPU, against brute force.

Triton settles at import whether it interprets, so that these tests need a process of their own: `test_triton.py` starts
it. By hand: TRITON_INTERPRET=1 python -m pytest tests/package/mining/interpreted.py
"""

from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mined import HOWS, brute_force, check
from strategies import DENORMAL, DTYPES, KINDS, batches, make_batch

from apinet_head import mine_pairs
from apinet_head.mining import BACKENDS
from apinet_head.mining import triton as backend


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


# Whatever the size, on tensor cores; small searches are done by subtraction alone.
KERNELS = "triton, large"
LABELS = torch.arange(40) // 4  # few rows, as each takes 10 ms in the interpreter
OF_KERNELS = DTYPES[:3]  # float64 is plain PyTorch's
QUICK = ("normal", "non-finite", "outliers", "unlabelled")
EITHER = pytest.mark.parametrize("kernels", ["triton", KERNELS])
BACKENDS[KERNELS] = mock.patch.object(backend, "DIRECT", 0)(backend.mine)


@EITHER
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", [*QUICK, *(slow(kind) for kind in [*KINDS, DENORMAL] if kind not in QUICK)])
def test_adversarial(kind, dtype, kernels):
    features, labels = make_batch(seed=1, size=24, dim=33, classes=6, dtype=dtype, kind=kind)
    check(features, labels, backend=kernels)
    check(features, labels, intra="dissimilar", inter="dissimilar", backend=kernels)


@EITHER
@settings(max_examples=10, deadline=None)
@given(batch=batches(70, 70), intra=st.sampled_from(HOWS), inter=st.sampled_from(HOWS))
def test_any_batch(batch, intra, inter, kernels):
    check(*batch, intra=intra, inter=inter, backend=kernels)


@EITHER
@settings(max_examples=10, deadline=None)
@given(batch=batches(60, 40), data=st.data())
def test_keys_elsewhere(batch, data, kernels):
    keys, key_labels = batch
    size = data.draw(st.integers(1, len(keys)))
    offset = data.draw(st.none() | st.integers(0, len(keys) - size))
    rows = slice(offset or 0, (offset or 0) + size)
    check(keys[rows], key_labels[rows], backend=kernels, keys=keys, key_labels=key_labels, key_offset=offset,
          intra=data.draw(st.sampled_from(HOWS)), inter=data.draw(st.sampled_from(HOWS)))  # fmt: skip


def test_small_searches_are_the_same():
    features, labels = make_batch(seed=1, size=40, dim=33, classes=10, dtype=torch.float32, kind="normal")
    for how in ("similar", "dissimilar"):
        found = (mine_pairs(features, labels, intra=how, inter=how, backend=name) for name in ("triton", KERNELS))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@EITHER
@pytest.mark.parametrize("factor", [6e4, slow(1e30)])
@pytest.mark.parametrize("far", [[5], range(0, 40, 10)])
@pytest.mark.parametrize("offset", [0, 100])
def test_rows_far_away_change_nobody_elses_partner(factor, far, offset, kernels):
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) + offset
    features[list(far)] *= factor
    others = torch.ones(40, dtype=torch.bool)
    others[list(far)] = False
    found = mine_pairs(features, LABELS, backend=kernels).partner.view(2, -1)
    assert torch.equal(found[:, others], brute_force(features, LABELS)[:, others])


@EITHER
@pytest.mark.parametrize("factor", [1e6, slow(1e30)])
def test_a_key_far_away_changes_nobodys_partner(factor, kernels):
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    expected = brute_force(features, LABELS)
    keys, key_labels = torch.cat([features, features[7:8] * factor]), torch.cat([LABELS, LABELS[7:8]])
    found = mine_pairs(features, LABELS, keys=keys, key_labels=key_labels, key_offset=0, backend=kernels)
    assert torch.equal(found.partner.view(2, -1), expected)


@pytest.mark.parametrize(("offset", "factor"), [(1000, 1), (100, 1e30)])
def test_keys_without_a_class_do_not_move_the_centre(offset, factor):
    # As in a memory that is not full yet.
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) + offset
    features[5] *= factor
    keys = torch.cat([features, torch.zeros(200, 64)])
    key_labels = torch.cat([LABELS, torch.full((200,), -1)])
    found = mine_pairs(features, LABELS, keys=keys, key_labels=key_labels, key_offset=0, backend=KERNELS)
    others = torch.arange(40) != 5
    assert torch.equal(found.partner.view(2, -1)[:, others], brute_force(features, LABELS)[:, others])


@pytest.mark.parametrize("factor", [1e3, 1e20])
def test_rows_far_away_find_each_other(factor):
    # They are so far from the others that these have no direction for them.
    features = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    far = torch.arange(0, 40, 7)
    labels = LABELS.clone()
    labels[far] = 10 + torch.arange(6) // 3
    features[far] *= factor * torch.arange(1, 7)[:, None]
    for keys in ({}, {"keys": features, "key_labels": labels, "key_offset": 0}):
        found = mine_pairs(features, labels, **keys, backend=KERNELS).partner.view(2, -1)
        assert torch.equal(found[0], brute_force(features, labels)[0])


@EITHER
@pytest.mark.parametrize("cosine", [slow(0.999), 0.999999])
def test_near_neighbours_are_told_apart(cosine, kernels):
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(10, 512, generator=generator))[LABELS]
    noise = torch.nn.functional.normalize(torch.randn(40, 512, generator=generator))
    shuffled = torch.randperm(40, generator=generator)
    features = torch.nn.functional.normalize(centres + noise * (1 - cosine) ** 0.5)[shuffled]
    found = mine_pairs(features, LABELS[shuffled], backend=kernels).partner.view(2, -1)
    assert torch.equal(found, brute_force(features, LABELS[shuffled]))


@EITHER
def test_images_without_a_class_are_nobodys_partner_and_have_none(kernels):
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 5
    labels[::3] = -100
    labels[1::9] = -1
    labelled = labels >= 0
    for keys in ({}, {"keys": features, "key_labels": labels, "key_offset": 0}):
        pairs = mine_pairs(features, labels, **keys, backend=kernels)
        assert torch.equal(pairs.valid, labelled.repeat(2))
        alone = mine_pairs(features[labelled], labels[labelled])
        assert torch.equal(labelled.nonzero()[:, 0][alone.partner], pairs.partner[pairs.valid])


@EITHER
@pytest.mark.parametrize("how", ["similar", "dissimilar"])
def test_rows_that_are_not_finite_are_never_chosen_but_keep_their_pairs(how, kernels):
    features, labels = make_batch(seed=3, size=40, dim=16, classes=3, dtype=torch.float32, kind="non-finite")
    pairs = mine_pairs(features, labels, intra=how, inter=how, backend=kernels)
    assert pairs.valid.all()
    assert features[pairs.partner].isfinite().all()


@EITHER
@pytest.mark.parametrize("dtype", OF_KERNELS)
def test_ties_go_to_the_lowest_index(dtype, kernels):
    # Small integers of mean 0: equal distances are equal in floating point too, and there are many of them.
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-1, 2, (20, 3), generator=generator).to(dtype)
    features, labels = torch.cat([half, -half]), torch.randint(4, (40,), generator=generator)
    for how in ("similar", "dissimilar"):
        found = mine_pairs(features, labels, intra=how, inter=how, backend=kernels)
        for field, expected in zip(found, mine_pairs(features.double(), labels, intra=how, inter=how), strict=True):
            assert torch.equal(field, expected)


@pytest.mark.parametrize("dtype", OF_KERNELS)
def test_minus_zero_is_zero(dtype):
    # For the ones, 2 and 0 are equally far; |k|² - 2qk is 0 for both, and times -1 it is -0 for one. The centre is 0,
    # and the two meet in one slot, from two tiles.
    features = torch.tensor([2.0] + 15 * [1.0] + 46 * [0.0], dtype=dtype)[:, None]
    pairs = mine_pairs(features, torch.tensor(17 * [0] + 45 * [1]), intra="dissimilar", backend=KERNELS)
    assert pairs.partner[1:16].tolist() == 15 * [0]


def test_near_ties_of_float32():
    # Distances that differ by less than half precision could tell, around two centres far from the mean.
    generator = torch.Generator().manual_seed(0)
    centre, *directions = torch.nn.functional.normalize(torch.randn(41, 64, generator=generator).double())
    steps = torch.stack(directions) * (0.01 + 2.5e-5 * torch.randperm(40, generator=generator)[:, None]).sqrt()
    half = torch.cat([centre[None], centre + steps])
    labels = torch.tensor([0] + 40 * [1] + [2] + 40 * [3])
    check(torch.cat([half, -half]).float(), labels, backend=KERNELS)


@EITHER
@pytest.mark.parametrize("dtype", OF_KERNELS)
@pytest.mark.parametrize("distance", [1e4, slow(1e30)])  # float16 has no 1e30: rows are not finite then
def test_queries_far_from_the_keys(distance, dtype, kernels):
    keys, key_labels = make_batch(seed=4, size=50, dim=20, classes=5, dtype=dtype, kind="normal")
    features, labels = make_batch(seed=5, size=20, dim=20, classes=5, dtype=dtype, kind="normal")
    check(features * distance, labels, keys=keys, key_labels=key_labels, inter="dissimilar", backend=kernels)
    check(features + distance, labels, keys=keys + distance, key_labels=key_labels, backend=kernels)


@EITHER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_exact(dtype, kernels):
    features, labels = make_batch(seed=6, size=60, dim=30, classes=6, dtype=torch.float64, kind="normal")
    mixed = (features * 0.25 + torch.tensor([0.0, 0.5, 1.0, 30.0, -300.0]).repeat(6)).to(dtype)
    queries, keys = (features * 0.1 + 1).to(dtype), (features.flip(0) * 0.1 + 3).to(dtype)
    for batch, others in ((mixed, {}), (queries, {"keys": keys, "key_labels": labels})):
        exact = {name: value.double() if name == "keys" else value for name, value in others.items()}
        found = mine_pairs(batch, labels, **others, backend=kernels)
        for field, expected in zip(found, mine_pairs(batch.double(), labels, **exact), strict=True):
            assert torch.equal(field, expected)


def test_under_compile_and_export(monkeypatch):
    monkeypatch.setattr(backend, "DIRECT", 0)
    features, labels = make_batch(seed=7, size=40, dim=8, classes=6, dtype=torch.float32, kind="normal")
    expected = mine_pairs(features, labels)
    mine = partial(mine_pairs, backend="triton")
    found = torch.compile(mine, fullgraph=True, backend="aot_eager")(features, labels)
    assert all(torch.equal(field, other) for field, other in zip(found, expected, strict=True))

    class Mining(torch.nn.Module):
        def forward(self, features, labels):
            return tuple(mine(features, labels))

    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(
        Mining(), (features[:9], labels[:9]), dynamic_shapes={"features": {0: batch}, "labels": {0: batch}}
    )
    found = program.module()(features, labels)
    assert all(torch.equal(field, other) for field, other in zip(found, expected, strict=True))


def test_operator_keeps_its_promises():
    features, labels = make_batch(seed=8, size=20, dim=8, classes=6, dtype=torch.float32, kind="normal")
    torch.library.opcheck(backend.find_partners, (features, labels, None, labels, 0, 1, -1))
    torch.library.opcheck(backend.find_partners, (features[:5], labels[:5], features, labels, None, 0, 1))
