"""The plan of a model without a graph: which linears run in 4 bits, and what transforms their activations.

Works on module structure alone, so that a model on the meta device is enough. For models whose blocks stand in a
container the decisions are those that the passes ``classify`` and ``plan`` make on the captured graph; which linears
read one activation is told by the names that attention and gated feed-forward modules use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import hif4
from .attach import Attachment, attached_keep, attached_recipe, matching, require_matches
from .errors import PackedError
from .options import patterns
from .packed.linear import HiF4Linear
from .packing import pack_transformed
from .pass_base import Decision
from .recipe import Recipe, recipe_attachments
from .surroundings import Surroundings
from .transforms import hadamard_block, multipliers, seed_of

__all__ = ["Transform", "plan_modules", "plan_transforms"]

MIN_FEATURES = 64
MIN_LINEARS = 2
MIN_LINEARS_ALONE = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_READ_BY_PARENT = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)

_SELF = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_GATED = (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"))


@dataclass(frozen=True)
class Transform:
    """What stands between an activation and its quantization, and how the weights that read it are packed.

    Attributes:
        activation: name of the activation: the module path of the first linear that reads it. Linears of one name
            have equal multipliers.
        hadamard_block: width of the rotation, 0 for none.
        seed: of the rotation's signs, None for no signs.
        search: how scales of the weights are chosen, see :class:`tahf4_compiler.graph.PackedWeight`.
        mask: float32 ``[K]`` or None.
        second_moment: ``[K]`` or None, for ``search="weighted"``.
    """

    activation: str
    hadamard_block: int = 0
    seed: int | None = None
    search: str = ""
    mask: Tensor | None = field(default=None, repr=False, compare=False)
    second_moment: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def multiplies(self) -> bool:
        """Whether the activation is multiplied at all."""
        return self.mask is not None or self.seed is not None

    def multiplier(self, k: int) -> Tensor | None:
        """Return the factors of the activation's channels, float32 ``[k]`` on the CPU, or None for ones."""
        return multipliers(k, self.mask, self.seed)[0]

    def pack(self, weight: Tensor) -> hif4.Packed:
        """Convert a weight ``[N, K]`` that reads the activation; the result is on the weight's device."""
        return pack_transformed(weight, self.mask, self.seed, self.hadamard_block, self.search, self.second_moment)


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
    linears = dict(_linears(model))
    require_matches(checked, list(linears), type(model).__name__)
    given = (
        recipe_attachments(model, recipe, expert=expert, check_weights=check_weights) if recipe is not None else None
    )
    where = Surroundings(model)
    blocks = _blocks(model, where, linears)
    return [
        _decide(path, module, model, checked, _attachment(path, module, given), _block_of(path, blocks), bool(blocks))
        for path, module in linears.items()
    ]


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
    linears = dict(_linears(model))
    where = Surroundings(model)
    blocks = _blocks(model, where, linears)
    chosen = {d.module: d for d in plan if d.decision == "hif4" and not isinstance(linears[d.module], HiF4Linear)}
    said = {path: _attachment(path, linears[path], given) for path in chosen}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in chosen:
        attachment = said[path]
        key = ("recipe", attachment.activation) if attachment is not None else _activation(path, model)
        groups[key].append(path)
    order = {path: (_position(path, blocks), _rank(path), i) for i, path in enumerate(linears)}
    found = {}
    for paths in groups.values():
        first = min(paths, key=order.__getitem__)
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


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield path.replace("_orig_mod.", ""), module


def _attachment(path: str, module: nn.Linear, given: Mapping[str, Attachment] | None) -> Attachment | None:
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
        return Decision(path, k, n, "hif4", "packed", n * k * size, after, flops=2 * k * n)
    if block is not None:
        body, reason = True, f"in repeated block {block[0]} ({block[1]})"
    elif not repeated:
        body, reason = True, "the model has no repeated blocks and counts as one block"
    else:
        body, reason = False, "boundary: outside the repeated blocks"
    high = _reason_to_keep(path, module, model, keep, attachment)
    if high is None and attachment is None:
        if not body:
            high = reason
        elif min(n, k) < MIN_FEATURES:
            high = f"shape: {k} -> {n} features, less than {MIN_FEATURES}"
    if high is None and attachment is not None:
        reason = attachment.reason
    before = n * k * module.weight.element_size()
    return Decision(
        module=path,
        k=k,
        n=n,
        decision="hif4" if high is None else "high_precision",
        reason=high or reason,
        bytes_before=before,
        bytes_after=after if high is None else before,
        flops=2 * k * n,
    )


