"""Steps are counted at the scheduler, and a compiled model switches by them without compiling again."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from helpers import relative
from models import Stack

import tahf4_compiler as tahf4
from tahf4_compiler.model.steps import StepCounter, StepPrecision

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
    original = type(scheduler)
    assert original is type(SCHEDULERS[0]) or original is type(SCHEDULERS[1])
    assert original.from_pretrained(tmp_path).config["_class_name"] == original.__name__


def test_a_copy_counts_for_itself():
    scheduler = FlowMatchEulerDiscreteScheduler()
    counter = StepCounter.of(scheduler)
    other = copy.deepcopy(scheduler)
    other.set_timesteps(7)
    assert counter.steps == 1
    assert StepCounter.of(other).steps == 7


def test_steps_from_the_end():
    scheduler = FlowMatchEulerDiscreteScheduler()
    precision = StepPrecision(scheduler, (0, -1))
    counter = StepCounter.of(scheduler)
    counter.steps = 5
    found = []
    for counter.step in range(5):
        found.append(precision.high())
    assert found == [True, False, False, False, True]


def test_a_warning_names_steps_that_a_generation_does_not_have(caplog):
    scheduler = FlowMatchEulerDiscreteScheduler()
    experts = [StepPrecision(scheduler, steps) for steps in ((0, 7, -9), (0, 7, -9), (3, -4))]
    assert experts[0].high() and not caplog.records, "nothing was generated yet"
    for _ in range(2):
        scheduler.set_timesteps(4)
        assert [expert.high() for expert in experts] == [True, True, True]
    assert [record.getMessage() for record in caplog.records] == [
        "steps [7, -9] were to have more bits, and this generation has 4: they are without effect; expected 0 to 3, or "
        "negative numbers from the end"
    ]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_a_counted_scheduler_is_still_one_of_its_class(scheduler):
    scheduler = copy.deepcopy(scheduler)
    kind = type(scheduler)
    wanted = {name: inspect.signature(getattr(scheduler, name)) for name in ("set_timesteps", "step")}
    StepCounter.of(scheduler)
    assert type(scheduler) is kind
    assert {name: inspect.signature(getattr(scheduler, name)) for name in wanted} == wanted
    for fresh in (scheduler.from_config(scheduler.config), type(scheduler).from_config(scheduler.config)):
        fresh.set_timesteps(4)
        assert type(fresh) is kind and not StepCounter.counts(fresh)
    loaded = pickle.loads(pickle.dumps(scheduler))
    loaded.set_timesteps(6)
    assert StepCounter.of(loaded).steps == 6 and StepCounter.of(scheduler).steps == 1
    StepCounter.forget(scheduler)
    assert "step" not in scheduler.__dict__ and not StepCounter.counts(scheduler)


class Pipe:
    """As much of a pipeline as counting needs."""

    def __init__(self):
        self.scheduler, self.transformer = FlowMatchEulerDiscreteScheduler(), Stack().eval()

    def pattern(self, compiled, x, wanted, steps=4):
        self.scheduler.set_timesteps(steps)
        found = ""
        for t in self.scheduler.timesteps:
            found += "H" if relative(compiled(x), wanted) < 1e-6 else "4"
            self.scheduler.step(x, t, x)
        return found


def test_the_pipeline_may_change_its_scheduler_or_be_copied():
    pipe, x = Pipe(), torch.randn(8, 64)
    with torch.no_grad():
        wanted = pipe.transformer(x)
        with tahf4.calibrate(pipe, options={"inductor": False}) as calibration:
            pipe.transformer(x)
        assert not StepCounter.counts(pipe.scheduler), "as it was before"
        recipe = calibration.recipe(mask="max", sensitivity=False, high_precision_steps=(0,))
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        tahf4.apply_recipe(pipe, recipe)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        pipe.transformer.compile(backend="tahf4", options={"inductor": False})
        assert pipe.pattern(pipe.transformer, x, wanted) == "H444"
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
        assert pipe.pattern(pipe.transformer, x, wanted, 3) == "H44"
        other = copy.deepcopy(pipe)
        other.transformer.compile(backend="tahf4", options={"inductor": False})
        assert other.pattern(other.transformer, x, wanted) == "H444"
        assert pipe.pattern(pipe.transformer, x, wanted) == "H444"
        transformer = pipe.transformer
        del pipe, calibration
        gc.collect()
        with pytest.raises(Exception, match="the pipeline that it was applied to is gone"):
            transformer(x)
        tahf4.apply_recipe(transformer, None)
        assert relative(transformer(x), wanted) > 1e-3


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
