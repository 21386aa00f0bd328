"""Mergeable statistics of an activation: a log-spaced histogram for each channel, and sample rows.

The histogram follows DDSketch (Masson, Rim, Lee, VLDB 2019, arXiv 1908.10693): logarithmic buckets give every
quantile with a bounded relative error, and two sketches merge by addition. Buckets here are four an
octave, linear inside it (the top bits of a float32), which makes the index a shift.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..plugins import host

__all__ = ["BUCKETS", "LARGEST", "RELATIVE_ERROR", "SMALLEST", "RowSample", "Sketch"]

_LOW, _HIGH = -10, 14
_PER_OCTAVE = 4
BUCKETS = (_HIGH - _LOW) * _PER_OCTAVE + 2
"""Buckets of a channel: below 2**-10, four an octave up to 2**14, and above."""

RELATIVE_ERROR = 1 / 9
"""Of a quantile between :data:`SMALLEST` and 2**14: a bucket [u, 1.25 u) is reported at 10/9 u."""

LARGEST = 2.0**_HIGH
"""Quantiles above this are reported as the maximum."""

SMALLEST = 2.0**_LOW
"""Quantiles below this are reported as 0: the absolute error is less than 0.001."""

_SHIFT = 23 - 2
_FIRST = (127 + _LOW) << 2
_MOST_ROWS = 2**31 - 1


class Sketch:
    """Per-channel statistics of |x|, of a size that does not depend on how much was seen.

    Memory: ``channels * (98 * 4 + 4 + 8)`` bytes.

    Attributes:
        counts: int32 ``[C, BUCKETS]``.
        maxima: float32 ``[C]``, exact.
        squares: float64 ``[C]``, sum of squares.
        rows: how many rows were seen, exact.
        nonfinite: int64 ``[1]``, NaN and infinite values, which are in none of the others.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        """Start empty."""
        self.counts = torch.zeros(channels, BUCKETS, dtype=torch.int32, device=device)
        self.maxima = torch.zeros(channels, dtype=torch.float32, device=device)
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self.nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = 0

    def update(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: ``[..., C]`` of a floating-point type, on the sketch's device.

        Raises:
            OverflowError: a channel would have more than 2**31 - 1 values.
        """
        rows = x.reshape(-1, x.shape[-1]).detach()
        if self.rows + len(rows) > _MOST_ROWS:
            raise OverflowError("a sketch holds at most 2**31 - 1 rows; begin another and merge quantiles instead")
        self.rows += len(rows)
        if (fast := host.find("histogram", rows)) is not None:
            fast(rows, self.counts, self.maxima, self.squares, self.nonfinite)
            return
        for part in rows.split(max(1, (1 << 24) // rows.shape[1])):
            self._update(part)

    def _update(self, rows: Tensor) -> None:
        magnitude = rows.to(torch.float32).abs()
        finite = magnitude <= torch.finfo(torch.float32).max
        clean = torch.where(finite, magnitude, 0.0)
        index = (clean.view(torch.int32) >> _SHIFT) - (_FIRST - 1)
        index = index.clamp(0, BUCKETS - 1)
        flat = index + torch.arange(rows.shape[1], dtype=torch.int64, device=rows.device) * BUCKETS
        ones = finite.to(torch.int32).reshape(-1)
        self.counts.view(-1).scatter_add_(0, flat.reshape(-1).to(torch.int64), ones)
        self.maxima = torch.maximum(self.maxima, clean.amax(0)) if len(rows) else self.maxima
        self.squares += clean.to(torch.float64).square().sum(0)
        self.nonfinite += (~finite).sum()

    def merge(self, other: Sketch) -> None:
        """Add what another sketch saw.

        Raises:
            OverflowError: together they have more than 2**31 - 1 rows.
        """
        if self.rows + other.rows > _MOST_ROWS:
            raise OverflowError("a sketch holds at most 2**31 - 1 rows")
        self.counts += other.counts.to(self.counts.device)
        self.maxima = torch.maximum(self.maxima, other.maxima.to(self.maxima.device))
        self.squares += other.squares.to(self.squares.device)
        self.nonfinite += other.nonfinite.to(self.nonfinite.device)
        self.rows += other.rows

    def percentile(self, percent: float) -> Tensor:
        """Return a percentile of |x| for each channel.

        Args:
            percent: in [0, 100]; 100 is the exact maximum. The value of rank ``ceil(percent / 100 * rows)``.

        Returns:
            float32 ``[C]``. Between :data:`SMALLEST` and 2**14 it is within :data:`RELATIVE_ERROR`; it is never more
            than the maximum.
        """
        if percent >= 100 or not self.rows:
            return self.maxima.clone()
        cumulated = self.counts.cumsum(1, dtype=torch.int64)
        total = cumulated[:, -1]
        # 1000 * 0.999 is a little more than 999 in floating point.
        rank = (total.double() * percent / 100 * (1 - 1e-12)).ceil().clamp(min=1).to(torch.int64)
        bucket = torch.searchsorted(cumulated, rank[:, None]).squeeze(1)
        lower = ((bucket.to(torch.int32) + (_FIRST - 1)) << _SHIFT).view(torch.float32)
        value = torch.where(bucket == 0, 0.0, lower * (10 / 9))
        value = torch.where(bucket == BUCKETS - 1, self.maxima, value)
        return torch.minimum(value.to(torch.float32), self.maxima)

    def second_moment(self) -> Tensor:
        """Return the mean of x**2 for each channel: float32 ``[C]``."""
        return (self.squares / max(1, self.rows)).to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors, for a file."""
        rows = torch.tensor([self.rows], dtype=torch.int64, device="cpu")
        return {
            "counts": self.counts,
            "maxima": self.maxima,
            "squares": self.squares,
            "nonfinite": self.nonfinite,
            "rows": rows,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sketch:
        """Undo :meth:`tensors`."""
        sketch = cls(0)
        sketch.counts, sketch.maxima = tensors["counts"], tensors["maxima"]
        sketch.squares, sketch.nonfinite = tensors["squares"], tensors["nonfinite"]
        sketch.rows = int(tensors["rows"])
        return sketch


class RowSample:
    """A uniform sample of rows, of bounded size: those of the largest random priorities (mergeable).

    A row's priority depends on nothing but where it stands: in which input, in which of the input's calls, and where in
    the tensor. So processes that divide the inputs, or the sequence of one input, draw together what one would.
    """

    def __init__(self, size: int, name: str) -> None:
        """Start empty; the name seeds the priorities."""
        self.size = size
        self.name = name
        self._heap: list[tuple[float, int]] = []  # (priority, place in the buffer)
        self._buffer: Tensor | None = None
        self._calls: dict[str, int] = {}

    @property
    def rows(self) -> Tensor | None:
        """Return the sample, ``[n, C]`` with n at most ``size``, by falling priority; None before the first row."""
        if self._buffer is None:
            return None
        places = [place for _, place in sorted(self._heap, reverse=True)]
        return self._buffer[torch.tensor(places, dtype=torch.int64, device=self._buffer.device)]

    @property
    def priorities(self) -> Tensor:
        """Return the priorities of the rows, falling: float64 ``[n]``."""
        falling = sorted((value for value, _ in self._heap), reverse=True)
        return torch.tensor(falling, dtype=torch.float64, device="cpu")

    def update(self, x: Tensor, source: str = "", first: int = 0, kept: Tensor | None = None) -> None:
        """Offer rows.

        Args:
            x: ``[..., S, C]``.
            source: which input they come of, such as a prompt; its calls are counted apart.
            first: place of the first of the S rows, where the tensor is a part of one.
            kept: bool ``[..., S]``, which rows count; None for all.
        """
        call = self._calls.get(source, 0)
        self._calls[source] = call + 1
        if not x.numel() or not self.size:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        length = x.shape[-2] if x.dim() > 1 else 1
        values = _priorities(f"{self.name}\0{source}\0{call}", len(rows) // length, length, first)
        if kept is not None:
            values = np.where(kept.reshape(-1).cpu().numpy(), values, -1.0)
        floor = self._heap[0][0] if len(self._heap) == self.size else -1.0
        best = np.flatnonzero(values > floor)
        if len(best) > self.size:
            best = best[np.argpartition(values[best], -self.size)[-self.size :]]
        for place in best.tolist():
            self._offer(rows[place], float(values[place]))

    def _offer(self, row: Tensor, priority: float) -> None:
        if self._buffer is None:
            self._buffer = row.new_zeros(self.size, len(row))
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (priority, len(self._heap)))
            place = len(self._heap) - 1
        elif priority > self._heap[0][0]:
            place = self._heap[0][1]
            heapq.heapreplace(self._heap, (priority, place))
        else:
            return
        self._buffer[place].copy_(row)

    def merge(self, other: RowSample) -> None:
        """Offer what another sample holds."""
        if (rows := other.rows) is not None:
            self.offer(rows, other.priorities.tolist())

    def offer(self, rows: Tensor, priorities: Sequence[float]) -> None:
        """Offer rows ``[n, C]`` whose priorities were drawn before."""
        for row, priority in zip(rows, priorities, strict=True):
            if self.size:
                self._offer(row, priority)

    def count_on(self, other: RowSample) -> None:
        """Number further calls after those that another sample saw."""
        self._calls = dict(other._calls)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors, for a file (not the counts of named inputs, which are seen once)."""
        calls = torch.tensor([self._calls.get("", 0)], dtype=torch.int64, device="cpu")
        found = {"priorities": self.priorities, "calls": calls}
        if (rows := self.rows) is not None:
            found["sample"] = rows
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo :meth:`tensors`."""
        self._heap, self._buffer = [], None
        self._calls = {"": int(tensors["calls"])}
        if "sample" in tensors:
            self.offer(tensors["sample"], tensors["priorities"].tolist())


def _priorities(key: str, batch: int, length: int, first: int) -> np.ndarray:
    """Return random numbers in [0, 1) by key and place: float64 ``[batch * length]``.

    A counter-based generator: the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over batch and place.
    """
    seed = np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    place = np.arange(first, first + length, dtype=np.uint64)[None] | (np.arange(batch, dtype=np.uint64)[:, None] << 40)
    mixed = seed + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> 27)) * np.uint64(0x94D049BB133111EB)
    values: np.ndarray = ((mixed ^ (mixed >> 31)) >> 11).reshape(-1) * 2.0**-53
    return values
