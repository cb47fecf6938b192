"""`gather_features` and `APIHead(gather=group)` over some of the ranks equal one process with the batch they share."""

import pytest
import torch
from group_cases import CASES, CLASS_WEIGHT
from rank_cases import SIZE, gradients, make_batch, make_head
from ranks import on_ranks

from apinet_head import api_loss


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    found = on_ranks(request.param, CASES, tmp_path_factory.mktemp("groups"))
    for rank in found:
        for case in rank.values():
            assert not isinstance(case, str), case
    return found


@pytest.mark.parametrize("case", ["mesh", "groups", "world"])
def test_head_over_a_group_is_the_head_on_the_batch_of_that_group(ranks, case):
    copies = 1 if case == "world" else 2
    size = len(ranks) // copies
    features, labels = make_batch(size)
    head = make_head()
    loss = api_loss(head(features.requires_grad_(), labels), class_weight=CLASS_WEIGHT)
    loss.backward()
    expected = gradients(head)
    for copy in range(copies):
        group = [rank[case] for rank in ranks[copy::copies]]
        for place, rank in enumerate(group):
            assert rank["size"] == size
            assert rank["offset"] == place * SIZE
            assert torch.equal(rank["keys"], features.detach())
            assert torch.equal(rank["key_labels"], labels)
        means = {name: torch.stack([rank["head"][name] for rank in group]).mean(0) for name in expected}
        torch.testing.assert_close(means, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(torch.stack([rank["loss"] for rank in group]).mean(), loss.detach())
        found = torch.cat([rank["features"] for rank in group]) / size
        torch.testing.assert_close(found, features.grad, rtol=0, atol=1e-10)


def test_groups_that_do_not_fit_are_an_error(ranks):
    for number, rank in enumerate(ranks):
        messages = rank["errors"]
        assert "TypeError: group must be a ProcessGroup or a DeviceMesh, got str" in messages["type"]
        assert ("other" in messages) == (number > 0)
        assert number == 0 or "ValueError: this process is not in the group" in messages["other"]
