"""Packed linears in a graph: what a model holds in HiF4 is read as such, and shared like the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import ops  # noqa: F401  (defines torch.ops.tahf4)
from ..graph.inputs import INPUT, GraphInput, HeldWeight, PackedInput
from ..torch_private.tensors import real_tensors
from .checksum import checksums

__all__ = ["multiplier_groups", "packed_products", "ties"]

QUANTIZE = torch.ops.tahf4.quantize.default
LINEAR = torch.ops.tahf4.linear.default
PACKED_LINEAR = torch.ops.tahf4.packed_linear.default


def packed_products(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the products whose weights the model itself holds in HiF4."""
    for node in graph.find_nodes(op="call_function", target=LINEAR):
        codes = node.args[2]
        source = codes.meta.get(INPUT) if isinstance(codes, fx.Node) else None
        if isinstance(source, PackedInput) and isinstance(source.weight, HeldWeight):
            yield node


def multiplier_groups(graph: fx.Graph) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the multipliers of packed linears, for each activation that several of them read."""
    found: dict[fx.Node, dict[int, None]] = defaultdict(dict)
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (PACKED_LINEAR, QUANTIZE) or len(node.args) < 2:
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
    with real_tensors(), torch.no_grad():
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
