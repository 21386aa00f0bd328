"""What the operators in C++ must refuse, and what must not change what they compute."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import search
from torch._subclasses.fake_tensor import FakeTensorMode

from tahf4_compiler import FormatError
from tahf4_compiler.format import hif4, scale_search
from tahf4_compiler.packed.linear import HiF4Linear
from tahf4_compiler.plugins import host

pytestmark = pytest.mark.skipif(not cpu.available(), reason="there is no C++ compiler")
needs_integers = pytest.mark.skipif(
    not cpu.available() or cpu.instruction_set() == "none", reason="this processor multiplies in float32"
)

OPS = torch.ops.tahf4_cpu


def packed(rows: int, k: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return cpu.quantize(torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)))


def fused_quantize(program: str, *inputs: torch.Tensor):
    return OPS.fused_quantize(list(inputs), program, None, 0)


def fused_linear(program: str, *inputs: torch.Tensor, sizes=(64,)):
    product = *packed(4), *packed(64), None, torch.float32
    return OPS.fused_linear(*product, list(sizes), list(inputs), program, torch.float32)


def linear_quantize(program: str, *inputs: torch.Tensor):
    return OPS.linear_quantize(*packed(4), *packed(64), None, torch.float32, list(inputs), program, None, 0)


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
WRONG = [
    (fused_quantize, "a: float32 = add(x0, y)", [X]),
    (fused_quantize, "a: float32 = add(x0, x5)", [X]),
    (fused_quantize, "a: float32 = neg(x1)", [X, X[:1, :1]]),
    (fused_quantize, "a: float32 = mean(x0)", [X]),
    (fused_linear, "a: float32 = mean(y)\nb: float32 = sub(y, a)", []),
    (fused_linear, "a: float32 = add(y, x3)", []),
    (linear_quantize, "a: float32 = rms_norm(y, None, 1e-6)", []),
    (linear_quantize, "a: float32 = neg(x0)", [X[:1, :1]]),
]


@needs_integers
@pytest.mark.parametrize(("operator", "program", "inputs"), WRONG)
def test_programs_that_do_not_fit_are_refused(operator, program, inputs):
    for _ in range(2):  # the second time it is known
        with pytest.raises(FormatError):
            operator(program, *inputs)


@needs_integers
def test_inputs_that_a_program_does_not_need_may_be_smaller():
    codes, scales = fused_quantize("a: float32 = mean(x0)\nb: float32 = sub(x0, a)\nc: float32 = mul(b, x1)", X, X[:1])
    wanted = hif4.quantize((X - X.mean(-1, keepdim=True)) * X[:1])
    assert torch.equal(scales, wanted.scales)
    assert torch.equal(codes, wanted.codes)


@needs_integers
@pytest.mark.parametrize("sizes", [[-5, 69], [1 << 62] * 4 + [64], [64, 64], []])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(FormatError, match="sizes"):
        fused_linear("", sizes=sizes)


def test_tensors_without_memory_beside_others_are_refused():
    on_meta = torch.empty(64, device="meta")
    for call in (
        lambda: OPS.quantize(X, on_meta, 0),
        lambda: OPS.linear(*packed(4), *packed(64), on_meta, torch.float32),
        lambda: torch.ops.tahf4.linear(*packed(4), *packed(64), on_meta, torch.float32),
        lambda: fused_quantize("a: float32 = add(x0, x1)", X, on_meta),
        lambda: fused_linear("a: float32 = add(y, x0)", on_meta),
        lambda: linear_quantize("a: float32 = add(y, x0)", on_meta),
        lambda: HiF4Linear(64, 64, device="meta")(X),
    ):
        with torch.no_grad(), pytest.raises(FormatError, match="meta device"):
            call()
    codes = torch.empty(4, 32, dtype=torch.uint8, device="meta")
    scales = torch.empty(4, 1, dtype=torch.int32, device="meta")
    assert OPS.linear(codes, scales, codes, scales, None, torch.float32).device.type == "meta"


def test_another_default_device_changes_nothing():
    wanted = scale_search.search_scales(X)
    pair = packed(4)
    transformed, values = search.transform(X, None, 64), cpu.dequantize(*pair)
    with torch.device("meta"):
        found = scale_search.search_scales(X)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(search.transform(X, None, 64), transformed)
        assert torch.equal(cpu.dequantize(*pair), values)
        assert cpu.quantize(X)[0].device.type == "cpu"


def test_fake_tensors_are_not_read():
    codes, scales = packed(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert host.find("transform", X, None, 64) is None, "the reference knows fake tensors"
        assert scale_search.search_scales(X).codes.shape == (4, 32)
        assert cpu.dequantize(codes, scales).shape == (4, 64)


@pytest.mark.parametrize("name", ["tahf4", "tahf4_cpu"])
@pytest.mark.parametrize("isa", ["none", ""])
def test_autocast_does_not_round_products(name, isa, monkeypatch):
    monkeypatch.setenv("TAHF4_CPU_ISA", isa)
    x, w = packed(8, 512), packed(16, 512)
    left, right = (hif4.dequantize(hif4.Packed(*p, 512)).double() for p in (x, w))
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(torch.ops, name).linear(*x, *w, None, torch.float32)
    wanted = left @ right.T
    assert (found - wanted).norm() / wanted.norm() < 1e-6


def test_a_search_refuses_what_quantize_refuses():
    with pytest.raises(FormatError, match="float8"):
        scale_search.search_scales(X.to(torch.float8_e4m3fn))


@needs_integers
def test_threads_that_meet_a_new_program_together():
    x, switch = torch.randn(4, 64), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for n in range(60):
            program = f"race{n}: float32 = mul(x0, {n}.5)"  # new in this process, whatever ran before
            found, start = [None] * 6, threading.Barrier(6)

            def run(i, found=found, start=start, program=program):
                start.wait()
                for _ in range(4):
                    found[i] = OPS.fused_quantize([x], program, None, 0)

            threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wanted = cpu.quantize(x * (n + 0.5))
            assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, wanted, strict=True)), n
    finally:
        sys.setswitchinterval(switch)
