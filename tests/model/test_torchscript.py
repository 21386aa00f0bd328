"""A model that is TorchScript as a whole is refused; where a part is, graphs take it and ``keep`` finds it."""

from __future__ import annotations

import pytest
import torch
from helpers import GRAPH
from models import Stack
from torch import nn

import tahf4_compiler as tahf4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Pipeline:
    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


@pytest.mark.parametrize("convert", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(4, 64))])
def test_a_model_that_is_torchscript_is_refused(convert):
    model = convert(Stack(1).eval())
    for work in (tahf4.quantize_, tahf4.dequantize_, tahf4.calibrate):
        with pytest.raises(tahf4.OptionError, match="Module is TorchScript .* Give the model that it was made of"):
            work(model)
    with pytest.raises(tahf4.OptionError, match="transformer is TorchScript"):
        tahf4.quantize_(Pipeline(model))


def test_keep_reaches_linears_of_a_part_that_is_torchscript():
    x = torch.randn(4, 64)
    model = nn.Sequential(torch.jit.trace(Stack().eval(), x))
    kept = [f"0.blocks.{i}.up" for i in range(3)]
    assert tahf4.keep(model, ["up"]) == tahf4.keep(model, ["up"]) == kept
    plan = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH).plan
    decided = {d.module: d.decision for d in plan}
    assert [decided[path] for path in kept] == ["high_precision"] * 3 and decided["0.blocks.1.down"] == "hif4"
