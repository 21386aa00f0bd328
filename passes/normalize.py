"""One spelling for each meaning, so that later passes match one pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from ..graph.nodes import LINEAR, node_arg, weight_input
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context
from ..weights.held import adopt

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default)


@dataclass(frozen=True)
class Normalize(Pass):
    """Write products with a transposed parameter as ``aten.linear`` and drop operators that do nothing.

    Before::

        t = aten.t(p_weight)
        y = aten.addmm(p_bias, x, t)
        d = aten.dropout(y, 0.1, False)

    After::

        y = aten.linear(x, p_weight, p_bias)

    What a packed linear (:class:`tahf4_compiler.HiF4Linear`) computes is written in the operators of ``tahf4``, its
    codes and scales as packed inputs.
    """

    exact = True

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        before = context.matches
        for node in adopt(graph):
            context.matched(node)
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
        return node.args[2] is False or node.args[1] in (0, 0.0)
    return node.target in (aten.alias.default, aten.detach.default)


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return (x, weight, bias) if a node is a product with a transposed parameter."""
    bias: fx.Node | None = None
    if node.target in (aten.mm.default, aten.matmul.default):
        x, right = node_arg(node, 0), node_arg(node, 1)
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, right = (node_arg(node, i) for i in range(3))
        if list(bias.meta["val"].shape) != list(node.meta["val"].shape[-1:]):
            return None
    else:
        return None
    if right.target not in _TRANSPOSES:
        return None
    weight = node_arg(right, 0)
    if weight_input(weight) is None or weight.meta["val"].dim() != 2 or not _swaps(right):
        return None
    return x, weight, bias


def _swaps(node: fx.Node) -> bool:
    """Whether a transposition of a matrix exchanges its two axes."""
    if node.target is aten.transpose.int:
        first, second = cast(tuple[int, int], node.args[1:3])
        return first % 2 != second % 2
    if node.target is aten.permute.default:
        return [axis % 2 for axis in cast(list[int], node.args[1])] == [1, 0]
    return True
