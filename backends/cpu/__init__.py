"""C++ kernels for the CPU: conversion to and from HiF4, the linear, what ``fuse`` makes of them, and a histogram.

They are compiled on first use (:mod:`.build`). Without a compiler :func:`available` is False, the functions
here raise, and everything else of this project runs the reference.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import fused_ops, hif4, ops
from ...errors import FormatError, OptionError
from . import build
from .programs import DTYPES, Encoded, encode, inputs_of

__all__ = [
    "BUCKETS",
    "available",
    "checksum",
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

_SETS = {"none": 0, "avx2": 1, "avx_vnni": 2, "avx512_vnni": 3, "amx": 4}  # best last, by their bit in the library


# Structures of common.h as bytes: what ctypes makes of them takes longer than a small product.
_TARGET = struct.Struct("PqfPP")  # multiplier, block, norm, codes, scales
_OPERANDS = struct.Struct("PPPPPqqqi")  # codes, scales, weight codes, weight scales, bias, m, n, units, dtype
_RESULT = struct.Struct("PPPiPqfPP")  # program, inputs, out, dtype, and a target


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
    rows, dtype = _rows("quantize", x)
    k = x.shape[-1]
    units = _Units("quantize", x.shape, multiplier, hadamard_block)
    if units.codes.numel():
        library, isa = _ready()
        library.tahf4_quantize(
            *(rows.data_ptr(), dtype, rows.shape[0], k, rows.stride(0), *units.target, isa, torch.get_num_threads())
        )
    return units.codes, units.scales


class _Units:
    """Where a quantization of ``[..., K]`` goes: ``codes`` and ``scales``, and ``target`` for the C++ code."""

    __slots__ = ("codes", "multiplier", "scales", "target")

    def __init__(self, what: str, shape: Sequence[int], multiplier: Tensor | None, hadamard_block: int) -> None:
        k = shape[-1]
        if multiplier is not None:
            ops.check_transform(k, multiplier, hadamard_block)
            if multiplier.dtype not in DTYPES:
                raise FormatError(f"{what} got a multiplier of {multiplier.dtype}; expected float32")
            _on_cpu(what, multiplier)
        count, norm = _transform(k, hadamard_block)
        self.multiplier = _plain(multiplier)
        leading = tuple(shape[:-1])
        self.codes = torch.empty((*leading, count * (hif4.UNIT // 2)), dtype=torch.uint8)
        self.scales = torch.empty((*leading, count), dtype=torch.int32)
        pointers = self.codes.data_ptr(), self.scales.data_ptr()
        self.target = (_pointer(self.multiplier), hadamard_block, norm, *pointers)


@functools.lru_cache(1024)
def _transform(k: int, block: int) -> tuple[int, float]:
    """Return the units of a row and the normalization of a rotation that fits."""
    ops.check_transform(k, None, block)
    return hif4.units(k), block**-0.5 if block else 1.0


def fused_quantize(
    inputs: Sequence[Tensor], program: str, multiplier: Tensor | None = None, hadamard_block: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute a program and quantize its result, 64 values at a time: ``torch.ops.tahf4.fused_quantize``.

    Norms add in another order than PyTorch's, and exponentials differ in their last bits: a value that lies on the
    boundary of two codes may take the other one.

    Args:
        inputs: float32, bfloat16 or float16, on the CPU, that broadcast to ``[..., K]``.
        program: see :mod:`tahf4_compiler.program`; one that :func:`programs.encode` takes.
        multiplier: as for :func:`quantize`.
        hadamard_block: as for :func:`quantize`.

    Returns:
        As :func:`quantize`, of the program's result.

    Raises:
        FormatError: dtypes, devices or shapes do not fit.
    """
    encoded, shape = _encoded(program, "x0"), _broadcast(inputs)
    _check_inputs("fused_quantize", inputs, program, shape)
    units = _Units("fused_quantize", shape, multiplier, hadamard_block)
    if units.codes.numel():
        given = inputs_of(inputs, shape)
        _library().tahf4_fused_quantize(
            *(ctypes.addressof(encoded.struct), ctypes.addressof(given.struct), math.prod(shape[:-1]), shape[-1]),
            *(_TARGET.pack(*units.target), _ready()[1], torch.get_num_threads()),
        )
    return units.codes, units.scales


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
    """Return what the integer product runs on: ``"amx"``, ``"avx512_vnni"``, ``"avx_vnni"``, ``"avx2"``, or ``"none"``.

    The best that the processor has, or what ``TAHF4_CPU_ISA`` in the environment names. With ``"none"`` (another
    processor) :func:`linear` dequantizes and multiplies in float32.

    Raises:
        OptionError: ``TAHF4_CPU_ISA`` names nothing known, or what this processor lacks.
    """
    found = _ready()[1]
    return next(name for name, number in _SETS.items() if number == found)


