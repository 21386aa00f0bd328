"""Attention in 8 bits in C++: the bits of the reference, on each set of instructions."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from attention_parts import quantized
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import build

from tahf4_compiler.errors import FormatError, GradientError
from tahf4_compiler.ops import registry

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a C++ compiler")
own, reference, with_lse = torch.ops.tahf4_cpu, torch.ops.tahf4.attention, torch.ops.tahf4.attention_lse
SETS = ["none", "avx2", "avx512_vnni"]


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    place = build.SETS.index(request.param)
    if place and not build.library().tahf4_instruction_sets() >> place & 1:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("TAHF4_CPU_ISA", request.param)
    registry.kernels()
    return request.param


def operands(rows=70, keys=150, channels=64, heads=2, shared=1, values=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(tokens, heads, width):
        drawn = torch.randn(2, tokens, heads, width, generator=generator)
        return (drawn * torch.randint(1, 9, (width,), generator=generator)).to(dtype).transpose(1, 2)

    few = heads // shared
    return draw(rows, heads, channels), draw(keys, few, channels), draw(keys, few, values or channels)


def assert_same(got, wanted):
    """Assert equal bits, but for the kind of NaN."""
    assert got.dtype == wanted.dtype and got.stride() == wanted.stride()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, keys", [(1, 1), (5, 63), (64, 64), (65, 129), (131, 300)])
@pytest.mark.parametrize("channels, values", [(64, 64), (128, 128), (96, 24), (40, 200)])
def test_bits_are_those_of_the_reference(instruction_set, dtype, rows, keys, channels, values):
    given = operands(rows, keys, channels, values=values, dtype=dtype)
    assert_same(own.attention(*given), reference(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 128, 96, 40])
def test_with_queries_and_keys_in_hif4_too(instruction_set, dtype, channels):
    q, k, v = operands(channels=channels, dtype=dtype)
    q[0, 0, 2, 5], k[1, 0, 149, 0] = torch.nan, torch.inf
    assert_same(own.attention(q, k, v, bits=4), reference(q, k, v, bits=4))
    for got, wanted in zip(own.attention_lse(q, k, v, bits=4), with_lse(q, k, v, bits=4), strict=True):
        assert_same(got, wanted)
    for factor in (1e-20, 1e-3, 30.0, 1e4):  # below and above what a level-1 scale reaches
        assert_same(own.attention(q * factor, k, v, bits=4), reference(q * factor, k, v, bits=4))


def test_masks_scales_and_shared_heads(instruction_set):
    given = operands(heads=6, shared=3)
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(2, 6, 70, 150, generator=generator)
    seen = added > -0.5
    seen[0, 1, 3], seen[:, 2, 4, 64:128], seen[0, 0, :, :64] = False, False, False
    for mask in (added, seen, added[:1, :, :1].bfloat16(), seen[:, :1], seen[0, 0, 0], added[0, :, :, :1]):
        assert_same(own.attention(*given, mask, False, None, True), reference(*given, mask, False, None, True))
    least = torch.zeros(70, 150)
    least[3], least[4, :70], least[5] = (torch.finfo(torch.float32).min,) * 2 + (torch.finfo(torch.float32).max,)
    assert_same(own.attention(*given, least, False, None, True), reference(*given, least, False, None, True))
    for scale, causal in ((0.3, False), (-2.0, True), (0.0, False)):
        more = (None, causal, scale, True)
        assert_same(own.attention(*given, *more), reference(*given, *more))


def test_nan_and_infinities(instruction_set):
    q, k, v = operands()
    q[0, 0, 2, 5], q[1, 1, 69, 0], k[1, 0, 149, 0], v[0, 1, 149, 7] = torch.nan, torch.inf, torch.nan, -torch.inf
    mask = torch.zeros(70, 150)
    mask[8, 3], mask[9, 70], mask[10, 149] = torch.inf, torch.nan, -torch.inf
    for given in ((), (mask,), (None, True)):
        wanted = reference(q, k, v, *given)
        assert wanted.isnan().any() and not wanted.isnan().all()
        assert_same(own.attention(q, k, v, *given), wanted)


def test_the_log_sum_exp_has_the_bits_of_the_reference(instruction_set):
    q, k, v = operands(heads=4, shared=2, values=24)
    mask = torch.randn(70, 150, generator=torch.Generator().manual_seed(1))
    mask[3], mask[4, :64], mask[5, 70] = -torch.inf, -torch.inf, torch.nan
    for given in ((mask, False, None, True), (None, True, 0.3, True)):
        for got, wanted in zip(own.attention_lse(q, k, v, *given), with_lse(q, k, v, *given), strict=True):
            assert_same(got, wanted)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "keys", "channels", "values"), [(70, 150, 64, 64), (3, 65, 96, 24), (1, 1, 40, 130)])
def test_keys_and_values_that_come_quantized(instruction_set, bits, rows, keys, channels, values):
    q, k, v = operands(rows, keys, channels, values=values)
    k[0, 0, keys - 1, 5], v[1, 1, 0, 3] = torch.nan, torch.inf
    given = quantized(k, v, bits)
    wanted = torch.ops.tahf4.attention_of_codes(q, *given, 0.3)
    assert wanted.isnan().any() and not wanted.isnan().all()
    assert_same(own.attention_of_codes(q, *given, 0.3), wanted)
    assert_same(own.attention_of_codes(q, *given, 0.3), own.attention(q, k, v, scale=0.3, bits=bits))
    with pytest.raises(FormatError, match="attention_of_codes got"):
        own.attention_of_codes(q, *given[:3], given[3][..., :0], 0.3)


def test_large_and_small_values(instruction_set):
    q, k, v = operands()
    for factor in (1e-20, 1e-3, 30.0, 1e18, 3e37):
        assert_same(own.attention(q * factor, k, v), reference(q * factor, k, v))
        assert_same(own.attention(q, k, v * factor), reference(q, k, v * factor))


def test_memory_may_lie_in_any_way():
    q, k, v = (torch.cat([x, x], -1)[..., ::2] for x in operands())
    assert_same(own.attention(q, k, v), reference(q, k, v))
    assert_same(own.attention(q.contiguous(), k, v), reference(q.contiguous(), k, v))
    mask = (torch.rand(150, 70, generator=torch.Generator().manual_seed(2)) < 0.5).t()
    plain = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(own.attention(q, k, v, mask), reference(*plain, mask.contiguous()))
    v = v[:, :, :1].expand(-1, -1, 150, -1)
    assert_same(own.attention(q, k, v), reference(q, k, v))


def test_nothing_to_do():
    q, k, v = operands()
    for given in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0]), (q, k, v[..., :0])):
        assert_same(own.attention(*given), reference(*given))
        assert_same(own.attention_lse(*given)[1], with_lse(*given)[1])


def test_neither_threads_nor_other_rows_change_a_bit():
    q, k, v = operands(rows=300)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(own.attention(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(own.attention(q[:, :, 7:9], k, v), found[0][:, :, 7:9])


def test_several_threads_may_call_at_once():
    q, k, v = operands()
    wanted, found = own.attention(q, k, v), []
    calls = [threading.Thread(target=lambda: found.append(own.attention(q, k, v))) for _ in range(4)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(found) == 4 and all(torch.equal(x, wanted) for x in found)


def test_what_does_not_fit_is_refused():
    q, k, v = operands(heads=4, shared=2)
    run = functools.partial(own.attention, q)
    for given, words in [
        ((k, v), "enable_gqa"),
        ((k[0], v[0]), "four axes"),
        ((k.double(), v), "float64"),
        ((q, q, torch.ones(3, 3)), "broadcasts to"),
        ((q, q, torch.ones(70, 70, dtype=torch.int32)), "int32"),
        ((q, q, torch.ones(70, 70, dtype=torch.bool), True), "leave one"),
    ]:
        with pytest.raises(FormatError, match=words):
            run(*given)
    with pytest.raises(GradientError, match="tahf4_cpu::attention"):
        own.attention(q.clone().requires_grad_(), q, q)


def test_without_the_compiled_code_the_reference_runs(monkeypatch):
    monkeypatch.setenv("TAHF4_NO_CPP", "1")
    given = operands()
    assert_same(own.attention(*given), reference(*given))
