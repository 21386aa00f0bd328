"""From the arguments of a captured graph to those of the lowered one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..format import hif4
from ..graph.inputs import BESIDE, INPUT, GraphInput, HeldWeight, PackedInput, PackedWeight
from ..ops.observers import handle_of
from .formats import pack_rows, tensor_of
from .store import PackedStore

__all__ = ["Binding"]


class Binding:
    """Puts packed weights in the place of the parameters that a lowered graph no longer reads.

    Attributes:
        weights: the packed weights that the graph asks for, in order.
    """

    def __init__(
        self, graph_module: fx.GraphModule, name: Callable[[torch.Tensor], str | None] = lambda weight: None
    ) -> None:
        """Read the inputs off the graph's placeholders; ``name`` gives a weight's module path, for warnings."""
        self._name = name
        sources = [node.meta[INPUT] for node in graph_module.graph.nodes if node.op == "placeholder"]
        packed = [source for source in sources if isinstance(source, PackedInput)]
        made = (s.weight for s in packed if s.part not in BESIDE and isinstance(s.weight, PackedWeight))
        self.weights = list(dict.fromkeys(made))
        self._given = [source.index if isinstance(source, GraphInput) else 0 for source in sources]
        self._made = [(i, source) for i, source in enumerate(sources) if not isinstance(source, GraphInput)]
        self._places = {weight: i for i, weight in enumerate(self.weights)}

    def __call__(self, args: Sequence[Any], store: PackedStore, check: str = "auto") -> list[Any]:
        """Return the lowered graph's arguments.

        Args:
            args: of the captured graph.
            store: where packed weights are kept.
            check: how a changed weight is noticed.
        """
        packed: list[Any] = []
        if self.weights:
            packed = store.get([(tuple([args[i] for i in w.weights]), w) for w in self.weights], check, self._name)
        out = [args[index] for index in self._given]
        for place, source in self._made:
            if isinstance(source.weight, HeldWeight):
                out[place] = args[source.positions[0]]
            elif source.part not in BESIDE:
                out[place] = tensor_of(packed[self._places[source.weight]], source.part)
            else:
                out[place] = _beside(source, tuple([args[i] for i in source.weights]), store)
        return out


def _beside(source: PackedInput, weights: tuple[torch.Tensor, ...], store: PackedStore) -> torch.Tensor:
    assert isinstance(source.weight, PackedWeight)
    if source.part == "observer":
        return handle_of(weights)
    if source.part == "multiplier":
        return store.multiplier(weights, source.weight)
    branch = store.low_rank(weights[0])
    return branch.a if source.part == "low_rank_a" else branch.b


def packed_fake(source: PackedInput, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype of a packed input, for its weights' fake tensors."""
    assert isinstance(source.weight, PackedWeight)
    rows, k = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    count = hif4.units(k)
    if source.part == "observer":
        return weights[0].new_empty((2,), dtype=torch.int64, device="cpu")
    if source.part in ("low_rank_a", "low_rank_b"):
        rank = source.weight.rank
        return weights[0].new_empty((k, rank) if source.part == "low_rank_a" else (rank, rows))
    if source.part == "multiplier":
        return weights[0].new_empty((k,), dtype=torch.float32)
    if source.weight.format:
        multiplier = weights[0].new_empty((k,), dtype=torch.float32)
        parts = pack_rows(source.weight.format, tuple(weights), multiplier, source.weight.hadamard_block)
        return tensor_of(parts, source.part)
    if source.part == "codes":
        return weights[0].new_empty((rows, count * (hif4.UNIT // 2)), dtype=torch.uint8)
    return weights[0].new_empty((rows, count), dtype=torch.int32)
