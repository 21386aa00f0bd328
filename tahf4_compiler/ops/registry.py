"""Which kernel runs an operator: the reference everywhere, and what backends register for their devices.

A kernel takes the arguments of the operator that it serves, gives the same codes and scales bit for bit, and
the same products but for the order of the float32 sum over units.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import OptionError
from ..options import reference_forced
from . import fused  # noqa: F401  (they define torch.ops.tahf4)

__all__ = [
    "KERNEL",
    "OPERATORS",
    "Kernel",
    "generated_sources",
    "kernels",
    "operators",
    "quantize",
    "register_kernel",
    "select",
    "served",
    "serving",
]

log = logging.getLogger(__name__)

KERNEL = "tahf4_kernel"
"""Key in ``node.meta`` of an operator: the name of the kernel that runs it."""


@dataclass(frozen=True)
class Kernel:
    """One way to run an operator.

    Attributes:
        name: for the report.
        operator: the operator that it serves: one of ours, or a plug-in's own.
        target: the operator (``torch.library``) that runs in its place.
        serves: whether it can run a node (its device, dtypes and shapes are in ``meta["val"]``).
        sources: the text of what is generated for a node, by name of the file, or None if nothing is.
    """

    name: str
    operator: torch._ops.OpOverload
    target: torch._ops.OpOverload
    serves: Callable[[fx.Node], bool]
    sources: Callable[[fx.Node], Mapping[str, str]] | None = None


OPERATORS = (
    torch.ops.tahf4.quantize.default,
    torch.ops.tahf4.dequantize.default,
    torch.ops.tahf4.linear.default,
    torch.ops.tahf4.fused_quantize.default,
    torch.ops.tahf4.fused_linear.default,
    torch.ops.tahf4.linear_quantize.default,
)
"""The operators of this project. Plug-ins bring their own, which :func:`served` names as well."""
_kernels: list[Kernel] = [Kernel("reference", op, op, lambda node: True) for op in OPERATORS]
_lock = threading.RLock()
_built_in_registered = False


def register_kernel(
    name: str,
    operator: torch._ops.OpOverload,
    target: torch._ops.OpOverload,
    serves: Callable[[fx.Node], bool],
    sources: Callable[[fx.Node], Mapping[str, str]] | None = None,
) -> Kernel:
    """Add a kernel; the one registered last is asked first.

    Args:
        name: for the report.
        operator: one of :data:`OPERATORS`, or an operator of a plug-in's own (with a fake kernel, as
            ``torch.library.custom_op`` and ``register_fake`` make them). Such an operator runs as its own reference
            where no kernel serves it.
        target: an operator with the same arguments and results.
        serves: says whether it can run a node.
        sources: gives the text that is generated for a node, for dumps.

    Raises:
        OptionError: ``operator`` or ``target`` is no operator overload (``torch.ops.mine.linear.default``), the two do
            not take and give the same, ``operator`` is PyTorch's own, or a kernel of that name serves it already.
    """
    _register_built_in()
    _check_operators(name, operator, target)
    if any(kernel.name == name and kernel.operator is operator for kernel in _kernels):
        raise OptionError(f"a kernel named {name!r} serves {operator} already; choose another name")
    kernel = Kernel(name, operator, target, serves, sources)
    if not any(other.operator is operator for other in _kernels):
        _kernels.append(Kernel("reference", operator, operator, lambda node: True))
    _kernels.insert(0, kernel)
    return kernel


def _check_operators(name: str, operator: Any, target: Any) -> None:
    for given in (operator, target):
        if not isinstance(given, torch._ops.OpOverload):
            raise OptionError(
                f"kernel {name!r} is for {given!r}; expected an operator overload, such as "
                "torch.ops.tahf4.linear.default"
            )
    if operator.namespace in ("aten", "prim", "prims"):
        raise OptionError(
            f"kernel {name!r} is for {operator}, which is PyTorch's own. Rewrite it to an operator of yours in a pass, "
            f"or serve one of {', '.join(map(str, OPERATORS))}."
        )
    (given, wanted) = (_signature(op) for op in (target, operator))
    if given != wanted:
        raise OptionError(f"kernel {name!r} takes and gives {given}; {operator} takes and gives {wanted}")


def _signature(operator: torch._ops.OpOverload) -> str:
    """Return the types of an operator's arguments and results, without their names."""
    schema = operator._schema
    return f"({', '.join(str(a.type) for a in schema.arguments)}) -> ({', '.join(str(r.type) for r in schema.returns)})"


