"""Parallel styles of packed linears for ``parallelize_module``: whole units and rotation blocks, one float32 sum.

``torch.distributed.tensor.parallel`` knows ``weight`` and ``bias``; a packed linear has codes, scales and a multiplier,
and its row-parallel sum must be of float32 parts, the bias added once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from ..errors import ShardingError
from ..format import hif4
from ..model.parts import Part, remember
from ..packed.linear import HiF4Linear
from ..torch_private.collectives import sum_of_ranks
from . import sharding
from .sizes import check_columns, check_rows

__all__ = ["HiF4ColwiseParallel", "HiF4RowwiseParallel"]

sharding.register()
log = logging.getLogger(__name__)

_COLUMNS: dict[str, Any] = {"multiplier": Replicate(), "low_rank_a": Replicate(), "low_rank_b": Shard(1)}
_ROWS: dict[str, Any] = {
    "multiplier": Shard(0), "bias": Replicate(), "low_rank_a": Shard(0), "low_rank_b": Replicate(),
}  # fmt: skip
"""What is not divided as codes and scales are."""


class HiF4ColwiseParallel(ColwiseParallel):
    """Each rank has some output features: rows of codes and scales, and their bias. Bit for bit what one rank computes.

    Example::

        parallelize_module(block.ffn, mesh, {"net.0.proj": HiF4ColwiseParallel(), "net.2": HiF4RowwiseParallel()})
    """

    def __init__(self, *, local: bool = False, name: str = "", **layouts: Any) -> None:
        """See ``torch.distributed.tensor.parallel.ColwiseParallel``.

        Args:
            local: keep each rank's part as a plain tensor, and compute with plain tensors: what ``torch.compile`` with
                backend ``tahf4`` needs. Layouts cannot be chosen then: the input is whole, the output a rank's part.
            name: of the linear, for errors.
            layouts: ``input_layouts``, ``output_layouts``, ``use_local_output``.
        """
        super().__init__(**layouts)
        self.local, self.name = local, name
        _check_layouts(local, layouts)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linear = _linear(module, self.name, device_mesh)
        check_columns(self.name or _describe(linear), linear.out_features, device_mesh.size())
        if self.local:
            _divide(linear, device_mesh, _COLUMNS, Shard(0), self.src_data_rank, local=True)
            linear.out_features //= device_mesh.size()
            return linear
        return super()._apply(module, device_mesh)

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _divide(module, device_mesh, _COLUMNS, Shard(0), self.src_data_rank)


class HiF4RowwiseParallel(RowwiseParallel):
    """Each rank has some input features, in whole units and rotation blocks.

    The same as one rank but for the order of the float32 sum over units: parts are summed in float32 before the bias is
    added and the result is cast. A linear whose units share level-1 scales over more than a rank has loses its span,
    with a warning: its activation then has a scale for each unit, which is more exact and slower.
    """

    def __init__(self, *, local: bool = False, name: str = "", **layouts: Any) -> None:
        """See ``torch.distributed.tensor.parallel.RowwiseParallel`` and :class:`HiF4ColwiseParallel`."""
        super().__init__(**layouts)
        self.local, self.name = local, name
        _check_layouts(local, layouts)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linear = _linear(module, self.name, device_mesh)
        packed = isinstance(linear, HiF4Linear)
        block = linear.hadamard_block if isinstance(linear, HiF4Linear) else 0
        check_rows(self.name or _describe(linear), linear.in_features, device_mesh.size(), block)
        if isinstance(linear, HiF4Linear) and not _spans_fit(linear, device_mesh.size()):
            log.warning(
                "%s: its units share their level-1 scales over %s, which %d ranks would divide; its activation has a "
                "scale for each unit instead (span 1)",
                *(self.name or _describe(linear), f"{linear.span} units" if linear.span else "a row"),
                device_mesh.size(),
            )
            linear.span = 1
        if self.local:
            self._partition_linear_fn("", linear, device_mesh)
            linear.in_features //= device_mesh.size()
            reduce: Callable[[Tensor], Tensor] = functools.partial(_sum, device_mesh.get_group())
        elif packed:
            super()._apply(module, device_mesh)
            reduce = functools.partial(_redistribute, self.output_layouts)
        else:
            return super()._apply(module, device_mesh)
        kind: Any = type(linear)
        linear.__class__ = _row_class(kind)
        linear.tahf4_reduce = reduce  # type: ignore[assignment]
        return linear

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _divide(module, device_mesh, _ROWS, Shard(1), self.src_data_rank, local=self.local)


def _spans_fit(linear: HiF4Linear, parts: int) -> bool:
    shared = linear.span > 1 and hif4.units(linear.in_features) % (parts * linear.span) == 0
    return parts == 1 or linear.span == 1 or shared


class _RowParallel:
    """A linear that has some of the input features: its product is a part of a sum."""

    tahf4_reduce: Callable[[Tensor], Tensor]

    def forward(self: Any, input: Tensor) -> Tensor:
        """Return the whole product, by a sum over the ranks."""
        if isinstance(self, HiF4Linear):
            part = self.product(input, None, torch.float32)
        else:
            part = nn.functional.linear(input, self.weight).to(torch.float32)
        out = self.tahf4_reduce(part)
        if self.bias is not None:
            out = out + self.bias.to(torch.float32)
        return out.to(input.dtype)


@functools.cache
def _row_class(base: Any) -> Any:
    return type(f"Row{base.__name__}", (_RowParallel, base), {})


def _sum(group: Any, part: Tensor) -> Tensor:
    return sum_of_ranks(part, group)


def _redistribute(placements: Any, part: Tensor) -> Tensor:
    assert isinstance(part, DTensor)
    return part.redistribute(placements=placements)


def _divide(
    module: nn.Module, mesh: DeviceMesh, places: dict[str, Any], other: Any, source: int | None, local: bool = False
) -> None:
    """Put a rank's part in the place of each parameter."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        part = distribute_tensor(parameter, mesh, [places.get(name, other)], src_data_rank=source)
        value = part.to_local().clone() if local else part
        module.register_parameter(name, new := nn.Parameter(value, requires_grad=parameter.requires_grad))
        if local and name == "weight":
            remember(new, Part(other.dim, mesh.get_local_rank(), mesh.size(), mesh.get_group()))


def _linear(module: nn.Module, name: str, mesh: DeviceMesh) -> nn.Linear:
    """Return a linear that can be divided.

    Raises:
        ShardingError: it is none, or was divided before; or the mesh has several axes.
    """
    if not isinstance(module, nn.Linear):
        raise ShardingError(f"{name or 'a module'} is a {type(module).__name__}; expected an nn.Linear or a HiF4Linear")
    if isinstance(module, _RowParallel) or any(isinstance(p, DTensor) for p in module._parameters.values()):
        raise ShardingError(f"{name or _describe(module)} is divided among ranks already; parallelize a model once")
    if mesh.ndim != 1:
        raise ShardingError(f"a mesh of {mesh.ndim} axes; pass one of them, such as mesh['tp']")
    return module


def _describe(linear: nn.Linear) -> str:
    return f"{type(linear).__name__}({linear.in_features}, {linear.out_features})"


def _check_layouts(local: bool, layouts: dict[str, Any]) -> None:
    if local and layouts:
        raise ShardingError(f"local=True computes with plain tensors; {', '.join(layouts)} can be chosen without it")
