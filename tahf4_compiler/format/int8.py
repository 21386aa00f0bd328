"""Activations in 8 bits: units of 64 values, each a signed byte, with one float32 scale a unit.

They multiply weights in HiF4 as activations in HiF4 do. An element of a weight is a whole number of quarters, at most
28, times the scale of its unit, so the dot product of two units is an exact integer below 2**18, times both scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..options import ACTIVATION_BITS
from .hif4 import UNIT, units
from .spans import over_spans

__all__ = ["LEAST", "MOST", "by_maxima", "check_bits", "dequantize", "quantize", "scales_of"]

MOST = 127
"""The largest magnitude of a code."""

LEAST = 2.0**-100
"""A unit whose values are all smaller counts as if its largest were this: its reciprocal is a normal number."""


def check_bits(bits: int, quantized: bool = False) -> None:
    """Raise :class:`FormatError` unless activations can have so many bits; ``quantized``: and be quantized."""
    if bits not in ACTIVATION_BITS or (quantized and bits == 16):
        others = "" if quantized else ", or 16 (not quantized)"
        raise FormatError(f"an activation of {bits!r} bits; expected 4 (HiF4) or 8 (int8 with a scale a unit){others}")


def quantize(x: Tensor, span: int = 1) -> tuple[Tensor, Tensor]:
    """Convert to 8 bits along the last axis.

    The scale is the largest magnitude of the unit divided by 127. Values are rounded to the nearest code, half to even.

    Args:
        x: ``[..., K]`` of a floating-point type. The last unit is filled up with zeros.
        span: units that share a scale, 0 for a row (:mod:`tahf4_compiler.format.spans`). Activations of linears have a
            scale for each unit, queries and keys may have one for a row.

    Returns:
        Codes int8 ``[..., ceil(K / 64) * 64]``, between -127 and 127, and scales float32 ``[..., ceil(K / 64)]``. A
        unit with an infinity or NaN has codes of 0 and a scale of NaN.

    Raises:
        FormatError: ``x`` has no axis.
    """
    if x.dim() == 0:
        raise FormatError("a tensor without axes; expected at least one: channels lie along the last")
    count = units(x.shape[-1])
    values = torch.nn.functional.pad(x.to(torch.float32), (0, count * UNIT - x.shape[-1]))
    values = values.reshape(*x.shape[:-1], count, UNIT)
    most = over_spans(values.abs().amax(-1), span) if count else values.new_zeros(values.shape[:-1])
    return by_maxima(values, most[..., None]).reshape(*x.shape[:-1], count * UNIT), scales_of(most)


def by_maxima(values: Tensor, most: Tensor) -> Tensor:
    """Return the codes of values whose units have some largest magnitudes.

    Args:
        values: float32.
        most: the largest magnitude of the unit of each, which broadcasts to them; not finite where one is not.

    Returns:
        int8, 0 where the unit is not finite.
    """
    finite = most.isfinite()
    most = torch.where(finite, most, 0.0).clamp(min=LEAST)
    factor = torch.full_like(most, MOST) / most  # a number divided by a tensor would be a product with its reciprocal
    return (torch.where(finite, values, 0.0) * factor).round().to(torch.int8)


def scales_of(most: Tensor) -> Tensor:
    """Return the scales of units, of the shape of their largest magnitudes; NaN where one is not finite."""
    finite = most.isfinite()
    return torch.where(finite, torch.where(finite, most, 0.0).clamp(min=LEAST) * (1 / MOST), torch.nan)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Convert back.

    Args:
        codes: int8 ``[..., units * 64]``.
        scales: float32 ``[..., units]``.

    Returns:
        float32 ``[..., units * 64]``.
    """
    values = codes.to(torch.float32).reshape(*scales.shape, UNIT) * scales[..., None]
    return values.reshape(codes.shape)
