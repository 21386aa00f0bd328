"""A branch of low rank beside a 4-bit product: ``y = W4A4(x) + (x A) B``.

The weight that is quantized is what is left, ``W - (A B)^T``. It is smaller, and with it the error of its rounding and
what it makes of the error of the activation. The branch reads the activation before that is quantized.

Sources: SVDQuant (Li et al., arXiv 2411.05007), which takes the largest singular values of the weight after channels
were smoothed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import full_precision

__all__ = ["LowRank", "leading", "rank_of", "remainder"]

STEP = 8
"""Ranks are multiples of it."""

_ITERATIONS, _BESIDE = 8, 8


class LowRank(NamedTuple):
    """The two factors of a branch.

    Attributes:
        a: ``[K, r]``.
        b: ``[r, N]``.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a.shape[1]


def rank_of(shape: tuple[int, int], percent: float) -> int:
    """Return the rank that is a share of the width of a weight: of its smaller side, in multiples of 8, at least 8.

    0 where that is no less than the smaller side.
    """
    width = min(shape)
    rank = max(STEP, round(width * percent / 100 / STEP) * STEP)
    return rank if rank < width else 0


def leading(weight: Tensor, mask: Tensor | None, rank: int) -> LowRank:
    """Return the part of a weight of largest singular values, as its channels are masked.

    A rotation does not change singular values. They are found by subspace iteration from a fixed start, which costs
    products with ``rank + 8`` vectors.

    Args:
        weight: ``[N, K]`` of a floating-point type.
        mask: float32 ``[K]`` that the activation is multiplied by, or None.
        rank: of the result, at most the smaller side.

    Returns:
        Factors in bfloat16 on the weight's device, ``(A B)^T`` of ``[N, K]``. Zeros where the weight is not finite.
    """
    values = weight.detach().to(torch.float32)
    if not bool(values.isfinite().all()):
        values = torch.zeros_like(values)  # NaN stays in the weight that is packed
    factors = torch.ones(1, dtype=torch.float32, device=values.device) if mask is None else mask.to(values.device)
    masked = values / factors
    wide = min(rank + _BESIDE, *masked.shape)
    draws = torch.Generator("cpu").manual_seed(0)  # the same on every device
    start = torch.randn(masked.shape[1], wide, generator=draws, dtype=torch.float32, device="cpu")
    basis = start.to(masked.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(masked.t() @ torch.linalg.qr(masked @ basis).Q).Q
    u, s, v = torch.linalg.svd(masked @ basis, full_matrices=False)
    root = s[:rank].sqrt()
    a = (basis @ v[:rank].t()) * root * factors[:, None]
    b = (u[:, :rank] * root).t()
    return LowRank(a.to(torch.bfloat16).contiguous(), b.to(torch.bfloat16).contiguous())


@full_precision()
def remainder(weight: Tensor, low_rank: LowRank | None) -> Tensor:
    """Return what a branch leaves of a weight: float32 ``[N, K]``, or the weight itself without a branch."""
    if low_rank is None:
        return weight
    a, b = (factor.to(weight.device, torch.float32) for factor in low_rank)
    return weight.detach().to(torch.float32) - (a @ b).t()
