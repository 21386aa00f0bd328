"""HiFloat4 scales chosen by squared error instead of from the maxima: offline, for weights.

:func:`tahf4_compiler.format.hif4.quantize` takes the scales of a unit from its largest magnitudes, which is what an
activation can afford at run time. A weight is converted once, so :func:`search_scales` tries several level-1
scales for each unit and, for each of them, all exponent bits of its subgroups. The result is an ordinary packed
tensor; nothing that reads it needs to know.

For a fixed level-1 scale the best exponent bits are found exactly without trying all 2**24: the squared error is
a sum over groups of 8, and given the bit of such a group its two groups of 4 are independent. The step of an
element is ``scale * 2**(e8 + e16) / 4`` and E6M2 has four codes an octave, so the error of a group of 4 depends on
``code + 4 * (e8 + e16)`` alone: neighbouring scales share most of the work.

Sources: the format as in :mod:`tahf4_compiler.format.hif4`. Scales and sub-exponents chosen by squared error are
published for weights; how they are searched here is this project's. Weighting a channel by its activation's second
moment minimizes the mean squared error of a linear's output where the channels are uncorrelated.

Where units share a level-1 scale (a span), the scale is that of the least sum of their errors; the exponent bits are
those of each unit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import FormatError
from ..plugins import host
from . import hif4

__all__ = ["CANDIDATES", "MAX_CANDIDATES", "search_error", "search_exponents", "search_scales"]

CANDIDATES = 4
"""Level-1 scales that are tried on either side of the default one.

