"""Quantizing kernels: an optional program, an optional transform, codes and scales.

A program without a reduction is computed by the threads that quantize. With one (a norm), each block of threads takes
whole rows: first one pass over them for mean and spread (Welford's, a lane at a time), then the same as without, from
cache. So the input comes from memory once.

Where units share their level-1 scales, which may lie in several blocks of threads, there are two kernels: one writes
the largest magnitude of each unit, and one reads those of a span and converts. Both compute the program and the
transform.

With branches of low rank, each block of threads takes whole rows as well, and multiplies each tile that it quantizes by
the rows of the factors that belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...format.hif4 import UNIT, units
from ...format.spans import ROUNDED, units_of
from ...ops.reference import empty_units
from .call import Call
from .expressions import Operand, operand
from .quantize_source import THREADS, QuantizeKernel, branched_tile, kernel_for

__all__ = ["call", "describe"]

BLOCKS = 128
"""Blocks of threads with branches: where rows give fewer of them, each has a part of its rows' columns."""


def describe(
    inputs: Sequence[Tensor],
    program: str,
    multiplier: Tensor | None,
    block: int,
    shape: Sequence[int],
    bits: int = 4,
    span: int = 1,
    rounding: int = 0,
    maxima: bool = False,
    factors: Sequence[Tensor] = (),
) -> tuple[QuantizeKernel, list[Operand]]:
    """Return the kernel for some inputs, and how they are passed."""
    operands = [operand(f"x{i}", value, shape) for i, value in enumerate(inputs)]
    leaves = tuple(o.leaf for o in operands)
    # 16 bytes at once of the input that is read most; other widths follow it.
    full = [leaf for leaf in leaves if leaf.columns and leaf.levels]
    width = 4 if any(leaf.dtype == torch.float32 for leaf in full) else 8
    form = (multiplier is not None, block, width, bits, span, rounding, maxima)
    branches = (tuple(factor.shape[1] for factor in factors), factors[0].dtype if factors else None)
    return kernel_for(program, leaves, shape[-1] % UNIT == 0, *form, *branches), operands


def call(
    inputs: Sequence[Tensor],
    program: str,
    multiplier: Tensor | None,
    block: int,
    bits: int = 4,
    span: int = 1,
    factors: Sequence[Tensor] = (),
) -> tuple[tuple[Tensor, ...], list[Call]]:
    """Return the results, empty, and the launches that fill them (none for no values).

    The results are those of ``tahf4::fused_quantize``; with factors, contiguous, those of ``tahf4::branched_quantize``.
    """
    shape = torch.broadcast_shapes(*(value.shape for value in inputs))
    k, count = shape[-1], units(shape[-1])
    codes, scales = empty_units(inputs[0], shape, bits)
    products = [factor.new_empty((*shape[:-1], factor.shape[1])) for factor in factors]
    rows = math.prod(shape[:-1])
    if rows == 0 or k == 0:
        return (codes, scales, *(product.zero_() for product in products)), []
    rounding = span // ROUNDED if bits == 4 else 0
    span = units_of(span) if bits == 4 and count > 1 else 1
    shared = [torch.empty_like(scales)] if span != 1 else []

    split, sums = 1, products
    if factors:
        own_rows, own_units = branched_tile([factor.shape[1] for factor in factors])
        split = max(1, min(BLOCKS // -(-rows // own_rows), -(-count // own_units)))
    if split > 1:
        sums = [product.new_empty((split, *product.shape), dtype=torch.float32) for product in products]

    def launch(maxima: bool) -> Call:
        # Magnitudes need no branches. Behind a norm they may differ by a rounding from the values that are converted.
        form = (bits, span, rounding, maxima, () if maxima else factors)
        kernel, operands = describe(inputs, program, multiplier, block, shape, *form)
        constants = kernel.constants(count) | ({"SPLIT": split} if kernel.ranks else {})
        per_block = constants.get("ROWS")
        blocks = -(-rows // per_block) if per_block else -(-rows * count // constants["T"])
        results = shared if maxima else [codes.view(torch.int32), scales, *shared]
        values = [*results, rows, k, count, *([multiplier] if multiplier is not None else [])]
        values += [value for o in operands for value in o.values]
        values += [*factors, *sums] if kernel.ranks else []
        arguments = dict(zip(kernel.parameters(), values, strict=True))
        grid = (blocks, split) if kernel.ranks else (blocks,)
        return Call(kernel.text, "kernel", grid, arguments, constants, warps=constants["T"] // 32, exact=True)

    calls = [launch(maxima) for maxima in ([True, False] if shared else [False])]
    if split > 1:
        arguments = {f"sums{i}": part for i, part in enumerate(sums)} | {f"out{i}": p for i, p in enumerate(products)}
        blocks = -(-max(product.numel() for product in products) // THREADS)
        constants = {"T": THREADS, "SPLIT": split}
        calls.append(Call(calls[-1].text, "finish", (blocks,), {**arguments, "rows": rows}, constants))
    return (codes, scales, *products), calls
