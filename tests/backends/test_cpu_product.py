"""The integer product of the C++ kernels, on each set of instructions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cpu_operators
import pytest
import torch
from helpers import relative
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import build

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4
from tahf4_compiler.ops import registry

compiled = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
SETS = ["avx2", "avx_vnni", "avx512_vnni", "amx"]


def has(name):
    return cpu.available() and build.library().tahf4_instruction_sets() >> (1 + SETS.index(name)) & 1


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    if not has(request.param):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("TAHF4_CPU_ISA", request.param)
    return request.param


def packed(rows, k, seed):
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes over the whole range of the format, so that all scales and exponents occur.
    x = torch.randn(rows, k, generator=generator) * torch.exp2(torch.randint(-9, 9, (rows, k), generator=generator))
    return registry.quantize(x)


def in_float64(codes, scales, weight_codes, weight_scales):
    k = scales.shape[-1] * 64
    left, right = hif4.Packed(codes, scales, k), hif4.Packed(weight_codes, weight_scales, k)
    return hif4.dequantize(left, torch.float64) @ hif4.dequantize(right, torch.float64).mT


@compiled
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 64, 1), (2, 65, 15), (3, 200, 16), (4, 640, 17), (5, 64, 31), (6, 320, 32), (7, 1000, 33), (9, 64, 16)]
    + [(50, 192, 100)]
    + [(n, 128 + 64 * (n % 3), 65 + n) for n in range(10, 36)],
)
def test_integer_product_is_that_of_float64(instruction_set, rows, k, n):
    operands = (*packed(rows, k, 1), *packed(n, k, 2))
    bias = torch.linspace(-3, 3, n)
    wanted = in_float64(*operands)
    assert relative(cpu_operators.linear(*operands), wanted) < 1e-6
    assert relative(cpu_operators.linear(*operands, bias), wanted + bias) < 1e-6
    exact = cpu_operators.linear(*operands, bias)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(cpu_operators.linear(*operands, bias, dtype), exact.to(dtype))


@compiled
@pytest.mark.parametrize("signs", [(0x77, 0x77), (0x77, 0xFF), (0xFF, 0xFF), (0x7F, 0xF7), (0x7F, 0x7F)])
def test_the_largest_sums_of_a_unit_are_exact(instruction_set, signs):
    left, right = (torch.full((9, 96), sign, dtype=torch.uint8) for sign in signs)
    scales = torch.full((9, 3), -256 | 192, dtype=torch.int32)  # scale 1, all exponents set
    operands = (left, scales, right, scales)
    assert torch.equal(cpu_operators.linear(*operands).double(), in_float64(*operands))


@compiled
def test_units_without_a_number_and_random_bits(instruction_set):
    generator = torch.Generator().manual_seed(3)
    sides = []
    for rows in (7, 40):
        codes = torch.randint(0, 256, (rows, 160), generator=generator, dtype=torch.uint8)
        scales = torch.randint(-(2**31), 2**31 - 1, (rows, 5), generator=generator).to(torch.int32)
        scales = torch.where((scales & 0xFF) == 0xFF, 192, scales)
        scales[2, 3] = 0xFF
        sides += [codes, scales]
    found, wanted = cpu_operators.linear(*sides), in_float64(*sides)
    # Sums of units whose scales lie 2**60 apart: each result against the size of its own terms.
    size = in_float64(sides[0] & 0x77, sides[1], sides[2] & 0x77, sides[3])
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().sum() == 7 + 40 - 1
    assert ((found - wanted).abs().nan_to_num() <= 1e-6 * size.nan_to_num()).all()


@compiled
def test_neither_threads_nor_other_rows_change_the_product(instruction_set, _threads):
    operands = (*packed(83, 3000, 4), *packed(200, 3000, 5))
    torch.set_num_threads(1)
    wanted = cpu_operators.linear(*operands)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(cpu_operators.linear(*operands), wanted)
    for first, last in ((0, 1), (5, 7), (10, 83)):
        part = cpu_operators.linear(operands[0][first:last], operands[1][first:last], *operands[2:])
        assert torch.equal(part, wanted[first:last])


@compiled
def test_every_instruction_set_gives_the_same_bits(monkeypatch):
    operands = (*packed(83, 3000, 4), *packed(200, 3000, 5), torch.linspace(-3, 3, 200))
    found = []
    for name in filter(has, SETS):
        monkeypatch.setenv("TAHF4_CPU_ISA", name)
        found.append(cpu_operators.linear(*operands))
    assert all(torch.equal(one, found[0]) for one in found)


@compiled
def test_tiles_and_pytorchs_own_products_take_turns(instruction_set):
    # PyTorch's bfloat16 and int8 products may use the same registers, configured in another way.
    operands = (*packed(70, 640, 4), *packed(100, 640, 5))
    left, right = torch.randn(70, 640).bfloat16(), torch.randn(100, 640).bfloat16()
    ours, theirs = cpu_operators.linear(*operands), torch.nn.functional.linear(left, right)
    for _ in range(3):
        assert torch.equal(torch.nn.functional.linear(left, right), theirs)
        assert torch.equal(cpu_operators.linear(*operands), ours)


@compiled
def test_more_rows_than_one_block(instruction_set):
    operands = (*packed(1600, 64, 6), *packed(33, 64, 7))
    assert relative(cpu_operators.linear(*operands), in_float64(*operands)) < 1e-6


@compiled
def test_products_in_several_python_threads_at_once(instruction_set):
    operands = [(*packed(20 + i, 640, i), *packed(50, 640, 90 + i)) for i in range(8)]
    wanted = [cpu_operators.linear(*o) for o in operands]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, expected_one in zip(pool.map(lambda o: cpu_operators.linear(*o), operands), wanted, strict=True):
                assert torch.equal(found, expected_one)


@compiled
def test_strides_axes_and_empty_products(instruction_set):
    codes, scales = packed(24, 128, 8)
    weight = packed(10, 128, 9)
    wanted = cpu_operators.linear(codes, scales, *weight)
    found = cpu_operators.linear(codes.view(2, 3, 4, -1), scales.view(2, 3, 4, -1), *weight)
    assert torch.equal(found, wanted.view(2, 3, 4, 10))
    assert torch.equal(cpu_operators.linear(codes[::2], scales[::2], *weight), wanted[::2])
    wide = torch.empty(24, 99, dtype=torch.uint8)[:, 7:71].copy_(codes)
    assert torch.equal(cpu_operators.linear(wide, scales, *weight), wanted)
    assert cpu_operators.linear(codes[:0], scales[:0], *weight).shape == (0, 10)
    assert cpu_operators.linear(codes, scales, weight[0][:0], weight[1][:0]).shape == (24, 0)
    nothing = cpu_operators.linear(codes[:, :0], scales[:, :0], weight[0][:, :0], weight[1][:, :0], torch.arange(10.0))
    assert torch.equal(nothing, torch.arange(10.0).expand(24, 10))


@compiled
def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("TAHF4_CPU_ISA", "avx1024")
    with pytest.raises(tahf4.OptionError, match="'avx1024'; expected one of none"):
        cpu_operators.linear(*packed(1, 64, 0), *packed(1, 64, 1))


@compiled
def test_without_the_instructions_the_product_is_float32(monkeypatch):
    monkeypatch.setenv("TAHF4_CPU_ISA", "none")
    operands = (*packed(5, 200, 1), *packed(9, 200, 2))
    assert relative(cpu_operators.linear(*operands), in_float64(*operands)) < 1e-6
