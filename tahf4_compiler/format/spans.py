"""Units that share a level-1 scale: a *span* of 1, 2 or 4 that follow each other in a row, or the whole row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError

__all__ = ["MOST_UNITS", "SPANS", "check_span", "over_spans", "span_name"]

SPANS = (1, 2, 4, "row")
"""How many units of a row may share a level-1 scale. Where a number is wanted, as in operators, 0 stands for a row."""

MOST_UNITS = (2**31 - 1) // (64 * 28 * 28)
"""Dots of so many units fit into an int32: 42,799, a K of 2.7 million."""


def check_span(span: int | str) -> int:
    """Return a span as a number of units: 1, 2 or 4, or 0 for a whole row.

    Args:
        span: one of :data:`SPANS`, or 0.

    Raises:
        FormatError: it is something else.
    """
    if span == "row":
        return 0
    if type(span) is int and span in (0, 1, 2, 4):
        return span
    raise FormatError(f"span is {span!r}; expected 1, 2 or 4 units that share a level-1 scale, or 'row' for all")


def span_name(span: int) -> int | str:
    """Return a span as people write it: one of :data:`SPANS`."""
    return span or "row"


def over_spans(values: Tensor, span: int) -> Tensor:
    """Return the largest value of each span in the places of all its values.

    Args:
        values: ``[..., units]``, not negative.
        span: 1, 2 or 4, or 0 for a row. The last span of a row may be shorter.

    Raises:
        FormatError: sums over a span would not fit into an int32.
    """
    count = values.shape[-1]
    step = span or count
    if step > MOST_UNITS:
        raise FormatError(
            f"a row of {count} units shares a level-1 scale; expected at most {MOST_UNITS}, whose dot fits into 32 "
            "bits. Use a span of 4."
        )
    if step <= 1:
        return values
    groups = torch.nn.functional.pad(values, (0, -count % step)).unflatten(-1, (-1, step))
    return groups.amax(-1, keepdim=True).expand_as(groups).flatten(-2)[..., :count]
