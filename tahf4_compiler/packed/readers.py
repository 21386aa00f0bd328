"""Which linears read one activation, as far as structure and names tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from ..format.transforms import hadamard_block, seed_of
from ..model.blocks import block_of, module_blocks
from ..model.linears import inner_linear, named_linears, place_of
from ..pipeline.context import Decision
from ..recipe.apply import recipe_attachments
from ..recipe.recipe import Recipe
from .linear import HiF4Linear
from .plan import attachment_of
from .transform import Transform

__all__ = ["plan_transforms"]

_SELF = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_GATED = (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"))


def plan_transforms(
    model: nn.Module,
    plan: Sequence[Decision],
    recipe: Recipe | None = None,
    *,
    expert: str | None = None,
    rotate_block: int = 64,
) -> dict[str, Transform]:
    """Return the transform of each linear that a plan puts in HiF4 and that is not packed yet, by module path.

    Without a recipe an activation is rotated in Hadamard blocks, with signs seeded by the path of the first linear that
    reads it: what the pass ``rotate`` does to a graph of the whole model.

    Args:
        model: that the plan was made for.
        plan: by :func:`plan_modules`.
        recipe: that the plan was made with.
        expert: as for :func:`plan_modules`.
        rotate_block: widest Hadamard block where no recipe says another; 0 for no rotation.

    Raises:
        RecipeError: the recipe does not fit the model.
    """
    given = recipe_attachments(model, recipe, expert=expert, check_weights=False) if recipe is not None else None
    linears = dict(named_linears(model))
    blocks = module_blocks(model)
    chosen = {d.module: d for d in plan if d.decision == "hif4" and not isinstance(linears[d.module], HiF4Linear)}
    said = {path: attachment_of(path, linears[path], given) for path in chosen}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in chosen:
        attachment = said[path]
        key = ("recipe", attachment.activation) if attachment is not None else _activation(path, model)
        groups[key].append(path)
    order = {path: (_position(path, blocks), _rank(path), i) for i, path in enumerate(linears)}
    found = {}
    for paths in groups.values():
        first = place_of(min(paths, key=order.__getitem__))
        for path in paths:
            attachment = said[path]
            if attachment is None:
                block = hadamard_block(chosen[path].k, rotate_block)
                found[path] = Transform(first, block, seed_of(first) if block else None)
                continue
            seed = attachment.seed if attachment.seed is not None else seed_of(first)
            found[path] = Transform(
                attachment.activation or first,
                attachment.hadamard_block,
                seed if attachment.hadamard_block else None,
                attachment.search,
                attachment.mask if attachment.masked else None,
                attachment.second_moment,
            )
    return {path: found[path] for path in chosen}


def _position(path: str, blocks: Mapping[str, str]) -> int:
    found = block_of(path, blocks)
    return list(blocks).index(found[0]) if found is not None else -1


def _rank(path: str) -> int:
    """Return where a linear stands among its siblings in the order of execution."""
    leaf = place_of(path).rpartition(".")[2]
    return next((names.index(leaf) for names in (*_SELF, _ADDED, *_GATED) if leaf in names), 0)


def _activation(path: str, model: nn.Module) -> tuple[str, str]:
    """Return a key that linears of one activation have in common, as far as structure tells.

    A key too wide or too narrow does no harm: linears of one key have the same random signs, and nothing more. A graph
    may find more, such as text that all blocks read unchanged.
    """
    parent, _, leaf = place_of(path).rpartition(".")
    module = model.get_submodule(parent)
    for triple in _SELF:
        siblings = [inner_linear(getattr(module, name, None)) for name in triple]
        if leaf not in triple or not all(isinstance(sibling, nn.Linear) for sibling in siblings):
            continue
        query, key = siblings[:2]
        crossed = bool(getattr(module, "is_cross_attention", False)) or query.in_features != key.in_features
        if not crossed:
            outside = model.get_submodule(parent.rpartition(".")[0]) if parent else None
            beside = inner_linear(getattr(outside, "proj_mlp", None))
            joined = isinstance(beside, nn.Linear) and beside.in_features == query.in_features
            return (parent.rpartition(".")[0], "proj_mlp") if joined else (parent, "self")
        return (path, "") if leaf == triple[0] else (parent, "context")
    if leaf in _ADDED:
        return parent, "added"
    for names in _GATED:
        if leaf in names:
            return parent, names[0]
    if leaf == "proj_mlp" and (attention := getattr(module, "attn", None)) is not None and hasattr(attention, "to_q"):
        return parent, "proj_mlp"
    return path, ""
