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

__all__ = ["kept_tokens", "token_masks"]

_NAMES = ("attention_mask", "hidden_states_mask")
"""Ends of the names under which diffusers and transformers pass such masks."""


def token_masks(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return which tokens a call of a model reads: bool ``[batch, tokens]`` for each attention mask that hides some.

    Masks of pairs of tokens, and masks that are added to scores, say nothing here.
    """
    try:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself says what is wrong
        given = dict(kwargs)
    found = [value for name, value in {**given, **given.get("kwargs", {})}.items() if name.endswith(_NAMES)]
    masks = [value != 0 for value in found if isinstance(value, Tensor) and value.dim() == 2 and _is_binary(value)]
    return [mask for mask in masks if bool(mask.any()) and not bool(mask.all())]


def _is_binary(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())


def kept_tokens(masks: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
    """Return which rows of a tensor are tokens that count: bool ``[batch, tokens]``, or None if all do.

    Args:
        masks: of the call.
        shape: of the tensor without its last axis: ``(batch, tokens)``, or all tokens in one axis.
    """
    fits = [m for m in masks if tuple(shape) in (tuple(m.shape), (m.numel(),))]
    # Two masks of one shape that differ: which of them it is cannot be told.
    return fits[0] if fits and all(torch.equal(fits[0], other) for other in fits[1:]) else None
