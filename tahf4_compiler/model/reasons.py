"""Why a linear runs as it does: a kind that programs ask for, and its words for people."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

__all__ = ["Cause", "Reason", "cause_of"]


class Cause(StrEnum):
    """Kinds of reasons."""

    BODY = "body"
    """It stands in a repeated block."""
    BOUNDARY = "boundary"
    """It stands outside of the repeated blocks."""
    KEPT = "kept"
    """The user keeps it in high precision."""
    RECIPE = "recipe"
    """A recipe puts it in 4 bits."""
    NO_STATISTICS = "no statistics"
    """It stands in a repeated block, and the model's recipe does not know it."""
    SENSITIVITY = "sensitivity"
    """A recipe protects it, by its measured effect."""
    STEP = "step"
    """A recipe runs the denoising step at hand in high precision."""
    PACKED = "packed"
    """The model holds it in 4 bits."""
    NOT_PACKED = "not packed"
    """The model holds others in 4 bits, and not this one."""
    WEIGHT = "weight"
    """Its weight is no plain parameter."""
    SHAPE = "shape"
    """Its weight does not have two axes, or weight or bias have other sizes than its features."""
    SMALL = "small"
    """It has few features: a unit would be mostly padding."""
    DTYPE = "dtype"
    """Weight or activation are of a type that HiF4 does not hold."""
    CLASS = "class"
    """A module reads the weight in its own way."""
    ADAPTER = "adapter"
    """It belongs to an adapter, beside the linear that it adapts."""
    REGION = "region"
    """It stands in a branch or loop, which stays as it is."""
    NOT_REWRITTEN = "not rewritten"
    """It was planned for 4 bits, and no pass carried that out."""
    OTHER = "other"
    """What a pass of somebody else says."""


class Reason(str):
    """A reason in words, which knows its kind.

    Attributes:
        cause: the kind.
    """

    __slots__ = ("cause",)
    cause: Cause

    def __new__(cls, cause: Cause, text: str) -> Reason:
        """Say why."""
        self = super().__new__(cls, text)
        self.cause = cause
        return self

    def __getnewargs__(self) -> Any:
        """Let it be copied."""
        return self.cause, str(self)


def cause_of(reason: str) -> Cause:
    """Return the kind of a reason; :attr:`Cause.OTHER` for plain text, as a plug-in may give it."""
    return reason.cause if isinstance(reason, Reason) else Cause.OTHER
