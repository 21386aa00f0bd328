"""Which kernel runs an operator."""

from __future__ import annotations

import torch

import tahf4_compiler as tahf4
from tahf4_compiler.ops import registry


@torch.no_grad()
def test_a_plug_ins_operator_of_the_same_name_changes_nothing_for_ours():
    library = torch.library.Library("tahf4_test_registry", "DEF")
    schema = str(torch.ops.tahf4.linear.default._schema).removeprefix("tahf4::linear")
    for name in ("linear", "linear_fast"):
        library.define(name + schema)
    mine = torch.ops.tahf4_test_registry
    x, linear = torch.randn(2, 64), tahf4.HiF4Linear(64, 64)
    before = registry.dispatch(torch.ops.tahf4.linear.default, x), linear(x)
    kernel = tahf4.register_kernel("cpu", mine.linear.default, mine.linear_fast.default, lambda node: True)
    try:
        assert registry.dispatch(torch.ops.tahf4.linear.default, x) is before[0]
        assert torch.equal(linear(x), before[1])
    finally:
        registry.unregister_kernel(kernel)
    assert mine.linear.default not in registry.served()


def test_a_kernel_for_graphs_runs_no_calls_outside_of_them():
    operator = torch.ops.tahf4.quantize.default
    before = registry.dispatch(operator, torch.ones(2, 64))
    kernel = tahf4.register_kernel("for graphs", operator, operator, lambda node: True)
    try:
        assert registry.dispatch(operator, torch.ones(2, 64)) is before
    finally:
        registry.unregister_kernel(kernel)
