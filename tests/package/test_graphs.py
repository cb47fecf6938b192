"""torch.compile, torch.export, fake tensors, autocast: the package under everything that traces or rewrites it."""

import pytest
import torch
from releases import with_fake_cuda
from strategies import make_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from apinet_head import APIHead, api_loss, mine_pairs

# "aot_eager" checks that all can be traced in one graph, backward too; "inductor" that the generated code is right.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def make_case(size=24, dim=32, classes=6):
    features, _ = make_batch(0, size, dim, classes, torch.float32, "normal")
    torch.manual_seed(0)
    return APIHead(dim, classes, hidden_dim=16, dropout=0.0), features, torch.arange(size) % classes


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["similar", "dissimilar"])
def test_compiled_mining_equals_eager(backend, how):
    _, features, labels = make_case()
    compiled = torch.compile(mine_pairs, fullgraph=True, backend=backend)
    for arguments in ({}, {"keys": features, "key_labels": labels, "key_offset": 0}):
        found = compiled(features, labels, intra=how, inter=how, **arguments)
        torch.testing.assert_close([*found], mine_pairs(features, labels, intra=how, inter=how), rtol=0, atol=0)


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
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_need_no_data(device):
    # A fake tensor has no values: any .item(), .cpu(), nonzero() or branch on data would raise here.
    with FakeTensorMode():
        head = APIHead(32, 6, device=device)
        features = torch.randn(24, 32, device=device, requires_grad=True)
        labels = torch.randint(6, (24,), device=device)
        output = head(features, labels)
        assert output.logits_self.shape == (96, 6)
        loss = api_loss(output)
        if device == "cpu" or torch.cuda.is_available():  # torch's backward thread asks for the device itself
            loss.backward()
            assert features.grad.shape == (24, 32)
        keys = torch.randn(50, 32, device=device)
        head(features, labels, keys=keys, key_labels=torch.randint(6, (50,), device=device))


def test_meta_tensors_give_a_meta_loss():
    head = APIHead(32, 6, device="meta")
    output = head(torch.randn(24, 32, device="meta"), torch.zeros(24, dtype=torch.long, device="meta"))
    assert api_loss(output).device.type == "meta"


def test_loss_under_autocast_is_float32_and_near():
    head, features, labels = make_case()
    expected = api_loss(head(features, labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(features, labels)
        loss = api_loss(output)
        head(features.bfloat16(), labels)  # as a backbone under autocast gives them
    assert output.logits_self.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in head.parameters())


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture_on_cuda():
    head, features, labels = (value.cuda() for value in make_case())
    expected = mine_pairs(features, labels)
    head(features, labels)  # of its first batch a head looks whether the pairs are valid
    torch.cuda.set_sync_debug_mode("error")
    try:
        api_loss(head(features, labels)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mine_pairs(features, labels)
    graph.replay()
    assert torch.equal(captured.partner, expected.partner)


@pytest.mark.parametrize("how", ["random", "similar"])
def test_compiled_mining_takes_a_second_batch_size(how):
    # "random" failed in torch.rand(..., generator=None) where the size is symbolic.
    for dynamic in (True, None):
        torch._dynamo.reset()
        compiled = torch.compile(mine_pairs, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for size in (24, 31, 48):
            _, features, labels = make_case(size)
            pairs = compiled(features, labels, intra=how, inter=how)
            assert torch.equal(labels[pairs.anchor] == labels[pairs.partner], pairs.same_class)
            assert (pairs.anchor != pairs.partner).all()
            assert how == "random" or torch.equal(pairs.partner, mine_pairs(features, labels).partner)


def test_compiled_and_eager_mining_agree_where_a_row_is_far_away():
    features, labels = torch.randn(120, 256, generator=torch.Generator().manual_seed(0)), torch.arange(120) // 4
    features[5] *= 1e10
    compiled = torch.compile(mine_pairs, fullgraph=True, backend="aot_eager")
    for arguments in ({}, {"keys": features, "key_labels": labels, "key_offset": 0}):
        found, expected = compiled(features, labels, **arguments).partner, mine_pairs(features, labels).partner
        near = torch.arange(240) % 120 != 5  # to the row itself, all others are equally far, but for rounding
        assert torch.equal(found[near], expected[near])
