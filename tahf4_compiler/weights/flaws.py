"""Weights that HiF4 does not hold: NaN, infinities, and magnitudes beyond its range."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import hif4
from ..format.transforms import multipliers, transform

__all__ = ["Flaws"]

log = logging.getLogger(__name__)

_ROW_CHUNK = 1 << 22  # values looked at at a time, as in packing
_LOST = 1e-6
"""Share of a weight's energy that must be lost to zeros to be told: rows that hold next to nothing may become zeros."""


@dataclass
class _Found:
    values: int = 0
    nan: bool = False
    above: int = 0
    below: int = 0
    energy: float = 0.0
    lost: float = 0.0


class Flaws:
    """What packing could not hold of a model's weights, told once the model is done."""

    def __init__(self) -> None:
        """Start with none."""
        self._found: dict[str, _Found] = {}

    def look(
        self, path: str, weight: Tensor, packed: hif4.Packed, mask: Tensor | None, seed: int | None, block: int
    ) -> None:
        """Compare a weight, or some rows of it, with its packed form; what is in range costs a look at the scales.

        Args:
            path: of its linear.
            weight: ``[N, K]``.
            packed: of the weight.
            mask: that it was packed with, and seed and block, as for ``pack_transformed``.
            seed: of the signs.
            block: width of the rotation.
        """
        if packed.scales.device.type == "meta" or weight.device.type == "meta":
            return
        nan, largest, smallest = hif4.extremes(packed.scales).tolist()
        found = self._found.setdefault(path, _Found())
        found.values += weight.numel()
        found.nan |= nan
        if not largest and not smallest:
            found.energy = math.inf
        elif not nan:
            _compare(found, weight.detach(), packed, multipliers(weight.shape[1], mask, seed)[1], block)

    def warn(self, model: str = "") -> None:
        """Warn of the linears that were looked at and have flaws; the first three of a kind are named.

        Args:
            model: name of the model in its pipeline, or ``""``.
        """
        found = dict(sorted(self._found.items()))
        _warn(
            model,
            [path for path, flaw in found.items() if flaw.nan],
            "hold NaN or infinities: %s. Their units of 64 values are packed as NaN, and so is what is computed with "
            "them. Get the weights again, or keep these linears in high precision (keep).",
        )
        _warn(
            model,
            [_share(path, flaw.above, flaw) for path, flaw in found.items() if flaw.above],
            f"reach beyond {int(hif4.LARGEST):,}, the largest magnitude of HiF4, after mask and rotation: %s. These "
            "values are cut to that. Keep these linears in high precision (keep).",
        )
        _warn(
            model,
            [_share(path, flaw.below, flaw) for path, flaw in found.items() if flaw.lost > _LOST * flaw.energy],
            "are too small for HiF4, which holds magnitudes down to 2^-50: %s. These values become 0. Keep these "
            "linears in high precision (keep).",
        )


def _compare(found: _Found, weight: Tensor, packed: hif4.Packed, multiplier: Tensor | None, block: int) -> None:
    multiplier = multiplier.to(weight.device) if multiplier is not None else None
    rows = max(1, _ROW_CHUNK // max(1, weight.shape[1]))
    for part, codes, scales in zip(*(t.split(rows) for t in (weight, packed.codes, packed.scales)), strict=True):
        moved = transform(part.to(torch.float32), multiplier, block)
        held = hif4.dequantize(hif4.Packed(codes, scales, moved.shape[1]))
        energy, lost = moved.double().square(), (moved != 0) & (held == 0)
        lost &= ((scales & 0xFF) == 0).repeat_interleave(hif4.UNIT, 1)[:, : moved.shape[1]]
        found.above += int((moved.abs() > hif4.LARGEST).sum())
        found.below += int(lost.sum())
        found.energy += float(energy.sum())
        found.lost += float(energy[lost].sum())


def _share(path: str, count: int, flaw: _Found) -> str:
    return f"{path} ({100 * count / flaw.values:.3g}% of its values)"


def _warn(model: str, named: Sequence[str], text: str) -> None:
    if named:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        log.warning(
            "%sthe weights of %d %s " + text,
            f"{model}: " if model else "",
            len(named),
            "linears" if len(named) > 1 else "linear",
            ", ".join(named[:3]) + more,
        )
