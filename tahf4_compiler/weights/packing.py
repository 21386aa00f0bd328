"""Conversion of one weight to HiF4, with the inverse of its activation's transform."""

from __future__ import annotations

import logging
import threading

import torch
from torch import Tensor

from ..format import hif4
from ..format.low_rank import LowRank, remainder
from ..format.reconstruct import Reconstruction
from ..format.scale_search import search_scales
from ..format.spans import parted, units_of
from ..format.transforms import multipliers, transform
from ..ops import registry
from ..plugins import host
from .checksum import checksum

__all__ = ["moment_as_quantized", "moments_as_quantized", "pack_transformed", "pack_weight"]

log = logging.getLogger(__name__)


_ROW_CHUNK = 1 << 22  # values converted at a time: bounds the temporaries to about 100 MB


def pack_weight(
    weight: Tensor,
    multiplier: Tensor | None = None,
    hadamard_block: int = 0,
    *,
    search: str = "",
    importance: Tensor | None = None,
    span: int = 1,
) -> hif4.Packed:
    """Transform and convert one weight, some rows at a time.

    Args:
        weight: ``[N, K]`` of a floating-point type.
        multiplier: float32 ``[K]`` or None: ``signs / mask``, see :mod:`tahf4_compiler.format.transforms`.
        hadamard_block: width of the rotation along K, 0 for none.
        search: ``""``, ``"squared"`` or ``"weighted"``, see :class:`tahf4_compiler.graph.inputs.PackedWeight`.
        importance: float32 ``[K]``, the second moment of the activation's channels as they are quantized, for
            ``"weighted"``; other searches do not look at it.
        span: a form (:mod:`tahf4_compiler.format.spans`): units of a row that share a level-1 scale, and the rounding.

    Returns:
        Codes uint8 ``[N, ceil(K / 64) * 32]`` and scales int32 ``[N, ceil(K / 64)]`` on the weight's device.

    Raises:
        FormatError: the weight is not floating point, or the transform does not fit K.
    """
    rows = max(1, _ROW_CHUNK // max(1, weight.shape[1]))
    codes, scales = [], []
    units, rounding = parted(span)
    for chunk in weight.detach().split(rows):
        if search:
            fast = host.find("transform", chunk, multiplier, hadamard_block)
            moved = (fast or transform)(chunk, multiplier, hadamard_block)
            weights = importance if search == "weighted" else None
            packed = search_scales(moved, weights, span=units or "row", rounding=rounding)
            parts = packed.codes, packed.scales
        else:
            parts = registry.quantize(chunk, multiplier, hadamard_block, 4, span)
        codes.append(parts[0])
        scales.append(parts[1])
    return hif4.Packed(torch.cat(codes), torch.cat(scales), weight.shape[1])


def pack_transformed(
    weight: Tensor,
    mask: Tensor | None,
    seed: int | None,
    block: int,
    search: str = "",
    moment: Tensor | None = None,
    reconstruction: Reconstruction | None = None,
    low_rank: LowRank | None = None,
    span: int = 1,
) -> hif4.Packed:
    """Convert one weight with the inverse of its activation's transform.

    Args:
        weight: ``[N, K]`` of a floating-point type.
        mask: float32 ``[K]`` that the activation is multiplied by, or None.
        seed: of the rotation's signs, or None.
        block: width of the rotation, 0 for none.
        search: see :class:`tahf4_compiler.graph.inputs.PackedWeight`.
        moment: ``[K]``, second moment of the activation's channels before the transform, for ``"weighted"``.
        reconstruction: what ``"reconstruct"`` gives where the weight is the one that it was made of, under this
            transform. Where it is not, scales are searched by squared error, and a warning says so.
        low_rank: the branch beside the product: what it leaves of the weight is packed. A reconstruction is of that.
        span: a form, as for :func:`pack_weight`. A reconstruction with another span is not taken. It has chosen each
            element by the errors of others, so the rounding says nothing about it.

    Returns:
        As :func:`pack_weight`, on the weight's device.

    Raises:
        FormatError: as :func:`pack_weight`.
    """
    device = weight.device
    if search == "reconstruct":
        # The checksum of what has no storage is that of nothing.
        fits = reconstruction is not None and hif4.holds_span(reconstruction.packed, units_of(span) or "row")
        if reconstruction is not None and fits and int(checksum(weight)) == reconstruction.weight_sum:
            codes, scales, k = reconstruction.packed
            # A copy: what becomes a parameter may be written.
            return hif4.Packed(codes.to(device, copy=True), scales.to(device, copy=True), k)
        if device.type != "meta":
            _warn_other_weight()
        search = "squared"
    multiplier = multipliers(weight.shape[1], mask, seed)[1]
    multiplier = multiplier.to(device) if multiplier is not None else None
    importance = moment_as_quantized(moment, mask, block).to(device) if moment is not None else None
    return pack_weight(remainder(weight, low_rank), multiplier, block, search=search, importance=importance, span=span)


_said = threading.Event()
_lock = threading.Lock()


def _warn_other_weight() -> None:
    """Say it once: a merged adapter changes every weight."""
    with _lock:
        if _said.is_set():
            return
        _said.set()
    log.warning(
        "weights or their transforms are not those that the recipe reconstructed (they were cast to another dtype, an "
        "adapter was merged, a fine-tune was loaded, a rank holds a part of them, or a pass such as rotate is off): "
        "their scales are searched instead, which loses quality. Calibrate the model as you run it. This is said once."
    )


def moments_as_quantized(moments: Tensor, multiplier: Tensor | None, block: int) -> Tensor:
    """Return the second moments of an activation's channels after the transform.

    Args:
        moments: float32 ``[K, K]``.
        multiplier: float32 ``[K]`` of the activation's channels, or None.
        block: width of the rotation, 0 for none.

    Returns:
        float32, ``[K, K]``; K in whole units of 64 where there is a rotation.
    """
    return transform(transform(moments, multiplier, block).t().contiguous(), multiplier, block)


def moment_as_quantized(moment: Tensor, mask: Tensor | None, block: int) -> Tensor:
    """Return the second moment of an activation's channels after mask and rotation.

    A rotation with random signs spreads the energy of a block evenly over it, as far as channels are uncorrelated.
    """
    moment = moment.to(torch.float32) * (mask.square() if mask is not None else 1.0)
    if block:
        padded = torch.nn.functional.pad(moment, (0, hif4.units(len(moment)) * hif4.UNIT - len(moment)))
        moment = padded.unflatten(0, (-1, block)).mean(1, keepdim=True).expand(-1, block).flatten()
    return moment
