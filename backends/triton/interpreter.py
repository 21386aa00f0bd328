"""Triton's interpreter (``TRITON_INTERPRET=1``), which runs kernels on the CPU for tests.

It converts float32 to bfloat16 by cutting bits off, where every GPU rounds half to even, multiplies matrices of
bfloat16 as if their bits were integers, and rounds twice in a fused multiply-add (seen in triton 3.7). Tests compare
numbers, so all three are put right here; kernels use the plain operations. It also calls a function of our own for each
number that it reduces, which takes minutes: numpy reduces in its place.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

__all__ = ["interpreting", "mend"]


def interpreting() -> bool:
    """Whether kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def mend() -> None:
    """Make the interpreter round as GPUs do, multiply bfloat16 matrices, and reduce by ``larger`` in numpy."""
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

    plain_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data  # exact for float32 but for the last rounding
        return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma

    plain_reduce = interpreter.ReduceOps.apply_impl

    def reduce(self: Any, values: Any) -> Any:
        if getattr(self.combine_fn, "__name__", "") != "larger":
            return plain_reduce(self, values)
        most = np.max(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(most, values[0].dtype)

    interpreter.ReduceOps.apply_impl = reduce
