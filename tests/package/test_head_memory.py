"""`APIHead(memory=N)` against the head with keys, which are the batch and a plain list of what came before."""

import copy

import pytest
import torch
from reference import with_past

from apinet_head import APIHead, APINet, FeatureMemory, api_loss, random_pairs

N, DIM, CLASSES = 10, 8, 5


def make_head(memory=N, **head_args):
    torch.manual_seed(0)
    head_args = {"hidden_dim": 6, "dropout": 0.0, "dtype": torch.float64, **head_args}
    return APIHead(DIM, CLASSES, memory=memory, **head_args)


def make_batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, DIM, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), torch.randint(CLASSES, (size,), generator=generator)


def gradients(loss, head, features):
    return torch.autograd.grad(loss, [*head.parameters(), features])


@pytest.mark.parametrize("head_args", [{}, {"gate": "single"}, {"mutual": "product"}, {"intra": "dissimilar"}])
def test_loss_and_gradients_are_those_with_the_past_as_keys(head_args):
    head, plain, past = make_head(**head_args), make_head(0, **head_args), []
    from_memory = 0
    for step in range(5):  # of 6 rows each: full, and once around, after two
        features, labels = make_batch(step)
        output, expected = head(features, labels), plain(features, labels, **with_past(features, labels, past, N))
        torch.testing.assert_close(output.logits_other, expected.logits_other)
        assert torch.equal(output.labels, expected.labels)
        assert torch.equal(output.valid, expected.valid)
        assert output.num_rows is None
        torch.testing.assert_close(
            gradients(api_loss(output), head, features), gradients(api_loss(expected), plain, features)
        )
        from_memory += int((output.pairs.partner >= 6).sum())
        past.append((features, labels))
    assert from_memory, "no partner was in the memory: this tests nothing"


@pytest.mark.parametrize("how", ["eval mode", "no grad", "no labels", "given pairs", "refused"])
def test_only_training_searches_and_fills_it(how):
    head, plain = make_head(), make_head(0)
    head(*make_batch(0))
    before = copy.deepcopy(head.memory.state_dict())
    features, labels = make_batch(1)
    if how == "eval mode":
        output, expected = head.eval()(features, labels), plain.eval()(features, labels)
    elif how == "no grad":
        with torch.no_grad():
            output, expected = head(features, labels), plain(features, labels)
    elif how == "given pairs":
        pairs = random_pairs(labels, 5)
        output, expected = head(features, labels, pairs=pairs), plain(features, labels, pairs=pairs)
    elif how == "refused":
        with pytest.raises(ValueError, match="one entry per row"):
            head(features, labels[:-1])
        output = expected = [torch.zeros(1)]
    else:
        output, expected = [head(features)], [plain(features)]
    torch.testing.assert_close(output[0], expected[0])
    for name, value in head.memory.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_features_are_kept_without_their_history():
    head, (features, labels) = make_head(), make_batch(0)
    api_loss(head(features, labels)).backward()
    assert torch.equal(head.memory.features[:6], features)
    assert torch.equal(head.memory.labels[:6], labels)
    assert int(head.memory.filled) == 6
    assert not head.memory.features.requires_grad


def test_room_for_the_gradient_is_that_of_the_batch():
    head, (features, labels) = make_head(memory=5000), make_batch(0)
    sizes = []

    def note(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        loss = api_loss(head(features, labels))
    loss.backward()
    assert max(sizes) < 5000 * DIM / 10, "the whole memory is kept for the backward pass"


def test_state_dict_goes_on_as_if_never_interrupted():
    through, first = make_head(), make_head()
    for step in range(3):
        through(*make_batch(step)), first(*make_batch(step))
    second = make_head()
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        found, expected = second(*make_batch(step)), through(*make_batch(step))
        torch.testing.assert_close(found.logits_self, expected.logits_self)
        assert torch.equal(found.pairs.partner, expected.pairs.partner)
    torch.testing.assert_close([*second.memory.buffers()], [*through.memory.buffers()], rtol=0, atol=0)
    assert [name for name in first.state_dict() if name.startswith("memory")] == [
        "memory.features", "memory.labels", "memory.num_pushed"
    ]  # fmt: skip
    assert not any(name.startswith("memory") for name in make_head(0).state_dict())


def test_a_memory_set_later_is_used_from_then_on():
    head = make_head(0)
    head(*make_batch(0))
    head.memory = FeatureMemory(N, DIM, dtype=torch.float64)
    head(*make_batch(1))
    assert torch.equal(head.memory.features[:6], make_batch(1)[0])
    assert (head(*make_batch(2)).pairs.partner >= 6).any()


def test_an_image_without_a_class_is_remembered_but_never_found():
    head, (features, _) = make_head(), make_batch(0)
    head(features, torch.full((6,), -1))
    output = head(features + 0.01, torch.zeros(6, dtype=torch.long))
    assert (output.pairs.partner < 6).all()


def test_a_memory_works_in_half_precision_and_under_autocast():
    head, reference = make_head(dtype=torch.float32), make_head(dtype=torch.float32)
    for step in range(3):
        features, labels = make_batch(step)
        expected = api_loss(reference(features.float(), labels))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = api_loss(head(features.bfloat16(), labels))
        torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
        loss.backward()
    half = make_head(dtype=torch.bfloat16)
    for step in range(3):
        features, labels = make_batch(step)
        api_loss(half(features.bfloat16(), labels)).backward()
    assert half.memory.features.dtype == torch.bfloat16


def test_compiled_training_is_that_of_eager():
    torch._dynamo.reset()
    head, eager = make_head(), make_head()
    step_of = torch.compile(lambda x, y: api_loss(head(x, y)), fullgraph=True, backend="aot_eager")
    for step in range(4):
        features, labels = make_batch(step)
        found, expected = step_of(features, labels), api_loss(eager(features, labels))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, head, features), gradients(expected, eager, features))
        torch.testing.assert_close([*head.memory.buffers()], [*eager.memory.buffers()], equal_nan=True)


def test_apinet_trains_with_a_memory():
    net = APINet(torch.nn.Flatten(), CLASSES, dim=DIM, memory=N).double()
    images = torch.randn(6, DIM, 1, 1, dtype=torch.float64)
    api_loss(net(images, torch.arange(6) % CLASSES)).backward()
    assert int(net.head.memory.filled) == 6
    assert net.to_deploy()(images).shape == (6, CLASSES)


def test_repr_shows_the_memory():
    assert "memory=10" in repr(make_head())
    assert "memory=0" in make_head(0).extra_repr()


def test_keys_beside_a_memory_are_refused():
    features, labels = make_batch(0)
    with pytest.raises(ValueError, match=r"searches partners there, got keys float64 \[6, 8\].*memory=0"):
        make_head()(features, labels, keys=features, key_labels=labels)
    with pytest.raises(TypeError, match=r"memory must be an int, got 1\.5"):
        make_head(1.5)
    with pytest.raises(ValueError, match="memory must be at least 0, got -1"):
        make_head(-1)
