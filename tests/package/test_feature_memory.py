"""`FeatureMemory` in a training loop; what it holds is in test_fuzz.py, with a head in test_head_memory.py."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from strategies import make_batch
from watching import no_waiting

from apinet_head import APIHead, FeatureMemory, api_loss

DIM = 6


def make_step(dtype=torch.float64):
    """A head, a memory that is half full, and a batch whose classes 2 and 3 have one image each."""
    torch.manual_seed(0)
    head = APIHead(DIM, 5, hidden_dim=8, dropout=0.0, dtype=dtype)
    memory = FeatureMemory(16, DIM, dtype=dtype)
    memory.push(torch.randn(8, DIM, dtype=dtype), torch.arange(8) % 3)
    return head, memory, torch.randn(6, DIM, dtype=dtype, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 3])


def output_of(head, memory, features, labels):
    """With the batch and what is remembered as keys, as the documentation has it."""
    keys, key_labels = torch.cat([features, memory.features]), torch.cat([labels, memory.labels])
    return head(features, labels, keys=keys, key_labels=key_labels, key_offset=0)


def test_gradient_is_that_with_the_past_as_constants():
    head, memory, features, labels = make_step()
    past, output = copy.deepcopy(memory), output_of(head, memory, features, labels)
    memory.push(features, labels)  # before the backward pass as well as after it
    assert not memory.features.requires_grad
    assert output.pairs.valid.tolist() == [True, True, True, True, True, False] + [True] * 6
    assert (output.pairs.partner[:5] >= 6).any()
    assert (output.pairs.partner[:4] < 6).any()

    # The past as further rows, which are constants and no anchors.
    rows, row_labels = torch.cat([features, past.features]), torch.cat([labels, past.labels])
    partners, valid = ([F.pad(half, (0, past.size)) for half in field.chunk(2)] for field in output.pairs[1::2])
    loss = api_loss(output)
    expected = reference.head(head, rows, row_labels, partners, valid=torch.cat(valid))["loss"]
    torch.testing.assert_close(loss, expected)
    inputs = [features, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_compiled_push_takes_any_batch_size():
    memory, eager = FeatureMemory(10, DIM), FeatureMemory(10, DIM)
    push = torch.compile(memory.push, fullgraph=True, dynamic=True, backend="aot_eager")
    for turn, size in enumerate((4, 7, 3, 25, 10, 6)):
        batch = make_batch(turn, size, DIM, 4, torch.float32, "normal")
        push(*batch)
        eager.push(*batch)
        torch.testing.assert_close([*memory.buffers()], [*eager.buffers()], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_no_host_synchronisation_and_graph_capture_on_cuda():
    head, memory, features, labels = make_step(torch.float32)
    expected = copy.deepcopy(memory)
    for _ in range(6):
        expected.push(features, labels)
    head, memory, features, labels = head.cuda(), memory.cuda(), features.detach().cuda(), labels.cuda()

    def step():
        api_loss(output_of(head, memory, features, labels))
        memory.push(features, labels)

    with no_waiting():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):  # each replay pushes where the last one ended, beyond the end of the ring too
        graph.replay()
    torch.testing.assert_close([*memory.cpu().buffers()], [*expected.buffers()], rtol=0, atol=0, equal_nan=True)