def _ready() -> tuple[ctypes.CDLL, int]:
    """Return the library and the number of :func:`instruction_set`."""
    return _library(), _number(build.switch("TAHF4_CPU_ISA"))


@functools.cache
def _number(wanted: str) -> int:
    usable = _usable(_library().tahf4_instruction_sets())
    if wanted and wanted not in usable:
        raise OptionError(f"TAHF4_CPU_ISA is {wanted!r}; expected one of {', '.join(usable)}, which this processor has")
    return _SETS[wanted or usable[-1]]


@functools.cache
def _usable(found: int) -> tuple[str, ...]:
    return tuple(name for name, bit in _SETS.items() if bit == 0 or found >> bit & 1)


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
    given = codes, scales, weight_codes, weight_scales, bias
    _on_cpu("linear", *given)
    if not _ready()[1] or not scales.shape[-1]:
        product = torch.nn.functional.linear(dequantize(codes, scales), dequantize(weight_codes, weight_scales))
        return (product if bias is None else product + bias.to(torch.float32)).to(out_dtype)
    written = out_dtype if out_dtype in DTYPES else torch.float32
    out = torch.empty((*scales.shape[:-1], len(weight_codes)), dtype=written)
    _product(given, out.dtype, "", (), out=out)
    return out if out_dtype == written else out.to(out_dtype)


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
        program: see :mod:`tahf4_compiler.program`.
        result_dtype: of the results.

    Returns:
        Contiguous ``[..., size]`` for each of the sizes.

    Raises:
        FormatError: dtypes, devices, shapes or sizes do not fit.
        OptionError: as :func:`instruction_set`.
    """
    shape = _check_product("fused_linear", codes, scales, weight_codes, weight_scales, bias, inputs, program)
    fused_ops.check_sizes(sizes, shape[-1], program)
    found = _encoded(program, "y").dtype or out_dtype
    if found != result_dtype:
        raise FormatError(f"the program's result is {found}; result_dtype says {result_dtype}")
    results, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        given = codes, scales, weight_codes[part], weight_scales[part], None if bias is None else bias[part]
        out = torch.empty((*shape[:-1], size), dtype=result_dtype)
        _product(given, out_dtype, program, inputs, out=out)
        results.append(out)
        first += size
    return results


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
        program: see :mod:`tahf4_compiler.program`.
        multiplier: float32 ``[N]`` or None, as for :func:`quantize`.
        hadamard_block: as for :func:`quantize`.

    Returns:
        Codes uint8 ``[..., ceil(N / 64) * 32]`` and scales int32 ``[..., ceil(N / 64)]``.

    Raises:
        FormatError: dtypes, devices or shapes do not fit.
        OptionError: as :func:`instruction_set`.
    """
    shape = _check_product("linear_quantize", codes, scales, weight_codes, weight_scales, bias, inputs, program)
    units = _Units("linear_quantize", shape, multiplier, hadamard_block)
    _product((codes, scales, weight_codes, weight_scales, bias), out_dtype, program, inputs, units=units)
    return units.codes, units.scales


def _product(
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    dtype: torch.dtype,
    program: str,
    inputs: Sequence[Tensor],
    out: Tensor | None = None,
    units: _Units | None = None,
) -> None:
    """Fill ``out`` or ``units`` with a product, bias included, rounded to ``dtype``, that goes through a program."""
    tensors = [t.contiguous() for t in given[:4]]
    _, scales, _, weight_scales = tensors
    n, count = weight_scales.shape
    bias = _plain(given[4])
    shape = (*scales.shape[:-1], n)
    if not math.prod(shape):
        return
    # Rounded once: writing does it.
    rounded = torch.float32 if out is not None and not program else dtype
    described = inputs_of(inputs, shape)
    operands = _OPERANDS.pack(
        *(t.data_ptr() for t in tensors), _pointer(bias), math.prod(shape[:-1]), n, count, DTYPES[rounded]
    )
    result = _RESULT.pack(
        ctypes.addressof(_encoded(program, "y").struct) if program else 0,
        *(ctypes.addressof(described.struct), 0 if out is None else out.data_ptr()),
        *(0 if out is None else DTYPES[out.dtype], *(_NO_TARGET if units is None else units.target)),
    )
    library, isa = _ready()
    library.tahf4_linear(operands, result, isa, torch.get_num_threads())


