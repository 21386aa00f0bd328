"""Find subgraphs by an example of them, and replace them: ``torch.fx``'s matcher, with what this compiler needs around.

The matcher compares operators and arguments; the functions here trace patterns with fake tensors (so that a pattern is
written in ordinary PyTorch and ends in the same ATen operators as a graph), refuse matches across writes to memory,
keep module paths and stack traces on the new nodes, and count matches for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from ..errors import PassError
from ..graph.inputs import DECISION, NUMBERS, ROLE
from ..graph.nodes import LINEAR, is_product, mutates, product_weights
from ..torch_private.tensors import real_tensors
from .context import Context

__all__ = ["Match", "find_pattern", "replace_pattern"]

_PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")
_KEPT = (*_PLACE, ROLE, DECISION, NUMBERS)


@dataclass(frozen=True)
class Match:
    """A subgraph that a pattern matched.

    Attributes:
        inputs: nodes (or constants) in the place of the pattern's arguments.
        nodes: the matched nodes, in execution order.
        outputs: those of them that the pattern returns.
    """

    inputs: tuple[Any, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def find_pattern(
    graph_module: fx.GraphModule,
    pattern: Callable[..., Any],
    example: Sequence[Any],
    *,
    where: Callable[[Match], bool] | None = None,
    any_constants: bool = False,
) -> list[Match]:
    """Return the places where a graph computes what a function computes, in its way of writing it.

    Args:
        graph_module: as a pass gets it.
        pattern: a function of PyTorch operators; its arguments stand for any node.
        example: one tensor for each argument, whose number of axes and dtype lead to the operators that the graph
            has; one tensor may stand for several. They are never computed with.
        where: further condition.
        any_constants: take numbers and other constants of the pattern for any.

    Returns:
        Matches that do not overlap. A node inside a match has no reader outside of it, unless the pattern returns it;
        a reader whose own result nobody reads (an assertion, a part of a chunk) does not count.

    Raises:
        PassError: the function cannot be traced, ignores an argument, computes nothing, writes to memory, holds a
            tensor that is no argument, or returns anything but a tensor or a tuple of tensors; an example is no tensor.
    """
    return _find(graph_module.graph, _pattern(pattern, example), where, any_constants)


def replace_pattern(
    graph_module: fx.GraphModule,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    example: Sequence[Any],
    context: Context | None = None,
    *,
    where: Callable[[Match], bool] | None = None,
    any_constants: bool = False,
) -> int:
    """Replace each match of a pattern.

    Args:
        graph_module: changed in place.
        pattern: see :func:`find_pattern`.
        replacement: takes the same arguments and returns as many results.
        example: see :func:`find_pattern`.
        context: its matches are counted, if given.
        where: further condition.
        any_constants: take numbers of the pattern for any.

    Returns:
        How many were replaced. New nodes carry the module path, stack trace and numbers of the first result that they
        stand for; a product with the weight of a matched linear carries that linear's, and its decision. Shapes are
        filled in by the pass manager.

    Raises:
        PassError: the pattern is none (see :func:`find_pattern`), the replacement cannot be traced or holds a tensor of
            more than one number that is no argument, or they return different numbers of results.
    """
    graph = graph_module.graph

    def accept(found: InternalMatch, *graphs: fx.Graph) -> bool:
        match = _match(found, graph)
        return _one_moment(match, graph) and (where is None or where(match))

    old, new = _pattern(pattern, example), _replacement(replacement, example)
    wanted, given = len(_results(old)), len(_results(new))
    if wanted != given:
        raise PassError(
            f"the pattern {_name(pattern)!r} returns {wanted} tensors and its replacement returns {given}; they must "
            "be as many, in the same order"
        )
    for found in _find(graph, old, where, any_constants):
        for node in set(found.nodes) - set(found.outputs):
            for user in [user for user in node.users if _idle(user)]:
                graph.erase_node(user)  # nothing is left to read
    metas: dict[fx.Node, dict[str, Any]] = {node: dict(node.meta) for node in graph.nodes}
    weights = {node: product_weights(node) for node in graph.nodes if node.target is LINEAR or DECISION in node.meta}
    replaced = replace_pattern_with_filters(graph_module, old, new, [accept], ignore_literals=any_constants)
    for match in replaced:
        inputs = {n for p, n in match.nodes_map.items() if p.op == "placeholder"}
        anchor = match.nodes_map[match.anchor]
        linears = [node for node in match.nodes_map.values() if node in weights]
        fresh = [node for node in match.replacements if isinstance(node, fx.Node) and node not in inputs]
        _carry(fresh, anchor, {node: weights[node] for node in linears}, metas)
        if context is not None:
            last = match.replacements[-1] if match.replacements else None
            context.matched(last if isinstance(last, fx.Node) else None)
    return len(replaced)


def _carry(
    fresh: Sequence[fx.Node],
    anchor: fx.Node,
    linears: dict[fx.Node, set[fx.Node]],
    metas: dict[fx.Node, dict[str, Any]],
) -> None:
    """Give new nodes the metadata of what they stand for: a product that of the linear whose weight it reads."""
    meta = metas.get(anchor, {})
    placed = False
    for node in fresh:
        product = next((old for old, weights in linears.items() if is_product(node, weights)), None)
        if product is not None:
            node.meta = {key: metas[product][key] for key in _KEPT if key in metas[product]}
        else:
            kept = _PLACE if anchor in linears else (*_PLACE, NUMBERS)
            node.meta = {key: meta[key] for key in kept if key in meta}
        placed |= product is not None or node.target is LINEAR
    if fresh and not placed and anchor in linears:  # written out in operators of which none is the product
        fresh[-1].meta.update({key: meta[key] for key in (DECISION, NUMBERS) if key in meta})


class _Matcher(SubgraphMatcher):
    """The matcher of ``torch.fx``, for which a reader whose own result nobody reads is none."""

    def _is_contained(self, nodes_map: dict[fx.Node, fx.Node]) -> bool:
        inside = {found: node for node, found in nodes_map.items() if node.op != "placeholder"}
        hidden = [found for found, node in inside.items() if node not in self.pattern_returning_nodes]
        return all(user in inside or _idle(user) for found in hidden for user in found.users)


def _idle(node: fx.Node) -> bool:
    """Whether nothing would be different without a node."""
    return node.op == "call_function" and not node.users and not mutates(node)


def _find(
    graph: fx.Graph, pattern: fx.Graph, where: Callable[[Match], bool] | None, any_constants: bool
) -> list[Match]:
    found = (_match(m, graph) for m in _Matcher(pattern, ignore_literals=any_constants).match(graph))
    return [m for m in found if _one_moment(m, graph) and (where is None or where(m))]


def _pattern(function: Callable[..., Any], example: Sequence[Any]) -> fx.Graph:
    """Return the graph of a pattern, without what its results do not need."""
    graph, name = _trace(function, example).graph, _name(function)
    if constants := list(graph.find_nodes(op="get_attr")):
        raise PassError(
            f"the pattern {name!r} holds a tensor of its own ({_used_in(constants[0])}), which is an input in every "
            "graph: write the number itself, or make it an argument"
        )
    if writing := [node for node in graph.nodes if mutates(node)]:
        raise PassError(
            f"the pattern {name!r} writes to memory ({writing[0].target}), and nothing matches across a write; use the "
            "operator that returns a new tensor"
        )
    for unread in reversed(graph.nodes):
        if _idle(unread):
            graph.erase_node(unread)
    if unused := [node.name for node in graph.nodes if node.op == "placeholder" and not node.users]:
        raise PassError(f"the pattern {name!r} does not use its arguments {', '.join(unused)}; leave them out")
    if any(node.op == "placeholder" for node in _results(graph)):
        raise PassError(f"the pattern {name!r} returns an argument as it is; return only what it computes")
    return graph


def _replacement(function: Callable[..., Any], example: Sequence[Any]) -> fx.Graph:
    """Return the graph of a replacement. Tensors of one number that it holds are made in the graph."""
    traced = _trace(function, example, "replacement")
    graph = traced.graph
    for constant in graph.find_nodes(op="get_attr"):
        held = getattr(traced, str(constant.target))
        if held.dim():
            raise PassError(
                f"the replacement {_name(function)!r} holds a tensor of shape {tuple(held.shape)} "
                f"({_used_in(constant)}); the tensors of a graph are its inputs. Make it an argument of the pattern, "
                "or compute it (torch.full, torch.arange); one number is fine."
            )
        with graph.inserting_before(constant):
            number = graph.call_function(torch.ops.aten.full.default, ([], held.item()), {"dtype": held.dtype})
        last = _copied(constant)
        last.replace_all_uses_with(number)
        while last is not constant:
            (before,) = last.all_input_nodes
            graph.erase_node(last)
            last = before
        graph.erase_node(constant)
    return graph


_FRESH, _DETACH = torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default


def _copied(constant: fx.Node) -> fx.Node:
    """Return the last of the copies that tracing makes of a constant before it is read."""
    while [user.target for user in constant.users] in ([_FRESH], [_DETACH]):
        constant = next(iter(constant.users))
    return constant


def _used_in(constant: fx.Node) -> str:
    return "read by " + (", ".join(str(user.target) for user in _copied(constant).users) or "nothing")


def _check_example(example: Sequence[Any], name: str) -> None:
    for i, value in enumerate(example):
        for leaf in torch.utils._pytree.tree_leaves(value):
            if not isinstance(leaf, torch.Tensor):
                raise PassError(
                    f"the example of argument {i} of the pattern {name!r} is {leaf!r} ({type(leaf).__name__}); only "
                    "tensors can be arguments. Write a number into the pattern itself: it matches one that is equal, "
                    "or any with any_constants=True."
                )


def _check_results(result: Any, name: str, word: str) -> None:
    """Check that a function returned a tensor or several in a row."""
    several = isinstance(result, tuple | list)
    wrong = [value for value in (result if several else [result]) if not isinstance(value, fx.Node)]
    if wrong:
        kind = type(wrong[0]).__name__.removeprefix("immutable_")
        found = f"{kind!r} among its results" if several else repr(kind)
    elif several and not result:
        found = "nothing"
    else:
        return
    raise PassError(f"the {word} {name!r} returns {found}; return a tensor or a tuple of tensors")


def _results(graph: fx.Graph) -> list[fx.Node]:
    (output,) = graph.find_nodes(op="output")
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node)]


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", repr(function)))


def _trace(function: Callable[..., Any], example: Sequence[Any], word: str = "pattern") -> fx.GraphModule:
    """Return the ATen graph of a function, without values."""
    _check_example(example, _name(function))
    try:
        with real_tensors(), torch.no_grad():
            # Under a fake mode of its own; the mode of a compilation around it plays no part.
            # A tensor that is given twice would be traced as one argument.
            apart = [torch.utils._pytree.tree_map(torch.Tensor.detach, value) for value in example]
            traced = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*apart)
    except Exception as error:
        if "convert all Tensors to FakeTensors" in str(error):
            raise PassError(
                f"the {word} {_name(function)!r} reads a tensor that is none of its arguments; make it one, or write a "
                "number"
            ) from error
        raise PassError(f"the {word} {_name(function)!r} cannot be traced: {type(error).__name__}: {error}") from error
    for traced_node in traced.graph.nodes:  # not "node": an error would be said to be at that node of the graph
        traced_node.meta.clear()
    (output,) = traced.graph.find_nodes(op="output")
    _check_results(output.args[0], _name(function), word)
    return traced


def _match(found: InternalMatch, graph: fx.Graph) -> Match:
    inside = {node for p, node in found.nodes_map.items() if p.op not in ("placeholder", "output")}
    return Match(
        tuple(found.placeholder_nodes), tuple(n for n in graph.nodes if n in inside), tuple(found.returning_nodes)
    )


def _one_moment(match: Match, graph: fx.Graph) -> bool:
    """Whether nothing writes to memory between the first and the last node of a match."""
    if not match.nodes:
        return False
    node, last = match.nodes[0], match.nodes[-1]
    while True:
        if mutates(node):
            return False
        if node is last:
            return True
        node = node.next
