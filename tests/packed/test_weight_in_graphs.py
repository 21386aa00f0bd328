"""Code inside of a graph may ask a packed linear's weight what it looks like, and not for its values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.packed.no_weight import NoWeightError

BACKENDS = [
    {"backend": "eager"},
    {"backend": "aot_eager"},
    {"backend": "inductor", "options": {"fx_graph_cache": False}},
    {"backend": "tahf4", "options": {"inductor": False}},
]


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(64, 128), nn.Linear(128, 64), function

    def forward(self, x):
        return self.function(self, x)


def asks(model, x):
    weight = model.b.weight
    looks = (weight.shape == (64, 128), weight.dim() == 2, weight.size(0) == 64, weight.numel() == 8192)
    told = isinstance(weight, torch.Tensor) and weight.is_floating_point() and not weight.requires_grad
    return model.b(model.a(x).to(weight.device, weight.dtype)) + (float(all(looks)) if told else 100)


def packed(function) -> nn.Module:
    model = Net(function).eval().requires_grad_(False)
    tahf4.quantize_(model)
    return model


@pytest.mark.parametrize("how", BACKENDS, ids=lambda how: how["backend"])
def test_what_a_weight_looks_like_is_known_while_tracing(how):
    model, x = packed(asks), torch.randn(4, 64)
    want = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, **how)(x), want)


def test_an_exported_model_asks_too():
    model, x = packed(asks), torch.randn(4, 64)
    torch.testing.assert_close(tahf4.lower(tahf4.capture(model, (x,)))(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("how", BACKENDS, ids=lambda how: how["backend"])
def test_values_are_refused_by_name(how):
    model, x = packed(lambda model, x: nn.functional.linear(x, model.a.weight)), torch.randn(4, 64)
    with pytest.raises(NoWeightError, match="this linear is packed"):
        model(x)
    with pytest.raises(Exception, match="this linear is packed"):
        torch.compile(model, fullgraph=True, **how)(x)
