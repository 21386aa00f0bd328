"""The kernels of attention called from Python, as those of :mod:`.calls`."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ...format import hif4
from . import build
from .build import instruction_set
from .programs import DTYPES

__all__ = ["at", "attention", "attention_lse", "attention_of_codes", "isa"]

_pointer, _int64, _int32, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Attention(ctypes.Structure):
    """``struct Attention`` of common.h."""

    _fields_ = [
        *((name, _pointer) for name in ("q", "k", "v")),
        *((name, _int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
        *(("mask", _pointer), ("mask_strides", _int64 * 4), ("out", _pointer), ("out_strides", _int64 * 4)),
        ("lse", _pointer),
        *((name, _int64) for name in ("batch", "heads", "key_heads", "rows", "keys", "width", "channels")),
        *(("block", _int64), ("units", _int64), ("norm", _float), ("factor", _float)),
        *(("dtype", _int32), ("causal", _int32), ("bits", _int32)),
        *((name, _pointer) for name in ("key_codes", "key_scales", "value_codes", "value_scales")),
    ]


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
    """See ``tahf4::attention``; NotImplemented for values of 16 bits."""
    if value_bits != 8:
        return NotImplemented
    return _attend(query, key, value, attn_mask, is_causal, scale, bits, None)


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
    """See ``tahf4::attention_lse``."""
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device="cpu")
    return _attend(query, key, value, attn_mask, is_causal, scale, bits, lse), lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    bits: int,
    lse: Tensor | None,
) -> Tensor:
    """Return an attention; ``lse``, minus infinity, is filled with its log-sum-exp."""
    out, keys = _result(query, value.shape[3], key.shape[2]), key.shape[2]
    if not keys or 0 in query.shape[:3] or (not value.shape[3] and lse is None):
        return out.to(query.dtype)
    held = [_rows(x) for x in (query, key, value)]
    bias = _added(attn_mask, (*query.shape[:3], keys)) if attn_mask is not None else None
    struct = _described(held[0], out, key.shape[1], keys, scale, bits)
    struct.k, struct.v, struct.mask, struct.lse = held[1].data_ptr(), held[2].data_ptr(), at(bias), at(lse)
    struct.k_strides, struct.v_strides = ((_int64 * 3)(*x.stride()[:3]) for x in held[1:])
    struct.mask_strides = (_int64 * 4)(*(bias.stride() if bias is not None else ()))
    struct.causal = is_causal
    build.loaded().tahf4_attention(ctypes.byref(struct), isa(), torch.get_num_threads())
    return out.to(query.dtype)


def attention_of_codes(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    scale: float | None = None,
) -> Tensor:
    """See ``tahf4::attention_of_codes``."""
    keys = key_codes.shape[2]
    out = _result(query, value_codes.shape[3], keys)
    if not keys or not out.numel():
        return out.to(query.dtype)
    row = _rows(query)
    struct = _described(row, out, query.shape[1], keys, scale, 8 if key_codes.dtype == torch.int8 else 4)
    held = [x.contiguous() for x in (key_codes, key_scales, value_codes, value_scales)]
    struct.key_codes, struct.key_scales, struct.value_codes, struct.value_scales = (x.data_ptr() for x in held)
    build.loaded().tahf4_attention(ctypes.byref(struct), isa(), torch.get_num_threads())
    return out.to(query.dtype)


def _result(query: Tensor, channels: int, keys: int) -> Tensor:
    """Return an empty result of an attention in float32, or zeros without keys: in memory as SDPA's."""
    if channels == query.shape[3]:
        out = torch.empty_like(query, dtype=torch.float32)
    else:
        out = torch.empty((*query.shape[:3], channels), dtype=torch.float32, device="cpu")
    return out if keys else out.zero_()


def _rows(x: Tensor) -> Tensor:
    """Return rows as they lie, where their channels are contiguous."""
    x = x.resolve_neg()
    return x if x.stride(3) == 1 else x.contiguous()


def _described(
    query: Tensor, out: Tensor, key_heads: int, keys: int, scale: float | None, bits: int
) -> _Attention:
    """Return what does not say where keys and values come from."""
    batch, heads, rows, width = query.shape
    padded = hif4.units(width) * hif4.UNIT
    block = padded & -padded
    return _Attention(
        q=query.data_ptr(), q_strides=(_int64 * 3)(*query.stride()[:3]),
        out=out.data_ptr(), out_strides=(_int64 * 4)(*out.stride()),
        batch=batch, heads=heads, key_heads=key_heads, rows=rows, keys=keys, width=width, channels=out.shape[3],
        block=block, units=padded // hif4.UNIT, norm=1 / math.sqrt(block),
        factor=(width**-0.5 if scale is None else scale) / math.log(2), dtype=DTYPES[query.dtype], bits=bits,
    )  # fmt: skip


def _added(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return what a mask adds to the scores of a softmax to the base of 2."""
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device="cpu")
        values = zeros.masked_fill(mask.logical_not(), -math.inf)
    else:
        values = mask.to(torch.float32)
    added, most = values.mul(1 / math.log(2)), torch.finfo(torch.float32).max
    # A row of the least number of its dtype, which stands for padding, is no row of minus infinity.
    return torch.where(values.isfinite(), added.clamp(-most, most), added).expand(shape)


def at(values: Tensor | None) -> int | None:
    """Return where values begin, or None."""
    return values.data_ptr() if values is not None else None


def isa() -> int:
    """Return the number of the instruction set that kernels use."""
    return build.SETS.index(instruction_set())
