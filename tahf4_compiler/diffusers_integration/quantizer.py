"""Loading and saving packed models through diffusers."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..errors import PackedError
from ..packed.config import Method, TaHF4Config, stand_ins
from ..packed.convert import dequantize_
from ..packed.linear import HiF4Linear
from ..packed.loading import Loading, Owner, Saving
from ..packed.state import PARTS

__all__ = ["TaHF4Quantizer", "register"]


class TaHF4Quantizer(DiffusersQuantizer):
    """What ``from_pretrained`` and ``save_pretrained`` ask for ``quant_method: "tahf4"``.

    A folder of a packed model is read as it is. With ``quantization_config=TaHF4Config(...)`` each weight is packed as
    it arrives, so that the original is never in memory as a whole.
    """

    use_keep_in_fp32_modules = True
    required_packages = ("accelerate",)
    owner: Owner

    def __init__(self, quantization_config: TaHF4Config, **kwargs: Any) -> None:
        """Keep a copy of the settings.

        ``from_single_file`` does not say whether its file is packed. diffusers then takes it for packed; a file of a
        packed model is refused by :meth:`maybe_update_state_dict`, so here it is taken for plain.
        """
        self._loading = Loading(quantization_config)
        super().__init__(self._loading.config, **{"pre_quantized": False, **kwargs})
        self._keys: set[str] = set()

    @property
    def is_serializable(self) -> bool:
        """Whether the model can be saved. diffusers asks this first, so the settings are brought up to date here.

        Raises:
            PackedError: the model could not be loaded again.
        """
        _saving.update(self)
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
        """Remember which tensors there are.

        Raises:
            PackedError: the settings say that they are packed, and all are plain.
        """
        if self.pre_quantized:
            self._loading.check_packed(loaded_keys)
        self._keys = set(loaded_keys)
        return [key for key in loaded_keys if key not in stand_ins(self.quantization_config.linears)]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hide multipliers as integers, so that they are not cast to the dtype of the model.

        Raises:
            PackedError: the tensors are those of a packed model, and nothing says how it was packed.
        """
        if not self.pre_quantized:
            self._loading.check_plain(state_dict)
            return state_dict
        for path in self.quantization_config.linears:
            value = state_dict.get(f"{path}.multiplier")
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                state_dict[f"{path}.multiplier"] = value.view(torch.int32)
        return state_dict

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what is written into a folder."""
        return {**state_dict, **stand_ins(self.quantization_config.linears)}, {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._loading.begin(model, self.pre_quantized, self._keys)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether :meth:`create_quantized_param` takes a tensor of the checkpoint."""
        path, _, leaf = param_name.rpartition(".")
        if not self.pre_quantized:
            return leaf == "weight" and path in self._loading.transforms
        return leaf in PARTS and path in self.quantization_config.linears

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
        value = param_value.to(target_device)
        linear = model.get_submodule(path)
        if not isinstance(linear, HiF4Linear):
            self._loading.pack(model, path, value)
            return
        if leaf == "multiplier" and value.dtype == torch.int32:
            value = value.view(torch.float32)
        linear._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._loading.finish(model, self.pre_quantized, lambda parameter: parameter.device.type != "meta")
        model.hf_quantizer = self
        _saving.remember(model, self._loading.config)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        quantizer = model.hf_quantizer
        dequantize_(model)
        model.hf_quantizer = quantizer  # the caller deletes it
        return model


def _mixin() -> type[nn.Module]:
    from diffusers import ModelMixin  # not yet importable when this module is

    mixin: type[nn.Module] = ModelMixin
    return mixin


def _empty(model: Any) -> nn.Module:
    with init_empty_weights():
        made: nn.Module = type(model).from_config(model.config)
    return made


def _tell(model: Any, config: TaHF4Config) -> None:
    model.register_to_config(quantization_config=config)


def _forget(model: Any) -> None:
    del model.hf_quantizer
    model.is_quantized = False
    settings = {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
    model._internal_dict = type(model._internal_dict)(settings)


_saving = Saving(TaHF4Quantizer, _mixin, _empty, _tell, _forget)


def register() -> None:
    """Add the quantizer to diffusers' tables, and let packed models save themselves."""
    auto.AUTO_QUANTIZER_MAPPING[Method.TAHF4.value] = TaHF4Quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.TAHF4.value] = TaHF4Config
    _saving.register()
