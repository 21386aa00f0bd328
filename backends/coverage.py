"""What of a compiled model runs in high precision because Dynamo hands its code to no backend.

A backend sees graphs only. Code that Dynamo skips runs as it is, and nothing that the backend is told shows it; it can
skip code that it compiled before, too (a hook came or went, a recompile limit, ``torch.vmap`` around the model). So
each call collects the weights whose linears stand in its graphs. Where one is missing that the model's tree puts in 4
bits, there are these ways. A graph read the weight for something else than a linear: that is said. Or the next calls
are looked at from outside, and Python itself calls the linear: that is said, too, and also where a function calls
``F.linear``, whose weight cannot be seen from outside. One that is not called, as in another expert or in a block that
a cache left out, is not said.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

from ..model.attachments import attached_keep, changes
from ..model.linears import named_linears, plain_path
from ..model.reasons import Cause
from ..packed.linear import HiF4Linear
from ..packed.plan import left_out, plan_modules, why_nothing
from ..pipeline.context import Decision
from ..torch_private.calls import Around, around_calls
from ..torch_private.dynamo import compiler_is_off, compiler_stance, graph_breaks
from ..torch_private.frames import outermost_that_holds, python_linears
from .wanted import Wanted

__all__ = ["lacks_4_bits", "mark_copied", "ran", "say_off", "say_overruled", "say_transformed", "watch", "watcher"]

log = logging.getLogger(__name__)

# A cache leaves blocks out in some calls, for both branches of guidance, and not in others.
_LOOKS = 16
_AGAIN = 61  # calls, an odd number: what was left out for so long may be called outside of graphs now
_COPIED = "_tahf4_copied"
_said: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_overruled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_used: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # said of weights that graphs use otherwise
_functional: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # said of functions outside of graphs
_off = False  # said that the compiler is off

USED_OTHERWISE = frozenset({Cause.WEIGHT, Cause.SHAPE, Cause.DTYPE, Cause.CLASS, Cause.REGION})
"""Why a graph leaves a linear in high precision that the model's tree puts in 4 bits, unless the user chose it."""

_Read = dict[int, tuple[weakref.ref[Any], str]]


class _Ran(threading.local):
    def __init__(self) -> None:
        self.planned: set[int] = set()
        self.read: _Read = {}
        self.quantized = 0


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


def watch(model: nn.Module, keep: Sequence[str]) -> None:
    """Collect the weights in the graphs of a model's calls, and warn once in its life about linears outside of graphs.

    Args:
        model: a call of it runs compiled now.
        keep: patterns of linears that stay in high precision.
    """
    if model not in _said:
        around_calls(model, watcher(model, keep))


def mark_copied(model: nn.Module) -> None:
    """Warn where a model is copied that ``model.compile()`` compiles now."""
    held = model.__dict__.get(_COPIED)  # a shallow copy has that of the original
    model.__dict__[_COPIED] = held if isinstance(held, _Copied) and held.of(model) else _Copied(model)


