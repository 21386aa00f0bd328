"""A 16-bit graph computes in float32, between inputs, weights and outputs as they are."""

from __future__ import annotations

import pytest
import torch
from graphs import OptionError, assert_pass, cpu
from tahf4_compiler.passes import upcast
from tahf4_compiler.passes.upcast import Upcast

ON = Upcast(dtype="float32")


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_inputs_are_cast_where_they_are_read_first_and_results_back(dtype):
    assert_pass(
        f"""
        x: {dtype}[4, 64]
        u: {dtype}[4, 64]
        g: f32[64]
        w: hif4[64, 64]
        b: param.{dtype}[64]
        c, s = tahf4.quantize(x, None, 0)
        y = tahf4.linear(c, s, w, b, {dtype})
        h = gelu(y)
        k = mul(h, x)
        v = to.dtype(k, f32)
        o = mul(v, g)
        return h, o, x, c
        """,
        ON,
        f"""
        x: {dtype}[4, 64]
        u: {dtype}[4, 64]
        g: f32[64]
        w: hif4[64, 64]
        b: param.{dtype}[64]
        d = to.dtype(x, f32)
        c, s = tahf4.quantize(d, None, 0)
        e = to.dtype(b, f32)
        y = tahf4.linear(c, s, w, e, f32)
        h = gelu(y)
        k = mul(h, d)
        v = to.dtype(k, f32)
        o = mul(v, g)
        r = to.dtype(h, {dtype})
        return r, o, x, c
        """,
    )


def test_a_dtype_by_its_name_is_widened_too():
    text = "x: bf16[4]\n {}a = ones_like({}, dtype={})\n {}return {}"
    assert_pass(
        text.format("", "x", "bf16", "", "a"),
        ON,
        text.format("e = to.dtype(x, f32)\n ", "e", "f32", "r = to.dtype(a, bf16)\n ", "r"),
    )


def test_a_float32_graph_and_the_default_change_nothing():
    assert_pass("x: f32[4]\n a = neg(x)\n return a", ON)
    assert_pass("x: bf16[4]\n a = neg(x)\n return a", Upcast())


def test_a_graph_that_only_gives_its_input_back_reads_no_cast():
    assert_pass("x: bf16[4]\n y: bf16[4]\n a = neg(y)\n return x, a", ON,
                "x: bf16[4]\n y: bf16[4]\n e = to.dtype(y, f32)\n a = neg(e)\n"
                " r = to.dtype(a, bf16)\n return x, r")  # fmt: skip


def test_the_cast_stands_before_the_reader_that_runs_first_not_the_one_that_was_added_first():
    def change(graph_module):
        a, b = [node for node in graph_module.graph.nodes if node.op == "call_function"][:2]
        a.prepend(b)

    assert_pass(
        "x: bf16[4]\n a = neg(x)\n b = relu(x)\n z = to.dtype(b, f32)\n return z, a",
        ON,
        "x: bf16[4]\n e = to.dtype(x, f32)\n b = relu(e)\n a = neg(e)\n z = to.dtype(b, f32)\n"
        " r = to.dtype(a, bf16)\n return z, r",
        prepare=change,
    )


def test_a_tensor_of_the_graphs_own_may_be_written_to():
    assert_pass(
        """
        x: bf16[4]
        a = neg(x)
        v = view(a, [2, 2])
        b = add_(v, 1)
        d = mul_(b, 2)
        return a
        """,
        ON,
        """
        x: bf16[4]
        e = to.dtype(x, f32)
        a = neg(e)
        v = view(a, [2, 2])
        b = add_(v, 1)
        d = mul_(b, 2)
        r = to.dtype(a, bf16)
        return r
        """,
    )


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("a = add_(x, 1)", "writes to a tensor that the graph was given"),
        ("a = view(x, [2, 2])\n b = add_(a, 1)", "writes to a tensor that the graph was given"),
        ("p, q = split(x, 2)\n b = add_(p, 1)", "writes to a tensor that the graph was given"),
        ("t_ = type_as(x, x)\n b = add_(t_, 1)", "writes to a tensor that the graph was given"),
        ("a = neg(x)\n b = view.dtype(a, i16)", "reads the bits of a number"),
        ("b = to.dtype(x, f32)\n d = add_(b, 1)", "copies a tensor that is written"),
        ("a = neg(x)\n d = add_(a, 1)\n b = to.dtype(d, f32)", "copies a tensor that is written"),
        ("a = neg(x)\n b = to.dtype(a, f32)\n d = add_(b, 1)", "copies a tensor that is written"),
        ("a = neg(x)\n b = to.dtype(a, f32)\n d = add_(a, 1)", "copies a tensor that is written"),
        ("a = neg(x)\n d = add_(a, 1)\n b = to.dtype(a, f32)", "copies a tensor that is written"),
        ("a = neg(x)\n d = add_(a, 1)\n d2 = mul_(d, 2)\n b = to.dtype(d, f32)", "copies a tensor that is written"),
        ("a = neg(x)\n v = view(a, [4])\n d = add_(v, 1)\n b = to.dtype(a, f32)", "copies a tensor that is written"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_otherwise_is_left_and_said(body, why):
    ran = assert_pass(f"x: bf16[4]\n {body}\n z = neg(x)\n return z", ON)
    assert len(ran.notes) == 1 and why in ran.notes[0]


def test_a_write_to_a_list_of_tensors_is_seen():
    ran = assert_pass("x: bf16[4]\n y: bf16[4]\n f = _foreach_add_.Scalar([y, x], 1)\n z = neg(x)\n return z", ON)
    assert "writes to a tensor that the graph was given" in ran.notes[0]


@pytest.mark.parametrize("target", [torch._C._set_grad_enabled, torch.ops.higher_order.cond])
def test_what_is_no_operator_is_left(target):
    def insert(graph_module):
        graph = graph_module.graph
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(output):
            node = graph.call_function(target, (True,))
            node.meta["val"] = None

    text = "x: bf16[4]\n a = neg(x)\n {}return a"
    name = getattr(target, "__name__", "")
    ran = assert_pass(text.format(""), ON, text.format(f"b = {name}(True)\n "), prepare=insert, run=False)
    assert "changes a mode" in ran.notes[0]


@pytest.mark.parametrize("value", ["bfloat16", "float64"])
def test_an_unknown_dtype_is_refused(value):
    with pytest.raises(OptionError, match=r"upcast\.dtype"):
        assert_pass("x: bf16[4]\n a = neg(x)\n return a", Upcast(dtype=value))


LINEAR = """
    x: {dtype}[4, 64]
    w: hif4[64, 64]
    c, s = tahf4.quantize(x, None, 0)
    y = tahf4.linear(c, s, w, None, {dtype})
    return y
"""


@pytest.mark.parametrize(("dtype", "slow", "said"), [("bf16", True, 1), ("bf16", False, 0), ("f32", True, 0)])
def test_it_is_offered_once_where_16_bits_are_slow(dtype, slow, said, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "slow_dtype", lambda dtype: slow)
    monkeypatch.setattr(upcast, "_told", set())
    for _ in range(2):
        ran = assert_pass(LINEAR.format(dtype=dtype), Upcast())
        assert len(ran.notes) == said, "each report has it"
    assert caplog.text.count("options={'upcast.dtype': 'float32'}") == said, "the log has it once"
