"""The module that a graph is a part of: full paths of its weights and its repeated containers.

A graph is not always a whole model. After a graph break it is a piece; where a break lies in a loop over blocks,
Dynamo compiles the frames below one by one, each with paths of its own. What is kept and what is
boundary must not depend on that, so both are decided by a weight's path in the module that was compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..torch_private import caller_that_holds
from .attachments import refresh
from .blocks import block_of, module_blocks
from .linears import adapters, linear_weights, packed_weights

__all__ = ["Surroundings"]


class Surroundings:
    """Paths and repeated containers of the compiled module. Holds no strong reference to it.

    Attributes:
        linear_paths: paths of everything that may be the weight of a linear; empty if the module is unknown.
        blocks: ``module path -> class name`` of its repeated blocks.
    """

    def __init__(self, module: nn.Module | None) -> None:
        """Read a module, or nothing."""
        self._paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._beside: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._roots: list[weakref.ref[nn.Module]] = []
        self.linear_paths: list[str] = []
        self.blocks: dict[str, str] = {}
        if module is not None:
            self.add(module)
            self.linear_paths = [path for path, _ in (*linear_weights(module), *packed_weights(module))]
            self.blocks = module_blocks(module)

    @classmethod
    def find(cls, roots: Sequence[nn.Module]) -> Surroundings:
        """Return the surroundings of a graph that Dynamo is compiling.

        Args:
            roots: the module whose frame is compiled, or those that a function calls.
        """
        callers = {caller_that_holds(root) for root in roots}
        caller = callers.pop() if len(callers) == 1 else None
        return cls(caller or (roots[0] if len(roots) == 1 else None))

    def add(self, module: nn.Module) -> None:
        """Remember the paths of a module's weights."""
        self.watch(module)
        for path, weight in reversed([*linear_weights(module), *packed_weights(module)]):
            self._paths[weight] = path  # of several names the first

    def watch(self, module: nn.Module) -> None:
        """Read what is attached to a module, now and whenever a parameter is new."""
        self._roots.append(weakref.ref(module))
        refresh(module)
        if found := adapters(module):
            for path, weight in linear_weights(module):
                if path in found:
                    self._beside[weight] = found[path]

    def path(self, weight: object) -> str | None:
        """Return the module path of a weight, or None if it belongs to another module."""
        return self._paths.get(weight) if isinstance(weight, torch.Tensor) else None

    def adapts(self, weight: object) -> str | None:
        """Return the path of the linear that a weight of an adapter stands beside; None for any other weight."""
        return self._beside.get(weight) if isinstance(weight, torch.Tensor) else None

    def block_of(self, path: str) -> tuple[str, str] | None:
        """Return ``(block path, class name)`` of the repeated block around a module path, if there is one."""
        return block_of(path, self.blocks)

    def learn(self, weights: Sequence[object]) -> None:
        """At run time, look again for weights that are new: another module's of the class, or replaced ones."""
        for reference in self._roots:
            if (root := reference()) is not None:
                refresh(root)
        for weight in weights:
            if self.path(weight) is None and (module := caller_that_holds(weight)) is not None:
                self.add(module)
