"""What only PyTorch's insides can tell or do; each function has a contract in ``tests/test_torch_private.py``.

The contracts were seen on torch 2.13. A release that breaks one breaks its test, and nothing else needs to be searched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.autograd import forward_ad
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "AUTOCAST",
    "Around",
    "Interpreter",
    "around_calls",
    "before_frames",
    "below_autograd",
    "caller_that_holds",
    "changing_floats",
    "compile_for_values",
    "compiled_whole",
    "compiler_is_off",
    "compiler_stance",
    "derivative_asked",
    "dynamo_scope",
    "dynamo_source",
    "fake_input",
    "graph_breaks",
    "has_tangent",
    "keep_number",
    "outermost_that_holds",
    "outside_of_tracing",
    "refuse_in_inductor",
    "replaced_linear",
    "transformed_regions",
    "weights_are_constants",
    "when_compiled",
    "without_compiled_calls",
]


AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
"""What stands in a graph where autocast begins and ends; the end takes the node of the begin."""


class Interpreter(fx.Interpreter):
    """Runs a graph, also while it is traced, with autocast on where the graph switches it on.

    PyTorch's own functions only write themselves into the trace. The types of what follows would be those without
    autocast.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call."""
        if target is AUTOCAST[0]:
            mode = torch.autocast(*args, **kwargs)
            mode.__enter__()
            return mode
        if target is AUTOCAST[1]:
            return args[0].__exit__(None, None, None)
        return super().call_function(target, args, kwargs)


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
    return {str(symbol) for symbol in value.node.expr.free_symbols if symbol_is_type(symbol, SymT.FLOAT)}


def compile_for_values(symbols: Iterable[str]) -> NoReturn:
    """Let Dynamo begin again with the floats of these symbols as constants, with a guard on their values."""
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


def weights_are_constants() -> bool:
    """Whether Dynamo, as it is set now, puts parameters into its graphs as constants."""
    from torch._dynamo.utils import is_parameter_freezing

    return bool(is_parameter_freezing())


def outside_of_tracing() -> contextlib.AbstractContextManager[Any]:
    """Leave the modes that trace and fake, those before the dispatcher among them."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def derivative_asked(tensors: Sequence[Tensor]) -> bool:
    """Whether a gradient or a forward-mode derivative with respect to some tensors is asked for now."""
    return (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) or has_tangent(tensors)


