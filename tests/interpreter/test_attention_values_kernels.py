"""Attention in 8 bits with values of 16 in Triton's interpreter, against the reference operator."""

from __future__ import annotations

import pytest
import torch
from attention_parts import normal
from tahf4_compiler.backends.triton import attention as kernels
from tahf4_compiler.backends.triton import run

import tahf4_compiler as tahf4
from tahf4_compiler.ops import registry

reference = torch.ops.tahf4.attention
SMALL = kernels.AttentionTile(32, 64, 4, 2)
SAME, BORDER = 1e-5, 2e-3
"""The order of sums in float32; probabilities rounded relative to another score, since 128 keys come at once."""


def launched(*given, tile=SMALL, **how):
    out, calls = kernels.calls(*given, value_bits=16, tile=tile, **how)
    run(calls)
    return out


def check(got, wanted, allowed):
    """Assert that two results agree, and are NaN at the same places."""
    assert got.dtype == wanted.dtype and got.stride() == wanted.stride()
    assert torch.equal(got.isnan(), wanted.isnan())
    got, wanted = (x.double().nan_to_num(0.0) for x in (got, wanted))
    assert float((got - wanted).norm() / wanted.norm()) < allowed


@pytest.mark.parametrize(
    ("rows", "keys", "channels", "values", "bits"),
    [
        *((1, 1, 64, 64, 8), (33, 63, 128, 130, 8), (40, 129, 96, 24, 4), (5, 200, 40, 64, 8), (5, 70, 256, 3, 8)),
        *((20, 130, 192, 192, 8), (9, 70, 160, 72, 4)),
    ],
)
def test_it_is_the_reference(rows, keys, channels, values, bits):
    given = normal(rows, keys, channels, values=values)
    check(launched(*given, bits=bits), reference(*given, bits=bits, value_bits=16), SAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_its_dtype(dtype):
    given = normal(dtype=dtype, batch=2, heads=4, shared=2, rows=9)
    got = torch.ops.tahf4_triton.attention(*given, None, False, None, True, 8, 16)
    check(got, reference(*given, None, False, None, True, 8, 16), torch.finfo(dtype).eps / 2)


def test_128_keys_at_a_time():
    given = normal(keys=300, channels=128)
    tile = kernels.tile_for(False, wide=True, capability=(9, 0))
    assert tile.keys == 128 and kernels.tile_for(False, wide=True, capability=(8, 9)).keys == 64
    check(launched(*given, tile=tile), reference(*given, value_bits=16), BORDER)


def test_masks_and_scales():
    q, k, v = normal(heads=4, shared=2, batch=2, rows=5, keys=130)
    added = torch.randn(2, 4, 5, 130, generator=torch.Generator().manual_seed(1))
    seen = added > -0.5
    seen[0, 1, 3], seen[:, 2, 4, 64:128], seen[0, 0, :, :64] = False, False, False
    for mask, scale in ((added, None), (seen, 0.7), (seen[:, :1, :1], None), (added[:1, :, :, :1], -1.0)):
        how = (mask, False, scale, True, 8, 16)
        check(torch.ops.tahf4_triton.attention(q, k, v, *how), reference(q, k, v, *how), SAME)
    for scale in (-2.0, 0.0):
        how = (None, False, scale, True, 8, 16)
        check(torch.ops.tahf4_triton.attention(q, k, v, *how), reference(q, k, v, *how), SAME)


@pytest.mark.parametrize(("rows", "keys"), [(40, 150), (150, 40)])
def test_a_causal_attention(rows, keys):
    given = (*normal(rows, keys, heads=1), None, True)
    check(launched(*given), reference(*given, value_bits=16), SAME)


def test_nan_and_infinities():
    q, k, v = normal()
    q[0, 0, 2, 5], q[0, 1, 39, 0], k[0, 0, 149, 0], v[0, 1, 149, 7] = torch.nan, torch.inf, torch.nan, torch.nan
    mask = torch.zeros(40, 150)
    mask[8, 3], mask[9, 70], mask[10, 149], mask[11] = torch.inf, torch.nan, -torch.inf, -torch.inf
    for given in ((), (mask,), (None, True)):
        wanted = reference(q, k, v, *given, value_bits=16)
        assert wanted.isnan().any() and not wanted.isnan().all()
        check(launched(q, k, v, *given), wanted, SAME)


def test_memory_may_lie_in_any_way():
    q, k, v = (torch.cat([x, x], -1)[..., ::2] for x in normal(batch=2, rows=9, keys=70, heads=1))
    check(launched(q, k, v), reference(q, k, v, value_bits=16), SAME)
    v = v[:, :, :1].expand(-1, -1, 70, -1).half()
    check(launched(q.half(), k.half(), v), reference(q.half(), k.half(), v, value_bits=16), 1e-3)


def test_places_beyond_2_to_the_31():
    q, k, v = (x.half() for x in normal(rows=3, heads=1))
    step = (1 << 31) // 148  # so that the last tokens lie beyond; memory that nobody touches is not there
    far = torch.empty(149 * step + 64, dtype=torch.float16).as_strided((1, 1, 150, 64), (0, 0, step, 1)).copy_(v)
    check(launched(q, k, far), reference(q, k, v, value_bits=16), 1e-3)
    q, k, v = (x.half() for x in normal(rows=3, keys=8, channels=128, heads=1))
    step = 1 << 25  # of channels
    far = torch.empty(127 * step + 8, dtype=torch.float16).as_strided((1, 1, 8, 128), (8, 8, 1, step)).copy_(v)
    check(launched(q, k, far), reference(q, k, v, value_bits=16), 1e-3)


def test_nothing_to_do():
    q, k, v = normal()
    for given in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q, k, v[..., :0])):
        assert torch.equal(launched(*given), reference(*given, value_bits=16))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, 1, 64)).unbind(-3))
        return x + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_graph_runs_it_where_a_kernel_is(monkeypatch):
    model = torch.nn.Sequential(*(Block() for _ in range(2))).requires_grad_(False)
    x, asked = torch.randn(1, 20, 64), {"attention": "int8", "attention.min_tokens": 16, "attention.value_bits": 16}
    captured = tahf4.capture(model, (x,))
    assert tahf4.lower(captured, options=asked).notes["attention"][0].endswith("int8, values in 16 bits")
    others, all_kernels = [k for k in registry.kernels() if k.name != "triton"], registry._kernels
    monkeypatch.setattr(registry, "_kernels", others)
    high = "high precision, kernel: there is none for cpu here with values in 16 bits"
    assert tahf4.lower(captured, options=asked).notes["attention"][0].endswith(high)
    monkeypatch.setattr(registry, "_kernels", [k for k in all_kernels if k.name != "cpu"])
    low = tahf4.lower(captured, options=asked)
    wanted = tahf4.lower(captured, options={**asked, "kernels": "reference"})(x)
    assert "2 x tahf4.attention_quantize -> triton" in low.report()
    assert float((low(x) - wanted).norm() / wanted.norm()) < 1e-2
