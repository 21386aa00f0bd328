"""What the compiler did can be read: snapshots, their matches across passes, texts and the command line."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import GRAPH
from models import Stack, wan
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.inspection import profile, sources
from tahf4_compiler.tools.inspection.explaining import explanations
from tahf4_compiler.tools.inspection.report import Report, read_dump
from tahf4_compiler.tools.inspection.sources import Request, reports
from tahf4_compiler.tools.inspection.statistics import Evidence
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry
from tahf4_compiler.recipe.recipe import Recipe
from tahf4_compiler.reporting.compact import fold, unfold
from tahf4_compiler.reporting.snapshot import block_path
from tahf4_compiler.weights.store import store

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})


@pytest.fixture(scope="module")
def lowered():
    model, inputs = wan(num_layers=3)
    return tahf4.lower(tahf4.capture(model, (), inputs), options={"fuse.always": True})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of which only the configuration is left."""
    path = tmp_path_factory.mktemp("wan")
    model, _ = wan()
    model.save_config(path)
    return path


def stage(lowered, name):
    return next(s for s in lowered.snapshots if s.stage == name)


def one(nodes, target, module):
    return next(n for n in nodes if target in n.target and n.module == module)


def test_a_path_knows_its_repeated_block():
    assert block_path("blocks.3.ffn.net.0.proj") == "blocks.3"
    assert block_path("a.blocks.12") == "a.blocks.12"
    assert block_path("condition_embedder.linear_1") == ""
    assert block_path("") == ""


def test_folding_loses_nothing_and_writes_equal_blocks_once(lowered):
    data = json.loads(json.dumps(fold(lowered.snapshots)))
    found = unfold(data)
    assert [s.stage for s in found] == ["captured", *(p.name for p in tahf4.default_passes())]
    for before, after in zip(lowered.snapshots, found, strict=True):
        assert before.nodes == after.nodes
        assert dict(before.origins) == dict(after.origins)
    blocks = {body for path, body, *_ in data["stages"][0]["parts"] if path.startswith("blocks.")}
    assert len(blocks) == 1


def test_nodes_are_matched_across_passes(lowered):
    last = lowered.snapshots[-1].nodes
    captured = {n.name: n for n in lowered.snapshots[0].nodes}

    def origin(node):
        names = {node.name}
        for snapshot in reversed(lowered.snapshots[1:]):
            names = {old for name in names for old in snapshot.origins.get(name, (name,))}
        return [captured[name] for name in names if captured[name].op == "call_function"]

    merged = next(n for n in last if n.linears == tuple(f"blocks.1.attn1.to_{x}" for x in "qkv"))
    assert sorted(n.module for n in origin(merged)) == [f"blocks.1.attn1.to_{x}" for x in "kqv"]
    gelu = one(lowered.snapshots[0].nodes, "gelu", "blocks.2.ffn.net.0")
    up = next(n for n in last if n.linears == ("blocks.2.ffn.net.0.proj",))
    assert gelu in origin(up)
    quantized = one(last, "fused_quantize", "blocks.1.attn1.to_q")
    assert {"aten.layer_norm", "aten.mul.Tensor", "aten.add.Tensor"} <= {n.target for n in origin(quantized)}
    assert not any(n.module.startswith(("blocks.0", "blocks.2")) for n in origin(quantized))


def test_products_have_flops_kernels_and_decisions(lowered):
    plan = {d.module: d for d in lowered.plan}
    node = next(n for n in lowered.snapshots[-1].nodes if "blocks.0.ffn.net.2" in n.linears)
    assert node.flops == plan["blocks.0.ffn.net.2"].flops > 0
    assert node.precision == "hif4"
    assert node.kernel == plan["blocks.0.ffn.net.2"].kernel != ""
    attention = next(n for n in lowered.snapshots[-1].nodes if "scaled_dot_product" in n.target)
    # 2 heads of 64, 32 queries and keys, two products of two FLOPs.
    assert attention.flops == 4 * 2 * 64 * 32 * 32


@pytest.mark.parametrize("kind", ["high_precision", "int8"])
@pytest.mark.parametrize("values", [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 3)])
def test_attention_counts_whatever_its_operands_share(values, kind):
    class Attention(nn.Module):
        def forward(self, *args):
            query, key, value = (args[i] for i in values)
            return nn.functional.scaled_dot_product_attention(query, key, value=value)

    args = [torch.randn(1, 2, rows, width) for rows, width in ((8, 64), (8, 64), (32, 64), (32, 16))]
    options = {"attention": kind, "attention.min_tokens": 1, "kernels": "reference"}
    found = tahf4.lower(tahf4.capture(Attention(), args), options=options)
    (node,) = (n for n in found.snapshots[-1].nodes if "attention" in n.target)
    key, value = args[values[1]], args[values[2]]
    assert node.flops == 2 * 2 * 8 * key.shape[-2] * (64 + value.shape[-1])


