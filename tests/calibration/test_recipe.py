"""From a calibration to a recipe, to a file, to a model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import block_linears, plans, relative
from models import Stack, output, wan
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration import layer
from tahf4_compiler.calibration.calibration import Calibration
from tahf4_compiler.calibration.masks import SEARCHED, channel_mask
from tahf4_compiler.calibration.sensitivity import Network
from tahf4_compiler.files.memo import Measured
from tahf4_compiler.files.tensors import save_tensors
from tahf4_compiler.format import hif4
from tahf4_compiler.recipe.budget import choose
from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry
from tahf4_compiler.recipe.recipe import FORMAT, Recipe
from tahf4_compiler.weights.checksum import checksum

QUICK = {"inductor": False}
ROUNDING = {"rounding": "least_error"}  # what a recipe takes by default


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def outliers(depth: int = 3) -> Stack:
    """A stack whose norms write outliers into a few channels, which the next weight takes back."""
    torch.manual_seed(0)
    model = Stack(depth).eval()
    for i, block in enumerate(model.blocks):
        block.norm.weight[5 * i + 1] *= 64
        block.up.weight[:, 5 * i + 1] /= 64
    return model


def inputs(count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def calibrated(model: nn.Module, **arguments) -> Calibration:
    with tahf4.calibrate(model, options=QUICK, **arguments) as calibration:
        for x in inputs():
            model(x)
    return calibration


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    with torch.no_grad():
        return calibrated(outliers())


def error(model: nn.Module, recipe: Recipe | None, **options) -> float:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(99))
    wanted = model(x)
    model = copy.deepcopy(model)
    if recipe is not None:
        tahf4.apply_recipe(model, recipe)
    return relative(torch.compile(model, backend="tahf4", options={**QUICK, **options})(x), wanted)


def test_statistics_are_those_of_what_the_linears_read():
    model, seen = outliers(), {}
    calibration = calibrated(model, percentile=99)
    for path in block_linears(model):
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: seen.setdefault(path, []).append(args[0])
        )
        for x in inputs():
            model(x)
        handle.remove()
    assert {name for _, name in calibration.activations} == set(block_linears(model))
    for path, rows in seen.items():
        sketch = calibration.sketch(path)
        assert sketch.rows == 256
        assert torch.allclose(sketch.maxima, torch.cat(rows).abs().amax(0), rtol=1e-5)


def test_siblings_are_one_activation():
    model, arguments = wan()
    with tahf4.calibrate(model, options=QUICK) as calibration:
        model(**arguments)
    members = [cells.activation.members for cells in calibration.activations.values()]
    assert ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v") in members
    assert ("blocks.1.attn2.to_k", "blocks.1.attn2.to_v") in members
    assert len(members) == 14
    assert not any("proj_out" in part or "condition" in part for group in members for part in group)


def test_a_calibrated_model_is_as_it_was_before(calibration):
    model, x = outliers(), inputs()[0]
    wanted = model(x)
    model.compile(backend="tahf4", options=QUICK)
    before = model._compiled_call_impl
    with tahf4.calibrate(model, options=QUICK):
        assert relative(model(x), wanted) < 1e-6, "observing changes nothing"
    assert model._compiled_call_impl is before


def test_masks_undo_outliers(calibration):
    model = outliers()
    naive = error(model, None, **{"rotate.block": 0})
    for mask in ("max", "percentile", "layer_search", "network_search"):
        recipe = calibration.recipe(mask=mask, sensitivity=False, scale_search="", rotate=False)
        assert error(model, recipe) < 0.6 * naive, mask
    everything = calibration.recipe()
    assert error(model, everything) < 0.5 * naive


def test_the_mask_of_a_recipe_is_of_all_weights_that_read_the_activation():
    model, kwargs = wan()
    names = [f"blocks.0.attn1.to_{part}" for part in "qkv"]
    with tahf4.calibrate(model, options=QUICK) as calibration:
        model(**kwargs)
    entry = calibration.recipe(mask="max", weight_exponent=0.7, sensitivity=False).experts[""][names[0]]
    assert set(entry.linears) == set(names)
    weight = torch.cat([model.get_submodule(name).weight for name in names])
    maxima = calibration.sketch(names[0]).maxima
    torch.testing.assert_close(entry.mask, channel_mask(weight.abs().amax(0), maxima, 0.7))
    entry = calibration.recipe(mask="layer_search", sensitivity=False).experts[""][names[0]]
    norms, sketch = weight.norm(dim=0), calibration.sketch(names[0])
    size = {100.0: sketch.maxima, 99.9: sketch.percentile(99.9), None: sketch.second_moment().sqrt()}
    torch.testing.assert_close(entry.mask, channel_mask(norms, size[entry.percentile], entry.weight_exponent))
    assert (entry.percentile, entry.weight_exponent) in SEARCHED
    entry = calibration.recipe(mask="rms", weight_exponent=0.7, sensitivity=False).experts[""][names[0]]
    torch.testing.assert_close(entry.mask, channel_mask(norms, size[None], 0.7))


@pytest.mark.parametrize("search", ["", "reconstruct"])
def test_the_search_takes_the_mask_of_least_error_of_the_network_with_the_weights_that_the_recipe_holds(
    search, monkeypatch
):
    monkeypatch.setattr(layer, "_column_maxima", layer.column_norms)  # also where a mask is given
    model = outliers()
    calibration = calibrated(model, rows=0)  # the search needs no sample rows

    def kept_error(**choices):
        tahf4.apply_recipe(model, calibration.recipe(**choices, scale_search=search, sensitivity=False))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="tahf4", options=QUICK)
        calls = calibration.kept.calls[""]
        found = sum(relative(compiled(*args), model(*args)) ** 2 for args, _ in calls) / len(calls)
        tahf4.apply_recipe(model, None)
        return found

    def least(masks):
        errors = {mask: kept_error(mask=mask[0], weight_exponent=mask[1]) for mask in masks}
        return min(errors, key=errors.__getitem__), min(errors.values())

    (statistic, _), _ = least([(mask, 0.5) for mask in ("rms", "max", "percentile")])
    (_, exponent), value = least([(statistic, alpha) for alpha in (0.5, 0.6, 0.7, 0.8, 0.9)])
    assert kept_error(mask=None) > value
    percentile = {"rms": None, "max": 100.0, "percentile": 99.9}[statistic]
    for entry in calibration.recipe(scale_search=search, sensitivity=False).experts[""].values():
        assert (entry.percentile, entry.weight_exponent) == (percentile, exponent)


def test_a_mask_with_which_the_network_overflows_is_not_chosen(tmp_path, monkeypatch):
    calibration = calibrated(outliers())
    found = iter([0.6, float("nan"), float("inf"), 0.3, float("nan"), 0.4, 0.5, 0.7])
    monkeypatch.setattr(Network, "error", lambda self, quantized: next(found))
    (entry, *_) = calibration.recipe(sensitivity=False).experts[""].values()
    assert entry.mask is None and next(found, None) is None
    kept = Measured(tmp_path / "measured", lambda: "key")
    assert math.isnan(kept.value("a", lambda: math.nan)) and kept.value("b", lambda: 0.5) == 0.5
    again = Measured(tmp_path / "measured", lambda: "key")
    assert again.value("b", lambda: 1.0) == 0.5, "one that is no number does not cost the others"


def test_the_mask_is_the_published_one_of_its_statistics():
    weight, activation = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.5])
    for alpha in (0.0, 0.3, 1.0):
        found = channel_mask(weight, activation, alpha)
        wanted = weight**alpha / activation ** (1 - alpha)
        assert torch.allclose(found / found[0], wanted / wanted[0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_channel_that_the_calibration_hardly_saw_may_be_larger_later(size):
    sizes = size * torch.tensor([3.0, 2.0, 1.0, 0.0, 1e-3, 2.0])
    wanted = size * torch.tensor([3.0, 2.0, 1.0, 2.0, 2.0 / 16, 2.0])
    found = channel_mask(torch.ones(6), sizes, 0.5)
    torch.testing.assert_close(found / found[0], (wanted[0] / wanted).sqrt())
    assert torch.equal(channel_mask(torch.ones(6), torch.zeros(6), 0.5), torch.ones(6)), "nothing is known"


def test_channels_that_live_after_the_calibration_alone_cost_no_more_than_others():
    torch.manual_seed(0)
    model = Stack(2, hidden=256).eval()
    for block in model.blocks:
        block.norm = nn.Identity()
    model.first = nn.Identity()
    with tahf4.calibrate(model, options=QUICK) as calibration:
        for x in inputs():
            x[:, :4] = 0
            model(x)
    naive = error(model, None, **{"rotate.block": 0})
    assert error(model, calibration.recipe(sensitivity=False)) < 1.2 * naive


def test_what_no_weight_reads_does_not_take_the_precision_of_its_unit():
    weight, activation = torch.tensor([1.0, 4.0, 0.0, 0.0]), torch.tensor([2.0, 1.0, 100.0, 1e38])
    found = channel_mask(weight, activation, 0.7)
    torch.testing.assert_close(found[:2].log().mean(), torch.tensor(0.0))
    torch.testing.assert_close(found[2] * 100, (found * activation)[:2].min())
    assert 0 < found[3] < 1e-20
    assert torch.equal(channel_mask(torch.zeros(3), torch.ones(3), 0.7), torch.ones(3))


def test_whole_model_and_blocks_give_the_same_numbers(calibration):
    model, x = outliers(), inputs()[0]
    tahf4.apply_recipe(model, calibration.recipe(sensitivity=False))
    whole = torch.compile(model, backend="tahf4", options=QUICK)(x)
    lowered = tahf4.lower(tahf4.capture(model, (x,)))(x)
    for block in model.blocks:
        block.compile(backend="tahf4", options=QUICK)
    assert relative(model(x), whole) < 1e-6
    assert relative(lowered, whole) < 1e-6


def test_a_recipe_is_the_same_file_every_time_and_comes_back(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        calibrated(outliers()).recipe(max_high_precision_linears=1, scale_search="weighted").save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    loaded = Recipe.load(paths[0])
    loaded.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == paths[0].read_bytes()
    model = outliers()
    assert error(model, loaded) < error(model, None)
    assert not list(tmp_path.glob(".*"))


def test_a_recipe_of_real_size_is_small(tmp_path):
    """One expert of Wan2.2 A14B: 40 blocks, 400 linears, no weights needed."""
    dim, ffn = 5120, 13824
    groups = {
        "attn1.to_q": (dim, ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        "attn1.to_out.0": (dim, ("attn1.to_out.0",)),
        "attn2.to_q": (dim, ("attn2.to_q",)),
        "attn2.to_k": (dim, ("attn2.to_k", "attn2.to_v")),
        "attn2.to_out.0": (dim, ("attn2.to_out.0",)),
        "ffn.net.0.proj": (dim, ("ffn.net.0.proj",)),
        "ffn.net.2": (ffn, ("ffn.net.2",)),
    }
    entries = {}
    for i in range(40):
        for name, (k, members) in groups.items():
            linears = {
                f"blocks.{i}.{m}": LinearEntry(
                    (ffn if "net.0" in m else dim, k), -(2**62) - i, reason="recipe: effect on the output 1.23e-04, "
                    "SQNR 21.1 dB", sqnr_db=21.123, effect=1.2345e-4, flops=10**15,
                )
                for m in members
            }
            mask, moment = torch.rand(k) + 0.5, torch.rand(k).bfloat16()
            entries[f"blocks.{i}.{name}"] = RecipeEntry(linears, 64, 2**62, "weighted", 99.9, 0.5, mask, moment)
    Recipe({"transformer": entries}).save(tmp_path / "recipe")
    size = (tmp_path / "recipe").stat().st_size
    assert size <= 12e6, size
    with torch.device("meta"):
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(num_layers=40, ffn_dim=ffn)
    tahf4.apply_recipe(model, Recipe.load(tmp_path / "recipe"))


def test_a_recipe_for_other_weights_names_the_first_three(calibration):
    recipe = calibration.recipe(sensitivity=False, mask="max")
    torch.manual_seed(1)
    with pytest.raises(tahf4.RecipeError, match=r"in 6 linears: blocks\.0\.down: other weights") as caught:
        tahf4.apply_recipe(Stack().eval(), recipe)
    assert str(caught.value).count("other weights than") == 3
    tahf4.apply_recipe(Stack().eval(), recipe, check_weights=False)
    with pytest.raises(tahf4.RecipeError, match="shape"):
        tahf4.apply_recipe(Stack(hidden=192).eval(), recipe)
    with pytest.raises(tahf4.RecipeError, match=r"blocks\.2\.\w+: no such linear"):
        tahf4.apply_recipe(Stack(depth=2).eval(), recipe, check_weights=False)
    with pytest.raises(tahf4.RecipeError, match="not 'transformer'"):
        tahf4.apply_recipe(outliers(), recipe, expert="transformer")


def test_nothing_is_attached_when_a_recipe_does_not_fit(calibration):
    model, x = Stack(depth=2).eval(), inputs()[0]
    wanted = torch.compile(model, backend="tahf4", options=QUICK)(x)
    with pytest.raises(tahf4.RecipeError):
        tahf4.apply_recipe(model, calibration.recipe(sensitivity=False, mask="max"))
    assert torch.equal(torch.compile(model, backend="tahf4", options=QUICK)(x), wanted)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content):
    path = tmp_path / "recipe"
    path.write_bytes(content)
    with pytest.raises(tahf4.RecipeError, match="recipe"):
        Recipe.load(path)
    with pytest.raises(tahf4.RecipeError, match="there is no file"):
        Recipe.load(tmp_path / "missing")


def test_effects_are_those_of_one_quantized_linear_and_decide(tmp_path):
    model = outliers()
    calibration = calibrated(model)
    recipe = calibration.recipe(mask=None, scale_search="", max_high_precision_linears=2)
    linears = recipe.linears("")
    for path in ("blocks.0.up", "blocks.1.down"):
        others = [f"^{other}$" for other in block_linears(model) if other != path]
        errors = []
        for args, kwargs in calibration.kept.calls[""]:
            torch._dynamo.reset()
            only = torch.compile(model, backend="tahf4", options={**QUICK, **ROUNDING, "keep": others})
            few = [value[:16] for value in args]
            errors.append(relative(only(*few, **kwargs), model(*few, **kwargs)) ** 2)
        assert linears[path].effect == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    kept = {p for p, linear in linears.items() if linear.decision == "high_precision"}
    assert kept == set(sorted(linears, key=lambda p: -linears[p].effect)[:2])
    tahf4.apply_recipe(model, recipe)
    torch._dynamo.reset()
    torch.compile(model, backend="tahf4", options={**QUICK, "dump_dir": str(tmp_path)})(inputs()[0])
    for entry in plans(tmp_path)[0]:
        if entry["module"] in linears:
            assert entry["decision"] == linears[entry["module"]].decision
            assert f"of 6), SQNR {linears[entry['module']].sqnr_db:.1f} dB" in entry["reason"]
            assert ("budget max_high_precision_linears=2" in entry["reason"]) == (entry["module"] in kept)


def test_errors_are_kept_apart_along_the_steps(tmp_path):
    model = outliers()
    spiky = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    spiky[:, 7] *= 200
    with tahf4.calibrate(model, options=QUICK, step_groups=3) as calibration:
        for group, x in ((0, inputs()[0]), (2, spiky)):
            with calibration.at(step_group=group, branch="cond"):
                model(x)
    recipe = calibration.recipe(mask=None, rotate=False, scale_search="")
    for path, linear in recipe.linears("").items():
        first, none, last = linear.step_sqnr_db
        assert none is None
        linears = dict(model.named_modules())
        rows = [calibration.activations[("", path)].cells[(group, "cond")][1].rows for group in (0, 2)]
        weight = linears[path].weight
        for value, x in zip((first, last), rows, strict=True):
            left, right = (hif4.dequantize(hif4.quantize(v, **ROUNDING)) for v in (x, weight))
            product = left @ right.T
            wanted = -20 * torch.log10(torch.tensor(relative(product, x @ weight.T))).item()
            assert value == pytest.approx(wanted, abs=0.01)
        assert min(first, last) - 0.01 <= linear.sqnr_db <= max(first, last) + 0.01

    compiled = torch.compile(model, backend="tahf4", options={**QUICK, **ROUNDING, "rotate.block": 0})
    places = [(e.step, e.steps, e.branch) for e in recipe.errors[""]]
    assert places == [(0, 3, "cond"), (2, 3, "cond")]
    for found, x in zip(recipe.errors[""], (inputs()[0], spiky), strict=True):
        assert found.error == pytest.approx(relative(compiled(x), model(x)) ** 2, rel=1e-3)

    recipe.save(tmp_path / "recipe")
    again = Recipe.load(tmp_path / "recipe")
    assert again.errors == recipe.errors
    assert again.linears("") == recipe.linears("")
    assert recipe.plan(max_high_precision_linears=1).errors == {}, "they are those of another plan"
    kept = calibration.recipe(mask=None, rotate=False, scale_search="", max_high_precision_linears=6)
    assert [e.error for e in kept.errors[""]] == [0.0, 0.0]
    assert calibration.recipe(mask=None, sensitivity=False).errors == {}


@pytest.mark.parametrize("wrong", [{"error": "x"}, {"error": None}, {"step": 3}, {"steps": 0}, {"branch_": ""}])
def test_damaged_errors_are_refused(tmp_path, wrong):
    entry = {"step": 0, "steps": 2, "branch": "", "error": 0.1, **wrong}
    header = {"entries": [], "high_precision_steps": [], "provenance": {}, "errors": {"": [entry]}}
    save_tensors(tmp_path / "recipe", {}, FORMAT, header, tahf4.RecipeError)
    with pytest.raises(tahf4.RecipeError, match="damaged"):
        Recipe.load(tmp_path / "recipe")


WRONG = [
    ({"hadamard_block": 48, "seed": 1}, "the Hadamard block is 48, expected a power of two that divides 64"),
    ({"hadamard_block": 128, "seed": 1}, "the Hadamard block is 128, expected a power of two that divides 64"),
    ({"hadamard_block": 64}, "the seed is None with a Hadamard block of 64"),
    ({"mask": torch.zeros(64)}, "not positive and finite"),
    ({"mask": torch.ones(63)}, "do not fit each other"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_recipe_by_hand_whose_parts_do_not_fit_is_refused(values, message):
    model = Stack()
    linear = LinearEntry((128, 64), int(checksum(model.blocks[0].up.weight)))
    recipe = Recipe({"": {"first": RecipeEntry({"blocks.0.up": linear}, **values)}})
    for use in (tahf4.apply_recipe, tahf4.quantize_):
        with pytest.raises(tahf4.RecipeError, match=f"first: .*{message}.*made or changed by hand"):
            use(model, recipe)


def test_budgets():
    effects = {"b.0.x": 4.0, "b.0.y": 1.0, "b.1.x": 3.0, "b.1.y": 3.0}
    flops = {"b.0.x": 100.0, "b.0.y": 1.0, "b.1.x": 10.0, "b.1.y": 1.0}

    def run(**budget):
        return set(choose(effects, flops, lambda p: p[:3], **budget))

    assert run(max_high_precision_linears=1) == {"b.0.x"}
    assert run(max_high_precision_blocks=1) == {"b.1.x", "b.1.y"}
    assert run(min_flops_4bit=0.9) == {"b.1.y", "b.0.y"}
    assert run(min_flops_4bit=0.0) == set(effects)
    assert run(min_flops_4bit=1.0) == set()
    for wrong in ({}, {"max_high_precision_linears": -1}, {"min_flops_4bit": 90}, {"max_high_precision_blocks": 1.5}):
        with pytest.raises(tahf4.OptionError, match="budget|share"):
            run(**wrong)


def test_a_recipe_is_planned_again_without_a_calibration(calibration, tmp_path):
    calibration.recipe(mask="max").save(tmp_path / "recipe")
    planned = Recipe.load(tmp_path / "recipe").plan(max_high_precision_blocks=1)
    kept = {p for p, linear in planned.linears("").items() if linear.decision == "high_precision"}
    assert len(kept) == 2
    assert len({p.rpartition(".")[0] for p in kept}) == 1
    with pytest.raises(tahf4.RecipeError, match="no effects"):
        calibration.recipe(mask="max", sensitivity=False).plan(max_high_precision_blocks=1)
    with pytest.raises(tahf4.OptionError, match="unknown budget"):
        planned.plan(linears=1)


def test_keep_comes_before_a_recipe(calibration):
    model, x = outliers(), inputs()[0]
    wanted = model(x)
    tahf4.apply_recipe(model, calibration.recipe(mask="max", sensitivity=False))
    tahf4.keep(model, ["blocks"])
    assert relative(torch.compile(model, backend="tahf4", options=QUICK)(x), wanted) < 1e-6
    tahf4.keep(model, [])
    assert relative(torch.compile(model, backend="tahf4", options=QUICK)(x), wanted) > 1e-3


@pytest.mark.parametrize(
    "choices",
    [
        {"mask": "best"}, {"percentile": 0}, {"percentile": 101}, {"weight_exponent": 2}, {"combine": "sum"},
        {"block": 48}, {"scale_search": True}, {"high_precision_steps": ["first"]},
    ],
)
def test_wrong_choices_are_refused(calibration, choices):
    with pytest.raises(tahf4.OptionError, match="expected"):
        calibration.recipe(**choices)


def test_values_that_are_not_finite_are_an_error():
    model = outliers()
    with tahf4.calibrate(model, options=QUICK) as calibration:
        model(inputs()[0] * torch.inf)
    with pytest.raises(tahf4.CalibrationError, match="NaN or infinite"):
        calibration.recipe()


def test_nothing_seen_is_an_error():
    with pytest.raises(tahf4.CalibrationError, match="saw no activation"), tahf4.calibrate(outliers(), options=QUICK):
        pass
    with pytest.raises(tahf4.OptionError, match="expected an nn.Module"):
        tahf4.calibrate("model")


def test_two_calibrations_at_once_are_refused():
    model = outliers()
    with (
        tahf4.calibrate(model, options=QUICK) as outer,
        pytest.raises(tahf4.CalibrationError, match="runs already"),
    ):
        model(inputs()[0])
        with tahf4.calibrate(model, options=QUICK):
            pass
    assert outer.activations


def test_statistics_merge_and_are_saved(tmp_path):
    model = outliers()
    whole = calibrated(model, step_groups=2)
    parts = []
    for half in (inputs()[:2], inputs()[2:]):
        with tahf4.calibrate(model, options=QUICK, step_groups=2) as calibration:
            for x in half:
                with calibration.at(step_group=0, branch="cond"):
                    model(x)
        parts.append(calibration)
    parts[1].save(tmp_path / "part")
    parts[0].load(tmp_path / "part")
    for path in block_linears(model):
        one, two = whole.sketch(path), parts[0].sketch(path, step_group=0, branch="cond")
        assert torch.equal(one.counts, two.counts)
        assert torch.equal(one.maxima, two.maxima)
    with pytest.raises(tahf4.CalibrationError, match="nothing was seen"):
        parts[0].sketch("blocks.0.up", step_group=1)
    torch.manual_seed(5)
    with pytest.raises(tahf4.CalibrationError, match="other weights"):
        tahf4.calibrate(Stack().eval(), checkpoint=tmp_path / "part", step_groups=2)
    with pytest.raises(tahf4.CalibrationError, match="step_groups"):
        tahf4.calibrate(model, checkpoint=tmp_path / "part")


@pytest.mark.slow
def test_wan_with_a_recipe_compiled_by_blocks():
    model, arguments = wan(num_layers=3)
    with tahf4.calibrate(model, options=QUICK) as calibration:
        model(**arguments)
    tahf4.apply_recipe(model, calibration.recipe(mask="layer_search", sensitivity=False))
    whole = output(torch.compile(model, backend="tahf4", options=QUICK)(**arguments))
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="tahf4", options=QUICK)
    assert relative(output(model(**arguments)), whole) < 1e-5


def test_activations_take_the_scales_of_least_error_unless_units_share_them(calibration):
    bare = {"mask": None, "scale_search": "", "sensitivity": False}
    for choices, wanted in (
        ({}, "least_error"), ({"scale_span": 2}, "half_away"), ({"rounding": "half_away"}, "half_away")
    ):  # fmt: skip
        recipe = calibration.recipe(**bare, **choices)
        assert {entry.rounding for entry in recipe.experts[""].values()} == {wanted}
