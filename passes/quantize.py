"""Put HiF4 quantization and W4A4 linears in the place of linears."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import ops  # noqa: F401  (defines torch.ops.tahf4)
from ..graph import INPUT, PackedInput, linears, node_arg, weight_input
from ..pass_base import Context, Pass, PassResult
from .plan import DECISION


@dataclass(frozen=True)
class Quantize(Pass):
    """Rewrite every linear that the plan put in HiF4.

    Before::

        y = aten.linear(x, weight, bias)

    After (``weight_codes`` and ``weight_scales`` are new inputs, in the place of ``weight``)::

        codes, scales = tahf4.quantize(x)
        y = tahf4.linear(codes, scales, weight_codes, weight_scales, bias, dtype)
    """

    after = ("plan",)

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        chosen = [n for n in linears(graph) if DECISION in n.meta and n.meta[DECISION].decision == "hif4"]
        for node in chosen:
            x, *rest = node.args[0], *node.args[2:]
            bias = rest[0] if rest else node.kwargs.get("bias")
            source = weight_input(node_arg(node, 1))
            assert source is not None, "the plan chooses parameters only"
            codes = packed_input(graph, source, (source.meta[INPUT].index,), "codes")
            scales = packed_input(graph, source, (source.meta[INPUT].index,), "scales")
            with graph.inserting_before(node):
                activation = call(node, torch.ops.tahf4.quantize.default, (x, None, 0))
                parts = [call(node, operator.getitem, (activation, i)) for i in (0, 1)]
                dtype = node.meta["val"].dtype
                product = call(node, torch.ops.tahf4.linear.default, (*parts, codes, scales, bias, dtype))
            product.meta[DECISION] = node.meta[DECISION]
            node.replace_all_uses_with(product)
            graph.erase_node(node)
            context.matched(product)
        if chosen:
            drop_unused_weights(graph)
        return PassResult(graph_module, modified=bool(chosen))


def packed_input(graph: fx.Graph, beside: fx.Node, weights: tuple[int, ...], part: Any) -> fx.Node:
    """Return the placeholder of a packed weight's codes or scales, added next to ``beside`` if it is new."""
    wanted = PackedInput(part, weights)
    for node in graph.nodes:
        if node.op == "placeholder" and node.meta.get(INPUT) == wanted:
            return node
    with graph.inserting_before(beside):
        merged = "_merged" if len(weights) > 1 else ""
        node = graph.placeholder(f"{beside.name.removesuffix('_codes')}{merged}_{part}")
    node.target = node.name  # the graph has made the name unique, but not the target
    node.meta[INPUT] = wanted
    return node


def call(like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Add a call where the graph inserts, with the module path and stack trace of ``like``."""
    node = like.graph.call_function(target, args)
    keep = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")
    node.meta = {key: like.meta[key] for key in keep if key in like.meta}
    return node


def drop_unused_weights(graph: fx.Graph) -> None:
    """Remove casts of parameters, parameters and packed weights that nothing reads any more."""
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        source = node.meta.get(INPUT)
        is_weight = isinstance(source, PackedInput) or (source is not None and source.kind == "parameter")
        if (node.op == "placeholder" and is_weight) or (node.op == "call_function" and weight_input(node) is not None):
            graph.erase_node(node)

