"""Linears that a user keeps, and random numbers, in what a recipe measures."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative
from models import Stack
from torch import nn

import tahf4_compiler as tahf4

QUICK = {"inductor": False}


def calibrated(model: nn.Module):
    with torch.no_grad(), tahf4.calibrate(model, options=QUICK) as calibration:
        for seed in range(2):
            model(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)))
    return calibration


@torch.no_grad()
def test_kept_linears_take_nothing_of_a_budget_and_have_no_error():
    torch.manual_seed(0)
    model = Stack(2).eval()
    model.blocks[0].up.weight *= 3
    tahf4.keep(model, [r"blocks\.0\."])
    calibration = calibrated(model)
    recipe = calibration.recipe(max_high_precision_linears=1)
    linears = recipe.linears("")
    chosen = [path for path, linear in linears.items() if linear.decision == "high_precision"]
    assert len(chosen) == 1 and chosen[0].startswith("blocks.1.")
    kept = [linear for path, linear in linears.items() if path.startswith("blocks.0.")]
    assert len(kept) == 2 and all(linear.effect is None for linear in kept)
    packed = copy.deepcopy(model)
    assert sum(d.decision == "hif4" for d in tahf4.quantize_(packed, recipe)) == 1
    calls = calibration.kept.calls[""]
    found = [relative(packed(*args), model(*args)) ** 2 for args, _ in calls]
    assert [error.error for error in recipe.errors[""]] == pytest.approx(found, rel=1e-2)


class Dropping(Stack):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.3, self.training)


@torch.no_grad()
def test_dropout_in_training_mode_is_no_error():
    torch.manual_seed(0)
    model = Dropping(2)
    recipes = [calibrated(model.train(training)).recipe(mask="max") for training in (False, True)]
    quiet, dropping = ([error.error for error in recipe.errors[""]] for recipe in recipes)
    assert dropping == pytest.approx(quiet, rel=0.2)
    calibration, found = calibrated(model.train()), []
    for seed in range(2):
        state = torch.manual_seed(seed).get_state()
        found.append([error.error for error in calibration.recipe(mask="max").errors[""]])
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
