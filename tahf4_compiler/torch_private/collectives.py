"""Collectives that return their result, as graphs need them: those of ``torch.distributed`` write to their input."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import _functional_collectives as functional

__all__ = ["sum_of_ranks"]


def sum_of_ranks(part: Tensor, group: Any) -> Tensor:
    """Return the sum of a group's tensors, also while Dynamo traces."""
    return functional.all_reduce(part, "sum", group)
