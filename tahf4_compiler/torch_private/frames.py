"""Who calls: neither PyTorch nor the libraries around it say so, and only the stack tells.

Nothing else of this project reads frames.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn

__all__ = [
    "Caller",
    "caller_that_holds",
    "callers",
    "python_linears",
]


class Caller:
    """A function that runs now.

    Attributes:
        code: of the function.
        name: of the function.
        library: first part of its module's name.
    """

    def __init__(self, frame: FrameType) -> None:
        """Use :func:`callers`."""
        self._frame = frame
        self.code: CodeType = frame.f_code
        self.name = frame.f_code.co_name
        self.library = str(frame.f_globals.get("__name__", "")).partition(".")[0]

    def variable(self, name: str) -> Any:
        """Return a variable of the function, or None."""
        return self._frame.f_locals.get(name)


def callers() -> Iterator[Caller]:
    """Yield the functions that run in this thread, from the one that asks outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield Caller(frame)
        frame = frame.f_back


def caller_that_holds(part: object) -> nn.Module | None:
    """Return the module that was compiled, runs now, and holds a module or parameter.

    Dynamo compiles the frames below a graph break one by one and does not say what called them.
    """
    if part is None:
        return None
    outermost: nn.Module | None = None
    for caller in callers():
        called = caller.variable("self")
        if isinstance(called, nn.Module):
            module: nn.Module = getattr(called, "_orig_mod", called)
            parts = module.modules() if isinstance(part, nn.Module) else module.parameters()
            if any(other is part for other in parts):
                outermost = module
                if module._compiled_call_impl is not None or module is not called:
                    return module
    return outermost


@contextlib.contextmanager
def python_linears(modules: set[nn.Module]) -> Iterator[None]:
    """Collect the modules whose ``nn.Linear.forward`` Python runs in this thread.

    A hook or another ``forward`` would do, but Dynamo guards both: it would compile everything again.
    """
    code = nn.Linear.forward.__code__

    def called(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code is code:
            modules.add(frame.f_locals["self"])

    sys.setprofile(called)
    try:
        yield
    finally:
        if sys.getprofile() is called:  # else the model's own code began to profile
            sys.setprofile(None)
