"""Norms and rotary embeddings of queries and keys go into attention, where nothing else reads or writes on the way."""

from __future__ import annotations

import pytest
from graphs import assert_pass
from tahf4_compiler.passes.attention_prologue import AttentionPrologue

ALWAYS = AttentionPrologue(always=True)

INPUTS = """
    x: bf16[2, 9, 128]
    z: bf16[2, 9, 128]
    v: bf16[2, 2, 9, 64]
    w: bf16[128]
    cos: f32[1, 9, 1, {cos}]
    sin: f32[1, 9, 1, {cos}]
"""
HEADS = "h{0} = unflatten.int({1}, 2, [2, -1])\n"
SWAPPED = "q = permute({0}, [0, 2, 1, 3])\nk = transpose.int({1}, 1, 2)\n"
ATTENTION = "y = tahf4.attention(q, k, v, None, False, 0.3, False, 8)\n"
PAIRS = """
    p{0} = unflatten.int(h{0}, -1, [-1, 2])
    e{0}, o{0} = unbind.int(p{0}, -1)
"""
STACKED = f"""{PAIRS}
    a{{0}} = mul(e{{0}}, cos)
    b{{0}} = mul(sin, o{{0}})
    c{{0}} = sub(a{{0}}, b{{0}})
    d{{0}} = mul(e{{0}}, sin)
    f{{0}} = mul(o{{0}}, cos)
    g{{0}} = add(f{{0}}, d{{0}})
    s{{0}} = stack([c{{0}}, g{{0}}], -1)
    l{{0}} = flatten.using_ints(s{{0}}, -2, -1)
    t{{0}} = type_as(l{{0}}, h{{0}})
"""
"""As ``tools/kernels/block.py`` writes it."""

WRITTEN = f"""{PAIRS}
    m{{0}} = slice(cos, 3, 0, 9223372036854775807, 2)
    n{{0}} = slice(sin, 3, 1, 9223372036854775807, 2)
    u{{0}} = empty_like(h{{0}})
    a{{0}} = mul(e{{0}}, m{{0}})
    b{{0}} = mul(o{{0}}, n{{0}})
    c{{0}} = sub(a{{0}}, b{{0}})
    i{{0}} = slice(u{{0}}, 3, 0, 9223372036854775807, 2)
    j{{0}} = copy_.default(i{{0}}, c{{0}})
    d{{0}} = mul(e{{0}}, n{{0}})
    f{{0}} = mul(o{{0}}, m{{0}})
    g{{0}} = add(d{{0}}, f{{0}})
    r{{0}} = slice(u{{0}}, 3, 1, 9223372036854775807, 2)
    k{{0}} = copy_.default(r{{0}}, g{{0}})
    t{{0}} = type_as(u{{0}}, h{{0}})
"""
"""As diffusers writes it for Wan."""

PROGRAM = "v0: bfloat16 = rms_norm(x0, x1, 1e-06); v1: bfloat16 = rotary(v0, x2, x3)"


def joined(*parts):
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def normed(rotary):
    norms = "n = rms_norm(x, [128], w, 1e-06)\nnn = rms_norm(z, [128], w, 1e-06)\n"
    return joined(norms, HEADS.format(1, "n"), HEADS.format(2, "nn"), rotary.format(1), rotary.format(2))


def angles(cos, sin):
    return f"""
    ss = squeeze.dim({cos}, 2)
    cc = contiguous(ss)
    uu = squeeze.dim({sin}, 2)
    dd = contiguous(uu)
    """


AFTER = f'y = tahf4.fused_attention([x, w, cc, dd], "{PROGRAM}", [z, w, cc, dd], "{PROGRAM}", v, 2, None, False, 0.3, '
AFTER += "False, 8, 8)\n"


def test_a_norm_and_a_rotary_embedding_that_is_stacked():
    ran = assert_pass(
        joined(INPUTS.format(cos=32), normed(STACKED), SWAPPED.format("t1", "t2"), ATTENTION, "return y"),
        ALWAYS,
        joined(INPUTS.format(cos=32), angles("cos", "sin"), AFTER, "return y"),
        kernels="reference",
    )
    assert ran.notes == ["1 of 1 fused with norms or rotary embeddings of their queries and keys"]
    assert ran.record.matches == 1


