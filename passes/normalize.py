"""One spelling for each meaning, so that later passes match one pattern."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from ..format.spans import units_of
from ..graph.inputs import INPUT, GraphInput, HeldWeight, PackedInput
from ..graph.nodes import LINEAR, node_arg, weight_input
from ..ops.registry import all_arguments
from ..pipeline.activations import call, spelled
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context

aten, tahf4 = torch.ops.aten, torch.ops.tahf4
_PARTS = (("codes", 2, "weight_codes"), ("scales", 3, "weight_scales"))
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

    What a packed linear (:class:`tahf4_compiler.HiF4Linear`) computes is written in the operators that passes know, its
    codes and scales as packed inputs::

        y = tahf4.packed_linear(x, multiplier, 64, p_weight_codes, p_weight_scales, p_bias, dtype)

        codes, scales = tahf4.quantize(x, multiplier, 64, 4)
        y = tahf4.linear(codes, scales, weight_codes, weight_scales, p_bias, dtype)
    """

    exact = True

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        before = context.matches
        for node in _adopt(graph):
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


def _adopt(graph: fx.Graph) -> list[fx.Node]:
    """Write packed linears as quantizations and products, and mark the codes and scales that the model holds.

    Returns:
        The products that were written or whose weights were marked.
    """
    for node in graph.find_nodes(op="call_function", target=tahf4.quantize.default):
        node.args, node.kwargs = spelled(node), {}
    packed = graph.find_nodes(op="call_function", target=tahf4.packed_linear.default)
    found = dict.fromkeys(_expand(graph, node) for node in packed)
    for node in graph.find_nodes(op="call_function", target=tahf4.linear.default):
        codes, scales = (_parameter(node.args[at], name) for _, at, name in _PARTS)
        if codes is None or scales is None:
            continue
        weight = HeldWeight(codes.index, scales.index)
        for part, at, _ in _PARTS:
            node_arg(node, at).meta[INPUT] = PackedInput(part, weight)
        found[node] = None
    return list(found)


def _expand(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Put ``tahf4.quantize`` and ``tahf4.linear`` in the place of ``tahf4.packed_linear``; return the latter."""
    x, multiplier, block, *operands, dtype, bits, form, _, _ = all_arguments(node)
    forms = ((span,) if span != 1 else () for span in (form, units_of(form)))
    with graph.inserting_before(node):
        quantization = call(node, tahf4.quantize.default, (x, multiplier, block, bits, *next(forms)))
        parts = [call(node, operator.getitem, (quantization, i)) for i in (0, 1)]
        product = call(node, tahf4.linear.default, (*parts, *operands, dtype, *next(forms)))
    product.meta.update(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    return product


def _parameter(node: Any, name: str) -> GraphInput | None:
    """Return what a placeholder stands for if it is a packed linear's parameter of some name."""
    source = node.meta.get(INPUT) if isinstance(node, fx.Node) else None
    if isinstance(source, PackedInput) and isinstance(source.weight, HeldWeight):  # the module is called twice
        kind = "weight_codes" if source.part == "codes" else "weight_scales"
        return GraphInput("parameter", kind, source.positions[0]) if kind == name else None
    if isinstance(source, GraphInput) and source.kind == "parameter" and source.path.rpartition(".")[2] == name:
        return source
    return None


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
