"""How the operators of this project are defined: opaque to compilers, and without a derivative.

Not ``torch.library.custom_op``: a gradient through its results in integers is zero without a word, forward-mode
derivatives pass it by, and the layers that it puts around a call take longer than a small product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema

from ..errors import GradientError
from ..torch_private.tensors import below_autograd, derivative_asked, hidden_from_dynamo

__all__ = ["define", "operator", "refuse_derivatives"]

_LIBRARY = Library("tahf4", "FRAGMENT")


def operator(function: Callable[..., Any], name: str = "") -> Any:
    """Define ``tahf4::name`` by a function, whose annotations give the arguments and results, and whose name it has."""
    name = name or function.__name__
    define(_LIBRARY, name, infer_schema(function, mutates_args=()), function)
    return getattr(torch.ops.tahf4, name)


def define(library: Library, name: str, schema: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define an operator that runs a function on every device, and that refuses to be differentiated.

    A function for one device (``library.impl``) comes before the general one.

    Args:
        library: of the operator's namespace.
        name: of the operator.
        schema: its arguments and results.
        function: takes tensors that need no derivative.
    """
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    found: torch._ops.OpOverload = getattr(getattr(torch.ops, library.ns), name).default

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_derivatives(found, *args, **kwargs)
        return below_autograd(found, keyset, args, kwargs)

    # Where Dynamo hands a frame back to Python, it would compile these.
    library.impl(name, hidden_from_dynamo(function), "CompositeExplicitAutograd")
    library.impl(name, hidden_from_dynamo(autograd), "Autograd", with_keyset=True)
    return found


def refuse_derivatives(operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> None:
    """Raise :class:`GradientError` if a derivative with respect to an argument is asked for."""
    tensors = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if derivative_asked(tensors):
        raise GradientError(
            f"{operator.name()} got a tensor whose derivative is asked for (gradients, or a tangent of forward-mode "
            "differentiation), but 4-bit codes have none. Call the model under torch.no_grad() or "
            "torch.inference_mode(), or freeze it with model.requires_grad_(False). If it takes derivatives inside of "
            "its forward, keep the linears that they go through in high precision: quantize_(model, keep=[...])."
        )
