"""Training with a memory of past batches, `train_cub.py --memory`, on a tiny set of birds."""

import pytest
import torch
from cub_runs import run, same, weights

import train_cub
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


def test_the_first_batch_is_as_without_and_the_second_is_not(birds, tmp_path, monkeypatch):
    losses, compute_loss = {"with": [], "without": []}, train_cub.compute_loss
    for name, flags in (("with", MEMORY), ("without", [])):

        def noted(*args, to=losses[name]):
            figures = compute_loss(*args)
            to.append(figures["loss"].item())
            return figures

        monkeypatch.setattr(train_cub, "compute_loss", noted)
        run(birds, tmp_path / name, "--epochs", "1", *flags)
    assert losses["with"][0] == pytest.approx(losses["without"][0], rel=1e-5)  # computed in another order
    assert losses["with"][1] != pytest.approx(losses["without"][1], rel=1e-3)


def test_resumed_run_ends_as_the_run_never_interrupted(birds, tmp_path, monkeypatch, mined):
    class KilledError(Exception):
        pass

    expected = run(birds, tmp_path / "whole", *MEMORY)
    record = train_cub.record

    def killed_after_the_second(folder, state, *rest):
        record(folder, state, *rest)
        if state.progress.epoch == 3:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(train_cub, "record", killed_after_the_second)
        with pytest.raises(KilledError):
            run(birds, tmp_path / "run", *MEMORY)
    del mined[-3:]  # of the epoch that is trained again
    assert len(mined) == 9 + 6
    torch.manual_seed(123)  # nothing may depend on the random state that the new process happens to have
    resumed = run(birds, tmp_path / "run", *MEMORY)
    assert len(mined) == 2 * 9
    for before, after in zip(mined[:9], mined[9:], strict=True):
        # Bit for bit, NaN of the empty slots included.
        assert torch.equal(before[2].view(torch.int32), after[2].view(torch.int32))
        assert torch.equal(before[3], after[3])
    assert same(weights(tmp_path / "run" / "last"), weights(tmp_path / "whole" / "last"))
    assert resumed | {"seconds": 0} == expected | {"seconds": 0}
    with pytest.raises(SystemExit, match="memory: 16 there, 8 here"):
        run(birds, tmp_path / "run", "--memory", "8")
