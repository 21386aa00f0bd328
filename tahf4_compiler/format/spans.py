"""Units that share a level-1 scale: a *span* of 1, 2 or 4 that follow each other in a row, or the whole row.

Operators and plans take the span and the rounding of elements as one number, a *form*: the span, 0 for a row, plus
:data:`ROUNDED` or :data:`SEARCHED` for another rounding than the usual one. So one field says how an activation and the
weights that read it are converted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError

__all__ = [
    "FORM_ROUNDINGS",
    "MOST_UNITS",
    "ROUNDED",
    "SEARCHED",
    "SPANS",
    "alone",
    "check_alone",
    "check_form",
    "check_span",
    "check_units",
    "joined",
    "over_spans",
    "parted",
    "span_name",
    "units_of",
    "with_units",
]

SPANS = (1, 2, 4, "row")
"""How many units of a row may share a level-1 scale. Where a number is wanted, as in operators, 0 stands for a row."""

ROUNDED = 8
"""Added to a span, it makes the form whose rounding is ``"bfloat16_half_away"``."""

SEARCHED = 16
"""Added to a span of 1, it makes the form whose rounding is ``"least_error"``."""

FORM_ROUNDINGS = ("half_away", "bfloat16_half_away", "least_error")
"""The roundings of a form; see :func:`tahf4_compiler.format.hif4.quantize`."""

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


def check_form(form: int) -> int:
    """Return a form, checked.

    Raises:
        FormatError: it is no span, and none plus :data:`ROUNDED` or :data:`SEARCHED`; the two do not go together.
    """
    if type(form) is not int or form < 0:
        check_span(form)
    elif form // ROUNDED >= len(FORM_ROUNDINGS):
        raise FormatError(f"the form is {form}; expected a span, plus {ROUNDED} or {SEARCHED} for another rounding")
    else:
        check_alone(check_span(units_of(form)), FORM_ROUNDINGS[form // ROUNDED])
    return form


def joined(span: int, rounding: str) -> int:
    """Return the form of a span, 0 for a row, and one of :data:`FORM_ROUNDINGS`.

    Raises:
        FormatError: the rounding is another, or chooses level-1 scales that the span shares.
    """
    if rounding not in FORM_ROUNDINGS:
        raise FormatError(f"rounding is {rounding!r}; expected one of {', '.join(map(repr, FORM_ROUNDINGS))}")
    check_alone(span, rounding)
    return span + ROUNDED * FORM_ROUNDINGS.index(rounding)


def check_alone(span: int, rounding: str) -> None:
    """Refuse a rounding that chooses the level-1 scale of each unit for units that share it.

    Raises:
        FormatError: it does, and they do.
    """
    if rounding == "least_error" and span != 1:
        raise FormatError(
            f"the rounding 'least_error' chooses a level-1 scale for each unit, and the span is {span_name(span)!r}; "
            "expected a span of 1. Leave one of the two out."
        )


def parted(form: int) -> tuple[int, str]:
    """Return span and rounding of a form."""
    return units_of(form), FORM_ROUNDINGS[form // ROUNDED]


def units_of(form: int) -> int:
    """Return the span of a form, 0 for a row."""
    return form % ROUNDED


def with_units(form: int, span: int) -> int:
    """Return a form with another span, 0 for a row."""
    return form - units_of(form) + span


def alone(form: int) -> int:
    """Return a form with a level-1 scale for each unit."""
    return with_units(form, 1)


def check_units(span: int, count: int) -> None:
    """Raise :class:`FormatError` where so many units of a row cannot share their level-1 scales: ``span`` 0 for all."""
    if span == 0 and count > MOST_UNITS:
        raise FormatError(
            f"a row of {count} units shares a level-1 scale; expected at most {MOST_UNITS}, whose dot fits into 32 "
            "bits. Use a span of 4."
        )


def over_spans(values: Tensor, span: int) -> Tensor:
    """Return the largest value of each span in the places of all its values.

    Args:
        values: ``[..., units]``, not negative.
        span: 1, 2 or 4, or 0 for a row. The last span of a row may be shorter.

    Raises:
        FormatError: sums over a span would not fit into an int32.
    """
    count = values.shape[-1]
    check_units(span, count)
    step = span or count
    if step <= 1:
        return values
    groups = torch.nn.functional.pad(values, (0, -count % step)).unflatten(-1, (-1, step))
    return groups.amax(-1, keepdim=True).expand_as(groups).flatten(-2)[..., :count]
