"""The tensor conversion to HiFloat4 and back, bit for bit against the scalar oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import hif4_scalar as scalar
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tahf4_compiler.errors import FormatError
from tahf4_compiler.format.hif4 import Packed, dequantize, fake_quantize, from_bytes, quantize, to_bytes

ROUNDINGS = ("half_away", "half_even")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
NAN, INF = math.nan, math.inf

some = settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


# --- helpers ---------------------------------------------------------------------------------------------


def packed_tensor(metadata: list[int], codes: bytes, k: int, leading: tuple[int, ...] = ()) -> Packed:
    """Oracle output as the tensors that `quantize` returns."""
    units = -(-k // 64)
    signed = [word - 2**32 if word >= 2**31 else word for word in metadata]
    return Packed(
        codes=torch.tensor(list(codes), dtype=torch.uint8).reshape(*leading, 32 * units),
        scales=torch.tensor(signed, dtype=torch.int32).reshape(*leading, units),
        k=k,
    )


def expected(x: Tensor, rounding: str = "half_away") -> Packed:
    """What the oracle makes of a tensor."""
    k = x.shape[-1]
    metadata: list[int] = []
    codes = b""
    for row in x.double().reshape(-1, k).tolist():
        row_metadata, row_codes = scalar.quantize_row(row, rounding)
        metadata += row_metadata
        codes += row_codes
    return packed_tensor(metadata, codes, k, tuple(x.shape[:-1]))


def assert_same_packed(found: Packed, wanted: Packed) -> None:
    assert found.k == wanted.k
    assert found.scales.dtype == torch.int32 and found.codes.dtype == torch.uint8
    assert found.scales.shape == wanted.scales.shape and found.codes.shape == wanted.codes.shape
    assert torch.equal(found.scales, wanted.scales), "scales differ from the oracle's"
    assert torch.equal(found.codes, wanted.codes), "codes differ from the oracle's"


def assert_same_values(found: Tensor, wanted: Tensor) -> None:
    """Equal bit for bit, so that -0 is not 0; every NaN counts as the same."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    bits = BITS.get(found.dtype, torch.int16)
    found, wanted = (x.masked_fill(x.isnan(), 0).contiguous() for x in (found, wanted))
    assert torch.equal(found.view(bits), wanted.view(bits))


def unit(*values: float, group: int = 4) -> list[float]:
    """64 values: each given one starts a group, the rest is zero."""
    whole = [0.0] * 64
    whole[: group * len(values) : group] = values
    return whole


