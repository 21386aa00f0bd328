"""Which pass, and then which node, adds most of the error against high precision.

Passes are judged by how much the error of the outputs against the captured graph grows over them. Then the graphs
before and after the pass are run as one, each value computed in the one way or in the other
(:mod:`tahf4_compiler.debugging.mixture`). Greedily, the value whose return to the earlier way lowers the error most
comes first.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from tqdm.auto import tqdm

from ..errors import CaptureError, OptionError
from ..graph.nodes import module_classes
from ..graph_capture.captured import Capture
from ..graph_capture.export import capture
from ..lowering import context_of, lower_graph
from ..options import Options
from ..pipeline.context import decisions_of
from ..pipeline.order import build_pipeline
from ..pipeline.records import PassRecord
from ..pipeline.running import graph_arguments, relative_error, run_graph
from .mixture import Hybrid, Pair
from .reproducer import write_reproducer

__all__ = ["Bisection", "PassStep", "Suspect", "bisect"]

_AGAIN = 8
_NOTHING = 1e-7


@dataclass(frozen=True)
class PassStep:
    """The error of the outputs after a pass.

    Attributes:
        name: of the pass.
        error: relative, against the captured graph.
        added: how much it grew over the pass; negative where the pass mends.
    """

    name: str
    error: float
    added: float


@dataclass(frozen=True)
class Suspect:
    """A value that the pass computes in another way.

    Attributes:
        node: in the graph after the pass.
        replaced: in the graph before.
        module: path of the linear that it stands for, or of the module that it was called in.
        linear: whether it stands for a linear of the plan.
        local_error: relative error of this value alone, from the inputs that it had before the pass.
        error_without: error of the outputs with this value, and those named before it, as before the pass.
    """

    node: str
    replaced: str
    module: str
    linear: bool
    local_error: float
    error_without: float


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        passes: in order.
        blamed: the pass that adds most, or None if none adds any.
        until: the last pass whose graph was compared: ``blamed``, or one after it that lowers the error.
        error_before: of the outputs before the pass, against the captured graph.
        error_after: after ``until``.
        suspects: values that ``blamed`` computes in another way, the worst first.
    """

    passes: tuple[PassStep, ...]
    blamed: str | None
    until: str | None = None
    error_before: float = 0.0
    error_after: float = 0.0
    suspects: tuple[Suspect, ...] = ()
    _hybrid: Hybrid | None = field(default=None, repr=False, compare=False)
    _pairs: tuple[Pair, ...] = field(default=(), repr=False, compare=False)
    _modules: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def text(self) -> str:
        """Return the findings as a table."""
        lines = [f"{'pass':<16} {'error':>10} {'added':>11}"]
        lines += [f"{p.name:<16} {p.error:>10.3e} {p.added:>+11.3e}" for p in self.passes]
        if self.blamed is None:
            return "\n".join([*lines, "", "no pass adds an error"]) + "\n"
        lines += ["", f"pass {self.blamed!r} adds most: {self.error_before:.3e} -> {self.error_after:.3e}"]
        if self.until != self.blamed:
            lines.append(f"(graphs compared up to {self.until!r}, which lowers the error again)")
        lines += [
            f"{i}. {'linear' if s.linear else 'node in'} {s.module or 'no module'}: {s.node} in the place of "
            f"{s.replaced}, local error {s.local_error:.3e}; without it the outputs' error is {s.error_without:.3e}"
            for i, s in enumerate(self.suspects, 1)
        ]
        return "\n".join(lines) + "\n"

    def write_reproducer(self, path: str | Path) -> Path:
        """Write the smallest subgraph that fails, before and after the pass, as a script with its inputs beside it.

        Args:
            path: of the script; the inputs go beside it with the suffix ``.safetensors``.

        Returns:
            The script's path.

        Raises:
            OptionError: there is no suspect.
        """
        if self._hybrid is None or not self.suspects:
            raise OptionError("nothing failed, so there is no subgraph to write")
        worst = self.suspects[0]
        about = f"pass {self.blamed!r} at {worst.node!r} in {worst.module or 'no module'}"
        return write_reproducer(
            Path(path), self._hybrid, self._pairs[0], about, worst.local_error, self._modules
        )


