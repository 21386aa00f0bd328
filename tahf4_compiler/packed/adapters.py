"""Which adapters compute with the weight of the linear that they adapt, so that it cannot be packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import PackedError
from ..model.reasons import Cause, Reason
from ..pipeline.context import Decision
from .linear import HiF4Linear

__all__ = ["leave_what_adapters_read"]


class _Tried(HiF4Linear):
    """A packed linear that computes nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features)


def leave_what_adapters_read(model: nn.Module, plan: Sequence[Decision]) -> None:
    """Let a plan leave linears whose adapters, as they are active now, compute with the weight.

    Of dozens of kinds of peft, some do so in some settings. So each is tried with a row of zeros and a packed linear.

    Args:
        model: that the plan is of.
        plan: is changed in place.
    """
    for decision in plan:
        linear, outer = model.get_submodule(decision.module), decision.module
        while outer.endswith(".base_layer"):  # adapters may stand around others
            outer = outer.removesuffix(".base_layer")
        if decision.decision != "hif4" or isinstance(linear, HiF4Linear) or outer == decision.module:
            continue
        inner = model.get_submodule(decision.module.removesuffix(".base_layer"))
        assert isinstance(linear, nn.Linear)
        if _reads(model.get_submodule(outer), inner, linear):
            text = f"class: an adapter ({type(inner).__module__}.{type(inner).__name__}) computes with the weight"
            decision.decision, decision.reason = "high_precision", Reason(Cause.CLASS, text)
            decision.bytes_after, decision.rank = decision.bytes_before, 0


def _reads(outer: nn.Module, inner: nn.Module, linear: nn.Linear) -> bool:
    weight, k = linear.weight, linear.in_features
    tried = _Tried(k, linear.out_features, linear.bias is not None, device=weight.device, dtype=weight.dtype)
    inner._modules["base_layer"] = tried
    try:
        with torch.no_grad():
            type(outer).forward(outer, torch.zeros(1, k, device=weight.device, dtype=weight.dtype))
    except PackedError:
        return True
    except Exception:  # it wants other inputs than these
        return False
    finally:
        inner._modules["base_layer"] = linear
    return False
