"""The module that a graph is a part of: full paths of its weights and its repeated containers.

A graph is not always a whole model. After a graph break it is a piece; where a break lies in a loop over blocks,
Dynamo compiles the frames below one by one, each with paths of its own. What is kept and what is
boundary must not depend on that, so both are decided by a weight's path in the module that was compiled.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .attachments import refresh
from .linears import linear_weights, packed_weights

__all__ = ["Surroundings"]

_MIN_LINEARS = 2


class Surroundings:
    """Paths and repeated containers of the compiled module. Holds no strong reference to it.

    Attributes:
        linear_paths: paths of everything that may be the weight of a linear; empty if the module is unknown.
        blocks: ``container path -> {member path: class name}`` for the outermost containers that have
            several members of one class with at least two linears each.
    """

    def __init__(self, module: nn.Module | None) -> None:
        """Read a module, or nothing."""
        self._paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._roots: list[weakref.ref[nn.Module]] = []
        self.linear_paths: list[str] = []
        self.blocks: dict[str, dict[str, str]] = {}
        if module is not None:
            self.add(module)
            self.linear_paths = [path for path, _ in (*linear_weights(module), *packed_weights(module))]
            self.blocks = _containers(module)

    @classmethod
    def find(cls, root: nn.Module | None) -> Surroundings:
        """Return the surroundings of a graph that Dynamo is compiling.

        Args:
            root: the module whose frame is compiled.
        """
        return cls(_compiled_module(root) or root)

    def add(self, module: nn.Module) -> None:
        """Remember the paths of a module's weights."""
        self.watch(module)
        for path, weight in (*linear_weights(module), *packed_weights(module)):
            self._paths[weight] = path

    def watch(self, module: nn.Module) -> None:
        """Read what is attached to a module, now and whenever a parameter is new."""
        self._roots.append(weakref.ref(module))
        refresh(module)

    def path(self, weight: object) -> str | None:
        """Return the module path of a weight, or None if it belongs to another module."""
        return self._paths.get(weight) if isinstance(weight, torch.Tensor) else None

    def block_of(self, path: str) -> tuple[str, str] | None:
        """Return ``(block path, class name)`` of the repeated block around a module path, if there is one."""
        for members in self.blocks.values():
            for member, kind in members.items():
                if path.startswith(f"{member}."):
                    return member, kind
        return None

    def learn(self, weights: Sequence[object]) -> None:
        """At run time, look again for weights that are new: another module's of the class, or replaced ones."""
        for reference in self._roots:
            if (root := reference()) is not None:
                refresh(root)
        for weight in weights:
            if self.path(weight) is None and (module := _compiled_module(weight)) is not None:
                self.add(module)


def _compiled_module(part: object) -> nn.Module | None:
    """Return the module on the call stack that was compiled and holds a module or parameter."""
    if part is None:
        return None
    frame = sys._getframe(1)
    outermost: nn.Module | None = None
    while frame is not None:
        called = frame.f_locals.get("self")
        if isinstance(called, nn.Module):
            module: nn.Module = getattr(called, "_orig_mod", called)
            if _holds(module, part):
                outermost = module
                if module._compiled_call_impl is not None or module is not called:
                    return module
        frame = frame.f_back  # type: ignore[assignment]
    return outermost


def _holds(module: nn.Module, part: object) -> bool:
    parts = module.modules() if isinstance(part, nn.Module) else module.parameters()
    return any(other is part for other in parts)


def _containers(root: nn.Module) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for path, module in root.named_modules():
        path = path.replace("_orig_mod.", "").removesuffix("_orig_mod")
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(
            path.startswith(f"{member}.") for members in found.values() for member in members
        ):
            continue
        by_class: dict[type, list[str]] = defaultdict(list)
        for name, child in module.named_children():
            if sum(isinstance(m, nn.Linear) for m in child.modules()) >= _MIN_LINEARS:
                by_class[type(getattr(child, "_orig_mod", child))].append(f"{path}.{name}" if path else name)
        members = {p: cls.__qualname__ for cls, paths in by_class.items() if len(paths) > 1 for p in paths}
        if members:
            found[path] = members
    return found
