"""ComfyUI's operations, with linears that load packed tensors and compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from tahf4_compiler.errors import PackedError
from tahf4_compiler.packed.config import arguments
from tahf4_compiler.packed.linear import HiF4Linear

__all__ = ["PackedLinear", "operations"]


class PackedLinear(HiF4Linear, comfy.ops.CastWeightBiasOp):
    """A packed linear that ComfyUI moves, offloads and patches as its own.

    Attributes:
        adapter: ``[K, r]`` and ``[r, N]``, of all LoRA beside the 4-bit product with their strengths, or None.
        comfy_cast_weights: True: it may stay on the offload device, and moves what it holds in each call.
        weight_function: what ComfyUI would apply to the weight in a call; only its own patches, which ``adapter`` is.
        bias_function: the same for the bias.
    """

    comfy_cast_weights = True
    weight_function: Any
    bias_function: Any
    adapter: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., N]`` of the dtype of ``input``: the product in 4 bits, and the adapter's beside it.

        Raises:
            PackedError: another extension has put a function of the weight here.
        """
        for function in self.weight_function:
            if not isinstance(function, comfy.model_patcher.LowVramPatch):
                raise PackedError(
                    f"something wants to change the weight of a packed linear by {function!r:.100}, and it has codes "
                    "and no weight. Use a plain model with this node."
                )
        held = self.weight_codes, self.weight_scales, self.multiplier
        return self._beside(input, *held) if self.weight_codes.device == input.device else self._offloaded(input, *held)

    @torch.compiler.disable  # the compiler knows packed weights by the parameters that hold them
    def _offloaded(self, input: Tensor, *held: Tensor | None) -> Tensor:
        return self._beside(input, *(part.to(input.device) if part is not None else None for part in held))

    def _beside(self, input: Tensor, codes: Any, scales: Any, multiplier: Any) -> Tensor:
        bias: Tensor | None = self.bias
        if bias is not None:
            changes = bool(self.bias_function)  # in place
            bias = bias.to(input.device, input.dtype, copy=changes)
            for function in self.bias_function:
                bias = function(bias)
        pairs = ((self.low_rank_a, self.low_rank_b), self.adapter or (None, None))
        branches = [(a.to(input.device), b.to(input.device)) for a, b in pairs if a is not None and b is not None]
        return self.product_with(input, codes, scales, multiplier, bias, branches)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Name a weight: ComfyUI looks for the keys of a LoRA in the state, and measures a model by it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = torch.zeros(1, dtype=torch.uint8)


class _Linear(comfy.ops.manual_cast.Linear):
    """A linear of ComfyUI, or a packed one: which, is known when its tensors arrive.

    Attributes:
        linears: how the packed ones are packed, by path.
    """

    linears: Mapping[str, Mapping[str, Any]] = {}
    weight: Any
    bias: Any

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        # No weight before it is loaded: that of a packed linear would take the memory which packing saves.
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.place = {"device": device, "dtype": dtype if dtype is not None else torch.get_default_dtype()}
        self.has_bias = self.bias is not None
        self.weight = self.bias = None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        k, n, place = self.in_features, self.out_features, self.place
        values = self.linears.get(prefix[:-1])
        if values is None:
            if self.weight is None:
                self.weight = nn.Parameter(torch.empty(n, k, **place), requires_grad=False)
                if self.has_bias:
                    self.bias = nn.Parameter(torch.empty(n, **place), requires_grad=False)
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        if (values["k"], values["n"]) != (k, n):
            raise PackedError(
                f"{prefix[:-1]} is packed with {values['k']} -> {values['n']} features, and ComfyUI's model has "
                f"{k} -> {n} there; the checkpoint is damaged or of another model"
            )
        bias, training = self.has_bias, self.training
        self.__class__ = PackedLinear  # in its place: modules above hold this very object
        self.__dict__.clear()
        PackedLinear.__init__(
            self,
            k,
            n,
            bias,
            **arguments(values),
            multiplies=values["multiplier"],
            **place,
        )
        self.train(training)
        self._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def operations(packed: Mapping[str, Mapping[str, Any]]) -> type[Any]:
    """Return ComfyUI's operations with linears that load packed tensors, for ``custom_operations``.

    Args:
        packed: how linears are packed, by their paths in ComfyUI's diffusion model.
    """

    class Operations(comfy.ops.manual_cast):
        """The operations of one model."""

        class Linear(_Linear):
            """The linears of one model."""

            linears = packed

    return Operations
