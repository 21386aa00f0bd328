"""Packed models switch the bits of their activations by the denoising step, and compile nothing again."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from helpers import relative
from models import Stack, masked_recipe, wan
from tahf4_compiler.tools.generation import load_pipeline
from tahf4_compiler.tools.inspection.sources import loaded
from tahf4_compiler.tools.tiny_wan import settings

import tahf4_compiler as tahf4
from tahf4_compiler.packed.steps import steps_of

FAST = {"inductor": False}


@pytest.fixture(autouse=True)
def _no_grad():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Pipe:
    """As much of a pipeline as counting needs."""

    def __init__(self, transformer=None):
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.transformer = transformer if transformer is not None else make()


def make():
    torch.manual_seed(0)
    return Stack().eval()


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def outputs(model, bits=(4, 8, 16), call=lambda model: model(X)):
    """Return the output of a packed model for each number of bits."""
    model, found = copy.deepcopy(model), {}
    tahf4.set_high_precision_steps(model, ())
    for count in bits:
        tahf4.set_activation_bits(model, count)
        found[count] = call(model)
    return found


def pattern(scheduler, model, wanted, steps=4, call=lambda model: model(X)):
    """Return how many bits the activations had in each step."""
    scheduler.set_timesteps(steps)
    found = []
    for t in scheduler.timesteps:
        y = call(model)
        found += [next((bits for bits, out in wanted.items() if relative(y, out) < 1e-5), None)]
        scheduler.step(torch.zeros(1), t, torch.zeros(1))
    return found


def recipe(model, **values):
    with tahf4.calibrate(model, options=FAST) as calibration:
        (model.transformer if isinstance(model, Pipe) else model)(X)
    return calibration.recipe(mask="max", scale_search="", sensitivity=False, **values)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_recipe_of_a_pipeline_switches_its_packed_model(bits):
    pipe = Pipe()
    tahf4.quantize_(pipe, recipe(pipe, high_precision_steps=(0, -1), step_activation_bits=bits))
    wanted, high = outputs(pipe.transformer), bits or 16
    assert pattern(pipe.scheduler, pipe.transformer, wanted) == [high, 4, 4, high]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert pattern(pipe.scheduler, pipe.transformer, wanted, 3) == [high, 4, high]
    assert "packed; activations of" in str(steps_of_plan(pipe.transformer)[0].reason)


def steps_of_plan(model):
    return [d for d in tahf4.lower(tahf4.capture(model, (X,))).plan if d.decision == "hif4"]


@pytest.mark.parametrize("how", ["whole", "wrapped", "by blocks"])
def test_a_compiled_model_has_one_graph_a_choice_and_copies_nothing(how, tmp_path):
    pipe = Pipe()
    tahf4.quantize_(pipe)
    model, options = pipe.transformer, {**FAST, "dump_dir": str(tmp_path)}
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    wanted = outputs(model)
    if how == "by blocks":
        for block in model.blocks:
            block.compile(backend="tahf4", options=options)
    elif how == "whole":
        model.compile(backend="tahf4", options=options)
    else:
        pipe.transformer = model = torch.compile(model, backend="tahf4", options=options)
    tahf4.set_high_precision_steps(pipe, [1])
    for _ in range(2):
        assert pattern(pipe.scheduler, model, wanted) == [4, 16, 4, 4]
    graphs = sorted(tmp_path.iterdir())
    assert len(graphs) == 2, "one with 4 bits, one with 16"
    reports = [(graph / "report.txt").read_text() for graph in graphs]
    assert "16-bit activation" not in reports[0] and "this step has activations of 16 bits" in reports[1]
    assert {name.replace("_orig_mod.", ""): value.data_ptr() for name, value in model.state_dict().items()} == state
    tahf4.set_high_precision_steps(pipe, [2], bits=8)
    assert pattern(pipe.scheduler, model, wanted) == [4, 4, 8, 4]
    tahf4.set_high_precision_steps(pipe, ())
    assert pattern(pipe.scheduler, model, wanted) == [4, 4, 4, 4]


def test_the_option_of_a_compilation_and_the_model_itself_may_say_more_bits_than_the_steps():
    pipe = Pipe()
    tahf4.quantize_(pipe)
    wanted = outputs(pipe.transformer)
    tahf4.set_activation_bits(pipe, 16)
    tahf4.set_high_precision_steps(pipe, [0], bits=8)
    assert pattern(pipe.scheduler, pipe.transformer, wanted, 2) == [16, 16]
    compiled = torch.compile(pipe.transformer, backend="tahf4", options={**FAST, "activation_bits": 4})
    assert pattern(pipe.scheduler, compiled, wanted, 2) == [8, 4]


def test_what_was_applied_to_the_original_goes_over_to_the_packed_model():
    pipe = Pipe()
    tahf4.apply_recipe(pipe, recipe(pipe, high_precision_steps=(1,)))
    tahf4.quantize_(pipe)
    wanted = outputs(pipe.transformer)
    assert pattern(pipe.scheduler, pipe.transformer, wanted) == [4, 16, 4, 4]
    tahf4.dequantize_(pipe)
    assert relative(pipe.transformer(X), wanted[16]) < 1e-5
    pipe.scheduler.set_timesteps(4)
    assert relative(pipe.transformer(X), wanted[16]) < 1e-5


def test_steps_that_were_taken_off_do_not_come_back_when_nothing_is_left_to_pack():
    pipe = Pipe()
    tahf4.apply_recipe(pipe, recipe(pipe, high_precision_steps=(0,)))
    tahf4.quantize_(pipe, keep=["0.up"])  # to which the recipe stays attached
    assert steps_of(pipe.transformer).steps == (0,)
    tahf4.set_high_precision_steps(pipe, [])
    tahf4.quantize_(pipe)
    assert steps_of(pipe.transformer) is None


def test_copies_count_for_themselves_and_what_nobody_counts_says_what_to_do():
    pipe = Pipe()
    tahf4.quantize_(pipe)
    wanted = outputs(pipe.transformer)
    tahf4.set_high_precision_steps(pipe, [0], bits=8)
    other = copy.deepcopy(pipe)
    other.scheduler.set_timesteps(4)
    other.scheduler.step(torch.zeros(1), other.scheduler.timesteps[0], torch.zeros(1))
    assert relative(other.transformer(X), wanted[4]) < 1e-5 and relative(pipe.transformer(X), wanted[8]) < 1e-5
    other.scheduler.set_timesteps(4)
    assert relative(other.transformer(X), wanted[8]) < 1e-5
    alone = copy.deepcopy(pipe.transformer)  # nobody has called it
    assert steps_of(alone).steps == (0,)
    tahf4.set_high_precision_steps(alone, scheduler=other.scheduler)
    again = pickle.loads(pickle.dumps(pipe.transformer))
    transformer = pipe.transformer
    del pipe
    gc.collect()
    for model in (transformer, again, torch.compile(again, backend="tahf4", options=FAST)):
        with pytest.raises(Exception, match=r"cannot be counted.*set_high_precision_steps\(pipe\)"):
            model(X)
    scheduler = FlowMatchEulerDiscreteScheduler()
    tahf4.set_high_precision_steps(again, scheduler=scheduler)
    assert pattern(scheduler, again, wanted) == [8, 4, 4, 4]
    tahf4.apply_recipe(transformer, None)
    assert relative(transformer(X), wanted[4]) < 1e-5


def test_another_compiler_and_a_trace_say_that_they_cannot_know_the_step():
    pipe = Pipe()
    tahf4.quantize_(pipe)
    model = pipe.transformer
    wanted = outputs(model)
    tahf4.set_high_precision_steps(pipe, [0])
    program = torch.export.export(model, (X,)).module()
    for other in (torch.compile(model, backend="aot_eager"), program, torch.fx.symbolic_trace(model)):
        with pytest.raises(tahf4.PackedError, match="something else than the backend 'tahf4'"):
            other(X)
    tahf4.set_high_precision_steps(pipe, ())
    assert relative(torch.compile(model, backend="aot_eager")(X), wanted[4]) < 1e-5


def test_a_folder_keeps_the_steps_and_waits_for_the_pipeline(tmp_path):
    model, inputs = wan()
    model.requires_grad_(False)
    pipe = Pipe(model)
    made = dataclasses.replace(masked_recipe(model), high_precision_steps=(0, -1), step_activation_bits=8)
    tahf4.quantize_(model, made)
    with pytest.raises(tahf4.RecipeError, match="cannot be counted"):
        model(**inputs)
    tahf4.set_high_precision_steps(pipe)

    def call(model):
        return model(**inputs)[0]

    wanted = outputs(model, call=call)
    assert pattern(pipe.scheduler, model, wanted, call=call) == [8, 4, 4, 8]
    model.save_pretrained(tmp_path / "a")
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert said["high_precision_steps"] == [0, -1] and said["step_activation_bits"] == 8
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "a")
    with pytest.raises(tahf4.RecipeError, match=r"set_high_precision_steps\(pipe\)"):
        call(loaded)
    pipe = Pipe(loaded)
    tahf4.set_high_precision_steps(pipe)
    assert pattern(pipe.scheduler, loaded, wanted, call=call) == [8, 4, 4, 8]
    tahf4.set_high_precision_steps(pipe, ())
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(call(WanTransformer3DModel.from_pretrained(tmp_path / "b")), call(loaded))


def test_a_model_that_is_packed_while_it_loads_has_the_steps_of_its_recipe(tmp_path):
    model, inputs = wan()
    model.save_pretrained(tmp_path)
    made = dataclasses.replace(masked_recipe(model), high_precision_steps=(0,))
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=tahf4.TaHF4Config(made))
    pipe = Pipe(loaded)
    tahf4.set_high_precision_steps(pipe)
    call = lambda model: model(**inputs)[0]  # noqa: E731
    assert pattern(pipe.scheduler, loaded, outputs(loaded, call=call), 2, call=call) == [16, 4]


def test_a_plain_model_may_keep_its_weights_in_4_bits_in_these_steps(tmp_path):
    pipe = Pipe()
    made = recipe(pipe, high_precision_steps=(0,), step_activation_bits=8)
    made.save(tmp_path / "r.safetensors")
    again = tahf4.Recipe.load(tmp_path / "r.safetensors")
    assert again.step_activation_bits == 8 and again.high_precision_steps == (0,)
    packed = copy.deepcopy(pipe.transformer)
    tahf4.quantize_(packed, dataclasses.replace(again, high_precision_steps=()))
    tahf4.apply_recipe(pipe, again)
    options = {**FAST, "dump_dir": str(tmp_path / "dump")}
    compiled = torch.compile(pipe.transformer, backend="tahf4", options=options)
    assert pattern(pipe.scheduler, compiled, outputs(packed)) == [8, 4, 4, 4]
    first, second = sorted((tmp_path / "dump").iterdir())
    assert "int8 activation" in (first / "report.txt").read_text()
    assert "int8 activation" not in (second / "report.txt").read_text()


@pytest.mark.parametrize(
    "steps, extra, error, words",
    [
        ([0.5], {}, tahf4.OptionError, "list of step indices"),
        ("0", {}, tahf4.OptionError, "list of step indices"),
        ([0], {"bits": 4}, tahf4.OptionError, "expected 8 "),
        ([0], {"bits": True}, tahf4.OptionError, "expected 8 "),
        (None, {}, tahf4.PackedError, "neither a recipe nor its folder"),
    ],
)
def test_other_steps_are_refused(steps, extra, error, words):
    pipe = Pipe()
    with pytest.raises(tahf4.PackedError, match="holds no packed linear"):
        tahf4.set_high_precision_steps(pipe, [0])
    tahf4.quantize_(pipe)
    with pytest.raises(error, match=words):
        tahf4.set_high_precision_steps(pipe, steps, **extra)
    with pytest.raises(tahf4.OptionError, match="pass scheduler"):
        tahf4.set_high_precision_steps(pipe.transformer, [0])


def test_damaged_files_are_refused(tmp_path):
    for wrong in ({"high_precision_steps": [0.5]}, {"high_precision_steps": [0], "step_activation_bits": 4}):
        with pytest.raises(tahf4.RecipeError, match="damaged"):
            tahf4.TaHF4Config(**wrong)
    made = recipe(make())
    dataclasses.replace(made, high_precision_steps=(0,), step_activation_bits=7).save(tmp_path / "r")
    with pytest.raises(tahf4.RecipeError, match="with activations of 7 bits"):
        tahf4.Recipe.load(tmp_path / "r")
    with pytest.raises(tahf4.OptionError, match="step_activation_bits"):
        recipe(make(), step_activation_bits=4)


def test_the_commands_take_a_folder_with_steps(tmp_path):
    pipe = load_pipeline(settings.PIPELINE_DIR, torch.float32, "cpu")
    tahf4.quantize_(pipe)
    tahf4.set_high_precision_steps(pipe, [0], bits=8)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, torch.float32, "cpu")
    again.set_progress_bar_config(disable=True)
    again("a circle", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="latent")
    assert [steps_of(e).steps for e in (again.transformer, again.transformer_2)] == [(0,), (0,)]
    model, arguments = loaded(tmp_path / "transformer", torch.float32, None)
    plan = tahf4.lower(tahf4.capture(model, (), arguments)).plan
    assert {d.activation_bits for d in plan} == {4}


def test_a_generation_that_begins_in_the_middle_has_its_own_steps_in_high_precision():
    pipe = Pipe()
    tahf4.quantize_(pipe)
    wanted, scheduler = outputs(pipe.transformer), pipe.scheduler
    for steps, bits in (([0], [4, 4]), ([2], [16, 4]), ([-1], [4, 16])):
        tahf4.set_high_precision_steps(pipe, steps)
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)  # as image-to-image pipelines do
        for timestep, count in zip(scheduler.timesteps[2:], bits, strict=True):
            assert relative(pipe.transformer(X), wanted[count]) < 1e-6
            scheduler.step(X, timestep, X)


@pytest.mark.parametrize(
    "values",
    [{"steps": (i for i in (0,))}, {"steps": 0}, {"steps": b"0"}, {"bits": 8.0}, {"scheduler": "x"},
     {"scheduler": FlowMatchEulerDiscreteScheduler}],
)  # fmt: skip
def test_what_are_no_steps_no_bits_and_no_scheduler_is_refused(values):
    pipe = Pipe()
    tahf4.quantize_(pipe)
    with pytest.raises(tahf4.OptionError, match=f"{next(iter(values))} is .*expected"):
        tahf4.set_high_precision_steps(pipe, **{"steps": [0], **values})
    assert steps_of(pipe.transformer) is None


class Plain:
    """A scheduler that Dynamo traces without a break."""

    def set_timesteps(self, steps):
        self.timesteps = list(range(steps))

    def step(self, output, timestep, sample):
        return sample - 0.1 * output


@pytest.mark.parametrize(
    ("packed", "inductor"),
    [
        *((False, False), (True, False)),
        *(pytest.param(*it, marks=pytest.mark.slow) for it in ((False, True), (True, True))),
    ],
)
def test_a_compiled_loop_over_the_steps_has_them_too(packed, inductor):
    pipe, clock = Pipe(), Plain()
    if packed:
        tahf4.quantize_(pipe)
        tahf4.set_high_precision_steps(pipe, [0], scheduler=clock)
    else:
        with tahf4.calibrate(pipe.transformer, options=FAST) as calibration:
            pipe.transformer(X)
        recipe = calibration.recipe(mask=None, scale_search="", sensitivity=False, high_precision_steps=(0,))
        tahf4.apply_recipe(pipe.transformer, recipe, scheduler=clock)

    def loop(model, x):
        clock.set_timesteps(3)
        for timestep in clock.timesteps:
            x = clock.step(model(x), timestep, x)
        return x

    each = torch.compile(pipe.transformer, backend="tahf4", options={"inductor": inductor})
    want = loop(each, X)
    torch._dynamo.reset()
    found = torch.compile(loop, backend="tahf4", options={"inductor": inductor})(pipe.transformer, X)
    assert relative(found, want) < 1e-5
    if packed:
        tahf4.set_high_precision_steps(pipe, (), scheduler=clock)
    else:
        tahf4.apply_recipe(pipe.transformer, None)
    assert relative(loop(pipe.transformer, X), want) > 1e-4


def test_steps_beside_a_recipe_are_refused():
    recipe = masked_recipe(make())
    with pytest.raises(tahf4.RecipeError, match="steps beside it"):
        tahf4.TaHF4Config(recipe, high_precision_steps=[0])
