"""The search of scales: never worse, exact in what it promises, an ordinary packed tensor."""

from __future__ import annotations

import itertools

import pytest
import torch

from tahf4_compiler import FormatError, hif4
from tahf4_compiler.scale_search import search_error, search_scales


def draw(kind: str, rows: int = 64, k: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator)
    return {
        "normal": x,
        "heavy": x * torch.randn(rows, k, generator=generator).exp() ** 2,
        "tiny": x * 1e-12,
        "subnormal": x * 1e-40,
        "huge": x * 1e30,
        "bfloat16": x.bfloat16(),
        "float64": x.double() * 1e-3,
        "odd": x[:, :100],
        "zeros": x * (torch.arange(k) % 7 == 0),
    }[kind]


KINDS = ["normal", "heavy", "tiny", "subnormal", "huge", "bfloat16", "float64", "odd", "zeros"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_unit_is_worse_than_by_default(kind, weighted):
    x = draw(kind)
    importance = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    searched, default = search_scales(x, importance), hif4.quantize(x)
    assert searched.codes.shape == default.codes.shape
    assert searched.scales.shape == default.scales.shape
    assert bool((search_error(x, searched, importance) <= search_error(x, default, importance)).all())


@pytest.mark.parametrize(("kind", "most"), [("normal", 0.93), ("heavy", 0.93)])
def test_the_error_becomes_smaller(kind, most):
    x = draw(kind, 256)
    ratio = float(search_error(x, search_scales(x)).sum() / search_error(x, hif4.quantize(x)).sum())
    assert ratio < most, ratio


def test_sub_exponents_are_the_best_of_all_for_their_scale():
    x = draw("heavy", 4, 64)
    packed = search_scales(x, candidates=0)
    found = search_error(x, packed)
    for row, scale_bits, error in zip(x, packed.scales[:, 0], found[:, 0], strict=True):
        code = int(scale_bits) & 0xFF
        scale = (1 + (code & 3) / 4) * 2.0 ** ((code >> 2) - 48)
        total = 0.0
        for group in row.double().reshape(8, 8):
            total += min(
                sum(
                    min(sum(_element(v, scale * 2.0 ** (e8 + e16) / 4) for v in half.tolist()) for e16 in (0, 1))
                    for half in group.reshape(2, 4)
                )
                for e8 in (0, 1)
            )
        # The default encoding is another candidate: it may only be better than the best exact rounding here.
        assert float(error) <= total * (1 + 1e-6)


def _element(value: float, step: float) -> float:
    rounded = min(7, int(abs(value) / step + 0.5))
    return (rounded * step - abs(value)) ** 2


def test_importance_moves_the_error_to_channels_that_matter_less():
    x = draw("normal", 256, 64)
    importance = torch.full((64,), 1e-3)
    importance[:8] = 1.0
    plain, weighted = (hif4.dequantize(p) for p in (search_scales(x), search_scales(x, importance)))
    assert ((weighted - x)[:, :8] ** 2).mean() < 0.9 * ((plain - x)[:, :8] ** 2).mean()


def test_units_that_are_not_finite_are_as_by_default():
    x = draw("normal", 4, 128)
    x[0, 3], x[1, 70], x[2, :64] = torch.nan, torch.inf, 0.0
    searched, default = search_scales(x), hif4.quantize(x)
    for unit in ((0, 0), (1, 1), (2, 0)):
        assert searched.scales[unit] == default.scales[unit]
        assert torch.equal(searched.codes[unit[0]].view(2, 32)[unit[1]], default.codes[unit[0]].view(2, 32)[unit[1]])


def test_leading_axes_chunks_and_repetition_change_nothing(monkeypatch):
    x = draw("heavy", 60, 192)
    importance = torch.rand(192, generator=torch.Generator().manual_seed(2))
    whole = search_scales(x, importance)
    monkeypatch.setattr("tahf4_compiler.scale_search._CHUNK", 7)
    parts = search_scales(x.reshape(3, 20, 192), importance)
    assert torch.equal(parts.codes.reshape(60, -1), whole.codes)
    assert torch.equal(parts.scales.reshape(60, -1), whole.scales)


@pytest.mark.parametrize("importance", [torch.ones(3), -torch.ones(64), torch.full((64,), torch.nan), torch.ones(64).int()])
def test_a_wrong_importance_is_refused(importance):
    with pytest.raises(FormatError, match="importance"):
        search_scales(torch.randn(2, 64), importance)


def test_more_candidates_are_never_worse():
    x = draw("normal", 128)
    totals = [float(search_error(x, search_scales(x, candidates=n)).sum()) for n in range(5)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(totals)), totals
