"""Which kernel runs an operator: the reference everywhere, and what backends register for their devices.

A kernel takes the arguments of the operator that it serves, gives the same codes and scales bit for bit, and
the same products but for the order of the float32 sum over units.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from . import ops  # noqa: F401  (defines torch.ops.tahf4)
from .errors import OptionError

__all__ = ["KERNEL", "Kernel", "kernels", "register_kernel", "select"]

log = logging.getLogger(__name__)

KERNEL = "tahf4_kernel"
"""Key in ``node.meta`` of an operator: the name of the kernel that runs it."""


@dataclass(frozen=True)
class Kernel:
    """One way to run an operator.

    Attributes:
        name: for the report.
        operator: the ``tahf4::`` operator that it serves.
        target: the operator (``torch.library``) that runs in its place.
        serves: whether it can run a node (its device, dtypes and shapes are in ``meta["val"]``).
    """

    name: str
    operator: torch._ops.OpOverload
    target: torch._ops.OpOverload
    serves: Callable[[fx.Node], bool]


_OPERATORS = (
    torch.ops.tahf4.quantize.default,
    torch.ops.tahf4.dequantize.default,
    torch.ops.tahf4.linear.default,
)
_kernels: list[Kernel] = [Kernel("reference", op, op, lambda node: True) for op in _OPERATORS]


def register_kernel(
    name: str, operator: torch._ops.OpOverload, target: torch._ops.OpOverload, serves: Callable[[fx.Node], bool]
) -> Kernel:
    """Add a kernel; the one registered last is asked first.

    Args:
        name: for the report.
        operator: ``torch.ops.tahf4.quantize.default``, ``.dequantize.default`` or ``.linear.default``.
        target: an operator with the same arguments and results.
        serves: says whether it can run a node.

    Raises:
        OptionError: ``operator`` is none of ours, or a kernel of that name serves it already.
    """
    if operator not in _OPERATORS:
        raise OptionError(f"kernel {name!r} is for {operator}; expected one of {', '.join(map(str, _OPERATORS))}")
    if any(kernel.name == name and kernel.operator is operator for kernel in _kernels):
        raise OptionError(f"a kernel named {name!r} serves {operator} already; choose another name")
    kernel = Kernel(name, operator, target, serves)
    _kernels.insert(0, kernel)
    return kernel


def unregister_kernel(kernel: Kernel) -> None:
    """Take a kernel out again."""
    _kernels.remove(kernel)


def kernels() -> tuple[Kernel, ...]:
    """Return all kernels, first asked first."""
    return tuple(_kernels)


def select(node: fx.Node) -> Kernel:
    """Return the kernel that runs a node."""
    kernel = next(k for k in _kernels if k.operator is node.target and k.serves(node))
    if kernel.name == "reference":
        _say_once(_device(node))
    return kernel


def _device(node: fx.Node) -> str:
    values = (n.meta.get("val") for n in node.all_input_nodes)
    return next((v.device.type for v in values if isinstance(v, torch.Tensor)), "cpu")


@functools.cache
def _say_once(device: str) -> None:
    log.warning(
        "no compiled HiF4 kernel serves device %r: the plain-PyTorch reference runs (exact, but slower than the "
        "original linears)",
        device,
    )
