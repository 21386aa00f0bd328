"""Tensors and a JSON header in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Tahf4Error
from .reading import parse_json, read_header
from .replacing import replacing

__all__ = ["decode", "digest", "encode", "is_plain", "load_tensors", "save_tensors"]

_KEY = "tahf4"
_SUM = "sha256"


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any], error: type[Tahf4Error]
) -> None:
    """Write a file; the same arguments give the same bytes.

    Args:
        path: of the file; missing or replaced as a whole, never half written.
        tensors: by name.
        kind: format and version, such as ``"tahf4-recipe-1"``.
        header: what JSON can hold.
        error: to raise.

    Raises:
        Tahf4Error: of the type ``error``: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {"format": kind, **header}
    values = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            # One entry: the order of several is not the same every time.
            save_file(values, beside, metadata={_KEY: _text({**content, _SUM: digest(content, values)})})
    except (OSError, SafetensorError) as cause:
        raise error(f"cannot write {path}: {cause}; choose another place") from cause


def _text(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a header and of tensors with their names, dtypes and shapes."""
    found = hashlib.sha256(_text(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu").copy_(tensor.reshape(-1))
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_tensors(path: Path, kind: str, error: type[Tahf4Error]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of a kind.

    Raises:
        Tahf4Error: of the type ``error``: no such file, not a safetensors file, or of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise error(f"there is no file {path}")
    text = read_header(path, error).metadata.get(_KEY, "{}")
    header = parse_json(text.encode(), f"the header of {path}", error)
    try:
        with safe_open(path, "pt") as file:
            found = header.get("format")
            if found != kind:
                raise error(f"{path} is of the format {found!r}; expected {kind!r}, as this version of tahf4 writes it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if header.pop(_SUM, None) != digest(header, tensors):
            raise error(f"{path} is damaged or was edited: its contents do not have the checksum that it names")
        return tensors, header
    except (SafetensorError, ValueError, OSError) as cause:
        if isinstance(cause, Tahf4Error):
            raise
        raise error(f"{path} cannot be read as a safetensors file: {cause}") from cause


def is_plain(value: Any) -> bool:
    """Whether a value is made of what a file can hold: tensors, numbers, texts, None, and lists and dicts of these."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(part) for part in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a plain value for JSON, its tensors put aside under names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: encode(part, tensors, f"{name}.{key}") for key, part in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(part, tensors, f"{name}.{i}") for i, part in enumerate(value)]}
    return {"value": value}


def decode(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Undo :func:`encode`."""
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content].to(device)
    if kind == "dict":
        return {key: decode(part, tensors, device) for key, part in content.items()}
    if kind in ("list", "tuple"):
        parts = [decode(part, tensors, device) for part in content]
        return parts if kind == "list" else tuple(parts)
    return content
