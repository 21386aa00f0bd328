"""Fake quantization in the 4-bit formats that HiF4 is compared with.

* NVFP4: blocks of 16 E2M1 elements, a block scale in E4M3, a float32 scale for the tensor (NVIDIA, "Pretraining
  Large Language Models with NVFP4", arXiv 2509.25149). 4.5 bits a value.
* MXFP4: blocks of 32 E2M1 elements, a block scale in E8M0 (OCP Microscaling Formats v1.0). 4.25 bits a value.
* INT4: groups of 64 symmetric integers -7 to 7, a bfloat16 scale. 4.25 bits a value.

All run along the last axis, which is padded with zeros to whole blocks; elements round to nearest, ties to even.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...ops import transform
from ...transforms import hadamard_block, multipliers, seed_of

__all__ = ["FORMATS", "SimulatedLinear", "fake_quantize", "simulate_"]


def _blocks(x: Tensor, width: int) -> Tensor:
    x = x.to(torch.float32)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % width))
    return padded.unflatten(-1, (-1, width))


def _e2m1(x: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; larger magnitudes become 6."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (torch.round(magnitude / step) * step).clamp(max=6.0).copysign(x)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _exponent(x: Tensor) -> Tensor:
    """Return floor(log2(x)) of positive normal float32 values, -127 for zero."""
    return (x.view(torch.int32) >> 23) - 127


def _e4m3(x: Tensor) -> Tensor:
    """Round positive values to E4M3 (largest 448, smallest 2**-9)."""
    step = _power_of_two(_exponent(x.clamp(max=448.0)).clamp(min=-6) - 3)
    return (torch.round(x / step) * step).clamp(max=448.0)


def nvfp4(x: Tensor) -> Tensor:
    """Fake-quantize ``[..., K]`` in NVFP4: float32 of the same shape."""
    blocks = _blocks(x, 16)
    whole = (blocks.abs().amax() / (448.0 * 6.0)).clamp(min=1e-30)
    scale = _e4m3(blocks.abs().amax(-1, keepdim=True) / 6.0 / whole) * whole
    values = _e2m1(blocks / torch.where(scale > 0, scale, 1.0)) * scale
    return values.flatten(-2)[..., : x.shape[-1]]


def mxfp4(x: Tensor) -> Tensor:
    """Fake-quantize ``[..., K]`` in MXFP4: float32 of the same shape."""
    blocks = _blocks(x, 32)
    exponent = (_exponent(blocks.abs().amax(-1, keepdim=True)) - 2).clamp(-126, 126)
    scale = _power_of_two(exponent)
    return (_e2m1(blocks / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def int4(x: Tensor) -> Tensor:
    """Fake-quantize ``[..., K]`` in INT4 with groups of 64: float32 of the same shape."""
    blocks = _blocks(x, 64)
    bits = (blocks.abs().amax(-1, keepdim=True) / 7.0).view(torch.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # to bfloat16, half to even
    scale = bits.view(torch.float32)
    values = torch.round(blocks / torch.where(scale > 0, scale, 1.0)).clamp(-7, 7) * scale
    return values.flatten(-2)[..., : x.shape[-1]]


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"nvfp4": nvfp4, "mxfp4": mxfp4, "int4": int4}
"""Name -> function."""


def fake_quantize(x: Tensor, fmt: str, *, compiled: bool = False) -> Tensor:
    """Return ``[..., K]`` rounded to the values that a format holds, float32.

    Args:
        x: of a floating-point type.
        fmt: ``"nvfp4"``, ``"mxfp4"`` or ``"int4"``.
        compiled: run the function that ``torch.compile`` makes of it (the same values, faster).

    Raises:
        OptionError: the format is unknown.
    """
    if fmt not in FORMATS:
        raise OptionError(f"unknown format {fmt!r}; expected one of {', '.join(FORMATS)}")
    return (_compiled(fmt) if compiled else FORMATS[fmt])(x)


@functools.cache
def _compiled(fmt: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(FORMATS[fmt], dynamic=True)


class SimulatedLinear(nn.Module):
    """A linear whose weight (once) and activation (at each call) are fake-quantized."""

    def __init__(self, linear: nn.Linear, fmt: str, seed: int | None, block: int, *, compiled: bool) -> None:
        """Convert the weight of a linear; with a rotation if there is a block width."""
        super().__init__()
        self._format, self._block, self._compiled = fmt, block, compiled
        forward, backward = multipliers(linear.in_features, None, seed if block else None)
        self._multiplier = forward
        moved = transform(linear.weight.detach().float(), backward, block)
        self.register_buffer("weight", fake_quantize(moved, fmt))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` of the input's dtype."""
        moved = transform(x.float(), self._multiplier, self._block)
        product = nn.functional.linear(fake_quantize(moved, self._format, compiled=self._compiled), self.weight)
        return (product if self.bias is None else product + self.bias.float()).to(x.dtype)


def simulate_(
    model: nn.Module, paths: Iterable[str], fmt: str, *, block: int = 0, compiled: bool = False
) -> None:
    """Put simulated linears in the place of linears.

    Args:
        model: changed in place.
        paths: of linears.
        fmt: see :func:`fake_quantize`.
        block: the widest Hadamard block, 0 for no rotation.
        compiled: see :func:`fake_quantize`.
    """
    for path in list(paths):
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise OptionError(f"{path} is a {type(linear).__name__}; expected a Linear")
        width = hadamard_block(linear.in_features, block)
        simulated = SimulatedLinear(linear, fmt, seed_of(path), width, compiled=compiled)
        setattr(model.get_submodule(parent), leaf, simulated)
