"""Programs of fused operators as the C++ code reads them: instructions on slots of 64 values."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ops.program import REDUCTIONS, Argument, Program, Statement

__all__ = ["DTYPES", "MOST_INPUTS", "Encoded", "encode"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Number of each dtype in the C++ files."""

MOST_INPUTS = 16

# In the order of `enum Op` of common.h.
_LOAD, _PRODUCT, _REDUCED, _NORMALIZE, _MEAN, _MATMUL = 0, 1, 2, 19, 20, 21
_OPS = {
    name: number
    for number, name in enumerate(
        (
            *("to", "add", "sub", "mul", "div", "neg", "abs", "exp", "sqrt", "rsqrt"),
            *("sigmoid", "relu", "silu", "gelu", "gelu_tanh", "square"),
        ),
        start=3,
    )
}
_REDUCTIONS = {"layer_norm": 1, "rms_norm": 2, "mean": 3}  # `enum Reduction`

Instruction = tuple[int, int, int, int, int, int]


class CProgram(ctypes.Structure):
    """``struct Program`` of common.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("before", "after", "constants")),
        *((name, ctypes.c_int32) for name in ("before_count", "after_count", "constant_count", "slots")),
        *((name, ctypes.c_int32) for name in ("reduced", "result", "reduction")),
        ("epsilon", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Encoded:
    """A program for the C++ code.

    Attributes:
        struct: what is passed.
        dtype: of the result; None for an empty program, which gives back its input.
        arrays: that the struct points into.
        inputs: how many tensors it must be given.
        used: those whose shapes its result has, a bit each; -1 if it has the product's.
        factors: the first factors of products, a bit each; the second is the input behind it.
    """

    struct: CProgram
    dtype: torch.dtype | None
    arrays: tuple[Any, ...]
    inputs: int
    used: int
    factors: int


@functools.cache
def encode(text: str, default: str) -> Encoded | None:
    """Return the instructions of a program.

    Args:
        text: of the program.
        default: name of what an empty program returns, ``"x0"`` or ``"y"``.

    Returns:
        None if the C++ code cannot run it: more than one reduction or one of a product, a product where there is none,
        more than 16 inputs, or a ``matmul`` without a product that the result reads.
    """
    program = Program.parse(text)
    by_name = {s.name: s for s in program.statements}
    reductions = [s for s in program.statements if s.function in REDUCTIONS]
    if len(by_name) != len(program.statements) or len(reductions) > 1 or (reductions and default == "y"):
        return None
    reduction = reductions[0] if reductions else None
    if reduction is not None and not isinstance(reduction.arguments[0], str):
        return None
    names = {a for s in program.statements for a in s.names()} | {program.result(default)}
    numbers = [int(n[1:]) for n in names - set(by_name) if n[0] == "x" and n[1:].isdigit()]
    if any(number >= MOST_INPUTS for number in numbers) or ("y" in names and default != "y"):
        return None
    constants: dict[float, int] = {}
    for statement in program.statements:
        last = len(statement.arguments) - (statement.function in ("layer_norm", "rms_norm"))  # the epsilon is no slot
        for argument in statement.arguments[:last]:
            if isinstance(argument, int | float):
                constants.setdefault(float(argument), len(constants))
    before: list[Instruction] = []
    slots, reduced, epsilon = len(constants), 0, 0.0
    if reduction is not None:
        before, reduced, slots = _code(by_name, str(reduction.arguments[0]), None, constants)
        if reduction.function != "mean":
            epsilon = float(reduction.arguments[-1] or 0.0)
    after, result, more = _code(by_name, program.result(default), reduction, constants)
    arrays = (_flat(before), _flat(after), (ctypes.c_float * max(1, len(constants)))(*constants))
    pointers = [ctypes.addressof(array) for array in arrays]
    kind = _REDUCTIONS[reduction.function] if reduction is not None else 0
    counts = (len(before), len(after), len(constants), max(slots, more))
    struct = CProgram(*pointers, *counts, reduced, result, kind, epsilon)
    used = _used(by_name, program.result(default))
    bits = -1 if "y" in used else sum(1 << int(name[1:]) for name in used)
    dtype = program.statements[-1].dtype if program.statements else None
    factors = sum(1 << number for number in program.factors())
    if factors and bits != -1:
        return None
    return Encoded(struct, dtype, arrays, max(numbers, default=-1) + 1, bits, factors)


def _used(by_name: dict[str, Statement], result: str) -> set[str]:
    """Return the inputs that a result reads with their own shapes: not those of a mean, which has one column."""
    found: set[str] = set()
    todo, seen = [result], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in by_name:
            found.add(name)
        elif by_name[name].function != "mean":
            todo += by_name[name].names()
    return found


def _flat(code: Sequence[Instruction]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * max(1, 6 * len(code)))(*(number for instruction in code for number in instruction))


def _code(
    by_name: dict[str, Statement], wanted: str, reduction: Statement | None, constants: dict[float, int]
) -> tuple[list[Instruction], int, int]:
    """Return the instructions for a value, its slot, and how many slots they need.

    ``reduction``: what it reads is taken from the row that was kept.
    """
    kept = reduction.arguments[0] if reduction is not None else None

    def sources(name: str) -> list[str]:
        if name not in by_name or name == kept or by_name[name].function == "matmul":  # which reads inputs itself
            return []
        return by_name[name].names()

    order: list[str] = []  # every name that is needed, after what it reads

    def visit(name: str) -> None:
        if name not in order:
            for source in sources(name):
                visit(source)
            order.append(name)

    visit(wanted)
    last = {source: index for index, name in enumerate(order) for source in sources(name)}
    last[wanted] = len(order)
    slot_of: dict[str, int] = {}
    free: list[int] = []
    slots = len(constants)
    code: list[Instruction] = []

    def slot(argument: Argument) -> int:
        if argument is None:
            return -1
        return slot_of[argument] if isinstance(argument, str) else constants[float(argument)]

    for index, name in enumerate(order):
        if not free:
            free.append(slots)
            slots += 1
        to = slot_of[name] = free.pop()
        if name == kept:
            code.append((_REDUCED, 0, to, -1, -1, -1))
        elif name not in by_name:
            code.append((_PRODUCT, 0, to, -1, -1, -1) if name == "y" else (_LOAD, 0, to, int(name[1:]), -1, -1))
        else:
            code.append(_instruction(by_name[name], to, slot))
        # Only now: an instruction never writes to a slot that it reads.
        free += [slot_of[source] for source in dict.fromkeys(sources(name)) if last[source] == index]
    return code, slot_of[wanted], slots


def _instruction(statement: Statement, to: int, slot: Any) -> Instruction:
    dtype = DTYPES[statement.dtype]
    if statement.function == "matmul":
        left, right = (int(str(argument)[1:]) for argument in statement.arguments)
        return (_MATMUL, dtype, to, left, right, -1)
    if statement.function == "mean":
        return (_MEAN, dtype, to, -1, -1, -1)
    if statement.function in ("layer_norm", "rms_norm"):
        x, weight, bias = (*statement.arguments[:-1], None)[:3]
        return (_NORMALIZE, dtype, to, slot(x), slot(weight), slot(bias))
    a, b = (*map(slot, statement.arguments), -1)[:2]
    return (_OPS[statement.function], dtype, to, a, b, -1)
