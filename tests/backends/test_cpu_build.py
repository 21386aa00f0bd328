"""How the C++ kernels are built and found, and what runs where there are none."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import GRAPH, block_linears, expected, relative
from models import Stack
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import build

import tahf4_compiler as tahf4
from tahf4_compiler.ops import registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


@pytest.fixture
def _no_library(monkeypatch):
    """Start without a compiled library, and leave none that a test made."""
    build._libraries.cache_clear()
    build._loaded.clear()
    yield
    monkeypatch.undo()
    build._libraries.cache_clear()
    build._loaded.clear()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowered_graphs_run_the_kernels(dtype):
    model, x = Stack().eval().to(dtype), torch.randn(4, 64, dtype=dtype)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    assert {decision.kernel for decision in lowered.plan if decision.kernel} == {"cpu"}
    names = {str(node.target).split(".")[0] for node in lowered.graph_module.graph.nodes if node.op == "call_function"}
    assert "tahf4_cpu" in names
    assert "tahf4" not in names
    assert relative(lowered(x), expected(model, block_linears(model))(x)) < (1e-5 if dtype == torch.float32 else 2e-2)


@compiled
def test_float64_is_left_to_the_reference():
    model, x = Stack().eval().double(), torch.randn(4, 64, dtype=torch.float64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    assert {decision.kernel for decision in lowered.plan if decision.kernel} == {"reference"}


def test_packing_takes_what_is_there(monkeypatch):
    for dtype in (*DTYPES, torch.float64):
        x, multiplier = torch.randn(5, 100).to(dtype), torch.rand(100)
        right = torch.ops.tahf4.quantize(x, multiplier, 64)
        for switched_off in ("0", "1"):
            monkeypatch.setenv("TAHF4_NO_CPP", switched_off)
            found = registry.quantize(x, multiplier, 64)
            assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert registry.quantize(torch.ones(2, 64, device="meta"))[0].device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert registry.quantize(torch.ones(2, 64))[0].shape == (2, 32)


def test_without_the_kernels_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TAHF4_NO_CPP", "1")
    assert not cpu.available()
    with pytest.raises(RuntimeError, match="ask available"):
        cpu.quantize(torch.randn(2, 64))
    model, x = Stack().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    assert {decision.kernel for decision in lowered.plan if decision.kernel} == {"reference"}
    assert relative(lowered(x), expected(model, block_linears(model))(x)) < 1e-5


@compiled
def test_a_graph_for_the_kernels_runs_where_there_are_none(monkeypatch):
    model, x = Stack().eval(), torch.randn(4, 64)
    lowered = tahf4.lower(tahf4.capture(model, (x,)), options=GRAPH)
    right = lowered(x)
    monkeypatch.setenv("TAHF4_NO_CPP", "1")
    assert torch.equal(lowered(x), right)


@pytest.mark.usefixtures("_no_library")
@pytest.mark.parametrize("failure", ["none", "broken"])
def test_no_compiler_is_one_warning(monkeypatch, tmp_path, caplog, failure):
    from torch._inductor import cpp_builder

    def compiler(*args):
        if failure == "none":
            raise RuntimeError("No working C++ compiler found\nand more")
        return str(tmp_path / "broken")

    (tmp_path / "broken").write_text("#!/bin/sh\necho this compiler is broken; exit 1\n")
    (tmp_path / "broken").chmod(0o755)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", compiler)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, logger=build.__name__):
        assert not cpu.available()
        assert not cpu.available()
    assert len(caplog.records) == 1
    assert "the reference runs in their place" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.fixture
def _short(monkeypatch, tmp_path):
    """A file of empty functions in place of the kernels, which take a compiler a quarter of a minute."""
    names = [*build._SIGNATURES, "tahf4_checksum", "tahf4_instruction_sets"]
    source = tmp_path / "short.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in names))
    monkeypatch.setattr(build, "SOURCES", (source,))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@compiled
@pytest.mark.usefixtures("_no_library", "_short")
def test_the_library_is_compiled_once_and_found_again(monkeypatch, tmp_path):
    from torch._inductor.cpp_builder import CppBuilder

    builds, build_one = [], CppBuilder.build
    monkeypatch.setattr(CppBuilder, "build", lambda self: (builds.append(self), build_one(self)))
    path = build._build()
    assert build._build() == path
    assert len(builds) == 2  # an object file and the library
    assert {p.name for p in (tmp_path / "tahf4").iterdir()} == {path.name, f"{path.name}.lock"}  # no remains
    assert isinstance(build._load(path, build._SIGNATURES), ctypes.CDLL)


@compiled
@pytest.mark.usefixtures("_no_library", "_short")
def test_of_several_processes_one_compiles(monkeypatch, tmp_path):
    from torch._inductor.cpp_builder import CppBuilder

    fork, build_one = multiprocessing.get_context("fork"), CppBuilder.build
    builds, lock, together = fork.Value("i", 0), build.FileLock, fork.Barrier(2)

    def counted(self):
        with builds.get_lock():
            builds.value += 1
        build_one(self)

    def both(path):
        together.wait(300)  # neither has found what the other makes
        return lock(path)

    monkeypatch.setattr(CppBuilder, "build", counted)
    monkeypatch.setattr(build, "FileLock", both)
    running = [fork.Process(target=build._build) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    monkeypatch.setattr(build, "FileLock", lock)
    assert [process.exitcode for process in running] == [0, 0] and builds.value == 2
    (path,) = (tmp_path / "tahf4").glob("*.so")
    assert build._build() == path and isinstance(build._load(path, build._SIGNATURES), ctypes.CDLL)


@compiled
@pytest.mark.usefixtures("_no_library", "_short")
def test_where_a_compiler_fails_those_that_wait_do_not_try_too(monkeypatch):
    from torch._inductor.cpp_builder import CppBuilder

    fork = multiprocessing.get_context("fork")
    builds, together = fork.Value("i", 0), fork.Barrier(2)

    def failing(self):
        with builds.get_lock():
            builds.value += 1
        time.sleep(2)  # the other one waits by then
        raise RuntimeError("a compiler that fails")

    def run():
        together.wait(300)
        with pytest.raises(RuntimeError, match="fail"):
            build._build()

    monkeypatch.setattr(CppBuilder, "build", failing)
    running = [fork.Process(target=run) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0] and builds.value == 1
    with pytest.raises(RuntimeError, match="a compiler that fails"):
        build._build()  # later it is tried again
    assert builds.value == 2


@compiled
@pytest.mark.usefixtures("_no_library", "_short")
def test_a_lock_of_another_user_stops_nobody(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError("another user's")

    monkeypatch.setattr(build.FileLock, "acquire", refuse)
    assert build._build().exists()


def test_importing_compiles_nothing_and_a_plug_in_that_registers_first_is_still_asked_first(tmp_path):
    code = (
        "import torch, tahf4_compiler as tahf4, tahf4_compiler.ops.registry as k\n"
        "op = torch.ops.tahf4.linear.default\n"
        "tahf4.register_kernel('mine', op, op, lambda node: True)\n"
        "import tahf4_compiler.backends.dynamo, tahf4_compiler.backends.cpu as cpu\n"
        "assert [x.name for x in k.kernels() if x.operator is op] == ['mine', 'triton', 'cpu', 'reference']\n"
        "assert not cpu.build._libraries.cache_info().currsize\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(Path(tmp_path).rglob("*.so"))
