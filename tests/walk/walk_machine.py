"""Random walks over what a user does to a model: each step is one rule, and after each the model is compared.

Three things are held after every step: the numbers of a call are the oracle's, as many rows of weights are multiplied
in 4 bits as the plan says, and every tensor is there, with its dtype and its values. A step works or is refused by an
error of this project (:mod:`tahf4_compiler.errors`) where the rule says so. Everything else is a fault.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import safetensors.torch
import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from helpers import relative
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from models import masked_recipe
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from walk_kernels import Count, counting
from walk_networks import inputs, make
from walk_oracle import Oracle, base, linears

import tahf4_compiler as tahf4
from tahf4_compiler.recipe.recipe import Recipe

__all__ = ["KNOWN", "Walk"]

KNOWN: dict[str, str] = {
    "merged storage": "after a compiled call, tools that take one storage for tied weights drop k and v of packed "
    "models: such tools save no packed model that a compiled graph has run",
    "signs of pieces": "a rotation's signs depend on the module that is compiled: plain models that are compiled in "
    "pieces are compared loosely",
    "names of adapters": "an adapter around a linear changes the signs of its rotation, and linears that share an "
    "activation do not know it: what is packed or compiled with an adapter around plain linears is compared loosely",
    "wide adapters": "LoRA matrices of rank 64 and more are put in 4 bits: adapters have the rank 4",
    "frames given up": "a hook of accelerate breaks every graph; Dynamo then skips the frame for good, and when the "
    "hook is taken off the model runs in its original precision, without a word: compiled models get no such hooks",
    "default dtype": "torch.set_default_dtype(torch.float64) makes masks of float64: recipes go with the default",
    "set_adapter": "peft's set_adapter needs the weight that a packed linear does not have: no adapter is chosen anew",
}
"""Faults that are known, and how the walks go around each. Take one out when it is mended: the walks then test it."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIGHT, LOOSE, PIECES = 1e-6, 5e-2, 0.5
KEEPS = ("", "to_out", r"blocks\.1\.")
ADAPTED = ["to_q", "to_v", "down"]
CPU = torch.device("cpu")


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


