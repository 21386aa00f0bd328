"""What is said, once each, of what runs in high precision in a compiled model."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from ..errors import Tahf4Error
from ..model.attachments import attached_keep
from ..model.linears import named_linears, plain_path
from ..model.reasons import Cause
from ..packed.plan import UNFIT, left_out, plan_modules, why_nothing
from ..pipeline.context import Decision
from ..torch_private.dynamo import compiler_is_off, compiler_stance, graph_breaks, suppresses_errors
from ..torch_private.frames import outermost_that_holds
from .wanted import Wanted

__all__ = [
    "USED_OTHERWISE",
    "is_explained",
    "is_said",
    "keeping_errors",
    "lacks_4_bits",
    "say_copied",
    "say_functional",
    "say_graph",
    "say_left_out",
    "say_nothing",
    "say_off",
    "say_outside",
    "say_overruled",
    "say_transformed",
    "say_used",
]

log = logging.getLogger(__name__)

_outside: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # said of linears outside of graphs
_overruled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_used: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # said of weights that graphs use otherwise
_explained: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # said of these linears why
_texts: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # by what runs around
_functional: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # said of functions outside of graphs
_off = False  # said that the compiler is off
_hidden: list[str] = []  # the last error that Dynamo was set to suppress

USED_OTHERWISE = UNFIT | {Cause.REGION}
"""Why a graph leaves a linear in high precision that the model's tree puts in 4 bits, unless the user chose it."""


def lacks_4_bits(plan: Sequence[Decision], outside: Callable[[str], bool]) -> bool:
    """Return whether a plan puts nothing in 4 bits, and not because of the user, the step, adapters, or a boundary.

    Args:
        plan: of a model or of a graph.
        outside: whether a linear is boundary in the model around what the plan is of.
    """
    meant = bool(plan) and all(
        d.cause in (Cause.KEPT, Cause.STEP, Cause.ADAPTER) or (d.cause is Cause.BOUNDARY and outside(d.module))
        for d in plan
    )
    return not meant and not any(d.decision == "hif4" for d in plan)


def _say(model: nn.Module, text: str) -> None:
    """Warn, unless the same was said of another part of what runs, as where blocks are compiled one by one."""
    texts, text = _texts.setdefault(outermost_that_holds(model), set()), f"{type(model).__name__}: {text}"
    if text not in texts:
        texts.add(text)
        log.warning("%s", text)


def say_left_out(model: nn.Module) -> None:
    """Warn if weights of a model's blocks are in no plan, because they are no weights of a linear."""
    if text := left_out(model):
        _say(model, text)


def say_graph(name: str, plan: Sequence[Decision], model: nn.Module | None) -> None:
    """Warn that no linear of a graph runs in 4 bits.

    Args:
        name: of the graph.
        plan: its decisions.
        model: whose code it is, if it is one's.
    """
    left = _left(plan)
    if model is not None and left and all(d.cause is Cause.REGION for d in left):
        say_used(model, {d.module: str(d.reason) for d in left})  # as the next calls would once more
        return
    reasons = "; ".join(sorted({f"{d.module or 'linear'}: {d.reason}" for d in plan})[:3])
    log.warning("%s: none of %d linears runs in 4 bits (%s)", name, len(plan), reasons)


def is_explained(model: nn.Module, plan: Sequence[Decision]) -> bool:
    """Tell whether :func:`say_nothing` or :func:`say_used` said why a graph's linears run in high precision."""
    return model in _explained and {d.module for d in _left(plan)} <= _explained[model]


def _left(plan: Sequence[Decision]) -> list[Decision]:
    return [d for d in plan if d.cause not in (Cause.BOUNDARY, Cause.KEPT, Cause.STEP, Cause.ADAPTER)]


def say_copied(model: nn.Module) -> None:
    """Warn that a copy of a compiled model is not compiled."""
    log.warning(
        "%s: PyTorch leaves the compilation by model.compile() out of a deep copy, which runs in the original "
        'precision. Compile the copy as well: copy.compile(backend="tahf4").',
        type(model).__name__,
    )


def say_nothing(model: nn.Module) -> None:
    """Warn if a model's tree puts nothing in 4 bits, unless a model around it left all of it, as an embedder."""
    plan = plan_modules(model)
    weights = {path: linear._parameters.get("weight") for path, linear in named_linears(model)}
    counted = [d for d in plan if d.cause is not Cause.ADAPTER]  # an adapter follows what it stands beside
    if lacks_4_bits(counted, lambda path: attached_keep(weights[path]) is not None):
        _explained.setdefault(model, set()).update(d.module for d in plan)
        _say(model, f"nothing runs in 4 bits: {why_nothing(model, plan)}")


