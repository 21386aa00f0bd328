"""The scales of a HiFloat4 unit: its level-1 scale ``E6M2`` and the exponent bits of its groups (see :mod:`.hif4`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import round_bits

__all__ = [
    "LEAST_ERROR_SCALES",
    "NAN_SCALE",
    "least_error_scale",
    "level1_reciprocal",
    "level1_scale",
    "level1_value",
    "subgroup_exponents",
]

NAN_SCALE = 0xFF
"""The level-1 scale of a unit of NaN."""

LEAST_ERROR_SCALES = 4
"""Level-1 scales that the rounding ``"least_error"`` tries: one of each mantissa, or fewer at the upper end."""

_MIN_SCALE = 2.0**-48
_MAX_SCALE = 49152.0  # 1.5 * 2**15
# Mantissa bits (float32) of 1/1.25, 1/1.5 and 1/1.75 rounded to bfloat16; each lies in [0.5, 1).
_RECIPROCAL_MANTISSA = (0, 77 << 16, 43 << 16, 18 << 16)


def level1_scale(unit_max: Tensor) -> Tensor:
    """Return the level-1 scale for the largest magnitude of each unit (steps 2 and 3 of the conversion).

    Args:
        unit_max: float32, finite, >= 0.

    Returns:
        int32 of the same shape: the E6M2 byte, 0 to 254.
    """
    # A literal, not a module constant: Dynamo would make an input of that. It is 1/7 rounded to bfloat16.
    scale = round_bits((unit_max * 0.142578125).view(torch.int32), 16).view(torch.float32)
    bits = round_bits(scale.clamp(_MIN_SCALE, _MAX_SCALE).view(torch.int32), 21)
    return (bits >> 21) - ((127 - 48) << 2)


def level1_value(scales: Tensor) -> Tensor:
    """Return the value of the level-1 scale of each unit: float32 of the shape of ``scales``, exact."""
    scale_code = scales & 0xFF
    # A bfloat16/float32 exponent is biased by 127, E6M2's by 48; its two mantissa bits lead.
    scale = (((scale_code >> 2) + (127 - 48)) << 23 | (scale_code & 3) << 21).view(torch.float32)
    return torch.where(scale_code == NAN_SCALE, torch.nan, scale)


def level1_reciprocal(scale_code: Tensor) -> Tensor:
    """Return bf16(1 / E6M2) as float32, built from its bits (step 4 of the conversion)."""
    mantissa = scale_code & 3
    fraction = torch.zeros_like(scale_code)
    for code in (1, 2, 3):
        fraction = torch.where(mantissa == code, _RECIPROCAL_MANTISSA[code], fraction)
    exponent = 127 + 48 - (scale_code >> 2) - (mantissa > 0).to(torch.int32)
    return ((exponent << 23) | fraction).view(torch.float32)


def subgroup_exponents(max4: Tensor, max8: Tensor, reciprocal: Tensor) -> tuple[Tensor, Tensor]:
    """Return the level-2 and level-3 exponent bits (step 5 of the conversion).

    Args:
        max4: float32 ``[..., 16]``, largest magnitude of each group of 4.
        max8: float32 ``[..., 8]``, largest magnitude of each group of 8.
        reciprocal: float32 ``[..., 1]``, bf16(1 / level-1 scale).

    Returns:
        Two bool tensors: ``e8 [..., 8]`` and ``e16 [..., 16]``.
    """
    e8 = max8 * reciprocal >= 4.0
    e16 = max4 * reciprocal * torch.where(e8, 0.5, 1.0).repeat_interleave(2, -1) >= 2.0
    return e8, e16


def least_error_scale(scale_code: Tensor, magnitude: Tensor, max4: Tensor, max8: Tensor) -> Tensor:
    """Return the level-1 scale of least squared error of each unit: a code, or one of the next three above it.

    Errors are whole numbers, in 1/256 of the power of two in the first scale: values are rounded to them, half up, and
    what HiF4 holds is one. A sum of 64 squares stays below 2**24, so float32 adds them exactly in every order, and with
    fused multiply-adds, too. Of equal errors the one of the smaller scale counts.

    Args:
        scale_code: int32 ``[..., units]``, by :func:`level1_scale`.
        magnitude: float32 ``[..., units, 64]``, finite.
        max4: their largest in groups of 4, ``[..., units, 16]``.
        max8: and of 8, ``[..., units, 8]``.

    Source: the idea is that of "Four Over Six" for NVFP4 (arXiv 2512.02010), which tries two scales of each block.
    """
    # 256 / 2**exponent. Beyond the largest scale there is no other to choose: what is large there may be cut.
    grain = ((127 + 56 - (scale_code >> 2)) << 23).view(torch.float32)[..., None]
    wanted = torch.floor((magnitude * grain).clamp(max=5000.0) + 0.5).unflatten(-1, (16, 4))
    best, least = scale_code, torch.full_like(max8[..., 0], torch.inf)
    for more in range(LEAST_ERROR_SCALES):
        code = (scale_code + more).clamp(max=NAN_SCALE - 1)
        reciprocal = level1_reciprocal(code)[..., None]
        e8, e16 = subgroup_exponents(max4, max8, reciprocal)
        quarters = torch.where(e8, 2.0, 4.0).repeat_interleave(2, -1) * torch.where(e16, 0.5, 1.0)
        quarters = quarters.to(torch.float32)  # whatever the default dtype is
        rounded = torch.floor((magnitude * reciprocal).unflatten(-1, (16, 4)) * quarters[..., None] + 0.5)
        step = (level1_value(code)[..., None] * grain) / quarters
        error = (wanted - rounded.clamp(max=7.0) * step[..., None]).square().sum((-2, -1))
        better = error < least
        best, least = torch.where(better, code, best), torch.where(better, error, least)
    return best
