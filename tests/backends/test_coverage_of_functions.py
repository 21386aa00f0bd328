"""Compiled methods and functions are watched as compiled models are: what Dynamo leaves out is said."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import GRAPH, said
from models import Stack
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("no_grad")

SETTINGS = {"backend": "tahf4", "options": GRAPH}


class Encoder(Stack):
    def encode(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x))


MODEL = Encoder()


def by_name(x: Tensor) -> Tensor:
    return MODEL(x)


class Pipeline(SimpleNamespace):
    """No module, as pipelines are none."""

    def denoise(self, x: Tensor) -> Tensor:
        return self.transformer(x)


def method(model):
    return model.encode


def forward(model):
    return model.forward


def closure(model):
    norm = nn.LayerNorm(64)
    return lambda x: norm(model(x))


def name(model):
    globals()["MODEL"] = model
    return by_name


def pipeline(model):
    return Pipeline(transformer=model, steps=3).denoise


WAYS = [method, forward, closure, name, pipeline]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_hidden_blocks_of_a_compiled_function_are_said_once(way, hidden, caplog):
    model, x = Encoder().eval(), torch.randn(4, 64)
    for block in model.blocks if hidden else ():
        block.down.forward = torch.compiler.disable(lambda x, forward=block.down.forward: forward(x))
    call = torch.compile(way(model), **SETTINGS)
    want = call(x)
    for _ in range(4):
        assert torch.equal(call(x), want)
    assert len(said(caplog)) == hidden
    for message in said(caplog):
        assert message.startswith(f"Encoder: {2 if way is method else 3} linears of its repeated blocks run in high")
        assert "(blocks.0.down, blocks.1.down" in message


def test_a_function_that_reads_no_blocks_is_not_said(caplog):
    norm, later = nn.LayerNorm(64), torch.compile(nn.Linear(16, 16), backend="eager")

    def function(x):
        return norm(x) + later(x[..., :16]).sum() + not_yet(x)

    call = torch.compile(function, **SETTINGS)

    def not_yet(x):
        return x

    call(torch.randn(4, 64))
    assert not said(caplog)


class Product(nn.Linear):
    """Not packed, and no linear of a graph either."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bk,nk->bn", x, self.weight)


@pytest.mark.parametrize("runs", [False, True])
def test_a_model_of_which_nothing_runs_in_4_bits_is_said_where_the_function_runs_it(runs, caplog):
    model, scale = Stack().eval(), nn.Parameter(torch.ones(64))
    for block in model.blocks:
        block.up, block.down = Product(64, 128), Product(128, 64)
    call = torch.compile((lambda x: model(x)) if runs else (lambda x: x * scale if x.dim() else model(x)), **SETTINGS)
    for _ in range(3):
        call(torch.randn(4, 64))
    assert [message.startswith("Stack: nothing runs in 4 bits: 6 of 8 linears") for message in said(caplog)[:1]] == (
        [True] if runs else []
    )


def test_a_function_that_is_compiled_again_is_the_other_backends():
    model, graphs = Stack().eval(), []
    call = torch.compile(lambda x: model(x), **SETTINGS)
    again = torch.compile(call, backend=lambda graph, inputs: graphs.append(graph) or graph)
    x = torch.randn(4, 64)
    assert torch.allclose(again(x), model(x), atol=1e-6) and len(graphs) == 1


def test_a_compiled_function_that_calls_another_is_one_graph():
    model, x = Stack().eval(), torch.randn(4, 64)
    inner = torch.compile(lambda x: model(x), **SETTINGS)
    outer = torch.compile(lambda x: inner(x) * 2, fullgraph=True, **SETTINGS)
    assert torch.equal(outer(x), inner(x) * 2)


@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_between_compilation_and_first_call_is_said(whole, caplog):
    model = Stack().eval()
    call = torch.compile(model, **SETTINGS) if whole else model
    if not whole:
        model.compile(**SETTINGS)
    copy.deepcopy(copy.deepcopy(call))
    assert caplog.text.count("Stack: PyTorch leaves the compilation by model.compile() out") == (not whole)
