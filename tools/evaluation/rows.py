"""What is compared: each row is a way to run the same pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PLAIN", "ROWS", "Row"]


@dataclass(frozen=True)
class Row:
    """A way to run a pipeline.

    Attributes:
        name: in tables.
        recipe: choices of ``calibration.recipe``, or None for no recipe. With ``"mask": "weights"`` those of
            ``recipe_from_weights``, which needs no calibration.
        options: of the backend.
        simulate: a format of :mod:`tahf4_compiler.tools.evaluation.formats`, in place of HiF4, or None.
        block: the widest Hadamard block of the simulation.
    """

    name: str
    recipe: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    simulate: str | None = None
    block: int = 0


PROTECTED = 4
"""Linears that stay in high precision in each expert, where a row protects any."""

PLAIN: dict[str, Any] = {"mask": None, "rotate": False, "scale_search": "", "sensitivity": False}
"""Choices of a recipe that leaves everything out."""

_PROTECT: dict[str, Any] = {"sensitivity": True, "max_high_precision_linears": PROTECTED}
_EVERYTHING: dict[str, Any] = {"mask": "network_search", "rotate": True, "scale_search": "squared", **_PROTECT}

ROWS = (
    Row("HiF4 naive", options={"rotate.block": 0}),
    Row("no recipe (rotation)"),
    *(
        Row(f"no data: weights as the mask, exponent {alpha}", {"mask": "weights", "weight_exponent": alpha})
        for alpha in (0.5, 1.0)
    ),
    Row("W4A4 + int8 attention", options={"rotate.block": 0, "attention": "int8"}),
    Row("W4A4 + HiF4 attention", options={"rotate.block": 0, "attention": "hif4"}),
    Row("+ max mask", {**PLAIN, "mask": "max"}),
    Row("+ percentile mask (99.9)", {**PLAIN, "mask": "percentile", "percentile": 99.9}),
    Row("+ rotation", {**PLAIN, "rotate": True}),
    Row("+ percentile mask, rotation", {**PLAIN, "mask": "percentile", "percentile": 99.9, "rotate": True}),
    Row("+ layer-searched mask, rotation", {**PLAIN, "mask": "layer_search", "rotate": True}),
    Row("+ network-searched mask", {**PLAIN, "mask": "network_search"}),
    Row("+ network-searched mask, rotation", {**PLAIN, "mask": "network_search", "rotate": True}),
    Row("+ scale search", {**PLAIN, "scale_search": "squared"}),
    Row(f"+ {PROTECTED} linears protected", {**PLAIN, **_PROTECT}),
    Row("+ rotation, reconstruction", {**PLAIN, "rotate": True, "scale_search": "reconstruct"}),
    Row(
        "network-searched mask, rotation, scale search (the defaults before reconstruction)",
        {"sensitivity": False, "scale_search": "squared"},
    ),
    Row("defaults (network-searched mask, rotation, reconstruction)", {"sensitivity": False}),
    *(
        Row(f"defaults, {name} attention", {"sensitivity": False}, {"attention": name.lower()})
        for name in ("int8", "HiF4")
    ),
    Row("defaults, rounding half away", {"sensitivity": False, "rounding": "half_away"}),
    Row("defaults, without rotation", {"sensitivity": False, "rotate": False}),
    *(
        Row(f"defaults, branches of {percent} % of the width", {"sensitivity": False, "low_rank": percent})
        for percent in (4, 8)
    ),
    *(
        Row(f"defaults, a level-1 scale for {units}", {"sensitivity": False, "scale_span": span})
        for units, span in (("2 units", 2), ("4 units", 4), ("a row", "row"))
    ),
    Row(
        "defaults, a level-1 scale for units by measured error",
        {"sensitivity": False, "scale_span": "auto", "span_tolerance": 0.8},  # on any device
    ),
    Row("defaults, activations in 8 bits", {"sensitivity": False, "activation_bits": 8}),
    Row("defaults, activations of 20 % of the FLOPs in 8 bits", {"sensitivity": True, "max_8bit_flops": 0.2}),
    *(
        Row(f"defaults, first and last step {how}", {"sensitivity": False, "high_precision_steps": (0, -1), **bits})
        for how, bits in (
            ("in high precision", {}),
            ("with activations of 16 bits", {"step_activation_bits": 16}),
            ("with activations of 8 bits", {"step_activation_bits": 8}),
        )
    ),
    *(
        Row(f"defaults, {PROTECTED} linears protected {how}", {**_PROTECT, **bits})
        for how, bits in (
            ("by high precision", {}),
            ("by activations of 16 bits", {"protect_bits": 16}),
            ("by activations of 8 bits", {"protect_bits": 8}),
        )
    ),
    Row("everything without rotation", {**PLAIN, "mask": "network_search", "scale_search": "squared", **_PROTECT}),
    Row("everything", _EVERYTHING),
    Row("everything, first step in high precision", {**_EVERYTHING, "high_precision_steps": (0,)}),
    Row("everything, max mask", {**_EVERYTHING, "mask": "max"}),
    Row("everything, layer-searched mask", {**_EVERYTHING, "mask": "layer_search"}),
    Row("everything, mean over steps and branches", {**_EVERYTHING, "combine": "mean"}),
    Row("everything, Hadamard blocks up to 256", {**_EVERYTHING, "block": 256}),
    *(
        Row(f"{name.upper()} {kind}", simulate=name, block=block)
        for name in ("nvfp4", "mxfp4", "int4")
        for kind, block in (("naive", 0), ("rotated", 64))
    ),
)
"""The rows of ``tahf4 evaluate``. Masks, rotations and searches are added to HiF4 naive, one or several at once."""
