"""The conversion compiled by Inductor gives the bits that it gives in eager mode.

Inductor removes bf16 round trips and may contract or reorder float operations, so equality is not a matter
of course. A compilation takes seconds: each test puts all its data through one compiled function.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import hif4_scalar as scalar
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from tahf4_compiler.format.hif4 import Packed, fake_quantize, quantize

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor needs a C++ compiler for the CPU",
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, backend="inductor", fullgraph=True, dynamic=False)


def half_even(x: Tensor) -> Packed:
    return quantize(x, rounding="half_even")


def assert_same(found: object, wanted: object) -> None:
    """Nested outputs are equal bit for bit; every NaN counts as the same."""
    if isinstance(wanted, tuple):
        assert isinstance(found, tuple) and len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, Tensor):
        assert isinstance(found, Tensor) and found.dtype == wanted.dtype and found.shape == wanted.shape
        if wanted.is_floating_point():
            assert torch.equal(found.isnan(), wanted.isnan())
            found, wanted = (x.masked_fill(x.isnan(), 0) for x in (found, wanted))
            assert torch.equal(found.signbit(), wanted.signbit())
        different = (found != wanted).sum()
        assert different == 0, f"{different} of {wanted.numel()} elements differ from eager mode"
    else:
        assert found == wanted


def adversarial_rows() -> Tensor:
    """Units of 64: thresholds of many scales, level-1 steps, random sizes and bits, special values."""
    generator = torch.Generator().manual_seed(0)
    scales = [*range(8), *range(0xA4, 0xC8), *range(0xF7, 0xFF)]
    thresholds = torch.tensor([values for scale in scales for values in scalar.threshold_units(scale)])
    maxima = torch.tensor(
        [v for exponent in (-48, -20, -1, 0, 15) for v in scalar.level1_thresholds(exponent)]
    )
    steps = torch.zeros(len(maxima), 64)
    steps[:, 5] = maxima
    normal = torch.randn(2048, 64, generator=generator)
    sizes = torch.logspace(-45, 38, 512)[:, None]
    of_all_sizes = (torch.randn(512, 64, generator=generator).double() * sizes).clamp(-3.4e38, 3.4e38).float()
    words = torch.randint(-(2**31), 2**31, (256, 64), generator=generator, dtype=torch.int64).to(torch.int32)
    bits = words.view(torch.float32)
    special = torch.randn(64, 64, generator=generator)
    special[torch.arange(64), torch.arange(64)] = torch.tensor([math.nan, math.inf, -math.inf, -0.0] * 16)
    subnormal = torch.full((2, 64), 2.0**-149)
    subnormal[1] = -(2.0**-127)
    return torch.cat(
        [
            thresholds,
            steps,
            normal,
            of_all_sizes,
            bits,
            bits.nan_to_num(1.0),
            special,
            subnormal,
            torch.zeros(1, 64),
        ]
    )


def rows_of(k: int, dtype: torch.dtype) -> Tensor:
    """The adversarial values as rows of k."""
    values = adversarial_rows().flatten()
    return values[: len(values) // k * k].reshape(-1, k).to(dtype)


@pytest.mark.slow  # rows that end inside a unit, below, hold the same values
@pytest.mark.parametrize("function", [half_even, quantize])
def test_compiled_float32_quantization_gives_the_bits_of_eager_mode_under_both_roundings(
    function: Callable[[Tensor], Packed],
) -> None:
    x = rows_of(128, torch.float32)
    assert_same(compiled(function)(x), function(x))


@pytest.mark.slow
def test_compiled_bfloat16_quantization_gives_the_bits_of_eager_mode() -> None:
    x = rows_of(64, torch.bfloat16)
    assert_same(compiled(quantize)(x), quantize(x))


def test_compiled_quantization_of_rows_that_end_inside_a_unit_gives_the_bits_of_eager_mode() -> None:
    x = rows_of(101, torch.float32)
    assert_same(compiled(quantize)(x), quantize(x))


@pytest.mark.slow
def test_two_dynamic_compilations_serve_any_number_of_rows_with_and_without_an_unfilled_unit() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    function = torch.compile(quantize, backend=counter, fullgraph=True, dynamic=True)
    values = adversarial_rows().flatten()
    for batch, tokens, k in (
        (2, 7, 128),
        (3, 50, 192),
        (2, 33, 100),
        (5, 40, 64 * 9),
        (4, 5, 65),
        (5, 11, 1000),
    ):
        x = values[-batch * tokens * k :].reshape(batch, tokens, k)
        assert_same(function(x), quantize(x))
    graphs = [
        graph for graph in counter.graphs if len(graph.graph.nodes)
    ]  # a restarted trace leaves an empty one
    assert len(graphs) <= 2, f"{len(graphs)} compilations for 6 shapes"


@pytest.mark.slow
def test_compiled_fake_quantization_of_bfloat16_between_float_operations_gives_the_bits_of_eager_mode() -> (
    None
):
    def surrounded(x: Tensor) -> tuple[Tensor, Tensor]:
        quantized = fake_quantize(x * 2)
        return quantized, quantized + x  # neighbours that Inductor fuses with the conversion

    x = rows_of(192, torch.bfloat16)
    assert_same(compiled(surrounded)(x), surrounded(x))
