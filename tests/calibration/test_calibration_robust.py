"""Calibrations in the hands of users: interruptions, other models, many shapes, functional linears, damaged files."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from models import Stack, encoder
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.calibration import Calibration
from tahf4_compiler.calibration.calls import MOST
from tahf4_compiler.calibration.masks import channel_mask
from tahf4_compiler.calibration.sensitivity import Network
from tahf4_compiler.calibration.sketch import Sketch

GRAPH = {"inductor": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Pipe:
    """A pipeline of one model, that calls it once for each of a number of steps."""

    def __init__(self, model=None):
        self.transformer, self.fail = model or Stack().eval(), False

    def __call__(self, prompt, generator=None, steps=2):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(len(prompt)))
        for i in range(steps):
            self.transformer(x + i)
            if self.fail:
                raise KeyboardInterrupt


def rows(calibration):
    return calibration.sketch("blocks.0.up").rows


def test_the_rank_of_a_percentile_is_exact():
    for n in (1000, 2000, 5000, 10000):
        x = torch.ones(n, 1)
        x[-1] = 1000.0
        sketch = Sketch(1)
        sketch.update(x)
        assert sketch.percentile(99.9).item() < 2
        assert sketch.percentile(100).item() == 1000


def test_a_hook_that_comes_in_the_middle_of_a_calibration_is_run():
    model, x, seen = Stack(depth=1).eval(), torch.randn(8, 64), []
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        for factor in (1, 10):
            with of_one_module(model, factor) if factor > 1 else contextlib.nullcontext():
                model(x)
            seen.append(calibration.sketch("blocks.0.up").percentile(100))
    assert torch.allclose(seen[1], 10 * seen[0], rtol=1e-3)


def of_one_module(model, factor):
    return model.blocks[0].up.register_forward_pre_hook(lambda module, args: (args[0] * factor,))


def before_all_modules(model, factor):
    def hook(module, args):
        return (args[0] * factor,) if module is model.blocks[0].up else None

    return nn.modules.module.register_module_forward_pre_hook(hook)


def behind_all_modules(model, factor):
    def hook(module, args, out):
        return out * factor if module is model.blocks[0].norm else None

    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize("hooked", [of_one_module, before_all_modules, behind_all_modules])
def test_hooks_that_come_and_go_between_calibrations_are_run_however_often(hooked):
    model, x, seen = Stack(depth=1).eval(), torch.randn(8, 64), {}
    with torch._dynamo.config.patch(recompile_limit=1):
        for factor in (None, 2, None, 4):
            handle = hooked(model, factor) if factor else contextlib.nullcontext()
            with handle, tahf4.calibrate(model, options=GRAPH) as calibration:
                model(x)
            found = calibration.sketch("blocks.0.up").percentile(100)
            assert torch.allclose(found, seen.setdefault(None, found) * (factor or 1), rtol=1e-3)


def test_a_prompt_that_was_interrupted_counts_once(tmp_path):
    pipe = Pipe()
    path = tmp_path / "c"
    pipe.fail = True
    with pytest.raises(KeyboardInterrupt), tahf4.calibrate(pipe, checkpoint=path, options=GRAPH) as calibration:
        calibration.run(["a", "bb"])
    assert not path.exists()
    pipe.fail = False
    with tahf4.calibrate(pipe, checkpoint=path, options=GRAPH) as calibration:
        calibration.run(["a", "bb"])
    assert rows(calibration) == 2 * 2 * 8


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    pipe, path = Pipe(), tmp_path / "c"
    with tahf4.calibrate(pipe, checkpoint=path, options=GRAPH) as calibration:
        calibration.run(["a", "bb"], steps=2)
    for prompts, steps, message in ((["ccc"], 2, "has seen 2 prompts"), (["a", "bb"], 3, "was made with steps=2")):
        with (
            pytest.raises(tahf4.CalibrationError, match=message),
            tahf4.calibrate(pipe, checkpoint=path, options=GRAPH) as calibration,
        ):
            calibration.run(prompts, steps=steps)
    with tahf4.calibrate(pipe, checkpoint=path, options=GRAPH) as calibration:
        calibration.run(["a", "bb", "ccc"], steps=2)
    assert rows(calibration) == 3 * 2 * 8


def test_calls_of_ones_own_are_kept_too(tmp_path):
    pipe, path = Pipe(), tmp_path / "c"
    with tahf4.calibrate(pipe, checkpoint=path, options=GRAPH) as calibration:
        calibration.run(["a"])
        pipe("bb")
    with tahf4.calibrate(pipe, checkpoint=path, options=GRAPH) as again:
        again.run(["a"])
    assert rows(again) == rows(calibration) == 2 * 2 * 8


def test_merging_checks_before_it_adds():
    pipe = Pipe()
    with tahf4.calibrate(pipe, options=GRAPH) as calibration:
        calibration.run(["a"])
    before = rows(calibration)
    with tahf4.calibrate(Pipe(Stack(hidden=192).eval()), options=GRAPH) as other:
        other.run(["bb"])
    with tahf4.calibrate(pipe, options=GRAPH) as same:
        same.run(["a"])
    for what, message in (
        (calibration, "with itself"),
        (other, "of another model"),
        (same, "both calibrations saw 'a'"),
    ):
        with pytest.raises(tahf4.CalibrationError, match=message):
            calibration.merge(what)
    assert rows(calibration) == before


def test_many_calibrations_in_one_process_see_everything():
    model = Stack().eval()
    shapes = [(8, 64), (2, 4, 64), (1, 2, 4, 64)]
    for _ in range(10):
        with tahf4.calibrate(model, options=GRAPH) as calibration:
            for shape in shapes:
                model(torch.randn(shape))
        assert rows(calibration) == 24


def test_a_call_that_was_not_observed_is_an_error():
    model = Stack().eval()
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(tahf4.CalibrationError, match="was not observed.*recompile limit"),
        tahf4.calibrate(model, options=GRAPH),
    ):
        for shape in ((8, 64), (2, 4, 64), (1, 2, 4, 64)):
            model(torch.randn(shape))


def test_what_torch_compile_returned_can_be_calibrated():
    model, x = Stack().eval(), torch.randn(8, 64)
    compiled = torch.compile(model, backend="tahf4", options=GRAPH)
    wanted = compiled(x)
    with tahf4.calibrate(compiled, options=GRAPH) as calibration:
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert rows(calibration) == 16
    assert torch.equal(compiled(x), wanted)
    assert calibration.recipe(max_high_precision_linears=1)


def test_pytorchs_own_encoder_can_be_calibrated():
    model, args = encoder()
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(**args)
    recipe = calibration.recipe(max_high_precision_linears=1)
    linears = recipe.linears("")
    assert set(linears) >= {f"layers.{i}.{n}" for i in range(3) for n in ("linear1", "linear2", "self_attn.out_proj")}
    effects = {path: linear.effect for path, linear in linears.items()}
    assert all(effect is not None and effect > 0 for effect in effects.values()), effects
    assert sum(linear.decision == "high_precision" for linear in linears.values()) == 1
    tahf4.apply_recipe(model, recipe)


class Functional(nn.Module):
    """Linears that are no modules' forward: functional calls, and rows of one parameter."""

    def __init__(self):
        super().__init__()
        self.up, self.both = nn.Linear(64, 64), nn.Linear(64, 128)

    def forward(self, x):
        first, second = self.both.weight.chunk(2)
        y = nn.functional.linear(x, self.up.weight, self.up.bias)
        return x + nn.functional.linear(y, first) * nn.functional.linear(x, second)


