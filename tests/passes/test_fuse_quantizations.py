"""Norms and modulation become part of the quantization that they precede."""

from __future__ import annotations

import pytest
from fuse_texts import ALWAYS, LINEAR, QUANTIZATION
from graphs import assert_pass


def test_a_norm_and_its_modulation_become_part_of_the_quantization():
    assert_pass(
        """
        x: bf16[2, 4, 64]
        scale: f32[2, 1, 64]
        shift: f32[2, 1, 64]
        m: f32[64]
        w: hif4[64, 64]
        b: param.bf16[64]
        wide = to.dtype(x, f32)
        normed = layer_norm(wide, [64], None, None, 1e-06)
        plus = add(scale, 1)
        scaled = mul(normed, plus)
        moved = add(scaled, shift)
        h = to.dtype(moved, bf16)
        c, s = tahf4.quantize(h, m, 64)
        y = tahf4.linear(c, s, w, b, bf16)
        return y
        """,
        ALWAYS,
        """
        x: bf16[2, 4, 64]
        scale: f32[2, 1, 64]
        shift: f32[2, 1, 64]
        m: f32[64]
        w: hif4[64, 64]
        b: param.bf16[64]
        c, s = tahf4.fused_quantize([x, scale, shift], "v0: float32 = to(x0);
            v1: float32 = layer_norm(v0, None, None, 1e-06); v2: float32 = add(x1, 1); v3: float32 = mul(v1, v2);
            v4: float32 = add(v3, x2); v5: bfloat16 = to(v4)", m, 64)
        y = tahf4.linear(c, s, w, b, bf16)
        return y
        """,
    )


def test_a_mean_and_a_square_are_a_norm_written_out():
    program = "v0: float32 = square(x0); v1: float32 = mean(v0); v2: float32 = rsqrt(v1); v3: float32 = mul(x0, v2)"
    assert_pass(
        QUANTIZATION
        + f"""
        a = pow.Tensor_Scalar(x, 2)
        b = mean.dim(a, [-1], True)
        d = rsqrt(b)
        h = mul(x, d)
        c, s = tahf4.quantize(h, None, 0)
        {LINEAR}
        return y
        """,
        ALWAYS,
        QUANTIZATION + f'c, s = tahf4.fused_quantize([x], "{program}", None, 0)\n {LINEAR}\n return y',
    )


def test_what_is_read_on_two_ways_is_drawn_in():
    program = "v0: float32 = relu(x0); v1: float32 = neg(v0); v2: float32 = mul(v0, v1); v3: float32 = mul(v2, v2)"
    assert_pass(
        QUANTIZATION
        + f"""
        a = relu(x)
        b = neg(a)
        d = mul(a, b)
        h = mul(d, d)
        c, s = tahf4.quantize(h, None, 0)
        {LINEAR}
        return y
        """,
        ALWAYS,
        QUANTIZATION + f'c, s = tahf4.fused_quantize([x], "{program}", None, 0)\n {LINEAR}\n return y',
    )


def test_what_only_a_cast_that_stays_reads_stays_with_it():
    head = "x: bf16[4, 64]\n w: hif4[64, 64]\n n = neg(x)\n wide = to.dtype(n, f32)\n"
    rest = f"{LINEAR}\n return y, wide"
    assert_pass(
        head + f"h = relu(wide)\n c, s = tahf4.quantize(h, None, 0)\n {rest}",
        ALWAYS,
        head + f'c, s = tahf4.fused_quantize([n], "v0: float32 = to(x0); v1: float32 = relu(v0)", None, 0)\n {rest}',
    )


def test_numbers_without_axes_are_computed_among_themselves():
    head = "x: f32[4, 64]\n o: f32[]\n p: bf16[]\n w: hif4[64, 64]\n"
    assert_pass(
        head + f"a = add(o, p)\n h = mul(x, a)\n c, s = tahf4.quantize(h, None, 0)\n {LINEAR}\n return y",
        ALWAYS,
        head
        + 'c, s = tahf4.fused_quantize([o, p, x], "v0: float32 = add(x0, x1); v1: float32 = mul(x2, v0)", None, 0)\n'
        f"{LINEAR}\n return y",
    )


