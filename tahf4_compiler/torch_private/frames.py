"""Who calls: neither PyTorch nor the libraries around it say so, and only the stack tells.

Nothing else of this project reads frames.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "Caller",
    "caller_that_holds",
    "callers",
    "outermost_that_holds",
    "python_linears",
    "running_around",
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
        if name not in self.code.co_varnames + self.code.co_freevars:
            return None  # before Python 3.13, whoever looks leaves a copy of all variables in the frame, kept alive
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
    module = None
    for called, module in _callers_that_hold(part):
        if module._compiled_call_impl is not None or module is not called:
            break
    return module


def outermost_that_holds(part: nn.Module) -> nn.Module:
    """Return the outermost module that runs now and holds a module, compiled or not; else the module itself."""
    return [part, *running_around(part)][-1]


def running_around(part: nn.Module) -> list[nn.Module]:
    """Return the other modules that run now and hold a module, compiled or not, the innermost first."""
    return list(dict.fromkeys(module for _, module in _callers_that_hold(part) if module is not part))


def _callers_that_hold(part: object) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the modules on the stack that hold a module or parameter, the innermost first, and what they compile."""
    for caller in callers() if part is not None else ():
        called = caller.variable("self")
        if isinstance(called, nn.Module):
            module: nn.Module = getattr(called, "_orig_mod", called)
            parts = module.modules() if isinstance(part, nn.Module) else module.parameters()
            if any(other is part for other in parts):
                yield called, module


class _Weights(TorchFunctionMode):
    """Notes the weight of a call of ``F.linear``; nothing else tells the arguments of a function without a frame."""

    found: set[int]
    caller: FrameType | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
        viewed = getattr(weight, "_base", None)
        self.found.add(id(weight if viewed is None else viewed))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def python_linears(
    modules: set[nn.Module], functional: dict[str, set[int]], others: Iterable[type] = ()
) -> Iterator[None]:
    """Collect the modules whose ``nn.Linear.forward`` Python runs in this thread, and who else calls ``F.linear``.

    A hook or another ``forward`` would do, but Dynamo guards both: it would compile everything again.

    Args:
        modules: is told of each module.
        functional: is told of each function, with the identities of the weights that it gave, or of what they view.
        others: classes of modules whose ``forward`` counts as well.
    """
    from torch._dynamo.eval_frame import skip_code

    forwards = [inspect.unwrap(cls.forward) for cls in (nn.Linear, *others)]  # type: ignore[attr-defined]
    codes = {forward.__code__ for forward in forwards if inspect.isfunction(forward)}
    reads = _Weights()

    def called(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("c_return", "c_exception") and argument is nn.functional.linear and frame is reads.caller:
            reads.caller = None
            reads.__exit__(None, None, None)
        if event == "call" and frame.f_code in codes and isinstance(module := frame.f_locals.get("self"), nn.Module):
            modules.add(module)
        # Within a call that is noted, modes of the user call it again.
        if event == "c_call" and argument is nn.functional.linear and reads.caller is None:
            outer: FrameType | None = frame
            while outer is not None and outer.f_globals.get("__name__") == nn.functional.__name__:
                outer = outer.f_back
            if outer is not None and outer.f_code in codes:
                return  # by itself, or in F.multi_head_attention_forward
            if Caller(frame).library == Caller(sys._getframe()).library:
                return  # a reference operator, on a device without kernels, or the mode below goes on
            if str(frame.f_globals.get("__name__")).startswith(("torch.fx.", "torch._")):
                return  # a graph that is captured meanwhile
            found = frame.f_code
            name = f"{found.co_name}, {os.path.basename(found.co_filename)}:{found.co_firstlineno}"
            reads.found, reads.caller = functional.setdefault(name, set()), frame
            reads.__enter__()  # for this call alone: Dynamo guards the modes around what it compiles

    for function in (called, _Weights.__torch_function__):
        skip_code(function.__code__)  # Dynamo would compile it like any function that runs inside of what is compiled
    sys.setprofile(called)
    try:
        yield
    finally:
        if sys.getprofile() is called:  # else the model's own code began to profile
            sys.setprofile(None)
