"""The repeated blocks of a model, by module structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import nn

from ..model.tree import Surroundings

MIN_LINEARS = 2
MIN_LINEARS_ALONE = 4


def named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears of a model with their module paths."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield path.replace("_orig_mod.", ""), module


def repeated_blocks(model: nn.Module, where: Surroundings, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
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


def block_of(path: str, blocks: Mapping[str, str]) -> tuple[str, str] | None:
    """Return path and class name of the block around a module path, or None."""
    return next(((block, cls) for block, cls in blocks.items() if path.startswith(f"{block}.")), None)
