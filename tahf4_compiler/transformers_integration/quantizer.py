"""Loading and saving packed models through transformers: text encoders, and language models."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ..errors import Tahf4Error
from ..packed.config import Method, TaHF4Config, stand_ins
from ..packed.convert import dequantize_
from ..packed.linear import BRANCH
from ..packed.loading import Loading, Owner, Saving
from ..packed.state import PARTS
from ..torch_private.frames import callers

__all__ = ["TaHF4HfQuantizer", "register"]

_ARRIVED = "_is_hf_initialized"
"""The mark that transformers puts on a parameter whose values need no initialization."""


class TaHF4HfQuantizer(HfQuantizer):
    """What ``from_pretrained`` and ``save_pretrained`` ask for ``quant_method: "tahf4"``.

    A folder of a packed model is read as it is. With ``quantization_config=TaHF4Config(...)`` each weight is packed as
    it arrives, so that the original is never in memory as a whole.
    """

    owner: Owner

    def __init__(self, quantization_config: TaHF4Config, **kwargs: Any) -> None:
        """Keep a copy of the settings."""
        self.loading = Loading(quantization_config)
        self.failed: Tahf4Error | None = None
        super().__init__(self.loading.config, **kwargs)

    def is_serializable(self) -> bool:
        """Whether the model can be saved. transformers asks this first, so the settings are brought up to date here.

        Raises:
            PackedError: the model could not be loaded again.
        """
        if not getattr(self.owner(), "_hf_peft_config_loaded", False):  # else the adapter alone is saved
            _saving.update(self)
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients flow; 4-bit codes have none."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        keys: set[str] = set()
        for file in checkpoint_files or ():
            if file.endswith(".safetensors"):
                with safe_open(file, "pt") as tensors:
                    keys.update(tensors.keys())
        if not self.pre_quantized:
            self.loading.check_plain(keys)
        elif keys:
            self.loading.check_packed(keys)
        linears = self.loading.config.linears
        ignored = {f"{re.escape(name)}$" for name in stand_ins(linears)}
        model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())
        self.loading.config.linears = dict(zip(_paths(model, linears), linears.values(), strict=True))
        # transformers ties weights after loading; the plan has to know, since a weight that others read is not packed.
        for name, source in model.all_tied_weights_keys.items():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path).register_parameter(leaf, model.get_parameter(source))
        self.loading.begin(model, self.pre_quantized)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return what is written into a folder, or None for what an adapter alone writes."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        # save_pretrained does not pass on what it got.
        saver = next((caller for caller in callers() if caller.name == "save_pretrained"), None)
        given = saver.variable("state_dict") if saver is not None else None
        state = given if given is not None else model.state_dict()
        return {**state, **stand_ins(self.quantization_config.linears)}, {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a weight of the checkpoint is packed as it arrives."""
        path, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and path in self.loading.transforms

    def get_quantize_ops(self) -> ConversionOps:
        """Return what packs a weight."""
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failed is not None:
            raise self.failed
        self.loading.finish(model, self.pre_quantized, lambda parameter: getattr(parameter, _ARRIVED, False))
        model.hf_quantizer = self
        _saving.remember(model, self.loading.config)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_(model)
        return model


def _paths(model: Any, paths: Iterable[str]) -> Iterator[str]:
    """Yield where linears of a checkpoint are in a model: transformers loads a model with its head, and without."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    for path in paths:
        places = path, path.removeprefix(prefix), f"{prefix}{path}"
        yield next((place for place in places if place in modules), path)


class _Pack(ConversionOps):
    """Packs a weight that has arrived, instead of putting it into the model."""

    def __init__(self, quantizer: TaHF4HfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: Mapping[str, Any], *args: Any, model: Any, missing_keys: Any, **kwargs: Any) -> Any:
        """Return the tensors that are not packed."""
        others = {}
        for name, value in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, name):
                others[name] = value
                continue
            if missing_keys is not None:
                missing_keys.discard(name)
            if self.quantizer.failed is None:
                self._pack(model, name.rpartition(".")[0], value[0] if isinstance(value, list) else value)
        return others

    def _pack(self, model: Any, path: str, weight: Tensor) -> None:
        """Pack one weight. transformers would turn an error into a line of its log, so it waits for the end."""
        try:
            linear = self.quantizer.loading.pack(model, path, weight)
        except Tahf4Error as error:
            self.quantizer.failed = error
            return
        for leaf in (*PARTS, *BRANCH):
            if (parameter := linear._parameters[leaf]) is not None:
                setattr(parameter, _ARRIVED, True)


def _mixin() -> type[nn.Module]:
    from transformers import PreTrainedModel  # not yet importable when this module is

    mixin: type[nn.Module] = PreTrainedModel
    return mixin


def _empty(model: Any) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = type(model)(copy.deepcopy(model.config))
    return made


def _tell(model: Any, config: TaHF4Config) -> None:
    # Other models may hold the same configuration, and they are not packed.
    old, new = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new
    new.quantization_config = config


def _forget(model: Any) -> None:
    model.hf_quantizer.remove_quantization_config(model)


_saving = Saving(TaHF4HfQuantizer, _mixin, _empty, _tell, _forget)


def register() -> None:
    """Add the quantizer to transformers' tables, and let packed models save themselves."""
    auto.AUTO_QUANTIZER_MAPPING[Method.TAHF4.value] = TaHF4HfQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.TAHF4.value] = TaHF4Config
    _saving.register()
