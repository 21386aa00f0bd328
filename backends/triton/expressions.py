"""Programs of fused operators as Triton source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ...ops.program import DTYPES, Program, Statement

__all__ = ["TL_DTYPES", "TRITON_DTYPES", "Leaf", "Operand", "emit", "leaf_parameters", "operand", "operands"]

TRITON_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""PyTorch's dtype -> what Triton calls it in signatures (``*fp32``)."""

TL_DTYPES = {dtype: f"tl.{name}" for name, dtype in DTYPES.items()}
"""PyTorch's dtype -> what a kernel's text calls it."""

_EXPRESSIONS: dict[str, Callable[..., str]] = {
    "to": lambda x: x,
    "add": lambda a, b: f"{a} + {b}",
    "sub": lambda a, b: f"{a} - {b}",
    "mul": lambda a, b: f"{a} * {b}",
    "div": lambda a, b: f"tl.div_rn({a}, {b})",
    "neg": lambda x: f"-{x}",
    "abs": lambda x: f"tl.abs({x})",
    "exp": lambda x: f"tl.exp({x})",
    "sqrt": lambda x: f"tl.sqrt_rn({x})",
    "rsqrt": lambda x: f"tl.rsqrt({x})",
    "sigmoid": lambda x: f"tl.sigmoid({x})",
    "relu": lambda x: f"tl.where({x} < 0.0, 0.0, {x})",  # keeps NaN
    "silu": lambda x: f"{x} * tl.sigmoid({x})",
    "gelu": lambda x: f"0.5 * {x} * (1.0 + tl.erf({x} * 0.7071067811865476))",
    "gelu_tanh": lambda x: f"{x} * tl.sigmoid(1.5957691216057308 * ({x} + 0.044715 * {x} * {x} * {x}))",
    "square": lambda x: f"{x} * {x}",
    "layer_norm": lambda x, weight, bias, eps: (
        f"({x} - mean) * spread" + (f" * {weight}" if weight else "") + (f" + {bias}" if bias else "")
    ),
    "rms_norm": lambda x, weight, eps: f"{x} * spread" + (f" * {weight}" if weight else ""),
    "mean": lambda x: "mean",
    "matmul": lambda left, right: "product",  # of _matmul
    "rotary": lambda x, cos, sin: f"turned({x}, {cos}, {sin})",
}


@dataclass(frozen=True)
class Leaf:
    """How a kernel reads an input of a program; part of the key of its source.

    Attributes:
        name: in the program.
        dtype: of its elements.
        levels: 0: the same for every row; 1: ``row * stride``; 2: ``row // length * outer + row % length * inner``.
        columns: whether it changes along the last axis.
        factor: 1 or 2 for the first or second factor of a ``matmul``, read as ``[rows, r]`` and ``[r, columns]``.
        head: channels of a head for an angle of ``rotary``, one for each pair of them, in every head; 0 for others.
    """

    name: str
    dtype: torch.dtype
    levels: int
    columns: bool
    factor: int = 0
    head: int = 0

    def parameters(self) -> list[str]:
        """Return the kernel's parameters for this input."""
        if self.factor:
            return [self.name, *([f"{self.name}_stride", f"{self.name}_rank"] if self.factor == 1 else [])]
        rows = {0: [], 1: ["stride"], 2: ["length", "outer", "inner"]}[self.levels]
        return [self.name, *(f"{self.name}_{part}" for part in [*rows, *(["step"] if self.columns else [])])]

    def load(self) -> str:
        """Return the line that loads it as float32, at ``row``, ``column`` (or ``pair`` of two) and their masks."""
        name, address, mask = self.name, self.name, []
        if self.levels == 1:
            address += f" + row * {name}_stride"
        elif self.levels == 2:
            address += f" + row // {name}_length * {name}_outer + row % {name}_length * {name}_inner"
        if self.levels:
            mask.append("row_mask")
        if self.head:
            address += f" + pair % {self.head // 2} * {name}_step"
        elif self.columns:
            address += f" + column * {name}_step"
            mask.append("column_mask")
        if not mask:
            return f"{name}_value = tl.load({address}).to(tl.float32)"
        return f"{name}_value = tl.load({address}, mask={' & '.join(mask)}, other=0.0).to(tl.float32)"


@dataclass(frozen=True)
class Operand:
    """A leaf and what a launch passes for it."""

    leaf: Leaf
    values: tuple[Any, ...]


def operand(name: str, tensor: Tensor, shape: Sequence[int], angle: bool = False) -> Operand:
    """Describe an input for a kernel whose rows are the leading axes of ``shape``, flattened.

    Args:
        name: in the program.
        tensor: that broadcasts to ``shape``; it is copied if its strides have more than two levels.
        shape: ``[..., K]``.
        angle: whether it is one of ``rotary``; then it broadcasts to ``[..., E / 2]``.
    """
    if tensor.dtype not in TRITON_DTYPES:
        raise FormatError(f"{name} is of {tensor.dtype}; a fused kernel takes float32, bfloat16 or float16")
    wide = tensor.expand((*shape[:-1], tensor.shape[-1]) if angle else tuple(shape))
    levels = _levels(wide)
    if len(levels) > 2:
        wide = wide.contiguous()
        levels = _levels(wide)
    columns = angle or (wide.shape[-1] > 1 and wide.stride(-1) != 0)
    rows: tuple[int, ...] = ()
    if len(levels) == 1:
        rows = (levels[0][1],)
    elif len(levels) == 2:
        (_, outer), (length, inner) = levels
        rows = (length, outer, inner)
    leaf = Leaf(name, tensor.dtype, len(levels), columns, head=2 * wide.shape[-1] if angle else 0)
    return Operand(leaf, (wide, *rows, *((wide.stride(-1),) if columns else ())))


