"""What ``tahf4 bench --branches`` measures, on small sizes."""

from __future__ import annotations

import pytest
import torch
from tahf4_compiler.backends import cpu
from tahf4_compiler.tools import branch_bench
from tahf4_compiler.tools.cli import app
from typer.testing import CliRunner

import tahf4_compiler as tahf4

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


def test_blocks_with_branches_are_timed_beside_one_without(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: seen.append((model, options)) or model)
    for name, value in {"DIM": 64, "FFN": 128, "HEADS": 1, "TOKENS": (5,)}.items():
        monkeypatch.setattr(branch_bench, name, value)
    result = CliRunner().invoke(app, ["bench", "--branches", "--rounds", "3", "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    ranks = [{m.rank for m in block.modules() if isinstance(m, tahf4.HiF4Linear)} for block, _ in seen]
    assert ranks == [{rank} for rank in branch_bench.RANKS] * 2
    assert all(options == {"backend": "tahf4"} for _, options in seen)
    assert (tmp_path / "branches.md").read_text() in result.output


def test_the_table_has_times_without_branches_and_ratios():
    times = {"0": (0.5, 0.1), "16": (0.525, 0.2), "32": (0.56, 0.0)}
    each = {name: {"seconds": s, "spread": spread, "least": s - 0.1} for name, (s, spread) in times.items()}
    text = branch_bench.markdown({"threads": 2}, 3, {("float32", 512): each})
    assert "| float32, 512 | 500.0 (400.0) | 1.05 (1.06) | 1.12 (1.15) | 20% |" in text
