"""What a compiled packed linear has in the place of ``tahf4::quantize`` where the denoising step decides on bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PackedError
from .define import operator
from .reference import quantize

__all__ = ["quantize_by_step"]


@operator
def quantize_by_step(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> tuple[Tensor, Tensor]:
    """Raise an error: the backend ``tahf4`` puts ``tahf4::quantize`` in its place, with the bits of the step.

    Args:
        x: and the others as for ``tahf4::quantize``.
        multiplier: see there.
        hadamard_block: see there.
        bits: in other steps.
        span: see there.

    Raises:
        PackedError: always.
    """
    raise PackedError(
        "a packed model has steps in high precision, and something else than the backend 'tahf4' compiled, exported or "
        "traced it, which cannot know the step. Compile it with backend='tahf4', run it as it is, or take the steps "
        "off first: tahf4.set_high_precision_steps(model, ())"
    )


@torch.library.register_fake("tahf4::quantize_by_step")
def _(
    x: Tensor, multiplier: Tensor | None = None, hadamard_block: int = 0, bits: int = 4, span: int = 1
) -> tuple[Tensor, Tensor]:
    codes, scales = quantize(x, multiplier, hadamard_block, bits, span)
    return codes, scales
