"""The mask of an expert by the error of its network's output."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence

from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..files.memo import Measured
from .choices import Choices
from .entry import make_entry, products
from .masks import EXPONENTS
from .seen import Seen
from .sensitivity import Network, QuantizedWeight

__all__ = ["STATISTICS", "search_network"]

log = logging.getLogger(__name__)

STATISTICS = ("rms", "max", "percentile")
"""Masks that the search tries with the first exponent. The best of them is tried with the others, too."""


def search_network(
    calibration: Seen, expert: str, choices: Choices, measured: Measured, network: Network | None
) -> Choices:
    """Return the choices with the mask of least error of the network's output, everything quantized.

    It is no mask, or one of :data:`STATISTICS` with the first of :data:`EXPONENTS`, or the best of these with another.
    Spans that are to be chosen are chosen afterwards: masks are compared with a level-1 scale for each unit.

    Args:
        calibration: its kept calls and statistics are read.
        expert: which one.
        choices: all but the mask.
        measured: remembers the errors, for a run that is taken up again.
        network: the expert with its kept calls; None if none was kept.

    Raises:
        CalibrationError: none was kept.
    """
    tolerance, choices = choices.span_tolerance, dataclasses.replace(choices, span_tolerance=None)
    if network is None:
        called = any(expert == name for name, _ in calibration.kept.seen)
        raise CalibrationError(
            f"mask='network_search' needs calls of {expert or 'the module'}, and the calibration kept none; "
            + (
                "it keeps calls whose arguments are tensors, numbers, texts, None, or lists, tuples and dicts of "
                "these; calibrate with such arguments, or choose another mask"
                if called
                else "calibrate with enough steps that each expert is called, or choose another mask"
            )
        )
    activations = [cells for key, cells in sorted(calibration.activations.items()) if key[0] == expert]
    errors: dict[Choices, float] = {}

    def measure(candidate: Choices) -> float | None:
        quantized: dict[str, QuantizedWeight] = {}
        for cells in activations:
            weights = calibration.weights(expert, cells.activation.members)
            entry = make_entry(calibration, cells, weights, candidate, False)
            makers = products(entry, dict(zip(entry.linears, weights, strict=True)).__getitem__)
            quantized |= {path: make() for path, make in makers}
        return network.error(quantized)

    def least(candidates: Sequence[Choices]) -> Choices:
        for candidate in candidates:
            error = measured.value(f"error of {expert!r} under {candidate}", functools.partial(measure, candidate))
            if error is not None and math.isfinite(error):
                errors[candidate] = error
            bar.update()
        return min(errors, key=errors.__getitem__, default=choices)

    count, first, others = len(STATISTICS) + len(EXPONENTS), EXPONENTS[0], EXPONENTS[1:]
    with tqdm(total=count, desc=f"mask search {expert}".strip(), unit="candidate", delay=1.0) as bar:
        best = least([dataclasses.replace(choices, mask=kind, weight_exponent=first) for kind in STATISTICS])
        exponents = [dataclasses.replace(best, weight_exponent=exponent) for exponent in others]
        chosen = least([dataclasses.replace(choices, mask=None), *exponents])
    log.info("%s: mask %s, weight exponent %s", expert, chosen.mask, chosen.weight_exponent)
    return dataclasses.replace(chosen, span_tolerance=tolerance)
