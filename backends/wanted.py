"""What a graph of a whole model would put in 4 bits, by the model's tree: what runs is compared with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..model.attachments import attached, changes
from ..model.blocks import block_of, module_blocks
from ..model.linears import adapters, matching, names_of, plain_path
from ..model.reasons import Cause
from ..packed.plan import NO_LINEARS, READ_BY_PARENT, UNFIT, plan_modules, unfit_in_blocks
from ..pipeline.rules import MIN_FEATURES

__all__ = ["Wanted"]


class Wanted:
    """What a graph of a whole model would put in 4 bits, by path. What is replaced by others is not kept alive.

    Attributes:
        linears: its linears, those among them that are not packed: a graph shows how it reads their weights.
        planned: whether there are linears but those.
        computed: reasons of linears whose weights nothing holds, so that no graph reads them, by path.
        matrices: what may be the weight of a linear without an ``nn.Linear``, each with its owner and its name there.
        readers: modules around a weight that read it themselves, by its path.
        classes: of the linears and of the readers.
        changes: see :func:`tahf4_compiler.model.attachments.changes`.
    """

    def __init__(self, model: nn.Module, keep: Sequence[str]) -> None:
        """Read the tree of a model that was compiled with some patterns of ``keep``."""
        self.changes = changes()
        names = names_of(model)

        def kept(path: str, weight: object) -> bool:
            return matching(keep, path, *names.get(id(weight), ())) is not None

        inside = _inside(model, kept)
        around = {plain_path(path): module for path, module in model.named_modules()}
        plan = [d for d in plan_modules(model) if not kept(d.module, around[d.module]._parameters.get("weight"))]
        linears = {d.module: around[d.module] for d in plan if d.decision == "hif4" and d.cause is not Cause.PACKED}
        self.planned = bool(linears)
        causes = UNFIT if self.planned else {Cause.CLASS}  # of nothing at all another warning tells
        shown = {d.module: around[d.module] for d in plan if d.cause in causes}
        linears |= {path: linear for path, linear in shown.items() if inside(path, linear._parameters.get("weight"))}
        self.linears = {path: weakref.ref(module) for path, module in linears.items()}
        packed = any(d.cause is Cause.PACKED for d in plan)  # quantize_ said what it left
        unfit = unfit_in_blocks(model, plan) if self.planned and not packed else {}
        self.computed = {path: why for path, why in unfit.items() if around[path]._parameters.get("weight") is None}
        self.matrices = {path: (weakref.ref(owner), leaf) for path, owner, leaf in _matrices(model, inside)}
        self.readers: dict[str, list[weakref.ref[nn.Module]]] = {}
        for path in (*self.linears, *self.matrices):
            outer = (around.get(path[:i]) for i, letter in enumerate(path) if letter == ".")
            self.readers[path] = [weakref.ref(module) for module in outer if isinstance(module, READ_BY_PARENT)]
        read = {type(reference()) for found in self.readers.values() for reference in found}
        self.classes = frozenset(read | {type(module) for module in linears.values()})
        self._modules = [weakref.ref(module) for module in model.modules()]

    def stands(self, model: nn.Module) -> bool:
        """Tell whether the model has the same modules as then, and nothing was attached to any since."""
        modules = list(model.modules())
        alike = len(modules) == len(self._modules) and all(m is ref() for m, ref in zip(modules, self._modules))
        return alike and self.changes == changes()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield path and weight of all that is there now."""
        places = {**{path: (linear, "weight") for path, linear in self.linears.items()}, **self.matrices}
        for path, (reference, leaf) in places.items():
            weight = module._parameters.get(leaf) if (module := reference()) is not None else None
            if weight is not None:
                yield path, weight

    def missing(self, weights: Mapping[int, str], planned: Set[int], read: Mapping[int, object]) -> frozenset[str]:
        """Return the paths of what did not run as a linear of a graph; a matrix that a graph reads need be none.

        Args:
            weights: paths of :meth:`weights` by identity.
            planned: identities of weights in graphs, see :func:`tahf4_compiler.backends.coverage.ran`.
            read: the same.
        """
        lacking = weights.keys() - planned
        return frozenset(weights[key] for key in lacking if not (weights[key] in self.matrices and key in read))

    def run_by(self, modules: Set[nn.Module], unread: Set[str]) -> list[str]:
        """Return the paths of what Python ran by itself.

        Args:
            modules: that Python ran.
            unread: paths of what no graph read.
        """
        called = {path for path, linear in self.linears.items() if linear() in modules}
        within = {path for path in unread if any(reader() in modules for reader in self.readers[path])}
        return [path for path in self.readers if path in called | within]


def _matrices(model: nn.Module, inside: Callable[[str, Tensor], bool]) -> Iterator[tuple[str, nn.Module, str]]:
    beside = adapters(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, torch.jit.ScriptModule, *NO_LINEARS)) or plain_path(name) in beside:
            continue
        for leaf, weight in module._parameters.items():
            path = plain_path(f"{name}.{leaf}").removeprefix(".").removesuffix(".weight")
            if inside(path, weight):
                yield path, module, leaf


def _inside(model: nn.Module, kept: Callable[[str, object], bool]) -> Callable[[str, Tensor | None], bool]:
    """Return what tells whether a weight, if it is one of a linear, is to run in 4 bits where it stands."""
    blocks = module_blocks(model)

    def inside(path: str, weight: Tensor | None) -> bool:
        if weight is None or is_lazy(weight) or weight.dim() != 2 or not weight.is_floating_point():
            return False
        said = attached(weight)
        left = kept(path, weight) or (said is not None and said.decision == "high_precision")
        body = not blocks or block_of(f"{path}.", blocks) is not None
        return body and not left and min(weight.shape) >= MIN_FEATURES

    return inside
