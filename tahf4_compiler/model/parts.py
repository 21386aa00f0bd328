"""Weights of which a process holds a part: whole again, and as a model that runs sees them.

Works without importing ``torch.distributed``: a process that did not import it has no such weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .linears import linear_weights

__all__ = ["Part", "class_name", "full_class_name", "part_of", "remember", "running_weights", "whole"]


@dataclass(frozen=True)
class Part:
    """Which part of a weight a plain tensor is.

    Attributes:
        axis: that is divided: 0 for rows (output features), 1 for input features.
        rank: which part, of equal ones.
        size: how many.
        group: the process group that holds them.
    """

    axis: int
    rank: int
    size: int
    group: Any

    def of(self, whole: Tensor, axis: int | None = None) -> Tensor:
        """Return this part of a tensor, along another axis if one is given."""
        return whole.chunk(self.size, self.axis if axis is None else axis)[self.rank]


_parts: WeakIdKeyDictionary = WeakIdKeyDictionary()
_divided = False  # most processes divide nothing, and look up every weight at each call


def remember(weight: Tensor, part: Part) -> None:
    """Remember of what a parameter is a part."""
    global _divided
    _divided = True
    _parts[weight] = part


def part_of(weight: Tensor) -> Part | None:
    """Return which part of a weight a parameter is, None for a whole one (and a ``DTensor``, which knows itself)."""
    found: Part | None = _parts.get(weight) if _divided else None
    return found


def whole(weight: Tensor) -> Tensor:
    """Return a weight as it is, or all of a divided one: then every process that holds a part must call this."""
    if (part := part_of(weight)) is not None:
        pieces = [torch.empty_like(weight) for _ in range(part.size)]
        torch.distributed.all_gather(pieces, weight.detach().contiguous(), group=part.group)
        return torch.cat(pieces, part.axis)
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(weight, tensors.DTensor):
        found: Tensor = weight.full_tensor()
        return found
    return weight


def running_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(module path, weight)`` of what may be weights of linears, as the model's forward reads them.

    A module under FSDP2 (``fully_shard``) owns a part of each parameter, and another parameter, the whole, while it
    runs. Every process of its mesh must call this and exhaust it.
    """
    yield from linear_weights(model)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in list(model.named_modules()) if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            with torch.no_grad():
                module.unshard()
                found = list(linear_weights(module))
                module.reshard()
            for path, weight in found:
                if not hasattr(weight, "full_tensor"):  # a child's, which is a group of its own
                    inner = name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")
                    yield ".".join(part for part in (inner, path) if part), weight


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, as it was before ``fully_shard`` put another in its place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        return next(cls.__name__ for cls in type(module).__mro__ if not issubclass(cls, fsdp.FSDPModule))
    return type(module).__name__


def full_class_name(module: nn.Module) -> str:
    """Return the name of a module's class with the Python module that defines it."""
    return f"{type(module).__module__}.{class_name(module)}"
