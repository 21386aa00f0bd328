"""``calibration.recipe(scale_span="auto")``: spans chosen for each activation by measured error."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import Stack
from torch import nn

import tahf4_compiler as tahf4
from tahf4_compiler.calibration import making, spans
from tahf4_compiler.calibration.choices import check_choices
from tahf4_compiler.errors import CalibrationError, OptionError, RecipeError
from tahf4_compiler.format import hif4
from tahf4_compiler.format.transforms import multipliers, transform

GRAPH = {"inductor": False}
BARE = {"mask": None, "scale_search": "", "sensitivity": False, "scale_span": "auto"}
WIDTHS = ("row", 4, 2)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Three linears whose units are alike, alike in each half, and different, and count as much in the output."""

    def __init__(self) -> None:
        super().__init__()
        units = torch.arange(8)
        powers = (0 * units, units // 4, units % 2)
        self.factors = [(60.0**power).repeat_interleave(64) for power in powers]
        self.linears = nn.ModuleList(nn.Linear(512, 64, bias=False) for _ in powers)
        for linear, factor in zip(self.linears, self.factors, strict=True):
            linear.weight.div_(factor)

    def read(self, x):
        return [x * factor for factor in self.factors]

    def forward(self, x):
        return sum(linear(y) for linear, y in zip(self.linears, self.read(x), strict=True))


def rows():
    return torch.randn(200, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    with torch.no_grad():
        return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def calibration(model):
    with torch.no_grad(), tahf4.calibrate(model, options=GRAPH, rows=200) as found:  # all of them
        model(rows())
    return found


def entries(recipe):
    return recipe.experts[""]


def error(x, weight, entry, span, rounding):
    """The error of a product in dB, of operands that are quantized here."""
    forward, backward = multipliers(x.shape[1], None, entry.seed)
    sides = (transform(x, forward, entry.hadamard_block), transform(weight, backward, entry.hadamard_block))
    a, b = (hif4.dequantize(hif4.quantize(side, span=span, rounding=rounding)) for side in sides)
    return 10 * math.log10(float((a @ b.T - x @ weight.T).square().sum()))


@pytest.mark.parametrize(
    ("tolerance", "rounding"), [(0, None), (0.8, None), (0.5, "bfloat16_half_away"), (99, "bfloat16_half_away")]
)
def test_an_activation_has_the_widest_span_within_the_tolerance(model, calibration, tolerance, rounding):
    recipe = calibration.recipe(**BARE, span_tolerance=tolerance, rounding=rounding)
    chosen = []
    for i, x in enumerate(model.read(rows())):
        entry, weight = entries(recipe)[f"linears.{i}"], model.linears[i].weight
        unit = error(x, weight, entry, 1, rounding or "least_error")
        costs = {span: error(x, weight, entry, span, rounding or "half_away") - unit for span in WIDTHS}
        wanted = next((span for span in WIDTHS if costs[span] <= tolerance), 1)
        assert entry.span == hif4.check_span(wanted), costs
        assert entry.rounding == (rounding or ("least_error" if wanted == 1 else "half_away"))
        much = f": {costs[wanted]:.2f} dB more error than with a scale for each unit" if wanted != 1 else ""
        refused = ", ".join(f"{span} {costs[span]:+.2f} dB" for span in [*WIDTHS, 1][: [*WIDTHS, 1].index(wanted)])
        assert entry.span_reason == f"span {wanted}{much}" + (f"; refused: {refused}" if refused else "")
        chosen.append(wanted)
    if (tolerance, rounding) == (0.5, "bfloat16_half_away"):
        assert chosen == ["row", 4, 1]


@pytest.mark.parametrize("search", ["squared", "reconstruct"])
def test_weights_and_reports_have_what_was_chosen_and_files_keep_it(model, calibration, search, tmp_path):
    choices = {**BARE, "scale_search": search, "rounding": "half_away", "span_tolerance": 0.9}
    recipe = calibration.recipe(**choices)
    assert [entry.span for entry in entries(recipe).values()] == [0, 4, 1]
    for entry in entries(recipe).values():
        assert all(hif4.holds_span(packed, entry.span or "row") for packed in entry.packed.values())
    recipe.save(tmp_path / "r.safetensors")
    again = tahf4.Recipe.load(tmp_path / "r.safetensors")
    assert [e.span_reason for e in entries(again).values()] == [e.span_reason for e in entries(recipe).values()]
    tahf4.apply_recipe(model, again)
    lowered = tahf4.lower(tahf4.capture(model, (rows(),)), options=GRAPH)
    assert {d.module: d.span for d in lowered.plan} == {"linears.0": 0, "linears.1": 4, "linears.2": 1}
    assert "span row: 0." in lowered.report() and "span 1; refused: row +" in lowered.report()


def test_it_follows_the_search_of_masks_and_budgets_keep_its_reason():
    torch.manual_seed(0)
    model = Stack(1, 128, 128).eval()
    with tahf4.calibrate(model, options=GRAPH) as found:
        model(torch.randn(64, 128))
    recipe = found.recipe(
        scale_search="", scale_span="auto", span_tolerance=99, max_high_precision_linears=1
    )  # fmt: skip
    assert {entry.span for entry in entries(recipe).values()} == {0}
    reasons = {d.decision: d.reason for d in tahf4.quantize_(model, recipe) if "rank" in d.reason}
    assert "effect on the output" in reasons["hif4"] and "; span row: " in reasons["hif4"]
    assert "span" not in reasons["high_precision"]


def test_where_units_cannot_share_a_scale_each_has_its_own(calibration):
    recipe = calibration.recipe(**BARE, span_tolerance=99, rotate=False)
    assert {(e.span, e.rounding) for e in entries(recipe).values()} == {(1, "least_error")}
    assert all(e.span_reason.startswith("span 1: it has no mask and no rotation") for e in entries(recipe).values())


@pytest.mark.parametrize("fact", [lambda device: False, None])
def test_where_a_span_saves_no_time_none_is_tried_but_with_a_tolerance(calibration, fact, monkeypatch):
    find = spans.host.find
    monkeypatch.setattr(
        spans.host, "find", lambda name, *given: fact if name == "spans_save_time" else find(name, *given)
    )
    plain = calibration.recipe(**BARE)
    assert {(e.span, e.rounding) for e in entries(plain).values()} == {(1, "least_error")}
    said = {e.span_reason for e in entries(plain).values()}
    assert said == {"span 1: a wider one saves no time in products on cpu; with a span_tolerance it would be tried"}
    assert {e.span for e in entries(calibration.recipe(**BARE, span_tolerance=99)).values()} == {0}
    assert {e.span for e in entries(calibration.recipe(**{**BARE, "scale_span": "row"})).values()} == {0}


def test_each_activation_of_an_expert_goes_by_the_device_of_its_own_weights(calibration, monkeypatch):
    """An expert may lie on several devices, which this process has not: what is asked of each is answered here."""
    idle = "span 1: a wider one saves no time on this device"
    answers = iter(["", "", "", idle, "", ""])
    monkeypatch.setattr(making, "idle_span", lambda device: next(answers))
    alike, apart = (list(entries(calibration.recipe(**BARE)).values()) for _ in "ab")
    assert 1 not in [entry.span for entry in alike[:2]]
    assert (apart[0].span, apart[0].rounding, apart[0].span_reason) == (1, "least_error", idle)
    others = [[(e.span, e.rounding, e.span_reason) for e in found[1:]] for found in (alike, apart)]
    assert others[0] == others[1] and next(answers, None) is None


def test_the_processor_saves_time_where_its_products_are_in_integers(calibration, monkeypatch):
    assert spans.idle_span(torch.device("cpu")) == ""
    assert "on meta" in spans.idle_span(torch.device("meta"))
    monkeypatch.setenv("TAHF4_CPU_ISA", "none")
    assert "on cpu" in spans.idle_span(torch.device("cpu"))


def test_rows_of_one_and_two_units_try_no_span_that_is_longer():
    torch.manual_seed(0)
    model = Stack(1).eval()
    with tahf4.calibrate(model, options=GRAPH) as found:
        model(torch.randn(64, 64))
    said = entries(found.recipe(**BARE, span_tolerance=0.0))
    assert said["blocks.0.up"].span_reason == "span 1: the row is one unit"
    refused = said["blocks.0.down"].span_reason
    assert refused.startswith("span 1; refused: row ") and "," not in refused


def test_without_sample_rows_or_a_calibration_nothing_is_chosen(model, tmp_path):
    with tahf4.calibrate(model, options=GRAPH, rows=0) as found:
        model(rows())
    with pytest.raises(CalibrationError, match="scale_span='auto' needs sample rows"):
        found.recipe(**BARE)
    for ask in (
        lambda: tahf4.quantize_(Net(), scale_span="auto"),
        lambda: tahf4.Options.parse({"scale_span": "auto"}),
        lambda: tahf4.TaHF4Config(scale_span="auto"),
    ):
        with pytest.raises(OptionError, match="'auto', which chooses by errors that only a calibration measures"):
            ask()


def test_choices_that_do_not_fit_are_refused(calibration, tmp_path):
    for wrong in (-0.1, math.nan, math.inf, True, "0.4"):
        with pytest.raises(OptionError, match="span_tolerance is .*; expected a number of dB"):
            calibration.recipe(**BARE, span_tolerance=wrong)
    with pytest.raises(OptionError, match="'least_error', which .* scale_span is 'auto'"):
        calibration.recipe(**BARE, rounding="least_error")
    recipe = calibration.recipe(**BARE)
    odd = {name: dataclasses.replace(entry, span_reason=["no text"]) for name, entry in entries(recipe).items()}
    dataclasses.replace(recipe, experts={"": odd}).save(tmp_path / "odd.safetensors")
    with pytest.raises(RecipeError, match="the reason of the span is"):
        tahf4.Recipe.load(tmp_path / "odd.safetensors")


def test_a_tolerance_without_a_choice_is_refused():
    with pytest.raises(OptionError, match='span_tolerance=0.1 is for scale_span="auto", and scale_span is 1'):
        check_choices(span_tolerance=0.1)
