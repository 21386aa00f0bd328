"""A call on a device that is not the CPU runs its lowered graph, reads no weight and waits for nothing.

The meta device stands for such a device: it has no values, so that whatever reads one raises an error.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import Block, Stack
from tahf4_compiler.backends.dynamo import CompiledGraph
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tahf4_compiler as tahf4
from tahf4_compiler.weights.store import store

BACKEND: dict[str, Any] = {"backend": "tahf4", "fullgraph": True, "options": {"inductor": False}}


class Count(TorchDispatchMode):
    """Counts operators; those inside of an operator of tahf4 belong to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


class Gated(Block):
    """Two linears read one activation: products can be merged, and multipliers compared."""

    def __init__(self, dim: int = 64, hidden: int = 128) -> None:
        super().__init__(dim, hidden)
        self.gate = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y) * self.gate(y))


@pytest.fixture
def counts(monkeypatch):
    """Return two counts of operators: of calls of compiled graphs, and of the lowered graphs alone."""
    call, ran, wanted = CompiledGraph.__call__, Count(), Count()

    def counted(self: CompiledGraph, *args: Any) -> Any:
        with ran:
            result = call(self, *args)
        (lowered, run), *_ = self._variants.values()
        bound = lowered.binding((*args, *self._lifted), store)
        with wanted:
            run(*bound)
        return result

    monkeypatch.setattr(CompiledGraph, "__call__", counted)
    return ran.seen, wanted.seen


def whole(model: nn.Module) -> None:
    model.compile(**BACKEND)


def by_blocks(model: nn.Module) -> None:
    for block in model.blocks:
        block.compile(**BACKEND)


@pytest.mark.parametrize(("compiled", "depth"), [(whole, 40), (by_blocks, 40)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_call_runs_the_operators_of_its_graph_alone(counts, compiled, depth, packed):
    model = Stack(depth)
    model.blocks = nn.ModuleList(Gated() for _ in range(depth))
    model.requires_grad_(False)
    if packed:
        tahf4.quantize_(model)
    compiled(model.to("meta"))
    x = torch.empty(4, 64, device="meta")
    ran, wanted = counts
    with torch.no_grad():
        model(x)
        ran.clear(), wanted.clear()
        model(x)
    assert wanted[torch.ops.tahf4.linear.default] >= 2 * depth
    assert ran == wanted
