"""Kernels that make feature rows ready for `triton_search`: what `rows.prepare` does, for tensor cores.

    y_i = scale x_p(i) - shift    p sorts the rows by label, scale is a power of two, shift [D] near the mean
    s_i = |y_i|²                  infinity where the row is not finite, and so is nobody's partner

Tensor cores take half precision. A float32 row is stored as two float16 rows, y = high + low, which keep 22 of its 24
bits and mostly all: high·high + high·low + low·high is as good as a product in float32 (Ootomo, Yokota, "Recovering
single precision accuracy from Tensor Cores", 2022), at twice the speed of TF32 in as many parts. A row of float16 or
bfloat16 stays exactly what it is: a channel is shifted only if the difference is exact for all rows. By Sterbenz's
lemma it is where all values are within a factor of two of the shift; where cancellation is bad, they are.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # the bits of float32's infinity; those of NaN are larger
LIFT = tl.constexpr(13)  # the peak of rows that become two of float16 is near 2**13: what `low` cannot hold is smaller
COUNTS = ["SIZE", "SHARES", "KEY_SHARES"]  # for which Triton makes no kernel of its own if they are 1, or divide by 16
EDGE = tl.constexpr(2.0**40)  # a value so far from all keys that nothing is lost by moving it here


@triton.jit
def magnitude(x):
    """The bits of |x|, which are ordered like |x| itself, with NaN above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(exponent):
    """2**exponent, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_for(top, SCALED: tl.constexpr, LIFTED: tl.constexpr):
    """The factor that brings the largest finite value, given by its bits, to [1, 2), or near 2**LIFT; or 1."""
    if SCALED:
        exponent = 127 - (tl.load(top) >> 23) + (LIFT if LIFTED else 0)
        return power_of_two(tl.minimum(tl.maximum(exponent, -126), 127))
    else:
        return 1.0


@triton.jit(do_not_specialize=COUNTS)
def measure(x, peaks, top, SIZE, DIM, STRIDE, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """peaks[i] = bits of max |x_i|, and top[0] = the largest of the finite ones (from 0)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    peak = tl.zeros([ROWS], tl.int32)
    for start in range(0, DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = (row < SIZE)[:, None] & (channel < DIM)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=inside, other=0)
        peak = tl.maximum(peak, tl.max(magnitude(value), axis=1))
    tl.store(peaks + row, peak, mask=row < SIZE)
    tl.atomic_max(top, tl.max(tl.where(peak < INFINITY, peak, 0), axis=0), sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def summarise(
    x, peaks, top, sums, lows, highs, counts,
    SIZE, DIM, STRIDE,
    SCALED: tl.constexpr, SPLIT: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum, least and largest of `SHARE` finite rows of x times the scale, per channel; one line of [shares, D] each."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    share = tl.program_id(1)
    scale = scale_for(top, SCALED, SPLIT)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    low = tl.full([ROWS, CHANNELS], float("inf"), tl.float32)
    high = tl.full([ROWS, CHANNELS], float("-inf"), tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for start in range(0, SHARE, ROWS):
        row = share * SHARE + start + tl.arange(0, ROWS)
        finite = tl.load(peaks + row, mask=row < SIZE, other=INFINITY) < INFINITY
        inside = finite[:, None] & (channel < DIM)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=inside, other=0)
        value = value.to(tl.float32) * scale
        total += value
        low = tl.minimum(low, tl.where(inside, value, float("inf")))
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        count += finite.to(tl.int32)
    line = share.to(tl.int64) * DIM + channel
    tl.store(sums + line, tl.sum(total, axis=0), mask=channel < DIM)
    tl.store(lows + line, tl.min(low, axis=0), mask=channel < DIM)
    tl.store(highs + line, tl.max(high, axis=0), mask=channel < DIM)
    tl.store(counts + share, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=COUNTS)
def choose_shift(
    sums, lows, highs, counts, shift, KEY_SHARES, SHARES, DIM,
    EXACT_IN: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The mean of the keys per channel; if it must be exact in a half precision, that rounded, or 0.

    The first `KEY_SHARES` of `SHARES` lines are the keys', the others those of queries that come from elsewhere.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([LINES, CHANNELS], tl.float32)
    low = tl.full([LINES, CHANNELS], float("inf"), tl.float32)
    high = tl.full([LINES, CHANNELS], float("-inf"), tl.float32)
    count = tl.zeros([LINES], tl.int32)
    for start in range(0, SHARES, LINES):
        share = start + tl.arange(0, LINES)
        inside = (share < SHARES)[:, None] & (channel < DIM)[None, :]
        line = share[:, None] * DIM + channel[None, :]
        total += tl.load(sums + line, mask=inside & (share < KEY_SHARES)[:, None], other=0)
        count += tl.load(counts + share, mask=share < KEY_SHARES, other=0)
        low = tl.minimum(low, tl.load(lows + line, mask=inside, other=float("inf")))
        high = tl.maximum(high, tl.load(highs + line, mask=inside, other=float("-inf")))
    centre = tl.sum(total, axis=0) / tl.maximum(tl.sum(count, axis=0), 1).to(tl.float32)
    if EXACT_IN is not None:
        centre = centre.to(EXACT_IN).to(tl.float32)
        # Sterbenz: x - centre is exact if centre/2 <= x <= 2 centre, or the same with all signs changed.
        low, high = tl.min(low, axis=0), tl.max(high, axis=0)
        least, most = tl.where(centre > 0, low, -high), tl.where(centre > 0, high, -low)
        size = tl.abs(centre)
        centre = tl.where((2 * least >= size) & (most <= 2 * size), centre, 0)
    tl.store(shift + channel, centre, mask=channel < DIM)


@triton.jit(do_not_specialize=COUNTS)
def lay_out(
    x, order, peaks, top, shift, rows, squares, origin, weights,
    SIZE, DIM, STRIDE, WIDTH,
    SCALED: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the sorted rows y as [N, 1 or 2, WIDTH], N up to whole tiles, with zeros where there is nothing.

    With `weights` the rows are queries from elsewhere: they may be too large for float16, and come as y/weight,
    the weight a power of two.
    """
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = position < SIZE
    row = tl.load(order + position, mask=there, other=0)
    peak = tl.load(peaks + row, mask=there, other=INFINITY)
    finite = peak < INFINITY
    scale = scale_for(top, SCALED, SPLIT)
    edge = 2.0**15 if SPLIT else EDGE
    if weights is not None:
        excess = tl.minimum(tl.maximum((peak >> 23) - (tl.load(top) >> 23) + 1, 0), 40)
        tl.store(weights + position, power_of_two(excess))
        shrink = power_of_two(-excess)[:, None]
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = finite[:, None] & (channel < DIM)[None, :]
        y = tl.load(x + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=inside, other=0).to(tl.float32)
        y = y * scale - tl.load(shift + channel, mask=channel < DIM, other=0)[None, :]
        if weights is not None:
            y = y * shrink
        y = tl.where(inside, tl.clamp(y, -edge, edge), 0)
        square += tl.sum(y * y, axis=1)
        place = rows + position.to(tl.int64)[:, None] * (WIDTH * (2 if SPLIT else 1)) + channel[None, :]
        high = y.to(rows.dtype.element_ty)
        tl.store(place, high, mask=(channel < WIDTH)[None, :])
        if SPLIT:
            low = (y - high.to(tl.float32)).to(rows.dtype.element_ty)
            tl.store(place + WIDTH, low, mask=(channel < WIDTH)[None, :])
    tl.store(squares + position, tl.where(finite, square, float("inf")))
    tl.store(origin + position, row.to(tl.int32))
