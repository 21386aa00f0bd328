"""The kernels called from Python, where no compiler makes what ``operators.cpp`` holds.

Each function takes what :mod:`.checks` let pass, and gives what the operator of its name gives, or ``NotImplemented``
where only the reference can. A call costs some tens of microseconds more than one of ``operators.cpp``, which does the
same and says why both are there.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...format import hif4
from ...format.spans import MOST_UNITS, alone, units_of, with_units
from . import build, checks
from .attention_calls import at as _at
from .attention_calls import attention, attention_lse, attention_of_codes
from .attention_calls import isa as _isa
from .build import instruction_set
from .programs import DTYPES, MOST_INPUTS, Encoded, encode

__all__ = [
    "attention",
    "attention_lse",
    "attention_of_codes",
    "fused_linear",
    "fused_quantize",
    "linear",
    "linear_quantize",
    "quantize",
]

_pointer, _int64, _int32, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
Packed = tuple[Tensor, Tensor]
_MOST_AXES = 16


class _Target(ctypes.Structure):
    """``struct Target`` of common.h."""

    _fields_ = [
        *(("multiplier", _pointer), ("block", _int64), ("norm", _float)),
        *(("codes", _pointer), ("scales", _pointer), ("bits", _int32), ("rounding", _int32), ("span", _int64)),
    ]


class _Input(ctypes.Structure):
    """``struct Input``."""

    _fields_ = [("data", _pointer), ("dtype", _int32), ("column_stride", _int32), ("strides", _pointer)]


class _Inputs(ctypes.Structure):
    """``struct Inputs``."""

    _fields_ = [("list", _pointer), ("sizes", _pointer), ("count", _int32), ("axes", _int32)]


class _Operands(ctypes.Structure):
    """``struct Operands``."""

    _fields_ = [
        *((name, _pointer) for name in ("codes", "scales", "weight_codes", "weight_scales", "bias")),
        *((name, _int64) for name in ("m", "n", "units")),
        *(("dtype", _int32), ("bits", _int32), ("span", _int64)),
    ]


class _Result(ctypes.Structure):
    """``struct Result``."""

    _fields_ = [("program", _pointer), ("inputs", _pointer), ("out", _pointer), ("dtype", _int32), ("target", _Target)]


class _Units:
    """Where a quantization goes."""

    def __init__(self, shape: Sequence[int], multiplier: Tensor | None, block: int, bits: int, span: int = 1) -> None:
        units = hif4.units(shape[-1])
        kinds = (torch.int8, torch.float32) if bits == 8 else (torch.uint8, torch.int32)
        size = hif4.UNIT if bits == 8 else hif4.UNIT // 2
        self.codes = torch.empty((*shape[:-1], units * size), dtype=kinds[0], device="cpu")
        self.scales = torch.empty((*shape[:-1], units), dtype=kinds[1], device="cpu")
        self._multiplier = _plain(multiplier)
        norm = 1 / math.sqrt(block) if block else 1.0
        where = _at(self._multiplier), block, norm, _at(self.codes), _at(self.scales)
        self.target = _Target(*where, bits, with_units(span, 0), _shared(units_of(span), units, bits))

    @property
    def packed(self) -> Packed:
        return self.codes, self.scales


class _Described:
    """Tensors that broadcast to a shape."""

    def __init__(self, given: Sequence[Tensor], shape: Sequence[int], factors: int = 0) -> None:
        axes = len(shape)
        held = [x.resolve_neg() for x in given]
        for i in (i for i in range(len(given)) if factors >> i & 1):
            held[i], held[i + 1] = held[i].to(torch.float32).contiguous(), held[i + 1].contiguous()
        self._held = [x if x.dim() == 0 or x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for x in held]
        self._sizes = (_int64 * max(1, axes - 1))(*(shape[:-1] or (1,)))
        self._strides, self._list = [], (_Input * max(1, len(given)))()
        for i, x in enumerate(self._held):
            steps = [0] * (axes - x.dim())
            steps += [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
            if (factors | factors << 1) >> i & 1:  # the rank
                steps = [0] * (axes - 1) + [x.shape[-1] if factors >> i & 1 else 0]
            self._strides.append((_int64 * max(1, axes - 1))(*(steps[:-1] or (0,))))
            self._list[i] = _Input(x.data_ptr(), DTYPES[x.dtype], steps[-1], ctypes.addressof(self._strides[-1]))
        self.struct = _Inputs(ctypes.addressof(self._list), ctypes.addressof(self._sizes), len(given), max(1, axes - 1))


def quantize(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> Packed:
    """See ``tahf4::quantize``."""
    if not _shared(units_of(span), hif4.units(x.shape[-1]), bits):
        return NotImplemented
    rows, dtype = checks.as_rows("quantize", x)
    units = _Units(x.shape, multiplier, hadamard_block, bits, span)
    if units.codes.numel():
        build.loaded().tahf4_quantize(
            *(rows.data_ptr(), dtype, len(rows), x.shape[-1], rows.stride(0)),
            *(ctypes.byref(units.target), _isa(), torch.get_num_threads()),
        )
    return units.packed


def fused_quantize(
    inputs: Sequence[Tensor],
    program: str,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> Packed:
    """See ``tahf4::fused_quantize``."""
    shape, encoded = checks.broadcast(inputs), encode(program, "x0")
    if encoded is None or not _fits(encoded, inputs, shape) or instruction_set() == "none":
        return NotImplemented
    if not _shared(units_of(span), hif4.units(shape[-1]), bits):
        return NotImplemented
    described, units = _Described(inputs, shape), _Units(shape, multiplier, hadamard_block, bits, span)
    if units.codes.numel():
        build.loaded().tahf4_fused_quantize(
            *(ctypes.byref(encoded.struct), ctypes.byref(described.struct), math.prod(shape[:-1]), shape[-1]),
            *(ctypes.byref(units.target), _isa(), torch.get_num_threads()),
        )
    return units.packed


def linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    span: int = 1,
) -> Tensor:
    """See ``tahf4::linear``."""
    if not scales.shape[-1] or instruction_set() == "none" or not _shared(span, scales.shape[-1]):
        return NotImplemented
    written = out_dtype if out_dtype in DTYPES else torch.float32
    out = torch.empty((*scales.shape[:-1], len(weight_codes)), dtype=written, device="cpu")
    product = (codes, scales, weight_codes, weight_scales, bias, span)
    _run(product, 0, len(weight_codes), torch.float32, None, _Described((), (1,)), out)  # rounded once
    return out.to(out_dtype)


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
) -> list[Tensor]:
    """See ``tahf4::fused_linear``."""
    shape, encoded = (*scales.shape[:-1], len(weight_codes)), _followed(program, inputs, scales, weight_codes, span)
    if encoded is None or out_dtype not in DTYPES or result_dtype not in DTYPES:
        return NotImplemented
    product, results, first = (codes, scales, weight_codes, weight_scales, bias, span), list[Tensor](), 0
    described, rounded = _Described(inputs, shape, encoded.factors), out_dtype if program else torch.float32
    for size in sizes:
        results.append(torch.empty((*shape[:-1], size), dtype=result_dtype, device="cpu"))
        _run(product, first, size, rounded, encoded if program else None, described, results[-1])
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
    bits: int = 4,
    span: int = 1,
) -> Packed:
    """See ``tahf4::linear_quantize``."""
    shape, own = (*scales.shape[:-1], len(weight_codes)), units_of(span)
    encoded = _followed(program, inputs, scales, weight_codes, own)
    if encoded is None or out_dtype not in DTYPES:
        return NotImplemented
    units = _Units(shape, multiplier, hadamard_block, bits, alone(span))
    product = (codes, scales, weight_codes, weight_scales, bias, own)
    described = _Described(inputs, shape, encoded.factors)
    _run(product, 0, shape[-1], out_dtype, encoded if program else None, described, units.target)
    return units.packed


def _run(
    product: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int],
    first: int,
    columns: int,
    rounded: torch.dtype,
    program: Encoded | None,
    described: _Described,
    to: Tensor | _Target,
) -> None:
    """Compute columns of a product into a tensor or into units."""
    codes, scales, weight_codes, weight_scales = (x.contiguous() for x in product[:4])
    bias, units = _plain(product[4]), scales.shape[-1]
    rows = scales.numel() // units if units else 0
    if not rows or not columns:
        return
    operands = _Operands(
        *(codes.data_ptr(), scales.data_ptr(), weight_codes[first:].data_ptr(), weight_scales[first:].data_ptr()),
        *(bias[first:].data_ptr() if bias is not None else None, rows, columns, units, DTYPES[rounded]),
        *((8, 1) if codes.dtype == torch.int8 else (4, _shared(product[5], units))),
    )
    into = (to.data_ptr(), DTYPES[to.dtype], _Target()) if isinstance(to, Tensor) else (None, 0, to)
    result = _Result(
        ctypes.addressof(program.struct) if program is not None else None,
        ctypes.addressof(described.struct),
        *into,
    )
    build.loaded().tahf4_linear(ctypes.byref(operands), ctypes.byref(result), _isa(), torch.get_num_threads())


def _followed(
    program: str, inputs: Sequence[Tensor], scales: Tensor, weight_codes: Tensor, span: int
) -> Encoded | None:
    """Return the program that follows a product, if the kernel runs it."""
    encoded = encode(program, "y")
    shape = (*scales.shape[:-1], len(weight_codes))
    runs = scales.shape[-1] and _shared(span, scales.shape[-1]) and instruction_set() != "none"
    return encoded if encoded is not None and runs and _fits(encoded, inputs, shape) else None


def _fits(encoded: Encoded, inputs: Sequence[Tensor], shape: Sequence[int]) -> bool:
    """Whether there are as many tensors as a program reads and no more axes than it knows, and its result is whole."""
    if not encoded.inputs <= len(inputs) <= MOST_INPUTS or len(shape) > _MOST_AXES:
        return False
    if encoded.used < 0:
        return True
    read = [x for i, x in enumerate(inputs) if encoded.used >> i & 1]
    return tuple(torch.broadcast_shapes(*(x.shape for x in read), (1,) * len(shape))) == tuple(shape)


def _shared(span: int, units: int, bits: int = 4) -> int:
    """Return how many of so many units of a row share a scale; 0 if the dot of so many does not fit into an int32."""
    if span == 0 and units > MOST_UNITS:
        return 0
    return 1 if bits != 4 else span or max(1, units)


def _plain(values: Tensor | None) -> Tensor | None:
    return values.resolve_neg().to(torch.float32).contiguous() if values is not None else None
