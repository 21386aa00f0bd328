"""Attention over keys and values that were quantized in parts, as ranks hold them."""

from __future__ import annotations

import pytest
import torch

from tahf4_compiler.errors import FormatError, GradientError
from tahf4_compiler.ops.attention_codes import key_codes, value_codes, value_maxima

whole, of_codes = torch.ops.tahf4.attention, torch.ops.tahf4.attention_of_codes


def operands(tokens, channels=64, values=None, dtype=torch.float32):
    """Return q, k and v with tokens before heads."""
    generator = torch.Generator().manual_seed(0)
    widths = channels, channels, values or channels
    return [torch.randn(2, tokens, 3, width, generator=generator).to(dtype) for width in widths]


def gathered(k, v, bits, parts):
    """Return codes and scales of keys and values that some ranks quantize, each its part of the tokens."""
    count = k.shape[1] // parts
    firsts, tiles = range(0, k.shape[1], count), -(-k.shape[1] // 64)
    keys = [key_codes(part, bits) for part in k.split(count, 1)]
    most = torch.stack([value_maxima(part, i, tiles) for i, part in zip(firsts, v.split(count, 1), strict=True)]).amax(0)
    values = [value_codes(part, i, most) for i, part in zip(firsts, v.split(count, 1), strict=True)]
    found = torch.cat([c for c, _ in keys], 1), torch.cat([c for c, _ in values], 1)
    found += torch.cat([s for _, s in keys], 1), values[0][1]
    return [x.transpose(1, 2) for x in found]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "parts", "channels", "values"), [(192, 3, 64, 64), (150, 2, 96, 24), (150, 3, 40, 130), (5, 5, 128, 1)]
)
def test_it_has_the_bits_of_the_attention_of_all_tokens(bits, dtype, tokens, parts, channels, values):
    q, k, v = operands(tokens, channels, values, dtype)
    wanted = whole(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3, bits=bits)
    got = of_codes(q.transpose(1, 2), *gathered(k, v, bits, parts), 0.3)
    assert torch.equal(got, wanted) and got.stride() == wanted.stride()


def test_what_is_not_finite_goes_where_it_goes_in_the_attention_of_all_tokens():
    q, k, v = operands(150)
    k[0, 100, 1, 5], v[0, 10, 0, 3], v[1, 149, 2, 0] = torch.nan, -torch.inf, torch.nan
    wanted = whole(*(x.transpose(1, 2) for x in (q, k, v)))
    got = of_codes(q.transpose(1, 2), *gathered(k, v, 8, 2))
    assert wanted.isnan().any() and torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_what_does_not_fit_is_refused():
    q, k, v = operands(70)
    given = [q.transpose(1, 2), *gathered(k, v, 8, 1)]
    changed = {0: given[0].double(), 1: given[1].view(torch.uint8), 2: given[2][:, :, :69], 3: given[3][..., :0]}
    changed |= {4: given[4][:, :, :1]}
    for place, other in changed.items():
        with pytest.raises(FormatError, match="attention_of_codes got .*; expected a floating query"):
            of_codes(*given[:place], other, *given[place + 1 :])
    with pytest.raises(GradientError, match="no_grad"):
        of_codes(given[0].requires_grad_(), *given[1:])
