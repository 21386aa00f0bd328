"""Train the video autoencoder: single frames first, then short clips, then whole clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from . import data, loop

LATENT_NOISE = 0.1
"""Standard deviation of the noise on the latents, in training and in the encoder's posterior."""

LATENT_PENALTY = 2e-4
"""Weight of the mean square of the latents, which keeps them near unit scale."""

OBJECT_WEIGHT = 6.0
"""Extra weight of the pixels of the object and of its outline, as the background is most of the picture."""


@dataclass(frozen=True)
class Phase:
    """A share of the steps that train on clips of one length."""

    share: float
    frames: int
    clips: int


PHASES = (Phase(0.25, 1, 24), Phase(0.35, 5, 8), Phase(0.40, 9, 8))
"""Phases of the schedule, in order; the shares add to one."""


def phase_at(step: int, steps: int) -> Phase:
    """Return the phase that a step of a stage of `steps` steps belongs to."""
    end = 0.0
    for phase in PHASES:
        end += phase.share * steps
        if step < end:
            return phase
    return PHASES[-1]


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decode without the final clamp of `AutoencoderKLWan.decode`, through which no gradient flows.

    Args:
        vae: The autoencoder.
        latents: `[clips, z_dim, latent frames, height, width]`, not normalized.

    Returns:
        `[clips, 3, frames, height, width]`, nominally in [-1, 1].
    """
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    frames = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), patch_size=vae.config.patch_size)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean absolute error, where objects and their outlines weigh more.

    Args:
        output: `[clips, 3, frames, height, width]`.
        target: Like `output`.
        masks: Object coverage in [0, 1], `[clips, frames, height, width]`.
    """
    weight = 1.0 + OBJECT_WEIGHT * F.max_pool2d(masks, 5, stride=1, padding=2)
    weight = (weight / weight.mean())[:, None]
    return ((output - target).abs() * weight).mean()


def freeze_posterior_noise(vae: AutoencoderKLWan) -> None:
    """Set the posterior's standard deviation to `LATENT_NOISE` for every input.

    The loss never reads the log-variance, so it keeps this value through the training.
    """
    z_dim = vae.config.z_dim
    with torch.no_grad():
        vae.quant_conv.weight[z_dim:].zero_()
        vae.quant_conv.bias[z_dim:].fill_(2 * float(np.log(LATENT_NOISE)))


def train_vae(
    vae: AutoencoderKLWan, stage: loop.Stage, work_dir: Path, seed: int, stop_after: int | None = None
) -> AutoencoderKLWan:
    """Train an autoencoder on rendered clips and return it with averaged weights."""

    def loss(model: AutoencoderKLWan, step: int, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        phase = phase_at(step, stage.steps)
        clips, masks = data.render_batch(data.random_captions(phase.clips, rng), rng, phase.frames)
        clips = clips * 2 - 1
        latents = model.encode(clips).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=generator)
        output = decode_unclamped(model, latents + LATENT_NOISE * noise)
        return reconstruction_loss(output, clips, masks) + LATENT_PENALTY * latents.square().mean()

    freeze_posterior_noise(vae)
    return loop.train(stage, vae, loss, work_dir, seed, stop_after)
