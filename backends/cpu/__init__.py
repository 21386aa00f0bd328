"""C++ kernels for the CPU: conversion to and from HiF4, the linear, and the histogram of calibration.

They are compiled on first use (:mod:`.build`). Without a compiler :func:`available` is False, the functions
here raise, and everything else of this project runs the reference.
"""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor, fx

from ... import hif4, kernels, ops
from ...errors import FormatError, OptionError
from . import build

__all__ = [
    "BUCKETS",
    "available",
    "dequantize",
    "histogram",
    "instruction_set",
    "linear",
    "quantize",
    "register",
    "serves",
]

BUCKETS = 98
"""Of a channel's histogram: below 2**-10, four an octave from there to 2**14, and from 2**14 on."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SETS = {"none": 0, "avx2": 1, "avx_vnni": 2, "avx512_vnni": 3}  # best last, by their bit in the library
_ANY = {*_DTYPES, torch.uint8, torch.int32}  # what the operators read


def available() -> bool:
    """Return whether the kernels can run here. The first call compiles them."""
    return build.library() is not None


def serves(x: Tensor, multiplier: Tensor | None = None) -> bool:
    """Return whether :func:`quantize` takes tensors: on the CPU, float32, bfloat16 or float16, and it is compiled."""
    given = [x] if multiplier is None else [x, multiplier]
    # A subclass (a fake tensor, for one) may have no memory of its own to read.
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in given)
    return plain and all(t.device.type == "cpu" and t.dtype in _DTYPES for t in given) and available()


def quantize(x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0) -> tuple[Tensor, Tensor]:
    """Transform and convert to HiF4 along the last axis: ``torch.ops.tahf4.quantize``, bit for bit.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, on the CPU.
        multiplier: float32 ``[K]``, or None.
        hadamard_block: a power of two that divides K rounded up to a multiple of 64, or 0.

    Returns:
        ``codes`` uint8 ``[..., ceil(K / 64) * 32]`` and ``scales`` int32 ``[..., ceil(K / 64)]``.

    Raises:
        FormatError: dtype, device, the multiplier's shape or the block width do not fit.
    """
    rows, dtype = _rows("quantize", x)
    k = x.shape[-1]
    ops.check_transform(k, multiplier, hadamard_block)
    if multiplier is not None:
        if multiplier.dtype not in _DTYPES:
            raise FormatError(f"quantize got a multiplier of {multiplier.dtype}; expected float32")
        _on_cpu("quantize", multiplier)
        multiplier = multiplier.detach().to(torch.float32).resolve_neg().contiguous()
    count = hif4.units(k)
    codes = torch.empty((*x.shape[:-1], count * (hif4.UNIT // 2)), dtype=torch.uint8)
    scales = torch.empty((*x.shape[:-1], count), dtype=torch.int32)
    if codes.numel():
        _library().tahf4_quantize(
            *(rows.data_ptr(), dtype, len(rows), k, rows.stride(0)),
            *(multiplier.data_ptr() if multiplier is not None else None, hadamard_block),
            *(hadamard_block**-0.5 if hadamard_block else 1.0, codes.data_ptr(), scales.data_ptr()),
            torch.get_num_threads(),
        )
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Convert whole units back: ``hif4.dequantize``, bit for bit.

    Args:
        codes: uint8 ``[..., units * 32]`` on the CPU.
        scales: int32 ``[..., units]`` on the CPU.

    Returns:
        float32 ``[..., units * 64]``.

    Raises:
        FormatError: shapes or dtypes do not fit each other.
    """
    count = scales.shape[-1] if scales.dim() else 0
    hif4.check_packed(hif4.Packed(codes, scales, count * hif4.UNIT))
    _on_cpu("dequantize", codes, scales)
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty((*scales.shape[:-1], count * hif4.UNIT), dtype=torch.float32)
    if out.numel():
        _library().tahf4_dequantize(
            *(codes.data_ptr(), scales.data_ptr(), scales.numel() // count, count, out.data_ptr()),
            torch.get_num_threads(),
        )
    return out


def instruction_set() -> str:
    """Return what the integer product runs on: ``"avx512_vnni"``, ``"avx_vnni"``, ``"avx2"``, or ``"none"``.

    The best that the processor has, or what ``TAHF4_CPU_ISA`` in the environment names. With ``"none"`` (another
    processor) :func:`linear` dequantizes and multiplies in float32.

    Raises:
        OptionError: ``TAHF4_CPU_ISA`` names nothing known, or what this processor lacks.
    """
    found = _library().tahf4_instruction_sets()
    usable = [name for name, bit in _SETS.items() if bit == 0 or found >> bit & 1]
    wanted = os.environ.get("TAHF4_CPU_ISA", "")
    if wanted and wanted not in usable:
        raise OptionError(f"TAHF4_CPU_ISA is {wanted!r}; expected one of {', '.join(usable)}, which this processor has")
    return wanted or usable[-1]


def linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W4A4 linear in integers, scaled once a unit: ``torch.ops.tahf4.linear`` but for the order of the float32 sum.

    Every unit's contribution is exact. Units are added in their order for each result alone, so the number of threads
    and of rows changes nothing.

    Args:
        codes: uint8 ``[..., K / 2]`` of the activation, on the CPU.
        scales: int32 ``[..., K / 64]`` of the activation.
        weight_codes: uint8 ``[N, K / 2]``.
        weight_scales: int32 ``[N, K / 64]``.
        bias: ``[N]`` or None, added in float32.
        out_dtype: of the result.

    Returns:
        ``[..., N]`` of ``out_dtype``.

    Raises:
        FormatError: shapes, dtypes or devices do not fit.
        OptionError: as :func:`instruction_set`.
    """
    ops.check_linear(codes, scales, weight_codes, weight_scales, bias)
    given = codes, scales, weight_codes, weight_scales
    _on_cpu("linear", *given, *(() if bias is None else (bias,)))
    n, count = weight_scales.shape
    chosen = _SETS[instruction_set()]
    if not chosen or not count:
        out = torch.nn.functional.linear(dequantize(codes, scales), dequantize(weight_codes, weight_scales))
        return (out if bias is None else out + bias.to(torch.float32)).to(out_dtype)
    written = out_dtype if out_dtype == torch.bfloat16 else torch.float32
    out = torch.empty((*scales.shape[:-1], n), dtype=written)
    if out.numel():
        codes, scales, weight_codes, weight_scales = (t.contiguous() for t in given)
        factors = bias.detach().to(torch.float32).resolve_neg().contiguous() if bias is not None else None
        _library().tahf4_linear(
            *(codes.data_ptr(), scales.data_ptr(), scales.numel() // count),
            *(weight_codes.data_ptr(), weight_scales.data_ptr(), n, count),
            *(factors.data_ptr() if factors is not None else None, out.data_ptr(), int(written == torch.bfloat16)),
            *(chosen, torch.get_num_threads()),
        )
    return out.to(out_dtype)


def histogram(x: Tensor, counts: Tensor, maxima: Tensor, squares: Tensor, nonfinite: Tensor) -> None:
    """Add the magnitudes of an activation's channels to histograms, in place.

    Args:
        x: ``[..., C]``, float32, bfloat16 or float16, on the CPU.
        counts: int32 ``[C, 98]``: 0 counts ``|x| < 2**-10``, 1 to 96 are the buckets up to 2**14, four an octave,
            97 counts the rest.
        maxima: float32 ``[C]``, the largest magnitudes.
        squares: float64 ``[C]``, the sums of squares.
        nonfinite: int64 ``[1]``: how many values are NaN or infinite. They count nowhere else.

    Raises:
        FormatError: a dtype, shape or device does not fit.
    """
    rows, dtype = _rows("histogram", x)
    channels = x.shape[-1]
    wanted: tuple[tuple[str, Tensor, torch.dtype, tuple[int, ...]], ...] = (
        ("counts", counts, torch.int32, (channels, BUCKETS)),
        ("maxima", maxima, torch.float32, (channels,)),
        ("squares", squares, torch.float64, (channels,)),
        ("nonfinite", nonfinite, torch.int64, (1,)),
    )
    for name, tensor, kind, shape in wanted:
        if tensor.dtype != kind or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise FormatError(
                f"histogram got {name} of {tensor.dtype} and shape {tuple(tensor.shape)}; expected a contiguous "
                f"tensor of {kind} and shape {shape}"
            )
        _on_cpu("histogram", tensor)
    if rows.numel():
        _library().tahf4_histogram(
            *(rows.data_ptr(), dtype, len(rows), channels, rows.stride(0)),
            *(tensor.data_ptr() for _, tensor, _, _ in wanted),
            torch.get_num_threads(),
        )


def _rows(what: str, x: Tensor) -> tuple[Tensor, int]:
    """Return ``x`` as ``[rows, K]`` with a contiguous last axis, and the number of its dtype."""
    if x.dtype not in _DTYPES:
        raise FormatError(f"{what} got a tensor of {x.dtype}; expected float32, bfloat16 or float16")
    if x.dim() == 0:
        raise FormatError(f"{what} got a tensor without axes; expected at least one: channels lie along the last")
    _on_cpu(what, x)
    # A lazily conjugated or negated tensor would be read as it is stored.
    x = x.detach().resolve_neg()
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return (rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()), _DTYPES[x.dtype]


def _on_cpu(what: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise FormatError(f"{what} got a tensor on {tensor.device}; expected one on the CPU")


def _library() -> ctypes.CDLL:
    library = build.library()
    if library is None:
        raise RuntimeError("there are no C++ kernels here (no compiler, or TAHF4_NO_CPP is set); ask available() first")
    return library


@torch.library.custom_op("tahf4_cpu::quantize", mutates_args=())
def _quantize_op(x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0) -> tuple[Tensor, Tensor]:
    if not available():  # a graph that was lowered elsewhere
        codes, scales = torch.ops.tahf4.quantize(x, multiplier, hadamard_block)
        return codes, scales
    return quantize(x, multiplier, hadamard_block)


@_quantize_op.register_fake
def _(x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0) -> tuple[Tensor, Tensor]:
    count = hif4.units(x.shape[-1])
    codes = x.new_empty((*x.shape[:-1], count * (hif4.UNIT // 2)), dtype=torch.uint8)
    return codes, x.new_empty((*x.shape[:-1], count), dtype=torch.int32)


@torch.library.custom_op("tahf4_cpu::linear", mutates_args=())
def _linear_op(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if not available():
        product: Tensor = torch.ops.tahf4.linear(codes, scales, weight_codes, weight_scales, bias, out_dtype)
        return product
    return linear(codes, scales, weight_codes, weight_scales, bias, out_dtype)


@_linear_op.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    ops.check_linear(codes, scales, weight_codes, weight_scales, bias)
    return codes.new_empty((*codes.shape[:-1], weight_codes.shape[0]), dtype=out_dtype)


def register() -> None:
    """Register the kernels under the name "cpu" (:func:`tahf4_compiler.kernels.register_kernel`)."""
    for operator, target in (
        (torch.ops.tahf4.quantize.default, torch.ops.tahf4_cpu.quantize.default),
        (torch.ops.tahf4.linear.default, torch.ops.tahf4_cpu.linear.default),
    ):
        kernels.register_kernel("cpu", operator, target, _serves_node)


def _serves_node(node: fx.Node) -> bool:
    values = [source.meta.get("val") for source in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return (
        bool(tensors)
        and all(tensor.device.type == "cpu" and tensor.dtype in _ANY for tensor in tensors)
        and torch.float64 not in node.args
        and available()
    )
