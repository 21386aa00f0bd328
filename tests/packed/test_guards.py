"""What would treat codes as numbers, or leave them out, is refused before anything has changed."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from helpers import relative
from models import Stack
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4
from tahf4_compiler.packed.convert import packed_linears

ROUNDED = "bfloat16_half_away"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def packed(**keywords) -> nn.Module:
    model = Stack().eval()
    tahf4.quantize_(model, **keywords)
    return model


def test_gradients_of_a_packed_model_are_refused_before_any_parameter_requires_them():
    model = packed(keep=[r"blocks\.0\."]).requires_grad_(False)
    for module, count in ((model, 4), (model.blocks[1], 2), (model.blocks[1].up, 1)):
        with pytest.raises(tahf4.GradientError, match=rf"{count} packed linears .*dequantize_"):
            module.requires_grad_(True)
    assert not any(p.requires_grad for p in model.parameters())
    model.blocks[0].requires_grad_()
    model.last.requires_grad_(requires_grad=True)
    assert {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "blocks.0.norm",
        "blocks.0.up",
        "blocks.0.down",
        "last",
    }
    tahf4.dequantize_(model)
    assert all(p.requires_grad for p in model.requires_grad_(True).parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_the_state_of_a_packed_model_is_refused_by_a_plain_one(strict):
    state, plain = packed().state_dict(), Stack()
    before = copy.deepcopy(plain.state_dict())
    for module, part in ((plain, state), (plain.blocks[0], {"up.weight_codes": state["blocks.0.up.weight_codes"]})):
        with pytest.raises(tahf4.PackedError, match=r"linears that are not packed in .*up.*Linear.* Pack the model"):
            module.load_state_dict(part, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_a_state_without_the_adapters_of_the_model_is_refused():
    state, model = packed().state_dict(), packed()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["blocks.1.up"]), model)
    with pytest.raises(tahf4.PackedError, match=r"1 packed linears .* \(blocks.1.up: Linear\)"):
        model.load_state_dict(state, strict=False)


def test_states_that_lose_nothing_load():
    model, other, x = packed(), packed(), torch.randn(4, 64)
    part = {key: value for key, value in model.state_dict().items() if not key.startswith("blocks.2")}
    other.load_state_dict(part, strict=False)
    other.blocks[2].load_state_dict(model.blocks[2].state_dict())
    assert torch.equal(other(x), model(x))
    assert nn.ModuleDict({"last": nn.Linear(64, 64)}).load_state_dict(model.state_dict(), strict=False).unexpected_keys


def test_averages_of_codes_are_refused():
    with pytest.raises(tahf4.PackedError, match="codes and scales of 6 packed linears as numbers"):
        AveragedModel(packed())
    AveragedModel(Stack()).update_parameters(Stack())


@pytest.mark.parametrize("foreach", [False, True])
def test_emamodel_of_diffusers_takes_codes_as_they_are_and_averages_the_rest(foreach):
    """If this fails, diffusers averages parameters that require no gradients: refuse it as ``AveragedModel``."""
    first, second = packed(), packed()
    averaged = EMAModel(first.parameters(), decay=0.5, foreach=foreach)
    for model in (first, first, second):
        averaged.step(model.parameters())
    target = copy.deepcopy(first)
    averaged.copy_to(target.parameters())
    for path, linear in packed_linears(target).items():
        for name, value in linear.named_parameters():
            same = torch.equal(value, second.get_submodule(path).get_parameter(name))
            assert same == (name != "bias"), f"{path}.{name}"
    assert not torch.equal(target.first.weight, second.first.weight)


def test_scripting_is_refused_and_a_trace_runs_in_4_bits():
    model, x = packed().requires_grad_(False), torch.randn(4, 64)
    with pytest.raises(tahf4.PackedError, match=r"torch.jit.script does not take packed linears.*torch.jit.trace"):
        torch.jit.script(model)
    rows = torch.randn(7, 64)
    assert relative(torch.jit.trace(model, (x,))(rows), model(rows)) < 1e-6


def test_a_trace_cannot_know_the_step():
    model, x = packed(), torch.randn(4, 64)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    tahf4.set_high_precision_steps(model, [0], scheduler=scheduler)
    with pytest.raises(tahf4.PackedError, match="cannot know the step"):
        torch.jit.trace(model, (x,))


COMPUTED = {
    "spectral_norm": nn.utils.spectral_norm,
    "weight_norm": nn.utils.weight_norm,
    "parametrization": lambda linear: nn.utils.parametrizations.weight_norm(linear, name="weight"),
    "by keyword": lambda linear: nn.utils.parametrize.register_parametrization(
        module=linear, tensor_name="weight", parametrization=nn.Identity()
    ),
}


@pytest.mark.parametrize("apply", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_in_each_call_is_refused_for_a_packed_linear_alone(apply):
    model, x = packed(), torch.randn(4, 64)
    want, keys = model(x), model.state_dict().keys()
    with pytest.raises(tahf4.PackedError, match=r"packed \(64 -> 128 features\).*'weight'.*dequantize_"):
        apply(model.blocks[0].up)
    assert torch.equal(model(x), want) and model.state_dict().keys() == keys
    nn.utils.parametrize.register_parametrization(model.blocks[0].up, "bias", nn.Identity())
    assert torch.equal(model(x), want)
    apply(model.first)
    assert "first.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "apply",
    [nn.utils.parametrizations.spectral_norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.5)],
    ids=["new spectral norm", "pruning"],
)
def test_what_reads_the_weight_first_is_refused_there(apply):
    model, x = packed(), torch.randn(4, 64)
    want, keys = model(x), model.state_dict().keys()
    with pytest.raises(tahf4.PackedError, match=r"this linear is packed"):
        apply(model.blocks[0].up)
    assert torch.equal(model(x), want) and model.state_dict().keys() == keys


PARTS = {
    "weight_norm": lambda linear, name: nn.utils.weight_norm(linear, name),
    "pruning": lambda linear, name: prune.l1_unstructured(linear, name, 0.5),
    "pruning by a mask": lambda linear, name: prune.custom_from_mask(linear, name=name, mask=torch.ones(64, 64)),
    "parametrization": lambda linear, name: nn.utils.parametrize.register_parametrization(linear, name, nn.Identity()),
}


@pytest.mark.parametrize("apply", PARTS.values(), ids=PARTS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_codes_and_multipliers_are_no_numbers_to_be_computed(apply):
    model, x = packed(), torch.randn(4, 64)
    want, keys = model(x), model.state_dict().keys()
    for name in ("weight_codes", "weight_scales", "multiplier"):
        with pytest.raises(tahf4.PackedError, match=f"packed .*it got '{name}'.*dequantize_"):
            apply(model.blocks[0].up, name)
    assert torch.equal(model(x), want) and model.state_dict().keys() == keys
    apply(nn.Linear(64, 64), "weight")


def test_a_packed_linear_takes_no_weight():
    model, x = packed(), torch.randn(4, 64)
    linear, want = model.blocks[0].up, model(x)
    for weight in (nn.Parameter(torch.randn(128, 64)), torch.randn(128, 64)):
        with pytest.raises(tahf4.PackedError, match="takes no weight. Unpack it with tahf4.dequantize_"):
            linear.weight = weight
    linear.bias = nn.Parameter(linear.bias.clone())
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("width", [1, 63, 65])
def test_a_trace_refuses_an_input_of_another_width(width):
    linear = nn.Linear(64, 128)
    held = tahf4.HiF4Linear.from_linear(linear, hif4.quantize(linear.weight)).requires_grad_(False)
    traced = torch.jit.trace(held, torch.randn(3, 64))
    rows = torch.randn(5, 64)
    assert torch.equal(traced(rows), held(rows))
    with pytest.raises(Exception, match=rf"64 -> 128 features got .* \(3, {width}\), expected 64"):
        traced(torch.randn(3, width))


@pytest.mark.parametrize("how", ["eager", "compiled", "traced"])
@pytest.mark.parametrize("width", [1, 63, 65])
def test_an_input_of_another_width_is_refused_with_both_widths(how, width):
    linear = nn.Linear(64, 128)
    held = tahf4.HiF4Linear.from_linear(linear, hif4.quantize(linear.weight))  # no multiplier tells the width
    if how == "traced":
        held = torch.fx.symbolic_trace(held)
    call = torch.compile(held, backend="eager") if how == "compiled" else held
    with pytest.raises(tahf4.FormatError, match=rf"64 -> 128 features got .* \(3, {width}\), expected 64"):
        call(torch.randn(3, width))


def test_options_that_cannot_reach_what_is_packed_are_refused_by_name():
    model = packed(keep=["down"])
    for option, names in (({"scale_span": 2}, "scale_span=2"), ({"rounding": ROUNDED}, f"rounding={ROUNDED!r}")):
        with pytest.raises(tahf4.PackedError, match=rf"{names} reaches no .*3 are packed otherwise \(blocks.0.up"):
            tahf4.quantize_(model, **option)
    assert {d.span for d in tahf4.quantize_(model)} == {1}
    same = packed(scale_span=2, rounding=ROUNDED)
    tahf4.set_activation_bits(same, {"up": 8})
    assert len(tahf4.quantize_(same, scale_span=2, rounding=ROUNDED)) == len(tahf4.quantize_(same))


@pytest.mark.parametrize("wraps", [False, True])
def test_a_forward_of_all_linears_that_somebody_replaced_is_refused(wraps, monkeypatch):
    own = nn.Linear.forward

    def forward(self, x):
        return own(self, x) + getattr(self, "delta", 0)

    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(own)(forward) if wraps else forward)
    model = Stack()
    with pytest.raises(tahf4.PackedError, match=rf"Linear.forward is replaced for the whole .* \(by {__name__}, "):
        tahf4.quantize_(model)
    assert not packed_linears(model)
    tahf4.quantize_(nn.Sequential(nn.Linear(8, 8)))  # nothing to pack
    monkeypatch.undo()
    tahf4.quantize_(model)
    assert len(packed_linears(model)) == 6
