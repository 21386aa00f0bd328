"""Attention in 8 bits: quantizing q, k and v, then one kernel that goes through all keys.

q and k go through the kernel that quantizes activations (:mod:`.quantize`), v through one of its own, because its 64
values of a scale are 64 tokens. A program of the last kernel has some rows of a head. It holds their queries, and reads
keys and values 64 or 128 at a time; no score comes to memory. Values of 16 bits are read as they are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...format import hif4
from ...format.hif4 import UNIT
from ...format.transforms import hadamard_block as block_of
from ...ops.attention import MOST_CHANNELS, check_attention, empty_lse, empty_result, row_span, values_in_16_bits
from ...ops.attention_codes import check_codes
from ...ops.reference import activation_bits
from . import expand, quantize, source
from .call import Call

__all__ = [
    "AttentionTile",
    "Units",
    "calls",
    "calls_of_codes",
    "calls_with_lse",
    "columns_of",
    "launch",
    "of_rows",
    "of_values",
    "tile_for",
]

CHANNELS = 128
"""Of the values that a program computes."""

MOST_KEYS = 128
"""That a program reads at a time."""


@dataclass(frozen=True)
class Units:
    """A result that is quantized, and how.

    Attributes:
        codes: as ``tahf4::quantize`` gives them for ``[B, L, H * Ev]``.
        scales: likewise.
        multiplier: as for ``tahf4::quantize``.
        block: of a rotation, or 0.
        bits: 4 or 8.
        rounding: an index of ``FORM_ROUNDINGS``.
    """

    codes: Tensor
    scales: Tensor
    multiplier: Tensor | None
    block: int
    bits: int
    rounding: int

    def arguments(self) -> dict[str, Tensor]:
        """Return the tensors of a launch."""
        multiplier = self.scales if self.multiplier is None else self.multiplier
        return {"out_codes": self.codes.view(torch.int32), "out_scales": self.scales, "multiplier": multiplier}

    def constants(self) -> dict[str, Any]:
        """Return the constants of a launch."""
        levels, factor = (self.block.bit_length() - 1, self.block**-0.5) if self.block else (0, 1.0)
        found = {"BITS": self.bits, "LEVELS": levels, "FACTOR": factor, "ROUNDING": self.rounding}
        return {**found, "MULTIPLIER": self.multiplier is not None}


@dataclass(frozen=True)
class AttentionTile:
    """Sizes of a launch.

    Attributes:
        rows: that a block of threads computes.
        keys: that it reads at a time: 64, or :data:`MOST_KEYS` where values have 16 bits.
        warps: of a block.
        stages: of loads ahead.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def tile_for(
    causal: bool,
    masked: bool = False,
    wide: bool = False,
    channels: tuple[int, int] = (CHANNELS, CHANNELS),
    capability: tuple[int, int] | None = None,
) -> AttentionTile:
    """Return the sizes of a launch: the largest whose numbers stay in registers.

    Args:
        causal: whether the attention is.
        masked: whether it has a mask.
        wide: whether its values have 16 bits.
        channels: of a head of queries, and of one of values.
        capability: of the device, if it is known. Where matrix units read operands from shared memory, 128 keys fit.
    """
    # Addresses of some channels, and scales for some, take registers.
    odd = wide and (any(count % 16 for count in channels) or row_span(channels[0]) != 0)
    if causal or masked or odd or (channels[0] > CHANNELS and not wide):
        return AttentionTile(64, 64, 4 if causal and not wide else 8, 2)
    many = wide and channels[0] <= CHANNELS and capability is not None and capability[0] in (9, 10)
    return AttentionTile(128, MOST_KEYS if many else 64, 8, 2)


def calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
    value_bits: int = 8,
    *,
    lse: Tensor | None = None,
    units: Units | None = None,
    tile: AttentionTile | None = None,
    capability: tuple[int, int] | None = None,
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
        value_bits: likewise.
        lse: float32 ``[B, H, L]``, which the last launch fills with the log-sum-exp, or None.
        units: what the last launch fills in place of the result, or None; see :func:`quantizes`.
        tile: in place of the default.
        capability: of the device, see :func:`tile_for`.
        exact: whether to round as the reference does, for its bits; slower. With values in 16 bits it changes nothing.
    """
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits, value_bits)
    out = empty_result(query, value)
    if out.numel() == 0:
        return out, []
    block, span = block_of(query.shape[3], MOST_CHANNELS), row_span(query.shape[3]) if value_bits == 16 else 1
    if value_bits == 16 and scale is not None and scale < 0:  # the kernel takes factors that are not
        query, scale = -query, -scale
    q, before = of_rows([query], block, bits, span)
    k, of_keys = of_rows([key], block, bits, span)
    v, between = of_values(value, value_bits)
    operands = (query.shape[3], q, k, v, out, key.shape[1], key.shape[2])
    last = launch(*operands, attn_mask, is_causal, scale, lse, tile, exact, capability, units)
    return out, [*before, *of_keys, *between, last]


def calls_with_lse(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return the results of ``tahf4::attention_lse``, and the launches that fill them; see :func:`calls`."""
    lse = empty_lse(query).fill_(-math.inf)  # what no launch fills saw no key
    if value.dim() == 4 and not value.shape[3]:  # scores have a log-sum-exp without values as well
        _, found = calls(query, key, value.new_zeros((*value.shape[:3], 1)), *args, **kwargs, lse=lse)
        return (empty_result(query, value), lse), found
    out, found = calls(query, key, value, *args, **kwargs, lse=lse)
    return (out, lse), found


def calls_of_codes(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    scale: float | None = None,
    *,
    tile: AttentionTile | None = None,
    capability: tuple[int, int] | None = None,
    exact: bool = False,
) -> tuple[Tensor, list[Call]]:
    """Return the result of ``tahf4::attention_of_codes``, empty, and the launches that fill it.

    Args:
        query: and the following as for ``tahf4::attention_of_codes``; heads have at most 256 channels.
        key_codes: likewise.
        value_codes: likewise.
        key_scales: likewise.
        value_scales: likewise.
        scale: likewise.
        tile: in place of the default.
        capability: of the device, see :func:`tile_for`.
        exact: whether to round as the reference does, for its bits; slower.
    """
    check_codes(query, key_codes, value_codes, key_scales, value_scales)
    out, keys, bits = empty_result(query, value_codes), key_codes.shape[2], activation_bits(key_codes)
    if out.numel() == 0:
        return out, []
    q, before = of_rows([query], block_of(query.shape[3], MOST_CHANNELS), bits)
    k, of_keys = _bytes(key_codes.contiguous(), key_scales.contiguous())
    # As quantize_values writes them.
    filled = torch.nn.functional.pad(value_codes, (0, 0, 0, -keys % UNIT))
    v = filled.unflatten(2, (-1, UNIT)).transpose(-1, -2).contiguous()
    v_units = v, value_scales.contiguous(), v.sum(-1, dtype=torch.int32) * 128 + 0x4B400000
    operands = (query.shape[3], q, k, v_units, out, query.shape[1], keys)
    last = launch(*operands, None, False, scale, None, tile, exact, capability)
    return out, [*before, *of_keys, last]


