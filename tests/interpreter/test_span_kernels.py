"""Units that share a level-1 scale, in the interpreter: the reference's bits; products take such operands as any."""

import pytest
import torch

from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4

triton = torch.ops.tahf4_triton
reference = torch.ops.tahf4
SPANS = (2, 4, 0)


def wide(*shape):
    """Values whose units differ in size by orders of magnitude."""
    x = torch.randn(*shape)
    sizes = torch.exp2(torch.randint(-6, 7, (*shape[:-1], hif4.units(shape[-1]))))
    return x * sizes.repeat_interleave(64, -1)[..., : shape[-1]]


def same(got, wanted):
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    "k, block, dtype",
    [
        *((256, 0, torch.float32), (640, 64, torch.bfloat16), (640, 128, torch.float16)),
        *((300, 64, torch.float32), (33, 2, torch.float32)),
    ],
)
def test_codes_and_scales_are_bit_for_bit_those_of_the_reference(k, block, dtype, span):
    x = wide(3, 2, k).to(dtype)
    x[0, 0, k // 2], x[1, 1, 0] = torch.nan, torch.inf
    x[2, 1] = 0.0
    for multiplier in (None, torch.randn(k).exp()):
        given = (x, multiplier, block, 4, span)
        same(triton.quantize(*given), reference.quantize(*given))


@pytest.mark.parametrize("span", SPANS)
def test_spans_that_lie_in_several_blocks_of_threads(span):
    x = wide(40, 200)  # 160 units: a block has 128
    same(triton.quantize(x, None, 0, 4, span), reference.quantize(x, None, 0, 4, span))
    same(triton.quantize(x, None, 0, 8, span), reference.quantize(x, None, 0, 8))


@pytest.mark.parametrize("span", SPANS)
def test_programs_with_and_without_a_reduction(span):
    x, scale = wide(2, 3, 320).bfloat16(), torch.randn(2, 1, 320)
    plain = "v0: float32 = to(x0)\nv1: float32 = add(x1, 1)\nv2: float32 = mul(v0, v1)"
    given = ([x, scale], plain, None, 64, 4, span)
    same(triton.fused_quantize(*given), reference.fused_quantize(*given))
    norm = "v0: float32 = to(x0)\nv1: float32 = layer_norm(v0, None, None, 1e-06)\nv2: float32 = mul(v1, x1)"
    found, wanted = (f.fused_quantize([x, scale], norm, None, 64, 4, span) for f in (triton, reference))
    assert hif4.holds_span(hif4.Packed(*found, 320), span)
    assert (found[0] != wanted[0]).float().mean() < 1e-2


@pytest.mark.parametrize("span", SPANS)
def test_products_of_operands_that_hold_a_span(span):
    left, right = (reference.quantize(wide(n, 320), None, 0, 4, span) for n in (5, 40))
    wanted = reference.linear(*left, *right, None, torch.float32, span)
    found = triton.linear(*left, *right, None, torch.float32, span)
    assert (found - wanted).norm() <= 2e-6 * wanted.norm()
    again = triton.fused_linear(*left, *right, None, torch.float32, [40], [], "", torch.float32, span)
    assert torch.equal(again[0], found)
    _, scales = triton.linear_quantize(*left, *right, None, torch.float32, [], "", None, 0, 4, span)
    assert torch.equal(scales, reference.quantize(found)[1])


def test_another_span_is_refused():
    with pytest.raises(FormatError, match="expected 1, 2 or 4 units"):
        triton.quantize(torch.randn(3, 64), None, 0, 4, 3)