Squared error relative to ``hif4.quantize`` for 0, 1, 2, 3, 4 and 8 of them, 2**18 values: N(0, 1) .985, .925, .899,
.887, .887, .887; Laplace .986, .924, .903, .897, .896, .896. Above +4 nothing was ever chosen, below -1 only with an
importance that differs strongly between the channels of a unit.
"""

MAX_CANDIDATES = 8
"""Largest number that can be asked for: two octaves on either side."""

_OCTAVE = 4  # E6M2 codes
_LARGEST_CODE = 0xFE
_NAN_CODE = 0xFF
_BELOW = MAX_CANDIDATES  # first entry of the table of steps, counted down from code 0
_ABOVE = MAX_CANDIDATES + 2 * _OCTAVE

_CHUNK = 512  # units at a time on a CPU: the temporaries (about 2 MB) stay in its cache
_CHUNK_ELSEWHERE = 1 << 14  # about 80 MB

# Float64 sums of 64 errors are wrong by less than 2**-45 of their value. A searched unit must be better by more
# than that, so that it is no worse in exact arithmetic either.
_BETTER = 1.0 - 2.0**-40


def search_scales(
    x: Tensor,
    importance: Tensor | None = None,
    *,
    candidates: int = CANDIDATES,
    span: int | str = 1,
    rounding: str = "half_away",
) -> hif4.Packed:
    """Convert to HiF4 with the scales of least squared error.

    All arithmetic is float64 on values rounded to float32, in an order that does not depend on how the work is
    cut. Elements are rounded to the nearest multiple of their true step, ties away from zero.

    Args:
        x: ``[..., K]``, dtypes as for :func:`tahf4_compiler.format.hif4.quantize`. Any leading dimensions, any strides.
        importance: floating point ``[K]``, finite, >= 0: factor of each channel's squared error (the second moment
            of the activation's channel, for a linear's weight), or None for equal factors.
        candidates: level-1 scales (E6M2 codes) tried below and above the default one, 0 to ``MAX_CANDIDATES``;
            with 0 only the exponent bits are searched.
        span: as for ``hif4.quantize``. What follows about units then counts for spans.
        rounding: as for ``hif4.quantize``. With ``"half_even"`` and ``"bfloat16_half_away"`` the scales are those of
            ``"half_away"``, and elements are rounded as ``hif4.quantize`` rounds them. ``"least_error"`` changes
            nothing: these scales are searched anyway.

    Returns:
        A packed tensor on the device of ``x``. In no unit is the (weighted) squared error larger than that of
        ``hif4.quantize``; where it is not smaller, the unit is as there. So are units that hold a NaN or an
        infinity, units of zeros and units of zero importance. A group of zero importance in another unit takes the
        exponents of its least plain squared error.

    Raises:
        FormatError: as ``hif4.quantize``; ``importance`` is not floating point of shape ``[K]`` or holds
            a negative or non-finite value; ``candidates`` is no integer from 0 to ``MAX_CANDIDATES``.
    """
    if isinstance(candidates, bool) or not isinstance(candidates, int) or not 0 <= candidates <= MAX_CANDIDATES:
        raise FormatError(
            f"candidates is {candidates!r}; expected an integer from 0 to {MAX_CANDIDATES}, the level-1 scales tried "
            "on either side of the default one"
        )
    step = hif4.check_span(span)
    hif4.check_rounding(rounding)
    hif4.check_alone(step, rounding)
    if not isinstance(x, Tensor) or x.dim() == 0 or x.numel() == 0 or not x.dtype.is_floating_point:
        if isinstance(x, Tensor) and x.dim() > 0:
            _unit_weights(importance, x)
        return hif4.quantize(x)  # says what is wrong, or has nothing to convert
    with torch.no_grad():
        weights = _unit_weights(importance, x)
        if (fast := host.find("search", x)) is not None:
            found: hif4.Packed = fast(x, None if weights is None else weights.t().flatten(), candidates, step)
        else:
            found = _searched(x, weights, candidates, step)
        return found if rounding in ("half_away", "least_error") else _rounded(x, found, importance, rounding, step)


def _searched(x: Tensor, weights: Tensor | None, candidates: int, step: int) -> hif4.Packed:
    count = hif4.units(x.shape[-1])
    codes = torch.empty((*x.shape[:-1], count * (hif4.UNIT // 2)), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], count), dtype=torch.int32, device=x.device)
    steps = _steps(x.device)
    for (values, to_codes, to_scales), first in _blocks(x.detach(), codes, scales, span=step):
        mine = _block_weights(weights, first, to_scales)
        part = _search(values, mine, candidates, steps, step)
        to_codes.copy_(part.codes)
        to_scales.copy_(part.scales)
    return hif4.Packed(codes, scales, x.shape[-1])


def _rounded(x: Tensor, found: hif4.Packed, importance: Tensor | None, rounding: str, span: int) -> hif4.Packed:
    """Round the elements of what was searched in another way, where that is better than ``hif4.quantize`` still."""
    x = x.detach()
    default = hif4.quantize(x, rounding=rounding, span=span or "row")
    found = hif4.Packed(hif4.codes_for(x, found.scales, rounding), found.scales, found.k)
    count = found.scales.shape[-1]
    mine, other = (_joint(search_error(x, p, importance).flatten(), count, span) for p in (found, default))
    better = (mine < other).view(found.scales.shape)
    codes = torch.where(better.repeat_interleave(hif4.UNIT // 2, -1), found.codes, default.codes)
    return hif4.Packed(codes, torch.where(better, found.scales, default.scales), found.k)


def search_exponents(x: Tensor, codes: Tensor, importance: Tensor) -> Tensor:
    """Return the scales of units whose level-1 scales are given: the exponent bits of least squared error.

    Args:
        x: float32 ``[N, 64]``, finite.
        codes: int32 ``[N]``, level-1 scales.
        importance: ``[64]``, as for :func:`search_scales`.

    Returns:
        int32 ``[N]``, see :class:`tahf4_compiler.format.hif4.Packed`.
    """
    weights = _unit_weights(importance, x)
    assert weights is not None
    weights = weights.expand(-1, len(x))
    errors = _Errors(_columns(x).abs(), weights, codes.to(torch.int64), _steps(x.device))
    return _scales_of(codes, *_exponents(errors, errors.code))


def search_error(x: Tensor, packed: hif4.Packed, importance: Tensor | None = None) -> Tensor:
    """Return the (weighted) squared error of each unit.

    Args:
        x: ``[..., K]``, the tensor that was converted (its values rounded to float32).
        packed: any HiF4 encoding of a tensor of that shape.
        importance: as for :func:`search_scales`.

    Returns:
        float64 ``[..., ceil(K / 64)]``; NaN for a unit with a NaN scale.

    Raises:
        FormatError: ``packed`` does not fit ``x`` or itself; ``importance`` as for :func:`search_scales`.
    """
    hif4.check_packed(packed)
    if packed.k != x.shape[-1] or packed.scales.shape[:-1] != x.shape[:-1]:
        raise FormatError(
            f"search_error got a tensor of shape {tuple(x.shape)} and a packed one of shape "
            f"{(*packed.scales.shape[:-1], packed.k)}; expected the same shape"
        )
    errors = torch.empty(packed.scales.shape, dtype=torch.float64, device=x.device)
    if errors.numel() == 0:
        return errors
    with torch.no_grad():
        weights = _unit_weights(importance, x)
        for (values, codes, scales, out), first in _blocks(x.detach(), packed.codes, packed.scales, errors):
            exact = _columns(_float32_units(values))
            found = _default_error(exact, hif4.Packed(codes, scales, 0), _block_weights(weights, first, scales))
            out.copy_(found.view(out.shape))
    return errors


def _unit_weights(importance: Tensor | None, x: Tensor) -> Tensor | None:
    """Check the importance ``[K]`` and return it as float64 ``[64, units]``, zeros for the padding."""
    if importance is None:
        return None
    k = x.shape[-1]
    if not isinstance(importance, Tensor) or tuple(importance.shape) != (k,) or not importance.is_floating_point():
        what = type(importance).__name__
        if isinstance(importance, Tensor):
            what = f"{importance.dtype} of shape {tuple(importance.shape)}"
        raise FormatError(
            f"importance is {what}; expected floating point of shape ({k},), one factor for each channel of the last "
            "axis: give the second moment of each input channel"
        )
    importance = importance.detach()
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        wrong = int((~(torch.isfinite(importance) & (importance >= 0))).nonzero()[0])
        raise FormatError(
            f"importance[{wrong}] is {float(importance[wrong])}; expected finite values >= 0, such as second moments"
        )
    padded = torch.nn.functional.pad(importance.to(x.device, torch.float64), (0, hif4.units(k) * hif4.UNIT - k))
    return padded.unflatten(0, (-1, hif4.UNIT)).t().contiguous()


def _block_weights(weights: Tensor | None, first: int, scales: Tensor) -> Tensor | None:
    """Return the weights of a block's units, ``[64, rows * units]``; ``scales [rows, units]`` tells its size."""
    if weights is None:
        return None
    return weights[:, first : first + scales.shape[1]].repeat(1, scales.shape[0])


