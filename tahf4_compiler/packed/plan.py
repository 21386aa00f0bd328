"""The plan of a model without a graph: which linears run in 4 bits, and what transforms their activations.

Works on module structure alone, so that a model on the meta device is enough. The decisions are those that the passes
``classify`` and ``plan`` make on the captured graph, as far as sizes tell the flow: a container of embedders that stand
side by side, and that read as many features as they write, looks like blocks here. ``docs/concepts.md`` lists where the
two differ.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import PackedError
from ..format import hif4
from ..format.spans import joined, parted
from ..format.transforms import SEED, hadamard_block
from ..model.attachments import Attachment, attached_keep, attached_recipe, refresh
from ..model.blocks import block_of, module_blocks
from ..model.linears import adapters, linear_weights, matching, named_linears, names_of, plain_path, require_matches
from ..model.reasons import Cause, Reason
from ..options import patterns
from ..pipeline.context import Decision, branch_bytes
from ..pipeline.rules import (
    MIN_FEATURES,
    OVERRULED,
    Facts,
    Role,
    adapter_obstacle,
    bias_obstacle,
    decide,
    dtype_obstacle,
    role_of,
    span_obstacle,
    tensor_obstacle,
    with_span,
)
from ..recipe.apply import recipe_attachments
from ..recipe.recipe import Recipe
from .linear import HiF4Linear
from .transform import Transform

__all__ = [
    "NO_LINEARS",
    "READ_BY_PARENT",
    "UNFIT",
    "left_out",
    "plan_modules",
    "plan_transforms",
    "unfit_in_blocks",
    "why_nothing",
]

log = logging.getLogger(__name__)

NO_LINEARS = (nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
"""Modules whose weights are those of no linear."""
READ_BY_PARENT = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
"""Modules that read the weights of linears inside of them themselves."""
UNFIT = frozenset({Cause.WEIGHT, Cause.SHAPE, Cause.DTYPE, Cause.CLASS})
"""Why a linear of a block stays in high precision that nobody chose to leave."""


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
    runs in HiF4. Linears that are packed already count as ``"hif4"`` with the reason ``"packed"``. Name embedders in
    ``keep`` that stand side by side and have the width of the blocks: sizes alone do not tell them from blocks.

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
    named = names_of(model)
    names = {path: named.get(id(_held(linear)), []) for path, linear in linears.items()}
    require_matches(checked, [*linears, *itertools.chain(*names.values())], type(model).__name__)
    given = (
        recipe_attachments(model, recipe, expert=expert, check_weights=check_weights) if recipe is not None else None
    )
    blocks, beside = module_blocks(model), adapters(model)
    one_block = "" if blocks else "the model has no repeated blocks and counts as one block"
    modules = model.named_modules(remove_duplicate=False)  # one with several names is in a block by any of them
    around = {module: block for name, module in modules if (block := block_of(plain_path(name), blocks)) is not None}
    places = ((weight, block_of(path, blocks)) for path, weight in linear_weights(model))
    shared = {id(weight): block for weight, block in places if block is not None}  # one weight may have several names
    has_recipe = given is not None or any(attached_recipe(weight) is not None for _, weight in linear_weights(model))
    others = {
        id(weight): f"{type(owner).__name__} {name}"
        for name, owner in model.named_modules()
        if not isinstance(owner, nn.Linear)
        for weight in owner._parameters.values()
        if weight is not None
    }
    return [
        _decide(
            path,
            module,
            checked,
            adapter_obstacle(beside.get(path)) or _obstacle(path, module, model, others),
            attachment_of(path, module, given),
            role_of(around.get(module) or shared.get(id(module._parameters.get("weight"))), one_block),
            min_features,
            has_recipe,
            names[path],
        )
        for path, module in linears.items()
    ]


def _held(linear: nn.Linear) -> object:
    """Return the parameter that a weight is known by: the codes, where the linear is packed."""
    return linear._parameters.get("weight_codes" if isinstance(linear, HiF4Linear) else "weight")


def attachment_of(path: str, module: nn.Linear, given: Mapping[str, Attachment] | None) -> Attachment | None:
    """Return what was kept, else what the recipe says."""
    if isinstance(module, HiF4Linear):
        return None
    weight = module._parameters.get("weight")
    kept = attached_keep(weight)
    if kept is not None:
        return kept
    return given.get(path) if given is not None else attached_recipe(weight)


def plan_transforms(
    model: nn.Module,
    plan: Sequence[Decision],
    recipe: Recipe | None = None,
    *,
    expert: str | None = None,
    rotate_block: int = 64,
    span: int = 1,
) -> dict[str, Transform]:
    """Return the transform of each linear that a plan puts in HiF4 and that is not packed yet, by module path.

    Without a recipe an activation is rotated in Hadamard blocks, as the pass ``rotate`` does it. The plan is told which
    span a linear has, and why it has not the one that was wanted.

    Args:
        model: that the plan was made for.
        plan: by :func:`plan_modules`.
        recipe: that the plan was made with.
        expert: as for :func:`plan_modules`.
        rotate_block: widest Hadamard block where no recipe says another; 0 for no rotation.
        span: where no recipe says another: a form (:mod:`tahf4_compiler.format.spans`), units that share a level-1
            scale and the rounding.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    given = recipe_attachments(model, recipe, expert=expert, check_weights=False) if recipe is not None else None
    linears = dict(named_linears(model))
    found, overruled = {}, 0
    for decision in plan:
        path = decision.module
        if decision.decision != "hif4" or isinstance(linears[path], HiF4Linear):
            continue
        said = attachment_of(path, linears[path], given)
        block = said.hadamard_block if said is not None else hadamard_block(decision.k, rotate_block)
        seed = said.seed if said is not None and said.seed is not None else SEED
        mask = said.mask if said is not None and said.masked else None
        overruled += said is not None and span not in (1, said.span)
        wanted, decision.rounding = parted(said.span if said is not None else span)
        obstacle = span_obstacle(decision.activation_bits, mask is not None, block) if wanted != 1 else None
        decision.span = wanted if obstacle is None else 1
        decision.reason = with_span(decision.reason, wanted, obstacle)
        found[path] = Transform(
            (said.activation if said is not None else "") or path,
            block,
            seed if block else None,
            said.search if said is not None else "",
            mask,
            said.second_moment if said is not None else None,
            said.reconstruction if said is not None else None,
            decision.activation_bits,
            said.low_rank if said is not None else None,
            decision.rank,
            joined(decision.span, decision.rounding),
        )
    if overruled:
        log.warning("%s: %d linears %s", type(model).__name__, overruled, OVERRULED)
    return found


