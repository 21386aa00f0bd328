"""The inputs that passes add: packed weights and multipliers are made as the graph asks for them, once."""

from __future__ import annotations

import torch
from graphs import Attachment, Text, arguments, conversions, run_passes, signs
from tahf4_compiler.passes.rotate import Rotate
from tahf4_compiler.passes.scale_search import ScaleSearch

ONE = """
    x: f32[4, 64]
    w: hif4[64, 64]
    c, s = tahf4.quantize(x, None, 0)
    y = tahf4.linear(c, s, w, None, f32)
    return y
"""


def test_multipliers_of_one_weight_are_those_of_the_graph_and_of_the_recipe():
    text = Text.parse(
        """
        x: f32[4, 64]
        w: hif4[64, 64]
        v: hif4[64, 64]
        mask: multiplier of w masked
        flips: multiplier of w signs
        both: multiplier of w masked, signs
        own: multiplier of v signs
        a, b = tahf4.quantize(x, mask, 0)
        return a
        """,
        recipe={"w": Attachment("hif4", "", masked=True, mask=torch.linspace(0.5, 1.5, 64), seed=7)},
    )
    found = arguments(text)
    assert torch.equal(found["mask"], torch.linspace(0.5, 1.5, 64))
    assert torch.equal(found["flips"], signs(7, 64)), "the seed of a recipe comes first"
    assert torch.equal(found["both"], found["mask"] * found["flips"])
    assert set(found["own"].tolist()) == {-1.0, 1.0} and not torch.equal(found["own"], found["flips"])


def test_one_weight_is_packed_for_each_way_of_packing_it():
    text = Text.parse(ONE)
    plain = arguments(text)["w_codes"]
    run_passes(text, ScaleSearch("squared"))
    assert not torch.equal(arguments(text)["w_codes"], plain)
    run_passes(text, Rotate())
    assert not torch.equal(arguments(text)["w_codes"], plain)


def test_a_weight_is_packed_once_and_not_for_its_multiplier():
    text = Text.parse(ONE)
    run_passes(text, Rotate())
    before = conversions()
    for _ in range(2):
        arguments(text)
    assert conversions() - before == 1


def test_groups_that_begin_with_one_weight_are_kept_apart():
    text = Text.parse(
        """
        x: f32[4, 64]
        q+k: hif4[64+64, 64]
        q+v: hif4[64+64, 64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, q+k, None, f32)
        z = tahf4.linear(c, s, q+v, None, f32)
        return y, z
        """
    )
    before = conversions()
    first = arguments(text)
    assert conversions() - before == 4
    second = arguments(text)
    assert conversions() - before == 4
    assert torch.equal(first["q_k_codes"][:64], first["q_v_codes"][:64])
    assert not torch.equal(first["q_k_codes"][64:], first["q_v_codes"][64:])
    assert all(torch.equal(first[name], second[name]) for name in first)
