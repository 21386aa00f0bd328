"""Repeated blocks are found by structure, in models whose names differ."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from accelerate.utils import compile_regions
from helpers import GRAPH, block_linears, expected, planned, relative, said, warned
from models import Block, Stack, encoder, flux, output, pixart, sd3, wan
from torch import Tensor, nn

import tahf4_compiler as tahf4
from tahf4_compiler.model.tree import is_boundary

WAN_BOUNDARY = {
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "proj_out",
}


def compiled_plan(model, inputs, **options):
    """Return the plan of a model compiled as one graph, and its output."""
    with torch.no_grad(), planned() as found:
        model = torch.compile(model, backend="tahf4", options={**GRAPH, **options}, fullgraph=True)
        result = output(model(**inputs))
    (plan,) = found
    return plan, result


@functools.cache
def compiled_network(build):
    """Return a model, its inputs, its plan and its output: several tests look at one compilation."""
    model, inputs = build()
    return model, inputs, *compiled_plan(model, inputs)


@pytest.fixture(scope="module", autouse=True)
def _forget_networks():
    yield
    compiled_network.cache_clear()


@pytest.fixture
def plans():
    with planned() as found:
        yield found


def quantized(plan):
    return {d["module"] for d in plan if d["decision"] == "hif4"}


def kept(plan):
    return {d["module"] for d in plan if d["decision"] == "high_precision"}


def test_wan_quantizes_ten_linears_a_block_and_keeps_the_six_of_the_boundary():
    model, inputs, plan, result = compiled_network(wan)
    assert kept(plan) == WAN_BOUNDARY
    assert Counter(path.split(".")[1] for path in quantized(plan)) == {"0": 10, "1": 10}
    assert all(d["reason"] for d in plan)
    with torch.no_grad():
        assert 1e-3 < relative(result, output(model(**inputs))) < 0.1


def test_wan_i2v_keeps_its_image_embedder_too():
    model, inputs = wan(image_dim=64, added_kv_proj_dim=128)
    plan, _ = compiled_plan(model, inputs)
    image = {f"condition_embedder.image_embedder.ff.net.{leaf}" for leaf in ("0.proj", "2")}
    assert kept(plan) == WAN_BOUNDARY | image
    assert len(quantized(plan)) == 2 * 12


def test_wan_ti2v_takes_a_timestep_for_each_token():
    model, inputs = wan()
    inputs["timestep"] = torch.full((1, 32), 10.0)
    plan, _ = compiled_plan(model, inputs)
    assert kept(plan) == WAN_BOUNDARY


@pytest.mark.parametrize(
    ("build", "containers", "boundary"),
    [
        (flux, ("transformer_blocks", "single_transformer_blocks"), 10),
        pytest.param(sd3, ("transformer_blocks",), 7, marks=pytest.mark.slow),
        pytest.param(pixart, ("transformer_blocks",), 10, marks=pytest.mark.slow),
        (encoder, ("layers",), 0),
    ],
)
def test_other_architectures_quantize_their_blocks_and_nothing_else(build, containers, boundary):
    model, _, plan, _ = compiled_network(build)
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[0] in containers}
    if build is encoder:  # its q, k and v projection is a parameter of the attention module
        inside |= {f"layers.{i}.self_attn.in_proj_weight" for i in range(3)}
    assert quantized(plan) == inside
    assert len(kept(plan)) == boundary
    assert {d["reason"] for d in plan if d["module"] in kept(plan)} <= {"boundary: outside the repeated blocks"}


@pytest.mark.parametrize(
    "build", [wan, encoder, *(pytest.param(it, marks=pytest.mark.slow) for it in (flux, sd3, pixart))]
)
def test_both_captures_give_the_same_plan_and_numbers(build):
    model, inputs, plan, result = compiled_network(build)
    # Every pass that claims to keep results is held to it on the way.
    lowered = tahf4.lower(tahf4.capture(model, (), inputs), options={**GRAPH, "verify_tolerance": 1e-5})
    assert {(d.module, d.decision, d.reason) for d in lowered.plan} == {
        (d["module"], d["decision"], d["reason"]) for d in plan
    }
    assert relative(output(lowered(**inputs)), result) < 1e-5


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_encoder_layer_is_written_out_exactly(norm_first, masked):
    model, inputs = encoder(norm_first=norm_first)
    if masked:
        inputs["mask"] = nn.Transformer.generate_square_subsequent_mask(10)
    with torch.no_grad():
        compiled = torch.compile(model, backend="tahf4", options={**GRAPH, "keep": ["."]}, fullgraph=True)
        assert relative(compiled(**inputs), model(**inputs)) < 1e-5


class Attributes(nn.Module):
    """Blocks that are attributes, not members of a container."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(64, 64)
        self.early, self.middle, self.late = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.middle(self.early(self.entry(x))))


