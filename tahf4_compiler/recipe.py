"""What a calibration decided, as a small file: masks, rotations, decisions, their numbers and where they come from.

A recipe holds no weights. It is attached to a model (:func:`apply_recipe`); the transforms go into the weights
when these are packed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import Attachment, attach, linear_weights
from .calibration import experts
from .errors import RecipeError
from .files import load_tensors, save_tensors
from .packing import checksum
from .sensitivity import check_budget, choose
from .steps import StepPrecision

__all__ = ["CallError", "LinearEntry", "Recipe", "RecipeEntry", "apply_recipe", "recipe_attachments", "recipe_experts"]

FORMAT = "tahf4-recipe-1"


@dataclass(frozen=True)
class LinearEntry:
    """A linear of a recipe.

    Attributes:
        shape: ``(N, K)`` of its weight.
        weight_sum: checksum of the weight that was calibrated.
        decision: ``"hif4"`` or ``"high_precision"``.
        reason: in words, for the report.
        sqnr_db: of its output on calibration rows when it is quantized, or None if it was not measured.
        step_sqnr_db: the same on the rows of each part of the denoising schedule (``step_groups``), None where no row
            was seen; empty if it was not measured.
        effect: relative squared error of the network's output when only it is quantized, or None.
        flops: of the calibration's calls.
    """

    shape: tuple[int, int]
    weight_sum: int
    decision: str = "hif4"
    reason: str = ""
    sqnr_db: float | None = None
    effect: float | None = None
    flops: int = 0
    step_sqnr_db: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class CallError:
    """The error of the network's output in a call that the calibration kept, with all that the recipe says in 4 bits.

    Attributes:
        step: index of the denoising step; for a bare module of the part of the schedule.
        steps: of the generation.
        branch: of guidance.
        error: relative squared error against the original precision. Steps that run in high precision
            (``high_precision_steps``) are measured as if they did not.
    """

    step: int
    steps: int
    branch: str
    error: float


@dataclass(frozen=True)
class RecipeEntry:
    """An activation of a recipe, and the linears that read it.

    Attributes:
        linears: by module path.
        hadamard_block: width of the rotation, 0 for none.
        seed: of its signs.
        search: how scales of the weights are chosen.
        percentile: that the mask was made with, None without a mask.
        weight_exponent: that the mask was made with.
        mask: float32 ``[K]`` or None.
        second_moment: bfloat16 ``[K]`` or None, for ``search="weighted"``.
    """

    linears: Mapping[str, LinearEntry]
    hadamard_block: int = 0
    seed: int | None = None
    search: str = ""
    percentile: float | None = None
    weight_exponent: float | None = None
    mask: Tensor | None = field(default=None, repr=False)
    second_moment: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Recipe:
    """Masks, rotations and decisions for each activation of each expert.

    Attributes:
        experts: ``expert -> name of an activation -> entry``; the expert of a bare module is ``""``.
        high_precision_steps: indices of denoising steps that run in high precision, negative from the end.
        provenance: how it was made.
        errors: of the network's output by expert, in order of the steps; none if they were not measured, or linears
            were planned otherwise since.
    """

    experts: Mapping[str, Mapping[str, RecipeEntry]]
    high_precision_steps: tuple[int, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, tuple[CallError, ...]] = field(default_factory=dict)

    def linears(self, expert: str) -> dict[str, LinearEntry]:
        """Return an expert's linears by module path."""
        return {path: linear for entry in self.experts[expert].values() for path, linear in entry.linears.items()}

    def plan(self, **budget: Any) -> Recipe:
        """Return the recipe with other linears in high precision, chosen by measured effect.

        Args:
            budget: one of ``max_high_precision_linears``, ``max_high_precision_blocks`` (both for each expert) and
                ``min_flops_4bit`` (a share of the FLOPs of the linears in the recipe), see
                :func:`tahf4_compiler.sensitivity.choose`.

        Raises:
            RecipeError: the recipe holds no effects (``sensitivity=False``).
            OptionError: the budget is unknown or out of range.
        """
        check_budget(**budget)
        words = ", ".join(f"{name}={value}" for name, value in budget.items())
        planned = {}
        for expert, entries in self.experts.items():
            linears = self.linears(expert)
            if all(linear.effect is None for linear in linears.values()):
                raise RecipeError("the recipe holds no effects; make it with sensitivity=True to plan with a budget")
            # A few may not be measured: products that are written as no linear. They come last.
            effects = {path: linear.effect or 0.0 for path, linear in linears.items()}
            flops = {path: linear.flops for path, linear in linears.items()}
            kept = choose(effects, flops, _block_of(list(linears)), **budget)
            ranks = {path: i + 1 for i, path in enumerate(sorted(effects, key=lambda p: (-effects[p], p)))}
            planned[expert] = {
                name: dataclasses.replace(
                    entry,
                    linears={
                        path: _decided(linear, path in kept, ranks[path], len(ranks), words)
                        for path, linear in entry.linears.items()
                    },
                )
                for name, entry in entries.items()
            }
        made = {**self.provenance, "budget": dict(budget)}
        return dataclasses.replace(self, experts=planned, provenance=made, errors={})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a JSON header; the same recipe gives the same bytes.

        Raises:
            RecipeError: it cannot be written.
        """
        tensors, entries = {}, []
        for expert, activations in sorted(self.experts.items()):
            for name, entry in sorted(activations.items()):
                prefix = f"{expert}/{name}"
                for part in ("mask", "second_moment"):
                    if (value := getattr(entry, part)) is not None:
                        tensors[f"{prefix}.{part}"] = value
                values = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
                del values["mask"], values["second_moment"]
                values["linears"] = {p: dataclasses.asdict(linear) for p, linear in entry.linears.items()}
                entries.append({"expert": expert, "name": name, **values})
        header = {
            "entries": entries,
            "high_precision_steps": list(self.high_precision_steps),
            "provenance": dict(self.provenance),
            "errors": {expert: [dataclasses.asdict(e) for e in errors] for expert, errors in self.errors.items()},
        }
        save_tensors(Path(path), tensors, FORMAT, header, RecipeError)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file that :meth:`save` wrote. Nothing in it is executed.

        Raises:
            RecipeError: no such file, not a recipe, or of another version.
        """
        tensors, header = load_tensors(Path(path), FORMAT, RecipeError)
        found: dict[str, dict[str, RecipeEntry]] = {}
        try:
            for values in header["entries"]:
                expert, name = values.pop("expert"), values.pop("name")
                linears = {p: _linear(linear) for p, linear in values.pop("linears").items()}
                parts: dict[str, Any] = {
                    part: tensors.get(f"{expert}/{name}.{part}") for part in ("mask", "second_moment")
                }
                entry = RecipeEntry(linears=linears, **values, **parts)
                _check_entry(entry, f"{path}: {expert}/{name}")
                found.setdefault(expert, {})[name] = entry
            errors = {
                expert: tuple(_call_error(entry, f"{path}: {expert}") for entry in listed)
                for expert, listed in header.get("errors", {}).items()
            }
            return cls(found, tuple(header["high_precision_steps"]), header["provenance"], errors)
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} is damaged: its header lacks or misspells {error}") from error


