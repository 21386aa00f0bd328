"""Files that are missing or whole: each is written beside its place and renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file; it takes its place if all went well, and is dropped after an error.

    Args:
        path: of the file, in a folder that exists. What is yielded ends as it does: some writers choose a format by
            that, and some append what they miss.
    """
    beside = path.with_name(f".partial-{os.getpid()}-{path.name}")  # another process may write the same file
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
