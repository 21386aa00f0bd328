"""The plug-in's NVFP4 is what a definition in float64 says, value by value: nearest, ties to even, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GRAPH, block_linears, relative
from models import Stack
from torch import nn

import tahf4_compiler as tahf4

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array([(m + 8 * (e > 0)) / 8 * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])


def nearest(x, grid, unit):
    """Return which of ``grid * unit`` is nearest to ``x >= 0``, by distances alone; of two equal ones the even."""
    guess = np.searchsorted(grid, x / np.where(unit > 0, unit, 1.0))  # next to it; the division decides nothing
    near = np.clip(guess[..., None] + np.arange(-2, 3), 0, len(grid) - 1)
    distance = np.abs(x[..., None] - grid[near] * unit[..., None])  # exact: the products have 30 bits
    best = distance == distance.min(-1, keepdims=True)
    even = np.where(best & (near % 2 == 0), near, -1).max(-1)
    return np.where(even >= 0, even, np.where(best, near, -1).max(-1))


def definition(x):
    """Return scales of rows, scales of blocks, and values, of an array whose last axis is a multiple of 16."""
    x = x.astype(np.float32)
    row = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(448 * 6), np.float32(2.0**-126)).astype(np.float64)
    blocks = np.abs(x.astype(np.float64)).reshape(*x.shape[:-1], -1, 16)
    amax = blocks.max(-1)
    scales = E4M3[nearest(amax, E4M3, 6 * np.broadcast_to(row, amax.shape))]
    step = np.broadcast_to((scales * row)[..., None], blocks.shape)
    values = np.where(step > 0, E2M1[nearest(blocks, E2M1, step)] * step, 0.0).reshape(x.shape)
    return row, scales, np.copysign(values, x)


def rounded(x):
    return torch.from_numpy(definition(x.to(torch.float32).numpy())[2]).reshape(x.shape)


def wide(*shape):
    return torch.randn(shape) * torch.exp2(torch.randint(-30, 30, shape).float())


CASES = {
    "bfloat16": lambda: torch.randn(2048, 512).bfloat16(),
    "float16": lambda: torch.randn(1024, 512).half(),
    "float32": lambda: torch.randn(1024, 512),
    "float64": lambda: torch.randn(256, 512, dtype=torch.float64),
    "integers, ties": lambda: torch.randint(-21, 22, (2048, 512)).bfloat16(),
    "integers, beside ties": lambda: torch.randint(-24, 25, (2048, 512)).bfloat16(),
    "halves": lambda: torch.randint(-48, 49, (1024, 512)).float() / 4,
    "outliers": lambda: torch.where(torch.rand(1024, 512) < 0.01, 100.0, 1.0) * torch.randn(1024, 512).bfloat16(),
    "many magnitudes": lambda: wide(1024, 512),
    "subnormal": lambda: torch.randn(512, 512) * 1e-41,
    "rows of subnormal scale": lambda: torch.randn(512, 512) * 1e-36,
    "largest": lambda: torch.randn(512, 512).clamp(-3, 3) * 1e38,
    "zeros": lambda: torch.zeros(8, 512) * torch.randn(8, 512).sign(),
}


@pytest.mark.parametrize("name", CASES)
def test_packing_is_the_nearest_value_with_ties_to_even(name):
    from tahf4_nvfp4.operators import pack, unpack

    torch.manual_seed(0)
    x = CASES[name]()
    codes, scales, row = pack(x)
    wanted_row, wanted_scales, wanted = definition(x.to(torch.float32).numpy())
    assert np.array_equal(row.double().numpy(), wanted_row)
    assert np.array_equal(scales.view(torch.float8_e4m3fn).double().numpy(), wanted_scales)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).numpy()
    values = np.where(nibbles >= 8, -1.0, 1.0) * E2M1[nibbles & 7]
    step = np.repeat(wanted_scales * wanted_row, 16, -1)
    assert np.array_equal(values * step, wanted)  # every one of the values
    assert np.allclose(unpack(codes, scales, row).double().numpy(), wanted, rtol=2**-23, atol=2.0**-149)


@pytest.mark.parametrize(("name", "met"), [("integers, ties", True), ("integers, beside ties", False)])
def test_ties_are_met_and_what_float32_takes_for_one_is_none(name, met):
    halfway = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    x = CASES[name]().to(torch.float32).numpy()
    row, scales, _ = definition(x)
    quotients = np.abs(x.astype(np.float64)) / np.repeat(scales * row, 16, -1)
    exact, single = (np.isin(quotients.astype(dtype), halfway).sum() for dtype in (np.float64, np.float32))
    # The maximum 21 gives rows the scale 2**-7; with 24 it is rounded, and no quotient is a tie.
    assert single > 2000
    assert exact == (single if met else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_is_its_linears_by_definition(dtype):
    from tahf4_nvfp4.quantize import Nvfp4Quantize

    class Defined(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            out = nn.functional.linear(rounded(x), rounded(self.linear.weight.detach()), self.linear.bias.double())
            return out.to(x.dtype)

    model, x = Stack().eval().to(dtype), torch.randn(16, 64, dtype=dtype)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options={**GRAPH, "passes": [Nvfp4Quantize()]})
    with torch.no_grad():
        got = lowered(x)
        for path in block_linears(model):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Defined(model.get_submodule(path)))
        want = model(x)
    assert relative(got, want) < (2e-3 if dtype == torch.bfloat16 else 1e-5)
