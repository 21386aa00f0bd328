"""Attention in 8 bits over keys and values that come quantized, as ranks exchange them.

Keys are quantized token by token. A scale of values is for 64 tokens, which may lie on several ranks: who holds a part
of them needs the largest magnitude of all (:func:`value_maxima`) before it rounds its own (:func:`value_codes`). So
the result has the bits of ``tahf4::attention`` with all keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..format import hif4, int8
from ..format.transforms import hadamard_block
from . import attention_quantize  # noqa: F401  (it defines an operator)
from .attention import MOST_CHANNELS, as_bytes, attend_units, empty_result
from .define import operator
from .reference import activation_bits

__all__ = ["ATTENTIONS", "attention_of_codes", "check_codes", "key_codes", "value_codes", "value_maxima"]


@operator
def attention_of_codes(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Compute ``tahf4::attention`` from quantized keys and values.

    Args:
        query: ``[B, H, L, E]``, float32, bfloat16 or float16; it is quantized with as many bits as the keys have.
        key_codes: of :func:`key_codes`: int8 ``[B, H, S, ceil(E / 64) * 64]``, or uint8 of half as many for HiF4.
        value_codes: of :func:`value_codes`: int8 ``[B, H, S, Ev]``.
        key_scales: of :func:`key_codes`: ``[B, H, S, ceil(E / 64)]``, float32, or int32 for HiF4.
        value_scales: of :func:`value_codes`: float32 ``[B, H, ceil(S / 64), Ev]``.
        scale: of the scores; ``E ** -0.5`` if None.

    Returns:
        ``[B, H, L, Ev]`` of the dtype of the query, with the bits of ``tahf4::attention``.

    Raises:
        FormatError: dtypes or shapes do not fit each other.
    """
    check_codes(query, key_codes, value_codes, key_scales, value_scales)
    keys = key_codes.shape[2]
    filled = torch.nn.functional.pad(value_codes, (0, 0, 0, -keys % hif4.UNIT))
    v_units = as_bytes(filled.transpose(-1, -2), value_scales.transpose(-1, -2))
    bits = activation_bits(key_codes)
    return attend_units(query, as_bytes(key_codes, key_scales), v_units, None, False, scale, bits)[0]


ATTENTIONS = (
    torch.ops.tahf4.attention.default,
    torch.ops.tahf4.attention_lse.default,
    torch.ops.tahf4.attention_of_codes.default,
    torch.ops.tahf4.attention_quantize.default,
)
"""The operators that compute attention."""


@torch.library.register_fake("tahf4::attention_of_codes")
def _(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    scale: float | None = None,
) -> Tensor:
    check_codes(query, key_codes, value_codes, key_scales, value_scales)
    return empty_result(query, value_codes)


def check_codes(
    query: Tensor, key_codes: Tensor, value_codes: Tensor, key_scales: Tensor, value_scales: Tensor
) -> None:
    """Raise :class:`FormatError` unless the arguments of ``tahf4::attention_of_codes`` fit each other."""
    given = (query, key_codes, value_codes, key_scales, value_scales)
    found = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in given)
    kinds = (torch.int8, torch.float32) if key_codes.dtype == torch.int8 else (torch.uint8, torch.int32)
    fits = all(x.dim() == 4 for x in given) and 0 < query.shape[-1] <= MOST_CHANNELS
    fits = fits and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fits = fits and (key_codes.dtype, key_scales.dtype) == kinds
    fits = fits and (value_codes.dtype, value_scales.dtype) == (torch.int8, torch.float32)
    if fits:
        (batch, heads, _, width), keys = query.shape, key_codes.shape[2]
        count, elements = hif4.units(width), hif4.UNIT if kinds[0] == torch.int8 else hif4.UNIT // 2
        fits = key_codes.shape == (batch, heads, keys, count * elements)
        fits = fits and key_scales.shape == (batch, heads, keys, count)
        fits = fits and value_codes.shape[:3] == (batch, heads, keys)
        fits = fits and value_scales.shape == (batch, heads, hif4.units(keys), value_codes.shape[3])
    if not fits:
        raise FormatError(
            f"attention_of_codes got {found}; expected a floating query [B, H, L, E] of 1 to {MOST_CHANNELS} channels, "
            "codes of keys [B, H, S, ..] and values [B, H, S, Ev], and their scales, as key_codes and value_codes make "
            "them"
        )


