"""How an in-group value becomes an element: with integer operations on the bits, as :mod:`.hif4` says."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError

__all__ = ["ROUNDINGS", "check_rounding", "codes_of", "round_bits"]

ROUNDINGS = ("half_away", "half_even", "bfloat16_half_away", "least_error")
"""See :func:`tahf4_compiler.format.hif4.quantize`."""


def check_rounding(rounding: str) -> None:
    """Raise :class:`FormatError` unless a rounding is one of :data:`ROUNDINGS`."""
    if rounding not in ROUNDINGS:
        raise FormatError(f"rounding is {rounding!r}; expected one of {', '.join(map(repr, ROUNDINGS))}")


def round_bits(bits: Tensor, drop: int) -> Tensor:
    """Round positive float32 bit patterns half to even, clearing the lowest ``drop`` bits."""
    bits = bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)
    return (bits >> drop) << drop


def codes_of(
    magnitude: Tensor, negative: Tensor, reciprocal: Tensor, e8: Tensor, e16: Tensor, rounding: str
) -> Tensor:
    """Return the codes of units (step 6 of the conversion).

    Args:
        magnitude: float32 ``[..., units, 64]``, finite.
        negative: bool of that shape, the signs.
        reciprocal: float32 ``[..., units, 1]``, bf16(1 / level-1 scale).
        e8: bool ``[..., units, 8]``.
        e16: bool ``[..., units, 16]``.
        rounding: one of :data:`ROUNDINGS`.

    Returns:
        uint8 ``[..., units * 32]``.
    """
    # 4 / 2**(e8 + e16) for each group of four; the product with it is exact.
    quarters = torch.where(e8, 2.0, 4.0).repeat_interleave(2, -1) * torch.where(e16, 0.5, 1.0)
    quarters = quarters.to(torch.float32)  # whatever the default dtype is
    scaled = (magnitude * reciprocal).unflatten(-1, (16, 4)) * quarters[..., None]
    if rounding == "bfloat16_half_away":  # four times a value is rounded as the value is, if it is not far below 1/2
        scaled = round_bits(scaled.view(torch.int32), 16).view(torch.float32)
    rounded = torch.round(scaled) if rounding == "half_even" else torch.floor(scaled + 0.5)
    nibbles = rounded.clamp(max=7.0).to(torch.int32).flatten(-2) + torch.where(negative, 8, 0)
    pairs = nibbles.unflatten(-1, (32, 2))
    return (pairs[..., 0] + pairs[..., 1] * 16).to(torch.uint8).flatten(-2)
