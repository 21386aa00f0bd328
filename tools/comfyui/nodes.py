"""The nodes."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.torch_helpers import set_torch_compile_wrapper

from tahf4_compiler.errors import OptionError, PackedError
from tahf4_compiler.model.attachments import leave_as_they_are
from tahf4_compiler.packed.convert import packed_linears
from tahf4_compiler.packed.loading import not_packed

from . import checkpoint
from .adapters import follow, original_names, with_alphas
from .linear import operations
from .steps import set_bits

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_FOLDER = "diffusion_models"


class DiffusionModelLoader:
    """Loads a packed Wan model: a folder of ``tahf4 quantize`` or a single file, in ComfyUI's diffusion_models."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"
    CATEGORY = "advanced/loaders"
    DESCRIPTION = "Loads a Wan model that tahf4 packed to 4 bits. Wan2.2 has two experts: load each with a node."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs: the packed folders, then all files outside of them."""
        return {"required": {"model_name": (_choices(),)}}

    def load_model(self, model_name: str) -> tuple[Any]:
        """Return a ``ModelPatcher``.

        Raises:
            PackedError: it is no packed Wan model, or ComfyUI does not know it.
            CheckpointError: a file is damaged or missing.
        """
        path = _path(model_name)
        state, config = checkpoint.read(path, comfy.utils.load_torch_file)
        load = comfy.sd.load_diffusion_model_state_dict
        # Its newer way of loading moves weight and bias alone, and leaves everything else that a linear holds behind.
        static = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(load).parameters else {}
        model = load(state, model_options={"custom_operations": operations(config.linears)}, **static)
        if model is None:
            raise PackedError(f"ComfyUI does not know the model in {path}; it needs a version that runs Wan2.2")
        found = packed_linears(model.model.diffusion_model)
        if lacking := sorted(config.linears.keys() - found.keys()):
            raise PackedError(f"{path} packs {lacking[0]}, which ComfyUI's model has not; update ComfyUI or tahf4")
        if config.high_precision_steps:
            logging.warning(
                "tahf4: %s was packed with more bits in the steps %s; the node TAHF4 Activation Bits does this here",
                *(path, ", ".join(map(str, config.high_precision_steps))),
            )
        # Whoever compiles the model gets 4 bits where it is packed, and nowhere else.
        leave_as_they_are(model.model.diffusion_model, not_packed(model.model.diffusion_model))
        follow(model)
        return (model,)


class LoraLoader:
    """Loads a LoRA, also one with the names of diffusers, which ComfyUI's own node does not know for Wan."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_lora"
    CATEGORY = "loaders"
    DESCRIPTION = "Adds a LoRA to a Wan model, with the names of diffusers or any that ComfyUI knows."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs."""
        strength = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})
        names = folder_paths.get_filename_list("loras")
        return {"required": {"model": ("MODEL",), "lora_name": (names,), "strength_model": strength}}

    def load_lora(self, model: Any, lora_name: str, strength_model: float) -> tuple[Any]:
        """Return a clone of the model with the LoRA.

        Raises:
            PackedError: nothing in the file belongs to the model, or its header says that it is no plain LoRA.
        """
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        lora = original_names(with_alphas(comfy.utils.load_torch_file(path, safe_load=True), path))
        changed, _ = comfy.sd.load_lora_for_models(model, None, lora, strength_model, 0)
        if {k: len(v) for k, v in changed.patches.items()} == {k: len(v) for k, v in model.patches.items()}:
            raise PackedError(f"no tensor of {path} belongs to this model, among them {next(iter(lora), 'none')}")
        return (changed,)


class ActivationBits:
    """Gives the activations of packed linears more bits, in all steps of a sampler or in some."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "set_bits"
    CATEGORY = "advanced/model"
    DESCRIPTION = "More bits for the activations of a packed model, in some steps of its sampler or in all."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs."""
        return {
            "required": {
                "model": ("MODEL",),
                "bits": (["8", "16"],),
                "steps": ("STRING", {"default": "0", "tooltip": "such as 0, 1, -1; from the end if negative; or all"}),
            }
        }

    def set_bits(self, model: Any, bits: str, steps: str) -> tuple[Any]:
        """Return a clone of the model.

        Raises:
            OptionError: the steps are no list of whole numbers.
            PackedError: nothing in the model is packed.
        """
        if not packed_linears(model.model):
            raise PackedError("no linear of this model is packed; load it with TAHF4 Diffusion Model Loader")
        try:
            wanted = None if steps.strip() == "all" else [int(step) for step in steps.split(",")]
        except ValueError:
            raise OptionError(f"steps is {steps!r}; expected numbers with commas between, or all") from None
        changed = model.clone()
        set_bits(changed, int(bits), wanted)
        return (changed,)


class CompileModel:
    """Compiles a diffusion model, packed or plain, with ``torch.compile(..., backend="tahf4")``."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "compile_model"
    CATEGORY = "advanced/model"
    DESCRIPTION = "Compiles a model with tahf4. The linears of a plain model run in 4 bits then, too."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs."""
        return {"required": {"model": ("MODEL",)}}

    def compile_model(self, model: Any) -> tuple[Any]:
        """Return a clone of the model that is compiled when it first samples."""
        changed = model.clone()
        set_torch_compile_wrapper(changed, backend="tahf4")
        return (changed,)


def _choices() -> list[str]:
    files = [name for name in folder_paths.get_filename_list(_FOLDER) if name.endswith(".safetensors")]
    folders = {folder for folder in map(os.path.dirname, files) if folder and _config(folder) is not None}
    return sorted(folders) + [name for name in files if os.path.dirname(name) not in folders]


def _config(folder: str) -> Path | None:
    """Return the path of the ``config.json`` of a folder in ComfyUI's folders, if it describes a packed model."""
    path = folder_paths.get_full_path(_FOLDER, os.path.join(folder, "config.json"))
    return Path(path) if path is not None and checkpoint.is_packed(Path(path).parent) else None


def _path(name: str) -> Path:
    config = _config(name)
    return config.parent if config is not None else Path(folder_paths.get_full_path_or_raise(_FOLDER, name))


NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "TAHF4DiffusionModelLoader": DiffusionModelLoader,
    "TAHF4LoraLoader": LoraLoader,
    "TAHF4ActivationBits": ActivationBits,
    "TAHF4CompileModel": CompileModel,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "TAHF4DiffusionModelLoader": "TAHF4 Diffusion Model Loader",
    "TAHF4LoraLoader": "TAHF4 LoRA Loader",
    "TAHF4ActivationBits": "TAHF4 Activation Bits",
    "TAHF4CompileModel": "TAHF4 Compile Model",
}
