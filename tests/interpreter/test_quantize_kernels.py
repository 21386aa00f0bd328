"""Quantizing kernels in the interpreter, against the reference operators."""

import pytest
import torch

from tahf4_compiler.format import hif4
from tahf4_compiler.ops.program import Program

triton = torch.ops.tahf4_triton
reference = torch.ops.tahf4

MODULATE = """v0: float32 = to(x0)
v1: float32 = layer_norm(v0, None, None, 1e-06)
v2: float32 = add(x1, 1)
v3: float32 = mul(v1, v2)
v4: float32 = add(v3, x2)
v5: {dtype} = to(v4)"""


def awkward(*shape, dtype=torch.float32):
    """Values of every size, with units of NaN, infinity and zeros."""
    x = torch.randn(*shape) * torch.randn(*shape[:-1], 1).exp()
    rows = x.view(-1, shape[-1])
    specials = [float("nan"), float("inf"), -float("inf"), -0.0]
    for i, value in enumerate(specials[: len(rows)]):
        rows[i, (7 * i) % shape[-1]] = value
    if len(rows) > 6:
        rows[4] = 0.0
        rows[5] *= 1e-3 if dtype == torch.float16 else 1e20
        rows[6] *= 1e-4 if dtype == torch.float16 else 1e-30
    return x.to(dtype)


def same(got, wanted):
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


BLOCKS = [(256, 0), (256, 64), (256, 256), (192, 16), (100, 64), (100, 128), (1, 0), (33, 2)]


@pytest.mark.parametrize(  # what is loaded and how it is rotated are apart in a kernel
    ("k", "block", "dtype"),
    [
        *((*block, torch.float32) for block in BLOCKS),
        *((*block, dtype) for block in ((256, 0), (100, 64)) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_codes_and_scales_are_bit_for_bit_those_of_the_reference(dtype, k, block, masked):
    x = awkward(3, 5, k, dtype=dtype)
    multiplier = torch.randn(k).exp() if masked else None
    same(triton.quantize(x, multiplier, block), reference.quantize(x, multiplier, block))


@pytest.mark.parametrize("view", ["transposed rows", "transposed columns", "every other", "expanded", "four axes"])
def test_any_strides(view):
    x = {
        "transposed rows": lambda: awkward(5, 3, 128).transpose(0, 1),
        "transposed columns": lambda: awkward(128, 7).t(),
        "every other": lambda: awkward(4, 256)[:, ::2],
        "expanded": lambda: awkward(1, 1, 128).expand(2, 3, 128),
        "four axes": lambda: awkward(2, 3, 2, 128).permute(2, 0, 1, 3),
    }[view]()
    same(triton.quantize(x, None, 64), reference.quantize(x, None, 64))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0), (64,)])
def test_no_rows_no_columns_and_a_vector(shape):
    x = torch.randn(*shape)
    same(triton.quantize(x), reference.quantize(x))


