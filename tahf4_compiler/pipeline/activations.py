"""What a pass needs to rewrite quantized activations and packed weights."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .. import ops  # noqa: F401  (defines torch.ops.tahf4)
from ..graph.inputs import INPUT, NUMBERS, HeldWeight, PackedInput, PackedWeight
from ..graph.nodes import node_arg, weight_input
from ..model.attachments import Attachment, attached_recipe
from ..ops.registry import all_arguments, arguments
from .context import Context


def packed_input(graph: fx.Graph, beside: fx.Node, weight: PackedWeight | HeldWeight, part: Any) -> fx.Node:
    """Return the placeholder of a part of a packed weight, added next to ``beside`` if it is new."""
    wanted = PackedInput(part, weight)
    if (known := _placeholder(graph, wanted)) is not None:
        return known
    base = beside.name.removesuffix("_codes")
    merged = "_merged" if len(weight.weights) > 1 and not base.endswith("_merged") else ""
    with graph.inserting_before(beside):
        node = graph.placeholder(f"{base}{merged}_{part}")
    node.target = node.name  # the graph has made the name unique, but not the target
    node.meta[INPUT] = wanted
    return node


def _placeholder(graph: fx.Graph, wanted: PackedInput) -> fx.Node | None:
    """Return the input that stands for a part of a packed weight, if the graph has it."""
    part, weight = wanted.part, wanted.weight
    for node in graph.find_nodes(op="placeholder", sort=False):
        source = node.meta.get(INPUT)
        if isinstance(source, PackedInput) and source.part == part and source.weight == weight:
            return node
    return None


@dataclass(frozen=True)
class Activation:
    """A quantized activation in a graph: the one place where its transform is decided.

    Attributes:
        node: the ``tahf4.quantize`` node.
        products: the ``tahf4.linear`` nodes that read it.
        weights: positions of all the weights that read it.
    """

    node: fx.Node
    products: list[fx.Node]
    weights: tuple[int, ...]

    def attached(self, context: Context) -> Attachment | None:
        """Return what a recipe says about the activation's weights, if it says one thing about all of them."""
        found = [attached_recipe(context.inputs[index]) for index in self.weights]
        first = found[0]
        if first is None or any(other is None or other.activation != first.activation for other in found):
            return None
        return first

    def change(self, **values: Any) -> None:
        """Change how the weights are transformed: fields of :class:`~tahf4_compiler.graph.inputs.PackedWeight`."""
        graph = self.node.graph
        for product in self.products:
            for position, part in ((2, "codes"), (3, "scales")):
                old = node_arg(product, position)
                wanted = PackedInput(part, replace(old.meta[INPUT].weight, **values))
                same = _placeholder(graph, wanted)
                if same is not None:
                    product.update_arg(position, same)
                elif len(old.users) == 1:
                    old.meta[INPUT] = wanted  # keeps its name
                else:
                    product.update_arg(position, packed_input(graph, old, wanted.weight, part))
                if not old.users:
                    graph.erase_node(old)

    def weight(self) -> PackedWeight:
        """Return how the weights are transformed, as positions of all of them."""
        how: PackedWeight = node_arg(self.products[0], 2).meta[INPUT].weight
        return replace(how, weights=self.weights)

    def multiply(self) -> None:
        """Give the quantization the multiplier that belongs to the weights' transform."""
        graph, how = self.node.graph, replace(self.weight(), hadamard_block=0, search="")
        beside, old = node_arg(self.products[0], 2), self.node.args[1]
        self.node.update_arg(1, packed_input(graph, beside, how, "multiplier"))
        if isinstance(old, fx.Node) and not old.users:
            graph.erase_node(old)


def activations(graph: fx.Graph) -> list[Activation]:
    """Return the quantized activations of a graph that products in 4 bits read."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.tahf4.quantize.default)
    return [found for node in nodes if (found := activation_of(node)) is not None]


def activation_of(node: fx.Node) -> Activation | None:
    """Return the activation that a ``tahf4.quantize`` node quantizes, if products in 4 bits read it."""
    products = [
        user
        for part in node.users
        if part.target is operator.getitem and part.args[1] == 0
        for user in part.users
        if user.target is torch.ops.tahf4.linear.default and user.args[0] is part
        and packed_weight(user) is not None
    ]
    if not products:
        return None
    weights = dict.fromkeys(i for product in products for i in node_arg(product, 2).meta[INPUT].weights)
    return Activation(node, products, tuple(weights))


def packed_weight(product: fx.Node) -> PackedWeight | None:
    """Return the weight that the graph packs for a ``tahf4.linear`` node.

    None for codes that the model holds, which were transformed when they were packed, and for those that a graph
    computes.
    """
    source = node_arg(product, 2).meta.get(INPUT)
    return source.weight if isinstance(source, PackedInput) and isinstance(source.weight, PackedWeight) else None


def quantization_of(product: fx.Node) -> fx.Node | None:
    """Return the ``tahf4.quantize`` node whose result a ``tahf4.linear`` node multiplies, or None."""
    sources = node_arg(product, 0).all_input_nodes
    return sources[0] if sources and sources[0].target is torch.ops.tahf4.quantize.default else None


def bits_of(quantization: fx.Node) -> int:
    """Return how many bits a ``tahf4.quantize`` node gives its activation."""
    bits = quantization.args[3] if len(quantization.args) > 3 else quantization.kwargs.get("bits", 4)
    assert isinstance(bits, int)
    return bits


def form_of(quantization: fx.Node) -> int:
    """Return span and rounding of a ``tahf4.quantize`` node's activation, as a form: see ``format.spans``."""
    span = quantization.args[4] if len(quantization.args) > 4 else quantization.kwargs.get("span", 1)
    assert isinstance(span, int)
    return span


def span_of(product: fx.Node) -> int:
    """Return how many units of a ``tahf4.linear`` node's operands share a level-1 scale; 0 for a row."""
    span = product.args[6] if len(product.args) > 6 else product.kwargs.get("span", 1)
    assert isinstance(span, int)
    return span


def spell_out(graph: fx.Graph) -> None:
    """Write quantizations and products with the arguments that passes read by position."""
    for target, least in ((torch.ops.tahf4.quantize.default, 3), (torch.ops.tahf4.linear.default, 6)):
        for node in graph.find_nodes(op="call_function", target=target):
            if not node.kwargs and len(node.args) >= least:
                continue
            given, known = arguments(node), {a.name: a for a in target._schema.arguments}
            lacking = {name for name, a in known.items() if not a.has_default_value()} - {*given, *node.kwargs}
            if lacking or given.keys() & node.kwargs.keys() or node.kwargs.keys() - known.keys():
                continue  # the operator itself says what is wrong
            node.args, node.kwargs = spelled(node), {}


def spelled(node: fx.Node) -> tuple[Any, ...]:
    """Return all arguments of a quantization or product by position, but for a span of 1."""
    *values, span = all_arguments(node)
    return (*values, span) if span != 1 else tuple(values)


def call(like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Add a call where the graph inserts, with the module path and stack trace of ``like``."""
    node = like.graph.call_function(target, args)
    keep = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node", NUMBERS)
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
