"""What is held about a compiled model follows the model: no false alarm after a change, and no silence either."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import GRAPH
from models import Block, Stack
from tahf4_compiler.backends import messages
from torch import nn

import tahf4_compiler as tahf4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == messages.__name__]


def compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="tahf4", options=GRAPH)
    return model


def other_linears(model: Stack) -> None:
    for block in model.blocks:
        block.up = nn.Linear(64, 128)


def another_block(model: Stack) -> None:
    model.blocks[1] = Block()


CHANGES = [[other_linears], [another_block], [tahf4.quantize_, tahf4.dequantize_]]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: changes[-1].__name__)
@pytest.mark.parametrize("calls", [1, 3])
def test_a_model_that_changed_and_runs_in_4_bits_is_not_said(changes, calls, caplog):
    model, x = compiled(Stack().eval()), torch.randn(4, 64)
    model(x)
    for change in changes:
        change(model)
        for _ in range(calls):
            model(x)
    model(x)
    assert not said(caplog)


@pytest.mark.parametrize("change", [other_linears, another_block, tahf4.dequantize_])
def test_what_a_change_brought_and_dynamo_does_not_see_is_said(change, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    if change is tahf4.dequantize_:
        tahf4.quantize_(model)
    compiled(model)(x)
    change(model)
    for block in model.blocks:
        block.forward = torch.compiler.disable(block.forward)
    for _ in range(3):
        model(x)
    (message,) = said(caplog)
    assert "6 linears of its repeated blocks run in high precision, because Dynamo did not hand" in message


def test_weights_that_quantize_replaced_are_free(caplog):
    model, x = compiled(Stack().eval()), torch.randn(4, 64)
    for _ in range(2):
        model(x)
    old = [weakref.ref(block.up) for block in model.blocks]
    tahf4.quantize_(model)
    assert not any(reference() for reference in old)


def test_a_copy_is_said_by_what_the_model_is_where_it_is_copied(caplog):
    model, x = compiled(Stack().eval()), torch.randn(4, 64)
    model(x)
    for change, says in ((tahf4.quantize_, False), (tahf4.dequantize_, True)):
        change(model)
        want = model(x)
        caplog.clear()
        assert torch.equal(copy.deepcopy(model)(x), want) != says
        assert ("out of a deep copy" in caplog.text) == says
