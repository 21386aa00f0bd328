"""The text of quantizing kernels: an optional program, an optional transform, codes and scales."""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...format.hif4 import UNIT
from ...ops.program import Program, Statement
from . import source
from .expressions import TL_DTYPES, Leaf, emit, leaf_parameters

__all__ = ["FORMATS", "THREADS", "QuantizeKernel", "branched_tile", "kernel_for"]

THREADS = 128
BRANCHED = 256
"""Threads of a block that computes branches as well."""
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
        ranks: of the branches whose first products it computes.
        factor: dtype of their factors; None without branches.
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
    ranks: tuple[int, ...] = ()
    factor: torch.dtype | None = None

    @property
    def format(self) -> str:
        """What its functions call what it writes."""
        return FORMATS[self.bits]

    def parameters(self) -> list[str]:
        """Return the kernel's parameters but for the constants."""
        results = ["maxima"] if self.maxima else ["codes", "scales", *(["maxima"] if self.span != 1 else [])]
        own = [*results, "rows", "K", "U", *(["multiplier"] if self.multiplier else [])]
        return [*own, *leaf_parameters(self.leaves), *_numbered("factor", self.ranks), *_numbered("out", self.ranks)]

    def constants(self, unit_count: int) -> dict[str, int]:
        """Return the constants of a launch.

        Args:
            unit_count: units in a row; together with the constants it decides how many rows a block takes.
        """
        if self.ranks:
            own_rows, own_units = branched_tile(self.ranks)
            constants = {"T": BRANCHED, "ROWS": own_rows, "UNITS": own_units}
            return constants | ({"COLUMNS": 8 * own_units} if Program.parse(self.program).reduction() else {})
        if Program.parse(self.program).reduction() is None:
            return {"T": THREADS}
        rows = THREADS // math.gcd(unit_count, THREADS)
        return {"T": THREADS, "ROWS": rows, "COLUMNS": max(8, 8 * THREADS // rows)}

    @functools.cached_property
    def text(self) -> str:
        """Return the file."""
        return _text(self)


def _text(kernel: QuantizeKernel) -> str:
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
    if kernel.ranks:
        pieces += [_branched_kernel(kernel, reduction, given), _finish(kernel)]
    else:
        pieces.append(_rows_kernel(kernel, reduction, given) if reduction is not None else _flat_kernel(kernel, given))
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


def _numbered(name: str, ranks: Sequence[int]) -> list[str]:
    """Return a name for each branch."""
    return [f"{name}{i}" for i in range(len(ranks))]


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


def _statistics(reduction: Statement, given: str) -> str:
    """Return the lines that find ``mean`` and ``spread`` of ROWS rows from ``start`` on, in one pass."""
    if reduction.function == "layer_norm":
        spread = f"spread = 1.0 / tl.sqrt(squares / K + {float(reduction.arguments[3])!r})"  # type: ignore[arg-type]
    elif reduction.function == "rms_norm":
        spread = f"spread = 1.0 / tl.sqrt(squares / K + mean * mean + {float(reduction.arguments[2])!r})"  # type: ignore[arg-type]
    else:
        spread = "spread = squares"
    return f"""    lane = tl.arange(0, COLUMNS)[None, :]
    row = (start + tl.arange(0, ROWS))[:, None]
    row_mask = row < rows
    means = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(K, COLUMNS)):
        column = step * COLUMNS + lane
        column_mask = row_mask & (column < K)
        x = tl.broadcast_to(reduced(row, row_mask, column, column_mask{given}), (ROWS, COLUMNS))
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
{_statistics(reduction, given)}
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


def _width(ranks: Sequence[int]) -> int:
    """Return the columns of a tile that holds the factors of all branches; matrix units multiply 16 at least."""
    return max(16, 1 << (sum(ranks) - 1).bit_length())


def branched_tile(ranks: Sequence[int]) -> tuple[int, int]:
    """Return the rows, and the units of each, that a block of threads computes at once with branches.

    With more rows the factors are read less often. Wide products of as many rows would leave no registers.
    """
    rows = 64 if _width(ranks) <= 128 else 32
    return rows, BRANCHED // rows


def _branched_kernel(kernel: QuantizeKernel, reduction: Statement | None, given: str) -> str:
    """Return a kernel that goes through ROWS rows, UNITS units at a time: it multiplies a tile, then quantizes it.

    The tile is read a second time, from cache: matrix units want a row across threads, and units want it in one. The
    columns of all factors are multiplied at once. Of SPLIT blocks of threads each has a part of the row, and writes a
    part of the products.
    """
    multiplier, dtype = ", multiplier" if kernel.multiplier else "", TL_DTYPES[kernel.factor]  # type: ignore[index]
    found = ("mean", "spread") if reduction else ()
    across, along = (", mean[:, None], spread[:, None]", ", unit_mean, unit_spread") if reduction else ("", "")
    branches = list(zip(range(len(kernel.ranks)), kernel.ranks, itertools.accumulate(kernel.ranks, initial=0)))
    width = _width(kernel.ranks)
    lines = [
        _signature(kernel, ["T", "ROWS", "UNITS", "SPLIT", *(["COLUMNS"] if reduction else [])]),
        "    start = tl.program_id(0).to(tl.int64) * ROWS",
        *([_statistics(reduction, given)] if reduction else []),
        "    row = (start + tl.arange(0, ROWS))[:, None]",
        "    local_row = tl.arange(0, T) // UNITS",
        *(f"    unit_{name} = tl.gather({name}, local_row, axis=0)[:, None]" for name in found),
        f"    rank = tl.arange(0, {width})[None, :]",
        f"    products = tl.zeros((ROWS, {width}), tl.float32)",
        "    part = tl.program_id(1)",
        "    share = tl.cdiv(tl.cdiv(U, UNITS), SPLIT)",
        "    for step in tl.range(part * share, tl.minimum((part + 1) * share, tl.cdiv(U, UNITS)), num_stages=1):",
        "        for first in tl.range(step * UNITS * 64, (step + 1) * UNITS * 64, 64, num_stages=1):",
        "            column = first + tl.arange(0, 64)",
        "            inside = (row < rows) & (column < K)[None, :]",
        f"            x = value(row, row < rows, column[None, :], inside{across}{given})",
        f"            x = tl.where(inside, x, 0.0).to({dtype})",
        f"            right_at = factor0 + column[:, None] * {kernel.ranks[0]} + rank",
    ]
    for i, own, before in branches[1:]:
        at = f"factor{i} + column[:, None] * {own} + (rank - {before})"
        lines.append(f"            right_at = tl.where(rank >= {before}, {at}, right_at)")
    lines += [
        f"            known = (column < K)[:, None] & (rank < {sum(kernel.ranks)})",
        "            right = tl.load(right_at, mask=known, other=0.0)",
        '            products = tl.dot(x, right, products, input_precision="ieee")',
        "        at = step * UNITS + tl.arange(0, T) % UNITS",
        "        unit_row = start + local_row",
        "        mask = (unit_row < rows) & (at < U)",
        f"        quantize_units({_results(kernel)}, unit_row * U + at, unit_row, at * 64, mask, K{multiplier}{along}"
        f"{given}, T)",
    ]
    for i, own, before in branches:
        lines += [
            f"    mine = (row < rows) & (rank >= {before}) & (rank < {before + own})",
            f"    out_at = out{i} + (part * rows + row) * {own} + (rank - {before})",
            f"    tl.store(out_at, products.to(out{i}.dtype.element_ty), mask=mine)",
        ]
    return "\n".join(lines)


def _finish(kernel: QuantizeKernel) -> str:
    """Return a kernel that adds the parts of each product."""
    given = [*_numbered("sums", kernel.ranks), *_numbered("out", kernel.ranks)]
    lines = [
        f"@triton.jit\ndef finish({', '.join(given)}, rows, T: tl.constexpr, SPLIT: tl.constexpr):",
        "    at = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)",
    ]
    for i, rank in enumerate(kernel.ranks):
        lines += [
            "    total = tl.zeros((T,), tl.float32)",
            "    for part in range(SPLIT):",
            f"        total += tl.load(sums{i} + part * rows * {rank} + at, mask=at < rows * {rank}, other=0.0)",
            f"    tl.store(out{i} + at, total.to(out{i}.dtype.element_ty), mask=at < rows * {rank})",
        ]
    return "\n".join(lines)


@functools.lru_cache(maxsize=4096)
def kernel_for(*key: Any) -> QuantizeKernel:
    """Return the kernel of a key; its text is made once."""
    return QuantizeKernel(*key)
