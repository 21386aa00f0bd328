"""Checksums of weights: one launch for each, and one wait for all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import source
from .call import Call

__all__ = ["calls"]

LANES, ROWS = 4096, 16
"""Words of a row, and rows of a program."""

_KERNEL = """@triton.jit
def kernel(words, factors, out, size, LANES: tl.constexpr, ROWS: tl.constexpr):
    lane = tl.arange(0, LANES)
    first = tl.program_id(0).to(tl.int64) * ROWS
    sums = tl.zeros((LANES,), tl.int64)
    for i in range(ROWS):
        at = (first + i) * LANES + lane
        values = tl.load(words + at, mask=at < size, other=0)
        mixed = (first + i + 1) * -0x61C8864680B583EB
        mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
        sums += values.to(tl.int64) * ((mixed ^ (mixed >> 32)) | 1)
    tl.atomic_add(out, tl.sum(sums * tl.load(factors + lane), 0))"""


@functools.cache
def text() -> str:
    """Return the kernel's file."""
    what = "The sum modulo 2**64 of 32-bit words times the factors of their lane and row."
    return source.module_text(what, [], _KERNEL)


def calls(data: Sequence[Tensor], factors: Tensor) -> tuple[Tensor, list[Call]]:
    """Return the checksums of :mod:`tahf4_compiler.weights.checksum`, 0 at first, and the launches that add to them.

    Args:
        data: contiguous uint8 ``[B]`` each, on one device.
        factors: int64 ``[4096]`` of the lanes.

    Returns:
        int64 ``[len(data)]``.
    """
    out = torch.zeros(len(data), dtype=torch.int64, device=factors.device)
    found = []
    for i, part in enumerate(data):
        if part.numel() % 4 or part.storage_offset() % 4:
            part = torch.nn.functional.pad(part, (0, -part.numel() % 4))  # in memory of its own
        words = part.view(torch.int32)
        if size := words.numel():
            arguments = {"words": words, "factors": factors, "out": out[i:], "size": size}
            grid, constants = (-(-size // (LANES * ROWS)),), {"LANES": LANES, "ROWS": ROWS}
            found.append(Call(text(), "kernel", grid, arguments, constants, warps=8))
    return out, found
