"""The plan and the history of a compilation, for people (``report.txt``) and programs (``plan.json``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..format.spans import span_name
from ..pipeline.context import Decision
from ..pipeline.records import PassRecord

__all__ = ["ACTIVATIONS", "Totals", "plan_json", "report"]

ACTIVATIONS = {8: "int8", 16: "16-bit"}
"""What the activation of a linear in HiF4 is called, by its bits, where these are not 4."""


@dataclass(frozen=True)
class Totals:
    """Sums over the linears of a graph.

    Attributes:
        linears: all of them.
        quantized: those in 4 bits.
        flops: of one call.
        flops_4bit: of those in 4 bits.
        flops_by_activation: of those in HiF4, by the bits of their activations, where these are not 4.
        bytes_before: of all linears' weights.
        bytes_4bit: of the weights (before) that the plan puts in 4 bits.
        bytes_after: of all weights as the plan leaves them.
        formats: of the linears in 4 bits.
    """

    linears: int
    quantized: int
    flops: int
    flops_4bit: int
    bytes_before: int
    bytes_4bit: int
    bytes_after: int
    formats: tuple[str, ...] = ()
    flops_by_activation: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, plan: Sequence[Decision]) -> Totals:
        """Add up a plan."""
        chosen = [d for d in plan if d.decision != "high_precision"]
        hif4 = [d for d in chosen if d.decision == "hif4"]
        others = {bits: sum(d.flops for d in hif4 if d.activation_bits == bits) for bits in ACTIVATIONS}
        return cls(
            linears=len(plan),
            quantized=len(chosen),
            flops=sum(d.flops for d in plan),
            flops_4bit=sum(d.flops for d in chosen),
            bytes_before=sum(d.bytes_before for d in plan),
            bytes_4bit=sum(d.bytes_before for d in chosen),
            bytes_after=sum(d.bytes_after for d in plan),
            formats=tuple(sorted({d.decision for d in chosen})),
            flops_by_activation=tuple((bits, flops) for bits, flops in others.items() if flops),
        )

    def lines(self) -> list[str]:
        """Return the totals as text."""
        return [
            f"{f'linears in {self._formats()}':<21} {self.quantized} of {self.linears}",
            f"FLOPs in 4 bits       {_percent(self.flops_4bit, self.flops)} of {self.flops / 1e9:.3f} GFLOP a call"
            + "".join(
                f", {_percent(flops, self.flops)} with activations in {bits} bits"
                for bits, flops in self.flops_by_activation
            ),
            f"weight bytes in 4 bits {_percent(self.bytes_4bit, self.bytes_before)}: "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
            + (f" ({self.bytes_before / self.bytes_after:.2f}x smaller)" if self.bytes_after else ""),
        ]


    def _formats(self) -> str:
        return ", ".join("HiF4" if name == "hif4" else name for name in self.formats or ("hif4",))


def plan_json(plan: Sequence[Decision]) -> str:
    """Return a plan as JSON: a list with one object a linear."""
    numbers = ("bytes_before", "bytes_after", "flops")
    fields = ("module", "k", "n", "decision", "reason", *numbers, "kernel")
    entries = [
        {
            **{name: getattr(d, name) for name in fields},
            "activation_bits": d.activation_bits if d.decision == "hif4" else None,
            "rank": d.rank,
            "scale_span": span_name(d.span) if d.decision == "hif4" else None,
            "rounding": d.rounding if d.decision == "hif4" else None,
            "cause": d.cause.value,
            "numbers": _plain(d.numbers),
        }
        for d in plan
    ]
    return json.dumps(entries, indent=1) + "\n"


def _plain(numbers: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
    """Write what JSON has no number for (NaN, infinity) as text."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def report(
    name: str,
    plan: Sequence[Decision],
    history: Sequence[PassRecord],
    notes: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
) -> str:
    """Return the plan as a table, what each pass did, and the totals.

    Args:
        name: of the compiled module.
        plan: decisions in execution order.
        history: one record a pass.
        notes: by pass name.
        seconds: of each stage of the compilation.
    """
    lines = [f"tahf4 report: {name}", ""]
    rows: list[tuple[str, ...]] = [("module", "k", "n", "decision", "bytes", "after", "reason")]
    rows += [
        (d.module, str(d.k), str(d.n), _decision(d), f"{d.bytes_before:,}", f"{d.bytes_after:,}", d.reason)
        for d in plan
    ]
    lines += _table(rows, right={1, 2, 4, 5}) if plan else ["no linears in this graph"]
    numbered = [d for d in plan if d.numbers]
    if numbered:
        rows = [("module", "numbers that passes attached")]
        rows += [(d.module, ", ".join(f"{k} {_short(v)}" for k, v in d.numbers.items())) for d in numbered]
        lines += ["", *_table(rows, right=set())]
    lines += ["", *Totals.of(plan).lines(), ""]
    rows = [("pass", "matches", "nodes", "seconds", "added error", "error so far")]
    rows += [
        (
            r.name,
            str(r.matches) if r.name != "captured" else "",
            str(r.nodes),
            f"{r.seconds:.3f}",
            "" if r.error is None else f"{r.error:.3e}",
            "" if r.total_error is None else f"{r.total_error:.3e}",
        )
        for r in history
    ]
    lines += _table(rows, right={1, 2, 3, 4, 5})
    for pass_name, texts in notes.items():
        lines += [f"{pass_name}: {text}" for text in texts]
    lines += ["", "compile time: " + ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())]
    return "\n".join(lines) + "\n"


def _decision(decision: Decision) -> str:
    if decision.decision != "hif4":
        return decision.decision
    other = ACTIVATIONS.get(decision.activation_bits)
    words = [decision.decision, *([f"{other} activation"] if other else [])]
    words += [f"span {span_name(decision.span)}"] if decision.span != 1 else []
    words += [f"rank {decision.rank}"] if decision.rank else []
    words += [f"rounding {decision.rounding}"] if decision.rounding != "half_away" else []
    return ", ".join(words)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _table(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    out = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * width for width in widths))
    return out