def why_nothing(model: nn.Module, plan: Sequence[Decision]) -> str:
    """Return why a plan by :func:`plan_modules` puts no linear of a model in 4 bits."""
    counted = [d for d in plan if d.cause is not Cause.ADAPTER]  # an adapter follows what it stands beside
    reasons = Counter(str(d.reason) for d in counted).most_common(3)
    texts = [f"{count} of {len(plan)} linears: {reason}" for reason, count in reasons]
    if any(d.cause is not Cause.BOUNDARY for d in counted):
        return "; ".join(texts)
    blocks = module_blocks(model) if plan else {}
    modules = {f"{plain_path(path)}.": module for path, module in model.named_modules()}
    inside = [module for path, module in modules.items() if not plan or block_of(path, blocks) is not None]
    if any(isinstance(module, torch.jit.ScriptModule) for module in inside):
        what = "it is" if isinstance(model, torch.jit.ScriptModule) else "it holds"
        return "; ".join([*texts, f"{what} TorchScript, of which PyTorch compiles nothing: give what it was made of"])
    found = Counter(
        type(module).__name__
        for module in inside
        if any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
        and not isinstance(module, nn.Linear)
    )
    others = ", ".join(f"{count} {cls}" for cls, count in found.items()) or "no other module has a matrix as its weight"
    what = "its repeated blocks hold no other" if plan else "it holds no"
    return "; ".join([*texts, f"{what} nn.Linear ({others}), and no other module is packed"])


def unfit_in_blocks(model: nn.Module, plan: Sequence[Decision]) -> dict[str, str]:
    """Return the reasons, by path, of linears in a model's repeated blocks that a plan leaves as they cannot be packed.

    One that somebody else quantized is not in high precision, and is none of these.
    """
    unfit = [d for d in plan if d.cause in UNFIT and min(d.k, d.n) >= MIN_FEATURES]
    blocks = module_blocks(model) if unfit else {}
    weights = {path: linear._parameters.get("weight") for path, linear in named_linears(model)}
    return {
        d.module: d.reason
        for d in unfit
        if ((weight := weights[d.module]) is None or weight.is_floating_point())
        and (not blocks or block_of(f"{d.module}.", blocks) is not None)
    }


