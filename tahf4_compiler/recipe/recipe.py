"""What a calibration decided, as a small file: masks, rotations, decisions, their numbers and where they come from.

A recipe is attached to a model (:func:`apply_recipe`); the transforms go into the weights when these are packed. With
``scale_search="reconstruct"`` it holds the packed weights themselves, otherwise none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OptionError, RecipeError
from ..files.tensors import load_tensors, save_tensors
from ..format.hif4 import Packed
from ..format.low_rank import LowRank
from ..options import ACTIVATION_BITS
from .budget import check_budget, choose
from .checks import check_entry, check_steps, read_attention, read_call_error, read_linear
from .entries import AttentionEntry, CallError, LinearEntry, RecipeEntry

__all__ = ["Recipe"]

FORMAT = "tahf4-recipe-1"


@dataclass(frozen=True)
class Recipe:
    """Masks, rotations and decisions for each activation of each expert.

    Attributes:
        experts: ``expert -> name of an activation -> entry``; the expert of a bare module is ``""``.
        high_precision_steps: indices of denoising steps that run in high precision, negative from the end.
        provenance: how it was made.
        errors: of the network's output by expert, in order of the steps; none if they were not measured, or linears
            were planned otherwise since.
        step_activation_bits: 8 or 16 if the weights stay in HiF4 in these steps, and the activations have so many bits;
            None for the original weights (a packed model has none: there the activations have 16 bits).
        attention: ``expert -> module path of an attention -> entry`` of those that attention in 8 bits was measured
            for.
    """

    experts: Mapping[str, Mapping[str, RecipeEntry]]
    high_precision_steps: tuple[int, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, tuple[CallError, ...]] = field(default_factory=dict)
    step_activation_bits: int | None = None
    attention: Mapping[str, Mapping[str, AttentionEntry]] = field(default_factory=dict)

    def linears(self, expert: str) -> dict[str, LinearEntry]:
        """Return an expert's linears by module path."""
        return {path: linear for entry in self.experts[expert].values() for path, linear in entry.linears.items()}

    def plan(self, *, protect_bits: int | None = None, **budget: Any) -> Recipe:
        """Return the recipe with other linears in high precision, or with activations in 8 bits, by measured effect.

        A plan for high precision leaves the bits of activations as they are, and a plan for these leaves the linears
        in high precision: one may follow the other. An attention in 8 bits is planned with the linears by the budgets
        in blocks and in FLOPs for high precision; one whose own error is too large stays in high precision anyway.

        Args:
            protect_bits: 8 or 16: the linears that a budget protects keep their weights in HiF4, and their activations
                have so many bits. None: they run in high precision.
            budget: one of ``max_high_precision_linears``, ``max_high_precision_blocks`` (both for each expert),
                ``min_flops_4bit`` and ``max_8bit_flops`` (shares of the FLOPs of the linears in the recipe; the former
                also of the attentions whose effect is in it), see :func:`tahf4_compiler.recipe.budget.choose`.

        Raises:
            RecipeError: the recipe holds no effects (``sensitivity=False``).
            OptionError: the budget is unknown or out of range, or ``protect_bits`` is.
        """
        check_budget(protect_bits=protect_bits, **budget)
        budget = {name: value for name, value in budget.items() if value is not None}
        if protect_bits is not None and (made_with := self._made_with()) is not None and protect_bits <= made_with:
            raise OptionError(
                f"protect_bits={protect_bits} protects nothing: the recipe was made with activations of {made_with} "
                "bits"
            )
        words = ", ".join(f"{name}={value}" for name, value in budget.items())
        bits = 8 if "max_8bit_flops" in budget else protect_bits
        decided = functools.partial(_with_bits, bits, _rest(self._made_with(), bits)) if bits is not None else _decided
        planned, attention = {}, dict(self.attention)
        for expert, entries in self.experts.items():
            linears = self.linears(expert)
            cores = {_core(name): _freed(entry) for name, entry in self.attention.get(expert, {}).items()}
            if all(linear.effect is None for linear in linears.values()):
                raise RecipeError(
                    "the recipe holds no effects; make it with calibration.recipe(sensitivity=True) to plan with a "
                    "budget"
                )
            # A few may not be measured: products that are written as no linear. They come last.
            effects = {path: linear.effect or 0.0 for path, linear in linears.items()}
            flops = {path: linear.flops for path, linear in linears.items()}
            if bits is not None:
                effects = {path: effect for path, effect in effects.items() if linears[path].decision == "hif4"}
            ranks = {path: i + 1 for i, path in enumerate(sorted(effects, key=lambda p: (-effects[p], p)))}
            counted = {} if bits is not None or "max_high_precision_linears" in budget else _measured(cores)
            flops |= {core: entry.flops for core, entry in counted.items()}
            low = {core: entry for core, entry in counted.items() if entry.decision != "high_precision"}
            effects |= {core: entry.effect or 0.0 for core, entry in low.items()}
            kept = choose(
                effects,
                flops,
                _block_of({core: entry.linears[0] for core, entry in counted.items()}),
                attentions={core: entry.linears for core, entry in counted.items()},
                staying=counted.keys() - effects.keys(),
                **budget,
            )
            if bits is None and cores:
                attention[expert] = {
                    name: _kept(cores[_core(name)], words) if _core(name) in kept else cores[_core(name)]
                    for name in self.attention[expert]
                }
            planned[expert] = {
                name: dataclasses.replace(
                    entry,
                    linears={
                        path: decided(linear, path in kept, ranks.get(path, 0), len(ranks), words)
                        for path, linear in entry.linears.items()
                    },
                )
                for name, entry in entries.items()
            }
        made = {**self.provenance, "budget": {**budget, **({"protect_bits": protect_bits} if protect_bits else {})}}
        return dataclasses.replace(self, experts=planned, provenance=made, errors={}, attention=attention)

    def _made_with(self) -> int | None:
        """Return the bits that all activations had when the recipe was made, if it says so."""
        choices = self.provenance.get("choices")
        bits = choices.get("activation_bits") if isinstance(choices, Mapping) else None
        return bits if bits in ACTIVATION_BITS else None

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
                for linear, packed in entry.packed.items():
                    tensors[f"{prefix}/{linear}.weight_codes"] = packed.codes
                    tensors[f"{prefix}/{linear}.weight_scales"] = packed.scales
                for linear, branch in entry.low_rank.items():
                    tensors[f"{prefix}/{linear}.low_rank_a"] = branch.a
                    tensors[f"{prefix}/{linear}.low_rank_b"] = branch.b
                values = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
                del values["mask"], values["second_moment"], values["packed"]
                # Left out where there is none: earlier versions read such a file, and refuse any other.
                if entry.span == 1:
                    del values["span"]
                if entry.rounding == "half_away":
                    del values["rounding"]
                if not entry.span_reason:
                    del values["span_reason"]
                if not values["low_rank"]:
                    del values["low_rank"]
                else:
                    values["low_rank"] = sorted(values["low_rank"])
                values["linears"] = {p: _written(linear) for p, linear in entry.linears.items()}
                entries.append({"expert": expert, "name": name, **values})
        header = {
            "entries": entries,
            "high_precision_steps": list(self.high_precision_steps),
            **({} if (bits := self.step_activation_bits) is None else {"step_activation_bits": bits}),
            "provenance": dict(self.provenance),
            "errors": {expert: [dataclasses.asdict(e) for e in errors] for expert, errors in self.errors.items()},
            **({"attention": _attention(self.attention)} if self.attention else {}),
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
                linears = {p: read_linear(linear) for p, linear in values.pop("linears").items()}
                parts: dict[str, Any] = {
                    part: tensors.get(f"{expert}/{name}.{part}") for part in ("mask", "second_moment")
                }
                weights = {p: f"{expert}/{name}/{p}.weight_" for p in linears}
                packed = {
                    p: Packed(tensors[f"{key}codes"], tensors[f"{key}scales"], linears[p].shape[-1])
                    for p, key in weights.items()
                    if f"{key}codes" in tensors and linears[p].shape
                }
                low_rank = {
                    p: LowRank(tensors[f"{expert}/{name}/{p}.low_rank_a"], tensors[f"{expert}/{name}/{p}.low_rank_b"])
                    for p in values.pop("low_rank", ())
                }
                entry = RecipeEntry(linears=linears, **values, **parts, packed=packed, low_rank=low_rank)
                check_entry(entry, f"{path}: {expert}/{name}")
                found.setdefault(expert, {})[name] = entry
            errors = {
                expert: tuple(read_call_error(entry, f"{path}: {expert}") for entry in listed)
                for expert, listed in header.get("errors", {}).items()
            }
            steps, bits = check_steps(header["high_precision_steps"], header.get("step_activation_bits"), str(path))
            attention = {
                expert: {name: read_attention(entry, f"{path}: {expert}/{name}") for name, entry in entries.items()}
                for expert, entries in header.get("attention", {}).items()
            }
            return cls(found, steps, header["provenance"], errors, bits, attention)
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} is damaged: its header lacks or misspells {error}") from error


