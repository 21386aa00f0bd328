"""A launch of a generated kernel: what runs on a device is what is compiled for a table."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...torch_private.tensors import int_product
from . import source

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """One launch.

    Attributes:
        text: of the kernel's file.
        name: of the kernel in it.
        grid: blocks of threads.
        arguments: by parameter: tensors and numbers.
        constants: compile-time constants by parameter.
        warps: of a block.
        stages: of loads ahead in loops.
        exact: no fused multiply-adds, so that every operation rounds as in the reference.
        product: int8 ``[M, K]`` and ``[N, K]``, and the int32 ``[M, N]`` that the library's product fills before.
    """

    text: str
    name: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3
    exact: bool = False
    product: tuple[Tensor, Tensor, Tensor] | None = None

    def options(self) -> dict[str, Any]:
        """Return Triton's options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": not self.exact}

    @property
    def digest(self) -> str:
        """Return a short name of the kernel and of the sizes that it is launched with."""
        shown = [(n, tuple(v.shape) if isinstance(v, Tensor) else v) for n, v in self.arguments.items()]
        return hashlib.sha256(repr((self.text, self.name, self.grid, shown)).encode()).hexdigest()[:12]

    def standalone(self) -> str:
        """Return the file with a ``__main__`` that launches the kernel on random bits of these sizes."""
        lines = ["import torch", "", 'device = "cuda" if torch.cuda.is_available() else "cpu"', "arguments = {"]
        for name, value in self.arguments.items():
            if not isinstance(value, Tensor):
                lines.append(f"    {name!r}: {value},")
                continue
            make = "torch.randint(0, 100, {0}, dtype={1}, device=device)"
            if value.dtype.is_floating_point:
                make = "torch.randn({0}, device=device).to({1})"
            size = (
                1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
            )
            make = make.format((size,), value.dtype)
            lines.append(f"    {name!r}: {make}.as_strided({tuple(value.shape)}, {value.stride()}),")
        lines += ["}", f"{self.name}[{self.grid}](**arguments, **{ {**self.constants, **self.options()}!r})"]
        lines += ["for name, value in arguments.items():", "    if isinstance(value, torch.Tensor):"]
        lines += ["        print(name, tuple(value.shape), value.dtype, value.double().abs().mean().item())"]
        note = "# Without a GPU: TRITON_INTERPRET=1 python <this file>\n"
        return f'{self.text}\n\n{note}if __name__ == "__main__":\n' + textwrap.indent("\n".join(lines), "    ") + "\n"

    def run(self) -> None:
        """Launch."""
        if self.product is not None:
            int_product(*self.product)
        kernel = getattr(source.load(self.text), self.name)
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        if device.type != "cuda":  # the interpreter
            kernel[self.grid](*self.arguments.values(), **self.constants, **self.options())
            return
        with torch.cuda.device(device):
            kernel[self.grid](*self.arguments.values(), **self.constants, **self.options())
