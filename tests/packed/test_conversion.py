"""A conversion packs what it can pack, says why it leaves the rest, and is done whole or not at all."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate import init_empty_weights
from helpers import relative
from models import Stack
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import tahf4_compiler as tahf4
from tahf4_compiler.model.reasons import Cause
from tahf4_compiler.packed import convert
from tahf4_compiler.packed.convert import packed_linears
from tahf4_compiler.packed.linear import HiF4Linear
from tahf4_compiler.packed.transform import Transform

GRAPH = {"inductor": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class Computed(nn.Linear):
    """A linear whose weight is a property."""

    @property
    def weight(self):
        return 2 * self.stored


class Marked(nn.Parameter):
    """A parameter of a class of its own."""


def _buffer(linear):
    linear.register_buffer("weight", linear._parameters.pop("weight"))


def _bias(linear, how):
    value = linear._parameters.pop("bias").detach()
    setattr(linear, "bias", value) if how == "attribute" else linear.register_buffer("bias", value)


def _replaced(cls):
    def change(linear):
        linear.__class__ = cls

    return change


def _compute(linear):
    linear.register_parameter("stored", nn.Parameter(linear._parameters.pop("weight") / 2))
    linear.__class__ = Computed


CHANGES = {
    "parametrized weight norm": (parametrizations.weight_norm, Cause.WEIGHT),
    "older weight norm": (utils.weight_norm, Cause.WEIGHT),
    "parametrized spectral norm": (parametrizations.spectral_norm, Cause.WEIGHT),
    "older spectral norm": (utils.spectral_norm, Cause.WEIGHT),
    "own parametrization": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()), Cause.WEIGHT),
    "identity": (lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()), Cause.WEIGHT),
    "pruned weight": (lambda m: prune.l1_unstructured(m, "weight", 0.5), Cause.WEIGHT),
    "buffer": (_buffer, Cause.WEIGHT),
    "property": (_compute, Cause.WEIGHT),
    "tensor of another class": (lambda m: setattr(m, "weight", Marked(m.weight.detach())), Cause.WEIGHT),
    "parametrized bias": (lambda m: parametrize.register_parametrization(m, "bias", Doubled()), Cause.CLASS),
    "bias in a buffer": (lambda m: _bias(m, "buffer"), Cause.CLASS),
    "bias in an attribute": (lambda m: _bias(m, "attribute"), Cause.CLASS),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), Cause.CLASS),
    "parameter of its own": (lambda m: m.register_parameter("gain", nn.Parameter(torch.ones(1))), Cause.CLASS),
    "subclass": (_replaced(Scaled), Cause.CLASS),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("name", CHANGES)
def test_a_linear_that_computes_its_weight_or_bias_stays_and_the_others_are_packed(name, caplog):
    change, cause = CHANGES[name]
    model, x = Stack().eval(), torch.randn(4, 64)
    for block in model.blocks:
        change(block.up)
    model.eval()
    want = model(x)
    before = {path: value.clone() for path, value in model.state_dict().items() if ".up." in path}
    plan = {d.module: d for d in tahf4.quantize_(model)}
    assert set(packed_linears(model)) == {f"blocks.{i}.down" for i in range(3)}
    assert all(plan[f"blocks.{i}.up"].cause is cause for i in range(3))
    (message,) = [record.getMessage() for record in caplog.records]
    reason = plan["blocks.0.up"].reason
    assert message.startswith("Stack: 3 linears of its repeated blocks cannot be packed and stay")
    assert f"(3: {reason})" in message
    assert plan["first"].cause is Cause.BOUNDARY, "blocks are found all the same"
    assert relative(model(x), want) < 0.3
    after = model.state_dict()
    assert all(torch.equal(after[path], value) for path, value in before.items())
    graph = {d.module: d.decision for d in tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH).plan}
    assert sum(decision == "hif4" for decision in graph.values()) == 3, "and compiling leaves them, too"
    tahf4.dequantize_(model)
    assert relative(model(x), want) < 0.2


def test_a_weight_that_an_embedding_reads_as_well_stays():
    table, linear = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)
    linear.weight = table.weight
    model = nn.ModuleDict({"table": table, "linear": linear})
    (decision,) = tahf4.quantize_(model)
    assert decision.decision == "high_precision" and "Embedding table reads it too" in decision.reason
    assert model["linear"].weight is table.weight is model["table"].weight


def test_linears_that_share_one_weight_are_packed_one_by_one():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), torch.randn(4, 64)
    model[1].weight = model[0].weight
    want = model(x)
    assert [d.decision for d in tahf4.quantize_(model)] == ["hif4", "hif4"]
    assert relative(model(x), want) < 0.2


class Refusing(nn.Module):
    """A parent that takes no other linear."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def __setattr__(self, name, value):
        if isinstance(value, HiF4Linear):
            raise RuntimeError("no such linear here")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.inner(x)


