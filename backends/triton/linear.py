"""W4A4 products, with what follows them: bias, a program, several outputs, or quantization.

Three ways to compute the same sums, all exact inside a unit (:data:`PATHS`):

``packed``
    Both sides are unpacked from 4 bits in the loop, scales and all, into bfloat16, which holds every HiF4 value.
    Weights come from memory at 4.5 bits: for few rows, where reading them is all the time. Split along K, so that all
    of the chip reads; the parts are added in a fixed order by a second kernel, which also has the epilogue.
``int8``
    Both sides are expanded beforehand to int8 and one float32 scale a unit; one int8 product of K = 64 a unit, exact
    in int32, times both scales. Twice the rate of bfloat16 up to compute capability 9.
``bf16``
    Both sides are expanded beforehand to bfloat16. From compute capability 10 on, where Triton has no int8 product on
    the tensor memory.

Unpacking costs about ten instructions a value, and a tile of the product is as often unpacked as there are tiles beside
it: for many rows that is slower than the product itself, so these are expanded once.
"""

from __future__ import annotations

import functools
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError
from ...format.hif4 import UNIT, units
from ...ops.program import DTYPES, Program
from . import source
from .call import Call
from .expand import expand
from .expressions import Leaf, emit, leaf_parameters, operand

__all__ = ["MAX_BLOCK", "PATHS", "LinearKernel", "Tile", "calls", "candidates", "choose_path", "key_of", "tiles"]

PATHS = ("packed", "int8", "bf16")
MAX_BLOCK = 128
"""The widest Hadamard block of a result that is quantized in the tile of its product."""

FEW_ROWS = 192
"""Rows below which the weights' bytes are the time."""

_TL = {dtype: f"tl.{name}" for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tile:
    """Sizes of a launch.

    Attributes:
        rows: of the product that a block of threads computes.
        columns: of it.
        warps: of a block.
        stages: of loads ahead.
        split: parts of K.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    split: int = 1


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

    def targets(self) -> list[str]:
        """Return the parameters of what is written."""
        return ["codes", "scales"] if self.result_dtype is None else [f"out{i}" for i in range(self.outputs)]

    def parameters(self, kernel: str) -> list[str]:
        """Return the parameters, but for the constants, of ``kernel``, ``partial`` or ``finish``."""
        sizes = ["rows", "U", *(f"N{i}" for i in range(self.outputs))]
        sides = ["a", "a_scales", "b", "b_scales"] if self.path != "bf16" else ["a", "b"]
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
    "packed": """
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
    "int8": """
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
    "bf16": """
    k = tl.arange(0, 64)
    a_at = a + a_row[:, None] * (U * 64) + k[None, :] + {first} * 64
    b_at = b + b_row[None, :] * (U * 64) + k[:, None] + {first} * 64
    total = tl.zeros((BM, BN), tl.float32)
    for u in range({first}, {last}):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total)
        a_at += 64
        b_at += 64
