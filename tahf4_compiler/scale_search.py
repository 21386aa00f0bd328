"""HiFloat4 scales chosen by squared error instead of from the maxima: offline, for weights.

:func:`tahf4_compiler.hif4.quantize` takes the scales of a unit from its largest magnitudes, which is what an
activation can afford at run time. A weight is converted once, so :func:`search_scales` tries several level-1
scales for each unit and, for each of them, all exponent bits of its subgroups. The result is an ordinary packed
tensor; nothing that reads it needs to know.

For a fixed level-1 scale the best exponent bits are found exactly without trying all 2**24: the squared error is
a sum over groups of 8, and given the bit of such a group its two groups of 4 are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import hif4
from .errors import FormatError

__all__ = ["CANDIDATES", "search_error", "search_scales"]

CANDIDATES = 3
"""Level-1 scales that are tried on either side of the default one; E6M2 has four codes an octave."""

_CHUNK = 8192  # units at a time: bounds the temporaries to about 30 MB
_LARGEST_CODE = 0xFE


def search_scales(x: Tensor, importance: Tensor | None = None, *, candidates: int = CANDIDATES) -> hif4.Packed:
    """Convert to HiF4 with the scales of least squared error.

    Args:
        x: ``[..., K]`` as for :func:`tahf4_compiler.hif4.quantize`.
        importance: float32 ``[K]``, >= 0: weight of each channel's squared error (the second moment of
            the activation's channel, for a linear's weight), or None for equal weights.
        candidates: level-1 scales tried below and above the default one.

    Returns:
        A packed tensor. In no unit is the (weighted) squared error larger than that of ``hif4.quantize``; units of
        NaN, infinities or zeros are as there.

    Raises:
        FormatError: as ``hif4.quantize``; or ``importance`` is not of shape ``[K]``, negative or not finite.
    """
    default = hif4.quantize(x)
    if importance is not None:
        _check_importance(importance, x.shape[-1])
    values = _units(x)
    codes = default.codes.reshape(-1, hif4.UNIT // 2).clone()
    scales = default.scales.reshape(-1).clone()
    weights = None if importance is None else _units(importance.to(x.device))
    count = hif4.units(x.shape[-1])
    for start in range(0, len(values), _CHUNK):
        part = slice(start, start + _CHUNK)
        mine = None
        if weights is not None:
            mine = weights[torch.arange(start, min(start + _CHUNK, len(values)), device=x.device) % count]
        codes[part], scales[part] = _search(values[part], codes[part], scales[part], mine, candidates)
    return hif4.Packed(codes.reshape(default.codes.shape), scales.reshape(default.scales.shape), default.k)


def search_error(x: Tensor, packed: hif4.Packed, importance: Tensor | None = None) -> Tensor:
    """Return the (weighted) squared error of each unit: float64 ``[..., ceil(K / 64)]``."""
    difference = _units(x).double() - _units(hif4.dequantize(packed, torch.float64)).double()
    squared = difference.square().reshape(*packed.scales.shape, hif4.UNIT)
    if importance is not None:
        squared = squared * _units(importance.to(x.device)).double()
    return squared.sum(-1)


def _check_importance(importance: Tensor, k: int) -> None:
    if tuple(importance.shape) != (k,) or not importance.dtype.is_floating_point:
        raise FormatError(
            f"importance is {importance.dtype} of shape {tuple(importance.shape)}; expected floating point of shape "
            f"({k},), one for each channel"
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise FormatError("importance holds negative or non-finite values; expected a second moment, >= 0")


def _units(x: Tensor) -> Tensor:
    """Return ``[..., K]`` as ``[units, 64]``, padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, hif4.units(x.shape[-1]) * hif4.UNIT - x.shape[-1]))
    return padded.reshape(-1, hif4.UNIT)


