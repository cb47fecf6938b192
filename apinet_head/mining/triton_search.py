"""Kernels that find partners: squared distances and the choice among them, tile by tile, in registers.

    d_ij = |q_i|² + |k_j|² - 2 q_i·k_j       `search`: products on tensor cores, of rows made by `triton_rows`
    d_ij = Σ_c (q_ic - k_jc)²                `search_directly`: for small batches, of the features as they are
    best_i = min_j (±d_ij, j)                over the candidates j of query i, + for the nearest, - for the farthest

`dense.py` is the same in plain PyTorch. No tile of distances leaves the registers. In a batch that is searched in
itself the tile of rows i and columns j has the candidates j of the queries i and the candidates i of the queries j, so
that only tiles on and above the diagonal are computed. Tiles meet in `best`, by an atomic minimum of 64-bit integers,
the distance above the index: it is the same in whatever order they come, and of equal distances the lowest index wins.
The minimum is not read first to spare the atomic: reading would wait for memory, an atomic without a result does not.
"""

import os

import triton
import triton.language as tl

from apinet_head.mining.triton_rows import EDGE, INFINITY, scale_for

NOBODY = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # what `best` holds where there was no candidate
NO_INDEX = tl.constexpr(0x7FFFFFFF)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
COUNTS = ["QUERIES", "KEYS", "OFFSET"]  # for which Triton makes no kernel of its own if they are 1, or divide by 16
GROUP = tl.constexpr(8)  # rows of tiles that are worked off together, so that they find their columns in the L2 cache


@triton.jit
def place(QUERIES, KEYS, SYMMETRIC: tl.constexpr, SIDE: tl.constexpr):
    """Row and column of this program's tile: column by column within groups of rows.

    In a symmetric search row r, with T - r tiles from the diagonal on, and row T - 1 - r, with r + 1 tiles, make one
    line of T + 1 tiles, so that half a square is a rectangle. An odd T has the middle row twice, to no harm.
    """
    height, width = tl.cdiv(QUERIES, SIDE), tl.cdiv(KEYS, SIDE)
    lines = (height + 1) // 2 if SYMMETRIC else height
    length = width + 1 if SYMMETRIC else width
    group = tl.program_id(0) // (GROUP * length)
    within = tl.program_id(0) % (GROUP * length)
    members = tl.minimum(lines - group * GROUP, GROUP)
    row, column = group * GROUP + within % members, within // members
    if SYMMETRIC:
        upper = column > row
        row, column = tl.where(upper, row, height - 1 - row), tl.where(upper, column - 1, width - 1 - column)
    return row, column


