"""A recipe measures what each attention in 8 bits costs the network. Budgets count attentions as they do linears."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from tahf4_compiler.tools.calibrate import _attention_lines
from tahf4_compiler.tools.inspection.explaining import overview
from tahf4_compiler.tools.inspection.report import Report
from tahf4_compiler.tools.inspection.statistics import Evidence
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.attention import _entry, _with_effect
from tahf4_compiler.errors import RecipeError
from tahf4_compiler.files.tensors import load_tensors, save_tensors
from tahf4_compiler.recipe.budget import choose
from tahf4_compiler.recipe.entries import AttentionEntry, LinearEntry, RecipeEntry
from tahf4_compiler.recipe.recipe import FORMAT, Recipe

OPTIONS = {"inductor": False, "kernels": "reference", "attention.min_tokens": 16, "attention": "int8"}
FAST = {"mask": None, "scale_search": "", "rotate": False}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.eight = False

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, 1, 64)).unbind(-3))
        attention = torch.ops.tahf4.attention if self.eight else nn.functional.scaled_dot_product_attention
        return x + self.out(attention(q, k, v).transpose(1, 2).flatten(2))


def make():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(2))).eval().requires_grad_(False)
    model[1].qkv.weight[:128] *= 30  # a sharp softmax: scores of 8 bits are far from those of 32
    return model


@pytest.fixture(scope="module")
def inputs():
    return [torch.randn(20, 16, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def calibration(inputs):
    with torch.no_grad():
        model = make()
        with tahf4.calibrate(model, options=OPTIONS) as calibration:
            for x in inputs:
                model(x)
    return calibration


@pytest.fixture(scope="module")
def measured(calibration):
    calibration.kept.seen = {("", ""): (6, 1), ("other", ""): (100, 1)}  # as if 2 of 6 calls had been kept
    with torch.no_grad():
        return calibration.recipe(**FAST, attention_tolerance=1.0)


def test_the_effect_is_the_error_of_the_network_with_one_attention_in_8_bits(measured, inputs):
    model, effects = make(), []
    for block in model:
        errors = []
        for x in (x[:16] for x in inputs):
            wanted = model(x)
            block.eight = True
            errors.append(float((model(x) - wanted).square().sum() / wanted.square().sum()))
            block.eight = False
        effects.append(sum(errors) / len(errors))
    found = measured.attention[""]
    assert effects[1] > 10 * effects[0]
    assert [entry.effect for entry in found.values()] == pytest.approx(effects, rel=1e-3)
    assert {entry.flops for entry in found.values()} == {6 * 4 * 20 * 16 * 16 * 64}, "of all calls"


def test_it_is_shown_where_the_numbers_of_linears_are(measured, inputs):
    worst = measured.attention[""]["1"]
    words = f"int8: effect on the output {worst.effect:.2e}, SQNR {worst.sqnr_db:.1f} dB"
    lines = list(_attention_lines("transformer", measured.attention[""]))
    assert lines[:2] == ["transformer: 2 attentions may run in 8 bits, 0 stay in high precision", f"  1: {words}"]
    assert list(_attention_lines("transformer", {})) == []
    lowered = tahf4.lower(tahf4.capture(make(), (inputs[0],)), options=OPTIONS)
    assert f"attention: the recipe says: 1: {words}" in overview(Report.of(lowered, Evidence.of(measured)))
    stays = _with_effect(_entry(("a",), [0.1], 0.01, 3), 0.5)
    assert stays.reason == "sensitivity: SQNR 10.0 dB in 8 bits, less than 20.0 dB; effect on the output 5.00e-01"
    assert stays.decision == "high_precision" and stays.flops == 3 and not stays.budget


def test_the_file_holds_it_and_earlier_files_are_read(measured, tmp_path):
    path = tmp_path / "r.safetensors"
    planned = measured.plan(min_flops_4bit=0.8)
    planned.save(path)
    assert Recipe.load(path).attention == planned.attention
    tensors, header = load_tensors(path, FORMAT, RecipeError)
    for entry in header["attention"][""].values():
        for name in ("effect", "flops", "budget"):
            entry.pop(name, None)
    save_tensors(path, tensors, FORMAT, header, RecipeError)
    earlier = Recipe.load(path)
    assert [entry.effect for entry in earlier.attention[""].values()] == [None, None]
    assert earlier.plan(min_flops_4bit=0.5).attention == earlier.attention
    earlier.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("changes", [{"effect": "low"}, {"flops": -1}, {"flops": 1.5}, {"budget": None}])
def test_a_damaged_entry_is_refused(changes, tmp_path):
    entry = dataclasses.replace(AttentionEntry(("a",), 20.0), **changes)
    Recipe({"": {}}, attention={"": {"0": entry}}).save(tmp_path / "r.safetensors")
    with pytest.raises(RecipeError, match="an attention is .* damaged"):
        Recipe.load(tmp_path / "r.safetensors")


def hand_made(**decided):
    """Return a recipe of two blocks, each with two linears of 100 FLOPs and an attention of 300."""
    effects = {"0.qkv": 0.1, "0.out": 0.2, "1.qkv": 0.3, "1.out": 0.05}
    linears = {path: LinearEntry((64, 64), 0, effect=effect, flops=100) for path, effect in effects.items()}
    attention = {
        block: AttentionEntry((f"{block}.qkv", f"{block}.out"), 30.0, effect=effect, flops=300)
        for block, effect in (("0", 1.0), ("1", 0.05))
    }
    attention |= {block: dataclasses.replace(attention[block], **values) for block, values in decided.items()}
    return Recipe({"": {"x": RecipeEntry(linears)}}, attention={"": attention})


def staying(recipe):
    linears = [path for path, linear in recipe.linears("").items() if linear.decision == "high_precision"]
    return {*linears, *(f"[{name}]" for name, e in recipe.attention[""].items() if e.decision == "high_precision")}


BY_ERROR = {"decision": "high_precision", "reason": "sensitivity: SQNR 9.0 dB"}


@pytest.mark.parametrize(
    ("share", "decided", "expected"),
    [
        (0.7, {}, {"[0]"}),  # 300 of 1000: its effect for each FLOP is the greatest
        (0.6, {}, {"[0]", "1.qkv"}),
        (0.71, {}, {"1.qkv", "0.out"}),  # 290 of 1000: too few for it
        (0.6, {"0": {"effect": 0.15}}, {"1.qkv", "0.out"}),  # with a third linear an attention would stay
        (0.6, {"1": BY_ERROR}, {"[1]", "1.qkv"}),
        (0.8, {"1": BY_ERROR}, {"[1]"}),  # it takes more than there is, and stays
        (0.7, {"0": {"effect": None}}, {"1.qkv", "0.out"}),  # 210 of 700, without one that was not measured
    ],
)
def test_an_attention_that_stays_takes_of_the_budget_in_flops(share, decided, expected):
    planned = hand_made(**decided).plan(min_flops_4bit=share)
    assert staying(planned) == expected


def test_an_attention_stays_with_the_last_linear_of_its_module_and_costs_its_flops():
    effects, flops = {"q": 3.0, "o": 2.0, "u": 1.0}, {"q": 1.0, "o": 1.0, "u": 1.0, "core": 7.0}
    with_it = {"attentions": {"core": ("q", "o", "of the boundary")}}
    assert choose(effects, flops, str, min_flops_4bit=0.5, **with_it) == ["q", "u"]
    assert choose(effects, flops, str, min_flops_4bit=0.1, **with_it) == ["q", "o", "core"]
    assert choose(effects, flops, str, min_flops_4bit=0.5, staying=["core"]) == []


def test_a_block_is_chosen_by_its_attention_too_and_keeps_it():
    planned = hand_made().plan(max_high_precision_blocks=1)
    assert staying(planned) == {"0.qkv", "0.out", "[0]"}
    assert staying(hand_made(**{"0": BY_ERROR}).plan(max_high_precision_blocks=1)) == {"1.qkv", "1.out", "[0]", "[1]"}


def test_budgets_that_count_linears_or_activations_leave_attentions_alone():
    first = hand_made(**{"1": BY_ERROR})
    assert staying(first.plan(max_high_precision_linears=1)) == {"1.qkv", "[1]"}
    for budget in ({"max_8bit_flops": 0.5}, {"min_flops_4bit": 0.5, "protect_bits": 8}):
        planned = first.plan(**budget)
        assert planned.attention == first.attention
        assert sum(linear.activation_bits == 8 for linear in planned.linears("").values()) == 2, "half of the linears"


def test_a_later_plan_decides_anew_but_not_about_a_large_error():
    first = hand_made(**{"1": BY_ERROR})
    planned = first.plan(min_flops_4bit=0.4)
    entry = planned.attention[""]["0"]
    assert staying(planned) == {"[0]", "[1]"} and entry.budget == "min_flops_4bit=0.4"
    assert entry.reason == "sensitivity: effect on the output 1.00e+00, SQNR 30.0 dB; budget min_flops_4bit=0.4"
    assert planned.plan(max_8bit_flops=0.5).attention == planned.attention
    for budget in ({"min_flops_4bit": 0.9}, {"max_high_precision_linears": 0}):
        assert planned.plan(**budget).attention == first.attention


def test_a_model_follows_the_budget(measured, inputs):
    entries = measured.attention[""]
    entries = {**entries, "1": dataclasses.replace(entries["1"], effect=1.0)}
    planned = dataclasses.replace(measured, attention={"": entries}).plan(min_flops_4bit=0.8)
    assert staying(planned) == {"[1]"}
    model = make()
    tahf4.apply_recipe(model, planned)
    notes = tahf4.lower(tahf4.capture(model, (inputs[0],)), options=OPTIONS).notes["attention"]
    assert notes[0].endswith("int8") and re.search(r"high precision, sensitivity: effect on .*=0\.8$", notes[1])
