"""Settings that every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Two cores and parallel workers: one thread each, or the workers wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.pop("TAHF4_DUMP_DIR", None)

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Every test starts with its own seed and without compiled code."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