def watcher(model: nn.Module, keep: Sequence[str]) -> Around:
    """Return what :func:`watch` lets the calls go through."""
    tree: Wanted | None = None
    wanted: dict[int, str] = {}
    explained: set[frozenset[str]] = set()  # missing in calls that were looked at, and Python called none of them
    met: set[frozenset[str]] = set()
    look = 0  # at so many calls more
    calls = 0

    def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
        nonlocal look, tree, wanted, calls
        quantized = _ran.quantized
        looks = look > 0 and sys.getprofile() is None  # a profiler has that place, and would not see this one's calls
        outside: set[nn.Module] = set()
        functional: set[str] = set()
        classes = tree.classes if tree is not None else ()
        watched = python_linears(outside, functional, classes) if looks else contextlib.nullcontext()
        with _collected() as (planned, read), watched:
            result = call(*args, **kwargs)
        calls += 1
        again = calls % _AGAIN == 0
        if tree is None:
            tree = Wanted(model, keep)
            if text := left_out(model):
                log.warning("%s: %s", type(model).__name__, text)
            if not tree.planned and _ran.quantized == quantized:
                _say_nothing(model)
            wanted = {id(weight): path for path, weight in tree.weights()}
        elif looks or again or tree.changes != changes() or tree.missing(wanted, planned, read):
            tree = tree if tree.stands(model) else Wanted(model, keep)
            wanted = {id(weight): path for path, weight in tree.weights()}  # offloading replaces them
        missing = tree.missing(wanted, planned, read)
        found: list[str] = []
        if missing and (looks or missing not in explained or again):
            met.add(missing)
            used = {path: _why(weight, read) for path, weight in tree.weights() if path in missing}
            unread = {path for path, why in used.items() if why is None}
            if looks:
                found = tree.run_by(outside, unread)
            elif not look:
                look = _LOOKS if missing not in explained else 2
            _say_used(model, {path: why for path, why in used.items() if why is not None})
            if functional and (rest := [path for path in used if path in unread and path not in found]):
                _say_functional(model, rest, sorted(functional))
        look -= looks
        if looks and not look:
            explained.update(met)
        if found and (whole := outermost_that_holds(model)) not in _said:
            _said.update((model, whole))
            _say(whole, model, found)
        return result, bool(found)

    return around


@contextlib.contextmanager
def _collected() -> Iterator[tuple[set[int], _Read]]:
    """Yield what :func:`ran` notes in this thread; a call around this one has it, too."""
    planned, read = _ran.planned, _ran.read
    _ran.planned, _ran.read = set(), {}
    try:
        yield _ran.planned, _ran.read
    finally:
        planned |= _ran.planned
        read |= _ran.read
        _ran.planned, _ran.read = planned, read


def _why(weight: Tensor, read: _Read) -> str | None:
    """Return the reason of a weight that graphs read, or None if they did not."""
    found, reason = read.get(id(weight), (None, ""))
    return reason if found is not None and found() is weight else None


class _Copied:
    """An attribute of a model that was compiled; warns where the model is copied without its compilation."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def of(self, model: nn.Module) -> bool:
        return self._model() is model

    def __deepcopy__(self, memo: dict[Any, Any]) -> None:
        model = self._model()
        if model is None or model._compiled_call_impl is None:
            return
        if any(isinstance(module, HiF4Linear) for module in model.modules()):
            return  # the copy of a packed model runs in 4 bits as well
        if not Wanted(model, ()).linears:
            return  # so does the original
        if memo.setdefault(_COPIED, self) is not self:  # said of another block in this copy
            return
        log.warning(
            "%s: PyTorch leaves the compilation by model.compile() out of a deep copy, which runs in the original "
            'precision. Compile the copy as well: copy.compile(backend="tahf4").',
            type(model).__name__,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()  # what is pickled loads where tahf4 is not


def lacks_4_bits(plan: Sequence[Decision], outside: Callable[[str], bool]) -> bool:
    """Return whether a plan puts nothing in 4 bits, and not because of the step, of adapters, or of a boundary.

    Args:
        plan: of a model or of a graph.
        outside: whether a linear is boundary in the model around what the plan is of.
    """
    meant = bool(plan) and all(
        d.cause in (Cause.STEP, Cause.ADAPTER) or (d.cause is Cause.BOUNDARY and outside(d.module)) for d in plan
    )
    return not meant and not any(d.decision == "hif4" for d in plan)


def _say_nothing(model: nn.Module) -> None:
    """Warn if a model's tree puts nothing in 4 bits, unless a model around it left all of it, as an embedder."""
    plan = plan_modules(model)
    weights = {path: linear._parameters.get("weight") for path, linear in named_linears(model)}
    counted = [d for d in plan if d.cause is not Cause.ADAPTER]  # an adapter follows what it stands beside
    if lacks_4_bits(counted, lambda path: attached_keep(weights[path]) is not None):
        log.warning("%s: nothing runs in 4 bits: %s", type(model).__name__, why_nothing(model, plan))


