"""A model's plan is the same whether a graph or its tree of modules is looked at."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import plans as dumped_plans
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Block, Stack, flux, pixart, sd3, wan
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tahf4_compiler.passes import DEFAULT
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.model.reasons import Cause

PLANNING = DEFAULT[:3]


class Embedder(nn.Module):
    """Two linears that stand beside others of their kind: no block."""

    def __init__(self, k: int, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(k, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.second(nn.functional.silu(self.first(x)))


class Wide(nn.Module):
    """A block of four linears."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, hidden) for _ in range(3))
        self.out = nn.Linear(hidden, dim)

    def forward(self, x):
        return x + self.out(self.q(x) * torch.sigmoid(self.k(x)) + self.v(x))


class Conditioned(nn.Module):
    """A block that declares first what reads its condition."""

    def __init__(self, dim: int = 64, hidden: int = 128, k: int = 96) -> None:
        super().__init__()
        self.condition, self.up, self.down = nn.Linear(k, 3 * dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x, c):
        shift, scale, gate = self.condition(c).chunk(3, -1)
        return x + gate * self.down(nn.functional.silu(self.up(x * scale + shift)))


class Network(nn.Module):
    """Embedders side by side, then one or two kinds of blocks in containers or as attributes, then a linear."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        embedders: int,
        depths: tuple[int, ...],
        attributes: bool,
        parallel: bool,
        k: int,
        kinds: str,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.embedders = nn.ModuleList(Embedder(k, dim) for _ in range(embedders))
        self.stages = []
        for i, depth in enumerate(depths):
            make = {"block": Block, "wide": Wide, "conditioned": lambda d, h: Conditioned(d, h, k)}[kinds.split()[i]]
            members = [make(dim, hidden) for _ in range(depth)]
            if attributes:
                names = [f"stage{i}{letter}" for letter in "abcdef"[:depth]]
                for name, member in zip(names, members, strict=True):
                    setattr(self, name, member)
                self.stages.append(names)
            else:
                setattr(self, f"blocks{i}", nn.ModuleList(members))
                self.stages.append([f"blocks{i}.{j}" for j in range(depth)])
        self.last = nn.Linear(dim, 16)

    def forward(self, x, c):
        def call(name, x):
            module = self.get_submodule(name)
            return module(x, c) if isinstance(module, Conditioned) else module(x)

        for embedder in self.embedders:
            x = x + embedder(c)
        for names in self.stages:
            if self.parallel:
                x = sum(call(name, x) for name in names)
                continue
            for name in names:
                x = call(name, x)
        return self.last(x)


def plans(model: nn.Module, args=(), kwargs=None, **options):
    """Return both plans as ``path -> (decision, cause)``."""
    modules = tahf4.plan_modules(model, keep=options.get("keep", ()), min_features=options.get("plan.min_features", 64))
    with torch.no_grad():
        captured = tahf4.capture(model, args, kwargs)
        graph = tahf4.lower(captured, passes=[p() for p in PLANNING], options=options).plan
    found = [{d.module: (d.decision, d.cause) for d in plan} for plan in (graph, modules)]
    # No pass of the rewrite runs: what was planned for 4 bits is said not to be rewritten.
    found[0] = {
        path: ("hif4", Cause.BODY) if cause is Cause.NOT_REWRITTEN else (decision, cause)
        for path, (decision, cause) in found[0].items()
    }
    return found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    dim=st.sampled_from([32, 64, 128]),
    hidden=st.sampled_from([32, 64, 160]),
    embedders=st.integers(0, 3),
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    kinds=st.sampled_from(["block wide", "wide block", "conditioned block", "wide conditioned"]),
    attributes=st.booleans(),
    parallel=st.booleans(),
    wide=st.booleans(),
    least=st.sampled_from([32, 64]),
    kept=st.booleans(),
)
def test_random_networks(dim, hidden, embedders, depths, kinds, attributes, parallel, wide, least, kept):
    k = dim if wide else 48
    model = Network(dim, hidden, embedders, depths, attributes, parallel, k, kinds)
    options = {"plan.min_features": least, "keep": ["last"] if kept else []}
    graph, modules = plans(model, (torch.randn(2, dim), torch.randn(2, k)), **options)
    differ = {path for path in graph.keys() | modules.keys() if graph.get(path) != modules.get(path)}
    # Sizes do not tell modules of one width that stand side by side from those that follow each other.
    if not (wide and embedders > 1) and not (parallel and not attributes):
        assert not differ
    assert {graph[path] for path in differ} <= {("high_precision", Cause.BOUNDARY)}


@pytest.mark.parametrize("rank", [pytest.param(4, marks=pytest.mark.slow), 64])
def test_adapters_of_peft(rank):
    model, inputs = wan()
    before = plans(model, (), inputs)[1]
    targets = ["to_q", "to_v", "ffn.net.2", "proj_out", "linear_1", "time_proj"]
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=rank, target_modules=targets, init_lora_weights=False), name)
    graph, modules = plans(model, (), inputs)
    adapters = {path for path in modules if ".lora_" in path}
    assert graph.items() <= modules.items() and len(adapters) == 4 * (2 * 5 + 4)
    assert {modules[path] for path in adapters} == {("high_precision", Cause.ADAPTER)}
    rest = {path.removesuffix(".base_layer"): d for path, d in modules.items() if path not in adapters}
    assert rest == before, "an adapter changes nothing about the linears of the model"


def test_adapters_around_a_linear_that_stands_alone_in_a_container():
    """With two adapters there are five linears where one was, enough for a block."""
    model = Stack(2)
    model.last = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    config = LoraConfig(r=64, target_modules=["last.1", "up"], init_lora_weights=False)
    for name in ("first", "second"):
        inject_adapter_in_model(config, model, name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(["first", "second"])  # both run
    model.requires_grad_(False)
    graph, modules = plans(model, (torch.randn(4, 64),))
    assert graph.items() <= modules.items()
    assert {path for path, (decision, _) in modules.items() if decision == "hif4"} == {
        f"blocks.{i}.{leaf}" for i in range(2) for leaf in ("up.base_layer", "down")
    }


def test_adapters_of_models_that_a_function_calls(tmp_path):
    """No tree of modules is known there."""
    both = [Stack(2), Stack(2)]
    for model in both:
        model.last = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
        for name in ("first", "second"):
            inject_adapter_in_model(LoraConfig(r=64, target_modules=["last.1"], init_lora_weights=False), model, name)
        model.last[1].set_adapter(["first", "second"])
        model.requires_grad_(False)
    compiled = torch.compile(
        lambda x: both[0](x) + both[1](x), backend="tahf4", options={"inductor": False, "dump_dir": str(tmp_path)}
    )
    compiled(torch.randn(4, 64))
    (plan,) = dumped_plans(tmp_path)
    assert len(plan) > 12 and not any(".last." in d["module"] and d["decision"] == "hif4" for d in plan)


class Adapted(nn.Linear):
    """A linear that holds its adapter, as the older diffusers have it."""

    def __init__(self, k, n):
        super().__init__(k, n)
        self.lora_layer = nn.Sequential(nn.Linear(k, 64, bias=False), nn.Linear(64, n, bias=False))

    def forward(self, x):
        return super().forward(x) + self.lora_layer(x)


def test_adapters_inside_of_linears():
    model = Stack(2)
    for block in model.blocks:
        block.up = Adapted(64, 128)
    graph, modules = plans(model, (torch.randn(4, 64),))
    inside = {path for path in graph if "lora" in path}
    assert len(inside) == 4 and {graph[path] for path in inside} == {("high_precision", Cause.ADAPTER)}
    assert {p: d for p, d in graph.items() if not p.endswith("up")} == {
        p: d for p, d in modules.items() if not p.endswith("up")
    }


def dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=16,
    ).eval()  # fmt: skip
    labels = torch.tensor([3])
    return model, {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([10]), "class_labels": labels}


def test_a_linear_of_a_block_that_is_called_outside_of_it_too():
    model, inputs = dit()
    with torch.no_grad():
        plan = tahf4.lower(tahf4.capture(model, (), inputs), options={"inductor": False}).plan
    rows = {d.module: d for d in plan}
    assert len(rows) == len(plan), "one decision for each weight"
    shared = rows["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"]
    assert shared.decision == "hif4" and shared.flops == 2 * (2 * 1 * 256 * 128), "both calls"


class Reader(Block):
    """A block that reads a linear of others."""

    def __init__(self, shared):
        super().__init__(64, 128)
        self.shared = shared

    def forward(self, x):
        return super().forward(self.shared(x))


class Sharing(nn.Module):
    """Blocks that read one linear under a name of each, besides the one that the network has for it."""

    def __init__(self, tied):
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Reader(nn.Linear(64, 64) if tied else self.shared) for _ in range(3))
        for block in self.blocks:
            block.shared.weight = self.shared.weight

    def forward(self, x):
        x = self.shared(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_of_several_names(tied):
    model = Sharing(tied)
    graph, modules = plans(model, (torch.randn(4, 64),))
    assert graph.items() <= modules.items() and graph["shared"] == ("hif4", Cause.BODY)
    assert all(modules[path] == modules["shared"] for path in modules if path.endswith("shared"))


@pytest.mark.parametrize("name", ["shared", r"blocks\.1\.shared"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_of_several_names_is_kept_by_any(tied, name):
    model = Sharing(tied).requires_grad_(False)
    lowered = tahf4.lower(tahf4.capture(model, (torch.randn(4, 64),)), options={"keep": [f"^{name}$"]})
    for plan in (lowered.plan, tahf4.plan_modules(model, keep=[f"^{name}$"])):
        assert {d.cause for d in plan if d.module.endswith("shared")} == {Cause.KEPT}
        assert {d.decision for d in plan if not d.module.endswith("shared")} == {"hif4"}
    captured = tahf4.capture(model, (torch.randn(4, 64),))
    bits = tahf4.lower(captured, options={"activation_bits": {f"^{name}$": 8}}).plan
    assert {d.module: d.activation_bits for d in bits if d.activation_bits != 4} == {"shared": 8}


class Gated(Block):
    """A block whose last linear is a gate."""

    def __init__(self, out):
        super().__init__(64, 128)
        self.gate = nn.Linear(64, out)

    def forward(self, x):
        return super().forward(x) * self.gate(x).sigmoid().mean(-1, keepdim=True)


class Heads(Stack):
    """Blocks, and heads side by side that have as many linears or more."""

    def __init__(self, linears):
        super().__init__(6)
        self.heads = nn.ModuleList(Gated(64) for _ in range(2))
        for head in self.heads:
            head.gate = nn.Sequential(*[nn.Linear(64, 64) for _ in range(linears - 3)], nn.Linear(64, 80))

    def forward(self, x):
        x = super().forward(x)
        return x, *(head(x) for head in self.heads)


@pytest.mark.parametrize("out", [1, 8, 128])
def test_a_gate_is_declared_last(out):
    model = Stack(4)
    model.blocks = nn.ModuleList(Gated(out) for _ in range(4))
    graph, modules = plans(model, (torch.randn(4, 64),))
    assert graph == modules and modules["first"] == modules["last"] == ("high_precision", Cause.BOUNDARY)
    assert modules["blocks.3.down"] == ("hif4", Cause.BODY)


class Shared(nn.Module):
    """One block that is called several times."""

    def __init__(self, calls, last=64):
        super().__init__()
        self.calls, self.layers, self.last = calls, nn.ModuleList([Wide(64, 64)]), nn.Linear(64, last)

    def forward(self, x):
        for _ in range(self.calls):
            x = self.layers[0](x)
        return self.last(x)


@pytest.mark.parametrize(
    ("model", "last"),
    [
        (Shared(1), Cause.BOUNDARY),
        (Shared(3, last=400), Cause.BODY),  # its last linear holds more than the block, which is called more often
    ],
)
def test_weights_count_however_often_they_are_called(model, last):
    graph, modules = plans(model, (torch.randn(4, 64),))
    assert graph.items() <= modules.items() and graph["last"][1] is last


class Step(nn.Module):
    """A step with a network of one block."""

    def __init__(self):
        super().__init__()
        self.layers, self.first, self.last = nn.ModuleList([Wide(64, 64)]), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return x + 0.1 * self.last(self.layers[0](self.first(x)))


def test_a_network_of_one_block_that_adds_to_its_input_has_a_boundary():
    graph, modules = plans(Step(), (torch.randn(4, 64),))
    assert graph == modules and graph["first"] == graph["last"] == ("high_precision", Cause.BOUNDARY)


def test_an_embedder_and_a_head_of_one_class():
    model = nn.Sequential(Embedder(64, 64), Block(), Block(), Embedder(64, 64), nn.Linear(64, 600))
    graph, modules = plans(model, (torch.randn(4, 64),))
    assert graph == modules
    assert {path for path, (d, _) in graph.items() if d == "hif4"} == {"1.up", "1.down", "2.up", "2.down"}


class Conditional(nn.Module):
    """Blocks of less than half of the weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(128, 64), nn.Linear(64, 8000)
        self.blocks = nn.ModuleList(Conditioned() for _ in range(3))

    def forward(self, x, c):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, c)
        return self.last(x)


