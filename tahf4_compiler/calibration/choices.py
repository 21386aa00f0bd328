"""The choices that a recipe is made with, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..graph.inputs import SEARCHES
from ..options import ACTIVATION_BITS, ATTENTION, Options, check_protecting_bits
from ..options import rounding as check_rounding
from ..options import scale_span as check_scale_span
from ..pipeline.order import build_pipeline
from ..recipe.budget import check_budget
from .statistics import check_percentile

__all__ = [
    "COMBINE",
    "MASKS",
    "PUBLISHED",
    "SEARCHES",
    "Choices",
    "check_block",
    "check_choices",
    "check_exponent",
    "check_options",
]

PUBLISHED = ("max", "percentile")
MASKS = (None, *PUBLISHED, "rms", "layer_search", "network_search")
COMBINE = ("max", "mean", "merged")
READ_BY: dict[str, tuple[str | None, ...]] = {
    "percentile": ("percentile", "network_search"),
    "weight_exponent": (*PUBLISHED, "rms"),
    "combine": MASKS[1:],
    "column": MASKS[1:],
}
"""Which masks read a choice. The searches try several weight exponents; that by layers tries the percentile 99.9."""
CHOSEN_BY = {
    "keep": "keep linears of the model itself by tahf4.keep(model, [...]), which comes before any recipe",
    "activation_bits": "choose them by recipe(activation_bits=...)",
    "scale_span": "choose it by recipe(scale_span=...)",
    "rounding": "choose it by recipe(rounding=...)",
    "rotate": "choose the rotation by recipe(block=..., rotate=...)",
    "scale_search": "choose the search by recipe(scale_search=...)",
}
"""What does what options of the backend, and those of passes, do elsewhere, and not in a calibration."""


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

    def used(self) -> dict[str, Any]:
        """Return them by name, with None in place of those that the mask does not read."""
        made = dataclasses.asdict(self)
        return made | {name: None for name, masks in READ_BY.items() if self.mask not in masks}


def check_choices(
    *,
    mask: Any = None,
    percentile: Any = None,
    weight_exponent: Any = None,
    combine: Any = "max",
    rotate: Any = True,
    block: Any = None,
    scale_search: Any = "",
    sensitivity: Any = True,
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
        OptionError: a choice is unknown, out of range, or of no effect beside the others.
    """
    steps = high_precision_steps
    words = (("mask", mask, MASKS), ("combine", combine, COMBINE), ("scale_search", scale_search, SEARCHES))
    for name, value, allowed in words:
        if value not in allowed:
            raise OptionError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
    if percentile is not None:
        check_percentile(percentile)
    if weight_exponent is not None:
        check_exponent(weight_exponent)
    given = {"percentile": percentile, "weight_exponent": weight_exponent}
    for name, value in (given | ({"combine": combine} if combine != "max" else {})).items():
        if value is not None and mask not in READ_BY[name]:
            readers = ", ".join(map(repr, READ_BY[name]))
            raise OptionError(
                f"mask={mask!r} does not read {name}={value!r}; leave {name} out, or choose one of the masks that read "
                f"it: {readers}"
            )
    for name, value in (("rotate", rotate), ("sensitivity", sensitivity)):
        if not isinstance(value, bool):
            raise OptionError(f"{name} is {value!r}; expected True or False")
    number = isinstance(low_rank, int | float) and not isinstance(low_rank, bool)
    if low_rank is not None and not (number and 0 < low_rank < 100):
        raise OptionError(
            f"low_rank is {low_rank!r}; expected a share of the width in percent, above 0 and below 100, or None"
        )
    if block is not None:
        check_block(block)
    if block and not rotate:
        raise OptionError(f"rotate=False rotates by no block, and block is {block}; leave one of them out")
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
    if activation_bits != 4 and scale_span != 1:
        raise OptionError(
            f"scale_span={scale_span!r} is for activations of 4 bits: with activation_bits={activation_bits} each unit "
            "has a scale; leave one of them out"
        )
    if step_activation_bits is not None and not steps:
        raise OptionError(
            f"step_activation_bits={step_activation_bits} is for the steps in high_precision_steps, which names none; "
            "name some, or leave it out"
        )
    if step_activation_bits is not None and step_activation_bits <= activation_bits:
        raise OptionError(
            f"step_activation_bits={step_activation_bits} changes nothing where activation_bits={activation_bits} "
            "gives all activations as many; leave one of them out"
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


def check_exponent(value: Any) -> None:
    """Raise :class:`OptionError` unless a value is an exponent of a weight in a mask."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise OptionError(f"weight_exponent is {value!r}; expected a number from 0 to 1")


def check_block(value: Any) -> None:
    """Raise :class:`OptionError` unless a value is a width of a block Hadamard."""
    if type(value) is not int or value < 0 or value & (value - 1):
        raise OptionError(f"block is {value!r}; expected a power of two, or 0 for no rotation")


def check_options(options: Options) -> None:
    """Check that a calibration reads the options of the backend that it was given, before anything is run.

    Raises:
        OptionError: it does not read one, or has no pass of that name.
        PipelineError: something among ``passes`` is no pass.
    """
    default = Options()
    # Four bits is what a recipe gives by itself.
    asked = dataclasses.replace(options, activation_bits=tuple(b for b in options.activation_bits if b[1] != 4))
    for name in ("keep", "activation_bits", "scale_span", "rounding"):
        if getattr(asked, name) != getattr(default, name):
            raise OptionError(f"a calibration does not read the option {name!r}: leave it out, and {CHOSEN_BY[name]}")
    whole = dataclasses.replace(options, pipeline="calibration", pass_options=(), disable_passes=())
    known = [item.name for item in build_pipeline(whole)]
    named = [(name, f"{name}.{option}") for name, option, _ in options.pass_options]
    for name, what in [*named, *((name, "disable_passes") for name in options.disable_passes)]:
        if name not in known:
            raise OptionError(
                f"option {what!r}: the pass {name!r} is not part of the calibration's pipeline, which has "
                f"{', '.join(known)}. Leave it out, and {CHOSEN_BY.get(name, 'give it to what compiles the model')}"
            )
