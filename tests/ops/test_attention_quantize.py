"""An attention in 8 bits with the quantization of its result, as an operator."""

from __future__ import annotations

import pytest
import torch
from attention_parts import normal

from tahf4_compiler import ops  # noqa: F401  (defines torch.ops.tahf4)
from tahf4_compiler.errors import FormatError

operator = torch.ops.tahf4.attention_quantize


@pytest.mark.parametrize(("bits", "form"), [(4, 1), (4, 0), (4, 17), (8, 1)])
@pytest.mark.parametrize(("channels", "value_bits"), [(64, 8), (40, 16)])
def test_it_is_one_after_the_other(bits, form, channels, value_bits):
    given = normal(channels=channels, batch=2, heads=4, shared=2, dtype=torch.bfloat16)
    multiplier = torch.rand(4 * channels) + 0.5
    mask = torch.rand(40, 150) > 0.3
    result = torch.ops.tahf4.attention(*given, mask, False, 0.2, True, 4, value_bits).transpose(1, 2).flatten(2)
    wanted = torch.ops.tahf4.quantize(result, multiplier, 0, bits, form)
    found = operator(*given, mask, False, 0.2, True, 4, value_bits, multiplier, 0, bits, form)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_it_is_an_operator():
    given = (*normal(rows=3, keys=9), None, True, None, False, 8, 8, torch.ones(128), 64)
    torch.library.opcheck(operator.default, given)


def test_behind_programs_it_is_one_after_the_other_too():
    q, k, v = normal(rows=5, keys=9, batch=2)
    inputs = [[x.transpose(1, 2).flatten(2), torch.rand(128) + 0.5] for x in (q, k)]
    text = "v0: float32 = rms_norm(x0, x1, 1e-06)"
    given = (inputs[0], text, inputs[1], text, v, 2, None, True, None, False, 8, 16)
    how = (torch.rand(128) + 0.5, 64, 8)
    result = torch.ops.tahf4.fused_attention(*given).transpose(1, 2).flatten(2)
    behind = torch.ops.tahf4.fused_attention_quantize
    wanted = torch.ops.tahf4.quantize(result, *how)
    assert all(torch.equal(a, b) for a, b in zip(behind(*given, *how), wanted, strict=True))
    torch.library.opcheck(behind.default, (*given, *how))
    with pytest.raises(FormatError, match="bits"):
        behind(*given, None, 0, 16)


def test_what_does_not_fit_is_refused():
    given = (*normal(rows=3, keys=9), None, False, None, False)
    for rest, why in (
        ((8, 8, None, 48), "hadamard_block"),
        ((8, 8, torch.ones(64), 0), "multiplier"),
        ((8, 8, None, 0, 16), "bits"),
        ((8, 4, None, 0), "values of 4 bits"),
        ((8, 8, None, 0, 4, 3), "span"),
    ):
        with pytest.raises(FormatError, match=why):
            operator(*given, *rest)
