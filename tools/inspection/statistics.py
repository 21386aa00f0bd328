"""What a recipe and the statistics of its calibration say about linears, as plain numbers for a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...calibration.saved import FORMAT
from ...calibration.sketch import LARGEST, SMALLEST, Sketch
from ...errors import CalibrationError
from ...files.tensors import load_tensors
from ...recipe.entries import RecipeEntry
from ...recipe.recipe import Recipe

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """Numbers about the linears of one expert.

    Attributes:
        linears: by module path, what the recipe and the calibration say.
        attentions: in words, what the recipe says about each.
        activations: histograms and spreads by name of the activation, from the calibration.
        steps: how many parts of the schedule the calibration kept apart.
        errors: of the network's output along the steps, from the recipe.
        high_precision_steps: of the recipe.
        provenance: how the recipe was made.
        sources: in words, where the numbers come from.
    """

    linears: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    attentions: Sequence[str] = ()
    activations: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    steps: int = 0
    errors: Sequence[Mapping[str, Any]] = ()
    high_precision_steps: tuple[int, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe | None, calibration: Path | None = None, expert: str | None = None) -> Evidence:
        """Read the part of an expert.

        Args:
            recipe: or None.
            calibration: checkpoint of a calibration, or None.
            expert: component name; None for the only one, or ``""``.

        Raises:
            CalibrationError: the checkpoint cannot be read.
        """
        linears: dict[str, dict[str, Any]] = {}
        sources = []
        errors: list[dict[str, Any]] = []
        attentions: list[str] = []
        percents: dict[str, float] = {}
        if recipe is not None:
            name = _choose(expert, list(recipe.experts))
            for activation, entry in (recipe.experts[name] if name is not None else {}).items():
                percents[activation] = entry.percentile or 99.9
                shared = _entry(activation, entry)
                for path, linear in entry.linears.items():
                    linears[path] = {
                        **shared,
                        "sqnr_db": linear.sqnr_db,
                        "effect": linear.effect,
                        "step_sqnr_db": list(linear.step_sqnr_db),
                    }
            errors = [dataclasses.asdict(error) for error in recipe.errors.get(name or "", ())]
            attentions = [f"{path}: {entry.words}" for path, entry in recipe.attention.get(name or "", {}).items()]
            sources.append(f"recipe: {len(linears)} linears{f' of {name}' if name else ''}")
        activations: dict[str, dict[str, Any]] = {}
        steps = 0
        if calibration is not None:
            activations, steps = _activations(calibration, expert, percents)
            for name, found in activations.items():
                for path in found["members"]:
                    linears.setdefault(path, {})["activation"] = name
            sources.append(f"calibration: {len(activations)} activations, {steps} parts of the schedule")
        made = dict(recipe.provenance) if recipe else {}
        high = recipe.high_precision_steps if recipe is not None else ()
        return cls(linears, attentions, activations, steps, errors, high, made, tuple(sources))


def _choose(expert: str | None, names: list[str]) -> str | None:
    if expert in names:
        return expert
    return names[0] if len(names) == 1 and not expert else None


def _entry(name: str, entry: RecipeEntry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "activation": name,
        "percentile": entry.percentile,
        "weight_exponent": entry.weight_exponent,
        "hadamard_block": entry.hadamard_block,
        "seed": entry.seed,
        "search": entry.search,
    }
    if entry.mask is not None:
        found["mask"] = _spread(entry.mask)
    return found


def _spread(values: Tensor) -> dict[str, float]:
    """Return minimum, median, maximum and the share of channels that differ from the median by 4 times or more."""
    middle = values.median()
    far = (values > 4 * middle) | (values < middle / 4)
    numbers = {"min": values.min(), "median": middle, "max": values.max(), "far": far.float().mean()}
    return {name: _short(float(value)) for name, value in numbers.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _activations(
    path: Path, expert: str | None, percents: Mapping[str, float]
) -> tuple[dict[str, dict[str, Any]], int]:
    tensors, header = load_tensors(path, FORMAT, CalibrationError)
    found: dict[str, dict[str, Any]] = {}
    try:
        chosen = _choose(expert, list(dict.fromkeys(entry["expert"] for entry in header["activations"])))
        for i, entry in enumerate(header["activations"]):
            if entry["expert"] != chosen:
                continue
            parts: dict[int, Sketch] = {}
            for j, (group, _) in enumerate(entry["cells"]):
                prefix = f"{i}.{j}."
                names = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                sketch = Sketch.from_tensors(names)
                if group in parts:
                    parts[group].merge(sketch)
                else:
                    parts[group] = sketch
            percent = percents.get(entry["name"], 99.9)
            found[entry["name"]] = _activation(entry["members"], parts, percent)
        return found, int(header["step_groups"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CalibrationError(f"{path} is damaged: it lacks or misspells {error}") from error


def _activation(members: list[str], parts: Mapping[int, Sketch], percent: float) -> dict[str, Any]:
    order = sorted(parts)
    by_step = [
        {
            "step": group,
            "max": _short(float(parts[group].maxima.max())),
            "percentile": _short(float(parts[group].percentile(percent).max())),
            "median": _short(float(parts[group].percentile(percent).median())),
        }
        for group in order
    ]
    whole = parts[order[0]]
    for group in order[1:]:
        whole.merge(parts[group])
    return {
        "members": members,
        "percent": percent,
        "counts": whole.counts.sum(0).tolist(),
        "low": SMALLEST,
        "high": LARGEST,
        "max": _short(float(whole.maxima.max())),
        "percentile": _short(float(whole.percentile(percent).max())),
        "median": _short(float(whole.percentile(percent).median())),
        "rows": whole.rows,
        "steps": by_step,
    }
