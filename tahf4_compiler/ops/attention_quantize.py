"""Attention in 8 bits with the quantization of its result: ``torch.ops.tahf4.attention_quantize``.

``fused_attention_quantize`` is the same behind ``fused_attention``.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import register_fake

from ..format import int8
from ..format.spans import check_form
from .attention import attention, check_attention
from .define import operator
from .fused_attention import empty_fused_attention, fused_attention
from .reference import check_memory, empty_units, quantize

__all__ = ["attention_quantize", "fused_attention_quantize"]


@operator
def attention_quantize(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    bits: int,
    value_bits: int,
    multiplier: Tensor | None,
    hadamard_block: int,
    result_bits: int = 4,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    """Compute ``tahf4::attention``, put its heads side by side, and quantize that.

    Args:
        query: and the following as for ``tahf4::attention``.
        key: likewise.
        value: likewise.
        attn_mask: likewise.
        is_causal: likewise.
        scale: likewise.
        enable_gqa: likewise.
        bits: likewise.
        value_bits: likewise.
        multiplier: float32 ``[H * Ev]`` or None, as for ``tahf4::quantize``.
        hadamard_block: as for ``tahf4::quantize``.
        result_bits: 4 or 8, as the bits of ``tahf4::quantize``.
        span: of the result, and its rounding, as for ``tahf4::quantize``.

    Returns:
        Codes and scales of ``[B, L, H * Ev]``, as ``tahf4::quantize``.

    Raises:
        FormatError: as ``tahf4::attention`` and ``tahf4::quantize``.
    """
    int8.check_bits(result_bits, quantized=True)
    result = attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, bits, value_bits)
    codes, scales = quantize(result.transpose(1, 2).flatten(2), multiplier, hadamard_block, result_bits, span)
    return codes, scales


@register_fake("tahf4::attention_quantize")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    bits: int,
    value_bits: int,
    multiplier: Tensor | None,
    hadamard_block: int,
    result_bits: int = 4,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    int8.check_bits(result_bits, quantized=True)
    check_form(span)
    check_memory("attention_quantize", query, key, value, attn_mask, multiplier)
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits, value_bits)
    batch, heads, rows, _ = query.shape
    return empty_units(query, (batch, rows, heads * value.shape[3]), result_bits)


@operator
def fused_attention_quantize(
    q_inputs: list[Tensor],
    q_program: str,
    k_inputs: list[Tensor],
    k_program: str,
    value: Tensor,
    heads: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    bits: int,
    value_bits: int,
    multiplier: Tensor | None,
    hadamard_block: int,
    result_bits: int = 4,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    """Compute ``tahf4::fused_attention``, put its heads side by side, and quantize that.

    Args:
        q_inputs: and the following as for ``tahf4::fused_attention``.
        q_program: likewise.
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
        multiplier: and the following as for ``tahf4::attention_quantize``.
        hadamard_block: likewise.
        result_bits: likewise.
        span: likewise.

    Returns:
        As ``tahf4::attention_quantize``.

    Raises:
        FormatError: as ``tahf4::fused_attention`` and ``tahf4::quantize``.
    """
    int8.check_bits(result_bits, quantized=True)
    before = (q_inputs, q_program, k_inputs, k_program, value, heads)
    result = fused_attention(*before, attn_mask, is_causal, scale, enable_gqa, bits, value_bits)
    codes, scales = quantize(result.transpose(1, 2).flatten(2), multiplier, hadamard_block, result_bits, span)
    return codes, scales


@register_fake("tahf4::fused_attention_quantize")
def _(
    q_inputs: list[Tensor],
    q_program: str,
    k_inputs: list[Tensor],
    k_program: str,
    value: Tensor,
    heads: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    bits: int,
    value_bits: int,
    multiplier: Tensor | None,
    hadamard_block: int,
    result_bits: int = 4,
    span: int = 1,
) -> tuple[Tensor, Tensor]:
    int8.check_bits(result_bits, quantized=True)
    check_form(span)
    check_memory("fused_attention_quantize", *q_inputs, *k_inputs, value, attn_mask, multiplier)
    before = (q_inputs, q_program, k_inputs, k_program, value, heads)
    result = empty_fused_attention(*before, attn_mask, is_causal, scale, enable_gqa, bits, value_bits)
    batch, _, rows, channels = result.shape
    return empty_units(value, (batch, rows, heads * channels), result_bits)
