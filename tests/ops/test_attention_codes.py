"""Attention over keys and values that were quantized in parts, as ranks hold them."""

from __future__ import annotations

import pytest
import torch
from attention_parts import quantized

from tahf4_compiler.errors import FormatError, GradientError
from tahf4_compiler.ops.attention_codes import value_codes, value_maxima

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


def test_a_part_of_the_values_must_be_one_of_its_tiles():
    value = operands(70)[2].transpose(1, 2)
    most = value_maxima(value, 58, 2)
    for other, first, tiles, why in (
        (value[0], 0, 2, r"\(70, 3, 64\); expected \[B, tokens, H, Ev\]"),
        (value.double(), 0, 2, "float64 .*; expected"),
        (value, 59, 2, "70 tokens from token 59 on, and 2 tiles of 64"),
        (value, -1, 2, "from token -1 on"),
        (value, 0, 1, "1 tiles"),
    ):
        with pytest.raises(FormatError, match=f"value_maxima got .*{why}"):
            value_maxima(other, first, tiles)
        if tiles == 2 and other.dim() == 4:
            with pytest.raises(FormatError, match=f"value_codes got .*{why}"):
                value_codes(other, first, most)
    for wrong in (most.double(), most[0], most[:1], most[..., :1], most[:, :, :1]):
        with pytest.raises(FormatError, match="and maxima .*; expected float32"):
            value_codes(value, 58, wrong)
    with pytest.raises(FormatError, match="and 1 tiles"):
        value_codes(value, 58, most[:, :1])


def test_a_compiled_graph_rounds_values_of_any_number_of_tokens():
    def rounded(value, first):
        return value_codes(value, first, value_maxima(value, first, 4))

    compiled = torch.compile(rounded, backend="eager", fullgraph=True, dynamic=True)
    value = operands(150)[2].transpose(1, 2)
    for tokens, first in ((150, 64), (70, 70)):
        got, wanted = (run(value[:, :tokens], first) for run in (compiled, rounded))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
