"""What a packed linear takes from a state dict, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import PackedError
from .spans import require_span

__all__ = ["PARTS", "check_state"]

PARTS = {"weight_codes": torch.uint8, "weight_scales": torch.int32, "multiplier": torch.float32}
"""The tensors of a packed linear beside its bias, with their dtypes."""


def check_state(
    state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], own: Mapping[str, int | str], span: int
) -> None:
    """Refuse what would give a packed linear another weight, and drop what a folder holds in the weight's place.

    Args:
        state: of a whole model.
        prefix: of the linear's names in it.
        metadata: what was written down beside the linear's tensors.
        own: what the linear's codes mean, and how it rounds activations, which no tensor's shape tells.
        span: of the linear.

    Raises:
        PackedError: the state holds a plain weight, was cast, or was packed otherwise.
    """
    weight = state.get(f"{prefix}weight")
    if weight is not None and f"{prefix}weight_codes" in state:
        del state[f"{prefix}weight"]  # what a folder holds in its place
    elif weight is not None:
        raise PackedError(
            f"the state dict holds {prefix}weight, a plain weight, but this linear is packed. Load it into the "
            "model before quantize_, or after dequantize_."
        )
    for leaf, dtype in PARTS.items():
        value = state.get(f"{prefix}{leaf}")
        if value is not None and value.dtype != dtype:
            raise PackedError(
                f"the state dict holds {prefix}{leaf} in {value.dtype}, expected {dtype}: it was cast, which "
                "changes codes and scales. Save and load it as it is; what is not packed can be cast afterwards."
            )
    scales = state.get(f"{prefix}weight_scales")
    if scales is not None:
        require_span(scales, span, f" ({prefix[:-1]})")
    found = {key: metadata[key] for key in own if key in metadata}
    if any(found[key] != own[key] for key in found):
        raise PackedError(
            f"the state dict holds {prefix[:-1]} with {_listed(found)}; this linear has {_listed(own)}, and would "
            "read other weights from its codes, or round activations otherwise. Load it into a model that was packed "
            "with the same recipe."
        )


def _listed(values: Mapping[str, int | str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
