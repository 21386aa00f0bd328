"""A calibration that measures attention sees each one that would run in 8 bits."""

from __future__ import annotations

import pytest
from graphs import assert_pass
from tahf4_compiler.passes.observe_attention import ObserveAttention

ASKED = {"attention": "int8", "kernels": "reference"}
GRAPH = """
    x: f32[2, 4]
    q: f32[2, 3, 130, 64]
    k: f32[2, 3, 130, 64]
    v: f32[2, 3, 130, 64]
{input}    w: param[4, 4] = "blocks.0.attn.to_q.weight"
    u: param[4, 4] = "blocks.0.attn.to_k.weight"
    z: param[4, 4] = "blocks.0.up.weight"
    @ blocks.0 Block, blocks.0.attn Attn, blocks.0.attn.to_q Linear
    a = linear(x, w){first}
    @ blocks.0 Block, blocks.0.attn Attn, blocks.0.attn.to_k Linear
    b = linear(x, u){second}
    @ blocks.0 Block, blocks.0.up Linear
    c = linear(x, z){third}
    @ blocks.0 Block, blocks.0.attn Attn
    y = scaled_dot_product_attention(q, k, v, None, 0.0, {causal}){call}
    return y, a, b, c
"""
HIF4, BOUNDARY = "  # hif4: in a block", "  # high_precision: boundary: outside"


def observed(first, second=BOUNDARY, causal=False):
    """Return a graph with decisions about two linears of the attention's module, observed, and as it was."""
    before = GRAPH.format(input="", call="", first=first, second=second, third=HIF4, causal=causal)
    call = f"\n    s = tahf4.observe_attention(q, k, v, None, {causal}, None, False, y, o)"
    after = GRAPH.format(input="    o: observer of w+u\n", call=call, first="", second="", third="", causal=causal)
    same = GRAPH.format(input="", call="", first="", second="", third="", causal=causal)
    return before, after, same


@pytest.mark.parametrize("causal", [False, True])
def test_the_operands_are_shown_with_all_linears_of_its_module(causal):
    before, after, _ = observed(HIF4, causal=causal)
    ran = assert_pass(before, ObserveAttention(), after, **ASKED)
    assert ran.record.matches == 1 and ran.notes[0].endswith("int8")
    assert_pass(before, ObserveAttention(value_bits=16), after, **ASKED)


@pytest.mark.parametrize("reason", ["kept: 'q' matches", "sensitivity 0.3", "this step runs in high precision"])
def test_what_was_chosen_before_does_not_hide_it(reason):
    before, after, _ = observed(f"  # high_precision: {reason}")
    assert_pass(before, ObserveAttention(), after, **ASKED)


def test_what_would_not_run_in_8_bits_is_not_shown():
    before, _, same = observed(BOUNDARY)
    assert_pass(before, ObserveAttention(), same, **ASKED)
    before, _, same = observed(HIF4)
    assert_pass(before, ObserveAttention(min_tokens=131), same, **ASKED)
    assert_pass(before, ObserveAttention(), same)
