"""Attention in 8 bits: what the reference operator computes."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tahf4_compiler import ops  # noqa: F401  (defines torch.ops.tahf4)
from tahf4_compiler.errors import FormatError, GradientError
from tahf4_compiler.format import hif4, int8
from tahf4_compiler.format.transforms import hadamard_block, transform

attention, attention_lse = torch.ops.tahf4.attention, torch.ops.tahf4.attention_lse


def operands(rows=70, keys=150, channels=64, heads=2, shared=1, values=None, dtype=torch.float32, seed=0):
    """Return q, k and v as models make them: heads are split off the channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens, heads, width):
        return torch.randn(2, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)

    few = heads // shared
    return draw(rows, heads, channels), draw(keys, few, channels), draw(keys, few, values or channels)


def rounded(x, bits):
    """Return rotated queries or keys in so many bits, in float64."""
    turned = transform(x, None, hadamard_block(x.shape[-1], 1024))
    return (hif4.dequantize(hif4.quantize(turned)) if bits == 4 else int8.dequantize(*int8.quantize(turned))).double()


def by_definition(q, k, v, added=0.0, bits=8):
    """Return the attention of rounded operands in float64, 64 keys at a time; probabilities are bytes of 255."""
    left, right = rounded(q, bits), rounded(k, bits)
    values = int8.dequantize(*int8.quantize(v.transpose(-1, -2))).double()
    scores = left @ right.transpose(-1, -2) * q.shape[-1] ** -0.5 + added
    weights = []
    for part in scores.split(64, -1):
        most = part.amax(-1, keepdim=True)
        weights.append((255 * (part - most).exp()).round() * most.exp())
    weight = torch.cat(weights, -1)
    return (weight @ values[..., : k.shape[2]].transpose(-1, -2) / weight.sum(-1, keepdim=True)).to(torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("channels", [64, 96, 128, 40])
def test_it_is_what_its_definition_says(channels, keys, bits):
    q, k, v = operands(channels=channels, keys=keys, values=24)
    # A probability beside the border of two bytes may fall to either side. One step of a byte more would be 1e-2.
    assert relative(attention(q, k, v, bits=bits), by_definition(q, k, v, bits=bits)) < 1e-3
    assert torch.equal(attention_lse(q, k, v, bits=bits)[0], attention(q, k, v, bits=bits))


def test_other_bits_are_refused():
    q, k, v = operands()
    for operator in (attention, attention_lse):
        with pytest.raises(FormatError, match="queries and keys of 16 bits; expected 8 .int8. or 4 .HiF4."):
            operator(q, k, v, bits=16)


def test_in_hif4_a_unit_with_a_nan_or_an_infinity_makes_its_scores_nan():
    q, k, v = operands(channels=40)
    q[0, 0, 3, 5], k[1, 1, 7, 0] = torch.inf, torch.nan
    found = attention(q, k, v, bits=4).isnan()
    assert found[0, 0, 3].all() and found[1, 1].all() and found.sum() == 40 * (1 + 70)


@pytest.mark.parametrize("channels", [64, 96, 128, 40])
def test_it_is_near_the_attention_in_float32(channels):
    q, k, v = operands(channels=channels)
    assert relative(attention(q, k, v), sdpa(q, k, v)) < 0.02
    assert 0.02 < relative(attention(q, k, v, bits=4), sdpa(q, k, v)) < 0.15


def test_results_are_in_the_dtype_and_the_memory_format_of_sdpa():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = operands(dtype=dtype, values=24)
        got, wanted = attention(q, k, v), attention(q.float(), k.float(), v.float()).to(dtype)
        assert got.dtype == dtype and torch.equal(got, wanted)
    q, k, v = operands()
    for given in ((q, k, v), (q.contiguous(), k, v), (torch.cat([q, q], -1)[..., :64], k, v), (q, k, v[..., :24])):
        assert attention(*given).stride() == sdpa(*given).stride()


def test_a_scale_of_the_callers_own():
    q, k, v = operands()
    assert torch.equal(attention(q, k, v, scale=0.125), attention(q, k, v))
    assert relative(attention(q, k, v, scale=0.5), sdpa(q, k, v, scale=0.5)) < 0.05


def test_masks_are_added_to_the_scores():
    q, k, v = operands()
    boolean = torch.rand(2, 1, 70, 150, generator=torch.Generator().manual_seed(1)) < 0.7
    added = torch.randn(150, generator=torch.Generator().manual_seed(2))
    minus = torch.zeros(2, 1, 70, 150).masked_fill(~boolean, -torch.inf)
    assert torch.equal(attention(q, k, v, boolean), attention(q, k, v, minus))
    assert relative(attention(q, k, v, boolean), by_definition(q, k, v, minus)) < 1e-3
    assert relative(attention(q, k, v, added), by_definition(q, k, v, added)) < 1e-3
    assert relative(attention(q, k, v, boolean), sdpa(q, k, v, boolean)) < 0.02


def test_a_causal_attention_is_that_with_a_triangle_as_mask():
    q, k, v = operands(rows=150)
    triangle = torch.ones(150, 150, dtype=torch.bool).tril()
    assert torch.equal(attention(q, k, v, is_causal=True), attention(q, k, v, triangle))
    assert relative(attention(q, k, v, is_causal=True), sdpa(q, k, v, is_causal=True)) < 0.02


def test_heads_of_queries_share_a_head_of_keys():
    q, k, v = operands(heads=6, shared=3)
    apart = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    assert torch.equal(attention(q, k, v, enable_gqa=True), apart)


def test_rows_and_blocks_of_keys_are_on_their_own():
    q, k, v = operands(keys=192)
    whole = attention(q, k, v)
    assert torch.equal(attention(q[:, :, 5:9], k, v), whole[:, :, 5:9])
    assert torch.equal(attention(q[1:, 1:], k[1:, 1:], v[1:, 1:]), whole[1:, 1:])
    seen = torch.arange(192) < 128
    assert torch.equal(attention(q, k, v, seen), attention(q, k[:, :, :128], v[:, :, :128]))


def test_rows_that_see_nothing_are_zero():
    q, k, v = operands()
    mask = torch.ones(70, 150, dtype=torch.bool)
    mask[3], mask[4, :64] = False, False
    got = attention(q, k, v, mask)
    assert not got[:, :, 3].any() and got[:, :, 4].any()
    assert relative(got, sdpa(q, k, v, mask)) < 0.02
    assert not attention(q, k[:, :, :0], v[:, :, :0]).any()
    assert attention(q[:, :, :0], k, v).shape == (2, 2, 0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["min", "max"])
def test_a_row_of_the_largest_numbers_is_padding_and_not_infinity(dtype, value):
    q, k, v = (x.to(dtype) for x in operands(keys=150))
    mask = torch.zeros(q.shape[2], 150, dtype=dtype)
    mask[3] = getattr(torch.finfo(dtype), value)
    mask[5, :70] = getattr(torch.finfo(dtype), value)
    wanted = sdpa(q.float(), k.float(), v.float(), mask.float())
    assert relative(attention(q, k, v, mask).float()[:, :, 3:6], wanted[:, :, 3:6]) < 0.05


def test_a_nan_goes_where_sdpa_lets_it_go():
    q, k, v = operands()
    q[0, 0, 2, 5], k[1, 0, 149, 0], v[0, 1, 149, 7] = torch.nan, torch.nan, torch.nan
    seen = torch.arange(150) < 149
    triangle = torch.ones(70, 150, dtype=torch.bool).tril()
    for mask in (None, seen[None], torch.where(triangle, 0.0, -1e4)):
        assert torch.equal(attention(q, k, v, mask).isnan(), sdpa(q, k, v, mask).isnan())
    mask = torch.zeros(70, 150)
    mask[8, 3] = torch.inf
    assert attention(*operands(), mask)[:, :, 8].isnan().all()
    assert attention(*operands(), mask).isnan().sum() == 2 * 2 * 64


def test_large_and_small_values_stay_finite():
    q, k, v = operands()
    assert relative(attention(q * 30, k, v), by_definition(q * 30, k, v)) < 1e-3
    assert attention(q * 1e18, k * 1e18, v * 1e30).isfinite().all()
    assert relative(attention(q, k, v * 1e-30), attention(q, k, v) * 1e-30) < 1e-3


def test_what_does_not_fit_is_refused():
    q, k, v = operands(heads=4, shared=2)
    for given, words in [
        ((q, k, v), "enable_gqa"),
        ((q[0], k[0], v[0]), "four axes"),
        ((q, k.double(), v), "float64"),
        ((q, k[..., :3], v, None, False, None, True), "expected"),
        ((q, q, q, torch.ones(3, 3)), "broadcasts to"),
        ((q, q, q, torch.ones(70, 70, dtype=torch.int32)), "int32"),
        ((q, q, q, torch.ones(70, 70), True), "leave one"),
        ((*operands(channels=1025, rows=1, keys=1),), "1025"),
    ]:
        with pytest.raises(FormatError, match=words):
            attention(*given)
    with pytest.raises(GradientError, match="tahf4::attention"):
        attention(q.requires_grad_(), q, q)


def test_pytorch_finds_nothing_wrong_with_the_operator():
    q, k, v = operands(rows=5, keys=9, heads=2)
    mask = torch.rand(5, 9) < 0.5
    for given in ((q, k, v), (q, k, v, mask), (q, k, v, None, True, 0.5)):
        torch.library.opcheck(attention.default, given)
    torch.library.opcheck(attention_lse.default, (q, k, v, mask))


def merged(parts):
    """Return what ring attention makes of the results and log-sum-exps for several sets of keys."""
    out, lse = parts[0]
    for more, other in parts[1:]:
        total = torch.logaddexp(lse, other)
        out = out * (lse - total).exp()[..., None] + more * (other - total).exp()[..., None]
        lse = total
    return out, lse


def test_the_log_sum_exp_is_that_of_the_scores():
    q, k, v = operands(values=24)
    added = torch.randn(70, 150, generator=torch.Generator().manual_seed(1))
    for mask, scale in ((None, None), (added, 0.3)):
        out, lse = attention_lse(q, k, v, mask, scale=scale)
        scores = q @ k.transpose(-1, -2) * (scale or 0.125) + (0 if mask is None else mask)
        assert lse.dtype == torch.float32 and lse.shape == (2, 2, 70)
        assert (lse - scores.logsumexp(-1)).abs().max() < 0.1
        assert torch.equal(out, attention(q, k, v, mask, scale=scale))


@pytest.mark.parametrize("at", [64, 128])
def test_attentions_over_parts_of_the_keys_merge_to_that_of_all(at):
    q, k, v = operands(keys=192)
    whole, whole_lse = attention_lse(q, k, v)
    out, lse = merged([attention_lse(q, k[:, :, s], v[:, :, s]) for s in (slice(0, at), slice(at, 192))])
    # The same bytes of probabilities. Only float32 rounds otherwise, and the powers of 2 have an error of 3e-6.
    assert relative(out, whole) < 5e-6 and (lse - whole_lse).abs().max() < 5e-6


def test_rows_that_see_no_key_have_no_log_sum_exp():
    q, k, v = operands(keys=128)
    mask = torch.ones(70, 128, dtype=torch.bool)
    mask[3], mask[4, :64] = False, False
    out, lse = attention_lse(q, k, v, mask)
    assert (lse[:, :, 3] == -torch.inf).all() and lse.isfinite().sum() == lse.numel() - 4 and not out[:, :, 3].any()
    half = attention_lse(q, k[:, :, :64], v[:, :, :64], mask[:, :64])
    assert (half[1][:, :, 4] == -torch.inf).all()
    assert (attention_lse(q, k[:, :, :0], v[:, :, :0])[1] == -torch.inf).all()
    q[0, 0, 5, 0] = torch.nan
    assert attention_lse(q, k, v)[1].isnan().nonzero().tolist() == [[0, 0, 5]]
