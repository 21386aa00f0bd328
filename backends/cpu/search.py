"""How weights are transformed, searched and reconstructed in C++, bit for bit as the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ...format import hif4
from . import build, checks, operators
from .programs import DTYPES

__all__ = ["descend_unit", "round_unit", "search", "serves", "transform", "transforms"]

_CHUNK = 1 << 20  # values that are in float32 at a time
_DTYPES = {*DTYPES, torch.float64}


def serves(x: Tensor) -> bool:
    """Return whether :func:`search` takes a tensor: on the CPU, with memory of its own, and it is compiled."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype in _DTYPES
    return plain and checks.real() and build.library() is not None


def transforms(x: Tensor, multiplier: Tensor | None, hadamard_block: int) -> bool:
    """Return whether :func:`transform` takes what it would be given."""
    given = (x,) if multiplier is None else (x, multiplier)
    mine = hadamard_block > 0 and x.dim() == 2 and x.numel() > 0 and all(map(serves, given))
    return mine and x.dtype in DTYPES and (multiplier is None or multiplier.dtype == torch.float32)


def transform(x: Tensor, multiplier: Tensor | None, hadamard_block: int) -> Tensor:
    """Return what is quantized: :func:`tahf4_compiler.format.transforms.transform`.

    Args:
        x: ``[N, K]``, float32, bfloat16 or float16, on the CPU.
        multiplier: float32 ``[K]``, or None.
        hadamard_block: a power of two that divides K rounded up to a multiple of 64.

    Returns:
        As the reference: float32 ``[N, K]``, padded to whole units where there is a rotation.

    Raises:
        FormatError: the multiplier's shape or the block width does not fit K.
    """
    ops.check_transform(x.shape[-1], multiplier, hadamard_block)
    x, dtype = checks.as_rows("transform", x)
    factors = None if multiplier is None else multiplier.detach().resolve_neg().contiguous()
    out = torch.empty((len(x), hif4.units(x.shape[1]) * hif4.UNIT), dtype=torch.float32, device="cpu")
    build.loaded().tahf4_transform(
        *(x.data_ptr(), dtype, *x.shape, x.stride(0), 0 if factors is None else factors.data_ptr()),
        *(hadamard_block, hadamard_block**-0.5, out.data_ptr(), torch.get_num_threads()),
    )
    return out


def round_unit(values: Tensor, steps: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Round one unit of a reconstructed weight channel by channel.

    Args:
        values: float32 ``[N, 64]``, contiguous, on the CPU; overwritten.
        steps: float32 ``[N, 64]``.
        factor: float32 ``[64, 64]``.

    Returns:
        Codes uint8 ``[N, 32]``, and what later channels make up for, float32 ``[N, 64]``.
    """
    steps, factor = steps.contiguous(), factor.contiguous()
    codes = torch.empty((len(values), hif4.UNIT // 2), dtype=torch.uint8, device="cpu")
    errors = torch.empty_like(values)
    build.loaded().tahf4_round_unit(
        *(values.data_ptr(), len(values), steps.data_ptr(), factor.data_ptr(), codes.data_ptr(), errors.data_ptr()),
        torch.get_num_threads(),
    )
    return codes, errors


def descend_unit(rounded: Tensor, slopes: Tensor, steps: Tensor, moments: Tensor) -> None:
    """Round one unit of a reconstructed weight again, given all others.

    Args:
        rounded: float32 ``[N, 64]``, contiguous, on the CPU; overwritten.
        slopes: float32 ``[N, 64]``, contiguous: half the derivative of the error of a row; overwritten.
        steps: float32 ``[N, 64]``.
        moments: float32 ``[64, 64]``.
    """
    steps, moments = steps.contiguous(), moments.contiguous()
    build.loaded().tahf4_descend_unit(
        *(rounded.data_ptr(), len(rounded), slopes.data_ptr(), steps.data_ptr(), moments.data_ptr()),
        torch.get_num_threads(),
    )


def search(x: Tensor, weights: Tensor | None, candidates: int, span: int = 1) -> hif4.Packed:
    """Convert to HiF4 with the scales of least squared error.

    Args:
        x: ``[..., K]`` of a floating-point type, not empty, on the CPU.
        weights: float64 ``[units * 64]``, finite and not negative: factor of each channel's squared error; or None.
        candidates: level-1 scales tried on either side of the default one, 0 to 8.
        span: units that share a level-1 scale: 1, 2 or 4, or 0 for a row.

    Returns:
        A packed tensor.
    """
    k = x.shape[-1]
    count = hif4.units(k)
    codes = torch.empty((*x.shape[:-1], count * (hif4.UNIT // 2)), dtype=torch.uint8, device="cpu")
    scales = torch.empty((*x.shape[:-1], count), dtype=torch.int32, device="cpu")
    rows = x.detach().resolve_neg().reshape(-1, k)
    to_codes, to_scales = codes.view(len(rows), -1), scales.view(len(rows), -1)
    factors = None if weights is None else weights.contiguous()
    step = max(1, _CHUNK // k)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        values = hif4.to_float32(rows[part]).contiguous()
        found = operators.OPERATORS["quantize"](values, None, 0, 4, span)
        build.loaded().tahf4_search(
            *(values.data_ptr(), len(values), k, k, 0 if factors is None else factors.data_ptr(), candidates, span),
            *(found[0].data_ptr(), found[1].data_ptr(), torch.get_num_threads()),
        )
        to_codes[part], to_scales[part] = found
    return hif4.Packed(codes, scales, k)
