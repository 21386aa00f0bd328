"""The operators that a lowered graph is made of: ``torch.ops.tahf4.{quantize, dequantize, linear}``.

Each has a plain-PyTorch reference that runs on every device and a fake kernel, so a lowered graph is
still a graph that PyTorch can print, export, fake-propagate and compile. They are opaque to Inductor:
a faster kernel for a device replaces the operator in the graph (``tahf4_compiler.ops.registry``) and
must give the same codes and scales, bit for bit.

A transform before quantization is ``(multiplier[K], hadamard_block)``: a product with one factor for each
channel (the channel mask, the signs of a rotation folded in), then a Walsh-Hadamard transform of blocks
of ``hadamard_block`` channels (0 for none).

Units may share their level-1 scales over a *span* of 1, 2 or 4 units, or over a row (0). It counts for activations of 4
bits: those of 8 and 16 have no such scales.

Activations have 4 bits (HiF4), 8 (:mod:`tahf4_compiler.format.int8`) or 16 (transformed and not quantized); the dtype
of their codes says which. Weights are in HiF4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import FormatError
from ..format import hif4, int8
from ..format.spans import check_form, parted
from ..format.transforms import transform
from ..plugins import host
from .define import operator
from .observers import take

__all__ = ["activation_bits", "dequantize", "empty_units", "integers", "linear", "observe", "quantize"]


@operator
def quantize(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> tuple[Tensor, Tensor]:
    """Transform and convert to HiF4, or to 8 or 16 bits, along the last axis.

    Args:
        x: ``[..., K]`` of a floating-point type.
        multiplier: float32 ``[K]``, or None.
        hadamard_block: a power of two, or 0.
        bits: 4, 8 or 16.
        span: units that share a level-1 scale, see :func:`tahf4_compiler.format.hif4.quantize`; 0 for a row. 8 more
            (:data:`tahf4_compiler.format.spans.ROUNDED`) for the rounding ``"bfloat16_half_away"``, 16 more
            (:data:`tahf4_compiler.format.spans.SEARCHED`) for ``"least_error"``.

    Returns:
        ``codes`` uint8 ``[..., ceil(K / 64) * 32]`` and ``scales`` int32 ``[..., ceil(K / 64)]`` (see
        :class:`tahf4_compiler.format.hif4.Packed`). With 8 bits int8 ``[..., ceil(K / 64) * 64]`` and float32
        ``[..., ceil(K / 64)]`` (see :mod:`tahf4_compiler.format.int8`). With 16 bits the transformed values, padded
        with zeros to ``[..., ceil(K / 64) * 64]``, bfloat16 if ``x`` is and else float32, and scales that are 1.

    Raises:
        FormatError: as :func:`tahf4_compiler.format.hif4.quantize` and :func:`transform`; another number of bits.
    """
    int8.check_bits(bits)
    transformed = transform(x, multiplier, hadamard_block)
    if bits == 8:
        return int8.quantize(transformed)
    if bits == 16:
        codes, scales = empty_units(x, x.shape, bits)
        codes[..., : transformed.shape[-1]] = hif4.to_float32(transformed)
        codes[..., transformed.shape[-1] :] = 0
        return codes, scales.fill_(1)
    units, rounding = parted(check_form(span))
    packed = hif4.quantize(transformed, span=units or "row", rounding=rounding)
    return packed.codes, packed.scales


@torch.library.register_fake("tahf4::quantize")
def _(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> tuple[Tensor, Tensor]:
    check_memory("quantize", x, multiplier)
    return empty_units(x, x.shape, bits)


def empty_units(like: Tensor, shape: Sequence[int], bits: int) -> tuple[Tensor, Tensor]:
    """Return room for the codes and scales of an activation ``[..., K]`` of ``shape``."""
    int8.check_bits(bits)
    count = hif4.units(shape[-1])
    wide = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
    dtype = {4: torch.uint8, 8: torch.int8, 16: wide}[bits]
    return (
        like.new_empty((*shape[:-1], count * _elements(bits)), dtype=dtype),
        like.new_empty((*shape[:-1], count), dtype=_SCALES[dtype]),
    )


_SCALES = {
    torch.uint8: torch.int32,
    torch.int8: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
}
"""The dtype of an activation's scales, by that of its codes."""


def _elements(bits: int) -> int:
    """Return how many elements the codes of a unit have."""
    return hif4.UNIT // 2 if bits == 4 else hif4.UNIT


