"""Repeated blocks are found by structure: who holds linears, is of one class and reads what the one before wrote."""

from __future__ import annotations

import re

import pytest
from graphs import assert_pass
from tahf4_compiler.passes.classify import Classify
from tahf4_compiler.passes.normalize import Normalize

BLOCKS = """
    x: f32[4, 64]
    a: param[64, 64]
    u0: param[64, 64]
    d0: param[64, 64]
    u1: param[64, 64]
    d1: param[64, 64]
    z: param[64, 64]
    @ first Linear
    h = linear(x, a){boundary}
    @ blocks.0 net.Block
    y0 = linear(h, u0){block0}
    h0 = linear(y0, d0){block0}
    @ blocks.1 net.Block
    y1 = linear(h0, u1){block1}
    h1 = linear(y1, d1){block1}
    @ last Linear
    out = linear(h1, z){boundary}
    return out
"""


def plain(text):
    return text.format(boundary="", block0="", block1="")


def found(text, container="blocks", cls="Block"):
    return text.format(
        boundary="  # boundary: outside the repeated blocks",
        block0=f"  # body: in repeated block {container}.0 ({cls})",
        block1=f"  # body: in repeated block {container}.1 ({cls})",
    )


def alone(text):
    return text.format(
        **dict.fromkeys(
            ("boundary", "block0", "block1"), "  # body: the graph has no repeated blocks and counts as one block"
        )
    )


def test_members_of_a_container_that_follow_each_other_are_repeated_blocks():
    ran = assert_pass(plain(BLOCKS), Classify(), found(BLOCKS))
    assert ran.notes == ["2 repeated blocks: blocks.0-1"]
    assert ran.record.matches == 6


def test_what_a_block_holds_belongs_to_it():
    inner = BLOCKS.replace("@ blocks.0 net.Block", "@ blocks.0 net.Block, blocks.0.attn net.Attention")
    assert_pass(plain(inner), Classify(), found(inner))


def test_a_weight_has_one_place_also_where_it_is_read_outside_of_its_block():
    outside = "g = linear(h1, u0){block0}\n    out = linear(g, z){boundary}"
    text = BLOCKS.replace("out = linear(h1, z){boundary}", outside)
    assert_pass(plain(text), Classify(), found(text))


def test_inside_a_block_nothing_is_a_block_of_its_own():
    inner = BLOCKS.replace("@ blocks.0 net.Block", "@ outer.0 net.Outer, outer.0.blocks.0 net.Block").replace(
        "@ blocks.1 net.Block", "@ outer.1 net.Outer, outer.1.blocks.0 net.Block"
    )
    assert_pass(plain(inner), Classify(), found(inner, "outer", "Outer"))


def test_repeated_blocks_inside_of_repeated_blocks_are_not_counted():
    text = "x: f32[4, 64]\n" + "".join(f"w{i}: param[64, 64]\n" for i in range(8))
    last = "x"
    for i in range(8):
        outer = f"outer.{i // 4}"
        if i % 2 == 0:
            text += f"@ {outer} net.Outer, {outer}.blocks.{i // 2 % 2} net.Block\n"
        text += f"h{i} = linear({last}, w{i})  # body: in repeated block {outer} (Outer)\n"
        last = f"h{i}"
    text += f"return {last}"
    ran = assert_pass(re.sub("  # .*", "", text), Classify(), text)
    assert ran.notes == ["2 repeated blocks: outer.0-1"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("@ blocks.1 net.Block", "@ blocks.1 net.Other", id="another class"),
        pytest.param("y1 = linear(h0, u1)", "y1 = linear(h, u1)", id="side by side"),
        pytest.param("@ blocks.1 net.Block", "@ others.1 net.Block", id="in another container"),
    ],
)
def test_no_blocks(old, new):
    text = BLOCKS.replace(old, new)
    assert old in BLOCKS
    assert_pass(plain(text), Classify(), alone(text))


def test_a_member_with_one_linear_is_no_block_unless_that_is_enough():
    text = BLOCKS.replace("h1 = linear(y1, d1){block1}", "h1 = neg(y1)").replace("d1: param[64, 64]\n", "")
    assert_pass(plain(text), Classify(), alone(text))
    assert_pass(plain(text), Classify(min_linears=1), found(text))


def test_a_graph_without_repetition_is_one_block_but_not_beside_others():
    text = "x: f32[4, 64]\n w: param[64, 64]\n y = linear(x, w){}\n return y"
    assert_pass(
        text.format(""), Classify(), text.format("  # body: the graph has no repeated blocks and counts as one block")
    )
    blocks = {"blocks": {"blocks.0": "Block", "blocks.1": "Block"}}
    after = text.format("  # boundary: outside the repeated blocks")
    assert_pass(text.format(""), Classify(), after, blocks=blocks)


