"""Train the text encoder and the two experts by flow matching on latents that are encoded once.

First one base transformer learns all noise levels together with the text encoder; then a copy for each
expert is tuned on its side of the pipeline's boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import nn
from tqdm import tqdm
from transformers import UMT5EncoderModel

from . import data, loop, model, settings

BATCH = 16
"""Clips in a training step."""

CAPTION_DROPOUT = 0.1
"""Share of the clips that train with the empty prompt, which guidance needs."""

ENCODE_BATCH = 32


@dataclass(frozen=True)
class LatentClips:
    """Encoded clips and what they show."""

    latents: torch.Tensor
    """`[clips, channels, latent frames, height, width]`, not normalized, float16."""

    captions: torch.Tensor
    """`[clips]` indices into `data.all_captions()`."""


class TextToVideo(nn.Module):
    """The two parts of the pipeline that the base stage trains together."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        """Hold the two modules."""
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer


def encode_clips(vae: AutoencoderKLWan, count: int, work_dir: Path, seed: int) -> LatentClips:
    """Render and encode `count` clips, every caption equally often, or read them from the work folder."""
    path = work_dir / "latents.pt"
    if path.exists():
        return LatentClips(**torch.load(path, weights_only=True))
    captions = data.all_captions()
    indices = torch.arange(count) % len(captions)
    parts = []
    for start in tqdm(range(0, count, ENCODE_BATCH), desc="latents", mininterval=10.0):
        rng, _ = loop.step_generators(seed, "latents", start)
        clips, _ = data.render_batch([captions[i] for i in indices[start : start + ENCODE_BATCH]], rng)
        with torch.no_grad():
            parts.append(vae.encode(clips * 2 - 1).latent_dist.mode().half())
    encoded = LatentClips(torch.cat(parts), indices)
    loop.save_atomically({"latents": encoded.latents, "captions": encoded.captions}, path)
    return encoded


def set_latent_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Write the mean and deviation of every latent channel into the autoencoder's configuration."""
    channels = latents.float().transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())


def embed_prompts(pipeline: WanPipeline, prompts: list[str]) -> torch.Tensor:
    """Return `[prompts, MAX_SEQUENCE_LENGTH, TEXT_DIM]` embeddings by the pipeline's own prompt path."""
    embeddings, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=settings.MAX_SEQUENCE_LENGTH
    )
    return embeddings


def flow_matching_loss(
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    embeddings: torch.Tensor,
    sigma: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the squared error of the predicted velocity from data to noise.

    Args:
        transformer: The expert.
        latents: `[clips, channels, frames, height, width]`, normalized.
        embeddings: `[clips, tokens, TEXT_DIM]`.
        sigma: `[clips]` noise levels in [0, 1].
        generator: Where the noise comes from.
    """
    noise = torch.randn(latents.shape, generator=generator)
    level = sigma.view(-1, 1, 1, 1, 1)
    velocity = transformer(
        hidden_states=(1 - level) * latents + level * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=embeddings,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - latents)


def _draw(
    clips: LatentClips, vae: AutoencoderKLWan, low: float, high: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a batch: normalized latents, caption indices (−1 where dropped), and sigmas.

    The sigmas are the sampler's for positions spread evenly over [low, high] of its steps.
    """
    rows = torch.randint(len(clips.captions), (BATCH,), generator=generator)
    captions = clips.captions[rows].clone()
    captions[torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT] = -1
    uniform = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    sigma = model.shift_sigma(low + (high - low) * uniform)
    return model.normalize_latents(vae, clips.latents[rows].float()), captions, sigma


def train_base(
    pipeline: WanPipeline,
    clips: LatentClips,
    stage: loop.Stage,
    work_dir: Path,
    seed: int,
    stop_after: int | None = None,
) -> TextToVideo:
    """Train the pipeline's text encoder and first transformer on all noise levels."""
    prompts = [*map(str, data.all_captions()), ""]

    def loss(parts: TextToVideo, step: int, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        latents, captions, sigma = _draw(clips, pipeline.vae, 0.0, 1.0, generator)
        embeddings = embed_prompts(pipeline, [prompts[i] for i in captions])
        return flow_matching_loss(parts.transformer, latents, embeddings, sigma, generator)

    parts = TextToVideo(pipeline.text_encoder, pipeline.transformer)
    return loop.train(stage, parts, loss, work_dir, seed, stop_after)


def train_expert(
    pipeline: WanPipeline,
    expert: WanTransformer3DModel,
    sigmas: tuple[float, float],
    clips: LatentClips,
    stage: loop.Stage,
    work_dir: Path,
    seed: int,
    stop_after: int | None = None,
) -> WanTransformer3DModel:
    """Train one expert between two noise levels, with the pipeline's text encoder as it is."""
    low, high = (model.unshift_sigma(sigma) for sigma in sigmas)
    with torch.no_grad():
        embeddings = embed_prompts(pipeline, [*map(str, data.all_captions()), ""])

    def loss(
        transformer: WanTransformer3DModel, step: int, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        latents, captions, sigma = _draw(clips, pipeline.vae, low, high, generator)
        return flow_matching_loss(transformer, latents, embeddings[captions], sigma, generator)

    return loop.train(stage, expert, loss, work_dir, seed, stop_after)
