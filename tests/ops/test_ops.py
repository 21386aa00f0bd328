"""The tahf4:: operators: what they mean, and that PyTorch can trace, fake and compile them."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import relative

import tahf4_compiler
from tahf4_compiler import FormatError, ops
from tahf4_compiler.format import hif4
from tahf4_compiler.ops import registry

tahf4 = torch.ops.tahf4


def packed(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, k)
    return (x, *tahf4.quantize(x))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (tahf4.quantize.default, lambda: (torch.randn(3, 100),)),
        (tahf4.quantize.default, lambda: (torch.randn(2, 3, 128, dtype=torch.bfloat16), torch.rand(128), 64)),
        (tahf4.dequantize.default, lambda: (*packed(3, 100)[1:], 100, torch.bfloat16)),
        (tahf4.linear.default, lambda: (*packed(3, 100)[1:], *packed(7, 100)[1:], torch.randn(7), torch.float16)),
        (tahf4.linear.default, lambda: (*packed(3, 64)[1:], *packed(7, 64)[1:], None, torch.float32)),
    ],
)
def test_opcheck_passes(operator, arguments):
    torch.library.opcheck(operator, arguments())


@pytest.mark.parametrize("k", [64, 100, 640])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_the_sum_over_units_of_exact_integer_dots(k, dtype):
    x, weight, bias = torch.randn(5, k), torch.randn(9, k) * 0.1, torch.randn(9)
    codes, scales = tahf4.quantize(x)
    weight_codes, weight_scales = tahf4.quantize(weight)
    total = torch.zeros(5, 9, dtype=torch.float64)
    for unit in range(hif4.units(k)):
        left, left_scale = integers(codes, scales, unit)
        right, right_scale = integers(weight_codes, weight_scales, unit)
        dots = left @ right.T
        assert dots.abs().max() <= 50176
        total += dots.double() * left_scale[:, None] * right_scale[None] / 16
    out = tahf4.linear(codes, scales, weight_codes, weight_scales, bias, dtype)
    assert out.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 5e-3
    assert relative(out, total + bias.double()) < tolerance


def integers(codes: torch.Tensor, scales: torch.Tensor, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a unit's elements as int64 (quarters, sub-exponents included) and its level-1 scale."""
    code = scales[:, unit] & 0xFF
    scale = torch.ldexp(1 + (code & 3).double() / 4, (code >> 2) - 48)
    one = hif4.Packed(codes[:, unit * 32 : unit * 32 + 32], scales[:, unit : unit + 1], 64)
    values = hif4.dequantize(one, torch.float64) / scale[:, None] * 4
    assert torch.equal(values, values.round())
    return values.long(), scale


def test_a_nan_in_one_token_stays_in_that_token():
    x = torch.randn(4, 128)
    x[2, 5] = float("nan")
    x[3, 100] = float("inf")
    weight = tahf4.quantize(torch.randn(8, 128))
    out = tahf4.linear(*tahf4.quantize(x), *weight, None, torch.float32)
    assert out[:2].isfinite().all()
    assert out[2:].isnan().all()


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (4, 0), (0, 0)])
def test_empty_operands_give_empty_results(rows, columns):
    weight = tahf4.quantize(torch.randn(columns, 64))
    assert tahf4.linear(*tahf4.quantize(torch.randn(rows, 64)), *weight, None, torch.float32).shape == (rows, columns)


def test_hadamard_is_orthonormal_and_its_own_inverse():
    x = torch.randn(3, 192)
    for block in (2, 64):
        assert torch.allclose(ops.hadamard(ops.hadamard(x, block), block), x, atol=1e-5)
        assert torch.allclose(ops.hadamard(x, block).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    matrix = ops.hadamard(torch.eye(4), 4) * 2
    assert matrix.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


def test_a_transform_on_both_sides_leaves_the_product():
    x, weight, mask = torch.randn(4, 128), torch.randn(8, 128), torch.rand(128) + 0.5
    left, right = ops.transform(x, mask, 64), ops.transform(weight, 1 / mask, 64)
    assert torch.allclose(left @ right.T, x @ weight.T, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tahf4.quantize(torch.randn(4, 64), torch.ones(63)), "multiplier of shape"),
        (lambda: tahf4.quantize(torch.randn(4, 64), None, 48), "power of two that divides 64"),
        (lambda: tahf4.quantize(torch.ones(4, 64, dtype=torch.int32)), "expected float32"),
        (lambda: tahf4.linear(*packed(2, 64)[1:], *packed(3, 128)[1:], None, torch.float32), "same number of 64"),
        (lambda: tahf4.linear(*packed(2, 64)[1:], *packed(3, 64)[1:], torch.ones(2), torch.float32), "bias of shape"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(FormatError, match=message):
        call()


OPERATORS = ("quantize", "linear", "fused_quantize", "fused_linear", "linear_quantize")


def call(space, name: str, x: torch.Tensor, bias: torch.Tensor | None):
    if name == "quantize":
        return space.quantize(x)
    if name == "fused_quantize":
        return space.fused_quantize([x], "a: float32 = neg(x0)")
    if name == "branched_quantize":
        return space.branched_quantize([x], "", [torch.ones(64, 8)])
    operands = (*tahf4.quantize(X), *tahf4.quantize(X), bias, torch.float32)
    more = {"linear": (), "fused_linear": ([4], [], "", torch.float32), "linear_quantize": ([], "", None, 0)}
    return getattr(space, name)(*operands, *more[name])


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("space", "name"),
    [*((space, name) for space in ("tahf4", "tahf4_cpu") for name in OPERATORS), ("tahf4", "branched_quantize")],
)
@pytest.mark.parametrize("without_cpp", ["", "1"])
def test_operators_say_that_they_have_no_derivative(space, name, without_cpp, monkeypatch):
    registry.kernels()  # defines tahf4_cpu
    monkeypatch.setenv("TAHF4_NO_CPP", without_cpp)
    run = functools.partial(call, getattr(torch.ops, space), name)
    bias = torch.zeros(4)
    refused = pytest.raises(tahf4_compiler.GradientError, match=f"{space}::{name} got a tensor whose derivative")
    with refused:
        run(X.clone().requires_grad_(), bias.clone().requires_grad_())
    with refused:
        torch.func.grad(lambda x: run(x, x[:, 0])[0].sum())(X)
    with refused:
        torch.func.jvp(lambda x: run(x, x[:, 0]), (X,), (X,))
    with torch.no_grad():
        found = run(X.clone().requires_grad_(), bias.clone().requires_grad_())
    wanted = call(tahf4, name, X, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
