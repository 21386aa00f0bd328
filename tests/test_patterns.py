"""Patterns: found in the graph's own operators, replaced with their module paths, never across a write."""

from __future__ import annotations

import pytest
import torch
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.graph import module_classes

gelu = nn.functional.gelu
EXAMPLE = (torch.empty(4, 128),)


def test_a_replacement_keeps_module_paths_and_function():
    model, x = Stack().eval(), torch.randn(4, 64)
    captured = tahf4.capture(model, (x,))

    class Slow(tahf4.Pass):
        """Write GELU out."""

        after, before = ("plan",), ("quantize",)

        def __call__(self, graph_module, context):
            count = tahf4.replace_pattern(
                graph_module, lambda a: gelu(a), lambda a: a * (torch.erf(a * 0.5**0.5) + 1) * 0.5, EXAMPLE, context
            )
            new = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.erf.default)
            assert [next(reversed(module_classes(node))) for node in new] == [f"blocks.{i}" for i in range(3)]
            return tahf4.PassResult(graph_module, count > 0)

    options = {"passes": [Slow()], "verify": True}
    (record,) = [r for r in tahf4.lower(captured, options=options).history if r.name == "slow"]
    assert record.matches == 3
    assert record.error < 1e-6


def test_conditions_and_constants():
    graph_module = tahf4.capture(Stack().eval(), (torch.randn(4, 64),)).graph_module
    assert len(tahf4.find_pattern(graph_module, lambda a: gelu(a), EXAMPLE)) == 3
    (one,) = tahf4.find_pattern(graph_module, lambda a: gelu(a), EXAMPLE, where=lambda m: "2" in m.nodes[0].name)
    assert one.outputs == one.nodes and one.inputs[0].target is torch.ops.aten.linear.default
    assert tahf4.find_pattern(graph_module, lambda a: torch.relu(a), EXAMPLE) == []
    with pytest.raises(tahf4.PassError, match="does not use its arguments"):
        tahf4.find_pattern(graph_module, lambda a, b: gelu(a), (*EXAMPLE, *EXAMPLE))
    with pytest.raises(tahf4.PassError, match="cannot be traced"):
        tahf4.find_pattern(graph_module, lambda a: a.missing(), EXAMPLE)


def test_a_write_inside_a_match_is_no_match():
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 2
            x.add_(1)
            return gelu(y)

    def pattern(a):
        return gelu(a * 2)

    traced = torch.fx.experimental.proxy_tensor.make_fx(Writes())(torch.randn(4, 64))
    assert tahf4.find_pattern(traced, pattern, EXAMPLE) == []
