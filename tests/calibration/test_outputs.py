"""Models whose output is not one tensor, and models of which nothing can be calibrated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.sensitivity import Network, QuantizedWeight

GRAPH = {"inductor": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


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
        tahf4.calibrate(model, options=GRAPH),
    ):
        model(x)


@dataclasses.dataclass
class Answer:
    count: int
    hidden: torch.Tensor


class Odd(nn.Module):
    """Gives its output among others."""

    def __init__(self, wrap):
        super().__init__()
        self.stack, self.wrap = Stack(), wrap

    def forward(self, x):
        return self.wrap(self.stack(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y.argmax(-1), y),
        lambda y: {"mask": torch.ones(2, dtype=torch.bool), "y": y},
        lambda y: {"loss": y.mean(), "logits": y},
        lambda y: (None, torch.zeros(2), [y]),
        lambda y: Answer(3, y),
    ],
)
def test_the_error_is_that_of_the_largest_floating_point_output(wrap):
    model, x = Odd(lambda y: y).eval(), torch.randn(8, 64)
    call = [((x,), {})]
    quantized = {"stack.blocks.0.up": QuantizedWeight(model.stack.blocks[0].up.weight, None, None, 0)}
    wanted = Network(model, call).error(quantized)
    model.wrap = wrap
    assert Network(model, call).error(quantized) == wanted > 0


def test_an_output_without_tensors_is_refused():
    model = Odd(lambda y: float(y.sum())).eval()
    with pytest.raises(tahf4.CalibrationError, match="gives a float without tensors.*sensitivity=False"):
        Network(model, [((torch.randn(8, 64),), {})])
