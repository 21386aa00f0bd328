"""Two graphs of one computation, run as one: each value as the one graph computes it, or as the other does."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..graph.inputs import INPUT
from ..graph.nodes import tensor_meta
from ..pipeline.running import relative_error, running

__all__ = ["Hybrid", "Pair"]

_HELD = ("placeholder", "get_attr")


@dataclass(frozen=True)
class Pair:
    """A value of the later graph that stands where one of the earlier graph stood.

    Attributes:
        after: node of the later graph.
        before: node of the earlier graph.
    """

    after: fx.Node
    before: fx.Node


class Hybrid:
    """A graph before and after one or several passes.

    Attributes:
        pairs: floating-point values that the two compute in other ways.
    """

    def __init__(
        self,
        before: fx.GraphModule,
        after: fx.GraphModule,
        before_args: Sequence[Any],
        after_args: Sequence[Any],
        known: Mapping[str, str] | None = None,
    ) -> None:
        """Find the values that correspond: by name, and by what reads them.

        Args:
            before: the earlier graph.
            after: the later one, whose nodes kept their names where they were not replaced.
            before_args: what the earlier one is called with.
            after_args: what the later one is called with.
            known: for names of the later graph, those of the earlier one in whose place they are known to stand.
        """
        self.before, self.after = before, after
        self._names = {node.name: node for node in before.graph.nodes}
        self._inputs = [
            dict(zip((n.name for n in g.graph.nodes if n.op == "placeholder"), args, strict=True))
            for g, args in ((before, before_args), (after, after_args))
        ]
        self._twin: dict[fx.Node, fx.Node] = {}
        self.pairs = self._correspond(known or {})
        self._of = {pair.before: pair for pair in self.pairs}
        self._replaced = {pair.after: pair for pair in self.pairs}
        self._base, _ = self._evaluate([])

    def leaf(self, node: fx.Node) -> fx.Node | None:
        """Return the earlier graph's node that has the value of a node of the later one, if there is one."""
        return self._twin.get(node)

    def inputs(self, node: fx.Node) -> Any:
        """Return the value of a placeholder, or of a tensor that a pass holds, that only the later graph has."""
        return self._call(self.after, node, {}, 1)

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node of the earlier graph."""
        return self._base[node]

    def local_error(self, pair: Pair) -> float:
        """Return the relative error of a value that the later graph computes from the earlier one's values."""
        with running():
            new = self._later(pair.after, dict(self._base), {}, set())
            if not isinstance(new, torch.Tensor) or new.shape != self._base[pair.before].shape:
                return math.inf
            return relative_error([self._base[pair.before]], [new])

    def run(self, pairs: Iterable[Pair]) -> list[torch.Tensor]:
        """Return the outputs with some values as the later graph computes them."""
        return self._evaluate(pairs)[1]

    def _evaluate(self, pairs: Iterable[Pair]) -> tuple[dict[fx.Node, Any], list[torch.Tensor]]:
        chosen = {pair.before for pair in pairs}
        raw: dict[fx.Node, Any] = {}  # as the earlier graph's operators give them
        out: dict[fx.Node, Any] = {}  # what readers get
        memo: dict[fx.Node, Any] = {}
        result: list[torch.Tensor] = []
        with running():
            for node in self.before.graph.nodes:
                if node.op == "output":
                    flat = fx.node.map_arg(node.args[0], out.__getitem__)
                    result = [v for v in tree_leaves(flat) if isinstance(v, torch.Tensor)]
                    continue
                raw[node] = out[node] = self._call(self.before, node, out, 0)
                if node in chosen:
                    out[node] = self._later(self._of[node].after, raw, memo, chosen, out)
        return raw, result

    def _later(
        self, node: fx.Node, raw: dict[fx.Node, Any], memo: dict[fx.Node, Any], chosen: set[fx.Node], out: Any = None
    ) -> Any:
        """Compute a node of the later graph from values of the earlier one."""
        waiting = [node]
        values = memo
        while waiting:
            top = waiting[-1]
            missing = []
            for source in top.all_input_nodes:
                twin = self._twin.get(source)
                if twin is not None and twin in raw:
                    replaced = source in self._replaced and twin in chosen and twin in (out or ())
                    values[source] = out[twin] if replaced else raw[twin]
                elif source not in values:
                    missing.append(source)
            if missing:
                waiting += missing
                continue
            values[top] = self._call(self.after, top, values, 1)
            waiting.pop()
        return values[node]

    def _call(self, owner: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], which: int) -> Any:
        if node.op == "placeholder":
            return self._inputs[which][node.name]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(owner)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _correspond(self, known: Mapping[str, str]) -> list[Pair]:
        same: dict[fx.Node, fx.Node] = {}  # one name and the same kind of value
        for node in self.after.graph.nodes:
            old = self._names.get(node.name)
            if old is not None and old.op == node.op and (node.op == "output" or _meta(node) == _meta(old)):
                same[node] = old
        pairs: dict[fx.Node, fx.Node] = {}
        for node in self.after.graph.nodes:
            old = self._names.get(known.get(node.name, ""))
            if old is not None and node not in same and _is_float(node) and _meta(node) == _meta(old):
                pairs[node] = old
        dirty: set[fx.Node] = set()
        for node in self.after.graph.nodes:
            old = same.get(node)
            repacked = old is not None and node.op in _HELD and self._held(node, old)
            if old is None or repacked or node.target != old.target or self._differs(node, old, same, pairs):
                dirty.add(node)
            for source in node.all_input_nodes:
                paired = _is_float(source) and (source in pairs or (source in same and source.op not in _HELD))
                if source in dirty and not paired:
                    dirty.add(node)
        for node in self.after.graph.nodes:
            if _is_float(node) and node.op not in ("output", *_HELD) and node in same and node in dirty:
                pairs.setdefault(node, same[node])
        for node, old in same.items():
            # It may hold other numbers under its name: packed weights.
            if _is_float(node) and not (node.op in _HELD and node in dirty):
                self._twin[node] = old
        self._twin.update(pairs)
        pairs = {new: old for new, old in pairs.items() if new.op not in _HELD}
        unique: dict[fx.Node, Pair] = {}
        for new, old in pairs.items():
            unique.setdefault(old, Pair(new, old))
        return [unique[node] for node in self.before.graph.nodes if node in unique]

    def _held(self, node: fx.Node, old: fx.Node) -> bool:
        """Whether an input, or a tensor that a pass holds, is another one under its name."""
        if node.op == "placeholder":
            return bool(node.meta.get(INPUT) != old.meta.get(INPUT))
        return self._call(self.after, node, {}, 1) is not self._call(self.before, old, {}, 0)

    def _differs(
        self, node: fx.Node, old: fx.Node, same: dict[fx.Node, fx.Node], pairs: dict[fx.Node, fx.Node]
    ) -> bool:
        """Whether two calls differ in more than values that took the place of others; those are noted."""
        new_leaves, old_leaves = tree_leaves((node.args, node.kwargs)), tree_leaves((old.args, old.kwargs))
        if len(new_leaves) != len(old_leaves):
            return True
        found = {}
        for a, b in zip(new_leaves, old_leaves, strict=True):
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                if type(a) is not type(b) or repr(a) != repr(b):
                    return True
            elif same.get(a) is not b:
                if a.op in _HELD or not (_is_float(a) and _meta(a) == _meta(b)):
                    return True  # another weight is another call
                found[a] = b
        for a, b in found.items():
            pairs.setdefault(a, b)
        return False


def _meta(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tensor_meta(value) if isinstance(value, torch.Tensor) else type(value)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
