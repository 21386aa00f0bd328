"""Products of float32 in full precision, whatever the process is set to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["full_precision"]

_lock = threading.Lock()
_inside = 0
_legacy: str | None = None
_held: list[str] = []


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, and not in TF32 or bfloat16, until the end; also a decorator.

    ``torch.set_float32_matmul_precision`` and ``torch.backends.*.fp32_precision`` let products be less exact where a
    processor has such instructions. What a recipe is made of should not depend on that. The settings belong to the
    process: other threads multiply in full precision meanwhile, and what one sets meanwhile is lost.
    """
    global _inside, _legacy
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _lock:
        _inside += 1
        if _inside == 1:
            _held[:] = [matmul.fp32_precision for matmul in matmuls]
            try:
                _legacy = torch.get_float32_matmul_precision()
            except RuntimeError:  # set by torch.backends alone
                _legacy = None
            torch.set_float32_matmul_precision("highest")  # of both, so that PyTorch does not find them at odds
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                if _legacy is not None:
                    torch.set_float32_matmul_precision(_legacy)
                for matmul, held in zip(matmuls, _held, strict=True):
                    matmul.fp32_precision = "none"  # what the settings above it say
                    if matmul.fp32_precision != held:
                        matmul.fp32_precision = held
