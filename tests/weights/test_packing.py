"""What a second moment says about the scales of a weight."""

from __future__ import annotations

import pytest
import torch

from tahf4_compiler.format.transforms import multipliers, transform
from tahf4_compiler.weights.packing import moment_as_quantized, pack_transformed


@pytest.mark.parametrize("block", [0, 64])
def test_a_moment_as_quantized_is_that_of_the_activation_after_mask_and_rotation(block):
    mask = torch.linspace(0.25, 4, 64)
    activation = torch.randn(1 << 14, 64) * torch.linspace(1, 9, 64)
    seen = transform(activation, multipliers(64, mask, 1 if block else None)[0], block)
    found = moment_as_quantized(activation.square().mean(0), mask, block)
    torch.testing.assert_close(found, seen.square().mean(0), rtol=0.1 if block else 1e-5, atol=0)


@pytest.mark.parametrize("search", ["", "squared", "weighted"])
def test_a_second_moment_counts_for_the_weighted_search_alone(search):
    weight, moment = torch.randn(64, 64), torch.linspace(1, 900, 64)
    plain = pack_transformed(weight, None, None, 0, search)
    found = pack_transformed(weight, None, None, 0, search, moment)
    same = all(torch.equal(a, b) for a, b in zip(found[:2], plain[:2], strict=True))
    assert same == (search != "weighted")
