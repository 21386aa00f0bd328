"""The error of a network's output, which chooses masks and finds the linears that matter."""

from __future__ import annotations

import pytest
import torch
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.sensitivity import Network, QuantizedWeight
from tahf4_compiler.files.memo import Measured

GRAPH = {"inductor": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Mixing(nn.Module):
    """Its first axis may be no batch."""

    def __init__(self, mix):
        super().__init__()
        self.stack, self.mix = Stack().eval(), mix

    def forward(self, x, bias):
        return self.mix(self.stack(x)) + bias


def only_twenty(x):
    assert len(x) == 20, "no other batch"
    return x


@pytest.mark.parametrize(
    ("mix", "entries"), [(lambda x: x, 16), (lambda x: x - x.mean(0), 20), (only_twenty, 20), (lambda x: x.sum(), 20)]
)
def test_effects_are_measured_on_a_part_of_a_batch_if_entries_do_not_meet(mix, entries):
    model, met = Mixing(mix), []
    network = Network(model, [((torch.randn(20, 64),), {"bias": torch.tensor(1.0)})])
    with model.register_forward_pre_hook(lambda module, args: met.append(len(args[0]))):
        few = network.few()
        met.clear()
        weight = model.stack.blocks[0].up.weight
        up = {"stack.blocks.0.up": lambda: QuantizedWeight(weight, None, None, 0)}
        effects = few.effects(up, Measured(None, str), "effect")
    assert met == [entries]
    assert effects["stack.blocks.0.up"] > 1e-6


def test_a_model_whose_output_is_nan_is_refused():
    model = Stack().eval()
    model.last.weight[0, 0] = float("nan")
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(8, 64))
    with pytest.raises(tahf4.CalibrationError, match="NaN or infinite in its original precision"):
        calibration.recipe()


@pytest.mark.parametrize("rows", [8, 0])
def test_a_model_whose_output_is_zero_or_empty_is_refused(rows):
    model = Stack().eval()
    if rows:
        nn.init.zeros_(model.last.weight), nn.init.zeros_(model.last.bias)
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(8, 64))
        calibration.kept.calls[""][:] = [((torch.randn(rows, 64),), {})]
    with pytest.raises(tahf4.CalibrationError, match="is empty or zero everywhere on a call"):
        calibration.recipe()


class Two(nn.Module):
    """A second output that is zero, but not in 4 bits."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(1).eval()

    def forward(self, x):
        y = self.stack(x)
        return y, y - self.wanted if hasattr(self, "wanted") else y * 0


def test_an_output_that_is_zero_has_no_part_in_an_error():
    model, x = Two(), torch.randn(8, 64)
    network = Network(model, [((x,), {})])
    model.wanted = model.stack(x).detach()
    up = QuantizedWeight(model.stack.blocks[0].up.weight, None, None, 0)
    assert 0 < network.error({"stack.blocks.0.up": up}) < 0.1