def served() -> frozenset[torch._ops.OpOverload]:
    """Return the operators that ``lower`` chooses kernels for: ours, and those that plug-ins registered kernels for."""
    return frozenset(kernel.operator for kernel in kernels())


def unregister_kernel(kernel: Kernel) -> None:
    """Take a kernel out again."""
    _kernels.remove(kernel)
    rest = [other for other in _kernels if other.operator is kernel.operator]
    if kernel.operator not in OPERATORS and all(other.name == "reference" for other in rest):
        _kernels[:] = [other for other in _kernels if other not in rest]


def kernels() -> tuple[Kernel, ...]:
    """Return all kernels, first asked first."""
    _register_built_in()
    return tuple(_kernels)


def _register_built_in() -> None:
    """Register this project's own kernels, once and before all others, so that those are asked first.

    Late, since they import this module. Whether they can run is asked when there is something to run: nothing is
    compiled here.
    """
    global _built_in_registered
    with _lock:
        if _built_in_registered:
            return
        _built_in_registered = True
        from ..backends import cpu, triton

        cpu.register()
        triton.register()
        for name in ("cpu", "triton"):
            package = getattr(torch.ops, f"tahf4_{name}")
            _ready[name] = package.quantize.default, package.linear.default


def serving(node: fx.Node) -> Kernel:
    """Return the first kernel that serves a node."""
    _register_built_in()
    return next(k for k in _kernels if k.operator is node.target and k.serves(node))


def select(node: fx.Node, *, reference: bool = False) -> Kernel:
    """Return the kernel that runs a node, or its reference if asked for; said once where nothing else serves ours."""
    if reference:
        return next(k for k in _kernels if k.operator is node.target and k.name == "reference")
    kernel = serving(node)
    if kernel.name == "reference" and kernel.operator in OPERATORS:
        _say_once(_device(node))
    return kernel


def generated_sources(graph: fx.Graph) -> dict[str, tuple[str, list[str]]]:
    """Return file name -> (text, names of the nodes that run it) of what is generated for a lowered graph."""
    found: dict[str, tuple[str, list[str]]] = {}
    by_target = {k.target: k for k in kernels() if k.sources is not None}
    for node in graph.nodes:
        kernel = by_target.get(node.target)
        if kernel is None or kernel.sources is None:
            continue
        for name, text in kernel.sources(node).items():
            found.setdefault(name, (text, []))[1].append(node.name)
    return found


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


def quantize(
    x: torch.Tensor, multiplier: torch.Tensor | None = None, hadamard_block: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the best ``tahf4::quantize`` for a tensor outside of a graph, as packing does.

    Args:
        x: ``[..., K]``.
        multiplier: float32 ``[K]`` or None.
        hadamard_block: a power of two, or 0.

    Returns:
        Codes uint8 ``[..., ceil(K / 64) * 32]`` and scales int32 ``[..., ceil(K / 64)]``.

    Raises:
        FormatError: as ``tahf4::quantize``.
    """
    from ..backends import cpu, triton

    if reference_forced():
        codes, scales = torch.ops.tahf4.quantize(x, multiplier, hadamard_block)
        return codes, scales
    if cpu.serves(x, multiplier):
        return cpu.quantize(x, multiplier, hadamard_block)
    if x.is_cuda and x.dtype != torch.float64 and x.dim() and triton.available(x.device):
        _register_built_in()
        codes, scales = torch.ops.tahf4_triton.quantize(x, multiplier, hadamard_block)
        return codes, scales
    codes, scales = torch.ops.tahf4.quantize(x, multiplier, hadamard_block)
    return codes, scales


def operators(x: torch.Tensor) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Return the ``quantize`` and ``linear`` operators that run best on a tensor's device.

    An exported program holds the reference operators, which every process and device can run.

    Args:
        x: the activation; its device and dtype are looked at.
    """
    if not torch.compiler.is_exporting() and x.dtype in _KERNEL_DTYPES:
        if x.device.type == "cpu":
            return _ready["cpu"]
        if x.device.type == "cuda" and _triton_runs(x.device):
            return _ready["triton"]
    return torch.ops.tahf4.quantize.default, torch.ops.tahf4.linear.default


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_ready: dict[str, tuple[torch._ops.OpOverload, torch._ops.OpOverload]] = {}


@torch.compiler.assume_constant_result
def _triton_runs(device: torch.device) -> bool:
    from ..backends import triton

    return triton.available(device)
