"""The C++ kernels of the CPU: the same bits as the reference, for everything that a tensor may hold."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cpu_operators
import pytest
import torch
from helpers import GRAPH, block_linears, expected, relative
from models import Stack
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import build, operators

import tahf4_compiler as tahf4
from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4
from tahf4_compiler.ops import registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIALS = [
    *(0.0, -0.0, 1.0, -1.0, 7.0, 1e20, -1e20, 3.4e38, -3.4e38, 49152.0, 7 * 49152.0, 65504.0),
    *(1e-45, -1e-45, 1e-40, -1e-39, 1.1754944e-38, 2.0**-50, 2.0**-51, -(2.0**-48), 6e-8, 1e-7),
]
NONFINITE = [float("inf"), float("-inf"), float("nan")]

compiled = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _no_library(monkeypatch):
    """Start without a compiled library, and leave none that a test made."""
    build._library.cache_clear()
    build._loaded.clear()
    yield
    monkeypatch.undo()
    build._library.cache_clear()
    build._loaded.clear()


def assert_same(x, multiplier=None, block=0):
    codes, scales = cpu.quantize(x, multiplier, block)
    right = torch.ops.tahf4.quantize(x, multiplier, block)
    assert codes.shape == right[0].shape
    assert scales.shape == right[1].shape
    assert torch.equal(scales, right[1])
    assert torch.equal(codes, right[0])
    back = cpu.dequantize(codes, scales)
    plain = hif4.dequantize(hif4.Packed(codes, scales, scales.shape[-1] * 64))
    assert torch.equal(back.view(torch.int32), plain.view(torch.int32))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 100, 192, 640])
def test_conversion_is_bit_exact(dtype, k):
    x, multiplier = torch.randn(9, k).to(dtype), torch.randn(k)
    for block in (0, 1, 2, 4, 8, 16, 32, 64):
        assert_same(x, None, block)
        assert_same(x, multiplier, block)


@compiled
@pytest.mark.parametrize(("k", "block"), [(128, 128), (100, 128), (1000, 1024), (1000, 512), (5120, 1024), (65, 128)])
def test_rotations_wider_than_a_unit(k, block):
    for dtype in DTYPES:
        assert_same(torch.randn(5, k).to(dtype), torch.rand(k) + 0.5, block)
        assert_same(torch.randn(5, k).to(dtype) * 1e3, None, block)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    generator = torch.Generator().manual_seed(1)
    pool = torch.tensor(SPECIALS + NONFINITE, dtype=torch.float64).to(dtype)
    finite = torch.tensor(SPECIALS, dtype=torch.float64).to(dtype)
    zero = torch.zeros(1, dtype=dtype)
    for values in (pool, finite, finite[finite.abs() < 1e-6], zero, -zero):
        for density in (0.02, 0.5, 1.0):
            x = torch.randn(200, 130, generator=generator).to(dtype)
            chosen = values[torch.randint(len(values), x.shape, generator=generator)]
            x = torch.where(torch.rand(x.shape, generator=generator) < density, chosen, x)
            for block in (0, 2, 64):
                assert_same(x, None, block)
                assert_same(x, torch.randn(130, generator=generator), block)


@compiled
def test_a_multiplier_that_overflows_or_is_no_number():
    x = torch.randn(20, 128)
    for value in (3e38, float("inf"), float("nan"), 0.0, -0.0, 1e-45):
        multiplier = torch.ones(128)
        multiplier[70] = value
        for block in (0, 64, 128):
            assert_same(x * 1e3, multiplier, block)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    assert_same(bits.view(-1, 64))
    assert_same(bits.view(-1, 1))
    assert_same(bits[torch.randperm(1 << 16)].view(-1, 256), torch.randn(256), 64)


@compiled
@pytest.mark.parametrize("seed", range(4))
def test_random_bits(seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (3000, 64), generator=generator, dtype=torch.int64).to(torch.int32)
    finite = torch.where((bits & 0x7F800000) == 0x7F800000, bits & 0x3FFFFFFF, bits)
    assert_same(bits.view(torch.float32))
    assert_same(finite.view(torch.float32), torch.randn(64, generator=generator), 64)
    # One exponent to a unit, so that every value of it is near a rounding boundary of some kind.
    narrow = (finite & ~0x7F800000) | (torch.randint(1, 255, (3000, 1), generator=generator, dtype=torch.int32) << 23)
    narrow = narrow - (torch.randint(0, 5, bits.shape, generator=generator, dtype=torch.int32) << 23)
    assert_same(narrow.view(torch.float32))
    assert_same(narrow.bitwise_and(-(1 << 19)).view(torch.float32))  # few mantissa bits: many ties


@compiled
def test_strides_leading_axes_and_empty_tensors():
    x = torch.randn(6, 5, 256)
    for view in (x, x.transpose(0, 1), x[..., ::2], x[::2, :, 3:131], x.expand(2, 6, 5, 256), x[0, 0], x[:, :1, 7:]):
        assert_same(view)
        assert_same(view.to(torch.bfloat16), torch.rand(view.shape[-1]), 64)
    assert_same(x[:, 0].T)
    assert_same(x[:1, 0, :1].expand(4, 100))
    assert_same(torch.randn(3, 1).T, None, 64)
    assert_same(x, torch.rand(512)[::2])
    for shape in ((0, 64), (3, 0), (0, 0), (2, 0, 5)):
        assert_same(torch.zeros(shape))


@compiled
def test_units_that_do_not_come_from_a_tensor_convert_back_as_the_reference_does():
    codes = torch.randint(0, 256, (512, 32), dtype=torch.uint8)
    scales = torch.randint(-(1 << 31), 1 << 31, (512, 1), dtype=torch.int64) & ~0xFF | torch.arange(512)[:, None] % 256
    scales = scales.to(torch.int32)
    right = hif4.dequantize(hif4.Packed(codes, scales, 64)).view(torch.int32)
    assert torch.equal(cpu.dequantize(codes, scales).view(torch.int32), right)
    assert torch.equal(cpu.dequantize(codes[::2], scales[::2]).view(torch.int32), right[::2])


def reference_histogram(x):
    """Return counts, maxima, squares and the number of non-finite values in plain PyTorch."""
    x = x.reshape(-1, x.shape[-1]).to(torch.float32)
    finite = x.isfinite()
    magnitude = torch.where(finite, x, 0.0).abs()
    bits = magnitude.view(torch.int32)
    bucket = torch.where(magnitude < 2**-10, 0, 1 + (bits >> 21) - ((127 - 10) << 2))
    bucket = torch.where(magnitude >= 2**14, 97, bucket)
    counts = torch.nn.functional.one_hot(bucket.long(), 98) * finite[..., None]
    return (
        counts.sum(0).to(torch.int32),
        magnitude.amax(0) if len(x) else torch.zeros(x.shape[1]),
        magnitude.double().square().sum(0),
        (~finite).sum()[None],
    )


def empty_histogram(channels):
    return (
        torch.zeros(channels, cpu.BUCKETS, dtype=torch.int32),
        torch.zeros(channels),
        torch.zeros(channels, dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
    )


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 63, 64, 65, 192, 200])
def test_histogram_is_that_of_plain_pytorch(dtype, channels):
    spread = torch.exp2(torch.randn(4, 75, channels) * 8)
    x = (torch.randn(4, 75, channels) * spread).to(dtype)
    special = torch.tensor(SPECIALS + NONFINITE + [2.0**-10, 2.0**14, 0.99999 * 2**14, 2.0**-10 * 0.999]).to(dtype)
    x = torch.where(torch.rand(x.shape) < 0.02, special[torch.randint(len(special), x.shape)], x)
    found = empty_histogram(channels)
    for part in (x, x.transpose(0, 1), x[:0], x[:, ::3]):
        cpu.histogram(part, *found)
    first, thirds = reference_histogram(x), reference_histogram(x[:, ::3])
    assert torch.equal(found[0], 2 * first[0] + thirds[0])
    assert torch.equal(found[1], first[1])
    assert torch.allclose(found[2], 2 * first[2] + thirds[2], rtol=1e-12, atol=0)
    assert torch.equal(found[3], 2 * first[3] + thirds[3])
    assert int(found[0].sum() + found[3]) == 2 * x.numel() + x[:, ::3].numel()


@compiled
@pytest.mark.usefixtures("_threads")
def test_the_number_of_threads_changes_nothing():
    x = torch.randn(700, 1000)
    multiplier = torch.rand(1024)[:1000]
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found = empty_histogram(1000)
        cpu.histogram(x, *found)
        packed = (*cpu.quantize(x), *cpu.quantize(x, multiplier, 64), *cpu.quantize(x, None, 512))
        results.append((*found, *packed, cpu.dequantize(*packed[:2])))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_several_python_threads_at_once():
    inputs = [torch.randn(300, 192) for _ in range(8)]
    right = [torch.ops.tahf4.quantize(x, None, 64) for x in inputs]

    def work(i):
        found = empty_histogram(192)
        for _ in range(5):
            packed = cpu.quantize(inputs[i], None, 64)
            cpu.histogram(inputs[i], *found)
        return packed, found

    with ThreadPoolExecutor(8) as pool:
        for i, (packed, found) in enumerate(pool.map(work, range(8))):
            assert all(torch.equal(a, b) for a, b in zip(packed, right[i], strict=True))
            assert torch.equal(found[0], 5 * reference_histogram(inputs[i])[0])


@compiled
def test_loading_the_library_leaves_subnormal_numbers_alone():
    assert float(torch.tensor(1e-40) * 0.5) > 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: float(torch.tensor(1e-40) * 0.5)).result() > 0


@compiled
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.quantize(torch.ones(2, 64, dtype=torch.float64)), "expected float32, bfloat16 or float16"),
        (lambda: cpu.quantize(torch.tensor(1.0)), "without axes"),
        (lambda: cpu.quantize(torch.ones(2, 64, device="meta")), "on meta; expected one on the CPU"),
        (lambda: cpu.quantize(torch.ones(2, 64), torch.ones(63)), "multiplier of shape"),
        (lambda: cpu.quantize(torch.ones(2, 64), torch.ones(64, dtype=torch.float64)), "multiplier of torch.float64"),
        (lambda: cpu.quantize(torch.ones(2, 64), None, 48), "power of two that divides 64"),
        (lambda: cpu.dequantize(torch.ones(2, 32), torch.ones(2, 1)), "expected uint8 and int32"),
        (lambda: cpu.dequantize(torch.ones(2, 33).byte(), torch.ones(2, 1).int()), "expected last axes"),
        (lambda: cpu.histogram(torch.ones(2, 63), *empty_histogram(64)), "counts of torch.int32 and shape"),
        (lambda: cpu.histogram(torch.ones(2, 64).long(), *empty_histogram(64)), "expected float32"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(FormatError, match=message):
        call()


@compiled
@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("quantize", lambda pack: (torch.randn(2, 3, 100, dtype=torch.bfloat16), torch.rand(100), 64)),
        ("quantize", lambda pack: (torch.randn(4, 64).T,)),
        ("linear", lambda pack: (*pack(3, 100), *pack(7, 100), torch.randn(7), torch.bfloat16)),
        ("linear", lambda pack: (*pack(3, 64), *pack(7, 64), None, torch.float32)),
    ],
)
def test_operators_are_those_of_the_reference(operator, arguments):
    registry.kernels()  # defines them
    given = arguments(lambda rows, k: torch.ops.tahf4.quantize(torch.randn(rows, k)))
    mine, reference = getattr(torch.ops.tahf4_cpu, operator), getattr(torch.ops.tahf4, operator)
    torch.library.opcheck(mine.default, given)
    assert str(mine.default._schema).split("(")[1] == str(reference.default._schema).split("(")[1]
    results, right = mine(*given), reference(*given)
    for a, b in zip(results, right, strict=True) if operator == "quantize" else [(results, right)]:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


CALLS = {
    "quantize": [
        lambda x, w, f: (x,),
        lambda x, w, f: (x.bfloat16().view(2, 3, 100), f, 64),
        lambda x, w, f: (x.half().T.contiguous().T, f.double().to(torch.bfloat16)),
        lambda x, w, f: (x[:0],),
        lambda x, w, f: (torch.nn.Parameter(x), None, 128),
    ],
    "linear": [
        lambda x, w, f: (*registry.quantize(x), *w, None, torch.float64),
        lambda x, w, f: (*registry.quantize(x.view(3, 2, 100)), *w, f[:7].double(), torch.bfloat16),
        lambda x, w, f: (*(t.T.contiguous().T for t in registry.quantize(x)), *w, f[:7], torch.float32),
        lambda x, w, f: (*registry.quantize(x[:0]), *w, None, torch.float16),
    ],
    "fused_quantize": [
        lambda x, w, f: ([x, f], "v0: float32 = mul(x0, x1)", f, 64),
        lambda x, w, f: ([x.view(2, 3, 100)[:, :, ::2], x[:2, None, :1]], "v0: bfloat16 = add(x0, x1)"),
    ],
    "fused_linear": [
        lambda x, w, f: (*registry.quantize(x), *w, None, torch.bfloat16, [3, 4], [], "", torch.bfloat16),
        lambda x, w, f: (
            *(*registry.quantize(x), *w, f[:7], torch.float32, [7]),
            *([x[:, :7]], "v0: float16 = sub(x0, y)", torch.float16),
        ),
    ],
    "linear_quantize": [
        lambda x, w, f: (*registry.quantize(x), *w, f[:7], torch.float32, [], "v0: float32 = relu(y)", f[:7], 64),
        lambda x, w, f: (*registry.quantize(x.view(1, 2, 3, 100)), *w, None, torch.float32, [], "", None, 0),
    ],
}


@compiled
@pytest.mark.skipif(cpu.available() and cpu.instruction_set() == "none", reason="needs AVX2")
@pytest.mark.parametrize(("name", "arguments"), [(name, call) for name, calls in CALLS.items() for call in calls])
def test_operators_need_no_python_after_their_first_call(name, arguments, monkeypatch):
    given = arguments(torch.randn(6, 100), registry.quantize(torch.randn(7, 100)), torch.rand(100) + 0.5)
    operator = operators.OPERATORS[name]
    found = operator(*given)
    right = getattr(torch.ops.tahf4, name)(*given)
    monkeypatch.setattr(operators, "_teach", lambda *_: pytest.fail("the general function was called"))
    results = found, right, operator(*given)
    for a, b, c in zip(*([r] if isinstance(r, torch.Tensor) else r for r in results), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, c)
        if a.dtype in (torch.uint8, torch.int32):  # sums over units in another order move few codes
            assert (a != b).sum() <= (0 if name == "quantize" else 2)
        else:
            assert torch.allclose(a.double(), b.double(), 1e-2, 1e-5)


@compiled
def test_operators_refuse_what_the_functions_refuse(monkeypatch):
    weight = registry.quantize(torch.randn(7, 100))
    with pytest.raises(FormatError, match="expected float32, bfloat16 or float16"):
        torch.ops.tahf4_cpu.quantize(torch.ones(2, 64, dtype=torch.float64))
    with pytest.raises(FormatError, match="same number of 64-value units"):
        torch.ops.tahf4_cpu.linear(*registry.quantize(torch.ones(2, 64)), *weight, None, torch.float32)
    with pytest.raises(FormatError, match=r"bias of shape \(8,\)"):
        torch.ops.tahf4_cpu.linear(*registry.quantize(torch.ones(2, 100)), *weight, torch.ones(8), torch.float32)
    monkeypatch.setenv("TAHF4_CPU_ISA", "avx1024")
    with pytest.raises(tahf4.OptionError, match="'avx1024'; expected one of none"):
        torch.ops.tahf4_cpu.quantize(torch.ones(2, 64))


@compiled
@pytest.mark.skipif(cpu.available() and cpu.instruction_set() == "none", reason="needs AVX2")
def test_a_program_is_made_known_in_several_threads_at_once(monkeypatch):
    inputs = [torch.randn(50, 192) for _ in range(8)]
    programs = [f"v0: float32 = mul(x0, {1 + i % 3}.5)" for i in range(8)]
    right = [torch.ops.tahf4.fused_quantize([x], p) for x, p in zip(inputs, programs, strict=True)]
    monkeypatch.setattr(operators, "_taught", {})
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(lambda x, p: torch.ops.tahf4_cpu.fused_quantize([x], p), inputs, programs)
            for a, b in zip(found, right, strict=True):
                assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


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


@compiled
@pytest.mark.usefixtures("_no_library")
def test_the_library_is_compiled_once_and_found_again(monkeypatch, tmp_path):
    from torch._inductor.cpp_builder import CppBuilder

    builds, build_one = [], CppBuilder.build
    monkeypatch.setattr(CppBuilder, "build", lambda self: (builds.append(self), build_one(self)))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    path = build._build()
    assert build._build() == path
    assert len(builds) == 1
    assert [p.name for p in (tmp_path / "tahf4").iterdir()] == [path.name]  # no remains
    assert isinstance(build._load(path), ctypes.CDLL)


@compiled
def test_several_processes_compile_at_once(tmp_path):
    code = (
        "import torch, tahf4_compiler\nfrom tahf4_compiler.backends import cpu\n"
        "print(int(cpu.quantize(torch.ones(2, 64))[0].sum()))"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    right = str(int(torch.ops.tahf4.quantize(torch.ones(2, 64))[0].sum()))
    assert [process.communicate()[0].strip() for process in running] == [right, right]
    assert len(list((tmp_path / "tahf4").iterdir())) == 1


def test_importing_compiles_nothing(tmp_path):
    code = (
        "import torch, tahf4_compiler, tahf4_compiler.backends.dynamo, tahf4_compiler.ops.registry as k\n"
        "import tahf4_compiler.backends.cpu as cpu\n"
        "op = torch.ops.tahf4.linear.default\n"
        "assert [x.name for x in k.kernels() if x.operator is op] == ['triton', 'cpu', 'reference']\n"
        "assert not cpu.build._library.cache_info().currsize\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(Path(tmp_path).rglob("*.so"))


def test_a_plug_in_that_registers_first_is_still_asked_first():
    code = (
        "import torch, tahf4_compiler as tahf4\nfrom tahf4_compiler.ops import registry\n"
        "op = torch.ops.tahf4.linear.default\n"
        "tahf4.register_kernel('mine', op, op, lambda node: True)\n"
        "assert [k.name for k in registry.kernels() if k.operator is op] == ['mine', 'triton', 'cpu', 'reference']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The integer product.

SETS = ["avx2", "avx_vnni", "avx512_vnni", "amx"]


def has(name):
    return cpu.available() and build.library().tahf4_instruction_sets() >> (1 + SETS.index(name)) & 1


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    if not has(request.param):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("TAHF4_CPU_ISA", request.param)
    return request.param


def packed(rows, k, seed):
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes over the whole range of the format, so that all scales and exponents occur.
    x = torch.randn(rows, k, generator=generator) * torch.exp2(torch.randint(-9, 9, (rows, k), generator=generator))
    return registry.quantize(x)


def in_float64(codes, scales, weight_codes, weight_scales):
    k = scales.shape[-1] * 64
    left, right = hif4.Packed(codes, scales, k), hif4.Packed(weight_codes, weight_scales, k)
    return hif4.dequantize(left, torch.float64) @ hif4.dequantize(right, torch.float64).mT


@compiled
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 64, 1), (2, 65, 15), (3, 200, 16), (4, 640, 17), (5, 64, 31), (6, 320, 32), (7, 1000, 33), (9, 64, 16)]
    + [(50, 192, 100)]
    + [(n, 128 + 64 * (n % 3), 65 + n) for n in range(10, 36)],
)
def test_integer_product_is_that_of_float64(instruction_set, rows, k, n):
    operands = (*packed(rows, k, 1), *packed(n, k, 2))
    bias = torch.linspace(-3, 3, n)
    wanted = in_float64(*operands)
    assert relative(cpu_operators.linear(*operands), wanted) < 1e-6
    assert relative(cpu_operators.linear(*operands, bias), wanted + bias) < 1e-6
    exact = cpu_operators.linear(*operands, bias)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(cpu_operators.linear(*operands, bias, dtype), exact.to(dtype))


@compiled
@pytest.mark.parametrize("signs", [(0x77, 0x77), (0x77, 0xFF), (0xFF, 0xFF), (0x7F, 0xF7), (0x7F, 0x7F)])
def test_the_largest_sums_of_a_unit_are_exact(instruction_set, signs):
    left, right = (torch.full((9, 96), sign, dtype=torch.uint8) for sign in signs)
    scales = torch.full((9, 3), -256 | 192, dtype=torch.int32)  # scale 1, all exponents set
    operands = (left, scales, right, scales)
    assert torch.equal(cpu_operators.linear(*operands).double(), in_float64(*operands))


@compiled
def test_units_without_a_number_and_random_bits(instruction_set):
    generator = torch.Generator().manual_seed(3)
    sides = []
    for rows in (7, 40):
        codes = torch.randint(0, 256, (rows, 160), generator=generator, dtype=torch.uint8)
        scales = torch.randint(-(2**31), 2**31 - 1, (rows, 5), generator=generator).to(torch.int32)
        scales = torch.where((scales & 0xFF) == 0xFF, 192, scales)
        scales[2, 3] = 0xFF
        sides += [codes, scales]
    found, wanted = cpu_operators.linear(*sides), in_float64(*sides)
    # Sums of units whose scales lie 2**60 apart: each result against the size of its own terms.
    size = in_float64(sides[0] & 0x77, sides[1], sides[2] & 0x77, sides[3])
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().sum() == 7 + 40 - 1
    assert ((found - wanted).abs().nan_to_num() <= 1e-6 * size.nan_to_num()).all()


@compiled
def test_neither_threads_nor_other_rows_change_the_product(instruction_set, _threads):
    operands = (*packed(83, 3000, 4), *packed(200, 3000, 5))
    torch.set_num_threads(1)
    wanted = cpu_operators.linear(*operands)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(cpu_operators.linear(*operands), wanted)
    for first, last in ((0, 1), (5, 7), (10, 83)):
        part = cpu_operators.linear(operands[0][first:last], operands[1][first:last], *operands[2:])
        assert torch.equal(part, wanted[first:last])


@compiled
def test_every_instruction_set_gives_the_same_bits(monkeypatch):
    operands = (*packed(83, 3000, 4), *packed(200, 3000, 5), torch.linspace(-3, 3, 200))
    found = []
    for name in filter(has, SETS):
        monkeypatch.setenv("TAHF4_CPU_ISA", name)
        found.append(cpu_operators.linear(*operands))
    assert all(torch.equal(one, found[0]) for one in found)


@compiled
def test_tiles_and_pytorchs_own_products_take_turns(instruction_set):
    # PyTorch's bfloat16 and int8 products may use the same registers, configured in another way.
    operands = (*packed(70, 640, 4), *packed(100, 640, 5))
    left, right = torch.randn(70, 640).bfloat16(), torch.randn(100, 640).bfloat16()
    ours, theirs = cpu_operators.linear(*operands), torch.nn.functional.linear(left, right)
    for _ in range(3):
        assert torch.equal(torch.nn.functional.linear(left, right), theirs)
        assert torch.equal(cpu_operators.linear(*operands), ours)


@compiled
def test_more_rows_than_one_block(instruction_set):
    operands = (*packed(1600, 64, 6), *packed(33, 64, 7))
    assert relative(cpu_operators.linear(*operands), in_float64(*operands)) < 1e-6


@compiled
def test_products_in_several_python_threads_at_once(instruction_set):
    operands = [(*packed(20 + i, 640, i), *packed(50, 640, 90 + i)) for i in range(8)]
    wanted = [cpu_operators.linear(*o) for o in operands]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, expected_one in zip(pool.map(lambda o: cpu_operators.linear(*o), operands), wanted, strict=True):
                assert torch.equal(found, expected_one)


@compiled
def test_strides_axes_and_empty_products(instruction_set):
    codes, scales = packed(24, 128, 8)
    weight = packed(10, 128, 9)
    wanted = cpu_operators.linear(codes, scales, *weight)
    found = cpu_operators.linear(codes.view(2, 3, 4, -1), scales.view(2, 3, 4, -1), *weight)
    assert torch.equal(found, wanted.view(2, 3, 4, 10))
    assert torch.equal(cpu_operators.linear(codes[::2], scales[::2], *weight), wanted[::2])
    wide = torch.empty(24, 99, dtype=torch.uint8)[:, 7:71].copy_(codes)
    assert torch.equal(cpu_operators.linear(wide, scales, *weight), wanted)
    assert cpu_operators.linear(codes[:0], scales[:0], *weight).shape == (0, 10)
    assert cpu_operators.linear(codes, scales, weight[0][:0], weight[1][:0]).shape == (24, 0)
    nothing = cpu_operators.linear(codes[:, :0], scales[:, :0], weight[0][:, :0], weight[1][:, :0], torch.arange(10.0))
    assert torch.equal(nothing, torch.arange(10.0).expand(24, 10))


@compiled
def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("TAHF4_CPU_ISA", "avx1024")
    with pytest.raises(tahf4.OptionError, match="'avx1024'; expected one of none"):
        cpu_operators.linear(*packed(1, 64, 0), *packed(1, 64, 1))


@compiled
def test_without_the_instructions_the_product_is_float32(monkeypatch):
    monkeypatch.setenv("TAHF4_CPU_ISA", "none")
    operands = (*packed(5, 200, 1), *packed(9, 200, 2))
    assert relative(cpu_operators.linear(*operands), in_float64(*operands)) < 1e-6


@compiled
@pytest.mark.parametrize("count", [1, 2, 4095, 4096, 4097, 3 * 4096 + 5, 257 * 4096, 1 << 21])
def test_the_checksum_of_weights_is_that_of_plain_pytorch(count, monkeypatch):
    from tahf4_compiler.weights.checksum import checksum

    ones = -torch.ones(count)
    for weight in (torch.randn(count), torch.randn(count).bfloat16(), torch.randn(2, count)[:, ::2], ones):
        found = checksum(weight)
        monkeypatch.setenv("TAHF4_NO_CPP", "1")
        assert torch.equal(found, checksum(weight)) and found.dtype == torch.int64 and found.dim() == 0
        monkeypatch.setenv("TAHF4_NO_CPP", "0")
