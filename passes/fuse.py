"""Draw what surrounds quantizations and products into them."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.inputs import DECISION
from ..graph.nodes import mutates, node_arg, size_hint
from ..ops.program import DTYPES, REDUCTIONS, Program, Statement, call_of
from ..ops.registry import dispatch
from ..pipeline.activations import bits_of, call, span_of
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context

aten = torch.ops.aten
QUANTIZE = torch.ops.tahf4.quantize.default
LINEAR = torch.ops.tahf4.linear.default
_ASSERT = aten._assert_tensor_metadata.default
_FLOATS = tuple(DTYPES.values())
MAX_INPUTS = 12


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse norms, modulation and activations into quantizations, and bias, gates and residuals into products.

    Before::

        n = aten.layer_norm(x, [k], None, None, eps)
        m = aten.add(aten.mul(n, aten.add(scale, 1)), shift)
        codes, scales = tahf4.quantize(m, multiplier, 64)
        y = tahf4.linear(codes, scales, w_codes, w_scales, bias, dtype)
        z = aten.add(residual, aten.mul(y, gate))

    After (a program says in its text what the kernel computes)::

        codes, scales = tahf4.fused_quantize([x, scale, shift], "v0: float32 = layer_norm(x0, ...) ...", multiplier, 64)
        [z] = tahf4.fused_linear(codes, ..., [gate, residual], "v0: float32 = mul(y, x0) ...", dtype)

    A product whose only reader is a quantization becomes ``tahf4.linear_quantize``, which writes codes alone, and
    merged products with ``aten.split_with_sizes`` one with several results. Nothing is fused where only the reference
    could run it: PyTorch's own compiler does better there. Nothing is fused where another kernel than the fused one
    runs the parts: a plug-in's kernel keeps its nodes.

    Attributes:
        always: fuse for the reference as well, to look at the graph.
    """

    exact = True
    after = ("quantize", "share", "smooth", "rotate", "scale_search")
    before = ("lower",)
    always: bool = False

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        if context.options.kernels == "reference" and not self.always:
            context.note("nothing: reference kernels are asked for")
            return PassResult(graph_module, False)
        graph = graph_module.graph
        places = _Places(graph)
        counts = {"products": 0, "quantizations": 0, "products with their quantization": 0, "split products": 0}
        for node in graph.find_nodes(op="call_function", target=LINEAR):
            kind = self._product(_Region(places), node)
            if kind is not None:
                counts[kind] += 1
                context.matched(node)
        for node in graph.find_nodes(op="call_function", target=QUANTIZE):
            if _quantizes(node) and self._quantization(_Region(places), node):
                counts["quantizations"] += 1
                context.matched(node)
        context.note(", ".join(f"{count} {kind}" for kind, count in counts.items()))
        return PassResult(graph_module, any(counts.values()))

    def _product(self, region: _Region, product: fx.Node) -> str | None:
        sizes = _split(product)
        if sizes is not None:
            return self._split_product(region, product, sizes)
        program = region.following(product)
        end = region.end
        users = _readers(end)
        # First what is most: the quantization of the result in the same kernel.
        alone = len(users) == 1 and _quantizes(users[0]) and users[0].args[0] is end and region.reaches(users[0])
        # A span of the result may be longer than what is known of a row at a time.
        if alone and span_of(users[0]) == 1:
            quantization = users[0]
            result, span = quantization.args[1:4], product.args[6:]
            result = (*result[:2], bits_of(quantization), *span) if span else result
            args = (*product.args[:6], region.leaves, str(program), *result)
            fused = self._replace(region, product, quantization, torch.ops.tahf4.linear_quantize.default, args)
            if fused is not None:
                region.absorbed.append(quantization)
                region.drop()
                return "products with their quantization"
        program = region.trimmed(program)
        if not program.statements:
            return None
        n = size_hint(product.meta["val"].shape[-1])
        dtype = region.end.meta["val"].dtype
        args = (*product.args[:6], [n], region.leaves, str(program), dtype, *product.args[6:])
        fused = self._replace(region, product, region.end, torch.ops.tahf4.fused_linear.default, args, first=True)
        if fused is None:
            return None
        region.drop()
        return "products"

    def _split_product(self, region: _Region, product: fx.Node, sizes: list[int]) -> str | None:
        graph = product.graph
        (split,) = _readers(product)
        dtype = product.meta["val"].dtype
        args = (*product.args[:6], sizes, [], "", dtype, *product.args[6:])
        fused = self._replace(region, product, split, torch.ops.tahf4.fused_linear.default, args)
        if fused is None:
            return None
        for part in list(fused.users):  # they are contiguous now
            users = list(part.users)
            # With another reader, one might write to what it copied.
            copied = len(users) == 1 and users[0].target is aten.clone.default
            if copied and users[0].kwargs.get("memory_format") is torch.contiguous_format:
                users[0].replace_all_uses_with(part)
                graph.erase_node(users[0])
        _erase([split, product])
        return "split products"

    def _quantization(self, region: _Region, quantization: fx.Node) -> bool:
        program = region.before(quantization)
        if not program.statements or len(region.leaves) > MAX_INPUTS:
            return False
        args = (region.leaves, str(program), *quantization.args[1:])
        fused = self._replace(region, quantization, quantization, torch.ops.tahf4.fused_quantize.default, args)
        if fused is None:
            return False
        region.absorbed.append(quantization)
        region.drop()
        return True

    def _replace(
        self, region: _Region, like: fx.Node, end: fx.Node, target: Any, args: tuple[Any, ...], first: bool = False
    ) -> fx.Node | None:
        """Put a fused operator in the place of ``end`` if a kernel can run it; ``first``: its first result."""
        graph = end.graph
        with graph.inserting_before(end):
            node = call(like, target, args)
            if not self.always and not _same_kernel(node, {like, end}):
                graph.erase_node(node)
                return None
            if DECISION in like.meta:
                node.meta[DECISION] = like.meta[DECISION]
            result = node
            if first:
                result = call(end, operator.getitem, (node, 0))
                result.meta["val"] = end.meta["val"]
        region.places.insert([node] if result is node else [node, result], end)
        end.replace_all_uses_with(result)
        return node


