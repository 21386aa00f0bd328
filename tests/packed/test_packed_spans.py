"""Packed models whose units share level-1 scales: made, run, saved, loaded, from recipes and checkpoints."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import WanTransformer3DModel
from models import Block, Stack, wan
from packed_block import GRAPH, make
from torch import nn
from torch.distributed.tensor import Shard

import tahf4_compiler as tahf4
from tahf4_compiler.checkpoint.convert import quantize_checkpoint
from tahf4_compiler.distributed import sharding, styles
from tahf4_compiler.errors import PackedError, RecipeError
from tahf4_compiler.format import hif4
from tahf4_compiler.format.reconstruct import Reconstruction
from tahf4_compiler.packed.convert import packed_linears
from tahf4_compiler.weights.checksum import checksum
from tahf4_compiler.weights.packing import pack_transformed


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def holds(linear, span):
    padded = linear.weight_scales.shape[1] * 64
    return hif4.holds_span(hif4.Packed(linear.weight_codes, linear.weight_scales, padded), span)


@pytest.mark.parametrize("span", [2, 4, "row"])
def test_a_packed_model_holds_it_and_runs_as_the_compiled_original(x, span):
    packed, plain = make(scale_span=span), make()
    assert all(holds(linear, span) for linear in packed_linears(packed).values())
    assert not any(holds(linear, span) for linear in packed_linears(make(scale_span=1)).values())
    compiled = tahf4.lower(tahf4.capture(plain, (x,)), options={**GRAPH, "scale_span": span})
    torch.testing.assert_close(packed(x), compiled(x), rtol=1e-3, atol=1e-3)
    lowered = tahf4.lower(tahf4.capture(packed, (x,)), options=GRAPH)
    torch.testing.assert_close(lowered(x), packed(x), rtol=1e-3, atol=1e-3)
    assert {d.span for d in lowered.plan} == {hif4.check_span(span)}
    assert f"span {span}" in lowered.report() and f"span={span}" in repr(packed.up)
    assert (packed(x) - plain(x)).norm() < 0.2 * (plain(x) - x).norm()


def test_torch_compile_runs_packed_and_plain_models(x):
    packed, plain = make(scale_span="row"), make()
    options = {**GRAPH, "scale_span": "row"}
    for model in (packed, plain):
        found = torch.compile(model, backend="tahf4", options=options)(x)
        torch.testing.assert_close(found, packed(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("asked", [{"scale_span": 2}, {"rounding": "bfloat16_half_away"}])
def test_the_options_of_a_compilation_do_not_change_packed_weights_and_that_is_said(x, asked, caplog):
    row, other = make(scale_span="row"), make(**asked)
    lowered = tahf4.lower(tahf4.capture(row, (x,)), options={**GRAPH, **asked})
    assert {d.span for d in lowered.plan} == {0}
    said = "2 activations have span and rounding of their recipe or packed weight, which come before scale_span"
    assert said in lowered.notes["span"][0] and caplog.text.count(said) == 1
    caplog.clear()
    for model, options in ((row, {"scale_span": "row"}), (row, {}), (other, asked)):
        tahf4.lower(tahf4.capture(model, (x,)), options={**GRAPH, **options})
    assert not caplog.text


def test_the_plan_of_quantize_says_it(x):
    plan = tahf4.quantize_(make(), scale_span=4)
    assert [d.span for d in plan] == [4, 4]
    again = tahf4.plan_modules(make(scale_span=4))
    assert [d.span for d in again] == [4, 4]


def test_other_numbers_of_bits_ignore_it(x):
    packed, units = make(scale_span="row"), make(scale_span=1)
    for model in (packed, units):
        tahf4.set_activation_bits(model, 8)
    assert (packed(x) - units(x)).norm() < 0.1 * units(x).norm()
    lowered = tahf4.lower(tahf4.capture(packed, (x,)), options=GRAPH)
    torch.testing.assert_close(lowered(x), packed(x), rtol=1e-3, atol=1e-3)
    assert {d.span for d in lowered.plan} == {1}
    # The option of a compilation comes before the module's bits, and leaves its span.
    again = tahf4.lower(tahf4.capture(packed, (x,)), options={**GRAPH, "activation_bits": 4})
    wanted = make(scale_span="row")
    torch.testing.assert_close(again(x), wanted(x), rtol=1e-3, atol=1e-3)
    nodes = [n for n in again.graph_module.graph.nodes if getattr(n.target, "_opname", "").endswith("quantize")]
    assert nodes and all(0 in n.args[-3:] for n in nodes)


def test_a_reconstruction_with_another_span_is_not_taken():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    units = Reconstruction(hif4.quantize(weight), int(checksum(weight)))
    assert not hif4.holds_span(units.packed, "row")
    found = pack_transformed(weight, None, None, 0, "reconstruct", None, units, None, 0)
    assert hif4.holds_span(found, "row")
    same = pack_transformed(weight, None, None, 0, "reconstruct", None, units)
    assert torch.equal(same.codes, units.packed.codes)


def test_state_dicts(x):
    packed = make(scale_span="row")
    empty, units = make(scale_span="row"), make(scale_span=1)
    for linear in packed_linears(empty).values():
        linear.weight_codes.zero_()
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty(x), packed(x))
    with pytest.raises(PackedError, match=r"weight \(up\) has the span 'row', and the level-1 scales of its units"):
        empty.load_state_dict(units.state_dict())
    units.load_state_dict(packed.state_dict())  # a reader that knows no span
    assert (units(x) - packed(x)).norm() < 0.1 * packed(x).norm()
    again = copy.deepcopy(packed)
    assert again.up.span == 0 and torch.equal(again(x), packed(x))
    tahf4.dequantize_(again)
    assert type(again.up) is nn.Linear and not hasattr(again.up, "span")


def test_a_folder_keeps_it(tmp_path):
    torch.manual_seed(0)
    model = wan()[0].eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "disk", scale_span="row")
    tahf4.quantize_(model, scale_span="row")
    model.save_pretrained(tmp_path / "memory")
    for name in ("disk", "memory"):
        loaded = WanTransformer3DModel.from_pretrained(tmp_path / name)
        found = packed_linears(loaded)
        assert found and all(linear.span == 0 for linear in found.values())
        said = loaded.config.quantization_config
        said = said if isinstance(said, dict) else said.to_dict()
        assert {v["scale_span"] for v in said["linears"].values()} == {"row"}
        state, wanted = loaded.state_dict(), model.state_dict()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_a_damaged_folder_is_refused(tmp_path):
    torch.manual_seed(0)
    model = wan()[0].eval().requires_grad_(False)
    tahf4.quantize_(model)
    for linear in packed_linears(model).values():
        linear.span = 0  # not what its scales are
    model.save_pretrained(tmp_path)
    with pytest.raises(PackedError, match="has scale_span 'row' in quantization_config, and the level-1 scales"):
        WanTransformer3DModel.from_pretrained(tmp_path)
    with pytest.raises(PackedError, match="scale_span is 3, expected 1, 2, 4 or 'row'"):
        values = {"k": 64, "n": 64, "hadamard_block": 64, "activation": "a", "dtype": "float32", "scale_span": 3}
        tahf4.TaHF4Config(linears={"a": values})


@pytest.fixture(scope="module")
def calibration():
    torch.manual_seed(0)
    with torch.no_grad():
        model = Stack(3).eval()
        with tahf4.calibrate(model, options=GRAPH) as found:
            for seed in range(3):
                model(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)))
    return found


@pytest.mark.parametrize("search", ["", "squared", "weighted", "reconstruct"])
def test_a_recipe_keeps_it(calibration, search, tmp_path):
    recipe = calibration.recipe(mask=None, scale_search=search, scale_span="row")
    recipe.save(tmp_path / "r.safetensors")
    again = tahf4.Recipe.load(tmp_path / "r.safetensors")
    assert {entry.span for entry in again.experts[""].values()} == {0}
    torch.manual_seed(0)
    model, x = Stack(3).eval(), torch.randn(64, 64)
    tahf4.apply_recipe(model, again)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options={**GRAPH, "scale_span": 2})
    assert {d.span for d in lowered.plan if d.decision == "hif4"} == {0}
    wanted, compiled = model(x), lowered(x)
    tahf4.quantize_(model)
    assert {linear.span for linear in packed_linears(model).values()} == {0}
    torch.testing.assert_close(model(x), compiled, rtol=1e-3, atol=1e-3)
    assert (model(x) - wanted).norm() < 0.3 * wanted.norm()
    plain = calibration.recipe(mask=None, scale_search=search)
    plain.save(tmp_path / "plain.safetensors")
    assert b"span" not in (tmp_path / "plain.safetensors").read_bytes().partition(b"provenance")[0]


def test_a_recipe_without_rotation_and_mask_is_refused_it(calibration):
    recipe = calibration.recipe(mask=None, rotate=False, scale_span="row")
    torch.manual_seed(0)
    model = Stack(3).eval()
    plan = tahf4.quantize_(model, recipe)
    refused = [d for d in plan if d.decision == "hif4"]
    assert {d.span for d in refused} == {1}
    assert all("scale_span 'row' is refused: it has no mask and no rotation" in d.reason for d in refused)


def test_a_recipe_whose_weights_do_not_hold_it_is_refused(calibration, tmp_path):
    recipe = calibration.recipe(mask=None, rounding="half_away")
    entries = {name: dataclasses.replace(entry, span=0) for name, entry in recipe.experts[""].items()}
    name, entry = next(iter(entries.items()))
    path, packed = next(iter(entry.packed.items()))
    # One unit a row holds any span: two do not.
    scales = torch.cat([packed.scales, packed.scales + 4], 1)
    codes = torch.cat([packed.codes, packed.codes], 1)
    n, k = entry.linears[path].shape
    linears = {path: dataclasses.replace(entry.linears[path], shape=(n, 2 * k))}
    other = dataclasses.replace(entry, linears=linears, packed={path: hif4.Packed(codes, scales, 2 * k)})
    changed = dataclasses.replace(recipe, experts={"": {name: other}})
    changed.save(tmp_path / "r.safetensors")
    with pytest.raises(RecipeError, match="do not share level-1 scales, as its span says"):
        tahf4.Recipe.load(tmp_path / "r.safetensors")
    odd = dataclasses.replace(recipe, experts={"": {name: dataclasses.replace(entry, span=3)}})
    odd.save(tmp_path / "odd.safetensors")
    with pytest.raises(RecipeError, match="the span is 3"):
        tahf4.Recipe.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("span", [2, "row"])
def test_reconstruction_over_several_blocks_of_moments_holds_one_scale_a_row(span):
    torch.manual_seed(0)
    model = Block(320, 640).eval()
    with tahf4.calibrate(model, options=GRAPH, moments=128) as found:
        model(torch.randn(400, 320))
    recipe = found.recipe(mask=None, block=64, sensitivity=False, scale_span=span)
    packed = [p for entry in recipe.experts[""].values() for p in entry.packed.values()]
    assert packed and all(hif4.holds_span(p, span) for p in packed)


class Mesh:
    def __init__(self, size):
        self.count = size

    def size(self):
        return self.count


class Spec:
    def __init__(self, shape, ranks):
        self.shape, self.mesh = shape, Mesh(ranks)


def test_dtensor_shards_k_in_whole_spans_only():
    x = Spec((4, 512), 2)
    along_k = Shard(1)
    assert any(rule[0][0] == along_k for rule in sharding._quantize(x, None, 64, 4))
    assert any(rule[0][0] == along_k for rule in sharding._quantize(x, None, 64, 4, 4))
    assert not any(rule[0][0] == along_k for rule in sharding._quantize(x, None, 64, 4, 0))
    assert any(rule[0][0] == along_k for rule in sharding._quantize(x, None, 64, 8, 0))
    assert not any(rule[0][0] == along_k for rule in sharding._quantize(Spec((4, 384), 2), None, 64, 4, 4))
    codes, scales, weight = Spec((4, 256), 2), Spec((4, 8), 2), Spec((16, 256), 2)
    for span, expected in (((), True), ((4,), True), ((0,), False)):
        rules = sharding._linear(codes, scales, weight, scales, None, torch.float32, *span)
        assert any(rule[1][0] == along_k for rule in rules) == expected
        assert all(len(rule[1]) == 6 + len(span) for rule in rules)


def test_a_linear_that_ranks_divide_along_k_keeps_whole_spans_or_none():
    linear = make(scale_span="row").down
    assert not styles._spans_fit(linear, 2) and styles._spans_fit(linear, 1)
    linear = make(scale_span=4).down  # 8 units
    assert styles._spans_fit(linear, 2)
    assert not styles._spans_fit(linear, 4)
    assert styles._spans_fit(make(scale_span=1).down, 4)
