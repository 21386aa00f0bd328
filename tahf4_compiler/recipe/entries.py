"""What a recipe says about one activation, one linear, one attention, one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..format.hif4 import Packed
from ..format.low_rank import LowRank

__all__ = ["AttentionEntry", "CallError", "LinearEntry", "RecipeEntry"]


@dataclass(frozen=True)
class LinearEntry:
    """A linear of a recipe.

    Attributes:
        shape: ``(N, K)`` of its weight.
        weight_sum: checksum of the weight that was calibrated.
        decision: ``"hif4"`` or ``"high_precision"``.
        reason: in words, for the report.
        sqnr_db: of its output on calibration rows when it is quantized, or None if it was not measured.
        step_sqnr_db: the same on the rows of each part of the denoising schedule (``step_groups``), None where no row
            was seen; empty if it was not measured.
        effect: relative squared error of the network's output when only it is quantized, or None.
        flops: of the calibration's calls.
        no_branch: why it has no low-rank branch, in a recipe that was asked for branches.
        activation_bits: of its activation, where its weight is in 4 bits: 4 (HiF4), 8 (int8) or 16 (not quantized).
    """

    shape: tuple[int, int]
    weight_sum: int
    decision: str = "hif4"
    reason: str = ""
    sqnr_db: float | None = None
    effect: float | None = None
    flops: int = 0
    step_sqnr_db: tuple[float | None, ...] = ()
    activation_bits: int = 4
    no_branch: str = ""


@dataclass(frozen=True)
class AttentionEntry:
    """An attention of a recipe, or several of one module, which share a decision.

    Attributes:
        linears: module paths of the linears of its module, which carry the decision.
        sqnr_db: of its output in 8 bits against the original, on the calls that the calibration kept.
        decision: ``"int8"`` or ``"hif4"``, where attention in so few bits is asked for, or ``"high_precision"``.
        reason: in words, for the report, where it stays.
        effect: relative squared error of the network's output when only it is in 8 bits, with queries and keys in HiF4
            if its own error lets it, or None.
        flops: of its core, as many as for all of the calibration's calls.
        budget: that it stays by, in words; empty where its own error decided.
        hif4_sqnr_db: of its output with queries and keys in HiF4, or None if that was not measured.
        by_error: the decision of its own error, where a budget made another.
    """

    linears: tuple[str, ...]
    sqnr_db: float
    decision: str = "int8"
    reason: str = ""
    effect: float | None = None
    flops: int = 0
    budget: str = ""
    hif4_sqnr_db: float | None = None
    by_error: str = ""

    @property
    def words(self) -> str:
        """The decision with its numbers."""
        effect = f"effect on the output {self.effect:.2e}, " if self.effect is not None else ""
        found = f"{self.decision}: {effect}SQNR {self.sqnr_db:.1f} dB"
        found += f" in 8 bits and {self.hif4_sqnr_db:.1f} dB in HiF4" if self.hif4_sqnr_db is not None else ""
        return f"{found}; budget {self.budget}" if self.budget else found


@dataclass(frozen=True)
class CallError:
    """The error of the network's output in a call that the calibration kept, with all that the recipe says in 4 bits.

    Attributes:
        step: index of the denoising step; for a bare module of the part of the schedule.
        steps: of the generation.
        branch: of guidance.
        error: relative squared error against the original precision. Steps that run in high precision
            (``high_precision_steps``) are measured as if they did not.
    """

    step: int
    steps: int
    branch: str
    error: float


@dataclass(frozen=True)
class RecipeEntry:
    """An activation of a recipe, and the linears that read it.

    Attributes:
        linears: by module path.
        hadamard_block: width of the rotation, 0 for none.
        seed: of its signs.
        search: how the weights are rounded.
        percentile: that the mask was made with; None without a mask, and with one of the root mean square or of the
            weights alone.
        weight_exponent: that the mask was made with.
        mask: float32 ``[K]`` or None.
        second_moment: bfloat16 ``[K]`` or None, for ``search="weighted"``.
        packed: weights by module path on the CPU, for ``search="reconstruct"``: they cannot be made again without
            what the calibration saw.
        low_rank: branches by module path, bfloat16 on the CPU; ``packed`` is then what a branch leaves of the weight.
        span: units of 64 values of a row that share a level-1 scale, in the activation and its weights: 1, 2 or 4, or 0
            for all of a row. Where there is neither mask nor rotation, or the activation has other than 4 bits, it is
            refused.
        rounding: of their elements, see :func:`tahf4_compiler.hif4.quantize`.
        span_reason: why it is this span, where the span was chosen by measured error.
    """

    linears: Mapping[str, LinearEntry]
    hadamard_block: int = 0
    seed: int | None = None
    search: str = ""
    percentile: float | None = None
    weight_exponent: float | None = None
    mask: Tensor | None = field(default=None, repr=False)
    second_moment: Tensor | None = field(default=None, repr=False)
    packed: Mapping[str, Packed] = field(default_factory=dict, repr=False)
    low_rank: Mapping[str, LowRank] = field(default_factory=dict, repr=False)
    span: int = 1
    rounding: str = "half_away"
    span_reason: str = ""
