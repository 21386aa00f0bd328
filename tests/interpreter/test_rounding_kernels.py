"""The roundings of HiF4 in the interpreter: the reference's bits."""

import hif4_published as published
import pytest
import torch

triton = torch.ops.tahf4_triton
reference = torch.ops.tahf4


def same(got, wanted):
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1].view(torch.int32), wanted[1].view(torch.int32))  # NaN, too


@pytest.fixture(scope="module")
def hard():
    some = published.hard_units() + published.spread_units()
    return torch.tensor(some[:40] + some[-8:]).flatten().view(16, 192)


@pytest.mark.parametrize("form", [8, 9, 10, 17])
def test_codes_and_scales_are_bit_for_bit_those_of_the_reference(hard, form):
    for x in (hard, hard.bfloat16(), hard[:, :100]):
        found = triton.quantize(x, None, 0, 4, form)
        same(found, reference.quantize(x, None, 0, 4, form))
    plain = reference.quantize(hard, None, 0, 4, form % 8)
    assert not torch.equal(triton.quantize(hard, None, 0, 4, form)[0], plain[0])
    same(triton.quantize(hard, None, 64, 4, form), reference.quantize(hard, None, 64, 4, form))
    same(triton.quantize(hard, None, 0, 8, form), reference.quantize(hard, None, 0, 8))


@pytest.mark.parametrize("form", [9, 17])
def test_a_program_before_it(hard, form):
    program = "v0: float32 = to(x0)\nv1: float32 = mul(v0, x1)"
    given = ([hard, torch.rand(1, 192) + 0.5], program, None, 0, 4, form)
    same(triton.fused_quantize(*given), reference.fused_quantize(*given))


@pytest.mark.parametrize("form", [9, 17])
@pytest.mark.parametrize("block", [0, 64])
def test_the_result_of_a_product(block, form):
    x, weight = torch.randn(9, 128), torch.randn(192, 128)
    sides = (*reference.quantize(x), *reference.quantize(weight))
    product = (*sides, None, torch.bfloat16, [], "v0: float32 = to(y)", None, block)
    y = reference.linear(*sides, None, torch.bfloat16)
    same(triton.linear_quantize(*product, 4, form), reference.quantize(y, None, block, 4, form))
    same(triton.linear_quantize(*product, 4, 1), reference.quantize(y, None, block))
