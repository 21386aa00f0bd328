"""Attention in 8 bits as attention backends of diffusers, also where ranks divide the tokens (context parallelism).

In ring each rank has some of the tokens. diffusers gathers keys and values as they are, computes an attention with
each part of them, and merges the results. Here they are gathered quantized, and one attention goes through all.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from torch import Tensor

from .. import ops  # noqa: F401  (defines torch.ops.tahf4)
from ..errors import GradientError, OptionError
from ..format.hif4 import units
from ..ops.attention_codes import key_codes, value_codes, value_maxima

__all__ = ["NAMES", "register"]

NAMES = {"tahf4": 8, "tahf4_hif4": 4}
"""Of backends -> bits of queries and keys: int8, or HiF4."""

_NEEDED = ("AttentionBackendName", "_AttentionBackendRegistry", "_templated_context_parallel_attention")
log = logging.getLogger(__name__)


def register() -> None:
    """Let ``model.set_attention_backend("tahf4")`` run every attention of a model in 8 bits.

    With ``"tahf4_hif4"`` its queries and keys are in HiF4. The environment variable ``DIFFUSERS_ATTN_BACKEND`` of
    diffusers may name them, too.
    """
    if missing := [name for name in _NEEDED if not hasattr(dispatch, name)]:
        log.info("diffusers has no %s, so that it gets no attention backend of tahf4", missing[0])
        return
    names = dispatch.AttentionBackendName
    for name, bits in NAMES.items():
        member = str.__new__(names, name)  # diffusers knows its backends by an enumeration, which no API adds to
        member._name_, member._value_ = name.upper(), name
        names._member_map_[member._name_] = names._value2member_map_[name] = member
        taken = dispatch._AttentionBackendRegistry.register(member, supports_context_parallel=True)
        taken(functools.partial(_attention, bits=bits))
    if (first := os.environ.get("DIFFUSERS_ATTN_BACKEND", "")).startswith("tahf4"):
        dispatch._AttentionBackendRegistry.set_active_backend(names(first))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
    *,
    bits: int,
) -> Any:
    """Compute ``[B, tokens, heads, channels]``; diffusers calls it, perhaps on a part of the tokens."""
    if dropout_p:
        raise OptionError(f"attention in 8 bits got dropout_p={dropout_p}; expected 0: call the model in eval()")
    if torch.is_autocast_enabled(query.device.type):  # as scaled_dot_product_attention does
        query, key, value = (_as_in_autocast(x) for x in (query, key, value))
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # of the keys of each entry, as in diffusers' other backends
    given = (query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, return_lse)
    forward = functools.partial(_forward, bits=bits)
    if _parallel_config is None:
        return forward(None, *given)
    config = _parallel_config.context_parallel_config
    if attn_mask is not None and config.ring_degree > 1:
        raise OptionError("diffusers' ring gives every part of the keys the whole attn_mask; use ulysses_degree")
    if config.ring_degree > 1 and not (config.ulysses_degree > 1 or config.ring_anything or is_causal or return_lse):
        return _gathered(query, key, value, scale, bits, config)
    return dispatch._templated_context_parallel_attention(
        *given, forward_op=forward, backward_op=_backward, _parallel_config=_parallel_config
    )


def _as_in_autocast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def _gathered(query: Tensor, key: Tensor, value: Tensor, scale: float | None, bits: int, config: Any) -> Tensor:
    """Compute the attention of a rank's queries with the keys and values of all ranks, which send them quantized.

    Each rank has as many tokens ``[B, tokens, heads, channels]``, in the order of the ranks.
    """
    from ..torch_private.collectives import largest_of_ranks  # there are builds of PyTorch without torch.distributed

    if query.shape[2] != key.shape[2]:
        raise OptionError(
            f"attention in ring got {query.shape[2]} heads of queries and {key.shape[2]} of keys and values; expected "
            "as many: repeat the heads of keys and values (repeat_interleave), or call the model without ring_degree"
        )
    group, ranks = config._ring_mesh.get_group(), config.ring_degree
    if not torch.compiler.is_compiling():  # what is found could not raise in a graph
        _check_even(key, group)
    first, all_tokens = config._ring_local_rank * key.shape[1], ranks * key.shape[1]
    # A scale of values is for 64 tokens, which several ranks may have.
    most = largest_of_ranks(value_maxima(value, first, units(all_tokens)), group)
    v_codes, v_scales = value_codes(value, first, most)
    k_codes, k_scales = key_codes(key, bits)
    k_codes, v_codes, k_scales = _all_gathered((k_codes, v_codes, k_scales), ranks, group)
    operands = (x.transpose(1, 2) for x in (query, k_codes, v_codes, k_scales, v_scales))
    return torch.ops.tahf4.attention_of_codes(*operands, scale).transpose(1, 2)


def _check_even(key: Tensor, group: Any) -> None:
    """Raise :class:`OptionError` on every rank unless all of them have as many tokens."""
    from ..torch_private.collectives import largest_of_ranks

    tokens = key.shape[1]
    both = torch.tensor([tokens, -tokens], dtype=torch.int64, device=key.device)
    most, least = largest_of_ranks(both, group).tolist()
    if most != -least:
        raise OptionError(
            f"attention in ring got {tokens} tokens on this rank, and {-least} to {most} on all; expected as many on "
            "each: pad the tokens to a multiple of the ranks, or give ContextParallelConfig ring_anything=True"
        )


def _all_gathered(parts: Sequence[Tensor], ranks: int, group: Any) -> list[Tensor]:
    """Return tensors ``[B, tokens, ..]`` with the tokens of all ranks, which are sent at once."""
    from ..torch_private.collectives import gathered_of_ranks

    flat = [part.contiguous().view(torch.uint8).flatten() for part in parts]
    found = gathered_of_ranks(torch.cat(flat), group).view(ranks, -1)
    pieces = zip(parts, found.split([len(x) for x in flat], 1), strict=True)
    whole = (piece.contiguous().view(part.dtype).view(ranks, *part.shape) for part, piece in pieces)
    return [x.transpose(0, 1).flatten(1, 2) for x in whole]


def _forward(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, return_lse: bool, _save_ctx: bool = True, _parallel_config: Any = None,
    *, bits: int,
) -> Any:  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if return_lse:
        out, lse = torch.ops.tahf4.attention_lse(q, k, v, mask, is_causal, scale, enable_gqa, bits)
        return out.transpose(1, 2), lse.transpose(1, 2)
    return torch.ops.tahf4.attention(q, k, v, mask, is_causal, scale, enable_gqa, bits).transpose(1, 2)


def _backward(ctx: Any, *gradients: Any) -> Any:
    raise GradientError("attention in 8 bits has no derivative; call the model under torch.no_grad()")
