"""Products in the interpreter, on each path, against the reference operators."""

import json
import math

import pytest
import torch
from tahf4_compiler.backends.triton import linear, tiling

from tahf4_compiler.format import hif4

triton = torch.ops.tahf4_triton
reference = torch.ops.tahf4
GATE = "v0: float32 = mul(y, x0)\nv1: float32 = to(x1)\nv2: float32 = add(v1, v0)\nv3: bfloat16 = to(v2)"


@pytest.fixture(params=("packed", "int8", "bf16"))
def path(request, monkeypatch):
    monkeypatch.setenv("TAHF4_LINEAR_PATH", request.param)
    return request.param


def sides(lead, n, k):
    x, w = torch.randn(*lead, k), torch.randn(n, k)
    return (*reference.quantize(x), *reference.quantize(w))


def exact(codes, scales, weight_codes, weight_scales):
    k = scales.shape[-1] * 64
    left = hif4.dequantize(hif4.Packed(codes, scales, k), torch.float64)
    return left @ hif4.dequantize(hif4.Packed(weight_codes, weight_scales, k), torch.float64).t()


SHAPES = [((2, 9), 96, 192), ((5,), 130, 100), ((1,), 64, 1024), ((3, 23), 130, 128), ((), 10, 64)]


@pytest.mark.parametrize("lead, n, k", SHAPES)
def test_a_product_is_the_exact_one_but_for_the_order_of_the_sum(path, lead, n, k):
    operands = sides(lead, n, k)
    bias = torch.randn(n)
    got = triton.linear(*operands, bias, torch.float32)
    wanted = exact(*operands) + bias
    assert got.shape == (*lead, n)
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    rounded = triton.linear(*operands, None, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact(*operands)).norm() <= 2**-8 * exact(*operands).norm()


def test_nan_units_reach_their_rows_and_columns_only(path):
    codes, scales, weight_codes, weight_scales = sides((6,), 80, 192)
    scales[2, 1] = 0xFF
    weight_scales[7, 0] = 0xFF
    got = triton.linear(codes, scales, weight_codes, weight_scales, None, torch.float32)
    assert torch.equal(
        got.isnan(), reference.linear(codes, scales, weight_codes, weight_scales, None, torch.float32).isnan()
    )
    assert got.isnan().sum() == 80 + 6 - 1


