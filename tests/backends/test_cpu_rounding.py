"""The roundings of HiF4 in the C++ kernels: the reference's bits."""

from __future__ import annotations

import hif4_published as published
import pytest
import torch
from cpu_operators import DTYPES, assert_same
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import calls

from tahf4_compiler import FormatError
from tahf4_compiler.format.scale_search import search_scales

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
FORMS = (8, 9, 10, 12, 17)
PROGRAM = "v0: float32 = to(x0)\nv1: float32 = mul(v0, v0)"
reference, ours = torch.ops.tahf4, torch.ops.tahf4_cpu


def values(rows, k, seed=0):
    """Values on ties of both arithmetics, and others."""
    some, full = published.hard_units(), published.spread_units(20)
    hard = torch.tensor(some[:20] + full + some[20:]).flatten()
    mixed = torch.randn(rows * k, generator=torch.Generator().manual_seed(seed))
    mixed[: len(hard)] = hard[: rows * k]
    return mixed.view(rows, k)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [64, 130, 5120])
def test_conversion_is_bit_exact(each_set, k, form):
    for dtype in DTYPES:
        x, multiplier = values(40, k).to(dtype), torch.rand(k) + 0.5
        found = ours.quantize(x, None, 0, 4, form)
        assert_same(found, reference.quantize(x, None, 0, 4, form))
        if dtype == torch.float32:  # bfloat16 under a scale of a power of two stays bfloat16
            assert not torch.equal(found[0], reference.quantize(x, None, 0, 4, form % 8)[0])
        assert_same(calls.quantize(x, None, 0, 4, form), found)
        for block in (4, 64, 128) if k == 5120 else (64,):
            assert_same(ours.quantize(x, multiplier, block, 4, form), reference.quantize(x, multiplier, block, 4, form))
        assert_same(ours.quantize(x, None, 0, 8, form), reference.quantize(x, None, 0, 8))


@pytest.mark.parametrize("form", FORMS)
def test_a_program_before_it(each_set, form):
    x = values(40, 1088).bfloat16()
    for function in (ours.fused_quantize, calls.fused_quantize):
        found = function([x], PROGRAM, None, 64, 4, form)
        if found is NotImplemented:
            assert each_set == "none"
            continue
        assert_same(found, reference.fused_quantize([x], PROGRAM, None, 64, 4, form))
        assert not torch.equal(found[0], reference.fused_quantize([x], PROGRAM, None, 64, 4, form % 8)[0])


@pytest.mark.parametrize(("span", "rounding"), [(0, 8), (1, 8), (2, 8), (1, 16), (2, 16)])
def test_the_result_of_a_product(each_set, span, rounding):
    """The operands' span is their own; the rounding is that of the result."""
    x, weight = (torch.randn(m, 256, generator=torch.Generator().manual_seed(m)) for m in (9, 320))
    sides = (*reference.quantize(x, None, 0, 4, span), *reference.quantize(weight, None, 0, 4, span))
    product = (*sides, None, torch.bfloat16, [], "v0: float32 = to(y)", None, 0)
    plain = ours.linear_quantize(*product, 4, span)
    wanted = reference.quantize(ours.fused_linear(*sides, None, torch.bfloat16, [320], [], "", torch.bfloat16, span)[0])
    assert_same(plain, wanted)
    rounded = ours.linear_quantize(*product, 4, span + rounding)
    y = ours.fused_linear(*sides, None, torch.bfloat16, [320], [], "", torch.bfloat16, span)[0]
    assert_same(rounded, reference.quantize(y, None, 0, 4, 1 + rounding))
    assert not torch.equal(plain[0], rounded[0])
    called = calls.linear_quantize(*product, 4, span + rounding)
    assert called is NotImplemented if each_set == "none" else torch.equal(called[0], rounded[0])


def test_searched_weights(monkeypatch):
    x = values(40, 320)
    found = search_scales(x, rounding="bfloat16_half_away")
    monkeypatch.setenv("TAHF4_CPU_ISA", "none")
    with monkeypatch.context() as patch:
        patch.setattr("tahf4_compiler.format.scale_search.host.find", lambda *args: None)
        wanted = search_scales(x, rounding="bfloat16_half_away")
    assert_same(found[:2], wanted[:2])


def test_numbers_that_are_no_form_are_refused(each_set):
    x = torch.randn(3, 64)
    for form in (-1, -8, 3, 5, 11, 13, 16, 18, 20, 24, 25):
        with pytest.raises(FormatError):
            ours.quantize(x, None, 0, 4, form)
    sides = (*reference.quantize(x), *reference.quantize(x))
    with pytest.raises(FormatError):  # a product rounds nothing in groups
        ours.linear(*sides, None, torch.float32, 9)