def test_a_piece_of_a_model_after_a_graph_break_knows_the_containers_of_the_whole():
    text = """
        x: f32[4, 64]
        u: param[64, 64] = "blocks.1.up.weight"
        e: param[64, 64] = "embed.weight"
        y = linear(x, u){0}
        z = linear(y, e){1}
        return z
    """
    blocks = {"blocks": {"blocks.0": "Block", "blocks.1": "Block"}}
    assert_pass(
        text.format("", ""),
        Classify(),
        text.format("  # body: in repeated block blocks.1 (Block)", "  # boundary: outside the repeated blocks"),
        blocks=blocks,
    )


def test_a_piece_with_one_linear_of_each_block_is_judged_by_the_whole():
    text = """
        x: f32[4, 64]
        u: param[64, 64] = "blocks.0.up.weight"
        v: param[64, 64] = "blocks.1.up.weight"
        y = linear(x, u){0}
        z = linear(y, v){1}
        return z
    """
    after = text.format(*(f"  # body: in repeated block blocks.{i} (Block)" for i in (0, 1)))
    blocks = {"blocks": {"blocks.0": "Block", "blocks.1": "Block"}}
    assert_pass(text.format("", ""), Classify(), after, blocks=blocks)


def test_where_all_members_are_in_the_graph_the_flow_between_them_decides():
    text = BLOCKS.replace("y1 = linear(h0, u1)", "y1 = linear(h, u1)")
    for name, path in (("u0", "blocks.0.up"), ("d0", "blocks.0.down"), ("u1", "blocks.1.up"), ("d1", "blocks.1.down")):
        text = text.replace(f"{name}: param[64, 64]", f'{name}: param[64, 64] = "{path}.weight"')
    blocks = {"blocks": {"blocks.0": "Block", "blocks.1": "Block"}}
    outside = "  # boundary: outside the repeated blocks"
    assert_pass(plain(text), Classify(), text.format(boundary=outside, block0=outside, block1=outside), blocks=blocks)


# Blocks that are attributes of one parent.

ATTRIBUTES = BLOCKS.replace("blocks.0", "early").replace("blocks.1", "late")


def test_attributes_of_one_structure_that_hold_nearly_all_weights_are_blocks():
    after = ATTRIBUTES.format(
        boundary="  # boundary: outside the repeated blocks",
        block0="  # body: in repeated block early (Block)",
        block1="  # body: in repeated block late (Block)",
    )
    small = {
        "a: param[64, 64]": "a: param[64, 16]",
        "z: param[64, 64]": "z: param[16, 64]",
        "x: f32[4, 64]": "x: f32[4, 16]",
    }

    def fit(text):
        for old, new in small.items():
            text = text.replace(old, new)
        return text

    ran = assert_pass(fit(plain(ATTRIBUTES)), Classify(), fit(after))
    assert ran.notes == ["2 repeated blocks: early, late"]


def test_attributes_that_hold_less_than_three_quarters_of_the_weights_are_none():
    assert_pass(plain(ATTRIBUTES), Classify(), alone(ATTRIBUTES))


def test_attributes_of_another_structure_are_none():
    text = ATTRIBUTES.replace("h1 = linear(y1, d1)", "g = gelu(y1)\n h1 = linear(g, d1)")
    text = (
        text.replace("@ first Linear", "")
        .replace("a: param[64, 64]", "a: param[64, 16]")
        .replace("x: f32[4, 64]", "x: f32[4, 16]")
    )
    text = (
        text.replace("z: param[64, 64]", "z: param[16, 64]")
        .replace("@ last Linear", "@")
        .replace("\n    \n", "\n    @\n")
    )
    text = text.replace("    @\n    h = linear", "    h = linear")
    assert_pass(plain(text), Classify(), alone(text))


# A module that holds repetition, and is a block itself.

HOLDER = """
    x: f32[4, 64]
    q: param[64, 64]
    u0: param[256, 64]
    d0: param[64, 256]
    u1: param[256, 64]
    d1: param[64, 256]
    @ attn net.Attention
    a = linear(x, q){attn}
    @
    r = add(x, a)
    @ mlp net.Mlp
    h0 = linear(r, u0){first}
    y0 = linear(h0, d0){first}
    @ other net.Mlp
    h1 = linear(r, u1){second}
    y1 = linear(h1, d1){second}
    @
    s = add(y0, y1)
    t = add(r, s)
    v = view(t, [2, 2, 64])
    return v
"""


def held(text, attn):
    first, second = (f"  # body: in repeated block {path} (Mlp)" for path in ("mlp", "other"))
    return text.format(attn=attn, first=first, second=second)


def test_what_adds_to_its_input_in_the_width_of_its_parts_is_a_block(caplog):
    text = HOLDER.format(attn="", first="", second="")
    assert_pass(text, Classify(), held(HOLDER, "  # body: the graph adds to its input and counts as one block"))
    assert not caplog.text


