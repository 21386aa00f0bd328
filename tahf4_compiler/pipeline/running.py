"""Running graphs on their example inputs, to compare results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..graph.inputs import INPUT, GraphInput
from ..graph.nodes import is_written
from ..torch_private.tensors import real_tensors
from ..weights.binding import Binding
from ..weights.store import store
from .context import Context

__all__ = ["graph_arguments", "run_graph"]


def run_graph(graph_module: fx.GraphModule, context: Context) -> list[torch.Tensor]:
    """Run a graph on the example inputs; parameters are used as they are unless it writes to them.

    Args:
        graph_module: captured, or after some passes.
        context: has the example inputs.

    Returns:
        The output tensors.
    """
    with running():
        flat = fx.Interpreter(graph_module).run(*graph_arguments(graph_module, context))
    return [value for value in torch.utils._pytree.tree_leaves(flat) if isinstance(value, torch.Tensor)]


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run graphs with real tensors inside, also in the middle of a compilation."""
    with real_tensors(), torch.no_grad():
        yield


def graph_arguments(graph_module: fx.GraphModule, context: Context) -> list[Any]:
    """Return what a graph is called with for the example inputs: copies of what is no parameter."""
    kinds = {
        node.meta[INPUT].index: "written" if is_written(node) else node.meta[INPUT].kind
        for node in graph_module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta[INPUT], GraphInput)
    }

    def copied(index: int) -> bool:
        return kinds.get(index, "parameter") != "parameter"

    args = [
        value.clone() if isinstance(value, torch.Tensor) and copied(i) else _concrete(value)
        for i, value in enumerate(context.inputs)
    ]
    with running():
        return Binding(graph_module)(args, store, context.options.weight_check)


def _concrete(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def all_finite(values: Sequence[torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values if value.is_floating_point())


def relative_error(reference: Sequence[torch.Tensor] | None, value: Sequence[torch.Tensor]) -> float:
    """Return ``||value - reference|| / ||reference||`` over all floating-point outputs together."""
    difference = norm = 0.0
    for old, new in zip(reference or (), value, strict=True):
        if old.is_floating_point():
            difference += (new.double() - old.double()).square().sum().item()
            norm += old.double().square().sum().item()
        elif not torch.equal(old, new):
            return float("inf")
    return (difference / norm) ** 0.5 if norm else float(difference > 0)
