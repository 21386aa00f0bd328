"""The page of a dump says what its compilation said; options of a compilation are refused."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import GRAPH
from models import Stack
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.inspection.report import Report, read_dump
from tahf4_compiler.tools.inspection.sources import Request, reports
from tahf4_compiler.tools.inspection.statistics import Evidence
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.pipeline.records import PassRecord
from tahf4_compiler.reporting.dump import GraphDump

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})


class Says(tahf4.Pass):
    """Say something."""

    after = ("lower",)

    def __call__(self, graph_module, context):
        context.note("something")
        context.matched(count=7)
        return tahf4.PassResult(graph_module, False)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    captured = tahf4.capture(Stack().eval(), (torch.randn(4, 64),))
    folder = tmp_path_factory.mktemp("dump")
    return tahf4.lower(captured, options={**GRAPH, "passes": [Says], "verify": True, "dump_dir": str(folder)}), folder


def test_a_dump_has_what_its_compilation_knew(lowered):
    found, folder = lowered
    ((dumped, _, _),) = reports(Request(folder))
    direct = Report.of(found, Evidence())
    assert [dict(entry) for entry in dumped.passes] == [dict(entry) for entry in direct.passes]
    assert dumped.notes == direct.notes
    assert dumped.notes["says"] == ["something"]
    assert dumped.passes[-1]["matches"] == 7
    assert any(entry["error"] for entry in dumped.passes)
    assert not [path for path in (folder / "graph_000_Stack").iterdir() if path.name.startswith(".")]


def test_a_dump_without_them_says_so(lowered, tmp_path):
    _, folder = lowered
    for path in (folder / "graph_000_Stack").iterdir():
        if path.name != "passes.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    report = read_dump(tmp_path)
    assert "has no passes.json" in report.notes["captured"][0]
    assert "has no passes.json" in report.html()
    (tmp_path / "passes.json").write_text('{"passes": [{"name": "plan"}], "notes": {}}')
    with pytest.raises(tahf4.Tahf4Error, match="is damaged"):
        read_dump(tmp_path)


def test_an_error_that_is_no_number_is_said(lowered, tmp_path):
    _, folder = lowered
    for path in (folder / "graph_000_Stack").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    GraphDump(tmp_path).write_passes([PassRecord("plan", error=float("nan"))], {"plan": ["more"]})
    json.loads((tmp_path / "passes.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    report = read_dump(tmp_path)
    assert report.notes["plan"] == ["more", "added error: nan"]
    report.html()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep", "blocks"], "--keep does not apply"),
        (["--set", "share.merge=false"], "--set does not apply"),
        (["--shape", "2x8x8"], "--shape does not apply"),
        (["--dtype", "bfloat16", "--keep", "x", "--set", "a=1"], "--dtype, --keep, --set do not apply"),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["explain"]])
def test_options_of_a_compilation_are_refused(lowered, tmp_path, command, arguments, message):
    _, folder = lowered
    last = ["-o", str(tmp_path / "out")] if command == ["inspect"] else ["blocks"]
    result = runner.invoke(app, [*command, str(folder), *last, *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "compiled already" in result.output
    assert not (tmp_path / "out").exists()


def test_a_dtype_for_an_exported_program_is_refused(tmp_path):
    torch.export.save(torch.export.export(torch.nn.Linear(64, 64), (torch.randn(4, 64),)), tmp_path / "linear.pt2")
    result = runner.invoke(app, ["explain", str(tmp_path / "linear.pt2"), ".", "--dtype", "float32"])
    assert result.exit_code == 2
    assert "--dtype does not apply to an exported program" in result.output
