"""Quantizing kernels that compute the first products of branches: which run, in what parts, and their registers."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import fx

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") == "1",
    reason="needs Triton's compiler",
)

from tahf4_compiler.backends import triton as backend  # noqa: E402
from tahf4_compiler.backends.triton import branches  # noqa: E402
from tahf4_compiler.backends.triton.targets import SHARED_LIMIT, compile_call  # noqa: E402

from tahf4_compiler import FormatError  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TAHF4_KERNEL_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("dtype", "block", "form", "served"),
    [
        (torch.bfloat16, 128, 1, True), (torch.float16, 0, 9, True), (torch.bfloat16, 256, 1, False),
        (torch.float32, 64, 1, False), (torch.bfloat16, 64, 0, False), (torch.bfloat16, 64, 10, False),
    ],
)  # fmt: skip
def test_which_branches_a_kernel_computes(dtype, block, form, served, monkeypatch):
    monkeypatch.setattr(backend, "available", lambda device: True)
    graph = fx.Graph()
    x, factor = (graph.placeholder(name) for name in ("x", "factor"))
    x.meta["val"], factor.meta["val"] = empty(4, 256, dtype=dtype), empty(256, 8, dtype=dtype)
    target = torch.ops.tahf4.branched_quantize.default
    assert backend._serves(graph.call_function(target, ([x], "", [factor], None, block, 4, form))) == served


@pytest.mark.parametrize(
    ("rows", "ranks", "grid"),
    [
        (32760, (32,), (512, 1)), (512, (32, 32), (8, 16)), (1, (8,), (1, 20)), (4096, (64, 64), (64, 2)),
        (4097, (64, 64), (65, 1)), (4096, (64, 72), (128, 1)),
    ],
)  # fmt: skip
def test_few_rows_are_split_among_blocks_of_threads(rows, ranks, grid):
    """Into no more parts than there are steps: 20 of four units."""
    _, found = branches.calls([empty(rows, 5120)], "", [empty(5120, rank) for rank in ranks], None, 0)
    assert found[0].grid == grid
    assert [call.name for call in found] == (["kernel", "finish"] if grid[1] > 1 else ["kernel"])


@pytest.mark.parametrize("given", [(0, None, 64), (1, None, 512), (1, None, 64, 4, 0), (1, None, 64, 4, 2)])
def test_what_the_kernel_cannot_do_is_refused(given):
    """A rotation across more units than a tile has would be wrong."""
    count, multiplier, *form = given
    with pytest.raises(FormatError, match="a branch, a level-1 scale for each unit, and a block of at most 256"):
        branches.calls([empty(2, 512)], "", [empty(512, 8)] * count, multiplier, *form)


@pytest.mark.parametrize(
    ("capability", "ranks", "norm"),
    [
        pytest.param(c, r, n, marks=() if (c, r, n) == (90, (32,), False) else pytest.mark.slow)
        for c in (90, 80, 86, 89, 100, 120)
        for r in ((32,), (32, 32, 32), (64, 64, 64))
        for n in (False, True)
    ],
)
def test_a_quantization_with_branches_stays_in_registers(capability, ranks, norm):
    factors, multiplier = [empty(5120, rank) for rank in ranks], empty(5120, dtype=torch.float32)
    inputs = [empty(1, 32760, 5120), *(empty(1, 1, 5120, dtype=torch.float32) for _ in range(2 if norm else 0))]
    program = "v0: float32 = layer_norm(x0, None, None, 1e-06)\nv1: float32 = add(x1, 1)\nv2: float32 = mul(v0, v1)\n"
    program += "v3: bfloat16 = add(v2, x2)"
    _, (call,) = branches.calls(inputs, program if norm else "", factors, multiplier, 64)
    found = compile_call(call, capability)
    print(found)
    assert found.spills == 0 and found.registers <= 255 and found.shared <= SHARED_LIMIT[capability]
    assert found.counts["mma"] + found.counts["wgmma"] + found.counts["tcgen05"] > 0
    assert found.counts["loads of 16 bytes"] == found.counts["loads"]