def test_attributes_may_read_each_other_in_a_block():
    text = HOLDER.replace("linear(r, u1)", "linear(y0, u1)")
    before = text.format(attn="", first="", second="")
    assert_pass(before, Classify(), held(text, "  # body: the graph adds to its input and counts as one block"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("t = add(r, s)", "t = mul(r, s)", id="does not add"),
        pytest.param("r = add(x, a)", "r = gelu(a)", id="adds to no input"),
        pytest.param("return v", "return x", id="returns its input"),
        pytest.param("x: f32[4, 64]", "x: param[4, 64]", id="adds to a parameter"),
    ],
)
def test_linears_beside_parts_that_repeat_side_by_side_are_named(old, new, caplog):
    text = HOLDER.replace(old, new)
    assert_pass(
        text.format(attn="", first="", second=""), Classify(), held(text, "  # boundary: outside the repeated blocks")
    )
    beside = "they stand beside mlp, other, which repeat and do not read each other: "
    assert f"1 linears stay in high precision because {beside}" in caplog.text


def test_parts_that_read_another_width_than_the_input_has_make_no_block():
    text = HOLDER.replace("q: param[64, 64]", "q: param[64, 64]\n e: param[32, 64]\n f: param[64, 32]")
    for name in ("u0", "u1"):
        text = text.replace(f"{name}: param[256, 64]", f"{name}: param[256, 32]")
    text = text.replace("    @ mlp net.Mlp", "    n = linear(r, e){attn}\n    @ mlp net.Mlp")
    text = text.replace("linear(r, u", "linear(n, u")
    text = text.replace(" f: param[64, 32]", "")
    assert_pass(
        text.format(attn="", first="", second=""), Classify(), held(text, "  # boundary: outside the repeated blocks")
    )


def test_parts_that_follow_each_other_are_blocks_without_a_warning(caplog):
    assert_pass(plain(BLOCKS), Classify(), found(BLOCKS))
    assert not caplog.text


def test_a_network_that_adds_to_its_input_is_none_if_members_of_a_container_follow_each_other(caplog):
    text = BLOCKS.replace("return out", "r = add(x, out)\n return r")
    assert_pass(plain(text), Classify(), found(text))
    assert not caplog.text


# A container with one member.

LONE = """
    x: f32[4, 64]
    a: param[64, 64]
    p: param[64, 64]
    q: param[64, 64]
    r: param[64, 64]
    s: param[{rows}, 64]
    o: param[{outer}, {rows}]
    h = linear(x, a){1}
    @ blocks.0 net.Block
    h1 = linear(h, p){0}
    h2 = linear(h1, q){0}
    h3 = linear(h2, r){0}
    h4 = linear(h3, s){0}
    @
    y = linear(h4, o){1}
    return y
"""


def lone(block, outside, rows=64, outer=64):
    return LONE.format(block, outside, rows=rows, outer=outer)


BODY = ("  # body: in repeated block blocks.0 (Block)", "  # boundary: outside the repeated blocks")
WHOLE = ("  # body: the graph has no repeated blocks and counts as one block",) * 2


def test_the_only_member_of_a_container_is_a_block_if_it_holds_four_linears():
    assert_pass(lone("", ""), Classify(), lone(*BODY))
    assert_pass(lone("", ""), Classify(min_linears_alone=5), lone(*WHOLE))


def test_the_only_member_is_none_if_it_holds_less_than_half_of_the_weights():
    assert_pass(lone("", "", outer=512), Classify(), lone(*WHOLE, outer=512))


def test_an_attribute_alone_is_no_block():
    text = LONE.replace("blocks.0", "block")
    assert_pass(text.format("", "", rows=64, outer=64), Classify(), text.format(*WHOLE, rows=64, outer=64))


@pytest.mark.parametrize(
    ("last", "comment"),
    [(64, "  # body: in repeated block single.0 (Single)"), (8, "  # boundary: outside the repeated blocks")],
)
def test_beside_blocks_the_only_member_of_another_container_is_one_if_it_writes_what_it_reads(last, comment):
    names = ["h2", "h3", "h4", "h5"]
    sizes = ("8, 64", "8, 8", "8, 8", f"{last}, 8")
    extra = "".join(f"m{n}: param[{size}]\n" for n, size in enumerate(sizes))
    lines = "".join(
        f"{name} = linear({'h1' if i == 0 else names[i - 1]}, m{i}){{lone}}\n" for i, name in enumerate(names)
    )
    text = BLOCKS.replace("    @ last Linear\n", f"    @ single.0 net.Single\n{lines}    @ last Linear\n")
    text = text.replace("z: param[64, 64]\n", f"z: param[64, {last}]\n{extra}")
    text = text.replace("linear(h1, z)", "linear(h5, z)")
    assert_pass(plain(text.replace("{lone}", "")), Classify(), found(text.replace("{lone}", comment)))


