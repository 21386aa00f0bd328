"""Quantizing kernels that multiply what they quantize by the first factors of branches of low rank.

A block of threads holds some rows and goes along K, a few units of each at a time: it multiplies this part of the rows
by that of the factors, and quantizes it. The part is read a second time, from cache, and its program computed again:
matrix units want a row across threads, and units want it in one.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import FormatError
from ...format import int8
from ...format.hif4 import units
from ...format.spans import ROUNDED, check_form, units_of
from ...format.transforms import check_transform
from ...ops import fused
from ...ops.program import Program
from ...ops.reference import empty_units
from .call import Call
from .expressions import TL_DTYPES, leaf_parameters
from .quantize import QuantizeKernel, describe, moments, text_of

__all__ = ["BranchedKernel", "calls"]

THREADS = 256
MAX_BLOCK = 256
"""Of a rotation: across the units of a row that a block of threads has at once."""
BLOCKS = 128
"""Blocks of threads: where rows give fewer of them, each has a part of its rows' columns."""


@dataclass(frozen=True)
class BranchedKernel:
    """What a generated kernel depends on.

    Attributes:
        quantizer: the kernel that quantizes the same without branches, with a level-1 scale for each unit.
        ranks: of the branches.
        dtype: of their factors, and of what they multiply.
    """

    quantizer: QuantizeKernel
    ranks: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Columns of a tile that holds the factors side by side; matrix units multiply 16 at least."""
        return max(16, 1 << (sum(self.ranks) - 1).bit_length())

    @property
    def tile(self) -> tuple[int, int]:
        """Rows, and units of each, at a time.

        With more rows the factors are read less often. Wide products of as many rows would leave no registers.
        """
        rows = 64 if self.width <= 128 else 32
        return rows, THREADS // rows

    def parameters(self) -> list[str]:
        """Return the kernel's parameters but for the constants."""
        return [*self.quantizer.parameters(), *self.numbered("factor"), *self.numbered("out")]

    def numbered(self, name: str) -> list[str]:
        """Return a name for each branch."""
        return [f"{name}{i}" for i in range(len(self.ranks))]

    def constants(self, split: int) -> dict[str, int]:
        """Return the constants of a launch of which several blocks of threads share a row."""
        rows, count = self.tile
        found = {"T": THREADS, "ROWS": rows, "UNITS": count, "SPLIT": split}
        reduces = Program.parse(self.quantizer.program).reduction() is not None
        return found | ({"COLUMNS": 8 * count} if reduces else {})

    @functools.cached_property
    def text(self) -> str:
        """Return the file: ``kernel``, and ``finish`` for a split along K."""
        return text_of(self.quantizer, f"{_kernel(self)}\n\n\n{_finish(self)}")


def _kernel(kernel: BranchedKernel) -> str:
    quantizer, dtype = kernel.quantizer, TL_DTYPES[kernel.dtype]
    reduction = Program.parse(quantizer.program).reduction()
    given = "".join(f", {name}" for name in leaf_parameters(quantizer.leaves))
    multiplier = ", multiplier" if quantizer.multiplier else ""
    found = ("mean", "spread") if reduction else ()
    across, along = (", mean[:, None], spread[:, None]", ", unit_mean, unit_spread") if reduction else ("", "")
    branches = [*zip(itertools.count(), kernel.ranks, itertools.accumulate(kernel.ranks, initial=0))]
    constants = ["T", "ROWS", "UNITS", "SPLIT", *(["COLUMNS"] if reduction else [])]
    lines = [
        f"@triton.jit\ndef kernel({', '.join([*kernel.parameters(), *(f'{c}: tl.constexpr' for c in constants)])}):",
        "    start = tl.program_id(0).to(tl.int64) * ROWS",
        *([moments(reduction, given)] if reduction else []),
        "    row = (start + tl.arange(0, ROWS))[:, None]",
        "    local_row = tl.arange(0, T) // UNITS",
        *(f"    unit_{name} = tl.gather({name}, local_row, axis=0)[:, None]" for name in found),
        f"    rank = tl.arange(0, {kernel.width})[None, :]",
        f"    products = tl.zeros((ROWS, {kernel.width}), tl.float32)",
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
        "        unit = unit_row * U + at",
        f"        quantize_units(codes, scales, unit, unit_row, at * 64, mask, K{multiplier}{along}{given}, T)",
    ]
    for i, own, before in branches:
        lines += [
            f"    mine = (row < rows) & (rank >= {before}) & (rank < {before + own})",
            f"    out_at = out{i} + (part * rows + row) * {own} + (rank - {before})",
            f"    tl.store(out_at, products.to(out{i}.dtype.element_ty), mask=mine)",
        ]
    return "\n".join(lines)


