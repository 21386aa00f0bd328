"""Steps are counted at the scheduler, and a compiled model switches by them without compiling again."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from helpers import relative
from models import Stack

import tahf4_compiler as tahf4
from tahf4_compiler.steps import StepCounter, StepPrecision

SCHEDULERS = [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchEulerDiscreteScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_steps_are_counted(scheduler, tmp_path):
    scheduler = copy.deepcopy(scheduler)
    counter = StepCounter.of(scheduler)
    assert StepCounter.of(scheduler) is counter
    groups = []
    for steps in (4, 8):
        scheduler.set_timesteps(steps)
        sample = torch.randn(1, 4, 8, 8)
        for i, t in enumerate(scheduler.timesteps):
            assert (counter.step, counter.steps) == (i, steps)
            groups.append(counter.group(2))
            sample = scheduler.step(torch.randn_like(sample), t, sample, return_dict=False)[0]
    assert groups == [0, 0, 1, 1] + [0] * 4 + [1] * 4
    scheduler.save_pretrained(tmp_path)
    original = type(scheduler).__mro__[1]
    assert isinstance(scheduler, original)
    assert original.from_pretrained(tmp_path).config["_class_name"] == original.__name__


def test_a_copy_counts_for_itself():
    scheduler = FlowMatchEulerDiscreteScheduler()
    counter = StepCounter.of(scheduler)
    other = copy.deepcopy(scheduler)
    other.set_timesteps(7)
    assert counter.steps == 1
    assert StepCounter.of(other).steps == 7


def test_steps_from_the_end():
    counter = StepCounter()
    counter.steps = 5
    precision = StepPrecision(counter, (0, -1))
    found = []
    for counter.step in range(5):
        found.append(precision.high())
    assert found == [True, False, False, False, True]


def test_a_compiled_model_switches_without_compiling_again(tmp_path):
    model, x = Stack().eval(), torch.randn(8, 64)
    scheduler = FlowMatchEulerDiscreteScheduler()
    with torch.no_grad():
        wanted = model(x)
        with tahf4.calibrate(model, options={"inductor": False}) as calibration:
            model(x)
        recipe = calibration.recipe(mask="max", sensitivity=False, high_precision_steps=(0, -1))
        with pytest.raises(tahf4.RecipeError, match="scheduler"):
            tahf4.apply_recipe(model, recipe)
        tahf4.apply_recipe(model, recipe, scheduler=scheduler)
        compiled = torch.compile(model, backend="tahf4", options={"inductor": False, "dump_dir": str(tmp_path)})
        for _ in range(2):
            scheduler.set_timesteps(4)
            errors = []
            for t in scheduler.timesteps:
                errors.append(relative(compiled(x), wanted))
                scheduler.step(x, t, x)
            assert max(errors[0], errors[3]) < 1e-6
            assert min(errors[1:3]) > 1e-3
    assert len(list(tmp_path.iterdir())) == 2, "one graph in high precision, one in 4 bits"