@pytest.mark.parametrize(("least", "wanted"), [(2, 6), (3, 0)])
def test_blocks_of_fewer_linears_than_asked_for_are_none(least, wanted):
    captured = tahf4.capture(Stack().eval(), (torch.randn(4, 64),))
    given = {"classify.min_linears": least, "classify.min_linears_alone": 4, **GRAPH}
    plan = tahf4.lower(captured, options=given).plan
    assert sum(d.decision == "hif4" for d in plan) == wanted



def test_blocks_need_no_container():
    plan, _ = compiled_plan(Attributes().eval(), {"x": torch.randn(4, 64)})
    assert kept(plan) == {"entry"}


class Parallel(nn.Module):
    """Embedders of one class side by side, before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(Block() for _ in range(2))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedders[0](x) + self.embedders[1](x)
        for block in self.blocks:
            x = block(x)
        return x


def test_embedders_side_by_side_are_no_repeated_blocks():
    plan, _ = compiled_plan(Parallel().eval(), {"x": torch.randn(4, 64)})
    assert quantized(plan) == {f"blocks.{i}.{leaf}" for i in range(2) for leaf in ("up", "down")}


def test_embedders_side_by_side_that_were_packed_without_a_graph_are_named():
    model = Parallel().eval().requires_grad_(False)
    tahf4.quantize_(model)
    with torch.no_grad():
        plan = tahf4.lower(tahf4.capture(model, (torch.randn(4, 64),)), options={"inductor": False}).plan
    beyond = {d.module.split(".")[0] for d in plan if "outside of the repeated blocks" in d.reason}
    assert beyond == {"embedders"} and all(d.decision == "hif4" for d in plan)


def test_a_block_compiled_alone_is_all_body(plans):
    model, inputs = wan()
    with torch.no_grad():
        model.compile_repeated_blocks(backend="tahf4", options=GRAPH, fullgraph=True)
        model(**inputs)
    (plan,) = plans
    assert len(quantized(plan)) == len(plan) == 10


class Holder(nn.Module):
    """A block of a linear and of parts of one class, which hold nearly all of its weights."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.attn, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.mlp, self.other = Block(64, 256), Block(64, 256)
        if listed:
            del self.mlp, self.other
            self.experts = nn.ModuleList(Block(64, 256) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        one, two = self.experts if hasattr(self, "experts") else (self.mlp, self.other)
        return self.norm(one(x) + two(x))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_block_that_holds_repetition_is_all_body_where_its_model_calls_it(listed, wrapped, plans, caplog):
    model, options = Stack(2).eval().requires_grad_(False), GRAPH
    model.blocks = nn.ModuleList(Holder(listed) for _ in range(2)).requires_grad_(False)
    if wrapped:
        model.blocks = nn.ModuleList(torch.compile(block, backend="tahf4", options=options) for block in model.blocks)
    else:
        for block in model.blocks:
            block.compile(backend="tahf4", options=options)
    model(torch.randn(4, 64))
    (plan,) = plans
    assert {d["reason"] for d in plan} == {"in a repeated block of Stack"} and len(quantized(plan)) == len(plan) == 5
    assert not said(caplog, "passes.classify")


@pytest.mark.parametrize("single", [False, True])
def test_what_a_model_calls_outside_of_its_blocks_is_its_boundary(single, plans, caplog):
    model = Stack(2)
    model.last = Holder(False)
    if single:  # of its class in a container, with most weights: a block if all is compiled, but it may be a model
        model = nn.Sequential(nn.Linear(64, 64), model.last)
    model.eval().requires_grad_(False)
    part = model[1] if single else model.last
    part.compile(backend="tahf4", options=GRAPH)
    model(torch.randn(4, 64))
    (plan,) = plans
    assert len(kept(plan)) == (1 if single else 5) and len(plan) == 5
    assert len(warned(caplog)) == single, "it may be a block of a larger model"


class Alike(nn.Module):
    """Embedders of one class, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


class Normed(Stack):
    """A model with embedders, and with a part without linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = Alike(), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(self.embed(x)))


