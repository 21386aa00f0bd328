"""HiFloat4 scales chosen by squared error instead of from the maxima: offline, for weights.

:func:`tahf4_compiler.hif4.quantize` takes the scales of a unit from its largest magnitudes, which is what an
activation can afford at run time. A weight is converted once, so :func:`search_scales` tries several level-1
scales for each unit and, for each of them, all exponent bits of its subgroups. The result is an ordinary packed
tensor; nothing that reads it needs to know.

For a fixed level-1 scale the best exponent bits are found exactly, without trying all 2**24: the squared error is
a sum over groups of 8, and given the bit of such a group its two groups of 4 are independent. An element's step is
``scale * 2**(e8 + e16) / 4``, and E6M2 has four codes an octave, so the error of a group of 4 depends only on
``code + 4 * (e8 + e16)``: neighbouring scales share most of the work.

Sources: format as in :mod:`tahf4_compiler.hif4`; the choice of the scale by squared error, sub-exponents included,
is published for weights in "HiFloat4 Format for Language Model Inference" (arXiv 2602.11287). Weighing each
channel by its activation's second moment minimizes the error of the linear's output if channels are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import hif4
from .errors import FormatError

__all__ = ["CANDIDATES", "MAX_CANDIDATES", "search_error", "search_scales"]

_OFFSETS = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8)

CANDIDATES = 5
MAX_CANDIDATES = len(_OFFSETS)

_OCTAVE = 4  # E6M2 codes
_LAST_CODE = 0xFE
_CODE_MARGIN = 8 + 2 * _OCTAVE
_CHUNK_UNITS = {"cpu": 512}
_CHUNK_UNITS_ELSEWHERE = 1 << 14
# A searched unit replaces the default one only if it is better by more than float64 sums can be wrong by.
_BETTER = 1.0 - 2.0**-40


@torch.no_grad()
def search_scales(x: Tensor, importance: Tensor | None = None, *, candidates: int = CANDIDATES) -> hif4.Packed:
    offsets = _OFFSETS[:candidates]
    lead = x.shape[:-1]
    k = x.shape[-1]
    count = hif4.units(k)
    codes = torch.empty((*lead, count * 32), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*lead, count), dtype=torch.int32, device=x.device)
    weights = None if importance is None else _unit_weights(importance.to(x.device))
    for part, (out_codes, out_scales), first in _blocks(x.detach(), (codes, scales)):
        block = None if weights is None else weights[:, first : first + out_scales.shape[-1]]
        new_codes, new_scales = _search_block(part, block, offsets)
        out_codes.copy_(new_codes)
        out_scales.copy_(new_scales)
    return hif4.Packed(codes, scales, k)


def search_error(x, packed, importance=None):
    raise NotImplementedError


def _unit_weights(importance: Tensor) -> Tensor:
    k = importance.shape[0]
    padded = torch.nn.functional.pad(importance.to(torch.float64), (0, hif4.units(k) * 64 - k))
    return padded.unflatten(0, (-1, 64)).t().contiguous()


def _blocks(x: Tensor, outs):
    k = x.shape[-1]
    codes, scales = outs
    if x.dim() != 2:
        x, codes, scales = x.view(-1, k), codes.view(-1, codes.shape[-1]), scales.view(-1, scales.shape[-1])
    limit = _CHUNK_UNITS.get(x.device.type, _CHUNK_UNITS_ELSEWHERE)
    n = hif4.units(k)
    cols = min(n, limit)
    rows = max(1, limit // cols)
    for r in range(0, x.shape[0], rows):
        for c in range(0, n, cols):
            yield x[r:r+rows, c*64:(c+cols)*64], (codes[r:r+rows, c*32:(c+cols)*32], scales[r:r+rows, c:c+cols]), c


def _steps(device):
    code = torch.arange(-_CODE_MARGIN, 256 + _CODE_MARGIN, dtype=torch.float64, device=device)
    e = torch.floor(code / 4)
    return torch.exp2(e - 48) * (1 + (code - 4 * e) / 4) / 4


def _group_errors(y, step, w, buf):
    torch.mul(y, 1.0 / step, out=buf)
    buf.round_().clamp_(max=7.0).mul_(step).sub_(y)
    buf.mul_(buf)
    if w is not None:
        buf.mul_(w)
    g = buf.view(16, 4, -1)
    return (g[:, 0] + g[:, 1]) + (g[:, 2] + g[:, 3])


def _search_block(x, weights, offsets):
    import time
    default = hif4.quantize(x)
    rows, n = default.scales.shape
    values = hif4._as_units(hif4._to_float32(x)).reshape(rows * n, 64)
    u = rows * n
    code0 = (default.scales & 0xFF).view(-1)
    finite = code0 != 0xFF
    signed = torch.where(finite[:, None], values, 0.0).t().to(torch.float64)   # [64,U]
    y = signed.abs().contiguous()
    w = None if weights is None else weights.repeat(1, rows)
    table = _steps(x.device)
    code0 = code0.to(torch.int64)
    buf = torch.empty_like(y)
    errors = {}
    def err(j):
        if j not in errors:
            errors[j] = _group_errors(y, table[code0 + (j + _CODE_MARGIN)], w, buf)
        return errors[j]
    pairs = {}
    def pair(j):
        if j not in pairs:
            m = torch.minimum(err(j), err(j + 4)).view(8, 2, u)
            pairs[j] = m[:, 0] + m[:, 1]
        return pairs[j]
    best = None
    best_off = torch.zeros_like(code0)
    for d in offsets:
        t = torch.minimum(pair(d), pair(d + 4))
        t = t[:4] + t[4:]
        t = t[:2] + t[2:]
        cost = t[0] + t[1]
        if best is None:
            best = cost
            continue
        code = code0 + d
        better = (cost < best) & (code >= 0) & (code <= _LAST_CODE)
        best = torch.where(better, cost, best)
        best_off = torch.where(better, d, best_off)
    return default.codes, (default.scales), best, best_off, code0, values

