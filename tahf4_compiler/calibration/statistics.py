"""Statistics of one activation, by part of the schedule and guidance branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .moments import Moments
from .sketch import RowSample, Sketch

__all__ = ["Activation", "Cells", "check_percentile", "merged"]


@dataclass(frozen=True)
class Activation:
    """A tensor that linears read.

    Attributes:
        expert: component name, ``""`` for a module.
        name: module path of the first linear that reads it.
        members: module paths of all of them.
        channels: its last axis.
    """

    expert: str
    name: str
    members: tuple[str, ...]
    channels: int


class Cells:
    """The statistics of one activation, by step group and branch.

    Attributes:
        activation: which one.
        groups: parts of the schedule.
        cells: a sketch and sample rows, by part and branch.
        moments: over all parts and branches, or None if they are not kept.
    """

    def __init__(self, activation: Activation, rows: int, groups: int) -> None:
        """Start empty, for so many sample rows."""
        self.activation = activation
        self.groups = groups
        self._sampled = rows
        self.cells: dict[tuple[int, str], tuple[Sketch, RowSample]] = {}
        self.moments: Moments | None = None

    def cell(self, key: tuple[int, str], device: torch.device | str = "cpu") -> tuple[Sketch, RowSample]:
        """Return one cell, made on a device if it is new."""
        if key not in self.cells:
            name = f"{self.activation.expert}/{self.activation.name}/{key[0]}/{key[1]}"
            self.cells[key] = Sketch(self.activation.channels, device), RowSample(self._sampled, name)
        return self.cells[key]

    def rows(self, group: int | None = None) -> Tensor:
        """Return the sample rows of all cells, or of those of one part of the schedule: ``[n, K]``."""
        found = [s.rows for (part, _), (_, s) in self.cells.items() if s.rows is not None and group in (None, part)]
        empty = torch.zeros(0, self.activation.channels, dtype=torch.float32, device="cpu")
        return torch.cat(found) if found else empty


def check_percentile(value: Any) -> None:
    """Raise :class:`OptionError` unless a value is a percentile."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 100:
        raise OptionError(f"percentile is {value!r}; expected a number above 0 and up to 100 (100 is the maximum)")


def merged(sketches: Sequence[Sketch]) -> Sketch:
    """Return the sketch of all that some sketches saw."""
    whole = Sketch(len(sketches[0].maxima), sketches[0].maxima.device)
    for sketch in sketches:
        whole.merge(sketch)
    return whole
