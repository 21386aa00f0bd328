"""Show the activations of linears to a calibration."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import ops  # noqa: F401  (defines torch.ops.tahf4)
from ..graph.inputs import INPUT, ROLE, PackedWeight
from ..graph.nodes import linears, mutates, node_arg, weight_input
from ..model.reasons import Cause
from ..pipeline.activations import call, packed_input
from ..pipeline.base import Pass, PassResult
from ..pipeline.context import Context, decisions_of


@dataclass(frozen=True)
class Observe(Pass):
    """Insert an observer for each distinct activation of the linears that HiF4 may hold.

    Before::

        q = aten.linear(x, wq)
        k = aten.linear(x, wk)

    After (``handle`` is a new input: whose activation it is, known at run time)::

        tahf4.observe(x, handle)
        q = aten.linear(x, wq)
        k = aten.linear(x, wk)

    Linears of the body that were kept in high precision by hand are observed as well.
    """

    exact = True
    after = ("plan",)

    def __call__(self, graph_module: fx.GraphModule, context: Context) -> PassResult:
        """Rewrite in place."""
        graph = graph_module.graph
        readers: dict[Any, list[fx.Node]] = defaultdict(list)
        epoch, chosen = 0, set(_candidates(graph))
        for node in graph.nodes:
            epoch += mutates(node)  # the activation may not be what it was
            if node in chosen:
                readers[(node.args[0], epoch)].append(node)
        for (x, _), nodes in readers.items():
            sources = [weight_input(node_arg(node, 1)) for node in nodes]
            weights = tuple(dict.fromkeys(s.meta[INPUT].index for s in sources if s is not None))
            handle = packed_input(graph, sources[0], PackedWeight(weights), "observer")  # type: ignore[arg-type]
            with graph.inserting_before(nodes[0]):
                call(nodes[0], torch.ops.tahf4.observe.default, (x, handle))
            context.matched(nodes[0])
        return PassResult(graph_module, bool(readers))


BY_CHOICE = (Cause.KEPT, Cause.SENSITIVITY, Cause.STEP)


def _candidates(graph: fx.Graph) -> list[fx.Node]:
    found = []
    for node in linears(graph):
        role, decisions = node.meta.get(ROLE), decisions_of(node)
        if role is None or not role.body or not decisions or decisions[0].weight_index < 0:
            continue
        if decisions[0].decision == "hif4" or decisions[0].cause in BY_CHOICE:
            found.append(node)
    return found
