"""Partners that were mined, against brute force: for every backend of `mine_pairs`."""

import torch
from reference import check_partners
from torch import Tensor
from torch.testing import assert_close

from apinet_head import Pairs, mine_pairs

HOWS = ("similar", "dissimilar", "random")


def check(features: Tensor, labels: Tensor, *, intra: str = "similar", inter: str = "similar", **keys) -> Pairs:
    """Mine, and compare both halves with brute force."""
    before = features.clone()
    pairs = mine_pairs(features, labels, intra=intra, inter=inter, **keys)
    assert_close(features, before, rtol=0, atol=0, equal_nan=True, msg="mining changed its input")
    exact = "large" not in keys.pop("backend", "")  # there only the few best candidates are compared again
    check_pairs(pairs, features, labels, intra=intra, inter=inter, exact=exact, **keys)
    return pairs


def check_pairs(
    pairs: Pairs,
    features: Tensor,
    labels: Tensor,
    *,
    intra: str | None,
    inter: str | None,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_offset: int | None = None,
    exact: bool = True,
) -> None:
    """Compare with brute force: each image once as the anchor of each kind of pair that is not None."""
    size, kinds = len(features), [(how, same) for how, same in ((intra, True), (inter, False)) if how is not None]
    assert [field.dtype for field in pairs] == [torch.int64, torch.int64, torch.bool, torch.bool]
    assert pairs.anchor.tolist() == [*range(size)] * len(kinds)
    assert pairs.same_class.tolist() == [same for _, same in kinds for _ in range(size)]
    for row, (how, same) in enumerate(kinds):
        partner, valid = (field[row * size : (row + 1) * size] for field in (pairs.partner, pairs.valid))
        check_partners(
            partner, valid, features, labels, how=how, same_class=same,
            keys=keys, key_labels=key_labels, offset=key_offset, exact=exact,
        )  # fmt: skip


def brute_force(features: Tensor, labels: Tensor) -> Tensor:
    """The partners [2,B] by subtraction in float64."""
    x = features.double()
    distance = torch.stack([(x - row).square().sum(1) for row in x])
    same = labels[:, None] == labels
    own = distance.masked_fill(~same | torch.eye(len(x), dtype=torch.bool), torch.inf)
    return torch.stack([own.argmin(1), distance.masked_fill(same, torch.inf).argmin(1)])
