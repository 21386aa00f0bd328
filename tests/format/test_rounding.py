"""The rounding of in-group values to bfloat16 before they become elements, against the published rules."""

from __future__ import annotations

import hif4_published as published
import pytest
import torch
from hif4_units import assert_same_packed

from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4, spans
from tahf4_compiler.format.scale_search import search_error, search_scales

VENDOR, SEARCHED = "bfloat16_half_away", "least_error"


@pytest.fixture(scope="module")
def units():
    return torch.tensor(published.hard_units() + published.random_units(20) + published.spread_units(10))


@pytest.mark.parametrize("rounding", [*published.ROUNDINGS, published.SEARCHED])
def test_arithmetic_is_that_of_the_published_rules(units, rounding):
    units = units[::3] if rounding == published.SEARCHED else units  # five times as long in fractions
    found = hif4.quantize(units, rounding=rounding)
    wanted = [published.row(values, rounding) for values in units.tolist()]
    metadata = torch.tensor([m for m, _ in wanted], dtype=torch.int64)
    assert torch.equal(found.scales.to(torch.int64) & 0xFFFFFFFF, metadata)
    assert torch.equal(found.codes, torch.tensor([c for _, c in wanted], dtype=torch.uint8))


def test_the_vectors_tell_the_arithmetics_apart(units):
    """Without values where they part, equal results would say nothing."""
    ours, other = hif4.quantize(units), hif4.quantize(units, rounding=VENDOR)
    assert torch.equal(ours.scales, other.scales)
    hard = len(published.hard_units())
    assert (ours.codes != other.codes)[:hard].sum() > 100


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float32, 0.0076, 0.0082), (torch.bfloat16, 0.0044, 0.0059)])
def test_so_many_of_random_values_differ(dtype, low, high):
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours, other = (hif4.dequantize(hif4.quantize(x, rounding=r)) for r in published.ROUNDINGS)
    assert low < (ours != other).double().mean() < high


def test_a_span_and_a_unit_that_is_not_finite():
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(4))
    x[1, 70], x[2, 5] = torch.nan, torch.inf
    for span in hif4.SPANS:
        ours, other = (hif4.quantize(x, rounding=r, span=span) for r in published.ROUNDINGS)
        assert torch.equal(ours.scales, other.scales)
        assert torch.equal(ours.codes[1, :64] == other.codes[1, :64], torch.ones(64, dtype=torch.bool)) or span == 1
        code = spans.joined(hif4.check_span(span), VENDOR)
        assert_same_packed(hif4.Packed(*torch.ops.tahf4.quantize(x, None, 0, 4, code), 256), other)


@pytest.mark.parametrize("span", hif4.SPANS)
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_round_elements_so_too(span, weighted):
    x = torch.randn(12, 200, generator=torch.Generator().manual_seed(5))
    x[3, 7], x[4] = torch.nan, 0.0
    importance = torch.rand(200, generator=torch.Generator().manual_seed(6)) if weighted else None
    found = search_scales(x, importance, span=span, rounding=VENDOR)
    # Its elements are what the conversion gives under these scales.
    assert torch.equal(found.codes, hif4.codes_for(x, found.scales, VENDOR))
    default = hif4.quantize(x, rounding=VENDOR, span=span)
    assert hif4.holds_span(found, span)
    finite = torch.isfinite(x).all(1)
    plain = search_scales(x, importance, span=span)
    errors = [search_error(x, packed, importance)[finite].sum(1) for packed in (found, default, plain)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.97 * errors[1].sum()
    assert (errors[2].sum() <= errors[0].sum()).all()
    nan = default.scales & 0xFF == 0xFF
    assert torch.equal(nan, found.scales & 0xFF == 0xFF)
    assert (found.codes.unflatten(1, (-1, 32))[nan] == 0).all()


def test_a_rounding_that_nobody_knows_is_refused():
    x = torch.randn(2, 64)
    for function in (hif4.quantize, hif4.fake_quantize, search_scales):
        with pytest.raises(FormatError, match="rounding is 'up'; expected one of"):
            function(x, rounding="up")
    for form in (7, 24, 25, 11, 19, -1, -8, True):
        with pytest.raises(FormatError, match="expected 0 .a row., 1, 2 or 4|expected (1, 2 or 4|a span, plus)"):
            torch.ops.tahf4.quantize(x, None, 0, 4, form) if form is not True else spans.check_form(form)


def test_span_and_rounding_travel_as_one_number():
    for span in (0, 1, 2, 4):
        for rounding in spans.FORM_ROUNDINGS:
            if rounding == SEARCHED and span != 1:
                continue
            form = spans.joined(span, rounding)
            assert spans.check_form(form) == form
            assert spans.parted(form) == (span, rounding)
            assert spans.units_of(form) == span
            assert spans.parted(spans.alone(form)) == (1, rounding)
    assert spans.joined(1, "half_away") == 1
    assert spans.with_units(17, 4) == 20  # of a product whose result is searched: the span is the operands'


def test_the_scale_of_least_error_is_nearly_that_of_the_search():
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(7))
    x[3, 70], x[4, 5], x[5] = torch.nan, torch.inf, 0.0
    found, usual, searched = hif4.quantize(x, rounding=SEARCHED), hif4.quantize(x), search_scales(x)
    more = (found.scales & 0xFF) - (usual.scales & 0xFF)
    assert set(more.flatten().tolist()) == {0, 1, 2, 3}
    assert not more[5].any()  # of equal errors the smaller scale
    assert torch.equal(found.scales & 0xFF == 0xFF, usual.scales & 0xFF == 0xFF)
    assert torch.equal(found.codes, hif4.codes_for(x, found.scales, SEARCHED))
    finite = torch.isfinite(x).all(1)
    errors = [search_error(x, packed)[finite].sum() for packed in (found, usual, searched)]
    assert errors[2] < errors[0] < 0.92 * errors[1]
    assert errors[0] < 1.05 * errors[2]
    assert_same_packed(search_scales(x, rounding=SEARCHED), searched)


def test_a_scale_that_units_share_is_not_chosen_for_each():
    x = torch.randn(2, 256)
    for span in (2, 4, "row"):
        for function in (hif4.quantize, search_scales):
            with pytest.raises(FormatError, match="chooses a level-1 scale for each unit, and the span is"):
                function(x, rounding=SEARCHED, span=span)
        with pytest.raises(FormatError, match="expected a span of 1"):
            torch.ops.tahf4.quantize(x, None, 0, 4, 16 + hif4.check_span(span))
        with pytest.raises(FormatError, match="expected a span of 1"):
            spans.check_form(16 + hif4.check_span(span))


@pytest.mark.parametrize("rounding", hif4.ROUNDINGS)
def test_the_default_dtype_changes_no_bit(rounding):
    x = torch.rand(8, 64, generator=torch.Generator().manual_seed(8))
    x[:, 0], x[:, 1:9] = 7.0, 0.125 - 2.0**-26  # a half would be missed by less than float32 can tell
    wanted = hif4.quantize(x, rounding=rounding)
    torch.set_default_dtype(torch.float64)
    try:
        found = hif4.quantize(x, rounding=rounding)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_packed(found, wanted)
