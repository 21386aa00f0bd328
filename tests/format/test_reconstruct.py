"""Weights that are reconstructed: against GPTQ as its paper writes it, and never worse than the search of scales."""

from __future__ import annotations

import pytest
import torch

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4, reconstruct
from tahf4_compiler.format.reconstruct import damped_factor, moment_error
from tahf4_compiler.format.scale_search import search_scales
from tahf4_compiler.plugins import host


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments_of(k, seed=1, rows=400):
    """Of an activation whose channels are large together."""
    x = seeded(rows, k, seed=seed) @ seeded(k, k, seed=seed + 1)
    return x.t() @ x / rows


def by_the_paper(weight, moments, scales):
    """Round channel by channel and update the rest by the inverse of what is left of the moments, in float64."""
    k = weight.shape[1]
    damped = moments.double() + 0.1 * moments.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    inverse, rest = damped.inverse(), weight.double().clone()
    ones = torch.full((len(weight), k // 2), 0x11, dtype=torch.uint8)
    steps = hif4.dequantize(hif4.Packed(ones, scales, k)).double()
    found = torch.empty_like(rest)
    for j in range(k):
        value, step = rest[:, j], steps[:, j]
        found[:, j] = value.sign() * ((value.abs() / step + 0.5).floor().clamp(max=7)) * step
        error = (value - found[:, j]) / inverse[0, 0]
        rest[:, j:] -= error[:, None] * inverse[0]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    return found


def test_codes_are_those_of_the_published_method(monkeypatch):
    weight, moments = seeded(24, 192), moments_of(192)
    monkeypatch.setattr(reconstruct, "SWEEPS", 0)
    monkeypatch.setattr(reconstruct, "moment_error", lambda values, packed, moments: -moment_error(
        values, packed, moments))  # of the two in each row the worse one, where that is the reconstruction
    worse = reconstruct.reconstruct(weight, moments)
    monkeypatch.setattr(reconstruct, "moment_error", moment_error)
    found = reconstruct.reconstruct(weight, moments)
    searched = search_scales(weight)
    mine = (found.scales != searched.scales).any(1) | (found.codes != searched.codes).any(1)
    assert mine.all(), "the reconstruction is better in each row of this weight"
    assert torch.equal(worse.codes, searched.codes)
    want = by_the_paper(weight, moments, found.scales)
    same = (hif4.dequantize(found).double() - want).abs() < 1e-6
    assert same.double().mean() > 0.99, "all but values at the edge of a rounding"
    assert moment_error(weight, found, moments).sum() < 0.6 * moment_error(weight, searched, moments).sum()


@pytest.mark.parametrize("k", [64, 100, 320])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_no_row_is_worse_than_the_search_of_scales(k, rows):
    for seed in range(3):
        weight, moments = seeded(rows, k, seed=seed), moments_of(k, seed=seed + 10, rows=k // 4)
        found, searched = reconstruct.reconstruct(weight, moments), search_scales(weight)
        hif4.check_packed(found)
        assert found.k == k and found.scales.shape == searched.scales.shape
        assert (moment_error(weight, found, moments) <= moment_error(weight, searched, moments)).all()


def test_the_kernel_gives_the_bits_of_the_reference(monkeypatch):
    weight, moments = seeded(70, 256), moments_of(256)
    fast = reconstruct.reconstruct(weight, moments)
    find, asked = host.find, []

    def without(name, *given):
        asked.append(name)
        return None if name in ("round_unit", "descend_unit") else find(name, *given)

    monkeypatch.setattr(host, "find", without)
    plain = reconstruct.reconstruct(weight, moments)
    assert asked.count("round_unit") == 4 and find("round_unit", weight) is not None
    assert asked.count("descend_unit") == 8 and find("descend_unit", weight) is not None
    assert torch.equal(fast.codes, plain.codes) and torch.equal(fast.scales, plain.scales)


def damped_error(weight, packed, moments):
    moments = moments.double() + 0.1 * moments.double().diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    difference = hif4.dequantize(packed).double() - weight.double()
    return ((difference @ moments) * difference).sum(1)


@pytest.mark.parametrize("k", [64, 100, 320])
def test_values_are_rounded_again_until_none_alone_lessens_the_error(k, monkeypatch):
    weight, moments = seeded(40, k), moments_of(k)
    errors = []
    for sweeps in (0, 1, 2, 30):
        monkeypatch.setattr(reconstruct, "SWEEPS", sweeps)
        found = reconstruct.reconstruct(weight, moments)
        errors.append(damped_error(weight, found, moments))
    for before, after in zip(errors, errors[1:]):
        assert (after <= before * 1.00001).all() and after.sum() < before.sum()
    # At the end of it no value can move by one step, given all others.
    ones = torch.full_like(found.codes, 0x11)
    steps = hif4.dequantize(hif4.Packed(ones, found.scales, k)).double()
    damped = moments.double() + 0.1 * moments.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    values = hif4.dequantize(found).double()
    slopes = (values - weight.double()) @ damped
    for way in (-1, 1):
        inside = ((values + way * steps).abs() / steps).round() <= 7
        change = way * steps * (2 * slopes + way * steps * damped.diagonal())
        assert (change[inside] > -1e-4 * errors[-1].mean()).all()


def test_rows_that_are_not_finite_and_activations_of_zeros():
    weight, moments = seeded(5, 128), moments_of(128)
    whole = reconstruct.reconstruct(weight, moments)
    damaged = weight.clone()
    damaged[3, 70] = float("nan")
    found = reconstruct.reconstruct(damaged, moments)
    assert hif4.extremes(found.scales[3])[0] and not hif4.extremes(found.scales[:3])[0]
    rest = [0, 1, 2, 4]
    assert torch.equal(found.codes[rest], whole.codes[rest]) and torch.equal(found.scales[rest], whole.scales[rest])
    zeros = reconstruct.reconstruct(weight, torch.zeros(128, 128))
    assert torch.equal(zeros.codes, search_scales(weight).codes)
    assert reconstruct.reconstruct(seeded(0, 64), moments_of(64)).codes.shape == (0, 32)


def test_what_does_not_fit_is_refused():
    weight = seeded(4, 64)
    for moments, message in (
        (moments_of(128), r"expected float32 or float64 \(64, 64\)"),
        (moments_of(64).half(), "float16"),
        (torch.full((64, 64), float("inf")), "NaN or infinities"),
        (-moments_of(64), "not positive semidefinite"),
    ):
        with pytest.raises(tahf4.FormatError, match=message):
            reconstruct.reconstruct(weight, moments)
    with pytest.raises(tahf4.FormatError, match=r"expected floating point \[N, K\]"):
        reconstruct.reconstruct(weight[0], moments_of(64))
    factor = damped_factor(moments_of(64))
    assert torch.equal(factor, factor.triu())
