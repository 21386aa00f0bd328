"""The search of scales in C++: :func:`tahf4_compiler.scale_search.search_scales`, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import hif4
from . import available, build, quantize

__all__ = ["search", "serves"]

_CHUNK = 1 << 20  # values that are in float32 at a time


def serves(x: Tensor) -> bool:
    """Return whether :func:`search` takes a tensor: on the CPU, with memory of its own, and it is compiled."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and available()


def search(x: Tensor, weights: Tensor | None, candidates: int) -> hif4.Packed:
    """Convert to HiF4 with the scales of least squared error.

    Args:
        x: ``[..., K]`` of a floating-point type, not empty, on the CPU.
        weights: float64 ``[units * 64]``, finite and not negative: factor of each channel's squared error; or None.
        candidates: level-1 scales tried on either side of the default one, 0 to 8.

    Returns:
        A packed tensor.
    """
    library = build.library()
    assert library is not None
    k = x.shape[-1]
    count = hif4.units(k)
    codes = torch.empty((*x.shape[:-1], count * (hif4.UNIT // 2)), dtype=torch.uint8)
    scales = torch.empty((*x.shape[:-1], count), dtype=torch.int32)
    rows = x.detach().resolve_neg().reshape(-1, k)
    to_codes, to_scales = codes.view(len(rows), -1), scales.view(len(rows), -1)
    factors = None if weights is None else weights.contiguous()
    step = max(1, _CHUNK // k)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        values = hif4._to_float32(rows[part]).contiguous()
        found = quantize(values)
        library.tahf4_search(
            *(values.data_ptr(), len(values), k, k, 0 if factors is None else factors.data_ptr(), candidates),
            *(found[0].data_ptr(), found[1].data_ptr(), torch.get_num_threads()),
        )
        to_codes[part], to_scales[part] = found
    return hif4.Packed(codes, scales, k)
