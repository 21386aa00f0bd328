"""The layout in which Huawei's AMCT deploys HiF4, read and written as a stream.

A folder has ``model.safetensors.index.json``, a file ``layer_*.safetensors`` for each block with its quantized weights,
and files ``rest_*.safetensors`` with all other tensors. A weight ``P.weight`` is uint8 ``[N, K / 2]``, two elements a
byte as in :class:`tahf4_compiler.format.hif4.Packed`. Beside it ``P.scale`` is uint8 ``[N, K / 64, 4]``: the level-1
scale, the level-2 bits, and the level-3 bits of the first and the last eight groups, the bit of the first group being
the most significant of each byte.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatError
from ..files.reading import DTYPES, TensorInfo, opened, read_header, read_index, read_into, read_json
from ..format import hif4
from ..format.spans import FORM_ROUNDINGS
from ..packed.attention import ATTENTION_KEYS
from ..packed.config import TaHF4Config, stand_ins
from .layout import Item, shard
from .manifest import NAME, manifest_text
from .stage import staged
from .stream import Workers, write_shard

__all__ = ["from_amct", "from_amct_tensors", "to_amct", "to_amct_tensors"]

log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_COPIED = (".json", ".txt", ".model", ".md", ".jinja")
_REST = 8 << 30  # bytes of a file of other tensors, as AMCT writes them


def to_amct_tensors(packed: hif4.Packed) -> tuple[Tensor, Tensor]:
    """Return a packed weight as AMCT deploys it.

    Args:
        packed: ``[N, K]``, K a multiple of 64.

    Returns:
        ``qweight`` uint8 ``[N, K / 2]`` and ``scale`` uint8 ``[N, K / 64, 4]``.

    Raises:
        FormatError: it does not fit itself, or K is no multiple of 64.
    """
    hif4.check_packed(packed)
    if packed.k % hif4.UNIT or packed.codes.dim() != 2:
        raise FormatError(
            f"a packed weight with codes {tuple(packed.codes.shape)} and K = {packed.k}; AMCT's layout has two axes, "
            "and K in whole units of 64"
        )
    return packed.codes, _fields(packed.scales)


def from_amct_tensors(qweight: Tensor, scale: Tensor) -> hif4.Packed:
    """Return a weight of AMCT's layout as a packed one, all bits kept.

    Args:
        qweight: uint8 ``[N, K / 2]``.
        scale: uint8 ``[N, K / 64, 4]``.

    Raises:
        FormatError: shapes or dtypes are others.
    """
    if not _fit(_kind(qweight), _kind(scale)):
        raise FormatError(_mismatch("a weight of AMCT's layout", _kind(qweight), _kind(scale)))
    return hif4.Packed(qweight, _words(scale), scale.shape[1] * hif4.UNIT)


def _fields(scales: Tensor) -> Tensor:
    fields = torch.stack([(scales >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1).to(torch.uint8)
    fields[..., 1:] = _reversed(fields[..., 1:])
    return fields


def _words(scale: Tensor) -> Tensor:
    fields = torch.cat((scale[..., :1], _reversed(scale[..., 1:])), -1).to(torch.int32)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=scale.device)
    return (fields << shifts).sum(-1, dtype=torch.int32)


def _reversed(values: Tensor) -> Tensor:
    """Return bytes with their bits in the other order."""
    table = torch.tensor([int(f"{i:08b}"[::-1], 2) for i in range(256)], dtype=torch.uint8, device=values.device)
    return table[values.to(torch.int64)]


_Kind = tuple[torch.dtype, tuple[int, ...]]


def _kind(x: Tensor) -> _Kind:
    return x.dtype, tuple(x.shape)


def _info_kind(info: TensorInfo) -> _Kind:
    return DTYPES[info.dtype], info.shape


def _fit(weight: _Kind, scale: _Kind) -> bool:
    bytes_ = weight[0] == scale[0] == torch.uint8 and len(weight[1]) == 2
    return bytes_ and scale[1] == (weight[1][0], weight[1][1] // (hif4.UNIT // 2), 4) and weight[1][1] % 32 == 0


def _mismatch(what: str, weight: _Kind, scale: _Kind) -> str:
    return (
        f"{what} has {weight[0]} {weight[1]} and a scale {scale[0]} {scale[1]}; expected uint8 [N, K / 2] and "
        "uint8 [N, K / 64, 4]"
    )


def from_amct(folder: str | Path, out: str | Path) -> list[str]:
    """Write a folder of AMCT's layout as one with packed linears, one tensor at a time, all bits kept.

    Their activations have the rounding ``"bfloat16_half_away"``, as AMCT's. ``config.json`` gets our
    ``quantization_config`` in the place of any other; all other files but weights are copied.

    Args:
        folder: with ``config.json`` and the files that AMCT deploys.
        out: new or empty.

    Returns:
        The paths of the packed linears.

    Raises:
        CheckpointError: a file is damaged or missing, a weight has no scale that fits, or ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    tensors = _tensors(folder)
    config = read_json(folder / "config.json")
    scales = {_path(name): name for name, info in tensors.items() if _is_scale(name, info)}
    packed: dict[str, str] = {}
    for name, info in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "qweight") or info.dtype != "U8":
            continue
        if path not in scales:
            raise CheckpointError(f"{folder} holds {name} in uint8, and no {path}.scale; expected AMCT's HiF4")
        if not _fit(_info_kind(info), _info_kind(tensors[scales[path]])):
            found = _mismatch(f"{folder}: {name}", _info_kind(info), _info_kind(tensors[scales[path]]))
            raise CheckpointError(found)
        if len(both := sorted({f"{path}.weight", f"{path}.qweight"} & tensors.keys())) > 1:
            raise CheckpointError(f"{folder} holds {' and '.join(both)}; expected one of them: which weight is it?")
        packed[path] = name
    if lost := sorted(set(scales) - set(packed)):
        raise CheckpointError(f"{folder} holds {scales[lost[0]]}, and no {lost[0]}.weight in uint8 beside it")
    if not packed:
        raise CheckpointError(f"{folder} holds no weight in AMCT's HiF4: uint8 tensors P.weight with P.scale")
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    files = sorted({info.path.name for info in tensors.values()})
    names = [f"{stem}-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    groups: dict[str, list[Item]] = {name: [] for name in names}
    for name, info in sorted(tensors.items(), key=lambda entry: entry[1].offset):
        path = _path(name)
        place = groups[names[files.index(info.path.name)]]
        if name == packed.get(path):
            n, k = info.shape[0], info.shape[1] * 2
            codes = (f"{path}.weight_codes", "U8", (n, k // 2))
            place.append(Item((codes,), info, "U8"))
            other = tensors[scales[path]]
            outputs = ((f"{path}.weight_scales", "I32", (n, k // hif4.UNIT)),)
            place.append(Item(outputs, other, make=functools.partial(_made, _words, other)))
            marks = stand_ins([path]).items()
            place += [Item(((mark, "U8", tuple(value.shape)),), value=value) for mark, value in marks]
        elif name != scales.get(path):
            place.append(Item(((name, info.dtype, info.shape),), info, info.dtype))
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"{folder / 'config.json'} has the dtype {dtype!r:.50}; expected a floating-point type")
    linears = {
        path: {
            "k": tensors[name].shape[1] * 2,
            "n": tensors[name].shape[0],
            "hadamard_block": 0,
            "activation": path,
            "dtype": dtype,
            "multiplier": False,
            "rounding": FORM_ROUNDINGS[1],
        }
        for path, name in sorted(packed.items())
    }
    settings = TaHF4Config(linears=linears).to_dict()
    texts = {"config.json": {**config, "quantization_config": settings}}
    _write(folder, tensors, out, groups, texts, f"{stem}.safetensors.index.json")
    return sorted(packed)


def to_amct(folder: str | Path, out: str | Path) -> list[str]:
    """Write a folder with packed linears in AMCT's layout, one tensor at a time, all bits kept.

    Quantized weights go to ``layer_*.safetensors`` by the first number in their path, other tensors to
    ``rest_*.safetensors``. ``config.json`` is written without a ``quantization_config``.

    Args:
        folder: of one model, as ``tahf4 quantize`` or ``save_pretrained`` writes it.
        out: new or empty.

    Returns:
        The paths of the linears.

    Raises:
        CheckpointError: a linear has what AMCT's layout has no place for: a channel mask or rotation, a branch, a K
            that is no multiple of 64; a file is damaged; or ``out`` cannot be written.

    Logs a warning where the model says how activations and attention run, since the layout has no place for this.
    """
    folder, out = Path(folder), Path(out)
    tensors = _tensors(folder)
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "tahf4":
        raise CheckpointError(f"{folder} holds no model that tahf4 packed; expected its quantization_config")
    packed = TaHF4Config.from_dict(dict(settings))
    linears = packed.linears
    layers: dict[str, list[Item]] = {}
    rest: list[tuple[str, TensorInfo]] = []
    for path, values in sorted(linears.items()):
        _check_plain(folder, path, values, tensors)
        codes, scales = (tensors[f"{path}.{leaf}"] for leaf in ("weight_codes", "weight_scales"))
        n, k = values["n"], values["k"]
        number = next((int(part) for part in path.split(".") if part.isdecimal()), 0)
        place = layers.setdefault(f"layer_{number:03}.safetensors", [])
        place.append(Item(((f"{path}.weight", "U8", (n, k // 2)),), codes, "U8"))
        outputs = ((f"{path}.scale", "U8", (n, k // hif4.UNIT, 4)),)
        place.append(Item(outputs, scales, make=functools.partial(_made, _fields, scales)))
    own = {f"{path}.{leaf}" for path in linears for leaf in ("weight_codes", "weight_scales", "weight")}
    rest = [(name, info) for name, info in sorted(tensors.items()) if name not in own]
    groups, filled, count = dict(sorted(layers.items())), _REST, -1
    for name, info in rest:
        if filled + info.size > _REST:
            filled, count = 0, count + 1
        filled += info.size
        item = Item(((name, info.dtype, info.shape),), info, info.dtype)
        groups.setdefault(f"rest_{count:05}.safetensors", []).append(item)
    if lost := _lost(packed):
        log.warning("%s: AMCT's layout has no place for %s. The weights keep all bits", folder, ", ".join(lost))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    _write(folder, tensors, out, groups, {"config.json": plain}, _INDEX)
    return sorted(linears)


def _lost(config: TaHF4Config) -> list[str]:
    """Return what a packed model says about how it runs, where AMCT runs otherwise."""
    linears = config.linears.values()
    roundings = {values.get("rounding", FORM_ROUNDINGS[0]) for values in linears} - {FORM_ROUNDINGS[1]}
    bits = {values.get("activation_bits", 4) for values in linears} - {4}
    found = [f"activations rounded as {name!r} (AMCT: {FORM_ROUNDINGS[1]!r})" for name in sorted(roundings)]
    found += [f"activations of {number} bits" for number in sorted(bits)]
    if config.high_precision_steps:
        found.append(f"more bits in the steps {', '.join(map(str, config.high_precision_steps))}")
    if any(key in values for values in linears for key in ATTENTION_KEYS):
        found.append("attention that stays in higher precision")
    return found


def _check_plain(folder: Path, path: str, values: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    obstacles = {
        "a rotation": values["hadamard_block"] != 0,
        "a channel mask or signs (multiplier)": f"{path}.multiplier" in tensors,
        "a branch of low rank": bool(values.get("rank")),
        f"K = {values['k']}, no multiple of 64": values["k"] % hif4.UNIT != 0,
    }
    if values.get("rounding") == "least_error":
        obstacles["the rounding 'least_error' of activations"] = True
    if found := [what for what, there in obstacles.items() if there]:
        raise CheckpointError(
            f"{path} in {folder} has {', '.join(found)}, and AMCT's layout has no place for it. Pack the model with "
            "a recipe without masks, rotations and branches, in AMCT's rounding: calibration.recipe(mask=None, "
            'rotate=False, rounding="bfloat16_half_away").'
        )
    n, units = values["n"], values["k"] // hif4.UNIT
    wanted = {"weight_codes": ("U8", (n, units * 32)), "weight_scales": ("I32", (n, units))}
    for leaf, kind in wanted.items():
        info = tensors.get(f"{path}.{leaf}")
        if info is None or (info.dtype, info.shape) != kind:
            found_kind = (info.dtype, info.shape) if info is not None else "nothing"
            raise CheckpointError(f"{folder} has {found_kind} as {path}.{leaf}; expected {kind}: it is damaged")


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return read_index(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if indices or len(files) != 1:
        raise CheckpointError(
            f"{folder} has {len(files)} safetensors files and {len(indices)} indices; expected one index that names "
            "all files, or one file. Without it nobody knows whether a file is missing"
        )
    return dict(read_header(files[0]).tensors)


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _is_scale(name: str, info: TensorInfo) -> bool:
    return name.endswith(".scale") and info.dtype == "U8"


def _made(function: Callable[[Tensor], Tensor], info: TensorInfo) -> list[Tensor]:
    """Read a tensor, and return what a function makes of it."""
    values = torch.empty(info.shape, dtype=DTYPES[info.dtype], device="cpu")
    with opened(info.path) as file:
        read_into(file, info.offset, values)
    return [function(values)]


def _write(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    out: Path,
    groups: Mapping[str, list[Item]],
    texts: Mapping[str, Any],
    index_name: str,
) -> None:
    """Write a folder beside its place and rename it when it is whole; a run that stopped is taken up."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty; name another folder")
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise CheckpointError(f"{out} lies in {folder}, which is read; name a folder elsewhere")
    shards = [shard(name, items) for name, items in groups.items() if items]
    weight_map = {made[0]: part.name for part in shards for item in part.items for made in item.outputs}
    total = sum(item.size for part in shards for item in part.items)
    content = {**texts, index_name: {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}}
    found = hashlib.sha256(json.dumps(content).encode())
    others = list(_others(folder))
    for path in sorted({*others, *(info.path for info in tensors.values())}):
        state = path.stat()
        found.update(f"{path.name}|{state.st_size}|{state.st_mtime_ns}\n".encode())
    for part in shards:
        found.update(part.header)
    job, workers = found.hexdigest(), Workers(1, {})
    try:
        with staged(out, job) as stage:
            if stage.done:
                log.warning("%s: %d files of an earlier run are there already", out, len(stage.done))
            for part in shards:
                if part.name not in stage.done:
                    stage.finish(part.name, write_shard(part, stage.partial(part.name), workers, lambda count: None))
            for name, text in content.items():
                stage.write(name, f"{json.dumps(text, indent=2, sort_keys=True)}\n".encode())
            for path in others:
                stage.write(path.name, path.read_bytes())
            stage.write(NAME, manifest_text(job, stage.done).encode())
    finally:
        workers.close()


def _others(folder: Path) -> Iterator[Path]:
    """Yield the small files beside the weights: tokenizers and the like; pickles nowhere."""
    for path in sorted(folder.iterdir()):
        kind = "".join(path.suffixes[-1:])
        known = path.name in ("config.json", NAME) or path.name.endswith((".safetensors", ".index.json"))
        if path.is_file() and not known and not path.name.startswith(".") and kind in _COPIED:
            yield path
