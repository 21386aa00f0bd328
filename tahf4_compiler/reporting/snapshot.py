"""What a graph looks like after each pass, as plain data: for reports that are written after the graphs are gone.

A :class:`Recorder` is called with the graph after every pass. Between two passes it listens to the graph, so that
each new node knows which nodes it came in the place of, or drew in.
"""

from __future__ import annotations

import functools
import operator
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph.inputs import INPUT, PackedInput
from ..graph.nodes import LINEAR, is_product, module_classes, product_weights, size_hint
from ..ops.program import Program
from ..ops.registry import KERNEL
from ..pipeline.context import decisions_of

__all__ = ["NodeView", "Recorder", "Snapshot", "block_path"]

_NUMBERS = "tahf4_numbers"
_ATTENTIONS = ("scaled_dot_product", "tahf4.attention", "tahf4_cpu.attention", "tahf4_triton.attention")


@dataclass(frozen=True)
class NodeView:
    """A node as plain data.

    Attributes:
        name: in the graph.
        op: ``"placeholder"``, ``"call_function"``, ``"get_attr"`` or ``"output"``.
        target: the operator, or what a placeholder stands for.
        arguments: as text.
        inputs: names of the nodes that it reads.
        module: path of the innermost module that it was called in, ``""`` for the root.
        value: dtype and shape of the result, such as ``"bf16[1, 320, 192]"``; several are joined by ``;``.
        bytes: of the result.
        flops: of products and attention cores, 0 for everything else.
        precision: ``"hif4"``, a dtype, or ``""``.
        kernel: that runs it, after ``lower``.
        linears: paths of the planned linears that it computes.
        numbers: that passes attached.
    """

    name: str
    op: str
    target: str
    arguments: str = ""
    inputs: tuple[str, ...] = ()
    module: str = ""
    value: str = ""
    bytes: int = 0
    flops: int = 0
    precision: str = ""
    kernel: str = ""
    linears: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """The graph after one pass.

    Attributes:
        stage: name of the pass, or ``"captured"``.
        nodes: in execution order.
        origins: for each node that the graph before did not have, the nodes of that graph that it stands for.
    """

    stage: str
    nodes: tuple[NodeView, ...]
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Recorder:
    """Keeps a snapshot after each pass.

    Attributes:
        snapshots: in the order of the passes.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.snapshots: list[Snapshot] = []
        self._views: dict[fx.Node, tuple[_Seen, NodeView]] = {}
        self._replaced: dict[str, list[str]] = defaultdict(list)

    def __call__(self, stage: str, graph_module: fx.GraphModule) -> None:
        """Take the graph after a pass."""
        nodes = tuple(self._viewed(node) for node in graph_module.graph.nodes)
        before = self.snapshots[-1] if self.snapshots else None
        origins = _origins(before.nodes, nodes, self._replaced) if before is not None else {}
        self.snapshots.append(Snapshot(stage, nodes, origins))
        self._replaced.clear()
        if self._listen not in graph_module._replace_hooks:
            graph_module._register_replace_node_hook(self._listen)

    def end(self, graph_module: fx.GraphModule) -> None:
        """Listen to a graph no more. Inductor has no key for a graph that somebody listens to, and caches none."""
        if self._listen in graph_module._replace_hooks:
            graph_module._unregister_replace_node_hook(self._listen)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """Return the same: a copy of a graph that it listens to goes on to be listened to."""
        return self

    def _viewed(self, node: fx.Node) -> NodeView:
        """Return a node as plain data: as before, unless something of it changed."""
        seen, known = _Seen.of(node), self._views.get(node)
        if known is None or not known[0].same(seen):
            known = self._views[node] = (seen, _view(node))
        return known[1]

    def _listen(self, old: fx.Node, new: str, user: fx.Node) -> None:
        if new not in self._replaced[old.name]:
            self._replaced[old.name].append(new)


@dataclass(frozen=True)
class _Seen:
    """What the view of a node is made from: objects that are replaced when they change, and values."""

    objects: tuple[Any, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, node: fx.Node) -> _Seen:
        meta = node.meta
        source, decisions = meta.get(INPUT), decisions_of(node)
        values = (
            node.name, tuple(n.name for n in node.all_input_nodes), meta.get(KERNEL), dict(meta.get(_NUMBERS, ())),
            [(d.module, d.k, d.n) for d in decisions], _module(node) if isinstance(source, PackedInput) else "",
        )  # fmt: skip
        objects = (node.target, node.args, node.kwargs, meta.get("val"), source, meta.get("nn_module_stack"))
        return cls(objects, values)

    def same(self, other: _Seen) -> bool:
        """Whether it is made from the same."""
        return all(map(operator.is_, self.objects, other.objects)) and self.values == other.values


def _origins(
    old: Sequence[NodeView], new: Sequence[NodeView], replaced: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Return for each new node the old nodes that it replaced or that flowed into what it replaced."""
    before, now = {n.name for n in old}, {n.name: n for n in new}
    fresh = {name for name in now if name not in before}
    readers: dict[str, list[str]] = defaultdict(list)
    for node in old:
        for source in node.inputs:
            readers[source].append(node.name)
    found: dict[str, list[str]] = {name: [] for name in fresh}
    heirs: dict[str, set[str]] = {}
    for node in reversed(old):
        if node.name in now:
            continue
        # Replaced, perhaps more than once, or else computed by whatever its readers became.
        mine, waiting = set(), list(replaced.get(node.name, ()))
        seen = set(waiting)
        while waiting:
            name = waiting.pop()
            if name in now:
                mine.add(name)
            for further in replaced.get(name, ()) if name not in now else ():
                if further not in seen:
                    seen.add(further)
                    waiting.append(further)
        if not mine:
            mine = set().union(*(heirs.get(reader, set()) for reader in readers[node.name]))
        heirs[node.name] = mine
        for name in mine & fresh:
            found[name].append(node.name)
    used = defaultdict(list)
    for view in new:
        for source in view.inputs:
            used[source].append(view.name)
    for view in reversed(new):  # what a new node needs belongs to it: its quantization, its packed weights
        if view.name in fresh and not found[view.name]:
            found[view.name] = list({old: None for user in used[view.name] for old in found.get(user, ())})
    for view in new:
        if view.name in fresh and not found[view.name]:
            found[view.name] = list({old: None for source in view.inputs for old in found.get(source, ())})
    order = {node.name: i for i, node in enumerate(old)}
    return {name: tuple(sorted(sources, key=order.__getitem__)) for name, sources in found.items() if sources}


