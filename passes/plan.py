"""Decide, for every linear, whether it runs in 4 bits, and say why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..errors import PackedError
from ..format import hif4
from ..format.spans import parted, units_of
from ..graph.inputs import DECISION, INPUT, ROLE, GraphInput
from ..graph.nodes import is_written, module_classes, node_arg, size_hint, weight_input
from ..graph_capture.regions import linears_in_regions
from ..model.attachments import Attachment, attached, attached_recipe
from ..model.linears import matching, require_matches
from ..model.reasons import Cause, Reason, cause_of
from ..options import bits_for
from ..packed.linear import HiF4Linear
from ..pipeline.activations import bits_of, form_of, quantization_of
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, Decision, branch_bytes
from ..pipeline.rules import (
    MIN_FEATURES,
    Facts,
    Role,
    adapter_obstacle,
    bias_obstacle,
    decide,
    dtype_obstacle,
    tensor_obstacle,
)
from ..weights.held import packed_products
from .classify import all_linears

__all__ = ["DECISION", "Plan"]


@dataclass(frozen=True)
class Plan(Pass):
    """Give every linear a decision with its reason. The graph stays as it is.

    In order: what cannot be quantized, what the user keeps, what a recipe decided (by measured sensitivity and a
    budget, :meth:`tahf4_compiler.Recipe.plan`), what stands on the boundary; all else runs in HiF4. Linears that the
    model holds in HiF4 already are planned as such; what was left when they were packed is attached to the others. The
    linears in branches and loops (``torch.cond``, ``while_loop``, ``map``) stay as they are. The option
    ``activation_bits`` says how many bits the activations of the linears in HiF4 have; then a recipe does.

    Attributes:
        min_features: linears with fewer input or output features stay in high precision: less than one
            unit of 64 values is mostly padding.
    """

    after = ("classify",)
    min_features: int = field(default=MIN_FEATURES, metadata={"least": 1})

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Write ``context.plan`` and ``node.meta["tahf4_decision"]``."""
        context.plan.clear()
        by_weight: dict[fx.Node, Decision] = {}
        held = set(packed_products(graph_module.graph))
        root = context.surroundings.root
        # What an exported program holds has no attachment that says what was left.
        exported = bool(held) and (root is None or not any(isinstance(m, HiF4Linear) for m in root.modules()))
        has_recipe = any(attached_recipe(value) is not None for value in context.inputs)
        for node in all_linears(graph_module.graph):
            context.matched(node)
            decision = _held(node, context) if node in held else self.decide(node, context, exported, has_recipe)
            weight = node_arg(node, 2) if node in held else weight_input(node_arg(node, 1))
            first = by_weight.get(weight) if weight is not None else None
            if first is not None and first.decision == decision.decision:
                first.flops += decision.flops  # one weight, called again
                decision = first
            else:
                context.plan.append(decision)
                if weight is not None:
                    by_weight[weight] = decision
            node.meta[DECISION] = (decision,)
        inside = {
            weight or linear: self.decide(linear, context, weight=weight, region=node)
            for node, linear, weight in linears_in_regions(graph_module)
        }
        context.plan += inside.values()
        if context.plan:
            known = context.surroundings.linear_paths
            paths, where = known or [d.module for d in context.plan], "the compiled module" if known else "this graph"
            require_matches(context.options.keep, paths, where)
            named = [pattern for pattern, _ in context.options.activation_bits]
            require_matches(named, paths, where, "activation_bits")
        return PassResult(graph_module, modified=False)

    def decide(
        self,
        node: fx.Node,
        context: Context,
        beside_packed: bool = False,
        has_recipe: bool = False,
        weight: fx.Node | None = None,
        region: fx.Node | None = None,
    ) -> Decision:
        """Return the decision for one ``aten.linear`` node.

        Args:
            node: the linear.
            context: shared by the passes.
            beside_packed: whether its model was packed, and nothing tells which linears were left.
            has_recipe: whether its model has a recipe.
            weight: its weight, where that is not what the node reads.
            region: what runs the branch or loop that it stands in.
        """
        value = node_arg(node, 1).meta["val"]
        weight = weight if weight is not None else node_arg(node, 1)
        n, k = (value.shape[0], value.shape[1]) if value.dim() == 2 else (1, value.shape[-1])
        n, k = size_hint(n), size_hint(k)
        source = weight_input(weight)
        module = context.module_of(source) if source is not None else _module_name(node)
        example = _example(source, context) if source is not None else None
        adapted = context.surroundings.adapts(example) if source is not None else _adapted(weight, context)
        obstacle = adapter_obstacle(adapted) or _obstacle(node, source, example)
        if region is not None:
            obstacle = Reason(Cause.REGION, f"region: inside of {region.target}, which stays as it is")
        said = attached(example)
        names = context.surroundings.names(example)
        facts = Facts(module, k, n, obstacle, said, node.meta.get(ROLE), beside_packed, has_recipe, names)
        chosen, reason = decide(facts, context.options.keep, self.min_features)
        if source is not None:
            value = source.meta["val"]
        size = value.element_size()
        before, rank = n * k * size, said.rank if chosen and said is not None else 0
        after = n * hif4.units(k) * hif4.BYTES_PER_UNIT + branch_bytes(n, k, rank, size)
        return Decision(
            module=module,
            k=k,
            n=n,
            decision="hif4" if chosen else "high_precision",
            reason=reason,
            bytes_before=before,
            bytes_after=after if chosen else before,
            flops=2 * _rows(node) * k * n,
            node=(region or node).name,
            weight_index=source.meta[INPUT].index if source is not None else -1,
            activation_bits=_bits((module, *names), context, said, said.activation_bits if said is not None else 4),
            rank=rank,
        )


