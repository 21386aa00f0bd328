"""From the statistics of a calibration to a recipe: masks, rotations, and how much each linear costs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import CalibrationError
from ..files.memo import Measured
from ..format.spans import check_span
from ..model.parts import class_name
from ..pipeline.order import provenance
from ..recipe.entries import CallError, LinearEntry, RecipeEntry
from ..recipe.recipe import Recipe
from .attention import ATTENTION_TOLERANCE, attention_entries
from .choices import PUBLISHED, Choices, check_choices
from .entry import make_entry, products
from .gaps import unseen, warn_of_range
from .mask_search import search_network
from .seen import Seen
from .sensitivity import Network
from .spans import SPAN_TOLERANCE, idle_span

__all__ = ["make_recipe"]

Networks = Callable[[str], Network | None]


def make_recipe(
    calibration: Seen,
    *,
    mask: str | None = "network_search",
    percentile: float | None = None,
    weight_exponent: float | None = None,
    combine: str = "max",
    rotate: bool = True,
    block: int | None = None,
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
        mask: ``None``; of the ``"max"`` of |x|, a ``"percentile"`` or its root mean square, ``"rms"``;
            ``"layer_search"``: one of these with the exponent of least output error on the sample rows, for each
            activation; ``"network_search"``: one for each expert, of least error of the network's output on the calls
            that the calibration kept.
        percentile: of |x| for ``mask="percentile"``, and for the one that ``"network_search"`` tries; by default the
            calibration's.
        weight_exponent: alpha of :func:`channel_mask` for ``"max"``, ``"percentile"`` and ``"rms"``; by default .5.
        combine: how statistics of step groups and branches give one number a channel of a mask: the ``"max"`` or
            ``"mean"`` of their percentiles or root mean squares, or that of all values ``"merged"``.
        rotate: whether to rotate by a block Hadamard.
        block: the widest Hadamard block, by default 64.
        scale_search: how weights are rounded: ``""``, ``"squared"``, ``"weighted"`` or ``"reconstruct"``
            (:func:`tahf4_compiler.format.reconstruct.reconstruct`; the recipe then holds the packed weights).
        sensitivity: measure each linear's output error on sample rows, over all and along the denoising steps, its
            effect on the network's output (on at most 16 entries of a batch), and the output's error with everything
            quantized in each kept call. Where attentions in 8 bits are measured, the effect of each of them as well.
        high_precision_steps: denoising steps that run in high precision.
        step_activation_bits: 8 or 16, more than ``activation_bits``: these steps keep the weights in HiF4, and their
            activations have so many bits. None: they run with the original weights, and in a packed model with
            activations of 16 bits.
        activation_bits: of all activations: 4 (HiF4), 8 (int8 with a float32 scale for each unit of 64 values) or 16
            (not quantized).
        protect_bits: as for :meth:`Recipe.plan`.
        scale_span: how many units of a row share a level-1 scale, in activations and weights: 1, 2 or 4, or ``"row"``
            for all; other numbers than 1 for ``activation_bits=4``. An activation without mask and rotation, or of
            other than 4 bits, has a scale for each unit; the report of a compilation says so. ``"auto"``: for each
            activation the widest of them whose error of the linears' output on sample rows is within
            ``span_tolerance``; the reason of these linears says the errors. Masks are searched before, and branches of
            low rank added afterwards.
        span_tolerance: for ``scale_span="auto"``: how many dB the error may be above that of a scale for each unit.
            None: 0.8, and a scale for each unit where products on the device of the weights save no time otherwise. A
            number is for any device.
        rounding: of activations and weights: ``"half_away"``, ``"bfloat16_half_away"`` or ``"least_error"``
            (:func:`tahf4_compiler.hif4.quantize`). Reconstructed weights choose their elements by errors, in any.
            None: ``"least_error"``, or ``"half_away"`` where units share a level-1 scale.
        low_rank: a branch of low rank beside each 4-bit product, in 16 bits: its rank in percent of the smaller side of
            the weight, in multiples of 8 and at least 8. A linear whose output error on sample rows it does not lower
            by a twentieth gets none, and its reason says so. None: no branches.
        attention: ``"int8"`` measures the error of each attention in 8 bits, on the calls that the calibration kept.
            Those above the tolerance stay in high precision where the option ``attention`` asks for 8 bits. ``"hif4"``
            measures it with queries and keys in HiF4 as well: those above it there have 8 bits.
            ``"high_precision"`` measures none. None: as the options of the calibration say.
        attention_tolerance: relative squared error of an attention's output.
        budget: as for :meth:`Recipe.plan`.

    Returns:
        The recipe.

    Raises:
        OptionError: a choice is unknown, out of range, or of no effect beside the others.
        CalibrationError: nothing was seen, values were not finite, or a search has no sample rows.
    """
    check_choices(
        mask=mask, percentile=percentile, weight_exponent=weight_exponent, combine=combine, rotate=rotate, block=block,
        scale_search=scale_search, sensitivity=sensitivity, high_precision_steps=high_precision_steps,
        step_activation_bits=step_activation_bits, activation_bits=activation_bits, protect_bits=protect_bits,
        low_rank=low_rank, scale_span=scale_span, span_tolerance=span_tolerance, rounding=rounding,
        attention=attention, attention_tolerance=attention_tolerance, **budget,
    )  # fmt: skip
    if not calibration.activations:
        raise CalibrationError("the calibration saw no activation; call the model inside its `with` block first")
    percent = calibration.percentile if percentile is None else float(percentile)
    exponent = 0.5 if weight_exponent is None else weight_exponent
    column, width = "max" if mask in PUBLISHED else "norm", (64 if block is None else block) if rotate else 0
    tolerance, span = None, 1
    if scale_span == "auto":
        tolerance = SPAN_TOLERANCE if span_tolerance is None else float(span_tolerance)
    else:
        span = check_span(scale_span)
    rounding = rounding or ("least_error" if span == 1 else "half_away")
    form = (scale_search, activation_bits, column, low_rank, span, rounding, tolerance)
    choices = Choices(mask, percent, exponent, combine, width, *form)
    measured = calibration.measured()
    network = functools.cache(functools.partial(_network, calibration))
    found: dict[str, dict[str, RecipeEntry]] = {}
    searched: dict[str, Choices] = {}
    if mask == "network_search":
        for expert in calibration.models:
            searched[expert] = search_network(calibration, expert, choices, measured, network(expert))
    bar = tqdm(sorted(calibration.activations.items()), desc="recipe", unit="activation", delay=1.0)
    for (expert, name), cells in bar:
        weights = calibration.weights(expert, cells.activation.members)
        why = idle_span(weights[0].device) if scale_span == "auto" and span_tolerance is None else ""
        chosen = searched.get(expert, choices)
        if why:  # for this one: an expert may lie on several devices
            chosen = dataclasses.replace(chosen, span_tolerance=None)
        entry = make_entry(calibration, cells, weights, chosen, sensitivity)
        found.setdefault(expert, {})[name] = dataclasses.replace(entry, span_reason=why) if why else entry
        warn_of_range(cells, found[expert][name])
    missing = {
        expert: unseen(calibration, expert, found.get(expert, {}), network)
        for expert in calibration.models
    }
    if sensitivity:
        for expert, entries in found.items():
            spans = [entry.span for entry in entries.values()] if tolerance is not None else ""
            kind = f"effect in {expert!r} under {searched.get(expert, choices)}{spans}:"
            found[expert] = _with_effects(calibration, expert, entries, measured, kind, network)
    made: dict[str, Any] = {
        "tahf4": importlib.metadata.version("tahf4-compiler"),
        "torch": torch.__version__,
        "choices": {
            **choices.used(),
            "rotate": width > 0,
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
    kind = attention or calibration.options.attention
    if kind != "high_precision":
        made["choices"] |= {"attention": kind, "attention_tolerance": attention_tolerance}
        errors = {
            expert: attention_entries(
                calibration, expert, kind, attention_tolerance, network(expert) if sensitivity else None, measured
            )
            for expert in found
        }
        recipe = dataclasses.replace(recipe, attention=errors)
    recipe = recipe.plan(protect_bits=protect_bits, **budget) if budget else recipe
    return dataclasses.replace(recipe, errors=_call_errors(calibration, recipe, network)) if sensitivity else recipe


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
            for path, make in products(entry, functools.partial(_weight, calibration, expert))
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
    return Network(calibration.models[expert], calls, kept=calibration.kept_by_hand(expert)) if calls else None


def _with_effects(
    calibration: Seen, expert: str, entries: Mapping[str, RecipeEntry], measured: Measured, kind: str,
    network_of: Networks,
) -> dict[str, RecipeEntry]:
    network = network_of(expert)
    if network is None:
        return dict(entries)

    weight_of = functools.partial(_weight, calibration, expert)
    makers = {path: make for entry in entries.values() for path, make in products(entry, weight_of)}
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
