"""Single points of the conversion to HiFloat4, by hand, and what quantizing twice and noise come to."""

from __future__ import annotations

from fractions import Fraction

import hif4_scalar as scalar
import pytest
import torch
from hif4_units import (
    FLOATS,
    INF,
    NAN,
    ROUNDINGS,
    assert_same_packed,
    assert_same_values,
    code_of,
    expected,
    gaussian,
    level1,
    unit,
)
from torch import Tensor

from tahf4_compiler.format.hif4 import Packed, dequantize, fake_quantize, quantize


def test_level1_rounding_goes_to_even_and_carries_into_the_exponent() -> None:
    # A bf16 scale factor of 1.125, 1.375, 1.625 or 1.875 is midway between two E6M2 values.
    ties = {1.125: 0xC0, 1.375: 0xC2, 1.625: 0xC2, 1.875: 0xC4}
    for tie, scale in ties.items():
        largest = scalar.round_float32(Fraction(tie) / Fraction(scalar.ONE_SEVENTH))
        assert int(level1(quantize(torch.tensor(unit(largest))))) == scale
    assert int(level1(quantize(torch.tensor(unit(1.99 * 7))))) == 0xC4  # 1.99 rounds up to 2


def test_the_scale_factor_is_a_float32_product_before_it_is_rounded_to_bfloat16() -> None:
    def rounded_once(largest: float) -> int:
        product = Fraction(largest) * Fraction(scalar.ONE_SEVENTH)
        return scalar.encode_scale(Fraction(scalar.round_binary(product, 8, -126, 127)))

    maxima = scalar.level1_thresholds(0)
    differing = [largest for largest in maxima if rounded_once(largest) != scalar.level1_scale(largest)]
    assert differing, "no example in which the two roundings differ from a single one"
    for largest in differing:
        assert int(level1(quantize(torch.tensor(unit(largest))))) == scalar.level1_scale(largest)


def test_a_tie_goes_away_from_zero_or_to_even_as_asked() -> None:
    ties = [(n + 0.5) / 4 for n in range(7)]
    x = torch.tensor(
        [7.0, *[0.0] * 7, *ties[:4], 0.0, 0.0, 0.0, 0.0, *[-tie for tie in ties[4:]], *[0.0] * 45]
    )
    away, even = quantize(x), quantize(x, rounding="half_even")
    assert [code_of(away, i) for i in (8, 9, 10, 11, 16, 17, 18)] == [1, 2, 3, 4, 8 | 5, 8 | 6, 8 | 7]
    assert [code_of(even, i) for i in (8, 9, 10, 11, 16, 17, 18)] == [0, 2, 2, 4, 8 | 4, 8 | 6, 8 | 6]


def test_half_less_one_float32_step_rounds_up_because_the_half_is_added_in_float32() -> None:
    x = torch.tensor(unit(7.0, 0.0, (0.5 - 2**-25) / 4, (0.5 - 2**-24) / 4))
    packed = quantize(x)
    assert [code_of(packed, i) for i in (0, 8, 12)] == [7, 1, 0]
    packed = quantize(x, rounding="half_even")
    assert [code_of(packed, i) for i in (0, 8, 12)] == [7, 0, 0]


def test_sub_exponents_switch_on_exactly_at_four_and_two() -> None:
    below4, below2 = 4 - 2**-22, 2 - 2**-23
    # groups of 8: the anchor, 4, just below 4, 2, just below 2, and below 4 or 4 beside a 6
    x = torch.tensor(unit(7.0, 0.0, 4.0, 0.0, below4, 0.0, 2.0, 0.0, below2, 0.0, 6.0, below4, 6.0, 4.0))
    word = int(quantize(x).scales) & 0xFFFFFFFF
    assert word & 0xFF == 0xC0
    assert word >> 8 & 0xFF == 0b01100011
    assert word >> 16 == 0b00_11_01_00_01_01_01_01


def test_a_magnitude_never_passes_seven() -> None:
    x = torch.tensor(unit(7.8, 0.0, -1.99, 0.0, 3.99))  # scale 1: 7.8, 7.96 and 7.98 quarters
    packed = quantize(x)
    assert int(level1(packed)) == 0xC0
    assert [code_of(packed, i) for i in (0, 8, 16)] == [7, 15, 7]


def test_all_255_finite_scales_are_reached_and_decode_to_their_value() -> None:
    values = [float(scalar.decode_scale(scale)) for scale in range(255)]
    assert values[0] == 2.0**-48 and values[0xFE] == 49152
    x = torch.tensor([unit(7 * value, value) for value in values])
    packed = quantize(x)
    assert level1(packed)[:, 0].tolist() == list(range(255))
    assert_same_values(dequantize(packed)[:, 0], torch.tensor(values) * 7)


def test_values_below_the_range_take_the_smallest_scale() -> None:
    step = 2.0**-50
    x = torch.tensor(unit(step, -step / 2, step / 2 * (1 - 2**-20), 2.0**-149, -(2.0**-149), 7 * step))
    packed = quantize(x)
    assert int(packed.scales) == 0
    assert [code_of(packed, 4 * i) for i in range(6)] == [1, 9, 0, 0, 8, 7]
    assert_same_packed(packed, expected(x))


@pytest.mark.parametrize("huge", (1e6, 1e38, 3.4028234663852886e38))
def test_values_beyond_the_range_saturate(huge: float) -> None:
    x = torch.tensor([huge, -huge] * 32)
    assert_same_packed(quantize(x), expected(x))
    assert dequantize(quantize(x)).tolist() == [7 * 49152.0, -7 * 49152.0] * 32


