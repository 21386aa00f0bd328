"""A model under calibration: compiled with observers, its calls listened to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._dynamo import external_utils, trace_rules

from ..errors import CalibrationError
from ..options import Options
from .calls import copied
from .schedule import Schedule
from .seen import Seen

__all__ = ["Listener", "observed"]


class Listener:
    """Keeps a few of an expert's calls, and checks that each was observed.

    Attributes:
        calls: that were heard.
    """

    def __init__(self, seen: Seen, schedule: Schedule, expert: str) -> None:
        """Listen to an expert."""
        self._seen, self._schedule, self._expert = seen, schedule, expert
        self.calls = 0

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Keep the arguments; return a mark for :meth:`after`."""
        self.calls += 1
        self._seen.kept.offer(self._expert, self._schedule.place(), functools.partial(copied, args, kwargs))
        return self._seen.observed

    def after(self, mark: int) -> None:
        """Check that the call was observed.

        Raises:
            CalibrationError: it was not.
        """
        if self._seen.observed == mark:
            raise CalibrationError(
                f"a call of {self._expert or 'the module'} was not observed: torch.compile ran it as it is. It may be "
                "switched off (TORCHDYNAMO_DISABLE), not support this model, or be past its recompile limit, with too "
                "many shapes in one process (raise torch._dynamo.config.recompile_limit, or calibrate with fewer)"
            )


@contextlib.contextmanager
def observed(module: nn.Module, options: Options, listen: Listener) -> Iterator[None]:
    """Compile a module whole, show its calls to a listener, and put it back as it was."""
    # Equal options are one backend for Dynamo, which keeps what each compiled, up to a limit.
    settings: Any = {"backend": "tahf4", "options": replace(options, pipeline="calibration")}
    inner = getattr(module, "_orig_mod", module)  # of what torch.compile(module) returned
    old = {m: m._compiled_call_impl for m in module.modules() if m._compiled_call_impl is not None}
    for part in old:
        part._compiled_call_impl = None
    forward = inner.forward
    while isinstance(forward, functools.partial):  # hooks of diffusers wrap it so
        forward = forward.func
    if trace_rules.check(forward):  # PyTorch's own modules: Dynamo skips their files unless they are inlined
        call: Any = torch.compile(external_utils.wrap_inline(inner._call_impl), **settings)
    else:
        inner.compile(**settings)
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
