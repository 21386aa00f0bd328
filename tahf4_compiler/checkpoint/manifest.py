"""The list of a checkpoint's files with their hashes, ``tahf4_manifest.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .reading import read_header, read_json

__all__ = ["FORMAT", "NAME", "file_sha256", "manifest_text", "read_manifest", "verify"]

NAME = "tahf4_manifest.json"
FORMAT = "tahf4-manifest-1"
_BLOCK = 4 << 20


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> tuple[int, str]:
    """Return the size and the SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    found, size, buffer = hashlib.sha256(), 0, bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(memoryview(buffer)[:count])
            size += count
            if progress is not None:
                progress(count)
    return size, found.hexdigest()


def manifest_text(job: str, files: Mapping[str, tuple[int, str]]) -> str:
    """Return the manifest of files by path in the folder, ``(size, SHA-256)`` each; the same for the same files."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    return json.dumps({"format": FORMAT, "job": job, "files": listed}, indent=1) + "\n"


def read_manifest(folder: Path) -> tuple[str, dict[str, tuple[int, str]]]:
    """Return what made a checkpoint, and its files.

    Raises:
        CheckpointError: there is no manifest, or it is damaged, of another version, or names a file outside the folder.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"there is no {NAME} in {folder}; expected a folder that tahf4 quantize wrote")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of the format {content.get('format')!r:.100}; expected {FORMAT!r}")
    job, files = content.get("job"), content.get("files")
    if not isinstance(job, str) or not isinstance(files, dict):
        raise CheckpointError(f"{path} is damaged: it lists no files")
    return job, {name: _entry(path, name, values) for name, values in files.items()}


def _entry(path: Path, name: str, values: Any) -> tuple[int, str]:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name or not name:
        raise CheckpointError(f"{path} names the file {name!r:.200}; expected one inside the folder")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: {name!r:.200} has no size and hash")
    size, digest = values.get("bytes"), values.get("sha256")
    if type(size) is not int or not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CheckpointError(f"{path} is damaged: {name!r:.200} has no size and hash")
    return size, digest


def verify(folder: Path, progress: Callable[[int], object] | None = None) -> int:
    """Compare every file of a checkpoint with the manifest.

    Args:
        folder: that ``tahf4 quantize`` wrote.
        progress: called with the number of bytes that were read.

    Returns:
        The number of files.

    Raises:
        CheckpointError: files are missing, of another size or content, or weights that the manifest does not name are
            there; the first three are named.
    """
    _, files = read_manifest(folder)
    wrong = []
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
            continue
        if path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes, expected {size:,}")
            continue
        try:
            if name.endswith(".safetensors"):
                read_header(path)
            if file_sha256(path, progress)[1] != digest:
                wrong.append(f"{name} has other contents")
        except CheckpointError as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
    for path in sorted(folder.rglob("*.safetensors")):
        if (name := path.relative_to(folder).as_posix()) not in files:
            wrong.append(f"{name} is not in the manifest")
    if wrong:
        raise CheckpointError(
            f"{folder} is not what was written there, in {len(wrong)} files: {'; '.join(wrong[:3])}. "
            "Copy it again, or run tahf4 quantize again."
        )
    return len(files)
