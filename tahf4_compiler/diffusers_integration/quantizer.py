"""Loading and saving packed models through diffusers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..errors import PackedError, RecipeError
from ..model.attachments import leave_as_they_are
from ..packed.convert import dequantize_, observers, pack_modules, packed_linears
from ..packed.linear import HiF4Linear
from ..packed.plan import plan_modules, plan_transforms
from ..packed.transform import Transform
from ..recipe.recipe import Recipe
from ..weights.checksum import checksum
from ..weights.packing import warn_not_finite
from .config import Method, TaHF4Config, describe

__all__ = ["TaHF4Quantizer", "register"]

_PARTS = ("weight_codes", "weight_scales", "multiplier")


class TaHF4Quantizer(DiffusersQuantizer):
    """What ``from_pretrained`` and ``save_pretrained`` ask for ``quant_method: "tahf4"``.

    A folder of a packed model is read as it is. With ``quantization_config=TaHF4Config(...)`` each weight is packed as
    it arrives, so that the original is never in memory as a whole.
    """

    use_keep_in_fp32_modules = True
    required_packages = ("accelerate",)

    def __init__(self, quantization_config: TaHF4Config, **kwargs: Any) -> None:
        """Keep a copy of the settings: two components may be given the same object."""
        super().__init__(copy.copy(quantization_config), **kwargs)
        self._transforms: dict[str, Transform] = {}
        self._reasons: dict[str, str] = {}
        self._sums: dict[str, int] = {}
        self._keys: set[str] = set()
        self._not_finite: list[str] = []

    @property
    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients flow; 4-bit codes have none."""
        return False

    @property
    def supports_parallel_loading(self) -> bool:
        """Whether several files are read at once: not while packing, which would hold several weights."""
        return bool(self.pre_quantized)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of all that is not packed: diffusers' default, said plainly."""
        return torch_dtype if torch_dtype is not None else torch.float32

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember which tensors there are."""
        self._keys = set(loaded_keys)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hide multipliers as integers, so that they are not cast to the dtype of the model."""
        paths = self.quantization_config.linears if self.pre_quantized else {}
        for path in paths:
            value = state_dict.get(f"{path}.multiplier")
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                state_dict[f"{path}.multiplier"] = value.view(torch.int32)
        return state_dict

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            _put_empty(model, config, self._keys)
            return
        plan = plan_modules(model, config.recipe, config.keep, expert=config.expert)
        self._transforms = plan_transforms(model, plan, config.recipe, expert=config.expert)
        self._reasons = {d.module: d.reason for d in plan if d.decision != "hif4"}
        if config.recipe is not None and config.recipe.high_precision_steps:
            raise PackedError(
                "the recipe runs some steps in high precision, which needs the original weights; a packed model has "
                "none. Use tahf4.apply_recipe with torch.compile, or a recipe without such steps."
            )
        if config.recipe is not None and config.check_weights:
            name = config.expert if config.expert is not None else next(iter(config.recipe.experts))
            self._sums = {path: linear.weight_sum for path, linear in config.recipe.linears(name).items()}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether :meth:`create_quantized_param` takes a tensor of the checkpoint."""
        path, _, leaf = param_name.rpartition(".")
        if not self.pre_quantized:
            return leaf == "weight" and path in self._transforms
        return leaf in _PARTS and path in self.quantization_config.linears

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Raise :class:`PackedError` for a tensor of another shape than its linear's."""
        raise PackedError(
            f"{param_name} has shape {tuple(loaded_param.shape)}, expected {tuple(current_param.shape)}; the "
            "checkpoint is damaged or belongs to another model"
        )

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Put a packed tensor in its place, or pack a weight and replace its linear."""
        path, _, leaf = param_name.rpartition(".")
        linear = model.get_submodule(path)
        value = param_value.to(target_device)
        if isinstance(linear, HiF4Linear):
            if leaf == "multiplier":
                value = value.view(torch.float32) if value.dtype == torch.int32 else value
            wanted = linear._parameters[leaf]
            if wanted is None or value.dtype != wanted.dtype:
                expected = wanted.dtype if wanted is not None else "no such tensor"
                raise PackedError(f"{param_name} is of {value.dtype}, expected {expected}; the checkpoint is damaged")
            linear._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            return
        assert isinstance(linear, nn.Linear)
        if path in self._sums and int(checksum(value)) != self._sums[path]:
            raise RecipeError(
                f"{path} has other weights than those that were calibrated, in this precision. "
                "TaHF4Config(..., check_weights=False) accepts them."
            )
        linear._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        with torch.no_grad():
            self._not_finite += pack_modules(model, {path: self._transforms[path]})

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config, found = self.quantization_config, packed_linears(model)
        expected = config.linears if self.pre_quantized else self._transforms
        lacking = [
            path
            for path in expected
            if path not in found or any(p.device.type == "meta" for p in found[path].parameters())
        ]
        if lacking:
            raise PackedError(
                f"the checkpoint lacks tensors of {len(lacking)} packed linears ({', '.join(lacking[:3])}); it is not "
                "complete"
            )
        warn_not_finite(self._not_finite, config.expert or "")
        for linear in found.values():
            if linear.bias is not None:
                linear.weight_dtype = linear.bias.dtype
        if self.pre_quantized:
            plain = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, HiF4Linear)]
            self._reasons = dict.fromkeys(plain, "not packed in the checkpoint")
        leave_as_they_are(model, self._reasons)
        _remember(model, config)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        quantizer = model.hf_quantizer
        dequantize_(model)
        model.hf_quantizer = quantizer  # the caller deletes it
        return model


def _put_empty(model: nn.Module, config: TaHF4Config, keys: set[str]) -> None:
    """Put empty packed linears in the places that a checkpoint names."""
    for path, values in config.linears.items():
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = nn.Identity()
        if type(linear) is not nn.Linear:
            raise PackedError(f"the checkpoint has a packed linear {path}; {type(model).__name__} has none there")
        if (linear.in_features, linear.out_features) != (values["k"], values["n"]):
            raise PackedError(
                f"the checkpoint has {path} with {values['k']} -> {values['n']} features; the model has "
                f"{linear.in_features} -> {linear.out_features}"
            )
        parent, _, name = path.rpartition(".")
        empty = HiF4Linear(
            values["k"],
            values["n"],
            linear.bias is not None,
            hadamard_block=values["hadamard_block"],
            multiplies=f"{path}.multiplier" in keys,
            activation=values["activation"],
            device="meta",
            dtype=getattr(torch, values["dtype"]),
        )
        setattr(model.get_submodule(parent), name, empty.train(linear.training))


class _Saving:
    """Lets a model of diffusers save itself as packed."""

    def packed(self, model: nn.Module, recipe: Recipe | None, keep: Sequence[str]) -> None:
        if _is_mixin(model):
            _remember(model, TaHF4Config(recipe, keep=keep))

    def unpacked(self, model: Any) -> None:
        if not _is_mixin(model) or not isinstance(getattr(model, "hf_quantizer", None), TaHF4Quantizer):
            return
        del model.hf_quantizer
        model.is_quantized = False
        settings = {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
        model._internal_dict = type(model._internal_dict)(settings)


def _is_mixin(model: nn.Module) -> bool:
    from diffusers import ModelMixin  # not yet importable when this module is

    return isinstance(model, ModelMixin)


def _remember(model: Any, config: TaHF4Config) -> None:
    config.linears = describe(model)
    if getattr(model, "hf_quantizer", None) is None:
        model.hf_quantizer = TaHF4Quantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, Method.TAHF4
    model.register_to_config(quantization_config=config)


def register() -> None:
    """Add the quantizer to diffusers' tables, and let packed models save themselves."""
    auto.AUTO_QUANTIZER_MAPPING[Method.TAHF4.value] = TaHF4Quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.TAHF4.value] = TaHF4Config
    if not any(isinstance(observer, _Saving) for observer in observers):
        observers.append(_Saving())
