"""C++ kernels for the CPU: conversion to and from HiF4, the linear, what ``fuse`` makes of them, and a histogram.

They are compiled on first use (:mod:`.build`). Without a compiler :func:`available` is False, the functions
here raise, and everything else of this project runs the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ...format import hif4
from ...plugins import host
from . import build, checks, operators, search
from .build import instruction_set
from .programs import DTYPES

__all__ = [
    "BUCKETS",
    "available",
    "checksums",
    "dequantize",
    "fused_linear",
    "fused_quantize",
    "histogram",
    "instruction_set",
    "linear",
    "linear_quantize",
    "quantize",
    "register",
    "serves",
    "slow_dtype",
]

BUCKETS = 98
"""Of a channel's histogram: below 2**-10, four an octave from there to 2**14, and from 2**14 on."""


def available() -> bool:
    """Return whether the kernels can run here. The first call compiles them."""
    return build.library() is not None


def serves(x: Tensor, multiplier: Tensor | None = None) -> bool:
    """Return whether :func:`quantize` takes tensors: on the CPU, float32, bfloat16 or float16, and it is compiled."""
    given = [x] if multiplier is None else [x, multiplier]
    # A subclass (a fake tensor, for one) may have no memory of its own to read.
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in given)
    return plain and all(t.device.type == "cpu" and t.dtype in DTYPES for t in given) and available()


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
    return _call("quantize", [x], x, multiplier, hadamard_block)


