"""The list of a checkpoint's files with their hashes, ``tahf4_manifest.json``."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from ..files.reading import read_header, read_json

__all__ = ["FORMAT", "NAME", "PROGRESS", "file_sha256", "manifest_sum", "manifest_text", "read_manifest", "verify"]

NAME = "tahf4_manifest.json"
FORMAT = "tahf4-manifest-2"
PROGRESS = ".tahf4_progress.json"
"""What is finished in a folder that grows; a run that was killed in its last moment leaves it in its result."""

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
    content = {"format": FORMAT, "job": job, "files": listed}
    return json.dumps({**content, "sha256": manifest_sum(content)}, indent=1) + "\n"


def manifest_sum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says, without its own ``sha256``."""
    said = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
    found = {name: _entry(path, name, values) for name, values in files.items()}
    if content.get("sha256") != manifest_sum(content):
        raise CheckpointError(f"{path} is damaged: it has not the hash that it names")
    return job, found


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
        CheckpointError: files are missing, of another size or content, or others than the manifest names are there;
            the first three are named.
    """
    _, files = read_manifest(folder)
    wrong = [f"{name} {what}" for name, found in files.items() if (what := _wrong(folder / name, found, progress))]
    others = [name for name in _names(folder) if name not in files and name not in (NAME, PROGRESS)]
    if not wrong and not others:
        return len(files)
    listed = [*wrong, *(f"{name} is not in the manifest" for name in others)]
    remedy = ["copy the folder again, or remove it and run tahf4 quantize again"] if wrong else []
    remedy += ["move away what is not in the manifest"] if others else []
    raise CheckpointError(
        f"{folder} is not what was written there, in {len(listed)} files: {'; '.join(listed[:3])}. "
        f"{'; '.join(remedy).capitalize()}."
    )


def _wrong(path: Path, found: tuple[int, str], progress: Callable[[int], object] | None) -> str:
    """Return what is wrong with a file that the manifest names, or nothing."""
    size, digest = found
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size:,} bytes, expected {size:,}"
        if file_sha256(path, progress)[1] != digest:
            return "has other contents"
        if path.name.endswith(".safetensors"):
            read_header(path)
    except CheckpointError as error:
        return f"cannot be read: {error}"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return ""


def _names(folder: Path) -> Iterator[str]:
    """Yield all that is in a folder and no folder itself; links are followed, once."""
    seen = set()
    for base, folders, files in os.walk(folder, followlinks=True):
        inside = Path(base).relative_to(folder)
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            yield inside.as_posix()
            continue
        seen.add(real)
        folders.sort()
        yield from ((inside / name).as_posix() for name in sorted(files))
