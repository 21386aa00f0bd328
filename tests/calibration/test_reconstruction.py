"""Reconstructed weights, from the calibration's moments to every way in which a model runs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import relative
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.moments import Moments, widths
from tahf4_compiler.format import hif4
from tahf4_compiler.format.reconstruct import moment_error
from tahf4_compiler.format.scale_search import search_scales
from tahf4_compiler.format.transforms import SEED, signs, transform
from tahf4_compiler.graph.inputs import PackedWeight
from tahf4_compiler.packed.convert import packed_linears
from tahf4_compiler.recipe.recipe import Recipe
from tahf4_compiler.weights import packing
from tahf4_compiler.weights.store import store

GRAPH = {"inductor": False}
CHOICES = {"mask": "percentile", "weight_exponent": 0.7, "sensitivity": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def rows(seed, count=96):
    """An activation whose channels are large together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, 64, generator=generator) @ mix / 8


def calibrated(model, **choices):
    with tahf4.calibrate(model, options=GRAPH, **choices) as calibration:
        for seed in range(4):
            model(rows(seed))
    return calibration


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack(3).eval().requires_grad_(False)


@pytest.mark.parametrize("moments", [1024, 64])  # the second linear of a block reads 128 channels
def test_the_network_is_closer_to_itself_on_what_the_calibration_did_not_see(model, moments):
    calibration, x = calibrated(model, moments=moments), rows(50, 256)
    want, errors = model(x), {}
    for search in ("squared", "reconstruct"):
        packed = copy.deepcopy(model)
        tahf4.quantize_(packed, calibration.recipe(scale_search=search, **CHOICES))
        errors[search] = relative(packed(x), want)
    assert errors["reconstruct"] < 0.9 * errors["squared"]


def test_every_way_of_running_has_the_codes_of_the_recipe(model, tmp_path):
    calibrated(model).recipe(**CHOICES).save(tmp_path / "r.safetensors")
    recipe = Recipe.load(tmp_path / "r.safetensors")
    recipe.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()
    held = {path: packed for entry in recipe.experts[""].values() for path, packed in entry.packed.items()}
    assert len(held) == 6 and {e.search for e in recipe.experts[""].values()} == {"reconstruct"}
    packed = copy.deepcopy(model)
    tahf4.quantize_(packed, recipe)
    for path, linear in packed_linears(packed).items():
        assert torch.equal(linear.weight_codes, held[path].codes)
        assert torch.equal(linear.weight_scales, held[path].scales)
    x = rows(7)
    compiled = copy.deepcopy(model)
    tahf4.apply_recipe(compiled, recipe)
    assert relative(torch.compile(compiled, backend="tahf4", options=GRAPH)(x), packed(x)) < 1e-6
    lowered = tahf4.lower(tahf4.capture(compiled, (x,)), options=GRAPH)
    assert relative(lowered(x), packed(x)) < 1e-6


def test_a_weight_that_changed_is_searched_and_that_is_said(model, caplog):
    packing._said.clear()
    recipe = calibrated(model).recipe(**CHOICES)
    model.blocks[0].up.weight.mul_(1.5)  # as a merged adapter does
    searched = Recipe(
        {"": {name: _replaced(entry) for name, entry in recipe.experts[""].items()}}, (), recipe.provenance
    )
    packed, want = copy.deepcopy(model), copy.deepcopy(model)
    tahf4.quantize_(packed, recipe, check_weights=False)
    assert "are not those that the recipe reconstructed" in caplog.text
    tahf4.quantize_(want, searched, check_weights=False)
    mine, other = packed_linears(packed), packed_linears(want)
    same = {path: torch.equal(mine[path].weight_codes, other[path].weight_codes) for path in mine}
    assert [path for path in same if same[path]] == ["blocks.0.up"], "the others are reconstructed"


def _replaced(entry):
    return dataclasses.replace(entry, search="squared", packed={})


class NoRotation(tahf4.Pass):
    """Stands in for the rotation."""

    replaces = "rotate"

    def __call__(self, graph_module, context):
        return tahf4.PassResult(graph_module, False)


def test_a_graph_without_the_rotation_takes_no_weight_that_is_rotated(model, caplog):
    packing._said.clear()
    recipe, x = calibrated(model).recipe(**CHOICES), rows(8)
    want = model(x)
    tahf4.apply_recipe(model, recipe)
    passes = [*tahf4.default_passes(), NoRotation()]
    assert relative(tahf4.lower(tahf4.capture(model, (x,)), passes=passes, options=GRAPH)(x), want) < 0.2
    assert "are not those that the recipe reconstructed" in caplog.text