def _attention(experts: Mapping[str, Mapping[str, AttentionEntry]]) -> dict[str, Any]:
    """Return the attentions of all experts for the file; what was not measured or planned is left out."""
    later = {"effect": None, "flops": 0, "budget": "", "hif4_sqnr_db": None, "by_error": ""}
    return {
        expert: {
            name: {k: v for k, v in dataclasses.asdict(entry).items() if k not in later or v != later[k]}
            for name, entry in entries.items()
        }
        for expert, entries in experts.items()
    }


def _core(name: str) -> str:
    """Return what a budget calls an attention, which may have the module path of a linear."""
    return f"attention {name}"


def _measured(cores: Mapping[str, AttentionEntry]) -> dict[str, AttentionEntry]:
    return {core: entry for core, entry in cores.items() if entry.effect is not None}


def _freed(entry: AttentionEntry) -> AttentionEntry:
    """Return an attention without what an earlier budget decided."""
    if not entry.budget:
        return entry
    return dataclasses.replace(entry, decision=entry.by_error or "int8", reason="", budget="", by_error="")


def _kept(entry: AttentionEntry, budget: str) -> AttentionEntry:
    other = entry.decision if entry.decision != "int8" else ""
    kept = dataclasses.replace(entry, decision="high_precision", budget=budget, by_error=other)
    return dataclasses.replace(kept, reason=f"sensitivity: {kept.words.partition(': ')[2]}")


