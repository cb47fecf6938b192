"""The kernels that compare by subtraction in float64: exact for all finite rows in half or single precision.

    d_ij   = sum_c (q_ic - k_jc)²
    best_i = min_j (±d_ij, j)        + for the nearest, - for the farthest

`search_directly` compares a query with all keys, which suits small batches: one launch, no preparation. `choose`
compares it with the few candidates that `triton_search` leaves.
"""

import triton
import triton.language as tl

from apinet_head.mining.triton_search import NO_CANDIDATE, NO_INDEX, SLOTS


@triton.jit
def distances(query, keys, row, there, DIM, STRIDE, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Squared distances [ROWS] of a query from the keys `row`; infinite or NaN for keys that are not finite.

    What is not finite in the query is taken as 0, so that it has no effect on which keys are usable.
    """
    total = tl.zeros([ROWS, CHANNELS], tl.float64)
    for start in range(0, DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        q = tl.load(query + channel, mask=channel < DIM, other=0).to(tl.float64)
        q = tl.where(tl.abs(q) < float("inf"), q, 0)
        inside = there[:, None] & (channel < DIM)[None, :]
        k = tl.load(keys + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=inside, other=0)
        difference = q[None, :] - k.to(tl.float64)
        total += tl.where(inside, difference * difference, 0)
    return tl.sum(total, axis=1)


@triton.jit
def least(distance, row, candidate, best, first, SIGN: tl.constexpr):
    """The best cost among these rows and the best before, and its row: the first of equal ones, as rows ascend."""
    cost = tl.where(candidate, distance * SIGN, float("inf"))
    lowest = tl.min(cost, axis=0)
    place = tl.min(tl.where(cost == lowest, row, NO_INDEX), axis=0)
    return tl.where(lowest < best, lowest, best), tl.where(lowest < best, place, first)


@triton.jit(do_not_specialize=["QUERIES", "KEYS", "OFFSET"])
def search_directly(
    features, keys, labels, key_labels, partner, valid, QUERIES, KEYS, OFFSET, DIM, STRIDE, KEY_STRIDE,
    INTRA: tl.constexpr, INTER: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The partners of one query, of its class and of another."""
    i = tl.program_id(0)
    label = tl.load(labels + i)
    same_cost, other_cost = tl.full([], float("inf"), tl.float64), tl.full([], float("inf"), tl.float64)
    same_row, other_row = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, KEYS, ROWS):
        j = start + tl.arange(0, ROWS)
        there = j < KEYS
        key_label = tl.load(key_labels + j, mask=there, other=0)
        distance = distances(features + i.to(tl.int64) * STRIDE, keys, j, there, DIM, KEY_STRIDE, ROWS, CHANNELS)
        candidate = there & (distance < float("inf")) & (key_label >= 0) & (j != i + OFFSET)
        if INTRA != 0:
            same_cost, same_row = least(distance, j, candidate & (key_label == label), same_cost, same_row, INTRA)
        if INTER != 0:
            other_cost, other_row = least(distance, j, candidate & (key_label != label), other_cost, other_row, INTER)
    if INTRA != 0:
        tl.store(partner + i, same_row.to(tl.int64))
        tl.store(valid + i, (same_cost < float("inf")) & (label >= 0))
        partner += QUERIES
        valid += QUERIES
    if INTER != 0:
        tl.store(partner + i, other_row.to(tl.int64))
        tl.store(valid + i, (other_cost < float("inf")) & (label >= 0))


@triton.jit(do_not_specialize=["QUERIES"])
def choose(
    best, order, features, keys, labels, partner, valid, QUERIES, DIM, STRIDE, KEY_STRIDE,
    FIRST_SIGN: tl.constexpr, SECOND_SIGN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The partner of one query in one search, of the candidates that `triton_search` packed into `best`."""
    position, search = tl.program_id(0), tl.program_id(1)
    i = tl.load(order + position)
    packed = tl.load(best + (search.to(tl.int64) * QUERIES + position) * SLOTS + tl.arange(0, SLOTS))
    j, there = (packed & 0xFFFFFFFF).to(tl.int32), packed < NO_CANDIDATE
    distance = distances(features + i * STRIDE, keys, j, there, DIM, KEY_STRIDE, SLOTS, CHANNELS)
    cost = tl.where(there, distance * tl.where(search == 0, FIRST_SIGN, SECOND_SIGN), float("inf"))
    first = tl.min(tl.where(there & (cost == tl.min(cost, axis=0)), j, NO_INDEX), axis=0)
    found = first < NO_INDEX
    tl.store(partner + search * QUERIES + i, tl.where(found, first, 0).to(tl.int64))
    tl.store(valid + search * QUERIES + i, found & (tl.load(labels + i) >= 0))
