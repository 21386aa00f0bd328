"""The kernels that a wheel brings, called from Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_parts import quantized
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import build, calls, operators
from test_cpu_calls import CALLS

from tahf4_compiler.ops import registry

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
wide = pytest.mark.skipif(cpu.available() and cpu.instruction_set() == "none", reason="needs AVX2")

MORE = {
    "quantize": [
        lambda x, w, f: (torch.randn(5, 700), None, 64, 4, 4),
        lambda x, w, f: (torch.randn(5, 700), None, 64, 4, 0),
        lambda x, w, f: (x, f, 64, 8), lambda x, w, f: (x.to(torch.complex64).conj().imag, None, 4),
    ],
    "fused_quantize": [
        lambda x, w, f: ([x.view(1, 2, 3, 100).transpose(1, 2), f, x[0, :1]], "v0: float32 = mul(x0, x1)", None, 64, 8),
        lambda x, w, f: ([x.half(), f.bfloat16()], "v0: float32 = layer_norm(x0, x1, None, 1e-05)"),
        lambda x, w, f: ([x, torch._neg_view(x)], "v0: float32 = sub(x0, x1)"),
        lambda x, w, f: ([x, torch.randn(6, 3, 100)[:, 1:2].movedim(1, 0)], "v0: float32 = mul(x0, x1)"),
        lambda x, w, f: ([x], ""),
        lambda x, w, f: ([x[0]], "v0: float32 = relu(x0)"),
    ],
    "linear": [
        lambda x, w, f: (*registry.quantize(x, None, 0, 8), *w, f[:7], torch.float16),
        lambda x, w, f: (*(t for y in (torch.randn(5, 700), torch.randn(3, 700)) for t in
                           torch.ops.tahf4.quantize(y, None, 0, 4, 2)), None, torch.float32, 2),
    ],
    "fused_linear": [
        lambda x, w, f: (
            *(*registry.quantize(x.view(2, 3, 100), None, 0, 8), *w, None, torch.bfloat16, [7]),
            *([x[:3, :7].contiguous(), f[0]], "v0: float32 = add(y, x0)\nv1: float32 = mul(v0, x1)", torch.float32),
        ),
        lambda x, w, f: (
            *(*registry.quantize(x), *w, None, torch.float32, [7], [x[:, 20:29], f[:63].view(7, 9).t()]),
            *("v0: float32 = matmul(x0, x1)\nv1: float32 = add(y, v0)", torch.float32),
        ),
    ],
    "linear_quantize": [
        lambda x, w, f: (*registry.quantize(x), *w, None, torch.bfloat16, [x[:1, :7]], "v0: float32 = mul(y, x0)",
                         f[:7], 8, 8),
    ],
    "attention": [
        lambda x, w, f: (*(torch.randn(2, 4, 70, 48) for _ in range(3)), None, True),
        lambda x, w, f: (torch.randn(2, 4, 5, 64).bfloat16(), *(torch.randn(2, 2, 9, d).bfloat16() for d in (64, 30)),
                         torch.randn(5, 9) > 0, False, 0.3, True),
        lambda x, w, f: (*(torch.randn(1, 33, 2, 128).transpose(1, 2) for _ in range(3)), torch.randn(2, 33, 33)),
        lambda x, w, f: (torch.randn(1, 1, 3, 64), torch.randn(1, 1, 0, 64), torch.randn(1, 1, 0, 64)),
        lambda x, w, f: (*(torch.randn(2, 4, 70, 48) for _ in range(3)), None, True, None, False, 4),
    ],
    "attention_of_codes": [
        lambda x, w, f: (q := torch.randn(1, 2, 9, 64), *quantized(q, q, 8)),
        lambda x, w, f: (q := torch.randn(2, 3, 70, 40).bfloat16(), *quantized(q, q[..., :7], 4), 0.3),
        lambda x, w, f: (q := torch.randn(1, 2, 3, 64), *quantized(q[:, :, :0], q[:, :, :0], 8)),
    ],
}  # fmt: skip
ALL = [(name, call) for given in (CALLS, MORE) for name, found in given.items() for call in found]


@wide
@pytest.mark.parametrize(("name", "arguments"), ALL)
@torch.no_grad()
def test_python_makes_the_calls_that_the_operators_make(name, arguments):
    given = arguments(torch.randn(6, 100), registry.quantize(torch.randn(7, 100)), torch.rand(100) + 0.5)
    right, found = operators.OPERATORS[name](*given), getattr(calls, name)(*given)
    for a, b in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (found, right)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert torch.equal(a, b)


@wide
def test_python_leaves_to_the_reference_what_the_kernels_do_not_take(monkeypatch):
    x, w = torch.randn(6, 100), registry.quantize(torch.randn(7, 100))
    product = (*registry.quantize(x), *w, None)
    narrow = "v0: float32 = mul(x1, x1)"
    for name, given in (
        ("fused_quantize", ([x.view(*[1] * 16, 6, 100)], "")),  # more axes than the kernels know
        ("fused_quantize", ([x, x[:1]], narrow)),  # a result of one row
        ("fused_linear", (*product, torch.float32, [7], [x[:, :7], x[:1, :7]], narrow, torch.float32)),
        ("fused_linear", (*product, torch.float64, [7], [], "", torch.float64)),
        ("linear_quantize", (*product, torch.float64, [], "")),
        ("linear", (*(torch.empty(6, 0, dtype=t.dtype) for t in product[:2]),
                    *(torch.empty(7, 0, dtype=t.dtype) for t in product[:2]), None, torch.float32)),
    ):  # fmt: skip
        assert getattr(calls, name)(*given) is NotImplemented
    monkeypatch.setenv("TAHF4_CPU_ISA", "none")
    assert calls.linear(*product, torch.float32) is NotImplemented
    assert calls.fused_quantize([x], "") is NotImplemented
    assert all(map(torch.equal, calls.quantize(x), torch.ops.tahf4.quantize(x)))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A library that holds the kernels, in the place where a wheel puts it."""
    path = tmp_path_factory.mktemp("wheel") / "kernels.so"
    return Path(shutil.copy(build._build(), path))


