"""A pass that stands in for ``quantize``: the planned linears run in NVFP4."""

import operator
from dataclasses import dataclass

import torch

import tahf4_compiler as tahf4
from tahf4_compiler.rewriting import (
    DECISION,
    INPUT,
    PackedWeight,
    call,
    decisions_of,
    drop_unused_weights,
    linears,
    mutates,
    node_arg,
    packed_input,
    weight_input,
)

from . import operators

PARTS = ("codes", "block_scales", "row_scales")


@dataclass(frozen=True)
class Nvfp4Quantize(tahf4.Pass):
    """Rewrite every linear that the plan put in 4 bits to NVFP4.

    Before::

        y = aten.linear(x, weight, bias)

    After::

        codes, scales, row = nvfp4.quantize(x)
        y = nvfp4.linear(codes, scales, row, w_codes, w_scales, w_row, bias, dtype)
    """

    replaces = "quantize"

    def __call__(self, graph_module, context):
        """Rewrite in place; linears that read one activation share its quantization."""
        graph, seen = graph_module.graph, {}
        for node in list(graph.nodes):
            if mutates(node):
                seen.clear()
            decision = next(iter(decisions_of(node)), None)
            if node not in set(linears(graph)) or decision is None or decision.decision != "hif4":
                continue
            x, source = node.args[0], weight_input(node_arg(node, 1))
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            weight = PackedWeight((source.meta[INPUT].index,), format="nvfp4")
            packed = [packed_input(graph, source, weight, part) for part in PARTS]
            with graph.inserting_before(node):
                if x not in seen:
                    quantized = call(node, torch.ops.nvfp4.quantize.default, (x,))
                    seen[x] = [call(node, operator.getitem, (quantized, i)) for i in range(3)]
                dtype = node.meta["val"].dtype
                product = call(node, torch.ops.nvfp4.linear.default, (*seen[x], *packed, bias, dtype))
            decision.decision = "nvfp4"
            blocks = -(-decision.k // operators.BLOCK)
            decision.bytes_after = decision.n * (blocks * (operators.BLOCK // 2 + 1) + 4)
            product.meta[DECISION] = (decision,)
            context.attach(product, bits_a_value=round(8 * decision.bytes_after / (decision.n * decision.k), 3))
            node.replace_all_uses_with(product)
            graph.erase_node(node)
            context.matched(product)
        drop_unused_weights(graph)
        return tahf4.PassResult(graph_module, modified=context.matches > 0)
