"""Quantize an activation once for all linears that read it, and merge their products."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from ..graph.inputs import DECISION, INPUT, GraphInput
from ..graph.nodes import is_written, may_share, mutates, node_arg, size_hint
from ..pipeline.activations import activation_of, call, drop_unused_weights, packed_input, packed_weight
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, decisions_of

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

    Products whose weights the model holds in HiF4 (packed models) are not merged: their rows would have to lie one
    after the other in memory, and the parameters are the model's. Products with branches of low rank are not merged
    either: each branch is computed behind the product that it is added to.

    Attributes:
        merge: merge products as well; False only shares quantizations.
    """

    exact = True
    after = ("quantize",)
    merge: bool = True

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        shared = self._share_quantizations(graph, context)
        merged = self._merge_products(graph, context) if self.merge else 0
        if shared or merged:
            drop_unused_weights(graph)
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
            # What a recipe transforms in another way stays apart.
            first = seen.setdefault((_arguments(node, context), activation_name(node, context)), node)
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
                    kept = parts.setdefault(cast(int, user.args[1]), user)
                    if kept is not user:
                        user.replace_all_uses_with(kept)
                        graph.erase_node(user)
        return saved

    def _merge_products(self, graph: fx.Graph, context: Context) -> int:
        groups: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=LINEAR):
            codes, scales, _, _, bias, *rest = node.args
            weight = packed_weight(node)
            if weight is not None and not weight.rank:
                alike = replace(weight, weights=())  # one packing of all rows
                groups[(codes, scales, bias is None, *rest, alike)].append(node)
        merged = 0
        for nodes in groups.values():
            biases = [node_arg(node, 4) for node in nodes if node.args[4] is not None]
            weights = [w for node in nodes for w in node_arg(node, 2).meta[INPUT].weights]
            ready = all(bias.op == "placeholder" for bias in biases)
            if len(nodes) < 2 or not ready or len(set(weights)) != len(weights) or any(map(is_written, biases)):
                continue
            if len({bias.meta["val"].dtype for bias in biases}) > 1:
                continue
            _merge(graph, nodes, tuple(weights))
            context.matched(nodes[0], len(nodes))
            merged += len(nodes) - 1
        return merged


def _arguments(node: fx.Node, context: Context) -> tuple[Any, ...]:
    """Return what a quantization reads, with one name for the multipliers of packed linears that are equal."""
    x, factor, *rest = node.args
    source = factor.meta.get(INPUT) if isinstance(factor, fx.Node) else None
    if isinstance(source, GraphInput) and source.index in context.tied:
        factor = context.tied[source.index]
    return (x, factor, *rest)


def activation_name(node: fx.Node, context: Context) -> str | None:
    """Return the name that a recipe gives the activation of a quantization with one product."""
    found = activation_of(node)
    recipe = found.attached(context) if found is not None else None
    return recipe.activation if recipe is not None else None


def seen_quantizations(graph: fx.Graph) -> list[fx.Node]:
    """Return the ``tahf4.quantize`` nodes of a graph."""
    return list(graph.find_nodes(op="call_function", target=QUANTIZE))


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.view_as.default)


def _needs_contiguous(node: fx.Node) -> bool:
    """Whether somebody may notice that a tensor is a strided part of a wider one."""
    for user in node.users:
        if user.op == "output" or mutates(user) or user.target is torch.ops.aten.as_strided.default:
            return True
        if not isinstance(user.target, torch._ops.OpOverload) or user.target.namespace not in ("aten", "tahf4"):
            return True
        if user.target is torch.ops.aten.view_as_complex.default:
            return True
        if user.target in _VIEWS and not _splits_last_axis(user):
            return True
        if may_share(user, node) and _needs_contiguous(user):
            return True
    return False


def _splits_last_axis(view: fx.Node) -> bool:
    shape, wanted = node_arg(view, 0).meta["val"].shape, view.meta["val"].shape
    leading = len(shape) - 1
    return len(wanted) > leading and all(str(a) == str(b) for a, b in zip(shape[:leading], wanted))


def _merge(graph: fx.Graph, nodes: list[fx.Node], weights: tuple[int, ...]) -> None:
    first = nodes[0]
    codes, scales, _, _, bias, dtype, *span = first.args
    sizes = [size_hint(node_arg(node, 2).meta["val"].shape[0]) for node in nodes]
    every = [node_arg(node, 2).meta[INPUT].weight for node in nodes]
    how = replace(every[0], weights=weights)
    packed = [packed_input(graph, node_arg(first, 2), how, part) for part in ("codes", "scales")]
    with graph.inserting_before(first):
        if bias is not None:
            bias = call(first, torch.ops.aten.cat.default, ([node.args[4] for node in nodes],))
        product = call(first, LINEAR, (codes, scales, *packed, bias, dtype, *span))
        product.meta[DECISION] = tuple(decision for node in nodes for decision in decisions_of(node))
        split = call(first, torch.ops.aten.split_with_sizes.default, (product, sizes, -1))
        parts = [call(node, operator.getitem, (split, i)) for i, node in enumerate(nodes)]
        for i, node in enumerate(nodes):
            if _needs_contiguous(node):
                parts[i] = call(node, torch.ops.aten.clone.default, (parts[i],))
                parts[i].kwargs = {"memory_format": torch.contiguous_format}
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)

