"""Quantizing kernels: an optional program, an optional transform, codes and scales.

A program without a reduction is computed by the threads that quantize. With one (a norm), each block of threads takes
whole rows: first one pass over them for mean and spread (Welford's, a lane at a time), then the same as without, from
cache. So the input comes from memory once.

Where units share their level-1 scales, which may lie in several blocks of threads, there are two kernels: one writes
the largest magnitude of each unit, and one reads those of a span and converts. Both compute the program and the
transform.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...format.hif4 import UNIT, units
from ...format.spans import ROUNDED, units_of
from ...ops.program import Program, Statement
from ...ops.reference import empty_units
from . import source
from .call import Call
from .expressions import Leaf, Operand, emit, leaf_parameters, operand

__all__ = ["QuantizeKernel", "call", "describe", "moments", "text_of"]

THREADS = 128
FORMATS = {4: "hif4", 8: "int8"}
"""Bits of an activation -> what functions of Triton call it."""


@dataclass(frozen=True)
class QuantizeKernel:
    """What a generated quantizing kernel depends on.

    Attributes:
        program: text, empty for none.
        leaves: how its inputs are read.
        whole: K is a multiple of 64.
        multiplier: whether there is one.
        block: Hadamard block, 0 for none.
        width: values that a thread reads at once, 4 or 8.
        bits: 4 for HiF4, or 8.
        span: units that share a level-1 scale; 0 for a row.
        rounding: an index of ``FORM_ROUNDINGS``.
        maxima: whether it only writes the largest magnitude (bits) of each unit, for the kernel that converts.
    """

    program: str
    leaves: tuple[Leaf, ...]
    whole: bool
    multiplier: bool
    block: int
    width: int
    bits: int = 4
    span: int = 1
    rounding: int = 0
    maxima: bool = False

    @property
    def format(self) -> str:
        """What its functions call what it writes."""
        return FORMATS[self.bits]

    def parameters(self) -> list[str]:
        """Return the kernel's parameters but for the constants."""
        results = ["maxima"] if self.maxima else ["codes", "scales", *(["maxima"] if self.span != 1 else [])]
        own = [*results, "rows", "K", "U", *(["multiplier"] if self.multiplier else [])]
        return [*own, *leaf_parameters(self.leaves)]

    def constants(self, unit_count: int) -> dict[str, int]:
        """Return the constants of a launch.

        Args:
            unit_count: units in a row; together with the constants it decides how many rows a block takes.
        """
        if Program.parse(self.program).reduction() is None:
            return {"T": THREADS}
        rows = THREADS // math.gcd(unit_count, THREADS)
        return {"T": THREADS, "ROWS": rows, "COLUMNS": max(8, 8 * THREADS // rows)}

    @functools.cached_property
    def text(self) -> str:
        """Return the file."""
        return text_of(self)


def text_of(kernel: QuantizeKernel, kernels: str = "") -> str:
    """Return a file with the functions of a kernel, and that kernel itself or others in its place."""
    program = Program.parse(kernel.program)
    reduction = program.reduction()
    leaves = list(kernel.leaves)
    names = leaf_parameters(leaves)
    given = "".join(f", {name}" for name in names)
    pieces = []
    if reduction is not None:
        pieces.append(
            _function("reduced", f"row, row_mask, column, column_mask{given}", emit(program, leaves, until=reduction))
        )
    statistics = ", mean, spread" if reduction is not None else ""
    pieces.append(_function("value", f"row, row_mask, column, column_mask{statistics}{given}", emit(program, leaves)))
    pieces.append(_units_function(kernel, given, statistics))
    own = _rows_kernel(kernel, reduction, given) if reduction is not None else _flat_kernel(kernel, given)
    pieces.append(kernels or own)
    shown = textwrap.indent(kernel.program or "x0 as it is", "    ")
    name = "HiF4" if kernel.bits == 4 else "int8"
    what = f"Quantize to {name}, a thread a unit.\n\nThe program before quantization::\n\n{shown}"
    needed = [f"to_{kernel.format}", f"store_{kernel.format}", "fours", *(["hadamard"] if kernel.block else [])]
    if kernel.maxima:
        what, needed[:2] = "The largest magnitude of each unit, as bits." + what.partition(".")[2], ["group_maxima"]
    elif kernel.span != 1:
        needed[:2] = ["to_hif4_shared", "span_maximum", "store_hif4"]
    return source.module_text(what, needed, "\n\n\n".join(pieces))


def _function(name: str, parameters: str, lines: Any) -> str:
    body = textwrap.indent("\n".join(lines), "    ")
    return f"@triton.jit\ndef {name}({parameters}):\n{body}\n    return result"


def _units_function(kernel: QuantizeKernel, given: str, statistics: str) -> str:
    multiplier = ", multiplier" if kernel.multiplier else ""
    lines = [
        "column_mask = " + ("mask[:, None]" if kernel.whole else "mask[:, None] & (column < K)"),
        f"x = value(row[:, None], mask[:, None], column, column_mask{statistics}{given})",
        f"x = tl.broadcast_to(x, (T, {kernel.width}))",
    ]
    if kernel.multiplier:
        lines.append("x = x * tl.load(multiplier + column, mask=column_mask, other=0.0)")
    if not kernel.whole:
        lines.append("x = tl.where(column_mask, x, 0.0)")
    body = textwrap.indent("\n".join(lines), " " * 8)
    transform = ""
    if kernel.block:
        levels = kernel.block.bit_length() - 1
        transform = f"    parts = hadamard(parts, T, {levels}, {kernel.block**-0.5!r})\n"
    rounding = f", {kernel.rounding}" if kernel.bits == 4 else ""
    converted = (
        f"    words, found = to_{kernel.format}(parts, T{rounding})\n"
        f"    store_{kernel.format}(codes, scales, unit, mask, words, found, T)"
    )
    if kernel.maxima:
        converted = "    groups, most = group_maxima(parts, T)\n    tl.store(maxima + unit, most, mask=mask)"
    elif kernel.span != 1:
        converted = (
            f"    most = span_maximum(maxima, unit, row, U, {kernel.span or 'U'}, mask, T)\n"
            f"    words, found = to_hif4_shared(parts, most, T{rounding})\n"
            "    store_hif4(codes, scales, unit, mask, words, found, T)"
        )
    results = _results(kernel)
    return (
        f"@triton.jit\ndef quantize_units({results}, unit, row, first, mask, K{multiplier}{statistics}{given}, "
        "T: tl.constexpr):\n"
        "    parts = ()\n"
        f"    for i in tl.static_range({UNIT // kernel.width}):\n"
        f"        column = first[:, None] + (i * {kernel.width} + tl.arange(0, {kernel.width}))[None, :]\n"
        f"{body}\n"
        f"        parts = parts + fours(x, T, {kernel.width})\n"
        f"{transform}"
        f"{converted}"
    )


def _results(kernel: QuantizeKernel) -> str:
    """Return the arguments for what a kernel writes, and reads of a span."""
    if kernel.maxima:
        return "maxima"
    return "codes, scales" + (", maxima, U" if kernel.span != 1 else "")


def _signature(kernel: QuantizeKernel, constants: Sequence[str]) -> str:
    parameters = [*kernel.parameters(), *(f"{name}: tl.constexpr" for name in constants)]
    return f"@triton.jit\ndef kernel({', '.join(parameters)}):"


def _flat_kernel(kernel: QuantizeKernel, given: str) -> str:
    multiplier = ", multiplier" if kernel.multiplier else ""
    return f"""{_signature(kernel, ["T"])}
    unit = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    row = unit // U
    mask = row < rows
    first = ((unit - row * U) * 64).to(tl.int32)
    quantize_units({_results(kernel)}, unit, row, first, mask, K{multiplier}{given}, T)"""


def moments(reduction: Statement, given: str, rows: str = "ROWS") -> str:
    """Return the lines that find ``mean`` and ``spread`` of some rows from ``start`` on, in one pass.

    Args:
        reduction: along these rows.
        given: the leaves' parameters, each after a comma.
        rows: the constant that says how many they are.
    """
    if reduction.function == "layer_norm":
        spread = f"spread = 1.0 / tl.sqrt(squares / K + {float(reduction.arguments[3])!r})"  # type: ignore[arg-type]
    elif reduction.function == "rms_norm":
        spread = f"spread = 1.0 / tl.sqrt(squares / K + mean * mean + {float(reduction.arguments[2])!r})"  # type: ignore[arg-type]
    else:
        spread = "spread = squares"
    return f"""    lane = tl.arange(0, COLUMNS)[None, :]
    row = (start + tl.arange(0, {rows}))[:, None]
    row_mask = row < rows
    means = tl.zeros(({rows}, COLUMNS), tl.float32)
    squares = tl.zeros(({rows}, COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(K, COLUMNS)):
        column = step * COLUMNS + lane
        column_mask = row_mask & (column < K)
        x = tl.broadcast_to(reduced(row, row_mask, column, column_mask{given}), ({rows}, COLUMNS))
        difference = x - means
        share = 1.0 / (step + 1)
        moved = means + difference * share
        squares = tl.where(column_mask, squares + difference * (x - moved), squares)
        means = tl.where(column_mask, moved, means)
    count = ((K - lane + COLUMNS - 1) // COLUMNS).to(tl.float32)
    mean = tl.sum(means * count, axis=1) / K
    squares = tl.sum(squares + count * (means - mean[:, None]) * (means - mean[:, None]), axis=1)
    {spread}"""


def _rows_kernel(kernel: QuantizeKernel, reduction: Statement, given: str) -> str:
    multiplier, results = ", multiplier" if kernel.multiplier else "", _results(kernel)
    return f"""{_signature(kernel, ["T", "ROWS", "COLUMNS"])}
    start = tl.program_id(0).to(tl.int64) * ROWS
{moments(reduction, given)}
    for tile in range(0, ROWS * U // T):
        local = tile * T + tl.arange(0, T)
        local_row = local // U
        unit = start * U + local
        first = (local - local_row * U) * 64
        unit_row = start + local_row
        mask = unit_row < rows
        unit_mean = tl.gather(mean, local_row, axis=0)[:, None]
        unit_spread = tl.gather(spread, local_row, axis=0)[:, None]
        quantize_units({results}, unit, unit_row, first, mask, K{multiplier}, unit_mean, unit_spread{given}, T)"""


@functools.lru_cache(maxsize=4096)
def kernel_for(
    program: str,
    leaves: tuple[Leaf, ...],
    whole: bool,
    multiplier: bool,
    block: int,
    width: int,
    bits: int = 4,
    span: int = 1,
    rounding: int = 0,
    maxima: bool = False,
) -> QuantizeKernel:
    """Return the kernel of a key; its text is made once."""
    return QuantizeKernel(program, leaves, whole, multiplier, block, width, bits, span, rounding, maxima)


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
) -> tuple[QuantizeKernel, list[Operand]]:
    """Return the kernel for some inputs, and how they are passed."""
    operands = [operand(f"x{i}", value, shape) for i, value in enumerate(inputs)]
    leaves = tuple(o.leaf for o in operands)
    # 16 bytes at once of the input that is read most; other widths follow it.
    full = [leaf for leaf in leaves if leaf.columns and leaf.levels]
    width = 4 if any(leaf.dtype == torch.float32 for leaf in full) else 8
    form = (multiplier is not None, block, width, bits, span, rounding, maxima)
    return kernel_for(program, leaves, shape[-1] % UNIT == 0, *form), operands


def call(
    inputs: Sequence[Tensor], program: str, multiplier: Tensor | None, block: int, bits: int = 4, span: int = 1
) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return the results of ``tahf4::fused_quantize``, empty, and the launches that fill them (none for no values)."""
    shape = torch.broadcast_shapes(*(value.shape for value in inputs))
    k, count = shape[-1], units(shape[-1])
    codes, scales = empty_units(inputs[0], shape, bits)
    rows = math.prod(shape[:-1])
    if rows == 0 or k == 0:
        return (codes, scales), []
    rounding = span // ROUNDED if bits == 4 else 0
    span = units_of(span) if bits == 4 and count > 1 else 1
    shared = [torch.empty_like(scales)] if span != 1 else []

    def launch(maxima: bool) -> Call:
        kernel, operands = describe(inputs, program, multiplier, block, shape, bits, span, rounding, maxima)
        constants = kernel.constants(count)
        per_block = constants.get("ROWS")
        blocks = -(-rows // per_block) if per_block else -(-rows * count // constants["T"])
        results = shared if maxima else [codes.view(torch.int32), scales, *shared]
        values = [*results, rows, k, count, *([multiplier] if multiplier is not None else [])]
        values += [value for o in operands for value in o.values]
        arguments = dict(zip(kernel.parameters(), values, strict=True))
        return Call(kernel.text, "kernel", (blocks,), arguments, constants, warps=THREADS // 32, exact=True)

    return (codes, scales), [launch(maxima) for maxima in ([True, False] if shared else [False])]
