"""The search of scales in C++ finds what the reference finds, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tahf4_compiler.backends import cpu
from tahf4_compiler.backends.cpu import search

from tahf4_compiler import FormatError, ops
from tahf4_compiler.format import scale_search
from tahf4_compiler.plugins import host

pytestmark = pytest.mark.skipif(not cpu.available(), reason="there is no C++ compiler")


def draw(kind: str, rows: int = 37, k: int = 229) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator)
    if kind == "bits":
        return torch.randint(-(2**31), 2**31, (rows, k), generator=generator).to(torch.int32).view(torch.float32)
    if kind == "ties":  # halves of steps, and zeros of both signs
        return torch.randint(-31, 32, (rows, k), generator=generator) * 0.15625 * x.sign()
    if kind == "scales":  # every level-1 scale there is, to both ends
        return x * 2.0 ** torch.linspace(-60, 127, rows)[:, None]
    if kind == "sparse":
        return x * (torch.rand(rows, k, generator=generator) < 0.1)
    return x.to(getattr(torch, kind))


def importance(kind: str, k: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    found = (3 * torch.randn(k, generator=generator)).exp()
    if kind == "dead":
        found[torch.rand(k, generator=generator) < 0.7] = 0.0
        found[64:128] = 0.0
    return found.double() * 1e300 if kind == "huge" else found


def transformed(x, mask, block):
    """Return what packing quantizes: by the C++ code where it serves, else by the reference."""
    return (host.find("transform", x, mask, block) or ops.transform)(x, mask, block)


@pytest.mark.parametrize("weighted", ["none", "plain", "dead", "huge"])
@pytest.mark.parametrize("candidates", [0, 1, 4, 8])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "float64", "bits", "ties", "scales", "sparse"])
def test_the_same_as_the_reference(kind, candidates, weighted, monkeypatch):
    x = draw(kind)
    factors = importance(weighted, x.shape[-1])
    found = scale_search.search_scales(x, factors, candidates=candidates)
    monkeypatch.setattr(search, "serves", lambda x: False)
    wanted = scale_search.search_scales(x, factors, candidates=candidates)
    assert torch.equal(found.scales, wanted.scales)
    assert torch.equal(found.codes, wanted.codes)


def test_threads_and_rows_change_nothing(monkeypatch):
    x = draw("float32", 512, 320)
    whole = scale_search.search_scales(x)
    alone = scale_search.search_scales(x[100:101])
    assert torch.equal(alone.codes, whole.codes[100:101])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = scale_search.search_scales(x)
            assert torch.equal(found.codes, whole.codes)
            assert torch.equal(found.scales, whole.scales)
    finally:
        torch.set_num_threads(before)


def test_it_runs_where_it_should(monkeypatch):
    assert host.find("search", torch.randn(2, 64)) is search.search
    assert host.find("search", torch.nn.Parameter(torch.randn(2, 64))) is search.search
    monkeypatch.setenv("TAHF4_NO_CPP", "1")
    assert host.find("search", torch.randn(2, 64)) is None


@pytest.mark.parametrize("block", [0, 1, 4, 64, 128, 256])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_transform_is_the_reference(dtype, masked, block):
    x = draw("bits" if dtype == "float32" else dtype, 9, 213)  # 4 units
    mask = torch.rand(213, generator=torch.Generator().manual_seed(2)) - 0.5 if masked else None
    for given in (x, x.t().contiguous().t(), torch.cat([x, x])[::2], x[:, :1].expand(9, 213)):
        found, wanted = transformed(given, mask, block), ops.transform(given, mask, block)
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize(("mask", "block"), [(torch.ones(63), 64), (None, 3), (None, 512)])
def test_a_transform_that_does_not_fit_is_refused(mask, block):
    with pytest.raises(FormatError):
        transformed(torch.randn(4, 64), mask, block)
