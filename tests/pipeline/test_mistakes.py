"""What the author of a pass, a kernel or a plug-in may get wrong is refused by an error that names it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from passes_by_hand import Nothing, lowered

import tahf4_compiler as tahf4
from tahf4_compiler.graph.inputs import INPUT, PackedInput
from tahf4_compiler.ops.registry import unregister_kernel
from tahf4_compiler.plugins import entry_points, host


def fails(graph_module, context):
    raise KeyError("val")


def wants(graph_module, context):
    return "a gelu"


@pytest.mark.parametrize("which", ["requires", "ensures"])
def test_a_condition_may_be_a_function_alone_and_is_named_where_it_fails(which):
    wanting = type("Mine", (Nothing,), {which: wants})
    with pytest.raises(tahf4.PassError, match=r"pass 'mine' (needs|promises) wants: a gelu"):
        lowered(passes=[wanting])
    with pytest.raises(tahf4.PassError, match="pass 'mine' .* failed: KeyError: 'val'"):
        lowered(passes=[type("Mine", (Nothing,), {which: (fails,)})])


def test_a_place_may_be_a_name_alone():
    late = type("Late", (Nothing,), {"after": "plan", "before": "quantize"})
    names = list(lowered(passes=[late]).notes)
    assert late.after == ("plan",)
    assert "late" not in names


@dataclass(frozen=True)
class Wide(Nothing):
    """Has an option without a default."""

    width: int


@dataclass(frozen=True)
class Listed(Nothing):
    """Has an option that is a list."""

    widths: list = field(default_factory=lambda: [1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"passes": [Wide]}, tahf4.PipelineError, "pass 'wide' cannot be made without arguments: .*'width'"),
        ({"passes": [type("Slash", (Nothing,), {"name": "a/b"})]}, tahf4.PipelineError, "is named 'a/b'; expected"),
        ({"passes": [type("Dot", (Nothing,), {"name": "a.b"})]}, tahf4.PipelineError, "is named 'a.b'; expected"),
        ({"classify.min_linears": 2, "plan.min_features": 0}, tahf4.OptionError, "expected at least 1"),
    ],
)
def test_a_pass_that_cannot_stand_in_a_pipeline_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        lowered(**options)


@dataclass(frozen=True)
class Computed(Nothing):
    """Has a field that is no option."""

    width: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "width", 3)


def test_a_field_may_be_computed():
    lowered(passes=[Computed])


@pytest.mark.parametrize("given", [3, None])
def test_what_is_no_place_is_refused(given):
    with pytest.raises(tahf4.PipelineError, match=f"pass 'nowhere' says before={given}; expected names"):
        lowered(passes=[type("Nowhere", (Nothing,), {"before": given})])


def test_an_argument_that_is_given_twice_is_refused():
    class Twice(Nothing):
        after = ("quantize",)
        before = ("share",)

        def __call__(self, graph_module, context):
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.tahf4.linear.default):
                node.kwargs = {"out_dtype": torch.bfloat16}
            return tahf4.PassResult(graph_module, modified=True)

    with pytest.raises(tahf4.PassError, match="'out_dtype' specified both as positional and keyword"):
        lowered(passes=[Twice])


def test_an_option_may_be_a_list():
    lowered(passes=[Listed], **{"listed.widths": [1, 2]})
    with pytest.raises(tahf4.OptionError, match="expected list"):
        lowered(passes=[Listed], **{"listed.widths": 3})


@dataclass(frozen=True)
class Share(Nothing):
    """Has an option that is a number of at least a half."""

    name = "part"
    share: float = field(default=0.5, metadata={"least": 0.5})


def test_what_is_no_number_is_below_the_least():
    with pytest.raises(tahf4.OptionError, match="share is nan; expected at least"):
        lowered(passes=[Share], **{"part.share": float("nan")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": "sqared"}, "search is 'sqared'; expected one of '', 'squared'"),
        ({"seed": -1}, "seed is -1; expected an int from 0 on"),
        ({"span": 64}, "span is 64: the form is 64"),
        ({"weights": (99,)}, r"weights are \(99,\); expected positions among the"),
        ({"part": "code"}, "part is 'code'; expected one of codes, scales"),
    ],
)
def test_a_packed_input_that_means_nothing_is_refused(change, message):
    class Wrong(Nothing):
        after = ("quantize",)
        before = ("share",)

        def __call__(self, graph_module, context):
            for node in graph_module.graph.find_nodes(op="placeholder"):
                if isinstance(source := node.meta[INPUT], PackedInput):
                    part = change.get("part", source.part)
                    fields = {name: value for name, value in change.items() if name != "part"}
                    node.meta[INPUT] = PackedInput(part, replace(source.weight, **fields))
                    del node.meta["val"]
            return tahf4.PassResult(graph_module, modified=True)

    with pytest.raises(tahf4.PassError, match=message):
        lowered(passes=[Wrong])


def test_a_kernel_that_fails_is_named():
    linear = torch.ops.tahf4.fused_linear.default
    kernel = tahf4.register_kernel("mine", linear, linear, lambda node: node.meta["nothing"])
    try:
        with pytest.raises(tahf4.PipelineError, match="kernel .mine. for tahf4.fused_linear.default failed when"):
            lowered()
    finally:
        unregister_kernel(kernel)


@pytest.mark.parametrize(("name", "serves"), [("", lambda node: True), ("mine", True)])
def test_a_kernel_without_a_name_or_a_function_is_refused(name, serves):
    linear = torch.ops.tahf4.linear.default
    with pytest.raises(tahf4.OptionError, match="expected a name and a function of a node"):
        tahf4.register_kernel(name, linear, linear, serves)


def test_a_package_that_fails_to_register_its_kernels_is_named(monkeypatch):
    def join():
        raise ValueError("no device")

    monkeypatch.setattr(host, "_loaded", False)
    monkeypatch.setattr(entry_points, "load", lambda group: {"theirs": join})
    for _ in range(2):
        with pytest.raises(tahf4.PipelineError, match="the plug-in 'theirs' of 'tahf4.kernels' failed .* no device"):
            host.load_backends()


def test_a_pipeline_that_is_no_list_is_refused(monkeypatch):
    monkeypatch.setattr(entry_points, "load", lambda group: {"default": 3})
    with pytest.raises(tahf4.PipelineError, match="the pipeline 'default' is 3; expected a list"):
        tahf4.pipeline.order.default_passes()


def test_a_report_of_another_kind_comes_from_a_plug_in_or_is_refused(monkeypatch, tmp_path):
    found = lowered()
    with pytest.raises(tahf4.OptionError, match="no report is written as .pdf; expected html"):
        found.report(tmp_path / "page.pdf")
    with pytest.raises(tahf4.OptionError, match="recipe is 'file'; expected a Recipe"):
        found.report(tmp_path / "page.html", recipe="file")
    written = []
    monkeypatch.setattr(entry_points, "load", lambda group: {"pdf": lambda *given: written.append(given[1].name)})
    found.report(tmp_path / "page.pdf")
    assert written == ["page.pdf"]


def test_a_folder_that_takes_no_dump_is_named():
    with pytest.raises(tahf4.OptionError, match="cannot write to dump_dir '/proc'"):
        lowered(dump_dir="/proc")
