"""LoRA beside the 4-bit products of packed linears, where ComfyUI would patch the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy.patcher_extension import CallbacksMP
from safetensors import safe_open
from torch import Tensor

from tahf4_compiler.errors import PackedError
from tahf4_compiler.packed.linear import BRANCH
from tahf4_compiler.packed.state import PARTS

from .linear import PackedLinear
from .names import to_original

__all__ = ["follow", "original_names", "with_alphas"]

_KEY = "tahf4"
_HEADER = "lora_adapter_metadata"  # where diffusers writes what PEFT was told


def follow(patcher: Any) -> None:
    """Let a ``ModelPatcher`` and its clones give packed linears their LoRA when the model is loaded.

    ComfyUI loads a model again whenever other patches belong to it, so what was given last is what belongs to it.
    """
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, _KEY, _loaded)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _KEY, _detached)


def original_names(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a LoRA with diffusers' names those which ComfyUI looks for; others keep theirs."""
    renamed = {}
    for key, value in lora.items():
        found = to_original(key.removeprefix("transformer."))
        renamed[key if found is None else f"diffusion_model.{found}"] = value
    return renamed


def with_alphas(lora: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Add the alphas that diffusers writes into a file's header, as tensors beside the factors: ComfyUI reads these.

    Args:
        lora: the tensors of the file, with diffusers' names ``transformer.P.lora_A.weight``, or others.
        path: the file.

    Raises:
        PackedError: the header cannot be read, has an alpha that is no number, or says that the file is no plain LoRA.
    """
    if Path(path).suffix != ".safetensors":
        return lora
    with safe_open(str(path), "pt") as file:
        text = (file.metadata() or {}).get(_HEADER, "{}")
    try:
        settings = dict(json.loads(text))
    except (ValueError, TypeError):
        raise PackedError(f"{path}: {_HEADER} in its header is no JSON object; save the LoRA again") from None
    found = dict(lora)
    for key, down in lora.items():
        whole, is_down, _ = key.partition(".lora_A.")
        model, _, module = whole.partition(".")
        own = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{model}.")}
        if not is_down or "lora_alpha" not in own or f"{whole}.alpha" in lora:
            continue
        if own.get("use_dora"):
            raise PackedError(f"{path} is a LoRA with a scale of its norms (DoRA), which runs beside no packed linear")
        patterns = (own.get("alpha_pattern") or {}).items()
        alpha = next((a for p, a in patterns if re.match(rf"(.*\.)?({p})$", module)), own["lora_alpha"])
        if not isinstance(alpha, int | float):
            where = f"{path}: the alpha of {whole} in its header"
            raise PackedError(f"{where} is {alpha!r}; expected a number; save the LoRA again")
        # ComfyUI divides by the rank; with rsLoRA PEFT divides by its root.
        found[f"{whole}.alpha"] = torch.tensor(float(alpha) * (down.shape[0] ** 0.5 if own.get("use_rslora") else 1.0))
    return found


def _loaded(patcher: Any, device: Any, memory: int, force_patch_weights: bool, *others: Any) -> None:
    linears = _packed(patcher.model)
    if force_patch_weights and linears:
        raise PackedError(
            "ComfyUI asks for the patched weights of a packed model, as it does to save one or to extract a LoRA, and "
            "packed linears have none. The packed file is the model; use the plain model for this."
        )
    adapters = {}
    for path, linear in linears.items():
        for leaf in (*PARTS, *BRANCH):
            if f"{path}.{leaf}" in patcher.patches:
                raise _refused(f"{path}.{leaf}", "changes codes or scales, as merging models does")
        patches = patcher.patches.get(f"{path}.weight", ())
        adapters[path] = _factors(f"{path}.weight", patches, linear, device) if patches else None
    for path, linear in linears.items():
        linear.adapter = adapters[path]


def _detached(patcher: Any, unpatch_all: bool, *others: Any) -> None:
    if not unpatch_all:  # a clone is deleted, and another may be loaded
        return
    for linear in _packed(patcher.model).values():
        linear.adapter = None


def _packed(model: Any) -> dict[str, PackedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def _factors(key: str, patches: Sequence[Any], linear: PackedLinear, device: Any) -> tuple[Tensor, Tensor]:
    """Return ``[K, r]`` and ``[r, N]``, whose product is the sum of all patches of a weight, each by its strength."""
    downs, ups = [], []
    for strength, patch, strength_model, offset, function in patches:
        weights = getattr(patch, "weights", None)
        if getattr(patch, "name", "") != "lora" or not isinstance(weights, Sequence):
            kind = patch[0] if isinstance(patch, tuple) and isinstance(patch[0], str) else "diff"
            raise _refused(key, f"is of the kind {getattr(patch, 'name', kind)}")
        up, down, alpha, *more = weights
        if any(value is not None for value in more):
            raise _refused(key, "is a LoRA with a scale of its norms (DoRA), a middle factor or another shape")
        if strength_model != 1.0 or offset is not None or function is not None:
            raise _refused(key, "is for a part of the weight, or scales it")
        up, down = up.flatten(1).to(torch.float32), down.flatten(1).to(torch.float32)
        rank = down.shape[0]
        if up.shape != (linear.out_features, rank) or down.shape != (rank, linear.in_features):
            raise _refused(
                key,
                f"has factors {tuple(up.shape)} and {tuple(down.shape)}, and the weight is "
                f"({linear.out_features}, {linear.in_features}): it belongs to another model",
            )
        downs.append(down)
        ups.append(up * (strength * (float(alpha) / rank if alpha is not None else 1.0)))
    to = {"device": device, "dtype": linear.weight_dtype}
    return torch.cat(downs).t().contiguous().to(**to), torch.cat(ups, dim=1).t().contiguous().to(**to)


def _refused(key: str, what: str) -> PackedError:
    return PackedError(
        f"a patch of {key} {what}. This linear is packed: beside its 4-bit product runs LoRA of two factors alone. "
        "Take the patch off, or apply it to the plain model and pack the result."
    )
