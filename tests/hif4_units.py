"""What the tests of HiFloat4 share: the scalar oracle's results as tensors, comparisons, and inputs."""

from __future__ import annotations

import math

import hif4_scalar as scalar
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tahf4_compiler.format.hif4 import Packed

ROUNDINGS = ("half_away", "half_even")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
NAN, INF = math.nan, math.inf
some = settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def packed_tensor(metadata: list[int], codes: bytes, k: int, leading: tuple[int, ...] = ()) -> Packed:
    """Oracle output as the tensors that `quantize` returns."""
    units = -(-k // 64)
    signed = [word - 2**32 if word >= 2**31 else word for word in metadata]
    return Packed(
        codes=torch.tensor(list(codes), dtype=torch.uint8).reshape(*leading, 32 * units),
        scales=torch.tensor(signed, dtype=torch.int32).reshape(*leading, units),
        k=k,
    )


def expected(x: Tensor, rounding: str = "half_away", span: int = 1) -> Packed:
    """What the oracle makes of a tensor."""
    k = x.shape[-1]
    metadata: list[int] = []
    codes = b""
    for row in x.double().reshape(-1, k).tolist():
        row_metadata, row_codes = scalar.quantize_row(row, rounding, span)
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
