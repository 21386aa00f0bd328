"""What ``tahf4 bench --cpu`` measures, on small sizes."""

from __future__ import annotations

import pytest
import torch
from tahf4_compiler.backends import cpu
from tahf4_compiler.tools import attention_bench, cpu_bench

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


def test_every_part_is_measured_and_shown(monkeypatch):
    calls = []
    # What is compiled is seen elsewhere; here it would take minutes.
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(cpu_bench, "interleaved", lambda functions, rounds: (
        calls.append([f() is None for f in functions.values()]),
        {name: {"seconds": 0.5 + i, "spread": 0.1} for i, name in enumerate(functions)},
    )[1])
    found = {
        "facts": cpu_bench.facts(),
        "rounds": 3,
        "quantize": cpu_bench.quantizing([(3, 64)], 3),
        "linear": cpu_bench.linears([(2, 64, 8)], 3),
        "attention": cpu_bench.attention([(5, 2, 64)], 3),
        "block": {
            "dim": 64, "ffn": 128, "tokens": 5, "relative_error": 0.1, "weight_bytes": {"float32": 8, "hif4": 1},
            "times": {n: {"seconds": 1.0, "spread": 0.0} for n in ("float32", "W4A4")},
        },
    }
    found["pipeline"] = cpu_bench.pipeline(3)
    text = cpu_bench.markdown(found)
    assert "| W4A4 of bfloat16 |" in text
    assert len(calls) == 4 and not any(map(any, calls))
    assert "| 3 x 64 |" in text and "| 2 x 64 x 8 |" in text and "0.125" in text
    assert "| 5 x 2 x 64 | 500.0 | 1500.0 | 0.33 | 10% |" in text


def test_times_are_medians_in_turn():
    order = []
    times = cpu_bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, least=0.0)
    assert order == ["a", "a", "b", "b"] + ["a", "a", "b", "b"] * 3
    assert set(times) == {"a", "b"} and times["a"]["seconds"] > 0


def test_a_block_is_measured_with_attention_in_8_bits(monkeypatch):
    options = []
    monkeypatch.setattr(torch, "compile", lambda model, **given: options.append(given) or model)
    found = attention_bench.block(64, 128, 2, 300, 2)
    assert [given["options"] for given in options] == [None, None, {"attention": "int8"}]
    assert all(len(times) == 2 for times in found["times"].values()) and set(found["errors"].values()) == {0.0}
    found["times"] = {name: [1.0 / (i + 1), 1.0 / (i + 1)] for i, name in enumerate(found["times"])}
    text = attention_bench.markdown(found, {"threads": 2})
    assert "| W4A4, attention in 8 bits | 0.33 | 3.00 | 0% | 0.0000 |" in text and "64 / 128, 300 tokens" in text
