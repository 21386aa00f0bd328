"""HiF4 in Triton: the functions that generated kernels are built from.

They are never called from here: the text of those that a kernel needs is copied into its generated file, which then
depends on Triton alone. All of them follow :mod:`tahf4_compiler.format.hif4` step by step; integer operations do the
rounding.

**A thread holds a unit.** The 64 values of T units are a tuple of 16 tensors ``[T, 4]``: in the layout that the
compiler chooses for these, one thread has all values of a unit, so a rotation and all maxima are register operations.
(A tile ``[rows, columns]`` costs a shuffle or a round trip through shared memory for each level of a rotation: 121
instructions a value where this way has 25.) Kernels that quantize are compiled without fused multiply-adds, which
would change the bits of a rotation.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fours(x, T: tl.constexpr, WIDTH: tl.constexpr):
    """Take [T, 4] or [T, 8] apart into tensors [T, 4]."""
    if WIDTH == 4:
        found = (x,)
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, (T, 2, 4)), (0, 2, 1)))
        found = (low, high)
    return found


@triton.jit
def turned(x, cos, sin):
    """Turn the pairs of neighbouring columns of [R, C] by angles [R, C / 2]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def hadamard(parts, T: tl.constexpr, LEVELS: tl.constexpr, FACTOR: tl.constexpr):
    """Walsh-Hadamard transform of blocks of 2**LEVELS values, from stride 1 upwards; FACTOR comes last."""
    for level in tl.static_range(LEVELS):
        new = ()
        if level < 2:
            for i in tl.static_range(16):
                pairs = tl.reshape(parts[i], (T, 2 >> level, 2, 1 << level))
                low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
                pairs = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
                new = new + (tl.reshape(pairs, (T, 4)),)
        elif level < 6:
            for i in tl.static_range(16):
                if (i >> (level - 2)) & 1 == 1:
                    new = new + (parts[i - (1 << (level - 2))] - parts[i],)
                else:
                    new = new + (parts[i] + parts[i + (1 << (level - 2))],)
        else:  # blocks wider than a unit: between threads
            for i in tl.static_range(16):
                pairs = tl.reshape(parts[i], (T >> (level - 5), 2, 1 << (level - 6), 4))
                low, high = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
                pairs = tl.permute(tl.join(low + high, low - high), (0, 3, 1, 2))
                new = new + (tl.reshape(pairs, (T, 4)),)
        parts = new
    new = ()
    for i in tl.static_range(16):
        new = new + (parts[i] * FACTOR,)
    return new


@triton.jit
def round_bits(bits, DROP: tl.constexpr):
    """Round positive float32 bit patterns half to even, clearing the lowest DROP bits."""
    bits = bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)
    return (bits >> DROP) << DROP


@triton.jit
def level1_code(unit_max):
    """Return the E6M2 byte for the largest magnitude of each unit: bf16(max / 7), then two mantissa bits."""
    scale = round_bits((unit_max * 0.142578125).to(tl.int32, bitcast=True), 16).to(tl.float32, bitcast=True)
    scale = tl.minimum(tl.maximum(scale, 3.552713678800501e-15), 49152.0)
    return (round_bits(scale.to(tl.int32, bitcast=True), 21) >> 21) - 316


@triton.jit
def level1_reciprocal(code):
    """Return bf16(1 / E6M2) as float32, built from its bits."""
    mantissa = code & 3
    fraction = tl.where(mantissa == 1, 77, tl.where(mantissa == 2, 43, tl.where(mantissa == 3, 18, 0)))
    exponent = 175 - (code >> 2) - tl.where(mantissa > 0, 1, 0)
    return ((exponent << 23) | (fraction << 16)).to(tl.float32, bitcast=True)


@triton.jit
def in_group(quotient, ROUNDING: tl.constexpr):
    """Round what becomes an element to bfloat16 first, if ROUNDING says so: an index of FORM_ROUNDINGS."""
    if ROUNDING == 1:
        quotient = round_bits(quotient.to(tl.int32, bitcast=True), 16).to(tl.float32, bitcast=True)
    return quotient


