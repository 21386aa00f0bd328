"""Units that share a level-1 scale, on a device: the kernels' bits, and their times beside those of a scale a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...format.hif4 import UNIT
from ...format.spans import SPANS, check_span
from .running import own_on_path
from .wan import Model

__all__ = ["check_spans", "time_spans"]


def check_spans(device: torch.device, k: int, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Compare the kernels with the references on the same device.

    Args:
        device: that Triton serves.
        k: width of the activations.
        rows: of the activations.

    Yields:
        One record for each comparison: ``name``, ``ok``, ``detail``.
    """
    own, reference = torch.ops.tahf4_triton, torch.ops.tahf4
    generator, n = torch.Generator(device).manual_seed(0), 192

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for name in SPANS[1:]:
        span = check_span(name)
        weight, bias = reference.quantize(random(n, k), None, 0, 4, span), random(n)
        for m in rows:
            x = random(m, k)
            operands = (*reference.quantize(x, None, 64, 4, span), *weight, bias, torch.float32)
            same = all(map(torch.equal, own.quantize(x, None, 64, 4, span), operands[:2]))
            yield _record(f"quantize, span {name}, {m} rows", same)
            wanted = reference.linear(*operands, span)
            for path in _paths(m, n, span):
                for tile in _tiles(device, path, m, n, k, span):
                    found = own_on_path(path, *operands, [n], [], "", torch.float32, span=span, tile=tile)[0]
                    yield _record(f"linear {path}, span {name}, {m} rows, {tile}", torch.equal(found, wanted))


def _record(name: str, ok: bool) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": "bit for bit"}


def _paths(m: int, n: int, span: int) -> list[str]:
    """Return the paths that add integers over a span."""
    from ...backends.triton import tiling

    return ["int8", *(["library"] if tiling.fits_library(m, n, span) else [])]


def _tiles(device: torch.device, path: str, m: int, n: int, k: int, span: int) -> list[Any]:
    """Return the tiles that the autotuner may choose, or the default in the interpreter."""
    from ...backends.triton import tiling

    return tiling.tiles(path, m, n, k // UNIT, 1, span=span) if device.type == "cuda" else [None]


def time_spans(
    device: torch.device,
    model: Model,
    tokens: int,
    timer: Callable[[Callable[[], Any]], float],
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Time products and quantizations with each span; the arguments are those of :func:`.measure.measure`.

    Products with a row are timed on each path that adds integers over it, besides as they are chosen.
    """
    own, rows = torch.ops.tahf4_triton, []
    for k, n in ((model.dim, model.dim), (model.dim, model.ffn), (model.ffn, model.dim)):
        x, weight = (torch.randn(size, k, device=device).to(torch.bfloat16) for size in (tokens, n))
        row: dict[str, Any] = {"m": tokens, "k": k, "n": n, "linear_ms": {}, "quantize_ms": {}}
        for name in SPANS:
            form = (None, 64, 4, check_span(name))
            operands = (*own.quantize(x, *form), *own.quantize(weight, *form), None, torch.bfloat16, form[-1])
            row["linear_ms"][str(name)] = timer(lambda operands=operands: own.linear(*operands))  # type: ignore[misc]
            row["quantize_ms"][str(name)] = timer(lambda x=x, form=form: own.quantize(x, *form))  # type: ignore[misc]
        given = (*operands[:6], [n], [], "", torch.bfloat16)  # the last: with a scale a row
        for path in _paths(tokens, n, 0):
            row["linear_ms"][f"row, {path}"] = timer(
                lambda path=path, given=given: own_on_path(path, *given, span=0)  # type: ignore[misc]
            )
        rows.append(row)
        for what in ("linear", "quantize"):
            times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row[f"{what}_ms"].items())
            show(f"{what} {tokens} x {k} x {n} by its span: {times}")
    return rows
