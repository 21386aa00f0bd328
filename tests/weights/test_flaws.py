"""Weights that HiF4 does not hold are told by linear and share, wherever they are packed."""

from __future__ import annotations

import pytest
import torch
from helpers import GRAPH, said
from models import Stack

import tahf4_compiler as tahf4
from tahf4_compiler.weights import flaws
from tahf4_compiler.weights.packing import pack_transformed


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def pack(model, x):
    tahf4.quantize_(model)


def compiled(model, x):
    call = torch.compile(model, backend="tahf4", options=GRAPH)
    for _ in range(2):
        call(x)


def lowered(model, x):
    call = tahf4.lower(tahf4.capture(model, (x,)))
    for _ in range(2):
        call(x)


def spoiled(**values: float) -> Stack:
    """Return a model with random values of some size in all of a weight, or in the first of its rows."""
    model = Stack().eval()
    for name, value in values.items():
        block, _, where = name.partition("_")
        weight = model.blocks[int(block[1:])].up.weight
        (weight[0] if where == "row" else weight)[:].normal_().mul_(value)
    return model


def test_what_several_looks_find_is_added(caplog, monkeypatch):
    """A weight is looked at in chunks of rows, and where it is merged, in parts."""
    monkeypatch.setattr(flaws, "_ROW_CHUNK", 64)
    found = flaws.Flaws()
    for first in (1e7, float("nan"), 1e7):
        weight = torch.ones(2, 64)
        weight[0, :4] = first
        found.look("up", weight, pack_transformed(weight, None, None, 0), None, None, 0)
    found.warn()
    nan, large = said(caplog, "weights.flaws")
    assert nan.startswith("the weights of 1 linear hold NaN or infinities: up. ")
    assert f"up ({100 * 8 / 384:.3g}% of its values)" in large


@pytest.mark.parametrize("use", [pack, compiled, lowered])
def test_what_is_out_of_range_is_told_once(use, caplog):
    use(spoiled(b0_row=1e7, b1=1e-20, b2_row=float("nan")), torch.randn(4, 64))
    nan, large, small = said(caplog, "weights.flaws")
    assert nan.startswith("the weights of 1 linear hold NaN or infinities: blocks.2.up. ")
    assert large.startswith("the weights of 1 linear reach beyond 344,064,")
    assert "blocks.0.up (0." in large
    assert small.startswith("the weights of 1 linear are too small for HiF4")
    assert "blocks.1.up (100% of its values)" in small


@pytest.mark.parametrize("use", [pack, compiled])
def test_what_is_in_range_is_not_told(use, caplog):
    model = spoiled(b0_row=0.0, b1_row=1e-20, b2=0.0)  # rows of nothing, or next to it, and a weight of zeros
    model.blocks[2].down.weight[:] = 1e-13
    model.blocks[1].down.weight[5, 7] = 344064.0 / 8
    use(model, torch.randn(4, 64))
    assert not said(caplog, "weights.flaws")


@pytest.mark.parametrize("block", [0, 64])
def test_parts_of_a_weight_make_one_share(block, caplog):
    weight = torch.randn(4, 64)
    weight[3, :32] = torch.randn(32) * 1e30
    found, how = flaws.Flaws(), (torch.rand(64) + 0.5, 1 if block else None, block)
    for rows in (weight[:2], weight[2:]):
        found.look("up", rows, pack_transformed(rows, *how), *how)
    found.warn("high")
    (message,) = said(caplog, "weights.flaws")
    assert message.startswith("high: the weights of 1 linear reach beyond 344,064")
    assert f"up ({25 if block else 12.5}% of its values)" in message, "a rotation spreads them"
