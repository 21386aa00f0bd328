"""Correctness of attention in 8 bits on a device, then its speed beside PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from .wan import Model

__all__ = ["check_attention", "time_attention"]

BORDER = 3e-4
"""What bytes at the border of two change: see ``tests/interpreter/test_attention_kernels.py``."""
WIDE_BORDER = 2e-3
"""The same for probabilities in bfloat16, which are rounded relative to the largest score of other keys."""


def check_attention(device: torch.device) -> Iterator[dict[str, Any]]:
    """Compare the kernel of attention with the reference on the same device.

    With the roundings of the reference it gives its bits. As it runs, its powers of 2 are those of the chip. With
    values in 16 bits probabilities may lie on the other side of a border of two of these.

    Args:
        device: that Triton serves.

    Yields:
        One record for each comparison: ``name``, ``ok``, ``detail``.
    """
    from ...backends.triton import attention, run

    generator = torch.Generator(device).manual_seed(0)
    rows, keys = (300, 1000) if device.type == "cuda" else (20, 80)
    for channels, dtype, kind in (
        (128, torch.bfloat16, "plain"),
        (128, torch.float32, "plain"),
        (64, torch.float16, "causal"),
        (96, torch.float32, "a mask for all rows"),
        (64, torch.float32, "a mask"),
    ):
        draw = [torch.randn(1, t, 2, channels, generator=generator, device=device) for t in (rows, keys, keys)]
        q, k, v = (x.to(dtype).transpose(1, 2) for x in draw)
        added = torch.randn(rows, keys, generator=generator, device=device)
        mask = {"a mask": added, "a mask for all rows": added[:1] > 0}.get(kind)
        k[0, 0, 70, 3] = float("nan")
        given = (q, k, v, mask, kind == "causal")
        wanted = torch.ops.tahf4.attention(*given)
        name = f"attention {str(dtype)[6:]}, heads of {channels}, {kind}"
        out, calls = attention.calls(*given, exact=True)
        run(calls)
        wrong = int((out.nan_to_num(7.0) != wanted.nan_to_num(7.0)).sum())
        yield {"name": f"{name}, its roundings", "ok": wrong == 0, "detail": f"{wrong} of {out.numel()} numbers differ"}
        for value_bits, border, how in ((8, BORDER, ""), (16, WIDE_BORDER, ", values in 16 bits")):
            both = (each.attention(*given, value_bits=value_bits) for each in (torch.ops.tahf4_triton, torch.ops.tahf4))
            got, wanted = (x.double().nan_to_num(0.0) for x in both)
            error = float((got - wanted).norm() / wanted.norm())
            ok = error < border + torch.finfo(dtype).eps
            yield {"name": f"{name}{how}", "ok": ok, "detail": f"relative error {error:.1e}"}


def time_attention(
    device: torch.device,
    model: Model,
    tokens: int,
    timer: Callable[[Callable[[], Any]], float],
    show: Callable[[str], None],
) -> dict[str, float]:
    """Time the self-attention of a block, with the quantization of q, k and v, beside SDPA in bfloat16."""
    shape = (1, tokens, model.heads, model.dim // model.heads)
    q, k, v = (torch.randn(shape, device=device).to(torch.bfloat16).transpose(1, 2) for _ in range(3))
    row = {"sdpa_ms": timer(lambda: F.scaled_dot_product_attention(q, k, v))}
    row["int8_ms"] = timer(lambda: torch.ops.tahf4_triton.attention(q, k, v))
    row["wide_ms"] = timer(lambda: torch.ops.tahf4_triton.attention(q, k, v, value_bits=16))
    row["speedup"], row["wide_speedup"] = (row["sdpa_ms"] / row[name] for name in ("int8_ms", "wide_ms"))
    show(f"attention: SDPA {row['sdpa_ms']:.3f} ms, int8 {row['int8_ms']:.3f} ms ({row['speedup']:.2f}x)")
    show(f"values in 16 bits: {row['wide_ms']:.3f} ms ({row['wide_speedup']:.2f}x)")
    return row