def test_numbers_that_a_pass_attached_are_kept():
    class Number(tahf4.Pass):
        """Attach a number."""

        after = ("lower",)

        def __call__(self, graph_module, context):
            for node in graph_module.graph.nodes:
                node.meta["tahf4_numbers"] = {"depth": 3}
            return tahf4.PassResult(graph_module, False)

    found = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)), options={"passes": [Number]})
    assert all(n.numbers == {"depth": 3} for n in found.snapshots[-1].nodes)
    assert all(n.numbers == {} for n in found.snapshots[0].nodes)


def test_a_merged_product_leaves_each_linear_its_own_numbers(tmp_path):
    class Rank(tahf4.Pass):
        """Attach a number to two of three linears, and one to what they became."""

        after, before = ("plan",), ("quantize",)

        def __call__(self, graph_module, context):
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
                name = node.meta["tahf4_decision"][0].module
                if name.endswith(("to_q", "to_k")):
                    context.attach(node, rank=name[-1])
            return tahf4.PassResult(graph_module, False)

    class Depth(tahf4.Pass):
        """Attach a number to merged products."""

        after = ("lower",)

        def __call__(self, graph_module, context):
            for node in graph_module.graph.nodes:
                if len(node.meta.get("tahf4_decision", ())) > 1:
                    node.meta["tahf4_numbers"] = {**node.meta["tahf4_numbers"], "depth": 2}
            return tahf4.PassResult(graph_module, False)

    model, inputs = wan(num_layers=1)
    options = {"passes": [Rank, Depth], "dump_dir": str(tmp_path)}
    found = tahf4.lower(tahf4.capture(model, (), inputs), options=options)
    ((dumped, _, _),) = reports(Request(tmp_path))
    for report in (Report.of(found, Evidence()), dumped):
        rows = {row["module"]: row for row in report.linears()}
        q, k, v = (rows[f"blocks.0.attn1.to_{x}"] for x in "qkv")
        assert q["node"] == k["node"] == v["node"]
        ranks = [(row["numbers"].get("rank"), row["numbers"]["depth"]) for row in (q, k, v)]
        assert ranks == [("q", 2), ("k", 2), (None, 2)]


