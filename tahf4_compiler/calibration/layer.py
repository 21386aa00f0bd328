"""One activation and the weights that read it, under some choices: masks, products, and their error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..format import hif4
from ..format.low_rank import LowRank
from ..format.spans import joined as join
from ..format.transforms import SEED, hadamard_block
from ..pipeline.rules import effective_span
from ..weights.packing import moment_as_quantized
from .choices import Choices
from .masks import channel_mask, column_norms
from .sensitivity import QuantizedWeight, output_error
from .sketch import Sketch
from .statistics import Cells, merged

__all__ = ["Layer"]


class Layer:
    """An activation and the weights that read it.

    Attributes:
        cells: statistics of the activation.
        weights: ``[N_i, K]`` each.
        choices: that are to be tried.
        block: width of the rotation, 0 for none.
        seed: of its signs, or None.
        moment: float32 ``[K]``, second moment of the activation's channels.
        rows: sample rows, ``[R, K]``.
    """

    def __init__(self, cells: Cells, weights: Sequence[Tensor], choices: Choices) -> None:
        """Collect what is known.

        Raises:
            CalibrationError: the activation held NaN or infinite values.
        """
        activation = cells.activation
        bad = sum(int(sketch.nonfinite) for sketch, _ in cells.cells.values())
        if bad:
            raise CalibrationError(
                f"{activation.expert or 'the module'}: {bad} values that {activation.name} reads are NaN or infinite. "
                "Check the model in its original precision; float16 overflows where bfloat16 does not."
            )
        self.cells, self.weights, self.choices = cells, weights, choices
        self.block = hadamard_block(activation.channels, choices.block)
        self.seed = SEED if self.block else None
        self.moment = _second_moment(cells).to(weights[0].device)
        self.rows = cells.rows()
        self._columns = column_norms(weights) if choices.column == "norm" else _column_maxima(weights)

    def mask(self, percentile: float | None, exponent: float) -> Tensor:
        """Return the channel mask of a percentile of |x|, or of its root mean square, and a weight exponent.

        It is float32 ``[K]``.
        """
        sketches = [sketch for sketch, _ in self.cells.cells.values()]
        if self.choices.combine == "merged":
            sketches = [merged(sketches)]
        values = torch.stack([_size(sketch, percentile) for sketch in sketches])
        size = values.mean(0) if self.choices.combine == "mean" else values.amax(0)
        return channel_mask(self._columns, size.to(self._columns.device), exponent)

    def product(
        self,
        mask: Tensor | None,
        search: str,
        packed: Mapping[str, hif4.Packed] | None = None,
        branches: Mapping[str, LowRank] | None = None,
        span: int = 1,
    ) -> QuantizedWeight:
        """Return the product with all weights joined, quantized now or packed before, and their branches, by path.

        ``span``: a form (:mod:`tahf4_compiler.format.spans`): units that share a level-1 scale, and the rounding.
        """
        importance = moment_as_quantized(self.moment, mask, self.block) if search == "weighted" else None
        whole, device = None, self.moment.device
        if packed:
            found = [packed[path] for path in self.cells.activation.members]
            codes, scales = (torch.cat(parts).to(device) for parts in list(zip(*found, strict=True))[:2])
            whole = hif4.Packed(codes, scales, self.cells.activation.channels)
        every, bits = torch.cat([w.detach() for w in self.weights]), self.choices.activation_bits
        joined = None
        if branches:
            members, k = self.cells.activation.members, self.cells.activation.channels
            none = [LowRank(weight.new_zeros(k, 0), weight.new_zeros(0, len(weight))) for weight in self.weights]
            pairs = [branches.get(path, empty) for path, empty in zip(members, none, strict=True)]
            left, right = ([factor.to(device, torch.float32) for factor in part] for part in zip(*pairs, strict=True))
            joined = LowRank(torch.cat(left, 1), torch.block_diag(*right))
        return QuantizedWeight(every, mask, self.seed, self.block, search, importance, whole, bits, joined, span)

    def form(self, mask: Tensor | None) -> int:
        """Return how many units share a level-1 scale under a mask, and the rounding, as a form."""
        span = effective_span(self.choices.scale_span, self.choices.activation_bits, mask is not None, self.block)
        return join(span, self.choices.rounding)

    def error(self, mask: Tensor | None) -> float:
        """Return the relative squared error of the outputs on sample rows, summed over the weights.

        Relative to each linear's own output: v may be much smaller than q. No scales of weights are
        searched.
        """
        return sum(output_error(self.rows, self.weights, self.product(mask, "", span=self.form(mask))))


def _size(sketch: Sketch, percentile: float | None) -> Tensor:
    return sketch.second_moment().sqrt() if percentile is None else sketch.percentile(percentile)


def _column_maxima(weights: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each input channel, float32 ``[K]``; what is not finite counts as 0."""
    magnitudes = [weight.detach().to(torch.float32).abs() for weight in weights]
    return torch.stack([torch.where(m.isfinite(), m, 0.0).amax(0) for m in magnitudes]).amax(0)


def _second_moment(cells: Cells) -> Tensor:
    squares = torch.stack([sketch.squares.cpu() for sketch, _ in cells.cells.values()]).sum(0)
    seen = sum(sketch.rows for sketch, _ in cells.cells.values())
    return (squares / max(1, seen)).to(torch.float32)