def _same(model, before):
    """Whether a model holds the very modules and parameters that it held, and nothing is attached to them."""
    marks = [key for module in model.modules() for key in module.__dict__ if key.startswith("_tahf4")]
    return not marks and [id(v) for v in [*model.modules(), *model.parameters()]] == before


@pytest.mark.parametrize("where", ["weight", "parent", "observer"])
def test_an_error_in_the_middle_leaves_everything_as_it_was(where, monkeypatch):
    pipe = SimpleNamespace(transformer=Stack().eval(), transformer_2=Stack().eval())
    models = [pipe.transformer, pipe.transformer_2]
    if where == "weight":
        packed, calls = Transform.pack, []

        def pack(self, weight):
            calls.append(1)
            if len(calls) == 9:
                raise KeyboardInterrupt
            return packed(self, weight)

        monkeypatch.setattr(Transform, "pack", pack)
    elif where == "parent":
        models[1].blocks[1].up = Refusing()
    else:
        told = []

        def see(model, recipe, keep):
            told.append(model)
            if len(told) == 2:
                raise OSError("no place")

        monkeypatch.setattr(convert, "observers", [SimpleNamespace(packed=see, unpacked=told.remove)])
    held = [[id(v) for v in [*m.modules(), *m.parameters()]] for m in models]
    with pytest.raises((KeyboardInterrupt, RuntimeError, OSError)):
        tahf4.quantize_(pipe)
    assert all(_same(model, before) for model, before in zip(models, held, strict=True))


def test_an_error_while_unpacking_leaves_a_model_packed(monkeypatch):
    model = Stack().eval()
    tahf4.quantize_(model)
    before, x = list(packed_linears(model).values()), torch.randn(4, 64)
    want, calls, plain = model(x), [], HiF4Linear.to_linear

    def to_linear(self):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return plain(self)

    monkeypatch.setattr(HiF4Linear, "to_linear", to_linear)
    with pytest.raises(MemoryError):
        tahf4.dequantize_(model)
    assert list(packed_linears(model).values()) == before and torch.equal(model(x), want)


