"""The branch of low rank, against the singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch

from tahf4_compiler.format.low_rank import leading, rank_of, remainder


def weight(n=96, k=160, generator=0):
    """A weight whose singular values fall slowly, as those of trained networks do."""
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(generator))
    u, s, v = torch.linalg.svd(values, full_matrices=False)
    return u * s * torch.linspace(1, 0.1, len(s)) @ v


@pytest.mark.parametrize("masked", [False, True])
def test_the_branch_is_the_largest_singular_values_of_the_masked_weight(masked):
    values = weight()
    mask = torch.rand(160, generator=torch.Generator().manual_seed(1)) + 0.2 if masked else None
    branch = leading(values, mask, 16)
    assert branch.a.shape == (160, 16) and branch.b.shape == (16, 96) and branch.rank == 16
    assert branch.a.dtype == branch.b.dtype == torch.bfloat16
    factors = mask if mask is not None else torch.ones(160)
    left = (remainder(values, branch) / factors).double().norm()
    singular = torch.linalg.svdvals((values / factors).double())
    best = singular[16:].square().sum().sqrt()
    assert 1 - 1e-6 < float(left / best) < 1.01


def test_what_is_left_and_the_branch_are_the_weight():
    values = weight().to(torch.bfloat16)
    branch = leading(values, None, 8)
    whole = remainder(values, branch).double() + (branch.a.double() @ branch.b.double()).t()
    assert float((whole - values.double()).abs().max()) < 1e-5
    assert remainder(values, None) is values


def test_a_weight_with_nan_has_a_branch_of_zeros_and_keeps_its_nan():
    values = weight()
    values[3, 5] = torch.nan
    branch = leading(values, None, 8)
    assert not branch.a.any() and not branch.b.any()
    assert torch.equal(remainder(values, branch).isnan(), values.isnan())


def test_equal_weights_have_equal_branches_whatever_the_random_state():
    torch.manual_seed(1)
    first = leading(weight(), None, 8)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, leading(weight(), None, 8)))


@pytest.mark.parametrize(
    "shape, percent, rank", [((5120, 5120), 0.625, 32), ((13824, 5120), 1, 48), ((64, 512), 1, 8), ((8, 512), 50, 0)]
)
def test_ranks_are_multiples_of_eight(shape, percent, rank):
    assert rank_of(shape, percent) == rank