def test_without_moments_scales_are_searched_and_that_is_said(model, caplog):
    recipe = calibrated(model, moments=0).recipe(**CHOICES)
    assert {entry.search for entry in recipe.experts[""].values()} == {"squared"}
    assert "the calibration kept no moments of all that they read" in caplog.text
    caplog.clear()
    recipe = calibrated(model, moments=64).recipe(**CHOICES, block=128)
    found = {name: entry.search for name, entry in recipe.experts[""].items()}
    assert found["blocks.0.up"] == "reconstruct" and found["blocks.0.down"] == "squared"
    assert "moments of 64 channels, which a rotation of 128 does not divide" in caplog.text
    with pytest.raises(tahf4.OptionError, match="multiple of 64"):
        tahf4.calibrate(model, moments=100)


def test_moments_survive_files_and_merging(model, tmp_path):
    whole = calibrated(model)
    parts = [tahf4.calibrate(model, options=GRAPH) for _ in range(2)]
    for i, part in enumerate(parts):
        with part:
            for seed in (2 * i, 2 * i + 1):
                model(rows(seed))
    parts[0].save(tmp_path / "c")
    taken = tahf4.calibrate(model, checkpoint=tmp_path / "c", options=GRAPH)
    taken.merge(parts[1])
    for key, cells in whole.activations.items():
        for mine, want in zip(taken.activations[key].moments.blocks, cells.moments.blocks, strict=True):
            torch.testing.assert_close(mine, want)
    seen = []
    with model.blocks[1].up.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        for seed in range(4):
            model(rows(seed))
    x = torch.cat(seen)
    torch.testing.assert_close(whole.activations["", "blocks.1.up"].moments.blocks[0], x.t() @ x, rtol=1e-4, atol=1e-3)
    with pytest.raises(tahf4.CalibrationError, match="made with moments=1024, this calibration has 64"):
        tahf4.calibrate(model, checkpoint=tmp_path / "c", moments=64)
    with pytest.raises(tahf4.CalibrationError, match="moments are 64 and 1024"):
        calibrated(model, moments=64).merge(parts[0])