def _reason_to_keep(
    path: str, module: nn.Linear, model: nn.Module, keep: Sequence[str], attachment: Attachment | None
) -> str | None:
    weight = module.weight
    if is_traceable_wrapper_subclass(weight):
        return f"weight: a {type(weight).__name__}, not a plain tensor"
    if type(module) is not nn.Linear:
        return f"class: a {type(module).__name__}, which may read its weight in another way than nn.Linear"
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, _READ_BY_PARENT):
        return f"class: {type(parent).__name__} reads the weight itself"
    if weight.dtype not in _DTYPES:
        return f"dtype: weight is {str(weight.dtype).removeprefix('torch.')}"
    if (pattern := matching(keep, path)) is not None:
        return f"kept: {pattern!r} matches"
    if attachment is not None and attachment.decision == "high_precision":
        return attachment.reason
    return None


def _blocks(model: nn.Module, where: Surroundings, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Return ``module path -> class name`` of the outermost repeated blocks, as ``classify`` finds them in a graph."""
    found = {path: cls for members in where.blocks.values() for path, cls in members.items()}
    total = sum(_size(m) for m in linears.values())
    inside: dict[str, list[nn.Linear]] = defaultdict(list)
    for path, linear in linears.items():
        parts = path.split(".")
        for i in range(1, len(parts)):
            inside[".".join(parts[:i])].append(linear)
    weight = {path: sum(map(_size, members)) for path, members in inside.items()}
    modules = {path: model.get_submodule(path) for path in inside}
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for path, module in modules.items():
        if not path.rpartition(".")[2].isdigit() and len(inside[path]) >= MIN_LINEARS:
            shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
            alike[path.rpartition(".")[0], type(module), shapes].append(path)
    for paths in alike.values():  # attributes of one parent that hold nearly all weights
        if len(paths) > 1 and 4 * sum(weight[path] for path in paths) >= 3 * total:
            found.update((path, type(modules[path]).__qualname__) for path in paths)
    for path, module in modules.items():
        # A model of one layer, or of one layer of a kind, has a container for it all the same.
        parent, _, leaf = path.rpartition(".")
        alone = leaf.isdigit() and len(inside[path]) >= MIN_LINEARS_ALONE
        if not alone or path in found or not (found or 2 * weight[path] >= total):
            continue
        beside = [m for p, m in modules.items() if p != path and p.rpartition(".")[0] == parent]
        if not any(type(m) is type(module) for m in beside):
            found[path] = type(module).__qualname__
    return {path: cls for path, cls in found.items() if not any(path.startswith(f"{p}.") for p in found)}


def _size(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _block_of(path: str, blocks: Mapping[str, str]) -> tuple[str, str] | None:
    return next(((block, cls) for block, cls in blocks.items() if path.startswith(f"{block}.")), None)


def _position(path: str, blocks: Mapping[str, str]) -> int:
    found = _block_of(path, blocks)
    return list(blocks).index(found[0]) if found is not None else -1


def _rank(path: str) -> int:
    """Return where a linear stands among its siblings in the order of execution."""
    leaf = path.rpartition(".")[2]
    return next((names.index(leaf) for names in (*_SELF, _ADDED, *_GATED) if leaf in names), 0)


def _activation(path: str, model: nn.Module) -> tuple[str, str]:
    """Return a key that linears of one activation have in common, as far as structure tells.

    A key too wide or too narrow does no harm: linears of one key have the same random signs, and nothing more. A graph
    may find more, such as text that all blocks read unchanged.
    """
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(parent)
    for triple in _SELF:
        if leaf not in triple or not all(isinstance(getattr(module, name, None), nn.Linear) for name in triple):
            continue
        query, key = getattr(module, triple[0]), getattr(module, triple[1])
        crossed = bool(getattr(module, "is_cross_attention", False)) or query.in_features != key.in_features
        if not crossed:
            beside = getattr(model.get_submodule(parent.rpartition(".")[0]), "proj_mlp", None) if parent else None
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
