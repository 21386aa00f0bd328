"""The state of a walk, and what is compared after each of its steps.

Three things are held: the numbers of a call are the oracle's, as many rows of weights are multiplied in 4 bits as the
plan says, and every tensor is there, with its dtype and its values. A step works, or is refused by an error of this
project (:mod:`tahf4_compiler.errors`) where its rule says so. Everything else is a fault.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative
from hypothesis.stateful import RuleBasedStateMachine
from models import masked_recipe
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from walk_kernels import Count, counting
from walk_networks import inputs
from walk_oracle import Oracle

import tahf4_compiler as tahf4
from tahf4_compiler.recipe.recipe import Recipe

__all__ = ["KNOWN", "Clock", "State", "kept", "mode_of", "plain_path"]

KNOWN: dict[str, str] = {
    "frames given up": "a hook of accelerate breaks every graph; Dynamo then skips the frame for good, and when the "
    "hook is taken off the model runs in its original precision: compiled models get no such hooks",
}
"""Faults that are known, and how the walks go around each. Take one out when it is mended: the walks then test it."""

TIGHT, LOOSE = 1e-6, 5e-2


class Clock:
    """A scheduler, as far as steps are counted."""

    def __init__(self) -> None:
        self.timesteps, self.num_inference_steps, self.step_index = [2, 1, 0], 3, None

    def set_timesteps(self, steps: int) -> None:
        self.step_index = None

    def step(self) -> None:
        self.step_index = (self.step_index or 0) + 1


class Announced(logging.Handler):
    """Hears how many linears of each compiled graph are in 4 bits."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.quantized: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "linears in HiF4" in str(record.msg) and isinstance(record.args, tuple):
            self.quantized.append(int(record.args[1]))


class State(RuleBasedStateMachine):
    """One model and its oracle.

    Attributes:
        kind: of the network.
        compiling: whether the walk may compile it.
    """

    kind: str
    compiling: bool
    model: nn.Module
    oracle: Oracle

    def __init__(self) -> None:
        super().__init__()
        self.ends = contextlib.ExitStack()
        self.ends.enter_context(torch.no_grad())
        self.ends.enter_context(counting())
        self.ends.enter_context(torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True))
        self.folder = Path(self.ends.enter_context(tempfile.TemporaryDirectory()))
        self.announced = Announced()
        log = logging.getLogger("tahf4_compiler.backends.dynamo")
        self.ends.callback(log.setLevel, log.level)
        self.ends.callback(log.removeHandler, self.announced)
        log.setLevel(logging.INFO)
        log.addHandler(self.announced)
        self.run: Callable[..., Any] | None = None
        self.way = ""  # how it is compiled
        self.options: dict[str, Any] = {}
        self.full = False
        self.compilations = 0
        self.hooks = ""  # of accelerate, of groups of blocks or of leaves, or of layers that are cast
        self.wrapped = self.merged = False  # an adapter around its linears; and it is fused into them
        self.part = False  # packed as a part of the model, of which the whole knows nothing
        self.clock: Clock | None = None
        self.saved = 0

    def teardown(self) -> None:
        torch.set_default_dtype(torch.float32)
        self.ends.close()
        torch._dynamo.reset()

    def check(self, rows: int = 1, seed: int = 0, mode: str = "no_grad") -> None:
        """Compare tensors, then a call."""
        if self.hooks in ("", "blocks", "leaves"):
            self.oracle.compare(self.model)
        # A code that a last bit moves over a border of rounding is a matter of one input; a fault is one of all.
        errors = []
        for other in (0, 1000, 2000):
            error, tolerance = self.difference(rows, seed + other, mode)
            if error <= tolerance:
                return
            errors.append(error)
        raise AssertionError(f"the numbers are others: relative errors {errors}, allowed {tolerance}")

    def difference(self, rows: int, seed: int, mode: str) -> tuple[float, float]:
        given = inputs(self.kind, rows, seed, self.dtype)
        with mode_of(mode), default_dtype(torch.float32):
            want = self.oracle(given)
        with mode_of(mode):
            Count.rows, heard = 0, len(self.announced.quantized)
            got = self.call(given)
            multiplied, heard_now = Count.rows, self.announced.quantized[heard:]
        assert got.shape == want.shape and got.dtype == want.dtype, f"{got.dtype} {got.shape}, expected {want.dtype}"
        expected = self.oracle.rows()
        assert multiplied == expected, f"{multiplied} rows of weights ran in 4 bits; the plan has {expected}"
        if heard_now and self.full and self.way != "blocks":
            planned = sum(self.oracle.runs(held) is not None for held in self.oracle.held.values())
            assert heard_now[-1] == planned, f"the report says {heard_now[-1]} linears; the plan has {planned}"
        return relative(got, want), self.tolerance(got.dtype, mode)

    def call(self, given: dict[str, Tensor]) -> Tensor:
        y = (self.model if self.run is None else self.run)(**given)
        return y if isinstance(y, Tensor) else y[0]

    def tolerance(self, dtype: torch.dtype, mode: str) -> float:
        if not self.way:
            return TIGHT
        # What is fused keeps float32 between operators of 16 bits, and rounds norms in another order.
        exact = self.kind in ("module", "diffusers") and self.dtype is torch.float32 and mode != "autocast"
        return TIGHT if exact else LOOSE

    def goes_on_with(self, other: nn.Module) -> None:
        """Take a copy, which nobody compiled, in the place of the model. What befalls one does not change the other."""
        self.check()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.detach().zero_()
        self.model = other
        self.run, self.way, self.full, self.options = None, "", False, {}
        self.oracle.compiled = False

    def counts_steps(self, steps: Sequence[int] | None = None) -> None:
        """Let a clock count the steps of a packed model, which stands at the first one."""
        self.clock = self.clock or Clock()
        tahf4.set_high_precision_steps(self.model, steps, scheduler=self.clock)
        self.clock.set_timesteps(3)
        self.oracle.packed_steps, self.oracle.high = True, True

    @property
    def diffusers(self) -> bool:
        return self.kind != "module"

    def recipe(self, steps: bool) -> Recipe:
        blocks = {"wan": 128}.get(self.kind, 64)
        made = masked_recipe(self.oracle.plain(), [p for p in self.oracle.held if p.endswith("1.up")], blocks)
        return Recipe(made.experts, high_precision_steps=(0,)) if steps else made

    def tuners(self) -> Iterator[Any]:
        return (module for module in self.model.modules() if isinstance(module, BaseTunerLayer))

    def attempt(self, act: Callable[[], None], error: type[Exception], refusal: str | None) -> None:
        """Do something, or see it refused; either way the model is what the oracle says."""
        if refusal is None:
            act()
        else:
            with pytest.raises(error, match=refusal):
                act()
        self.check()


def plain_path(path: str) -> str:
    """Return the path of a linear before an adapter stood around it."""
    return path.removesuffix(".base_layer")


def kept(pattern: str, path: str) -> bool:
    """Whether a pattern finds a path."""
    return re.search(pattern, path) is not None


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors have a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def mode_of(mode: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a call."""
    return {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "gradients": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[mode]()
