"""What people do to a packed model with PyTorch's own means gives what it gives for any model."""

from __future__ import annotations

import io

import pytest
import torch
from helpers import GRAPH, relative, warned
from models import Stack
from torch import nn
from torch.nn.utils import parametrize, prune

import tahf4_compiler as tahf4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def packed(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Stack(depth=1).eval()
    tahf4.quantize_(model)
    return model


def plain(model):
    tahf4.dequantize_(model)
    return model


def half(model):
    return model.half()


def share_memory(model):
    return model.share_memory()


def data_parallel(model):
    return nn.DataParallel(model)


def state_of_another(model):
    model.load_state_dict({key: value.clone() for key, value in packed().state_dict().items()}, assign=True)
    return model


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = packed(1)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def in_inference_mode(_):
    with torch.inference_mode():
        return packed()


def bfloat16_input(model):
    model.blocks[0].up.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    return model


CHANGES = [
    (half, 0.1),
    (share_memory, 0),
    (data_parallel, 0),
    (state_of_another, 0),
    (saved_and_loaded, 0),
    (state_saved_and_loaded, 0),
    (in_inference_mode, 0),
    (bfloat16_input, 0.1),
]


@pytest.mark.parametrize("change, error", CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_a_packed_model_computes_the_same_eager_and_compiled(change, error):
    model, x = packed(), torch.randn(4, 64)
    want = packed()(x)
    compiled = torch.compile(model, backend="tahf4", options=GRAPH)
    compiled(x)
    changed = change(model)
    x = x.half() if change is half else x
    assert relative(changed(x), want) <= error
    if changed is not model:
        compiled = torch.compile(changed, backend="tahf4", options=GRAPH)
    assert relative(compiled(x), want) <= max(error, 1e-6)


def test_what_a_packed_model_holds_may_be_arguments_of_a_compiled_function(caplog):
    model, x = Stack(depth=2).eval(), torch.randn(4, 64)
    tahf4.quantize_(model)  # and leaves two linears around the blocks
    held = {name: value.detach().clone() for name, value in model.state_dict().items()}
    call = torch.compile(
        lambda held, x: torch.func.functional_call(model, held, (x,)), backend="tahf4", options=GRAPH
    )
    assert relative(call(held, x), model(x)) <= 1e-6
    assert not warned(caplog)


@pytest.mark.parametrize("computed", ["pruned", "parametrized"])
def test_a_bias_that_is_computed_runs_and_is_refused_where_it_would_be_lost(computed):
    model, x = packed(), torch.randn(4, 64)
    linear, want = model.blocks[0].up, model(x)
    if computed == "pruned":
        prune.l1_unstructured(linear, "bias", amount=0.5)
    else:
        parametrize.register_parametrization(linear, "bias", Halved())
    changed = model(x)
    assert not torch.equal(changed, want)
    assert relative(torch.compile(model, backend="tahf4", options=GRAPH)(x), changed) < 1e-6
    with pytest.raises(tahf4.PackedError, match=r"the bias of blocks.0.up .*prune.remove.*remove_parametrizations"):
        tahf4.dequantize_(model)
    assert torch.equal(model(x), changed)
    if computed == "pruned":
        prune.remove(linear, "bias")
    else:
        parametrize.remove_parametrizations(linear, "bias")
    tahf4.dequantize_(model)
    assert relative(model(x), changed) < 0.2 and type(model.blocks[0].up) is nn.Linear


class Halved(nn.Module):
    def forward(self, bias):
        return bias * 0.5


def test_a_state_that_is_assigned_brings_its_type():
    model, x = packed(), torch.randn(4, 64, dtype=torch.float16)
    other = Stack(depth=1).eval().half()
    tahf4.quantize_(other)
    model.load_state_dict(other.state_dict(), assign=True)
    tahf4.dequantize_(model)
    assert relative(model(x), plain(other)(x)) == 0
