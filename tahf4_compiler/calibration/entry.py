"""One activation's entry in a recipe, and the quantized products that an entry stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..format import hif4
from ..format.low_rank import LowRank
from ..format.precision import full_precision
from ..format.spans import joined, parted
from ..pipeline.rules import effective_span
from ..recipe.entries import LinearEntry, RecipeEntry
from ..weights.checksum import checksum
from ..weights.packing import moment_as_quantized
from .branches import with_branches
from .choices import Choices
from .layer import Layer
from .masks import SEARCHED
from .reconstruction import reconstructed
from .seen import Seen
from .sensitivity import QuantizedWeight, sqnr_db, squares
from .spans import widest_span
from .statistics import Cells

__all__ = ["make_entry", "products"]


@full_precision()  # the network runs as the process is set, outside of this
def make_entry(
    calibration: Seen, cells: Cells, weights: list[Tensor], choices: Choices, sensitivity: bool
) -> RecipeEntry:
    """Return the entry of an activation under choices that have no mask left to search over a network.

    Args:
        calibration: that has seen it.
        cells: statistics of the activation.
        weights: ``[N_i, K]``, those of its linears in order.
        choices: see there.
        sensitivity: measure each linear's output error on sample rows.

    Raises:
        CalibrationError: values were not finite, or a search has no sample rows.
    """
    layer, activation = Layer(cells, weights, choices), cells.activation
    block, seed, rows, k = layer.block, layer.seed, layer.rows, activation.channels
    mask: Tensor | None = None
    percentile: float | None = None
    exponent: float | None = None
    if choices.mask in ("max", "percentile", "rms"):
        percentile = {"max": 100.0, "percentile": choices.percentile, "rms": None}[choices.mask]
        exponent = float(choices.weight_exponent)
        mask = layer.mask(percentile, exponent)
    elif choices.mask == "layer_search":
        if not len(rows):
            raise CalibrationError("mask='layer_search' needs sample rows; calibrate with rows=64 or fix the mask")
        best = layer.error(None)
        for percent, alpha in SEARCHED:
            candidate = layer.mask(percent, alpha)
            if (value := layer.error(candidate)) < best:
                best, mask = value, candidate
                percentile, exponent = percent, alpha
    search, packed = choices.scale_search, dict[str, hif4.Packed]()
    span, kept, why = layer.form(mask), (choices.scale_span, choices.rounding), ""
    if search == "reconstruct":
        packed = reconstructed(calibration, cells, weights, mask, seed, block, span)
        search = search if packed else "squared"
    if choices.span_tolerance is not None:
        span, packed, why = widest_span(calibration, layer, mask, search, packed)
        kept = parted(span)
    branches, refused = dict[str, LowRank](), dict[str, str]()
    if choices.low_rank is not None:
        branches, packed, refused = with_branches(calibration, layer, mask, search, packed, span)
    noise = None
    if sensitivity and len(rows):
        noise = _noise(cells, weights, layer.product(mask, search, packed, branches, span))
    seen = sum(sketch.rows for sketch, _ in cells.cells.values())
    linears = {}
    for i, (path, weight) in enumerate(zip(activation.members, weights, strict=True)):
        n = weight.shape[0]
        db, along = noise[i] if noise is not None else (None, ())
        reason = "recipe" + (f": SQNR {db:.1f} dB" if db is not None else "")
        linears[path] = LinearEntry(
            (n, k), int(checksum(weight)), reason=reason, sqnr_db=db, step_sqnr_db=along, flops=2 * seen * n * k,
            activation_bits=choices.activation_bits, no_branch=refused.get(path, ""),
        )  # fmt: skip
    return RecipeEntry(
        linears,
        block,
        seed,
        search,
        percentile,
        exponent,
        mask.cpu() if mask is not None else None,
        layer.moment.cpu().to(torch.bfloat16) if search == "weighted" else None,
        packed,
        branches,
        *kept,
        why,
    )


def _noise(
    cells: Cells, weights: list[Tensor], product: QuantizedWeight
) -> list[tuple[float, tuple[float | None, ...]]]:
    """Return the SQNR of each linear's output in dB, on all sample rows and on those of each part of the schedule."""
    found: list[list[tuple[float, float] | None]] = [[] for _ in weights]
    for group in range(cells.groups):
        rows = cells.rows(group)
        sums = squares(rows, weights, product) if len(rows) else [None] * len(weights)
        for mine, value in zip(found, sums, strict=True):
            mine.append(value)

    def db(parts: Sequence[tuple[float, float]]) -> float:
        return round(sqnr_db(sum(error for error, _ in parts) / max(sum(norm for _, norm in parts), 1e-30)), 3)

    return [
        (db([p for p in parts if p is not None]), tuple(None if p is None else db([p]) for p in parts))
        for parts in found
    ]


def products(
    entry: RecipeEntry, weight_of: Callable[[str], Tensor]
) -> Iterator[tuple[str, Callable[[], QuantizedWeight]]]:
    """Yield for each linear of an entry what makes its quantized product."""

    def make(path: str) -> QuantizedWeight:
        weight = weight_of(path)
        mask = entry.mask.to(weight.device) if entry.mask is not None else None
        moment, importance = entry.second_moment, None
        if moment is not None:
            importance = moment_as_quantized(moment.to(weight.device), mask, entry.hadamard_block)
        packed = entry.packed.get(path)
        if packed is not None:
            packed = hif4.Packed(packed.codes.to(weight.device), packed.scales.to(weight.device), packed.k)
        bits = entry.linears[path].activation_bits
        form = (mask, entry.seed, entry.hadamard_block, entry.search, importance, packed, bits)
        span = joined(effective_span(entry.span, bits, mask is not None, entry.hadamard_block), entry.rounding)
        return QuantizedWeight(weight, *form, entry.low_rank.get(path), span)

    for path in entry.linears:
        yield path, functools.partial(make, path)
