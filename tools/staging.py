"""Results are made in a folder beside their place and moved there when all are done."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files.replacing import replacing
from .errors import CommandError

__all__ = ["check_writable", "staged", "write_text"]


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder inside ``out``; move what is in it to ``out`` if all went well, else drop it.

    A file or folder of the same name from a former run is replaced as a whole; others stay.

    Raises:
        CommandError: ``out`` is a file, or no folder can be made there.
    """
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        message = f"cannot write to the folder {out}: {error.strerror}. Name another with -o."
        raise CommandError(message) from error
    try:
        yield stage
        for path in sorted(stage.iterdir()):
            _replace(path, out / path.name, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def _replace(new: Path, place: Path, stage: Path) -> None:
    """Rename a file or folder to its place; what stood there goes into the stage, to be dropped with it."""
    if place.is_dir() and not place.is_symlink():
        place.rename(stage / f".former-{place.name}")
    new.replace(place)


def check_writable(path: Path) -> None:
    """Raise :class:`CommandError` unless a file can be written at a path, which stays as it is."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}. Name another file with -o.") from error


def write_text(path: Path, text: str) -> None:
    """Write a file, so that it is missing or whole; its folder is made.

    Raises:
        CommandError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}. Name another file with -o.") from error
