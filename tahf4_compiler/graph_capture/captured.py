"""A captured graph and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..model.tree import Surroundings

__all__ = ["Capture"]


@dataclass
class Capture:
    """A captured graph and what it is called with.

    Attributes:
        graph_module: ATen operators; every placeholder has a :class:`GraphInput` in its metadata.
        example_inputs: one value for each placeholder: tensors, integers and symbolic integers.
        fake_mode: the mode that the graph's ``meta["val"]`` tensors belong to.
        surroundings: the module that was compiled, as far as it is known.
        name: of the root's class, or of the function.
        bind: flattens a call's arguments to the graph's inputs (export only; Dynamo calls flat).
        unflatten: turns the graph's flat outputs into what the module returns (export only).
    """

    graph_module: fx.GraphModule
    example_inputs: tuple[Any, ...]
    fake_mode: Any
    surroundings: Surroundings
    name: str
    bind: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...]] | None = None
    unflatten: Callable[[Any], Any] | None = None
    seconds: float = field(default=0.0, compare=False)
