"""A Python float that changes between calls of a compiled model: the right value, and few graphs."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from torch import nn
from torch.nn import functional as F

import tahf4_compiler as tahf4

ONE_GRAPH = {
    "product": lambda x, s: x * s,
    "arithmetic of numbers": lambda x, s: x * (1 - s) + x.sin() * s * s + (s + 1),
}
ONE_GRAPH_A_VALUE = {
    "alpha": lambda x, s: torch.add(x, x.sin(), alpha=s),
    "clamp": lambda x, s: x.clamp(-s, s),
    "a whole number": lambda x, s: F.pad(x[:, : int(s * 8)], (0, 0, 0, 8 - int(s * 8))),
    "a new tensor": lambda x, s: x + torch.tensor(s),
}
KINDS = {**ONE_GRAPH, **ONE_GRAPH_A_VALUE}
VALUES = (1.0, 0.5, 0.25)


class Scaled(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)})])
        self.use = use

    def forward(self, x, scale):
        for block in self.blocks:
            # Read twice: Inductor takes the first value for the use that it knows nothing of, if it knows the other.
            x = x + block["down"](block["up"](self.use(x, scale))) * scale
        return x


THROUGH_INDUCTOR = [pytest.param(kind, True, marks=() if kind == "alpha" else pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind, inductor", [*THROUGH_INDUCTOR, ("product", False), ("clamp", False)])
def test_each_call_computes_with_its_own_float(kind, inductor):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Scaled(KINDS[kind]).eval().requires_grad_(False)
    x = torch.randn(2, 8, 64)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="tahf4", options={"inductor": inductor})
    outputs = [compiled(x, value) for value in VALUES]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for value, output in zip(VALUES, outputs, strict=True):
        want = tahf4.lower(tahf4.capture(model, (x, value)))(x, value)
        assert relative(output, want) < 1e-5, value
    assert graphs == (2 if kind in ONE_GRAPH else len(VALUES)), "the first call has a constant; the second knows"
