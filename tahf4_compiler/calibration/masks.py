"""Channel masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["EXPONENTS", "SEARCHED", "channel_mask", "column_norms"]

SMALLEST = 1 / 16
"""A channel counts as at least so large as the median one. It may be small in the calibration alone."""
EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Weight exponents that the searches try, besides no mask; smaller ones are dangerous with a rotation."""
SEARCHED = tuple((percent, alpha) for alpha in EXPONENTS for percent in (None, 99.9, 100.0))
"""(percentile, weight exponent) that a search by layers tries; None stands for the root mean square."""


def channel_mask(weight: Tensor, activation_max: Tensor, weight_exponent: float) -> Tensor:
    """Return the channel mask ``weight**alpha / amax**(1 - alpha)``.

    The activation is multiplied by it, the weight divided. ViDiT-Q (arXiv 2406.02540), as Tail-Aware HiFloat4 adapts
    it, takes the largest magnitude of a weight's column. Its norm is what an error of the activation's channel costs in
    the product. alpha is the exponent of the *weight*, unlike SmoothQuant's.

    Args:
        weight: float32 ``[K]``, largest magnitude or Euclidean norm of each input channel over all rows.
        activation_max: float32 ``[K]``, its maximum, a percentile or its root mean square. The median of them stands
            for one that is 0: nothing is known about it.
        weight_exponent: alpha, 0 to 1.

    Returns:
        float32 ``[K]``, positive, with a geometric mean of 1 over the channels that a weight reads. What none reads is
        made as small as the smallest of these: it may be large, and takes the precision of its unit.
    """
    largest = _sizes(activation_max.double()).log()
    log = weight_exponent * weight.double().clamp(min=1e-8).log() - (1 - weight_exponent) * largest
    live = weight > 0
    if not bool(live.any()):
        return torch.ones_like(weight, dtype=torch.float32)
    log = log - log[live].mean()
    unread = (log + largest)[live].min() - largest
    return torch.where(live, log, unread.clamp(min=-60)).exp().to(torch.float32)


def _sizes(sizes: Tensor) -> Tensor:
    seen = sizes > 0
    typical = sizes[seen].median() if bool(seen.any()) else sizes.new_ones(())
    return torch.where(seen, sizes.clamp(min=SMALLEST * typical), typical)


def column_norms(weights: Sequence[Tensor]) -> Tensor:
    """Return the norm of each input channel over the rows of all weights, float32 ``[K]``."""
    finite = [torch.where(weight.isfinite(), weight, 0.0) for weight in (w.detach().float() for w in weights)]
    return torch.stack([torch.linalg.vector_norm(values, dim=0) for values in finite]).norm(dim=0)
