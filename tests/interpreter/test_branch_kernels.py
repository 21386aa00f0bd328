"""Kernels that quantize and multiply by the first factors of branches, in the interpreter, against the reference."""

import pytest
import torch
from tahf4_compiler.backends.triton import branches

from tahf4_compiler.format import hif4

triton = torch.ops.tahf4_triton
reference = torch.ops.tahf4

NORM = "v0: float32 = to(x0)\nv1: float32 = {norm}\nv2: float32 = mul(v1, x1)\nv3: {dtype} = add(v2, x2)"
RELU = "v0: {dtype} = relu(x0)"
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]


def factors(k, ranks, dtype):
    return [torch.randn(k, rank).to(dtype) for rank in ranks]


def near(got, wanted, tolerance):
    """The products differ by the order of their float32 sums, and by a rounding."""
    assert len(got) == len(wanted)
    for left, right in zip(got[2:], wanted[2:], strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape and left.is_contiguous()
        error = (left.double() - right.double()).norm() / right.double().norm()
        assert error < tolerance, float(error)


def same(got, wanted):
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("rows", "k", "ranks"),
    [((2, 35), 256, (8,)), ((3,), 320, (16, 96)), ((9,), 100, (32, 8, 24)), ((40,), 192, (96, 96))],
)
def test_codes_are_those_of_the_reference_and_products_are_near(dtype, tolerance, rows, k, ranks):
    """Also where a row is split, where columns do not fill a unit, and units not a block of threads."""
    x, multiplier = torch.randn(*rows, k).to(dtype), torch.rand(k) + 0.5
    block = {256: 256, 100: 4}.get(k, 64)
    given = ([x], RELU.format(dtype=str(dtype)[6:]), factors(k, ranks, dtype), multiplier, block)
    got, wanted = triton.branched_quantize(*given), reference.branched_quantize(*given)
    same(got, wanted)
    near(got, wanted, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("norm", ["layer_norm(v0, None, None, 1e-06)", "rms_norm(v0, None, 1e-06)"])
def test_a_norm_is_computed_for_both(dtype, tolerance, norm):
    x, table = torch.randn(2, 33, 192).to(dtype), torch.randn(2, 2, 1, 192)
    given = [x, *table], NORM.format(norm=norm, dtype=str(dtype)[6:]), factors(192, (32,), dtype), None, 64
    got, wanted = triton.branched_quantize(*given), reference.branched_quantize(*given)
    near(got, wanted, tolerance)
    a, b = (hif4.dequantize(hif4.Packed(*found[:2], 192)) for found in (got, wanted))
    assert (a != b).float().mean() < 1e-2 and (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("blocks", [1, 2, 128])
def test_a_row_is_computed_by_one_block_of_threads_or_by_several(blocks, monkeypatch):
    monkeypatch.setattr(branches, "BLOCKS", blocks)
    x = torch.randn(70, 600)
    given = [x], "", factors(600, (8, 40), torch.float32), torch.rand(600) + 0.5, 8
    _, calls = branches.calls(*given)
    assert calls[0].grid == (2, max(1, min(blocks // 2, 3)))
    assert [call.name for call in calls] == ["kernel", "finish"][: 1 if blocks < 4 else 2]
    got, wanted = triton.branched_quantize(*given), reference.branched_quantize(*given)
    same(got, wanted)
    near(got, wanted, 1e-6)


@pytest.mark.parametrize(("bits", "span"), [(8, 1), (4, 9), (4, 17)])
def test_other_forms_of_an_activation(bits, span):
    x = torch.randn(2, 20, 320).bfloat16()
    given = [x], "", factors(320, (16,), torch.bfloat16), torch.rand(320) + 0.5, 64, bits, span
    got, wanted = triton.branched_quantize(*given), reference.branched_quantize(*given)
    same(got, wanted)
    near(got, wanted, 4e-3)


def test_what_is_not_finite_stays_in_its_row():
    """Nor is what lies behind the columns multiplied: 1 / 0 is infinite."""
    x = torch.randn(5, 100) + 10
    x[1, 3] = float("inf")
    given = [x], "v0: float32 = div(x1, x0)\nv1: float32 = mul(v0, x0)", factors(100, (8,), torch.float32)
    got, wanted = (f.branched_quantize([x, torch.ones(100)], *given[1:]) for f in (triton, reference))
    same(got, wanted)
    assert torch.equal(got[2].isfinite(), wanted[2].isfinite()) and got[2].isfinite().sum() == 32


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)])
def test_no_rows_and_no_columns(shape):
    x, factor = torch.randn(*shape), torch.randn(shape[-1], 8)
    got, wanted = triton.branched_quantize([x], "", [factor]), reference.branched_quantize([x], "", [factor])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_strided_inputs_and_factors():
    x, factor = torch.randn(128, 7).t(), torch.randn(8, 128).t()
    got, wanted = triton.branched_quantize([x], "", [factor]), reference.branched_quantize([x], "", [factor])
    same(got, wanted)
    near(got, wanted, 1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([torch.randn(2, 64)], "", [torch.randn(63, 8)]), "a factor of a branch is"),
        (([torch.randn(2, 64)], "v0: bfloat16 = neg(x0)", [torch.randn(64, 8)]), "expected torch.bfloat16"),
        (([torch.randn(2, 64)], "", [torch.randn(64, 8)], torch.ones(3)), "multiplier of shape"),
    ],
)
def test_the_kernel_refuses_what_the_reference_refuses(given, message):
    for space in (triton, reference):
        with pytest.raises(Exception, match=message):
            space.branched_quantize(*given)
