"""The text of a product's kernel."""

from __future__ import annotations

import functools
import textwrap
from dataclasses import dataclass
from typing import Any

import torch

from ...format.hif4 import UNIT
from ...ops.program import Program
from . import source
from .expressions import TL_DTYPES, Leaf, emit, leaf_parameters
from .quantize import FORMATS

__all__ = ["LinearKernel"]


@dataclass(frozen=True)
class LinearKernel:
    """What the file of a product's kernels depends on.

    Attributes:
        path: one of :data:`PATHS`.
        outputs: how many; columns are split among them.
        bias: whether there is one.
        out_dtype: that the sum is rounded to.
        program: text, of what follows.
        leaves: how its inputs are read.
        result_dtype: of the outputs; None where the result is quantized.
        multiplier: whether the quantization has one.
        block: its Hadamard block.
        activation: bits of the activation: 4 for HiF4, or 8.
        bits: of the result, where that is quantized.
        rounding: of that, an index of ``FORM_ROUNDINGS``.
        span: units whose integers are added before they are scaled, 0 for a row. It is 1 but for the paths ``int8``
            and ``library``, and activations of 4 bits.
    """

    path: str
    outputs: int
    bias: bool
    out_dtype: torch.dtype
    program: str
    leaves: tuple[Leaf, ...]
    result_dtype: torch.dtype | None
    multiplier: bool = False
    block: int = 0
    activation: int = 4
    bits: int = 4
    rounding: int = 0
    span: int = 1

    def targets(self) -> list[str]:
        """Return the parameters of what is written."""
        return ["codes", "scales"] if self.result_dtype is None else [f"out{i}" for i in range(self.outputs)]

    def parameters(self, kernel: str) -> list[str]:
        """Return the parameters, but for the constants, of ``kernel``, ``partial`` or ``finish``."""
        sizes = ["rows", "U", *(f"N{i}" for i in range(self.outputs))]
        left = ["a", "a_scales"] if self.path != "bf16" or self.activation == 8 else ["a"]
        sides = [*left, "b", "b_scales"] if self.path != "bf16" else [*left, "b"]
        sides = ["dots", "a_scales", "b_scales"] if self.path == "library" else sides
        after = [*(["bias"] if self.bias else []), *(["multiplier"] if self.multiplier else [])]
        after += leaf_parameters(self.leaves)
        if kernel == "partial":
            return [*sides, "sums", *sizes]
        first = ["sums"] if kernel == "finish" else sides
        return [*first, *self.targets(), *sizes, *after]

    @functools.cached_property
    def text(self) -> str:
        """Return the file: ``kernel``, and ``partial`` with ``finish`` for a split along K."""
        return _text(self)


_WHERE = """
    tiles_m = tl.cdiv(rows, BM)
    tiles_n = {tiles}
    tile = tl.program_id(0)
    group = tile // (GROUP * tiles_n) * GROUP
    group_rows = tl.minimum(tiles_m - group, GROUP)
    tile_m = group + tile % (GROUP * tiles_n) % group_rows
    tile_n = tile % (GROUP * tiles_n) // group_rows
{output}
    row = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    column = tile_n * BN + tl.arange(0, BN)
    a_row = tl.minimum(row, rows - 1)
    b_row = (start + tl.minimum(column, width - 1)).to(tl.int64)
"""

