"""What of a compiled model runs in high precision because Dynamo hands its code to no backend.

A backend sees graphs only. Code that Dynamo skips runs as it is, and nothing that the backend is told shows it. So if
some linear that the model's tree puts in 4 bits is in the plan of no graph, the next calls are looked at from outside:
which of these linears does Python itself call? One that is not called, as in another expert or in a block that a cache
left out, is not said.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model.linears import matching
from ..model.reasons import Cause
from ..packed.plan import plan_modules
from ..torch_private import around_next_calls, graph_breaks

__all__ = ["covered", "watch"]

log = logging.getLogger(__name__)

CALLS = 4
"""Calls after the first that are looked at, at most, until one shows a linear outside of the graphs."""

_planned: WeakIdKeyDictionary = WeakIdKeyDictionary()
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def covered(weights: Iterable[Any]) -> None:
    """Remember the weights of linears that the plan of a graph has decided about."""
    for weight in weights:
        _planned[weight] = True


def watch(model: nn.Module, keep: Sequence[str]) -> None:
    """Look at the next calls of a model that runs compiled, once in its life, and warn about linears outside of graphs.

    Args:
        model: its first call runs now.
        keep: patterns of linears that stay in high precision.
    """
    if model in _watched:
        return
    _watched.add(model)
    calls = 0

    def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        nonlocal calls
        calls += 1
        outside: set[nn.Module] = set()
        linears = _linears(model, keep)
        if not _missing(linears):
            return call(*args, **kwargs), True
        with _python_calls(outside):
            result = call(*args, **kwargs)
        found = [path for path, module in linears.items() if module in outside]
        if found:
            _say(type(model).__name__, found)
        return result, bool(found) or not _missing(linears) or calls == CALLS

    around_next_calls(model, around)


def _linears(model: nn.Module, keep: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linears that the model's tree puts in 4 bits, by path."""
    planned = (d.module for d in plan_modules(model) if d.decision == "hif4" and d.cause is not Cause.PACKED)
    return {path: model.get_submodule(path) for path in planned if matching(keep, path) is None}


def _missing(linears: Mapping[str, nn.Module]) -> bool:
    """Whether some linear is in the plan of no graph."""
    return any(module.weight not in _planned for module in linears.values())


@contextlib.contextmanager
def _python_calls(modules: set[nn.Module]) -> Iterator[None]:
    """Collect the modules whose ``nn.Linear.forward`` Python runs in this thread."""
    code, before = nn.Linear.forward.__code__, sys.getprofile()

    def called(frame: Any, event: Any, argument: Any) -> None:
        if event == "call" and frame.f_code is code:
            modules.add(frame.f_locals["self"])
        if before is not None:
            before(frame, event, argument)

    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(before)


def _say(name: str, paths: Sequence[str]) -> None:
    shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
    causes = "; ".join(graph_breaks()[:2]) or "none"
    log.warning(
        "%s: %d linears of its repeated blocks run in high precision, because Dynamo did not hand their code to tahf4 "
        "(%s). Dynamo's most frequent reasons in this process: %s. TORCH_LOGS=graph_breaks,recompiles shows all; "
        "fullgraph=True turns a graph break into an error.",
        name,
        len(paths),
        shown,
        causes,
    )
