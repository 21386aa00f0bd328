"""``tahf4 explain``: why a linear runs as it does."""

from __future__ import annotations

from typing import Annotated

import typer

from .inspect_model import CalibrationFile, Keep, Model, Precision, RecipeFile, Set, Shape, request

__all__ = ["explain"]


def explain(
    model: Model,
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Regular expression, searched in module paths.")
    ] = None,
    recipe: RecipeFile = None,
    calibration: CalibrationFile = None,
    shape: Shape = None,
    keep: Keep = None,
    settings: Set = None,
    dtype: Precision = None,
) -> None:
    """Print for linears that match: decision, reason, statistics, what was fused, the kernel, and how to change it.

    For example `tahf4 explain MODEL "blocks.3.ffn"`. Weights are not needed.
    """
    from .errors import CommandError
    from .inspection.explaining import explanations, regular
    from .inspection.sources import reports

    if pattern is None:
        missing, path, example = ("PATTERN", model, "blocks.3.ffn") if model.exists() else ("MODEL", "MODEL", model)
        raise CommandError(
            f"{missing} is missing: a model comes first and then a pattern, such as "
            f'tahf4 explain {path} "{example}". MODEL is a folder of diffusers, a dump or a .pt2 file.'
        )
    wanted = regular(pattern)  # before the model is read
    found, known = 0, []
    for report, _, _ in reports(request(model, recipe, calibration, shape, keep, settings, dtype)):
        known += [str(entry["module"]) for entry in report.plan]
        for text in explanations(report, wanted):
            typer.echo(text)
            found += 1
    if not found:
        shown = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise CommandError(f"{pattern!r} matches none of the {len(known)} linears ({shown or 'none'})")
