"""A stand-in for ``comfy.ldm.wan.model.WanModel``: text to video, with ComfyUI's names and ``operations``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = (1, 2, 2)


class Attention(nn.Module):
    """``WanSelfAttention``, and ``WanT2VCrossAttention`` where it gets a context."""

    def __init__(self, dim: int, heads: int, ops: Any, **place: Any):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (ops.Linear(dim, dim, **place) for _ in range(4))
        self.norm_q = ops.RMSNorm(dim, eps=1e-6, elementwise_affine=True, **place)
        self.norm_k = ops.RMSNorm(dim, eps=1e-6, elementwise_affine=True, **place)

    def forward(self, x: Tensor, context: Tensor | None = None, freqs: Tensor | None = None) -> Tensor:
        other = x if context is None else context
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(other)), self.v(other)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        if freqs is not None:
            q, k = rotated(q, freqs), rotated(k, freqs)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """``WanAttentionBlock``."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, ops: Any, **place: Any):
        super().__init__()
        self.norm1 = ops.LayerNorm(dim, 1e-6, elementwise_affine=False, **place)
        self.self_attn = Attention(dim, heads, ops, **place)
        self.norm3 = ops.LayerNorm(dim, 1e-6, elementwise_affine=True, **place)
        self.cross_attn = Attention(dim, heads, ops, **place)
        self.norm2 = ops.LayerNorm(dim, 1e-6, elementwise_affine=False, **place)
        self.ffn = nn.Sequential(
            ops.Linear(dim, ffn_dim, **place), nn.GELU(approximate="tanh"), ops.Linear(ffn_dim, dim, **place)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim, **place))

    def forward(self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor) -> Tensor:
        e0, e1, e2, e3, e4, e5 = (self.modulation.to(x.dtype) + e).chunk(6, dim=1)
        x = x + self.self_attn(self.norm1(x) * (1 + e1) + e0, freqs=freqs) * e2
        x = x + self.cross_attn(self.norm3(x), context)
        return x + self.ffn(self.norm2(x) * (1 + e4) + e3) * e5


class Head(nn.Module):
    """``Head``."""

    def __init__(self, dim: int, out_dim: int, ops: Any, **place: Any):
        super().__init__()
        self.norm = ops.LayerNorm(dim, 1e-6, elementwise_affine=False, **place)
        self.head = ops.Linear(dim, out_dim * 4, **place)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim, **place))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation.to(x.dtype) + e.unsqueeze(1)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class WanModel(nn.Module):
    """``WanModel``; what stands here is the whole model of text to video."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        num_layers: int,
        in_dim: int,
        out_dim: int,
        freq_dim: int,
        text_dim: int,
        device: Any = None,
        dtype: Any = None,
        operations: Any = None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.dtype, self.dim, self.out_dim, self.freq_dim, self.num_heads = dtype, dim, out_dim, freq_dim, num_heads
        self.patch_embedding = operations.Conv3d(
            in_dim, dim, kernel_size=PATCH, stride=PATCH, device=device, dtype=torch.float32
        )
        self.text_embedding = nn.Sequential(
            operations.Linear(text_dim, dim, **place), nn.GELU(approximate="tanh"), operations.Linear(dim, dim, **place)
        )
        self.time_embedding = nn.Sequential(
            operations.Linear(freq_dim, dim, **place), nn.SiLU(), operations.Linear(dim, dim, **place)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(dim, dim * 6, **place))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, num_heads, operations, **place) for _ in range(num_layers))
        self.head = Head(dim, out_dim, operations, **place)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: Any = None) -> Tensor:
        size = x.shape[2:]
        x = self.patch_embedding(x.float()).to(x.dtype)
        grid = x.shape[2:]
        options = transformer_options if transformer_options is not None else {}
        options["grid_sizes"], options["total_blocks"] = grid, len(self.blocks)
        x = x.flatten(2).transpose(1, 2)
        e = self.time_embedding(sinusoidal(self.freq_dim, timestep).to(x.dtype))
        e0 = self.time_projection(e).unflatten(1, (6, self.dim))
        context = self.text_embedding(context)
        freqs = angles(grid, self.dim // self.num_heads)
        replaced = options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.blocks):
            options["block_index"] = i
            if ("double_block", i) in replaced:
                x = replaced["double_block", i]({"img": x})["img"]
            else:
                x = block(x, e0, freqs, context)
        out = self.head(x, e).view(-1, *grid, *PATCH, self.out_dim)
        return torch.einsum("bfhwpqrc->bcfphqwr", out).reshape(-1, self.out_dim, *size)


def sinusoidal(dim: int, position: Tensor) -> Tensor:
    """``sinusoidal_embedding_1d``."""
    half = dim // 2
    angle = torch.outer(position.float(), torch.pow(10000, -torch.arange(half, dtype=torch.float32) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def angles(grid: Any, head: int) -> Tensor:
    """``rope_encode``, as angles ``[tokens, head / 2]``."""
    sizes = [head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6)]
    ids = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    steps = [10000.0 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n) for n in sizes]
    return torch.cat([torch.outer(ids[:, i], step) for i, step in enumerate(steps)], dim=1)


def rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """``apply_rope1``."""
    cos, sin = freqs.cos().float(), freqs.sin().float()
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
