"""What a pass did, and the graph after it as text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

__all__ = ["PassRecord"]


@dataclass
class PassRecord:
    """What one pass did.

    Attributes:
        name: of the pass; ``"captured"`` for the graph before the first one.
        matches: how often its pattern matched.
        modified: whether it changed the graph.
        seconds: it took.
        nodes: of the graph after it.
        readable: the graph after it as Python text.
        error: relative error of the outputs that this pass added (``verify=True`` only), 0 is none.
        total_error: the same against the captured graph.
    """

    name: str
    matches: int = 0
    modified: bool = False
    seconds: float = 0.0
    nodes: int = 0
    readable: str = field(default="", repr=False)
    error: float | None = None
    total_error: float | None = None


def shown_nodes(graph_module: fx.GraphModule) -> list[Any]:
    """Return what the readable text of a graph is made from: objects that are replaced when they change."""
    return [
        part
        for n in graph_module.graph.nodes
        for part in (n, n.name, n.target, n.args, n.kwargs, n.type, *map(n.meta.get, _SHOWN))
    ]


_SHOWN = ("val", "tensor_meta", "example_value", "stack_trace", "custom", "recompute", "ac_graph_id")


def same_shown(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(map(operator.is_, old, new))


def readable(graph_module: fx.GraphModule) -> str:
    """Return a graph as Python text with shapes and dtypes."""
    return graph_module.print_readable(print_output=False)
