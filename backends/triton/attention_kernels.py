"""Attention in 8 bits in Triton: functions that generated files are made of, as those of :mod:`.functions`.

They follow :mod:`tahf4_compiler.ops.attention` step by step. With EXACT they round as it does; without, the power of 2
is that of the chip, and sums may be fused multiply-adds. Bytes of probabilities are those of the reference but where
one lies beside the border of two.

**Whole numbers as floats.** A sum of products of bytes stays below 2**22. Added to the bits of 1.5 * 2**23 it is the
mantissa of a float, and one subtraction makes it the number itself, where a conversion takes twice as long. So the
accumulators of int8 products begin at these bits.

**Values in 16 bits.** Then probabilities have 16 bits, too, and are relative to the largest score so far, so that the
matrix units add up all keys: no scale follows each 64 of them. The factor of a row of queries, which is not negative,
is part of the fused multiply-add before the power of 2.

**Unsigned probabilities.** Matrix units take both sides signed here, so 128 is taken off the probabilities, and the
products with the values begin at 128 times the sum of the 64 values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import hadamard_tile, int8_scale, to_hif4_tile, to_int8_tile, whole


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
def added_product(a, b, c, EXACT: tl.constexpr):
    """Return a * b + c, rounded once, or twice as the reference does."""
    if EXACT:
        found = a * b + c
    else:
        found = tl.fma(a, b, c)
    return found


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
def tile_scores(
    tile, q_parts, q_factors, k, k_scales, mask, mask_at, column_step, row, rows, key_head, keys,
    BM: tl.constexpr, N: tl.constexpr, UNITS: tl.constexpr, MASK: tl.constexpr, BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr, BORDER: tl.constexpr, JOINT: tl.constexpr, FOLDED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return the scores of N keys, and where the keys lie, counted from the first of them.

    BORDER: some rows may not see some of them. JOINT: the units of a row have one scale. FOLDED: the factors of the
    rows are left out.
    """
    lane = tl.arange(0, 64)
    key = tile * N + tl.arange(0, N)
    place = tl.arange(0, N)
    if BORDER:
        place = tl.minimum(key, keys - 1) - tile * N
    first = (key_head * keys + tile * N) * UNITS
    scores = tl.zeros((BM, N), tl.float32)
    sums = tl.full((BM, N), 0x4B400000, tl.int32)
    for unit in tl.static_range(UNITS):
        codes = tl.load(k + first * 64 + (place * (UNITS * 64))[None, :] + unit * 64 + lane[:, None])
        if JOINT:
            sums = tl.dot(q_parts[unit], codes, sums, out_dtype=tl.int32)
        else:
            dot = dots(q_parts[unit], codes, tl.full((BM, N), 0x4B400000, tl.int32))
            part = dot * tl.load(k_scales + first + place * UNITS + unit)[None, :]
            if unit == 0:
                scores = part * q_factors[unit][:, None]
            else:
                scores = added_product(part, tl.broadcast_to(q_factors[unit][:, None], (BM, N)), scores, EXACT)
    if JOINT:
        scores = sums.to(tl.float32, bitcast=True) - 12582912.0
        scores = scores * tl.load(k_scales + first + place * UNITS)[None, :]
        if not FOLDED:
            scores = scores * q_factors[0][:, None]
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
    return scores, place


