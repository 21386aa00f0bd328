"""Units that share a level-1 scale: against the scalar oracle, and for readers that know nothing of it."""

from __future__ import annotations

from fractions import Fraction

import hif4_scalar as scalar
import pytest
import torch
from hif4_units import assert_same_packed, assert_same_values, expected, rows, some
from hypothesis import given
from hypothesis import strategies as st
from tahf4_compiler.backends import cpu
from torch import Tensor

from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4, scale_search, spans
from tahf4_compiler.format.reconstruct import moment_error, reconstruct
from tahf4_compiler.format.scale_search import search_error, search_exponents, search_scales

any_span = st.sampled_from(hif4.SPANS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(rows, k):
    """Values whose units differ in size by orders of magnitude."""
    sizes = torch.exp2(torch.randint(-6, 7, (rows, hif4.units(k)), generator=torch.Generator().manual_seed(9)))
    return normal(rows, k) * sizes.repeat_interleave(64, 1)[:, :k]


def read_by_the_oracle(packed):
    codes = packed.codes.reshape(-1, packed.codes.shape[-1]).tolist()
    words = [[word & 0xFFFFFFFF for word in row] for row in packed.scales.reshape(len(codes), -1).tolist()]
    found = [scalar.dequantize_row(w, c, packed.k) for w, c in zip(words, codes, strict=True)]
    return torch.tensor(found, dtype=torch.float64).reshape(*packed.codes.shape[:-1], packed.k)


@some
@given(parts=st.lists(rows(), min_size=1, max_size=3), span=any_span)
def test_rows_of_any_length_match_the_oracle(parts: list[Tensor], span: int | str) -> None:
    x = torch.cat([part.double() for part in parts])
    found = hif4.quantize(x, span=span)
    assert_same_packed(found, expected(x, span=hif4.check_span(span)))
    assert hif4.holds_span(found, span)
    # A reader that knows no span, and the interleaved bytes.
    assert_same_values(hif4.dequantize(found, torch.float64), read_by_the_oracle(found))
    assert_same_packed(hif4.from_bytes(hif4.to_bytes(found), found.k), found)


@some
@given(x=rows(), rounding=st.sampled_from(("half_away", "half_even")))
def test_a_span_of_one_unit_is_none(x: Tensor, rounding: str) -> None:
    assert_same_packed(hif4.quantize(x, rounding=rounding, span=1), hif4.quantize(x, rounding=rounding))
    one = hif4.quantize(x[:64], rounding=rounding)
    for span in hif4.SPANS:
        assert_same_packed(hif4.quantize(x[:64], rounding=rounding, span=span), one)


@pytest.mark.parametrize(("k", "span", "groups"), [(640, 4, [4, 4, 2]), (300, 2, [2, 2, 1]), (640, "row", [10])])
def test_the_last_span_of_a_row_is_shorter(k, span, groups):
    x = wide(6, k).reshape(2, 3, k)
    found = hif4.quantize(x, span=span)
    level1 = (found.scales & 0xFF).split(groups, -1)
    assert all((part == part[..., :1]).all() for part in level1)
    for part, values in zip(level1, x.split([64 * n for n in groups[:-1]] + [k - 64 * sum(groups[:-1])], -1)):
        assert torch.equal(part[..., 0], hif4.level1_scale(values.abs().amax(-1)))
    assert not hif4.holds_span(hif4.quantize(x), span)


def test_what_is_not_finite_makes_its_whole_span_nan():
    x = normal(3, 512)
    x[0, 200], x[1, 511] = torch.nan, torch.inf
    assert hif4.dequantize(hif4.quantize(x, span=4)).isnan().int().sum(1).tolist() == [256, 256, 0]
    assert hif4.dequantize(hif4.quantize(x, span="row")).isnan().all(1).tolist() == [True, True, False]
    assert (hif4.quantize(x, span=4).scales[0, :4] == 0xFF).all()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64)])
@pytest.mark.parametrize("span", hif4.SPANS)
def test_empty_tensors(shape, span):
    found = hif4.quantize(torch.zeros(shape), span=span)
    assert found.scales.shape == (*shape[:-1], hif4.units(shape[-1]))
    assert hif4.holds_span(found, span)


@pytest.mark.parametrize("span", [3, 8, -1, True, "rows", None, 2.0])
def test_another_span_is_refused(span):
    for function in (hif4.quantize, search_scales):
        with pytest.raises(FormatError, match="span is .*; expected 1, 2 or 4 units"):
            function(torch.randn(64), span=span)


def test_a_span_whose_dot_does_not_fit_into_32_bits_is_refused():
    scales = torch.zeros(1, spans.MOST_UNITS + 1, dtype=torch.int32)
    assert spans.MOST_UNITS * 64 * 28 * 28 < 2**31 <= scales.shape[1] * 64 * 28 * 28
    spans.over_spans(scales[:, 1:], 0)
    with pytest.raises(FormatError, match="expected at most 42799"):
        spans.over_spans(scales, 0)


@pytest.fixture(params=["reference", "compiled"])
def form(request, monkeypatch):
    monkeypatch.setenv("TAHF4_NO_CPP", "1" if request.param == "reference" else "0")
    if request.param == "compiled" and not cpu.available():
        pytest.skip("there is no C++ compiler")