def _search(
    values: Tensor, codes: Tensor, scales: Tensor, weights: Tensor | None, candidates: int
) -> tuple[Tensor, Tensor]:
    """Return better codes ``[U, 32]`` and scales ``[U]`` for values ``[U, 64]``, the given ones where none is better."""
    first = scales & 0xFF
    scale = _e6m2(first)
    magnitude = values.double().abs() / scale[:, None]
    usable = (first != 0xFF) & (magnitude.amax(-1) > 0)
    magnitude = torch.where(usable[:, None], magnitude, 0.0).to(torch.float32).unflatten(-1, (8, 2, 4))
    weight = None if weights is None else weights.to(torch.float32).unflatten(-1, (8, 2, 4))
    best = torch.full(first.shape, torch.inf, device=values.device)
    code = first.clone()
    e8 = torch.zeros(*first.shape, 8, dtype=torch.bool, device=values.device)
    e16 = torch.zeros(*first.shape, 8, 2, dtype=torch.bool, device=values.device)
    for offset in range(-candidates, candidates + 1):
        tried = (first + offset).clamp(0, _LARGEST_CODE)
        ratio = (_e6m2(tried) / scale).to(torch.float32)[:, None, None, None]
        errors = [_error(magnitude, ratio * (0.25 * 2.0**e), weight) for e in range(3)]
        low, high = torch.minimum(errors[0], errors[1]).sum(-1), torch.minimum(errors[1], errors[2]).sum(-1)
        cost = torch.minimum(low, high).sum(-1)
        better = cost < best
        chosen = high < low
        fine = torch.where(chosen[..., None], errors[2] < errors[1], errors[1] < errors[0])
        best = torch.where(better, cost, best)
        code = torch.where(better, tried, code)
        e8 = torch.where(better[:, None], chosen, e8)
        e16 = torch.where(better[:, None, None], fine, e16)
    found = _encode(values, code, e8, e16)
    worse = _exact(values, *found, weights) >= _exact(values, codes, scales, weights)
    keep = worse | ~usable
    return torch.where(keep[:, None], codes, found[0]), torch.where(keep, scales, found[1])


def _error(magnitude: Tensor, step: Tensor, weight: Tensor | None) -> Tensor:
    """Return the squared error of each group of 4 for steps that broadcast: ``[U, 8, 2]``."""
    rounded = torch.floor(magnitude / step + 0.5).clamp_(max=7.0)
    squared = (rounded * step - magnitude).square()
    return (squared if weight is None else squared * weight).sum(-1)


def _e6m2(code: Tensor) -> Tensor:
    return (1.0 + (code & 3).double() / 4) * torch.exp2((code >> 2).double() - 48)


def _encode(values: Tensor, code: Tensor, e8: Tensor, e16: Tensor) -> tuple[Tensor, Tensor]:
    step = _e6m2(code)[:, None, None] * 0.25 * torch.exp2(e8[..., None].double() + e16.double())
    magnitude = values.double().abs().nan_to_num(0.0, 0.0, 0.0).unflatten(-1, (8, 2, 4))
    elements = torch.floor(magnitude / step[..., None] + 0.5).clamp(max=7.0).to(torch.int32).flatten(1)
    # The sign of a value that rounds to zero stays, as in hif4.quantize.
    elements = elements + torch.signbit(values).to(torch.int32) * 8
    packed = (elements[:, 0::2] + elements[:, 1::2] * 16).to(torch.uint8)
    eighths = (e8.to(torch.int32) << torch.arange(8, 16, device=code.device, dtype=torch.int32)).sum(-1)
    shifts = torch.arange(16, 32, device=code.device, dtype=torch.int32)
    quarters = (e16.flatten(1).to(torch.int32) << shifts).sum(-1)
    return packed, (code + eighths + quarters).to(torch.int32)


def _exact(values: Tensor, codes: Tensor, scales: Tensor, weights: Tensor | None) -> Tensor:
    """Return the squared error in float64: ``[U]``; NaN where a unit holds one."""
    decoded = hif4.dequantize(hif4.Packed(codes, scales[:, None], hif4.UNIT), torch.float64)
    squared = (decoded - values.double()).square()
    return (squared if weights is None else squared * weights.double()).sum(-1)
