"""The published head's own numbers, in float64 without dropout: see golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

from apinet_head import APIHead, api_loss_terms

LAYERS = {"map1": "mutual.fc1", "map2": "mutual.fc2", "fc": "classifier"}
WEIGHTS = {f"{old}_{part}": f"{new}.{part}" for old, new in LAYERS.items() for part in ("weight", "bias")}


@pytest.mark.parametrize("name", ["case_a", "case_b"])
def test_pairs_logits_loss_and_gradients_are_the_published_ones(name):
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as arrays:
        case = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    (classes, dim), hidden_dim = case["fc_weight"].shape, len(case["map1_bias"])
    head = APIHead(dim, classes, hidden_dim=hidden_dim, dropout=0, dtype=torch.float64)
    head.load_state_dict({new: case[old] for old, new in WEIGHTS.items()})
    features = case["features"].requires_grad_()
    output = head(features, case["labels"])
    terms = api_loss_terms(output)
    terms.total.backward()

    assert output.pairs.valid.all()
    assert torch.equal(output.pairs.partner, torch.cat([case["intra_partner"], case["inter_partner"]]))
    assert torch.equal(output.labels, case["row_labels"])
    found = {"logits_self": output.logits_self, "logits_other": output.logits_other, "grad_features": features.grad}
    found |= {"loss": terms.total, "cross_entropy": terms.cross_entropy, "ranking": terms.ranking}
    found |= {f"grad_{old}": head.get_parameter(new).grad for old, new in WEIGHTS.items()}
    found |= {"eval_logits": head.eval()(features)}
    for name, value in found.items():
        torch.testing.assert_close(value, case[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)
