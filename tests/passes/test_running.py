"""Graphs are run to be compared: what they are given stays as it is, and any difference is a number."""

from __future__ import annotations

import pytest
import torch
from graphs import Text, arguments, relative_error, results

ZEROS, ONES = torch.zeros(4), torch.ones(4)


def test_a_parameter_that_the_graph_writes_to_is_copied_and_others_are_not():
    text = Text.parse(
        "x: f32[4, 64]\n w: param[64, 64]\n v: param[64, 64]\n a = add_(w, 1)\n y = linear(x, a)\n z = linear(y, v)\n"
        " return z"
    )
    before = text.root.w.weight.clone()
    results(text)
    assert torch.equal(text.root.w.weight, before)
    assert arguments(text)["v"] is text.root.v.weight


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        pytest.param([ONES], [ONES * 1.5], 0.5, id="relative"),
        pytest.param([ONES, ZEROS], [ONES, ONES], 1.0, id="of all together"),
        pytest.param([ZEROS], [ZEROS], 0.0, id="nothing"),
        pytest.param([ZEROS], [ONES], 1.0, id="something instead of zeros"),
        pytest.param([ZEROS.int()], [ONES.int()], float("inf"), id="other integers"),
        pytest.param([ONES.int()], [ONES.int()], 0.0, id="the same integers"),
    ],
)
def test_the_error_of_results(old, new, error):
    assert relative_error(old, new) == error
