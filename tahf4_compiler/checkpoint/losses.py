"""What weights lose that another tool held in 4 bits, when they become HiF4."""

from __future__ import annotations

import math
import threading

from torch import Tensor

from ..format import hif4
from ..format.transforms import multipliers, transform
from ..packed.transform import Transform

__all__ = ["Losses"]


class Losses:
    """Sums of squares over weights, by module path; threads may add to it."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._sums: dict[str, tuple[float, float]] = {}

    def look(self, path: str, weight: Tensor, packed: hif4.Packed, how: Transform) -> None:
        """Add rows of a weight.

        Args:
            path: of its linear.
            weight: ``[rows, K]``, what is packed.
            packed: these rows.
            how: they were transformed. The error is taken there: a rotation keeps it, and a mask weighs channels.
        """
        inverse = multipliers(weight.shape[1], how.mask, how.seed)[1]
        moved = transform(weight, inverse, how.hadamard_block).float()
        held = hif4.dequantize(hif4.Packed(packed.codes, packed.scales, moved.shape[1]))
        error, norm = float((held - moved).double().square().sum()), float(moved.double().square().sum())
        with self._lock:
            before = self._sums.get(path, (0.0, 0.0))
            self._sums[path] = before[0] + error, before[1] + norm

    def relative(self) -> dict[str, float]:
        """Return the relative error of each weight."""
        return {path: math.sqrt(error / norm) if norm else 0.0 for path, (error, norm) in sorted(self._sums.items())}
