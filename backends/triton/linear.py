"""W4A4 products, with what follows them: bias, a program, several outputs, or quantization.

Four ways to compute the same sums, all exact inside a unit (:data:`PATHS`):

``packed``
    Both sides are unpacked from 4 bits in the loop, scales and all, into bfloat16, which holds every HiF4 value.
    Weights come from memory at 4.5 bits: for few rows, where reading them is all the time. Split along K, so that all
    of the chip reads; the parts are added in a fixed order by a second kernel, which also has the epilogue.
``int8``
    Both sides are expanded beforehand to int8 and one float32 scale a unit; one int8 product of K = 64 a unit, exact
    in int32, times both scales. At least twice the rate of bfloat16, on GeForce cards four times. Where units share
    their scales over a span, its integers are added first: the reference's bits.
``bf16``
    Both sides are expanded beforehand to bfloat16. On compute capability 10 and 11, where Triton has no int8 product on
    the tensor memory.
``library``
    For one level-1 scale a row. Both sides are expanded to int8, ``torch._int_mm`` writes the dots of whole rows in
    int32, and one kernel reads them for what follows. Their bytes are more than the kernels of ``int8`` have, so only a
    measurement chooses this path.

An activation in 8 bits is int8 with a scale a unit already: it is read as it is, and its scales multiply each unit's
sum.

Unpacking costs about ten instructions a value, and a tile of the product is as often unpacked as there are tiles beside
it: for many rows that is slower than the product itself, so these are expanded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...format.spans import MOST_UNITS
from ...ops.reference import activation_bits, empty_units
from .call import Call
from .expand import expand
from .expressions import operands
from .linear_source import LinearKernel, kernel_for
from .tiling import Tile, choose_path, fits_library, is_tight, tiles

__all__ = ["MAX_BLOCK", "calls", "key_of", "usable_span"]

MAX_BLOCK = 128
"""The widest Hadamard block of a result that is quantized in the tile of its product."""


def key_of(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    sizes: Sequence[int],
    inputs: Sequence[Tensor],
    program: str,
    result_dtype: torch.dtype | None,
    multiplier: Tensor | None = None,
    block: int = 0,
    bits: int = 4,
    rounding: int = 0,
    *,
    span: int = 1,
) -> LinearKernel:
    """Return the kernel of a product as :func:`calls` would make it, but for the path."""
    shape = (*codes.shape[:-1], weight_codes.shape[0])
    leaves = tuple(o.leaf for o in operands(program, inputs, shape))
    after = (program, leaves, result_dtype, multiplier is not None, block, activation_bits(codes), bits, rounding, span)
    return kernel_for("", len(sizes), bias is not None, out_dtype, *after)


def usable_span(codes: Tensor, scales: Tensor, span: int) -> int:
    """Return how many units of a product a path may add as integers, 0 for a row, where its operands hold a span."""
    if activation_bits(codes) != 4:
        return 1
    # A row's dot may be too large for 32 bits, or none.
    return span if span != 0 or 0 < scales.shape[-1] <= MOST_UNITS else 1


def calls(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    sizes: Sequence[int],
    inputs: Sequence[Tensor],
    program: str,
    result_dtype: torch.dtype | None,
    multiplier: Tensor | None = None,
    block: int = 0,
    bits: int = 4,
    rounding: int = 0,
    *,
    span: int = 1,
    capability: tuple[int, int] | None,
    processors: int,
    tile: Tile | None = None,
    path: str | None = None,
) -> tuple[list[Tensor], list[Call]]:
    """Return the results of a product, empty, and the launches that fill them.

    Args:
        codes: and the following as for ``tahf4::fused_linear`` and ``tahf4::linear_quantize``.
        scales: of the activation.
        weight_codes: of the weight.
        weight_scales: of the weight.
        bias: or None.
        out_dtype: that the sum is rounded to.
        sizes: columns of each result.
        inputs: of the program.
        program: of what follows.
        result_dtype: None to quantize the result.
        multiplier: of that quantization.
        block: of that quantization.
        bits: of that quantization.
        rounding: of that, an index of ``FORM_ROUNDINGS``.
        span: of the operands, as for ``tahf4::linear``.
        capability: of the device, None for the interpreter.
        processors: of the device.
        tile: in place of the default.
        path: one of :data:`PATHS`, in place of the default.
    """
    lead, count = codes.shape[:-1], scales.shape[-1]
    rows, n, device = math.prod(lead), weight_codes.shape[0], codes.device
    if result_dtype is not None:
        results = [torch.empty((*lead, size), dtype=result_dtype, device=device) for size in sizes]
    else:
        results = list(empty_units(codes, (*lead, n), bits))
    if rows == 0 or n == 0:
        return results, []
    span = usable_span(codes, scales, span)
    path = path or choose_path(rows, capability, fits_library(rows, n, span))
    if path not in ("int8", "library"):  # others have no scales in their loop
        span = 1
    assert path != "library" or span == 0
    given = operands(program, inputs, (*lead, n))
    leaves = tuple(o.leaf for o in given)
    activation = activation_bits(codes)
    what = (program, leaves, result_dtype, multiplier is not None, block, activation, bits, rounding, span)
    kernel = kernel_for(path, len(sizes), bias is not None, out_dtype, *what)
    before: list[Call] = []
    sides: list[Tensor] = []
    for matrix in ((codes.reshape(rows, -1), scales.reshape(rows, -1)), (weight_codes, weight_scales)):
        if path == "packed" or matrix[0].dtype == torch.int8:
            sides += [part.contiguous() for part in matrix]
        else:
            expanded, launch = expand(*matrix, path)
            sides += expanded
            before.append(launch)
    product: tuple[Tensor, Tensor, Tensor] | None = None
    if path == "library":
        left, left_scales, right, right_scales = sides
        dots = torch.empty((rows, n), dtype=torch.int32, device=device)
        product, sides = (left, right, dots), [dots, left_scales, right_scales]
    targets = results if result_dtype is not None else [results[0].view(torch.int32), results[1]]
    after = [*([bias] if bias is not None else []), *([multiplier] if multiplier is not None else [])]
    after += [value for o in given for value in o.values]
    tile = tile or tiles(path, rows, n, count, processors, block, is_tight(capability, result_dtype is None))[0]
    shape = (rows, count, *sizes)
    return results, before + _launches(kernel, tile, sides, targets, shape, after, product)


def _launches(
    kernel: LinearKernel,
    tile: Tile,
    sides: Sequence[Tensor],
    targets: Sequence[Tensor],
    shape: Sequence[int],
    after: Sequence[Any],
    product: tuple[Tensor, Tensor, Tensor] | None,
) -> list[Call]:
    rows, _, *widths = shape
    blocks = -(-rows // tile.rows) * sum(-(-width // tile.columns) for width in widths)
    constants = {"BM": tile.rows, "BN": tile.columns, "GROUP": 8}

    def one(name: str, grid: tuple[int, ...], values: Sequence[Any], **more: int) -> Call:
        arguments = dict(zip(kernel.parameters(name), values, strict=True))
        exact = kernel.result_dtype is None and name != "partial"
        sizes = {**constants, **more}
        return Call(kernel.text, name, grid, arguments, sizes, tile.warps, tile.stages, exact, product)

    if tile.split == 1:
        return [one("kernel", (blocks,), [*sides, *targets, *shape, *after])]
    sums = torch.empty((tile.split, rows, sum(widths)), dtype=torch.float32, device=targets[0].device)
    return [
        one("partial", (blocks, tile.split), [*sides, sums, *shape], SPLIT=tile.split),
        one("finish", (blocks,), [sums, *targets, *shape, *after], SPLIT=tile.split),
    ]