def _linear(values: Mapping[str, Any]) -> LinearEntry:
    along = tuple(values.get("step_sqnr_db", ()))
    return LinearEntry(**{**values, "shape": tuple(values["shape"]), "step_sqnr_db": along})


def _call_error(values: Mapping[str, Any], where: str) -> CallError:
    found = CallError(**values)
    if not (_is_number(found.error) and type(found.step) is type(found.steps) is int and 0 <= found.step < found.steps):
        raise RecipeError(f"{where}: the error of a call is {dict(values)}; the file is damaged or was edited")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_entry(entry: RecipeEntry, where: str) -> None:
    if not all(len(linear.shape) == 2 for linear in entry.linears.values()):
        raise RecipeError(f"{where}: a shape does not have two sizes; the file is damaged")
    ks = {linear.shape[1] for linear in entry.linears.values()}
    k = next(iter(ks), 0)
    for part in (entry.mask, entry.second_moment):
        if len(ks) != 1 or (part is not None and tuple(part.shape) != (k,)):
            raise RecipeError(f"{where}: mask and shapes of the linears do not fit each other; the file is damaged")
    damaged = f"{where}: {{}}; the file is damaged or was edited"
    if entry.mask is not None and entry.mask.dtype != torch.float32:
        raise RecipeError(damaged.format(f"the mask is of {entry.mask.dtype}, expected float32"))
    if entry.search not in ("", "squared", "weighted"):
        raise RecipeError(damaged.format(f"the search is {entry.search!r}"))
    block, padded = entry.hadamard_block, (k + 63) // 64 * 64
    if type(block) is not int or block < 0 or block & (block - 1) or (block and padded % block):
        raise RecipeError(
            damaged.format(f"the Hadamard block is {block!r}, expected a power of two that divides {padded}")
        )
    if (block > 0) != (entry.seed is not None) or (block and not _is_seed(entry.seed)):
        raise RecipeError(damaged.format(f"the seed is {entry.seed!r} with a Hadamard block of {block}"))
    if entry.second_moment is not None and not bool(torch.isfinite(entry.second_moment).all()):
        raise RecipeError(damaged.format("the second moment is not finite"))
    for path, linear in entry.linears.items():
        for value in (linear.sqnr_db, linear.effect, *linear.step_sqnr_db):
            if value is not None and not _is_number(value):
                raise RecipeError(damaged.format(f"an error of {path} is {value!r}, expected a number"))
        if linear.decision not in ("hif4", "high_precision"):
            raise RecipeError(damaged.format(f"the decision of {path} is {linear.decision!r}"))
    if entry.mask is not None and not bool((torch.isfinite(entry.mask) & (entry.mask > 0)).all()):
        raise RecipeError(f"{where}: the mask holds values that are not positive and finite; the file is damaged")


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _decided(linear: LinearEntry, kept: bool, rank: int, count: int, budget: str) -> LinearEntry:
    effect = "not measured" if linear.effect is None else f"{linear.effect:.2e}"
    numbers = f"effect on the output {effect} (rank {rank} of {count})"
    if linear.sqnr_db is not None:
        numbers += f", SQNR {linear.sqnr_db:.1f} dB"
    if kept:
        return dataclasses.replace(linear, decision="high_precision", reason=f"sensitivity: {numbers}; budget {budget}")
    return dataclasses.replace(linear, decision="hif4", reason=f"recipe: {numbers}")


