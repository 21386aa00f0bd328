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
from .layer import Layer
from .masks import EXPONENTS, SEARCHED
from .seen import Seen
from .sensitivity import Network, QuantizedWeight
from .statistics import Cells

__all__ = ["search_network"]

log = logging.getLogger(__name__)


def search_network(
    calibration: Seen, expert: str, choices: Choices, measured: Measured, network: Network | None
) -> Choices:
    """Return the choices with the mask of least error of the network's output, everything quantized.

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
    candidates = [dataclasses.replace(choices, mask=None)]
    candidates += [
        dataclasses.replace(choices, mask="percentile", percentile=percent, weight_exponent=alpha)
        for alpha, percent in _percentiles(calibration, activations, choices).items()
    ]
    errors: dict[Choices, float] = {}

    def measure(candidate: Choices) -> float | None:
        quantized: dict[str, QuantizedWeight] = {}
        for cells in activations:
            weights = calibration.weights(expert, cells.activation.members)
            entry = make_entry(calibration, cells, weights, candidate, False)
            makers = products(entry, dict(zip(entry.linears, weights, strict=True)).__getitem__)
            quantized |= {path: make() for path, make in makers}
        return network.error(quantized)

    for candidate in tqdm(candidates, desc=f"mask search {expert}".strip(), unit="candidate", delay=1.0):
        error = measured.value(f"error of {expert!r} under {candidate}", functools.partial(measure, candidate))
        if error is not None and math.isfinite(error):
            errors[candidate] = error
    chosen = min(errors, key=errors.__getitem__) if errors else choices
    log.info("%s: mask of percentile %s, weight exponent %s", expert, chosen.percentile, chosen.weight_exponent)
    return dataclasses.replace(chosen, span_tolerance=tolerance)


def _percentiles(calibration: Seen, activations: Sequence[Cells], choices: Choices) -> dict[float, float]:
    """Return for each weight exponent the percentile of least error of the layers, which costs no pass of the network.

    Without sample rows there is no such error, and it is the percentile of the choices.
    """
    if not all(len(cells.rows()) for cells in activations):
        return dict.fromkeys(EXPONENTS, choices.percentile)
    errors = dict.fromkeys(SEARCHED, 0.0)
    for cells in tqdm(activations, desc="masks of layers", unit="activation", delay=1.0):
        layer = Layer(cells, calibration.weights(cells.activation.expert, cells.activation.members), choices)
        for pair in SEARCHED:
            errors[pair] += layer.error(layer.mask(*pair))
    return {exponent: percent for percent, exponent in sorted(errors, key=errors.__getitem__, reverse=True)}
