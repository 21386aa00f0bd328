"""A recipe without data: channel masks from the weights alone."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, RecipeError
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
    number = isinstance(weight_exponent, int | float) and not isinstance(weight_exponent, bool)
    if not number or not 0 <= weight_exponent <= 1:
        raise OptionError(f"weight_exponent is {weight_exponent!r}; expected a number from 0 to 1")
    if isinstance(block, bool) or not isinstance(block, int) or block < 0 or block & (block - 1):
        raise OptionError(f"block is {block!r}; expected a power of two, or 0 for no rotation")
    models = unwrapped_experts(model)
    found = {}
    for expert, module in models.items():
        entries = [_entry(paths, weights, weight_exponent, block) for paths, weights in _groups(module)]
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


def _entry(paths: Sequence[str], weights: Sequence[Tensor], exponent: float, block: int) -> RecipeEntry:
    norms, k = column_norms(weights).cpu(), weights[0].shape[1]
    if not bool(norms.isfinite().all()):
        raise RecipeError(f"the weights of {', '.join(paths)} are too large for a mask: a column's norm is infinite")
    largest = torch.where(norms > 0, 1.0, UNREAD)
    width = hadamard_block(k, block)
    linears = {
        path: LinearEntry((len(weight), k), int(checksum(weight)), reason=REASON)
        for path, weight in zip(paths, weights, strict=True)
    }
    return RecipeEntry(
        linears,
        width,
        SEED if width else None,
        "squared",
        weight_exponent=float(exponent),
        mask=channel_mask(norms, largest, exponent),
        rounding="least_error",
    )


def _groups(model: nn.Module) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Yield paths and whole weights of linears in repeated blocks that share a mask, some at a time."""
    beside: dict[tuple[str, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for path, held in _weights(model):
        if held.device.type == "meta":
            raise RecipeError(f"{path} is on the meta device and has no values; load the weights first")
        beside[path.rpartition(".")[0], held.shape[1]].append((path, held))
    for members in beside.values():
        groups: list[tuple[Tensor, list[str], list[Tensor]]] = []
        for path, parameter in members:
            weight = whole(parameter).detach()
            if not bool(weight.isfinite().all()):
                raise RecipeError(f"the weight of {path} holds NaN or infinite values; check the checkpoint")
            mine = column_norms([weight]).clamp(min=1e-8).log()
            like = next((g for g in groups if float((mine - g[0]).std(correction=0)) <= TOLERANCE), None)
            if like is None:
                groups.append((mine, [path], [weight]))
            else:
                like[1].append(path)
                like[2].append(weight)
        yield from (group[1:] for group in groups)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights ``[N, K]`` that linears in repeated blocks read, each once."""
    modules = {plain_path(path): module for path, module in model.named_modules(remove_duplicate=False)}
    blocks, trained, seen = module_blocks(model), adapters(model), set()
    for path, weight in linear_weights(model):
        owner = modules.get(path) or modules.get(path.rpartition(".")[0])
        reads = isinstance(owner, nn.Linear) or (
            isinstance(owner, nn.MultiheadAttention) and path.endswith("in_proj_weight")
        )
        body = not blocks or block_of(f"{path}.", blocks) is not None
        large = dtype_obstacle("weight", weight.dtype) is None and min(weight.shape) >= MIN_FEATURES
        if reads and body and large and path not in trained and id(weight) not in seen:
            if (outer := offloader(model, path if path in modules else path.rpartition(".")[0])) is not None:
                raise RecipeError(
                    f"{path} is offloaded by {outer or 'the whole model'}. Make and apply the recipe first, and enable "
                    "offloading afterwards."
                )
            seen.add(id(weight))
            yield path, weight
