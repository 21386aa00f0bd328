"""How the calls of modules run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from .frames import callers

__all__ = [
    "Around",
    "around_calls",
    "compiled_whole",
    "going_through",
    "replaced_linear",
    "without_compiled_calls",
]

_hooked = False  # whether there were hooks where something was compiled whole the last time

Around = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], tuple[Any, bool]]
"""Takes a compiled call with its arguments; returns the result, and whether this was the last one to go through it."""


def around_calls(model: nn.Module, around: Around) -> bool:
    """Let the calls of a compiled module, which runs now, go through a function until it has seen enough.

    Nothing happens if the module was not compiled itself, as where a function that calls it was, or if its calls go
    through such a function already.

    Args:
        model: as it was before ``torch.compile``.
        around: see :data:`Around`.

    Returns:
        Whether the module was compiled itself.
    """
    for caller in callers():
        host = caller.variable("self")
        if isinstance(host, nn.Module) and getattr(host, "_orig_mod", None) is model:
            name = "forward"
            break
        if host is model and model._compiled_call_impl is not None:
            name = "_compiled_call_impl"
            break
    else:
        return False
    if not hasattr(getattr(host, name), "_tahf4_around"):
        setattr(host, name, going_through(around, getattr(host, name), host, name))
    return True


def going_through(
    around: Around, original: Callable[..., Any], host: nn.Module | None = None, name: str = ""
) -> Callable[..., Any]:
    """Return what is to stand in the place of a compiled call.

    Args:
        around: see :data:`Around`.
        original: the compiled call.
        host: a module that holds the result as an attribute until the last call, or None.
        name: of the attribute.
    """
    from torch._dynamo.eval_frame import skip_code

    @functools.wraps(original)  # Dynamo, where it traces a call, finds there what stands behind
    def call(*args: Any, **kwargs: Any) -> Any:
        result, last = around(original, args, kwargs)
        if last and host is not None and host.__dict__.get(name) is call:
            setattr(host, name, original)
        return result

    around = torch.compiler.disable(around)  # another compilation around this one gets nothing more than before
    skip_code(call.__code__)  # type: ignore[attr-defined]
    call._tahf4_around = original  # type: ignore[attr-defined]
    call.__wrapped__ = getattr(original, "__wrapped__", original)
    call._torchdynamo_wrapper_id = id(call)  # type: ignore[attr-defined]  # else nothing compiles it again
    return call


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


def _has_hooks(model: nn.Module) -> bool:
    ours = (held for m in model.modules() for held in (m._forward_hooks, m._forward_pre_hooks))
    return any((*ours, all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks))


@contextlib.contextmanager
def compiled_whole(
    module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]], **settings: Any
) -> Iterator[None]:
    """Let the calls of a module run compiled with other settings, and then as before.

    PyTorch's own modules are compiled as well, whose files Dynamo skips unless they are inlined. By default Dynamo does
    not look whether a module has hooks: it would run what it compiled for another model of the class, without them. It
    never looks at hooks of all modules, and keeps few versions where hooks differ: with hooks, all is compiled anew.

    Args:
        module: as it is, or what ``torch.compile(module)`` returned.
        around: takes the compiled call and returns what is called in its place.
        settings: of ``torch.compile``.
    """
    from torch._dynamo import external_utils, trace_rules

    global _hooked
    before, _hooked = _hooked, _has_hooks(module)
    if before or _hooked:
        torch._dynamo.reset_code_caches()
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
        call = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)(call)
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
