"""Quantizing kernels: an optional program, an optional transform, codes and scales.

A program without a reduction is computed by the threads that quantize. With one (a norm), each block of threads takes
whole rows: first one pass over them for mean and spread (Welford's, a lane at a time), then the same as without, from
cache. So the input comes from memory once.

Where units share their level-1 scales, each block of threads takes whole rows at once, too: its threads exchange the
largest magnitudes of their units.
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
from ...format.spans import ROUNDED, check_units, units_of
from ...ops.program import Program, Statement
from ...ops.reference import empty_units
from . import source
from .call import Call
from .expressions import Leaf, Operand, emit, leaf_parameters, operand

__all__ = ["QuantizeKernel", "call", "describe", "moments", "text_of", "threads_of_rows"]

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
        head: channels of a head whose units are written together, for all tokens; 0 for rows as they are.
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
    head: int = 0

    @property
    def format(self) -> str:
        """What its functions call what it writes."""
        return FORMATS[self.bits]

    def parameters(self) -> list[str]:
        """Return the kernel's parameters but for the constants."""
        own = ["codes", "scales", "rows", "K", "U", *(["multiplier"] if self.multiplier else [])]
        own += ["tokens"] if self.head else []
        return [*own, *leaf_parameters(self.leaves)]

    def constants(self, unit_count: int) -> dict[str, int]:
        """Return the constants of a launch.

        Args:
            unit_count: units in a row; together with the constants it decides how many rows a block takes.
        """
        threads, reduces = THREADS, Program.parse(self.program).reduction() is not None
        found = {}
        if self.span != 1:
            threads = threads_of_rows(unit_count)
            rows, span = threads // unit_count, self.span or unit_count
            found = {"ROWS": rows, "SPANS": _power(rows * -(-unit_count // span)), "WIDTH": _power(span)}
        elif reduces:
            found = {"ROWS": THREADS // math.gcd(unit_count, THREADS)}
        if reduces:
            rows = _power(found["ROWS"])
            found |= {"ROWS_UP": rows, "COLUMNS": max(8, 8 * threads // rows)}
        return {"T": threads, **found}

    @functools.cached_property
    def text(self) -> str:
        """Return the file."""
        return text_of(self)


def _power(count: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def threads_of_rows(unit_count: int) -> int:
    """Return how many threads take whole rows at once, a unit each: the fewest of which four fifths have one."""
    few = (THREADS, 2 * THREADS, 4 * THREADS)
    busy = {t: t // unit_count * unit_count / t for t in few}
    if unit_count > few[-1]:
        return _power(unit_count)  # more than one unit a thread
    return next((t for t in few if busy[t] >= 0.8), max(few, key=busy.__getitem__))


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
    at = f"row, row_mask, column, column_mask{_pair(kernel)}"
    pieces.append(_function("value", f"{at}{statistics}{given}", emit(program, leaves)))
    pieces.append(_units_function(kernel, given, statistics))
    own = _flat_kernel(kernel, given) if reduction is None else _rows_kernel(kernel, reduction, given)
    pieces.append(kernels or own)
    shown = textwrap.indent(kernel.program or "x0 as it is", "    ")
    name = "HiF4" if kernel.bits == 4 else "int8"
    what = f"Quantize to {name}, a thread a unit.\n\nThe program before quantization::\n\n{shown}"
    needed = [f"to_{kernel.format}", f"store_{kernel.format}", "fours", *(["hadamard"] if kernel.block else [])]
    needed += ["turned"] if program.angles() else []
    if kernel.span != 1:
        of_format = ["group_maxima", "encoded"] if kernel.bits == 4 else ["int8_maximum", "encoded_int8"]
        needed[0:1] = ["span_maximum", *of_format]
    return source.module_text(what, needed, "\n\n\n".join(pieces))


def _function(name: str, parameters: str, lines: Any) -> str:
    body = textwrap.indent("\n".join(lines), "    ")
    return f"@triton.jit\ndef {name}({parameters}):\n{body}\n    return result"


def _pair(kernel: QuantizeKernel) -> str:
    """Return a parameter for the pairs of columns that angles of ``rotary`` are read at, if a program has some."""
    return ", pair" if any(leaf.head for leaf in kernel.leaves) else ""


def _units_function(kernel: QuantizeKernel, given: str, statistics: str) -> str:
    multiplier = ", multiplier" if kernel.multiplier else ""
    tokens = ", tokens" if kernel.head else ""
    lines = [
        "column_mask = " + ("mask[:, None]" if kernel.whole else "mask[:, None] & (column < K)"),
        f"x = value(row[:, None], mask[:, None], column, column_mask{_pair(kernel)}{statistics}{given})",
        f"x = tl.broadcast_to(x, (T, {kernel.width}))",
    ]
    if _pair(kernel):
        half = kernel.width // 2
        lines.insert(0, f"pair = (first // 2)[:, None] + (i * {half} + tl.arange(0, {half}))[None, :]")
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
    place = ""
    if kernel.head:
        each = kernel.head // UNIT
        place = (
            "    token = row.to(tl.int32)\n"  # divisions of 64 bits take long
            f"    head = (token // tokens).to(tl.int64) * (K // {kernel.head}) + first // {kernel.head}\n"
            f"    unit = (head * tokens + token % tokens) * {each} + first // 64 % {each}\n"
        )
    constants = "T: tl.constexpr"
    if kernel.span != 1:
        maxima = "maxima, most = group_maxima(parts, T)" if kernel.bits == 4 else "most = int8_maximum(parts, T)"
        encoded = f"encoded(parts, maxima, most, T{rounding})" if kernel.bits == 4 else "encoded_int8(parts, most)"
        converted = (
            f"    {maxima}\n"
            f"    most = span_maximum(most, U, {kernel.span or 'U'}, T, SPANS, WIDTH)\n"
            f"    words, found = {encoded}\n"
            f"    store_{kernel.format}(codes, scales, unit, mask, words, found, T)"
        )
        constants = "U, T: tl.constexpr, SPANS: tl.constexpr, WIDTH: tl.constexpr"
    return (
        f"@triton.jit\ndef quantize_units(codes, scales, unit, row, first, mask, K{multiplier}{tokens}{statistics}"
        f"{given}, {constants}):\n"
        "    parts = ()\n"
        f"    for i in tl.static_range({UNIT // kernel.width}):\n"
        f"        column = first[:, None] + (i * {kernel.width} + tl.arange(0, {kernel.width}))[None, :]\n"
        f"{body}\n"
        f"        parts = parts + fours(x, T, {kernel.width})\n"
        f"{transform}"
        f"{place}"
        f"{converted}"
    )


def _signature(kernel: QuantizeKernel, constants: Sequence[str]) -> str:
    spans = ["SPANS", "WIDTH"] if kernel.span != 1 else []
    parameters = [*kernel.parameters(), *(f"{name}: tl.constexpr" for name in (*constants, *spans))]
    return f"@triton.jit\ndef kernel({', '.join(parameters)}):"


def _converted(kernel: QuantizeKernel, rest: str) -> str:
    """Return the call that quantizes a unit for each thread."""
    multiplier = ", multiplier" if kernel.multiplier else ""
    tokens = ", tokens" if kernel.head else ""
    spans = ", T" if kernel.span == 1 else ", U, T, SPANS, WIDTH"
    return f"quantize_units(codes, scales, unit, unit_row, first, mask, K{multiplier}{tokens}{rest}{spans})"


_LOCAL = """local_row = local // U
{0}first = (local - local_row * U) * 64
{0}unit = start * U + local
{0}unit_row = start + local_row
{0}mask = (unit_row < rows)"""
"""Whole rows: where each thread stands."""


def _flat_kernel(kernel: QuantizeKernel, given: str) -> str:
    if kernel.span != 1:
        return f"""{_signature(kernel, ["T", "ROWS"])}
    start = tl.program_id(0).to(tl.int64) * ROWS
    local = tl.arange(0, T)
    {_LOCAL.format("    ")} & (local_row < ROWS)
    {_converted(kernel, given)}"""
    return f"""{_signature(kernel, ["T"])}
    unit = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    unit_row = unit // U
    mask = unit_row < rows
    first = ((unit - unit_row * U) * 64).to(tl.int32)
    {_converted(kernel, given)}"""


def moments(reduction: Statement, given: str, rows: str = "ROWS") -> str:
    """Return the lines that find ``mean`` and ``spread`` of some rows from ``start`` on, in one pass.

    Args:
        reduction: along these rows.
        given: the leaves' parameters, each after a comma.
        rows: the constant that says how many they are, a power of two.
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
    # With spans ROWS is no power of two: the last rows of a block of threads are those of the next one.
    inside = "" if kernel.span == 1 else " & (local_row < ROWS)"
    statistics = "local_row" if kernel.span == 1 else "tl.minimum(local_row, ROWS - 1)"
    return f"""{_signature(kernel, ["T", "ROWS", "ROWS_UP", "COLUMNS"])}
    start = tl.program_id(0).to(tl.int64) * ROWS
{moments(reduction, given, "ROWS_UP")}
    for tile in range(0, tl.cdiv(ROWS * U, T)):
        local = tile * T + tl.arange(0, T)
        {_LOCAL.format("        ")}{inside}
        unit_mean = tl.gather(mean, {statistics}, axis=0)[:, None]
        unit_spread = tl.gather(spread, {statistics}, axis=0)[:, None]
        {_converted(kernel, f", unit_mean, unit_spread{given}")}"""


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
    head: int = 0,
) -> QuantizeKernel:
    """Return the kernel of a key; its text is made once."""
    return QuantizeKernel(program, leaves, whole, multiplier, block, width, bits, span, rounding, head)


def describe(
    inputs: Sequence[Tensor],
    program: str,
    multiplier: Tensor | None,
    block: int,
    shape: Sequence[int],
    bits: int = 4,
    span: int = 1,
    rounding: int = 0,
    head: int = 0,
) -> tuple[QuantizeKernel, list[Operand]]:
    """Return the kernel for some inputs, and how they are passed."""
    angles = Program.parse(program).angles()
    operands = [operand(f"x{i}", value, shape, i in angles) for i, value in enumerate(inputs)]
    leaves = tuple(o.leaf for o in operands)
    # 16 bytes at once of the input that is read most; other widths follow it.
    full = [leaf for leaf in leaves if leaf.columns and leaf.levels and not leaf.head]
    width = 4 if any(leaf.dtype == torch.float32 for leaf in full) else 8
    form = (multiplier is not None, block, width, bits, span, rounding, head)
    return kernel_for(program, leaves, shape[-1] % UNIT == 0, *form), operands


def call(
    inputs: Sequence[Tensor],
    program: str,
    multiplier: Tensor | None,
    block: int,
    bits: int = 4,
    span: int = 1,
    head: int = 0,
) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return the results of ``tahf4::fused_quantize``, empty, and the launches that fill them (none for no values).

    The span counts with 8 bits as well, as for :func:`tahf4_compiler.format.int8.quantize`. With heads of ``head``
    channels, whole units, what belongs to ``[B, S, H * E]`` lies in memory as for ``[B, H, S, E]``.
    """
    shape = Program.parse(program).shape(inputs)
    k, count = shape[-1], units(shape[-1])
    codes, scales = empty_units(inputs[0], shape, bits)
    rows = math.prod(shape[:-1])
    if rows == 0 or k == 0:
        return (codes, scales), []
    rounding = span // ROUNDED if bits == 4 else 0
    span = units_of(span) if count > 1 else 1
    check_units(span, count)
    kernel, operands = describe(inputs, program, multiplier, block, shape, bits, span, rounding, head)
    constants = kernel.constants(count)
    per_block = constants.get("ROWS")
    blocks = -(-rows // per_block) if per_block else -(-rows * count // constants["T"])
    values = [codes.view(torch.int32), scales, rows, k, count, *([multiplier] if multiplier is not None else [])]
    values += [shape[-2]] if head else []
    values += [value for o in operands for value in o.values]
    arguments = dict(zip(kernel.parameters(), values, strict=True))
    # Wide rows have a few units a thread, since a block has at most 16 warps of them.
    warps = min(constants["T"] // 32, 16)
    return (codes, scales), [Call(kernel.text, "kernel", (blocks,), arguments, constants, warps=warps, exact=True)]
