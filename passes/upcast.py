"""Compute in float32 what a model stores in 16 bits, for processors that calculate in 16 bits slowly."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ..errors import OptionError
from ..graph.nodes import is_view, mutates
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context
from ..plugins import host

aten = torch.ops.aten
log = logging.getLogger(__name__)
_NARROW = (torch.bfloat16, torch.float16)
_told: set[torch.dtype] = set()


@dataclass(frozen=True)
class Upcast(Pass):
    """Compute in float32 and keep weights, inputs and outputs in the dtypes that they have. Off by default.

    Before::

        y = tahf4.linear(codes, scales, weight_codes, weight_scales, bias, torch.bfloat16)
        z = aten.gelu(y)
        return z

    After::

        b = aten.to.dtype(bias, torch.float32)
        y = tahf4.linear(codes, scales, weight_codes, weight_scales, b, torch.float32)
        z = aten.gelu(y)
        return aten.to.dtype(z, torch.bfloat16)

    On a CPU without bfloat16 arithmetic, attention and products in bfloat16 take many times as long as in float32.
    Results are not rounded to 16 bits on the way, so that they differ from the 16-bit model's, towards those of
    the same weights in float32.

    Attributes:
        dtype: ``"float32"``, or ``""`` to leave the graph as it is.
    """

    after = ("quantize", "scale_search")
    before = ("fuse",)
    dtype: str = ""

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        if self.dtype not in ("", "float32"):
            raise OptionError(f"option upcast.dtype is {self.dtype!r}; expected 'float32', or '' for none")
        graph = graph_module.graph
        if not self.dtype:
            _offer(graph, context)
            return PassResult(graph_module, False)
        if not any(_narrow(node.meta.get("val")) for node in graph.nodes):
            return PassResult(graph_module, False)
        if reason := _obstacle(graph):
            context.note(f"left as it is: {reason}")
            log.warning("upcast leaves the graph as it is: %s", reason)
            return PassResult(graph_module, False)
        # Dtypes of the results, before anything changes.
        output = next(iter(graph.find_nodes(op="output")))
        results = {n: n.meta["val"].dtype for n in output.all_input_nodes if _narrow(n.meta.get("val"))}
        _widen_sources(graph, output, context)
        for node in graph.nodes:
            if node.op == "call_function":
                node.args = map_aggregate(node.args, _wide)
                node.kwargs = map_aggregate(node.kwargs, _wide)
        for node, dtype in results.items():
            if node.op in ("placeholder", "get_attr"):
                continue  # given back as it came
            with graph.inserting_before(output):
                back = graph.call_function(aten.to.dtype, (node, dtype))
            output.replace_input_with(node, back)
        context.note("computed in float32")
        return PassResult(graph_module, True)


def _widen_sources(graph: fx.Graph, output: fx.Node, context: Context) -> None:
    """Let everything but the output read inputs and constants through a cast, made where it is first needed."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op not in ("placeholder", "get_attr") or not _narrow(node.meta.get("val")):
            continue
        readers = [user for user in node.users if user is not output]
        if not readers:
            continue
        with graph.inserting_before(min(readers, key=place.__getitem__)):
            cast = graph.call_function(aten.to.dtype, (node, torch.float32))
        for user in readers:
            user.replace_input_with(node, cast)
        context.matched(cast)


def _wide(value: Any) -> Any:
    return torch.float32 if value in _NARROW and isinstance(value, torch.dtype) else value


def _narrow(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _NARROW


def _obstacle(graph: fx.Graph) -> str:
    """Return why a graph cannot be computed in another dtype, or an empty string."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if mutates(node):
            targets = _written_by(node)
            if not targets:
                return f"{node.name} ({node.target}) changes a mode"
            roots = {_root(target) for target in targets}
            if any(root.op != "call_function" for root in roots):
                return f"{node.name} ({node.target}) writes to a tensor that the graph was given"
            written |= roots
        if node.op == "call_function" and node.target is aten.view.dtype:
            return f"{node.name} ({node.target}) reads the bits of a number"
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            return f"{node.name} is a {node.op}"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.name} ({node.target}) holds a graph of its own"
    # A cast between 16 and 32 bits copies; where both are float32 it does not, and a write would show in both.
    for node in graph.nodes:
        if _casts(node) and (node in written or _root(node.all_input_nodes[0]) in written):
            return f"{node.name} ({node.target}) copies a tensor that is written to"
    return ""


def _written_by(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that an operator writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[fx.Node] = []
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        found += [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, fx.Node)]
    return found


def _root(node: fx.Node) -> fx.Node:
    """Return the node that made the memory that a result lies in: back through views, but not through casts."""
    while node.op == "call_function" and node.all_input_nodes and not _casts(node):
        if node.target is operator.getitem or _may_alias(node):
            node = node.all_input_nodes[0]
        elif written := _written_by(node):
            node = written[0]  # an operator in place gives back what it wrote to
        else:
            break
    return node


def _may_alias(node: fx.Node) -> bool:
    # type_as gives back its input where the dtypes are the same, which its schema does not say.
    return is_view(node) or node.target is aten.type_as.default


def _casts(node: fx.Node) -> bool:
    """Whether an operator gives its input in another dtype, as a copy."""
    if node.op != "call_function" or not _may_alias(node):
        return False
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype != after.dtype


def _offer(graph: fx.Graph, context: Context) -> None:
    """Say once that a processor without 16-bit arithmetic has a graph that calculates in 16 bits."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.tahf4.linear.default):
        value = node.meta.get("val")
        if not _narrow(value) or (slow := host.find("slow_dtype", value.device)) is None or not slow(value.dtype):
            continue
        text = (
            f"this processor has no arithmetic in {value.dtype}: what stays in high precision, attention above all, is "
            "slow. options={'upcast.dtype': 'float32'} computes in float32 and stores as before"
        )
        context.note(text)
        if value.dtype not in _told:
            _told.add(value.dtype)
            log.warning("%s", text)
        return
