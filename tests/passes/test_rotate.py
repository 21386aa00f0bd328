"""Activations and weights are rotated by a block Hadamard matrix with random signs."""

from __future__ import annotations

import pytest
import torch
from graphs import Attachment, OptionError, assert_pass
from tahf4_compiler.passes.normalize import Normalize
from tahf4_compiler.passes.rotate import Rotate

ONE = """
    x: f32[4, {k}]
    {m}w: hif4[64, {k}]{how}
    c, s = tahf4.quantize(x, {args})
    y = tahf4.linear(c, s, w, None, f32)
    return y
"""


def one(how="", args="None, 0", m="", k=64):
    return ONE.format(how=how and f" {how}", args=args, m=m and f"m: multiplier of w {m}\n    ", k=k)


def test_by_default_blocks_of_64_channels_are_rotated():
    ran = assert_pass(one(), Rotate(), one("rotated 64", "m, 64", "signs"))
    assert ran.notes == ["1 activations in Hadamard blocks of 64"]


def test_a_mask_and_the_signs_are_one_multiplier():
    before = one("masked\n    m: multiplier of w masked", "m, 0")
    assert_pass(
        before, Rotate(), one("masked, rotated 64", "m, 64", "masked, signs"),
        recipe={"w": Attachment("hif4", "", masked=True, hadamard_block=64, mask=torch.ones(64))},
    )  # fmt: skip


def test_linears_that_read_one_activation_have_one_multiplier():
    text = """
        x: f32[4, 64]
        {m}{q}: hif4[64+32, 64]{how}
        c, s = tahf4.quantize(x, {args})
        y = tahf4.linear(c, s, {q}, None, f32)
        return y
    """
    assert_pass(
        text.format(m="", q="q+k", how="", args="None, 0"),
        Rotate(),
        text.format(m="m: multiplier of q+k signs\n        ", q="q+k", how=" rotated 64", args="m, 64"),
    )


@pytest.mark.parametrize(
    ("k", "limit", "block"), [(192, 256, 64), (128, 4096, 128), (100, 64, 64), (128, 32, 32), (64, 1, 1)]
)
def test_the_widest_block_up_to_the_option_that_divides_the_padded_width(k, limit, block):
    assert_pass(one(k=k), Rotate(limit), one(f"rotated {block}", f"m, {block}", "signs", k=k))


def test_a_recipe_says_how_wide():
    recipe = {"w": Attachment("hif4", "", hadamard_block=32)}
    assert_pass(one(), Rotate(), one("rotated 32", "m, 32", "signs"), recipe=recipe)
    assert_pass(one(), Rotate(0), one("rotated 32", "m, 32", "signs"), recipe=recipe)
    assert_pass(one(), Rotate(), recipe={"w": Attachment("hif4", "")})


def test_nothing_is_rotated_by_blocks_of_nothing():
    assert_pass(one(), Rotate(0))


@pytest.mark.parametrize("block", [48, -64, 3])
def test_a_block_that_is_no_power_of_two_is_refused(block):
    with pytest.raises(OptionError, match="expected a power of two"):
        assert_pass(one(), Rotate(block))


def test_what_the_model_holds_in_hif4_was_rotated_when_it_was_packed():
    text = """
        x: f32[4, 64]
        {}
        {}
        c, s = tahf4.quantize(x, None, 0, 4)
        y = tahf4.linear(c, s, wc, ws, None, f32)
        return y
    """
    given = 'wc: param.u8[64, 32] = "w.weight_codes"', 'ws: param.i32[64, 1] = "w.weight_scales"'
    held = "wc: held codes of wc", "ws: held scales of ws"
    assert_pass(text.format(*given), Rotate(), text.format(*held), first=[Normalize()])


def test_a_weight_of_two_activations_is_packed_once():
    assert_pass(
        """
        x: f32[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        d, t = tahf4.quantize(y, None, 0)
        z = tahf4.linear(d, t, w, None, f32)
        return z
        """,
        Rotate(),
        """
        x: f32[4, 64]
        m: multiplier of w signs
        w: hif4[64, 64] rotated 64
        c, s = tahf4.quantize(x, m, 64)
        y = tahf4.linear(c, s, w, None, f32)
        d, t = tahf4.quantize(y, m, 64)
        z = tahf4.linear(d, t, w, None, f32)
        return z
        """,
    )
