"""Packed linears in a graph: what a model holds in HiF4 is read as such, and shared like the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.inputs import INPUT, GraphInput, HeldWeight, PackedInput
from ..graph.nodes import node_arg
from ..ops import registry
from .checksum import checksums

__all__ = ["adopt", "multiplier_groups", "packed_products", "ties"]

QUANTIZE = torch.ops.tahf4.quantize.default
LINEAR = torch.ops.tahf4.linear.default
_PARTS = (("codes", 2, "weight_codes"), ("scales", 3, "weight_scales"))


def adopt(graph: fx.Graph) -> list[fx.Node]:
    """Write what :class:`tahf4_compiler.HiF4Linear` computes in the operators that passes know.

    A kernel's operator becomes the one that it runs; parameters that hold codes and scales become packed inputs.

    Returns:
        The products whose weights are held in HiF4.
    """
    by_target = {k.target: k.operator for k in registry.kernels() if k.operator in (QUANTIZE, LINEAR)}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in by_target:
            node.target = by_target[node.target]
            # A trace leaves out what has its default; passes read arguments by their position.
            rest = node.target._schema.arguments[len(node.args) :]
            given = (*node.args, *(node.kwargs.get(a.name, a.default_value) for a in rest))
            node.args = given[:-1] if given[-1] == 1 else given  # the span, which few have
            node.kwargs = {}
    found = []
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        codes, scales = (_parameter(node.args[at], name) for _, at, name in _PARTS)
        if codes is None or scales is None:
            continue
        weight = HeldWeight(codes.index, scales.index)
        for part, at, _ in _PARTS:
            node_arg(node, at).meta[INPUT] = PackedInput(part, weight)
        found.append(node)
    return found


def _parameter(node: Any, name: str) -> GraphInput | None:
    """Return what a placeholder stands for if it is a packed linear's parameter of some name."""
    source = node.meta.get(INPUT) if isinstance(node, fx.Node) else None
    if isinstance(source, PackedInput) and isinstance(source.weight, HeldWeight):  # the module is called twice
        kind = "weight_codes" if source.part == "codes" else "weight_scales"
        return GraphInput("parameter", kind, source.positions[0]) if kind == name else None
    if isinstance(source, GraphInput) and source.kind == "parameter" and source.path.rpartition(".")[2] == name:
        return source
    return None


def packed_products(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the products whose weights the model itself holds in HiF4."""
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        codes = node.args[2]
        source = codes.meta.get(INPUT) if isinstance(codes, fx.Node) else None
        if isinstance(source, PackedInput) and isinstance(source.weight, HeldWeight):
            yield node


def multiplier_groups(graph: fx.Graph) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the multipliers of packed linears, for each activation that several of them read."""
    targets = {k.target for k in registry.kernels() if k.operator is QUANTIZE}
    found: dict[fx.Node, dict[int, None]] = defaultdict(dict)
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in targets or len(node.args) < 2:
            continue
        x, factor = node.args[:2]
        source = factor.meta.get(INPUT) if isinstance(factor, fx.Node) else None
        if isinstance(x, fx.Node) and isinstance(source, GraphInput) and source.kind == "parameter":
            found[x][source.index] = None
    return tuple(tuple(group) for group in found.values() if len(group) > 1)


def ties(groups: Sequence[Sequence[int]], values: Sequence[Any], check: str = "auto") -> tuple[tuple[int, ...], ...]:
    """Return for each multiplier the position of the first one of its group that is equal to it.

    Two quantizations of one activation are one if their multipliers are equal. That belongs to the modules at hand,
    so it is looked at again whenever a graph is called.

    Args:
        groups: positions among the values, see :func:`multiplier_groups`.
        values: the graph's arguments.
        check: how a change is noticed, see :class:`tahf4_compiler.options.Options`.
    """
    if not groups:
        return ()
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.no_grad():
        plain = {i: values[i] for group in groups for i in group if type(values[i]) in (Tensor, nn.Parameter)}
        real = [i for i, value in plain.items() if value.device.type != "meta"]
        sums = dict(zip(real, checksums([plain[i] for i in real], check), strict=True))

        def same(i: int, j: int) -> bool:
            if values[i] is values[j]:
                return True
            return i in sums and j in sums and sums[i] == sums[j] and values[i].shape == values[j].shape

        out = []
        for group in groups:
            firsts: list[int] = []
            labels = []
            for i in group:
                first = next((j for j in firsts if same(i, j)), None)
                if first is None:
                    firsts.append(i)
                labels.append(i if first is None else first)
            out.append(tuple(labels))
    return tuple(out)