def _obstacle(node: fx.Node, source: fx.Node | None, example: Any) -> Reason | None:
    """Return why a linear cannot be packed, or None."""
    if source is None:
        weight = node_arg(node, 1)
        if isinstance(origin := weight.meta.get(INPUT), GraphInput):
            text = f"weight: {origin.path} is an argument or buffer of the graph, not a parameter"
            return Reason(Cause.WEIGHT, text)
        return Reason(Cause.WEIGHT, f"weight: computed in the graph ({weight.target}), not a parameter")
    if is_written(source):
        return Reason(Cause.WEIGHT, "weight: the graph writes to it")
    if (reason := tensor_obstacle(example)) is not None:
        return reason
    value = source.meta["val"]
    if value.dim() != 2:
        return Reason(Cause.SHAPE, f"shape: the weight has {value.dim()} axes, not 2")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if isinstance(bias, fx.Node) and (reason := bias_obstacle(bias.meta["val"].shape, value.shape[0])) is not None:
        return reason
    return dtype_obstacle("weight", value.dtype) or dtype_obstacle("activation", node_arg(node, 0).meta["val"].dtype)


def _adapted(weight: fx.Node, context: Context) -> str | None:
    """Return the path of the linear that a weight stands beside which a graph computes of an adapter's matrices."""
    seen: set[fx.Node] = set()
    rest, found = [weight], set()
    while rest:
        node = rest.pop()
        if isinstance(origin := node.meta.get(INPUT), GraphInput) and origin.kind == "parameter":
            found.add(context.surroundings.adapts(context.inputs[origin.index]))
        rest += [other for other in node.all_input_nodes if other not in seen]
        seen.update(rest)
    return found.pop() if len(found) == 1 else None


def _held(node: fx.Node, context: Context) -> Decision:
    """Return the decision for a product whose weight the model holds in HiF4."""
    codes = node_arg(node, 2)
    source = codes.meta[INPUT]
    module, held = context.path_of(source.positions[0]), context.inputs[source.positions[0]]
    names = context.surroundings.names(held)
    if (pattern := matching(context.options.keep, module, *names)) is not None:
        raise PackedError(
            f"keep pattern {pattern!r} matches {module}, which is packed: its original weight is gone. Name it when "
            "the model is packed, tahf4.quantize_(model, keep=[...])."
        )
    n, units = (size_hint(size) for size in node_arg(node, 3).meta["val"].shape)
    k = units * hif4.UNIT
    said = attached(held)
    # The branch of a packed linear is no product of this compiler: its second factor tells how large it is.
    beside = f"{context.paths.get(source.positions[0])}.low_rank_b"
    branches = [context.inputs[index] for index, path in context.paths.items() if path == beside]
    rank, size = (len(branches[0]), branches[0].element_size()) if branches else (0, 0)
    bits, form = 4, 1
    if (quantization := quantization_of(node)) is not None:
        k, bits = size_hint(node_arg(quantization, 0).meta["val"].shape[-1]), bits_of(quantization)
        form = form_of(quantization)
    bits = _bits((module, *names), context, said, bits)
    return Decision(
        module=module,
        k=k,
        n=n,
        decision="hif4",
        reason=said.reason if said is not None else _packed(node.meta.get(ROLE)),
        bytes_before=n * k * node.meta["val"].element_size(),
        bytes_after=n * units * hif4.BYTES_PER_UNIT + branch_bytes(n, k, rank, size),
        flops=2 * _rows(node) * k * n,
        node=node.name,
        weight_index=source.positions[0],
        activation_bits=bits,
        rank=rank,
        span=units_of(form) if bits == 4 else 1,
        rounding=parted(form)[1],
    )


def _packed(role: Role | None) -> Reason:
    """Return the reason of a packed linear; who packs a model without its graph may take an embedder for a block."""
    beyond = role is not None and not role.body
    return Reason(Cause.PACKED, "packed, and the graph shows it outside of the repeated blocks" if beyond else "packed")


def _bits(names: Iterable[str], context: Context, said: Attachment | None, default: int) -> int:
    """Return the bits of a linear's activation: the option's, else the default; at least those of the step at hand."""
    bits = bits_for(names, context.options.activation_bits, default)
    return max(bits, said.activation_bits) if said is not None and cause_of(said.reason) is Cause.STEP else bits


def _rows(node: fx.Node) -> int:
    rows = 1
    for size in node_arg(node, 0).meta["val"].shape[:-1]:
        rows *= size_hint(size)
    return rows


def _example(source: fx.Node, context: Context) -> Any:
    placeholder = source.meta[INPUT]
    return context.inputs[placeholder.index]


def _module_name(node: fx.Node) -> str:
    return next(reversed(module_classes(node)), node.name)
