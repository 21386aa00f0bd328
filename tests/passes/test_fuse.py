"""Norms and activations become part of quantizations, gates and residuals part of products."""

from __future__ import annotations

import pytest
import torch
from graphs import DECISION, assert_pass, plug_in
from tahf4_compiler.passes.fuse import Fuse

ALWAYS = Fuse(always=True)

PRODUCT = """
    x: f32[4, 64]
    r: f32[4, 64]
    w: hif4[64, 64]
    c, s = tahf4.quantize(x, None, 0)
    y = tahf4.linear(c, s, w, None, f32)
"""
"""A product; what follows is drawn into it or is not."""

AFTER = """
    x: f32[4, 64]
    r: f32[4, 64]
    w: hif4[64, 64]
    c, s = tahf4.quantize(x, None, 0)
"""

QUANTIZATION = """
    x: f32[4, 64]
    g: f32[64]
    w: hif4[64, 64]
"""
"""The inputs of a quantization; what comes before it is drawn into it or is not."""

LINEAR = "y = tahf4.linear(c, s, w, None, f32)"


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


def test_a_gate_and_a_residual_become_part_of_the_product():
    ran = assert_pass(
        """
        x: bf16[2, 4, 64]
        r: bf16[2, 4, 64]
        gate: f32[2, 1, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, bf16)
        gated = mul(y, gate)
        wide = to.dtype(r, f32)
        total = add(wide, gated)
        z = to.dtype(total, bf16)
        return z
        """,
        ALWAYS,
        """
        x: bf16[2, 4, 64]
        r: bf16[2, 4, 64]
        gate: f32[2, 1, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        z, = tahf4.fused_linear(c, s, w, None, bf16, [64], [gate, r], "v0: float32 = mul(y, x0);
            v1: float32 = to(x1); v2: float32 = add(v1, v0); v3: bfloat16 = to(v2)", bf16)
        return z
        """,
    )
    assert ran.node("fused_linear").meta[DECISION][0].node == "y", "it stands for the linear of the plan"
    assert ran.record.matches == 1
    assert ran.notes == ["1 products, 0 quantizations, 0 products with their quantization, 0 split products"]


def test_a_product_that_is_quantized_next_writes_codes_alone():
    ran = assert_pass(
        """
        x: f32[4, 64]
        m: f32[128]
        up: hif4[128, 64]
        down: hif4[64, 128]
        b: param[128]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, up, b, f32)
        h = gelu(y, approximate='tanh')
        d, t = tahf4.quantize(h, m, 64)
        z = tahf4.linear(d, t, down, None, f32)
        return z
        """,
        ALWAYS,
        """
        x: f32[4, 64]
        m: f32[128]
        up: hif4[128, 64]
        down: hif4[64, 128]
        b: param[128]
        c, s = tahf4.quantize(x, None, 0)
        d, t = tahf4.linear_quantize(c, s, up, b, f32, [], "v0: float32 = gelu_tanh(y)", m, 64)
        z = tahf4.linear(d, t, down, None, f32)
        return z
        """,
    )
    assert ran.node("linear_quantize").meta[DECISION][0].node == "y"


def test_merged_products_have_one_contiguous_result_each():
    assert_pass(
        """
        x: f32[4, 64]
        q+k: hif4[64+32, 64]
        c, s = tahf4.quantize(x, None, 0)
        p = tahf4.linear(c, s, q+k, None, f32)
        a, b = split_with_sizes(p, [64, 32], -1)
        flat = clone(a, memory_format=contiguous)
        u = view(flat, [-1])
        v = relu(b)
        return u, v
        """,
        ALWAYS,
        """
        x: f32[4, 64]
        q+k: hif4[64+32, 64]
        c, s = tahf4.quantize(x, None, 0)
        a, b = tahf4.fused_linear(c, s, q+k, None, f32, [64, 32], [], "", f32)
        u = view(a, [-1])
        v = relu(b)
        return u, v
        """,
    )


