"""HiFloat4 one number at a time: the slow, obvious oracle that the tensor code is tested against.

Written from the specification of the format (arXiv 2602.11287, "HiFloat4 Format for Language Model
Inference") with Python integers and `fractions.Fraction` only. Nothing here uses torch, numpy or the
processor's float32 unit, so an error in one of those cannot hide an error in the other. Python floats
(binary64) only carry values, exactly; every rounding is done by `round_binary`.

A unit is 64 values: 32 bits of metadata (`E6M2 | E1_8 << 8 | E1_16 << 16`) and 32 bytes of 4-bit codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

UNIT = 64
CODE_BYTES = UNIT // 2
NAN_SCALE = 0xFF
MAX_SCALE = 0xFE
MIN_SCALE_VALUE = Fraction(1, 2**48)
MAX_SCALE_VALUE = Fraction(49152)
FLOAT32_MAX = float((2 - Fraction(1, 2**23)) * 2**127)
ONE_SEVENTH = 0.142578125
"""bf16(1/7), step 2 of the conversion."""


# --- float arithmetic with one rounding -----------------------------------------------------------------


def power_of_two(exponent: int) -> Fraction:
    """2 to any integer power, exactly."""
    return Fraction(2) ** exponent


def floor_log2(magnitude: Fraction) -> int:
    """The exponent e with 2^e <= magnitude < 2^(e+1), for a positive magnitude."""
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return exponent - 1 if magnitude < power_of_two(exponent) else exponent


def round_binary(value: Fraction, precision: int, min_exponent: int, max_exponent: int) -> float:
    """Round to the nearest number with `precision` significant bits, ties to even.

    Below 2^min_exponent the spacing stays that of min_exponent (subnormals). A result of
    2^(max_exponent + 1) or more is infinite. A zero result is +0: the caller gives it a sign.
    """
    if value == 0:
        return 0.0
    magnitude = abs(value)
    spacing = power_of_two(max(floor_log2(magnitude), min_exponent) - precision + 1)
    rounded = round(magnitude / spacing) * spacing  # round() of a Fraction is exact, ties to even
    result = math.inf if rounded >= power_of_two(max_exponent + 1) else float(rounded)
    return -result if value < 0 else result


def round_float32(value: Fraction) -> float:
    """Round an exact number to float32: 24 bits, subnormals, overflow to infinity."""
    return round_binary(value, precision=24, min_exponent=-126, max_exponent=127)


def multiply_float32(a: float, b: float) -> float:
    """The float32 product of two float32 numbers, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    return math.copysign(round_float32(Fraction(a) * Fraction(b)), sign)


def add_float32(a: float, b: float) -> float:
    """The float32 sum of two float32 numbers, rounded once."""
    if not (math.isfinite(a) and math.isfinite(b)) or a == b == 0:
        return a + b
    return round_float32(Fraction(a) + Fraction(b))


def round_bfloat16(value: float) -> float:
    """Round a float32 number to bfloat16: 8 bits, ties to even."""
    if not math.isfinite(value):
        return value
    rounded = round_binary(Fraction(value), precision=8, min_exponent=-126, max_exponent=127)
    return math.copysign(rounded, value)


def to_float32(value: float) -> float:
    """Take an input of any float type to float32: finite values saturate, the sign of zero stays."""
    if not math.isfinite(value):
        return value
    clamped = max(-FLOAT32_MAX, min(FLOAT32_MAX, value))
    return math.copysign(round_float32(Fraction(clamped)), value)


# --- level 1 ---------------------------------------------------------------------------------------------


