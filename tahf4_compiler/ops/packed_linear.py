"""What a packed linear is in a graph before passes see it: one operator, which no kernel is chosen for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PackedError
from ..format.spans import units_of
from . import registry
from .define import operator
from .reference import check_memory

__all__ = ["packed_linear", "product"]


def product(
    x: Tensor,
    multiplier: Tensor | None,
    hadamard_block: int,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    bits: int = 4,
    span: int = 1,
) -> Tensor:
    """Quantize an activation and multiply it, each with the kernel that is best on its device.

    Args:
        x: ``[..., K]``.
        multiplier: with the next one, as for ``tahf4::quantize``.
        hadamard_block: see there.
        weight_codes: with the next three, as for ``tahf4::linear``.
        weight_scales: see there.
        bias: see there.
        out_dtype: see there.
        bits: of the activation.
        span: a form, as for ``tahf4::quantize``.

    Returns:
        ``[..., N]``.
    """
    codes, scales = registry.quantize(x, multiplier, hadamard_block, bits, span)
    return registry.linear(codes, scales, weight_codes, weight_scales, bias, out_dtype, units_of(span))


@operator
def packed_linear(
    x: Tensor,
    multiplier: Tensor | None,
    hadamard_block: int,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    bits: int = 4,
    span: int = 1,
    by_step: bool = False,
) -> Tensor:
    """Run :func:`product`; the backend ``tahf4`` puts ``tahf4::quantize`` and ``tahf4::linear`` in its place.

    Args:
        x: and the others as for :func:`product`.
        multiplier: see there.
        hadamard_block: see there.
        weight_codes: see there.
        weight_scales: see there.
        bias: see there.
        out_dtype: see there.
        bits: see there.
        span: see there.
        by_step: whether the denoising step decides on the bits. Only the backend knows the step.

    Raises:
        PackedError: the step decides.
    """
    if by_step:
        raise PackedError(
            "a packed model has steps in high precision, and something else than the backend 'tahf4' compiled, "
            "exported or traced it, which cannot know the step. Compile it with backend='tahf4', run it as it is, or "
            "take the steps off first: tahf4.set_high_precision_steps(model, ())"
        )
    return product(x, multiplier, hadamard_block, weight_codes, weight_scales, bias, out_dtype, bits, span)


@torch.library.register_fake("tahf4::packed_linear")
def _(
    x: Tensor,
    multiplier: Tensor | None,
    hadamard_block: int,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    bits: int = 4,
    span: int = 1,
    by_step: bool = False,
) -> Tensor:
    check_memory("packed_linear", x, multiplier, weight_codes, weight_scales, bias)
    return product(x, multiplier, hadamard_block, weight_codes, weight_scales, bias, out_dtype, bits, span)
