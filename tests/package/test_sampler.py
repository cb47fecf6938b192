"""`BalancedBatchSampler`: balance, coverage, ranks, resuming."""

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from watching import no_warnings

from apinet_head import BalancedBatchSampler

# Some of the samplers drawn here have one image a class.
pytestmark = pytest.mark.filterwarnings("ignore:no image will have another")

LABELS = [label for label, count in enumerate([5, 9, 3, 8, 6, 12, 4, 7]) for _ in range(count)]


@st.composite
def setups(draw):
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    labels = [label * 7 for label, count in enumerate(counts) for _ in range(count)]
    order = draw(st.permutations(labels))
    return order, draw(st.integers(1, len(counts))), draw(st.integers(1, 6)), draw(st.integers(0, 99))


@settings(max_examples=120, deadline=None)
@given(setups(), st.none() | st.integers(1, 20) | st.just(30), st.data())
def test_batches_are_balanced_and_come_round_and_ranks_share_them(setup, n_batches, data):
    labels, n_classes, n_samples, seed = setup
    make = partial(BalancedBatchSampler, *setup[:3], n_batches=n_batches, seed=seed)
    batches = list(make())
    assert len(batches) == len(make()) == (n_batches or max(1, len(labels) // (n_classes * n_samples)))
    for batch in batches:
        groups = [batch[start : start + n_samples] for start in range(0, len(batch), n_samples)]
        classes = [{labels[index] for index in images} for images in groups]
        assert all(len(one) == 1 for one in classes), "classes are contiguous"
        assert len(set.union(*classes)) == len(groups) == n_classes
        for images in groups:
            assert len(images) == n_samples
            assert len(set(images)) == min(n_samples, labels.count(labels[images[0]])), "repeats only where it must"

    counts = Counter(itertools.chain(*batches))
    of_class = {label: [counts[i] for i, other in enumerate(labels) if other == label] for label in set(labels)}
    assert all(max(seen) - min(seen) <= 1 for seen in of_class.values()), "no image again before all of its class"
    classes = [sum(seen) for seen in of_class.values()]
    assert max(classes) - min(classes) <= n_samples

    size = data.draw(st.sampled_from([size for size in range(1, n_classes + 1) if n_classes % size == 0]))
    for batch, *parts in zip(batches, *(make(rank=rank, world_size=size) for rank in range(size)), strict=True):
        assert [*itertools.chain(*parts)] == batch
        assert len({len(part) for part in parts}) == 1
    with pytest.raises(ValueError, match=rf"^n_classes={n_classes} must be divisible by world_size={n_classes + 1}$"):
        make(rank=0, world_size=n_classes + 1)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    drawn, before = {"cpu": [], "meta": []}, torch.get_rng_state()
    for device, seed, epoch in itertools.product(drawn, [5, 6], range(4)):
        with torch.device(device):  # as any would, the last holds what is made without naming one
            sampler = BalancedBatchSampler(LABELS, 4, 3, seed=seed)
            sampler.set_epoch(epoch)
            drawn[device].append(list(sampler))
    assert drawn["meta"] == drawn["cpu"]
    assert len({str(batches) for batches in drawn["cpu"]}) == 8
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=60, deadline=None)
@given(setups(), st.integers(0, 25))
def test_resuming_anywhere_yields_the_rest_of_the_epoch(setup, done):
    labels, *sizes, seed = setup
    sampler, other, resumed = (BalancedBatchSampler(labels, *sizes, n_batches=25, seed=seed) for _ in range(3))
    for one in (sampler, other):
        one.set_epoch(3)
    assert len(list(itertools.islice(sampler, done))) == done
    state = sampler.state_dict()
    assert state == sampler.state_dict(batches_done=done)

    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(3)  # as a training loop does at the top of each epoch
    assert len(resumed) == 25 - done
    assert list(resumed) == list(other)[done:]
    assert len(resumed) == 25
    for one in (sampler, resumed):
        one.set_epoch(4)
    assert list(resumed) == list(sampler)


def test_dataloader_workers_draw_ahead_so_the_loop_says_how_far_it_is():
    sampler = BalancedBatchSampler(LABELS, 4, 2, n_batches=6)
    expected = list(sampler)
    loader = DataLoader(range(len(LABELS)), batch_sampler=sampler, num_workers=1)
    seen = list(itertools.islice(loader, 2))
    sampler.load_state_dict(sampler.state_dict(batches_done=2))
    seen += DataLoader(range(len(LABELS)), batch_sampler=sampler)
    assert [batch.tolist() for batch in seen] == expected
    with pytest.raises(TypeError, match="batch_sampler=, not sampler="):
        next(iter(DataLoader(LABELS, sampler=sampler)))


class Column(dict):
    """As a pandas Series whose index does not start at 0: an array inside, found by names that are no positions."""

    def __array__(self, dtype=None, copy=None):
        return np.array([*self.values()])


ARRAYS = [np.array(LABELS, dtype=dtype) for dtype in (object, np.uint16)]
NUMPYS, TENSORS, SERIES = [*np.array(LABELS)], [*torch.tensor(LABELS)], Column(enumerate(LABELS, 100))


@pytest.mark.parametrize("given", [NUMPYS, TENSORS, SERIES, *ARRAYS])
def test_labels_in_any_container_give_the_same_batches(given):
    assert list(BalancedBatchSampler(given, 4, 3)) == list(BalancedBatchSampler(LABELS, 4, 3))


class Images(list, Dataset):
    """A data set that could be read like a list of labels, but not without decoding images."""


@pytest.mark.parametrize("given", [Images(LABELS), DataLoader(LABELS), iter(LABELS), {*LABELS}, {0: 1}, None, 3])
def test_a_data_set_in_place_of_labels_is_an_error_that_asks_for_labels(given):
    with pytest.raises(TypeError, match=rf"labels must be .* of ints.*got {type(given).__name__}.*targets"):
        BalancedBatchSampler(given, 2, 2)


def test_negative_labels_are_left_out():
    labels = [-1, *LABELS, -100, -1]
    sampler, without = (BalancedBatchSampler(some, 4, 3, n_batches=12) for some in (labels, LABELS))
    assert list(sampler) == [[index + 1 for index in batch] for batch in without]
    assert sampler.state_dict() == without.state_dict()
    assert len(BalancedBatchSampler(labels, 4, 3)) == len(LABELS) // 12
    with pytest.raises(ValueError, match=r"n_classes=2 .*labels have 1 beside 2 negative ones"):
        BalancedBatchSampler([-1, -1, 0, 0], 2, 2)


@pytest.mark.parametrize(
    ("labels", "n_samples", "reason"),
    [(LABELS, 1, "n_samples=1, take 2"), (range(8), 2, "no class has a second image")],
)
def test_batches_without_same_class_partners_are_warned_of(labels, n_samples, reason):
    with pytest.warns(UserWarning, match=rf"no image .*same class.*{reason}"):
        BalancedBatchSampler(labels, 4, n_samples)
    with no_warnings():
        BalancedBatchSampler(LABELS, 4, 2)


NUMBERS = ("n_classes", "n_samples", "n_batches", "seed", "rank", "world_size")


def test_numpy_numbers_become_ints_so_that_a_state_loads_with_weights_only():
    arguments = dict(zip(NUMBERS, map(np.int64, (4, 2, 5, 3, 1, 2)), strict=True))
    sampler, resumed = (BalancedBatchSampler(LABELS, **arguments) for _ in range(2))
    sampler.set_epoch(np.int64(2))
    state = sampler.state_dict(np.int32(3))
    resumed.load_state_dict({name: np.int64(value) for name, value in state.items()})
    numbers = [*state.values(), *(getattr(sampler, name) for name in (*NUMBERS, "epoch")), len(sampler)]
    assert all(type(value) is int for value in (*numbers, *resumed.state_dict().values()))
    assert list(resumed) == list(sampler)[3:]


def test_only_classes_that_are_drawn_are_shuffled(monkeypatch):
    shuffled, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: shuffled.append(n) or randperm(n, **options))
    labels = [label for label in range(1000) for _ in range(3)]
    sampler = BalancedBatchSampler(labels, 5, 2)
    next(iter(sampler))
    assert sorted(shuffled) == [3] * 5 + [1000]
    shuffled.clear()
    sampler.load_state_dict(sampler.state_dict(250))
    next(iter(sampler))
    assert len(shuffled) <= 5 * 2 + 1


def test_orders_of_a_class_come_up_equally_often():
    counts = Counter()
    sampler = BalancedBatchSampler([0] * 3, 1, 3, n_batches=1)
    for epoch in range(1200):
        sampler.set_epoch(epoch)
        counts[tuple(next(iter(sampler)))] += 1
    assert len(counts) == 6
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 25  # chi-squared, 5 degrees: p < 2e-4
