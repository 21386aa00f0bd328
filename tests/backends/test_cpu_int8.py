"""Activations in 8 bits in the C++ kernels, on each set of instructions."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import build

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4, int8
from tahf4_compiler.ops import registry

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
SETS = ["none", "avx2", "avx_vnni", "avx512_vnni", "amx"]
own, reference = torch.ops.tahf4_cpu, torch.ops.tahf4
GELU = "v0: float32 = gelu_tanh(y)"
NORM = "v0: float32 = layer_norm(x0, None, None, 1e-06)\nv1: float32 = mul(v0, x1)"


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    place = SETS.index(request.param)
    if place and not build.library().tahf4_instruction_sets() >> place & 1:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("TAHF4_CPU_ISA", request.param)
    registry.kernels()
    return request.param


def values(rows, k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.exp2(torch.randint(-9, 9, (rows, k), generator=generator))
    return x.to(dtype)


def same(got, wanted):
    """Whether codes and scales are equal, bit for bit but for the kind of NaN."""
    codes, scales = got
    numbers = ~scales.isnan()
    return (
        torch.equal(codes, wanted[0])
        and torch.equal(numbers, ~wanted[1].isnan())
        and torch.equal(scales[numbers], wanted[1][numbers])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k, block", [(1, 0), (63, 64), (64, 0), (100, 128), (256, 16), (4224, 64), (1024, 512)])
def test_codes_and_scales_are_those_of_the_reference(instruction_set, dtype, k, block):
    x = values(9, k, dtype)
    x[1, 0], x[2, -1], x[3] = torch.nan, -torch.inf, 0
    multiplier = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5
    for factors in (None, multiplier):
        assert same(own.quantize(x, factors, block, 8), reference.quantize(x, factors, block, 8))


def test_units_at_both_ends_of_the_range(instruction_set):
    x = torch.linspace(-1, 1, 64) * torch.tensor([1e-45, 1e-38, 2.0**-101, 2.0**-100, 1e30, 3.4e38])[:, None]
    x[0, :32] = torch.arange(32) + 0.5  # halves
    x[0, 32] = 127
    assert same(own.quantize(x, None, 0, 8), reference.quantize(x, None, 0, 8))


@pytest.mark.parametrize(
    "rows, k, n", [(1, 64, 1), (2, 65, 15), (3, 200, 16), (4, 640, 17), (7, 1000, 33), (17, 192, 100), (50, 4096, 64)]
)
def test_products_are_those_of_float64(instruction_set, rows, k, n):
    operands = (*registry.quantize(values(rows, k)), *registry.quantize(values(n, k, seed=1)))[2:]
    left = own.quantize(values(rows, k), None, 0, 8)
    right = hif4.dequantize(hif4.Packed(*operands, left[0].shape[-1]), torch.float64)
    wanted = int8.dequantize(*(part.double() for part in left)).double() @ right.mT
    bias = torch.linspace(-3, 3, n)
    assert relative(own.linear(*left, *operands, None, torch.float32), wanted) < 1e-6
    assert relative(own.linear(*left, *operands, bias, torch.float32), wanted + bias) < 1e-6
    (half,) = own.fused_linear(*left, *operands, bias, torch.bfloat16, [n], [], "", torch.bfloat16)
    assert relative(half.double(), wanted + bias) < 2**-8


def test_the_largest_sums_do_not_overflow(instruction_set):
    """Every product of a unit is 127 * 28, which no sum of pairs in int16 holds more than twice."""
    k, n = 192, 20
    x = torch.ones(5, k)
    x[1], x[2, ::2] = -1, -1
    weight = torch.full((n, k), 7.0)
    weight[1] = -7
    operands = own.quantize(weight)
    elements = hif4.dequantize(hif4.Packed(*operands, k)).double()
    left = own.quantize(x, None, 0, 8)
    wanted = int8.dequantize(*left).double() @ elements.mT
    assert torch.allclose(own.linear(*left, *operands, None, torch.float32).double(), wanted, rtol=1e-6)
    assert wanted[0, 0] > 1000


@pytest.mark.parametrize("bits", [(4, 8), (8, 4), (8, 8)])
def test_fused_kernels_mix_the_two(instruction_set, bits):
    first, second = bits
    x, factor = values(6, 128) / 64, torch.rand(128, generator=torch.Generator().manual_seed(2))
    weight = registry.quantize(values(192, 128, seed=3))
    left = own.fused_quantize([x, factor], NORM, None, 64, first)
    wanted = reference.fused_quantize([x, factor], NORM, None, 64, first)
    assert (left[0] != wanted[0]).sum() <= 2  # a norm's sum in another order may round a value differently
    got = own.linear_quantize(*left, *weight, None, torch.float32, [], GELU, None, 64, second)
    wanted = reference.linear_quantize(*left, *weight, None, torch.float32, [], GELU, None, 64, second)
    assert [part.dtype for part in got] == [part.dtype for part in wanted]
    assert [part.shape for part in got] == [part.shape for part in wanted]
    assert (got[0] != wanted[0]).float().mean() < 0.01


def test_what_does_not_fit_is_refused(instruction_set):
    with pytest.raises(tahf4.FormatError, match="6 bits"):
        own.quantize(torch.ones(2, 64), None, 0, 6)
    codes, scales = own.quantize(torch.ones(2, 64), None, 0, 8)
    weight = own.quantize(torch.ones(3, 64))
    with pytest.raises(tahf4.FormatError, match="8 bits"):
        own.linear(codes, scales.double(), *weight, None, torch.float32)
    with pytest.raises(tahf4.FormatError, match="8 bits"):
        own.linear(codes[:, :32], scales, *weight, None, torch.float32)
