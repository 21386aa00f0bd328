"""Steps that call a model, and that compile it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from helpers import relative
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor
from walk_networks import inputs
from walk_state import KNOWN, State

__all__ = ["Running"]


class Running(State):
    """Calls and compilations."""

    @rule(
        rows=st.integers(1, 3),
        seed=st.integers(0, 99),
        mode=st.sampled_from(["no_grad", "inference", "gradients", "autocast"]),
    )
    def calls(self, rows: int, seed: int, mode: str) -> None:
        if mode == "autocast" and (self.kind == "wan" or self.dtype is torch.float16):  # norms refuse mixed dtypes
            mode = "no_grad"
        self.check(rows, seed, mode)

    @rule(seed=st.integers(0, 99))
    def two_threads_call(self, seed: int) -> None:
        given = [inputs(self.kind, 1, seed + i, self.dtype) for i in range(2)]
        wanted = [self.oracle(g) for g in given]

        def call(one: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return self.call(one)

        if self.hooks:  # hooks that move weights to and fro are not for two threads
            return
        with ThreadPoolExecutor(2) as pool:
            for got, want in zip(pool.map(call, given), wanted):
                assert relative(got, want) <= max(self.tolerance(got.dtype, ""), 1e-2)
        self.check()

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def sets_default_dtype(self, dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)
        self.check()

    @precondition(lambda self: not self.way and self.compilations < self.may_compile)
    @rule(
        way=st.sampled_from(["wrapper", "in place", "blocks"]),
        full=st.booleans(),
        extra=st.sampled_from([{}, {"weight_check": "version"}, {"disable_passes": ["fuse"]}, {"share.merge": False}]),
    )
    def compiles(self, way: str, full: bool, extra: dict[str, Any]) -> None:
        if self.hooks == "accelerate" and "frames given up" in KNOWN:
            return
        self.compilations += 1
        if self.kind == "wan":
            way = "blocks"  # the whole takes ten times as long
        self.way, self.full, self.options = way, full and not self.hooks and not self.wrapped, extra
        how: dict[str, Any] = {"backend": "tahf4", "fullgraph": self.full, "options": {"inductor": False, **extra}}
        if way == "wrapper":
            self.run = torch.compile(self.model, **how)
        elif way == "in place":
            self.model.compile(**how)
        elif self.diffusers:
            self.model.compile_repeated_blocks(**how)
        else:
            for block in self.model.blocks:
                block.compile(**how)
        self.oracle.compiled = True
        self.check()
