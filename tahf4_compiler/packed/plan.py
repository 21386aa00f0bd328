"""The plan of a model without a graph: which linears run in 4 bits, and what transforms their activations.

Works on module structure alone, so that a model on the meta device is enough. For models whose blocks stand in a
container the decisions are those that the passes ``classify`` and ``plan`` make on the captured graph; which linears
read one activation is told by the names that attention and gated feed-forward modules use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import PackedError
from ..format import hif4
from ..model.attachments import Attachment, attached_keep, attached_recipe, refresh
from ..model.blocks import block_of, module_blocks
from ..model.linears import matching, named_linears, require_matches
from ..model.reasons import Cause, Reason
from ..options import patterns
from ..pipeline.context import Decision
from ..pipeline.rules import MIN_FEATURES, Facts, Role, decide, dtype_obstacle, role_of
from ..recipe.apply import recipe_attachments
from ..recipe.recipe import Recipe
from .linear import HiF4Linear

__all__ = ["plan_modules"]

_READ_BY_PARENT = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)


def plan_modules(
    model: nn.Module,
    recipe: Recipe | None = None,
    keep: Sequence[str] = (),
    *,
    expert: str | None = None,
    check_weights: bool = True,
    min_features: int = MIN_FEATURES,
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
        min_features: linears with fewer input or output features stay in high precision, unless a recipe names them.

    Returns:
        One decision for each linear, in the order of ``named_modules``. ``flops`` are those of one row.

    Raises:
        PatternError: a pattern of ``keep`` is no regular expression or matches no linear.
        RecipeError: the recipe does not fit the model.
    """
    checked = patterns("keep", keep)
    refresh(model)  # a copy has other parameters than those that something was attached to
    linears = dict(named_linears(model))
    require_matches(checked, list(linears), type(model).__name__)
    given = (
        recipe_attachments(model, recipe, expert=expert, check_weights=check_weights) if recipe is not None else None
    )
    blocks = module_blocks(model)
    return [
        _decide(
            path,
            module,
            model,
            checked,
            attachment_of(path, module, given),
            role_of(block_of(path, blocks), not blocks),
            min_features,
        )
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
    role: Role,
    min_features: int,
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
    chosen, reason = decide(Facts(path, k, n, _obstacle(path, module, model), attachment, role), keep, min_features)
    before = n * k * module.weight.element_size()
    return Decision(
        module=path,
        k=k,
        n=n,
        decision="hif4" if chosen else "high_precision",
        reason=reason,
        bytes_before=before,
        bytes_after=after if chosen else before,
        flops=2 * k * n,
    )


def _obstacle(path: str, module: nn.Linear, model: nn.Module) -> Reason | None:
    """Return why a linear cannot be packed, or None."""
    weight = module.weight
    if is_traceable_wrapper_subclass(weight):
        return Reason(Cause.WEIGHT, f"weight: a {type(weight).__name__}, not a plain tensor")
    if type(module) is not nn.Linear:
        text = f"class: a {type(module).__name__}, which may read its weight in another way than nn.Linear"
        return Reason(Cause.CLASS, text)
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, _READ_BY_PARENT):
        return Reason(Cause.CLASS, f"class: {type(parent).__name__} reads the weight itself")
    return dtype_obstacle("weight", weight.dtype)
