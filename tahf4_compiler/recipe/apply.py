"""Attach a recipe to a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import RecipeError
from ..format.reconstruct import Reconstruction
from ..format.spans import joined
from ..model.attachments import ATTENTION, Attachment, attach
from ..model.components import experts
from ..model.linears import linear_weights, place_of
from ..model.offloading import offloader
from ..model.reasons import Cause, Reason
from ..model.steps import StepPrecision
from ..weights.checksum import checksum
from .checks import check_entry
from .entries import AttentionEntry, RecipeEntry
from .recipe import Recipe

__all__ = ["apply_recipe", "recipe_attachments", "recipe_attention", "recipe_experts"]


def apply_recipe(
    model: Any, recipe: Recipe | None, *, expert: str | None = None, check_weights: bool = True, scheduler: Any = None
) -> None:
    """Attach a recipe to a model, in place of an earlier one; compile the model before or after, whole or by blocks.

    Experts that the recipe does not name keep what they have. With ``high_precision_steps`` the steps are those of the
    pipeline that is given here, also after its scheduler is replaced; a copy of the pipeline counts for itself.

    Args:
        model: a pipeline (each expert of the recipe goes to the component of its name), or a module.
        recipe: see :class:`Recipe`; None takes an earlier one off again.
        expert: which expert's part goes to a module, if the recipe was made for a pipeline.
        check_weights: compare the weights' checksums with those that were calibrated. False for a fine-tune or
            a merged adapter, whose activations are nearly the same.
        scheduler: of a bare module, if the recipe has ``high_precision_steps``.

    Raises:
        RecipeError: module paths, shapes or weights are not those of the recipe (the first three are named), the
            recipe has experts that the model has not, or its parts do not fit each other.
        OptionError: the model is neither module nor pipeline.
    """
    models = experts(model)
    if recipe is None:
        for module in models.values():
            attach(module, {})
            attach(module, {}, ATTENTION)
        return
    parts = recipe_experts(model, models, recipe, expert)
    steps = None
    if recipe.high_precision_steps:
        clock = scheduler if scheduler is not None else getattr(model, "scheduler", None)
        if clock is None:
            raise RecipeError(
                f"the recipe runs the steps {list(recipe.high_precision_steps)} in high precision; pass scheduler=..., "
                "so that steps are counted"
            )
        whose = scheduler if scheduler is not None else model
        steps = StepPrecision(whose, recipe.high_precision_steps, recipe.step_activation_bits)
    parts = {name: _as_wrapped(models[name], entries) for name, entries in parts.items()}
    for name, entries in parts.items():
        _check_fits(models[name], entries, check_weights, name)
    for name, entries in parts.items():
        attach(models[name], dict(_attachments(entries, steps)))
        attach(models[name], recipe_attention(models[name], recipe, expert=name or expert), ATTENTION)


def recipe_experts(
    model: Any, models: Mapping[str, nn.Module], recipe: Recipe, expert: str | None
) -> dict[str, Mapping[str, RecipeEntry]]:
    """Return which entries belong to which of a model's modules.

    Args:
        model: a pipeline or module.
        models: its denoisers by name, a bare module under ``""``.
        recipe: see :class:`Recipe`.
        expert: as for :func:`apply_recipe`.

    Raises:
        RecipeError: the recipe has an expert that the model has not.
    """
    parts = dict(recipe.experts)
    if set(models) == {""}:
        name = _only_expert(recipe, expert)
        if name not in parts:
            raise RecipeError(
                f"the recipe has the experts {', '.join(map(repr, parts)) or 'none'}, not {name!r}; say which one "
                "belongs to this module with expert=..., --expert of a command (where a pipeline is loaded: a "
                "TaHF4Config(recipe, expert=...) for each component, in PipelineQuantizationConfig(quant_mapping=...))"
            )
        parts = {"": parts[name]}
    missing = sorted(set(parts) - set(models))
    if missing:
        raise RecipeError(
            f"the recipe has the experts {', '.join(parts)}; {type(model).__name__} has no {missing[0]!r}"
        )
    return parts


def recipe_attachments(
    model: nn.Module, recipe: Recipe, *, expert: str | None = None, check_weights: bool = True
) -> dict[str, Attachment]:
    """Return what a recipe says about a module's linears, by module path, without attaching it.

    Args:
        model: a module; on the meta device its weights are not compared.
        recipe: see :class:`Recipe`.
        expert: as for :func:`apply_recipe`.
        check_weights: as for :func:`apply_recipe`.

    Raises:
        RecipeError: as :func:`apply_recipe`.
    """
    entries = _as_wrapped(model, recipe_experts(model, {"": model}, recipe, expert)[""])
    _check_fits(model, entries, check_weights, "")
    found = dict(_attachments(entries, None))
    weights = dict(linear_weights(model))
    shared = {id(weights[path]): attachment for path, attachment in found.items()}  # one weight, several names
    return {path: shared[id(weight)] for path, weight in weights.items() if id(weight) in shared}


def recipe_attention(model: nn.Module, recipe: Recipe, *, expert: str | None = None) -> dict[str, Attachment]:
    """Return what a recipe says about the linears around attentions, by module path.

    Args:
        model: a module.
        recipe: see :class:`Recipe`.
        expert: as for :func:`apply_recipe`.

    Returns:
        Of attentions that stay in high precision, and of those that stay in int8 where HiF4 is asked for.
    """
    known = dict(linear_weights(model))
    return {
        now: Attachment(entry.decision, Reason(Cause.SENSITIVITY, _why(entry)))
        for entry in recipe.attention.get(_only_expert(recipe, expert), {}).values()
        if entry.decision == "high_precision" or _too_few(entry)
        for path in entry.linears
        if (now := _path_now(path, known)) in known
    }


def _too_few(entry: AttentionEntry) -> bool:
    """Return whether HiF4 was measured for the queries and keys of an attention in int8, and is too few bits."""
    return entry.decision == "int8" and entry.hif4_sqnr_db is not None


def _why(entry: AttentionEntry) -> str:
    return f"sensitivity: SQNR {entry.hif4_sqnr_db:.1f} dB in HiF4" if _too_few(entry) else entry.reason


def _only_expert(recipe: Recipe, expert: str | None) -> str:
    """Return the name of the expert that a module is, which a recipe of one expert need not be told."""
    return expert if expert is not None else next(iter(recipe.experts), "") if len(recipe.experts) == 1 else ""


def _path_now(path: str, known: Container[str]) -> str:
    """Return the path that a linear has now: an adapter of peft moves one to ``base_layer``, or did."""
    return next((p for p in (path, f"{path}.base_layer", place_of(path)) if p in known), path)


def _as_wrapped(model: nn.Module, entries: Mapping[str, RecipeEntry]) -> Mapping[str, RecipeEntry]:
    """Return entries with the paths that linears have now."""
    path_now = functools.partial(_path_now, known=dict(linear_weights(model)))
    return {
        name: dataclasses.replace(
            entry,
            linears={path_now(path): linear for path, linear in entry.linears.items()},
            packed={path_now(path): packed for path, packed in entry.packed.items()},
            low_rank={path_now(path): branch for path, branch in entry.low_rank.items()},
        )
        for name, entry in entries.items()
    }


def _check_fits(model: nn.Module, entries: Mapping[str, RecipeEntry], check_weights: bool, expert: str) -> None:
    weights = dict(linear_weights(model))
    parameters = {name for name, _ in model.named_parameters()}
    wrong = []
    for name, entry in entries.items():
        where = f"{expert}/{name}" if expert else name
        check_entry(entry, where, "the recipe was made or changed by hand: make it with a calibration")
        for path, linear in entry.linears.items():
            weight = weights.get(path)
            if weight is None:
                packed = f"{path}.weight_codes" in parameters
                wrong.append(f"{path}: {'packed already' if packed else 'no such linear'}")
            elif tuple(weight.shape) != linear.shape:
                wrong.append(f"{path}: shape {tuple(weight.shape)}, expected {linear.shape}")
            elif check_weights and weight.device.type != "meta" and int(checksum(weight)) != linear.weight_sum:
                hint = " (it is offloaded: apply the recipe before)" if offloader(model, path) is not None else ""
                wrong.append(f"{path}: other weights than those that were calibrated{hint}")
    if wrong:
        where = f"{expert} ({type(model).__name__})" if expert else type(model).__name__
        raise RecipeError(
            f"the recipe does not fit {where} in {len(wrong)} linears: {'; '.join(wrong[:3])}. Use the recipe "
            "that was made for this model in this precision; check_weights=False accepts other weights of these shapes."
        )


def _attachments(entries: Mapping[str, RecipeEntry], steps: StepPrecision | None) -> Iterator[tuple[str, Attachment]]:
    for name, entry in entries.items():
        for path, linear in entry.linears.items():
            branch = entry.low_rank.get(path)
            packed = linear.decision == "hif4"
            words = (linear.reason, linear.no_branch, entry.span_reason if packed else "")
            yield (
                path,
                Attachment(
                    linear.decision,
                    Reason(Cause.RECIPE if packed else Cause.SENSITIVITY, "; ".join(filter(None, words))),
                    masked=entry.mask is not None,
                    hadamard_block=entry.hadamard_block,
                    search=entry.search,
                    activation=name,
                    mask=entry.mask,
                    seed=entry.seed,
                    second_moment=entry.second_moment,
                    reconstruction=(
                        Reconstruction(entry.packed[path], linear.weight_sum) if path in entry.packed else None
                    ),
                    activation_bits=linear.activation_bits,
                    span=joined(entry.span, entry.rounding),
                    low_rank=branch,
                    rank=branch.rank if branch is not None else 0,
                    steps=steps,
                ),
            )
