"""Judge the tiny pipeline: `python -m tahf4_compiler.tools.tiny_wan.evaluate`.

Prints how often reconstructions and generated clips show each word of their caption.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image
from tqdm import tqdm

from . import data, model, settings
from .judge import judge

BATCH = 8


def rates(videos: np.ndarray, captions: list[data.Caption]) -> dict[str, float]:
    """Judge clips against their captions.

    Args:
        videos: `[clips, frames, height, width, 3]` in [0, 1].
        captions: What each clip should show.

    Returns:
        The share of clips that show each word and that show all of them, and the means of the scores.
    """
    verdicts = [judge(video) for video in videos]
    matches = [verdict.matches(caption) for verdict, caption in zip(verdicts, captions, strict=True)]
    table = {word: float(np.mean([match[word] for match in matches])) for word in matches[0]}
    table["all words"] = float(np.mean([all(match.values()) for match in matches]))
    for score in ("shape_overlap", "subject_consistency", "motion_smoothness"):
        table[score.replace("_", " ")] = float(np.mean([getattr(verdict, score) for verdict in verdicts]))
    return table


def reconstruct(vae: AutoencoderKLWan, captions: list[data.Caption], seed: int) -> np.ndarray:
    """Render, encode and decode a clip for each caption: `[clips, frames, height, width, 3]` in [0, 1]."""
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, len(captions), BATCH):
        clips, _ = data.render_batch(captions[start : start + BATCH], rng)
        with torch.no_grad():
            parts.append(vae.decode(vae.encode(clips * 2 - 1).latent_dist.mode()).sample / 2 + 0.5)
    return torch.cat(parts).permute(0, 2, 3, 4, 1).numpy()


def generate(pipeline: WanPipeline, captions: list[data.Caption], seed: int, **overrides: object) -> np.ndarray:
    """Generate a clip for each caption: `[clips, frames, height, width, 3]` in [0, 1].

    Clip `i` starts from the noise of seed `seed + i`. `overrides` replace entries of `settings.GENERATION`.
    """
    arguments = {**settings.GENERATION, **overrides}
    negative = arguments.pop("negative_prompt")
    parts = []
    for start in tqdm(range(0, len(captions), BATCH), desc="generating", mininterval=5.0):
        prompts = [str(caption) for caption in captions[start : start + BATCH]]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(prompts))]
        negatives = [negative] * len(prompts)
        parts.append(pipeline(prompts, negatives, generator=noise, output_type="np", **arguments).frames)
    return np.concatenate(parts)


def contact_sheet(videos: np.ndarray, scale: int = 2) -> Image.Image:
    """Lay `[clips, frames, height, width, 3]` in [0, 1] out in rows of frames, enlarged `scale` times."""
    clips, frames, height, width, _ = videos.shape
    sheet = videos.transpose(0, 2, 1, 3, 4).reshape(clips * height, frames * width, 3)
    picture = Image.fromarray((np.clip(sheet, 0, 1) * 255).round().astype(np.uint8))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _report(title: str, table: dict[str, float]) -> None:
    print(title)
    for name, value in table.items():
        print(f"  {name:20} {value:.3f}")


def main(
    path: Annotated[Path, typer.Option(help="Folder of the saved pipeline.")] = settings.PIPELINE_DIR,
    prompts: Annotated[int, typer.Option(help="Clips to judge.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the noise.")] = 1,
    sheet: Annotated[Path | None, typer.Option(help="PNG of the first twelve generated clips.")] = None,
) -> None:
    """Judge reconstructions and generated clips of a saved pipeline."""
    pipeline = model.load_pipeline(path)
    captions = data.random_captions(prompts, np.random.default_rng(seed))
    _report(f"reconstructions of {prompts} clips", rates(reconstruct(pipeline.vae, captions, seed), captions))
    start = time.perf_counter()
    videos = generate(pipeline, captions, seed)
    seconds = (time.perf_counter() - start) / prompts
    _report(f"generated clips for {prompts} prompts, {seconds:.2f} s each", rates(videos, captions))
    if sheet is not None:
        contact_sheet(videos[:12]).save(sheet)


if __name__ == "__main__":
    typer.run(main)
