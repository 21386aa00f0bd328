"""Every linear has a decision and its reason."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import GRAPH, plans
from models import Stack, wan
from torch import Tensor, nn

import tahf4_compiler as tahf4


def plan_of(model, *args, **options):
    return {d.module: d for d in tahf4.lower(tahf4.capture(model, args), options=options).plan}


def test_keep_takes_regular_expressions_on_module_paths():
    plan = plan_of(Stack().eval(), torch.randn(4, 64), keep=[r"blocks\.0\.", r"\.down$"])
    high = {path for path, d in plan.items() if d.decision == "high_precision"}
    assert high == {"first", "last", "blocks.0.up", "blocks.0.down", "blocks.1.down", "blocks.2.down"}
    assert plan["blocks.0.up"].reason == r"kept: 'blocks\\.0\\.' matches"


def test_a_keep_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(tahf4.PatternError, match=r"'blocks\\\\.9' matches none of the 8 linears"):
        plan_of(Stack().eval(), torch.randn(4, 64), keep=[r"blocks\.9"])
    with pytest.raises(tahf4.PatternError, match="not a regular expression"):
        plan_of(Stack().eval(), torch.randn(4, 64), keep=["("])
    with torch.no_grad(), pytest.raises(Exception, match="matches none of"):
        torch.compile(Stack().eval(), backend="tahf4", options={**GRAPH, "keep": ["nothing"]})(torch.randn(4, 64))


def test_keep_on_the_model_holds_for_regional_compilation(tmp_path):
    model, inputs = wan()
    names = tahf4.keep(model, [r"blocks\.1\.ffn"])
    assert names == ["blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2"]
    with torch.no_grad():
        model.compile_repeated_blocks(backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})
        model(**inputs)
    first, second = plans(tmp_path)
    assert all(d["decision"] == "hif4" for d in first)
    assert [d["module"] for d in second if d["decision"] != "hif4"] == ["ffn.net.0.proj", "ffn.net.2"]
    with pytest.raises(tahf4.PatternError):
        tahf4.keep(model, ["nothing"])


def test_bytes_are_those_of_36_byte_units():
    plan = plan_of(Stack(dim=100, hidden=130).eval(), torch.randn(4, 100))
    up = plan["blocks.0.up"]
    assert (up.k, up.n, up.bytes_before, up.bytes_after) == (100, 130, 100 * 130 * 4, 130 * 2 * 36)
    assert up.flops == 2 * 4 * 100 * 130
    first = plan["first"]
    assert first.bytes_after == first.bytes_before


class Odd(nn.Module):
    """Linears that cannot or should not be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(64, 64)
        self.small = nn.Linear(64, 8)
        self.computed = nn.Linear(64, 64)
        self.register_buffer("table", torch.randn(64, 64))

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        linear = nn.functional.linear
        twice = self.plain(self.plain(x))
        return twice, self.small(x), linear(x, self.computed.weight * 2), linear(x, self.table), linear(x, w)


def test_what_cannot_be_quantized_says_why(tmp_path):
    x, w = torch.randn(4, 64), torch.randn(64, 64)
    with torch.no_grad():
        torch.compile(Odd().eval(), backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})(x, w)
    (plan,) = plans(tmp_path)
    reasons = [(d["module"], d["decision"], d["reason"]) for d in plan]
    assert reasons[0][:2] == ("plain", "hif4"), "called twice, planned once"
    assert reasons[1] == ("small", "high_precision", "shape: 64 -> 8 features, less than 64")
    assert "computed in the graph" in reasons[2][2]
    assert "not a parameter" in reasons[3][2]
    assert "not a parameter" in reasons[4][2]
    assert len(plan) == 5


def test_min_features_is_an_option_of_the_pass():
    plan = plan_of(Odd().eval(), torch.randn(4, 64), torch.randn(64, 64), **{"plan.min_features": 8})
    assert plan["small"].decision == "hif4"
    with pytest.raises(tahf4.OptionError, match="expected int"):
        plan_of(Stack().eval(), torch.randn(4, 64), **{"plan.min_features": "many"})
    with pytest.raises(tahf4.OptionError, match="no option 'typo'"):
        plan_of(Stack().eval(), torch.randn(4, 64), **{"plan.typo": 1})


def test_zero_matches_is_a_warning(caplog):
    with torch.no_grad():
        torch.compile(nn.Linear(8, 8), backend="tahf4", options=GRAPH)(torch.randn(2, 8))
    assert "Linear: nothing runs in 4 bits: 1 of 1 linears: shape: 8 -> 8 features" in caplog.text


def test_plan_json_has_one_object_a_linear():
    lowered = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)))
    plan = json.loads(lowered.plan_json())
    assert len(plan) == 8
    needed = {"module", "k", "n", "decision", "reason", "bytes_before", "bytes_after"}
    assert all(needed <= set(entry) for entry in plan)
    assert {entry["decision"] for entry in plan} == {"hif4", "high_precision"}
