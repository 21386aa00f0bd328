"""The kernels that round units of reconstructed weights, in Triton's interpreter, bit for bit the reference."""

import pytest
import torch
from tahf4_compiler.backends import triton

from tahf4_compiler.format import hif4, reconstruct
from tahf4_compiler.format.scale_search import search_scales


@pytest.fixture(params=[1, 37])  # of a program of 16 rows; and three, the last one not whole
def unit(request):
    generator = torch.Generator().manual_seed(request.param)
    values = torch.randn(request.param, 64, generator=generator) * torch.rand(64, generator=generator).exp() ** 3
    values[0, :8] = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 3e4, -3e4, 1.0, -1.0])
    x = torch.randn(200, 64, generator=generator)
    x[:, 1::3] += x[:, ::3][:, : x[:, 1::3].shape[1]]
    return values, reconstruct._steps(search_scales(values).scales), x.T @ x / 200


def test_codes_and_errors_are_those_of_the_reference(unit):
    values, steps, moments = unit
    factor = reconstruct.damped_factor(moments)
    wanted = reconstruct.round_unit(values.clone(), steps, factor)
    found = triton.round_unit(values.clone(), steps, factor)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert wanted[1].any()


def test_what_is_rounded_again_is_that_of_the_reference(unit):
    values, steps, moments = unit
    rounded = hif4.dequantize(search_scales(values))
    slopes = (rounded - values) @ moments
    wanted, found = rounded.clone(), rounded.clone()
    reconstruct.descend_unit(wanted, slopes.clone(), steps, moments)
    triton.descend_unit(found, slopes.clone(), steps, moments)
    assert torch.equal(found, wanted) and (len(values) == 1 or not torch.equal(found, rounded))
