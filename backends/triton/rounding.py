"""The reconstruction of weights: one unit in one launch, where PyTorch's operators take hundreds for its channels.

The references are ``round_unit`` and ``descend_unit`` of :mod:`tahf4_compiler.format.reconstruct`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...format.hif4 import UNIT
from . import source
from .call import Call

__all__ = ["descend_unit", "round_unit"]

ROWS = 16
"""Rows of a program."""

_KERNELS = """@triton.jit
def round_unit(values, steps, factor, codes, errors, rows, ROWS: tl.constexpr):
    column = tl.arange(0, 64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 64 + column[None, :]
    mask = (row < rows)[:, None]
    value = tl.load(values + at, mask=mask, other=0.0)
    step = tl.load(steps + at, mask=mask, other=1.0)
    magnitudes = tl.zeros((ROWS, 64), tl.float32)
    left = tl.zeros((ROWS, 64), tl.float32)
    for j in range(64):
        here = (column == j)[None, :]
        moves = tl.load(factor + j * 64 + column)
        mine = tl.sum(tl.where(here, value, 0.0), 1)
        width = tl.sum(tl.where(here, step, 0.0), 1)
        magnitude = tl.minimum(tl.floor(tl.div_rn(tl.abs(mine), width) + 0.5), 7.0)
        rounded = tl.where(mine < 0, -magnitude, magnitude) * width
        curvature = tl.zeros_like(mine) + tl.load(factor + j * 64 + j)
        error = tl.div_rn(mine - rounded, curvature)
        value = tl.where((column > j)[None, :], value - error[:, None] * moves[None, :], value)
        magnitudes = tl.where(here, magnitude[:, None], magnitudes)
        left = tl.where(here, error[:, None], left)
    tl.store(errors + at, left, mask=mask)
    sign = (value.to(tl.int32, bitcast=True) >> 28) & 8
    even, odd = tl.split(tl.reshape(magnitudes.to(tl.int32) + sign, (ROWS, 32, 2)))
    byte = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(codes + byte, (even + (odd << 4)).to(tl.uint8), mask=mask)


@triton.jit
def descend_unit(rounded, slopes, steps, moments, rows, ROWS: tl.constexpr):
    column = tl.arange(0, 64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 64 + column[None, :]
    mask = (row < rows)[:, None]
    value = tl.load(rounded + at, mask=mask, other=0.0)
    slope = tl.load(slopes + at, mask=mask, other=0.0)
    step = tl.load(steps + at, mask=mask, other=1.0)
    for j in range(64):
        here = (column == j)[None, :]
        moves = tl.load(moments + j * 64 + column)
        mine = tl.sum(tl.where(here, value, 0.0), 1)
        down = tl.sum(tl.where(here, slope, 0.0), 1)
        width = tl.sum(tl.where(here, step, 0.0), 1)
        curvature = tl.zeros_like(mine) + tl.load(moments + j * 64 + j)
        wanted = mine - tl.div_rn(down, curvature)
        magnitude = tl.minimum(tl.floor(tl.div_rn(tl.abs(wanted), width) + 0.5), 7.0) * width
        moved = tl.where(wanted < 0, -magnitude, magnitude) - mine
        better = moved * (2.0 * down + moved * curvature) < 0
        moved = tl.where(better, moved, 0.0)[:, None]
        value = tl.where(here & better[:, None], value + moved, value)
        slope += moved * moves[None, :]
    tl.store(rounded + at, value, mask=mask)"""


@functools.cache
def text() -> str:
    """Return the kernels' file."""
    return source.module_text("One unit of 64 channels of reconstructed weights, channel by channel.", [], _KERNELS)


def round_unit(values: Tensor, steps: Tensor, factor: Tensor) -> tuple[tuple[Tensor, Tensor], Call]:
    """Round one unit of a reconstructed weight channel by channel.

    Args:
        values: float32 ``[N, 64]``.
        steps: float32 ``[N, 64]``.
        factor: float32 ``[64, 64]``.

    Returns:
        Codes uint8 ``[N, 32]`` and what later channels make up for, float32 ``[N, 64]``; the launch that fills them.
    """
    codes = torch.empty((len(values), UNIT // 2), dtype=torch.uint8, device=values.device)
    errors = torch.empty_like(values, memory_format=torch.contiguous_format)
    given = {"values": values.contiguous(), "steps": steps.contiguous(), "factor": factor.contiguous()}
    return (codes, errors), _call("round_unit", {**given, "codes": codes, "errors": errors}, len(values))


def descend_unit(rounded: Tensor, slopes: Tensor, steps: Tensor, moments: Tensor) -> Call:
    """Return the launch that rounds one unit of a reconstructed weight again, given all others.

    Args:
        rounded: float32 ``[N, 64]``, contiguous; overwritten.
        slopes: float32 ``[N, 64]``: half the derivative of the error of a row.
        steps: float32 ``[N, 64]``.
        moments: float32 ``[64, 64]``.
    """
    given = {"slopes": slopes.contiguous(), "steps": steps.contiguous(), "moments": moments.contiguous()}
    return _call("descend_unit", {"rounded": rounded, **given}, len(rounded))


def _call(name: str, arguments: dict[str, Tensor], rows: int) -> Call:
    return Call(text(), name, (-(-rows // ROWS),), {**arguments, "rows": rows}, {"ROWS": ROWS}, exact=True)
