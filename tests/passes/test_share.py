"""One quantization for all linears that read an activation, and one product for those."""

from __future__ import annotations

import pytest
import torch
from graphs import DECISION, Attachment, LowRank, assert_pass
from tahf4_compiler.passes.normalize import Normalize
from tahf4_compiler.passes.quantize import Quantize
from tahf4_compiler.passes.share import Share

QK = """
    x: f32[4, 64]
    q: hif4[64, 64]
    k: hif4[32, 64]
"""

TWICE = """
    c, s = tahf4.quantize(x, None, 0)
    y = tahf4.linear(c, s, q, {0}, f32)
    d, t = tahf4.quantize(x, None, 0)
    z = tahf4.linear(d, t, k, {1}, f32)
"""

MERGED = """
    c, s = tahf4.quantize(x, None, 0)
    p = tahf4.linear(c, s, q+k, {0}, f32)
    y, z = split_with_sizes(p, [64, 32], -1)
"""

SHARED = """
    c, s = tahf4.quantize(x, None, 0)
    y = tahf4.linear(c, s, q, {0}, f32)
    z = tahf4.linear(c, s, k, {1}, f32)
"""

READ = "f = neg(y)\n g = neg(z)\n return f, g"
"""Readers that see no strides."""


def merged_inputs(text):
    return text.replace("q: hif4[64, 64]\n", "q+k: hif4[64+32, 64]\n").replace("    k: hif4[32, 64]\n", "")


def test_linears_of_one_activation_are_one_product():
    ran = assert_pass(QK + TWICE.format(None, None) + READ, Share(), merged_inputs(QK) + MERGED.format(None) + READ)
    assert [d.node for d in ran.node("linear").meta[DECISION]] == ["y", "z"], "it stands for both linears of the plan"
    assert ran.notes == ["1 quantizations saved, 1 products merged into others"]


def test_codes_that_the_graph_computes_stay_as_they_are():
    text = """
        x: f32[4, 64]
        a: u8[64, 32]
        b: i32[64, 1]
        codes = clone(a)
        scales = clone(b)
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, codes, scales, None, f32)
        z = tahf4.linear(c, s, codes, scales, None, f32)
        f = neg(y)
        g = neg(z)
        return f, g
    """
    assert_pass(text, Share(), text, run=False)


def test_their_biases_stand_one_after_the_other():
    head = QK + "b: param[64]\n e: param[32]\n"
    assert_pass(
        head + TWICE.format("b", "e") + READ,
        Share(),
        merged_inputs(head) + MERGED.replace("p =", "j = cat([b, e])\n p =").format("j") + READ,
    )


def test_the_product_has_the_span_of_its_parts():
    def spanned(text):
        return text.format(None, None).replace(", 0)", ", 0, 4, 2)").replace(", f32)", ", f32, 2)")

    x = "x: f32[4, 64]\n"
    assert_pass(
        f"{x} q: hif4[64, 64] span 2\n k: hif4[32, 64] span 2\n {spanned(SHARED)} {READ}",
        Share(),
        f"{x} q+k: hif4[64+32, 64] span 2\n {spanned(MERGED)} {READ}",
    )


@pytest.mark.parametrize("ranks", [(8, 8), (0, 8), (8, 0)])
def test_products_with_branches_stay_apart(ranks):
    head = "x: f32[4, 64]\n q: hif4[64, 64]{}\n k: hif4[32, 64]{}\n"
    head = head.format(*(f" rank {rank}" if rank else "" for rank in ranks))
    recipe = {
        name: Attachment("hif4", "", rank=rank, low_rank=LowRank(torch.zeros(64, rank), torch.zeros(rank, rows)))
        for name, rank, rows in zip("qk", ranks, (64, 32), strict=True)
    }
    shared = head + SHARED.format(None, None) + READ
    assert_pass(head + TWICE.format(None, None) + READ, Share(), shared, recipe=recipe)


def test_quantizations_alone_are_shared_if_that_is_asked_for():
    ran = assert_pass(QK + TWICE.format(None, None) + READ, Share(merge=False), QK + SHARED.format(None, None) + READ)
    assert ran.notes == ["1 quantizations saved, 0 products merged into others"]


def test_one_linear_is_left_alone():
    ran = assert_pass(
        """
        x: f32[4, 64]
        q: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, q, None, f32)
        return y
        """,
        Share(),
    )
    assert ran.record.matches == 0


# What is quantized in another way stays apart.


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("u, None, 0", id="another activation"),
        pytest.param("x, m, 0", id="a multiplier"),
        pytest.param("x, None, 64", id="a rotation"),
    ],
)
def test_other_quantizations_stay_apart(other):
    head = "x: f32[4, 64]\n u: f32[4, 64]\n m: f32[64]\n q: hif4[64, 64]\n k: hif4[32, 64]\n"
    twice = TWICE.format(None, None).replace("d, t = tahf4.quantize(x, None, 0)", f"d, t = tahf4.quantize({other})")
    assert_pass(head + twice + READ, Share())


def test_a_write_in_between_keeps_quantizations_apart():
    assert_pass(QK + TWICE.format(None, None).replace("d, t =", "w = add_(x, 1)\n d, t =") + READ, Share())


