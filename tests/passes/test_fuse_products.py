"""Activations, gates and residuals become part of the product that they follow."""

from __future__ import annotations

import pytest
import torch
from fuse_texts import AFTER, ALWAYS, PRODUCT
from graphs import DECISION, Ran, assert_pass


def assert_drawn_in(head: str, before: str, after: str) -> Ran:
    """Assert what becomes of a graph that begins with ``head``, and still does."""
    return assert_pass(head + before, ALWAYS, head + after)


def test_a_gate_and_a_residual_become_part_of_the_product():
    ran = assert_drawn_in(
        """
        x: bf16[2, 4, 64]
        r: bf16[2, 4, 64]
        gate: f32[2, 1, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        """,
        """
        y = tahf4.linear(c, s, w, None, bf16)
        gated = mul(y, gate)
        wide = to.dtype(r, f32)
        total = add(wide, gated)
        z = to.dtype(total, bf16)
        return z
        """,
        """
        z, = tahf4.fused_linear(c, s, w, None, bf16, [64], [gate, r], "v0: float32 = mul(y, x0);
            v1: float32 = to(x1); v2: float32 = add(v1, v0); v3: bfloat16 = to(v2)", bf16)
        return z
        """,
    )
    assert ran.node("fused_linear").meta[DECISION][0].node == "y", "it stands for the linear of the plan"
    assert ran.record.matches == 1
    (note,) = ran.notes
    assert note == "1 products, 0 quantizations, 0 products with their quantization, 0 split products, 0 branches"


def test_a_product_that_is_quantized_next_writes_codes_alone():
    ran = assert_drawn_in(
        """
        x: f32[4, 64]
        m: f32[128]
        up: hif4[128, 64]
        down: hif4[64, 128]
        b: param[128]
        c, s = tahf4.quantize(x, None, 0)
        """,
        """
        y = tahf4.linear(c, s, up, b, f32)
        h = gelu(y, approximate='tanh')
        d, t = tahf4.quantize(h, m, 64)
        z = tahf4.linear(d, t, down, None, f32)
        return z
        """,
        """
        d, t = tahf4.linear_quantize(c, s, up, b, f32, [], "v0: float32 = gelu_tanh(y)", m, 64)
        z = tahf4.linear(d, t, down, None, f32)
        return z
        """,
    )
    assert ran.node("linear_quantize").meta[DECISION][0].node == "y"