def test_scales_at_both_ends_of_their_range(path):
    x = torch.randn(4, 128) * torch.tensor([1e-20, 1e4, 1.0, 1e-6])[:, None]
    w = torch.randn(70, 128) * 1e3
    operands = (*reference.quantize(x), *reference.quantize(w))
    got, wanted = triton.linear(*operands, None, torch.float32), exact(*operands)
    assert ((got - wanted).norm(dim=1) <= 1e-6 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("sizes", [[96], [64, 32], [50, 3, 43], [10, 20, 30, 36]])
def test_several_outputs(path, sizes):
    operands = sides((2, 9), 96, 192)
    bias = torch.randn(96)
    got = triton.fused_linear(*operands, bias, torch.float32, sizes, [], "", torch.float32)
    wanted = reference.fused_linear(*operands, bias, torch.float32, sizes, [], "", torch.float32)
    assert [g.shape for g in got] == [w.shape for w in wanted]
    assert all(g.is_contiguous() for g in got)
    for g, w in zip(got, wanted):
        assert torch.allclose(g, w, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("gate, rows", [("clip", 9), ("clip", 75), ("token", 75), ("channel", 9)])
def test_gate_and_residual(path, gate, rows):
    operands = sides((2, rows), 96, 192)
    shape = {"clip": (2, 1, 96), "token": (2, rows, 96), "channel": (96,)}[gate]
    inputs = [torch.randn(shape), torch.randn(2, rows, 96).to(torch.bfloat16)]
    args = (*operands, torch.randn(96).to(torch.bfloat16), torch.bfloat16, [96], inputs, GATE, torch.bfloat16)
    (got,), (wanted,) = triton.fused_linear(*args), reference.fused_linear(*args)
    # One sum in another order may round the product, then the result, to the next bfloat16.
    assert (got != wanted).sum() <= 0.01 * got.numel()
    assert torch.allclose(got.float(), wanted.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype, rank, rows", [(torch.float32, 24, 9), (torch.bfloat16, 8, 75)])
def test_a_branch_of_low_rank(path, dtype, rank, rows):
    operands, name = sides((2, rows), 96, 192), str(dtype)[6:]
    left, right = torch.randn(2, rows, 2 * rank).to(dtype)[..., :rank], torch.randn(rank, 96).to(dtype)
    program = f"v0: {name} = matmul(x0, x1)\nv1: {name} = add(y, v0)\nv2: float32 = mul(v1, x2)"
    args = (*operands, None, dtype, [96], [left, right, torch.randn(96)], program, torch.float32)
    (got,), (wanted,) = triton.fused_linear(*args), reference.fused_linear(*args)
    assert (got - wanted).norm() <= (1e-6 if dtype == torch.float32 else 2**-8) * wanted.norm()


@pytest.mark.parametrize(
    "lead, n, block", [*(((2, 9), 128, block) for block in (0, 16, 64, 128)), ((5,), 130, 64), ((1,), 256, 0)]
)
def test_product_gelu_quantize(path, lead, n, block):
    operands = sides(lead, n, 192)
    multiplier = torch.rand(n) + 0.5
    args = (*operands, torch.randn(n), torch.bfloat16, [], "v0: bfloat16 = gelu_tanh(y)", multiplier, block)
    got, wanted = (hif4.Packed(*f.linear_quantize(*args), n) for f in (triton, reference))
    a, b = hif4.dequantize(got), hif4.dequantize(wanted)
    print(f"{int((a != b).sum())} of {a.numel()} values differ")
    # A bfloat16 on the other side of a boundary changes its block of a rotation by a step at most.
    assert (a != b).sum() <= max(2 * block, 2) + 0.01 * a.numel()
    assert (a - b).norm() <= 0.05 * b.norm()


def test_the_split_along_k_adds_in_a_fixed_order():
    codes, scales, weight_codes, weight_scales = sides((3,), 128, 1024)
    results = []
    for split in (1, 7, 16):
        out, calls = linear.calls(
            codes, scales, weight_codes, weight_scales, None, torch.float32, [128], [], "", torch.float32,
            capability=None, processors=4, tile=tiling.Tile(16, 64, 4, 3, split),
        )  # fmt: skip
        for _ in range(2):
            for call in calls:
                call.run()
            results.append(out[0].clone())
        assert torch.equal(results[-1], results[-2])
    wanted = exact(codes, scales, weight_codes, weight_scales)
    assert all((r - wanted).norm() <= 1e-6 * wanted.norm() for r in results)


@pytest.mark.parametrize("processors, rows", [(132, 1), (132, 64), (4, 17), (132, 100)])
def test_default_tiles_compute_every_part_once(processors, rows, monkeypatch):
    monkeypatch.setenv("TAHF4_LINEAR_PATH", "packed")
    operands = sides((rows,), 100, 1280)
    out, calls = linear.calls(
        *operands, None, torch.float32, [100], [], "", torch.float32, capability=None, processors=processors
    )
    for call in calls:
        call.run()
    wanted = exact(*operands)
    assert (out[0] - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    "rows, capability, wanted",
    [
        (1, (9, 0), "packed"),
        *((4096, (major, 0), "int8") for major in (8, 9, 12)),
        *((4096, (major, 0), "bf16") for major in (10, 11)),
    ],
)
def test_the_path_follows_from_shape_and_architecture(rows, capability, wanted):
    assert tiling.choose_path(rows, capability) == wanted


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("TAHF4_LINEAR_PATH", "fp8")
    with pytest.raises(Exception, match="TAHF4_LINEAR_PATH is 'fp8'; expected one of packed, int8, bf16"):
        triton.linear(*sides((2,), 64, 64), None, torch.float32)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_rows(path, lead):
    codes = torch.empty(*lead, 32, dtype=torch.uint8)
    scales = torch.empty(*lead, 1, dtype=torch.int32)
    _, _, weight_codes, weight_scales = sides((2,), 64, 64)
    assert triton.linear(codes, scales, weight_codes, weight_scales, None, torch.float32).shape == (*lead, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead, k", [((2, 9), 192), ((5,), 100), ((), 64), ((0,), 64)])
def test_dequantize_is_exact(dtype, lead, k):
    codes, scales = reference.quantize(torch.randn(*lead, k))
    if math.prod(lead):
        scales.view(-1)[0] = 0xFF
    got, wanted = triton.dequantize(codes, scales, k, dtype), reference.dequantize(codes, scales, k, dtype)
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_the_measured_choice_is_what_runs(monkeypatch, tmp_path):
    """As on a GPU, with a clock that prefers the second candidate: another path must give the same numbers."""
    from tahf4_compiler.backends import triton as backend
    from tahf4_compiler.backends.triton import tune

    monkeypatch.setenv("TAHF4_KERNEL_DIR", str(tmp_path))
    tune._memory.cache_clear()
    timed = []

    def clock(function):
        function()
        timed.append(1)
        return 1.0 if len(timed) == 4 else 2.0

    monkeypatch.setattr(tune, "wanted", lambda device, rows: True)
    monkeypatch.setattr(tune, "_do_bench", clock)
    monkeypatch.setattr(backend, "_device_facts", lambda device: ((9, 0), 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a chip")
    operands = sides((192,), 128, 64)
    bias = torch.randn(128)
    got = triton.linear(*operands, bias, torch.float32)
    assert len(timed) == 7
    chosen = json.loads(next(tmp_path.glob("tuned_a_chip*.json")).read_text())
    assert [value[0] for value in chosen.values()] == ["bf16"]
    wanted = exact(*operands) + bias
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(triton.linear(*operands, bias, torch.float32), got) and len(timed) == 7
    args = (*operands, bias, torch.bfloat16, [], "v0: bfloat16 = silu(y)", None, 64)
    again = triton.linear_quantize(*args)
    assert again[0].shape == (192, 64) and len(timed) > 7
    tune._memory.cache_clear()


def test_bias_and_multiplier_may_be_strided():
    operands = sides((5,), 128, 64)
    for bias in (torch.arange(256.0)[::2], torch.tensor([2.0]).expand(128), torch.randn(128, 3)[:, 1]):
        got = triton.linear(*operands, bias, torch.float32)
        assert torch.allclose(got, reference.linear(*operands, bias, torch.float32), rtol=1e-5, atol=1e-4)
        got = triton.linear_quantize(*operands, None, torch.float32, [], "", bias + 1, 64)
        wanted = reference.linear_quantize(*operands, None, torch.float32, [], "", (bias + 1).contiguous(), 64)
        assert ((got[0] != wanted[0]).float().mean() < 0.01) and ((got[1] != wanted[1]).float().mean() < 0.01)
        x = torch.randn(3, 128)
        got, wanted = triton.quantize(x, bias, 64), reference.quantize(x, bias, 64)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_sizes_and_dtypes_that_do_not_fit_are_refused():
    from tahf4_compiler import FormatError

    operands = sides((2,), 64, 64)
    with pytest.raises(FormatError, match="expected their sum"):
        triton.fused_linear(*operands, None, torch.float32, [32], [], "", torch.float32)
    with pytest.raises(FormatError, match="result_dtype says"):
        triton.fused_linear(*operands, None, torch.float32, [64], [], "", torch.bfloat16)
