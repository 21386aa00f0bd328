"""A minimal stand-in for ComfyUI: what its loader, its patcher and its sampler do to a diffusion model.

ComfyUI is not on the package index. Each piece names the function whose behaviour it has; none of its code is here.
The behaviour is that of ComfyUI between October 2025 and 2026, with ``ModelPatcher`` (not ``ModelPatcherDynamic``).
"""

from __future__ import annotations

import copy
import logging
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import torch
from comfy_ops import CastWeightBiasOp, manual_cast
from comfy_wan import WanModel
from safetensors.torch import load_file
from torch import Tensor, nn


class LoRAAdapter:
    """``comfy.weight_adapter.LoRAAdapter``: up, down, alpha, mid, dora_scale, reshape."""

    name = "lora"

    def __init__(self, weights: tuple[Any, ...]):
        self.weights = weights

    def change(self, weight: Tensor, strength: float) -> Tensor:
        up, down, alpha = self.weights[:3]
        scale = alpha / down.shape[0] if alpha is not None else 1.0
        weight += strength * scale * (up.float() @ down.float()).to(weight.dtype)
        return weight


class LoKrAdapter:
    """``comfy.weight_adapter.LoKrAdapter``."""

    name = "lokr"

    def __init__(self, weights: tuple[Any, ...]):
        self.weights = weights


def load_lora(lora: dict[str, Tensor], to_load: dict[str, str]) -> dict[str, Any]:
    """``comfy.lora.load_lora``: the patch of each key of the model."""
    found: dict[str, Any] = {}
    for name, key in to_load.items():
        alpha = lora.get(f"{name}.alpha")
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
            if f"{name}.{up}.weight" in lora:
                factors = lora[f"{name}.{up}.weight"], lora[f"{name}.{down}.weight"]
                scale = alpha.item() if alpha is not None else None
                found[key] = LoRAAdapter((*factors, scale, None, lora.get(f"{name}.dora_scale"), None))
        if f"{name}.lokr_w1" in lora:
            found[key] = LoKrAdapter((lora[f"{name}.lokr_w1"], lora[f"{name}.lokr_w2"]))
        for kind, leaf in (("diff", "diff"), ("set", "set_weight")):
            if f"{name}.{leaf}" in lora:
                found[key] = (kind, (lora[f"{name}.{leaf}"],))
        if f"{name}.diff_b" in lora:
            found[key.removesuffix("weight") + "bias"] = ("diff", (lora[f"{name}.diff_b"],))
    return found


def model_lora_keys_unet(model: nn.Module) -> dict[str, str]:
    """``comfy.lora.model_lora_keys_unet``: the names that a LoRA may have for each key of the state."""
    found = {}
    for key in model.state_dict():
        if key.startswith("diffusion_model.") and key.endswith(".weight"):
            path = key.removesuffix(".weight")
            found[path] = found["lora_unet_" + path.removeprefix("diffusion_model.").replace(".", "_")] = key
    return found


def calculate_weight(patches: list[Any], weight: Tensor) -> Tensor:
    """``comfy.lora.calculate_weight``, which writes to the weight that it is given."""
    for strength, patch, strength_model, _, _ in patches:
        weight *= strength_model
        if isinstance(patch, LoRAAdapter):
            weight = patch.change(weight, strength)
        elif isinstance(patch, list):  # another model's weight, as merging puts it
            weight += strength * patch[0][0].to(weight.dtype)
        elif patch[0] == "diff":
            weight += strength * patch[1][0].to(weight.dtype)
        else:
            weight.copy_(patch[1][0])
    return weight


class LowVramPatch:
    """``comfy.model_patcher.LowVramPatch``: the patches of a weight that stays on the offload device."""

    def __init__(self, key: str, patches: dict[str, list[Any]]):
        self.key, self.patches = key, patches

    def __call__(self, weight: Tensor) -> Tensor:
        return calculate_weight(self.patches[self.key], weight)


def module_size(module: nn.Module) -> int:
    """``comfy.model_management.module_size``."""
    return sum(value.nelement() * value.element_size() for value in module.state_dict().values())


