"""The kernels that one block of Wan2.2 launches, at its real sizes and without its weights.

The programs are those that ``fuse`` and ``attention_prologue`` write for ``WanTransformerBlock`` of diffusers;
``tests/tools/test_kernels.py`` compares them with the graph of the tiny Wan2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.triton import attention, attention_fused, linear, quantize
from ...backends.triton.call import Call

__all__ = ["A14B", "NORM_ROTARY", "TI2V_5B", "Model", "Step", "attention_calls", "block_steps", "call_name"]

MODULATE = """v0: float32 = to(x0)
v1: float32 = layer_norm(v0, None, None, 1e-06)
v2: float32 = add(x1, 1)
v3: float32 = mul(v1, v2)
v4: float32 = add(v3, x2)
v5: bfloat16 = to(v4)"""
NORM = """v0: float32 = to(x0)
v1: float32 = layer_norm(v0, x1, x2, 1e-06)
v2: bfloat16 = to(v1)"""
GATE = """v0: float32 = mul(y, x0)
v1: float32 = to(x1)
v2: float32 = add(v1, v0)
v3: bfloat16 = to(v2)"""
GATE_FFN = """v0: float32 = to(y)
v1: float32 = mul(v0, x0)
v2: float32 = to(x1)
v3: float32 = add(v2, v1)
v4: bfloat16 = to(v3)"""
NORM_ROTARY = """v0: bfloat16 = rms_norm(x0, x1, 1e-06)
v1: bfloat16 = rotary(v0, x2, x3)"""
RESIDUAL = "v0: bfloat16 = add(x0, y)"
GELU = "v0: bfloat16 = gelu_tanh(y)"


@dataclass(frozen=True)
class Model:
    """Sizes of a Wan2.2 transformer.

    Attributes:
        name: of the checkpoint.
        dim: of the hidden states.
        ffn: of the feed-forward.
        heads: of attention.
        layers: blocks.
        text: tokens of the prompt.
        per_token: modulation for each token (TI2V) instead of each clip.
    """

    name: str
    dim: int
    ffn: int
    heads: int
    layers: int
    text: int = 512
    per_token: bool = False


A14B = Model("Wan2.2-A14B", 5120, 13824, 40, 40)
TI2V_5B = Model("Wan2.2-TI2V-5B", 3072, 14336, 24, 30, per_token=True)


@dataclass(frozen=True)
class Step:
    """One fused operator of a block.

    Attributes:
        name: where it stands.
        calls: makes its launches for a compute capability and a number of processors, on the meta device.
        rows: of the product or quantization.
        k: its inner size, or the width that is quantized.
        n: columns of a product, 0 for a quantization.
        linears: whose products are merged.
    """

    name: str
    calls: Callable[[tuple[int, int], int], list[Call]]
    rows: int
    k: int
    n: int
    linears: int = 1


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _float(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.float32)


def block_steps(model: Model, tokens: int, *, block: int = 64, span: int = 1) -> list[Step]:
    """Return the fused operators of one block, in order; attention cores and q/k norms are not among them.

    Args:
        model: whose block.
        tokens: of the video, for one clip.
        block: Hadamard block.
        span: units that share a level-1 scale, 0 for a row.
    """
    d, f = model.dim, model.ffn
    modulation = _float(1, tokens, 6, d) if model.per_token else _float(1, 6, d)

    def part(i: int) -> Tensor:
        return modulation[:, :, i] if model.per_token else modulation[:, i : i + 1]

    x = _empty(1, tokens, d)
    found: list[Step] = []

    def quantization(name: str, inputs: list[Tensor], program: str) -> None:
        rows, k = inputs[0].shape[-2], inputs[0].shape[-1]

        def calls(capability: tuple[int, int], processors: int) -> list[Call]:
            return quantize.call(inputs, program, _float(k), block, 4, span)[1]

        found.append(Step(name, calls, rows, k, 0))

    def product(
        name: str, rows: int, k: int, sizes: list[int], inputs: list[Tensor], program: str, to_codes: bool = False
    ) -> None:
        n = sum(sizes)

        def calls(capability: tuple[int, int], processors: int) -> list[Call]:
            codes, scales = _empty(1, rows, k // 2, dtype=torch.uint8), _empty(1, rows, k // 64, dtype=torch.int32)
            weight = _empty(n, k // 2, dtype=torch.uint8), _empty(n, k // 64, dtype=torch.int32)
            return linear.calls(
                codes, scales, *weight, _empty(n), torch.bfloat16, sizes, inputs, program,
                None if to_codes else torch.bfloat16, _float(n) if to_codes else None, block if to_codes else 0,
                span=span, capability=capability, processors=processors,
            )[1]  # fmt: skip

        found.append(Step(name, calls, rows, k, n, len(sizes)))

    quantization("norm1, modulation -> quantize", [x, part(1), part(0)], MODULATE)
    product("attn1 q, k, v", tokens, d, [d, d, d], [], "")
    quantization("attn1 output -> quantize", [x], "")
    product("attn1 out, gate, residual", tokens, d, [d], [part(2), x], GATE)
    quantization("norm2 -> quantize", [x, _float(d), _float(d)], NORM)
    product("attn2 q", tokens, d, [d], [], "")
    quantization("text -> quantize", [_empty(1, model.text, d)], "")
    product("attn2 k, v (text)", model.text, d, [d, d], [], "")
    quantization("attn2 output -> quantize", [x], "")
    product("attn2 out, residual", tokens, d, [d], [x], RESIDUAL)
    quantization("norm3, modulation -> quantize", [x, part(4), part(3)], MODULATE)
    if span == 1:
        product("ffn 1, GELU -> quantize", tokens, d, [f], [], GELU, to_codes=True)
    else:
        product("ffn 1, GELU", tokens, d, [f], [], GELU)
        quantization("ffn 1 output -> quantize", [_empty(1, tokens, f)], "")
    product("ffn 2, gate, residual", tokens, f, [d], [part(5), x], GATE_FFN)
    return found


def attention_calls(
    model: Model,
    tokens: int,
    value_bits: int = 8,
    capability: tuple[int, int] | None = None,
    programs: bool = False,
) -> list[Call]:
    """Return what the self-attention of a block launches in 8 bits, or with values in 16.

    Args:
        model: whose block.
        tokens: of the video.
        value_bits: of the values.
        capability: of the device.
        programs: whether norms and rotary embedding of q and k are drawn in, as ``attention_prologue`` does it.
    """
    width = model.dim // model.heads
    q, k, v = (_empty(1, tokens, model.heads, width).transpose(1, 2) for _ in range(3))
    if not programs:
        return attention.calls(q, k, v, value_bits=value_bits, capability=capability)[1]
    angle = _empty(1, tokens, width // 2, dtype=torch.float32)
    inputs = [_empty(1, tokens, model.dim), _empty(model.dim), angle, angle]
    operands = (inputs, NORM_ROTARY, inputs, NORM_ROTARY, v, model.heads)
    return attention_fused.calls_of_programs(*operands, value_bits=value_bits, capability=capability)[1]


def call_name(call: Call) -> str:
    """Return what a launch of a product or an attention is, for a table."""
    if "out" in call.arguments:
        return "to int8" if "out_scales" in call.arguments else "to bfloat16"
    return {"kernel": "product", "partial": "part of a product", "finish": "sum of the parts"}[call.name]
