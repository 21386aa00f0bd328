"""What a compiled function or method calls is watched like a compiled model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import GRAPH, said
from models import Stack
from tahf4_compiler.backends import dynamo, messages
from torch import Tensor, nn

from tahf4_compiler.torch_private.dynamo import before_frames

pytestmark = pytest.mark.usefixtures("no_grad")

SETTINGS = {"backend": "tahf4", "options": GRAPH}


class Hidden(Stack):
    """Blocks with a linear that is hidden from Dynamo, as hooks of libraries do it."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.down.forward = torch.compiler.disable(block.down.forward)


class Pipeline:
    """No module, but holds one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self, x: Tensor) -> Tensor:
        return self.model(x) + x


def made(how: str, model: nn.Module):
    if how == "forward":
        model.forward = torch.compile(model.forward, **SETTINGS)
        return model
    if how == "method of a pipeline":
        return torch.compile(Pipeline(model).step, **SETTINGS)
    if how == "argument":
        step = torch.compile(lambda model, x: model(x) + x, **SETTINGS)
        return lambda x: step(model, x)
    return torch.compile(lambda x: model(x) + x, **SETTINGS)


WAYS = ["forward", "closure", "argument", "method of a pipeline"]


@pytest.mark.parametrize("how", WAYS)
def test_linears_outside_of_the_graphs_are_said_once(how, caplog):
    call, x = made(how, Hidden().eval()), torch.randn(4, 64)
    want = call(x)
    for _ in range(4):
        assert torch.equal(call(x), want)
    (message,) = said(caplog)
    assert message.startswith("Hidden: 3 linears of its repeated blocks run in high precision, because Dynamo did not")
    assert "(blocks.0.down, blocks.1.down, blocks.2.down)" in message


@pytest.mark.parametrize("how", WAYS[:2])
def test_what_runs_in_4_bits_is_not_said(how, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    plain = model(x) + (x if how != "forward" else 0)
    call = made(how, model)
    for _ in range(3):
        assert 0 < (call(x) - plain).norm() < 0.3 * plain.norm()
    assert not said(caplog)


def test_a_block_that_is_called_beside_its_model_is_said_with_the_model(caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)
    step = torch.compile(lambda x: model.blocks[0](model(x)), **SETTINGS)
    for _ in range(4):
        step(x)
    (message,) = said(caplog)
    assert message.startswith("Hidden: 3 linears")


def test_a_method_that_dynamo_never_begins_is_said(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    forward = torch.compiler.disable(type(model).forward)
    type(model).encode = lambda self, x: forward(self, x)
    try:
        encode = torch.compile(model.encode, **SETTINGS)
        for _ in range(3):
            encode(x)
    finally:
        del type(model).encode
    (message,) = said(caplog)
    assert message.startswith("Stack: 6 linears of its repeated blocks run in high precision")


def test_a_model_in_a_function_of_which_dynamo_compiles_no_frame_is_said(caplog):
    class Within(nn.Module):
        """Breaks the graph where Dynamo gives a whole frame up; there is no other frame than PyTorch's own."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            for linear in (self.up, self.down):
                x = linear(x)
                torch._dynamo.graph_break()
            return x

    model, x = Within().eval(), torch.randn(4, 64)
    before_frames(dynamo.tahf4, dynamo._begin, messages.say_overruled)  # as torch.compile(backend="tahf4") does first
    step = torch.compile(lambda x: model(x) + x, **SETTINGS)
    for _ in range(4):
        assert torch.equal(step(x), model(x) + x)
    (message,) = said(caplog)
    assert message.startswith("Within: 2 linears of its repeated blocks run in high precision, because Dynamo did not")


def test_a_method_that_calls_a_part_says_nothing_of_the_rest(caplog):
    class Encoder(Stack):
        def encode(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    model, x = Encoder().eval(), torch.randn(4, 64)
    encode = torch.compile(model.encode, **SETTINGS)
    for _ in range(20):
        encode(x)
    assert not said(caplog)


def test_models_of_one_class_that_a_function_calls_are_said_once(caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)

    def parts(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return x

    step = torch.compile(parts, **SETTINGS)
    for _ in range(8):
        step(x)
    (message,) = said(caplog)
    assert message.startswith("Block: 1 linears")
    assert "(down; other Blocks that are compiled or called one by one may be alike)" in message


@pytest.mark.parametrize("first", [False, True])
def test_a_model_and_a_part_of_it_are_said_by_the_name_of_the_model(first, caplog):
    model, x = Hidden().eval(), torch.randn(4, 64)
    step = torch.compile(lambda x, whole: model(x) if whole else model.blocks[0](x), **SETTINGS)
    for _ in range(3):
        step(x, first)
        step(x, not first)
    (message,) = said(caplog)
    assert message.startswith("Hidden: ")


def test_another_model_of_a_class_that_was_said_is_not_said(caplog):
    step, x = torch.compile(lambda model, x: model(x), **SETTINGS), torch.randn(4, 64)
    for model in (Hidden().eval(), Hidden().eval()):
        for _ in range(4):
            step(model, x)
    (message,) = said(caplog)
    assert message.startswith("Hidden: 3 linears")


def test_a_function_does_not_keep_the_models_that_it_was_called_with():
    step = torch.compile(lambda model, x: model(x), **SETTINGS)
    model = Stack(depth=1).eval()
    gone = weakref.ref(model)
    step(model, torch.randn(4, 64))
    step(model, torch.randn(4, 64))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_another_compilation_traces_through_a_compiled_function():
    model, x = Stack(depth=1).eval(), torch.randn(4, 64)
    step = torch.compile(lambda x: model(x) + x, **SETTINGS)
    step(x)
    outer = torch.compile(lambda x: step(x) * 2, backend="eager", fullgraph=True)
    assert torch.allclose(outer(x), (model(x) + x) * 2)


def test_classes_and_modules_that_are_compiled_are_no_functions(caplog):
    @torch.compile(**SETTINGS)
    class Model(Stack):
        pass

    model, x = Model().eval(), torch.randn(4, 64)
    assert torch.isfinite(model(x)).all()
    assert not said(caplog)


def test_a_compiled_function_may_be_compiled_explained_and_wrapped_again():
    model, x = Stack(depth=1).eval(), torch.randn(4, 64)

    def step(x: Tensor) -> Tensor:
        return model(x) + x

    call = torch.compile(step, **SETTINGS)
    want = call(x)
    assert call.__wrapped__ is step
    assert torch.equal(torch.compile(call, **SETTINGS)(x), want)
    assert torch.allclose(torch.compile(call, backend="eager")(x), step(x))
    assert torch._dynamo.explain(call)(x).graph_count == 1
    for _ in range(2):  # as where a setup runs twice
        model.forward = torch.compile(model.forward, **SETTINGS)
    assert torch.equal(model(x) + x, want)


def test_dynamo_does_not_compile_what_watches(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)

    def step(x: Tensor, whole: bool) -> Tensor:
        for block in model.blocks[: None if whole else 1]:
            x = block(x)
        return x

    call = torch.compile(step, **SETTINGS)
    for whole in (True, False):
        call(x, whole)
    with torch.compiler.set_stance("fail_on_recompile"):
        for whole in (True, False, False, False):
            call(x, whole)
    assert not said(caplog)
