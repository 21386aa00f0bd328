"""Steps that offload a model, copy it, and save and load it."""

from __future__ import annotations

import copy
import io
import pickle

import accelerate
import safetensors.torch
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from walk_networks import DTYPES
from walk_state import KNOWN, State

import tahf4_compiler as tahf4

__all__ = ["Copies"]


class Copies(State):
    """Offloading, copies, files."""

    @precondition(lambda self: not self.hooks and not self.full and not self.wrapped)
    @rule(how=st.sampled_from(["accelerate", "leaf_level", "block_level"]))
    def offloads(self, how: str) -> None:
        if how == "accelerate" and self.way and "frames given up" in KNOWN:
            return
        cpu = torch.device("cpu")
        if how == "accelerate":
            accelerate.cpu_offload(self.model, execution_device=cpu)
            self.hooks = "accelerate"
        elif self.diffusers:
            extra = {"num_blocks_per_group": 1} if how == "block_level" else {}
            self.model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=how, **extra)
            self.hooks = "blocks" if extra else "leaves"
        self.check()

    @precondition(lambda self: self.hooks == "accelerate")
    @rule()
    def takes_hooks_off(self) -> None:
        accelerate.hooks.remove_hook_from_module(self.model, recurse=True)
        self.hooks = ""
        self.check()

    @precondition(lambda self: not self.hooks)
    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copies(self, how: str) -> None:
        if how != "deepcopy" and self.clock is not None:
            how = "deepcopy"  # a pickled model has a clock of its own
        if how == "deepcopy":
            other = copy.deepcopy(self.model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(self.model))
        else:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        self.goes_on_with(other)
        self.check()

    @precondition(lambda self: not self.hooks)
    @rule(how=st.sampled_from(["state", "torch.save", "safetensors", "accelerate"]))
    def saves_and_loads(self, how: str) -> None:
        other = copy.deepcopy(self.model)
        for parameter in other.parameters():
            parameter.zero_()
        self.saved += 1
        folder = self.folder / str(self.saved)
        folder.mkdir()
        if how == "state":
            other.load_state_dict(self.model.state_dict())
        elif how == "torch.save":
            torch.save(self.model.state_dict(), folder / "state.pt")
            other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
        elif how == "safetensors":
            safetensors.torch.save_model(self.model, str(folder / "model.safetensors"))
            safetensors.torch.load_model(other, str(folder / "model.safetensors"))
        else:
            accelerate.Accelerator(cpu=True).save_model(self.model, str(folder))
            accelerate.load_checkpoint_in_model(other, str(folder))
        self.goes_on_with(other)
        self.check()

    @precondition(lambda self: self.diffusers and self.hooks in ("", "blocks", "leaves"))
    @rule(pack=st.booleans(), shards=st.booleans(), dtype=st.sampled_from([None, *DTYPES]))
    def goes_through_a_folder(self, pack: bool, shards: bool, dtype: torch.dtype | None) -> None:
        """Save, and load in a dtype; ``pack`` while it loads, if it is plain."""
        self.saved += 1
        folder = self.folder / str(self.saved)
        size = {"max_shard_size": "40KB"} if shards else {}
        if self.oracle.is_packed() and (self.wrapped or self.part):
            refusal = "would save|could not be loaded"
            self.attempt(lambda: self.model.save_pretrained(folder, **size), tahf4.PackedError, refusal)
            return
        if self.wrapped:  # diffusers saves the adapter's tensors in the model's own files, and cannot load them
            return
        self.model.save_pretrained(folder, **size)
        packs = pack and not self.oracle.is_packed()
        extra = {"quantization_config": tahf4.TaHF4Config()} if packs else {}
        loaded = dtype if dtype is not None and self.kind != "wan" else self.dtype
        other = type(self.model).from_pretrained(folder, torch_dtype=loaded, **extra)
        self.goes_on_with(other.requires_grad_(False).eval())
        self.dtype = loaded
        self.oracle.cast(loaded)
        self.oracle.kept, self.hooks, self.clock, self.oracle.high = set(), "", None, False
        self.oracle.apply(None)
        if packs:
            self.oracle.pack(None)
        if self.oracle.is_packed() and self.oracle.packed_steps:
            self.counts_steps()
        self.check()