def test_what_is_both_a_result_and_quantized_is_a_product_and_a_quantization():
    ran = assert_pass(
        """
        x: f32[4, 64]
        r: f32[4, 64]
        w: hif4[64, 64]
        v: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        z = add(r, y)
        h = relu(z)
        d, t = tahf4.quantize(h, None, 0)
        u = tahf4.linear(d, t, v, None, f32)
        return z, u
        """,
        ALWAYS,
        """
        x: f32[4, 64]
        r: f32[4, 64]
        w: hif4[64, 64]
        v: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        z, = tahf4.fused_linear(c, s, w, None, f32, [64], [r], "v0: float32 = add(x0, y)", f32)
        d, t = tahf4.fused_quantize([z], "v0: float32 = relu(x0)", None, 0)
        u = tahf4.linear(d, t, v, None, f32)
        return z, u
        """,
    )
    assert ran.record.matches == 2


def test_the_product_may_be_read_twice_by_one_operator():
    assert_pass(
        PRODUCT + "z = mul(y, y)\n return z",
        ALWAYS,
        AFTER + 'z, = tahf4.fused_linear(c, s, w, None, f32, [64], [], "v0: float32 = mul(y, y)", f32)\n return z',
    )


def test_an_operand_is_one_input_however_often_it_is_read():
    program = '"v0: float32 = add(y, x0); v1: float32 = mul(v0, x0)"'
    assert_pass(
        PRODUCT + "a = add(y, r)\n z = mul(a, r)\n return z",
        ALWAYS,
        AFTER + f"z, = tahf4.fused_linear(c, s, w, None, f32, [64], [r], {program}, f32)\n return z",
    )


def test_a_narrow_operand_is_read_as_it_is_however_often_it_is_cast():
    program = '"v0: float32 = to(x0); v1: float32 = add(y, v0); v2: float32 = to(x0); v3: float32 = mul(v1, v2)"'
    head = PRODUCT.replace("r: f32", "r: bf16")
    assert_pass(
        head + "a = to.dtype(r, f32)\n b = add(y, a)\n d = to.dtype(r, f32)\n z = mul(b, d)\n return z",
        ALWAYS,
        AFTER.replace("r: f32", "r: bf16")
        + f"z, = tahf4.fused_linear(c, s, w, None, f32, [64], [r], {program}, f32)\n return z",
    )


def test_a_cast_that_others_read_is_drawn_in_and_stays():
    assert_pass(
        """
        x: bf16[4, 64]
        w: hif4[64, 64]
        n = neg(x)
        wide = to.dtype(n, f32)
        h = relu(wide)
        c, s = tahf4.quantize(h, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        z = add(wide, y)
        return z, wide
        """,
        ALWAYS,
        """
        x: bf16[4, 64]
        w: hif4[64, 64]
        n = neg(x)
        wide = to.dtype(n, f32)
        c, s = tahf4.fused_quantize([n], "v0: float32 = to(x0); v1: float32 = relu(v0)", None, 0)
        z, = tahf4.fused_linear(c, s, w, None, f32, [64], [n], "v0: float32 = to(x0); v1: float32 = add(v0, y)", f32)
        return z, wide
        """,
    )


def test_a_widening_cast_at_the_end_is_not_written():
    assert_pass(
        """
        x: bf16[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, bf16)
        h = silu(y)
        z = to.dtype(h, f32)
        return z
        """,
        ALWAYS,
        """
        x: bf16[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        h, = tahf4.fused_linear(c, s, w, None, bf16, [64], [], "v0: bfloat16 = silu(y)", bf16)
        z = to.dtype(h, f32)
        return z
        """,
    )


def test_a_cast_alone_is_no_program():
    for dtype in ("bf16", "f32"):
        assert_pass(
            f"""
            x: bf16[4, 64]
            w: hif4[64, 64]
            c, s = tahf4.quantize(x, None, 0)
            y = tahf4.linear(c, s, w, None, bf16)
            z = to.dtype(y, {dtype})
            return z
            """,
            ALWAYS,
        )