def _blocks(x: Tensor, *parts: Tensor, span: int = 1) -> Iterator[tuple[list[Tensor], int]]:
    """Cut ``[..., K]`` and what belongs to it, ``[..., units * n]``, into blocks of a bounded number of units.

    A span stays whole; 0 stands for a row.

    Yields views ``[rows, columns]`` of each, and the first unit's place in its row.
    """
    tensors = (x, *parts)
    try:
        flat = [t.view(-1, t.shape[-1]) for t in tensors]
    except RuntimeError:  # strides that no view can join: one leading index at a time, instead of a copy of all
        for slices in zip(*(t.unbind(0) for t in tensors), strict=True):
            yield from _blocks(*slices, span=span)
        return
    count = hif4.units(x.shape[-1])
    limit = _CHUNK if x.device.type == "cpu" else _CHUNK_ELSEWHERE
    columns = min(count, max(span, limit // span * span)) if span else count
    rows = max(1, limit // columns)
    widths = [hif4.UNIT, *(t.shape[-1] // count for t in parts)]
    for row in range(0, flat[0].shape[0], rows):
        for first in range(0, count, columns):
            block = [
                t[row : row + rows, first * width : (first + columns) * width]
                for t, width in zip(flat, widths, strict=True)
            ]
            yield block, first


def _float32_units(x: Tensor) -> Tensor:
    """Return ``[rows, K]`` as float32 ``[rows * units, 64]``, padded with zeros."""
    return hif4.as_units(hif4.to_float32(x)).reshape(-1, hif4.UNIT)


def _columns(values: Tensor) -> Tensor:
    """Return ``[U, 64]`` as float64 ``[64, U]``: sums over groups then add whole rows."""
    return values.to(torch.float64).t().contiguous()


def _steps(device: torch.device) -> Tensor:
    """Return E6M2 / 4 for codes from ``-_BELOW`` to ``254 + _ABOVE`` as if there were such: float64, exact."""
    code = torch.arange(-_BELOW, _LARGEST_CODE + _ABOVE + 2, dtype=torch.int64, device=device)
    octave = torch.div(code, _OCTAVE, rounding_mode="floor")
    mantissa = (4 + code - octave * _OCTAVE).to(torch.float64)
    # 2**octave from its bits: exp2 need not be exact everywhere.
    return mantissa * ((octave - 48 - 4 + 1023) << 52).view(torch.float64)


def _group_errors(difference: Tensor, weights: Tensor | None) -> Tensor:
    """Return the squared error of each group of 4, ``[16, U]``, for ``difference [64, U]`` (overwritten)."""
    squared = difference.mul_(difference)
    if weights is not None:
        squared.mul_(weights)
    groups = squared.view(16, 4, -1)
    return (groups[:, 0] + groups[:, 1]).add_(groups[:, 2] + groups[:, 3])


def _total(errors: Tensor) -> Tensor:
    """Add ``[2**n, U]`` over its first axis in a fixed order."""
    while len(errors) > 1:
        errors = errors[: len(errors) // 2] + errors[len(errors) // 2 :]
    return errors[0]


def _pairs(errors: Tensor) -> Tensor:
    """Add neighbours: ``[2 * n, U]`` to ``[n, U]``."""
    return errors[0::2] + errors[1::2]


def _default_error(values: Tensor, packed: hif4.Packed, weights: Tensor | None) -> Tensor:
    """Return the squared error ``[U]`` of encoded ``values [64, U]``."""
    codes, scales = packed.codes.reshape(-1, hif4.UNIT // 2), packed.scales.reshape(-1, 1)
    decoded = _columns(hif4.dequantize(hif4.Packed(codes, scales, hif4.UNIT)))
    return _total(_group_errors(decoded.sub_(values), weights))


class _Errors:
    """Squared errors of one block under the steps that candidates share, each computed once."""

    def __init__(self, magnitude: Tensor, weights: Tensor | None, code: Tensor, steps: Tensor) -> None:
        self.magnitude, self.weights, self.code, self.steps = magnitude, weights, code, steps
        self.buffer = torch.empty_like(magnitude)
        self.groups: dict[int, Tensor] = {}
        self.best_pairs: dict[int, Tensor] = {}

    def group(self, offset: int) -> Tensor:
        """Error ``[16, U]`` of groups of 4 whose step is that of ``code + offset``."""
        if offset not in self.groups:
            self.groups[offset] = self.measure(self.code + offset, self.weights)
        return self.groups[offset]

    def measure(self, code: Tensor, weights: Tensor | None) -> Tensor:
        """Error ``[16, U]`` of groups of 4 under one step for each unit."""
        step = self.steps[code + _BELOW]
        # The reciprocal is rounded, but a float32 value is never so close to a tie that it would matter,
        # and on a tie both neighbours are equally far.
        nearest = torch.mul(self.magnitude, 1.0 / step, out=self.buffer).round_().clamp_(max=7.0)
        return _group_errors(nearest.mul_(step).sub_(self.magnitude), weights)

    def pair(self, offset: int) -> Tensor:
        """Least error ``[8, U]`` of groups of 8 whose groups of 4 have the step of ``offset`` or twice it."""
        if offset not in self.best_pairs:
            self.best_pairs[offset] = _pairs(torch.minimum(self.group(offset), self.group(offset + _OCTAVE)))
        return self.best_pairs[offset]

    def cost(self, offset: int) -> Tensor:
        """Least error ``[U]`` of units whose level-1 scale is ``code + offset``."""
        return _total(torch.minimum(self.pair(offset), self.pair(offset + _OCTAVE)))


def _joint(errors: Tensor, count: int, span: int) -> Tensor:
    """Return for each unit the sum over its span of errors ``[rows * units]``, in the order of K."""
    if span == 1:
        return errors
    step = span or count
    groups = torch.nn.functional.pad(errors.view(-1, count), (0, -count % step)).unflatten(-1, (-1, step))
    total = groups[..., 0]
    for i in range(1, step):
        total = total + groups[..., i]
    return total[..., None].expand_as(groups).flatten(1)[:, :count].flatten()


def _search(x: Tensor, weights: Tensor | None, candidates: int, steps: Tensor, span: int = 1) -> hif4.Packed:
    """Return the best encoding of ``[rows, K]``; weights ``[64, rows * units]`` or None."""
    default = hif4.quantize(x, span=span or "row")
    count = default.scales.shape[1]
    values = _float32_units(x)
    first = (default.scales & 0xFF).view(-1)
    signed = _columns(torch.where((first != _NAN_CODE)[:, None], values, 0.0))
    code = torch.where(first != _NAN_CODE, first, 0).to(torch.int64)
    errors = _Errors(signed.abs(), weights, code, steps)
    best, offset = _joint(errors.cost(0), count, span), torch.zeros_like(code)
    for near in range(1, candidates + 1):  # from the default outwards: of equal scales the nearest is taken
        for tried in (near, -near):
            cost = _joint(errors.cost(tried), count, span)
            better = (cost < best) & (code + tried >= 0) & (code + tried <= _LARGEST_CODE)
            best = torch.where(better, cost, best)
            offset = torch.where(better, tried, offset)
    code = code + offset
    e8, e16 = _exponents(errors, code)
    # NaN (a unit that is not finite) compares false.
    better = best < _joint(_default_error(signed, default, weights), count, span) * _BETTER
    found_codes, found_scales = _encode(errors.magnitude, values, code, e8, e16, steps)
    codes = torch.where(better[:, None], found_codes, default.codes.view(-1, hif4.UNIT // 2))
    scales = torch.where(better, found_scales, default.scales.view(-1))
    return hif4.Packed(codes.reshape(default.codes.shape), scales.reshape(default.scales.shape), default.k)


def _exponents(errors: _Errors, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best ``e8 [8, U]`` and ``e16 [16, U]`` (bool) for one level-1 scale a unit; 0 where equal."""
    weights, live, live8 = errors.weights, None, None
    if weights is not None:
        groups = weights.view(16, 4, -1).amax(1)
        if bool((groups == 0).any()):
            # What has no weight decides among equals: a group of 4 by itself, of 8 only where both have none.
            live, live8 = groups > 0, groups.view(8, 2, -1).amax(1) > 0
            weights = torch.where(live.repeat_interleave(4, 0), weights, 1.0)
    fine, middle, coarse = (errors.measure(code + _OCTAVE * level, weights) for level in range(3))
    low, high = torch.minimum(fine, middle), torch.minimum(middle, coarse)
    if live is not None and live8 is not None:
        counts = live | ~live8.repeat_interleave(2, 0)
        low, high = torch.where(counts, low, 0.0), torch.where(counts, high, 0.0)
    e8 = _pairs(high) < _pairs(low)
    return e8, torch.where(e8.repeat_interleave(2, 0), coarse < middle, middle < fine)


def _encode(
    magnitude: Tensor, values: Tensor, code: Tensor, e8: Tensor, e16: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return codes uint8 ``[U, 32]`` and scales int32 ``[U]`` for magnitudes ``[64, U]`` of values ``[U, 64]``."""
    level = e8.repeat_interleave(2, 0).to(torch.int64) + e16
    step = steps[code + _BELOW + level * _OCTAVE].repeat_interleave(4, 0)
    # Exact: quotients of float32 values by 3-bit steps are further from a tie than float64 rounds.
    rounded = torch.floor(magnitude / step + 0.5).clamp_(max=7.0).to(torch.uint8)
    # A value that rounds to zero keeps its sign, as in hif4.quantize.
    nibbles = rounded + ((values.view(torch.int32) < 0).t().to(torch.uint8) << 3)
    packed = nibbles[0::2] + (nibbles[1::2] << 4)
    return packed.t(), _scales_of(code, e8, e16)


def _scales_of(code: Tensor, e8: Tensor, e16: Tensor) -> Tensor:
    return code.to(torch.int32) + hif4.bits_of(e8.t(), 8) + hif4.bits_of(e16.t(), 16)
