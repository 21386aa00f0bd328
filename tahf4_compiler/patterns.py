"""Find subgraphs by an example of them, and replace them: ``torch.fx``'s matcher, with what this compiler needs around.

The matcher compares operators and arguments; the functions here trace patterns with fake tensors (so that a pattern is
written in ordinary PyTorch and ends in the same ATen operators as a graph), refuse matches across writes to memory,
keep module paths and stack traces on the new nodes, and count matches for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from .errors import PassError
from .graph import DECISION, NUMBERS, mutates
from .pass_base import Context

__all__ = ["Match", "find_pattern", "replace_pattern"]

_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node", DECISION, NUMBERS)


@dataclass(frozen=True)
class Match:
    """A subgraph that a pattern matched.

    Attributes:
        inputs: nodes (or constants) in the place of the pattern's arguments.
        nodes: the matched nodes, in execution order.
        outputs: those of them that the pattern returns.
    """

    inputs: tuple[Any, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def find_pattern(
    graph_module: fx.GraphModule,
    pattern: Callable[..., Any],
    example: Sequence[Any],
    *,
    where: Callable[[Match], bool] | None = None,
    any_constants: bool = False,
) -> list[Match]:
    """Return the places where a graph computes what a function computes, in its way of writing it.

    Args:
        graph_module: as a pass gets it.
        pattern: a function of PyTorch operators; its arguments stand for any node.
        example: one value for each argument: tensors whose number of axes and dtypes lead to the operators that the
            graph has. They are never computed with.
        where: further condition.
        any_constants: take numbers and other constants of the pattern for any.

    Returns:
        Matches that do not overlap. A node inside a match has no reader outside of it, unless the pattern returns it.

    Raises:
        PassError: the function cannot be traced, or ignores an argument.
    """
    graph = graph_module.graph
    matcher = SubgraphMatcher(_trace(pattern, example), ignore_literals=any_constants)
    found = (_match(m, graph) for m in matcher.match(graph))
    return [m for m in found if _one_moment(m, graph) and (where is None or where(m))]


def replace_pattern(
    graph_module: fx.GraphModule,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    example: Sequence[Any],
    context: Context | None = None,
    *,
    where: Callable[[Match], bool] | None = None,
    any_constants: bool = False,
) -> int:
    """Replace each match of a pattern.

    Args:
        graph_module: changed in place.
        pattern: see :func:`find_pattern`.
        replacement: takes the same arguments and returns as many results.
        example: see :func:`find_pattern`.
        context: its matches are counted, if given.
        where: further condition.
        any_constants: take numbers of the pattern for any.

    Returns:
        How many were replaced. New nodes carry the module path, stack trace, decision and numbers of the first result
        that they stand for; shapes are filled in by the pass manager.

    Raises:
        PassError: a function cannot be traced, or ignores an argument.
    """
    graph = graph_module.graph

    def accept(found: InternalMatch, *graphs: fx.Graph) -> bool:
        match = _match(found, graph)
        return _one_moment(match, graph) and (where is None or where(match))

    old, new = _trace(pattern, example), _trace(replacement, example, all_used=False)
    metas: dict[fx.Node, dict[str, Any]] = {node: dict(node.meta) for node in graph.nodes}
    replaced = replace_pattern_with_filters(graph_module, old, new, [accept], ignore_literals=any_constants)
    for match in replaced:
        inputs = {n for p, n in match.nodes_map.items() if p.op == "placeholder"}
        meta = metas.get(match.nodes_map[match.anchor], {})
        for node in match.replacements:
            if isinstance(node, fx.Node) and node not in inputs:
                node.meta = {key: meta[key] for key in _KEPT if key in meta}
        if context is not None:
            last = match.replacements[-1] if match.replacements else None
            context.matched(last if isinstance(last, fx.Node) else None)
    return len(replaced)


def _trace(function: Callable[..., Any], example: Sequence[Any], *, all_used: bool = True) -> fx.Graph:
    """Return the ATen graph of a function, without values."""
    name = getattr(function, "__name__", repr(function))
    try:
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.no_grad():
            # Under a fake mode of its own; the mode of a compilation around it plays no part.
            graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*example).graph
    except Exception as error:
        raise PassError(f"the pattern {name!r} cannot be traced: {type(error).__name__}: {error}") from error
    unused = [node.name for node in graph.nodes if node.op == "placeholder" and not node.users]
    if unused and all_used:
        raise PassError(f"the pattern {name!r} does not use its arguments {', '.join(unused)}; leave them out")
    for node in graph.nodes:
        node.meta.clear()
    return graph


def _match(found: InternalMatch, graph: fx.Graph) -> Match:
    inside = {node for p, node in found.nodes_map.items() if p.op not in ("placeholder", "output")}
    return Match(
        tuple(found.placeholder_nodes), tuple(n for n in graph.nodes if n in inside), tuple(found.returning_nodes)
    )


def _one_moment(match: Match, graph: fx.Graph) -> bool:
    """Whether nothing writes to memory between the first and the last node of a match."""
    if not match.nodes:
        return False
    node, last = match.nodes[0], match.nodes[-1]
    while True:
        if mutates(node):
            return False
        if node is last:
            return True
        node = node.next
