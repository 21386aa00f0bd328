"""The module that a graph is a part of: full paths of its weights and its repeated containers.

A graph is not always a whole model. After a graph break it is a piece; where a break lies in a loop over blocks,
Dynamo compiles the frames below one by one, each with paths of its own. What is kept and what is
boundary must not depend on that, so both are decided by a weight's path in the module that was compiled.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..torch_private.frames import caller_that_holds, running_around
from .attachments import refresh
from .blocks import block_of, container_paths, module_blocks
from .linears import adapters, linear_weights, packed_weights, plain_path, raw_matrices
from .parts import class_name, full_class_name

__all__ = ["Surroundings", "is_boundary"]


class Surroundings:
    """Paths and repeated containers of the compiled module. Holds no strong reference to it.

    Attributes:
        linear_paths: paths of everything that may be the weight of a linear; empty if the module is unknown.
        blocks: ``module path -> class name`` of its repeated blocks.
        classes: ``module path -> class name`` of its modules but containers, with the Python module that defines the
            class.
        containers: paths of its ``ModuleList`` and ``ModuleDict``.
        within: class name of the model that called it, if it is one of several repeated blocks of that model, or a part
            of one; otherwise ``""``.
        is_boundary: see :func:`is_boundary`; it has no blocks then.
    """

    def __init__(self, module: nn.Module | None) -> None:
        """Read a module, or nothing."""
        self._paths: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._places: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._beside: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._roots: list[weakref.ref[nn.Module]] = []
        self.linear_paths: list[str] = []
        self.blocks: dict[str, str] = {}
        self.classes: dict[str, str] = {}
        self.containers: set[str] = set()
        self.within, self.is_boundary = "", False
        if module is not None:
            self.blocks = module_blocks(module)
            self.containers = container_paths(module)
            modules = [(plain_path(path), inner) for path, inner in module.named_modules(remove_duplicate=False)]
            self.classes = {path: full_class_name(inner) for path, inner in modules if path not in self.containers}
            weights = (*linear_weights(module), *packed_weights(module), *raw_matrices(module))
            self.linear_paths = [path for path, _ in weights]
            self.add(module)

    @classmethod
    def find(cls, parts: Sequence[object]) -> Surroundings:
        """Return the surroundings of a graph that Dynamo is compiling: the one module that holds what it reads.

        Args:
            parts: modules and parameters that the compiled frame reads, among them its local variables after a graph
                break. If several modules hold them, as where a function calls two models, none is known.
        """
        holders = {caller_that_holds(part) or (part if isinstance(part, nn.Module) else None) for part in parts}
        holders.discard(None)
        found = cls(module := holders.pop() if len(holders) == 1 else None)
        if module is not None:
            found.within = next((class_name(m) for m in running_around(module) if _in_a_block(module, m)), "")
            if not found.within and is_boundary(module):
                found.is_boundary, found.blocks = True, {}
        return found

    @property
    def root(self) -> nn.Module | None:
        """The module that was compiled, if it is known and alive."""
        return self._roots[0]() if self.linear_paths else None

    def add(self, module: nn.Module) -> None:
        """Remember the paths of a module's weights: of several of one weight the first, and one inside a block."""
        self.watch(module)
        for path, weight in reversed([*linear_weights(module), *raw_matrices(module), *packed_weights(module)]):
            self._paths[weight] = path
            self._names[weight] = {path: None, **self._names.get(weight, {})}
            if self.block_of(path):
                self._places[weight] = path

    def watch(self, module: nn.Module) -> None:
        """Read what is attached to a module, now and whenever a parameter is new."""
        self._roots.append(weakref.ref(module))
        refresh(module)
        if found := adapters(module):
            for path, weight in (*linear_weights(module), *raw_matrices(module)):  # those of a LoHa have other names
                if (linear := found.get(path) or found.get(path.rpartition(".")[0])) is not None:
                    self._beside[weight] = linear

    def path(self, weight: object) -> str | None:
        """Return the module path of a weight, or None if it belongs to another module."""
        return self._paths.get(weight) if isinstance(weight, torch.Tensor) else None

    def names(self, weight: object) -> Iterable[str]:
        """Return all module paths of a weight: a tied one has several."""
        return self._names.get(weight, ()) if isinstance(weight, torch.Tensor) else ()

    def place(self, weight: object) -> str | None:
        """Return the module path of a weight inside a repeated block if it has one there, otherwise its path."""
        found = self._places.get(weight) if isinstance(weight, torch.Tensor) else None
        return found or self.path(weight)

    def adapts(self, weight: object) -> str | None:
        """Return the path of the linear that a weight of an adapter stands beside; None for any other weight."""
        return self._beside.get(weight) if isinstance(weight, torch.Tensor) else None

    def around(self, path: str) -> dict[str, str]:
        """Return ``path -> class name`` for each module around a weight of some module path, outermost first."""
        parts = path.split(".")
        outer = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        return {module: self.classes[module] for module in outer if module in self.classes}

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


def is_boundary(module: nn.Module) -> bool:
    """Whether a module is a part that stands beside the repeated blocks of a model that runs now and holds it.

    One with listed blocks of its own, as an encoder beside a denoiser, holds some of these, and is none.
    """
    for model in running_around(module):
        blocks = [f"{path}." for path in module_blocks(model)]
        named = model.named_modules(remove_duplicate=False)
        paths = [f"{plain_path(path)}." for path, inner in named if inner is module]
        if blocks and not any(b.startswith(p) or p.startswith(b) for b in blocks for p in paths):
            return True
    return False


def _in_a_block(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module is one of several repeated blocks of a model, or a part of one.

    A single one may be a whole model, as after a preprocessor in an ``nn.Sequential``.
    """
    blocks = module_blocks(model)
    kinds = Counter((path.rpartition(".")[0], cls) for path, cls in blocks.items())
    named = model.named_modules(remove_duplicate=False)
    around = [block_of(f"{plain_path(path)}.", blocks) for path, inner in named if inner is module]
    return any(kinds[found[0].rpartition(".")[0], found[1]] > 1 for found in around if found is not None)
