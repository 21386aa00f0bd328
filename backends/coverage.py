"""What of a compiled model runs in high precision because Dynamo hands its code to no backend.

A backend sees graphs only. Code that Dynamo skips runs as it is, and nothing that the backend is told shows it; it can
skip code that it compiled before, too (a hook came or went, a recompile limit, ``torch.vmap`` around the model). So the
linears in the graphs of each call are counted. If there are fewer than the model's tree puts in 4 bits, the next calls
are looked at from outside: which of these linears does Python itself call? One that is not called, as in another
expert or in a block that a cache left out, is not said.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..model.linears import matching
from ..model.reasons import Cause
from ..packed.plan import plan_modules
from ..torch_private import around_calls, graph_breaks

__all__ = ["ran", "say_transformed", "watch"]

log = logging.getLogger(__name__)

# A cache leaves blocks out in some calls, for both branches of guidance, and not in others.
_LOOKS = 16
_COPIED = "_tahf4_copied"
_said: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Ran(threading.local):
    linears = 0


_ran = _Ran()


def ran(linears: int) -> None:
    """Count linears of repeated blocks that stand in a graph which runs now."""
    _ran.linears += linears


def watch(model: nn.Module, keep: Sequence[str]) -> None:
    """Count the linears in the graphs of a model's calls, and warn once in its life about linears outside of graphs.

    Args:
        model: a call of it runs compiled now.
        keep: patterns of linears that stay in high precision.
    """
    if model._compiled_call_impl is not None:
        model.__dict__[_COPIED] = model.__dict__.get(_COPIED) or _Copied(type(model).__name__)
    if model in _said:
        return
    wanted: int | None = None
    explained: set[int] = set()  # counts of calls that were looked at, and Python called none of the linears
    counts: set[int] = set()
    look = 0  # at so many calls more

    def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        nonlocal look, wanted
        if wanted is None:
            wanted = len(_linears(model, keep))
        before, looks = _ran.linears, look > 0
        outside: set[nn.Module] = set()
        with _python_calls(outside) if looks else contextlib.nullcontext():
            result = call(*args, **kwargs)
        count = _ran.linears - before
        found: list[str] = []
        if count < wanted and count not in explained:
            counts.add(count)
            if looks:
                found = [path for path, module in _linears(model, keep).items() if module in outside]
            else:
                look = _LOOKS + 1
        look -= look > 0
        if looks and not look:
            explained.update(counts)
        if found and model not in _said:
            _said.add(model)
            _say(type(model).__name__, found)
        return result, bool(found)

    around_calls(model, around)


class _Copied:
    """An attribute of a model that was compiled in place; warns where the model is copied without its compilation."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __deepcopy__(self, memo: dict[Any, Any]) -> None:
        if memo.setdefault(_COPIED, self) is not self:  # said of another block in this copy
            return
        log.warning(
            "%s: PyTorch leaves the compilation by model.compile() out of a deep copy, which runs in the original "
            'precision. Compile the copy as well: copy.compile(backend="tahf4").',
            self._name,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()  # what is pickled loads where tahf4 is not


def _linears(model: nn.Module, keep: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linears that the model's tree puts in 4 bits, by path."""
    planned = (d.module for d in plan_modules(model) if d.decision == "hif4" and d.cause is not Cause.PACKED)
    return {path: model.get_submodule(path) for path in planned if matching(keep, path) is None}


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


def say_transformed(model: nn.Module) -> None:
    """Warn once that Dynamo compiles nothing of a model under a transform of functions that was called around it."""
    if model in _said:
        return
    _said.add(model)
    log.warning(
        "%s: called under torch.vmap or torch.func, where Dynamo compiles nothing. This call runs in high precision, "
        "and so does what it called until torch._dynamo.reset(). Compile the transform with the model: "
        'torch.compile(lambda x: torch.vmap(lambda row: model(row))(x), backend="tahf4").',
        type(model).__name__,
    )


def _say(name: str, paths: Sequence[str]) -> None:
    shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
    causes = "; ".join(graph_breaks()[:2]) or "none"
    log.warning(
        "%s: %d linears of its repeated blocks run in high precision, because Dynamo did not hand their code to tahf4 "
        "(%s). Dynamo's most frequent reasons in this process: %s. TORCH_LOGS=graph_breaks,recompiles shows all; "
        "fullgraph=True turns a graph break into an error. What Dynamo gave up stays so until torch._dynamo.reset().",
        name,
        len(paths),
        shown,
        causes,
    )
