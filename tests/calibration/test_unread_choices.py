"""Choices and options that nothing would read are refused; a recipe records those alone that were read."""

from __future__ import annotations

import pytest
import torch
from models import Stack
from tahf4_compiler.tools.evaluation import embeddings
from tahf4_compiler.tools.evaluation.rows import ROWS
from tahf4_compiler.tools.reproduction.run import SETTINGS

import tahf4_compiler as tahf4
from tahf4_compiler.calibration.choices import MASKS, check_choices

GRAPH = {"inductor": False}
FAST = {"scale_search": "", "sensitivity": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def calibration():
    torch.manual_seed(0)
    model, x = Stack(1).eval(), torch.randn(32, 64)
    with torch.no_grad(), tahf4.calibrate(model, options=GRAPH, percentile=99) as found:
        model(x)
    return found


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        *(({"mask": mask, "weight_exponent": 0.2}, "does not read weight_exponent=0.2; leave weight_exponent out")
          for mask in (None, "layer_search", "network_search")),
        *(({"mask": mask, "percentile": 95.0}, "does not read percentile=95.0; leave percentile out")
          for mask in (None, "max", "rms", "layer_search")),
        ({"weight_exponent": 0.5}, "masks that read it: 'max', 'percentile', 'rms'"),
        ({"mask": None, "combine": "mean"}, "mask=None does not read combine='mean'"),
        ({"rotate": False, "block": 128}, "rotate=False rotates by no block, and block is 128"),
        ({"rotate": "no"}, "rotate is 'no'; expected True or False"),
        ({"sensitivity": "no"}, "sensitivity is 'no'; expected True or False"),
        ({"step_activation_bits": 8}, "high_precision_steps, which names none"),
        ({"step_activation_bits": 8, "high_precision_steps": (0,), "activation_bits": 8}, "gives all activations"),
        ({"step_activation_bits": 8, "high_precision_steps": (0,), "activation_bits": 16}, "gives all activations"),
        *(({"scale_span": span, "activation_bits": bits}, f"with activation_bits={bits} each unit has a scale")
          for span, bits in (("auto", 8), ("row", 16), (2, 8))),
    ],
)  # fmt: skip
def test_choices_that_nothing_reads_are_refused(calibration, choices, message):
    with pytest.raises(tahf4.OptionError) as error:
        calibration.recipe(**choices)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("choices", "read"),
    [
        ({"mask": None}, {}),
        ({"mask": "max"}, {"weight_exponent": 0.5, "combine": "max", "column": "max"}),
        ({"mask": "rms", "weight_exponent": 0.2}, {"weight_exponent": 0.2, "combine": "max", "column": "norm"}),
        ({"mask": "percentile", "combine": "mean"},
         {"weight_exponent": 0.5, "percentile": 99.0, "combine": "mean", "column": "max"}),
        ({"mask": "layer_search"}, {"combine": "max", "column": "norm"}),
        ({"percentile": 95}, {"percentile": 95.0, "combine": "max", "column": "norm"}),
    ],
)  # fmt: skip
def test_a_recipe_records_the_choices_that_its_mask_read(calibration, choices, read):
    made = calibration.recipe(**FAST, **choices).provenance["choices"]
    names = ("percentile", "weight_exponent", "combine", "column")
    assert {name: made[name] for name in names} == dict.fromkeys(names) | read
    assert (made["block"], made["rotate"]) == (64, True)


@pytest.mark.parametrize("choices", [{"rotate": False}, {"block": 0}, {"rotate": False, "block": 0}])
def test_a_recipe_without_rotation_records_none(calibration, choices):
    recipe = calibration.recipe(mask="max", **FAST, **choices)
    assert {entry.hadamard_block for entry in recipe.experts[""].values()} == {0}
    assert recipe.provenance["choices"]["rotate"] is False


def test_fixed_masks_have_an_exponent_of_a_half(calibration):
    for mask in ("max", "percentile", "rms"):
        one, two = (calibration.recipe(mask=mask, **FAST, weight_exponent=value) for value in (None, 0.5))
        for name, entry in one.experts[""].items():
            assert entry.weight_exponent == 0.5 and torch.equal(entry.mask, two.experts[""][name].mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ["blocks"]}, "option 'keep': leave it out, and keep linears of the model itself by tahf4.keep(model"),
        ({"activation_bits": 8}, "option 'activation_bits': leave it out, and choose them by recipe(activation_bits="),
        ({"activation_bits": {"up": 16, "": 4}}, "by recipe(activation_bits=...)"),
        ({"scale_span": "row"}, "option 'scale_span': leave it out, and choose it by recipe(scale_span=...)"),
        ({"rounding": "least_error"}, "option 'rounding': leave it out, and choose it by recipe(rounding=...)"),
        ({"rotate.block": 0}, "option 'rotate.block': the pass 'rotate' is not part of the calibration's pipeline"),
        ({"rotate.block": 0}, "and choose the rotation by recipe(block=..., rotate=...)"),
        ({"disable_passes": ["rotate"]}, "option 'disable_passes': the pass 'rotate' is not part of"),
        ({"scale_search.by": "squared"}, "and choose the search by recipe(scale_search=...)"),
        ({"upcast.dtype": "float32"}, "and give it to what compiles the model"),
    ],
)
def test_options_that_a_calibration_does_not_read_are_refused(options, message):
    with pytest.raises(tahf4.OptionError) as error:
        tahf4.calibrate(Stack(1), options={**GRAPH, **options})
    assert message in str(error.value)


def test_options_that_a_calibration_reads_are_taken():
    read = {"attention": "int8", "attention.value_bits": 16, "plan.min_features": 32, "activation_bits": 4}
    tahf4.calibrate(Stack(1), options={**GRAPH, **read, "disable_passes": ["attention"]})


def test_the_rows_of_the_evaluations_name_no_choice_that_nothing_reads():
    rows = [row.recipe for row in (*ROWS, *(setting.row for setting in SETTINGS))]
    rows += [choices for _, choices in embeddings.ROWS]
    asked = [choices for choices in rows if choices is not None and choices.get("mask") in MASKS]
    assert len(asked) > 40
    for choices in asked:
        check_choices(**{"mask": "network_search", **choices})
