"""The first product of a branch of low rank becomes part of the quantization of what it reads."""

from __future__ import annotations

import pytest
from fuse_texts import ALWAYS
from graphs import assert_pass, plug_in
from tahf4_compiler.passes.fuse import Fuse

HEAD = """
    x: f32[2, 4, 64]
    g: f32[64]
    a: f32[64, 8]
    b: f32[8, 96]
    w: hif4[96, 64]
"""
PRODUCT = 'y, = tahf4.fused_linear(c, s, w, None, f32, [96], [h, b], "v0: float32 = matmul(x0, x1); ' \
    'v1: float32 = add(y, v0)", f32)'  # fmt: skip
BEFORE = """
    c, s = tahf4.quantize(n, m, 64)
    p = tahf4.linear(c, s, w, None, f32)
    h = matmul(n, a)
    i = matmul(h, b)
    y = add(p, i)
"""


def test_a_norm_that_a_quantization_and_a_branch_read_is_computed_once_for_both():
    head = HEAD + "m: f32[64]\n"
    assert_pass(
        f"{head} n = rms_norm(x, [64], g, 1e-06)\n {BEFORE} return y",
        ALWAYS,
        head
        + f"""
        c, s, h = tahf4.branched_quantize([x, g], "v0: float32 = rms_norm(x0, x1, 1e-06)", [a], m, 64)
        {PRODUCT}
        return y
        """,
    )


def test_what_others_read_as_well_is_read_once():
    head = HEAD + "m: f32[64]\n"
    assert_pass(
        f"{head} n = rms_norm(x, [64], g, 1e-06)\n {BEFORE} return y, n",
        ALWAYS,
        head
        + f"""
        n = rms_norm(x, [64], g, 1e-06)
        c, s, h = tahf4.branched_quantize([n], "", [a], m, 64)
        {PRODUCT}
        return y, n
        """,
    )


def test_q_and_k_read_an_activation_once_with_a_factor_each():
    head = HEAD + "d: bf16[64, 16]\n e: f32[16, 32]\n v: hif4[32, 64]\n"
    assert_pass(
        head
        + """
        n = relu(x)
        c, s = tahf4.quantize(n, None, 0, 8)
        p = tahf4.linear(c, s, w, None, f32)
        h = matmul(n, a)
        i = matmul(h, b)
        y = add(p, i)
        q = tahf4.linear(c, s, v, None, f32)
        f = to.dtype(d, f32)
        j = matmul(n, f)
        k = matmul(j, e)
        z = add(q, k)
        return y, z
        """,
        ALWAYS,
        head
        + f"""
        f = to.dtype(d, f32)
        c, s, h, j = tahf4.branched_quantize([x], "v0: float32 = relu(x0)", [a, f], None, 0, 8)
        {PRODUCT}
        z, = tahf4.fused_linear(c, s, v, None, f32, [32], [j, e], "v0: float32 = matmul(x0, x1);
            v1: float32 = add(y, v0)", f32)
        return y, z
        """,
    )


# What stays a product of PyTorch.


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param("c, s = tahf4.quantize(x, None, 0)\n h = matmul(a, x)", id="the other side"),
        pytest.param("h = matmul(x, a)\n c, s = tahf4.quantize(x, None, 0)", id="one that is read before"),
        pytest.param("c, s = tahf4.quantize(x, None, 0)\n u = add_(a, 1)\n h = matmul(x, a)", id="behind a write"),
        pytest.param("c, s = tahf4.quantize(x, None, 0)\n t = neg(a)\n h = matmul(x, t)", id="a computed factor"),
        pytest.param("c, s = tahf4.quantize(x, None, 0)\n h = matmul(x, e)", id="several matrices"),
        pytest.param("c, s = tahf4.quantize(x, None, 0)\n h = matmul(x, o)", id="a wide one"),
        pytest.param("c, s = tahf4.quantize(x, None, 0)\n i = matmul(x, f)\n h = matmul(x, d)", id="wide together"),
        pytest.param("c, s = tahf4.quantize(x, None, 0, 16)\n h = matmul(x, a)", id="an activation in 16 bits"),
    ],
)
def test_stays_beside_a_quantization(rest):
    head = "x: f32[64, 64]\n a: f32[64, 64]\n e: f32[2, 64, 8]\n o: f32[64, 193]\n f: f32[64, 96]\n d: f32[64, 97]\n"
    more = ", i" if "i =" in rest else ""
    assert_pass(f"{head} w: hif4[96, 64]\n {rest}\n y = tahf4.linear(c, s, w, None, f32)\n return y, h{more}", ALWAYS)


@pytest.mark.parametrize(
    ("kernels", "fused"),
    [
        ({"fused_quantize": "mine", "quantize": "mine"}, False),
        ({"branched_quantize": "mine", "quantize": "other"}, False),
        ({"branched_quantize": "mine", "quantize": "mine"}, True),
    ],
)
def test_only_a_kernel_that_quantizes_here_computes_branches(kernels, fused):
    """Backends decide by whether they have one: those of the CPU have none."""
    start = HEAD + "n = relu(x)\n {}"
    rest = "p = tahf4.linear(c, s, w, None, f32)\n i = matmul(h, b)\n return i, p"
    before = start.format("c, s = tahf4.quantize(n, None, 0)\n h = matmul(n, a)\n") + rest
    quantized = 'c, s, h = tahf4.branched_quantize([x], "v0: float32 = relu(x0)", [a], None, 0)\n'
    with plug_in(kernels):
        assert_pass(before, Fuse(), HEAD + quantized + rest if fused else None)
