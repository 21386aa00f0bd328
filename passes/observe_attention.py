"""Show the operands of attentions to a calibration that measures them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..graph.inputs import INPUT, GraphInput, PackedWeight
from ..model.reasons import Cause, Reason
from ..pipeline.activations import call, packed_input
from ..pipeline.context import Context
from .attention import Attention, linears_around
from .observe import BY_CHOICE

_OPERANDS = 7
"""Of an attention: tensors, and what belongs to scores. How many bits they get is behind them."""


@dataclass(frozen=True)
class ObserveAttention(Attention):
    """Insert an observer for each attention that the pass ``attention`` would put into 8 bits.

    Before::

        y = aten.scaled_dot_product_attention(q, k, v)

    After (``handle`` is a new input, found by the weights of the attention's linears)::

        y = aten.scaled_dot_product_attention(q, k, v)
        tahf4.observe_attention(q, k, v, None, False, None, False, y, handle)

    It takes the options of ``attention``, and needs no kernel. What the user keeps, and what an earlier recipe says,
    does not matter. An attention without linears around it has no name that a recipe could call it by, and is left out.
    """

    name: ClassVar[str] = "attention"
    exact = True
    after = ("plan", "observe")
    before = ()

    def _without_kernel(self, new: fx.Node) -> bool:
        """Return False: the reference measures what a kernel of another machine will run."""
        return False

    def _put(self, node: fx.Node, new: fx.Node, context: Context) -> None:
        """Observe the operands of what would run in 8 bits."""
        graph = node.graph
        weights = tuple(dict.fromkeys(d.weight_index for d in linears_around(node) if d.weight_index >= 0))
        beside = next(n for n in graph.find_nodes(op="placeholder") if _stands_for(n, weights[0]))
        handle = packed_input(graph, beside, PackedWeight(weights), "observer")
        with graph.inserting_after(node):
            call(node, torch.ops.tahf4.observe_attention.default, (*new.args[:_OPERANDS], node, handle))
        graph.erase_node(new)
        context.matched(node)

    def _said(self, node: fx.Node, context: Context) -> Reason | None:
        """Return why an attention does not run in 8 bits whatever users and recipes say, or None."""
        linears = [d for d in linears_around(node) if d.weight_index >= 0]
        if not any(d.decision == "hif4" or d.cause in BY_CHOICE for d in linears):
            return Reason(Cause.OTHER, "no linears in 4 bits around it")
        return None


def _stands_for(node: fx.Node, index: int) -> bool:
    source = node.meta[INPUT]
    return isinstance(source, GraphInput) and source.kind == "parameter" and source.index == index
