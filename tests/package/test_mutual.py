"""The ablation's mutual vectors and gates, against their formulas in float64, and under compile, export, autocast."""

from functools import partial

import pytest
import reference
import torch
from heads import make_case

from apinet_head import api_loss, api_loss_terms, mine_pairs
from apinet_head.mutual import MUTUALS, make_mutual

VARIANTS = [
    (mutual, gate) for mutual in MUTUALS for gate in ("pair", "single") if (mutual, gate) != ("individual", "single")
]


def mutual_of_pair(module, name, a, b):
    """m, as the formulas have it."""
    if name in ("mlp", "weighted"):
        output = module.fc2.weight @ (module.fc1.weight @ torch.cat([a, b]) + module.fc1.bias) + module.fc2.bias
        first, second = output[:2].exp()
        return output if name == "mlp" else (first * a + second * b) / (first + second)
    if name == "bilinear":  # the sketch of the outer product
        (slot_a, slot_b), (sign_a, sign_b) = module.slots, module.signs
        slots, products = (slot_a[:, None] + slot_b) % len(a), torch.outer(sign_a * a, sign_b * b)
        return torch.zeros_like(a).index_add(0, slots.flatten(), products.flatten())
    return {"individual": torch.ones_like(a), "sum": a + b, "product": a * b, "square_diff": (a - b) ** 2}[name]


@pytest.mark.parametrize(("mutual", "gate"), VARIANTS)
def test_logits_loss_and_gradients_follow_the_formulas_and_everything_learns(mutual, gate):
    head, features, labels = make_case(mutual=mutual, gate=gate)
    output = head(features, labels)
    assert (output.logits_other is output.logits_self) == (gate == "single")
    mutual_of, partners = partial(mutual_of_pair, head.mutual, mutual), [*output.pairs.partner.view(2, -1)]
    expected = reference.head(head, features, labels, partners, mutual_of=mutual_of, single=gate == "single")
    terms, learning = api_loss_terms(output), [features, *head.parameters()]
    found = [output.logits_self, output.logits_other, terms.cross_entropy, terms.ranking, terms.total]
    torch.testing.assert_close(found, [*expected.values()], rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, learning) for loss in (terms.total, expected["loss"])]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("mutual", MUTUALS)
def test_every_mutual_vector_compiles_exports_and_takes_half_precision_and_no_images(mutual):
    head, features, labels = make_case(mutual=mutual, dtype=torch.float32)
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
    of_none = api_loss(head(features[:0], labels[:0]))
    of_none.backward()
    assert of_none == 0
    half = head.bfloat16()(features.bfloat16(), labels, pairs=pairs)
    torch.testing.assert_close(half.logits_self.float(), expected.logits_self, rtol=0.1, atol=0.2)


def test_sketch_is_the_same_in_every_process_and_in_the_state_dict():
    one, other = (make_mutual("bilinear", 50, 1, 0.0) for _ in range(2))
    torch.randn(3)
    assert torch.equal(one.slots, other.slots)
    assert torch.equal(one.signs, other.signs)
    assert set(one.state_dict()) == {"slots", "signs"}
    assert set(one.signs.tolist()[0]) == {-1.0, 1.0}
