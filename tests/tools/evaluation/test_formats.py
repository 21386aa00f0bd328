"""Fake quantization against scalar models in Python fractions, and linears that use it."""

from __future__ import annotations

import math
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from tahf4_compiler.tools.evaluation.formats import FORMATS, SimulatedLinear, fake_quantize, simulate_
from torch import Tensor, nn

from tahf4_compiler.errors import FormatError, OptionError
from tahf4_compiler.format import hif4
from tahf4_compiler.format.transforms import transform

E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
"""Magnitudes by code."""

E4M3 = [Fraction(m, 512) for m in range(8)] + [
    Fraction(8 + m, 8) * Fraction(2) ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]

COMPILES = pytest.param(
    True,
    marks=pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a compiler"),
)


def nearest(value: Fraction, table: list[Fraction]) -> Fraction:
    """Round a magnitude to a table of codes: to nearest, ties to the even code, saturating."""
    return table[min(range(len(table)), key=lambda code: (abs(table[code] - value), code % 2))]


def float32(value: Fraction) -> Fraction:
    """Round to float32; nothing here is a tie of the float64 in between."""
    return Fraction(float(np.float32(float(value))))


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def bfloat16(value: Fraction) -> Fraction:
    step = Fraction(2) ** (floor_log2(value) - 7)
    return round(value / step) * step


def signed(value: Fraction, magnitude: Fraction) -> Fraction:
    return magnitude if value >= 0 else -magnitude


def scalar_nvfp4(row: list[Fraction], tensor_amax: Fraction) -> list[Fraction]:
    out: list[Fraction] = []
    whole = float32(tensor_amax / 2688)
    for start in range(0, len(row), 16):
        block = row[start : start + 16]
        wanted = float32(float32(max(map(abs, block)) / 6) / whole) if whole else Fraction(0)
        scale = float32(nearest(wanted, E4M3) * whole)
        out += [signed(v, nearest(float32(abs(v) / scale), E2M1) * scale) if scale else Fraction(0) for v in block]
    return out


def scalar_mxfp4(row: list[Fraction], tensor_amax: Fraction) -> list[Fraction]:
    out: list[Fraction] = []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        amax = max(map(abs, block))
        scale = Fraction(2) ** max(-127, floor_log2(amax) - 2) if amax else Fraction(1)
        out += [signed(v, nearest(abs(v) / scale, E2M1) * scale) for v in block]
    return out


def scalar_int4(row: list[Fraction], tensor_amax: Fraction) -> list[Fraction]:
    out: list[Fraction] = []
    for start in range(0, len(row), 64):
        block = row[start : start + 64]
        amax = max(map(abs, block))
        scale = bfloat16(float32(amax / 7)) if amax else Fraction(0)
        out += [max(-7, min(7, round(float32(v / scale)))) * scale if scale else Fraction(0) for v in block]
    return out


ORACLES = {"nvfp4": scalar_nvfp4, "mxfp4": scalar_mxfp4, "int4": scalar_int4}


def rows(width: int, largest: float = 2.0**20) -> Tensor:
    """Ties, block maxima of many sizes, zeros, outliers and random values."""
    generator = torch.Generator().manual_seed(width)
    grid = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 7.5, 0.5625, 448, -2.5])
    ties = grid[torch.randint(len(grid), (8, width), generator=generator)]
    ties = ties * torch.tensor([-1.0, 1.0])[torch.randint(2, (8, width), generator=generator)]
    scaled = torch.randn(24, width, generator=generator) * torch.logspace(-12, 5, 24)[:, None]
    spiky = torch.randn(8, width, generator=generator)
    spiky[:, ::37] *= 200
    special = torch.zeros(3, width)
    special[1, 0], special[2, ::16] = largest, 1e-9
    return torch.cat((ties, scaled, spiky, special))


def oracle(x: Tensor, fmt: str) -> Tensor:
    amax = Fraction(x.abs().max().item())
    table = [ORACLES[fmt]([Fraction(v) for v in row], amax) for row in x.tolist()]
    return torch.tensor([[float(v) for v in row] for row in table])


@pytest.mark.parametrize("fmt", ORACLES)
@pytest.mark.parametrize("width", [128, 72])
def test_values_are_those_of_the_scalar_model(fmt, width):
    for x in (rows(width), rows(width)[:8], rows(width)[24:30]):  # NVFP4 has a scale for the tensor
        found, wanted = fake_quantize(x, fmt, compiled=False), oracle(x, fmt)
        assert found.dtype == torch.float32
        different = (found != wanted).nonzero().tolist()
        assert not different, [(x[r, c].item(), found[r, c].item(), wanted[r, c].item()) for r, c in different[:5]]


def test_mxfp4_scales_end_at_2_to_the_minus_127():
    x = torch.tensor([[2.0**-126, 2.0**-127, 2.0**-128, 2.0**-140] + [0.0] * 28])
    assert torch.equal(fake_quantize(x, "mxfp4", compiled=False), oracle(x, "mxfp4"))
    assert fake_quantize(torch.full((1, 32), 3.4e38), "mxfp4", compiled=False).isfinite().all()


