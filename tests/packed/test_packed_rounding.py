"""Roundings other than the default: an option of compilations, packed models, recipes and checkpoints."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from models import wan
from packed_block import GRAPH, make

import tahf4_compiler as tahf4
from tahf4_compiler.checkpoint.convert import quantize_checkpoint
from tahf4_compiler.errors import OptionError, PackedError, RecipeError
from tahf4_compiler.format import hif4
from tahf4_compiler.packed.config import TaHF4Config, describe
from tahf4_compiler.packed.convert import packed_linears
from tahf4_compiler.packed.linear import HiF4Linear

VENDOR, SEARCHED = "bfloat16_half_away", "least_error"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def codes(model):
    return {path: linear.weight_codes for path, linear in packed_linears(model).items()}


def quantizations(graph_module):
    names = ("quantize", "fused_quantize", "linear_quantize")
    return [n for n in graph_module.graph.nodes if getattr(n.target, "_opname", "") in names]


@pytest.mark.parametrize(("rounding", "span"), [(VENDOR, 1), (VENDOR, "row"), (SEARCHED, 1)])
def test_packed_models_and_compiled_ones_have_it(x, rounding, span):
    packed, ours, plain = make(rounding=rounding, scale_span=span), make(scale_span=span), make()
    assert any(not torch.equal(a, b) for a, b in zip(codes(packed).values(), codes(ours).values(), strict=True))
    linear = packed.up
    activation = hif4.quantize(torch.ops.aten.mul(x, linear.multiplier), span=span, rounding=rounding)
    assert activation.k == 256 and linear.rounding == rounding and f"rounding={rounding}" in repr(linear)
    compiled = tahf4.lower(tahf4.capture(plain, (x,)), options={**GRAPH, "rounding": rounding, "scale_span": span})
    lowered = tahf4.lower(tahf4.capture(packed, (x,)), options=GRAPH)
    for found in (compiled, lowered):
        assert {d.rounding for d in found.plan} == {rounding}
        assert f"rounding {rounding}" in found.report()
        assert all(n.args[-1] >= 8 for n in quantizations(found.graph_module))
    close = (compiled(x) - packed(x)).norm(), (lowered(x) - packed(x)).norm()
    assert max(close) < 1e-3 * packed(x).norm()
    default = tahf4.lower(tahf4.capture(plain, (x,)), options={**GRAPH, "scale_span": span})
    assert {d.rounding for d in default.plan} == {"half_away"}
    assert not torch.equal(default(x), compiled(x))


@pytest.mark.parametrize(("rounding", "form"), [(VENDOR, 9), (SEARCHED, 17)])
def test_the_product_is_that_of_the_definition(x, rounding, form):
    """An activation rounded so, times the weight's codes."""
    linear = make(rounding=rounding).up
    left = torch.ops.tahf4.quantize(x, linear.multiplier, linear.hadamard_block, 4, form)
    product = torch.ops.tahf4.linear(*left, linear.weight_codes, linear.weight_scales, linear.bias, torch.float32)
    torch.testing.assert_close(linear(x), product, rtol=1e-5, atol=1e-5)
    other = torch.ops.tahf4.quantize(x, linear.multiplier, linear.hadamard_block, 4, 1)
    assert not torch.equal(other[0], left[0])


@pytest.mark.parametrize("rounding", [VENDOR, SEARCHED])
def test_the_reference_kernels_and_fused_ones_agree(x, rounding):
    plain = make()
    options = {"rounding": rounding, **GRAPH}
    found = tahf4.lower(tahf4.capture(plain, (x,)), options=options)
    wanted = tahf4.lower(tahf4.capture(plain, (x,)), options={**options, "kernels": "reference"})
    assert (found(x) - wanted(x)).norm() < 5e-3 * wanted(x).norm()
    assert (found(x) - wanted(x)).norm() < 0.5 * (found(x) - plain(x)).norm()


def test_other_numbers_of_bits_keep_it_for_weights(x):
    packed = make(rounding=VENDOR)
    tahf4.set_activation_bits(packed, 8)
    lowered = tahf4.lower(tahf4.capture(packed, (x,)), options=GRAPH)
    torch.testing.assert_close(lowered(x), packed(x), rtol=1e-3, atol=1e-3)
    plain = tahf4.lower(tahf4.capture(make(), (x,)), options={**GRAPH, "rounding": VENDOR, "activation_bits": 8})
    torch.testing.assert_close(plain(x), packed(x), rtol=1e-3, atol=1e-3)


