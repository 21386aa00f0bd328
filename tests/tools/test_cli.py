"""The command line explains itself, says its errors in one message, and lists the pipeline as it runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tahf4_compiler.tools import doctor, selftest
from tahf4_compiler.tools.cli import app
from tahf4_compiler.tools.errors import CommandError, own_error
from tahf4_compiler.tools.tiny_wan import settings
from torch import nn
from typer.testing import CliRunner

from tahf4_compiler import Pass, PassResult, PatternError, Tahf4Error, register_pass, unregister_pass
from tahf4_compiler.options import Options
from tahf4_compiler.pipeline.order import build_pipeline

COMMANDS = (
    *("demo", "calibrate", "evaluate", "reproduce", "quantize", "verify", "inspect", "explain", "bench", "kernels"),
    *("roofline", "memory", "parallel", "passes", "bisect", "doctor"),
)
runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "TAHF4_DEBUG": ""})


def run(*arguments: str):
    return runner.invoke(app, list(arguments))


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_the_commands_are_known_without_importing_diffusers_or_dynamo():
    code = "import sys; import tahf4_compiler.tools.cli; print({'diffusers', 'torch._dynamo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_version_is_that_of_the_package():
    import tahf4_compiler

    assert run("--version").output.strip() == tahf4_compiler.__version__


def test_our_errors_are_one_message_with_exit_code_2(tmp_path):
    result = run("demo", str(tmp_path / "missing"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.output.startswith("error: there is no folder")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments, env", [(["--debug"], {}), ([], {"TAHF4_DEBUG": "1"})])
def test_debug_lets_the_traceback_through(tmp_path, arguments, env):
    command = [*arguments, "demo", str(tmp_path / "missing"), "-o", str(tmp_path / "out")]
    assert isinstance(runner.invoke(app, command, env=env).exception, CommandError)


def test_errors_that_are_not_ours_are_not_hidden(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("tahf4_compiler.pipeline.order.build_pipeline", fail)
    assert isinstance(run("passes").exception, ZeroDivisionError)


def test_an_error_that_dynamo_wrapped_is_found():
    compiled = torch.compile(nn.Linear(64, 64), backend="tahf4", options={"keep": ["nothing"], "inductor": False})
    with torch.no_grad(), pytest.raises(Exception) as caught:
        compiled(torch.zeros(1, 64))
    assert not isinstance(caught.value, Tahf4Error)
    assert isinstance(own_error(caught.value), PatternError)


def test_an_error_without_ours_inside_is_nobodys():
    assert own_error(ValueError()) is None
    assert own_error(None) is None


def test_passes_come_in_execution_order_with_options_and_modules():
    described = json.loads(run("passes", "--json").output)
    assert [entry["name"] for entry in described] == [item.name for item in build_pipeline(Options())]
    by_name = {entry["name"]: entry for entry in described}
    assert by_name["plan"]["options"]["min_features"] == 64
    assert by_name["plan"]["module"] == "tahf4_compiler.passes.plan"
    assert "classify" in by_name["plan"]["after"]
    assert all(entry["summary"] for entry in described)


def test_passes_prints_one_entry_a_pass():
    output = run("passes").output
    places = [output.index(f". {item.name}  ") for item in build_pipeline(Options())]
    assert places == sorted(places)
    assert "plan.min_features = 64" in output


def test_verbose_shows_the_graphs_before_and_after():
    output = run("passes", "--verbose").output
    assert "Before::" in output
    assert "y = aten.linear(x, weight, bias)" in output


def test_a_registered_pass_is_listed_where_it_runs():
    @register_pass(after="plan", before="quantize")
    class ListedPass(Pass):
        """Do nothing, in [brackets]."""

        names: tuple[str, ...] = ("a", "b")

        def __call__(self, graph_module, context):
            return PassResult(graph_module, False)

    try:
        described = json.loads(run("passes", "--json").output)
        output = run("passes").output
    finally:
        unregister_pass("listed_pass")
    names = [entry["name"] for entry in described]
    assert names.index("plan") < names.index("listed_pass") < names.index("quantize")
    entry = described[names.index("listed_pass")]
    assert entry["options"] == {"names": ["a", "b"]}
    assert (entry["before"], entry["module"]) == (["quantize"], __name__)
    assert "Do nothing, in [brackets]." in output


def test_doctor_passes_every_check_here(monkeypatch):
    monkeypatch.setattr(selftest, "first_compile", lambda folder: f"1.0 s of {folder.name}")
    result = run("doctor")
    assert "1.0 s of transformer" in result.output
    assert result.exit_code == 0, result.output
    assert "FAIL" not in result.output
    for name in doctor.CHECKS:
        assert name in result.output
    assert "reference" in result.output


@pytest.mark.slow
def test_the_first_compilation_is_taken_apart():
    found = selftest.first_compile(settings.PIPELINE_DIR / "transformer")
    whole, *stages = map(float, re.findall(r"(\d+\.\d)", found))
    assert len(stages) == 4 and "capture" in found and "inductor" in found
    assert 0 < max(stages) <= whole and abs(sum(stages) - whole) < 0.3


@pytest.mark.parametrize("outcome", ["finding", "exception"])
def test_doctor_fails_with_what_to_do_if_something_essential_is_broken(monkeypatch, outcome):
    def check():
        if outcome == "exception":
            raise OSError("no such library")
        return doctor.Finding("no such library", doctor.BROKEN, "Install it.")

    monkeypatch.setattr(doctor, "CHECKS", {"library": check, "python": doctor.CHECKS["python"]})
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAIL  library" in result.output
    assert "no such library" in result.output
    assert "-> Install" in result.output
    assert "ok   python" in result.output


@pytest.mark.parametrize(
    ("name", "capability", "reason", "wanted"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), None, "RTX 4090, 24 GB, products in int8; computed, not measured: a block"),
        ("NVIDIA B200", (10, 0), None, "products in bf16"),
        ("NVIDIA GeForce RTX 4080", (8, 9), None, "not in the table of `tahf4 roofline`"),
        ("Tesla T4", (7, 5), "compute capability 7.5 is below 8.0", "Tesla T4: reference operators, exact and slow"),
    ],
)
def test_doctor_says_what_to_expect_of_a_card(monkeypatch, name, capability, reason, wanted):
    from tahf4_compiler.backends import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    size = SimpleNamespace(total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: size)
    monkeypatch.setattr(triton, "why_not", lambda device: reason)
    found = doctor.CHECKS["to expect"]()
    assert wanted in found.text
    assert (found.state, found.remedy) == (("warning", reason) if reason else ("ok", ""))


def test_doctor_warns_without_failing_where_the_shipped_pipeline_is_missing(monkeypatch, tmp_path):
    from tahf4_compiler.tools.tiny_wan import settings

    monkeypatch.setattr(settings, "PIPELINE_DIR", tmp_path)
    monkeypatch.setattr(doctor, "CHECKS", {"tiny Wan2.2": doctor.CHECKS["tiny Wan2.2"]})
    result = run("doctor")
    assert result.exit_code == 0
    assert "warn" in result.output


def test_doctor_names_the_cache_without_making_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert doctor.CHECKS["compile cache"]().text == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_self_test_notices_a_wrong_conversion(monkeypatch):
    assert selftest.check_format() == ""
    monkeypatch.setattr(selftest, "EXPECTED", bytes(36))
    assert "expected 00000000" in selftest.check_format()


def test_the_self_test_notices_a_model_that_was_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)
    assert "nothing ran in 4 bits" in selftest.check_compile()
