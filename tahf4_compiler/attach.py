"""Decisions attached to modules, so that they hold wherever and however the module is compiled.

Names are relative to the compiled module under regional compilation (``compile_repeated_blocks``), so
a pattern over full paths is resolved on the whole model beforehand and kept on the module that owns the weight:
it survives ``copy.deepcopy`` and a replaced parameter. At run time it is found by the parameter's identity.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import PatternError
from .options import patterns as check_patterns

__all__ = ["Attachment", "attached", "keep", "linear_weights", "refresh"]


@dataclass(frozen=True)
class Attachment:
    """A decision that belongs to one weight.

    Attributes:
        decision: ``"high_precision"``.
        reason: why, for the report.
    """

    decision: str
    reason: str


_ATTRIBUTE = "_tahf4_kept"
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
    weights = dict(linear_weights(model))
    require_matches(checked, list(weights), f"{type(model).__name__}")
    kept = []
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
    for path, weight in weights.items():
        _attachments.pop(weight, None)
        pattern = matching(checked, path)
        if pattern is not None:
            owner, name = _owner(model, path)
            attachment = Attachment("high_precision", f"kept by tahf4.keep: {pattern!r} matches {path}")
            owner.__dict__.setdefault(_ATTRIBUTE, {})[name] = attachment
            kept.append(path)
    refresh(model)
    return kept


def refresh(model: nn.Module) -> None:
    """Read what is attached to a model's modules again, for the parameters that they own now."""
    for module in model.modules():
        for name in module.__dict__.get(_ATTRIBUTE, {}):
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
    """Return what is attached to the module that owns a parameter, or None."""
    if not isinstance(weight, torch.Tensor) or (entry := _attachments.get(weight)) is None:
        return None
    reference, name = entry
    owner = reference()
    found = owner.__dict__.get(_ATTRIBUTE, {}).get(name) if owner is not None else None
    if owner is not None and found is not None and owner._parameters.get(name) is weight:
        return found
    del _attachments[weight]  # the module owns another parameter now, or is kept no more
    if owner is not None:
        refresh(owner)
    return None


def linear_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(module path, weight)`` of everything in a model that may be the weight of a linear."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        leaf = name.rpartition(".")[2]
        if parameter.dim() == 2 and leaf.endswith("weight"):
            yield name.replace("_orig_mod.", "").removesuffix(".weight"), parameter


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
