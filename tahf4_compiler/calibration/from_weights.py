"""A recipe without data: channel masks from the weights alone."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..format.precision import full_precision
from ..format.transforms import SEED, hadamard_block
from ..model.blocks import block_of, module_blocks
from ..model.components import unwrapped_experts
from ..model.linears import adapters, linear_weights, plain_path
from ..model.offloading import offloader
from ..model.parts import class_name, whole
from ..options import Options
from ..pipeline.order import provenance
from ..pipeline.rules import MIN_FEATURES, dtype_obstacle
from ..recipe.entries import LinearEntry, RecipeEntry
from ..recipe.recipe import Recipe
from ..weights.checksum import checksum
from .choices import check_block, check_exponent
from .masks import channel_mask, column_norms

__all__ = ["recipe_from_weights"]

REASON = "recipe: its mask is of the weights alone"
UNREAD = 1e4
"""How large a channel may be that no weight reads, to be as small as the others behind its mask."""
TOLERANCE = 0.4
"""Standard deviation over channels of how the logarithms of two weights' column norms differ, at most, if they share a
mask. k and v of a text are 0.7 and more from a q with outliers; q, k and v of MiniLM are within 0.35."""


@full_precision()
def recipe_from_weights(model: Any, *, weight_exponent: float = 0.5, block: int = 64) -> Recipe:
    """Return a recipe for which nothing has to run: masks from the weights' columns, rotation, searched scales.

    A model that was trained with large channels in an activation often has small weights for them. So the mask of a
    channel is the norm of its weights' column, to a power. In exact arithmetic no mask changes what the model computes.

    Linears of one module that read as many features share a mask, and later one quantization, if their columns are
    nearly alike. The others have a mask each: nothing tells which activation they read.

    Args:
        model: a pipeline (each of its denoisers becomes an expert), or a module, with its weights.
        weight_exponent: alpha in ``mask = norm**alpha``, 0 to 1.
        block: the widest Hadamard block, a power of two; 0 for no rotation.

    Returns:
        The recipe. It has no errors and no effects, so no budget can be planned with it.

    Raises:
        OptionError: a choice is out of range, or the model is neither module nor pipeline.
        RecipeError: weights are offloaded, on the meta device or not finite, or the model has no linear in repeated
            blocks.
    """
    check_exponent(weight_exponent)
    check_block(block)
    models = unwrapped_experts(model)
    found = {}
    for expert, module in models.items():
        entries = [_entry(group, weight_exponent, block) for group in _groups(module)]
        if not entries:
            raise RecipeError(
                f"{expert or type(module).__name__} has no nn.Linear of {MIN_FEATURES} and more features in its "
                "repeated blocks whose weight can be packed: there is nothing to make masks of. Packed linears are "
                "none, and other classes, such as the Conv1D of transformers, have no masks here"
            )
        found[expert] = {next(iter(entry.linears)): entry for entry in entries}
    made = {
        "tahf4": importlib.metadata.version("tahf4-compiler"),
        "torch": torch.__version__,
        "choices": {"mask": "weights", "weight_exponent": weight_exponent, "block": block, "scale_search": "squared"},
        "passes": provenance(Options()),
        "classes": {expert: class_name(module) for expert, module in models.items()},
    }
    return Recipe(found, provenance=made)


def _entry(group: Mapping[str, tuple[Tensor, Tensor]], exponent: float, block: int) -> RecipeEntry:
    """Return the entry of linears that share a mask: weight and norms of its columns by path."""
    norms = torch.stack([norms for _, norms in group.values()]).norm(dim=0)
    if not bool(norms.isfinite().all()):
        raise RecipeError(f"the weights of {', '.join(group)} are too large for a mask: a column's norm is infinite")
    largest = torch.where(norms > 0, 1.0, UNREAD)
    k = len(norms)
    width = hadamard_block(k, block)
    return RecipeEntry(
        {path: LinearEntry((len(w), k), int(checksum(w)), reason=REASON) for path, (w, _) in group.items()},
        width,
        SEED if width else None,
        "squared",
        weight_exponent=float(exponent),
        mask=channel_mask(norms, largest, exponent),
        rounding="least_error",
    )


def _groups(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield linears in repeated blocks that share a mask: whole weight and norms of its columns by path."""
    beside: dict[tuple[str, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for path, held in _weights(model):
        if held.device.type == "meta":
            raise RecipeError(f"{path} is on the meta device and has no values; load the weights first")
        beside[path.rpartition(".")[0], held.shape[1]].append((path, held))
    for members in beside.values():
        groups: list[dict[str, tuple[Tensor, Tensor]]] = []
        for path, parameter in members:
            weight = whole(parameter).detach()
            if not bool(weight.isfinite().all()):
                raise RecipeError(f"the weight of {path} holds NaN or infinite values; check the checkpoint")
            norms = column_norms([weight]).cpu()
            like = next((g for g in groups if _differ(next(iter(g.values()))[1], norms) <= TOLERANCE), None)
            if like is None:
                groups.append(like := {})
            like[path] = weight, norms
        yield from groups


def _differ(norms: Tensor, others: Tensor) -> float:
    """Return how much the columns of two weights differ: see :data:`TOLERANCE`."""
    first, second = (each.clamp(min=1e-8).log() for each in (norms, others))
    return float((first - second).std(correction=0))


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights ``[N, K]`` that linears in repeated blocks read, each once."""
    modules = {plain_path(path): module for path, module in model.named_modules(remove_duplicate=False)}
    blocks, trained, seen = module_blocks(model), adapters(model), set()
    for path, weight in linear_weights(model):
        around, _, leaf = path.rpartition(".")
        joint = leaf == "in_proj_weight" and isinstance(modules.get(around), nn.MultiheadAttention)
        reads = joint or isinstance(modules.get(path), nn.Linear)
        body = not blocks or block_of(f"{path}.", blocks) is not None
        large = dtype_obstacle("weight", weight.dtype) is None and min(weight.shape) >= MIN_FEATURES
        if reads and body and large and path not in trained and id(weight) not in seen:
            if (outer := offloader(model, path)) is not None:
                raise RecipeError(
                    f"{path} is offloaded by {outer or 'the whole model'}. Make and apply the recipe first, and enable "
                    "offloading afterwards."
                )
            seen.add(id(weight))
            yield path, weight