class ModelPatcher:
    """``comfy.model_patcher.ModelPatcher``."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device, size: int = 0):
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.patches: dict[str, list[Any]] = {}
        self.backup: dict[str, Tensor] = {}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.patches_uuid = uuid.uuid4()
        for name, value in (("model_loaded_weight_memory", 0), ("current_weight_patches_uuid", None)):
            if not hasattr(model, name):
                setattr(model, name, value)
        self.model_size()

    def model_size(self) -> int:
        self.size = self.size or module_size(self.model)
        return self.size

    def clone(self) -> ModelPatcher:
        other = type(self)(self.model, self.load_device, self.offload_device, self.size)
        other.patches = {key: list(value) for key, value in self.patches.items()}
        other.patches_uuid, other.backup = self.patches_uuid, self.backup
        for name in ("callbacks", "wrappers"):
            own = {kind: {k: list(v) for k, v in keys.items()} for kind, keys in getattr(self, name).items()}
            setattr(other, name, own)
        return other

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def _call_back(self, kind: str, *args: Any) -> None:
        for found in self.callbacks.get(kind, {}).values():
            for callback in found:
                callback(self, *args)

    def add_patches(
        self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]:
        state, found = self.model.state_dict(), []
        for key, patch in patches.items():
            if key in state:
                self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, None, None))
                found.append(key)
        self.patches_uuid = uuid.uuid4()
        return found

    def get_key_patches(self) -> dict[str, list[Any]]:
        """What merging nodes take of a model: each key of the state with its weight."""
        found = {}
        for key in self.model.state_dict():
            path, _, leaf = key.rpartition(".")
            found[key] = [(getattr(self.model.get_submodule(path), leaf), None), *self.patches.get(key, [])]
        return found

    def patch_weight_to_device(self, key: str) -> None:
        if key not in self.patches:
            return
        path, _, leaf = key.rpartition(".")
        weight = getattr(self.model.get_submodule(path), leaf)
        self.backup.setdefault(key, weight.to(self.offload_device))
        self._put(key, calculate_weight(self.patches[key], weight.to(torch.float32, copy=True)).to(weight.dtype))

    def _put(self, key: str, value: Tensor) -> None:
        path, _, leaf = key.rpartition(".")
        setattr(self.model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))

    def load(
        self, device: torch.device, memory: int = 0, force_patch_weights: bool = False, full: bool = False
    ) -> None:
        """Of each module that fits, patch what ``named_parameters`` names; the others patch in each call."""
        used = 0
        modules = []
        for path, module in self.model.named_modules():
            own = [name for name, _ in module.named_parameters(recurse=False)]
            holds = bool(own) or hasattr(module, "comfy_cast_weights")
            if holds and len(own) == len(list(module.named_parameters())):
                modules.append((module_size(module), path, module, own))
        for size, path, module, own in sorted(modules, key=lambda found: -found[0]):
            casts = hasattr(module, "comfy_cast_weights")
            if casts:
                module.weight_function, module.bias_function = [], []
            if not full and casts and used + size >= memory:
                for leaf in ("weight", "bias"):
                    if (key := f"{path}.{leaf}") in self.patches:
                        if force_patch_weights:
                            self.patch_weight_to_device(key)
                        else:
                            setattr(module, f"{leaf}_function", [LowVramPatch(key, self.patches)])
                module.comfy_cast_weights = True
                continue
            used += size
            for name in own:
                self.patch_weight_to_device(f"{path}.{name}")
            module.to(device)
        self.model.model_loaded_weight_memory = used
        self.model.current_weight_patches_uuid = self.patches_uuid
        self._call_back("on_load_after", device, memory, force_patch_weights, full)

    def unpatch_model(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.weight_function, module.bias_function = [], []
        for key, value in self.backup.items():
            self._put(key, value)
        self.backup.clear()
        self.model.to(self.offload_device)
        self.model.model_loaded_weight_memory = 0
        self.model.current_weight_patches_uuid = None

    def partially_load(self, device: torch.device, memory: int = 0, force_patch_weights: bool = False) -> None:
        """With memory for the whole model or a part; nothing happens where the same patches are loaded."""
        current = self.model.current_weight_patches_uuid
        if current is not None and (current != self.patches_uuid or force_patch_weights):
            self.unpatch_model()
        elif current is not None and self.model.model_loaded_weight_memory > 0:
            return
        try:
            self.load(device, memory, force_patch_weights, full=memory > self.model_size())
        except Exception:
            self.detach()
            raise

    def detach(self, unpatch_all: bool = True) -> None:
        if unpatch_all:
            self.unpatch_model()
        self._call_back("on_detach_after", unpatch_all)

    def __del__(self) -> None:
        self.detach(unpatch_all=False)  # whatever other clone is loaded stays loaded


class BaseModel(nn.Module):
    """``comfy.model_base.WAN21``, with the flow of ``ModelSamplingDiscreteFlow`` and ``CONST``."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, compute: torch.dtype, operations: Any):
        super().__init__()
        self.manual_cast_dtype, self.device = compute, None
        self.diffusion_model = WanModel(**config, device=None, dtype=dtype, operations=operations)
        self.diffusion_model.requires_grad_(False)

    def load_model_weights(self, state: dict[str, Tensor]) -> None:
        missing, unexpected = self.diffusion_model.load_state_dict(state, strict=False)
        for what, keys in (("missing", missing), ("unexpected", unexpected)):
            if keys:
                logging.warning("unet %s: %s", what, keys)

    def apply_model(
        self, x: Tensor, t: Tensor, c_concat=None, c_crossattn=None, control=None, transformer_options=None
    ):
        """Run the wrappers of ``WrappersMP.APPLY_MODEL`` around the model, as ``WrapperExecutor`` does."""
        options = transformer_options or {}
        found = [w for ws in options.get("wrappers", {}).get("apply_model", {}).values() for w in ws]

        return Executor(self, found)(x, t, c_concat, c_crossattn, control, options)

    def _apply_model(self, x: Tensor, t: Tensor, c_concat: Any, context: Tensor, control: Any, options: Any) -> Tensor:
        inputs = x.to(self.manual_cast_dtype), t * 1000, context.to(self.manual_cast_dtype)
        return x - self.diffusion_model(*inputs, transformer_options={**options}).float() * t.view(-1, 1, 1, 1, 1)


