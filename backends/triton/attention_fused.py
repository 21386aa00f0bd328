"""Attention in 8 bits with what is computed before its queries and keys, or with the quantization of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...format import int8
from ...format.hif4 import UNIT
from ...format.spans import ROUNDED, check_form, units_of
from ...format.transforms import hadamard_block as block_of
from ...ops import check_transform
from ...ops.attention import MOST_CHANNELS, check_attention, row_span
from ...ops.fused_attention import empty_fused_attention
from ...ops.program import Program
from ...ops.reference import empty_units
from .attention import CHANNELS, AttentionTile, Units, calls, columns_of, launch, of_rows, of_values
from .call import Call

__all__ = ["WIDTHS", "calls_of_programs", "quantized_calls", "quantized_calls_of_programs", "quantizes", "serves"]

WIDTHS = (64, 128, 256)
"""Channels of a head of queries whose program a kernel computes: a head has 1, 2 or 4 units to share a scale."""


def calls_of_programs(
    q_inputs: list[Tensor],
    q_program: str,
    k_inputs: list[Tensor],
    k_program: str,
    value: Tensor,
    heads: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
    value_bits: int = 8,
    *,
    units: Units | None = None,
    tile: AttentionTile | None = None,
    capability: tuple[int, int] | None = None,
    exact: bool = False,
) -> tuple[Tensor, list[Call]]:
    """Return the result of ``tahf4::fused_attention``, empty, and the launches that fill it.

    Args:
        q_inputs: and the following as for ``tahf4::fused_attention``.
        q_program: likewise; heads have 64, 128 or 256 channels.
        k_inputs: likewise.
        k_program: likewise.
        value: likewise.
        heads: likewise.
        attn_mask: likewise.
        is_causal: likewise.
        scale: likewise.
        enable_gqa: likewise.
        bits: likewise.
        value_bits: likewise.
        units: and the following as for :func:`~tahf4_compiler.backends.triton.attention.calls`.
        tile: likewise.
        capability: likewise.
        exact: likewise.
    """
    how = (attn_mask, is_causal, scale, enable_gqa, bits, value_bits)
    out = empty_fused_attention(q_inputs, q_program, k_inputs, k_program, value, heads, *how)
    program = Program.parse(q_program)
    width = program.shape(q_inputs)[2] // heads
    if width not in WIDTHS:
        raise FormatError(f"a kernel of fused_attention got heads of {width} channels; expected one of {WIDTHS}")
    if out.numel() == 0:
        return out, []
    if value_bits == 16 and scale is not None and scale < 0:  # the kernel takes factors that are not
        q_program, scale = f"{q_program}\nminus: float32 = neg({program.result('x0')})", -scale
    span = width // UNIT if value_bits == 16 and row_span(width) == 0 else 1
    form = (block_of(width, MOST_CHANNELS), bits, span)
    q, before = of_rows(q_inputs, *form, q_program, width)
    k, of_keys = of_rows(k_inputs, *form, k_program, width)
    v, between = of_values(value, value_bits)
    operands = (width, q, k, v, out, value.shape[1], value.shape[2])
    last = launch(*operands, attn_mask, is_causal, scale, None, tile, exact, capability, units)
    return out, [*before, *of_keys, *between, last]


def quantized_calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    bits: int,
    value_bits: int,
    *result: Any,
    **how: Any,
) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return the results of ``tahf4::attention_quantize``, empty, and the launches that fill them.

    Args:
        query: and the following as for ``tahf4::attention_quantize``.
        key: likewise.
        value: likewise.
        attn_mask: likewise.
        is_causal: likewise.
        scale: likewise.
        enable_gqa: likewise.
        bits: likewise.
        value_bits: likewise.
        result: the last of its arguments: how the result is quantized.
        how: as for :func:`~tahf4_compiler.backends.triton.attention.calls`.

    Raises:
        FormatError: as ``tahf4::attention_quantize``; no launch can quantize such a result.
    """
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits, value_bits)
    units = _units(value, (query.shape[0], query.shape[2], query.shape[1]), *result)
    given = (query, key, value, attn_mask, is_causal, scale, enable_gqa, bits, value_bits)
    return (units.codes, units.scales), calls(*given, units=units, **how)[1]


def quantized_calls_of_programs(
    q_inputs: list[Tensor],
    q_program: str,
    k_inputs: list[Tensor],
    k_program: str,
    value: Tensor,
    heads: int,
    *rest: Any,
    **how: Any,
) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return the results of ``tahf4::fused_attention_quantize``, empty, and the launches that fill them.

    Args:
        q_inputs: and the following as for ``tahf4::fused_attention_quantize``.
        q_program: likewise.
        k_inputs: likewise.
        k_program: likewise.
        value: likewise.
        heads: likewise.
        rest: likewise: six arguments of attention, then how the result is quantized.
        how: as for :func:`calls_of_programs`.

    Raises:
        FormatError: as ``tahf4::fused_attention_quantize``; no launch can quantize such a result.
    """
    given, result = (q_inputs, q_program, k_inputs, k_program, value, heads, *rest[:6]), rest[6:]
    batch, _, rows, _ = empty_fused_attention(*given).shape
    units = _units(value, (batch, rows, heads), *result)
    return (units.codes, units.scales), calls_of_programs(*given, units=units, **how)[1]


def _units(
    value: Tensor,
    shape: Sequence[int],
    multiplier: Tensor | None,
    hadamard_block: int,
    result_bits: int = 4,
    span: int = 1,
) -> Units:
    """Return room for a result ``[B, L, H * Ev]``; ``shape``: B, L and H."""
    int8.check_bits(result_bits, quantized=True)
    channels, form = value.shape[3], check_form(span) if result_bits == 4 else 1
    batch, rows, heads = shape
    check_transform(heads * channels, multiplier, hadamard_block)
    if not quantizes(channels, hadamard_block) or units_of(form) != 1:
        raise FormatError(
            f"heads of {channels} channels, a rotation of {hadamard_block} and the form {form}; expected 64 channels "
            f"or a multiple of {CHANNELS}, a rotation within these, and a scale for each unit"
        )
    codes, scales = empty_units(value, (batch, rows, heads * channels), result_bits)
    held = multiplier.contiguous() if multiplier is not None else None
    return Units(codes, scales, held, hadamard_block, result_bits, form // ROUNDED)


def quantizes(channels: int, block: int) -> bool:
    """Whether the last launch can quantize a result whose heads have so many channels, with such a rotation."""
    columns = columns_of(channels)
    return channels % columns == 0 and columns % UNIT == 0 and block <= columns


def serves(given: Mapping[str, Any]) -> bool:
    """Whether kernels can run a node of an operator of this file, or of another attention, by its arguments."""
    if "multiplier" in given:
        own = quantizes(given["value"].meta["val"].shape[-1], given["hadamard_block"])
        if not own or (given.get("result_bits", 4) == 4 and units_of(given.get("span", 1)) != 1):
            return False
    if "q_program" in given:
        k = Program.parse(given["q_program"]).shape([x.meta["val"] for x in given["q_inputs"]])[-1]
        return any(k == given["heads"] * width for width in WIDTHS)
    return True
