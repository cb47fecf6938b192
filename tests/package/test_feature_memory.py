"""`FeatureMemory` compiled and on a GPU; what it holds is in test_fuzz.py, with a head in test_head.py."""

import copy

import pytest
import torch
from strategies import make_batch
from watching import no_waiting

from apinet_head import APIHead, FeatureMemory, api_loss

DIM = 6


def test_compiled_push_takes_any_batch_size():
    memory, eager = FeatureMemory(10, DIM), FeatureMemory(10, DIM)
    push = torch.compile(memory.push, fullgraph=True, dynamic=True, backend="aot_eager")
    for turn, size in enumerate((4, 7, 3, 25, 10, 6)):
        features, labels = make_batch(turn, size, DIM, 4, torch.float32, "normal")
        push(features, labels)
        eager.push(features.requires_grad_(), labels)
        assert not eager.features.requires_grad
        torch.testing.assert_close([*memory.buffers()], [*eager.buffers()], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture_on_cuda():
    head, features, labels = APIHead(DIM, 5, memory=16), torch.randn(6, DIM), torch.tensor([0, 0, 1, 1, 2, 3])
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
