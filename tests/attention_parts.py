"""Operands of attention: random ones, and keys and values that some ranks quantize, each its part of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tahf4_compiler.ops.attention_codes import key_codes, value_codes, value_maxima


def quantized(k: Tensor, v: Tensor, bits: int, parts: int = 1) -> list[Tensor]:
    """Return what ``tahf4::attention_of_codes`` takes after the query, gathered from parts of the tokens.

    Args:
        k: ``[B, H, S, E]``; S is a multiple of ``parts``.
        v: ``[B, H, S, Ev]``.
        bits: of the keys.
        parts: how many ranks there are.
    """
    tokens, tiles = k.shape[2], -(-k.shape[2] // 64)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # as models make them
    count = max(1, tokens // parts)
    keys = [key_codes(part, bits) for part in k.split(count, 1)]
    values = [(place * count, part) for place, part in enumerate(v.split(count, 1))]
    most = torch.stack([value_maxima(part, first, tiles) for first, part in values]).amax(0)
    rounded = [value_codes(part, first, most) for first, part in values]
    found = [torch.cat([part[i] for part in keys], 1) for i in (0, 1)]
    whole = found[0], torch.cat([codes for codes, _ in rounded], 1), found[1], rounded[0][1]
    return [x.transpose(1, 2) for x in whole]


def normal(rows=40, keys=150, channels=64, heads=2, shared=1, values=None, dtype=torch.float32, batch=1):
    """Return normal random q, k and v as models make them: heads are split off the channels."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens, heads, width):
        return torch.randn(batch, tokens, heads, width, generator=generator).to(dtype).transpose(1, 2)

    few = heads // shared
    return draw(rows, heads, channels), draw(keys, few, channels), draw(keys, few, values or channels)
