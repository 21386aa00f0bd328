"""The conversion to HiFloat4 for tensors of any shape, strides and type, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hif4_units import (
    FLOATS,
    NAN,
    assert_same_packed,
    assert_same_values,
    expected,
    gaussian,
    packed_tensor,
    unit,
)
from torch import Tensor

from tahf4_compiler.errors import FormatError
from tahf4_compiler.format.hif4 import Packed, dequantize, fake_quantize, from_bytes, quantize, to_bytes


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
