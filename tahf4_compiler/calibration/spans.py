"""How many units share their level-1 scales, chosen for an activation and its weights by measured error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..format import hif4
from ..format.spans import joined, span_name
from ..pipeline.rules import span_obstacle
from ..plugins import host
from .layer import Layer
from .reconstruction import reconstructed
from .seen import Seen
from .sensitivity import output_error, sqnr_db

__all__ = ["SPAN_TOLERANCE", "idle_span", "widest_span"]

SPAN_TOLERANCE = 0.8
"""In dB of the output's error of the linears that read an activation: about what a row costs where units are alike."""


def idle_span(device: torch.device) -> str:
    """Return why no span is tried for weights on a device whose products save no time with one; "" where they do."""
    fact = host.find("spans_save_time", device)
    if fact is not None and fact(device):
        return ""
    return f"span 1: a wider one saves no time in products on {device}; with a span_tolerance it would be tried"


def widest_span(
    calibration: Seen, layer: Layer, mask: Tensor | None, search: str, packed: Mapping[str, hif4.Packed]
) -> tuple[int, dict[str, hif4.Packed], str]:
    """Return the widest span that costs little, as a form, the weights packed with it, and why it is that one.

    What it costs is measured on the sample rows, with both sides quantized as the recipe has them. A wider span has the
    rounding ``"half_away"`` where a unit has ``"least_error"``, which is a part of what it costs.

    Args:
        calibration: that has seen the model.
        layer: the activation and its weights; its choices say how a unit is rounded, and how many dB are little.
        mask: of the activation.
        search: how weights are rounded.
        packed: weights with a scale for each unit, for ``search="reconstruct"``.

    Raises:
        CalibrationError: there are no sample rows.
    """
    choices, count, form = layer.choices, hif4.units(layer.cells.activation.channels), layer.form(mask)
    assert choices.span_tolerance is not None
    obstacle = span_obstacle(choices.activation_bits, mask is not None, layer.block)
    if obstacle is None and count == 1:
        obstacle = "the row is one unit"
    if obstacle is not None:
        return form, dict(packed), f"span 1: {obstacle}"
    if not len(layer.rows):
        raise CalibrationError("scale_span='auto' needs sample rows; calibrate with rows=64 or give a span")

    def sqnr(parts: Mapping[str, hif4.Packed], span: int) -> float:
        return sqnr_db(sum(output_error(layer.rows, layer.weights, layer.product(mask, search, parts, span=span))))

    unit, refused = sqnr(packed, form), list[str]()
    rounding = "half_away" if choices.rounding == "least_error" else choices.rounding
    made = (calibration, layer.cells, layer.weights, mask, layer.seed, layer.block)
    for span in (0, *(units for units in (4, 2) if units < count)):
        wide = joined(span, rounding)
        parts = reconstructed(*made, wide) if packed else {}
        cost = unit - sqnr(parts, wide)
        if cost <= choices.span_tolerance:
            words = f"span {span_name(span)}: {cost:.2f} dB more error than with a scale for each unit"
            return wide, parts, f"{words}; refused: {', '.join(refused)}" if refused else words
        refused.append(f"{span_name(span)} {cost:+.2f} dB")
    return form, dict(packed), f"span 1; refused: {', '.join(refused)}"
