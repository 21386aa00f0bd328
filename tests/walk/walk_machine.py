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

__all__ = ["WALKS", "Walk"]

WALKS = {
    ("module", True): 3,
    ("diffusers", True): 4,
    ("norms", True): 2,
    ("wan", True): 2,
    ("module", False): 95,
    ("diffusers", False): 112,
    ("norms", False): 53,
    ("wan", False): 30,
}
"""How many walks a round has of each network, compiled or not."""


class Walk(Running, Packing, Weights, Copies):
    """One model and its oracle."""

    @initialize(
        seed=st.integers(0, 3),
        dtype=st.sampled_from([*DTYPES[:1], *DTYPES]),
        may_compile=st.integers(1, 2),
        first=st.sampled_from(["", "pack", "keep", "masks"]),
        compiled=st.booleans(),
    )
    def start(self, seed: int, dtype: torch.dtype, may_compile: int, first: str, compiled: bool) -> None:
        """Make a network; ``may_compile`` says how often a walk that compiles may do so."""
        self.dtype, self.may_compile = dtype if self.kind != "wan" else torch.float32, may_compile * self.compiling
        self.model, self.oracle = make(self.kind, seed), Oracle.of(self.kind, seed)
        if self.dtype is not torch.float32:
            self.model.to(dtype)
            self.oracle.cast(dtype)
        self.check()
        if first == "pack":
            self.packs("", "", False)
        elif first == "keep":
            self.keeps("to_out")
        elif first == "masks":
            self.applies_recipe("masks")
        if compiled and self.may_compile:
            self.compiles("wrapper", False, {})
