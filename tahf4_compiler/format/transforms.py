"""What stands between a value and its quantization: a channel mask, random signs, a block Hadamard.

For an activation ``x`` and the weights ``W`` that read it, ``x W^T = (x T)(W T^-T)^T`` for every invertible ``T``. Here
``T = diag(mask) diag(signs) H``: the activation is multiplied by ``mask * signs``, the weights by
``signs / mask``, and blocks of both go through the same orthonormal Hadamard matrix. Nothing has to be undone after
the product.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError
from . import hif4

__all__ = ["SEED", "check_transform", "hadamard", "hadamard_block", "multipliers", "seed_of", "signs", "transform"]

DEFAULT_BLOCK = 64

SEED = 0
"""Seed of the signs of a new rotation; a recipe of an earlier version may say another.

It is one number, because a graph runs with weights that it does not know: whichever graph reads a weight, and beside
whichever others, the weight is packed in one way.
"""


def seed_of(path: str) -> int:
    """Return the seed of a rotation: 63 bits of the SHA-256 of a module path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little") >> 1


def signs(seed: int, k: int) -> Tensor:
    """Return random signs, float32 ``[k]`` of +1 and -1, the same on every machine and in every version.

    They are the bits of SHAKE-256 over the seed.
    """
    bits = np.frombuffer(hashlib.shake_256(seed.to_bytes(8, "little")).digest((k + 7) // 8), dtype=np.uint8)
    return torch.from_numpy(1.0 - 2.0 * np.unpackbits(bits)[:k].astype(np.float32))


def hadamard_block(k: int, limit: int = DEFAULT_BLOCK) -> int:
    """Return the widest power of two up to ``limit`` that divides K rounded up to whole units of 64.

    5120, 13824, 14336 and 3072 take blocks up to 1024, 512, 2048 and 1024.
    """
    padded = hif4.units(k) * hif4.UNIT
    return min(padded & -padded, 1 << (limit.bit_length() - 1)) if limit > 0 else 0


def multipliers(k: int, mask: Tensor | None, seed: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the factors of the activation's and of the weight's channels.

    Args:
        k: channels.
        mask: float32 ``[k]``, positive, or None for ones.
        seed: of the signs, or None for no signs.

    Returns:
        Two float32 ``[k]``: ``mask * signs`` and ``signs / mask``; None where both are one.
    """
    if mask is None and seed is None:
        return None, None
    flips = signs(seed, k) if seed is not None else torch.ones(k, dtype=torch.float32, device="cpu")
    if mask is None:
        return flips, flips
    flips = flips.to(mask.device)
    return mask * flips, flips / mask


def hadamard(x: Tensor, block: int) -> Tensor:
    """Apply the orthonormal Walsh-Hadamard transform to blocks of the last axis.

    Args:
        x: float32 ``[..., K]``, K a multiple of ``block``.
        block: a power of two.

    Returns:
        float32 ``[..., K]``. Butterflies run from stride 1 to stride ``block / 2`` and the product with
        ``block ** -0.5`` comes last, so that every backend can round the same way. The transform is
        its own inverse.
    """
    shape = x.shape
    stride = 1
    while stride < block:
        low, high = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).reshape(shape)
        stride *= 2
    return x * block**-0.5


def transform(x: Tensor, multiplier: Tensor | None, hadamard_block: int) -> Tensor:
    """Return what is quantized: ``hadamard(x * multiplier)`` in float32, or ``x`` itself without a transform.

    Args:
        x: ``[..., K]``.
        multiplier: float32 ``[K]``, or None for ones.
        hadamard_block: a power of two that divides K rounded up to a multiple of 64, or 0 for none.

    Returns:
        ``[..., K]`` (padded with zeros to a multiple of 64 where there is a rotation).

    Raises:
        FormatError: the multiplier's shape or the block width does not fit K.
    """
    check_transform(x.shape[-1], multiplier, hadamard_block)
    if multiplier is not None:
        x = x.to(torch.float32) * multiplier
    if hadamard_block:
        padding = hif4.units(x.shape[-1]) * hif4.UNIT - x.shape[-1]
        x = hadamard(torch.nn.functional.pad(x.to(torch.float32), (0, padding)), hadamard_block)
    return x


def check_transform(k: int, multiplier: Tensor | None, block: int) -> None:
    """Raise :class:`FormatError` unless a multiplier and a block width fit K channels."""
    if multiplier is not None and tuple(multiplier.shape) != (k,):
        raise FormatError(f"multiplier of shape {tuple(multiplier.shape)}; expected ({k},), one for each channel")
    if block == 0:
        return
    padded = hif4.units(k) * hif4.UNIT
    if block < 0 or block & (block - 1) or padded % block:
        raise FormatError(
            f"hadamard_block is {block}; expected 0 or a power of two that divides {padded} "
            f"(K={k} in whole units of 64)"
        )
