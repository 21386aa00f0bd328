"""Every linear has a decision and its reason."""

from __future__ import annotations

import pytest
import torch
from graphs import Attachment, Cause, PackedError, PatternError, Reason, Text, assert_pass, run_passes
from tahf4_compiler.passes.normalize import Normalize
from tahf4_compiler.passes.plan import Plan

TWO = """
    x: f32[4, 64]
    up: param[128, 64] = "blocks.0.up.weight"
    out: param[64, 64] = "out.weight"
    y = linear(x, up)  # {0}
    z = linear(x, out)  # {1}
    return y, z
"""

ONE = """
    x: f32[4, 64]
    w: param[64, 64] = "blocks.0.w.weight"
    y = linear(x, w)  # {0}
    return y
"""


def test_the_body_runs_in_hif4_and_the_boundary_in_high_precision():
    ran = assert_pass(
        TWO.format("body: in a repeated block", "boundary: boundary: outside"),
        Plan(),
        TWO.format("hif4: in a repeated block", "high_precision: boundary: outside"),
    )
    first, second = ran.plan
    assert (first.module, first.k, first.n, first.node, first.weight_index) == ("blocks.0.up", 64, 128, "y", 1)
    assert (first.bytes_before, first.bytes_after, first.flops) == (128 * 64 * 4, 128 * 36, 2 * 4 * 64 * 128)
    assert (second.bytes_before, second.bytes_after) == (64 * 64 * 4, 64 * 64 * 4)
    assert ran.record.matches == 2


def test_it_plans_what_was_not_classified():
    assert_pass(ONE.replace("  # {0}", ""), Plan(), ONE.format("hif4: not classified"))


def test_bytes_are_those_of_whole_units_and_flops_of_the_example():
    (decision,) = assert_pass(
        "x: bf16[n, 3, 100]\n w: param.bf16[65, 100]\n y = linear(x, w)\n return y",
        Plan(),
        "x: bf16[n, 3, 100]\n w: param.bf16[65, 100]\n y = linear(x, w)  # hif4: not classified\n return y",
    ).plan
    assert (decision.bytes_before, decision.bytes_after) == (65 * 100 * 2, 65 * 2 * 36)
    assert decision.flops == 2 * 5 * 3 * 100 * 65


def test_bytes_before_are_those_of_the_parameter_not_of_its_cast():
    text = "x: bf16[4, 64]\n w: param[64, 64]\n v = to.dtype(w, bf16)\n y = linear(x, v){0}\n return y"
    (decision,) = assert_pass(text.format(""), Plan(), text.format("  # hif4: not classified")).plan
    assert decision.bytes_before == 64 * 64 * 4


def test_one_weight_is_planned_once():
    text = "x: f32[4, 64]\n w: param[64, 64]\n y = linear(x, w){0}\n z = linear(y, w){0}\n return z"
    ran = assert_pass(text.format(""), Plan(), text.format("  # hif4: not classified"))
    (decision,) = ran.plan
    assert decision.flops == 2 * (2 * 4 * 64 * 64)


def test_one_weight_with_two_decisions_is_planned_twice():
    text = "x: f32[4, 64]\n w: param[64, 64]\n y = linear(x, w)  # {}\n z = linear(y, w)  # {}\n return z"
    ran = assert_pass(
        text.format("body: in a block", "boundary: boundary: outside"),
        Plan(),
        text.format("hif4: in a block", "high_precision: boundary: outside"),
    )
    assert len(ran.plan) == 2


def test_a_second_plan_takes_the_place_of_the_first():
    ran = assert_pass(ONE.format("body: in a block"), Plan(), ONE.format("hif4: in a block"), first=[Plan()])
    assert len(ran.plan) == 1


@pytest.mark.parametrize(("keep", "word"), [([], "hif4: in the budget"), (["w"], "high_precision: kept: 'w' matches")])
def test_a_branch_counts_where_its_linear_runs_in_4_bits(keep, word):
    recipe = {"blocks.0.w": Attachment("hif4", "in the budget", rank=8)}
    (decision,) = assert_pass(ONE.format("body: in a block"), Plan(), ONE.format(word), recipe=recipe, keep=keep).plan
    chosen = not keep
    assert decision.rank == (8 if chosen else 0)
    assert decision.bytes_after == (64 * 36 + 2 * 8 * 64 * 4 if chosen else 64 * 64 * 4)


