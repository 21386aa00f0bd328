"""Each operator gets a kernel: the last registered one that serves it."""

from __future__ import annotations

from dataclasses import replace

from graphs import DECISION, assert_pass, plug_in
from tahf4_compiler.passes.lower import Lower, _say_once

GRAPH = """
    x: f32[4, 64]
    w: hif4[64, 64]
    n = neg(x)
    c, s = tahf4.quantize(n, None, 0){quantize}
    y = {linear}(c, s, w, None, f32){kernel}
    return y
"""
BEFORE = GRAPH.format(quantize="", linear="tahf4.linear", kernel="")
REFERENCE = GRAPH.format(quantize="  # reference", linear="tahf4.linear", kernel="  # reference")
OTHER = GRAPH.format(quantize="  # reference", linear="tahf4_tests.linear", kernel="  # other")


def test_the_reference_serves_where_nothing_else_does():
    ran = assert_pass(BEFORE, Lower(), REFERENCE)
    assert ran.notes == ["1 x tahf4.linear -> reference", "1 x tahf4.quantize -> reference"]
    assert ran.record.matches == 2 and not ran.record.modified


def test_what_no_kernel_serves_is_said_once(caplog):
    _say_once.cache_clear()
    assert_pass(BEFORE.replace("f32", "f64"), Lower(), REFERENCE.replace("f32", "f64"))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("no compiled HiF4 kernel serves device 'cpu' with float64")


def test_a_kernel_of_a_plug_in_takes_its_place_and_the_plan_says_so():
    with plug_in({"linear": "other"}):
        ran = assert_pass(BEFORE, Lower(), OTHER)
    assert ran.record.modified
    assert ran.node("linear").meta[DECISION][0].kernel == "other"
    assert ran.notes[0] == "1 x tahf4.linear -> other"


def test_a_kernel_that_does_not_serve_a_node_is_not_taken():
    with plug_in({"linear": "other"}, serves=lambda node: False):
        assert_pass(BEFORE, Lower(), REFERENCE)


def test_the_last_registered_kernel_is_asked_first():
    with plug_in({"linear": "mine"}), plug_in({"linear": "other"}):
        assert_pass(BEFORE, Lower(), OTHER)
    with plug_in({"linear": "other"}), plug_in({"linear": "mine"}):
        assert_pass(BEFORE, Lower(), REFERENCE.replace("f32)  # reference", "f32)  # mine"))


def test_the_reference_runs_where_it_is_asked_for():
    with plug_in({"linear": "other"}):
        assert_pass(BEFORE, Lower(), REFERENCE, kernels="reference")


def test_a_merged_product_tells_all_its_linears():
    text = """
        x: f32[4, 64]
        q+k: hif4[64+64, 64]
        c, s = tahf4.quantize(x, None, 0){0}
        y = tahf4.linear(c, s, q+k, None, f32){0}
        return y
    """

    def merge(graph_module):
        (product,) = (n for n in graph_module.graph.nodes if n.name == "y")
        (decision,) = product.meta[DECISION]
        product.meta[DECISION] = (decision, replace(decision, module="k"))

    ran = assert_pass(text.format(""), Lower(), text.format("  # reference"), prepare=merge)
    assert [d.kernel for d in ran.node("linear").meta[DECISION]] == ["reference"] * 2