class Reused(nn.Module):
    """One linear called twice, and a graph without repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)

    def forward(self, x):
        return self.one(torch.relu(self.one(x)))


def test_a_linear_that_runs_twice_and_dynamic_shapes_are_recorded(tmp_path):
    dynamic = ({0: torch.export.Dim("rows")},)
    captured = tahf4.capture(Reused().eval(), (torch.randn(5, 64),), dynamic_shapes=dynamic)
    found = tahf4.lower(captured, options=GRAPH)
    assert unfold(json.loads(json.dumps(fold(found.snapshots))))[-1].nodes == found.snapshots[-1].nodes
    products = [n for n in found.snapshots[-1].nodes if n.linears == ("one",)]
    assert [n.flops for n in products] == [2 * 5 * 64 * 64] * 2
    found.report(tmp_path / "page.html")


def test_a_report_without_a_path_stays_text(lowered, tmp_path):
    text = lowered.report()
    assert text.startswith("tahf4 report: WanTransformer3DModel")
    assert lowered.report(tmp_path / "page.html") == text
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_the_python_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/inspect.md", "exec"), {})
    assert (tmp_path / "out" / "report.html").is_file()


def test_inspect_needs_no_weights(folder, tmp_path):
    result = runner.invoke(app, ["inspect", str(folder), "--shape", "2x8x8", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "20 of 26 linears in HiF4" in result.output
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "report.json", "report.txt", "graphs"}
    graphs = sorted(p.name for p in (tmp_path / "out" / "graphs").iterdir())
    assert graphs[:2] == ["00_captured.dot", "00_captured.py"]
    dot = (tmp_path / "out" / "graphs" / graphs[-2]).read_text()
    assert dot.startswith("digraph ")
    assert dot.count("{") == dot.count("}")
    assert "subgraph" in dot
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(data["linears"]) == 26
    assert data["linears"][-1]["reason"].startswith("boundary")
    assert "blocks.1.ffn.net.2" in (tmp_path / "out" / "report.txt").read_text()


def test_the_collector_is_left_as_it_was(folder, monkeypatch):
    during = []
    monkeypatch.setattr(sources, "lower", lambda *args, **options: during.append(gc.get_threshold()) or 1 / 0)
    before = gc.get_threshold()
    with pytest.raises(ZeroDivisionError):
        list(reports(Request(folder, shape="2x8x8")))
    assert during[0][0] > before[0]
    assert gc.get_threshold() == before


@pytest.mark.slow
def test_the_difference_of_two_passes_is_a_unified_diff(folder):
    result = runner.invoke(app, ["inspect", str(folder), "--diff", "plan", "quantize"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    start = lines.index("--- after plan")
    assert lines[start + 1] == "+++ after quantize"
    assert any(line.startswith("-") and "aten.linear" in line for line in lines)
    assert any(line.startswith("+") and "tahf4.linear" in line for line in lines)
    wrong = runner.invoke(app, ["inspect", str(folder), "--diff", "plan", "nothing"])
    assert wrong.exit_code == 2
    assert "no pass 'nothing' ran" in wrong.output


def test_a_dump_is_read_back(tmp_path):
    model = Stack().eval()
    with torch.no_grad():
        torch.compile(model, backend="tahf4", options={**GRAPH, "dump_dir": str(tmp_path)})(torch.randn(4, 64))
    ((report, lowered, _),) = reports(Request(tmp_path))
    assert lowered is None
    assert report.title == "Stack"
    assert sum(row["decision"] == "hif4" for row in report.linears()) == 6
    assert "tahf4" in report.stage("quantize")
    result = runner.invoke(app, ["inspect", str(tmp_path), "--profile", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "a dump holds no weights" in result.output
    (tmp_path / "graph_000_Stack" / "graph.json").write_text('{"format": "tahf4-graph-1", "stages": [1]}')
    with pytest.raises(tahf4.Tahf4Error, match="is damaged"):
        read_dump(tmp_path / "graph_000_Stack")


def test_an_exported_program_is_read_and_profiled(tmp_path):
    model, x = Stack().eval(), torch.randn(4, 64)
    torch.export.save(torch.export.export(model, (x,), strict=False), tmp_path / "stack.pt2")
    result = runner.invoke(app, ["inspect", str(tmp_path / "stack.pt2"), "--profile", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "stack: 6 of 8 linears in HiF4" in result.output
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["module"]: row for row in data["linears"]}
    assert rows["blocks.1.down"]["milliseconds"] > 0
    assert rows["first"]["decision"] == "high_precision"
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {f"tahf4::node {name}" for name in data["milliseconds"]} <= names
    assert data["compiled"] > 0
    assert re.search(r"a call: [\d.]+ ms node by node, [\d.]+ ms compiled, as a whole \(CPU", result.output)
    lean = runner.invoke(
        app,
        ["inspect", str(tmp_path / "stack.pt2"), "--profile", "--set", "inductor=false", "-o", str(tmp_path / "two")],
    )
    assert "not compiled: the option inductor is False" in lean.output
    assert json.loads((tmp_path / "two" / "report.json").read_text())["compiled"] is None


def test_operators_are_not_taken_for_nodes(tmp_path):
    model, x = Stack().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options={"kernels": "reference"})
    took, _ = profile.milliseconds(lowered, {"*": (x,)}, tmp_path / "trace.json", runs=1)
    calls = [n for n in lowered.graph_module.graph.nodes if n.op == "call_function"]
    assert set(took) == {n.name for n in calls}
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    # Operators of the namespace are in the trace, with names that nodes have too.
    operators = {e["name"] for e in events if e.get("name", "").startswith("tahf4::")}
    assert operators & {f"tahf4::{name}" for name in took}
    ranges = {e["name"]: e["dur"] / 1000 for e in events if e.get("name", "").startswith("tahf4::node ")}
    assert {f"tahf4::node {name}": ms for name, ms in took.items()} == pytest.approx(ranges, rel=0.01, abs=2e-3)


def test_a_compiled_call_is_timed_whole_and_a_failure_is_said(monkeypatch):
    model, x = Stack().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)))
    text = str(lowered.graph_module.graph)
    time, why = profile.compiled_milliseconds(lowered, {"*": (x,)}, runs=2)
    assert time > 0
    assert why == ""
    assert str(lowered.graph_module.graph) == text  # Inductor got a copy

    def fails(*args):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(profile, "make_runner", fails)
    assert profile.compiled_milliseconds(lowered, {"*": (x,)}) == (None, "RuntimeError: no compiler")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing"], "there is no folder or .pt2 file"),
        (["{empty}"], "holds no model_index.json, config.json or plan.json"),
        (["{folder}", "--shape", "8by8"], "expected FRAMESxHEIGHTxWIDTH"),
        (["{folder}", "--shape", "8x8"], "has 2 sizes"),
        (["{folder}", "--shape", "2x7x8"], "multiple of the patch"),
        (["{folder}", "--recipe", "{empty}/none.safetensors"], "there is no file"),
        (["{other}"], "its forward needs|Its forward needs"),
        (["{bad}"], "no model of diffusers"),
    ],
)
def test_what_cannot_be_inspected_is_said(folder, tmp_path, arguments, message):
    places = {name: tmp_path / name for name in ("empty", "other", "bad")}
    for place in places.values():
        place.mkdir()
    other = {"_class_name": "LTXVideoTransformer3DModel", "num_layers": 1, "num_attention_heads": 1}
    (places["other"] / "config.json").write_text(json.dumps(other))
    (places["bad"] / "config.json").write_text('{"_class_name": "os.system"}')
    filled = [a.format(folder=folder, **places) for a in arguments]
    result = runner.invoke(app, ["inspect", *filled, "-o", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert any(part in result.output for part in message.split("|"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [pytest.param("flux", marks=pytest.mark.slow), "pixart"])
def test_examples_are_known_for_image_transformers(make, tmp_path):
    import models

    model, _ = getattr(models, make)()
    model.save_config(tmp_path)
    ((report, _, _),) = reports(Request(tmp_path, shape="8x8"))
    assert sum(row["decision"] == "hif4" for row in report.linears()) >= 10


def test_the_structure_of_a_wide_model_has_no_memory_and_a_small_page(tmp_path):
    config = {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
        "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 2,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "patch_size": [1, 2, 2],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = store.conversions
    ((report, lowered, arguments),) = reports(Request(tmp_path))
    assert arguments["hidden_states"].shape == (1, 16, 21, 60, 104)
    held = [v for v in lowered._captured.example_inputs if isinstance(v, torch.Tensor)]
    sizes = {v.numel() for v in held if not isinstance(v, FakeTensor)}
    assert len(held) > 60
    assert all(size < 1_000_000 for size in sizes)  # tables of the rotary embedding, no weights
    assert store.conversions == before
    assert {row["module"]: row["bytes_before"] for row in report.linears()}["blocks.1.ffn.net.2"] == 13824 * 5120 * 2
    # Time embedder and modulation stay in float32, as diffusers loads them.
    assert {row["module"]: row["bytes_before"] for row in report.linears()}[
        "condition_embedder.time_embedder.linear_2"
    ] == 5120 * 5120 * 4
    assert len(report.html()) < 700_000


@pytest.mark.slow
def test_each_expert_gets_its_own_part_of_a_recipe(tmp_path):
    from tahf4_compiler.recipe.entries import LinearEntry, RecipeEntry

    entries = {}
    for name in ("transformer", "transformer_2"):
        model, _ = wan()
        model.save_config(tmp_path / name)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", ""], "transformer_2": ["diffusers", ""]})
    )
    path = "blocks.0.ffn.net.2"
    linear = LinearEntry((128, 256), 0, "high_precision", "sensitivity: rank 1", 12.0)
    entries["transformer_2"] = {path: RecipeEntry({path: linear})}
    tahf4.Recipe(entries).save(tmp_path / "recipe.safetensors")
    first, second = reports(Request(tmp_path, tmp_path / "recipe.safetensors", shape="2x8x8"))
    rows = [{row["module"]: row for row in report.linears()}[path] for report, _, _ in (first, second)]
    assert [row["decision"] for row in rows] == ["hif4", "high_precision"]
    assert [row.get("sqnr_db") for row in rows] == [None, 12.0]


def test_explain_tells_errors_along_the_steps():
    linear = LinearEntry((128, 64), 0, sqnr_db=21.0, step_sqnr_db=(20.0, None, 22.5))
    recipe = Recipe({"": {"blocks.0.up": RecipeEntry({"blocks.0.up": linear})}}, high_precision_steps=(0, -1))
    lowered = tahf4.lower(tahf4.capture(Stack(1).eval(), (torch.randn(4, 64),)))
    (text,) = explanations(Report.of(lowered, Evidence.of(recipe)), re.compile("0.up"))
    assert "along steps SQNR 20.0, none seen, 22.5 dB in the 3 parts of the schedule" in text
    assert "steps       0, -1 (from the end) in high precision, by the recipe" in text
