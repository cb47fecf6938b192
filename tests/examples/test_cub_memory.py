"""Training with a memory of past batches, `train_cub.py --memory`, on a tiny set of birds."""

import pytest
import torch
from cub_runs import run

from apinet_head import head as head_module

MEMORY = ["--memory", "16"]  # batches of 6: it is filled in the third, and then goes round


@pytest.fixture
def mined(monkeypatch):
    """What the head mined: (features, labels, keys, key_labels, pairs) of each batch."""
    calls = []
    find_pairs = head_module.find_pairs

    def noted(features, labels, searches, table):
        pairs = find_pairs(features, labels, searches, table)
        keys = None if table.past is None else torch.cat([table.features.detach(), table.past])
        calls.append((features.detach(), labels, keys, table.labels.clone(), pairs))
        assert table.offset == 0
        return pairs

    monkeypatch.setattr(head_module, "find_pairs", noted)
    return calls


@pytest.mark.parametrize("flags", [[], ["--chunk-size", "2"]])
def test_partners_are_searched_in_the_batch_and_in_those_before(birds, tmp_path, mined, flags):
    run(birds, tmp_path / "run", *MEMORY, *flags)
    assert len(mined) == 9
    for turn, (features, labels, keys, key_labels, _) in enumerate(mined):
        assert torch.equal(keys[:6], features)
        assert torch.equal(key_labels[:6], labels)
        # As a set: which slot a feature is in is the memory's business.
        past = [row for before in mined[:turn] for row in zip(before[0], before[1], strict=True)][-16:]
        remembered = [row for row in zip(keys[6:], key_labels[6:], strict=True) if row[0].isfinite().all()]
        assert sorted((*f.tolist(), int(label)) for f, label in remembered) == sorted(
            (*f.tolist(), int(label)) for f, label in past
        )
    assert any((pairs.partner >= 6).any() for *_, pairs in mined)


def test_without_the_flag_or_for_the_baseline_there_is_no_memory(birds, tmp_path, mined):
    run(birds, tmp_path / "api", "--epochs", "1")
    assert [keys for _, _, keys, _, _ in mined] == [None] * 3
    run(birds, tmp_path / "baseline", "--epochs", "1", "--method", "baseline", *MEMORY)
    assert len(mined) == 3
