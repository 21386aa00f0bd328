"""What of a compiled model runs in high precision because Dynamo hands its code to no backend.

A backend sees graphs only. Code that Dynamo skips runs as it is, and nothing that the backend is told shows it; it can
skip code that it compiled before, too (a hook came or went, a recompile limit, ``torch.vmap`` around the model). So
each call collects the weights whose linears stand in its graphs. Where one is missing that the model's tree puts in 4
bits, there are these ways. A graph read the weight for something else than a linear: that is said. Or the next calls
are looked at from outside, and Python itself calls the linear: that is said, too, and also where a function calls
``F.linear`` with the weight, or with one that it computed. One that is not called, as in another expert or in a block
that a cache left out, is not said.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

from ..model.attachments import changes
from ..model.tree import is_boundary
from ..pipeline.context import Decision
from ..torch_private.calls import Around, around_calls
from ..torch_private.frames import outermost_that_holds, python_linears
from .messages import (
    is_explained,
    is_said,
    say_copied,
    say_functional,
    say_left_out,
    say_nothing,
    say_outside,
    say_used,
)
from .wanted import Wanted

__all__ = ["function_watcher", "mark_copied", "ran", "say_behind", "watch", "watcher"]

# A cache leaves blocks out in some calls, for both branches of guidance, and not in others.
_LOOKS = 16
_AGAIN = 61  # calls, an odd number: what was left out for so long may be called outside of graphs now
_COPIED = "_tahf4_copied"

_Read = dict[int, tuple[weakref.ref[Any], str]]
_Graphs = list[tuple[Sequence[Decision], Callable[[], None]]]


class _Ran(threading.local):
    def __init__(self) -> None:
        self.planned: set[int] = set()
        self.read: _Read = {}
        self.quantized = 0
        self.graphs: _Graphs | None = None  # of the innermost model whose call is watched
        self.function: _Function | None = None  # that runs now


_ran = _Ran()


def ran(planned: Set[int], read: Mapping[int, tuple[weakref.ref[Any], str]], quantized: int) -> None:
    """Note a graph that runs now.

    Args:
        planned: identities of the weights of its linears that run as planned.
        read: all its weights, by identity, each with the reason of its linear if it is not in ``planned``, or "".
        quantized: how many of its linears run in 4 bits.
    """
    _ran.planned.update(planned)
    _ran.read.update(read)
    _ran.quantized += quantized


def say_behind(plan: Sequence[Decision], say: Callable[[], None]) -> None:
    """Let something be said of a graph with a plan: behind the call that is watched, if nothing else explained it."""
    if _ran.graphs is None:
        say()
    else:
        _ran.graphs.append((plan, say))


def watch(model: nn.Module, keep: Sequence[str]) -> None:
    """Collect the weights in the graphs of a model's calls, and warn once in its life about linears outside of graphs.

    Args:
        model: a call of it runs compiled now, or a compiled function that calls it does.
        keep: patterns of linears that stay in high precision.
    """
    if not is_said(model) and not around_calls(model, watcher(model, keep)) and _ran.function is not None:
        _ran.function.found(model, keep)


def mark_copied(model: nn.Module, compiled: Callable[[nn.Module], bool]) -> None:
    """Warn where a model is copied that ``model.compile()`` compiles now.

    Args:
        model: that is compiled now.
        compiled: tells of a model whether ``model.compile()`` compiled it with this backend.
    """
    held = model.__dict__.get(_COPIED)  # a shallow copy has that of the original
    model.__dict__[_COPIED] = held if isinstance(held, _Copied) and held.of(model) else _Copied(model, compiled)


def watcher(model: nn.Module, keep: Sequence[str]) -> Around:
    """Return what :func:`watch` lets the calls go through."""
    return functools.partial(_Watch(keep).call, model)


def function_watcher(model: nn.Module | None, keep: Sequence[str]) -> Around:
    """Return what the calls of a compiled function go through; it warns as :func:`watch` does.

    Args:
        model: whose method the function is, or None: then the models that Dynamo meets in a call are watched in the
            calls after it.
        keep: patterns of linears that stay in high precision.
    """
    return _Function(model, keep).call


class _Watch:
    """What the calls of a model, or of a function that calls it, have shown. It does not keep the model alive."""

    def __init__(self, keep: Sequence[str], among: bool = False) -> None:
        self._keep = keep
        self.alike = False  # others of its class are watched in calls of one function
        self._among = among  # what a compiled function calls, which may leave a model as it is, or call only a part
        self._tree: Wanted | None = None
        self._wanted: dict[int, str] = {}
        self._explained: set[frozenset[str]] = set()  # missing in calls that were looked at; Python called none of it
        self._met: set[frozenset[str]] = set()
        self._look = 0  # at so many calls more
        self._calls = 0
        self._graphs: _Graphs = []  # say what graphs hold that were compiled meanwhile

    def call(
        self, model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, bool]:
        """Run a call; return its result, and whether this was the last one to be watched."""
        quantized = _ran.quantized
        # A profiler has that place, and would not see this one's calls.
        looks = self._look > 0 and sys.getprofile() is None
        outside: set[nn.Module] = set()
        functional: dict[str, set[int]] = {}
        classes = self._tree.classes if self._tree is not None else ()
        watched = python_linears(outside, functional, classes) if looks else contextlib.nullcontext()
        with _collected(_ran.graphs if self._among else self._graphs) as (planned, read), watched:
            result = call(*args, **kwargs)
        self._calls += 1
        again = self._calls % _AGAIN == 0
        tree = self._tree
        if tree is None and not self._among and is_boundary(model):
            return result, True  # nothing of it is to run in 4 bits
        if tree is None:
            tree = Wanted(model, self._keep)
            if not self._among:
                say_left_out(model)
            if not self._among and not tree.planned and _ran.quantized == quantized:
                say_nothing(model)
            self._wanted = {id(weight): path for path, weight in tree.weights()}
        elif looks or again or tree.changes != changes() or tree.missing(self._wanted, planned, read):
            tree = tree if tree.stands(model) else Wanted(model, self._keep)
            self._wanted = {id(weight): path for path, weight in tree.weights()}  # offloading replaces them
        self._tree = tree
        missing = tree.missing(self._wanted, planned, read)
        found: list[str] = []
        if missing and (looks or missing not in self._explained or again):
            self._met.add(missing)
            used = {path: _why(weight, read) for path, weight in tree.weights() if path in missing}
            unread = {path for path, why in used.items() if why is None}
            if looks:
                found = tree.run_by(outside, unread)
            elif not self._look:
                self._look = _LOOKS if missing not in self._explained else 2
            say_used(model, {**tree.computed, **{path: why for path, why in used.items() if why is not None}})
            if functional:
                say_functional(model, *_blamed(model, functional, unread.difference(found), self._wanted))
        if not self._among:
            say_used(model, tree.computed)
        for plan, say in self._graphs:
            if not is_explained(model, plan):
                say()
        self._graphs.clear()
        self._look -= looks
        if looks and not self._look:
            self._explained.update(self._met)
        if found and not is_said(whole := outermost_that_holds(model)):
            say_outside(whole, model, found, self.alike or whole is not model)
        return result, bool(found)


class _Function:
    """The models that are watched in the calls of a compiled function."""

    def __init__(self, model: nn.Module | None, keep: Sequence[str]) -> None:
        self._method = model is not None
        self._said: set[type[nn.Module]] = set()  # blocks that a function calls one by one are said once
        self._watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()
        if model is not None:
            self._watches[model] = _Watch(keep, among=True)

    def found(self, model: nn.Module, keep: Sequence[str]) -> None:
        """Watch a model from the next call on, unless one is watched that holds it or one like it was said."""
        held = any(model in set(other.modules()) for other in self._watches)
        if self._method or type(model) in self._said or held:
            return
        for part in [part for part in self._watches if part in set(model.modules())]:
            del self._watches[part]
        self._watches[model] = _Watch(keep, among=True)
        same = [watched for other, watched in self._watches.items() if type(other) is type(model)]
        for watched in same:
            watched.alike = len(same) > 1

    def call(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        """Run a call; never the last one, since another model may come."""
        outer, _ran.function = _ran.function, self
        try:
            for model, watched in list(self._watches.items()):
                call = functools.partial(self._through, model, watched, call)
            return call(*args, **kwargs), False
        finally:
            _ran.function = outer

    def _through(self, model: nn.Module, watched: _Watch, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result, last = watched.call(model, call, args, kwargs)
        if last:
            self._said.add(type(model))
            for alike in [other for other in self._watches if type(other) is type(model)]:
                del self._watches[alike]
        return result


@contextlib.contextmanager
def _collected(graphs: _Graphs | None) -> Iterator[tuple[set[int], _Read]]:
    """Yield what :func:`ran` notes in this thread; a call around this one has it, too.

    Args:
        graphs: takes what :func:`say_behind` is given.
    """
    planned, read, outer = _ran.planned, _ran.read, _ran.graphs
    _ran.planned, _ran.read = set(), {}
    _ran.graphs = graphs
    try:
        yield _ran.planned, _ran.read
    finally:
        planned |= _ran.planned
        read |= _ran.read
        _ran.planned, _ran.read, _ran.graphs = planned, read, outer


def _why(weight: Tensor, read: _Read) -> str | None:
    """Return the reason of a weight that graphs read, or None if they did not."""
    found, reason = read.get(id(weight), (None, ""))
    return reason if found is not None and found() is weight else None


def _blamed(
    model: nn.Module, functional: Mapping[str, set[int]], unread: Set[str], weights: Mapping[int, str]
) -> tuple[list[str], list[str]]:
    """Return the paths of weights that functions outside of graphs may have read, and these functions.

    Args:
        model: that was compiled.
        functional: weights by function, see :func:`tahf4_compiler.torch_private.frames.python_linears`.
        unread: paths of weights that nothing else read.
        weights: paths of weights by identity.
    """
    whole = outermost_that_holds(model)
    own = {id(value) for value in (*whole.parameters(), *whole.buffers())}
    read = {key for keys in functional.values() for key in keys}
    lacking = {key for key, path in weights.items() if path in unread}
    if read <= own and all(functional.values()):  # what is none may be computed of any of them, as a copy is
        lacking &= read
    callers = sorted(name for name, keys in functional.items() if keys & lacking or not keys or not keys <= own)
    return [weights[key] for key in weights if key in lacking], callers


class _Copied:
    """An attribute of a model that was compiled; warns where the model is copied without its compilation."""

    def __init__(self, model: nn.Module, compiled: Callable[[nn.Module], bool]) -> None:
        self._model = weakref.ref(model)
        self._compiled = compiled

    def of(self, model: nn.Module) -> bool:
        return self._model() is model

    def __deepcopy__(self, memo: dict[Any, Any]) -> None:
        model = self._model()
        if model is None or not self._compiled(model):  # it was compiled anew with another backend
            return
        if not Wanted(model, ()).linears:
            return  # the original runs so, too, and the copy of a packed model in 4 bits
        if memo.setdefault(_COPIED, self) is not self:  # said of another block in this copy
            return
        say_copied(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()  # what is pickled loads where tahf4 is not