@pytest.mark.parametrize("fmt", ORACLES)
def test_known_values(fmt):
    x = torch.zeros(64)
    x[:7] = torch.tensor([7.0, 5.0, 2.5, -3.5, 0.26, 1.0, 6.5])
    wanted = {
        # amax 7: the tensor's scale is 7 / 2688, that of the block 448, together 7 / 6.
        "nvfp4": [7.0, 14 / 3, 7 / 3, -3.5, 7 / 12 * 0, 7 / 6, 7.0],
        # floor(log2(7)) - 2 = 0: 7 saturates.
        "mxfp4": [6.0, 4.0, 2.0, -4.0, 0.5, 1.0, 6.0],
        "int4": [7.0, 5.0, 2.0, -4.0, 0.0, 1.0, 6.0],
    }[fmt]
    assert torch.allclose(fake_quantize(x, fmt, compiled=False)[:7], torch.tensor(wanted), rtol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_shapes_dtypes_zeros_and_nan(fmt):
    x = torch.randn(2, 3, 5, 64)
    assert torch.equal(
        fake_quantize(x.double(), fmt, compiled=False), fake_quantize(x.flatten(0, 2), fmt, compiled=False).view_as(x)
    )
    assert fake_quantize(x.bfloat16(), fmt, compiled=False).dtype == torch.float32
    assert fake_quantize(torch.zeros(4, 64), fmt, compiled=False).eq(0).all()
    assert fake_quantize(torch.zeros(0, 64), fmt, compiled=False).shape == (0, 64)
    x[0, 0, 0, 0] = math.nan
    assert fake_quantize(x, fmt, compiled=False)[0, 0, 0, 0].isnan()


def test_hif4_is_that_of_the_compiler():
    x = torch.randn(7, 128)
    assert torch.equal(fake_quantize(x, "hif4", compiled=False), hif4.fake_quantize(x))


@pytest.mark.parametrize("compiles", [COMPILES])
@pytest.mark.parametrize("fmt", ORACLES)
def test_compiled_values_are_the_same_and_rows_do_not_compile_again(fmt, compiles):
    x = rows(192)
    assert torch.equal(fake_quantize(x, fmt, compiled=False), fake_quantize(x, fmt))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for part in (x[:5], x[:17].view(17, 192), torch.cat((x, x)).view(2, -1, 192)):
            assert torch.equal(fake_quantize(part, fmt, compiled=False), fake_quantize(part, fmt))


def test_an_unknown_format_is_refused():
    with pytest.raises(OptionError, match="unknown format 'fp4'"):
        fake_quantize(torch.zeros(1, 64), "fp4")


def test_a_simulated_linear_is_a_product_of_fake_quantized_operands():
    linear, x = nn.Linear(128, 24), torch.randn(2, 5, 128)
    found = SimulatedLinear(linear, "int4", compiled=False)(x)
    left, right = fake_quantize(x, "int4", compiled=False), fake_quantize(linear.weight, "int4", compiled=False)
    assert torch.allclose(found, nn.functional.linear(left, right, linear.bias), atol=1e-6)
    assert SimulatedLinear(linear, "int4", compiled=False)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("k", [128, 72])
def test_the_rotation_of_weight_and_activation_cancels(fmt, k):
    linear, x = nn.Linear(k, 24), torch.randn(40, k)
    flips = torch.where(torch.rand(k) < 0.5, -1.0, 1.0)
    moved = transform(x, flips, 64), transform(linear.weight.detach(), flips, 64)
    assert torch.allclose(nn.functional.linear(*moved, linear.bias), linear(x), atol=1e-4)
    left, right = (fake_quantize(side, fmt, compiled=False) for side in moved)
    simulated = SimulatedLinear(linear, fmt, flips, 64, compiled=False)
    assert torch.allclose(simulated(x), nn.functional.linear(left, right, linear.bias), atol=1e-5)
    assert (simulated(x) - linear(x)).norm() < 0.3 * linear(x).norm()


def test_a_linear_refuses_what_weights_would_have_to_undo():
    with pytest.raises(OptionError, match="other than"):
        SimulatedLinear(nn.Linear(64, 8), "int4", torch.full((64,), 2.0))
    with pytest.raises(FormatError, match="multiplier of shape"):
        SimulatedLinear(nn.Linear(64, 8), "int4", torch.ones(32))


def test_linears_are_replaced_by_path_and_seed_or_not_at_all():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Sequential(nn.Linear(64, 64), nn.GELU()), "b": nn.Linear(64, 8)})

    model = build()
    simulate_(model, ["a.0", "b"], "mxfp4", 32, 1, compiled=False)
    first, second = model["a"][0], model["b"]
    assert isinstance(first, SimulatedLinear) and isinstance(second, SimulatedLinear)
    assert first.hadamard_block == 32 and not torch.equal(first.multiplier, second.multiplier)
    same, other, plain = build(), build(), build()
    simulate_(same, ["b"], "mxfp4", 32, 1, compiled=False)
    simulate_(other, ["b"], "mxfp4", 32, 2, compiled=False)
    simulate_(plain, ["b"], "mxfp4", compiled=False)
    assert torch.equal(same["b"].weight, second.weight) and not torch.equal(other["b"].weight, second.weight)
    assert plain["b"].multiplier is None and isinstance(plain["a"][0], nn.Linear)
    for paths, fmt, block in ((["b", "c"], "mxfp4", 0), (["a.1"], "mxfp4", 0), (["b"], "e", 0), (["b"], "int4", 3)):
        untouched = build()
        with pytest.raises(OptionError):
            simulate_(untouched, paths, fmt, block)
        assert isinstance(untouched["b"], nn.Linear)


def test_a_simulated_linear_can_be_compiled_as_part_of_a_model():
    model = SimulatedLinear(nn.Linear(64, 8), "nvfp4", None, 64)
    x = torch.randn(6, 64)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), atol=1e-6)
