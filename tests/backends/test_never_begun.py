"""Models that Dynamo does not even begin to compile are said, once, by name and with the cause."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import GRAPH, said
from models import Stack
from tahf4_compiler.backends import messages
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

REASON = "because Dynamo did not hand their code to tahf4"


pytestmark = pytest.mark.usefixtures("no_grad")


def compiled(model: nn.Module, how: str, **options) -> nn.Module:
    settings = {"backend": "tahf4", "options": {**GRAPH, **options}}
    if how == "whole":
        return torch.compile(model, **settings)
    for part in [model] if how == "in place" else model.blocks:
        part.compile(**settings)
    return model


def hide(module: nn.Module) -> None:
    module.forward = torch.compiler.disable(module.forward)


@pytest.mark.parametrize("how", ["whole", "in place", "by blocks"])
def test_a_forward_that_is_disabled_is_said_once(how, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    for module in model.blocks if how == "by blocks" else [model]:
        hide(module)
    call = compiled(model, how)
    want = call(x)
    assert not said(caplog), "what runs is looked at from the second call on"
    for _ in range(4):
        assert torch.equal(call(x), want)
    (message,) = said(caplog)
    assert REASON in message and "a whole forward is under torch.compiler.disable" in message
    if how == "by blocks":
        assert message.startswith("Stack: 2 linears") and "(blocks.0.up, blocks.0.down; other Blocks that" in message
    else:
        assert message.startswith("Stack: 6 linears") and "blocks.2.up, ...)" in message


@pytest.mark.skipif(torch.__version__ >= "2.15", reason="PyTorch 2.15 compiles later calls")
def test_a_mode_around_the_first_call_is_named_among_what_gives_no_reason(caplog):
    model, x = Stack(depth=2).eval(), torch.randn(4, 64)
    call = compiled(model, "whole")
    with FlopCounterMode(display=False), pytest.warns(UserWarning, match="global hooks"):
        call(x)
    for _ in range(3):
        assert torch.equal(call(x), model(x)), "Dynamo has given it up"
    (message,) = said(caplog)
    assert "reasons in this process: none, as where a whole forward is under" in message
    assert "or where a TorchDispatchMode (FlopCounterMode)" in message


def test_one_block_that_is_disabled_is_named_and_the_others_run_in_4_bits(caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    hide(model.blocks[1])
    plain = copy.deepcopy(model)(x)
    compiled(model, "by blocks")
    for _ in range(3):
        assert not torch.equal(model(x), plain)
    (message,) = said(caplog)
    assert "(blocks.1.up, blocks.1.down; " in message


class Helped(Stack):
    """Calls the function in a helper, or a block, and leaves the fourth block out."""

    weights = "blocks.1"

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = self.helper(x)
        return self.blocks[2](x)

    @torch.compiler.disable
    def helper(self, x: Tensor) -> Tensor:
        if self.weights == "module":
            return self.blocks[1](x)
        return F.linear(F.linear(x, self.blocks[1].up.weight), self.blocks[1].down.weight)


def test_the_function_in_a_helper_that_is_disabled_is_said_once(caplog):
    model, x = Helped().eval(), torch.randn(4, 64)
    call = compiled(model, "whole")
    for _ in range(6):
        call(x)
    (message,) = said(caplog)
    assert message.startswith("Helped: 2 linears of its repeated blocks stand in no graph (blocks.1.up, blocks.1.down)")
    assert "(helper, test_never_begun.py:" in message


def test_a_function_in_a_frame_that_dynamo_gave_up_runs_as_it_is_while_it_is_looked_at(caplog):
    class Loop(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = F.linear(F.linear(x, block.up.weight), block.down.weight)
                torch._dynamo.graph_break()
            return x

    model, x = Loop(depth=2).eval(), torch.randn(4, 64)
    call, want = compiled(model, "whole"), model(x)
    for _ in range(4):
        assert torch.equal(call(x), want)
    (message,) = said(caplog)
    assert "4 linears" in message and "(forward, test_never_begun.py:" in message


def test_a_function_that_is_looked_at_leaves_the_modes_around_it_as_they_are(caplog):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))  # a second call of the same function

    class Reads(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.helper(x))

        @torch.compiler.disable
        def helper(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.blocks[0].up.weight), self.blocks[0].down.weight)

    call, x = compiled(Reads(depth=2).eval(), "whole"), torch.randn(4, 64)
    with Mode():
        for _ in range(4):
            call(x)
            assert torch._C._len_torch_function_stack() == 1
    assert torch._C._len_torch_function_stack() == 0
    (message,) = said(caplog)
    assert "2 linears of its repeated blocks stand in no graph (blocks.0.up, blocks.0.down)" in message


@pytest.mark.parametrize("kind", ["boundary", "buffer", "copy"])
def test_a_function_that_reads_another_weight_is_not_said_to_read_what_a_cache_left_out(kind, caplog):
    class Boundary(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.helper(x))

        @torch.compiler.disable
        def helper(self, x: Tensor) -> Tensor:
            weight = self.held if kind == "buffer" else self.first.weight
            return F.linear(x, weight.clone() if kind == "copy" else weight)

    model, x = Boundary(depth=2).eval(), torch.randn(4, 64)
    model.register_buffer("held", torch.randn(64, 64))
    call = compiled(model, "whole")
    for _ in range(4):
        call(x)
    assert len(said(caplog)) == (kind == "copy"), "a copy may be one of any weight"


def test_a_function_whose_weights_are_not_seen_is_said(caplog):
    class Unseen(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.helper(x))

        @torch.compiler.disable
        def helper(self, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                return F.linear(F.linear(x, self.blocks[0].up.weight), self.blocks[0].down.weight)

    call, x = compiled(Unseen(depth=2).eval(), "whole"), torch.randn(4, 64)
    for _ in range(4):
        call(x)
    assert len(said(caplog)) == 1


def test_modules_are_not_said_to_be_functions(caplog):
    """A block that a cache left out stands in no graph, and another that is hidden calls its linears."""
    model, x = Helped(4).eval(), torch.randn(4, 64)
    model.weights = "module"
    call = compiled(model, "whole")
    for _ in range(6):
        call(x)
    (message,) = said(caplog)
    assert "2 linears" in message and "(blocks.1.up, blocks.1.down)" in message and REASON in message


@pytest.mark.parametrize("kept", ["options", "pipeline"])
def test_what_the_user_chose_is_not_said(kept, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    hide(model)
    call = compiled(model, "whole", **({"keep": ["up", "down"]} if kept == "options" else {"pipeline": "calibration"}))
    for _ in range(3):
        call(x)
    assert not said(caplog)


def test_wrong_options_are_refused_by_the_first_call():
    call = torch.compile(Stack().eval(), backend="tahf4", options={"kep": []})
    with pytest.raises(Exception, match="kep"):
        call(torch.randn(4, 64))


@pytest.mark.parametrize("off", ["config", "stance"])
@pytest.mark.parametrize("when", ["before it is compiled", "before it is called", "after calls"])
def test_a_compiler_that_is_switched_off_later_is_said_once(off, when, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    want = model(x)
    switch = torch._dynamo.config.patch(disable=True) if off == "config" else None
    call = None if when == "before it is compiled" else compiled(model, "whole")
    if when == "after calls":
        assert not torch.equal(call(x), want)
        x = torch.cat([x, x])  # what is compiled goes on to run, where only disable is set
        want = model(x)
    with switch or torch.compiler.set_stance("force_eager"):
        call = compiled(model, "whole") if call is None else call
        for _ in range(4):
            assert torch.equal(call(x), want)
    (message,) = said(caplog)
    assert REASON in message
    assert ("torch._dynamo.config.disable" if off == "config" else "set_stance('force_eager')") in message
    if off == "config":  # Dynamo gives up what it comes to meanwhile
        torch._dynamo.reset()
    assert not torch.equal(call(x), want), "it is compiled as soon as the compiler is on"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"kep": []}, "OptionError: unknown option"),
        ({"keep": ["nothing"]}, "PatternError: keep pattern 'nothing' matches none of the 8 linears"),
        ({"keep": 1}, "OptionError: "),
    ],
)
def test_an_error_that_dynamo_is_set_to_suppress_is_said_as_the_cause(options, error, caplog):
    model, x = Stack().eval(), torch.randn(4, 64)
    with torch._dynamo.config.patch(suppress_errors=True):
        call = compiled(model, "whole", **options)
        for _ in range(3):
            assert torch.equal(call(x), model(x))
    (message,) = said(caplog)
    assert message.startswith("Stack: 6 linears") and f"suppress_errors hides an error ({error}" in message


def test_an_error_that_was_suppressed_in_one_model_is_not_the_cause_in_another(caplog):
    first, second, x = Stack().eval(), Stack().eval(), torch.randn(4, 64)
    hide(second.blocks[0])
    with torch._dynamo.config.patch(suppress_errors=True):
        for call in (compiled(first, "whole", kep=[]), compiled(second, "whole")):
            for _ in range(3):
                call(x)
            torch._dynamo.reset()
    one, other = said(caplog)
    assert "OptionError" in one and "OptionError" not in other


@pytest.mark.parametrize("how", ["whole", "in place"])
def test_an_environment_that_switches_the_compiler_off_later_is_said_once(how, caplog, monkeypatch):
    monkeypatch.setattr(messages, "_off", False)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    torch.compile(Stack(), backend="eager")
    torch.compile(Stack(), backend="tahf4", disable=True)
    assert not said(caplog)
    x = torch.randn(4, 64)
    for _ in range(2):
        model = Stack().eval()
        assert torch.equal(model(x), compiled(model, how)(x))
    (message,) = said(caplog)
    assert message.startswith('torch.compile(backend="tahf4") compiles nothing') and "TORCHDYNAMO_DISABLE" in message


def test_pytorch_runs_methods_of_the_original_unless_they_are_compiled_themselves():
    """If the first part fails, PyTorch compiles methods, too: the row of docs/compatibility.md goes."""

    class Encoder(Stack):
        def encode(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    model, x = Encoder().eval(), torch.randn(4, 64)
    want = model.encode(x)
    assert torch.equal(compiled(model, "whole").encode(x), want)
    encode = torch.compile(model.encode, backend="tahf4", options=GRAPH)
    assert 0 < (encode(x) - want).norm() < 0.5 * want.norm()


def test_a_traced_model_is_said(caplog):
    x = torch.randn(4, 64)
    call = compiled(torch.jit.trace(Stack().eval(), x), "whole")
    for _ in range(3):
        call(x)
    (message,) = said(caplog)
    assert "TopLevelTracedModule: nothing runs in 4 bits: it is TorchScript, of which PyTorch" in message


@pytest.mark.skipif(torch.__version__ >= "2.15", reason="PyTorch 2.15 compiles it")
def test_the_method_of_a_module_of_pytorch_itself_is_said(caplog):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)))
    model.compile(backend="tahf4", options=GRAPH)
    for _ in range(3):
        model(torch.randn(4, 64))
    (message,) = said(caplog)
    assert message.startswith("Sequential: 6 linears") and REASON in message
