"""Tensor parallelism of diffusers' Wan transformers: which linear is divided along which axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from ..errors import ShardingError
from ..packed.linear import HiF4Linear
from ..torch_private.collectives import sum_of_ranks
from .sizes import check_columns, check_rows, column_degrees
from .styles import HiF4ColwiseParallel, HiF4RowwiseParallel

__all__ = ["tensor_parallel"]

_COLUMNS = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj")
_NORMS = ("norm_q", "norm_k", "norm_added_k")


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divide the blocks of a Wan transformer among the ranks of a mesh, in place.

    q, k, v and the first linear of the feed-forward are column-parallel, their counterparts row-parallel; each rank has
    some of the heads. The norms of q and k, which go over all heads, sum one number a token. Everything outside of the
    blocks is as on one rank. Parameters become plain tensors, so that the model compiles, with ``backend="tahf4"`` too.

    Args:
        model: a ``WanTransformer3DModel``, packed (:func:`tahf4_compiler.quantize_`) or not, the same on all ranks.
        mesh: of one axis.

    Returns:
        The model. Before anything is changed every size is checked.

    Raises:
        ShardingError: no such model, heads or sizes that do not divide, or it is divided already.
    """
    blocks = [module for module in model.modules() if type(module).__name__ == "WanTransformerBlock"]
    if not blocks:
        raise ShardingError(
            f"{type(model).__name__} has no WanTransformerBlock; divide other models with parallelize_module and "
            "HiF4ColwiseParallel, HiF4RowwiseParallel"
        )
    if mesh.ndim != 1:
        raise ShardingError(f"a mesh of {mesh.ndim} axes; pass one of them, such as mesh['tp']")
    for number, block in enumerate(blocks):
        _check(f"block {number}", block, mesh.size())
    for block in blocks:
        plan: dict[str, Any] = {
            "ffn.net.0.proj": HiF4ColwiseParallel(local=True),
            "ffn.net.2": HiF4RowwiseParallel(local=True),
        }
        for name in ("attn1", "attn2"):
            attention: Any = block.get_submodule(name)
            plan |= {f"{name}.{c}": HiF4ColwiseParallel(local=True) for c in _COLUMNS if _has(attention, c)}
            plan[f"{name}.to_out.0"] = HiF4RowwiseParallel(local=True)
            for norm in _NORMS:
                if _has(attention, norm):
                    setattr(attention, norm, _ShardedRMSNorm(getattr(attention, norm), mesh))
            attention.heads //= mesh.size()
        parallelize_module(block, mesh, plan)
    return model


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _check(where: str, block: nn.Module, degree: int) -> None:
    for name in ("attn1", "attn2"):
        attention: Any = block.get_submodule(name)
        if any(isinstance(module, _ShardedRMSNorm) for module in attention.modules()):
            raise ShardingError("this model is divided among ranks already; parallelize it once")
        if attention.heads % degree:
            raise ShardingError(
                f"{attention.heads} heads do not divide among {degree} ranks; degrees that work are "
                f"{', '.join(map(str, column_degrees(attention.heads)))}"
            )
        if getattr(attention, "fused_projections", False):
            raise ShardingError("fused projections cannot be divided by heads; call unfuse_projections() first")
        for linear in _COLUMNS:
            if _has(attention, linear):
                check_columns(f"{where}, {name}.{linear}", getattr(attention, linear).out_features, degree)
    column: Any = block.get_submodule("ffn.net.0.proj")
    check_columns(f"{where}, ffn.net.0.proj", column.out_features, degree)
    for name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"):
        row: Any = block.get_submodule(name)
        hadamard_block = row.hadamard_block if isinstance(row, HiF4Linear) else 0
        check_rows(f"{where}, {name}", row.in_features, degree, hadamard_block)


class _ShardedRMSNorm(nn.Module):
    """An ``nn.RMSNorm`` over an axis of which each rank has a part: one sum of squares a token goes around."""

    def __init__(self, norm: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        if not isinstance(norm, nn.RMSNorm) or len(norm.normalized_shape) != 1:
            raise ShardingError(f"the norm of q or k is a {type(norm).__name__}; expected an nn.RMSNorm over one axis")
        self.count = norm.normalized_shape[0]
        self.eps = norm.eps
        self._group = mesh.get_group()
        weight = None
        if norm.weight is not None:
            part = distribute_tensor(norm.weight, mesh, [Shard(0)]).to_local().clone()
            weight = nn.Parameter(part, requires_grad=norm.weight.requires_grad)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., K / ranks]`` of the dtype of ``x``."""
        wide = x.to(torch.float32)
        total = sum_of_ranks(wide.square().sum(-1, keepdim=True), self._group)
        eps = self.eps if self.eps is not None else torch.finfo(x.dtype).eps
        out = wide * torch.rsqrt(total / self.count + eps)
        if self.weight is not None:
            out = out * self.weight
        return out.to(x.dtype)


