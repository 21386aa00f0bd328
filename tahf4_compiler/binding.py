"""From the arguments of a captured graph to those of the lowered one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import hif4
from .graph import INPUT, GraphInput, PackedInput
from .packing import PackedStore, PackedWeight

__all__ = ["Binding"]


class Binding:
    """Puts packed weights in the place of the parameters that a lowered graph no longer reads.

    Attributes:
        weights: the packed weights that the graph asks for, in order.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        """Read the inputs off the graph's placeholders."""
        self.weights: list[PackedWeight] = []
        self._plan: list[tuple[int, str | None]] = []
        for node in graph_module.graph.nodes:
            if node.op != "placeholder":
                continue
            source = node.meta[INPUT]
            if isinstance(source, GraphInput):
                self._plan.append((source.index, None))
            else:
                request = PackedWeight(source.weights, source.hadamard_block)
                if request not in self.weights:
                    self.weights.append(request)
                self._plan.append((self.weights.index(request), source.part))

    def __call__(self, args: Sequence[Any], store: PackedStore, check: str = "content") -> list[Any]:
        """Return the lowered graph's arguments.

        Args:
            args: of the captured graph.
            store: where packed weights are kept.
            check: how a changed weight is noticed.
        """
        packed: list[hif4.Packed] = []
        if self.weights:
            requests = [(tuple(args[i] for i in w.weights), w.hadamard_block) for w in self.weights]
            packed = store.get(requests, check)
        return [args[i] if part is None else getattr(packed[i], part) for i, part in self._plan]


def packed_fake(source: PackedInput, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype of a packed input, for its weights' fake tensors."""
    rows = sum(weight.shape[0] for weight in weights)
    count = hif4.units(weights[0].shape[1])
    if source.part == "codes":
        return weights[0].new_empty((rows, count * (hif4.UNIT // 2)), dtype=torch.uint8)
    return weights[0].new_empty((rows, count), dtype=torch.int32)
