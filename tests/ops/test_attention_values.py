"""Attention in 8 bits with values and probabilities of 16: what the reference operator computes."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_parts import normal
from helpers import relative
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tahf4_compiler import ops  # noqa: F401  (defines torch.ops.tahf4)
from tahf4_compiler.errors import FormatError
from tahf4_compiler.format import hif4, int8
from tahf4_compiler.format.transforms import hadamard_block, transform

attention = torch.ops.tahf4.attention
operands = functools.partial(normal, rows=70, batch=2)
BF16 = torch.finfo(torch.bfloat16).eps / 2


def rounded(x, bits):
    """Return rotated queries or keys with one scale for a row, in float64."""
    turned = transform(x, None, hadamard_block(x.shape[-1], 1024))
    if bits == 4:
        return hif4.dequantize(hif4.quantize(turned, span="row")).double()
    return int8.dequantize(*int8.quantize(turned, span=0)).double()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("channels", "keys"), [(128, 1), (96, 64), (40, 65), (64, 150)])
def test_it_is_that_of_rounded_queries_and_keys(channels, keys, bits):
    q, k, v = operands(channels=channels, keys=keys, values=24)
    wanted = sdpa(rounded(q, bits), rounded(k, bits), v.bfloat16().double(), scale=channels**-0.5)
    # Probabilities are rounded to bfloat16, each by itself.
    assert relative(attention(q, k, v, bits=bits, value_bits=16), wanted.float()) < BF16


def test_a_row_has_one_scale():
    q, k, v = operands(channels=128)
    q[..., :64] *= 1e-3  # after the rotation both units would be alike, so it is left out here
    codes, scales = int8.quantize(q, span=0)
    assert torch.equal(scales[..., 0], scales[..., 1]) and codes[..., :64].abs().max() <= 1
    wanted = sdpa(rounded(q, 8), rounded(k, 8), v.bfloat16().double(), scale=128**-0.5).float()
    assert relative(attention(q, k, v, value_bits=16), wanted) < BF16


@pytest.mark.parametrize("bits", [8, 4])
def test_channels_that_no_rotation_mixes_have_scales_of_their_own(bits):
    q, k, v = operands(channels=192)
    q[..., 128:] *= 16
    k[..., 128:] /= 16
    wanted = sdpa(q, k, v)
    fine, coarse = (relative(attention(q, k, v, bits=bits, value_bits=b), wanted) for b in (16, 8))
    assert fine < 1.02 * coarse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_nearer_to_sdpa_than_values_of_8_bits(dtype):
    given = operands(channels=128, dtype=dtype)
    wanted = sdpa(*(x.float() for x in given))
    fine, coarse = (attention(*given, value_bits=bits) for bits in (16, 8))
    assert fine.dtype == dtype and fine.stride() == coarse.stride()
    assert relative(fine.float(), wanted) < 0.9 * relative(coarse.float(), wanted)


def test_a_sink_hides_no_other_key():
    q, k, v = operands(keys=1024, rows=20)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    q = 0.3 * q + 8 * direction
    k = 0.3 * k
    k[:, :, 0], v[:, :, 0] = 8 * direction, 0  # takes nearly all of a row, and has nothing
    wanted = sdpa(q, k, v)
    fine, coarse = (relative(attention(q, k, v, value_bits=bits), wanted) for bits in (16, 8))
    assert fine < 0.1 * coarse


def test_masks_scales_and_shared_heads():
    q, k, v = operands(rows=5, keys=130, heads=4, shared=2)
    added = torch.randn(2, 4, 5, 130, generator=torch.Generator().manual_seed(1))
    left, right, values = rounded(q, 8), rounded(k, 8), v.bfloat16().double()
    for mask, scale, causal in ((added, None, False), (added[:, :1] > 0, -2.0, False), (None, 3.0, True)):
        double = mask.double() if mask is not None and mask.is_floating_point() else mask
        how = 64**-0.5 if scale is None else scale
        wanted = sdpa(left, right, values, double, is_causal=causal, scale=how, enable_gqa=True)
        found = attention(q, k, v, mask, causal, scale, True, 8, 16)
        assert relative(found, wanted.float()) < 2 * BF16
    found = attention(q, k, v, None, False, 0.0, True, 8, 16)  # the mean of all values
    assert relative(found, v.repeat_interleave(2, 1).mean(2, keepdim=True).expand_as(found)) < 2 * BF16


def test_what_is_not_finite_goes_where_its_key_is_seen():
    q, k, v = operands(rows=40)
    q[0, 0, 2, 5], k[0, 1, 149, 0], v[1, 1, 149, 7] = torch.nan, torch.inf, torch.nan
    mask = torch.zeros(40, 150)
    mask[8, 3], mask[9, 70], mask[10], mask[11, :70] = torch.inf, torch.nan, -torch.inf, -torch.inf
    found = attention(q, k, v, mask, value_bits=16)
    # Where a key has an infinity, its channel of q decides whether SDPA sees it; here all of its scores are NaN.
    wanted = sdpa(q, k.nan_to_num(posinf=torch.nan), v, mask)
    wanted[1, 1, 10] = 0  # no key is seen, and so none of the values
    assert torch.equal(found.isnan(), wanted.isnan()) and found.isnan()[1, 1].sum() == 64 * 2 + 37
    causal = attention(q[1:], k[1:], v[1:], None, True, value_bits=16)
    assert not causal.isnan().any()  # rows up to 39 see none of the 64 keys beside key 149
    assert not found[1, :, 10].any()
    assert not attention(q, k[:, :, :0], v[:, :, :0], value_bits=16).any()


def test_rows_do_not_depend_on_each_other():
    q, k, v = operands()
    assert torch.equal(attention(q[:, :, 30:41], k, v, value_bits=16), attention(q, k, v, value_bits=16)[:, :, 30:41])


def test_other_bits_are_refused():
    with pytest.raises(FormatError, match="values of 4 bits; expected 8, or 16"):
        attention(*operands(), value_bits=4)


def test_it_is_an_operator():
    torch.library.opcheck(attention.default, (*operands(rows=3, keys=70), None, True), {"value_bits": 16})


def test_the_cpu_has_no_kernel_for_it_and_runs_the_reference():
    given = operands(rows=9)
    assert torch.equal(torch.ops.tahf4_cpu.attention(*given, value_bits=16), attention(*given, value_bits=16))