_LOOPS = {
    ("packed", 4): """
    byte = tl.arange(0, 32)
    a_at = a + a_row[:, None] * (U * 32) + byte[None, :] + {first} * 32
    b_at = b + b_row[:, None] * (U * 32) + byte[None, :] + {first} * 32
    a_scale_at = a_scales + a_row * U + {first}
    b_scale_at = b_scales + b_row * U + {first}
    total = tl.zeros((BM, BN), tl.float32)
    for u in range({first}, {last}):
        a_meta = tl.load(a_scale_at)
        b_meta = tl.load(b_scale_at)
        a_even, a_odd = unpacked(tl.load(a_at), a_meta, BM)
        b_even, b_odd = unpacked(tl.load(b_at), b_meta, BN)
        total = tl.dot(a_even, tl.trans(b_even), total)
        total = tl.dot(a_odd, tl.trans(b_odd), total)
        a_at += 32
        b_at += 32
        a_scale_at += 1
        b_scale_at += 1
""",
    ("packed", 8): """
    byte = tl.arange(0, 32)
    k = tl.arange(0, 64)
    a_at = a + a_row[:, None] * (U * 64) + k[None, :] + {first} * 64
    b_at = b + b_row[:, None] * (U * 32) + byte[None, :] + {first} * 32
    a_scale_at = a_scales + a_row * U + {first}
    b_scale_at = b_scales + b_row * U + {first}
    total = tl.zeros((BM, BN), tl.float32)
    for u in range({first}, {last}):
        a_even, a_odd = tl.split(tl.reshape(tl.load(a_at).to(tl.float32).to(tl.bfloat16), (BM, 32, 2)))
        b_even, b_odd = unpacked(tl.load(b_at), tl.load(b_scale_at), BN)
        dot = tl.dot(a_even, tl.trans(b_even))
        dot = tl.dot(a_odd, tl.trans(b_odd), dot)
        total += dot * tl.load(a_scale_at)[:, None]
        a_at += 64
        b_at += 32
        a_scale_at += 1
        b_scale_at += 1
""",
    ("int8", 4): """
    k = tl.arange(0, 64)
    a_at = a + a_row[:, None] * (U * 64) + k[None, :] + {first} * 64
    b_at = b + b_row[None, :] * (U * 64) + k[:, None] + {first} * 64
    a_scale_at = a_scales + row + {first} * rows
    b_scale_at = b_scales + start + column + {first} * ({all})
    total = tl.zeros((BM, BN), tl.float32)
    for u in range({first}, {last}):
        # Sums stay below 2**22: added to the bits of 1.5 * 2**23 they are the mantissa of a float, and one fused
        # multiply-add takes 1.5 * 2**23 off again while it scales, exactly.
        magic = tl.full((BM, BN), 0x4B400000, tl.int32)
        dot = tl.dot(tl.load(a_at), tl.load(b_at), magic, out_dtype=tl.int32)
        a_scale = tl.load(a_scale_at, mask=row < rows, other=0.0)[:, None]
        b_scale = tl.load(b_scale_at, mask=column < width, other=0.0)[None, :]
        scaled = tl.fma(dot.to(tl.float32, bitcast=True), a_scale, a_scale * -12582912.0)
        total = tl.fma(scaled, b_scale, total)
        a_at += 64
        b_at += 64
        a_scale_at += rows
        b_scale_at += {all}
""",
    # The scales of the activation lie in rows and have 24 bits: a product of them with 1.5 * 2**23 would be rounded.
    ("int8", 8): """
    k = tl.arange(0, 64)
    a_at = a + a_row[:, None] * (U * 64) + k[None, :] + {first} * 64
    b_at = b + b_row[None, :] * (U * 64) + k[:, None] + {first} * 64
    a_scale_at = a_scales + a_row * U + {first}
    b_scale_at = b_scales + start + column + {first} * ({all})
    total = tl.zeros((BM, BN), tl.float32)
    for u in range({first}, {last}):
        # Sums stay below 2**22: added to the bits of 1.5 * 2**23 they are the mantissa of a float.
        magic = tl.full((BM, BN), 0x4B400000, tl.int32)
        dot = tl.dot(tl.load(a_at), tl.load(b_at), magic, out_dtype=tl.int32)
        b_scale = tl.load(b_scale_at, mask=column < width, other=0.0)[None, :]
        scaled = (dot.to(tl.float32, bitcast=True) - 12582912.0) * tl.load(a_scale_at)[:, None]
        total = tl.fma(scaled, b_scale, total)
        a_at += 64
        b_at += 64
        a_scale_at += 1
        b_scale_at += {all}
""",
    ("bf16", 4): """
    k = tl.arange(0, 64)
    a_at = a + a_row[:, None] * (U * 64) + k[None, :] + {first} * 64
    b_at = b + b_row[None, :] * (U * 64) + k[:, None] + {first} * 64
    total = tl.zeros((BM, BN), tl.float32)
    for u in range({first}, {last}):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total)
        a_at += 64
        b_at += 64
""",
    ("bf16", 8): """
    k = tl.arange(0, 64)
    a_at = a + a_row[:, None] * (U * 64) + k[None, :] + {first} * 64
    b_at = b + b_row[None, :] * (U * 64) + k[:, None] + {first} * 64
    a_scale_at = a_scales + a_row * U + {first}
    total = tl.zeros((BM, BN), tl.float32)
    for u in range({first}, {last}):
        dot = tl.dot(tl.load(a_at).to(tl.float32).to(tl.bfloat16), tl.load(b_at))
        total += dot * tl.load(a_scale_at)[:, None]
        a_at += 64
        b_at += 64
        a_scale_at += 1
""",
}