PROGRAM = """
import sys, pathlib
import torch
import tahf4_compiler as tahf4
from models import Stack
from tahf4_compiler.backends.cpu import build, operators
from tahf4_compiler.ops import registry
build.PREBUILT = pathlib.Path(sys.argv[1])
model, x = Stack().eval(), torch.randn(5, 64)
torch.manual_seed(0)
with torch.no_grad():
    lowered = tahf4.lower(tahf4.capture(model, (x,)))
    kernels = {d.kernel for d in lowered.plan if d.kernel}
    y = lowered(x)
    want = tahf4.lower(tahf4.capture(model, (x,)), options={"kernels": "reference"})(x)
print(kernels, build.operators() is None, float((y - want).norm() / want.norm()) < 1e-3)
try:
    operators.OPERATORS["quantize"](torch.ones(2, 64, dtype=torch.float64))
except tahf4.FormatError:
    print("refused")
"""


@wide
def test_the_kernels_of_a_wheel_run_and_nothing_is_compiled(kernels):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(kernels)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["{'cpu'} True True", "refused"]


def test_kernels_that_do_not_load_are_compiled(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "kernels.so")
    build.PREBUILT.write_bytes(b"no library")
    assert build._prebuilt() is None
    assert "the wheel of tahf4 brought do not load" in caplog.text


def test_a_compiler_may_be_switched_off(monkeypatch, caplog):
    monkeypatch.setenv("TAHF4_NO_COMPILER", "1")
    assert build._libraries.__wrapped__() == (None, None)
    assert "the reference runs in their place: RuntimeError: TAHF4_NO_COMPILER is set" in caplog.text
