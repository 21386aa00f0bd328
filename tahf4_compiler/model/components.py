"""The denoisers of a pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import OptionError

__all__ = ["EXPERTS", "WAN_EXPERTS", "experts", "unwrapped_experts"]

EXPERTS = ("transformer", "transformer_2", "transformer_3", "unet")
"""What diffusers calls the denoisers of a pipeline."""

WAN_EXPERTS = EXPERTS[:2]
"""Those of Wan: for the steps of high noise, and for those of low noise (Wan2.2 A14B alone)."""


def experts(model: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by component name, or a module itself under the name ``""``.

    Args:
        model: an ``nn.Module``, or a diffusers pipeline with ``transformer``, ``transformer_2`` or ``unet``.

    Raises:
        OptionError: neither, or TorchScript.
    """
    if isinstance(model, nn.Module):
        _refuse_script(type(model).__name__, model)
        return {"": model}
    found = {name: getattr(model, name, None) for name in EXPERTS}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise OptionError(
            f"got a {type(model).__name__}; expected an nn.Module, or a diffusers pipeline with a transformer or unet"
        )
    for name, module in modules.items():
        _refuse_script(name, module)
    return modules


def _refuse_script(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise OptionError(
            f"{name} is TorchScript (torch.jit.script, torch.jit.trace, torch.jit.load), of which no linear can be "
            "observed, replaced or compiled. Give the model that it was made of."
        )


def unwrapped_experts(model: Any) -> dict[str, nn.Module]:
    """Return :func:`experts` without what ``torch.compile`` put around them."""
    return {name: getattr(module, "_orig_mod", module) for name, module in experts(model).items()}
