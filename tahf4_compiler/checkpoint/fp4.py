"""Weights that other tools hold in NVFP4 or MXFP4, read some rows at a time as the values that they stand for.

===================  =====================  ==============================  ============================
who                  weight, uint8          scale of a block                scale of the tensor
===================  =====================  ==============================  ============================
ModelOpt             ``P.weight``           ``P.weight_scale``              times ``P.weight_scale_2``
compressed-tensors   ``P.weight_packed``    ``P.weight_scale``              over ``P.weight_global_scale``
ComfyUI              ``P.weight``           ``P.weight_scale``, in tiles    times ``P.weight_scale_2``
===================  =====================  ==============================  ============================

A weight has two values a byte, ``[N, K / 2]``. ComfyUI has the even one in the high nibble, the others in the low one.
Scales are E4M3 ``[N, K / 16]`` (NVFP4), or uint8 ``[N, K / 32]``, exponents of two, and none of the tensor (MXFP4).
ComfyUI's lie in tiles of 128 rows and 4 columns, as cuBLAS reads them; ``P.comfy_quant``, or metadata of the file, says
that a weight is ComfyUI's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.reading import TensorInfo, opened, parse_json, read_header, read_into

__all__ = ["Fp4Weight", "paths_of", "with_fp4"]

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_DROPPED = ("input_scale", "input_global_scale", "comfy_quant")  # of activations, which HiF4 scales as they come
_SCALES = ("weight_scale", "weight_scale_2", "weight_global_scale")
_TILE = (128, 4)
_PREFIX = "model.diffusion_model."
_KNOWN = ("format", "full_precision_matrix_mult", "orig_dtype", "orig_shape")  # of ComfyUI's marks: no other values


@dataclass(frozen=True)
class Fp4Weight(TensorInfo):
    """A weight ``[N, K]`` of a floating-point dtype that lies in a file as NVFP4 or MXFP4.

    Attributes:
        scale: of its blocks.
        total: of the tensor, or None.
        divides: whether that divides, as in compressed-tensors.
        comfy: whether nibbles and scales lie as ComfyUI has them.
    """

    scale: TensorInfo = field(kw_only=True)
    total: TensorInfo | None = field(kw_only=True, default=None)
    divides: bool = field(kw_only=True, default=False)
    comfy: bool = field(kw_only=True, default=False)

    @property
    def format(self) -> str:
        """Its name."""
        return "NVFP4" if self.scale.dtype == "F8_E4M3" else "MXFP4"

    def read(self, first: int, count: int) -> Tensor:
        """Return rows as the values that they stand for: float32 ``[count, K]``.

        Raises:
            CheckpointError: a file cannot be read.
        """
        k = self.shape[1]
        packed = _read(self, torch.uint8, (count, k // 2), first * (k // 2))
        nibbles = [packed & 15, packed >> 4]
        both = torch.stack(nibbles[::-1] if self.comfy else nibbles, -1).flatten(1).to(torch.int64)
        signed = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float32, device="cpu")
        scale = self._scales(first, count)
        if self.total is not None:
            total = _read(self.total, torch.float32, (1,), 0)
            scale = scale / total if self.divides else scale * total
        blocks = signed[both].unflatten(1, (scale.shape[1], -1))
        return (blocks * scale[..., None]).flatten(1)

    def _scales(self, first: int, count: int) -> Tensor:
        if self.scale.dtype == "U8":
            columns = self.shape[1] // 32
            bits = _read(self.scale, torch.uint8, (count, columns), first * columns).to(torch.int32)
            value = torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)  # 2**-127 is subnormal
            return torch.where(bits == 255, torch.nan, value)
        columns = self.shape[1] // 16
        if not self.comfy:
            return _read(self.scale, torch.float8_e4m3fn, (count, columns), first * columns).to(torch.float32)
        rows, across = _TILE
        tiles, top = -(-columns // across), first // rows
        number = -(-(first + count) // rows) - top
        held = _read(self.scale, torch.float8_e4m3fn, (number, tiles, 32, 4, 4), top * tiles * rows * across)
        whole = held.to(torch.float32).permute(0, 3, 2, 1, 4).reshape(number * rows, tiles * across)
        return whole[first - top * rows :][:count, :columns]


def _read(info: TensorInfo, dtype: torch.dtype, shape: tuple[int, ...], at: int) -> Tensor:
    """Read elements of a file from a number on."""
    found = torch.empty(shape, dtype=dtype, device="cpu")
    with opened(info.path) as file:
        read_into(file, info.offset + at * dtype.itemsize, found)
    return found


def paths_of(info: TensorInfo) -> Iterator[Path]:
    """Yield the files that a tensor is read from."""
    yield info.path
    if isinstance(info, Fp4Weight):
        yield info.scale.path
        if info.total is not None:
            yield info.total.path


def with_fp4(tensors: Mapping[str, TensorInfo], folder: Path) -> tuple[dict[str, TensorInfo], str]:
    """Return tensors with the weights that are held in 4 bits in the places of their parts, and their formats.

    Args:
        tensors: by name in the files.
        folder: where they lie, for messages.

    Returns:
        The tensors; and what was found, such as ``"NVFP4"``, ``""`` for nothing.

    Raises:
        CheckpointError: a weight has no scale, shapes or dtypes do not fit each other, ComfyUI's mark names another
            format or what is not known here, a weight is in scaled FP8, or activations must be multiplied first
            (``pre_quant_scale``).
    """
    for name, info in tensors.items():
        if info.dtype.startswith("F8") and name.endswith(".weight") and f"{name}_scale" in tensors:
            raise CheckpointError(
                f"{folder} holds {name} in {info.dtype} with a scale; scaled FP8 is not read, NVFP4 and MXFP4 are. "
                "Export this linear in 16 bits"
            )
    found = dict(tensors)
    weights = {name: info for name, info in tensors.items() if _holds_codes(name, info)}
    if not weights:
        return found, ""
    comfy = _comfy_formats(tensors, folder)
    floats = [info.dtype for info in tensors.values() if info.dtype in ("F32", "F16", "BF16") and len(info.shape) > 0]
    plain = [dtype for dtype in floats if dtype != "F32"]
    dtype = max(set(plain), key=plain.count) if plain else "F32"
    formats = set()
    for name, info in weights.items():
        path = name.rpartition(".")[0]
        parts = {leaf: tensors.get(f"{path}.{leaf}") for leaf in _SCALES}
        said = next((comfy[p] for p in (path, path.removeprefix(_PREFIX), _PREFIX + path) if p in comfy), None)
        if comfy and said is None:
            raise CheckpointError(
                f"{folder} has ComfyUI's marks, and none for {name} in uint8: nothing says how it lies in the file"
            )
        made = _weight(f"{folder}: {name}", info, parts, name.endswith("_packed"), said, dtype)
        if f"{path}.pre_quant_scale" in tensors:
            raise CheckpointError(
                f"{folder} holds {path}.pre_quant_scale: activations are multiplied before the product, and tahf4 does "
                "not read that. Export the model without AWQ or SmoothQuant."
            )
        for leaf in (*_SCALES, *_DROPPED, "weight_shape"):
            found.pop(f"{path}.{leaf}", None)
        del found[name]
        found[f"{path}.weight"] = made
        formats.add(made.format)
    return found, " and ".join(sorted(formats))


def _holds_codes(name: str, info: TensorInfo) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "weight_packed" or (leaf == "weight" and info.dtype == "U8" and len(info.shape) == 2)


def _weight(
    where: str,
    info: TensorInfo,
    parts: Mapping[str, TensorInfo | None],
    packed: bool,
    comfy: str | None,
    dtype: str,
) -> Fp4Weight:
    """Check the parts of a weight against each other."""
    if comfy not in (None, "nvfp4"):
        raise CheckpointError(f"{where} is in ComfyUI's format {comfy!r:.50}; expected 'nvfp4', the one that is read")
    scale = parts["weight_scale"]
    if scale is None:
        raise CheckpointError(f"{where} is in uint8 and has no weight_scale beside it; the checkpoint is not complete")
    if info.dtype != "U8" or len(info.shape) != 2:
        raise CheckpointError(f"{where} is {info.dtype} {info.shape}; expected U8 [N, K / 2]: NVFP4 or MXFP4")
    n, k = info.shape[0], info.shape[1] * 2
    block = 16 if scale.dtype == "F8_E4M3" else 32
    wanted: tuple[int, ...] = (n, k // block)
    if comfy:
        wanted = (-(-n // 128) * 128, -(-(k // 16) // 4) * 4)
    if scale.dtype not in ("F8_E4M3", "U8") or k % block or scale.shape != wanted or (comfy and block != 16):
        raise CheckpointError(
            f"{where} is U8 {info.shape} with a weight_scale {scale.dtype} {scale.shape}; expected F8_E4M3 "
            f"{wanted if block == 16 else (n, k // 16)} (NVFP4) or U8 {(n, k // 32)} (MXFP4)"
        )
    if block == 32 and (more := [leaf for leaf in _SCALES[1:] if parts[leaf] is not None]):
        raise CheckpointError(f"{where} is MXFP4 and has a {more[0]} beside it, which MXFP4 has not: what does it say?")
    leaf = "weight_global_scale" if packed else "weight_scale_2"
    total = parts[leaf] if block == 16 else None
    if block == 16 and (total is None or total.dtype != "F32" or math.prod(total.shape) != 1):
        found = "none" if total is None else f"{total.dtype} {total.shape}"
        raise CheckpointError(f"{where} has the {leaf} {found}; expected one number of F32, as NVFP4 has it")
    size = info.size + scale.size
    given: dict[str, Any] = {"scale": scale, "total": total, "divides": packed, "comfy": bool(comfy)}
    return Fp4Weight(info.path, dtype, (n, k), info.offset, size, **given)


def _comfy_formats(tensors: Mapping[str, TensorInfo], folder: Path) -> dict[str, str]:
    """Return the formats that ComfyUI's marks name, by module path."""
    found: dict[str, str] = {}
    for path in sorted({info.path for info in tensors.values()}):
        text = read_header(path).metadata.get("_quantization_metadata")
        if text is not None:
            layers = parse_json(text.encode(), f"the metadata of {path}").get("layers")
            for name, said in (layers if isinstance(layers, dict) else {}).items():
                found[str(name)] = _format(said, f"{path}: _quantization_metadata of {name!r:.100}")
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "comfy_quant":
            continue
        if info.dtype != "U8" or info.size > 1 << 16:
            raise CheckpointError(f"{folder}: {name} is {info.dtype} {info.shape}; expected the bytes of a JSON text")
        text_bytes = bytes(_read(info, torch.uint8, (info.size,), 0).tolist())
        found[module] = _format(parse_json(text_bytes, f"{folder}: {name}"), f"{folder}: {name}")
    return found


def _format(said: Any, where: str) -> str:
    if not isinstance(said, dict) or not isinstance(said.get("format"), str):
        raise CheckpointError(f"{where} is {json.dumps(said)[:100]}; expected a format")
    if unknown := [key for key, value in said.items() if key not in _KNOWN and value]:
        raise CheckpointError(f"{where} has {unknown[0]!r:.100}; it is not known here how a weight lies with it")
    return str(said["format"])
