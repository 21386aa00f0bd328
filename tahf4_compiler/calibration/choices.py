"""The choices that a recipe is made with, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..graph.inputs import SEARCHES
from ..options import ACTIVATION_BITS, ATTENTION, check_protecting_bits
from ..options import rounding as check_rounding
from ..options import scale_span as check_scale_span
from ..recipe.budget import check_budget
from .statistics import check_percentile

__all__ = ["COMBINE", "MASKS", "PUBLISHED", "SEARCHES", "Choices", "check_choices"]

PUBLISHED = ("max", "percentile")
MASKS = (None, *PUBLISHED, "rms", "layer_search", "network_search")
COMBINE = ("max", "mean", "merged")


@dataclass(frozen=True)
class Choices:
    """What :func:`~tahf4_compiler.calibration.making.make_recipe` was asked for.

    Attributes:
        column: what stands for a weight's column in the mask: its largest magnitude (``"max"``), as published, or its
            norm (``"norm"``), which ``"rms"`` and the searches take.
        low_rank: rank of the branches, in percent of each weight's smaller side; None for none.
        scale_span: units of a row that share a level-1 scale; 0 for all.
        span_tolerance: where not None, each activation has the widest span that costs at most so many dB more than
            ``scale_span``, which is 1.
        rounding: see :func:`tahf4_compiler.hif4.quantize`.
    """

    mask: str | None
    percentile: float
    weight_exponent: float
    combine: str
    block: int
    scale_search: str
    activation_bits: int = 4
    column: str = "max"
    low_rank: float | None = None
    scale_span: int = 1
    rounding: str = "half_away"
    span_tolerance: float | None = None


def check_choices(
    *,
    mask: Any = None,
    percentile: Any = None,
    weight_exponent: Any = 0.5,
    combine: Any = "max",
    block: Any = 64,
    scale_search: Any = "",
    high_precision_steps: Any = (),
    step_activation_bits: Any = None,
    activation_bits: Any = 4,
    protect_bits: Any = None,
    low_rank: Any = None,
    scale_span: Any = 1,
    span_tolerance: Any = None,
    rounding: Any = None,
    attention: Any = None,
    attention_tolerance: Any = 1,
    **budget: Any,
) -> None:
    """Check choices of :func:`make_recipe`, before anything is run.

    Raises:
        OptionError: a choice is unknown or out of range.
    """
    exponent, steps = weight_exponent, high_precision_steps
    words = (("mask", mask, MASKS), ("combine", combine, COMBINE), ("scale_search", scale_search, SEARCHES))
    for name, value, allowed in words:
        if value not in allowed:
            raise OptionError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
    if percentile is not None:
        check_percentile(percentile)
    if isinstance(exponent, bool) or not isinstance(exponent, int | float) or not 0 <= exponent <= 1:
        raise OptionError(f"weight_exponent is {exponent!r}; expected a number from 0 to 1")
    number = isinstance(low_rank, int | float) and not isinstance(low_rank, bool)
    if low_rank is not None and not (number and 0 < low_rank < 100):
        raise OptionError(
            f"low_rank is {low_rank!r}; expected a share of the width in percent, above 0 and below 100, or None"
        )
    if type(block) is not int or block < 0 or block & (block - 1):
        raise OptionError(f"block is {block!r}; expected a power of two, or 0 for no rotation")
    if not isinstance(steps, Sequence) or any(type(step) is not int for step in steps):
        raise OptionError(f"high_precision_steps is {steps!r}; expected a list of step indices")
    if scale_span != "auto":
        check_scale_span("scale_span", scale_span)
    number = isinstance(span_tolerance, int | float) and not isinstance(span_tolerance, bool)
    if span_tolerance is not None and not (number and 0 <= span_tolerance < math.inf):
        raise OptionError(f"span_tolerance is {span_tolerance!r}; expected a number of dB of at least 0")
    if span_tolerance is not None and scale_span != "auto":
        raise OptionError(
            f'span_tolerance={span_tolerance!r} is for scale_span="auto", and scale_span is {scale_span!r}; leave one '
            "of them out"
        )
    if attention not in (None, *ATTENTION):
        raise OptionError(f"attention is {attention!r}; expected one of {', '.join(map(repr, ATTENTION))}, or None")
    tolerance = attention_tolerance
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise OptionError(
            f"attention_tolerance is {tolerance!r}; expected a relative squared error of at least 0, such as 0.01"
        )
    if rounding is not None:
        check_rounding("rounding", rounding, scale_span)
    check_protecting_bits("step_activation_bits", step_activation_bits)
    if type(activation_bits) is not int or activation_bits not in ACTIVATION_BITS:
        raise OptionError(
            f"activation_bits is {activation_bits!r}; expected 4 (HiF4), 8 (int8) or 16 (not quantized)"
        )
    if activation_bits != 4 and budget.get("max_8bit_flops") is not None:
        raise OptionError(
            f"activation_bits={activation_bits} gives all activations {activation_bits} bits, and max_8bit_flops a "
            "share of them 8; leave one of them out"
        )
    if budget or protect_bits is not None:
        check_budget(protect_bits=protect_bits, **budget)
    if protect_bits is not None and protect_bits <= activation_bits:
        raise OptionError(
            f"protect_bits={protect_bits} protects nothing where activation_bits={activation_bits} gives all "
            "activations as many; leave one of them out"
        )