def _block_of(paths: Sequence[str]) -> Callable[[str], str]:
    """Return what names the block of a module path: up to its first number."""

    def block(path: str) -> str:
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        return ".".join(parts[: at + 1]) if at is not None else path

    return block


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
        RecipeError: module paths, shapes or weights are not those of the recipe (the first three are named), or the
            recipe has experts that the model has not.
        OptionError: the model is neither module nor pipeline.
    """
    models = experts(model)
    if recipe is None:
        for module in models.values():
            attach(module, {})
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
        steps = StepPrecision(scheduler if scheduler is not None else model, recipe.high_precision_steps)
    for name, entries in parts.items():
        _check_fits(models[name], entries, check_weights, name)
    for name, entries in parts.items():
        attach(models[name], dict(_attachments(entries, steps)))


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
        name = expert if expert is not None else next(iter(parts), "") if len(parts) == 1 else ""
        if name not in parts:
            raise RecipeError(
                f"the recipe has the experts {', '.join(map(repr, parts)) or 'none'}, not {name!r}; say which one "
                "belongs to this module with expert=..."
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
    entries = recipe_experts(model, {"": model}, recipe, expert)[""]
    _check_fits(model, entries, check_weights, "")
    return dict(_attachments(entries, None))


def _check_fits(model: nn.Module, entries: Mapping[str, RecipeEntry], check_weights: bool, expert: str) -> None:
    weights = dict(linear_weights(model))
    parameters = {name for name, _ in model.named_parameters()}
    wrong = []
    for entry in entries.values():
        for path, linear in entry.linears.items():
            weight = weights.get(path)
            if weight is None:
                packed = f"{path}.weight_codes" in parameters
                wrong.append(f"{path}: {'packed already' if packed else 'no such linear'}")
            elif tuple(weight.shape) != linear.shape:
                wrong.append(f"{path}: shape {tuple(weight.shape)}, expected {linear.shape}")
            elif check_weights and weight.device.type != "meta" and int(checksum(weight)) != linear.weight_sum:
                wrong.append(f"{path}: other weights than those that were calibrated")
    if wrong:
        where = f"{expert} ({type(model).__name__})" if expert else type(model).__name__
        raise RecipeError(
            f"the recipe does not fit {where} in {len(wrong)} linears: {'; '.join(wrong[:3])}. Use the recipe "
            "that was made for this model in this precision; check_weights=False accepts other weights of these shapes."
        )


def _attachments(entries: Mapping[str, RecipeEntry], steps: StepPrecision | None) -> Iterator[tuple[str, Attachment]]:
    for name, entry in entries.items():
        for path, linear in entry.linears.items():
            yield (
                path,
                Attachment(
                    linear.decision,
                    linear.reason,
                    masked=entry.mask is not None,
                    hadamard_block=entry.hadamard_block,
                    search=entry.search,
                    activation=name,
                    mask=entry.mask,
                    seed=entry.seed,
                    second_moment=entry.second_moment,
                    steps=steps,
                ),
            )
