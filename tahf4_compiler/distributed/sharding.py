"""Sharding rules of our operators for ``torch.distributed.tensor``: what a rank may hold a part of.

No statistic crosses tokens, units or rotation blocks, so

* tokens and batch (every axis but the last) shard freely: codes and scales shard with them;
* K shards in whole units of 64, whole rotation blocks and whole spans (of units that share a scale; a row does not
  shard): codes, scales and the multiplier shard with it;
* a product of operands sharded along K is a partial sum. It is offered in float32 and without a bias only: the bias
  must be added once, and a sum of rounded parts would not be the product of one rank;
* rows of the weight shard freely, and the product's columns and the bias with them.

Where sizes do not fit, a rule is left out and ``DTensor`` gathers the operand: slower, and never wrong. The parallel
styles (:mod:`tahf4_compiler.distributed.styles`) raise an error instead.

Importing this module registers the rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..format import hif4
from ..format.spans import units_of
from ..ops import registry

__all__ = ["register"]

Rule = tuple[list[Any], list[Any]]
"""Placements of the results, and of the arguments (None for what is no tensor), along one axis of the mesh."""


def _shape(spec: Any) -> tuple[int, ...]:
    return tuple(spec.shape)


def _parts(spec: Any) -> int:
    """Return into how many parts the whole mesh could divide one axis.

    Rules hold for each axis of a mesh alone, and DTensor combines them: whatever it combines must fit.
    """
    return int(spec.mesh.size())


def _whole(k: int, parts: int, block: int, span: Sequence[int] = ()) -> bool:
    """Tell whether K falls into equal parts of whole units, rotation blocks and spans (none, or one number)."""
    spans = [units_of(form) for form in span]
    return 0 not in spans and k % (parts * max(hif4.UNIT, block, *(hif4.UNIT * units for units in spans))) == 0


def _quantize(x: Any, multiplier: Any = None, hadamard_block: int = 0, bits: int = 4, *span: int) -> list[Rule]:
    shape = _shape(x)
    last = len(shape) - 1

    def rule(out: Any, source: Any, factors: Any) -> Rule:
        return [out, out], [source, factors if multiplier is not None else None, None, None, *(None for _ in span)]

    rules = [rule(Replicate(), Replicate(), Replicate())]
    rules += [rule(Shard(i), Shard(i), Replicate()) for i in range(last)]
    if _whole(shape[-1], _parts(x), hadamard_block, span if bits == 4 else ()):
        rules.append(rule(Shard(last), Shard(last), Shard(0)))
    return rules


def _dequantize(codes: Any, scales: Any, k: int, dtype: torch.dtype) -> list[Rule]:
    # Not along K: k is the length of the whole axis, which a rank's part does not have.
    last = len(_shape(codes)) - 1
    rules: list[Rule] = [([Replicate()], [Replicate(), Replicate(), None, None])]
    return rules + [([Shard(i)], [Shard(i), Shard(i), None, None]) for i in range(last)]


def _linear(
    codes: Any,
    scales: Any,
    weight_codes: Any,
    weight_scales: Any,
    bias: Any,
    out_dtype: torch.dtype,
    *span: int,
) -> list[Rule]:
    last = len(_shape(codes)) - 1

    def rule(out: Any, left: Any, right: Any, added: Any) -> Rule:
        whole = added if bias is not None else None
        return [out], [left, left, right, right, whole, None, *(None for _ in span)]

    rules = [rule(Replicate(), Replicate(), Replicate(), Replicate())]
    rules += [rule(Shard(i), Shard(i), Replicate(), Replicate()) for i in range(last)]
    rules.append(rule(Shard(last), Replicate(), Shard(0), Shard(0)))
    units = _shape(scales)[-1]
    if bias is None and out_dtype == torch.float32 and _whole(units * hif4.UNIT, _parts(codes), 0, span):
        rules.append(rule(Partial(), Shard(last), Shard(1), None))
    return rules


def _packed_linear(
    x: Any,
    multiplier: Any,
    hadamard_block: int,
    weight_codes: Any,
    weight_scales: Any,
    bias: Any,
    out_dtype: torch.dtype,
    *rest: Any,
) -> list[Rule]:
    last = len(_shape(x)) - 1

    def rule(out: Any, source: Any, weight: Any) -> Rule:
        factors = Replicate() if multiplier is not None else None
        added = weight if bias is not None else None
        return [out], [source, factors, None, weight, weight, added, None, *(None for _ in rest)]

    rules = [rule(Replicate(), Replicate(), Replicate()), rule(Shard(last), Replicate(), Shard(0))]
    return rules + [rule(Shard(i), Shard(i), Replicate()) for i in range(last)]


def _aligned(inputs: Sequence[Any], axis: int, axes: int) -> list[Any]:
    """Return placements of operands that broadcast to ``axes`` axes, where the result shards along ``axis``."""
    found: list[Any] = []
    for spec in inputs:
        shape = _shape(spec)
        own = axis - (axes - len(shape))
        found.append(Shard(own) if own >= 0 and shape[own] != 1 else Replicate())
    return found


def _fused_quantize(
    inputs: Sequence[Any], program: str, multiplier: Any = None, hadamard_block: int = 0, bits: int = 4, *span: int
) -> list[Rule]:
    # A program may hold a norm along the last axis, so that one stays whole.
    axes = max(len(_shape(spec)) for spec in inputs)

    def rule(out: Any, sources: Sequence[Any]) -> Rule:
        factors = Replicate() if multiplier is not None else None
        return [out, out], [*sources, None, factors, None, None, *(None for _ in span)]

    rules = [rule(Replicate(), [Replicate()] * len(inputs))]
    return rules + [rule(Shard(i), _aligned(inputs, i, axes)) for i in range(axes - 1)]


def _linear_quantize(
    codes: Any,
    scales: Any,
    weight_codes: Any,
    weight_scales: Any,
    bias: Any,
    out_dtype: torch.dtype,
    inputs: Sequence[Any],
    program: str,
    multiplier: Any,
    hadamard_block: int,
    bits: int = 4,
    *span: int,
) -> list[Rule]:
    axes = len(_shape(codes))

    def rule(out: Any, sources: Sequence[Any]) -> Rule:
        whole = Replicate()
        added = whole if bias is not None else None
        factors = whole if multiplier is not None else None
        operands = [out, out, whole, whole, added, None]
        return [out, out], [*operands, *sources, None, factors, None, None, *(None for _ in span)]

    rules = [rule(Replicate(), [Replicate()] * len(inputs))]
    return rules + [rule(Shard(i), _aligned(inputs, i, axes)) for i in range(axes - 1)]


_RULES: dict[str, Callable[..., list[Rule]]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "linear": _linear,
    "fused_quantize": _fused_quantize,
    "linear_quantize": _linear_quantize,
    "packed_linear": _packed_linear,
}
"""By operator. ``fused_linear`` and ``branched_quantize`` return lists of tensors, which DTensor's rules cannot
describe: with DTensors they raise its own error. Lowered graphs run on plain tensors, so nothing of ours does that."""


@functools.cache
def register() -> None:
    """Register the rules for ``tahf4::`` operators and those of the devices that run in their place, once."""
    served = {kernel.target: kernel.operator._schema.name.partition("::")[2] for kernel in registry.kernels()}
    served[torch.ops.tahf4.packed_linear.default] = "packed_linear"
    for target, name in served.items():
        if name in _RULES:
            register_sharding(target)(_RULES[name])


register()
