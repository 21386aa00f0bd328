"""Weights in HiF4, made once for each parameter and found again by its identity.

Dynamo hands one compiled graph to every module of a class, so a graph cannot hold its weights. It asks here at
each call, with the parameters it was called with. An entry lives as long as its parameters do; it is made
again when their contents change.
"""

from __future__ import annotations

import functools
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from tqdm.auto import tqdm

from ..errors import RecipeError
from ..format.hif4 import Packed
from ..format.low_rank import LowRank, remainder
from ..format.reconstruct import Reconstruction
from ..format.transforms import multipliers
from ..graph.inputs import PackedWeight
from ..model.attachments import Attachment, attached_recipe, changes
from .checksum import checksums, refuse_capture
from .flaws import Flaws
from .formats import pack_rows
from .packing import pack_transformed

__all__ = ["PackedStore", "store"]

log = logging.getLogger(__name__)


@dataclass
class _Entry:
    state: tuple[object, ...]
    recipes: tuple[Attachment | None, ...]
    others: tuple[weakref.ref[Tensor], ...]
    packed: Any  # hif4.Packed, or the parts of a plug-in's format by name
    changes: int  # of attachments, when the recipes were looked up


class PackedStore:
    """Packed weights by parameter identity, shared by all graphs of a process. Safe under several threads."""

    def __init__(self) -> None:
        """Start empty."""
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._multipliers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._low_rank: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.RLock()
        self.conversions = 0

    def get(
        self,
        requests: Sequence[tuple[tuple[Tensor, ...], PackedWeight]],
        check: str = "auto",
        name: Callable[[Tensor], str | None] = lambda weight: None,
    ) -> list[Any]:
        """Return one packed weight for each request, converting those that are new or whose contents changed.

        Args:
            requests: ``(weights, how they are transformed)``; the rows of several weights are joined.
            check: how a change is noticed, see :class:`tahf4_compiler.options.Options`.
            name: gives a weight's module path, for warnings about what HiF4 does not hold.

        Raises:
            CaptureError: a weight would have to be packed while a CUDA graph is captured.

        Returns:
            Packed weights in the order of the requests, on the weights' device: :class:`tahf4_compiler.hif4.Packed`,
            or for a plug-in's format its parts by name.
        """
        with self._lock, torch.no_grad():
            states = _states([weights for weights, _ in requests], check)
            found = [self._find(w, how, state) for (w, how), state in zip(requests, states, strict=True)]
            missing = [i for i, packed in enumerate(found) if packed is None]
            if missing:
                refuse_capture()
                flaws = Flaws()
                total = sum(w.numel() for i in missing for w in requests[i][0])
                # Shown only when it takes more than a second.
                with tqdm(total=total, desc="HiF4 weights", unit="value", unit_scale=True, delay=1.0) as bar:
                    for i in missing:
                        weights, how = requests[i]
                        # A weight that two requests name is converted for the first of them.
                        found[i] = self._find(weights, how, states[i]) or self._pack(
                            weights, how, states[i], bar, name, flaws
                        )
                flaws.warn()
            return [packed for packed in found if packed is not None]

    def multiplier(self, weights: tuple[Tensor, ...], how: PackedWeight) -> Tensor:
        """Return the factors of the channels that some weights read: float32 ``[K]`` on the weights' device."""
        first, now = weights[0], changes()
        key = (how.masked, how.seed, first.device)
        with self._lock:
            mine = self._multipliers.setdefault(first, {})
            known = mine.get(key)
            if known is None or known[0] != now:
                recipe = _recipe(first, how)
                if known is None or known[1] is not recipe:
                    factors, _ = multipliers(first.shape[1], *_values(recipe, how))
                    ones = torch.ones(first.shape[1], dtype=torch.float32, device="cpu")
                    made = (factors if factors is not None else ones).to(first.device)
                else:
                    made = known[2]
                known = mine[key] = now, recipe, made
            found: Tensor = known[2]
            return found

    def low_rank(self, weight: Tensor) -> LowRank:
        """Return the branch that a recipe attached to a weight, of the weight's dtype and on its device.

        Raises:
            RecipeError: there is none, or it is that of another weight.
        """
        branch = _branch(weight)
        if branch is None:
            raise RecipeError("a graph runs a low-rank branch, and no recipe gives its weight one; attach the recipe")
        with self._lock:
            known = self._low_rank.get(weight)
            if known is None or known[0] is not branch or (known[1].a.device, known[1].a.dtype) != (
                weight.device, weight.dtype,
            ):  # fmt: skip
                made = LowRank(*(factor.to(weight.device, weight.dtype) for factor in branch))
                known = self._low_rank[weight] = branch, made
            found: LowRank = known[1]
            return found

    def _find(self, weights: tuple[Tensor, ...], how: PackedWeight, state: tuple[object, ...]) -> Any:
        entry = self._entries.get(weights[0], {}).get(_key(weights, how))
        if entry is None or entry.state != state:
            return None
        if entry.changes != (now := changes()):
            if any(map(operator.is_not, entry.recipes, _recipes(weights, how))):
                return None
            entry.changes = now
        same = all(map(operator.is_, [ref() for ref in entry.others], weights[1:]))
        held = next(iter(entry.packed.values())) if isinstance(entry.packed, dict) else entry.packed.codes
        on_device = held.device == weights[0].device
        return entry.packed if same and on_device else None

    def _pack(
        self,
        weights: tuple[Tensor, ...],
        how: PackedWeight,
        state: tuple[object, ...],
        bar: tqdm,
        name: Callable[[Tensor], str | None],
        flaws: Flaws,
    ) -> Any:
        now, recipes = changes(), _recipes(weights, how)
        recipe = recipes[0]
        mask, seed = _values(recipe, how)
        branches = [_branch(weight) if how.rank else None for weight in weights]
        packed: Any
        if how.format:
            multiplier = multipliers(weights[0].shape[1], mask, seed)[1]
            multiplier = multiplier.to(weights[0].device) if multiplier is not None else None
            rest = tuple(remainder(weight, branch) for weight, branch in zip(weights, branches, strict=True))
            packed = pack_rows(how.format, rest, multiplier, how.hadamard_block)
            bar.update(sum(weight.numel() for weight in weights))
        else:
            moment = recipe.second_moment if recipe is not None else None
            parts = []
            for weight, branch in zip(weights, branches, strict=True):
                rounded = _reconstruction(weight, how, mask, seed)
                form = (mask, seed, how.hadamard_block)
                parts.append(pack_transformed(weight, *form, how.search, moment, rounded, branch, how.span))
                path = name(weight) or f"a linear of {weight.shape[1]} -> {weight.shape[0]} features"
                flaws.look(path, remainder(weight, branch), parts[-1], *form)
                bar.update(weight.numel())
            packed = parts[0]
            if len(parts) > 1:
                packed = Packed(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), packed.k)
        self.conversions += len(weights)
        entry = _Entry(state, recipes, tuple(weakref.ref(weight) for weight in weights[1:]), packed, now)
        mine = self._entries.setdefault(weights[0], {})
        for key in [key for key, old in mine.items() if any(ref() is None for ref in old.others)]:
            del mine[key]
        mine[_key(weights, how)] = entry
        return packed


