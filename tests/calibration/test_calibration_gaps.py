"""What a calibration did not see is named with its cause, and so are values that the format does not hold."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.format import hif4
from tahf4_compiler.format.transforms import multipliers, transform
from tahf4_compiler.model.reasons import Cause

GRAPH = {"inductor": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Block(nn.Module):
    """A block with a part that Dynamo does not see, and an expert that nobody calls."""

    def __init__(self, disabled=False, expert=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.disabled, self.expert = disabled, nn.Linear(64, 64) if expert else None

    @torch.compiler.disable
    def hidden(self, h):
        return self.down(torch.relu(h))

    def forward(self, x):
        h = self.up(self.norm(x))
        if self.expert is not None and x.shape[0] > 100:
            x = self.expert(x)
        return x + (self.hidden(h) if self.disabled else self.down(torch.relu(h)))


def calibrated(model, x=None):
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(16, 64) if x is None else x)
    return calibration


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("tahf4")]


@pytest.mark.parametrize(
    ("options", "leaf", "cause"),
    [
        ({"disabled": True}, "down", "it runs outside of the repeated blocks of the compiled graphs"),
        ({"expert": True}, "expert", "no call reached it"),
    ],
)
def test_linears_that_were_not_observed_are_named_with_the_cause(options, leaf, cause, caplog, tmp_path):
    model = nn.Sequential(*(Block(**options) for _ in range(3))).eval()
    recipe = calibrated(model).recipe(mask="max", sensitivity=False)
    (message,) = messages(caplog)
    assert f"3 of {9 if 'expert' in options else 6} linears" in message
    assert f"0.{leaf}, 1.{leaf}, 2.{leaf} ({cause}" in message
    recipe.save(tmp_path / "recipe")
    loaded = tahf4.Recipe.load(tmp_path / "recipe")
    unseen = loaded.provenance["calibration"]["unseen"][""]
    assert set(unseen) == {f"{i}.{leaf}" for i in range(3)} and all(text.startswith(cause) for text in unseen.values())
    for decision in tahf4.quantize_(model, loaded):
        lacks = decision.module.endswith(leaf)
        assert decision.cause is (Cause.NO_STATISTICS if lacks else Cause.RECIPE)
        assert decision.decision == "hif4" and ("no statistics" in decision.reason) is lacks


def test_a_weight_that_was_observed_under_another_name_has_a_recipe(caplog):
    model = nn.Sequential(*(Block(expert=True) for _ in range(2))).eval()
    model[1].expert.weight = model[0].expert.weight
    calls = calibrated(model, torch.randn(128, 64))
    plan = tahf4.quantize_(model, calls.recipe(mask="max", sensitivity=False))
    assert messages(caplog) == [] and {decision.cause for decision in plan} == {Cause.RECIPE}
    torch.testing.assert_close(model[1].expert.multiplier, model[0].expert.multiplier)


def test_without_a_kept_call_the_cause_is_not_known(caplog):
    model = nn.Sequential(*(Block(expert=True) for _ in range(2))).eval()
    calibration = calibrated(model)
    calibration.kept.calls.clear()
    calibration.recipe(mask="max", sensitivity=False)
    calibration.kept.seen.clear()  # as of the second expert where the steps are those of the first
    calibration.recipe(mask="max", sensitivity=False)
    kept, called = messages(caplog)
    assert "no call was kept that tells why" in kept and "no call reached it" in called


def test_a_calibration_that_saw_everything_says_nothing(caplog):
    model = Stack().eval()
    tahf4.keep(model, [r"blocks\.1\.up"])
    recipe = calibrated(model).recipe(mask="max", sensitivity=False)
    assert not messages(caplog) and "unseen" not in recipe.provenance["calibration"]


def test_both_plans_say_what_a_recipe_does_not_know():
    model, x = Stack().eval(), torch.randn(16, 64)
    recipe = calibrated(model, x).recipe(mask="max", sensitivity=False)
    entries = {name: entry for name, entry in recipe.experts[""].items() if name != "blocks.1.up"}
    part = dataclasses.replace(recipe, experts={"": entries})
    given = {d.module: d.cause for d in tahf4.plan_modules(model, part)}
    tahf4.apply_recipe(model, part)
    modules = {d.module: d.cause for d in tahf4.plan_modules(model)}
    graph = {d.module: d.cause for d in tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH).plan}
    assert given == modules == graph
    assert graph["blocks.1.up"] is Cause.NO_STATISTICS and graph["first"] is Cause.BOUNDARY
    assert graph["blocks.0.up"] is Cause.RECIPE
    tahf4.apply_recipe(model, None)
    assert {d.cause for d in tahf4.plan_modules(model)} == {Cause.BODY, Cause.BOUNDARY}


def test_the_largest_value_of_the_format():
    packed = hif4.quantize(torch.full((1, 64), 4e5))
    assert hif4.dequantize(packed).unique().tolist() == [hif4.LARGEST]


@pytest.mark.parametrize(("rotate", "scale"), [(False, 4e5), (True, 4e6)])
def test_values_beyond_the_format_are_told_of_with_their_share(rotate, scale, caplog):
    model, read = Stack(2).eval(), []
    model.blocks[1].up.weight[7] *= scale
    model.blocks[1].down.weight[:, 7] /= scale
    calibration = calibrated(model, torch.randn(16, 64))
    recipe = calibration.recipe(mask=None, rotate=rotate, sensitivity=False)
    (message,) = messages(caplog)
    model.blocks[1].down.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(calibration.kept.calls[""][0][0][0])
    entry = recipe.experts[""]["blocks.1.down"]
    moved = transform(read[0], multipliers(128, None, entry.seed)[0], entry.hadamard_block).abs()
    share = f"{100 * float((moved > hif4.LARGEST).double().mean()):.2g}"
    assert message.startswith(f"blocks.1.down: what it reads reaches {float(moved.max()):.3g} after mask and rotation")
    assert f"no more than 344064: {share}% of the values of 16 sample rows" in message and float(share) > 0
    caplog.clear()
    calibration.recipe(mask="max", rotate=rotate, sensitivity=False)
    assert not messages(caplog), "the mask brings them in"


def test_one_value_that_no_sample_row_holds(caplog):
    model = Stack(2).eval()
    with tahf4.calibrate(model, options=GRAPH, rows=0) as calibration:
        model.blocks[1].up.weight *= 4e5
        model(torch.randn(16, 64))
    calibration.recipe(mask=None, rotate=False, sensitivity=False)
    (message,) = messages(caplog)
    assert "of 0 sample rows" in message


def test_calls_that_cannot_be_kept_are_named_as_the_cause():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Stack()

        def forward(self, x, settings):
            return self.net(x) * settings.scale

    model = Scaled().eval()
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(4, 64), SimpleNamespace(scale=2.0))
    with pytest.raises(tahf4.CalibrationError, match="kept none; it keeps calls whose arguments are tensors"):
        calibration.recipe()
    assert calibration.recipe(mask="layer_search")
