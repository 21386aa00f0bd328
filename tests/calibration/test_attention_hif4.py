"""A recipe decides for each attention: queries and keys in HiF4, in int8, or high precision."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from tahf4_compiler.tools.calibrate import _attention_lines
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tahf4_compiler as tahf4
from tahf4_compiler.calibration import attention as measuring
from tahf4_compiler.errors import PackedError, RecipeError
from tahf4_compiler.files.tensors import load_tensors
from tahf4_compiler.packed.attention import attention_of, attention_said
from tahf4_compiler.packed.config import TaHF4Config, describe
from tahf4_compiler.recipe.entries import AttentionEntry, LinearEntry, RecipeEntry
from tahf4_compiler.recipe.recipe import FORMAT, Recipe

OPTIONS = {"inductor": False, "kernels": "reference", "attention.min_tokens": 16, "attention": "hif4"}
TOLERANCE = 0.01


class Block(nn.Module):
    bits, value_bits = 0, 8

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, 1, 64)).unbind(-3))
        few = {"bits": self.bits, "value_bits": self.value_bits}
        y = torch.ops.tahf4.attention(q, k, v, **few) if self.bits else sdpa(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def make():
    """Return three blocks: the sharper a softmax, the larger is its error in few bits."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).eval().requires_grad_(False)
    for block, factor in zip(model, (1, 4, 30), strict=True):
        block.qkv.weight[:128] *= factor
    return model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def x():
    return torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def recipe(x):
    with torch.no_grad():
        model = make()
        with tahf4.calibrate(model, options=OPTIONS) as calibration:
            model(x)
        return calibration.recipe(mask=None, scale_search="", rotate=False, attention_tolerance=TOLERANCE)


def notes(model, x, **options):
    found = tahf4.lower(tahf4.capture(model, (x,)), options={**OPTIONS, **options}).notes["attention"]
    return [note.partition("): ")[2] for note in found]


def test_each_has_the_fewest_bits_that_the_tolerance_takes(recipe, x):
    entries = recipe.attention[""]
    assert [entry.decision for entry in entries.values()] == ["hif4", "int8", "high_precision"]
    for entry in entries.values():
        assert entry.hif4_sqnr_db < entry.sqnr_db - 5
    assert entries["0"].hif4_sqnr_db > 20 > entries["1"].hif4_sqnr_db
    assert recipe.provenance["choices"]["attention"] == "hif4"
    model = make()
    tahf4.apply_recipe(model, recipe)
    hif4, int8, high = notes(model, x)
    assert hif4 == "hif4" and high.startswith("high precision, sensitivity: SQNR")
    assert int8 == f"int8, sensitivity: SQNR {entries['1'].hif4_sqnr_db:.1f} dB in HiF4"
    assert notes(model, x, attention="int8")[:2] == ["int8", "int8"]


def test_the_effect_is_that_of_the_bits_it_runs_with(recipe, x):
    for name, bits in (("0", 4), ("1", 8), ("2", 8)):
        model = make()
        wanted = model(x)
        model[int(name)].bits = bits
        error = float((model(x) - wanted).square().sum() / wanted.square().sum())
        assert recipe.attention[""][name].effect == pytest.approx(error, rel=1e-3), name


def test_values_of_16_bits_are_measured_as_they_run(recipe, x):
    model, options = make(), {**OPTIONS, "attention": "int8", "attention.value_bits": 16}
    with tahf4.calibrate(model, options=options) as calibration:
        wanted = model(x)
    found = calibration.recipe(mask=None, scale_search="", rotate=False, attention_tolerance=TOLERANCE).attention[""]
    # The sharper a softmax, the less values matter.
    assert found["0"].sqnr_db > recipe.attention[""]["0"].sqnr_db + 0.5
    model[0].bits, model[0].value_bits = 8, 16
    error = float((model(x) - wanted).square().sum() / wanted.square().sum())
    assert found["0"].effect == pytest.approx(error, rel=1e-3) and error < 0.9 * recipe.attention[""]["0"].effect


def test_without_a_kernel_the_reference_measures(x):
    model, options = make(), {**OPTIONS, "attention": "int8", "attention.value_bits": 16, "kernels": "best"}
    with tahf4.calibrate(model, options=options) as calibration:
        model(x)
    recipe = calibration.recipe(mask=None, scale_search="", rotate=False, sensitivity=False, attention_tolerance=0.0)
    for entry in recipe.attention[""].values():
        assert entry.decision == "high_precision" and "dB in 8 bits with values in 16, less than" in entry.reason