def test_a_folder_and_its_copy_keep_it(tmp_path):
    torch.manual_seed(0)
    model = wan(ffn_dim=192)[0]
    model.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "disk", rounding=VENDOR)
    tahf4.quantize_(model, rounding=VENDOR)
    model.save_pretrained(tmp_path / "memory")
    texts = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("disk", "memory")]
    for text in texts:
        assert {linear["rounding"] for linear in text["quantization_config"]["linears"].values()} == {VENDOR}
        assert text["quantization_config"]["format_version"] == 3, "an earlier tahf4 rounds otherwise: it must refuse"
    texts[0]["quantization_config"]["format_version"] = 1  # as tahf4 wrote it before
    (tmp_path / "disk" / "config.json").write_text(json.dumps(texts[0]))
    for name in ("disk", "memory"):
        again = WanTransformer3DModel.from_pretrained(tmp_path / name)
        assert {linear.rounding for linear in packed_linears(again).values()} == {VENDOR}
        assert all(torch.equal(a, b) for a, b in zip(codes(again).values(), codes(model).values(), strict=True))
    some = next(iter(texts[1]["quantization_config"]["linears"].values()))
    with pytest.raises(PackedError, match="rounding is 'least_error' and scale_span 2, expected 1"):
        TaHF4Config.from_dict(
            {**texts[1]["quantization_config"], "linears": {"a": {**some, "rounding": SEARCHED, "scale_span": 2}}}
        )
    some["rounding"] = "stochastic"
    (tmp_path / "memory" / "config.json").write_text(json.dumps(texts[1]))
    with pytest.raises(PackedError, match="rounding is 'stochastic', expected one of"):
        WanTransformer3DModel.from_pretrained(tmp_path / "memory")


def test_the_default_writes_nothing_new(tmp_path):
    model = wan(ffn_dim=192)[0]
    tahf4.quantize_(model)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "rounding" not in text and json.loads(text)["quantization_config"]["format_version"] == 1


@pytest.mark.parametrize("option", [{"rounding": "bfloat16_half_away"}, {"scale_span": 2}])
def test_a_model_that_is_packed_while_it_loads_has_what_was_asked_for(option, tmp_path):
    model, _ = wan(num_layers=1)
    model.save_pretrained(tmp_path)
    tahf4.quantize_(model, **option)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=TaHF4Config(**option))
    described = describe(model)
    assert described and describe(loaded) == described == loaded.config.quantization_config.linears
    assert not option.keys() & loaded.config.quantization_config.to_dict().keys()
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rounding": "up"}, "rounding"),
        ({"scale_span": 3}, "scale_span"),
        ({"rounding": "least_error", "scale_span": 2}, "least_error"),
        ({"kep": ["up"]}, "'kep', which it does not know; there are recipe, keep, "),
    ],
)
def test_settings_that_are_wrong_are_refused_by_name(wrong, says):
    with pytest.raises(OptionError, match=says):
        TaHF4Config(**wrong)
    assert TaHF4Config(linears={}, theirs=1).to_dict()["theirs"] == 1


def test_what_earlier_versions_wrote_beside_packed_linears_is_read_over():
    linears = {"a": {"k": 64, "n": 64, "hadamard_block": 0, "activation": "", "dtype": "float32"}}
    found = TaHF4Config.from_dict({"linears": linears, "scale_span": 4, "rounding": "bfloat16"})
    assert found.form == 1 and not {"scale_span", "rounding"} & found.to_dict().keys()


def test_settings_survive_a_dictionary_and_can_be_updated():
    given = TaHF4Config(scale_span=4)
    again = TaHF4Config.from_dict(given.to_dict())
    assert again.form == given.form != 1 and again.scale_span == 4
    assert TaHF4Config().update(scale_span=4) == {} and TaHF4Config.from_dict({}, scale_span=4).form == given.form