def test_many_rows_fill_several_blocks_of_threads():
    x = torch.randn(150, 128, dtype=torch.bfloat16)  # 300 units: a block has 128
    same(triton.quantize(x, None, 64), reference.quantize(x, None, 64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("where", ["channel", "clip", "token", "all"])
def test_pointwise_programs_are_exact(dtype, where):
    """A product and a sum round as PyTorch's do, whatever they broadcast."""
    text = f"v0: float32 = add(x1, 1)\nv1: float32 = mul(x0, v0)\nv2: float32 = add(v1, x2)\nv3: {dtype} = to(v2)"
    x = awkward(2, 9, 192, dtype=torch.bfloat16)
    table = torch.randn(2, 9, 6, 192)
    shapes = {
        "channel": [table[0, 0, 1], table[0, 0, 2]],
        "clip": [table[:, :1, 1], table[:, :1, 2]],
        "token": [table[:, :, 1], table[:, :, 2]],
        "all": [table[:, :, 1, :1], table[:1, :1, 2, :1]],
    }[where]
    multiplier = torch.rand(192) + 0.5
    args = ([x, *shapes], text, multiplier, 64)
    same(triton.fused_quantize(*args), reference.fused_quantize(*args))


def near(text, inputs, tolerance, share):
    """Codes may differ where the value lies within ``tolerance`` (relative) of a boundary, and nowhere else."""
    got = hif4.Packed(*triton.fused_quantize(inputs, text, None, 0), inputs[0].shape[-1])
    wanted = hif4.Packed(*reference.fused_quantize(inputs, text, None, 0), inputs[0].shape[-1])
    x = Program.parse(text).run({f"x{i}": v for i, v in enumerate(inputs)}, "x0").float()
    room = [hif4.quantize(x * factor) for factor in (1 - tolerance, 1 + tolerance)]
    a, b = hif4.dequantize(got), hif4.dequantize(wanted)
    differ = a != b
    print(f"{int(differ.sum())} of {differ.numel()} values differ")
    assert differ.sum() <= share * differ.numel()
    low, high = (hif4.dequantize(packed) for packed in room)
    edges = torch.stack([low, high, b])
    step = (a - b).abs() <= (edges.amax(0) - edges.amin(0)).abs() * (1 + 1e-6)
    # A unit whose level-1 scale is at a boundary moves as a whole.
    metadata = torch.stack([room[0].scales, room[1].scales])
    moved = (got.scales != wanted.scales) & (metadata == got.scales).any(0)
    moved = moved.repeat_interleave(64, -1)[..., : a.shape[-1]]
    assert (step | moved)[differ].all()
    assert (got.scales == wanted.scales)[~(metadata == got.scales).any(0)].all()


@pytest.mark.parametrize("k", [192, 100, 320, 1152])
def test_layer_norm_with_modulation(k):
    x = (torch.randn(2, 2, k) * 3 + 1).to(torch.bfloat16)
    table = torch.randn(2, 6, k)
    near(MODULATE.format(dtype="float32"), [x, table[:, 1:2], table[:, 2:3]], 1e-5, 1e-3)
    near(MODULATE.format(dtype="bfloat16"), [x, table[:, 1:2], table[:, 2:3]], 2**-7, 1e-3)


@pytest.mark.parametrize(
    "text, count",
    [
        ("v0: float32 = layer_norm(x0, x1, x2, 1e-05)", 3),
        ("v0: float32 = layer_norm(x0, x1, None, 1e-05)", 2),
        ("v0: float32 = rms_norm(x0, x1, 1e-06)", 2),
        ("v0: float32 = rms_norm(x0, None, 1e-06)\nv1: float32 = silu(v0)", 1),
        ("v0: float32 = square(x0)\nv1: float32 = mean(v0)\nv2: float32 = add(v1, 1e-06)\n"
         "v3: float32 = rsqrt(v2)\nv4: float32 = mul(x0, v3)\nv5: float32 = mul(v4, x1)", 2),
        ("v0: float32 = gelu(x0)", 1),
        ("v0: float32 = gelu_tanh(x0)", 1),
        ("v0: float32 = silu(x0)\nv1: float32 = mul(v0, x1)", 2),
        ("v0: float32 = sigmoid(x0)", 1),
        ("v0: float32 = relu(x0)\nv1: float32 = neg(v0)\nv2: float32 = sub(v1, x1)\nv3: float32 = abs(v2)", 2),
        ("v0: float32 = exp(x0)\nv1: float32 = div(v0, 3)\nv2: float32 = sqrt(v1)", 1),
    ],
)  # fmt: skip
def test_functions(text, count):
    near(text, [torch.randn(2, 7, 256), *(torch.rand(256) + 0.5 for _ in range(count - 1))], 1e-5, 1e-2)


def test_a_norm_far_from_zero_keeps_its_digits():
    """Mean and spread come from one pass; a sum of squares would lose all of this."""
    x = 1000 + torch.randn(4, 512)
    near("v0: float32 = layer_norm(x0, None, None, 1e-06)", [x], 1e-4, 0.02)


@pytest.mark.parametrize("text", ["v0: float32 = layer_norm(x0, None, None, 1e-06)", "v0: float32 = silu(x0)"])
def test_nan_and_infinity_pass_through_programs(text):
    x = torch.randn(4, 128)
    x[0, 3], x[1, 70] = float("nan"), float("inf")
    got, wanted = triton.fused_quantize([x], text, None, 0), reference.fused_quantize([x], text, None, 0)
    assert torch.equal(got[1] == 0xFF, wanted[1] == 0xFF)


def test_the_reference_refuses_what_the_kernel_refuses():
    with pytest.raises(Exception, match="multiplier of shape"):
        triton.quantize(torch.randn(2, 64), torch.ones(3), 0)
    with pytest.raises(Exception, match="hadamard_block"):
        triton.quantize(torch.randn(2, 64), None, 48)
