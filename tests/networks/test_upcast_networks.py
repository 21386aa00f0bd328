"""A 16-bit model that is computed in float32, between inputs, weights and outputs as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import GRAPH, relative
from models import Stack, output, wan
from tahf4_compiler.backends import cpu
from tahf4_compiler.passes import upcast
from torch import nn

import tahf4_compiler as tahf4

ON = {**GRAPH, "upcast.dtype": "float32"}
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def stack(dtype):
    torch.manual_seed(0)
    return Stack().to(dtype).eval(), torch.randn(2, 16, 64).to(dtype)


def graph_of(model, *args, **options):
    return tahf4.lower(tahf4.capture(model, args), options={**ON, **options}).graph_module.graph


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [
        *((torch.bfloat16, True), (torch.float16, False)),
        *(pytest.param(*it, marks=pytest.mark.slow) for it in ((torch.bfloat16, False), (torch.float16, True))),
    ],
)
def test_it_is_the_float32_model_with_the_same_weights(dtype, fused):
    model, x = stack(dtype)
    options = {} if fused else {"disable_passes": ["fuse"]}
    wide = torch.compile(copy.deepcopy(model).float(), backend="tahf4", options={**GRAPH, **options})(x.float())
    found = torch.compile(model, backend="tahf4", options={**ON, **options})(x)
    plain = torch.compile(model, backend="tahf4", options={**GRAPH, **options})(x)
    assert found.dtype == plain.dtype == dtype
    assert torch.equal(found, wide.to(dtype))
    assert not torch.equal(plain, found)  # the 16-bit graph rounds on the way


def test_only_inputs_weights_and_outputs_stay_narrow():
    model, x = stack(torch.bfloat16)
    graph = graph_of(model, x, disable_passes=["fuse"])
    narrow = [n for n in graph.nodes if getattr(n.meta.get("val"), "dtype", None) is torch.bfloat16]
    result = next(iter(graph.find_nodes(op="output"))).all_input_nodes
    assert {n.op for n in narrow if n not in result} == {"placeholder"}
    assert [n.target for n in result] == [aten.to.dtype]
    # The weights of linears that stay in high precision are stored as they were.
    kept = [n for n in graph.nodes if n.target is aten.linear.default]
    assert kept and all(n.args[1].args[0] in narrow for n in kept)


@pytest.mark.slow
def test_wan_in_bfloat16():
    model, inputs = wan()
    model = model.to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    wide = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    wanted = output(torch.compile(copy.deepcopy(model).float(), backend="tahf4", options=GRAPH)(**wide))
    found = output(torch.compile(model, backend="tahf4", options=ON)(**inputs))
    plain = output(torch.compile(model, backend="tahf4", options=GRAPH)(**inputs))
    assert found.dtype == torch.bfloat16
    assert relative(found, wanted) < relative(plain, wanted)
    assert relative(found, wanted) < 0.01


@pytest.mark.slow
def test_through_inductor():
    model, x = stack(torch.bfloat16)
    options = {name: value for name, value in ON.items() if name != "inductor"}
    found = torch.compile(model, backend="tahf4", options=options)(x)
    assert relative(found, torch.compile(model, backend="tahf4", options=ON)(x)) < 0.01


class Returns(nn.Module):
    """Gives back its input, a part of it, and two results of other dtypes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))

    def forward(self, x):
        y = x
        for block in self.blocks:
            y = block(y)
        return x, y, y.float(), y.argmax(-1), y.to(torch.float16)


def test_outputs_keep_dtypes_and_an_input_comes_back_itself():
    model, x = Returns().bfloat16().eval(), torch.randn(3, 64).bfloat16()
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.int64, torch.float16]
    found = torch.compile(model, backend="tahf4", options={**ON, "verify": True})(x)
    assert [t.dtype for t in found] == dtypes
    assert torch.equal(found[0], x)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=ON)
    result = next(iter(lowered.graph_module.graph.find_nodes(op="output"))).args[0]
    assert result[0].op == "placeholder" and result[1].target is aten.to.dtype


