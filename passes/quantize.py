"""Put HiF4 quantization and W4A4 linears in the place of linears."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from .. import ops  # noqa: F401  (defines torch.ops.tahf4)
from ..graph.inputs import DECISION, INPUT, PackedWeight
from ..graph.nodes import linears, node_arg, weight_input
from ..pipeline.activations import bits_of, call, drop_unused_weights, packed_input, quantization_of
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, decisions_of
from ..weights.held import packed_products


@dataclass(frozen=True)
class Quantize(Pass):
    """Rewrite every linear that the plan put in HiF4.

    Before::

        y = aten.linear(x, weight, bias)

    After (``weight_codes`` and ``weight_scales`` are new inputs, in the place of ``weight``)::

        codes, scales = tahf4.quantize(x)
        y = tahf4.linear(codes, scales, weight_codes, weight_scales, bias, dtype)

    The plan also says how many bits the activation has, of linears that the model holds in HiF4, too::

        codes, scales = tahf4.quantize(x, None, 0, 8)

    Where a recipe gives a linear a low-rank branch, the weight is what the branch leaves of it, and the branch stands
    beside the product (``low_rank_a`` and ``low_rank_b`` are new inputs, too)::

        y = aten.add(product, aten.matmul(aten.matmul(x, low_rank_a), low_rank_b))
    """

    after = ("plan",)

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        chosen = [n for n in linears(graph) if any(d.decision == "hif4" for d in decisions_of(n))]
        for node in chosen:
            bits = min(d.activation_bits for d in decisions_of(node))
            x, *rest = node.args[0], *node.args[2:]
            bias = rest[0] if rest else node.kwargs.get("bias")
            source = weight_input(node_arg(node, 1))
            assert source is not None, "the plan chooses parameters only"
            rank = max(d.rank for d in decisions_of(node))
            weight = PackedWeight((source.meta[INPUT].index,), rank=rank)
            codes, scales = (packed_input(graph, source, weight, part) for part in ("codes", "scales"))
            with graph.inserting_before(node):
                activation = call(node, torch.ops.tahf4.quantize.default, (x, None, 0, *([bits] if bits != 4 else [])))
                parts = [call(node, operator.getitem, (activation, i)) for i in (0, 1)]
                dtype = node.meta["val"].dtype
                product = call(node, torch.ops.tahf4.linear.default, (*parts, codes, scales, bias, dtype))
                result = _with_branch(node, product, source, weight) if rank else product
            product.meta[DECISION] = node.meta[DECISION]
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            context.matched(product)
        if chosen:
            drop_unused_weights(graph)
        changed = [node for node in packed_products(graph) if _set_bits(node)]
        context.matched(count=len(changed))
        return PassResult(graph_module, modified=bool(chosen or changed))


def _with_branch(linear: fx.Node, product: fx.Node, source: fx.Node, weight: PackedWeight) -> fx.Node:
    """Return the sum of a product and of the branch of its weight, added where the graph inserts."""
    x = node_arg(linear, 0)
    for part in ("low_rank_a", "low_rank_b"):
        factor = packed_input(linear.graph, source, weight, part)
        if source.meta["val"].dtype != linear.meta["val"].dtype:
            factor = call(linear, torch.ops.aten.to.dtype, (factor, linear.meta["val"].dtype))
        x = call(linear, torch.ops.aten.matmul.default, (x, factor))
    return call(linear, torch.ops.aten.add.Tensor, (product, x))


def _set_bits(product: fx.Node) -> bool:
    """Give the activation of a product that the model holds in HiF4 the bits of the plan; say whether it had others."""
    quantization = quantization_of(product)
    wanted = {d.activation_bits for d in decisions_of(product)}
    if quantization is None or not wanted or bits_of(quantization) in wanted:
        return False
    quantization.args = (*quantization.args[:3], wanted.pop(), *quantization.args[4:])
    return True
