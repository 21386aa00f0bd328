"""From the second moments of an activation to reconstructed weights."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..format import hif4
from ..format.reconstruct import damped_factor, reconstruct
from ..format.scale_search import search_scales
from ..format.spans import parted
from ..format.transforms import multipliers, transform
from ..weights.packing import moments_as_quantized
from .seen import Seen
from .statistics import Cells

__all__ = ["reconstructed"]

log = logging.getLogger(__name__)


def reconstructed(
    calibration: Seen,
    cells: Cells,
    weights: Sequence[Tensor],
    mask: Tensor | None,
    seed: int | None,
    block: int,
    span: int = 1,
) -> dict[str, hif4.Packed]:
    """Return the weights that read an activation, rounded by its moments, on the CPU; nothing without moments.

    A weight that reads several activations, in several calls, is rounded by what all of them show.
    """
    activation, k = cells.activation, cells.activation.channels
    read = {path: calibration.read_by(activation.expert, path) for path in activation.members}
    every = [found.moments for group in read.values() for found in group]
    seen = [moments.blocks for moments in every if moments is not None]
    sizes = [len(part) for part in seen[0]] if seen else []
    problem = ""
    if not sizes or len(seen) < len(every):
        problem = "the calibration kept no moments of all that they read"
    elif block and any(size % block for size in sizes[:-1]):
        problem = f"the calibration kept moments of {sizes[0]} channels, which a rotation of {block} does not divide"
    elif not all(bool(part.isfinite().all()) for parts in seen for part in parts):
        problem = "its moments are beyond float32"
    if problem:
        log.warning(
            "%s: weights are rounded by searched scales and not reconstructed, since %s; see the argument moments of "
            "tahf4.calibrate", activation.name, problem,
        )  # fmt: skip
        return {}
    forward, inverse = (None if m is None else m.to(weights[0].device) for m in multipliers(k, mask, seed))
    parts: dict[str, list[hif4.Packed]] = {path: [] for path in activation.members}
    searched: dict[str, hif4.Packed] = {}
    units, rounding = parted(span)
    if span != 1:  # another rounding; or a span, which may be longer than a block of moments
        searched = {
            path: search_scales(transform(weight.detach(), inverse, block), span=units or "row", rounding=rounding)
            for path, weight in zip(activation.members, weights, strict=True)
        }
    for i, (first, size) in enumerate(zip(itertools.accumulate(sizes, initial=0), sizes)):
        at, known = slice(first, first + size), dict[tuple[int, ...], tuple[Tensor, Tensor]]()
        for path, weight in zip(activation.members, weights, strict=True):
            group = [found.moments.blocks[i].to(weight.device) for found in read[path] if found.moments is not None]
            key = tuple(map(id, read[path]))
            if key not in known:  # q, k and v invert once
                total = sum(group[1:], group[0])
                moments = moments_as_quantized(total, None if forward is None else forward[at], block)
                known[key] = moments, damped_factor(moments)
            moved = transform(weight.detach()[:, at], None if inverse is None else inverse[at], block)
            whole = _columns(searched[path], first, size) if path in searched else None
            parts[path].append(reconstruct(moved, *known[key], units or "row", whole))
    return {
        path: hif4.Packed(
            torch.cat([p.codes for p in found], 1).cpu(), torch.cat([p.scales for p in found], 1).cpu(), k
        )
        for path, found in parts.items()
    }


def _columns(packed: hif4.Packed, first: int, size: int) -> hif4.Packed:
    """Return some channels of a packed weight, in whole units."""
    units = slice(first // hif4.UNIT, first // hif4.UNIT + hif4.units(size))
    codes = packed.codes.unflatten(1, (-1, hif4.UNIT // 2))[:, units].flatten(1)
    return hif4.Packed(codes, packed.scales[:, units], size)
