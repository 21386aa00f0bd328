"""Patterns: found in the graph's own operators, replaced with their module paths, never across a write."""

from __future__ import annotations

import pytest
import torch
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.graph.nodes import module_classes

gelu = nn.functional.gelu
EXAMPLE = (torch.empty(4, 128),)


def test_a_replacement_keeps_module_paths_and_function():
    model, x = Stack().eval(), torch.randn(4, 64)
    captured = tahf4.capture(model, (x,))

    class Slow(tahf4.Pass):
        """Write GELU out."""

        after, before = ("plan",), ("quantize",)

        def __call__(self, graph_module, context):
            count = tahf4.replace_pattern(
                graph_module, lambda a: gelu(a), lambda a: a * (torch.erf(a * 0.5**0.5) + 1) * 0.5, EXAMPLE, context
            )
            new = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.erf.default)
            assert [next(reversed(module_classes(node))) for node in new] == [f"blocks.{i}" for i in range(3)]
            return tahf4.PassResult(graph_module, count > 0)

    options = {"passes": [Slow()], "verify": True}
    (record,) = [r for r in tahf4.lower(captured, options=options).history if r.name == "slow"]
    assert record.matches == 3
    assert record.error < 1e-6


def test_conditions_and_constants():
    graph_module = tahf4.capture(Stack().eval(), (torch.randn(4, 64),)).graph_module
    assert len(tahf4.find_pattern(graph_module, lambda a: gelu(a), EXAMPLE)) == 3
    (one,) = tahf4.find_pattern(graph_module, lambda a: gelu(a), EXAMPLE, where=lambda m: "2" in m.nodes[0].name)
    assert one.outputs == one.nodes and one.inputs[0].target is torch.ops.aten.linear.default
    assert tahf4.find_pattern(graph_module, lambda a: torch.relu(a), EXAMPLE) == []
    with pytest.raises(tahf4.PassError, match="does not use its arguments"):
        tahf4.find_pattern(graph_module, lambda a, b: gelu(a), (*EXAMPLE, *EXAMPLE))
    with pytest.raises(tahf4.PassError, match="cannot be traced"):
        tahf4.find_pattern(graph_module, lambda a: a.missing(), EXAMPLE)


def test_a_write_inside_a_match_is_no_match():
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 2
            x.add_(1)
            return gelu(y)

    def pattern(a):
        return gelu(a * 2)

    traced = torch.fx.experimental.proxy_tensor.make_fx(Writes())(torch.randn(4, 64))
    assert tahf4.find_pattern(traced, pattern, EXAMPLE) == []


class Chunked(nn.Module):
    """Half of a chunk is not read; the cast asserts what it reads."""

    def forward(self, x):
        half, _ = x.chunk(2, -1)
        torch.relu(x)
        return gelu(half).to(torch.float64) + 1.0


def replaced(model, pattern, replacement, x, **options):
    """Replace between plan and quantize; return the record of the pass and the lowered model."""

    class Replace(tahf4.Pass):
        """Replace a pattern."""

        after, before = ("plan",), ("quantize",)

        def __call__(self, graph_module, context):
            found = tahf4.find_pattern(graph_module, pattern, (x,))
            count = tahf4.replace_pattern(graph_module, pattern, replacement, (x,), context)
            assert len(found) == count
            return tahf4.PassResult(graph_module, count > 0)

    options = {"passes": [Replace()], "verify": True, **options}
    lowered = tahf4.lower(tahf4.capture(model.eval(), (x,)), options=options)
    return next(r for r in lowered.history if r.name == "replace"), lowered


def test_what_nobody_reads_is_no_part_of_a_pattern_and_no_reader():
    def pattern(a):
        half, rest = a.chunk(2, -1)
        torch.sigmoid(rest)
        return gelu(half).to(torch.float64)

    def replacement(a):
        half, _ = a.chunk(2, -1)
        return gelu(half.to(torch.float64)) * 2

    x = torch.randn(4, 64)
    record, lowered = replaced(Chunked(), pattern, replacement, x)
    assert record.matches == 1
    want = gelu(x[:, :32].double()) * 2 + 1
    assert torch.allclose(lowered(x), want, atol=1e-6)

    class Both(Chunked):
        """The other half is read."""

        def forward(self, x):
            half, rest = x.chunk(2, -1)
            return gelu(half).to(torch.float64) + rest

    assert replaced(Both(), pattern, replacement, x)[0].matches == 0


@pytest.mark.parametrize("constant", [2.5, 3, True])
def test_a_number_as_a_tensor_in_a_replacement_is_made_in_the_graph(constant):
    x = torch.randn(4, 64)

    class Gelu(nn.Module):
        def forward(self, x):
            return gelu(x) + 1

    _, lowered = replaced(Gelu(), lambda a: gelu(a), lambda a: gelu(a) * torch.tensor(constant), x)
    assert torch.allclose(lowered(x), gelu(x) * constant + 1)
    assert not lowered.graph_module.graph.find_nodes(op="get_attr")


class Products(nn.Module):
    def forward(self, x):
        return x.sin() * x.cos() + (x * 2) * (x * 3.5)


