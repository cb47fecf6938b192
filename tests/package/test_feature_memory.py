"""`FeatureMemory` against a plain list of all that was pushed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import check_partners
from releases import with_fake_cuda
from strategies import DTYPES, make_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from apinet_head import APIHead, FeatureMemory, api_loss, mine_pairs

DIM = 6


class Past:
    """All rows ever pushed, in order, each tensors on its own."""

    def __init__(self, memory):
        self.memory, self.rows = memory, []

    def push(self, features, labels):
        self.memory.push(features, labels)
        self.rows += zip(features.detach().clone(), labels.clone(), strict=True)

    def last(self):
        """Features [K,D] and labels [K] of the last K <= size rows, oldest first."""
        rows = self.rows[-self.memory.size :]
        features = [row.to(self.memory.features.dtype) for row, _ in rows]
        return (
            torch.stack(features) if rows else self.memory.features[:0],
            torch.tensor([int(label) for _, label in rows], dtype=torch.int64),
        )

    def check(self):
        """Every slot holds the newest row whose turn it was; the others are empty."""
        memory, expected = self.memory, {}
        for turn, row in enumerate(self.rows):
            expected[turn % memory.size] = row
        assert memory.filled.shape == ()
        assert memory.filled.dtype == torch.int64
        assert int(memory.filled) == len(expected)
        assert set(expected) == set(range(len(expected))), "the filled slots are the first ones"
        for slot in range(memory.size):
            if slot in expected:
                features, label = expected[slot]
                assert torch.equal(memory.features[slot], features.to(memory.features.dtype))
                assert memory.labels[slot] == label
            else:
                assert memory.features[slot].isnan().all()
                assert memory.labels[slot] == -1


@st.composite
def histories(draw, max_batch=20):
    """A memory, and batches to push: none, some and more than it holds; half precision as autocast gives it."""
    memory = FeatureMemory(draw(st.integers(1, 12)), DIM, dtype=draw(st.sampled_from(DTYPES)))
    sizes = draw(st.lists(st.integers(0, max_batch), max_size=8))
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(DTYPES))
    label_dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    batches = [make_batch(seed + turn, size, DIM, 4, dtype, "normal") for turn, size in enumerate(sizes)]
    return memory, [(features, labels.to(label_dtype)) for features, labels in batches]


def with_memory(memory, features, labels):
    """The batch and what is remembered, as the documentation has it."""
    return {
        "keys": torch.cat([features, memory.features]), "key_labels": torch.cat([labels, memory.labels]),
        "key_offset": 0,
    }  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(history=histories(), size=st.integers(1, 15), how=st.sampled_from(["similar", "dissimilar", "random"]))
def test_mining_is_that_of_the_concatenated_past(history, size, how):
    memory, batches = history
    past = Past(memory)
    for batch in batches:
        past.push(*batch)
    features, labels = make_batch(7, size, DIM, 4, memory.features.dtype, "normal")
    pairs = mine_pairs(features, labels, intra=how, inter=how, **with_memory(memory, features, labels))

    # From slots back to the order of the past: without holes, and without a ring.
    remembered, remembered_labels = past.last()
    position = {(len(past.rows) - len(remembered) + n) % memory.size: n for n in range(len(remembered))}
    partner = pairs.partner.clone()
    for row in range(2 * size):
        slot = int(partner[row]) - size
        if slot >= 0:
            assert pairs.valid[row], "a pair that doesn't exist points into the memory"
            assert slot in position, "the partner is an empty slot"
            partner[row] = size + position[slot]
    for first, same_class in ((0, True), (size, False)):
        half = slice(first, first + size)
        check_partners(
            partner[half], pairs.valid[half], features, labels, how=how, same_class=same_class, offset=0,
            keys=torch.cat([features, remembered]), key_labels=torch.cat([labels, remembered_labels]),
        )  # fmt: skip


@pytest.mark.parametrize("how", ["similar", "dissimilar", "random"])
def test_an_empty_memory_changes_nothing(how):
    features, labels = make_batch(1, 20, DIM, 4, torch.float32, "normal")
    memory = FeatureMemory(50, DIM)
    pairs = mine_pairs(features, labels, intra=how, inter=how, **with_memory(memory, features, labels))
    if how == "random":
        assert (pairs.partner < 20).all()
    else:
        torch.testing.assert_close([*pairs], mine_pairs(features, labels, intra=how, inter=how), rtol=0, atol=0)
    alone = mine_pairs(features, labels, intra=how, inter=how, keys=memory.features, key_labels=memory.labels)
    assert not alone.valid.any()


def test_rows_that_are_not_finite_are_kept_but_never_chosen():
    memory = FeatureMemory(4, 1)
    memory.push(torch.tensor([[float("inf")], [float("nan")], [5.0]]), torch.tensor([0, 0, 0]))
    assert int(memory.filled) == 3
    pairs = mine_pairs(torch.zeros(1, 1), torch.tensor([0]), inter=None, keys=memory.features, key_labels=memory.labels)
    assert pairs.partner.tolist() == [2]
    assert pairs.valid.all()


def make_step(dtype=torch.float64, size=16):
    """A head, a memory that is half full, and a batch whose classes 2 and 3 have one image each."""
    torch.manual_seed(0)
    head = APIHead(DIM, 5, hidden_dim=8, dropout=0.0, dtype=dtype)
    memory = FeatureMemory(size, DIM, dtype=dtype)
    memory.push(torch.randn(size // 2, DIM, dtype=dtype), torch.arange(size // 2) % 3)
    return head, memory, torch.randn(6, DIM, dtype=dtype, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 3])


def gradients(loss, head, *inputs):
    return torch.autograd.grad(loss, [*head.parameters(), *inputs])


def test_gradient_is_that_with_the_past_as_constants():
    head, memory, features, labels = make_step()
    output = head(features, labels, **with_memory(memory, features, labels))
    loss = api_loss(output)
    memory.push(features, labels)  # before the backward pass as well as after it
    assert not memory.features.requires_grad
    assert output.pairs.valid.tolist() == [True, True, True, True, True, False] + [True] * 6
    assert (output.pairs.partner[:5] >= 6).any()
    assert (output.pairs.partner[:4] < 6).any()

    # Pair by pair: who comes from the past is a number, who comes from the batch is not.
    past = make_step()[1].features.tolist()
    rows = [features[n] for n in range(6)] + [torch.tensor(row, dtype=torch.float64) for row in past]
    own, other, targets = [], [], []
    key_labels = torch.cat([labels, make_step()[1].labels])
    for a, b, valid in zip(*(field.tolist() for field in output.pairs[:2]), output.pairs.valid, strict=True):
        if valid:
            mutual = head.mutual.fc2(head.mutual.fc1(torch.cat([rows[a], rows[b]])))
            gate_a, gate_b = (mutual * rows[a]).sigmoid(), (mutual * rows[b]).sigmoid()
            own += [head.classifier(rows[a] * (1 + gate_a)), head.classifier(rows[b] * (1 + gate_b))]
            other += [head.classifier(rows[a] * (1 + gate_b)), head.classifier(rows[b] * (1 + gate_a))]
            targets += [labels[a], key_labels[b]]
    own, other = torch.stack(own).log_softmax(1), torch.stack(other).log_softmax(1)
    own, other = (rows[torch.arange(len(targets)), torch.stack(targets)] for rows in (own, other))
    expected = -(own + other).mean() / 2 + (other.exp() - own.exp() + 0.05).relu().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, head, features), gradients(expected, head, features))


def test_autocast_features_are_kept_in_the_dtype_of_the_memory():
    head, memory, features, labels = make_step(torch.float32)
    expected = api_loss(head(features, labels, **with_memory(memory, features, labels)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = features.bfloat16()  # as a backbone under autocast gives them
        loss = api_loss(head(half, labels, **with_memory(memory, half, labels)))
        memory.push(half, labels)
    assert memory.features.dtype == torch.float32
    assert torch.equal(memory.features[8:14], features.detach().bfloat16().float())
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    loss.backward()
    assert FeatureMemory(4, 2, dtype=torch.float32).to(torch.float16).features.dtype == torch.float16


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureMemory(8, 3).push(torch.zeros(4, 3, 2, 2), Y), r"float32 \[4, 3, 2, 2\].*pool it first"),
        (lambda: FeatureMemory(8, 5).push(X, Y), r"\[B, 5\], got float32 \[4, 3\].*dim=3"),
        (lambda: FeatureMemory(8, 3).push(X, Y.to("meta")), r"labels and features must be on one device.*meta.*cpu"),
        (lambda: FeatureMemory(8, 3, device="meta").push(X, Y), r"features and the memory must be on one device.*cpu"),
    ],
)
def test_errors_show_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Under all that traces, captures or watches it.


def step(head, memory, features, labels):
    """What a training loop does with a batch."""
    loss = api_loss(head(features, labels, **with_memory(memory, features, labels)))
    memory.push(features, labels)
    return loss


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step_equals_eager(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    (head, memory, _, labels), (_, reference, _, _) = make_step(), make_step()
    for _ in range(4):
        # Another batch each time: were it the same one, it would tie with itself in the memory.
        features = torch.randn(6, DIM, dtype=torch.float64, requires_grad=True)
        loss, expected = compiled(head, memory, features, labels), step(head, reference, features, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, head, features), gradients(expected, head, features))
        for found, other in zip(memory.buffers(), reference.buffers(), strict=True):
            assert torch.equal(found, other) or torch.equal(found.isnan(), other.isnan())


def test_compiled_push_takes_any_batch_size():
    torch._dynamo.reset()
    memory = FeatureMemory(10, DIM)
    past = Past(memory)
    push = torch.compile(memory.push, fullgraph=True, dynamic=True, backend="aot_eager")
    for turn, size in enumerate((4, 7, 3, 25, 10, 6)):
        features, labels = make_batch(turn, size, DIM, 4, torch.float32, "normal")
        push(features, labels)
        past.rows += zip(features, labels, strict=True)
        past.check()


@with_fake_cuda
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
