"""Regions: parts of a graph that are graphs of their own, run by a higher-order operator.

Regions that only run are written into the graph around them. Branches and loops stay; their linears can be listed.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..graph.nodes import linears, node_arg
from ..torch_private.graphs import AUTOCAST

__all__ = ["inline_regions", "linears_in_regions"]

_hop = torch.ops.higher_order
_INLINED: dict[Any, int] = {
    _hop.invoke_subgraph: 2,  # the region's name stands before its arguments
    _hop.tag_activation_checkpoint: 1,
    _hop.wrap: 1,
    _hop.wrap_activation_checkpoint: 1,
    _hop.wrap_with_autocast: 1,
    _hop.wrap_with_set_grad_enabled: 1,
}
"""Operators that run one region once -> where its arguments begin, counted from the region itself."""


def inline_regions(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Write the regions that run once, and without gradients mean what they hold, into the graph that calls them.

    These are regions of autocast and of gradient modes, compiled regions (``nested_compile_region``) and checkpoints
    (``torch.utils.checkpoint``). Autocast is switched on before and off behind its nodes. Gradient modes go: nothing
    that tahf4 runs records gradients.

    Args:
        graph_module: stays as it is.

    Returns:
        A copy without such regions, or the graph module itself if it has none.
    """
    if not any(node.op == "call_function" and node.target in _INLINED for node in graph_module.graph.nodes):
        return graph_module
    inlined = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for node in list(inlined.graph.nodes):
        if node.op == "call_function" and node.target in _INLINED:
            _inline(node, inlined)
    inlined.recompile()
    return inlined


def _inline(node: fx.Node, graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    at = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    region = node_arg(node, at)
    body = inline_regions(_attribute(graph_module, str(region.target)))
    values: dict[fx.Node, Any] = {}
    given = node.args[at + _INLINED[node.target] :]
    with graph.inserting_before(node):
        if node.target is _hop.wrap_with_autocast:
            mode = graph.call_function(AUTOCAST[0], node.args[:at])
        for inner, value in zip(body.graph.find_nodes(op="placeholder"), given, strict=True):
            values[inner] = value
        for inner in body.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                values[inner] = graph.node_copy(inner, values.__getitem__)
                if inner.op == "get_attr":
                    values[inner].target = _adopt(graph_module, body, inner.target)
        if node.target is _hop.wrap_with_autocast:
            graph.call_function(AUTOCAST[1], (mode,))
    result = pytree.tree_map_only(fx.Node, values.__getitem__, body.graph.output_node().args[0])
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(result, list | tuple):
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(result)
    graph.erase_node(node)
    if not region.users:
        graph.erase_node(region)


def _region(node: fx.Node, graph_module: fx.GraphModule) -> fx.GraphModule | None:
    found = _attribute(graph_module, str(node.target)) if node.op == "get_attr" else None
    return found if isinstance(found, fx.GraphModule) else None


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _adopt(graph_module: fx.GraphModule, body: fx.GraphModule, target: Any) -> str:
    """Let a graph hold what a region held, under a name of its own."""
    value, name, count = _attribute(body, target), str(target).replace(".", "_"), 0
    while getattr(graph_module, free := f"{name}_{count}" if count else name, value) is not value:
        count += 1
    setattr(graph_module, free, value)
    return free


def linears_in_regions(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, fx.Node | None]]:
    """Yield the linears of branches and loops, at any depth.

    Yields:
        The node of the graph that runs the region, the ``aten.linear`` inside, and the graph's node that its weight is
        (None if the region computes it).
    """
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            for linear, weight in _inner_linears(node, graph_module):
                yield node, linear, weight


def _inner_linears(node: fx.Node, graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """Yield the linears in a node's regions, each with the node outside of them that its weight is."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    regions = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and _region(leaf, graph_module) is not None]
    given = [leaf for leaf in leaves if leaf not in regions]
    for body in [_attribute(graph_module, str(region.target)) for region in regions]:
        inputs = body.graph.find_nodes(op="placeholder")
        outside = dict(zip(reversed(inputs), reversed(given), strict=False))  # what else is given stands before
        found: list[tuple[fx.Node, fx.Node | None]] = [(n, node_arg(n, 1)) for n in linears(body.graph)]
        for inner in body.graph.nodes:
            if isinstance(inner.target, torch._ops.HigherOrderOperator):
                found += _inner_linears(inner, body)
        for linear, weight in found:
            source = outside.get(weight) if weight is not None else None
            yield linear, source if isinstance(source, fx.Node) else None