""",
}


def _text(kernel: LinearKernel) -> str:
    what = f"Product of two HiF4 matrices ({kernel.path}).\n\nWhat follows the product y::\n\n"
    what += textwrap.indent(kernel.program or "y as it is", "    ")
    if kernel.result_dtype is None:
        what += "\n\nThe result is quantized to HiF4 and only its codes are written."
    needed = ["unpacked"] if kernel.path == "packed" else []
    if kernel.result_dtype is None:
        needed += ["to_hif4_tile", *(["hadamard_tile"] if kernel.block else [])]
    every = " + ".join(f"N{i}" for i in range(kernel.outputs))

    def where() -> str:
        tiles = " + ".join(f"tl.cdiv(N{i}, BN)" for i in range(kernel.outputs))
        return _WHERE.format(tiles=tiles, output=_output(kernel)).strip("\n")

    def loop(first: str, last: str) -> str:
        return _LOOPS[kernel.path].format(first=first, last=last, all=every).strip("\n")

    constants = ", BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr"
    epilogue = textwrap.indent("\n".join(_epilogue(kernel)), "    ")
    one = f"@triton.jit\ndef kernel({', '.join(kernel.parameters('kernel'))}{constants}):\n"
    one += f"{where()}\n{loop('0', 'U')}\n{epilogue}"
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
        lines[-1] += f".to({_TL[kernel.out_dtype]}).to(tl.float32)"
    lines += emit(Program.parse(kernel.program), kernel.leaves) if kernel.program else ["result = y"]
    if kernel.result_dtype is not None:
        stored = f"result.to({_TL[kernel.result_dtype]})"
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
    return [
        *lines,
        "words, metadata = to_hif4_tile(result, BM, BN)",
        "in_row = tl.cdiv(width, 64)",
        "unit = tile_n * (BN // 64) + tl.arange(0, BN // 64)[None, :]",
        "tl.store(scales + row * in_row + unit, metadata, mask=row_mask & (unit < in_row))",
        "word = tile_n * (BN // 8) + tl.arange(0, BN // 8)[None, :]",
        "tl.store(codes + row * (in_row * 8) + word, words, mask=row_mask & (word < in_row * 8))",
    ]


@functools.lru_cache(maxsize=4096)
def kernel_for(*key: Any) -> LinearKernel:
    """Return the kernel of a key; its text is made once."""
    return LinearKernel(*key)


def choose_path(rows: int, capability: tuple[int, int] | None) -> str:
    """Return how a product is computed.

    Args:
        rows: of the activation.
        capability: of the device, or None for the interpreter.

    Raises:
        OptionError: ``TAHF4_LINEAR_PATH`` names no path.
    """
    forced = os.environ.get("TAHF4_LINEAR_PATH")
    if forced:
        if forced not in PATHS:
            raise OptionError(f"TAHF4_LINEAR_PATH is {forced!r}; expected one of {', '.join(PATHS)}")
        return forced
    if rows < FEW_ROWS:
        return "packed"
    return "bf16" if capability is not None and capability >= (10, 0) else "int8"


def tiles(
    path: str, rows: int, columns: int, unit_count: int, processors: int, block: int = 0, tight: bool = False
) -> list[Tile]:
    """Return the sizes to try for a product, the default first.

    Args:
        path: one of :data:`PATHS`.
        rows: of the activation.
        columns: of the weight.
        unit_count: units along K.
        processors: of the chip.
        block: Hadamard block of a result that is quantized: a tile holds whole ones.
        tight: the result is quantized by a thread block whose accumulators take all registers (before Hopper): smaller
            tiles, so that nothing spills.
    """
    width = max(64, block)
    if path != "packed" and tight:
        wide = Tile(64, 128, 8, 3)
        return [wide, Tile(64, width, 4, 3)] if block > 64 else [Tile(128, 64, 8, 3), wide]
    if path != "packed":
        many = [Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), Tile(128, width, 4, 4)]
        if path == "bf16":
            many.append(Tile(128, 256, 8, 3))
        return [Tile(64, width, 4, 3), *many[1:]] if rows < 512 and columns < 1024 else many
    height = 16 if rows <= 16 else 32 if rows <= 32 else 64
    blocks = -(-rows // height) * -(-columns // width)
    split = max(1, min(2 * processors // max(1, blocks), unit_count // 4, 16))
    return [Tile(height, width, 4, 3, split), Tile(height, width, 4, 4, max(1, split // 2))]


def candidates(
    rows: int,
    columns: int,
    unit_count: int,
    capability: tuple[int, int],
    processors: int,
    block: int,
    quantized: bool,
) -> list[tuple[str, Tile]]:
    """Return the paths and tiles to measure for a product, the default first."""
    default = choose_path(rows, capability)
    paths = [default]
    if default != "packed" and not os.environ.get("TAHF4_LINEAR_PATH"):
        # Two instructions a sum and unit for the scales may cost what the faster product of int8 gains.
        paths += [path for path in ("int8", "bf16") if path != default and (path == "bf16" or capability < (10, 0))]
    tight = quantized and capability < (9, 0)
    sizes = (rows, columns, unit_count, processors, block, tight)
    return [(path, tile) for path in paths for tile in tiles(path, *sizes)]


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
) -> LinearKernel:
    """Return the kernel of a product as :func:`calls` would make it, but for the path."""
    shape = (*codes.shape[:-1], weight_codes.shape[0])
    leaves = tuple(operand(f"x{i}", value, shape).leaf for i, value in enumerate(inputs))
    masked = multiplier is not None
    return kernel_for("", len(sizes), bias is not None, out_dtype, program, leaves, result_dtype, masked, block)


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
    *,
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
        results = [
            torch.empty((*lead, units(n) * (UNIT // 2)), dtype=torch.uint8, device=device),
            torch.empty((*lead, units(n)), dtype=torch.int32, device=device),
        ]
    if rows == 0 or n == 0:
        return results, []
    path = path or choose_path(rows, capability)
    operands = [operand(f"x{i}", value, (*lead, n)) for i, value in enumerate(inputs)]
    leaves = tuple(o.leaf for o in operands)
    masked = multiplier is not None
    kernel = kernel_for(path, len(sizes), bias is not None, out_dtype, program, leaves, result_dtype, masked, block)
    before: list[Call] = []
    sides: list[Tensor] = []
    for matrix in ((codes.reshape(rows, -1), scales.reshape(rows, -1)), (weight_codes, weight_scales)):
        if path == "packed":
            sides += [part.contiguous() for part in matrix]
        else:
            expanded, launch = expand(*matrix, path)
            sides += expanded
            before.append(launch)
    targets = results if result_dtype is not None else [results[0].view(torch.int32), results[1]]
    after = [*([bias] if bias is not None else []), *([multiplier] if multiplier is not None else [])]
    after += [value for o in operands for value in o.values]
    tight = result_dtype is None and capability is not None and capability < (9, 0)
    tile = tile or tiles(path, rows, n, count, processors, block, tight)[0]
    shape = (rows, count, *sizes)
    return results, before + _launches(kernel, tile, sides, targets, shape, after)


def _launches(
    kernel: LinearKernel,
    tile: Tile,
    sides: Sequence[Tensor],
    targets: Sequence[Tensor],
    shape: Sequence[int],
    after: Sequence[Any],
) -> list[Call]:
    rows, _, *widths = shape
    blocks = -(-rows // tile.rows) * sum(-(-width // tile.columns) for width in widths)
    constants = {"BM": tile.rows, "BN": tile.columns, "GROUP": 8}

    def one(name: str, grid: tuple[int, ...], values: Sequence[Any], **more: int) -> Call:
        arguments = dict(zip(kernel.parameters(name), values, strict=True))
        exact = kernel.result_dtype is None and name != "partial"
        return Call(kernel.text, name, grid, arguments, {**constants, **more}, tile.warps, tile.stages, exact)

    if tile.split == 1:
        return [one("kernel", (blocks,), [*sides, *targets, *shape, *after])]
    sums = torch.empty((tile.split, rows, sum(widths)), dtype=torch.float32, device=targets[0].device)
    return [
        one("partial", (blocks, tile.split), [*sides, sums, *shape], SPLIT=tile.split),
        one("finish", (blocks,), [sums, *targets, *shape, *after], SPLIT=tile.split),
    ]
