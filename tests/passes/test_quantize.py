"""Linears that the plan put in HiF4 become a quantization and a product in 4 bits."""

from __future__ import annotations

import pytest
import torch
from graphs import DECISION, Attachment, LowRank, assert_pass
from tahf4_compiler.passes.normalize import Normalize
from tahf4_compiler.passes.plan import Plan
from tahf4_compiler.passes.quantize import Quantize


def test_a_planned_linear_is_rewritten():
    ran = assert_pass(
        """
        x: f32[n, 64]
        w: param[128, 64] = "blocks.0.up.weight"
        b: param[128] = "blocks.0.up.bias"
        @ blocks.0 Block, blocks.0.up Linear
        y = linear(x, w, b)  # hif4: in a block
        return y
        """,
        Quantize(),
        """
        x: f32[n, 64]
        w: hif4[128, 64]
        b: param[128] = "blocks.0.up.bias"
        @ blocks.0 Block, blocks.0.up Linear
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, b, f32)
        return y
        """,
    )
    assert ran.node("linear").meta[DECISION][0].node == "y"
    assert ran.record.matches == 1


@pytest.mark.parametrize("call", ["linear(x, w)", "linear(x, w, None)", "linear(x, w, bias=None)"])
def test_no_bias(call):
    head = "x: f32[4, 64]\n {}\n"
    assert_pass(
        head.format("w: param[64, 64]") + f"y = {call}  # hif4\n return y",
        Quantize(),
        head.format("w: hif4[64, 64]")
        + "c, s = tahf4.quantize(x, None, 0)\n y = tahf4.linear(c, s, w, None, f32)\n return y",
    )


def test_a_bias_by_its_name():
    head = "x: f32[4, 64]\n {}\n b: param[64]\n"
    assert_pass(
        head.format("w: param[64, 64]") + "y = linear(x, w, bias=b)  # hif4\n return y",
        Quantize(),
        head.format("w: hif4[64, 64]")
        + "c, s = tahf4.quantize(x, None, 0)\n y = tahf4.linear(c, s, w, b, f32)\n return y",
    )


def test_casts_of_the_weight_go_with_it_and_the_result_keeps_its_type():
    assert_pass(
        """
        x: bf16[4, 64]
        w: param[64, 64]
        v = to.dtype(w, bf16)
        y = linear(x, v, None)  # hif4
        return y
        """,
        Quantize(),
        """
        x: bf16[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, bf16)
        return y
        """,
    )


def test_one_weight_that_is_read_twice_is_one_input():
    assert_pass(
        """
        x: f32[4, 64]
        w: param[64, 64]
        y = linear(x, w, None)  # hif4
        z = linear(y, w, None)  # hif4
        return z
        """,
        Quantize(),
        """
        x: f32[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        d, t = tahf4.quantize(y, None, 0)
        z = tahf4.linear(d, t, w, None, f32)
        return z
        """,
    )


def test_a_weight_that_others_read_stays_an_input_beside_its_codes():
    assert_pass(
        """
        x: f32[4, 64]
        w: param[64, 64]
        y = linear(x, w, None)  # hif4
        z = neg(w)
        return y, z
        """,
        Quantize(),
        """
        x: f32[4, 64]
        w: hif4[64, 64]
        w: param[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        z = neg(w)
        return y, z
        """,
    )


@pytest.mark.parametrize("comment", ["  # high_precision: kept", "  # nvfp4: a plug-in's own", ""])
def test_other_linears_stay(comment):
    ran = assert_pass(
        f"""
        x: f32[4, 64]
        w: param[64, 64]
        y = linear(x, w, None){comment}
        return y
        """,
        Quantize(),
        "x: f32[4, 64]\n w: param[64, 64]\n y = linear(x, w, None)\n return y",
    )
    assert ran.record.matches == 0