class Bits(Returns):
    """Reads the bits of its result."""

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x)).view(torch.int16)


class Writes(Returns):
    """Counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(64))

    def forward(self, x):
        y = self.blocks[1](self.blocks[0](x))
        self.seen.add_(y.sum(0))
        return y


class Inside(Returns):
    """Writes to a tensor of its own, as Wan's rotary embedding does."""

    def forward(self, x):
        y = self.blocks[0](x)
        z = torch.empty_like(y)
        z[..., ::2], z[..., 1::2] = y[..., 1::2], -y[..., ::2]
        return self.blocks[1](z)


def test_a_tensor_of_the_graphs_own_may_be_written_to():
    torch.manual_seed(1)
    model, x = Inside().bfloat16().eval(), torch.randn(3, 64).bfloat16()
    wanted = torch.compile(copy.deepcopy(model).float(), backend="tahf4", options=GRAPH)(x.float())
    assert torch.equal(torch.compile(model, backend="tahf4", options=ON)(x), wanted.bfloat16())


class Copies(Returns):
    """Reads a copy in float32 after it wrote to the original, or the other way round."""

    def forward(self, x):
        y = self.blocks[1](self.blocks[0](x))
        z = y + 0
        copy = z.float()
        z.add_(1)
        return copy, z


@pytest.mark.parametrize(
    ("model", "why"), [(Bits, "reads the bits"), (Writes, "writes to a tensor"), (Copies, "copies a tensor")]
)
def test_what_cannot_be_computed_otherwise_is_left_and_said(model, why, caplog):
    torch.manual_seed(1)
    model, x = model().bfloat16().eval(), torch.randn(3, 64).bfloat16()
    other = copy.deepcopy(model)
    found = torch.compile(model, backend="tahf4", options=ON)(x)
    assert why in caplog.text
    wanted = torch.compile(other, backend="tahf4", options=GRAPH)(x)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    assert all(torch.equal(a, b) for a, b in pairs)
    if isinstance(model, Writes):
        assert torch.equal(model.seen, other.seen) and model.seen.abs().sum() > 0


def test_a_float32_graph_is_not_touched():
    model, x = stack(torch.float32)
    with_it, without = (graph_of(model, x, **{"upcast.dtype": dtype}) for dtype in ("float32", ""))
    assert [n.name for n in with_it.nodes] == [n.name for n in without.nodes]


@pytest.mark.parametrize("value", ["bfloat16", "float64", torch.float32, True])
def test_an_unknown_dtype_is_refused(value):
    model, x = stack(torch.bfloat16)
    with pytest.raises(tahf4.OptionError, match=r"upcast\.dtype"):
        graph_of(model, x, **{"upcast.dtype": value})


@pytest.mark.parametrize(("slow", "times"), [(True, 1), (False, 0)])
def test_it_is_offered_once_where_16_bits_are_slow(slow, times, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "slow_dtype", lambda dtype: slow)
    monkeypatch.setattr(upcast, "_told", set())
    model, x = stack(torch.bfloat16)
    for _ in range(2):
        lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    assert caplog.text.count("options={'upcast.dtype': 'float32'}") == times
    assert ("upcast: this processor has no arithmetic" in lowered.report()) == slow


def test_which_processors_are_slow(monkeypatch):
    from tahf4_compiler.backends.cpu import build

    for flags, slow in (
        ("x86_64 sse2 avx2 fma", True), ("x86_64 sse2 avx512f", True), ("x86_64 sse2 avx512_bf16", False),
        ("x86_64 sse2 amx_bf16", False), ("aarch64 asimd bf16", False), ("", False),
    ):
        monkeypatch.setattr(build, "processor", lambda flags=flags: flags)
        cpu.slow_dtype.cache_clear()
        assert cpu.slow_dtype(torch.bfloat16) == slow
    cpu.slow_dtype.cache_clear()
    assert not cpu.slow_dtype(torch.float32)
