"""What PyTorch does to any parameters and would do wrong to codes and scales: refused before anything has changed.

A packed linear cannot refuse these itself. ``requires_grad_`` goes over the parameters of the whole model, and those in
front of the linear have changed when it comes to its codes. A plain model that is given the state of a packed one holds
no packed linear. ``AveragedModel`` copies a model as anybody may. What
computes a weight anew in each call looks for it among the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from ..errors import GradientError, PackedError
from .linear import HiF4Linear

__all__ = ["ask_before", "guard"]


def guard() -> None:
    """Ask the checks below before PyTorch's own methods run, from now on until the process ends."""
    ask_before(nn.Module, "requires_grad_", _check_frozen)
    ask_before(nn.Module, "load_state_dict", _check_state)
    ask_before(AveragedModel, "__init__", _check_averaged)
    for owner, name in ((SpectralNorm, "apply"), (WeightNorm, "apply"), (parametrize, "register_parametrization")):
        ask_before(owner, name, _check_computed)
    ask_before(BasePruningMethod, "apply", lambda _, *args, **kwargs: _check_computed(*args, **kwargs))


def ask_before(owner: Any, name: str, check: Callable[..., None]) -> None:
    """Call a check with the arguments of a method of a class before the method runs, until the process ends."""
    held = owner.__dict__[name]
    own = held.__func__ if isinstance(held, classmethod) else getattr(owner, name)

    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return own(*args, **kwargs)

    setattr(owner, name, classmethod(function) if isinstance(held, classmethod) else function)


def _packed(model: nn.Module) -> list[str]:
    return [path or "the linear" for path, module in model.named_modules() if isinstance(module, HiF4Linear)]


def _check_frozen(model: nn.Module, requires_grad: bool = True) -> None:
    if requires_grad and (found := _packed(model)):
        raise GradientError(
            f"{type(model).__name__}.requires_grad_(True) would let {len(found)} packed linears require gradients "
            f"({', '.join(found[:3])}), but 4-bit codes have none. Name the parts that are to require them, or go back "
            "to plain weights with tahf4.dequantize_(model) first."
        )


def _check_state(model: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
    packed = [key.removesuffix(".weight_codes") for key in state_dict if key.endswith(".weight_codes")]
    modules = dict(model.named_modules(remove_duplicate=False)) if packed else {}
    if others := [path for path in packed if path in modules and not _takes_codes(modules[path])]:
        raise PackedError(
            f"the state dict holds {len(others)} packed linears that are not packed in {type(model).__name__} "
            f"({', '.join(others[:3])}: {type(modules[others[0]]).__name__}), and its weights would stay what they "
            "are. Pack the model in the same way first (tahf4.quantize_), or unpack the one that the state dict is of "
            "(tahf4.dequantize_)."
        )


def _takes_codes(module: nn.Module) -> bool:
    """Tell whether a module is packed, or reads a state dict in its own way."""
    return isinstance(module, HiF4Linear) or type(module)._load_from_state_dict is not nn.Module._load_from_state_dict


def _check_averaged(_: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    if found := _packed(model):
        raise PackedError(
            f"AveragedModel would average the codes and scales of {len(found)} packed linears as numbers "
            f"({', '.join(found[:3])}), which gives other weights than the average. Average the original, and pack "
            "the average."
        )


def _check_computed(module: nn.Module, name: str = "", *args: Any, **kwargs: Any) -> None:
    wanted = kwargs.get("tensor_name", name)
    if isinstance(module, HiF4Linear) and wanted != "bias":
        raise PackedError(
            f"this linear is packed ({module.in_features} -> {module.out_features} features), and has no weight that a "
            f"norm, parametrization or pruning could compute in each call; it got {wanted!r}. Go back to plain weights "
            "first (tahf4.dequantize_), or load the original: tahf4.quantize_ leaves linears as they are whose weight "
            "is computed."
        )
