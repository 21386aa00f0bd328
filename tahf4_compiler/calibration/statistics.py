"""Statistics of one activation, by part of the schedule and guidance branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError
from .sketch import RowSample, Sketch

if TYPE_CHECKING:
    pass

__all__ = ["Activation"]


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


class _Cells:
    """The statistics of one activation, by step group and branch."""

    def __init__(self, activation: Activation, rows: int, groups: int) -> None:
        self.activation = activation
        self.groups = groups
        self._rows = rows
        self.cells: dict[tuple[int, str], tuple[Sketch, RowSample]] = {}

    def cell(self, key: tuple[int, str], device: torch.device | str = "cpu") -> tuple[Sketch, RowSample]:
        if key not in self.cells:
            name = f"{self.activation.expert}/{self.activation.name}/{key[0]}/{key[1]}"
            self.cells[key] = Sketch(self.activation.channels, device), RowSample(self._rows, name)
        return self.cells[key]


def check_percentile(value: Any) -> None:
    """Raise :class:`OptionError` unless a value is a percentile."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 100:
        raise OptionError(f"percentile is {value!r}; expected a number above 0 and up to 100 (100 is the maximum)")


def merged(sketches: Sequence[Sketch]) -> Sketch:
    whole = Sketch(len(sketches[0].maxima), sketches[0].maxima.device)
    for sketch in sketches:
        whole.merge(sketch)
    return whole
