"""Inductor's part of a lowered graph on a CPU: kernels around which a compiler must be led."""

from __future__ import annotations

import pytest
import torch
import torch._inductor
from helpers import relative
from models import Stack
from tahf4_compiler.backends import cpu, run
from torch.fx.experimental.proxy_tensor import make_fx

import tahf4_compiler as tahf4
from tahf4_compiler.options import Options

compiled = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
flags = pytest.mark.skipif("cpp.march" not in torch._inductor.list_options(), reason="another Inductor")


def _rows(x):
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _both(x, y):
    return _rows(x), _rows(y)


def _widened(x, y):
    return _rows(x).float() + 1, _rows(x) * 2


def _there_and_back(x, y):
    z = y.view(x.shape[0], x.shape[2], x.shape[1])
    return x + z.transpose(1, 2), x.transpose(1, 2) - z


def _graph(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


@compiled
@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (_both, torch.bfloat16),
        *(pytest.param(it, torch.bfloat16, marks=pytest.mark.slow) for it in (_widened, _there_and_back)),
        pytest.param(_both, torch.float16, marks=pytest.mark.slow),  # GCC errs with 16 bits, whichever they are
    ],
)
def test_a_kernel_may_transpose_twice(function, dtype):
    inputs = [torch.randn(2, 64, 64).to(dtype) for _ in range(2)]
    got = run.make_runner(_graph(function, *inputs), Options.parse({}), inputs)(*inputs)
    for value, right in zip(got, function(*inputs), strict=True):
        torch.testing.assert_close(value, right)


@pytest.fixture
def _gcc(monkeypatch):
    """GCC and AVX-512, wherever the test runs."""
    from torch._inductor import config, cpp_builder, cpu_vec_isa

    monkeypatch.setattr(run.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpp_builder, "is_gcc", lambda: True)
    sets = cpu_vec_isa.VecAVX2, cpu_vec_isa.VecAVX512
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: sets[config.cpp.simdlen != 256]())
    with config.patch({"cpp.march": None, "cpp.simdlen": None}):
        yield


@flags
@pytest.mark.usefixtures("_gcc")
def test_flags_go_to_gcc_where_it_errs(monkeypatch):
    from torch._inductor import config, cpp_builder

    def options(dtype, **given):
        return run._around_gcc(_graph(_rows, torch.zeros(1, 4, 4, dtype=dtype)), given)

    found = {"cpp.march": "native -fno-tree-loop-distribute-patterns"}
    assert options(torch.bfloat16) == options(torch.float16, max_autotune=True) == found
    assert options(torch.float32) == {}
    assert options(torch.bfloat16, **{"cpp.simdlen": 256}) == {}
    given = options(torch.bfloat16, **{"cpp.march": "x86-64-v4"})
    assert given == {"cpp.march": "x86-64-v4 -fno-tree-loop-distribute-patterns"}
    with config.patch({"cpp.march": ""}):  # none is written
        assert options(torch.bfloat16) == {"cpp.simdlen": 256}
    monkeypatch.setattr(cpp_builder, "is_gcc", lambda: False)
    assert options(torch.bfloat16) == {}


@flags
def test_inductor_splits_what_stands_behind_march():
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppOptions

    with config.patch({"cpp.march": "native -fno-tree-loop-distribute-patterns"}):
        line = CppBuilder(name="x", sources="x.cpp", BuildOption=CppOptions(compiler="g++")).get_command_line()
    assert " -fno-tree-loop-distribute-patterns " in line


def test_without_a_compiler_a_graph_of_the_cpu_runs_without_inductor(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    run._say_without_compiler.cache_clear()
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()), torch.randn(3, 64)
    compiled = torch.compile(lambda x: model(x.sin()), backend="tahf4", options={"classify.min_linears": 1})
    without = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with torch.no_grad(), caplog.at_level("WARNING"), without:
        found = [compiled(x), compiled(x[:2])]
    for y, given in zip(found, (x, x[:2]), strict=True):
        assert 0 < relative(y, model(given.sin())) < 0.2
    assert caplog.text.count("none was found: lowered graphs run without Inductor") == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_cuda_graph_reads_weights_where_they_are(monkeypatch, packed):
    """Inductor copies at each call what is not marked; on a CPU it makes no CUDA graph, and gets the same marks."""
    from torch._inductor import compile_fx

    found, inner = [], compile_fx.compile_fx_inner

    def spy(graph_module, inputs, **settings):
        found.append(([tuple(value.shape) for value in inputs], settings["static_input_idxs"]))
        return inner(graph_module, inputs, **settings)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    model = Stack(2).requires_grad_(False).eval()
    if packed:
        tahf4.quantize_(model)
    compiled_model = torch.compile(model, backend="tahf4", mode="reduce-overhead")
    with torch.no_grad():
        compiled_model(torch.randn(5, 64))
    ((shapes, stay),) = found
    assert [shape for i, shape in enumerate(shapes) if i not in stay] == [(5, 64)]
    assert len(shapes) > 12
