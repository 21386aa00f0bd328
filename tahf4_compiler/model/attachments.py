"""Decisions attached to modules, so that they hold wherever and however the module is compiled.

Names are relative to the compiled module under regional compilation (``compile_repeated_blocks``), so
a pattern over full paths is resolved on the whole model beforehand and kept on the module that owns the weight:
it survives ``copy.deepcopy`` and a replaced parameter. At run time it is found by the parameter's identity.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import PatternError
from ..format.low_rank import LowRank
from ..format.reconstruct import Reconstruction
from ..options import patterns as check_patterns
from .linears import linear_weights, matching, packed_weights, raw_matrices, require_matches
from .reasons import Cause, Reason, cause_of
from .steps import StepPrecision

__all__ = [
    "ATTENTION",
    "Attachment",
    "attach",
    "attached",
    "attached_attention",
    "attached_keep",
    "attached_recipe",
    "by_step",
    "changes",
    "keep",
    "leave_as_they_are",
    "owner_of",
    "refresh",
    "step_bits",
]


@dataclass(frozen=True)
class Attachment:
    """What was decided for one weight outside of a compilation.

    Two are equal if one lowered graph can serve both: values that are looked up at run time take no part.

    Attributes:
        decision: ``"hif4"`` or ``"high_precision"``; for an attention ``"int8"``, if it may not run in HiF4.
        reason: why, for the report.
        masked: whether there is a mask.
        hadamard_block: width of the rotation, 0 for none.
        search: how the weight's scales are chosen, see :class:`tahf4_compiler.graph.inputs.PackedWeight`.
        activation: name of the activation that the weight reads; weights of one name are transformed alike.
        mask: float32 ``[K]``.
        seed: of the rotation's signs.
        second_moment: float32 ``[K]``, of the activation's channels.
        reconstruction: the weight as the recipe rounded it, for ``search="reconstruct"``.
        activation_bits: of the activation, 4, 8 or 16.
        span: a form (:mod:`tahf4_compiler.format.spans`): units of a row that share a level-1 scale, and the rounding,
            in the activation and the weight.
        rank: of the branch, 0 for none.
        low_rank: the branch beside the 4-bit product.
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
    reconstruction: Reconstruction | None = field(default=None, compare=False, repr=False)
    activation_bits: int = 4
    span: int = 1
    rank: int = 0
    low_rank: LowRank | None = field(default=None, compare=False, repr=False)
    steps: StepPrecision | None = field(default=None, compare=False, repr=False)


