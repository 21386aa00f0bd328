"""Compile generated kernels for GPUs that are not here, and read what became of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError
from . import source
from .call import Call

__all__ = ["SHARED_LIMIT", "Resources", "compile_call"]

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Compute capability -> shared memory that a block of threads may use, in bytes (CUDA programming guide)."""

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_COUNTED = {
    "wgmma": r"(?:HGMMA|IGMMA|QGMMA|WGMMA)\.",
    "tcgen05": r"UTC\w*MMA",
    "mma": r"\s(?:HMMA|IMMA)\.",
    "loads of 16 bytes": r"LDG\.E(?:\.\w+)*\.128|LDGSTS\.E(?:\.\w+)*\.128|UTMALDG",
    "loads": r"\s(?:LDG|LDGSTS|UTMALDG)\.",
    "stores of 16 bytes": r"STG\.E(?:\.\w+)*\.128|UTMASTG",
    "stores": r"\s(?:STG|UTMASTG)\.",
    "shuffles": r"\sSHFL\.",
    "barriers": r"\sBAR\.",
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread: registers that spilled, and arrays.
        spills: instructions that write registers to or read them from local memory.
        shared: bytes of a block of threads.
        instructions: of the program text.
        counts: how often some instructions occur in it.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    counts: Mapping[str, int] = field(default_factory=dict)


def compile_call(call: Call, capability: int) -> Resources:
    """Compile the kernel of a launch for an architecture, as Triton would for its arguments.

    Args:
        call: its tensors may be on the meta device; they are taken to be aligned to 16 bytes.
        capability: one of :data:`SHARED_LIMIT`.

    Returns:
        What ``cuobjdump`` says about the code.
    """
    import triton

    from .interpreter import interpreting

    if interpreting():
        raise OptionError("TRITON_INTERPRET is set, so that Triton compiles nothing; unset it to compile kernels")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(source.load(call.text), call.name)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(call.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for index, (name, value) in enumerate(call.arguments.items()):
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value != 1 and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(call.constants, "constexpr")
    built = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=call.options(),
    )
    return _resources(built.asm["cubin"], built.metadata.shared)


def _resources(cubin: bytes, shared: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage, text = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return Resources(
        registers=int(match.group(1)),
        stack=int(match.group(2)),
        spills=len(re.findall(r"\s(?:STL|LDL)\b", text)),
        shared=shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", text, re.M)),
        counts={name: len(re.findall(pattern, text)) for name, pattern in _COUNTED.items()},
    )
