"""Which kernel runs an operator: the reference everywhere, and what backends register for their devices.

A kernel takes the arguments of the operator that it serves, gives the same codes and scales bit for bit, and
the same products but for the order of the float32 sum over units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import OptionError, PipelineError
from ..graph.nodes import node_words
from ..options import reference_forced
from ..plugins import host
from . import attention_codes, fused, fused_attention  # noqa: F401  (they define torch.ops.tahf4)
from .reference import activation_bits

__all__ = [
    "KERNEL",
    "OPERATORS",
    "Kernel",
    "all_arguments",
    "arguments",
    "dispatch",
    "generated_sources",
    "in_16_bits",
    "kernels",
    "linear",
    "quantize",
    "register_kernel",
    "served",
    "unregister_kernel",
]

KERNEL = "tahf4_kernel"
"""Key in ``node.meta`` of an operator: the name of the kernel that runs it."""


@dataclass(frozen=True)
class Kernel:
    """One way to run an operator.

    Attributes:
        name: for the report.
        operator: the operator that it serves: one of ours, or a plug-in's own.
        target: the operator (``torch.library``) that runs in its place.
        serves: whether it can run a node. Device, dtypes and shapes are in ``meta["val"]`` of what the node reads; a
            node that a pass is trying has no value of its own yet.
        sources: the text of what is generated for a node, by name of the file, or None if nothing is.
        eager: whether it runs calls outside of a graph on a device and dtype, or None if it does not.
    """

    name: str
    operator: torch._ops.OpOverload
    target: torch._ops.OpOverload
    serves: Callable[[fx.Node], bool]
    sources: Callable[[fx.Node], Mapping[str, str]] | None = None
    eager: Callable[[torch.device, torch.dtype], bool] | None = None


OPERATORS = (
    torch.ops.tahf4.quantize.default,
    torch.ops.tahf4.dequantize.default,
    torch.ops.tahf4.linear.default,
    torch.ops.tahf4.fused_quantize.default,
    torch.ops.tahf4.branched_quantize.default,
    torch.ops.tahf4.fused_linear.default,
    torch.ops.tahf4.linear_quantize.default,
    *attention_codes.ATTENTIONS,
    torch.ops.tahf4.fused_attention.default,
    torch.ops.tahf4.fused_attention_quantize.default,
)
"""The operators of this project. Plug-ins bring their own, which :func:`served` names as well."""


def _reference(operator: torch._ops.OpOverload) -> Kernel:
    return Kernel("reference", operator, operator, lambda node: True, eager=lambda device, dtype: True)


_kernels: list[Kernel] = [_reference(operator) for operator in OPERATORS]


def register_kernel(
    name: str,
    operator: torch._ops.OpOverload,
    target: torch._ops.OpOverload,
    serves: Callable[[fx.Node], bool],
    sources: Callable[[fx.Node], Mapping[str, str]] | None = None,
    eager: Callable[[torch.device, torch.dtype], bool] | None = None,
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
        eager: says whether it runs calls outside of a graph, for the activation's device and dtype; None: it does not.

    Raises:
        OptionError: ``operator`` or ``target`` is no operator overload (``torch.ops.mine.linear.default``), the two do
            not take and give the same, ``operator`` is PyTorch's own, or a kernel of that name serves it already.
    """
    host.load_backends()
    _check_operators(name, operator, target)
    if not isinstance(name, str) or not name or not callable(serves):
        raise OptionError(f"kernel {name!r} with serves={serves!r}; expected a name and a function of a node")
    if any(kernel.name == name and kernel.operator is operator for kernel in _kernels):
        raise OptionError(f"a kernel named {name!r} serves {operator} already; choose another name")
    kernel = Kernel(name, operator, target, serves, sources, eager)
    if not any(other.operator is operator for other in _kernels):
        _kernels.append(_reference(operator))
    _kernels.insert(0, kernel)
    _eager.cache_clear()
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
    _eager.cache_clear()
    rest = [other for other in _kernels if other.operator is kernel.operator]
    if kernel.operator not in OPERATORS and all(other.name == "reference" for other in rest):
        _kernels[:] = [other for other in _kernels if other not in rest]


def kernels() -> tuple[Kernel, ...]:
    """Return all kernels, first asked first."""
    host.load_backends()
    return tuple(_kernels)


