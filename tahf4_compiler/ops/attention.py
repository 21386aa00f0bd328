"""Attention in 8 bits: ``torch.ops.tahf4.attention`` in the place of ``aten.scaled_dot_product_attention``.

Queries and keys are rotated by a Hadamard matrix, which ``q k^T`` does not see, and have 8 bits with one scale for each
64 channels (:mod:`tahf4_compiler.format.int8`). Or they are in HiF4: then their elements are whole quarters of at most
28 times the level-1 scale of their unit, which the same products of bytes multiply. Values have 8 bits with one scale
for each channel and 64 tokens. The softmax runs in float32, over 64 keys at a time. Their probabilities, divided by the
largest of the 64, are unsigned bytes. All products of bytes are summed exactly.

Values may have 16 bits. Then a row of queries or keys has one scale, where one rotation spreads all its channels, and
probabilities are rounded to 16 bits, relative to the largest score so far. What they are divided by is their sum before
that rounding, as in flash attention.

Each row of queries is on its own, and a block of keys begins at a multiple of 64. So neither the other rows nor the
number of threads change a bit. With values in 16 bits PyTorch's product of some rows may add in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import FormatError
from ..format import hif4, int8
from ..format.transforms import hadamard_block, transform
from .define import operator
from .reference import integers, quantize

__all__ = [
    "MOST_CHANNELS",
    "as_bytes",
    "attend_units",
    "attention",
    "attention_lse",
    "check_attention",
    "empty_lse",
    "empty_result",
    "row_span",
    "values_in_16_bits",
]

MOST_CHANNELS = 1024
"""Of a head: the widest rotation."""

_LOG2_255 = 7.994353436858858
_LEAST_EXPONENT = -126.0
# 2**r for |r| <= 1/2, ascending, with a relative error of 3e-6; 2**0 is 1.
_POLYNOMIAL = (1.0, 0.69312419, 0.24024099, 0.05590642, 0.00958285)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@operator
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
    value_bits: int = 8,
) -> Tensor:
    """Compute scaled dot product attention with operands of 8 bits.

    Args:
        query: ``[B, H, L, E]``, float32, bfloat16 or float16; E is at most 1024.
        key: ``[B, H, S, E]`` of the same dtype; with ``enable_gqa`` ``[B, H / n, S, E]``.
        value: ``[B, H, S, Ev]``, likewise.
        attn_mask: what broadcasts to ``[B, H, L, S]``: boolean (False leaves a key out), or added to the scores.
        is_causal: whether query ``i`` sees keys up to ``i`` alone.
        scale: of the scores; ``E ** -0.5`` if None.
        enable_gqa: whether ``n`` heads of queries may share a head of keys and values.
        bits: of queries and keys: 8 (int8), or 4 (HiF4).
        value_bits: of values and probabilities: 8, or 16. Then they have the dtype of the value, bfloat16 for float32,
            and are summed in float32.

    Returns:
        ``[B, H, L, Ev]`` of the dtype of the query. It lies in memory as the query does where Ev is E, as that of SDPA
        does. A row that sees no key is 0. A NaN goes where SDPA lets it go; an infinity becomes NaN. One in a value
        makes its channel NaN in every row that sees one of the same 64 keys; in 16 bits it may stay an infinity.

    Raises:
        FormatError: dtypes or shapes do not fit each other, or the bits are others.
    """
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits, value_bits)
    if value_bits == 16:
        return _attend_16_bits(query, key, value, attn_mask, is_causal, scale, bits)
    return _attend(query, key, value, attn_mask, is_causal, scale, bits)[0]


@operator
def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    """Compute ``tahf4::attention``, and what merges it with that of other keys, as ring attention does.

    Args:
        query: and the others, as for ``tahf4::attention``.

    Returns:
        Its result, and the logarithm of the sum of the exponentials of the scores of each row, to the base of e:
        float32 ``[B, H, L]``. It is the sum of the rounded probabilities that the result is divided by. Minus infinity
        for a row that sees no key; NaN for one whose result is NaN by its scores.

    Raises:
        FormatError: as ``tahf4::attention``.
    """
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits)
    return _attend(query, key, value, attn_mask, is_causal, scale, bits)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    shared = query.shape[1] // max(1, key.shape[1])
    block = hadamard_block(query.shape[-1], MOST_CHANNELS)
    k_codes, k_scales = (part.repeat_interleave(shared, 1) for part in as_bytes(*quantize(key, None, block, bits)))
    v_units = as_bytes(*int8.quantize(value.transpose(-1, -2)))
    v_codes, v_scales = (part.repeat_interleave(shared, 1) for part in v_units)
    return attend_units(query, (k_codes, k_scales), (v_codes, v_scales), attn_mask, is_causal, scale, bits)


def _attend_16_bits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    bits: int,
) -> Tensor:
    shared, held = query.shape[1] // max(1, key.shape[1]), values_in_16_bits(value)
    k_codes, k_scales = (part.repeat_interleave(shared, 1) for part in _row_units(key, bits))
    q_units = _row_units(query, bits)
    v = held.to(torch.float32).repeat_interleave(shared, 1)
    most, total, out = _nothing(query, v.shape[3])
    with torch.autocast(query.device.type, enabled=False):  # its cast would lose what is exact
        for keys, scores in _tiles(q_units, (k_codes, k_scales), attn_mask, is_causal, _factor(query, scale)):
            tile_most = _largest(scores)
            new_most = torch.maximum(most, tile_most)
            base = torch.where(new_most == -torch.inf, 0.0, new_most)
            weights, before = (scores - base).exp2(), (most - base).exp2()
            sums = torch.matmul(weights.to(held.dtype).to(torch.float32), v[:, :, keys])
            out = torch.where(tile_most != -torch.inf, out * before + sums, out)
            total = total * before + weights.sum(-1, keepdim=True)
            most = new_most
    return empty_result(query, value).copy_(torch.where(total == 0, 0.0, out / total))


def values_in_16_bits(value: Tensor) -> Tensor:
    """Return values as an attention with values of 16 bits reads them: bfloat16 in the place of float32."""
    return value.to(torch.bfloat16) if value.dtype == torch.float32 else value


def row_span(width: int) -> int:
    """Return how many units of a head of queries or keys share a scale beside values of 16 bits; 0 for all.

    All do where one rotation spreads their channels over each other.
    """
    return 0 if hadamard_block(width, MOST_CHANNELS) == hif4.units(width) * hif4.UNIT else 1


def _row_units(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return queries or keys as :func:`as_bytes` gives them, rotated, with one scale a row where it can have one."""
    block, span = hadamard_block(x.shape[-1], MOST_CHANNELS), row_span(x.shape[-1])
    units = int8.quantize(transform(x, None, block), span) if bits == 8 else quantize(x, None, block, bits, span)
    return as_bytes(*units)