def activation_bits(codes: Tensor) -> int:
    """Return how many bits an activation of such codes has."""
    return 16 if codes.is_floating_point() else 8 if codes.dtype == torch.int8 else 4


@operator
def dequantize(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Convert back to floating point; no transform is undone.

    Args:
        codes: uint8 ``[..., ceil(k / 64) * 32]``.
        scales: int32 ``[..., ceil(k / 64)]``.
        k: length of the last axis of the result.
        dtype: of the result.

    Returns:
        ``[..., k]``.

    Raises:
        FormatError: as :func:`tahf4_compiler.format.hif4.dequantize`.
    """
    # A custom operator may not return a view of a buffer it keeps; a padded k would be one.
    return hif4.dequantize(hif4.Packed(codes, scales, k), dtype).contiguous()


@torch.library.register_fake("tahf4::dequantize")
def _(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], k), dtype=dtype)


@operator
def linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    span: int = 1,
) -> Tensor:
    """W4A4 or W4A8 linear: the sum over units of (exact integer dot) * scaleA * scaleB, plus bias; or W4A16.

    Args:
        codes: uint8 ``[..., K / 2]`` of the activation, K a multiple of 64; int8 ``[..., K]`` for 8 bits; bfloat16 or
            float32 ``[..., K]`` for 16.
        scales: int32 ``[..., K / 64]`` of the activation; float32 for 8 and 16 bits.
        weight_codes: uint8 ``[N, K / 2]``.
        weight_scales: int32 ``[N, K / 64]``.
        bias: ``[N]`` or None, added in float32.
        out_dtype: type that the float32 result is cast to.
        span: units that share their level-1 scale on both sides; 0 for a row. Nothing checks that they do. A kernel may
            disregard it.

    Returns:
        ``[..., N]`` of ``out_dtype``.

    Raises:
        FormatError: shapes or dtypes of the two sides do not fit each other, or the span is unknown.

    The reference multiplies the dequantized operands in float32. Both have at most 6 significant bits in HiF4 and
    every partial sum inside a unit at most 22, so each unit's contribution is exact; only the float32 sum over
    units depends on the order. TF32 and bfloat16 matrix units hold the operands exactly too. With 8 bits the values
    of the activation are rounded to float32.

    With a span the dot of a span is exact, an int32. It is rounded to float32, multiplied by the weight's scale, and
    then by a sixteenth of the activation's while it is added to the sum over spans, in the order of K, with one
    rounding.

    With 16 bits the weight is dequantized to the dtype of the activation, which holds each of its values exactly, and
    freed after the product, which is that of ``torch.nn.functional.linear``: bias and result are rounded to this dtype
    first.
    """
    check_linear(codes, scales, weight_codes, weight_scales, bias)
    k = scales.shape[-1] * hif4.UNIT
    bits = activation_bits(codes)
    if bits == 16:
        fast = host.find("dequantize", weight_codes)
        right = (fast or _dequantized)(weight_codes, weight_scales, k, codes.dtype)
        added = bias.to(codes.dtype) if bias is not None else None
        with torch.autocast(codes.device.type, enabled=False):
            return torch.nn.functional.linear(codes, right, added).to(out_dtype)
    with torch.autocast(codes.device.type, enabled=False):  # its cast would lose what is exact
        if hif4.check_span(span) != 1 and bits == 4:
            out = _over_spans(codes, scales, weight_codes, weight_scales, span)
        else:
            left = hif4.dequantize(hif4.Packed(codes, scales, k)) if bits == 4 else int8.dequantize(codes, scales)
            out = torch.nn.functional.linear(left, _dequantized(weight_codes, weight_scales, k))
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)


_EXACT_UNITS = 256
"""Their dots stay below 2**24: float32 adds them exactly in any order."""


def _over_spans(codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor, span: int) -> Tensor:
    """Return the product ``[..., N]`` in float32 of operands whose level-1 scales are shared over spans."""
    left, right = integers(codes, scales), integers(weight_codes, weight_scales)
    count = scales.shape[-1]
    step = span or max(1, count)
    out = left.new_zeros((*scales.shape[:-1], len(weight_codes)))
    for first in range(0, count, step):
        last = min(first + step, count)
        dot = torch.zeros_like(out, dtype=torch.int32)
        for at in range(first, last, _EXACT_UNITS):
            part = slice(at * hif4.UNIT, min(at + _EXACT_UNITS, last) * hif4.UNIT)
            dot += torch.nn.functional.linear(left[..., part], right[..., part]).to(torch.int32)
        scaled = dot.to(torch.float32) * hif4.level1_value(weight_scales[:, first])
        factor = hif4.level1_value(scales[..., first, None]) * 0.0625
        # The product is exact in float64.
        out = (scaled.double() * factor.double() + out.double()).to(torch.float32)
    return out


def integers(codes: Tensor, scales: Tensor) -> Tensor:
    """Return magnitudes with their signs and exponents, at most 28, as float32."""
    four = (scales & ~0xFF) | 4 * (48 + 2)  # a level-1 scale of 4: elements count quarters
    return _dequantized(codes, four, scales.shape[-1] * hif4.UNIT)


def _dequantized(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return hif4.dequantize(hif4.Packed(codes, scales, k), dtype)


@torch.library.register_fake("tahf4::linear")
def _(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    span: int = 1,
) -> Tensor:
    hif4.check_span(span)
    check_linear(codes, scales, weight_codes, weight_scales, bias)
    check_memory("linear", codes, scales, weight_codes, weight_scales, bias)
    return codes.new_empty((*codes.shape[:-1], weight_codes.shape[0]), dtype=out_dtype)


def check_memory(what: str, *tensors: Tensor | None) -> None:
    """Refuse tensors of which some have memory and some are on the meta device: the result would be made up."""
    devices = {t.device.type: t.device for t in tensors if t is not None}
    if "meta" in devices and len(devices) > 1:
        others = ", ".join(str(device) for kind, device in devices.items() if kind != "meta")
        raise FormatError(
            f"{what} got tensors on the meta device beside others on {others}; load the weights first, or move the "
            "model to one device"
        )


def check_linear(
    codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias: Tensor | None
) -> None:
    shape, rows = scales.shape, weight_scales.shape
    bits = activation_bits(codes)
    if (
        (_SCALES.get(codes.dtype), weight_codes.dtype, weight_scales.dtype) == (scales.dtype, torch.uint8, torch.int32)
        and (len(shape) > 0 and len(rows) == 2 and shape[-1] == rows[1])
        and codes.shape == (*shape[:-1], shape[-1] * _elements(bits))
        and weight_codes.shape == (rows[0], rows[1] * (hif4.UNIT // 2))
        and (bias is None or bias.shape == (rows[0],))
    ):
        return  # what follows takes as long as a small product
    k = scales.shape[-1] * hif4.UNIT if scales.dim() else 0
    if bits == 4:
        hif4.check_packed(hif4.Packed(codes, scales, k))
    elif _SCALES.get(codes.dtype) != scales.dtype or scales.dim() == 0 or codes.shape != (*shape[:-1], k):
        raise FormatError(
            f"an activation in {bits} bits has codes {codes.dtype} {tuple(codes.shape)} and scales {scales.dtype} "
            f"{tuple(shape)}; expected int8, bfloat16 or float32 [..., K] and float32 [..., K / 64]"
        )
    if weight_codes.dim() != 2 or weight_scales.dim() != 2:
        raise FormatError(
            f"weight codes {tuple(weight_codes.shape)} and scales {tuple(weight_scales.shape)}; expected two axes, "
            "[N, K / 2] and [N, K / 64]"
        )
    hif4.check_packed(hif4.Packed(weight_codes, weight_scales, weight_scales.shape[-1] * hif4.UNIT))
    if weight_scales.shape[-1] != scales.shape[-1]:
        raise FormatError(
            f"activation of {scales.shape[-1]} units and weight of {weight_scales.shape[-1]}; "
            "expected the same number of 64-value units along K"
        )
    if bias is not None and tuple(bias.shape) != (weight_codes.shape[0],):
        raise FormatError(f"bias of shape {tuple(bias.shape)}; expected ({weight_codes.shape[0]},)")


@torch.library.custom_op("tahf4::observe", mutates_args=("handle",))
def observe(x: Tensor, handle: Tensor) -> None:
    """Show an activation to the calibration that runs (:mod:`tahf4_compiler.calibration.calibration`).

    Args:
        x: ``[..., K]``; it is not changed.
        handle: int64 ``[2]`` on the CPU: number of the observer, and how often it was called, which is
            counted up, so that no compiler takes the call for useless.
    """
    take(x, handle)


@observe.register_fake
def _(x: Tensor, handle: Tensor) -> None:
    return None
