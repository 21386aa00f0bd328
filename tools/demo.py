"""``tahf4 demo``: the same videos in the original precision and in W4A4."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .comparison import Outcome

__all__ = ["Precision", "demo"]

PROMPTS = (
    "a large red circle moving right",
    "a small blue square moving left",
    "a large green triangle moving up",
    "a small purple cross moving down",
)


class Precision(StrEnum):
    """In which precision the original runs."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def demo(
    model_dir: Annotated[
        Path | None,
        typer.Argument(help="Folder of a saved WanPipeline; by default the tiny Wan2.2 that is shipped."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")] = Path("out"),
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt; repeat it for more. By default four examples. The shipped model knows only captions "
            "like 'a large red circle moving right'."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of a video.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first video; the next ones count up.")] = 0,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Keep linears in high precision whose module path matches, such as `blocks\\.0\\.`; "
            "repeat it for more.",
        ),
    ] = None,
    no_inductor: Annotated[
        bool, typer.Option("--no-inductor", help="Run the lowered graph as it is, not compiled by Inductor.")
    ] = False,
    dtype: Annotated[
        Precision, typer.Option(help="Precision of the original; the shipped weights are stored in bfloat16.")
    ] = Precision.bfloat16,
    height: Annotated[int | None, typer.Option(min=8, help="Height of a frame in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Width of a frame in pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
) -> None:
    """Generate videos in the original precision and in W4A4, and compare them.

    Writes to the folder: one animated GIF a prompt (original | W4A4), contact_sheet.png, results.json with
    every number, and dumps/ with the graph after each pass. Nothing is downloaded. The first run compiles for
    a while; later runs find the compiled code in Inductor's cache.
    """
    import torch
    from rich.console import Console

    from .comparison import compare
    from .demo_report import kept_lines, print_outcome
    from .generation import load_pipeline
    from .staging import staged
    from .tiny_wan import settings

    path = model_dir or settings.PIPELINE_DIR
    overrides = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    # Another model than the shipped one has the defaults of its own pipeline class.
    arguments = dict(settings.GENERATION) if path.resolve() == settings.PIPELINE_DIR.resolve() else {}
    arguments |= {name: value for name, value in overrides.items() if value is not None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"keep": list(keep or ()), "inductor": not no_inductor}

    with staged(out) as stage:
        pipe = load_pipeline(path, getattr(torch, dtype.value), device)
        outcome = compare(
            pipe,
            prompt or PROMPTS,
            arguments,
            seed=seed,
            options={**options, "dump_dir": str(stage / "dumps")},
            about={"model": str(path), "dtype": dtype.value, "device": device},
        )
        files = _write(outcome, stage, settings.FRAMES_PER_SECOND)
    console = Console(soft_wrap=not Console().is_terminal)
    print_outcome(outcome, console)
    for line in kept_lines(outcome):
        console.print(line, highlight=False, markup=False)
    console.print(f"\nWritten to {out}/: {', '.join(files)}, dumps/", highlight=False, markup=False)


def _write(outcome: Outcome, folder: Path, frames_per_second: float) -> list[str]:
    """Write videos, contact sheet and numbers; return the names of the files."""
    from .media import Comparison, comparison_gif, contact_sheet

    pairs = zip(outcome.prompts, outcome.original.videos, outcome.w4a4.videos, strict=True)
    comparisons = [Comparison(prompt, {"original": before, "W4A4": after}) for prompt, before, after in pairs]
    results: dict[str, Any] = outcome.as_json()
    for i, (comparison, entry) in enumerate(zip(comparisons, results["prompts"], strict=True)):
        words = re.sub(r"\W+", "_", comparison.caption.lower()).strip("_")[:60].rstrip("_")
        entry["video"] = "_".join(filter(None, (f"{i + 1:02d}", words))) + ".gif"
        comparison_gif(comparison, folder / entry["video"], frames_per_second=frames_per_second)
    results["contact_sheet"] = "contact_sheet.png"
    contact_sheet(comparisons, folder / results["contact_sheet"])
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    return [*(entry["video"] for entry in results["prompts"]), results["contact_sheet"], "results.json"]
