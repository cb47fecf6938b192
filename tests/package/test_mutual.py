"""Mutual vectors under compile, export, autocast; that they follow the formulas is in test_head.py."""

import pytest
import torch
from heads import make_case

from apinet_head import api_loss, mine_pairs
from apinet_head.mutual import MUTUALS, make_mutual


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
