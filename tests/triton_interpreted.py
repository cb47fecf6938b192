"""Backend "triton" of `mine_pairs` in Triton's interpreter, on a CPU, against brute force.

Triton settles at import whether it interprets, so that these tests need a process of their own: `test_triton.py` starts
it. By hand: TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DENORMAL, KINDS, batches, make_batch
from test_mining import HOWS, check

from apinet_head import mine_pairs
from apinet_head.mining import triton as backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PATHS = {"direct": 1 << 60, "in order": 0}  # up to how many pairs of rows features are searched as they are


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(backend, "DIRECT", PATHS[request.param])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, DENORMAL])
def test_adversarial(kind, dtype, path):
    if kind == DENORMAL and dtype == torch.bfloat16:
        pytest.skip("the interpreter makes other numbers of denormal ones of bfloat16")
    features, labels = make_batch(seed=1, size=40, dim=33, classes=10, dtype=dtype, kind=kind)
    check(features, labels, intra="similar", inter="dissimilar", backend="triton")


@settings(max_examples=15, deadline=None)
@given(batch=batches(70, 70), intra=st.sampled_from(HOWS), inter=st.sampled_from(HOWS), path=st.sampled_from([*PATHS]))
def test_any_batch(batch, intra, inter, path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "DIRECT", PATHS[path])
        check(*batch, intra=intra, inter=inter, backend="triton")


@settings(max_examples=20, deadline=None)
@given(batch=batches(60, 40), data=st.data(), path=st.sampled_from([*PATHS]))
def test_keys_elsewhere(batch, data, path):
    keys, key_labels = batch
    size = data.draw(st.integers(1, len(keys)))
    offset = data.draw(st.none() | st.integers(0, len(keys) - size))
    rows = slice(offset or 0, (offset or 0) + size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "DIRECT", PATHS[path])
        check(keys[rows], key_labels[rows], backend="triton", keys=keys, key_labels=key_labels, key_offset=offset,
              intra=data.draw(st.sampled_from(HOWS)), inter=data.draw(st.sampled_from(HOWS)))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype, path):
    # Small integers of mean 0: equal distances are equal in floating point too, and there are many of them.
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-1, 2, (20, 3), generator=generator).to(dtype)
    features, labels = torch.cat([half, -half]), torch.randint(4, (40,), generator=generator)
    for how in ("similar", "dissimilar"):
        found = mine_pairs(features, labels, intra=how, inter=how, backend="triton")
        for field, expected in zip(found, mine_pairs(features.double(), labels, intra=how, inter=how), strict=True):
            assert torch.equal(field, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_zero(dtype, path):
    # For the ones, 2 and 0 are equally far; |k|² - 2qk is 0 for both, and times -1 it is -0 for one. The mean is 0.
    features = torch.tensor([2.0] + 20 * [1.0] + [0.0, -22.0], dtype=dtype)[:, None]
    pairs = mine_pairs(features, torch.tensor(22 * [0] + [1]), intra="dissimilar", backend="triton")
    assert pairs.partner[1:21].tolist() == 20 * [0]


def test_near_ties_of_float32(path):
    # Distances that differ by less than half precision could tell, around two centres far from the mean.
    generator = torch.Generator().manual_seed(0)
    centre, *directions = torch.nn.functional.normalize(torch.randn(41, 64, generator=generator).double())
    steps = torch.stack(directions) * (0.01 + 2.5e-5 * torch.randperm(40, generator=generator)[:, None]).sqrt()
    half = torch.cat([centre[None], centre + steps])
    labels = torch.tensor([0] + 40 * [1] + [2] + 40 * [3])
    check(torch.cat([half, -half]).float(), labels, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [1e4, 1e30])  # float16 has no 1e30: rows are not finite then
def test_queries_far_from_the_keys(distance, dtype, path):
    keys, key_labels = make_batch(seed=4, size=50, dim=20, classes=5, dtype=dtype, kind="normal")
    features, labels = make_batch(seed=5, size=20, dim=20, classes=5, dtype=dtype, kind="normal")
    check(features * distance, labels, keys=keys, key_labels=key_labels, inter="dissimilar", backend="triton")
    check(features + distance, labels, keys=keys + distance, key_labels=key_labels, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_exact(dtype, path):
    features, labels = make_batch(seed=6, size=60, dim=30, classes=6, dtype=torch.float64, kind="normal")
    # Far channels can be shifted, those near 0 need not be, and between the two a shift would round.
    mixed = (features * 0.25 + torch.tensor([0.0, 0.5, 1.0, 30.0, -300.0]).repeat(6)).to(dtype)
    # What could be shifted for the keys would round for the queries.
    queries, keys = (features * 0.1 + 1).to(dtype), (features.flip(0) * 0.1 + 3).to(dtype)
    for batch, others in ((mixed, {}), (queries, {"keys": keys, "key_labels": labels})):
        exact = {name: value.double() if name == "keys" else value for name, value in others.items()}
        found = mine_pairs(batch, labels, **others, backend="triton")
        for field, expected in zip(found, mine_pairs(batch.double(), labels, **exact), strict=True):
            assert torch.equal(field, expected)


def test_under_compile_and_export(path):
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


def test_operator_keeps_its_promises(path):
    features, labels = make_batch(seed=8, size=20, dim=8, classes=6, dtype=torch.float32, kind="normal")
    torch.library.opcheck(backend.find_partners, (features, labels, None, labels, 0, 1, -1))
    torch.library.opcheck(backend.find_partners, (features[:5], labels[:5], features, labels, None, 0, 1))