def test_a_recipe_is_packed_after_a_run_that_was_stopped(monkeypatch):
    from models import masked_recipe

    model = Stack(dim=128).eval()
    recipe, other = masked_recipe(model), copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(Transform, "pack", lambda self, weight: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tahf4.quantize_(model, recipe)
    for one in (model, other):
        tahf4.quantize_(one, recipe)
    x = torch.randn(4, 128)
    assert torch.equal(model(x), other(x))


class Conv1D(nn.Module):
    """What GPT-2 of transformers has in the place of a linear."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_a_conversion_that_packs_nothing_says_so_and_why(caplog):
    stored = Stack()
    for linear in stored.modules():
        if isinstance(linear, nn.Linear):
            linear.to(torch.float8_e4m3fn)  # as layerwise casting of diffusers does
    own = copy.deepcopy(stored)
    for linear in own.modules():
        if isinstance(linear, nn.Linear):
            linear.__class__ = type("Own", (nn.Linear,), {})
    others = nn.Sequential(nn.Embedding(64, 64), Conv1D(), Conv1D())
    small = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for model, words in (
        (stored, "Stack: nothing runs in 4 bits: 8 of 8 linears: dtype: weight is float8_e4m3fn"),
        (own, "Stack: nothing runs in 4 bits: 8 of 8 linears: dtype: weight is float8_e4m3fn"),
        (others, "no nn.Linear (1 Embedding, 2 Conv1D)"),
        (small, "2 of 2 linears: shape: 16 -> 16 features"),
        (nn.ReLU(), "no nn.Linear (no other module"),
    ):
        caplog.clear()
        tahf4.quantize_(model)
        (message,) = [record.getMessage() for record in caplog.records]
        assert words in message
    caplog.clear()
    model = Stack()
    for _ in range(2):
        tahf4.quantize_(model)
    assert not caplog.records


def test_what_cannot_be_packed_is_said_of_linears_in_blocks_that_would_be(caplog):
    model = Stack()
    model.first.weight = Marked(model.first.weight.detach())
    for block in model.blocks:
        block.up = nn.Linear(64, 48)
        block.up.weight = Marked(block.up.weight.detach())
    tahf4.quantize_(model)
    assert not caplog.records, "a boundary, and linears that are too small"
    model = Stack()
    model.blocks[0].up.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.uint8), requires_grad=False)
    tahf4.quantize_(model)
    assert not caplog.records, "somebody else quantized it"
    model = Stack()
    for block, change in zip(model.blocks, (torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn), strict=False):
        block.up.weight = nn.Parameter(change(block.up.weight.detach()), requires_grad=False)
    tahf4.quantize_(model)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "(1: weight: its layout is sparse_csr; 1: weight: its layout is _mkldnn)" in message


class Hook:
    """As accelerate's, which moves the weights of all that lies in a module."""

    def __init__(self, offload):
        self.offload = offload


@pytest.mark.parametrize("outer", ["", "0"])
def test_what_a_module_around_it_offloads_is_not_packed(outer):
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), nn.Linear(64, 64))
    model.get_submodule(outer)._hf_hook = Hook(True)
    with pytest.raises(tahf4.PackedError, match="0.0 is offloaded by .* Pack the model first"):
        tahf4.quantize_(model)
    assert not any(isinstance(module, tahf4.HiF4Linear) for module in model.modules())
    model.get_submodule(outer)._hf_hook = Hook(False)
    assert [d.decision for d in tahf4.quantize_(model)] == ["hif4"] * 3


class HalfRaw(nn.Module):
    """A block with one linear that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.places = nn.Linear(64, 64), nn.Linear(64, 64), nn.Embedding(64, 64)
        self.w1 = nn.Parameter(torch.randn(128, 64) * 0.1)
        self.table = nn.Parameter(torch.zeros(6, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x)) + nn.functional.linear(x, self.w1)[..., :64]


def test_matrices_in_blocks_that_are_no_linears_are_said_by_name(caplog):
    model = nn.Sequential(HalfRaw(), HalfRaw(), nn.Linear(64, 64)).eval()
    peft.inject_adapter_in_model(peft.LoHaConfig(target_modules=["0.up"], r=64), model)
    tahf4.quantize_(model)
    (message,) = [r.getMessage() for r in caplog.records]
    assert "2 weights of its repeated blocks are matrices of no nn.Linear and stay in high precision: 0.w1, " in message
    assert "1.w1. They hold " in message
    caplog.clear()
    tahf4.quantize_(Stack())
    assert not caplog.records


def test_what_is_packed_while_a_model_is_loaded_is_not_lost():
    """diffusers and transformers load under accelerate's ``init_empty_weights``, which is the whole process's."""
    model, same = Stack(depth=1), Stack(depth=1)
    same.load_state_dict(model.state_dict())
    tahf4.quantize_(same)
    with init_empty_weights():
        tahf4.quantize_(model)
        assert HiF4Linear(128, 128).weight_codes.is_meta  # as any module that is made there
    assert all(map(torch.equal, model.state_dict().values(), same.state_dict().values()))
    with init_empty_weights():
        tahf4.dequantize_(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
