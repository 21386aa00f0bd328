"""Recipes whose activations have 8 bits: all of them, or those that a budget chooses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import Stack

import tahf4_compiler as tahf4

FAST = {"mask": None, "scale_search": ""}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make() -> Stack:
    torch.manual_seed(0)
    return Stack(3).eval()


@pytest.fixture(scope="module")
def calibration():
    with torch.no_grad():
        model = make()
        with tahf4.calibrate(model, options={"inductor": False}) as calibration:
            for seed in range(3):
                model(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)))
    return calibration


@pytest.fixture(scope="module")
def measured(calibration):
    with torch.no_grad():
        return calibration.recipe(**FAST)


def bits(recipe):
    return {path: linear.activation_bits for path, linear in recipe.linears("").items()}


def lowered(recipe, **options):
    model, x = make(), torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    tahf4.apply_recipe(model, recipe)
    found = tahf4.lower(tahf4.capture(model, (x,)), options=options)
    wanted = model(x)
    return found, float((found(x) - wanted).norm() / wanted.norm())


def test_all_of_them(calibration, measured, tmp_path):
    eight = calibration.recipe(**FAST, activation_bits=8)
    assert set(bits(eight).values()) == {8} and set(bits(measured).values()) == {4}
    (found, error), (_, of_four) = lowered(eight), lowered(measured)
    assert {d.activation_bits for d in found.plan if d.decision == "hif4"} == {8}
    assert error < of_four
    linears = eight.linears("")
    four = measured.linears("")
    assert all(linears[path].sqnr_db > four[path].sqnr_db for path in four), "measured as it runs"
    eight.save(tmp_path / "r.safetensors")
    again = tahf4.Recipe.load(tmp_path / "r.safetensors")
    assert bits(again) == bits(eight)
    packed = make()
    tahf4.quantize_(packed, again)
    chosen = [m.activation_bits for m in packed.modules() if isinstance(m, tahf4.HiF4Linear)]
    assert chosen and set(chosen) == {8}
    _, by_option = lowered(eight, activation_bits=4)
    assert by_option == pytest.approx(of_four, rel=1e-4), "the option comes before the recipe"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_those_of_the_greatest_effect_within_a_share_of_the_flops(measured, share):
    linears = measured.linears("")
    planned = measured.plan(max_8bit_flops=share)
    chosen = {path for path, count in bits(planned).items() if count == 8}
    flops = {path: linear.flops for path, linear in linears.items()}
    assert sum(flops[p] for p in chosen) <= share * sum(flops.values()) * (1 + 1e-9)
    left = min((flops[p] for p in flops if p not in chosen), default=None)
    if left is not None:
        assert sum(flops[p] for p in chosen) + left > share * sum(flops.values()), "no further one fits"
    worth = {p: linears[p].effect / flops[p] for p in flops}
    if chosen and len({*flops.values()}) == 1:
        assert min(worth[p] for p in chosen) >= max((worth[p] for p in flops if p not in chosen), default=0)
    reasons = {p: linear.reason for p, linear in planned.linears("").items()}
    assert all(("activation in 8 bits by budget" in reasons[p]) == (p in chosen) for p in flops)
    assert all(linear.decision == "hif4" for linear in planned.linears("").values())
    assert planned.plan(max_8bit_flops=0.0).linears("") == measured.plan(max_8bit_flops=0.0).linears("")


@pytest.mark.parametrize("count", [8, 16])
@pytest.mark.parametrize("budget", [{"max_high_precision_linears": 2}, {"min_flops_4bit": 0.7}])
def test_a_budget_may_protect_by_more_bits_of_the_activation(calibration, measured, count, budget):
    kept = {p for p, e in measured.plan(**budget).linears("").items() if e.decision == "high_precision"}
    planned = measured.plan(protect_bits=count, **budget)
    linears = planned.linears("")
    assert kept and {p for p, found in bits(planned).items() if found == count} == kept
    assert all(linear.decision == "hif4" for linear in linears.values())
    assert all((f"activation in {count} bits by budget" in linears[p].reason) == (p in kept) for p in linears)
    again = calibration.recipe(**FAST, protect_bits=count, **budget)
    assert again.experts == planned.experts and again.provenance["budget"]["protect_bits"] == count
    (found, error), (_, of_four) = lowered(planned), lowered(measured)
    assert error < of_four and sum(d.activation_bits == count for d in found.plan) == len(kept)


def test_what_is_not_protected_keeps_the_bits_that_the_recipe_was_made_with(calibration):
    recipe = calibration.recipe(**FAST, activation_bits=8, max_high_precision_linears=2, protect_bits=16)
    assert sorted(bits(recipe).values()) == [8, 8, 8, 8, 16, 16]
    assert sorted(bits(recipe.plan(max_high_precision_linears=1, protect_bits=16)).values()) == [8] * 5 + [16]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"protect_bits": 8, "activation_bits": 8, "min_flops_4bit": 0.5}, "protects nothing"),
        ({"protect_bits": 4, "min_flops_4bit": 0.5}, "expected 8 "),
        ({"protect_bits": True, "min_flops_4bit": 0.5}, "expected 8 "),
        ({"protect_bits": 8.0, "min_flops_4bit": 0.5}, "expected 8 "),
        ({"protect_bits": 16, "max_8bit_flops": 0.5}, "leave protect_bits out"),
        ({"protect_bits": 16}, "a budget is one of"),
    ],
)
def test_what_protects_nothing_is_refused(calibration, measured, values, words):
    for make in (calibration.recipe, *([] if "activation_bits" in values else [measured.plan])):
        with pytest.raises(tahf4.OptionError, match=words):
            make(**values)


def test_a_plan_for_high_precision_and_one_for_8_bits_leave_each_other_alone(measured):
    kept = measured.plan(max_high_precision_linears=2)
    both = kept.plan(max_8bit_flops=1.0)
    high = {p for p, linear in both.linears("").items() if linear.decision == "high_precision"}
    assert len(high) == 2 and {p for p, count in bits(both).items() if count == 8} == set(bits(both)) - high
    other = measured.plan(max_8bit_flops=1.0).plan(max_high_precision_linears=2)
    assert {p for p, linear in other.linears("").items() if linear.decision == "high_precision"} == high
    assert set(bits(other).values()) == {8}


def test_the_error_of_the_whole_is_measured_with_the_bits_of_the_plan(calibration, measured):
    planned = calibration.recipe(**FAST, max_8bit_flops=1.0)
    assert all(a.error < b.error for a, b in zip(planned.errors[""], measured.errors[""], strict=True))


@pytest.mark.parametrize("value", [-0.1, 1.1, True, "0.2"])
def test_a_share_out_of_range_is_refused(measured, value):
    with pytest.raises(tahf4.OptionError, match="max_8bit_flops"):
        measured.plan(max_8bit_flops=value)


@pytest.mark.parametrize("value", [6, 8.0, True, None])
def test_other_bits_are_refused(calibration, measured, value, tmp_path):
    with pytest.raises(tahf4.OptionError, match="expected 4"):
        calibration.recipe(activation_bits=value)
    ((name, entry), *rest) = measured.experts[""].items()
    ((path, linear), *_) = entry.linears.items()
    wrong = dataclasses.replace(linear, activation_bits=value)
    wrong = dataclasses.replace(entry, linears={**entry.linears, path: wrong})
    dataclasses.replace(measured, experts={"": {**dict(rest), name: wrong}}).save(tmp_path / "r.safetensors")
    with pytest.raises(tahf4.RecipeError, match="bits, expected 4, 8 or 16"):
        tahf4.Recipe.load(tmp_path / "r.safetensors")


def test_all_of_them_and_a_share_are_refused_together(calibration):
    with pytest.raises(tahf4.OptionError, match="leave one of them out"):
        calibration.recipe(**FAST, activation_bits=8, max_8bit_flops=0.2)


def test_a_budget_that_is_none_is_none(measured):
    planned = measured.plan(max_high_precision_linears=2, max_8bit_flops=None)
    assert planned.experts == measured.plan(max_high_precision_linears=2).experts
    assert sum(linear.decision == "high_precision" for linear in planned.linears("").values()) == 2


def test_a_plan_does_not_take_bits_from_what_it_does_not_protect(calibration):
    for made_with, bits in ((8, 8), (16, 8), (16, 16)):
        with pytest.raises(tahf4.OptionError, match=f"made with activations of {made_with} bits"):
            calibration.recipe(**FAST, activation_bits=made_with).plan(max_high_precision_linears=1, protect_bits=bits)


def test_bits_of_steps_are_checked(calibration):
    with pytest.raises(tahf4.OptionError, match="step_activation_bits is 8.0; expected 8 "):
        calibration.recipe(step_activation_bits=8.0, high_precision_steps=(0,))