def _written(linear: LinearEntry) -> dict[str, Any]:
    """Return a linear for the file; 4 bits and no words are left out, so that earlier versions read it."""
    values = dataclasses.asdict(linear)
    if linear.activation_bits == 4:
        del values["activation_bits"]
    if not linear.no_branch:
        del values["no_branch"]
    return values


def _decided(linear: LinearEntry, kept: bool, rank: int, count: int, budget: str) -> LinearEntry:
    effect = "not measured" if linear.effect is None else f"{linear.effect:.2e}"
    numbers = f"effect on the output {effect} (rank {rank} of {count})"
    if linear.sqnr_db is not None:
        numbers += f", SQNR {linear.sqnr_db:.1f} dB"
    if kept:
        return dataclasses.replace(linear, decision="high_precision", reason=f"sensitivity: {numbers}; budget {budget}")
    return dataclasses.replace(linear, decision="hif4", reason=f"recipe: {numbers}")


def _rest(made_with: int | None, bits: int) -> int:
    """Return the bits of activations that a budget does not choose: those that the recipe was made with, if fewer."""
    return made_with if made_with is not None and made_with < bits else 4


def _with_bits(
    bits: int, rest: int, linear: LinearEntry, chosen: bool, rank: int, count: int, budget: str
) -> LinearEntry:
    if linear.decision != "hif4":
        return linear
    found = _decided(linear, False, rank, count, budget)
    reason = f"{found.reason}; activation in {bits} bits by budget {budget}" if chosen else found.reason
    return dataclasses.replace(found, reason=reason, activation_bits=bits if chosen else rest)


def _block_of(linears: Mapping[str, str]) -> Callable[[str], str]:
    """Return what names the block of a module path: up to its first number.

    Args:
        linears: of each attention, one of its module.
    """

    def block(path: str) -> str:
        path = linears.get(path, path)
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        return ".".join(parts[: at + 1]) if at is not None else path

    return block