class _Places:
    """Where nodes stand: numbers that grow along the graph, and which stretch between writes to memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, float] = {node: index for index, node in enumerate(graph.nodes)}
        # Nothing moves across a node that writes to memory.
        segment, self.segment = 0, {}
        for node in graph.nodes:
            segment += mutates(node) and node.target is not _ASSERT
            self.segment[node] = segment

    def insert(self, nodes: list[fx.Node], end: fx.Node) -> None:
        """Take in new nodes that stand right before another one, which they are going to replace."""
        for index, node in enumerate(nodes):
            self.order[node] = self.order[end] - 0.5 ** (index + 1)
            self.segment[node] = self.segment[end]


class _Region:
    """Nodes around a quantization or product that become its program."""

    def __init__(self, places: _Places) -> None:
        self.places, self.order, self.segment = places, places.order, places.segment
        self.absorbed: list[fx.Node] = []
        self.leaves: list[fx.Node] = []
        self.names: dict[fx.Node, str] = {}
        self.statements: list[Statement] = []
        self.chain: list[fx.Node] = []

    @property
    def end(self) -> fx.Node:
        """The node that the region's result stands for."""
        return self.chain[-1]

    def reaches(self, node: fx.Node) -> bool:
        """Whether a node can be drawn into the region without crossing a write."""
        return self.segment[node] == self.segment[self.chain[0]]

    def following(self, product: fx.Node) -> Program:
        """Take in the chain of pointwise nodes that are the only readers of a product."""
        self.chain = [product]
        self.names[product] = "y"
        self.absorbed = [product]
        while True:
            readers = _readers(self.end)
            node = readers[0] if len(readers) == 1 else None
            found = call_of(node) if node is not None and self.reaches(node) else None
            if node is None or found is None or found[0] in REDUCTIONS or not _same_shape(node, product):
                break
            if not _contiguous(node):  # an operand in another memory format gave it that; somebody may see it
                break
            given = [a for a in found[1] if isinstance(a, fx.Node)]
            if self.end not in given or not all(_promotes(o, node) for o in given):
                break  # it may read no more than a dtype: x.type_as(product)
            operands = [a for a in given if a not in self.names]
            if not all(self._readable(o, product) for o in operands) or len(self.leaves) + len(operands) > MAX_INPUTS:
                break
            for other in operands:
                self._operand(other)
            self._state(node, *found)
            self.chain.append(node)
        return Program(tuple(self.statements))

    def trimmed(self, program: Program) -> Program:
        """Leave out casts to a wider type at the end: the narrow one is cheaper to write."""
        statements = list(program.statements)
        while len(self.chain) > 1 and _widens(self.end):
            self.absorbed.remove(self.chain.pop())
            statements.pop()
        used = {name for s in statements for name in s.names()}
        statements = [s for s in statements if s.name in used or s is statements[-1]]
        return Program(tuple(statements))

    def before(self, quantization: fx.Node) -> Program:
        """Take in the nodes that only a quantization reads: pointwise ones and one reduction along the last axis."""
        x = node_arg(quantization, 0)
        self.chain = [quantization]
        inside: set[fx.Node] = {quantization}
        wanted, waiting = {x}, [(-self.order[x], x)]
        reductions = 0
        while waiting:  # the last one first
            _, node = heapq.heappop(waiting)
            if not self.reaches(node):
                continue
            found = call_of(node)
            alone = set(_readers(node)) <= inside
            if found is None or not (alone or _widens(node)) or not _broadcasts(node, x):
                continue
            operands = [a for a in found[1] if isinstance(a, fx.Node)]
            if not all(self._readable(o, x) and _promotes(o, node) for o in operands):
                continue
            if found[0] in REDUCTIONS:
                if reductions or found[1][-1] is None or not _same_shape(operands[0], x):
                    continue
                reductions += 1
            inside.add(node)
            for operand in operands if alone else ():
                if operand not in wanted:
                    wanted.add(operand)
                    heapq.heappush(waiting, (-self.order[operand], operand))
        inside.discard(quantization)
        if x not in inside:
            return Program()
        self.absorbed = []
        for node in sorted(inside, key=self.order.__getitem__):
            found = call_of(node)
            assert found is not None
            for other in found[1]:
                if isinstance(other, fx.Node) and other not in inside and other not in self.names:
                    self._leaf(other)
            self._state(node, *found)
        return Program(tuple(self.statements))

    def drop(self) -> None:
        """Erase what is not read any more."""
        _erase(sorted(dict.fromkeys(self.absorbed), key=self.order.__getitem__, reverse=True))

    def _readable(self, node: fx.Node, like: fx.Node) -> bool:
        value, target = node.meta.get("val"), like.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS or value.device != target.device:
            return False
        return value.layout == torch.strided and _broadcasts(node, like)

    def _operand(self, node: fx.Node) -> None:
        """Name an operand: a cast from a narrower type is read as that type."""
        found = call_of(node)
        if found is not None and found[0] == "to" and _widens(node) and self.reaches(node):
            if found[1][0] not in self.names:
                self._leaf(found[1][0])
            self._state(node, *found)
        else:
            self._leaf(node)

    def _leaf(self, node: fx.Node) -> None:
        self.names[node] = f"x{len(self.leaves)}"
        self.leaves.append(node)

    def _state(self, node: fx.Node, function: str, arguments: Iterable[Any]) -> None:
        name, dtype = f"v{len(self.statements)}", node.meta["val"].dtype
        operands = list(arguments)
        self.absorbed.append(node)
        if function == "to" and operands[0].meta["val"].dtype == dtype:
            self.names[node] = self.names[operands[0]]
            return
        named = tuple(self.names[a] if isinstance(a, fx.Node) else a for a in operands)
        self.statements.append(Statement(name, dtype, function, named))
        self.names[node] = name


