"""Train the tiny Wan2.2 pipeline: `python -m tahf4_compiler.tools.tiny_wan.train`.

Every stage leaves a checkpoint in the work folder. A run that was killed continues where it stopped, and
ends with the same weights as one that was not; a stage that is done is skipped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ...model.components import WAN_EXPERTS
from . import data, loop, model, settings
from .train_transformers import encode_clips, set_latent_statistics, train_base, train_expert
from .train_vae import train_vae


@dataclass(frozen=True)
class Schedule:
    """All stages of a training."""

    vae: loop.Stage
    clips: int
    base: loop.Stage
    high_noise: loop.Stage
    low_noise: loop.Stage


FULL = Schedule(
    vae=loop.Stage("vae", 3600, 2e-3),
    clips=6144,
    base=loop.Stage("base", 1350, 1e-3),
    high_noise=loop.Stage("high_noise", 1100, 8e-4, average_decay=0.995),
    low_noise=loop.Stage("low_noise", 900, 5e-4, average_decay=0.995),
)
"""The schedule of the shipped weights.

They were trained in about 80 minutes on 2 cores that did other work as well: VAE 40, latents 1, base 16, and
the experts 20, side by side in two processes of one thread. The base stage was interrupted once: its first 300
steps followed the learning rate of a stage of 1900 steps. A run of this schedule from the start will
therefore differ in the digits.
"""

QUICK = Schedule(
    vae=replace(FULL.vae, steps=20),
    clips=2 * len(data.all_captions()),
    base=replace(FULL.base, steps=5),
    high_noise=replace(FULL.high_noise, steps=2),
    low_noise=replace(FULL.low_noise, steps=2),
)
"""A smoke run: every stage, no quality."""


def train_pipeline(schedule: Schedule, out: Path, work_dir: Path, seed: int) -> None:
    """Train every stage that is not done and save the pipeline to `out`.

    Args:
        schedule: The stages.
        out: Folder of the saved pipeline; replaced if it exists.
        work_dir: Folder of the checkpoints; belongs to one schedule and one seed.
        seed: Seed of the initial weights and of every training step.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    pipeline = model.build_pipeline(seed)

    pipeline.vae = train_vae(pipeline.vae, schedule.vae, work_dir, seed)
    model.round_to_bfloat16(pipeline.vae)
    clips = encode_clips(pipeline.vae, schedule.clips, work_dir, seed)
    set_latent_statistics(pipeline.vae, clips.latents)

    base = train_base(pipeline, clips, schedule.base, work_dir, seed)
    pipeline.text_encoder = base.text_encoder
    model.round_to_bfloat16(pipeline.text_encoder)

    boundary = model.BOUNDARY_RATIO
    for name, sigmas, stage in (
        (WAN_EXPERTS[0], (boundary, 1.0), schedule.high_noise),
        (WAN_EXPERTS[1], (0.0, boundary), schedule.low_noise),
    ):
        start = copy.deepcopy(base.transformer).requires_grad_(True).train()
        setattr(pipeline, name, train_expert(pipeline, start, sigmas, clips, stage, work_dir, seed))
    model.save_pipeline(pipeline, out)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the trained pipeline.")] = settings.PIPELINE_DIR,
    work_dir: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("build/tiny-wan/work"),
    seed: Annotated[int, typer.Option(help="Seed of the whole training.")] = 0,
    quick: Annotated[bool, typer.Option(help="A smoke run of every stage, without quality.")] = False,
) -> None:
    """Train the tiny Wan2.2 pipeline; run it again after a kill to continue."""
    train_pipeline(QUICK if quick else FULL, out, work_dir / "quick" if quick else work_dir, seed)
    print(f"saved {out} ({sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    typer.run(main)