def test_a_condition_is_read_by_what_is_declared_first():
    graph, modules = plans(Conditional(), (torch.randn(4, 128), torch.randn(4, 96)))
    assert graph == modules and modules["first"] == modules["last"] == ("high_precision", Cause.BOUNDARY)


@pytest.mark.parametrize("linears", [3, 4])
def test_heads_side_by_side(linears):
    graph, modules = plans(Heads(linears), (torch.randn(4, 64),))
    assert graph == modules and modules["heads.0.up"] == ("high_precision", Cause.BOUNDARY)


@pytest.mark.parametrize(
    "network", [wan, flux, dit, *(pytest.param(it, marks=pytest.mark.slow) for it in (sd3, pixart))]
)
def test_transformers_of_diffusers(network):
    model, inputs = network()
    graph, modules = plans(model, (), inputs)
    assert {path: graph[path] for path in modules if path in graph} == {p: d for p, d in modules.items() if p in graph}
    assert sum(decision == "hif4" for decision, _ in modules.values()) > 10


class Raw(nn.Module):
    """A block that has the weights of its linears as parameters of its own."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(n, k) / 8) for n, k in ((128, 64), (64, 128)))

    def forward(self, x):
        return x + nn.functional.linear(nn.functional.linear(x, self.w1).relu(), self.w2)


def raw():
    model = Stack(2).eval()
    model.blocks = nn.ModuleList(Raw() for _ in range(2))
    return model.requires_grad_(False)


def test_weights_that_blocks_hold_themselves():
    model = raw()
    graph, modules = plans(model, (torch.randn(4, 64),))
    assert graph["blocks.1.w2"] == ("hif4", Cause.BODY)
    assert modules == dict.fromkeys(("first", "last"), ("high_precision", Cause.BOUNDARY))
    assert modules.items() <= graph.items()


class Half(nn.Module):
    """A block of a linear and of a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.matrix = nn.Linear(64, 128), nn.Parameter(torch.randn(64, 128) / 8)

    def forward(self, x):
        return x + nn.functional.linear(self.up(x).relu(), self.matrix)


