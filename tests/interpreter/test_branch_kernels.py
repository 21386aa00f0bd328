"""Kernels that quantize and multiply by the first factors of branches, in the interpreter, against the reference."""

import pytest
import torch
from test_quantize_kernels import awkward

triton = torch.ops.tahf4_triton
reference = torch.ops.tahf4

NORM = "v0: float32 = to(x0)\nv1: float32 = layer_norm(v0, None, None, 1e-06)\nv2: {dtype} = mul(v1, x1)"
RELU = "v0: {dtype} = relu(x0)"


def factors(k, ranks, dtype):
    return [torch.randn(k, rank).to(dtype) for rank in ranks]


def check(got, wanted, tolerance, exact=True):
    """Codes and scales are equal; products differ by the order of their float32 sums, and a rounding."""
    assert len(got) == len(wanted)
    if exact:
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    for left, right in zip(got[2:], wanted[2:], strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape and left.is_contiguous()
        error = (left.double() - right.double()).norm() / right.double().norm()
        assert error < tolerance, float(error)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
)
@pytest.mark.parametrize(("k", "ranks"), [(256, (8,)), (320, (16, 96)), (100, (32, 24, 8))])
def test_products_beside_codes_that_are_those_of_the_reference(dtype, tolerance, k, ranks):
    x, multiplier = torch.randn(2, 35, k).to(dtype), torch.rand(k) + 0.5
    given = ([x], RELU.format(dtype=str(dtype)[6:]), factors(k, ranks, dtype), multiplier, 64 if k % 64 == 0 else 4)
    check(triton.branched_quantize(*given), reference.branched_quantize(*given), tolerance)
