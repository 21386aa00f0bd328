"""Choose a kernel for each operator."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from ..graph.inputs import DECISION
from ..ops.registry import KERNEL, select, served
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, Decision


@dataclass(frozen=True)
class Lower(Pass):
    """Replace each ``tahf4::`` operator (and each of a plug-in's own) by the best kernel registered for its device.

    The reference operators serve every device. A kernel of a plug-in or backend that serves an operator's
    device and inputs (:func:`tahf4_compiler.ops.registry.register_kernel`) takes its place::

        y = tahf4.linear(...)        ->        y = mine.linear_sm90(...)
    """

    after = ("quantize", "share", "smooth", "rotate", "scale_search", "fuse")

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        chosen: Counter[str] = Counter()
        modified, operators = False, served()
        for node in graph_module.graph.nodes:
            if node.target not in operators:
                continue
            kernel = select(node, reference=context.options.kernels == "reference")
            node.meta[KERNEL] = kernel.name
            modified |= node.target is not kernel.target
            node.target = kernel.target
            context.matched(node)
            chosen[f"{kernel.operator._schema.name.replace('::', '.')} -> {kernel.name}"] += 1
            for decision in _decisions(node):
                decision.kernel = kernel.name
        for text, count in sorted(chosen.items()):
            context.note(f"{count} x {text}")
        return PassResult(graph_module, modified)


def _decisions(node: fx.Node) -> list[Decision]:
    found = node.meta.get(DECISION, [])
    return found if isinstance(found, list) else [found]
