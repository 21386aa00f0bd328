"""Attention in 8 bits as an attention backend of diffusers, for ring context parallelism: it has a log-sum-exp."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from torch import Tensor

from .. import ops  # noqa: F401  (defines torch.ops.tahf4)
from ..errors import GradientError, OptionError

__all__ = ["NAME", "register"]

NAME = "tahf4"
_NEEDED = ("AttentionBackendName", "_AttentionBackendRegistry", "_templated_context_parallel_attention")
log = logging.getLogger(__name__)


def register() -> None:
    """Let ``model.set_attention_backend("tahf4")`` run every attention of a model in 8 bits."""
    if missing := [name for name in _NEEDED if not hasattr(dispatch, name)]:
        log.info("diffusers has no %s, so that it gets no attention backend %r", missing[0], NAME)
        return
    names = dispatch.AttentionBackendName
    member = str.__new__(names, NAME)  # diffusers knows its backends by an enumeration, which no API adds to
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member
    dispatch._AttentionBackendRegistry.register(member, supports_context_parallel=True)(_attention)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """Compute ``[B, tokens, heads, channels]``; diffusers calls it, perhaps on a part of the tokens."""
    if torch.is_autocast_enabled(query.device.type):  # as scaled_dot_product_attention does
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # of the keys of each entry, as in diffusers' other backends
    given = (query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, return_lse)
    if _parallel_config is None:
        return _forward(None, *given)
    if attn_mask is not None and _parallel_config.context_parallel_config.ring_degree > 1:
        raise OptionError("diffusers' ring gives every part of the keys the whole attn_mask; use ulysses_degree")
    return dispatch._templated_context_parallel_attention(
        *given, forward_op=_forward, backward_op=_backward, _parallel_config=_parallel_config
    )


def _forward(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, return_lse: bool, _save_ctx: bool = True, _parallel_config: Any = None,
) -> Any:  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if return_lse:
        out, lse = torch.ops.tahf4.attention_lse(q, k, v, mask, is_causal, scale, enable_gqa)
        return out.transpose(1, 2), lse.transpose(1, 2)
    return torch.ops.tahf4.attention(q, k, v, mask, is_causal, scale, enable_gqa).transpose(1, 2)


def _backward(ctx: Any, *gradients: Any) -> Any:
    raise GradientError("attention in 8 bits has no derivative; call the model under torch.no_grad()")
