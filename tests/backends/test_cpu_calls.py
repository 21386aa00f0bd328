"""The operators of the C++ kernels: those of the reference, called without Python."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import operators

import tahf4_compiler as tahf4
from tahf4_compiler import FormatError
from tahf4_compiler.ops import registry

compiled = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")


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
        lambda x, w, f: (
            *(*registry.quantize(x.view(2, 3, 100)), *w, f[:7], torch.float32, [7]),
            *([x.view(2, 3, 100)[..., :5], x[:5, :7]], "v0: float32 = matmul(x0, x1)\nv1: float32 = add(y, v0)"),
            torch.float32,
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
@torch.no_grad()
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
