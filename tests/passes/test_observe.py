"""A calibration sees each activation that linears in 4 bits would read, once."""

from __future__ import annotations

import pytest
from graphs import assert_pass
from tahf4_compiler.passes.observe import Observe

TWO = """
    x: f32[4, 64]
    {h}q: param[64, 64]
    k: param[64, 64]
    {o}y = linear(x, q){0}
    {w}z = linear(x, k){1}
    return y, z
"""


def before(first="  # hif4: in a block", second="  # hif4: in a block", write=""):
    return TWO.format(first, second, h="", o="", w=write)


def after(weights, where=1, write=""):
    handle, call = f"h: observer of {weights}\n    ", "o = tahf4.observe(x, h)\n    "
    second = write + (call if where == 2 else "")
    return TWO.format(
        "", "", h="" if weights.startswith("k") else handle, o=call if where == 1 else "", w=second
    ).replace("k: param", (handle if weights.startswith("k") else "") + "k: param")


def test_an_activation_is_observed_once_for_all_linears_that_read_it():
    ran = assert_pass(before(), Observe(), after("q+k"))
    assert ran.record.matches == 1


@pytest.mark.parametrize("reason", ["kept: 'q' matches", "sensitivity 0.3", "this step runs in high precision"])
def test_what_was_kept_in_high_precision_by_hand_is_observed_as_well(reason):
    assert_pass(before(f"  # high_precision: {reason}"), Observe(), after("q+k"))


@pytest.mark.parametrize(
    "comment",
    [
        pytest.param("  # high_precision: boundary: outside", id="on the boundary"),
        pytest.param("  # high_precision: shape: too small", id="in high precision for another reason"),
        pytest.param("  # high_precision: weight: computed", id="whose weight is none"),
        pytest.param("", id="not planned"),
        pytest.param("  # body: in a block", id="classified but not planned"),
    ],
)
def test_other_linears_are_not_observed(comment):
    assert_pass(before(comment, comment), Observe(), before("", ""))
    assert_pass(before(second=comment), Observe(), after("q"))
    assert_pass(before(first=comment), Observe(), after("k", where=2))


def test_a_linear_that_was_planned_outside_of_the_body_is_not_observed():
    assert_pass(before("  # hif4: boundary", "  # hif4: boundary"), Observe(), before("", ""))


def test_a_write_in_between_makes_it_another_activation():
    write = "a = add_(x, 1)\n    "
    assert_pass(
        before(write=write),
        Observe(),
        """
        x: f32[4, 64]
        h: observer of q
        q: param[64, 64]
        i: observer of k
        k: param[64, 64]
        o = tahf4.observe(x, h)
        y = linear(x, q)
        a = add_(x, 1)
        p = tahf4.observe(x, i)
        z = linear(x, k)
        return y, z
        """,
    )


def test_a_weight_that_reads_an_activation_twice_is_named_once():
    assert_pass(
        """
        x: f32[4, 64]
        q: param[64, 64]
        v = to.dtype(q, f32)
        y = linear(x, q)  # hif4
        z = linear(x, q)  # hif4
        return y, z
        """,
        Observe(),
        """
        x: f32[4, 64]
        h: observer of q
        q: param[64, 64]
        v = to.dtype(q, f32)
        o = tahf4.observe(x, h)
        y = linear(x, q)
        z = linear(x, q)
        return y, z
        """,
    )


def test_a_weight_that_is_no_parameter_is_not_observed():
    assert_pass(
        """
        x: f32[4, 64]
        q: param[64, 64]
        v = neg(q)
        y = linear(x, v)  # hif4
        return y
        """,
        Observe(),
        "x: f32[4, 64]\n q: param[64, 64]\n v = neg(q)\n y = linear(x, v)\n return y",
    )