# What cannot be quantized.


@pytest.mark.parametrize(
    ("inputs", "weight", "reason"),
    [
        ("w: f32[64, 64]", "w", "weight: w is an argument or buffer of the graph, not a parameter"),
        ("w: buffer[64, 64]", "w", "weight: w is an argument or buffer of the graph, not a parameter"),
        ("w: param[64, 64]\n v = neg(w)", "v", "weight: computed in the graph (aten.neg.default), not a parameter"),
        ("w: param[64, 64]\n v = to.dtype(w, f32)\n a = add_(w, 1)", "v", "weight: the graph writes to it"),
        ("w: param[64, 64]\n v = view(w, [4096])\n a = add_(v, 1)", "w", "weight: the graph writes to it"),
        ("w: param[64, 64]\n v, u = split(w, 32)\n a = add_(v, 1)", "w", "weight: the graph writes to it"),
        ("w: param[64, 64]\n v = type_as(w, w)\n a = add_(v, 1)", "w", "weight: the graph writes to it"),
        ("w: param[64]", "w", "shape: the weight has 1 axes, not 2"),
        ("w: param[8, 64]", "w", "shape: 64 -> 8 features, less than 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantized_says_why(inputs, weight, reason):
    text = f"x: f32[4, 64]\n {inputs}\n y = linear(x, {weight})"
    assert_pass(f"{text}\n return y", Plan(), f"{text}  # high_precision: {reason}\n return y")


@pytest.mark.parametrize("shape", [[1, 128], [4, 128], [1], []])
def test_a_bias_that_is_spread_over_the_product_stays_in_high_precision(shape):
    text = f"x: f32[4, 64]\n w: param[128, 64]\n b: param{shape}\n y = linear(x, w, b)"
    reason = f"high_precision: shape: the bias is {tuple(shape)}, expected (128,)"
    assert_pass(f"{text}\n return y", Plan(), f"{text}  # {reason}\n return y")


def test_few_input_features():
    text = "x: f32[4, 8]\n w: param[64, 8]\n y = linear(x, w)"
    assert_pass(
        f"{text}\n return y", Plan(), f"{text}  # high_precision: shape: 8 -> 64 features, less than 64\n return y"
    )
    assert_pass(f"{text}\n return y", Plan(min_features=8), f"{text}  # hif4: not classified\n return y")


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
def test_floats_are_quantized(dtype):
    text = f"x: {dtype}[4, 64]\n w: param.{dtype}[64, 64]\n y = linear(x, w)"
    assert_pass(f"{text}\n return y", Plan(), f"{text}  # hif4: not classified\n return y")


@pytest.mark.parametrize(
    ("line", "cast"),
    [
        ("w: param.f8[64, 64]", "to.dtype(w, f32)"),
        ("w: param[64, 64]", "to.dtype(w, f8)"),
        ("w: param.i32[64, 64]", "to.dtype(w, f32)"),
        ("w: param[64, 64]", "to.dtype(w, i32)"),
        ("w: param[64, 64] on meta", "to.device(w, cpu, f32)"),
    ],
)
def test_a_cast_that_loses_values_or_moves_them_makes_another_weight(line, cast):
    text = Text.parse(f"x: f32[4, 64]\n {line}\n v = {cast}\n u = to.dtype(v, f32)\n y = linear(x, u)\n return y")
    run_passes(text, Plan())
    assert text.context.plan[0].reason == "weight: computed in the graph (aten.to.dtype), not a parameter"


def test_integers_are_not():
    text = "x: i64[4, 64]\n w: param.i64[64, 64]\n y = linear(x, w)"
    assert_pass(
        f"{text}\n return y", Plan(), f"{text}  # high_precision: dtype: weight is int64\n return y",
    )  # fmt: skip


def test_a_weight_that_is_no_plain_tensor_stays():
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(torch.randn(64, 64), torch.randn(64, 64))
    text = "x: f32[4, 64]\n w: param[64, 64]\n y = linear(x, w)"
    after = f"{text}  # high_precision: weight: a TwoTensor, not a plain tensor\n return y"
    assert_pass(f"{text}\n return y", Plan(), after, values={"w": torch.nn.Parameter(weight, False)}, run=False)


# What the user and a recipe say.


def test_keep_takes_patterns_of_paths():
    before, after = TWO.format("body: b", "body: b"), TWO.format("high_precision: kept: 'up$' matches", "hif4: b")
    assert_pass(before, Plan(), after, keep=["up$"])


def test_a_keep_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(PatternError, match="matches none of the 2 linears"):
        assert_pass(TWO.format("body: b", "body: b"), Plan(), keep=["nothing"])


def test_a_keep_pattern_may_match_what_is_not_in_this_graph_or_cannot_be_quantized():
    assert_pass(ONE.replace("  # {0}", "").replace("return", "v: param[8, 8] = \"other.weight\"\n return"), Plan(),
                ONE.format("hif4: not classified").replace("return", "v: param[8, 8] = \"other.weight\"\n return"),
                keep=["other"])  # fmt: skip
    assert_pass("x: f32[4, 64]\n y = neg(x)\n return y", Plan(), keep=["anything"])


def test_what_was_kept_on_the_model_comes_first_then_the_recipe():
    kept = {"blocks.0.w": Attachment("high_precision", "kept by tahf4.keep")}
    recipe = {"blocks.0.w": Attachment("hif4", "in the budget")}
    assert_pass(
        ONE.format("body: b"), Plan(), ONE.format("high_precision: kept by tahf4.keep"), kept=kept, recipe=recipe
    )
    assert_pass(ONE.format("body: b"), Plan(), ONE.format("hif4: in the budget"), recipe=recipe)


def test_what_the_user_keeps_comes_before_the_recipe():
    recipe = {"blocks.0.w": Attachment("hif4", "in the budget")}
    after = ONE.format("high_precision: kept: 'w$' matches")
    assert_pass(ONE.format("body: b"), Plan(), after, recipe=recipe, keep=["w$"])


def test_a_recipe_may_name_what_is_small():
    text = ONE.replace("param[64, 64]", "param[8, 64]")
    recipe = {"blocks.0.w": Attachment("hif4", "in the budget")}
    assert_pass(text.format("body: b"), Plan(), text.format("hif4: in the budget"), recipe=recipe)


def test_a_recipe_decides_on_the_boundary_too():
    recipe = {"blocks.0.w": Attachment("hif4", "in the budget")}
    assert_pass(ONE.format("boundary: boundary: outside"), Plan(), ONE.format("hif4: in the budget"), recipe=recipe)
    recipe = {"blocks.0.w": Attachment("high_precision", "sensitivity 0.3")}
    assert_pass(ONE.format("body: b"), Plan(), ONE.format("high_precision: sensitivity 0.3"), recipe=recipe)


# Models that hold their linears in HiF4.

HELD = """
    x: f32[4, 100]
    wc: {codes} = "blocks.0.up.weight_codes"
    ws: {scales} = "blocks.0.up.weight_scales"
    v: param[128, 64] = "blocks.0.down.weight"
    c, s = tahf4.quantize(x, None, 0, 4)
    y = tahf4.linear(c, s, wc, ws, None, f32)
    z = linear(y, v)
    return z
"""

PLANNED = """
    x: f32[4, 100]
    wc: held codes of wc
    ws: held scales of ws
    v: param[128, 64] = "blocks.0.down.weight"
    c, s = tahf4.quantize(x, None, 0, 4)
    y = tahf4.linear(c, s, wc, ws, None, f32)  # hif4: packed
    z = linear(y, v)  # {down}
    return z
"""


LEFT = {"blocks.0.down": Attachment("high_precision", Reason(Cause.NOT_PACKED, "not packed"))}


def planned(down: str = "high_precision: not packed: it may have been left when the model was packed") -> str:
    return PLANNED.replace("{down}", down)


def test_a_packed_linear_is_planned_as_such_and_others_of_a_bare_graph_stay():
    held = HELD.format(codes="param.u8[64, 64]", scales="param.i32[64, 2]")
    ran = assert_pass(held, Plan(), planned(), first=[Normalize()], run=False)
    first = ran.plan[0]
    assert (first.module, first.k, first.n, first.weight_index) == ("blocks.0.up", 100, 64, 1)
    assert (first.bytes_before, first.bytes_after, first.flops) == (64 * 100 * 4, 64 * 2 * 36, 2 * 4 * 100 * 64)


@pytest.mark.parametrize(("bits", "span"), [({}, 4), ({"up": 8}, 1)])
def test_a_packed_linear_has_the_span_of_its_activation_while_that_has_4_bits(bits, span):
    held = HELD.format(codes="param.u8[64, 64]", scales="param.i32[64, 2]").replace("None, 0, 4)", "None, 0, 4, 4)")
    wanted = planned().replace("None, 0, 4)", "None, 0, 4, 4)")
    ran = assert_pass(held, Plan(), wanted, first=[Normalize()], run=False, activation_bits=bits)
    assert ran.plan[0].span == span


def test_a_packed_linear_had_the_dtype_that_its_product_has():
    held = HELD.format(codes="param.u8[64, 64]", scales="param.i32[64, 2]")
    text = Text.parse(held.replace("f32", "bf16").replace("param[128", "param.bf16[128"))
    run_passes(text, Normalize(), Plan())
    assert text.context.plan[0].bytes_before == 64 * 100 * 2


@pytest.mark.parametrize(("option", "bits"), [(4, 8), (16, 16)])
def test_a_step_has_its_bits_at_least(option, bits):
    recipe = {"blocks.0.w": Attachment("hif4", Reason(Cause.STEP, "this step runs in 8 bits"), activation_bits=8)}
    text = Text.parse(ONE.format("body: b"), recipe=recipe, activation_bits=option)
    run_passes(text, Plan())
    assert text.context.plan[0].activation_bits == bits


def test_a_packed_linear_cannot_be_kept_any_more():
    held = HELD.format(codes="param.u8[64, 64]", scales="param.i32[64, 2]")
    with pytest.raises(PackedError, match=r"matches blocks\.0\.up, which is packed"):
        assert_pass(held, Plan(), first=[Normalize()], run=False, keep=["up"])


@pytest.mark.parametrize("decision", ["hif4", "high_precision"])
def test_beside_packed_linears_a_recipe_decides_on_the_others(decision):
    held = HELD.format(codes="param.u8[64, 64]", scales="param.i32[64, 2]")
    recipe = {"blocks.0.down": Attachment(decision, "a recipe")}
    assert_pass(held, Plan(), planned(f"{decision}: a recipe"), first=[Normalize()], run=False, recipe=recipe)


# Programs ask for the kind of a reason, not for its words.


@pytest.mark.parametrize(
    ("line", "keep", "cause"),
    [
        ("w: param[64, 64]", [], Cause.OTHER),
        ("w: param[64, 64]", ["w"], Cause.KEPT),
        ("w: param[8, 64]", [], Cause.SMALL),
        ("w: param[64]", [], Cause.SHAPE),
        ("w: buffer[64, 64]", [], Cause.WEIGHT),
        ("w: param[64, 64]\n v = neg(w)\n a = add_(w, 1)", [], Cause.WEIGHT),
    ],
)
def test_a_reason_knows_its_kind(line, keep, cause):
    text = f"x: f32[4, 64]\n {line}\n y = linear(x, w)"
    graph = Text.parse(f"{text}\n return y", keep=keep)
    run_passes(graph, Plan())
    assert [decision.cause for decision in graph.context.plan] == [cause]


def test_the_kind_of_a_type_and_of_what_is_packed():
    text = "x: i64[4, 64]\n w: param.i64[64, 64]\n y = linear(x, w)"
    graph = Text.parse(f"{text}\n return y")
    run_passes(graph, Plan())
    assert [decision.cause for decision in graph.context.plan] == [Cause.DTYPE]
    held = HELD.format(codes="param.u8[64, 64]", scales="param.i32[64, 2]")
    left = planned("high_precision: not packed")
    ran = assert_pass(held, Plan(), left, first=[Normalize()], run=False, recipe=LEFT)
    assert [decision.cause for decision in ran.plan] == [Cause.PACKED, Cause.NOT_PACKED]
