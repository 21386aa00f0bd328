"""A recipe measures each attention in 8 bits, and keeps those in high precision whose error is above a tolerance."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from tahf4_compiler.passes import CALIBRATION
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tahf4_compiler as tahf4
from tahf4_compiler.calibration import attention as measuring
from tahf4_compiler.errors import CalibrationError, OptionError, PackedError, RecipeError
from tahf4_compiler.files.tensors import load_tensors
from tahf4_compiler.packed.attention import attention_of
from tahf4_compiler.packed.config import TaHF4Config, describe
from tahf4_compiler.recipe.entries import AttentionEntry
from tahf4_compiler.recipe.recipe import FORMAT, Recipe

QUICK = {"mask": None, "scale_search": "", "sensitivity": False}
TOKENS = 16
OPTIONS = {"inductor": False, "kernels": "reference", "attention.min_tokens": TOKENS}
ASKED = {**OPTIONS, "attention": "int8"}
STAYS = "high precision, sensitivity: SQNR"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, 2, 64)).unbind(-3))
        return self.out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.up = Attention(), nn.Linear(128, 128)

    def forward(self, x):
        return self.up(x + self.attn(x))


def make():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(2))).eval().requires_grad_(False)
    model[1].attn.qkv.weight[:256] *= 30  # a sharp softmax: scores of 8 bits are far from those of 32
    return model


def inputs(count=2):
    return [torch.randn(2, TOKENS, 128, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def calibration():
    with torch.no_grad():
        model = make()
        with tahf4.calibrate(model, options=ASKED) as calibration:
            for x in inputs():
                model(x)
    return calibration


@pytest.fixture(scope="module")
def recipe(calibration):
    with torch.no_grad():
        return calibration.recipe(**QUICK, attention_tolerance=1e-3)


def notes(model, **options):
    return tahf4.lower(tahf4.capture(model, (inputs()[0],)), options={**ASKED, **options}).notes["attention"]


def staying(found):
    return [note.split(" (")[0] for note in found if STAYS in note]


def test_the_error_is_that_of_the_operator_on_the_calls(calibration, recipe):
    (error, norm), qkv = (0.0, 0.0), []
    calibration.models[""][1].attn.qkv.register_forward_hook(lambda module, args, out: qkv.append(out))
    for x in inputs():
        calibration.models[""](x)
    calibration.models[""][1].attn.qkv._forward_hooks.clear()
    for out in qkv:
        given = [t.transpose(1, 2) for t in out.unflatten(-1, (3, 2, 64)).unbind(-3)]
        wanted = sdpa(*given)
        error += (torch.ops.tahf4.attention(*given) - wanted).square().sum()
        norm += wanted.square().sum()
    found = recipe.attention[""]
    assert list(found) == ["0.attn", "1.attn"]
    assert found["1.attn"].sqnr_db == pytest.approx(-10 * math.log10(error / norm), abs=0.01)
    assert found["1.attn"].linears == ("1.attn.qkv", "1.attn.out")
    assert [entry.decision for entry in found.values()] == ["int8", "high_precision"]
    assert found["1.attn"].reason.endswith("dB in 8 bits, less than 30.0 dB") and found["0.attn"].sqnr_db > 40


@pytest.mark.parametrize("mask", [None, "causal", "of keys", "of all", "of entries"])
def test_some_queries_have_the_errors_that_they_have_among_all(mask, monkeypatch):
    monkeypatch.setattr(measuring, "QUERIES", 8)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 20, 64), torch.randn(2, 2, 24, 64), torch.randn(2, 2, 24, 64)
    masks = {
        "causal": torch.ones(20, 24, dtype=torch.bool).tril(), "of keys": torch.rand(1, 24) > 0.3,
        "of all": torch.rand(20, 24) > 0.3, "of entries": torch.randn(2, 1, 20, 24),
    }  # fmt: skip
    wanted = sdpa(q, k, v, masks.get(mask), enable_gqa=True)[:, :, ::3]
    eight = torch.ops.tahf4.attention(q, k, v, masks.get(mask), False, None, True)[:, :, ::3]
    given = None if mask == "causal" else masks.get(mask)
    few, error, norm = measuring._squares((q, k, v, given, mask == "causal", None, True), (4, 8), 8, True)
    assert norm == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    assert error == pytest.approx(float((eight - wanted).square().sum()), rel=1e-3) and few > 10 * error


def test_a_model_follows_its_recipe_plain_and_packed(recipe):
    model = make()
    tahf4.apply_recipe(model, recipe)
    assert staying(notes(model)) == ["1.attn"]
    assert "its linears stay: kept" in notes(model, keep=[r"1\.attn"])[1]
    packed = copy.deepcopy(model)
    tahf4.quantize_(packed)  # by what is attached
    again = make()
    tahf4.quantize_(again, recipe)
    for each in (packed, copy.deepcopy(again)):
        assert staying(notes(each)) == ["1.attn"]
    tahf4.apply_recipe(model, None)
    assert attention_of(again) and not attention_of(model)


def test_blocks_of_one_graph_follow_it_each(recipe, monkeypatch):
    model, x = make(), inputs()[0]
    tahf4.quantize_(model, recipe)
    calls = []
    monkeypatch.setattr("tahf4_compiler.ops.attention.check_attention", lambda q, *rest: calls.append(q))
    for block in model:
        block.compile(backend="tahf4", options=ASKED)
    model(x)
    calls.clear()
    found = []
    for block in model:
        x, before = block(x), len(calls)
        found.append(before)
    assert [b - a for a, b in zip([0, *found], found, strict=False)] == [1, 0]


def test_an_attention_that_the_compiled_block_holds_itself_follows_it():
    model = Attention().requires_grad_(False)
    entry = AttentionEntry(("qkv", "out"), 10.0, "high_precision", "sensitivity: SQNR 10.0 dB")
    tahf4.apply_recipe(model, Recipe({"": {}}, attention={"": {"": entry}}))
    assert STAYS in notes(model)[0]


def test_the_file_holds_it_and_one_without_is_as_it_was(recipe, calibration, tmp_path):
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    assert Recipe.load(path).attention == recipe.attention
    assert recipe.provenance["choices"]["attention_tolerance"] == 1e-3
    plain = calibration.recipe(**QUICK, attention="high_precision")
    assert plain.attention == {}
    plain.save(path)
    _, header = load_tensors(path, FORMAT, RecipeError)
    assert "attention" not in header and "attention" not in json.dumps(header["provenance"]["choices"])


@pytest.mark.parametrize("changes", [{"sqnr_db": "20"}, {"decision": "int4"}, {"reason": 3}, {"linears": []}])
def test_a_damaged_entry_is_refused(recipe, changes, tmp_path):
    entries = dict(recipe.attention[""])
    entries["1.attn"] = dataclasses.replace(entries["1.attn"], **changes)
    dataclasses.replace(recipe, attention={"": entries}).save(tmp_path / "r.safetensors")
    with pytest.raises(RecipeError, match=r"1\.attn: an attention is .* damaged"):
        Recipe.load(tmp_path / "r.safetensors")


def test_a_folder_holds_it(recipe):
    model = make()
    tahf4.quantize_(model, recipe)
    listed = describe(model)
    assert [path for path, values in listed.items() if "attention" in values] == ["1.attn.qkv", "1.attn.out"]
    assert TaHF4Config(linears=listed).linears == listed
    listed["1.attn.qkv"]["attention"] = True
    with pytest.raises(PackedError, match="attention is True, expected a reason"):
        TaHF4Config(linears=listed)


def test_an_earlier_recipe_does_not_hide_an_attention(recipe):
    model = make()
    tahf4.apply_recipe(model, recipe)
    found = tahf4.lower(tahf4.capture(model, (inputs()[0],)), passes=CALIBRATION, options=ASKED)
    assert [note.rpartition(" ")[2] for note in found.notes["attention"]] == ["int8", "int8"]


def test_what_cannot_be_measured_is_refused(calibration, monkeypatch):
    for choices in ({"attention": "int4"}, {"attention_tolerance": -1}, {"attention_tolerance": "low"}):
        with pytest.raises(OptionError, match=next(iter(choices))):
            calibration.recipe(**QUICK, **choices)
    with monkeypatch.context() as patched:
        patched.setattr(calibration, "joined", ["inputs", "sequence"])
        with pytest.raises(CalibrationError, match="ranks divide it"):
            calibration.recipe(**QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(calibration.kept, "calls", {})
        with pytest.raises(CalibrationError, match="the calibration kept none"):
            calibration.recipe(**QUICK)
    with torch.compiler.set_stance("force_eager"), pytest.raises(CalibrationError, match="was not observed"):
        calibration.recipe(**QUICK)


def test_an_attention_of_no_finite_error_stays():
    entry = measuring._entry(("a",), [math.nan], 0.01, 0)
    assert entry.decision == "high_precision" and math.isfinite(entry.sqnr_db)
