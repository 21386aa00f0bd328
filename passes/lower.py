"""Choose a kernel for each operator."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from ..graph.nodes import node_words
from ..ops.registry import KERNEL, OPERATORS, dispatch, in_16_bits, served
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, decisions_of

log = logging.getLogger(__name__)


def _nothing_left(graph_module: fx.GraphModule, context: Context) -> str | None:
    """Say which operator of ours no kernel was chosen for."""
    known = served()
    left = [node for node in graph_module.graph.nodes if node.target in known and KERNEL not in node.meta]
    return f"no kernel was chosen for {node_words(left[0])}" if left else None


@dataclass(frozen=True)
class Lower(Pass):
    """Replace each ``tahf4::`` operator (and each of a plug-in's own) by the best kernel registered for its device.

    The reference operators serve every device. A kernel of a plug-in or backend that serves an operator's
    device and inputs (:func:`tahf4_compiler.ops.registry.register_kernel`) takes its place::

        y = tahf4.linear(...)        ->        y = mine.linear_sm90(...)
    """

    exact = True
    ensures = (_nothing_left,)
    after = ("quantize", "share", "smooth", "rotate", "scale_search", "attention", "fuse")

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        chosen: Counter[str] = Counter()
        modified, operators = False, served()
        for node in graph_module.graph.nodes:
            if node.target not in operators:
                continue
            forced = context.options.kernels == "reference"
            kernel = dispatch(node.target, node, reference=forced)
            if kernel.name == "reference" and not forced and node.target in OPERATORS and not in_16_bits(node):
                _say_once(*_place(node))
            node.meta[KERNEL] = kernel.name
            modified |= node.target is not kernel.target
            node.target = kernel.target
            context.matched(node)
            chosen[f"{kernel.operator._schema.name.replace('::', '.')} -> {kernel.name}"] += 1
            for decision in decisions_of(node):
                decision.kernel = kernel.name
        for text, count in sorted(chosen.items()):
            context.note(f"{count} x {text}")
        return PassResult(graph_module, modified)


def _place(node: fx.Node) -> tuple[str, str]:
    """Return device and dtype of what is quantized, or of what a product writes."""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    floats = [v for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point]
    return next(((v.device.type, str(v.dtype).removeprefix("torch.")) for v in floats), ("cpu", "float32"))


@functools.cache
def _say_once(device: str, dtype: str) -> None:
    log.warning(
        "no compiled HiF4 kernel serves device %r with %s: the plain-PyTorch reference runs (exact, but slower than "
        "the original linears)",
        device,
        dtype,
    )
