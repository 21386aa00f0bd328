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
_allowed = False
_held: list[str] = []


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, and not in TF32 or bfloat16, until the end; also a decorator.

    ``torch.set_float32_matmul_precision`` and ``torch.backends.*.fp32_precision`` let products be less exact where a
    processor has such instructions, and so does autocast. What a recipe is made of should not depend on that. The
    settings belong to the process: other threads multiply in full precision meanwhile, and what one sets is lost.
    """
    global _inside, _legacy, _allowed
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _lock:
        if not _inside:
            _held[:] = [matmul.fp32_precision for matmul in matmuls]
            _allowed = False
            with contextlib.suppress(RuntimeError):
                _allowed = bool(matmuls[0].allow_tf32)
            try:
                _legacy = torch.get_float32_matmul_precision()
            except RuntimeError:  # set by torch.backends alone
                _legacy = None
            torch.set_float32_matmul_precision("highest")  # of both, so that PyTorch does not find them at odds
        _inside += 1
    try:
        with contextlib.ExitStack() as stack:
            for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
                stack.enter_context(torch.autocast(device, enabled=False))
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
                if _legacy is None and _allowed:  # kept apart, and PyTorch refuses to read what is at odds
                    matmuls[0].allow_tf32 = True
