"""`FeatureMemory` in a training step under all that traces, captures or watches it."""

import pytest
import torch
from strategies import make_batch
from test_feature_memory import DIM, Past, gradients, make_step, with_memory
from torch._subclasses.fake_tensor import FakeTensorMode

from apinet_head import APIHead, FeatureMemory, api_loss


def step(head, memory, features, labels):
    """What a training loop does with a batch."""
    loss = api_loss(head(features, labels, **with_memory(memory, features, labels)))
    memory.push(features, labels)
    return loss


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    (head, memory, _, labels), (_, reference, _, _) = make_step(), make_step()
    for _ in range(4):
        # Another batch each time: were it the same one, it would tie with itself in the memory.
        features = torch.randn(6, DIM, dtype=torch.float64, requires_grad=True)
        loss, expected = compiled(head, memory, features, labels), step(head, reference, features, labels)
        torch.testing.assert_close(loss, expected)
        for found, other in zip(gradients(loss, head, features), gradients(expected, head, features), strict=True):
            torch.testing.assert_close(found, other)
        for found, other in zip(memory.buffers(), reference.buffers(), strict=True):
            assert torch.equal(found, other) or torch.equal(found.isnan(), other.isnan())


def test_compiled_push_with_a_dynamic_batch_size():
    torch._dynamo.reset()
    memory = FeatureMemory(10, DIM)
    past = Past(memory)
    push = torch.compile(memory.push, fullgraph=True, dynamic=True, backend="aot_eager")
    for turn, size in enumerate((4, 7, 3, 25, 10, 6)):
        features, labels = make_batch(turn, size, DIM, 4, torch.float32, "normal")
        push(features, labels)
        past.rows += zip(features, labels, strict=True)
        past.check()


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 can't make a layer of fake CUDA tensors without CUDA")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_need_no_data(device):
    # A fake tensor has no values: any .item(), .cpu() or branch on data would raise here.
    with FakeTensorMode():
        head, memory = APIHead(DIM, 5, device=device), FeatureMemory(16, DIM, device=device)
        for size in (6, 20, 0):
            labels = torch.zeros(size, dtype=torch.long, device=device)
            step(head, memory, torch.randn(size, DIM, device=device), labels)
        assert memory.filled.shape == ()
        assert {buffer.device.type for buffer in memory.buffers()} == {device}


def test_deterministic_algorithms_and_inference_mode():
    head, memory, features, labels = make_step()
    torch.use_deterministic_algorithms(True)
    try:
        step(head, memory, features, labels).backward()
        with torch.inference_mode():
            step(head, memory, features, labels)
        step(head, memory, features, labels).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert int(memory.num_pushed) == 8 + 3 * 6


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture_on_cuda():
    head, memory, features, labels = make_step(torch.float32)
    past = Past(memory)
    past.rows = list(zip(memory.features[:8].clone(), memory.labels[:8].clone(), strict=True))
    past.rows += 6 * list(zip(features.detach(), labels, strict=True))
    head, memory, features, labels = head.cuda(), memory.cuda(), features.detach().cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(head, memory, features, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(head, memory, features, labels)
    for _ in range(5):  # each replay pushes where the last one ended, beyond the end of the ring too
        graph.replay()
    memory.cpu()
    past.check()