def test_a_norm_and_a_rotary_embedding_that_is_written_to_an_empty_tensor():
    before = joined(INPUTS.format(cos=64), normed(WRITTEN), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    left = "m1 = slice(cos, 3, 0, 9223372036854775807, 2)\nn1 = slice(sin, 3, 1, 9223372036854775807, 2)\n"
    left += "m2 = slice(cos, 3, 0, 9223372036854775807, 2)\nn2 = slice(sin, 3, 1, 9223372036854775807, 2)\n"
    assert_pass(before, ALWAYS, joined(INPUTS.format(cos=64), left, angles("m1", "n1"), AFTER, "return y"))


def test_without_a_rotary_embedding():
    """Keys of cross-attention have none; queries may have neither."""
    before = joined(
        INPUTS.format(cos=32), "nn = rms_norm(z, [128], w, 1e-06)", HEADS.format(1, "x"), HEADS.format(2, "nn")
    )
    norm = PROGRAM.partition(";")[0]
    assert_pass(
        joined(before, SWAPPED.format("h1", "h2"), ATTENTION, "return y"),
        ALWAYS,
        joined(
            INPUTS.format(cos=32),
            f'y = tahf4.fused_attention([x], "", [z, w], "{norm}", v, 2, None, False, 0.3, False, 8, 8)',
            "return y",
        ),
    )


def test_who_reads_no_more_than_the_dtype_reads_it_elsewhere():
    after_attention = "back = permute(y, [0, 2, 1, 3])\nflat = flatten.using_ints(back, 2, 3)\n"
    assert_pass(
        joined(
            INPUTS.format(cos=32), normed(STACKED), SWAPPED.format("t1", "t2"), ATTENTION, after_attention,
            "last = type_as(flat, t1)\nreturn last",
        ),
        ALWAYS,
        joined(
            INPUTS.format(cos=32), angles("cos", "sin"), AFTER, after_attention, "last = to.dtype(flat, bf16)",
            "return last",
        ),
    )  # fmt: skip


STAY = {
    "another reads the keys": ("return y", "other = neg(t2)\nreturn y, other"),
    "another reads what is turned": ("return y", "other = neg(h1)\nreturn y, other"),
    "a write to an input comes in between": ("y = tahf4", "over = fill_.Scalar(x, 0.0)\ny = tahf4"),
    "cosines and sines change places": ("a1 = mul(e1, cos)", "a1 = mul(e1, sin)"),
    "it turns the other way": ("c1 = sub(a1, b1)", "c1 = sub(b1, a1)"),
    "halves change places": ("stack([c1, g1], -1)", "stack([g1, c1], -1)"),
    "halves are added": ("c1 = sub(a1, b1)", "c1 = add(a1, b1)"),
    "something comes behind it": ("q = permute(t1, [0, 2, 1, 3])", "q = permute(t1, [0, 2, 1, 3])\nq = neg(q)"),
    "one part is of the other operand": ("f1 = mul(o1, cos)", "f1 = mul(o2, cos)"),
}


@pytest.mark.parametrize("what", STAY)
def test_it_stays_where(what):
    text = joined(INPUTS.format(cos=32), normed(STACKED), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    old, new = STAY[what]
    assert text.count(old) == 1
    if what == "something comes behind it":
        text = text.replace("k = transpose", "qq = neg(q)\n    k = transpose").replace("attention(q,", "attention(qq,")
    elif what == "one part is of the other operand":
        pairs = PAIRS.format(2)
        text = text.replace(pairs, "").replace(PAIRS.format(1), PAIRS.format(1) + pairs).replace(old, new)
    else:
        text = text.replace(old, new)
    ran = assert_pass(text, ALWAYS)
    assert ran.notes == ["0 of 1 fused with norms or rotary embeddings of their queries and keys"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("i1 = slice(u1, 3, 0, 9223372036854775807, 2)", "i1 = slice(u1, 3, 1, 9223372036854775807, 2)"),
        ("i1 = slice(u1, 3, 0, 9223372036854775807, 2)", "i1 = slice(u1, 3, 0, 32)"),
        ("u1 = empty_like(h1)", "u1 = zeros_like(h1)"),
        ("k = transpose", "over = fill_.Scalar(w, 0.0)\n    k = transpose"),
        ("k = transpose", "over = fill_.Scalar(u1, 0.0)\n    k = transpose"),
    ],
)
def test_other_writes_stay(old, new):
    text = joined(INPUTS.format(cos=64), normed(WRITTEN), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    assert text.count(old) == 1
    assert_pass(text.replace(old, new), ALWAYS, run="u1, 3, 1" not in new and "32)" not in new)


def test_a_norm_that_another_reads_stays():
    norms = "n = rms_norm(x, [128], w, 1e-06)\n"
    before = joined(INPUTS.format(cos=32), norms, HEADS.format(1, "n"), HEADS.format(2, "z"), STACKED.format(1))
    before = joined(before, SWAPPED.format("t1", "h2"), ATTENTION, "other = neg(n)\nreturn y, other")
    after = f"""
    {angles("cos", "sin")}
    y = tahf4.fused_attention([n, cc, dd], "v0: bfloat16 = rotary(x0, x1, x2)", [z], "", v, 2, None, False, 0.3,
        False, 8, 8)
    other = neg(n)
    return y, other
    """
    assert_pass(before, ALWAYS, joined(INPUTS.format(cos=32), norms, after))


def test_tokens_may_be_dynamic():
    inputs = INPUTS.format(cos=32).replace(" 9,", " n,")
    before = joined(inputs, normed(STACKED), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    assert_pass(before, ALWAYS, joined(inputs, angles("cos", "sin"), AFTER, "return y"))


def test_angles_in_16_bits_stay_since_products_are_rounded():
    text = joined(INPUTS.format(cos=32), normed(STACKED), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    assert_pass(text.replace("cos: f32", "cos: bf16").replace("sin: f32", "sin: bf16"), ALWAYS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cos: f32", "cos: bf16"),
        ("cos: f32[1, 9, 1,", "cos: f32[1, 9, 2,"),
        ("t1 = type_as(l1, h1)", "tt = to.dtype(l1, f16)\n    t1 = type_as(tt, h1)"),
    ],
)
def test_other_angles_and_what_is_rounded_twice_stay(old, new):
    text = joined(INPUTS.format(cos=32), normed(STACKED), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    assert text.count(old) == 1
    assert_pass(text.replace(old, new), ALWAYS)


def test_keys_that_are_values_as_well_stay():
    text = joined(INPUTS.format(cos=64), normed(WRITTEN), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    assert_pass(text.replace("attention(q, k, v,", "attention(q, k, k,"), ALWAYS)


def test_casts_of_a_norm_that_round_twice_stay():
    text = joined(INPUTS.format(cos=32), "n = rms_norm(x, [128], w, 1e-06)", HEADS.format(1, "n"), HEADS.format(2, "z"))
    text = text.replace("x: bf16", "x: f32").replace("w: bf16", "w: f32")
    once, twice = "c = to.dtype(h1, bf16)\n", "b = to.dtype(h1, f16)\nc = to.dtype(b, bf16)\n"
    assert_pass(joined(text, twice, SWAPPED.format("c", "h2"), ATTENTION, "return y"), ALWAYS)
    program = "v0: float32 = rms_norm(x0, x1, 1e-06); v1: bfloat16 = to(v0)"
    inputs = INPUTS.format(cos=32).replace("x: bf16", "x: f32").replace("w: bf16", "w: f32")
    after = f'y = tahf4.fused_attention([x, w], "{program}", [z], "", v, 2, None, False, 0.3, False, 8, 8)\nreturn y'
    assert_pass(joined(text, once, SWAPPED.format("c", "h2"), ATTENTION, "return y"), ALWAYS, joined(inputs, after))


def test_queries_and_keys_without_either_stay():
    text = joined(INPUTS.format(cos=32), HEADS.format(1, "x"), HEADS.format(2, "z"), SWAPPED.format("h1", "h2"))
    assert_pass(joined(text, ATTENTION, "return y"), ALWAYS)


def test_nothing_is_fused_for_the_reference_and_for_another_kernel():
    text = joined(INPUTS.format(cos=32), normed(STACKED), SWAPPED.format("t1", "t2"), ATTENTION, "return y")
    assert assert_pass(text, AttentionPrologue(), kernels="reference").notes == []
    assert assert_pass(text, AttentionPrologue()).record.matches == 0  # no kernel of this device can run it
