"""Draw norms and rotary embeddings of queries and keys into their quantization for attention."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.nodes import is_view, mutates, node_arg
from ..ops.program import Program, Statement, call_of
from ..ops.registry import all_arguments, dispatch
from ..pipeline.activations import call
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context
from .regions import MAX_INPUTS, Places, Region, erase, readers

aten = torch.ops.aten
ATTENTION = torch.ops.tahf4.attention.default
FUSED = torch.ops.tahf4.fused_attention.default
_VIEWS = (aten.unflatten.int, aten.flatten.using_ints, aten.view.default, aten.reshape.default)


@dataclass(frozen=True)
class AttentionPrologue(Pass):
    """Fuse norms and rotary embeddings of queries and keys into attention in 8 bits.

    Before::

        q = aten.unflatten(aten.rms_norm(x, [k], weight, eps), 2, [heads, -1])
        q = ...  # each pair of channels turned by angles
        y = tahf4.attention(aten.permute(q, [0, 2, 1, 3]), ..., v, None, False, None, False, 8)

    After::

        y = tahf4.fused_attention([x, weight, cos, sin], "v0: bfloat16 = rms_norm(x0, x1, eps); v1: bfloat16 =
        rotary(v0, x2, x3)", ..., v, heads, None, False, None, False, 8)

    Queries and keys come from ``[B, S, H * E]``, whose heads become an axis. A norm is along all heads. A rotary
    embedding turns neighbouring channels, in float32, by angles that are the same for all heads. Either may be missing.
    Nothing is fused where another kernel than that of the attention, or only the reference, could run it, where
    something else reads a value on the way, and where something else writes to memory on the way.

    Attributes:
        always: fuse for the reference as well, to look at the graph.
    """

    exact = True
    after = ("attention",)
    before = ("upcast", "fuse", "lower")
    always: bool = False

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        found = list(graph.find_nodes(op="call_function", target=ATTENTION))
        if not found or (context.options.kernels == "reference" and not self.always):
            return PassResult(graph_module, False)
        places, count = Places(graph), 0
        for node in found:
            fused = self._fused(node, places)
            if fused is not None:
                context.matched(fused)
                count += 1
        context.note(f"{count} of {len(found)} fused with norms or rotary embeddings of their queries and keys")
        return PassResult(graph_module, count > 0)

    def _fused(self, node: fx.Node, places: Places) -> fx.Node | None:
        """Put an attention with its programs in the place of one, if a kernel can run it."""
        query, key, value, *rest = all_arguments(node)
        parts = [_Operand.of(query, places), _Operand.of(key, places)]
        q, k = parts
        if q is None or k is None or not (q.statements or k.statements):
            return None
        own = {*q.nodes, *k.nodes}
        heads = query.meta["val"].shape[1]
        others = {a for a in (value, *rest) if isinstance(a, fx.Node)}
        if not isinstance(heads, int) or others & own or not _on_its_own(own, node, places):
            return None
        with node.graph.inserting_before(node):
            angles = _angles([*q.angles, *k.angles], node)
            (left, left_text), (right, right_text) = (part.written(angles) for part in (q, k))
            new = call(node, FUSED, (left, left_text, right, right_text, value, heads, *rest))
        new.meta["val"] = node.meta["val"]
        if not self.always and dispatch(FUSED, new).name not in {dispatch(ATTENTION, node).name} - {"reference"}:
            erase([new, *angles.values(), *(node_arg(copy, 0) for copy in angles.values())])
            return None
        for read in own:
            for user in [user for user in read.users if _reads_dtype(user, read) and user not in own]:
                user.target, user.args = aten.to.dtype, (user.args[0], read.meta["val"].dtype)
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        erase(sorted({*own, *q.drawn, *k.drawn}, key=places.order.__getitem__, reverse=True))
        return new


@dataclass(frozen=True)
class _Operand:
    """What the queries or the keys of an attention are computed by.

    Attributes:
        nodes: from their program's end to the attention.
        drawn: those of the program, which others may read as well.
        leaves: what the program reads.
        statements: of the program, without the rotary embedding.
        angles: cosines and sines ``[.., S, 1, E / 2]`` of the rotary embedding, or nothing.
    """

    nodes: list[fx.Node]
    drawn: list[fx.Node]
    leaves: list[fx.Node]
    statements: list[Statement]
    angles: tuple[fx.Node, ...]

    @staticmethod
    def of(source: fx.Node, places: Places) -> _Operand | None:
        """Return it for an operand ``[B, H, S, E]`` of an attention, or None."""
        dtype, nodes = source.meta["val"].dtype, [source]
        if not _swaps_heads(source):
            return None
        end = node_arg(source, 0)
        while (found := call_of(end)) is not None and found[0] == "to":
            nodes.append(end)
            end = found[1][0]
        rotary = _rotary(end)
        split, angles = (end, ()) if rotary is None else (rotary.source, rotary.angles)
        # A program rounds once: to the dtype of the result.
        rounded = nodes if rotary is None else [*nodes, end]
        twice = any(n.meta["val"].dtype not in (dtype, torch.float32) for n in rounded)
        if twice or split not in places.order or not _splits_heads(split):
            return None
        nodes += [split, *(rotary.nodes if rotary is not None else [])]
        region = Region(places)
        statements = list(region.before(split).statements)
        x = node_arg(split, 0)
        if not region.leaves:
            region.leaves.append(x)
        name = region.names.get(x, "x0")
        if rotary is not None:
            first = len(region.leaves)
            statements.append(Statement(f"v{len(statements)}", dtype, "rotary", (name, f"x{first}", f"x{first + 1}")))
        elif x.meta["val"].dtype != dtype:
            statements.append(Statement(f"v{len(statements)}", dtype, "to", (name,)))
        if len(region.leaves) + len(angles) > MAX_INPUTS:
            return None
        return _Operand(nodes, region.absorbed, region.leaves, statements, angles)

    def written(self, angles: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], str]:
        """Return the inputs and the text of the program."""
        return [*self.leaves, *(angles[angle] for angle in self.angles)], str(Program(tuple(self.statements)))


@dataclass(frozen=True)
class _Rotary:
    """A rotary embedding: the nodes that compute it from ``source`` ``[B, S, H, E]``, and its cosines and sines."""

    source: fx.Node
    nodes: list[fx.Node]
    angles: tuple[fx.Node, ...]


def _rotary(end: fx.Node) -> _Rotary | None:
    """Return the rotary embedding that ends in a node: pairs that are stacked, or written to a new tensor."""
    found = _written(end) if end.target is aten.empty_like.default else _stacked(end)
    if found is None:
        return None
    (even, odd), nodes = found
    terms = [_term(part) for total in (even, odd) for part in total.all_input_nodes]
    if even.target is not aten.sub.Tensor or odd.target is not aten.add.Tensor or len(terms) != 4 or None in terms:
        return None
    if any(total.kwargs or len(total.args) != 2 for total in (even, odd)):
        return None
    (a, cos), (b, sin), *others = (term for term in terms if term is not None)
    if (a.args[1], b.args[1]) != (0, 1) or set(others) != {(a, sin), (b, cos)} or a.args[0] is not b.args[0]:
        return None
    unbound = node_arg(a, 0)
    pairs = node_arg(unbound, 0)
    products = [*even.all_input_nodes, *odd.all_input_nodes]
    if pairs.target not in _VIEWS or not _last(unbound, 1, 5):
        return None
    source = node_arg(pairs, 0)
    *outer, width = source.meta["val"].shape
    if len(outer) != 3 or not isinstance(width, int) or not _is_view(pairs, (*outer, width // 2, 2)):
        return None
    wide = all(n.meta["val"].dtype == torch.float32 for n in (cos, sin, *products, even, odd))
    if not wide or not all(_is_angle(angle, source) for angle in (cos, sin)):
        return None
    return _Rotary(source, [*nodes, even, odd, *products, a, b, unbound, pairs], (cos, sin))


def _stacked(end: fx.Node) -> tuple[Sequence[fx.Node], list[fx.Node]] | None:
    """Return two halves of ``[B, S, H, E]`` that are stacked along a last axis, and the nodes that do it."""
    stack = end.args[0] if end.args and end.target in _VIEWS else None
    if not isinstance(stack, fx.Node) or stack.target is not aten.stack.default or not _last(stack, 1, 5):
        return None
    halves: Any = stack.args[0]
    *outer, half, two = stack.meta["val"].shape
    return (halves, [end, stack]) if two == 2 and _is_view(end, (*outer, 2 * half)) else None


def _written(end: fx.Node) -> tuple[Sequence[fx.Node], list[fx.Node]] | None:
    """Return two halves of ``[B, S, H, E]`` that are written to an empty tensor, and the nodes that do it."""
    width = end.meta["val"].shape[-1]
    slices = [user for user in end.users if user.target is aten.slice.Tensor]
    halves: dict[Any, fx.Node] = {}
    nodes = [end, *slices]
    for part in slices:
        _, axis, start, stop = (*part.args, None, None, None)[:4]
        copies = list(part.users)
        whole = axis in (3, -1) and isinstance(stop, int) and stop >= width  # a half that fits has steps of 2
        if not whole or len(copies) != 1 or copies[0].target is not aten.copy_.default or copies[0].args[0] is not part:
            return None
        halves[start] = node_arg(copies[0], 1)
        nodes += copies
    return ([halves[0], halves[1]], nodes) if len(slices) == 2 and set(halves) == {0, 1} else None


def _term(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return what a product multiplies: one of two halves of a tensor, and an angle."""
    if product.target is not aten.mul.Tensor or len(product.all_input_nodes) != 2:
        return None
    for half, angle in (product.all_input_nodes, product.all_input_nodes[::-1]):
        found = half.target is operator.getitem and node_arg(half, 0).target is aten.unbind.int
        if found and isinstance(angle.meta.get("val"), torch.Tensor):
            return half, angle
    return None


def _is_angle(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is of the shape ``[1 or B, 1 or S, 1, E / 2]``, on the device of the source."""
    value, like = node.meta["val"], source.meta["val"]
    batch, tokens, _, width = map(str, like.shape)
    shape = [str(size) for size in value.shape]
    fits = len(shape) == 4 and shape[0] in ("1", batch) and shape[1] in ("1", tokens)
    return fits and shape[2:] == ["1", str(int(width) // 2)] and value.device == like.device


def _last(node: fx.Node, position: int, rank: int) -> bool:
    """Whether an argument of a node, or 0 where it is not given, is the last of so many axes."""
    return not node.kwargs and (*node.args, *([0] * position))[position] in (-1, rank - 1)


def _is_view(node: fx.Node, shape: Sequence[Any]) -> bool:
    return node.target in _VIEWS and [str(s) for s in node.meta["val"].shape] == [str(s) for s in shape]


def _swaps_heads(node: fx.Node) -> bool:
    """Whether a node makes ``[B, H, S, E]`` of ``[B, S, H, E]``."""
    if node.target is aten.permute.default:
        return list(node.args[1:]) == [[0, 2, 1, 3]]
    return node.target is aten.transpose.int and {axis % 4 for axis in node.args[1:]} == {1, 2}  # type: ignore


def _splits_heads(node: fx.Node) -> bool:
    """Whether a node makes ``[B, S, H, E]`` of ``[B, S, H * E]``."""
    value = node.meta["val"]
    if value.dim() != 4 or not all(isinstance(size, int) for size in value.shape[2:]):
        return False
    *outer, heads, width = value.shape
    source = node_arg(node, 0).meta["val"] if _is_view(node, value.shape) else value
    return [str(size) for size in source.shape] == [str(size) for size in (*outer, heads * width)]


def _on_its_own(own: set[fx.Node], node: fx.Node, places: Places) -> bool:
    """Whether nothing but an attention needs its operands' values, and nothing else writes to memory before it."""
    for part in own:
        if not all(user is node or user in own or _reads_dtype(user, part) for user in readers(part)):
            return False
    between = min(own, key=lambda part: places.order.get(part, len(places.order)))
    while between is not node:
        if mutates(between) and between not in own:
            return False
        between = between.next
    return True


def _reads_dtype(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user needs no more than the dtype of a node."""
    if user.target is not aten.type_as.default or user.args[1] is not node or user.args[0] is node:
        return False
    return bool(node_arg(user, 0).meta["val"].device == node.meta["val"].device)


def _angles(found: Sequence[fx.Node], node: fx.Node) -> dict[fx.Node, fx.Node]:
    """Return angles ``[.., S, 1, E / 2]`` as contiguous ``[.., S, E / 2]``, so that a kernel reads 16 bytes at once.

    Queries and keys have views of the same memory: one copy of it is enough.
    """
    made: dict[str, fx.Node] = {}
    for angle in found:
        key = f"{angle.target} {angle.args} {angle.kwargs}" if is_view(angle) else angle.name
        if key not in made:
            flat = call(node, aten.squeeze.dim, (angle, 2))
            flat.meta["val"] = angle.meta["val"].squeeze(2)
            made[key] = call(node, aten.contiguous.default, (flat,))
            made[key].meta["val"] = flat.meta["val"].contiguous()
        made[angle.name] = made[key]
    return {angle: made[angle.name] for angle in found}
