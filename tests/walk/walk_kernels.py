"""Kernels that count: the rows of weights in 4 bits that were multiplied, in eager mode and in compiled graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from tahf4_compiler import register_kernel
from tahf4_compiler.ops import registry

__all__ = ["Count", "counting"]

_library = torch.library.Library("walk", "FRAGMENT")
_defined: dict[str, Any] = {}
_lock = threading.Lock()


class Count:
    """How many rows were multiplied."""

    rows = 0


def _define(kernel: registry.Kernel) -> Any:
    """Return an operator that counts and then does what a kernel does."""
    operator = kernel.operator
    name = operator._schema.name.partition("::")[2]
    if name not in _defined:
        arguments = [a.name for a in operator._schema.arguments]
        at = arguments.index("weight_codes") if "weight_codes" in arguments else None
        _library.define(str(operator._schema).replace("tahf4::", "", 1))

        def run(*args: Any) -> Any:
            if at is not None:
                with _lock:
                    Count.rows += len(args[at])
            return kernel.target(*args)

        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"walk::{name}", lambda *args: operator(*args), lib=_library)
        _defined[name] = getattr(torch.ops.walk, name).default
    return _defined[name]


@contextlib.contextmanager
def counting() -> Iterator[type[Count]]:
    """Let the kernels of the CPU count."""
    own = [kernel for kernel in registry.kernels() if kernel.name == "cpu"]
    made = [register_kernel("counted", k.operator, _define(k), k.serves, k.sources, k.eager) for k in own]
    try:
        yield Count
    finally:
        for kernel in made:
            registry.unregister_kernel(kernel)
