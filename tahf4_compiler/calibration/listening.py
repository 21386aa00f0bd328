"""A model under calibration: compiled with observers, its calls listened to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo import external_utils, trace_rules

from ..errors import CalibrationError
from ..options import Options
from .calls import copied

if TYPE_CHECKING:
    from .calibration import Calibration

__all__ = ["Listener", "observed", "observing_backend"]


class Listener:
    """Keeps a few of an expert's calls, and checks that each was observed."""

    def __init__(self, calibration: Calibration, expert: str) -> None:
        """Listen for a calibration."""
        self._calibration, self._expert = calibration, expert

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Keep the arguments; return a mark for :meth:`after`."""
        calibration, expert = self._calibration, self._expert
        calibration._own_calls |= not calibration._running
        place, all_kept = calibration._place(), calibration._candidates
        due = all_kept is not None or calibration.kept.due(expert, place.branch)
        call = copied(args, kwargs) if due else None
        if all_kept is not None:
            all_kept.append((expert, place, call))
        else:
            calibration.kept.add(expert, place, call)
        return calibration._observed

    def after(self, mark: int) -> None:
        """Check that the call was observed.

        Raises:
            CalibrationError: it was not.
        """
        if self._calibration._observed == mark:
            raise CalibrationError(
                f"a call of {self._expert or 'the module'} was not observed: torch.compile ran it as it is. It may be "
                "switched off (TORCHDYNAMO_DISABLE), not support this model, or be past its recompile limit, with too "
                "many shapes in one process (raise torch._dynamo.config.recompile_limit, or calibrate with fewer)"
            )


@functools.lru_cache(maxsize=16)
def observing_backend(options: Options) -> Any:
    """Return one backend for all calibrations with the same options.

    Dynamo keeps what a backend compiled with the model's code, up to a limit; a new backend for each calibration would
    soon reach it.
    """
    from ..backends.dynamo import compiler
    from ..passes import classify, normalize, observe, plan

    return compiler(options, [normalize.Normalize(), classify.Classify(), plan.Plan(), observe.Observe()])


@contextlib.contextmanager
def observed(module: nn.Module, backend: Any, listen: Listener) -> Iterator[None]:
    """Compile a module whole, show its calls to a listener, and put it back as it was."""
    inner = getattr(module, "_orig_mod", module)  # of what torch.compile(module) returned
    old = {m: m._compiled_call_impl for m in module.modules() if m._compiled_call_impl is not None}
    for part in old:
        part._compiled_call_impl = None
    forward = inner.forward
    while isinstance(forward, functools.partial):  # hooks of diffusers wrap it so
        forward = forward.func
    if trace_rules.check(forward):  # PyTorch's own modules: Dynamo skips their files unless they are inlined
        call: Any = torch.compile(external_utils.wrap_inline(inner._call_impl), backend=backend)
    else:
        inner.compile(backend=backend)
        call = inner._compiled_call_impl

    def heard(*args: Any, **kwargs: Any) -> Any:
        mark = listen.before(args, kwargs)
        result = call(*args, **kwargs)
        listen.after(mark)
        return result

    inner._compiled_call_impl = heard
    own_forward = module.__dict__.get("forward")
    if inner is not module:
        module.forward = inner.__call__
    try:
        yield
    finally:
        inner._compiled_call_impl = None
        if inner is not module:
            module.forward = own_forward  # type: ignore[assignment]
        for part, compiled in old.items():
            part._compiled_call_impl = compiled
