"""Decisions attached to modules, so that they hold wherever and however the module is compiled.

Names are relative to the compiled module under regional compilation (``compile_repeated_blocks``), so
a pattern over full paths is resolved on the whole model beforehand and kept on the module that owns the weight:
it survives ``copy.deepcopy`` and a replaced parameter. At run time it is found by the parameter's identity.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import PatternError
from .options import patterns as check_patterns
from .steps import StepPrecision

__all__ = [
    "Attachment",
    "attach",
    "attached",
    "attached_keep",
    "attached_recipe",
    "keep",
    "leave_as_they_are",
    "linear_weights",
    "packed_weights",
    "refresh",
]


@dataclass(frozen=True)
class Attachment:
    """What was decided for one weight outside of a compilation.

    Two are equal if one lowered graph can serve both: values that are looked up at run time take no part.

    Attributes:
        decision: ``"hif4"`` or ``"high_precision"``.
        reason: why, for the report.
        masked: whether there is a mask.
        hadamard_block: width of the rotation, 0 for none.
        search: how the weight's scales are chosen, see :class:`tahf4_compiler.graph.PackedWeight`.
        activation: name of the activation that the weight reads; weights of one name are transformed alike.
        mask: float32 ``[K]``.
        seed: of the rotation's signs.
        second_moment: float32 ``[K]``, of the activation's channels.
        steps: says whether the step at hand runs in high precision, or None.
    """

    decision: str
    reason: str = field(compare=False)
    masked: bool = False
    hadamard_block: int = 0
    search: str = ""
    activation: str = field(default="", compare=False)
    mask: torch.Tensor | None = field(default=None, compare=False, repr=False)
    seed: int | None = field(default=None, compare=False)
    second_moment: torch.Tensor | None = field(default=None, compare=False, repr=False)
    steps: StepPrecision | None = field(default=None, compare=False, repr=False)


_KEPT = "_tahf4_kept"
_PACKED = "_tahf4_packed"
_RECIPE = "_tahf4_recipe"
_STEP = Attachment("high_precision", "this step runs in high precision")
_attachments: WeakIdKeyDictionary = WeakIdKeyDictionary()


def keep(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Keep linears of a model in high precision, whichever way the model is compiled later.

    Args:
        model: any module; call this before it is compiled.
        patterns: regular expressions, searched in module paths relative to ``model``. They replace those of
            an earlier call; an empty list keeps nothing.

    Returns:
        The module paths that matched.

    Raises:
        PatternError: a pattern is no regular expression or matches no linear.
    """
    checked = check_patterns("keep", patterns)
    paths = [path for path, _ in linear_weights(model)]
    require_matches(checked, paths, f"{type(model).__name__}")
    kept = {
        path: Attachment("high_precision", f"kept by tahf4.keep: {pattern!r} matches {path}")
        for path in paths
        if (pattern := matching(checked, path)) is not None
    }
    attach(model, kept, _KEPT)
    return list(kept)


def attach(model: nn.Module, attachments: Mapping[str, Attachment], kind: str = _RECIPE) -> None:
    """Attach a decision to the owner of each weight, in place of everything of that kind attached before.

    Args:
        model: any module.
        attachments: by module path, as :func:`linear_weights` names them.
        kind: a recipe's, or those of :func:`keep` and of a packed model, which come first.
    """
    for module in model.modules():
        module.__dict__.pop(kind, None)
    for path, attachment in attachments.items():
        owner, name = _owner(model, path)
        owner.__dict__.setdefault(kind, {})[name] = attachment
    refresh(model)


def refresh(model: nn.Module) -> None:
    """Read what is attached to a model's modules again, for the parameters that they own now."""
    for module in model.modules():
        for kind in (_KEPT, _PACKED, _RECIPE):
            for name in module.__dict__.get(kind, {}):
                if (parameter := module._parameters.get(name)) is not None:
                    _attachments[parameter] = (weakref.ref(module), name)


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that owns a weight, and the parameter's name there."""
    for full in (f"{path}.weight", path):
        parent, _, name = full.rpartition(".")
        for candidate, owner in model.named_modules(remove_duplicate=False):
            if candidate.replace("_orig_mod.", "").removesuffix("_orig_mod") == parent and name in owner._parameters:
                return owner, name
    raise PatternError(f"{path} is no parameter of {type(model).__name__}")


def attached(weight: object) -> Attachment | None:
    """Return what holds now for a parameter: what was kept, then what the step says, then the recipe; or None."""
    kept = attached_keep(weight)
    if kept is not None:
        return kept
    recipe = _find(weight, _RECIPE)
    if recipe is not None and recipe.decision == "hif4" and recipe.steps is not None and recipe.steps.high():
        return _STEP
    return recipe


def leave_as_they_are(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Let linears of a packed model stay in high precision wherever it is compiled.

    Args:
        model: packed.
        reasons: by module path, in place of those of an earlier call.
    """
    attach(model, {path: Attachment("high_precision", reason) for path, reason in reasons.items()}, _PACKED)


def attached_keep(weight: object) -> Attachment | None:
    """Return what :func:`keep` says about a parameter, or the model that was packed without it; or None."""
    return _find(weight, _KEPT) or _find(weight, _PACKED)


def attached_recipe(weight: object) -> Attachment | None:
    """Return what a recipe says about a parameter, or None."""
    return _find(weight, _RECIPE)


def _find(weight: object, kind: str) -> Attachment | None:
    if not isinstance(weight, torch.Tensor) or (entry := _attachments.get(weight)) is None:
        return None
    reference, name = entry
    owner = reference()
    held = owner is not None and any(part in owner.__dict__ for part in (_KEPT, _PACKED, _RECIPE))
    if owner is not None and held and owner._parameters.get(name) is weight:
        found: Attachment | None = owner.__dict__.get(kind, {}).get(name)
        return found
    del _attachments[weight]  # the module owns another parameter now, or nothing is attached to it any more
    if owner is not None:
        refresh(owner)
    return None


def linear_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(module path, weight)`` of everything in a model that may be the weight of a linear."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        leaf = name.rpartition(".")[2]
        if parameter.dim() == 2 and leaf.endswith("weight"):
            yield name.replace("_orig_mod.", "").removesuffix(".weight"), parameter


def packed_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(module path, codes)`` of the linears that a model holds in HiF4."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("weight_codes"):
            yield name.replace("_orig_mod.", "").removesuffix(".weight_codes"), parameter


def matching(patterns: Sequence[str], path: str) -> str | None:
    """Return the first pattern that is found in a module path."""
    return next((pattern for pattern in patterns if re.search(pattern, path)), None)


def require_matches(patterns: Sequence[str], paths: Sequence[str], where: str) -> None:
    """Raise :class:`PatternError` for the first pattern that is found in none of the paths."""
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            shown = ", ".join(sorted(paths)[:5]) + (", ..." if len(paths) > 5 else "")
            raise PatternError(
                f"keep pattern {pattern!r} matches none of the {len(paths)} linears of {where} ({shown or 'none'}). "
                "Paths are relative to the compiled module; to name them from the whole model while its blocks are "
                "compiled one by one, call tahf4.keep(model, patterns) first."
            )
