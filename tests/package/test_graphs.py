"""torch.compile, torch.export, fake tensors, CUDA graphs: the package under everything that traces or rewrites it."""

import copy
from functools import partial

import heads
import pytest
import torch
from mined import HOWS, check_pairs
from releases import with_fake_cuda
from stand_ins import Calling
from torch._subclasses.fake_tensor import FakeTensorMode
from watching import no_waiting, no_warnings

from apinet_head import APIHead, api_loss, mine_pairs

SLOW = pytest.mark.slow
# "aot_eager" checks that all can be traced in one graph, backward too; "inductor" that the generated code is right.
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])


make_case = partial(heads.make_case, dim=32, classes=6, dtype=torch.float32)


@BACKENDS
# A memory of more images than the first batch, of fewer than the others.
@pytest.mark.parametrize(
    ("memory", "dynamic"),
    [(0, None), (28, True), pytest.param(0, True, marks=SLOW), pytest.param(28, None, marks=SLOW)],
)
def test_compiled_head_and_loss_equal_eager(memory, dynamic, backend):
    (head, *_), (eager, *_) = make_case(memory=memory), make_case(memory=memory)
    # dynamic=True makes symbols of the loss's numbers, too.
    compiled = torch.compile(lambda x, y: api_loss(head(x, y)), fullgraph=True, dynamic=dynamic, backend=backend)
    for size in (24, 31, 32):
        _, features, labels = make_case(size, seed=size)
        found, expected = compiled(features, labels), api_loss(eager(features, labels))
        torch.testing.assert_close(found, expected)
        gradients = map(torch.autograd.grad, (found, expected), ([*net.parameters()] for net in (head, eager)))
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close([*head.buffers()], [*eager.buffers()], equal_nan=True)


@BACKENDS
@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=SLOW)])
@pytest.mark.parametrize("how", HOWS)
def test_compiled_mining_equals_eager_for_any_batch_size(how, dynamic, backend):
    # "random" failed in torch.rand(..., generator=None) where the size is symbolic.
    compiled = torch.compile(mine_pairs, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in (24, 31, 48):
        _, features, labels = make_case(size, seed=size)
        for keys in ({}, {"keys": features, "key_labels": labels, "key_offset": 0}):
            pairs = compiled(features, labels, intra=how, inter=how, **keys)
            check_pairs(pairs, features, labels, intra=how, inter=how)
            if how != "random":
                assert all(map(torch.equal, pairs, mine_pairs(features, labels, intra=how, inter=how)))


def test_exported_mining_takes_any_batch_size():
    (_, *batch), (_, *larger) = make_case(24), make_case(41)
    net, size = Calling(lambda *rows: tuple(mine_pairs(*rows))), {0: torch.export.Dim("batch", min=2, max=4096)}
    program = torch.export.export(net, (*batch,), dynamic_shapes={"inputs": (size, size)})
    torch.testing.assert_close([*program.module()(*larger)], [*mine_pairs(*larger)], rtol=0, atol=0)


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
def test_only_the_first_batch_waits_for_the_device_and_graphs_can_be_captured():
    labels = torch.arange(24).cuda()  # each of a class of its own
    (head, features, _), (fresh, *_) = ((value.cuda() for value in make_case(24, classes=24)) for _ in range(2))
    expected = mine_pairs(features, labels)
    with pytest.warns(UserWarning, match="24 of the 48 pairs"):
        head(features, labels)
    with no_waiting():
        api_loss(head(features.detach(), labels)).backward()
    graph = torch.cuda.CUDAGraph()
    with no_warnings(), torch.cuda.graph(graph):
        captured = fresh(features, labels).pairs
    graph.replay()
    assert torch.equal(captured.partner, expected.partner)


@pytest.mark.gpu
def test_a_head_with_a_memory_does_not_wait_for_the_device_and_can_be_captured():
    head, features, labels = APIHead(6, 5, memory=16), torch.randn(6, 6), torch.tensor([0, 0, 1, 1, 2, 3])
    expected = copy.deepcopy(head.memory)
    for _ in range(6):
        expected.push(features, labels)
    head, features, labels = head.cuda(), features.cuda(), labels.cuda()
    with no_waiting():
        api_loss(head(features, labels))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        api_loss(head(features, labels))
    for _ in range(5):  # each replay pushes where the last one ended, beyond the end of the ring too
        graph.replay()
    torch.testing.assert_close([*head.memory.cpu().buffers()], [*expected.buffers()], rtol=0, atol=0, equal_nan=True)
