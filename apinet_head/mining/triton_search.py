"""The kernel that finds partners: squared distances and the choice among them, tile by tile, in registers.

    d_ij = |q_i|² + |k_j|² - 2 q_i·k_j       products on tensor cores, of rows made by `triton_rows`
    best_is = min_j (±d_ij, j)               over the candidates j of query i in slot s = j mod 8;
                                             + for the nearest, - for the farthest

`plain.py` is the same in plain PyTorch. No tile of distances leaves the registers. In a batch that is searched in
itself the tile of rows i and columns j has the candidates j of the queries i and the candidates i of the queries j, so
that only tiles on and above the diagonal are computed. Tiles meet in `best`, by an atomic minimum of 64-bit integers,
the distance above the index: it is the same in whatever order they come, and of equal distances the lowest index wins.
The minimum is not read first to spare the atomic: reading would wait for memory, an atomic without a result does not.

Near neighbours are often of one class, where products cannot tell them apart. As rows are in order of class, those of
one land in different slots, and are compared again by subtraction (`exact.best_of`).
"""

import triton
import triton.language as tl

from apinet_head.mining.exact import CLOSEST

SLOTS = tl.constexpr(CLOSEST)
NO_CANDIDATE = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # what `best` holds where there was no candidate
NO_INDEX = tl.constexpr(0x7FFFFFFF)
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
def products(queries, keys, row, column, WIDTH, SIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """-2 q·k of one tile, without the rows' weights, [SIDE, SIDE] float32.

    Tensor cores cut off bits when they add, so that long sums drift. They add up `CHANNELS` products at a time, and
    the sums of these are rounded as usual.
    """
    queries += (row * SIDE).to(tl.int64) * (2 * WIDTH)
    keys += (column * SIDE).to(tl.int64) * (2 * WIDTH)
    within = tl.arange(0, SIDE)[:, None] * (2 * WIDTH) + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        q = tl.load(queries + start + within)
        k = tl.load(keys + start + within).T
        part = tl.dot(tl.load(queries + WIDTH + start + within), k)
        part = tl.dot(q, k, part)
        part = tl.dot(q, tl.load(keys + WIDTH + start + within).T, part)
        total = part * -2.0 + total
    return total


@triton.jit
def offer(cost, index, target, best, QUERIES, SIDE: tl.constexpr):
    """Let the queries `target` choose from their costs [SIDE, SIDE]: a slot each the least, of equal ones the first.

    A cost of infinity means "not a candidate". `index` [SIDE] are the candidates' indices.
    """
    cost = tl.reshape(cost, [SIDE, SIDE // SLOTS, SLOTS])
    least = tl.min(cost, axis=1)
    index = tl.reshape(index, [1, SIDE // SLOTS, SLOTS])
    first = tl.min(tl.where(cost == least[:, None, :], index, NO_INDEX), axis=1)
    # Floating point numbers are ordered like their bits, but for negative ones, where it is the other way round.
    bits = tl.where(least == 0, 0.0, least).to(tl.int32, bitcast=True)  # 0 and -0 are one distance
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = tl.where(least < float("inf"), (bits.to(tl.int64) << 32) | first.to(tl.int64), NO_CANDIDATE)
    slot = target[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    tl.atomic_min(best + slot, packed, mask=(target < QUERIES)[:, None] & (packed < NO_CANDIDATE), sem="relaxed")


@triton.jit
def costs(product, squares, SIGN: tl.constexpr, AXIS: tl.constexpr):
    """SIGN times |k|² - 2 q·k, infinity where k may not be a partner. |q|² is left out: all candidates of q have it."""
    square = tl.where(squares < float("inf"), squares * SIGN, float("inf"))
    return product * SIGN + tl.expand_dims(square, 1 - AXIS)


@triton.jit
def same_class(i, j, starts, ends, QUERIES):
    """[SIDE, SIDE] bool: keys of one class are neighbours, from the position `starts` to `ends`."""
    start = tl.load(starts + i, mask=i < QUERIES, other=0)[:, None]
    end = tl.load(ends + i, mask=i < QUERIES, other=0)[:, None]
    return (start <= j[None, :]) & (j[None, :] < end)


@triton.jit
def offer_tile(
    product, i, j, candidate, target, squares, key_origin, query_origin, starts, ends, overlap, best, QUERIES, OFFSET,
    INTRA: tl.constexpr, INTER: tl.constexpr, SYMMETRIC: tl.constexpr, SIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Let the positions `target`, one side of the tile, choose among the positions `candidate`, the other side."""
    if INTRA != 0:
        if overlap:
            cost = costs(product, tl.load(squares + candidate), INTRA, AXIS)
            if SYMMETRIC:
                itself = i[:, None] == j[None, :]
            else:
                itself = (tl.load(query_origin + i) + OFFSET)[:, None] == tl.load(key_origin + j)[None, :]
            cost = tl.where(same_class(i, j, starts, ends, QUERIES) & ~itself, cost, float("inf"))
            offer(cost if AXIS == 1 else cost.T, tl.load(key_origin + candidate), target, best, QUERIES, SIDE)
        best += QUERIES * SLOTS
    if INTER != 0:
        cost = costs(product, tl.load(squares + candidate), INTER, AXIS)
        if overlap:
            cost = tl.where(same_class(i, j, starts, ends, QUERIES), float("inf"), cost)
        offer(cost if AXIS == 1 else cost.T, tl.load(key_origin + candidate), target, best, QUERIES, SIDE)


# Excluded from specialisation: Triton would compile another kernel for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["QUERIES", "KEYS", "OFFSET"])
def search(
    queries, keys, query_weights, key_weights, squares, query_origin, key_origin, starts, ends, best,
    QUERIES, KEYS, WIDTH, OFFSET,
    INTRA: tl.constexpr, INTER: tl.constexpr, SYMMETRIC: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr,
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
    product = products(queries, keys, row, column, WIDTH, SIDE, CHANNELS)
    product = product * tl.load(query_weights + i)[:, None] * tl.load(key_weights + j)[None, :]
    offer_tile(
        product, i, j, j, i, squares, key_origin, query_origin, starts, ends, overlap, best, QUERIES, OFFSET,
        INTRA, INTER, SYMMETRIC, SIDE, 1,
    )  # fmt: skip
    if SYMMETRIC:
        offer_tile(
            product, i, j, i, j, squares, key_origin, query_origin, starts, ends, overlap, best, QUERIES, OFFSET,
            INTRA, INTER, SYMMETRIC, SIDE, 0,
        )  # fmt: skip