def _same_kernel(fused: fx.Node, parts: set[fx.Node]) -> bool:
    """Whether what runs the parts (a plug-in's kernel, say) also runs what they become; never the reference."""
    name = dispatch(fused.target, fused).name
    ours = [part for part in parts if part.target in (QUANTIZE, LINEAR)]
    return name != "reference" and all(dispatch(part.target, part).name == name for part in ours)


def _quantizes(node: fx.Node) -> bool:
    """Whether a node makes codes: an activation of 16 bits stays as it is, and its transform is an operator alone."""
    return node.target is QUANTIZE and bits_of(node) != 16


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that need a value; what only asserts its type does not."""
    return [user for user in node.users if user.target is not _ASSERT]


def _erase(nodes: Iterable[fx.Node]) -> None:
    """Erase nodes, given last first, that nothing but assertions reads."""
    for node in nodes:
        if _readers(node):
            continue
        for user in list(node.users):
            user.graph.erase_node(user)
        node.graph.erase_node(node)


def _split(product: fx.Node) -> list[int] | None:
    """Return the columns of each part of a merged product, or None."""
    readers = _readers(product)
    if len(readers) != 1 or readers[0].target is not aten.split_with_sizes.default:
        return None
    sizes = readers[0].args[1]
    whole = isinstance(sizes, list | tuple) and all(type(s) is int for s in sizes)
    axis = readers[0].args[2] if len(readers[0].args) > 2 else 0
    rank = product.meta["val"].dim()
    only_parts = all(user.target is operator.getitem for user in readers[0].users)
    # Parts are views into rows; fused, they are contiguous. Who sees strides keeps them.
    seen = [user for part in readers[0].users for user in part.users]
    only_parts = only_parts and not any(user.op == "output" or user.target is aten.as_strided.default for user in seen)
    # A copy of a view (`q.contiguous()`) would be the part itself, and a write to it one to the part.
    only_parts = only_parts and not any(_written(part) for part in readers[0].users)
    return list(sizes) if whole and axis in (-1, rank - 1) and only_parts else None  # type: ignore[arg-type]


def _written(node: fx.Node) -> bool:
    """Whether something writes to a value, or to what may share its memory."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if mutates(user) and user.target is not _ASSERT:
                return True
            schema = getattr(user.target, "_schema", None)
            shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
            if user not in seen and (shares or user.target in (operator.getitem, aten.type_as.default)):
                seen.add(user)
                waiting.append(user)
    return False


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return [str(s) for s in a.meta["val"].shape] == [str(s) for s in b.meta["val"].shape]


