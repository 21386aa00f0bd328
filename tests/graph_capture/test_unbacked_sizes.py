"""Sizes that depend on values, which no example has: the rows of an expert, or those of an input marked so."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from models import Stack
from torch import nn

import tahf4_compiler as tahf4

GRAPH = {"inductor": False}


class Expert(nn.Module):
    """Two linears for the rows that a gate chooses."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 1), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        rows = (self.gate(x)[:, 0] > 0).nonzero()[:, 0]
        return x.index_add(0, rows, self.down(self.up(x.index_select(0, rows)).relu()))


@pytest.fixture
def model():
    made = Stack(2).eval()
    made.blocks = nn.ModuleList(Expert() for _ in range(2))
    return made.requires_grad_(False)


@torch.no_grad()
def test_rows_of_an_expert_are_compiled_captured_and_packed(model):
    x = torch.randn(40, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    want = lowered(x)
    assert sum(d.decision == "hif4" for d in lowered.plan) == 4
    assert 0 < relative(want, model(x)) < 0.2
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(torch.compile(model, backend="tahf4", options=GRAPH, fullgraph=True)(x), want)
        tahf4.quantize_(model)
        assert torch.equal(torch.compile(model, backend="tahf4", options=GRAPH, fullgraph=True)(x), model(x))
    torch.testing.assert_close(model(x), want)


@torch.no_grad()
def test_an_input_of_an_unbacked_size():
    model, x = Stack(2).eval().requires_grad_(False), torch.randn(5, 64)
    want = torch.compile(model, backend="tahf4", options=GRAPH)(x)
    torch._dynamo.reset()
    marked = x.clone()
    torch._dynamo.decorators.mark_unbacked(marked, 0)
    assert torch.equal(torch.compile(model, backend="tahf4", options=GRAPH)(marked), want)
