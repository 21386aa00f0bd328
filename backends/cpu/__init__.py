"""C++ kernels for the CPU: conversion to and from HiF4, the linear, what ``fuse`` makes of them, and a histogram.

They are compiled on first use (:mod:`.build`). Without a compiler :func:`available` is False, the functions
here raise, and everything else of this project runs the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
    "histogram",
    "instruction_set",
    "quantize",
    "register",
    "slow_dtype",
]

BUCKETS = 98
"""Of a channel's histogram: below 2**-10, four an octave from there to 2**14, and from 2**14 on."""


def available() -> bool:
    """Return whether the kernels can run here. The first call compiles them."""
    return build.library() is not None


def quantize(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> tuple[Tensor, Tensor]:
    """Transform and convert to HiF4, or to 8 bits, along the last axis: ``torch.ops.tahf4.quantize``, bit for bit.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, on the CPU.
        multiplier: float32 ``[K]``, or None.
        hadamard_block: a power of two that divides K rounded up to a multiple of 64, or 0.
        bits: 4 or 8.
        span: units that share a level-1 scale; 0 for a row.

    Returns:
        Codes and scales, as ``torch.ops.tahf4.quantize``.

    Raises:
        FormatError: dtype, device, the multiplier's shape or the block width do not fit.
    """
    build.loaded()
    checks.on_cpu("quantize", x)  # a meta tensor would give one
    codes, scales = operators.OPERATORS["quantize"](x, multiplier, hadamard_block, bits, span)
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
    host.register("spans_save_time", lambda device: device.type == "cpu" and available(), _spans_save_time)
    host.register("slow_dtype", lambda device: device.type == "cpu", lambda dtype: slow_dtype(dtype))
    host.register("checksums", _whole_words, checksums)
    host.register("dequantize", _plain, lambda codes, scales, k, dtype: dequantize(codes, scales)[..., :k].to(dtype))
    host.register("search", search.serves, search.search)
    host.register("descend_unit", search.serves, search.descend_unit)
    host.register("round_unit", search.serves, search.round_unit)
    host.register("transform", search.transforms, search.transform)


def _spans_save_time(device: torch.device) -> bool:
    return instruction_set() != "none"  # else products are in float32


def _plain(codes: Tensor) -> bool:
    return codes.is_cpu and type(codes) in (Tensor, torch.nn.Parameter) and available()


def _whole_words(words: Sequence[Tensor]) -> bool:
    fits = [t.numel() % 4 == 0 and t.is_cpu and type(t) is Tensor for t in words]
    return all(fits) and available()
