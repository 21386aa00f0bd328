"""What Dynamo compiles, from where, and why not; and PyTorch's log of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from .calls import Around, going_through
from .frames import caller_that_holds, callers

__all__ = [
    "before_frames",
    "changing_floats",
    "compilation",
    "compile_for_values",
    "compiled_in_place",
    "compiler_is_off",
    "compiler_stance",
    "constant_weights",
    "debug_folder",
    "dynamo_scope",
    "dynamo_source",
    "fake_input",
    "graph_breaks",
    "keep_number",
    "log_artifact",
    "logs_artifacts",
    "suppresses_errors",
    "tracing",
    "transformed_regions",
    "when_compiled",
    "when_not_compiled",
]


def dynamo_source(node: fx.Node) -> str:
    """Return the expression that Dynamo reads an input of its graph from (``L['self']._modules['up']``), or ``""``."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    name = source.name  # a property since torch 2.10, a method before
    return str(name() if callable(name) else name)


def dynamo_scope() -> Mapping[str, Any]:
    """Return the variables that Dynamo's expressions begin with: ``L`` and ``G`` of the frame that is compiled."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    return {"L": output.local_scope, "G": output.global_scope}


def fake_input(context: Any, value: Any) -> Any:
    """Return an input of Dynamo's graph in a ``TracingContext``'s fake mode, with the symbols that Dynamo gave it."""
    if not isinstance(value, Tensor):
        return value
    symbolic = context.tensor_to_context.get(value)
    if symbolic is None:
        return context.fake_mode.from_tensor(value, static_shapes=True)
    return context.fake_mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)


def keep_number(fake: Any, copy: Any) -> None:
    """Let ``copy.item()`` be the symbol that ``fake.item()`` is: Dynamo's, of a Python number that changes."""
    if getattr(fake, "item_memo", None) is not None:
        copy.item_memo = fake.item_memo


def changing_floats(value: Any) -> set[str]:
    """Return the symbols, of Python floats that change between calls, that a symbolic number depends on."""
    if not isinstance(value, torch.SymFloat | torch.SymInt | torch.SymBool):
        return set()
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    return {str(symbol) for symbol in value.node.expr.free_symbols if symbol_is_type(symbol, SymT.FLOAT)}


def compile_for_values(symbols: Iterable[str]) -> NoReturn:
    """Let Dynamo begin again with the floats of these symbols as constants, with a guard on their values."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    for symbol in symbols:
        TensorifyState.specialize(symbol)
    raise TensorifyScalarRestartAnalysis


def compiler_is_off() -> bool:
    """Whether ``torch.compile`` compiles nothing, with any backend, as the environment or Dynamo's settings are now."""
    return bool(torch._dynamo.config.disable) or os.environ.get("TORCHDYNAMO_DISABLE") == "1"


def compiler_stance() -> str:
    """Return what ``torch.compiler.set_stance`` was called with last: ``"default"`` if it was not."""
    from torch._dynamo.eval_frame import _stance

    return str(_stance.stance)


def suppresses_errors() -> bool:
    """Whether Dynamo, as it is set now, runs code as it is where a backend raises an error."""
    return bool(torch._dynamo.config.suppress_errors)


