"""Transforms of functions inside of forward: torch.vmap and torch.func."""

from __future__ import annotations

import re

import pytest
import torch
from models import Stack
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import flex_attention

import tahf4_compiler as tahf4

GRAPH = {"inductor": False}


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(64, 128), nn.Linear(64, 64), function

    def forward(self, x):
        return self.function(self, x)


def jacobian(model, x):
    return torch.func.jacrev(torch.sin)(model.up(x)[0, :4])


def product_with_a_jacobian(model, x):
    value, pull = torch.func.vjp(torch.sin, model.up(x))
    return pull(torch.vmap(torch.cos)(value))[0] + model.up(x)


FUNCTIONS = {
    "vmap": lambda model, x: torch.vmap(lambda row: row * 2)(model.up(x)),
    "vmap twice": lambda model, x: torch.vmap(torch.cos)(torch.vmap(torch.vmap(torch.sin))(model.up(x)).exp()),
    "grad": lambda model, x: torch.func.grad(lambda value: value.square().sum())(model.up(x)),
    "jvp": lambda model, x: torch.func.jvp(torch.sin, (model.up(x),), (model.up(x),))[1],
    "hessian": lambda model, x: torch.func.hessian(lambda value: value.sin().sum())(model.up(x)[0, :4]),
    "jacrev": jacobian,
    "vjp": product_with_a_jacobian,
    "functional_call": lambda model, x: torch.func.functional_call(model.up, dict(model.up.named_parameters()), (x,)),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "hessian" or torch.__version__ >= "2.12"])
def test_the_graph_computes_what_it_computed(name):
    model, x = Net(FUNCTIONS[name]).eval().requires_grad_(False), torch.randn(4, 64)
    # Without passes that quantize nothing may differ.
    options = {**GRAPH, "disable_passes": ["quantize"]}
    compiled = torch.compile(model, backend="tahf4", options=options, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), model(x))
    x = torch.randn(6, 64)
    torch.testing.assert_close(compiled(x), model(x))


def test_linears_beside_a_transform_and_under_it_run_in_4_bits(tmp_path):
    model = Net(lambda model, x: torch.vmap(model.down)(x) + model.up(x)[:, :64])
    model, x = model.eval().requires_grad_(False), torch.randn(4, 64)
    options = {**GRAPH, "dump_dir": str(tmp_path)}
    y = torch.compile(model, backend="tahf4", options=options, fullgraph=True)(x)
    assert 1e-3 < float((y - model(x)).norm() / model(x).norm()) < 0.3
    (lowered,) = tmp_path.rglob("*_lower.py")
    assert len(re.findall(r"linear\w*\.default\(", lowered.read_text())) == 2, "one product under vmap, one beside it"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 32)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        return self.to_out(flex_attention(q, k, v).transpose(1, 2).flatten(2))


def test_flex_attention_without_a_mask():
    model, x = Attention().eval().requires_grad_(False), torch.randn(1, 128, 64)
    options = {**GRAPH, "disable_passes": ["quantize"]}
    compiled = torch.compile(model, backend="tahf4", options=options, fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.compile(model, backend="eager")(x))


class Gradient(nn.Module):
    """Takes the gradient of its own linears."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return torch.func.grad(lambda z: self.down(self.up(z).relu()).sum())(x)


@pytest.mark.parametrize("backend", ["tahf4", "aot_eager", "eager", None])
def test_a_packed_model_that_takes_a_gradient_in_its_forward_is_refused(backend):
    model, x = nn.Sequential(Gradient(), Gradient()).eval().requires_grad_(False), torch.randn(4, 64)
    tahf4.quantize_(model)
    with pytest.raises(Exception, match="GradientError|needs gradients"):
        (torch.compile(model, backend=backend) if backend else model)(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_model_refuses_forward_mode_derivatives(compiled):
    model, x = Stack().eval().requires_grad_(False), torch.randn(4, 64)
    tahf4.quantize_(model)
    call = torch.compile(model, backend="tahf4", options=GRAPH) if compiled else model
    with pytest.raises(tahf4.GradientError, match="4-bit codes have none"):
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(tahf4.GradientError, match="4-bit codes have none"):
        call(forward_ad.make_dual(x, x))


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp() * 2


@pytest.mark.parametrize("options", [GRAPH, {}])
def test_a_compiled_model_refuses_tangents(options):
    model, x = nn.Sequential(Exponential(), *Stack(depth=2).blocks).eval().requires_grad_(False), torch.randn(4, 64)
    call = torch.compile(model, backend="tahf4", options=options)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        try:
            found = forward_ad.unpack_dual(call(dual)).tangent
        except tahf4.GradientError as error:
            assert "a compiled model got a tensor with a tangent" in str(error)
        else:  # PyTorch 2.15 runs the original
            assert torch.equal(found, forward_ad.unpack_dual(model(dual)).tangent)
    call(x)
    with forward_ad.dual_level():
        call(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_model_refuses_nested_tensors(compiled):
    model = Stack().eval().requires_grad_(False)
    tahf4.quantize_(model)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    parts = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(5, 64)], layout=torch.jagged)
    with pytest.raises(Exception, match="got a nested tensor, expected a plain one"):
        call(parts)