def test_errors_decide_in_order():
    def decision(*errors):
        return measuring._entry(("a",), errors, TOLERANCE, 0).decision

    assert decision(1e-4, 1e-2) == "hif4" and decision(1e-2, 1.1e-2) == "int8"
    assert decision(1.1e-2, 2e-2) == "high_precision" and decision(1e-4) == "int8"
    assert decision(1e-4, float("nan")) == "int8"


def test_packed_models_and_folders_hold_it(recipe, x):
    model = make()
    tahf4.quantize_(model, recipe)
    wanted = ["hif4", "int8, sensitivity: SQNR", "high precision, sensitivity: SQNR"]
    for each in (model, copy.deepcopy(model)):
        assert all(map(str.startswith, notes(each, x), wanted))
    listed = describe(model)
    found = {path: attention_said(values) for path, values in listed.items() if attention_said(values)}
    assert found == attention_of(model) and {said.decision for said in found.values()} == {"int8", "high_precision"}
    assert [path for path, values in listed.items() if "attention" in values] == ["2.qkv", "2.out"]
    assert "HiF4" in listed["1.out"]["attention_in_8_bits"]
    listed["1.qkv"]["attention_in_8_bits"] = 3
    with pytest.raises(PackedError, match="attention_in_8_bits is 3, expected a reason"):
        TaHF4Config(linears=listed)


def test_blocks_of_one_graph_follow_it_each(recipe, x, monkeypatch):
    model, seen = make(), []
    tahf4.apply_recipe(model, recipe)
    monkeypatch.setattr("tahf4_compiler.ops.attention.check_attention", lambda *given: seen.append(given[6]))
    torch._dynamo.reset()
    for block in model:
        block.compile(backend="tahf4", options=OPTIONS)
    model(x)
    seen.clear()
    model(x)
    assert seen == [4, 8]


def test_a_decision_without_a_reason_counts(recipe, x):
    entries = recipe.attention[""].items()
    for decision, words in (("high_precision", "high precision"), ("int8", "int8")):
        edited = {name: dataclasses.replace(entry, decision=decision, reason="") for name, entry in entries}
        model = make()
        tahf4.apply_recipe(model, dataclasses.replace(recipe, attention={"": edited}))
        found = notes(model, x)
        assert [note.partition(", ")[0] for note in found] == [words] * 3 and all(n.partition(", ")[2] for n in found)


def test_the_file_holds_it_and_one_of_int8_is_as_it_was(recipe, tmp_path):
    recipe.save(tmp_path / "r")
    assert Recipe.load(tmp_path / "r").attention == recipe.attention
    plain = Recipe({"": {}}, attention={"": {"0": AttentionEntry(("a",), 20.0)}})
    plain.save(tmp_path / "r")
    _, header = load_tensors(tmp_path / "r", FORMAT, RecipeError)
    assert not {"hif4_sqnr_db", "by_error"} & header["attention"][""]["0"].keys()


@pytest.mark.parametrize("changes", [{"hif4_sqnr_db": "20"}, {"by_error": "high_precision"}, {"by_error": None}])
def test_a_damaged_entry_is_refused(changes, tmp_path):
    entry = dataclasses.replace(AttentionEntry(("a",), 20.0), **changes)
    Recipe({"": {}}, attention={"": {"0": entry}}).save(tmp_path / "r")
    with pytest.raises(RecipeError, match="an attention is .* damaged"):
        Recipe.load(tmp_path / "r")


def test_a_budget_keeps_it_and_a_later_one_gives_back_what_the_error_decided(tmp_path):
    linears = {"0.out": LinearEntry((64, 64), 0, effect=0.1, flops=100)}
    entries = {
        str(i): AttentionEntry((f"{i}.out",), 30.0, decision, "", 1.0, 300, hif4_sqnr_db=25.0)
        for i, decision in enumerate(("hif4", "int8"))
    }
    first = Recipe({"": {"x": RecipeEntry(linears)}}, attention={"": entries})
    planned = first.plan(min_flops_4bit=0.1)
    assert {entry.decision for entry in planned.attention[""].values()} == {"high_precision"}
    words = "effect on the output 1.00e+00, SQNR 30.0 dB in 8 bits and 25.0 dB in HiF4; budget min_flops_4bit=0.1"
    assert planned.attention[""]["0"].reason == f"sensitivity: {words}"
    planned.save(tmp_path / "r")
    assert Recipe.load(tmp_path / "r").plan(min_flops_4bit=0.99).attention == first.attention


def test_the_command_line_says_how_many(recipe):
    lines = list(_attention_lines("transformer", recipe.attention[""]))
    assert lines[0] == (
        "transformer: 2 attentions may run in 8 bits, 1 of them with q and k in HiF4, 1 stay in high precision"
    )
    assert json.dumps(lines).count(" dB in HiF4") == 3
