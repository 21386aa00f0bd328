"""The tensor conversion to HiFloat4, bit for bit against the scalar oracle."""

from __future__ import annotations

import functools

import hif4_scalar as scalar
import pytest
import torch
from hif4_units import (
    FLOATS,
    ROUNDINGS,
    assert_same_packed,
    assert_same_values,
    expected,
    gaussian,
    level1,
    random_bits,
    rows,
    some,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tahf4_compiler.format.hif4 import quantize


def test_the_oracle_multiplies_adds_and_rounds_as_the_hardware_does() -> None:
    a, b = random_bits(3000, seed=1), random_bits(3000, seed=2)
    near = a * (1 + torch.arange(-1500, 1500) * 2.0**-23)  # so that sums cancel
    products = [scalar.multiply_float32(p, q) for p, q in zip(a.tolist(), b.tolist(), strict=True)]
    sums = [scalar.add_float32(p, -q) for p, q in zip(a.tolist(), near.tolist(), strict=True)]
    rounded = [scalar.round_bfloat16(p) for p in a.tolist()]
    assert_same_values(torch.tensor(products), a * b)
    assert_same_values(torch.tensor(sums), a - near)
    assert_same_values(torch.tensor(rounded).bfloat16(), a.bfloat16())


def test_the_adversarial_units_do_land_on_their_thresholds() -> None:
    products = set()
    for values in scalar.threshold_units(0xC0):  # scale 1, reciprocal 1
        assert scalar.quantize_unit(values)[0] & 0xFF == 0xC0
        products |= {abs(value) for value in values}
    for threshold in (2.0, 4.0, *(n / 8 for n in (1, 3, 5, 7, 9, 11, 13)), *(n / 2 for n in (1, 3, 13))):
        assert {threshold, scalar.next_float32(threshold, -1)} <= products
    for scale in range(0xC1, 0xC4):
        assert all(
            scalar.quantize_unit(values)[0] & 0xFF == scale for values in scalar.threshold_units(scale)
        )


@some
@given(x=rows(), rounding=st.sampled_from(ROUNDINGS))
def test_a_row_of_any_length_and_float_type_matches_the_oracle(x: Tensor, rounding: str) -> None:
    assert_same_packed(quantize(x, rounding=rounding), expected(x, rounding))


@some
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70), rounding=st.sampled_from(ROUNDINGS)
)
def test_any_float32_bit_patterns_match_the_oracle(words: list[int], rounding: str) -> None:
    x = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert_same_packed(quantize(x, rounding=rounding), expected(x, rounding))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_random_data_of_many_sizes_matches_the_oracle(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-16, 3 if dtype == torch.float16 else 6, 100)[:, None]
    heavy = gaussian(100, 64, seed=3) * gaussian(100, 64, seed=4).exp()
    x = (heavy.double() * sizes).to(dtype)
    assert_same_packed(quantize(x), expected(x))
    assert_same_packed(quantize(x[:40], rounding="half_even"), expected(x[:40], "half_even"))


@pytest.mark.parametrize(
    ("rounding", "scales"),
    [
        # The ends, the middle and every mantissa at many exponents between; `make slow` takes all.
        ("half_away", sorted({*range(8), *range(0xA5, 0xB9), *range(0xF9, 0xFF), *range(0, 0xFF, 7)})),
        ("half_even", [*range(8), *range(0xA5, 0xB9), *range(0xF9, 0xFF)]),
        pytest.param("half_away", range(0xFF), marks=pytest.mark.slow),
    ],
    ids=[*ROUNDINGS, "half_away, all"],
)
def test_values_on_and_beside_every_threshold_of_a_scale_match_the_oracle(rounding: str, scales: list[int]) -> None:
    x = torch.tensor([values for scale in scales for values in scalar.threshold_units(scale)])
    assert_same_packed(quantize(x, rounding=rounding), expected(x, rounding))


@pytest.mark.parametrize("dtype", (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)), ids=str)
def test_16_bit_values_match_the_oracle_under_each_mantissa_of_the_scale(dtype: torch.dtype) -> None:
    units = []
    for scale in range(0xC0, 0xC4):
        size = float(scalar.decode_scale(scale))
        bits = torch.arange(2**15, dtype=torch.int16).view(dtype)
        values = bits[(bits >= size / 16) & (bits <= size * 7)]
        if dtype == torch.float16:
            values = values[scale % 8 :: 8]  # every value would take the oracle half a minute
        groups = torch.nn.functional.pad(values, (0, -len(values) % 7)).reshape(-1, 7)
        spread = torch.zeros(len(groups), 8, 8, dtype=dtype)
        spread[:, 0, 0] = size * 7
        spread[:, 1:, 3] = groups
        units.append(spread.reshape(-1, 64))
    x = torch.cat(units)
    assert_same_packed(quantize(x), expected(x))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_every_positive_bfloat16_maximum_gets_the_level1_scale_of_the_oracle(dtype: torch.dtype) -> None:
    maxima = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = torch.zeros(len(maxima), 64, dtype=dtype)
    row = torch.arange(len(maxima))
    x[row, row % 64] = maxima.to(dtype)
    assert torch.equal(level1(quantize(x))[:, 0], bfloat16_scales())


@functools.cache
def bfloat16_scales() -> Tensor:
    """Level-1 scales of all positive bfloat16 numbers, by the oracle."""
    maxima = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).tolist()
    return torch.tensor([scalar.level1_scale(value) for value in maxima], dtype=torch.int32)


def test_a_maximum_beside_every_step_of_the_level1_scale_matches_the_oracle() -> None:
    maxima = [value for exponent in range(-49, 17) for value in scalar.level1_thresholds(exponent)]
    wanted = torch.tensor([scalar.level1_scale(value) for value in maxima], dtype=torch.int32)
    x = torch.zeros(len(maxima), 64)
    x[:, 63] = -torch.tensor(maxima)
    assert torch.equal(level1(quantize(x))[:, 0], wanted)
    assert_same_packed(quantize(x[::17]), expected(x[::17]))
