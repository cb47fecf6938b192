"""Partners that were mined, against brute force: for every backend of `mine_pairs`."""

import torch
from reference import check_partners
from torch import Tensor

from apinet_head import Pairs, mine_pairs

HOWS = ("similar", "dissimilar", "random")


def check(features: Tensor, labels: Tensor, *, intra: str = "similar", inter: str = "similar", **keys) -> Pairs:
    """Mine, and compare both halves with brute force."""
    pairs = mine_pairs(features, labels, intra=intra, inter=inter, **keys)
    size = len(features)
    reference = {
        "keys": keys.get("keys"), "key_labels": keys.get("key_labels"), "offset": keys.get("key_offset"),
        "exact": "large" not in keys.get("backend", ""),  # there only the few best candidates are compared again
    }  # fmt: skip
    for row, how, same in ((0, intra, True), (size, inter, False)):
        half = Pairs(*(field[row : row + size] for field in pairs))
        assert half.anchor.tolist() == list(range(size))
        assert half.same_class.tolist() == [same] * size
        check_partners(half.partner, half.valid, features, labels, how=how, same_class=same, **reference)
    return pairs


def brute_force(features: Tensor, labels: Tensor) -> Tensor:
    """The partners [2,B] by subtraction in float64."""
    x = features.double()
    distance = torch.stack([(x - row).square().sum(1) for row in x])
    same = labels[:, None] == labels
    own = distance.masked_fill(~same | torch.eye(len(x), dtype=torch.bool), torch.inf)
    return torch.stack([own.argmin(1), distance.masked_fill(same, torch.inf).argmin(1)])