def _promotes(operand: fx.Node, node: fx.Node) -> bool:
    """Whether PyTorch computes with an operand as it is: one without axes is first rounded to the result's dtype."""
    value, result = operand.meta["val"], node.meta["val"]
    tensor = isinstance(value, torch.Tensor)  # or a number that changes between calls
    return tensor and bool(value.dim() or value.dtype == result.dtype or not result.dim())


def _contiguous(node: fx.Node) -> bool:
    value = node.meta["val"]
    wanted = torch._prims_common.make_contiguous_strides_for(value.shape)
    return all(str(s) == str(w) or str(n) == "1" for s, w, n in zip(value.stride(), wanted, value.shape, strict=True))


def _broadcasts(node: fx.Node, like: fx.Node) -> bool:
    """Whether a tensor broadcasts to the shape of another, whatever dynamic sizes become."""
    shape = [str(s) for s in node.meta["val"].shape]
    target = [str(s) for s in like.meta["val"].shape]
    if len(shape) > len(target):
        return False
    return all(a in ("1", b) for a, b in zip(reversed(shape), reversed(target), strict=False))


def _widens(node: fx.Node) -> bool:
    """Whether a node is a cast to a wider type."""
    found = call_of(node)
    if found is None or found[0] != "to":
        return False
    source = found[1][0].meta["val"].dtype
    return source in (torch.bfloat16, torch.float16) and node.meta["val"].dtype == torch.float32
