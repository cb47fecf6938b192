"""`mine_pairs` and `random_pairs` against brute force.

Triton settles at import whether it interprets. In a process with TRITON_INTERPRET=1, which test_triton.py starts, the
tests of each backend are those of "triton" on a CPU, on fewer rows, as each takes 10 ms there.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mined import HOWS, brute_force, check
from reference import candidates
from stand_ins import Calling
from strategies import DENORMAL, DTYPES, KINDS, batches, make_batch
from torch.nn.functional import normalize

from apinet_head import mine_pairs, mining, random_pairs
from apinet_head.mining import BACKENDS, TILED_FROM, Query, Search, choose, plain, rows
from apinet_head.mining.draw import draw
from apinet_head.mining.query import finite_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZE, DIM = (40, 64) if INTERPRETED else (120, 256)
LABELS = torch.arange(SIZE) // 4


def unseen(mine, small=plain.SMALL):
    """A backend as it is where no value is looked at: on a GPU, compiled; `small`: up to where it is in float64."""
    never = mock.Mock(return_value=False)
    return mock.patch.object(plain, "SMALL", small)(mock.patch.object(plain, "is_eager_cpu", never)(mine))


if INTERPRETED:
    from apinet_head.mining import triton

    # Whatever the size, on tensor cores; small searches are done by subtraction alone.
    BACKENDS["triton, large"] = mock.patch.object(triton, "DIRECT", 0)(triton.mine)
else:
    # Tiles so small that the tests' batches have many, whole ones and parts.
    BACKENDS["tiled by 16"] = partial(plain.mine_tiled, tile=16)
    BACKENDS["dense, unseen"] = unseen(plain.mine_dense)
    BACKENDS["tiled by 16, unseen"] = unseen(partial(plain.mine_tiled, tile=16))
    BACKENDS["dense, unseen, large"] = unseen(plain.mine_dense, small=0)
    BACKENDS["tiled by 16, unseen, large"] = unseen(partial(plain.mine_tiled, tile=16), small=0)
each_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if ("triton" in name) == INTERPRETED])
of_triton = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
QUICK = ("normal", "non-finite", "outliers", "unlabelled")  # of the kinds of batch, in the interpreter


def slow_in_the_interpreter(*values):
    return pytest.param(*values, marks=pytest.mark.slow if INTERPRETED else ())


FLOATS = [*map(slow_in_the_interpreter, DTYPES[:2]), torch.float32]
ALL_FLOATS = FLOATS if INTERPRETED else DTYPES


@each_backend
@settings(max_examples=8 if INTERPRETED else 110, deadline=None)
@given(batch=batches(40, 70) if INTERPRETED else batches(), data=st.data())
def test_any_batch_by_itself_or_among_keys(backend, batch, data):
    features, labels = batch
    keys = {}
    if data.draw(st.booleans()):
        keys = {"keys": features, "key_labels": labels}
        size = data.draw(st.integers(1, len(features)))
        keys["key_offset"] = data.draw(st.none() | st.integers(0, len(features) - size))
        first = keys["key_offset"] or 0
        features, labels = features[first : first + size], labels[first : first + size]
    intra, inter = (data.draw(st.sampled_from(HOWS)) for _ in range(2))
    check(features, labels, intra=intra, inter=inter, backend=backend, **keys)


# The interpreter converts denormal numbers of bfloat16 to others.
@each_backend
@pytest.mark.parametrize("dtype", [FLOATS[0], FLOATS[2]] if INTERPRETED else DTYPES)
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else slow_in_the_interpreter(kind) for kind in (*KINDS, DENORMAL)]
)
def test_adversarial(kind, dtype, backend):
    size, dim, classes = (24, 33, 6) if INTERPRETED else (120, 64, 30)
    features, labels = make_batch(seed=1, size=size, dim=dim, classes=classes, dtype=dtype, kind=kind)
    if kind == "unlabelled":
        labels[::7] = -100  # any negative label means that there is no class
    check(features, labels, backend=backend)
    check(features, labels, intra="dissimilar", inter="dissimilar", backend=backend)


def make_features(*size, seed=0, **how):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), **how)


@each_backend
@pytest.mark.parametrize("factor", [6e4, slow_in_the_interpreter(1e30)])
@pytest.mark.parametrize("far", [[5], range(0, SIZE, 10), slow_in_the_interpreter(range(SIZE // 10))])
@pytest.mark.parametrize("offset", [slow_in_the_interpreter(0), 1000])
@pytest.mark.parametrize("keys", ["the batch", "one far away", "many without a class"])
def test_rows_far_away_change_nobody_elses_partner(backend, factor, far, offset, keys):
    features = make_features(SIZE, DIM) + offset
    others = torch.tensor([row not in far for row in range(SIZE)])
    features[list(far)] *= factor
    # A memory that is not full yet has rows of zeros, without a class.
    more = {"the batch": features[:0], "one far away": features[7:8] * factor}.get(keys, torch.zeros(200, DIM))
    more_labels = torch.full((len(more),), 1 if keys == "one far away" else -1)
    table = {"keys": torch.cat([features, more]), "key_labels": torch.cat([LABELS, more_labels]), "key_offset": 0}
    found = mine_pairs(features, LABELS, **({} if keys == "the batch" else table), backend=backend)
    assert torch.equal(found.partner.view(2, -1)[:, others], brute_force(features, LABELS)[:, others])


@each_backend
@pytest.mark.parametrize("factor", [1e3, slow_in_the_interpreter(1e20)])
def test_rows_far_away_find_each_other(backend, factor):
    # They are so far from the others that these have no direction for them.
    features, labels, far = make_features(SIZE, DIM), LABELS.clone(), torch.arange(0, 40, 7)
    labels[far] = SIZE + torch.arange(6) // 3
    features[far] *= factor * torch.arange(1, 7)[:, None]
    for keys in ({}, {"keys": features, "key_labels": labels, "key_offset": 0}):
        pairs = mine_pairs(features, labels, **keys, backend=backend)
        assert torch.equal(pairs.partner[:SIZE], brute_force(features, labels)[0])


@each_backend
@pytest.mark.parametrize("cosine", [slow_in_the_interpreter(0.999), slow_in_the_interpreter(0.99999), 0.999999])
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [SIZE // 4] if INTERPRETED else [2, SIZE // 4])
def test_near_neighbours_are_told_apart(backend, cosine, dtype, classes):
    if classes == 2 and "large" in backend:
        pytest.skip("of many near candidates, only the 8 best are compared again")
    labels = (torch.arange(SIZE) % classes)[torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))]
    centres = normalize(make_features(classes, 512, dtype=dtype))[labels]
    features = normalize(centres + normalize(make_features(SIZE, 512, seed=1, dtype=dtype)) * (1 - cosine) ** 0.5)
    assert torch.equal(mine_pairs(features, labels, backend=backend).partner.view(2, -1), brute_force(features, labels))


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("kind", ["normal", "clusters", "outlier", "non-finite", "unlabelled"])
def test_a_large_batch_on_any_default_device(backend, kind):
    batch = make_batch(seed=0, size=600, dim=64, classes=150, dtype=torch.float32, kind=kind)
    expected = check(*batch, backend=backend)
    with torch.device("meta"):
        assert torch.equal(mine_pairs(*batch, backend=backend).partner, expected.partner)


@each_backend
@pytest.mark.parametrize("dtype", ALL_FLOATS)
def test_ties_go_to_the_lowest_index(backend, dtype):
    # Small integers of mean 0: equal distances are equal in floating point too, and there are many of them.
    half = torch.randint(-1, 2, (SIZE // 2, 3), generator=torch.Generator().manual_seed(0)).double()
    features = torch.cat([half, -half])
    labels = torch.randint(4, (SIZE,), generator=torch.Generator().manual_seed(1))
    same, itself = labels[:, None] == labels, torch.eye(SIZE).bool()
    for how, sign in (("similar", 1), ("dissimilar", -1)):
        pairs = mine_pairs(features.to(dtype), labels, intra=how, inter=how, backend=backend)
        distance = sign * torch.cdist(features, features).square().round()
        for allowed, partner in zip((same & ~itself, ~same), pairs.partner.view(2, -1), strict=True):
            assert partner.tolist() == distance.masked_fill(~allowed, torch.inf).argmin(1).tolist()


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero_is_zero(backend, dtype):
    # For the ones, 2 and 0 are equally far; |k|² - 2qk is 0 for both, and times -1 it is -0 for one. The centre is 0,
    # and the two meet in one slot, from two tiles.
    features = torch.tensor([2.0] + 15 * [1.0] + 46 * [0.0], dtype=dtype)[:, None]
    pairs = mine_pairs(features, torch.tensor(17 * [0] + 45 * [1]), intra="dissimilar", backend=backend)
    assert pairs.partner[1:16].tolist() == 15 * [0]


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("distance", [1e4, slow_in_the_interpreter(1e30)])  # float16 has no 1e30: not finite then
def test_queries_far_from_the_keys(backend, distance, dtype):
    keys, key_labels = make_batch(seed=4, size=50, dim=20, classes=5, dtype=dtype, kind="normal")
    features, labels = make_batch(seed=5, size=20, dim=20, classes=5, dtype=dtype, kind="normal")
    check(features * distance, labels, keys=keys, key_labels=key_labels, inter="dissimilar", backend=backend)
    check(features + distance, labels, keys=keys + distance, key_labels=key_labels, backend=backend)


@contextmanager
def of_precision(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.mkldnn.enabled
    finally:
        torch.set_float32_matmul_precision("highest")


REDUCED = [partial(torch.autocast, "cpu", dtype=torch.bfloat16), partial(of_precision, "high")]


@each_backend
@pytest.mark.parametrize("reduced", [*REDUCED, slow_in_the_interpreter(partial(of_precision, "medium"))])
def test_reduced_precision_does_not_reach_the_distances(reduced, backend):
    features, labels = make_batch(seed=5, size=SIZE, dim=300, classes=10, dtype=torch.float32, kind="clusters")
    with reduced():
        found = mine_pairs(features, labels, backend=backend)
    assert torch.equal(found.partner, mine_pairs(features, labels).partner)


@of_triton
def test_triton_under_compile_and_export(monkeypatch):
    monkeypatch.setattr(triton, "DIRECT", 0)
    features, labels = make_batch(seed=7, size=40, dim=8, classes=6, dtype=torch.float32, kind="normal")
    expected = mine_pairs(features, labels)
    mine = partial(mine_pairs, backend="triton")
    assert all(map(torch.equal, torch.compile(mine, fullgraph=True, backend="aot_eager")(features, labels), expected))

    net, batch = Calling(lambda *rows: tuple(mine(*rows))), {0: torch.export.Dim("batch", min=2, max=4096)}
    program = torch.export.export(net, (features[:9], labels[:9]), dynamic_shapes={"inputs": (batch, batch)})
    assert all(map(torch.equal, program.module()(features, labels), expected))


@of_triton
def test_operator_of_triton_keeps_its_promises():
    features, labels = make_batch(seed=8, size=20, dim=8, classes=6, dtype=torch.float32, kind="normal")
    torch.library.opcheck(triton.find_partners, (features, labels, None, labels, 0, 1, -1))
    torch.library.opcheck(triton.find_partners, (features[:5], labels[:5], features, labels, None, 0, 1))


def rounded_to_tf32(rows):
    """As tensor cores read float32: 10 bits after the leading one, to nearest."""
    return ((rows.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("cosine", [0.9, 0.99, 0.999])
def test_products_in_parts_are_exact_enough_for_tf32(cosine):
    noise = make_features(120, 512, seed=1) / 512**0.5
    x = normalize(normalize(make_features(1, 512)) + (1 / cosine - 1) ** 0.5 * noise)
    exact, matmul = x.double().mm(x.double().T), torch.Tensor.__matmul__
    with mock.patch.object(torch.Tensor, "__matmul__", lambda a, b: matmul(rounded_to_tf32(a), rounded_to_tf32(b))):
        in_parts, rounded = rows.multiply_in_parts(x, x), x @ x.T
    error, plain_error, float32_error = ((found - exact).abs().max() for found in (in_parts, rounded, x @ x.T))
    assert error < 2 * float32_error < plain_error / 20


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs the settings of PyTorch 2.9")
def test_the_newer_settings_of_precision_do_no_harm():
    # With these set, asking for torch.get_float32_matmul_precision() raises.
    code = """
