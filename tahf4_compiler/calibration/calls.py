"""The calls of a model that a calibration keeps, to measure the network's output on: a few, spread over all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..files.tensors import decode, encode, is_plain

__all__ = ["MOST", "Call", "KeptCalls", "Place", "copied"]

MOST = 8
"""Calls that are kept of an expert."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments."""


@dataclass(frozen=True)
class Place:
    """Where a call stood.

    Attributes:
        source: of which input it was, such as a prompt.
        branch: of guidance.
        step: index of the denoising step; for a bare module of the part of the schedule.
        steps: how many there are.
    """

    source: str = ""
    branch: str = ""
    step: int = 0
    steps: int = 1


class KeptCalls:
    """Keeps at most :data:`MOST` calls of each expert.

    Every call of a number that the stride divides is kept, counted for each guidance branch; when there are too many,
    the stride doubles and every second one is dropped. So those that stay are evenly spread over steps and prompts.

    Attributes:
        calls: by expert.
        places: where each of them stood.
        seen: how many there were, and the stride, by expert and branch.
        held: while a list, every call goes there and none is counted: several processes then choose together.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.calls: dict[str, list[Any]] = {}
        self.places: dict[str, list[Place]] = {}
        self.seen: dict[tuple[str, str], tuple[int, int]] = {}
        self.held: list[tuple[str, Place, Any]] | None = None

    def offer(self, expert: str, place: Place, copy: Callable[[], Any]) -> None:
        """Count a call, and keep what ``copy`` gives if it is due; or hold it, while calls are held."""
        if self.held is not None:
            self.held.append((expert, place, copy()))
        else:
            self.add(expert, place, copy() if self.due(expert, place.branch) else None)

    def due(self, expert: str, branch: str) -> bool:
        """Whether the next call is one of those to keep."""
        count, stride = self.seen.get((expert, branch), (0, 1))
        return count % stride == 0

    def add(self, expert: str, place: Place, call: Any) -> None:
        """Count a call, and keep it if it is due; None stands for one that cannot be kept."""
        due = self.due(expert, place.branch)
        count, stride = self.seen.get((expert, place.branch), (0, 1))
        self.seen[(expert, place.branch)] = count + 1, stride
        if due and call is not None:
            self.calls.setdefault(expert, []).append(call)
            self.places.setdefault(expert, []).append(place)
            self._thin(expert)

    def count(self, seen: Iterable[tuple[str, str, int, int]]) -> None:
        """Add what others counted: expert, branch, number and stride."""
        for expert, branch, count, stride in seen:
            mine, my_stride = self.seen.get((expert, branch), (0, 1))
            self.seen[(expert, branch)] = mine + count, max(my_stride, stride)

    def counted(self) -> list[tuple[str, str, int, int]]:
        """Return what :meth:`count` takes, sorted."""
        return sorted((*where, *numbers) for where, numbers in self.seen.items())

    def extend(self, expert: str, entries: Iterable[tuple[Place, Any]]) -> None:
        """Keep calls that others kept and counted."""
        for place, call in entries:
            self.calls.setdefault(expert, []).append(call)
            self.places.setdefault(expert, []).append(place)
        self._thin(expert)

    def _thin(self, expert: str) -> None:
        """Drop every second kept call of the branch that has most, while there are too many."""
        calls, places = self.calls.get(expert, []), self.places.get(expert, [])
        while len(calls) > MOST:
            branches = [place.branch for place in places]
            most = max(sorted(set(branches)), key=branches.count)
            count, stride = self.seen[(expert, most)]
            self.seen[(expert, most)] = count, 2 * stride
            for i in reversed([i for i, branch in enumerate(branches) if branch == most][1::2]):
                del calls[i], places[i]

    def header(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return everything as plain values; tensors go into ``tensors``."""
        kept = {
            expert: [
                [dataclasses.astuple(place), encode(call, tensors, f"call.{expert}.{i}")]
                for i, (place, call) in enumerate(zip(self.places[expert], calls, strict=True))
            ]
            for expert, calls in self.calls.items()
        }
        return {"kept": kept, "seen": self.counted()}

    def load(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor], devices: Mapping[str, Any]) -> None:
        """Add what :meth:`header` gave, with tensors on a device for each expert."""
        self.count(header["seen"])
        for expert, entries in header["kept"].items():
            self.extend(expert, [(Place(*place), decode(call, tensors, devices[expert])) for place, call in entries])


def copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Return a copy of a call's arguments, or None if they hold what cannot be kept in a file."""
    if not is_plain((args, kwargs)):
        return None
    call: Call = torch.utils._pytree.tree_map(
        lambda value: value.detach().clone() if isinstance(value, Tensor) else value, (args, kwargs)
    )
    return call
