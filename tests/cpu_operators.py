"""``torch.ops.tahf4_cpu`` with the defaults that tests want: no bias, float32, no transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