def transformed_regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes of Dynamo's graph that stand under transforms of functions (``torch.vmap``, ``torch.func``).

    A region goes from the begin of an outermost transform to its end, or to where a gradient of it is taken (as the
    function that ``torch.func.vjp`` returns does).
    """
    found: list[list[fx.Node]] = []
    depth, behind = 0, []
    for node in graph.nodes:
        own = node.op == "call_function" and "._functorch" in (getattr(node.target, "__module__", "") or "")
        name = getattr(node.target, "__name__", "") if own else ""
        begins = name.endswith("_increment_nesting")
        behind.append(node)
        if begins and depth == 0:
            found.append([])
            behind = [node]
        depth += begins - name.endswith("_decrement_nesting")
        if found and (depth or name.endswith("_decrement_nesting") or name == "_autograd_grad"):
            found[-1] += behind
            behind = []
    return found


def constant_weights() -> str:
    """Return the setting by which Dynamo, as it is set now, puts parameters into its graphs as constants, or ``""``."""
    from torch._dynamo.utils import is_parameter_freezing

    if is_parameter_freezing():
        return "torch._inductor.config.freezing"
    names = ("install_free_tensors", "prepare_freezing")
    return next((f"torch._dynamo.config.{name}" for name in names if getattr(torch._dynamo.config, name, False)), "")


def graph_breaks() -> list[str]:
    """Return in one line each why Dynamo did not put code of this process into a graph.

    A recompile limit comes first: Dynamo gives a whole function up there, once. Then the most frequent.
    """
    from torch._dynamo.utils import counters

    found: Counter[str] = Counter()
    limits = []
    for text, count in (*counters["unimplemented"].items(), *counters["graph_break"].items()):
        title, _, rest = text.partition("\n")
        explained = rest.strip().partition("Explanation: ")[2].splitlines()
        reason = next((line.strip(" -") for line in explained if not line.endswith(":")), title)
        if "recompile limit exceeded" in title:
            reason = f"{reason.partition('. ')[0]}. Raise it before the first call; Dynamo's log names the function"
            limits.append(reason)
        found[reason] += count
    return list(dict.fromkeys([*limits, *(reason for reason, _ in found.most_common())]))


def when_compiled(
    backend: Callable[..., Any],
    module: Callable[[nn.Module, Mapping[str, Any]], Around | None],
    function: Callable[[nn.Module | None, Mapping[str, Any]], Around | None],
) -> None:
    """Call a function where something is given to ``torch.compile``, from now on until the process ends.

    A backend is told of graphs alone. Of a module whose code Dynamo never begins to compile, there is none.

    Args:
        backend: that it is compiled with.
        module: is called where it is a module. Takes the module and the keywords of the backend (``options``,
            ``mode``); returns what the compiled calls are to go through, or None.
        function: the same where it is a function. Takes the module whose method it is, or None.
    """
    from torch._dynamo import external_utils
    from torch._dynamo.eval_frame import OptimizeContext, innermost_backend

    context: Any = OptimizeContext
    own = context.__call__
    inner = [const for const in external_utils.wrap_inline.__code__.co_consts if inspect.iscode(const)]

    @functools.wraps(own)
    def compiled(self: Any, given: Any) -> Any:
        result, compiler = own(self, given), innermost_backend(self.callback)
        if not _is(compiler, backend):
            return result
        keywords = getattr(compiler, "kwargs", {})
        if isinstance(given, nn.Module):
            if (around := module(given, keywords)) is not None:
                result.forward = going_through(around, result.forward, result, "forward")
            return result
        model, name = getattr(given, "__self__", None), getattr(given, "__name__", "")
        model = model if isinstance(model, nn.Module) else None
        if model is not None and name == "_call_impl":  # which nn.Module.compile compiles
            around = module(model, keywords)
            return result if around is None else going_through(around, result, model, "_compiled_call_impl")
        code = getattr(given, "__code__", None)
        of_module = name in ("_call_impl", "_wrapped_call_impl") or code in inner
        if of_module or not inspect.isfunction(result):  # what PyTorch itself makes where a module or class is given
            return result
        around = function(model, keywords)
        return result if around is None else going_through(around, result)

    context.__call__ = compiled


def _is(compiler: Any, backend: Callable[..., Any]) -> bool:
    return getattr(compiler, "compiler_fn", compiler) is backend  # torch.compile wraps one that has options


def when_not_compiled(backend: Callable[..., Any], function: Callable[[], None]) -> None:
    """Call a function where ``torch.compile`` hands back what it was given, because the environment says so.

    Args:
        backend: that ``torch.compile`` was called with. ``torch.compile(disable=True)`` does not count.
        function: is called each time.
    """
    from torch._dynamo.eval_frame import _NullDecorator

    own: Any = _NullDecorator.__call__

    def handed_back(self: Any, given: Any) -> Any:
        asked = next((caller for caller in callers() if caller.code is torch.compile.__code__), None)
        if asked is not None and _is(asked.variable("backend"), backend) and not asked.variable("disable"):
            function()
        return own(self, given)

    _NullDecorator.__call__ = handed_back  # type: ignore[method-assign, assignment]


def before_frames(
    backend: Callable[..., Any],
    function: Callable[[nn.Module, Mapping[str, Any], bool], None],
    overruled: Callable[[nn.Module, Sequence[nn.Module]], None],
) -> None:
    """Call a function where Dynamo begins to compile code of a module, whether a graph comes of it or not.

    ``torch._dynamo.reset`` forgets it. A second call with the same arguments changes nothing.

    Args:
        backend: that the code would be compiled with.
        function: takes the module that was compiled, or one that a compiled function calls; the keywords of the backend
            (``options``, ``mode``); and whether ``torch.vmap`` or ``torch.func``, where Dynamo gives up, is around.
        overruled: takes a module that Dynamo compiles with another backend, which gets its parts, too, and those of
            them that ``module.compile`` compiled with this one.
    """
    handler, notice = torch._dynamo.callback_handler, _notice(backend, function, overruled)
    if notice not in handler.start_callbacks:
        handler.register_start_callback(notice)


@functools.cache
def _notice(backend: Any, function: Callable[..., Any], overruled: Callable[..., Any]) -> Callable[[Any], None]:
    from torch._dynamo.convert_frame import _compile
    from torch._dynamo.eval_frame import innermost_backend

    def notice(_: Any) -> None:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        compiling = next((caller for caller in callers() if caller.code is _compile.__code__), None)
        if compiling is None:
            return
        compiler = innermost_backend(compiling.variable("compiler_fn"))
        values = compiling.variable("locals")  # a hook's own function has the module under another name than self
        module = next((v for v in (values.get("self"), *values.values()) if isinstance(v, nn.Module)), None)
        inside = module.modules() if module is not None else ()
        if module is not None and _is(compiler, backend):
            function(caller_that_holds(module) or module, getattr(compiler, "kwargs", {}), transformed)
        elif parts := [m for m in inside if compiled_in_place(m, backend)]:
            overruled(module, parts)

    return notice


def compiled_in_place(module: nn.Module, backend: Callable[..., Any]) -> bool:
    """Whether ``module.compile`` compiled a module, the last time, with a backend."""
    from torch._dynamo.eval_frame import innermost_backend

    call: Any = module._compiled_call_impl
    call = getattr(call, "_tahf4_around", call)
    held = inspect.getclosurevars(call).nonlocals if inspect.isfunction(call) else {}
    return "self" in held and _is(innermost_backend(held["self"].callback), backend)


def compilation() -> Any:
    """Return the ``TracingContext`` of the compilation at hand, which has its fake mode, or None."""
    return torch._guards.TracingContext.try_get()


def tracing(fake_mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Be in a compilation of one's own, with a fake mode."""
    return torch._guards.tracing(torch._guards.TracingContext(fake_mode))


def debug_folder() -> Path:
    """Return where ``TORCH_COMPILE_DEBUG`` puts what it writes in this process."""
    from torch._dynamo.utils import get_debug_dir

    return Path(get_debug_dir())


def logs_artifacts() -> bool:
    """Whether PyTorch's structured trace (``TORCH_TRACE``, for ``tlparse``) is written."""
    return bool(torch._logging._internal.trace_log.handlers)


def log_artifact(name: str, text: str) -> None:
    """Write a text into PyTorch's structured trace."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text
    )