def importances(k):
    found = (2 * normal(k, seed=4)).exp()
    found[4:8] = found[16:24] = found[64:128] = 0.0
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("span", hif4.SPANS)
@pytest.mark.parametrize("k", [64, 130, 640])
def test_no_span_is_worse_than_by_default(form, k, span, weighted):
    x, importance = wide(40, k), importances(k) if weighted else None
    searched, default = search_scales(x, importance, span=span), hif4.quantize(x, span=span)
    assert hif4.holds_span(searched, span)
    step = hif4.check_span(span) or hif4.units(k)
    found, before = (
        torch.stack([part.sum(1) for part in search_error(x, p, importance).split(step, 1)], 1)
        for p in (searched, default)
    )
    assert (found <= before).all()
    assert (found < before).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_of_a_span_is_the_best_of_those_tried(form, weighted):
    x, importance = wide(4, 192), importances(192) if weighted else torch.ones(192)
    packed, default = search_scales(x, importance, span="row"), hif4.quantize(x, span="row")
    for row, values in enumerate(x):
        tried = {}
        middle = int(default.scales[row, 0]) & 0xFF
        for code in range(middle - 4, middle + 5):
            # Units with one level-1 scale and their best exponents.
            level1 = torch.tensor([code], dtype=torch.int32)
            whole = torch.cat([
                search_exponents(part[None], level1, factors)
                for part, factors in zip(values.view(3, 64), importance.view(3, 64), strict=True)
            ])
            tried[code] = _error(values, whole, importance)
        found = int(packed.scales[row, 0]) & 0xFF
        assert tried[found] == pytest.approx(min(tried.values()), rel=1e-9)
        mine = search_error(values, hif4.Packed(packed.codes[row], packed.scales[row], 192), importance).sum()
        assert float(mine) == pytest.approx(tried[found], rel=1e-9)


def _error(values, scales, importance):
    """The weighted squared error of three units whose elements are the nearest."""
    total = 0.0
    for unit, metadata in enumerate(scales.tolist()):
        for i in range(64):
            exponent = (metadata >> (8 + i // 8) & 1) + (metadata >> (16 + i // 4) & 1)
            step = float(scalar.decode_scale(metadata & 0xFF) * Fraction(2) ** exponent / 4)
            value = abs(float(values[64 * unit + i]))
            total += float(importance[64 * unit + i]) * (min(7, int(value / step + 0.5)) * step - value) ** 2
    return total


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("span", [2, 4, "row"])
def test_chunks_and_strides_change_nothing(monkeypatch, form, span, chunk):
    x, importance = wide(8, 600), importances(600)
    whole = search_scales(x, importance, span=span)
    monkeypatch.setattr(scale_search, "_CHUNK", chunk)
    monkeypatch.setattr(cpu.search, "_CHUNK", 600 * chunk)
    cut = x.reshape(4, 2, 600)
    for same in (cut, cut.transpose(0, 1).contiguous().transpose(0, 1)):
        found = search_scales(same, importance, span=span)
        assert torch.equal(found.codes.reshape(8, -1), whole.codes)
        assert torch.equal(found.scales.reshape(8, -1), whole.scales)


@pytest.mark.parametrize("span", [2, 4, "row"])
def test_a_reconstruction_holds_its_span_and_is_no_worse_than_the_search(span):
    weight, x = normal(20, 330), normal(400, 330, seed=1) @ normal(330, 330, seed=2)
    weight[3, 5] = torch.nan
    moments = x.t() @ x / 400
    found, searched = reconstruct(weight, moments, span=span), search_scales(weight, span=span)
    assert hif4.holds_span(found, span)
    rows = torch.arange(20) != 3
    before, after = (moment_error(weight, p, moments)[rows] for p in (searched, found))
    assert (after <= before).all()
    assert after.sum() < 0.7 * before.sum()
    assert_same_packed(reconstruct(weight, moments, span=1), reconstruct(weight, moments))


def test_the_reference_adds_more_than_a_float32_holds():
    """The integers of 4,096 units of positive values add up to more than 2**24, where float32 loses odd numbers."""
    k, generator = 4096 * hif4.UNIT, torch.Generator().manual_seed(0)
    both = torch.rand(16, k, generator=generator) * 7
    both[:, 0] = 7  # a level-1 scale of 1
    packed = hif4.quantize(both, span="row")
    left, right = hif4.dequantize(packed, torch.float64).mul(4).to(torch.int64).split(8)
    (first, second), (of_first, of_second) = packed.codes.split(8), packed.scales.split(8)
    got = torch.ops.tahf4.linear(first, of_first, second, of_second, None, torch.float32, 0)
    dots = torch.stack([(row * right).sum(1) for row in left])
    assert dots.min() > 1 << 25
    assert torch.equal(got, dots.to(torch.float32) / 16)


def test_rounding_to_what_a_span_holds():
    x = torch.randn(3, 256) * torch.tensor([1.0, 30.0]).repeat_interleave(128)
    want = hif4.dequantize(hif4.quantize(x, span="row"), x.dtype)
    assert torch.equal(hif4.fake_quantize(x, span="row"), want) and not torch.equal(hif4.fake_quantize(x), want)
