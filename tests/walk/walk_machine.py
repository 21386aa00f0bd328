"""Random walks over what a user does to a model: each step is one rule, and after each the model is compared."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from walk_copies import Copies
from walk_networks import DTYPES, make
from walk_oracle import Oracle
from walk_packing import Packing
from walk_running import Running
from walk_weights import Weights

__all__ = ["Walk"]


class Walk(Running, Packing, Weights, Copies):
    """One model and its oracle."""

    @initialize(
        kind=st.sampled_from([*["module"] * 4, *["diffusers"] * 4, "norms", "wan"]),
        seed=st.integers(0, 3),
        dtype=st.sampled_from([*DTYPES[:1], *DTYPES]),
        compiles=st.sampled_from([0, 0, 0, 1, 2]),
        first=st.sampled_from(["", "pack", "keep", "masks"]),
        compiled=st.booleans(),
    )
    def start(self, kind: str, seed: int, dtype: torch.dtype, compiles: int, first: str, compiled: bool) -> None:
        """Make a network; ``compiles`` says how often the walk may compile it."""
        self.kind, self.dtype, self.may_compile = kind, dtype if kind != "wan" else torch.float32, compiles
        self.model, self.oracle = make(kind, seed), Oracle.of(kind, seed)
        if dtype is not torch.float32 and kind != "wan":
            self.model.to(dtype)
            self.oracle.cast(dtype)
        self.check()
        if first == "pack":
            self.packs("", "")
        elif first == "keep":
            self.keeps("to_out")
        elif first == "masks":
            self.applies_recipe("masks")
        if compiled and compiles:
            self.compiles("wrapper", False, {})
