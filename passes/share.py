"""Quantize an activation once for all linears that read it, and merge their products."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import INPUT, PackedInput, mutates
from ..pass_base import Context, Pass, PassResult
from .plan import DECISION
from .quantize import call, drop_unused_weights, packed_input

QUANTIZE = torch.ops.tahf4.quantize.default
LINEAR = torch.ops.tahf4.linear.default


@dataclass(frozen=True)
class Share(Pass):
    """Share quantizations of one activation; merge products that read them (q, k and v).

    Before::

        codes_q, scales_q = tahf4.quantize(x)
        q = tahf4.linear(codes_q, scales_q, wq_codes, wq_scales, bq, dtype)
        codes_k, scales_k = tahf4.quantize(x)
        k = tahf4.linear(codes_k, scales_k, wk_codes, wk_scales, bk, dtype)

    After (``wq_codes`` now holds the rows of both weights)::

        codes, scales = tahf4.quantize(x)
        q, k = aten.split_with_sizes(tahf4.linear(codes, scales, w_codes, w_scales, cat(bq, bk), dtype), [nq, nk], -1)

    Attributes:
        merge: merge products as well; False only shares quantizations.
    """

    after = ("quantize",)
    merge: bool = True

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        shared = self._share_quantizations(graph, context)
        merged = self._merge_products(graph, context) if self.merge else 0
        context.note(f"{shared} quantizations saved, {merged} products merged into others")
        return PassResult(graph_module, bool(shared or merged))

    def _share_quantizations(self, graph: fx.Graph, context: Context) -> int:
        seen: dict[Any, fx.Node] = {}
        saved = 0
        for node in list(graph.nodes):
            if mutates(node):
                seen.clear()  # the activation may not be what it was
            if node.target is not QUANTIZE:
                continue
            first = seen.setdefault(node.args, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
                context.matched(first)
                saved += 1
        # Each linear took its own (codes, scales) apart; once is enough.
        for first in seen_quantizations(graph):
            parts: dict[int, fx.Node] = {}
            for user in list(first.users):
                if user.target is operator.getitem:
                    kept = parts.setdefault(user.args[1], user)  # type: ignore[arg-type]
                    if kept is not user:
                        user.replace_all_uses_with(kept)
                        graph.erase_node(user)
        return saved

    def _merge_products(self, graph: fx.Graph, context: Context) -> int:
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=LINEAR):
            codes, scales, *_, bias, dtype = node.args
            groups[(codes, scales, dtype, bias is None)].append(node)
        merged = 0
        for nodes in groups.values():
            biases = [node.args[4] for node in nodes]
            weights = [w for node in nodes for w in node.args[2].meta[INPUT].weights]  # type: ignore[union-attr]
            ready = all(bias is None or bias.op == "placeholder" for bias in biases)  # type: ignore[union-attr]
            if len(nodes) < 2 or not ready or len(set(weights)) != len(weights) or _written(biases):
                continue
            if len({bias.meta["val"].dtype for bias in biases if bias is not None}) > 1:  # type: ignore[union-attr]
                continue
            _merge(graph, nodes, tuple(weights))
            context.matched(nodes[0], len(nodes))
            merged += len(nodes) - 1
        if merged:
            drop_unused_weights(graph)
        return merged


def seen_quantizations(graph: fx.Graph) -> list[fx.Node]:
    """Return the ``tahf4.quantize`` nodes of a graph."""
    return list(graph.find_nodes(op="call_function", target=QUANTIZE))


def _written(biases: list[Any]) -> bool:
    return any(mutates(user) for bias in biases if bias is not None for user in bias.users)


def _merge(graph: fx.Graph, nodes: list[fx.Node], weights: tuple[int, ...]) -> None:
    first = nodes[0]
    codes, scales, weight_codes, _, bias, dtype = first.args
    sizes = [node.meta["val"].shape[-1] if "val" in node.meta else _rows(node) for node in nodes]
    packed = [packed_input(graph, weight_codes, weights, part) for part in ("codes", "scales")]  # type: ignore[arg-type]
    with graph.inserting_before(first):
        if bias is not None:
            bias = call(first, torch.ops.aten.cat.default, ([node.args[4] for node in nodes],))
        product = call(first, LINEAR, (codes, scales, *packed, bias, dtype))
        product.meta[DECISION] = [node.meta[DECISION] for node in nodes]
        split = call(first, torch.ops.aten.split_with_sizes.default, (product, sizes, -1))
        parts = [call(node, operator.getitem, (split, i)) for i, node in enumerate(nodes)]
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _rows(node: fx.Node) -> int:
    source = node.args[2].meta[INPUT]  # type: ignore[union-attr]
    assert isinstance(source, PackedInput)
    return node.args[2].meta["val"].shape[0]  # type: ignore[union-attr]
