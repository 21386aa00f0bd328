"""Linears that Dynamo does not hand over, now or later, are said once, by name; those that are not called are not."""

from __future__ import annotations

import copy
import cProfile
import os
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from helpers import GRAPH, by_turns, compiled, said
from models import Stack
from tahf4_compiler.backends import dynamo, messages
from torch import Tensor, nn

import tahf4_compiler as tahf4
from tahf4_compiler.torch_private.calls import without_compiled_calls
from tahf4_compiler.torch_private.dynamo import before_frames

pytestmark = pytest.mark.usefixtures("no_grad")


class Hidden(Stack):
    """Blocks with a linear that is hidden from Dynamo, as hooks of libraries do it."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            forward = block.down.forward
            block.down.forward = torch.compiler.disable(lambda x, forward=forward: forward(x))


@pytest.mark.parametrize("whole", [False, True])
def test_linears_outside_of_the_graphs_are_said_once_with_the_cause(whole, caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    want = call(x)
    assert not said(caplog)
    for _ in range(3):
        assert torch.equal(call(x), want)
    (message,) = said(caplog)
    assert "Hidden: 3 linears of its repeated blocks run in high precision" in message
    assert "(blocks.0.down, blocks.1.down, blocks.2.down)" in message
    assert "`torch.compiler.disable`" in message


class Cached(Stack):
    """Runs its blocks outside of every graph, and in some calls not at all, as MagCache and others do."""

    pattern = "yes"
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(self.first(x)))

    @torch.compiler.disable
    def inside(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.pattern[self.calls % len(self.pattern)] == "y":
            for block in self.blocks:
                x = block(x)
        return x


@by_turns("pattern", ["y", "yn", "ynn", "yyn", "ynnnnnnnnn"])
def test_blocks_outside_of_graphs_are_said_however_often_a_cache_leaves_them_out(pattern, whole, caplog):
    model, x = Cached().eval(), torch.randn(4, 64)
    model.pattern = pattern
    call = compiled(model, whole)
    for _ in range(24):
        call(x)
    (message,) = said(caplog)
    assert "Cached: 6 linears of its repeated blocks run in high precision" in message


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_of_which_dynamo_hands_over_nothing_is_said(whole, caplog):
    class Nothing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = self.hidden(block, x)  # breaks a graph inside of a loop: Dynamo gives the function up
            return x

        @torch.compiler.disable
        def hidden(self, block: nn.Module, x: Tensor) -> Tensor:
            return block(x)

    model, x = Nothing().eval(), torch.randn(4, 64)
    for options in ({"keep": ["up", "down"]}, {}):
        torch._dynamo.reset()
        # As torch.compile(backend="tahf4") does first
        before_frames(dynamo.tahf4, dynamo._begin, messages.say_overruled)
        call = compiled(copy.deepcopy(model), whole, **options)
        for _ in range(3):
            assert torch.equal(call(x), model(x))
        assert len(said(caplog)) == (not options)


def test_calls_of_a_model_whose_linears_all_run_in_4_bits_are_not_watched(monkeypatch):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, True)
    call(x)
    monkeypatch.setattr(sys, "setprofile", None)  # calling it would raise
    for _ in range(3):
        call(x)


class Sometimes(Stack):
    """Leaves its last block out, as a cache does."""

    left_out = True

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2] if self.left_out else self.blocks:
            x = block(x)
        return x


def test_blocks_that_are_not_called_are_not_said(caplog):
    model, x = Sometimes().eval(), torch.randn(4, 64)
    call = compiled(model, True)
    for _ in range(6):
        call(x)
    model.left_out = False
    call(x)
    assert not said(caplog)


@pytest.mark.parametrize("by", ["keep", "options"])
def test_linears_that_the_user_keeps_are_not_said(by, caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)
    if by == "keep":
        tahf4.keep(model, ["down"])
    call = compiled(model, True, **({"keep": ["down"]} if by == "options" else {}))
    for _ in range(3):
        call(x)
    assert not said(caplog)


def test_a_first_call_that_fails_says_nothing(caplog):
    class Fails(Stack):
        fail = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            if self.fail:
                raise RuntimeError("stop")
            return self.blocks[2](self.blocks[1](x))

    model, x = Fails().eval(), torch.randn(4, 64)
    call = compiled(model, True)
    with pytest.raises(RuntimeError, match="stop"):
        call(x)
    model.fail = False
    for _ in range(3):
        call(x)
    assert not said(caplog)


def gave_up(call, x):
    """Run a model that Dynamo has given up, and return whether all of it ran as it is."""
    model = getattr(call, "_orig_mod", call)
    with without_compiled_calls(model):
        want = model(x)
    return torch.equal(call(x), want)


def with_hooks_of_accelerate(call, model, x):
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        add_hook_to_module(linear, AlignDevicesHook("cpu"))
    call(x)
    remove_hook_from_module(model, recurse=True)
    return x


def beyond_the_recompile_limit(call, model, x):
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        call(x[:2])
    return x[:2]


def under_vmap(call, model, x):
    torch.vmap(call)(x)
    return x


@by_turns("give_up", [with_hooks_of_accelerate, beyond_the_recompile_limit, under_vmap])
def test_what_dynamo_gives_up_later_is_said_once(give_up, whole, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    for _ in range(3):
        call(x)
    assert not said(caplog)
    x = give_up(call, model, x)
    for _ in range(3):
        assert gave_up(call, x), "Dynamo itself compiles it now: nothing is to be said"
    (message,) = said(caplog)
    text = "called under torch.vmap" if give_up is under_vmap else "6 linears of its repeated blocks run in high"
    assert f"Stack: {text}" in message


@by_turns("how", ["vmap", "jvp", "grad"])
def test_a_first_call_under_a_transform_is_said_once(how, whole, caplog):
    before_frames(dynamo.tahf4, dynamo._begin, messages.say_overruled)  # as torch.compile(backend="tahf4") does first
    call, x = compiled(Stack().eval().requires_grad_(False), whole), torch.randn(4, 64)
    calls = {
        "vmap": lambda: torch.vmap(call)(x),
        "jvp": lambda: torch.func.jvp(call, (x,), (x,)),
        "grad": lambda: torch.func.grad(lambda x: call(x).sum())(x),
    }
    for _ in range(2):
        calls[how]()
    (message,) = said(caplog)
    assert "Stack: called under torch.vmap or torch.func" in message


def test_a_transform_inside_of_what_is_compiled_is_not_said(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = torch.compile(lambda x: torch.vmap(lambda row: model(row))(x), backend="tahf4", options=GRAPH)
    assert not torch.equal(call(x), model(x)), "it runs in 4 bits"
    assert not said(caplog)


def test_pytorch_does_not_compile_its_own_modules_by_their_method():
    """PyTorch 2.15 does: when no earlier one is supported, the row of docs/compatibility.md goes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(5, 64)
    by_method, by_function = (nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2))
    by_method.compile(backend=backend)
    by_method(x)
    assert bool(graphs) is (torch.__version__ >= "2.15")
    graphs.clear()
    torch.compile(by_function, backend=backend)(x)
    assert len(graphs) == 1