def code_of(packed: Packed, index: int) -> int:
    """The 4-bit code of one value of a 1-D packed row."""
    return int(packed.codes[index // 2]) >> (4 * (index % 2)) & 0xF


def level1(packed: Packed) -> Tensor:
    """The level-1 scale bytes."""
    return packed.scales & 0xFF


def random_bits(count: int, seed: int) -> Tensor:
    """float32 values whose 32 bits are uniformly random, NaN and infinity included."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    return words.to(torch.int32).view(torch.float32)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the oracle's own arithmetic -------------------------------------------------------------------------


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


# --- quantize against the oracle -------------------------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """A row of 1 to 150 values in any float type, most of them near a tie of one common scale."""
    dtype = draw(st.sampled_from(FLOATS))
    exponent = draw(st.integers(-8, 8) if dtype == torch.float16 else st.integers(-54, 20))
    size = 2.0**exponent * draw(st.sampled_from((1.0, 1.25, 1.5, 1.75)))
    near_tie = st.builds(
        lambda eighths, steps: size * eighths / 8 * (1 + steps * 2.0**-23),
        st.integers(-60, 60),
        st.integers(-3, 3),
    )
    anything = st.floats(width=16 if dtype == torch.float16 else 32, allow_nan=False, allow_infinity=False)
    special = st.sampled_from((0.0, -0.0, size * 7, size * -7, 2.0**-149, -(2.0**-126)))
    rare = st.sampled_from((NAN, INF, -INF, 3e38, -3e38, 1e300, -1e300, 1e-300))
    element = [near_tie] * 4 + [special]
    match draw(st.integers(0, 5)):
        case 0:
            element.append(anything)
        case 1:
            element = [anything]
        case 2:
            element += [special] * 20 + [rare]
    return torch.tensor(draw(st.lists(st.one_of(element), min_size=1, max_size=150)), dtype=torch.float64).to(
        dtype
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
    [("half_away", range(255)), ("half_even", [*range(8), *range(0xA5, 0xB9), *range(0xF9, 0xFF)])],
    ids=ROUNDINGS,
)
def test_values_on_and_beside_every_threshold_of_every_scale_match_the_oracle(
    rounding: str, scales: list[int]
) -> None:
    x = torch.tensor([values for scale in scales for values in scalar.threshold_units(scale)])
    assert_same_packed(quantize(x, rounding=rounding), expected(x, rounding))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
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
    wanted = torch.tensor([scalar.level1_scale(value) for value in maxima.tolist()], dtype=torch.int32)
    assert torch.equal(level1(quantize(x))[:, 0], wanted)


def test_a_maximum_beside_every_step_of_the_level1_scale_matches_the_oracle() -> None:
    maxima = [value for exponent in range(-49, 17) for value in scalar.level1_thresholds(exponent)]
    wanted = torch.tensor([scalar.level1_scale(value) for value in maxima], dtype=torch.int32)
    x = torch.zeros(len(maxima), 64)
    x[:, 63] = -torch.tensor(maxima)
    assert torch.equal(level1(quantize(x))[:, 0], wanted)
    assert_same_packed(quantize(x[::17]), expected(x[::17]))


# --- single points of the conversion, by hand ------------------------------------------------------------


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


# --- shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (1, 3, 4, 63, 64, 65, 100, 127, 128, 129, 193))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_k_is_padded_with_zeros_that_never_leak(k: int, dtype: torch.dtype) -> None:
    storage = torch.full((3, 300), NAN, dtype=dtype)  # whatever lies behind a row must not be read
    x = storage[:, :k]
    x.copy_(gaussian(3, k, seed=k))
    packed = quantize(x)
    assert_same_packed(packed, expected(x))
    padded = torch.nn.functional.pad(x, (0, -k % 64))
    assert torch.equal(packed.codes, quantize(padded).codes)
    assert torch.equal(packed.scales, quantize(padded).scales)
    padding = dequantize(Packed(packed.codes, packed.scales, padded.shape[1]))[:, k:]
    assert_same_values(padding, torch.zeros_like(padding))
    assert_same_values(dequantize(packed, dtype), dequantize(quantize(padded), dtype)[:, :k])


@pytest.mark.parametrize("k", (64, 100))
@pytest.mark.parametrize("leading", ((), (1,), (5,), (2, 3), (2, 1, 3, 2)))
def test_leading_dimensions_are_kept_and_rows_do_not_influence_each_other(
    leading: tuple[int, ...], k: int
) -> None:
    x = gaussian(*leading, k, seed=7)
    packed = quantize(x)
    units = -(-k // 64)
    assert packed.codes.shape == (*leading, 32 * units) and packed.scales.shape == (*leading, units)
    alone = [quantize(row) for row in x.reshape(-1, k)]
    assert torch.equal(packed.codes.reshape(-1, 32 * units), torch.stack([row.codes for row in alone]))
    assert torch.equal(packed.scales.reshape(-1, units), torch.stack([row.scales for row in alone]))
    assert dequantize(packed).shape == x.shape and fake_quantize(x).shape == x.shape


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "every other column": lambda x: x[:, ::2],
    "every third row from the second": lambda x: x[1::3],
    "a window": lambda x: x[3:90, 5:133],
    "one row expanded": lambda x: x[:1].expand(4, -1),
    "one column expanded": lambda x: x[:, :1].expand(-1, 64),
    "middle dimension last": lambda x: x.reshape(4, 36, 200).transpose(1, 2),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_do_not_matter(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = view(gaussian(144, 200, seed=8).to(dtype))
    assert_same_packed(quantize(x), quantize(x.contiguous()))
    assert_same_values(fake_quantize(x), fake_quantize(x.contiguous()))


def test_packed_tensors_of_any_strides_are_read_correctly() -> None:
    packed = quantize(gaussian(6, 128, seed=9))
    wide = Packed(packed.codes.t().contiguous().t(), packed.scales.t().contiguous().t(), 128)
    assert_same_values(dequantize(wide), dequantize(packed))
    assert torch.equal(to_bytes(wide), to_bytes(packed))
    assert_same_packed(from_bytes(to_bytes(packed).t().contiguous().t(), 128), packed)
    slice_of = Packed(packed.codes[::2, 32:], packed.scales[::2, 1:], 64)
    assert_same_values(dequantize(slice_of), dequantize(packed)[::2, 64:])


@pytest.mark.parametrize("shape", ((0,), (3, 0), (0, 64), (0, 100), (2, 0, 64), (0, 0)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_empty_tensors_pass_through(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(shape, dtype=dtype)
    packed = quantize(x)
    units = -(-shape[-1] // 64)
    assert packed.k == shape[-1]
    assert packed.codes.shape == (*shape[:-1], 32 * units) and packed.codes.dtype == torch.uint8
    assert packed.scales.shape == (*shape[:-1], units) and packed.scales.dtype == torch.int32
    assert dequantize(packed, dtype).shape == shape and fake_quantize(x).shape == shape
    assert to_bytes(packed).shape == (*shape[:-1], 36 * units)
    assert_same_packed(from_bytes(to_bytes(packed), shape[-1]), packed)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inputs_are_left_as_they_are(dtype: torch.dtype) -> None:
    x = torch.tensor([unit(1.0, -0.0, 3e38), unit(NAN, 2.0)]).to(dtype)
    before = x.clone()
    packed = quantize(x)
    codes, scales = packed.codes.clone(), packed.scales.clone()
    fake_quantize(x)
    dequantize(packed)
    to_bytes(packed)
    assert_same_values(x, before)
    assert torch.equal(packed.codes, codes) and torch.equal(packed.scales, scales)


def test_parameters_are_quantized_without_a_gradient_scope() -> None:
    weight = torch.nn.Parameter(gaussian(3, 100, seed=15))
    packed = quantize(weight)
    assert_same_packed(packed, quantize(weight.detach()))
    assert not packed.codes.requires_grad and not packed.scales.requires_grad
    assert_same_values(fake_quantize(weight).detach(), fake_quantize(weight.detach()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes_and_dtypes_are_known_without_data(dtype: torch.dtype) -> None:
    packed = quantize(torch.empty(2, 5, 100, dtype=dtype, device="meta"))
    assert packed.codes.shape == (2, 5, 64) and packed.codes.dtype == torch.uint8
    assert packed.scales.shape == (2, 5, 2) and packed.scales.dtype == torch.int32
    values = dequantize(packed, dtype)
    assert values.shape == (2, 5, 100) and values.dtype == dtype and values.is_meta
    assert to_bytes(packed).shape == (2, 5, 72)


# --- dequantize ------------------------------------------------------------------------------------------


def every_combination() -> tuple[Packed, Tensor]:
    """Each finite scale with each of the four sub-exponents and all 16 codes, and the exact values."""
    metadata, rows_of_codes, values = [], b"", []
    codes = bytes(2 * j % 16 | (2 * j + 1) % 16 << 4 for j in range(32))
    for scale in range(255):
        # Elements 0-15 hold all codes, as do 16-31 and so on: one pair (e8, e16) for each 16 elements.
        word = scale | 0b11110000 << 8 | 0b1111_0000_1111_0000 << 16
        metadata.append(word)
        rows_of_codes += codes
        values.append(scalar.dequantize_unit(word, codes))
    return packed_tensor(metadata, rows_of_codes, 64, (255,)), torch.tensor(values, dtype=torch.float64)


def test_every_scale_sub_exponent_and_code_decodes_exactly() -> None:
    packed, values = every_combination()
    assert_same_values(dequantize(packed, torch.float64), values)
    assert_same_values(dequantize(packed), values.float())
    assert torch.equal(values.float().double(), values), "float32 holds every value"
    for row, word in zip(values.tolist(), packed.scales[:, 0].tolist(), strict=True):
        for index, value in enumerate(row):
            assert Fraction(value) == scalar.element_value(word & 0xFFFFFFFF, index % 16, index)


def test_bfloat16_holds_every_decoded_value_and_float16_the_nearest() -> None:
    packed, values = every_combination()
    assert torch.equal(dequantize(packed, torch.bfloat16).double(), values)
    assert_same_values(dequantize(packed, torch.bfloat16), values.bfloat16())
    assert_same_values(dequantize(packed, torch.float16), values.half())


def test_each_sub_exponent_bit_belongs_to_its_own_elements() -> None:
    codes = bytes([0x44] * 32)  # 1.0 everywhere
    words = [0xC0 | 1 << bit for bit in range(8, 32)]
    packed = packed_tensor(words, codes * 24, 64, (24,))
    doubled = dequantize(packed).eq(2)
    for bit in range(8):
        assert doubled[bit].nonzero().flatten().tolist() == list(range(8 * bit, 8 * bit + 8))
    for bit in range(16):
        assert doubled[8 + bit].nonzero().flatten().tolist() == list(range(4 * bit, 4 * bit + 4))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_nan_scale_decodes_to_nan_whatever_else_the_unit_holds(dtype: torch.dtype) -> None:
    packed = packed_tensor([0xC0, 0xFF, 0xFFFFFFFF, 0xC0], bytes([0x00, 0x84, 0xFF, 0x12] * 32), 256)
    values = dequantize(packed, dtype)
    assert values.dtype == dtype
    assert values.isnan().tolist() == [False] * 64 + [True] * 128 + [False] * 64


@some
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    codes=st.binary(min_size=96, max_size=96),
    k=st.integers(129, 192),
)
def test_any_packed_bits_decode_as_the_oracle_does(words: list[int], codes: bytes, k: int) -> None:
    wanted = torch.tensor(scalar.dequantize_row(words, codes, k), dtype=torch.float64)
    assert_same_values(dequantize(packed_tensor(words, codes, k)), wanted.float())


@some
@given(x=rows(), rounding=st.sampled_from(ROUNDINGS))
def test_fake_quantize_is_quantize_then_dequantize(x: Tensor, rounding: str) -> None:
    wanted = dequantize(quantize(x, rounding=rounding), x.dtype)
    assert_same_values(fake_quantize(x, rounding=rounding), wanted)


def test_half_away_is_the_default_everywhere() -> None:
    x = torch.tensor(unit(7.0, 0.0, 0.125, 0.625))
    assert_same_packed(quantize(x), quantize(x, rounding="half_away"))
    assert_same_values(fake_quantize(x), fake_quantize(x, rounding="half_away"))
    assert fake_quantize(x)[8] == 0.25 and fake_quantize(x, rounding="half_even")[8] == 0


def test_changing_the_sign_changes_only_the_sign_bits() -> None:
    x = gaussian(64, 64, seed=10)
    plain, flipped = quantize(x), quantize(-x)
    assert torch.equal(plain.scales, flipped.scales)
    assert torch.equal(plain.codes ^ 0x88, flipped.codes)


def test_a_power_of_two_moves_only_the_exponent_of_the_scale() -> None:
    x = gaussian(64, 64, seed=11)
    for power in (-20, -1, 1, 12):
        moved = quantize(x * 2.0**power)
        assert torch.equal(moved.scales, quantize(x).scales + 4 * power)
        assert torch.equal(moved.codes, quantize(x).codes)


# --- quantizing twice ------------------------------------------------------------------------------------


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


# --- bytes -----------------------------------------------------------------------------------------------


def test_to_bytes_puts_each_units_little_endian_metadata_before_its_codes() -> None:
    codes = torch.arange(64, dtype=torch.uint8)
    scales = torch.tensor([0x12345678, 0x89ABCDEF - 2**32], dtype=torch.int32)
    data = to_bytes(Packed(codes, scales, 100))
    assert data.dtype == torch.uint8
    assert data.tolist() == [
        *(0x78, 0x56, 0x34, 0x12),
        *range(32),
        *(0xEF, 0xCD, 0xAB, 0x89),
        *range(32, 64),
    ]


def test_the_bytes_of_a_unit_made_by_hand() -> None:
    # scale 1; e8 of group 0, e16 of groups 0 and 15; 7, -1 (a quarter of 4), ..., 3.5 as the last element
    x = torch.tensor([7.0, -1.0, *[0.0] * 61, 3.5])
    data = to_bytes(quantize(x))
    assert data.tolist() == [0xC0, 0x01, 0x01, 0x80, 0x97, *[0] * 30, 0x70]
    assert_same_values(dequantize(from_bytes(data, 64)), torch.tensor([7.0, -1.0, *[0.0] * 61, 3.5]))


@some
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4),
    codes=st.binary(min_size=128, max_size=128),
    k=st.integers(65, 128),
)
def test_bytes_round_trip_for_any_bits(words: list[int], codes: bytes, k: int) -> None:
    packed = packed_tensor(words, codes, k, (2,))
    data = to_bytes(packed)
    assert data.shape == (2, 72)
    assert_same_packed(from_bytes(data, k), packed)
    assert torch.equal(to_bytes(from_bytes(data, k)), data)
    raw = [word.to_bytes(4, "little") + codes[32 * i : 32 * i + 32] for i, word in enumerate(words)]
    assert bytes(data.flatten().tolist()) == b"".join(raw)


# --- quality ---------------------------------------------------------------------------------------------


def signal_to_noise(x: Tensor) -> float:
    noise = (fake_quantize(x) - x).double().square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise))


def test_signal_to_noise_on_gaussian_and_laplace_data_is_the_published_one() -> None:
    x = gaussian(2**14, 64, seed=13)
    uniform = torch.rand(2**14, 64, generator=torch.Generator().manual_seed(14), dtype=torch.float64) - 0.5
    laplace = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    assert signal_to_noise(x) == pytest.approx(21.6, abs=0.15)
    assert signal_to_noise(laplace) == pytest.approx(21.0, abs=0.15)


# --- errors ----------------------------------------------------------------------------------------------


def test_format_error_is_a_value_error() -> None:
    assert issubclass(FormatError, ValueError)


@pytest.mark.parametrize("convert", (quantize, fake_quantize))
@pytest.mark.parametrize(
    "dtype", (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64), ids=str
)
def test_a_tensor_that_is_not_real_floating_point_is_refused_by_name(
    convert: Callable[[Tensor], object], dtype: torch.dtype
) -> None:
    with pytest.raises(FormatError, match=str(dtype).removeprefix("torch.")) as caught:
        convert(torch.zeros(64, dtype=dtype))
    assert "float" in str(caught.value)


@pytest.mark.parametrize("convert", (quantize, fake_quantize))
def test_a_tensor_without_dimensions_is_refused(convert: Callable[[Tensor], object]) -> None:
    with pytest.raises(FormatError, match="expected at least one"):
        convert(torch.tensor(1.0))


@pytest.mark.parametrize("convert", (quantize, fake_quantize))
@pytest.mark.parametrize("rounding", ("nearest", "", "HALF_AWAY"))
def test_an_unknown_rounding_is_refused_with_the_known_ones_named(
    convert: Callable[..., object], rounding: str
) -> None:
    for x in (torch.ones(64), torch.ones(0)):
        with pytest.raises(FormatError, match="half_away") as caught:
            convert(x, rounding=rounding)
        assert "half_even" in str(caught.value) and repr(rounding) in str(caught.value)


GOOD = packed_tensor([0xC0] * 6, bytes(32 * 6), 128, (3,))
BROKEN = {
    "codes as int8": GOOD._replace(codes=GOOD.codes.to(torch.int8)),
    "codes as int32": GOOD._replace(codes=GOOD.codes.to(torch.int32)),
    "scales as int64": GOOD._replace(scales=GOOD.scales.to(torch.int64)),
    "scales as float32": GOOD._replace(scales=GOOD.scales.to(torch.float32)),
    "codes and scales swapped": Packed(GOOD.scales, GOOD.codes, 128),
    "a byte too few": GOOD._replace(codes=GOOD.codes[:, :-1]),
    "a unit of codes too few": GOOD._replace(codes=GOOD.codes[:, :32]),
    "a scale too few": GOOD._replace(scales=GOOD.scales[:, :1]),
    "rows that differ": GOOD._replace(codes=GOOD.codes[:2]),
    "rows that would broadcast": GOOD._replace(codes=GOOD.codes[:1]),
    "a leading dimension too many": GOOD._replace(codes=GOOD.codes[None]),
    "codes without dimensions": GOOD._replace(codes=GOOD.codes[0, 0]),
    "scales without dimensions": GOOD._replace(scales=GOOD.scales[0, 0]),
    "nothing with dimensions": Packed(GOOD.codes[0, 0], GOOD.scales[0, 0], 0),
    "k too large": GOOD._replace(k=129),
    "k a unit too small": GOOD._replace(k=64),
    "k zero": GOOD._replace(k=0),
    "k negative": GOOD._replace(k=-1),
    "k negative and no units": Packed(GOOD.codes[:, :0], GOOD.scales[:, :0], -1),
}


def test_dequantizing_to_a_type_that_is_not_floating_point_is_refused() -> None:
    with pytest.raises(FormatError, match="int32"):
        dequantize(GOOD, torch.int32)


@pytest.mark.parametrize("read", (dequantize, to_bytes))
@pytest.mark.parametrize("packed", BROKEN.values(), ids=BROKEN.keys())
def test_an_inconsistent_packed_tensor_is_refused(read: Callable[[Packed], Tensor], packed: Packed) -> None:
    read(GOOD)
    with pytest.raises(FormatError, match="expected"):
        read(packed)


@pytest.mark.parametrize(
    ("shape", "dtype", "k"),
    [
        ((3, 72), torch.int8, 128),
        ((3, 72), torch.int32, 128),
        ((3, 71), torch.uint8, 128),
        ((3, 72), torch.uint8, 64),
        ((3, 72), torch.uint8, 129),
        ((3, 72), torch.uint8, 0),
        ((3, 0), torch.uint8, 1),
        ((3, 0), torch.uint8, -1),
        ((), torch.uint8, 64),
    ],
)
def test_bytes_that_are_not_whole_units_for_k_are_refused(
    shape: tuple[int, ...], dtype: torch.dtype, k: int
) -> None:
    with pytest.raises(FormatError, match="expected"):
        from_bytes(torch.zeros(shape, dtype=dtype), k)
