"""Regions that only run are written into the graph; the linears of branches and loops have a reason."""

from __future__ import annotations

import pytest
import torch
from helpers import GRAPH, block_linears, expected, plans, relative, warned
from models import Block, Stack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tahf4_compiler as tahf4
from tahf4_compiler.graph_capture.export import capture_program
from tahf4_compiler.model.reasons import Cause


class Around(Stack):
    """Blocks that something runs."""

    def __init__(self, how) -> None:
        super().__init__(depth=2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.how(block, x)
        return self.last(x)


def autocast(block: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return block(x).float()


def gradients(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x)


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


class Region(Block):
    """A block that PyTorch compiles once for all places that call it."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def frozen(how, cls=Block) -> Around:
    model = Around(how)
    model.blocks = nn.ModuleList(cls() for _ in range(2))
    return model.eval().requires_grad_(False)


RUN_ONCE = {
    "autocast": (autocast, Block),
    "gradients": (gradients, Block),
    "checkpoint": (checkpointed, Block),
    "region": (lambda block, x: block(x), Region),
    "nested": (checkpointed, Region),
}


@pytest.mark.parametrize("how", RUN_ONCE)
def test_regions_that_run_once_run_in_4_bits_by_both_captures(how, tmp_path):
    model, x = frozen(*RUN_ONCE[how]), torch.randn(4, 64)
    want = expected(model, block_linears(model))(x)
    # Under autocast the definition rounds to bfloat16 elsewhere, and this moves values across borders of 4 bits.
    close = 0.05 if how == "autocast" else 1e-5
    options = {**GRAPH, "dump_dir": str(tmp_path)}
    compiled = torch.compile(model, backend="tahf4", options=options, fullgraph=True)(x)  # gradient mode is on
    (plan,) = plans(tmp_path)
    assert {d["module"] for d in plan if d["decision"] == "hif4"} == set(block_linears(model))
    assert relative(compiled, want) < close
    program = torch.export.export(model, (x,))
    before = str(program)
    lowered = tahf4.lower(capture_program(program), options={"rotate.block": 0})
    assert {d.module for d in lowered.plan if d.decision == "hif4"} == set(block_linears(model))
    assert relative(lowered(x), compiled) < 1e-5
    assert str(program) == before
    torch.testing.assert_close(program.module()(x), model(x))


def test_autocast_inside_of_a_model_keeps_the_types_that_it_gives():
    def low(block, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block.down(block.up(x))

    class Ends(Around):
        def forward(self, x):
            return self.how(self.blocks[1], self.how(self.blocks[0], x))

    model, x = Ends(low).eval().requires_grad_(False), torch.randn(4, 64)
    assert model(x).dtype == torch.bfloat16
    for options in (GRAPH, {**GRAPH, "disable_passes": ["quantize"]}):
        assert torch.compile(model, backend="tahf4", options=options)(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(model, backend="tahf4", options={**GRAPH, "keep": ["."]})(x), model(x))
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options={"keep": ["."]})
    torch.testing.assert_close(lowered(x), model(x))


def test_a_program_whose_forward_switches_gradients_off_shows_its_linears():
    class Off(Stack):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    program = torch.export.export(Off().eval(), (torch.randn(4, 64),))
    assert len(tahf4.lower(capture_program(program)).plan) == 8


def condition(block: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: block(x), lambda x: block(-x), (x,))


def loop(block: nn.Module, x: Tensor) -> Tensor:
    return torch.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, block(x)), (torch.tensor(0), x))[1]


def condition_in_autocast(block: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.cond(x.sum() > 0, lambda x: autocast(block, x), lambda x: x.clone(), (x,))


@pytest.mark.parametrize("how", [condition, loop, condition_in_autocast])
@pytest.mark.parametrize("way", ["capture", "compile"])
def test_linears_of_branches_and_loops_are_in_the_plan_with_a_reason(how, way, tmp_path, caplog):
    model, x = frozen(how), torch.randn(4, 64)
    if way == "capture":
        lowered = tahf4.lower(tahf4.capture(model, (x,)))
        plan = [(d.module, d.decision, d.cause) for d in lowered.plan]
        torch.testing.assert_close(lowered(x), model(x))
    else:
        options = {**GRAPH, "dump_dir": str(tmp_path)}
        torch.testing.assert_close(torch.compile(model, backend="tahf4", options=options)(x), model(x))
        plan = [(d["module"], d["decision"], Cause(d["cause"])) for d in plans(tmp_path)[0]]
        (message,) = warned(caplog)
        assert "4 linears of its repeated blocks run in high precision" in message and "region: inside of" in message
    inside = [(path, "high_precision", Cause.REGION) for path in block_linears(model)]
    assert sorted(plan) == sorted([*inside, *((p, "high_precision", Cause.BOUNDARY) for p in ("first", "last"))])
