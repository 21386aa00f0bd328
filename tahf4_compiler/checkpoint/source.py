"""What is in a model folder: components, their tensors under diffusers' names, and their modules on the meta device."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..files.reading import DTYPES, PICKLES, TensorInfo, plain_name, read_header, read_index, read_json
from ..model.components import EXPERTS
from .fp4 import with_fp4

__all__ = ["Component", "Source", "open_source"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_LARGEST = 1 << 20
_ORIGINAL = "WanModel"
_CASTABLE = {"F64", "F32", "F16", "BF16"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Component:
    """A model of a checkpoint that is quantized.

    Attributes:
        name: in the pipeline, ``""`` for a bare model.
        folder: where it lies.
        config: of its class in diffusers.
        tensors: where each tensor of ``model.state_dict()`` lies, by diffusers' name.
        dtypes: in which each is written, a key of :data:`~.reading.DTYPES`.
        model: on the meta device, parameters in those dtypes.
        held: the format that weights are held in, such as ``"NVFP4"``; ``""`` for a model that is not quantized.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    dtypes: Mapping[str, str]
    model: nn.Module
    held: str = ""


@dataclass(frozen=True)
class Source:
    """A model folder.

    Attributes:
        folder: the folder.
        components: that are quantized.
        others: files that are copied as they are, by path in the folder.
    """

    folder: Path
    components: list[Component]
    others: dict[str, Path]


def open_source(folder: Path, dtype: torch.dtype | None = None) -> Source:
    """Read what is in a folder: JSON files and the headers of safetensors files.

    Args:
        folder: a diffusers pipeline or model, or a model with the original Wan names.
        dtype: that floating-point tensors are cast to before anything else, but for those that diffusers keeps in
            float32; None leaves them as they are.

    Raises:
        CheckpointError: the files do not fit each other or the model's class, are damaged, or are pickles.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give the folder of a diffusers pipeline or model")
    if not (folder / "model_index.json").is_file():
        if not (folder / "config.json").is_file():
            inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
            hint = f"; {', '.join(inner)} inside it have one: convert them one by one" if inner else ""
            raise CheckpointError(f"{folder} has neither model_index.json nor config.json{hint}")
        return Source(folder, [_component(folder, "", dtype)], dict(_others(folder, {""})))
    index = read_json(folder / "model_index.json")
    named = [name for name in EXPERTS if isinstance(index.get(name), list) and index[name] != [None, None]]
    if not named:
        raise CheckpointError(f"{folder / 'model_index.json'} names none of {', '.join(EXPERTS)}")
    components = [_component(folder / plain_name(name, "model_index.json"), name, dtype) for name in named]
    return Source(folder, components, dict(_others(folder, set(named))))


def _others(folder: Path, quantized: set[str]) -> Iterator[tuple[str, Path]]:
    """Yield what is copied; weights of quantized components are not, and pickles nowhere."""
    seen = set()
    for base, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        inside = Path(base).relative_to(folder).as_posix()
        inside = "" if inside == "." else inside
        pickles = [name for name in files if name.endswith(PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in files):
            raise CheckpointError(
                f"{Path(base) / pickles[0]} is a pickle, which can run code when it is read: tahf4 neither reads nor "
                "copies it. Save the model again with save_pretrained(..., safe_serialization=True)."
            )
        for name in sorted(files):
            weights = name.endswith((".safetensors", ".safetensors.index.json")) or name == "config.json"
            if name.startswith(".") or name.endswith(PICKLES) or (inside in quantized and weights):
                continue
            if inside == "" and name in ("tahf4_manifest.json", "hf_quant_config.json"):
                continue
            if not (path := Path(base) / name).is_file():
                raise CheckpointError(f"{path} is no regular file or a broken link")
            yield (f"{inside}/{name}" if inside else name), path


def _component(folder: Path, name: str, dtype: torch.dtype | None) -> Component:
    config = read_json(folder / "config.json")
    tensors, held = with_fp4(_tensors(folder), folder)
    settings = config.get("quantization_config")
    ours = isinstance(settings, Mapping) and settings.get("quant_method") == "tahf4"
    if settings is not None and (ours or not held):
        raise CheckpointError(
            f"{folder} is quantized already, and holds no weight in NVFP4 or MXFP4; give the folder of the original"
        )
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if config.get("_class_name") == _ORIGINAL or "blocks.0.self_attn.q.weight" in tensors:
        config, tensors = _from_original(config, tensors, folder)
    model = _meta_model(config, len(tensors), folder)
    _check_fits(model, tensors, folder)
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    dtypes = {}
    for key, info in tensors.items():
        high = any(part in kept for part in key.split("."))
        cast = dtype is not None and info.dtype in _CASTABLE and not high
        dtypes[key] = _NAMES[dtype] if cast and dtype is not None else info.dtype
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                kind = DTYPES[dtypes[f"{path}.{leaf}" if path else leaf]]
                empty = torch.empty(parameter.shape, dtype=kind, device="meta")
                module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    return Component(name, folder, config, tensors, dtypes, model, held)


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    for name in _WEIGHTS:
        if (folder / f"{name}.index.json") in indices:
            return read_index(folder / f"{name}.index.json")
        if (folder / name) in files:
            return dict(read_header(folder / name).tensors)
    if len(indices) == 1:
        return read_index(indices[0])
    if len(files) == 1 and not indices:
        return dict(read_header(files[0]).tensors)
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
    if pickles and not files:
        raise CheckpointError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is read; save it again "
            "with save_pretrained(..., safe_serialization=True)"
        )
    found = ", ".join(path.name for path in (*indices, *files)) or "none"
    raise CheckpointError(f"{folder} has the weights {found}; expected {_WEIGHTS[0]}, whole or with its index")


def _meta_model(config: Mapping[str, Any], count: int, folder: Path) -> nn.Module:
    import diffusers

    cls: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
        raise CheckpointError(
            f"{folder / 'config.json'} names the class {config.get('_class_name')!r:.100}; expected one of diffusers' "
            "models"
        )
    _check_sizes(config, count, folder / "config.json")
    try:
        with torch.device("meta"):
            settings = {k: v for k, v in config.items() if k != "_name_or_path"}
            model: nn.Module = cls.from_config(settings)  # type: ignore[attr-defined]
            return model.eval()
    except Exception as cause:  # whatever a constructor makes of values that it was not made for
        raise CheckpointError(f"{folder / 'config.json'} makes no {cls.__name__}: {cause!s:.300}") from cause


def _check_sizes(value: Any, count: int, where: Path, key: str = "") -> None:
    """Refuse numbers that would build a huge model before it can be compared with the tensors."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_sizes(part, count, where, str(name))
    elif isinstance(value, list):
        for part in value:
            _check_sizes(part, count, where, key)
    elif type(value) is int:
        most = count if re.search("layers|blocks|depth", key) else _LARGEST
        if "theta" not in key and abs(value) > most:
            raise CheckpointError(f"{where} has {key} = {value!s:.50}; expected at most {most} with {count} tensors")
    elif isinstance(value, float) and abs(value) > 1e12:
        raise CheckpointError(f"{where} has {key} = {value}; the file is damaged")


