"""The plan of a model without a graph: which linears run in 4 bits, and what transforms their activations.

Works on module structure alone, so that a model on the meta device is enough. For models whose blocks stand in a
container the decisions are those that the passes ``classify`` and ``plan`` make on the captured graph; which linears
read one activation is told by the names that attention and gated feed-forward modules use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import PackedError
from ..format import hif4
from ..model.attachments import Attachment, attached_keep, attached_recipe
from ..model.linears import matching, require_matches
from ..model.reasons import Cause, Reason
from ..model.tree import Surroundings
from ..options import patterns
from ..pipeline.context import Decision
from ..recipe.apply import recipe_attachments
from ..recipe.recipe import Recipe
from .blocks import block_of, named_linears, repeated_blocks
from .linear import HiF4Linear

__all__ = ["plan_modules"]

MIN_FEATURES = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_READ_BY_PARENT = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)


def plan_modules(
    model: nn.Module,
    recipe: Recipe | None = None,
    keep: Sequence[str] = (),
    *,
    expert: str | None = None,
    check_weights: bool = True,
) -> list[Decision]:
    """Decide for every ``nn.Linear`` of a model whether it runs in 4 bits, and say why.

    In order: what cannot be packed, what the user keeps, what a recipe decided, what stands on the boundary; all else
    runs in HiF4. Linears that are packed already count as ``"hif4"`` with the reason ``"packed"``.

    Args:
        model: any module, on any device; the meta device will do.
        recipe: see :class:`tahf4_compiler.Recipe`; without one, what :func:`tahf4_compiler.apply_recipe` attached.
        keep: regular expressions, searched in module paths: linears that stay in high precision.
        expert: which expert's part of the recipe belongs to the model.
        check_weights: compare the weights with those that were calibrated (never on the meta device).

    Returns:
        One decision for each linear, in the order of ``named_modules``. ``flops`` are those of one row.

    Raises:
        PatternError: a pattern of ``keep`` is no regular expression or matches no linear.
        RecipeError: the recipe does not fit the model.
    """
    checked = patterns("keep", keep)
    linears = dict(named_linears(model))
    require_matches(checked, list(linears), type(model).__name__)
    given = (
        recipe_attachments(model, recipe, expert=expert, check_weights=check_weights) if recipe is not None else None
    )
    where = Surroundings(model)
    blocks = repeated_blocks(model, where, linears)
    return [
        _decide(path, module, model, checked, attachment_of(path, module, given), block_of(path, blocks), bool(blocks))
        for path, module in linears.items()
    ]


def attachment_of(path: str, module: nn.Linear, given: Mapping[str, Attachment] | None) -> Attachment | None:
    """Return what was kept, else what the recipe says."""
    if isinstance(module, HiF4Linear):
        return None
    kept = attached_keep(module.weight)
    if kept is not None:
        return kept
    return given.get(path) if given is not None else attached_recipe(module.weight)


def _decide(
    path: str,
    module: nn.Linear,
    model: nn.Module,
    keep: Sequence[str],
    attachment: Attachment | None,
    block: tuple[str, str] | None,
    repeated: bool,
) -> Decision:
    n, k = module.out_features, module.in_features
    after = n * hif4.units(k) * hif4.BYTES_PER_UNIT
    if isinstance(module, HiF4Linear):
        if (pattern := matching(keep, path)) is not None:
            raise PackedError(
                f"keep pattern {pattern!r} matches {path}, which is packed: its original weight is gone. "
                "Name it when the model is packed, quantize_(model, keep=[...])."
            )
        size = module.weight_dtype.itemsize
        return Decision(path, k, n, "hif4", Reason(Cause.PACKED, "packed"), n * k * size, after, flops=2 * k * n)
    if block is not None:
        body, reason = True, Reason(Cause.BODY, f"in repeated block {block[0]} ({block[1]})")
    elif not repeated:
        body, reason = True, Reason(Cause.BODY, "the model has no repeated blocks and counts as one block")
    else:
        body, reason = False, Reason(Cause.BOUNDARY, "boundary: outside the repeated blocks")
    high: str | None = _reason_to_keep(path, module, model, keep, attachment)
    if high is None and attachment is None:
        if not body:
            high = reason
        elif min(n, k) < MIN_FEATURES:
            high = Reason(Cause.SMALL, f"shape: {k} -> {n} features, less than {MIN_FEATURES}")
    why: str = attachment.reason if high is None and attachment is not None else high or reason
    before = n * k * module.weight.element_size()
    return Decision(
        module=path,
        k=k,
        n=n,
        decision="hif4" if high is None else "high_precision",
        reason=why,
        bytes_before=before,
        bytes_after=after if high is None else before,
        flops=2 * k * n,
    )


def _reason_to_keep(
    path: str, module: nn.Linear, model: nn.Module, keep: Sequence[str], attachment: Attachment | None
) -> str | None:
    weight = module.weight
    if is_traceable_wrapper_subclass(weight):
        return Reason(Cause.WEIGHT, f"weight: a {type(weight).__name__}, not a plain tensor")
    if type(module) is not nn.Linear:
        return Reason(
            Cause.CLASS, f"class: a {type(module).__name__}, which may read its weight in another way than nn.Linear"
        )
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, _READ_BY_PARENT):
        return Reason(Cause.CLASS, f"class: {type(parent).__name__} reads the weight itself")
    if weight.dtype not in _DTYPES:
        return Reason(Cause.DTYPE, f"dtype: weight is {str(weight.dtype).removeprefix('torch.')}")
    if (pattern := matching(keep, path)) is not None:
        return Reason(Cause.KEPT, f"kept: {pattern!r} matches")
    if attachment is not None and attachment.decision == "high_precision":
        return attachment.reason
    return None