def has_tangent(values: Sequence[Any]) -> bool:
    """Whether some of the values are dual tensors of forward-mode differentiation."""
    if forward_ad._current_level < 0:  # none live, which torch.func.jvp makes as well
        return False
    tensors = [value for value in values if isinstance(value, Tensor)]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def below_autograd(
    operator: torch._ops.OpOverload, keyset: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run what of an operator comes after its function for autograd, which got this set of dispatch keys."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


def refuse_in_inductor(operator: Any, error: Callable[[], Exception]) -> None:
    """Let Inductor raise an error where it would compile an operator whose result is read.

    ``torch._inductor.lowering`` must be imported.
    """
    from torch._inductor.lowering import register_lowering

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error()

    register_lowering(operator, type_promotion_kind=None)(refuse)


def caller_that_holds(part: object) -> nn.Module | None:
    """Return the module that was compiled, runs now, and holds a module or parameter.

    Dynamo compiles the frames below a graph break one by one and does not say what called them, so the modules that run
    are looked for where Python keeps them: on the stack, as ``self`` of a call.
    """
    module = None
    for called, module in _callers_that_hold(part):
        if module._compiled_call_impl is not None or module is not called:
            break
    return module


def outermost_that_holds(part: nn.Module) -> nn.Module:
    """Return the outermost module that runs now and holds a module, compiled or not; else the module itself."""
    return [part, *(module for _, module in _callers_that_hold(part))][-1]


def _callers_that_hold(part: object) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the modules on the stack that hold a module or parameter, the innermost first, and what they compile."""
    frame = sys._getframe(1) if part is not None else None
    while frame is not None:
        called = frame.f_locals.get("self")
        if isinstance(called, nn.Module):
            module: nn.Module = getattr(called, "_orig_mod", called)
            parts = module.modules() if isinstance(part, nn.Module) else module.parameters()
            if any(other is part for other in parts):
                yield called, module
        frame = frame.f_back


Around = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], tuple[Any, bool]]
"""Takes a compiled call with its arguments; returns the result, and whether this was the last one to go through it."""


def around_calls(model: nn.Module, around: Around) -> None:
    """Let the calls of a compiled module, which runs now, go through a function until it has seen enough.

    Nothing happens if the module was not compiled itself, as where a function that calls it was, or if its calls go
    through such a function already.

    Args:
        model: as it was before ``torch.compile``.
        around: see :data:`Around`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        host = frame.f_locals.get("self")
        if isinstance(host, nn.Module) and getattr(host, "_orig_mod", None) is model:
            name = "forward"
            break
        if host is model and model._compiled_call_impl is not None:
            name = "_compiled_call_impl"
            break
        frame = frame.f_back  # type: ignore[assignment]
    else:
        return
    if not hasattr(getattr(host, name), "_tahf4_around"):
        setattr(host, name, _going_through(around, host, name, getattr(host, name)))


def _going_through(around: Around, host: nn.Module, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is to stand in an attribute of a module in the place of a compiled call."""
    from torch._dynamo.eval_frame import skip_code

    @functools.wraps(original)  # Dynamo, where it traces a call, finds there what stands behind
    def call(*args: Any, **kwargs: Any) -> Any:
        result, last = around(original, args, kwargs)
        if last and host.__dict__.get(name) is call:
            setattr(host, name, original)
        return result

    around = torch.compiler.disable(around)  # another compilation around this one gets nothing more than before
    skip_code(call.__code__)  # type: ignore[attr-defined]
    call._tahf4_around = True  # type: ignore[attr-defined]
    return call


def when_compiled(
    backend: Callable[..., Any], function: Callable[[nn.Module, Mapping[str, Any]], Around | None]
) -> None:
    """Call a function where a module is given to ``torch.compile``, from now on until the process ends.

    A backend is told of graphs alone. Of a module whose code Dynamo never begins to compile, there is none.

    Args:
        backend: that the module is compiled with.
        function: takes the module and the keywords of the backend (``options``, ``mode``); returns what the compiled
            calls are to go through, or None.
    """
    from torch._dynamo.eval_frame import OptimizeContext, innermost_backend

    context: Any = OptimizeContext
    own = context.__call__

    @functools.wraps(own)
    def compiled(self: Any, given: Any) -> Any:
        result, compiler = own(self, given), innermost_backend(self.callback)
        model = given if isinstance(given, nn.Module) else getattr(given, "__self__", None)
        called = model is given or getattr(given, "__name__", "") == "_call_impl"  # which nn.Module.compile compiles
        if isinstance(model, nn.Module) and called and _is(compiler, backend):
            around = function(model, getattr(compiler, "kwargs", {}))
            if around is not None and model is given:
                result.forward = _going_through(around, result, "forward", result.forward)
            elif around is not None:
                result = _going_through(around, model, "_compiled_call_impl", result)
        return result

    context.__call__ = compiled


def _is(compiler: Any, backend: Callable[..., Any]) -> bool:
    return getattr(compiler, "compiler_fn", compiler) is backend  # torch.compile wraps one that has options


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

    def in_place(module: nn.Module) -> bool:
        call: Any = module._compiled_call_impl
        call = call.__wrapped__ if hasattr(call, "_tahf4_around") else call
        held = inspect.getclosurevars(call).nonlocals if inspect.isfunction(call) else {}
        return "self" in held and _is(innermost_backend(held["self"].callback), backend)

    def notice(_: Any) -> None:
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not _compile.__code__:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None:
            return
        compiler = innermost_backend(frame.f_locals["compiler_fn"])
        values = frame.f_locals["locals"]  # a hook's own function has the module under another name than self
        module = next((v for v in (values.get("self"), *values.values()) if isinstance(v, nn.Module)), None)
        inside = module.modules() if module is not None else ()
        if module is not None and _is(compiler, backend):
            function(caller_that_holds(module) or module, getattr(compiler, "kwargs", {}), transformed)
        elif parts := [m for m in inside if m._compiled_call_impl is not None and in_place(m)]:
            overruled(module, parts)

    return notice


def graph_breaks() -> list[str]:
    """Return in one line each why Dynamo did not put code of this process into a graph, the most frequent first."""
    from torch._dynamo.utils import counters

    found: Counter[str] = Counter()
    for text, count in (*counters["unimplemented"].items(), *counters["graph_break"].items()):
        title, _, rest = text.partition("\n")
        explained = rest.strip().partition("Explanation: ")[2].splitlines()
        found[next((line.strip(" -") for line in explained if not line.endswith(":")), title)] += count
    return [text for text, _ in found.most_common()]


@contextlib.contextmanager
def without_compiled_calls(model: nn.Module) -> Iterator[None]:
    """Run a model's modules as they are, whatever of them ``nn.Module.compile`` compiled."""
    held = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in held:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in held.items():
            module._compiled_call_impl = call


@contextlib.contextmanager
def compiled_whole(
    module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]], **settings: Any
) -> Iterator[None]:
    """Let the calls of a module run compiled with other settings, and then as before.

    PyTorch's own modules are compiled as well, whose files Dynamo skips unless they are inlined.

    Args:
        module: as it is, or what ``torch.compile(module)`` returned.
        around: takes the compiled call and returns what is called in its place.
        settings: of ``torch.compile``.
    """
    from torch._dynamo import external_utils, trace_rules

    inner = getattr(module, "_orig_mod", module)
    with without_compiled_calls(module):
        forward = inner.forward
        while isinstance(forward, functools.partial):  # hooks of diffusers wrap it so
            forward = forward.func
        if trace_rules.check(forward):
            call: Any = torch.compile(external_utils.wrap_inline(inner._call_impl), **settings)
        else:
            inner.compile(**settings)
            call = inner._compiled_call_impl
        inner._compiled_call_impl = around(call)
        own_forward = module.__dict__.get("forward")
        if inner is not module:
            module.forward = inner.__call__
        try:
            yield
        finally:
            inner._compiled_call_impl = None
            if inner is not module:
                module.forward = own_forward  # type: ignore[assignment]


@contextlib.contextmanager
def replaced_linear(around: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """Let every linear of eager modules run another function.

    They read ``torch.nn.functional.linear``: ``nn.Linear``, ``nn.MultiheadAttention`` and functional calls. A
    ``TorchFunctionMode`` would not see those inside of Python functions that it is told of itself, such as
    ``multi_head_attention_forward``.

    Args:
        around: takes the original function and returns what runs in its place.
    """
    original = nn.functional.linear
    fast = torch.backends.mha.get_fastpath_enabled()
    nn.functional.linear = around(original)
    torch.backends.mha.set_fastpath_enabled(False)  # one native operator, which reads no linear
    try:
        yield
    finally:
        nn.functional.linear = original
        torch.backends.mha.set_fastpath_enabled(fast)