def test_weights_that_blocks_hold_beside_a_linear():
    model = Stack(2).eval()
    model.blocks = nn.ModuleList(Half() for _ in range(3))
    graph, modules = plans(model, (torch.randn(4, 64),))
    assert modules["first"] == graph["first"] == ("high_precision", Cause.BOUNDARY)
    assert modules["blocks.1.up"] == graph["blocks.1.up"] == ("hif4", Cause.BODY)
    assert modules.items() <= graph.items()


@pytest.mark.parametrize("how", ["option", "call"])
def test_weights_that_blocks_hold_themselves_are_kept_by_name(how):
    model, pattern = raw(), r"blocks\.0\.w1"
    if how == "call":
        assert tahf4.keep(model, [pattern]) == ["blocks.0.w1"]
    options = {"keep": [pattern]} if how == "option" else {}
    with torch.no_grad():
        plan = tahf4.lower(tahf4.capture(model, (torch.randn(4, 64),)), options={"inductor": False, **options}).plan
    assert {d.module for d in plan if d.decision == "hif4"} == {"blocks.0.w2", "blocks.1.w1", "blocks.1.w2"}


def test_a_linear_without_its_weight_yet_is_none():
    model = Stack(2).requires_grad_(False)
    model.extra = nn.LazyLinear(64)
    x = torch.randn(4, 64)
    compiled = torch.compile(model, backend="tahf4", options={"inductor": False})
    with torch.no_grad():
        want = compiled(x)
        plan = tahf4.quantize_(model)
        torch.testing.assert_close(model(x), want)
    assert "extra" not in {d.module for d in plan} and sum(d.decision == "hif4" for d in plan) == 4


@pytest.mark.parametrize("shape", [(1, 128), (1,), ()])
def test_a_bias_that_is_spread_over_the_product(shape):
    model, x = Stack(2).eval().requires_grad_(False), torch.randn(4, 64)
    model.blocks[0].up.bias = nn.Parameter(torch.randn(shape), requires_grad=False)
    graph, modules = plans(model, (x,))
    assert graph == modules and modules["blocks.0.up"] == ("high_precision", Cause.SHAPE)
    tahf4.quantize_(model)
    assert type(model.blocks[0].up) is nn.Linear and model(x).isfinite().all()
