"""From the statistics of a calibration to a recipe: masks, rotations, and how much each linear costs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..files.memo import Measured
from ..format import hif4
from ..format.low_rank import LowRank
from ..format.precision import full_precision
from ..format.spans import check_span, joined, parted
from ..model.parts import class_name
from ..pipeline.order import provenance
from ..pipeline.rules import effective_span
from ..recipe.entries import CallError, LinearEntry, RecipeEntry
from ..recipe.recipe import Recipe
from ..weights.checksum import checksum
from ..weights.packing import moment_as_quantized
from .attention import ATTENTION_TOLERANCE, attention_entries
from .branches import with_branches
from .choices import Choices, check_choices
from .gaps import unseen, warn_of_range
from .layer import Layer
from .masks import EXPONENTS, SEARCHED
from .reconstruction import reconstructed
from .seen import Seen
from .sensitivity import Network, QuantizedWeight, sqnr_db, squares
from .spans import SPAN_TOLERANCE, widest_span
from .statistics import Cells

__all__ = ["make_recipe"]

log = logging.getLogger(__name__)

Networks = Callable[[str], Network | None]


def make_recipe(
    calibration: Seen,
    *,
    mask: str | None = "network_search",
    percentile: float | None = None,
    weight_exponent: float = 0.5,
    combine: str = "max",
    rotate: bool = True,
    block: int = 64,
    scale_search: str = "reconstruct",
    sensitivity: bool = True,
    high_precision_steps: Sequence[int] = (),
    step_activation_bits: int | None = None,
    activation_bits: int = 4,
    protect_bits: int | None = None,
    low_rank: float | None = None,
    scale_span: int | str = 1,
    span_tolerance: float | None = None,
    rounding: str | None = None,
    attention: str | None = None,
    attention_tolerance: float = ATTENTION_TOLERANCE,
    **budget: Any,
) -> Recipe:
    """Turn statistics into a recipe.

    Args:
        calibration: that has seen the model.
        mask: ``None``; ``"max"`` or ``"percentile"``; ``"layer_search"``: percentile and exponent of least output
            error on the sample rows, for each activation; ``"network_search"``: one percentile and exponent for each
            expert, of least error of the network's output on the calls that the calibration kept.
        percentile: of |x| for ``mask="percentile"``; by default the calibration's.
        weight_exponent: alpha of :func:`channel_mask`.
        combine: how statistics of step groups and branches give one number a channel: the ``"max"`` or ``"mean"`` of
            their percentiles, or the percentile of all values ``"merged"``.
        rotate: whether to rotate by a block Hadamard.
        block: the widest Hadamard block.
        scale_search: how weights are rounded: ``""``, ``"squared"``, ``"weighted"`` or ``"reconstruct"``
            (:func:`tahf4_compiler.format.reconstruct.reconstruct`; the recipe then holds the packed weights).
        sensitivity: measure each linear's output error on sample rows, over all and along the denoising steps, its
            effect on the network's output (on at most 16 entries of a batch), and the output's error with everything
            quantized in each kept call. Where attentions in 8 bits are measured, the effect of each of them as well.
        high_precision_steps: denoising steps that run in high precision.
        step_activation_bits: 8 or 16: these steps keep the weights in HiF4, and their activations have so many bits.
            None: they run with the original weights, and in a packed model with activations of 16 bits.
        activation_bits: of all activations: 4 (HiF4), 8 (int8 with a float32 scale for each unit of 64 values) or 16
            (not quantized).
        protect_bits: as for :meth:`Recipe.plan`.
        scale_span: how many units of a row share a level-1 scale, in activations and weights: 1, 2 or 4, or ``"row"``
            for all. An activation without mask and rotation, or of other than 4 bits, has a scale for each unit; the
            report of a compilation says so. ``"auto"``: for each activation the widest of them whose error of the
            linears' output on sample rows is within ``span_tolerance``; the reason of these linears says the errors.
            Masks are searched before, and branches of low rank added afterwards.
        span_tolerance: for ``scale_span="auto"``: how many dB the error may be above that of a scale for each unit.
            None: 0.8.
        rounding: of activations and weights: ``"half_away"``, ``"bfloat16_half_away"`` or ``"least_error"``
            (:func:`tahf4_compiler.hif4.quantize`). Reconstructed weights choose their elements by errors, in any.
            None: ``"least_error"``, or ``"half_away"`` where units share a level-1 scale.
        low_rank: a branch of low rank beside each 4-bit product, in 16 bits: its rank in percent of the smaller side of
            the weight, in multiples of 8 and at least 8. A linear whose output error on sample rows it does not lower
            by a twentieth gets none, and its reason says so. None: no branches.
        attention: ``"int8"`` measures the error of each attention in 8 bits, on the calls that the calibration kept.
            Those above the tolerance stay in high precision where the option ``attention`` asks for 8 bits.
            ``"high_precision"`` measures none. None: as the options of the calibration say.
        attention_tolerance: relative squared error of an attention's output.
        budget: as for :meth:`Recipe.plan`.

    Returns:
        The recipe.

    Raises:
        OptionError: a choice is unknown or out of range.
        CalibrationError: nothing was seen, values were not finite, or a search has no sample rows.
    """
    check_choices(
        mask=mask, percentile=percentile, weight_exponent=weight_exponent, combine=combine, block=block,
        scale_search=scale_search, high_precision_steps=high_precision_steps, step_activation_bits=step_activation_bits,
        activation_bits=activation_bits, protect_bits=protect_bits, low_rank=low_rank, scale_span=scale_span,
        span_tolerance=span_tolerance, rounding=rounding, attention=attention,
        attention_tolerance=attention_tolerance, **budget,
    )  # fmt: skip
    if not calibration.activations:
        raise CalibrationError("the calibration saw no activation; call the model inside its `with` block first")
    percent = calibration.percentile if percentile is None else float(percentile)
    column, width = "norm" if mask in ("layer_search", "network_search") else "max", block if rotate else 0
    tolerance, span = None, 1
    if scale_span == "auto":
        tolerance = SPAN_TOLERANCE if span_tolerance is None else float(span_tolerance)
    else:
        span = check_span(scale_span)
    rounding = rounding or ("least_error" if span == 1 else "half_away")
    form = (scale_search, activation_bits, column, low_rank, span, rounding, tolerance)
    choices = Choices(mask, percent, weight_exponent, combine, width, *form)
    measured = calibration.measured()
    network = functools.cache(functools.partial(_network, calibration))
    found: dict[str, dict[str, RecipeEntry]] = {}
    searched: dict[str, Choices] = {}
    if mask == "network_search":
        searched = {
            expert: _search_network(calibration, expert, choices, measured, network) for expert in calibration.models
        }
    bar = tqdm(sorted(calibration.activations.items()), desc="recipe", unit="activation", delay=1.0)
    for (expert, name), cells in bar:
        weights = calibration.weights(expert, cells.activation.members)
        chosen = searched.get(expert, choices)
        found.setdefault(expert, {})[name] = _entry(calibration, cells, weights, chosen, sensitivity)
        warn_of_range(cells, found[expert][name])
    missing = {
        expert: unseen(calibration, expert, found.get(expert, {}), network)
        for expert in calibration.models
    }
    if sensitivity:
        for expert, entries in found.items():
            kind = f"effect in {expert!r} under {searched.get(expert, choices)}:"
            found[expert] = _with_effects(calibration, expert, entries, measured, kind, network)
    made: dict[str, Any] = {
        "tahf4": importlib.metadata.version("tahf4-compiler"),
        "torch": torch.__version__,
        "choices": {
            **dataclasses.asdict(choices),
            "rotate": rotate,
            "sensitivity": sensitivity,
        },
        "passes": provenance(calibration.options),
        "calibration": {
            "prompts": len(calibration.prompts),
            "step_groups": calibration.step_groups,
            "rows": calibration.rows,
            "classes": {expert: class_name(module) for expert, module in calibration.models.items()},
        },
    }
    if any(missing.values()):
        made["calibration"]["unseen"] = missing
    recipe = Recipe(found, tuple(high_precision_steps), made, step_activation_bits=step_activation_bits)
    if (attention or calibration.options.attention) == "int8":
        made["choices"] |= {"attention": "int8", "attention_tolerance": attention_tolerance}
        errors = {
            expert: attention_entries(
                calibration, expert, attention_tolerance, network(expert) if sensitivity else None, measured
            )
            for expert in found
        }
        recipe = dataclasses.replace(recipe, attention=errors)
    recipe = recipe.plan(protect_bits=protect_bits, **budget) if budget else recipe
    return dataclasses.replace(recipe, errors=_call_errors(calibration, recipe, network)) if sensitivity else recipe


@full_precision()  # the network runs as the process is set, outside of this
def _entry(
    calibration: Seen, cells: Cells, weights: list[Tensor], choices: Choices, sensitivity: bool
) -> RecipeEntry:
    layer, activation = Layer(cells, weights, choices), cells.activation
    block, seed, rows, k = layer.block, layer.seed, layer.rows, activation.channels
    mask: Tensor | None = None
    percentile: float | None = None
    exponent: float | None = None
    if choices.mask in ("max", "percentile"):
        percentile = 100.0 if choices.mask == "max" else choices.percentile
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


def _search_network(
    calibration: Seen, expert: str, choices: Choices, measured: Measured, network_of: Networks
) -> Choices:
    """Return the choices with the mask of least error of the network's output, everything quantized.

    Spans that are to be chosen are chosen afterwards: masks are compared with a level-1 scale for each unit.
    """
    tolerance, choices = choices.span_tolerance, dataclasses.replace(choices, span_tolerance=None)
    network = network_of(expert)
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
            entry = _entry(calibration, cells, weights, candidate, False)
            makers = _products(entry, dict(zip(entry.linears, weights, strict=True)).__getitem__)
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


def _call_errors(calibration: Seen, recipe: Recipe, network_of: Networks) -> dict[str, tuple[CallError, ...]]:
    """Return the error of the network's output in each kept call, in order of the steps, by expert."""
    found: dict[str, tuple[CallError, ...]] = {}
    for expert, entries in recipe.experts.items():
        network = network_of(expert)
        if network is None:
            continue
        quantized = {
            path: make()
            for entry in entries.values()
            for path, make in _products(entry, functools.partial(_weight, calibration, expert))
            if entry.linears[path].decision == "hif4"
        }
        errors = network.errors(quantized)
        if errors is not None:
            places = calibration.kept.places[expert]
            listed = [
                CallError(p.step, p.steps, p.branch, float(f"{error:.6g}"))
                for p, error in zip(places, errors, strict=True)
            ]
            found[expert] = tuple(sorted(listed, key=lambda e: (e.step / e.steps, e.branch)))
    return found


