"""The ablation's mutual vectors and gates, against their formulas in float64, and under compile, export, autocast."""

import numpy as np
import pytest
import torch

from apinet_head import APIHead, api_loss, api_loss_terms, mine_pairs
from apinet_head.mutual import MUTUALS, make_mutual

VARIANTS = [
    (mutual, gate) for mutual in MUTUALS for gate in ("pair", "single") if (mutual, gate) != ("individual", "single")
]


def make_case(mutual, gate="pair", size=8, dim=12, classes=4, dtype=torch.float64):
    torch.manual_seed(0)
    head = APIHead(dim, classes, hidden_dim=6, dropout=0.0, mutual=mutual, gate=gate, dtype=dtype)
    return head, torch.randn(size, dim, dtype=dtype), torch.arange(size) % classes


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(module, name, a, b):
    """m of one pair, in numpy."""
    parameters = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    if name in ("mlp", "weighted"):
        hidden = parameters["fc1.weight"] @ np.concatenate([a, b]) + parameters["fc1.bias"]
        output = parameters["fc2.weight"] @ hidden + parameters["fc2.bias"]
        first, second = np.exp(output[:2])
        return output if name == "mlp" else (first * a + second * b) / (first + second)
    if name == "bilinear":  # the sketch of the outer product, entry by entry
        (slot_a, slot_b), (sign_a, sign_b) = parameters["slots"], parameters["signs"]
        sketch = np.zeros(len(a))
        for i in range(len(a)):
            for j in range(len(b)):
                sketch[(slot_a[i] + slot_b[j]) % len(a)] += sign_a[i] * sign_b[j] * a[i] * b[j]
        return sketch
    return {"individual": np.ones(len(a)), "sum": a + b, "product": a * b, "square_diff": (a - b) ** 2}[name]


@pytest.mark.parametrize(("mutual", "gate"), VARIANTS)
def test_gated_features_follow_the_formulas(mutual, gate):
    head, features, labels = make_case(mutual, gate)
    bare = APIHead(12, hidden_dim=6, dropout=0.0, mutual=mutual, gate=gate, dtype=torch.float64)
    bare.mutual.load_state_dict(head.mutual.state_dict())
    output = bare(features, labels)
    x, pairs = features.numpy(), output.pairs
    for row, (a, b) in enumerate(zip(pairs.anchor.tolist(), pairs.partner.tolist(), strict=True)):
        m = reference(head.mutual, mutual, x[a], x[b])
        gates = [sigmoid(m)] * 2 if gate == "single" else [sigmoid(m * x[a]), sigmoid(m * x[b])]
        for found, expected in (
            (output.logits_self[row], x[a] + x[a] * gates[0]),
            (output.logits_other[row], x[a] + x[a] * gates[1]),
            (output.logits_self[len(pairs.anchor) + row], x[b] + x[b] * gates[1]),
            (output.logits_other[len(pairs.anchor) + row], x[b] + x[b] * gates[0]),
        ):
            np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MUTUALS if name != "individual"])  # which has no gradient at all
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    module = make_mutual(name, 5, 4, 0.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(module, torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_().unbind())


@pytest.mark.parametrize(("mutual", "gate"), VARIANTS)
def test_everything_learns_and_single_gates_have_one_row_of_logits_and_the_margin_as_ranking(mutual, gate):
    head, features, labels = make_case(mutual, gate)
    output = head(features, labels)
    assert (output.logits_other is output.logits_self) == (gate == "single")
    if gate == "single":
        assert api_loss_terms(output, margin=0.05).ranking.item() == pytest.approx(0.05)
    api_loss(output, rank_weight=0.0 if gate == "single" else 1.0).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("mutual", MUTUALS)
def test_every_mutual_vector_compiles_exports_and_takes_half_precision(mutual):
    head, features, labels = make_case(mutual, dtype=torch.float32)
    expected = head(features, labels)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, labels).logits_other, expected.logits_other)
    exported = torch.export.export(head, (features, labels)).module()
    torch.testing.assert_close(exported(features, labels).logits_other, expected.logits_other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = api_loss(head(features, labels))
    torch.testing.assert_close(loss, api_loss(expected), rtol=0.05, atol=0.05)
    keyed = head(features, labels, keys=features, key_labels=labels, key_offset=0)
    torch.testing.assert_close(keyed.logits_self, expected.logits_self)
    pairs = mine_pairs(features, labels)
    half = head.bfloat16()(features.bfloat16(), labels, pairs=pairs)
    torch.testing.assert_close(half.logits_self.float(), expected.logits_self, rtol=0.1, atol=0.2)


def test_sketch_is_the_same_in_every_process_and_in_the_state_dict():
    one, other = (make_mutual("bilinear", 50, 1, 0.0) for _ in range(2))
    torch.randn(3)
    assert torch.equal(one.slots, other.slots)
    assert torch.equal(one.signs, other.signs)
    assert set(one.state_dict()) == {"slots", "signs"}
    assert set(one.signs.tolist()[0]) == {-1.0, 1.0}