@triton.jit
def offer(cost, index, target, best, QUERIES, AXIS: tl.constexpr):
    """Let the queries `target` choose the least cost along the axis, and of equal ones the lowest index.

    A cost of infinity is no candidate. `index` are the candidates' indices, or pointers to them.
    """
    least = tl.min(cost, axis=AXIS)
    if index.dtype.is_ptr():
        index = tl.load(index)
    equal = cost == tl.expand_dims(least, AXIS)
    first = tl.min(tl.where(equal, tl.expand_dims(index, 1 - AXIS), NO_INDEX), axis=AXIS)
    # Floating point numbers are ordered like their bits, but for negative ones, where it is the other way round.
    bits = tl.where(least == 0, 0.0, least).to(tl.int32, bitcast=True)  # 0 and -0 are one distance
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (bits.to(tl.int64) << 32) | first.to(tl.int64)
    packed = tl.where(least < float("inf"), packed, NOBODY)
    tl.atomic_min(best + target, packed, mask=target < QUERIES, sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def search_directly(
    queries, keys, query_labels, key_labels, peaks, top, best,
    QUERIES, KEYS, DIM, QUERY_STRIDE, KEY_STRIDE, OFFSET,
    INTRA: tl.constexpr, INTER: tl.constexpr, SYMMETRIC: tl.constexpr, SCALED: tl.constexpr,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile [SIDE, SIDE] of distances by subtraction, which needs no centre and cancels nothing."""
    row, column = place(QUERIES, KEYS, SYMMETRIC, SIDE)
    i, j = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    scale = scale_for(top, SCALED, False)
    query = queries + i.to(tl.int64)[:, None] * QUERY_STRIDE
    key = keys + j.to(tl.int64)[:, None] * KEY_STRIDE
    total = tl.zeros([SIDE, SIDE, CHANNELS], tl.float32)
    for start in range(0, DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        q = tl.load(query + channel, mask=(i < QUERIES)[:, None] & (channel < DIM), other=0).to(tl.float32) * scale
        k = tl.load(key + channel, mask=(j < KEYS)[:, None] & (channel < DIM), other=0).to(tl.float32) * scale
        # The clamp makes numbers of NaN too: a row that is not finite still finds some partner.
        difference = tl.clamp(q, -EDGE, EDGE)[:, None, :] - tl.clamp(k, -EDGE, EDGE)[None, :, :]
        total += difference * difference
    distance = tl.sum(total, axis=2)

    finite = (tl.load(peaks + j, mask=j < KEYS, other=INFINITY) < INFINITY)[None, :]
    label_i = tl.load(query_labels + i, mask=i < QUERIES, other=0)[:, None]
    label_j = tl.load(key_labels + j, mask=j < KEYS, other=0)[None, :]
    same, itself = label_i == label_j, i[:, None] + OFFSET == j[None, :]
    if SYMMETRIC:
        finite_row = (tl.load(peaks + i, mask=i < QUERIES, other=INFINITY) < INFINITY)[:, None]
    if INTRA != 0:
        cost = tl.where(same & ~itself, distance * INTRA, float("inf"))
        offer(tl.where(finite, cost, float("inf")), j, i, best, QUERIES, 1)
        if SYMMETRIC:
            offer(tl.where(finite_row, cost, float("inf")), i, j, best, QUERIES, 0)
        best += QUERIES
    if INTER != 0:
        cost = tl.where(same, float("inf"), distance * INTER)
        offer(tl.where(finite, cost, float("inf")), j, i, best, QUERIES, 1)
        if SYMMETRIC:
            offer(tl.where(finite_row, cost, float("inf")), i, j, best, QUERIES, 0)


@triton.jit
def products(queries, keys, row, column, WIDTH, SPLIT: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """-2 q·k of one tile, [SIDE, SIDE] float32.

    Tensor cores cut off bits when they add, so that long sums drift. They add up `CHANNELS` products at a time, and
    the sums of these are rounded as usual.
    """
    LENGTH = WIDTH * (2 if SPLIT else 1)
    queries += (row * SIDE).to(tl.int64) * LENGTH
    keys += (column * SIDE).to(tl.int64) * LENGTH
    within = tl.arange(0, SIDE)[:, None] * LENGTH + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        q = tl.load(queries + start + within)
        k = tl.load(keys + start + within).T
        if SPLIT:
            part = tl.dot(tl.load(queries + WIDTH + start + within), k)
            part = tl.dot(q, k, part)
            part = tl.dot(q, tl.load(keys + WIDTH + start + within).T, part)
        elif INTERPRETED:  # its products of bfloat16 are those of integers with the same bits
            part = tl.dot(q.to(tl.float32), k.to(tl.float32))
        else:
            part = tl.dot(q, k)
        total = part * -2.0 + total
    return total


@triton.jit
def same_class(i, j, starts, ends, QUERIES):
    """[SIDE, SIDE] bool: keys of one class are neighbours, from the position `starts` to `ends`."""
    start = tl.load(starts + i, mask=i < QUERIES, other=0)[:, None]
    end = tl.load(ends + i, mask=i < QUERIES, other=0)[:, None]
    return (start <= j[None, :]) & (j[None, :] < end)


@triton.jit
def costs(product, squares, SIGN: tl.constexpr, AXIS: tl.constexpr):
    """SIGN times |k|² - 2 q·k, infinity where k is nobody's partner. |q|² is left out: all candidates of q have it."""
    square = tl.load(squares)
    square = tl.where(square < float("inf"), square * SIGN, float("inf"))
    return product * SIGN + tl.expand_dims(square, 1 - AXIS)


@triton.jit
def offer_tile(
    product, i, j, candidate, target, squares, key_origin, query_origin, starts, ends, overlap, best, QUERIES, OFFSET,
    INTRA: tl.constexpr, INTER: tl.constexpr, SYMMETRIC: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Let the positions `target`, one side of the tile, choose among the positions `candidate`, the other side."""
    if INTER != 0:
        cost = costs(product, squares + candidate, INTER, AXIS)
        if overlap:
            cost = tl.where(same_class(i, j, starts, ends, QUERIES), float("inf"), cost)
        offer(cost, key_origin + candidate, target, best + QUERIES * (INTRA != 0), QUERIES, AXIS)
    if INTRA != 0:
        if overlap:
            cost = costs(product, squares + candidate, INTRA, AXIS)
            if SYMMETRIC:
                itself = i[:, None] == j[None, :]
            else:
                itself = (tl.load(query_origin + i) + OFFSET)[:, None] == tl.load(key_origin + j)[None, :]
            cost = tl.where(same_class(i, j, starts, ends, QUERIES) & ~itself, cost, float("inf"))
            offer(cost, key_origin + candidate, target, best, QUERIES, AXIS)


@triton.jit(do_not_specialize=COUNTS)
def search(
    queries, keys, squares, weights, query_origin, key_origin, starts, ends, best,
    QUERIES, KEYS, WIDTH, OFFSET,
    INTRA: tl.constexpr, INTER: tl.constexpr, SYMMETRIC: tl.constexpr, SPLIT: tl.constexpr,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of distances from rows in order of their class; the results come in that order."""
    row, column = place(QUERIES, KEYS, SYMMETRIC, SIDE)
    # Most tiles have no class in both their rows and their columns: nothing of the same class to find, nothing to mask.
    begin, end = tl.load(starts + row * SIDE), tl.load(ends + tl.minimum(row * SIDE + SIDE, QUERIES) - 1)
    overlap = (begin < column * SIDE + SIDE) & (end > column * SIDE)
    if INTER == 0:
        if not overlap:
            return
    i, j = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    product = products(queries, keys, row, column, WIDTH, SPLIT, SIDE, CHANNELS)
    if weights is not None:
        product = product * tl.load(weights + i)[:, None]
    offer_tile(
        product, i, j, j, i, squares, key_origin, query_origin, starts, ends, overlap, best, QUERIES, OFFSET,
        INTRA, INTER, SYMMETRIC, 1,
    )  # fmt: skip
    if SYMMETRIC:
        offer_tile(
            product, i, j, i, j, squares, key_origin, query_origin, starts, ends, overlap, best, QUERIES, OFFSET,
            INTRA, INTER, SYMMETRIC, 0,
        )  # fmt: skip
