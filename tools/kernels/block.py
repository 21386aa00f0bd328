"""A block of Wan2.2 in plain PyTorch: the same computation as ``WanTransformerBlock`` of diffusers, without it.

Used where diffusers is not installed (``tools/gpu_check.py``); ``tests/tools/test_gpu_check.py`` compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Attention", "WanBlock"]


class Attention(nn.Module):
    """Self- or cross-attention with a norm over all of q and of k.

    Args:
        dim: of the hidden states.
        heads: of attention.
        core: False leaves the attention core out (v for queries of the same length, q otherwise), to time the rest.
    """

    def __init__(self, dim: int, heads: int, core: bool = True) -> None:
        """Make the projections."""
        super().__init__()
        self.heads, self.core = heads, core
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return ``[B, T, dim]``; ``rotary`` holds cosines and sines ``[1, T, 1, dim / heads / 2]``."""
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, v))
        if rotary is not None:
            q, k = (_rotated(t, *rotary) for t in (q, k))
        if self.core:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            out = v + q + k if v.shape == q.shape else q + k.mean(1, keepdim=True) + v.mean(1, keepdim=True)
        return self.to_out[1](self.to_out[0](out.flatten(2, 3).type_as(q)))


def _rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).type_as(t)


class _Activation(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class WanBlock(nn.Module):
    """One block: modulated self-attention, cross-attention, modulated feed-forward.

    Args:
        dim: of the hidden states.
        ffn: of the feed-forward.
        heads: of attention.
        core: whether the attention cores are computed.
    """

    def __init__(self, dim: int, ffn: int, heads: int, core: bool = True) -> None:
        """Make the layers; norms and the modulation table stay in float32 when the linears are cast."""
        super().__init__()
        self.attn1, self.attn2 = Attention(dim, heads, core), Attention(dim, heads, core)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Module()
        self.ffn.net = nn.ModuleList([_Activation(dim, ffn), nn.Identity(), nn.Linear(ffn, dim)])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def cast(self, dtype: torch.dtype) -> WanBlock:
        """Cast what diffusers casts: all but ``norm2`` and the table."""
        table, norm = self.scale_shift_table.data, self.norm2
        self.to(dtype)
        self.scale_shift_table.data = table
        self.norm2 = norm.to(torch.float32)
        return self

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return ``[B, T, dim]`` for text ``[B, S, dim]`` and modulation ``temb`` ``[B, 6, dim]``."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        h = (self.norm1(x.float()) * (1 + scale) + shift).type_as(x)
        x = (x.float() + self.attn1(h, h, rotary) * gate).type_as(x)
        h = self.norm2(x.float()).type_as(x)
        x = x + self.attn2(h, text)
        h = (self.norm3(x.float()) * (1 + ffn_scale) + ffn_shift).type_as(x)
        for layer in self.ffn.net:  # type: ignore[union-attr]
            h = layer(h)
        return (x.float() + h.float() * ffn_gate).type_as(x)


def rotary_of(tokens: int, head: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[1, T, 1, head / 2]`` of a one-axis rotary embedding."""
    frequency = 10000.0 ** (-torch.arange(0, head, 2, device=device, dtype=torch.float32) / head)
    angle = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos()[None, :, None], angle.sin()[None, :, None]
