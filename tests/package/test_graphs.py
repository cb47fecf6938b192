"""torch.compile, torch.export, fake tensors, CUDA graphs: the package under everything that traces or rewrites it."""

import pytest
import torch
from mined import HOWS, check_pairs
from releases import with_fake_cuda
from strategies import make_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from watching import no_waiting

from apinet_head import APIHead, api_loss, mine_pairs

DYNAMIC = pytest.mark.parametrize("dynamic", [True, None])
# "aot_eager" checks that all can be traced in one graph, backward too; "inductor" that the generated code is right.
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


def make_case(size=24, dim=32, classes=6):
    features, _ = make_batch(0, size, dim, classes, torch.float32, "normal")
    torch.manual_seed(0)
    return APIHead(dim, classes, hidden_dim=16, dropout=0.0), features, torch.arange(size) % classes


@BACKENDS
@DYNAMIC
def test_compiled_head_and_loss_equal_eager(dynamic, backend):
    head, _, _ = make_case()

    def loss(features, labels):
        return api_loss(head(features, labels), label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in (24, 31):
        _, *batch = make_case(size)
        found, expected = compiled(*batch), loss(*batch)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(one, head.parameters()) for one in (found, expected)))


@BACKENDS
@DYNAMIC
@pytest.mark.parametrize("how", HOWS)
def test_compiled_mining_equals_eager_for_any_batch_size(how, dynamic, backend):
    # "random" failed in torch.rand(..., generator=None) where the size is symbolic.
    compiled = torch.compile(mine_pairs, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in (24, 31, 48):
        _, features, labels = make_case(size)
        for keys in ({}, {"keys": features, "key_labels": labels, "key_offset": 0}):
            pairs = compiled(features, labels, intra=how, inter=how, **keys)
            check_pairs(pairs, features, labels, intra=how, inter=how)
            if how != "random":
                assert all(map(torch.equal, pairs, mine_pairs(features, labels, intra=how, inter=how)))


class Mining(torch.nn.Module):
    def forward(self, features, labels):
        return tuple(mine_pairs(features, labels))


def test_exported_mining_takes_any_batch_size():
    _, *batch = make_case()
    shapes = {"features": {0: torch.export.Dim("batch", min=2, max=4096)}}
    program = torch.export.export(Mining(), (*batch,), dynamic_shapes=shapes | {"labels": shapes["features"]})
    _, *batch = make_case(41)
    torch.testing.assert_close([*program.module()(*batch)], mine_pairs(*batch), rtol=0, atol=0)


@with_fake_cuda
@pytest.mark.parametrize("memory", [0, 16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_need_no_data(device, memory):
    # A fake tensor has no values: any .item(), .cpu(), nonzero() or branch on data would raise here.
    with FakeTensorMode(), torch.device(device):
        features, labels = torch.randn(24, 32, requires_grad=True), torch.randint(6, (24,))
        output = APIHead(32, 6, memory=memory)(features, labels)
        assert output.logits_self.shape == (96, 6)
        loss = api_loss(output)
        if device == "cpu" or torch.cuda.is_available():  # torch's backward thread asks for the device itself
            loss.backward()
            assert features.grad.shape == (24, 32)
        APIHead(32, 6)(features, labels, keys=torch.randn(50, 32), key_labels=torch.randint(6, (50,)))


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture_on_cuda():
    head, features, labels = (value.cuda() for value in make_case())
    expected = mine_pairs(features, labels)
    head(features, labels)  # of its first batch a head looks whether the pairs are valid
    with no_waiting():
        api_loss(head(features, labels)).backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mine_pairs(features, labels)
    graph.replay()
    assert torch.equal(captured.partner, expected.partner)