def launch(
    width: int,
    q_units: tuple[Tensor, Tensor],
    k_units: tuple[Tensor, Tensor],
    v_units: tuple[Tensor, Tensor | None, Tensor | None],
    out: Tensor,
    key_heads: int,
    keys: int,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    lse: Tensor | None,
    tile: AttentionTile | None,
    exact: bool,
    capability: tuple[int, int] | None = None,
    units: Units | None = None,
) -> Call:
    """Return the launch that goes through all keys.

    Args:
        width: channels of a head of queries.
        q_units: of :func:`of_rows`; heads and rows are those of ``out``.
        k_units: likewise.
        v_units: of :func:`of_values`; values in 16 bits have no scales.
        out: ``[B, H, L, Ev]``, the result.
        key_heads: heads of keys and values.
        keys: how many there are.
        attn_mask: and the following as for :func:`calls`.
        is_causal: likewise.
        scale: likewise.
        lse: likewise.
        tile: likewise.
        exact: likewise.
        capability: likewise.
        units: likewise.
    """
    batch, heads, rows, channels = out.shape
    (q, q_scales), (k, k_scales), (v, v_scales, v_starts) = q_units, k_units, v_units
    mask, kind, steps = _mask(attn_mask, (batch, heads, rows, keys))
    wide = v_scales is None
    if wide and (v.stride(3) != 1 or v.stride(2) * MOST_KEYS >= 1 << 31):  # channels at once, and 32 bits for a place
        v = v.contiguous()
    tile = tile or tile_for(is_causal, mask is not None, wide, (width, channels), capability)
    columns = columns_of(channels)
    arguments = {
        "q": q, "q_scales": q_scales, "k": k, "k_scales": k_scales,
        "v": v, "v_scales": v if v_scales is None else v_scales, "v_starts": v if v_starts is None else v_starts,
        "mask": q if mask is None else mask, "out": out,
        "lse": out if lse is None else lse,
        "factor": (width**-0.5 if scale is None else scale) / math.log(2),
        "heads": heads, "shared": heads // key_heads, "rows": rows, "keys": keys, "channels": channels,
        **dict(zip(("v_batch", "v_head", "v_key", "v_channel"), v.stride() if wide else (0,) * 4, strict=True)),
        **dict(zip(("mask_batch", "mask_head", "mask_row", "mask_column"), steps, strict=True)),
        **dict(zip(("out_batch", "out_head", "out_row", "out_column"), out.stride(), strict=True)),
        **(dict.fromkeys(("out_codes", "out_scales", "multiplier"), out) if units is None else units.arguments()),
    }  # fmt: skip
    after = {"BITS": 0, "LEVELS": 0, "FACTOR": 1.0, "ROUNDING": 0, "MULTIPLIER": False}
    constants = {
        "BM": tile.rows, "N": tile.keys, "C": columns, "UNITS": hif4.units(width), "MASK": kind,
        "BOOLEAN": mask is not None and mask.dtype == torch.uint8,
        "CAUSAL": is_causal, "LSE": lse is not None, "BYTES": not wide,
        "JOINT": wide and row_span(width) == 0,
        "EXACT": exact, "STAGES": tile.stages, **(after if units is None else units.constants()),
    }  # fmt: skip
    grid = (-(-rows // tile.rows) * batch * heads, -(-channels // columns))
    return Call(text(), "attend", grid, arguments, constants, tile.warps, tile.stages, exact=True)


def columns_of(channels: int) -> int:
    """Return how many channels of the values a program computes."""
    return max(16, min(CHANNELS, 1 << (channels - 1).bit_length()))


@functools.cache
def text() -> str:
    """Return the file of all kernels."""
    return source.module_text("Attention in 8 bits.", ["quantize_values", "attend"], "")


def of_rows(
    inputs: list[Tensor], block: int, bits: int, span: int = 1, program: str = "", head: int = 0
) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return codes int8 and scales of queries or keys, the units of a head together, and their launches."""
    (codes, scales), launches = quantize.call(inputs, program, None, block, bits, span, head)
    held, more = _bytes(codes, scales)
    return held, [*launches, *more]


def _bytes(codes: Tensor, scales: Tensor) -> tuple[tuple[Tensor, Tensor], list[Call]]:
    """Return codes of 4 or 8 bits as int8 with scales in float32, and their launch, if one is needed."""
    if codes.dtype == torch.int8 or codes.numel() == 0:
        return (codes, scales), []
    wide, launch = expand.expand(codes.view(-1, UNIT // 2), scales.view(-1, 1), "int8")  # a row for each unit
    return (wide[0], wide[1]), [launch]


def of_values(value: Tensor, bits: int) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], list[Call]]:
    """Return codes ``[B, H, tiles, Ev, 64]``, scales and starts of sums ``[B, H, tiles, Ev]``, and their launch.

    With 16 bits they are the values themselves, and need none of the others.
    """
    if bits == 16:
        return (values_in_16_bits(value), None, None), []
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
