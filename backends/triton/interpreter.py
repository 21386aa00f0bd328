"""Triton's interpreter (``TRITON_INTERPRET=1``), which runs kernels on the CPU for tests.

It converts float32 to bfloat16 by cutting bits off, where every GPU rounds half to even (seen in triton 3.6 and 3.7). Tests
compare bits, so the conversion is put right here; kernels themselves use the plain cast.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

__all__ = ["interpreting", "mend_casts"]


def interpreting() -> bool:
    """Whether kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def mend_casts() -> None:
    """Make the interpreter round float32 to bfloat16 half to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        quiet = (bits >> 16) | 0x40
        return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16)

    interpreter._convert_float = convert
