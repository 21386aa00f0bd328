"""``torch.ops.nvfp4``: quantize and linear in NVFP4, with fake kernels and a reference.

A value is ``e2m1 * e4m3 * scale``: 4 bits each, one E4M3 byte for 16 values along K, one float32 for each row.
(NVIDIA has one float32 for a whole tensor. Here a token's result must not depend on other tokens, so each
row has its own.) Source: "Pretraining Large Language Models with NVFP4", arXiv 2509.25149.

The rule, for a row in float32 (other dtypes are rounded to it first):

1. The row's scale is the float32 nearest to ``amax(row) / (448 * 6)``, and at least 2**-126.
2. A block's scale is the E4M3 value nearest to ``amax(block) / (6 * scale)``, and at most 448.
3. A code is the E2M1 value nearest to ``x / (e4m3 * scale)``, and at most 6.

Nearest is meant exactly, with the scales as they are stored; a tie goes to the even code. Quotients in float64 decide
that without an error, since an operand has 24 bits and a divisor 30. Rounding in another order (in float32, or with a
scale that is not yet rounded when it divides) gives the neighbouring value where two are as good as equally near. With
bfloat16 inputs that is common, and as much as a fifth of the maximum.
"""

import torch
from torch import Tensor

import tahf4_compiler as tahf4

BLOCK = 16
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Halfway between values. A tie goes to the even code."""


def pack(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 ``[..., K' / 2]``, block scales uint8 ``[..., K' / 16]``, row scales float32 ``[..., 1]``."""
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[-1] % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    row = (amax.amax(-1, keepdim=True) / (448.0 * 6.0)).clamp_min(2.0**-126)
    scales = e4m3(amax.to(torch.float64) / (6.0 * row.to(torch.float64)))
    step = scales.to(torch.float64) * row
    scaled = (blocks / torch.where(step > 0, step, torch.inf)[..., None]).flatten(-2)
    edges = torch.tensor(EDGES, device=x.device, dtype=torch.float64)  # made here: it must be fake where x is
    above, at_or_above = (scaled.abs()[..., None] > edges).sum(-1), (scaled.abs()[..., None] >= edges).sum(-1)
    magnitude = torch.where(at_or_above % 2 == 0, at_or_above, above)
    code = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    return code[..., 0::2] | (code[..., 1::2] << 4), scales.view(torch.uint8), row


def e4m3(x: Tensor) -> Tensor:
    """Round float64 that is not negative to E4M3, ties to even; PyTorch's own cast goes through float32."""
    unit = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 1).clamp_min(-6) - 3)
    return (torch.round(x / unit) * unit).clamp_max(448.0).to(torch.float8_e4m3fn)


def unpack(codes: Tensor, scales: Tensor, row: Tensor) -> Tensor:
    """Return float32 ``[..., K']``."""
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int64)
    values = torch.tensor(VALUES, device=codes.device)[nibbles & 7] * torch.where(nibbles >= 8, -1.0, 1.0)
    step = scales.view(torch.float8_e4m3fn).to(torch.float32) * row
    return (values.unflatten(-1, (-1, BLOCK)) * step[..., None]).flatten(-2)


@torch.library.custom_op("nvfp4::quantize", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert an activation along its last axis; see :func:`pack`."""
    return pack(x)


@quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (x.shape[-1] + BLOCK - 1) // BLOCK
    leading = x.shape[:-1]
    return (
        x.new_empty((*leading, blocks * BLOCK // 2), dtype=torch.uint8),
        x.new_empty((*leading, blocks), dtype=torch.uint8),
        x.new_empty((*leading, 1), dtype=torch.float32),
    )


@torch.library.custom_op("nvfp4::linear", mutates_args=())
def linear(
    codes: Tensor, scales: Tensor, row: Tensor, w_codes: Tensor, w_scales: Tensor, w_row: Tensor,
    bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Multiply two packed operands in float32."""
    out = torch.nn.functional.linear(unpack(codes, scales, row), unpack(w_codes, w_scales, w_row))
    return (out if bias is None else out + bias.to(torch.float32)).to(out_dtype)


@linear.register_fake
def _(codes, scales, row, w_codes, w_scales, w_row, bias, out_dtype):
    return codes.new_empty((*codes.shape[:-1], w_codes.shape[0]), dtype=out_dtype)


def pack_weight(weight: Tensor, multiplier: Tensor | None, hadamard_block: int) -> dict[str, Tensor]:
    """Pack a weight ``[N, K]``; this format's pass asks for no transform."""
    return dict(zip(("codes", "block_scales", "row_scales"), pack(weight)))


tahf4.register_weight_format("nvfp4", pack_weight)
