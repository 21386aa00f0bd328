"""``tahf4 quantize`` and ``tahf4 verify``: a small checkpoint from a large one, and whether it is still whole."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["quantize", "verify"]


class WeightDtype(StrEnum):
    """What floating-point tensors are cast to."""

    stored = "stored"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def quantize(
    model_dir: Annotated[Path, typer.Argument(help="A diffusers pipeline or model, or an official Wan model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new folder.")],
    recipe: Annotated[Path | None, typer.Option(help="Of tahf4 calibrate; without one, a rotation alone.")] = None,
    expert: Annotated[str | None, typer.Option(help="Which expert of the recipe a bare model is.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Regular expression: linears that stay in high precision. May be repeated.")
    ] = None,
    dtype: Annotated[
        WeightDtype, typer.Option(help="Cast to this first, as from_pretrained(torch_dtype=...) does.")
    ] = WeightDtype.stored,
    no_check_weights: Annotated[
        bool, typer.Option("--no-check-weights", help="Accept other weights than those that were calibrated.")
    ] = False,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a file of weights in MB.")] = 2000,
    hard_link: Annotated[
        bool, typer.Option("--hard-link", help="Link files that do not change instead of copying them.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="That read and pack; one a core, four at most.")] = None,
    rounding: Annotated[
        str, typer.Option(help="half_away, bfloat16_half_away as hardware for HiF4 does, or least_error.")
    ] = "half_away",
    scale_span: Annotated[
        str, typer.Option(help="Units of 64 values of a row that share a level-1 scale: 1, 2, 4 or row.")
    ] = "1",
) -> None:
    """Quantize a model on disk, tensor by tensor: the whole model is never in memory.

    Weights may be in NVFP4 or MXFP4 of ModelOpt, compressed-tensors or ComfyUI; what they lose is printed.

    The result loads with `from_pretrained`. The new folder appears when it is whole; a run that was stopped goes on
    when the same command is given again. `tahf4 verify` compares its files with their hashes later.
    """
    import torch

    from ..checkpoint.convert import quantize_checkpoint
    from ..recipe.recipe import Recipe

    done = quantize_checkpoint(
        model_dir,
        out,
        Recipe.load(recipe) if recipe is not None else None,
        expert=expert,
        keep=tuple(keep or ()),
        dtype=None if dtype is WeightDtype.stored else getattr(torch, dtype.value),
        check_weights=not no_check_weights,
        shard_size=shard_mb * 1_000_000,
        hard_link=hard_link,
        threads=threads,
        rounding=rounding,
        scale_span=int(scale_span) if scale_span.isdigit() else scale_span,
    )
    for name, plan in done.plans.items():
        packed = [d for d in plan if d.decision == "hif4"]
        before, after = sum(d.bytes_before for d in packed), sum(d.bytes_after for d in packed)
        typer.echo(
            f"{name or 'model'}: {len(packed)} of {len(plan)} linears in HiF4, "
            f"their weights {before:,} -> {after:,} bytes"
        )
    for name, losses in done.losses.items():
        worst = max(losses, key=losses.__getitem__)
        mean = sum(losses.values()) / len(losses)
        count = sum(d.decision == "hif4" for d in done.plans[name])
        typer.echo(
            f"{name or 'model'}: {len(losses)} of {count} linears in HiF4 were in {done.held[name]}; relative error of "
            f"HiF4 against that: {mean:.4f} in the mean, {losses[worst]:.4f} at most ({worst})"
        )
    if done.complete:
        typer.echo(f"{out} is complete already; nothing was written")
    else:
        resumed = f", {done.resumed} files were there already" if done.resumed else ""
        typer.echo(f"{out}: {done.bytes_read:,} bytes read, {done.bytes_written:,} written{resumed}")


def verify(folder: Annotated[Path, typer.Argument(help="Folder that tahf4 quantize wrote.")]) -> None:
    """Compare every file of a quantized checkpoint with the hash that was taken when it was written."""
    from tqdm.auto import tqdm

    from ..checkpoint.manifest import read_manifest
    from ..checkpoint.manifest import verify as compare

    total = sum(size for size, _ in read_manifest(folder)[1].values())
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, delay=1.0) as bar:
        count = compare(folder, bar.update)
    typer.echo(f"{folder}: all {count} files are what was written")
