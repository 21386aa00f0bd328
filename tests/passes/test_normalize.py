"""One spelling for each meaning: linears whole, operators that do nothing gone."""

from __future__ import annotations

import pytest
from graphs import assert_pass
from tahf4_compiler.passes.normalize import Normalize

LINEAR = """
    x: f32[4, 64]
    w: param[32, 64]
    b: param[32]
"""


@pytest.mark.parametrize(
    "turned",
    ["t(w)", "numpy_T(w)", "mT(w)", "transpose.int(w, 0, 1)", "transpose.int(w, -1, 0)", "permute(w, [1, 0])",
     "permute(w, [-1, 0])"],
)  # fmt: skip
def test_a_product_with_a_transposed_parameter_is_a_linear(turned):
    rest = "" if turned == "t(w)" else f"u = {turned}\n"
    ran = assert_pass(
        LINEAR + f"u = {turned}\n y = mm(x, u)\n return y",
        Normalize(),
        LINEAR + f"{rest} y = linear(x, w, None)\n return y",
    )
    assert ran.record.matches == 1


def test_any_number_of_rows():
    head = LINEAR.replace("[4, 64]", "[2, 4, 64]")
    assert_pass(
        head + "u = t(w)\n y = matmul(x, u)\n return y", Normalize(), head + "y = linear(x, w, None)\n return y"
    )


def test_a_bias_is_part_of_it():
    assert_pass(
        LINEAR + "u = t(w)\n y = addmm(b, x, u)\n return y", Normalize(), LINEAR + "y = linear(x, w, b)\n return y"
    )


def test_a_cast_of_the_parameter_stays():
    head = LINEAR.replace("x: f32", "x: bf16") + "v = to.dtype(w, bf16)\n"
    assert_pass(head + "u = t(v)\n y = mm(x, u)\n return y", Normalize(), head + "y = linear(x, v, None)\n return y")


def test_it_was_called_in_the_module_that_the_product_was_called_in():
    head, where = LINEAR, "@ blocks.0 Block\n"
    assert_pass(
        head + where + "u = t(w)\n y = mm(x, u)\n return y",
        Normalize(),
        head + where + "y = linear(x, w, None)\n return y",
    )


@pytest.mark.parametrize(
    "nothing",
    ["dropout(x, 0.5, False)", "dropout(x, 0.0, True)", "feature_dropout(x, 0.5, False)", "alias(x)", "detach(x)"],
)
def test_what_does_nothing_goes(nothing):
    ran = assert_pass(
        f"x: f32[4, 64]\n a = {nothing}\n y = neg(a)\n return y", Normalize(), "x: f32[4, 64]\n y = neg(x)\n return y"
    )
    assert ran.record.matches == 1


@pytest.mark.parametrize("something", ["dropout(x, 0.5, True)", "neg(x)", "clone(x)"])
def test_what_does_something_stays(something):
    assert_pass(f"x: f32[4, 64]\n a = {something}\n y = neg(a)\n return y", Normalize())


@pytest.mark.parametrize(
    "written",
    [
        "y = tahf4.packed_linear(x, None, 0, wc, ws, None, f32)",
        "c, s = tahf4.quantize(x, None, 0)\n y = tahf4.linear(c, s, wc, ws, None, f32)",
    ],
)
def test_a_packed_linear_is_written_in_our_operators(written):
    assert_pass(
        f"""
        x: f32[4, 64]
        wc: param.u8[64, 32] = "blocks.0.weight_codes"
        ws: param.i32[64, 1] = "blocks.0.weight_scales"
        {written}
        return y
        """,
        Normalize(),
        """
        x: f32[4, 64]
        wc: held codes of wc
        ws: held scales of ws
        c, s = tahf4.quantize(x, None, 0, 4)
        y = tahf4.linear(c, s, wc, ws, None, f32)
        return y
        """,
    )


def test_a_packed_linear_hands_its_span_and_rounding_to_what_reads_them():
    assert_pass(
        """
        x: f32[4, 64]
        wc: param.u8[64, 32] = "blocks.0.weight_codes"
        ws: param.i32[64, 1] = "blocks.0.weight_scales"
        y = tahf4.packed_linear(x, None, 64, wc, ws, None, f32, 4, 10)
        return y
        """,
        Normalize(),
        """
        x: f32[4, 64]
        wc: held codes of wc
        ws: held scales of ws
        c, s = tahf4.quantize(x, None, 64, 4, 10)
        y = tahf4.linear(c, s, wc, ws, None, f32, 2)
        return y
        """,
    )


# Products that are no linears.

SQUARE = """
    x: f32[64, 64]
    w: param[64, 64]
    o: f32[64, 64]
    v: buffer[64, 64]
    b: param[64]
    e: f32[64, 64]
"""


@pytest.mark.parametrize(
    "product",
    [
        pytest.param("y = mm(x, w)", id="a parameter that is not transposed"),
        pytest.param("u = t(o)\n y = mm(x, u)", id="an argument"),
        pytest.param("u = t(v)\n y = mm(x, u)", id="a buffer"),
        pytest.param("n = neg(w)\n u = t(n)\n y = mm(x, u)", id="a computed weight"),
        pytest.param("u = neg(w)\n y = mm(x, u)", id="no transposition"),
        pytest.param("u = transpose.int(w, 0, 0)\n y = mm(x, u)", id="one axis exchanged with itself"),
        pytest.param("u = transpose.int(w, 1, -1)\n y = mm(x, u)", id="one axis by two names"),
        pytest.param("u = permute(w, [0, 1])\n y = mm(x, u)", id="a permutation that does nothing"),
        pytest.param("u = t(w)\n y = addmm(b, x, u, beta=2)", id="a factor"),
        pytest.param("u = t(w)\n y = addmm(e, x, u)", id="a residual"),
        pytest.param("u = t(w)\n y = mm(u, x)", id="on the left"),
    ],
)
def test_no_linear(product):
    assert_pass(SQUARE + f"{product}\n return y", Normalize())


def test_a_weight_of_one_axis_or_of_three_is_no_linears():
    assert_pass("x: f32[4, 64]\n w: param[64]\n u = t(w)\n y = matmul(x, u)\n return y", Normalize())
    assert_pass("x: f32[2, 4, 64]\n w: param[2, 32, 64]\n u = mT(w)\n y = matmul(x, u)\n return y", Normalize())


def test_a_transposition_that_others_read_stays():
    assert_pass(
        LINEAR + "u = t(w)\n y = mm(x, u)\n z = neg(u)\n return y, z",
        Normalize(),
        LINEAR + "u = t(w)\n y = linear(x, w, None)\n z = neg(u)\n return y, z",
    )