class Walk(RuleBasedStateMachine):
    """One model and its oracle."""

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
        self.called = False  # whether a compiled graph has run
        self.hooks = ""  # of accelerate, of groups of blocks or of leaves, or of layers that are cast
        self.wrapped = self.merged = self.mixed = False
        self.clock: Clock | None = None
        self.saved = 0

    def teardown(self) -> None:
        torch.set_default_dtype(torch.float32)
        self.ends.close()
        torch._dynamo.reset()

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

    # What is compared

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
        with _mode(mode), default_dtype(torch.float32):
            want = self.oracle(given)
        with _mode(mode):
            Count.rows, heard = 0, len(self.announced.quantized)
            got = self.call(given)
            multiplied, heard_now = Count.rows, self.announced.quantized[heard:]
        self.called = self.called or bool(self.way)
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
        plain = not self.oracle.is_packed()
        pieces = self.way == "blocks" or self.hooks or self.wrapped
        if plain and ((pieces and "signs of pieces" in KNOWN) or (self.wrapped and "names of adapters" in KNOWN)):
            return PIECES
        # What is fused keeps float32 between operators of 16 bits, and rounds norms in another order.
        exact = self.kind in ("module", "diffusers") and self.dtype is torch.float32 and mode != "autocast"
        return TIGHT if exact else LOOSE

    def goes_on_with(self, other: nn.Module) -> None:
        """Take a copy, which nobody compiled, in the place of the model; copying must not have changed the original."""
        self.check()
        self.model = other
        self.run, self.way, self.full, self.options, self.called = None, "", False, {}, False
        self.oracle.compiled = False

    @property
    def diffusers(self) -> bool:
        return self.kind != "module"

    # Calls

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
        if "default dtype" in KNOWN and any(held.entry is not None for held in self.oracle.held.values()):
            return
        torch.set_default_dtype(dtype)
        self.check()

    # Packing

    @rule(keep=st.sampled_from(KEEPS), recipe=st.sampled_from(["", "", "masks", "steps"]))
    def packs(self, keep: str, recipe: str) -> None:
        if self.wrapped and ("names of adapters" in KNOWN or recipe):
            return
        packed = self.oracle.is_packed()
        if packed or self.hooks or ("default dtype" in KNOWN and torch.get_default_dtype() != torch.float32):
            recipe = ""
        made = self.recipe(steps=recipe == "steps") if recipe else None
        refusal = None
        if recipe == "steps":
            refusal = "steps"
        elif keep and any(h.packed is not None and _kept(keep, path) for path, h in self.oracle.held.items()):
            refusal = "is packed"
        elif self.hooks and self.hooks != "blocks" and not packed:
            refusal = "hooked"
        elif self.clock is not None and not packed:
            refusal = "steps"

        def act() -> None:
            plan = tahf4.quantize_(self.model, made, keep=[keep] if keep else [])
            chosen = set(self.oracle.pack(made, keep or "$^"))
            found = {_plain_path(d.module) for d in plan if d.decision == "hif4" and d.reason != "packed"}
            assert found == chosen, f"the plan has {sorted(found ^ chosen)} otherwise"

        self.attempt(act, tahf4.PackedError, refusal)

    @rule()
    def unpacks(self) -> None:
        hooked = self.hooks not in ("", "blocks") and self.oracle.is_packed()

        def act() -> None:
            found = {_plain_path(path) for path in tahf4.dequantize_(self.model)}
            assert found == set(self.oracle.unpack())
            self.model.requires_grad_(False)  # that of a linear without a bias is not known

        self.attempt(act, tahf4.PackedError, "hooked" if hooked else None)

    @precondition(lambda self: not self.oracle.is_packed() and not self.hooks and not self.wrapped)
    @rule(pattern=st.sampled_from(KEEPS))
    def keeps(self, pattern: str) -> None:
        tahf4.keep(self.model, [pattern] if pattern else [])
        self.oracle.kept = {path for path in self.oracle.held if pattern and _kept(pattern, path)}
        self.check()

    @precondition(lambda self: not self.oracle.is_packed() and not self.hooks and not self.wrapped)
    @rule(what=st.sampled_from(["masks", "steps", "none"]))
    def applies_recipe(self, what: str) -> None:
        if "default dtype" in KNOWN and torch.get_default_dtype() != torch.float32:
            return
        self.clock, self.oracle.high = Clock() if what == "steps" else None, what == "steps"
        recipe = self.recipe(what == "steps") if what != "none" else None
        tahf4.apply_recipe(self.model, recipe, scheduler=self.clock)
        self.oracle.apply(recipe)
        self.check()

    @precondition(lambda self: self.clock is not None)
    @rule()
    def next_step(self) -> None:
        self.clock.step()  # type: ignore[union-attr]
        self.oracle.high = False
        self.check()

    def recipe(self, steps: bool) -> Recipe:
        blocks = {"wan": 128}.get(self.kind, 64)
        made = masked_recipe(copy.deepcopy(self.model), [p for p in self.oracle.held if p.endswith("1.up")], blocks)
        return Recipe(made.experts, high_precision_steps=(0,)) if steps else made

    # Compiling

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

    # Weights

    @precondition(lambda self: self.hooks == "" and not self.merged)
    @rule(
        which=st.integers(0, 99), how=st.sampled_from(["in place", "data", "new parameter", "state"]), by=st.booleans()
    )
    def changes_weight(self, which: int, how: str, by: bool) -> None:
        if how == "data" and self.options.get("weight_check") == "version":
            how = "in place"  # which sees no writes through .data
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
        if self.diffusers and self.oracle.is_packed():
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

    # Adapters

    @precondition(lambda self: not self.wrapped and not self.hooks and not self.full and self.clock is None)
    @rule(rank=st.sampled_from([4, 64]))
    def adds_adapter(self, rank: int) -> None:
        if any(held.entry is not None for held in self.oracle.held.values()):
            return
        rank = 4 if "wide adapters" in KNOWN else rank
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

    @precondition(lambda self: self.wrapped and "set_adapter" not in KNOWN)
    @rule()
    def chooses_adapter(self) -> None:
        for module in self.tuners():
            module.set_adapter(["style"])
            module.requires_grad_(False)
        self.check()

    @precondition(lambda self: self.wrapped and not self.merged and not self.hooks)
    @rule()
    def removes_adapter(self) -> None:
        recurse_remove_peft_layers(self.model)
        self.model._hf_peft_config_loaded = False
        del self.model.peft_config
        self.wrapped = False
        for held in self.oracle.held.values():
            held.adapter = None
        self.check()

    @precondition(lambda self: self.wrapped and self.oracle.adapted and not self.merged and not self.hooks)
    @rule()
    def fuses_adapter(self) -> None:
        def act() -> None:
            if self.diffusers:
                self.model.fuse_lora()
            else:
                for module in self.tuners():
                    module.merge()
            self.merged = True
            for held in self.oracle.held.values():
                if held.adapter is not None:
                    first, second, scale = held.adapter
                    held.weight = held.weight + (second @ first) * scale
            self.oracle.adapted = False

        packed = any(h.packed is not None and h.adapter is not None for h in self.oracle.held.values())
        if self.options.get("weight_check") == "version" and not packed:
            return  # which sees no writes through .data
        self.attempt(act, tahf4.PackedError, "unfused" if packed else None)

    # Offloading

    @precondition(lambda self: not self.hooks and not self.full and not self.wrapped)
    @rule(how=st.sampled_from(["accelerate", "leaf_level", "block_level"]))
    def offloads(self, how: str) -> None:
        if how == "accelerate" and self.way and "frames given up" in KNOWN:
            return
        if how == "accelerate":
            accelerate.cpu_offload(self.model, execution_device=CPU)
            self.hooks = "accelerate"
        elif self.diffusers:
            extra = {"num_blocks_per_group": 1} if how == "block_level" else {}
            self.model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=how, **extra)
            self.hooks = "blocks" if extra else "leaves"
        self.check()

    @precondition(lambda self: self.hooks == "accelerate")
    @rule()
    def takes_hooks_off(self) -> None:
        accelerate.hooks.remove_hook_from_module(self.model, recurse=True)
        self.hooks = ""
        self.check()

    # Copies

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
        merged = self.called and self.oracle.is_packed() and "merged storage" in KNOWN
        if merged and how in ("safetensors", "accelerate"):
            how = "state"
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

    @precondition(lambda self: self.diffusers and self.hooks in ("", "blocks", "leaves") and not self.wrapped)
    @rule(pack_while_loading=st.booleans())
    def goes_through_a_folder(self, pack_while_loading: bool) -> None:
        self.saved += 1
        folder = self.folder / str(self.saved)
        self.model.save_pretrained(folder)
        packs = pack_while_loading and not self.oracle.is_packed()
        extra = {"quantization_config": tahf4.TaHF4Config()} if packs else {}
        other = type(self.model).from_pretrained(folder, torch_dtype=self.dtype, **extra)
        self.goes_on_with(other.requires_grad_(False).eval())
        self.oracle.kept, self.hooks, self.clock, self.oracle.high = set(), "", None, False
        self.oracle.apply(None)
        if packs:
            self.oracle.pack(None, "$^")
        self.check()

    # Helpers

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


def _plain_path(path: str) -> str:
    return path.removesuffix(".base_layer")


def _kept(pattern: str, path: str) -> bool:
    return re.search(pattern, path) is not None


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def _mode(mode: str) -> contextlib.AbstractContextManager[Any]:
    return {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "gradients": torch.enable_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[mode]()
