"""``torch.ops.tahf4_cpu``: the operators that lowered graphs call, and which nodes they can take.

``operators.cpp`` runs them once it is compiled. What it does not take comes to the general function here: the first
call, which compiles; a program's first call; arguments that do not fit; and everything where there is no compiler.
Then :mod:`.calls` runs the kernels if a wheel brought them, or the reference runs.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import torch
from torch import Tensor, fx

from ...ops import fused  # noqa: F401  (they define torch.ops.tahf4)
from ...ops.attention_codes import ATTENTIONS
from ...ops.define import define, refuse_derivatives
from ...ops.registry import arguments, in_16_bits, register_kernel
from . import build, calls, checks
from .build import instruction_set
from .programs import DTYPES, MOST_INPUTS, Encoded, encode

__all__ = ["OPERATORS", "register"]

_LIBRARY = torch.library.Library("tahf4_cpu", "FRAGMENT")
_READ = {*DTYPES, torch.uint8, torch.int32, torch.int8}
_taught: dict[tuple[bool, str], Encoded | None] = {}  # whether it follows a product, and its text
_lock = threading.Lock()
_local = threading.local()


def _operator(name: str) -> torch._ops.OpOverload:
    """Define ``tahf4_cpu::name``."""
    check, call = getattr(checks, name), getattr(calls, name)
    reference = getattr(torch.ops.tahf4, name)
    text = str(reference.default._schema).removeprefix(f"tahf4::{name}")
    names = [argument.name for argument in reference.default._schema.arguments]
    place = names.index("program") if "program" in names else None

    def general(*args: Any, **kwargs: Any) -> Any:
        refuse_derivatives(found, *args, **kwargs)  # C++ sends them here
        if build.library() is not None and (instruction_set() != "none" or place is None):
            if build.operators() is None:
                check(*args, **kwargs)
                if (result := call(*args, **kwargs)) is not NotImplemented:
                    return result
            elif not getattr(_local, "again", False):  # compiled or taught meanwhile, perhaps by another thread
                _teach(name, "" if place is None else args[place])
                _local.again = True
                try:
                    return found(*args, **kwargs)
                finally:
                    _local.again = False
            else:
                check(*args, **kwargs)
        return reference(*args, **kwargs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return reference.default(*args, **kwargs)

    found = define(_LIBRARY, name, text, general)
    torch.library.register_fake(f"tahf4_cpu::{name}", fake, lib=_LIBRARY)
    return found


def _teach(name: str, program: str) -> None:
    """Make a program known to the C++ code, which keeps a pointer to it."""
    product = name != "fused_quantize"
    with _lock:
        if (product, program) in _taught:
            return
        encoded = encode(program, "y" if product else "x0") if program or not product else None
        if encoded is not None:
            dtype = -1 if encoded.dtype is None else DTYPES[encoded.dtype]
            about = ctypes.addressof(encoded.struct), dtype, encoded.inputs, encoded.used, encoded.factors
            library = build.operators()
            assert library is not None
            library.tahf4_add_program(program.encode(), product, *about)
        _taught[(product, program)] = encoded


OPERATORS = {
    name: _operator(name)
    for name in (
        *("quantize", "linear", "fused_quantize", "fused_linear", "linear_quantize"),
        *("attention", "attention_lse", "attention_of_codes"),
    )
}
"""By name: each takes and gives what the operator of ``torch.ops.tahf4`` does."""


@functools.cache
def register() -> None:
    """Register the kernels, once."""
    for name, operator in OPERATORS.items():
        register_kernel("cpu", getattr(torch.ops.tahf4, name).default, operator, _serves, eager=_eager)


def _eager(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in DTYPES


def _serves(node: fx.Node) -> bool:
    values = [source.meta.get("val") for source in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    read = _READ | {torch.bool} if node.target in ATTENTIONS else _READ  # masks
    if not tensors or not all(t.device.type == "cpu" and t.dtype in read for t in tensors) or in_16_bits(node):
        return False
    given = arguments(node)
    if given.get("value_bits", 8) != 8:
        return False
    if any(isinstance(a, torch.dtype) and a not in DTYPES for a in given.values()) or build.library() is None:
        return False
    program = given.get("program")
    if not isinstance(program, str):
        return True
    inputs = given["inputs"]
    default = "y" if "weight_codes" in given else "x0"
    fits = isinstance(inputs, list | tuple) and len(inputs) <= MOST_INPUTS and encode(program, default) is not None
    return fits and instruction_set() != "none"
