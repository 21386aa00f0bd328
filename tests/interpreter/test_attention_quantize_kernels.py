"""An attention whose kernel quantizes its result, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from attention_parts import normal
from models import wan
from tahf4_compiler.backends.triton import attention_fused as kernels
from tahf4_compiler.backends.triton import run

import tahf4_compiler as tahf4
from tahf4_compiler.errors import FormatError
from tahf4_compiler.ops import registry


@pytest.mark.parametrize(
    ("channels", "dtype", "block", "bits", "form", "value_bits", "how"),
    [
        (128, torch.bfloat16, 64, 4, 17, 8, {}),
        (64, torch.float32, 64, 4, 1, 8, {"is_causal": True}),
        (64, torch.float32, 0, 8, 1, 16, {"attn_mask": torch.rand(40, 150) > 0.3}),
        (256, torch.float16, 128, 4, 9, 8, {}),
    ],
)
def test_it_has_the_bits_of_one_after_the_other(channels, dtype, block, bits, form, value_bits, how):
    q, k, v = normal(channels=channels, dtype=dtype, batch=2, heads=4, shared=2, rows=40)
    mask, causal = how.get("attn_mask"), how.get("is_causal", False)
    for multiplier in (torch.rand(8 * channels)[::2] + 0.5, None):
        given = (q, k, v, mask, causal, 0.2, True, 8, value_bits)
        result = torch.ops.tahf4_triton.attention(*given).transpose(1, 2).flatten(2)
        wanted = torch.ops.tahf4.quantize(result, multiplier, block, bits, form)
        found = torch.ops.tahf4_triton.attention_quantize(*given, multiplier, block, bits, form)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_with_the_roundings_of_the_reference_it_has_its_bits():
    given = (*normal(channels=64, rows=33), None, False, None, False, 4, 8, torch.rand(128) + 0.5, 64, 4, 1)
    found, calls = kernels.quantized_calls(*given, exact=True, tile=kernels.AttentionTile(32, 64, 4, 2))
    run(calls)
    wanted = torch.ops.tahf4.attention_quantize(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_values_that_are_not_finite_spoil_their_units_and_rows_without_keys_are_zero():
    q, k, v = normal(rows=8, keys=70)
    v[0, 1, 69, 3] = torch.nan
    mask = torch.ones(8, 70, dtype=torch.bool)
    mask[5] = False
    codes, scales = torch.ops.tahf4_triton.attention_quantize(q, k, v, mask, False, None, False, 8, 8, None, 64)
    back = torch.ops.tahf4.dequantize(codes, scales, 128, torch.float32)
    assert back[0, :5, 64:].isnan().all() and not back[0, :, :64].isnan().any() and not back[0, 5].any()


def test_nothing_to_do():
    q, k, v = normal()
    for given in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0])):
        rest = (None, False, None, False, 8, 8, None, 64)
        found, wanted = (each.attention_quantize(*given, *rest) for each in (torch.ops.tahf4_triton, torch.ops.tahf4))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("channels", "block", "form"), [(96, 0, 1), (64, 128, 1), (64, 64, 0)])
def test_what_its_kernel_cannot_do_is_refused(channels, block, form):
    assert kernels.quantizes(channels, block) == (form == 0)
    given = (*normal(channels=channels), None, False, None, False, 8, 8, None, block, 4, form)
    with pytest.raises(FormatError, match="expected 64 channels or a multiple of 128"):
        torch.ops.tahf4_triton.attention_quantize(*given)


@pytest.mark.parametrize("span", [1, "row"])
def test_wan_runs_it_where_each_unit_has_a_scale(span, monkeypatch):
    model, inputs = wan(num_layers=1)
    options = {"attention": "int8", "attention.min_tokens": 8, "scale_span": span}
    captured = tahf4.capture(model.requires_grad_(False), (), inputs)
    registry.kernels()
    monkeypatch.setattr(registry, "_kernels", [k for k in registry._kernels if k.name != "cpu"])
    low = tahf4.lower(captured, options=options)
    assert ("2 x tahf4.fused_attention_quantize -> triton" in low.report()) == (span == 1)
    apart = tahf4.lower(captured, options={**options, "disable_passes": ["fuse"]})
    assert torch.equal(low(**inputs).sample, apart(**inputs).sample)