_KEPT = "_tahf4_kept"
_PACKED = "_tahf4_packed"
_RECIPE = "_tahf4_recipe"
ATTENTION = "_tahf4_attention"
"""The kind of what is attached to the linears around an attention that stays in high precision, or in int8."""
_KINDS = (_KEPT, _PACKED, _RECIPE, ATTENTION)
_STEP = Attachment("high_precision", Reason(Cause.STEP, "this step runs in high precision"))
_attachments: WeakIdKeyDictionary = WeakIdKeyDictionary()
_changes = 0


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
    paths = [path for path, _ in (*linear_weights(model), *raw_matrices(model))]
    require_matches(checked, paths, f"{type(model).__name__}")
    kept = {
        path: Attachment("high_precision", Reason(Cause.KEPT, f"kept by tahf4.keep: {pattern!r} matches {path}"))
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
        kind: a recipe's, or those of :func:`keep` and of a packed model, which come first; or :data:`ATTENTION`.
    """
    for module in model.modules():
        module.__dict__.pop(kind, None)
    for path, attachment in attachments.items():
        owner, name = _owner(model, path)
        owner.__dict__.setdefault(kind, {})[name] = attachment
    refresh(model)
    _count()


def changes() -> int:
    """Return a number that is another one after anything was attached, or a parameter was found at another module.

    While it stays, :func:`attached` says the same about a parameter that its owner (:func:`owner_of`) still has, but
    for denoising steps.
    """
    return _changes


def owner_of(weight: object) -> tuple[weakref.ref[nn.Module], str] | None:
    """Return the module that something is attached to for a parameter, and the parameter's name there; or None."""
    return _attachments.get(weight) if isinstance(weight, torch.Tensor) else None


def refresh(model: nn.Module) -> None:
    """Read what is attached to a model's modules again, for the parameters that they own now."""
    for module in model.modules():
        for kind in _KINDS:
            for name in module.__dict__.get(kind, {}):
                if (parameter := _parameter(module, name)) is None:
                    continue
                known = _attachments.get(parameter)
                if known is None or known[0]() is not module or known[1] != name:
                    _attachments[parameter] = (weakref.ref(module), name)
                    _count()


def _count() -> None:
    global _changes
    _changes += 1


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    held = module._parameters  # of TorchScript: no dictionary, and without get()
    return held[name] if name in held else None  # noqa: SIM401


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
    found = _find(weight)
    if (kept := found.get(_KEPT) or found.get(_PACKED)) is not None:
        return kept
    return _now(found.get(_RECIPE))


def _now(said: Attachment | None) -> Attachment | None:
    """Return what holds in the step at hand."""
    if said is None or said.decision != "hif4" or said.steps is None or not said.steps.high():
        return said
    bits = said.steps.bits
    if cause_of(said.reason) is Cause.PACKED:
        bits = bits or 16
    if bits is None:
        return _STEP
    reason = Reason(Cause.STEP, f"{said.reason}; this step has activations of {bits} bits")
    return replace(said, reason=reason, activation_bits=max(bits, said.activation_bits))


def by_step(module: nn.Module) -> bool:
    """Whether the bits of a packed linear's activation depend on the step. Dynamo traces this, and guards it."""
    return getattr(module, _RECIPE, None) is not None


def step_bits(module: nn.Module, name: str, bits: int) -> int:
    """Return the bits that an activation has in the step at hand.

    Args:
        module: whose parameter something was attached to.
        name: of the parameter.
        bits: in other steps.

    Raises:
        RecipeError: as :meth:`StepPrecision.high`.
    """
    said = _now(module.__dict__[_RECIPE].get(name))
    return max(bits, said.activation_bits) if said is not None else bits


def leave_as_they_are(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Let linears of a packed model stay in high precision wherever it is compiled.

    So do its other matrices, which a graph may find in a linear. What comes to the model later does not.

    Args:
        model: packed, or a part that is.
        reasons: by module path, in place of those of an earlier call. A linear whose weight is no parameter needs none:
            a graph computes the weight.
    """
    weights = [*linear_weights(model), *raw_matrices(model)]
    found = {path: reasons[path] for path, _ in weights if path in reasons}
    if any(packed_weights(model)):
        decided = {id(weight) for path, weight in weights if path in reasons}  # an embedding may read one, too
        other = Reason(Cause.NOT_PACKED, "not packed: no weight of an nn.Linear")
        found |= {path: other for path, weight in weights if id(weight) not in decided}
    left = {path: Attachment("high_precision", reason) for path, reason in found.items()}
    attach(model, left, _PACKED)


def attached_keep(weight: object) -> Attachment | None:
    """Return what :func:`keep` says about a parameter, or the model that was packed without it; or None."""
    found = _find(weight)
    return found.get(_KEPT) or found.get(_PACKED)


def attached_recipe(weight: object) -> Attachment | None:
    """Return what a recipe says about a parameter, or None."""
    return _find(weight).get(_RECIPE)


def attached_attention(weight: object) -> Attachment | None:
    """Return whether a recipe lets the attention of a linear's module stay in high precision, or in int8; or None."""
    return _find(weight).get(ATTENTION)


def _find(weight: object) -> dict[str, Attachment]:
    """Return what is attached to a parameter, by kind."""
    if not isinstance(weight, torch.Tensor) or (entry := _attachments.get(weight)) is None:
        return {}
    reference, name = entry
    owner = reference()
    held = owner is not None and any(part in owner.__dict__ for part in _KINDS)
    if owner is not None and held and _parameter(owner, name) is weight:
        kinds = ((kind, owner.__dict__.get(kind, {}).get(name)) for kind in _KINDS)
        return {kind: found for kind, found in kinds if found is not None}
    _count()
    del _attachments[weight]  # the module owns another parameter now, or nothing is attached to it any more
    if owner is not None:
        refresh(owner)
    return {}
