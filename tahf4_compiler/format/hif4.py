"""The HiFloat4 (HiF4) number format: 64 values in 36 bytes, 4.5 bits a value.

Source: "HiFloat4 Format for Language Model Inference" (arXiv 2602.11287) and its public reference.
One *unit* covers 64 consecutive values along the last axis and holds

* a level-1 scale ``E6M2`` (8 bits: unsigned, 6-bit exponent with bias 48, 2-bit mantissa, 0xFF is NaN),
* level-2 exponents ``E1_8`` (one bit for each 8 values),
* level-3 exponents ``E1_16`` (one bit for each 4 values),
* 64 elements ``S1P2`` (a sign and a magnitude of 0 to 7 quarters).

``value = E6M2 * 2**(e8 + e16) * (+/- magnitude / 4)``

Some units that follow each other in a row, a *span*, may share their level-1 scale. Nothing in the packed form says so;
who knows it may add the products of a whole span as integers.

Everything that rounds does so with integer operations on the bits of a float32, because Inductor
removes ``x.to(bfloat16).to(float32)`` round trips; the last factor before ``+ 0.5`` is a power of two,
so that a fused multiply-add gives the same bits. Eager and compiled code therefore agree exactly.

Nothing here imports anything else of this project except its errors, its scales, its roundings and what a span is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError
from .levels import (
    LEAST_ERROR_SCALES,
    NAN_SCALE,
    least_error_scale,
    level1_reciprocal,
    level1_scale,
    level1_value,
    subgroup_exponents,
)
from .rounding import ROUNDINGS, check_rounding, codes_of
from .spans import SPANS, check_alone, check_span, over_spans

__all__ = [
    "BYTES_PER_UNIT",
    "LARGEST",
    "LEAST_ERROR_SCALES",
    "ROUNDINGS",
    "SPANS",
    "UNIT",
    "Packed",
    "check_span",
    "codes_for",
    "dequantize",
    "extremes",
    "fake_quantize",
    "from_bytes",
    "holds_span",
    "least_error_scale",
    "level1_scale",
    "level1_value",
    "quantize",
    "scales_hold_span",
    "subgroup_exponents",
    "to_bytes",
    "units",
]

UNIT = 64
"""Values in one unit."""

BYTES_PER_UNIT = 36
"""Bytes of one unit: 4 of metadata, 32 of elements."""

LARGEST = 344064.0
"""The largest magnitude: the largest scale (1.5 * 2**15) times both exponents (4) times 7 quarters."""

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Packed(NamedTuple):
    """A tensor in HiF4, as two arrays that share their leading dimensions.

    Attributes:
        codes: uint8 ``[..., ceil(k / 64) * 32]``; two elements a byte, the even one in the low nibble,
            each ``sign << 3 | magnitude``.
        scales: int32 ``[..., ceil(k / 64)]``; the 32 metadata bits of a unit,
            ``E6M2 | E1_8 << 8 | E1_16 << 16``, bit i of a field belonging to subgroup i.
        k: length of the last axis of the original tensor (before padding to whole units).
    """

    codes: Tensor
    scales: Tensor
    k: int


def units(k: int) -> int:
    """Return the number of 64-value units that hold ``k`` values."""
    return (k + UNIT - 1) // UNIT


def holds_span(packed: Packed, span: int | str) -> bool:
    """Return whether the units of each span have the same level-1 scale.

    Args:
        packed: as :func:`quantize` returns it.
        span: one of :data:`SPANS`.

    Raises:
        FormatError: dtypes or shapes of ``packed`` do not fit each other, or the span is unknown.
    """
    check_packed(packed)
    return scales_hold_span(packed.scales, check_span(span))


def scales_hold_span(scales: Tensor, span: int) -> bool:
    """Return what :func:`holds_span` does, for scales alone and a span of 1, 2 or 4, or 0 for a row."""
    codes = scales & 0xFF
    return bool((over_spans(codes, span) == codes).all())


def quantize(x: Tensor, *, rounding: str = "half_away", span: int | str = 1) -> Packed:
    """Convert a floating-point tensor to HiF4 along its last axis.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64 (float64 is rounded to float32 first).
            Any leading dimensions, any strides. Values beyond the range saturate.
        rounding: of an in-group value to a magnitude: ``"half_away"`` (from zero; the public reference),
            ``"half_even"`` (the paper allows both), or ``"bfloat16_half_away"``: to bfloat16, half to even, and then
            half away from zero. Huawei's tool AMCT and the PTO specification do that, so hardware that runs HiF4
            natively may; the name says what is computed. It changes 0.8 % of random float32 values, by one step.
            ``"least_error"`` is ``"half_away"`` with the level-1 scale, of the usual one and the next three above it,
            whose squared error in the unit is least (:func:`least_error_scale`); it needs a span of 1.
        span: one of :data:`SPANS`: how many units of a row share the level-1 scale of their largest magnitude. The
            last ones of a row may be fewer.

    Returns:
        The packed tensor. A unit that holds a NaN or an infinity has the level-1 scale ``0xFF``
        and zero elements, and dequantizes to NaN. So have all units of its span.

    Raises:
        FormatError: ``x`` has no axis or is not of a floating-point type, ``rounding`` or ``span`` is unknown, or they
            do not go together.
    """
    step = check_span(span)
    check_rounding(rounding)
    check_alone(step, rounding)
    if not isinstance(x, Tensor):
        raise FormatError(f"quantize got a {type(x).__name__}; expected a torch.Tensor")
    if x.dtype not in _FLOAT_DTYPES:
        raise FormatError(
            f"quantize got a tensor of {x.dtype}; expected float32, bfloat16, float16 or float64. "
            "Convert it first, for example with .float()."
        )
    if x.dim() == 0:
        raise FormatError(
            "quantize got a tensor without axes; expected at least one, since units lie along the last axis. "
            "Use x.reshape(1) for a single value."
        )
    k = x.shape[-1]
    values = as_units(to_float32(x))
    magnitude = values.abs()
    finite = (magnitude <= torch.finfo(torch.float32).max).all(-1)
    if step != 1:
        finite = over_spans((~finite).to(torch.int32), step) == 0
    magnitude = torch.where(finite[..., None], magnitude, 0.0)
    max4 = magnitude.unflatten(-1, (16, 4)).amax(-1)
    max8 = max4.unflatten(-1, (8, 2)).amax(-1)
    scale_code = level1_scale(over_spans(max8.amax(-1), step))
    if rounding == "least_error":
        scale_code = least_error_scale(scale_code, magnitude, max4, max8)
    reciprocal = level1_reciprocal(scale_code)[..., None]
    e8, e16 = subgroup_exponents(max4, max8, reciprocal)
    negative = (values.view(torch.int32) < 0) & finite[..., None]
    codes = codes_of(magnitude, negative, reciprocal, e8, e16, rounding)
    metadata = scale_code + bits_of(e8, 8) + bits_of(e16, 16)
    scales = torch.where(finite, metadata, NAN_SCALE)
    return Packed(codes, scales, k)


def codes_for(x: Tensor, scales: Tensor, rounding: str) -> Tensor:
    """Return the codes of values under scales that are given, with the arithmetic of :func:`quantize`.

    Args:
        x: as for :func:`quantize`.
        scales: int32 ``[..., ceil(K / 64)]``; codes of a unit of NaN are zeros.
        rounding: as for :func:`quantize`.
    """
    values = as_units(to_float32(x))
    valid = (scales & 0xFF != NAN_SCALE)[..., None]
    at = torch.arange(16, device=scales.device, dtype=torch.int32)
    e8, e16 = (scales[..., None] >> (8 + at[:8])) & 1 == 1, (scales[..., None] >> (16 + at)) & 1 == 1
    magnitude = torch.where(valid, values.abs(), 0.0)
    negative = (values.view(torch.int32) < 0) & valid
    return codes_of(magnitude, negative, level1_reciprocal(scales & 0xFF)[..., None], e8, e16, rounding)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert a packed tensor back to floating point.

    Args:
        packed: as :func:`quantize` returns it.
        dtype: of the result. float32, float64 and bfloat16 represent every HiF4 value exactly;
            float16 rounds small values and overflows beyond 65504.

    Returns:
        ``[..., packed.k]`` of ``dtype``.

    Raises:
        FormatError: dtypes or shapes of ``packed`` do not fit each other, or ``dtype`` is not
            floating point.
    """
    check_packed(packed)
    if dtype not in _FLOAT_DTYPES:
        raise FormatError(f"dequantize to {dtype}; expected float32, bfloat16, float16 or float64")
    codes, scales, k = packed
    scale = level1_value(scales)
    index = torch.arange(16, device=scales.device, dtype=torch.int32)
    e8 = (scales[..., None] >> (8 + (index >> 1))) & 1
    e16 = (scales[..., None] >> (16 + index)) & 1
    # (2**(e8 + e16)) / 4, one factor for each group of four elements.
    factor = torch.where(e8 == 1, 0.5, 0.25) * torch.where(e16 == 1, 2.0, 1.0)
    bytes_ = codes.unflatten(-1, (scales.shape[-1], UNIT // 2)).to(torch.int32)
    nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(-2)
    element = (nibbles & 7).to(torch.float32)
    element = torch.where(nibbles >= 8, -element, element)
    values = element.unflatten(-1, (16, 4)) * (factor * scale[..., None])[..., None]
    return values.flatten(-3)[..., :k].to(dtype)


def extremes(scales: Tensor) -> Tensor:
    """Return three bools: whether a unit stands for NaN, has the largest level-1 scale, or the smallest.

    One NaN or infinity among its values makes a unit NaN. Magnitudes beyond the range are in units of the largest
    scale, and those that are too small for the format in units of the smallest.

    Args:
        scales: int32 of any shape, see :class:`Packed`.
    """
    codes = scales & 0xFF
    return torch.stack([(codes == code).any() for code in (NAN_SCALE, NAN_SCALE - 1, 0)])


def fake_quantize(x: Tensor, *, rounding: str = "half_away", span: int | str = 1) -> Tensor:
    """Return ``x`` rounded to the nearest values that HiF4 holds: ``dequantize(quantize(x), x.dtype)``.

    Args:
        x: ``[..., K]``, as for :func:`quantize`.
        rounding: as for :func:`quantize`.
        span: as for :func:`quantize`.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        FormatError: as :func:`quantize`.
    """
    return dequantize(quantize(x, rounding=rounding, span=span), x.dtype)


def to_bytes(packed: Packed) -> Tensor:
    """Interleave a packed tensor into units of 36 bytes. The layout is this project's own.

    Args:
        packed: as :func:`quantize` returns it.

    Returns:
        uint8 ``[..., units * 36]``: for each unit 4 bytes of little-endian metadata, then 32 of elements.

    Raises:
        FormatError: dtypes or shapes of ``packed`` do not fit each other.
    """
    check_packed(packed)
    shifts = torch.arange(0, 32, 8, device=packed.scales.device, dtype=torch.int32)
    metadata = ((packed.scales[..., None] >> shifts) & 0xFF).to(torch.uint8)
    elements = packed.codes.unflatten(-1, (packed.scales.shape[-1], UNIT // 2))
    return torch.cat((metadata, elements), -1).flatten(-2)


def from_bytes(data: Tensor, k: int) -> Packed:
    """Undo :func:`to_bytes`.

    Args:
        data: uint8 ``[..., ceil(k / 64) * 36]``.
        k: length of the last axis of the original tensor.

    Returns:
        The packed tensor.

    Raises:
        FormatError: ``data`` is not uint8, or its last axis is not ``ceil(k / 64) * 36`` bytes long.
    """
    if not isinstance(k, int) or k < 0:
        raise FormatError(f"from_bytes got k={k!r}; expected the length of the last axis, an integer >= 0")
    expected = units(k) * BYTES_PER_UNIT
    if data.dtype != torch.uint8 or data.dim() == 0 or data.shape[-1] != expected:
        raise FormatError(
            f"from_bytes got {data.dtype} of shape {tuple(data.shape)}; "
            f"expected uint8 with a last axis of {expected} bytes ({units(k)} units of 36 for k={k})"
        )
    unit = data.unflatten(-1, (units(k), BYTES_PER_UNIT))
    shifts = torch.arange(0, 32, 8, device=data.device, dtype=torch.int32)
    scales = (unit[..., :4].to(torch.int32) << shifts).sum(-1, dtype=torch.int32)
    return Packed(unit[..., 4:].flatten(-2), scales, k)


def check_packed(packed: Packed) -> None:
    """Raise :class:`FormatError` unless dtypes and shapes of a packed tensor fit each other."""
    codes, scales, k = packed
    if codes.dtype != torch.uint8 or scales.dtype != torch.int32:
        raise FormatError(
            f"packed tensor of {codes.dtype} codes and {scales.dtype} scales; expected uint8 and int32"
        )
    if codes.dim() == 0 or scales.dim() == 0 or codes.shape[:-1] != scales.shape[:-1]:
        raise FormatError(
            f"packed tensor with codes {tuple(codes.shape)} and scales {tuple(scales.shape)}; "
            "expected the same leading dimensions"
        )
    if k < 0 or scales.shape[-1] != units(k) or codes.shape[-1] != units(k) * (UNIT // 2):
        raise FormatError(
            f"packed tensor with codes {tuple(codes.shape)} and scales {tuple(scales.shape)} for k={k}; "
            f"expected last axes of {units(max(k, 0)) * (UNIT // 2)} and {units(max(k, 0))}"
        )


def to_float32(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        limit = torch.finfo(torch.float32).max
        # Finite values saturate instead of becoming infinite; NaN and infinities stay.
        x = torch.where(x.isinf(), x, x.clamp(-limit, limit))
    return x.to(torch.float32)


def as_units(x: Tensor) -> Tensor:
    """Pad ``[..., K]`` with zeros and return it as ``[..., units, 64]``, contiguous."""
    k = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, units(k) * UNIT - k)) if k % UNIT else x
    return padded.contiguous().unflatten(-1, (units(k), UNIT))


def bits_of(flags: Tensor, shift: int) -> Tensor:
    """Pack bool ``[..., n]`` into an int32 field: bit ``shift + i`` is flag i."""
    position = torch.arange(flags.shape[-1], device=flags.device, dtype=torch.int32) + shift
    return (flags.to(torch.int32) << position).sum(-1, dtype=torch.int32)