_OVER_SPANS = """
    k = tl.arange(0, 64)
    a_at = a + a_row[:, None] * (U * 64) + k[None, :]
    b_at = b + b_row[None, :] * (U * 64) + k[:, None]
    a_scale_at = a_scales + row
    b_scale_at = b_scales + start + column
    total = tl.zeros((BM, BN), tl.float32)
    dot = tl.full((BM, BN), {zero}, tl.int32)
    for u in range(U):
        dot = tl.dot(tl.load(a_at), tl.load(b_at), dot, out_dtype=tl.int32)
        a_at += 64
        b_at += 64
{scaled}
"""

# Sums of four units stay below 2**22, as those of one. The weight's scale comes first, as in the reference: what it
# gives is rounded.
_SPAN = """
        if (u % {span} == {span} - 1) | (u == U - 1):
            a_scale = tl.load(a_scale_at, mask=row < rows, other=0.0)[:, None]
            b_scale = tl.load(b_scale_at, mask=column < width, other=0.0)[None, :]
            scaled = tl.fma(dot.to(tl.float32, bitcast=True), b_scale, b_scale * -12582912.0)
            total = tl.fma(scaled, a_scale, total)
            dot = tl.full((BM, BN), 0x4B400000, tl.int32)
            a_scale_at += {span} * rows
            b_scale_at += {span} * ({all})
"""

# An addition of 0, because a product alone would be rounded together with the bias.
_ROW = """
    a_scale = tl.load(a_scale_at, mask=row < rows, other=0.0)[:, None]
    b_scale = tl.load(b_scale_at, mask=column < width, other=0.0)[None, :]
    total = tl.fma(dot.to(tl.float32) * b_scale, a_scale, total)
"""

_DOTS = """
    a_scale_at = a_scales + row
    b_scale_at = b_scales + start + column
    total = tl.zeros((BM, BN), tl.float32)
    at = dots + a_row[:, None] * ({all}) + start + column[None, :]
    dot = tl.load(at, mask=(row < rows)[:, None] & (column < width)[None, :], other=0)
"""


def _text(kernel: LinearKernel) -> str:
    left = "a matrix in HiF4" if kernel.activation == 4 else "an int8 matrix with a scale a unit"
    what = f"Product of {left} and another in HiF4 ({kernel.path}).\n\n"
    what += "The library has computed the dots.\n\n" if kernel.path == "library" else ""
    what += "What follows the product y::\n\n"
    what += textwrap.indent(kernel.program or "y as it is", "    ")
    if kernel.result_dtype is None:
        what += "\n\nThe result is quantized and only its codes are written."
    needed = ["unpacked"] if kernel.path == "packed" else []
    if kernel.result_dtype is None:
        needed += [f"to_{FORMATS[kernel.bits]}_tile", *(["hadamard_tile"] if kernel.block else [])]
    every = " + ".join(f"N{i}" for i in range(kernel.outputs))

    def where() -> str:
        tiles = " + ".join(f"tl.cdiv(N{i}, BN)" for i in range(kernel.outputs))
        return _WHERE.format(tiles=tiles, output=_output(kernel)).strip("\n")

    def loop(first: str, last: str) -> str:
        if kernel.path == "library":
            return (_DOTS.format(all=every) + _ROW.strip("\n")).strip("\n")
        if kernel.span == 0:
            return _OVER_SPANS.format(zero="0", scaled=_ROW.strip("\n")).strip("\n")
        if kernel.span > 1:
            scaled = _SPAN.format(span=kernel.span, all=every)
            return _OVER_SPANS.format(zero="0x4B400000", scaled=scaled.strip("\n")).strip("\n")
        return _LOOPS[kernel.path, kernel.activation].format(first=first, last=last, all=every).strip("\n")

    constants = ", BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr"
    epilogue = textwrap.indent("\n".join(_epilogue(kernel)), "    ")
    one = f"@triton.jit\ndef kernel({', '.join(kernel.parameters('kernel'))}{constants}):\n"
    one += f"{where()}\n{loop('0', 'U')}\n{epilogue}"
    if kernel.span != 1:  # not split along K
        return source.module_text(what, needed, one)
    partial = f"@triton.jit\ndef partial({', '.join(kernel.parameters('partial'))}{constants}, SPLIT: tl.constexpr):\n"
    partial += f"{where()}\n    part = tl.program_id(1)\n    share = tl.cdiv(U, SPLIT)\n    from_unit = part * share\n"
    partial += f"    to_unit = tl.minimum(from_unit + share, U)\n{loop('from_unit', 'to_unit')}\n"
    partial += (
        f"    all = {every}\n"
        "    at = sums + (part.to(tl.int64) * rows + row[:, None]) * all + start + column[None, :]\n"
        "    tl.store(at, total, mask=(row < rows)[:, None] & (column < width)[None, :])"
    )
    finish = f"@triton.jit\ndef finish({', '.join(kernel.parameters('finish'))}{constants}, SPLIT: tl.constexpr):\n"
    finish += f"{where()}\n    all = {every}\n    total = tl.zeros((BM, BN), tl.float32)\n"
    finish += (
        "    inside = (row < rows)[:, None] & (column < width)[None, :]\n"
        "    for part in range(SPLIT):\n"
        "        at = sums + (part * rows + row[:, None]) * all + start + column[None, :]\n"
        "        total += tl.load(at, mask=inside, other=0.0)\n"
        f"{epilogue}"
    )
    return source.module_text(what, needed, "\n\n\n".join([one, partial, finish]))