@triton.jit
def with_bytes(
    tile, scores, so_far, v, v_scales, v_starts, key_head, keys, channels, near,
    BM: tl.constexpr, C: tl.constexpr, SELECT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return what rows have so far, with 64 values in 8 bits more. SELECT: some rows may see none of them."""
    most, total, sums = so_far
    lane = tl.arange(0, 64)
    tile_most = tl.reduce(scores, 1, larger)
    tile_most = tl.where(tile_most == float("inf"), float("nan"), tile_most)
    seen = tile_most != float("-inf")
    scores = scores - tl.where(seen, tile_most, 0.0)[:, None]
    if EXACT:
        rounded = tl.minimum(power_of_2(scores + 7.994353436858858, True), 255.0) + 12582784.0
    else:
        rounded = tl.fma(power_of_2(scores, False), 255.0, 12582784.0)
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
    found = added_product(sums, tl.broadcast_to(before[:, None], (BM, C)), found, EXACT)
    if SELECT:  # a value that is NaN does not reach rows that see none of these keys
        found = tl.where(seen[:, None], found, sums)
    return tl.where(seen, new_most, most), total * before + tile_total * now, found


@triton.jit
def with_values(
    scores, place, so_far, q_factor, v, v_key, v_channel, channel, channels, SELECT: tl.constexpr, FOLDED: tl.constexpr
):
    """Return what rows have so far, with some values in 16 bits more; v: where the first of them begins."""
    most, total, sums = so_far
    tile_most = tl.reduce(scores, 1, larger)
    tile_most = tl.where(tile_most == float("inf"), float("nan"), tile_most)
    if FOLDED:  # a factor is not negative
        tile_most = tile_most * q_factor
    new_most = larger(most, tile_most)
    base = tl.where(new_most == float("-inf"), 0.0, new_most)
    base_of_rows = tl.broadcast_to(base[:, None], scores.shape)
    if FOLDED:
        weights = tl.exp2(tl.fma(scores, tl.broadcast_to(q_factor[:, None], scores.shape), -base_of_rows))
    else:
        weights = tl.exp2(scores - base_of_rows)
    before = tl.exp2(most - base)
    at = v + place[:, None] * v_key + (channel * v_channel)[None, :]
    values = tl.load(at, mask=(channel < channels)[None, :], other=0.0)  # clamped channels would not be read at once
    found = tl.dot(weights.to(values.dtype), values, sums * before[:, None])
    if SELECT:
        found = tl.where((tile_most != float("-inf"))[:, None], found, sums)
    return new_most, total * before + tl.sum(weights, axis=1), found


@triton.jit
def attend_tile(
    tile, q_parts, q_factors, so_far, k, k_scales, v, v_scales, v_starts, v_key, v_channel, mask, mask_at, column_step,
    row, rows, key_head, keys, channel, channels,
    BM: tl.constexpr, N: tl.constexpr, C: tl.constexpr, UNITS: tl.constexpr, MASK: tl.constexpr,
    BOOLEAN: tl.constexpr, CAUSAL: tl.constexpr, BORDER: tl.constexpr, BYTES: tl.constexpr, JOINT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Return what rows have so far, with N keys more. BORDER: some rows may not see some of them."""
    FOLDED: tl.constexpr = JOINT and not (BORDER or MASK > 0)
    scores, place = tile_scores(
        tile, q_parts, q_factors, k, k_scales, mask, mask_at, column_step, row, rows, key_head, keys,
        BM, N, UNITS, MASK, BOOLEAN, CAUSAL, BORDER, JOINT, FOLDED, EXACT,
    )  # fmt: skip
    if BYTES:
        near = tl.minimum(channel, channels - 1)
        found = with_bytes(
            tile, scores, so_far, v, v_scales, v_starts, key_head, keys, channels, near,
            BM, C, MASK > 0 or BORDER, EXACT,
        )  # fmt: skip
    else:
        at = v + tl.cast(tile, tl.int64) * N * v_key
        found = with_values(
            scores, place, so_far, q_factors[0], at, v_key, v_channel, channel, channels, MASK > 0 or CAUSAL, FOLDED
        )
    return found


@triton.jit
def store_units(
    x, codes, scales, multiplier, head, heads, row, rows, channels,
    BM: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, FACTOR: tl.constexpr,
    ROUNDING: tl.constexpr, MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """Rotate and quantize channels of a head, which are whole units of a row of all heads."""
    first = head % heads * channels + tl.program_id(1) * C
    if MULTIPLIER:
        x = x * tl.load(multiplier + first + tl.arange(0, C))[None, :]
    if LEVELS > 0:
        x = hadamard_tile(x, BM, C, LEVELS, FACTOR)
    if BITS == 4:
        words, found = to_hif4_tile(x, BM, C, ROUNDING)
    else:
        words, found = to_int8_tile(x, BM, C)
    units = heads * channels // 64
    place = (head // heads * rows + row)[:, None] * units + first // 64
    row_mask = (row < rows)[:, None]
    tl.store(scales + place + tl.arange(0, C // 64)[None, :], found, mask=row_mask)
    WORDS: tl.constexpr = 2 * BITS  # of a unit
    tl.store(codes + place * WORDS + tl.arange(0, C // 64 * WORDS)[None, :], words, mask=row_mask)


@triton.jit
def attend(
    q, q_scales, k, k_scales, v, v_scales, v_starts, mask, out, lse, factor, heads, shared, rows, keys, channels,
    v_batch, v_head, v_key, v_channel, mask_batch, mask_head, mask_row, mask_column,
    out_batch, out_head, out_row, out_column, out_codes, out_scales, multiplier,
    BM: tl.constexpr, N: tl.constexpr, C: tl.constexpr, UNITS: tl.constexpr, MASK: tl.constexpr,
    BOOLEAN: tl.constexpr, CAUSAL: tl.constexpr, LSE: tl.constexpr, BYTES: tl.constexpr, JOINT: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, FACTOR: tl.constexpr,
    ROUNDING: tl.constexpr, MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """Compute BM rows and C channels of the result from all keys, and with LSE the log-sum-exp of the rows.

    BYTES: values are codes, as quantize_values writes them; without, they have 16 bits. JOINT: the units of a row of q,
    and of k, have one scale. BITS: the result is not written as it is, but quantized to so many bits; 0 for neither.
    """
    blocks = tl.cdiv(rows, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * BM  # causal rows with many keys first
    row = first_row + tl.arange(0, BM)
    key_head = head // shared
    channel = tl.program_id(1) * C + tl.arange(0, C)
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
    if not BYTES:
        v += head // heads * v_batch + head % heads // shared * v_head
    tiles = tl.cdiv(keys, N)
    whole_tiles = keys // N
    if CAUSAL:
        tiles = tl.minimum(tiles, tl.cdiv(first_row + BM, N))
        whole_tiles = 0  # a second loop would cost registers
    for tile in tl.range(0, whole_tiles, num_stages=STAGES):
        most, total, sums = attend_tile(
            tile, q_parts, q_factors, (most, total, sums), k, k_scales, v, v_scales, v_starts, v_key, v_channel,
            mask, mask_at, mask_column, row, rows, key_head, keys, channel, channels,
            BM, N, C, UNITS, MASK, BOOLEAN, CAUSAL, False, BYTES, JOINT, EXACT,
        )  # fmt: skip
    for tile in tl.range(whole_tiles, tiles, num_stages=STAGES):
        most, total, sums = attend_tile(
            tile, q_parts, q_factors, (most, total, sums), k, k_scales, v, v_scales, v_starts, v_key, v_channel,
            mask, mask_at, mask_column, row, rows, key_head, keys, channel, channels,
            BM, N, C, UNITS, MASK, BOOLEAN, CAUSAL, True, BYTES, JOINT, EXACT,
        )  # fmt: skip
    result = tl.div_rn(sums, tl.broadcast_to(total[:, None], (BM, C)))
    result = tl.where(total[:, None] == 0.0, 0.0, result).to(out.dtype.element_ty)
    if BITS > 0:
        store_units(
            result.to(tl.float32), out_codes, out_scales, multiplier, head, heads, row, rows, channels,
            BM, C, BITS, LEVELS, FACTOR, ROUNDING, MULTIPLIER,
        )  # fmt: skip
    else:
        at = out + head // heads * out_batch + head % heads * out_head
        at += row[:, None].to(tl.int64) * out_row + channel[None, :].to(tl.int64) * out_column
        tl.store(at, result, mask=(row < rows)[:, None] & (channel < channels)[None, :])
    if LSE:
        # The largest probability is 255. log2(0) and the largest of no scores are minus infinity.
        found = (most + tl.log2(total * 0.00392156862745098)) * 0.6931471805599453
        if tl.program_id(1) == 0:  # others have other channels of the same rows
            tl.store(lse + head * rows + row, found, mask=row < rows)
