"""Number formats that plug-ins bring: how a weight is packed in them.

A pass of a plug-in asks for packed weights as inputs of the graph (:class:`tahf4_compiler.graph.inputs.PackedInput`)
whose :class:`~tahf4_compiler.graph.inputs.PackedWeight` names the format. Everything else is as with HiF4: packed once
for each parameter, found at run time by its identity, made again when its contents change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..graph.inputs import BESIDE

__all__ = ["Pack", "pack_rows", "register_weight_format"]

Pack = Callable[[Tensor, Tensor | None, int], Mapping[str, Tensor]]
_formats: dict[str, Pack] = {}


def register_weight_format(name: str, pack: Pack) -> None:
    """Add a number format for weights.

    Args:
        name: that ``PackedWeight.format`` says, such as ``"nvfp4"``.
        pack: ``(weight [N, K], multiplier float32 [K] or None, hadamard_block) -> parts by name``. Multiplier and
            block are the transform of the weight, to be applied before (:func:`tahf4_compiler.ops.transform`). Every
            part has N as its first axis, so that rows of several weights can stand one after the other. It runs on
            fake tensors as well, to find shapes and dtypes, so it must not read values (``.item()``).

    Raises:
        FormatError: another function is registered under the name, or the name is empty or HiF4's.
    """
    if not name or name == "hif4":
        raise FormatError(f"a weight format cannot be named {name!r}; that is this compiler's own")
    known = _formats.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (pack.__module__, pack.__qualname__):
        raise FormatError(
            f"two weight formats are named {name!r}: {known.__module__}.{known.__qualname__} and "
            f"{pack.__module__}.{pack.__qualname__}. Give one another name."
        )
    _formats[name] = pack


def pack_rows(name: str, weights: tuple[Tensor, ...], multiplier: Tensor | None, block: int) -> dict[str, Tensor]:
    """Pack weights in a registered format, their rows one after the other.

    Raises:
        FormatError: no such format, or its parts are not what they must be.
    """
    if name not in _formats:
        raise FormatError(f"no weight format is named {name!r}; registered: {', '.join(_formats) or 'none'}")
    packed = [dict(_formats[name](weight.detach(), multiplier, block)) for weight in weights]
    for parts, weight in zip(packed, weights, strict=True):
        for part, value in parts.items():
            if part in BESIDE:
                raise FormatError(f"weight format {name!r} names a part {part!r}, which means something else")
            if value.dim() == 0 or value.shape[0] != weight.shape[0]:
                raise FormatError(
                    f"weight format {name!r}: part {part!r} is of shape {tuple(value.shape)}; expected the weight's "
                    f"{weight.shape[0]} rows as its first axis"
                )
    return {part: torch.cat([p[part] for p in packed]) if len(packed) > 1 else packed[0][part] for part in packed[0]}


def tensor_of(packed: Any, part: str) -> Tensor:
    """Return the tensor of a part of a packed weight: of HiF4 or of a plug-in's format.

    Raises:
        FormatError: the format has no such part.
    """
    if isinstance(packed, Mapping):
        if part not in packed:
            raise FormatError(f"the packed weight has no part {part!r}; it has {', '.join(packed)}")
        found: Tensor = packed[part]
        return found
    return getattr(packed, part)
