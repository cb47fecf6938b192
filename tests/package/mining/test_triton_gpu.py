"""Backend "triton" of `mine_pairs` on a CUDA device."""

from functools import partial
from unittest import mock

import pytest
import torch
from mined import check_pairs
from strategies import KINDS, make_batch
from watching import no_waiting

from apinet_head import Pairs, mine_pairs
from apinet_head.mining import BACKENDS

pytest.importorskip("triton")

from apinet_head.mining import triton as backend

# Whatever the size, on tensor cores; small searches are done by subtraction alone.
KERNELS = "triton, large"
BACKENDS[KERNELS] = mock.patch.object(backend, "DIRECT", 0)(backend.mine)
EITHER = pytest.mark.parametrize("kernels", ["triton", KERNELS])

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # float64 is plain PyTorch's


def check_on_gpu(features, labels, kernels, how):
    """Compare with float64, where rounding of products about the middle of the rows may let another partner win."""
    exact = features.double()
    found = mine_pairs(features, labels, intra=how, inter=how, backend=kernels)
    expected = mine_pairs(exact, labels, intra=how, inter=how, backend="tiled")
    assert torch.equal(found.valid, expected.valid)
    finite = exact.isfinite().all(1)
    centred = exact - exact[finite].median(0).values
    norms = centred.square().sum(1)
    spread = norms[finite].quantile(0.8)
    anchor, partner, same_class, _ = (field[found.valid & finite[found.anchor]] for field in found)
    best = expected.partner[found.valid & finite[found.anchor]]
    assert torch.equal(labels[anchor] == labels[partner], same_class)
    assert (anchor != partner).all()
    assert finite[partner].all()
    distance, least = ((centred[anchor] - centred[other]).square().sum(1) for other in (partner, best))
    allowed = 16 * torch.finfo(torch.float32).eps * (least + spread + norms[anchor])
    assert ((distance - least).abs() <= allowed).all()


@EITHER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_on_cuda(kind, dtype, kernels):
    for size, dim in ((1, 1), (2, 3), (120, 64), (513, 2048), (2000, 333), (4099, 2048)):
        features, labels = make_batch(seed=size, size=size, dim=dim, classes=size // 4 + 1, dtype=dtype, kind=kind)
        if kind == "huge":
            features = features / dim**0.5  # their squares must be float64
        if features.isfinite().all(1).any():
            for how in ("similar", "dissimilar"):
                check_on_gpu(features.cuda(), labels.cuda(), kernels, how)


@EITHER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [None, 100])
def test_keys_elsewhere_on_cuda(offset, dtype, kernels):
    keys, key_labels = make_batch(seed=1, size=1000, dim=100, classes=50, dtype=dtype, kind="offset")
    features, labels = keys[100:230], key_labels[100:230]
    among = {"key_offset": offset, "intra": "similar", "inter": "dissimilar"}
    on_gpu = {"keys": keys.cuda(), "key_labels": key_labels.cuda(), **among}
    found = mine_pairs(features.cuda(), labels.cuda(), **on_gpu, backend=kernels)
    pairs = Pairs(*(field.cpu() for field in found))
    check_pairs(pairs, features, labels, keys=keys, key_labels=key_labels, **among, exact=False)


@pytest.mark.parametrize("cosine", [0.999, 0.99999, 0.999999])
@pytest.mark.parametrize("far", [1, 1e10])
def test_near_neighbours_are_told_apart_on_cuda(far, cosine):
    generator, labels = torch.Generator().manual_seed(0), torch.arange(2000) // 4
    centres = torch.nn.functional.normalize(torch.randn(500, 512, generator=generator))[labels]
    noise = torch.nn.functional.normalize(torch.randn(2000, 512, generator=generator))
    features = torch.nn.functional.normalize(centres + noise * (1 - cosine) ** 0.5)
    features[::10] *= far
    found = mine_pairs(features.cuda(), labels.cuda(), backend=KERNELS).partner.cpu()
    others = torch.arange(4000) % 10 > 0
    assert torch.equal(found[others], mine_pairs(features.double(), labels).partner[others])


def make_on_gpu():
    batch = make_batch(seed=2, size=3000, dim=512, classes=750, dtype=torch.float32, kind="duplicates")
    return [rows.cuda() for rows in batch]


def test_the_same_every_time_and_compiled_on_cuda():
    batch, mine = make_on_gpu(), partial(mine_pairs, backend="triton")
    first = mine(*batch)
    for again in (*4 * [mine], torch.compile(mine, fullgraph=True)):
        assert all(map(torch.equal, again(*batch), first))


def test_no_synchronisation_and_graph_capture_on_cuda():
    features, labels = make_on_gpu()
    expected = mine_pairs(features, labels, backend="triton")
    with no_waiting():
        mine_pairs(features, labels, backend="triton")
        mine_pairs(features, labels, intra="random", inter="random", backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mine_pairs(features, labels, backend="triton")
    features.copy_(features.flip(0))
    labels.copy_(labels.flip(0))
    graph.replay()
    assert all(map(torch.equal, captured, mine_pairs(features, labels, backend="triton")))
    assert not torch.equal(captured.partner, expected.partner)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_on_cuda(dtype):
    features = torch.randn(65536, 2048, device="cuda", dtype=dtype)
    labels = torch.arange(65536, device="cuda") // 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mine_pairs(features, labels, backend="triton")
    # A copy as large as in float32, and the rows that are compared again at a time.
    assert torch.cuda.max_memory_allocated() - before <= 4 * features.numel() + 2**28


def test_more_numbers_than_int32_on_cuda():
    size, dim = 131072, 16512
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    features = torch.randn(size // 2, dim, device="cuda", dtype=torch.bfloat16).repeat(2, 1)
    pairs = mine_pairs(features, torch.arange(size, device="cuda"), intra=None, backend="triton")
    assert torch.equal(pairs.partner, (pairs.anchor + size // 2) % size)
