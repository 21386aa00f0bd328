"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from models import Stack

import tahf4_compiler as tahf4

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_pass_in_the_readme_runs():
    (code,) = [block for block in BLOCKS if "register_pass" in block]
    namespace = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), namespace)
    try:
        lowered = tahf4.lower(tahf4.capture(Stack().eval(), (torch.randn(4, 64),)))
        assert {r.name: r.matches for r in lowered.history}["count_gelus"] == 3
    finally:
        tahf4.unregister_pass("count_gelus")


def test_lowering_step_by_step_as_in_the_readme_runs(capsys):
    (code,) = [block for block in BLOCKS if "tahf4.lower(" in block]
    namespace = {"model": Stack().eval(), "args": (torch.randn(4, 64),), "kwargs": {}}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["y"].shape == (4, 64)
    assert "linears in HiF4" in capsys.readouterr().out


def test_every_option_is_in_the_readme_or_among_the_switches_of_the_debugging_page():
    from dataclasses import fields

    from tahf4_compiler.options import Options

    switches = (Path(__file__).parents[1] / "docs" / "debugging.md").read_text()
    for field in fields(Options):
        written = f"`{field.name}`" in README or f'"{field.name}":' in switches
        assert field.name == "pass_options" or written, field.name
