"""A plug-in's number format is shown by its own name, and counted in 4 bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import Stack
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.inspection.report import read_dump
from typer.testing import CliRunner

import tahf4_compiler as tahf4
from tahf4_compiler.reporting.compact import unfold

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))
runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})


def dump(folder, **options):
    with torch.no_grad():
        captured = tahf4.capture(Stack().eval(), (torch.randn(4, 64),))
        tahf4.lower(captured, options={**options, "dump_dir": str(folder)})
    return folder


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory):
    from tahf4_nvfp4.quantize import Nvfp4Quantize

    return dump(tmp_path_factory.mktemp("nvfp4"), passes=[Nvfp4Quantize])


def test_explain_names_the_format_and_the_node(nvfp4):
    text = runner.invoke(app, ["explain", str(nvfp4), "blocks.1.up"]).output
    assert "decision    nvfp4, " in text
    assert "= nvfp4.linear, in the place of linear\n" in text
    assert "= nvfp4.quantize" in text
    assert "keeps it in high precision" in text
    assert "by PyTorch" not in text
    assert "did not run" not in text


def test_inspect_counts_the_format_in_4_bits(nvfp4, tmp_path):
    result = runner.invoke(app, ["inspect", str(nvfp4), "-o", str(tmp_path / "out")])
    assert "Stack: 6 of 8 linears in nvfp4" in result.output


def test_the_page_has_the_format_as_precision(nvfp4):
    report = read_dump(nvfp4 / "graph_000_Stack")
    data = report.data()
    assert [row["decision"] for row in data["linears"]].count("nvfp4") == 6
    first, *_, last = unfold(data["graph"])
    four = [n.target for n in last.nodes if n.precision == "nvfp4"]
    assert four.count("nvfp4.linear") == four.count("nvfp4.quantize") == 6
    assert all(n.precision != "nvfp4" for n in first.nodes)
    assert "#cdb8f0" in report.dot()


def test_a_linear_that_quantizes_for_the_next_does_not_run_it(tmp_path):
    folder = dump(tmp_path, **{"fuse.always": True})
    text = runner.invoke(app, ["explain", str(folder), "blocks.1.up"]).output
    assert "linear_quantize, in the place of linear, gelu\n" in text
