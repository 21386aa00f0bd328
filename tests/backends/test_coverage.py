"""Linears that Dynamo does not hand over, now or later, are said once, by name; those that are not called are not."""

from __future__ import annotations

import copy
import cProfile
import os
import pickle
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from helpers import GRAPH, by_turns, said, warned
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


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def compiled(model: nn.Module, whole: bool, **options):
    if whole:
        return torch.compile(model, backend="tahf4", options={**GRAPH, **options})
    model.compile(backend="tahf4", options={**GRAPH, **options})
    return model


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


@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_does_not_run_what_stands_around_the_calls_of_its_original(whole):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    call(x)
    copied = copy.deepcopy(call)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied(x).any()


@pytest.mark.parametrize("whole", [False, True])
def test_pytorch_drops_the_compilation_of_a_model_in_place_from_its_copy(whole, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    found, copied = call(x), copy.deepcopy(call)
    assert ("Stack: PyTorch leaves the compilation" in caplog.text) == (not whole)
    caplog.clear()
    copy.deepcopy(copied)
    pickle.loads(pickle.dumps(model))
    assert not caplog.text
    assert torch.equal(copied(x), found) == whole
    with without_compiled_calls(model):
        assert torch.equal(copied(x), model(x)) == (not whole)


def test_the_copy_of_a_packed_model_runs_in_4_bits_and_is_not_said_to_be_another(caplog):
    model, x = Stack().eval().requires_grad_(False), torch.randn(4, 64)
    tahf4.quantize_(model)
    found = compiled(model, False)(x)
    assert torch.equal(copy.deepcopy(model)(x), found) and "deep copy" not in caplog.text


def kept_model():
    model = Stack().eval()
    tahf4.keep(model, [".*"])
    return model


def test_a_model_that_was_compiled_anew_with_another_backend_is_copied_in_silence(caplog):
    model = compiled(Stack().eval(), whole=False)
    model(torch.randn(4, 64))
    model.compile(backend="eager")
    copy.deepcopy(model)
    assert not said(caplog)
    copy.deepcopy(compiled(model, whole=False))
    assert len(said(caplog)) == 1


@pytest.mark.parametrize(
    ("make", "wanted"), [(lambda: Stack().eval(), True), (lambda: nn.Linear(16, 16), False), (kept_model, False)]
)
def test_a_copy_before_the_first_call_is_said_if_the_original_will_run_in_4_bits(make, wanted, caplog):
    model = make()
    model.compile(backend="tahf4", options=GRAPH)
    copy.deepcopy(copy.deepcopy(model))
    assert caplog.text.count("PyTorch leaves the compilation by model.compile() out of a deep copy") == wanted


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


def test_a_copy_of_many_compiled_blocks_warns_once(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    for block in model.blocks:
        compiled(block, False)
    model(x)
    copy.deepcopy(copy.deepcopy(model))
    assert [r.getMessage()[:5] for r in caplog.records if "deep copy" in r.getMessage()] == ["Block"]


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
    """If this fails, PyTorch calls a backend there: the row of docs/compatibility.md goes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(5, 64)
    by_method, by_function = (nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2))
    by_method.compile(backend=backend)
    by_method(x)
    assert not graphs
    torch.compile(by_function, backend=backend)(x)
    assert len(graphs) == 1


class Products(Stack):
    """Blocks whose linears are used in some way."""

    def __init__(self, product, which=("up", "down")) -> None:
        super().__init__()
        for block in self.blocks:
            for name in which:
                linear = getattr(block, name)
                linear.forward = lambda x, linear=linear: product(x, linear)


@by_turns(
    "product",
    [
        lambda x, m: torch.einsum("bk,nk->bn", x, m.weight) + m.bias,
        lambda x, m: (m.weight @ x.mT).mT + m.bias,
        lambda x, m: torch.bmm(x[None], m.weight.t()[None])[0] + m.bias,
        lambda x, m: nn.functional.linear(x, m.weight * 0.5, m.bias),
        lambda x, m: torch.cat([nn.functional.linear(x, m.weight[i::2], m.bias[i::2]) for i in (0, 1)], -1),
    ],
)
def test_weights_that_graphs_use_otherwise_are_said_by_name(product, whole, caplog):
    model, x = Products(product, ["down"]).eval(), torch.randn(4, 64)
    call = compiled(model, whole)
    for _ in range(4):
        call(x)
    (message,) = said(caplog)
    assert "Products: 3 linears of its repeated blocks run in high precision, because of how graphs use" in message
    assert "(blocks.0.down, blocks.1.down, blocks.2.down: used otherwise than in a linear" in message


def test_weights_in_a_branch_or_of_a_type_that_is_not_held_are_said_with_this_cause(caplog):
    def either(x, m):
        return torch.cond(x.sum() > 0, lambda x: nn.functional.linear(x, m.weight), lambda x: x @ m.weight.t(), (x,))

    model, x = Products(either, ["down"]).eval(), torch.randn(4, 64)
    call = compiled(model, True)
    for _ in range(3):
        call(x)
    (message,) = said(caplog)
    assert "3 linears" in message and "(blocks.0.down: region: inside of cond, which stays as it is; " in message
    assert "otherwise than in a linear" not in message
    caplog.clear()
    model = Products(lambda x, m: nn.functional.linear(x, m.weight.to(x.dtype), m.bias)).eval()
    call = compiled(model, True)
    for _ in range(2):
        call(x)
    for block in model.blocks:
        block.up.weight.data = block.up.weight.data.to(torch.float8_e4m3fn)
    for _ in range(3):
        call(x)
    (message,) = said(caplog)
    assert "Products: 3 linears" in message and "(blocks.0.up: dtype: weight is float8_e4m3fn; blocks.1.up: " in message
    assert "otherwise than in a linear" not in message


class Either(nn.Module):
    """Two linears in the branches of a condition, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.up(x), lambda x: self.down(x), (x,))


class Few(nn.Module):
    """A linear with few features."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x).sum()


USED = "linears of its repeated blocks run in high precision, because of how graphs use their weights (0.up: region: "


@pytest.mark.parametrize(
    ("kind", "how", "says"),
    [
        (Either, "whole", f"Sequential: 6 {USED}"),
        (Either, "by blocks", f"Either: 2 {USED.replace('0.up', 'up')}"),
        (Either, "function", f"Sequential: 6 {USED}"),
        (Few, "whole", "Sequential: nothing runs in 4 bits: 3 of 3 linears: shape: 64 -> 8 features"),
        (Few, "by blocks", "Few: nothing runs in 4 bits: 1 of 1 linears: shape: 64 -> 8 features"),
        (Few, "function", "Sequential: none of 3 linears runs in 4 bits (0.up: shape: 64 -> 8 features"),
    ],
)
def test_graphs_without_4_bits_are_said_once_for_all_blocks(kind, how, says, caplog):
    model, x = nn.Sequential(kind(), kind(), kind()).eval(), torch.randn(4, 64)
    if how == "by blocks":
        call = model
        for block in model:
            compiled(block, False)
    elif how == "function":
        call = torch.compile(lambda x: model(x) + 1, backend="tahf4", options=GRAPH)
    else:
        call = compiled(model, True)
    for _ in range(3):
        call(x)
    (message,) = warned(caplog)
    assert message.startswith(says)


def test_a_graph_that_an_option_leaves_without_4_bits_is_said(caplog):
    call = compiled(Stack(depth=2).eval(), True, **{"plan.min_features": 65})
    for _ in range(3):
        call(torch.randn(4, 64))
    (message,) = warned(caplog)
    assert "none of 6 linears runs in 4 bits (" in message and "blocks.0.down: shape: 128 -> 64 features" in message


class Marked(nn.Parameter):
    """A parameter of a class of its own."""


CANNOT = [
    (lambda m: setattr(m.weight, "data", m.weight.data.to(torch.float8_e4m3fn)), "dtype: weight is float8_e4m3fn"),
    (lambda m: setattr(m, "weight", Marked(m.weight.detach())), "weight: a Marked, not a plain tensor"),
    (lambda m: setattr(m, "bias", nn.Parameter(m.bias[None])), "shape: the bias is (1, 128), expected (128,)"),
    (nn.utils.parametrizations.weight_norm, "weight: no parameter of the linear; a parametrization, a hook or"),
]


@pytest.mark.parametrize(("change", "reason"), CANNOT, ids=[reason.partition(" ")[2] for _, reason in CANNOT])
def test_linears_of_blocks_that_cannot_be_packed_from_the_first_call_on_are_said_with_the_reason(
    change, reason, caplog
):
    model = Stack().eval()
    for linear in (model.first, *(block.up for block in model.blocks[:2])):
        change(linear)
        linear.forward = lambda x, m=linear: nn.functional.linear(x, m.weight.to(x.dtype), m.bias)
    call = torch.compile(model, backend="tahf4", options={**GRAPH, "keep": ["blocks.0"]})
    for _ in range(2):
        call(torch.randn(4, 64))
    (message,) = said(caplog)
    assert "Stack: 1 linears of its repeated blocks run in high precision, because of" in message
    assert f"(blocks.1.up: {reason}" in message


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


class Raw(nn.Module):
    """A product that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def raw(script: bool = False) -> nn.Module:
    """Return a model with a head of its own behind blocks without linears."""
    model = Stack()
    for block in model.blocks:
        block.up, block.down = Raw(), Raw()
    if script:
        for i in range(3):
            model.blocks[i] = torch.jit.trace(Stack().blocks[0], torch.randn(4, 64))
    return model.eval()


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_without_any_linear_in_4_bits_is_said_as_by_quantize(whole, caplog):
    model, x = nn.Sequential(Raw(), Raw(), nn.Sequential(nn.Linear(64, 3))).eval(), torch.randn(4, 64)
    for options in ({}, {"keep": ["0"]}):
        other = Wrapped(copy.deepcopy(model))
        call = compiled(other, whole, **options)
        for _ in range(3):
            call(x)
    (message, *_) = said(caplog)
    assert "Wrapped: nothing runs in 4 bits: 1 of 1 linears: " in message


@by_turns(
    "script, adapter, cause",
    [
        (False, False, "its repeated blocks hold no other nn.Linear (6 Raw), and no other"),
        (True, False, "it holds TorchScript, of which PyTorch compiles nothing"),
        (False, True, "its repeated blocks hold no other nn.Linear (6 Raw)"),
    ],
    ids=["products", "script", "adapter"],
)
def test_a_model_of_which_all_linears_are_boundary_is_said_once_with_what_its_blocks_hold(
    script, adapter, cause, whole, caplog
):
    model, x = raw(script), torch.randn(4, 64)
    if adapter:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first"], r=64), model)
        model.requires_grad_(False)
    call = compiled(model, whole)
    for _ in range(3):
        call(x)
    (message,) = said(caplog)
    assert message.startswith("Stack: nothing runs in 4 bits: 2 of ") and cause in message
    assert "linears: boundary: outside the repeated blocks; " in message


@pytest.mark.parametrize("alone", [False, True])
def test_an_embedder_that_the_model_around_it_leaves_is_not_said(alone, caplog):
    model, x = Stack().eval().requires_grad_(False), torch.randn(4, 64)
    tahf4.quantize_(model)
    for part in (model.first, *model.blocks, model.last):
        compiled(part, False)
    for _ in range(3):
        model.first(x) if alone else model(x)
    assert not said(caplog)


def test_parameters_that_are_no_modules_weight_run_in_4_bits_and_nothing_is_said(caplog):
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(128, 64) * 0.1)
            self.down = nn.Parameter(torch.randn(64, 128) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.linear(nn.functional.linear(x, self.up).relu(), self.down)

    model, x = nn.Sequential(Raw(), Raw(), Raw()).eval(), torch.randn(4, 64)
    call = compiled(Wrapped(model), True)
    for _ in range(3):
        assert 0 < (call(x) - model(x)).norm() < 0.3 * model(x).norm()
    assert not said(caplog)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 128)
        self.out = nn.Linear(128, 64)
        self.table = nn.Parameter(torch.randn(1, 6, 64))  # no matrices: few rows
        self.experts = nn.Parameter(torch.randn(4, 64, 64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.gate(x).relu()) + self.table[:, 0]
        return x + sum(nn.functional.linear(y, weight) for weight in self.experts)


def test_batches_of_matrices_are_said_once_in_compile_and_quantize(caplog):
    model, x = nn.Sequential(Experts(), Experts(), Experts()).eval(), torch.randn(4, 64)
    call = compiled(Wrapped(model), True)
    for _ in range(3):
        call(x)
    (message,) = said(caplog)
    assert "3 weights of its repeated blocks are batches of matrices" in message and "They hold 49% of" in message
    assert "(" not in message.split("precision: ")[0] and "model.0.experts, model.1.experts" in message
    caplog.clear()
    tahf4.quantize_(model)
    assert caplog.text.count("They hold 49% of the values there, and no plan or share counts them") == 1


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


@pytest.mark.parametrize("called", [False, True])
def test_another_backend_around_blocks_that_are_compiled_with_tahf4_is_said_once(called, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    before_frames(dynamo.tahf4, dynamo._begin, messages.say_overruled)  # as torch.compile(backend="tahf4") does first
    for block in model.blocks:
        compiled(block, False)
    if called:
        model(x)
    outer = torch.compile(model, backend="eager")
    for _ in range(2):
        got = outer(x)
    (message,) = said(caplog)
    assert "Stack: is compiled with another backend than tahf4, and PyTorch hands it the code" in message
    assert "also of 3 modules that were compiled with tahf4 (the first is a Block)" in message
    with without_compiled_calls(model):
        assert torch.allclose(got, model(x), atol=1e-6), "it runs in the original precision"


def test_another_backend_around_a_model_that_is_compiled_in_place_gets_nothing_of_it(caplog):
    """If this fails, PyTorch hands it over, and it has to be said."""
    model, x = Stack().eval(), torch.randn(4, 64)
    outer = torch.compile(compiled(model, False), backend="eager")
    want = outer(x)
    for _ in range(2):
        assert torch.equal(model(x), want) and torch.equal(outer(x), want)
    with without_compiled_calls(model):
        assert not torch.allclose(want, model(x), atol=1e-4)
    assert not said(caplog)


def test_another_backend_around_parts_without_linears_is_not_said(caplog):
    messages.say_overruled(nn.Sequential(), [nn.ReLU()])
    assert not said(caplog)
    messages.say_overruled(nn.Sequential(), [nn.ReLU(), Stack()])
    assert "2 modules that were compiled with tahf4 (the first is a ReLU)" in said(caplog)[0]


def test_another_backend_around_a_packed_model_is_not_said(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    tahf4.quantize_(model)
    for block in model.blocks:
        compiled(block, False)
    torch.compile(model, backend="eager")(x)
    torch.compile(Stack().eval(), backend="eager")(x)
    assert not said(caplog)