def _say_used(model: nn.Module, reasons: Mapping[str, str]) -> None:
    if not reasons or model in _used:
        return
    _used.add(model)
    now = {d.module: str(d.reason) for d in plan_modules(model) if d.decision != "hif4"}  # weights were cast since
    reasons = {path: reason or now.get(path, "") for path, reason in reasons.items()}
    others = [path for path, reason in reasons.items() if not reason]
    texts = [f"{path}: {reason}" for path, reason in reasons.items() if reason][:3]
    if others:
        texts.append(
            f"{_listed(others)}: used otherwise than in a linear, as in einsum, bmm or an operator of somebody else, "
            "or as a part or a multiple; torch.nn.functional.linear(x, weight, bias) runs in 4 bits"
        )
    log.warning(
        "%s: %d linears of its repeated blocks run in high precision, because of how graphs use their weights (%s)",
        type(model).__name__,
        len(reasons),
        "; ".join(texts),
    )


def _say_functional(model: nn.Module, paths: Sequence[str], callers: Sequence[str]) -> None:
    if model in _functional:
        return
    _functional.add(model)
    log.warning(
        "%s: %d linears of its repeated blocks stand in no graph (%s), and code that Dynamo did not hand to tahf4 "
        "calls torch.nn.functional.linear (%s). With their weights, it runs in high precision. Let Dynamo see this "
        "code, or call the modules there: what runs so is named.",
        type(model).__name__,
        len(paths),
        _listed(paths),
        "; ".join(callers[:3]),
    )


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")


def say_overruled(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Warn once that another backend compiles a model, parts of which were compiled in place with tahf4."""
    if model in _overruled or not any(Wanted(part, ()).linears for part in parts):
        return
    _overruled.add(model)
    log.warning(
        "%s: is compiled with another backend than tahf4, and PyTorch hands it the code of what is inside, also of %d "
        "modules that were compiled with tahf4 (the first is a %s). They run in the original precision there. Compile "
        'the whole with backend="tahf4", or not at all.',
        type(model).__name__,
        len(parts),
        type(parts[0]).__name__,
    )


def say_off() -> None:
    """Warn once if PyTorch compiles nothing in this process."""
    global _off
    if compiler_is_off() and not _off:
        _off = True
        log.warning(
            'torch.compile(backend="tahf4") compiles nothing: PyTorch\'s compiler is off (TORCH_COMPILE_DISABLE, '
            "TORCHDYNAMO_DISABLE or torch._dynamo.config.disable). Models run in the original precision."
        )


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


def _say(whole: nn.Module, model: nn.Module, paths: Sequence[str]) -> None:
    prefix = next(f"{path}." if path else "" for path, module in whole.named_modules() if module is model)
    alike = "" if whole is model else f"; other {type(model).__name__}s that were compiled one by one may be alike"
    if compiler_is_off():
        causes = "its compiler is off now (torch._dynamo.config.disable, TORCHDYNAMO_DISABLE)"
    elif (stance := compiler_stance()) != "default":
        causes = f"torch.compiler.set_stance({stance!r})"
    else:
        causes = "; ".join(graph_breaks()[:2]) or "none, as where a whole forward is under torch.compiler.disable"
    log.warning(
        "%s: %d linears of its repeated blocks run in high precision, because Dynamo did not hand their code to tahf4 "
        "(%s%s). Dynamo's reasons in this process: %s. TORCH_LOGS=graph_breaks,recompiles shows all; "
        "fullgraph=True turns a graph break into an error. What Dynamo gave up stays so until torch._dynamo.reset().",
        type(whole).__name__,
        len(paths),
        _listed([plain_path(prefix + path) for path in paths]),
        alike,
        causes,
    )
