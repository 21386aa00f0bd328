"""Units that share a level-1 scale, in the C++ kernels: the reference's bits, of codes and of products."""

from __future__ import annotations

import pytest
import torch
from cpu_operators import DTYPES, assert_same
from tahf4_compiler.backends import cpu

from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
SPANS = (2, 4, 0)
reference = torch.ops.tahf4
ours = torch.ops.tahf4_cpu


def generator(seed):
    return torch.Generator().manual_seed(seed)


def wide(rows, k, seed=0, lead=()):
    """Values whose units differ in size by orders of magnitude."""
    sizes = torch.exp2(torch.randint(-6, 7, (*lead, rows, hif4.units(k)), generator=generator(seed)))
    return torch.randn(*lead, rows, k, generator=generator(seed + 1)) * sizes.repeat_interleave(64, -1)[..., :k]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("k", [1, 64, 130, 256, 640, 5000])
def test_conversion_is_bit_exact(each_set, k, span):
    for dtype in DTYPES:
        x, multiplier = wide(7, k).to(dtype), torch.rand(k, generator=generator(3)) + 0.5
        for block in (0, 4, 64):
            assert_same(ours.quantize(x, multiplier, block, 4, span), reference.quantize(x, multiplier, block, 4, span))
        assert_same(ours.quantize(x, None, 0, 4, span), reference.quantize(x, None, 0, 4, span))
        # Other numbers of bits have no level-1 scales.
        assert_same(ours.quantize(x, None, 0, 8, span), reference.quantize(x, None, 0, 8))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("k", "block"), [(128, 128), (640, 128), (1000, 512), (5120, 1024), (8192, 8192), (4224, 128)])
def test_rotations_wider_than_a_unit(each_set, k, block, span):
    x, multiplier = wide(5, k), torch.rand(k, generator=generator(3)) + 0.5
    for dtype in DTYPES:
        given = (x.to(dtype), multiplier, block, 4, span)
        assert_same(ours.quantize(*given), reference.quantize(*given))


@pytest.mark.parametrize("span", SPANS)
def test_what_is_not_finite_and_strides(each_set, span):
    x = wide(40, 700)
    x[3, 5], x[4, 699], x[5, 300], x[6] = torch.nan, torch.inf, -torch.inf, 0.0
    x[7] *= 1e-38
    for view in (x, x[:, 1:], x.t().contiguous().t(), x.reshape(4, 10, 700).transpose(0, 1)):
        assert_same(ours.quantize(view, None, 4, 4, span), reference.quantize(view, None, 4, 4, span))


PROGRAMS = [
    "v0: float32 = add(x0, 1)\nv1: bfloat16 = mul(v0, x1)",
    "v0: float32 = layer_norm(x0, None, None, 1e-06)\nv1: float32 = mul(v0, x1)",
]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("k", "block"), [(64, 64), (130, 0), (640, 64), (640, 128), (1000, 512), (576, 64)])
def test_a_program_before_the_conversion(each_set, k, block, program, span):
    if each_set == "none":
        pytest.skip("runs the reference")
    inputs = [wide(3, k, lead=(2,)), torch.rand(k, generator=generator(5)) + 0.5]
    found = ours.fused_quantize(inputs, program, inputs[1], block, 4, span)
    # What the program gives is looked at apart: a norm may differ in a last bit.
    plain = ours.fused_quantize(inputs, program, inputs[1], block, 4, 1)
    if "layer_norm" not in program:
        assert_same(found, reference.fused_quantize(inputs, program, inputs[1], block, 4, span))
    left, right = (hif4.dequantize(hif4.Packed(*p, k)) for p in (found, plain))
    assert hif4.holds_span(hif4.Packed(*found, k), span)
    assert (left - right).norm() < 0.2 * right.norm()
    wanted = reference.fused_quantize(inputs, program, inputs[1], block, 4, span)
    assert (found[0] != wanted[0]).float().mean() < 1e-2
    assert torch.equal(found[1] & 0xFF, wanted[1] & 0xFF)


def operands(rows, n, k, span, seed=0):
    left, right = wide(rows, k, seed), wide(n, k, seed + 2)
    return (*reference.quantize(left, None, 0, 4, span), *reference.quantize(right, None, 0, 4, span))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 64, 1), (2, 130, 15), (3, 200, 16), (4, 640, 17), (5, 320, 70), (6, 384, 32), (7, 1000, 33), (50, 192, 100)]
    + [(rows, 448, 65 + rows) for rows in (9, 11, 13, 16, 18, 31)],
)
def test_the_product_is_that_of_the_reference(each_set, rows, k, n, span):
    given = operands(rows, n, k, span)
    bias = torch.linspace(-3, 3, n)
    plain = (*given, None, torch.float32, span)
    assert torch.equal(ours.linear(*plain), reference.linear(*plain))
    for dtype in DTYPES:
        wanted = reference.linear(*given, bias, dtype, span)
        assert torch.equal(ours.linear(*given, bias, dtype, span), wanted)
        fused = ours.fused_linear(*given, bias, dtype, [n], [], "", dtype, span)
        assert torch.equal(fused[0], wanted)
    parts = ours.fused_linear(*given, bias, torch.float32, [1, n - 1], [], "", torch.float32, span)
    assert torch.equal(torch.cat(parts, 1), reference.linear(*given, bias, torch.float32, span))
    program = "v0: float32 = add(y, x0)"
    for bits in (4, 8):
        whole = (*given, None, torch.float32, [bias], program, None, 0, bits, span)
        assert_same(ours.linear_quantize(*whole), reference.linear_quantize(*whole))