def attend_units(
    query: Tensor,
    k_units: tuple[Tensor, Tensor],
    v_units: tuple[Tensor, Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Compute an attention, and its log-sum-exp, from keys and values that are quantized.

    Args:
        query: as for ``tahf4::attention``.
        k_units: of as many heads as the query, as :func:`as_bytes` gives them: codes ``[B, H, S, units, 64]``.
        v_units: likewise, ``[B, H, Ev, tiles, 64]``; the last tile may be filled up.
        attn_mask: and the following, as for ``tahf4::attention``.
    """
    v_codes, v_scales = v_units
    q_units = as_bytes(*quantize(query, None, hadamard_block(query.shape[-1], MOST_CHANNELS), bits))
    most, total, out = _nothing(query, v_codes.shape[2])
    with torch.autocast(query.device.type, enabled=False):  # its cast would lose what is exact
        for keys, scores in _tiles(q_units, k_units, attn_mask, is_causal, _factor(query, scale)):
            tile = keys.start // hif4.UNIT
            tile_most = _largest(scores)
            new_most = torch.maximum(most, tile_most)
            codes = _exp2((scores - tile_most) + _LOG2_255).nan_to_num(0).round().clamp(max=255)
            columns = v_codes[..., tile, : codes.shape[-1]]
            sums = torch.matmul(codes, columns.transpose(-1, -2)) * v_scales[..., tile][..., None, :]
            before, now = _exp2(most - new_most), _exp2(tile_most - new_most)
            # Rows that see none of these keys stay as they are, whatever the values are.
            seen = tile_most != -torch.inf
            out = torch.where(seen, out * before + sums * now, out)
            total = torch.where(seen, total * before + codes.sum(-1, keepdim=True) * now, total)
            most = torch.where(seen, new_most, most)
    out = torch.where(total == 0, 0.0, out / total)
    # The largest probability is 255. In float64, since logarithms round otherwise elsewhere.
    lse = most.to(torch.float64) * math.log(2) + (total.to(torch.float64) / 255).log()
    return empty_result(query, out).copy_(out), lse.squeeze(-1).to(torch.float32)


def _factor(query: Tensor, scale: float | None) -> float:
    """Return what scores are multiplied by, for a softmax to the base of 2."""
    return (query.shape[-1] ** -0.5 if scale is None else scale) / math.log(2)


def _nothing(query: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what rows have before the first key: the largest score, the sum of probabilities, and that of values."""
    most = torch.full((*query.shape[:3], 1), -torch.inf, dtype=torch.float32, device=query.device)
    return most, torch.zeros_like(most), most.new_zeros((*query.shape[:3], channels))


def _tiles(
    q_units: tuple[Tensor, Tensor],
    k_units: tuple[Tensor, Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
    factor: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield 64 keys at a time, and their scores ``[B, H, L, keys]``."""
    (q_codes, q_scales), (k_codes, k_scales) = q_units, k_units
    count, device = k_codes.shape[2], q_codes.device
    tokens = torch.arange(q_codes.shape[2], dtype=torch.int64, device=device)[:, None]
    added = _added(attn_mask, (*q_codes.shape[:3], count))
    for first in range(0, count, hif4.UNIT):
        keys = slice(first, min(count, first + hif4.UNIT))
        scores = _scores(q_codes, q_scales * factor, k_codes[:, :, keys], k_scales[:, :, keys])
        if added is not None:
            scores = scores + added[..., keys]
        if is_causal:
            seen = torch.arange(keys.start, keys.stop, dtype=torch.int64, device=device) <= tokens
            scores = torch.where(seen, scores, -torch.inf)
        yield keys, scores


def _largest(scores: Tensor) -> Tensor:
    """Return the largest score of each row; NaN if it is infinity."""
    most = scores.amax(-1, keepdim=True)
    return torch.where(most == torch.inf, torch.nan, most)


@torch.library.register_fake("tahf4::attention")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
    value_bits: int = 8,
) -> Tensor:
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits, value_bits)
    return empty_result(query, value)


@torch.library.register_fake("tahf4::attention_lse")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bits: int = 8,
) -> tuple[Tensor, Tensor]:
    check_attention(query, key, value, attn_mask, is_causal, enable_gqa, bits)
    return empty_result(query, value), empty_lse(query)


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    bits: int = 8,
    value_bits: int = 8,
) -> None:
    """Raise :class:`FormatError` unless the arguments of ``tahf4::attention`` fit each other."""
    if value_bits not in (8, 16):
        raise FormatError(f"attention got values of {value_bits!r} bits; expected 8, or 16")
    if bits not in (4, 8):
        raise FormatError(f"attention got queries and keys of {bits!r} bits; expected 8 (int8) or 4 (HiF4)")
    shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise FormatError(f"attention got shapes {shapes}; expected four axes each, [batch, heads, tokens, channels]")
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        found = ", ".join(str(x.dtype) for x in (query, key, value))
        raise FormatError(f"attention got {found}; expected one dtype of float32, bfloat16 and float16")
    batch, heads, rows, channels = query.shape
    fits = key.shape[0] == value.shape[0] == batch and key.shape[1:3] == value.shape[1:3] and key.shape[3] == channels
    if not fits or (key.shape[1] != heads and not (enable_gqa and key.shape[1] and heads % key.shape[1] == 0)):
        raise FormatError(
            f"attention got shapes {shapes}; expected [B, H, L, E], [B, H, S, E] and [B, H, S, Ev], where the heads of "
            "keys and values may divide those of queries with enable_gqa=True"
        )
    if not 0 < channels <= MOST_CHANNELS:
        raise FormatError(f"attention got heads of {channels} channels; expected 1 to {MOST_CHANNELS}")
    if attn_mask is None:
        return
    if is_causal:
        raise FormatError("attention got a mask and is_causal=True; leave one of them out")
    wanted = (batch, heads, rows, key.shape[2])
    sizes = zip(attn_mask.shape[::-1], wanted[::-1], strict=False)
    if attn_mask.dim() > 4 or not all(a == 1 or a == b for a, b in sizes):
        shape = tuple(attn_mask.shape)
        raise FormatError(f"attention got a mask of shape {shape}; expected what broadcasts to {wanted}")
    if attn_mask.dtype not in (torch.bool, *_DTYPES):
        raise FormatError(f"attention got a mask of {attn_mask.dtype}; expected a boolean or a floating one")


def as_bytes(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers float32 ``[..., units, 64]`` and their scales float32 ``[..., units]``.

    Args:
        codes: of an activation in 4 or 8 bits, as ``tahf4::quantize`` gives them.
        scales: likewise.
    """
    if codes.dtype == torch.uint8:
        codes, scales = integers(codes, scales), hif4.level1_value(scales) * 0.25
    return codes.to(torch.float32).unflatten(-1, (scales.shape[-1], hif4.UNIT)), scales


def _scores(q_codes: Tensor, q_factors: Tensor, k_codes: Tensor, k_scales: Tensor) -> Tensor:
    """Return the scores of some keys, for a softmax to the base of 2: ``[B, H, L, keys]``."""
    found = None
    for unit in range(q_factors.shape[-1]):
        dots = torch.matmul(q_codes[..., unit, :], k_codes[..., unit, :].transpose(-1, -2))
        part = dots * k_scales[..., unit][..., None, :] * q_factors[..., unit][..., None]
        found = part if found is None else found + part
    assert found is not None, "a head has channels"
    return found


def _added(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return what a mask adds to the scores: float32 that is expanded to their shape."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, -torch.inf)
    mask = mask.to(torch.float32)
    added, most = mask * (1 / math.log(2)), torch.finfo(torch.float32).max
    # A row of the least number of its dtype, which stands for padding, is no row of minus infinity.
    return torch.where(mask.isfinite(), added.clamp(-most, most), added).expand(shape)


def _exp2(x: Tensor) -> Tensor:
    """Return ``2 ** x``, at least ``2 ** -126``, by operations that round alike everywhere."""
    x = torch.where(x < _LEAST_EXPONENT, _LEAST_EXPONENT, x)
    whole = x.round()
    rest = x - whole
    found = torch.full_like(x, _POLYNOMIAL[-1])
    for coefficient in reversed(_POLYNOMIAL[:-1]):
        found = found * rest + coefficient
    return found * ((whole.nan_to_num(0).to(torch.int32) + 127) << 23).view(torch.float32)


def empty_result(query: Tensor, value: Tensor) -> Tensor:
    """Return an empty result of an attention: in memory as the query where both have as many channels."""
    if query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:3], value.shape[-1]))


def empty_lse(query: Tensor) -> Tensor:
    """Return an empty log-sum-exp of an attention."""
    return query.new_empty(query.shape[:3], dtype=torch.float32)
