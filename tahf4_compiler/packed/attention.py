"""Which attentions of a packed model stay in high precision, or in int8: its linears carry that, also in folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model.attachments import ATTENTION, Attachment, attach, attached_attention, refresh
from ..model.linears import linear_weights, packed_weights
from ..model.reasons import Cause, Reason

ATTENTION_KEYS = {"attention": "high_precision", "attention_in_8_bits": "int8"}
"""What a folder calls a decision. An earlier version passes over the second, which it has no use for."""

__all__ = ["ATTENTION_KEYS", "attach_attention", "attention_of", "attention_said", "attention_words"]


def attention_of(model: nn.Module) -> dict[str, Attachment]:
    """Return what is attached to linears around attentions, by module path."""
    refresh(model)  # a copy has other parameters than those that something was attached to
    weights = [*linear_weights(model), *packed_weights(model)]
    return {path: said for path, weight in weights if (said := attached_attention(weight)) is not None}


def attach_attention(model: nn.Module, said: Mapping[str, Attachment]) -> None:
    """Let attentions stay in high precision, or in int8, in place of what was attached before.

    Args:
        model: packed, or a part that is.
        said: by module path of linears, packed or not; others are passed over.
    """
    names = {path: path for path, _ in linear_weights(model)}
    names |= {path: f"{path}.weight_codes" for path, _ in packed_weights(model)}
    attach(model, {names[path]: one for path, one in said.items() if path in names}, ATTENTION)


def attention_words(said: Attachment | None) -> dict[str, str]:
    """Return what a folder holds for what is attached: the reason, by the key of the decision."""
    return {key: str(said.reason) for key, decision in ATTENTION_KEYS.items() if said and said.decision == decision}


def attention_said(values: Mapping[str, Any]) -> Attachment | None:
    """Return what to attach for what a folder holds about a linear."""
    held = ((decision, values[key]) for key, decision in ATTENTION_KEYS.items() if values.get(key))
    return next((Attachment(decision, Reason(Cause.SENSITIVITY, why)) for decision, why in held), None)
