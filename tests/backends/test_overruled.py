"""Another backend than tahf4 around parts that were compiled with it."""

from __future__ import annotations

import pytest
import torch
from helpers import compiled, said
from models import Stack
from tahf4_compiler.backends import dynamo, messages
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.torch_private.calls import without_compiled_calls
from tahf4_compiler.torch_private.dynamo import before_frames

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("called", [False, True])
def test_another_backend_around_blocks_that_are_compiled_with_tahf4_is_said_once(called, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    before_frames(dynamo.tahf4, dynamo._begin, messages.say_overruled)  # as torch.compile(backend="tahf4") does first
    for block in model.blocks:
        compiled(block, False)
    if called:
        model(x)
    outer = torch.compile(model, backend="eager")
    for _ in range(2):
        got = outer(x)
    (message,) = said(caplog)
    assert "Stack: is compiled with another backend than tahf4, and PyTorch hands it the code" in message
    assert "also of 3 modules that were compiled with tahf4 (the first is a Block)" in message
    with without_compiled_calls(model):
        assert torch.allclose(got, model(x), atol=1e-6), "it runs in the original precision"


def test_another_backend_around_a_model_that_is_compiled_in_place_gets_nothing_of_it(caplog):
    """If this fails, PyTorch hands it over, and it has to be said."""
    model, x = Stack().eval(), torch.randn(4, 64)
    outer = torch.compile(compiled(model, False), backend="eager")
    want = outer(x)
    for _ in range(2):
        assert torch.equal(model(x), want) and torch.equal(outer(x), want)
    with without_compiled_calls(model):
        assert not torch.allclose(want, model(x), atol=1e-4)
    assert not said(caplog)


def test_another_backend_around_parts_without_linears_is_not_said(caplog):
    messages.say_overruled(nn.Sequential(), [nn.ReLU()])
    assert not said(caplog)
    messages.say_overruled(nn.Sequential(), [nn.ReLU(), Stack()])
    assert "2 modules that were compiled with tahf4 (the first is a ReLU)" in said(caplog)[0]


def test_another_backend_around_a_packed_model_is_not_said(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    tahf4.quantize_(model)
    for block in model.blocks:
        compiled(block, False)
    torch.compile(model, backend="eager")(x)
    torch.compile(Stack().eval(), backend="eager")(x)
    assert not said(caplog)
