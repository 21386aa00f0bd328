"""Weights that graphs use otherwise than in a linear in 4 bits, and models of which nothing runs so, are said once."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers import GRAPH, by_turns, compiled, said, warned
from models import Stack
from torch import Tensor, nn

import tahf4_compiler as tahf4
from tahf4_compiler.errors import FormatError

pytestmark = pytest.mark.usefixtures("no_grad")


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


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
    if torch.__version__ < "2.12":  # its Dynamo keeps the graph of the other type
        with pytest.raises(FormatError, match="got a tensor of torch.float8_e4m3fn"):
            call(x)
        return
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


def test_what_a_later_graph_leaves_is_said_though_other_weights_were(caplog):
    model = Products(lambda x, m: torch.einsum("bk,nk->bn", x, m.weight) + m.bias, ["down"]).eval()
    call, x = compiled(model, True), torch.randn(4, 64)
    call(x)
    for block in model.blocks:
        block.up, block.down = nn.Linear(64, 8), nn.Linear(8, 64)
    for _ in range(2):
        call(x)
    used, graph = warned(caplog)
    assert "because of how graphs use their weights" in used and "linears runs in 4 bits (" in graph


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
