"""Equal calls give equal bits, whichever graphs run the weights, and each weight is packed once."""

from __future__ import annotations

import pytest
import torch
from helpers import block_linears
from models import output, wan
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.weights.store import store

GRAPH = {"inductor": False}


pytestmark = pytest.mark.usefixtures("no_grad")


class Hooked(nn.Module):
    """Stands for a hook that breaks the graph around a linear, so that all linears share their graphs."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, k)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.linear(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Hooked(128), Hooked(128)

    def forward(self, x, text):
        return self.a(x).mean(1, keepdim=True) + self.b(text)


def test_graphs_that_linears_share_and_that_are_compiled_again():
    model = nn.ModuleList(Block() for _ in range(2)).eval()
    for block in model:
        block.compile(backend="tahf4", options=GRAPH)
    x, text, before = torch.randn(1, 32, 128), torch.randn(1, 12, 128), store.conversions

    def run():
        value = text
        for block in model:
            value = block(x, value)
        return value

    first, second, third = run(), run(), run()
    assert torch.equal(first, second) and torch.equal(second, third)
    assert store.conversions - before == 4


@pytest.mark.slow
def test_group_offload_of_leaves_with_compiled_blocks():
    model, inputs = wan()
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    model.compile_repeated_blocks(backend="tahf4", options=GRAPH)
    before = store.conversions
    calls = [output(model(**inputs)) for _ in range(2)]
    assert torch.equal(calls[0], calls[1])
    assert store.conversions - before == len(block_linears(model))


def test_a_weight_is_packed_alike_alone_beside_others_and_by_quantize_():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    both, x = (lambda value: (model[0](value), model[1](value))), torch.randn(5, 64)
    beside = torch.compile(both, backend="tahf4", options=GRAPH)(x)
    alone = torch.compile(model[1], backend="tahf4", options=GRAPH)(x)
    assert torch.equal(beside[1], alone)
    tahf4.quantize_(model)
    assert torch.equal(model[1](x), alone)
