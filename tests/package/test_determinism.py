"""The same input gives the same output, bit for bit, and under PyTorch's deterministic algorithms too."""

import pytest
import torch
from mined import HOWS
from strategies import make_batch
from torch import nn

from apinet_head import APIHead, APINet, api_loss, explain_pair, mine_pairs, random_pairs
from apinet_head.chunked import run_in_chunks
from apinet_head.mutual import MUTUALS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZE, DIM, CLASSES = 40, 24, 8


def features_and_labels(device, size=SIZE, kind="normal"):
    features, _ = make_batch(0, size, DIM, CLASSES, torch.float32, kind)
    return features.to(device), (torch.arange(size) % CLASSES).to(device)


def mined(device, backend, how):
    generator = torch.Generator(device).manual_seed(0)
    features, labels = features_and_labels(device)
    keys = {"keys": torch.cat([features, features.flip(0)]), "key_labels": torch.cat([labels, labels.flip(0)])}
    arguments = {"intra": how, "inter": how, "generator": generator, "backend": backend}
    pairs = mine_pairs(features, labels, **arguments), mine_pairs(features, labels, **keys, key_offset=0, **arguments)
    return [*pairs[0], *pairs[1]]


def steps_of_head(device, mutual):
    """Two with dropout and a memory, the batch of the second larger than it, and their gradients."""
    features, labels = features_and_labels(device)
    head = APIHead(DIM, CLASSES, hidden_dim=8, mutual=mutual, memory=30, device=device)
    output = head(features[:8], labels[:8]), head(features.requires_grad_(), labels)
    losses = [api_loss(one, label_smoothing=0.1) for one in output]
    sum(losses).backward()
    gradients = [parameter.grad for parameter in (features, *head.parameters())]
    pairs = random_pairs(labels, 50, generator=torch.Generator(device).manual_seed(0))
    return [*losses, *output[1][:4], *gradients, *head.memory.buffers(), *pairs, *head.gates(features, pairs)]


def step_in_chunks(device):
    backbone = nn.Sequential(nn.Conv2d(3, DIM, 3), nn.BatchNorm2d(DIM), nn.ReLU(), nn.Dropout(0.3)).to(device)
    features = run_in_chunks(backbone, torch.randn(8, 3, 9, 9, device=device), 3)
    features.square().sum().backward()
    return [features, *(parameter.grad for parameter in backbone.parameters()), *backbone.buffers()]


def explained(device):
    net = APINet("test_resnet", CLASSES, hidden_dim=8).to(device)
    return explain_pair(net, torch.randn(2, 3, 48, 48, device=device))


CASES = {
    **{f"{backend}, {how}": (mined, backend, how) for backend in ("dense", "tiled", "triton") for how in HOWS},
    **{f"head, {mutual}": (steps_of_head, mutual) for mutual in MUTUALS},
    "chunks": (step_in_chunks,),
    "explained": (explained,),
}


def assert_equal(found, expected):
    torch.testing.assert_close([*found], [*expected], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_deterministic_algorithms_do_all_of_it(case, device, deterministic):
    if case.startswith("triton") and device == "cpu":
        pytest.skip("Triton's kernels are for a GPU")
    function, *arguments = CASES[case]
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(function(device, *arguments))
    assert_equal(*found)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["offset", "ties"])
def test_pairs_are_the_same_on_any_number_of_threads(kind, how, backend):
    # Enough for PyTorch to share out the work, and for several tiles.
    features, labels = features_and_labels("cpu", size=1100, kind=kind)
    before, found = torch.get_num_threads(), []
    for count in (1, 4):
        torch.set_num_threads(count)
        generator = torch.Generator().manual_seed(0)
        found.append(mine_pairs(features, labels, intra=how, inter=how, backend=backend, generator=generator))
    torch.set_num_threads(before)
    assert_equal(*found)