def _finish(kernel: BranchedKernel) -> str:
    """Return a kernel that adds the parts of each product."""
    given = [*kernel.numbered("sums"), *kernel.numbered("out")]
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
def kernel_for(quantizer: QuantizeKernel, ranks: tuple[int, ...], dtype: torch.dtype) -> BranchedKernel:
    """Return the kernel of a key; its text is made once."""
    return BranchedKernel(quantizer, ranks, dtype)


def calls(
    inputs: list[Tensor],
    program: str,
    factors: list[Tensor],
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
) -> tuple[list[Tensor], list[Call]]:
    """Return the results of ``tahf4::branched_quantize``, empty, and the launches that fill them (none for no values).

    Raises:
        FormatError: as the operator; no factor, a span, or a rotation across more units than :data:`MAX_BLOCK` has.
    """
    rounding = check_form(span) // ROUNDED if bits == 4 else 0
    int8.check_bits(bits, quantized=True)
    statements = fused.program_before(program).statements
    shape = torch.broadcast_shapes(*(value.shape for value in inputs))
    codes, scales = empty_units(inputs[0], shape, bits)
    products = [factor.new_empty((*shape[:-1], factor.shape[1])) for factor in factors]
    rows, k, count = math.prod(shape[:-1]), shape[-1], units(shape[-1])
    check_transform(k, multiplier, hadamard_block)
    fused.check_factors(factors, k, statements[-1].dtype if statements else inputs[0].dtype)
    if not factors or units_of(span) != 1 or hadamard_block > MAX_BLOCK:
        raise FormatError(
            f"{len(factors)} branches, span {span} and hadamard_block {hadamard_block}; expected a branch, a level-1 "
            f"scale for each unit, and a block of at most {MAX_BLOCK}"
        )
    if rows == 0 or k == 0:
        return [codes, scales, *(product.zero_() for product in products)], []
    factors, multiplier = [f.contiguous() for f in factors], None if multiplier is None else multiplier.contiguous()
    quantizer, operands = describe(inputs, program, multiplier, hadamard_block, shape, bits, 1, rounding)
    kernel = kernel_for(quantizer, tuple(factor.shape[1] for factor in factors), factors[0].dtype)
    own_rows, own_units = kernel.tile
    blocks = -(-rows // own_rows)
    split, sums = max(1, min(BLOCKS // blocks, -(-count // own_units))), products
    if split > 1:
        sums = [product.new_empty((split, *product.shape), dtype=torch.float32) for product in products]
    values = [codes.view(torch.int32), scales, rows, k, count, *([multiplier] if multiplier is not None else [])]
    values += [*(value for o in operands for value in o.values), *factors, *sums]
    arguments = dict(zip(kernel.parameters(), values, strict=True))
    constants = kernel.constants(split)
    launches = [Call(kernel.text, "kernel", (blocks, split), arguments, constants, warps=THREADS // 32, exact=True)]
    if split > 1:
        arguments = dict(zip([*kernel.numbered("sums"), *kernel.numbered("out")], [*sums, *products], strict=True))
        blocks = -(-max(product.numel() for product in products) // THREADS)
        constants = {"T": THREADS, "SPLIT": split}
        launches.append(Call(kernel.text, "finish", (blocks,), {**arguments, "rows": rows}, constants, warps=8))
    return [codes, scales, *products], launches
