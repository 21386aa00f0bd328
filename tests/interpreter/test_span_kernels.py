"""Units that share a level-1 scale, in the interpreter: the reference's bits; products take such operands as any."""

import dataclasses

import pytest
import torch
from tahf4_compiler.backends.triton import call, quantize

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


@pytest.mark.parametrize(
    "k, block, dtype, span",
    [
        pytest.param(k, block, dtype, span, marks=() if span in quick else pytest.mark.slow)
        for k, block, dtype, quick in (
            (256, 0, torch.float32, (2,)), (640, 64, torch.bfloat16, (4,)), (640, 128, torch.float16, (0,)),
            (300, 64, torch.float32, (2, 0)), (33, 2, torch.float32, SPANS),
        )
        for span in SPANS
    ],
)  # fmt: skip
def test_codes_and_scales_are_bit_for_bit_those_of_the_reference(k, block, dtype, span):
    x = wide(3, 2, k).to(dtype)
    x[0, 0, k // 2], x[1, 1, 0] = torch.nan, torch.inf
    x[2, 1] = 0.0
    for multiplier in (None, torch.randn(k).exp()):
        given = (x, multiplier, block, 4, span)
        same(triton.quantize(*given), reference.quantize(*given))


@pytest.mark.parametrize(
    ("rows", "units"),
    [
        pytest.param(rows, units, marks=() if units in (24, 600) else pytest.mark.slow)
        for rows, units in ((40, 4), (12, 24), (7, 80), (6, 100), (3, 600))
    ],
)
@pytest.mark.parametrize("span", SPANS)
def test_blocks_of_threads_take_whole_rows(rows, units, span):
    """Of 128 threads, 5 rows of 24 units leave 8 without one; rows of 600 have several units a thread."""
    x = wide(rows, 64 * units - 7)
    same(triton.quantize(x, None, 0, 4, span), reference.quantize(x, None, 0, 4, span))
    if units < 600:
        same(triton.quantize(x, None, 0, 8, span), reference.quantize(x, None, 0, 8))
        norm = "v0: float32 = layer_norm(x0, None, None, 1e-06)\nv1: float32 = add(v0, 1)"
        given = ([torch.randint(-9, 9, x.shape).float()], norm, None, 0, 4, span)
        found, wanted = (f.fused_quantize(*given) for f in (triton, reference))
        assert hif4.holds_span(hif4.Packed(*found, x.shape[-1]), span)
        assert (found[0] != wanted[0]).float().mean() < 1e-2


def test_a_row_whose_dot_does_not_fit_is_refused():
    x = torch.empty(1, 42800 * 64, device="meta")
    with pytest.raises(FormatError, match="a row of 42800 units .* Use a span of 4"):
        quantize.call([x], "", None, 0, 4, 0)


@pytest.mark.parametrize("program", ["", "v0: float32 = layer_norm(x0, None, None, 1e-06)"])
def test_a_block_of_threads_writes_no_row_that_it_has_in_part(program):
    """The interpreter runs blocks one after the other, so the next one would hide it."""
    (_, scales), (launch,) = quantize.call([wide(12, 64 * 24)], program, None, 0, 4, 0)
    scales.fill_(-1)
    dataclasses.replace(launch, grid=(1,)).run()
    assert (scales[:5] != -1).all() and (scales[5:] == -1).all()


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


@pytest.fixture
def many_rows(monkeypatch):
    """The path that adds integers over a span, whatever the number of rows."""
    monkeypatch.setenv("TAHF4_LINEAR_PATH", "int8")


def operands(rows, n, k, span):
    return [part for size in (rows, n) for part in reference.quantize(wide(size, k), None, 0, 4, span)]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("rows", "n", "units", "dtype"), [(1, 64, 1, torch.float32), (3, 10, 7, torch.bfloat16)])
def test_with_many_rows_products_are_those_of_the_reference(many_rows, rows, n, units, dtype, span):
    args = (*operands(rows, n, 64 * units, span), torch.randn(n), dtype, span)
    assert torch.equal(triton.linear(*args), reference.linear(*args))


@pytest.mark.parametrize(("span", "units"), [(2, 7), (4, 7), (0, 90), pytest.param(0, 340, marks=pytest.mark.slow)])
def test_the_largest_sums_are_exact(many_rows, span, units):
    # The dot of 90 units is above 2**22, that of 340 above 2**24: it does not fit into the mantissa of a float32.
    left, right = (torch.full((rows, 32 * units), 0x77, dtype=torch.uint8) for rows in (1, 3))
    right[1], right[2, 7] = 0xFF, 0x35
    scales = torch.full((3, units), -256 | 193, dtype=torch.int32)  # scale 1.25, all exponents set
    args = (left, scales[:1], right, scales, None, torch.float32, span)
    assert torch.equal(triton.linear(*args), reference.linear(*args))


