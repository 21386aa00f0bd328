"""What every pass must keep: the checks after each one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import FormatError, PassError
from ..format.spans import check_form
from ..graph.inputs import BESIDE, INPUT, SEARCHES, GraphInput, HeldWeight, PackedInput
from ..graph.nodes import is_written, node_words, tensor_meta
from .base import Pass
from .context import Context
from .shapes import propagate


def check(item: Pass, graph_module: fx.GraphModule, context: Context, before: Interface) -> None:
    """Raise :class:`PassError` if a pass broke the contract."""
    graph = graph_module.graph
    if (found := _dangling(graph)) is not None:
        user, lost = found
        raise PassError(
            f"pass {item.name!r} left a broken graph: node {node_words(user)} reads {lost.name!r}, which the graph "
            "does not hold before it. Insert what it reads above it, or replace its uses before erasing it."
        )
    if (strange := [n for n in graph.find_nodes(op="placeholder") if n.meta.get(INPUT) is None]) != []:
        raise PassError(
            f"pass {item.name!r} added the input {strange[0].name!r} without a PackedInput in node.meta[{INPUT!r}], or "
            "dropped the metadata of an input; nothing says what it is called with"
        )
    for node in graph.find_nodes(op="placeholder"):
        source = node.meta[INPUT]
        if isinstance(source, PackedInput) and (wrong := _wrong(source, len(context.inputs))):
            raise PassError(f"pass {item.name!r} added the input {node.name!r}, a PackedInput whose {wrong}")
    try:
        graph.lint()
    except Exception as error:
        raise PassError(f"pass {item.name!r} left a broken graph: {error}") from error
    if len(list(graph.find_nodes(op="output"))) != 1:
        raise PassError(f"pass {item.name!r} left a graph without its output")
    for node in graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise PassError(
                f"pass {item.name!r} added the {node.op} {node_words(node)}; a graph holds calls of functions only "
                "(operators such as torch.ops.aten...)"
            )
    if written := sorted((_written(graph) & before.placeholders) - before.written):  # its own new inputs are its own
        raise PassError(
            f"pass {item.name!r} writes to the graph's inputs {', '.join(written)}, which nothing wrote to before it: "
            "weights and callers' tensors would change. Compute a new tensor instead."
        )
    propagate(graph_module, context, item.name, before.calls)
    after = interface_of(graph_module)
    lost_inputs = sorted(before.inputs - after.inputs)
    if lost_inputs:
        raise PassError(
            f"pass {item.name!r} removed the graph's inputs {', '.join(lost_inputs)}. Inputs other than parameters "
            "must stay, used or not."
        )
    for name, source in after.sources.items():
        if (old := before.sources.get(name, source)) != source:
            raise PassError(
                f"pass {item.name!r} made the input {name!r} stand for {source.path!r}; before it, it stood for "
                f"{old.path!r}. Leave node.meta[{INPUT!r}] as it is, and change what reads the inputs."
            )
    if before.outputs != after.outputs:
        changed = [
            f"output {i}: {_words(old)} became {_words(new)}" + (f" at node {node_words(n)}" if n is not None else "")
            for i, (old, new, n) in enumerate(zip(before.outputs, after.outputs, after.nodes, strict=False))
            if old != new
        ] or [f"{len(before.outputs)} outputs became {len(after.outputs)}"]
        raise PassError(f"pass {item.name!r} changed the graph's outputs: {'; '.join(changed)}")


def _wrong(source: PackedInput, inputs: int) -> str:
    """Say which field of a packed input is none that it can have; an empty string if all are."""
    how = source.weight
    if not source.positions or any(not 0 <= position < inputs for position in source.positions):
        return f"weights are {source.weights}; expected positions among the {inputs} inputs of the captured graph"
    if isinstance(how, HeldWeight) or how.format:
        return ""  # a format of a plug-in says itself which parts it has
    if source.part not in (parts := ("codes", "scales", *BESIDE)):
        return f"part is {source.part!r}; expected one of {', '.join(parts)}"
    if how.search not in SEARCHES:
        return f"search is {how.search!r}; expected one of {', '.join(map(repr, SEARCHES))}"
    if how.seed is not None and not (type(how.seed) is int and how.seed >= 0):
        return f"seed is {how.seed!r}; expected an int from 0 on, or None"
    try:
        check_form(how.span)
    except FormatError as error:
        return f"span is {how.span!r}: {error}"
    return ""


def _dangling(graph: fx.Graph) -> tuple[fx.Node, fx.Node] | None:
    """Return the first node that reads what is not computed before it, and what it reads."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                return node, source
        seen.add(node)
    return None


@dataclass(frozen=True)
class Interface:
    """What a pass must keep, and what the graph's calls were before it."""

    inputs: frozenset[str]
    placeholders: frozenset[str]
    outputs: tuple[Any, ...]
    nodes: tuple[fx.Node | None, ...]
    written: frozenset[str]
    sources: Mapping[str, GraphInput]
    calls: Mapping[fx.Node, tuple[Any, ...]]


def interface_of(graph_module: fx.GraphModule) -> Interface:
    """Return what the next pass must keep of a graph."""
    inputs = frozenset(
        node.name
        for node in graph_module.graph.nodes
        if node.op == "placeholder"
        and isinstance(source := node.meta.get(INPUT), GraphInput)
        and source.kind != "parameter"
    )
    found = list(graph_module.graph.find_nodes(op="placeholder"))
    placeholders = frozenset(node.name for node in found)
    sources = {node.name: source for node in found if isinstance(source := node.meta.get(INPUT), GraphInput)}
    (output,) = graph_module.graph.find_nodes(op="output")
    leaves = torch.utils._pytree.tree_leaves(output.args[0])
    values = (leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves)
    nodes = tuple(leaf if isinstance(leaf, fx.Node) else None for leaf in leaves)
    calls = {
        n: (n.target, n.args, n.kwargs, n.meta.get("val")) for n in graph_module.graph.nodes if n.op == "call_function"
    }
    metas = tuple(tensor_meta(value) for value in values)
    return Interface(inputs, placeholders, metas, nodes, _written(graph_module.graph), sources, calls)


def _written(graph: fx.Graph) -> frozenset[str]:
    return frozenset(node.name for node in graph.find_nodes(op="placeholder") if is_written(node))


def _words(meta: Any) -> str:
    if meta is None:
        return "no tensor"
    shape, dtype, device = meta
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(shape)}] on {device}"


def check_conditions(item: Pass, which: str, graph_module: fx.GraphModule, context: Context) -> None:
    """Raise :class:`PassError` if a condition that a pass declares does not hold."""
    for condition in getattr(item, which):
        wrong = condition(graph_module, context)
        if wrong:
            verb = "needs" if which == "requires" else "promises"
            raise PassError(f"pass {item.name!r} {verb} {getattr(condition, '__name__', 'a condition')}: {wrong}")
