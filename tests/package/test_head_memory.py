"""`APIHead(memory=N)`; that it is the head with the batch and the past as keys, is in test_fuzz.py."""

import pytest
import torch
from footprint import saved_bytes

from apinet_head import APIHead, FeatureMemory, api_loss, mine_pairs

N, DIM, CLASSES = 10, 8, 5


def make_head(memory=N):
    torch.manual_seed(0)
    return APIHead(DIM, CLASSES, memory=memory, hidden_dim=6, dropout=0.0, dtype=torch.float64)


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(6, DIM, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), torch.randint(CLASSES, (6,), generator=generator)


@pytest.mark.parametrize(
    "call",
    [
        lambda head, x, y: head.eval()(x, y).logits_self,
        lambda head, x, y: torch.no_grad()(head)(x, y).logits_self,
        lambda head, x, y: head(x, y, pairs=mine_pairs(x, y)).logits_self,
        lambda head, x, y: head(x),
    ],
    ids=["eval mode", "no grad", "given pairs", "no labels"],
)
def test_only_training_searches_and_fills_it(call):
    head, plain = make_head(), make_head(0)
    head(*make_batch(0))
    before = [buffer.clone() for buffer in head.memory.buffers()]
    torch.testing.assert_close(call(head, *make_batch(1)), call(plain, *make_batch(1)))
    torch.testing.assert_close([*head.memory.buffers()], before, rtol=0, atol=0, equal_nan=True)


def test_room_for_the_gradient_is_that_of_the_batch():
    head, (features, labels) = make_head(memory=5000), make_batch(0)
    kept, _ = saved_bytes(lambda: api_loss(head(features, labels)), [features, *head.parameters()])
    assert kept < head.memory.features.nbytes / 10


def test_state_dict_goes_on_as_if_never_interrupted_also_in_a_memory_set_later():
    head, resumed = make_head(), make_head(0)
    for step in range(3):
        head(*make_batch(step))
    resumed(*make_batch(0))
    names = {"memory.features", "memory.labels", "memory.num_pushed"}
    assert head.state_dict().keys() - resumed.state_dict().keys() == names
    resumed.memory = FeatureMemory(N, DIM, dtype=torch.float64)
    resumed.load_state_dict(head.state_dict())
    for step in range(3, 6):
        found, expected = resumed(*make_batch(step)), head(*make_batch(step))
        torch.testing.assert_close([*found[:4], *found.pairs], [*expected[:4], *expected.pairs])
    torch.testing.assert_close([*resumed.memory.buffers()], [*head.memory.buffers()], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_works_in_half_precision_and_under_autocast(dtype):
    head, exact = make_head().to(dtype), make_head()
    for step in range(3):
        features, labels = make_batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            loss = api_loss(head(features.bfloat16(), labels))
        expected = api_loss(exact(features.bfloat16().double(), labels))
        torch.testing.assert_close(loss.double(), expected, rtol=0.05, atol=0.05)
        loss.backward()
    assert head.memory.features.dtype == dtype


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_that_of_eager(backend):
    head, eager = make_head(), make_head()
    step_of = torch.compile(lambda x, y: api_loss(head(x, y)), fullgraph=True, backend=backend)
    for step in range(4):
        features, labels = make_batch(step)
        losses = step_of(features, labels), api_loss(eager(features, labels))
        torch.testing.assert_close(*losses)
        learning = [*head.parameters(), features], [*eager.parameters(), features]
        torch.testing.assert_close(*map(torch.autograd.grad, losses, learning))
        torch.testing.assert_close([*head.memory.buffers()], [*eager.memory.buffers()], equal_nan=True)
