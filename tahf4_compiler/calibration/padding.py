"""Tokens that stand in a batch only to fill it up: an attention mask hides them, and nobody reads what becomes of them.

They are no part of what a calibration has to know: their activations would count as much as those of real tokens, and
so would their share of the output's error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["kept_tokens", "token_mask"]

_MASK = "attention_mask"
_ABOUT_TOKENS = ("token_type_ids", "position_ids")


def token_mask(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens a call of a model reads: bool ``[batch, tokens]``; None if all, or if that cannot be told.

    It can be told where the model reads one sequence: the call has an ``attention_mask`` of ones and zeros, as
    transformers' encoders and language models take it, and one other tensor ``[batch, tokens, ...]``. What a decoder
    reads, or images, may be as many tokens, and its mask is another one.
    """
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
        several = [p.name for p in bound.signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        given = {**bound.arguments, **(bound.arguments.get(several[0], {}) if several else {})}
    except (TypeError, ValueError):  # the call itself says what is wrong
        given = dict(kwargs)
    mask = given.pop(_MASK, None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] == mask.shape[1]:
        return None  # of pairs of tokens; or the axes may stand the other way round
    others = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 1}
    read = [name for name in others if name not in _ABOUT_TOKENS]
    one = len(read) == 1 and all(value.shape[:2] == mask.shape for value in others.values())
    if not one or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    kept = mask != 0
    binary = mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())
    return kept if binary and bool(kept.any()) and not bool(kept.all()) else None


def kept_tokens(mask: Tensor | None, value: Tensor) -> Tensor | None:
    """Return which tokens of a tensor count: the mask if it fits ``[batch, tokens, channels]``, or None for all."""
    fits = mask is not None and value.dim() == 3 and value.shape[:2] == mask.shape
    return mask.to(value.device) if fits and mask is not None else None