def test_members_that_follow_no_other_are_no_lone_blocks():
    four = LONE.replace("blocks.0 net", "blocks.1 net").replace(
        "    h = linear(x, a){1}", "    @ blocks.0 net.Block\n    h = linear(x, a){1}"
    )
    assert_pass(four.format("", "", rows=64, outer=64), Classify(), four.format(*WHOLE, rows=64, outer=64))


def test_members_of_other_classes_beside_it_do_not_count():
    text = LONE.replace("    h = linear(x, a){1}", "    @ blocks.1 net.Other\n    h = linear(x, a){1}")
    assert_pass(text.format("", "", rows=64, outer=64), Classify(), text.format(*BODY, rows=64, outer=64))


def test_members_of_its_class_in_other_containers_do_not_count():
    text = LONE.replace("    h = linear(x, a){1}", "    @ others.0 net.Block\n    h = linear(x, a){1}")
    assert_pass(text.format("", "", rows=64, outer=64), Classify(), text.format(*BODY, rows=64, outer=64))


def test_a_member_follows_if_it_reads_what_any_linear_of_the_one_before_wrote():
    text = BLOCKS.replace("h0 = linear(y0, d0){block0}", "h0 = linear(y0, d0){block0}\n g = add(y0, h)")
    text = text.replace("y1 = linear(h0, u1)", "y1 = linear(g, u1)")
    assert_pass(plain(text), Classify(), found(text))


def test_attributes_with_weights_of_other_shapes_are_none():
    text = ATTRIBUTES.replace("u1: param[64, 64]", "u1: param[128, 64]")
    text = text.replace("d1: param[64, 64]", "d1: param[64, 128]").replace("a: param[64, 64]", "a: param[64, 16]")
    text = text.replace("x: f32[4, 64]", "x: f32[4, 16]").replace("z: param[64, 64]", "z: param[16, 64]")
    assert_pass(plain(text), Classify(), alone(text))


# Models that hold their linears in HiF4.


def test_packed_linears_are_classified_like_others():
    text = """
        x: f32[4, 64]
        {inputs}
        @ blocks.0 net.Block
        c, s = tahf4.quantize(x, None, 0, 4)
        y = tahf4.linear(c, s, ac, as_, None, f32){0}
        h = linear(y, u){0}
        @ blocks.1 net.Block
        d, t = tahf4.quantize(h, None, 0, 4)
        z = tahf4.linear(d, t, bc, bs, None, f32){1}
        o = linear(z, v){1}
        return o
    """
    others = "u: param[64, 64]\n v: param[64, 64]\n"
    given = "".join(
        f'{n}c: param.u8[64, 32] = "{n}.weight_codes"\n {n}{s}: param.i32[64, 1] = "{n}.weight_scales"\n'
        for n, s in (("a", "s_"), ("b", "s"))
    )
    held = "".join(f"{n}c: held codes of {n}c\n {n}{s}: held scales of {n}{s}\n" for n, s in (("a", "s_"), ("b", "s")))
    assert_pass(
        text.format("", "", inputs=given + others),
        Classify(),
        text.format(
            "  # body: in repeated block blocks.0 (Block)",
            "  # body: in repeated block blocks.1 (Block)",
            inputs=held + others,
        ),
        first=[Normalize()],
        run=False,
    )


def test_a_packed_weight_counts_as_many_values_as_it_holds():
    text = """
        x: f32[4, 64]
        {inputs}
        a: param[80, 64]
        o: param[64, 80]
        @ blocks.0 net.Block
        c0, s0 = tahf4.quantize(x, None, 0, 4)
        h0 = tahf4.linear(c0, s0, pc, ps, None, f32){0}
        c1, s1 = tahf4.quantize(h0, None, 0, 4)
        h1 = tahf4.linear(c1, s1, qc, qs, None, f32){0}
        c2, s2 = tahf4.quantize(h1, None, 0, 4)
        h2 = tahf4.linear(c2, s2, rc, rs, None, f32){0}
        c3, s3 = tahf4.quantize(h2, None, 0, 4)
        h3 = tahf4.linear(c3, s3, tc, ts, None, f32){0}
        @
        y = linear(h3, a){1}
        z = linear(y, o){1}
        return z
    """
    given = "".join(
        f'{n}c: param.u8[64, 32] = "{n}.weight_codes"\n {n}s: param.i32[64, 1] = "{n}.weight_scales"\n' for n in "pqrt"
    )
    held = "".join(f"{n}c: held codes of {n}c\n {n}s: held scales of {n}s\n" for n in "pqrt")
    before, after = text.format("", "", inputs=given), text.format(*BODY, inputs=held)
    assert_pass(before, Classify(), after, first=[Normalize()], run=False)