@by_turns("more", ["twice", "adapter", "a cache before"])
def test_what_else_is_counted_hides_no_linear(more, whole, caplog):
    class Skipped(Stack):
        looped, left_out = 1, 0

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.looped):
                x = self.blocks[0](x)
            return self.blocks[2](self.hidden(x))

        @torch.compiler.disable
        def hidden(self, x: Tensor) -> Tensor:
            self.left_out -= 1
            return x if self.left_out > 0 else self.blocks[1](x)

    model, x = Skipped().eval(), torch.randn(4, 64)
    if more == "twice":
        model.looped = 2
    elif more == "adapter":
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["blocks.0.up", "blocks.2.down"]), model)
    else:
        model.left_out = 40
    model.requires_grad_(False)
    call = compiled(model, whole)
    for _ in range(80):
        call(x)
    (message,) = [text for text in said(caplog) if "did not hand their code" in text]
    assert "Skipped: 2 linears" in message and "(blocks.1.up, blocks.1.down)" in message


@pytest.mark.parametrize(
    "profile",
    # PyTorch's takes ten seconds to write down the stacks.
    [cProfile.Profile, pytest.param(lambda: torch.profiler.profile(with_stack=True), marks=pytest.mark.slow)],
)
def test_a_profiler_may_watch_while_calls_are_looked_at(profile, caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)
    call = compiled(model, True)
    with profile():
        theirs = sys.getprofile()
        for _ in range(3):
            want = call(x)
        assert sys.getprofile() is theirs
    # From Python 3.12 on cProfile has a place of its own.
    assert theirs is not None or (profile is cProfile.Profile and sys.version_info >= (3, 12))
    for _ in range(3):
        assert torch.equal(call(x), want)
    assert len(said(caplog)) == 1 and sys.getprofile() is None


@pytest.mark.slow  # in this process: test_never_begun.py
def test_a_process_whose_compiler_is_off_is_said():
    script = """
        import torch
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
        call = torch.compile(model, backend="tahf4")
        x = torch.ones(1, 64)
        assert torch.equal(call(x), model(x))
    """
    run, environment = [sys.executable, "-c", textwrap.dedent(script)], {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    found = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert found.stderr.count("compiles nothing: PyTorch's compiler is off (TORCH_COMPILE_DISABLE, ") == 1