def test_activations_that_a_recipe_names_apart_stay_apart():
    def recipe(first, second):
        return {"q": Attachment("hif4", "", activation=first), "k": Attachment("hif4", "", activation=second)}

    before = QK + TWICE.format(None, None) + READ
    assert_pass(before, Share(), recipe=recipe("one", "two"))
    assert_pass(before, Share(), merged_inputs(QK) + MERGED.format(None) + READ, recipe=recipe("one", "one"))


# What must not become one product.


@pytest.mark.parametrize(
    ("inputs", "biases"),
    [
        pytest.param("b: param[64]\n", "b None", id="one has a bias"),
        pytest.param("b: param[64]\n e: param.bf16[32]\n", "b e", id="biases of two types"),
        pytest.param("b: param[64]\n o: buffer[32]\n e = neg(o)\n", "b e", id="a bias that is computed"),
    ],
)
def test_these_biases_keep_products_apart(inputs, biases):
    first, second = biases.split()
    head = QK + inputs
    assert_pass(head + TWICE.format(first, second) + READ, Share(), head + SHARED.format(first, second) + READ)


@pytest.mark.parametrize("write", ["add_(e, 1)", "add_(h, 1)"])
def test_a_bias_that_is_written_to_keeps_products_apart(write):
    head = QK + "b: param[64]\n e: buffer[32]\n h = view(e, [2, 16])\n"
    before = SHARED.format("b", "e").replace("z =", f"w = {write}\n z =") + READ
    assert_pass(head + before, Share())


def test_results_of_two_types_stay_apart():
    def other(text):
        return text.replace("k, None, f32", "k, None, bf16")

    assert_pass(QK + other(TWICE.format(None, None)) + READ, Share(), QK + other(SHARED.format(None, None)) + READ)


def test_a_weight_that_is_read_twice_is_no_row_of_its_own():
    before = "x: f32[4, 64]\n q: hif4[64, 64]\n" + TWICE.format(None, None).replace(", k,", ", q,") + READ
    after = "x: f32[4, 64]\n q: hif4[64, 64]\n" + SHARED.format(None, None).replace(", k,", ", q,") + READ
    assert_pass(before, Share(), after)


# Who sees that a result is a part of a wider one gets a copy.

COPIED = MERGED.replace("y, z =", "u, z =") + "y = clone(u, memory_format=contiguous)\n"


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("b = neg(z)\n return y, b", id="a result of the graph"),
        pytest.param("a = add_(y, 1)\n b = add(a, z[0])\n return b", id="a write"),
        pytest.param("h = t(y)\n a = add_(h, 1)\n b = neg(z)\n e = neg(a)\n return b, e", id="a write to a view"),
        pytest.param("h = as_strided(y, [32], [1])\n a = neg(h)\n b = neg(z)\n return a, b", id="strides"),
        pytest.param("h = view(y, [-1])\n a = neg(h)\n b = neg(z)\n return a, b", id="a flattening view"),
        pytest.param("h = view(y, [2, 128])\n a = neg(h)\n b = neg(z)\n return a, b", id="a view that joins rows"),
        pytest.param("h = view(y, [8, 32])\n a = neg(h)\n b = neg(z)\n return a, b", id="a view that cuts rows"),
        pytest.param("h = view(y, [4, 64])\n i = view(h, [-1])\n a = neg(z)\n b = neg(i)\n return a, b", id="views"),
        pytest.param("h = type_as(y, z)\n i = view(h, [8, 32])\n a = neg(i)\n b = neg(z)\n return a, b", id="type_as"),
        pytest.param("h = prims.neg(y)\n b = neg(z)\n a = neg(h)\n return a, b", id="an operator of others"),
        pytest.param("h, i = split(y, 32, -1)\n a = neg(h)\n b = neg(z)\n e = neg(i)\n return a, b, e", id="parts"),
    ],
)  # fmt: skip
def test_who_sees_strides_gets_a_copy(rest):
    rest = rest.replace("z[0]", "1")
    if "neg(z)" not in rest:
        rest = rest.replace("return", "e = neg(z)\n return e,")
    assert_pass(QK + TWICE.format(None, None) + rest, Share(), merged_inputs(QK) + COPIED.format(None) + rest)


def test_a_view_as_another_tensor_that_cuts_rows_gets_a_copy():
    head = QK.replace("x: f32[4, 64]", "x: f32[4, 64]\n o: f32[8, 32]")
    rest = "h = view_as(y, o)\n a = neg(h)\n b = neg(z)\n return a, b"
    assert_pass(head + TWICE.format(None, None) + rest, Share(), merged_inputs(head) + COPIED.format(None) + rest)


def test_a_view_of_three_axes_that_cuts_the_last_and_joins_it_with_rows_gets_a_copy():
    head = QK.replace("x: f32[4, 64]", "x: f32[2, 4, 64]")
    rest = "h = view(y, [2, 8, 32])\n a = neg(h)\n b = neg(z)\n return a, b"
    assert_pass(head + TWICE.format(None, None) + rest, Share(), merged_inputs(head) + COPIED.format(None) + rest)