def test_effects_of_functional_linears_are_measured():
    model = nn.Sequential(Functional(), Functional()).eval()
    x = torch.randn(8, 64)
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(x)
    effects = {path: linear.effect for path, linear in calibration.recipe().linears("").items()}
    assert effects and all(effect is not None and effect > 1e-6 for effect in effects.values())


def test_blocks_that_are_compiled_on_their_own():
    model = Stack().eval()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(8, 64))
    recipe = calibration.recipe(max_high_precision_linears=1)
    assert all(linear.effect and linear.effect > 0 for linear in recipe.linears("").values())
    tahf4.apply_recipe(model, recipe)


def test_forwards_that_somebody_replaced_stay():
    model, calls = Stack().eval(), []
    linear = model.blocks[0].up
    plain = linear.forward
    linear.forward = lambda x: calls.append(1) or plain(x)
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(8, 64))
    calibration.recipe(mask="max")
    before = len(calls)
    model(torch.randn(8, 64))
    assert len(calls) == before + 1


def test_kept_calls_are_spread_over_everything():
    model = Stack().eval()
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        for i in range(50):
            for branch in ("cond", "uncond"):
                with calibration.at(branch=branch):
                    model(torch.full((1, 64), float(i)))
    places = sorted(int(args[0][0, 0]) for args, _ in calibration.kept.calls[""])
    assert len(places) <= MOST
    assert places[0] == 0 and max(places) >= 32
    assert max(b - a for a, b in zip(places, places[1:])) <= 16


def test_dead_columns_do_not_move_the_mask():
    weight_max = torch.zeros(64)
    weight_max[:8] = torch.rand(8) + 0.5
    largest = torch.rand(64) + 0.5
    mask = channel_mask(weight_max, largest, 0.9)
    torch.testing.assert_close((mask * largest)[8:], (mask * largest)[:8].min().expand(56))
    assert mask[:8].log().mean().abs() < 1e-5
    assert channel_mask(torch.zeros(4), torch.ones(4), 0.5).tolist() == [1.0] * 4


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    model = Stack().eval()
    with torch.no_grad(), tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(8, 64))
    path = tmp_path_factory.mktemp("recipe") / "r.safetensors"
    calibration.recipe(mask="max", sensitivity=False).save(path)
    return path


