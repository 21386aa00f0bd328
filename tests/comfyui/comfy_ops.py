"""A stand-in for ``comfy.ops``: modules that cast what they hold to their input."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class CastWeightBiasOp:
    """``comfy.ops.CastWeightBiasOp``."""

    comfy_cast_weights = False
    weight_function: Any = ()
    bias_function: Any = ()


def cast_bias_weight(module: Any, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``comfy.ops.cast_bias_weight``: to the input's device and dtype, then through the functions."""
    found = []
    for name in ("weight", "bias"):
        value, functions = getattr(module, name, None), getattr(module, f"{name}_function")
        if value is not None:
            value = value.to(input.device, input.dtype, copy=bool(functions))
            for function in functions:
                value = function(value)
        found.append(value)
    return found[0], found[1]


class manual_cast:
    """``comfy.ops.manual_cast``: modules that cast what they hold to their input."""

    class Linear(nn.Linear, CastWeightBiasOp):
        comfy_cast_weights = True

        def reset_parameters(self) -> None:
            pass

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, *cast_bias_weight(self, input))

    class Conv3d(nn.Conv3d, CastWeightBiasOp):
        comfy_cast_weights = True

        def reset_parameters(self) -> None:
            pass

        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, *cast_bias_weight(self, input))

    class LayerNorm(nn.LayerNorm, CastWeightBiasOp):
        comfy_cast_weights = True

        def forward(self, input: Tensor) -> Tensor:
            return F.layer_norm(input, self.normalized_shape, *cast_bias_weight(self, input), self.eps)

    class RMSNorm(nn.RMSNorm, CastWeightBiasOp):
        comfy_cast_weights = True

        def forward(self, input: Tensor) -> Tensor:
            return F.rms_norm(input, self.normalized_shape, cast_bias_weight(self, input)[0], self.eps)
