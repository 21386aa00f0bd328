"""Attention over keys and values that were quantized in parts, as ranks hold them."""

from __future__ import annotations

import pytest
import torch
from attention_parts import quantized

from tahf4_compiler.errors import FormatError, GradientError

whole, of_codes = torch.ops.tahf4.attention, torch.ops.tahf4.attention_of_codes


def operands(tokens, channels=64, values=None, dtype=torch.float32):
    """Return q, k and v as models make them: heads are split off the channels."""
    generator = torch.Generator().manual_seed(0)
    widths = channels, channels, values or channels
    return [torch.randn(2, tokens, 3, width, generator=generator).to(dtype).transpose(1, 2) for width in widths]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "parts", "channels", "values"), [(192, 3, 64, 64), (150, 2, 96, 24), (150, 3, 40, 130), (5, 5, 128, 1)]
)
def test_it_has_the_bits_of_the_attention_of_all_tokens(bits, dtype, tokens, parts, channels, values):
    q, k, v = operands(tokens, channels, values, dtype)
    wanted = whole(q, k, v, scale=0.3, bits=bits)
    got = of_codes(q, *quantized(k, v, bits, parts), 0.3)
    assert torch.equal(got, wanted) and got.stride() == wanted.stride()


def test_what_is_not_finite_goes_where_it_goes_in_the_attention_of_all_tokens():
    q, k, v = operands(150)
    k[0, 1, 100, 5], v[0, 0, 10, 3], v[1, 2, 149, 0] = torch.nan, -torch.inf, torch.nan
    wanted = whole(q, k, v)
    got = of_codes(q, *quantized(k, v, 8, 2))
    assert wanted.isnan().any() and torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_what_does_not_fit_is_refused():
    q, k, v = operands(70)
    given = [q, *quantized(k, v, 8)]
    changed = {0: given[0].double(), 1: given[1].view(torch.uint8), 2: given[2][:, :, :69], 3: given[3][..., :0]}
    changed |= {4: given[4][:, :, :1]}
    for place, other in changed.items():
        with pytest.raises(FormatError, match="attention_of_codes got .*; expected a floating query"):
            of_codes(*given[:place], other, *given[place + 1 :])
    with pytest.raises(GradientError, match="no_grad"):
        of_codes(given[0].requires_grad_(), *given[1:])
