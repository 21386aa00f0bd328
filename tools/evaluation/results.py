"""Files of rows: their names, their numbers, and how they are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...files.replacing import replacing
from .rows import Row

__all__ = ["file_of", "number", "row_bytes", "write_beside"]


def file_of(row: Row) -> str:
    """Return the name of a row's file, which changes with what the row does."""
    words = "".join(c if c.isalnum() else "_" for c in row.name).strip("_")
    digest = hashlib.sha256(repr(row).encode()).hexdigest()[:8]
    return f"row_{words}_{digest}.json"


def number(value: Any) -> float | None:
    """Return a number for JSON, None for infinity: a PSNR of equal clips, the error of a clip that failed."""
    return float(value) if np.isfinite(value) else None


def row_bytes(content: Mapping[str, Any]) -> bytes:
    """Return the content of a row's file: JSON with ``row``, and ``clips``, each with its ``prompt`` and measures."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def write_beside(path: Path, content: bytes) -> None:
    """Write a file, so that it is missing or whole."""
    with replacing(path) as beside:
        beside.write_bytes(content)
