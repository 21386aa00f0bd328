"""Correctness, on a device, of the kernels that round units of reconstructed weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...format import reconstruct

__all__ = ["check_rounding"]


def check_rounding(device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare the kernels with the references on the same device.

    Args:
        device: that Triton serves.

    Yields:
        One record for each comparison: ``name``, ``ok``, ``detail``.
    """
    from ...backends import triton

    generator = torch.Generator(device).manual_seed(0)
    rows = 500 if device.type == "cuda" else 17

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    values, x = random(rows, 64), random(300, 64)
    steps = 2.0 ** torch.randint(-4, 0, (rows, 64), generator=generator, device=device)
    moments = x.t() @ x / len(x) + 0.5
    factor = reconstruct.damped_factor(moments)
    found = triton.round_unit(values.clone(), steps, factor)
    wanted = reconstruct.round_unit(values.clone(), steps, factor)
    same = all(map(torch.equal, found, wanted))
    yield {"name": "unit of a reconstructed weight", "ok": same, "detail": "bit for bit"}
    rounded = (values / steps).round_().clamp_(-7, 7) * steps
    slopes, other = (rounded - values) @ moments, rounded.clone()
    triton.descend_unit(rounded, slopes.clone(), steps, moments)
    reconstruct.descend_unit(other, slopes.clone(), steps, moments)
    yield {"name": "unit rounded again", "ok": torch.equal(rounded, other), "detail": "bit for bit"}
