"""Programs of fused operators: text that is read, never executed, and replayed with PyTorch's operators."""

import pytest
import torch
from torch.library import opcheck

from tahf4_compiler import FormatError
from tahf4_compiler.ops import fused
from tahf4_compiler.ops.program import FUNCTIONS, Program

TEXT = """v0: float32 = to(x0)
v1: float32 = layer_norm(v0, None, None, 1e-06)
v2: float32 = add(x1, 1)
v3: float32 = mul(v1, v2)
v4: bfloat16 = to(v3)"""


def test_text_and_program_are_the_same_thing():
    assert str(Program.parse(TEXT)) == TEXT
    assert Program.parse(str(Program.parse(TEXT))) == Program.parse(TEXT)
    assert Program.parse("") == Program()


def test_a_program_means_what_the_operators_mean():
    x, scale = torch.randn(2, 5, 96).bfloat16(), torch.randn(2, 1, 96)
    got = Program.parse(TEXT).run({"x0": x, "x1": scale}, "x0")
    wanted = (torch.nn.functional.layer_norm(x.float(), (96,), eps=1e-6) * (1 + scale)).bfloat16()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "text, message",
    [
        ("import os", "is no statement of a program"),
        ("v0 = add(x0, 1)", "is no statement of a program"),
        ("v0: float32 = x0 + 1", "is no statement of a program"),
        ("v0: float32 = system(x0)", "expected a function of"),
        ("v0: float64 = add(x0, 1)", "expected a function of"),
        ("v0: float32 = add(x0, alpha=2)", "expected a function of"),
        ("v0: float32 = add(v1, 1)", "reads 'v1', which is no input"),
        ("v0: float32 = add(x0, 'a')", "is no name, number or None"),
        ("v0: float32 = add(x0, __import__('os'))", "is no name, number or None"),
        ("v0: float32 = add(x0, ", "not a program"),
        ("v0: float32 = matmul(x0, x2)", "two neighbouring inputs"),
        ("v0: float32 = matmul(x0, 1)", "two neighbouring inputs"),
        ("v0: float32 = neg(x0)\nv1: float32 = matmul(v0, x1)", "two neighbouring inputs"),
        ("v0: float32 = matmul(x0, x1)\nv1: float32 = mul(v0, x1)", "two neighbouring inputs"),
    ],
)
def test_what_is_no_program_is_refused(text, message):
    with pytest.raises(FormatError, match=message):
        Program.parse(text)


def test_a_product_of_two_inputs_is_rounded_like_every_statement():
    y, left, right = torch.randn(2, 5, 96).bfloat16(), torch.randn(2, 5, 8).bfloat16(), torch.randn(8, 96).bfloat16()
    program = Program.parse("v0: bfloat16 = matmul(x0, x1)\nv1: bfloat16 = add(y, v0)")
    assert program.factors() == [0]
    got = program.run({"y": y, "x0": left, "x1": right}, "y")
    assert torch.equal(got, y + left @ right)


def test_every_function_has_an_expression_for_triton():
    from tahf4_compiler.backends.triton.expressions import _EXPRESSIONS

    assert set(_EXPRESSIONS) == set(FUNCTIONS)


def packed(*shape):
    return torch.ops.tahf4.quantize(torch.randn(*shape))


def test_operators_pass_pytorchs_own_checks():
    x, scale = torch.randn(2, 5, 96).bfloat16(), torch.randn(2, 1, 96)
    opcheck(fused.fused_quantize, ([x, scale], TEXT, torch.rand(96), 64))
    opcheck(fused.branched_quantize, ([x, scale], TEXT, [torch.randn(96, 8).bfloat16()], torch.rand(96), 64))
    operands = (*packed(2, 5, 128), *packed(96, 128), torch.randn(96), torch.bfloat16)
    gate = "v0: float32 = mul(y, x0)"
    opcheck(fused.fused_linear, (*operands, [96], [scale], gate, torch.float32))
    opcheck(fused.fused_linear, (*operands, [32, 64], [], "", torch.bfloat16))
    opcheck(fused.linear_quantize, (*operands, [], "v0: bfloat16 = silu(y)", torch.rand(96), 64))


def test_arguments_that_do_not_fit_are_refused():
    operands = (*packed(4, 128), *packed(96, 128), None, torch.float32)
    with pytest.raises(Exception, match=r"sizes \[32, 32\] with 96 columns"):
        torch.ops.tahf4.fused_linear(*operands, [32, 32], [], "", torch.float32)
    with pytest.raises(Exception, match="one size where there is a program"):
        torch.ops.tahf4.fused_linear(*operands, [32, 64], [], "v0: float32 = silu(y)", torch.float32)
    with pytest.raises(Exception, match="result_dtype says torch.float16"):
        torch.ops.tahf4.fused_linear(*operands, [96], [], "v0: float32 = silu(y)", torch.float16)
    with pytest.raises(Exception, match="has a matmul; expected it after a product"):
        torch.ops.tahf4.fused_quantize([torch.randn(4, 8), torch.randn(8, 64)], "v0: float32 = matmul(x0, x1)")
    with pytest.raises(Exception, match="the program's result is"):
        torch.ops.tahf4.fused_quantize([torch.randn(4, 64)], "v0: float32 = mean(x0)")


@pytest.mark.parametrize("program", ["", "v0: bfloat16 = silu(x0)"])
def test_branches_read_what_is_quantized_before_its_transform(program):
    x = torch.randn(2, 5, 128).bfloat16()
    factors = [torch.randn(128, rank).bfloat16() for rank in (8, 24)]
    multiplier = torch.rand(128)
    codes, scales, *products = torch.ops.tahf4.branched_quantize([x], program, factors, multiplier, 64, 8)
    wanted = torch.nn.functional.silu(x) if program else x
    for got, right in zip((codes, scales), torch.ops.tahf4.quantize(wanted, multiplier, 64, 8), strict=True):
        assert torch.equal(got, right)
    assert [tuple(p.shape) for p in products] == [(2, 5, 8), (2, 5, 24)]
    assert all(torch.equal(p, wanted @ factor) for p, factor in zip(products, factors, strict=True))


@pytest.mark.parametrize("factor", [torch.ones(64, 8), torch.ones(128, 8).bfloat16(), torch.ones(1, 128, 8)])
def test_a_factor_that_does_not_fit_is_refused(factor):
    with pytest.raises(FormatError, match="a factor of a branch is .* expected torch.float32"):
        torch.ops.tahf4.branched_quantize([torch.randn(4, 128)], "", [factor])


@pytest.mark.parametrize("text", ["a: float32 = add(x0)", "a: float32 = neg(x0, x0)", "a: float32 = layer_norm(x0)"])
def test_a_wrong_number_of_arguments_is_refused(text):
    with pytest.raises(FormatError, match="argument"):
        Program.parse(text)


def test_an_input_that_is_not_given_is_named():
    with pytest.raises(FormatError, match="reads 'x3'"):
        Program.parse("a: float32 = neg(x3)").run({"x0": torch.ones(2)}, "x0")
