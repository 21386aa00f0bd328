"""Whether a linear runs in 4 bits: the rules, over facts that a graph or a tree of modules gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensor

from ..format.spans import span_name
from ..model.attachments import Attachment
from ..model.linears import matching
from ..model.reasons import Cause, Reason, cause_of

__all__ = [
    "MIN_FEATURES",
    "OVERRULED",
    "Facts",
    "Role",
    "adapter_obstacle",
    "bias_obstacle",
    "decide",
    "dtype_obstacle",
    "effective_span",
    "role_of",
    "span_obstacle",
    "tensor_obstacle",
    "with_span",
]

MIN_FEATURES = 64
"""Input and output features, at least: less than one unit of 64 values is mostly padding."""

OVERRULED = "have span and rounding of their recipe or packed weight, which come before scale_span and rounding"
"""What is said where both a recipe, or a weight that is packed already, and somebody else want something."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Role:
    """Where a linear stands.

    Attributes:
        body: inside a repeated block (True), or on the boundary of the network (False).
        reason: in words, for the report.
    """

    body: bool
    reason: Reason


def role_of(block: tuple[str, str] | None, one_block: str = "") -> Role:
    """Return where a linear stands.

    Args:
        block: path and class name of the repeated block around it, or None.
        one_block: why all that is planned counts as one block, if it does.
    """
    if block is not None:
        return Role(True, Reason(Cause.BODY, f"in repeated block {block[0]} ({block[1]})"))
    if one_block:
        return Role(True, Reason(Cause.BODY, one_block))
    return Role(False, Reason(Cause.BOUNDARY, "boundary: outside the repeated blocks"))


@dataclass(frozen=True)
class Facts:
    """What is known about a linear.

    Attributes:
        path: of its module.
        k: input features.
        n: output features.
        obstacle: why it cannot be packed, or None.
        attachment: what was attached to its weight, or None.
        role: where it stands, or None if nobody looked.
        beside_packed: whether its model was packed, and nothing tells which linears were left.
        has_recipe: whether there is a recipe, which may not know this one.
        names: further paths of its weight, as a tied one has.
    """

    path: str
    k: int
    n: int
    obstacle: Reason | None
    attachment: Attachment | None
    role: Role | None
    beside_packed: bool = False
    has_recipe: bool = False
    names: Iterable[str] = ()


def decide(facts: Facts, keep: Sequence[str], min_features: int = MIN_FEATURES) -> tuple[bool, str]:
    """Return whether a linear runs in 4 bits, and why.

    In order: what cannot be packed, what the user keeps, what a recipe decided, what stands on the boundary, what is
    too small; all else runs in 4 bits.

    Args:
        facts: about it.
        keep: regular expressions, searched in its paths.
        min_features: with fewer input or output features it stays in high precision, unless a recipe names it.
    """
    if facts.obstacle is not None:
        return False, facts.obstacle
    if (pattern := matching(keep, facts.path, *facts.names)) is not None:
        return False, Reason(Cause.KEPT, f"kept: {pattern!r} matches")
    said = facts.attachment
    if said is not None and said.decision == "high_precision":
        return False, said.reason
    if said is None and facts.role is not None and not facts.role.body:
        return False, facts.role.reason
    if facts.beside_packed and said is None:
        return False, Reason(Cause.NOT_PACKED, "not packed: it may have been left when the model was packed")
    if said is not None:
        return True, said.reason
    if min(facts.n, facts.k) < min_features:
        return False, Reason(Cause.SMALL, f"shape: {facts.k} -> {facts.n} features, less than {min_features}")
    if facts.has_recipe:
        return True, Reason(Cause.NO_STATISTICS, "no statistics: in a repeated block, and the recipe does not know it")
    return True, facts.role.reason if facts.role is not None else Reason(Cause.OTHER, "not classified")


def dtype_obstacle(name: str, dtype: torch.dtype) -> Reason | None:
    """Return why a weight or an activation of a type cannot be packed, or None."""
    if dtype in _DTYPES:
        return None
    return Reason(Cause.DTYPE, f"dtype: {name} is {str(dtype).removeprefix('torch.')}")


def adapter_obstacle(linear: str | None) -> Reason | None:
    """Return why a weight is not packed that belongs to an adapter, or None.

    An adapter is small. Libraries write to it, switch it and train it while the model runs.

    Args:
        linear: path of the linear that it adapts; None if it adapts nothing.
    """
    return Reason(Cause.ADAPTER, f"adapter: it runs beside {linear or 'its linear'}") if linear is not None else None


def tensor_obstacle(weight: object) -> Reason | None:
    """Return why a weight cannot be packed if it is a tensor of some other class or layout, or None."""
    if not isinstance(weight, torch.Tensor):
        return None
    if weight.layout is not torch.strided:
        return Reason(Cause.WEIGHT, f"weight: its layout is {str(weight.layout).removeprefix('torch.')}")
    if type(weight) in (torch.Tensor, torch.nn.Parameter, FakeTensor):
        return None
    return Reason(Cause.WEIGHT, f"weight: a {type(weight).__name__}, not a plain tensor")


def bias_obstacle(shape: Sequence[int], n: int) -> Reason | None:
    """Return why a linear cannot be packed whose bias is not ``[N]``, which is all that kernels read; or None."""
    if tuple(shape) == (n,):
        return None
    return Reason(Cause.SHAPE, f"shape: the bias is {tuple(shape)}, expected {(n,)}")


def span_obstacle(bits: int, masked: bool, hadamard_block: int) -> str | None:
    """Return why units of an activation and its weights do not share level-1 scales, or None.

    Args:
        bits: of the activation.
        masked: whether it has a channel mask.
        hadamard_block: width of its rotation, 0 for none.
    """
    if bits != 4:
        return f"an activation in {bits} bits has no level-1 scales"
    if not masked and not hadamard_block:
        return "it has no mask and no rotation, and an outlier would take the precision of the whole span"
    return None


def effective_span(wanted: int, bits: int, masked: bool, hadamard_block: int) -> int:
    """Return the span that a linear has of the one that is wanted for it; see :func:`span_obstacle`."""
    return wanted if wanted == 1 or span_obstacle(bits, masked, hadamard_block) is None else 1


def with_span(reason: str, wanted: int, obstacle: str | None) -> str:
    """Return a reason, and why a linear does not have the span that was wanted."""
    if obstacle is None:
        return reason
    return Reason(cause_of(reason), f"{reason}; scale_span {span_name(wanted)!r} is refused: {obstacle}")
