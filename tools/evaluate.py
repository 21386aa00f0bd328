"""``tahf4 evaluate``: what each part of the method does to the videos, with error bars."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .staging import write_text

__all__ = ["Variant", "evaluate"]


class Variant(StrEnum):
    """Which of the tiny models."""

    plain = "plain"
    stress = "stress"
    spikes = "spikes"


def evaluate(
    variant: Annotated[
        list[Variant] | None,
        typer.Option(
            help="`plain` (the tiny Wan2.2 as it is shipped), `stress` (the same function, with outlier channels and "
            "token spikes) or `spikes` (with large values in the feed-forward alone, which no mask undoes); by default "
            "all."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, max=180, help="Captions, none of them used for calibration.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Videos of each caption.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 16,
    row: Annotated[
        list[str] | None, typer.Option(help="Run only rows whose name contains this; repeat it for more.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path("out/evaluate"),
) -> None:
    """Compare HiF4 with and without masks, rotation, scale search and protected linears, and other 4-bit formats.

    Every row generates the same videos from the same noise; measures are against high precision, and, from the
    known captions, without a reference. Writes results.json, results.md and results.png. A run that is stopped
    takes up at the row where it was.
    """
    from ..errors import OptionError
    from .evaluation.report import markdown, plot, table
    from .evaluation.rows import ROWS
    from .evaluation.run import Plan, evaluate_variant, files_of, home_of

    plan = Plan(prompts=prompts, seeds=seeds, steps=steps)
    rows = [r for r in ROWS if row is None or any(part in r.name for part in row)]
    if not rows:
        raise OptionError(f"no row contains {row}; there are: {'; '.join(r.name for r in ROWS)}")
    tables = {}
    for name in (v.value for v in variant or list(Variant)):
        evaluate_variant(name, plan, out, rows=rows)
        tables[name] = table(files_of(home_of(name, plan, out), rows))
    text = "\n".join(f"## {name}: {prompts} prompts x {seeds} seeds\n\n{markdown(t)}" for name, t in tables.items())
    content = json.dumps({"prompts": prompts, "seeds": seeds, "steps": steps, "variants": tables}, indent=1)
    for path, data in ((out / "results.md", text), (out / "results.json", content + "\n")):
        write_text(path, data)
    plot(tables, out / "results.png")
    typer.echo(text)
    typer.echo(f"Written to {out}/: results.md, results.json, results.png")