def fused_quantize(
    inputs: Sequence[Tensor], program: str, multiplier: Tensor | None = None, hadamard_block: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute a program and quantize its result, 64 values at a time: ``torch.ops.tahf4.fused_quantize``.

    Norms add in another order than PyTorch's, and exponentials differ in their last bits: a value that lies on the
    boundary of two codes may take the other one.

    Args:
        inputs: float32, bfloat16 or float16, on the CPU, that broadcast to ``[..., K]``.
        program: see :mod:`tahf4_compiler.ops.program`; one that :func:`programs.encode` takes.
        multiplier: as for :func:`quantize`.
        hadamard_block: as for :func:`quantize`.

    Returns:
        As :func:`quantize`, of the program's result.

    Raises:
        FormatError: dtypes, devices or shapes do not fit.
    """
    return _call("fused_quantize", inputs, inputs, program, multiplier, hadamard_block)


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
    checks.on_cpu("dequantize", codes, scales)
    if not checks.real():
        return hif4.dequantize(hif4.Packed(codes, scales, count * hif4.UNIT))
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty((*scales.shape[:-1], count * hif4.UNIT), dtype=torch.float32, device="cpu")
    if out.numel():
        build.loaded().tahf4_dequantize(
            *(codes.data_ptr(), scales.data_ptr(), scales.numel() // count, count, out.data_ptr()),
            torch.get_num_threads(),
        )
    return out


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
    return _call("linear", [codes], codes, scales, weight_codes, weight_scales, bias, out_dtype)


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
) -> list[Tensor]:
    """W4A4 linear, then a program on its result, or several results: ``torch.ops.tahf4.fused_linear``.

    Args:
        codes: and the next five as for :func:`linear`; ``out_dtype`` float32, bfloat16 or float16.
        scales: of the activation.
        weight_codes: of the weight.
        weight_scales: of the weight.
        bias: or None.
        out_dtype: of ``y`` of the program.
        sizes: columns of each result; they sum to N. More than one only with an empty program.
        inputs: as for :func:`fused_quantize`; they broadcast to ``[..., N]``.
        program: see :mod:`tahf4_compiler.ops.program`.
        result_dtype: of the results.

    Returns:
        Contiguous ``[..., size]`` for each of the sizes.

    Raises:
        FormatError: dtypes, devices, shapes or sizes do not fit.
        OptionError: as :func:`instruction_set`.
    """
    product = codes, scales, weight_codes, weight_scales, bias, out_dtype
    return _call("fused_linear", [codes], *product, sizes, inputs, program, result_dtype)


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
) -> tuple[Tensor, Tensor]:
    """W4A4 linear, a program on its result, and the quantization of that: ``torch.ops.tahf4.linear_quantize``.

    Args:
        codes: and the following as for :func:`fused_linear`.
        scales: of the activation.
        weight_codes: of the weight.
        weight_scales: of the weight.
        bias: or None.
        out_dtype: of ``y`` of the program.
        inputs: of the program.
        program: see :mod:`tahf4_compiler.ops.program`.
        multiplier: float32 ``[N]`` or None, as for :func:`quantize`.
        hadamard_block: as for :func:`quantize`.

    Returns:
        Codes uint8 ``[..., ceil(N / 64) * 32]`` and scales int32 ``[..., ceil(N / 64)]``.

    Raises:
        FormatError: dtypes, devices or shapes do not fit.
        OptionError: as :func:`instruction_set`.
    """
    product = codes, scales, weight_codes, weight_scales, bias, out_dtype
    return _call("linear_quantize", [codes], *product, inputs, program, multiplier, hadamard_block)


def _call(name: str, first: Sequence[Tensor], *given: Any) -> Any:
    """Call one of :mod:`.operators`, where the kernels can run."""
    build.loaded()
    checks.on_cpu(name, *first)  # a meta tensor would give one
    return operators.OPERATORS[name](*given)


def checksums(words: Sequence[Tensor], factors: Tensor) -> list[int]:
    """Return, for each tensor, the sum modulo 2**64 of its 32-bit words times the factors of their lane and row.

    The reference is :func:`tahf4_compiler.weights.checksum.checksum`.

    Args:
        words: contiguous, on the CPU, a multiple of 4 bytes each.
        factors: int64 ``[4096]`` of the lanes.

    Returns:
        Signed 64-bit numbers.

    Raises:
        FormatError: another size or device.
    """
    checks.on_cpu("checksums", *words, factors)
    if factors.shape != (4096,) or factors.dtype != torch.int64:
        raise FormatError(f"checksums got factors of {factors.dtype} {tuple(factors.shape)}; expected int64 (4096,)")
    library, threads, found = build.loaded(), torch.get_num_threads(), []
    for part in words:
        size = part.numel() * part.element_size()
        if size % 4 or not part.is_contiguous():
            raise FormatError(f"checksums got {size} bytes; expected contiguous whole words")
        total: int = library.tahf4_checksum(part.data_ptr(), size // 4, factors.data_ptr(), threads)
        found.append(total - (total >> 63 << 64))
    return found


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
    rows, dtype = checks.as_rows("histogram", x)
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
        checks.on_cpu("histogram", tensor)
    if rows.numel():
        build.loaded().tahf4_histogram(
            *(rows.data_ptr(), dtype, len(rows), channels, rows.stride(0)),
            *(tensor.data_ptr() for _, tensor, _, _ in wanted),
            torch.get_num_threads(),
        )


@functools.cache
def slow_dtype(dtype: torch.dtype) -> bool:
    """Return whether this is an x86 processor that has no products of a 16-bit dtype: False where it is not known."""
    flags = set(build.processor().split())
    units = {torch.bfloat16: {"avx512_bf16", "amx_bf16"}, torch.float16: {"avx512_fp16", "amx_fp16"}}
    return "sse2" in flags and dtype in units and not units[dtype] & flags


def register() -> None:
    """Register the kernels and host functions; nothing is compiled before one is needed."""
    operators.register()
    host.register("histogram", lambda x: x.device.type == "cpu" and x.dtype in DTYPES and available(), histogram)
    host.register("slow_dtype", lambda device: device.type == "cpu", lambda dtype: slow_dtype(dtype))
    host.register("checksums", _whole_words, checksums)
    host.register("search", search.serves, search.search)
    host.register("transform", search.transforms, search.transform)


def _whole_words(words: Sequence[Tensor]) -> bool:
    fits = [t.numel() % 4 == 0 and t.is_cpu and type(t) is Tensor for t in words]
    return all(fits) and available()
