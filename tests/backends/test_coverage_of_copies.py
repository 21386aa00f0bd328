"""Copies of a model that was compiled in place: PyTorch drops the compilation, and a warning says so once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import GRAPH, compiled, said
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.torch_private.calls import without_compiled_calls

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_does_not_run_what_stands_around_the_calls_of_its_original(whole):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    call(x)
    copied = copy.deepcopy(call)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied(x).any()


@pytest.mark.parametrize("whole", [False, True])
def test_pytorch_drops_the_compilation_of_a_model_in_place_from_its_copy(whole, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    found, copied = call(x), copy.deepcopy(call)
    assert ("Stack: PyTorch leaves the compilation" in caplog.text) == (not whole)
    caplog.clear()
    copy.deepcopy(copied)
    pickle.loads(pickle.dumps(model))
    assert not caplog.text
    assert torch.equal(copied(x), found) == whole
    with without_compiled_calls(model):
        assert torch.equal(copied(x), model(x)) == (not whole)


def test_the_copy_of_a_packed_model_runs_in_4_bits_and_is_not_said_to_be_another(caplog):
    model, x = Stack().eval().requires_grad_(False), torch.randn(4, 64)
    tahf4.quantize_(model)
    found = compiled(model, False)(x)
    assert torch.equal(copy.deepcopy(model)(x), found) and "deep copy" not in caplog.text


def kept_model():
    model = Stack().eval()
    tahf4.keep(model, [".*"])
    return model


def test_a_model_that_was_compiled_anew_with_another_backend_is_copied_in_silence(caplog):
    model = compiled(Stack().eval(), whole=False)
    model(torch.randn(4, 64))
    model.compile(backend="eager")
    copy.deepcopy(model)
    assert not said(caplog)
    copy.deepcopy(compiled(model, whole=False))
    assert len(said(caplog)) == 1


@pytest.mark.parametrize(
    ("make", "wanted"), [(lambda: Stack().eval(), True), (lambda: nn.Linear(16, 16), False), (kept_model, False)]
)
def test_a_copy_before_the_first_call_is_said_if_the_original_will_run_in_4_bits(make, wanted, caplog):
    model = make()
    model.compile(backend="tahf4", options=GRAPH)
    copy.deepcopy(copy.deepcopy(model))
    assert caplog.text.count("PyTorch leaves the compilation by model.compile() out of a deep copy") == wanted


def test_a_copy_of_many_compiled_blocks_warns_once(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    for block in model.blocks:
        compiled(block, False)
    model(x)
    copy.deepcopy(copy.deepcopy(model))
    assert [r.getMessage()[:5] for r in caplog.records if "deep copy" in r.getMessage()] == ["Block"]
