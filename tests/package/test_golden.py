"""The published head's own numbers, in float64 without dropout: see golden/README.md."""

from pathlib import Path

import numpy as np
import pytest
import torch

from apinet_head import APIHead, api_loss_terms, mine_pairs

CASES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
LAYERS = {"map1": "mutual.fc1", "map2": "mutual.fc2", "fc": "classifier"}


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request):
    with np.load(request.param) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def load_head(case):
    """An APIHead with the weights of the case."""
    classes, dim = case["fc_weight"].shape
    head = APIHead(dim, classes, hidden_dim=len(case["map1_bias"]), dropout=0, dtype=torch.float64)
    head.load_state_dict(
        {f"{new}.{part}": case[f"{old}_{part}"] for old, new in LAYERS.items() for part in ("weight", "bias")}
    )
    return head


def test_cases_are_there():
    assert [path.stem for path in CASES] == ["case_a", "case_b"]


def test_pairs_are_the_published_ones(case):
    pairs = mine_pairs(case["features"], case["labels"])
    assert pairs.valid.all()
    assert torch.equal(pairs.partner, torch.cat([case["intra_partner"], case["inter_partner"]]))


def test_logits_loss_and_gradients_are_the_published_ones(case):
    head = load_head(case)
    features = case["features"].clone().requires_grad_()
    output = head(features, case["labels"])
    terms = api_loss_terms(output)
    terms.total.backward()

    assert torch.equal(output.labels, case["row_labels"])
    found = {"logits_self": output.logits_self, "logits_other": output.logits_other, "grad_features": features.grad}
    found |= {"loss": terms.total, "cross_entropy": terms.cross_entropy, "ranking": terms.ranking}
    for old, new in LAYERS.items():
        for part in ("weight", "bias"):
            found[f"grad_{old}_{part}"] = head.get_parameter(f"{new}.{part}").grad
    for name, value in found.items():
        torch.testing.assert_close(value, case[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)


def test_test_time_logits_are_the_published_ones(case):
    logits = load_head(case).eval()(case["features"])
    torch.testing.assert_close(logits, case["eval_logits"], rtol=1e-10, atol=1e-10)
