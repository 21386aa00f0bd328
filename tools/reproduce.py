"""``tahf4 reproduce``: check the published figures and ours with a real Wan2.2, one command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["reproduce"]


def reproduce(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder of a Wan pipeline, or its name on the hub; by default the tiny Wan2.2 that ships."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="YAML file, or one that ships: `wan2.2-t2v-a14b` (the default for a model), `wan2.2-ti2v-5b`, `tiny`."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path("out/reproduce"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print disk, memory and hours, computed from shapes, and stop.")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep one component at a time on the GPU (diffusers' model offload).")
    ] = False,
    no_inductor: Annotated[
        bool, typer.Option("--no-inductor", help="Run graphs as they are, and the original without a compiler.")
    ] = False,
    vbench_python: Annotated[
        str, typer.Option(help="The Python that has VBench; by default the one that runs this command.")
    ] = sys.executable,
) -> None:
    """Generate the same videos with the original, with naive HiF4, with the published recipe and with the defaults.

    Scores them (VBench and LPIPS where they are installed, PSNR, SSIM) and writes report.html and report.md, with the
    published figures beside. Every clip is a file: a run that is stopped goes on where it ended.
    """
    import torch

    from .errors import CommandError
    from .reproduction.estimate import estimate
    from .reproduction.model import check_fits, local_folder, structure
    from .reproduction.protocol import load_protocol
    from .reproduction.report import write_report
    from .reproduction.run import SETTINGS, Device, check_same_run, generate_all, score_all
    from .staging import check_writable
    from .tiny_wan import settings

    chosen = load_protocol(protocol or ("wan2.2-t2v-a14b" if model else "tiny"))
    source = model or str(settings.PIPELINE_DIR)
    folder = local_folder(source, weights=False) if dry_run else local_folder(source, weights=True)
    found = structure(folder)
    check_fits(chosen, found)
    if dry_run:
        typer.echo(estimate(chosen, found, len(SETTINGS)))
        return
    cuda = torch.cuda.is_available()
    if offload and not cuda:
        raise CommandError("--offload needs a GPU; leave it out")
    check_writable(out / "run.json")
    device = Device("cuda" if cuda else "cpu", offload, not no_inductor)
    check_same_run(chosen, folder, out, device)
    clips = generate_all(chosen, folder, out, device)
    files, reasons = score_all(chosen, clips, out, vbench_python)
    written = write_report(chosen, source, clips, files, reasons, out, device)
    for reason in reasons:
        typer.echo(f"Not scored. {reason}.", err=True)
    typer.echo(f"Written to {out}/: {', '.join(path.name for path in written)}")
