"""Linears that Dynamo does not hand over are said once, by name; those that are not called are not."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import GRAPH
from models import Stack
from tahf4_compiler.backends import coverage
from torch import Tensor, nn

import tahf4_compiler as tahf4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == coverage.__name__]


class Hidden(Stack):
    """Blocks with a linear that is hidden from Dynamo, as hooks of libraries do it."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            forward = block.down.forward
            block.down.forward = torch.compiler.disable(lambda x, forward=forward: forward(x))


def compiled(model: nn.Module, whole: bool, **options):
    if whole:
        return torch.compile(model, backend="tahf4", options={**GRAPH, **options})
    model.compile(backend="tahf4", options={**GRAPH, **options})
    return model


@pytest.mark.parametrize("whole", [False, True])
def test_linears_outside_of_the_graphs_are_said_once_with_the_cause(whole, caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    want = call(x)
    assert not said(caplog)
    for _ in range(3):
        assert torch.equal(call(x), want)
    (message,) = said(caplog)
    assert "Hidden: 3 linears of its repeated blocks run in high precision" in message
    assert "(blocks.0.down, blocks.1.down, blocks.2.down)" in message
    assert "`torch.compiler.disable`" in message


@pytest.mark.parametrize("whole", [False, True])
def test_nothing_stays_in_the_way_of_later_calls(whole):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    name = "forward" if whole else "_compiled_call_impl"
    before = getattr(call, name)
    call(x)
    assert getattr(call, name) is not before
    call(x)
    assert getattr(call, name) is before
    assert sys.getprofile() is None


def test_calls_of_a_model_whose_linears_all_run_in_4_bits_are_not_watched(monkeypatch):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, True)
    call(x)
    monkeypatch.setattr(sys, "setprofile", None)  # calling it would raise
    call(x)


class Sometimes(Stack):
    """Leaves its last block out, as a cache does."""

    left_out = True

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2] if self.left_out else self.blocks:
            x = block(x)
        return x


def test_blocks_that_are_not_called_are_not_said(caplog):
    model, x = Sometimes().eval(), torch.randn(4, 64)
    call = compiled(model, True)
    for _ in range(6):
        call(x)
    model.left_out = False
    call(x)
    assert not said(caplog)


@pytest.mark.parametrize("by", ["keep", "options"])
def test_linears_that_the_user_keeps_are_not_said(by, caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)
    if by == "keep":
        tahf4.keep(model, ["down"])
    call = compiled(model, True, **({"keep": ["down"]} if by == "options" else {}))
    for _ in range(3):
        call(x)
    assert not said(caplog)


def test_a_first_call_that_fails_says_nothing(caplog):
    class Fails(Stack):
        fail = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            if self.fail:
                raise RuntimeError("stop")
            return self.blocks[2](self.blocks[1](x))

    model, x = Fails().eval(), torch.randn(4, 64)
    call = compiled(model, True)
    with pytest.raises(RuntimeError, match="stop"):
        call(x)
    model.fail = False
    for _ in range(3):
        call(x)
    assert not said(caplog)