def test_an_assertion_of_a_dtype_is_no_reader_and_goes():
    assert_pass(
        PRODUCT + "a = _assert_tensor_metadata(y, dtype=f32)\n z = add(r, y)\n return z",
        ALWAYS,
        AFTER + 'z, = tahf4.fused_linear(c, s, w, None, f32, [64], [r], "v0: float32 = add(x0, y)", f32)\n return z',
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


def test_dynamic_rows_are_no_obstacle_and_others_do_not_fit():
    head = "x: f32[n, 64]\n r: f32[{rows}, 64]\n w: hif4[64, 64]\n"
    product = "c, s = tahf4.quantize(x, None, 0)\n y = tahf4.linear(c, s, w, None, f32)\n"
    fused = 'z, = tahf4.fused_linear(c, s, w, None, f32, [64], [r], "v0: float32 = add(x0, y)", f32)\n'
    for rows in ("n", "1"):
        start = head.format(rows=rows)
        assert_pass(
            start + product + "z = add(r, y)\n return z",
            ALWAYS,
            start + f"c, s = tahf4.quantize(x, None, 0)\n {fused} return z",
        )


def test_a_gate_of_a_wider_type_gives_a_wider_result():
    head = "x: bf16[4, 64]\n g: f32[64]\n w: hif4[64, 64]\n c, s = tahf4.quantize(x, None, 0)\n"
    assert_pass(
        head + "y = tahf4.linear(c, s, w, None, bf16)\n z = mul(y, g)\n return z",
        ALWAYS,
        head + 'z, = tahf4.fused_linear(c, s, w, None, bf16, [64], [g], "v0: float32 = mul(y, x0)", f32)\n return z',
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


# What must stay outside of a product.


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("n = layer_norm(y, [64], None, None, 1e-05)\n return n", id="a reduction"),
        pytest.param("z = softmax.int(y, -1)\n return z", id="what programs cannot say"),
        pytest.param("z = add(y, r, alpha=2)\n return z", id="a factor"),
        pytest.param("z = mul(y, inf)\n return z", id="an infinite number"),
        pytest.param("z = mul(y, 1e-40)\n return z", id="a subnormal number"),
        pytest.param("z = gelu(y)\n return z, y", id="a product that is a result too"),
        pytest.param("a = relu(y)\n b = neg(y)\n return a, b", id="two readers"),
        pytest.param("z = type_as(r, y)\n return z", id="only its dtype is read"),
        pytest.param("d, t = tahf4.quantize(y, None, 0)\n u = neg(y)\n return d, u", id="codes and another reader"),
        pytest.param("v = view(y, [2, 2, 64])\n z = neg(v)\n return z", id="a view"),
        pytest.param("a = add_(y, 1)\n b = add(a, r)\n return b", id="in place"),
        pytest.param("return y", id="nothing"),
    ],
)
def test_stays_behind_a_product(rest):
    assert_pass(PRODUCT + rest, ALWAYS)


def test_of_a_product_whose_dtype_alone_is_read_nothing_is_drawn_in():
    assert_pass(
        """
        x: bf16[4, 64]
        r: f32[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, bf16)
        z = type_as(r, y)
        return z
        """,
        ALWAYS,
    )


def test_a_product_that_is_a_multiplier_is_not_what_is_quantized():
    assert_pass(
        """
        x: f32[64]
        h: f32[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        d, t = tahf4.quantize(h, y, 0)
        return d, t
        """,
        ALWAYS,
    )