def key_codes(key: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of keys ``[..., E]``, rotated, in 8 bits or 4 (HiF4).

    Raises:
        FormatError: other bits.
    """
    int8.check_bits(bits, quantized=True)
    codes, scales = torch.ops.tahf4.quantize(key, None, hadamard_block(key.shape[-1], MOST_CHANNELS), bits)
    return codes, scales


def value_maxima(value: Tensor, first: int, tiles: int) -> Tensor:
    """Return the largest magnitudes of a part of the values, for each 64 tokens of all: float32 ``[B, tiles, H, Ev]``.

    Args:
        value: ``[B, tokens, H, Ev]``: those from token ``first`` of all on.
        first: see ``value``.
        tiles: of 64 tokens, of all.

    Returns:
        0 where the part has none of a tile's tokens, and infinity where one is not finite: so that the largest of all
        parts is that of the tile.

    Raises:
        FormatError: values of other axes or dtypes, or tokens that are not among those of all tiles.
    """
    _check_part("value_maxima", value, first, tiles)
    start = first // hif4.UNIT
    found = _by_tiles(value.to(torch.float32).abs(), first).amax(2)
    found = torch.where(found.isfinite(), found, torch.inf)
    return torch.nn.functional.pad(found, (0, 0, 0, 0, start, tiles - start - found.shape[1]))


def value_codes(value: Tensor, first: int, most: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of a part of the values, int8 ``[B, tokens, H, Ev]``, and scales of all, float32 as ``most``.

    Args:
        value: as for :func:`value_maxima`.
        first: likewise.
        most: the largest of :func:`value_maxima` of all parts.

    Raises:
        FormatError: as :func:`value_maxima`, or maxima of another dtype or shape.
    """
    alike = most.dim() == 4 and most.shape[:1] + most.shape[2:] == value.shape[:1] + value.shape[2:]
    if most.dtype != torch.float32 or not alike:
        raise FormatError(
            f"value_codes got values {tuple(value.shape)} and maxima {most.dtype} {tuple(most.shape)}; expected "
            "float32 [B, tiles, H, Ev] for values [B, tokens, H, Ev], as value_maxima gives them"
        )
    _check_part("value_codes", value, first, most.shape[1])
    start, offset = first // hif4.UNIT, first % hif4.UNIT
    tiles = _by_tiles(value.to(torch.float32), first)
    codes = int8.by_maxima(tiles, most[:, start : start + tiles.shape[1], None])
    return codes.flatten(1, 2)[:, offset : offset + value.shape[1]], int8.scales_of(most)


def _check_part(name: str, value: Tensor, first: int, tiles: int) -> None:
    """Raise :class:`FormatError` unless a part of the values is one of some tiles of 64 tokens."""
    if value.dim() != 4 or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise FormatError(
            f"{name} got values {value.dtype} {tuple(value.shape)}; expected [B, tokens, H, Ev] of float32, bfloat16 "
            "or float16"
        )
    if first < 0 or first + value.shape[1] > tiles * hif4.UNIT:
        raise FormatError(
            f"{name} got {value.shape[1]} tokens from token {first} on, and {tiles} tiles of {hif4.UNIT} tokens; "
            "expected tokens of these tiles, which are those of all parts"
        )


def _by_tiles(value: Tensor, first: int) -> Tensor:
    """Return values from a token of all on by tiles of 64: ``[B, tiles, 64, H, Ev]``, filled up with zeros."""
    before = first % hif4.UNIT
    after = -(before + value.shape[1]) % hif4.UNIT
    return torch.nn.functional.pad(value, (0, 0, 0, 0, before, after)).unflatten(1, (-1, hif4.UNIT))
