"""Experts whose tokens a router chooses: a calibration sees them where Dynamo captures shapes that depend on data."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import tahf4_compiler as tahf4


class Routed(nn.Module):
    """A layer that adds what one of two experts makes of each token."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x):
        top, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            (tokens,) = torch.where(top == i)
            out = out.index_add(0, tokens, expert(x[tokens]))
        return x + out


def calibrated(model: nn.Module):
    with torch.no_grad(), tahf4.calibrate(model, options={"inductor": False}) as calibration:
        model(torch.randn(64, 64))
    return calibration


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.routed = nn.Linear(64, 64), Routed()

    def forward(self, x):
        return self.routed(x + self.mix(x))


def test_a_calibration_sees_routed_experts_if_dynamo_captures_them():
    torch.manual_seed(0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        recipe = calibrated(nn.Sequential(Layer(), Layer())).recipe(mask="max", sensitivity=False)
    assert sum("experts" in path for path in recipe.linears("")) == 4


def test_what_would_capture_them_is_said(caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "tahf4_compiler"):
        recipe = calibrated(nn.Sequential(Layer(), Layer())).recipe(mask="max", sensitivity=False)
    assert not any("experts" in path for path in recipe.linears(""))
    assert "capture_dynamic_output_shape_ops = True" in caplog.text
    with pytest.raises(tahf4.CalibrationError, match="capture_dynamic_output_shape_ops = True"):
        calibrated(nn.Sequential(Routed(), Routed()))