class Executor:
    """``comfy.patcher_extension.WrapperExecutor`` around ``apply_model``."""

    def __init__(self, model: BaseModel, wrappers: list[Any]):
        self.class_obj, self.wrappers = model, wrappers

    def __call__(self, *args: Any) -> Tensor:
        if not self.wrappers:
            return self.class_obj._apply_model(*args)
        return self.wrappers[0](Executor(self.class_obj, self.wrappers[1:]), *args)


def set_torch_compile_wrapper(model: ModelPatcher, backend: str, options: Any = None, keys: Any = ()) -> None:
    """``comfy_api.torch_helpers.set_torch_compile_wrapper``: compiled parts stand in the model while it is applied."""
    kind, key = "apply_model", "torch.compile"
    model.remove_wrappers_with_key(kind, key)
    compiled = {
        name: torch.compile(model.get_model_object(name), backend=backend, options=options)
        for name in keys or ["diffusion_model"]
    }

    def call(run: Executor, *args: Any) -> Tensor:
        originals = {name: getattr(run.class_obj, name) for name in compiled}
        try:
            for name, part in compiled.items():
                setattr(run.class_obj, name, part)
            return run(*args)
        finally:
            for name, part in originals.items():
                setattr(run.class_obj, name, part)

    model.add_wrapper_with_key(kind, key, call)


def detect_unet_config(state: dict[str, Tensor]) -> dict[str, Any] | None:
    """``comfy.model_detection.detect_unet_config``: sizes from the shapes of tensors."""
    if "head.modulation" not in state:
        return None
    dim = state["head.modulation"].shape[-1]
    return {
        "dim": dim,
        "out_dim": state["head.head.weight"].shape[0] // 4,
        "num_heads": dim // 128,
        "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "in_dim": state["patch_embedding.weight"].shape[1],
        "freq_dim": 256,
        "text_dim": 4096,
    }