def decode_scale(scale: int) -> Fraction:
    """The value of a finite E6M2 byte: 6-bit exponent with bias 48, 2-bit mantissa, hidden 1."""
    if not 0 <= scale <= MAX_SCALE:
        raise ValueError(f"{scale:#x} is no finite E6M2 byte: expected 0 to 0xfe")
    return Fraction(4 + scale % 4, 4) * power_of_two(scale // 4 - 48)


def encode_scale(value: Fraction) -> int:
    """The E6M2 byte of a number in [2^-48, 49152], rounded to 2 mantissa bits, ties to even (step 3)."""
    exponent = floor_log2(value)
    quarters = round(value / power_of_two(exponent) * 4)  # 4 to 8; 8 carries into the exponent
    return (exponent + 48) * 4 + quarters - 4


def level1_scale(largest: float) -> int:
    """The E6M2 byte of a unit whose largest magnitude is this finite float32 number (steps 2 and 3)."""
    factor = Fraction(round_bfloat16(multiply_float32(largest, ONE_SEVENTH)))
    return encode_scale(min(max(factor, MIN_SCALE_VALUE), MAX_SCALE_VALUE))


def reciprocal(scale: int) -> float:
    """bf16(1 / E6M2) of a finite E6M2 byte (step 4)."""
    return round_bfloat16(round_float32(1 / decode_scale(scale)))


# --- one unit --------------------------------------------------------------------------------------------


def magnitude_of(product: float, exponent: int, rounding: str) -> int:
    """The 3-bit magnitude for |x| * rec under e8 + e16 = exponent (step 6)."""
    quarters = multiply_float32(product, float(power_of_two(2 - exponent)))
    if rounding == "half_away":
        rounded = math.floor(Fraction(add_float32(quarters, 0.5)))
    elif rounding == "half_even":
        rounded = round(Fraction(quarters))
    else:
        raise ValueError(f"rounding is {rounding!r}: expected 'half_away' or 'half_even'")
    return min(7, rounded)


def quantize_unit(
    values: Sequence[float], rounding: str = "half_away", span: Sequence[float] | None = None
) -> tuple[int, bytes]:
    """Convert 64 numbers to one unit: (32 bits of metadata, 32 bytes of codes).

    A unit that holds NaN or an infinity has metadata 0x000000FF and zero codes. `span`: all the values that share
    the level-1 scale, and NaN and infinities with it.
    """
    if len(values) != UNIT:
        raise ValueError(f"a unit of {len(values)} values: expected {UNIT}")
    inputs = [to_float32(value) for value in values]
    shared = [to_float32(value) for value in (span if span is not None else values)]
    if not all(math.isfinite(value) for value in shared):
        return NAN_SCALE, bytes(CODE_BYTES)
    magnitudes = [abs(value) for value in inputs]

    scale = level1_scale(max(abs(value) for value in shared))
    rec = reciprocal(scale)
    metadata = scale
    exponent_of_8 = []
    for group in range(8):
        largest = max(magnitudes[8 * group : 8 * group + 8])
        exponent_of_8.append(1 if multiply_float32(largest, rec) >= 4 else 0)
        metadata |= exponent_of_8[group] << (8 + group)
    exponent_of_16 = []
    for group in range(16):
        largest = max(magnitudes[4 * group : 4 * group + 4])
        halved = multiply_float32(multiply_float32(largest, rec), 0.5 ** exponent_of_8[group // 2])
        exponent_of_16.append(1 if halved >= 2 else 0)
        metadata |= exponent_of_16[group] << (16 + group)

    codes = bytearray(CODE_BYTES)
    for index in range(UNIT):
        exponent = exponent_of_8[index // 8] + exponent_of_16[index // 4]
        sign = 1 if math.copysign(1.0, inputs[index]) < 0 else 0
        magnitude = magnitude_of(multiply_float32(magnitudes[index], rec), exponent, rounding)
        codes[index // 2] |= (sign << 3 | magnitude) << (4 * (index % 2))
    return metadata, bytes(codes)


def element_value(metadata: int, code: int, index: int) -> Fraction:
    """The exact value of a 4-bit code at position `index` of a unit; the sign of a zero is lost."""
    exponent = (metadata >> (8 + index // 8) & 1) + (metadata >> (16 + index // 4) & 1)
    value = decode_scale(metadata & 0xFF) * power_of_two(exponent) * Fraction(code & 7, 4)
    return -value if code & 8 else value


def dequantize_unit(metadata: int, codes: Sequence[int]) -> list[float]:
    """The 64 values of a unit; binary64 holds each exactly, -0 included. A NaN scale gives 64 NaN."""
    if metadata & 0xFF == NAN_SCALE:
        return [math.nan] * UNIT
    values = []
    for index in range(UNIT):
        code = codes[index // 2] >> (4 * (index % 2)) & 0xF
        magnitude = abs(float(element_value(metadata, code, index)))
        values.append(-magnitude if code & 8 else magnitude)
    return values


# --- a row of any length ---------------------------------------------------------------------------------


def quantize_row(
    values: Sequence[float], rounding: str = "half_away", span: int = 1
) -> tuple[list[int], bytes]:
    """Convert K numbers, padded with +0 to whole units: (metadata of each unit, 32 bytes of codes each).

    `span` units share a level-1 scale; 0 for all of the row.
    """
    padded = [*values, *[0.0] * (-len(values) % UNIT)]
    width = span * UNIT or len(padded)
    metadata: list[int] = []
    codes = b""
    for start in range(0, len(padded), UNIT):
        first = start - start % width
        unit_metadata, unit_codes = quantize_unit(
            padded[start : start + UNIT], rounding, padded[first : first + width]
        )
        metadata.append(unit_metadata)
        codes += unit_codes
    return metadata, codes


def dequantize_row(metadata: Sequence[int], codes: Sequence[int], k: int) -> list[float]:
    """The first k values of a row of units."""
    values: list[float] = []
    for unit, unit_metadata in enumerate(metadata):
        values += dequantize_unit(unit_metadata, codes[CODE_BYTES * unit : CODE_BYTES * (unit + 1)])
    return values[:k]


# --- inputs that land on a threshold ---------------------------------------------------------------------


def next_float32(value: float, steps: int = 1) -> float:
    """The float32 number `steps` above a positive float32 number (below it for negative steps)."""
    for _ in range(abs(steps)):
        exponent = max(floor_log2(Fraction(value)), -126)
        spacing = power_of_two(exponent - 23)
        if steps < 0 and Fraction(value) == power_of_two(exponent) and exponent > -126:
            spacing /= 2
        value = float(Fraction(value) + (spacing if steps > 0 else -spacing))
    return value


def smallest_reaching(product: Fraction, rec: float) -> float:
    """The smallest positive float32 number whose float32 product with `rec` is at least `product`."""
    value = next_float32(round_float32(product / Fraction(rec)), -4)
    while multiply_float32(value, rec) < product:
        value = next_float32(value)
    return value


def threshold_units(scale: int) -> list[list[float]]:
    """Units with this level-1 scale whose other values lie on, or one float32 step from, every threshold.

    The first value, 7 times the scale, fixes the scale. Each other group of 8 tests a threshold of |x| * rec:
    4 (e8), 2 (e16 where e8 is 0), and n + 1/2 quarters under each of the factors 1, 2 and 4.
    """
    anchor = float(7 * decode_scale(scale))
    rec = reciprocal(scale)
    groups: list[list[float]] = []
    for product in (2, 4):  # alone in its group, in either half, on either side of the threshold
        reaching = smallest_reaching(Fraction(product), rec)
        for value in (reaching, next_float32(reaching, -1)):
            groups += [[value] + [0.0] * 7, [0.0] * 7 + [value]]
    large, middle = (float(Fraction(n) * decode_scale(scale)) for n in (6, 3))
    small = next_float32(smallest_reaching(Fraction(2), rec), -1)
    low = smallest_reaching(Fraction(4), rec)
    for exponent, companions in ((0, (0.0, 0.0)), (1, (middle, 0.0)), (1, (0.0, large)), (2, (large, 0.0))):
        thresholds = []
        for n in range(8 if exponent < 2 else 7):  # 7.5 times the scale would need the next scale
            reaching = smallest_reaching(Fraction(2 * n + 1, 8) * power_of_two(exponent), rec)
            thresholds += [reaching, next_float32(reaching, -1), -next_float32(reaching)]
        for start in range(0, len(thresholds), 3):
            groups.append([*thresholds[start : start + 3], companions[0], companions[1], 0.0, -0.0, 0.0])
    groups.append([large, 0.0, 0.0, 0.0, low, 0.0, 0.0, 0.0])  # e16 in a group whose e8 is 1
    groups.append([large, 0.0, 0.0, 0.0, next_float32(low, -1), 0.0, 0.0, 0.0])
    groups.append([small, -small, small, -small, middle, -middle, large, -large])
    units = []
    for start in range(0, len(groups), 7):
        chosen = groups[start : start + 7]
        unit = [anchor, *[0.0] * 7] + [value for group in chosen for value in group]
        units.append(unit + [0.0] * (UNIT - len(unit)))
    return units


def level1_thresholds(exponent: int) -> list[float]:
    """Unit maxima around the points where the level-1 scale steps from one E6M2 value to the next.

    Around each step of 2^exponent * {1, 1.25, 1.5, 1.75} to its successor: the smallest float32 number that
    reaches the successor, and its neighbours. There the float32 product, the bf16 rounding and the E6M2
    rounding tie or nearly tie; the step from 1.75 carries into the exponent.
    """
    maxima = []
    for quarters in (4, 5, 6, 7):
        lower = encode_scale(Fraction(quarters, 4) * power_of_two(exponent))
        middle = Fraction(2 * quarters + 1, 8) * power_of_two(exponent)
        below = round_float32(middle * Fraction(99, 100) / Fraction(ONE_SEVENTH))
        above = round_float32(middle * Fraction(101, 100) / Fraction(ONE_SEVENTH))
        while next_float32(below) < above:  # bisect: level1_scale never decreases
            center = round_float32((Fraction(below) + Fraction(above)) / 2)
            if level1_scale(center) > lower:
                above = center
            else:
                below = center
        maxima += [next_float32(above, step) for step in range(-4, 5)]
    return maxima