@pytest.mark.parametrize(("own", "cast"), [("f32", "bf16"), ("f64", "f32"), ("i64", "f32")])
def test_an_operand_that_is_cast_from_no_narrower_float_is_read_as_cast(own, cast):
    head = f"x: bf16[4, 64]\n r: {own}[4, 64]\n w: hif4[64, 64]\n e = to.dtype(r, {cast})\n"
    codes = "c, s = tahf4.quantize(x, None, 0)\n"
    word = {"f32": "float32", "bf16": "bfloat16"}[cast]
    assert_pass(
        head + codes + f"y = tahf4.linear(c, s, w, None, {cast})\n z = add(e, y)\n return z",
        ALWAYS,
        head + codes
        + f'z, = tahf4.fused_linear(c, s, w, None, {cast}, [64], [e], "v0: {word} = add(x0, y)", {cast})\n return z',
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operand", "result"),
    [
        pytest.param("[2, 4, 64]", "z = add(y, o)", id="more axes"),
        pytest.param(".i64[4, 64]", "z = add(y, o)", id="integers"),
        pytest.param(".f64[4, 64]", "z = add(y, o)", id="float64"),
        pytest.param(".bool[4, 64]", "z = mul(y, o)", id="booleans"),
        pytest.param("[4, 64] strides 1, 4", "z = add(o, y)", id="another memory format of two axes"),
        pytest.param(".f64[]", "z = mul(y, o)", id="a double without axes"),
    ],
)
def test_an_operand_that_does_not_fit_a_product(operand, result):
    head = PRODUCT.replace("r: f32[4, 64]", f"o: {operand.removeprefix('.') if operand[0] == '.' else 'f32' + operand}")
    assert_pass(head + f"{result}\n return z", ALWAYS)


def test_a_channels_last_residual_gives_its_memory_format_to_the_sum():
    assert_pass(
        """
        x: f32[2, 3, 4, 64]
        r: f32[2, 3, 4, 64] strides 768, 1, 192, 3
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        z = add(r, y)
        return z
        """,
        ALWAYS,
    )


def test_strides_of_an_axis_of_one_mean_nothing():
    head = "x: f32[1, 64]\n r: f32[1, 64] strides 1, 3\n w: hif4[64, 64]\n c, s = tahf4.quantize(x, None, 0)\n"
    assert_pass(
        head + "y = tahf4.linear(c, s, w, None, f32)\n z = add(r, y)\n return z",
        ALWAYS,
        head + 'z, = tahf4.fused_linear(c, s, w, None, f32, [64], [r], "v0: float32 = add(x0, y)", f32)\n return z',
    )


def test_an_operand_without_axes_is_rounded_first_so_it_stays_outside():
    head = """
        x: bf16[4, 64]
        o: {dtype}[]
        w: hif4[64, 64]
    """
    quantize = "c, s = tahf4.quantize(x, None, 0)\n"
    before = quantize + "y = tahf4.linear(c, s, w, None, bf16)\n z = mul(y, o)\n return z"
    assert_pass(head.format(dtype="f32") + before, ALWAYS)
    assert_pass(
        head.format(dtype="bf16") + before,
        ALWAYS,
        head.format(dtype="bf16") + quantize
        + 'z, = tahf4.fused_linear(c, s, w, None, bf16, [64], [o], "v0: bfloat16 = mul(y, x0)", bf16)\n return z',
    )  # fmt: skip


@pytest.mark.parametrize(
    "value", [torch.empty(4, 64, device="meta"), torch.eye(4, 64).to_sparse()], ids=["another device", "sparse"]
)
def test_an_operand_of_another_kind_is_no_input(value):
    def change(graph_module):
        (node,) = (n for n in graph_module.graph.nodes if n.name == "r")
        node.meta["val"] = value

    assert_pass(PRODUCT + "z = add(y, r)\n return z", ALWAYS, run=False, prepare=change)


def test_a_program_has_no_more_inputs_than_12():
    most = 12
    inputs = [f"i{n}" for n in range(most + 1)]
    declared = "".join(f"{i}: f32[64]\n" for i in inputs) + "x: f32[4, 64]\n w: hif4[64, 64]\n"
    quantize = "c, s = tahf4.quantize(x, None, 0)\n"
    chain = "".join(f"a{n} = add({'y' if n == 0 else f'a{n - 1}'}, i{n})\n" for n in range(most + 1))
    program = "; ".join(f"v{n}: float32 = add({'y' if n == 0 else f'v{n - 1}'}, x{n})" for n in range(most))
    assert_pass(
        declared + quantize + f"{LINEAR}\n{chain} return a{most}",
        ALWAYS,
        declared + quantize
        + f'a{most - 1}, = tahf4.fused_linear(c, s, w, None, f32, [64], [{", ".join(inputs[:-1])}], "{program}", f32)\n'
        + f"a{most} = add(a{most - 1}, i{most})\n return a{most}",
    )  # fmt: skip
    before = "".join(f"a{n} = add({'x' if n == 0 else f'a{n - 1}'}, i{n})\n" for n in range(most))
    assert_pass(
        declared + before + f"c, s = tahf4.quantize(a{most - 1}, None, 0)\n {LINEAR}\n return y, i{most}", ALWAYS
    )