@pytest.mark.parametrize("span", SPANS)
def test_scales_at_both_ends_of_their_range_and_rows_that_are_no_numbers(many_rows, span):
    x, w = wide(5, 448) * torch.tensor([1e-20, 1e4, 1.0, 1e-6, 1.0])[:, None], wide(9, 448) * 1e3
    x[2, 100], w[3, 447] = torch.nan, torch.inf
    args = (*reference.quantize(x, None, 0, 4, span), *reference.quantize(w, None, 0, 4, span), None, torch.float32)
    found, wanted = (f.linear(*args, span) for f in (triton, reference))
    assert found[2].isnan().all() and found[:, 3].isnan().all() and found.isnan().sum() == 9 + 5 - 1
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("span", SPANS)
def test_with_many_rows_what_follows_a_product_is_that_of_the_reference(many_rows, span):
    given, bias = operands(3, 64, 320, span), torch.randn(64)
    parts = (*given, bias, torch.float32, [20, 44], [], "", torch.float32, span)
    assert all(map(torch.equal, triton.fused_linear(*parts), reference.fused_linear(*parts)))
    gate = "v0: float32 = mul(y, x0)\nv1: float32 = add(v0, x1)"
    gated = (*given, bias, torch.bfloat16, [64], [torch.randn(64), torch.randn(3, 64)], gate, torch.float32, span)
    same(triton.fused_linear(*gated) * 2, reference.fused_linear(*gated) * 2)
    branch = [torch.randint(-8, 9, size).float() for size in ((3, 4), (4, 64))]
    program = "v0: float32 = matmul(x0, x1)\nv1: float32 = add(y, v0)"
    added = (*given, None, torch.float32, [64], branch, program, torch.float32, span)
    same(triton.fused_linear(*added) * 2, reference.fused_linear(*added) * 2)
    whole = (*given, bias, torch.float32, [], "", None, 64, 4, span)
    same(triton.linear_quantize(*whole), reference.linear_quantize(*whole))


@pytest.fixture
def library(monkeypatch):
    """The path through the library's product where it fits, and how often it was taken."""
    monkeypatch.setenv("TAHF4_LINEAR_PATH", "library")
    real, taken = call.int_product, []
    monkeypatch.setattr(call, "int_product", lambda *args: taken.append(args) or real(*args))
    return taken


@pytest.mark.parametrize(("rows", "n", "units"), [(17, 8, 1), (40, 136, 7)])
def test_by_the_library_products_are_those_of_the_reference(library, rows, n, units):
    left, right = wide(rows, 64 * units), wide(n, 64 * units)
    left[3] *= 1e-20
    left[4], right[7] = left[4] * 1e4, right[7] * 1e3
    left[1, 5], right[2, 63] = torch.nan, torch.inf
    given = [part for x in (left, right) for part in reference.quantize(x, None, 0, 4, 0)]
    for bias, dtype in ((None, torch.float32), (torch.randn(n), torch.bfloat16)):
        found, wanted = (f.linear(*given, bias, dtype, 0) for f in (triton, reference))
        assert torch.equal(found.isnan(), wanted.isnan()) and found.isnan().sum() == n + rows - 1
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert len(library) == 2


@pytest.mark.slow
def test_by_the_library_the_largest_sums_are_exact(library):
    units = 340  # their dot does not fit into the mantissa of a float32
    left, right = (torch.full((rows, 32 * units), 0x77, dtype=torch.uint8) for rows in (17, 8))
    right[1], right[2, 7] = 0xFF, 0x35
    scales = torch.full((17, units), -256 | 193, dtype=torch.int32)  # scale 1.25, all exponents set
    args = (left, scales, right, scales[:8], None, torch.float32, 0)
    assert torch.equal(triton.linear(*args), reference.linear(*args)) and library


def test_by_the_library_what_follows_a_product_is_that_of_the_reference(library):
    given, bias = operands(33, 128, 320, 0), torch.randn(128)
    parts = (*given, bias, torch.float32, [20, 44, 64], [], "", torch.float32, 0)
    assert all(map(torch.equal, triton.fused_linear(*parts), reference.fused_linear(*parts)))
    gate = "v0: float32 = mul(y, x0)\nv1: float32 = add(v0, x1)"
    gated = (*given, bias, torch.bfloat16, [128], [torch.randn(128), torch.randn(33, 128)], gate, torch.float32, 0)
    assert torch.equal(triton.fused_linear(*gated)[0], reference.fused_linear(*gated)[0])
    branch = [torch.randint(-8, 9, size).float() for size in ((33, 4), (4, 128))]
    program = "v0: float32 = matmul(x0, x1)\nv1: float32 = add(y, v0)"
    added = (*given, None, torch.float32, [128], branch, program, torch.float32, 0)
    assert torch.equal(triton.fused_linear(*added)[0], reference.fused_linear(*added)[0])
    whole = (*given, bias, torch.float32, [], "", torch.rand(128) + 0.5, 64, 4, 0)
    same(triton.linear_quantize(*whole), reference.linear_quantize(*whole))
    assert len(library) == 4


@pytest.mark.parametrize(("rows", "n", "span"), [(16, 64, 0), (33, 44, 0), (33, 64, 2)])
def test_what_the_library_does_not_fit_takes_another_path(library, rows, n, span):
    args = (*operands(rows, n, 128, span), None, torch.float32, span)
    torch.testing.assert_close(triton.linear(*args), reference.linear(*args))
    assert not library


def test_another_span_is_refused():
    with pytest.raises(FormatError, match="expected 1, 2 or 4 units"):
        triton.quantize(torch.randn(3, 64), None, 0, 4, 3)
