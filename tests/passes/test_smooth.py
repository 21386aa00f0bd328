"""A recipe's channel masks stand before quantizations."""

from __future__ import annotations

import torch
from graphs import Attachment, assert_pass
from tahf4_compiler.passes.smooth import Smooth

ONE = """
    x: f32[4, 64]
    {m}w: hif4[64, 64]{how}
    c, s = tahf4.quantize(x, {arg}, 0)
    y = tahf4.linear(c, s, w, None, f32)
    return y
"""
MASK = torch.linspace(0.5, 1.5, 64)
MASKED = Attachment("hif4", "", masked=True, activation="a", mask=MASK)


def test_a_masked_activation_is_multiplied_and_its_weight_divided():
    ran = assert_pass(
        ONE.format(m="", how="", arg=None),
        Smooth(),
        ONE.format(m="m: multiplier of w masked\n    ", how=" masked", arg="m"),
        recipe={"w": MASKED},
    )
    assert ran.record.matches == 1


def test_all_products_that_read_an_activation_are_divided_by_its_mask():
    before = """
        x: f32[4, 64]
        q: hif4[64, 64]
        k: hif4[32, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, q, None, f32)
        z = tahf4.linear(c, s, k, None, f32)
        return y, z
    """
    after = """
        x: f32[4, 64]
        m: multiplier of q+k masked
        q: hif4[64, 64] masked
        k: hif4[32, 64] masked
        c, s = tahf4.quantize(x, m, 0)
        y = tahf4.linear(c, s, q, None, f32)
        z = tahf4.linear(c, s, k, None, f32)
        return y, z
    """
    assert_pass(before, Smooth(), after, recipe={"q": MASKED, "k": MASKED})
    # A recipe that says nothing about one of them, or something else, says nothing about the activation.
    assert_pass(before, Smooth(), recipe={"q": MASKED})
    assert_pass(
        before, Smooth(), recipe={"q": MASKED, "k": Attachment("hif4", "", masked=True, activation="b", mask=MASK)}
    )


def test_a_weight_that_is_read_in_two_ways_is_packed_in_two():
    assert_pass(
        """
        x: f32[4, 64]
        u: f32[4, 64]
        w: hif4[64, 64]
        v: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        d, t = tahf4.quantize(u, None, 0)
        z = tahf4.linear(d, t, w, None, f32)
        a = tahf4.linear(d, t, v, None, f32)
        return y, z, a
        """,
        Smooth(),
        """
        x: f32[4, 64]
        u: f32[4, 64]
        m: multiplier of w masked
        w: hif4[64, 64] masked
        w: hif4[64, 64]
        v: hif4[64, 64]
        c, s = tahf4.quantize(x, m, 0)
        y = tahf4.linear(c, s, w, None, f32)
        d, t = tahf4.quantize(u, None, 0)
        z = tahf4.linear(d, t, w, None, f32)
        a = tahf4.linear(d, t, v, None, f32)
        return y, z, a
        """,
        recipe={"w": MASKED},
    )


def test_without_a_mask_nothing_changes():
    before = ONE.format(m="", how="", arg=None)
    assert_pass(before, Smooth())
    assert_pass(before, Smooth(), recipe={"w": Attachment("hif4", "", activation="a")})


def test_a_quantization_that_no_product_reads_stays():
    assert_pass("x: f32[4, 64]\n c, s = tahf4.quantize(x, None, 0)\n return c, s", Smooth())
