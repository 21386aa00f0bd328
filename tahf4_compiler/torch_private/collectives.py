"""Collectives that return their result, as graphs need them: those of ``torch.distributed`` write to their input."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import _functional_collectives as functional

__all__ = ["gathered_of_ranks", "largest_of_ranks", "sum_of_ranks"]

_all_gather = getattr(functional, "all_gather_single", functional.all_gather_tensor)  # as torch 2.13 calls it


def sum_of_ranks(part: Tensor, group: Any) -> Tensor:
    """Return the sum of a group's tensors, also while Dynamo traces."""
    return functional.all_reduce(part, "sum", group)


def largest_of_ranks(part: Tensor, group: Any) -> Tensor:
    """Return the largest of a group's tensors, element by element, also while Dynamo traces."""
    return functional.all_reduce(part, "max", group)


def gathered_of_ranks(part: Tensor, group: Any) -> Tensor:
    """Return a group's tensors of equal shapes one after the other along the first axis, also while Dynamo traces."""
    return _all_gather(part, 0, group)