def _weight(calibration: Seen, expert: str, path: str) -> Tensor:
    return calibration.weights(expert, [path])[0]


def _network(calibration: Seen, expert: str) -> Network | None:
    calls = calibration.kept.calls.get(expert)
    return Network(calibration.models[expert], calls) if calls else None


def _products(
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


def _with_effects(
    calibration: Seen, expert: str, entries: Mapping[str, RecipeEntry], measured: Measured, kind: str,
    network_of: Networks,
) -> dict[str, RecipeEntry]:
    network = network_of(expert)
    if network is None:
        return dict(entries)

    weight_of = functools.partial(_weight, calibration, expert)
    makers = {path: make for entry in entries.values() for path, make in _products(entry, weight_of)}
    effects = network.few().effects(makers, measured, kind)

    def named(linear: LinearEntry, path: str) -> LinearEntry:
        effect = effects.get(path)
        if effect is None:
            return linear
        reason = f"recipe: effect on the output {effect:.2e}"
        if linear.sqnr_db is not None:
            reason += f", SQNR {linear.sqnr_db:.1f} dB"
        return dataclasses.replace(linear, effect=effect, reason=reason)

    return {
        name: dataclasses.replace(entry, linears={p: named(linear, p) for p, linear in entry.linears.items()})
        for name, entry in entries.items()
    }
