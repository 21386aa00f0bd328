"""Attention runs in 8 bits where it is asked for and can, and the report says why elsewhere."""

from __future__ import annotations

import re

import pytest
from graphs import OptionError, Text, assert_pass, run_passes
from tahf4_compiler.passes.attention import Attention

from tahf4_compiler.options import Options

ASKED = {"attention": "int8", "kernels": "reference"}
HIF4 = {**ASKED, "attention": "hif4"}
QKV = """
q: {dtype}[2, 3, {rows}, {channels}]
k: {dtype}[2, 3, {keys}, {channels}]
v: {dtype}[2, 3, {keys}, {channels}]
m: {mask}
"""


def qkv(dtype="f32", rows=130, keys=150, channels=64, mask="f32[130, 150]"):
    return QKV.format(dtype=dtype, rows=rows, keys=keys, channels=channels, mask=mask)


def text(line, **sizes):
    return f"{qkv(**sizes)}@ blocks.0 Block, blocks.0.attn Attn\ny = {line}\nreturn y"


SDPA = "scaled_dot_product_attention(q, k, v)"


@pytest.mark.parametrize(
    ("before", "after", "dtype", "mask"),
    [
        ("q, k, v", "q, k, v, None, False, None, False, 8", "f32", "f32[130, 150]"),
        ("q, k, v, m", "q, k, v, m, False, None, False, 8", "f32", "bool[130, 150]"),
        ("q, k, v, m, 0.0, False, scale=0.3", "q, k, v, m, False, 0.3, False, 8", "bf16", "bf16[2, 1, 1, 150]"),
        ("q, k, v, None, 0.0, True", "q, k, v, None, True, None, False, 8", "f16", "f32[130, 150]"),
        ("q, k, v, enable_gqa=True", "q, k, v, None, False, None, True, 8", "f32", "f32[130, 150]"),
    ],
)
def test_an_attention_becomes_one_of_8_bits(before, after, dtype, mask):
    before, after = f"scaled_dot_product_attention({before})", f"tahf4.attention({after})"
    sizes = {"dtype": dtype, "mask": mask}
    ran = assert_pass(text(before, **sizes), Attention(), text(after, **sizes), **ASKED)
    assert ran.notes == ["blocks.0.attn (130 x 150 tokens, 3 heads of 64): int8"]
    assert ran.record.matches == 1


def test_with_hif4_queries_and_keys_have_4_bits():
    after = text("tahf4.attention(q, k, v, None, False, None, False, 4)")
    ran = assert_pass(text(SDPA), Attention(), after, run=False, **HIF4)
    assert ran.notes == ["blocks.0.attn (130 x 150 tokens, 3 heads of 64): hif4"]


@pytest.mark.parametrize(("asked", "bits"), [(ASKED, 8), (HIF4, 4)])
def test_values_may_have_16_bits(asked, bits):
    after = text(f"tahf4.attention(q, k, v, None, False, None, False, {bits}, 16)")
    ran = assert_pass(text(SDPA), Attention(value_bits=16), after, run=False, **asked)
    assert ran.notes[0].endswith(f"{asked['attention']}, values in 16 bits")
    with pytest.raises(OptionError, match=r"attention\.value_bits is 12; expected 8 or 16"):
        Attention().with_options({"value_bits": 12})


def test_one_that_reads_another_runs_in_8_bits_too():
    two = "z = {0}(q, k, v{1})\ny = {0}(z, k, v{1})"
    before = two.format("scaled_dot_product_attention", "")
    after = two.format("tahf4.attention", ", None, False, None, False, 8")
    where = f"{qkv()}@ blocks.0 Block, blocks.0.attn Attn\n"
    assert_pass(f"{where}{before}\nreturn y", Attention(), f"{where}{after}\nreturn y", **ASKED)


def test_it_stays_unless_it_is_asked_for():
    ran = assert_pass(text(SDPA), Attention())
    assert ran.notes == ["1 in high precision: not asked for, options={'attention': 'int8'}"]
    assert assert_pass("x: f32[4]\ny = neg(x)\nreturn y", Attention()).notes == []


@pytest.mark.parametrize(
    ("line", "sizes", "why"),
    [
        (SDPA, {"keys": 127}, "short: 127 tokens, less than 128"),
        (SDPA, {"rows": 1}, "short: 1 tokens, less than 128"),
        (SDPA, {"dtype": "f64"}, "float64"),
        (SDPA, {"channels": 1025}, "heads of 1025 channels"),
        ("scaled_dot_product_attention(q, k, v, None, 0.5)", {}, "dropout"),
    ],
)
def test_what_it_cannot_do_stays_and_the_report_says_why(line, sizes, why):
    ran = assert_pass(text(line, **sizes), Attention(), run=False, **ASKED)
    (note,) = ran.notes
    assert note.startswith("blocks.0.attn (") and "): high precision, " in note and why in note


def test_a_scale_that_the_graph_computes_stays():
    made = Text.parse(text(SDPA), **ASKED)
    *_, scale, node, _ = made.graph_module.graph.nodes
    node.kwargs = {"scale": scale}
    run_passes(made, Attention())
    assert made.context.notes["attention"][0].endswith("high precision, scale: computed in the graph")


def test_tensors_of_three_axes_stay():
    before = f"q: f32[3, 130, 64]\nk: f32[3, 150, 64]\nv: f32[3, 150, 64]\ny = {SDPA}\nreturn y"
    ran = assert_pass(before, Attention(), **ASKED)
    assert "expected four axes" in ran.notes[0]


