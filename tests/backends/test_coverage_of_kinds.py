"""Whatever holds the weight of a linear is said where Dynamo does not hand it over, and not where it is in a graph."""

from __future__ import annotations

import peft
import pytest
import torch
from helpers import GRAPH, said, warned
from models import Stack
from torch import Tensor, nn
from torch.nn import functional as F

import tahf4_compiler as tahf4

pytestmark = pytest.mark.usefixtures("no_grad")


class Own(nn.Linear):
    """A subclass that calls the function itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Inherits(nn.Linear):
    """A subclass that calls the method of its base."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Matrix(nn.Module):
    """A linear without an ``nn.Linear``."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n, k) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.up = nn.MultiheadAttention(64, 1, batch_first=True), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) + self.attn(x[None], x[None], x[None], need_weights=False)[0][0]


def hide(module: nn.Module) -> None:
    forward = module.forward  # not disabled itself: PyTorch would skip it in all modules of the class
    module.forward = torch.compiler.disable(lambda *args, **kwargs: forward(*args, **kwargs))


def stack(kind: type) -> Stack:
    model = Stack().eval()
    for i, block in enumerate(model.blocks):
        if kind is Attention:
            model.blocks[i] = Attention().eval()
        else:
            block.down = kind(128, 64)
            block.up = kind(64, 128) if kind is Matrix else block.up
    return model


KINDS = [
    (Own, "1 linears of its repeated blocks run in high precision, because", "(blocks.1.down)"),
    (Inherits, "1 linears of its repeated blocks run in high precision, because", "(blocks.1.down)"),
    (Attention, "linears of its repeated blocks run in high precision, because", "blocks.1.attn.out_proj, "),
    (Attention, "linears of its repeated blocks run in high precision, because", ".attn.in_proj_weight"),
    (Matrix, "1 linears of its repeated blocks stand in no graph", "(blocks.1.down.w)"),
]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("kind", "says", "paths"), KINDS, ids=[kind.__name__ for kind, _, _ in KINDS])
def test_every_kind_is_said_once_where_it_is_hidden(kind, says, paths, hidden, caplog):
    model, x = stack(kind), torch.randn(4, 64)
    part = model.blocks[1].attn if kind is Attention else model.blocks[1].down
    if hidden:
        hide(part)
    call = torch.compile(model, backend="tahf4", options=GRAPH)
    for _ in range(4):
        call(x)
    assert len(said(caplog)) == hidden, "\n".join(said(caplog))
    for message in said(caplog):
        assert says in message and paths in message


def test_a_layer_that_one_operator_of_pytorch_runs_is_said_with_all_that_it_reads(caplog):
    model, x = Stack().eval(), torch.randn(1, 4, 64)
    for i in range(3):
        model.blocks[i] = nn.TransformerEncoderLayer(64, 1, 128, batch_first=True).eval()
    hide(model)
    call = torch.compile(model, backend="tahf4", options=GRAPH)
    for _ in range(4):
        call(x)
    nothing, hidden = said(caplog)
    assert nothing.startswith("Stack: nothing runs in 4 bits: ")
    assert hidden.startswith("Stack: 12 linears") and "blocks.0.self_attn.out_proj, blocks.0.linear1, " in hidden


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig, peft.LoraConfig])
def test_an_adapter_beside_a_packed_linear_is_no_linear_without_4_bits(config, hidden, caplog):
    model, x = Stack(depth=2).eval().requires_grad_(False), torch.randn(4, 64)
    tahf4.quantize_(model)
    peft.inject_adapter_in_model(config(target_modules=["up"], r=8), model)
    for block in model.blocks if hidden else ():
        hide(block.up.base_layer)  # graphs hold the adapter alone
    call = torch.compile(model.eval().requires_grad_(False), backend="tahf4", options=GRAPH)
    for _ in range(3):
        call(x)
    assert "in 4 bits" not in caplog.text and not said(caplog)


@pytest.mark.parametrize("by", ["keep", "options", "quantize_"])
def test_what_is_kept_or_left_is_not_said(by, caplog):
    model, x = stack(Own), torch.randn(4, 64)
    for block in model.blocks:
        hide(block.down)
    if by == "keep":
        tahf4.keep(model, ["down"])
    elif by == "quantize_":
        tahf4.quantize_(model)
    options = {**GRAPH, "keep": ["down"]} if by == "options" else GRAPH
    call = torch.compile(model, backend="tahf4", options=options)
    for _ in range(4):
        call(x)
    assert not said(caplog)


def test_a_model_that_is_kept_whole_is_not_said(caplog):
    model = Stack(depth=2).eval()
    tahf4.keep(model, ["first", "last", "blocks"])
    torch.compile(model, backend="tahf4", options=GRAPH)(torch.randn(4, 64))
    assert not warned(caplog)


def test_a_linear_of_the_boundary_that_pytorch_compiles_nothing_of_is_not_said_to_be_in_a_block(caplog):
    model, x = Stack(depth=2).eval(), torch.randn(4, 64)
    model.first.compile(backend="tahf4", options=GRAPH)
    for _ in range(3):
        assert torch.equal(model(x), Stack.forward(model, x))
    assert not warned(caplog)
