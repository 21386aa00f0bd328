"""Shapes of new nodes: asked once for equal calls, and again for every other one."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import tahf4_compiler as tahf4

asked: list[tuple[int, ...]] = []


@torch.library.custom_op("test_propagation::double", mutates_args=())
def double(x: torch.Tensor, count: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x * count, x.to(torch.float64)


@double.register_fake
def _(x, count):
    asked.append((*x.shape, count))
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.float64)


class Doubled(tahf4.Pass):
    """Put another operator in the place of each cosine."""

    after, before = ("plan",), ("quantize",)

    def __call__(self, graph_module, context):
        for i, node in enumerate(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)):
            with graph_module.graph.inserting_before(node):
                args = (node.args[0], 3.0 if i == 3 else 2.0)
                both = graph_module.graph.call_function(torch.ops.test_propagation.double.default, args)
                new = graph_module.graph.call_function(operator.getitem, (both, 0))
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
        return tahf4.PassResult(graph_module, True)


class Cosines(nn.Module):
    def forward(self, x):
        return torch.cos(x), torch.cos(x * 2), torch.cos(x[1:]), torch.cos(x + 1), torch.cos(x.t())


def lowered(dynamic_shapes=None, requires_grad=False):
    asked.clear()
    values: list[list[torch.Tensor]] = []

    def look(graph_module, context):
        nodes = graph_module.graph.find_nodes(op="call_function", target=torch.ops.test_propagation.double.default)
        values.append([part for node in nodes for part in node.meta["val"]])

    class Look(tahf4.Pass):
        """Look at the values."""

        after, before = ("doubled",), ("quantize",)

        def __call__(self, graph_module, context):
            look(graph_module, context)
            return tahf4.PassResult(graph_module, False)

    x = torch.randn(4, 6, requires_grad=requires_grad)
    captured = tahf4.capture(Cosines(), (x,), dynamic_shapes=dynamic_shapes)
    found = tahf4.lower(captured, options={"passes": [Doubled(), Look()]})
    return found, values[0]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_equal_calls_are_asked_once_and_have_values_of_their_own(requires_grad):
    _, values = lowered(requires_grad=requires_grad)
    # Another shape, another constant and other strides are other calls.
    assert asked == [(4, 6, 2.0), (3, 6, 2.0), (4, 6, 3.0), (6, 4, 2.0)]
    assert len({id(value) for value in values}) == len(values) == 10
    assert [tuple(v.shape) for v in values[::2]] == [(4, 6), (4, 6), (3, 6), (4, 6), (6, 4)]
    assert [v.dtype for v in values[:4]] == [torch.float32, torch.float64] * 2
    assert values[8].stride() == (1, 6)


def test_symbolic_sizes_are_asked_each_time():
    _, values = lowered(({0: torch.export.Dim("rows", min=3)},))
    assert len(asked) == 5
    assert isinstance(values[0].shape[0], torch.SymInt)


CHANGES = {
    "kernel": lambda node, context: node.meta.update(tahf4_kernel="another"),
    "numbers": lambda node, context: context.attach(node, depth=3),
    "name": lambda node, context: node._rename("another"),
    "target": lambda node, context: setattr(node, "target", torch.ops.aten.sin.default),
}


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [("kernel", "kernel", "another"), ("numbers", "numbers", {"depth": 3}), ("name", "name", "another"),
     ("target", "target", "aten.sin")],
)  # fmt: skip
def test_what_a_pass_changes_is_seen_whatever_it_says(change, field, value):
    class Change(tahf4.Pass):
        """Change one thing, and say that nothing changed."""

        after = ("lower",)

        def __call__(self, graph_module, context):
            node = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)[0]
            CHANGES[change](node, context)
            return tahf4.PassResult(graph_module, False)

    found = tahf4.lower(tahf4.capture(Cosines(), (torch.randn(4, 6),)), options={"passes": [Change()]})
    before, after = (snapshot.nodes for snapshot in found.snapshots[-2:])
    changed = [new for old, new in zip(before, after, strict=True) if old != new and new.op != "output"]
    assert [getattr(node, field) for node in changed] == [value]
    texts = [record.readable for record in found.history[-2:]]
    assert (texts[0] == texts[1]) == (change in ("kernel", "numbers"))