def test_the_children_of_a_model_that_are_compiled_one_by_one_have_the_plan_of_the_whole(caplog):
    model, x = Normed().eval().requires_grad_(False), torch.randn(4, 64)
    want = expected(model, block_linears(model))(x)
    regions = compile_regions(model, backend="tahf4", options=GRAPH)
    for _ in range(2):
        assert relative(regions(x), want) < 1e-5
    assert not warned(caplog)


class Pair(nn.Module):
    """Two networks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(Stack() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.nets[0](x) + self.nets[1](x)


def test_a_network_that_a_larger_one_calls_keeps_its_boundary(plans):
    model = Pair().eval().requires_grad_(False)
    for net in model.nets:
        net.compile(backend="tahf4", options=GRAPH)
    model(torch.randn(4, 64))
    assert all(kept(plan) == {"first", "last"} for plan in plans)


def test_what_stands_in_blocks_or_around_them_is_no_boundary():
    model, found = Stack(), []
    model.last = Stack()
    parts = (model.first, model.blocks[0], model.blocks[0].up, model.last)
    for part in parts:
        part.register_forward_pre_hook(lambda module, _: found.append(is_boundary(module)))
    model(torch.randn(4, 64))
    assert found == [True, False, False, False]
    assert not any(map(is_boundary, parts)), "no model runs"


class Residual(Holder):
    """An embedder, a graph break, and what adds to its input as a block does."""

    def __init__(self) -> None:
        super().__init__(False)
        self.embed = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        torch._dynamo.graph_break()
        x = x + self.attn(x)
        return x + self.mlp(x) + self.other(x)


def test_a_piece_of_a_module_is_no_block_because_it_adds_to_its_input(plans):
    model = Residual().eval().requires_grad_(False)
    torch.compile(model, backend="tahf4", options=GRAPH)(torch.randn(4, 64))
    assert kept([d for plan in plans for d in plan]) == {"attn", "embed"}


class Embed(nn.Module):
    """A boundary module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(nn.functional.silu(self.one(x)))


class Broken(Stack):
    """A graph break inside the loop over blocks: Dynamo compiles what the loop calls, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embed()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x


class BrokenOnce(Broken):
    """A graph break between the embedder and the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embed(x))
        torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x)
        torch._dynamo.graph_break()
        return self.last(x)


@pytest.mark.parametrize("build", [Broken, BrokenOnce])
def test_graph_breaks_do_not_move_the_boundary(build, plans):
    models, x = [build().eval() for _ in range(2)], torch.randn(4, 64)
    chosen = {f"blocks.{i}.{leaf}" for i in range(3) for leaf in ("up", "down")} - {"blocks.0.up"}
    options = {**GRAPH, "keep": ["blocks.0.up"]}
    with torch.no_grad():
        for model in models:
            want = expected(model, chosen)(x)
            model.compile(backend="tahf4", options=options)
            assert relative(model(x), want) < 1e-5
    together = [d for plan in plans for d in plan]
    assert {"embed.one", "embed.two", "blocks.0.up"} <= kept(together)
    assert quantized(together) <= chosen


WAYS = {
    "forward": lambda block, x: block.forward(x),
    "parts": lambda block, x: x + block.down(nn.functional.gelu(block.up(block.norm(x)))),
    "weights": lambda block, x: x + nn.functional.linear(
        nn.functional.gelu(nn.functional.linear(block.norm(x), block.up.weight, block.up.bias)),
        block.down.weight,
        block.down.bias,
    ),
}  # fmt: skip


