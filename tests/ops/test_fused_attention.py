"""Attention of the results of programs: its arguments, its shape and its dtype; norms and rotary embeddings."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import tahf4_compiler as tahf4
from tahf4_compiler.ops.fused import fused_quantize
from tahf4_compiler.ops.program import Program

fused = torch.ops.tahf4.fused_attention
NORM = "v0: {0} = rms_norm(x0, x1, 1e-06)"
BOTH = NORM + "\nv1: {0} = rotary(v0, x2, x3)"


def side(tokens, heads, width, seed, dtype=torch.bfloat16, batch=2):
    """Return what a projection gives, the weight of its norm, and cosines and sines for each token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads * width, generator=generator).to(dtype)
    angle = torch.randn(1, tokens, width // 2, generator=generator)
    return [x, torch.rand(heads * width, generator=generator).to(dtype), angle.cos(), angle.sin()]


def values(tokens, heads, width, dtype=torch.bfloat16, batch=2):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)


def turned(x, cos, sin, heads):
    """Return a rotary embedding by complex numbers, in float64."""
    pairs = x.double().unflatten(-1, (heads, -1, 2))
    found = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())[:, :, None]
    return torch.view_as_real(found).flatten(-3)


def test_a_rotary_embedding_is_a_product_of_complex_numbers():
    x, _, cos, sin = side(5, 3, 64, 0, torch.float32)
    found = Program.parse("v0: float32 = rotary(x0, x1, x2)").run({"x0": x, "x1": cos, "x2": sin}, "x0")
    assert found.shape == x.shape
    torch.testing.assert_close(found.double(), turned(x, cos, sin, 3), rtol=1e-5, atol=1e-6)


def test_it_computes_in_float32_and_rounds_once():
    x, _, cos, sin = side(5, 3, 64, 0)
    found = Program.parse("v0: bfloat16 = rotary(x0, x1, x2)").run({"x0": x, "x1": cos, "x2": sin}, "x0")
    assert torch.equal(found, turned(x, cos, sin, 3).to(torch.bfloat16))


@pytest.mark.parametrize(("bits", "value_bits"), [(8, 8), (8, 16), (4, 8)])
def test_it_is_attention_of_norms_that_are_turned(bits, value_bits):
    q, k, v = side(9, 4, 64, 0), side(70, 2, 64, 1), values(70, 2, 24)
    how = (None, False, 0.3, True, bits, value_bits)
    text = BOTH.format("bfloat16")
    got = fused(q, text, k, text, v, 4, *how)
    rounded = []
    for (x, weight, cos, sin), heads in ((q, 4), (k, 2)):
        norm = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
        rounded.append(turned(norm, cos, sin, heads).to(x.dtype).unflatten(2, (heads, -1)).transpose(1, 2))
    wanted = torch.ops.tahf4.attention(*rounded, v, *how)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("channels", [64, 24])
def test_the_operator_passes_pytorchs_own_checks(channels):
    q, k, v = side(9, 2, 64, 0), side(70, 2, 64, 1), values(70, 2, channels)
    opcheck(fused.default, (q, BOTH.format("bfloat16"), k[:2], NORM.format("bfloat16"), v, 2))
    got = fused(q[:1], "", k[:1], "", v, 2)
    assert got.transpose(1, 2).is_contiguous() == (channels == 64)  # as attention of these views


def test_arguments_that_do_not_fit_are_refused():
    q, k, v = side(9, 3, 64, 0), side(70, 3, 64, 1), values(70, 3, 64)
    for given, match in (
        ((q[:1], "", k[:1], "", v, 5), r"fused_attention got \(2, 9, 192\) and 5 heads; expected \[B, S, H \* E\]"),
        ((q[:1], "", k[:1], "", v, 6), "expected .B, H, L, E.*"),
        ((q[:1], "v0: float32 = to(x0)", k[:1], "", v, 3), "expected one dtype"),
        ((q[:1], "v0: bfloat16 = rotary(x0, x0, x0)", k[:1], "", v, 3), "expected two neighbouring inputs"),
    ):
        with pytest.raises(tahf4.FormatError, match=match):
            fused(*given)


def test_linears_have_no_rotary_embedding():
    x, _, cos, sin = side(9, 2, 64, 0)
    text = "v0: bfloat16 = rotary({}, x{}, x{})"
    with pytest.raises(tahf4.FormatError, match="a program of a linear has a rotary embedding"):
        fused_quantize([x, cos, sin], text.format("x0", 1, 2))
    codes, scales = torch.ops.tahf4.quantize(x)
    with pytest.raises(tahf4.FormatError, match="a program of a linear has a rotary embedding"):
        operands = (codes, scales, codes[0], scales[0], None, torch.bfloat16)
        torch.ops.tahf4.fused_linear(*operands, [9], [cos, sin], text.format("y", 0, 1), torch.bfloat16)