import torch
from apinet_head import mine_pairs
from apinet_head.mining import rows
x, y = torch.randn(40, 16), torch.arange(40) // 4
for where in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
    before, where.fp32_precision = where.fp32_precision, "tf32"
    assert all(mine_pairs(x, y, backend=backend).valid.all() for backend in ("dense", "tiled"))
    print(rows._may_round_to_tf32())
    where.fp32_precision = before
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["True", "True", "False"], found.stderr


def test_products_are_split_where_tf32_is_allowed():
    keys = torch.randn(8, 4)
    fake = mock.Mock(dtype=torch.float32, device=torch.device("cuda"))
    assert not rows._may_round_to_tf32()
    with mock.patch.object(rows, "multiply_in_parts", return_value=torch.zeros(8, 8)) as parts, of_precision("high"):
        rows.subtract_products(torch.zeros(8), fake, keys)
    parts.assert_called_once_with(fake, keys)


def test_auto_takes_tiles_for_large_batches_and_never_for_a_graph():
    def chosen(queries, keys):
        features, key_features = (torch.empty(size, 4, device="meta") for size in (queries, keys))
        labels, key_labels = (rows[:, 0].long() for rows in (features, key_features))
        return choose(Query(features, labels, key_features, key_labels, None, (Search("similar", True),)))

    with mock.patch.dict(TILED_FROM, {"meta": TILED_FROM["cpu"]}):
        assert [chosen(size, size) for size in (120, 8192)] == ["dense", "tiled"]
        assert chosen(120, 65536) == "tiled"
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            assert chosen(65536, 65536) == "dense"
    assert [chosen(size, size) for size in (120, 65536)] == ["dense", "tiled"]


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "suits"),
    [((9, 0), None, torch.float32, True), ((8, 0), None, torch.float32, False), ((9, 0), "6.2", torch.float32, False),
     ((9, 0), None, torch.float64, False)],
)  # fmt: skip
def test_auto_takes_triton_on_the_gpus_where_it_was_measured(monkeypatch, capability, hip, dtype, suits):
    properties = mock.Mock(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(mining, "triton_works", lambda: True)
    monkeypatch.setattr(mining, "HAS_TRITON", True)
    assert mining._suits_triton(mock.Mock(dtype=dtype, is_cuda=True)) == suits


def test_a_triton_that_cannot_launch_is_left_out_with_a_warning(monkeypatch):
    runtime = pytest.importorskip("triton").runtime
    mining.triton_works.cache_clear()

    class NoCompiler:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(runtime, "driver", NoCompiler())
    with pytest.warns(UserWarning, match="mined in plain PyTorch, which takes longer: Failed to find C compiler"):
        assert not mining.triton_works()
    mining.triton_works.cache_clear()


def test_random_pairs_cover_all_ordered_pairs():
    pairs = random_pairs(torch.arange(4), 12 * 400, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(pairs.anchor * 4 + pairs.partner, minlength=16).view(4, 4)
    assert counts.diagonal().sum() == 0
    assert (counts[~torch.eye(4, dtype=torch.bool)] - 400).abs().max() < 100


# Arguments of another shape, dtype, device or value are in test_fuzz.py.
X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mine_pairs(torch.zeros(4, 3, 2, 2), Y), r"float32 \[4, 3, 2, 2\].*pool it first"),
        (lambda: mine_pairs(torch.zeros(2, 4, 3), Y), r"\[2, 4, 3\].*pool it first.*batch_sampler=, not sampler="),
        (lambda: mine_pairs(X, Y[:, None]), r"\[B\].*\[4, 1\].*squeeze"),
        (lambda: mine_pairs(X, Y, intra=None, inter=None), r"both None"),
        (lambda: mine_pairs(X, Y, backend="faiss"), r"'auto', 'dense'.*got 'faiss'"),
        (lambda: mine_pairs(X, Y, backend="triton"), r"needs (features on a CUDA device.*on cpu|Triton).*'auto'"),
        (lambda: mine_pairs(X, Y, key_labels=Y), "only key_labels"),
        (lambda: mine_pairs(X, Y, keys=X), "only keys"),
        (lambda: mine_pairs(X, Y, keys=X[:0], key_labels=Y[:0]), r"at least one row"),
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
        query = Query(keys[:20], labels, keys, key_labels, offset, (Search("random", same_class),))
        partner, valid = draw(query, finite_rows(keys), same_class, generator)
        counts[torch.arange(20)[valid], partner[valid]] += 1
    finite = keys.isfinite().all(1).numpy()
    allowed = torch.from_numpy(candidates(labels.numpy(), key_labels.numpy(), finite, same_class, offset))
    expected = 2000 / allowed.sum(1, keepdim=True)
    assert torch.equal(valid, allowed.any(1))
    assert counts[~allowed].sum() == 0
    assert ((counts - expected).abs()[allowed] <= (5 * expected.sqrt()).expand_as(counts)[allowed]).all()