def test_what_is_both_a_result_and_quantized_is_a_product_and_a_quantization():
    ran = assert_drawn_in(
        """
        x: f32[4, 64]
        r: f32[4, 64]
        w: hif4[64, 64]
        v: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        """,
        """
        y = tahf4.linear(c, s, w, None, f32)
        z = add(r, y)
        h = relu(z)
        d, t = tahf4.quantize(h, None, 0)
        u = tahf4.linear(d, t, v, None, f32)
        return z, u
        """,
        """
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


def test_a_product_may_be_an_operand_of_one_that_comes_before_it():
    head = "x: f32[4, 64]\n w: hif4[64, 64]\n v: hif4[64, 64]\n c, s = tahf4.quantize(x, None, 0)\n"
    assert_pass(
        head + "y = tahf4.linear(c, s, w, None, f32)\n u = tahf4.linear(c, s, v, None, f32)\n z = add(y, u)\n return z",
        ALWAYS,
        head + "u = tahf4.linear(c, s, v, None, f32)\n"
        'z, = tahf4.fused_linear(c, s, w, None, f32, [64], [u], "v0: float32 = add(y, x0)", f32)\n return z',
    )  # fmt: skip


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
    assert_drawn_in(
        """
        x: bf16[4, 64]
        w: hif4[64, 64]
        n = neg(x)
        wide = to.dtype(n, f32)
        """,
        """
        h = relu(wide)
        c, s = tahf4.quantize(h, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        z = add(wide, y)
        return z, wide
        """,
        """
        c, s = tahf4.fused_quantize([n], "v0: float32 = to(x0); v1: float32 = relu(v0)", None, 0)
        z, = tahf4.fused_linear(c, s, w, None, f32, [64], [n], "v0: float32 = to(x0); v1: float32 = add(v0, y)", f32)
        return z, wide
        """,
    )


def test_a_widening_cast_at_the_end_is_not_written():
    assert_drawn_in(
        """
        x: bf16[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        """,
        """
        y = tahf4.linear(c, s, w, None, bf16)
        h = silu(y)
        z = to.dtype(h, f32)
        return z
        """,
        """
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


def test_a_gate_of_a_wider_type_gives_a_wider_result():
    head = "x: bf16[4, 64]\n g: f32[64]\n w: hif4[64, 64]\n c, s = tahf4.quantize(x, None, 0)\n"
    assert_pass(
        head + "y = tahf4.linear(c, s, w, None, bf16)\n z = mul(y, g)\n return z",
        ALWAYS,
        head + 'z, = tahf4.fused_linear(c, s, w, None, bf16, [64], [g], "v0: float32 = mul(y, x0)", f32)\n return z',
    )


BRANCH = """
    x: f32[2, 4, 64]
    a: f32[64, 8]
    b: f32[8, 96]
    w: hif4[96, 64]
    h = matmul(x, a)
    c, s = tahf4.quantize(x, None, 0)
"""
"""Its first product comes before the quantization, which it stays beside."""


def test_a_branch_of_low_rank_is_computed_behind_its_product():
    """A cast of the second product is part of the program."""
    assert_drawn_in(
        BRANCH,
        """
        y = tahf4.linear(c, s, w, None, bf16)
        m = matmul(h, b)
        n = to.dtype(m, bf16)
        z = add(y, n)
        g = silu(z)
        return g
        """,
        """
        g, = tahf4.fused_linear(c, s, w, None, bf16, [96], [h, b], "v0: float32 = matmul(x0, x1);
            v1: bfloat16 = to(v0); v2: bfloat16 = add(y, v1); v3: bfloat16 = silu(v2)", bf16)
        return g
        """,
    )


def test_a_branch_goes_into_a_product_that_is_quantized_next():
    assert_drawn_in(
        BRANCH,
        """
        y = tahf4.linear(c, s, w, None, f32)
        m = matmul(h, b)
        z = add(y, m)
        d, t = tahf4.quantize(z, None, 64)
        return d, t
        """,
        """
        d, t = tahf4.linear_quantize(c, s, w, None, f32, [h, b], "v0: float32 = matmul(x0, x1);
            v1: float32 = add(y, v0)", None, 64)
        return d, t
        """,
    )


@pytest.mark.parametrize(
    ("factors", "more"),
    [
        pytest.param("h: f32[2, 4, 72]\n b: f32[72, 96]", "", id="a wide one"),
        pytest.param("h: f32[4, 8]\n b: f32[8, 96]", "", id="one of other rows"),
        pytest.param("h: f32[2, 4, 96]\n b: f32[2, 96, 96]", "", id="one of several matrices"),
        pytest.param("h: f32[2, 4, 8]\n b: f32[8, 96]", ", m", id="one that is read twice"),
    ],
)
def test_other_products_of_matrices_are_operands(factors, more):
    head = f"x: f32[2, 4, 64]\n {factors}\n w: hif4[96, 64]\n c, s = tahf4.quantize(x, None, 0)\n m = matmul(h, b)\n"
    assert_pass(
        f"{head} y = tahf4.linear(c, s, w, None, f32)\n z = add(y, m)\n return z{more}",
        ALWAYS,
        f'{head} z, = tahf4.fused_linear(c, s, w, None, f32, [96], [m], "v0: float32 = add(y, x0)", f32)\n'
        f" return z{more}",
    )


def test_the_factors_of_a_branch_are_two_inputs_of_the_most():
    names = [f"r{i}" for i in range(11)]
    head = BRANCH + "".join(f"{name}: f32[96]\n" for name in names)
    steps = "".join(f"y{i + 1} = mul(y{i}, {name})\n" for i, name in enumerate(names))
    last = "m = matmul(h, b)\n z = add(y11, m)\n return z"
    program = "; ".join(f"v{i}: float32 = mul({f'v{i - 1}' if i else 'y'}, x{i})" for i in range(11))
    assert_pass(
        f"{head} y0 = tahf4.linear(c, s, w, None, f32)\n {steps} {last}",
        ALWAYS,
        f'{head} y11, = tahf4.fused_linear(c, s, w, None, f32, [96], [{", ".join(names)}], "{program}", f32)\n {last}',
    )


def test_a_branch_before_a_write_is_an_operand():
    head = BRANCH + "m = matmul(h, b)\n u = add_(b, 1)\n"
    assert_pass(
        head + "y = tahf4.linear(c, s, w, None, f32)\n z = add(y, m)\n return z",
        ALWAYS,
        head + 'z, = tahf4.fused_linear(c, s, w, None, f32, [96], [m], "v0: float32 = add(y, x0)", f32)\n return z',
    )


# What must stay outside.


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


# Writes to memory.


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


def test_codes_alone_keep_the_rounding_of_their_quantization_and_the_span_of_the_product():
    text = """
        x: f32[4, 256]
        w: hif4[64, 256] rotated 64, span 4
        v: hif4[64, 64]
        m: multiplier of w signs
        c, s = tahf4.quantize(x, m, 64, 4, 4)
        {}
        z = tahf4.linear(d, t, v, None, f32)
        return z
    """
    before = "y = tahf4.linear(c, s, w, None, f32, 4)\n d, t = tahf4.quantize(y, None, 0, 4, 9)"
    after = 'd, t = tahf4.linear_quantize(c, s, w, None, f32, [], "", None, 0, 4, 12)'
    assert_pass(text.format(before), ALWAYS, text.format(after))