def _output(kernel: LinearKernel) -> str:
    lines = ["start = 0", "width = N0"]
    for i in range(1, kernel.outputs):
        before = f"other{i - 1} & " if i > 1 else ""
        lines += [
            f"other{i} = {before}(tile_n >= tl.cdiv(width, BN))",
            f"tile_n = tl.where(other{i}, tile_n - tl.cdiv(width, BN), tile_n)",
            f"start = tl.where(other{i}, start + width, start)",
            f"width = tl.where(other{i}, N{i}, width)",
        ]
    return textwrap.indent("\n".join(lines), "    ")


def _epilogue(kernel: LinearKernel) -> list[str]:
    lines = ["row = row[:, None]", "row_mask = row < rows"]
    if kernel.bias:
        lines.append("bias_at = bias + start + column")
        lines.append("total = total + tl.load(bias_at, mask=column < width, other=0.0).to(tl.float32)[None, :]")
    lines += ["column = column[None, :]", "column_mask = row_mask & (column < width)", "y = total"]
    if kernel.out_dtype != torch.float32:
        lines[-1] += f".to({TL_DTYPES[kernel.out_dtype]}).to(tl.float32)"
    lines += emit(Program.parse(kernel.program), kernel.leaves) if kernel.program else ["result = y"]
    if kernel.result_dtype is not None:
        stored = f"result.to({TL_DTYPES[kernel.result_dtype]})"
        if kernel.outputs == 1:
            return [*lines, f"tl.store(out0 + row * width + column, {stored}, mask=column_mask)"]
        for i in range(kernel.outputs):
            mine = f"not other{i + 1}" if i == 0 else f"other{i}"
            if 0 < i < kernel.outputs - 1:
                mine += f" and not other{i + 1}"
            lines += [f"if {mine}:", f"    tl.store(out{i} + row * width + column, {stored}, mask=column_mask)"]
        return lines
    if kernel.multiplier:
        lines.append("result = result * tl.load(multiplier + column, mask=column < width, other=0.0)")
    lines.append("result = tl.where(column_mask, result, 0.0)")
    if kernel.block:
        levels = kernel.block.bit_length() - 1
        lines.append(f"result = hadamard_tile(result, BM, BN, {levels}, {kernel.block**-0.5!r})")
    words = UNIT * kernel.bits // 32  # of a unit
    rounding = f", {kernel.rounding}" if kernel.bits == 4 else ""
    return [
        *lines,
        f"words, metadata = to_{FORMATS[kernel.bits]}_tile(result, BM, BN{rounding})",
        "in_row = tl.cdiv(width, 64)",
        "unit = tile_n * (BN // 64) + tl.arange(0, BN // 64)[None, :]",
        "tl.store(scales + row * in_row + unit, metadata, mask=row_mask & (unit < in_row))",
        f"word = tile_n * (BN // 64 * {words}) + tl.arange(0, BN // 64 * {words})[None, :]",
        f"tl.store(codes + row * (in_row * {words}) + word, words, mask=row_mask & (word < in_row * {words}))",
    ]


@functools.lru_cache(maxsize=4096)
def kernel_for(*key: Any) -> LinearKernel:
    """Return the kernel of a key; its text is made once."""
    return LinearKernel(*key)
