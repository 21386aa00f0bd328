"""Attention with what is computed before it: norms and rotary embeddings of its queries and keys, as programs.

``attention_prologue`` makes it. A kernel computes a program and quantizes its result, which never reaches memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from .attention import attention, check_attention
from .define import operator
from .program import Program

__all__ = ["empty_fused_attention", "fused_attention"]


@operator
def fused_attention(
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
) -> Tensor:
    """Compute ``tahf4::attention`` of the results of two programs.

    Args:
        q_inputs: ``x0, x1, ...`` of the next one, that broadcast to ``[B, L, H * E]``, but for angles of ``rotary``.
        q_program: of the queries, see :mod:`tahf4_compiler.ops.program`; an empty one returns ``x0``.
        k_inputs: likewise, to ``[B, S, H * E]``, or of fewer heads with ``enable_gqa``.
        k_program: of the keys.
        value: ``[B, H, S, Ev]``, and the following as for ``tahf4::attention``.
        heads: of the queries; keys have those of the values.
        attn_mask: as for ``tahf4::attention``.
        is_causal: likewise.
        scale: likewise.
        enable_gqa: likewise.
        bits: likewise.
        value_bits: likewise.

    Returns:
        As ``tahf4::attention``, for queries and keys whose heads lie side by side in memory.

    Raises:
        FormatError: as ``tahf4::attention``; a program that cannot be read, or whose result does not fit.
    """
    query = _heads(Program.parse(q_program).run(_named(q_inputs), "x0"), heads)
    key = _heads(Program.parse(k_program).run(_named(k_inputs), "x0"), value.shape[1])
    found: Tensor = attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, bits, value_bits)
    return found


@torch.library.register_fake("tahf4::fused_attention")
def empty_fused_attention(
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
) -> Tensor:
    """Check the arguments of ``tahf4::fused_attention`` and return an empty result."""
    query = _heads(_like_result(q_inputs, q_program), heads)
    key = _heads(_like_result(k_inputs, k_program), value.shape[1])
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits, value_bits)
    batch, _, rows, width = query.shape
    channels = value.shape[3]
    if channels == width:
        return value.new_empty((batch, rows, heads, channels)).transpose(1, 2)
    return value.new_empty((batch, heads, rows, channels))


def _named(inputs: list[Tensor]) -> dict[str, Tensor]:
    return {f"x{i}": value for i, value in enumerate(inputs)}


def _like_result(inputs: list[Tensor], text: str) -> Tensor:
    """Return a tensor of the shape and dtype of a program's result, without memory for it."""
    program = Program.parse(text)
    dtype = program.statements[-1].dtype if program.statements else inputs[0].dtype
    return inputs[0].new_empty((), dtype=dtype).expand(program.shape(inputs))


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return ``[B, S, H * E]`` as ``[B, H, S, E]``."""
    if x.dim() != 3 or heads < 1 or x.shape[2] % heads:
        raise FormatError(f"fused_attention got {tuple(x.shape)} and {heads} heads; expected [B, S, H * E]")
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