def test_every_changed_byte_is_noticed(recipe_file, tmp_path):
    data = bytearray(recipe_file.read_bytes())
    for place in range(8, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 4
        path = tmp_path / "changed"
        path.write_bytes(changed)
        with pytest.raises(tahf4.RecipeError):
            tahf4.Recipe.load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hadamard_block", 48, "Hadamard block is 48"),
        ("hadamard_block", "64", "Hadamard block is '64'"),
        ("hadamard_block", 128, "divides 64"),
        ("seed", None, "seed is None"),
        ("seed", -5, "seed is -5"),
        ("search", "bogus", "search is 'bogus'"),
        ("decision", "int8", "is 'int8'"),
        ("shape", [64], "does not have two sizes"),
    ],
)
def test_an_edited_header_is_refused(recipe_file, tmp_path, key, value, message):
    """Even one whose checksum was made anew."""
    from tahf4_compiler.files import tensors as files

    with safe_open(recipe_file, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["tahf4"])
    entry = next(e for e in header["entries"] if "blocks.0.up" in e["linears"])
    target = entry if key in entry else entry["linears"]["blocks.0.up"]
    target[key] = value
    del header["sha256"]
    text = json.dumps({**header, "sha256": files.digest(header, tensors)})
    save_file(tensors, tmp_path / "r", metadata={"tahf4": text})
    with pytest.raises(tahf4.RecipeError, match=message):
        tahf4.Recipe.load(tmp_path / "r")


def test_choices_of_the_wrong_type_and_places_that_cannot_be_written(recipe_file, tmp_path):
    model = Stack().eval()
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(8, 64))
    for choices, message in (
        ({"high_precision_steps": 0}, "expected a list of step indices"),
        ({"block": True}, "block is True"),
        ({"min_flops_4bit": "a"}, "min_flops_4bit is 'a'"),
        ({"max_high_precision_linears": 1, "max_high_precision_blocks": 1}, "got 2 of them"),
    ):
        with pytest.raises(tahf4.OptionError, match=message):
            calibration.recipe(mask="max", **choices)
    (tmp_path / "file").write_text("")
    with pytest.raises(tahf4.RecipeError, match="cannot write"):
        tahf4.Recipe.load(recipe_file).save(tmp_path / "file" / "r.safetensors")


def test_a_recipe_that_was_stopped_takes_up_its_measurements(tmp_path, monkeypatch, caplog):
    model = Stack(2).eval()

    def calibrated():
        with tahf4.calibrate(model, checkpoint=tmp_path / "c", options=GRAPH) as calibration:
            for seed in range(3):
                model(torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)))
        return calibration

    class Stop(Exception):
        pass

    counted, errors = [], Network.errors

    def watched(self, quantized):
        counted.append(set(quantized))
        if len(counted) == stop_at:
            raise Stop
        return errors(self, quantized)

    monkeypatch.setattr(Network, "errors", watched)
    stop_at = 11  # 7 masks, no mask, then linears one by one
    with pytest.raises(Stop):
        calibrated().recipe()
    kept = tmp_path / "c.measured"
    assert len(json.loads(kept.read_text())["values"]) == 10
    stop_at, before = 0, len(counted)
    taken_up = Calibration(model, checkpoint=tmp_path / "c", options=GRAPH).recipe()
    assert [len(paths) for paths in counted[before:]] == [1, 1, 4], "two linears were left, then all together"
    kept.unlink()
    whole = Calibration(model, checkpoint=tmp_path / "c", options=GRAPH).recipe()
    assert len(counted) == before + 3 + 8 + 4 + 1
    for recipe, name in ((taken_up, "a"), (whole, "b")):
        recipe.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    # other statistics, other choices, a damaged file: nothing is taken from it
    before = len(counted)
    Calibration(model, checkpoint=tmp_path / "c", options=GRAPH).recipe(mask="max")
    assert len(counted) == before + 4 + 1
    before = len(counted)
    kept.write_text(kept.read_text()[:-20])
    Calibration(model, checkpoint=tmp_path / "c", options=GRAPH).recipe(mask="max")
    assert len(counted) == before + 4 + 1
    assert "measured again" in caplog.text
    kept.unlink()
    Calibration(model, checkpoint=tmp_path / "c", options=GRAPH).recipe(mask="max")
    model.blocks[0].norm.weight.data[3] += 1  # of no linear, but the output depends on it
    before = len(counted)
    Calibration(model, checkpoint=tmp_path / "c", options=GRAPH).recipe(mask="max")
    assert len(counted) == before + 4 + 1
    model.blocks[0].up.weight.data[0, 0] += 1
    before = len(counted)
    with tahf4.calibrate(model, checkpoint=tmp_path / "d", options=GRAPH) as other:
        model(torch.randn(16, 64))
    (tmp_path / "d.measured").write_text(kept.read_text())
    other.recipe(mask="max")
    assert len(counted) == before + 4 + 1


def test_measurements_are_kept_nowhere_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Stack(2).eval()
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        model(torch.randn(16, 64))
    calibration.recipe(mask="max")
    assert list(tmp_path.iterdir()) == []
