"""Where ``tahf4::observe`` takes an activation: the calibration that runs, found by the weights that read it.

A compiled graph serves every module of its class, so it does not know whose activations it observes. It is given
a *handle* at each call, looked up by the identity of the weights, as packed weights are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Handles", "handle_of", "observe_attention", "take"]

Observer = Callable[[Any], None]

_current: Handles | None = None
_NOBODY = -1


class Handles:
    """Handles of one calibration.

    Attributes:
        observers: by number: what takes the activation.
    """

    def __init__(self, observer_of: Callable[[tuple[Tensor, ...]], Observer | None]) -> None:
        """Ask ``observer_of`` for the observer of the activation that some weights read."""
        self._observer_of = observer_of
        self._by_weight: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.observers: list[Observer] = []

    def handle(self, weights: tuple[Tensor, ...]) -> Tensor:
        """Return the handle of the activation that some weights read: int64 ``[number, times observed]``, CPU."""
        mine = self._by_weight.setdefault(weights[0], {})
        key = tuple(id(weight) for weight in weights)
        if key not in mine:
            observer = self._observer_of(weights)
            if observer is not None:
                self.observers.append(observer)
            mine[key] = _handle(len(self.observers) - 1 if observer is not None else _NOBODY)
        handle: Tensor = mine[key]
        return handle

    def __enter__(self) -> Handles:
        """Observe from now on.

        Raises:
            CalibrationError: another calibration runs.
        """
        global _current
        if _current is not None:
            from ..errors import CalibrationError

            raise CalibrationError("a calibration runs already; leave its `with` block before another begins")
        _current = self
        return self

    def __exit__(self, *error: object) -> None:
        """Observe no more."""
        global _current
        _current = None


def handle_of(weights: tuple[Tensor, ...]) -> Tensor:
    """Return the handle for the calibration that runs; one that observes nothing if there is none."""
    return _current.handle(weights) if _current is not None else _handle(_NOBODY)


def _handle(number: int) -> Tensor:
    return torch.tensor([number, 0], dtype=torch.int64, device="cpu")


def take(x: Any, handle: Tensor) -> None:
    """Give an activation, or the operands of an attention, to the observer of a handle."""
    number = int(handle[0])
    if _current is not None and number != _NOBODY:
        _current.observers[number](x)
        handle[1] += 1


@torch.library.custom_op("tahf4::observe_attention", mutates_args=("output", "handle"))
def observe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    output: Tensor,
    handle: Tensor,
) -> None:
    """Show the operands of an attention to who measures it (:mod:`tahf4_compiler.calibration.attention`).

    Args:
        query: and the others, as for ``tahf4::attention``; nothing is changed.
        output: of the attention, in whose place the observer may put another.
        handle: as for ``tahf4::observe``.
    """
    take((query, key, value, attn_mask, is_causal, scale, enable_gqa, output), handle)


observe_attention.register_fake(lambda *given: None)