def _check_fits(model: nn.Module, tensors: dict[str, TensorInfo], folder: Path) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    for name, info in list(tensors.items()):
        if name in wanted:
            if info.shape != wanted[name]:
                wrong.append(f"{name} has the shape {info.shape}, expected {wanted[name]}")
        elif any(re.search(pattern, name) for pattern in ignored):
            del tensors[name]  # as diffusers does
        else:
            wrong.append(f"{name!r:.200} is no tensor of the model")
    if wrong:
        raise CheckpointError(
            f"{folder} does not hold a {type(model).__name__} of its config.json, in {len(wrong)} tensors: "
            f"{'; '.join(wrong[:3])}"
        )


def _from_original(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], folder: Path
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Give the tensors of an official Wan checkpoint diffusers' names, and make the config of their shapes."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    where = f"{folder} has the original Wan names"
    empty = {name: torch.empty(0, dtype=torch.float32, device="meta") for name in tensors}
    origin = {id(value): tensors[name] for name, value in empty.items()}
    try:
        renamed = convert_wan_transformer_to_diffusers(dict(empty))
    except Exception as cause:
        raise CheckpointError(f"{where}, but diffusers cannot convert them: {cause!s:.200}") from cause
    if any(id(value) not in origin for value in renamed.values()) or len(renamed) != len(tensors):
        raise CheckpointError(f"{where} of a variant whose tensors are cut or joined; convert it with diffusers first")
    shapes = {name.removeprefix("model.diffusion_model."): info.shape for name, info in tensors.items()}
    try:
        dim, channels, *patch = shapes["patch_embedding.weight"]
        heads = config.get("num_heads", dim // 128)
        if type(heads) is not int or heads < 1 or dim % heads:
            raise CheckpointError(f"{folder / 'config.json'} has num_heads = {heads!r:.50} for a width of {dim}")
        layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
        image = shapes.get("img_emb.proj.0.weight")
        found = {
            "_class_name": "WanTransformer3DModel",
            "patch_size": list(patch),
            "num_attention_heads": heads,
            "attention_head_dim": dim // heads,
            "in_channels": channels,
            "out_channels": shapes["head.head.weight"][0] // max(1, math.prod(patch)),
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "num_layers": len(layers),
            "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
            "qk_norm": "rms_norm_across_heads",
            "eps": config.get("eps", 1e-6),
            "image_dim": image[0] if image is not None else None,
            "added_kv_proj_dim": dim if image is not None else None,
        }
    except (KeyError, ValueError, IndexError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{where}, but {cause} is missing or has a strange shape") from cause
    return found, {name: origin[id(value)] for name, value in renamed.items()}