# What must stay before a quantization.


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


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("z = add(r, y)\n return z", id="a residual"),
        pytest.param("d, t = tahf4.quantize(y, None, 0)\n z = tahf4.linear(d, t, v, None, f32)\n return z", id="codes"),
    ],
)
def test_a_product_does_not_cross_a_write_to_its_bias(rest):
    assert_pass(
        f"""
        x: f32[4, 64]
        r: f32[4, 64]
        b: buffer[64]
        w: hif4[64, 64]
        v: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, b, f32)
        a = add_(b, 1)
        {rest}
        """,
        ALWAYS,
    )


def test_a_cast_of_an_operand_does_not_cross_a_write():
    head = PRODUCT.replace("r: f32", "r: bf16")
    cut = head.index("c, s")
    before = "e = to.dtype(r, f32)\n f = add_(r, 1)\n"
    assert_pass(
        head[:cut] + before + head[cut:] + "z = add(e, y)\n return z",
        ALWAYS,
        head[:cut] + before + "c, s = tahf4.quantize(x, None, 0)\n"
        'z, = tahf4.fused_linear(c, s, w, None, f32, [64], [e], "v0: float32 = add(x0, y)", f32)\n return z',
    )


# Parts of merged products.

MERGED = """
    x: f32[4, 64]
    q+k: hif4[64+64, 64]
    c, s = tahf4.quantize(x, None, 0)
    p = tahf4.linear(c, s, q+k, None, f32)
"""


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("a, b = split_with_sizes(p, [64, 64], -1)\n return a, b", id="who gets parts sees strides"),
        pytest.param(
            "a, b = split_with_sizes(p, [64, 64], -1)\n d = as_strided(a, [4, 8], [128, 1])\n e = neg(d)\n f = neg(b)\n"
            "return e, f",
            id="who reads strides sees them",
        ),
        pytest.param("a, b = split_with_sizes(p, [2, 2])\n d = add(a, b)\n return d", id="rows, by default"),
        pytest.param("a, b = split_with_sizes(p, [2, 2], 0)\n d = add(a, b)\n return d", id="rows"),
        pytest.param("a, b = split_with_sizes(p, [64, 64], -1)\n d = add(a, b)\n return d, p", id="the whole as well"),
        pytest.param(
            "e = sym_size.int(x, 1)\n a, b = split_with_sizes(p, [e, 64], -1)\n d = add(a, b)\n return d",
            id="sizes that are computed",
        ),
        pytest.param("a, b = split(p, 64, -1)\n d = add(a, b)\n return d", id="another operator"),
        pytest.param(
            "a, b = split_with_sizes(p, [64, 64], -1)\n d = clone(a, memory_format=contiguous)\n e = mul_(a, 2)\n"
            "f = add(a, d)\n g = add(f, b)\n return g",
            id="a write to a part",
        ),
        pytest.param(
            "a, b = split_with_sizes(p, [64, 64], -1)\n h = view(a, [4, 64])\n e = neg_(h)\n f = add(a, b)\n return f",
            id="a write to a view of a part",
        ),
        pytest.param(
            "a, b = split_with_sizes(p, [64, 64], -1)\n h, i = split(a, 32, -1)\n e = mul_(h, 2)\n f = add(a, b)\n"
            "return f",
            id="a write to a part of a part",
        ),
        pytest.param(
            "a, b = split_with_sizes(p, [64, 64], -1)\n h = type_as(a, x)\n e = mul_(h, 2)\n f = add(a, b)\n return f",
            id="a write to a part that type_as gave back",
        ),
    ],
)
def test_a_product_keeps_its_split(rest):
    assert_pass(MERGED + rest, ALWAYS)


