"""Compute attention with operands of 8 bits, or with queries and keys in HiF4."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from ..errors import FormatError
from ..graph.nodes import module_classes, size_hint
from ..model.attachments import Attachment, attached_attention
from ..model.linears import module_around
from ..model.reasons import Cause, Reason
from ..ops import activation_bits, check_attention
from ..ops.attention_codes import ATTENTIONS
from ..ops.registry import dispatch
from ..pipeline.activations import call
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, Decision, decisions_of

SDPA = torch.ops.aten.scaled_dot_product_attention.default
EIGHT_BITS = torch.ops.tahf4.attention.default
SOFTMAX = torch.ops.aten.softmax.int
_PRODUCTS = (
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.einsum.default,
)
# Pointwise like those that PyTorch marks so.
_POINTWISE = (torch.ops.aten.dropout, torch.ops.aten.where, torch.ops.aten.type_as, torch.ops.aten._to_copy)
BITS = {"int8": 8, "hif4": 4}
"""Of queries and keys, by the value of the option ``attention``."""
VALUES_IN_16_BITS = ", values in 16 bits"


@dataclass(frozen=True)
class Attention(Pass):
    """Rewrite every ``aten.scaled_dot_product_attention`` that can run in 8 bits, with ``{"attention": "int8"}``.

    With ``{"attention": "hif4"}`` its queries and keys are in HiF4. With ``{"attention.value_bits": 16}`` its values
    and probabilities have 16 bits.

    Before::

        y = aten.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=scale)

    After::

        y = tahf4.attention(q, k, v, mask, False, scale, False, 8)

    and with values of 16 bits ``tahf4.attention(..., 8, 16)``.

    An attention goes with the linears of its module: where none of them runs in 4 bits, because the user keeps them, a
    recipe protects them or the denoising step at hand runs in high precision, it stays, for their reason. So it does
    where they are in another graph, as behind hooks, since nothing tells what was decided about them, and where a
    recipe measured its error and found it too large. Where only that with HiF4 is too large, it runs in int8.
    The report has a line for each attention, also for those that the model calls in 8 bits or HiF4 by itself, as with
    ``set_attention_backend("tahf4")`` of diffusers, and for those of products and a softmax, which stay.

    Attributes:
        min_tokens: with fewer queries, or fewer keys, it stays: rounding costs more time there than 8 bits gain.
        value_bits: of values and probabilities, 8 or 16.
    """

    after: ClassVar[tuple[str, ...]] = ("plan", "quantize", "share", "scale_search")
    before: ClassVar[tuple[str, ...]] = ("upcast",)
    min_tokens: int = field(default=128, metadata={"least": 1})
    value_bits: int = field(default=8, metadata={"choices": (8, 16)})

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph, modified = graph_module.graph, False
        root = context.surroundings.root
        modules = dict(root.named_modules(remove_duplicate=False)) if root is not None else {}
        for node in graph.nodes:
            if node.target in ATTENTIONS:
                given, chosen = _arguments(node), _chosen_by_diffusers(node, modules)
                why = chosen or "kept: the model calls it"
                context.note(f"{_words(node, given)}: {_kind_of_operator(given)}, {why}")
        found = list(graph.find_nodes(op="call_function", target=SDPA))
        if found and context.options.attention not in BITS:
            context.note(f"{len(found)} in high precision: not asked for, options={{'attention': 'int8'}}")
            return PassResult(graph_module, False)
        for node in found:
            given = _arguments(node)
            reason = _chosen_by_diffusers(node, modules)
            reason = self._said(node, context) if reason is None else reason
            reason = self._obstacle(node, given) if reason is None else reason
            kind, why = _kind(node, context)
            if reason is None:
                with graph.inserting_before(node):
                    operands = (value for name, value in given.items() if name != "dropout_p")
                    wide = (self.value_bits,) if self.value_bits != 8 else ()
                    new = call(node, EIGHT_BITS, (*operands, BITS[kind], *wide))
                if context.options.kernels != "reference" and self._without_kernel(new):
                    graph.erase_node(new)
                    device = given["query"].meta["val"].device
                    values = " with values in 16 bits" if self.value_bits == 16 else ""
                    reason = Reason(Cause.OTHER, f"kernel: there is none for {device} here{values}")
                else:
                    self._put(node, new, context)
                    modified = True
            kind += VALUES_IN_16_BITS if self.value_bits == 16 else ""
            what = f"{kind}{why}" if reason is None else f"high precision, {reason or 'as its recipe says'}"
            context.note(f"{_words(node, given)}: {what}")
        for node in _by_hand(graph) if context.options.attention in BITS else ():
            why = "written by hand: products and a softmax, no scaled_dot_product_attention"
            context.note(f"{_path(node)}: high precision, {why}")
        return PassResult(graph_module, modified)

    def _without_kernel(self, new: fx.Node) -> bool:
        """Return whether an attention in 8 bits would run as the reference, which is slow."""
        return dispatch(EIGHT_BITS, new).name == "reference"

    def _put(self, node: fx.Node, new: fx.Node, context: Context) -> None:
        """Put an attention in 8 bits in the place of one in high precision."""
        new.meta["val"] = node.meta["val"]  # another attention may read it
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        context.matched(new)

    def _said(self, node: fx.Node, context: Context) -> Reason | None:
        """Return why a user or a recipe lets an attention stay in high precision, or None."""
        linears = list(linears_around(node))
        if not linears and context.surroundings.linear_paths:
            return Reason(Cause.OTHER, "its linears are in another graph, and so is what was decided about them")
        if linears and all(_in_high_precision(linear) for linear in linears):
            step = linears[0].cause is Cause.STEP
            why = "this step runs in high precision" if step else linears[0].reason
            return Reason(linears[0].cause, f"its linears stay: {why}")
        stays = (said for said in _attached(linears, context) if said.decision == "high_precision")
        return next((Reason(Cause.SENSITIVITY, said.reason) for said in stays), None)

    def _obstacle(self, node: fx.Node, given: dict[str, Any]) -> Reason | None:
        """Return why an attention cannot run in 8 bits, or None."""
        if given["dropout_p"] != 0:
            return Reason(Cause.OTHER, "dropout")
        if isinstance(given["scale"], fx.Node):
            return Reason(Cause.OTHER, "scale: computed in the graph")
        query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
        mask = given["attn_mask"].meta["val"] if given["attn_mask"] is not None else None
        try:
            check_attention(query, key, value, mask, given["is_causal"], given["enable_gqa"])
        except FormatError as error:
            return Reason(Cause.SHAPE, str(error))
        if (dtype := node.meta["val"].dtype) != query.dtype:
            return Reason(Cause.DTYPE, f"dtype: autocast makes {query.dtype} {dtype}")
        tokens = min(size_hint(query.shape[2]), size_hint(key.shape[2]))
        if tokens < self.min_tokens:
            return Reason(Cause.SMALL, f"short: {tokens} tokens, less than {self.min_tokens}")
        return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an attention by name, with those that it was not given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in arguments}


def linears_around(node: fx.Node) -> Iterator[Decision]:
    """Yield the decisions about the linears of the innermost module around a node that has some.

    The outermost one is what was compiled, which the graph does not name: a block that holds its attention itself.
    """
    planned = [other for other in node.graph.nodes if decisions_of(other)]
    for path in (*reversed(module_classes(node)), None):
        found = [other for other in planned if path is None or path in module_classes(other)]
        if found:
            yield from (decision for other in found for decision in decisions_of(other))
            return


def _attached(linears: Iterable[Decision], context: Context) -> Iterator[Attachment]:
    """Yield what a recipe says about the attention of some linears."""
    for linear in linears:
        said = attached_attention(context.inputs[linear.weight_index]) if linear.weight_index >= 0 else None
        if said is not None:
            yield said


def _kind(node: fx.Node, context: Context) -> tuple[str, str]:
    """Return the value of the option ``attention`` that an attention runs by, and why in words if it is another."""
    kind = context.options.attention
    said = next(_attached(linears_around(node), context), None) if kind == "hif4" else None
    return (kind, "") if said is None else ("int8", f", {said.reason or 'as its recipe says'}")


def _in_high_precision(linear: Decision) -> bool:
    """Return whether a linear stays, or has an activation of 16 bits in the step at hand, as packed ones have."""
    return linear.decision == "high_precision" or (linear.cause is Cause.STEP and linear.activation_bits == 16)


def _chosen_by_diffusers(node: fx.Node, modules: Mapping[str, nn.Module]) -> Reason | None:
    """Return whether a user chose how an attention runs: for it, for all of a model, or by a context manager."""
    registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
    active = getattr(registry, "_active_backend", None)
    for module in _around(node, modules):
        processor = getattr(module, "processor", None)
        name, how = getattr(processor, "_attention_backend", None), "set_attention_backend"
        if name is None and hasattr(processor, "_attention_backend") and active not in (None, "native"):
            name, how = active, "attention_backend"
        if name is not None:
            return Reason(Cause.KEPT, f"kept: {how}({getattr(name, 'value', name)!r})")
    return None


def _around(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterable[nn.Module]:
    """Return the innermost module around a node that diffusers gave a processor, or all where that is not known."""
    for path in reversed(module_classes(node)):
        if hasattr(getattr(modules.get(path), "processor", None), "_attention_backend"):
            return [modules[path]]
    return modules.values()


def _kind_of_operator(given: dict[str, Any]) -> str:
    """Return the value of the option ``attention`` that has the queries and keys of an operator of tahf4, in words."""
    bits = given["bits"] if "bits" in given else activation_bits(given["key_codes"].meta["val"])
    kind = next(kind for kind, wanted in BITS.items() if wanted == bits)
    return kind + (VALUES_IN_16_BITS if given.get("value_bits") == 16 else "")


def _by_hand(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield each softmax over the last axis that stands, but for pointwise operators and views, between products."""
    for node in graph.find_nodes(op="call_function", target=SOFTMAX):
        from_one = _meets_product(node.all_input_nodes, lambda n: n.all_input_nodes)
        to_one = _meets_product(node.users, lambda n: n.users)
        if _arguments(node)["dim"] in (-1, node.meta["val"].dim() - 1) and from_one and to_one:
            yield node


def _meets_product(nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Return whether a product is among some nodes, or among those that follow behind pointwise ones and views."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node.target in _PRODUCTS:
            return True
        if node not in seen and _keeps_places(node.target):
            seen.add(node)
            pending += following(node)
    return False


def _keeps_places(target: Any) -> bool:
    """Return whether an operator is pointwise, a view or in place."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    known = torch.Tag.pointwise in target.tags or target.overloadpacket in _POINTWISE
    return known or any(result.alias_info is not None for result in target._schema.returns)


def _path(node: fx.Node) -> str:
    """Return the module that a recipe calls an attention by."""
    return module_around([d.module for d in linears_around(node)]) or next(reversed(module_classes(node)), node.name)


def _words(node: fx.Node, given: dict[str, Any]) -> str:
    """Name an attention, as a recipe does, and its sizes."""
    key = given["key" if "key" in given else "key_codes"]
    q, k = ([size_hint(size) for size in operand.meta["val"].shape] for operand in (given["query"], key))
    heads = f", {q[-3]} heads of {q[-1]}" if len(q) > 2 else ""
    return f"{_path(node)} ({q[-2]} x {k[-2]} tokens{heads})"
