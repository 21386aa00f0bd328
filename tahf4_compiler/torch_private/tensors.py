"""Modes, dispatch and autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "below_autograd",
    "contiguous_strides",
    "derivative_asked",
    "has_tangent",
    "hidden_from_dynamo",
    "int_product",
    "outside_of_tracing",
    "python_kernels",
    "real_tensors",
    "takes_data",
    "under_modes",
]

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


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Leave the fake mode at hand, so that new tensors have memory."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def under_modes() -> bool:
    """Whether a mode sees the operators that are called now, as one that makes fake tensors does."""
    return torch._C._len_torch_dispatch_stack() > 0


def python_kernels() -> contextlib.AbstractContextManager[Any]:
    """Let operators on symbolic sizes run by their kernels in Python, as where PyTorch traces."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def int_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write the product of int8 ``[M, K]`` and ``[N, K]`` into int32 ``[M, N]``, by the library of the device.

    On CUDA, M must be above 16, and K and N multiples of 8.
    """
    torch.ops.aten._int_mm.out(left, right.t(), out=out)


def hidden_from_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose frames Dynamo leaves alone.

    ``torch.compiler.disable`` imports Dynamo at once; this does it with the first call.
    """
    hidden: Callable[..., Any] = torch._disable_dynamo(function)
    return hidden


def takes_data(tensor: Tensor, data: Tensor) -> bool:
    """Whether ``tensor.data = data`` can be said: both are of one kind, as of one device type."""
    return torch._has_compatible_shallow_copy_type(tensor, data)


def contiguous_strides(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return the strides of a contiguous tensor whose sizes may be symbolic."""
    return torch._prims_common.make_contiguous_strides_for(tuple(shape))
