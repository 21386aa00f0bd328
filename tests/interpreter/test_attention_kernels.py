"""Attention in 8 bits in Triton's interpreter, against the reference operator."""

from __future__ import annotations

import pytest
import torch
from attention_parts import quantized
from tahf4_compiler.backends.triton import attention as kernels
from tahf4_compiler.backends.triton import run

import tahf4_compiler as tahf4
from tahf4_compiler.ops import registry

reference = torch.ops.tahf4.attention
SMALL = kernels.AttentionTile(32, 64, 4, 2)


def operands(rows=40, keys=150, channels=64, heads=2, shared=1, values=None, dtype=torch.float32, batch=1):
    """Return q, k and v as models make them: heads are split off the channels."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens, heads, width):
        drawn = torch.randn(batch, tokens, heads, width, generator=generator)
        return (drawn * torch.randint(1, 9, (width,), generator=generator)).to(dtype).transpose(1, 2)

    few = heads // shared
    return draw(rows, heads, channels), draw(keys, few, channels), draw(keys, few, values or channels)


def exact(*args, tile=SMALL, **kwargs):
    out, calls = kernels.calls(*args, tile=tile, exact=True, **kwargs)
    run(calls)
    return out


def assert_same(got, wanted):
    """Assert equal bits, but for the kind of NaN."""
    assert got.dtype == wanted.dtype and got.stride() == wanted.stride()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("rows", "keys", "channels", "values", "dtype"),
    [
        (1, 1, 64, 64, torch.float32),
        (33, 63, 128, 128, torch.bfloat16),
        (32, 64, 64, 64, torch.float16),
        (40, 129, 96, 24, torch.float32),
        (5, 200, 40, 130, torch.bfloat16),
        (5, 70, 256, 3, torch.float32),
    ],
)
def test_with_its_roundings_it_gives_the_bits_of_the_reference(rows, keys, channels, values, dtype):
    given = operands(rows, keys, channels, values=values, dtype=dtype)
    assert_same(exact(*given), reference(*given))


@pytest.mark.parametrize(
    ("rows", "keys", "channels", "dtype"),
    [(1, 1, 64, torch.float32), (33, 65, 128, torch.bfloat16), (9, 129, 96, torch.float32), (5, 70, 40, torch.float16)],
)
def test_with_queries_and_keys_in_hif4_too(rows, keys, channels, dtype):
    q, k, v = operands(rows, keys, channels, dtype=dtype, heads=4, shared=2)
    more = {"enable_gqa": True, "scale": 0.3, "bits": 4}
    assert_same(exact(q, k, v, **more), reference(q, k, v, **more))
    q[0, 1, 0, 5], k[0, 0, 0, 0] = torch.nan, torch.inf
    assert_same(exact(q, k, v, **more), reference(q, k, v, **more))
    got, wanted = (ops.attention_lse(q, k, v, **more)[1] for ops in (torch.ops.tahf4_triton, torch.ops.tahf4))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "keys", "channels", "values"), [(9, 130, 96, 24), (1, 1, 64, 130)])
def test_keys_and_values_that_come_quantized(bits, rows, keys, channels, values):
    q, k, v = operands(rows, keys, channels, values=values)
    v[0, 1, 0, 3] = torch.inf
    given = quantized(k, v, bits)
    out, calls = kernels.calls_of_codes(q, *given, 0.3, tile=SMALL, exact=True)
    run(calls)
    assert_same(out, torch.ops.tahf4.attention_of_codes(q, *given, 0.3))
    usual = torch.ops.tahf4_triton.attention_of_codes(q, *given, 0.3)
    assert error(usual.nan_to_num(), out.nan_to_num()) < 3e-4
    assert torch.ops.tahf4_triton.attention_of_codes(q[:, :, :0], *given).shape == (1, 2, 0, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_the_powers_of_the_chip_it_is_the_reference_but_for_bytes_at_a_border(dtype):
    """The polynomial of the reference has a relative error of 3e-6: of 255 the thousandth part of a byte. So one in
    some hundreds falls to the other side, which moves a row by a thousandth of what rounding all bytes does.
    """
    given = operands(dtype=dtype)
    got, wanted = torch.ops.tahf4_triton.attention(*given), reference(*given)
    assert got.dtype == dtype and got.stride() == wanted.stride()
    if dtype == torch.float32:
        assert 0 < error(got, wanted) < 3e-4  # 0: the powers are those of the reference
    else:
        assert error(got, wanted) < {torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


def test_masks_scales_and_shared_heads():
    given = operands(heads=4, shared=2, batch=2, rows=5, keys=130)
    added = torch.randn(2, 4, 5, 130, generator=torch.Generator().manual_seed(1))
    seen = added > -0.5
    seen[0, 1, 3], seen[:, 2, 4, 64:128], seen[0, 0, :, :64] = False, False, False
    assert_same(exact(*given, added, False, None, True), reference(*given, added, False, None, True))
    given = tuple(x[:, : x.shape[1] // 2] for x in given)
    for mask in (seen[:, :1], added[:1, :2, :1].bfloat16()):
        assert_same(exact(*given, mask, False, None, True), reference(*given, mask, False, None, True))
    given = tuple(x[:1] for x in given)
    for mask in (seen[:1, :2], seen[0, 0, 0], added[0, :2, :, :1]):
        assert_same(exact(*given, mask, False, None, True), reference(*given, mask, False, None, True))
    for scale in (-2.0, 0.0):
        assert_same(exact(*given, None, False, scale, True), reference(*given, None, False, scale, True))


@pytest.mark.parametrize(("rows", "keys"), [(40, 150), (150, 40), (70, 64)])
def test_a_causal_attention(rows, keys):
    given = operands(rows, keys, heads=1)
    assert_same(exact(*given, None, True), reference(*given, None, True))
    wide = kernels.AttentionTile(128, 64, 8, 2)  # taller than a block of keys
    assert_same(exact(*given, None, True, tile=wide), reference(*given, None, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_padding(dtype):
    given = operands(heads=1, dtype=dtype)
    mask = torch.zeros(40, 150, dtype=dtype)
    mask[3], mask[4, :70] = torch.finfo(dtype).min, torch.finfo(dtype).min
    mask[5], mask[6, :70] = torch.finfo(dtype).max, -torch.inf
    mask[7] = -torch.inf
    got = exact(*given, mask)
    assert_same(got, reference(*given, mask))
    assert not got[:, :, 7].any() and got[:, :, 3].any()
    usual = torch.ops.tahf4_triton.attention(*given, mask)
    assert not usual[:, :, 7].any() and error(usual, got) < 4e-3


def test_nan_and_infinities():
    q, k, v = operands()
    q[0, 0, 2, 5], q[0, 1, 39, 0], k[0, 0, 149, 0], v[0, 1, 149, 7] = torch.nan, torch.inf, torch.nan, -torch.inf
    mask = torch.zeros(40, 150)
    mask[8, 3], mask[9, 70], mask[10, 149], mask[11, 128:] = torch.inf, torch.nan, -torch.inf, -torch.inf
    for given in ((), (mask,), (None, True)):
        wanted = reference(q, k, v, *given)
        assert wanted.isnan().any() and not wanted.isnan().all()
        assert_same(exact(q, k, v, *given), wanted)
        assert torch.equal(torch.ops.tahf4_triton.attention(q, k, v, *given).isnan(), wanted.isnan())


@pytest.mark.parametrize("factor", [1e-20, 30.0, 1e18])
def test_large_and_small_values(factor):
    q, k, v = operands(rows=9, keys=90, heads=1)
    assert_same(exact(q * factor, k, v), reference(q * factor, k, v))
    assert_same(exact(q, k, v * factor), reference(q, k, v * factor))


def test_the_log_sum_exp():
    q, k, v = operands(heads=1, rows=7, keys=70, values=130)  # more channels than a program computes
    mask = torch.randn(7, 70, generator=torch.Generator().manual_seed(1))
    mask[3], mask[4, :64], mask[5, 69] = -torch.inf, -torch.inf, torch.nan
    for given in ((q, k, v, mask), (q, k[:, :, :0], v[:, :, :0]), (q, k, v[..., :0], None, True, 0.3)):
        out, lse = torch.ops.tahf4_triton.attention_lse(*given)
        wanted, wanted_lse = torch.ops.tahf4.attention_lse(*given)
        torch.testing.assert_close(out, wanted, atol=0.1, rtol=0, equal_nan=True)
        torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=0, equal_nan=True)


def test_memory_may_lie_in_any_way():
    q, k, v = (torch.cat([x, x], -1)[..., ::2] for x in operands(batch=2, rows=9, keys=70, heads=1))
    assert_same(exact(q, k, v), reference(q, k, v))
    assert_same(exact(q.contiguous(), k, v), reference(q.contiguous(), k, v))
    mask = (torch.rand(70, 9, generator=torch.Generator().manual_seed(2)) < 0.5).t()
    assert_same(exact(q, k, v, mask), reference(q, k, v, mask))
    v = v[:, :, :1].expand(-1, -1, 70, -1)
    assert_same(exact(q, k, v), reference(q, k, v))


def test_places_beyond_2_to_the_31():
    q, k, v = operands(rows=3, heads=1)
    step = (1 << 31) // 148  # so that the last tokens lie beyond; memory that nobody touches is not there
    far = torch.empty(149 * step + 64, dtype=torch.float16).as_strided((1, 1, 150, 64), (0, 0, step, 1)).copy_(v)
    q, k = q.half(), k.half()
    assert_same(exact(q, k, far), reference(q, k, far))
    added = torch.empty(149 * step + 3, dtype=torch.float16).as_strided((3, 150), (1, step)).copy_(torch.randn(3, 150))
    assert_same(exact(q, k, v.half(), added), reference(q, k, v.half(), added))


def test_nothing_to_do():
    q, k, v = operands()
    for given in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0]), (q, k, v[..., :0])):
        assert_same(torch.ops.tahf4_triton.attention(*given), reference(*given))


def test_what_does_not_fit_is_refused():
    q, k, v = operands(heads=4, shared=2)
    with pytest.raises(tahf4.FormatError, match="enable_gqa"):
        torch.ops.tahf4_triton.attention(q, k, v)


class Block(torch.nn.Module):
    def __init__(self, heads, channels):
        super().__init__()
        self.shape = (3, heads, channels)
        self.qkv, self.out = torch.nn.Linear(64, 3 * heads * channels), torch.nn.Linear(heads * channels, 64)

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, self.shape).unbind(-3))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("channels", "served"), [(64, True), (256, True), (257, False)])
def test_a_graph_runs_the_kernel_where_it_can(channels, served, tmp_path):
    model = torch.nn.Sequential(*(Block(1, channels) for _ in range(2))).requires_grad_(False)
    x = torch.randn(1, 20, 64)
    asked = {"attention": "int8", "attention.min_tokens": 16}
    captured = tahf4.capture(model, (x,))
    others = [k for k in registry.kernels() if k.name != "cpu"]
    with pytest.MonkeyPatch.context() as patch:  # as on a GPU
        patch.setattr(registry, "_kernels", others)
        low = tahf4.lower(captured, options={**asked, "dump_dir": str(tmp_path)})
    (note, _) = low.notes["attention"]
    assert note.startswith(f"0 (20 x 20 tokens, 1 heads of {channels}): ")
    assert ("tahf4_triton.attention" in str(low.graph_module.graph)) == served
    if not served:
        assert note.endswith("high precision, kernel: there is none for cpu here")
        return
    assert note.endswith("): int8") and "2 x tahf4.attention_quantize -> triton" in low.report()
    assert any("def attend(" in path.read_text() for path in tmp_path.glob("*/kernel_*.py"))
    if channels == 64:
        wanted = tahf4.lower(captured, options={**asked, "kernels": "reference"})(x)
        assert error(low(x), wanted) < 1e-2
