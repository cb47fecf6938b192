"""The kernel that makes feature rows ready for `triton_search`: what `rows.Rows` does, for tensor cores.

    y_i = scale (x_p(i) - centre) = w_i (high_i + low_i)    p sorts the rows by label, w_i is a power of two
    s_i = |y_i|²                                            infinity where the row is to be nobody's partner

Tensor cores take half precision. A row is stored as two float16 rows, which keep 22 of float32's 24 bits and mostly
all: high·high + high·low + low·high is as good as a product in float32 (Ootomo, Yokota, "Recovering single precision
accuracy from Tensor Cores", 2022), at twice the speed of TF32 in as many parts. As every row has a weight of its own,
rows far from the others fit float16's range too, and take no bits from those.
"""

import triton
import triton.language as tl

LIFT = tl.constexpr(13)  # a row's peak is near 2**13 in float16: what `low` cannot hold is smaller
EDGE = tl.constexpr(2.0**50)  # a value so far from the bulk, near 2**-20, is as good as here, where squares are finite


@triton.jit
def power_of_two(exponent):
    """2**exponent, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def shifted(x, row, channel, usable, shift, scale, DIM, STRIDE):
    """y [rows, channels] of the rows `row` of x, 0 where there is nothing or the row is not usable."""
    inside = usable[:, None] & (channel < DIM)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=inside, other=0).to(tl.float32)
    value = value * scale - tl.load(shift + channel, mask=channel < DIM, other=0)[None, :]
    return tl.where(inside, tl.clamp(value, -EDGE, EDGE), 0)


@triton.jit(do_not_specialize=["SIZE"])
def lay_out(
    x, order, usable, shift, scale, rows, weights, squares, origin,
    SIZE, DIM, STRIDE, WIDTH, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the sorted rows as [N, 2, WIDTH], N up to whole tiles, with zeros where there is nothing."""
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(order + position, mask=position < SIZE, other=0)
    there = tl.load(usable + row, mask=position < SIZE, other=0) != 0
    factor = tl.load(scale)
    peak, square = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        y = shifted(x, row, start + tl.arange(0, CHANNELS), there, shift, factor, DIM, STRIDE)
        peak = tl.maximum(peak, tl.max(tl.abs(y), axis=1))
        square += tl.sum(y * y, axis=1)
    exponent = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) - 127, -100) - LIFT
    tl.store(weights + position, power_of_two(exponent))
    tl.store(squares + position, tl.where(there, square, float("inf")))
    tl.store(origin + position, row.to(tl.int32))
    lift = power_of_two(-exponent)[:, None]
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        y = shifted(x, row, channel, there, shift, factor, DIM, STRIDE) * lift
        place = rows + position.to(tl.int64)[:, None] * (2 * WIDTH) + channel[None, :]
        high = y.to(tl.float16)
        tl.store(place, high, mask=(channel < WIDTH)[None, :])
        tl.store(place + WIDTH, (y - high.to(tl.float32)).to(tl.float16), mask=(channel < WIDTH)[None, :])
