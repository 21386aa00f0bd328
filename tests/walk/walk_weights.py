"""Steps that change weights, and adapters beside them."""

from __future__ import annotations

import peft
import pytest
import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from walk_networks import DTYPES
from walk_oracle import base, linears
from walk_state import State

__all__ = ["Weights"]

ADAPTED = ["to_q", "to_v", "down"]


class Weights(State):
    """Writes, casts and adapters."""

    @precondition(lambda self: self.hooks == "" and not self.merged)
    @rule(
        which=st.integers(0, 99), how=st.sampled_from(["in place", "data", "new parameter", "state"]), by=st.booleans()
    )
    def changes_weight(self, which: int, how: str, by: bool) -> None:
        path = list(self.oracle.held)[which % len(self.oracle.held)]
        held, linear = self.oracle.held[path], base(linears(self.model)[path])
        name = "weight" if held.packed is None else "weight_codes"
        if by and held.bias is not None:
            name = "bias"
        old = getattr(linear, name).detach()
        new = old.flip(0) if name != "bias" else old + 0.25
        if how == "in place":
            getattr(linear, name).copy_(new)
        elif how == "data":
            getattr(linear, name).data.copy_(new)
        elif how == "new parameter":
            setattr(linear, name, nn.Parameter(new, requires_grad=False))
        else:
            linear.load_state_dict({**linear.state_dict(), name: new})
        if name == "weight_codes":
            assert held.packed is not None
            held.packed.codes = new.clone()
        else:
            setattr(held, name, new.clone())
        self.check()

    @precondition(lambda self: self.hooks == "")
    @rule(dtype=st.sampled_from(DTYPES))
    def casts(self, dtype: torch.dtype) -> None:
        if self.kind == "wan":
            return
        if self.diffusers and self.oracle.is_packed() and not self.part:  # of a part it does not know
            with pytest.raises(ValueError, match="quantized model"):  # diffusers' own, for every quantization
                self.model.to(dtype)
        else:
            self.model.to(dtype)
            self.oracle.cast(dtype)
            self.dtype = dtype
        self.check()

    @precondition(lambda self: self.diffusers and self.hooks == "" and self.dtype is torch.float32)
    @rule()
    def casts_layers(self) -> None:
        if self.wrapped or self.clock is not None or self.full or self.kind == "wan":
            return
        self.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        self.hooks = "layers"
        self.oracle.cast(torch.bfloat16, set(self.oracle.held))
        self.oracle.cast(torch.float32, set(self.oracle.held))
        self.check()

    @precondition(lambda self: not self.wrapped and not self.hooks and not self.full)
    @rule(rank=st.sampled_from([4, 64]))
    def adds_adapter(self, rank: int) -> None:
        config = peft.LoraConfig(r=rank, target_modules=ADAPTED, init_lora_weights=False)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(rank)
            if self.diffusers:
                self.model.add_adapter(config, "style")
            else:
                peft.inject_adapter_in_model(config, self.model, "style")
        self.wrapped, self.oracle.adapted = True, True
        for path, module in linears(self.model).items():
            if isinstance(module, BaseTunerLayer):
                for part in (module.lora_A["style"], module.lora_B["style"]):
                    part.weight.requires_grad_(False)
                pair = (module.lora_A["style"].weight.clone(), module.lora_B["style"].weight.clone())
                self.oracle.held[path].adapter = *pair, module.scaling["style"]
        self.check()

    @precondition(lambda self: self.wrapped and not self.merged)
    @rule(on=st.booleans())
    def switches_adapter(self, on: bool) -> None:
        for module in self.tuners():
            module.enable_adapters(on)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)  # peft asks for gradients of what it enables
        self.oracle.adapted = on
        self.check()

    @precondition(lambda self: self.wrapped)
    @rule()
    def chooses_adapter(self) -> None:
        for module in self.tuners():
            module.set_adapter(["style"])
            module.requires_grad_(False)
        self.check()

    @precondition(lambda self: self.wrapped and not self.hooks)
    @rule()
    def removes_adapter(self) -> None:
        recurse_remove_peft_layers(self.model)
        self.model._hf_peft_config_loaded = False
        del self.model.peft_config
        self.wrapped = self.merged = False  # what is fused stays
        for held in self.oracle.held.values():
            held.adapter = None
        self.check()

    @precondition(lambda self: self.wrapped and self.oracle.adapted and not self.merged and not self.hooks)
    @rule()
    def fuses_adapter(self) -> None:
        """Fuse it, and unfuse it again where it went into a branch, which the oracle does not know."""
        if self.diffusers:
            self.model.fuse_lora()
        else:
            for module in self.tuners():
                module.merge()
        self.merged = True
        for held in self.oracle.held.values():
            if held.adapter is not None:
                held.weight = held.weight + _fused(*held.adapter)
        self.oracle.adapted = False
        if self.oracle.is_packed():
            self.unfuses_adapter()
        else:
            self.check()

    @precondition(lambda self: self.merged and not self.hooks)
    @rule()
    def unfuses_adapter(self) -> None:
        if self.diffusers:
            self.model.unfuse_lora()
        else:
            for module in self.tuners():
                module.unmerge()
        for held in self.oracle.held.values():
            if held.adapter is not None:
                held.weight = held.weight - _fused(*held.adapter)
        self.merged, self.oracle.adapted = False, True
        self.check()


def _fused(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Return what peft adds to a weight: it multiplies halves in float32 on a CPU."""
    return ((second.float() @ first.float()) * scale).to(first.dtype)