def say_used(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Warn once of weights that graphs use otherwise than in a linear in 4 bits.

    Args:
        model: that was compiled.
        reasons: of its weights by path, or "".
    """
    if not reasons or model in _used:
        return
    _used.add(model)
    _explained.setdefault(model, set()).update(reasons)
    now = {d.module: str(d.reason) for d in plan_modules(model) if d.decision != "hif4"}  # weights were cast since
    reasons = {path: reason or now.get(path, "") for path, reason in reasons.items()}
    others = [path for path, reason in reasons.items() if not reason]
    texts = [f"{path}: {reason}" for path, reason in reasons.items() if reason][:3]
    if others:
        texts.append(
            f"{_listed(others)}: used otherwise than in a linear, as in einsum, bmm or an operator of somebody else, "
            "or as a part or a multiple; torch.nn.functional.linear(x, weight, bias) runs in 4 bits"
        )
    text = "linears of its repeated blocks run in high precision, because of how graphs use their weights"
    _say(model, f"{len(reasons)} {text} ({'; '.join(texts)})")


def say_functional(model: nn.Module, paths: Sequence[str], callers: Sequence[str]) -> None:
    """Warn once of functions outside of graphs that call ``F.linear``.

    Args:
        model: that was compiled.
        paths: of its linears that no graph has.
        callers: the functions.
    """
    if model in _functional or not paths:
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
    if model in _outside:
        return
    _outside.add(model)
    log.warning(
        "%s: called under torch.vmap or torch.func, where Dynamo compiles nothing. This call runs in high precision, "
        "and so does what it called until torch._dynamo.reset(). Compile the transform with the model: "
        'torch.compile(lambda x: torch.vmap(lambda row: model(row))(x), backend="tahf4").',
        type(model).__name__,
    )


@contextlib.contextmanager
def keeping_errors() -> Iterator[None]:
    """Keep an error of ours, which Dynamo may be set to suppress, for :func:`say_outside`."""
    try:
        yield
    except Tahf4Error as error:
        _hidden[:] = [f"{type(error).__name__}: {error}"] if suppresses_errors() else []
        raise
    _hidden.clear()  # of what was compiled before


def is_said(model: nn.Module) -> bool:
    """Tell whether :func:`say_outside` said it of a model, or :func:`say_transformed`."""
    return model in _outside


def say_outside(whole: nn.Module, model: nn.Module, paths: Sequence[str], alike: bool) -> None:
    """Warn of linears that Python called, since Dynamo handed them to no backend.

    Args:
        whole: the outermost module that runs.
        model: in it, that was compiled.
        paths: of its linears.
        alike: whether others of its class may have such linears, too.
    """
    _outside.update((model, whole))
    prefix = next(f"{path}." if path else "" for path, module in whole.named_modules() if module is model)
    others = f"; other {type(model).__name__}s that are compiled or called one by one may be alike" if alike else ""
    if compiler_is_off():
        causes = "its compiler is off now (torch._dynamo.config.disable, TORCHDYNAMO_DISABLE)"
    elif (stance := compiler_stance()) != "default":
        causes = f"torch.compiler.set_stance({stance!r})"
    elif suppresses_errors():
        hides = f"hides an error ({_hidden[0]})" if _hidden else "is set: Dynamo's log has the errors that it hides"
        causes = "; ".join([f"torch._dynamo.config.suppress_errors {hides}", *graph_breaks()[:2]])
    else:
        causes = "; ".join(graph_breaks()[:2]) or (
            "none, as where a whole forward is under torch.compiler.disable, or where a TorchDispatchMode "
            "(FlopCounterMode) was around the first call"
        )
    log.warning(
        "%s: %d linears of its repeated blocks run in high precision, because Dynamo did not hand their code to tahf4 "
        "(%s%s). Dynamo's reasons in this process: %s. TORCH_LOGS=graph_breaks,recompiles shows all; "
        "fullgraph=True turns a graph break into an error. What Dynamo gave up stays so until torch._dynamo.reset().",
        type(whole).__name__,
        len(paths),
        _listed([plain_path(prefix + path) for path in paths]),
        others,
        causes,
    )
