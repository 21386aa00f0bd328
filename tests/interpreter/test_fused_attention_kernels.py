"""Norms, rotary embedding and quantization of queries and keys in one kernel, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from tahf4_compiler.backends.triton import attention_fused as kernels
from tahf4_compiler.backends.triton import quantize, run

import tahf4_compiler as tahf4
from tahf4_compiler.format import int8
from tahf4_compiler.ops import transform
from tahf4_compiler.ops.program import Program

reference = torch.ops.tahf4.fused_attention
SMALL = kernels.AttentionTile(32, 64, 4, 2)
ROTARY = "v0: {0} = rotary(x0, x2, x3)"
NORM = "v0: {0} = rms_norm(x0, x1, 1e-06)"
BOTH = NORM + "\nv1: {0} = rotary(v0, x2, x3)"


def side(tokens, heads, width, seed, dtype=torch.bfloat16, batch=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads * width, generator=generator).to(dtype)
    angle = torch.randn(1, tokens, width, generator=generator)[..., ::2]  # as Wan has them
    return [x, torch.rand(heads * width, generator=generator).to(dtype), angle.cos(), angle.sin()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("program", [ROTARY, BOTH])
@pytest.mark.parametrize(("heads", "width", "span"), [(3, 64, 1), (2, 128, 2), (2, 256, 4), (2, 128, 1)])
def test_codes_are_those_of_the_program_run_by_pytorch(dtype, program, heads, width, span):
    given, text = side(9, heads, width, 0, dtype), program.format(str(dtype).removeprefix("torch."))
    (codes, scales), calls = quantize.call(given, text, None, width, 8, span)
    run(calls)
    x = Program.parse(text).run({f"x{i}": value for i, value in enumerate(given)}, "x0")
    apart = transform(x, None, width).unflatten(-1, (heads, -1))
    wanted, wanted_scales = int8.quantize(apart, span=0 if span > 1 else 1)
    torch.testing.assert_close(scales, wanted_scales.flatten(-2), rtol=1e-6 if program is BOTH else 0, atol=0)
    assert torch.equal(codes, wanted.flatten(-2))


@pytest.mark.parametrize(
    ("width", "heads", "shared", "bits", "value_bits", "scale"),
    [
        (64, 4, 2, 8, 8, None), (128, 2, 1, 8, 8, 0.3), (128, 2, 1, 8, 16, -0.3), (256, 2, 1, 8, 16, None),
        (128, 2, 2, 4, 16, None), (64, 3, 1, 4, 8, None), (128, 1, 1, 8, 16, None),
    ],
)  # fmt: skip
def test_it_is_the_reference(width, heads, shared, bits, value_bits, scale):
    q, k = side(33, heads, width, 0), side(70, heads // shared, width, 1)
    v = torch.randn(2, 70, heads // shared, width, generator=torch.Generator().manual_seed(2))
    texts = BOTH.format("bfloat16"), NORM.format("bfloat16")
    how = (None, False, scale, shared > 1, bits, value_bits)
    given = (q, texts[0], k[:2], texts[1], v.bfloat16().transpose(1, 2), heads, *how)
    wanted = reference(*given)
    got, calls = kernels.calls_of_programs(*given, tile=SMALL, exact=True)
    run(calls)
    assert got.stride() == wanted.stride()
    assert [call.name for call in calls].count("kernel") == (2 if bits == 8 else 4)
    difference = (got.double() - wanted.double()).norm() / wanted.double().norm()
    # Values in 16 bits: sums of another order.
    assert torch.equal(got, wanted) if value_bits == 8 else difference < torch.finfo(torch.bfloat16).eps / 2


def test_masks_many_rows_and_no_rows():
    q, k = side(40, 2, 64, 0), side(150, 2, 64, 1)
    v = torch.randn(2, 150, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16().transpose(1, 2)
    mask = torch.randn(2, 1, 40, 150, generator=torch.Generator().manual_seed(3)) > 0
    text = BOTH.format("bfloat16")
    for how in ((mask,), (None, True), (mask[:, :, :1],)):
        got, calls = kernels.calls_of_programs(q, text, k, text, v, 2, *how, exact=True)
        run(calls)
        assert torch.equal(got, reference(q, text, k, text, v, 2, *how))
    usual = torch.ops.tahf4_triton.fused_attention(q, text, k, text, v, 2)
    wanted = reference(q, text, k, text, v, 2)
    assert (usual.double() - wanted.double()).norm() / wanted.double().norm() < 1e-2
    none = [q[0][:, :0], q[1], q[2][:, :0], q[3][:, :0]]
    assert torch.ops.tahf4_triton.fused_attention(none, text, k, text, v, 2).shape == (2, 2, 0, 64)


def test_other_widths_and_orders_are_refused():
    q, v = side(9, 2, 96, 0), torch.zeros(2, 2, 9, 96, dtype=torch.bfloat16)
    with pytest.raises(tahf4.FormatError, match="heads of 96 channels; expected one of"):
        kernels.calls_of_programs(q[:1], "", q[:1], "", v, 2)
    before = "v0: bfloat16 = rotary(x0, x2, x3)\nv1: bfloat16 = rms_norm(v0, x1, 1e-06)"
    with pytest.raises(tahf4.FormatError, match="a rotary embedding comes before 'v1"):
        quantize.call(side(9, 2, 64, 0), before, None, 64, 8)


@pytest.mark.parametrize("value_bits", [8, 16])
def test_with_the_quantization_of_the_result_it_has_the_bits_of_one_after_the_other(value_bits):
    text, v = BOTH.format("bfloat16"), torch.randn(2, 2, 70, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    given = (side(33, 2, 128, 0), text, side(70, 2, 128, 1), text, v, 2, None, False, None, False, 8, value_bits)
    result = torch.ops.tahf4_triton.fused_attention(*given).transpose(1, 2).flatten(2)
    how = (torch.rand(128) + 0.5, 64, 4, 17)
    found = torch.ops.tahf4_triton.fused_attention_quantize(*given, *how)
    assert all(torch.equal(a, b) for a, b in zip(found, torch.ops.tahf4.quantize(result, *how), strict=True))
