"""What may be drawn into a quantization or a product, and the program that it becomes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..graph.nodes import mutates, node_arg
from ..ops.program import DTYPES, REDUCTIONS, Program, Statement, call_of, factors_of
from ..torch_private.tensors import contiguous_strides

__all__ = ["MAX_INPUTS", "MAX_RANK", "MAX_RANKS", "Places", "Region", "erase", "readers"]

aten = torch.ops.aten
_ASSERT = aten._assert_tensor_metadata.default
_FLOATS = tuple(DTYPES.values())
MAX_INPUTS = 12
"""Tensors that a program reads, at most; the C++ kernels run programs of up to 16."""
MAX_RANK = 64
"""Of a low-rank branch that is computed behind its product; a wider one is a product of PyTorch."""
MAX_RANKS = 192
"""Of all branches together whose ``x A`` is computed where their activation is quantized."""


class Places:
    """Where nodes stand: numbers that grow along the graph, and which stretch between writes to memory.

    What is put into the graph afterwards stands nowhere, and is drawn into nothing.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Number the nodes."""
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        # Nothing moves across a node that writes to memory.
        segment, self.segment = 0, {}
        for node in graph.nodes:
            segment += mutates(node)
            self.segment[node] = segment


class Region:
    """Nodes around a quantization or product that become its program."""

    def __init__(self, places: Places) -> None:
        """Hold no node."""
        self.order, self.segment = places.order, places.segment
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
        return self.segment.get(node) == self.segment[self.chain[0]]

    def following(self, product: fx.Node) -> Program:
        """Take in the chain of pointwise nodes that are the only readers of a product."""
        self.chain = [product]
        self.names[product] = "y"
        self.absorbed = [product]
        while True:
            users = readers(self.end)
            node = users[0] if len(users) == 1 else None
            found = call_of(node) if node is not None and self.reaches(node) else None
            if node is None or found is None or found[0] in REDUCTIONS or not _same_shape(node, product):
                break
            if not _contiguous(node):  # an operand in another memory format gave it that; somebody may see it
                break
            given = [a for a in found[1] if isinstance(a, fx.Node)]
            if self.end not in given or not all(_promotes(o, node) for o in given):
                break  # it may read no more than a dtype: x.type_as(product)
            operands = [a for a in given if a not in self.names]
            inputs = sum(1 if self._factors(o, node) is None else 2 for o in operands)
            if not all(self._readable(o, product) for o in operands) or len(self.leaves) + inputs > MAX_INPUTS:
                break
            for other in operands:
                self._operand(other, node)
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

    def branches(self, quantization: fx.Node) -> dict[fx.Node, fx.Node]:
        """Return ``matmul(x, A)`` -> ``A`` for the branches that read what a quantization reads; none if too wide."""
        x = node_arg(quantization, 0)
        self.chain = [quantization]
        found: dict[fx.Node, fx.Node] = {}
        for node in readers(x):
            factors = factors_of(node)
            # Their readers come after them, and so after the quantization.
            later = self.reaches(node) and self.order[node] > self.order[quantization]
            if factors is None or not later or factors[0] is not x or not all(_plain_on(f, x) for f in factors):
                continue
            if self._known_before(factors[1], quantization):
                found[node] = factors[1]
        ranks = [factor.meta["val"].shape[1] for factor in found.values()]
        return found if all(isinstance(rank, int) for rank in ranks) and sum(ranks) <= MAX_RANKS else {}

    def moved(self, factor: fx.Node, node: fx.Node) -> fx.Node:
        """Return a factor of :meth:`branches` that is computed before a node: a copy of a cast that comes later."""
        return factor if self.order[factor] < self.order[node] else factor.graph.node_copy(factor)

    def _known_before(self, factor: fx.Node, node: fx.Node) -> bool:
        """Whether a factor, or what it is a cast of, is computed before a node."""
        found = call_of(factor)
        source = found[1][0] if found is not None and found[0] == "to" else factor
        return self.order.get(source, len(self.order)) < self.order[node]

    def before(self, quantization: fx.Node, branches: Iterable[fx.Node] = ()) -> Program:
        """Take in the nodes that only a quantization, and branches that are computed with it, read.

        These are pointwise ones and one reduction along the last axis.
        """
        x = node_arg(quantization, 0)
        self.chain = [quantization]
        ends: set[fx.Node] = {quantization, *branches}
        inside = set(ends)
        wanted, waiting = {x}, [(0, x)]
        reductions = 0
        while waiting:  # the last one first
            _, node = heapq.heappop(waiting)
            if not self.reaches(node):
                continue
            found = call_of(node)
            alone = set(readers(node)) <= inside
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
                    heapq.heappush(waiting, (-self.order.get(operand, 0), operand))
        inside -= ends
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
        erase(sorted(dict.fromkeys(self.absorbed), key=self.order.__getitem__, reverse=True))

    def _readable(self, node: fx.Node, like: fx.Node) -> bool:
        return _plain_on(node, like) and _broadcasts(node, like)

    def _operand(self, node: fx.Node, reader: fx.Node) -> None:
        """Name an operand: a branch of low rank is computed, and a cast from a narrower type is read as that type."""
        found, factors = call_of(node), self._factors(node, reader)
        if factors is not None:
            self._branch(node, factors)
        elif found is not None and found[0] == "to" and _widens(node) and self.reaches(node):
            if found[1][0] not in self.names:
                self._leaf(found[1][0])
            self._state(node, *found)
        else:
            self._leaf(node)

    def _factors(self, node: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return the factors of a branch of low rank, or of its cast, that nothing else reads."""
        if readers(node) != [reader] or not self.reaches(node):
            return None
        found = call_of(node)
        if found is not None and found[0] == "to":
            return self._factors(found[1][0], node)
        factors, product = factors_of(node), self.chain[0]
        if factors is None or not all(_plain_on(factor, product) for factor in factors):
            return None
        left, right = (factor.meta["val"].shape for factor in factors)
        fits = [str(size) for size in (*left[:-1], right[1])] == [str(size) for size in product.meta["val"].shape]
        return factors if fits and isinstance(right[0], int) and right[0] <= MAX_RANK else None

    def _branch(self, node: fx.Node, factors: tuple[fx.Node, fx.Node]) -> None:
        """Take in a product of two factors, and its cast."""
        found = call_of(node)
        if found is not None:
            self._branch(found[1][0], factors)
            self._state(node, *found)
            return
        self.names[node], first = f"v{len(self.statements)}", len(self.leaves)
        named = (f"x{first}", f"x{first + 1}")
        self.statements.append(Statement(self.names[node], node.meta["val"].dtype, "matmul", named))
        self.leaves += factors
        self.absorbed.append(node)

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


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that need a value; what only asserts its type does not."""
    return [user for user in node.users if user.target is not _ASSERT]


def erase(nodes: Iterable[fx.Node]) -> None:
    """Erase nodes, given last first, that nothing but assertions reads."""
    for node in nodes:
        if readers(node):
            continue
        for user in list(node.users):
            user.graph.erase_node(user)
        node.graph.erase_node(node)


def _plain_on(node: fx.Node, like: fx.Node) -> bool:
    """Whether a node is a plain tensor of floating-point numbers on the device of another."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS or value.device != like.meta["val"].device:
        return False
    return value.layout == torch.strided


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return [str(s) for s in a.meta["val"].shape] == [str(s) for s in b.meta["val"].shape]


def _promotes(operand: fx.Node, node: fx.Node) -> bool:
    """Whether PyTorch computes with an operand as it is: one without axes is first rounded to the result's dtype."""
    value, result = operand.meta["val"], node.meta["val"]
    tensor = isinstance(value, torch.Tensor)  # or a number that changes between calls
    return tensor and bool(value.dim() or value.dtype == result.dtype or not result.dim())


def _contiguous(node: fx.Node) -> bool:
    value = node.meta["val"]
    wanted = contiguous_strides(value.shape)
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
