"""The kernels that make feature rows ready for `triton_search`: what `rows.about_the_bulk` does, for tensor cores.

    y_i = scale (x_p(i) - centre) = w_i (high_i + low_i)    p sorts the rows by label, w_i is a power of two
    s_i = |y_i|²                                            infinity where the row may not be a partner

Tensor cores take half precision. A row is stored as two float16 rows, which keep 22 of float32's 24 bits and mostly
all: high·high + high·low + low·high is as good as a product in float32 (Ootomo, Yokota, "Recovering single precision
accuracy from Tensor Cores", 2022), at twice the speed of TF32 in as many parts. As every row has a weight of its own,
rows far from the others fit float16's range too, and take no bits from those.
"""

import triton
import triton.language as tl

LIFT = tl.constexpr(13)  # a row's peak is near 2**13 in float16: what `low` cannot hold is smaller
GOLDEN = tl.constexpr(0.6180339887498949)
EDGE = tl.constexpr(2.0**50)  # a value so far from the bulk, near 2**-20, is as good as here, where squares are finite


@triton.jit
def power_of_two(exponent):
    """2**exponent, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def shifted(x, row, channel, usable, centre, scale, DIM, STRIDE):
    """y [rows, channels] of the rows `row` of x, 0 where there is nothing or the row is not usable."""
    inside = usable[:, None] & (channel < DIM)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=inside, other=0).to(tl.float32)
    value = value * scale - (tl.load(centre + channel, mask=channel < DIM, other=0) * scale)[None, :]
    return tl.where(inside, tl.clamp(value, -EDGE, EDGE), 0)


@triton.jit(do_not_specialize=["SIZE"])
def look(x, labels, usable, largest, SIZE, DIM, STRIDE, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Which rows are finite and have a class, and the largest absolute value in those."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < SIZE
    peak = tl.zeros([ROWS], tl.float32)
    finite = row == row
    for start in range(0, DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = there[:, None] & (channel < DIM)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=inside, other=0).to(tl.float32)
        odd = tl.where(tl.abs(value) < float("inf"), 0, 1)
        finite &= tl.max(odd, axis=1) == 0
        peak = tl.maximum(peak, tl.max(tl.where(odd == 0, tl.abs(value), 0), axis=1))
    finite &= there & (tl.load(labels + row, mask=there, other=-1) >= 0)
    tl.store(usable + row, finite, mask=there)
    tl.atomic_max(largest, tl.max(tl.where(finite, peak, 0), axis=0))


@triton.jit
def sample_of(counts, SIZE, STEPS, SAMPLE: tl.constexpr):
    """Usable rows [SAMPLE], scattered as `rows.bulk` does it, found by bisection in the counts of usable rows."""
    share = (tl.arange(0, SAMPLE) + 1).to(tl.float32) * GOLDEN
    asked = ((share - tl.floor(share)) * tl.load(counts + SIZE - 1).to(tl.float32)).to(tl.int32) + 1
    low, high = tl.zeros([SAMPLE], tl.int32), tl.zeros([SAMPLE], tl.int32) + (SIZE - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        beyond = (tl.load(counts + middle) < asked) & (low < high)
        low, high = tl.where(beyond, middle + 1, low), tl.where(beyond, high, middle)
    return high


@triton.jit
def ordinal(values, AXIS: tl.constexpr, SAMPLE: tl.constexpr):
    """The place of each value [SAMPLE, C] among those of its column, were they sorted."""
    index = tl.arange(0, SAMPLE)
    first = (index[:, None] < index[None, :])[:, :, None]  # of equal values
    one, other = values[:, None, :], values[None, :, :]
    return tl.sum(((one < other) | ((one == other) & first)).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["SIZE", "STEPS"])
def find_centre(
    x, counts, centre, spread, SIZE, STEPS, DIM, STRIDE, SAMPLE: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The median of a sample, by channel, and how far the rows of the sample are from it."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = sample_of(counts, SIZE, STEPS, SAMPLE).to(tl.int64)
    inside = (row[:, None] >= 0) & (channel < DIM)[None, :]
    value = tl.load(x + row[:, None] * STRIDE + channel[None, :], mask=inside, other=0).to(tl.float32)
    value = tl.where(tl.abs(value) < float("inf"), value, 0)
    middle = tl.sum(tl.where(ordinal(value, 0, SAMPLE) == (SAMPLE - 1) // 2, value, 0), axis=0)
    tl.store(centre + channel, middle, mask=channel < DIM)
    # Halved, as the difference of two finite numbers may overflow.
    tl.atomic_max(spread + tl.arange(0, SAMPLE), tl.max(tl.abs(value / 2 - middle[None, :] / 2), axis=1))


@triton.jit
def scale_of(spread, largest, SAMPLE: tl.constexpr, BULK: tl.constexpr):
    """The scale of `rows.bulk`: a power of two that brings the bulk of the rows near 2**BULK."""
    value = tl.load(spread + tl.arange(0, SAMPLE))
    same = tl.sum((value == 0).to(tl.int32), axis=0)
    quartile = tl.minimum(same + (SAMPLE - same) // 4, SAMPLE - 1)
    place = tl.reshape(ordinal(value[:, None], 0, SAMPLE), [SAMPLE])
    typical = tl.sum(tl.where(place == quartile, value, 0), axis=0)
    typical = tl.where(typical > 0, typical, tl.load(largest))
    bits = typical.to(tl.int32, bitcast=True)
    ceiling = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(BULK - 1 - ceiling, -126), 126)
    return power_of_two(tl.where(typical > 0, exponent, 0))


@triton.jit(do_not_specialize=["SIZE"])
def lay_out(
    x, order, usable, centre, spread, largest, rows, weights, squares, origin,
    SIZE, DIM, STRIDE, WIDTH, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SAMPLE: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Write the sorted rows as [N, 2, WIDTH], N up to whole tiles, with zeros where there is nothing."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + position, mask=position < SIZE, other=0)
    there = tl.load(usable + row, mask=position < SIZE, other=0) != 0
    scale = scale_of(spread, largest, SAMPLE, BULK)
    peak, square = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        y = shifted(x, row, start + tl.arange(0, CHANNELS), there, centre, scale, DIM, STRIDE)
        peak = tl.maximum(peak, tl.max(tl.abs(y), axis=1))
        square += tl.sum(y * y, axis=1)
    exponent = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) - 127, -100) - LIFT
    tl.store(weights + position, power_of_two(exponent))
    tl.store(squares + position, tl.where(there, square, float("inf")))
    tl.store(origin + position, row.to(tl.int32))
    lift = power_of_two(-exponent)[:, None]
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        y = shifted(x, row, channel, there, centre, scale, DIM, STRIDE) * lift
        place = rows + position.to(tl.int64)[:, None] * (2 * WIDTH) + channel[None, :]
        high = y.to(tl.float16)
        tl.store(place, high, mask=(channel < WIDTH)[None, :])
        tl.store(place + WIDTH, (y - high.to(tl.float32)).to(tl.float16), mask=(channel < WIDTH)[None, :])
