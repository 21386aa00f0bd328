"""JSON and safetensors files read without trust: all of a header is checked before anything large is allocated.

safetensors' own reader checks much of this, but lets a name stand twice and trusts what an index file says. Nothing
is ever unpickled.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, Tahf4Error

__all__ = [
    "DTYPES",
    "MAX_HEADER",
    "PICKLES",
    "Header",
    "TensorInfo",
    "opened",
    "parse_json",
    "plain_name",
    "read_header",
    "read_index",
    "read_into",
    "read_json",
]

MAX_HEADER = 32 << 20
"""Bytes of the longest header or JSON file that is read; that of a 14B model has about 100,000."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that are pickles, which can run code when they are read."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of dtypes in safetensors files."""

_MOST_AXES = 16


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        path: of the file.
        dtype: a key of :data:`DTYPES`.
        shape: as in the file.
        offset: of its first byte in the file.
        size: in bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: by name.
        metadata: texts by name.
        text: the header as it stands in the file.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    text: bytes = field(repr=False)


def parse_json(text: bytes, where: str, error: type[Tahf4Error] = CheckpointError) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Raises:
        Tahf4Error: of the type ``error``: no JSON object, a key stands twice, NaN or an infinity, or nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r:.100} stands twice")
        return found

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError, MemoryError) as cause:
        raise error(f"{where} is damaged: {cause}; get or make the file again") from cause
    if not isinstance(value, dict):
        raise error(f"{where} holds a {type(value).__name__}; expected a JSON object")
    return value


def _size_of(path: Path, error: type[Tahf4Error]) -> int:
    """Return the size of a regular file; a pipe or device would block or never end."""
    try:
        found = path.stat()
    except (OSError, ValueError) as cause:
        raise error(f"there is no file {path}") from cause
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is no regular file; expected a file to read")
    return found.st_size


def read_json(path: Path, error: type[Tahf4Error] = CheckpointError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        Tahf4Error: of the type ``error``: as :func:`parse_json`; no regular file, or longer than :data:`MAX_HEADER`.
    """
    size = _size_of(path, error)
    if size > MAX_HEADER:
        raise error(f"{path} has {size:,} bytes; expected a JSON file of at most {MAX_HEADER:,}")
    try:
        text = path.read_bytes()
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from cause
    return parse_json(text, str(path), error)


def read_header(path: Path, error: type[Tahf4Error] = CheckpointError) -> Header:
    """Read and check the header of a safetensors file, and nothing else.

    Raises:
        Tahf4Error: of the type ``error``: the file is shorter or longer than its header says, the header is longer than
            :data:`MAX_HEADER` or no JSON, a name stands twice, a dtype is unknown, or the tensors overlap, leave gaps
            or do not have the sizes of their shapes.
    """
    size = _size_of(path, error)
    if size < 8:
        raise error(f"{path} has {size} bytes and is no safetensors file; it may be truncated: get or make it again")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise error(f"{path} names a header of {length:,} bytes, more than {MAX_HEADER:,}; it is damaged")
            if length > size - 8:
                what = "it is truncated; get or make it again"
                raise error(f"{path} has {size:,} bytes, its header alone {length:,}: {what}")
            text = file.read(length)
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from cause
    if len(text) < length:
        raise error(f"{path} became shorter while it was read")
    content = parse_json(text, f"the header of {path}", error)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{path} is damaged: its metadata are no texts")
    tensors = {name: _tensor(path, name, values, 8 + length, error) for name, values in content.items()}
    at = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if info.offset != at:
            raise error(f"{path} is damaged: {name!r:.200} overlaps another tensor or leaves a gap before it")
        at += info.size
    if at != size:
        what = "truncated" if size < at else "longer than it should be"
        raise error(f"{path} has {size:,} bytes; its header describes {at:,}: it is {what}; get or make it again")
    return Header(tensors, metadata, text)


def _tensor(path: Path, name: str, values: Any, start: int, error: type[Tahf4Error]) -> TensorInfo:
    where = f"{path} is damaged: {name!r:.200}"
    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where} lacks a dtype, shape or offsets")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error(f"{where} is of the dtype {dtype!r:.50}; expected one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > _MOST_AXES:
        raise error(f"{where} has the shape {shape!r:.100}; expected at most {_MOST_AXES} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise error(f"{where} has the offsets {offsets!r:.100}; expected two")
    size = DTYPES[dtype].itemsize
    for extent in shape:
        size *= extent
    if offsets[1] - offsets[0] != size:
        raise error(f"{where} takes {offsets[1] - offsets[0]:,} bytes; its shape {shape} in {dtype} needs {size:,}")
    return TensorInfo(path, dtype, tuple(shape), start + offsets[0], size)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= sys.maxsize for value in values)


def plain_name(name: Any, where: str, error: type[Tahf4Error] = CheckpointError) -> str:
    """Return a file name that another file gives, if it names a file beside that one.

    Raises:
        Tahf4Error: of the type ``error``: it is a path, or no name.
    """
    bad = not isinstance(name, str) or not name or name in (".", "..")
    if bad or any(sign in name for sign in "/\\\0:") or not name.isprintable() or len(name) > 255:
        raise error(f"{where} names the file {name!r:.200}; expected the plain name of a file in the same folder")
    return str(name)


def read_index(path: Path, error: type[Tahf4Error] = CheckpointError) -> dict[str, TensorInfo]:
    """Return the tensors of a sharded checkpoint by name; every shard's header is checked.

    Args:
        path: of the index file (``*.safetensors.index.json``).

    Raises:
        Tahf4Error: of the type ``error``: the index names a path, a file that is missing or of another kind, or other
            tensors than the shards hold; or as :func:`read_header`.
    """
    weight_map = read_json(path, error).get("weight_map")
    if not isinstance(weight_map, dict):
        raise error(f"{path} is damaged: it has no 'weight_map'")
    names = {plain_name(name, str(path), error) for name in weight_map.values()}
    for name in sorted(names):
        if not name.endswith(".safetensors"):
            raise error(f"{path} names the file {name!r}; expected .safetensors files: pickles are never read")
        if not (path.parent / name).is_file():
            raise error(f"{path} names the file {name!r}, which is missing; get the whole checkpoint")
    found: dict[str, TensorInfo] = {}
    for name in sorted(names):
        for tensor, info in read_header(path.parent / name, error).tensors.items():
            if weight_map.get(tensor) != name:
                raise error(f"{path.parent / name} holds {tensor!r:.200}, which {path.name} does not place there")
            found[tensor] = info
    missing = sorted(set(weight_map) - set(found))
    if missing:
        raise error(f"{path} names {missing[0]!r:.200} in {weight_map[missing[0]]!r}, which does not hold it")
    return found


def read_into(file: int, offset: int, buffer: Tensor, error: type[Tahf4Error] = CheckpointError) -> None:
    """Fill a contiguous tensor on the CPU with the bytes at a place of an open file.

    A file that is cut while it is read gives an error here; in a memory map it would end the process.

    Raises:
        Tahf4Error: of the type ``error``.
    """
    view = buffer.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], offset + done)
        except OSError as cause:
            raise error(f"cannot read the checkpoint: {cause.strerror}") from cause
        if not count:
            raise error("a file of the checkpoint became shorter while it was read")
        done += count


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file to read from, as a number.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as cause:
        raise CheckpointError(f"cannot read {path}: {cause.strerror}") from cause
    try:
        yield file
    finally:
        os.close(file)
