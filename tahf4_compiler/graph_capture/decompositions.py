"""Fused inference operators of PyTorch, written out so that their linears are visible.

``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call one native operator for a whole layer when
gradients are off. In the language of this compiler a linear is an ``aten.linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["DECOMPOSITIONS"]


def _attention_mask(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """Return an additive or boolean mask for scaled_dot_product_attention, ``[B or 1, H or 1, L, L]``.

    The native operator's masks are boolean with True for "leave out", or additive. Type 0 is ``[L, L]``,
    1 (padding) is ``[B, L]``, 2 is both merged, ``[B, H, L, L]``.
    """
    if mask is None:
        return None
    keep = ~mask if mask.dtype == torch.bool else mask
    if mask_type == 1:
        return keep[:, None, None, :]
    return keep[None, None] if keep.dim() == 2 else keep


def _self_attention(
    x: Tensor,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:
    qkv = functional.linear(x, qkv_weight, qkv_bias)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=_attention_mask(mask, mask_type))
    return functional.linear(attended.transpose(1, 2).flatten(-2), out_weight, out_bias)


def _transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        return _self_attention(x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = functional.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = functional.gelu(hidden) if use_gelu else functional.relu(hidden)
        return functional.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return src + feed_forward(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(src + feed_forward(src), norm_weight_2, norm_bias_2)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    if need_weights or query is not key or key is not value:
        return NotImplemented  # the attention weights are a result: leave the operator whole
    out = _self_attention(query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    return out, query.new_empty(0)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._transformer_encoder_layer_fwd.default: _transformer_encoder_layer,
    torch.ops.aten._native_multi_head_attention.default: _multi_head_attention,
}
"""Operator -> the same in ``aten.linear``, ``aten.layer_norm`` and ``aten.scaled_dot_product_attention``."""
