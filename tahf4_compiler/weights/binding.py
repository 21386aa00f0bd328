"""From the arguments of a captured graph to those of the lowered one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..format import hif4
from ..graph.inputs import INPUT, GraphInput, HeldWeight, PackedInput, PackedWeight
from ..ops.observers import handle_of
from .formats import pack_rows, part_of
from .held import joined
from .store import PackedStore

__all__ = ["Binding"]

_AT_RUN_TIME = ("multiplier", "observer")
"""Parts that belong to an activation, not to a packed weight."""


class Binding:
    """Puts packed weights in the place of the parameters that a lowered graph no longer reads.

    Attributes:
        weights: the packed weights that the graph asks for, in order.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        """Read the inputs off the graph's placeholders."""
        sources = [node.meta[INPUT] for node in graph_module.graph.nodes if node.op == "placeholder"]
        packed = [source for source in sources if isinstance(source, PackedInput)]
        made = (s.weight for s in packed if s.part not in _AT_RUN_TIME and isinstance(s.weight, PackedWeight))
        self.weights = list(dict.fromkeys(made))
        self._plan: list[tuple[int, Any]] = []
        for source in sources:
            if isinstance(source, GraphInput):
                self._plan.append((source.index, None))
            elif isinstance(source.weight, HeldWeight):
                self._plan.append((-1, source))
            elif source.part not in _AT_RUN_TIME:
                self._plan.append((self.weights.index(source.weight), source.part))
            else:
                self._plan.append((-1, source))

    def __call__(self, args: Sequence[Any], store: PackedStore, check: str = "content") -> list[Any]:
        """Return the lowered graph's arguments.

        Args:
            args: of the captured graph.
            store: where packed weights are kept.
            check: how a changed weight is noticed.
        """
        packed: list[Any] = []
        if self.weights:
            packed = store.get([(tuple(args[i] for i in w.weights), w) for w in self.weights], check)

        def value(index: int, part: Any) -> Any:
            if part is None:
                return args[index]
            if isinstance(part, str):
                return part_of(packed[index], part)
            weights = tuple(args[i] for i in part.positions)
            if isinstance(part.weight, HeldWeight):
                return weights[0] if len(weights) == 1 else joined(weights)
            return store.multiplier(weights, part.weight) if part.part == "multiplier" else handle_of(weights)

        return [value(index, part) for index, part in self._plan]


def packed_fake(source: PackedInput, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype of a packed input, for its weights' fake tensors."""
    rows = sum(weight.shape[0] for weight in weights)
    if isinstance(source.weight, HeldWeight):
        return weights[0].new_empty((rows, weights[0].shape[1]))
    k = weights[0].shape[1]
    count = hif4.units(k)
    if source.part == "observer":
        return weights[0].new_empty((2,), dtype=torch.int64, device="cpu")
    if source.part == "multiplier":
        return weights[0].new_empty((k,), dtype=torch.float32)
    if source.weight.format:
        multiplier = weights[0].new_empty((k,), dtype=torch.float32)
        parts = pack_rows(source.weight.format, tuple(weights), multiplier, source.weight.hadamard_block)
        return part_of(parts, source.part)
    if source.part == "codes":
        return weights[0].new_empty((rows, count * (hif4.UNIT // 2)), dtype=torch.uint8)
    return weights[0].new_empty((rows, count), dtype=torch.int32)
