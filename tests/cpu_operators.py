"""``torch.ops.tahf4_cpu`` with the defaults that tests want (no bias, float32, no transform), and its own test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import build
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = torch.ops.tahf4_cpu


def linear(*operands: Any) -> Tensor:
    """Take codes, scales, weight codes, weight scales, and perhaps a bias and a dtype."""
    defaults = (None, torch.float32)
    return OPERATORS.linear(*operands, *defaults[len(operands) - 4 :])


def fused_quantize(inputs: Sequence[Tensor], program: str, multiplier: Tensor | None = None, block: int = 0):
    return OPERATORS.fused_quantize(inputs, program, multiplier, block)


def fused_linear(*operands: Any) -> list[Tensor]:
    return OPERATORS.fused_linear(*operands)


def linear_quantize(*operands: Any, multiplier: Tensor | None = None, hadamard_block: int = 0):
    """Take the product, the inputs and the program, and perhaps the transform."""
    rest = (multiplier, hadamard_block)
    return OPERATORS.linear_quantize(*operands, *rest[len(operands) - 8 :])


def sets() -> list[str]:
    """Return the instruction sets that this processor runs, "none" first."""
    found = build.loaded().tahf4_instruction_sets() if cpu.available() else 0
    return [name for bit, name in enumerate(build.SETS) if bit == 0 or found >> bit & 1]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Assert that codes and scales are the same bits."""
    assert torch.equal(found[1].view(torch.int32), wanted[1].view(torch.int32))  # NaN, too
    assert torch.equal(found[0], wanted[0])