def _key(weights: tuple[Tensor, ...], how: PackedWeight) -> tuple[object, ...]:
    """Tell the groups that begin with one weight apart; identities are checked against the entry's references."""
    return (_transform(how), *map(id, weights[1:]))


@functools.lru_cache(maxsize=1 << 12)
def _transform(how: PackedWeight) -> PackedWeight:
    return replace(how, weights=())


def _recipes(weights: tuple[Tensor, ...], how: PackedWeight) -> tuple[Attachment | None, ...]:
    return tuple(_recipe(weight, how) for weight in weights)


def _recipe(weight: Tensor, how: PackedWeight) -> Attachment | None:
    """Return what is attached to a weight if its packed form depends on it."""
    depends = how.masked or how.seed is not None or how.search in ("weighted", "reconstruct")
    return attached_recipe(weight) if depends or how.rank else None


def _branch(weight: Tensor) -> LowRank | None:
    """Return the branch that a recipe attached to a weight."""
    recipe = attached_recipe(weight)
    branch = recipe.low_rank if recipe is not None else None
    if branch is not None and (branch.b.shape[1], branch.a.shape[0]) != tuple(weight.shape):
        raise RecipeError(
            f"a weight of shape {tuple(weight.shape)} has a low-rank branch of one of "
            f"{(branch.b.shape[1], branch.a.shape[0])}: a rank holds a part of it, or it was replaced. Pack the model "
            "first (tahf4.quantize_), and divide the packed one."
        )
    return branch


def _reconstruction(
    weight: Tensor, how: PackedWeight, mask: Tensor | None, seed: int | None
) -> Reconstruction | None:
    """Return the weight as its recipe rounded it, if the graph transforms it as the recipe did."""
    recipe = attached_recipe(weight) if how.search == "reconstruct" else None
    if recipe is None or (how.hadamard_block, seed) != (recipe.hadamard_block, recipe.seed):
        return None
    if recipe.low_rank is not None and not how.rank:  # it was made of what the branch leaves
        return None
    if mask is None or recipe.mask is None:
        return recipe.reconstruction if mask is recipe.mask else None
    # In a merged product the mask is that of the first weight.
    return recipe.reconstruction if torch.equal(mask, recipe.mask) else None


def _values(recipe: Attachment | None, how: PackedWeight) -> tuple[Tensor | None, int | None]:
    """Return the mask and the seed."""
    seed = how.seed
    if seed is not None and recipe is not None and recipe.seed is not None:
        seed = recipe.seed
    return (recipe.mask if recipe is not None and how.masked else None), seed


def _states(groups: Sequence[tuple[Tensor, ...]], check: str) -> list[tuple[object, ...]]:
    """Return, for each group of weights, what changes when their contents do."""
    weights = [weight for group in groups for weight in group]
    sums = checksums(weights, check)
    states = iter([(w.dtype, tuple(w.shape), total) for w, total in zip(weights, sums, strict=True)])
    return [tuple([next(states) for _ in group]) for group in groups]


store = PackedStore()
"""The store of this process."""
