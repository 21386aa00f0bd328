"""``tahf4 inspect``: what the compiler does with a model, as a page, texts and numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..model.components import WAN_EXPERTS
from .calibrate import Dtype

if TYPE_CHECKING:
    from .inspection.report import Report
    from .inspection.sources import Request

__all__ = ["inspect", "request"]

Model = Annotated[
    Path,
    typer.Argument(help="Folder of a diffusers model or pipeline, a dump (dump_dir), or a .pt2 file of torch.export."),
]
RecipeFile = Annotated[Path | None, typer.Option(help="Recipe to apply; a .calibration beside it is read too.")]
CalibrationFile = Annotated[Path | None, typer.Option(help="Statistics of a calibration, for activation plots.")]
Shape = Annotated[
    str | None,
    typer.Option(help="FRAMESxHEIGHTxWIDTH or HEIGHTxWIDTH of the latent tensor (not pixels), such as 21x60x104."),
]
Keep = Annotated[list[str] | None, typer.Option(help="Pattern of linears to keep in high precision; may be repeated.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Option of the backend, NAME=VALUE, such as share.merge=false.")
]
Precision = Annotated[Dtype | None, typer.Option(help="Of the weights of a folder; bfloat16 if not given.")]


def inspect(
    model: Model,
    recipe: RecipeFile = None,
    calibration: CalibrationFile = None,
    shape: Shape = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("inspect"),
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Print a unified diff of the graphs after two passes, such as quantize fuse, and stop."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Run the lowered graph node by node, not compiled, and measure each; time a whole compiled call "
            "beside it. Needs the weights.",
        ),
    ] = False,
    keep: Keep = None,
    settings: Set = None,
    dtype: Precision = None,
) -> None:
    """Write a page (HTML), texts, Graphviz and JSON that show the graph after every pass and every linear.

    Weights are not needed, and not read without --profile: the structure of a 14B model takes half a minute. For each
    graph DIR holds report.html, report.json, report.txt and the folder graphs (NN_pass.py and NN_pass.dot).
    """
    from .inspection.explaining import chosen
    from .inspection.profile import compiled_milliseconds, milliseconds
    from .inspection.sources import reports
    from .staging import staged

    wanted = request(model, recipe, calibration, shape, keep, settings, dtype, weights=profile)
    if diff is not None:
        for report, _, _ in reports(wanted):
            typer.echo(report.diff(*diff), nl=False)
        return
    import dataclasses

    with staged(out) as stage:
        for i, (report, lowered, arguments) in enumerate(reports(wanted)):
            name = re.sub(r"[^\w.-]+", "_", report.title).strip("_")
            folder = stage if i == 0 and not _several(wanted) else stage / f"{i:02d}_{name}"
            folder.mkdir(exist_ok=True)
            if profile:
                if lowered is None:
                    from .errors import CommandError

                    raise CommandError("a dump holds no weights to run: --profile needs a model folder or a .pt2 file")
                times, device = milliseconds(lowered, arguments, folder / "trace.json")
                compiled, why = compiled_milliseconds(lowered, arguments)
                report = dataclasses.replace(report, milliseconds=times, device=device, compiled=compiled)
            _write(report, folder)
            place = out / folder.relative_to(stage)
            size = (folder / "report.html").stat().st_size
            typer.echo(f"{report.title}: {chosen(report.plan)}")
            typer.echo(f"  {place / 'report.html'} ({size:,} bytes)")
            if profile:
                whole = f"{compiled:.3f} ms compiled, as a whole" if compiled is not None else f"not compiled: {why}"
                typer.echo(f"  a call: {sum(times.values()):.3f} ms node by node, {whole} ({device})")


def request(
    model: Path,
    recipe: Path | None,
    calibration: Path | None,
    shape: str | None,
    keep: list[str] | None,
    settings: list[str] | None,
    dtype: Dtype | None,
    *,
    weights: bool = False,
) -> Request:
    """Return what the options of a command ask for."""
    import torch

    from .inspection.sources import Request

    options: dict[str, Any] = dict(map(_option, settings or []))
    if keep:
        options["keep"] = list(keep)
    precision = None if dtype is None else getattr(torch, dtype.value)
    return Request(model, recipe, calibration, shape, precision, weights, options)


def _option(text: str) -> tuple[str, Any]:
    """Return name and value of ``NAME=VALUE``; the value is JSON, or a text."""
    from .errors import CommandError

    name, separator, value = text.partition("=")
    if not separator or not all(part.isidentifier() for part in name.split(".")):
        raise CommandError(f"--set {text!r}; expected NAME=VALUE, such as --set share.merge=false")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _several(wanted: Request) -> bool:
    """Whether a path holds more than one graph."""
    path = wanted.model
    if (path / "model_index.json").is_file():
        return (path / WAN_EXPERTS[1] / "config.json").is_file()
    return len(list(path.glob("graph_*/plan.json"))) > 1


def _write(report: Report, folder: Path) -> None:
    from .inspection.explaining import overview

    data = report.data()
    report.write_html(folder / "report.html", data)
    (folder / "report.json").write_text(json.dumps(data, indent=None) + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(overview(report), encoding="utf-8")
    graphs = folder / "graphs"
    graphs.mkdir()
    for i, (name, text) in enumerate(report.texts.items()):
        (graphs / f"{i:02d}_{name}.py").write_text(text, encoding="utf-8")
        (graphs / f"{i:02d}_{name}.dot").write_text(report.dot(name), encoding="utf-8")
