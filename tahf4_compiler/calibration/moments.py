"""Second moments of an activation: which channels are large together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..format.precision import full_precision
from ..format.transforms import hadamard_block

__all__ = ["WIDEST", "Moments", "widths"]

WIDEST = 1024
"""Channels whose moments are kept together, by default."""

_VALUES = 1 << 24  # of rows that are converted to float32 at a time


class Moments:
    """The sum of ``x x^T`` over the rows of an activation, in square blocks along the diagonal.

    Memory: ``4 * sum(width**2)`` bytes over :func:`widths`, at most ``4 * channels * widest``.

    Attributes:
        blocks: float32 ``[width, width]`` each.
    """

    def __init__(self, channels: int, widest: int, device: torch.device | str = "cpu") -> None:
        """Start empty."""
        sizes = widths(channels, widest)
        self.blocks = [torch.zeros(size, size, dtype=torch.float32, device=device) for size in sizes]

    @full_precision()
    def update(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: ``[..., C]`` of a floating-point type.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        for part in rows.split(max(1, _VALUES // rows.shape[1])):
            pieces = part.to(self.blocks[0].device, torch.float32).split([len(block) for block in self.blocks], 1)
            for block, piece in zip(self.blocks, pieces, strict=True):
                block.addmm_(piece.t(), piece)

    def merge(self, other: Moments) -> None:
        """Add what another one of the same widths saw."""
        for block, added in zip(self.blocks, other.blocks, strict=True):
            block += added.to(block.device)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors, for a file."""
        return {f"moments.{i}": block for i, block in enumerate(self.blocks)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Undo :meth:`tensors`."""
        moments = cls(0, 0)
        moments.blocks = [tensors[f"moments.{i}"] for i in range(len(tensors))]
        return moments


def widths(channels: int, widest: int) -> list[int]:
    """Return into which blocks channels are divided: equal ones that rotations of up to ``widest`` channels fit."""
    if channels <= widest or not channels:
        return [channels] if channels else []
    step = hadamard_block(channels, widest)
    count = -(-channels // (widest // step * step))
    width = -(-channels // (count * step)) * step
    return [min(width, channels - first) for first in range(0, channels, width)]
