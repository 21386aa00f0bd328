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

from . import hif4

__all__ = ["hadamard_block", "multipliers", "seed_of", "signs"]

DEFAULT_BLOCK = 64


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
    flips = signs(seed, k) if seed is not None else torch.ones(k)
    if mask is None:
        return flips, flips
    flips = flips.to(mask.device)
    return mask * flips, flips / mask