def test_parameters_that_nothing_reads_stay_if_nothing_is_rewritten_and_others_stay_anyway():
    before = """
        x: f32[4, 64]
        u: f32[4, 64]
        w: param[64, 64]
        p: param[64]
        y = linear(x, w, None)  # {}
        return y
    """
    assert_pass(before.format("high_precision"), Quantize(), before.format("!").replace("  # !", ""))
    assert_pass(
        before.format("hif4"),
        Quantize(),
        """
        x: f32[4, 64]
        u: f32[4, 64]
        w: hif4[64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, None, f32)
        return y
        """,
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_branch_stands_beside_its_product(dtype):
    """It has the weight's type; where the linear runs in another one, the weight is cast, and so is the branch."""
    given = {"f32": ("w", "la", "lb"), "bf16": ("v", "ca", "cb")}[dtype]
    casts = "ca = to.dtype(la, bf16)\n h = matmul(x, ca)\n cb = to.dtype(lb, bf16)\n" if dtype == "bf16" else ""
    before = "v = to.dtype(w, bf16)\n" if dtype == "bf16" else ""
    branch = LowRank(torch.randn(64, 8) / 8, torch.randn(8, 128) / 8)
    assert_pass(
        f"""
        x: {dtype}[4, 64]
        w: param[128, 64]
        b: param.{dtype}[128]
        {before}y = linear(x, {given[0]}, b)
        return y
        """,
        Quantize(),
        f"""
        x: {dtype}[4, 64]
        w: hif4[128, 64] rank 8
        la: low_rank_a of w rank 8
        lb: low_rank_b of w rank 8
        b: param.{dtype}[128]
        c, s = tahf4.quantize(x, None, 0)
        p = tahf4.linear(c, s, w, b, {dtype})
        {casts or "h = matmul(x, la)"}
        i = matmul(h, {given[2]})
        y = add(p, i)
        return y
        """,
        first=[Plan()],
        recipe={"w": Attachment("hif4", "", rank=8, low_rank=branch)},
    )


def test_what_the_model_holds_gets_the_bits_of_the_plan():
    """The plan says 8 where the graph says 4: the activation changes, the weight does not."""
    ran = assert_pass(
        """
        x: f32[4, 64]
        wc: param.u8[64, 32] = "blocks.0.up.weight_codes"
        ws: param.i32[64, 1] = "blocks.0.up.weight_scales"
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, wc, ws, None, f32)
        return y
        """,
        Quantize(),
        """
        x: f32[4, 64]
        wc: held codes of wc
        ws: held scales of ws
        c, s = tahf4.quantize(x, None, 0, 8)
        y = tahf4.linear(c, s, wc, ws, None, f32)
        return y
        """,
        first=[Normalize(), Plan()],
        run=False,
        activation_bits=8,
    )
    assert [d.activation_bits for d in ran.plan] == [8] and ran.record.matches == 1


def test_what_the_model_holds_stays_as_it_is_without_a_plan():
    def forget(graph_module):
        for node in graph_module.graph.nodes:
            node.meta.pop(DECISION, None)

    text = """
        x: f32[4, 64]
        wc: {}
        ws: {}
        c, s = tahf4.quantize(x, None, 0, 8)
        y = tahf4.linear(c, s, wc, ws, None, f32)
        return y
    """
    given = 'param.u8[64, 32] = "w.weight_codes"', 'param.i32[64, 1] = "w.weight_scales"'
    held = text.format("held codes of wc", "held scales of ws")
    assert_pass(text.format(*given), Quantize(), held, first=[Normalize()], run=False, prepare=forget)


def test_a_linear_with_an_activation_in_8_bits():
    head = "x: f32[4, 64]\n {}\n v: {}[64, 64]\n"
    assert_pass(
        head.format('w: param[64, 64] = "up.weight"', "param") + "y = linear(x, w)\n z = linear(x, v)\n return y, z",
        Quantize(),
        head.format("w: hif4[64, 64]", "hif4")
        + "c, s = tahf4.quantize(x, None, 0, 8)\n y = tahf4.linear(c, s, w, None, f32)\n"
        + "d, t = tahf4.quantize(x, None, 0)\n z = tahf4.linear(d, t, v, None, f32)\n return y, z",
        first=[Plan()],
        run=False,
        activation_bits={"^up$": 8},
    )
