"""Passes: their order, their options, what the manager checks between them, and how others join."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass

import pytest
import torch
from models import Stack
from passes_by_hand import Nothing, lowered

import tahf4_compiler as tahf4
from tahf4_compiler.graph.nodes import is_written
from tahf4_compiler.options import Options
from tahf4_compiler.pipeline.order import build_pipeline, order, provenance

DEFAULT = [
    *("normalize", "classify", "plan", "quantize", "share", "smooth", "rotate", "scale_search", "span"),
    *("attention", "attention_prologue", "upcast", "fuse", "lower"),
]


def names(passes):
    return [p.name for p in passes]


def make(name, after=(), before=(), replaces=None, call=None):
    """Return an instance of a new pass."""
    body = {"name": name, "after": after, "before": before, "replaces": replaces}
    if call is not None:
        body["__call__"] = lambda self, graph_module, context: call(graph_module, context)
    return type(name.title(), (Nothing,), body)()


def test_the_default_pipeline():
    assert names(build_pipeline(Options())) == DEFAULT


def test_a_pass_stands_where_it_says():
    added = make("mine", after=("plan",), before=("quantize",))
    assert names(build_pipeline(Options(passes=(added,)))) == [*DEFAULT[:3], "mine", *DEFAULT[3:]]


def test_a_pass_without_a_place_comes_last_and_order_is_stable():
    assert names(order([make("b"), make("a"), make("c", before=("b",))])) == ["a", "c", "b"]


def test_a_pass_can_replace_a_default_one_and_inherits_its_place():
    result = names(build_pipeline(Options(passes=(make("my_share", replaces="share"),))))
    assert result == ["my_share" if name == "share" else name for name in DEFAULT]


def test_what_replaces_a_pass_stands_there_also_where_nothing_but_the_given_order_says_it():
    given = [make("a"), make("b"), make("c"), make("mine", replaces="b")]
    assert names(order(given)) == ["a", "mine", "c"]


def test_a_cycle_names_the_passes():
    with pytest.raises(tahf4.PipelineError, match=r"plan -> quantize|quantize -> .*mine|mine -> "):
        build_pipeline(Options(passes=(make("mine", after=("quantize",), before=("plan",)),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": [make("mine", after=("smoth",))]}, "after='smoth', but no pass has that name"),
        ({"passes": [make("share")]}, "two passes are named 'share'"),
        ({"passes": [print]}, "is not a pass"),
        ({"disable_passes": ["nothing"]}, "disable_passes names 'nothing'"),
        ({"nothing.option": 1}, "no pass is named 'nothing'"),
    ],
)
def test_a_wrong_pipeline_is_refused(options, message):
    with pytest.raises(tahf4.PipelineError, match=message):
        lowered(**options)


def test_a_pass_can_be_left_out():
    assert "share" not in [record.name for record in lowered(disable_passes=["share"]).history]
    assert names(build_pipeline(Options(disable_passes=("classify",)))) == [n for n in DEFAULT if n != "classify"]


def test_a_registered_pass_joins_every_pipeline():
    @tahf4.register_pass(after="plan", before="quantize")
    class CountGelus(tahf4.Pass):
        """Count the GELUs."""

        approximate: str = "none"

        def __call__(self, graph_module, context):
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
                context.matched(node)
            context.note(f"counted {context.matches} ({self.approximate})")
            return tahf4.PassResult(graph_module, modified=False)

    try:
        result = lowered(**{"count_gelus.approximate": "tanh"})
        (record,) = [r for r in result.history if r.name == "count_gelus"]
        assert record.matches == 3
        assert "count_gelus: counted 3 (tanh)" in result.report()
        assert [r.name for r in result.history] == ["captured", *DEFAULT[:3], "count_gelus", *DEFAULT[3:]]
        with pytest.raises(tahf4.PipelineError, match="two passes are named"):
            tahf4.register_pass(type("Other", (Nothing,), {"name": "count_gelus"}))
    finally:
        tahf4.unregister_pass("count_gelus")
    assert names(build_pipeline(Options())) == DEFAULT


def _raise(graph_module, context):
    raise KeyError("lost")


def _drop_input(graph_module, context):
    (x,) = [n for n in graph_module.graph.nodes if n.op == "placeholder" and n.meta["tahf4_input"].kind == "user"]
    with graph_module.graph.inserting_after(x):
        zeros = graph_module.graph.call_function(torch.ops.aten.zeros.default, ([4, 64],))
    x.replace_all_uses_with(zeros)
    graph_module.graph.erase_node(x)
    return tahf4.PassResult(graph_module, modified=True)


def _change_dtype(graph_module, context):
    (output,) = graph_module.graph.find_nodes(op="output")
    (value,) = output.args[0]
    with graph_module.graph.inserting_before(output):
        half = graph_module.graph.call_function(torch.ops.aten.to.dtype, (value, torch.float16))
    output.args = ((half,),)
    return tahf4.PassResult(graph_module, modified=True)


def _wrong_shape(graph_module, context):
    node = next(iter(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)))
    with graph_module.graph.inserting_after(node):
        bad = graph_module.graph.call_function(torch.ops.aten.view.default, (node, [3, 3]))
    node.replace_all_uses_with(bad, delete_user_cb=lambda user: user is not bad)
    return tahf4.PassResult(graph_module, modified=True)


def _stale(graph_module, context):
    """Change what the output computes and leave its old shape and dtype in the metadata."""
    (output,) = graph_module.graph.find_nodes(op="output")
    (value,) = output.args[0]
    value.target, value.args, value.kwargs = torch.ops.aten.sum.default, (value.args[0],), {}
    return tahf4.PassResult(graph_module, modified=True)


def _raise_at_a_node(graph_module, context):
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
        with context.at(node):
            raise tahf4.FormatError(f"codes of the wrong dtype: {node.meta['val'].dtype}")


def _attach_a_tensor(graph_module, context):
    node = next(iter(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)))
    context.attach(node, mean=torch.ones(()))


def _lose_metadata(graph_module, context):
    next(iter(graph_module.graph.find_nodes(op="placeholder"))).meta.pop("tahf4_input")
    return tahf4.PassResult(graph_module, modified=True)


def _dangling(graph_module, context):
    nodes = list(graph_module.graph.nodes)
    last = nodes[-2]
    nodes[2].append(last)
    return tahf4.PassResult(graph_module, modified=True)


def _copied_metadata(graph_module, context):
    """Give a new node what the old one knew of itself, its value included."""
    (output,) = graph_module.graph.find_nodes(op="output")
    (value,) = output.args[0]
    with graph_module.graph.inserting_before(output):
        half = graph_module.graph.call_function(torch.ops.aten.to.dtype, (value, torch.bfloat16))
    half.meta.update(value.meta)
    output.args = ((half,),)
    return tahf4.PassResult(graph_module, modified=True)


def _write_to_a_weight(graph_module, context):
    node = next(iter(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
    with graph_module.graph.inserting_before(node):
        graph_module.graph.call_function(torch.ops.aten.mul_.Tensor, (node.args[1], 0.5))
    return tahf4.PassResult(graph_module, modified=True)


def test_an_operator_writes_to_what_its_schema_says_alone():
    graph = torch.fx.Graph()
    a, b, out, seen, handle = map(graph.placeholder, ("a", "b", "out", "seen", "handle"))
    graph.call_function(torch.ops.aten._foreach_add_.List, ([a], [b]))
    graph.call_function(torch.ops.aten.add.out, (b, b), {"out": out})
    graph.call_function(torch.ops.tahf4.observe.default, (seen, handle))
    graph.output(a)
    assert [is_written(node) for node in (a, b, out, seen, handle)] == [True, False, True, False, True]


def _call_a_method(graph_module, context):
    node = next(iter(graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)))
    with graph_module.graph.inserting_after(node):
        graph_module.graph.call_method("neg", (node,))
    return tahf4.PassResult(graph_module, modified=True)


def _swap_inputs(graph_module, context):
    one, other = (p for p in graph_module.graph.find_nodes(op="placeholder") if "last" in p.name or "first" in p.name
                  if p.meta["val"].dim() == 2)  # fmt: skip
    one.meta["tahf4_input"], other.meta["tahf4_input"] = other.meta["tahf4_input"], one.meta["tahf4_input"]
    return tahf4.PassResult(graph_module, modified=True)


def _mix_dtypes(graph_module, context):
    (output,) = graph_module.graph.find_nodes(op="output")
    last = output.args[0][0]
    with graph_module.graph.inserting_before(last):
        half = graph_module.graph.call_function(torch.ops.aten.to.dtype, (last.args[0], torch.bfloat16))
    last.update_arg(0, half)
    return tahf4.PassResult(graph_module, modified=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_swap_inputs, r"pass 'bad' made the input 'p_first_weight' stand for 'last.weight'; before it, it stood for"),
        (_mix_dtypes, r"pass 'bad' left node .*in last.* operands are bfloat16, float32, float32; expected one dtype"),
        (_copied_metadata, r"pass 'bad' changed the graph's outputs: output 0: float32.* became bfloat16"),
        (_write_to_a_weight, r"pass 'bad' writes to the graph's inputs .*first.*weight"),
        (_call_a_method, r"pass 'bad' added the call_method 'neg"),
        (lambda graph_module, context: tahf4.PassResult(None, True), r"pass 'bad' returned PassResult\(NoneType"),
        (_raise, r"pass 'bad' .* failed: KeyError: 'lost'"),
        (_drop_input, r"pass 'bad' removed the graph's inputs x"),
        (_change_dtype, r"pass 'bad' changed the graph's outputs: output 0: float32.* became float16"),
        (_wrong_shape, r"pass 'bad' left node .* that cannot be computed"),
        (_dangling, r"pass 'bad' left a broken graph: node .* reads .* does not hold before it"),
        (_stale, r"pass 'bad' changed the graph's outputs: output 0: float32\[4, 64\] on cpu became float32\[\]"),
        (_attach_a_tensor, r"pass 'bad' attached mean=.* to node 'gelu' .*in blocks.0\); expected a float"),
        (_lose_metadata, r"pass 'bad' added the input .* without a PackedInput"),
        (lambda graph_module, context: graph_module, r"pass 'bad' returned GraphModule; expected PassResult"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_caught_at_its_own_step(call, message):
    with pytest.raises(tahf4.PassError, match=message):
        lowered(passes=[make("bad", after=("plan",), before=("quantize",), call=call)])


def test_a_pass_may_return_a_deep_copy_of_the_graph():
    def copied(graph_module, context):
        return tahf4.PassResult(copy.deepcopy(graph_module), modified=True)

    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(4, 64)
    passes = [make("copies", after=("plan",), before=("quantize",), call=copied)]
    plain = tahf4.lower(tahf4.capture(model, (x,)))
    changed = tahf4.lower(tahf4.capture(model, (x,)), options={"passes": passes})
    assert torch.equal(changed(x), plain(x))
    stages = [(s.stage, s.origins) for s in changed.snapshots if s.stage != "copies"]
    assert stages == [(s.stage, s.origins) for s in plain.snapshots]


def test_a_pass_may_hold_a_tensor_of_its_own():
    def add(graph_module, context):
        graph_module.register_buffer("mine", torch.full((64,), 0.5))
        (output,) = graph_module.graph.find_nodes(op="output")
        (value,) = output.args[0]
        with graph_module.graph.inserting_before(output):
            mine = graph_module.graph.get_attr("mine")
            total = graph_module.graph.call_function(torch.ops.aten.add.Tensor, (value, mine))
        output.args = ((total,),)
        return tahf4.PassResult(graph_module, modified=True)

    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(4, 64)
    plain = tahf4.lower(tahf4.capture(model, (x,)))
    changed = tahf4.lower(tahf4.capture(model, (x,)), options={"passes": [make("adds", after=("plan",), call=add)]})
    assert torch.allclose(changed(x), plain(x) + 0.5, atol=1e-6)


def test_bisect_refuses_a_model_that_is_not_finite():
    model, x = Stack().eval(), torch.randn(4, 64)
    model.first.weight.data[0, 0] = float("nan")
    with pytest.raises(tahf4.CaptureError, match="NaN or infinity"):
        tahf4.bisect(model, (x,))


def test_an_error_of_ours_in_a_plug_in_pass_names_pass_node_and_module():
    broken = make("bad", after=("plan",), before=("quantize",), call=_raise_at_a_node)
    with pytest.raises(tahf4.FormatError, match=r"pass 'bad' at node 'gelu' \(aten.gelu.default, in blocks.0\): codes"):
        lowered(passes=[broken])


def test_attached_numbers_reach_the_report_and_the_plan():
    def attach(graph_module, context):
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            context.attach(node, spread=float("nan"), rank=3)
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
            context.attach(node, curve="tanh")
        return tahf4.PassResult(graph_module, modified=False)

    result = lowered(passes=[make("numbers", after=("plan",), before=("quantize",), call=attach)])
    plan = json.loads(result.plan_json())
    assert all(entry["numbers"] == {"spread": "nan", "rank": 3} for entry in plan)
    report = result.report()
    assert "numbers: 'gelu' (aten.gelu.default, in blocks.0): curve tanh" in report
    assert re.search(r"blocks\.1\.down +spread nan, rank 3", report)


def test_provenance_holds_plug_ins_and_options():
    def nothing(graph_module, context):
        return tahf4.PassResult(graph_module, modified=False)

    entries = provenance(Options(passes=(make("mine", call=nothing),), pass_options=(("rotate", "block", 32),)))
    assert [e["name"] for e in entries] == [*DEFAULT, "mine"]
    assert next(e for e in entries if e["name"] == "rotate")["options"] == {"block": 32}
    json.dumps(entries)


def test_reference_kernels_can_be_forced(monkeypatch):
    result = lowered(kernels="reference")
    assert {d.kernel for d in result.plan if d.decision == "hif4"} == {"reference"}
    assert "fuse: nothing: reference kernels are asked for" in result.report()
    monkeypatch.setenv("TAHF4_KERNELS", "reference")
    assert Options.parse({}).kernels == "reference"
    monkeypatch.setenv("TAHF4_KERNELS", "fast")
    with pytest.raises(tahf4.OptionError, match="TAHF4_KERNELS"):
        Options.parse({})


def test_conditions_of_a_pass_are_checked():
    def has_a_plan(graph_module, context):
        return None if context.plan else "there is no plan"

    early = type("Early", (Nothing,), {"requires": (has_a_plan,), "before": ("plan",), "name": "early"})
    with pytest.raises(tahf4.PassError, match="pass 'early' needs has_a_plan: there is no plan"):
        lowered(passes=[early])


def test_verify_names_the_pass_that_adds_error():
    def scale(graph_module, context):
        (output,) = graph_module.graph.find_nodes(op="output")
        (value,) = output.args[0]
        with graph_module.graph.inserting_before(output):
            twice = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (value, 2.0))
        output.args = ((twice,),)
        return tahf4.PassResult(graph_module, modified=True)

    result = lowered(verify=True, passes=[make("wrong", after=("share",), before=("lower",), call=scale)])
    errors = {record.name: record.error for record in result.history if record.error is not None}
    assert errors["wrong"] == pytest.approx(1.0)
    assert 1e-3 < errors["quantize"] < 0.1
    assert all(errors[name] == 0 for name in ("normalize", "classify", "plan", "lower"))
    assert errors["share"] < 1e-6


def test_the_passes_that_keep_results_say_so_and_are_held_to_it(monkeypatch):
    """A fusion that computes something else is noticed by whoever asks for ``verify_tolerance``."""
    from tahf4_compiler.passes import fuse

    claims = {item.name for item in tahf4.default_passes() if item.exact}
    assert claims == {"normalize", "share", "attention_prologue", "fuse", "lower"}
    call = fuse.Fuse.__call__

    def wrong(self, graph_module, context):
        result = call(self, graph_module, context)
        (product, *_) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.tahf4.fused_linear.default)
        product.update_arg(8, product.args[8].replace("add(", "sub("))
        return result

    monkeypatch.setenv("TAHF4_NO_CPP", "1")
    options = {"fuse.always": True, "verify_tolerance": 1e-3}
    assert lowered(**options)
    monkeypatch.setattr(fuse.Fuse, "__call__", wrong)
    with pytest.raises(tahf4.PassError, match="'fuse' says that it changed only how something is computed"):
        lowered(**options)


@pytest.mark.parametrize(
    ("modified", "exact", "message"),
    [
        (False, False, r"pass 'wrong' says that it changed nothing \(modified=False\), but the outputs' .* 1.000e\+00"),
        (True, True, "only how something is computed"),
        (True, False, None),
    ],
)
def test_a_pass_that_claims_to_keep_results_is_held_to_it(modified, exact, message):
    def scale(graph_module, context):
        for node in graph_module.graph.find_nodes(op="output"):
            with graph_module.graph.inserting_before(node):
                twice = graph_module.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0][0], 2.0))
            node.args = ((twice,),)
        return tahf4.PassResult(graph_module, modified=modified)

    wrong = make("wrong", after=("share",), before=("lower",), call=scale)
    type(wrong).exact = exact
    options = {"verify_tolerance": 1e-3, "passes": [wrong]}
    if message is None:
        assert lowered(**options).history[-1].total_error == pytest.approx(1.0, rel=0.1)  # quantizing is free to
    else:
        with pytest.raises(tahf4.PassError, match=message):
            lowered(**options)
    assert lowered(verify=True, passes=[wrong]).history[-1].total_error > 0.5  # without a tolerance it is a figure
    found = tahf4.bisect(Stack().eval(), (torch.randn(4, 64),), options=options, rounds=1)
    assert found.blamed == "wrong"  # the search raises for no error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kepp": ["x"]}, r"unknown option 'kepp'.*Did you mean 'keep'"),
        ({"keep": "blocks"}, "expected a list of strings"),
        ({"inductor": "yes"}, "expected True, False or a mapping"),
        ({"verify": 1}, "expected True or False"),
        ({"verify_tolerance": -1.0}, "expected a number that is not negative"),
        ({"verify_tolerance": True}, "expected a number that is not negative"),
        ({"verify_tolerance": float("nan")}, "expected a number that is not negative"),
        ({"verify_tolerance": 0.1, "verify": False}, "leave one of them out"),
        ({"dump_dir": 3}, "expected a path"),
        ({"weight_check": "never"}, "expected one of 'auto', 'content', 'version'"),
        ({"passes": "share"}, "expected a list of passes"),
    ],
)
def test_options_are_validated(options, message):
    with pytest.raises(tahf4.OptionError, match=message):
        Options.parse(options)


def test_fields_of_a_class_that_is_no_dataclass_are_said_to_be_no_options():
    class Plain(Nothing):
        """Do nothing."""

        how: str = "so"

    for given in (Plain, Plain()):
        with pytest.raises(tahf4.OptionError, match=r"'how' is no option .*Plain is no dataclass: write @dataclass"):
            lowered(passes=[given], **{"plain.how": "else"})
    with pytest.raises(tahf4.OptionError, match="has no option 'other'; it has none"):
        lowered(passes=[Plain], **{"plain.other": 1})
    lowered(passes=[dataclass(frozen=True)(Plain)], **{"plain.how": "else"})


def test_options_are_frozen_and_comparable():
    first = Options.parse({"keep": ["a"], "inductor": {"max_autotune": True}, "plan.min_features": 128})
    assert first == Options.parse({"plan.min_features": 128, "inductor": {"max_autotune": True}, "keep": ("a",)})
    assert first != Options.parse({"keep": ["a"]})
    hash(first)
    assert Options.parse({}, mode="max-autotune-no-cudagraphs").inductor_options()["max_autotune"] is True
    with pytest.raises(tahf4.OptionError, match="not one of torch.compile's modes"):
        Options.parse({}, mode="fast")


def test_a_pass_joins_through_an_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    from tahf4_compiler.plugins import entry_points

    point = EntryPoint("mine", f"{__name__}:FromEntryPoint", entry_points.PASSES)
    installed = entry_points.importlib.metadata.entry_points

    def found(group):
        return [point] if group == entry_points.PASSES else installed(group=group)

    monkeypatch.setattr(entry_points.importlib.metadata, "entry_points", found)
    entry_points.load.cache_clear()
    try:
        assert names(build_pipeline(Options())) == [*DEFAULT, "from_entry_point"]
    finally:
        tahf4.unregister_pass("from_entry_point")
        monkeypatch.undo()
        entry_points.load.cache_clear()


class FromEntryPoint(Nothing):
    """A pass that an installed package brings along."""


@pytest.mark.parametrize(
    "option", ["attention.min_tokens", "plan.min_features", "classify.min_linears", "classify.min_linears_alone"]
)
def test_an_option_below_its_least_value_is_refused(option):
    captured = tahf4.capture(torch.nn.Linear(64, 64).requires_grad_(False), (torch.ones(1, 64),))
    for value in (0, -1):
        with pytest.raises(tahf4.OptionError, match=f"option {option} is {value}; expected at least 1$"):
            tahf4.lower(captured, options={option: value})
    tahf4.lower(captured, options={option: 1})
