"""Reading a packed model for ComfyUI: its tensors under the original names, and how its linears are packed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tahf4_compiler.errors import PackedError
from tahf4_compiler.files.reading import parse_json, read_header, read_index, read_json
from tahf4_compiler.files.replacing import replacing
from tahf4_compiler.packed.config import Method, TaHF4Config

from .names import to_diffusers, to_original

__all__ = ["CONFIG", "is_packed", "read", "write_single_file"]

CONFIG = "quantization_config"
"""The key of the settings, in ``config.json`` and in the metadata of a single file."""

_ORIGINAL = "head.modulation"  # by this tensor ComfyUI knows a Wan model


def is_packed(folder: Path) -> bool:
    """Whether the ``config.json`` of a folder describes a packed model."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(CONFIG)
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(settings, dict) and settings.get("quant_method") == Method.TAHF4.value


def read(path: Path, load: Any) -> tuple[dict[str, Tensor], TaHF4Config]:
    """Return the tensors of a packed Wan model by their original names, and its settings with these names.

    In the place of each packed weight stands a tensor ``[N, K]`` on the meta device: ComfyUI finds the sizes of the
    model in the shapes of weights.

    Args:
        path: a folder of ``tahf4 quantize`` or ``save_pretrained``, or a single file.
        load: reads a safetensors file, as ``comfy.utils.load_torch_file`` does.

    Raises:
        PackedError: the model is not packed, lacks tensors, or is no Wan model.
        CheckpointError: a file is damaged or missing.
    """
    files, settings = _of_folder(path) if path.is_dir() else _of_file(path)
    if not isinstance(settings, Mapping) or not settings.get("linears"):
        raise PackedError(
            f"{path} holds no model that tahf4 packed. Load a plain model with ComfyUI's own Load Diffusion Model, or "
            "pack it first: tahf4 quantize MODEL_DIR -o OUT_DIR."
        )
    config: TaHF4Config = TaHF4Config.from_dict(settings)
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load(str(file)))
    state, config.linears = _original(state, config.linears, path)
    for name, values in config.linears.items():
        lacking = [leaf for leaf in ("weight_codes", "weight_scales") if f"{name}.{leaf}" not in state]
        if lacking:
            raise PackedError(f"{path} lacks {name}.{lacking[0]}; it is not complete: get it again")
        values.setdefault("multiplier", f"{name}.multiplier" in state)
        dtype = getattr(torch, values["dtype"])
        state[f"{name}.weight"] = torch.empty(values["n"], values["k"], dtype=dtype, device="meta")
    if more := [key for key in state if key.endswith(".weight_codes") and key[:-13] not in config.linears]:
        raise PackedError(f"{path} holds {more[0]}, and its {CONFIG} does not say how it is packed: it is damaged")
    return state, config


def write_single_file(folder: Path, file: Path) -> None:
    """Write a packed folder as one safetensors file with the original names, as ComfyUI's users exchange models.

    Args:
        folder: packed, with diffusers' names or the original ones.
        file: to be written.

    Raises:
        PackedError, CheckpointError: as :func:`read`.
    """
    from safetensors.torch import load_file, save_file

    state, config = read(folder, load_file)
    for name in config.linears:
        state[f"{name}.weight"] = torch.zeros(1, dtype=torch.uint8)  # as in a folder: no plain model
    text = json.dumps(config.to_dict(), sort_keys=True)
    with replacing(file) as beside:
        save_file({name: value.contiguous() for name, value in state.items()}, beside, metadata={CONFIG: text})


def _of_folder(folder: Path) -> tuple[list[Path], Any]:
    if not (folder / "config.json").is_file():
        inside = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and is_packed(child)]
        hint = f": choose one of its folders, {', '.join(inside)}" if inside else ""
        raise PackedError(f"{folder} has no config.json, which says how a model is packed{hint}")
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        files = sorted({info.path for index in indices[:1] for info in read_index(index).values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1 or not files or (not indices and len(files) > 1):
        raise PackedError(f"{folder} holds {len(files)} files of weights; expected one, or several with one index")
    return files, read_json(folder / "config.json").get(CONFIG)


def _of_file(path: Path) -> tuple[list[Path], Any]:
    metadata = read_header(path).metadata
    if CONFIG in metadata:
        return [path], parse_json(metadata[CONFIG].encode(), f"{CONFIG} of {path}")
    if is_packed(path.parent):  # a file of a folder
        files, settings = _of_folder(path.parent)
        if files != [path]:
            raise PackedError(f"{path} is one of the {len(files)} files of a packed model; choose {path.parent}")
        return files, settings
    return [path], None


def _original(
    state: Mapping[str, Tensor], linears: Mapping[str, dict[str, Any]], path: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Give tensors and settings the original names."""
    names = {name: name if _ORIGINAL in state else to_original(name) for name in (*state, *linears)}
    known = to_diffusers if _ORIGINAL in state else to_original
    if unknown := [name for name in (*linears, *state) if known(name) is None]:
        raise PackedError(
            f"{path} holds {unknown[0]}, which a Wan model for text or images to video has not. The nodes load the "
            "names of Wan2.1 and Wan2.2 alone, those of diffusers or the original ones; use other models in Python."
        )
    return (
        {str(names[name]): value for name, value in state.items()},
        {str(names[name]): dict(values) for name, values in linears.items()},
    )
