"""What a call of a compiled graph costs in Python once everything is known."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from models import wan
from tahf4_compiler.backends import dynamo
from torch import nn

import tahf4_compiler as tahf4


@pytest.fixture
def calls(monkeypatch):
    """Record the compiled graphs and what they are called with."""
    made = []
    run = dynamo.CompiledGraph.__call__

    def called(self, *args):
        made.append((self, args))
        return run(self, *args)

    monkeypatch.setattr(dynamo.CompiledGraph, "__call__", called)
    yield made, run


def python_calls(run) -> Counter[str]:
    found: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, _: found.update([frame.f_code.co_qualname]) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@torch.no_grad()
def test_blocks_that_are_known_are_not_looked_up_again(calls):
    made, run = calls
    model, inputs = wan(num_layers=3)
    model.compile_repeated_blocks(backend="tahf4", options={"inductor": False})
    for _ in range(3):
        model(**inputs)
    (first, args), (again, others), _ = made[-3:]
    assert first is again, "the blocks share one graph"
    for given in (args, others):
        found = python_calls(lambda given=given: run(first, *given))
        assert found["_find"] == found["CompiledGraph._look_up"] == 0
        # Of ten weights in seven packed inputs; 78 are calls of the graph's operators. It was 1,001 once.
        assert found.total() < 430, found.most_common(20)


@torch.no_grad()
def test_what_is_attached_later_is_noticed():
    model, inputs = wan(num_layers=2)
    model.compile_repeated_blocks(backend="tahf4", options={"inductor": False})
    before = model(**inputs)[0]
    assert torch.equal(model(**inputs)[0], before)
    tahf4.keep(model, [r"blocks\.1\.ffn"])
    kept = model(**inputs)[0]
    assert not torch.equal(kept, before)
    tahf4.keep(model, [])
    assert torch.equal(model(**inputs)[0], before)


@torch.no_grad()
def test_a_decision_ends_with_the_module_that_it_was_attached_to():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x = torch.randn(8, 64)
    tahf4.keep(model, ["0"])
    compiled = torch.compile(model, backend="tahf4", options={"inductor": False})
    kept = compiled(x)
    other = nn.Linear(64, 64)
    other.weight, other.bias = model[0].weight, model[0].bias  # the same parameters, and nothing attached
    model[0] = other
    changed = compiled(x)
    assert not torch.equal(changed, kept)
    torch._dynamo.reset()
    assert torch.equal(changed, compiled(x))
