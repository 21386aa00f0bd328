"""What a compiled graph keeps about parameters holds as long as nothing that it depends on changes."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import GRAPH
from models import Stack
from tahf4_compiler.backends.dynamo import CompiledGraph, _Known
from torch import nn

from tahf4_compiler.model.attachments import attach, changes


class Clock:
    """Stands for a recipe's steps."""

    now = False

    def high(self) -> bool:
        return self.now


@pytest.fixture
def weights():
    return [nn.Parameter(torch.zeros(2)) for _ in range(2)]


def known(weights, *clocks: Clock) -> _Known:
    high = [clock.high() for clock in clocks]
    refs = [weakref.ref(weight) for weight in weights]
    return _Known(refs, (), [], list(clocks), high, changes(), frozenset(), {})  # type: ignore[arg-type]


def test_it_holds_for_these_parameters(weights):
    found = known(weights)
    assert found.holds(weights)
    assert not found.holds([weights[0], nn.Parameter(torch.zeros(2))])


def test_it_holds_until_something_is_attached(weights):
    found = known(weights)
    attach(nn.Linear(2, 2), {})
    assert not found.holds(weights)


def test_it_holds_while_steps_run_in_the_same_precision(weights):
    clock = Clock()
    found = known(weights, clock)
    assert found.holds(weights)
    clock.now = True
    assert not found.holds(weights)


def test_it_is_alive_while_all_parameters_are(weights):
    found = known(weights)
    assert found.alive()
    weights.pop()
    assert not found.alive()


def test_parameters_are_looked_up_once_and_those_that_are_gone_are_forgotten(monkeypatch):
    graphs, looked = [], []
    call, look_up = CompiledGraph.__call__, CompiledGraph._look_up
    monkeypatch.setattr(CompiledGraph, "__call__", lambda self, *args: graphs.append(self) or call(self, *args))
    monkeypatch.setattr(CompiledGraph, "_look_up", lambda self, given: looked.append(1) or look_up(self, given))
    model, x = Stack().eval(), torch.randn(5, 64)
    with torch.no_grad():
        model.compile(backend="tahf4", options=GRAPH)
        model(x)
        looked.clear()
        model(x)
        assert not looked
        model.last.weight = nn.Parameter(torch.randn(64, 64))
        model(x)
    assert looked and len(graphs[-1]._known) == 1