@triton.jit
def elements(part, maximum, reciprocal, e8, finite, ROUNDING: tl.constexpr):
    """Return the level-3 bits [T] and the four elements [T], in 16 bits, of a group of 4 with its maximum (bits)."""
    half = tl.where(e8 == 1, 0.5, 1.0)
    e16 = (maximum.to(tl.float32, bitcast=True) * reciprocal * half >= 2.0).to(tl.int32)
    factor = reciprocal * (tl.where(e8 == 1, 2.0, 4.0) * tl.where(e16 == 1, 0.5, 1.0))  # times a power of two
    bits = part.to(tl.int32, bitcast=True)
    quotient = in_group((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * factor[:, None], ROUNDING)
    element = tl.minimum(quotient + 0.5, 7.5).to(tl.int32)  # not negative: towards zero is down
    element = tl.where(finite[:, None], element | ((bits >> 28) & 8), 0)
    return e16, tl.sum(element << (4 * tl.arange(0, 4)[None, :]), axis=1)


@triton.jit
def group_maxima(parts, T: tl.constexpr):
    """Return the largest magnitudes (bits) of the 16 groups of 4, a tuple of int32 [T], and of the units."""
    maxima = ()
    most = tl.zeros((T,), tl.int32)
    for i in tl.static_range(16):
        # As integers: ordered as the magnitudes, infinities and NaN above all others.
        maximum = tl.max(parts[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        maxima = maxima + (maximum,)
        most = tl.maximum(most, maximum)
    return maxima, most


@triton.jit
def to_hif4(parts, T: tl.constexpr, ROUNDING: tl.constexpr):
    """Convert units to a tuple of 8 words int32 [T], eight elements each, and the metadata int32 [T]."""
    maxima, most = group_maxima(parts, T)
    words, metadata = encoded(parts, maxima, most, T, ROUNDING)
    return words, metadata


@triton.jit
def span_maximum(most, U, SPAN, T: tl.constexpr, SPANS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the largest of most (int32 [T], units of whole rows of U) among those that share a scale with each [T].

    SPAN: units that share one, a power of two or U; SPANS, WIDTH: powers of two, no less than the spans of these rows
    and than SPAN.
    """
    of_row = (U + SPAN - 1) // SPAN
    place = tl.arange(0, SPANS * WIDTH)
    span = place // WIDTH
    column = span % of_row * SPAN + place % WIDTH
    unit = span // of_row * U + column
    inside = (column < U) & (unit < T)
    found = tl.where(inside, tl.gather(most, tl.where(inside, unit, 0), axis=0), 0)
    largest = tl.max(tl.reshape(found, (SPANS, WIDTH)), axis=1)
    local = tl.arange(0, T)
    mine = local // U * of_row + local % U // SPAN
    return tl.gather(largest, tl.minimum(mine, SPANS - 1), axis=0)


@triton.jit
def group_errors(magnitude, maximum, max8, code, first):
    """Return the squared errors [...] of groups of 4 under level-1 scales: sums of whole numbers.

    magnitude: float32 [..., 4]; maximum, max8: [...], of the groups of 4 and of 8; code, first: int32 that broadcast to
    [...], the scale, and the one whose power of two is 256.
    """
    grain = ((183 - (first >> 2)) << 23).to(tl.float32, bitcast=True)
    reciprocal = level1_reciprocal(code)
    e8 = max8 * reciprocal >= 4.0
    e16 = maximum * reciprocal * tl.where(e8, 0.5, 1.0) >= 2.0
    quarters = tl.where(e8, 2.0, 4.0) * tl.where(e16, 0.5, 1.0)
    step = level1(code) * grain * tl.where(e8, 2.0, 1.0) * tl.where(e16, 2.0, 1.0)
    last: tl.constexpr = len(magnitude.shape) - 1
    # What is added to comes from a product with a power of two: fused or not, the sum is the same.
    scaled = (magnitude * tl.expand_dims(reciprocal, last)) * tl.expand_dims(quarters, last)
    element = tl.minimum(tl.floor(scaled + 0.5), 7.0)
    off = tl.floor(magnitude * tl.expand_dims(grain, last) + 0.5) - element * tl.expand_dims(step, last)
    return tl.sum(off * off, axis=last)


@triton.jit
def unit_errors(parts, maxima, code, first, T: tl.constexpr):
    """Return the squared errors [T] of units under level-1 scales [T]."""
    total = tl.zeros((T,), tl.float32)
    for i in tl.static_range(16):
        max8 = tl.maximum(maxima[i], maxima[i ^ 1]).to(tl.float32, bitcast=True)
        magnitude = (parts[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        total += group_errors(magnitude, maxima[i].to(tl.float32, bitcast=True), max8, code, first)
    return total


@triton.jit
def least_error_code(parts, maxima, first, T: tl.constexpr):
    """Return the level-1 scales [T] of least squared error: the given ones, or one of the next three."""
    best = first
    least = unit_errors(parts, maxima, first, first, T)
    for more in range(1, 4):
        code = tl.minimum(first + more, 0xFE)
        error = unit_errors(parts, maxima, code, first, T)
        best = tl.where(error < least, code, best)
        least = tl.where(error < least, error, least)
    return best


@triton.jit
def encoded(parts, maxima, most, T: tl.constexpr, ROUNDING: tl.constexpr):
    """Return words and metadata of units by the largest magnitudes of their groups, and that of the level-1 scale."""
    finite = most < 0x7F800000
    code = level1_code(tl.where(finite, most, 0).to(tl.float32, bitcast=True))
    if ROUNDING == 2:
        code = least_error_code(parts, maxima, code, T)
    reciprocal = level1_reciprocal(code)
    metadata = code
    words = ()
    for i in tl.static_range(8):
        max8 = tl.maximum(maxima[2 * i], maxima[2 * i + 1]).to(tl.float32, bitcast=True)
        e8 = (max8 * reciprocal >= 4.0).to(tl.int32)
        e16_low, low = elements(parts[2 * i], maxima[2 * i], reciprocal, e8, finite, ROUNDING)
        e16_high, high = elements(parts[2 * i + 1], maxima[2 * i + 1], reciprocal, e8, finite, ROUNDING)
        words = words + (low | (high << 16),)
        metadata += (e8 << (8 + i)) + (e16_low << (16 + 2 * i)) + (e16_high << (17 + 2 * i))
    return words, tl.where(finite, metadata, 0xFF)


@triton.jit
def store_hif4(codes, scales, unit, mask, words, metadata, T: tl.constexpr):
    """Write units [T]: 32 bytes of codes (as int32) and 4 of metadata each."""
    for half in tl.static_range(2):
        even = tl.join(words[4 * half], words[4 * half + 2])
        odd = tl.join(words[4 * half + 1], words[4 * half + 3])
        four = tl.reshape(tl.join(even, odd), (T, 4))
        at = codes + (unit * 8)[:, None] + 4 * half + tl.arange(0, 4)[None, :]
        tl.store(at, four, mask=mask[:, None])
    tl.store(scales + unit, metadata, mask=mask)


@triton.jit
def whole(x, factor):
    """Round x * factor, at most 127, to whole numbers, half to even: as a sum with 1.5 * 2**23 is rounded."""
    return (x * factor + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def int8_scale(most, finite):
    """Return the factor and the scale of units in 8 bits, from their largest magnitudes (bits)."""
    found = tl.maximum(tl.where(finite, most, 0).to(tl.float32, bitcast=True), 7.888609052210118e-31)
    factor = tl.div_rn(tl.zeros_like(found) + 127.0, found)
    return factor, tl.where(finite, found * 0.007874015748031496, float("nan"))


@triton.jit
def int8_maximum(parts, T: tl.constexpr):
    """Return the largest magnitudes (bits) of units, int32 [T]."""
    most = tl.zeros((T,), tl.int32)
    for i in tl.static_range(16):
        most = tl.maximum(most, tl.max(parts[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    return most


@triton.jit
def encoded_int8(parts, most):
    """Return 16 words int32 [T] of units, four bytes each, and scales float32 [T], by the largest magnitudes."""
    finite = most < 0x7F800000
    factor, scale = int8_scale(most, finite)
    words = ()
    for i in tl.static_range(16):
        codes = tl.where(finite[:, None], whole(parts[i], factor[:, None]) & 255, 0)
        words = words + (tl.sum(codes << (8 * tl.arange(0, 4)[None, :]), axis=1),)
    return words, scale


@triton.jit
def to_int8(parts, T: tl.constexpr):
    """Convert units to a tuple of 16 words int32 [T], four bytes each, and the scale float32 [T]."""
    return encoded_int8(parts, int8_maximum(parts, T))


@triton.jit
def store_int8(codes, scales, unit, mask, words, scale, T: tl.constexpr):
    """Write units [T]: 64 bytes of codes (as int32) and the scale of each."""
    for quarter in tl.static_range(4):
        even = tl.join(words[4 * quarter], words[4 * quarter + 2])
        odd = tl.join(words[4 * quarter + 1], words[4 * quarter + 3])
        four = tl.reshape(tl.join(even, odd), (T, 4))
        at = codes + (unit * 16)[:, None] + 4 * quarter + tl.arange(0, 4)[None, :]
        tl.store(at, four, mask=mask[:, None])
    tl.store(scales + unit, scale, mask=mask)


@triton.jit
def to_int8_tile(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As to_int8, for a tile: words int32 [ROWS, COLUMNS / 4] and scales float32 [ROWS, COLUMNS / 64]."""
    UNITS: tl.constexpr = COLUMNS // 64
    values = tl.reshape(x, (ROWS, UNITS, 16, 4))
    most = tl.max(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=3), axis=2)
    finite = most < 0x7F800000
    factor, scale = int8_scale(most, finite)
    codes = tl.where(finite[:, :, None, None], whole(values, factor[:, :, None, None]) & 255, 0)
    words = tl.sum(codes << (8 * tl.arange(0, 4)[None, None, None, :]), axis=3)
    return tl.reshape(words, (ROWS, UNITS * 16)), scale


@triton.jit
def hadamard_tile(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr, FACTOR: tl.constexpr):
    """As hadamard, for a tile [ROWS, COLUMNS] in the layout of a product, by sums over pairs: no layout changes."""
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(x, (ROWS, COLUMNS >> (level + 1), 2, 1 << level))
        upper = tl.arange(0, 2)[None, None, :, None] == 1
        total = tl.expand_dims(tl.sum(pairs, axis=2), 2)
        difference = tl.expand_dims(tl.sum(tl.where(upper, -pairs, pairs), axis=2), 2)
        x = tl.reshape(tl.where(upper, difference, total), (ROWS, COLUMNS))
    return x * FACTOR


@triton.jit
def tile_errors(absolute, max4, max8, code, first):
    """As unit_errors, for bits [ROWS, UNITS, 8, 2, 4]."""
    magnitude, maximum = absolute.to(tl.float32, bitcast=True), max4.to(tl.float32, bitcast=True)
    max8 = max8.to(tl.float32, bitcast=True)[:, :, :, None]
    errors = group_errors(magnitude, maximum, max8, code[:, :, None, None], first[:, :, None, None])
    return tl.sum(tl.sum(errors, axis=3), axis=2)


@triton.jit
def least_error_tile(absolute, max4, max8, first):
    """As least_error_code, for bits [ROWS, UNITS, 8, 2, 4]."""
    best = first
    least = tile_errors(absolute, max4, max8, first, first)
    for more in range(1, 4):
        code = tl.minimum(first + more, 0xFE)
        error = tile_errors(absolute, max4, max8, code, first)
        best = tl.where(error < least, code, best)
        least = tl.where(error < least, error, least)
    return best


@triton.jit
def to_hif4_tile(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDING: tl.constexpr):
    """As to_hif4, for a tile: words int32 [ROWS, COLUMNS / 8] and metadata int32 [ROWS, COLUMNS / 64]."""
    UNITS: tl.constexpr = COLUMNS // 64
    bits = tl.reshape(x.to(tl.int32, bitcast=True), (ROWS, UNITS, 8, 2, 4))
    absolute = bits & 0x7FFFFFFF
    max4 = tl.max(absolute, axis=4)
    max8 = tl.max(max4, axis=3)
    most = tl.max(max8, axis=2)
    finite = most < 0x7F800000
    code = level1_code(tl.where(finite, most, 0).to(tl.float32, bitcast=True))
    if ROUNDING == 2:
        code = least_error_tile(absolute, max4, max8, code)
    reciprocal = level1_reciprocal(code)
    e8 = max8.to(tl.float32, bitcast=True) * reciprocal[:, :, None] >= 4.0
    half = tl.where(e8, 0.5, 1.0)[:, :, :, None]
    e16 = max4.to(tl.float32, bitcast=True) * reciprocal[:, :, None, None] * half >= 2.0
    quarters = tl.where(e8, 2.0, 4.0)[:, :, :, None] * tl.where(e16, 0.5, 1.0)
    factor = reciprocal[:, :, None, None] * quarters
    quotient = in_group(absolute.to(tl.float32, bitcast=True) * factor[:, :, :, :, None], ROUNDING)
    element = tl.minimum(quotient + 0.5, 7.5).to(tl.int32)
    element = tl.where(finite[:, :, None, None, None], element | ((bits >> 28) & 8), 0)
    place = 4 * tl.arange(0, 4)[None, None, None, None, :] + 16 * tl.arange(0, 2)[None, None, None, :, None]
    words = tl.sum(tl.sum(element << place, axis=4), axis=3)
    at8 = 8 + tl.arange(0, 8)[None, None, :]
    at16 = 16 + 2 * tl.arange(0, 8)[None, None, :, None] + tl.arange(0, 2)[None, None, None, :]
    metadata = code + tl.sum(e8.to(tl.int32) << at8, axis=2)
    metadata += tl.sum(tl.sum(e16.to(tl.int32) << at16, axis=3), axis=2)
    return tl.reshape(words, (ROWS, UNITS * 8)), tl.where(finite, metadata, 0xFF)


@triton.jit
def level1(scales):
    """Return a quarter of the level-1 scale of units as float32: elements count quarters."""
    code = scales & 0xFF
    value = ((((code >> 2) + 77) << 23) | ((code & 3) << 21)).to(tl.float32, bitcast=True)
    return tl.where(code == 0xFF, float("nan"), value)


@triton.jit
def even_and_odd(codes, scales, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Return the even and the odd elements of units as int32 [ROWS, UNITS, 32], at most 28 in magnitude.

    codes: uint8 [ROWS, UNITS * 32]; scales: int32 [ROWS, UNITS].
    """
    packed = tl.reshape(codes, (ROWS, UNITS, 32)).to(tl.int32)
    byte = tl.arange(0, 32)[None, None, :]
    shift = ((scales[:, :, None] >> (8 + byte // 4)) & 1) + ((scales[:, :, None] >> (16 + byte // 2)) & 1)
    low = (packed & 7) << shift
    high = ((packed >> 4) & 7) << shift
    return tl.where(packed & 8 != 0, -low, low), tl.where(packed & 128 != 0, -high, high)


@triton.jit
def unpacked(codes, scales, ROWS: tl.constexpr):
    """Return the even and the odd values of one unit a row as bfloat16 [ROWS, 32]; exact."""
    even, odd = even_and_odd(codes, scales[:, None], ROWS, 1)
    factor = level1(scales)[:, None]
    even = tl.reshape(even, (ROWS, 32)).to(tl.float32) * factor
    odd = tl.reshape(odd, (ROWS, 32)).to(tl.float32) * factor
    return even.to(tl.bfloat16), odd.to(tl.bfloat16)