def operands(program: str, inputs: Sequence[Tensor], shape: Sequence[int]) -> list[Operand]:
    """Describe the inputs of a program for :func:`operand`'s kernel.

    Raises:
        FormatError: the factors of a ``matmul`` do not fit the shape or each other; a dtype that no kernel reads.
    """
    first = Program.parse(program).factors()
    found = []
    for i, value in enumerate(inputs):
        if i in first:
            found.append(_first_factor(f"x{i}", value, shape))
        elif i - 1 in first:
            found.append(_second_factor(f"x{i}", value, inputs[i - 1], shape))
        else:
            found.append(operand(f"x{i}", value, shape))
    return found


def _first_factor(name: str, tensor: Tensor, shape: Sequence[int]) -> Operand:
    if tensor.dtype not in TRITON_DTYPES or tuple(tensor.shape[:-1]) != tuple(shape[:-1]) or not tensor.dim():
        raise FormatError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected a factor {(*shape[:-1], 'r')}")
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return Operand(Leaf(name, tensor.dtype, 1, True, 1), (rows, rows.stride(0), rows.shape[1]))


def _second_factor(name: str, tensor: Tensor, first: Tensor, shape: Sequence[int]) -> Operand:
    if tensor.dtype != first.dtype or tuple(tensor.shape) != (first.shape[-1], shape[-1]):
        wanted = first.shape[-1], shape[-1]
        raise FormatError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected a factor {first.dtype} {wanted}")
    return Operand(Leaf(name, tensor.dtype, 0, True, 2), (tensor.contiguous(),))


def _levels(wide: Tensor) -> list[tuple[int, int]]:
    """Return (size, stride) of the leading axes, neighbours that are evenly spaced joined; none if all are 0."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(wide.shape[:-1], wide.stride()[:-1], strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return [] if all(stride == 0 for _, stride in found) else found


def leaf_parameters(leaves: Sequence[Leaf]) -> list[str]:
    """Return the parameters of all leaves."""
    return [parameter for leaf in leaves for parameter in leaf.parameters()]


def emit(program: Program, leaves: Sequence[Leaf], *, until: Statement | None = None) -> Iterator[str]:
    """Yield lines that compute a program at ``row``, ``column``, ``row_mask`` and ``column_mask``.

    Args:
        program: whose ``y``, if it reads one, is the variable ``y``.
        leaves: its inputs.
        until: a reduction: stop with its argument.

    Yields:
        Lines; the last assigns ``result``.
    """
    needed = _needed(program, until)
    if until is not None and any(leaf.head and leaf.name in needed for leaf in leaves):
        raise FormatError(f"a rotary embedding comes before '{until}'; a kernel wants it behind it")
    for leaf in leaves:
        if leaf.name in needed and not leaf.factor:
            yield leaf.load()
    names = {leaf.name: f"{leaf.name}_value" for leaf in leaves} | {"y": "y"}
    for statement in program.statements:
        if statement == until:
            break
        if statement.name not in needed:
            continue
        yield f"# {statement}"
        if statement.function == "matmul":
            yield from _matmul(*statement.names())
        arguments = [_argument(a, names) for a in statement.arguments]
        names[statement.name] = f"{statement.name}_value"
        line = f"{statement.name}_value = ({_EXPRESSIONS[statement.function](*arguments)})"
        if statement.dtype != torch.float32:
            line += f".to({TL_DTYPES[statement.dtype]}).to(tl.float32)"
        yield line
    last = until.names()[0] if until is not None else program.result(leaves[0].name if leaves else "y")
    yield f"result = {names[last]}"


def _matmul(left: str, right: str) -> Iterator[str]:
    """Yield lines that multiply two factors in the tile ``[BM, BN]`` of a product, ``width`` columns wide."""
    yield "product = tl.zeros((BM, BN), tl.float32)"
    yield f"for first in tl.range(0, {left}_rank, 16, num_stages=1):"
    yield "    inner = first + tl.arange(0, 16)"
    yield f"    known = inner < {left}_rank"
    yield f"    left_at = {left} + row * {left}_stride + inner[None, :]"
    yield "    left = tl.load(left_at, mask=row_mask & known[None, :], other=0.0)"
    yield f"    right_at = {right} + inner[:, None] * width + column"
    yield "    right = tl.load(right_at, mask=known[:, None] & (column < width), other=0.0)"
    yield '    product = tl.dot(left, right, product, input_precision="ieee")'


def _needed(program: Program, until: Statement | None) -> set[str]:
    if until is None:
        needed = {name for s in program.statements for name in s.names()} | {s.name for s in program.statements}
        return needed or {"x0"}
    needed = {until.names()[0]}
    for statement in reversed(program.statements[: program.statements.index(until)]):
        if statement.name in needed:
            needed |= set(statement.names())
    return needed


def _argument(value: str | float | int | None, names: dict[str, str]) -> str:
    if isinstance(value, str):
        return names[value]
    return "" if value is None else repr(float(value))
