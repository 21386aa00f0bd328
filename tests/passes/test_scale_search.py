"""Weights are packed with the scales of least squared error."""

from __future__ import annotations

import pytest
from graphs import Attachment, OptionError, assert_pass
from tahf4_compiler.passes.scale_search import ScaleSearch

ONE = """
    x: f32[4, 64]
    w: hif4[64, 64]{}
    c, s = tahf4.quantize(x, None, 0)
    y = tahf4.linear(c, s, w, None, f32)
    return y
"""


@pytest.mark.parametrize("by", ["squared", "weighted"])
def test_the_packed_weight_is_another_one_and_the_graph_the_same(by):
    ran = assert_pass(ONE.format(""), ScaleSearch(by), ONE.format(f" searched by {by}"))
    assert ran.record.matches == 1


def test_it_leaves_mask_and_rotation():
    assert_pass(
        ONE.format(" masked, rotated 64"), ScaleSearch("squared"),
        ONE.format(" masked, rotated 64, searched by squared"),
    )  # fmt: skip


def test_what_a_recipe_says_comes_first():
    assert_pass(
        ONE.format(""), ScaleSearch(), ONE.format(" searched by weighted"),
        recipe={"w": Attachment("hif4", "", search="weighted")},
    )  # fmt: skip
    assert_pass(ONE.format(""), ScaleSearch("squared"), recipe={"w": Attachment("hif4", "")})


def test_by_default_nothing_is_searched():
    assert_pass(ONE.format(""), ScaleSearch())


def test_an_unknown_way_is_refused():
    with pytest.raises(OptionError, match="expected one of"):
        assert_pass(ONE.format(""), ScaleSearch("cubed"))