def test_who_reads_pairs_as_complex_numbers_gets_a_copy():
    """A row of 64 + 33 values does not begin where a pair may."""
    head = QK.replace("k: hif4[32, 64]", "k: hif4[33, 64]")
    rest = """
        h = view(y, [4, 32, 2])
        i = view_as_complex(h)
        j = view_as_real(i)
        a = neg(j)
        b = neg(z)
        return a, b
    """
    after = COPIED.format(None).replace("[64, 32], -1", "[64, 33], -1")
    inputs = "x: f32[4, 64]\n q+k: hif4[64+33, 64]\n"
    assert_pass(head + TWICE.format(None, None) + rest, Share(), inputs + after + rest)


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("h = view(y, [4, 2, 32])\n a = neg(h)\n b = neg(z)\n return a, b", id="heads"),
        pytest.param("h = t(y)\n a = neg(h)\n b = neg(z)\n return a, b", id="a transposition"),
        pytest.param("d, t = tahf4.quantize(y, None, 0)\n b = neg(z)\n return d, b", id="a quantization"),
    ],
)
def test_who_does_not_see_strides_reads_the_part(rest):
    head = QK.replace("x:", "x:")
    before = rest.replace("d, t", "e, f").replace("return d", "return e")
    assert_pass(head + TWICE.format(None, None) + before, Share(), merged_inputs(head) + MERGED.format(None) + before)


# Linears that the model itself holds in HiF4.

HELD = """
    x: f32[4, 64]
    qc: param.u8[64, 32] = "q.weight_codes"
    qs: param.i32[64, 1] = "q.weight_scales"
    qm: param[64] = "q.multiplier"
    kc: param.u8[32, 32] = "k.weight_codes"
    ks: param.i32[32, 1] = "k.weight_scales"
    km: param[64] = "k.multiplier"
    c, s = tahf4.quantize(x, qm, 64)
    y = tahf4.linear(c, s, qc, qs, None, f32)
    d, t = tahf4.quantize(x, km, 64)
    z = tahf4.linear(d, t, kc, ks, None, f32)
    a = neg(y)
    b = neg(z)
    return a, b
"""


def test_packed_linears_share_a_quantization_if_their_multipliers_are_equal_and_stay_apart_as_products():
    apart = """
        x: f32[4, 64]
        qc: held codes of qc
        qs: held scales of qs
        qm: param[64] = "q.multiplier"
        kc: held codes of kc
        ks: held scales of ks
        km: param[64] = "k.multiplier"
        c, s = tahf4.quantize(x, qm, 64, 4)
        y = tahf4.linear(c, s, qc, qs, None, f32)
        d, t = tahf4.quantize(x, km, 64, 4)
        z = tahf4.linear(d, t, kc, ks, None, f32)
        a = neg(y)
        b = neg(z)
        return a, b
    """
    together = """
        x: f32[4, 64]
        qc: held codes of qc
        qs: held scales of qs
        qm: param[64] = "q.multiplier"
        kc: held codes of kc
        ks: held scales of ks
        c, s = tahf4.quantize(x, qm, 64, 4)
        y = tahf4.linear(c, s, qc, qs, None, f32)
        z = tahf4.linear(c, s, kc, ks, None, f32)
        a = neg(y)
        b = neg(z)
        return a, b
    """
    before = (Normalize(),)
    assert_pass(HELD, Share(), apart, first=before, run=False)
    assert_pass(HELD, Share(), apart, first=before, tied={3: 3, 6: 6})
    equal = dict.fromkeys(("qm", "km"), torch.full((64,), 0.5))
    assert_pass(HELD, Share(), together, first=before, tied={3: 3, 6: 3}, values=equal)


def test_a_packed_linear_and_one_that_is_packed_by_this_compilation_stay_apart():
    text = """
        x: f32[4, 64]
        {}
        {}
        k: hif4[32, 64]
        c, s = tahf4.quantize(x, None, 0, 4)
        y = tahf4.linear(c, s, qc, qs, None, f32)
        z = tahf4.linear(c, s, k, None, f32)
        return y, z
    """
    given = 'qc: param.u8[64, 32] = "q.weight_codes"', 'qs: param.i32[64, 1] = "q.weight_scales"'
    assert_pass(
        text.format(*given), Share(), text.format("qc: held codes of qc", "qs: held scales of qs"), first=[Normalize()]
    )


def test_what_is_left_out_has_its_default():
    text = """
    c, s = tahf4.quantize(x)
    y = tahf4.linear(c, s, q, None, f32)
    d, t = tahf4.quantize(x)
    z = tahf4.linear(d, t, k, None, f32)
    """
    together = MERGED.replace("None, 0", "None, 0, 4").format(None)
    assert_pass(QK + text + READ, Share(), merged_inputs(QK) + together + READ, first=[Quantize()])


def test_products_whose_weights_are_packed_in_other_ways_stay_apart():
    given = QK.replace("q: hif4[64, 64]", "q: hif4[64, 64] searched by squared")
    assert_pass(given + TWICE.format(None, None) + READ, Share(), given + SHARED.format(None, None) + READ)
