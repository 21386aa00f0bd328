"""The network's output is every floating-point tensor that it returns; what has nothing in 4 bits is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Block, Stack
from torch import nn

import tahf4_compiler as tahf4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@dataclasses.dataclass
class Out:
    ids: Any
    left: Any
    right: Any


class Heads(nn.Module):
    """Two heads of one input, and what comes out in the form that ``form`` gives."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.form = form

    def forward(self, x):
        left = right = x
        for block in self.left:
            left = block(left)
        for block in self.right:
            right = block(right)
        return self.form(left, right)


def effects(form):
    model = Heads(form).eval()
    with tahf4.calibrate(model, options={"inductor": False}) as calibration:
        model(torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(0)))
    entries = calibration.recipe(mask=None).experts[""].values()
    return {path: linear.effect for entry in entries for path, linear in entry.linears.items()}


@pytest.mark.parametrize(
    "form",
    [
        lambda left, right: (left, right),
        lambda left, right: {"ids": left.argmax(-1), "none": None, "both": [left, right]},
        lambda left, right: Out(left.argmax(-1), left, (right,)),
        lambda left, right: {"loss": left.mean() - left.mean() + 1e-9, "logits": (left, right)},
    ],
    ids=["tuple", "ids first", "dataclass", "loss first"],
)
def test_a_linear_of_any_output_has_its_effect(form):
    left, found = effects(lambda left, right: left), effects(form)
    right = effects(lambda left, right: right)
    assert set(found) == set(left) and len(found) == 8
    # Each head is half of the output, and its error does not depend on the other head.
    for path, value in found.items():
        want = (left if path.startswith("left") else right)[path]
        assert want > 1e-5 and value == pytest.approx(want / 2, rel=1e-3)


@pytest.mark.parametrize("form", [lambda a, b: SimpleNamespace(a=a), lambda a, b: a.argmax(-1)], ids=["object", "ids"])
def test_an_output_without_a_floating_point_tensor_is_refused(form):
    with pytest.raises(tahf4.CalibrationError, match="Heads returned .*no floating-point tensor"):
        effects(form)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Stack(dim=32, hidden=48), "linears: shape: .* less than 64"),
        (lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU()), "it holds no nn.Linear"),
    ],
)
def test_a_model_of_which_nothing_runs_in_4_bits_is_an_error_that_says_why(model, why):
    model = model().eval()
    x = torch.randn(2, 8, 32)
    with (
        pytest.raises(tahf4.CalibrationError, match=f"nothing to calibrate.*{type(model).__name__}.*{why}"),
        tahf4.calibrate(model, options={"inductor": False}),
    ):
        model(x)
