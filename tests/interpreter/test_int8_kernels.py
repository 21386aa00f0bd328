"""Activations in 8 bits in Triton's interpreter, on each path, against the reference operators."""

import pytest
import torch

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4, int8
from tahf4_compiler.plugins import host

triton, reference = torch.ops.tahf4_triton, torch.ops.tahf4
NORM = "v0: float32 = layer_norm(x0, None, None, 1e-06)"
GATE = "v0: float32 = mul(y, x0)\nv1: float32 = to(x1)\nv2: float32 = add(v1, v0)\nv3: bfloat16 = to(v2)"


@pytest.fixture(params=("packed", "int8", "bf16"))
def path(request, monkeypatch):
    monkeypatch.setenv("TAHF4_LINEAR_PATH", request.param)
    return request.param


def sides(lead, n, k):
    x, w = torch.randn(*lead, k), torch.randn(n, k)
    return (*reference.quantize(x, None, 0, 8), *reference.quantize(w))


def exact(codes, scales, weight_codes, weight_scales):
    right = hif4.dequantize(hif4.Packed(weight_codes, weight_scales, codes.shape[-1]), torch.float64)
    left = codes.double().unflatten(-1, (-1, 64)) * scales.double()[..., None]
    return left.flatten(-2) @ right.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, block", [(64, 0), (100, 128), (192, 64), (1024, 0)])
def test_codes_and_scales_are_those_of_the_reference(dtype, k, block):
    x = (torch.randn(5, k) * torch.exp(torch.randn(5, k))).to(dtype)
    x[1], x[2, 3], x[3, 0], x[4] = 0, torch.nan, -torch.inf, x[4] * 1e-35
    args = (torch.rand(k) + 0.5, block, 8)
    got, wanted = triton.quantize(x, *args), reference.quantize(x, *args)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1].nan_to_num(-1), wanted[1].nan_to_num(-1))


def test_a_norm_before_it():
    x, factors = torch.randn(6, 320), torch.rand(320) + 0.5
    got = triton.fused_quantize([x], NORM, factors, 64, 8)
    wanted = reference.fused_quantize([x], NORM, factors, 64, 8)
    assert (got[0].int() - wanted[0].int()).abs().max() <= 1
    assert torch.allclose(got[1], wanted[1], rtol=1e-5)


@pytest.mark.parametrize("lead, n, k", [((2, 9), 96, 192), ((5,), 130, 100), ((1,), 64, 1024), ((3, 23), 130, 128)])
def test_a_product_is_the_exact_one_but_for_the_order_of_the_sum(path, lead, n, k):
    operands = sides(lead, n, k)
    bias = torch.randn(n)
    got, wanted = triton.linear(*operands, bias, torch.float32), exact(*operands) + bias
    assert got.shape == (*lead, n)
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_nan_units_reach_their_rows_only(path):
    codes, scales, *weight = sides((6,), 80, 192)
    scales[2, 1] = torch.nan
    got = triton.linear(codes, scales, *weight, None, torch.float32)
    assert got.isnan().any(dim=1).tolist() == [False, False, True, False, False, False]
    assert got[2].isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [0, 64])
def test_product_and_quantization(path, block, bits):
    args = (*sides((5,), 130, 320), torch.randn(130), torch.float32, [], "v0: float32 = gelu_tanh(y)")
    after = (torch.rand(130) + 0.5, block, bits)
    got, wanted = triton.linear_quantize(*args, *after), reference.linear_quantize(*args, *after)
    assert [part.dtype for part in got] == [part.dtype for part in wanted]
    values = [int8.dequantize(*p) if bits == 8 else hif4.dequantize(hif4.Packed(*p, 130)) for p in (got, wanted)]
    assert (values[0] - values[1]).norm() <= 0.02 * values[1].norm()


def test_gate_and_residual(path):
    inputs = [torch.randn(2, 1, 96), torch.randn(2, 9, 96).to(torch.bfloat16)]
    args = (*sides((2, 9), 96, 192), torch.randn(96), torch.bfloat16, [96], inputs, GATE, torch.bfloat16)
    (got,), (wanted,) = triton.fused_linear(*args), reference.fused_linear(*args)
    assert torch.allclose(got.float(), wanted.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_of_16_bits_is_none_of_them_but_its_weight_is_dequantized_by_a_kernel(dtype):
    x, w, bias = torch.randn(5, 100).to(dtype), reference.quantize(torch.randn(48, 100)), torch.randn(48).to(dtype)
    codes, scales = reference.quantize(x, None, 64, 16)
    for call in (
        lambda: triton.quantize(x, None, 64, 16),
        lambda: triton.fused_quantize([x], "v0: float32 = to(x0)", None, 64, 16),
        lambda: triton.linear(codes, scales, *w, bias, dtype),
        lambda: triton.linear_quantize(codes, scales, *w, bias, dtype, [], "", None, 0, 4),
    ):
        with pytest.raises(tahf4.FormatError, match=r"16 bits; expected 4 \(HiF4\) or 8 \(int8 with a scale a unit\)$"):
            call()
    assert host.find("dequantize", w[0]) is triton.dequantize.default
    values = hif4.dequantize(hif4.Packed(*w, 128), dtype)
    assert torch.equal(triton.dequantize(*w, 128, dtype), values)
    product = reference.linear(codes, scales, *w, bias, dtype)
    assert torch.equal(product, torch.nn.functional.linear(codes, values, bias))
