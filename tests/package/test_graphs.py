"""torch.compile, torch.export, fake tensors, CUDA graphs: the package under everything that traces or rewrites it."""

import pytest
import torch
from mined import check_pairs
from releases import with_fake_cuda
from strategies import make_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from watching import no_waiting

from apinet_head import APIHead, api_loss, mine_pairs

# "aot_eager" checks that all can be traced in one graph, backward too; "inductor" that the generated code is right.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def make_case(size=24, dim=32, classes=6):
    features, _ = make_batch(0, size, dim, classes, torch.float32, "normal")
    torch.manual_seed(0)
    return APIHead(dim, classes, hidden_dim=16, dropout=0.0), features, torch.arange(size) % classes


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_head_and_loss_equal_eager(backend):
    head, features, labels = make_case()

    def loss(features, labels):
        return api_loss(head(features, labels), label_smoothing=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    found, expected = compiled(features, labels), loss(features, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, head.parameters()), torch.autograd.grad(expected, head.parameters())
    )


class Mining(torch.nn.Module):
    def forward(self, features, labels):
        return tuple(mine_pairs(features, labels))


def test_exported_mining_takes_any_batch_size():
    _, features, labels = make_case()
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(
        Mining(), (features, labels), dynamic_shapes={"features": {0: batch}, "labels": {0: batch}}
    )
    _, features, labels = make_case(41)
    torch.testing.assert_close([*program.module()(features, labels)], mine_pairs(features, labels), rtol=0, atol=0)


@with_fake_cuda
@pytest.mark.parametrize("memory", [0, 16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_need_no_data(device, memory):
    # A fake tensor has no values: any .item(), .cpu(), nonzero() or branch on data would raise here.
    with FakeTensorMode():
        head = APIHead(32, 6, memory=memory, device=device)
        features = torch.randn(24, 32, device=device, requires_grad=True)
        labels = torch.randint(6, (24,), device=device)
        output = head(features, labels)
        assert output.logits_self.shape == (96, 6)
        loss = api_loss(output)
        if device == "cpu" or torch.cuda.is_available():  # torch's backward thread asks for the device itself
            loss.backward()
            assert features.grad.shape == (24, 32)
        keys, key_labels = torch.randn(50, 32, device=device), torch.randint(6, (50,), device=device)
        APIHead(32, 6, device=device)(features, labels, keys=keys, key_labels=key_labels)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("how", ["random", "similar", "dissimilar"])
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