class Twice(nn.Module):
    """Calls one module with the text that others read as well, and with other text."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(64, 64) for _ in range(3)) for _ in range(2))

    def forward(self, x, text):
        for q, k, v in self.blocks:
            x = x + q(x) * k(text) + v(text)
        for q, k, v in self.blocks:
            x = x + q(x) + k(x) + v(x)
        return x


def test_a_weight_that_reads_several_activations_is_rounded_for_all_of_them(tmp_path):
    torch.manual_seed(0)
    model = Twice().eval().requires_grad_(False)
    with tahf4.calibrate(model, options=GRAPH) as calibration:
        for seed in range(4):
            model(rows(seed) / 8, rows(seed + 50))
    recipe = calibration.recipe(mask=None, sensitivity=False)
    recipe.save(tmp_path / "r")
    for name, entry in Recipe.load(tmp_path / "r").experts[""].items():
        for path, packed in entry.packed.items():
            assert torch.equal(packed.codes, recipe.experts[""][name].packed[path].codes)
            weight = transform(model.get_submodule(path).weight, signs(entry.seed, 64), 64)
            total = sum(cells.moments.blocks[0] for cells in calibration.read_by("", path))
            moments = packing.moments_as_quantized(total, signs(entry.seed, 64), 64)
            mine = moment_error(weight, packed, moments)
            assert (mine <= moment_error(weight, search_scales(weight), moments) * (1 + 1e-5)).all()
    assert max(len(calibration.read_by("", path)) for path in recipe.linears("")) > 1


def test_packed_models_share_nothing_with_the_recipe_and_names_may_change(model):
    recipe = calibrated(model).recipe(**CHOICES)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    tahf4.quantize_(first, recipe)
    for linear in packed_linears(first).values():
        linear.weight_codes.zero_()
    second.blocks[0].down = Wrapped(second.blocks[0].down)  # as peft wraps it
    tahf4.quantize_(second, recipe)
    held = {path: packed for entry in recipe.experts[""].values() for path, packed in entry.packed.items()}
    found = packed_linears(second)
    assert held["blocks.0.up"].codes.any() and torch.equal(found["blocks.0.up"].weight_codes, held["blocks.0.up"].codes)
    assert torch.equal(found["blocks.0.down.base_layer"].weight_codes, held["blocks.0.down"].codes)


def test_a_weight_of_two_names_is_packed_alike_in_every_way(model):
    model.blocks[2].up.weight = model.blocks[0].up.weight
    recipe, x, packed = calibrated(model).recipe(**CHOICES), rows(9), copy.deepcopy(model)
    tahf4.quantize_(packed, recipe)
    assert torch.equal(packed.blocks[0].up.weight_codes, packed.blocks[2].up.weight_codes)
    tahf4.apply_recipe(model, recipe)
    assert relative(tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)(x), packed(x)) < 1e-6


def test_a_merged_product_takes_no_weight_that_another_mask_rounded(model, caplog):
    packing._said.clear()
    recipe = calibrated(model).recipe(**CHOICES)
    tahf4.apply_recipe(model, recipe)
    weights = model.blocks[0].up.weight, model.blocks[1].up.weight
    how = PackedWeight((0, 1), True, SEED, 64, "reconstruct")
    codes = store.get([(weights, how)])[0].codes.split(128)
    held = [recipe.experts[""][f"blocks.{i}.up"].packed[f"blocks.{i}.up"].codes for i in range(2)]
    assert torch.equal(codes[0], held[0]) and not torch.equal(codes[1], held[1])
    assert "are not those that the recipe reconstructed" in caplog.text


def test_a_calibration_takes_calls_in_and_outside_of_inference_mode(model):
    whole, parts = calibrated(model), tahf4.calibrate(model, options=GRAPH)
    with parts:
        for seed in range(4):
            with torch.inference_mode(seed % 2 == 0):
                model(rows(seed))
    for key, cells in whole.activations.items():
        for mine, want in zip(parts.activations[key].moments.blocks, cells.moments.blocks, strict=True):
            assert torch.equal(mine, want)
    assert parts.recipe(**CHOICES).linears("") == whole.recipe(**CHOICES).linears("")


class Wrapped(nn.Module):
    """As an adapter stands around a linear."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear

    def forward(self, x):
        return self.base_layer(x)


def test_weights_and_activations_that_are_not_finite_or_too_large(model, caplog):
    model.blocks[1].down.weight[3, 5] = float("inf")
    with tahf4.calibrate(model.blocks[0], options=GRAPH) as calibration:
        model.blocks[0](rows(0))
    calibration.activations["", "down"].moments.blocks[0] *= float("inf")
    found = calibration.recipe(**CHOICES).experts[""]
    assert found["up"].search == "reconstruct" and found["down"].search == "squared"
    assert "down: weights are rounded by searched scales and not reconstructed, since its moments are" in caplog.text


@pytest.mark.parametrize(
    ("channels", "widest", "want"),
    [
        (384, 1024, [384]),
        (100, 1024, [100]),
        (1536, 1024, [1024, 512]),
        (5120, 1024, [1024] * 5),
        (13824, 1024, [1024] * 13 + [512]),
        (14336, 1024, [1024] * 14),
        (200, 64, [64, 64, 64, 8]),
        (384, 192, [128, 128, 128]),
    ],
)
def test_blocks_of_moments_are_bounded_and_fit_rotations(channels, widest, want):
    assert widths(channels, widest) == want
    moments = Moments(channels, widest)
    x = torch.randn(5, channels)
    moments.update(x.to(torch.bfloat16))
    for block, piece in zip(moments.blocks, x.to(torch.bfloat16).float().split(want, 1), strict=True):
        torch.testing.assert_close(block, piece.t() @ piece)


def test_a_damaged_weight_of_a_recipe_is_refused(model, tmp_path):
    recipe = calibrated(model).recipe(**CHOICES)
    (name, entry), *_ = recipe.experts[""].items()
    path = next(iter(entry.packed))
    short = hif4.Packed(entry.packed[path].codes[:-1], entry.packed[path].scales, entry.packed[path].k)
    for packed, message in (({path: short}, "does not fit"), ({}, "and the packed weight of")):
        damaged = Recipe({"": {name: dataclasses.replace(entry, packed=packed)}}, (), {})
        damaged.save(tmp_path / "d")
        with pytest.raises(tahf4.RecipeError, match=message):
            Recipe.load(tmp_path / "d")
