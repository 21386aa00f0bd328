"""From HiFloat4 back to values, and to bytes and back."""

from __future__ import annotations

from fractions import Fraction

import hif4_scalar as scalar
import pytest
import torch
from hif4_units import (
    FLOATS,
    ROUNDINGS,
    assert_same_packed,
    assert_same_values,
    gaussian,
    packed_tensor,
    rows,
    some,
    unit,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tahf4_compiler.format.hif4 import Packed, dequantize, fake_quantize, from_bytes, quantize, to_bytes


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