def dispatch(operator: Any, given: fx.Node | torch.Tensor, *, reference: bool = False) -> Kernel:
    """Return the kernel that runs an operator: for a node of a graph, or for a call outside of one.

    Args:
        operator: one that :func:`served` names.
        given: the node; or the activation of a call, whose device and dtype are looked at.
        reference: whether the reference is asked for.
    """
    host.load_backends()
    mine = (kernel for kernel in _kernels if kernel.operator is operator)
    if reference:
        return next(kernel for kernel in mine if kernel.name == "reference")
    if isinstance(given, fx.Node):
        return next(kernel for kernel in mine if _serves(kernel, given))
    return _eager(operator, given.device, given.dtype)


def _serves(kernel: Kernel, node: fx.Node) -> bool:
    try:
        return kernel.serves(node)
    except Exception as error:
        raise PipelineError(
            f"kernel {kernel.name!r} for {kernel.operator} failed when it was asked for node {node_words(node)}: "
            f'{type(error).__name__}: {error}. Look at meta["val"] of what the node reads; a node that a pass is '
            "trying has no value of its own yet."
        ) from error


@functools.cache
def _eager(operator: torch._ops.OpOverload, device: torch.device, dtype: torch.dtype) -> Kernel:
    return next(k for k in _kernels if k.operator is operator and k.eager is not None and k.eager(device, dtype))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the positional arguments of an operator's node by name."""
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))  # type: ignore[union-attr]


def all_arguments(node: fx.Node) -> list[Any]:
    """Return all arguments of an operator's node in order, with the defaults of those that it leaves out."""
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
    return list({**defaults, **arguments(node), **node.kwargs}.values())


def in_16_bits(node: fx.Node) -> bool:
    """Return whether a node makes or reads an activation in 16 bits, which only the references do."""
    found = arguments(node)
    codes = found.get("codes")
    value = codes.meta.get("val") if isinstance(codes, fx.Node) else None
    return bool(found.get("bits") == 16) or (isinstance(value, torch.Tensor) and activation_bits(value) == 16)


def quantize(
    x: torch.Tensor,
    multiplier: torch.Tensor | None = None,
    hadamard_block: int = 0,
    bits: int = 4,
    span: int = 1,
    reference: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the best ``tahf4::quantize`` for a tensor outside of a graph, as packing does.

    Args:
        x: ``[..., K]``.
        multiplier: float32 ``[K]`` or None.
        hadamard_block: a power of two, or 0.
        bits: 4, 8 or 16.
        span: units that share a level-1 scale, and the rounding, as for ``tahf4::quantize``.
        reference: whether the reference is asked for; None: as ``TAHF4_KERNELS`` says.

    Returns:
        Codes and scales, as ``tahf4::quantize``.

    Raises:
        FormatError: as ``tahf4::quantize``.
    """
    reference = bits == 16 or (reference_forced() if reference is None else reference)
    kernel = dispatch(torch.ops.tahf4.quantize.default, x, reference=reference)
    codes, scales = kernel.target(x, multiplier, hadamard_block, bits, span)
    return codes, scales


def linear(
    x_codes: torch.Tensor,
    x_scales: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    span: int = 1,
    reference: bool | None = None,
) -> torch.Tensor:
    """Run the best ``tahf4::linear`` for quantized operands outside of a graph.

    Args:
        x_codes: uint8 ``[..., units * 32]``, or int8, bfloat16 or float32 ``[..., units * 64]``.
        x_scales: int32 ``[..., units]``, or float32.
        codes: uint8 ``[N, units * 32]``, of the weight.
        scales: int32 ``[N, units]``.
        bias: ``[N]`` or None.
        out_dtype: of the result.
        span: as for ``tahf4::linear``.
        reference: as for :func:`quantize`.

    Returns:
        ``[..., N]``.
    """
    operator = torch.ops.tahf4.linear.default
    if x_codes.is_floating_point() or (reference_forced() if reference is None else reference):
        kernel = dispatch(operator, x_codes, reference=True)
    else:
        kernel = _eager(operator, x_codes.device, out_dtype)
    found: torch.Tensor = kernel.target(x_codes, x_scales, codes, scales, bias, out_dtype, span)
    return found


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