@pytest.mark.parametrize("axis", [-1, 1])
def test_columns_by_either_name_of_their_axis(axis):
    assert_pass(
        MERGED + f"a, b = split_with_sizes(p, [64, 64], {axis})\n d = mul(a, b)\n return d",
        ALWAYS,
        MERGED[: MERGED.index("p =")] + "a, b = tahf4.fused_linear(c, s, q+k, None, f32, [64, 64], [], \"\", f32)\n"
        "d = mul(a, b)\n return d",
    )  # fmt: skip


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("d = clone(a, memory_format=contiguous)\n e = mul_(d, 2)\n f = add(a, d)\n g = add(f, b)\n"
                     "return g", id="a copy that is written to, beside its source"),
        pytest.param("d = clone(a)\n e = neg(d)\n f = neg(b)\n return e, f", id="a copy in another format"),
    ],
)  # fmt: skip
def test_a_copy_of_a_part_stays_a_copy(rest):
    assert_pass(
        MERGED + f"a, b = split_with_sizes(p, [64, 64], -1)\n {rest}",
        ALWAYS,
        MERGED[: MERGED.index("p =")]
        + 'a, b = tahf4.fused_linear(c, s, q+k, None, f32, [64, 64], [], "", f32)\n'
        + rest,
    )


def test_a_split_that_is_a_result_as_a_whole_stays():
    def whole(graph_module):
        (split,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.split_with_sizes.default)
        (output,) = graph_module.graph.find_nodes(op="output")
        output.args = ((split, *output.args[0]),)

    before = MERGED + "a, b = split_with_sizes(p, [64, 64], -1)\n d = neg(a)\n"
    after = (
        MERGED
        + "parts = split_with_sizes(p, [64, 64], -1)\n a = getitem(parts, 0)\n b = getitem(parts, 1)\n d = neg(a)\n"
    )
    assert_pass(before + "return d", ALWAYS, after + "return parts, d", prepare=whole)


# When it runs at all.


def test_reference_kernels_fuse_nothing_unless_asked_to():
    before = PRODUCT + "z = add(r, y)\n return z"
    ran = assert_pass(before, Fuse(), kernels="reference")
    assert ran.notes == ["nothing: reference kernels are asked for"]
    after = AFTER + 'z, = tahf4.fused_linear(c, s, w, None, f32, [64], [r], "v0: float32 = add(x0, y)", f32)\n return z'
    assert_pass(before, ALWAYS, after, kernels="reference")


def test_nothing_is_fused_where_only_the_reference_could_run_it():
    ran = assert_pass(PRODUCT + "z = add(r, y)\n return z", Fuse())
    assert ran.notes == ["0 products, 0 quantizations, 0 products with their quantization, 0 split products"]
    assert ran.record.matches == 0


@pytest.mark.parametrize(
    ("kernels", "fused"),
    [
        ({"fused_quantize": "mine"}, False),
        ({"fused_quantize": "mine", "quantize": "other"}, False),
        ({"fused_quantize": "mine", "quantize": "mine"}, True),
    ],
)
def test_only_the_kernel_that_runs_the_parts_takes_their_place(kernels, fused):
    before = QUANTIZATION + f"h = mul(x, g)\n c, s = tahf4.quantize(h, None, 0)\n {LINEAR}\n return y"
    after = (
        QUANTIZATION
        + f'c, s = tahf4.fused_quantize([x, g], "v0: float32 = mul(x0, x1)", None, 0)\n {LINEAR}\n return y'
    )
    with plug_in(kernels):
        assert_pass(before, Fuse(), after if fused else None)


def test_both_parts_of_a_product_with_its_quantization_are_asked_for_their_kernel():
    before = (
        PRODUCT.replace("w:", "w: hif4[64, 64]\n v:") + "d, t = tahf4.quantize(y, None, 0)\n"
        " z = tahf4.linear(d, t, v, None, f32)\n return z"
    )
    kernels = {"linear": "mine", "linear_quantize": "mine", "quantize": "other"}
    with plug_in(kernels):
        assert_pass(before, Fuse())