_NO_TARGET = (0, 0, 0.0, 0, 0)


def _check_product(
    what: str,
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    inputs: Sequence[Tensor],
    program: str,
) -> tuple[int, ...]:
    """Return the shape of a product, checked with the inputs of its program."""
    ops.check_linear(codes, scales, weight_codes, weight_scales, bias)
    _on_cpu(what, codes, scales, weight_codes, weight_scales, bias)
    shape = (*scales.shape[:-1], len(weight_codes))
    _check_inputs(what, inputs, program, shape)
    return shape


def _broadcast(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Return what shapes broadcast to if they do; :func:`_check_inputs` says whether. PyTorch's own takes long."""
    axes = max((x.dim() for x in inputs), default=0)
    padded = [(1,) * (axes - x.dim()) + tuple(x.shape) for x in inputs]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))


def _check_inputs(what: str, inputs: Sequence[Tensor], program: str, shape: Sequence[int]) -> None:
    _on_cpu(what, *inputs)
    for x in inputs:
        if x.dtype not in DTYPES:
            raise FormatError(f"{what} got a tensor of {x.dtype}; expected float32, bfloat16 or float16")
        fits = x.dim() <= len(shape) and all(a in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False))
        if not fits:
            raise FormatError(f"{what} got a tensor of shape {tuple(x.shape)}; expected one that broadcasts to {shape}")
    if instruction_set() == "none":
        raise OptionError(f"{what} has code for AVX2 and above only; use torch.ops.tahf4.{what}")


def _encoded(program: str, default: str) -> Encoded:
    encoded = encode(program, default)
    if encoded is None:
        raise FormatError("the program has more than one reduction or more than 16 inputs; use the reference")
    return encoded


def _plain(values: Tensor | None) -> Tensor | None:
    if values is None or (values.dtype is torch.float32 and values.is_contiguous() and not values.is_neg()):
        return values
    return values.detach().to(torch.float32).resolve_neg().contiguous()


def _pointer(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def checksum(words: Tensor, factors: Tensor) -> int:
    """Return the sum, modulo 2**64, of 32-bit words times the factors of their lane and row, see ``packing.checksum``.

    Args:
        words: contiguous, on the CPU, a multiple of 4 bytes.
        factors: int64 ``[4096]`` of the lanes.

    Returns:
        As a signed 64-bit number.

    Raises:
        FormatError: another size or device.
    """
    _on_cpu("checksum", words, factors)
    size = words.numel() * words.element_size()
    if size % 4 or not words.is_contiguous() or factors.shape != (4096,) or factors.dtype != torch.int64:
        raise FormatError(f"checksum got {size} bytes; expected contiguous whole words, and 4096 factors in int64")
    found: int = _library().tahf4_checksum(words.data_ptr(), size // 4, factors.data_ptr(), torch.get_num_threads())
    return found - (found >> 63 << 64)


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
    if x.dtype not in DTYPES:
        raise FormatError(f"{what} got a tensor of {x.dtype}; expected float32, bfloat16 or float16")
    if x.dim() == 0:
        raise FormatError(f"{what} got a tensor without axes; expected at least one: channels lie along the last")
    _on_cpu(what, x)
    if x.dim() == 2 and x.is_contiguous() and x.numel() and not x.is_neg():
        return x, DTYPES[x.dtype]
    # A lazily conjugated or negated tensor would be read as it is stored.
    x = x.detach().resolve_neg()
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return (rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()), DTYPES[x.dtype]


def _on_cpu(what: str, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            raise FormatError(f"{what} got a tensor on {tensor.device}; expected one on the CPU")


@functools.cache
def slow_dtype(dtype: torch.dtype) -> bool:
    """Return whether this is an x86 processor that has no products of a 16-bit dtype: False where it is not known."""
    flags = set(build.processor().split())
    units = {torch.bfloat16: {"avx512_bf16", "amx_bf16"}, torch.float16: {"avx512_fp16", "amx_fp16"}}
    return "sse2" in flags and dtype in units and not units[dtype] & flags


def _library() -> ctypes.CDLL:
    library = build.library()
    if library is None:
        raise RuntimeError("there are no C++ kernels here (no compiler, or TAHF4_NO_CPP is set); ask available() first")
    return library


def register() -> None:
    """Register the kernels under the name "cpu" (:func:`tahf4_compiler.kernels.register_kernel`)."""
    from . import operators

    operators.register()