def test_one_example_may_stand_for_several_arguments():
    x = torch.randn(4, 64)
    graph_module = tahf4.capture(Products(), (x,)).graph_module
    names = [[n.target.__name__ for n in m.inputs] for m in _pairs(graph_module, x)]
    assert ["sin.default", "cos.default"] in names
    assert len(names) == 2
    count = tahf4.replace_pattern(graph_module, lambda a, b: a.sin() * b, lambda a, b: a.cos() * b, (x, x))
    assert count == 1
    assert torch.allclose(graph_module(x)[0], x.cos() ** 2 + x * x * 7, atol=1e-6)


def _pairs(graph_module, x):
    return tahf4.find_pattern(
        graph_module, lambda a, b: a * b, (x, x), where=lambda m: all(isinstance(n, torch.fx.Node) for n in m.inputs)
    )


def test_a_number_is_no_example_but_part_of_a_pattern():
    x = torch.randn(4, 64)
    graph_module = tahf4.capture(Products(), (x,)).graph_module
    with pytest.raises(tahf4.PassError, match=r"example of argument 1 .* is 2.0 \(float\).*any_constants=True"):
        tahf4.find_pattern(graph_module, lambda a, s: a * s, (x, 2.0))
    assert len(tahf4.find_pattern(graph_module, lambda a: a * 3.5, (x,))) == 1
    assert len(tahf4.find_pattern(graph_module, lambda a: a * 3.5, (x,), any_constants=True)) >= 2


def test_several_results_of_one_operator_are_a_pattern():
    class Largest(nn.Module):
        def forward(self, x):
            return x.max(-1)

    x = torch.randn(4, 64)
    graph_module = tahf4.capture(Largest(), (x,)).graph_module
    assert len(tahf4.find_pattern(graph_module, lambda a: a.max(-1), (x,))) == 1


TABLE = torch.ones(64)


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (lambda a: gelu(a), lambda a: gelu(a) * torch.tensor([1.0] * 64), r"holds a tensor of shape \(64,\).*aten.mul"),
        (lambda a: gelu(a) * torch.tensor(2.0), lambda a: a * 2, "holds a tensor of its own.*write the number itself"),
        (lambda a: gelu(a) * TABLE, lambda a: a * 2, "the pattern .* reads a tensor that is none of its arguments"),
        (lambda a: gelu(a), lambda a: gelu(a) * TABLE, "the replacement .* reads a tensor that is none of its"),
        (lambda a: gelu(a).mul_(2), lambda a: a * 2, "writes to memory .aten.mul_.Tensor., and nothing matches across"),
        (lambda a: a, lambda a: gelu(a), "returns an argument as it is"),
        (lambda a: gelu(a), lambda a: (gelu(a), a), "returns 1 tensors and its replacement returns 2"),
        (lambda a: gelu(a), lambda a: a.missing(), "the replacement '<lambda>' cannot be traced"),
        (lambda a: {"x": gelu(a)}, lambda a: a * 2, "the pattern .* returns 'dict'; return a tensor or a tuple"),
        (lambda a: gelu(a), lambda a: {"x": a * 2}, "the replacement .* returns 'dict'; return a tensor or a tuple"),
        (lambda a: (gelu(a), 3), lambda a: (a * 2, 3), "returns 'int' among its results; return a tensor or a tuple"),
        (lambda a: (), lambda a: a * 2, "the pattern .* returns nothing"),
        (lambda a: None, lambda a: a * 2, "the pattern .* returns 'NoneType'"),
    ],
)
def test_what_cannot_be_matched_or_put_in_is_refused_in_our_words(pattern, replacement, message):
    with pytest.raises(tahf4.PassError, match=message) as caught:
        replaced(Stack(), pattern, replacement, torch.randn(4, 64))
    # No node of the pattern is taken for one of the graph.
    assert "at node" not in str(caught.value)
    assert "AssertionError" not in str(caught.value)


LINEAR = (torch.empty(4, 64), torch.empty(128, 64), torch.empty(128))
linear = nn.functional.linear


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (linear, lambda a, w, b: torch.relu(linear(a, w, b))),
        (linear, lambda a, w, b: torch.relu(a @ w.t() + b)),
        (
            lambda a, w, b: gelu(linear(a, w, b)),
            lambda a, w, b: gelu(linear(a, w, b), approximate="tanh"),
        ),
    ],
)
def test_a_replaced_linear_keeps_its_decision_and_counts_once(pattern, replacement):
    class Replace(tahf4.Pass):
        """Replace a pattern that holds a linear."""

        after, before = ("plan",), ("quantize",)

        def __call__(self, graph_module, context):
            count = tahf4.replace_pattern(graph_module, pattern, replacement, LINEAR, context)
            return tahf4.PassResult(graph_module, count > 0)

    lowered = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)), options={"passes": [Replace()]})
    flops = {s.stage: sum(n.flops for n in s.nodes) for s in lowered.snapshots}
    assert set(flops.values()) == {2 * 4 * (2 * 64 * 64 + 6 * 64 * 128)}
    written_out = any(n.target == "aten.matmul" for n in lowered.snapshots[-1].nodes)
    assert {d.module: d.decision == "hif4" for d in lowered.plan} == {
        d.module: "blocks" in d.module and not written_out for d in lowered.plan
    }
    after = next(s for s in lowered.snapshots if s.stage == "replace")
    products = [n for n in after.nodes if n.linears]
    assert [n.linears[0] for n in products] == [d.module for d in lowered.plan]
    assert all(n.flops and n.module == n.linears[0] for n in products if pattern is not linear)
