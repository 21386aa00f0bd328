"""The weights of linears in a model, by module path."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import PatternError

__all__ = [
    "adapters", "linear_weights", "module_around", "named_linears", "names_of", "packed_weights", "place_of",
    "plain_path", "raw_matrices",
]  # fmt: skip


def plain_path(path: str) -> str:
    """Return a module path without what ``torch.compile`` put into it."""
    return path.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".")


def named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears of a model with their module paths."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not is_lazy(module._parameters.get("weight")):  # type: ignore[arg-type]
            yield plain_path(path), module


def linear_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(module path, weight)`` of everything in a model that may be the weight of a linear."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        leaf = name.rpartition(".")[2]
        if not is_lazy(parameter) and parameter.dim() == 2 and leaf.endswith("weight"):
            yield name.replace("_orig_mod.", "").removesuffix(".weight"), parameter


def raw_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(name, matrix)`` of what has another name than a weight, and ``F.linear`` may be called with."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in () if isinstance(module, nn.Linear) else module._parameters.items():
            if parameter is None or is_lazy(parameter) or leaf.endswith("weight"):
                continue
            if parameter.dim() == 2 and parameter.is_floating_point():
                yield ".".join(filter(None, (plain_path(path), leaf))), parameter


def packed_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(module path, codes)`` of the linears that a model holds in HiF4."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("weight_codes"):
            yield name.replace("_orig_mod.", "").removesuffix(".weight_codes"), parameter


_WRAPPED = ("base_layer", "original_module")  # what peft calls the module that it puts an adapter around


def adapters(model: nn.Module) -> dict[str, str]:
    """Return the paths of modules that stand beside a linear and are trained apart from it, with the linear's path.

    These are what a wrapper of peft holds beside the module that it wraps (the matrices of a LoRA), and what an
    ``nn.Linear`` holds inside of itself (those of the older diffusers; parametrizations).
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        wraps = hasattr(module, "adapter_layer_names")
        inner = next((name for name in _WRAPPED if wraps and name in module._modules), None)
        if inner is None and not isinstance(module, nn.Linear):
            continue
        linear, prefix = plain_path(".".join(filter(None, (path, inner)))), f"{path}." if path else ""
        for name, child in module.named_children():
            if name != inner:
                found |= {plain_path(p): linear for p, _ in child.named_modules(prefix=f"{prefix}{name}")}
    return found


def place_of(path: str) -> str:
    """Return the path that a linear has without an adapter of peft around it."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def module_around(paths: Sequence[str]) -> str:
    """Return the path of the innermost module around some linears, of their paths."""
    outer = [path.split(".")[:-1] for path in paths]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*outer, strict=False))
    return ".".join(parts[0] for parts in same)


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the paths of everything that may be the weight of a linear, by its identity: a tied one has several."""
    found: dict[int, list[str]] = defaultdict(list)
    for path, weight in (*linear_weights(model), *raw_matrices(model), *packed_weights(model)):
        found[id(weight)].append(path)
    return found


def matching(patterns: Sequence[str], *paths: str) -> str | None:
    """Return the first pattern that is found in one of the module paths of a linear."""
    return next((pattern for pattern in patterns for path in paths if re.search(pattern, path)), None)


def require_matches(patterns: Sequence[str], paths: Sequence[str], where: str, option: str = "keep") -> None:
    """Raise :class:`PatternError` for the first pattern that is found in none of the paths."""
    paths = sorted(set(paths))
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
            raise PatternError(
                f"{option} pattern {pattern!r} matches none of the {len(paths)} linears of {where} "
                f"({shown or 'none'}). "
                "Paths are relative to the module that was given or compiled"
                + (
                    "; to name them from the whole model while its blocks are compiled one by one, call "
                    "tahf4.keep(model, patterns) first."
                    if option == "keep"
                    else "."
                )
            )
