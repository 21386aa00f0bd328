"""Attention in 8 bits in Triton: functions that generated files are made of, as those of :mod:`.functions`.

They follow :mod:`tahf4_compiler.ops.attention` step by step. With EXACT they round as it does; without, the power of 2
is that of the chip, and sums may be fused multiply-adds. Bytes of probabilities are those of the reference but where
one lies beside the border of two.

**Whole numbers as floats.** A sum of products of bytes stays below 2**22. Added to the bits of 1.5 * 2**23 it is the
mantissa of a float, and one subtraction makes it the number itself, where a conversion takes twice as long. So the
accumulators of int8 products begin at these bits.

**Unsigned probabilities.** Matrix units take both sides signed here, so 128 is taken off the probabilities, and the
products with the values begin at 128 times the sum of the 64 values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import int8_scale, whole


@triton.jit
def larger(a, b):
    """Return the larger of two numbers, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power_of_2(x, EXACT: tl.constexpr):
    """Return 2**x: that of the chip, or the polynomial of the reference, which is at least 2**-126."""
    if EXACT:
        x = tl.where(x < -126.0, -126.0, x)
        shifted = x + 12582912.0
        rest = x - (shifted - 12582912.0)
        found = tl.full(x.shape, 0.00958285, tl.float32)
        found = found * rest + 0.05590642
        found = found * rest + 0.24024099
        found = found * rest + 0.69312419
        found = found * rest + 1.0
        whole_bits = (shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23
        result = found * whole_bits.to(tl.float32, bitcast=True)
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def dots(a, b, start):
    """Return a product of bytes as float32, exactly; ``start`` is what the sums begin at, plus 0x4B400000."""
    return tl.dot(a, b, start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def quantize_values(
    values, codes, scales, starts, heads, keys, channels, batch_step, head_step, key_step, channel_step,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Quantize 64 tokens of some channels: codes [.., tiles, channels, 64], scales and starts [.., tiles, channels]."""
    tiles = tl.cdiv(keys, 64)
    part = tl.program_id(0).to(tl.int64)
    head = part // tiles
    key = part % tiles * 64 + tl.arange(0, 64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at = values + head // heads * batch_step + head % heads * head_step
    at += key[:, None] * key_step + channel[None, :].to(tl.int64) * channel_step
    x = tl.load(at, mask=(key < keys)[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    finite = most < 0x7F800000
    factor, scale = int8_scale(most, finite)
    found = tl.where(finite[None, :], whole(x, factor[None, :]), 0)
    unit = part * channels + channel
    tl.store(scales + unit, scale, mask=channel < channels)
    tl.store(starts + unit, tl.sum(found, axis=0) * 128 + 0x4B400000, mask=channel < channels)
    at = codes + unit[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(at, tl.trans(found).to(tl.int8), mask=(channel < channels)[:, None])


@triton.jit
def added_mask(mask, at, inside, BOOLEAN: tl.constexpr):
    """Return what a mask adds to the scores, for a softmax to the base of 2."""
    value = tl.load(mask + at, mask=inside, other=0)
    if BOOLEAN:
        added = tl.where(value != 0, 0.0, float("-inf"))
    else:
        value = value.to(tl.float32)
        added = value * 1.4426950408889634
        most = 3.4028234663852886e38
        infinite = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000
        added = tl.where(infinite, added, tl.minimum(tl.maximum(added, -most), most))
    return added


@triton.jit
def attend_tile(
    tile, q_parts, q_factors, so_far, k, k_scales, v, v_scales, v_starts, mask, mask_at, column_step,
    row, rows, key_head, keys, channels, near,
    BM: tl.constexpr, C: tl.constexpr, UNITS: tl.constexpr, MASK: tl.constexpr,
    BOOLEAN: tl.constexpr, CAUSAL: tl.constexpr, BORDER: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return what rows have so far, with 64 keys more. BORDER: some rows may not see some of them."""
    most, total, sums = so_far
    lane = tl.arange(0, 64)
    key = tile * 64 + lane
    place = lane
    if BORDER:
        place = tl.minimum(key, keys - 1) - tile * 64
    first = (key_head * keys + tile * 64) * UNITS
    scores = tl.zeros((BM, 64), tl.float32)
    for unit in tl.static_range(UNITS):
        codes = tl.load(k + first * 64 + (place * (UNITS * 64))[None, :] + unit * 64 + lane[:, None])
        dot = dots(q_parts[unit], codes, tl.full((BM, 64), 0x4B400000, tl.int32))
        part = dot * tl.load(k_scales + first + place * UNITS + unit)[None, :] * q_factors[unit][:, None]
        if unit == 0:
            scores = part
        else:
            scores = scores + part
    if MASK == 1:  # the same for every row
        at = mask_at + key.to(tl.int64) * column_step
        scores = scores + added_mask(mask, at, key < keys, BOOLEAN)[None, :]
    if MASK == 2:
        at = mask_at[:, None] + key[None, :].to(tl.int64) * column_step
        scores = scores + added_mask(mask, at, (row < rows)[:, None] & (key < keys)[None, :], BOOLEAN)
    if BORDER:
        visible = (key < keys)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= row[:, None])
        scores = tl.where(visible, scores, float("-inf"))

    tile_most = tl.reduce(scores, 1, larger)
    tile_most = tl.where(tile_most == float("inf"), float("nan"), tile_most)
    seen = tile_most != float("-inf")
    scores = scores - tl.where(seen, tile_most, 0.0)[:, None]
    if EXACT:
        rounded = tl.minimum(power_of_2(scores + 7.994353436858858, True), 255.0) + 12582784.0
    else:
        rounded = power_of_2(scores, False) * 255.0 + 12582784.0
    codes = rounded.to(tl.int32, bitcast=True) - 0x4B3FFF80  # 12582784 is 1.5 * 2**23 - 128: its lowest byte is signed
    tile_total = tl.sum(codes, axis=1).to(tl.float32)
    new_most = larger(most, tile_most)
    before = tl.where(seen, power_of_2(most - new_most, EXACT), 1.0)
    now = tl.where(seen, power_of_2(tile_most - new_most, EXACT), 0.0)
    weights = rounded.to(tl.int32, bitcast=True).to(tl.int8)
    first = (key_head * tl.cdiv(keys, 64) + tile) * channels
    values = tl.load(v + first * 64 + (near * 64)[None, :] + lane[:, None])
    start = tl.broadcast_to(tl.load(v_starts + first + near)[None, :], (BM, C))
    found = dots(weights, values, start) * tl.load(v_scales + first + near)[None, :] * now[:, None]
    found = sums * before[:, None] + found
    if MASK > 0 or BORDER:  # a value that is NaN does not reach rows that see none of these keys
        found = tl.where(seen[:, None], found, sums)
    return tl.where(seen, new_most, most), total * before + tile_total * now, found


@triton.jit
def attend(
    q, q_scales, k, k_scales, v, v_scales, v_starts, mask, out, lse, factor, heads, shared, rows, keys, channels,
    mask_batch, mask_head, mask_row, mask_column, out_batch, out_head, out_row, out_column,
    BM: tl.constexpr, C: tl.constexpr, UNITS: tl.constexpr, MASK: tl.constexpr,
    BOOLEAN: tl.constexpr, CAUSAL: tl.constexpr, LSE: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute BM rows and C channels of the result from all keys, and with LSE the log-sum-exp of the rows."""
    blocks = tl.cdiv(rows, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * BM  # causal rows with many keys first
    row = first_row + tl.arange(0, BM)
    key_head = head // shared
    channel = tl.program_id(1) * C + tl.arange(0, C)
    near = tl.minimum(channel, channels - 1)
    q_row = head * rows + tl.minimum(row, rows - 1)
    lane = tl.arange(0, 64)
    q_parts = ()
    q_factors = ()
    for unit in tl.static_range(UNITS):
        codes = tl.load(q + ((q_row * UNITS + unit) * 64)[:, None] + lane[None, :])
        q_parts = q_parts + (codes,)
        q_factors = q_factors + (tl.load(q_scales + q_row * UNITS + unit) * factor,)
    mask_at = head // heads * mask_batch + head % heads * mask_head
    if MASK == 2:
        mask_at = mask_at + row.to(tl.int64) * mask_row
    most = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, C), tl.float32)
    tiles = tl.cdiv(keys, 64)
    whole_tiles = keys // 64
    if CAUSAL:
        tiles = tl.minimum(tiles, tl.cdiv(first_row + BM, 64))
        whole_tiles = 0  # a second loop would cost registers
    for tile in tl.range(0, whole_tiles, num_stages=STAGES):
        most, total, sums = attend_tile(
            tile, q_parts, q_factors, (most, total, sums), k, k_scales, v, v_scales, v_starts, mask, mask_at,
            mask_column, row, rows, key_head, keys, channels, near,
            BM, C, UNITS, MASK, BOOLEAN, CAUSAL, False, EXACT,
        )  # fmt: skip
    for tile in tl.range(whole_tiles, tiles, num_stages=STAGES):
        most, total, sums = attend_tile(
            tile, q_parts, q_factors, (most, total, sums), k, k_scales, v, v_scales, v_starts, mask, mask_at,
            mask_column, row, rows, key_head, keys, channels, near,
            BM, C, UNITS, MASK, BOOLEAN, CAUSAL, True, EXACT,
        )  # fmt: skip
    result = tl.div_rn(sums, tl.broadcast_to(total[:, None], (BM, C)))
    result = tl.where(total[:, None] == 0.0, 0.0, result).to(out.dtype.element_ty)
    at = out + head // heads * out_batch + head % heads * out_head
    at += row[:, None].to(tl.int64) * out_row + channel[None, :].to(tl.int64) * out_column
    tl.store(at, result, mask=(row < rows)[:, None] & (channel < channels)[None, :])
    if LSE:
        # The largest probability is 255. log2(0) and the largest of no scores are minus infinity.
        found = (most + tl.log2(total * 0.00392156862745098)) * 0.6931471805599453
        if tl.program_id(1) == 0:  # others have other channels of the same rows
            tl.store(lse + head * rows + row, found, mask=row < rows)
