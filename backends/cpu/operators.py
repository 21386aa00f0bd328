"""``torch.ops.tahf4_cpu``: the operators that lowered graphs call, and which nodes they can take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ... import fused_ops, ops  # noqa: F401  (they define torch.ops.tahf4)
from ...kernels import register_kernel
from . import available, fused_linear, fused_quantize, instruction_set, linear, linear_quantize, quantize
from .programs import DTYPES, MOST_INPUTS, encode

__all__ = ["register"]

_LIBRARY = torch.library.Library("tahf4_cpu", "FRAGMENT")
_READ = {*DTYPES, torch.uint8, torch.int32}
_RUN: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "linear": linear,
    "fused_quantize": fused_quantize,
    "fused_linear": fused_linear,
    "linear_quantize": linear_quantize,
}


@functools.cache
def register() -> None:
    """Register the kernels, once."""
    for name, run in _RUN.items():
        register_kernel("cpu", getattr(torch.ops.tahf4, name).default, _operator(name, run), _serves)


def _operator(name: str, run: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define ``tahf4_cpu::name``; the reference stands in where a graph was lowered for another processor."""
    reference = getattr(torch.ops.tahf4, name)
    text = str(reference.default._schema).removeprefix(f"tahf4::{name}")
    fused = "program" in text

    def call(*args: Any, **kwargs: Any) -> Any:
        here = available() and not (fused and instruction_set() == "none")
        return (run if here else reference)(*args, **kwargs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return reference.default(*args, **kwargs)

    # Not custom_op: the layers that it puts around a call take longer than a small product.
    _LIBRARY.define(name + text)
    _LIBRARY.impl(name, call, "CPU")
    torch.library.register_fake(f"tahf4_cpu::{name}", fake, lib=_LIBRARY)
    found: torch._ops.OpOverload = getattr(torch.ops.tahf4_cpu, name).default
    return found


def _serves(node: fx.Node) -> bool:
    values = [source.meta.get("val") for source in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or not all(t.device.type == "cpu" and t.dtype in _READ for t in tensors):
        return False
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))  # type: ignore[union-attr]
    if any(isinstance(a, torch.dtype) and a not in DTYPES for a in arguments.values()) or not available():
        return False
    program = arguments.get("program")
    if not isinstance(program, str):
        return True
    inputs = arguments["inputs"]
    default = "y" if "weight_codes" in arguments else "x0"
    fits = isinstance(inputs, list | tuple) and len(inputs) <= MOST_INPUTS and encode(program, default) is not None
    return fits and instruction_set() != "none"