_SHORT = {
    torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8", torch.bool: "b8",
}  # fmt: skip


def _view(node: fx.Node) -> NodeView:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    tensors = [value for value in leaves if isinstance(value, torch.Tensor)]
    decisions = decisions_of(node)
    target = _target(node)
    dtype = next((t.dtype for t in tensors), None)
    precision = "hif4" if target.startswith("tahf4") or isinstance(node.meta.get(INPUT), PackedInput) else ""
    return NodeView(
        name=node.name,
        op=node.op,
        target=target,
        arguments=_arguments(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        module=_module(node),
        value="; ".join(f"{_dtype(t.dtype)}[{', '.join(map(str, t.shape))}]" for t in tensors),
        bytes=sum(_count(t) * t.element_size() for t in tensors),
        flops=_flops(node, tensors, decisions),
        precision=precision or ("" if dtype is None else _dtype(dtype)),
        kernel=node.meta.get(KERNEL, ""),
        linears=tuple(dict.fromkeys(d.module for d in decisions)),
        numbers=dict(node.meta.get(_NUMBERS, {})),
    )


def _dtype(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _count(value: torch.Tensor) -> int:
    total = 1
    for size in value.shape:
        total *= size_hint(size)
    return total


def _target(node: fx.Node) -> str:
    source = node.meta.get(INPUT)
    if node.op == "placeholder" and source is not None:
        return source.part if isinstance(source, PackedInput) else source.kind
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else node.op


def _module(node: fx.Node) -> str:
    source = node.meta.get(INPUT)
    if node.op == "placeholder":
        path = getattr(source, "path", "")
        if isinstance(source, PackedInput):
            return next((_module(user) for user in node.users), "")
        return path.rpartition(".")[0] if getattr(source, "kind", "user") != "user" else ""
    return next(reversed(module_classes(node)), "")


def _arguments(node: fx.Node) -> str:
    source = node.meta.get(INPUT)
    if node.op == "placeholder":
        return getattr(source, "path", "")
    parts = [_text(a) for a in node.args] + [f"{name}={_text(a)}" for name, a in node.kwargs.items()]
    return ", ".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value).removeprefix("torch.")


def _flops(node: fx.Node, tensors: Sequence[torch.Tensor], decisions: Sequence[Any]) -> int:
    if node.op != "call_function" or not tensors:
        return 0
    if node.target is LINEAR:
        x = _value(node, 0, "input")
        return 2 * _count(x) * size_hint(tensors[0].shape[-1]) if x is not None else 0
    if ".fused_attention" in str(node.target):
        given: Any = node.args
        shape = Program.parse(given[1]).shape([x.meta["val"] for x in given[0]])
        batch, rows, width = map(size_hint, shape)
        keys, channels = map(size_hint, given[4].meta["val"].shape[2:])
        return 2 * batch * rows * keys * (width + given[5] * channels)
    if any(name in str(node.target) for name in _ATTENTIONS):
        query, key, value = (_value(node, i, name) for i, name in enumerate(("query", "key", "value")))
        if query is None or key is None or value is None:
            return 0
        width = size_hint(query.shape[-1])
        pairs = _count(query) // max(width, 1) * size_hint(key.shape[-2])
        return 2 * pairs * (width + size_hint(value.shape[-1]))
    weights = product_weights(node)
    if not decisions or not is_product(node, weights):
        return 0
    values = (n.meta.get("val") for n in node.all_input_nodes if n not in weights)
    first = next((value for value in values if isinstance(value, torch.Tensor)), None)
    if first is None:
        return 0
    rows = 1
    for size in first.shape[:-1]:
        rows *= size_hint(size)
    return sum(2 * rows * d.k * d.n for d in {id(d): d for d in decisions}.values())


def _value(node: fx.Node, index: int, name: str) -> torch.Tensor | None:
    """Return the value of an argument that is a tensor."""
    argument = node.args[index] if index < len(node.args) else node.kwargs.get(name)
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


@functools.lru_cache(maxsize=1 << 16)
def block_path(module: str) -> str:
    """Return the path of the outermost numbered member around a module: ``blocks.3`` of ``blocks.3.ffn.net.0``."""
    match = re.match(r"(?:[^.]*[^\d.][^.]*\.)*?\d+(?=\.|$)", module)
    return match.group(0) if match else ""
