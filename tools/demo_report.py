"""The demo's numbers as tables."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from .comparison import Outcome

__all__ = ["kept_lines", "print_outcome", "slow_kernel_note"]


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print how close the videos are, what became of the weights, and how long a step takes."""
    console.print(_videos(outcome))
    console.print(_costs(outcome))
    note = slow_kernel_note(outcome)
    if note:
        console.print(note)


def slow_kernel_note(outcome: Outcome) -> str:
    """Return what to know about the speed where plain-PyTorch reference kernels ran, else nothing."""
    if "reference" not in outcome.kernels():
        return ""
    before, after = outcome.original.seconds_per_step(), outcome.w4a4.seconds_per_step()
    measured = f" ({after / before:.1f}x the time of the original here)" if before and after else ""
    return (
        f"Speed: on this device ({outcome.about['device']}) W4A4 runs plain-PyTorch reference kernels: exact, "
        f"but slower than the original linears{measured}. The tables show quality and size, not what 4 bits can "
        "gain in speed."
    )


def _videos(outcome: Outcome) -> Table:
    table = Table(title="W4A4 against the original, same prompt and seed", title_justify="left")
    table.add_column("prompt")
    table.add_column("seed", justify="right")
    table.add_column("PSNR", justify="right")
    judged = outcome.judged()
    shown = any(before is not None for before, _ in judged)
    if shown:
        table.add_column("original shows")
        table.add_column("W4A4 shows")
    for i, (prompt, value, verdicts) in enumerate(zip(outcome.prompts, outcome.psnrs(), judged, strict=True)):
        cells = [prompt, str(outcome.seed + i), _decibel(value)]
        table.add_row(*cells, *(map(_verdict, verdicts) if shown else ()))
    return table


def _decibel(value: float) -> str:
    if value == math.inf:
        return "identical"
    return f"{value:.1f} dB" if math.isfinite(value) else "not a number"


def _verdict(words: dict[str, bool] | None) -> str:
    if words is None:
        return "not judged"
    missing = [word for word, shown in words.items() if not shown]
    count = f"{len(words) - len(missing)} of {len(words)} words"
    return f"{count}, not {', '.join(missing)}" if missing else count


def _costs(outcome: Outcome) -> Table:
    table = Table(title="Linear layers and time", title_justify="left")
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("W4A4", justify="right")
    table.add_column("")
    weights = outcome.weights()
    before, after = weights["bytes_before"], weights["bytes_after"]
    names = " + ".join(plan.name for plan in outcome.plans)
    linears, quantized = weights["linears"], weights["quantized"]
    table.add_row("linears in 4 bits", f"0 of {linears}", f"{quantized} of {linears}", names)
    table.add_row(
        "weight bytes of all linears",
        f"{before:,}",
        f"{after:,}",
        f"{before / after:.2f}x smaller than in {outcome.about['dtype']}",
    )
    original, w4a4 = outcome.original, outcome.w4a4
    calls = w4a4.calls_per_step
    table.add_row(
        "seconds a step (median)",
        _seconds(original.seconds_per_step()),
        _seconds(w4a4.seconds_per_step()),
        f"{calls} model call{'s' if calls > 1 else ''} a step; {len(original.measured())} and "
        f"{len(w4a4.measured())} steps measured",
    )
    table.add_row("compiling, once", "", f"{w4a4.first_call_seconds():.1f} s", "first calls, less a usual step")
    return table


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f} s"


def kept_lines(outcome: Outcome) -> list[str]:
    """Return one line for each reason to stay in high precision, with how many linears it holds for."""
    counts: dict[str, int] = {}
    parts: list[dict[str, Any]] = outcome.weights()["experts"]
    for part in parts:
        for reason in part["high_precision"].values():
            counts[reason] = counts.get(reason, 0) + 1
    return [f"{count} linears in high precision: {reason}" for reason, count in counts.items()]
