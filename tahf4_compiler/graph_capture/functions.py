"""Tracing of graphs that hold transforms of functions (``torch.vmap``, ``torch.func``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..torch_private.dynamo import transformed_regions
from ..torch_private.graphs import Interpreter
from ..torch_private.tensors import outside_of_tracing
from .decompositions import DECOMPOSITIONS

__all__ = ["Tracing"]


class Tracing(Interpreter):
    """Runs Dynamo's graph for ``make_fx``; unlike the graph's own code it says which node it is at.

    Before the dispatcher, where linears are whole, a transform's tensors are wrappers that tracing cannot follow. So a
    region under transforms is traced behind the dispatcher first, and what came out of that runs in its place. Linears
    are products there, which the pass ``normalize`` knows.
    """

    def __init__(self, graph_module: fx.GraphModule, fake_mode: Any) -> None:
        """Find the regions."""
        super().__init__(graph_module)
        self._fake_mode = fake_mode
        self._regions = {region[0]: region for region in transformed_regions(graph_module.graph)}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, or the region that begins with it."""
        if n not in self._regions:
            return super().run_node(n)
        region = self._regions[n]
        inside = set(region)
        inputs = list(dict.fromkeys(i for node in region for i in node.all_input_nodes if i not in inside))
        outputs = [node for node in region if any(user not in inside for user in node.users)]

        def function(values: Sequence[Any]) -> list[Any]:
            inner = Interpreter(self.module, garbage_collect_values=False)
            inner.env.update(zip(inputs, values, strict=True))
            for node in region:
                inner.env[node] = inner.run_node(node)
            return [inner.env[node] for node in outputs]

        values = [self.env[node] for node in inputs]
        with outside_of_tracing(), self._fake_mode:
            traced = make_fx(function, DECOMPOSITIONS, tracing_mode="real", _allow_non_fake_inputs=True)(values)
        results = fx.Interpreter(traced).run(*torch.utils._pytree.tree_leaves(values))
        self.env.update(dict.fromkeys(region))  # the caller passes by what has a value
        self.env.update(zip(outputs, results, strict=True))
        return self.env[n]
