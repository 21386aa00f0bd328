"""What fuse does with whole graphs: merged products, the limit of programs, and when it runs at all."""

from __future__ import annotations

import pytest
import torch
from fuse_texts import AFTER, ALWAYS, LINEAR, PRODUCT, QUANTIZATION
from graphs import assert_pass, plug_in
from tahf4_compiler.passes.fuse import Fuse


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
        pytest.param(
            "a, b = split_with_sizes(p, [64, 64], -1)\n v = unsqueeze(a, 0)\n d = as_strided(v, [4, 8], [128, 1])\n"
            "e = neg(d)\n f = neg(b)\n return e, f",
            id="who reads strides behind a view sees them",
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


def test_a_product_with_a_split_does_not_cross_a_write_to_its_bias():
    assert_pass(
        """
        x: f32[4, 64]
        q+k: hif4[64+64, 64]
        b: buffer[128]
        c, s = tahf4.quantize(x, None, 0)
        p = tahf4.linear(c, s, q+k, b, f32)
        z = add_(b, 1)
        d, e = split_with_sizes(p, [64, 64], -1)
        f = add(d, e)
        return f
        """,
        ALWAYS,
    )


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
    (note,) = ran.notes
    assert note == "0 products, 0 quantizations, 0 products with their quantization, 0 split products, 0 branches"
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
