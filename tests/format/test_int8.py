"""Activations in 8 bits, against their definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

import tahf4_compiler as tahf4
from tahf4_compiler.format import int8


def test_a_value_is_off_by_half_a_step_at_most():
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(0)) * 3
    codes, scales = int8.quantize(x)
    assert codes.shape == (7, 256) and codes.dtype == torch.int8
    assert scales.shape == (7, 4) and scales.dtype == torch.float32
    padded = torch.nn.functional.pad(x, (0, 56)).double().view(7, 4, 64)
    most = padded.abs().amax(-1)
    assert torch.allclose(scales.double(), most / 127, rtol=1e-7, atol=0)
    back = int8.dequantize(codes, scales).double().view(7, 4, 64)
    assert ((back - padded).abs() <= (most / 254 * 1.00001)[..., None]).all()
    assert codes.view(7, 4, 64).abs().amax(-1).eq(127).all(), "the largest value of a unit has the largest code"


def test_halves_go_to_the_even_code():
    x = torch.zeros(64)
    x[:6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert int8.quantize(x)[0][:6].tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_spoils_its_unit_alone(bad):
    x = torch.ones(3, 128)
    x[1, 70] = bad
    codes, scales = int8.quantize(x)
    assert scales.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert codes[1, 64:].eq(0).all() and codes[1, :64].eq(127).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-35, 1e-30, 1e30, 3.4e38])
def test_units_at_both_ends_of_the_range(size):
    x = torch.linspace(-1, 1, 64) * size
    back = int8.dequantize(*int8.quantize(x))
    assert back.isfinite().all()
    if size >= 1e-30:
        assert (back - x).abs().max() <= size / 254 * 1.00001
    else:
        assert not back.any(), "what is far below the smallest scale becomes 0"


def test_other_numbers_of_bits_and_tensors_without_axes_are_refused():
    with pytest.raises(tahf4.FormatError, match="5 bits; expected 4"):
        torch.ops.tahf4.quantize(torch.ones(64), None, 0, 5)
    with pytest.raises(tahf4.FormatError, match="without axes"):
        int8.quantize(torch.tensor(1.0))


def test_a_product_says_what_does_not_fit():
    codes, scales = int8.quantize(torch.ones(2, 128))
    weight = torch.ops.tahf4.quantize(torch.ones(3, 128))
    with pytest.raises(tahf4.FormatError, match="an activation in 8 bits has codes torch.int8"):
        torch.ops.tahf4.linear(codes, scales.to(torch.int32), *weight, None, torch.float32)
    with pytest.raises(tahf4.FormatError, match="activation of 2 units and weight of 1"):
        torch.ops.tahf4.linear(codes, scales, *torch.ops.tahf4.quantize(torch.ones(3, 64)), None, torch.float32)
