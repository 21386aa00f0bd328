"""Attention in 8 bits: quantizing q, k and v, then one kernel that goes through all keys.

q and k go through the kernel that quantizes activations (:mod:`.quantize`), v through one of its own, because its 64
values of a scale are 64 tokens. A program of the last kernel has some rows of a head. It holds their queries, and reads
keys and values 64 at a time; no score comes to memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...format.hif4 import UNIT, units
from ...format.transforms import hadamard_block
from ...ops.attention import MOST_CHANNELS, check_attention, empty_result
from . import expand, quantize, source
from .call import Call

__all__ = ["AttentionTile", "calls", "tile_for"]

CHANNELS = 128
"""Of the values that a program computes."""


@dataclass(frozen=True)
class AttentionTile:
    """Sizes of a launch.

    Attributes:
        rows: that a block of threads computes.
        warps: of a block.
        stages: of loads ahead.
    """

    rows: int
    warps: int
    stages: int


def tile_for(causal: bool) -> AttentionTile:
    """Return the sizes of a launch: the largest whose numbers stay in registers, on every architecture."""
    return AttentionTile(64, 4, 2) if causal else AttentionTile(128, 8, 2)


def calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
    *,
    lse: Tensor | None = None,
    tile: AttentionTile | None = None,
    exact: bool = False,
) -> tuple[Tensor, list[Call]]:
    """Return the result of ``tahf4::attention``, empty, and the launches that fill it.

    Args:
        query: and the following as for ``tahf4::attention``; heads have at most 256 channels.
        key: likewise.
        value: likewise.
        attn_mask: likewise.
        is_causal: likewise.
        scale: likewise.
        enable_gqa: likewise.
        bits: likewise.
        lse: float32 ``[B, H, L]``, which the last launch fills with the log-sum-exp, or None.
        tile: in place of the default.
        exact: whether to round as the reference does, for its bits; slower.
    """
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits)
    batch, heads, rows, width = query.shape
    keys, channels = key.shape[2], value.shape[3]
    out = empty_result(query, value)
    if out.numel() == 0:
        return out, []
    block = hadamard_block(width, MOST_CHANNELS)
    (q, q_scales), before = _rows(query, block, bits)
    (k, k_scales), launches = _rows(key, block, bits)
    before += launches
    (v, v_scales, v_starts), launches = _values(value)
    before += launches
    mask, kind, steps = _mask(attn_mask, (batch, heads, rows, keys))
    tile = tile or tile_for(is_causal)
    columns = max(16, min(CHANNELS, 1 << (channels - 1).bit_length()))
    arguments = {
        "q": q, "q_scales": q_scales, "k": k, "k_scales": k_scales,
        "v": v, "v_scales": v_scales, "v_starts": v_starts, "mask": q if mask is None else mask, "out": out,
        "lse": out if lse is None else lse,
        "factor": (width**-0.5 if scale is None else scale) / math.log(2),
        "heads": heads, "shared": heads // key.shape[1], "rows": rows, "keys": keys, "channels": channels,
        **dict(zip(("mask_batch", "mask_head", "mask_row", "mask_column"), steps, strict=True)),
        **dict(zip(("out_batch", "out_head", "out_row", "out_column"), out.stride(), strict=True)),
    }  # fmt: skip
    constants = {
        "BM": tile.rows, "C": columns, "UNITS": units(width), "MASK": kind,
        "BOOLEAN": mask is not None and mask.dtype == torch.uint8,
        "CAUSAL": is_causal, "LSE": lse is not None, "EXACT": exact, "STAGES": tile.stages,
    }  # fmt: skip
    grid = (-(-rows // tile.rows) * batch * heads, -(-channels // columns))
    sizes = (tile.warps, tile.stages, exact)
    return out, [*before, Call(text(), "attend", grid, arguments, constants, *sizes)]


@functools.cache
def text() -> str:
    """Return the file of all kernels."""
    return source.module_text("Attention in 8 bits.", ["quantize_values", "attend"], "")


def _rows(x: Tensor, block: int, bits: int) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return codes int8 ``[.., units * 64]`` and scales ``[.., units]`` of queries or keys, and their launches."""
    (codes, scales), launches = quantize.call([x], "", None, block, bits)
    if bits == 8 or codes.numel() == 0:
        return (codes, scales), launches
    wide, last = expand.expand(codes.view(-1, UNIT // 2), scales.view(-1, 1), "int8")  # a row for each unit
    return (wide[0], wide[1]), [*launches, last]


def _values(value: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], list[Call]]:
    """Return codes ``[B, H, tiles, Ev, 64]``, scales and starts of sums ``[B, H, tiles, Ev]``, and their launch."""
    batch, heads, keys, channels = value.shape
    tiles = -(-keys // UNIT)
    codes = torch.empty((batch, heads, tiles, channels, UNIT), dtype=torch.int8, device=value.device)
    scales = torch.empty((batch, heads, tiles, channels), dtype=torch.float32, device=value.device)
    starts = torch.empty_like(scales, dtype=torch.int32)
    if codes.numel() == 0:
        return (codes, scales, starts), []
    arguments = {"values": value, "codes": codes, "scales": scales, "starts": starts, "heads": heads, "keys": keys}
    arguments |= {"channels": channels}
    arguments |= dict(zip(("batch_step", "head_step", "key_step", "channel_step"), value.stride(), strict=True))
    columns = min(64, max(16, 1 << (channels - 1).bit_length()))
    grid = (batch * heads * tiles, -(-channels // columns))
    launch = Call(text(), "quantize_values", grid, arguments, {"CHANNELS": columns}, exact=True)
    return (codes, scales, starts), [launch]


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, int, tuple[int, ...]]:
    """Return a mask, 0 for none, 1 for the same in every row or 2, and its strides."""
    if mask is None:
        return None, 0, (0, 0, 0, 0)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    wide = mask.expand(shape)
    return wide, 1 if wide.stride(2) == 0 or shape[2] == 1 else 2, wide.stride()