def test_finite_float64_beyond_float32_saturates_and_below_it_keeps_its_sign() -> None:
    x = torch.tensor([1e300, -1e300, 1e-300, -1e-300] * 16, dtype=torch.float64)
    assert fake_quantize(x)[:2].tolist() == [344064.0, -344064.0]
    assert_same_packed(quantize(x), expected(x))
    small = torch.tensor(unit(1.0, -1e-300, 1e-300), dtype=torch.float64)
    assert [code_of(quantize(small), i) for i in (4, 8)] == [8, 0]


def test_float64_is_rounded_to_float32_before_anything_else() -> None:
    tie = 0.625  # 2.5 quarters of scale 1
    x = torch.tensor([unit(7.0, 0.0, tie * (1 - 2**-30), tie * (1 - 2**-24))], dtype=torch.float64)
    packed = quantize(x)
    assert_same_packed(packed, expected(x))
    assert code_of(Packed(packed.codes[0], packed.scales[0], 64), 8) == 3
    assert_same_packed(quantize(x.float()), packed)


def test_subnormal_values_match_the_oracle() -> None:
    x = torch.tensor([2.0**-149, -(2.0**-149), 2.0**-126, -(2.0**-127), 0.0, -0.0, 2.0**-130, 1e-39] * 8)
    beside = torch.stack(
        [x, torch.where(torch.arange(64) == 5, 1e38, x), torch.where(torch.arange(64) == 9, 1.0, x)]
    )
    assert_same_packed(quantize(beside), expected(beside))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_sign_of_zero_and_of_negatives_that_round_to_zero_is_kept(dtype: torch.dtype) -> None:
    x = torch.tensor(unit(1.0, -0.0, 0.0, -1e-4), dtype=dtype)
    assert [code_of(quantize(x), i) for i in (4, 8, 12)] == [8, 0, 8]
    assert torch.signbit(fake_quantize(x)).nonzero().flatten().tolist() == [4, 12]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_unit_of_zeros_has_the_smallest_scale_and_no_magnitudes(dtype: torch.dtype) -> None:
    packed = quantize(torch.tensor([0.0, -0.0] * 32, dtype=dtype))
    assert packed.scales.tolist() == [0]
    assert packed.codes.tolist() == [0x80] * 32


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("special", (NAN, -NAN, INF, -INF))
def test_nan_or_infinity_makes_exactly_its_own_unit_nan(special: float, dtype: torch.dtype) -> None:
    x = gaussian(2, 256, seed=5).to(dtype)
    clean = quantize(x)
    x[1, 130] = special
    packed = quantize(x)
    assert packed.scales[1, 2] == 0xFF
    assert not packed.codes[1, 64:96].any()
    packed.scales[1, 2] = clean.scales[1, 2]
    packed.codes[1, 64:96] = clean.codes[1, 64:96]
    assert_same_packed(packed, clean)
    spoiled = fake_quantize(x).isnan()
    assert spoiled[1, 128:192].all() and spoiled.sum() == 64


def test_nan_wins_over_infinity_and_over_any_other_value() -> None:
    x = torch.zeros(3, 70)
    x[0, :4] = torch.tensor([NAN, INF, -INF, 3e38])
    x[1, 63:65] = torch.tensor([NAN, 1.0])
    x[2, 69] = -INF
    assert_same_packed(quantize(x), expected(x))
    assert level1(quantize(x)).eq(0xFF).tolist() == [[True, False], [True, False], [False, True]]


def test_element_0_is_the_low_nibble_of_byte_0() -> None:
    x = torch.tensor([7.0, -5.0, *[0.0] * 61, -0.25])
    packed = quantize(x)
    assert packed.codes.tolist() == [0xD7, *[0] * 30, 0x90]
    assert packed.scales.tolist() == [0xC0 | 0x01 << 8 | 0x0001 << 16]


def test_a_second_quantization_can_change_a_unit() -> None:
    once = fake_quantize(torch.tensor(unit(8.0)))  # scale 1.25: 8 -> 6 * 1.25
    assert once[0] == 7.5
    assert fake_quantize(once)[0] == 7.0  # scale 1: 7.5 -> 7


def test_a_second_quantization_changes_nothing_where_the_maximum_is_seven_times_a_scale_up_to_1_5() -> None:
    # bf16(1/1.75) is too small: 4 * 1.75 comes back below 4. The other three reciprocals are not.
    scales = [scale for scale in range(255) if scale % 4 != 3]
    sizes = torch.tensor([float(scalar.decode_scale(scale)) for scale in scales])[:, None]
    for rounding in ROUNDINGS:
        x = gaussian(len(scales), 64, seed=12).clamp(-3.4, 3.4) * 2 * sizes
        x[:, 17:18] = 7 * sizes
        once = quantize(x, rounding=rounding)
        assert level1(once)[:, 0].tolist() == scales
        assert_same_packed(quantize(dequantize(once), rounding=rounding), once)


def signal_to_noise(x: Tensor) -> float:
    noise = (fake_quantize(x) - x).double().square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise))


def test_signal_to_noise_on_gaussian_and_laplace_data_is_the_published_one() -> None:
    x = gaussian(2**14, 64, seed=13)
    uniform = torch.rand(2**14, 64, generator=torch.Generator().manual_seed(14), dtype=torch.float64) - 0.5
    laplace = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    assert signal_to_noise(x) == pytest.approx(21.6, abs=0.15)
    assert signal_to_noise(laplace) == pytest.approx(21.0, abs=0.15)