class Reached(Stack):
    """Blocks that the forward reaches without calling them, in one of two containers."""

    def __init__(self, way: str, named: bool = False) -> None:
        super().__init__(dim=64)
        self.way = way
        self.first, self.last = nn.Linear(64, 1024), nn.Linear(1024, 64)  # of most weights
        if named:
            self.blocks = nn.ModuleDict({f"block_{i}": block for i, block in enumerate(self.blocks)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.first(x))
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            x = WAYS[self.way](block, x) if self.way else block(x)
        return x


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("way", ["", *WAYS])
def test_linears_belong_to_the_blocks_that_hold_their_weights_however_the_forward_reaches_them(way, named):
    model = Reached(way, named).eval()
    wanted = {path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.startswith("blocks.")}
    plan, _ = compiled_plan(model, {"x": torch.randn(4, 64)})
    assert quantized(plan) == wanted
    assert {d["reason"] for d in plan if d["module"] == "first"} == {"boundary: outside the repeated blocks"}
    lowered = tahf4.lower(tahf4.capture(model, (torch.randn(4, 64),)))
    assert {d.module for d in lowered.plan if d.decision == "hif4"} == wanted
    assert {d.module for d in tahf4.plan_modules(model) if d.decision == "hif4"} == wanted


@pytest.mark.parametrize("first", [False, True])
def test_a_block_with_a_second_name_is_a_block(first):
    model = Stack().eval()
    if first:
        blocks = model.blocks
        del model.blocks
        model.another, model.blocks = blocks[0], blocks
    else:
        model.another = model.blocks[0]
    plan, _ = compiled_plan(model, {"x": torch.randn(4, 64)})
    assert len(quantized(plan)) == sum(d.decision == "hif4" for d in tahf4.plan_modules(model)) == 6


class Cut(Stack):
    """Graph breaks inside of its two blocks: one piece holds the end of one and the begin of the next."""

    def __init__(self) -> None:
        super().__init__(depth=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.blocks
        h = nn.functional.gelu(a.up(self.first(x)))
        torch._dynamo.graph_break()
        h = nn.functional.gelu(b.up(x + a.down(h)))
        torch._dynamo.graph_break()
        return self.last(x + b.down(h))


def test_a_piece_with_one_linear_of_each_block_is_judged_by_the_model(plans):
    model = Cut().eval()
    with torch.no_grad():
        torch.compile(model, backend="tahf4", options=GRAPH)(torch.randn(4, 64))
    found = {d["module"] for plan in plans for d in plan if d["decision"] == "hif4"}
    assert found == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}


def test_blocks_that_the_tree_has_and_the_graph_does_not_are_said(caplog):
    model = Parallel().eval()
    model.blocks = nn.ModuleList()
    model.last = nn.Linear(64, 1024)

    def side_by_side(x):
        return model.last(model.embedders[0](x) + model.embedders[1](x))

    model.forward = side_by_side
    with torch.no_grad():
        torch.compile(model, backend="tahf4", options=GRAPH)(torch.randn(4, 64))
    assert "none of 5 linears runs in 4 bits (embedders.0.down: boundary" in caplog.text


class Listed(nn.Module):
    """Blocks in a plain list, which no tree of modules shows, alone or beside others."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.listed = [Block().requires_grad_(False) for _ in range(2)]
        self.blocks = nn.ModuleList(Block() for _ in range(2 * beside))

    def forward(self, x):
        x = self.first(x)
        for block in (*self.listed, *self.blocks):
            x = block(x)
        return self.last(x)


class Around(nn.Module):
    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(64, 64), Listed(beside)

    def forward(self, x):
        return self.inner(self.first(x))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("cls", [Listed, Around])
def test_blocks_in_a_plain_list_are_blocks_of_a_compiled_model(cls, beside, plans):
    model, x = cls(beside).eval().requires_grad_(False), torch.randn(4, 64)
    torch.compile(model, backend="tahf4", options=GRAPH, fullgraph=True)(x)
    (plan,) = plans
    found = {entry["module"]: entry["decision"] for entry in plan}
    assert {path for path, decision in found.items() if decision == "high_precision"} == {
        path for path in found if path.endswith(("first", "last"))
    }
    assert sum(decision == "hif4" for decision in found.values()) == (8 if beside else 4)
