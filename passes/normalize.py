"""One spelling for each meaning, so that later passes match one pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..graph import LINEAR, weight_input
from ..pass_base import Context, Pass, PassResult

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


@dataclass(frozen=True)
class Normalize(Pass):
    """Write products with a transposed parameter as ``aten.linear`` and drop operators that do nothing.

    Before::

        t = aten.t(p_weight)
        y = aten.addmm(p_bias, x, t)
        d = aten.dropout(y, 0.1, False)

    After::

        y = aten.linear(x, p_weight, p_bias)
    """

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        before = context.matches
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if _is_identity(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                context.matched()
            elif (parts := _product(node)) is not None:
                with graph.inserting_before(node):
                    linear = graph.call_function(LINEAR, parts)
                linear.meta = dict(node.meta)
                node.replace_all_uses_with(linear)
                graph.erase_node(node)
                context.matched(linear)
        modified = context.matches > before
        if modified:
            for node in reversed(list(graph.find_nodes(op="call_function", target=aten.t.default))):
                if not node.users:
                    graph.erase_node(node)
        return PassResult(graph_module, modified)


def _is_identity(node: fx.Node) -> bool:
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return node.args[2] is False or node.args[1] == 0
    return node.target in (aten.alias.default, aten.detach.default)


def _product(node: fx.Node) -> tuple[fx.Node | None, ...] | None:
    """Return (x, weight, bias) if a node is a product with a transposed parameter."""
    if node.target in (aten.mm.default, aten.matmul.default):
        x, right, bias = node.args[0], node.args[1], None
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, right = node.args[:3]
        if not isinstance(bias, fx.Node) or bias.meta["val"].dim() != 1:
            return None
    else:
        return None
    if not isinstance(right, fx.Node) or right.target not in _TRANSPOSES:
        return None
    weight = right.args[0]
    if not isinstance(weight, fx.Node) or weight_input(weight) is None or weight.meta["val"].dim() != 2:
        return None
    if list(right.meta["val"].shape) != list(reversed(weight.meta["val"].shape)):
        return None
    swapped = right.target in (aten.t.default, aten.numpy_T.default) or set(_axes(right)) == {0, 1}
    return (x, weight, bias) if swapped else None  # type: ignore[return-value]


def _axes(node: fx.Node) -> tuple[int, ...]:
    axes = node.args[1] if node.target is aten.permute.default else node.args[1:3]
    reduced = tuple(axis % 2 for axis in axes)  # type: ignore[union-attr]
    return reduced if node.target is not aten.permute.default or reduced == (1, 0) else ()