def bisect(
    model: nn.Module | Capture,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    passes: Sequence[Any] | None = None,
    blame: str | None = None,
    rounds: int = 3,
) -> Bisection:
    """Name the pass, then the nodes, that add most of the error against high precision.

    Args:
        model: a module that ``torch.export`` captures, with a recipe attached or not; or a capture.
        args: example arguments.
        kwargs: example keyword arguments.
        options: as for ``torch.compile(backend="tahf4", options=...)``.
        passes: the whole pipeline, in place of the default one.
        blame: look into this pass, whatever the others add.
        rounds: how many suspects to name.

    Returns:
        The findings.

    Raises:
        OptionError: no pass is named ``blame``, or ``rounds`` is less than 1.
        CaptureError, PassError, PipelineError: as :func:`tahf4_compiler.capture` and :func:`tahf4_compiler.lower`.
    """
    if rounds < 1:
        raise OptionError(f"rounds is {rounds}; expected 1 or more")
    captured = model if isinstance(model, Capture) else capture(model, args, kwargs)
    # Errors are what is looked for: none raises.
    parsed = dataclasses.replace(Options.parse(options), verify=True, verify_tolerance=None)
    graphs: list[fx.GraphModule] = []
    errors: list[float] = []

    def keep(record: PassRecord, graph_module: fx.GraphModule) -> None:
        graphs.append(fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph)))
        error = record.total_error or 0.0
        errors.append(math.inf if math.isnan(error) else error)

    history = lower_graph(captured, parsed, passes, each=keep).history
    if history[0].error is not None:
        raise CaptureError(
            "the model's own output holds NaN or infinity for these inputs, in high precision: there is nothing to "
            "compare with. Look at its weights and inputs."
        )
    names = [record.name for record in history]
    steps = tuple(PassStep(names[i], errors[i], _difference(errors[i], errors[i - 1])) for i in range(1, len(names)))
    if blame is not None and blame not in names[1:]:
        raise OptionError(f"no pass {blame!r} ran; there are {', '.join(names[1:])}")
    worst = max(steps, key=lambda step: step.added, default=None)
    if blame is None and (worst is None or worst.added <= _NOTHING):
        return Bisection(steps, None)
    at = names.index(blame if blame is not None else worst.name)  # type: ignore[union-attr]
    until = _mended(errors, at)
    context = context_of(captured, parsed)
    reference = run_graph(graphs[0], context)
    given = {i: graph_arguments(graphs[i], context) for i in {at - 1, at, until}}
    hybrid = own = Hybrid(graphs[at - 1], graphs[at], given[at - 1], given[at])
    if until != at:
        known = {pair.after.name: pair.before.name for pair in own.pairs}
        hybrid = Hybrid(graphs[at - 1], graphs[until], given[at - 1], given[until], known)
    changed = {pair.before for pair in own.pairs if _finite(own.local_error(pair)) > _NOTHING}
    found = _greedy(hybrid, reference, rounds, changed)
    if not found and until != at:  # later passes left none of its values
        until, hybrid = at, own
        found = _greedy(hybrid, reference, rounds, changed)
    plugs = (type(item).__module__ for item in build_pipeline(parsed, passes))
    modules = tuple(dict.fromkeys(m for m in plugs if not m.startswith("tahf4_compiler.") and m != "__main__"))
    return Bisection(
        steps, names[at], names[until], errors[at - 1], errors[until],
        tuple(suspect for _, suspect in found), hybrid, tuple(pair for pair, _ in found), modules,
    )  # fmt: skip


def _difference(new: float, old: float) -> float:
    return 0.0 if new == old else new - old


def _mended(errors: Sequence[float], at: int) -> int:
    """Return the step with the least error from ``at`` on, before the error grows again."""
    best = at
    for i in range(at + 1, len(errors)):
        if errors[i] > 1.05 * errors[best]:
            break
        if errors[i] < 0.999 * errors[best]:
            best = i
    return best


def _greedy(
    hybrid: Hybrid, reference: list[torch.Tensor], rounds: int, changed: Container[fx.Node]
) -> list[tuple[Pair, Suspect]]:
    """Take back one value after the other of those that the pass changed, each time what lowers the error most."""
    local = {pair: _finite(hybrid.local_error(pair)) for pair in hybrid.pairs}
    waiting = [pair for pair in hybrid.pairs if pair.before in changed and local[pair] > _NOTHING]
    taken: list[Pair] = []
    found: list[tuple[Pair, Suspect]] = []
    for _ in range(min(rounds, len(waiting))):
        bar = tqdm(waiting, desc="bisect", unit="value", delay=1.0, leave=False)
        results = {}
        for pair in bar:
            back = {*taken, pair}
            outputs = hybrid.run([p for p in hybrid.pairs if p not in back])
            results[pair] = _finite(relative_error(reference, outputs))
        ranked = sorted(results, key=lambda pair: (results[pair], -local[pair]))
        first = ranked[0]
        taken.append(first)
        module, linear = _module(first)
        after, before = first.after.name, first.before.name
        found.append((first, Suspect(after, before, module, linear, local[first], results[first])))
        waiting = ranked[1 : _AGAIN + 1]
    return found


def _finite(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _module(pair: Pair) -> tuple[str, bool]:
    for node in (pair.before, pair.after):
        decisions = decisions_of(node)
        if len(decisions) == 1:
            return decisions[0].module, True
    for node in (pair.before, pair.after):
        if modules := module_classes(node):
            return next(reversed(modules)), False
    return "", False