@pytest.mark.parametrize("others", [{}, {"rank": 8}])
def test_one_linear_that_is_rounded_otherwise_makes_the_version(others):
    plain = {"k": 64, "n": 64, "hadamard_block": 0, "activation": "", "dtype": "float32"}
    usual = {**plain, "rounding": "half_away"}
    linears = {"a": {**plain, **others}, "b": usual}
    assert TaHF4Config(linears=linears).to_dict()["format_version"] == (2 if others else 1)
    rounded = {**linears, "c": {**plain, "rounding": VENDOR}, "d": usual}
    assert TaHF4Config(linears=rounded).to_dict()["format_version"] == 3


@pytest.mark.parametrize("search", ["", "squared", "reconstruct"])
def test_a_recipe_has_it(x, tmp_path, search, caplog):
    plain = make()
    with tahf4.calibrate(plain, step_groups=1, options={"inductor": False}) as calibration:
        plain(x)
    choices = {"mask": None, "scale_search": search, "sensitivity": False}
    recipe = calibration.recipe(rounding=VENDOR, **choices)
    recipe.save(tmp_path / "recipe.safetensors")
    loaded = tahf4.Recipe.load(tmp_path / "recipe.safetensors")
    assert {e.rounding for entries in loaded.experts.values() for e in entries.values()} == {VENDOR}
    packed = make()
    tahf4.quantize_(packed, loaded, rounding="half_away")  # the recipe comes first
    assert {linear.rounding for linear in packed_linears(packed).values()} == {VENDOR}
    caplog.clear()
    tahf4.quantize_(make(), loaded, rounding="least_error")
    assert f"{len(packed_linears(packed))} linears have span and rounding of their recipe" in caplog.text
    ours = make()
    tahf4.quantize_(ours, calibration.recipe(**choices))
    same = [torch.equal(a, b) for a, b in zip(codes(packed).values(), codes(ours).values(), strict=True)]
    assert all(same) if search == "reconstruct" else not any(same)
    tahf4.apply_recipe(plain, loaded)
    compiled = tahf4.lower(tahf4.capture(plain, (x,)), options=GRAPH)
    assert {d.rounding for d in compiled.plan} == {VENDOR}
    torch.testing.assert_close(compiled(x), packed(x), rtol=1e-3, atol=1e-3)
    broken = {
        expert: {name: dataclasses.replace(entry, rounding="up") for name, entry in entries.items()}
        for expert, entries in loaded.experts.items()
    }
    dataclasses.replace(loaded, experts=broken).save(tmp_path / "broken.safetensors")
    with pytest.raises(RecipeError, match="the rounding is 'up'"):
        tahf4.Recipe.load(tmp_path / "broken.safetensors")


def test_unknown_roundings_are_refused():
    model = make()
    calls = [
        lambda: tahf4.quantize_(model, rounding="half_even"),
        lambda: tahf4.lower(tahf4.capture(model, (torch.zeros(1, 256),)), options={"rounding": "vendor"}),
        lambda: quantize_checkpoint("nowhere", "elsewhere", rounding="vendor"),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="rounding.* is '.*'; expected one of 'half_away', 'bfloat16_half_away'"):
            call()
    assert not packed_linears(model)


def test_a_linear_comes_back_without_it():
    model = make(rounding=VENDOR)
    assert isinstance(model.up, HiF4Linear)
    assert not hasattr(model.up.to_linear(), "rounding")


def test_a_span_and_a_scale_for_each_unit_are_refused_together(x):
    wanted = "'least_error', which chooses a level-1 scale for each unit, and scale_span is"
    with pytest.raises(OptionError, match=wanted):
        tahf4.quantize_(make(), rounding=SEARCHED, scale_span="row")
    with pytest.raises(OptionError, match=f"option 'rounding' is {wanted} 2"):
        tahf4.lower(tahf4.capture(make(), (x,)), options={"rounding": SEARCHED, "scale_span": 2})


def test_a_state_dict_carries_it(x):
    packed, same, other = make(rounding=VENDOR), make(rounding=VENDOR), make(rounding="half_away")
    state = packed.state_dict()
    same.load_state_dict(state)
    assert torch.equal(same(x), packed(x))
    with pytest.raises(PackedError, match=f"rounding={VENDOR}; this .*rounding=half_away.*round activations"):
        other.load_state_dict(state)
    for metadata in state._metadata.values():
        metadata.pop("rounding", None)  # as earlier versions wrote it
    other.load_state_dict(state)
    assert {linear.rounding for linear in packed_linears(other).values()} == {"half_away"}
