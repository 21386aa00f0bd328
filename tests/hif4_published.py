"""HiF4 as two published rules say it, in exact fractions: vectors for both arithmetics.

It shares no code with the package, nor with ``hif4_scalar``. A value is a ``Fraction``; a float is rounded by asking
which multiples of the unit in the last place are nearest.

The rules: "HiFloat4 Format for Language Model Inference" (arXiv 2602.11287), Algorithm 1, and ADR-0101 of the PTO
specification. They differ in one line: the latter rounds an in-group value to bfloat16 before it becomes S1P2.

The rounding "least_error" is this project's: of four level-1 scales the one of least squared error, errors in 1/256 of
the power of two in the first scale.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from fractions import Fraction

UNIT = 64
ROUNDINGS = ("half_away", "bfloat16_half_away")
SEARCHED = "least_error"


def to_grid(value: Fraction, bits: int, least: int) -> Fraction:
    """The nearest float of ``bits`` significant bits whose steps are at least 2**least; half to even."""
    if value == 0:
        return value
    size = value.numerator.bit_length() - value.denominator.bit_length()  # 2**(size - 1) <= value < 2**(size + 1)
    step = Fraction(2) ** max(least, size - bits)
    while value >= step * 2**bits:
        step *= 2
    count, rest = divmod(value, step)
    if rest * 2 > step or (rest * 2 == step and count % 2):
        count += 1
    return count * step


def float32(value: Fraction) -> Fraction:
    return to_grid(value, 24, -149)


def bfloat16(value: Fraction) -> Fraction:
    return to_grid(value, 8, -133)


def unit(values: Sequence[float], rounding: str) -> tuple[int, list[int]]:
    """The 32 bits of metadata of 64 finite values, and their nibbles."""
    exact = [abs(Fraction(value)) for value in values]
    groups = [max(exact[i : i + 4]) for i in range(0, UNIT, 4)]
    eights = [max(groups[i : i + 2]) for i in range(0, 16, 2)]
    factor = bfloat16(float32(max(eights) * bfloat16(Fraction(1, 7))))
    factor = min(max(factor, Fraction(1, 2**48)), Fraction(49152))
    level1 = to_grid(factor, 3, -50)
    exponent = 48
    while level1 < Fraction(2) ** (exponent - 48):
        exponent -= 1
    while level1 >= Fraction(2) ** (exponent - 47):
        exponent += 1
    code = exponent << 2 | int(level1 / Fraction(2) ** (exponent - 50)) - 4
    metadata, nibbles, _ = _under(code, values, exact, eights, groups, rounding)
    if rounding != SEARCHED:
        return metadata, nibbles
    grain = Fraction(2) ** (exponent - 48) / 256
    wanted = [int(value / grain + Fraction(1, 2)) for value in exact]
    tried = []
    for candidate in range(code, min(code + 3, 254) + 1):
        metadata, nibbles, held = _under(candidate, values, exact, eights, groups, rounding)
        error = sum((want - value / grain) ** 2 for want, value in zip(wanted, held, strict=True))
        tried.append((error, candidate, metadata, nibbles))
    return min(tried)[2:]


def _under(code, values, exact, eights, groups, rounding):
    """Metadata, nibbles and magnitudes of a unit under a level-1 scale."""
    metadata, level1 = code, Fraction(4 + code % 4, 4) * Fraction(2) ** (code // 4 - 48)
    reciprocal = bfloat16(1 / level1)
    e8 = [float32(largest * reciprocal) >= 4 for largest in eights]
    e16 = [float32(largest * reciprocal) / 2 ** e8[i // 2] >= 2 for i, largest in enumerate(groups)]
    metadata |= sum(bit << 8 + i for i, bit in enumerate(e8)) | sum(bit << 16 + i for i, bit in enumerate(e16))
    nibbles, held = [], []
    for i, value in enumerate(values):
        inside = float32(float32(exact[i] * reciprocal) / 2 ** (e8[i // 8] + e16[i // 4]))
        if rounding == "bfloat16_half_away":
            inside = bfloat16(inside)
        magnitude = min(7, int(float32(inside * 4 + Fraction(1, 2))))  # the sum is a float32, too
        negative = struct.pack(">f", value)[0] >> 7
        nibbles.append(negative << 3 | magnitude)
        held.append(level1 * 2 ** (e8[i // 8] + e16[i // 4]) * Fraction(magnitude, 4))
    return metadata, nibbles, held


def row(values: Sequence[float], rounding: str) -> tuple[list[int], list[int]]:
    """The metadata of whole units and the bytes of their codes."""
    metadata, codes = [], []
    for first in range(0, len(values), UNIT):
        found, nibbles = unit(values[first : first + UNIT], rounding)
        metadata.append(found)
        codes += [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]
    return metadata, codes


def near(value: Fraction) -> list[float]:
    """The float32 next to a value, and those around it."""
    bits = struct.unpack("<i", struct.pack("<f", float(value)))[0]
    return [struct.unpack("<f", struct.pack("<i", max(0, bits + step)))[0] for step in (-2, -1, 0, 1, 2)]


def spread_units(count: int = 40, seed: int = 5) -> list[list[float]]:
    """Units that are filled to and beyond the largest magnitude of their level-1 scale: errors are largest there."""
    chance = random.Random(seed)
    found = []
    for i in range(count):
        most = Fraction(4 + i % 4, 4) * chance.choice((7, Fraction(63, 8), Fraction(13, 2), 6))
        ends = (1, Fraction(15, 16), Fraction(chance.randint(1, 99), 100))
        found.append([float(most * chance.choice(ends) * chance.choice((1, -1))) for _ in range(UNIT)])
    return found


def hard_units(seed: int = 1) -> list[list[float]]:
    """Units whose values lie where the two arithmetics part, and at the ends of the range."""
    chance = random.Random(seed)
    # Each scale has a largest value that keeps it; the others then lie on and around ties, and where bfloat16 has its
    # own ties below them: quarters, less half a step of bfloat16.
    found = []
    for scale in (Fraction(1), Fraction(5, 4), Fraction(3, 2), Fraction(7, 4), Fraction(1, 2**40), Fraction(2**14)):
        for largest in (7, 3, 1):
            reciprocal = bfloat16(1 / scale)
            points = []
            for quarters in range(1, 8):
                tie = Fraction(2 * quarters - 1, 8)
                for below in (0, Fraction(1, 2**9), Fraction(1, 2**10), Fraction(3, 2**11), Fraction(1, 2**16)):
                    points += near((tie - tie * below) / reciprocal)
            for _ in range(3):
                some = [chance.choice((1, -1)) * point for point in chance.sample(points, 56)]
                found.append([float(7 * scale), *[0.0] * 7, *some])
                if largest != 7:
                    found[-1][8] = float(largest * scale)
    small = [2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-50, -(2.0**-51), 1.5 * 2.0**-52, -0.0, 0.0]
    found += [small * 8, [2.0**-44, *[2.0**-149] * 63], [-0.0] * 64, [3.4e38, -3.4e38, *[49152.0] * 62]]
    # A carry: bfloat16 lifts a value over a power of two, and over the largest magnitude.
    found.append([7.0, *near(Fraction(2) - Fraction(1, 2**10)) * 12, 1.998, 0.998, 0.499])
    return found


def random_units(count: int, seed: int = 2) -> list[list[float]]:
    """Units of float32 values of any size, and of the sizes that weights have."""
    chance = random.Random(seed)

    def value(spread: int) -> float:
        return struct.unpack("<f", struct.pack("<f", chance.gauss(0, 1) * 2.0 ** chance.randint(-spread, spread)))[0]

    return [[value(i % 4) for _ in range(UNIT)] for i in range(count)]