def test_the_least_number_of_tokens_is_an_option():
    after = "tahf4.attention(q, k, v, None, False, None, False, 8)"
    sizes = {"rows": 20, "keys": 40}
    assert_pass(text(SDPA, **sizes), Attention(min_tokens=20), text(after, **sizes), **ASKED)
    assert_pass(text(SDPA, **sizes), Attention(min_tokens=21), **ASKED)


@pytest.mark.parametrize(
    ("decisions", "stays"),
    [
        (("high_precision: kept: 'attn'", "high_precision: kept: 'attn'"), True),
        (("high_precision: kept: 'to_q'", "hif4: in a block"), False),
    ],
)
def test_it_goes_with_the_linears_of_its_module(decisions, stays):
    before = f"""
        x: f32[2, 4]
        w: param[4, 4] = "blocks.0.attn.to_q.weight"
        u: param[4, 4] = "blocks.0.attn.to_k.weight"
        z: param[4, 4] = "blocks.0.up.weight"
        {qkv()}
        @ blocks.0 Block, blocks.0.attn Attn, blocks.0.attn.to_q Linear
        a = linear(x, w)  # {decisions[0]}
        @ blocks.0 Block, blocks.0.attn Attn, blocks.0.attn.to_k Linear
        b = linear(x, u)  # {decisions[1]}
        @ blocks.0 Block, blocks.0.up Linear
        c = linear(x, z)  # hif4: in a block
        @ blocks.0 Block, blocks.0.attn Attn
        y = {{}}
        return y, a, b, c
        """
    after = SDPA if stays else "tahf4.attention(q, k, v, None, False, None, False, 8)"
    plain = re.sub(" +# .*", "", before)
    ran = assert_pass(before.format(SDPA), Attention(), plain.format(after), **ASKED)
    said = "high precision, its linears stay: kept: 'attn'" if stays else "int8"
    assert ran.notes == [f"blocks.0.attn (130 x 150 tokens, 3 heads of 64): {said}"]


def test_without_a_kernel_it_stays():
    ran = assert_pass(text(SDPA), Attention(), attention="int8")
    assert ran.notes[0].endswith("high precision, kernel: there is none for cpu here")


def test_values_in_16_bits_stay_on_a_cpu():
    ran = assert_pass(text(SDPA), Attention(value_bits=16), attention="int8")
    assert ran.notes[0].endswith("high precision, kernel: there is none for cpu here with values in 16 bits")


@pytest.mark.parametrize("options", [{}, HIF4])
def test_what_a_model_calls_in_8_bits_or_hif4_itself_has_a_line_too(options):
    codes = """
        q: f32[2, 3, 130, 64]
        k: i8[2, 3, 150, 64]
        v: i8[2, 3, 150, 64]
        s: f32[2, 3, 150, 1]
        t: f32[2, 3, 3, 64]
        y = tahf4.attention_of_codes(q, k, v, s, t)
        return y
        """
    ran = assert_pass(codes, Attention(), run=False, **options)
    assert ran.notes == ["y (130 x 150 tokens, 3 heads of 64): int8, kept: the model calls it"]
    line = "tahf4.attention(q, k, v, None, False, None, False, 4)"
    ran = assert_pass(text(line), Attention(), run=False, **options)
    assert ran.notes == ["blocks.0.attn (130 x 150 tokens, 3 heads of 64): hif4, kept: the model calls it"]


HAND = """
q: f32[6, 130, 64]
k: f32[6, 150, 64]
v: f32[6, 150, 64]
m: f32[130, 150]
@ blocks.0 Block, blocks.0.attn Attn
t = transpose.int(k, 1, 2)
a = {product}
b = {mask}
s = softmax.int({scores}, {axis})
{behind}
return y
"""
DROPPED = "c = dropout(s, 0.5, False)\nd = to.dtype(c, f32)\ny = matmul(d, v)"


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({}, True),
        ({"product": "baddbmm(m, q, t, beta=0, alpha=0.1)", "axis": "2", "behind": "y = bmm(s, v)"}, True),
        ({"mask": "copy_(a, m)"}, True),
        ({"axis": "1"}, False),
        ({"behind": "y = mul(s, 2)"}, False),
        ({"mask": "cumsum(a, 2)"}, False),
        ({"product": "amax(q, [2], True)"}, False),
        ({"scores": "m"}, False),
    ],
)
def test_products_and_a_softmax_by_hand_stay_and_have_a_line(changes, noted):
    usual = {"product": "bmm(q, t)", "mask": "add(a, m)", "scores": "b", "axis": "-1", "behind": DROPPED}
    before = HAND.format(**usual | changes)
    ran = assert_pass(before, Attention(), run=False, **ASKED)
    why = "written by hand: products and a softmax, no scaled_dot_product_attention"
    assert ran.notes == ([f"blocks.0.attn: high precision, {why}"] if noted else [])
    assert assert_pass(before, Attention(), run=False).notes == []


def test_sizes_may_be_dynamic():
    given = "q: f32[2, 3, n, 64]\nk: f32[2, 3, n, 64]\nv: f32[2, 3, n, 64]\ny = {}\nreturn y"
    after = "tahf4.attention(q, k, v, None, False, None, False, 8)"
    assert_pass(given.format(SDPA), Attention(min_tokens=4), given.format(after), **ASKED)


def test_another_value_of_the_option_is_refused():
    for value in ("int4", True, None, 8):
        with pytest.raises(OptionError, match="'attention' is .*expected one of 'high_precision', 'int8'"):
            Options.parse({"attention": value})