@pytest.mark.parametrize("signs", [(0x77, 0x77), (0x77, 0xFF), (0xFF, 0xFF), (0x7F, 0xF7)])
@pytest.mark.parametrize("units", [3, 400])
def test_the_largest_sums_are_exact(each_set, units, signs):
    # 400 units: their dot is above 2**24 and does not fit into the mantissa of a float32.
    left, right = (torch.full((9, 32 * units), sign, dtype=torch.uint8) for sign in signs)
    right[:, 7] = 0x35
    scales = torch.full((9, units), -256 | 193, dtype=torch.int32)  # scale 1.25, all exponents set
    for span in SPANS:
        given = (left, scales, right, scales, None, torch.float32, span)
        assert torch.equal(ours.linear(*given), reference.linear(*given))
    exact = hif4.dequantize(hif4.Packed(left, scales, 64 * units), torch.float64)
    exact = exact @ hif4.dequantize(hif4.Packed(right, scales, 64 * units), torch.float64).mT
    assert ((ours.linear(*given).double() - exact).abs() <= 2.0**-23 * exact.abs()).all()


def test_sums_beyond_the_mantissa_of_a_float32_are_rounded_once(each_set):
    units = 8000
    generated = torch.randint(0, 8, (5, 64 * units), generator=generator(6))
    left = torch.full((3, 32 * units), 0x77, dtype=torch.uint8)  # odd numbers, so that no bit is free
    right = (generated[:, ::2] + 16 * generated[:, 1::2]).to(torch.uint8)
    plain, doubled = (torch.full((n, units), word, dtype=torch.int32) for n, word in ((3, 193), (5, 0xFF00 | 193)))
    dot = 7 * 2 * generated.sum(1)
    assert (dot > 2**24).all() and (dot % 4 == 2).any()
    wanted = (dot.float() * 1.25) * (1.25 / 16)
    for operators in (ours, reference):
        found = operators.linear(left, plain, right, doubled, None, torch.float32, 0)
        assert torch.equal(found, wanted.expand(3, 5))


def test_the_reference_adds_spans_in_order():
    """Against the definition, one output at a time, in float64 with each rounding spelled out."""
    left_codes, left_scales, right_codes, right_scales = operands(3, 2, 640, 4)
    found = reference.linear(left_codes, left_scales, right_codes, right_scales, None, torch.float32, 4)
    left, right = (
        hif4.dequantize(hif4.Packed(c, s, 640), torch.float64) for c, s in
        ((left_codes, left_scales), (right_codes, right_scales))
    )
    for i in range(3):
        for j in range(2):
            total = torch.zeros(())
            for first, last in ((0, 4), (4, 8), (8, 10)):
                a, b = (hif4.level1_value(s[first]).double() for s in (left_scales[i], right_scales[j]))
                part = slice(64 * first, 64 * last)
                dot = 16 * (left[i, part] / a) @ (right[j, part] / b)
                assert dot == dot.round()
                scaled = (dot.float() * b.float()).double()
                total = (scaled * (a / 16) + total.double()).float()
            assert found[i, j] == total


@pytest.mark.parametrize("span", (1, *SPANS))
def test_a_row_without_a_number_is_nan(each_set, span):
    x, w = wide(12, 320), wide(20, 320, 5)
    x[3, 100], w[4, 319] = torch.nan, torch.inf
    given = (*reference.quantize(x, None, 0, 4, span), *reference.quantize(w, None, 0, 4, span))
    found = ours.linear(*given, None, torch.float32, span)
    wanted = torch.zeros(12, 20, dtype=torch.bool)
    wanted[3], wanted[:, 4] = True, True
    assert torch.equal(found.isnan(), wanted)


def test_activations_of_8_bits_have_no_span(each_set):
    x, w = wide(12, 320), wide(20, 320, 5)
    given = (*reference.quantize(x, None, 0, 8), *reference.quantize(w, None, 0, 4, 0))
    assert torch.equal(ours.linear(*given, None, torch.float32, 0), ours.linear(*given, None, torch.float32, 1))


def test_a_product_over_spans_is_that_over_units_but_for_its_order(each_set):
    for span in SPANS:
        given = operands(20, 40, 1280, span)
        whole, units = (ours.linear(*given, None, torch.float32, s) for s in (span, 1))
        assert (whole - units).abs().max() <= 2e-6 * units.abs().max()


def test_the_span_is_a_promise_that_the_kernels_use(each_set):
    given = operands(20, 40, 1280, 1)  # every unit has its own scale: the first one counts for its span
    for span in SPANS:
        found = ours.linear(*given, None, torch.float32, span)
        assert torch.equal(found, reference.linear(*given, None, torch.float32, span))
        assert not torch.allclose(found, ours.linear(*given, None, torch.float32, 1))


@pytest.mark.parametrize("span", [3, -1, 5])
def test_another_span_is_refused(each_set, span):
    x = torch.randn(3, 64)
    given = (*reference.quantize(x), *reference.quantize(x))
    for call in (
        lambda: ours.quantize(x, None, 0, 4, span),
        lambda: ours.fused_quantize([x], "v0: float32 = neg(x0)", None, 0, 4, span),
        lambda: ours.linear(*given, None, torch.float32, span),
    ):
        with pytest.raises(FormatError, match="expected 1, 2 or 4 units"):
            call()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(each_set, threads, _threads):
    x = wide(70, 5000)
    torch.set_num_threads(threads)
    for span in SPANS:
        assert_same(ours.quantize(x, None, 4, 4, span), reference.quantize(x, None, 4, 4, span))
    given = operands(70, 150, 1000, 0)
    assert torch.equal(ours.linear(*given, None, torch.float32, 0), reference.linear(*given, None, torch.float32, 0))
