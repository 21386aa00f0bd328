"""An attention in 8 bits and the quantization of its result become one operator."""

from __future__ import annotations

import pytest
from fuse_texts import ALWAYS
from graphs import Text, assert_pass, run_passes

INPUTS = """
q: {dtype}[2, 3, n, 64]
k: {dtype}[2, 3, 9, 64]
v: {dtype}[2, 3, 9, {channels}]
w: hif4[64, {width}]
m: f32[{width}]
"""
ATTENTION = "a = tahf4.attention(q, k, v, None, False, None, False, 8{values})\n"
HEADS = "b = permute(a, [0, 2, 1, 3])\nd = flatten.using_ints(b, 2, 3)\n"
PRODUCT = "y = tahf4.linear(c, s, w, None, {dtype})\n"


def text(heads=HEADS, quantize="tahf4.quantize(d, m, 64)", result="y", dtype="bf16", channels=64, values=""):
    found = INPUTS + ATTENTION + heads + f"c, s = {quantize}\n" + PRODUCT + f"return {result}"
    return found.format(dtype=dtype, channels=channels, width=3 * channels, values=values)


def fused(how="m, 64, 4, 1", dtype="bf16", channels=64, values=8):
    call = f"c, s = tahf4.attention_quantize(q, k, v, None, False, None, False, 8, {values}, {how})\n"
    return (INPUTS + call + PRODUCT + "return y").format(dtype=dtype, channels=channels, width=3 * channels)


@pytest.mark.parametrize(
    "heads",
    [
        HEADS,
        "b = transpose.int(a, 1, 2)\nd = reshape(b, [2, -1, 192])\n",
        "b = transpose.int(a, -2, -3)\ne = contiguous(b)\nd = view(e, [2, -1, 192])\n",
        "b = permute(a, [0, 2, 1, 3])\ne = flatten.using_ints(b, 2, 3)\nd = type_as(e, q)\n",
        "b = transpose.int(a, 1, 2)\ne = clone(b)\nf = to.dtype(e, bf16)\nd = reshape(f, [2, -1, 192])\n",
    ],
)
def test_heads_side_by_side_that_a_quantization_reads(heads):
    ran = assert_pass(text(heads), ALWAYS, fused())
    assert ran.notes[0].endswith("0 branches, 1 attentions with their quantization")


def test_the_bits_and_the_form_are_those_of_the_quantization():
    assert_pass(text(quantize="tahf4.quantize(d, None, 0, 8)"), ALWAYS, fused("None, 0, 8, 1"))
    assert_pass(text(quantize="tahf4.quantize(d, m, 64, 4, 17)"), ALWAYS, fused("m, 64, 4, 17"))
    assert_pass(text(values=", 16"), ALWAYS, fused(values=16))
    assert_pass(text(channels=40), ALWAYS, fused(channels=40))  # the reference does any


@pytest.mark.parametrize(
    ("heads", "result"),
    [
        (HEADS, "y, d"),
        (HEADS, "y, a"),
        ("b = permute(a, [0, 2, 1, 3])\ne = flatten.using_ints(b, 2, 3)\nd = mul(e, 2)\n", "y"),
        ("b = permute(a, [0, 2, 1, 3])\ne = flatten.using_ints(b, 2, 3)\nd = to.dtype(e, f32)\n", "y"),
        ("b = permute(a, [0, 2, 3, 1])\nd = reshape(b, [2, -1, 192])\n", "y"),
        ("d = reshape(a, [2, -1, 192])\n", "y"),
        ("b = permute(a, [0, 2, 1, 3])\nd = reshape(b, [-1, 2, 192])\n", "y"),
        ("b = permute(a, [0, 2, 1, 3])\ne = flatten.using_ints(b, 2, 3)\nx = mul_(m, 2)\nd = type_as(e, q)\n", "y"),
    ],
)
def test_what_stays(heads, result):
    made = Text.parse(text(heads, result=result))
    run_passes(made, ALWAYS)
    assert "attention_quantize" not in str(made.graph_module.graph)


def test_a_branch_that_reads_the_result_keeps_it():
    head = text().replace("return y", "").replace("w: hif4", "g: bf16[192, 4]\nw: hif4", 1)
    made = Text.parse(head + "x = matmul(d, g)\nreturn y, x")
    run_passes(made, ALWAYS)
    assert "attention_quantize" not in str(made.graph_module.graph)


def test_behind_programs_of_queries_and_keys_it_goes_along():
    head = INPUTS.format(dtype="bf16", channels=64, width=192).replace("k: bf16[2, 3, 9, 64]", "k: bf16[2, 9, 192]")
    head = head.replace("q: bf16[2, 3, n, 64]", "q: bf16[2, n, 192]")
    rest = '[q], "", [k], "", v, 3, None, False, None, False, 8, 8'
    before = head + f"a = tahf4.fused_attention({rest})\n" + HEADS + "c, s = tahf4.quantize(d, m, 64)\n"
    after = head + f"c, s = tahf4.fused_attention_quantize({rest}, m, 64, 4, 1)\n"
    product = PRODUCT.format(dtype="bf16") + "return y"
    assert_pass(before + product, ALWAYS, after + product)
