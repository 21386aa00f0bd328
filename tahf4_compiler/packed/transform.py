"""What stands between an activation and its quantization, for one packed linear."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..format import hif4
from ..format.low_rank import LowRank, remainder
from ..format.reconstruct import Reconstruction
from ..format.transforms import multipliers
from ..weights.packing import pack_transformed

__all__ = ["Transform"]


@dataclass(frozen=True)
class Transform:
    """What stands between an activation and its quantization, and how the weights that read it are packed.

    Attributes:
        activation: name of the activation, as a recipe calls it; else the module path of the linear. Linears of one
            name have equal multipliers.
        hadamard_block: width of the rotation, 0 for none.
        seed: of the rotation's signs, None for no signs.
        search: how scales of the weights are chosen, see :class:`tahf4_compiler.graph.inputs.PackedWeight`.
        mask: float32 ``[K]`` or None.
        second_moment: ``[K]`` or None, for ``search="weighted"``.
        reconstruction: for ``search="reconstruct"``.
        activation_bits: 4, 8 or 16.
        low_rank: the branch beside the product, or None.
        rank: of the branch, 0 for none.
        span: a form (:mod:`tahf4_compiler.format.spans`): units of a row that share a level-1 scale, and the rounding,
            in activation and weight.
    """

    activation: str
    hadamard_block: int = 0
    seed: int | None = None
    search: str = ""
    mask: Tensor | None = field(default=None, repr=False, compare=False)
    second_moment: Tensor | None = field(default=None, repr=False, compare=False)
    reconstruction: Reconstruction | None = field(default=None, repr=False, compare=False)
    activation_bits: int = 4
    low_rank: LowRank | None = field(default=None, repr=False, compare=False)
    rank: int = 0
    span: int = 1

    @property
    def multiplies(self) -> bool:
        """Whether the activation is multiplied at all."""
        return self.mask is not None or self.seed is not None

    def multiplier(self, k: int) -> Tensor | None:
        """Return the factors of the activation's channels, float32 ``[k]`` on the CPU, or None for ones."""
        return multipliers(k, self.mask, self.seed)[0]

    def remainder(self, weight: Tensor) -> Tensor:
        """Return what the branch leaves of a weight, which is packed."""
        return remainder(weight, self.low_rank)

    def pack(self, weight: Tensor) -> hif4.Packed:
        """Convert a weight ``[N, K]`` that reads the activation; the result is on the weight's device."""
        form = (self.mask, self.seed, self.hadamard_block, self.search)
        return pack_transformed(weight, *form, self.second_moment, self.reconstruction, self.low_rank, self.span)