# What must stay.


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("h = softmax.int(x, -1)", id="what programs cannot say"),
        pytest.param("h = layer_norm(x, [4, 64], None, None, 1e-05)", id="a norm over two axes"),
        pytest.param("h = rms_norm(x, [64], None, None)", id="a norm with the machine's epsilon"),
        pytest.param("h = mean.dim(x, [0], True)", id="a mean over rows"),
        pytest.param("h = add(x, g, alpha=2)", id="a factor"),
        pytest.param("h = to.dtype(x, f64)", id="to a type that programs do not know"),
        pytest.param("i = to.dtype(g, i64)\n h = mul(x, i)", id="integers"),
    ],
)
def test_stays_before_a_quantization(before):
    assert_pass(QUANTIZATION + f"{before}\n c, s = tahf4.quantize(h, None, 0)\n {LINEAR}\n return y", ALWAYS)


def test_only_the_last_of_two_norms_is_drawn_in():
    rest = f"{LINEAR}\n return y"
    assert_pass(
        QUANTIZATION
        + f"""
        a = layer_norm(x, [64], None, None, 1e-05)
        h = rms_norm(a, [64], g, 1e-06)
        c, s = tahf4.quantize(h, None, 0)
        {rest}
        """,
        ALWAYS,
        QUANTIZATION
        + f"""
        a = layer_norm(x, [64], None, None, 1e-05)
        c, s = tahf4.fused_quantize([a, g], "v0: float32 = rms_norm(x0, x1, 1e-06)", None, 0)
        {rest}
        """,
    )


def test_a_norm_of_fewer_rows_stays_outside():
    rest = f"{LINEAR}\n return y"
    assert_pass(
        QUANTIZATION + f"a = layer_norm(g, [64], None, None, 1e-05)\n h = add(x, a)\n"
        f"c, s = tahf4.quantize(h, None, 0)\n {rest}",
        ALWAYS,
        QUANTIZATION + "a = layer_norm(g, [64], None, None, 1e-05)\n"
        f'c, s = tahf4.fused_quantize([x, a], "v0: float32 = add(x0, x1)", None, 0)\n {rest}',
    )


def test_a_value_that_others_read_is_computed_once():
    rest = f"{LINEAR}\n return y, a"
    assert_pass(
        QUANTIZATION + f"a = gelu(x)\n h = mul(a, g)\n c, s = tahf4.quantize(h, None, 0)\n {rest}",
        ALWAYS,
        QUANTIZATION
        + f'a = gelu(x)\n c, s = tahf4.fused_quantize([a, g], "v0: float32 = mul(x0, x1)", None, 0)\n {rest}',
    )


def test_a_quantized_value_that_is_a_result_too_is_computed_once():
    assert_pass(QUANTIZATION + f"h = gelu(x)\n c, s = tahf4.quantize(h, None, 0)\n {LINEAR}\n return y, h", ALWAYS)


def test_a_factor_without_axes_is_rounded_first_so_its_product_stays_before():
    assert_pass(
        """
        x: bf16[4, 64]
        o: f32[]
        w: hif4[64, 64]
        h = mul(x, o)
        c, s = tahf4.quantize(h, None, 0)
        y = tahf4.linear(c, s, w, None, bf16)
        return y
        """,
        ALWAYS,
    )


# Writes to memory.


@pytest.mark.parametrize("written", ["x", "view(x, [64, 4])"])
def test_a_norm_does_not_cross_a_write_to_its_input(written):
    assert_pass(
        f"""
        x: f32[4, 64]
        w: hif4[64, 64]
        h = layer_norm(x, [64], None, None, 1e-05)
        part = {written if "view" in written else "view(x, [4, 64])"}
        a = add_(part, 1)
        c, s = tahf4.quantize(h, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        return y
        """,
        ALWAYS,
    )


def test_what_comes_before_a_write_stays_there_and_the_rest_is_drawn_in():
    assert_pass(
        QUANTIZATION
        + f"""
        a = relu(x)
        b = add_(x, 1)
        h = mul(a, g)
        c, s = tahf4.quantize(h, None, 0)
        {LINEAR}
        return y
        """,
        ALWAYS,
        QUANTIZATION
        + f"""
        a = relu(x)
        b = add_(x, 1)
        c, s = tahf4.fused_quantize([a, g], "v0: float32 = mul(x0, x1)", None, 0)
        {LINEAR}
        return y
        """,
    )
