"""What the operators of this folder refuse: each function takes an operator's arguments and says what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...errors import FormatError
from ...format import hif4, int8
from ...format.spans import alone, check_form, units_of
from ...ops import fused
from ...ops.attention_codes import check_codes
from ...torch_private.tensors import under_modes
from .programs import DTYPES, Encoded, encode

__all__ = [
    "as_rows",
    "attention",
    "attention_lse",
    "attention_of_codes",
    "broadcast",
    "fused_linear",
    "fused_quantize",
    "linear",
    "linear_quantize",
    "on_cpu",
    "quantize",
    "real",
    "rows",
]


def real() -> bool:
    """Return whether tensors have memory: not inside a mode that makes fake ones."""
    return not under_modes()


def on_cpu(what: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that lie elsewhere."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            raise FormatError(f"{what} got a tensor on {tensor.device}; expected one on the CPU")


def rows(what: str, x: Tensor) -> None:
    """Refuse what has no rows of float32, bfloat16 or float16 on the CPU."""
    if x.dtype not in DTYPES:
        raise FormatError(f"{what} got a tensor of {x.dtype}; expected float32, bfloat16 or float16")
    if x.dim() == 0:
        raise FormatError(f"{what} got a tensor without axes; expected at least one: channels lie along the last")
    on_cpu(what, x)


def _target(what: str, k: int, multiplier: Tensor | None, hadamard_block: int, bits: int, span: int = 1) -> None:
    int8.check_bits(bits)
    check_form(span)
    ops.check_transform(k, multiplier, hadamard_block)
    if multiplier is not None and multiplier.dtype not in DTYPES:
        raise FormatError(f"{what} got a multiplier of {multiplier.dtype}; expected float32")
    on_cpu(what, multiplier)


def quantize(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> None:
    """See ``tahf4::quantize``."""
    rows("quantize", x)
    _target("quantize", x.shape[-1], multiplier, hadamard_block, bits, span)


def linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    span: int = 1,
) -> None:
    """See ``tahf4::linear``."""
    hif4.check_span(span)
    ops.check_linear(codes, scales, weight_codes, weight_scales, bias)
    on_cpu("linear", codes, scales, weight_codes, weight_scales, bias)


def fused_quantize(
    inputs: Sequence[Tensor],
    program: str,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> None:
    """See ``tahf4::fused_quantize``."""
    _encoded(program, "x0")
    shape = broadcast(inputs)
    _inputs("fused_quantize", inputs, shape)
    _target("fused_quantize", shape[-1], multiplier, hadamard_block, bits, span)


def fused_linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    sizes: Sequence[int],
    inputs: Sequence[Tensor],
    program: str,
    result_dtype: torch.dtype,
    span: int = 1,
) -> None:
    """See ``tahf4::fused_linear``."""
    hif4.check_span(span)
    shape = _product("fused_linear", (codes, scales, weight_codes, weight_scales, bias), inputs, program)
    fused.check_sizes(sizes, shape[-1], program)
    found = _encoded(program, "y").dtype or out_dtype
    if found != result_dtype:
        raise FormatError(f"the program's result is {found}; result_dtype says {result_dtype}")


def linear_quantize(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    inputs: Sequence[Tensor],
    program: str,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> None:
    """See ``tahf4::linear_quantize``."""
    hif4.check_span(units_of(span))
    shape = _product("linear_quantize", (codes, scales, weight_codes, weight_scales, bias), inputs, program)
    _target("linear_quantize", shape[-1], multiplier, hadamard_block, bits, alone(span))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
    value_bits: int = 8,
) -> None:
    """See ``tahf4::attention``."""
    ops.check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits, value_bits)
    on_cpu("attention", query, key, value, attn_mask)


attention_lse = attention


def attention_of_codes(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    scale: float | None = None,
) -> None:
    """See ``tahf4::attention_of_codes``."""
    given = (query, key_codes, value_codes, key_scales, value_scales)
    check_codes(*given)
    on_cpu("attention_of_codes", *given)


def _product(
    what: str, given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], inputs: Sequence[Tensor], program: str
) -> tuple[int, ...]:
    """Return the shape of a product, checked with the inputs of its program."""
    ops.check_linear(*given)
    on_cpu(what, *given)
    shape = (*given[1].shape[:-1], len(given[2]))
    _inputs(what, inputs, shape, _encoded(program, "y").factors)
    return shape


def broadcast(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Return what shapes broadcast to, if they do."""
    axes = max((x.dim() for x in inputs), default=0)
    if not axes:
        raise FormatError("fused_quantize got no tensor with axes; expected at least one: channels lie along the last")
    padded = [(1,) * (axes - x.dim()) + tuple(x.shape) for x in inputs]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))


def _inputs(what: str, inputs: Sequence[Tensor], shape: Sequence[int], factors: int = 0) -> None:
    on_cpu(what, *inputs)
    for i, x in enumerate(inputs):
        if x.dtype not in DTYPES:
            raise FormatError(f"{what} got a tensor of {x.dtype}; expected float32, bfloat16 or float16")
        if factors >> i & 1:
            _factors(what, inputs[i : i + 2], shape)
        if (factors | factors << 1) >> i & 1:
            continue
        fits = x.dim() <= len(shape) and all(a in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False))
        if not fits:
            raise FormatError(f"{what} got a tensor of shape {tuple(x.shape)}; expected one that broadcasts to {shape}")


def _factors(what: str, given: Sequence[Tensor], shape: Sequence[int]) -> None:
    left, right = tuple(given[0].shape), tuple(given[-1].shape)
    fits = len(given) == 2 and left[:-1] == tuple(shape[:-1]) and len(left) == len(shape)
    if not fits or given[0].dtype != given[1].dtype or right != (left[-1], shape[-1]):
        raise FormatError(
            f"{what} got factors of shapes {left} and {right}, of {given[0].dtype} and {given[-1].dtype}; expected "
            f"{(*shape[:-1], 'r')} and ('r', {shape[-1]}) of one dtype"
        )


def _encoded(text: str, default: str) -> Encoded:
    """Return a program as the C++ code reads it."""
    encoded = encode(text, default)
    if encoded is None:
        raise FormatError(
            "the program has more than one reduction, one of a product, a product where there is none, more than 16 "
            "inputs, or a matmul without a product that the result reads; use torch.ops.tahf4"
        )
    return encoded


def as_rows(what: str, x: Tensor) -> tuple[Tensor, int]:
    """Return ``x`` as ``[rows, K]`` with a contiguous last axis, and the number of its dtype."""
    rows(what, x)
    if x.dim() == 2 and x.is_contiguous() and x.numel() and not x.is_neg():
        return x, DTYPES[x.dtype]
    # A lazily conjugated or negated tensor would be read as it is stored.
    x = x.detach().resolve_neg()
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return (flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()), DTYPES[x.dtype]
