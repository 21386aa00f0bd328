"""What the placeholders of a graph stand for, and the keys of node metadata that passes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BESIDE", "DECISION", "INPUT", "NUMBERS", "ROLE", "SEARCHES", "GraphInput", "HeldWeight", "PackedInput",
    "PackedWeight",
]  # fmt: skip

INPUT = "tahf4_input"
"""Key in ``node.meta`` of a placeholder: its :class:`GraphInput` or :class:`PackedInput`."""

BESIDE = ("multiplier", "observer", "low_rank_a", "low_rank_b")
"""Parts of a :class:`PackedInput` that are looked up beside a packed weight, and are none of its own."""

SEARCHES = ("", "squared", "weighted", "reconstruct")
"""How the scales of a :class:`PackedWeight` may be chosen."""

DECISION = "tahf4_decision"
"""Key in ``node.meta`` of a planned linear, and of what stands for it later: a tuple of
:class:`~tahf4_compiler.Decision`, several where products were merged."""

ROLE = "tahf4_role"
"""Key in ``node.meta`` of a linear: what ``classify`` found out about its place in the model."""

NUMBERS = "tahf4_numbers"
"""Key in ``node.meta``: numbers that passes attached to the node, by name."""


@dataclass(frozen=True)
class GraphInput:
    """An input that the captured model already had.

    Attributes:
        kind: ``"parameter"``, ``"buffer"``, ``"constant"`` (a tensor that export lifted) or ``"user"``.
        path: fully qualified name of a parameter or buffer (``blocks.0.ffn.net.2.weight``), else the
            name of the argument.
        index: position among the arguments of the captured graph.
    """

    kind: Literal["parameter", "buffer", "constant", "user"]
    path: str
    index: int


@dataclass(frozen=True)
class PackedWeight:
    """A weight in 4 bits and what was done to it before, as far as a graph knows.

    What belongs to the module at hand (the mask's values, the seed of a recipe) is looked up at run time.

    Attributes:
        weights: the parameters' positions among the arguments of the captured graph. More than
            one means that their rows stand one after the other (one merged product).
        masked: whether channels are divided by the mask that a recipe attached to the weights.
        seed: of the rotation's signs, unless a recipe attached another; None for no signs.
        hadamard_block: width of the rotation along K, 0 for none.
        search: how scales are chosen: ``""`` (by the maximum), ``"squared"`` or ``"weighted"`` (by squared error), or
            ``"reconstruct"`` (as a recipe holds it).
        format: name of a format that a plug-in registered (:func:`tahf4_compiler.register_weight_format`); ``""``
            is HiF4.
        rank: the largest of the branches that a recipe attached to the weights; each is subtracted from its weight. 0
            for none.
        span: a form (:mod:`tahf4_compiler.format.spans`): units of a row that share a level-1 scale, and the rounding.
    """

    weights: tuple[int, ...]
    masked: bool = False
    seed: int | None = None
    hadamard_block: int = 0
    search: str = ""
    format: str = ""
    rank: int = 0
    span: int = 1


@dataclass(frozen=True)
class HeldWeight:
    """A weight that the model itself holds in 4 bits (:class:`tahf4_compiler.HiF4Linear`).

    Attributes:
        codes: position of the parameter that holds codes, among the arguments of the captured graph.
        scales: the same for scales.
    """

    codes: int
    scales: int

    @property
    def weights(self) -> tuple[int, ...]:
        """Return the position that stands for the weight: that of the codes."""
        return (self.codes,)


@dataclass(frozen=True)
class PackedInput:
    """An input that stands for a weight in 4 bits, or for what belongs to one.

    That of a :class:`PackedWeight` was added by the rewrite and is found at run time by the identity of its parameters;
    that of a :class:`HeldWeight` is a parameter itself.

    Attributes:
        part: ``"codes"`` (uint8 ``[N, K / 2]``), ``"scales"`` (int32 ``[N, K / 64]``), ``"multiplier"`` (float32
            ``[K]``, for the activation that the weights read), ``"observer"`` (int64 ``[2]``, on the CPU),
            ``"low_rank_a"`` (``[K, r]``) or ``"low_rank_b"`` (``[r, N]``, both of the weight's dtype); with a format of
            a plug-in, a part that it names in the place of codes and scales.
        weight: which weight, and how it is transformed if the rewrite packs it.
    """

    part: str
    weight: PackedWeight | HeldWeight

    @property
    def weights(self) -> tuple[int, ...]:
        """Return the parameters' positions."""
        return self.weight.weights

    @property
    def positions(self) -> tuple[int, ...]:
        """Return the positions of the parameters that this part is made from."""
        if isinstance(self.weight, HeldWeight) and self.part == "scales":
            return (self.weight.scales,)
        return self.weight.weights