def left_out(model: nn.Module, matrices: bool = False) -> str:
    """Return what to say about weights in a model's repeated blocks that no plan has; "" if there are none.

    These are batches of matrices, as of experts, which no linear reads whole. Shares of a plan do not count them.

    Args:
        model: any module.
        matrices: whether single matrices that are no weight of an ``nn.Linear`` are such weights, too: a graph finds
            the linears that read them, a tree of modules does not.
    """
    blocks, beside, values = module_blocks(model), adapters(model), 0
    kinds: dict[str, dict[str, int]] = {"batches of matrices, as of experts,": {}, "matrices of no nn.Linear": {}}
    batches, others = kinds.values()
    for name, module in model.named_modules():
        if isinstance(module, HiF4Linear):
            values += module.in_features * module.out_features if block_of(plain_path(name), blocks) else 0
            continue
        for key, weight in module.named_parameters(recurse=False):
            path = plain_path(f"{name}.{key}")
            if block_of(path, blocks) is None:
                continue
            values += weight.numel()
            wide = weight.dim() in (2, 3) and weight.is_floating_point() and min(weight.shape[-2:]) >= MIN_FEATURES
            if not wide or isinstance(module, NO_LINEARS):
                continue
            if weight.dim() == 3:
                batches[path] = weight.numel()
            elif matrices and not isinstance(module, nn.Linear) and plain_path(name) not in beside:
                others[path] = weight.numel()
    return ". ".join(
        f"{len(found)} weights of its repeated blocks are {what} and stay in high precision: "
        f"{', '.join([*found][:3])}{', ...' if len(found) > 3 else ''}. They hold {sum(found.values()) / values:.0%} "
        "of the values there, and no plan or share counts them"
        for what, found in kinds.items()
        if found
    )


def _decide(
    path: str,
    module: nn.Linear,
    keep: Sequence[str],
    obstacle: Reason | None,
    attachment: Attachment | None,
    role: Role,
    min_features: int,
    has_recipe: bool,
    names: Sequence[str],
) -> Decision:
    n, k = module.out_features, module.in_features
    after = n * hif4.units(k) * hif4.BYTES_PER_UNIT
    if isinstance(module, HiF4Linear):
        if (pattern := matching(keep, path, *names)) is not None:
            raise PackedError(
                f"keep pattern {pattern!r} matches {path}, which is packed: its original weight is gone. "
                "Name it when the model is packed, quantize_(model, keep=[...])."
            )
        size = module.weight_dtype.itemsize
        packed = Reason(Cause.PACKED, "packed")
        bits, rank = module.activation_bits, module.rank
        after += branch_bytes(n, k, rank, size)
        found = Decision(path, k, n, "hif4", packed, n * k * size, after, 2 * k * n, activation_bits=bits, rank=rank)
        found.span, found.rounding = module.span if bits == 4 else 1, module.rounding
        return found
    facts = Facts(path, k, n, obstacle, attachment, role, has_recipe=has_recipe, names=names)
    chosen, reason = decide(facts, keep, min_features)
    # A weight that is no parameter is computed when it is read, so its type is taken from what it is computed of.
    held = [module._parameters.get("weight"), *module.parameters(), *module.buffers()]
    size = next((tensor.element_size() for tensor in held if tensor is not None), 0)
    before, rank = n * k * size, attachment.rank if chosen and attachment is not None else 0
    return Decision(
        module=path,
        k=k,
        n=n,
        decision="hif4" if chosen else "high_precision",
        reason=reason,
        bytes_before=before,
        bytes_after=after + branch_bytes(n, k, rank, size) if chosen else before,
        flops=2 * k * n,
        activation_bits=attachment.activation_bits if attachment is not None else 4,
        rank=rank,
    )


def _obstacle(path: str, module: nn.Linear, model: nn.Module, others: Mapping[int, str]) -> Reason | None:
    """Return why a linear cannot be packed, or None; ``others`` names the readers of weights that are no linears."""
    weight = module._parameters.get("weight")
    if weight is None:
        text = "weight: no parameter of the linear; a parametrization, a hook or a property computes it"
        return Reason(Cause.WEIGHT, text)
    if (reader := others.get(id(weight))) is not None:
        return Reason(Cause.WEIGHT, f"weight: {reader} reads it too, and needs it as it is")
    if (reason := tensor_obstacle(weight)) is not None:
        return reason
    if type(module) is not nn.Linear:
        text = f"class: a {type(module).__name__}, which may read its weight in another way than nn.Linear"
        return dtype_obstacle("weight", weight.dtype) or Reason(Cause.CLASS, text)  # graphs mind the type alone
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, READ_BY_PARENT):
        return Reason(Cause.CLASS, f"class: {type(parent).__name__} reads the weight itself")
    if any(getattr(parent, "use_dora", {}).values()):
        return Reason(Cause.CLASS, "class: DoRA reads the weight itself")
    if beyond := sorted(set(module._parameters) - {"weight", "bias"}):
        text = f"class: a Linear with parameters that nn.Linear does not have ({', '.join(beyond)})"
        return Reason(Cause.CLASS, text)
    if tuple(weight.shape) != (want := (module.out_features, module.in_features)):
        return Reason(Cause.SHAPE, f"shape: the weight is {tuple(weight.shape)}, expected {want}")
    if "bias" not in module._parameters and getattr(module, "bias", None) is not None:
        return Reason(Cause.CLASS, "class: its bias is a buffer or a plain attribute, no parameter of the linear")
    bias = module._parameters.get("bias")
    if bias is not None and (reason := bias_obstacle(bias.shape, module.out_features)) is not None:
        return reason
    return dtype_obstacle("weight", weight.dtype)
