"""From codes and scales to floating point, or to int8 with one scale a unit."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...format.hif4 import UNIT
from ...ops.program import DTYPES
from . import source
from .call import Call

__all__ = ["dequantize", "expand", "text"]

ROWS, UNITS = 8, 8

_KERNEL = """@triton.jit
def kernel(codes, scales, out, {more}rows, K, U, ROWS: tl.constexpr, UNITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    mask = (row < rows)[:, None] & (unit < U)[None, :]
    metadata = tl.load(scales + row[:, None] * U + unit[None, :], mask=mask, other=0)
    byte = tl.program_id(1) * UNITS * 32 + tl.arange(0, UNITS * 32)
    byte_mask = (row < rows)[:, None] & (byte < U * 32)[None, :]
    packed = tl.load(codes + row[:, None] * (U * 32) + byte[None, :], mask=byte_mask, other=0)
    even, odd = even_and_odd(packed, metadata, ROWS, UNITS)
{values}
    column = tl.program_id(1) * UNITS * 64 + tl.arange(0, UNITS * 64)
    inside = (row < rows)[:, None] & (column < K)[None, :]
    values = tl.reshape(tl.join(even, odd), (ROWS, UNITS * 64))
    tl.store(out + row[:, None] * K + column[None, :], values, mask=inside)"""

_INT8 = """    tl.store(out_scales + unit[None, :] * rows + row[:, None], level1(metadata), mask=mask)
    even = even.to(tl.int8)
    odd = odd.to(tl.int8)"""

_FLOAT = """    factor = level1(metadata)[:, :, None]
    even = (even.to(tl.float32) * factor).to({dtype})
    odd = (odd.to(tl.float32) * factor).to({dtype})"""


@functools.cache
def text(dtype: torch.dtype) -> str:
    """Return the file of the kernel that writes int8 and scales, or values of a floating-point type."""
    if dtype == torch.int8:
        kernel = _KERNEL.format(more="out_scales, ", values=_INT8)
        what = "From HiF4 to int8 [rows, K] and a float32 scale for each unit [K / 64, rows]."
    else:
        name = {value: key for key, value in DTYPES.items()}[dtype]
        kernel = _KERNEL.format(more="", values=_FLOAT.format(dtype=f"tl.{name}"))
        what = f"From HiF4 to {name}."
    return source.module_text(what, ["level1", "even_and_odd"], kernel)


def _call(codes: Tensor, scales: Tensor, outputs: list[Tensor], k: int) -> Call:
    rows, count = scales.shape
    names = ["codes", "scales", "out", *(["out_scales"] if len(outputs) > 1 else []), "rows", "K", "U"]
    values = [codes.contiguous(), scales.contiguous(), *outputs, rows, k, count]
    arguments = dict(zip(names, values, strict=True))
    wide = UNITS if count > 1 else 1
    high = ROWS * UNITS // wide
    grid = (-(-rows // high), -(-count // wide))
    return Call(text(outputs[0].dtype), "kernel", grid, arguments, {"ROWS": high, "UNITS": wide})


def expand(codes: Tensor, scales: Tensor, path: str) -> tuple[tuple[Tensor, ...], Call]:
    """Expand a matrix for a product.

    Args:
        codes: uint8 ``[R, K / 2]``.
        scales: int32 ``[R, K / 64]``.
        path: ``"int8"``, ``"library"`` or ``"bf16"``.

    Returns:
        int8 ``[R, K]`` and float32 ``[K / 64, R]``, or bfloat16 ``[R, K]`` alone; and the launch that fills them.
    """
    rows, count = scales.shape
    dtype = torch.bfloat16 if path == "bf16" else torch.int8
    outputs = [torch.empty((rows, count * UNIT), dtype=dtype, device=codes.device)]
    if dtype == torch.int8:
        outputs.append(torch.empty((count, rows), dtype=torch.float32, device=codes.device))
    return tuple(outputs), _call(codes, scales, outputs, count * UNIT)


def dequantize(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, list[Call]]:
    """Return the result of ``tahf4::dequantize``, empty, and the launch that fills it."""
    lead = scales.shape[:-1]
    out = torch.empty((*lead, k), dtype=dtype, device=codes.device)
    rows = math.prod(lead)
    if rows == 0 or k == 0:
        return out, []
    return out, [_call(codes.reshape(rows, -1), scales.reshape(rows, -1), [out.view(rows, k)], k)]