def load_diffusion_model_state_dict(
    sd: dict[str, Tensor], model_options: Any = None, metadata: Any = None, disable_dynamic: bool = False
) -> ModelPatcher | None:
    """``comfy.sd.load_diffusion_model_state_dict``, of a machine that computes in the dtype of most values."""
    assert disable_dynamic, "the dynamic patcher moves weight and bias of a linear alone"
    config = detect_unet_config(sd)
    if config is None:
        return None
    counts: dict[torch.dtype, int] = {}
    for value in sd.values():
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    dtype = (model_options or {}).get("dtype") or max(counts, key=lambda found: counts[found])  # weight_dtype
    assert dtype.is_floating_point, dtype
    operations = (model_options or {}).get("custom_operations", manual_cast)
    model = BaseModel(config, dtype, dtype, operations).to(torch.device("cpu")).eval()
    model.load_model_weights(sd)
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def load_lora_for_models(model: ModelPatcher, clip: Any, lora: Any, strength_model: float, strength_clip: float) -> Any:
    """``comfy.sd.load_lora_for_models``."""
    changed = model.clone()
    changed.add_patches(load_lora(lora, model_lora_keys_unet(model.model)), strength_model)
    return changed, clip


@torch.inference_mode()
def sample(patcher: ModelPatcher, noise: Tensor, context: Tensor, sigmas: Tensor, memory: int | None = None) -> Tensor:
    """``comfy.sample.sample`` with Euler and no guidance: the model is loaded first, as ``load_models_gpu`` does."""
    patcher.partially_load(patcher.load_device, memory if memory is not None else 2 * patcher.model_size())
    options = {"sample_sigmas": sigmas, "wrappers": copy.copy(patcher.wrappers), "cond_or_uncond": [0]}
    x = noise * sigmas[0]
    for sigma, after in zip(sigmas[:-1], sigmas[1:]):
        options |= {"sigmas": sigma.repeat(len(x)), "uuids": [uuid.uuid4()]}
        denoised = patcher.model.apply_model(x, sigma.repeat(len(x)), c_crossattn=context, transformer_options=options)
        x = x + (x - denoised) / sigma * (after - sigma)
    return x


def install(monkeypatch: Any, models: Path) -> None:
    """Put the stand-in where ``import comfy`` and ``import folder_paths`` find it, with a folder of models."""
    here = sys.modules[__name__]

    def put(name: str, **values: Any) -> None:
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)

    put("comfy")
    put("comfy.ops", manual_cast=manual_cast, CastWeightBiasOp=CastWeightBiasOp)
    put("comfy.utils", load_torch_file=lambda path, safe_load=False: load_file(path))
    put("comfy.model_patcher", ModelPatcher=ModelPatcher, LowVramPatch=LowVramPatch)
    put(
        "comfy.sd",
        **{name: getattr(here, name) for name in ("load_diffusion_model_state_dict", "load_lora_for_models")},
    )
    callbacks = types.SimpleNamespace(ON_LOAD="on_load_after", ON_DETACH="on_detach_after")
    wrappers = types.SimpleNamespace(APPLY_MODEL="apply_model")
    put("comfy.patcher_extension", CallbacksMP=callbacks, WrappersMP=wrappers)
    put("comfy_api")
    put("comfy_api.torch_helpers", set_torch_compile_wrapper=set_torch_compile_wrapper)

    def names(kind: str) -> list[str]:
        return sorted(str(path.relative_to(models / kind)) for path in (models / kind).rglob("*.safetensors"))

    def full(kind: str, name: str) -> str | None:
        return str(models / kind / name) if (models / kind / name).is_file() else None

    def full_or_raise(kind: str, name: str) -> str:
        if (found := full(kind, name)) is None:
            raise FileNotFoundError(name)
        return found

    put("folder_paths", get_filename_list=names, get_full_path=full, get_full_path_or_raise=full_or_raise)
