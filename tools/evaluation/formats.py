"""Fake quantization (quantize, then dequantize) in the 4-bit formats that HiF4 is compared with.

==========  ============================================================================  =============
format      a block of the last axis                                                      bits a value
==========  ============================================================================  =============
``nvfp4``   16 E2M1 elements, one E4M3 scale; a float32 scale for the whole tensor         4.5
``mxfp4``   32 E2M1 elements, one E8M0 scale                                               4.25
``int4``    64 integers -7 to 7, one bfloat16 scale                                        4.25
``hif4``    64 elements, see :mod:`tahf4_compiler.format.hif4`                                    4.5
==========  ============================================================================  =============

Sources: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149; OCP Microscaling Formats (MX)
Specification v1.0. Everything rounds to nearest, ties to even, and saturates. The last axis is padded with zeros to
whole blocks; the padding is cut off again. (``hif4`` rounds as the compiler does.)

What the sources leave open, or what is a choice here:

* ``nvfp4``: the tensor's scale is ``amax / (448 * 6)`` of the tensor at hand, so that of an activation is found at
  each call. A block whose scale rounds to 0 becomes 0.
* ``mxfp4``: the scale is ``2 ** (floor(log2(amax)) - 2)``, the specification's, so that up to a quarter of the range
  above 6 saturates.
* ``int4``: the scale is ``amax / 7`` rounded to bfloat16; code -8 is not used.

Values are expected to be finite. A NaN stays one. Roundings to E4M3 and bfloat16 are written as integer operations,
because Inductor removes round trips through short types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...format import hif4
from ...format.transforms import hadamard_block as widest_block
from ...format.transforms import seed_of, signs, transform

__all__ = ["FORMATS", "SimulatedLinear", "fake_quantize", "int4", "mxfp4", "nvfp4", "simulate_"]

_E2M1_MAX = 6.0
_E4M3_MAX = 448.0


def nvfp4(x: Tensor) -> Tensor:
    """Fake-quantize in NVFP4.

    Args:
        x: floating point ``[..., K]``; all of it shares one float32 scale.

    Returns:
        float32 ``[..., K]``.
    """
    blocks, amax = _blocks(x, 16)
    tensor = amax.amax() / (_E4M3_MAX * _E2M1_MAX)
    scale = _e4m3(amax / _E2M1_MAX / torch.where(tensor > 0, tensor, 1.0)) * tensor
    return _merge(_e2m1(blocks / torch.where(scale == 0, torch.inf, scale)) * scale, x)


def mxfp4(x: Tensor) -> Tensor:
    """Fake-quantize in MXFP4.

    Args:
        x: floating point ``[..., K]``.

    Returns:
        float32 ``[..., K]``.
    """
    blocks, amax = _blocks(x, 32)
    # The exponent field of a float32 is floor(log2) + 127. E8M0 ends at 2**-127: a field of 0, which is a subnormal.
    field = ((amax.view(torch.int32) >> 23) - 2).clamp(min=0)
    scale = torch.where(field > 0, field << 23, 1 << 22).view(torch.float32)
    inverse = ((254 - field) << 23).view(torch.float32)
    return _merge(_e2m1(blocks * inverse) * scale, x)


def int4(x: Tensor) -> Tensor:
    """Fake-quantize in symmetric INT4 with codes -7 to 7 and a bfloat16 scale for each 64 values.

    Args:
        x: floating point ``[..., K]``.

    Returns:
        float32 ``[..., K]``.
    """
    blocks, amax = _blocks(x, 64)
    bits = (amax / 7.0).view(torch.int32)
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    codes = torch.round(blocks / torch.where(scale == 0, torch.inf, scale)).clamp(-7, 7)
    return _merge(codes * scale, x)


def _hif4(x: Tensor) -> Tensor:
    return hif4.fake_quantize(x.to(torch.float32))


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"nvfp4": nvfp4, "mxfp4": mxfp4, "int4": int4, "hif4": _hif4}
"""Name -> function from ``[..., K]`` to float32 ``[..., K]``, in eager mode."""


def fake_quantize(x: Tensor, fmt: str, *, compiled: bool = True) -> Tensor:
    """Return ``x`` rounded to the nearest values that a format holds.

    Args:
        x: floating point ``[..., K]``.
        fmt: a key of :data:`FORMATS`.
        compiled: run what ``torch.compile`` makes of the function: one compilation for each format and K, none for
            another number of rows. The values are the same. Where ``torch.compile`` is off
            (``TORCH_COMPILE_DISABLE=1``) or already at work, the function runs as it is.

    Returns:
        float32 ``[..., K]``.

    Raises:
        OptionError: the format is unknown.
    """
    if fmt not in FORMATS:
        raise OptionError(f"unknown format {fmt!r}; expected one of {', '.join(FORMATS)}")
    if not torch.compiler.is_compiling() and x.numel() == 0:
        return x.to(torch.float32)
    if not compiled or torch.compiler.is_compiling():
        return FORMATS[fmt](x)
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    torch._dynamo.mark_static(rows, 1)
    with torch.no_grad():
        return _compiled(fmt)(rows).reshape(x.shape)


@functools.cache
def _compiled(fmt: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(FORMATS[fmt])


class SimulatedLinear(nn.Module):
    """A linear whose weight (once) and whose activation (at each call) are fake-quantized; the product is float32."""

    weight: Tensor
    multiplier: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        fmt: str,
        multiplier: Tensor | None = None,
        hadamard_block: int = 0,
        *,
        compiled: bool = True,
    ) -> None:
        """Transform and fake-quantize the weight of a linear.

        Args:
            linear: ``[N, K]``; its bias is used as it is.
            fmt: a key of :data:`FORMATS`.
            multiplier: ``[K]`` of +1 and -1, or None: signs of a rotation, the same for activation and weight.
            hadamard_block: see :func:`tahf4_compiler.format.transforms.transform`.
            compiled: see :func:`fake_quantize`.

        Raises:
            OptionError: the format is unknown, or the multiplier holds other values than signs.
            FormatError: the multiplier's shape or the block width does not fit K.
        """
        super().__init__()
        weight = linear.weight.detach().to(torch.float32)
        if multiplier is not None:
            multiplier = multiplier.to(weight)
            if not torch.equal(multiplier.abs(), torch.ones_like(multiplier)):
                raise OptionError("the multiplier holds values other than +1 and -1, which weights would have to undo")
        self.fmt, self.hadamard_block, self.compiled = fmt, hadamard_block, compiled
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("multiplier", multiplier)
        moved = transform(weight, multiplier, hadamard_block)
        self.register_buffer("weight", fake_quantize(moved, fmt, compiled=compiled))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` of the dtype of ``x``, ``[..., K]``."""
        moved = transform(x.to(torch.float32), self.multiplier, self.hadamard_block)
        product = nn.functional.linear(fake_quantize(moved, self.fmt, compiled=self.compiled), self.weight)
        return (product if self.bias is None else product + self.bias.to(torch.float32)).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe it when the model is printed."""
        return f"{self.in_features}, {self.out_features}, {self.fmt}, hadamard_block={self.hadamard_block}"


def simulate_(
    model: nn.Module, paths: Iterable[str], fmt: str, hadamard_block: int = 0, seed: int = 0, *, compiled: bool = True
) -> None:
    """Put simulated linears in the place of linears.

    Args:
        model: changed in place, or not at all if there is an error.
        paths: of linears.
        fmt: a key of :data:`FORMATS`.
        hadamard_block: the widest Hadamard block, a power of two; each linear takes the widest that divides its K in
            whole units of 64. 0 for no rotation and no signs.
        seed: of the signs; each linear has its own.
        compiled: see :func:`fake_quantize`.

    Raises:
        OptionError: the format is unknown, a path names no linear, or the block width is no power of two.
    """
    if hadamard_block < 0 or hadamard_block & (hadamard_block - 1):
        raise OptionError(f"hadamard_block is {hadamard_block}; expected 0 or a power of two")
    if fmt not in FORMATS:
        raise OptionError(f"unknown format {fmt!r}; expected one of {', '.join(FORMATS)}")
    modules = dict(model.named_modules())
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if not isinstance(modules.get(path), nn.Linear):
            raise OptionError(f"{path!r} is a {type(modules.get(path)).__name__} in the model; expected a Linear")
    simulated = {}
    for path in paths:
        linear = modules[path]
        assert isinstance(linear, nn.Linear)
        flips = signs(seed_of(f"{seed}/{path}"), linear.in_features) if hadamard_block else None
        block = widest_block(linear.in_features, hadamard_block)
        simulated[path] = SimulatedLinear(linear, fmt, flips, block, compiled=compiled)
    for path, module in simulated.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def _blocks(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return float32 ``[..., blocks, width]`` and the largest magnitudes ``[..., blocks, 1]``."""
    x = x.to(torch.float32)
    if x.shape[-1] % width:
        x = nn.functional.pad(x, (0, -x.shape[-1] % width))
    blocks = x.unflatten(-1, (-1, width))
    return blocks, blocks.abs().amax(-1, keepdim=True)


def _merge(blocks: Tensor, x: Tensor) -> Tensor:
    return blocks.flatten(-2)[..., : x.shape[-1]]


def _e2m1(x: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, larger magnitudes to 6."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    inverse = torch.where(magnitude < 2, 2.0, torch.where(magnitude < 4, 1.0, 0.5))
    return (torch.round(x * inverse) * step).clamp(-_E2M1_MAX, _E2M1_MAX)


def _e4m3(x: Tensor) -> Tensor:
    """Round values of at least 0 to E4M3: 3 mantissa bits down to 2**-6, steps of 2**-9 below, at most 448."""
    bits = x.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).view(torch.float32)
    small = torch.round(x * 512.0) * (1 / 512.0)
    return torch.where(x < 2.0**-6, small, normal).clamp(max=_E4M3_MAX)
