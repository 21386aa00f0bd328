"""Which attentions of a packed model stay in high precision: its linears carry that, in memory and in folders."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..model.attachments import ATTENTION, Attachment, attach, attached_attention, refresh
from ..model.linears import linear_weights, packed_weights
from ..model.reasons import Cause, Reason

__all__ = ["attach_attention", "attention_of", "attention_said"]


def attention_of(model: nn.Module) -> dict[str, Attachment]:
    """Return what is attached to linears around attentions that stay in high precision, by module path."""
    refresh(model)  # a copy has other parameters than those that something was attached to
    weights = [*linear_weights(model), *packed_weights(model)]
    return {path: said for path, weight in weights if (said := attached_attention(weight)) is not None}


def attach_attention(model: nn.Module, said: Mapping[str, Attachment]) -> None:
    """Let attentions stay in high precision, in place of what was attached before.

    Args:
        model: packed, or a part that is.
        said: by module path of linears, packed or not; others are passed over.
    """
    names = {path: path for path, _ in linear_weights(model)}
    names |= {path: f"{path}.weight_codes" for path, _ in packed_weights(model)}
    attach(model, {names[path]: one for path, one in said.items() if path in names}, ATTENTION)


def attention_said(reason: str) -> Attachment:
    """Return what to attach for a reason that a folder holds."""
    return Attachment("high_precision", Reason(Cause.SENSITIVITY, reason))
